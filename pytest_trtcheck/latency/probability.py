"""Quantiles and sums of the two distributions that bounds rest on, for where there is no scipy.

It is not imported for them: `scipy.special` takes 150 ms of a processor to import and `scipy.stats` 570 ms, installed
they take 143 MB, and nothing else here needs them. `tests/test_latency.py` holds these functions against it.
"""

from __future__ import annotations

import math
from functools import lru_cache

from pytest_trtcheck.errors import ComparisonError

_MAX_STEPS = 100_000
_TINY = 1e-300


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k). Source: DLMF 8.17.5 (as a regularized incomplete beta function)."""
    if k < 0:
        return 0.0
    return 1.0 if k >= n else incomplete_beta(n - k, k + 1, 1 - p)


@lru_cache(maxsize=256)
def student_t_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t distribution, p from 0.5 to below 1, by bisection. Source: DLMF 8.17.22."""
    tail = 2 * (1 - p)

    def is_below(t: float) -> bool:
        return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t)) > tail

    low, high = 0.0, 1.0
    while is_below(high):
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b).

    By its continued fraction (DLMF 8.17.22), evaluated by Lentz's method as modified by Thompson and Barnett (Press et
    al., "Numerical Recipes", 3rd ed., section 6.4). For a, b up to 10⁶ the error is below 10⁻⁸.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _MAX_STEPS):
        before = fraction
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _nonzero(1 + factor * d)
            c = _nonzero(1 + factor / c)
            fraction *= c * d
        if abs(fraction - before) <= 1e-15 * abs(fraction):
            return min(1.0, math.exp(log_front) * fraction / a)
    raise ComparisonError(
        f"the incomplete beta function did not converge at a={a}, b={b}, x={x}",
        "please report it, with this line",
        code="timer-broken",
    )


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
