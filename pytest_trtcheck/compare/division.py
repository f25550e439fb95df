"""How an output is divided into parts, each of which is measured against its own scale.

max|y−r| / max|r| sees nothing of the small values of an output: where boxes in pixels stand beside scores, or logits
beside a mask of −1e9, all that is small may be wrong. What the graph says of an output (`model.output_parts`) comes
first. Where it says nothing, the reference is searched (`searching`).

Parts that the graph joins are judged as outputs of their own would be, and each sample of a batch as if it were an
input of its own, so that neither brings false alarms that were not there before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pytest_trtcheck.compare import searching
from pytest_trtcheck.compare.measurement import PartMeasurement, PartSums
from pytest_trtcheck.compare.streaming import blocks
from pytest_trtcheck.errors import ArgumentError, plural
from pytest_trtcheck.spec import Part

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import EllipsisType

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.measurement import Band
    from pytest_trtcheck.compare.streaming import Pair, Swept
    from pytest_trtcheck.spec import Shape

_MOST_SAMPLES = 4096
_FP16_MAX = 65504.0
_EVERYTHING = (0.0, math.inf)

_View: TypeAlias = "NDArray[Any]"
_Slices: TypeAlias = "tuple[slice | int, ...]"
_ALL_SAMPLES: tuple[_Slices, int | None] = ((), None)


@dataclass(frozen=True)
class Division:
    """How to divide an output.

    Parameters
    ----------
    parts
        What is known of it; where none are, it is one part.
    search
        Whether stretches and sentinel values are looked for in the reference.
    batch
        Sizes of the first axis for which it counts samples.
    given
        Whether the user gave the parts: then one that does not fit is an error.
    """

    parts: tuple[Part, ...] = ()
    search: bool = False
    batch: tuple[int, ...] = ()
    given: bool = False


def measure_parts(swept: Swept, division: Division, name: str) -> tuple[PartMeasurement, ...]:
    """Every part of an output; none where the output as a whole is the only part, and has no natural scale.

    Raises
    ------
    ArgumentError
        The user's parts do not fit the output's shape.
    """
    pair, peak = swept.pair, swept.peak / swept.unit
    if not peak and all(part.natural is None for part in division.parts):
        return ()
    samples = _samples(pair.reference.shape, division)
    parts = _fitting(division, pair.reference, name)
    if not parts:
        is_batch = pair.reference.ndim > 0 and pair.reference.shape[0] in division.batch
        parts = searching.stretches(pair.reference, int(is_batch)) if division.search else [Part()]
    found: list[PartMeasurement] = []
    for part in parts:
        actual, reference = (view(each, part) for each in (pair.actual, pair.reference))
        bands: list[Band] = [_EVERYTHING]
        if division.search and part.natural is None:
            bands = searching.bands(reference)
        # Scores share one scale, whichever sample they are of.
        pieces = samples if part.natural is None else [_ALL_SAMPLES]
        for band in bands:
            is_everything = not part.ranges and band == _EVERYTHING and len(pieces) == 1
            sums = (
                [_of_whole(swept)]
                if is_everything
                else [_summed(actual[one], reference[one], band, where) for one, where in pieces]
            )
            sums = [replace(each, whole=peak) for each in sums if each.count or each.different]
            if sums:
                found.append(PartMeasurement(part, tuple(sums), band if len(bands) > 1 else None))
    if len(found) == 1 and len(samples) == 1 and found[0].part.natural is None and not found[0].part.ranges:
        return ()
    return tuple(found)


def view(array: NDArray[Any], part: Part) -> NDArray[Any]:
    """The part of an output; nothing is copied."""
    slices: list[slice | EllipsisType] = [slice(None)] * array.ndim
    for axis, start, stop in part.ranges:
        slices[axis] = slice(start, stop)
    slices.append(...)  # else one element of a scalar would be a copy
    return array[tuple(slices)]


def within(pair: Pair, part: PartMeasurement) -> tuple[NDArray[Any], NDArray[Any]]:
    """A part of both sides; where it is divided by magnitudes, the elements outside it are zero on both."""
    actual, reference = (view(each, part.part) for each in (pair.actual, pair.reference))
    if part.band is None:
        return actual, reference
    low, high = part.band
    with np.errstate(invalid="ignore"):
        size = np.abs(reference.astype(np.float64))
        inside = (size > low) & (size <= high) if low else size <= high
    return np.where(inside, actual, 0), np.where(inside, reference, 0)


def offset(part: Part, index: Sequence[int]) -> tuple[int, ...]:
    """Where an element of a part stands in the output."""
    found = list(index)
    for axis, start, _ in part.ranges:
        found[axis] += max(start, 0)
    return tuple(found)


def _fitting(division: Division, reference: NDArray[Any], name: str) -> list[Part]:
    """The known parts, axes counted from the front, and the whole as well where they leave something out."""
    shape = reference.shape
    parts = []
    for part in division.parts:
        ranges = []
        for axis, start, stop in part.ranges:
            if not -len(shape) <= axis < len(shape):
                return _misfit(
                    division,
                    name,
                    f"{part}: the output has {plural(len(shape), 'axis', 'axes')}, its shape is {list(shape)}",
                )
            low, high, _ = slice(start, stop).indices(shape[axis])
            if high <= low or (stop is not None and stop > shape[axis]):
                return _misfit(division, name, f"{part}: axis {axis} has {plural(shape[axis], 'element')}")
            ranges.append((axis % len(shape), low, high))
        parts.append(Part(tuple(ranges), part.natural))
    if parts and not _is_covered(parts, shape):
        if not division.given:
            return []
        parts.append(Part())
    return parts


def _is_covered(parts: Sequence[Part], shape: Shape) -> bool:
    """Whether every element of an output is in one of its parts, which may overlap."""
    found = np.zeros(shape, np.bool_)
    for part in parts:
        view(found, part)[...] = True
    return bool(found.all())


def _misfit(division: Division, name: str, problem: str) -> list[Part]:
    if division.given:
        raise ArgumentError(f"Tolerance.parts[{name!r}]: {problem}", "give (axis, start, stop) within the output")
    # The graph was misunderstood: then it says nothing.
    return []


def _samples(shape: Shape, division: Division) -> list[tuple[_Slices, int | None]]:
    if not shape or shape[0] not in division.batch or not 2 <= shape[0] <= _MOST_SAMPLES:
        return [_ALL_SAMPLES]
    if math.prod(shape[1:]) < searching.ENOUGH:
        return [_ALL_SAMPLES]
    return [((slice(index, index + 1),), index) for index in range(shape[0])]


# --- sums ------------------------------------------------------------------------------------------------------------


def _of_whole(swept: Swept) -> PartSums:
    # The sums stay those of the values times the unit: metrics are ratios of them, or do without.
    peak, error = swept.peak / swept.unit, swept.error / swept.unit
    return PartSums(swept.count, peak, error, swept.dd, swept.dr, swept.rr, different=swept.nonfinite.different)


def _summed(actual: _View, reference: _View, band: Band, sample: int | None) -> PartSums:
    """The sums over the elements whose |reference| lies in a band: above its lower end, up to its upper one."""
    low, high = band
    count = different = 0
    peak = error = 0.0
    squares: list[tuple[float, float, float]] = []
    with np.errstate(all="ignore"):
        for block in blocks(reference.shape):
            y = np.asarray(actual[block]).astype(np.float64).ravel()
            r = np.asarray(reference[block]).astype(np.float64).ravel()
            d = y - r
            size = np.abs(r)
            within = None
            if low > 0 or high < math.inf:
                within = (size > low) & (size <= high) if low > 0 else size <= high
            found = float(d @ d), float(d @ r), float(r @ r)
            if within is not None or not math.isfinite(sum(found)):
                finite = np.isfinite(y) & np.isfinite(r)
                within = np.isfinite(r) if within is None else within & np.isfinite(r)
                different += int(np.count_nonzero(within & ~finite))
                peak = max(peak, float(size[within].max(initial=0.0)))
                if low > 0:
                    # FP16 ends there, and a mask is as good at its end as beyond it.
                    d[(size > _FP16_MAX) & (np.abs(y) >= _FP16_MAX * (1 - 2**-10)) & (np.sign(y) == np.sign(r))] = 0.0
                within &= finite
                r, d = r[within], d[within]
                size = size[within]
                found = float(d @ d), float(d @ r), float(r @ r)
            count += d.size
            peak = max(peak, float(size.max(initial=0.0)))
            error = max(error, float(np.abs(d).max(initial=0.0)))
            squares.append(found)
    dd, dr, rr = (math.fsum(each) for each in zip(*squares, strict=True))
    return PartSums(count, peak, error, dd, dr, rr, different=different, sample=sample)
