"""What the cache holds, as data and as a table for people."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.cache.key import is_hash
from pytest_trtcheck.cache.manifest import DamagedError, read_manifest
from pytest_trtcheck.cache.place import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LAST_USE = "used"
"""The empty file in an entry whose time of modification is that of the entry's last use."""

_LONGEST_DETAIL_VALUE = 16
# Values that say that an option was left alone.
_NOTHING = frozenset({"", "none", "false", "null", "[]", "()", "{}"})
_SHARE_OF_SUBJECT = 0.45
_GAP = "  "


@dataclass(frozen=True)
class StoredEntry:
    """One entry in the cache. `bytes` counts everything attached; times are in seconds since the epoch.

    Of a `damaged` entry only the place, the size and the last use are known.
    """

    path: Path
    kind: str
    digest: str
    subject: str
    parts: Mapping[str, str]
    bytes: int
    created: float
    last_used: float
    damaged: bool = False

    @property
    def name(self) -> str:
        """How the cache calls the entry: kind/digest."""
        return f"{self.kind}/{self.digest}"


def stored_entry(directory: Path) -> StoredEntry | None:
    """What lies in one entry's directory (its manifest is checked, its files are not); None when it is gone."""
    size, last_used = 0, 0.0
    try:
        for folder, _, names in os.walk(directory):
            for name in names:
                size += Path(folder, name).lstat().st_size
        last_used = (directory / LAST_USE).stat().st_mtime
    except FileNotFoundError:
        if not directory.is_dir():
            return None
    kind, digest = directory.parent.name, directory.name
    try:
        manifest = read_manifest(directory)
    except DamagedError:
        return StoredEntry(directory, kind, digest, "(damaged)", {}, size, last_used, last_used, damaged=True)
    return StoredEntry(directory, kind, digest, manifest.subject, manifest.parts, size, manifest.created, last_used)


def table(root: Path, entries: Sequence[StoredEntry], max_bytes: int | None, now: float, width: int) -> str:
    """The entries as a table of at most `width` columns (the root's own line excepted), totals last."""
    if not entries:
        return f"trtcheck cache: {root}\nempty"
    fixed = [
        (entry.kind, format_bytes(entry.bytes), _span(now - entry.created), _span(now - entry.last_used))
        for entry in entries
    ]
    heads = ("kind", "size", "age", "last use")
    kind_w, size_w, age_w, use_w = (
        max(len(head), *(len(row[column]) for row in fixed)) for column, head in enumerate(heads)
    )
    room = max(20, width - kind_w - size_w - age_w - use_w - 5 * len(_GAP))
    subject_w = min(max(len("subject"), *(len(entry.subject) for entry in entries)), int(room * _SHARE_OF_SUBJECT))
    details = [_cut(_details(entry.parts), room - subject_w) for entry in entries]
    detail_w = max(len("made from"), *(len(detail) for detail in details))

    lines = [f"trtcheck cache: {root}"]
    rows = [heads, *fixed]
    texts = [
        ("subject", "made from"),
        *((entry.subject, detail) for entry, detail in zip(entries, details, strict=True)),
    ]
    for (kind, size, age, use), (subject, detail) in zip(rows, texts, strict=True):
        cells = (
            f"{kind:<{kind_w}}",
            f"{_cut(subject, subject_w):<{subject_w}}",
            f"{detail:<{detail_w}}",
            f"{size:>{size_w}}",
            f"{age:>{age_w}}",
            f"{use:>{use_w}}",
        )
        lines.append(_GAP.join(cells))
    total = format_bytes(sum(entry.bytes for entry in entries))
    limit = "no limit" if max_bytes is None else f"limit {format_bytes(max_bytes)}"
    lines.append(f"{_count(len(entries))}, {total} ({limit})")
    by_kind = itertools.groupby(sorted(entries, key=lambda entry: entry.kind), key=lambda entry: entry.kind)
    for kind, group in by_kind:
        members = list(group)
        lines.append(f"  {kind}: {_count(len(members))}, {format_bytes(sum(entry.bytes for entry in members))}")
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number} entry" if number == 1 else f"{number} entries"


def _details(parts: Mapping[str, str]) -> str:
    """The parts that a person can read: short, not a hash, not an option left alone; the precision first."""
    readable = {
        name: value
        for name, value in parts.items()
        if len(value) <= _LONGEST_DETAIL_VALUE and value.lower() not in _NOTHING and not is_hash(value)
    }
    precision = readable.pop("precision", None)
    words = [f"{name}={value}" for name, value in readable.items()]
    return " ".join(words if precision is None else [precision, *words])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _span(seconds: float) -> str:
    """A time span in its largest unit: "3 min"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"
