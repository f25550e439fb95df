from __future__ import annotations

import io
import itertools
import math
import textwrap
from dataclasses import replace
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_trtcheck.record import (
    BudgetRecord,
    CheckRecord,
    EngineRecord,
    Evidence,
    JudgedRecord,
    LatencyRecord,
    OutputRecord,
    ParityRecord,
    Verdict,
)
from pytest_trtcheck.report.terminal import Writer, show, summary_lines
from pytest_trtcheck.report.text import (
    MESSAGE_WIDTH,
    columns,
    folded,
    format_against,
    format_number,
    one_line,
    shorten_apart,
    shorten_middle,
)
from pytest_trtcheck.report.view import decisive, labels, natural


def output(
    value: float, limit: float, *, name: str = "logits", metric: str = "max", verdict: Verdict = "pass"
) -> OutputRecord:
    judged = JudgedRecord(metric, value, limit, "tol", verdict)
    return OutputRecord(name, "float32", (8, 10), max=value, verdict=verdict, judged=(judged,))


def parity(*outputs: OutputRecord, metric: str = "max", tol: float | None = 0.01) -> ParityRecord:
    worst = max((o.max for o in outputs if o.max is not None), default=None)
    verdicts = [o.verdict for o in outputs]
    verdict: Verdict = "fail" if "fail" in verdicts else "pass"
    return ParityRecord(verdict, metric, tol, worst, outputs)


def check(
    nodeid: str = "tests/test_a.py::test_a",
    model: str = "models/resnet50.onnx",
    *,
    parity: ParityRecord | None = None,
    latency: LatencyRecord | None = None,
    evidence: Evidence | None = "emulated",
    verdict: Verdict | None = None,
    notes: tuple[str, ...] = (),
    message: str | None = None,
    compiled_for: str | None = None,
) -> CheckRecord:
    """A record as the reports get it: written as JSON and read back."""
    reached = verdict or (parity.verdict if parity else latency.verdict if latency else "pass")
    record = CheckRecord(
        nodeid,
        model,
        reached,
        precision="fp16",
        evidence=evidence,
        parity=parity,
        latency=latency,
        notes=notes,
        message=message,
        compiled_for=compiled_for,
    )
    return CheckRecord.from_json(record.to_json())


def summary(records: list[CheckRecord], width: int = 80) -> str:
    return "\n".join(line.text for line in summary_lines(records, width))


def row(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(start)).split()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (4.523e-4, 1e-2, ("4.52e-4", "0.01")),
        (1.0349, 1e-2, ("1.03", "0.01")),
        (0.01000004, 0.01, ("0.01000004", "0.01")),
        (0.00999996, 0.01, ("0.00999996", "0.01")),
        (0.01, 0.01, ("0.0100", "0.01")),
        (1.2, 1.1 + 0.3, ("1.20", "1.4")),
        (1.4, 1.1 + 0.3, ("1.40", "1.4000000000000001")),
        (math.inf, 0.01, ("inf", "0.01")),
        (math.nan, 0.01, ("nan", "0.01")),
        (0.0, 0.0, ("0", "0")),
        (1e-300, 0.0, ("1.00e-300", "0")),
    ],
)
def test_value_and_limit_as_text(value: float, limit: float, expected: tuple[str, str]) -> None:
    assert format_against(value, limit) == expected


@given(value=st.floats(allow_nan=False), limit=st.floats(allow_nan=False, allow_infinity=False, min_value=0))
@example(value=math.nextafter(0.01, 1), limit=0.01)
@example(value=0.9996, limit=1.0)
@example(value=-0.0, limit=5e-324)
@example(value=1.0000000000004, limit=1.0000000000001)
def test_what_is_read_compares_as_what_was_measured(value: float, limit: float) -> None:
    value_text, limit_text = (float(text) for text in format_against(value, limit))

    assert (value_text > limit_text) == (value > limit)
    assert (value_text < limit_text) == (value < limit)


@given(st.floats(-1e300, 1e300))
def test_a_number_keeps_three_digits(value: float) -> None:
    assert float(format_number(value)) == pytest.approx(value, rel=5.1e-3, abs=0)


# --- names -----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.integers(5, 40))
def test_a_shortened_name_fits_and_keeps_its_ends(text: str, width: int) -> None:
    short = shorten_middle(text, width)

    assert columns(short) <= max(width, 0)
    head, cut, tail = short.partition("…") if short != text else (text, "", "")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert cut or short == text


