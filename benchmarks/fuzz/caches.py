"""Entries of a cache that others wrote to: the tool trusts none that does not match its checksums.

Without a key of the user's, an entry that was rewritten whole, checksums and all, is an entry as good as any: who can
write to the cache can choose what is found there. That must not crash anything, and no more than that is asked of it.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING

import arrays  # type: ignore[import-not-found]
import mutations  # type: ignore[import-not-found]
from target import Found, Made, session, special  # type: ignore[import-not-found]

import models  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random


def _damage(path: Path, draw: Random) -> None:
    """One file, changed as its kind is read."""
    data = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.7:
        path.write_bytes(mutations.json_text(json.loads(data), draw))
    elif path.suffix == ".npy" and draw.random() < 0.5:
        path.write_bytes(arrays.npy(draw))
    elif path.suffix == ".onnx" and draw.random() < 0.7:
        path.write_bytes(models.mutated_model(path, draw))
    elif path.name == "manifest" and draw.random() < 0.7:
        text = mutations.json_text(json.loads(data.partition(b"\n")[2]), draw)
        path.write_bytes(b"%08x\n%s" % (zlib.crc32(text), text))
    else:
        path.write_bytes(mutations.of_bytes(data, draw))


def _reseal(entry: Path) -> None:
    """Its checksums, made right again, as an attacker would."""
    from pytest_trtcheck.cache.manifest import describe_files

    body = json.loads((entry / "manifest").read_bytes().partition(b"\n")[2])
    body["files"] = describe_files(entry / "files")
    text = json.dumps(body, indent=1).encode()
    (entry / "manifest").write_bytes(b"%08x\n%s" % (zlib.crc32(text), text))


class Cache(Made):  # type: ignore[misc]
    """Every file of a cache."""

    name, about = "cache", "every file of every kind of cache entry, checksums made right again half of the time"
    seals = 0.5

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        self.copy(folder)
        found = sorted(path for path in (folder / "cache").rglob("*") if path.is_file() and path.name != ".gitignore")
        sealed = draw.random() < self.seals
        if draw.random() < 0.1:  # what code may look for by its name
            beside = draw.choice([path for path in found if path.parent.name == "files"])
            (beside.parent / draw.choice(("types.json", "jit.cache", "0.npy", "x"))).write_bytes(draw.randbytes(9))
        for path in draw.sample(found, draw.choice((1, 1, 2, 6))):
            if draw.random() < 0.05:
                special(path, draw)
                continue
            _damage(path, draw)
            if sealed and path.parent.name == "files":
                _reseal(path.parents[1])
        return lambda: self.use(folder, draw, sealed=sealed)

    def use(self, folder: Path, draw: Random, *, sealed: bool) -> Found:
        """A run that finds it; what only reads a list of it, too."""
        more = ["--trt-cache-show"] if draw.random() < 0.05 else []
        found = session(folder, *more, "test_seed.py")
        passed = found.said.startswith("0:") and not more and not sealed
        if passed:
            return Found("wrong pass", found.said)
        return Found("sealed", found.said) if sealed and found.word == "status" else found


class Tamper(Cache):
    """The same, by whoever does not make the checksums right: the check that fails must not pass."""

    name, about = "tamper", "a check that fails, with cache entries changed behind their checksums: it must never pass"
    seals = 0.0
