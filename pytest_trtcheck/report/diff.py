"""What changed between two reports: yesterday and today, or one TensorRT and the next.

Checks are matched by node id, precision, backend and place among the checks of one test. What was not measured in the
same way in both is said to be not comparable, never compared: an engine's error beside an emulated one is no
regression.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from pytest_trtcheck.record import SEVERITY, Conditions
from pytest_trtcheck.report import diff_changes
from pytest_trtcheck.report.text import MISSING
from pytest_trtcheck.report.view import failed, missing, natural, verdict_word

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from pytest_trtcheck.record import CheckRecord, Environment, RunRecord
    from pytest_trtcheck.report.diff_changes import Change

Kind: TypeAlias = Literal["worse", "changed", "better", "not comparable"]
KINDS: tuple[Kind, ...] = ("worse", "changed", "better", "not comparable")
"""In the order in which they are shown."""

Key: TypeAlias = tuple[str, str, str, str, int]
"""Node id, precision, backend where a report has several of that test and precision, machine where both reports were
merged, place among what is left."""
AnyKey = TypeVar("AnyKey", bound=tuple[Any, ...])

_SHOWN_SHA = 8


@dataclass(frozen=True)
class Subject:
    """A check by name, with its verdict in the one report that has it, or in the new one."""

    nodeid: str
    precision: str | None
    model: str
    verdict: str
    place: int = 0
    """From 0, among the checks of one test in one precision, on one backend."""
    where: str = ""
    """The backend where a report has it on several, and the machine where both reports were merged."""
    failed: bool = False
    """Whether somebody has to look at it."""


@dataclass(frozen=True)
class CheckDiff:
    """A check that is in both reports and not the same.

    Parameters
    ----------
    obstacles
        Why it cannot be compared; then there are no changes.
    besides
        Of what cannot be compared, what else was given otherwise.
    verdicts
        The old and the new one, in words.
    """

    subject: Subject
    verdicts: tuple[str, str]
    changes: tuple[Change, ...] = ()
    obstacles: tuple[str, ...] = ()
    besides: tuple[Change, ...] = ()

    @property
    def kind(self) -> Kind:
        """The worst that can be said of it."""
        found = {change.direction for change in self.changes}
        if self.obstacles:
            return "not comparable"
        return "worse" if "worse" in found else "better" if "better" in found else "changed"


@dataclass(frozen=True)
class EnvironmentChange:
    """A library, driver or GPU that is another one."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class ReportDiff:
    """What changed. `checks` come worst first; of what did not change there is only the number."""

    environment: tuple[EnvironmentChange, ...]
    checks: tuple[CheckDiff, ...]
    added: tuple[Subject, ...]
    removed: tuple[Subject, ...]
    unchanged: int
    unrecorded: str | None = None
    """What is said of tests that left no record in the new report alone, and were to check something."""

    def of_kind(self, kind: Kind) -> tuple[CheckDiff, ...]:
        """The checks of which this is the worst that can be said."""
        return tuple(check for check in self.checks if check.kind == kind)

    @property
    def is_worse(self) -> bool:
        """Whether any check became worse."""
        return any(check.kind == "worse" for check in self.checks)

    @property
    def new_failures(self) -> tuple[Subject, ...]:
        """The checks that the old report does not have, and that somebody has to look at."""
        return tuple(each for each in self.added if each.failed)

    @property
    def fails_anew(self) -> bool:
        """Whether a check fails that the old report does not have, or that passed there and cannot be compared."""
        return bool(self.new_failures) or any(
            check.obstacles and check.verdicts[0] == "pass" and check.subject.failed for check in self.checks
        )

    @property
    def lost_sight(self) -> bool:
        """Whether something that the old report knew is not known any more: removed, not comparable, not measured, not
        asked for.
        """
        return bool(self.removed or self.unrecorded) or any(
            check.obstacles or any(change.lost or change.verdict == "not_measured" for change in check.changes)
            for check in self.checks
        )


def diff(old: RunRecord, new: RunRecord) -> ReportDiff:
    """Compare two reports.

    Raises
    ------
    ReportError
        A latency distribution in a report cannot be read.
    """
    found = paired(old, new)
    both = [_check(key, (one, two), (old, new)) for key, (one, two) in found.items() if one and two]
    changed = [pair for pair in both if pair.changes or pair.obstacles]
    untold = {(each.nodeid, each.machine) for each in old.missing}
    return ReportDiff(
        environment=environment(old, new),
        # Sorting is stable: what is equally bad stays in the order of the node ids.
        checks=tuple(sorted(changed, key=_badness)),
        added=tuple(subject(key, two) for key, (one, two) in found.items() if two and not one),
        removed=tuple(subject(key, one) for key, (one, two) in found.items() if one and not two),
        unchanged=len(both) - len(changed),
        unrecorded=missing(
            replace(new, missing=tuple(each for each in new.missing if (each.nodeid, each.machine) not in untold))
        ),
    )


