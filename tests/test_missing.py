"""What a report says of the tests that were to check something and left no record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.report import json_report

if TYPE_CHECKING:
    from tests.conftest import Suite

HEAD = "import os\n\n@trt_parity('conv.onnx', batch=1)\ndef test_a(): ...\n\n"
FAILS = HEAD + "@trt_parity('gone.onnx')\ndef test_b(): ...\n\n"
LAST = "@trt_parity('conv.onnx', batch=1)\ndef test_z(): ...\n"


def test_stopped_by_x(suite: Suite) -> None:
    suite.write(test_x=FAILS + LAST + "def test_unmarked(): ...\n")
    run = suite.run("-x", "--trt-html=report.html")
    assert run.report["planned"] == 3
    assert run.report["stopped"] == "stopping after 1 failures"
    assert run.report["missing"] == [
        {"nodeid": "test_x.py::test_z", "reason": "did not run: stopping after 1 failures", "outcome": None}
    ]
    assert "not in this report: 1 of 3 tests with checks: test_x.py::test_z (did not run" in run.text
    assert "test_x.py::test_z" in (suite.path / "report.html").read_text()


ENDS = "from pytest_trtcheck import trt_parity\n" + HEAD + "def test_ends():\n    {}\n\n" + LAST


@pytest.mark.parametrize("how", ["pytest.exit('enough', returncode=0)", "raise KeyboardInterrupt"])
def test_what_is_cut_short_exports_nothing_whatever_its_status(suite: Suite, how: str) -> None:
    """A second Ctrl-C, while pytest tells of the first, leaves status 0."""
    (suite.path / "conftest.py").write_text(
        "import pytest\n@pytest.hookimpl(trylast=True)\n"
        "def pytest_keyboard_interrupt(excinfo):\n    if excinfo.type is KeyboardInterrupt: raise KeyboardInterrupt\n"
    )
    suite.write(test_x="import pytest\n" + ENDS.format(how))
    run = suite.run_apart("--trt-export=out")
    assert run.report["missing"] == [
        {"nodeid": "test_x.py::test_z", "reason": "did not run: the run was interrupted", "outcome": None}
    ]
    assert run.report["stopped"] == "the run was interrupted"
    assert not (suite.path / "out").exists()
    assert run.result.ret != 0


def test_ctrl_c_while_results_are_written_leaves_out_one_alone(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_trtcheck.export import export

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write", interrupted)
    suite.write(test_x=HEAD)
    run = suite.run("--trt-export=out", "--trt-html=report.html")
    assert run.check("test_a")["verdict"] == "pass"
    assert (suite.path / "report.html").exists()
    assert "ERROR: --trt-export: interrupted: what it had begun is not there" in run.text
    assert run.result.ret == pytest.ExitCode.INTERRUPTED


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "n2"])
def test_what_could_not_be_collected_may_hold_checks(suite: Suite, workers: tuple[str, ...]) -> None:
    suite.write(test_x=HEAD, test_y="import gone\n\n" + LAST)
    run = suite.run_apart("--continue-on-collection-errors", "--trt-export=out", *workers)
    (missing,) = run.report["missing"]
    assert (missing["nodeid"], missing["outcome"], run.report["planned"]) == ("test_y.py", None, 2)
    assert missing["reason"].startswith("could not be collected: ImportError while importing test module")
    assert "not in this report: 1 of 2 tests with checks: test_y.py (could not be collected" in run.said
    assert "--trt-export: nothing was written: test_y.py could not be collected" in run.said
    assert not (suite.path / "out").exists()


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "n2"])
def test_what_could_not_be_collected_is_no_loss_where_nothing_is_checked(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]
) -> None:
    for name in [name for name in os.environ if name.startswith("TRTCHECK_")]:
        monkeypatch.delenv(name)
    pytester.makepyfile(test_x="def test_x(): ...", test_y="import gone")
    result = pytester.runpytest_subprocess("--continue-on-collection-errors", "-p", "no:cacheprovider", *workers)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.no_fnmatch_line("*inference checks*")


@pytest.mark.parametrize(
    ("ends", "why"),
    [("os._exit(0)", "the processes that collected it died"), ("raise KeyboardInterrupt", "the run was interrupted")],
)
def test_what_no_worker_lived_to_name_may_hold_checks(suite: Suite, ends: str, why: str) -> None:
    """Such a report had nothing in it and missed nothing: merged with others, it was green."""
    suite.write(test_x=f"import os\nif 'PYTEST_XDIST_WORKER' in os.environ:\n    {ends}\n\n" + LAST)
    run = suite.run_apart("-n1", "--max-worker-restart=0", "--trt-export=out", "test_x.py")
    (missing,) = run.report["missing"]
    assert missing == {"nodeid": "test_x.py", "reason": f"could not be collected: {why}", "outcome": None}
    assert "--trt-export: nothing was written: the run was stopped" in run.said
    assert run.result.ret not in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}


def test_tests_that_nobody_asked_for_are_not_missing(suite: Suite) -> None:
    suite.write(test_x=HEAD)
    run = suite.run_apart("-n1", "-k", "nothing")
    assert (run.report["planned"], run.report["missing"]) == (0, [])


def test_dead_worker(suite: Suite) -> None:
    suite.write(test_x=HEAD + "@trt_parity('conv.onnx')\ndef test_dies(): os._exit(3)\n\n" + LAST)
    run = suite.run_apart("-n2")
    assert sorted(check["nodeid"] for check in run.checks) == ["test_x.py::test_a", "test_x.py::test_z"]
    assert run.report["missing"] == [
        {
            "nodeid": "test_x.py::test_dies",
            "reason": "its process died: it crashed, or was ended for want of memory",
            "outcome": "failed",
        }
    ]
    assert "test_x.py::test_dies (its process died: it crashed, or was ended for want of memory)" in " ".join(
        run.text.split()
    )


def test_what_is_registered_has_no_properties() -> None:
    """pytest 8.2 reads every attribute of a plugin object: a report was put together before the first test ran."""
    import functools

    from pytest_trtcheck.plugin.summary import Collector

    computed = (property, functools.cached_property)
    assert not [name for name, each in vars(Collector).items() if isinstance(each, computed)]


def test_ended_before_the_check(suite: Suite) -> None:
    suite.write(
        test_x=HEAD
        + "@trt_parity('conv.onnx')\ndef test_body(): raise ValueError('no data')\n\n"
        + "@pytest.fixture\ndef broken(): raise OSError('no disk')\n\n"
        + "@trt_parity('conv.onnx')\ndef test_fixture(broken): ...\n\n"
        + "@trt_parity('conv.onnx')\n@pytest.mark.skip(reason='no time')\ndef test_skipped(): ...\n\n"
        + "def test_never_called(trt_check): ...\n"
    )
    run = suite.run()
    assert {each["nodeid"].rpartition("_")[2]: each["reason"] for each in run.report["missing"]} == {
        "skipped": "skipped: no time",
        "called": "passed, and made no check",
    }
    bad = {check["nodeid"].rpartition("_")[2]: check for check in run.checks if check["verdict"] == "error"}
    assert {name: check["message"] for name, check in bad.items()} == {
        "body": "failed in its call before it was checked: ValueError: no data",
        "fixture": "failed in its setup before it was checked: OSError: no disk",
    }
    assert {(check["model"], check["precision"], check["outcome"]) for check in bad.values()} == {
        ("conv.onnx", "fp16", "failed")
    }
    assert run.report["planned"] == 5
    assert "not in this report: 1 of 5 tests" in run.text


def test_what_a_test_mocks_is_its_own_failure(suite: Suite) -> None:
    suite.write(
        test_x="""
