"""Does the model still do its task? The score of what runs, beside that of the reference, on the same samples."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.baselines.scores import packed
from pytest_trtcheck.check.exercised import ENOUGH, Mismatch, ruined, scored
from pytest_trtcheck.compare.paired import CONFIDENCE, RESAMPLES, Drop, describe, drop_of_aggregate, drop_of_means, same
from pytest_trtcheck.errors import CheckError, ComparisonError, InputError, kind_of, name_of, plural
from pytest_trtcheck.model import labelled
from pytest_trtcheck.model.arrays import as_array, is_array, owned
from pytest_trtcheck.record import SampleRecord, ScoreRecord
from pytest_trtcheck.spec import Case

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.check.request import Known
    from pytest_trtcheck.spec import ScoreSpec

MEASURED_CASES = 32
"""Of how many cases the outputs' errors are told, where they are not judged."""
SHOWN_SAMPLES = 10
_LOST_S = 10.0
"""How long scores of lost outputs may take in any case; beyond, they get as much time as all else of the check took."""

_WHAT = "it takes (outputs, case) and returns an array: one item a sample"


class _Scores:
    """The items of one model, as they come: arrays stay arrays, whatever else is listed."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.is_listed = False

    def add(self, items: Any) -> None:
        self.is_listed = self.is_listed or not isinstance(items, np.ndarray) or items.shape[1:] != self._rest(items)
        self.parts.append(items)

    def _rest(self, items: NDArray[Any]) -> tuple[int, ...]:
        return tuple(self.parts[0].shape[1:]) if self.parts else tuple(items.shape[1:])

    def joined(self) -> Any:
        return [item for part in self.parts for item in part] if self.is_listed else np.concatenate(self.parts)


@dataclass
class _Scored:
    """What was found on all cases; of lost outputs, each way, on the first of them, `untried` samples aside."""

    mismatch: Mismatch
    reference: _Scores = field(default_factory=_Scores)
    actual: _Scores = field(default_factory=_Scores)
    lost: list[_Scores] = field(default_factory=list)
    lost_s: float = 0.0
    untried: int = 0
    sizes: list[int] = field(default_factory=list)
    measured: list[Mapping[str, compare.Measurement]] = field(default_factory=list)

    def try_lost(
        self, spec: ScoreSpec, outputs: Mapping[str, NDArray[Any]], case: Case, items: tuple[Any, Any]
    ) -> None:
        """Score a case whose outputs are lost, each way; where that is not known, nothing is lost.

        Parameters
        ----------
        outputs
            The reference's.
        items
            What the score gave for them, and for those of what runs.
        """
        started = time.perf_counter()
        lost = [_lost(spec, each, case) for each in ruined(outputs)]
        self.mismatch.look(items, lost)
        self.add_lost(items[0], lost)
        self.lost_s += time.perf_counter() - started

    def add_lost(self, items: Any, lost: Sequence[Any] = (None, None)) -> None:
        self.lost = self.lost or [_Scores() for _ in lost]
        for scores, given in zip(self.lost, lost, strict=True):
            scores.add(items if given is None or len(given) != len(items) else given)

    def place(self, sample: int) -> tuple[int, int]:
        """The case that holds a sample, and its place in there."""
        ends = np.cumsum(self.sizes)
        case = int(np.searchsorted(ends, sample, side="right"))
        return case, sample - (int(ends[case - 1]) if case else 0)


def judge(known: Known, spec: ScoreSpec, *, keeps_items: bool = False) -> tuple[ScoreRecord, list[str]]:
    """Score what the runner and the reference compute on every case, one case after the other; no output is kept.

    Beside the score there is a note where not all was tried that could be.

    Parameters
    ----------
    keeps_items
        Whether the record has what ran scored on each sample.

    Raises
    ------
    ComparisonError
        The score or its aggregate failed, or gave what is no score; the message says on which case.
    InputError
        There are no labels, and the score failed.
    """
    started, found = time.perf_counter(), _Scored(Mismatch(spec))
    # What is judged by a tolerance too was computed already; else keeping outputs would cost more than computing them.
    reference = known.reference if known.request.parity.judges_outputs else known.reference.computed
    # Behind the labelled cases there may be others, which an earlier search kept.
    for index, (inputs, labels) in enumerate(zip(known.cases, known.labels, strict=False)):
        with known.alone():
            actual = known.run(inputs)
        expected = reference(inputs)
        if index < MEASURED_CASES and not known.request.parity.judges_outputs:
            found.measured.append(compare.measure_all(actual, expected, {}))
        case = Case(inputs, labels)
        where = f"{known.request.inputs_source} inputs[{index}]"
        before = _items(spec, expected, case, f"on the reference's outputs of {where}")
        after = _items(spec, actual, case, f"on {known.running.title}'s outputs of {where}")
        if len(before) != len(after):
            raise ComparisonError(
                f"score {name_of(spec.function)} gave {plural(len(after), 'item')} of {where}, and of the reference's "
                f"outputs {len(before)}",
                f"samples are paired: {_WHAT}",
                code="user-code-result",
            )
        _require_count(spec, known, case, len(before), where)
        # Of a mean some tell what a sample may lose; of an aggregate a rare sample may be worth the most.
        if spec.aggregate is not None or sum(found.sizes) < ENOUGH or not found.mismatch.sees:
            # Of outputs that are lost a detector may find thousands of boxes to compare.
            if found.mismatch.sees and 2 * found.lost_s > time.perf_counter() - started + _LOST_S:
                found.untried += len(before)
                found.add_lost(before)
            else:
                found.try_lost(spec, expected, case, (before, after))
        found.mismatch.add(expected, case, before, spec.function)
        found.reference.add(before)
        found.actual.add(after)
        found.sizes.append(len(before))
    record = _record(known, spec, found)
    record = replace(record, items=packed(found.actual.joined())) if keeps_items else record
    if not found.untried:
        return record, []
    of_all = f"{found.untried:,} of {plural(sum(found.sizes), 'sample')}"
    what = f"score {spec.name}: what a sample has to lose is not known of {of_all}: lost outputs take long to score"
    return record, [what]


def not_measured(spec: ScoreSpec, reason: str) -> ScoreRecord:
    """A score that could not be judged, and why."""
    return ScoreRecord("not_measured", spec.name, max_drop=spec.max_drop, reason=reason)


def _items(spec: ScoreSpec, outputs: Mapping[str, NDArray[Any]], case: Case, where: str) -> Any:
    """One item a sample: finite FP64 numbers, or with an aggregate, which has to cope with them, whatever they are."""
    name = name_of(spec.function)
    try:
        given = scored(spec.function, outputs, case)
    except CheckError:
        raise
    except Exception as error:
        said = f"score {name} failed {where}: {type(error).__name__}: {error}"
        if case.labels is None and "NoneType" in str(error):
            raise InputError(
                said, "these inputs have no labels: give Case(inputs, labels)", code="user-code-failed"
            ) from error
        raise ComparisonError(said, _WHAT, code="user-code-failed") from error
    if is_array(given):
        given = as_array(given, f"score {name} {where}")
    if isinstance(given, np.ndarray) and given.ndim == 0:
        given = given.reshape(1)
    elif isinstance(given, (int, float)):
        given = np.asarray([given])
    if not isinstance(given, (np.ndarray, list, tuple)):
        raise ComparisonError(f"score {name} gave {kind_of(given)} {where}", _WHAT, code="user-code-result")
    if spec.aggregate is not None:
        # A copy: a view would keep all of the outputs, and the next call may write to the same arrays.
        return np.array(given) if isinstance(given, np.ndarray) and given.dtype.kind in "fiub" else owned(list(given))
    try:
        items = np.array(given, np.float64)
    except (TypeError, ValueError):
        items = np.asarray(None)
    if items.ndim != 1:
        kinds = ", ".join(sorted({type(item).__name__ for item in given})) or "nothing"
        shown = f"shape {list(items.shape)}" if items.ndim else f"items that are no numbers ({kinds})"
        raise ComparisonError(
            f"score {name} gave {shown} {where}",
            f"{_WHAT}, a number; what is no number needs an aggregate=",
            code="user-code-result",
        )
    bad = ~np.isfinite(items)
    if bad.any():
        sample = int(np.argmax(bad))
        raise ComparisonError(
            f"score {name} gave {items[sample]} for sample {sample} {where}"
            + (f", and {plural(int(bad.sum()) - 1, 'other')}" if bad.sum() > 1 else ""),
            "a score is a finite number; say in the score what a sample counts that has none",
            code="user-code-result",
        )
    return items


def _lost(spec: ScoreSpec, outputs: Mapping[str, NDArray[Any]], case: Case) -> Any:
    """The items of outputs that are lost; None where the score cannot cope with them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a division by the zeros, say
            return _items(spec, outputs, case, "on lost outputs")
    except CheckError:
        return None


