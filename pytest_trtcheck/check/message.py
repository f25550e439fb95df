"""What a check says: all of its text is put together here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import compare
from pytest_trtcheck.errors import CheckError, Code, UnsupportedTargetError, plural
from pytest_trtcheck.metrics import recorded
from pytest_trtcheck.record import BASELINE, is_bad

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.check.request import Known
    from pytest_trtcheck.record import CheckRecord, ScoreRecord


def conclusion(known: Known, *, require_gpu: bool) -> dict[str, Any]:
    """Message, code and verdict of a record whose parts are judged."""
    record = known.record
    found = comparison(known)
    others = [part for name, part in record.parts.items() if name != "parity"]
    if found is None or any(part.verdict == record.verdict != "pass" for part in others):
        reasons = [
            part.reason for part in record.parts.values() if part.reason and part.verdict == record.verdict != "pass"
        ]
        found = "\n".join(filter(None, [found, *(each for each in reasons if each not in (found or ""))])) or None
        if record.score is not None and is_bad(record.score.verdict) and record.score.verdict == record.verdict:
            found = "\n".join(filter(None, [found, *scored(record.score)]))
    # What is measured to be compared alone was not asked for.
    asked = {name: part for name, part in record.parts.items() if name != "latency" or known.request.latency}
    missing = [f"{name} not measured" for name, part in asked.items() if part.verdict == "not_measured"]
    if not missing and record.latency is not None:
        entries = [each for each in record.latency.budgets if each.name != BASELINE]
        missing += [f"{each.name} not measured ({each.text})" for each in entries if each.verdict == "not_measured"]
    if record.evidence is not None and record.gpu_ran is not True:
        where = "emulated on the CPU" if known.running.is_emulation else f"run {known.running.how}"
        what = "parity" if record.parity else "the score" if record.score else "parity"
        missing.append(f"{what} was {where}" + (", on a GPU or not" if record.gpu_ran == "unknown" else ""))
    if not require_gpu or not missing or record.verdict == "error":
        return {"message": found, "code": code_of(known)}
    refused = f"--trt-require-gpu: {', '.join(missing)}"
    if record.verdict == "fail":
        return {"message": f"{found}\n{refused}" if found else refused, "code": code_of(known)}
    return {"verdict": "fail", "message": f"{refused}\n{found}" if found else refused, "code": "gpu-required"}


def code_of(known: Known) -> Code | None:
    """The code of a verdict: of the part that decided it, outputs first."""
    record = known.record
    if record.verdict in {"pass", "not_measured"}:
        return "not-measured" if record.verdict == "not_measured" else None
    if record.parity is not None and record.parity.verdict == record.verdict:
        return _code_of_outputs(known)
    if record.score is not None and record.score.verdict == record.verdict:
        is_kept = record.score.baseline is not None and record.score.baseline.verdict == "fail"
        if record.verdict == "fail":
            return "baseline-exceeded" if is_kept else "score-dropped"
        return "score-inconclusive"
    exceeded = [each.name for each in record.budgets if is_bad(each.verdict)]
    if record.verdict == "fail":
        return "baseline-exceeded" if exceeded == [BASELINE] else "budget-exceeded"
    return "latency-inconclusive"


def _code_of_outputs(known: Known) -> Code | None:
    if known.doubt is not None:
        return known.doubt_code
    if known.outcome is not None and known.outcome.error is not None:
        return known.outcome.error.code
    judged = [each for output in known.parity.outputs for each in output.judged if is_bad(each.verdict)]
    if any(each.metric == "nonfinite" for each in judged):
        return "outputs-not-finite"
    return "baseline-exceeded" if judged and all(each.is_of_baseline for each in judged) else "outputs-differ"


def refused(record: CheckRecord, error: CheckError, *, require_gpu: bool) -> CheckRecord:
    """A check that could not be made. Of several systems that are compared, one that can't serve it is no error."""
    if record.system is None or not isinstance(error, UnsupportedTargetError):
        return replace(record, verdict="error", message=error.text, code=error.code)
    if require_gpu:
        reason = f"--trt-require-gpu: {record.system} was not measured: {error.text}"
        return replace(record, verdict="fail", message=reason, code="gpu-required")
    return replace(record, verdict="not_measured", message=error.text, code="not-measured")


_SMALL = 0.3
"""Of how much of its usual size on an output is small."""


def _found_by(known: Known, case: int) -> str:
    """How the input that fails came about, where a search found it; empty where the check brought it."""
    found = known.record.search
    if found is None or found.changed is None:
        is_kept = known.kept_from is not None and case >= known.kept_from
        return f"input {case}, which an earlier search found and kept, fails" if is_kept else ""
    kept = f"it is kept in {found.kept}, and judged in each later run" if found.kept else "it was not kept"
    if found.kept and found.kept.startswith("not kept"):
        kept = found.kept
    small = ""
    if found.scale is not None and found.scale < _SMALL and recorded(found.metric or "").relative:
        small = (
            f"\n{found.output!r} is {found.scale:.2g} times as large there as on the check's own inputs, and its error "
            "is relative to that; metric='allclose' judges small outputs by their absolute error"
        )
    return (
        f"an input that a search found fails (try {found.found_at:,} of {found.asked:,}): it differs from the "
        f"check's own first input in {found.changed:,} of {plural(found.elements or 0, 'element')}; {kept}{small}"
    )


def scored(score: ScoreRecord) -> Iterator[str]:
    """Which samples lost, and what is known of the outputs behind a score that did not pass."""
    if score.worst:
        told = (
            f"inputs[{each.case}] sample {each.sample}: {_item(each.reference)} → {_item(each.value)}"
            for each in score.worst
        )
        yield f"  changed: {'; '.join(told)}" + ("; …" if score.disagreeing > len(score.worst) else "")
    if score.errors:
        told = (f"{name} {'none' if error is None else f'{error:.3g}'}" for name, error in score.errors.items())
        yield (
            f"  outputs, not judged: max|y−r| / max|r| {', '.join(told)} in the first "
            f"{plural(score.errors_of_cases or 0, 'case')}; tol= judges them too, and says who is to blame"
        )


def _item(item: float | str | None) -> str:
    return f"{item:.4g}" if isinstance(item, float) else str(item)


def comparison(known: Known) -> str | None:
    """What a comparison that did not pass says: who is to blame, and where the outputs differ."""
    outcome = known.outcome
    if known.doubt is not None:
        return f"{known.title}: {known.doubt}"
    if outcome is None or outcome.record.verdict == "pass":
        return None
    if outcome.error is not None:
        return outcome.error.text
    blame = known.record.parity.blame if known.record.parity else None
    differs = "differs from" if outcome.record.verdict == "fail" else "cannot be judged against"
    head = f"{known.title} {differs} {known.reference.title} ({known.running.how})"
    if found_by := _found_by(known, outcome.worst):
        head = f"{found_by}\n\n{head}"
    text = compare.explain(outcome.measured, outcome.record.outputs, outcome.found, is_diagnosed=blame is not None)
    if known.no_fewest:
        text = f"{known.no_fewest}\n\n{text}"
    if blame is None:
        return f"{head}: {outcome.misplaced}\n\n{text}" if outcome.misplaced else f"{head}\n\n{text}"
    # With the libraries for graphs it takes half a second to load, which a check that passes has no use for.
    from pytest_trtcheck.diagnose import text as diagnosis

    return f"{head}: {diagnosis.verdict(blame)}\n\n{diagnosis.explain(blame)}\n\n{text}"
