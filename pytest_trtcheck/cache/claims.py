"""Which entries the processes that live are using, so that no other process removes them.

Each process keeps a list of them in a file that it holds: whoever gets its lock knows that it is dead. Windows, which
has no such lock, refuses to remove what is open instead.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from pytest_trtcheck.record.files import append, read_bytes
from pytest_trtcheck.record.held import HeldFile, remove_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MOST_BYTES = 1 << 26
_TOKEN = uuid4().hex[:12]


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
        self._list: HeldFile | None = None
        self._pid = 0

    def add(self, entry: Path) -> None:
        """Note that this process uses an entry from now on. Where nothing can be written, nothing is removed either."""
        if sys.platform == "win32":
            return
        with suppress(OSError):
            if self._list is None or self._pid != os.getpid():
                self._list, self._pid = self._started(), os.getpid()
            if self._list.is_locked:
                append(self._list.name, f"{_name(entry)}\n")

    def _started(self) -> HeldFile:
        self._tag.stat()
        self._folder.mkdir(exist_ok=True)
        found = HeldFile(self._folder, _process())
        if not found.is_locked:  # a file system without locks: nobody could tell it from a dead process's
            found.cleanup()
        remove_leftovers(self._folder.iterdir())  # they pile up where nobody evicts
        return found

    def is_claimed(self, entry: Path) -> bool:
        """Whether another process uses an entry."""
        return any(_name(entry) in _names(path) for path in self._of_others())

    def _of_others(self) -> Iterator[Path]:
        """The lists of other processes; those of dead ones are removed."""
        if sys.platform == "win32" or not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            if _process() not in path.name:
                remove_leftovers([path], of_any_machine=True)
                if path.exists():
                    yield path


def _process() -> str:
    """What stands in the names of this process's lists: containers of one name have processes of one number."""
    return f"{os.getpid()}-{_TOKEN}-"


def _names(path: Path) -> list[str]:
    try:
        return read_bytes(path, _MOST_BYTES).decode(errors="replace").split()
    except OSError:  # no file of ours
        return []


def _name(entry: Path) -> str:
    return f"{entry.parent.name}/{entry.name}"
