"""Writing a file so that a reader never sees half of it, and reading one that anybody may have written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_trtcheck.errors import FULL, LARGER_FILES, ArgumentError, ReportError
from pytest_trtcheck.record.held import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MOST_JSON_BYTES = 1 << 30
_MOST_DIGITS = 300
_BEGIN_S = 2.0
"""How long a thread may take to begin, on a machine with much to do."""
_OPEN_ALREADY = tuple(map(Path, ("/dev/stdout", "/dev/stderr", "/dev/fd", "/proc")))
"""What stands for something that a process has open: replacing it would lose what others still write there."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home directory for `~`; as it is where there is none, as for a container's nameless user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolved(path: Path) -> Path:
    """The path with all links followed; an OSError where they lead in a circle, in every version of Python."""
    try:
        return path.resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path)) from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading; an OSError if it is none: opening a pipe that nobody writes to has no end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def is_stream(path: Path) -> bool:
    """Whether what is written goes behind what is there, and nothing is replaced: a pipe, a device, `/dev/stdout`."""
    named = path.absolute()
    return any(named.is_relative_to(each) for each in _OPEN_ALREADY) or (path.exists() and not path.is_file())


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """What a regular file holds; an OSError if it is none, or holds more than `most` bytes."""
    with open_regular(path) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise OSError(errno.EFBIG, f"it holds more than {most:,} bytes", os.fspath(path))
    return found


def append(path: str | os.PathLike[str], text: str) -> None:
    """Put a text behind what a file holds, in one step; an OSError where that would wait: for who reads a pipe."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def answers(path: str | os.PathLike[str], seconds: float) -> bool:
    """Whether the file system of a path answers within a time; what hangs in the kernel does so in a thread of its own.

    A file is opened, since what else there is to ask, a network's file system may answer from memory.
    """
    import _thread
    import threading

    began, answered = threading.Event(), threading.Event()

    def look() -> None:
        began.set()
        with suppress(OSError):
            os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
        answered.set()

    # `threading.Thread.start` waits without end for a thread that found no memory to begin, which tells nothing of the
    # path.
    with suppress(RuntimeError):
        _thread.start_new_thread(look, ())
        if began.wait(min(seconds, _BEGIN_S)):
            return answered.wait(seconds)
    return True


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON in a file.

    Raises
    ------
    OSError
        It can't be read, or is no regular file.
    ValueError
        It is no JSON, no UTF-8, nested too deeply, or longer than 1 GiB.
    """
    with open_regular(path) as file:
        text = file.read(_MOST_JSON_BYTES + 1)
    if len(text) > _MOST_JSON_BYTES:
        raise ValueError("it is longer than 1 GiB")
    try:
        found = json.loads(text)
        if re.search(rb"\d{%d}" % _MOST_DIGITS, text) and (where := _too_long(found, "$")):
            raise ValueError(f"a number of {_MOST_DIGITS} digits or more - at `{where}`")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def _too_long(value: object, where: str) -> str | None:
    """Where a whole number stands that is larger than any float, and so than all that we count."""
    if isinstance(value, int) and abs(value) >= 10 ** (_MOST_DIGITS - 1):
        return where
    below: list[tuple[str, object]] = []
    if isinstance(value, dict):
        below = [(f"{where}.{key}", each) for key, each in value.items()]
    elif isinstance(value, list):
        below = [(f"{where}[{place}]", each) for place, each in enumerate(value)]
    return next(filter(None, (_too_long(each, place) for place, each in below)), None)


