"""Measurements and limits to verdicts. Nothing is measured here, so a saved measurement can be judged by new limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.compare.limits import EQUAL, Limit
from pytest_trtcheck.compare.measure import measure_all
from pytest_trtcheck.errors import ComparisonError, plural
from pytest_trtcheck.metrics import METRICS, MISMATCHES, Score, badness, distinct_digits, rank, recorded
from pytest_trtcheck.record import (
    ElementRecord,
    JudgedRecord,
    OutputDetails,
    OutputRecord,
    ParityRecord,
    PartRecord,
    Verdict,
    combine,
    is_bad,
)
from pytest_trtcheck.spec import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.limits import Limits
    from pytest_trtcheck.compare.measurement import Measurement, PartMeasurement, PartSums
    from pytest_trtcheck.metrics import Metric, Relative

LOOSE = 100.0
LEAST_SHARE = 0.25
"""The scale of a part is no less than this share of its natural scale. What a score of 0.02 is rounded by, as a share
of 0.02, is the error of its logit, and no decision hangs on it: detectors take a score for something from 0.25 on."""


def judge_all(
    actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], limits: Limits
) -> list[OutputRecord]:
    """Every output of one run, measured and judged."""
    return [judge(each, limits[name]) for name, each in measure_all(actual, expected, limits).items()]


def judge(measurement: Measurement, limits: Sequence[Limit]) -> OutputRecord:
    """The verdict on one output: that of the limit that is kept worst.

    A shape or dtype that differs fails, and so does an element that is NaN or infinite on one side alone. Integers and
    booleans are judged by `mismatches`. Where the tolerance lets integers differ, `abs` and `top1` are judged as well,
    and the other metrics (which mean little for labels and indices) only if the tolerance was given for the output by
    name, or lets all of them differ. A metric that can't be computed gives the verdict `error`, and an output of which
    nothing was compared (it is empty, or no input exercised it) `not_measured`.

    The `judged` of the record has one entry per limit: {metric, value, limit, source, verdict}, and, where there is
    something to add, `note`, `part` (the one that is worst) and (of several inputs) `case`. `parts` has every part of a
    divided output by every limit that is relative to a scale.

    Raises
    ------
    ComparisonError
        No limit applies, so that nothing could fail.
    """
    applicable = list(_applicable(measurement, limits))
    if not applicable:
        raise ComparisonError(f"output {measurement.name!r}: there is no limit to judge it by")
    entries = [
        _entry(fault.what, None, None, "the reference", "fail", note=fault.text, case=fault.case)
        for fault in measurement.faults
    ]
    parts: list[PartRecord] = []
    for limit in applicable if measurement.size else ():
        by_part = [_of_part(part, limit, limit.metric.relative) for part in measurement.parts if limit.metric.relative]
        entries.append(_of_output(measurement, limit, by_part))
        parts += by_part
    different = measurement.nonfinite.different
    if measurement.nonfinite.total:
        verdict: Verdict = "fail" if different else "pass"
        entries.append(_entry("nonfinite", float(different), 0.0, "NaN and infinity must match", verdict))
    # Elements that are alike in not being finite say nothing of the others.
    total = combine([entry.verdict for entry in entries if entry.metric != "nonfinite" or different])
    if measurement.uncompared and total == "pass":
        total = "not_measured"
    return OutputRecord(
        name=measurement.name,
        dtype=measurement.dtype,
        shape=measurement.shape,
        max=measurement.value("max"),
        l2=measurement.value("l2"),
        abs=measurement.value("abs"),
        cosine=measurement.value("cosine"),
        snr_db=measurement.value("snr_db"),
        nonfinite=measurement.nonfinite.total,
        mismatches=measurement.mismatches,
        worst_index=measurement.worst[0].index if measurement.worst else None,
        verdict=total,
        judged=tuple(entries),
        parts=tuple(parts),
        details=_details(measurement),
    )


def summarize(outputs: Sequence[OutputRecord], metric: str) -> ParityRecord:
    """The verdict on all outputs. `metric`, `worst`, `tol` and `tol_source` are those of the decisive limit.

    That is the limit of the most severe verdict which is used up most; limits on `metric` come before others that are
    used up as much.
    """
    verdict = combine([output.verdict for output in outputs])
    found = decisive(outputs, metric)
    if found is None:
        return ParityRecord(verdict, metric, None, None, tuple(outputs))
    output, entry = found
    nonfinite = [each for each in output.judged if each.metric == "nonfinite" and each.verdict == "fail"]
    reason = f"output {output.name!r}: {sentence((*nonfinite, entry)[0])}" if is_bad(verdict) else None
    return ParityRecord(
        verdict=verdict,
        metric=entry.metric,
        tol=entry.limit,
        worst=entry.value,
        outputs=tuple(outputs),
        reason=reason,
        tol_source=entry.source,
    )


def decisive(outputs: Iterable[OutputRecord], metric: str = "") -> tuple[OutputRecord, JudgedRecord] | None:
    """The limit that decides, and its output; of limits that are used up as much, one on `metric`."""
    judged = [(output, entry) for output in outputs for entry in output.judged]
    return max(judged, key=lambda item: (*rank(item[1]), item[1].metric == metric), default=None)


@dataclass(frozen=True)
class LimitResult:
    """How one set of outputs compares with another: its limit that is used up most.

    Parameters
    ----------
    usage
        How much of it the metric uses: above 1 it fails. Infinite where something is not finite.
    passed
        Whether every limit is kept.
    value
        The metric's value; None where it can't be computed.
    """

    usage: float
    passed: bool
    output: str = ""
    metric: str = ""
    limit: float | None = None
    value: float | None = None


def usage(outputs: Sequence[OutputRecord]) -> LimitResult:
    """What decides of some outputs."""
    passed = not any(is_bad(output.verdict) for output in outputs)
    found = decisive(outputs)
    if found is None:
        return LimitResult(0.0, passed)
    output, entry = found
    return LimitResult(rank(entry)[1], passed, output.name, entry.metric, entry.limit, entry.value)


def loose_notes(outputs: Iterable[OutputRecord]) -> tuple[str, ...]:
    """A note for each tolerance that is 100× or more looser than the largest error measured under it, or that an output
    of zeros would keep.

    Shares (`top1`, `mismatches`) are left out: none wrong of a few says nothing about the tolerance. So is what is not
    built in.
    """
    groups: dict[tuple[str, str, float], list[tuple[float, str]]] = {}
    idle: dict[str, None] = {}
    for output in outputs:
        for entry in output.judged:
            known = MISMATCHES if entry.metric == MISMATCHES.name else METRICS.get(entry.metric)
            if (
                entry.verdict == "pass"
                and known
                and entry.limit is not None
                and (why := _kept_by_all(known, entry.limit))
            ):
                idle[f"{entry.source}: {why}"] = None
                continue
            if entry.verdict != "pass" or not known or known.range[1] == 1.0:
                continue
            if entry.value is not None and entry.limit is not None:
                key = entry.source or "", entry.metric, entry.limit
                groups.setdefault(key, []).append((entry.value, output.name))
    return (*idle, *filter(None, (_loose_note(*key, found) for key, found in groups.items())))


_DISAGREEMENT = {
    "cosine": "1 − cos",
    "top1": "the share of rows that disagree",
    "mismatches": "the share of elements that are unequal",
}
"""Metrics of which others give the opposite: a similarity, an accuracy."""
_HALF = 0.5


def _kept_by_all(metric: Metric, limit: float) -> str:
    """What is said of a limit on a metric that what is lost would keep; empty where it would not."""
    if not metric.at_least and limit >= metric.range[1]:
        return f"{limit:g} is the most that {metric.name} can be: no output fails it"
    if metric.name in _DISAGREEMENT and limit >= _HALF:
        instead = f" (an agreement of {limit:g} is a limit of {1 - limit:.3g})" if limit < 1 else ""
        return (
            f"{metric.name} is {_DISAGREEMENT[metric.name]}: next to any output keeps the limit of {limit:g}{instead}"
        )
    # The cosine of zeros can't be computed.
    if metric.relative and metric.range[1] == math.inf and metric.relative.inverse(limit) >= 1:
        return f"an output of zeros would keep the limit of {limit:g} for {metric.name}"
    return ""


def _loose_note(source: str, metric: str, limit: float, found: list[tuple[float, str]]) -> str:
    known = METRICS[metric]
    value, name = max(found, key=lambda item: (badness(item[0], at_least=known.at_least), item[1]))
    measured = f"{metric} of {name!r} is {value:.3g}"
    if known.used(value, limit) * LOOSE > 1 or not abs(limit) < math.inf:
        return ""
    if known.at_least:
        return (
            f"{source}: the limit of {limit:g} dB is {value - limit:.0f} dB looser than what was measured: {measured}"
        )
    # An exact result under a default says nothing about a choice that the user made.
    if not limit or (not value and source.startswith("default")):
        return ""
    looser = f"{limit / value:,.0f}× looser than" if value else "far looser than"
    return f"{source}: the limit of {limit:g} is {looser} the error measured: {measured}"


def unexercised_notes(outputs: Iterable[OutputRecord]) -> tuple[str, ...]:
    """A note for each output, and each part of one, of which nothing could be told."""
    notes = []
    for output in outputs:
        if output.details.uncompared:
            notes.append(f"output {output.name!r} was not compared: {output.details.uncompared}")
        parts = {part.part: part.note for part in output.parts if part.verdict == "not_measured"}
        notes += [f"output {output.name!r}, {part}: {note}" for part, note in parts.items()]
        whole = [each for each in output.judged if each.verdict == "not_measured" and each.part is None]
        notes += [
            f"output {output.name!r}, by {each.metric}: {each.note}" for each in whole if not output.details.uncompared
        ]
    return tuple(notes)


def sentence(entry: JudgedRecord) -> str:
    """One judged limit in words, as in "max 0.0132 > 0.0100 (default for fp16)"; value and limit never look equal."""
    metric, value, limit = entry.metric, entry.value, entry.limit
    case = f", input {entry.case}" if entry.case is not None else ""
    case += f", sample {entry.sample}" if entry.sample is not None else ""
    note = f": {entry.note}" if entry.note else ""
    # Which part it is says something where there are others.
    part = entry.part or ""
    part = f" in {part}" if part and not part.startswith(WHOLE) else ""
    if limit is None:
        return f"{entry.note}{f' ({case[2:]})' if case else ''}"
    if entry.verdict == "not_measured":
        return f"{metric}{part}{note}"
    if value is None:
        return f"{metric} cannot be computed{note} ({entry.source}{case})"
    if metric == "nonfinite":
        return f"NaN and Inf do not match the reference in {plural(int(value), 'element')}"
    failed = is_bad(entry.verdict)
    least = recorded(metric, at_least=bool(entry.at_least)).at_least
    sign = ("<" if least else ">") if failed else ("≥" if least else "≤")
    shown, bound = distinct(value, limit)
    return f"{metric} {shown} {sign} {bound} ({entry.source}{case}){part}{note}"


def distinct(value: float, limit: float) -> tuple[str, str]:
    """Both numbers in as many digits as it takes to tell them apart, at least three and no more than FP64 has."""
    bound = f"{limit:g}" if float(f"{limit:g}") == limit else repr(limit)
    return f"{value:.{distinct_digits(value, limit)}g}", bound


def _applicable(measurement: Measurement, limits: Sequence[Limit]) -> Iterator[Limit]:
    unequal = next((limit for limit in limits if limit.metric is MISMATCHES), Limit(MISMATCHES, 0.0, EQUAL))
    metrics = [limit for limit in limits if limit.metric is not MISMATCHES]
    if measurement.kind == "float":
        yield from metrics
        return
    yield unequal
    # Equal elements keep every other limit, so there is nothing more to judge.
    for limit in metrics if unequal.limit else ():
        is_asked = measurement.kind == "integer" and (limit.named or unequal.limit >= 1)
        if is_asked or measurement.kind in limit.metric.kinds:
            yield limit


def _of_output(measurement: Measurement, limit: Limit, parts: Sequence[PartRecord]) -> JudgedRecord:
    """The entry of the worst part; of the whole output where it has none, or where that is worse on another input."""
    if limit.metric is MISMATCHES:
        return _of_score(limit, Score(measurement.mismatch_share, rows=(measurement.mismatches, measurement.size)))
    if not parts:
        score = measurement.scores.get(limit.metric.name, Score(None, "it was not measured"))
        return _unexercised(measurement, limit, score) or _of_score(limit, score)
    worst = max(parts, key=rank)
    shown = {each.name: getattr(worst, each.name) for each in fields(JudgedRecord)}
    entries = [JudgedRecord(**shown)]
    if limit.metric.name in measurement.undivided:
        entries.append(_of_score(limit, measurement.undivided[limit.metric.name]))
    return max(entries, key=rank)


def _unexercised(measurement: Measurement, limit: Limit, score: Score) -> JudgedRecord | None:
    """The entry of a limit that an output of nothing but zeros would keep as well; None where it tells something.

    That is a reference that is zero throughout, and one that an absolute limit is larger than.
    """
    name, peak = limit.metric.name, measurement.peak
    if measurement.kind != "float" or score.value is None or not limit.holds(score.value):
        return None
    if not peak and (limit.metric.relative or name in _ABSOLUTE):
        why = "not exercised: its reference is zero throughout on these inputs"
    elif name in _ABSOLUTE and _ABSOLUTE[name](peak) <= limit.limit:
        why = (
            f"not exercised: its reference is at most {peak:.3g} on these inputs, and zeros would keep {limit.limit:g}"
        )
    else:
        return None
    return _limited(limit, None, "not_measured", note=why)


_ABSOLUTE: Mapping[str, Callable[[float], float]] = {
    "abs": lambda peak: peak,
    "allclose": lambda peak: peak / (1 + peak),
}
"""What the metrics that are relative to no scale are of zeros, by the reference's largest magnitude."""


