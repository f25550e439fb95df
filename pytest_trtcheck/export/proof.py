"""What the checks of a run prove: of an engine, and of the ONNX file that it was built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.record import is_bad, jsonable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.record import CheckRecord, LatencyRecord, ParityRecord, ScoreRecord


@dataclass(frozen=True)
class Objection:
    """Why something is not proved: in a word or two, for lists, and in full.

    `said` is what several may share; `about` names the check that it is said of, of which there are `more`.
    """

    word: str
    said: str
    about: str = ""
    more: int = 0

    @property
    def text(self) -> str:
        """All of it."""
        return ": ".join(filter(None, (self.about, self.said))) + (f"; and {self.more} more" if self.more else "")


class NotProvedError(Exception):
    """It is left out; `objection` says why."""

    def __init__(self, word: str, said: str, about: str = "", more: int = 0) -> None:
        self.objection = Objection(word, said, about, more)
        super().__init__(self.objection.text)


def require_sound(checks: Sequence[CheckRecord]) -> None:
    """See that every check passed, once, in a test that passed, and that one of them compared outputs."""
    _raise_first([found for check in checks if (found := _unsound(check))])
    if not any(check.parity or check.score for check in checks):
        raise NotProvedError(
            "nothing compared", "its outputs were never compared: no check of it asked for parity or a score"
        )


def require_engine(checks: Sequence[CheckRecord]) -> None:
    """See that the checks prove an engine: sound, made on a GPU, and nothing that was asked for left unmeasured."""
    _raise_first([found for check in checks if (found := _unsound(check) or _unmeasured(check))])
    require_sound(checks)


def ran_on_gpu(check: CheckRecord) -> bool:
    """Whether a GPU ran an engine of it, and its outputs were compared."""
    judged = [part.verdict for part in (check.parity, check.score) if part is not None]
    return check.evidence == "engine" and bool(judged) and set(judged) == {"pass"}


def _raise_first(found: Sequence[Objection]) -> None:
    if found:
        first = found[0]
        raise NotProvedError(first.word, first.said, first.about, len(found) - 1)


def _unsound(check: CheckRecord) -> Objection | None:
    """Why one check proves nothing, or proves the opposite."""
    nodeid = check.nodeid
    why = f": {check.headline}" if check.headline else ""
    if is_bad(check.verdict):
        return Objection(check.verdict, f"{check.verdict}{why}", nodeid)
    if check.outcome != "passed":
        if check.verdict == "not_measured":
            return Objection("not measured", f"not measured{why}", nodeid)
        ended = "xfailed" if check.expected_failure else check.outcome or "not seen to end"
        return Objection(f"test {ended}", f"the check passed, but the test was {ended}", nodeid)
    for name, part in (("parity", check.parity), ("score", check.score)):
        if part and part.verdict != "pass":
            return Objection("not measured", f"{name} {_verdict(part)}", nodeid)
    if check.runs > 1:
        # It was made until it passed.
        text = f"passed in run {check.runs} of the test alone, so it may not pass the next time"
        return Objection("rerun", text, nodeid)
    return None


def _unmeasured(check: CheckRecord) -> Objection | None:
    """Why one sound check does not prove an engine."""
    nodeid = check.nodeid
    if check.evidence != "engine":
        how = f"it was compiled for {check.compiled_for} and never ran: " if check.compiled_for else ""
        return Objection("not run on a GPU", f"{how}its outputs were emulated on the CPU", nodeid)
    if check.latency and check.latency.verdict != "pass":
        return Objection("not measured", f"latency {_verdict(check.latency)}", nodeid)
    return None if check.verdict == "pass" else Objection("not measured", "not measured", nodeid)


def _verdict(part: ParityRecord | ScoreRecord | LatencyRecord) -> str:
    return part.verdict.replace("_", " ") + (f": {part.reason}" if part.reason else "")


def of_inputs(check: CheckRecord) -> dict[str, Any]:
    """Which check it is, and of what inputs."""
    return {"nodeid": check.nodeid, "cases": check.cases, "inputs": check.inputs, "seed": check.seed}


def parity(check: CheckRecord, found: ParityRecord) -> dict[str, Any]:
    """The measured errors of a check, as manifests have them."""
    hidden = ("worst_index", "verdict", "details")
    return {
        **of_inputs(check),
        **some(found, "metric", "worst", "tol", "tol_source"),
        "outputs": [{n: v for n, v in jsonable(each).items() if n not in hidden} for each in found.outputs],
    }


def score(found: ScoreRecord) -> dict[str, Any]:
    """The score of a check, as manifests have it."""
    bounds = ("lower", "upper", "confidence", "max_drop", "lower_is_better")
    return some(found, "name", "reference", "value", "drop", *bounds, "samples")


def some(record: object, *names: str) -> dict[str, Any]:
    """Some fields of a record as JSON values."""
    return {name: value for name, value in jsonable(record).items() if name in names}
