"""The cache: look up, make once, protect what is in use, evict what was not used for longest."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.cache.hashing import Stamp, settled, stamp
from pytest_trtcheck.cache.key import Key, describe_change, differing_parts
from pytest_trtcheck.cache.listing import LAST_USE, StoredEntry, stored_entry, table
from pytest_trtcheck.cache.locks import FileLock, Session, entry_name, gate, living_sessions, remove_stale_locks
from pytest_trtcheck.cache.manifest import (
    FILES,
    DamagedError,
    Manifest,
    describe_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from pytest_trtcheck.cache.place import UNWRITABLE, Place
from pytest_trtcheck.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Callable

_EXTRA = "extra"
_EXTRA_NAME = re.compile(r"\w[\w.-]*")
_CRC_BYTES = 4


@dataclass(frozen=True)
class Entry:
    """A directory in the cache. It stays where it is for as long as this process lives.

    `path` holds the files as they were made; nothing may be changed there. `cached` is False where this very call made
    it, and then `miss_reason` says why. `make_s` is what making took at the time, in seconds.
    """

    path: Path
    key: Key
    cached: bool
    miss_reason: str | None
    make_s: float
    _cache: Cache = field(repr=False, compare=False)

    def write_extra(self, name: str, data: bytes) -> None:
        """Attach or replace a file beside the entry's own, atomically: something learned later, such as a JIT cache.

        It does not touch the entry's validity. Nothing is attached to an entry that was cleared in the meantime.

        Raises
        ------
        CacheError
            When the cache directory cannot be written.
        """
        self._cache._write_extra(self, name, data)

    def read_extra(self, name: str) -> bytes | None:
        """What was attached last under `name`; None where there is nothing, or where it is damaged."""
        try:
            content = _extra_path(self, name).read_bytes()
        except OSError:
            return None
        crc, data = content[:_CRC_BYTES], content[_CRC_BYTES:]
        return data if crc == zlib.crc32(data).to_bytes(_CRC_BYTES, "big") else None


@dataclass(frozen=True)
class Cleared:
    """What clearing did: entries and bytes removed, and entries kept because another living process uses them."""

    entries: int
    bytes: int
    in_use: int


class Cache:
    """A content-addressed store of directories below `root`, for any number of processes and threads.

    Nothing is created before the first entry is made.

    Parameters
    ----------
    root
        A directory that is ours, empty, or not there yet.
    max_bytes
        The size limit; None: no limit. Entries in use by living processes stay, even beyond it.
    """

    def __init__(self, root: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        self.root = Path(root).absolute()
        self.max_bytes = max_bytes
        self._place = Place(self.root)
        self._mutex = threading.RLock()
        self._session: Session | None = None
        self._verified: dict[str, tuple[Manifest, dict[Path, Stamp]]] = {}

    def get(self, key: Key) -> Entry | None:
        """The entry of `key`, whole and checked; None where there is none or a damaged one.

        Raises
        ------
        CacheError
            When the cache directory cannot be read.
        """
        return self._find(key)[0]

    def get_or_make(self, key: Key, make: Callable[[Path], object]) -> Entry:
        """The entry of `key`; `make` fills the empty directory it is given when there is none.

        One process makes, all others that want the same entry wait for it. Whatever `make` raises is passed on, and
        nothing stays behind.

        Raises
        ------
        CacheError
            When the cache directory cannot be used, or became full while `make` wrote.
        """
        entry, _ = self._find(key)
        if entry is not None:
            return entry
        with self._place.guarded(f"storing {_name(key)}"):
            self._open()
            lock = FileLock(self._place.locks / f"{key.kind}-{key.digest}")
            lock.acquire()
        try:
            entry, damage = self._find(key)
            if entry is not None:
                return entry
            made = self._make(key, make, damage)
        finally:
            lock.release(remove=True)
        self._evict()
        return made

    def entries(self, kind: str | None = None) -> list[StoredEntry]:
        """Everything that is stored, by kind, subject and last use; damaged entries are said to be damaged.

        Raises
        ------
        CacheError
            When the cache directory is not ours or cannot be read.
        """
        with self._place.guarded("listing it"):
            if not self._place.is_ours():
                return []
        return sorted(
            self._list("listing it", kind),
            key=lambda entry: (entry.kind, entry.subject, -entry.last_used, entry.digest),
        )

    def describe(self, width: int = 100) -> str:
        """The table of all entries, with totals, for a terminal of `width` columns."""
        return table(self.root, self.entries(), self.max_bytes, time.time(), width)

    def clear(self, kind: str | None = None) -> Cleared:
        """Remove every entry, or those of one kind; never anything that the cache did not put there.

        Raises
        ------
        CacheError
            When the directory is not ours or cannot be written.
        """
        with self._place.guarded("clearing it"):
            if not self._place.is_ours():
                return Cleared(0, 0, 0)
            session = self._open()
            with gate(self._place):
                living = living_sessions(self._place)
                others = set[str]().union(*(used for name, used in living.items() if name != session.name))
                stored = self._list("clearing it", kind)
                free = [entry for entry in stored if entry.name not in others]
                trash = [self._move_away(entry.path, session) for entry in free]
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)
        return Cleared(len(free), sum(entry.bytes for entry in free), len(stored) - len(free))

    def close(self) -> None:
        """Give up the protection of all entries used so far; the end of the process does the same."""
        with self._mutex:
            if self._session is not None:
                self._session.close()
                self._session = None

    def _open(self) -> Session:
        """The session of this process; a new one tidies up after the dead. Not inside the `gate`."""
        with self._mutex:
            if self._session is not None and self._session.is_live():
                return self._session
            self._place.prepare()
            with gate(self._place):
                self._session = Session(self._place)
                living = living_sessions(self._place)
                dead = [path for path in self._place.work.iterdir() if path.name.partition(".")[0] not in living]
                remove_stale_locks(self._place)
            for path in dead:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            return self._session

    def _list(self, doing: str, kind: str | None = None) -> list[StoredEntry]:
        with self._place.guarded(doing):
            return [entry for path in self._place.directories(kind) if (entry := stored_entry(path)) is not None]

    def _directory(self, key: Key) -> Path:
        return self._place.entries / key.kind / key.digest

    def _find(self, key: Key) -> tuple[Entry | None, str | None]:
        """The entry, or None and what is wrong with the one that is there."""
        directory = self._directory(key)
        with self._place.guarded(f"reading {_name(key)}"), self._mutex:
            if not directory.is_dir() or not self._register(directory):
                # A root that is no directory must not pass for an empty cache.
                if self.root.exists():
                    next(self.root.iterdir(), None)
                return None, None
            try:
                manifest = self._verify(directory)
            except DamagedError as damage:
                return None, str(damage)
            # A read-only cache serves, it just does not learn what was used last.
            with suppress(OSError):
                os.utime(directory / LAST_USE)
        return Entry(directory / FILES, key, True, None, manifest.make_s, self), None

    def _verify(self, directory: Path) -> Manifest:
        known = self._verified.pop(directory.name, None)
        if known is not None:
            manifest, stamps = known
            with suppress(OSError):
                if all(stamp(path) == before for path, before in stamps.items()):
                    self._verified[directory.name] = known
                    return manifest
        manifest = read_manifest(directory)
        stamps = verify_files(directory, manifest)
        if settled(*stamps.values()):
            self._verified[directory.name] = (manifest, stamps)
        return manifest

    def _register(self, directory: Path) -> bool:
        """Protect an entry from eviction for as long as this process lives; False when it is gone already."""
        try:
            session = self._open()
            if entry_name(directory) in session.used:
                return True
            with gate(self._place):
                if not directory.is_dir():
                    return False
                session.use(directory)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
        return True

    def _make(self, key: Key, make: Callable[[Path], object], damage: str | None) -> Entry:
        doing = f"storing {_name(key)}"
        with self._place.guarded(doing):
            reason = self._miss_reason(key, damage)
            session = self._open()
            work = session.new_path()
            (work / FILES).mkdir(parents=True)
        try:
            start = time.perf_counter()
            try:
                make(work / FILES)
            except OSError as error:
                if self._place.is_at_fault(error, work):
                    raise self._place.error(error, doing) from error
                raise
            make_s = round(time.perf_counter() - start, 6)
            with self._place.guarded(doing):
                (work / LAST_USE).touch()
                manifest = Manifest(
                    key.kind, key.subject, key.parts, round(time.time(), 3), make_s, describe_files(work / FILES)
                )
                write_manifest(work, manifest)
                self._publish(work, self._directory(key))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Entry(self._directory(key) / FILES, key, False, reason, make_s, self)

    def _publish(self, work: Path, directory: Path) -> None:
        """Let the finished work become the entry, in place of a damaged one if need be."""
        with self._mutex:
            session = self._open()
            with gate(self._place):
                directory.parent.mkdir(exist_ok=True)
                damaged = self._move_away(directory, session) if directory.exists() else None
                session.use(directory)
                work.rename(directory)
        if damaged is not None:
            shutil.rmtree(damaged, ignore_errors=True)

    def _miss_reason(self, key: Key, damage: str | None) -> str:
        if damage is not None:
            return f"the cached entry was damaged: {damage}"
        same = []
        with suppress(OSError):
            for path in self._place.directories(key.kind):
                with suppress(DamagedError):
                    manifest = read_manifest(path)
                    if manifest.subject == key.subject:
                        same.append(manifest)
        if not same:
            return f"first build of {_name(key)}"
        nearest = min(same, key=lambda manifest: (len(differing_parts(manifest.parts, key.parts)), -manifest.created))
        return describe_change(nearest.parts, key.parts)

    def _move_away(self, directory: Path, session: Session) -> Path:
        """Take an entry out of reach in one step; deleting it may then take its time."""
        trash = session.new_path()
        directory.rename(trash)
        self._verified.pop(directory.name, None)
        return trash

    def _evict(self) -> None:
        """Remove what was not used for longest until the limit holds; a limit that cannot be kept is no error."""
        if self.max_bytes is None:
            return
        trash = []
        # The entry that was asked for is there: tidying up may fail, as where another user's entries are in the way.
        with suppress(OSError, CacheError):
            stored = self._list("tidying it")
            total = sum(entry.bytes for entry in stored)
            if total <= self.max_bytes:
                return
            session = self._open()
            with gate(self._place):
                held = set[str]().union(*living_sessions(self._place).values())
                for entry in sorted(stored, key=lambda entry: entry.last_used):
                    if total <= self.max_bytes:
                        break
                    if entry.name in held:
                        continue
                    with suppress(FileNotFoundError):  # another process evicted it meanwhile
                        trash.append(self._move_away(entry.path, session))
                    total -= entry.bytes
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)

    def _write_extra(self, entry: Entry, name: str, data: bytes) -> None:
        path = _extra_path(entry, name)
        with self._place.guarded(f"storing {name} of {_name(entry.key)}"):
            half = self._open().new_path()
            try:
                half.write_bytes(zlib.crc32(data).to_bytes(_CRC_BYTES, "big") + data)
                with suppress(FileNotFoundError):  # cleared in the meantime
                    path.parent.mkdir(exist_ok=True)
                    half.replace(path)
            finally:
                half.unlink(missing_ok=True)


def _extra_path(entry: Entry, name: str) -> Path:
    if not _EXTRA_NAME.fullmatch(name):
        raise ValueError(f"extra file {name!r}: expected a plain file name")
    return entry.path.parent / _EXTRA / name


def _name(key: Key) -> str:
    return f"{key.subject} ({key.kind})"