def _of_score(limit: Limit, score: Score) -> JudgedRecord:
    verdict: Verdict = "error" if score.value is None else "pass" if limit.holds(score.value) else "fail"
    return _limited(
        limit, score.value, verdict, note=score.note, case=score.case, rows=(score.rows and score.rows[1]) or None
    )


def _limited(limit: Limit, value: float | None, verdict: Verdict, **where: Any) -> JudgedRecord:
    name = limit.metric.name
    # Who reads the record knows those that are built in.
    if limit.metric.at_least and name not in METRICS:
        where["at_least"] = True
    return _entry(name, value, limit.limit, limit.source, verdict, **where)


def _entry(
    metric: str, value: float | None, limit: float | None, source: str, verdict: Verdict, **where: Any
) -> JudgedRecord:
    where["note"] = where.get("note") or None
    return JudgedRecord(metric, value, limit, source, verdict, **where)


# --- parts -----------------------------------------------------------------------------------------------------------


def _of_part(part: PartMeasurement, limit: Limit, relative: Relative) -> PartRecord:
    """A part by one limit: the metric's worst value over all inputs and samples that exercised it."""
    natural = part.part.natural

    def judged(entry: JudgedRecord) -> PartRecord:
        return PartRecord(
            **{each.name: getattr(entry, each.name) for each in fields(JudgedRecord) if each.name != "part"},
            part=str(part),
            ranges=part.part.ranges,
            band=part.band,
            natural=natural,
            size=part.size,
            peak=part.peak,
            # What the errors are relative to.
            scale=max(part.peak, LEAST_SHARE * (natural or 0.0)),
        )

    values = list(_values(part, limit, relative))
    if not values:
        why = (
            f"not exercised: its reference is at most {part.peak:.3g} of {natural:g} on these inputs, less than the "
            "tolerance"
            if natural is not None
            else "not exercised: its reference is zero throughout on these inputs"
        )
        return judged(_limited(limit, None, "not_measured", note=why))
    value, sums = max(values, key=lambda each: badness(each[0], at_least=limit.metric.at_least))
    note = "" if sums.peak else f"its reference is all zero here: relative to the output's {sums.whole:.3g}"
    verdict: Verdict = "pass" if limit.holds(value) else "fail"
    return judged(_limited(limit, value, verdict, note=note, case=sums.case, sample=sums.sample))


