"""One output against its reference: every metric, where it can't be computed, and what else a person wants to know."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.compare.division import Division, measure_parts
from pytest_trtcheck.compare.limits import Limit, division_of, top1_axis, top1_tie
from pytest_trtcheck.compare.measurement import KEEP_WORST, Fault, Fit, Measurement, Score
from pytest_trtcheck.compare.searching import is_nothing_but_a_mask
from pytest_trtcheck.compare.streaming import (
    Pair,
    Totals,
    disagreeing_rows,
    kind_of,
    sum_of_squares,
    sweep,
    worst_elements,
)
from pytest_trtcheck.errors import ComparisonError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.spec import Metric, Shape

_UNDIVIDED = Division()
ZERO_REFERENCE = "the reference is all zero, so this is max|actual|, as for abs"
_ALIKE = 64.0
"""Where Σy² is more than so many times Σr², or the other way round, formulas with d = y − r lose digits."""
_CLEAR_AXES = 2
_GIVE_AXIS = "give it, metric=metrics.top1(axis=1) or Tolerance(top1=…, top1_axis=1)"
_MOST_AXES = 6
"""Axes up to which every order of them is tried on shapes that differ."""


def measure_all(
    actual: Mapping[str, NDArray[Any]],
    reference: Mapping[str, NDArray[Any]],
    limits: Mapping[str, Iterable[Limit]],
    *,
    expected_dtypes: Mapping[str, Any] | None = None,
) -> dict[str, Measurement]:
    """Every output of one run against its reference, `top1` where it has a limit.

    Raises
    ------
    ComparisonError
        An output is missing on one side, or a tensor's dtype can't be compared.
    """
    if set(actual) != set(reference):
        missing, extra = sorted(set(reference) - set(actual)), sorted(set(actual) - set(reference))
        parts = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(extra)}"] * bool(extra)
        raise ComparisonError(
            f"the outputs came back {' and '.join(parts)}; the reference has {', '.join(reference)}",
            "both sides must come from the same model",
        )
    return {
        name: measure(
            name,
            actual[name],
            reference[name],
            expected_dtype=(expected_dtypes or {}).get(name),
            tie=top1_tie(limits.get(name, ())),
            axis=top1_axis(limits.get(name, ())),
            division=division_of(limits.get(name, ())),
        )
        for name in reference
    }


def measure(
    name: str,
    actual: NDArray[Any],
    reference: NDArray[Any],
    *,
    expected_dtype: Any = None,
    tie: float | None = None,
    axis: int | None = None,
    division: Division = _UNDIVIDED,
) -> Measurement:
    """Compare one output with its reference; nothing is judged.

    Parameters
    ----------
    name
        The output's name.
    actual, reference
        Tensors of any shape and strides, memory-mapped ones included; of float (ml_dtypes' too), integer, boolean or
        string dtype. Beyond them at most 64 MiB are used, whatever their size.
    expected_dtype
        What the actual output's dtype must be; None: the reference's.
    tie
        How close two reference scores must be for a swap of them to be no disagreement (see `disagreeing_rows`).
        None: `top1` is not measured, since it costs a pass of its own.
    axis
        Along which `top1` chooses; None: the last, where no more than two axes are longer than 1.
    division
        How the output is divided into parts with scales of their own.

    Raises
    ------
    ComparisonError
        A dtype that can't be compared (complex numbers, dates, …).
    ArgumentError
        The parts or the axis that were given do not fit the output.

    Notes
    -----
    With y the actual output, r the reference and d = y − r in FP64, over the elements that are finite on both sides:
    max = max|d|/max|r|; l2 = ‖d‖/‖r‖; abs = max|d|; allclose = max(|d|/(1+|r|)), the least tol with which
    `numpy.allclose(y, r, rtol=tol, atol=tol)` holds; cosine = 1 − ⟨y,r⟩/(‖y‖‖r‖); snr_db = 10·log₁₀(‖r‖²/‖d‖²).
    """
    actual, reference = np.asarray(actual), np.asarray(reference)
    kind = kind_of(reference.dtype, name)
    actual_kind = kind_of(actual.dtype, name)
    wanted = _dtype_name(reference.dtype if expected_dtype is None else np.dtype(expected_dtype))
    found = _dtype_name(actual.dtype)
    faults = [] if found == wanted else [Fault("dtype", f"dtype {found} where {wanted} is expected")]
    base = Measurement(name=name, dtype=found, shape=actual.shape, size=0, kind=kind, faults=tuple(faults))
    if actual.shape != reference.shape:
        return replace(base, faults=(_shape_fault(actual.shape, reference.shape), *faults))
    if (kind == "string") != (actual_kind == "string"):
        return base
    if not reference.size:
        return replace(base, uncompared="it has no elements")
    pair = Pair.of(actual, reference)
    if kind == "string":
        return _measure_strings(base, pair)
    return _measure_numbers(base, pair, tie, axis, division)


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind in "OUST" else dtype.newbyteorder("=").name


def _shape_fault(actual: Shape, reference: Shape) -> Fault:
    text = f"shape {_shape(actual)} where the reference has {_shape(reference)}"
    if len(actual) == len(reference) <= _MOST_AXES and sorted(actual) == sorted(reference):
        order = next(o for o in permutations(range(len(reference))) if tuple(reference[i] for i in o) == actual)
        text = f"{text}: the same axes in another order {order}"
    return Fault("shape", text)


def _shape(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _measure_strings(base: Measurement, pair: Pair) -> Measurement:
    largest = [float(np.max(pair.errors(*each))) for each in pair.chunks()]
    unequal = sum(int(np.count_nonzero(pair.errors(*each))) for each in pair.chunks())
    return replace(base, size=pair.size, mismatches=unequal, worst=worst_elements(pair, largest, KEEP_WORST))


def _measure_numbers(
    base: Measurement, pair: Pair, tie: float | None, axis: int | None, division: Division
) -> Measurement:
    totals = sweep(pair, equality=base.kind != "float")
    fit = totals.fit
    scores: dict[Metric, Score] = {}
    rows = None
    if base.kind != "bool":
        scores = _scores(pair, totals, fit)
        if tie is not None:
            rows, scores["top1"] = _top1(pair, fit, tie, axis)
    finite_max = None
    if totals.nonfinite.different and base.kind != "bool":
        finite_max = scores["max"].value
        scores = {metric: _unbounded(metric, score) for metric, score in scores.items()}
    notes = []
    uncompared = ""
    if base.kind == "float" and not fit.count:
        uncompared = "none of its elements is finite on both sides"
    elif division.search and base.kind == "float" and (mask := is_nothing_but_a_mask(pair.reference)) is not None:
        uncompared = f"every finite element of its reference is {mask:.9g}, as where all is masked"
    if totals.nonfinite.same:
        notes.append(f"{totals.nonfinite.same:,} elements are NaN or infinite on both sides alike: no error")
    return replace(
        base,
        size=pair.size,
        scores=scores,
        finite_max=finite_max,
        peak=totals.peak / totals.scale,
        mismatches=totals.mismatches,
        nonfinite=totals.nonfinite,
        rows=rows,
        worst=worst_elements(pair, totals.largest),
        histogram=totals.histogram,
        fit=fit,
        notes=tuple(notes),
        uncompared=uncompared,
        parts=measure_parts(pair, totals, division, base.name) if base.kind == "float" else (),
    )


def _scores(pair: Pair, totals: Totals, fit: Fit) -> dict[Metric, Score]:
    error = totals.max_error / totals.scale
    if not fit.rr:
        why = "the reference is all zero" if fit.count else "no element is finite on both sides"
        absolute = Score(error, ZERO_REFERENCE if fit.count else why)
        undefined = Score(None, why)
        return {
            "max": absolute,
            "l2": absolute,
            "abs": Score(error),
            "allclose": Score(totals.allclose),
            "cosine": undefined,
            "snr_db": undefined,
        }
    snr = 10 * math.log10(fit.rr / fit.dd) if fit.dd else math.inf
    return {
        "max": Score(totals.max_error / totals.peak),
        "l2": Score(math.sqrt(fit.dd / fit.rr)),
        "abs": Score(error),
        "allclose": Score(totals.allclose),
        "cosine": _cosine(pair, fit),
        "snr_db": Score(snr),
    }


def _cosine(pair: Pair, fit: Fit) -> Score:
    """1 − cos. Where y and r are alike it is (‖d‖² − (‖y‖−‖r‖)²) / (2‖y‖‖r‖), which doesn't cancel as 1 − cos does."""
    yy = fit.rr + 2 * fit.dr + fit.dd
    if fit.rr / _ALIKE < yy < fit.rr * _ALIKE:
        longer = (2 * fit.dr + fit.dd) / (math.sqrt(yy) + math.sqrt(fit.rr))
        return Score(max(0.0, (fit.dd - longer**2) / (2 * math.sqrt(yy) * math.sqrt(fit.rr))))
    yy, yr = sum_of_squares(pair, fit.unit)
    if not yy:
        return Score(None, "the actual output is all zero")
    return Score(max(0.0, 1 - yr / (math.sqrt(yy) * math.sqrt(fit.rr))))


def _top1(pair: Pair, fit: Fit, tie: float, axis: int | None) -> tuple[tuple[int, int] | None, Score]:
    shape = pair.reference.shape
    if axis is None:
        if sum(size > 1 for size in shape) > _CLEAR_AXES:
            return None, Score(
                None, f"which axis of shape {_shape(shape)} holds the choices is not clear: {_GIVE_AXIS}"
            )
        if not shape or shape[-1] < 2:
            return None, Score(
                None, f"shape {_shape(shape)} has no last axis of two or more to choose from: {_GIVE_AXIS}"
            )
    elif not -len(shape) <= axis < len(shape) or shape[axis] < 2:
        return None, Score(None, f"shape {_shape(shape)} has no axis {axis} of two or more to choose from")
    if not fit.rr:
        return None, Score(None, "the reference holds nothing but zeros: every choice ties")
    taken = len(shape) - 1 if axis is None else axis % len(shape)
    disagreeing, rows = disagreeing_rows(pair, tie, taken)
    return (disagreeing, rows), Score(disagreeing / rows, f"along axis {taken}")


def _unbounded(metric: Metric, score: Score) -> Score:
    if metric == "top1":
        return score
    infinite = {"snr_db": -math.inf, "cosine": math.nan}
    return Score(infinite.get(metric, math.inf), "" if score.value is None else score.note)
