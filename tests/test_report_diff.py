"""The difference of two reports: what is worse, what is not comparable, and that nothing is compared silently."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_trtcheck import __main__
from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.record import (
    BudgetRecord,
    CalibrationRecord,
    CheckRecord,
    EngineRecord,
    GpuRecord,
    JudgedRecord,
    LatencyDetails,
    LatencyRecord,
    Library,
    LoweredRecord,
    MissingRecord,
    OutputRecord,
    ParityRecord,
    RunRecord,
    SearchRecord,
    jsonable,
    typed,
)
from pytest_trtcheck.report import diff_text
from pytest_trtcheck.report.diff import ReportDiff, diff
from pytest_trtcheck.report.json_report import document, environment, save
from pytest_trtcheck.report.text import columns

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Suite

GPU = GpuRecord("NVIDIA H200", "GPU-1", "9.0")


def latency(p50_ms: float = 1.0, seed: int = 0, samples: int = 1000, **details: object) -> LatencyRecord:
    """A median with 1 % of noise, as a GPU run records it."""
    taken = p50_ms * (1 + 0.01 * np.random.default_rng(seed).normal(size=samples))
    found = Distribution.of(taken)
    return LatencyRecord(
        "pass",
        gpu="H200",
        samples=samples,
        p50_ms=found.quantile_ms("p50_ms"),
        p99_ms=found.quantile_ms("p99_ms"),
        budgets=(BudgetRecord("pass", "p50_ms", "p50", limit_ms=5.0),),
        details=typed(
            {
                "measured": "GPU time",
                "cuda_graph": True,
                "conditions": {"sm_mhz": 1590},
                "distribution": found.to_json(),
                **details,
            },
            LatencyDetails,
        ),
    )


def output(name: str = "boxes", value: float | None = 0.004, limit: float | None = 0.01, **more: Any) -> OutputRecord:
    metric = more.pop("metric", "max")
    verdict = more.pop("verdict", "pass")
    judged = JudgedRecord(metric, value, limit, "tol", verdict, at_least=more.pop("at_least", None))
    return OutputRecord(name, "float32", (1, 4), judged=(judged,), verdict=verdict, **more)


def check(nodeid: str = "tests/test_a.py::test_a[int8]", **changes: Any) -> CheckRecord:
    values: dict[str, Any] = {
        "verdict": "pass",
        "model_sha256": "a" * 64,
        "precision": "int8",
        "backend": "tensorrt_rtx",
        "evidence": "engine",
        "cases": 2,
        "seed": 0,
        "inputs": "returned",
        "parity": ParityRecord("pass", "max", 0.01, 0.004, (output(), output("scores", 0.002))),
        "latency": latency(),
        "engine": EngineRecord("k", True, None, 1.0, 50 << 20, 20 << 20, {"int8": 40, "fp32": 3}),
    }
    return CheckRecord(nodeid, "models/a.onnx", **{**values, **changes})


def report(*checks: CheckRecord, tensorrt: str = "1.5.0.114", **changes: Any) -> RunRecord:
    here = environment(gpu=GPU, driver="580.1")
    here = replace(here, tensorrt=Library(module="tensorrt_rtx", version=tensorrt), **changes)
    return typed(jsonable(document(checks, here)), RunRecord)


def parity(*outputs: OutputRecord, verdict: Any = "pass") -> ParityRecord:
    return ParityRecord(verdict, "max", 0.01, 0.004, outputs)


def changes_of(found: ReportDiff) -> dict[str, tuple[str, str, str]]:
    (one,) = found.checks
    return {change.what: (change.direction, change.old, change.new) for change in one.changes}


def one_change(**changes: Any) -> ReportDiff:
    return diff(report(check()), report(check(**changes)))


# --- what is worse, better, or neither -------------------------------------------------------------------------------


def test_the_same_report_twice_has_no_difference() -> None:
    found = diff(report(check()), report(check()))
    assert (found.checks, found.environment, found.added, found.removed) == ((), (), (), ())
    assert found.unchanged == 1
    assert not found.is_worse
    assert not found.lost_sight


def test_a_verdict_that_changed_is_worse_or_better_however_little_the_error_changed() -> None:
    near = check(parity=parity(output(value=0.00999)))
    over = check(verdict="fail", parity=parity(output(value=0.01001, verdict="fail"), verdict="fail"))
    found = changes_of(diff(report(near), report(over)))
    assert found["verdict"] == ("worse", "pass", "fail")
    assert found["boxes max"] == ("worse", "0.00999", "0.01001")
    back = changes_of(diff(report(over), report(near)))
    assert back["verdict"] == ("better", "fail", "pass")
    assert back["boxes max"][0] == "better"


@pytest.mark.parametrize(
    ("old", "new", "direction"),
    [
        (0.004, 0.0043, None),
        (0.004, 0.0047, "worse"),
        (0.0047, 0.004, "better"),
        (1e-6, 5e-6, None),
        (0.0, 0.0, None),
        (0.0, 0.005, "worse"),
        (0.004, float("inf"), "worse"),
        (float("inf"), float("nan"), "worse"),
        (float("nan"), 0.004, "better"),
        (float("nan"), float("nan"), None),
        (float("inf"), float("inf"), None),
        (0.004, None, "worse"),
    ],
)
def test_an_error_changed_beyond_ten_percent_and_one_percent_of_the_limit(
    old: float | None, new: float | None, direction: str | None
) -> None:
    before, after = (check(parity=parity(output(value=value))) for value in (old, new))
    found = diff(report(before), report(after))
    assert [change.direction for each in found.checks for change in each.changes] == [direction] * bool(direction)


def test_a_limit_of_zero_counts_every_change() -> None:
    before, after = (check(parity=parity(output(value=value, limit=0.0, metric="mismatches"))) for value in (0.0, 1e-6))
    assert changes_of(diff(report(before), report(after)))["boxes mismatches"][0] == "worse"


@pytest.mark.parametrize(("old", "new", "direction"), [(40, 39.5, None), (40, 37, "worse"), (37, 40, "better")])
def test_decibels_are_better_when_there_are_more_of_them(old: float, new: float, direction: str | None) -> None:
    before, after = (check(parity=parity(output(value=value, limit=30.0, metric="snr_db"))) for value in (old, new))
    found = diff(report(before), report(after))
    assert [change.direction for each in found.checks for change in each.changes] == [direction] * bool(direction)


@pytest.mark.parametrize(("old", "new", "direction"), [(0.9, 0.89, None), (0.9, 0.5, "worse"), (0.5, 0.9, "better")])
def test_a_metric_of_the_users_own_may_be_better_when_it_is_more(old: float, new: float, direction: str | None) -> None:
    before, after = (
        check(parity=parity(output(value=value, limit=0.8, metric="overlap", at_least=True))) for value in (old, new)
    )
    found = diff(report(before), report(after))
    assert [change.direction for each in found.checks for change in each.changes] == [direction] * bool(direction)
    assert all(
        "dB" not in change.remark and "≥ 0.8" in change.remark for each in found.checks for change in each.changes
    )


def test_one_output_of_several_is_named() -> None:
    found = one_change(parity=parity(output(), output("scores", 0.008)))
    assert changes_of(found) == {"scores max": ("worse", "0.00200", "0.00800")}
    assert "×4.00" in found.checks[0].changes[0].remark


def test_another_tolerance_is_said_and_hides_no_error() -> None:
    found = changes_of(one_change(parity=parity(output(value=0.04, limit=0.1), output("scores", 0.002))))
    assert found["boxes max"] == ("worse", "0.00400", "0.0400")
    assert found["boxes max limit"] == ("changed", "≤ 0.01", "≤ 0.1")


def test_a_fault_that_appeared_is_worse() -> None:
    fault = OutputRecord(
        "boxes",
        "float32",
        (1, 5),
        verdict="fail",
        judged=(JudgedRecord("shape", None, None, "", "fail", "…"),),
    )
    found = changes_of(one_change(verdict="fail", parity=parity(fault, output("scores", 0.002), verdict="fail")))
    assert found["boxes shape"] == ("worse", "–", "not as the reference")


def test_a_slowdown_is_told_by_statistics_and_not_by_the_median_alone() -> None:
    assert changes_of(one_change(latency=latency(1.2, 1)))["p50"][0] == "worse"
    assert changes_of(one_change(latency=latency(0.8, 1)))["p50"][0] == "better"
    assert one_change(latency=latency(1.02, 1)).unchanged == 1
    few = changes_of(one_change(latency=latency(1.2, 1, samples=5)))
    assert few["p50"][0] == "untested"


def test_a_slowdown_that_cannot_be_tested_is_said() -> None:
    found = one_change(latency=latency(2.0, 1, distribution=None))
    assert not found.is_worse
    (change,) = found.checks[0].changes
    assert change.direction == "untested"
    assert "could not be tested" in change.remark


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"cuda_graph": False}, "without a CUDA graph now"),
        ({"measured": "latency with transfers"}, "latency with transfers now"),
        ({"disturbances": ["pid 1 kept 90 % of it busy"]}, "disturbed: pid 1"),
        ({"conditions": {"sm_mhz": 585}}, "not compared: its SM clock was 1590 MHz, and is 585 MHz now"),
    ],
)
def test_latency_that_was_measured_in_another_way_is_not_judged(details: dict[str, Any], said: str) -> None:
    found = one_change(latency=latency(2.0, 1, **details))
    assert not found.is_worse
    assert said in found.checks[0].changes[0].remark


def test_the_engine_grew_and_fell_back() -> None:
    engine = EngineRecord("k2", True, None, 1.0, 80 << 20, 21 << 20, {"fp16": 30, "fp32": 9})
    found = changes_of(one_change(engine=engine))
    assert found == {
        "engine size": ("worse", "50.0 MiB", "80.0 MiB"),
        "layers in int8": ("worse", "40", "0"),
        "layers in fp16": ("changed", "0", "30"),
        "layers in fp32": ("changed", "3", "9"),
    }


def test_other_fusions_are_neither_worse_nor_better() -> None:
    engine = EngineRecord("k2", True, None, 1.0, 50 << 20, 20 << 20, {"int8": 30, "fp32": 5})
    found = one_change(engine=engine)
    assert [each.kind for each in found.checks] == ["changed"]


def test_what_is_not_measured_any_more_is_a_loss_and_no_regression() -> None:
    found = one_change(latency=LatencyRecord("not_measured", "no GPU"))
    assert changes_of(found)["latency verdict"] == ("changed", "pass", "not measured")
    assert not found.is_worse
    assert found.lost_sight


# --- not comparable --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_sha256": "b" * 64}, "another model: sha256 aaaaaaaa… before, bbbbbbbb… now"),
        ({"inputs": "generated"}, "other inputs: returned before, generated now"),
        ({"cases": 3}, "other inputs: 2 before, 3 now"),
        ({"evidence": "emulated"}, "other evidence: engine before, emulated now"),
        ({"latency": latency(conditions={"input_shapes": {"x": [8, 3]}})}, "other inputs: shapes"),
    ],
)
def test_what_was_not_made_in_the_same_way_is_never_compared(changes: dict[str, Any], said: str) -> None:
    bad = parity(output(value=0.5, verdict="fail"), verdict="fail")
    before = check(latency=latency(conditions={"input_shapes": {"x": [1, 3]}}))
    found = diff(report(before), report(check(verdict="fail", parity=bad, **changes)))
    assert not found.is_worse
    assert found.lost_sight
    (one,) = found.of_kind("not comparable")
    assert one.changes == ()
    assert one.obstacles[0].startswith(said)
    assert one.verdicts == ("pass", "fail")


def test_another_seed_matters_to_generated_inputs_alone() -> None:
    assert one_change(seed=1).unchanged == 1
    generated = [check(inputs="generated", seed=seed) for seed in (0, 1)]
    found = diff(report(generated[0]), report(generated[1]))
    assert found.checks[0].obstacles == ("other inputs: seed 0 before, 1 now",)


def test_another_gpu_matters_to_engines_alone() -> None:
    other = replace(GPU, name="NVIDIA L4")
    found = diff(report(check()), report(check(), gpu=other))
    assert found.checks[0].obstacles == ("another GPU: NVIDIA H200 before, NVIDIA L4 now",)
    emulated = check(evidence="emulated", latency=None, engine=None)
    assert diff(report(emulated), report(emulated, gpu=None)).unchanged == 1


def test_a_check_that_broke_is_worse_although_nothing_of_it_is_known() -> None:
    broken = CheckRecord("tests/test_a.py::test_a[int8]", "models/a.onnx", "error", precision="int8", inputs="returned")
    found = diff(report(check()), report(broken))
    assert changes_of(found)["verdict"] == ("worse", "pass", "error")


@pytest.mark.parametrize(
    ("before", "broken"),
    [
        # A marker that was refused, a test of its own that ended before `trt_check`: nothing is known.
        ({}, {"model": "", "precision": None}),
        ({}, {"model": "make_model()"}),
        ({"reference": "golden.npz (recorded today)", "reference_sha256": "c" * 64}, {"model": ""}),
        ({"reference": "golden.npz (recorded today)", "reference_sha256": "c" * 64}, {"reference": "golden.npz"}),
        ({"reference": "by_hand"}, {}),
    ],
)
def test_a_check_that_broke_before_it_was_known_is_worse_and_no_other_one(
    before: dict[str, Any], broken: dict[str, Any]
) -> None:
    name = "tests/test_a.py::test_a[int8]"
    known = {"model": "models/a.onnx", "precision": "int8", **broken}
    error = CheckRecord(name, verdict="error", gpu_ran=False, message="it broke", **known)
    found = diff(report(check(**before)), report(error))
    assert (found.added, found.removed) == ((), ())
    assert changes_of(found)["verdict"] == ("worse", "pass", "error")
    assert found.checks[0].subject.precision == "int8"
    assert found.is_worse
    back = diff(report(error), report(check(**before)))
    assert changes_of(back)["verdict"] == ("better", "error", "pass")


def test_an_error_without_a_precision_is_that_of_one_check_of_its_test() -> None:
    def broken(nodeid: str) -> CheckRecord:
        return CheckRecord(nodeid, "", "error", gpu_ran=False)

    both = [check("t.py::a"), check("t.py::a", precision="fp16")]
    found = diff(report(*both), report(broken("t.py::a")))
    assert ([each.verdicts for each in found.checks], len(found.removed), found.added) == ([("pass", "error")], 1, ())
    found = diff(report(*both), report(both[0], broken("t.py::a")))
    assert [(each.subject.precision, each.verdicts) for each in found.checks] == [("fp16", ("pass", "error"))]
    found = diff(report(*both), report(*both, broken("t.py::b")))
    assert (len(found.added), found.checks) == (1, ())


def test_a_provider_is_compared_on_one_gpu_alone_and_another_one_is_said() -> None:
    def ran(backend: str = "onnxruntime-cuda", **changes: Any) -> CheckRecord:
        return check(evidence="provider", backend=backend, engine=None, **{"gpu_ran": True, **changes})

    other = replace(GPU, name="NVIDIA L4")
    (one,) = diff(report(ran()), report(ran(latency=latency(0.5)), gpu=other)).checks
    assert one.obstacles == ("another GPU: NVIDIA H200 before, NVIDIA L4 now",)
    (one,) = diff(report(ran()), report(ran("torch", gpu_ran=False))).checks
    assert one.obstacles == ("a GPU ran it before, and none does now",)
    found = changes_of(diff(report(ran()), report(ran("onnxruntime-tensorrt"))))
    assert found == {"backend": ("changed", "onnxruntime-cuda", "onnxruntime-tensorrt")}
    # On no GPU it says nothing which one is there.
    on_cpu = ran("torch", gpu_ran=False, latency=None)
    assert diff(report(on_cpu), report(on_cpu, gpu=None)).unchanged == 1


def test_a_budget_is_no_less_news_where_another_one_decides() -> None:
    def timed(memory: Any, size: Any = "fail") -> dict[str, Any]:
        budgets = BudgetRecord(memory, "memory_mib", limit=9), BudgetRecord(size, "engine_mib", limit=9)
        worst: Any = "fail" if "fail" in {memory, size} else "pass"
        return {"verdict": worst, "latency": replace(latency(), verdict=worst, budgets=budgets)}

    def found(*pair: dict[str, Any]) -> ReportDiff:
        old, new = (report(check(**changes)) for changes in pair)
        return diff(old, new)

    assert changes_of(found(timed("pass"), timed("fail"))) == {"budget memory_mib": ("worse", "pass", "fail")}
    lost = found(timed("pass", "pass"), timed("not_measured", "pass"))
    assert changes_of(lost) == {"budget memory_mib": ("changed", "pass", "not measured")}
    assert lost.lost_sight
    # Where the part says the same, once is enough.
    assert set(changes_of(found(timed("pass", "pass"), timed("fail", "pass")))) == {"verdict"}


def test_a_test_that_fails_behind_its_check_is_worse() -> None:
    found = diff(report(check(outcome="passed")), report(check(outcome="failed")))
    assert changes_of(found) == {"test": ("worse", "passed", "failed")}
    found = diff(report(check(outcome="failed")), report(check(outcome="passed")))
    assert changes_of(found) == {"test": ("better", "failed", "passed")}


def test_that_a_test_had_to_be_run_again_is_said() -> None:
    assert changes_of(one_change(runs=2)) == {"runs of the test": ("changed", "1", "2")}


def test_added_and_removed_checks_are_listed() -> None:
    found = diff(report(check("t.py::a"), check("t.py::b")), report(check("t.py::b"), check("t.py::c", verdict="fail")))
    assert [each.nodeid for each in found.removed] == ["t.py::a"]
    assert [(each.nodeid, each.verdict) for each in found.added] == [("t.py::c", "fail")]
    assert found.unchanged == 1
    assert not found.is_worse


def test_a_new_check_that_fails_and_tests_without_a_record_are_named() -> None:
    new = report(check(), check("t.py::c", verdict="fail"), check("t.py::d"))
    new = replace(new, missing=(MissingRecord("t.py::e", "its process died"),))
    found = diff(report(check()), new)
    assert [each.nodeid for each in found.new_failures] == ["t.py::c"]
    assert found.lost_sight
    text = diff_text.lines(found, ("old", "new"))
    assert text[text.index("new and not passing (1 check)") + 1] == "  t.py::c  int8  fail"
    assert text[text.index("only in the new report (1 check)") + 1] == "  t.py::d  int8  pass"
    assert "not in this report: 1 of " in " ".join(text)
    assert text[-1] == "1 new and not passing, 1 only in the new report, 1 unchanged"
    same = diff(new, new)
    assert (same.unrecorded, same.lost_sight, same.new_failures) == (None, False, ())
    page = diff_text.markdown(found, ("old", "new"))
    assert "| ❌ | <code>t.py::c</code> | int8 | new |  | fail |  |" in page
    assert "<summary>only in the new report: 1 check</summary>" in page
    assert "t.py::e (its process died)" in page


def test_what_was_asked_for_otherwise_is_said() -> None:
    asked = {"max_subgraphs": "1", "score": "a", "limits": "max"}
    found = diff(report(check(asked=asked)), report(check(asked={"score": "b", "transfers": "yes"})))
    assert changes_of(found) == {
        "max_subgraphs": ("changed", "asked for", "not asked for"),
        "score": ("changed", "asked for", "asked otherwise"),
        "transfers": ("changed", "not asked for", "asked for"),
    }
    assert found.lost_sight
    budgets = (BudgetRecord("pass", "p50_ms", "p50", limit_ms=9.0), BudgetRecord("pass", "engine_mib", limit=64.0))
    more = diff(report(check()), report(check(latency=replace(latency(), budgets=budgets))))
    assert changes_of(more) == {
        "budget p50_ms limit": ("changed", "5 ms", "9 ms"),
        "budget engine_mib limit": ("changed", "–", "64"),
    }
    assert not more.lost_sight


@pytest.mark.parametrize(
    ("old", "new", "said", "is_lost"),
    [
        (100, None, ("100 tries", "none"), True),
        (100, 50, ("100 tries", "50 tries"), True),
        (50, 100, ("50 tries", "100 tries"), False),
        (100, 30, ("100 tries", "30 of 100 tries"), True),
        (None, 100, ("none", "100 tries"), False),
    ],
)
def test_another_search_is_said(old: int | None, new: int | None, said: tuple[str, str], *, is_lost: bool) -> None:
    pair = [SearchRecord(tries, tries, 1.0, 0.5, 0.4) if tries else None for tries in (old, new)]
    if pair[1] is not None and " of " in said[1]:
        pair[1] = replace(pair[1], asked=100)
    found = diff(report(check(search=pair[0])), report(check(search=pair[1])))
    assert changes_of(found) == {"search for the worst input": ("changed", *said)}
    assert found.lost_sight == is_lost


def test_several_checks_of_one_test_are_told_apart() -> None:
    before = [check("t.py::a"), check("t.py::a"), check("t.py::a", precision="fp16")]
    after = copy.deepcopy(before)
    after[1] = check("t.py::a", verdict="fail")
    (one,) = diff(report(*before), report(*after)).checks
    assert (one.subject.place, one.subject.precision) == (1, "int8")


def test_worst_first() -> None:
    names = "abcdef"
    before = [check(f"t.py::{name}") for name in names]
    after = [
        check("t.py::a", model_sha256="c" * 64),
        check("t.py::b", latency=latency(0.5, 1)),
        check("t.py::c", parity=parity(output(value=0.008), output("scores", 0.002))),
        check("t.py::d", parity=parity(output(value=0.009), output("scores", 0.002))),
        check("t.py::e", verdict="error"),
        check("t.py::f", verdict="fail"),
    ]
    found = diff(report(*before), report(*after))
    assert [each.subject.nodeid[-1] for each in found.checks] == ["e", "f", "d", "c", "b", "a"]


def test_the_environment_leads() -> None:
    found = diff(report(check()), report(check(verdict="fail"), tensorrt="1.7.1.116", driver="590.2"))
    assert [each.name for each in found.environment] == ["TensorRT", "driver"]
    text = diff_text.lines(found, ("old.json", "new.json"))
    assert "tensorrt_rtx 1.5.0.114 → tensorrt_rtx 1.7.1.116" in text[3]
    assert text.index("environment") < text.index("worse (1 check)")


# --- in general ------------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.floats(0, 1, allow_nan=False),
    st.sampled_from([0.0, float("nan"), float("inf"), 1e-300, 1e300]),
)
VERDICTS = st.sampled_from(["pass", "fail", "error", "inconclusive", "not_measured"])
LATENCIES = [
    None,
    LatencyRecord("not_measured", "no GPU"),
    *(latency(p50, i) for i, p50 in enumerate((1.0, 1.01, 1.3))),
]


@st.composite
def records(draw: st.DrawFn) -> CheckRecord:
    metric = draw(st.sampled_from(["max", "snr_db", "mismatches"]))
    verdict = draw(VERDICTS)
    outputs = tuple(
        output(name, draw(VALUES), draw(st.sampled_from([0.0, 0.01, 30.0])), metric=metric, verdict=draw(VERDICTS))
        for name in draw(st.sets(st.sampled_from(["boxes", "scores"])))
    )
    engine = EngineRecord("k", True, None, 1.0, draw(st.integers(0, 1 << 40)), None, {"int8": draw(st.integers(0, 3))})
    return check(
        draw(st.sampled_from(["t.py::a", "t.py::b[8]", "t.py::b[16]"])),
        verdict=verdict,
        evidence=draw(st.sampled_from(["engine", "emulated", None])),
        cases=draw(st.integers(0, 2)),
        parity=draw(st.sampled_from([None, parity(*outputs, verdict=verdict)])),
        latency=draw(st.sampled_from(LATENCIES)),
        engine=draw(st.sampled_from([None, engine])),
    )


REPORTS = st.lists(records(), max_size=4).map(lambda checks: report(*checks))


@settings(max_examples=60, deadline=None)
@given(REPORTS)
def test_a_report_does_not_differ_from_itself(one: RunRecord) -> None:
    found = diff(one, copy.deepcopy(one))
    assert (found.checks, found.environment, found.added, found.removed) == ((), (), (), ())
    assert found.unchanged == len(one.checks)


MIRROR = {"worse": "better", "better": "worse", "changed": "changed", "untested": "untested"}


@settings(max_examples=100, deadline=None)
@given(REPORTS, REPORTS)
def test_old_and_new_swapped_swap_better_and_worse(one: RunRecord, two: RunRecord) -> None:
    there, back = diff(one, two), diff(two, one)
    assert [each.nodeid for each in there.added] == [each.nodeid for each in back.removed]
    assert there.unchanged == back.unchanged

    def by_name(found: ReportDiff, mirror: bool) -> dict[Any, Any]:
        return {
            (each.subject.nodeid, each.subject.place): (
                bool(each.obstacles),
                sorted(
                    (c.what, MIRROR[c.direction], c.new, c.old) if mirror else (c.what, c.direction, c.old, c.new)
                    for c in each.changes
                ),
            )
            for each in found.checks
        }

    assert by_name(there, False) == by_name(back, True)


@settings(max_examples=60, deadline=None)
@given(REPORTS, REPORTS, st.integers(60, 120))
def test_every_line_fits_the_terminal(one: RunRecord, two: RunRecord, width: int) -> None:
    text = diff_text.lines(diff(one, two), ("yesterday.json", "today.json"), width)
    assert all(columns(line) <= width for line in text), text


# --- text ------------------------------------------------------------------------------------------------------------


def test_long_names_and_many_reasons_fit_eighty_columns() -> None:
    long = "tests/" + "deep/" * 20 + "test_detector.py::test_detector[int8-batch8-" + "x" * 60 + "]"
    before = check(long, parity=parity(output("o" * 90)))
    after = check(long, verdict="fail", parity=parity(output("o" * 90, 0.02, verdict="fail"), verdict="fail"))
    text = diff_text.lines(diff(report(before), report(after)), ("old.json", "new.json"))
    assert max(map(columns, text)) <= 80
    assert any("pass → fail" in line for line in text)


def test_many_checks_that_are_not_comparable_are_grouped() -> None:
    before = [check(f"t.py::test_{i}") for i in range(100)]
    after = [check(f"t.py::test_{i}", evidence="emulated") for i in range(100)]
    text = diff_text.lines(diff(report(*before), report(*after)), ("old.json", "new.json"))
    assert sum("other evidence" in line for line in text) == 1
    assert "    … and 80 more" in text
    assert text[-1] == "100 not comparable, 0 unchanged"


def test_markdown_is_a_table_that_names_cannot_break() -> None:
    before = check("t.py::test_a[x|y]", parity=parity(output("a|b<script>")))
    after = check("t.py::test_a[x|y]", verdict="fail", parity=parity(output("a|b<script>", 0.009)))
    text = diff_text.markdown(diff(report(before), report(after, tensorrt="2")), ("old.json", "new.json"))
    table = [line for line in text.splitlines() if line.startswith("| ❌")]
    assert len(table) == 2
    assert all(line.count("|") == 8 for line in table)
    assert "<script>" not in text
    assert "| TensorRT |" in text


def test_markdown_fits_a_step_summary() -> None:
    before = [check(f"t.py::test_{i}") for i in range(300)]
    after = [check(f"t.py::test_{i}", verdict="fail" if i == 299 else "inconclusive") for i in range(300)]
    found = diff(report(*before), report(*after))
    text = diff_text.markdown(found, ("old.json", "new.json"), limit=10_000)
    assert len(text.encode()) <= 10_000
    assert "test&#95;299" in text, "the worst comes first"
    assert "more rows left out" in text


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    def make(old: RunRecord, new: RunRecord) -> list[str]:
        save(tmp_path / "old.json", old)
        save(tmp_path / "new.json", new)
        return [str(tmp_path / "old.json"), str(tmp_path / "new.json")]

    return make


@pytest.mark.parametrize(
    ("new", "never", "regression", "loss"),
    [
        (check(), 0, 0, 0),
        (check(verdict="fail"), 0, 1, 1),
        (check(evidence="emulated"), 0, 0, 1),
        (check(evidence="emulated", verdict="fail"), 0, 1, 1),
        (check(model_sha256="c" * 64, verdict="fail", expected_failure="known"), 0, 0, 1),
        (check("t.py::other"), 0, 0, 1),
        (check("t.py::other", verdict="fail"), 0, 1, 1),
        (check("t.py::other", verdict="fail", expected_failure="known"), 0, 0, 1),
        (check(parity=parity(output())), 0, 0, 1),
        (check(latency=None), 0, 0, 1),
        (check(engine=None), 0, 0, 1),
        (check(latency=replace(latency(), budgets=())), 0, 0, 1),
        (check(latency=latency(0.5, 1)), 0, 0, 0),
    ],
    ids=[
        *("same", "worse", "not comparable", "another one, failing", "another one, expected to fail"),
        *("removed", "new and failing", "new and expected to fail"),
        *("an output less", "a part less", "an engine less", "a budget less", "better"),
    ],
)
def test_exit_status(files: Callable[..., list[str]], new: CheckRecord, never: int, regression: int, loss: int) -> None:
    paths = files(report(check()), report(new))
    assert __main__.main(["diff", *paths]) == never
    assert __main__.main(["diff", *paths, "--fail-on=regression"]) == regression
    assert __main__.main(["diff", *paths, "--fail-on=loss", "--markdown"]) == loss


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "no JSON report"),
        ('{"schema_version": 1, "checks": [', "no JSON report"),
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1}', "missing required field `environment`"),
        ('{"schema_version": 1, "environment": {}, "checks": {}}', "`$.checks`"),
        ('{"schema_version": 1, "environment": {}, "checks": [1]}', "`$.checks[0]`"),
        ('{"schema_version": 1, "environment": {}, "checks": [{"nodeid": "a"}]}', "missing required field `model`"),
    ],
)
def test_bad_input_is_one_clear_error(
    files: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    paths = files(report(check()), report(check()))
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    assert __main__.main(["diff", paths[0], str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ERROR: ")
    assert "bad.json" in error
    assert said in error


LEAVES = ("verdict", "samples", "p50_ms", "judged", "outputs", "details", "layers_by_precision", "bytes", "gpu")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_report_that_was_spoilt_is_an_error_or_read_and_never_a_crash(data: st.DataObject) -> None:
    spoilt = jsonable(report(check()))
    places = [(holder, key) for holder, key in _walk(spoilt) if key in LEAVES or data.draw(st.integers(0, 30)) == 0]
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(st.sampled_from([None, 1, -1.5, "x", "nan", [], {}, [1], {"a": 1}, True]))
    try:
        found = diff(report(check()), typed(spoilt, RunRecord))
    except ReportError:
        return
    diff_text.lines(found, ("a", "b"))
    diff_text.markdown(found, ("a", "b"))


def _walk(value: Any) -> list[tuple[Any, Any]]:
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [place for key, item in pairs for place in [(value, key), *_walk(item)]]


def test_the_command_loads_no_heavy_library_where_no_latency_is_compared(files: Callable[..., list[str]]) -> None:
    bare = check(latency=None)
    paths = files(report(bare), report(bare))
    script = (
        "import sys\nfrom pytest_trtcheck.__main__ import main\n"
        f"main(['diff', *{paths!r}])\n"
        "print(sorted({'numpy', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'pytest', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_tells_the_exit_status() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_trtcheck", "diff", "--help"], capture_output=True, text=True, check=True
    )
    assert "exit status:" in done.stdout
    assert "  2  a file cannot be read" in done.stdout


def test_a_planted_fault_is_found_between_two_real_runs(suite: Suite) -> None:
    suite.write(
        test_conv="""
