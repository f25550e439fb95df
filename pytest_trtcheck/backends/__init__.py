"""The systems under test, by name: what `backend=` and `--trt-backend` accept.

Every pytest run imports this, so a system itself is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_trtcheck.errors import ArgumentError, MissingDependencyError, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

    from pytest_trtcheck.backends.base import Backend

AUTO = "auto"
GROUP = "pytest_trtcheck.backends"
"""The entry points by which other packages add theirs; a name of ours stays ours."""

_OWN = {
    AUTO: "pytest_trtcheck.backends.tensorrt.backend:Auto",
    "tensorrt": "pytest_trtcheck.backends.tensorrt.backend:TensorRT",
    "tensorrt_rtx": "pytest_trtcheck.backends.tensorrt.backend:TensorRTRtx",
    "onnxruntime": "pytest_trtcheck.backends.emulated:Emulated",
}
_ALIASES = {"emulated": "onnxruntime"}
NAMES = tuple(_OWN)


def find_name(name: str) -> str:
    """The registered name that `name` is, `-` and `_` being the same in it.

    Raises
    ------
    ArgumentError
        Nothing is registered by that name.
    """
    if (own := _same(name, (*_OWN, *_ALIASES))) is not None:
        return _ALIASES.get(own, own)
    added = _added()
    if (found := _same(name, added)) is not None:
        return found
    known = (*NAMES, *added)
    raise ArgumentError(f"{name!r} is none of {', '.join(known)}", suggestion(name, known))


def load(name: str) -> type[Backend]:
    """The class that is registered by a name.

    Raises
    ------
    ArgumentError
        As `find_name`.
    MissingDependencyError
        What another package registered cannot be imported.
    """
    from importlib.metadata import EntryPoint

    name = find_name(name)
    entry = EntryPoint(name, _OWN[name], GROUP) if name in _OWN else _added()[name]
    try:
        found: type[Backend] = entry.load()
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(f"backend {name!r} ({entry.value}) cannot be imported: {error}") from error
    return found


def tensorrt_module(name: str | None) -> str | None:
    """The module of TensorRT that a record's backend is; None where it is another system."""
    return name if name in {"tensorrt", "tensorrt_rtx"} else None


def _added() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _same(name: str, known: Iterable[str]) -> str | None:
    return next((each for each in known if each.replace("-", "_") == name.replace("-", "_")), None)
