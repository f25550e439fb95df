"""NVML, opened for as long as it is needed, with what a driver cannot tell read as None."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


def scaled(value: float | None, factor: float) -> float | None:
    """`value` in another unit; None stays None."""
    return None if value is None else value * factor


def first(*readers: Callable[[], Any]) -> Any:
    """The first reading that is there."""
    for reader in readers:
        if (value := reader()) is not None:
            return value
    return None