def _require_count(spec: ScoreSpec, known: Known, case: Case, count: int, where: str) -> None:
    """See that there is one item a sample, as far as is known how many samples a case holds."""
    inputs = case.inputs
    open_first = [each.name for each in known.model.inputs if each.shape and not isinstance(each.shape[0], int)]
    rows = {inputs[name].shape[0] for name in open_first}
    labels = as_array(case.labels) if is_array(case.labels) else case.labels
    told = None
    if isinstance(labels, (list, tuple)) or (isinstance(labels, np.ndarray) and labels.ndim):
        told = len(labels)
    if len(rows) != 1 or count in {*rows, told} or (count == 1 and case.labels is not None and told is None):
        return
    (batch,) = rows
    beside = f" and {plural(told, 'label')}" if told is not None else ""
    raise ComparisonError(
        f"score {name_of(spec.function)} gave {plural(count, 'item')} of {where}, which hold {plural(batch, 'row')}"
        f"{beside}",
        f"{_WHAT}; the mean over all of them is made here",
        code="user-code-result",
    )


def _record(known: Known, spec: ScoreSpec, found: _Scored) -> ScoreRecord:
    before, after = found.reference.joined(), found.actual.joined()
    lost = [each.joined() for each in found.lost]
    if not len(before):
        raise InputError(
            f"score {name_of(spec.function)}: there is no sample to score", "give at least one row", code="input-empty"
        )
    if spec.aggregate is None:
        drop = drop_of_means(before, after, lower_is_better=spec.lower_is_better, lost=lost)
        method = "limits of the paired mean (BCa)"
    else:
        try:
            drop = drop_of_aggregate(before, after, spec.aggregate, lower_is_better=spec.lower_is_better, lost=lost)
        except ComparisonError as error:
            raise ComparisonError(
                f"aggregate {name_of(spec.aggregate)} {error.message}", error.hint, code=error.code
            ) from error
        method = f"paired bootstrap, {RESAMPLES:,} resamples"
    is_plain = spec.aggregate is None
    found.mismatch.require_knowledge(drop.reference, min(before.min(), after.min()) if is_plain else drop.reference)
    found.mismatch.require_sight()
    verdict = drop.verdict(spec.max_drop)
    needed = drop.samples_to_decide(spec.max_drop) if verdict == "inconclusive" else None
    merged = [compare.merge(each) for each in zip(*(case.values() for case in found.measured), strict=True)]
    return ScoreRecord(
        verdict,
        spec.name,
        reference=drop.reference,
        value=drop.value,
        drop=drop.drop,
        lower=drop.lower,
        upper=drop.upper,
        confidence=CONFIDENCE,
        max_drop=spec.max_drop,
        lower_is_better=spec.lower_is_better,
        samples=drop.samples,
        disagreeing=drop.changed,
        samples_to_decide=needed,
        method=method,
        reason=_reason(known, spec, drop, needed),
        worst=tuple(_changed(found, before, after, spec.lower_is_better)),
        errors={each.name: each.value("max") for each in merged} or None,
        errors_of_cases=len(found.measured) or None,
        labels_sha256=labelled.digest(known.labels),
    )


