from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record import (
    BudgetRecord,
    CheckRecord,
    Environment,
    JudgedRecord,
    LatencyRecord,
    Location,
    OutputRecord,
    ParityRecord,
    RunRecord,
    Verdict,
)
from pytest_trtcheck.report import github
from pytest_trtcheck.report.junit import properties
from pytest_trtcheck.report.view import Run

if TYPE_CHECKING:
    from pathlib import Path

LATENCY = LatencyRecord(
    "fail",
    gpu="T4",
    samples=3000,
    p50_ms=7.3456789,
    budgets=(BudgetRecord("fail", quantile="p50", limit_ms=7.0),),
)


@pytest.fixture(autouse=True)
def _no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests run in GitHub Actions too, where they must not write into the real summary."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)


def check(
    nodeid: str = "tests/test_a.py::test_a[fp16-b8]",
    value: float = 0.0012,
    verdict: Verdict = "pass",
    *,
    model: str = "models/resnet50.onnx",
    metric: str = "max",
    message: str | None = None,
    latency: LatencyRecord | None = None,
    **more: Any,
) -> CheckRecord:
    judged = JudgedRecord(metric, value, 0.01, "tol", verdict)
    output = OutputRecord("logits", "float32", (8, 10), max=value, verdict=verdict, judged=(judged,))
    record = CheckRecord(
        nodeid,
        model,
        verdict,
        precision="fp16",
        evidence="emulated",
        parity=ParityRecord(verdict, metric, 0.01, value, (output,)),
        latency=latency,
        message=message,
    )
    return CheckRecord.from_json(replace(record, **more).to_json())


# --- JUnit -----------------------------------------------------------------------------------------------------------


def test_junit_values_are_readable() -> None:
    assert properties(check(latency=LATENCY)) == [
        ("trtcheck.model", "models/resnet50.onnx"),
        ("trtcheck.precision", "fp16"),
        ("trtcheck.evidence", "emulated"),
        ("trtcheck.verdict", "pass"),
        ("trtcheck.max_error", "0.00120"),
        ("trtcheck.tolerance", "max ≤ 0.01"),
        ("trtcheck.gpu", "T4"),
        ("trtcheck.latency_verdict", "fail"),
        ("trtcheck.p50_ms", "7.34568"),
    ]


def test_junit_names_of_a_second_check_of_the_test_differ() -> None:
    names = {name for name, _ in properties(check(), index=1)}

    assert "trtcheck.2.max_error" in names
    assert not names & {name for name, _ in properties(check())}


def test_junit_names_the_metric() -> None:
    assert ("trtcheck.cosine_error", "0.00120") in properties(check(metric="cosine"))
    assert ("trtcheck.snr_db", "45.0") in properties(check(value=45.0, metric="snr_db"))


def test_junit_of_a_check_that_measured_nothing() -> None:
    record = CheckRecord("t.py::a", "a.onnx", "error")

    assert properties(record) == [("trtcheck.model", "a.onnx"), ("trtcheck.verdict", "error")]


def test_junit_file_of_a_real_run_carries_them(pytester: pytest.Pytester) -> None:
    record = check(model="odd \x1b <&> name.onnx")
    pytester.makepyfile(f"def test_a(record_property):\n    for pair in {properties(record)!r}: record_property(*pair)")
    result = pytester.runpytest_subprocess("--junitxml=out.xml", "-p", "no:cacheprovider")
    assert result.ret == 0

    found = {p.get("name"): p.get("value") for p in ET.parse(pytester.path / "out.xml").iter("property")}
    assert found["trtcheck.model"] == "odd \\x1b <&> name.onnx"
    assert found["trtcheck.max_error"] == "0.00120"


# --- annotations -----------------------------------------------------------------------------------------------------


def test_an_annotation_is_at_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    record = check("tests/test_a.py::test_a", 0.02, "fail", location=Location("tests/test_a.py", 12))

    commands = github.annotation_commands([record], tmp_path / "project")

    assert commands == [
        "::error file=project/tests/test_a.py,line=12,title=resnet50.onnx fp16%3A fail::"
        "output logits: max = 0.0200, tolerance max ≤ 0.01"
    ]


