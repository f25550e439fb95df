"""One process at a time uses a GPU, so that nobody's measurement is disturbed by our own other workers.

A container with a /tmp of its own does not see the lock: mount the directory into both, or rely on the load of other
processes that is recorded with each measurement.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import GpuError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Not the temporary directory of the process: TMPDIR differs between users and jobs, and then nobody would meet.
_SHARED = Path("/tmp")  # noqa: S108 - the lock file holds nothing
TIMEOUT_S = 600.0
"""How long to wait for others: longer than a measurement may take."""


@contextmanager
def gpu_lock(gpu: str, timeout_s: float = TIMEOUT_S, *, directory: Path | None = None) -> Iterator[None]:
    """Hold a GPU alone, to run or measure on it.

    Parameters
    ----------
    gpu
        The GPU's UUID (`Gpu.lock_name`), or what a server is called (`Backend.lock_name`).
    timeout_s
        The most seconds to wait.
    directory
        Where the lock file is; every process that shall take part needs the same one.

    Raises
    ------
    GpuError
        Others held the GPU all that time, or the lock file can't be used.
    """
    from filelock import FileLock, Timeout

    place = directory or (_SHARED if _SHARED.is_dir() else Path(tempfile.gettempdir()))
    path = place / f"pytest-trtcheck-{re.sub(r'[^A-Za-z0-9.-]', '_', gpu)}.lock"
    # Writable for all, since the next user of this machine must be able to take it.
    lock = FileLock(path, timeout=timeout_s, mode=0o666)
    try:
        lock.acquire()
    except Timeout as error:
        raise GpuError(
            f"another process held the GPU or server {gpu} for {timeout_s:g} s",
            f"see who holds {path}, and run the tests again",
        ) from error
    except OSError as error:
        raise GpuError(f"the lock file {path} cannot be used: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
