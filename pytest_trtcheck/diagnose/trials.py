"""Lowering the model otherwise, emulating it and judging it: what a diagnosis tries out."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import Cache, hash_bytes
from pytest_trtcheck.diagnose import judging
from pytest_trtcheck.errors import ModelError, NothingComputedError
from pytest_trtcheck.model.onnxruntime import OrtRunner
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import lower, prepared
from pytest_trtcheck.precision.quantization import calibrate, calibration_data
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import CalibrationMethod
    from pytest_trtcheck.compare import Limit
    from pytest_trtcheck.diagnose.judging import Judgement
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.precision.quantization.calibration_data import Samples
    from pytest_trtcheck.precision.reference import AnyReference
    from pytest_trtcheck.spec import Precision


class NothingLeftError(Exception):
    """Nothing is left to lower."""


class BudgetSpent(Exception):  # noqa: N818 - it ends a search, it is no error
    """No time or no trial is left."""


@dataclass
class Clock:
    """What a diagnosis may still spend.

    Parameters
    ----------
    seconds
        From now on.
    trials
        Variations of the model that may still be run.
    """

    seconds: float
    trials: int

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    def part(self, share: float) -> Clock:
        """A clock of its own with a share of the time that is left, and all trials."""
        return Clock(max(share * (self._deadline - time.monotonic()), 0.0), self.trials)

    def spend(self) -> None:
        """Take one trial.

        Raises
        ------
        BudgetSpent
            There is none, or no time.
        """
        if self.trials <= 0 or self.is_over():
            raise BudgetSpent
        self.trials -= 1

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._deadline


@dataclass(frozen=True)
class Subject:
    """The check that failed, as far as it can be tried again.

    Parameters
    ----------
    keep_fp32
        What the check kept in FP32 already.
    calibration
        What the marker or fixture gave.
    cases
        All inputs; `worst` is the index of the one to look at.
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

    @property
    def case(self) -> Case:
        """The input to look at."""
        return self.cases[self.worst]

    @property
    def is_quantized(self) -> bool:
        """Whether the lowering chose ranges for activations."""
        return "ranges" in self.lowered.details

    def ranges(self) -> calibrate.Ranges:
        """The ranges that the lowering chose."""
        return calibrate.Ranges.from_json(json.dumps(self.lowered.details["ranges"]))

    def samples(self) -> Samples:
        """The calibration samples.

        Raises
        ------
        CalibrationError
            They can't be read a second time.
        """
        return calibration_data.load(self.calibration, self.model.inputs, self.folders)


class Trials:
    """Other lowerings of the model, judged as the check judges.

    Parameters
    ----------
    subject
        The check.
    clock
        Every lowering takes a trial from it, but for the one that confirms.
    """

    def __init__(self, subject: Subject, clock: Clock) -> None:
        self.subject = subject
        self.clock = clock

    def confirm(self, nodes: Collection[str]) -> Judgement | None:
        """The judgement on all inputs with `nodes` kept in FP32, beyond those that are: the least good one.

        None where nothing is left that is computed in the precision.
        """
        subject = self.subject
        try:
            with self.lowered(nodes) as lowered, tempfile.TemporaryDirectory(prefix="trtcheck-trial-") as folder:
                runner = emulation(subject.model, lowered, subject.precision, Cache(folder))
                with closing(runner):
                    return self.judge(runner)
        except NothingLeftError:
            return None

    @contextmanager
    def lowered(self, nodes: Collection[str]) -> Iterator[Lowered]:
        """The model lowered with `nodes` kept in FP32, beyond those that are.

        Raises
        ------
        NothingLeftError
            Nothing is left to lower.
        """
        subject = self.subject
        kept = tuple(sorted({*subject.keep_fp32, *nodes}))
        with tempfile.TemporaryDirectory(prefix="trtcheck-trial-") as folder:
            if subject.is_quantized:
                path = self._quantized(kept, Path(folder))
                key = hash_bytes(json.dumps([subject.lowered.key, kept]).encode())
                yield replace(subject.lowered, path=path, key=key, notes=())
            else:
                try:
                    lowered = lower(subject.model, subject.precision, Cache(folder), keep_fp32=kept)
                except NothingComputedError as error:
                    raise NothingLeftError from error
                yield lowered

    def calibrated(self, method: CalibrationMethod) -> Judgement:
        """The judgement on all inputs with ranges chosen by another method."""
        self.clock.spend()
        subject = self.subject
        given = subject.calibration
        given = given if isinstance(given, Calibration) else Calibration(given)
        with tempfile.TemporaryDirectory(prefix="trtcheck-trial-") as folder:
            cache = Cache(folder)
            lowered = lower(
                subject.model,
                subject.precision,
                cache,
                keep_fp32=subject.keep_fp32,
                calibration=replace(given, method=method),
                folders=subject.folders,
            )
            with closing(emulation(subject.model, lowered, subject.precision, cache)) as runner:
                return self.judge(runner)

    def judge(self, runner: Callable[[Case], Mapping[str, NDArray[Any]]]) -> Judgement:
        """The judgement on all inputs: the least good one."""
        return max((self._judge(runner, index) for index in range(len(self.subject.cases))), key=lambda j: j.usage)

    def _judge(self, runner: Callable[[Case], Mapping[str, NDArray[Any]]], index: int) -> Judgement:
        case = self.subject.cases[index]
        return judging.judge(runner(case), self.subject.reference(case), self.subject.limits)[0]

    def _quantized(self, kept: tuple[str, ...], folder: Path) -> Path:
        """The quantized model with the ranges that are known: calibrating anew would give the same ones."""
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision.quantization import quantize
        from pytest_trtcheck.precision.quantization.plan import points

        subject = self.subject
        precision: Any = subject.precision
        path = prepared(subject.model, kept, Cache(folder / "cache"))
        model = graph.read(path)
        try:
            plan = points(model, kept)
        except ModelError as error:
            raise NothingLeftError from error
        found = subject.ranges()
        ranges = found.amax()
        missing = tuple(point for point in plan.activations if point.tensor not in ranges)
        if missing:
            ranges |= calibrate.collect(
                lambda probe: OrtRunner(probe, subject.model.label),
                path,
                replace(plan, activations=missing),
                subject.samples(),
                method=found.method,
                percentile=found.percentile or 99.99,
            ).amax()
        target = folder / "lowered.onnx"
        graph.write(quantize.quantize(model, plan, ranges, precision), target)
        return target