@trt_parity("conv.onnx", precision=["fp16", "int8"], batch=1, calibration="calibration.npz")
def test_conv(): ...
"""
    )
    images = np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)
    np.savez(suite.path / "calibration.npz", image=images)
    suite.run("-q")
    (suite.path / "report.json").rename(suite.path / "old.json")
    np.savez(suite.path / "calibration.npz", image=images / 1000)
    suite.run("-q")
    command = [sys.executable, "-m", "pytest_trtcheck", "diff", "old.json", "report.json", "--fail-on=regression"]
    done = subprocess.run(command, cwd=suite.path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "worse (1 check)" in done.stdout
    assert "test_conv.py::test_conv[int8]" in done.stdout
    assert "pass → fail" in done.stdout
    assert "1 worse, 1 unchanged" in done.stdout


def test_other_nodes_and_options_are_said_and_of_what_is_not_comparable_what_else_is_another_one() -> None:
    kept = LoweredRecord("k", "int8", keep_fp32=("head/*",))
    before = check(lowered=LoweredRecord("j", "int8"), build_options={"workspace_mib": 64})
    after = check(lowered=kept, build_options={"workspace_mib": 128, "refit": True})
    assert changes_of(diff(report(before), report(after))) == {
        "keep_fp32": ("changed", "–", "['head/*']"),
        "workspace_mib": ("changed", "64", "128"),
        "refit": ("changed", "–", "True"),
    }

    data = [CalibrationRecord("max", None, samples, sha256=str(samples) * 64) for samples in (1, 8)]
    pair = [
        [replace(check(f"test_{name}", inputs_sha256=sha * 64), calibration=found) for name in "ab"]
        for sha, found in zip("cd", data, strict=True)
    ]
    found = diff(report(*pair[0]), report(*pair[1]))
    assert {each.kind for each in found.checks} == {"not comparable"}
    text = " ".join(" ".join(diff_text.lines(found, ("old", "new"))).split())
    said = "besides, calibration data: 1 sample (sha256 11111111…) before, 8 samples (sha256 88888888…) now"
    assert text.count(said) == 1
    assert diff_text.markdown(found, ("old", "new")).count("besides, calibration data: 1 sample") == 2