def _values(part: PartMeasurement, limit: Limit, relative: Relative) -> Iterator[tuple[float, PartSums]]:
    """The metric of every input and sample that exercised the part, and of others that are off all the same."""
    natural, tolerance = part.part.natural, relative.inverse(limit.limit)
    for sums in part.sums:
        if sums.different:
            yield (-math.inf if limit.metric.at_least else math.inf), sums
        elif natural is not None and sums.peak <= tolerance * natural:
            # All of it could be lost within the tolerance: only more than that says something.
            if sums.error > tolerance * natural:
                yield relative.metric(sums.error / natural), sums
        elif not sums.whole:
            # The whole output is zero: that is judged by the absolute error, and zeros would have none.
            if sums.error > tolerance:
                yield relative.metric(sums.error), sums
        elif not sums.peak:
            if sums.error > tolerance * sums.whole:
                yield relative.metric(sums.error / sums.whole), sums
        else:
            # Where squares leave FP64, the largest error is at least as telling.
            in_range = 0 < sums.rr < math.inf and sums.rr + 2 * sums.dr + sums.dd < math.inf
            error = relative.error(sums) if in_range else sums.error / sums.peak
            yield relative.metric(error / max(1.0, LEAST_SHARE * (natural or 0.0) / sums.peak)), sums


def _details(measurement: Measurement) -> OutputDetails:
    allclose, top1 = (measurement.scores.get(metric) for metric in ("allclose", "top1"))
    return OutputDetails(
        allclose=allclose.value if allclose else None,
        top1=top1.value if top1 else None,
        cases=measurement.cases,
        peak=measurement.peak,
        error_quantiles=measurement.quantiles(),
        error_octaves=tuple((int(octave), int(count)) for octave, count in measurement.histogram.octaves()),
        error_zeros=measurement.histogram.zeros,
        error_sampled=measurement.histogram.sampled,
        worst=tuple(ElementRecord(e.index, e.expected, e.actual, e.error, e.case) for e in measurement.worst),
        notes=tuple(measurement.notes),
        uncompared=measurement.uncompared or None,
    )
