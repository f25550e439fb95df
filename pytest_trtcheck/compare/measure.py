"""One output against its reference: every metric, where it can't be computed, and what else a person wants to know."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.compare.detections import measure_joint
from pytest_trtcheck.compare.division import Division, measure_parts
from pytest_trtcheck.compare.measurement import Fault, Measurement
from pytest_trtcheck.compare.searching import is_a_mask, one_value
from pytest_trtcheck.compare.streaming import Pair, Swept, kind_of, sweep, worst_elements
from pytest_trtcheck.errors import ComparisonError, plural
from pytest_trtcheck.metrics import METRICS, Metric, Score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.limits import Limit, Limits
    from pytest_trtcheck.metrics import Kind
    from pytest_trtcheck.spec import Shape

_MOST_AXES = 6
"""Axes up to which every order of them is tried on shapes that differ."""


_ROUNDED_BELOW = 1e-9
"""How far below 0 rounding may bring a distance."""


def measure_all(
    actual: Mapping[str, NDArray[Any]],
    reference: Mapping[str, NDArray[Any]],
    limits: Limits,
    *,
    expected_dtypes: Mapping[str, Any] | None = None,
) -> dict[str, Measurement]:
    """Every output of one run against its reference, in the metrics that it has limits for.

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
    found = {}
    for name in reference:
        of_output, dtype = limits.get(name, ()), (expected_dtypes or {}).get(name)
        if any(limit.metric.joins for limit in of_output):
            found[name] = measure_joint(name, actual, reference, of_output, dtype)
        else:
            found[name] = measure(name, actual[name], reference[name], expected_dtype=dtype, limits=of_output)
    return found


def measure(
    name: str,
    actual: NDArray[Any],
    reference: NDArray[Any],
    *,
    expected_dtype: Any = None,
    limits: Sequence[Limit] = (),
) -> Measurement:
    """Compare one output with its reference; nothing is judged.

    Parameters
    ----------
    name
        The output's name.
    actual, reference
        Tensors of any shape and strides, memory-mapped ones included; of float (ml_dtypes' too), integer, boolean or
        string dtype. Beyond them at most 64 MiB are used, whatever their size; a metric of arrays gets copies of both.
    expected_dtype
        What the actual output's dtype must be; None: the reference's.
    limits
        What it will be judged by. The metrics that cost a pass of their own (`top1`, callables) are measured for their
        limits alone, and the limits say how the output is divided into parts with scales of their own.

    Raises
    ------
    ComparisonError
        A dtype that can't be compared (complex numbers, dates, …).
    ArgumentError
        The parts that were given do not fit the output.

    Notes
    -----
    With y the actual output, r the reference and d = y − r in FP64, over the elements that are finite on both sides:
    max = max|d|/max|r|; l2 = ‖d‖/‖r‖; abs = max|d|; allclose = max(|d|/(1+|r|)), the least tol with which
    `numpy.allclose(y, r, rtol=tol, atol=tol)` holds; cosine = 1 − ⟨y,r⟩/(‖y‖‖r‖); snr_db = 20·log₁₀(‖r‖/‖d‖).
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
    pair = Pair(actual, reference)
    if kind == "string":
        return _measure_strings(base, pair)
    return _measure_numbers(base, pair, limits)


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
    return replace(base, size=pair.size, mismatches=unequal, worst=worst_elements(pair, largest))


def _measure_numbers(base: Measurement, pair: Pair, limits: Sequence[Limit]) -> Measurement:
    swept = sweep(pair, equality=base.kind != "float")
    division = limits[0].division if limits else Division()
    uncompared, constant = "", one_value(pair.reference)
    if base.kind == "float" and not swept.count:
        uncompared = "none of its elements is finite on both sides"
    elif base.kind == "float" and division.search and constant is not None and is_a_mask(constant):
        uncompared = f"every finite element of its reference is {constant:.9g}, as where all is masked"
    same, different = swept.nonfinite.same, swept.nonfinite.different
    scores = _scores(swept, base.kind, limits)
    return replace(
        base,
        size=pair.size,
        scores=scores,
        finite_max=METRICS["max"].score(swept).value if different and base.kind != "bool" else None,
        peak=swept.peak / swept.unit,
        mismatches=swept.mismatches,
        nonfinite=swept.nonfinite,
        worst=worst_elements(pair, swept.largest),
        histogram=swept.histogram,
        fit=swept.sums(),
        notes=(f"NaN or infinite on both sides alike in {plural(same, 'element')}: no error",) if same else (),
        uncompared=uncompared,
        constant=constant,
        parts=measure_parts(swept, division, base.name) if base.kind == "float" else (),
    )


def _scores(swept: Swept, kind: Kind, limits: Sequence[Limit]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    if kind != "bool":
        found = {name: _score(metric, swept) for name, metric in METRICS.items() if not metric.on_demand}
    for limit in limits:
        if limit.metric.name not in found and (kind in limit.metric.kinds or kind == "integer"):
            score = _score(limit.metric, replace(swept, limit=limit.limit))
            found[limit.metric.name] = _as_distance(score, limit)
    return found


def _as_distance(score: Score, limit: Limit) -> Score:
    """The same without a value where that is below 0 by more than the limit: a difference with a sign would pass,
    however large it is.
    """
    metric, least = limit.metric, -max(limit.limit, _ROUNDED_BELOW)
    is_signed = -math.inf < metric.range[0] < 0  # whoever made the metric says so
    if score.value is None or metric.at_least or metric.name in METRICS or is_signed or score.value >= least:
        return score
    note = f"{metric.name} gave {score.value:.3g}: expected a distance, which is 0 where both are equal and never below"
    return replace(score, value=None, note=note)


def _score(metric: Metric, swept: Swept) -> Score:
    if not swept.nonfinite.different or metric.takes_nonfinite:
        return metric.score(swept)
    # A user's own is not called: an error in it would hide what is wrong with the output.
    found = Score(None) if metric.on_demand else metric.score(swept)
    return Score(metric.worst, found.note if found.value is not None else "", at_least=metric.at_least)
