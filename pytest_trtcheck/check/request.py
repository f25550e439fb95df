"""One check to make, as it was asked for and as far as it was prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from pytest_trtcheck.backends.tensorrt import cached as engines
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.precision.arithmetic import MATRIX_OPERATORS
from pytest_trtcheck.spec import BuildOptions, LatencySpec, ParitySpec, Precision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.backends.tensorrt.cached import Built, Place
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.precision.reference import AnyReference
    from pytest_trtcheck.record import ParityRecord
    from pytest_trtcheck.spec import ShapeRange


@dataclass(frozen=True)
class Request:
    """One check to make.

    Parameters
    ----------
    model
        What the marker or the fixture named; None is an error that says how to name one.
    folders
        Where relative paths are looked up, in this order.
    parity, latency
        The specs, with one precision and one batch; `judge_parity` is False for a test with `trt_latency` alone.
    inputs, inputs_source
        What to feed, and where it came from; None: generated.
    default_batch
        Taken for open first dimensions that nothing else fixes (files collected without test code).
    lowered
        The model in its precision, where it was made before (a replay); None: it is made.
    watch
        Is shown what was judged while the runner is open; the notes that it returns join the record's.
    """

    nodeid: str
    model: object
    folders: Sequence[Path]
    parity: ParitySpec = field(default_factory=ParitySpec)
    judge_parity: bool = True
    latency: LatencySpec | None = None
    inputs: object = None
    inputs_source: str = "generated"
    calibration: object = None
    options: BuildOptions | None = None
    default_batch: int | None = None
    lowered: Lowered | None = None
    watch: Watcher | None = None

    @property
    def precision(self) -> Precision:
        """The one precision to check."""
        return self.parity.precision[0]

    @property
    def build_options(self) -> BuildOptions:
        """How TensorRT is to build."""
        return self.options or BuildOptions()

    def declared_for(self, model: OnnxModel) -> dict[str, ShapeRange]:
        """The shapes that the check is declared for, by input.

        Raises
        ------
        InputError
            What is declared does not fit the model.
        """
        return model_inputs.declared_ranges(model, self.parity.shapes)

    def admit(self, model: OnnxModel, case: Case, source: str) -> None:
        """See that a case has the shapes, and the batch, that the check is declared for.

        Raises
        ------
        InputError
            It lies outside.
        """
        model_inputs.check_declared(self.declared_for(model), case, source)
        batch = self.parity.batch[0]
        if batch is not None:
            model_inputs.check_is_batch(model, batch, case, source)


@dataclass(frozen=True)
class Job:
    """A request whose model was read and lowered, and whose inputs are at hand.

    Parameters
    ----------
    reference
        What counts as right.
    place, built
        The engine and what it is for; None where there is none.
    plugin_operators
        The operators that only a plugin library computes.
    """

    request: Request
    model: OnnxModel
    lowered: Lowered
    cases: Sequence[Case]
    reference: AnyReference
    place: Place | None = None
    built: Built | None = None
    plugin_operators: tuple[str, ...] = ()

    @property
    def precision(self) -> Precision:
        """The one precision to check."""
        return self.request.precision

    @property
    def computed_in(self) -> Precision:
        """The precision that the place really computes in, and by whose limits it is judged.

        TF32 is for matrix products: a model without one is computed in FP32 as it was asked to be.
        """
        if self.place is None or not self.model.op_types & MATRIX_OPERATORS:
            return self.precision
        return engines.computed_in(self.precision, self.place)

    @property
    def shown_precision(self) -> str:
        """The precision as records and messages have it: what is computed in, and what was asked for instead."""
        computed = self.computed_in
        return computed if computed == self.precision else f"{computed} (asked {self.precision})"

    def profile(self) -> dict[str, ShapeRange]:
        """The optimization profile of its engine: what the marker declares, and all of its inputs.

        Raises
        ------
        InputError
            What the marker declares does not fit the model.
        """
        return model_inputs.profile(self.model, self.request.declared_for(self.model), self.cases)

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.model.label} in {self.shown_precision}"


@dataclass(frozen=True)
class Judged:
    """A parity check that was just made, its runner still open."""

    job: Job
    runner: Runner
    reference: AnyReference
    record: ParityRecord


Watcher: TypeAlias = Callable[[Judged], tuple[str, ...]]
"""Looks at a check while its runner is open, and returns notes on it."""
