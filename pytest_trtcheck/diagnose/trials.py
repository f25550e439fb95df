"""Lowering the model otherwise, emulating it and judging it: what a diagnosis tries out."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import artifacts
from pytest_trtcheck.backends.onnxruntime import OrtRunner
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.diagnose import judging
from pytest_trtcheck.diagnose.judging import Judgement
from pytest_trtcheck.errors import ModelError, NothingComputedError
from pytest_trtcheck.precision import calibrate, calibration_data
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from pytest_trtcheck.artifacts import AnyReference, Lowered
    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.choices import CalibrationMethod
    from pytest_trtcheck.compare import Limit
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.calibration_data import Samples
    from pytest_trtcheck.spec import Precision


NOTHING_LOWERED = Judgement(0.0, True, "", "", None, 0.0)
"""What keeping everything in FP32 gives: the reference."""


class _NothingLeftError(Exception):
    """Nothing is left to quantize."""


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

    def confirm(self, nodes: Collection[str]) -> Judgement:
        """The judgement on all inputs with `nodes` kept in FP32, beyond those that are: the least good one."""
        try:
            with self._emulated(nodes) as runner:
                return self._least(runner)
        except _NothingLeftError:
            return NOTHING_LOWERED

    def calibrated(self, method: CalibrationMethod) -> Judgement:
        """The judgement on all inputs with ranges chosen by another method."""
        self.clock.spend()
        subject = self.subject
        given = subject.calibration
        given = given if isinstance(given, Calibration) else Calibration(given)
        with tempfile.TemporaryDirectory(prefix="trtcheck-trial-") as folder:
            cache = Cache(folder)
            lowered = artifacts.lower(
                subject.model,
                subject.precision,
                cache,
                keep_fp32=subject.keep_fp32,
                calibration=replace(given, method=method),
                folders=subject.folders,
            )
            with closing(artifacts.emulation(subject.model, lowered, subject.precision, cache)) as runner:
                return self._least(runner)

    def _least(self, runner: Runner) -> Judgement:
        return max((self._judge(runner, index) for index in range(len(self.subject.cases))), key=lambda j: j.usage)

    def _judge(self, runner: Runner, index: int) -> Judgement:
        case = self.subject.cases[index]
        return judging.judge(runner(case), self.subject.reference(case), self.subject.limits)[0]

    @contextmanager
    def _emulated(self, nodes: Collection[str]) -> Iterator[Runner]:
        subject = self.subject
        kept = tuple(sorted({*subject.keep_fp32, *nodes}))
        with tempfile.TemporaryDirectory(prefix="trtcheck-trial-") as folder:
            if subject.is_quantized:
                runner = OrtRunner(self._quantized(kept, Path(folder)), subject.model.label)
            else:
                cache = Cache(folder)
                try:
                    lowered = artifacts.lower(subject.model, subject.precision, cache, keep_fp32=kept)
                except NothingComputedError as error:
                    raise _NothingLeftError from error
                runner = artifacts.emulation(subject.model, lowered, subject.precision, cache)
            with closing(runner):
                yield runner

    def _quantized(self, kept: tuple[str, ...], folder: Path) -> Path:
        """The quantized model with the ranges that are known: calibrating anew would give the same ones."""
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import emulate, quantization_plan, quantize

        subject = self.subject
        precision: Any = subject.precision
        path = artifacts.prepared(subject.model, kept, Cache(folder / "cache"))
        model = graph.read(path)
        try:
            plan = quantization_plan.points(model, kept)
        except ModelError as error:
            raise _NothingLeftError from error
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
        target = folder / "emulated.onnx"
        graph.write(emulate.emulated(quantize.quantize(model, plan, ranges, precision)), target)
        return target
