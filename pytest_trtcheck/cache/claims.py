"""Which entries the processes that live are using, so that no other process removes them.

Each process keeps a list of them in a file that it holds a lock on: whoever gets that lock knows that it is dead.
Windows, which has no such lock, refuses to remove what is open instead.
"""

from __future__ import annotations

import os
import sys
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from pytest_trtcheck.record.files import open_regular, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_MOST_BYTES = 1 << 26


class Claims:
    """What this process and others use of the entries in a cache.

    Parameters
    ----------
    folder
        Where the lists are.
    tag
        The file that says that the cache is ours: nothing is written where it is missing.
    """

    def __init__(self, folder: Path, tag: Path) -> None:
        self._folder, self._tag = folder, tag
        self._descriptor: int | None = None
        self._pid = 0

    def add(self, entry: Path) -> None:
        """Note that this process uses an entry from now on. Where nothing can be written, nothing is removed either."""
        if sys.platform == "win32":
            return
        with suppress(OSError):
            if self._descriptor is None or self._pid != os.getpid():
                self._descriptor, self._pid = self._list(), os.getpid()
            os.write(self._descriptor, f"{_name(entry)}\n".encode())

    def _list(self) -> int:
        if sys.platform == "win32":
            raise NotImplementedError
        import fcntl

        self._tag.stat()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{_process()}-{uuid4().hex}"
        descriptor = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks
            os.close(descriptor)
            path.with_suffix(".new").unlink()
            raise
        # Only now, since one without a lock is a dead process's.
        path.with_suffix(".new").rename(path)
        weakref.finalize(self, _let_go, descriptor, path, os.getpid())
        self._remove_leftovers()
        return descriptor

    def is_claimed(self, entry: Path) -> bool:
        """Whether another process uses an entry."""
        return _name(entry) in self._of_others()

    def _remove_leftovers(self) -> None:
        """Remove the lists of this machine's processes that died: they pile up where nobody evicts."""
        with suppress(OSError):
            for _ in self._living(_node()):
                pass

    def _of_others(self) -> set[str]:
        """All that other processes use; what dead ones left is removed."""
        return {name for path in self._living() for name in _names(path)}

    def _living(self, prefix: str = "") -> Iterator[Path]:
        if sys.platform == "win32" or not self._folder.is_dir():
            return
        import fcntl

        for path in self._folder.iterdir():
            if path.name.startswith(f"{_process()}-") or path.suffix or not path.name.startswith(prefix):
                continue
            try:
                file = open_regular(path)
            except OSError:  # gone, or none of ours
                continue
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    path.unlink()
                except OSError:
                    yield path


def _names(path: Path) -> list[str]:
    try:
        return read_bytes(path, _MOST_BYTES).decode(errors="replace").split()
    except OSError:  # no file of ours
        return []


def _name(entry: Path) -> str:
    return f"{entry.parent.name}/{entry.name}"


def _process() -> str:
    if sys.platform == "win32":
        raise NotImplementedError
    return f"{_node()}{os.getpid()}"


def _node() -> str:
    if sys.platform == "win32":
        raise NotImplementedError
    return f"{os.uname().nodename.partition('.')[0]}-"


def _let_go(descriptor: int, path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
