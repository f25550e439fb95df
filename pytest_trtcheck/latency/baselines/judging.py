"""Is today's latency significantly above what was recorded? Said with both distributions, or why it cannot be told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.latency.baselines.comparison import Comparison, Distribution, compare
from pytest_trtcheck.latency.stats import SETTLING_S, settling
from pytest_trtcheck.record import SEVERITY, LatencyRecord, Verdict, combine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.latency.baselines.files import Baseline
    from pytest_trtcheck.latency.stats import Samples

NAME = "baseline"
"""The name of its entry among a record's budgets."""

MIN_SLOWDOWN = 0.03
"""A slowdown of the median that is surely above this fails: a loss of 5 % is to be seen in spite of the uncertainty of
both runs, and runs of one engine on a card that is left alone differ by less (docs/baselines.md)."""
SURELY_BELOW = 0.06
"""Where it cannot be told whether the slowdown is above `MIN_SLOWDOWN`, it passes if it looks to be below that, and is
surely below this."""

OTHER_CLOCK = 0.1
"""SM clocks that differ by more than this are another GPU's, as it were: boost moves them by less under one load."""

TIGHT = 0.01
"""While a baseline is recorded, samples are taken until the median's bounds are so close to each other."""

_AGAIN = "record it again: --trt-update-baseline"


def enough(samples_ms: Samples, confidence: float, baseline: Baseline | None) -> bool:
    """Whether the samples decide about a baseline, or without one are good enough to be one.

    They are neither while clocks settle: the baseline of a cold GPU would fail every warm one.

    Parameters
    ----------
    samples_ms
        In the order in which they were taken.
    confidence
        To decide with: of this look, when looking repeatedly.
    """
    moves = settling(samples_ms, confidence=confidence).percent_per_s
    if moves is not None and abs(moves) / 100 * SETTLING_S > TIGHT:
        return False
    now = Distribution.of(samples_ms, confidence)
    if baseline is None:
        return width(now) <= TIGHT
    return compare(now, baseline.distribution, min_slowdown=MIN_SLOWDOWN).decision != "undecided"


def width(distribution: Distribution) -> float:
    """How far the median's bounds lie apart, relative to it; infinite where it has none."""
    if "p50_ms" not in distribution.bounds_ms:
        return float("inf")
    low, high = distribution.bounds_ms["p50_ms"]
    return (high - low) / (distribution.quantile_ms("p50_ms") or 1.0)


def differences(baseline: Baseline, details: Mapping[str, Any], model_sha256: str | None) -> list[str]:
    """Why what is measured now cannot be compared with the baseline.

    Parameters
    ----------
    details
        Of the latency record. What it does not hold yet (`cuda_graph` and clocks, before the measurement) is not
        looked at.
    """
    now = details.get("conditions") or {}
    found = []
    if model_sha256 is not None and baseline.model_sha256 != model_sha256:
        found.append(f"it was recorded for another model (sha256 {str(baseline.model_sha256)[:8]}…)")
    shapes = now.get("input_shapes")
    recorded = {name: list(shape) for name, shape in baseline.input_shapes.items()}
    if shapes is not None and {name: list(shape) for name, shape in shapes.items()} != recorded:
        found.append(f"it was recorded for inputs of other shapes ({_shapes(recorded)}; now {_shapes(shapes)})")
    if details.get("measured", baseline.measured) != baseline.measured:
        found.append(f"it is of {baseline.measured}, and {details['measured']} was measured now")
    if details.get("cuda_graph", baseline.cuda_graph) != baseline.cuda_graph:
        words = ("as a CUDA graph", "without a CUDA graph")
        then, today = words if baseline.cuda_graph else words[::-1]
        found.append(f"it was recorded {then}, and the engine was launched {today} now")
    clocks = {name: getattr(baseline, name) for name in ("sm_mhz", "power_limit_w", "power_mode")}
    return [*found, *other_clocks(clocks, now)]