def test_the_message_of_the_check_is_escaped() -> None:
    record = check("tests/a,b:c.py::test", 0.02, "fail", message="100% wrong:\r\n::error::injected, or not")

    (command,) = github.annotation_commands([record])

    assert command.startswith("::error file=tests/a%2Cb%3Ac.py,")
    assert command.endswith("::100%25 wrong:\\r%0A::error::injected, or not")
    assert "\n" not in command


def test_only_what_somebody_must_look_at_is_annotated() -> None:
    records = [
        check("t.py::a", 0.02, "pass"),
        check("t.py::b", 0.02, "not_measured"),
        check("t.py::c", 0.02, "fail", expected_failure="known"),
        check("t.py::d", 0.02, "inconclusive"),
        check("t.py::e", 0.02, "error"),
    ]

    commands = github.annotation_commands(records)

    assert [command.split()[0] for command in commands] == ["::error", "::warning"]


def test_what_github_would_drop_is_counted() -> None:
    records = [check(f"t.py::t[{i}]", 0.02, "fail") for i in range(13)]

    commands = github.annotation_commands(records)

    assert len(commands) == 10
    assert commands[-1].endswith("%0A… and 3 more checks: see the step summary")
    assert len(github.annotation_commands(records[:10])) == 10
    assert "more check" not in github.annotation_commands(records[:10])[-1]


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False), (None, False)])
def test_github_is_recognized(monkeypatch: pytest.MonkeyPatch, value: str | None, *, expected: bool) -> None:
    if value is None:
        monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    else:
        monkeypatch.setenv("GITHUB_ACTIONS", value)
    run = RunRecord(environment=Environment(), checks=(check("t.py::a", 0.02, "fail"),))
    assert any(github.write(Run(run))) is expected


# --- step summary ----------------------------------------------------------------------------------------------------


def table(text: str) -> list[list[str]]:
    """The cells of the Markdown table, header and rule left out."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def test_what_failed_comes_first() -> None:
    unmeasured = LatencyRecord("not_measured", reason="no GPU on this machine")
    records = [check("t.py::a", latency=unmeasured), check("t.py::b", 0.02, "fail", latency=LATENCY)]

    text = github.step_summary(records, Environment(requested_gpu="T4", python="3.11.7"))

    first, second = table(text)
    assert first[0] == "❌ fail"
    assert first[4:7] == ["0.0200", "max ≤ 0.01", "p50 7.35 ms (≤ 7 ms)"]
    assert second[0] == "✅ pass"
    assert "✅ 1 pass · ❌ 1 fail" in text
    assert "- **emulated on CPU, not run on a GPU**: 2 checks" in text
    assert "- not measured (latency, 1 check): no GPU on this machine" in text
    assert "<sub>requested GPU T4 · Python 3.11.7</sub>" in text


def test_names_cannot_break_the_table() -> None:
    record = check("t.py::a[x|y`z<b>]", model="a|b\n<script>`.onnx", notes=("a *note* <b> with | in_it",))

    text = github.step_summary([record])

    (cells,) = table(text)
    assert len(cells) == 8
    assert cells[1] == "<code>a&#124;b &lt;script&gt;&#96;.onnx</code>"
    assert cells[7] == "<code>t.py::a&#91;x&#124;y&#96;z&lt;b&gt;&#93;</code>"
    assert "- a &#42;note&#42; &lt;b&gt; with &#124; in&#95;it" in text


def test_the_summary_stays_under_githubs_limit() -> None:
    records = [check(f"t.py::t[{i}]") for i in range(200)] + [check("t.py::z", 0.02, "fail")]

    text = github.step_summary(records, limit=8000)

    assert len(text.encode()) <= 8000
    rows = table(text)
    assert rows[0][0] == "❌ fail"
    assert rows[-1][1].startswith(f"{201 - (len(rows) - 1)} more checks left out")


def test_a_run_without_checks_writes_no_summary() -> None:
    assert github.step_summary([]) == ""


def test_the_summary_is_appended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))

    github.write_step_summary("after\n")

    assert path.read_text() == "before\nafter\n"


def test_without_a_summary_file_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    github.write_step_summary("text")


def test_a_summary_that_cannot_be_written_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", os.fspath(tmp_path))

    with pytest.raises(ReportError, match="cannot write the step summary"):
        github.write_step_summary("text")
