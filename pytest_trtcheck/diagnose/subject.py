"""The check that failed, as far as it can be tried again, and what its diagnosis may still cost."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_trtcheck.precision.quantization import calibrate, calibration_data

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.choices import HalfName
    from pytest_trtcheck.compare import Limit
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.precision.quantization.calibration_data import Samples
    from pytest_trtcheck.precision.reference import AnyReference
    from pytest_trtcheck.spec import Precision


class BudgetSpent(Exception):  # noqa: N818 - it ends a search, it is no error
    """No time or no trial is left."""


@dataclass
class Budget:
    """What a diagnosis may cost, and what of it is left.

    Parameters
    ----------
    seconds
        After which nothing new is begun on the emulation; from `start` on.
    trials
        Variations of the model that are run: operators kept in FP32, other calibration methods.
    engine_seconds
        After which no further engine is built for bisection; it counts by itself, from the first on, for builds are
        slow.
    """

    seconds: float = 60.0
    trials: int = 250
    engine_seconds: float = 300.0
    tried: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self.tried = 0
        self._deadline = time.monotonic() + self.seconds
        self._engine_deadline: float | None = None

    def left_s(self) -> float:
        """The time that is left."""
        return max(self._deadline - time.monotonic(), 0.0)

    def is_over(self) -> bool:
        """Whether the time is up or all trials are used."""
        return time.monotonic() > self._deadline or self.tried >= self.trials

    def spend(self) -> None:
        """Take one trial.

        Raises
        ------
        BudgetSpent
            There is none, or no time.
        """
        if self.is_over():
            raise BudgetSpent
        self.tried += 1

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Inside, only a share of the time is left."""
        deadline = self._deadline
        self._deadline = time.monotonic() + share * self.left_s()
        try:
            yield
        finally:
            self._deadline = deadline

    def is_over_for_engines(self) -> bool:
        """Whether the time for building engines is up."""
        if self._engine_deadline is None:
            self._engine_deadline = time.monotonic() + self.engine_seconds
        return time.monotonic() > self._engine_deadline


@dataclass(frozen=True)
class Subject:
    """The check that failed.

    Parameters
    ----------
    keep_fp32, exclude
        What the check kept in FP32 already, and what it did not quantize.
    calibration
        What the marker or fixture gave.
    cases
        All inputs; `worst` is the index of the one to look at.
    system
        What ran the lowered model, for messages.
    """

    model: OnnxModel
    lowered: Lowered
    precision: Precision
    keep_fp32: tuple[str, ...]
    calibration: object
    folders: Sequence[Path]
    cases: Sequence[Case]
    worst: int
    limits: Mapping[str, tuple[Limit, ...]]
    reference: AnyReference
    exclude: tuple[str, ...] = ()
    system: str = "TensorRT"

    @property
    def case(self) -> Case:
        """The input to look at."""
        return self.cases[self.worst]

    @property
    def io(self) -> HalfName | None:
        """The 16-bit type of the lowered model's inputs and outputs; None where they are the model's own."""
        found: HalfName | None = self.lowered.details.get("io", [None])[0]
        return found

    @property
    def is_quantized(self) -> bool:
        """Whether the lowering chose ranges for activations."""
        return "ranges" in self.lowered.details

    def ranges(self) -> calibrate.Ranges:
        """The ranges that the lowering chose."""
        return calibrate.Ranges.from_json(self.lowered.details["ranges"])

    def samples(self) -> Samples:
        """The calibration samples.

        Raises
        ------
        CalibrationError
            They can't be read a second time.
        """
        return calibration_data.load(self.calibration, self.model.inputs, self.folders)
