"""The manifest of an entry: what it was made from and what its files must look like. Written last, trusted never."""

from __future__ import annotations

import errno
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache.hashing import Stamp, checksum, stamp
from pytest_trtcheck.cache.key import Key

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFEST = "meta.json"
FILES = "files"

# A block that the disk cannot give back is damage like any other: the entry can be made again.
_UNREADABLE = frozenset({errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP})


class DamagedError(Exception):
    """An entry is not what was stored; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What is stored about one entry.

    `created` is in seconds since the epoch; `make_s` is how long making took, in seconds; `files` maps each file's
    path (relative, with slashes) to its size in bytes and its CRC-32 in hex.
    """

    kind: str
    subject: str
    parts: Mapping[str, str]
    created: float
    make_s: float
    files: Mapping[str, tuple[int, str]]

    @property
    def key(self) -> Key:
        """The key that the entry was stored under."""
        return Key(self.kind, self.subject, self.parts)


def describe_files(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and CRC-32 of every file below `directory`.

    Raises
    ------
    ValueError
        When something below it is neither a directory nor a regular file.
    """
    found: dict[str, tuple[int, str]] = {}
    for folder, folders, names in os.walk(directory):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"{path.relative_to(directory)}: only regular files can be stored")
            if path.is_file():
                found[path.relative_to(directory).as_posix()] = checksum(path)
    return dict(sorted(found.items()))


def write_manifest(entry: Path, manifest: Manifest) -> None:
    """Write the manifest of the entry in the directory `entry`."""
    body = asdict(manifest)
    text = json.dumps({"crc32": _crc(body), "manifest": body}, indent=1, ensure_ascii=True)
    (entry / MANIFEST).write_text(text, encoding="ascii")


def read_manifest(entry: Path) -> Manifest:
    """The manifest of the entry in the directory `entry`, checked against its own checksum and the directory's name.

    Raises
    ------
    DamagedError
        When it is missing, cut off or altered.
    """
    try:
        document = json.loads((entry / MANIFEST).read_bytes())
        body = document["manifest"]
        if document["crc32"] != _crc(body):
            raise DamagedError(f"{MANIFEST} does not match its checksum")
        body["files"] = {name: (int(size), str(crc)) for name, (size, crc) in body["files"].items()}
        manifest = Manifest(**body)
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise _damage_or_not(error, MANIFEST) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{MANIFEST} cannot be read") from None
    if manifest.key.digest != entry.name:
        raise DamagedError(f"{MANIFEST} belongs to another entry")
    return manifest


def verify_files(entry: Path, manifest: Manifest) -> dict[Path, Stamp]:
    """Check every file of an entry against its manifest.

    Returns
    -------
    The stamps of the files and the manifest: as long as they stay, once they are settled, so does the content.

    Raises
    ------
    DamagedError
        When a file is missing, cut off or altered.
    """
    stamps = {}
    expected = [(name, entry / FILES / name, form) for name, form in manifest.files.items()]
    for name, path, form in [*expected, (MANIFEST, entry / MANIFEST, None)]:
        try:
            stamps[path] = stamp(path)
            size = stamps[path][2]
            if form is not None and size != form[0]:
                raise DamagedError(f"{name} has {size} bytes instead of {form[0]}")
            if form is not None and checksum(path) != form:
                raise DamagedError(f"{name} does not match its checksum")
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise _damage_or_not(error, name) from error
    return stamps


def _damage_or_not(error: OSError, name: str) -> Exception:
    if error.errno in _UNREADABLE or isinstance(error, IsADirectoryError):
        return DamagedError(f"{name} cannot be read: {error.strerror or 'not a regular file'}")
    return error


def _crc(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True, ensure_ascii=True).encode('ascii')):08x}"
