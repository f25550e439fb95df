"""The systems under test, by name: what `backend=` and `--trt-backend` accept.

Each is imported when it is asked for.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from pytest_trtcheck.choices import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

    from pytest_trtcheck.backends.base import Backend

AUTO = "auto"
EMULATED = "onnxruntime"
GROUP = "pytest_trtcheck.backends"
"""The entry points by which other packages add theirs; a name of ours stays ours."""

_ALIASES = {"emulated": EMULATED}


def find_name(name: str) -> str | None:
    """The registered name that `name` is, `-` and `_` being the same in it; None where it is none."""
    if (own := _same(name, (*BACKENDS, *_ALIASES))) is not None:
        return _ALIASES.get(own, own)
    return _same(name, _added())


def names() -> tuple[str, ...]:
    """All that are registered."""
    return (*BACKENDS, *_added())


def load(name: str) -> type[Backend]:
    """The class that is registered by a name.

    Raises
    ------
    MissingDependencyError
        What another package registered cannot be imported.
    """
    from importlib.metadata import EntryPoint

    from pytest_trtcheck.errors import MissingDependencyError

    entry = EntryPoint(name, f"{__name__}.{BACKENDS[name]}", GROUP) if name in BACKENDS else _added()[name]
    try:
        found: type[Backend] = entry.load()
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"backend {name!r} ({entry.value}) cannot be imported: {error}", code="extension-failed"
        ) from error
    return found


def tensorrt_module(name: str | None) -> str | None:
    """The module of TensorRT that a record's backend is; None where it is another system."""
    return name if name in {"tensorrt", "tensorrt_rtx"} else None


def _added() -> dict[str, EntryPoint]:
    return _entry_points(tuple(sys.path))


@functools.cache  # Every marker that names one asks, and reading what is installed takes milliseconds.
def _entry_points(path: tuple[str, ...]) -> dict[str, EntryPoint]:  # noqa: ARG001 - it is read from there
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _same(name: str, known: Iterable[str]) -> str | None:
    return next((each for each in known if each.replace("-", "_") == name.replace("-", "_")), None)
