"""What a check is made of, each from the cache or made once: reference outputs, the lowered model, its emulation.

Every artifact is keyed by its true inputs: the bytes it was made from, the arguments, the versions of what computes it,
and the code of this package that decides it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pytest_trtcheck import __version__, facts
from pytest_trtcheck.backends import onnxruntime as ort
from pytest_trtcheck.cache import Cache, Key, hash_bytes, hash_files
from pytest_trtcheck.errors import ArgumentError, CalibrationError, ModelError, NothingComputedError
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import made, onnx_model
from pytest_trtcheck.model.onnx_model import OnnxModel
from pytest_trtcheck.precision import arithmetic
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.onnxruntime import OrtRunner, Provider
    from pytest_trtcheck.precision.calibration_data import Samples
    from pytest_trtcheck.spec import Precision

MODEL_FILE = "model.onnx"
_DETAILS_FILE = "details.json"
_RANGES_FILE = "ranges.json"
_TYPES_FILE = "types.json"
_ARITHMETIC = "arithmetic"


@functools.cache
def _code() -> str:
    """Identity of the code that decides what a lowered or emulated model is."""
    package = Path(__file__).parent
    rooms = [file for room in ("families", "precision") for file in sorted((package / room).glob("*.py"))]
    return hash_files([package / "model" / "graph.py", *rooms])


@functools.cache
def _library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"pytest-trtcheck": __version__, "onnx": version("onnx"), "onnx-ir": version("onnx-ir"), "code": _code()}


# --- models ----------------------------------------------------------------------------------------------------------


def open_model(source: object, folders: Sequence[Path], cache: Cache, custom_ops: Sequence[str] = ()) -> OnnxModel:
    """The model that the user named: a path looked up in `folders`, the bytes of a file, or an onnx.ModelProto.

    A callable without arguments that makes one of these is called each time. With the libraries in `custom_ops`, where
    ONNX Runtime needs them.

    Raises
    ------
    ModelError
        There is no such file, it is no sound ONNX model, or the callable does not make one.
    """
    return onnx_model.with_custom_ops(_found(source, folders, cache), custom_ops)


def _found(source: object, folders: Sequence[Path], cache: Cache) -> OnnxModel:
    if isinstance(source, OnnxModel):
        return source
    label = None
    if callable(source):
        label = f"{made.name_of(source)}()"
        source = made.model_made_by(source)
    if isinstance(source, bytes) or hasattr(source, "SerializeToString"):
        return _model_in_memory(source, cache, label)
    if not made.is_model(source):
        raise ModelError(
            f"a {type(source).__name__} is no model",
            "give a path, the bytes of an ONNX file, an onnx.ModelProto, or a function that makes one",
        )
    path = Path(str(source)).expanduser()
    tried = [path] if path.is_absolute() else [folder / path for folder in dict.fromkeys(folders)]
    for candidate in tried:
        if candidate.exists():
            return facts.model(candidate, str(source), cache)
    raise ModelError(f"{source}: no such model file", f"looked for {' and '.join(map(str, tried))}")


def _model_in_memory(source: Any, cache: Cache, label: str | None) -> OnnxModel:
    if label is None:
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

    title = "its FP32 reference"

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

    def computed(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name, computed now whatever is cached."""
        return self._run(dict(case))

    def _is_lowered(self) -> bool:
        return self.model.has_qdq or bool(self.model.half_types)

    def _run(self, case: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._runner is None:
            self._runner = ort.OrtRunner(
                self.path(), self.model.label, self._provider, custom_ops=self.model.custom_ops
            )
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


class ModelReference:
    """Another model's outputs as the reference: mostly the FP32 original of a quantized one.

    Parameters
    ----------
    of
        The other model's outputs.
    checked
        The model that is checked. 16-bit inputs are widened for the other model where it takes FP32, and its outputs
        come in the types of the checked model's.

    Raises
    ------
    ModelError
        The inputs and outputs of the two do not bear the same names.
    """

    def __init__(self, of: Reference, checked: OnnxModel) -> None:
        self.model = of.model
        self.title = f"the reference {of.model.label}"
        self.identity: str | None = of.model.sha256
        self._of = of
        self._checked = checked
        _refuse_other_names(of.model, checked)

    def __call__(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The checked model's outputs by name, as the other model computes them."""
        return self._fitting(self._of(self._taken(case)))

    def computed(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The same, computed now whatever is cached."""
        return self._fitting(self._of.computed(self._taken(case)))

    def _taken(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {spec.name: model_inputs.as_float(case[spec.name], spec.dtype) for spec in self.model.inputs}

    def _fitting(self, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {spec.name: model_inputs.as_float(outputs[spec.name], spec.dtype) for spec in self._checked.outputs}


class CallableReference:
    """What a callable of the user's computes as the reference; nothing of it is kept.

    Parameters
    ----------
    function
        Takes a dict from input name to array, and returns a mapping from output name to array.
    checked
        The model that is checked: every output of it has to be there. Float outputs come in its types.
    """

    identity: str | None = None

    def __init__(self, function: Callable[..., Any], checked: OnnxModel) -> None:
        self.name = made.name_of(function)
        self.title = f"the reference {self.name}"
        self._function = function
        self._checked = checked

    def __call__(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name.

        Raises
        ------
        ModelError
            The callable failed, or gave no array for an output.
        """
        try:
            # Copies: what the callable does to its inputs must not reach the engine.
            outputs = dict(self._function({name: np.array(array) for name, array in case.items()}))
            arrays = {name: np.asarray(value) for name, value in outputs.items()}
        except Exception as error:
            raise ModelError(
                f"{self.title} failed: {type(error).__name__}: {error}",
                "it takes a dict from input name to array, and returns one from output name to array",
            ) from error
        if missing := [spec.name for spec in self._checked.outputs if spec.name not in arrays]:
            raise ModelError(
                f"{self.title} gave no output {', '.join(map(repr, missing))}",
                f"it gave {', '.join(map(repr, arrays)) or 'nothing'}; return an array for each output of the model",
            )
        return {spec.name: model_inputs.as_float(arrays[spec.name], spec.dtype) for spec in self._checked.outputs}

    computed = __call__


AnyReference: TypeAlias = Reference | ModelReference | CallableReference


def reference_given(
    source: object, checked: OnnxModel, folders: Sequence[Path], cache: Cache, provider: Provider = "cpu"
) -> ModelReference | CallableReference:
    """The reference that a marker names: another model, or a callable from inputs to outputs.

    A callable that needs no argument makes a model.

    Raises
    ------
    ModelError
        There is no such model, or it does not fit the one that is checked.
    """
    if callable(source) and made.takes_inputs(source):
        return CallableReference(source, checked)
    try:
        other = open_model(source, folders, cache)
    except ModelError as error:
        raise ModelError(f"reference: {error.message}", error.hint) from error
    return ModelReference(Reference(other, cache, provider), checked)


def _refuse_other_names(other: OnnxModel, checked: OnnxModel) -> None:
    needed, given = {spec.name for spec in other.inputs}, {spec.name for spec in checked.inputs}
    problems = [f"it needs the input {name!r}" for name in sorted(needed - given)]
    problems += [f"it has no input {name!r}" for name in sorted(given - needed)]
    problems += [
        f"it has no output {name!r}"
        for name in sorted({spec.name for spec in checked.outputs} - {spec.name for spec in other.outputs})
    ]
    if problems:
        raise ModelError(
            f"the reference {other.label} does not fit {checked.label}: {', '.join(problems)}",
            "inputs and outputs must bear the same names; a callable as reference= can rename them",
        )


def save_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that `load_arrays` can map them without reading."""
    (folder / "names.json").write_text(json.dumps(list(arrays)))
    # numpy's files hold the bytes of bfloat16 and FP8, and forget the type.
    lost = {name: array.dtype.name for name, array in arrays.items() if array.dtype.type.__module__ == "ml_dtypes"}
    if lost:
        (folder / _TYPES_FILE).write_text(json.dumps(lost))
    for index, array in enumerate(arrays.values()):
        np.save(folder / f"{index}.npy", array.astype(str) if array.dtype.kind == "O" else array, allow_pickle=False)


def load_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays that `save_arrays` wrote, memory-mapped and read-only."""
    names = json.loads((folder / "names.json").read_text())
    arrays = {name: np.load(folder / f"{index}.npy", mmap_mode="r") for index, name in enumerate(names)}
    if (folder / _TYPES_FILE).exists():
        import ml_dtypes

        for name, dtype in json.loads((folder / _TYPES_FILE).read_text()).items():
            arrays[name] = arrays[name].view(getattr(ml_dtypes, dtype))
    return arrays


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
        What the lowering decided, as plain data: calibrated ranges, quantized tensors; "arithmetic", a row (node,
        operator, what it is computed in) for each node that does arithmetic; "constants", those of which the type
        holds too little; "narrowed", whether FP64 became FP32.
    taken_as_it_is
        Whether the user's model carried its precision already.
    """

    path: Path
    key: str
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    taken_as_it_is: bool = False

    def computed_in(self, precision: Precision) -> list[arithmetic.Computation] | None:
        """The nodes that compute in `precision`; None where that was not looked at (FP32 as the model has it)."""
        rows = self.details.get(_ARITHMETIC)
        return None if rows is None else arithmetic.within([arithmetic.Computation(*row) for row in rows], precision)

    def op_types(self, model: OnnxModel, precision: Precision) -> frozenset[str]:
        """The operators of `model` that are computed in the precision; all of them where that is not known."""
        nodes = self.computed_in(precision)
        return model.op_types if nodes is None else frozenset(node.op_type for node in nodes)


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
    lowered = _as_it_is(model, precision, keep_fp32, cache) or _lowered(
        model, precision, cache, keep_fp32=keep_fp32, calibration=calibration, folders=folders
    )
    _refuse_without_computation(model, precision, lowered, keep_fp32)
    return lowered


def _lowered(
    model: OnnxModel,
    precision: Precision,
    cache: Cache,
    *,
    keep_fp32: tuple[str, ...],
    calibration: object,
    folders: Sequence[Path],
) -> Lowered:
    rows = _surveyed(model, cache) if model.has_double or precision == "tf32" else []
    has_double = any(kind == "float64" for _, _, kind in rows)
    narrowed = ("FP64 was taken as FP32, as TensorRT does",) if has_double else ()
    if precision in {"fp32", "tf32"}:
        as_fp32 = [(name, operator, kind.replace("float64", "fp32")) for name, operator, kind in rows]
        details = {_ARITHMETIC: as_fp32} if rows or precision == "tf32" else {}
        if not has_double:
            return Lowered(model.path, model.sha256, details=details)
        path = _narrowed(model, model.path, cache)
        return Lowered(path, path.parent.name, narrowed, {**details, "narrowed": True})
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
    notes = (*narrowed, *details.pop("notes"))
    return Lowered(entry.path / MODEL_FILE, entry.key.digest, notes, details)


# --- what is computed in which precision -----------------------------------------------------------------------------


def _surveyed(model: OnnxModel, cache: Cache) -> list[list[str]]:
    """What each node of the user's model that does arithmetic computes in: rows of `arithmetic.Computation`."""

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import computed

        _write_details(folder, (), {_ARITHMETIC: computed.survey(graph.read(model.path))})

    entry = cache.get_or_make(Key("arithmetic", model.label, {"model": model.sha256, **_library_versions()}), make)
    found: list[list[str]] = json.loads((entry.path / _DETAILS_FILE).read_text())[_ARITHMETIC]
    return found


def _as_it_is(model: OnnxModel, precision: Precision, keep_fp32: tuple[str, ...], cache: Cache) -> Lowered | None:
    """The user's own model where it computes in `precision` already; None where it is FP32, to be lowered.

    What its matrix products compute in decides: weights that are stored in fewer bits, or a cast somewhere, make no
    model of another precision. Q/DQ nodes round whatever the operators compute in, so a model with them is taken as it
    is, or not at all: without them it would be another model.

    Raises
    ------
    NothingComputedError
        It computes in another precision.
    ArgumentError
        `keep_fp32` is given, and nothing is lowered.
    """
    if not (model.has_qdq or model.half_types):
        return None
    rows = _surveyed(model, cache)
    found = [arithmetic.Computation(*row) for row in rows]
    operators = arithmetic.operators(found)
    reduced = {each.kind for each in found} - {"fp32", "float64"}
    mine = arithmetic.within(operators, precision)
    heavy = arithmetic.heaviest(operators)
    mostly = bool(mine) and 2 * len(arithmetic.within(heavy, precision)) >= len(heavy)
    is_quantized = precision in {"int8", "fp8"} and bool(arithmetic.within(found, precision))
    if not reduced or (precision in {"fp16", "bf16"} and reduced == {precision} and not mostly):
        return None
    if precision == "fp32" and mostly and len(operators) == len(found):
        return None
    if precision in {"fp32", "tf32"} or not (mostly or is_quantized):
        raise _computes_in_another(model, precision, found, reduced)
    carried = sorted(model.half_types) + (["Q/DQ nodes"] if model.has_qdq else [])
    if keep_fp32:
        raise ArgumentError(
            f"keep_fp32: {model.label} carries {' and '.join(carried)} and is taken as it is, so nothing can be kept",
            "leave keep_fp32 out; export the model with those nodes in FP32, or give the FP32 model",
        )
    note = f"{model.label} already carries {' and '.join(carried)}: taken as it is, {precision=} changed nothing; " + (
        f"{len(mine)} of its {len(operators)} nodes that do arithmetic compute in {precision}"
        if mine
        else f"none of its operators computes in {precision}, values are rounded to its grid alone"
    )
    return Lowered(model.path, model.sha256, (note,), {_ARITHMETIC: rows}, taken_as_it_is=True)


def _computes_in_another(
    model: OnnxModel, precision: Precision, found: Sequence[arithmetic.Computation], reduced: set[str]
) -> NothingComputedError:
    # What computes in integers is refused in every precision.
    own = [kind for kind in ("int8", "fp8", "fp16", "bf16") if kind in reduced and "integers" not in reduced]
    operators = arithmetic.operators(found)
    shown = operators if reduced & {each.kind for each in operators} else found
    hint = "export the model in FP32: it is lowered to what is asked for"
    if own:
        hint = f"ask for precision={own[0]!r}, which takes the model as it is; or {hint}"
    return NothingComputedError(
        f"{precision=}: {model.label} carries its precision already: {_by_kind(shown)}, so that it can't be checked in "
        f"{precision}",
        hint,
    )


def _by_kind(found: Sequence[arithmetic.Computation]) -> str:
    """How many nodes compute in what, with the first of their names: "3 nodes in fp16 (conv1, conv2, …)"."""
    kinds = dict.fromkeys(each.kind for each in found)
    names = {kind: [each.node for each in found if each.kind == kind] for kind in kinds}
    return ", ".join(
        f"{len(nodes)} node{'s' * (len(nodes) != 1)} in {kind} ({_some(nodes)})" for kind, nodes in names.items()
    )


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _refuse_without_computation(
    model: OnnxModel, precision: Precision, lowered: Lowered, keep_fp32: tuple[str, ...]
) -> None:
    """Only what was computed in the precision asked for can pass.

    Raises
    ------
    NothingComputedError
        No node is computed in `precision`; the message says why not.
    """
    nodes = lowered.computed_in(precision)
    if nodes is None or precision == "fp32":
        return
    integers = [name for name, _, kind in lowered.details[_ARITHMETIC] if kind == "integers"]
    if integers:
        raise NothingComputedError(
            f"{precision=}: {model.label} carries its precision already: {len(integers)} of its nodes compute in "
            f"integers ({_some(integers)}), whatever is asked for",
            "export the model in FP32, or with Q/DQ nodes",
        )
    if nodes:
        return
    if not lowered.details[_ARITHMETIC]:
        operators = _some(sorted(model.op_types), 10) or "none"
        raise NothingComputedError(
            f"{precision=}: nothing is computed in {precision}: {model.label} does no arithmetic on floats that depend "
            f"on its inputs (its operators: {operators})",
            "such a model has nothing that a precision could change: check the model that it belongs to",
        )
    if precision == "tf32":
        raise NothingComputedError(
            f"{precision=}: nothing is computed in TF32: {model.label} has no matrix product in FP32 (Conv, Gemm, "
            "MatMul, …), and TF32 serves those alone",
            "check it in another precision",
        )
    left: dict[str, str] = lowered.details.get("left_float", {})
    reasons: dict[str, list[str]] = {}
    for name, _, kind in lowered.details[_ARITHMETIC]:
        reasons.setdefault(left.get(name, f"computed in {kind}"), []).append(name)
    listed = "".join(f"\n    {_some(names)}: {reason}" for reason, names in reasons.items())
    hint = "narrow keep_fp32" if keep_fp32 else "export these nodes as ONNX operators, or check another precision"
    raise NothingComputedError(f"{precision=}: nothing of {model.label} is computed in {precision}{listed}", hint)


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
                f"{precision=}: {model.label} has no Q/DQ nodes{' of activations' * model.has_qdq}, and no calibration "
                "data is given",
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


def _narrowed(model: OnnxModel, path: Path, cache: Cache) -> Path:
    """The file at `path`, which is `model` or was made from it alone, with FP64 as FP32."""

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import double

        graph.write(double.to_float(graph.read(path)), folder / MODEL_FILE)

    parts = {"model": model.sha256, "given": str(path == model.path), **_library_versions()}
    return cache.get_or_make(Key("narrowed", model.label, parts), make).path / MODEL_FILE


def prepared(model: OnnxModel, keep_fp32: tuple[str, ...], cache: Cache) -> Path:
    """The FP32 model that is lowered: that behind 16-bit types and Q/DQ, FP64 as FP32, batch normalization folded."""
    source = Reference(model, cache).path()
    if model.has_double:
        source = _narrowed(model, source, cache)
    if "BatchNormalization" not in model.op_types:
        return source
    parts = {"model": model.sha256, "keep_fp32": json.dumps(sorted(keep_fp32)), **_library_versions()}

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import constants, fold

        read = graph.read(source)
        kept = graph.matching_nodes(read, keep_fp32)
        constants.fold_casts(read)
        graph.write(fold.fold_batch_norm(read, kept), folder / MODEL_FILE)

    return cache.get_or_make(Key("folded", model.label, parts), make).path / MODEL_FILE


def _write_details(folder: Path, notes: Sequence[str], details: Mapping[str, Any]) -> None:
    (folder / _DETAILS_FILE).write_text(json.dumps({"notes": list(notes), **details}))


def _make_half(model: OnnxModel, precision: Any, keep_fp32: tuple[str, ...], cache: Cache, folder: Path) -> None:
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision import computed, half

    lowered = half.to_half(graph.read(prepared(model, keep_fp32, cache)), precision, keep_fp32)
    graph.write(lowered.model, folder / MODEL_FILE)
    found = arithmetic.operators(computed.survey(lowered.model))
    notes = [
        f"weight {each.name}: {each.count} values up to {each.value:.4g} do not fit {precision} "
        f"and became ±{half.LARGEST[precision]:g}"
        for each in lowered.overflow
    ]
    notes += [
        f"constant {each.name} ({each.value:.4g}, read by {_some(each.readers)}) is too small for {precision}: "
        "it became 0"
        for each in lowered.underflow
    ]
    notes += _without_kernel_note(precision, lowered.without_kernel)
    mine = arithmetic.within(found, precision)
    if 0 < 2 * len(mine) < len(found):
        others = [each for each in found if each not in mine]
        reasons = dict.fromkeys(lowered.left.get(each.node, f"computed in {each.kind}") for each in others)
        notes.append(
            f"{len(mine)} of {len(found)} nodes that do arithmetic compute in {precision}, the others do not: "
            f"{', '.join(list(reasons)[:5])}"
        )
    constants = {"overflow": lowered.overflow, "underflow": lowered.underflow}
    _write_details(
        folder,
        notes,
        {
            _ARITHMETIC: found,
            "left_float": dict(lowered.left),
            "constants": {kind: [asdict(each) for each in changed] for kind, changed in constants.items()},
        },
    )


def _without_kernel_note(precision: str, nodes: Mapping[str, str]) -> list[str]:
    """What stays in FP32 for want of a kernel, by operator."""
    if not nodes:
        return []
    shown = 3
    kinds = []
    for op_type in sorted(set(nodes.values())):
        names = [name for name, each in nodes.items() if each == op_type]
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        kinds.append(f"{op_type} ({', '.join(names[:shown])}{more})")
    return [f"TensorRT has no {precision} kernel for {'; '.join(kinds)}: they stay in FP32"]


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
    from pytest_trtcheck.precision import calibrate, computed, quantization_plan, quantize

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
            lambda probe: ort.OrtRunner(probe, model.label, custom_ops=model.custom_ops),
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
    quantized = quantize.quantize(read, plan, ranges.amax(), precision)
    graph.write(quantized, folder / MODEL_FILE)
    _write_details(
        folder,
        [f"{precision}: {quantization_plan.summary(plan)}; ranges by {given.method} from {ranges.samples} samples"],
        {
            "ranges": json.loads(ranges.to_json()),
            "left_float": dict(plan.left_float),
            _ARITHMETIC: computed.survey(quantized),
        },
    )


# --- emulation -------------------------------------------------------------------------------------------------------


def computes_the_reference(lowered: Lowered, precision: Precision) -> bool:
    """Whether the emulation would be the reference itself, so that comparing them says nothing."""
    return precision == "fp32" and not lowered.details.get("narrowed", False)


def emulation(model: OnnxModel, lowered: Lowered, precision: Precision, cache: Cache) -> OrtRunner:
    """The lowered model's arithmetic on ONNX Runtime's CPU provider.

    For fp32 it is the model itself: what it computes is the reference.
    """
    path = emulated_path(model, lowered, precision, cache)
    label = model.label if path == model.path else f"{model.label} (emulated {precision})"
    return ort.OrtRunner(path, label, custom_ops=model.custom_ops)


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
    if precision == "fp32":
        return lowered.path
    tf32 = precision == "tf32"
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
    if lowered.taken_as_it_is or lowered.path == model.path:
        return Reference(model, cache).path()
    if lowered.details.get("narrowed", False):
        return lowered.path
    return prepared(model, keep_fp32, cache)
