"""What a check is made of, each from the cache or made once: reference outputs, the lowered model, its emulation.

Every artifact is keyed by its true inputs: the bytes it was made from, the arguments, the versions of what computes it,
and the code of this package that decides it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import __version__, facts
from pytest_trtcheck.backends import onnxruntime as ort
from pytest_trtcheck.cache import Cache, Key, hash_bytes, hash_files
from pytest_trtcheck.errors import CalibrationError, ModelError
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.onnx_model import OnnxModel
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.onnxruntime import OrtRunner, Provider
    from pytest_trtcheck.precision.calibration_data import Samples
    from pytest_trtcheck.spec import Precision

MODEL_FILE = "model.onnx"
_DETAILS_FILE = "details.json"
_RANGES_FILE = "ranges.json"
_OP_TYPES = "op_types"


@functools.cache
def _code() -> str:
    """Identity of the code that decides what a lowered or emulated model is."""
    package = Path(__file__).parent
    files = [package / "model" / "graph.py", *sorted((package / "precision").glob("*.py"))]
    return hash_files(files)


@functools.cache
def _library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"pytest-trtcheck": __version__, "onnx": version("onnx"), "onnx-ir": version("onnx-ir"), "code": _code()}


# --- models ----------------------------------------------------------------------------------------------------------


def open_model(source: object, folders: Sequence[Path], cache: Cache) -> OnnxModel:
    """The model that the user named: a path looked up in `folders`, the bytes of a file, or an onnx.ModelProto.

    Raises
    ------
    ModelError
        There is no such file, or it is no sound ONNX model.
    """
    if isinstance(source, OnnxModel):
        return source
    if isinstance(source, bytes) or hasattr(source, "SerializeToString"):
        return _model_in_memory(source, cache)
    path = Path(str(source)).expanduser()
    tried = [path] if path.is_absolute() else [folder / path for folder in dict.fromkeys(folders)]
    for candidate in tried:
        if candidate.exists():
            return facts.model(candidate, str(source), cache)
    raise ModelError(f"{source}: no such model file", f"looked for {' and '.join(map(str, tried))}")


def _model_in_memory(source: Any, cache: Cache) -> OnnxModel:
    label = "<bytes>" if isinstance(source, bytes) else f"<ModelProto {source.graph.name or ''}>".replace(" >", ">")
    try:
        data = source if isinstance(source, bytes) else source.SerializeToString()
    except Exception as error:
        raise ModelError(
            f"{label}: cannot be serialized: {error}",
            "save it with external data and give its path (2 GiB is the most)",
        ) from error
    key = Key("model", label, {"sha256": hash_bytes(data)})
    entry = cache.get_or_make(key, lambda folder: _write_bytes(folder / MODEL_FILE, data))
    return facts.model(entry.path / MODEL_FILE, label, cache)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


# --- reference -------------------------------------------------------------------------------------------------------


class Reference:
    """The FP32 model's outputs, computed on ONNX Runtime once for each inputs and kept.

    Where the model carries Q/DQ nodes or 16-bit types, the reference is the FP32 model behind it: activations are not
    quantized or rounded, and the weights are the best that the file holds.
    """

    def __init__(self, model: OnnxModel, cache: Cache, provider: Provider = "cpu") -> None:
        self.model = model
        self._cache = cache
        self._provider = provider
        self._runner: OrtRunner | None = None

    def __call__(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name, memory-mapped from the cache."""
        case = dict(case)
        parts = {
            "model": self.model.sha256,
            "inputs": model_inputs.digest(case),
            "onnxruntime": ort.version(),
            "provider": self._provider,
        }
        if self._is_lowered():
            parts |= {"code": _code()}
        entry = self._cache.get_or_make(
            Key("reference", self.model.label, parts), lambda folder: save_arrays(folder, self._run(case))
        )
        return load_arrays(entry.path)

    def _is_lowered(self) -> bool:
        return self.model.has_qdq or bool(self.model.half_types)

    def _run(self, case: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._runner is None:
            self._runner = ort.OrtRunner(self.path(), self.model.label, self._provider)
        return self._runner(case)

    def path(self) -> Path:
        """The FP32 model's file: the one given, or the FP32 model behind it."""
        if not self._is_lowered():
            return self.model.path
        key = Key("float_twin", self.model.label, {"model": self.model.sha256, **_library_versions()})
        return self._cache.get_or_make(key, self._make_twin).path / MODEL_FILE

    def _make_twin(self, folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import emulate, qdq

        twin = emulate.emulated(qdq.without(graph.read(self.model.path)), rounding=False)
        graph.write(twin, folder / MODEL_FILE)


def save_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that `load_arrays` can map them without reading."""
    (folder / "names.json").write_text(json.dumps(list(arrays)))
    for index, array in enumerate(arrays.values()):
        np.save(folder / f"{index}.npy", array.astype(str) if array.dtype.kind == "O" else array, allow_pickle=False)


def load_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays that `save_arrays` wrote, memory-mapped and read-only."""
    names = json.loads((folder / "names.json").read_text())
    return {name: np.load(folder / f"{index}.npy", mmap_mode="r") for index, name in enumerate(names)}


# --- lowering --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lowered:
    """A model in the precision asked for: what TensorRT is given.

    Parameters
    ----------
    path
        The ONNX file, precision and all.
    key
        Identity, for everything made from it.
    notes
        What a person must know about it: clamped weights, precision taken as it was, …
    details
        What the lowering decided, as plain data (calibrated ranges, quantized tensors).
    taken_as_it_is
        Whether the user's model carried its precision already.
    """

    path: Path
    key: str
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    taken_as_it_is: bool = False

    def op_types(self, model: OnnxModel) -> frozenset[str]:
        """The operators of `model` that are computed in the precision; all of them where that is not known."""
        return frozenset(self.details.get(_OP_TYPES, model.op_types))


def lower(
    model: OnnxModel,
    precision: Precision,
    cache: Cache,
    *,
    keep_fp32: tuple[str, ...] = (),
    calibration: object = None,
    folders: Sequence[Path] = (),
) -> Lowered:
    """The model in `precision`, from the cache when nothing that decides it has changed.

    Parameters
    ----------
    keep_fp32
        Globs of the nodes that are not lowered.
    calibration
        What the marker or `trt_calibration` gave; needed for int8 and fp8 alone.
    folders
        Where relative calibration files are looked up.

    Raises
    ------
    CalibrationError
        INT8 or FP8 without calibration data, or data that does not fit.
    ModelError, ArgumentError
        The model can't be lowered to this precision; `keep_fp32` names no node.
    """
    if model.has_qdq or model.half_types:
        return _taken_as_it_is(model, precision)
    if precision in {"fp32", "tf32"}:
        return Lowered(model.path, model.sha256)
    parts = {
        "model": model.sha256,
        "precision": precision,
        "keep_fp32": json.dumps(sorted(keep_fp32)),
        **_library_versions(),
    }
    ranges = _Calibration.of(model, calibration, folders, cache, precision) if precision in {"int8", "fp8"} else None
    if ranges is not None:
        parts |= ranges.key_parts

    def make(folder: Path) -> None:
        if ranges is None:
            _make_half(model, precision, keep_fp32, cache, folder)
        else:
            _make_quantized(model, precision, keep_fp32, ranges, cache=cache, folder=folder)

    entry = cache.get_or_make(Key("lowered", model.label, parts), make)
    details = json.loads((entry.path / _DETAILS_FILE).read_text())
    return Lowered(entry.path / MODEL_FILE, entry.key.digest, tuple(details.pop("notes")), details)


def _taken_as_it_is(model: OnnxModel, precision: Precision) -> Lowered:
    carried = sorted(model.half_types) + (["Q/DQ nodes"] if model.has_qdq else [])
    if precision in {"int8", "fp8"} and not model.has_qdq:
        raise ModelError(
            f"{model.label}: carries {', '.join(carried)}, so it can't be quantized to {precision}",
            "export the model in FP32, or with Q/DQ nodes",
        )
    note = f"{model.label} already carries {' and '.join(carried)}: taken as it is, {precision=} changed nothing"
    return Lowered(model.path, model.sha256, (note,), taken_as_it_is=True)


@dataclass(frozen=True)
class _Calibration:
    """The user's calibration data and how ranges are made of it; `digest` is the data's identity."""

    given: Calibration
    samples: Samples
    digest: str

    @classmethod
    def of(
        cls, model: OnnxModel, source: object, folders: Sequence[Path], cache: Cache, precision: Precision
    ) -> _Calibration:
        if source is None:
            raise CalibrationError(
                f"{precision=}: {model.label} has no Q/DQ nodes, and no calibration data is given",
                'give it, calibration="data/calibration/*.npz", or by the fixture trt_calibration; '
                "random data would give an engine that fails silently",
            )
        from pytest_trtcheck.precision import calibration_data

        samples = calibration_data.load(source, model.inputs, folders)
        given = source if isinstance(source, Calibration) else Calibration(source)
        return cls(given, samples, facts.samples_digest(samples, cache))

    @property
    def key_parts(self) -> dict[str, str]:
        method = self.given.method
        return {
            "calibration": self.digest,
            "calibration_method": f"{method} {self.given.percentile}" if method == "percentile" else method,
            "onnxruntime": ort.version(),
        }


def prepared(model: OnnxModel, keep_fp32: tuple[str, ...], cache: Cache) -> Path:
    """The FP32 model that is lowered: batch normalization folded."""
    if "BatchNormalization" not in model.op_types:
        return model.path
    parts = {"model": model.sha256, "keep_fp32": json.dumps(sorted(keep_fp32)), **_library_versions()}

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import fold

        read = graph.read(model.path)
        graph.write(fold.fold_batch_norm(read, graph.matching_nodes(read, keep_fp32)), folder / MODEL_FILE)

    return cache.get_or_make(Key("folded", model.label, parts), make).path / MODEL_FILE


def _write_details(folder: Path, notes: Sequence[str], details: Mapping[str, Any]) -> None:
    (folder / _DETAILS_FILE).write_text(json.dumps({"notes": list(notes), **details}))


def _make_half(model: OnnxModel, precision: Any, keep_fp32: tuple[str, ...], cache: Cache, folder: Path) -> None:
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision import half

    read = graph.read(prepared(model, keep_fp32, cache))
    kept = graph.matching_nodes(read, keep_fp32)
    computed = {node.op_type for node in graph.all_nodes(read.graph) if node.name not in kept}
    lowered = half.to_half(read, precision, keep_fp32)
    graph.write(lowered.model, folder / MODEL_FILE)
    notes = [
        f"weight {weight.name}: {weight.count} values up to {weight.largest:.4g} do not fit {precision} "
        f"and became ±{half.LARGEST[precision]:g}"
        for weight in lowered.clamped
    ]
    _write_details(folder, notes, {_OP_TYPES: sorted(computed)})


def _make_quantized(
    model: OnnxModel,
    precision: Any,
    keep_fp32: tuple[str, ...],
    calibration: _Calibration,
    *,
    cache: Cache,
    folder: Path,
) -> None:
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision import calibrate, quantization_plan, quantize

    path = prepared(model, keep_fp32, cache)
    read = graph.read(path)
    plan = quantization_plan.points(read, keep_fp32)
    parts = {
        "model": model.sha256,
        "tensors": hash_bytes(json.dumps(plan.tensors).encode()),
        **calibration.key_parts,
        **_library_versions(),
    }
    given, samples = calibration.given, calibration.samples

    def calibrated(target: Path) -> None:
        ranges = calibrate.collect(
            lambda probe: ort.OrtRunner(probe, model.label),
            path,
            plan,
            samples,
            method=given.method,
            percentile=given.percentile,
            describe=samples.describe,
        )
        (target / _RANGES_FILE).write_text(ranges.to_json())

    entry = cache.get_or_make(Key("calibration", model.label, parts), calibrated)
    ranges = calibrate.Ranges.from_json((entry.path / _RANGES_FILE).read_text())
    quantized = {point.node for point in plan.weights}
    computed = {node.op_type for node in graph.all_nodes(read.graph) if node.name in quantized}
    graph.write(quantize.quantize(read, plan, ranges.amax(), precision), folder / MODEL_FILE)
    _write_details(
        folder,
        [f"{precision}: {quantization_plan.summary(plan)}; ranges by {given.method} from {ranges.samples} samples"],
        {
            "ranges": json.loads(ranges.to_json()),
            "left_float": dict(plan.left_float),
            _OP_TYPES: sorted(computed),
        },
    )


# --- emulation -------------------------------------------------------------------------------------------------------


def computes_the_reference(model: OnnxModel, precision: Precision) -> bool:
    """Whether the emulation would be the reference itself, so that comparing them says nothing."""
    return precision == "fp32" and not (model.has_qdq or model.half_types)


def emulation(model: OnnxModel, lowered: Lowered, precision: Precision, cache: Cache) -> OrtRunner:
    """The lowered model's arithmetic on ONNX Runtime's CPU provider.

    For fp32 it is the model itself: what it computes is the reference.
    """
    path = emulated_path(model, lowered, precision, cache)
    return ort.OrtRunner(path, model.label if path == model.path else f"{model.label} (emulated {precision})")


class Emulated:
    """The emulated model's outputs, computed once for each inputs and kept: what an engine is held against.

    Parameters
    ----------
    model, lowered, precision
        As `emulation` takes them.
    """

    def __init__(self, model: OnnxModel, lowered: Lowered, precision: Precision, cache: Cache) -> None:
        self._lowering = model, lowered, precision
        self._cache = cache
        self._runner: OrtRunner | None = None

    def __call__(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name, memory-mapped from the cache."""
        case = dict(case)
        model, lowered, precision = self._lowering
        parts = {
            "lowered": lowered.key,
            "precision": precision,
            "inputs": model_inputs.digest(case),
            "onnxruntime": ort.version(),
            **_library_versions(),
        }

        def make(folder: Path) -> None:
            if self._runner is None:
                self._runner = emulation(model, lowered, precision, self._cache)
            save_arrays(folder, self._runner(case))

        return load_arrays(self._cache.get_or_make(Key("emulation", model.label, parts), make).path)


def emulated_path(model: OnnxModel, lowered: Lowered, precision: Precision, cache: Cache) -> Path:
    """The file that `emulation` runs."""
    if precision == "fp32" and lowered.path == model.path and not (model.has_qdq or model.half_types):
        return model.path
    tf32 = precision == "tf32" and not (model.has_qdq or model.half_types)
    parts = {"lowered": lowered.key, "tf32": str(tf32), **_library_versions()}

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import emulate

        rewrite = emulate.emulated_tf32 if tf32 else emulate.emulated
        graph.write(rewrite(graph.read(lowered.path)), folder / MODEL_FILE)

    return cache.get_or_make(Key("emulated", model.label, parts), make).path / MODEL_FILE


def float_path(model: OnnxModel, lowered: Lowered, keep_fp32: tuple[str, ...], cache: Cache) -> Path:
    """The FP32 model that `lowered` was made from: tensors of both bear the same names.

    It computes what the reference computes, batch normalization folded where the lowering folds it.
    """
    if model.has_qdq or model.half_types:
        return Reference(model, cache).path()
    return model.path if lowered.path == model.path else prepared(model, keep_fp32, cache)
