"""The providers that compile: engines built once, kept in the cache as EPContext models, and only loaded after that."""

from __future__ import annotations

import json
import platform
import sys
from abc import abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pytest_trtcheck.backends.base import Built
from pytest_trtcheck.backends.onnxruntime import building, placement
from pytest_trtcheck.backends.onnxruntime.backend import OrtProvider
from pytest_trtcheck.backends.onnxruntime.options import profile_shapes
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt import plan_file
from pytest_trtcheck.backends.tensorrt.acceptance import acceptance
from pytest_trtcheck.backends.tensorrt.layers import unproved
from pytest_trtcheck.backends.tensorrt.module import available, hash_plugin
from pytest_trtcheck.cache import Key, hash_file
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.gpu.device import identity_parts, why_no_tf32
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.record import EngineRecord, typed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_trtcheck.backends.base import Acceptance, EngineSpec, Runner
    from pytest_trtcheck.backends.onnxruntime.session import ProviderRunner
    from pytest_trtcheck.cache import Cache, Entry
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.record import PartitionRecord
    from pytest_trtcheck.spec import BuildOptions, Precision

_FOUND = "build.json"
_CONTENTS = "1"
"""Which files an entry holds: part of its key."""
_LONGEST_NAME = 200


@dataclass(frozen=True)
class CompilingProvider(OrtProvider):
    """A provider that hands subgraphs to TensorRT, which builds an engine of each."""

    builds: ClassVar[bool] = True
    prefix: ClassVar[str]
    """Before the names of the provider's options."""
    compile_by: ClassVar[str]
    """The function that makes a session that builds, as "module:name"."""

    @property
    def builds_for(self) -> str:
        """The GPU."""
        return self.gpu.product if self.gpu else self.title

    @abstractmethod
    def rests_on(self) -> dict[str, str]:
        """The releases that an engine is bound to, by name."""

    def accepts(
        self, lowered: Lowered, label: str, options: BuildOptions, cache: Cache, *, will_build: bool
    ) -> Acceptance:
        """Its options are looked at; what TensorRT does not take would fall back, and is an error as it is there."""
        del will_build
        self.options(options)
        return acceptance(lowered, label, self.ships, options, cache)

    def versions(self) -> dict[str, str]:
        """ONNX Runtime and what the engines are of."""
        return {"onnxruntime": ort.module().__version__, **self.rests_on()}

    def computes_in(self, precision: Precision) -> Precision:
        """The provider leaves TensorRT's TF32 on, and has no option for it; TensorRT-RTX takes it for FP32."""
        return "tf32" if precision == "fp32" and not why_no_tf32(self.gpu) else precision

    def build(self, spec: EngineSpec, cache: Cache) -> Built:
        """The engines from the cache, or built into it."""
        assert self.gpu is not None
        chosen = self.options(spec.options)
        shapes = profile_shapes(spec.profile, f"{self.prefix}_profile")
        parts = {
            "provider": self.name,
            "onnxruntime": ort.module().__version__,
            **self.rests_on(),
            "platform": f"{sys.platform}-{platform.machine()}",
            **identity_parts(self.gpu, spec.options.hardware_compatible),
            "lowered": spec.lowered.key,
            "precision": spec.precision,
            "profile": json.dumps(shapes),
            "options": json.dumps(chosen, sort_keys=True),
            "plugins": json.dumps([hash_plugin(each) for each in (*spec.options.plugins, *spec.options.custom_ops)]),
            "contents": _CONTENTS,
        }
        key = Key("provider_engine", spec.model.label, parts)
        options = {**chosen, **shapes}
        entry = cache.get_or_make(key, lambda folder: self._make(spec, options, cache, folder), shared=True)
        made = _made(entry)
        record = EngineRecord(
            key=key.digest,
            cached=entry.cached,
            miss_reason=entry.miss_reason,
            cache=entry.origin,
            build_s=made["build_s"],
            bytes=made["bytes"],
            sha256=made["sha256"],
            layers_by_precision=made["layers"],
        )
        path = entry.path / building.CONTEXT
        return Built(spec, path if path.exists() else spec.lowered.path, record, entry)

    def _make(self, spec: EngineSpec, options: Mapping[str, str], cache: Cache, folder: Path) -> None:
        request = {"options": dict(options), "custom_ops": list(spec.options.custom_ops)}
        with self._timings(spec, cache) as timings:
            found = building.build(self.title, spec, folder, self.compile_by, {**request, **timings})
        self._tidy(folder, found)
        files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
        layers, why_not = self._layers(folder, cache)
        made = {
            **found,
            "bytes": sum(path.stat().st_size for path in files),
            "sha256": hash_file(files[0]) if files else None,
            "layers": layers,
            "unproved": why_not,
        }
        (folder / _FOUND).write_text(json.dumps(made))

    @contextmanager
    def _timings(self, spec: EngineSpec, cache: Cache) -> Iterator[dict[str, str]]:
        """Where the builder's timings lie, for the other process; what it leaves there is kept."""
        del spec, cache
        yield {}

    def _tidy(self, folder: Path, found: Mapping[str, Any]) -> None:
        """Leave what is to be loaded."""
        del folder, found

    def _layers(self, folder: Path, cache: Cache) -> tuple[dict[str, int] | None, str]:
        """What the engine's layers compute in, by TensorRT's own inspector; or None, and why nothing tells."""
        module = available(*self.ships)
        if module is None:
            return None, f"{self.ships[0]} is not installed, whose engine inspector would tell"
        try:
            file = plan_file.opened(folder / building.CONTEXT, building.CONTEXT, cache)
            if file.version and file.version[:3] != module.release[:3]:
                return None, f"{module.title} does not load an engine of {file.builder}"
            kernels = folder.with_suffix(".kernels")
            found: dict[str, int] = tensorrt.inspect(module, file.path, kernels, label=self.title)["layers"]
        except (CheckError, OSError) as error:
            return None, str(error).partition("\n")[0]
        finally:
            folder.with_suffix(".kernels").unlink(missing_ok=True)
        return (found, "") if set(found) - {"unknown"} else (None, "the engine inspector tells no layer's type")

    def described(self, built: Built, runner: Runner) -> EngineRecord | None:
        """As it was built; what it takes of the device's memory, ONNX Runtime does not tell."""
        del runner
        assert built.record is not None
        return replace(built.record, proved=self._is_proved(built))

    def _is_proved(self, built: Built) -> bool | None:
        if built.spec.precision in {"fp32", "tf32"}:
            return None
        return bool(built.record and built.record.layers_by_precision)

    def doubt(self, built: Built, runner: Runner, case: Case) -> str | None:
        """As any provider's; and that the engine's layers do not compute in the precision."""
        if (reason := super().doubt(built, runner, case)) is not None:
            return reason
        layers = built.record.layers_by_precision if built.record else None
        if built.spec.lowered.taken_as_it_is or not layers or built.spec.precision in {"fp32", "tf32"}:
            return None
        missing = unproved(layers, tuple(layers), built.spec.precision)
        if missing is None or any(np.size(array) == 0 for array in case.values()):
            return None
        found = ", ".join(f"{count} in {name}" for name, count in layers.items())
        return f"{missing} did not take effect: the engine inspector lists {found}"

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """What ran it, and whether anything proves the precision."""
        found = list(super().notes(built, runner))
        if self._is_proved(built) is False:
            why = _made(built.entry)["unproved"] if built.entry else ""
            found.append(f"{built.spec.precision} is stated, not proved: {why}")
        return tuple(found)

    def _divided(self, built: Built, runner: ProviderRunner, case: Case) -> PartitionRecord:
        """As it was divided when it was built: of an EPContext model nothing more can be told."""
        groups = _made(built.entry)["groups"] if built.entry else None
        found = placement.from_json(groups) if groups is not None else self._profiled(built, runner, case).groups
        shapes = placement.of_shapes(built.spec.lowered.path)
        return placement.partition(self.provider, found, shapes, compiles=True, kernels=None)