def test_models_are_named_by_as_much_of_the_path_as_tells_them_apart() -> None:
    models = ["/lib/magika/v3/model.onnx", "/lib/ocr/v3/model.onnx", "nets/resnet50.onnx", "<bytes>"]
    records = [check(f"t.py::test_{index}", model) for index, model in enumerate(models)]

    assert labels(records) == ["magika/v3/model.onnx", "ocr/v3/model.onnx", "resnet50.onnx", "<bytes>"]


def test_rows_that_would_look_the_same_are_told_apart_by_their_test() -> None:
    records = [check("t.py::test_a[fp16-b1]"), check("t.py::test_a[fp16-b8]"), check("t.py::test_b")]

    assert labels(records) == ["resnet50.onnx a[b1]", "resnet50.onnx a[b8]", "resnet50.onnx b"]
    assert labels(records[:2]) == ["resnet50.onnx [b1]", "resnet50.onnx [b8]"]
    odd = [check("d/t.py::T::test_a[x::y[z]]"), check("d/t.py::T::test_b[a/b]")]
    assert labels(odd) == ["resnet50.onnx a[x::y[z]]", "resnet50.onnx b[a/b]"]


def test_what_the_column_of_the_precision_says_is_not_said_twice() -> None:
    tests = ("test_int8", "test_int8_latency", "test_both[int8]", "test_integers_int8_x", "test_int80[a-int8-b]")
    records = [replace(check(f"t.py::{name}"), precision="int8") for name in tests]
    assert [label.test for label in labels(records)] == ["", "latency", "both", "integers_x", "int80[a-b]"]


def test_tests_of_one_name_in_several_files_stay_apart() -> None:
    records = [check("a/test_x.py::test_a"), check("b/test_y.py::TestZ::test_a")]
    assert [label.test for label in labels(records)] == ["test_x.py::test_a", "test_y.py::TestZ::test_a"]


NAMES = st.text("ab_漢é", min_size=1, max_size=70)


@given(
    tests=st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=12, unique=True),
    width=st.sampled_from([60, 80, 120, 200]),
)
def test_a_row_keeps_its_models_name_and_rows_differ(tests: list[tuple[str, str]], width: int) -> None:
    records = [check(f"t.py::test_{test}", f"{model}.onnx", parity=parity(output(1e-4, 1e-2))) for model, test in tests]
    lines = [line.text for line in summary_lines(records, width)]
    table = lines[1 : 1 + len(tests)]
    assert max(map(columns, lines)) <= max(width, 67)
    for name in {label.model for label in labels(records)}:
        if columns(name) <= (12 if width < 80 else 24):
            assert any(line.startswith(name) for line in table), table


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_what_all_rows_share_gives_way_before_their_names(width: int) -> None:
    model = "detector_of_the_name_640x640.onnx"
    text = summary([check(model=model, parity=parity(output(1e-4, 1e-2)))], width)
    assert (model in text) == (width >= 80)
    assert ("evidence: emulated" in text) == (width <= 80)
    mixed = [check(model=model, evidence=each, parity=parity(output(1e-4, 1e-2))) for each in ("emulated", "engine")]
    assert "evidence: " not in summary(mixed, width)


def test_what_did_not_pass_comes_first() -> None:
    verdicts: list[Verdict] = ["pass", "error", "inconclusive", "fail"]
    records = [
        check(f"t.py::test_{index}", f"{index}.onnx", parity=replace(parity(output(1e-4, 1e-2)), verdict=verdict))
        for index, verdict in enumerate(verdicts)
    ]
    assert [line.split()[-1] for line in summary(records).splitlines()[1:5]] == [
        "error",
        "fail",
        "inconclusive",
        "pass",
    ]


def test_of_many_checks_those_that_pass_are_summed_up() -> None:
    records = [
        check(
            f"t.py::test_{index}", f"{index}.onnx", parity=parity(output(index / 1e5, 1e-2)), notes=(f"note {index}",)
        )
        for index in range(300)
    ]
    bad = check("t.py::test_bad", "bad.onnx", parity=parity(output(0.2, 1e-2, verdict="fail")))
    text = "\n".join(line.text for line in summary_lines([*records, bad], 80, "auto"))
    assert len(text.splitlines()) < 20
    assert [line for line in text.splitlines() if ".onnx  " in line and line.endswith("fail")]
    assert "300 checks that pass are not listed (--trt-summary=all lists them): 300 fp16;" in text
    assert "299.onnx, 0.00299 of max ≤ 0.01 (30%)" in " ".join(text.split())
    assert "and 295 notes more" in text
    assert text.endswith("301 checks: 300 pass, 1 fail")
    assert "not listed" not in summary([*records, bad])
    assert [line.text for line in summary_lines([*records, bad], 80, "none")] == ["301 checks: 300 pass, 1 fail"]
    assert "299.onnx  " not in "\n".join(line.text for line in summary_lines([records[-1], bad], 80, "failed"))


