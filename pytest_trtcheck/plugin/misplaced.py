"""Marks of ours that stand where they do nothing, which nobody would see: they are errors."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.plugin.marks import SEEN, is_fixture, is_marked, misspelled, name_of, ours, unread

if TYPE_CHECKING:
    from collections.abc import Iterator


def tell(collector: pytest.Collector, report: pytest.CollectReport) -> None:
    """Make the report of what was collected an error, where marks in it carry no test."""
    if isinstance(collector, (pytest.Module, pytest.Class)):
        find = _in_failed_module if report.outcome == "failed" else _without_test
        texts = [said(*each) for each in find(collector, report)]
        if report.outcome == "passed":
            texts += [
                f"{name} holds trt markers, and pytest reads none of that name: nothing is checked\n"
                "  → call it pytestmark"
                for name in misspelled(collector)
            ]
        text = "\n".join(texts)
        if text:
            report.longrepr = text if report.outcome == "passed" else f"{text}\n\n{report.longrepr}"
            report.outcome, report.result = "failed", []


def _without_test(
    collector: pytest.Module | pytest.Class, report: pytest.CollectReport
) -> Iterator[tuple[str, object]]:
    """Marked members of a module or class of which pytest made no test; the collector itself where it is empty; what
    marks a module from above.
    """
    if isinstance(collector, pytest.Module):
        yield from ((str(each.__file__), each) for each in unread(collector))
    members: dict[str, Any] = collector.stash.get(SEEN, {})
    if isinstance(collector, pytest.Class):
        # pytest does not ask about unittest's classes, and about those that it passes over.
        members = {**members, **{name: obj for name, obj in vars(collector.obj).items() if ours(obj)}}
        inside = {}
    else:
        inside = {
            name: [(inner, each) for inner, each in vars(obj).items() if ours(each)]
            for name, obj in list(vars(collector.obj).items())
            # No isinstance: a proxy that is bound to nothing may raise when asked for its class.
            if issubclass(type(obj), type) and obj.__module__ == collector.obj.__name__ and not _is_base(obj)
        }
    if not members and not inside and not ours(collector.obj):
        return
    collected = {name for node in report.result for name in (name_of(node), node.name.partition("[")[0])}
    found = [(name, obj) for name, obj in members.items() if name not in collected and not _is_base(obj)]
    found += [each for name, marked in inside.items() if name not in collected for each in marked]
    if not found and not report.result and ours(collector.obj) and not _is_base(collector.obj):
        found = [(collector.name, collector)]
    yield from found


def _is_base(obj: object) -> bool:
    """Whether classes are derived from this one: its marks reach the tests of those."""
    return isinstance(obj, type) and bool(type.__subclasses__(obj))


def _in_failed_module(
    collector: pytest.Module | pytest.Class, report: pytest.CollectReport
) -> Iterator[tuple[str, object]]:
    """Marked objects that are no tests in the module that could not be imported.

    `@pytest.mark.trt_parity(make_model)` marks `make_model` and then calls it with the test, which it mostly refuses:
    the module fails before anything in it is collected.
    """
    excinfo = getattr(getattr(report, "call", None), "excinfo", None)
    if excinfo is None or not isinstance(collector, pytest.Module):
        return
    frames = [entry.frame.f_globals for entry in excinfo.traceback if entry.frame.code.name == "<module>"]
    for name, value in list(frames[-1].items()) if frames else ():
        # A module may import more of itself when it is looked at.
        members = list(vars(value).items()) if issubclass(type(value), ModuleType) else [(name, value)]
        for found, obj in members:
            is_test = (
                collector.classnamefilter(found) if issubclass(type(obj), type) else collector.funcnamefilter(found)
            )
            if not is_test and ours(obj):
                yield found, obj


def refuse_decorator(collector: pytest.Module | pytest.Class, name: str, decorator: pytest.MarkDecorator) -> None:
    """Refuse a mark of ours that stands where a test should: `@trt_parity` was written without parentheses."""
    given = decorator.args[0] if decorator.args else None
    if getattr(given, "__name__", None) == name or collector.funcnamefilter(name) or collector.classnamefilter(name):
        raise collector.CollectError(said(name, decorator))


def said(name: str, obj: Any) -> str:
    """What is wrong with a mark of ours on `obj`, and what to write instead."""
    if isinstance(obj, pytest.MarkDecorator):
        return (
            f"{name} is a mark, not a test: {obj.name} took the test as its argument\n"
            f"  → write @{obj.name}(…) with parentheses, which may be empty, above a function made by def"
        )
    if isinstance(obj, (pytest.Module, pytest.Class)):
        return (
            f"{ours(obj.obj)[0].name} marks {name}, in which pytest finds no test, so nothing would be checked\n"
            "  → write test functions in it, or take the mark away"
        )
    mark = ours(obj)[0]
    if isinstance(obj, ModuleType):
        return (
            f"{mark.name} is in the pytestmark of {name}, which pytest does not read: it reaches no test\n"
            "  → set pytestmark in the test modules, or add the mark in pytest_collection_modifyitems"
        )
    where = _where(obj)
    if is_fixture(obj):
        return (
            f"{mark.name} marks the fixture {name}{where}, where it does nothing\n"
            "  → mark the tests that use the fixture, or call the fixture trt_check in them"
        )
    what = "class" if isinstance(obj, type) else "function"
    text = f"{mark.name} marks the {what} {name}{where}, which pytest does not collect as a test: nothing is checked\n"
    if not mark.args and not mark.kwargs:
        return (
            f"{text}  → @pytest.mark.{mark.name}({name}) decorates {name} itself: to check the model that it makes, "
            f"write @pytest.mark.{mark.name}(model={name}), or import {mark.name} from pytest_trtcheck"
        )
    return f"{text}  → mark a test function or a test class; pytest knows them by their names (test…, Test…)"


def _where(obj: Any) -> str:
    try:
        code = inspect.unwrap(getattr(obj, "__func__", obj)).__code__
    except (AttributeError, ValueError):
        return ""
    return f" ({code.co_filename.rpartition('/')[2]}:{code.co_firstlineno})"


# --- marks where the plugin is not loaded ----------------------------------------------------------------------------

_HOOKS = "pytest_trtcheck.plugin.hooks"
_WATCH = "trtcheck-unloaded"


def refuse_unloaded(name: str) -> None:
    """See that a mark which is made while the plugin is not loaded does not pass for a check.

    Where pytest imports a conftest.py or another plugin, ours may still come: then the marked tests are looked at.
    """
    # pytest knows its configuration while it runs; whoever else imports a test module wants no tests of it.
    if getattr(pytest.mark, "_config", None) is not None:
        pytest.fail(_unloaded(name), pytrace=False)
    frame = inspect.currentframe()
    while frame is not None:
        manager: Any = frame.f_locals.get("self")
        if issubclass(type(manager), pytest.PytestPluginManager):
            if not manager.hasplugin(_WATCH):
                manager.register(_Watch(), _WATCH)
            return
        frame = frame.f_back


class _Watch:
    """Fails marked tests where our plugin never came."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        hooks = sys.modules.get(_HOOKS)
        is_loaded = hooks is not None and item.config.pluginmanager.is_registered(hooks)
        if not is_loaded and is_marked(item):
            pytest.fail(_unloaded("a trt marker"), pytrace=False)


def _unloaded(what: str) -> str:
    return (
        f"{what}: the plugin pytest-trtcheck is not loaded, so that nothing would be checked\n"
        "  → install it into the Python that runs pytest, leave `-p no:trtcheck` out, and where "
        f"PYTEST_DISABLE_PLUGIN_AUTOLOAD is set, add `-p {_HOOKS}`"
    )
