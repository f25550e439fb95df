"""Judging one step (FP32 → lowered, lowered → engine) by the limits of the check that failed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import compare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare import LimitResult, Limits
    from pytest_trtcheck.record import OutputRecord


def judge(
    actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], limits: Limits
) -> tuple[LimitResult, list[OutputRecord]]:
    """Judge `actual` by the limits; the limit that is used up most, and what was found of each output."""
    outputs = compare.judge_all(actual, expected, limits)
    return compare.usage(outputs), outputs


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
                if entry.metric == metric:
                    return entry.value
    return None
