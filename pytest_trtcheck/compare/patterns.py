"""What a wrong output looks like, and what to try next. Only failed outputs come here, so more passes are fine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.choices import half_part, is_pair, quantized_part
from pytest_trtcheck.compare.concentration import concentration
from pytest_trtcheck.compare.division import offset, within
from pytest_trtcheck.compare.judge import judge
from pytest_trtcheck.compare.measure import measure
from pytest_trtcheck.compare.streaming import CHUNK, Pair, sweep
from pytest_trtcheck.record import is_bad

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.limits import Limit, Limits
    from pytest_trtcheck.compare.measurement import Element, Measurement, PartMeasurement
    from pytest_trtcheck.metrics import Sums
    from pytest_trtcheck.record import OutputRecord
    from pytest_trtcheck.spec import Precision

FP16_MAX = 65504.0
EXPLAINED = 0.99
"""Share of the squared error that a factor, a shift or a place must account for to be named."""
_REARRANGED = 0.01
_SMALL = 1 << 20
"""Elements up to which rearrangements of an output are tried."""
_MOST_INDICES = 512
_FEW = 1e-3
OF_PRECISION = frozenset(
    ["overflow", "nonfinite", "clipped", "constant", "few", "place", "scale", "shift", "sign", "spread"]
)
"""The patterns whose advice is about the precision: a diagnosis knows better."""
_OF_ORDER = frozenset(["permuted", "reordered", "reversed", "shape"])
_ENOUGH = 8
"""Fewer elements than this are easily explained by one number, without its meaning anything."""


@dataclass(frozen=True)
class Pattern:
    """What an error looks like (`kind` for programs, `text` for people) and what to try next.

    `other` names the output that a swapped one holds.
    """

    kind: str
    text: str
    advice: str
    other: str | None = None


@dataclass(frozen=True)
class Examination:
    """A failed output looked at more closely.

    Parameters
    ----------
    beyond
        Elements whose own error is over the limit; None where the metric that failed is none of single elements.
    size
        Elements in all.
    patterns
        What the error looks like, the most telling first; never empty.
    case
        The input whose outputs these are, where there were several.
    part
        Where all this is looked at, when it is a part of the output that failed.
    worst
        The elements of that part with the largest errors.
    """

    beyond: int | None
    size: int
    patterns: tuple[Pattern, ...]
    case: int | None = None
    part: str | None = None
    worst: tuple[Element, ...] = ()


def examine(
    actual: Mapping[str, NDArray[Any]],
    reference: Mapping[str, NDArray[Any]],
    measurements: Mapping[str, Measurement],
    outputs: Sequence[OutputRecord],
    precision: Precision,
    *,
    limits: Limits,
    case: int | None = None,
    can_keep: bool = True,
    has_no_order: bool = False,
) -> dict[str, Examination]:
    """Look closely at every output that failed: how much of it is wrong, in what way, and what may help.

    Parameters
    ----------
    actual, reference
        The outputs of one run.
    measurements, outputs
        What was measured and judged of that run, or of several that it is one of. Outputs that failed in other runs
        alone are left out.
    precision
        What the model was lowered to.
    limits
        What the outputs were judged by.
    case
        Which input this run was, where there were several; `worst_case` names the one to take.
    can_keep
        Whether `keep_fp32` has an effect on the model: it has none on one that brings its own precision with it.
    has_no_order
        Whether rows may change places, or be there or not, by a rounding: behind a non-maximum suppression.
    """
    failed = {output.name: output for output in outputs if output.verdict == "fail"}
    found = {}
    for name, output in failed.items():
        pair = Pair(np.asarray(actual[name]), np.asarray(reference[name]))
        measurement = _of_this_run(pair, measurements[name], case, limits[name])
        # Of several runs that failed together, one may be sound.
        if measurement.cases < measurements[name].cases and not is_bad(judge(measurement, limits[name]).verdict):
            continue
        patterns = list(_misplaced(name, pair, reference))
        part = None if patterns else _failed_part(measurement, output)
        worst: tuple[Element, ...] = ()
        if part is not None:
            # Looked at as an output of its own.
            pair = Pair(*within(pair, part))
            measurement = measure(name, pair.actual, pair.reference)
            worst = tuple(replace(each, index=offset(part.part, each.index), case=case) for each in measurement.worst)
        beyond = _beyond(pair, measurement, output) if measurement.size else None
        if measurement.faults:
            patterns.append(_of_faults(measurement))
        elif measurement.size:
            patterns += _patterns(pair, measurement, precision)
        if not patterns:
            patterns.append(_no_pattern(beyond, measurement, precision))
        if not can_keep:
            patterns = [replace(each, advice=_EXPORTED) if "keep_fp32" in each.advice else each for each in patterns]
        if has_no_order:
            patterns = [
                replace(each, advice=f"{_DETECTIONS}; otherwise {each.advice}") if each.kind in _OF_ORDER else each
                for each in patterns
            ]
        found[name] = Examination(
            beyond, measurement.size, tuple(patterns), case, None if part is None else str(part), worst
        )
    return found


def _failed_part(measurement: Measurement, output: OutputRecord) -> PartMeasurement | None:
    """The part that failed, where not the whole output did."""
    if measurement.faults or measurement.nonfinite.different:
        return None
    worst = next((entry.part for entry in output.judged if entry.verdict == "fail" and entry.part), None)
    return next((part for part in measurement.parts if str(part) == worst), None)


def worst_case(output: OutputRecord) -> int:
    """The input, of several that were merged, on which a failed output is best looked at; 0 where there was one."""
    entries = [entry for entry in output.judged if is_bad(entry.verdict)]
    cases = [entry.case for entry in entries] + [element.case for element in output.details.worst]
    return next((int(case) for case in cases if case is not None), 0)


def _of_this_run(pair: Pair, measurement: Measurement, case: int | None, limits: Sequence[Limit]) -> Measurement:
    if measurement.cases == 1:
        return measurement
    faults = tuple(fault for fault in measurement.faults if fault.case == case)
    return replace(measure(measurement.name, pair.actual, pair.reference, limits=limits), faults=faults)


def _beyond(pair: Pair, measurement: Measurement, output: OutputRecord) -> int | None:
    for entry in output.judged:
        if entry.verdict != "fail" or entry.metric not in {"max", "abs", "allclose", "mismatches"}:
            continue
        if entry.metric == "mismatches":
            return measurement.mismatches
        limit = (entry.limit or 0.0) * (measurement.peak or 1.0 if entry.metric == "max" else 1.0)
        beyond = 0
        for each in pair.chunks():
            allowed: Any = limit
            if entry.metric == "allclose":
                allowed = limit * (1 + np.nan_to_num(np.abs(pair.read_reference(*each).astype(np.float64)), posinf=0.0))
            beyond += int(np.count_nonzero(pair.errors(*each) > allowed))
        return beyond
    return measurement.nonfinite.different or None


def _patterns(pair: Pair, measurement: Measurement, precision: Precision) -> list[Pattern]:
    if measurement.kind != "float":
        return [_unequal(measurement), *_place(pair, measurement, precision)]
    if measurement.nonfinite.different:
        return [_nonfinite(measurement, precision), *_place(pair, measurement, precision)]
    if not measurement.peak:
        return [_ZERO_REFERENCE]
    found = list(_uniform(pair, measurement, measurement.fit)) if measurement.fit else []
    if not found and measurement.fit:
        found = list(_rearranged(pair, measurement.fit))
    return found or [*_clipped(measurement, precision), *_place(pair, measurement, precision)]


def _place(pair: Pair, measurement: Measurement, precision: Precision) -> Iterator[Pattern]:
    wrong = measurement.mismatches if measurement.kind != "float" else measurement.size
    if wrong < _ENOUGH:
        return
    unit = max([measurement.peak, *(e.error for e in measurement.worst if math.isfinite(e.error))]) or 1.0
    place = concentration(pair, EXPLAINED, unit)
    if place is not None:
        yield Pattern("place", place, _PLACE_ADVICE.get(quantized_part(precision) or "", _PLACE))


def _of_faults(measurement: Measurement) -> Pattern:
    if all(fault.what == "dtype" for fault in measurement.faults):
        return Pattern("dtype", "another output type", "compare the types of the model's outputs with the engine's")
    return Pattern(
        "shape",
        "another layout, batch size or dynamic dimension",
        "compare the shapes of the model's outputs, and what batch= and shapes= made of them, with the engine's",
    )


def _nonfinite(measurement: Measurement, precision: Precision) -> Pattern:
    counts = measurement.nonfinite
    if not counts.nan_actual and not counts.inf_actual:
        return Pattern(
            "nonfinite_reference",
            "the reference itself is NaN or infinite where the output is finite",
            "look at the model and these inputs first: the FP32 model overflows or divides by zero on them",
        )
    what = f"{counts.nan_actual:,} NaN and {counts.inf_actual:,} infinite elements came out"
    if half_part(precision) == "fp16" and measurement.peak > FP16_MAX:
        return Pattern(
            "overflow",
            f"{what}, and the reference reaches {measurement.peak:.4g}: more than the largest FP16 number, 65504",
            "the output does not fit FP16: scale it down in the model, use precision='bf16', or keep the last nodes in "
            "FP32 with keep_fp32=",
        )
    if half_part(precision) == "fp16":
        return Pattern(
            "overflow",
            f"{what}, though the reference stays within ±{measurement.peak:.4g}: a tensor inside overflowed, or was "
            "divided by what became 0",
            "FP16 ends at 65504, and below 6e-8 all is 0: keep the nodes that overflow or underflow in FP32 with "
            "keep_fp32= (squares, exponentials, sums over many elements and small constants are the usual ones), or "
            "use precision='bf16', which has FP32's range",
        )
    if (quantized := quantized_part(precision)) is not None:
        end = "INT8 saturates at ±127 steps" if quantized == "int8" else "FP8 (E4M3) saturates at ±448 steps"
        return Pattern(
            "nonfinite",
            f"{what}, though the reference stays within ±{measurement.peak:.4g}",
            f"{end} and gives neither NaN nor infinity by itself: a divisor, or what a logarithm is taken of, was "
            "rounded to 0; keep the nodes before it out of the quantization with keep_fp32=",
        )
    return Pattern(
        "nonfinite",
        f"{what}, though {precision} has the range of FP32",
        "an output that is not written, a division by zero or a logarithm of zero that rounding brought about",
    )


def _uniform(pair: Pair, measurement: Measurement, fit: Sums) -> Iterator[Pattern]:
    """One number that explains the whole error: a constant output, a factor, a shift."""
    # The s and the c that bring s·r and r + c closest to the output (least squares), and the share of Σd² that each
    # accounts for.
    scale = 1 + fit.dr / fit.rr if fit.rr else math.nan
    by_scale = fit.dr / fit.dd * (fit.dr / fit.rr) if fit.dd and fit.rr else 0.0
    shift = fit.d / fit.count / fit.unit if fit.count else math.nan
    by_shift = fit.d / fit.dd * (fit.d / fit.count) if fit.dd and fit.count else 0.0
    first, constant = _constant(pair)
    if constant and len({element.expected for element in measurement.worst}) > 1:
        yield Pattern(
            "constant",
            f"every element is {first:g}, the reference varies",
            "an output that was never written, an input that never arrived, or values that all underflow or saturate",
        )
    elif fit.count < _ENOUGH:
        return
    elif by_scale > EXPLAINED and scale < 0:
        size = "" if abs(scale + 1) < _REARRANGED else f" and scaled by about {-scale:.4g}"
        yield Pattern(
            "sign", f"the sign is flipped{size}", "look for a negated weight or subtraction in the other order"
        )
    elif by_shift > EXPLAINED:
        yield Pattern(
            "shift",
            f"the output is shifted by about {shift:+.4g} everywhere",
            "look for a bias that is missing, doubled or badly quantized near the output",
        )
    elif by_scale > EXPLAINED:
        yield Pattern(
            "scale",
            f"the output is scaled by about {scale:.4g}",
            "look for a scaled weight, a wrong quantization scale or a normalization with other constants near the "
            "output",
        )


def _constant(pair: Pair) -> tuple[float, bool]:
    first = float(pair.actual[(0,) * pair.actual.ndim])
    same = all(bool(np.all(pair.read_actual(*each) == pair.actual[(0,) * pair.actual.ndim])) for each in pair.chunks())
    return first, same and pair.size > 1


def _rearranged(pair: Pair, fit: Sums) -> Iterator[Pattern]:
    """The right values in other places: an axis reversed, two axes exchanged, or any other order."""
    if pair.size > _SMALL or not fit.rr or fit.dd < _REARRANGED * fit.rr:
        return
    shape = pair.reference.shape
    for axis, length in enumerate(shape):
        if length > 1 and _explains(pair, np.flip(pair.reference, axis), fit):
            yield Pattern("reversed", f"axis {axis} is reversed", "look for channels or rows read in the other order")
            return
    for one, other in combinations(range(len(shape)), 2):
        if shape[one] == shape[other] > 1 and _explains(pair, np.swapaxes(pair.reference, one, other), fit):
            yield Pattern(
                "transposed", f"axes {one} and {other} are exchanged", "look for a transpose that is missing or doubled"
            )
            return
    for axis in range(len(shape)):
        order = _permutation(pair, axis)
        if order is not None and _explains(pair, np.take(pair.reference, order, axis), fit):
            moved = [f"{old} → {new}" for new, old in enumerate(order) if new != old]
            listed = ", ".join(moved[:4]) + (", …" if len(moved) > 4 else "")
            yield Pattern(
                "permuted",
                f"axis {axis} is in another order ({listed})",
                "look for channels, classes or batch entries that are joined or split in another order",
            )
            return
    actual, reference = (np.sort(each.astype(np.float64), axis=None) for each in (pair.actual, pair.reference))
    if _explains(Pair(actual, reference), reference, fit, share=1e-4):
        yield Pattern(
            "reordered",
            "the values are those of the reference in another order",
            "look for a transpose, a reshape or a gather that differs, or for batch entries mixed up",
        )


def _permutation(pair: Pair, axis: int) -> list[int] | None:
    """Which index of the reference each index of an axis holds, where every one is told apart from all others."""
    length = pair.reference.shape[axis]
    if not 2 <= length <= _MOST_INDICES or pair.size < _ENOUGH * length:
        return None
    actual, reference = (
        np.moveaxis(each, axis, 0).reshape(length, -1).astype(np.float64) for each in (pair.actual, pair.reference)
    )
    with np.errstate(all="ignore"):
        distances = (
            np.sum(actual**2, axis=1)[:, None] - 2 * actual @ reference.T + np.sum(reference**2, axis=1)[None, :]
        )
    if not np.isfinite(distances).all():
        return None
    order = np.argmin(distances, axis=1)
    closest, second = np.sort(distances, axis=1)[:, :2].T
    unique = len(set(order.tolist())) == length and bool(np.all(closest < _REARRANGED * second))
    return [int(each) for each in order] if unique and bool(np.any(order != np.arange(length))) else None


def _explains(pair: Pair, candidate: NDArray[Any], fit: Sums, share: float = _REARRANGED) -> bool:
    found = sweep(Pair(pair.actual, candidate), equality=False)
    return found.dd / found.unit**2 < share * fit.dd / fit.unit**2


def _clipped(measurement: Measurement, precision: Precision) -> Iterator[Pattern]:
    """The largest values stop at one bound, as they do at the end of an integer's or FP16's range."""
    worst = [(abs(float(e.actual)), abs(float(e.expected))) for e in measurement.worst if not isinstance(e.actual, str)]
    bounds = [actual for actual, _ in worst]
    if len(worst) < len(measurement.worst) or len(worst) < 3 or min(bounds) < 0.99 * max(bounds):
        return
    if all(expected > 1.05 * actual > 0 for actual, expected in worst):
        advice = "the range chosen in calibration is too small for these inputs: add such inputs to calibration=, or "
        if quantized_part(precision) == "int8":
            advice += "use Calibration(method='minmax'), which never clips what it saw"
        else:
            advice = "a tensor saturates at the end of its type's range: keep its node in FP32 with keep_fp32="
        yield Pattern(
            "clipped", f"values stop at ±{max(bounds):.4g} where the reference reaches {measurement.peak:.4g}", advice
        )


def _misplaced(name: str, pair: Pair, reference: Mapping[str, NDArray[Any]]) -> Iterator[Pattern]:
    """Whether the output holds what the reference has under another name."""
    if not pair.actual.size or pair.actual.dtype.kind in "OUST" or _alike(pair.actual, pair.reference):
        return
    for other, candidate in reference.items():
        if other != name and _alike(pair.actual, np.asarray(candidate)):
            yield Pattern(
                "swapped",
                f"it holds what the reference has in output {other!r}",
                "the outputs are swapped: compare their names and order in the model and in the engine",
                other,
            )
            return


def _alike(actual: NDArray[Any], reference: NDArray[Any]) -> bool:
    """Whether the two differ by little; most that don't are told by their first elements."""
    if actual.shape != reference.shape or reference.dtype.kind in "OUST":
        return False
    pair = Pair(actual, reference)
    head = Pair(pair.read_actual(0, CHUNK), pair.read_reference(0, CHUNK))
    return all(
        not found.nonfinite.different and found.peak > 0 and found.dd < _REARRANGED * found.rr
        for found in (sweep(each, equality=False) for each in (head, pair))
    )


