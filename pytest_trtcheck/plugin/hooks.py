"""What pytest sees: options, markers, hooks. Errors in the user's input become texts here; nothing is decided here.

Only light modules are imported at the top: a suite without trt tests pays for none of the libraries.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.choices import BACKEND, BATCH, GPU, MARKERS, PRECISION
from pytest_trtcheck.errors import visible
from pytest_trtcheck.plugin import marks, specs
from pytest_trtcheck.plugin import options as settings
from pytest_trtcheck.plugin.fixtures import (  # noqa: F401 - as a plugin of their own: 7,000 calls more at each start
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
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from pytest_trtcheck.plugin.items import Marked

_REFUSED = pytest.StashKey[list[str]]()

_RUN = frozenset({"trt_check", "trt_build", "trt_engine", "trt_benchmark"})
"""Fixtures that run a backend."""
_FOR_GPU = _RUN | {"trt_gpu"}
# What a marked test needs beyond its own arguments; a user overrides them in a conftest or test module.
_CHECKING = frozenset({"trt_check", "trt_build"})
_OVERRIDABLE = ("trt_model", "trt_inputs", "trt_calibration", "trt_build_options")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the option table."""
    for option in settings.OPTIONS:
        settings.declare(parser, option)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks that other plugins may have."""
    pluginmanager.add_hookspecs(specs)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers; what they take is worked out for `--markers` alone."""
    for name in MARKERS:
        line = name
        if config.option.markers:
            from pytest_trtcheck.check import arguments

            line = arguments.marker_help(name)
        config.addinivalue_line("markers", line)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """`--trt-cache-show` lists the cache and ends the run, as pytest's own `--cache-show` does."""
    with _usage_errors():
        if settings.value(config, "trt_cache_show"):
            from pytest_trtcheck.plugin.session import Session

            print(visible(Session.make(config).cache_shown()))
            return 0
    return None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse options that are wrong or that this version can't serve before any test runs."""
    config = session.config
    if not settings.any_given(config):
        return
    from pytest_trtcheck.plugin.session import Session, session_of

    with _usage_errors():
        if not hasattr(config, "workerinput") and not config.option.collectonly:
            session_of(config).remove_earlier_reports()
        Session.check_options(config)
        if settings.value(config, "trt_cache_clear") and not hasattr(config, "workerinput"):
            session_of(config).clear_cache()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where to say what takes long."""
    from pytest_trtcheck.plugin import progress

    path = progress.for_worker(node.config)
    if path is not None:
        node.workerinput[progress.FILE] = path


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What the user got wrong on the command line or in the ini file is shown without a traceback."""
    try:
        yield
    except OSError as error:  # a path that the system refuses: too long, or through a link to itself
        raise pytest.UsageError(visible(f"{error.strerror or error}: {str(error.filename)[:200]!r}")) from error
    except Exception as error:
        if _is_ours(error):
            raise pytest.UsageError(visible(str(error))) from error
        raise


def _is_ours(error: BaseException) -> bool:
    from pytest_trtcheck.errors import CheckError, CheckFailed

    return isinstance(error, (CheckError, CheckFailed))


# --- collection ------------------------------------------------------------------------------------------------------


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect an .onnx file that is named on the command line or matched by `trt_collect`, never by walking alone.

    A failure bundle is collected when its `bundle.json` is named on the command line.
    """
    if file_path.suffix != ".onnx" and file_path.name != "bundle.json":
        return None
    from pytest_trtcheck.plugin import items

    return items.file_collector(file_path, parent)


def _marked(item: pytest.Item) -> Marked | None:
    # Asked of every test of every suite: one without our markers pays for a look at the marks, and for nothing else.
    if not marks.is_marked(item):
        return None
    from pytest_trtcheck.plugin.items import marked

    return marked(item)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Let marked tests use the fixtures that a user overrides, as if they named them: parametrized ones work too."""
    if type(obj) is pytest.MarkDecorator:
        if marks.replaces_a_test(collector, name, obj):
            raise collector.CollectError(marks.said(name, obj))
        return
    if marks.ours(obj):
        marks.note(collector, name, obj)
    elif not marks.reach(collector, name):
        return
    function = obj.__func__ if isinstance(obj, (staticmethod, classmethod)) else obj
    if inspect.isfunction(function) and not marks.is_fixture(function):
        pytest.mark.usefixtures(*_OVERRIDABLE)(function)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A marker on what is no test is an error: it would check nothing, and nobody would see that."""
    report = yield
    marks.keep(collector, report)
    said = marks.in_vain(collector, report)
    if said is not None:
        report.longrepr = said if report.outcome == "passed" else f"{said}\n\n{report.longrepr}"
        report.outcome, report.result = "failed", []
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a marked test that names several precisions or batches, and what checks by several backends, or for
    several GPUs.
    """
    found = _marked(metafunc.definition)
    if found is None:
        if not _RUN.isdisjoint(metafunc.fixturenames):
            by_backend(metafunc)
        if not _FOR_GPU.isdisjoint(metafunc.fixturenames):
            by_gpu(metafunc)
        return
    if not hasattr(metafunc.function, "__name__"):
        # A functools.partial has none, and pytest up to 9.0 asks what it parametrizes for it.
        metafunc.function.__name__ = metafunc.definition.name
    _by(metafunc, PRECISION, found.parity.precision, found.params.get(PRECISION))
    by_batch(metafunc, found.parity.batch, found.params.get(BATCH))
    if found.parity.engine is None:
        by_backend(metafunc, found.parity.backends, found.params.get(BACKEND))
        by_gpu(metafunc)


