"""Lowering the model otherwise, emulating it and judging it on all inputs: what a diagnosis tries out."""

from __future__ import annotations

import json
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import Cache, hash_bytes, scratch_folder
from pytest_trtcheck.choices import quantized_part
from pytest_trtcheck.diagnose import judging
from pytest_trtcheck.errors import ModelError, NothingComputedError
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import lower, prepared, quantized_by, with_half_io
from pytest_trtcheck.precision.quantization import calibrate, quantize
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import RangeMethod
    from pytest_trtcheck.compare import LimitResult
    from pytest_trtcheck.diagnose.subject import Subject
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.precision.lowering import Lowered


def keeping(subject: Subject, nodes: Collection[str]) -> LimitResult | None:
    """The judgement with `nodes` kept in FP32, beyond those that are.

    None where nothing is left that is computed in the precision.
    """
    try:
        with lowered_keeping(subject, nodes) as lowered:
            return _emulated(subject, lowered)
    except NothingComputedError:
        return None


def calibrated(subject: Subject, method: RangeMethod) -> LimitResult:
    """The judgement with ranges chosen by another method."""
    given = subject.calibration
    given = given if isinstance(given, Calibration) else Calibration(given)
    with scratch_folder("trial") as folder:
        lowered = lower(
            subject.model,
            subject.precision,
            Cache(folder),
            keep_fp32=subject.keep_fp32,
            exclude=subject.exclude,
            calibration=replace(given, method=method),
            folders=subject.folders,
            io=subject.io,
        )
        return _emulated(subject, lowered)


def judge(subject: Subject, runner: Callable[[Case], Mapping[str, NDArray[Any]]]) -> LimitResult:
    """The judgement on all inputs: the least good one."""
    found = (judging.judge(runner(case), subject.reference(case), subject.limits)[0] for case in subject.cases)
    return max(found, key=lambda each: each.usage)


def _emulated(subject: Subject, lowered: Lowered) -> LimitResult:
    with scratch_folder("trial") as folder:
        runner = emulation(subject.model, lowered, subject.precision, Cache(folder))
        with closing(runner):
            return judge(subject, runner)


@contextmanager
def lowered_keeping(subject: Subject, nodes: Collection[str]) -> Iterator[Lowered]:
    """The model lowered with `nodes` kept in FP32, beyond those that are.

    Raises
    ------
    NothingComputedError
        Nothing is left to lower.
    """
    kept = tuple(sorted({*subject.keep_fp32, *nodes}))
    with scratch_folder("trial") as folder:
        if subject.is_quantized:
            path = _quantized(subject, kept, Path(folder))
            key = hash_bytes(json.dumps([subject.lowered.key, kept]).encode())
            details = {name: found for name, found in subject.lowered.details.items() if name != "io"}
            lowered = replace(subject.lowered, path=path, key=key, notes=(), details=details)
            # Beside the model that was written: a cache of its own.
            cache = Cache(Path(folder) / "cache")
            yield with_half_io(subject.model, lowered, subject.io, cache) if subject.io else lowered
        else:
            yield lower(
                subject.model, subject.precision, Cache(folder), keep_fp32=kept, exclude=subject.exclude, io=subject.io
            )


def _quantized(subject: Subject, kept: tuple[str, ...], folder: Path) -> Path:
    """The quantized model with the ranges that are known: calibrating anew would give the same ones."""
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision.quantization.plan import points

    path = prepared(subject.model, kept, Cache(folder / "cache"))
    model = quantize.read(subject.model, path)
    try:
        plan = points(model, graph.still_there(model, kept), graph.still_there(model, subject.exclude))
    except ModelError as error:
        raise NothingComputedError(error.message, code=error.code) from error
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
            dtype=quantized_part(subject.precision) or "int8",
        ).amax()
    target = folder / "lowered.onnx"
    graph.write(quantized_by(model, plan, ranges, subject.precision, kept)[0], target)
    return target
