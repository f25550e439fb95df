"""TensorRT as a system under test: engines built once and kept, for the GPU in this machine or compiled for another."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from pytest_trtcheck.backends.base import Acceptance, Backend, Built, EngineSpec
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt import sparsity
from pytest_trtcheck.backends.tensorrt.acceptance import acceptance
from pytest_trtcheck.backends.tensorrt.emulated import Emulated
from pytest_trtcheck.backends.tensorrt.io import DTYPES
from pytest_trtcheck.backends.tensorrt.layers import Inspected, timed, unproved
from pytest_trtcheck.backends.tensorrt.module import EITHER, Target, find_module, hash_plugin
from pytest_trtcheck.backends.tensorrt.options import check_options, key_parts
from pytest_trtcheck.backends.tensorrt.support import builds_on, of_the_gpu, unsupported
from pytest_trtcheck.backends.tensorrt.trial import KERNELS, EngineApart, Trial, kernels_of
from pytest_trtcheck.cache import Cache, Entry, Key, hash_file, scratch_folder
from pytest_trtcheck.choices import half_part, is_pair
from pytest_trtcheck.errors import CacheError, CheckError, GpuError, MissingDependencyError
from pytest_trtcheck.gpu.device import Gpu, identity_parts, why_no_tf32
from pytest_trtcheck.gpu.table import FIRST_WITH
from pytest_trtcheck.record import EngineRecord, typed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pytest_trtcheck.backends.base import Machine, Runner, TimedRuns
    from pytest_trtcheck.backends.tensorrt.build import Plan
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import ModuleName, TensorRTModule
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.record import Evidence
    from pytest_trtcheck.spec import BuildOptions, HardwareCompatible, InputMapping, Precision

PLAN_FILE = "engine.plan"
IO_FILE = "io.json"
_BUILD_FILE = "build.json"
_TIMING_CACHE = "timing.cache"
_CONTENTS = "3"
"""Which files an entry holds: part of its key, so that an entry without the newer ones is made again."""


@dataclass(frozen=True)
class TensorRT(Backend):
    """An installed TensorRT, and the GPU that it builds for.

    Parameters
    ----------
    product
        What the GPU is called.
    gpu
        The GPU in this machine; None when engines are compiled for another one.
    """

    module: TensorRTModule
    target: Target
    product: str
    gpu: Gpu | None = None

    evidence: ClassVar[Evidence] = "engine"
    how: ClassVar[str] = "on the GPU"
    builds: ClassVar[bool] = True
    is_timed: ClassVar[bool] = True
    takes_instances: ClassVar[bool] = True
    ships: ClassVar[tuple[ModuleName, ...]] = ("tensorrt",)
    """The modules that may be the one that ships: what stands against a model is what all of them say."""

    @property
    def name(self) -> str:
        """The module's."""
        return self.module.name

    @property
    def title(self) -> str:
        """The module's."""
        return self.module.title

    @property
    def builds_for(self) -> str:
        """The GPU."""
        return self.product

    @property
    def runs(self) -> bool:
        """Whether its GPU is here."""
        return self.gpu is not None

    @classmethod
    def require(cls) -> None:
        """See that the module is installed."""
        find_module(*cls.ships)

    @classmethod
    def find(cls, machine: Machine) -> Backend:
        """For the GPU that is here, else for the one that is named; emulated where neither tells what to build for."""
        requested, detected = machine.requested, machine.detected
        if detected is None and requested is None:
            return Emulated("no engine was built: there is no GPU, and --trt-gpu names none to compile for", cls.ships)
        module = cls._installed()
        if isinstance(module, str):
            return Emulated(f"no engine was built: {module}", cls.ships)
        if detected is not None:
            return cls(module, Target(detected.compute_capability, here=True), detected.product, detected)
        assert requested is not None
        if requested.compute_capability is None:
            several = f"{requested.product} has several compute capabilities; name a product"
            return Emulated(f"no engine was built: {several}", cls.ships)
        return cls(module, Target(requested.compute_capability, here=False), requested.product)

    @classmethod
    def _installed(cls) -> TensorRTModule | str:
        """The module, or why there is none where that is no error."""
        return find_module(*cls.ships)

    def versions(self) -> dict[str, str]:
        """The module."""
        return {self.module.name: self.module.version}

    def accepts(
        self, lowered: Lowered, label: str, options: BuildOptions, cache: Cache, *, will_build: bool
    ) -> Acceptance:
        """By its parser, or where it is going to build by what that would not notice."""
        return acceptance(lowered, label, self.ships, options, cache, builds=self.module if will_build else None)

    def why_not(self, precision: Precision, op_types: Collection[str]) -> str | None:
        """What the GPU or the library is known not to serve."""
        return unsupported(self.module, self.target, precision, op_types)

    def computes_in(self, precision: Precision) -> Precision:
        """TensorRT-RTX takes TF32 for FP32, whatever it is told, where the GPU has it."""
        has_tf32 = self.target.compute_capability >= FIRST_WITH["tf32"] and not why_no_tf32(self.gpu)
        return "tf32" if precision == "fp32" and self.module.is_rtx and has_tf32 else precision

    @classmethod
    def expect_build(cls) -> None:
        """Let the builder process get ready."""
        tensorrt.expect_build()

    @classmethod
    def dismiss_builder(cls) -> None:
        """End it."""
        tensorrt.dismiss_builder()

    @classmethod
    def start(cls) -> None:
        """Make the GPU's context."""
        from pytest_trtcheck.backends.tensorrt.cuda import make_context

        make_context()

    def key_parts(self, compatible: HardwareCompatible = "none") -> dict[str, str]:
        """What of it an engine is bound to, the operating system and the processor included."""
        versions = {"module": self.module.name, "tensorrt": self.module.version, "cuda": _cuda(self.module.name)}
        versions["platform"] = f"{sys.platform}-{platform.machine()}"
        if self.gpu is not None:
            return {**versions, **identity_parts(self.gpu, compatible)}
        return {**versions, "compute_capability": self.target.sm}

    def build(self, spec: EngineSpec, cache: Cache) -> Built:
        """The engine from the cache, or built into it."""
        check_options(self.module, spec.options, spec.precision, self.target)
        key = Key("engine", spec.model.label, {**_key_parts(spec), **self.key_parts(spec.options.hardware_compatible)})
        with contextlib.ExitStack() as held:
            tried: list[EngineApart | CheckError | None] = []

            def make(folder: Path) -> None:
                held.close()  # what was made and could not be kept is made again elsewhere, and is another engine
                tried[:] = [self._make(spec, cache, folder)]
                if isinstance(tried[0], EngineApart):
                    held.callback(tried[0].close)

            entry = cache.get_or_make(key, make, shared=True)
            found = self._found(spec, entry, next(iter(tried), None))
            held.pop_all()  # what runs it is the caller's
        return found

    def _found(self, spec: EngineSpec, entry: Entry, loaded: EngineApart | CheckError | None) -> Built:
        """What lies in the cache, and what came of trying it where it was made now."""
        made = entry.read_json(_BUILD_FILE, lambda found: typed(found, _Made))
        if entry.cached and hash_file(entry.path / PLAN_FILE) != made.sha256:
            # Checksums guard against accidents: this was somebody who wrote them again.
            raise CacheError(
                f"{spec.model.label}: {entry.path / PLAN_FILE} was replaced: it is not the engine that was built",
                "see who can write there, then empty it with --trt-cache-clear",
                code="cache-unsafe",
            )
        notes = made.notes
        if made.gpu != self.product:
            notes = (f"built on the {made.gpu}, whose choice of kernels it is: hardware_compatible", *notes)
        record = EngineRecord(
            key=entry.key.digest,
            cached=entry.cached,
            miss_reason=entry.miss_reason,
            cache=entry.origin,
            build_s=made.build_s,
            bytes=made.bytes,
            sha256=made.sha256,
            build_notes=notes,
        )
        if isinstance(loaded, CheckError):  # It is kept as it is: whoever tries it again need not build it again.
            raise loaded
        plan = entry.path / PLAN_FILE
        if self.gpu is not None and loaded is None:
            loaded = self._trial(spec, self.gpu, plan, made.sha256).beside(entry)
        return Built(spec, plan, record, entry, loaded)

    def _trial(self, spec: EngineSpec, gpu: Gpu, plan: Path, sha256: str) -> Trial:
        label = f"the engine of {spec.model.label} in {spec.precision}"
        return Trial(self.module, gpu, plan, sha256, label, self._loaded_with(spec), spec.cases)

    def _loaded_with(self, spec: EngineSpec) -> dict[str, Any]:
        """What `Engine` is given beside the plan and the kernels, as JSON can hold it."""
        _, *names = spec.lowered.details.get("io", [None])
        return {
            "plugins": [*spec.options.plugins],
            "outer": {name: "float32" for listed in names for name in listed},
            "weights": str(spec.lowered.path) if spec.options.strip_weights else None,
            "streaming_mib": spec.options.weight_streaming_mib,
        }

    def load(self, built: Built) -> Runner:
        """The engine on the GPU, with the kernels that TensorRT-RTX compiled when it was loaded before."""
        from pytest_trtcheck.backends.tensorrt.engine import Engine

        kernels = kernels_of(built.entry) if built.entry else None
        return Engine(built.path, self.module, jit_cache=kernels, **self._loaded_with(built.spec))

    def described(self, built: Built, runner: Runner) -> EngineRecord | None:
        """With what the loaded engine takes of the device's memory, and what its layers compute in."""
        engine = cast("Engine | EngineApart", runner)
        assert built.record is not None
        return replace(
            built.record,
            device_memory_bytes=engine.device_memory_bytes,
            layers_by_precision=engine.layers_by_precision(),
            layers=engine.layer_records(built.spec.lowered.computing_nodes),
            aux_streams=engine.aux_streams,
            streamed_bytes=engine.streamed_bytes,
        )

    def doubt(self, built: Built, runner: Runner, case: Case) -> str | None:
        """Why the engine does not compute in its precision, by the engine inspector; None when some layers do.

        Of a pair both parts count. A model that was taken as it is says itself what it computes in, and FP32 is what
        any layer may do.
        """
        precision = built.spec.precision
        if built.spec.lowered.taken_as_it_is or precision in {"fp32", "tf32"}:
            return None
        engine = cast("Engine | EngineApart", runner)
        layers = engine.layers_by_precision()
        if set(layers) <= {"unknown"}:
            return None
        missing = unproved(layers, engine.tensor_types() if is_pair(precision) else (), precision)
        if missing is None:
            return None
        if any(np.size(array) == 0 for array in case.values()):
            # TensorRT leaves out what computes no element.
            return f"the inputs are empty, so that the engine computes nothing in {missing}: give at least one row"
        found = ", ".join(f"{count} in {name}" for name, count in layers.items())
        return f"{missing} did not take effect: the engine inspector lists {found or 'no layers'}"

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """What the build said, what the options came to, and whether anything proves the precision."""
        options, engine = built.spec.options, cast("Engine | EngineApart", runner)
        found = list(built.record.build_notes) if built.record else []
        if options.strip_weights:
            found.append("the plan holds no weights: it was given those of the typed ONNX file as it was loaded")
        if options.weight_streaming_mib is not None and not engine.streamed_bytes:
            found.append("weight streaming: no weight is streamed, all of them stay on the GPU")
        return (*found, *_proof(built.spec.precision, engine))

    def costs(self, built: Built, runner: Runner, instances: int = 1) -> dict[str, float]:
        """Each of several instances has a context of its own; the weights are there once."""
        del built
        if instances == 1:
            return {}  # its record says so
        engine = cast("Engine", runner)
        return {"memory_mib": (engine.device_memory_bytes + (instances - 1) * engine.context_bytes) / 2**20}

    def timed_runs(
        self,
        runner: Runner,
        cases: Sequence[InputMapping],
        *,
        graph: bool = True,
        transfers: bool = False,
        instances: int = 1,
    ) -> TimedRuns:
        """By CUDA events; of several instances, each has a context and a stream of its own."""
        from pytest_trtcheck.backends.tensorrt.timing import TimedInstances, TimedRun

        engine = cast("Engine", runner)
        if instances > 1:
            return TimedInstances(engine, cases, instances, graph=graph, transfers=transfers)
        return TimedRun(engine, cases, graph=graph, transfers=transfers)

    def profiled(self, engine: EngineRecord, runner: Runner, case: Case) -> EngineRecord:
        """By TensorRT's profiler, in runs of their own."""
        try:
            runs = cast("Engine", runner).layer_times(case)
        except GpuError as error:
            if error.poisoned:
                raise
            return replace(engine, layers_untimed=error.headline)
        return replace(engine, layers=timed(engine.layers, runs))

    def keep(self, built: Built, runner: Runner) -> None:
        """Keep what TensorRT-RTX compiled for the engine, unless it came from there."""
        kernels = cast("Engine | EngineApart", runner).new_kernels()
        if kernels and built.entry:
            built.entry.write_extra(KERNELS, kernels)

    def _make(self, spec: EngineSpec, cache: Cache, folder: Path) -> EngineApart | CheckError | None:
        """Build into `folder`, and try what was built where its GPU is here: what came of that."""
        with scratch_folder("timing") as scratch, contextlib.ExitStack() as held:
            process = held.enter_context(tensorrt.expected_builder())
            timings = Path(scratch, _TIMING_CACHE)
            kept = self._kept_timings(spec.options, cache)
            if kept is not None:
                timings.write_bytes(kept.read_extra(_TIMING_CACHE) or b"")
            plan = tensorrt.build(
                self.module,
                spec.lowered.path,
                folder / PLAN_FILE,
                target=self.target,
                precision=spec.precision,
                options=spec.options,
                profile=spec.profile,
                timing_cache=timings if kept is not None else None,
                label=f"{spec.model.label} in {spec.precision}",
                process=process,
            )
            if kept is not None and timings.stat().st_size:
                kept.write_extra(_TIMING_CACHE, timings.read_bytes())
            sha256 = hash_file(plan.path)
            tried: EngineApart | CheckError | None = None
            if self.gpu is not None:
                try:
                    tried = self._trial(spec, self.gpu, plan.path, sha256).into(folder, process)
                except CheckError as error:
                    tried = error
            notes = [*plan.notes, sparsity.note(spec.lowered.path) if spec.options.sparsity else None]
            made = _Made(plan.build_s, plan.bytes, sha256, self.product, tuple(filter(None, notes)))
            (folder / _BUILD_FILE).write_text(json.dumps(asdict(made)))
            (folder / IO_FILE).write_text(json.dumps(_io(plan, spec)))
            if isinstance(tried, EngineApart):
                held.pop_all()  # the process is the engine's
        return tried

    def _kept_timings(self, options: BuildOptions, cache: Cache) -> Entry | None:
        """Where the builder's timings are kept: they hold for one GPU, CUDA and TensorRT alone."""
        if self.module.is_rtx or not options.timing_cache:
            return None
        key = Key("timing", self.product, self.key_parts())
        return cache.get_or_make(key, lambda folder: (folder / "about.txt").write_text(self.product))


