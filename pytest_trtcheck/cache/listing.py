"""What the cache holds, as data and as a table for people."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.cache.directory import format_bytes, tree_bytes
from pytest_trtcheck.cache.key import is_hash
from pytest_trtcheck.cache.manifest import DamagedError, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LONGEST_DETAIL_VALUE = 16
# Values that say that an option was left alone.
_NOTHING = frozenset({"", "none", "false", "null", "[]", "()", "{}"})
_HEADS = ("kind", "subject", "made from", "size", "age", "last use")
_ALIGNMENT = "<<<>>>"
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


def stored_entry(directory: Path) -> StoredEntry | None:
    """What lies in one entry's directory (its manifest is checked, its files are not); None when it is gone."""
    try:
        last_used = directory.stat().st_mtime
    except FileNotFoundError:
        return None
    size = tree_bytes(directory)
    kind, digest = directory.parent.name, directory.name
    try:
        manifest = read_manifest(directory)
    except DamagedError:
        return StoredEntry(directory, kind, digest, "(damaged)", {}, size, last_used, last_used, damaged=True)
    key = manifest.key
    return StoredEntry(directory, kind, digest, key.subject, key.parts, size, manifest.created, last_used)


def table(root: Path, entries: Sequence[StoredEntry], max_bytes: int | None, now: float, width: int) -> str:
    """The entries as a table of at most `width` columns (the root's own line excepted), totals last."""
    lines = [f"trtcheck cache: {root}"]
    if not entries:
        return f"{lines[0]}\nempty"
    rows = [_HEADS, *(_row(entry, now) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Two columns give way: the subject, and what the entry was made from.
    room = max(20, width - widths[0] - sum(widths[3:]) - len(_GAP) * (len(widths) - 1))
    widths[1] = min(widths[1], int(room * _SHARE_OF_SUBJECT))
    widths[2] = min(widths[2], room - widths[1])
    for row in rows:
        cells = zip(row, _ALIGNMENT, widths, strict=True)
        lines.append(_GAP.join(f"{_cut(cell, size):{side}{size}}" for cell, side, size in cells))
    limit = "no limit" if max_bytes is None else f"limit {format_bytes(max_bytes)}"
    lines.append(f"{_total(entries)} ({limit})")
    by_kind = defaultdict(list)
    for entry in entries:
        by_kind[entry.kind].append(entry)
    return "\n".join([*lines, *(f"  {kind}: {_total(members)}" for kind, members in sorted(by_kind.items()))])


def _row(entry: StoredEntry, now: float) -> tuple[str, ...]:
    times = (_span(now - entry.created), _span(now - entry.last_used))
    return (entry.kind, entry.subject, _details(entry.parts), format_bytes(entry.bytes), *times)


def _total(entries: Sequence[StoredEntry]) -> str:
    noun = "entry" if len(entries) == 1 else "entries"
    return f"{len(entries)} {noun}, {format_bytes(sum(entry.bytes for entry in entries))}"


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