def file_name(nodeid: str) -> str:
    """A node id as the name of a file or folder: letters, digits, `.`, `_` and `-`, at most 100 of them."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", nodeid).strip("-.") or "check"
    return name if len(name) <= 100 else f"{name[:91]}-{hashlib.sha256(nodeid.encode()).hexdigest()[:8]}"


ANSWER_S = 60.0
"""The longest, in seconds, that the file system of a report may take to answer."""


def room_or(error: OSError, hint: str) -> str:
    """The hint for what can't be written: on a full disk, or beyond a file's size, another than elsewhere."""
    if error.errno == errno.EFBIG:
        return f"{LARGER_FILES}, or name another place"
    is_full = error.errno in FULL
    return "free some space there (or inodes: df -i), or name another place" if is_full else hint


def _no_answer(what: str) -> ReportError:
    return ReportError(
        f"{what}: its file system did not answer within {ANSWER_S:g} s",
        "see whether its server is up, or name another place",
        code="report-unwritable",
    )


def check_writable(path: Path, option: str, *, is_folder: bool = False, is_optional: bool = False) -> None:
    """See before the tests run that `path`, which `option` names, can be written; nothing is made.

    What is optional (a cache) has to be of the right kind alone.

    Raises
    ------
    ReportError
        It can't: what is there is of the other kind, or no directory on the way to it may be written to.
    """
    if not answers(path, ANSWER_S):
        if is_optional:
            return
        raise _no_answer(f"{option}: cannot write {path}")
    try:
        place = _place(path, option, is_folder=is_folder)
    except OSError as error:  # a folder on the way may not even be looked into, or the name is none
        if is_optional and isinstance(error, PermissionError):
            return
        raise ReportError(
            f"{option}: cannot write {path}: {error.strerror}", "name another place", code="report-unwritable"
        ) from error
    if not is_optional and not os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        raise ReportError(
            f"{option}: cannot write {path}: no permission to write to {place}",
            "name another place",
            code="report-unwritable",
        )


def _place(path: Path, option: str, *, is_folder: bool) -> Path:
    """What is written to where `path` is: what is there, or else the folder that it will be made in."""
    if is_folder and path.is_symlink() and not path.exists():
        raise ReportError(
            f"{option}: {path} is a link that leads nowhere",
            "make the folder that it leads to, or name another",
            code="report-unwritable",
        )
    if path.exists() and path.is_dir() != is_folder:
        raise ReportError(
            f"{option}: {path} is {'a directory' if path.is_dir() else 'no directory'}",
            "name a directory" if is_folder else "name a file in it",
            code="report-unwritable",
        )
    if is_stream(path) or (path.exists() and is_folder):
        return path
    place = resolved(path).parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ReportError(
            f"{option}: cannot write {path}: {place} is no directory", "name another place", code="report-unwritable"
        )
    return place


def require_apart(outputs: Mapping[str, str | None], inputs: Iterable[str]) -> None:
    """See that what a command writes, by its options, is not what it reads, nor all one file.

    A page is never written over a JSON file: in `merge --html a.json b.json` the page's name was forgotten.

    Raises
    ------
    ArgumentError
        It is.
    """
    # A circle of links is for who reads or writes there to tell of.
    taken = {Path(os.path.realpath(each)): "it is read here" for each in inputs}
    for option, given in outputs.items():
        path = Path(os.path.realpath(given)) if given else None
        if path is None:
            continue
        is_other = option == "--html" and path.suffix.lower() == ".json" and path.exists()
        if (why_not := taken.get(path, "it is no page, and is there" if is_other else None)) is not None:
            raise ArgumentError(f"{option} {given}: {why_not}", "name another file", code="argument-conflict")
        taken[path] = f"{option} names it too"


def write_text(path: str | os.PathLike[str], text: str, what: str = "the report") -> None:
    """Write `text` to `path` at once (a reader finds the old file or the new one), making parent directories.

    `what` names it in a message. What is a stream (`is_stream`) is written to directly.

    Raises
    ------
    ReportError
        `path` cannot be written.
    """
    target = Path(path)
    if not answers(target, ANSWER_S):
        raise _no_answer(f"cannot write {what} {path}")
    try:
        if target.is_dir():
            raise ReportError(
                f"cannot write {what} {path}: it is a directory", "name a file in it", code="report-unwritable"
            )
        if is_stream(target):
            with os.fdopen(_opened_stream(target), "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
            return
        # A link stays a link: what it points to is what gets replaced.
        target = resolved(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ReportError(
            f"cannot write {what} {path}: {error.strerror or error}",
            room_or(error, "name a file in a directory that can be written to"),
            code="report-unwritable",
        ) from error


def _opened_stream(path: Path) -> int:
    """A descriptor to write to a stream; an OSError where nobody comes to read from a pipe."""
    until = time.monotonic() + ANSWER_S
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > until:
                raise OSError(errno.ENXIO, f"nobody read from it within {ANSWER_S:g} s", os.fspath(path)) from None
            time.sleep(0.05)
            continue
        if sys.platform != "win32":
            os.set_blocking(descriptor, True)
        return descriptor