def other_clocks(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a GPU was set up otherwise, by the conditions of two measurements; what either lacks is not looked at."""
    found = []
    clocks: list[Any] = [side.get("sm_mhz") for side in (then, now)]
    limits: list[Any] = [side.get("power_limit_w") for side in (then, now)]
    if _are_numbers(clocks) and max(clocks) > (1 + OTHER_CLOCK) * min(clocks):
        found.append(f"its SM clock was {clocks[0]} MHz, and is {clocks[1]} MHz now")
    if _are_numbers(limits) and max(limits) > 1.01 * min(limits):
        found.append(f"its power limit was {limits[0]:.0f} W, and is {limits[1]:.0f} W now")
    before, after = then.get("power_mode"), now.get("power_mode")
    if before and after and before != after:
        found.append(f"its nvpmodel mode was {before}, and is {after} now")
    return found


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and value > 0 for value in values)


def judge(
    record: LatencyRecord, baseline: Baseline | None, *, model_sha256: str | None = None, updating: bool = False
) -> LatencyRecord:
    """The record with an entry "baseline" among its budgets, and the verdict and reason that follow from it.

    A slowdown fails the record, unless the measurement was disturbed: then it is inconclusive, like a budget. Where
    there is no baseline, or none that can be compared, the entry is `not_measured` and takes no part in the verdict.

    Parameters
    ----------
    record
        Measured, with `distribution`, `conditions` and `disturbances` in its details.
    baseline
        Of this test on this GPU.
    updating
        Whether what was measured becomes the baseline: then a slowdown is accepted, and said.
    """
    if not record.samples:
        return record
    gpu = (record.details.get("conditions") or {}).get("gpu") or record.gpu
    if baseline is None:
        what = f"no baseline of this test on {gpu}"
        return _with_entry(record, "not_measured", what if updating else f"{what}: record one, --trt-update-baseline")
    different = differences(baseline, record.details, model_sha256)
    if different:
        what = f"the baseline of {baseline.recorded} is not comparable: {'; '.join(different)}"
        return _with_entry(record, "not_measured", what if updating else f"{what}; {_AGAIN}")
    now = Distribution.from_json(record.details["distribution"])
    found = compare(now, baseline.distribution, min_slowdown=MIN_SLOWDOWN)
    verdict = _verdict(found)
    text = f"{found.message}, recorded {_recorded(baseline, record)}"
    disturbances = record.details.get("disturbances") or ()
    if verdict != "pass" and updating:
        verdict, text = "pass", f"{text}; accepted as the new baseline"
    elif verdict == "fail" and disturbances:
        verdict, text = "inconclusive", f"{text}; but the measurement was disturbed: {'; '.join(disturbances)}"
    elif verdict == "inconclusive":
        text = f"{text}; that is too uncertain to tell"
    bounds = now.bounds_ms.get("p50_ms", (None, None))
    numbers = {
        "limit_ms": baseline.distribution.quantile_ms("p50_ms") * (1 + MIN_SLOWDOWN),
        "value_ms": now.quantile_ms("p50_ms"),
        "lower_ms": bounds[0],
        "upper_ms": bounds[1],
        "baseline_p50_ms": baseline.distribution.quantile_ms("p50_ms"),
        "ratio": found.ratio,
    }
    return _with_entry(record, verdict, text, numbers)


def notes(record: LatencyRecord) -> tuple[str, ...]:
    """What a person should know of the baseline although the verdict does not say it."""
    return tuple(
        str(entry["text"])
        for entry in record.budgets
        if entry["name"] == NAME and entry["verdict"] == "not_measured" and record.verdict != "not_measured"
    )


def _verdict(found: Comparison) -> Verdict:
    if found.decision != "undecided":
        return found.decision
    seems_fine = found.ratio <= 1 + MIN_SLOWDOWN and found.upper is not None and found.upper <= 1 + SURELY_BELOW
    return "pass" if seems_fine else "inconclusive"


def _with_entry(
    record: LatencyRecord, verdict: Verdict, text: str, numbers: Mapping[str, float | None] | None = None
) -> LatencyRecord:
    entry = {"verdict": verdict, "name": NAME, **(numbers or {}), "text": text}
    # Without budgets there was nothing else that could pass.
    others: list[Verdict] = [record.verdict] if record.budgets else []
    total = combine([*others, verdict])
    told = [record.reason] if record.reason and record.budgets else []
    if verdict != "pass" and SEVERITY.index(verdict) >= SEVERITY.index(total):
        # The worst comes first; what is as bad stands beside it.
        told = [text, *told] if record.verdict != total else [*told, text]
    return replace(record, verdict=total, reason="; ".join(told) or None, budgets=(*record.budgets, entry))


def _recorded(baseline: Baseline, record: LatencyRecord) -> str:
    now = record.details.get("conditions") or {}
    pairs = [("", baseline.tensorrt, now.get("tensorrt")), ("driver ", baseline.driver, now.get("driver"))]
    words = [
        f"{what}{then}" + (f" (now {today})" if today is not None and today != then else "")
        for what, then, today in pairs
        if then
    ]
    return f"{baseline.recorded} with {', '.join(words)}"


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
