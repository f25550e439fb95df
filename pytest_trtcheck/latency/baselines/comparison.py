"""A latency distribution small enough to review in a repository, and whether today's is significantly slower.

Two runs of one engine, minutes or months apart, never have exactly the same distribution: the driver, the temperature
and the clocks differ a little, and a test for "the same distribution" (Mann-Whitney, Kolmogorov-Smirnov) would find
that with enough samples and call it significant. What matters is how much slower, so the ratio of the medians is
bounded, and a slowdown is one that surely exceeds the least slowdown worth a person's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.latency.stats import CONFIDENCE, as_samples, quantile_bounds
from pytest_trtcheck.latency.verdict import QUANTILES, Decision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_trtcheck.latency.stats import Samples

MIN_SLOWDOWN = 0.05
"""The least slowdown worth failing for, by default: below it lies what differs between two runs of the same engine."""

_SHAPE = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_DIGITS = 6


@dataclass(frozen=True)
class Distribution:
    """Latency samples, condensed.

    Parameters
    ----------
    samples
        How many there were.
    confidence
        Of `bounds_ms`.
    quantiles_ms
        Pairs of a quantile (0 to 1) and its value, ascending: the distribution's shape.
    bounds_ms
        By name ("p50_ms", …): lower and upper confidence bound, where there were enough samples for both.
    """

    samples: int
    confidence: float
    quantiles_ms: tuple[tuple[float, float], ...]
    bounds_ms: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, samples_ms: Samples, confidence: float = CONFIDENCE) -> Distribution:
        """Condense samples. Bounds are at a confidence that lets two distributions be compared at `confidence`."""
        values = as_samples(samples_ms)
        # Bonferroni: the ratio of two quantiles is within the ratios of their bounds when both bounds hold.
        each = 1 - (1 - confidence) / 2
        bounds = {}
        for name, q in QUANTILES.items():
            found = quantile_bounds(values, q, each)
            if found.lower is not None and found.upper is not None:
                bounds[name] = (_rounded(found.lower), _rounded(found.upper))
        shape = tuple((q, _rounded(float(value))) for q, value in zip(_SHAPE, np.quantile(values, _SHAPE), strict=True))
        return cls(values.size, confidence, shape, bounds)

    def quantile_ms(self, name: str) -> float:
        """The estimate of a quantile of `QUANTILES`, between the stored ones by linear interpolation."""
        places, values = zip(*self.quantiles_ms, strict=True)
        return float(np.interp(QUANTILES[name], places, values))

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, in a stable order."""
        return {
            "samples": self.samples,
            "confidence": self.confidence,
            "quantiles_ms": {f"{q:g}": value for q, value in self.quantiles_ms},
            "bounds_ms": {name: list(bounds) for name, bounds in self.bounds_ms.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Distribution:
        """From what `to_json` gave.

        Raises
        ------
        ReportError
            When it is something else, or a hand edited it into what no distribution is.
        """
        try:
            quantiles = tuple((float(q), float(value)) for q, value in data["quantiles_ms"].items())
            bounds = {str(name): (float(low), float(high)) for name, (low, high) in data["bounds_ms"].items()}
            found = cls(int(data["samples"]), float(data["confidence"]), quantiles, bounds)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(
                f"a baseline's latency distribution cannot be read: {error!r}", "record it again: --trt-update-baseline"
            ) from None
        places, values = [q for q, _ in quantiles], [value for _, value in quantiles]
        numbers = np.array([*places, *values, *(edge for pair in bounds.values() for edge in pair), found.confidence])
        sound = bool(places) and bool(np.isfinite(numbers).all()) and bool((numbers >= 0).all())
        ascending = places == sorted(set(places)) and values == sorted(values)
        if not (sound and ascending and all(low <= high for low, high in bounds.values()) and 0 < found.confidence < 1):
            raise ReportError(
                "a baseline's latency distribution is no distribution: quantiles must ascend and bounds enclose",
                "record it again: --trt-update-baseline",
            )
        return found


@dataclass(frozen=True)
class Comparison:
    """Today against a baseline.

    Parameters
    ----------
    decision
        `fail`: surely slower by more than `min_slowdown`; `pass`: surely not; else undecided.
    ratio, lower, upper
        Today's quantile over the baseline's, with bounds; a bound is None where either side has none.
    message
        Both distributions, in words.
    """

    name: str
    decision: Decision
    ratio: float
    lower: float | None
    upper: float | None
    min_slowdown: float
    message: str


def compare(
    now: Distribution, baseline: Distribution, *, name: str = "p50_ms", min_slowdown: float = MIN_SLOWDOWN
) -> Comparison:
    """Whether a quantile is significantly higher than in the baseline.

    The ratio of the two lies between now's lower bound over the baseline's upper one and the other way round. It must
    lie wholly above 1 + min_slowdown to fail and wholly within to pass.
    """
    today, before = now.quantile_ms(name), baseline.quantile_ms(name)
    lower = upper = None
    if name in now.bounds_ms and name in baseline.bounds_ms:
        (now_low, now_high), (then_low, then_high) = now.bounds_ms[name], baseline.bounds_ms[name]
        lower = now_low / then_high if then_high else None
        upper = now_high / then_low if then_low else None
    limit = 1 + min_slowdown
    decision: Decision = "undecided"
    if lower is not None and lower > limit:
        decision = "fail"
    elif upper is not None and upper <= limit:
        decision = "pass"
    ratio = today / before if before else float("inf")
    between = f", between {lower - 1:+.1%} and {upper - 1:+.1%}" if lower is not None and upper is not None else ""
    message = (
        f"{name.removesuffix('_ms')} is {ratio - 1:+.1%} against the baseline{between} (allowed: {min_slowdown:+.1%}); "
        f"now {_words(now)}; baseline {_words(baseline)}"
    )
    return Comparison(name, decision, ratio, lower, upper, min_slowdown, message)


def _words(distribution: Distribution) -> str:
    quantiles = ", ".join(f"{name.removesuffix('_ms')} {distribution.quantile_ms(name):.4g}" for name in QUANTILES)
    return f"{quantiles} ms ({distribution.samples} samples)"


def _rounded(value: float) -> float:
    """Six significant digits: below any timer's resolution, and short enough to be read in a diff."""
    return float(f"{value:.{_DIGITS}g}")
