"""NVML, opened for as long as it is needed, with what a driver cannot tell read as None."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class NvmlUnavailableError(Exception):
    """NVML cannot be used here; the message is the reason, fit to be shown."""


@contextmanager
def nvml() -> Iterator[Any]:
    """NVML's module, initialized; shut down at the end (NVML counts its users).

    Raises
    ------
    NvmlUnavailableError
        Without nvidia-ml-py, driver or GPU.
    """
    try:
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        raise NvmlUnavailableError("nvidia-ml-py is not installed (pip install pytest-trtcheck[cuda])") from None
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        raise NvmlUnavailableError(f"no NVIDIA driver answers: {error}") from None
    try:
        yield library
    finally:
        read(library, "nvmlShutdown")


def read(library: Any, function: str, *arguments: Any) -> Any:
    """What an NVML function returns; None where this driver, GPU or library version cannot tell."""
    try:
        value = getattr(library, function)(*arguments)
    except (library.NVMLError, AttributeError):
        # Every field is optional: a Jetson, a MIG slice or a GeForce lacks some, and an older pynvml lacks functions.
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def devices(library: Any) -> list[Any]:
    """The handles of the GPUs that NVML lists, in the order of the PCI bus."""
    count = read(library, "nvmlDeviceGetCount") or 0
    return [handle for i in range(count) if (handle := read(library, "nvmlDeviceGetHandleByIndex", i)) is not None]


def slices(library: Any, handle: Any) -> list[Any] | None:
    """The handles of a GPU's MIG slices; None where it is not in MIG mode."""
    mode = read(library, "nvmlDeviceGetMigMode", handle)
    if not mode or mode[0] != 1:
        return None
    places = range(read(library, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
    found = (read(library, "nvmlDeviceGetMigDeviceHandleByIndex", handle, place) for place in places)
    return [slice_ for slice_ in found if slice_ is not None]


def find(library: Any, uuid: str | None) -> Any:
    """The handle of a GPU or MIG slice; None where NVML lists no such one.

    It is looked for among those listed: a Jetson's NVML does not find by UUID what it lists. One GPU alone that tells
    no UUID is the one.
    """
    wholes = devices(library)
    handles = [*wholes, *(slice_ for whole in wholes for slice_ in slices(library, whole) or ())]
    for handle in handles:
        if uuid is not None and same_uuid(uuid, read(library, "nvmlDeviceGetUUID", handle)):
            return handle
    alone = len(handles) == 1 and not (uuid and read(library, "nvmlDeviceGetUUID", handles[0]))
    return handles[0] if alone else None


def same_uuid(one: str | None, other: str | None) -> bool:
    """Whether two texts are one UUID: with or without "GPU-" or "MIG-", hyphens, and in either case."""
    first, second = (bare_uuid(text) for text in (one, other))
    return bool(first) and first == second


def bare_uuid(text: str | None) -> str:
    """A UUID's digits alone."""
    return (text or "").strip().upper().removeprefix("GPU-").removeprefix("MIG-").replace("-", "").lower()


def scaled(value: float | None, factor: float) -> float | None:
    """`value` in another unit; None stays None."""
    return None if value is None else value * factor
