"""What the cache holds, as data and as a table for people."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from pytest_trtcheck.cache.directory import format_bytes, tree_bytes
from pytest_trtcheck.cache.manifest import DamagedError, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_WORDS = {
    "engine": "engine",
    "provider_engine": "engine of ONNX Runtime",
    "lowered": "lowered model",
    "exported": "export to ONNX",
    "reference": "reference outputs",
    "emulation": "emulated outputs",
    "calibration": "calibrated ranges",
    "blame": "diagnosis",
    "timing": "timing cache",
}
"""What people call what an entry holds; the rest is what is known of a model without reading it again."""
_REST = "what is known of it"
_OTHERS = {"samples": "(calibration data)"}
"""Kinds that belong to no model."""
_LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_NOTHING = ("", "[]", "null", "None")
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


def model_of(entry: StoredEntry) -> str:
    """The model that an entry belongs to, as its user called it."""
    if entry.damaged:
        return "(damaged)"
    return _OTHERS.get(entry.kind) or re.sub(r" in [a-z0-9+]+$", "", entry.subject)


def is_of(entry: StoredEntry, model: str) -> bool:
    """Whether an entry belongs to the model that a person names: by its path, its file's name, or a glob of one."""
    found = model_of(entry)
    return any(name == model or fnmatch(name, model) for name in (found, found.replace("\\", "/").rpartition("/")[2]))


def table(
    root: Path,
    entries: Sequence[StoredEntry],
    max_bytes: int | None,
    now: float,
    *,
    width: int,
    whole: float | None = None,
) -> str:
    """The entries by model in at most `width` columns, the largest model first, totals last.

    Parameters
    ----------
    whole
        Bytes of all entries, where `entries` are those of some models.
    """
    place = f"trtcheck cache: {root}"
    if not entries:
        return f"{place}\nempty"
    models: dict[str, list[StoredEntry]] = defaultdict(list)
    for entry in entries:
        models[model_of(entry)].append(entry)
    lines = [_cut(place, width) if len(place) > width else place]
    for model, found in sorted(models.items(), key=lambda each: (-sum(e.bytes for e in each[1]), each[0])):
        lines += ["", _row(model, found, now, width), *_rows(found, now, width)]
    limit = "no limit" if max_bytes is None else f"limit {format_bytes(max_bytes)}"
    of_all = "" if whole is None else f" of {format_bytes(int(whole))}"
    return "\n".join([*lines, "", f"{_total(entries)}{of_all} ({limit})"])


def _rows(entries: Sequence[StoredEntry], now: float, width: int) -> list[str]:
    """What a model has, in words: each engine, and the other things by kind and precision."""
    found: dict[tuple[int, str], list[StoredEntry]] = defaultdict(list)
    kinds = [*_WORDS]
    for entry in entries:
        place = kinds.index(entry.kind) if entry.kind in _WORDS else len(kinds)
        found[place, _described(entry)].append(entry)
    return [_row(f"  {text}", members, now, width) for (_, text), members in sorted(found.items())]


def _described(entry: StoredEntry) -> str:
    if entry.kind not in _WORDS:
        return _REST
    parts = entry.parts
    words = [parts.get("precision", "")]
    if entry.kind.endswith("engine"):
        library = _LIBRARIES.get(parts.get("module", ""), "")
        gpu = parts.get("gpu") or parts.get("name") or parts.get("compute_capability", "")
        words += [gpu.strip('"'), f"{library} {parts.get('tensorrt', '')}".strip()]
    if parts.get("keep_fp32", "") not in _NOTHING:
        words.append(f"keep_fp32={parts['keep_fp32']}")
    said = ", ".join(filter(None, words))
    return _WORDS[entry.kind] + (f": {said}" if said else "")


def _row(text: str, entries: Sequence[StoredEntry], now: float, width: int) -> str:
    """One line: what it is, how many, how large, and when it was last used."""
    count = f"{len(entries)} ×" if len(entries) > 1 and text.startswith(" ") else ""
    used = f"used {_span(now - max(entry.last_used for entry in entries))} ago"
    size = format_bytes(sum(entry.bytes for entry in entries))
    right = f"{count:>6}{_GAP}{size:>9}{_GAP}{used:<15}".rstrip()
    room = max(20, width - len(f"{'':>6}{_GAP}{'':>9}{_GAP}{'':<15}") - len(_GAP))
    return f"{_cut(text, room):<{room}}{_GAP}{right}"


def _total(entries: Sequence[StoredEntry]) -> str:
    noun = "entry" if len(entries) == 1 else "entries"
    return f"{len(entries)} {noun}, {format_bytes(sum(entry.bytes for entry in entries))}"


def _cut(text: str, width: int) -> str:
    """The text in at most so many columns: what tells paths apart is their end, and their beginning."""
    if len(text) <= width:
        return text
    indent = len(text) - len(text.lstrip())
    tail = (width - indent - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _span(seconds: float) -> str:
    """A time span in its largest unit: "3 min"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"
