"""What was found out about files once, and holds while they are unchanged.

Reading and hashing a model of some hundred megabytes, or a folder of calibration data, takes longer than the rest of a
check whose parts are cached. A file counts as unchanged while `stat` says the same of it, and only files that were left
alone for two seconds are remembered at all (`cache.settled`).
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import __version__
from pytest_trtcheck.cache import Cache, Key, hash_files, settled, stamp
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
from pytest_trtcheck.spec import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.precision.calibration_data import Samples

_FACTS_FILE = "facts.json"


def model(path: Path, label: str, cache: Cache) -> OnnxModel:
    """The model at `path`, as `onnx_model.load` finds it.

    Raises
    ------
    ModelError
        As `onnx_model.load`.
    """
    load = functools.cache(lambda: onnx_model.load(path, label))
    own = _stamps([path])
    if own is None:
        return load()
    index = _remembered(Key("model_files", path.name, own), lambda: list(load().external), cache)
    stamps = _stamps([path, *(path.parent / location for location in index)])
    if stamps is None:
        return load()
    stamps |= {"code": _code()}
    facts = _remembered(Key("model_facts", path.name, stamps), lambda: _plain(load()), cache)
    return replace(_model(facts), path=path, label=label)


@functools.cache
def _code() -> str:
    """Identity of the code that says what is found in a model."""
    folder = Path(onnx_model.__file__).parent
    return hash_files([folder / "onnx_model.py", folder / "output_parts.py", folder / "randomness.py"])


def samples_digest(samples: Samples, cache: Cache) -> str:
    """`samples.digest()`; every file is read the first time alone.

    Raises
    ------
    CalibrationError
        As `samples.digest`.
    """
    files = samples.files()
    stamps = _stamps(files) if files else None
    if stamps is None:
        return samples.digest()
    parts = {**stamps, "inputs": repr(samples.specs), "limit": str(samples.limit)}
    digest: str = _remembered(Key("samples", files[0].parent.name, parts), samples.digest, cache)
    return digest


def _stamps(files: Sequence[Path]) -> dict[str, str] | None:
    """What identifies the files' content for now; None where `stat` cannot be trusted with that."""
    try:
        found = {str(file.resolve()): stamp(file.resolve()) for file in files}
    except OSError:
        return None
    if not settled(*found.values()):
        return None
    return {"version": __version__, "files": json.dumps(found)}


def _remembered(key: Key, find: Any, cache: Cache) -> Any:
    entry = cache.get_or_make(key, lambda folder: (folder / _FACTS_FILE).write_text(json.dumps(find())))
    return json.loads((entry.path / _FACTS_FILE).read_text())


def _plain(found: OnnxModel) -> dict[str, Any]:
    sets = {"op_types": sorted(found.op_types), "half_types": sorted(found.half_types)}
    return {**asdict(found), **sets, "path": "", "label": ""}


def _model(plain: dict[str, Any]) -> OnnxModel:
    specs = {
        name: tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in plain[name])
        for name in ("inputs", "outputs")
    }
    sets = {name: frozenset(plain[name]) for name in ("op_types", "half_types")}
    names = {name: tuple(plain[name]) for name in ("external", "custom_ops", "random")}
    parts = tuple((name, tuple(_part(each) for each in found)) for name, found in plain["parts"])
    return OnnxModel(**{**plain, **specs, **sets, **names, "parts": parts})


def _part(plain: dict[str, Any]) -> Part:
    return Part(tuple((axis, start, stop) for axis, start, stop in plain["ranges"]), plain["natural"])