@dataclass(frozen=True)
class TensorRTRtx(TensorRT):
    """TensorRT for RTX."""

    ships: ClassVar[tuple[ModuleName, ...]] = ("tensorrt_rtx",)


@dataclass(frozen=True)
class Auto(TensorRT):
    """The TensorRT that is installed, `tensorrt` before `tensorrt_rtx`; the emulation where neither is."""

    ships: ClassVar[tuple[ModuleName, ...]] = EITHER

    @classmethod
    def require(cls) -> None:
        """Nothing has to be installed."""

    def is_served_elsewhere(self, precision: Precision, said: str = "") -> bool:
        """What is compiled here for another GPU says nothing of the TensorRT that builds on that GPU itself."""
        return not self.runs and builds_on(self.target.compute_capability, precision) and (not said or of_the_gpu(said))

    @classmethod
    def _installed(cls) -> TensorRTModule | str:
        try:
            return find_module(*cls.ships)
        except MissingDependencyError as missing:
            return missing.message


def _proof(precision: Precision, engine: Inspected) -> tuple[str, ...]:
    """What the engine inspector does not prove of the precision."""
    if precision in {"fp32", "tf32"}:
        return ()
    if set(engine.layers_by_precision()) <= {"unknown"}:
        return (f"{precision} is stated, not proved: the engine inspector tells no layer's type",)
    if is_pair(precision) and (rest := half_part(precision)) not in engine.tensor_types():
        return (f"no tensor between the engine's layers is {rest}: what is not quantized was fused with what is",)
    return ()


