"""Content hashes for keys, checksums against damage, and when a file's stat may stand for its content."""

from __future__ import annotations

import hashlib
import os
import stat
import time
import zlib
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[int, int, int, int, int]
"""(device, inode, size, mtime_ns, ctime_ns) of a file."""

_SETTLED_NS = 2_000_000_000
_CHUNK_BYTES = 1 << 18

_hashes: dict[Stamp, str] = {}


def stamp(path: Path) -> Stamp:
    """What `stat` knows of a regular file, links not followed.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    IsADirectoryError
        When it is anything but a regular file.
    """
    return _stamp(path.lstat(), path)


def _stamp(status: os.stat_result, path: Path) -> Stamp:
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError(f"{path} is not a regular file")
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def settled(*stamps: Stamp) -> bool:
    """Whether an equal stamp later proves equal content.

    File times are coarse (4 ms on ext4, 2 s on FAT): a file that was changed a moment ago can change again, keeping its
    size, without its stamp changing. So only files that were left alone for two seconds may be remembered.
    """
    now = time.time_ns()
    return all(now - max(mtime_ns, ctime_ns) > _SETTLED_NS for *_, mtime_ns, ctime_ns in stamps)


def checksum(path: Path) -> tuple[int, str]:
    """Size in bytes and CRC-32 of a file: several GB/s, and it guards against accidents, not against malice."""
    size, crc = 0, 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(view[:count], crc)
            size += count
    return size, f"{crc:08x}"


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """The SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hex; read once per process as long as the file stays as it is.

    Raises
    ------
    OSError
        When the file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        before = _stamp(os.fstat(file.fileno()), path)
        if (known := _hashes.get(before)) is not None:
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if settled(before) and _stamp(os.fstat(file.fileno()), path) == before:
            _hashes[before] = digest
    return digest
