"""pytest alone: options, markers, fixtures, hooks. No domain logic.

pytest rewrites the `assert` statements of whatever a plugin's distribution installs. That makes a module slow to load,
and the first run after an installation parses each anew: half a second for a single check. No module of ours is a test:
Python loads them as it loads any other.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _AsTheyAre:
    """Finds our modules, ahead of the import hook that rewrites."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, path, target) if fullname.startswith("pytest_trtcheck.") else None


@contextmanager
def as_they_are() -> Iterator[None]:
    """Load our modules as Python loads any other; runs within runs have one such finder each."""
    sys.meta_path.insert(0, _AsTheyAre)
    try:
        yield
    finally:
        if _AsTheyAre in sys.meta_path:  # else whoever ran pytest within has put back what was there
            sys.meta_path.remove(_AsTheyAre)


_CLOCKS = {"monotonic": time.monotonic, "perf_counter": time.perf_counter}


def now_s() -> float:
    """The time by a clock that no test stops or sets, in seconds."""
    return _CLOCKS["perf_counter"]()


@contextmanager
def running_clocks() -> Iterator[None]:
    """Have the clocks run that say how long something may take: where a test stopped them (freezegun), it would never
    be over.
    """
    stopped = {name: getattr(time, name) for name in _CLOCKS}
    vars(time).update(_CLOCKS)
    try:
        yield
    finally:
        # What a function of the user's did meanwhile, stays.
        vars(time).update({name: each for name, each in stopped.items() if getattr(time, name) is _CLOCKS[name]})
