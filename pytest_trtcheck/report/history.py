"""How checks went from report to report: errors, latencies and scores over time, and where one rose.

A check is followed by node id, precision and machine. Each quantity is held against what it was when it last changed,
not against the report before: a rise in many small steps is a rise. What cannot be compared (another model, other
inputs, another kind of evidence) is said, and its line is broken there.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_trtcheck.errors import listed, plural
from pytest_trtcheck.report import diff, diff_changes
from pytest_trtcheck.report.diff_changes import Change
from pytest_trtcheck.report.merge import machine_name, refuse_twins, repeated
from pytest_trtcheck.report.text import (
    MISSING,
    columns,
    format_limit,
    format_number,
    one_line,
    short_commit,
    short_time,
    shorten_middle,
)
from pytest_trtcheck.report.view import WORDS, budgets, decisive, failed, judgements, natural, verdict_word

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.record import CheckRecord, RunRecord

Key: TypeAlias = tuple[str, str, str, int]
"""Node id, precision, machine, place among the checks of one test."""

_LOOKS_LIKE_IT = 1.1
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Moment:
    """One report: what it is called, and what it holds. `number` is from 1, the oldest first."""

    number: int
    name: str
    run: RunRecord
    environment: tuple[str, ...] = ()
    """What of the environment is another one than in the report of the same machine before."""
    repeated: Mapping[str, int] = field(default_factory=dict)
    """The machines whose run another report holds as well, and the first that does: a merged one and its parts."""

    @property
    def when(self) -> str:
        """When it began, to the minute; empty where the report does not say."""
        return short_time(self.run.started) if self.run.started else ""

    @property
    def revision(self) -> str:
        """The commit, as short as git shows it; empty where the report does not say."""
        return short_commit(self.run.commit) if self.run.commit else ""

    @property
    def software(self) -> str:
        """The TensorRT."""
        return self.run.environment.described().get("TensorRT", "")

    @property
    def machines(self) -> str:
        """Where it ran."""
        return one_line(", ".join(sorted(_machines(self.run))))

    @property
    def counts(self) -> str:
        """How many checks came to what."""
        words = Counter(map(verdict_word, self.run.checks))
        lost = sum(each.outcome != "skipped" for each in self.run.missing)
        told = [f"{words[word]} {word}" for word in WORDS if words[word]]
        return ", ".join([*told, *([f"{lost} without a record"] if lost else [])]) or "no checks"

    @property
    def title(self) -> str:
        """How a line of text names it."""
        return ", ".join(filter(None, (f"report {self.number}", self.when, self.revision)))


@dataclass(frozen=True)
class Turn:
    """Where a check changed, and what; or why it could not be compared there. `place` is among those of the track."""

    place: int
    moment: Moment
    changes: tuple[Change, ...] = ()
    obstacles: tuple[str, ...] = ()

    @property
    def is_worse(self) -> bool:
        """Whether something became worse."""
        return any(change.direction == "worse" for change in self.changes)

    @property
    def word(self) -> str:
        """What happened there, in a word."""
        if self.obstacles:
            return "not compared"
        found = {change.direction for change in self.changes}
        return next((word for word in ("worse", "better", "changed") if word in found), "perhaps worse or better")

    def marks(self, line: Line) -> bool:
        """Whether it is this quantity that became worse."""
        names = {line.what, f"{line.what} drop"}
        return any(change.direction == "worse" and change.what in names for change in self.changes)

    @property
    def text(self) -> str:
        """All of it, in words."""
        said = [
            f"{change.what} {change.old} → {change.new}{f' ({change.remark})' if change.remark else ''}"
            for change in self.changes
        ]
        return one_line("; ".join([*said, *self.obstacles]))


@dataclass(frozen=True)
class Line:
    """One quantity over the reports of a track: None where it is not known.

    Parameters
    ----------
    what
        Such as "boxes max", "p50", "top1".
    unit
        What its values are in.
    limit
        The newest one, where there is one.
    """

    what: str
    unit: str
    values: tuple[float | None, ...]
    limit: float | None = None

    @property
    def known(self) -> list[float]:
        """The values that are known."""
        return [value for value in self.values if value is not None]

    @property
    def text(self) -> str:
        """The first and the last value, and the limit."""
        ends = list(dict.fromkeys(map(format_number, (self.known[0], self.known[-1]))))
        limit = f", limit {format_limit(self.limit)}" if self.limit is not None else ""
        return f"{' → '.join(ends)}{f' {self.unit}' if self.unit else ''}{limit}"

    @property
    def bars(self) -> str:
        """A character for each report, as high as its value is between nothing and the largest; a dot where none is."""
        top = max((abs(value) for value in self.known if math.isfinite(value)), default=0.0) or 1.0
        return "".join("·" if value is None else _bar(value, top) for value in self.values)


def _bar(value: float, top: float) -> str:
    last = len(_BARS) - 1
    return _BARS[min(int(abs(value) / top * len(_BARS)), last) if math.isfinite(value) else last]


@dataclass(frozen=True)
class Track:
    """One check over all reports of its machine; None where one does not hold it."""

    nodeid: str
    precision: str | None
    machine: str
    model: str
    moments: tuple[Moment, ...]
    records: tuple[CheckRecord | None, ...]
    turns: tuple[Turn, ...]
    lines: tuple[Line, ...]
    gone: str = ""
    """Why the newest report does not hold it, where it does not."""

    @property
    def fails_anew(self) -> bool:
        """Whether it fails, and the newest report of its machine is the first that holds it."""
        newest = self.records[-1]
        return newest is not None and failed(newest) and len(self.records) > 1 and not any(self.records[:-1])

    @property
    def remark(self) -> str:
        """What there is to say beside its turns."""
        return self.gone or ("new, and it does not pass" if self.fails_anew else "")

    @property
    def word(self) -> str:
        """The verdict of the newest report that holds it."""
        return verdict_word(next(record for record in reversed(self.records) if record is not None))

    @property
    def worse(self) -> tuple[Turn, ...]:
        """Where it became worse."""
        return tuple(turn for turn in self.turns if turn.is_worse)

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing to tell of it."""
        return not self.turns and not self.remark

    @property
    def verdicts(self) -> str:
        """Its verdicts, where they were not always the same."""
        words = [verdict_word(record) for record in self.records if record]
        return " → ".join(word for place, word in enumerate(words) if place == 0 or word != words[place - 1])