def test_node_ids_sort_by_the_numbers_in_them() -> None:
    assert sorted(["t[b16]", "t[b8]", "t[b1]", "s"], key=natural) == ["s", "t[b1]", "t[b8]", "t[b16]"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert one_line("a\x1b[31mb\nc\u2028d\u202e") == "a\\x1b[31mb c d\\u202e"
    text = summary([check(model="evil\x1b[2J\n.onnx", notes=("two\nlines",), parity=parity(output(1e-4, 1e-2)))])
    assert "\x1b" not in text
    assert "note: two lines" in text


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_row_says_what_was_measured_against_what_limit() -> None:
    text = summary([check(parity=parity(output(4.5e-4, 1e-2)))])

    assert row(text, "model") == ["model", "precision", "evidence", "worst", "error", "tolerance", "verdict"]
    assert row(text, "resnet50.onnx") == ["resnet50.onnx", "fp16", "emulated", "4.50e-4", "max", "≤", "0.01", "pass"]


def test_the_output_that_failed_is_shown_not_the_one_with_the_larger_error() -> None:
    loose, strict = output(0.04, 0.05, name="loose"), output(0.02, 0.01, name="strict", verdict="fail")
    record = check(parity=parity(loose, strict, tol=None))

    assert row(summary([record]), "resnet50")[3:] == ["0.0200", "max", "≤", "0.01", "fail"]
    judgement = decisive(record)
    assert judgement is not None
    assert judgement.output == "strict"


def test_a_signal_to_noise_ratio_has_a_least_value() -> None:
    record = check(parity=parity(output(39.9, 40, metric="snr_db", verdict="fail"), output(60, 40, metric="snr_db")))

    assert row(summary([record]), "resnet50")[3:] == ["39.9", "snr_db", "≥", "40", "fail"]


def test_infinite_errors_are_read_back_and_shown() -> None:
    record = check(parity=parity(output(math.inf, 0.01, verdict="fail"), output(0.5, 0.01, verdict="fail")))

    assert row(summary([record]), "resnet50")[3] == "inf"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_could_not_be_computed_is_worse_than_any_number(bad: float) -> None:
    record = check(parity=parity(output(9.0, 0.01, verdict="fail"), output(bad, 0.01, verdict="fail")))

    assert row(summary([record]), "resnet50")[3] == str(bad)


def test_a_metric_that_could_not_be_computed_is_worse_than_one_that_is_infinite() -> None:
    cosine = JudgedRecord("cosine", None, 0.1, "tol", "error")
    outputs = output(math.inf, 0.01, verdict="fail"), replace(output(1.0, 0.1), judged=(cosine,))
    record = check(parity=replace(parity(*outputs), verdict="error"))

    assert row(summary([record]), "resnet50")[3:] == ["–", "cosine", "≤", "0.1", "error"]


def test_an_output_of_another_shape_has_no_number() -> None:
    shape = JudgedRecord("shape", None, None, "the reference", "fail")
    record = check(parity=parity(replace(output(1.0, 0.1, verdict="fail"), judged=(shape,))))

    assert row(summary([record]), "resnet50")[3:] == ["–", "same", "shape", "fail"]


def test_a_check_that_ended_in_an_error_has_its_row() -> None:
    text = summary([check(verdict="error", evidence=None, message="models/broken.onnx is no ONNX")])

    assert row(text, "resnet50") == ["resnet50.onnx", "fp16", "–", "–", "–", "error"]
    assert text.endswith("1 check: 1 error")


def test_a_check_that_fails_beside_its_parts_has_no_row_that_says_pass() -> None:
    text = summary([check(verdict="fail", parity=parity(output(1e-4, 1e-2)))])

    assert row(text, "resnet50")[-1] == "fail"
    assert row(summary([check(parity=parity(output(1e-4, 1e-2)))]), "resnet50")[-1] == "pass"


def test_no_checks_no_summary() -> None:
    assert summary_lines([]) == []


@given(
    model=st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=90),
    value=st.floats(0, 1e6),
    limit=st.sampled_from([1e-4, 0.01, 0.05]),
    metric=st.sampled_from(["max", "l2", "top1", "cosine", "snr_db", "allclose"]),
    verdict=st.sampled_from(["pass", "fail", "inconclusive"]),
)
def test_the_table_fits_80_columns(model: str, value: float, limit: float, metric: str, verdict: Verdict) -> None:
    record = check(model=model, parity=parity(output(value, limit, metric=metric, verdict=verdict)))

    assert max(columns(line.text) for line in summary_lines([record], 80)) <= 80


