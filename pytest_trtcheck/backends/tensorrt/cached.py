"""Engines from the cache or built once: for the GPU in this machine, or compiled for another one."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.io import DTYPES
from pytest_trtcheck.backends.tensorrt.module import Target, available, find_module, hash_plugin
from pytest_trtcheck.backends.tensorrt.support import unsupported
from pytest_trtcheck.cache import Cache, Entry, Key, hash_file
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.gpu.device import Gpu, identity_parts
from pytest_trtcheck.record import EngineRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.build import Plan
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import TensorRTModule
    from pytest_trtcheck.backends.tensorrt.timing import TimedRun
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.record import Evidence
    from pytest_trtcheck.spec import Backend, BuildOptions, InputMapping, Precision, Shape, ShapeRange

PLAN_FILE = "engine.plan"
IO_FILE = "io.json"
_BUILD_FILE = "build.json"
_TIMING_CACHE = "timing.cache"
_JIT_CACHE = "jit.cache"
_CONTENTS = "2"
"""Which files an entry holds: part of its key, so that an entry without the newer ones is made again."""


@dataclass(frozen=True)
class Place:
    """Where engines are for: the GPU, and the TensorRT that builds for it.

    Parameters
    ----------
    gpu
        The GPU in this machine; None when the engine is compiled for another one.
    """

    module: TensorRTModule
    target: Target
    name: str
    gpu: Gpu | None

    def key_parts(self) -> dict[str, str]:
        """What of it an engine is bound to."""
        versions = {"module": self.module.name, "tensorrt": self.module.version, "cuda": _cuda(self.module.name)}
        if self.gpu is not None:
            return {**versions, **identity_parts(self.gpu)}
        return {**versions, "compute_capability": self.target.sm}


@dataclass(frozen=True)
class Built:
    """An engine in the cache."""

    entry: Entry
    record: EngineRecord
    warnings: tuple[str, ...]

    @property
    def plan(self) -> Path:
        """The serialized engine."""
        return self.entry.path / PLAN_FILE


def place_for(backend: Backend, requested: GpuModel | None, detected: Gpu | None) -> tuple[Place | None, str]:
    """Where to build, or None and why nothing is built.

    Raises
    ------
    MissingDependencyError
        The TensorRT that was asked for by name is not installed.
    """
    if backend == "onnxruntime":
        return None, "backend onnxruntime: no engine was asked for"
    if detected is None and requested is None:
        return None, "no engine was built: there is no GPU, and --trt-gpu names none to compile for"
    module = available(backend) if backend == "auto" else find_module(backend)
    if module is None:
        return None, "no engine was built: neither tensorrt nor tensorrt_rtx is installed"
    if detected is not None:
        return Place(module, Target(detected.compute_capability, here=True), detected.product, detected), ""
    assert requested is not None
    if requested.compute_capability is None:
        return None, f"no engine was built: {requested.product} has several compute capabilities; name a product"
    target = Target(requested.compute_capability, here=False)
    return Place(module, target, requested.product, None), ""


@dataclass(frozen=True)
class Order:
    """What engine to build, apart from where it is for.

    Parameters
    ----------
    profile
        The range of shapes of every input with open dimensions.
    """

    model: OnnxModel
    lowered: Lowered
    precision: Precision
    profile: Mapping[str, ShapeRange]
    options: BuildOptions

    def key_parts(self) -> dict[str, str]:
        """What of it the engine depends on."""
        apart = {"plugins", "custom_ops", "timeout_s"}
        chosen = {name: json.dumps(value) for name, value in asdict(self.options).items() if name not in apart}
        shapes = {name: [span.min, span.opt, span.max] for name, span in sorted(self.profile.items())}
        return {
            "lowered": self.lowered.key,
            "precision": self.precision,
            "profile": json.dumps(shapes),
            "plugins": json.dumps([hash_plugin(plugin) for plugin in self.options.plugins]),
            "contents": _CONTENTS,
            **chosen,
        }


def why_not(place: Place, precision: Precision, op_types: Collection[str]) -> str | None:
    """What the GPU or the library is known not to serve, said before building.

    Parameters
    ----------
    op_types
        The operators that are computed in `precision`.
    """
    return unsupported(place.module, place.target, precision, op_types)


def computed_in(precision: Precision, place: Place) -> Precision:
    """The precision that TensorRT really computes in: TensorRT-RTX takes TF32 for FP32, whatever it is told."""
    return "tf32" if precision == "fp32" and place.module.is_rtx else precision


def build(order: Order, place: Place, cache: Cache) -> Built:
    """The engine, built by one process and taken from the cache by all others.

    Raises
    ------
    BuildError, UnsupportedTargetError, ArgumentError
        TensorRT can't parse or build the model; the message quotes all that it said.
    """
    tensorrt.check_options(place.module, order.options)
    key = Key("engine", order.model.label, {**order.key_parts(), **place.key_parts()})
    make = functools.partial(_make, order, place, cache)
    entry = cache.get_or_make(key, make)
    made = json.loads((entry.path / _BUILD_FILE).read_text())
    record = EngineRecord(
        key=key.digest,
        cached=entry.cached,
        miss_reason=entry.miss_reason,
        build_s=made["build_s"],
        bytes=made["bytes"],
        sha256=made["sha256"],
    )
    return Built(entry, record, tuple(made["warnings"]))


def start_cuda() -> None:
    """Make the GPU's context, which takes a quarter of a second once; an engine that is loaded says what is wrong."""
    from pytest_trtcheck.backends.tensorrt.cuda import Cuda

    with contextlib.suppress(CheckError), contextlib.closing(Cuda()):
        pass


