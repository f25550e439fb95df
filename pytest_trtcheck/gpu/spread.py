"""Which GPU a test process uses where there are several: pytest-xdist's workers are dealt out over them.

A process is bound to its GPU by CUDA_VISIBLE_DEVICES, which every library and process that it starts keeps to. CUDA
reads that once, when it is initialized, so it has to be set before.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.gpu.cuda_query import DRIVER
from pytest_trtcheck.gpu.device import detect, identity_parts, is_named, visible_gpus
from pytest_trtcheck.gpu.nvml import same_uuid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.gpu.table import GpuModel

_NOT_INITIALIZED = 3
"""Source: cuda.h, CUDA_ERROR_NOT_INITIALIZED."""


@dataclass(frozen=True)
class Place:
    """Where a process is to run.

    Parameters
    ----------
    visible
        What CUDA_VISIBLE_DEVICES must be; None: it stays as it is.
    note
        What records should say of the choice.
    """

    visible: str | None = None
    note: str | None = None


def place(
    worker: int | None,
    requested: GpuModel | None = None,
    extra: Sequence[GpuModel] = (),
    environ: Mapping[str, str] = os.environ,
) -> Place:
    """The GPU of a process: of the workers of one run each has the next one, and begins anew behind the last.

    GPUs of several kinds are not mixed, since a verdict must not depend on the worker that a test came to: those are
    used that `requested` names, without it those that are as the one that CUDA uses first.

    Parameters
    ----------
    worker
        The worker's number, from 0 on; None: there are no workers, and only a GPU that CUDA does not use first, and
        that alone is named by `requested`, changes anything.
    """
    found = [gpu for gpu in visible_gpus(extra, environ) if gpu.uuid]
    usable = [gpu for gpu in found if requested is None or is_named(requested, gpu)]
    if len(found) < 2 or not usable or (worker is None and requested is None):
        return Place()
    # Where all are alike, it does not matter which of them CUDA counts first.
    alike = len(usable) == len(found) and len({_kind(gpu) for gpu in found}) == 1
    own = usable[0] if alike else _first_of(usable, detect(extra, environ).gpu)
    if own is None if requested is None else (own is not None and worker is None):
        return Place()
    usable = [gpu for gpu in usable if _kind(gpu) == _kind(own or usable[0])]
    if is_initialized():
        return Place(note=_too_late(len(usable)) if len(usable) > 1 else None)
    return Place(usable[(worker or 0) % len(usable)].uuid)


def _first_of(usable: Sequence[Gpu], first: Gpu | None) -> Gpu | None:
    return next((gpu for gpu in usable if first is not None and same_uuid(gpu.uuid, first.uuid)), None)


def _kind(gpu: Gpu) -> str:
    return repr(identity_parts(gpu))


def _too_late(count: int) -> str:
    return (
        f"of {count} GPUs this worker uses the first: CUDA was initialized in it before it could choose "
        "(torch.cuda.is_available() in a test module does that); with an option such as --trt-require-gpu on the "
        "command line it chooses before the modules are imported"
    )


def is_initialized() -> bool:
    """Whether CUDA is initialized in this process, found out without initializing it."""
    try:
        if sys.platform == "win32":
            handle = ctypes.windll.kernel32.GetModuleHandleW(DRIVER)
            cuda = ctypes.CDLL(DRIVER, handle=handle) if handle else None
        else:
            cuda = ctypes.CDLL(DRIVER, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    return cuda is not None and bool(cuda.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED)