import json

def broken(*_, **__):
    raise RuntimeError("mocked")

@trt_parity("conv.onnx", batch=1)
def test_a(monkeypatch):
    monkeypatch.setattr(json, "dumps", broken)
    monkeypatch.setattr(json, "loads", broken)

@trt_parity("conv.onnx", batch=1)
def test_b(): ...
"""
    )
    run = suite.run()
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    assert [check["verdict"] for check in run.checks] == ["error", "pass"]
    assert "RuntimeError: mocked" in run.check("test_a")["message"]


def test_unforeseen_exception_is_a_record(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_trtcheck.check.steps import asked

    # What is raised in a file of the user's is the user's.
    ours: dict[str, Any] = {}
    exec(compile("def broken(*_, **__):\n    raise KeyError('whatever')", asked.__file__, "exec"), ours)
    monkeypatch.setattr(asked, "prepared", ours["broken"])
    suite.write(test_x=HEAD)
    run = suite.run()
    (record,) = run.checks
    assert record["verdict"] == "error"
    assert "conv.onnx: KeyError: 'whatever' (asked.py:2)" in record["message"]
    assert "please report it" in record["message"]
    assert "Traceback" not in run.text
    assert run.report["missing"] == []


def test_report_that_cannot_be_made_hides_no_other(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_trtcheck.report import html

    def broken(*_: object, **__: object) -> None:
        raise KeyError("whatever")

    monkeypatch.setattr(html, "render", broken)
    suite.write(test_x=HEAD)
    run = suite.run("--trt-html=report.html")
    assert run.check("test_a")["verdict"] == "pass"
    assert "ERROR: writing the reports: KeyError: 'whatever'" in run.text
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED


def test_killed_run_leaves_no_earlier_report(suite: Suite) -> None:
    suite.write(test_x="import time\n@trt_parity('conv.onnx')\ndef test_a():\n    time.sleep(60)\n")
    for name in ("report.json", "report.html"):
        (suite.path / name).write_text("of an earlier run")
    # Only listing tests makes no report.
    command = [sys.executable, "-mpytest", "-q", "--trt-report=report.json", "--trt-html=report.html"]
    subprocess.run([*command, "--collect-only"], cwd=suite.path, check=True, capture_output=True)
    assert (suite.path / "report.json").exists()
    process = subprocess.Popen(command, cwd=suite.path, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while (suite.path / "report.html").exists():
        assert time.monotonic() < end, "the earlier report is still there"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.wait()
    assert not (suite.path / "report.json").exists()


def test_no_report_takes_the_place_of_a_test_a_model_or_what_is_read(suite: Suite) -> None:
    suite.write(test_x=HEAD, test_y=HEAD)
    evidence = json_report.document([], json_report.environment())
    json_report.save(suite.path / "gpu.json", evidence)
    for given, reason in (
        (("--trt-report", "test_y.py"), "--trt-report=test_y.py: it is there, and is no report"),
        (("--trt-html", "conv.onnx"), "--trt-html=conv.onnx: it is there, and is no report"),
        (
            ("--trt-gpu=T4", "--trt-require-evidence=gpu.json", "--trt-report=./gpu.json"),
            "--trt-report=./gpu.json: --trt-require-evidence names it too",
        ),
    ):
        path = suite.path / given[-1].rpartition("=")[2]
        before = path.read_bytes()
        run = suite.run(*given, "test_x.py")
        assert run.result.ret == pytest.ExitCode.USAGE_ERROR
        assert reason in run.text
        assert path.read_bytes() == before


def test_a_report_that_another_run_wrote_meanwhile_is_told(suite: Suite) -> None:
    other = "    from pathlib import Path\n    Path('report.json').write_text('of another run')\n"
    suite.write(test_x=HEAD.rstrip(" .\n") + "\n" + other)
    run = suite.run()
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    assert "report.json: another run wrote a report there since this one began" in run.said
    assert run.check("test_a")["verdict"] == "pass"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "n2"])
def test_a_library_that_finds_no_memory(suite: Suite, workers: tuple[str, ...]) -> None:
    """The first check takes what there is: what records and reports need is loaded by then."""
    suite.write(
        test_x="""
        import resource
        from pathlib import Path

        @trt_parity("conv.onnx")
        def test_starved():
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), resource.RLIM_INFINITY))
        """.replace("\n        ", "\n")
    )
    run = suite.run_apart(*workers)
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    (check,) = run.report["checks"]
    assert (check["verdict"], check["code"]) == ("error", "out-of-memory"), check["message"]
    assert "INTERNALERROR" not in run.text
