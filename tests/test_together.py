"""Beside the plugins that users have: each alone, all together, plain and on workers. `tox -e plugins` has them all."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Run, Suite

PLUGINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "asyncio": ("pytest_asyncio", ("-oasyncio_mode=auto", "-oasyncio_default_fixture_loop_scope=function")),
    "html": ("pytest_html", ("--html=page.html", "--self-contained-html")),
    "pytest-split": ("pytest_split", ("--splits=2", "--group=1")),
    "pytest_cov": ("pytest_cov", ("--cov=.", "--cov-report=term")),
    "randomly": ("pytest_randomly", ("--randomly-seed=7",)),
    "repeat": ("pytest_repeat", ("--count=2",)),
    "rerunfailures": ("pytest_rerunfailures", ("--reruns=1",)),
    "sugar": ("pytest_sugar", ()),
    "timeout": ("pytest_timeout", ("--timeout=600",)),
}
"""By name: the module that shows whether it is there, and what turns it on."""
TESTS = """
@trt_parity("conv.onnx", batch=1)
def test_passes(): ...

@trt_parity("conv.onnx", batch=1, tol=1e-9)
def test_fails(): ...

@trt_parity("<i>gone.onnx")
def test_error(): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", batch=1)
    trt_check("conv.onnx", batch=2)
"""
VERDICTS = Counter({("passes", "pass"): 1, ("fails", "fail"): 1, ("error", "error"): 1, ("by_hand", "pass"): 2})


def run(suite: Suite, names: list[str], *arguments: str) -> Run:
    """A run in a process of its own with the plugins named, which are skipped for where they are not installed."""
    for name in names:
        pytest.importorskip(PLUGINS[name][0], reason=f"`tox -e plugins` installs {name}")
    given = [each for name in names for each in PLUGINS[name][1]]
    return suite.run_apart("--trt-diagnose=0", *given, *arguments, plugins=names)


def verdicts(found: Run) -> Counter[tuple[str, str]]:
    return Counter((r["nodeid"].partition("::test_")[2].partition("[")[0], r["verdict"]) for r in found.checks)


@pytest.mark.parametrize("name", sorted({*PLUGINS} - {"pytest-split"}))
def test_alone(suite: Suite, name: str) -> None:
    suite.write(test_it=TESTS)
    found = run(suite, [name])
    times = 2 if name == "repeat" else 1
    assert verdicts(found) == Counter({key: count * times for key, count in VERDICTS.items()}), found.text
    assert found.report["missing"] == []
    assert found.report["planned"] == 4 * times
    again = {r["nodeid"].partition("::test_")[2] for r in found.checks if r["runs"] == 2}
    assert again == ({"fails", "error"} if name == "rerunfailures" else set())
    assert f"{5 * times} checks: {3 * times} pass, {times} fail, {times} error" in found.text
    if name == "html":
        page = (suite.path / "page.html").read_text()
        assert "gone.onnx: no such model file" in page
        assert "<i>gone" not in page


def test_split_tests_are_not_missing(suite: Suite) -> None:
    suite.write(test_it=TESTS)
    halves = [
        run(suite, ["pytest-split"], "--splitting-algorithm=duration_based_chunks", f"--group={group}")
        for group in (1, 2)
    ]
    assert verdicts(halves[0]) + verdicts(halves[1]) == VERDICTS
    for half in halves:
        assert half.report["missing"] == []
        assert half.report["planned"] == len({record["nodeid"] for record in half.checks}) == 2


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_all_together(suite: Suite, workers: str) -> None:
    """Half of the eight repetitions is selected, by whatever order chance gave."""
    suite.write(test_it=TESTS)
    found = run(suite, list(PLUGINS), workers)
    nodeids = {record["nodeid"] for record in found.checks}
    assert len(nodeids) == found.report["planned"] == 4
    assert found.report["missing"] == []
    assert set(verdicts(found)) <= set(VERDICTS)
    assert {record["nodeid"]: record["runs"] for record in found.checks} == {
        nodeid: 2 if "fails" in nodeid or "error" in nodeid else 1 for nodeid in nodeids
    }
    assert f"{len(found.checks)} checks: " in found.text
    assert (suite.path / "page.html").exists()


def test_seeds_of_randomly_change_no_inputs(suite: Suite) -> None:
    suite.write(test_it=TESTS)
    first, second = (run(suite, ["randomly"], f"--randomly-seed={seed}", "-k", "passes or by_hand") for seed in (1, 2))
    hashes = [sorted((r["nodeid"], r["inputs_sha256"]) for r in each.checks) for each in (first, second)]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 3


SLOW = """
import time

def slow():
    time.sleep(60)

@trt_parity(slow)
def test_slow(): ...

@pytest.mark.timeout(600)
@trt_parity("conv.onnx", batch=1)
def test_after(): ...
"""


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_a_check_that_a_timeout_stops_is_an_error(suite: Suite, workers: str) -> None:
    suite.write(test_it=SLOW)
    found = run(suite, ["timeout"], workers, "--timeout=5", "--timeout-method=signal")
    assert {r["nodeid"]: r["verdict"] for r in found.checks} == {
        "test_it.py::test_slow": "error",
        "test_it.py::test_after": "pass",
    }, found.text
    assert "Timeout" in found.check("test_slow")["message"]
    assert found.report["missing"] == []


def test_a_check_whose_process_a_timeout_ends_is_missing(suite: Suite) -> None:
    suite.write(test_it=SLOW)
    found = run(suite, ["timeout"], "-n2", "--timeout=5", "--timeout-method=thread")
    assert [(r["nodeid"], r["verdict"]) for r in found.checks] == [("test_it.py::test_after", "pass")], found.text
    (missing,) = found.report["missing"]
    assert missing["nodeid"] == "test_it.py::test_slow"
    assert "its process died" in missing["reason"]
    assert missing["outcome"] == "failed"


def test_a_process_that_a_timeout_ends_leaves_no_report(suite: Suite) -> None:
    """By threads, pytest-timeout ends pytest itself: an earlier run's report must not stand for this one."""
    suite.write(test_it=SLOW)
    (suite.path / "report.json").write_text("{}")
    found = run(suite, ["timeout"], "-n0", "--timeout=5", "--timeout-method=thread")
    assert found.result.ret != 0
    assert found.report == {}


def test_async_checks_run_where_asyncio_runs_them(suite: Suite) -> None:
    suite.write(
        test_it="import asyncio\n\n@trt_parity('conv.onnx')\nasync def test_fed():\n    await asyncio.sleep(0)\n"
        "    return {'image': np.ones((1, 3, 16, 16), np.float32)}\n"
    )
    strict = run(suite, ["asyncio"], "-oasyncio_mode=strict")
    strict.result.assert_outcomes(failed=1)
    (check,) = strict.checks
    assert (check["verdict"], check["code"]) == ("error", "user-code-failed")
    auto = run(suite, ["asyncio"])
    auto.result.assert_outcomes(passed=1)
    assert [(r["verdict"], r["inputs"]) for r in auto.checks] == [("pass", "returned")]


def test_the_table_names_modules_that_exist_somewhere() -> None:
    """A plugin that is never found would be skipped for ever: what `tox -e plugins` installs must be there."""
    installed = [name for name, (module, _) in PLUGINS.items() if _is_there(module)]
    if "randomly" in installed:  # of that environment alone
        assert sorted(installed) == sorted(PLUGINS)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
