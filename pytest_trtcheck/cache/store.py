"""The cache: look up, make once, evict what was not used for longest."""

from __future__ import annotations

import errno
import functools
import gc
import hashlib
import hmac
import json
import math
import os
import re
import shutil
import time
import zlib
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

from pytest_trtcheck.cache.directory import CacheDir, remove_scratch, scratch_folder
from pytest_trtcheck.cache.hashing import HashedFile, Stamp, hashed, require_same, settled, sign, stamp
from pytest_trtcheck.cache.key import Key, describe_change, differing_parts
from pytest_trtcheck.cache.listing import StoredEntry, is_of, model_of, stored_entry, table
from pytest_trtcheck.cache.manifest import (
    FILES,
    MANIFEST,
    DamagedError,
    Manifest,
    UnsignedError,
    describe_files,
    read_manifest,
    recall_manifest,
    recall_verified,
    refuse_others,
    remember_verified,
    verify_files,
    write_manifest,
)
from pytest_trtcheck.errors import MISREAD, CacheError, CachePlaceError, ReportError, first_line, lacked_files
from pytest_trtcheck.record.files import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_trtcheck.cache.remote import Remote

T = TypeVar("T")

Origin: TypeAlias = Literal["hit", "remote", "miss"]
"""Where an entry was: here, in the shared cache, or nowhere, so that it was made."""

GRACE_S = 3600.0
"""What any process looked up within this time, in seconds, is not evicted."""

_rests_on: ContextVar[tuple[dict[HashedFile, None], ...]] = ContextVar("rests_on", default=())
"""The files that what this thread does rests on: a dictionary for each `Cache.resting_on` that it is in."""

_EXTRA = "extra"
_EXTRA_NAME = re.compile(r"\w[\w.-]*")
_CRC_BYTES = 4
_SIGNATURE_BYTES = 32
_MOST_EXTRA_BYTES = 4 << 30
_LARGE_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """A directory in the cache; `Cache` says for how long.

    `path` holds the files as they were made; nothing may be changed there. `origin` is "miss" where this very call made
    it, and then `miss_reason` says why. `make_s` is what making took at the time, in seconds.
    """

    path: Path
    key: Key
    origin: Origin
    miss_reason: str | None
    make_s: float
    _dir: CacheDir = field(repr=False, compare=False)
    _secret: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def cached(self) -> bool:
        """Whether somebody had made it before."""
        return self.origin != "miss"

    def read_json(self, name: str, take: Callable[[Any], T]) -> T:
        """What `take` makes of the JSON in one of the entry's files.

        Raises
        ------
        CacheError
            It says something else than what is stored there, whatever its checksum is.
        """
        with self.understood(name):
            return take(json.loads((self.path / name).read_bytes()))

    @contextmanager
    def understood(self, name: str = "") -> Iterator[None]:
        """Whatever goes wrong while a file of the entry is read is the file's fault: a CacheError that names it."""
        try:
            yield
        except (OSError, ReportError, *MISREAD) as error:
            if lacked_files(error):
                raise
            raise CacheError(
                f"{self.path / name} in the cache is not what was stored there: {first_line(error)}",
                "see who can write there, then empty it with --trt-cache-clear",
            ) from error

    def write_extra(self, name: str, data: bytes) -> None:
        """Attach or replace a file beside the entry's own, atomically: something learned later, such as a JIT cache.

        It does not touch the entry's validity. Nothing is attached to an entry that was cleared in the meantime, and
        what can't be written is not there the next time: `Cache.problem` says so.
        """
        path = self._extra(name)
        doing = f"storing {name} of {_name(self.key)}"
        if not self.path.is_dir():
            return
        try:
            self._write(path, data, doing)
        except (OSError, CacheError) as error:
            self._dir.problem = self._dir.problem or first_line(error)

    def _write(self, path: Path, data: bytes, doing: str) -> None:
        name = path.name
        with self._dir.working(doing) as work, self._dir.guarded(doing):
            (work / name).write_bytes(self._seal(name, data) + data)
            with suppress(FileNotFoundError):  # cleared in the meantime
                path.parent.mkdir(exist_ok=True)
                (work / name).replace(path)
                self._dir.grew(len(data))

    def read_extra(self, name: str) -> bytes | None:
        """What was attached last under `name`; None where there is nothing, or where it is damaged or not signed."""
        try:
            content = read_bytes(self._extra(name), _MOST_EXTRA_BYTES)
        except OSError:
            return None
        length = _CRC_BYTES if self._secret is None else _SIGNATURE_BYTES
        data = content[length:]
        return data if hmac.compare_digest(content[:length], self._seal(name, data)) else None

    def recall(self, name: str, take: Callable[[bytes], T]) -> T | None:
        """What `take` makes of what was attached last under `name`; None where it is nothing that it understands."""
        data = self.read_extra(name)
        with suppress(ReportError, *MISREAD):
            return None if data is None else take(data)
        return None

    def _seal(self, name: str, data: bytes) -> bytes:
        if self._secret is None:
            return zlib.crc32(data).to_bytes(_CRC_BYTES, "big")
        return bytes.fromhex(sign(self._secret, f"{self.key.digest}/{name}".encode(), data))

    def _extra(self, name: str) -> Path:
        if not _EXTRA_NAME.fullmatch(name):
            raise ValueError(f"extra file {name!r}: expected a plain file name")
        return self.path.parent / _EXTRA / name


