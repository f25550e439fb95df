"""Tests that are run again: each counts once, by its last run, in every report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.export import export
from pytest_trtcheck.record import CheckRecord, EngineRecord, ParityRecord

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Suite

TESTS = """
from pathlib import Path

def first_time(name):
    path = Path(__file__).with_name(f"{name}.ran")
    first = not path.exists()
    path.touch()
    return first

@pytest.fixture
def trt_model():
    return "missing.onnx" if first_time("marked") else "conv.onnx"

@trt_parity(batch=1)
def test_marked(): ...

def test_flips(trt_check):
    trt_check("conv.onnx", batch=2)
    trt_check("conv.onnx", batch=1, tol=0 if first_time("flips") else None)

def test_no_check_the_second_time(trt_check):
    if first_time("no_check"):
        trt_check("conv.onnx", batch=1, tol=0)

def test_always(trt_check):
    trt_check("conv.onnx", batch=1, tol=0)

def test_good(trt_check):
    trt_check("conv.onnx", batch=1)
    trt_check("conv.onnx", batch=2)
"""

AGAIN = {"rerunfailures": ("--reruns=2",), "flaky": ("--force-flaky", "--max-runs=3")}


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
@pytest.mark.parametrize("plugin", AGAIN)
def test_a_test_that_is_run_again_counts_by_its_last_run(suite: Suite, plugin: str, workers: str) -> None:
    suite.write(test_again=TESTS)
    run_suite = suite.run_apart if workers == "-n2" else suite.run
    run = run_suite(
        *AGAIN[plugin], workers, "--trt-diagnose=0", "--junitxml=junit.xml", "--trt-html=report.html", plugins=[plugin]
    )
    outcomes = run.result.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"]) == (4, 1)
    found = sorted((r["nodeid"].rpartition("::")[2], r["verdict"], r["outcome"], r["runs"]) for r in run.checks)
    assert found == [
        ("test_always", "fail", "failed", 3),
        ("test_flips", "pass", "passed", 2),
        ("test_flips", "pass", "passed", 2),
        ("test_good", "pass", "passed", 1),
        ("test_good", "pass", "passed", 1),
        ("test_marked", "pass", "passed", 2),
    ]
    assert run.report["summary"]["fail"] == 1
    assert "6 checks: 5 pass, 1 fail" in run.text
    again = run.said.partition("3 checks passed only when the test was run again: ")[2]
    assert again.startswith("test_again.py::test_flips, test_again.py::test_marked")
    assert "missing.onnx" not in (suite.path / "report.html").read_text()
    by_test: dict[str, list[str]] = {}
    for case in ElementTree.parse(suite.path / "junit.xml").iter("testcase"):
        verdicts = [each.get("value", "") for each in case.iter("property") if each.get("name") == "trtcheck.verdict"]
        by_test.setdefault(str(case.get("name")), []).extend(verdicts)
    assert by_test == {
        "test_always": ["fail"],
        "test_flips": ["pass"],
        "test_good": ["pass"],
        "test_marked": ["pass"],
        "test_no_check_the_second_time": [],
    }


def test_each_repetition_is_a_test_of_its_own(suite: Suite) -> None:
    suite.write(test_again=TESTS)
    run = suite.run("--count=2", "-k", "good or flips", "--trt-diagnose=0", plugins=["repeat"])
    run.result.assert_outcomes(passed=3, failed=1)
    assert len(run.checks) == 8
    assert {record["runs"] for record in run.checks} == {1}


def test_a_subtest_that_fails_before_the_check_is_no_check(suite: Suite) -> None:
    pytest.importorskip("_pytest.subtests", reason="subtests came with pytest 9")
    suite.write(
        test_it="def test_it(subtests, trt_check):\n"
        '    with subtests.test("own"):\n        assert False\n'
        '    with subtests.test("check"):\n        trt_check("conv.onnx", batch=1)\n\n'
        'def test_none(subtests, trt_check):\n    with subtests.test("own"):\n        assert False\n'
    )
    found = {record["nodeid"].partition("::")[2]: record for record in suite.run().checks}
    assert {test: record["verdict"] for test, record in found.items()} == {"test_it": "pass", "test_none": "error"}
    assert found["test_it"]["outcome"] == "failed"


def test_a_test_that_two_workers_run_at_once_counts_twice(suite: Suite) -> None:
    suite.write(
        test_it="import time\n\n@pytest.fixture\ndef slowly():\n    yield\n    time.sleep(0.5)\n\n"
        '@trt_parity("conv.onnx", batch=1, tol=0)\ndef test_it(slowly): ...\n'
    )
    run = suite.run_apart("-n2", "--dist=each", "--trt-diagnose=0", plugins=["xdist"])
    run.result.assert_outcomes(failed=2)
    assert [record["verdict"] for record in run.checks] == ["fail", "fail"]


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_a_property_that_is_no_record_is_told_and_ends_nothing(suite: Suite, workers: str) -> None:
    suite.write(
        test_it='def test_own(record_property, trt_check):\n    record_property("trtcheck", "mine")\n'
        '    trt_check("conv.onnx", batch=1)\n\n'
        '@trt_parity("conv.onnx", batch=1)\ndef test_json(monkeypatch):\n'
        '    import json\n    monkeypatch.setattr(json, "dumps", lambda *_, **__: "{}")\n\n'
        '@trt_parity("conv.onnx", batch=1)\ndef test_after(): ...\n'
    )
    run = suite.run_apart(workers, plugins=["xdist"])
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    assert {record["nodeid"]: record["verdict"] for record in run.checks} == {
        "test_it.py::test_own": "pass",
        "test_it.py::test_json": "error",
        "test_it.py::test_after": "pass",
    }
    assert "ERROR: test_it.py::test_own: its property 'trtcheck' is no record of a check" in run.text


def test_a_property_that_is_no_record_is_told_where_ctrl_c_ended_its_test(suite: Suite) -> None:
    suite.write(
        test_it='def test_own(record_property, trt_check):\n    record_property("trtcheck", "mine")\n'
        '    trt_check("conv.onnx", batch=1)\n    raise KeyboardInterrupt\n'
    )
    run = suite.run_apart()
    assert run.result.ret == pytest.ExitCode.INTERRUPTED
    assert [(record["verdict"], record["outcome"]) for record in run.checks] == [("pass", "failed")]
    assert "ERROR: test_it.py::test_own: its property 'trtcheck' is no record of a check" in run.text


def test_an_engine_that_needed_several_runs_is_not_exported(tmp_path: Path) -> None:
    record = CheckRecord(
        nodeid="test_it.py::test_it",
        model="conv.onnx",
        verdict="pass",
        outcome="passed",
        evidence="engine",
        engine=EngineRecord("0" * 64, False, None, 1.0, 1, sha256="1" * 64),
        parity=ParityRecord("pass"),
        runs=2,
    )
    done = export.write(tmp_path / "out", [record], Cache(tmp_path / "cache", 1 << 30))
    assert [each.reason for each in done.left_out] == [
        "test_it.py::test_it: passed in run 2 of the test alone, so it may not pass the next time"
    ]
    (left_out,) = export.write(tmp_path / "out", [replace(record, runs=1)], Cache(tmp_path / "cache", 1 << 30)).left_out
    assert "no longer in the cache" in left_out.reason
