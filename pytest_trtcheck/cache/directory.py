"""The directory that the cache lives in: its layout, its locks, whether it is ours, and what is wrong with it.

A layout version is a directory of its own, so that two versions of the plugin can share one root.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import CacheError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

_LAYOUT = "v1"
_TAG = "CACHEDIR.TAG"
_OWNER = "pytest-trtcheck"
_TAG_TEXT = f"""Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache written by {_OWNER}. It can be deleted at any time.
# See https://bford.info/cachedir/
"""
# What a directory may hold and still be free for us: left by file systems, version control and our own first steps.
_NOBODYS = frozenset({"lost+found", ".gitkeep", ".gitignore", ".DS_Store", _TAG, _LAYOUT})
_DIGEST = re.compile(r"[0-9a-f]{64}")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}) | _FULL
_ALMOST_NOTHING_BYTES = 1 << 20

LEFTOVER_S = 86400.0
"""Unfinished work that is older than this, in seconds, was left by a process that died."""


class CacheDir:
    """The paths below the root of a cache, and what may happen there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries = root / _LAYOUT / "entries"
        self.work = root / _LAYOUT / "work"

    def is_ours(self) -> bool:
        """Whether the root carries our mark; False when it is missing or free to be taken.

        Raises
        ------
        CacheError
            When the root holds somebody else's files.
        """
        try:
            if _OWNER in (self.root / _TAG).read_text(encoding="utf-8", errors="replace"):
                return True
        except FileNotFoundError:
            if not self.root.exists():
                return False
        foreign = sorted({path.name for path in self.root.iterdir()} - _NOBODYS)
        if not foreign:
            return False
        raise CacheError(
            f"{self.root} is not a cache of {_OWNER}: it holds {listed(map(repr, foreign), 1)}",
            f"name an empty or a new directory with --trt-cache-dir, such as {self.root / 'trtcheck'}",
        )

    def _prepare(self) -> None:
        ours = self.is_ours()
        self.work.mkdir(parents=True, exist_ok=True)
        if not ours:
            with suppress(FileExistsError), (self.root / ".gitignore").open("x", encoding="utf-8") as file:
                file.write("*\n")
            with TemporaryDirectory(dir=self.work) as work:
                (Path(work) / _TAG).write_text(_TAG_TEXT, encoding="utf-8")
                (Path(work) / _TAG).replace(self.root / _TAG)

    @contextmanager
    def locked(self, name: str, doing: str) -> Iterator[None]:
        """One process and one thread at a time. What is missing of the cache is created.

        The holder removes the lock file, so that they do not pile up. Those who wait look for the file again each time.
        (Windows deletes no open file: there filelock does it, once it has let go of it.)
        """
        from filelock import FileLock

        path = self.work / f"{name}.lock"
        lock = FileLock(path, mode=0o666)
        with self.guarded(doing):
            self._prepare()
            lock.acquire()
        try:
            with suppress(OSError):  # what a killed process left would look like a leftover while it is held again
                path.touch()
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            lock.release()

    @contextmanager
    def working(self, doing: str) -> Iterator[Path]:
        """An empty directory on the file system of the entries, for the time being."""
        with self.guarded(doing):
            self.work.mkdir(exist_ok=True)  # what restores a cache in CI may leave empty directories out
            folder = TemporaryDirectory(dir=self.work, ignore_cleanup_errors=True)
        with folder as name:
            yield Path(name)

    def remove_leftovers(self) -> None:
        """Remove unfinished work, trash and lock files of processes that died."""
        for path in self.work.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.lstat().st_mtime > LEFTOVER_S:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def directories(self, kind: str | None = None) -> Iterator[Path]:
        """Every entry's directory, of one kind or of all."""
        return (path for path in self.entries.glob(f"{kind or '*'}/*") if _DIGEST.fullmatch(path.name))

    @contextmanager
    def guarded(self, doing: str, others_work: Path | None = None) -> Iterator[None]:
        """Whatever the operating system refuses inside becomes a `CacheError` that says what was being done.

        Where others write below `others_work`, their errors pass as they are, unless our place is to blame.
        """
        try:
            yield
        except OSError as error:
            if others_work is not None and not self._is_to_blame(error, others_work):
                raise
            raise self._error(error, doing) from error

    def _is_to_blame(self, error: OSError, directory: Path) -> bool:
        if isinstance(error.filename, (str, bytes)):
            return error.errno in _UNWRITABLE and Path(os.fsdecode(error.filename)).is_relative_to(directory)
        return error.errno == errno.EFBIG or self._is_full(error)

    def _is_full(self, error: OSError) -> bool:
        # A failed write names no file, and numpy's does not even have an errno.
        return error.errno in _FULL or (error.errno is None and self._free_bytes() < _ALMOST_NOTHING_BYTES)

    def _free_bytes(self) -> int:
        with suppress(OSError):
            return shutil.disk_usage(self.root).free
        return 0

    def _error(self, error: OSError, doing: str) -> CacheError:
        why = f"{doing} failed: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        hint = "name another directory with --trt-cache-dir"
        if self._is_full(error):
            state = f"is full ({format_bytes(self._free_bytes())} free)"
            hint = f"free some space, empty the cache with --trt-cache-clear, or {hint}"
        else:
            state = "cannot be written" if error.errno in _UNWRITABLE else "cannot be used"
        return CacheError(f"the cache directory {self.root} {state}: {why}", hint)


def format_bytes(count: float) -> str:
    """A size for people: "12.3 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.95:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count:g} B"
        size /= 1024
    return f"{size:.1f} TiB"


def user_folder() -> Path:
    """Where the cache lies unless somebody says otherwise."""
    import platformdirs

    try:
        found = Path(platformdirs.user_cache_dir("pytest-trtcheck"))
    except RuntimeError:
        found = Path("~")
    # A container's nameless user has no home, of which older releases of platformdirs make a path as well.
    return found if found.is_absolute() else Path(gettempdir(), f"pytest-trtcheck-{os.getuid()}")
