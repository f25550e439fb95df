"""A latency distribution small enough to review in a repository."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.errors import MISREAD, ReportError
from pytest_trtcheck.latency.stats import CONFIDENCE, Series, quantile_bounds
from pytest_trtcheck.latency.verdict import QUANTILES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_trtcheck.latency.stats import Samples

RECORD_AGAIN = "record it again: --trt-update-baseline"
"""What to do about a baseline that cannot be used."""
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
        series = Series.of(samples_ms)
        # Bonferroni: the ratio of two quantiles is within the ratios of their bounds when both bounds hold.
        each = 1 - (1 - confidence) / 2
        bounds = {}
        for name, q in QUANTILES.items():
            found = quantile_bounds(series, q, each)
            if found.lower is not None and found.upper is not None:
                bounds[name] = (_rounded(found.lower), _rounded(found.upper))
        shape = np.quantile(series.ordered, _SHAPE)
        pairs = tuple((q, _rounded(float(value))) for q, value in zip(_SHAPE, shape, strict=True))
        return cls(series.values.size, confidence, pairs, bounds)

    def quantile_ms(self, name: str) -> float:
        """The estimate of a quantile of `QUANTILES`, between the stored ones by linear interpolation."""
        places, values = zip(*self.quantiles_ms, strict=True)
        return float(np.interp(QUANTILES[name], places, values))

    @property
    def width(self) -> float:
        """How far the median's bounds lie apart, relative to it; infinite where it has none."""
        low, high = self.bounds_ms.get("p50_ms", (0.0, math.inf))
        return (high - low) / (self.quantile_ms("p50_ms") or 1.0)

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
        except MISREAD as error:
            raise ReportError(
                f"a baseline's latency distribution cannot be read: {error!r}", RECORD_AGAIN, code="baseline-file"
            ) from None
        places, values = [q for q, _ in quantiles], [value for _, value in quantiles]
        numbers = np.array([*places, *values, *(edge for pair in bounds.values() for edge in pair), found.confidence])
        sound = bool(places) and bool(np.isfinite(numbers).all()) and bool((numbers >= 0).all())
        ascending = places == sorted(set(places)) and values == sorted(values)
        if not (sound and ascending and all(low <= high for low, high in bounds.values()) and 0 < found.confidence < 1):
            raise ReportError(
                "a baseline's latency distribution is no distribution: quantiles must ascend and bounds enclose",
                RECORD_AGAIN,
                code="baseline-file",
            )
        return found


def _rounded(value: float) -> float:
    """Six significant digits: below any timer's resolution, and short enough to be read in a diff."""
    return float(f"{value:.{_DIGITS}g}")