def paired(old: RunRecord, new: RunRecord) -> dict[Key, tuple[CheckRecord | None, CheckRecord | None]]:
    """The checks of both reports, each beside its other; None where a report has none. In the order of the node ids.

    One test in one precision on another backend is the same check, unless a report has it on several.
    """
    runs = old.checks, new.checks
    several = {name for checks in runs for name, backends in _backends(checks).items() if len(backends) > 1}
    is_merged = bool(old.machines and new.machines)
    before, after = (_by_key(checks, several, is_merged=is_merged) for checks in runs)
    join_ended_early((before, after))
    keys = sorted({*before, *after}, key=lambda key: (natural(key[0]), *key))
    return {key: (before.get(key), after.get(key)) for key in keys}


def join_ended_early(reports: Sequence[dict[AnyKey, CheckRecord]]) -> None:
    """Let an error that came before precision or backend was known be that of a check which its report lacks.

    Else a check that broke would be one that was removed, beside one that was added. Keys begin with the node id and
    end with machine and place.
    """
    keys: dict[tuple[object, object], list[AnyKey]] = {}
    for key in dict.fromkeys(itertools.chain(*reports)):
        keys.setdefault((key[0], key[-2]), []).append(key)
    for found in reports:
        for key in [key for key, check in found.items() if check.verdict == "error"]:
            known = key[1:-2]
            for other in keys[key[0], key[-2]] if "" in known else ():
                pairs = list(zip(known, other[1:-2], strict=True))
                if other not in found and known != other[1:-2] and all(one in {"", two} for one, two in pairs):
                    found[other] = found.pop(key)
                    break


def _backends(checks: Iterable[CheckRecord]) -> dict[tuple[str, str], set[str | None]]:
    found: dict[tuple[str, str], set[str | None]] = {}
    for check in checks:
        found.setdefault((check.nodeid, check.precision or ""), set()).add(check.backend)
    return found


def _by_key(
    checks: Iterable[CheckRecord], several: Container[tuple[str, str]], *, is_merged: bool
) -> dict[Key, CheckRecord]:
    found: dict[Key, CheckRecord] = {}
    for check in checks:
        name, precision, place = check.nodeid, check.precision or "", 0
        backend = (check.backend or "") if (name, precision) in several else ""
        machine = (check.machine or "") if is_merged else ""
        while (name, precision, backend, machine, place) in found:
            place += 1
        found[name, precision, backend, machine, place] = check
    return found


def subject(key: Key, check: CheckRecord) -> Subject:
    """A check by name."""
    where = " ".join(filter(None, key[2:4]))
    name = key[0], check.precision or key[1] or None, check.model
    return Subject(*name, verdict_word(check), key[-1], where, failed(check))


def _check(key: Key, pair: tuple[CheckRecord, CheckRecord], runs: tuple[RunRecord, RunRecord]) -> CheckDiff:
    old, new = pair
    found = obstacles(old, new, runs)
    changes = () if found else diff_changes.changes(old, new)
    besides = diff_changes.asked_otherwise(old, new) if found else ()
    return CheckDiff(subject(key, new), (verdict_word(old), verdict_word(new)), changes, found, besides)


def _badness(check: CheckDiff) -> tuple[int, int, float]:
    worse = [change for change in check.changes if change.direction == "worse"]
    verdicts = [SEVERITY.index(change.verdict) for change in worse if change.verdict is not None]
    weight = max((change.weight for change in worse or check.changes), default=0.0)
    return KINDS.index(check.kind), -max(verdicts, default=-1), -weight


# --- what makes two checks not comparable ----------------------------------------------------------------------------


def obstacles(old: CheckRecord, new: CheckRecord, runs: tuple[RunRecord, RunRecord]) -> tuple[str, ...]:
    """Why two records of one check cannot be compared; empty where nothing stands against it."""
    found = [_other_model(old, new), _other_reference(old, new), *_other_inputs(old, new)]
    evidence = old.evidence, new.evidence
    if None not in evidence and evidence[0] != evidence[1]:
        found.append(f"other evidence: {evidence[0]} before, {evidence[1]} now")
    ran = [check.gpu_ran for check in (old, new)]
    if evidence == ("provider", "provider") and True in ran and False in ran:
        found.append("a GPU ran it before, and none does now" if ran[0] else "no GPU ran it before, and one does now")
    elif evidence == ("engine", "engine") or (evidence == ("provider", "provider") and False not in ran):
        sides = [_gpus(check, run) for check, run in zip((old, new), runs, strict=True)]
        known = [pair for pair in zip(*sides, strict=True) if None not in pair]
        if known and known[0][0] != known[0][1]:
            found.append(f"another GPU: {known[0][0]} before, {known[0][1]} now")
    return tuple(text for text in found if text)


