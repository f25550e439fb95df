"""Content hashes for keys, checksums against damage, and when a file's stat may stand for its content."""

from __future__ import annotations

import errno
import functools
import hashlib
import hmac
import os
import stat
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_trtcheck.errors import ModelError, lacked_files, listed
from pytest_trtcheck.record.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable

_SETTLED_NS = 2_000_000_000
_CHUNK_BYTES = 1 << 18


class Stamp(NamedTuple):
    """What `stat` knows of a file's content."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


_hashes: dict[Stamp, str] = {}


def stamp(file: Path | int) -> Stamp:
    """The stamp of a regular file, given by its path (links are not followed) or open; an OSError if it is none."""
    status = os.fstat(file) if isinstance(file, int) else file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def settled(*stamps: Stamp) -> bool:
    """Whether an equal stamp later proves equal content.

    File times are coarse (4 ms on ext4, 2 s on FAT): a file that was changed a moment ago can change again, keeping its
    size, without its stamp changing. So only files that were left alone for two seconds may be remembered.
    """
    now = time.time_ns()
    return all(now - max(stamp.mtime_ns, stamp.ctime_ns) > _SETTLED_NS for stamp in stamps)


class Checksum(NamedTuple):
    """Size in bytes, CRC-32 and SHA-256 of a file, in hex; the last where it is needed alone."""

    size: int
    crc: str
    sha256: str | None = None


def checksum(path: Path, *, hashed: bool = False) -> Checksum:
    """What a file is: by CRC-32 alone at several GB/s, against accidents; hashed as well, against malice."""
    size, crc, sha256 = 0, 0, hashlib.sha256() if hashed else None
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
            if sha256 is not None:
                sha256.update(chunk)
    return Checksum(size, f"{crc:08x}", None if sha256 is None else sha256.hexdigest())


def sign(secret: bytes, purpose: bytes, data: bytes) -> str:
    """The HMAC-SHA-256 of `data`, in hex; what was signed for one purpose does not hold for another."""
    return hmac.new(secret, b"%d:%s%s" % (len(purpose), purpose, data), hashlib.sha256).hexdigest()


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """The SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """The SHA-256 of some small files' contents, one after the other, in hex."""
    return hash_bytes(b"\0".join(path.read_bytes() for path in paths))


@functools.cache
def hash_code(*globs: str) -> str:
    """Identity of modules of this package, given from its folder on: of the code that decides what is cached."""
    package = Path(__file__).parents[1]
    return hash_files(path for each in globs for path in sorted(package.glob(each)))


def hash_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hex; read once per process as long as the file stays as it is.

    Raises
    ------
    OSError
        When the file cannot be read.
    """
    return hashed(Path(path)).digest


class HashedFile(NamedTuple):
    """A file as it was when a hash of it was taken, which something is kept under.

    Parameters
    ----------
    path
        As it will be opened: a link may lead elsewhere by then.
    stamp
        What `stat` said before it was read.
    is_settled
        Whether an equal stamp proves equal content (`settled`).
    sha256
        Of its content; None where it is known by its stamp alone.
    """

    path: Path
    stamp: Stamp
    is_settled: bool
    sha256: str | None = None

    @property
    def digest(self) -> str:
        """The SHA-256 of its content, in hex; of what it holds now, where it was known by its stamp alone."""
        return self.sha256 or hash_file(self.path)

    @property
    def is_same(self) -> bool:
        """Whether what was read since then was what was hashed.

        A stamp moves where the content does not: by a chmod, a hard link, or a file of the same bytes that took its
        place, as where each worker of a run exports one model. So another stamp's content is read and compared. What
        was written to in place is another one even with equal content: who read it meanwhile saw parts. A file that
        was exchanged for another one and back again, both by renaming, is taken for the same: nothing tells that from
        two exports of the same bytes.

        Raises
        ------
        OSError
            Too many other files are open, which says nothing of this one.
        """
        try:
            with open_regular(self.path) as file:  # which asks a network's server; `stat` may answer from memory
                now = stamp(file.fileno())
            if now == self.stamp and self.is_settled:
                return True
            was_written = now[:2] == self.stamp[:2] and now[2:4] != self.stamp[2:4]  # one inode, another size or mtime
            return not was_written and self.sha256 is not None and hash_file(self.path) == self.sha256
        except OSError as error:
            if lacked_files(error):
                raise
            return False


def hashed(path: Path) -> HashedFile:
    """The file as it is now; read once per process as long as it stays as it is.

    Raises
    ------
    OSError
        When it cannot be read.
    """
    with open_regular(path) as file:
        before = stamp(file.fileno())
        is_settled = settled(before)
        digest = _hashes.get(before)
        if digest is None:
            sha256 = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest.
            while chunk := file.read(_CHUNK_BYTES):
                sha256.update(chunk)
            digest = sha256.hexdigest()
            if is_settled and stamp(file.fileno()) == before:
                _hashes[before] = digest
    return HashedFile(path, before, is_settled, digest)


def require_same(files: Iterable[HashedFile]) -> None:
    """See that what was read after the hashes were taken was what they are of.

    Raises
    ------
    ModelError
        A file is another one now, or gone.
    """
    changed = [str(file.path) for file in files if not file.is_same]
    if changed:
        raise ModelError(
            f"{listed(changed)}: {'was' if len(changed) == 1 else 'were'} changed on disk during the check",
            "let nothing write there during the run, or give the check a copy; then run the test again",
            code="model-changed",
        )
