"""Which tests are ours: those that our marks reach, and those that use our fixtures.

Asked of every test of every suite, so it imports nothing but pytest.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.choices import MARKERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

RUN = frozenset({"trt_check", "trt_build", "trt_engine", "trt_benchmark"})
"""Fixtures that run a backend."""
FOR_GPU = RUN | {"trt_gpu"}
"""Fixtures that depend on the GPU."""
_TAKES_EXAMPLES = frozenset({"trt_check", "trt_build"})
OVERRIDABLE = ("trt_model", "trt_inputs", "trt_calibration", "trt_build_options")
"""What a marked test needs beyond its own arguments; a user overrides them in a conftest or test module."""
_PYTESTMARK = "pytestmark"
_IS_MARKED: pytest.StashKey[bool] = pytest.StashKey()
SEEN: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
"""The members of a module or class that have marks of ours."""
UNCOLLECTED: pytest.StashKey[list[pytest.CollectReport]] = pytest.StashKey()
"""On the session: the reports of what could not be collected, and may hold tests that nobody knows of."""
COLLECTED: pytest.StashKey[Sequence[pytest.Item]] = pytest.StashKey()
"""On the session: all tests, before some of them were selected."""
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
        if ours_here and not (below and isinstance(at, pytest.Module) and _is_imported(at, name_of(below))):
            yield at
        below, at = at, at.parent


def conftests(module: pytest.Module) -> Iterator[ModuleType]:
    """The conftest.py files beside a module and in the folders above it, the nearest first."""
    manager = module.config.pluginmanager
    # By the names that pytest registers them under.
    found = (manager.get_plugin(str(folder / "conftest.py")) for folder in module.path.parents)
    return (each for each in found if each is not None)


def unread(module: pytest.Module) -> list[ModuleType]:
    """The conftest.py files and packages above a module whose `pytestmark` has marks of ours: pytest reads none."""
    names = str(getattr(module.obj, "__package__", None) or "").split(".")
    packages = (sys.modules.get(".".join(names[: index + 1])) for index in range(len(names)))
    own = ours(module.obj)
    return [
        each
        for each in (*conftests(module), *packages)
        # What the module imports from there reaches its tests.
        if each and each is not module.obj and not all(any(mark is one for one in own) for mark in ours(each))
    ]


def misspelled(collector: pytest.Module | pytest.Class) -> dict[str, object]:
    """What is called nearly `pytestmark` in a module or class, and holds marks of ours that reach nothing."""
    own = ours(collector.obj)
    return {
        name: obj
        for name, obj in list(vars(collector.obj).items())
        if name.lower().replace("_", "").rstrip("s") == _PYTESTMARK and name != _PYTESTMARK
        if not all(any(mark is one for one in own) for mark in _ours_among(obj))
    }


def name_of(node: pytest.Item | pytest.Collector) -> str:
    """What a test, or several of one function, are called in their module or class."""
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
        found = [each for each in found if each is not None and name_of(each) == name_of(item)]
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


def let_override(obj: Any) -> None:
    """Let a test function use the fixtures that a user overrides, as if it named them."""
    function = obj.__func__ if isinstance(obj, (staticmethod, classmethod)) else obj
    if inspect.isfunction(function) and not is_fixture(function):
        pytest.mark.usefixtures(*OVERRIDABLE)(function)


def keep(collector: pytest.Collector, report: pytest.CollectReport) -> None:
    """Remember what is in a module or class with marks of ours, before tests are selected from it; and what failed."""
    if report.outcome == "failed":
        collector.session.stash.setdefault(UNCOLLECTED, []).append(report)
    if isinstance(collector, (pytest.Module, pytest.Class)) and (SEEN in collector.stash or is_marked(collector)):
        collector.stash[_MEMBERS] = report.result


def note(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Remember a member with marks of ours, until it is known what pytest makes of it."""
    collector.stash.setdefault(SEEN, {})[name] = obj


def may_do_nothing(collector: pytest.Collector) -> bool:
    """Whether marks of ours may stand in what was collected and carry no test; `misplaced` knows which."""
    if not isinstance(collector, pytest.Module):
        return isinstance(collector, pytest.Class)
    # Those on functions were noted; the members of a class are not asked about where pytest passes over it.
    has_classes = any(issubclass(type(obj), type) for obj in list(vars(collector.obj).values()))
    is_marked_itself = SEEN in collector.stash or bool(ours(collector.obj))
    return has_classes or is_marked_itself or bool(unread(collector)) or bool(misspelled(collector))


# --- tests that check something --------------------------------------------------------------------------------------


def runs_a_backend(item: pytest.Item) -> bool:
    """Whether an item checks something or runs an engine: a marked test, a model, a bundle, one with our fixtures."""
    return uses(item, RUN) or getattr(item, "is_check", False) or is_marked(item)


def uses(test: pytest.Item | pytest.Metafunc, fixtures: frozenset[str]) -> bool:
    """Whether a test asks for any of these fixtures, itself or by another one."""
    return not fixtures.isdisjoint(getattr(test, "fixturenames", ()))


def has_examples(item: pytest.Function) -> bool:
    """Whether Hypothesis runs the test many times, and it checks by our fixtures."""
    return bool(getattr(item.obj, "is_hypothesis_test", False)) and uses(item, _TAKES_EXAMPLES)


def is_fixture(obj: object) -> bool:
    """Whether an object is a fixture, by the attributes that pytest 8 and 9 give it."""
    return hasattr(obj, "_pytestfixturefunction") or hasattr(obj, "_fixture_function_marker")
