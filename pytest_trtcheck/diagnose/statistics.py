"""What two versions of a tensor differ by, and what a 16-bit or quantized type makes of one; read chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_CHUNK = 1 << 16
"""Elements, so that a chunk in FP64 and what is made of it stay in the processor's cache."""


@dataclass(frozen=True)
class Difference:
    """A tensor against its reference, with d the difference and r the reference, both finite.

    Parameters
    ----------
    size
        Elements.
    peak
        max|r|.
    largest
        max|d|.
    dd, rr
        Σd² and Σr², in FP64.
    nonfinite
        Elements that are NaN or infinite on one side alone, or differently so.
    unequal
        For integers, booleans and strings: elements that differ; None for floats.
    """

    size: int
    peak: float = 0.0
    largest: float = 0.0
    dd: float = 0.0
    rr: float = 0.0
    nonfinite: int = 0
    unequal: int | None = None

    @property
    def max(self) -> float:
        """max|d| / max|r|; infinite where elements are not finite. For integers the share that differs."""
        if self.unequal is not None:
            return self.unequal / self.size if self.size else 0.0
        return math.inf if self.nonfinite else _ratio(self.largest, self.peak)

    @property
    def l2(self) -> float:
        """‖d‖ / ‖r‖; infinite where elements are not finite. For integers the share that differs."""
        if self.unequal is not None:
            return self.max
        return math.inf if self.nonfinite else _ratio(math.sqrt(self.dd), math.sqrt(self.rr))

    @property
    def snr_db(self) -> float:
        """10·log₁₀(‖r‖² / ‖d‖²)."""
        return -20 * math.log10(self.l2) if 0 < self.l2 < math.inf else -math.inf if self.l2 else math.inf


def _ratio(error: float, size: float) -> float:
    return error / size if size else (math.inf if error else 0.0)


def difference(actual: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Compare two tensors of any dtype; of floats, NaN and infinities that are the same on both sides are left out."""
    if actual.shape != reference.shape:
        return Difference(max(actual.size, 1), nonfinite=max(actual.size, 1))
    if not is_float(reference):
        return Difference(reference.size, unequal=int(np.count_nonzero(actual != reference)))
    found = Difference(0)
    for a, r in zip(_chunks(actual), _chunks(reference), strict=True):
        found = _joined(found, _of_chunk(a, r))
    return found


def _of_chunk(actual: NDArray[np.float64], reference: NDArray[np.float64]) -> Difference:
    with np.errstate(invalid="ignore", over="ignore"):
        d = actual - reference
        dd, rr = float(d @ d), float(reference @ reference)
    count, nonfinite = len(d), 0
    # FP32 values cannot make an FP64 sum of squares overflow, so a finite sum says that all elements are finite.
    if not math.isfinite(dd + rr):
        finite = np.isfinite(actual) & np.isfinite(reference)
        same = (actual == reference) | (np.isnan(actual) & np.isnan(reference))
        nonfinite = int(np.count_nonzero(~finite & ~same))
        d, reference = d[finite], reference[finite]
        dd, rr = float(d @ d), float(reference @ reference)
    return Difference(
        count,
        float(np.abs(reference).max(initial=0.0)),
        float(np.abs(d).max(initial=0.0)),
        dd,
        rr,
        nonfinite,
    )


def _joined(one: Difference, other: Difference) -> Difference:
    return Difference(
        one.size + other.size,
        max(one.peak, other.peak),
        max(one.largest, other.largest),
        one.dd + other.dd,
        one.rr + other.rr,
        one.nonfinite + other.nonfinite,
    )


@dataclass(frozen=True)
class FloatType:
    """What a 16-bit type holds: its largest finite value, its smallest normal one and the smallest above 0."""

    name: str
    largest: float
    smallest_normal: float
    smallest: float
    roundoff: float


FP16 = FloatType("FP16", 65504.0, 2.0**-14, 2.0**-24, 2.0**-11)
BF16 = FloatType("BF16", 3.3895313892515355e38, 2.0**-126, 2.0**-133, 2.0**-8)


@dataclass(frozen=True)
class Span:
    """The values that a quantizer represents; what lies outside saturates. `step` is its scale."""

    low: float
    high: float
    step: float

    @property
    def amax(self) -> float:
        """The larger of the two magnitudes."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Fit:
    """How a tensor fits the type or the range that it is to be held in.

    Parameters
    ----------
    overflow
        Finite elements beyond the largest value of the type.
    underflow
        The share (0 to 1) of the elements other than 0 that lie below the smallest normal value of the type, or that a
        quantizer rounds to 0.
    flushed
        The share of those that become 0.
    saturated
        The share of all elements that lie outside the quantizer's range; None without one.
    """

    overflow: int = 0
    underflow: float = 0.0
    flushed: float = 0.0
    saturated: float | None = None


def fit(array: NDArray[Any], held: FloatType | None, span: Span | None) -> Fit:
    """How `array` fits `held` and `span`."""
    if (held is None and span is None) or not is_float(array):
        return Fit()
    overflow = tiny = flushed = nonzero = outside = 0
    smallest_normal = held.smallest_normal if held else 0.0
    # Round to nearest even: exactly half of the smallest becomes 0.
    half = held.smallest / 2 if held else span.step / 2 if span else 0.0
    for chunk in _chunks(array):
        magnitude = np.abs(chunk)
        nonzero += int(np.count_nonzero(magnitude))
        gone = int(np.count_nonzero((magnitude <= half) & (magnitude > 0)))
        flushed += gone
        if held is not None:
            # What is above the largest value by less than half a step still rounds to it.
            beyond = held.largest * (1 + held.roundoff / 2)
            overflow += int(np.count_nonzero((magnitude >= beyond) & np.isfinite(magnitude)))
            tiny += int(np.count_nonzero((magnitude < smallest_normal) & (magnitude > 0)))
        else:
            tiny += gone
        if span is not None:
            margin = span.step / 2
            outside += int(np.count_nonzero((chunk > span.high + margin) | (chunk < span.low - margin)))
    return Fit(
        overflow,
        tiny / nonzero if nonzero else 0.0,
        flushed / nonzero if nonzero else 0.0,
        None if span is None else outside / array.size if array.size else 0.0,
    )


def is_float(array: NDArray[Any]) -> bool:
    """Whether an array holds floats; ml_dtypes' 16-bit types count."""
    return array.dtype.kind == "f" or array.dtype.name in {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


def _chunks(array: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK].astype(np.float64)
