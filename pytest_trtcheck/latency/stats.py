"""Distribution-free statistics of latency samples: exact bounds of quantiles, also where samples are not independent.

Latencies are not normal (they have tails), are often equal (timers are coarse) and depend on their predecessors
(clocks drift). So bounds come from order statistics, which assume nothing about the distribution and stay valid with
ties, and the number of samples is replaced by the number of independent ones that tell as much.

What was not measured is bounded as well: how far clocks that are still settling may yet move the whole distribution
(`settling`), and what stalls that are too rare to have been seen would cost (`unseen_stalls`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pytest_trtcheck.errors import ComparisonError
from pytest_trtcheck.latency.probability import binomial_cdf, student_t_quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Samples: TypeAlias = "Sequence[float] | NDArray[np.floating] | Series"

CONFIDENCE = 0.99
"""The default confidence of two-sided bounds: each side is wrong at most once in 200."""

LONG_ENOUGH = 20
"""How many times its autocorrelation time a series must last for that time to be known. Sokal ("Monte Carlo Methods in
Statistical Mechanics", 1997, section 3) asks for a multiple of the order of 10 to 1,000; 20 keeps wrong decisions about
simulated drifts rare."""
DRIFT_REACH = 2.0
"""How far a drift may go on beyond either end of what was seen, as a multiple of what was seen."""

SETTLING_S = 20.0
"""The longest time constant with which clocks, heated by the load, are taken to settle. What they move at a time t from
now on is then at most `SETTLING_S` times the rate at which they move now."""
CLOCK_STEP = 0.005
"""Clocks move in steps (15 MHz of 1,590 is 0.9 %), between which nothing is to be seen: half of one may go unseen over
any stretch as long as the measurement."""
UNSEEN_SHIFT = 0.25
"""The most that a distribution that seems to stand still is taken to move later on: a budget further away than this
need not wait for the clocks."""
STALL_S = 0.15
"""A stall as hosts and drivers have them, to reckon with before one was seen."""
UNSEEN_STALLS = 5.3
"""So many events are expected of what is seen not once with a probability of 0.5 %: -ln 0.005 (Poisson)."""

_BLOCKS = 20
_LONG = 1 << 16
"""Samples from which an autocorrelation is worked out from groups of them."""


@dataclass(frozen=True)
class Bounds:
    """An estimate with bounds. A side is None where there are too few (independent) samples to bound it.

    Parameters
    ----------
    effective
        How many independent samples would tell as much as those that were taken.
    drifts
        Whether the samples drifted so slowly that this is not known; the bounds are then widened by what the drift may
        do next, which is a rule of caution and no matter of confidence.
    """

    value: float
    lower: float | None
    upper: float | None
    samples: int = 1
    effective: int = 1
    drifts: bool = False


@dataclass(frozen=True)
class Settling:
    """What of a series to judge, and how far its level may yet move.

    Parameters
    ----------
    judged
        The samples from which on the level moves least, those that moved as they would have been at the end.
    lower, upper
        The settled level, as bounds of its ratio to theirs.
    percent_per_s
        How fast the level moves; None where it stands still, as far as can be told.
    """

    judged: NDArray[np.float64]
    lower: float
    upper: float
    percent_per_s: float | None = None

    def of(self, found: Bounds) -> Bounds:
        """Bounds of a quantile or mean of `judged`, as bounds of what it settles at."""
        return replace(
            found,
            lower=None if found.lower is None else found.lower * self.lower,
            upper=None if found.upper is None else found.upper * self.upper,
        )


class Series:
    """Samples, in the order in which they were taken, and what takes long to know of them, worked out once.

    Raises
    ------
    ComparisonError
        When there are none, or any is NaN, infinite or negative: a broken timer is no measurement.
    """

    def __init__(self, samples: Sequence[float] | NDArray[np.floating]) -> None:
        self.values = np.asarray(samples, dtype=np.float64)
        self._times: dict[float, float] = {}
        if self.values.ndim != 1 or not self.values.size:
            raise ComparisonError("no latency samples", "the engine was not timed at all", code="timer-broken")
        bad = ~(np.isfinite(self.values) & (self.values >= 0))
        if bad.any():
            where = int(np.argmax(bad))
            raise ComparisonError(
                f"latency sample {where} of {self.values.size} is {self.values[where]}",
                "a time is a finite number from 0 on",
                code="timer-broken",
            )

    @classmethod
    def of(cls, samples: Samples) -> Series:
        """`samples` as a series; a series is itself."""
        return samples if isinstance(samples, Series) else cls(samples)

    @cached_property
    def ordered(self) -> NDArray[np.float64]:
        """The samples in ascending order."""
        return np.sort(self.values)

    def time(self, q: float) -> float:
        """The autocorrelation time of being at most the q-quantile."""
        if q not in self._times:
            # With ties at the quantile (a coarse timer), either indicator alone may be constant and hide a drift.
            at = np.quantile(self.ordered, q, method="inverted_cdf")
            indicators = self.values <= at, self.values < at
            self._times[q] = max(map(autocorrelation_time, indicators))
        return self._times[q]


def as_samples(samples: Samples) -> NDArray[np.float64]:
    """Samples as a float64 vector of shape (n,), checked as a `Series` is."""
    return Series.of(samples).values


def quantile_bounds(samples: Samples, q: float, confidence: float = CONFIDENCE) -> Bounds:
    """A quantile with its two-sided confidence bounds.

    The bounds are order statistics: the r-th smallest of n independent samples is at most the q-quantile with
    probability P(Bin(n, q) >= r), whatever the distribution. Source: David and Nagaraja, "Order Statistics" (3rd ed.),
    section 7.1; Conover, "Practical Nonparametric Statistics" (3rd ed.), section 3.2. With dependent samples, n is the
    effective size for this quantile, and the ranks are scaled up. Source: Vehtari, Gelman, Simpson, Carpenter and
    Bürkner, "Rank-Normalization, Folding, and Localization", Bayesian Analysis 16(2), 2021, section 4.3.

    The effective size is n / τ, with τ the autocorrelation time of the indicator "at most the q-quantile", or of the
    median's where that is longer: a drift moves the whole distribution, but few samples are far enough out to show it
    in a tail. A series shorter than `LONG_ENOUGH` times τ cannot tell τ itself: it drifts, and its bounds are widened
    (`DRIFT_REACH`).

    Parameters
    ----------
    samples
        In the order in which they were taken; any unit.
    q
        Between 0 and 1.
    """
    series = Series.of(samples)
    values, n = series.values, series.values.size
    here, median = series.time(q), series.time(0.5)
    tau = max(here, median)
    # Where the location alone drifts: what is known of the tail, moved as far as the median may yet move.
    drifts, drifts_here = (not _is_long_enough(n, each) for each in (tau, here))
    lower = upper = None
    if not drifts_here:
        lower, upper = _order_statistics(series, q, math.floor(n / (here if drifts else tau)), confidence)
    medians = block_quantiles(values, q if drifts_here else 0.5) if drifts else None
    if medians is not None:
        moved = DRIFT_REACH * float(np.ptp(medians))
        if drifts_here:
            lower, upper = float(medians.min()), float(medians.max())
        lower = None if lower is None else max(0.0, lower - moved)
        upper = None if upper is None else upper + moved
    value, effective = float(np.quantile(series.ordered, q)), max(1, math.floor(n / tau))
    return Bounds(value, lower, upper, n, effective, drifts)


def settling(samples: Samples, elapsed_s: float | None = None, confidence: float = CONFIDENCE) -> Settling:
    """How far the level of a series may yet move, seen from its end.

    A GPU that warms up lowers its clocks for many seconds, and one that was idle raises them. A level that approaches
    its final value exponentially, with a time constant of at most `SETTLING_S`, moves by at most `SETTLING_S` times its
    present rate. The rate is bounded by linear regression over the medians of consecutive blocks (Draper and Smith,
    "Applied Regression Analysis", 3rd ed., section 1.4), with residuals that depend on each other counted for fewer.
    The whole series, its second half and its last quarter are looked at, and the one that can move least is judged:
    what was warm-up is left out. Where even that moves significantly, its samples are divided by the regression line.

    Parameters
    ----------
    samples
        In the order in which they were taken, in ms.
    elapsed_s
        Over how long they were taken, evenly; None: they followed each other without a gap.
    confidence
        Of each side's rate.
    """
    values = as_samples(samples)
    elapsed_s = float(values.sum()) / 1000 if elapsed_s is None else elapsed_s
    parts = [values, *(values[-size:] for share in (2, 4) if (size := values.size // share) >= 2 * _BLOCKS)]
    candidates = [_settling(part, elapsed_s * part.size / values.size, confidence) for part in parts]
    return min(candidates, key=lambda one: one.upper - one.lower)


def _settling(values: NDArray[np.float64], span_s: float, confidence: float) -> Settling:
    change, error = _change(values, confidence)
    moves = abs(change) > error
    # In lengths of the series: from its end on, and from its middle, where its level is known.
    ahead = SETTLING_S / max(span_s, 1e-9)
    unsure = (error + CLOCK_STEP) * (ahead + 0.5)
    if not moves:
        most = min(unsure + abs(change) * (ahead + 0.5), UNSEEN_SHIFT)
        return Settling(values, 1 - most, 1 + most)
    if abs(change) >= 2:  # the line is below zero at one end: nothing goes on, or began, like that
        return Settling(values, 0.0, math.inf, 100 * change / span_s)
    line = 1 + change * ((np.arange(values.size) + 0.5) / values.size - 0.5)
    known = values / line * (1 + change / 2)
    lower, upper = (1 + min(0.0, change) * ahead - unsure, 1 + max(0.0, change) * ahead + unsure)
    return Settling(known, max(0.0, lower), upper, 100 * change / span_s)


def _change(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """By what share of its level a series changes from its start to its end, and how far that may be wrong."""
    blocks = min(_BLOCKS, values.size // 2)
    if blocks < 5:
        return 0.0, math.inf
    size = values.size // blocks
    medians = np.median(values[values.size - size * blocks :].reshape(blocks, size), axis=1)
    level = float(np.median(medians))
    if not level:
        return 0.0, 0.0 if not medians.any() else math.inf
    place = (np.arange(blocks) + 0.5) / blocks - 0.5
    leverage = float(place @ place)
    change = float(place @ medians) / leverage
    residuals = medians - medians.mean() - change * place
    tau = autocorrelation_time(residuals)
    spread = math.sqrt(float(residuals @ residuals) / (blocks - 2) * tau / leverage)
    degrees = max(2, math.floor((blocks - 2) / tau))
    return change / level, student_t_quantile((1 + confidence) / 2, degrees) * spread / level


def unseen_stalls(intervals_ms: Samples) -> float:
    """What share of the time stalls may take that are too rare to show, or to be counted, in so short a time.

    As many as go unseen once in 200 times (`UNSEEN_STALLS`), each as long as the longest that was seen or, before one
    was seen, as `STALL_S`.
    """
    values = as_samples(intervals_ms)
    longest_ms = max(1000 * STALL_S, float(values.max() - np.median(values)))
    return UNSEEN_STALLS * longest_ms / float(values.sum())


def block_quantiles(samples: Samples, q: float, blocks: int = 10) -> NDArray[np.float64] | None:
    """The q-quantile of each of `blocks` consecutive blocks; None where a block has too few samples to know it."""
    values = as_samples(samples)
    size = values.size // blocks
    if size * min(q, 1 - q) < 2:
        return None
    return np.asarray(np.quantile(values[values.size - size * blocks :].reshape(blocks, size), q, axis=1))


def _order_statistics(series: Series, q: float, effective: int, confidence: float) -> tuple[float | None, float | None]:
    """The bounds' order statistics, for samples that tell as much as `effective` independent ones."""
    n, ordered = series.ordered.size, series.ordered
    lower, upper = rank_bounds(effective, q, confidence)
    # Rank r of m stands for the ranks from (r-1)·n/m to r·n/m of n: the outer one is taken, to err on the wide side.
    return (
        None if lower is None else float(ordered[math.floor((lower - 1) * n / effective)]),
        None if upper is None else float(ordered[min(n, math.ceil(upper * n / effective)) - 1]),
    )


def _is_long_enough(n: int, tau: float) -> bool:
    # Below 2, a short independent series is told from chance no better than this.
    return tau < 2 or n >= LONG_ENOUGH * tau


def rank_bounds(n: int, q: float, confidence: float = CONFIDENCE) -> tuple[int | None, int | None]:
    """The ranks (from 1) of the order statistics that bound the q-quantile of n independent samples.

    Each side is exceeded with a probability of at most (1 - confidence) / 2. None where no rank will do.
    """
    alpha = (1 - confidence) / 2
    lower, from_above = _lower_rank(n, q, alpha), _lower_rank(n, 1 - q, alpha)
    return lower or None, n + 1 - from_above if from_above else None


def _lower_rank(n: int, q: float, alpha: float) -> int:
    """The largest r with P(Bin(n, q) < r) <= alpha; 0 where there is none."""
    return bisect_right(range(n), alpha, key=lambda k: binomial_cdf(k, n, q))


@lru_cache(maxsize=256)
def min_samples(q: float, confidence: float = CONFIDENCE) -> int:
    """The least number of independent samples with which a quantile can be bounded on both sides.

    Above: all n samples lie below the quantile with probability q^n, which must not exceed (1 - confidence) / 2.
    """
    tail = max(q, 1 - q)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(tail))


