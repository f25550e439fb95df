"""The directory that the cache lives in: its layout, whether it is ours, and what is wrong with it in the user's words.

A layout version is a directory of its own, so that two versions of the plugin can share one root.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TAG = "CACHEDIR.TAG"
_OWNER = "pytest-trtcheck"
_TAG_TEXT = f"""Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache written by {_OWNER}. It can be deleted at any time.
# See https://bford.info/cachedir/
"""
# What a directory may hold and still be free for us: left by file systems, version control and our own first steps.
_NOBODYS = re.compile(r"lost\+found|\.gitkeep|\.gitignore|\.DS_Store|CACHEDIR\.TAG|\.CACHEDIR\.TAG\..*|\.nfs.*")
_DIGEST = re.compile(r"[0-9a-f]{64}")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM}) | _FULL
"""What the operating system answers where nothing can be written: an entry that is there can still be read."""

_ALMOST_NOTHING_BYTES = 1 << 20
_CLEAR_HINT = "free some space, empty the cache with --trt-cache-clear, or name another directory with --trt-cache-dir"
_OTHER_HINT = "name a directory that can be written with --trt-cache-dir"


class Place:
    """The paths below the root of a cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        top = root / "v1"
        self.entries = top / "entries"
        self.locks = top / "locks"
        self.sessions = top / "sessions"
        self.work = top / "tmp"
        self.gate = top / "gate"

    def prepare(self) -> None:
        """Create what is missing of the cache; nothing is written into a directory that is not ours.

        Raises
        ------
        CacheError
            When the root holds somebody else's files.
        OSError
            When the directory cannot be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.is_ours():
            with suppress(FileExistsError), (self.root / ".gitignore").open("x", encoding="utf-8") as file:
                file.write("*\n")
            half = self.root / f".{_TAG}.{os.getpid()}-{os.urandom(4).hex()}"
            try:
                half.write_text(_TAG_TEXT, encoding="utf-8")
                half.replace(self.root / _TAG)
            finally:
                half.unlink(missing_ok=True)
        for path in (self.entries, self.locks, self.sessions, self.work):
            path.mkdir(parents=True, exist_ok=True)

    def is_ours(self) -> bool:
        """Whether the root carries our mark; False when it is missing or free to be taken.

        Raises
        ------
        CacheError
            When the root holds somebody else's files.
        """
        if self._is_marked():
            return True
        foreign = [name for name in _names(self.root) if not _NOBODYS.fullmatch(name)]
        if not foreign:
            return False
        # Another process may have put its mark, and entries, there since we looked for it.
        if self._is_marked():
            return True
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CacheError(
            f"{self.root} is not a cache of {_OWNER}: it holds {foreign[0]!r}{others}",
            f"name an empty or a new directory with --trt-cache-dir, such as {self.root / 'trtcheck'}",
        )

    def _is_marked(self) -> bool:
        try:
            return _OWNER in (self.root / _TAG).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return False

    def directories(self, kind: str | None = None) -> Iterator[Path]:
        """Every entry's directory, of one kind or of all."""
        for name in _names(self.entries):
            if kind in {None, name} and (self.entries / name).is_dir():
                for digest in _names(self.entries / name):
                    if _DIGEST.fullmatch(digest):
                        yield self.entries / name / digest

    def free_bytes(self) -> int | None:
        """What can still be written, in bytes; None when nobody knows."""
        with suppress(OSError):
            return shutil.disk_usage(self.root).free
        return None

    def _is_full(self) -> bool:
        free = self.free_bytes()
        return free is not None and free < _ALMOST_NOTHING_BYTES

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """Whatever the operating system refuses inside becomes a `CacheError` that says what was being done."""
        try:
            yield
        except OSError as error:
            raise self.error(error, doing) from error

    def error(self, error: OSError, doing: str) -> CacheError:
        """`error` in the user's words: which directory, what is wrong with it, what to do."""
        why = f"{doing} failed: {error.strerror or error}"
        for path in (self.root, *self.root.parents):
            if os.path.exists(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112 - Path's raise where forbidden
                return CacheError(
                    f"the cache directory {self.root} cannot be used: {path} is a file, not a directory",
                    "name a directory with --trt-cache-dir",
                )
        if error.errno == errno.EFBIG:
            return CacheError(
                f"the cache directory {self.root} cannot take a file so large: {why}",
                "raise the limit on file sizes (ulimit -f), or name another directory with --trt-cache-dir",
            )
        if error.errno in _FULL or (error.errno is None and self._is_full()):
            free = self.free_bytes()
            left = "" if free is None else f" ({format_bytes(free)} free)"
            return CacheError(f"the cache directory {self.root} is full{left}: {why}", _CLEAR_HINT)
        if error.errno in UNWRITABLE:
            where = "" if error.filename in {None, str(self.root)} else f" ({error.filename})"
            return CacheError(f"the cache directory {self.root} cannot be written: {why}{where}", _OTHER_HINT)
        if error.errno in _NO_LOCKS:
            return CacheError(
                f"the cache directory {self.root} is on a file system without file locks: {why}",
                "name a directory on a local disk with --trt-cache-dir",
            )
        where = "" if error.filename is None else f" ({error.filename})"
        return CacheError(f"the cache directory {self.root} cannot be used: {why}{where}", _OTHER_HINT)

    def is_at_fault(self, error: OSError, directory: Path) -> bool:
        """Whether `error`, raised while others wrote below `directory`, is about our place and not about theirs."""
        if isinstance(error.filename, (str, bytes)):
            return Path(os.fsdecode(error.filename)).is_relative_to(directory) and error.errno in UNWRITABLE
        # A failed write names no file, and numpy's does not even have an errno.
        return error.errno in _FULL or (error.errno is None and self._is_full())


def format_bytes(count: int) -> str:
    """A size for people: "12.3 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.95:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.1f} TiB"


def _names(directory: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return sorted(path.name for path in directory.iterdir())
    return []