@dataclass(frozen=True)
class History:
    """Reports in the order of time, and what became of their checks: what became worse comes first."""

    moments: tuple[Moment, ...]
    tracks: tuple[Track, ...]
    untimed: tuple[str, ...] = ()
    """The reports that do not say when they began: then all stand in the order in which they were given."""

    @property
    def is_worse(self) -> bool:
        """Whether anything became worse in the newest report of its machine, or fails that is new there."""
        worse = (turn.moment is track.moments[-1] for track in self.tracks for turn in track.worse)
        return any(worse) or any(track.fails_anew for track in self.tracks)

    @property
    def told(self) -> str:
        """How many became worse, and how many fail that are new."""
        worse, new = (
            sum(map(bool, found))
            for found in ((track.worse for track in self.tracks), (track.fails_anew for track in self.tracks))
        )
        return f"{worse} became worse" + (f", {new} {'is' if new == 1 else 'are'} new and not passing" if new else "")


def history(reports: Sequence[tuple[str, RunRecord]]) -> History:
    """What became of the checks of several reports.

    Parameters
    ----------
    reports
        What each is called (its path), and what it holds; at least one.

    Raises
    ------
    ReportError
        One is given twice, or a latency distribution in one cannot be read.
    """
    refuse_twins(reports)
    begun = [_instant(run.started) for _, run in reports]
    untimed = tuple(name for (name, _), when in zip(reports, begun, strict=True) if when is None)
    order = range(len(reports)) if untimed else sorted(range(len(reports)), key=lambda place: begun[place] or 0.0)
    timed = [reports[place] for place in order]
    moments = tuple(_moments(timed))
    keyed = [{key: check for key, check in _keyed(each.run) if key[2] not in each.repeated} for each in moments]
    diff.join_ended_early(keyed)
    found: dict[Key, dict[int, CheckRecord]] = {}
    for moment, records in zip(moments, keyed, strict=True):
        for key, record in records.items():
            found.setdefault(key, {})[moment.number] = record
    tracks = [_track(key, records, moments) for key, records in found.items()]
    tracks.sort(key=lambda track: (_interest(track), natural(track.nodeid), track.precision or "", track.machine))
    return History(moments, tuple(tracks), untimed)


