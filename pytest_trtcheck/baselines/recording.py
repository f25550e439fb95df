"""Recording baselines at the end of a run: those of the checks that were made, and only what can be trusted."""

from __future__ import annotations

import datetime
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.baselines import errors, files
from pytest_trtcheck.baselines.errors import ErrorBaseline
from pytest_trtcheck.baselines.files import CheckKey, Entry, Place
from pytest_trtcheck.baselines.latency import MIN_SLOWDOWN, LatencyBaseline
from pytest_trtcheck.baselines.scores import ScoreBaseline
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.record import BASELINE, BaselineRecord, Conditions, GpuRecord, is_bad

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from pytest_trtcheck.record import CheckRecord, LatencyDetails, LatencyRecord, ScoreRecord


@dataclass(frozen=True)
class Updated:
    """What was recorded: the files that changed, how many baselines, and (node id, reason) of what was left out."""

    files: tuple[Path, ...]
    recorded: int
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Recorded:
    """What a check has to record, and what of it may stay as it was."""

    key: CheckKey
    subject: tuple[str | None, ...]
    new: Entry
    asked: frozenset[str]


def update(
    directory: str | os.PathLike[str], records: Iterable[CheckRecord], today: datetime.date | None = None
) -> Updated:
    """Record what a run measured as the baselines of its checks; those of other tests stay as they are.

    Parameters
    ----------
    today
        The day to note; None: this one (UTC).

    Raises
    ------
    ReportError
        A file that is there is no file of baselines, or cannot be written.
    """
    day = (today or datetime.datetime.now(datetime.timezone.utc).date()).isoformat()
    root = Path(directory)
    left_out: list[tuple[str, str]] = []
    found: dict[CheckKey, list[_Recorded]] = defaultdict(list)
    precisions: dict[str, set[str]] = defaultdict(set)
    unended: set[str] = set()
    for record in records:
        precisions[record.nodeid].add(str(record.precision))
        if record.outcome not in {None, "passed"}:
            unended.add(record.nodeid)
        recorded = _recorded(record, day, left_out)
        if recorded is not None:
            found[recorded.key].append(recorded)
    new: dict[tuple[Place, Path], dict[CheckKey, _Recorded]] = defaultdict(dict)
    for key, several in found.items():
        if len({each.subject for each in several}) > 1:
            many = f"{len(several)} checks of it in {key.precision} would have one baseline: parametrize the test"
            left_out.append((key.nodeid, many))
            continue
        # Of a test that was run again, the last run counts.
        new[key.place, root / key.path][key] = several[-1]
    if not new:
        return Updated((), 0, tuple(left_out))
    with files.locked(root):
        # Every file is read before one is written: a damaged one leaves all of them as they were.
        ended = {nodeid: found for nodeid, found in precisions.items() if nodeid not in unended}
        merged = {where: _merged(*where, checks, ended) for where, checks in new.items()}
        for (place, path), tests in sorted(merged.items()):
            files.write(path, place, tests)
    parts = [
        part
        for checks in new.values()
        for each in checks.values()
        for part in (each.new.latency, each.new.errors, each.new.score)
        if part is not None
    ]
    return Updated(tuple(sorted(path for _, path in merged)), len(parts), tuple(left_out))


def _recorded(record: CheckRecord, day: str, left_out: list[tuple[str, str]]) -> _Recorded | None:
    latency, parity = record.latency, record.parity
    asked = {name for name, part in (("latency", latency), ("errors", parity)) if part is not None}
    new = Entry()
    if latency is not None:
        reason = _why_no_latency(record, latency)
        if reason is not None:
            left_out.append((record.nodeid, reason))
        else:
            new = replace(new, latency=_latency(record, latency.details, day))
    score = record.score
    if score is not None and score.baseline is not None:
        asked.add("score")
        reason = _why_no_score(record, score)
        if reason is not None:
            left_out.append((record.nodeid, reason))
        else:
            new = replace(new, score=_score(record, score, score.baseline, day))
    if parity is not None and record.baseline is not None:
        reason = _why_no_errors(record)
        if reason is not None:
            left_out.append((record.nodeid, reason))
        else:
            new = replace(new, errors=_errors(record, record.baseline, day))
    if new == Entry():
        return None
    key = CheckKey(
        Place.of(_gpu(record), record.evidence),
        record.nodeid,
        str(record.precision),
        str(record.backend),
        str(record.evidence),
    )
    return _Recorded(key, _subject(record), new, frozenset(asked))


def _subject(record: CheckRecord) -> tuple[str | None, ...]:
    """What tells a check from others of its test in the same precision, which would have the same baseline."""
    options = record.baseline.made_with.get("options") if record.baseline else None
    limits = ", ".join(sorted(map(" ".join, errors.judged_figures(record))))
    score = record.score.name if record.score else None
    return record.model_sha256, record.inputs_sha256, record.reference_sha256, options, limits, score


def _gpu(record: CheckRecord) -> GpuRecord | None:
    found = record.baseline or (record.score and record.score.baseline)
    if found:
        return found.gpu
    told = (record.latency and record.latency.details.conditions) or Conditions()
    return told.gpu_record