_MAKING = {
    "engine": "building the engine of",
    "provider_engine": "building the engine of",
    "lowered": "lowering",
    "calibration": "calibrating",
    "exported": "exporting",
    "emulated": "preparing the emulation of",
    "reference": "computing the reference of",
}
"""What making an entry of a kind is called; of others nobody waits for long."""


def _subject(key: Key) -> str:
    precision = key.parts.get("precision")
    return f"{key.subject} in {precision}" if precision else key.subject


def _making(key: Key) -> str:
    return f"{_MAKING.get(key.kind, 'preparing')} {_subject(key)}"


class Cache:
    """A content-addressed store of directories below `root`, for any number of processes and threads.

    Nothing is created before the first entry is made. Looking up takes no lock; it notes the time of the entry's last
    use. Beyond the limit, what was not used for longest is evicted, but nothing that this object returned, and nothing
    that any process which lives has asked for, or that was asked for within the last hour (`GRACE_S`). To keep making
    cheap, processes note what they add: all entries are looked at where that exceeds the limit, or once an hour.

    Parameters
    ----------
    root
        A directory that is ours, empty, or not there yet.
    max_bytes
        The size limit; None: no limit.
    secret
        What entries are signed with: those that are not are made again. None: they are not signed.
    trusts
        Whether entries are taken that are not signed, although others can write into the directory.
    remote
        A cache that machines share, which is asked for what is not here and shared.
    is_spare
        Whether this one stands in for another. Where the file system of `root` refuses (full, read-only) or does not
        answer, a temporary directory stands in for as long as this object lives, and `problem` says so.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        max_bytes: int | None = None,
        *,
        secret: bytes | None = None,
        trusts: bool = False,
        remote: Remote | None = None,
        is_spare: bool = False,
    ) -> None:
        self.root = Path(root).absolute()
        self.max_bytes = max_bytes
        self.remote = remote
        self._secret, self._trusts = secret, trusts
        self._is_private = False
        self._proposed: dict[Path, Key] = {}
        self._dir = CacheDir(self.root)
        self._used: set[Path] = set()
        self._verified: dict[Path, tuple[Manifest, dict[Path, Stamp]]] = {}
        self._made_bytes = math.inf  # since the limit was looked at
        self._is_clean = False
        self._is_spare = is_spare
        self._spare: Cache | None = None
        self._refused: CachePlaceError | None = None
        self.during: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
        """Is told what is made or fetched, as long as that takes."""

    def require_private(self) -> None:
        """See that nobody else could have put entries here: an engine is code that runs where it is loaded.

        Raises
        ------
        CacheError
            Others can, entries are not signed, and nobody said that it does not matter.
        """
        if self._is_private or self._secret is not None or self._trusts:
            return
        if not self._answers():
            return  # nothing is taken from there
        if (why := self._dir.exposed()) is not None:
            raise CacheError(
                f"the cache directory is not used: {why}, and an engine is code: theirs would run here",
                f"chmod go-w {self.root}, name another with --trt-cache-dir, sign entries (--trt-cache-key=FILE|ENV), "
                "or trust whoever can write there (--trt-cache-unsigned)",
                code="cache-unsafe",
            )
        # Where it may not even be looked for, nothing is taken from.
        self._is_private = os.path.exists(self.root)  # noqa: PTH110 - which Path.exists raises

    def get(self, key: Key) -> Entry | None:
        """The entry of `key`, whole and checked; None where there is none or a damaged one.

        Raises
        ------
        CacheError
            When the cache directory cannot be read.
        """
        return self._look(key)

    def find(self, kind: str, digest: str) -> Entry | None:
        """The entry whose key has this digest, whole and checked; None where there is none or a damaged one.

        Raises
        ------
        CacheError
            When the cache directory cannot be read.
        """
        try:
            key = read_manifest(self._dir.entries / kind / digest, self._secret).key
        except DamagedError:
            return self._spare.find(kind, digest) if self._spare else None
        return self.get(key)

    def remembers(self, kind: str, subject: str, **parts: str) -> bool:
        """Whether one of the subject's entries that were made last has these parts in its key; a quick look."""
        for path in self._dir.recall(kind, subject) if self._answers() else ():
            with suppress(DamagedError):
                if parts.items() <= recall_manifest(path).key.parts.items():
                    return True
        return False

    def has(self, kind: str) -> bool:
        """Whether there is any entry of a kind; a quick look."""
        return self._answers() and self._dir.has(kind)

    def _answers(self) -> bool:
        try:
            self._dir.require_answer()
        except CachePlaceError:
            return False  # what is looked up in earnest says so
        return True

    def get_or_make(self, key: Key, make: Callable[[Path], object], *, shared: bool = False) -> Entry:
        """The entry of `key`; `make` fills the empty directory it is given when there is none.

        One process makes, all others that want the same entry wait for it. `make` may ask for other entries, but not
        for its own. Whatever it raises is passed on, and nothing stays behind. One that is `shared`, because its key
        says the same on every machine, is looked for in the shared cache before, and proposed to it.

        Raises
        ------
        CacheError
            When the cache directory is not one, and when a temporary one cannot be used either.
        """
        if self._spare is None:
            try:
                return self._get_or_make(key, make, shared=shared)
            except CachePlaceError as error:
                self._take_spare(error)
        found = self._look(key)
        if found is not None:
            return found
        try:
            return cast("Cache", self._spare).get_or_make(key, make, shared=shared)
        except CachePlaceError as error:
            refused = cast("CachePlaceError", self._refused)
            raise CacheError(
                f"{refused.message}\n  and a temporary directory instead: {error.message}", refused.hint
            ) from error

    @property
    def problem(self) -> str | None:
        """Why something is not kept, where that is so; what was made is then good for this process alone."""
        return self._dir.problem

    def _take_spare(self, error: CachePlaceError) -> None:
        """Go on in a temporary directory: what can't be kept is no reason against what is computed."""
        if self._is_spare:
            raise error
        try:
            self._spare_folder = scratch_folder("cache")
            self._spare = Cache(
                Path(self._spare_folder.name, "cache"),
                self.max_bytes,
                secret=self._secret,
                trusts=self._trusts,
                remote=self.remote,
                is_spare=True,
            )
            self._spare.during = self.during
        except OSError as other:
            raise CacheError(
                f"{error.message}; nor can a temporary directory be used instead: {other}", error.hint
            ) from error
        self._refused = error
        self._dir.problem = f"nothing that is made is kept: {error.message}"

    def _look(self, key: Key) -> Entry | None:
        """The entry, here or in the temporary directory; what can't be read here is not there."""
        try:
            found, _ = self._find(key)
        except CachePlaceError:
            if self._spare is None:
                raise
            found = None
        return found or (self._spare.get(key) if self._spare else None)

    def _get_or_make(self, key: Key, make: Callable[[Path], object], *, shared: bool) -> Entry:
        if shared and self.remote is not None:
            self._proposed[self._directory(key)] = key
        entry, _ = self._find(key)
        if entry is not None:
            return entry
        waiting = self.during(f"waiting for another process that is {_making(key)}")
        with self._dir.locked(f"{key.kind}-{key.digest}", f"storing {_name(key)}", waiting):
            entry, damage = self._find(key)
            if entry is not None:
                return entry
            entry = (self._fetch(key, self.remote) if shared and self.remote else None) or self._make(key, make, damage)
            if shared and self.remote and entry.origin == "miss":
                self.remote.made(key, entry.make_s)
        self._tidy()
        return entry

    def removed(self, error: BaseException | None) -> CacheError | None:
        """What is said where a file here was gone while it was used; None where that is not what happened."""
        while error is not None:
            named = getattr(error, "filename", None)
            path = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else None
            is_gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
            if is_gone and path is not None and path.is_relative_to(self.root):
                return CacheError(
                    f"the cache directory {self.root} was emptied or removed while it was used: {path} is gone",
                    "run again, and see what else removes files there: --trt-cache-clear leaves what is in use",
                )
            error = error.__cause__ or error.__context__
        return None

    def watch(self) -> None:
        """Forget what was asked for until now: `share` is then about what follows."""
        self._proposed.clear()
        if self._spare is not None:
            self._spare.watch()

    @contextmanager
    def resting_on(self, *files: HashedFile) -> Iterator[None]:
        """Keep nothing that is made meanwhile of other content than the hashes in its key are of.

        That is of `files`, and of those that are named meanwhile: once one of them is not what was hashed, whatever
        is made ends with a ModelError. Each thread is held to its own files; whoever lets another one work for it runs
        that in a copy of its context (`contextvars.copy_context`).
        """
        token = _rests_on.set((*_rests_on.get(), dict.fromkeys(files)))
        try:
            yield
        finally:
            _rests_on.reset(token)

    def rest_on(self, *files: HashedFile) -> None:
        """Name files whose hashes go into keys, as they were when they were hashed."""
        for each in _rests_on.get():
            each.update(dict.fromkeys(files))

    def hash(self, path: Path) -> str:
        """The SHA-256 of a file that is read again for what is made of it: see `rest_on`."""
        found = hashed(path)
        self.rest_on(found)
        return found.digest

    def require_same(self) -> None:
        """See that the files which this rests on are what was hashed; a ModelError where one is not."""
        require_same({file: None for each in _rests_on.get() for file in tuple(each)})

    def share(self, is_proved: Callable[[Key], bool]) -> None:
        """Write what was asked for since `watch`, and proved itself, to the shared cache."""
        if self.remote is None:
            return
        if self._spare is not None:
            self._spare.share(is_proved)
        from pytest_trtcheck.cache.remote import Offer

        for directory, key in list(self._proposed.items()):
            known = self._verified.get(directory)
            if not is_proved(key) or self._mark(directory).exists():
                continue
            try:
                manifest = known[0] if known else read_manifest(directory, self._secret)
            except DamagedError:
                continue
            done = functools.partial(_touch, self._mark(directory))
            self.remote.offer(Offer(key, directory / FILES, manifest.files, manifest.created, manifest.make_s, done))

    def _mark(self, directory: Path) -> Path:
        """The file that says that the shared cache has an entry."""
        assert self.remote is not None
        place = self.remote.address.shown.encode("utf-8", "surrogatepass")  # a folder's name need not be text
        return directory / f"shared-{hashlib.sha256(place).hexdigest()[:8]}"

    def entries(self) -> list[StoredEntry]:
        """Everything that is stored, by kind, subject and last use; damaged entries are said to be damaged.

        Raises
        ------
        CacheError
            When the cache directory is not ours or cannot be read.
        """
        with self._dir.guarded("listing it"):
            stored = self._stored() if self._dir.is_ours() else []
        return sorted(stored, key=lambda entry: (entry.kind, entry.subject, -entry.last_used, entry.digest))

    def describe(self, width: int = 100, model: str | None = None) -> str:
        """The entries by model, or those of the one that is named, with totals, for a terminal of `width` columns."""
        entries = self.entries()
        shown = entries if model is None else [entry for entry in entries if is_of(entry, model)]
        whole = None if model is None else sum(entry.bytes for entry in entries)
        found = table(self.root, shown, self.max_bytes, time.time(), width=width, whole=whole)
        return found if self.remote is None else f"{found}\n{self.remote.describe()}"

    def models(self) -> list[str]:
        """What the models are called whose entries are here."""
        return list(dict.fromkeys(map(model_of, self.entries())))

    def clear(self, model: str | None = None) -> int:
        """Remove every entry that no other process uses, or those of one model, and say how many.

        Never what the cache did not put there.

        Raises
        ------
        CacheError
            When the directory is not ours or cannot be written.
        """
        doing = "clearing it"
        with self._dir.guarded(doing):
            if not self._dir.is_ours():
                return 0
            with self._dir.locked("tidy", doing):
                self._dir.remove_leftovers()
                if model is None:
                    return sum(self._evict(path) for path in list(self._dir.directories()))
                return sum(self._evict(entry.path) for entry in self._stored() if is_of(entry, model))

    def _stored(self) -> list[StoredEntry]:
        return [entry for path in self._dir.directories() if (entry := stored_entry(path)) is not None]

    def _use(self, directory: Path) -> None:
        """Note that this process uses an entry: before it is looked at, or it might go meanwhile."""
        if directory not in self._used:
            self._used.add(directory)
            self._dir.claims.add(directory)
        if not self._is_clean:
            self._is_clean = True
            with suppress(OSError):
                self._dir.remove_leftovers()
            with suppress(OSError):
                remove_scratch()  # whoever finds all that it needs here makes no scratch folder

    def _directory(self, key: Key) -> Path:
        return self._dir.entries / key.kind / key.digest

    def _find(self, key: Key) -> tuple[Entry | None, str | None]:
        """The entry, or None and what is wrong with the one that is there."""
        directory = self._directory(key)
        self._dir.require_answer()
        self.require_private()
        with self._dir.guarded(f"reading {_name(key)}"):
            try:
                directory.stat()
            except FileNotFoundError:
                return None, None
        # Before it is read, so that it is not evicted meanwhile. A read-only cache serves, it just does not learn.
        with suppress(OSError):
            os.utime(directory)
        self._use(directory)
        try:
            manifest = self._verify(directory)
        except UnsignedError as doubt:
            return None, f"the cached entry was not used: {doubt}"
        except DamagedError as damage:
            return None, f"the cached entry was damaged: {damage}"
        return Entry(directory / FILES, key, "hit", None, manifest.make_s, self._dir, self._secret), None

    def _verify(self, directory: Path) -> Manifest:
        known = self._verified.pop(directory, None)
        if known is not None:
            manifest, then = known
            with suppress(OSError):
                if all(stamp(path) == before for path, before in then.items()):
                    refuse_others(directory, manifest)
                    self._verified[directory] = known
                    return manifest
        manifest = read_manifest(directory, self._secret)
        refuse_others(directory, manifest)
        stamps = recall_verified(directory, manifest, self._secret)
        if stamps is None:
            stamps = verify_files(directory, manifest, hashed=self._secret is not None)
            if not settled(*stamps.values()):
                return manifest
            remember_verified(directory, stamps, self._secret)
        self._verified[directory] = manifest, stamps
        return manifest

    def _fetch(self, key: Key, remote: Remote) -> Entry | None:
        """The entry as the shared cache has it, stored here; None where that has none that can be used."""
        doing = f"storing {_name(key)}"
        most = math.inf if self.max_bytes is None else self.max_bytes
        with self._dir.working(doing) as work:
            made = work / "entry"
            with self._dir.guarded(doing):
                (made / FILES).mkdir(parents=True)
            kind = "the engine of " if key.kind.endswith("engine") else ""
            with self.during(f"asking the shared cache for {kind}{_subject(key)}"):
                listing = remote.fetch(key, made / FILES, most)
            if listing is None:
                return None
            with self._dir.guarded(doing):
                created = min(listing.created, time.time())  # by another machine's clock
                self._store(key, made, round(created, 3), listing.make_s)
        _touch(self._mark(self._directory(key)))
        return Entry(self._directory(key) / FILES, key, "remote", None, listing.make_s, self._dir, self._secret)

    def _make(self, key: Key, make: Callable[[Path], object], damage: str | None) -> Entry:
        doing = f"storing {_name(key)}"
        with self._dir.working(doing) as work:
            made = work / "entry"  # for its permissions: a temporary directory is closed to others
            with self._dir.guarded(doing):
                reason = self._miss_reason(key, damage)
                (made / FILES).mkdir(parents=True)
            start = time.perf_counter()
            with (
                self._dir.guarded(doing, others_work=work),
                self.during(_making(key)),
            ):
                make(made / FILES)
                self.require_same()
            make_s = round(time.perf_counter() - start, 6)
            with self._dir.guarded(doing):
                self._store(key, made, round(time.time(), 3), make_s)
        return Entry(self._directory(key) / FILES, key, "miss", reason, make_s, self._dir, self._secret)

    def _store(self, key: Key, made: Path, created: float, make_s: float) -> None:
        """Take what was made into the cache, in one step."""
        directory = self._directory(key)
        files = describe_files(made / FILES, hashed=self._secret is not None)
        write_manifest(made, Manifest(key, created, make_s, files), self._secret)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with self._discarded(directory):  # the damaged one, if any, or one that another secret signed
            made.rename(directory)
        self._use(directory)
        self._dir.remember(key.kind, key.subject, key.digest)
        made_bytes = sum(found.size for found in files.values())
        if made_bytes > _LARGE_BYTES:
            gc.collect()  # Graphs are cycles, and hold the weights that they were made from.
        self._made_bytes += made_bytes
        self._dir.grew(made_bytes)

    def _miss_reason(self, key: Key, damage: str | None) -> str:
        if damage is not None:
            return damage
        same = []
        for path in self._dir.recall(key.kind, key.subject):
            with suppress(DamagedError):
                manifest = recall_manifest(path)
                if manifest.key.subject == key.subject:
                    same.append((len(differing_parts(manifest.key.parts, key.parts)), -manifest.created, manifest.key))
        if not same:
            return f"first build of {_name(key)}"
        *_, nearest = min(same, key=lambda row: row[:2])
        return describe_change(nearest.parts, key.parts)

    @contextmanager
    def _discarded(self, directory: Path) -> Iterator[None]:
        """Take an entry out of reach in one step, and delete it at the end, when another is there: it may be in use."""
        self._used.discard(directory)
        self._verified.pop(directory, None)
        if not os.path.lexists(directory):
            yield
            return
        with self._dir.working("removing an entry") as trash:
            with suppress(FileNotFoundError):
                _hidden(directory, trash).gone()
            yield

    def _evict(self, directory: Path) -> bool:
        """Take an entry out of reach, unless another process uses it, and then delete it; whether it is gone."""
        if self._dir.claims.is_claimed(directory):
            return False
        self._used.discard(directory)
        self._verified.pop(directory, None)
        with self._dir.working("removing an entry") as trash:
            try:
                hidden = _hidden(directory, trash)
            except FileNotFoundError:
                return False
            # Who asked for it meanwhile has noted that first, and finds it again, or makes it again.
            if self._dir.claims.is_claimed(directory):
                with suppress(OSError):
                    hidden.back()
                return False
            hidden.gone()
        return True

    def _tidy(self) -> None:
        """Remove what exceeds the limit, once enough was made to be worth listing the store."""
        limit = math.inf if self.max_bytes is None else self.max_bytes
        weight = self._dir.weight_bytes()
        if self._made_bytes < limit / 100 or (weight <= limit and math.isfinite(weight)):
            return
        self._made_bytes = 0
        # The entry that was asked for is there: tidying up may fail, as where another user's entries are in the way.
        with suppress(OSError, CacheError), self._dir.locked("tidy", "tidying it"):
            stored = sorted(self._stored(), key=lambda entry: _idle_s(entry.last_used), reverse=True)
            total = sum(entry.bytes for entry in stored) + self._dir.unfinished_bytes()
            for entry in stored:
                if total <= limit:
                    break
                # Looked at again: it may have been used since it was listed.
                is_idle = entry.path not in self._used and _idle_s(entry.path.stat().st_mtime) > GRACE_S
                if is_idle and self._evict(entry.path):
                    total -= entry.bytes
            self._dir.weighed(total)


