"""What ONNX Runtime's GPU providers share as systems under test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pytest_trtcheck.backends.base import Acceptance, Backend
from pytest_trtcheck.backends.onnxruntime import installed, placement
from pytest_trtcheck.backends.onnxruntime.session import (
    HostTimedRuns,
    ProviderRunner,
    open_session,
    profile_of,
    session_options,
)
from pytest_trtcheck.backends.tensorrt.emulated import Emulated
from pytest_trtcheck.model import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.base import Built, Machine, Runner, TimedRuns
    from pytest_trtcheck.backends.onnxruntime.options import Counterparts
    from pytest_trtcheck.backends.tensorrt.module import ModuleName
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.record import Evidence, PartitionRecord
    from pytest_trtcheck.spec import BuildOptions, InputMapping, Precision


@dataclass(frozen=True)
class OrtProvider(Backend):
    """A provider of ONNX Runtime, on the GPU in this machine.

    Parameters
    ----------
    gpu
        That GPU.
    """

    gpu: Gpu | None = None

    evidence: ClassVar[Evidence] = "provider"
    is_timed: ClassVar[bool] = True
    provider: ClassVar[str]
    """As ONNX Runtime calls it."""
    says: ClassVar[str]
    """As messages call it, before the version."""
    counterparts: ClassVar[Counterparts]
    ships: ClassVar[tuple[ModuleName, ...]] = ()
    """The TensorRT that it hands models to."""

    @property
    def title(self) -> str:
        """With ONNX Runtime's version."""
        return f"ONNX Runtime {ort.module().__version__}'s {self.says}"

    @classmethod
    def find(cls, machine: Machine) -> Backend:
        """On the GPU that is here; without one, the emulation of the precision stands in."""
        cls.require()
        if machine.detected is None:
            why = f"{cls.full_name()} did not run: {cls.without_gpu(machine.no_gpu)}"
            return EmulatedProvider(why, cls.ships, provider=cls)
        return cls(machine.detected)

    @classmethod
    def without_gpu(cls, why: str) -> str:
        """Why it does not run where there is no GPU."""
        return why

    @classmethod
    def refusal(cls, precision: Precision) -> str | None:
        """Why it cannot compute in a precision, wherever it runs."""
        del precision
        return None

    def why_not(self, precision: Precision, op_types: Collection[str]) -> str | None:
        """What it can't anywhere."""
        del op_types
        return self.refusal(precision)

    @classmethod
    def full_name(cls) -> str:
        """As messages call it before it is known to be there."""
        return f"ONNX Runtime's {cls.says}"

    def versions(self) -> dict[str, str]:
        """ONNX Runtime, and the CUDA that it was built for."""
        return {"onnxruntime": ort.module().__version__, "cuda": installed.cuda_version()}

    def options(self, options: BuildOptions) -> dict[str, str]:
        """The build options as the provider's; its device is the one that CUDA counts first, which was detected."""
        return self.counterparts.of(options, self.title)

    def accepts(
        self, lowered: Lowered, label: str, options: BuildOptions, cache: Cache, *, will_build: bool
    ) -> Acceptance:
        """Its options are looked at; what it takes of the model, it tells when it is given it."""
        del lowered, label, cache, will_build
        self.options(options)
        return Acceptance(judged_by=self.title)

    def open(self, built: Built, *, profile: Path | None = None) -> Any:
        """A session of what was built."""
        options = session_options(dict([placement.RECORD]), built.spec.options.custom_ops, profile)
        return open_session(built.path, options, self._providers(built), self._label(built))

    def _label(self, built: Built) -> str:
        return f"{built.spec.model.label} in {built.spec.precision} on {self.title}"

    def _providers(self, built: Built) -> Sequence[tuple[str, Mapping[str, str]]]:
        return [(self.provider, self.options(built.spec.options))]

    def load(self, built: Built) -> Runner:
        """A session on the provider."""
        return ProviderRunner(self.open(built), self._label(built), outer_types(built))

    def doubt(self, built: Built, runner: Runner, case: Case) -> str | None:
        """Why what it computes does not count: a node fell back to another provider, or the model is in pieces."""
        opened = cast("ProviderRunner", runner)
        opened.partition = found = self._divided(built, opened, case)
        return placement.fault(found, self.title, built.spec.precision, built.spec.max_subgraphs)

    def partition(self, built: Built, runner: Runner) -> PartitionRecord | None:
        """Which provider computes which node, once `doubt` has looked."""
        del built
        return cast("ProviderRunner", runner).partition

    def _divided(self, built: Built, runner: ProviderRunner, case: Case) -> PartitionRecord:
        groups = placement.assigned(runner.session) if placement.can_tell(runner.session) else None
        profile = self._profiled(built, runner, case)
        return placement.partition(
            self.provider,
            _with_what_ran(groups, profile),
            placement.of_shapes(built.spec.lowered.path),
            compiles=False,
            kernels=profile.kernels.get(self.provider, {}),
        )

    def _profiled(self, built: Built, runner: ProviderRunner, case: Case) -> placement.Profile:
        return profile_of(runner, lambda prefix: self.open(built, profile=prefix), case)

    def timed_runs(
        self, runner: Runner, cases: Sequence[InputMapping], *, graph: bool = True, transfers: bool = False
    ) -> TimedRuns:
        """By the host's clock."""
        del graph
        return HostTimedRuns(cast("ProviderRunner", runner), cases, transfers=transfers)


def outer_types(built: Built) -> dict[str, str]:
    """The types that inputs and outputs have outside, by name, where `BuildOptions.io` made others of them."""
    _, *names = built.spec.lowered.details.get("io", [None])
    return {name: "float32" for listed in names for name in listed}


def _with_what_ran(groups: Sequence[placement.Group] | None, profile: placement.Profile) -> tuple[placement.Group, ...]:
    """What was planned, and what ran on another provider than was planned: nodes that came later, such as casts."""
    if groups is None:
        return profile.groups
    planned = {(node.name, node.provider) for group in groups for node in group.nodes}
    # Nodes that were fused since have other names; on the provider itself they are the planned ones.
    gpu = {group.provider for group in groups} - {placement.CPU}
    late = (group for group in profile.groups if group.provider not in gpu)
    return (*groups, *(group for group in late if not planned & {(node.name, node.provider) for node in group.nodes}))


@dataclass(frozen=True)
class EmulatedProvider(Emulated):
    """What stands in for a provider where no GPU is; what that refuses is refused here too.

    Parameters
    ----------
    provider
        What it stands for.
    """

    provider: type[OrtProvider] = field(kw_only=True)

    @property
    def builds_for(self) -> str:
        """The provider."""
        return self.provider.full_name()

    def accepts(
        self, lowered: Lowered, label: str, options: BuildOptions, cache: Cache, *, will_build: bool
    ) -> Acceptance:
        """By its options; and by TensorRT's parser or the tables, where the provider is of TensorRT."""
        self.provider.counterparts.of(options, self.provider.full_name())
        if not self.ships:
            return Acceptance()
        return super().accepts(lowered, label, options, cache, will_build=will_build)

    def why_not(self, precision: Precision, op_types: Collection[str]) -> str | None:
        """As the provider."""
        return self.provider.refusal(precision) or super().why_not(precision, op_types)

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """Why the provider did not run."""
        del built, runner
        return (self.no_engine,)
