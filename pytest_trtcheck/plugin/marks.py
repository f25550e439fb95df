"""What the plugin asks of pytest's nodes: which of our marks reach a test, and which stand where they do nothing.

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
    from collections.abc import Iterator

RUN: pytest.StashKey[int] = pytest.StashKey()
"""Which run of its test this is, from 1 on: pytest-rerunfailures and flaky run a test again."""
RUNS = "trtcheck.runs"
"""The property that says of a test which was run again how often it ran."""

_SEEN: pytest.StashKey[list[tuple[str, object]]] = pytest.StashKey()


# --- which marks reach a test ----------------------------------------------------------------------------------------


def ours(marks: object) -> list[pytest.Mark]:
    """Our marks in a `pytestmark`, which is one mark or a list of them."""
    listed = marks if isinstance(marks, (list, tuple)) else [marks]
    unpacked = (getattr(mark, "mark", mark) for mark in listed)
    return [mark for mark in unpacked if isinstance(mark, pytest.Mark) and mark.name in MARKERS]


def is_marked(node: pytest.Item | pytest.Collector) -> bool:
    """Whether any of our marks reaches `node`."""
    # Asked several times of every test of every suite: a look at the marks comes before the question whom they reach.
    at: pytest.Item | pytest.Collector | None = node
    while at is not None:
        for mark in at.own_markers:
            if mark.name in MARKERS:
                return next(_reaching(node), None) is not None
        at = at.parent
    return False


def closest(item: pytest.Item | pytest.Collector, name: str) -> list[pytest.Mark]:
    """The marks of this name at the node closest to the test, function before class before module.

    They are several where a name was given twice in one place. Of a class and its bases the class itself is closest.
    """
    for node in _reaching(item):
        found = [mark for mark in node.own_markers if mark.name == name]
        if found and isinstance(node, pytest.Class):
            # Those of the bases come first; what stands on the class itself may stand there twice.
            direct = [mark for mark in ours(vars(node.obj).get("pytestmark", [])) if mark.name == name]
            return direct if found[-1:] == direct[-1:] else found[-1:]
        if found:
            return found
    return []


def _reaching(node: pytest.Item | pytest.Collector) -> Iterator[pytest.Item | pytest.Collector]:
    """The nodes with marks of ours from `node` upwards, those that reach it alone."""
    below: pytest.Item | pytest.Collector | None = None
    at: pytest.Item | pytest.Collector | None = node
    while at is not None:
        for mark in at.own_markers:
            if mark.name in MARKERS:
                if below is None or not isinstance(at, pytest.Module) or not is_imported(at, _name(below)):
                    yield at
                break
        below, at = at, at.parent


def _name(node: pytest.Item | pytest.Collector) -> str:
    return getattr(node, "originalname", None) or node.name


def is_imported(module: pytest.Module, name: str) -> bool:
    """Whether what the module calls `name` was defined in another module: its own marks are not meant for that.

    Something that another module's decorator wrapped is no part of that other module, and counts as defined here.
    """
    obj = vars(module.obj).get(name)
    home = getattr(obj, "__module__", None)
    if obj is None or home is None or home == module.obj.__name__:
        return False
    return getattr(sys.modules.get(home), getattr(obj, "__qualname__", ""), None) is obj


# --- marks that do nothing -------------------------------------------------------------------------------------------


def note(collector: pytest.Collector, name: str, obj: object) -> None:
    """Remember that a mark of ours stands on `obj`, until it is known what pytest makes of it."""
    collector.stash.setdefault(_SEEN, []).append((name, obj))


def in_vain(collector: pytest.Collector, report: pytest.CollectReport) -> str | None:
    """What to say of marks in `collector` that no test carries; None where each has its test."""
    if report.outcome == "failed":
        return "\n".join(said(*each) for each in _in_failed_module(collector, report)) or None
    if report.outcome != "passed" or not isinstance(collector, (pytest.Module, pytest.Class)):
        return None
    seen = [*collector.stash.get(_SEEN, ()), *_in_classes(collector, report)]
    texts = [
        said(name, obj)
        for name, obj in seen
        if not any(_name(node) == name or node.name.startswith(f"{name}[") for node in report.result)
        and not _is_base(obj)
    ]
    if not report.result and (marks := ours(collector.own_markers)) and not texts and not _is_base(collector.obj):
        texts.append(
            f"{marks[0].name} marks {collector.name}, in which pytest finds no test, so nothing would be checked\n"
            "  → write test functions in it, or take the mark away"
        )
    return "\n".join(texts) or None


def _is_base(obj: object) -> bool:
    """Whether classes are derived from this one: its marks reach the tests of those."""
    return isinstance(obj, type) and bool(obj.__subclasses__())


def is_test_case(cls: object) -> bool:
    """Whether a class is one of unittest's, whose methods unittest runs by itself."""
    unittest = sys.modules.get("unittest")
    return unittest is not None and isinstance(cls, type) and issubclass(cls, unittest.TestCase)


def _in_classes(collector: pytest.Module | pytest.Class, report: pytest.CollectReport) -> Iterator[tuple[str, object]]:
    """Marked members of classes that pytest does not ask our hook about: unittest's, and those that it passes over."""
    classes: list[type] = []
    if isinstance(collector, pytest.Class):
        if not report.result or is_test_case(collector.obj):
            classes.append(collector.obj)
    else:
        collected = {node.name for node in report.result}
        for name, obj in vars(collector.obj).items():
            if isinstance(obj, type) and obj.__module__ == collector.obj.__name__ and name not in collected:
                classes.append(obj)
    for each in classes:
        if not _is_base(each):
            yield from ((name, member) for name, member in vars(each).items() if _marks_of(member))


def _marks_of(obj: object) -> list[pytest.Mark]:
    return ours(pytestmark(getattr(obj, "__func__", obj) if isinstance(obj, (staticmethod, classmethod)) else obj))


def pytestmark(obj: object) -> object:
    """The `pytestmark` of anything that stands in a module; None where there is none, or where asking does harm."""
    if obj is pytest.mark:  # makes a mark of whatever it is asked for
        return None
    try:
        return getattr(obj, "pytestmark", None)
    except Exception:  # Proxies of web frameworks raise what they like.
        return None


def _in_failed_module(collector: pytest.Collector, report: pytest.CollectReport) -> Iterator[tuple[str, object]]:
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
        members = list(vars(value).items()) if isinstance(value, ModuleType) else [(name, value)]
        for found, obj in members:
            is_test = collector.classnamefilter(found) if isinstance(obj, type) else collector.funcnamefilter(found)
            if not is_test and _marks_of(obj):
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
    mark = _marks_of(obj)[0]
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


# --- a test that is run again ----------------------------------------------------------------------------------------


def begin_run(item: pytest.Item) -> None:
    """Count the runs of a test; what an earlier run reported is not what this one will."""
    run = item.stash.get(RUN, 0) + 1
    item.stash[RUN] = run
    if run > 1 and any(is_our_property(name) for name, _ in item.user_properties):
        item.user_properties[:] = [each for each in item.user_properties if not is_our_property(each[0])]
        item.user_properties.append((RUNS, str(run)))


def is_our_property(name: object) -> bool:
    """Whether a user property of a test was put there by a check."""
    return name == "trtcheck" or str(name).startswith("trtcheck.")
