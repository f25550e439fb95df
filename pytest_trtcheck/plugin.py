"""What pytest sees: options, markers, hooks. Errors in the user's input become texts here; nothing is decided here.

Only light modules are imported at the top: a suite without trt tests pays for none of the libraries.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_trtcheck import settings
from pytest_trtcheck.choices import BATCH, MARKERS, PRECISION
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

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from pytest_trtcheck.marked import Marked

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

_IS_MARKED = pytest.StashKey[bool]()

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
    """Declare the markers; what they take is worked out for `--markers` alone."""
    for name in MARKERS:
        config.addinivalue_line("markers", _marker_help(name) if config.option.markers else name)


def _marker_help(name: str) -> str:
    from pytest_trtcheck.markers import marker_help

    return marker_help(name)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """`--trt-cache-show` lists the cache and ends the run, as pytest's own `--cache-show` does."""
    with _usage_errors():
        if settings.value(config, "trt_cache_show"):
            from pytest_trtcheck.session import Session

            print(Session.make(config).cache.describe())
            return 0
    return None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse options that are wrong or that this version can't serve before any test runs."""
    config = session.config
    if not settings.any_given(config):
        return
    from pytest_trtcheck.session import Session, session_of

    with _usage_errors():
        Session.check_options(config)
        if settings.value(config, "trt_cache_clear") and not hasattr(config, "workerinput"):
            session_of(config).cache.clear()


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What the user got wrong on the command line or in the ini file is shown without a traceback."""
    try:
        yield
    except Exception as error:
        if _is_ours(error):
            raise pytest.UsageError(str(error)) from error
        raise


def _is_ours(error: BaseException) -> bool:
    from pytest_trtcheck.errors import TrtCheckError

    return isinstance(error, TrtCheckError)


# --- collection ------------------------------------------------------------------------------------------------------


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect an .onnx file that is named on the command line or matched by `trt_collect`, never by walking alone.

    A failure bundle is collected when its `bundle.json` is named on the command line.
    """
    if file_path.suffix == ".onnx":
        from pytest_trtcheck import onnx_file

        return onnx_file.collector(file_path, parent)
    if file_path.name == "bundle.json":
        from pytest_trtcheck import bundle_file

        return bundle_file.collector(file_path, parent)
    return None


def _marked(item: pytest.Item) -> Marked | None:
    # Asked of every test of every suite: one without our markers pays for a look at the marks, and for nothing else.
    node: pytest.Item | pytest.Collector | None = item
    while node is not None:
        for mark in node.own_markers:
            if mark.name in MARKERS:
                from pytest_trtcheck.marked import marked

                return marked(item)
        node = node.parent
    return None


def _is_marked_above(parent: pytest.Collector | None) -> bool:
    # Worked out once a module or class, for its many tests. Only while collecting: marks may be added later.
    if parent is None:
        return False
    known = parent.stash.get(_IS_MARKED, None)
    if known is None:
        known = any(mark.name in MARKERS for node in parent.listchain() for mark in node.own_markers)
        parent.stash[_IS_MARKED] = known
    return known


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, obj: object) -> None:
    """Let marked tests use the fixtures that a user overrides, as if they named them: parametrized ones work too."""
    marks = getattr(obj, "pytestmark", None)
    # Asked of everything in every module of every suite: the usual answer takes two look-ups.
    if marks is None and collector.stash.get(_IS_MARKED, None) is False:
        return
    above = _is_marked_above(collector)
    function = getattr(obj, "__func__", obj)
    if hasattr(function, "__code__") and (above or any(mark.name in MARKERS for mark in marks or ())):
        pytest.mark.usefixtures(*_OVERRIDABLE)(function)
        manager = collector.config.pluginmanager
        if not manager.has_plugin(_Parameters.name):
            # Only now: asked of every test of a suite that has none of ours, it would cost more than all else here.
            manager.register(_Parameters(), _Parameters.name)


class _Parameters:
    """Turns lists in the markers into parameters."""

    name = "trtcheck-parameters"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize a marked test that names several precisions or batches."""
        found = _marked(metafunc.definition)
        if found is None:
            return
        if len(found.parity.precision) > 1:
            metafunc.fixturenames.append(PRECISION)
            metafunc.parametrize(PRECISION, found.parity.precision)
        if len(found.parity.batch) > 1:
            metafunc.fixturenames.append(BATCH)
            metafunc.parametrize(BATCH, found.parity.batch, ids=[f"batch{size}" for size in found.parity.batch])


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start collecting records, where tests are run at all."""
    if not session.config.option.collectonly:
        from pytest_trtcheck.summary import Collector

        session.config.pluginmanager.register(Collector(session.config), "trtcheck-collector")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose marker is wrong, alone and with the reason."""
    if isinstance(item, pytest.Function) and (found := _marked(item)) is not None and found.error is not None:
        from pytest_trtcheck.running import refuse

        refuse(item, found.error)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a marked test, take what it returns as the inputs, and check."""
    found = _marked(pyfuncitem)
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
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show our errors as their own text: a traceback of our internals helps nobody."""
    report = yield
    if call.excinfo is not None and report.outcome == "failed" and _is_ours(call.excinfo.value):
        report.longrepr = str(call.excinfo.value)
    return report
