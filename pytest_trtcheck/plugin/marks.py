"""Which of our marks reach a test, and which stand where they do nothing.

Asked of every test of every suite, so it imports nothing but pytest.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.choices import MARKERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_IS_MARKED: pytest.StashKey[bool] = pytest.StashKey()
_SEEN: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
_MEMBERS: pytest.StashKey[Sequence[pytest.Item | pytest.Collector]] = pytest.StashKey()


def ours(obj: Any) -> list[pytest.Mark]:
    """Our marks on anything that stands in a module or class."""
    if type(obj) in {staticmethod, classmethod}:
        obj = obj.__func__
    if obj is pytest.mark:  # makes a mark of whatever it is asked for
        return []
    try:
        marks = getattr(obj, "pytestmark", None)
    except Exception:  # Proxies of web frameworks raise what they like.
        return []
    return [] if marks is None else _ours_among(marks)


def _ours_among(marks: object) -> list[pytest.Mark]:
    listed: Sequence[Any] = marks if isinstance(marks, (list, tuple)) else [marks]
    # By their types: what has every attribute that it is asked for (`torch.classes`) is no mark.
    unpacked = (mark.mark if issubclass(type(mark), pytest.MarkDecorator) else mark for mark in listed)
    return [mark for mark in unpacked if issubclass(type(mark), pytest.Mark) and mark.name in MARKERS]


# --- which marks reach a test ----------------------------------------------------------------------------------------


def is_marked(node: pytest.Item | pytest.Collector) -> bool:
    """Whether any of our marks reaches `node`."""
    # Asked several times of every test of every suite: a look for marks comes before the question whom they reach.
    at: pytest.Item | pytest.Collector | None = node
    while at is not None:
        if at.own_markers:
            return next(_reaching(node), None) is not None
        at = at.parent
    return False


def closest(item: pytest.Item, name: str) -> list[pytest.Mark]:
    """The marks of this name at the node closest to the test, function before class before module.

    They are several where a name was given twice in one place. Of a class and its bases the class itself is closest.
    """
    return _closest(item, name)[1]


def _closest(item: pytest.Item, name: str) -> tuple[pytest.Item | pytest.Collector, list[pytest.Mark]]:
    for node in _reaching(item):
        found = [mark for mark in node.own_markers if mark.name == name]
        if found and isinstance(node, pytest.Class):
            by_class = [_ours_among(vars(each).get("pytestmark", ())) for each in node.obj.__mro__]
            written = [[mark for mark in each if mark.name == name] for each in by_class]
            # What stands on no class, a hook added to the node.
            added = [mark for mark in found if not any(mark is one for each in written for one in each)]
            return node, added or next(filter(None, written))
        if found:
            return node, found
    return item, []


def _reaching(node: pytest.Item | pytest.Collector) -> Iterator[pytest.Item | pytest.Collector]:
    """The nodes with marks of ours from `node` upwards, those that reach it alone."""
    below: pytest.Item | pytest.Collector | None = None
    at: pytest.Item | pytest.Collector | None = node
    while at is not None:
        ours_here = at.own_markers and any(mark.name in MARKERS for mark in at.own_markers)
        if ours_here and not (below and isinstance(at, pytest.Module) and _is_imported(at, _name(below))):
            yield at
        below, at = at, at.parent


def _name(node: pytest.Item | pytest.Collector) -> str:
    return getattr(node, "originalname", None) or node.name


def _is_imported(module: pytest.Module, name: str) -> bool:
    """Whether what the module calls `name` was defined in another module: its own marks are not meant for that.

    Something that another module's decorator wrapped is no part of that other module, and counts as defined here.
    """
    obj = vars(module.obj).get(name)
    home = getattr(obj, "__module__", None)
    if obj is None or home is None or home == module.obj.__name__:
        return False
    return getattr(sys.modules.get(home), getattr(obj, "__qualname__", ""), None) is obj


def tests_of(item: pytest.Item, mark: pytest.Mark) -> list[pytest.Item] | None:
    """The tests that a mark of `item` reaches, whether they were selected or not.

    Those of its function, class or module: where it stands. None where pytest did not look at all of them, for a test
    was named that is elsewhere.
    """
    node, _ = _closest(item, mark.name)
    scope = item.parent if node is item else node
    assert isinstance(scope, pytest.Collector)
    found = list(_members(scope))
    if node is item:
        # One object may be the mark of several functions.
        found = [each for each in found if each is not None and _name(each) == _name(item)]
    elif None in found:
        return None
    return [each for each in found if each and any(mark is one for one in closest(each, mark.name))] or [item]


def _members(collector: pytest.Collector) -> Iterator[pytest.Item | None]:
    """The tests in a module or class; None for what pytest did not look into."""
    for node in collector.stash.get(_MEMBERS, (None,)):
        if isinstance(node, pytest.Collector):
            yield from _members(node)
        else:
            yield node


def reach(collector: pytest.Module | pytest.Class, name: str) -> bool:
    """Whether marks of ours on `collector` or above it reach its member `name`, which is no test yet."""
    # Worked out once for the many members: marks may be added to a collector only later.
    known = collector.stash.get(_IS_MARKED, None)
    if known is None:
        known = collector.stash[_IS_MARKED] = is_marked(collector)
    return known and not (isinstance(collector, pytest.Module) and _is_imported(collector, name))


# --- marks that do nothing -------------------------------------------------------------------------------------------


def keep(collector: pytest.Collector, report: pytest.CollectReport) -> None:
    """Remember what is in a module or class with marks of ours, before tests are selected from it."""
    if isinstance(collector, (pytest.Module, pytest.Class)) and (_SEEN in collector.stash or is_marked(collector)):
        collector.stash[_MEMBERS] = report.result


def note(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Remember a member with marks of ours, until it is known what pytest makes of it."""
    collector.stash.setdefault(_SEEN, {})[name] = obj


def in_vain(collector: pytest.Collector, report: pytest.CollectReport) -> str | None:
    """What to say of marks in `collector` that no test carries; None where each has its test."""
    if report.outcome == "skipped" or not isinstance(collector, (pytest.Module, pytest.Class)):
        return None
    find = _in_failed_module if report.outcome == "failed" else _without_test
    return "\n".join(said(*each) for each in find(collector, report)) or None


def _without_test(
    collector: pytest.Module | pytest.Class, report: pytest.CollectReport
) -> Iterator[tuple[str, object]]:
    """Marked members of a module or class of which pytest made no test; the collector itself where it is empty."""
    members: dict[str, Any] = collector.stash.get(_SEEN, {})
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
    collected = {name for node in report.result for name in (_name(node), node.name.partition("[")[0])}
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


def replaces_a_test(collector: pytest.Module | pytest.Class, name: str, decorator: pytest.MarkDecorator) -> bool:
    """Whether a mark of ours stands where a test should: `@trt_parity` was written without parentheses."""
    if decorator.name not in MARKERS:
        return False
    given = decorator.args[0] if decorator.args else None
    return getattr(given, "__name__", None) == name or collector.funcnamefilter(name) or collector.classnamefilter(name)


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


def is_fixture(obj: object) -> bool:
    """Whether an object is a fixture, by the attributes that pytest 8 and 9 give it."""
    return hasattr(obj, "_pytestfixturefunction") or hasattr(obj, "_fixture_function_marker")


def _where(obj: Any) -> str:
    try:
        code = inspect.unwrap(getattr(obj, "__func__", obj)).__code__
    except (AttributeError, ValueError):
        return ""
    return f" ({code.co_filename.rpartition('/')[2]}:{code.co_firstlineno})"
