"""A run that looks like one without checks loads next to nothing; one that turns out to have some loses none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Suite

HEAD = "import pytest\nfrom pytest_trtcheck import trt_parity\n"
LATE = HEAD + "def pytest_runtest_setup(item): item.add_marker(trt_parity('gone.onnx'))\n"
QUIET = ("-pno:cacheprovider", "-pno:asyncio")
WAYS = {
    "collection": (
        HEAD + "def pytest_collection_modifyitems(items): items[-1].add_marker(trt_parity('gone.onnx'))\n",
        "def test_late(): ...",
        "gone.onnx",
    ),
    "early setup": (
        LATE.replace("def", "@pytest.hookimpl(tryfirst=True)\ndef"),
        "def test_late(): ...",
        "gone.onnx",
    ),
    "setup": (LATE, "def test_late(): ...", "was added while the test was running"),
    "fixture": (
        HEAD + "@pytest.fixture\ndef marks(request): request.node.add_marker(trt_parity('gone.onnx'))\n",
        "def test_late(marks): ...",
        "was added while the test was running",
    ),
    "body": (
        "",
        "def test_late(request): request.node.add_marker(trt_parity('gone.onnx'))",
        "was added while the test was running",
    ),
    "trt_check": ("", "def test_late(request): request.getfixturevalue('trt_check')('gone.onnx')", "gone.onnx"),
    "trt_check in a thread": (
        "",
        "from threading import Thread\n"
        "def test_late(request):\n"
        "    thread = Thread(target=request.getfixturevalue('trt_check'), args=['gone.onnx'])\n"
        "    thread.start(), thread.join()",
        "gone.onnx",
    ),
    "trt_check in a fixture": (
        HEAD + "@pytest.fixture\ndef check(request): request.getfixturevalue('trt_check')('gone.onnx')\n",
        "def test_late(check): ...",
        "gone.onnx",
    ),
}


@pytest.fixture
def plain(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A suite of which pytest is told nothing: an option that is given, or a model that is met, is looked at."""
    monkeypatch.delenv("TRTCHECK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(suite.path / "cache"))
    for model in suite.path.glob("*.onnx"):
        model.unlink()
    return suite


@pytest.mark.parametrize("way", WAYS)
def test_a_check_that_nobody_knew_of_is_made_or_refused_and_shown(plain: Suite, way: str, all_loaded: None) -> None:
    conftest, test, said = WAYS[way]
    plain.pytester.makeconftest(conftest)
    (plain.path / "test_late.py").write_text(f"{HEAD}def test_plain(): ...\n\n{test}\n")
    result = plain.pytester.runpytest_inprocess(*QUIET, "test_late.py::test_late")
    text = result.stdout.str()
    assert result.ret == pytest.ExitCode.TESTS_FAILED, text
    assert said in " ".join(text.split())
    assert "= inference checks =" in text
    assert "Traceback" not in text


def test_a_check_after_tests_without_is_in_the_reports_of_workers(plain: Suite) -> None:
    (plain.path / "test_late.py").write_text(
        HEAD + "def test_plain(): ...\n\n"
        "def test_late(request): request.getfixturevalue('trt_check')('gone.onnx')\n"
        "def test_body(request): request.node.add_marker(trt_parity('gone.onnx'))\n"
    )
    result = plain.pytester.runpytest_subprocess(*QUIET, "-n2")
    result.assert_outcomes(passed=1, failed=2)
    assert "2 checks: 2 error" in result.stdout.str().partition("= inference checks =")[2]


def test_a_check_that_a_run_does_not_come_to_is_named(plain: Suite) -> None:
    (plain.path / "test_late.py").write_text(
        HEAD + "def test_plain(): assert 0\n\n@trt_parity('gone.onnx')\ndef test_marked(): ...\n"
    )
    result = plain.pytester.runpytest_subprocess(*QUIET, "-x")
    result.stdout.re_match_lines(["not in this report: 1 of 1 test with checks: test_late.py::test_marked.*"])


@pytest.mark.parametrize("arguments", [("--trt-report=report.json",), ("--trt-report=report.json", "-n1")])
def test_a_report_that_was_asked_for_is_written_without_checks(plain: Suite, arguments: tuple[str, ...]) -> None:
    (plain.path / "test_plain.py").write_text("def test_plain(): ...\n")
    plain.pytester.runpytest_subprocess(*QUIET, *arguments).assert_outcomes(passed=1)
    assert (plain.path / "report.json").exists()


def test_what_a_run_without_checks_loads(plain: Suite) -> None:
    """Each of these is a tenth of a millisecond of every run of anybody, and twice that where pytest rewrites it."""
    plain.pytester.makeconftest(
        "import sys\n"
        "def pytest_unconfigure():\n"
        "    ours = {name: m for name, m in sys.modules.items() if name.startswith('pytest_trtcheck')}\n"
        "    print('\\nloaded', *sorted(ours))\n"
        "    print('rewritten', *sorted(name for name in ours if 'Rewrit' in type(ours[name].__loader__).__name__))\n"
        "import atexit\n"
        "atexit.register(lambda: print('left', *(each for each in sys.meta_path if 'trtcheck' in each.__module__)))\n"
    )
    (plain.path / "test_plain.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', [1, 2])\ndef test_plain(x, tmp_path): ...\n"
    )
    result = plain.pytester.runpytest_subprocess("-q", "-s", *QUIET)
    result.assert_outcomes(passed=2)
    (line,) = [line for line in result.outlines if line.startswith("loaded")]
    assert line.split()[1:] == [
        "pytest_trtcheck",
        "pytest_trtcheck.choices",
        "pytest_trtcheck.plugin",
        "pytest_trtcheck.plugin.fixtures",
        "pytest_trtcheck.plugin.hooks",
        "pytest_trtcheck.plugin.marks",
        "pytest_trtcheck.plugin.option_table",
    ]
    (line,) = [line for line in result.outlines if line.startswith("rewritten")]
    assert set(line.split()[1:]) <= {"pytest_trtcheck", "pytest_trtcheck.plugin", "pytest_trtcheck.plugin.hooks"}
    assert "left" in result.outlines


FINDERS = "[each for each in sys.meta_path if 'trtcheck' in each.__module__]"


def test_imports_are_let_go_where_the_plugin_is_not_loaded(plain: Suite) -> None:
    (plain.path / "test_plain.py").write_text(
        f"import sys\n{HEAD}def test_plain(): assert not {FINDERS}\n\ndef test_is_refused(): trt_parity('gone.onnx')\n"
    )
    result = plain.pytester.runpytest_subprocess(*QUIET, "-pno:trtcheck")
    result.assert_outcomes(passed=1, failed=1)
    script = f"import sys, pytest_trtcheck\npytest_trtcheck.trt_parity('gone.onnx')\nassert not {FINDERS}"
    assert plain.pytester.run(sys.executable, "-c", script).ret == 0


def test_a_run_within_a_run_leaves_its_imports_and_warns_of_nothing(
    plain: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    named = ["-p", "pytest_trtcheck.plugin.hooks"]
    inner = [*named, "-Werror", "inner.py"]
    (plain.path / "inner.py").write_text("def test_inner(): ...\n")
    (plain.path / "test_outer.py").write_text(
        "import sys\nimport pytest\n\n"
        f"def test_outer():\n    assert len({FINDERS}) == 1\n    assert pytest.main({inner}) == 0\n"
        f"    assert len({FINDERS}) == 1\n"
    )
    plain.pytester.runpytest_subprocess(*named).assert_outcomes(passed=1)
    script = f"import pytest, sys\nassert pytest.main({inner}) == pytest.main({inner}) == 0\nassert not {FINDERS}"
    result = plain.pytester.run(sys.executable, "-c", script)
    assert result.ret == 0, result.outlines


OUTLIVING = """
import threading
from concurrent.futures import ThreadPoolExecutor
import pytest
import pytest_trtcheck.check.checker as checker
from pytest_trtcheck import CheckFailed

go = threading.Event()

class Pool:
    def __enter__(self):
        self.pool = ThreadPoolExecutor(1)
        return self.pool
    def __exit__(self, *_):
        go.set()
        self.pool.shutdown()

@pytest.fixture
def pool():
    with Pool() as pool: yield pool

@pytest.fixture
def bad(trt_check, trt_build_options, trt_calibration, trt_inputs):
    return lambda tol=0: (go.wait(60), trt_check("conv.onnx", batch=1, tol=tol))

def test_waits_in_a_fixture(bad, pool):
    go.clear()
    pool.submit(bad)

def test_waits_in_a_fixture_and_passes(bad, pool):
    go.clear()
    pool.submit(bad, 1e-2)

def test_hears_it_once(bad, pool):
    go.set()
    pool.submit(bad).result()

def test_waits_for_nobody(trt_check, monkeypatch):
    def check(self, request):
        begun.set()
        go.wait(60)
        raise CheckFailed("it was off")
    monkeypatch.setattr(checker.Checker, "check", check)
    begun = threading.Event()
    go.clear()
    globals()["thread"] = threading.Thread(target=lambda: pytest.raises(CheckFailed, trt_check, "conv.onnx", batch=1))
    thread.start()
    begun.wait(60)

def test_lets_it_end():
    go.set()
    thread.join()
"""


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_a_check_that_a_thread_ends_behind_its_test_fails_it(suite: Suite, workers: str) -> None:
    """Nobody hears what is raised there: such a test passed, whatever came out."""
    suite.write(test_a=OUTLIVING)
    run = suite.run(workers)
    run.result.assert_outcomes(passed=4, failed=1, errors=2)
    assert "ERROR at teardown of test_waits_in_a_fixture " in run.text
    assert "test_waits_for_nobody: ended while a thread of its own was still at a check: how it ends" in run.said
    late = "ERROR: test_a.py::test_waits_for_nobody: failed in a thread of its own, after it had ended: it was off"
    assert late in run.said
    verdicts = {check["nodeid"].partition("::")[2]: check["verdict"] for check in run.checks}
    assert verdicts == {
        "test_waits_in_a_fixture": "fail",
        "test_waits_in_a_fixture_and_passes": "pass",
        "test_hears_it_once": "fail",
    }
