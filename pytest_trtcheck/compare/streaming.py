"""The numbers: both tensors are read once, in chunks that fit the processor's cache, and everything is summed in FP64.

What each step costs decides how they are laid out (nanoseconds per element, one core, FP32 tensors): converting both
to FP64 0.8, the difference 0.15, three dot products 0.1 each, one sum 0.1, the four extremes 0.07 each. A histogram of
every element would cost 1.2, hence the sampling of large tensors; the division of `allclose` 0.4, hence only where it
can matter. Threads gain nothing: the calls are too short against the interpreter lock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.compare.measurement import KEEP_WORST, Element, Histogram, NonFinite
from pytest_trtcheck.errors import ComparisonError
from pytest_trtcheck.metrics import Compared, Sums

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.metrics import Kind

BLAS_BLOCK = 10_000
"""OpenBLAS runs dot products of more elements on all cores, which under xdist means waiting for busy ones."""
CHUNK = 6 * BLAS_BLOCK
"""Elements handled at once: three FP64 buffers of them fit a usual L2 cache, nearly."""
SAMPLES = 1 << 20
"""The histogram counts about so many elements, and every one of a tensor that has no more."""

_QUARTER_BITS = 50
"""Shift that leaves of an FP64 number its exponent and two mantissa bits: `measurement.BINS_PER_OCTAVE`."""
_BINS = 1 << 13
_SAFE_PEAK = (1e-140, 1e140)
"""FP64 numbers whose squares, and sums of squares, neither overflow nor vanish."""


def kind_of(dtype: np.dtype[Any], name: str) -> Kind:
    """What kind of values `dtype` holds.

    Raises
    ------
    ComparisonError
        It holds values that can't be compared in FP64 (complex numbers, long doubles, dates, structures).
    """
    if dtype.kind == "b":
        return "bool"
    if dtype.kind in "iu":
        return "integer"
    if dtype.kind == "f" and dtype.itemsize <= np.dtype(np.float64).itemsize:
        return "float"
    if dtype.kind in "OUST":
        return "string"
    if dtype.type.__module__ == "ml_dtypes":
        return "integer" if dtype.name.startswith(("int", "uint")) else "float"
    raise ComparisonError(
        f"output {name!r}: tensors of dtype {dtype} cannot be compared",
        "cast the output in the model",
        code="output-type",
    )


@dataclass(frozen=True)
class Pair:
    """An actual output and its reference, of one shape and any strides, readable by ranges of flat C-order indices."""

    actual: NDArray[Any]
    reference: NDArray[Any]

    def read_actual(self, start: int, stop: int) -> NDArray[Any]:
        """A range of the actual output."""
        return _read(self.actual, start, stop)

    def read_reference(self, start: int, stop: int) -> NDArray[Any]:
        """The same of the reference."""
        return _read(self.reference, start, stop)

    @property
    def size(self) -> int:
        """Elements in each."""
        return self.reference.size

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The flat ranges to read."""
        for start in range(0, self.size, CHUNK):
            yield start, min(start + CHUNK, self.size)

    def errors(self, start: int, stop: int) -> NDArray[np.float64]:
        """|actual − reference| in FP64; inf where one side is NaN or infinite and the other isn't equally so."""
        actual, reference = (np.asarray(read(start, stop)) for read in (self.read_actual, self.read_reference))
        with np.errstate(all="ignore"):
            if actual.dtype.kind in "OUST" or reference.dtype.kind in "OUST":
                return np.asarray(actual != reference, dtype=np.float64)
            y, r = actual.astype(np.float64), reference.astype(np.float64)
            d = np.abs(y - r)
            if _wide_integers(actual, reference):
                d = np.abs(_exact(d, actual, reference))
            odd = ~(np.isfinite(y) & np.isfinite(r))
            if odd.any():
                d[odd] = np.where(_same(y[odd], r[odd]), 0.0, np.inf)
        return d


