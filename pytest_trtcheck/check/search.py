"""`search=`: the input within the spec on which a check errs most, found by trying; one that fails is shrunk and kept.

What counts is what the check itself judges by: how much of its limit the output uses that uses most. Rows of an open
batch dimension are tried together and judged alone, and one that exceeds the limit is found only once the whole case,
as the check has it, exceeds it.
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.check import kept_inputs, parity
from pytest_trtcheck.check.explorer import AT_ONCE, Explorer
from pytest_trtcheck.check.headroom import Headroom
from pytest_trtcheck.check.search_space import space_of
from pytest_trtcheck.errors import ArgumentError, CheckError, plural
from pytest_trtcheck.precision.reference import CallableReference, GoldenReference
from pytest_trtcheck.record import SearchRecord
from pytest_trtcheck.spec import Search

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.check.explorer import Points
    from pytest_trtcheck.check.request import Known, Settings
    from pytest_trtcheck.check.search_space import Space
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.record import OutputRecord

_ROWS = 64
"""Rows that the emulation is given at a time."""
_ELEMENTS = 1 << 20
"""Elements of the inputs that it is given at a time, at the most."""
_OWN = 8
"""Rows of the check's own inputs that the search begins with."""
_LEADS = 0.9
"""What the whole of FP16's range counts for, as a share of the limit."""
_TELL_S = 10.0
_SMALL = 32
"""Changed elements up to which each is made simple by itself."""


def searched(settings: Settings, known: Known) -> Known:
    """The check with what a search for its worst input came to; one that fails is among its cases then.

    Raises
    ------
    ArgumentError, InputError
        The check asks for a search, and nothing can be searched; or its ranges do not fit the model.
    """
    asked = _asked(settings, known)
    if asked is None or known.runner is None or not known.request.judge_parity:
        return known
    if why := _why_not(known):
        return _impossible(known, why)
    if known.outcome is None or known.doubt is not None or known.outcome.record.verdict != "pass":
        return known.recorded("no worse input was searched: the check does not pass on its own ones")
    space, held = space_of(known, asked)
    if not space.size:
        return _impossible(known, f"no input is searched ({'; '.join(held) or 'the model has none'})")
    hunt = _Hunt(known, space, asked, settings.progress)
    with closing(Headroom(known)) as headroom:
        hunt.run(headroom)
    worst = hunt.as_case(hunt.best)
    limits = compare.usage(hunt.judged(worst))
    record = SearchRecord(
        tries=hunt.tries,
        asked=asked.tries,
        seconds=round(time.monotonic() - hunt.start, 3),
        usage=limits.usage,
        own_usage=hunt.own_usage,
        found_at=hunt.found_at,
        output=limits.output or None,
        metric=limits.metric or None,
        value=limits.value,
        limit=limits.limit,
        ranges={name: (span.low, span.high) for name, span in space.spans.items()},
        held=held,
        unusable=hunt.unusable,
    )
    if not hunt.found:
        return known.recorded(_told(record, hunt.unjudged), search=record)
    return _failed(known, record, hunt)


def _why_not(known: Known) -> str | None:
    """Why no other input can be judged."""
    if isinstance(known.reference, GoldenReference):
        return "the reference has outputs of the recorded inputs alone"
    if known.request.parity.score is not None:
        return "a score needs labels, and an input that a search makes has none"
    return None


def _asked(settings: Settings, known: Known) -> Search | None:
    spec = known.request.parity.search
    return spec if settings.search is None else replace(spec or Search(), tries=settings.search)


def _impossible(known: Known, why: str) -> Known:
    """What the check itself asks for is an error, what an option asks of every check a note."""
    if known.request.parity.search is not None:
        raise ArgumentError(
            f"search=: {known.model.label}: {why}",
            "search in a check that judges outputs, with ranges for its inputs",
            code="search-impossible",
        )
    return known.recorded(f"no worse input was searched: {why}")