def _other_model(old: CheckRecord, new: CheckRecord) -> str | None:
    hashes = old.model_sha256, new.model_sha256
    if None not in hashes:
        if hashes[0] == hashes[1]:
            return None
        return f"another model: {_hashes(hashes)}"
    # A model that could not be opened has no hash; then its name has to do, where the check came to know that.
    if _knows_not(old, new, "model_sha256"):
        return None
    return None if old.model == new.model else f"another model: {old.model} before, {new.model} now"


def _other_reference(old: CheckRecord, new: CheckRecord) -> str | None:
    hashes = old.reference_sha256, new.reference_sha256
    if None not in hashes and hashes[0] != hashes[1]:
        return f"another reference: {_hashes(hashes)}"
    if _knows_not(old, new, "reference_sha256"):
        return None
    return None if old.reference == new.reference else f"another reference: {old.reference} before, {new.reference} now"


def _knows_not(old: CheckRecord, new: CheckRecord, name: str) -> bool:
    """Whether one of them ended in an error that may have come before this was known: that it broke is no other one."""
    return any(each.verdict == "error" and getattr(each, name) is None for each in (old, new))


def _hashes(pair: tuple[str | None, str | None]) -> str:
    before, now = (str(each)[:_SHOWN_SHA] for each in pair)
    return f"sha256 {before}… before, {now}… now"


def _other_inputs(old: CheckRecord, new: CheckRecord) -> list[str]:
    # A check that ended before it had its inputs says nothing of them.
    if not old.cases or not new.cases:
        return []
    if old.inputs != new.inputs:
        return [f"other inputs: {old.inputs} before, {new.inputs} now"]
    found = []
    if old.cases != new.cases:
        found.append(f"other inputs: {old.cases} before, {new.cases} now")
    if old.inputs == "generated" and old.seed != new.seed:
        found.append(f"other inputs: seed {old.seed} before, {new.seed} now")
    hashes = old.inputs_sha256, new.inputs_sha256
    if not found and None not in hashes and hashes[0] != hashes[1]:
        found.append(f"other inputs: {_hashes(hashes)}")
    shapes = _conditions(old).input_shapes, _conditions(new).input_shapes
    if not found and None not in shapes and shapes[0] != shapes[1]:
        before, now = ({name: list(shape) for name, shape in (each or {}).items()} for each in shapes)
        found.append(f"other inputs: shapes {before} before, {now} now")
    return found


def _conditions(check: CheckRecord) -> Conditions:
    return (check.latency and check.latency.details.conditions) or Conditions()


def _gpus(check: CheckRecord, run: RunRecord) -> tuple[str | None, ...]:
    """What tells the GPU of a check, the most exact first; only the same source of both reports is comparable."""
    present, latency = environment_of(run, check.machine).gpu, check.latency
    own = check.gpu.name if check.gpu else None
    return (_conditions(check).gpu, own, present.name if present else None, latency.gpu if latency else None)


def environment_of(run: RunRecord, machine: str | None) -> Environment:
    """Where a report's checks ran; in a merged one, those of a machine."""
    return next((each.environment for each in run.machines if each.name == machine), run.environment)


def environment(old: RunRecord, new: RunRecord) -> tuple[EnvironmentChange, ...]:
    """The libraries, driver and GPU that are other ones; of merged reports, on the machines that are in both."""
    machines = {each.name for each in old.machines} & {each.name for each in new.machines}
    return tuple(
        EnvironmentChange(f"{name} ({machine})" if machine else name, *pair)
        for machine in sorted(machines) or (None,)
        for name, pair in changed(old, new, machine).items()
    )


def changed(old: RunRecord, new: RunRecord, machine: str | None) -> dict[str, tuple[str, str]]:
    """What of the environment of a machine is another one, by its name: before and now."""
    before, after = _described(old, machine), _described(new, machine)
    return {
        name: (before.get(name, MISSING), after.get(name, MISSING))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    }


def _described(run: RunRecord, machine: str | None) -> dict[str, str]:
    version = run.tool.version
    return environment_of(run, machine).described() | ({"pytest-trtcheck": version} if version else {})
