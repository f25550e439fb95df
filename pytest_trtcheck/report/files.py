"""Writing a report file so that a reader never sees half of it."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_trtcheck.errors import ReportError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` at once (a reader finds the old file or the new one), making parent directories.

    What is no regular file, such as a pipe or anything in `/dev`, is written to directly.

    Raises
    ------
    ReportError
        `path` cannot be written.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise ReportError(f"cannot write the report {path}: it is a directory", "name a file in it")
        # Replacing what /dev/stdout is redirected to would lose what others still write there.
        if Path("/dev") in target.absolute().parents or (target.exists() and not target.is_file()):
            with target.open("a", encoding="utf-8") as stream:
                stream.write(text)
            return
        # A link stays a link: what it points to is what gets replaced.
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(
            f"cannot write the report {path}: {error.strerror or error}",
            "name a file in a directory that can be written to",
        ) from error
