"""A cache that machines share, behind the local one: a bucket, a folder, a web server, by fsspec.

It may make nothing worse: what is wrong with it is told once, and the entry is made here. No entry is used that is not
what its listing says, and no session takes much longer for it than without.

    URL/v1/linux-x86_64/engine/<digest of the key>/<SHA-256 of a file>
    URL/v1/linux-x86_64/engine/<digest of the key>/listing          written last: an entry is there whole, or not at all
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import platform
import queue
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from pytest_trtcheck.cache.directory import exposed, scratch_folder
from pytest_trtcheck.cache.hashing import checksum, sign
from pytest_trtcheck.cache.key import Key
from pytest_trtcheck.errors import ArgumentError, MissingDependencyError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_trtcheck.cache.hashing import Checksum

ANSWER_S = 10.0
"""The most, in seconds, that looking an entry up may take: what then did not answer is left alone."""
PATIENCE_S = 30.0
"""How much longer, in seconds, a process may take than it would alone, beside a tenth of what it makes itself."""
WORTH_S = 0.5
"""What took less to make, in seconds, is neither asked for nor written."""
_SHARE_OF_MAKING = 0.1
_LEAST_S = 2.0
_WRITING_S = 30.0
_LEAVING_S = (10.0, 120.0)
_ERRORS_IN_A_ROW = 3
_CHUNK_BYTES = 1 << 20
_LISTING_BYTES = 1 << 20

_LAYOUT = "v1"
_LISTING = "listing"
_FIRST_LINE = b"pytest-trtcheck cache entry"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_FILE = re.compile(r"^file://(localhost(?=/))?")
_READ_ONLY = frozenset({"http", "https"})
_NEEDS = {
    "s3": ("s3fs", 'pip install "pytest-trtcheck[s3]"'),
    "s3a": ("s3fs", 'pip install "pytest-trtcheck[s3]"'),
    "gs": ("gcsfs", "pip install gcsfs"),
    "gcs": ("gcsfs", "pip install gcsfs"),
    "http": ("aiohttp", 'pip install "pytest-trtcheck[remote]"'),
    "https": ("aiohttp", 'pip install "pytest-trtcheck[remote]"'),
}
_S3 = {
    "config_kwargs": {"connect_timeout": 3, "read_timeout": ANSWER_S, "retries": {"max_attempts": 2}},
    # One part of a file at a time: the library holds ten of 50 MB in memory otherwise.
    "max_concurrency": 1,
}
# What is packed on the way need not be smaller, and its size would be held against the listing's.
_WEB = {"headers": {"Accept-Encoding": "identity"}}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3, "http": _WEB, "https": _WEB}

_T = TypeVar("_T")


class _UnusableError(Exception):
    """An entry is there, and may not be used; the text says why."""


class _NoListingError(_UnusableError):
    """What is there is no entry at all."""


class _SlowError(Exception):
    """What was asked for took longer than it may."""


@dataclass(frozen=True)
class Address:
    """Where a shared cache is.

    Parameters
    ----------
    base
        A URL without its query, or a folder.
    scheme
        Of the URL; "file" for a folder.
    query
        What every address ends in, such as a token.
    """

    base: str = field(repr=False)
    scheme: str
    query: str = field(repr=False, default="")

    @classmethod
    def parse(cls, text: str, folder: Path) -> Address:
        """What `--trt-cache` names; relative folders are below `folder`.

        Raises
        ------
        ArgumentError
            It is neither a URL nor a folder.
        MissingDependencyError
            What reads it is not installed.
        """
        scheme = "file"
        if found := _SCHEME.match(text):
            scheme = found[1].lower()
            text = f"{scheme}{text[len(scheme) :]}"
        if "::" in text:
            raise ArgumentError(
                "--trt-cache: several URLs in one are not taken",
                "name one, such as s3://bucket/folder",
                code="cache-url",
            )
        if find_spec("fsspec") is None:
            raise MissingDependencyError(
                "--trt-cache needs fsspec, which is not installed",
                _NEEDS.get(scheme, ("", 'pip install "pytest-trtcheck[remote]"'))[1],
            )
        module, install = _NEEDS.get(scheme, (None, ""))
        if module is not None and find_spec(module) is None:
            raise MissingDependencyError(f"--trt-cache={scheme}:// needs {module}, which is not installed", install)
        if scheme == "file":
            return cls(str(folder / Path(_FILE.sub("", text)).expanduser()), scheme)
        if scheme not in _NEEDS:
            from fsspec.registry import known_implementations, registry

            if scheme not in {*known_implementations, *registry}:
                raise ArgumentError(
                    f"--trt-cache: fsspec knows no {scheme}://",
                    "name an s3://, gs:// or https:// URL",
                    code="cache-url",
                )
        try:
            split = urlsplit(text)
        except ValueError as error:
            raise ArgumentError(
                f"--trt-cache={scheme}://: no URL: {error}", f"name it: {scheme}://bucket/folder", code="cache-url"
            ) from None
        if not split.netloc:
            raise ArgumentError(
                f"--trt-cache={scheme}://: no bucket, host or folder is named",
                f"name it: {scheme}://bucket/folder",
                code="cache-url",
            )
        return cls(text.partition("#")[0].partition("?")[0].rstrip("/"), scheme, split.query)

    @property
    def shown(self) -> str:
        """It without what is secret in it: name, password and query."""
        if self.scheme == "file":
            return self.base
        split = urlsplit(self.base)
        return f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}"

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written there by its kind."""
        return self.scheme in _READ_ONLY

    def without_secrets(self, text: str) -> str:
        """A text of others', in which nothing is left of what is secret."""
        user = "" if self.scheme == "file" else urlsplit(self.base).netloc.rpartition("@")[0]
        secrets = {
            user,
            user.rpartition(":")[2],
            self.query,
            *(each.partition("=")[2] for each in self.query.split("&")),
        }
        for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
            if len(secret) > 2:
                text = text.replace(secret, "***")
        # Libraries may write an address in another way than it was given: with other characters quoted.
        text = re.sub(r"(?<=://)[^/\s'\"]*@", "***@", text)
        # A request that was signed carries its signature in its address.
        return re.sub(r"(?<=\w)\?[^\s'\")>]+", "?***", text)


