"""The reports of many machines as one: what failed, what is missing and what nobody ran on one of them is said."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck import __main__
from pytest_trtcheck.record import (
    BudgetRecord,
    CheckRecord,
    Environment,
    GpuRecord,
    JudgedRecord,
    LatencyRecord,
    Library,
    MissingRecord,
    OutputRecord,
    ParityRecord,
    RunRecord,
    Verdict,
)
from pytest_trtcheck.report import fleet, html, json_report, merge
from pytest_trtcheck.report.text import columns
from pytest_trtcheck.report.view import counts

if TYPE_CHECKING:
    from tests.conftest import Suite

DATA = Path(__file__).parent / "data" / "reports"
PASSING = json_report.read(DATA / "example.json")
FAILING = json_report.read(DATA / "failing.json")
SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "report.schema.json").read_text(encoding="utf-8"))

Merging = Callable[..., tuple[int, str]]


def on(gpu: str | None, run: RunRecord, *, version: str = "10.16", driver: str = "580") -> RunRecord:
    environment = Environment(
        python="3.12",
        driver=driver,
        tensorrt=Library(module="tensorrt", version=version),
        gpu=GpuRecord(gpu) if gpu else None,
    )
    checks = [
        replace(check, evidence=check.evidence and ("engine" if gpu else "emulated"), latency=None)
        for check in run.checks
    ]
    return replace(run, environment=environment, checks=tuple(checks))


@pytest.fixture
def merging(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Merging:
    """Runs the command on reports, named a.json, b.json, …; its exit status and what it printed."""

    def run(*reports: RunRecord | str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        names = []
        for letter, report in zip("abcdef", reports, strict=False):
            if isinstance(report, RunRecord):
                json_report.save(f"{letter}.json", report)
            names.append(report if isinstance(report, str) else f"{letter}.json")
        status = __main__.main(["merge", *names, *options])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_two_real_runs_become_one_report(suite: Suite, merging: Merging) -> None:
    suite.write(
        test_it=(
            '@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=1)\ndef test_conv(): ...\n\n'
            '@trt_parity("gemm.onnx", precision="bf16", tol=1e-9)\ndef test_gemm(): ...\n'
        )
    )
    reports = []
    for gpu, deselected in (("L4", "nothing"), ("A100", "test_it.py::test_conv[bf16]")):
        suite.run(f"--trt-gpu={gpu}", "--trt-backend=onnxruntime", f"--deselect={deselected}")
        reports.append(json_report.read(suite.path / "report.json"))
    status, text = merging(*reports, options=("-o", "fleet.json", "--html", "fleet.html"))
    assert status == 1
    assert re.search(r"model +precision +no GPU, for L4 +no GPU, for A100\n", text)
    assert re.search(r"conv.onnx +bf16 +pass \S+ +–\n", text)
    assert re.search(r"gemm.onnx +bf16 +fail \S+ +fail \S+\n", text)
    assert re.search(
        r"test_gemm: gemm.onnx in bf16 differs .*\((no\s+GPU,\s+for\s+(L4|A100)(,\s+)?){2}\)", text, re.DOTALL
    )
    assert "no GPU, for A100: lacks 1 check of others, 2 checks emulated, not run on a GPU" in text
    assert text.endswith("5 checks: 3 pass, 2 fail\n")
    written: dict[str, Any] = json.loads(Path("fleet.json").read_text())
    pytest.importorskip("jsonschema", reason="validating the report needs jsonschema").validate(written, SCHEMA)
    assert [check["machine"] for check in written["checks"]].count("no GPU, for L4") == 3
    assert (written["environment"]["requested_gpu"], written["environment"]["numpy"] is None) == (None, False)
    page = Path("fleet.html").read_text()
    assert "Models and machines" in page
    assert page.count("on no GPU, for A100") == 2
    # A merged report is one more report: nothing of it is lost.
    text = merging("fleet.json", on("Tesla T4", PASSING))[1]
    assert re.search(r"precision +no GPU, for L4 +no GPU\S+or A100 +Tesla T4\n", text)
    assert f"\n{5 + len(PASSING.checks)} checks: " in text


def test_a_failure_on_one_machine_fails_them_all(merging: Merging) -> None:
    assert merging(on("Tesla T4", PASSING), on("NVIDIA L4", PASSING))[0] == 0
    status, text = merging(on("Tesla T4", PASSING), on("NVIDIA L4", FAILING))
    assert status == 1
    assert "(L4)" in text


def test_reports_of_different_commits_are_no_answer_where_all_are_required(merging: Merging) -> None:
    new, old = (replace(PASSING, commit=commit * 40) for commit in "ab")
    whole, stale = on("Tesla T4", new), on("NVIDIA L4", old)
    status, text = merging(whole, stale)
    assert status == 0
    assert "different commits were tested: aaaaaaa on T4; bbbbbbb on L4" in " ".join(text.replace("Tesla ", "").split())
    assert merging(whole, stale, options=("--require-all",))[0] == 1
    # One that does not say is not known to be another, and what was merged before is still known apart.
    assert merging(whole, on("NVIDIA L4", replace(PASSING, commit=None)), options=("--require-all",))[0] == 0
    merging(whole, stale, options=("-o", "merged.json"))
    assert merging("merged.json", options=("--require-all",))[0] == 1


def passing(checks: Sequence[CheckRecord]) -> RunRecord:
    return replace(PASSING, checks=tuple(checks), summary=counts(checks), planned=len(checks))


def test_a_report_that_was_cut_or_edited_is_refused(merging: Merging) -> None:
    for edited, said in (
        (replace(PASSING, checks=PASSING.checks[1:]), "its summary counts other verdicts than its checks have"),
        (replace(passing(PASSING.checks[1:]), planned=len(PASSING.checks)), "were to check something, and it tells of"),
        (passing([replace(PASSING.checks[0], verdict="fail")]), None),
        (replace(passing([replace(PASSING.checks[0], verdict="fail")]), summary={"pass": 1}), "its summary counts"),
    ):
        status, text = merging(on("Tesla T4", edited))
        assert status == (2 if said else 1)
        assert said is None or said in text


def test_a_test_of_several_checks_is_one_test_however_often_it_is_merged(merging: Merging) -> None:
    twice = replace(passing([PASSING.checks[0], replace(PASSING.checks[0], precision="bf16 (asked bf16)")]), planned=1)
    assert merging(on("Tesla T4", twice), on("NVIDIA L4", twice), options=("-o", "ab.json"))[0] == 0
    assert merging("ab.json", on("Orin", twice), options=("-o", "fleet.json"))[0] == 0
    assert json_report.read("fleet.json").planned == 3
    assert merging("fleet.json")[0] == 0
    # What an earlier version wrote does not say how many there were.
    merging(on("Tesla T4", replace(twice, planned=None)), options=("-o", "old.json"))
    assert json_report.read("old.json").planned == 1


def test_what_is_missing_or_was_emulated_is_said_and_fails_where_all_are_required(merging: Merging) -> None:
    whole = on("Tesla T4", PASSING)
    part = on("NVIDIA L4", passing(PASSING.checks[1:]))
    status, text = merging(whole, part)
    assert (status, "\nL4: lacks 1 check of others" in text) == (0, True)
    for options in (("--require-all",), ("--require-all", "--markdown")):
        status, text = merging(whole, part, options=options)
        assert (status, "--require-all: L4: lacks 1 check of others" in text) == (1, True)
    assert merging(whole, on("NVIDIA L4", PASSING), options=("--require-all",))[0] == 0
    status, text = merging(whole, on(None, PASSING), options=("--require-all",))
    assert (status, "emulated, not run on a GPU" in text) == (1, True)


def test_reports_without_a_check_are_no_pass(merging: Merging) -> None:
    status, text = merging(on("Tesla T4", passing(())))
    assert (status, "no report holds a check" in text) == (1, True)
    lost = replace(passing(()), missing=(MissingRecord("test_x.py", "could not be collected"),), planned=1)
    status, text = merging(on("Tesla T4", lost))
    assert (status, "no report holds a check" in text, "1 of 1 test with checks: test_x.py" in text) == (1, True, True)
    status, text = merging(on("Tesla T4", PASSING), on("NVIDIA L4", passing(())))
    assert (status, f"L4: lacks {len(PASSING.checks)} checks of others" in text) == (0, True)


def test_a_run_that_was_cut_short_fails(merging: Merging) -> None:
    dead = MissingRecord("t.py::test_z", "its process died")
    cut = replace(PASSING, missing=(dead,), planned=len(PASSING.checks) + 1)
    status, text = merging(on("Tesla T4", PASSING), on("NVIDIA L4", cut), options=("-o", "merged.json"))
    assert status == 1
    assert f"L4: not in this report: 1 of {len(PASSING.checks) + 1} tests with checks: t.py::test_z (its" in text
    assert merging("merged.json")[0] == 1
    skipped = replace(cut, missing=(MissingRecord("t.py::test_z", "skipped: no time", "skipped"),))
    assert merging(on("Tesla T4", PASSING), on("NVIDIA L4", skipped))[0] == 0


def test_why_a_machine_was_stopped_stays_when_its_report_is_merged_again() -> None:
    absent = MissingRecord("test_x.py::test_a", "did not run: the run was interrupted")
    t4 = replace(on("T4", PASSING), missing=(absent,), stopped="the run was interrupted")
    once = merge.merge([("t4.json", t4), ("l4.json", on("L4", PASSING))])
    twice = merge.merge([("both.json", once), ("a100.json", on("A100", PASSING))])
    assert once.stopped == twice.stopped == "T4: the run was interrupted"


def test_machines_of_one_kind_are_told_apart() -> None:
    runs = [on("Tesla T4", PASSING, version=version, driver=driver) for version, driver in [("10", "1"), ("11", "1")]]
    runs.append(on("Tesla T4", PASSING, version="11", driver="2"))
    found = merge.merge([(f"{letter}.json", run) for letter, run in zip("abc", runs, strict=True)])
    assert [machine.name for machine in found.machines] == [
        "Tesla T4, tensorrt 10",
        "Tesla T4, tensorrt 11, b",
        "Tesla T4, tensorrt 11, c",
    ]
    assert (found.environment.driver, found.environment.python) == (None, "3.12"), "what they have in common"
    assert len(found.checks) == sum(found.summary.values()) == 3 * len(PASSING.checks)


def test_machines_keep_their_names_when_all_get_another_tensorrt_and_never_share_one() -> None:
    def names(*reports: tuple[str, RunRecord]) -> list[str]:
        return [machine.name for machine in merge.merge(reports).machines]

    for version in ("10", "11"):
        found = names(*((f"{host}.json", on("Tesla T4", PASSING, version=version, driver=host)) for host in "ab"))
        assert found == ["Tesla T4, a", "Tesla T4, b"]
    # Two merged reports, each of a machine whose report had the same name there.
    sites = [merge.merge([("t4.json", on("Tesla T4", PASSING, driver=driver))]) for driver in "ab"]
    sites[1] = merge.merge([("t4.json", on("Tesla T4", passing(PASSING.checks[1:]), driver="b"))])
    both = merge.merge([("a/site.json", sites[0]), ("b/site.json", sites[1])])
    assert [machine.name for machine in both.machines] == ["Tesla T4", "Tesla T4 (2)"]
    assert merge.gaps(both) == ["Tesla T4 (2): lacks 1 check of others"]


def test_a_run_counts_once_by_itself_and_in_merged_reports(merging: Merging) -> None:
    t4, l4 = on("Tesla T4", PASSING), on("NVIDIA L4", FAILING)
    merging(t4, l4, options=("-o", "fleet.json"))
    status, text = merging("fleet.json", t4)
    assert (status, "ERROR: the run on Tesla T4 is in fleet.json and in b.json" in text) == (2, True)
    merging(t4, options=("-o", "one.json"))
    assert merging("fleet.json", "one.json")[0] == 2
    # Another run of it, and what holds no check, are no repetition.
    again = replace(t4, checks=tuple(replace(each, duration_s=each.duration_s + 1) for each in t4.checks))
    assert merging("fleet.json", again)[0] == 1
    merging(on("Tesla T4", passing(())), options=("-o", "none.json"))
    assert merging("none.json", on("Tesla T4", passing(())), t4)[0] == 0


def test_every_check_of_a_test_and_all_that_was_asked_of_it_is_required(merging: Merging) -> None:
    def required(*reports: RunRecord) -> tuple[int, str]:
        return merging(*reports, options=("--require-all",))

    first = replace(PASSING.checks[0], evidence="engine", gpu_ran=True)
    second = replace(first, model="models/other.onnx")
    both = on("Tesla T4", replace(passing([first, second]), planned=1))
    status, text = required(both, on("NVIDIA L4", passing([first])))
    assert (status, "L4: lacks 1 check of others" in text) == (1, True)
    assert required(both, on("NVIDIA L4", replace(passing([second, first]), planned=1)))[0] == 0
    # What a machine computed the same precision in is no other check.
    tf32, fp32 = (passing([replace(first, precision=each)]) for each in ("tf32 (asked fp32)", "fp32"))
    assert required(on("Tesla T4", tf32), on("NVIDIA L4", fp32))[0] == 0

    def timed(latency: LatencyRecord, **changes: Any) -> RunRecord:
        run = passing([replace(first, latency=latency, **changes)])
        return replace(on("NVIDIA L4", run), checks=run.checks)

    none = BudgetRecord("not_measured", "p50_ms", "p50")
    for latency in (
        LatencyRecord("not_measured", "no budget for L4"),
        LatencyRecord("pass", samples=9, budgets=(none,)),
    ):
        status, text = required(timed(latency))
        assert (status, "L4: 1 check measured in part" in text) == (1, True)
    # No baseline yet, and what was to be compared alone.
    assert required(timed(LatencyRecord("pass", samples=9, budgets=(replace(none, name="baseline"),))))[0] == 0
    assert required(timed(LatencyRecord("not_measured", "to compare alone"), system="torch"))[0] == 0
    for evidence, ran in (("provider", False), ("server", "unknown")):
        run = replace(both, checks=(replace(first, evidence=evidence, gpu_ran=ran),), summary={"pass": 1})  # type: ignore[arg-type]
        status, text = required(run)
        assert (status, "1 check not known to have run on a GPU" in text) == (1, True)


def test_a_check_that_passed_in_a_test_that_failed_is_said(merging: Merging) -> None:
    failed = on("Tesla T4", passing([replace(PASSING.checks[0], outcome="failed")]))
    for options, expected in (((), 0), (("--require-all",), 1)):
        status, text = merging(failed, options=options)
        assert (status, "Tesla T4: 1 check passed in a test that failed" in text) == (expected, True)


def test_what_passed_only_when_it_was_run_again_is_said(merging: Merging) -> None:
    flaky = passing([replace(PASSING.checks[0], runs=2)])
    for options in ((), ("--markdown",)):
        status, text = merging(on("Tesla T4", flaky), on("NVIDIA L4", passing(PASSING.checks[:1])), options=options)
        assert (status, "1 check passed only when the test was run again" in " ".join(text.split())) == (0, True)


def test_a_report_given_twice_and_what_is_none_are_errors(merging: Merging) -> None:
    run = on("Tesla T4", FAILING)
    status, text = merging(run, run)
    assert (status, "ERROR: b.json is the same report as a.json\n  → name each once\n" in text) == (2, True)
    Path("cut.json").write_text("{")
    status, text = merging(run, "cut.json")
    assert (status, "cut.json is no JSON report" in text) == (2, True)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("command", [["merge", "-o", "out.json"], ["history"], ["upgrade"], ["diff"]])
def test_a_report_that_is_a_link_to_itself_is_an_error(
    merging: Merging, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    merging(on("Tesla T4", FAILING), on("NVIDIA L4", PASSING))
    Path("loop.json").symlink_to("loop.json")
    assert __main__.main([*command, "loop.json", "b.json"]) == 2
    assert "cannot read the report loop.json: " in capsys.readouterr().err


def test_no_report_is_written_over_where_the_name_of_an_output_was_forgotten(merging: Merging) -> None:
    merging(on("Tesla T4", FAILING), on("NVIDIA L4", PASSING))
    before = [Path(name).read_text() for name in ("a.json", "b.json")]
    for options, reason in (
        (("--html", "a.json"), "--html a.json: it is no page, and is there"),
        (("-o", "a.json"), "--output a.json: the report of a run is there, and is not among those that are merged"),
        (("--html", "b.json"), "--html b.json: it is read here"),
        (("-o", "new.json", "--html", "new.json"), "--html new.json: --output names it too"),
    ):
        status, text = merging("b.json", options=options)
        assert (status, reason in text) == (2, True)
        assert [Path(name).read_text() for name in ("a.json", "b.json")] == before
    for command in (
        ["history", "a.json", "b.json", "--html", "b.json"],
        ["upgrade", "a.json", "b.json", "--json=b.json"],
    ):
        assert __main__.main(command) == 2
    # What was merged is merged on.
    assert merging("a.json", options=("-o", "fleet.json"))[0] == 1
    assert merging("fleet.json", "b.json", options=("-o", "fleet.json"))[0] == 1
    assert len(json_report.read("fleet.json").machines) == 2


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda run: run["checks"][0].update(duration_s="nan"), "a time of nan s - at `$.checks[0].duration_s`"),
        (lambda run: run["checks"][1].update(duration_s=-1), "a time of -1.0 s - at `$.checks[1].duration_s`"),
        (lambda run: run.update(duration_s="inf"), "a time of inf s - at `$.duration_s`"),
        (
            lambda run: run["checks"][0]["parity"]["outputs"][0].update(nonfinite=10**399),
            "a number of 300 digits or more - at `$.checks[0].parity.outputs[0].nonfinite`",
        ),
    ],
)
def test_a_number_that_no_report_holds_is_named_with_its_place(
    merging: Merging, edit: Callable[[dict[str, Any]], None], place: str
) -> None:
    merging(on("Tesla T4", PASSING))
    found = json.loads(Path("a.json").read_text())
    edit(found)
    Path("b.json").write_text(json.dumps(found))
    status, text = merging("b.json", options=("--html", "page.html"))
    assert (status, f"b.json is no sound report: {place}" in text or f"b.json is no JSON report: {place}" in text) == (
        2,
        True,
    )


@pytest.mark.parametrize("machines", [1, 3, 6])
def test_it_fits_the_terminal_and_the_summary_has_every_machine(machines: int) -> None:
    gpus = ["Tesla T4", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA H100 80GB HBM3", "NVIDIA L40S", "Orin"][:machines]
    run = merge.merge([(f"{gpu}.json", on(gpu, FAILING)) for gpu in gpus])
    width = 80 if machines <= 3 else 160
    assert max(map(columns, merge.lines(run, width))) <= width
    text = merge.markdown(run)
    assert all(machine.name in text for machine in run.machines)
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    assert html.render(run).count("<th>") >= machines


# --- model × GPU ------------------------------------------------------------------------------------------------------


def found_on(*runs: tuple[str, RunRecord]) -> dict[tuple[str, str], fleet.Cell]:
    """The cells by model and precision in one text, and column."""
    table = fleet.fleet(merge.merge(runs))
    assert table is not None
    return {
        (f"{row.model} {row.precision}", name): cell
        for row in table.rows
        for name, cell in zip(table.columns, row.cells, strict=True)
    }


def one(name: str, verdict: Verdict, value: float, *, model: str = "models/a.onnx", **more: Any) -> CheckRecord:
    judged = JudgedRecord("max", value, 0.01, "tol", verdict)
    parity = ParityRecord(verdict, "max", 0.01, value, (OutputRecord("y", judged=(judged,)),))
    return CheckRecord(f"t.py::{name}", model, verdict, precision="fp16", evidence="engine", parity=parity, **more)


def holding(gpu: str, *checks: CheckRecord, missing: tuple[MissingRecord, ...] = ()) -> RunRecord:
    return json_report.document(checks, Environment(gpu=GpuRecord(gpu)), missing)


def test_a_cell_is_its_worst_check_and_says_how_many_and_what_was_not_run() -> None:
    timed = LatencyRecord("pass", samples=9, p50_ms=1.5, p99_ms=2.5)
    slower = replace(timed, p50_ms=3.0, p99_ms=4.0)
    t4 = holding("T4", one("x[1]", "pass", 0.001, latency=timed), one("x[8]", "fail", 0.02, latency=slower))
    dead = MissingRecord("t.py::x[8]", "its process died")
    l4 = holding("L4", one("x[1]", "pass", 0.002), missing=(dead,))
    cells = found_on(("t4.json", t4), ("l4.json", l4), ("orin.json", holding("Orin", one("z", "pass", 0.1, model="b"))))
    worst = cells["a.onnx fp16", "T4"]
    assert (worst.text, worst.latency) == ("fail 0.0200", "p50 1.50–3.00, p99 2.50–4.00 ms")
    assert (worst.evidence, worst.remark) == ("engine", "the worst of 2: 1 fail, 1 pass")
    assert cells["a.onnx fp16", "L4"].remark == "1 check not run there; its process died"
    assert (cells["a.onnx fp16", "Orin"].word, cells["a.onnx fp16", "Orin"].absent) == ("–", 2)
    text = merge.markdown(merge.merge([("t4.json", t4), ("l4.json", l4)]))
    assert "| fail 0.0200, p50 1.50–3.00, p99 2.50–4.00 ms, engine (the worst of 2: 1 fail, 1 pass) |" in text


def test_a_model_is_one_wherever_its_machines_keep_it() -> None:
    here, there = "/home/a/models/a.onnx", "C:/ci/models/a.onnx"
    same = [one("x", "pass", 0.001, model=model, model_sha256="1" * 64) for model in (here, there)]
    cells = found_on(("t4.json", holding("T4", same[0])), ("l4.json", holding("L4", same[1])))
    assert {name: cell.word for name, cell in cells.items()} == {
        ("a.onnx fp16", "T4"): "pass",
        ("a.onnx fp16", "L4"): "pass",
    }
    other = replace(same[1], model_sha256="2" * 64)
    assert len(found_on(("t4.json", holding("T4", same[0])), ("l4.json", holding("L4", other)))) == 4


def test_latency_has_a_table_of_its_own(merging: Merging) -> None:
    timed = one("x", "pass", 0.001, latency=LatencyRecord("pass", samples=9, p50_ms=1.5, p99_ms=2.5))
    text = merging(holding("T4", timed), holding("L4", one("x", "pass", 0.001)))[1]
    assert re.search(r"p50 / p99 in ms\nmodel +precision +T4 +L4\na.onnx +fp16 +1.50 / 2.50 +–\n", text)


def test_cells_of_the_page_lead_to_their_checks() -> None:
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    t4 = holding("T4", one("x[1]", "pass", 0.001), one("x[8]", "fail", 0.02), one("y", "pass", 0.001, model="b.onnx"))
    run = merge.merge([("t4.json", t4), ("l4.json", holding("L4", one("x[1]", "pass", 0.001)))])
    page = html.render(run)
    links = re.findall(r'<a href="#([^"]*)" aria-label="([^"]*)"', page)
    assert [said for _, said in links] == ["fail: a.onnx fp16, T4", "pass: a.onnx fp16, L4", "pass: b.onnx fp16, T4"]
    assert links[0][0] == "t-x-8-T4"
    assert all('<tbody class="check' in page and f'id="{anchor}"' in page for anchor, _ in links)
    assert page.count('<span class="not-measured">not run there</span>') == 1


def test_one_run_for_several_gpus_has_the_same_table() -> None:
    checks = [
        one(f"x[{gpu}]", "fail" if gpu == "A100" else "pass", 0.02 if gpu == "A100" else 0.001, for_gpu=gpu)
        for gpu in ("T4", "A100")
    ] + [one("y[T4]", "pass", 0.001, for_gpu="T4", model="b.onnx")]
    table = fleet.fleet(json_report.document(checks, Environment(requested_gpu="T4, A100")))
    assert table is not None
    assert table.columns == ("A100", "T4")
    assert [[cell.word for cell in row.cells] for row in table.rows] == [["fail", "pass"], ["–", "pass"]]
    assert fleet.fleet(json_report.document([one("x", "pass", 0.001)], Environment())) is None