def _failed(known: Known, record: SearchRecord, hunt: _Hunt) -> Known:
    """The check judged by the input that was found as well, which is kept."""
    for point in (hunt.shrunk(), hunt.best):
        case = hunt.as_case(point)
        with_it = replace(known, cases=[*known.cases, case])
        with known.alone():
            outcome = parity.judge(with_it)
        if outcome.record.verdict != "pass":
            break
    else:
        note = "the search found an input beyond the limit, which keeps it when it is judged with the others"
        return known.recorded(note, _told(record, hunt.unjudged), search=record)
    record = replace(
        record, changed=hunt.changed(point), elements=hunt.space.size, kept=_keep(known, case), seconds=hunt.spent()
    )
    record = replace(record, scale=_scale(known, hunt, case, record.output))
    outcome = replace(outcome, record=replace(outcome.record, keep_fp32=known.fewest))
    with_it = replace(with_it, outcome=outcome)
    return with_it.recorded(
        *outcome.notes, _told(record, hunt.unjudged), parity=outcome.record, search=record, cases=len(with_it.cases)
    )


def _scale(known: Known, hunt: _Hunt, case: Case, output: str | None) -> float | None:
    """How large the reference of an output is on the input found, to what it is on the check's own."""
    there, own = (
        next((each.details.peak for each in outputs if each.name == output), None)
        for outputs in (hunt.judged(case), known.parity.outputs)
    )
    return there / own if own and there is not None else None


def _keep(known: Known, case: Case) -> str | None:
    path = kept_inputs.file_of(known.request, known.model)
    if path is None:
        return None
    try:
        kept_inputs.write(path, [*kept_inputs.read(path, known.model), case], known.model)
    except (OSError, CheckError) as error:
        return f"not kept: {error}"
    return kept_inputs.shown(path)


def _told(record: SearchRecord, unjudged: int) -> str:
    """All of it in a line."""
    tries = f"{record.tries:,}" + (f" of {record.asked:,}" if record.tries < record.asked else "")
    among = ", ".join(f"{name} from {low:g} to {high:g}" for name, (low, high) in record.ranges.items())
    found = (
        f"the worst is try {record.found_at:,}, with {record.metric} {record.value:.3g} of {record.output!r}, "
        f"{record.usage:.0%} of the limit"
        if record.found_at and record.value is not None and math.isfinite(record.usage)
        else f"the worst is try {record.found_at:,}: {record.output!r} does not match its reference at all"
        if record.found_at
        else "none errs more than its own inputs"
    )
    parts = [
        f"search: {tries} {'try' if record.tries == 1 else 'tries'} in {record.seconds:.1f} s among {among}: {found} "
        f"(its own inputs: {record.own_usage:.0%})"
    ]
    if record.changed is not None:
        parts.append(f"shrunk to {plural(record.changed, 'element')} of {record.elements:,} that differ from input [0]")
        if record.kept:
            parts.append(record.kept if record.kept.startswith("not kept") else f"kept in {record.kept}")
    if record.held:
        parts.append(f"not searched: {'; '.join(record.held)}")
    if record.unusable:
        parts.append(f"left out: {record.unusable:,} whose reference is not finite")
    if unjudged:
        parts.append(f"not judged: {unjudged:,} on which a metric cannot be computed")
    return "; ".join(parts)


# --- the search ------------------------------------------------------------------------------------------------------