def test_the_order_of_the_records_does_not_matter() -> None:
    records = [
        check(f"tests/test_{name}.py::test_x[b{batch}]", parity=parity(output(batch / 1e4, 1e-2)), notes=(name,))
        for name in "ab"
        for batch in (1, 8, 16)
    ]

    assert summary(records) == summary(records[::-1]) == summary(records[3:] + records[:3])


def test_two_checks_of_one_test_keep_their_order() -> None:
    records = [check(parity=parity(output(value, 1e-2))) for value in (2e-3, 1e-3)]

    assert [line.split()[4] for line in summary(records).splitlines()[1:3]] == ["0.00200", "0.00100"]


# --- what was not run or measured ------------------------------------------------------------------------------------


def test_emulated_evidence_is_said_plainly() -> None:
    emulated = check("t.py::a", parity=parity(output(1e-4, 1e-2)))
    engine = check("t.py::b", evidence="engine", parity=parity(output(1e-4, 1e-2)))

    assert "emulated on CPU: not run on a GPU." in summary([emulated])
    assert "emulated on CPU: not run on a GPU (1 of 2 checks)." in summary([emulated, engine])
    assert "emulated on CPU" not in summary([engine])


def test_an_engine_that_was_built_but_not_run_is_said() -> None:
    text = summary([check(compiled_for="sm75", parity=parity(output(1e-4, 1e-2)))])

    assert "built for sm75, not run: 1 engine" in text


def test_an_engine_that_several_checks_share_is_one() -> None:
    engines = [EngineRecord(key, cached=True, miss_reason=None, build_s=1.0, bytes=1) for key in "aab"]
    within = parity(output(1e-4, 1e-2))
    records = [replace(check(f"t.py::{i}", parity=within), compiled_for="T4", engine=engines[i]) for i in range(3)]

    assert "built for T4, not run: 2 engines" in summary(records)


def test_reasons_for_what_was_not_measured_are_grouped() -> None:
    unmeasured = LatencyRecord("not_measured", reason="no GPU on this machine", gpu="T4")
    records = [check(f"t.py::{i}", parity=parity(output(1e-4, 1e-2)), latency=unmeasured) for i in range(3)]
    records.append(check("t.py::z", latency=LatencyRecord("not_measured", reason="no budget for H200", gpu="H200")))

    text = summary(records)

    assert "latency not measured (3 checks): no GPU on this machine" in text
    assert "latency not measured (1 check): no budget for H200" in text
    assert text.endswith("4 checks: 3 pass, 1 not measured")


def test_notes_are_said_once() -> None:
    records = [check(f"t.py::{i}", parity=parity(output(1e-4, 1e-2)), notes=("seed 0",)) for i in range(3)]

    assert summary(records).count("seed 0") == 1
    assert "note: seed 0 (3 checks)" in summary(records)


# --- latency ---------------------------------------------------------------------------------------------------------


def latency(verdict: Verdict, **changes: Any) -> LatencyRecord:
    values: dict[str, Any] = {
        "gpu": "T4",
        "samples": 3000,
        "p50_ms": 6.52,
        "p99_ms": 9.1,
        "bounds_ms": {"p50": (6.4, 6.6), "p99": (8.8, 9.6)},
        "budgets": (
            BudgetRecord("pass", quantile="p50", limit_ms=7.0),
            BudgetRecord(verdict, quantile="p99", limit_ms=9.0),
        ),
    }
    return LatencyRecord(verdict, **{**values, **changes})


def test_each_budget_has_a_row() -> None:
    text = summary([check(latency=latency("fail"), evidence="engine")])

    rows = [line.split() for line in text.splitlines() if line.startswith("resnet50")]
    assert rows == [
        ["resnet50.onnx", "fp16", "T4", "p99", "9.10", "ms", "≤", "9", "ms", "fail"],
        ["resnet50.onnx", "fp16", "T4", "p50", "6.52", "ms", "≤", "7", "ms", "pass"],
    ]