def _made(entry: Entry | None) -> dict[str, Any]:
    assert entry is not None
    return entry.read_json(_FOUND, _taken)


def _taken(found: Any) -> dict[str, Any]:
    """What is kept of a compilation; what nobody reads stays as it is."""
    if found["groups"] is not None:
        placement.from_json(found["groups"])
    known: dict[str, Any] = {
        "build_s": float,
        "bytes": int,
        "sha256": str | None,
        "layers": dict[str, int] | None,
        "unproved": str,
    }
    return {**found, **{name: typed(found[name], kind) for name, kind in known.items()}}


def restore(entry: Entry, name: str, data: str, folder: str) -> None:
    """Put what a provider left, which two extras of an entry keep, into a folder, under the name that it had."""
    called, content = entry.recall(name, _file_name), entry.read_extra(data)
    if called and content:
        Path(folder, called).write_bytes(content)


def _file_name(kept: bytes) -> str:
    name = kept.decode()
    if PureWindowsPath(name).name != name or name == ".." or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError("it is no plain file name")
    return name


def is_whole(found: Mapping[str, Any], provider: str) -> bool:
    """Whether the provider took the whole model as one; not, where ONNX Runtime does not tell."""
    groups = placement.from_json(found["groups"] or ())
    return len(groups) == 1 and groups[0].provider == provider
