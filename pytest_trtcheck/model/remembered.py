"""What was found out about files once, and holds while they are unchanged.

Reading and hashing a model of some hundred megabytes, or a folder of calibration data, takes longer than the rest of a
check whose parts are cached. A file counts as unchanged while `stat` says the same of it, and only files that were left
alone for two seconds are remembered at all (`cache.settled`).
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_trtcheck.cache import Cache, HashedFile, Key, hash_code, settled, stamp
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
from pytest_trtcheck.record import typed
from pytest_trtcheck.spec import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")


_FACTS_FILE = "facts.json"


def model(path: Path, label: str, cache: Cache) -> OnnxModel:
    """The model at `path`, as `onnx_model.load` finds it; `cache` is told the files that it is in.

    Raises
    ------
    ModelError
        As `onnx_model.load`.
    """
    with cache.resting_on():
        return _remembered(path, label, cache)


def _remembered(path: Path, label: str, cache: Cache) -> OnnxModel:

    @functools.cache
    def load() -> OnnxModel:
        found = onnx_model.load(path, label)
        cache.rest_on(*found.files)
        return found

    own = settled_files([path])
    if own is None:
        return load()
    deciding = ("onnx_model", "output_parts", "proto", "randomness", "remembered")
    code = {"code": hash_code(*(f"model/{name}.py" for name in deciding))}
    with cache.resting_on(*own):  # or what is behind a link is kept as what was
        index = once(Key("model_files", path.name, identity(own) | code), lambda: list(load().external), names, cache)
    files = settled_files([path, *(path.parent / location for location in index)])
    if files is None:
        return load()
    key = Key("model_facts", path.name, identity(files) | code)
    with cache.resting_on(*files):
        found = once(key, lambda: _plain(load()), functools.partial(_model, files), cache)
    cache.rest_on(*found.files)
    return replace(found, path=path, label=label)


def settled_files(files: Sequence[Path]) -> tuple[HashedFile, ...] | None:
    """The files as they are; None where `stat` cannot be trusted to tell."""
    try:
        found = tuple(HashedFile(file, stamp(file.resolve()), is_settled=True) for file in files)
    except OSError:
        return None
    return found if settled(*(file.stamp for file in found)) else None


def identity(files: Sequence[HashedFile]) -> dict[str, str]:
    """What identifies the content of settled files for now."""
    return {"files": json.dumps({str(file.path.resolve()): file.stamp for file in files})}


def once(key: Key, find: Callable[[], Any], take: Callable[[Any], T], cache: Cache) -> T:
    """What `find` returns, as `take` makes it of JSON; it is called where nothing is kept under `key`."""
    entry = cache.get_or_make(key, lambda folder: (folder / _FACTS_FILE).write_text(json.dumps(find())))
    return entry.read_json(_FACTS_FILE, take)


def names(found: Any) -> list[str]:
    """A list of texts, as `once` takes it."""
    return typed(found, list[str])


def _plain(found: OnnxModel) -> dict[str, Any]:
    sets = {"op_types": sorted(found.op_types), "half_types": sorted(found.half_types)}
    return {
        **asdict(replace(found, files=())),
        **sets,
        "path": "",
        "label": "",
        "files": [file.digest for file in found.files],
    }


def _model(files: Sequence[HashedFile], plain: dict[str, Any]) -> OnnxModel:
    specs = {
        name: tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in plain[name])
        for name in ("inputs", "outputs")
    }
    sets = {name: frozenset(plain[name]) for name in ("op_types", "half_types")}
    names = {name: tuple(plain[name]) for name in ("external", "custom_ops", "random", "notes")}
    parts = tuple((name, tuple(_part(each) for each in found)) for name, found in plain["parts"])
    known = [file._replace(sha256=typed(each, str)) for file, each in zip(files, plain["files"], strict=True)]
    return OnnxModel(**{**plain, **specs, **sets, **names, "parts": parts, "files": tuple(known)})


def _part(plain: dict[str, Any]) -> Part:
    return Part(tuple((axis, start, stop) for axis, start, stop in plain["ranges"]), plain["natural"])
