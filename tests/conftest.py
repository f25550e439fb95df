"""Fixtures for tests that run real pytest on small suites."""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

import pytest_trtcheck
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

LEFT_OUT = (
    "anyio",
    "asyncio",
    "flaky",
    "html",
    "hypothesispytest",
    "pytest-split",
    "pytest_cov",
    "randomly",
    "repeat",
    "rerunfailures",
    "sugar",
    "timeout",
)
"""Plugins that a small suite is run without: those that run tests in a way of their own, and hypothesis's, which
imports all of hypothesis to end a run in which nothing used it."""

RUNS = {"plain": (), "n0": ("-n0",), "n2": ("-n2",)}


# No test fails because the machine is busy. `--hypothesis-profile` still chooses another one.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No variable of the machine changes a test, and no test writes into the user's cache."""
    import os

    for name in [name for name in os.environ if name.startswith("TRTCHECK_")]:
        monkeypatch.delenv(name)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    cache = tmp_path_factory.getbasetemp() / "trtcheck-cache"
    monkeypatch.setenv("TRTCHECK_CACHE_DIR", str(cache))


class Suite:
    """A small project with models in it, on which pytest is run."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        onnx_models.save(onnx_models.conv_net(), self.path / "conv.onnx")
        onnx_models.save(onnx_models.gemm_net(), self.path / "gemm.onnx")

    def write(self, **files: str) -> Suite:
        """Write Python files, an import of what the tests use at the top of each."""
        head = (
            "import numpy as np\nimport pytest\n"
            "from pytest_trtcheck import CheckError, CheckFailed, Tolerance, trt_latency, trt_parity\n\n"
        )
        for name, text in files.items():
            (self.path / f"{name}.py").write_text(head + text)
        return self

    def run(self, *arguments: str, plugins: Sequence[str] = ()) -> Run:
        """Run pytest in this process, with a JSON report; of `LEFT_OUT` with those named alone."""
        return self._run(self.pytester.runpytest_inprocess, arguments, plugins)

    def run_apart(self, *arguments: str, plugins: Sequence[str] = ()) -> Run:
        """Run pytest in a process of its own: where imports, workers or the state of the process matter."""
        return self._run(self.pytester.runpytest_subprocess, arguments, plugins)

    def _run(self, runpytest: Callable[..., pytest.RunResult], arguments: Sequence[str], plugins: Sequence[str]) -> Run:
        report = self.path / "report.json"
        report.unlink(missing_ok=True)
        result = runpytest(
            *(f"-pno:{name}" for name in LEFT_OUT if name not in plugins),
            *("-W", "error", "--strict-markers", "-p", "no:cacheprovider", f"--trt-report={report}"),
            *arguments,
        )
        return Run(result, report)


@pytest.fixture(scope="session")
def all_loaded() -> None:
    """What a run in this process may need is imported: pytester forgets what it imports, and numpy loads once."""
    import numpy.fft  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401

    for module in pkgutil.walk_packages(pytest_trtcheck.__path__, "pytest_trtcheck."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


class Run:
    """What one run printed and reported."""

    def __init__(self, result: pytest.RunResult, report: Path) -> None:
        self.result = result
        self.text = result.stdout.str() + result.stderr.str()
        self.report: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}

    @property
    def said(self) -> str:
        """The text in one line: how it was folded to the terminal's width is another matter."""
        return " ".join(self.text.split())

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The check records."""
        found: list[dict[str, Any]] = self.report["checks"]
        return found

    def check(self, name: str) -> dict[str, Any]:
        """The record of the one test whose node id ends like this."""
        (record,) = [record for record in self.checks if record["nodeid"].endswith(name)]
        return record


@pytest.fixture
def suite(all_loaded: None, pytester: pytest.Pytester) -> Suite:
    return Suite(pytester)


@pytest.fixture(params=list(RUNS))
def run_everywhere(request: pytest.FixtureRequest, suite: Suite) -> Callable[..., Run]:
    """Run the suite plainly, with xdist off, and on two workers."""
    extra = RUNS[request.param]
    run = suite.run_apart if request.param == "n2" else suite.run
    return lambda *arguments: run(*extra, *arguments)
