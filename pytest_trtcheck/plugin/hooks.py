"""What pytest sees: options, markers, fixtures, hooks.

Every pytest run loads this module, and asks it about every test: it is short, and so is what it imports. What a hook
does where something is checked stands in the other modules.

PYTEST_DONT_REWRITE: where the same process ran pytest before, it would warn that this module can't be rewritten.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.plugin import as_they_are

with as_they_are():
    from pytest_trtcheck.choices import MARKERS
    from pytest_trtcheck.plugin import marks, option_table
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
    from collections.abc import Callable, Generator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pytest_trtcheck.plugin.items import Marked
    from pytest_trtcheck.report import Report


_GIVEN: pytest.StashKey[bool] = pytest.StashKey()
"""Whether the user gave any of our options."""


class Hooks:
    """The hooks that a user's plugin or conftest.py may have for this one."""

    @staticmethod
    def pytest_trtcheck_reports() -> Sequence[Report]:  # type: ignore[empty-body]
        """Reports to write beside our own."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the option table, and the hooks that other plugins may have."""
    option_table.declare(parser, *option_table.OPTIONS)
    pluginmanager.add_hookspecs(Hooks)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers; what they take is worked out for `--markers` alone."""
    for name in MARKERS:
        line = name
        if config.option.markers:
            from pytest_trtcheck.check import arguments

            line = arguments.marker_help(name)
        config.addinivalue_line("markers", line)
    run = ExitStack()
    run.enter_context(as_they_are())
    config.add_cleanup(run.close)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """`--trt-cache-show` lists the cache and ends the run, as pytest's own `--cache-show` does."""
    if not option_table.is_given(config, "trt_cache_show"):
        return None
    from pytest_trtcheck.plugin.session import show_cache

    return show_cache(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse options that are wrong or that this version can't serve before any test runs."""
    given = session.config.stash[_GIVEN] = option_table.any_given(session.config)
    if given:
        from pytest_trtcheck.plugin.session import begin

        begin(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tell a worker of pytest-xdist where to say what takes long."""
    from pytest_trtcheck.plugin import progress

    progress.tell_worker(node)


# --- collection ------------------------------------------------------------------------------------------------------


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect an .onnx file that is named on the command line or matched by `trt_collect`, never by walking alone.

    A failure bundle is collected when its `bundle.json` is named on the command line.
    """
    if file_path.suffix != ".onnx" and file_path.name != "bundle.json":
        return None
    from pytest_trtcheck.plugin import items

    return items.file_collector(file_path, parent)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Let marked tests use the fixtures that a user overrides, as if they named them: parametrized ones work too."""
    if type(obj) is pytest.MarkDecorator:
        if obj.name in MARKERS:
            from pytest_trtcheck.plugin import misplaced

            misplaced.refuse_decorator(collector, name, obj)
        return
    if marks.ours(obj):
        marks.note(collector, name, obj)
    elif not marks.reach(collector, name):
        return
    marks.let_override(obj)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A marker on what is no test is an error: it would check nothing, and nobody would see that."""
    report = yield
    if report.outcome == "failed" or (report.outcome == "passed" and marks.may_do_nothing(collector)):
        from pytest_trtcheck.plugin import misplaced

        misplaced.tell(collector, report)
    marks.keep(collector, report)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """See that no model or bundle that is named was left out; keep what there is before tests are selected from it."""
    session.stash[marks.COLLECTED] = list(items)
    if any(each.partition("::")[0].endswith((".onnx", "bundle.json")) for each in session.config.args):
        from pytest_trtcheck.plugin.items import add_left_out

        add_left_out(session, items)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a marked test that names several precisions or batches, and what checks by several backends, or for
    several GPUs.
    """
    if marks.is_marked(metafunc.definition) or marks.uses(metafunc, marks.FOR_GPU):
        from pytest_trtcheck.plugin import parametrization

        parametrization.by_all(metafunc)


# --- running: what every test of every suite is asked ----------------------------------------------------------------


def _marked(item: pytest.Item) -> Marked | None:
    # One without our markers pays for a look at the marks, and for nothing else.
    if not marks.is_marked(item):
        return None
    from pytest_trtcheck.plugin.items import marked

    return marked(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Collect the records from now on, where there may be any: a suite without checks pays for none of that."""
    config = session.config
    checks = any(map(marks.runs_a_backend, getattr(session, "items", ())))
    if checks or config.stash.get(_GIVEN, False) or config.pluginmanager.hasplugin("dsession"):
        from pytest_trtcheck.plugin import summary

        summary.begin(session, checks=checks)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that is marked and can't be checked, alone and with the reason."""
    if "pytest_trtcheck.strategies" in sys.modules:
        from pytest_trtcheck.plugin.session import session_of

        session_of(item.config).settle_strategies()
    found = _marked(item)
    if found is not None:
        found.prepare(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Keep what the body of a marked test returns, and see that the check was made; take many examples together."""
    if not isinstance(item, pytest.Function):
        return (yield)
    seen_to: Callable[[pytest.Function], AbstractContextManager[object]] = nullcontext
    if marks.is_marked(item):
        from pytest_trtcheck.plugin.items import watched as seen_to
    elif "hypothesis" in sys.modules and marks.has_examples(item):
        from pytest_trtcheck.plugin.examples import gathered as seen_to
    with seen_to(item):
        result = yield
    if "pytest_trtcheck.plugin.outcome" in sys.modules:
        from pytest_trtcheck.plugin.outcome import raise_unheard

        raise_unheard(item)
    return result


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
    if call.excinfo is not None and report.outcome != "passed":
        from pytest_trtcheck.plugin import outcome

        outcome.tell(item, call, report)
    return report
