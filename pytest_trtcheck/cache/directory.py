"""The directory that the cache lives in: its layout, its locks, whether it is ours, and what is wrong with it.

A layout version is a directory of its own, so that two versions of the plugin can share one root.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import math
import os
import re
import shutil
import stat
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

from pytest_trtcheck.cache.claims import Claims
from pytest_trtcheck.errors import FULL, LARGER_FILES, MISREAD, CacheError, CachePlaceError, lacked_files, listed
from pytest_trtcheck.record.files import answers, append, open_regular, read_bytes
from pytest_trtcheck.record.held import ALMOST_NOTHING_BYTES, HeldFolder, locked, remove_leftovers, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

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

_UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}) | FULL
_MISTAKEN = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})

ANSWER_S = 60.0
"""The longest, in seconds, that the file system of a cache may take to answer: a network's may take for ever."""
_ANSWERED_S = 5.0

WEIGH_S = 3600.0
"""How long, in seconds, the processes go by what they noted, before one of them looks at every entry again."""
_MOST_TAG_BYTES, _MOST_WEIGHT_BYTES = 1 << 16, 1 << 26
_SCRATCH = "trtcheck-"
_RECALLED = 64
_DIGEST_CHARACTERS = 64


class CacheDir:
    """The paths below the root of a cache, and what may happen there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries = root / _LAYOUT / "entries"
        self.work = root / _LAYOUT / "work"
        self.claims = Claims(root / _LAYOUT / "used", root / _TAG)
        self.problem: str | None = None
        """Why something could not be kept here, once that is so."""
        self.hangs = False
        self._answered: float | None = None
        self._subjects = root / _LAYOUT / "subjects"
        self._weight = root / _LAYOUT / "weight"

    def is_ours(self) -> bool:
        """Whether the root carries our mark; False when it is missing or free to be taken.

        Raises
        ------
        CacheError
            When the root holds somebody else's files.
        """
        try:
            if _OWNER.encode() in read_bytes(self.root / _TAG, _MOST_TAG_BYTES):
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

    def exposed(self) -> str | None:
        """Who else may write into the cache, in words; None where nobody may, and where that is not known."""
        return None if self.hangs else exposed(self.root, self.entries)

    def _prepare(self) -> None:
        ours = self.is_ours()
        if not self.root.exists():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)  # an engine is code that runs here: nobody else writes any
        self.work.mkdir(parents=True, exist_ok=True)
        if not ours:
            with suppress(FileExistsError), (self.root / ".gitignore").open("x", encoding="utf-8") as file:
                file.write("*\n")
            with HeldFolder("", self.work) as work:
                (Path(work) / _TAG).write_text(_TAG_TEXT, encoding="utf-8")
                (Path(work) / _TAG).replace(self.root / _TAG)

    @contextmanager
    def locked(self, name: str, doing: str, waiting: AbstractContextManager[object] | None = None) -> Iterator[None]:
        """One process and one thread at a time, `waiting` if it is not their turn. What is missing is created."""
        path = self.work / f"{name}.lock"
        with ExitStack() as held:
            with self.guarded(doing):
                self._prepare()
                try:
                    with (waiting if path.exists() else None) or nullcontext():
                        held.enter_context(locked(path))
                except TimeoutError as error:
                    raise CacheError(
                        f"{doing} failed: {error}",
                        "see who holds it (fuser, lsof), or name another directory with --trt-cache-dir",
                    ) from None
            yield

    @contextmanager
    def working(self, doing: str) -> Iterator[Path]:
        """An empty directory on the file system of the entries, for the time being."""
        with self.guarded(doing):
            self.work.mkdir(exist_ok=True)  # what restores a cache in CI may leave empty directories out
            folder = HeldFolder("", self.work)
        with folder as name:
            yield Path(name)

    def remove_leftovers(self) -> None:
        """Remove unfinished work, trash and lock files of processes that died."""
        remove_leftovers(self.work.iterdir())

    def unfinished_bytes(self) -> int:
        """What lies here beside the entries: the work of the living, and of those who died a moment ago."""
        return sum(tree_bytes(path) for path in self.work.iterdir())

    def remember(self, kind: str, subject: str, digest: str) -> None:
        """Keep that there is an entry of this subject, for `recall`."""
        with suppress(OSError):
            self._subjects.mkdir(exist_ok=True)
            append(self._index(kind, subject), f"{digest}\n")

    def recall(self, kind: str, subject: str) -> list[Path]:
        """The entries of a subject that were made last; some may be gone."""
        try:
            with open_regular(self._index(kind, subject)) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _RECALLED * (_DIGEST_CHARACTERS + 1)))
                found = file.read().decode("ascii", errors="replace").split()
        except OSError:
            return []
        return [self.entries / kind / digest for digest in dict.fromkeys(found) if _DIGEST.fullmatch(digest)]

    def has(self, kind: str) -> bool:
        """Whether there is any entry of a kind."""
        with suppress(OSError), os.scandir(self.entries / kind) as found:
            return any(found)
        return False

    def _index(self, kind: str, subject: str) -> Path:
        return self._subjects / hashlib.sha256(f"{kind}\0{subject}".encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def weighed(self, total_bytes: int) -> None:
        """Note how much there is: somebody looked at every entry."""
        with suppress(OSError), replacing(self._weight) as part:
            part.write_text(f"{time.time():.0f}\n{total_bytes}\n", encoding="ascii")

    def grew(self, by_bytes: int) -> None:
        """Note that so much was added."""
        with suppress(OSError):
            append(self._weight, f"{by_bytes}\n")

    def weight_bytes(self) -> float:
        """How much there is, by what all processes noted; infinite where nobody looked at every entry for an hour."""
        with suppress(OSError, *MISREAD):
            then, *sizes = read_bytes(self._weight, _MOST_WEIGHT_BYTES).split()
            if abs(time.time() - int(then)) < WEIGH_S:
                return float(sum(map(int, sizes)))
        return math.inf

    def directories(self, kind: str | None = None) -> Iterator[Path]:
        """Every entry's directory, of one kind or of all."""
        return (path for path in self.entries.glob(f"{kind or '*'}/*") if _DIGEST.fullmatch(path.name))

    @contextmanager
    def guarded(self, doing: str, others_work: Path | None = None) -> Iterator[None]:
        """Whatever the operating system refuses inside becomes a `CacheError` that says what was being done.

        Where others write below `others_work`, their errors pass as they are, unless our place is to blame. Too many
        open files are nobody's fault here.
        """
        try:
            yield
        except OSError as error:
            if lacked_files(error) or (others_work is not None and not self._is_to_blame(error, others_work)):
                raise
            raise self._error(error, doing) from error

    def require_answer(self) -> None:
        """See that the file system answers, unless it did within the last seconds; it may block the kernel for ever.

        Raises
        ------
        CachePlaceError
            It does not, and is not asked again.
        """
        if self._answered is not None and time.monotonic() - self._answered < _ANSWERED_S:
            return
        if self.hangs or not answers(self.root / _TAG, ANSWER_S):
            self.hangs = True
            raise CachePlaceError(
                f"the cache directory {self.root} does not answer: its file system took more than {ANSWER_S:g} s",
                "see whether its server is up, or name another directory with --trt-cache-dir",
            )
        self._answered = time.monotonic()

    def _is_to_blame(self, error: OSError, directory: Path) -> bool:
        if isinstance(error.filename, (str, bytes)):
            return error.errno in _UNWRITABLE and Path(os.fsdecode(error.filename)).is_relative_to(directory)
        return error.errno == errno.EFBIG or self._is_full(error)

    def _is_full(self, error: OSError) -> bool:
        # A failed write names no file, and numpy's does not even have an errno.
        return error.errno in FULL or (error.errno is None and self._free_bytes() < ALMOST_NOTHING_BYTES)

    def _free_bytes(self) -> int:
        with suppress(OSError):
            return shutil.disk_usage(self.root).free
        return 0

    def _free(self) -> str:
        free = self._free_bytes()
        if free > ALMOST_NOTHING_BYTES and hasattr(os, "statvfs"):
            with suppress(OSError):
                if not os.statvfs(self.root).f_favail:
                    return f"{format_bytes(free)} free, and not one inode: no more files fit"
        return f"{format_bytes(free)} free"

    def _error(self, error: OSError, doing: str) -> CacheError:
        why = f"{doing} failed: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        hint = "name another directory with --trt-cache-dir"
        if error.errno == errno.EFBIG:
            hint = f"{LARGER_FILES}, or {hint}"
        if self._is_full(error):
            state = f"is full ({self._free()})"
            hint = f"free some space, empty the cache with --trt-cache-clear, or {hint}"
        else:
            state = "cannot be written" if error.errno in _UNWRITABLE else "cannot be used"
        # What is no directory, or a name too long, was meant to be something else: nobody guesses what.
        kind = CacheError if error.errno in _MISTAKEN else CachePlaceError
        return kind(f"the cache directory {self.root} {state}: {why}", hint)


