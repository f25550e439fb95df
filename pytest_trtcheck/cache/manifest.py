"""The manifest of an entry: what it was made from and what its files must look like. Written last, trusted never."""

from __future__ import annotations

import functools
import hmac
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pytest_trtcheck.cache.hashing import Checksum, Stamp, checksum, sign, stamp
from pytest_trtcheck.cache.key import Key
from pytest_trtcheck.errors import MISREAD, first_line, lacked_files
from pytest_trtcheck.record.files import read_bytes
from pytest_trtcheck.record.held import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MANIFEST = "manifest"
FILES = "files"
VERIFIED = "verified"
_MOST_BYTES = 64 << 20
"""A manifest that is larger is none of ours: one of ten thousand files has a tenth of it."""
_WORTH_REMEMBERING = 1 << 20
"""Bytes from which on reading them again costs more than looking this up."""


class DamagedError(Exception):
    """An entry is not what was stored; the text names the file and what is wrong with it."""


class UnsignedError(DamagedError):
    """An entry was not made by somebody who knows the secret, or was changed since."""


@dataclass(frozen=True)
class Manifest:
    """What is stored about one entry.

    `created` is in seconds since the epoch; `make_s` is how long making took, in seconds; `files` maps each file's
    path (relative, with slashes) to what it must be like: with a SHA-256 in a cache whose entries are signed.
    """

    key: Key
    created: float
    make_s: float
    files: Mapping[str, Checksum]


def describe_files(directory: Path, *, hashed: bool = False) -> dict[str, Checksum]:
    """What every file below `directory` is; a ValueError where one is neither directory nor regular file."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{name}: only regular files can be stored")
        if path.is_file():
            found[name] = checksum(path, hashed=hashed)
    return found


def _sealed(text: bytes, name: str, secret: bytes | None) -> bytes:
    """A text below a line with its CRC-32, and its signature if there is a secret."""
    signature = b"" if secret is None else b" " + sign(secret, name.encode(), text).encode()
    return b"%08x%s\n%s" % (zlib.crc32(text), signature, text)


def _unsealed(data: bytes, name: str, secret: bytes | None) -> bytes:
    """What was sealed; a DamagedError where it was changed since, or is not signed."""
    head, _, text = data.partition(b"\n")
    crc, _, signature = head.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        raise DamagedError(f"{name} does not match its checksum")
    if secret is not None and not hmac.compare_digest(signature, sign(secret, name.encode(), text).encode()):
        raise UnsignedError(f"{name} is not signed with the key of --trt-cache-key")
    return text


def write_manifest(entry: Path, manifest: Manifest, secret: bytes | None = None) -> None:
    """Write the manifest of the entry in the directory `entry`, signed if there is a secret."""
    text = json.dumps(asdict(manifest), indent=1).encode("ascii")
    (entry / MANIFEST).write_bytes(_sealed(text, MANIFEST, secret))


def read_manifest(entry: Path, secret: bytes | None = None) -> Manifest:
    """The manifest of the entry in the directory `entry`; a DamagedError where it is not as it was written there."""
    try:
        text = _unsealed(read_bytes(entry / MANIFEST, _MOST_BYTES), MANIFEST, secret)
    except OSError as error:
        raise _damage(error, MANIFEST) from error
    try:
        body = json.loads(text)
        key = Key(**body["key"])
        is_of_entry = key.digest == entry.name
        files = {_inside(name): _as_checksum(*found) for name, found in body["files"].items()}
        found = Manifest(key, float(body["created"]), float(body["make_s"]), files)
    except MISREAD as error:
        raise DamagedError(f"{MANIFEST} is not understood: {first_line(error)}") from error
    if not is_of_entry:
        raise DamagedError(f"{MANIFEST} belongs to another entry")
    return found


def _as_checksum(size: int, crc: str, sha256: str | None = None) -> Checksum:
    return Checksum(int(size), str(crc), None if sha256 is None else str(sha256))


def _inside(name: str) -> str:
    """The name of a file, unless it leads out of the entry: a ValueError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} leads out of the entry")
    return name


@functools.lru_cache(maxsize=10_000)
def recall_manifest(entry: Path) -> Manifest:
    """As `read_manifest`, once per process: what an entry was made from never changes."""
    return read_manifest(entry)


def refuse_others(entry: Path, manifest: Manifest) -> None:
    """See that nothing lies among the files of an entry that was not stored there: some are looked for by name.

    Raises
    ------
    DamagedError
        Something does.
    """
    try:
        stray = next((name for name in _names(entry / FILES) if name not in manifest.files), None)
    except FileNotFoundError:
        return  # which files are missing is looked at elsewhere
    except OSError as error:
        raise _damage(error, FILES) from error
    if stray is not None:
        raise DamagedError(f"{stray} was not stored there")


def _names(folder: str | os.PathLike[str], within: str = "") -> Iterator[str]:
    with os.scandir(folder) as found:
        for each in found:
            if each.is_dir(follow_symlinks=False):
                yield from _names(each.path, f"{within}{each.name}/")
            else:
                yield f"{within}{each.name}"


def verify_files(entry: Path, manifest: Manifest, *, hashed: bool = False) -> dict[Path, Stamp]:
    """Check every file of an entry against its manifest; a DamagedError where one is missing or altered.

    Returns the stamps of the files and the manifest: as long as they stay, once they are settled, so does the content.
    """
    stamps = {}
    try:
        name = MANIFEST
        stamps[entry / MANIFEST] = stamp(entry / MANIFEST)
        for name, known in manifest.files.items():
            path = entry / FILES / name
            stamps[path] = stamp(path)
            if stamps[path].size != known.size:
                raise DamagedError(f"{name} has {stamps[path].size:,} bytes instead of {known.size:,}")
            found = checksum(path, hashed=hashed)
            if found[:2] != known[:2] or (hashed and found != known):
                raise DamagedError(f"{name} does not match its checksum")
    except OSError as error:
        raise _damage(error, name) from error
    return stamps


def remember_verified(entry: Path, stamps: Mapping[Path, Stamp], secret: bytes | None = None) -> None:
    """Keep for later processes that these files were read and found right; a cache that is read-only does not learn.

    Whoever changes a file changes its stamp with it, so that what is remembered does not hide any damage but that
    which the disk itself does in silence.
    """
    if sum(each.size for each in stamps.values()) < _WORTH_REMEMBERING:
        return
    text = json.dumps({path.relative_to(entry).as_posix(): each for path, each in stamps.items()}).encode()
    with suppress(OSError), replacing(entry / VERIFIED) as part:
        part.write_bytes(_sealed(text, VERIFIED, secret))


def recall_verified(entry: Path, manifest: Manifest, secret: bytes | None = None) -> dict[Path, Stamp] | None:
    """The files' stamps where all of them are those that `remember_verified` kept; None otherwise."""
    try:
        kept = json.loads(_unsealed(read_bytes(entry / VERIFIED, _MOST_BYTES), VERIFIED, secret))
        stamps = {path: stamp(path) for path in [entry / MANIFEST, *(entry / FILES / name for name in manifest.files)]}
    except (OSError, ValueError, RecursionError, DamagedError):
        return None
    now = {path.relative_to(entry).as_posix(): list(each) for path, each in stamps.items()}
    return stamps if kept == now else None


def _damage(error: OSError, name: str) -> DamagedError:
    if lacked_files(error):
        raise error
    # A block that the disk cannot give back is damage like any other: the entry can be made again.
    missing = isinstance(error, FileNotFoundError)
    return DamagedError(f"{name} is missing" if missing else f"{name} cannot be read: {error.strerror or error}")