@dataclass(frozen=True)
class Listing:
    """What a shared entry consists of: by each file's name its size in bytes, and its SHA-256 in hex."""

    kind: str
    subject: str
    parts: dict[str, str]
    created: float
    make_s: float
    files: dict[str, tuple[int, str]]

    def packed(self, secret: bytes | None) -> bytes:
        """As it is stored, signed if there is a secret."""
        text = json.dumps(asdict(self), indent=1).encode("ascii")
        signature = b"unsigned" if secret is None else sign(secret, _FIRST_LINE, text).encode()
        return b"%s %s\n%s" % (_FIRST_LINE, signature, text)

    @classmethod
    def unpacked(cls, data: bytes, secret: bytes | None, key: Key) -> Listing:
        """What `packed` made for a key; an `_UnusableError` where it is not, or not signed with the secret."""
        import msgspec

        head, _, text = data.partition(b"\n")
        name, _, signature = head.rpartition(b" ")
        if name != _FIRST_LINE:
            raise _NoListingError("is damaged: instead of its listing there is something else")
        if secret is not None and not hmac.compare_digest(signature, sign(secret, _FIRST_LINE, text).encode()):
            raise _UnusableError("is not signed with the key of --trt-cache-key")
        try:
            found = msgspec.json.decode(text, type=cls)
            is_other = Key(found.kind, found.subject, found.parts).digest != key.digest
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:  # later releases: a ValueError
            raise _UnusableError("is damaged: its listing cannot be read") from error
        if is_other:
            raise _UnusableError("is damaged: its listing belongs to another entry")
        if not (math.isfinite(found.make_s) and math.isfinite(found.created)) or not all(
            _is_plain(name) and size >= 0 and _SHA256.fullmatch(sha256) for name, (size, sha256) in found.files.items()
        ):
            raise _UnusableError("is damaged: its listing names what is no file of an entry")
        return found


