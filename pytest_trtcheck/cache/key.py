"""What an entry was made from, and how two such descriptions differ."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_KIND = re.compile(r"[a-z][a-z0-9_]*")
_HEX = re.compile(r"[0-9a-f]{16,}")
_LONGEST_VALUE = 40
_MOST_PARTS_NAMED = 4


@dataclass(frozen=True)
class Key:
    """What a directory was made from.

    Parameters
    ----------
    kind
        What sort of thing it is ("engine", "lowered", …): lower-case letters, digits and underscores.
    subject
        What people call it, such as the model's name. No part of the digest: a renamed model is the same model.
    parts
        Everything that decides the content, by name: hashes of inputs, options, versions.
    """

    kind: str
    subject: str
    parts: Mapping[str, str]

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind):
            raise ValueError(f"kind {self.kind!r}: expected lower-case letters, digits and underscores")
        for name, value in self.parts.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"part {name!r}: expected a str name and a str value, got {value!r}")
        # A copy, so that the key of an entry cannot change behind its digest.
        object.__setattr__(self, "parts", dict(sorted(self.parts.items())))

    def __hash__(self) -> int:
        return hash((self.digest, self.subject))

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over the kind and the sorted parts, each string preceded by its length."""
        digest = hashlib.sha256()
        for text in (self.kind, *(text for part in sorted(self.parts.items()) for text in part)):
            # surrogatepass: a file name that is no UTF-8 is a str with lone surrogates, and still a name.
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(encoded))
            digest.update(encoded)
        return digest.hexdigest()


def differing_parts(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names of the parts that differ or that only one of both has, in the order of `new`."""
    return [name for name in [*new, *(name for name in old if name not in new)] if old.get(name) != new.get(name)]


def describe_change(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The parts that changed, as "precision: fp16 → int8; model: 3fa91b2c → 77c1e0aa"."""
    names = differing_parts(old, new)
    changes = []
    for name in names[:_MOST_PARTS_NAMED]:
        before, after = _shorten(old.get(name), new.get(name))
        changes.append(f"{name}: {before} → {after}")
    if len(names) > _MOST_PARTS_NAMED:
        changes.append(f"and {', '.join(names[_MOST_PARTS_NAMED:])}")
    return "; ".join(changes)


def is_hash(value: str) -> bool:
    """Whether a value is nothing to read: a long hexadecimal number."""
    return _HEX.fullmatch(value) is not None


def _shorten(old: str | None, new: str | None) -> tuple[str, str]:
    """Both values, cut in such a way that they still differ."""
    pairs = zip(old or "", new or "", strict=False)
    shared = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(old or ""), len(new or "")))

    def short(value: str | None) -> str:
        if value is None:
            return "(none)"
        if is_hash(value):
            return value[: max(8, shared + 1)]
        if len(value) <= _LONGEST_VALUE:
            return value or "''"
        start = max(0, shared - _LONGEST_VALUE // 4)
        end = start + _LONGEST_VALUE
        return f"{'…' if start else ''}{value[start:end]}{'…' if end < len(value) else ''}"

    return short(old), short(new)
