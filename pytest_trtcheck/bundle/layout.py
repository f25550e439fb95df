"""What a bundle's folder holds, and whether it still holds it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BUNDLE_FILE = "bundle.json"
TOOL = "pytest-trtcheck"
SCHEMA_VERSION = 1
INPUTS, OUTPUTS, REFERENCE = "inputs.npz", "outputs.npz", "reference.npz"
ARRAY_FILES = (INPUTS, OUTPUTS, REFERENCE)

_OWN = "sha256"


def signed(about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `bundle.json` with its own SHA-256."""
    return {**about, _OWN: digest(about)}


def is_signed(about: Mapping[str, Any]) -> bool:
    """Whether the content of `bundle.json` is what was written."""
    return about.get(_OWN) == digest({key: value for key, value in about.items() if key != _OWN})


def digest(data: Mapping[str, Any]) -> str:
    """The SHA-256 of JSON values, however they are laid out in a file."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size in bytes of every file in `folder`, by its path in there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size} for path in files
    }


def problems(folder: Path, about: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the files in `folder`, by the list in `bundle.json`."""
    for name, expected in about["files"].items():
        file = folder / name
        if PurePosixPath(name).is_absolute() or not file.resolve().is_relative_to(folder.resolve()):
            yield f"{name}: leads out of the bundle"
        elif not file.is_file():
            yield f"{name}: is missing"
        elif file.stat().st_size != expected["bytes"]:
            yield f"{name}: has {file.stat().st_size:,} bytes, {expected['bytes']:,} were written"
        elif hash_file(file) != expected["sha256"]:
            yield f"{name}: its content was changed"


def located(folder: Path, stored: Mapping[str, Any]) -> Path:
    """Where a model of the bundle is: in its folder, or, too large for that, where it lay."""
    return folder / stored["file"] if "file" in stored else Path(stored["path"])