def load(built: Built, place: Place, options: BuildOptions) -> Engine:
    """The engine on the GPU, with the kernels that TensorRT-RTX compiled when it was loaded before.

    Raises
    ------
    GpuError
        It cannot be loaded.
    """
    from pytest_trtcheck.backends.tensorrt.engine import Engine

    return Engine(built.plan, place.module, jit_cache=built.entry.read_extra(_JIT_CACHE), plugins=options.plugins)


class EngineByShape:
    """An engine for each shape that it is called with, built or taken from the cache at the first call.

    Parameters
    ----------
    open_for
        Makes the engine for one case.
    """

    evidence: Evidence = "engine"

    def __init__(self, open_for: Callable[[Case], Engine]) -> None:
        self._open_for = open_for
        self._engines: dict[tuple[tuple[str, Shape], ...], Engine] = {}

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run the engine for these shapes once."""
        case = dict(inputs)
        return self._engine(case)(case)

    def timed_runs(self, inputs: InputMapping, *, graph: bool = True) -> TimedRun:
        """Prepare measuring with these inputs; what it gives must be closed before the next call."""
        case = dict(inputs)
        return self._engine(case).timed_runs([case], graph=graph)

    def _engine(self, case: Case) -> Engine:
        shapes = tuple((name, np.shape(array)) for name, array in sorted(case.items()))
        if shapes not in self._engines:
            self._engines[shapes] = self._open_for(case)
        return self._engines[shapes]

    def close(self) -> None:
        """Free every engine."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def precision_not_in_effect(engine: Engine, precision: Precision, lowered: Lowered, case: Case) -> str | None:
    """Why the engine does not compute in `precision`, by the engine inspector; None when some of its layers do.

    A model that was taken as it is says itself what it computes in, and FP32 is what any layer may do.
    """
    if lowered.taken_as_it_is or precision in {"fp32", "tf32"}:
        return None
    layers = engine.layers_by_precision()
    if layers.get(precision) or set(layers) <= {"unknown"}:
        return None
    if any(np.size(array) == 0 for array in case.values()):
        # TensorRT leaves out what computes no element.
        return f"the inputs are empty, so that the engine computes nothing in {precision}: give at least one row"
    found = ", ".join(f"{count} in {name}" for name, count in layers.items())
    return f"{precision} did not take effect: the engine inspector lists {found or 'no layers'}"


def is_stated_alone(engine: Engine, precision: Precision) -> bool:
    """Whether the engine inspector tells of no layer what it computes in, so that nothing proves the precision."""
    return precision not in {"fp32", "tf32"} and set(engine.layers_by_precision()) <= {"unknown"}


def keep_kernels(built: Built, engine: Engine) -> None:
    """Keep beside the engine what TensorRT-RTX compiled for it, unless it came from there."""
    kernels = None if engine.jit_cache_used else engine.jit_cache()
    if kernels:
        built.entry.write_extra(_JIT_CACHE, kernels)


def _make(order: Order, place: Place, cache: Cache, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="trtcheck-timing-") as scratch:
        timings = Path(scratch, _TIMING_CACHE)
        kept = _kept_timings(order.options, place, cache)
        if kept is not None:
            timings.write_bytes(kept.read_extra(_TIMING_CACHE) or b"")
        plan = tensorrt.build(
            place.module,
            order.lowered.path,
            folder / PLAN_FILE,
            target=place.target,
            precision=order.precision,
            options=order.options,
            profile=order.profile,
            timing_cache=timings if kept is not None else None,
            label=f"{order.model.label} in {order.precision}",
        )
        if kept is not None and timings.stat().st_size:
            kept.write_extra(_TIMING_CACHE, timings.read_bytes())
    made = {
        "build_s": plan.build_s,
        "bytes": plan.bytes,
        "sha256": hash_file(plan.path),
        "warnings": list(plan.warnings),
    }
    (folder / _BUILD_FILE).write_text(json.dumps(made))
    (folder / IO_FILE).write_text(json.dumps(_io(plan, order)))


def _io(plan: Plan, order: Order) -> dict[str, list[dict[str, Any]]]:
    """The engine's inputs and outputs: TensorRT's shapes, the model's names of the open dimensions, the profile."""
    declared = {spec.name: spec.shape for spec in (*order.model.inputs, *order.model.outputs)}

    def described(tensor: dict[str, Any]) -> dict[str, Any]:
        name, dtype = tensor["name"], tensor["dtype"]
        dims = declared.get(name, ())
        if len(dims) != len(tensor["shape"]):
            dims = (None,) * len(tensor["shape"])
        return {
            **tensor,
            "dtype": np.dtype(DTYPES[dtype]).name if dtype in DTYPES else dtype.lower(),
            "symbols": [dim if isinstance(dim, str) else None for dim in dims],
            "profile": asdict(order.profile[name]) if name in order.profile else None,
        }

    return {side: [described(tensor) for tensor in tensors] for side, tensors in plan.io.items()}


def _kept_timings(options: BuildOptions, place: Place, cache: Cache) -> Entry | None:
    """Where the builder's timings are kept: they hold for one GPU, CUDA and TensorRT alone."""
    if place.module.is_rtx or not options.timing_cache:
        return None
    return cache.get_or_make(
        Key("timing", place.name, place.key_parts()), lambda folder: (folder / "about.txt").write_text(place.name)
    )


@functools.cache
def _cuda(module: str) -> str:
    """The CUDA that the installed TensorRT was built for, from the name of its distribution."""
    from importlib.metadata import PackageNotFoundError, version

    for major in ("13", "12", "11"):
        try:
            version(f"{module}_cu{major}")
        except PackageNotFoundError:
            continue
        return major
    return "unknown"
