"""Judging one step (FP32 → lowered, lowered → engine) by the limits of the check that failed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import compare
from pytest_trtcheck.record import is_bad

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare import Limits
    from pytest_trtcheck.record import JudgedRecord, OutputRecord


@dataclass(frozen=True)
class Judgement:
    """How one set of outputs compares with another.

    Parameters
    ----------
    usage
        How much of its limit the worst metric uses: above 1 it fails. Infinite where something is not finite.
    passed
        Whether every limit is kept.
    output, metric, limit
        The limit that is used up most.
    value
        The metric's value there; None where it can't be computed.
    """

    usage: float
    passed: bool
    output: str
    metric: str
    limit: float | None
    value: float | None


def judge(
    actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], limits: Limits
) -> tuple[Judgement, list[OutputRecord]]:
    """Judge `actual` by the limits; the judgement, and what was found of each output."""
    measured = compare.measure_all(actual, expected, limits)
    outputs = [compare.judge(each, limits[name]) for name, each in measured.items()]
    return worst(outputs), outputs


def worst(outputs: Sequence[OutputRecord]) -> Judgement:
    """The limit that is used up most, of all outputs."""
    passed = not any(is_bad(output.verdict) for output in outputs)
    judged = [(_usage(entry), output.name, entry) for output in outputs for entry in output.judged]
    if not judged:
        return Judgement(0.0, passed, "", "", None, None)
    # Of two that are used up alike, the metric says more than a count of elements that are not finite.
    usage, name, entry = max(judged, key=lambda item: (item[0], item[2]["metric"] != "nonfinite"))
    return Judgement(usage, passed, name, entry["metric"], entry["limit"], entry["value"])


def magnitude(outputs: Sequence[OutputRecord], output: str, metric: str) -> float:
    """The size of an output's error, on a scale on which twice the error is twice as much, whatever metric was judged.

    It is a statement about the error alone: the limit is no part of it. Infinite where an element is not finite; of
    integers the share that differs.
    """
    for each in outputs:
        if each.name == output:
            if each.nonfinite:
                return math.inf
            value = {"max": each.max, "abs": each.abs, "allclose": each.abs}.get(metric, each.l2)
            value = each.l2 if value is None else value
            return math.inf if value is not None and math.isnan(value) else float(value or each.mismatches)
    return 0.0


def value_of(outputs: Sequence[OutputRecord], output: str, metric: str) -> float | None:
    """The value of one metric on one output."""
    for each in outputs:
        if each.name == output:
            for entry in each.judged:
                if entry["metric"] == metric:
                    value: float | None = entry["value"]
                    return value
    return None


def _usage(entry: JudgedRecord) -> float:
    value, limit = entry["value"], entry["limit"]
    if value is None or limit is None or math.isnan(value):
        return math.inf if is_bad(entry["verdict"]) else 0.0
    if entry["metric"] == "snr_db":
        return float(10 ** min(max((limit - value) / 20, -300.0), 300.0))
    if not limit:
        return math.inf if value else 0.0
    return float(value / limit)