def exposed(*places: Path) -> str | None:
    """Who else may write into one of these folders, each of which lies in the one before, in words; None: nobody."""
    if not hasattr(os, "geteuid"):
        return None
    for place in places:
        try:
            status = place.stat()
        except OSError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            return None  # no folder to write into, which is told where it is used
        if status.st_uid not in {os.geteuid(), 0}:
            return f"{place} belongs to another account (uid {status.st_uid})"
        others = 0o007 if _is_own_group(status.st_gid) else 0o077
        if status.st_mode & others & 0o022:
            return f"{place} can be written by others (mode {status.st_mode & 0o777:04o})"
        if not status.st_mode & others & 0o011:
            return None  # nobody else gets any further
    return None


def _is_own_group(gid: int) -> bool:
    """Whether a group is the private one that many systems give every account, which is why they let it write."""
    if sys.platform == "win32":
        return False
    import grp
    import pwd

    try:
        group, own = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == own.pw_gid and group.gr_name == own.pw_name and set(group.gr_mem) <= {own.pw_name}


def scratch_folder(name: str) -> HeldFolder:
    """A temporary directory outside of any cache. What processes that were killed left of theirs is removed."""
    remove_scratch()
    return HeldFolder(f"{_SCRATCH}{name}-")


def _uid() -> int | None:
    found: int | None = getattr(os, "getuid", lambda: None)()
    return found