def _is_plain(name: str) -> bool:
    """Whether a name leads to a file below the entry, on any system."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "/".join(parts) == name
        and not any(
            part == ".." or part.endswith((".", " ")) or re.search(r'[\x00-\x1f\\:*?"<>|]', part) for part in parts
        )
    )


@dataclass
class Tally:
    """What came of a shared cache, as plain data, which an xdist worker sends."""

    read: int = 0
    written: int = 0
    saved_s: float = 0.0
    troubles: dict[str, int] = field(default_factory=dict)

    def trouble(self, text: str, times: int = 1) -> None:
        """Count what went wrong."""
        self.troubles[text] = self.troubles.get(text, 0) + times

    @classmethod
    def of(cls, tallies: Iterable[Mapping[str, Any]]) -> Tally:
        """The sum of those that several processes sent."""
        total = cls()
        for each in tallies:
            total.read += each["read"]
            total.written += each["written"]
            total.saved_s += each["saved_s"]
            for text, times in each["troubles"].items():
                total.trouble(text, times)
        return total

    def lines(self, shown: str) -> list[str]:
        """What to tell at the end of a run."""
        found = []
        if self.read or self.written:
            found.append(
                f"shared cache {shown}: {self.read} read (which saved {self.saved_s:.0f} s), {self.written} written"
            )
        troubles = self.troubles.items()
        found += [f"warning: shared cache {shown}: {text}{f' ({n} times)' * (n > 1)}" for text, n in troubles]
        return found


class Remote:
    """A shared cache, as one process uses it.

    Parameters
    ----------
    secret
        What entries are signed with; None: they are not.
    trusts
        Whether entries that are not signed may come from where others can write.
    """

    def __init__(self, address: Address, secret: bytes | None = None, *, trusts: bool = False) -> None:
        self.address = address
        self.tally = Tally()
        self._secret, self._trusts = secret, trusts
        self._fs: Any = None
        self._root = ""
        self._left = False
        self._errors = 0
        self._lost_s = 0.0
        self._cheap: set[tuple[str, str]] = set()
        self._unusable: set[str] = set()
        self._offers: queue.Queue[Offer | None] = queue.Queue()
        self._writes = not address.is_read_only
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()

    def require_trust(self) -> None:
        """See that entries can be trusted, as far as the kind of the place tells; of a folder, it is looked at later.

        Raises
        ------
        ArgumentError
            Nobody can tell who writes there, entries are not signed, and nobody said that it does not matter.
        """
        if self._secret is None and not self._trusts and self.address.scheme != "file":
            raise ArgumentError(
                f"--trt-cache={self.address.shown}: an engine is code, a reference decides verdicts, and nothing tells "
                "who can write there",
                "sign entries: --trt-cache-key=FILE|ENV names a secret that all machines have; or trust whoever can "
                "write there: --trt-cache-unsigned",
                code="cache-unsafe",
            )

    def describe(self) -> str:
        """Where it is and how it is trusted, in a line."""
        how = "signed" if self._secret else "not signed"
        return f"shared cache: {self.address.shown} ({how}{', read only' * self.address.is_read_only}; not listed here)"

    # --- reading ---

    def fetch(self, key: Key, folder: Path, max_bytes: float) -> Listing | None:
        """Put the files of an entry into an empty folder; None where there is none that may be used."""
        if self._left or (key.kind, key.subject) in self._cheap:
            return None
        listing, is_whole = None, False
        self._import()  # which is not the place's fault
        start = time.perf_counter()
        try:
            listing = _limited(ANSWER_S, lambda over: self._listing(key, over))
            if sum(size for size, _ in listing.files.values()) > max_bytes:
                raise _UnusableError("is larger than trt_cache_size")
            limit = max(_LEAST_S, min(listing.make_s, 3600.0))
            self._read(limit, key, listing, folder)
            is_whole = True
        except FileNotFoundError:
            self._errors = 0
            if listing is not None:
                self._unuse(key, "is not whole: files of it are missing")
        except _UnusableError as error:
            self._unuse(key, str(error))
            # A web server that gives a page for everything, such as one to log in, has no cache.
            self._errors = self._errors + 1 if isinstance(error, _NoListingError) and self.address.is_read_only else 0
            if self._errors >= _ERRORS_IN_A_ROW:
                self._leave("it gives something else in the place of every listing")
        except PermissionError as error:
            # A bucket that may not be listed says this of what it does not have.
            self._trouble(f"access is denied, or an entry is missing and the bucket may not be listed: {error}")
        except _SlowError:
            if listing is None:
                self._leave(f"no answer within {ANSWER_S:g} s")
            else:
                self._trouble("entries would have taken longer to read than to make")
        except Exception as error:
            self._fail("reading", error)
        spent = time.perf_counter() - start
        self._lost_s += spent
        if listing is None or not is_whole:
            self._weigh()
            return None
        self._errors = 0
        self._lost_s -= listing.make_s
        self.tally.read += 1
        self.tally.saved_s += max(0.0, listing.make_s - spent)
        return listing

    def made(self, key: Key, make_s: float) -> None:
        """Learn what an entry took to make that was not there."""
        self._lost_s -= make_s * _SHARE_OF_MAKING
        if make_s < WORTH_S:
            self._cheap.add((key.kind, key.subject))

    def _listing(self, key: Key, over: threading.Event) -> Listing:
        self._open()
        with scratch_folder("listing") as folder:
            path = Path(folder, _LISTING)
            self._get(f"{self._entry(key)}/{_LISTING}", path, _LISTING_BYTES, over)
            return Listing.unpacked(path.read_bytes(), self._secret, key)

    def _read(self, limit: float, key: Key, listing: Listing, folder: Path) -> None:
        def work(over: threading.Event) -> None:
            for name, (size, sha256) in listing.files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._get(f"{self._entry(key)}/{sha256}", path, size, over)
                found = checksum(path, hashed=True)
                if (found.size, found.sha256) != (size, sha256):
                    raise _UnusableError(f"is damaged: {name} is not what its listing says")

        _limited(limit, work)

    def _get(self, address: str, path: Path, most: int, over: threading.Event) -> None:
        """Copy a file that may not have more than so many bytes; tried again once, as connections break."""

        def bound(size: int | None, value: int, **_: object) -> None:
            if over.is_set():
                raise _SlowError
            if value > most or (size or 0) > most:
                raise _UnusableError("is damaged: a file is larger than its listing says")

        try:
            self._copy(address, path, bound)
        except (FileNotFoundError, PermissionError, _UnusableError, _SlowError):
            raise
        except Exception:
            bound(None, 0)
            self._copy(address, path, bound)

    def _copy(self, address: str, path: Path, bound: Callable[..., None]) -> None:
        if getattr(self._fs, "async_impl", False):
            from fsspec.callbacks import Callback

            self._fs.get_file(self._with_query(address), str(path), callback=Callback(hooks={"bound": bound}))
            return
        count = 0
        with self._fs.open(address, "rb") as source, path.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                count += len(chunk)
                bound(None, count)
                target.write(chunk)

    # --- writing ---

    def offer(self, offer: Offer) -> None:
        """Write an entry that proved itself, beside the tests, unless it is there."""
        if self._left or not self._writes or offer.make_s < WORTH_S:
            return
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="trtcheck-shared-cache", daemon=True)
                self._writer.start()
        self._offers.put(offer)

    def finish(self, *, waits: bool = True) -> Tally:
        """End the writing, within a limit; what came of it all."""
        if self._writer is not None:
            left = sum(offer.make_s for offer in list(self._offers.queue) if offer is not None)
            least, most = _LEAVING_S
            self._offers.put(None)
            self._writer.join(min(most, max(least, left)) if waits else 0)
            if self._writer.is_alive():
                self._writes = False
                self._trouble("the run ended before all entries were written")
            self._writer = None
        return self.tally

    def _write_all(self) -> None:
        errors = 0
        self._import()
        while (offer := self._offers.get()) is not None:
            if not self._writes or self._left:
                continue
            try:
                self._write(offer)
                errors = 0
            except _UnusableError as error:
                if not self._left:
                    self._trouble(f"not written: an entry {error}")
            except Exception as error:
                errors += 1
                why = f"took longer than {max(_WRITING_S, offer.make_s):.0f} s"
                self._trouble(f"not written: {why if isinstance(error, _SlowError) else self._words(error)}")
                self._writes = errors < _ERRORS_IN_A_ROW and not isinstance(error, (PermissionError, _SlowError))

    def _write(self, offer: Offer) -> None:
        def work(over: threading.Event) -> bool:
            self._open()
            entry = self._entry(offer.key)
            if offer.key.digest not in self._unusable:
                with suppress(PermissionError):
                    if self._fs.exists(f"{entry}/{_LISTING}"):
                        return False
            files = {}
            for name, known in offer.files.items():
                found = checksum(offer.folder / name, hashed=True)
                if (found.size, found.crc) != (known.size, known.crc):
                    raise _UnusableError(f"is damaged here: {name}")
                assert found.sha256 is not None
                self._put(offer.folder / name, f"{entry}/{found.sha256}", over)
                files[name] = found.size, found.sha256
            key = offer.key
            listing = Listing(key.kind, key.subject, dict(key.parts), offer.created, offer.make_s, files)
            with scratch_folder("listing") as folder:
                path = Path(folder, _LISTING)
                path.write_bytes(listing.packed(self._secret))
                self._put(path, f"{entry}/{_LISTING}", over)
            return True

        self.tally.written += _limited(max(_WRITING_S, offer.make_s), work)
        offer.done()

    def _put(self, path: Path, address: str, over: threading.Event) -> None:
        if over.is_set():
            raise _SlowError
        if self.address.scheme != "file":
            self._fs.put_file(str(path), address)  # whole or not at all: so do object stores
            return
        part = f"{address}.part-{uuid4().hex}"
        try:
            self._fs.makedirs(self._fs._parent(address), exist_ok=True)
            self._fs.put_file(str(path), part)
            Path(part).replace(address)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(part)
            raise

    # --- the place ---

    def _import(self) -> None:
        from fsspec import get_filesystem_class

        with suppress(Exception):  # it will be told when it is opened
            get_filesystem_class(self.address.scheme)

    def _open(self) -> None:
        """Find the file system; an exception where the place may not be trusted."""
        if self._fs is not None:
            return
        from fsspec.core import url_to_fs

        for name in ("fsspec", "fsspec.http"):
            logging.getLogger(name).addFilter(self._masked)
        options = {"skip_instance_cache": True, "use_listings_cache": False, **_OPTIONS.get(self.address.scheme, {})}
        fs, root = url_to_fs(self.address.base, **options)
        if self.address.scheme == "file":
            why = None if Path(root).is_dir() else f"{root} is no folder"  # and is not made: it may not be mounted
            if why is None and self._secret is None and not self._trusts:
                who = exposed(Path(root), Path(root, _LAYOUT))
                why = who and f"{who}, and entries are not signed (--trt-cache-key, or --trt-cache-unsigned)"
            if why is not None:
                self._leave(why)
                raise _UnusableError("lies where nothing may be used")
        self._root, self._fs = str(root).rstrip("/"), fs

    def _masked(self, logged: logging.LogRecord) -> bool:
        """Whether a line of the library's is logged, as pytest shows where a test fails: all, without secrets."""
        logged.msg, logged.args = self.address.without_secrets(logged.getMessage()), ()
        return True

    def _entry(self, key: Key) -> str:
        # TensorRT's engines are bound to the operating system and the processor, and outputs differ in their last bits.
        return f"{self._root}/{_LAYOUT}/{sys.platform}-{platform.machine().lower()}/{key.kind}/{key.digest}"

    def _with_query(self, address: str) -> str:
        return f"{address}?{self.address.query}" if self.address.query else address

    # --- what went wrong ---

    def _weigh(self) -> None:
        if self._lost_s > PATIENCE_S and not self._left:
            self._leave(f"it took {self._lost_s:.0f} s more than it saved")

    def _leave(self, why: str) -> None:
        if not self._left:
            self._left = True
            self._trouble(f"left alone from here on: {why}")

    def _fail(self, doing: str, error: Exception) -> None:
        self._errors += 1
        if self._errors >= _ERRORS_IN_A_ROW:
            self._leave(f"{self._errors} errors in a row, the last {doing}: {self._words(error)}")
        else:
            self._trouble(f"{doing}: {self._words(error)}")

    def _unuse(self, key: Key, why: str) -> None:
        self._unusable.add(key.digest)
        if not self._left:
            self._trouble(f"an entry was not used, it {why}: {key.subject} ({key.kind})")

    def _trouble(self, text: str) -> None:
        with self._lock:
            self.tally.trouble(self.address.without_secrets(text))

    def _words(self, error: Exception) -> str:
        # Without the entry's own address, so that what went wrong several times is told once.
        said = re.sub(r":\s*\n\s*", ": ", str(error))  # "Parameter validation failed:", and what is wrong below
        text = re.sub(rf"/{_LAYOUT}/[^\s'\"]+", "/…", first_line(said))[:300] or repr(error)
        return f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Offer:
    """An entry to write: its files with what they must be like; `done` is called once it is there."""

    key: Key
    folder: Path
    files: Mapping[str, Checksum]
    created: float
    make_s: float
    done: Callable[[], None]


def _limited(seconds: float, work: Callable[[threading.Event], _T]) -> _T:
    """Do something on a thread of its own, which is left alone if it takes too long: no library's limits hold always.

    It is told by the event that nobody waits any more.
    """
    over = threading.Event()
    done: list[tuple[_T | None, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((work(over), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run, name="trtcheck-shared-cache", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:
        over.set()
    if not done:
        raise _SlowError
    found, error = done[0]
    if error is not None:
        raise error
    return found  # type: ignore[return-value] # work's own