def _changed(found: _Scored, before: Any, after: Any, lower_is_better: bool) -> list[SampleRecord]:
    """The samples that lost most; of items that are no numbers, the first that differ."""
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray) and before.ndim == 1:
        # Of truth values there is no difference.
        fell = (before.astype(np.float64) - after) * (-1 if lower_is_better else 1)
        order = [int(each) for each in np.argsort(-fell, kind="stable")[:SHOWN_SAMPLES] if fell[each] > 0]
    else:
        differ = (number for number in range(len(before)) if not same(before[number], after[number]))
        order = [number for number, _ in zip(differ, range(SHOWN_SAMPLES), strict=False)]
    return [SampleRecord(*found.place(number), _plain(before[number]), _plain(after[number])) for number in order]


def _plain(item: Any) -> float | str:
    if isinstance(item, (int, float, np.number, np.bool_)):
        return float(item)
    text = " ".join(repr(item).split())
    return text if len(text) <= 40 else f"{text[:39]}…"


def _reason(known: Known, spec: ScoreSpec, drop: Drop, needed: int | None) -> str | None:
    """What is said of a score that did not pass."""
    verdict = drop.verdict(spec.max_drop)
    if verdict == "pass":
        return None
    found = describe(spec.name, drop, spec.max_drop)
    if verdict == "fail":
        return f"{known.title}: {found}"
    if needed is not None:
        more = f"about {plural(needed, 'sample')} of this kind would decide"
    elif spec.max_drop == 0:
        more = "that nothing at all is lost, no number of samples proves: give the least loss that matters as max_drop"
    else:
        more = "the drop lies so near the limit that no number of samples is likely to decide"
    if replace(drop, at_stake=0.0).verdict(spec.max_drop) == "pass":
        more += (
            f"; a sample whose outputs are lost costs up to {drop.at_stake / drop.samples:.2g}, more than any that was "
            "seen: limit what a single one may count, or give more of its kind"
        )
    return f"{known.title}: {found}: too few samples to decide; {more}"