@functools.cache
def remove_scratch() -> None:
    """Remove the temporary directories of processes that died, once in a process."""
    own = _uid()
    for path in Path(gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            if own in {None, path.lstat().st_uid}:
                remove_leftovers([path])


def tree_bytes(path: Path) -> int:
    """The sizes of all files in a directory, or that of a file; 0 where it is gone."""
    with suppress(FileNotFoundError):
        if not path.is_dir():
            return path.lstat().st_size
        return sum(Path(folder, name).lstat().st_size for folder, _, names in os.walk(path) for name in names)
    return 0


_COUNTABLE_TIB = 1e6


def format_bytes(count: float) -> str:
    """A size for people: "12.3 MiB"."""
    size = float(min(count, 1e300))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.95:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count:g} B"
        size /= 1024
    return f"{size:.1f} TiB" if size < _COUNTABLE_TIB else f"{size:.1e} TiB"


def user_folder() -> Path:
    """Where the cache lies unless somebody says otherwise: where the system keeps an account's caches."""
    # Not by platformdirs: it comes with a pytest plugin, which would be loaded in every run of whoever installs this.
    if sys.platform == "win32":
        found = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local", _OWNER, "Cache")
    elif sys.platform == "darwin":
        found = Path("~/Library/Caches", _OWNER)
    else:
        # A relative one is to be ignored (XDG base directory specification).
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        found = Path(given if given.is_absolute() else "~/.cache", _OWNER)
    with suppress(RuntimeError):
        found = found.expanduser()
    # A container's nameless user has no home.
    return found if found.is_absolute() else Path(gettempdir(), f"pytest-trtcheck-{_uid()}")