def _by(
    metafunc: pytest.Metafunc,
    name: str,
    values: Sequence[object],
    given: Sequence[Any] | None = None,
    ids: Sequence[str] | None = None,
) -> None:
    """Parametrize by values, where they are several, or were given with marks or names of their own."""
    if len(values) > 1 or given:
        metafunc.fixturenames.append(name)
        metafunc.parametrize(name, given or values, ids=ids)


def by_batch(
    metafunc: pytest.Metafunc,
    sizes: Sequence[int | None],
    given: Sequence[Any] | None = None,
) -> None:
    """Parametrize by batches, where they are several."""
    _by(metafunc, BATCH, sizes, given, [f"batch{size}" for size in sizes])


def by_system(metafunc: pytest.Metafunc) -> None:
    """Parametrize what has no test code: by the backends and by the GPUs of the options, where they are several."""
    by_backend(metafunc)
    by_gpu(metafunc)


def by_backend(
    metafunc: pytest.Metafunc,
    listed: tuple[str, ...] = (),
    given: Sequence[Any] | None = None,
) -> None:
    """Parametrize by the backends that a marker lists, else by those of `--trt-backend`, where they are several."""
    _by(metafunc, BACKEND, listed or settings.value(metafunc.config, "trt_backend"), given)


def by_gpu(metafunc: pytest.Metafunc) -> None:
    """Parametrize by the GPUs of `--trt-gpu`, where they are several."""
    _by(metafunc, GPU, settings.value(metafunc.config, "trt_gpu"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where tests are only listed, say which of them could not be checked: a list with one is no success."""
    if session.config.option.collectonly:
        checks = [(item, found) for item in getattr(session, "items", ()) if (found := _marked(item)) is not None]
        refused = [f"{item.nodeid}: {problem}" for item, found in checks if (problem := found.problem(item))]
        session.config.stash[_REFUSED] = refused
        if refused and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The tests of a list that could not be checked."""
    refused = config.stash.get(_REFUSED, None)
    if refused:
        terminalreporter.section("tests that cannot be checked", red=True, bold=True)
        for text in refused:
            terminalreporter.write_line(visible(f"ERROR {text}"))


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start collecting records, where tests are run at all; a worker that will check takes its GPU first."""
    config = session.config
    if not config.option.collectonly:
        from pytest_trtcheck.plugin.summary import Collector

        config.pluginmanager.register(Collector(config), "trtcheck-collector")
        if hasattr(config, "workerinput") and any(map(_uses_gpu, getattr(session, "items", ()))):
            from pytest_trtcheck.plugin.session import session_of

            _ = session_of(config).place


def _uses_gpu(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    return marks.is_marked(item) or getattr(item, "is_check", False) or not _RUN.isdisjoint(fixtures)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that is marked and can't be checked, alone and with the reason."""
    from pytest_trtcheck.plugin import outcome

    outcome.begin_run(item)
    if "pytest_trtcheck.strategies" in sys.modules:
        from pytest_trtcheck.plugin.session import session_of

        session_of(item.config).settle_strategies()
    found = _marked(item)
    if found is None:
        return
    problem = found.problem(item)
    if problem is not None:
        outcome.refuse(item, problem)
    assert isinstance(item, pytest.Function)
    # A marker that was added when all was collected has its fixtures asked for here.
    item.fixturenames.extend(name for name in _OVERRIDABLE if name not in item.fixturenames)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Keep what the body of a marked test returns, and see that the check was made; take many examples together."""
    from pytest_trtcheck.plugin import outcome

    if not isinstance(item, pytest.Function) or not marks.is_marked(item):
        if not isinstance(item, pytest.Function) or not _has_examples(item):
            result = yield
            if not _RUN.isdisjoint(getattr(item, "fixturenames", ())):
                outcome.raise_unheard(item)
            return result
        from pytest_trtcheck.plugin.examples import gathered

        with gathered(item):
            return (yield)
    from pytest_trtcheck.plugin.items import watched

    with watched(item):
        return (yield)


def _has_examples(item: pytest.Function) -> bool:
    """Whether Hypothesis runs the test many times, and it checks by our fixtures."""
    is_given = "hypothesis" in sys.modules and getattr(item.obj, "is_hypothesis_test", False)
    return bool(is_given) and not _CHECKING.isdisjoint(item.fixturenames)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a marked test, take what it returns as the inputs, and check."""
    result = yield
    found = _marked(pyfuncitem)
    if found is not None:
        from pytest_trtcheck.plugin.items import run_marked

        run_marked(pyfuncitem, found)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show our errors as their own text, and let no xfail hide that a check could not be made."""
    report = yield
    if call.excinfo is None or report.outcome == "passed":
        return report
    from pytest_trtcheck.plugin import outcome

    if not _is_ours(call.excinfo.value):
        if hasattr(report, "wasxfail") and outcome.hides_a_gap(item, call):
            report.outcome, report.longrepr = "failed", item.repr_failure(call.excinfo)
            del report.wasxfail
        if report.failed and report.when != "teardown" and outcome.checks(item) and not outcome.has_record(item):
            outcome.ended_early(item, report)
            report.user_properties = list(item.user_properties)
        return report
    error = call.excinfo.value
    if report.outcome == "skipped" and hasattr(report, "wasxfail") and not outcome.is_expected(item, error):
        report.outcome = "failed"
        del report.wasxfail
    if report.outcome == "failed":
        # A traceback of our internals helps nobody; what Hypothesis notes is the example that failed.
        report.longrepr = visible("\n\n".join([str(error), *getattr(error, "__notes__", ())]))
        setattr(report, outcome.LOCATION, outcome.location(item, call.excinfo))
    return report