def autocorrelation_time(series: NDArray[np.bool_] | NDArray[np.float64]) -> float:
    """The integrated autocorrelation time τ = 1 + 2 Σ ρ(k) of a series, at least 1; 1 for a constant series.

    Summed over pairs of lags while they are positive, made monotone. Source: Geyer, "Practical Markov Chain Monte
    Carlo", Statistical Science 7(4), 1992, section 3.3 (initial monotone sequence estimator). Of a long series the
    means of equal groups are taken: the mean of all has one variance, whichever way it is summed.
    """
    values = np.asarray(series, dtype=np.float64)
    group = max(1, values.size // _LONG)
    centered = values[values.size % group :].reshape(-1, group).mean(axis=1) if group > 1 else values
    n = centered.size
    centered = centered - centered.mean()
    if n < 4 or not np.any(centered):
        return 1.0
    shrunk = group * float(centered.var()) / float(values.var()) if group > 1 else 1.0
    spectrum = np.fft.rfft(centered, 1 << (2 * n - 1).bit_length())
    covariance = np.fft.irfft(spectrum * spectrum.conj())[:n]
    rho = covariance / covariance[0]
    pairs = rho[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: negative[0]] if negative.size else pairs)
    return float(max(1.0, shrunk * max(1.0, 2 * pairs.sum() - 1)))


def batch_mean_bounds(samples: Samples, confidence: float = CONFIDENCE, batches: int = 20) -> Bounds:
    """The mean of a dependent series with bounds, from the means of consecutive batches.

    Batches much longer than the dependence have nearly independent, nearly normal means. Source: Schmeiser, "Batch
    Size Effects in the Analysis of Simulation Output", Operations Research 30(3), 1982 (10 to 30 batches are enough).
    Without at least two samples per batch there are no bounds.
    """
    values = as_samples(samples)
    size = values.size // batches
    if size < 2:
        return Bounds(float(values.mean()), None, None, values.size, values.size)
    # The first ones, too few for a batch, are left out of the mean as well: one of them may be a stall.
    means = values[values.size - size * batches :].reshape(batches, size).mean(axis=1)
    mean = float(means.mean())
    # Batches that still depend on each other count for fewer.
    effective = max(2, math.floor(batches / autocorrelation_time(means)))
    spread = float(means.std(ddof=1)) / math.sqrt(effective)
    half = student_t_quantile((1 + confidence) / 2, effective - 1) * spread
    return Bounds(mean, mean - half, mean + half, values.size, effective)