def blocks(shape: Sequence[int], most: int = BLAS_BLOCK) -> Iterator[tuple[slice | int, ...]]:
    """Index tuples that cover an array of this shape, each with no more than `most` elements, in C order."""
    if not shape:
        yield ()
        return
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) <= most:
        axis -= 1
    step = max(1, most // max(1, math.prod(shape[axis + 1 :])))
    for outer in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            yield (*outer, slice(start, start + step))


def _read(array: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    # Reading through the iterator copies the range alone; reshape would copy the whole tensor.
    return array.reshape(-1)[start:stop] if array.flags.c_contiguous else array.flat[start:stop]


def _same(y: NDArray[np.float64], r: NDArray[np.float64]) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (np.isnan(y) & np.isnan(r)) | (y == r)
    return same


def _wide_integers(*arrays: NDArray[Any]) -> bool:
    """Whether all hold 64-bit integers, of which FP64 can't tell neighbours apart."""
    return all(each.dtype.kind in "iu" and each.dtype.itemsize > 4 for each in arrays)


def _exact(d: NDArray[np.float64], actual: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """`d` with the differences of 64-bit integers that FP64 had rounded; wrapping is exact where |d| < 2⁶²."""
    wrapped = actual.astype(np.int64, copy=False) - reference.astype(np.int64, copy=False)
    return np.where(np.abs(d) < 2.0**62, wrapped.astype(np.float64), d)


class _Buffers:
    """FP64 room for one chunk, cut into the blocks that dot products are taken of."""

    def __init__(self, size: int) -> None:
        self.y, self.r, self.d = (np.empty(size) for _ in range(3))
        cuts = range(0, size, BLAS_BLOCK)
        self.r_blocks, self.d_blocks = ([a[i : i + BLAS_BLOCK] for i in cuts] for a in (self.r, self.d))

    def dots(self) -> tuple[float, float, float]:
        """Σd², Σd·r and Σr²."""
        return (
            float(sum(map(np.dot, self.d_blocks, self.d_blocks))),
            float(sum(map(np.dot, self.d_blocks, self.r_blocks))),
            float(sum(map(np.dot, self.r_blocks, self.r_blocks))),
        )


@dataclass(frozen=True, kw_only=True)
class Swept(Compared):
    """What one run over a pair found: all that takes no second look at the elements.

    Parameters
    ----------
    mismatches
        Elements that are unequal, where they were counted.
    largest
        The largest error of each chunk, as `Pair.errors` has it: the worst elements are looked up there later.
    """

    pair: Pair
    mismatches: int
    nonfinite: NonFinite
    largest: list[float]
    histogram: Histogram

    def sums(self) -> Sums:
        """The sums alone."""
        return Sums(self.count, self.peak, self.error, self.dd, self.dr, self.rr, self.d, self.unit)

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # noqa: D102
        return self.pair.actual.astype(np.float64), self.pair.reference.astype(np.float64)

    def squares(self) -> tuple[float, float]:  # noqa: D102
        yy, yr = [], []
        with np.errstate(all="ignore"):
            for start, stop in self.pair.chunks():
                y = self.pair.read_actual(start, stop).astype(np.float64) * self.unit
                r = self.pair.read_reference(start, stop).astype(np.float64) * self.unit
                finite = np.isfinite(y) & np.isfinite(r)
                y, r = y[finite], r[finite]
                yy.append(float(np.add.reduce(y * y)))
                yr.append(float(np.add.reduce(y * r)))
        return math.fsum(yy), math.fsum(yr)

    def disagreeing_rows(self, tie: float, axis: int) -> tuple[int, int]:  # noqa: D102
        all_actual, all_reference = (np.moveaxis(each, axis, -1) for each in (self.pair.actual, self.pair.reference))
        *rows, length = all_reference.shape
        disagreeing = 0
        for block in blocks(rows, max(1, CHUNK // length)):
            actual, reference = (
                _sortable(np.asarray(each[block])).reshape(-1, length) for each in (all_actual, all_reference)
            )
            top, other = np.argmax(reference, axis=-1), np.argmax(actual, axis=-1)
            changed = np.flatnonzero(top != other)
            best, chosen = (reference[changed, place[changed]].astype(np.float64) for place in (top, other))
            with np.errstate(all="ignore"):
                scale = np.maximum(np.abs(best), np.abs(chosen))
                tied = (best == chosen) | (np.isfinite(scale) & (np.abs(best - chosen) <= tie * scale))
            disagreeing += int(np.count_nonzero(~tied))
        return disagreeing, math.prod(rows)


def sweep(pair: Pair, *, equality: bool) -> Swept:
    """Run over the pair once; twice where its FP64 values are so large or small that their squares leave FP64.

    Parameters
    ----------
    equality
        Whether to count unequal elements (integers, booleans).
    """
    with np.errstate(all="ignore"):
        totals = _Totals(pair, 1.0, equality)
        low, high = _SAFE_PEAK
        if totals.largest_value and not low < totals.largest_value < high:
            exponent = math.frexp(totals.largest_value)[1]
            totals = _Totals(pair, math.ldexp(1.0, max(-1000, min(1000, -exponent))), equality)
    return totals.found()


class _Totals:
    """What one run over a pair, both sides times `unit`, adds up to."""

    def __init__(self, pair: Pair, unit: float, equality: bool) -> None:
        self.pair, self.unit, self.equality = pair, unit, equality
        self.step = 1 if pair.size <= SAMPLES else pair.size // SAMPLES | 1
        self.count = self.mismatches = 0
        self.dd: list[float] = []
        self.dr: list[float] = []
        self.rr: list[float] = []
        self.d: list[float] = []
        self.largest: list[float] = []
        self.error = self.peak = self.largest_value = self.allclose = 0.0
        self.nonfinite = NonFinite()
        self.bins = np.zeros(_BINS, np.int64)
        buffers = _Buffers(min(CHUNK, pair.size))
        for start, stop in pair.chunks():
            if stop - start != buffers.d.size:
                buffers = _Buffers(stop - start)
            self._add(pair.read_actual(start, stop), pair.read_reference(start, stop), buffers)

    def found(self) -> Swept:
        """Everything summed up, each sum rounded once."""
        offset = -round(math.log2(self.unit)) * 4
        counts = {int(each) + offset: int(self.bins[each]) for each in np.flatnonzero(self.bins[4:]) + 4}
        zeros, sampled = int(self.bins[:4].sum()), int(self.bins.sum())
        return Swept(
            self.count,
            self.peak,
            self.error,
            math.fsum(self.dd),
            math.fsum(self.dr),
            math.fsum(self.rr),
            math.fsum(self.d),
            self.unit,
            allclose=self.allclose,
            shape=self.pair.reference.shape,
            pair=self.pair,
            mismatches=self.mismatches,
            nonfinite=self.nonfinite,
            largest=self.largest,
            histogram=Histogram(counts, zeros, sampled, largest=self.error / self.unit),
        )

    def _add(self, actual: NDArray[Any], reference: NDArray[Any], buffers: _Buffers) -> None:
        y, r, d = buffers.y, buffers.r, buffers.d
        np.copyto(y, actual, casting="unsafe")
        np.copyto(r, reference, casting="unsafe")
        if self.unit != 1.0:
            y *= self.unit
            r *= self.unit
        np.subtract(y, r, out=d)
        if self.equality:
            # Not in FP64, which can't tell large integers apart; dtypes that differ fail anyway.
            unequal = actual != reference if actual.dtype == reference.dtype else y != r
            self.mismatches += int(np.count_nonzero(unequal))
            if _wide_integers(actual, reference):
                d[:] = _exact(d, actual, reference)
        dots = buffers.dots()
        count, bad = d.size, False
        # NaN and infinity show in the sums of squares, so the usual chunk needs no look at its elements.
        if not math.isfinite(sum(dots)):
            count, bad = self._set_aside_nonfinite(y, r, d)
            dots = buffers.dots()
        self.count += count
        for sums, value in zip((self.dd, self.dr, self.rr), dots, strict=True):
            sums.append(value)
        self.d.append(float(np.add.reduce(d)))
        error = max(float(np.maximum.reduce(d)), -float(np.minimum.reduce(d)))
        peak = max(float(np.maximum.reduce(r)), -float(np.minimum.reduce(r)))
        self.largest.append(math.inf if bad else error)
        self.error = max(self.error, error)
        self.peak = max(self.peak, peak)
        self.largest_value = max(self.largest_value, peak, error if math.isfinite(error) else 0.0)
        # y has served; its room spares two allocations per chunk.
        sample = y[: len(range(0, d.size, self.step))]
        bins = sample.view(np.int64)
        np.absolute(d[:: self.step], out=sample)
        np.right_shift(bins, _QUARTER_BITS, out=bins)
        self.bins += np.bincount(bins, minlength=_BINS)
        # |d| / (1 + |r|) is at most |d|: most chunks can't raise the maximum and are spared the division.
        if error > self.allclose:
            np.absolute(r, out=r)
            np.add(r, self.unit, out=r)
            np.divide(d, r, out=d)
            self.allclose = max(self.allclose, float(np.maximum.reduce(d)), -float(np.minimum.reduce(d)))

    def _set_aside_nonfinite(
        self, y: NDArray[np.float64], r: NDArray[np.float64], d: NDArray[np.float64]
    ) -> tuple[int, bool]:
        """Count NaN and infinity and put zeros in their place; how many elements are left, and whether any differed."""
        finite: NDArray[np.bool_] = np.isfinite(y) & np.isfinite(r)
        odd = ~finite
        odd_y, odd_r = y[odd], r[odd]
        same = int(np.count_nonzero(_same(odd_y, odd_r)))
        self.nonfinite += NonFinite(
            same=same,
            different=odd_y.size - same,
            nan_actual=int(np.count_nonzero(np.isnan(odd_y))),
            inf_actual=int(np.count_nonzero(np.isinf(odd_y))),
            nan_reference=int(np.count_nonzero(np.isnan(odd_r))),
            inf_reference=int(np.count_nonzero(np.isinf(odd_r))),
        )
        # A reference that is finite where the output is not still says how large this output should be.
        expected = np.abs(odd_r[np.isfinite(odd_r)])
        self.peak = max(self.peak, float(np.max(expected, initial=0.0)))
        for each in (y, r, d):
            each[odd] = 0.0
        self.largest_value = max(self.largest_value, self.peak, float(np.max(np.abs(y))))
        return d.size - odd_y.size, odd_y.size > same


def worst_elements(pair: Pair, largest: list[float]) -> tuple[Element, ...]:
    """The elements with the largest errors, ties in the order of their indices; those without an error never.

    So many elements can lie in no more chunks than that: those with the largest `largest`, the earliest of equals.
    """
    ranges = list(pair.chunks())
    chunks = sorted((index for index, error in enumerate(largest) if error > 0), key=lambda i: (-largest[i], i))
    found: list[tuple[float, int]] = []
    for chunk in chunks[:KEEP_WORST]:
        start, stop = ranges[chunk]
        errors = pair.errors(start, stop)
        # Faster than partitioning for so few, and argmax takes the first of equals.
        for _ in range(KEEP_WORST):
            index = int(np.argmax(errors))
            if not errors[index] > 0:
                break
            found.append((float(errors[index]), start + index))
            errors[index] = 0.0
    found.sort(key=lambda item: (-item[0], item[1]))
    return tuple(_element(pair, index, error) for error, index in found[:KEEP_WORST])


def _element(pair: Pair, index: int, error: float) -> Element:
    where = np.unravel_index(index, pair.reference.shape)
    return Element(tuple(int(i) for i in where), _plain(pair.reference[where]), _plain(pair.actual[where]), error)


def _plain(value: Any) -> float | int | str:
    plain = value.item() if isinstance(value, np.generic) else value
    return plain if isinstance(plain, (bool, int, float)) else str(plain)


def _sortable(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.dtype.isbuiltin == 1 else values.astype(np.float64)
