"""An engine that exists as a system under test: loaded because the user named it, in a process of its own first."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pytest_trtcheck import backends
from pytest_trtcheck.backends.base import Acceptance, Built, EngineSpec
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.backend import TensorRT
from pytest_trtcheck.backends.tensorrt.io import DTYPES
from pytest_trtcheck.backends.tensorrt.module import EITHER, Target, TensorRTModule, available, hash_plugin
from pytest_trtcheck.backends.tensorrt.plan_file import PlanFile, refuse_unfit
from pytest_trtcheck.backends.tensorrt.trial import KERNELS, Trial, kernels_of, plan_bytes
from pytest_trtcheck.cache import Key
from pytest_trtcheck.choices import is_pair
from pytest_trtcheck.errors import ArgumentError, InputError, ModelError
from pytest_trtcheck.record import EngineRecord, typed
from pytest_trtcheck.spec import PRECISIONS, Precision

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.base import Backend, Machine, Runner
    from pytest_trtcheck.cache import Cache, Entry
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import ShapeRange

_FOUND_FILE = "found.json"
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_INTEGERS = frozenset({"int64", "int32"})


@dataclass(frozen=True)
class ExistingEngine(TensorRT):
    """An engine from a file. Nothing is built, and nothing stands in for it where it cannot run.

    Parameters
    ----------
    file
        What the file tells.
    why_not_run
        Why it runs nowhere here; empty where it does.
    """

    file: PlanFile = field(kw_only=True)
    why_not_run: str = ""

    builds: ClassVar[bool] = False
    is_file: ClassVar[bool] = True

    @property
    def runs(self) -> bool:
        """Whether its GPU and its TensorRT are here."""
        return not self.why_not_run

    @property
    def no_engine(self) -> str:
        """Why it runs nowhere here."""
        return self.why_not_run

    @property
    def builder(self) -> Backend:
        """What builds other engines of the same model."""
        return TensorRT(self.module, self.target, self.product, self.gpu)

    def accepts(self, *_: object, **__: object) -> Acceptance:
        """Whatever model it was built from, it was built."""
        return Acceptance()

    def why_not(self, precision: Precision, op_types: Collection[str]) -> str | None:
        """Nothing: it was built."""
        del precision, op_types
        return None

    def found_in_file(self) -> EngineRecord:
        """The engine, for the report, as far as its file tells."""
        return EngineRecord(
            key=self.file.sha256,
            cached=False,
            miss_reason=None,
            build_s=0.0,
            bytes=self.file.bytes,
            sha256=self.file.sha256,
            source="file",
            file=self.file.label,
            built_by=self.file.builder,
            built_for=self.file.built_for,
        )

    def build(self, spec: EngineSpec, cache: Cache) -> Built:
        """The file, once a process of its own was seen to load and run it, and the model's inputs and outputs fit.

        Raises
        ------
        GpuError
            It cannot be loaded or run; the loader is quoted.
        ModelError, InputError
            It is an engine of another model, or for other shapes.
        """
        key = Key(
            "engine_file",
            self.file.label,
            {
                "sha256": self.file.sha256,
                "plugins": json.dumps([hash_plugin(plugin) for plugin in spec.options.plugins]),
                **self.key_parts(),
            },
        )
        entry = cache.get_or_make(key, lambda folder: self._look(spec, folder))
        io = _io(entry)
        refuse_other_model(self.file.label, io, spec.model)
        loaded = None
        if self.gpu is not None:
            arguments = self._loaded_from_file(spec, io)
            trial = Trial(self.module, self.gpu, self.file.path, self.file.sha256, self._named, arguments, spec.cases)
            loaded = trial.beside(entry)
        return Built(spec, self.file.path, self.found_in_file(), entry, loaded)

    def _look(self, spec: EngineSpec, folder: Path) -> None:
        found = tensorrt.inspect(
            self.module, self.file.path, folder / KERNELS, label=self._named, plugins=spec.options.plugins
        )
        (folder / _FOUND_FILE).write_text(json.dumps(found))

    @property
    def _named(self) -> str:
        targets = f" for compute capability {', '.join(self.file.built_for)}" if self.file.built_for else ""
        return f"{self.file.label} (built by {self.file.builder}{targets})"

    def load(self, built: Built) -> Runner:
        """The very bytes that were looked at, on the GPU, under the profile that the inputs lie in."""
        from pytest_trtcheck.backends.tensorrt.engine import Engine

        assert built.entry is not None
        serialized = plan_bytes(built.path, self.file.sha256, self.file.label)
        io = _io(built.entry)
        arguments = self._loaded_from_file(built.spec, io)
        return Engine(serialized, self.module, jit_cache=kernels_of(built.entry), **arguments)

    def _loaded_from_file(self, spec: EngineSpec, io: Mapping[str, Any]) -> dict[str, Any]:
        """With the profile that the inputs lie in, and what is converted on the way in and out."""
        profile = chosen_profile(self.file.label, io, spec.profile)
        return {
            "plugins": [*spec.options.plugins],
            "profile": profile,
            "outer": dict(_converted(io, spec.model)),
        }

    def doubt(self, built: Built, runner: Runner, case: Case) -> str | None:
        """Why it does not compute in a pair that was stated for it; all else is read from its layers."""
        if not is_pair(built.spec.precision):
            return None
        spec = replace(built.spec, lowered=replace(built.spec.lowered, taken_as_it_is=False))
        return super().doubt(replace(built, spec=spec), runner, case)

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """What is converted on the way in and out."""
        del runner
        assert built.entry is not None
        io = _io(built.entry)
        outer = dict(_converted(io, built.spec.model))
        changed = [
            f"{tensor['name']} {outer[tensor['name']]} ↔ {_numpy(tensor)}"
            for tensor in (*io["inputs"], *io["outputs"])
            if tensor["name"] in outer
        ]
        return (f"inputs and outputs were converted: {', '.join(changed)}",) if changed else ()


def find(file: PlanFile, name: str, machine: Machine) -> ExistingEngine:
    """What loads an engine, on this machine.

    Parameters
    ----------
    name
        The backend that was asked for.

    Raises
    ------
    ArgumentError, ModelError
        The file is of another TensorRT, or for another GPU.
    """
    if name not in {backends.AUTO, backends.EMULATED, file.module}:
        raise ArgumentError(
            f"{file.label}: is an engine of {file.builder}, and backend={name!r} was asked for",
            f"leave the backend out, or name {file.module}",
            code="argument-conflict",
        )
    requested, detected = machine.requested, machine.detected
    module = available(file.module)
    others = (each for each in EITHER if each != file.module)
    other = available(*others) if module is None else None
    capability = detected.compute_capability if detected else (requested and requested.compute_capability) or (0, 0)
    product = detected.product if detected else requested.product if requested else "this machine"
    refuse_unfit(file, module, other, product, capability)
    why_not = ""
    if detected is None:
        why_not = f"an engine runs on a GPU alone, and nothing stands in for it: {machine.no_gpu}"
    elif module is None:
        why_not = f"it takes {file.builder}, and no TensorRT is installed"
    elif name == backends.EMULATED:
        why_not = f"the backend {name} was asked for, and an engine is run by TensorRT alone"
    return ExistingEngine(
        module or TensorRTModule(file.module, "", None),
        Target(capability, here=detected is not None),
        product,
        None if why_not else detected,
        file=file,
        why_not_run=why_not and f"{file.label}: not run: {why_not}",
    )


# --- does it fit the model? -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: list[int]
    profiles: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def _io(entry: Entry) -> dict[str, list[dict[str, Any]]]:
    """What `Engine.io` gave, all that is read of it."""

    def taken(found: Any) -> dict[str, list[dict[str, Any]]]:
        return {
            side: [asdict(each) for each in typed(found["io"][side], list[_Tensor])] for side in ("inputs", "outputs")
        }

    return entry.read_json(_FOUND_FILE, taken)


def refuse_other_model(label: str, io: Mapping[str, Any], model: OnnxModel) -> None:
    """Refuse an engine whose inputs and outputs are not the model's.

    Parameters
    ----------
    io
        "inputs" and "outputs": a list each of {name, dtype (TensorRT's name), shape (-1: open), profiles}.

    Raises
    ------
    ModelError
        All that does not fit.
    """
    problems = [
        problem
        for side, specs in (("input", model.inputs), ("output", model.outputs))
        for problem in _misfits(side, io[f"{side}s"], specs)
    ]
    if problems:
        raise ModelError(
            f"{label}: is no engine of {model.label}:\n  " + "\n  ".join(problems),
            "name the model that it was built from, or build the engine again from this one",
            code="engine-model",
        )


def _misfits(side: str, tensors: Sequence[Mapping[str, Any]], specs: Sequence[Any]) -> Iterator[str]:
    declared = {spec.name: spec for spec in specs}
    names = [tensor["name"] for tensor in tensors]
    if missing := [name for name in declared if name not in names]:
        yield f"{side}s that the engine lacks: {', '.join(missing)}"
    if added := [name for name in names if name not in declared]:
        yield f"{side}s that the model lacks: {', '.join(added)}"
    for tensor in tensors:
        spec = declared.get(tensor["name"])
        if spec is None:
            continue
        dtype, shape = _numpy(tensor), tuple(tensor["shape"])
        if not _convertible(spec.dtype, dtype):
            yield f"{side} {spec.name!r} is {dtype} in the engine and {spec.dtype} in the model"
        fits = len(shape) == len(spec.shape) and all(
            size == -1 or not isinstance(dim, int) or size == dim for size, dim in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            yield f"{side} {spec.name!r} has shape {_shown(shape)} in the engine and {_shown(spec.shape)} in the model"


def _shown(shape: Sequence[int | str | None]) -> str:
    return f"({', '.join('?' if dim in (-1, None) else str(dim) for dim in shape)})"


def _numpy(tensor: Mapping[str, Any]) -> str:
    name = tensor["dtype"]
    return np.dtype(DTYPES[name]).name if name in DTYPES else str(name).lower()


def _convertible(model: str, engine: str) -> bool:
    return model == engine or any({model, engine} <= kind for kind in (_FLOATS, _INTEGERS))


def _converted(io: Mapping[str, Any], model: OnnxModel) -> Iterator[tuple[str, str]]:
    """The tensors that the model has in another type than the engine, and in which. FP64 is FP32 to TensorRT."""
    of_engine = {tensor["name"]: _numpy(tensor) for tensor in (*io["inputs"], *io["outputs"])}
    for spec in (*model.inputs, *model.outputs):
        dtype = "float32" if spec.dtype == "float64" else spec.dtype
        if of_engine.get(spec.name, dtype) != dtype:
            yield spec.name, dtype


def chosen_profile(label: str, io: Mapping[str, Any], spans: Mapping[str, ShapeRange]) -> int:
    """The index of the engine's optimization profile that takes all the shapes of a check.

    Raises
    ------
    InputError
        None does; each says what it takes.
    """
    inputs = {tensor["name"]: tensor for tensor in io["inputs"]}
    wanted = {name: span for name, span in spans.items() if name in inputs}
    count = max((len(tensor["profiles"]) for tensor in inputs.values()), default=0)
    for index in range(max(count, 1)):
        if all(_takes(inputs[name], index, span) for name, span in wanted.items()):
            return index
    asked = ", ".join(f"{name} {_span(span.min, span.max)}" for name, span in wanted.items())
    each = [
        f"profile {index}: "
        + ", ".join(
            f"{name} {_span(tensor['profiles'][index][0], tensor['profiles'][index][2])}"
            if index < len(tensor["profiles"])
            else f"{name} {_shown(tensor['shape'])}"
            for name, tensor in inputs.items()
        )
        for index in range(max(count, 1))
    ]
    raise InputError(
        f"{label}: takes no inputs of these shapes ({asked}):\n  " + "\n  ".join(each),
        "give inputs that lie in one of its profiles, or batch= and shapes= that do",
        code="input-profile",
    )


def _takes(tensor: Mapping[str, Any], index: int, span: ShapeRange) -> bool:
    if index < len(tensor["profiles"]):
        least, _, most = tensor["profiles"][index]
    else:
        least = most = tensor["shape"]
    return len(least) == len(span.min) and all(
        low <= smallest and largest <= high
        for low, smallest, largest, high in zip(least, span.min, span.max, most, strict=True)
    )


def _span(low: Sequence[int], high: Sequence[int]) -> str:
    return _shown(tuple(low)) if tuple(low) == tuple(high) else f"{_shown(tuple(low))} to {_shown(tuple(high))}"


# --- what it computes in ----------------------------------------------------------------------------------------------


def precisions_read(label: str, layers: Mapping[str, int]) -> tuple[Precision, ...]:
    """The precisions that an engine with these layers may be called, the exact one first; none where it does not tell.

    Parameters
    ----------
    layers
        By the engine inspector, how many layers compute in what.

    Raises
    ------
    ModelError
        Some compute in a type that nothing here can judge.
    """
    kinds = {kind for kind, count in layers.items() if count} - {"other", "unknown"}
    if narrow := kinds & {"int4", "fp4"}:
        raise ModelError(
            f"{label}: the engine computes in {', '.join(sorted(narrow))} ({layers_shown(layers)}), for which "
            "there are no limits",
            f"the precisions are {', '.join(PRECISIONS)}",
            code="engine-precision",
        )
    rest = next((kind for kind in ("bf16", "fp16") if kind in kinds), None)
    quantized = next((kind for kind in ("int8", "fp8") if kind in kinds), None)
    if quantized is not None:
        # The 16-bit rest may be all inside kernels that read 8 bits; then no layer tells of it.
        pairs = [f"{quantized}+{each}" for each in ("fp16", "bf16") if rest in {each, None}]
        names: tuple[str, ...] = (*pairs, quantized) if rest else (quantized, *pairs)
    elif rest is not None:
        names = (rest,)
    else:
        names = ("tf32", "fp32") if "tf32" in kinds else ("fp32", "tf32") if kinds else ()
    return tuple(name for name in names if name in PRECISIONS)


def layers_shown(layers: Mapping[str, int]) -> str:
    """The layers, for messages."""
    return ", ".join(f"{count} in {kind}" for kind, count in layers.items()) or "no layers"