def _instant(started: str | None) -> float | None:
    """When a run began, in seconds; None where the report does not say."""
    try:
        when = datetime.fromisoformat((started or "").replace("Z", "+00:00"))
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def _interest(track: Track) -> tuple[int, int]:
    """What is to be looked at first: what became worse, the latest first; then what changed otherwise."""
    if track.worse or track.fails_anew:
        return 0, -(track.worse[-1].moment if track.worse else track.moments[-1]).number
    return (2, 0) if track.is_quiet else (1, 0)


def _moments(reports: Sequence[tuple[str, RunRecord]]) -> Iterator[Moment]:
    last: dict[str, RunRecord] = {}
    told_before: dict[int, dict[str, int]] = defaultdict(dict)
    for place, part, _, first in repeated(reports):
        told_before[place + 1][part.name] = first + 1
    for number, (name, run) in enumerate(reports, 1):
        machine = ", ".join(sorted(_machines(run)))
        before = last.get(machine)
        changed = diff.environment(before, run) if before else ()
        last[machine] = run
        told = [f"{each.name} {each.old} → {each.new}" for each in changed]
        told += [f"{each}: the run of report {first}, counted once" for each, first in told_before[number].items()]
        yield Moment(number, name, run, tuple(told), told_before[number])


def _machines(run: RunRecord) -> set[str]:
    return {each.name for each in run.machines} or {machine_name(run.environment)}


def _keyed(run: RunRecord) -> Iterator[tuple[Key, CheckRecord]]:
    places: Counter[tuple[str, str, str]] = Counter()
    for check in run.checks:
        name = (check.nodeid, check.precision or "", check.machine or machine_name(run.environment))
        yield (*name, places[name]), check
        places[name] += 1


def _track(key: Key, found: Mapping[int, CheckRecord], moments: Sequence[Moment]) -> Track:
    own = tuple(moment for moment in moments if key[2] in _machines(moment.run) - moment.repeated.keys())
    records = tuple(found.get(moment.number) for moment in own)
    newest = found[max(found)]
    return Track(
        nodeid=key[0],
        precision=newest.precision,
        machine=key[2],
        model=newest.model,
        moments=own,
        records=records,
        turns=tuple(_turns(records, own)),
        lines=tuple(_lines(records, newest)),
        gone="" if records[-1] else _gone(key, own),
    )


def _gone(key: Key, moments: Sequence[Moment]) -> str:
    """Why the newest report of its machine does not hold a check, as far as it tells."""
    reasons = [each.reason for each in moments[-1].run.missing if each.nodeid == key[0]]
    return one_line("; ".join(["not in the newest report", *reasons]))


