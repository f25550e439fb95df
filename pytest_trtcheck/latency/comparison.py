"""Is today's latency significantly above what was once? Said with both distributions, or why it cannot be told.

Two runs of one engine, minutes or months apart, never have exactly the same distribution: the driver, the temperature
and the clocks differ a little, and a test for "the same distribution" (Mann-Whitney, Kolmogorov-Smirnov) would find
that with enough samples and call it significant. What matters is how much slower, so the ratio of the medians is
bounded, and a slowdown is one that surely exceeds the least slowdown worth a person's attention.

Of a net of microseconds a share is less than what tells two measurements of one engine apart, so a slowdown must exceed
that, too: what the timer resolves, and where the GPU may have waited for it, what the launch of a run takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import plural
from pytest_trtcheck.latency.verdict import QUANTILES, Decision

if TYPE_CHECKING:
    from pytest_trtcheck.latency.distribution import Distribution
    from pytest_trtcheck.record import Conditions, Verdict

BETWEEN_REPORTS = 0.05
"""The least slowdown between two reports that is worth a person's attention, by default: below it lies what differs
between two runs of the same engine."""

SURELY_BELOW = 2.0
"""Where it cannot be told whether the slowdown is above the least that fails, it passes if it looks to be below that,
and is surely below so many times that."""

TIMER_MS = 0.001
"""Two medians of one engine lie as far apart as this by the timer alone: CUDA's events have "a resolution of around 0.5
microseconds" (CUDA Driver API, cuEventElapsedTime), and each of the two is off by as much."""
LAUNCH_MS = 0.01
"""The most that the host takes to launch a run: medians of 2 to 10 µs were measured (docs/measured: `enqueue_p50_ms` in
h100/systems.json and h200/evidence.json). It is part of the time of a run that the GPU had to wait for. In one process
that is more than one run in a hundred, in the next one fewer, as the host is busy: two p99 of one engine lie so far
apart."""

OTHER_CLOCK = 0.1
"""SM clocks that differ by more than this are another GPU's, as it were: boost moves them by less under one load."""


@dataclass(frozen=True)
class Comparison:
    """Today against a baseline.

    Parameters
    ----------
    decision
        `fail`: surely slower by more than `min_slowdown`; `pass`: surely not; else undecided.
    ratio, lower, upper
        Today's quantile over the baseline's, with bounds; a bound is None where either side has none.
    min_slowdown
        What was asked for; where that is less than what tells two measurements of one engine apart, this.
    allowed
        That, in words.
    message
        Both distributions, in words.
    """

    decision: Decision
    ratio: float
    lower: float | None
    upper: float | None
    min_slowdown: float
    allowed: str
    message: str


def compare(
    now: Distribution,
    baseline: Distribution,
    *,
    name: str = "p50_ms",
    min_slowdown: float = BETWEEN_REPORTS,
    enqueue_bound: bool | None = False,
) -> Comparison:
    """Whether a quantile is significantly higher than in the baseline.

    The ratio of the two lies between now's lower bound over the baseline's upper one and the other way round. It must
    lie wholly above 1 + min_slowdown to fail and wholly within to pass.

    Parameters
    ----------
    enqueue_bound
        Whether the GPU waited for the host in one of the two, run by run.
    """
    today, before = now.quantile_ms(name), baseline.quantile_ms(name)
    floor_ms = LAUNCH_MS if enqueue_bound or name != "p50_ms" else TIMER_MS
    asked, min_slowdown = min_slowdown, max(min_slowdown, floor_ms / before if before else 0.0)
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
    ratio = today / before if before else math.inf
    between = f", between {lower - 1:+.1%} and {upper - 1:+.1%}" if lower is not None and upper is not None else ""
    allowed = f"{min_slowdown * 100:+.3g}%" if min_slowdown == asked else f"{floor_ms * 1000:+g} µs"
    message = (
        f"{name.removesuffix('_ms')} is {ratio - 1:+.1%} against the baseline{between} (allowed: {allowed}); "
        f"now {_words(now)}; baseline {_words(baseline)}"
    )
    return Comparison(decision, ratio, lower, upper, min_slowdown, allowed, message)


def decided(found: Comparison) -> Verdict:
    """`pass`, `fail` or `inconclusive`, by what the bounds say."""
    if found.decision != "undecided":
        return found.decision
    sure = found.upper is not None and found.upper <= 1 + SURELY_BELOW * found.min_slowdown
    return "pass" if sure and found.ratio <= 1 + found.min_slowdown else "inconclusive"


def other_clocks(then: Conditions, now: Conditions) -> list[str]:
    """How a GPU was set up otherwise, by the conditions of two measurements; what either lacks is not looked at."""
    found = []
    if _apart(then.sm_mhz, now.sm_mhz, OTHER_CLOCK):
        found.append(f"its SM clock was {then.sm_mhz:g} MHz, and is {now.sm_mhz:g} MHz now")
    if _apart(then.power_limit_w, now.power_limit_w, 0.01):
        found.append(f"its power limit was {then.power_limit_w:.0f} W, and is {now.power_limit_w:.0f} W now")
    if then.power_mode and now.power_mode and then.power_mode != now.power_mode:
        found.append(f"its nvpmodel mode was {then.power_mode}, and is {now.power_mode} now")
    return found


def _apart(then: float | None, now: float | None, share: float) -> bool:
    """Whether two numbers above 0 are both known, and further apart than a share of the smaller one."""
    known = [value for value in (then, now) if value is not None and value > 0]
    return len(known) == 2 and max(known) > (1 + share) * min(known)


def _words(distribution: Distribution) -> str:
    quantiles = ", ".join(f"{name.removesuffix('_ms')} {distribution.quantile_ms(name):.4g}" for name in QUANTILES)
    return f"{quantiles} ms ({plural(distribution.samples, 'sample')})"