def _why_no_errors(record: CheckRecord) -> str | None:
    """Why the errors of a check are no baseline; None where they are one."""
    assert record.parity is not None
    if record.verdict == "error" or record.parity.verdict != "pass":
        verdict = record.parity.verdict.replace("_", " ")
        reason = record.parity.reason or record.message or "no reason was recorded"
        return f"parity: {verdict}: {reason.splitlines()[0]}"
    builds, _ = errors.of_builds(record)
    if not builds or not any(builds):
        return "no error is a number"
    if record.rebuild and any(is_bad(build.verdict) for build in record.rebuild.builds):
        return "one of the builds did not pass"
    return None


def _errors(record: CheckRecord, now: BaselineRecord, day: str) -> ErrorBaseline:
    builds, engines = errors.of_builds(record)
    return ErrorBaseline(
        model=Path(record.model).name,
        model_sha256=record.model_sha256,
        inputs_sha256=record.inputs_sha256,
        reference_sha256=record.reference_sha256,
        recorded=day,
        engines=engines,
        made_with=now.made_with,
        values={
            output: {
                name: tuple(build[output][name] for build in builds if name in build.get(output, {})) for name in first
            }
            for output, first in builds[0].items()
        },
    )


def _why_no_score(record: CheckRecord, score: ScoreRecord) -> str | None:
    """Why a score is no baseline; None where it is one."""
    if record.verdict == "error" or is_bad(score.verdict):
        return f"score: {score.verdict}: {(score.reason or record.message or '').partition(chr(10))[0]}"
    return None if score.items is not None else f"score: the items of {score.name} are no array of numbers"


def _score(record: CheckRecord, score: ScoreRecord, now: BaselineRecord, day: str) -> ScoreBaseline:
    assert score.items is not None
    return ScoreBaseline(
        model=Path(record.model).name,
        model_sha256=record.model_sha256,
        inputs_sha256=record.inputs_sha256,
        reference_sha256=record.reference_sha256,
        recorded=day,
        made_with=now.made_with,
        name=score.name,
        lower_is_better=score.lower_is_better,
        reference=float(score.reference or 0.0),
        value=float(score.value or 0.0),
        items=score.items,
    )


def _why_no_latency(record: CheckRecord, latency: LatencyRecord) -> str | None:
    """Why a latency is no baseline; None where it is one."""
    details = latency.details
    if not latency.samples or details.distribution is None or details.conditions is None:
        return f"latency was not measured: {latency.reason or record.message or 'no reason was recorded'}"
    if details.conditions.gpu is None:
        return "the latency is of a machine that is not known"
    return _not_passed(record, latency) or _not_exact(details)


def _not_passed(record: CheckRecord, latency: LatencyRecord) -> str | None:
    """What failed besides the baseline itself: the latency of an engine that computes wrongly is no baseline."""
    for name, part in (("parity", record.parity), ("score", record.score)):
        if part and is_bad(part.verdict):
            return f"{name}: {part.verdict}"
    if record.verdict == "error":
        return "the check ended in an error"
    bad = [
        entry.name or entry.quantile or ""
        for entry in latency.budgets
        if entry.name != BASELINE and is_bad(entry.verdict)
    ]
    return f"not within its budget: {', '.join(bad)}" if bad else None


def _not_exact(details: LatencyDetails) -> str | None:
    if details.disturbances:
        return f"the measurement was disturbed: {'; '.join(details.disturbances)}"
    apart = Distribution.from_json(details.distribution).width
    if apart > MIN_SLOWDOWN:
        known = "not known" if apart == float("inf") else f"known to within {apart:.1%}"
        return f"the median is {known}, and {MIN_SLOWDOWN:.0%} is needed: give it more max_seconds"
    return None


def _latency(record: CheckRecord, details: LatencyDetails, day: str) -> LatencyBaseline:
    told = details.conditions or Conditions()
    return LatencyBaseline(
        model=Path(record.model).name,
        model_sha256=record.model_sha256,
        input_shapes=told.input_shapes or {},
        measured=details.measured or "",
        cuda_graph=bool(details.cuda_graph),
        recorded=day,
        tensorrt=told.tensorrt or "",
        driver=told.driver,
        distribution=Distribution.from_json(details.distribution),
        sm_mhz=told.sm_mhz,
        power_limit_w=told.power_limit_w,
        power_mode=told.power_mode,
    )


def _merged(
    place: Place, path: Path, new: Mapping[CheckKey, _Recorded], precisions: Mapping[str, set[str]]
) -> files.Tests:
    _, kept = files.load(path, place)
    for nodeid in {key.nodeid for key in new}:
        # A precision that the test does not have any more goes; one that was measured and left out stays, and so does
        # what a test did not come to.
        old, has = kept.get(nodeid, {}), precisions.get(nodeid)
        kept[nodeid] = {label: each for label, each in old.items() if has is None or label.rsplit(", ", 2)[0] in has}
    for key, recorded in new.items():
        old_parts = vars(kept[key.nodeid].get(key.label, Entry()))
        new_parts = vars(recorded.new)
        # So does a part that could not be trusted this time, while the test still asks for it.
        parts = {name: new_parts[name] or (old_parts[name] if name in recorded.asked else None) for name in new_parts}
        kept[key.nodeid][key.label] = Entry(**parts)
    return kept
