"""What pytest sees: options, markers, hooks. Errors in the user's input become texts here; nothing is decided here.

Only light modules are imported at the top: a suite without trt tests pays for none of the libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_trtcheck import settings
from pytest_trtcheck.errors import TrtCheckError
from pytest_trtcheck.fixtures import (
    trt_benchmark,
    trt_build,
    trt_build_options,
    trt_calibration,
    trt_check,
    trt_engine,
    trt_gpu,
    trt_inputs,
    trt_model,
    trt_reference,
)
from pytest_trtcheck.marked import BATCH, PRECISION, marked
from pytest_trtcheck.session import Session, session_of
from pytest_trtcheck.summary import Collector

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "trt_benchmark",
    "trt_build",
    "trt_build_options",
    "trt_calibration",
    "trt_check",
    "trt_engine",
    "trt_gpu",
    "trt_inputs",
    "trt_model",
    "trt_reference",
]

# What a marked test needs beyond its own arguments; a user overrides them in a conftest or test module.
_OVERRIDABLE = ("trt_model", "trt_inputs", "trt_calibration", "trt_build_options")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the option table."""
    group = parser.getgroup("trtcheck", "TensorRT inference checks")
    for option in settings.OPTIONS:
        shown = f"{option.help} [{', '.join(option.choices)}]" if option.choices else option.help
        if not option.ini_only:
            extra: dict[str, Any] = {"action": "store_true"} if option.kind == "flag" else {"metavar": option.metavar}
            group.addoption(option.flag, dest=option.name, default=None, help=shown, **extra)
        kind: Literal["linelist", "string"] = "linelist" if option.kind == "lines" else "string"
        parser.addini(option.name, shown, type=kind, default=None)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers and start collecting records."""
    for name in settings.MARKERS:
        config.addinivalue_line("markers", settings.marker_help(name))
    config.pluginmanager.register(Collector(config), "trtcheck-collector")


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """`--trt-cache-show` lists the cache and ends the run, as pytest's own `--cache-show` does."""
    try:
        if Session.setting(config, "trt_cache_show"):
            print(Session.make(config).cache.describe())
            return 0
    except TrtCheckError as error:
        raise pytest.UsageError(str(error)) from error
    return None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse options that are wrong or that this version can't serve before any test runs."""
    config = session.config
    try:
        Session.check_options(config)
        if Session.setting(config, "trt_cache_clear") and not hasattr(config, "workerinput"):
            session_of(config).cache.clear()
    except TrtCheckError as error:
        raise pytest.UsageError(str(error)) from error


# --- collection ------------------------------------------------------------------------------------------------------


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect an .onnx file that is named on the command line or matched by `trt_collect`, never by walking alone."""
    if file_path.suffix != ".onnx":
        return None
    from pytest_trtcheck import onnx_file

    return onnx_file.collector(file_path, parent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Turn the markers into specs, and lists in them into parameters."""
    found = marked(metafunc.definition)
    if found is None:
        return
    metafunc.fixturenames.extend(name for name in _OVERRIDABLE if name not in metafunc.fixturenames)
    if len(found.parity.precision) > 1:
        metafunc.fixturenames.append(PRECISION)
        metafunc.parametrize(PRECISION, found.parity.precision, indirect=True)
    if len(found.parity.batch) > 1:
        metafunc.fixturenames.append(BATCH)
        metafunc.parametrize(
            BATCH, found.parity.batch, ids=[f"batch{size}" for size in found.parity.batch], indirect=True
        )


@pytest.fixture(name=PRECISION)
def _precision(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(name=BATCH)
def _batch(request: pytest.FixtureRequest) -> Any:
    return request.param


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose marker is wrong, alone and with the reason."""
    if isinstance(item, pytest.Function) and (found := marked(item)) is not None and found.error is not None:
        from pytest_trtcheck.running import refuse

        refuse(item, found.error)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a marked test, take what it returns as the inputs, and check."""
    found = marked(pyfuncitem)
    if found is None:
        return (yield)
    returned: list[object] = []
    test = pyfuncitem.obj

    @functools.wraps(test)
    def keep_returned(*args: object, **kwargs: object) -> None:
        returned.append(test(*args, **kwargs))

    pyfuncitem.obj = keep_returned
    try:
        result = yield
    finally:
        pyfuncitem.obj = test
    from pytest_trtcheck.running import run_marked

    run_marked(pyfuncitem, found.selected(pyfuncitem), returned[0] if returned else None)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show our errors as their own text: a traceback of our internals helps nobody."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, TrtCheckError) and report.outcome == "failed":
        report.longrepr = str(call.excinfo.value)
    return report
