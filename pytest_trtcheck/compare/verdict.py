"""Measurements and limits to verdicts. Nothing is measured here, so a saved measurement can be judged by new limits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_trtcheck.compare.judging import BY_PART, JudgedPart, judged_parts
from pytest_trtcheck.compare.limits import EQUAL, Limit
from pytest_trtcheck.compare.measurement import Fault, Measurement, Score
from pytest_trtcheck.errors import ComparisonError
from pytest_trtcheck.record import (
    SEVERITY,
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
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_trtcheck.spec import Metric

LOOSE = 100.0
_LOOSE_DB = 20 * math.log10(LOOSE)
_SHARES = ("top1", "mismatches", "nonfinite")
_OF_ANY_INTEGER: tuple[str, ...] = ("abs", "top1")


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
    entries = [_fault(fault) for fault in measurement.faults]
    by_limit = {limit: judged_parts(measurement, limit) for limit in applicable}
    if measurement.size:
        entries += [_entry(measurement, limit, by_limit[limit]) for limit in applicable]
    different = measurement.nonfinite.different
    if measurement.nonfinite.total:
        verdict: Verdict = "fail" if different else "pass"
        entries.append(JudgedRecord("nonfinite", float(different), 0.0, "NaN and infinity must match", verdict))
    # Elements that are alike in not being finite say nothing of the others.
    total = combine([entry["verdict"] for entry in entries if entry["metric"] != "nonfinite" or different])
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
        parts=tuple(_part(limit, each) for limit, found in by_limit.items() for each in found),
        details=_details(measurement),
    )


def summarize(outputs: Sequence[OutputRecord], metric: Metric) -> ParityRecord:
    """The verdict on all outputs. `metric`, `worst`, `tol` and `tol_source` are those of the decisive limit.

    That is the limit of the most severe verdict which is used up most; limits on `metric` come before others that are
    used up as much.
    """
    verdict = combine([output.verdict for output in outputs])
    decisive = _decisive(outputs, metric)
    if decisive is None:
        return ParityRecord(verdict, metric, None, None, tuple(outputs))
    output, entry = decisive
    nonfinite = [each for each in output.judged if each["metric"] == "nonfinite" and each["verdict"] == "fail"]
    reason = f"output {output.name!r}: {sentence((*nonfinite, entry)[0])}" if is_bad(verdict) else None
    return ParityRecord(
        verdict=verdict,
        metric=entry["metric"],
        tol=entry["limit"],
        worst=entry["value"],
        outputs=tuple(outputs),
        reason=reason,
        tol_source=entry["source"],
    )


def loose_notes(outputs: Iterable[OutputRecord]) -> tuple[str, ...]:
    """A note for each tolerance that is 100× or more looser than the largest error measured under it.

    Shares (`top1`, `mismatches`) are left out: none wrong of a few says nothing about the tolerance.
    """
    groups: dict[tuple[str, str, float], list[tuple[float, str]]] = {}
    for output in outputs:
        for entry in output.judged:
            if entry["verdict"] == "pass" and entry["metric"] not in _SHARES and entry["value"] is not None:
                key = entry["source"], entry["metric"], entry["limit"]
                groups.setdefault(key, []).append((entry["value"], output.name))
    return tuple(_loose_note(*key, *_largest(key[1], found)) for key, found in groups.items() if _is_loose(key, found))


def unexercised_notes(outputs: Iterable[OutputRecord]) -> tuple[str, ...]:
    """A note for each output, and each part of one, of which nothing could be told."""
    notes = []
    for output in outputs:
        if output.details.get("uncompared"):
            notes.append(f"output {output.name!r} was not compared: {output.details['uncompared']}")
        parts = {part["part"]: part["note"] for part in output.parts if part["verdict"] == "not_measured"}
        notes += [f"output {output.name!r}, {part}: {note}" for part, note in parts.items()]
    return tuple(notes)


def _largest(metric: str, found: list[tuple[float, str]]) -> tuple[float, str]:
    return min(found) if metric == "snr_db" else max(found)


def _is_loose(key: tuple[str, str, float], found: list[tuple[float, str]]) -> bool:
    source, metric, limit = key
    value, _ = _largest(metric, found)
    if metric == "snr_db":
        return value >= limit + _LOOSE_DB
    # An exact result under a default says nothing about a choice that the user made.
    chosen = value > 0 or not source.startswith("default")
    return chosen and 0 < limit < math.inf and value * LOOSE <= limit


def _loose_note(source: str, metric: str, limit: float, value: float, name: str) -> str:
    measured = f"{metric} of {name!r} is {value:.3g}"
    if metric == "snr_db":
        return (
            f"{source}: the limit of {limit:g} dB is {value - limit:.0f} dB looser than what was measured: {measured}"
        )
    looser = f"{limit / value:,.0f}× looser than" if value else "far looser than"
    return f"{source}: the limit of {limit:g} is {looser} the error measured: {measured}"


def sentence(entry: JudgedRecord) -> str:
    """One judged limit in words, as in "max 0.0132 > 0.0100 (default for fp16)"; value and limit never look equal."""
    metric, value, limit = entry["metric"], entry["value"], entry["limit"]
    case = f", input {entry['case']}" if entry.get("case") is not None else ""
    case += f", sample {entry['sample']}" if entry.get("sample") is not None else ""
    note = f": {entry['note']}" if entry.get("note") else ""
    # Which part it is says something where there are others.
    part = entry.get("part") or ""
    part = f" in {part}" if part and not part.startswith(WHOLE) else ""
    if limit is None:
        return f"{entry['note']}{f' ({case[2:]})' if case else ''}"
    if entry["verdict"] == "not_measured":
        return f"{metric}{part}{note}"
    if value is None:
        return f"{metric} can't be computed{note} ({entry['source']}{case})"
    if metric == "nonfinite":
        return f"{value:,.0f} elements with NaN or Inf do not match the reference"
    failed = is_bad(entry["verdict"])
    least = metric == "snr_db"
    sign = ("<" if least else ">") if failed else ("≥" if least else "≤")
    shown, bound = distinct(value, limit)
    return f"{metric} {shown} {sign} {bound} ({entry['source']}{case}){part}{note}"


def distinct(value: float, limit: float) -> tuple[str, str]:
    """Both numbers in as many digits as it takes to tell them apart, at least three and no more than FP64 has."""
    bound = f"{limit:g}" if float(f"{limit:g}") == limit else repr(limit)
    for digits in range(3, 18):
        shown = f"{value:.{digits}g}"
        if _order(float(shown), limit) == _order(value, limit):
            break
    return shown, bound


def _order(value: float, limit: float) -> int:
    return (value > limit) - (value < limit)


def _applicable(measurement: Measurement, limits: Sequence[Limit]) -> Iterator[Limit]:
    unequal = next((limit for limit in limits if limit.metric == "mismatches"), None)
    metrics = [limit for limit in limits if limit.metric != "mismatches"]
    if measurement.kind == "float":
        yield from metrics
        return
    if unequal is None:
        unequal = Limit("mismatches", 0.0, EQUAL)
    yield unequal
    # Equal elements keep every other limit, so there is nothing more to judge.
    if not unequal.limit:
        return
    for limit in metrics:
        if measurement.kind == "integer" and (limit.named or unequal.limit >= 1 or limit.metric in _OF_ANY_INTEGER):
            yield limit


def _entry(measurement: Measurement, limit: Limit, parts: Sequence[JudgedPart]) -> JudgedRecord:
    if limit.metric == "mismatches":
        score = Score(measurement.mismatch_share)
    elif parts and limit.metric in BY_PART:
        return _of_parts(measurement, limit, parts)
    else:
        score = measurement.scores.get(limit.metric) or Score(None, "it was not measured")
    return _of_score(limit, score)


def _of_parts(measurement: Measurement, limit: Limit, parts: Sequence[JudgedPart]) -> JudgedRecord:
    """The entry of the worst part, or of an input whose output has no parts, where that is worse."""
    worst = max(parts, key=lambda each: _rank(each.verdict, each.value, limit))
    undivided = None if limit.metric == "mismatches" else measurement.undivided.get(limit.metric)
    if undivided is not None:
        entry = _of_score(limit, undivided)
        if _rank(entry["verdict"], entry["value"], limit) > _rank(worst.verdict, worst.value, limit):
            return entry
    return JudgedRecord(
        limit.metric,
        worst.value,
        limit.limit,
        limit.source,
        worst.verdict,
        note=worst.note or None,
        part=str(worst.part),
        case=worst.case,
        sample=worst.sample,
    )


def _rank(verdict: Verdict, value: float | None, limit: Limit) -> tuple[int, float]:
    return _severity(JudgedRecord(limit.metric, value, limit.limit, limit.source, verdict))


def _part(limit: Limit, judged: JudgedPart) -> PartRecord:
    part = judged.part
    return PartRecord(
        metric=limit.metric,
        value=judged.value,
        limit=limit.limit,
        source=limit.source,
        verdict=judged.verdict,
        note=judged.note or None,
        part=str(part),
        case=judged.case,
        sample=judged.sample,
        ranges=part.part.ranges,
        band=part.band,
        natural=part.part.natural,
        size=part.size,
        peak=part.peak,
        scale=judged.scale,
    )


def _of_score(limit: Limit, score: Score) -> JudgedRecord:
    verdict: Verdict = "error" if score.value is None else "pass" if limit.holds(score.value) else "fail"
    note = score.note or None
    return JudgedRecord(limit.metric, score.value, limit.limit, limit.source, verdict, note=note, case=score.case)


def _fault(fault: Fault) -> JudgedRecord:
    return JudgedRecord(fault.what, None, None, "the reference", "fail", note=fault.text, case=fault.case)


def _decisive(outputs: Sequence[OutputRecord], metric: str) -> tuple[OutputRecord, JudgedRecord] | None:
    judged = [(output, entry) for output in outputs for entry in output.judged]
    return max(judged, key=lambda item: (*_severity(item[1]), item[1]["metric"] == metric), default=None)


def _severity(entry: JudgedRecord) -> tuple[int, float]:
    value, limit = entry["value"], entry["limit"]
    rank = SEVERITY.index(entry["verdict"])
    if entry["verdict"] == "not_measured":
        return rank, 0.0
    if value is None or limit is None or math.isnan(value):
        return rank, math.inf
    if entry["metric"] == "snr_db":
        return rank, 10 ** min(300.0, max(-300.0, (limit - value) / 20))
    if not limit:
        return rank, math.inf if value else 0.0
    return rank, value / limit


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
