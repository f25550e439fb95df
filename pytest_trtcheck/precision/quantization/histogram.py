"""Histograms of magnitudes, filled chunk by chunk, and the clipping thresholds that calibration reads off them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.choices import QuantizedName

BINS = 1 << 16
ENTROPY_BINS = 2048
ENTROPY_LEVELS = 128
_CHUNK = 1 << 20
_EMPTY = 1e-4


def levels(dtype: QuantizedName) -> NDArray[np.float64]:
    """The magnitudes that INT8 or FP8 (E4M3FN) holds, from 0 up, as shares of the largest that a range makes use of."""
    if dtype == "int8":
        return np.arange(128) / 127
    bits = np.arange(127, dtype=np.uint8)
    return np.asarray(bits.view(ml_dtypes.float8_e4m3fn), np.float64) / 448


class MagnitudeHistogram:
    """Counts of |x| in `bins` equal bins over [0, amax]; what lies above `amax` is counted in the last bin.

    Parameters
    ----------
    amax
        The upper end, above 0.
    bins
        How many bins.
    """

    def __init__(self, amax: float, bins: int = BINS) -> None:
        self.amax = amax
        self.counts = np.zeros(bins, np.int64)

    def add(self, array: NDArray[Any]) -> None:
        """Count the elements of `array`: finite floats, any shape. Takes a few MiB beyond the array itself."""
        flat, last = array.reshape(-1), len(self.counts) - 1
        # In FP64, so that the scaling itself moves nothing across a bin's edge.
        per_unit = len(self.counts) / self.amax
        for start in range(0, flat.size, _CHUNK):
            magnitude = np.abs(flat[start : start + _CHUNK], dtype=np.float64)
            np.minimum(np.multiply(magnitude, per_unit, out=magnitude), last, out=magnitude)
            self.counts += np.bincount(magnitude.astype(np.intp), minlength=last + 1)

    def __add__(self, other: MagnitudeHistogram) -> MagnitudeHistogram:
        """Both together; their bins are the same ones."""
        total = MagnitudeHistogram(self.amax, 0)
        total.counts = self.counts + other.counts
        return total

    def edge(self, index: int) -> float:
        """The upper edge of bin `index` − 1, that is, the threshold that keeps the first `index` bins."""
        return self.amax * index / len(self.counts)

    def share_beyond(self, index: int) -> float:
        """The share (0 to 1) of the elements that lie outside the first `index` bins."""
        total = int(self.counts.sum())
        return int(self.counts[index:].sum()) / total if total else 0.0


def percentile_bins(histogram: MagnitudeHistogram, percentile: float) -> int:
    """The fewest bins that hold at least `percentile` % of the elements."""
    cumulated = np.cumsum(histogram.counts)
    wanted = float(cumulated[-1]) * percentile / 100
    return min(int(np.searchsorted(cumulated, wanted, side="left")) + 1, len(cumulated))


def mse_bins(histogram: MagnitudeHistogram, grid: NDArray[np.float64]) -> int:
    """How many bins to keep so that quantizing the elements has the least squared error, rounding and saturation both.

    The number kept goes down from all of them in steps of 2^(1/16), to as many as there are levels: below that, the
    bins are too wide to tell.

    Parameters
    ----------
    grid
        The magnitudes that the type holds, from 0 up to 1, which stands for the threshold.
    """
    last, counts = len(histogram.counts), histogram.counts.astype(np.float64)
    centres = np.arange(last) + 0.5
    # What the bins before each one come to: counts, sums, sums of squares.
    none, first, second = (np.concatenate([[0.0], np.cumsum(counts * centres**power)]) for power in range(3))
    steps = int(16 * np.log2(max(last / len(grid), 1)))
    kept = np.ceil(last * 2.0 ** (-np.arange(steps + 1) / 16)).astype(np.intp)
    levels = kept[:, None] * grid
    between = (levels[:, 1:] + levels[:, :-1]) / 2
    edges = np.pad(np.ceil(between - 0.5).astype(np.intp), ((0, 0), (1, 1)), constant_values=((0, 0), (0, last)))
    inside = [np.diff(moment[edges], axis=1) for moment in (none, first, second)]
    errors = (inside[2] - 2 * levels * inside[1] + levels**2 * inside[0]).sum(1)
    return int(kept[errors.argmin()])


def entropy_bins(histogram: MagnitudeHistogram, levels: int = ENTROPY_LEVELS) -> int:
    """How many bins to keep so that `levels` quantization levels lose the least information.

    Bins are merged to `ENTROPY_BINS` where there is a multiple of that.

    For every candidate i from `levels` bins up, P is the first i bins with everything beyond put into the last of them
    (saturation), Q the same bins merged into `levels` levels, each level spread evenly over those of its bins that are
    not empty; the i with the least Kullback-Leibler divergence D(P‖Q) is taken, the larger one when two tie.

    Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017. From NVIDIA's pytorch-quantization it has that the
    first bin, overfull with the zeros of ReLU, is counted like the second; from ONNX Runtime's calibrator that a bin
    that is empty in Q counts as 1e-4 elements: else one far outlier, with nothing near it, would always be kept.
    """
    merged = max(1, len(histogram.counts) // ENTROPY_BINS)
    counts = histogram.counts.reshape(-1, merged).sum(1).astype(np.float64)
    counts[0] = counts[1]
    best, least = len(counts), np.inf
    beyond = counts.sum() - np.cumsum(counts)
    for size in range(levels, len(counts) + 1):
        divergence = _divergence(counts[:size], float(beyond[size - 1]), levels)
        if divergence <= least:
            best, least = size, divergence
    return best * merged


def _divergence(kept: NDArray[np.float64], outliers: float, levels: int) -> float:
    """D(P‖Q) in nats."""
    size = len(kept)
    starts = -(-np.arange(levels) * size // levels)
    filled = kept > 0
    merged = np.add.reduceat(kept, starts)
    occupied = np.add.reduceat(filled, starts, dtype=np.float64)
    even = np.divide(merged, occupied, out=np.zeros(levels), where=occupied > 0)
    p, q = kept.copy(), np.repeat(even, np.diff(starts, append=size)) * filled
    if outliers > 0:
        p[-1] += outliers
        q[-1] = max(q[-1], _EMPTY)
    used = p > 0
    p, q = p[used], q[used]
    total_p, total_q = p.sum(), q.sum()
    return float((p * np.log(p / q)).sum() / total_p + np.log(total_q / total_p)) if total_p else float(np.inf)
