"""Locks between processes, and who is alive.

`flock` locks belong to an open file and end with it, however its process ends, and in containers too: no process ids to
guess from, no times to compare. They are taken directly and not through filelock, because a lock file here must be
removable while others wait for it, waiting must not poll, and a warm lookup must not pay for filelock's import (30 ms).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_trtcheck.cache.place import Place


class FileLock:
    """An exclusive lock on a path, held from `acquire` to `release` or to the end of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; False when another holds it and `wait` is False."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if is_at(fd, self._path):
                    self._fd, fd = fd, -1
                    return True
                # The holder we waited for removed the file: this lock guards no name any more.
            except BlockingIOError:
                return False
            finally:
                if fd >= 0:
                    os.close(fd)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; `remove` the file as well, which is safe as those who wait look again."""
        if remove:
            with suppress(OSError):
                self._path.unlink()
        fd, self._fd = self._fd, -1
        os.close(fd)

    def detach(self) -> int:
        """The open file that holds the lock, for the caller to keep and close."""
        fd, self._fd = self._fd, -1
        return fd


def is_at(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


@contextmanager
def gate(place: Place) -> Iterator[None]:
    """The one lock of the whole cache, for short steps: nothing is evicted while another registers its use.

    It cannot be taken twice by one process.
    """
    lock = FileLock(place.gate)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Session:
    """One process's presence: a locked file that lists the entries it uses, which are then never evicted.

    Create it inside the `gate`. The session ends with `close`, with the object, or with the process.
    """

    def __init__(self, place: Place) -> None:
        self.pid = os.getpid()
        self.name = f"{self.pid}-{os.urandom(6).hex()}"
        self.used: set[str] = set()
        self._path = place.sessions / self.name
        self._place = place
        self._counter = itertools.count(1)
        lock = FileLock(self._path)
        lock.acquire()
        self._fd = lock.detach()
        self.close = weakref.finalize(self, _end, self._fd, self._path, self.pid)

    def is_live(self) -> bool:
        """Whether this session still protects: not after a fork, nor when the cache was deleted under it."""
        return self.pid == os.getpid() and self.close.alive and is_at(self._fd, self._path)

    def use(self, entry: Path) -> None:
        """Put an entry under protection; inside the `gate`."""
        name = entry_name(entry)
        if name not in self.used:
            os.write(self._fd, f"{name}\n".encode())
            self.used.add(name)

    def new_path(self) -> Path:
        """A path for work in progress that is cleaned up after this process, should it die."""
        return self._place.work / f"{self.name}.{next(self._counter)}"


def entry_name(entry: Path) -> str:
    """How sessions call an entry: kind/digest."""
    return f"{entry.parent.name}/{entry.name}"


def living_sessions(place: Place) -> dict[str, set[str]]:
    """The entries in use by each process that lives, by session; what the dead left is removed. Inside the `gate`."""
    living: dict[str, set[str]] = {}
    for path in list(place.sessions.iterdir()):
        lock = FileLock(path)
        if lock.acquire(wait=False):
            lock.release(remove=True)
            continue
        with suppress(FileNotFoundError):
            living[path.name] = set(path.read_text(encoding="ascii", errors="replace").split())
    return living


def remove_stale_locks(place: Place) -> None:
    """Remove the lock files of processes that died while they held one."""
    for path in list(place.locks.iterdir()):
        lock = FileLock(path)
        with suppress(OSError):
            if lock.acquire(wait=False):
                lock.release(remove=True)


def _end(fd: int, path: Path, pid: int) -> None:
    # A forked child holds a copy of the open file; the session is its parent's to end.
    if os.getpid() == pid:
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        os.close(fd)