def _turns(records: Sequence[CheckRecord | None], moments: Sequence[Moment]) -> Iterator[Turn]:
    """Where something changed, each quantity held against what it was when it last did."""
    first: int | None = None
    last_changed: dict[str, int] = {}
    told_gone: set[str] = set()
    for place, record in enumerate(records):
        if record is None:
            continue
        if first is None:
            first = place
            continue
        anchors = sorted({first, *last_changed.values()}, reverse=True)
        obstacles = next(filter(None, (_obstacles(records, moments, each, place) for each in anchors)), ())
        if obstacles:
            # From here on it is another check, as far as figures go.
            yield Turn(place, moments[place], _failed_anew(records, place), obstacles)
            first, last_changed, told_gone = place, {}, set()
            continue
        found: list[Change] = []
        gone: set[str] = set()
        held = {
            what: _held_against(part, records, last_changed.get(what, first), place)
            for what, part in _measured_ways(record).items()
        }
        for anchor in sorted({*anchors, *held.values()}):
            then = records[anchor]
            assert then is not None
            found += [
                change
                for change in diff_changes.changes(then, record)
                if held.get(change.what, last_changed.get(change.what, first)) == anchor
                and _is_told(change, then, record)
            ]
            gone |= _judged(then) - _judged(record) if anchor in anchors else set()
        # What a check that broke does not tell is said once, and held against what it was before when it is told again.
        gone -= _judged(record)
        told_gone &= gone
        found = [change for change in found if change.what not in told_gone]
        told_gone |= gone & {change.what for change in found}
        last_changed |= {change.what: place for change in found if change.what not in gone}
        if found:
            yield Turn(place, moments[place], tuple(found))


def _failed_anew(records: Sequence[CheckRecord | None], place: int) -> tuple[Change, ...]:
    """That a check fails now, and did not in the report before that has it: nothing else is said of another one."""
    before, now = next(filter(None, reversed(records[:place])), None), records[place]
    assert before is not None
    assert now is not None
    if verdict_word(before) != "pass" or not failed(now):
        return ()
    return (Change("verdict", "worse", "pass", verdict_word(now), verdict=now.verdict),)


_Part: TypeAlias = Literal["score", "latency", "engine"]


def _measured_ways(record: CheckRecord) -> dict[str, _Part]:
    """The changes of what may be measured in another way, in a check that is the same: by what they are called."""
    found: dict[str, _Part] = {}
    if record.score is not None:
        found |= {f"{record.score.name} {what}": "score" for what in ("drop", "max_drop", "of the reference")}
    if record.latency is not None:
        found |= dict.fromkeys(("p50", "p90", "p95", "p99"), "latency")
    if record.engine is not None:
        layers = (f"layers in {name}" for name in record.engine.layers_by_precision or ())
        found |= dict.fromkeys(("engine size", "device memory", *layers), "engine")
    return found


def _held_against(part: _Part, records: Sequence[CheckRecord | None], base: int, place: int) -> int:
    """The record that a quantity is held against: when it last changed, or the first since that measured it alike."""
    now = records[place]
    assert now is not None
    alike = (each for each in range(base, place) if (then := records[each]) and _measures_alike(part, then, now))
    return next(alike, base)


def _measures_alike(part: _Part, old: CheckRecord, new: CheckRecord) -> bool:
    if part == "engine":
        return old.engine is not None and new.engine is not None and old.compiled_for == new.compiled_for
    if part == "latency":
        if old.latency is None or new.latency is None:
            return False
        return not diff_changes.measured_otherwise(old.latency.details, new.latency.details)
    if old.score is None or new.score is None:
        return False
    return (old.score.name, old.score.labels_sha256) == (new.score.name, new.score.labels_sha256)


def _is_told(change: Change, old: CheckRecord, new: CheckRecord) -> bool:
    """Whether a change is worth a line: where nobody can tell whether a latency is another one, if it looks like it."""
    if change.direction != "untested":
        return True
    values = [_quantile(record, change.what) or 0.0 for record in (old, new)]
    return max(values) > _LOOKS_LIKE_IT * min(values)


def _judged(record: CheckRecord) -> set[str]:
    """The errors that a record tells, as changes of them are called."""
    return set(map(" ".join, diff_changes.by_place(record)))


