"""What the reference itself says of an output's parts: what cannot well come about by chance.

Sentinel values are as good as equal and lie far beyond the rest. Stretches along an axis have scales with a clean gap
between them: every index of the one is many times larger than every index of the other. What is spread over many
decades is left alone: small values of such an output (probabilities) have errors that are relative to something else.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pytest_trtcheck.compare.streaming import blocks
from pytest_trtcheck.spec import Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.measurement import Band

GAP = 16.0
"""Neighbouring stretches have scales that lie so many times apart, with nothing in between."""
FAR = 100.0
"""Sentinel values lie so many times beyond the rest."""
ENOUGH = 16
"""Elements that it takes for their largest to be a scale."""
_LONGEST_AXIS = 4096
_MOST_RUNS = 3
_SPREAD = 100.0
"""A population has a scale of its own where its median is at least this fraction of its largest: uniform, normal and
Laplacian values have, what is spread over many decades has not."""
_LARGEST_SENTINEL_KINDS = 4
_NEXT_TO = 0.4
"""Two masks added to one another are twice as large; less than this fraction of the largest is no sentinel."""
_LOOKED_AT = 1 << 16
"""Elements of a large tensor that are looked at before all of them are."""
_A_MASK = 1e4
"""Models mask with values from here on."""
_A_FEW = 4

_View: TypeAlias = "NDArray[Any]"


def is_a_mask(value: float) -> bool:
    """Whether a value is as large as what models mask with."""
    return abs(value) >= _A_MASK


def one_value(reference: NDArray[Any]) -> float | None:
    """The value that every finite element has; None where they differ, or there is no second one."""
    first = next((_finite(each) for each in _values(reference) if _finite(each).size), np.empty(0))
    if reference.size < 2 or not first.size:
        return None
    return float(first[0]) if all(bool(np.all(_finite(each) == first[0])) for each in _values(reference)) else None


# --- sentinel values -------------------------------------------------------------------------------------------------


def bands(reference: _View) -> list[Band]:
    """Bands of |reference|: the rest first, then the sentinel values beyond it, if there are any."""
    found: list[Band] = []
    high = math.inf
    while len(found) < _LARGEST_SENTINEL_KINDS:
        low = _below_sentinels(reference, high)
        if low is None:
            break
        found.append((low, high))
        high = low
    return [(0.0, high), *reversed(found)]


def _below_sentinels(reference: _View, high: float) -> float | None:
    """A bound under which the rest lies, where the largest values up to `high` are sentinels; else None."""
    # Most outputs have values of every size, which a few of them show.
    few = _magnitudes(_sampled(reference), high)
    if not few.size or _between(few, float(few.max())):
        return None
    peak = max(float(_magnitudes(each, high).max(initial=0.0)) for each in _values(reference))
    low = peak / FAR
    if peak < FAR or _between(few, peak):
        return None
    beyond: list[NDArray[np.float64]] = []
    kinds: set[float] = set()
    count = rest = 0
    largest = 0.0
    first, last = math.inf, -math.inf
    for values in _values(reference):
        finite = _finite(values)
        finite = finite[np.abs(finite) <= high]
        far = finite[np.abs(finite) > low]
        near = np.abs(finite[np.abs(finite) <= low])
        if far.size and float(np.abs(far).min()) < _NEXT_TO * peak:
            return None
        count, rest = count + far.size, rest + near.size
        largest = max(largest, float(near.max(initial=0.0)))
        if far.size:
            first, last = min(first, float(far.min())), max(last, float(far.max()))
            if len(kinds) <= _LARGEST_SENTINEL_KINDS:
                kinds.update(np.unique(far).tolist())
        beyond.append(near[:: max(1, near.size // 64)])
    if not rest or not largest:
        return None
    repeated = count > len(kinds) <= _LARGEST_SENTINEL_KINDS
    # A mask that was added: −10000 and what was there before.
    added = count > 1 and last - first <= 4 * largest + 1e-3 * peak
    typical = float(np.median(np.concatenate(beyond)))
    # One element is as good as a mask where it is as large as those are.
    like_a_mask = count == 1 and peak >= _A_MASK and rest >= _A_FEW
    are_few = rest >= ENOUGH and count * _SPREAD <= rest
    outlier = (are_few or like_a_mask) and typical * _SPREAD >= largest
    return low if repeated or added or outlier else None


def _between(magnitudes: NDArray[np.float64], peak: float) -> bool:
    return bool(np.any((magnitudes > peak / FAR) & (magnitudes < _NEXT_TO * peak)))


def _magnitudes(values: NDArray[np.float64], high: float) -> NDArray[np.float64]:
    found = np.abs(_finite(values))
    return found[found <= high]


def _sampled(array: _View) -> NDArray[np.float64]:
    """Elements of the array, all of a small one."""
    step = max(1, math.ceil(array.size / _LOOKED_AT))
    if step > 1 and array.ndim:
        # At random along the longest axis: regular steps could fall on the same channels again and again.
        axis = int(np.argmax(array.shape))
        length = array.shape[axis]
        array = np.take(array, np.sort(np.random.default_rng(0).integers(0, length, max(1, length // step))), axis)
    return np.asarray(array).astype(np.float64).ravel()


# --- stretches -------------------------------------------------------------------------------------------------------


def stretches(reference: NDArray[Any], first_axis: int) -> list[Part]:
    """Stretches along one axis between whose scales there is a clean gap; the whole output where there are none."""
    for axis in sorted(range(first_axis, reference.ndim), key=lambda each: (each not in {1, reference.ndim - 1}, each)):
        length = reference.shape[axis]
        if 2 <= length <= _LONGEST_AXIS and reference.size >= ENOUGH * length:
            found = _along(reference, axis)
            if found:
                return found
    return [Part()]


def _along(reference: NDArray[Any], axis: int) -> list[Part]:
    some = _thinned(reference, axis)
    if not _runs(_peaks(some, axis)) or _is_masked_along(some, axis):
        return []
    peaks = _peaks(reference, axis)
    runs = _runs(peaks)
    if peaks.max() <= 1 and _population(reference)[0] >= 0:
        # Probabilities, some of them small: they are all of one scale.
        return []
    parts = []
    for start, stop, is_small in runs:
        part = Part(((axis, start, stop),))
        if is_small:
            small = reference[(slice(None),) * axis + (slice(start, stop),)]
            low, high, typical = _population(small)
            if low >= 0 and high <= 1:
                # Beside larger values, what lies between 0 and 1 is taken for scores.
                part = replace(part, natural=1.0)
            elif stop - start > 1 and (finer := _along(small, axis)):
                parts += [
                    Part(((axis, start + first, start + last),), natural) for first, last, natural in _bounds(finer)
                ]
                continue
            elif typical * _SPREAD < max(-low, high):
                return []
        parts.append(part)
    return parts


def _is_masked_along(reference: NDArray[Any], axis: int) -> bool:
    """Whether all of an index is one huge value, as padding is masked: what stands apart then is a sentinel value."""
    rows = np.moveaxis(reference, axis, 0).reshape(reference.shape[axis], -1)
    first = rows[:, :1]
    return bool((np.abs(first[:, 0].astype(np.float64)) >= _A_MASK)[(rows == first).all(axis=1)].any())


def _bounds(parts: list[Part]) -> Iterator[tuple[int, int, float | None]]:
    for part in parts:
        ((_, start, stop),) = part.ranges
        assert stop is not None
        yield start, stop, part.natural


def _thinned(reference: NDArray[Any], axis: int) -> NDArray[Any]:
    """Fewer of the elements, of every index along an axis."""
    step = math.ceil(reference.size / _LOOKED_AT)
    others = [each for each in range(reference.ndim) if each != axis]
    longest = max(others, key=lambda each: reference.shape[each])
    step = min(step, max(1, reference.size // reference.shape[axis] // ENOUGH))
    return reference[tuple(slice(None, None, step if each == longest else 1) for each in range(reference.ndim))]


def _peaks(reference: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """The largest finite magnitude of each index along an axis."""
    peaks = np.zeros(reference.shape[axis])
    moved = np.moveaxis(reference, axis, -1)
    for values in _values(moved):
        # No axis that is searched is as long as a block, so that blocks hold whole rows of it.
        rows = np.abs(values.reshape(-1, peaks.size))
        rows[~np.isfinite(rows)] = 0.0
        np.maximum(peaks, rows.max(axis=0), out=peaks)
    return peaks


def _runs(peaks: NDArray[np.float64]) -> list[tuple[int, int, bool]]:
    """(start, stop, whether its values are the small ones) of each stretch; empty where there is no clean gap."""
    order = np.sort(peaks)[::-1]
    for above, below in itertools.pairwise(order):
        if not below > 0 or below * GAP > above:
            continue
        small = peaks <= below
        edges = np.flatnonzero(np.diff(small)) + 1
        if len(edges) < _MOST_RUNS:
            bounds = [0, *edges.tolist(), len(peaks)]
            return [(start, stop, bool(small[start])) for start, stop in itertools.pairwise(bounds)]
    return []


def _population(values: _View) -> tuple[float, float, float]:
    """The least, the largest and the median magnitude of the finite values."""
    low, high = math.inf, -math.inf
    for each in _values(values):
        finite = _finite(each)
        low, high = min(low, float(finite.min(initial=math.inf))), max(high, float(finite.max(initial=-math.inf)))
    few = np.abs(_finite(_sampled(values)))
    return low, high, float(np.median(few)) if few.size else 0.0


def _values(array: _View) -> Iterator[NDArray[np.float64]]:
    for block in blocks(array.shape):
        yield np.asarray(array[block]).astype(np.float64).ravel()


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]
