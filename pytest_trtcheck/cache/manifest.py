"""The manifest of an entry: what it was made from and what its files must look like. Written last, trusted never."""

from __future__ import annotations

import functools
import json
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pytest_trtcheck.cache.hashing import Stamp, checksum, stamp
from pytest_trtcheck.cache.key import Key
from pytest_trtcheck.errors import first_line
from pytest_trtcheck.record.files import read_bytes
from pytest_trtcheck.record.held import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping
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


@dataclass(frozen=True)
class Manifest:
    """What is stored about one entry.

    `created` is in seconds since the epoch; `make_s` is how long making took, in seconds; `files` maps each file's
    path (relative, with slashes) to its size in bytes and its CRC-32 in hex.
    """

    key: Key
    created: float
    make_s: float
    files: Mapping[str, tuple[int, str]]


def describe_files(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and CRC-32 of every file below `directory`; a ValueError where one is neither directory nor regular file."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{name}: only regular files can be stored")
        if path.is_file():
            found[name] = checksum(path)
    return found


def write_manifest(entry: Path, manifest: Manifest) -> None:
    """Write the manifest of the entry in the directory `entry`: a line with the CRC-32 of the JSON below it."""
    text = json.dumps(asdict(manifest), indent=1).encode("ascii")
    (entry / MANIFEST).write_bytes(b"%08x\n%s" % (zlib.crc32(text), text))


def read_manifest(entry: Path) -> Manifest:
    """The manifest of the entry in the directory `entry`; a DamagedError where it is not as it was written there."""
    try:
        crc, _, text = read_bytes(entry / MANIFEST, _MOST_BYTES).partition(b"\n")
    except OSError as error:
        raise _damage(error, MANIFEST) from error
    if crc != b"%08x" % zlib.crc32(text):
        raise DamagedError(f"{MANIFEST} does not match its checksum")
    try:
        body = json.loads(text)
        key = Key(**body["key"])
        is_of_entry = key.digest == entry.name
        files = {_inside(name): (int(size), str(crc)) for name, (size, crc) in body["files"].items()}
        found = Manifest(key, float(body["created"]), float(body["make_s"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not understood: {first_line(error)}") from error
    if not is_of_entry:
        raise DamagedError(f"{MANIFEST} belongs to another entry")
    return found


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


def verify_files(entry: Path, manifest: Manifest) -> dict[Path, Stamp]:
    """Check every file of an entry against its manifest; a DamagedError where one is missing or altered.

    Returns the stamps of the files and the manifest: as long as they stay, once they are settled, so does the content.
    """
    stamps = {}
    try:
        name = MANIFEST
        stamps[entry / MANIFEST] = stamp(entry / MANIFEST)
        for name, (size, crc) in manifest.files.items():
            path = entry / FILES / name
            stamps[path] = stamp(path)
            if stamps[path].size != size:
                raise DamagedError(f"{name} has {stamps[path].size} bytes instead of {size}")
            if checksum(path) != (size, crc):
                raise DamagedError(f"{name} does not match its checksum")
    except OSError as error:
        raise _damage(error, name) from error
    return stamps


def remember_verified(entry: Path, stamps: Mapping[Path, Stamp]) -> None:
    """Keep for later processes that these files were read and found right; a cache that is read-only does not learn.

    Whoever changes a file changes its stamp with it, so that what is remembered does not hide any damage but that
    which the disk itself does in silence.
    """
    if sum(each.size for each in stamps.values()) < _WORTH_REMEMBERING:
        return
    text = json.dumps({path.relative_to(entry).as_posix(): each for path, each in stamps.items()})
    with suppress(OSError), replacing(entry / VERIFIED) as part:
        part.write_text(text)


def recall_verified(entry: Path, manifest: Manifest) -> dict[Path, Stamp] | None:
    """The files' stamps where all of them are those that `remember_verified` kept; None otherwise."""
    try:
        kept = json.loads(read_bytes(entry / VERIFIED, _MOST_BYTES))
        stamps = {path: stamp(path) for path in [entry / MANIFEST, *(entry / FILES / name for name in manifest.files)]}
    except (OSError, ValueError, RecursionError):
        return None
    now = {path.relative_to(entry).as_posix(): list(each) for path, each in stamps.items()}
    return stamps if kept == now else None


def _damage(error: OSError, name: str) -> DamagedError:
    # A block that the disk cannot give back is damage like any other: the entry can be made again.
    missing = isinstance(error, FileNotFoundError)
    return DamagedError(f"{name} is missing" if missing else f"{name} cannot be read: {error.strerror or error}")
