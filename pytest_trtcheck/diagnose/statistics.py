"""What two versions of a tensor differ by, and how a tensor fits the type or range that it is held in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 1 << 16
"""Elements, so that a chunk and what is made of it stay in the processor's cache."""


@dataclass(frozen=True)
class Difference:
    """A tensor against its reference, with d the difference and r the reference, both finite.

    Parameters
    ----------
    size
        Elements.
    peak, largest
        max|r| and max|d|.
    dd, rr
        Σd² and Σr².
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
    dd = rr = largest = peak = 0.0
    nonfinite = 0
    for start in range(0, reference.size, _CHUNK):
        a, r = (each.reshape(-1)[start : start + _CHUNK].astype(np.float64) for each in (actual, reference))
        finite = np.isfinite(a) & np.isfinite(r)
        same = (a == r) | (np.isnan(a) & np.isnan(r))
        nonfinite += int(np.count_nonzero(~finite & ~same))
        # The peak is the reference's own: an element that became infinite must not hide how large it was.
        peak = max(peak, float(np.abs(r[np.isfinite(r)]).max(initial=0.0)))
        d, r = a[finite] - r[finite], r[finite]
        # Not by BLAS: for a chunk, waking its threads takes longer than the sum.
        dd, rr = dd + float(np.einsum("i,i->", d, d)), rr + float(np.einsum("i,i->", r, r))
        largest = max(largest, float(np.abs(d).max(initial=0.0)))
    return Difference(reference.size, peak, largest, dd, rr, nonfinite)


@dataclass(frozen=True)
class FloatType:
    """What a 16-bit type holds: its largest finite value, its smallest normal one and the smallest above 0."""

    name: str
    largest: float
    smallest_normal: float
    smallest: float
    roundoff: float

    @property
    def beyond(self) -> float:
        """The smallest magnitude that becomes infinite: half a step beyond the largest value still rounds to it."""
        return self.largest * (1 + self.roundoff / 2)

    def overflow(self, peak: float, count: str) -> str:
        """That it happens, in words."""
        return f"max|x| {peak:,.6g} is beyond {self.name}'s largest value, {self.largest:,.6g} ({count})"


FP16 = FloatType("FP16", 65504.0, 2.0**-14, 2.0**-24, 2.0**-11)
BF16 = FloatType("BF16", 3.3895313892515355e38, 2.0**-126, 2.0**-133, 2.0**-8)


@dataclass(frozen=True)
class Span:
    """The values that a quantizer represents, in steps of its scale; what lies outside saturates."""

    low: float
    high: float
    step: float
    roundoff: float = 0.0
    """Of a float type: half a step relative to a value; 0 where all steps are alike."""

    def noise(self, size: int, squares: float) -> float:
        """What rounding loses, as a sum of squared errors, of `size` values whose squares sum up to `squares`.

        An error that is as likely anywhere within half a step either way has a variance of step²/12.
        """
        return squares * self.roundoff**2 / 3 if self.roundoff else size * self.step**2 / 12

    @property
    def rounded_within(self) -> tuple[float, float]:
        """The least and the largest value that do not saturate: half a step beyond the last one still rounds to it."""
        return self.low - self.step / 2, self.high + self.step / 2

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
        Finite elements beyond the largest value of the type; of large tensors estimated, until they are taken apart.
    underflow
        The share (0 to 1) of the elements other than 0 that lie below the smallest normal value of the type, or that a
        quantizer rounds to 0; of large tensors estimated.
    flushed
        The share of those that become 0, likewise.
    saturated
        The share of all elements that lie outside the quantizer's range; None without one.
    clipped
        What is lost by that, as a multiple of what rounding to the quantizer's steps loses in the tensor (both L2).
    """

    overflow: int = 0
    underflow: float = 0.0
    flushed: float = 0.0
    saturated: float | None = None
    clipped: float = 0.0


def is_float(array: NDArray[Any]) -> bool:
    """Whether an array holds floats; ml_dtypes' 16-bit types count."""
    return array.dtype.kind == "f" or array.dtype.name in {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