@dataclass
class _Hunt:
    """One search: what was tried, and the worst of it."""

    known: Known
    space: Space
    asked: Search
    progress: Any
    tries: int = 0
    unusable: int = 0
    unjudged: int = 0
    found: bool = False
    found_at: int | None = None
    own_usage: float = 0.0
    best: Points = field(default_factory=lambda: np.empty(0))
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._deadline = self.start + self.asked.seconds
        self._told_at = self.start
        self._at_once = max(1, AT_ONCE // self.space.size)
        own = self.space.points(self.space.template)
        self.best = self.base = own[0]
        self._alone = parity.limits_of(replace(self.known, cases=[self.space.case(own[:1])]))
        self._whole = parity.limits_of(replace(self.known, cases=[self.space.template]))
        self._finite = _nonfinite(self.known.reference(self.space.template), self.space.rows)
        self.own_usage = compare.usage(self.known.parity.outputs).usage

    def spent(self) -> float:
        """Seconds since it began."""
        return round(time.monotonic() - self.start, 3)

    def run(self, headroom: Headroom) -> None:
        """Try until an input exceeds the limit, or tries or time are used up."""
        same = (case for case in self.known.cases if _shapes(case) == _shapes(self.space.template))
        own = islice((row for case in same for row in self.space.points(case)), min(_OWN, self._at_once))
        explorer = Explorer(list(own), self.space.ordered, np.random.default_rng(self.known.request.parity.seed))
        top = -math.inf
        while not self.found and self.tries < self.asked.tries and time.monotonic() < self._deadline:
            points = explorer.propose()[: self.asked.tries - self.tries]
            scores = self.scores(points)
            for index in np.argsort(-scores, kind="stable"):
                if scores[index] <= max(top, 0.0):
                    break
                if scores[index] > 1:
                    # Rows are no samples of their own in every model: what counts is the case itself.
                    scores[index] = compare.usage(self.judged(self.as_case(points[index]))).usage
                if scores[index] > top:
                    top, self.best, self.found_at = float(scores[index]), points[index], self.tries + int(index) + 1
                self.found = top > 1
                if self.found:
                    break
            tried = points[: len(scores)]
            explorer.observe(tried, self._guided(tried, scores, headroom))
            self.tries += len(scores)
            self._tell(top)

    def _guided(self, points: Points, scores: NDArray[np.float64], headroom: Headroom) -> NDArray[np.float64]:
        """The scores with what leads towards an overflow, beyond what the check's own inputs use of FP16's range."""
        own = headroom.used(self.space.template)
        used = np.array([headroom.used(self.space.case(point[None])) for point in points])
        further = np.maximum(0.0, np.sqrt(used) - math.sqrt(own))
        return np.where((scores > 0) & (scores <= 1), np.minimum(scores + _LEADS * further, 1.0), scores)

    def _tell(self, top: float) -> None:
        if time.monotonic() - self._told_at > _TELL_S:
            self._told_at = time.monotonic()
            used = f"{max(top, 0.0):.0%} of the limit"
            self.progress(
                f"{self.known.title}: {self.tries:,} of {self.asked.tries:,} inputs tried, the worst at {used}"
            )

    def scores(self, points: Points) -> NDArray[np.float64]:
        """How much of its limit each point uses; 0 of what can't be judged. Fewer where the time is up."""
        least, most = self._batch
        found: list[float] = []
        for start in range(0, len(points), most):
            if found and time.monotonic() > self._deadline:
                break
            part = points[start : start + most]
            padded = np.concatenate([part, np.repeat(part[-1:], max(0, least - len(part)), axis=0)])
            actual, expected = self._computed(self.space.case(padded))
            for row in range(len(part)):
                here = slice(row, row + 1) if self.space.by_row else slice(None)
                found.append(self._score(_cut(actual, here), _cut(expected, here)))
        return np.array(found)

    def _score(self, actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> float:
        counts = _nonfinite(expected, 1)
        if any(count > self._finite[name] for name, count in counts.items()):
            self.unusable += 1
            return 0.0
        outputs = parity.judged(self.known, actual, expected, self._alone)
        if any(output.verdict == "error" for output in outputs):
            self.unjudged += 1
            return 0.0
        return compare.usage(outputs).usage

    def _computed(self, case: Case) -> tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]:
        with self.known.alone():
            return self.known.computed(case), self.known.reference.computed(case)

    def judged(self, case: Case) -> list[OutputRecord]:
        """The outputs of a whole case, by the check's own limits."""
        return parity.judged(self.known, *self._computed(case), self._whole)

    def as_case(self, point: Points) -> Case:
        """A point as a case of the check, in every row of it."""
        return self.space.case(np.repeat(point[None], self.space.rows, axis=0))

    @cached_property
    def _batch(self) -> tuple[int, int]:
        """The least and most points that can be run at once."""
        known, space = self.known, self.space
        if not space.by_row:
            return 1, 1
        if isinstance(known.reference, CallableReference):
            return space.rows, space.rows
        if known.running.is_emulation:
            return 1, max(1, min(_ROWS, _ELEMENTS // space.size))
        if known.existing is None and known.system.builds:
            # Always as many: an engine may have kernels to choose, or to compile, for each new shape.
            rows = min(*(span.max[0] for span in known.profile().values()), _ROWS)
            return rows, rows
        return space.rows, space.rows

    # --- the simplest that still fails -------------------------------------------------------------------------------

    def changed(self, point: Points) -> int:
        """How many elements differ from the check's own first input."""
        return int(((point != self.base) | self.space.outside).sum())

    def shrunk(self) -> Points:
        """The found point with as few changes of the check's own input as still fail, and those simple."""
        top = float(self.scores(self.best[None])[0])
        # At the limit itself, the next run might fall on the other side of it.
        self._least = 1 + min(0.05, max(0.0, top - 1) / 2) if math.isfinite(top) else 1.0
        self._deadline = time.monotonic() + max(5.0, self.asked.seconds / 2)
        self._left = max(200, self.asked.tries // 2)
        point = self._fewer(self.best.copy())
        return self._simpler(point)

    def _failing(self, candidates: Iterable[Points]) -> list[Points]:
        """Those of some points that fail, the worst first; none where tries or time are used up.

        Of large inputs not all are held at a time: then those of the first few among which one fails.
        """
        waiting = iter(candidates)
        while self._left > 0 and time.monotonic() <= self._deadline:
            some = list(islice(waiting, self._at_once))
            if not some:
                break
            self._left -= len(some)
            scores = self.scores(np.array(some))
            order = np.argsort(-scores, kind="stable")
            failing = [some[int(index)] for index in order if scores[index] > 1 and scores[index] >= self._least]
            if failing:
                return failing
        return []

    def _fewer(self, point: Points) -> Points:
        """Blocks of changes taken back, the largest first, while it fails without them (Zeller's ddmin)."""
        parts = 2
        while True:
            changed = np.flatnonzero(point != self.base)
            parts = min(parts, len(changed))
            blocks = np.array_split(changed, parts) if len(changed) > 1 else []
            failing = self._failing(self._with(point, block, self.base[block]) for block in blocks)
            if failing:
                point = self._together(point, failing)
            elif parts >= len(changed) or self._left <= 0 or time.monotonic() > self._deadline:
                return point
            else:
                parts *= 2

    def _together(self, point: Points, failing: list[Points]) -> Points:
        """As many of the changes taken back at once as can be taken back one by one: all, half of them, …"""
        count = len(failing)
        while count > 1:
            back = np.any([each == self.base for each in failing[:count]], axis=0)
            smaller = self._failing([np.where(back, self.base, point)])
            if smaller:
                return smaller[0]
            count //= 2
        return failing[0]

    def _simpler(self, point: Points) -> Points:
        """What is left of the changes with the simplest values that still fail: ends, the middle, few digits."""
        changed = np.flatnonzero(point != self.base)
        groups = [changed, *(changed[:, None] if len(changed) <= _SMALL else ())]
        for group in groups:
            simple = [0.0, 1.0, 0.5, *(point[group].round(digits) for digits in (1, 2, 3))]
            candidates = [self._with(point, group, each) for each in simple]
            failing = {id(each) for each in self._failing(candidates)}
            point = next((each for each in candidates if id(each) in failing), point)
        return point

    @staticmethod
    def _with(point: Points, places: Any, new: Any) -> Points:
        changed = point.copy()
        changed[places] = new
        return changed


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in case.items()}


def _cut(outputs: Mapping[str, NDArray[Any]], rows: slice) -> dict[str, NDArray[Any]]:
    return {name: array[rows] if rows != slice(None) else array for name, array in outputs.items()}


def _nonfinite(outputs: Mapping[str, NDArray[Any]], rows: int) -> dict[str, float]:
    """How many elements of each output are NaN or infinite, a row."""
    floats = {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
    return {name: float((~np.isfinite(array)).sum()) / rows for name, array in floats.items()} | {
        name: 0.0 for name in outputs if name not in floats
    }
