"""One process at a time uses a GPU, so that nobody's measurement is disturbed by our own other workers.

A container with a /tmp of its own does not see the lock: mount the directory into both, or rely on the load of other
processes that is recorded with each measurement.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import GpuError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Not the temporary directory of the process: TMPDIR differs between users and jobs, and then nobody would meet.
_SHARED = Path("/tmp")  # noqa: S108 - the lock file holds nothing
TIMEOUT_S = 600.0
"""How long to wait for others: longer than a measurement may take."""
_POLL_S = 0.02
_TRIES = 100


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
    place = directory or (_SHARED if _SHARED.is_dir() else Path(tempfile.gettempdir()))
    path = place / f"pytest-trtcheck-{re.sub(r'[^A-Za-z0-9.-]', '_', gpu)}.lock"
    try:
        release = _held(path, timeout_s)
    except TimeoutError as error:
        raise GpuError(
            f"another process held the GPU or server {gpu} for {timeout_s:g} s",
            f"see who holds {path}, and run the tests again",
            code="gpu-busy",
        ) from error
    except OSError as error:
        raise GpuError(f"the lock file {path} cannot be used: {error.strerror or error}", code="gpu-busy") from error
    try:
        yield
    finally:
        release()


def _held(path: Path, timeout_s: float) -> Callable[[], object]:
    """Hold a lock file of whichever account, and return what lets go of it; a TimeoutError after `timeout_s`.

    filelock refuses a file of another account in a directory such as /tmp, since its owner may put another there.
    That would disturb a measurement, and nothing else: nothing is written here, a file that was replaced is noticed
    once it is held, and all accounts of the machine have to meet.
    """
    if sys.platform == "win32":
        from filelock import FileLock

        lock = FileLock(path, timeout=timeout_s)  # its Timeout is a TimeoutError
        lock.acquire()
        return lock.release
    import fcntl

    end = time.monotonic() + timeout_s
    while True:
        descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return functools.partial(os.close, descriptor)
        except (BlockingIOError, FileNotFoundError):
            if time.monotonic() >= end:
                os.close(descriptor)
                raise TimeoutError from None
            time.sleep(_POLL_S)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(path: Path) -> int:
    """The file, open for reading: that is enough to lock it, and any account may."""
    if sys.platform == "win32":
        raise NotImplementedError
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with suppress(FileExistsError):
            # Not with O_CREAT alone, which Linux refuses for a file of another account there.
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.fchmod(descriptor, 0o644)  # whatever the umask
            return descriptor
    raise FileNotFoundError(errno.ENOENT, "it comes and goes", str(path))