@dataclass(frozen=True)
class _Hidden:
    """An entry that is out of reach."""

    entry: Path
    moved: Path
    to: Path

    def back(self) -> None:
        self.to.rename(self.moved)

    def gone(self) -> None:
        """Remove what was not moved: all of it but the manifest, or nothing."""
        if self.moved != self.entry:
            shutil.rmtree(self.entry)


def _hidden(entry: Path, trash: Path) -> _Hidden:
    """Take an entry out of reach in one step; a FileNotFoundError where it is gone.

    A folder of a lower layer of overlayfs, such as a cache in a container's image, cannot be renamed. There its
    manifest goes, without which it is no entry.
    """
    to = trash / "entry"
    try:
        entry.rename(to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return _Hidden(entry, entry, to)
    with suppress(FileNotFoundError):  # a damaged one may have none
        (entry / MANIFEST).rename(to)
    return _Hidden(entry, entry / MANIFEST, to)


def _idle_s(last_used: float) -> float:
    """How long ago an entry was used; a time in the future is a wrong clock's, and says nothing."""
    idle = time.time() - last_used
    return idle if idle > -GRACE_S else math.inf


def _touch(path: Path) -> None:
    with suppress(OSError):
        path.touch()


def _name(key: Key) -> str:
    return f"{key.subject} ({key.kind})"
