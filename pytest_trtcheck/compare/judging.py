"""The parts of an output, each against the same limit by its own scale, and what no input exercised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.compare.limits import Limit
    from pytest_trtcheck.compare.measurement import Measurement, PartMeasurement, Sums
    from pytest_trtcheck.record import Verdict

BY_PART = frozenset({"max", "l2", "cosine", "snr_db"})
"""The metrics that are relative to a scale. `abs` and `allclose` are in the output's own unit, element by element, and
`top1` and `mismatches` are shares."""
LEAST_SHARE = 0.25
"""The scale of a part is no less than this share of its natural scale. What a score of 0.02 is rounded by, as a share
of 0.02, is the error of its logit, and no decision hangs on it: detectors take a score for something from 0.25 on."""


@dataclass(frozen=True)
class JudgedPart:
    """One part by one limit.

    Parameters
    ----------
    value
        The metric's worst value over all inputs and samples; None where no input exercised the part.
    scale
        What the errors are relative to: max|r| over all inputs, or a share of the natural scale where that is more.
    case, sample
        Where the value is from.
    """

    part: PartMeasurement
    verdict: Verdict
    value: float | None
    scale: float
    note: str = ""
    case: int | None = None
    sample: int | None = None


def judged_parts(measurement: Measurement, limit: Limit) -> list[JudgedPart]:
    """Every part of an output by one limit; none for a metric that is not relative."""
    if limit.metric not in BY_PART:
        return []
    return [_judged(each, limit) for each in measurement.parts]


def _judged(part: PartMeasurement, limit: Limit) -> JudgedPart:
    natural = part.part.natural
    scale = max(part.peak, LEAST_SHARE * (natural or 0.0))
    values = list(_values(part, limit))
    if not values:
        why = (
            f"not exercised: its reference is at most {part.peak:.3g} of {natural:g} on these inputs, less than the "
            "tolerance"
            if natural is not None
            else "not exercised: its reference is zero throughout on these inputs"
        )
        return JudgedPart(part, "not_measured", None, scale, why)
    value, sums = max(values, key=lambda each: _badness(each[0], limit))
    verdict: Verdict = "pass" if limit.holds(value) else "fail"
    note = "" if sums.peak else f"its reference is all zero here: relative to the output's {sums.whole:.3g}"
    return JudgedPart(part, verdict, value, scale, note, sums.case, sums.sample)


def _values(part: PartMeasurement, limit: Limit) -> Iterator[tuple[float, Sums]]:
    """The metric of every input and sample that exercised the part, and of others that are off all the same."""
    natural, tolerance = part.part.natural, _relative(limit)
    for sums in part.sums:
        if sums.different:
            yield (-math.inf if limit.at_least else math.inf), sums
        elif natural is not None and sums.peak <= tolerance * natural:
            # All of it could be lost within the tolerance: only more than that says something.
            if sums.error > tolerance * natural:
                yield _as_metric(sums.error / natural, limit), sums
        elif not sums.whole:
            # The whole output is zero: that is judged by the absolute error.
            yield _as_metric(sums.error, limit), sums
        elif not sums.peak:
            if sums.error > tolerance * sums.whole:
                yield _as_metric(sums.error / sums.whole, limit), sums
        else:
            yield _value(sums, natural, limit), sums


def _value(sums: Sums, natural: float | None, limit: Limit) -> float:
    relief = max(1.0, LEAST_SHARE * (natural or 0.0) / sums.peak)
    if limit.metric == "max":
        return sums.error / sums.peak / relief
    if not (0 < sums.rr < math.inf and sums.rr + 2 * sums.dr + sums.dd < math.inf):
        # Squares that leave FP64: the largest error is at least as telling.
        return _as_metric(sums.error / sums.peak / relief, limit)
    if limit.metric == "cosine":
        return _cosine(sums) / relief**2
    return _as_metric(math.sqrt(sums.dd / sums.rr) / relief, limit)


def _cosine(sums: Sums) -> float:
    """1 − cos, as `metrics` works it out: (‖d‖² − (‖y‖−‖r‖)²) / (2‖y‖‖r‖)."""
    squared = sums.rr + 2 * sums.dr + sums.dd
    if squared <= 0:
        return 1.0
    long, longer = math.sqrt(sums.rr), math.sqrt(squared)
    if not long / 2 < longer < 2 * long:
        # Where they are not alike the difference above cancels, and this one does not.
        return max(0.0, 1 - (sums.rr + sums.dr) / (long * longer))
    return max(0.0, (sums.dd - (longer - long) ** 2) / (2 * long * longer))


def _relative(limit: Limit) -> float:
    """The relative error that a limit stands for."""
    if limit.metric == "snr_db":
        return 10 ** (-max(-6000.0, min(6000.0, limit.limit)) / 20)
    return math.sqrt(2 * limit.limit) if limit.metric == "cosine" else limit.limit


def _as_metric(relative: float, limit: Limit) -> float:
    """A relative error as the metric of the limit."""
    if limit.metric == "snr_db":
        return -20 * math.log10(relative) if relative else math.inf
    # The opposite of the reference, 2, is the most that 1 − cos can be.
    return min(relative, 2.0) ** 2 / 2 if limit.metric == "cosine" else relative


def _badness(value: float, limit: Limit) -> float:
    if math.isnan(value):
        return math.inf
    return -value if limit.at_least else value