def _obstacles(
    records: Sequence[CheckRecord | None], moments: Sequence[Moment], before: int, place: int
) -> tuple[str, ...]:
    old, new = records[before], records[place]
    assert old is not None
    assert new is not None
    return diff.obstacles(old, new, (moments[before].run, moments[place].run))


def _lines(records: Sequence[CheckRecord | None], newest: CheckRecord) -> Iterator[Line]:
    judged = decisive(newest) or next(filter(None, (decisive(each) for each in reversed(records) if each)), None)
    if judged is not None:
        values = [_error(record, judged.output, judged.metric) for record in records]
        what = f"{judged.output or ''} {judged.metric}".strip()
        yield from _known(Line(what, "", tuple(values), judged.limit))
    limits = {budget.name: budget.limit for budget in budgets(newest)}
    for name in ("p50", "p99"):
        values = [_quantile(record, name) for record in records]
        yield from _known(Line(name, "ms", tuple(values), limits.get(name)))
    scores = [record.score.value if record and record.score else None for record in records]
    name = next((record.score.name for record in reversed(records) if record and record.score), "")
    yield from _known(Line(name, "", tuple(scores)))


def _known(line: Line) -> Iterator[Line]:
    if line.known:
        yield line


def _error(record: CheckRecord | None, output: str | None, metric: str) -> float | None:
    if record is None:
        return None
    return next((each.value for each in judgements(record) if (each.output, each.metric) == (output, metric)), None)


def _quantile(record: CheckRecord | None, name: str) -> float | None:
    latency = record.latency if record else None
    value: float | None = getattr(latency, f"{name}_ms") if latency and latency.samples else None
    return value


# --- as text ----------------------------------------------------------------------------------------------------------


def lines(found: History, width: int) -> list[str]:
    """A history for a terminal: the reports, then every check that changed."""
    from pytest_trtcheck.report.terminal import Table, wrapped

    rows = [
        (f"{each.number}  {each.name}", each.when or "not told", each.revision or MISSING, each.counts)
        for each in found.moments
    ]
    table = Table(("report", "began", "commit", "checks"), ("<",) * 4, list(rows))
    shown = [line.text.rstrip() for line in table.lines(width)]
    if found.untimed:
        shown += wrapped(f"in the order given: {listed(found.untimed)}: no time is in there", width)
    for moment in found.moments:
        if moment.environment:
            shown += wrapped(f"report {moment.number}: {'; '.join(moment.environment)}", width)
    for track in found.tracks:
        if not track.is_quiet:
            shown += ["", *_told(track, width)]
    quiet = sum(track.is_quiet for track in found.tracks)
    last = f"{plural(len(found.tracks), 'check')} in {plural(len(found.moments), 'report')}: "
    return [*shown, "", f"{last}{found.told}, {quiet} stayed as {'it was' if quiet == 1 else 'they were'}"]


def _told(track: Track, width: int) -> Iterator[str]:
    """What became of one check."""
    from pytest_trtcheck.report.terminal import wrapped

    name = " ".join(filter(None, (track.nodeid, track.precision)))
    yield from wrapped(one_line(f"{name} on {track.machine}: {track.verdicts}"), width)
    names = [shorten_middle(one_line(line.what), 20) for line in track.lines]
    longest = max(map(columns, names), default=0)
    for name, line in zip(names, track.lines, strict=True):
        # The newest ones, where there is no room for all.
        bars = line.bars[-max(8, width - longest - columns(line.text) - 6) :]
        yield f"  {name}{' ' * (longest - columns(name))}  {bars}  {line.text}"
    for turn in track.turns:
        for part in wrapped(f"{turn.word} in {turn.moment.title}: {turn.text}", width - 2):
            yield f"  {part}"
    for part in wrapped(track.remark, width - 2):
        yield f"  {part}"
