"""TensorRT where no GPU runs it: the lowered model's arithmetic on ONNX Runtime's CPU provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pytest_trtcheck.backends.base import Acceptance, Backend, Built, EngineSpec
from pytest_trtcheck.backends.tensorrt.acceptance import acceptance
from pytest_trtcheck.backends.tensorrt.module import EITHER
from pytest_trtcheck.precision.emulation import emulated_path, opened

if TYPE_CHECKING:
    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.backends.tensorrt.module import ModuleName
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.spec import BuildOptions

_BY_NAME = "backend onnxruntime: no engine was asked for"


@dataclass(frozen=True)
class Emulated(Backend):
    """What is run where no engine can be.

    Parameters
    ----------
    no_engine
        Why no engine is built.
    ships
        The TensorRT that is asked whether it takes the model: the one that is named, or either.
    """

    no_engine: str = _BY_NAME
    ships: tuple[ModuleName, ...] = EITHER

    name: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "ONNX Runtime"
    how: ClassVar[str] = "emulated on the CPU: no GPU ran it"
    is_emulation: ClassVar[bool] = True

    def accepts(
        self, lowered: Lowered, label: str, options: BuildOptions, cache: Cache, *, will_build: bool
    ) -> Acceptance:
        """By the parser of an installed TensorRT, or by the tables; those alone where emulation was asked for by name.

        Then no TensorRT is said to be the one that ships, and the one that is installed need not be it.
        """
        del will_build
        return acceptance(lowered, label, self.ships, options, cache, asks_parser=self.no_engine != _BY_NAME)

    def build(self, spec: EngineSpec, cache: Cache) -> Built:
        """The file that computes the precision's arithmetic."""
        return Built(spec, emulated_path(spec.model, spec.lowered, spec.precision, cache))

    def load(self, built: Built) -> Runner:
        """ONNX Runtime, in a process of its own."""
        return opened(built.spec.model, built.path, built.spec.precision)

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """None: the evidence says it."""
        del built, runner
        return ()