def _key_parts(spec: EngineSpec) -> dict[str, str]:
    """What of it an engine depends on."""
    chosen = {name: json.dumps(value) for name, value in key_parts(spec.options).items()}
    shapes = {name: [span.min, span.opt, span.max] for name, span in sorted(spec.profile.items())}
    return {
        "lowered": spec.lowered.key,
        "precision": spec.precision,
        "profile": json.dumps(shapes),
        "plugins": json.dumps([hash_plugin(plugin) for plugin in spec.options.plugins]),
        "contents": _CONTENTS,
        **chosen,
    }


def _io(plan: Plan, spec: EngineSpec) -> dict[str, list[dict[str, Any]]]:
    """The engine's inputs and outputs: TensorRT's shapes, the model's names of the open dimensions, the profile."""
    declared = {put.name: put.shape for put in (*spec.model.inputs, *spec.model.outputs)}

    def described(tensor: dict[str, Any]) -> dict[str, Any]:
        name, dtype = tensor["name"], tensor["dtype"]
        dims = declared.get(name, ())
        if len(dims) != len(tensor["shape"]):
            dims = (None,) * len(tensor["shape"])
        return {
            **tensor,
            "dtype": np.dtype(DTYPES[dtype]).name if dtype in DTYPES else dtype.lower(),
            "symbols": [dim if isinstance(dim, str) else None for dim in dims],
            "profile": asdict(spec.profile[name]) if name in spec.profile else None,
        }

    return {side: [described(tensor) for tensor in tensors] for side, tensors in plan.io.items()}


@dataclass(frozen=True)
class _Made:
    """What an entry says of the engine in it; `gpu` is the product that it was built on."""

    build_s: float
    bytes: int
    sha256: str
    gpu: str | None
    notes: tuple[str, ...]


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
