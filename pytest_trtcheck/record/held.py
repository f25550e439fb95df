"""Locks, and what is there while somebody works: neither outlives the process that it belongs to, however that ends.

Where a system has no file locks (Windows, some network folders), a day without a change says that nobody is left.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import warnings
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pytest_trtcheck.errors import FULL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LOCKED_S = 7200.0
"""The longest, in seconds, that anybody waits for another process."""
LEFTOVER_S = 86400.0
"""Unfinished work that is older than this, in seconds, was left by a process that died."""
ALMOST_NOTHING_BYTES = 1 << 20
"""A place with less room, in bytes, is full."""
_TRIES = 100


def _mark() -> str:
    """What stands in the name of all that processes of this machine hold: others can't look at their locks."""
    if sys.platform == "win32":
        return "held--"
    return f"held-{os.uname().nodename.partition('.')[0]}-"


def _hold(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """What `make` makes, and a descriptor that holds it; None where there are no locks.

    Until it is held, it looks like a leftover: where somebody takes it for one, another is made.
    """
    for _ in range(_TRIES):
        path = make()
        if sys.platform == "win32":
            return path, None
        import fcntl

        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return path, descriptor
            except (BlockingIOError, FileNotFoundError):
                pass
            except OSError:
                os.close(descriptor)
                return path, None
            os.close(descriptor)
    raise OSError(f"{path} was removed {_TRIES} times by other processes")


class _Held:
    """Something temporary; `remove_leftovers` of another process removes what a killed one left of its own."""

    def __init__(self, make: Callable[[], Path]) -> None:
        made, descriptor = _hold(make)
        self.name = str(made)
        self.is_locked = descriptor is not None
        self.cleanup = weakref.finalize(self, _end, made, descriptor, os.getpid())

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        # A failed write names no file (numpy's not even what went wrong), and nobody could tell which place is full.
        if isinstance(error, OSError) and error.filename is None and error.errno in {None, *FULL} and self._is_full():
            error.errno, error.strerror = errno.ENOSPC, os.strerror(errno.ENOSPC)
            error.filename = self.name
        self.cleanup()

    def _is_full(self) -> bool:
        with suppress(OSError):
            return shutil.disk_usage(self.name).free < ALMOST_NOTHING_BYTES
        return False


class HeldFolder(_Held):
    """A temporary directory."""

    def __init__(self, prefix: str, folder: Path | None = None) -> None:
        super().__init__(lambda: Path(mkdtemp(prefix=f"{prefix}{_mark()}", dir=folder)))


class HeldFile(_Held):
    """An empty file in `folder`, with `part` in its name; it says that its process lives."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__(lambda: _touched(folder / f"{_mark()}{part}{uuid4().hex}"))


def _touched(path: Path) -> Path:
    path.touch(exist_ok=False)
    return path


def _end(path: Path, descriptor: int | None, pid: int) -> None:
    if os.getpid() == pid:  # a fork has it too, and ends before
        with suppress(OSError):
            _remove(path)
    _close(descriptor)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes its place at the end, unless something is raised.

    Whoever reads `path` finds the old file or the new one. What killed processes left of theirs is removed.
    """
    start = f".{path.name[:100]}."
    remove_leftovers(each for each in path.parent.glob(".*.tmp") if each.name.startswith(start))

    temporary, descriptor = _hold(lambda: _touched(path.with_name(f"{start}{_mark()}{uuid4().hex[:12]}.tmp")))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        # Windows removes nothing that is open, and holds nothing.
        temporary.unlink(missing_ok=True)
        _close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`: one process and one thread at a time.

    The holder removes the file, so that they do not pile up. Those who wait look for it again each time. (Windows
    deletes no open file: there filelock does it, once it has let go of it.)

    Raises
    ------
    TimeoutError
        Another process held it for two hours.
    OSError
        It cannot be used.
    """
    lock = _file_lock(path, LOCKED_S)
    with _quiet():
        try:
            lock.acquire()
        except TimeoutError:
            raise TimeoutError(f"another process held {path} for {LOCKED_S / 3600:g} h") from None
    try:
        with suppress(OSError):  # what a killed process left would look like a leftover while it is held again
            path.touch()
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def _file_lock(path: Path, seconds: float) -> Any:
    from filelock import FileLock

    return FileLock(path, timeout=seconds, mode=0o666)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Where a file system has no flock, filelock warns and goes on in another way.
        warnings.filterwarnings("ignore", "flock not supported")
        yield


def remove_leftovers(paths: Iterable[Path], *, of_any_machine: bool = False) -> None:
    """Remove the files, folders and locks among `paths` that belong to no process any more.

    Those of another machine go after a day, unless its locks can be seen here.
    """
    for path in paths:
        is_ours = of_any_machine or path.suffix == ".lock" or _mark() in path.name
        if not is_ours or not (_remove_lock if path.suffix == ".lock" else _remove_held)(path):
            _remove_old(path)


def _remove_lock(path: Path) -> bool:
    try:
        with _quiet(), _file_lock(path, 0):
            path.unlink()
    except OSError:  # it is held, for one
        return False
    return True


def _remove_held(path: Path) -> bool:
    """Remove what a process of this machine held, if it has ended; whether that could be found out."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        descriptor = _opened(path)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        pass
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _opened(path: Path) -> int:
    if sys.platform == "win32":
        raise NotImplementedError
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | flags)  # NFS locks nothing that is open for reading alone
    except (IsADirectoryError, PermissionError):
        return os.open(path, os.O_RDONLY | flags)


def _remove_old(path: Path) -> None:
    """Remove what was left alone for a day; its time may lie in the future, where a clock was wrong."""
    with suppress(OSError):
        if abs(time.time() - path.lstat().st_mtime) > LEFTOVER_S:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