def test_an_open_verdict_shows_the_bounds_that_kept_it_open() -> None:
    text = summary([check(latency=latency("inconclusive", reason="the GPU throttled"), evidence="engine")])

    assert "p99 8.80–9.60 ms  ≤ 9 ms  inconclusive" in text
    assert "inconclusive (1 check): the GPU throttled" in text


def test_latency_without_a_budget_is_shown_and_not_passed() -> None:
    text = summary([check(latency=latency("not_measured", budgets=(), reason="no budget for H200"))])

    assert row(text, "resnet50")[3:] == ["p50", "6.52", "ms", "no", "budget", "not", "measured"]


def test_budgets_other_than_quantiles() -> None:
    budgets = (
        BudgetRecord("fail", "min_qps", value=812.4, limit=900.0),
        BudgetRecord("pass", "memory_mib", value=211.0, limit=256.0),
    )
    text = summary([check(latency=latency("fail", budgets=budgets), evidence="engine")])

    assert "min_qps 812 /s  ≥ 900 /s   fail" in text
    assert "memory_mib 211 MiB  ≤ 256 MiB  pass" in text


# --- style -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "colour"), [("pass", "32"), ("fail", "31"), ("error", "31"), ("inconclusive", "33")]
)
def test_verdicts_are_coloured_by_pytests_own_reporter(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, colour: str
) -> None:
    record = check(parity=replace(parity(output(1e-4, 1e-2)), verdict=verdict))
    monkeypatch.setenv("PY_COLORS", "1")
    stream = io.StringIO()
    writer: Writer = TerminalReporter(pytestconfig, stream)

    show(summary_lines([record]), writer)

    line = next(line for line in stream.getvalue().splitlines() if line.startswith("resnet50"))
    assert line.endswith(f"{verdict}\x1b[0m")
    assert f"\x1b[{colour}m" in line


def test_a_failure_that_the_test_expects_is_no_alarm() -> None:
    record = replace(check(parity=parity(output(1.03, 1e-2, verdict="fail"))), expected_failure="broken in FP16")

    text = summary([record])

    assert row(text, "resnet50")[-1] == "xfail"
    assert text.endswith("1 check: 1 xfail")


def test_long_names_that_differ_in_the_middle_stay_apart() -> None:
    apart = shorten_apart(["PP-OCRv4_det_infer.onnx", "PP-OCRv4_rec_infer.onnx", "short.onnx"], 16)
    assert apart == ["…_det_infer.onnx", "…_rec_infer.onnx", "short.onnx"]


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_message_fits_the_terminal_and_hangs() -> None:
    text = (
        "net.onnx: a headline that goes on for some time\n"
        "  → a hint that goes on for some time too, with keep=\n"
        "  worst at       [0, 4]: expected 1.5, got 2.5, off by 1\n"
        "  passes with  max 9.3e-05, confirmed on all inputs by emulation, which takes its time to say it:\n"
        '    keep_fp32=["a name with spaces in it", "and another one"]'
    )
    assert folded(text, 40).split("\n") == [
        "net.onnx: a headline that goes on for",
        "some time",
        "  → a hint that goes on for some time",
        "    too, with keep=",
        "  worst at       [0, 4]: expected 1.5,",
        "                 got 2.5, off by 1",
        "  passes with  max 9.3e-05, confirmed on",
        "               all inputs by emulation,",
        "               which takes its time to",
        "               say it:",
        '    keep_fp32=["a name with spaces in it", "and another one"]',
    ]
    assert folded(text, 100) == text


@given(st.lists(st.text("ab ", min_size=1, max_size=12), min_size=1, max_size=60), st.sampled_from([60, 80, 200]))
def test_what_was_wrapped_for_no_terminal_in_particular_is_wrapped_anew(words: list[str], width: int) -> None:
    whole = " ".join(" ".join(words).split()) or "a"
    wrapped = textwrap.wrap(whole, MESSAGE_WIDTH, initial_indent="  looks like     ", subsequent_indent=" " * 17)
    lines = [*wrapped, "  over the limit 10 of 10 elements"]
    found = folded("\n".join(lines), width).split("\n")
    assert " ".join(" ".join(found).split()) == " ".join(" ".join(lines).split())
    assert found[-1] == lines[-1]
    for line, after in itertools.pairwise(found[:-1]):
        assert len(line) + 1 + len(after.split()[0]) > width
