"""What may be taken of the machine's memory for what a file or a shape merely claims to need."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from contextlib import suppress
from pathlib import Path

from pytest_trtcheck.cache import format_bytes
from pytest_trtcheck.errors import InputError

_SHARE = 4
"""A quarter: where a check begins with so much, its reference, engine and comparison take as much again each."""
_GIVEN_BACK_BYTES = 1 << 20
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def total_bytes() -> int:
    """The memory of this machine, or of the container that this process runs in."""
    if sys.platform == "win32" and hasattr(ctypes, "windll"):
        # MEMORYSTATUSEX: two 32-bit numbers, then seven of 64 bits, of which the first is all of the memory.
        status = (ctypes.c_uint64 * 8)()
        status[0] = ctypes.sizeof(status)
        return int(status[1]) if ctypes.windll.kernel32.GlobalMemoryStatusEx(status) else sys.maxsize
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [sys.maxsize]
    for limit in _CGROUPS:
        with suppress(OSError, ValueError):  # "max": there is none
            found.append(int(Path(limit).read_text(encoding="ascii")))
    return min(found)


def give_back() -> None:
    """Let this process give large allocations back to the system as soon as they are freed.

    The C library of most Linux systems learns from the first such ones that are freed to keep later ones: ONNX Runtime
    then holds a model that is one file up to twice.
    """
    m_mmap_threshold = -3
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library has no such thing
            ctypes.CDLL(None).mallopt(m_mmap_threshold, _GIVEN_BACK_BYTES)


def limit_bytes() -> int:
    """The most that may be generated for a check, or read from a file of arrays."""
    return total_bytes() // _SHARE


def too_large(size_bytes: int) -> str | None:
    """What is said of arrays of this size where they are beyond the limit; None where they are not."""
    limit = limit_bytes()
    if size_bytes <= limit:
        return None
    return f"{format_bytes(size_bytes)}, of which this machine's memory admits {format_bytes(limit)} (a quarter of it)"


def refuse(size_bytes: int, what: str, hint: str) -> None:
    """Refuse what would take more than the limit.

    Raises
    ------
    InputError
        It would.
    """
    if said := too_large(size_bytes):
        raise InputError(f"{what} take {said}", hint, code="out-of-memory")
