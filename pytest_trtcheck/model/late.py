"""Modules that others import and seldom use, loaded when they are used."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import LazyLoader
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_SAFE = (3, 12, 2)
"""Before it, a second thread could see a module of `LazyLoader` that is half loaded (CPython's gh-114763)."""


@contextmanager
def loaded_when_used(*names: str) -> Iterator[None]:
    """Within this, importing one of the modules `names` puts off loading it until something of it is used."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None, /) -> ModuleSpec | None:
            spec = PathFinder.find_spec(name, path, target) if name in names else None
            if spec is not None and spec.loader is not None:
                spec.loader = LazyLoader(spec.loader)
            return spec

    if sys.version_info < _SAFE:
        yield
        return
    sys.meta_path.insert(0, Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)