def _unequal(measurement: Measurement) -> Pattern:
    return Pattern(
        "unequal",
        "integers and booleans have no rounding error of their own: a float that they come from crossed a threshold",
        "compare that float (the scores before ArgMax, TopK or a comparison) as well, or allow a share of differences "
        f"with tol={{{measurement.name!r}: Tolerance(mismatches=…)}}",
    )


def _no_pattern(beyond: int | None, measurement: Measurement, precision: Precision) -> Pattern:
    if beyond is not None and beyond < _FEW * measurement.size:
        return Pattern(
            "few",
            "a few elements are far off, the rest is within the limit",
            f"look at what is special about their inputs; {_advice(precision)}",
        )
    return Pattern("spread", "the error is spread over the whole output", _advice(precision))


def _advice(precision: Precision) -> str:
    """Of a pair, that for what is quantized, which costs more."""
    quantized = quantized_part(precision)
    text = _ADVICE[quantized or precision]
    return f"{text}, or let them run in {half_part(precision)} with exclude=" if is_pair(precision) else text


_ZERO_REFERENCE = Pattern(
    "zero_reference",
    "the reference is all zero for these inputs, so no error is small against it",
    "compare on inputs for which the model's output is not zero, or give this output a limit on abs in its own unit",
)
_DETECTIONS = (
    "rows behind a non-maximum suppression have no order of their own, and a rounding decides which are there: "
    "metric=metrics.detections(…) matches them by where they lie"
)
_EXPORTED = (
    "the model brings its own precision with it: export it with the nodes that lose most in FP32, with no Q/DQ or "
    "casts around them"
)
_PLACE = "the rest is right: look at the weights and the layer that produce this part"
_PLACE_ADVICE: Mapping[str, str] = {
    "int8": f"{_PLACE}; a channel whose weights are far larger or smaller than the others' needs a scale of its own "
    "(per-channel weights)",
    "fp8": f"{_PLACE}; a channel whose weights are far larger or smaller than the others' needs a scale of its own",
}
_ADVICE: Mapping[str, str] = {
    "fp32": "FP32 engines differ from the reference by rounding alone: is TF32 on, or the engine built from another "
    "model?",
    "tf32": "TF32 keeps 10 bits of the mantissa of what is multiplied, as FP16 does: is the tolerance one for FP32?",
    "fp16": "keep the most sensitive nodes in FP32 with keep_fp32=; softmax, normalization and long sums come first",
    "bf16": "BF16 keeps 7 bits of the mantissa: precision='fp16' keeps 10, or keep sensitive nodes in FP32 with "
    "keep_fp32=",
    "int8": "calibrate with more inputs that look like these, try another Calibration(method=…), or keep sensitive "
    "nodes out of INT8 with keep_fp32=",
    "fp8": "calibrate with more inputs that look like these, or keep sensitive nodes out of FP8 with keep_fp32=",
}
