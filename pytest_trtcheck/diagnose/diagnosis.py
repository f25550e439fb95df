"""From a failed check to the step, the operator and the remedy."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.diagnose import calibration, judging, keeping, models, nonfinite, result, trace
from pytest_trtcheck.diagnose import engine as engines
from pytest_trtcheck.diagnose.culprit import Culprit, Findings
from pytest_trtcheck.diagnose.naming import Names
from pytest_trtcheck.diagnose.result import Blame, Errors, Step
from pytest_trtcheck.diagnose.switchboard import Switchboard
from pytest_trtcheck.diagnose.trials import Clock, Subject, Trials
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.precision.emulation import emulated_path, emulation
from pytest_trtcheck.precision.lowering import float_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.diagnose.engine import Engine
    from pytest_trtcheck.diagnose.judging import Judgement
    from pytest_trtcheck.record import OutputRecord

_KEEPS = frozenset({"fp16", "bf16", "int8", "fp8"})
"""The precisions of which `keep_fp32` makes an exception."""
_LOCAL_SHARE = 0.25
_FEW_NODES = 4
_MANY_NODES = 160
_EXPLAINED_BY_ROUNDING = 2.0
"""Two sound ways of rounding differ by √2 of what each of them loses, and by more where the model amplifies it."""
_EXPLAINED_BY_QUANTIZING = 1.0
"""In 8 bits both round to the same steps; they differ where a value lies close to the middle of two."""
_TINY = 4.0
_LISTED = 10
_TAKEN_APART = 24
"""Operators that are looked at more closely, if they lose more than sound ones."""
_MEASURED = 6
"""Operators of which the effect on the outputs is measured, at a run each."""
_MOST_REBUILT = 3
"""Lists that are confirmed, each longer than the one before: the engine may err more than the emulation."""
_SEARCH_SHARE = 0.6
"""The share of the time for the search for nodes where other calibration methods are to be tried after it."""
_MARGIN = 0.9
"""The share of a limit to aim at where the one before was missed."""
_PACE_S = 5.0
"""How often a search says how far it is."""
_LONG_S = 10.0
"""From here on a diagnosis says how long it took, and how to limit it."""


@dataclass(frozen=True)
class Budget:
    """What a diagnosis may cost.

    Parameters
    ----------
    seconds
        After which nothing new is begun on the emulation.
    trials
        Variations of the model that are run: operators kept in FP32, other calibration methods.
    engine_seconds
        After which no further engine is built for bisection; it counts by itself, for builds are slow.
    """

    seconds: float = 60.0
    trials: int = 250
    engine_seconds: float = 300.0


def diagnose(
    subject: Subject,
    cache: Cache,
    engine: Engine | None = None,
    *,
    emulated: Mapping[str, NDArray[Any]] | None = None,
    budget: Budget | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Blame | None:
    """Say why a check failed.

    Parameters
    ----------
    subject
        The check.
    engine
        Where a GPU ran it; None: the emulation failed.
    emulated
        What the emulation computed from the input to look at, where that is at hand; None: it is computed.
    progress
        Is told, in a line each, what is being done.

    Returns
    -------
    Blame or None
        None where there is no error to trace: a shape or dtype that differs.

    Raises
    ------
    CheckError
        The model can't be run any more.
    """
    if emulated is None:
        with closing(emulation(subject.model, subject.lowered, subject.precision, cache)) as runner:
            emulated = runner(subject.case)
    return _Diagnosis(subject, cache, engine, budget or Budget(), progress).run(emulated)


class _Diagnosis:
    def __init__(
        self,
        subject: Subject,
        cache: Cache,
        engine: Engine | None,
        budget: Budget,
        progress: Callable[[str], None],
    ) -> None:
        self.subject, self.cache, self.engine, self.budget, self.progress = subject, cache, engine, budget, progress
        self.clock = Clock(budget.seconds, budget.trials)
        self.notes: list[str] = []
        self.start = time.monotonic()
        self._paced = self.start
        self.is_complete = True
        self._engine_clock: Clock | None = None

    def run(self, emulated: Mapping[str, NDArray[Any]]) -> Blame | None:
        subject = self.subject
        reference = subject.reference(subject.case)
        lowered, lowered_outputs = judging.judge(emulated, reference, subject.limits)
        total, total_outputs = lowered, lowered_outputs
        step: Step = "precision"
        from_emulated: list[OutputRecord] = []
        if self.engine is not None:
            total, total_outputs = judging.judge(self.engine.outputs, reference, subject.limits)
            departed, from_emulated = judging.judge(self.engine.outputs, emulated, subject.limits)
            sizes = (
                judging.magnitude(outputs, total.output, total.metric) for outputs in (lowered_outputs, from_emulated)
            )
            step = self._step(*sizes, lowered=lowered, departed=departed)
        if any(entry["metric"] in {"shape", "dtype"} for output in total_outputs for entry in output.judged):
            return None
        errors = Errors(
            total.metric,
            total.limit,
            total.output,
            judging.value_of(lowered_outputs, total.output, total.metric),
            judging.value_of(from_emulated, total.output, total.metric),
            total.value,
        )
        self.goal = self._goal(lowered, total)
        try:
            with tempfile.TemporaryDirectory(prefix="trtcheck-diagnosis-") as folder:
                blame = self._look_closer(step, errors, lowered, emulated, Path(folder))
        except Exception as error:
            # A fault of ours must not hide the failure that it was to explain.
            self._missed(f"the diagnosis broke off, which is a fault of its own: {type(error).__name__}: {error}")
            blame = Blame(step, _HEADLINES[step], errors)
        seconds = time.monotonic() - self.start
        if seconds >= _LONG_S:
            self.notes.append(f"this diagnosis took {seconds:.0f} s; --trt-diagnose=SECONDS limits it, 0 leaves it out")
        return replace(
            blame,
            trials=self.budget.trials - self.clock.trials,
            seconds=seconds,
            notes=tuple(self.notes),
            is_complete=self.is_complete,
        )

    def _pace(self, line: str) -> None:
        """Progress that is made many times a second."""
        if time.monotonic() - self._paced > _PACE_S:
            self._paced = time.monotonic()
            self.progress(line)

    def _missed(self, note: str) -> None:
        """Say what could not be looked at; another time it may be."""
        self.is_complete = False
        self.notes.append(note)

    def _step(self, by_precision: float, by_engine: float, *, lowered: Judgement, departed: Judgement) -> Step:
        """Who is to blame, by the size of the two errors: what limit was set has no part in it.

        Whether the precision fails by itself decides no more than whether something is left to mend once the engine is.
        """
        if not math.isfinite(by_precision):
            if math.isfinite(by_engine):
                self.notes.append("the emulation overflows where the engine does not: the engine rounds less often")
            return "precision"
        quantized = self.subject.precision in {"int8", "fp8"} or self.subject.model.has_qdq
        explained = _EXPLAINED_BY_QUANTIZING if quantized else _EXPLAINED_BY_ROUNDING
        if by_engine > explained * by_precision:
            return "engine" if lowered.passed else "both"
        if not departed.passed or lowered.passed:
            self.notes.append(
                "the engine differs from the emulation by no more than another way of rounding explains: what it adds "
                "of its own, if anything, shows once the precision is right"
            )
        return "precision"

    def _goal(self, lowered: Judgement, total: Judgement) -> float:
        """The share of the limit that the emulation may use up so that the engine, which errs more, passes too."""
        if self.engine is None or not 0 < lowered.usage < total.usage < math.inf:
            return 1.0
        return lowered.usage / total.usage

    def _look_closer(
        self, step: Step, errors: Errors, lowered: Judgement, emulated: Mapping[str, NDArray[Any]], folder: Path
    ) -> Blame:
        blame = Blame(step, _HEADLINES[step], errors)
        findings = self._trace(folder)
        names = Names(self.subject.model.path, findings.pair if findings is not None else None)
        if findings is not None:
            blame = replace(blame, tensors=result.rows(findings.tensors, names))
            self._note_tiny_output(findings, errors.output)
        if step in {"precision", "both"} and findings is not None:
            self._find_causes(findings, errors.output)
            self._look_at_suspects(findings, lowered)
            self._announce(findings, names)
            blame = self._audit(blame, findings, names)
            may_calibrate = self.subject.is_quantized and not lowered.passed
            blame = self._blame_precision(
                blame, findings, names, lowered=lowered, share=_SEARCH_SHARE if may_calibrate else 1.0
            )
            if may_calibrate:
                blame = self._calibrate(blame)
        if step in {"engine", "both"}:
            blame = self._blame_engine(blame, findings, names, emulated, folder)
        return blame

    def _audit(self, blame: Blame, findings: Findings, names: Names) -> Blame:
        examined = calibration.examine(findings.pair, self.subject, has_tensor=names.has_tensor, progress=self.progress)
        if examined is None:
            return blame
        for note in examined.notes:
            self._missed(note)
        return replace(blame, calibration=examined.found)

    def _calibrate(self, blame: Blame) -> Blame:
        """What the other calibration methods would give: last, since one may take as long as all the rest."""
        if blame.calibration is None or blame.calibration["samples"] is None:
            return blame
        if self._spent():
            self._missed("no other calibration method was tried: the budget is spent")
            return blame
        try:
            found = calibration.methods(self.subject, Trials(self.subject, self.clock), self.progress)
        except CheckError as error:
            self._missed(f"no other calibration method could be tried: {error.headline}")
            return blame
        return replace(blame, calibration={**blame.calibration, "methods": found})

    def _announce(self, findings: Findings, names: Names) -> None:
        """The first answer, before it is refined."""
        likely = next((each for each in findings.ranked() if findings.stands_out(each)), None)
        if likely is not None:
            self.progress(f"so far, {_headline(_in_users_names(findings.culprit(likely), names), 0)}")

    def _trace(self, folder: Path) -> Findings | None:
        """The error along the graph; None where there is none, or it can't be told."""
        subject = self.subject
        try:
            emulated_path = self._emulated_path()
            if emulated_path == subject.model.path:
                return None
            self.progress("measuring the error along the graph")
            pair = models.stage(
                float_path(subject.model, subject.lowered, subject.keep_fp32, self.cache),
                emulated_path,
                subject.lowered.path,
                subject.model.path,
                folder,
                case=subject.case,
            )
            self.notes += pair.unrolled.notes
            return Findings(pair, trace.trace(pair, subject.case), models.ROUNDOFF[subject.precision])
        except CheckError as error:
            self._missed(f"the error could not be traced along the graph: {error.headline}")
            return None

    def _find_causes(self, findings: Findings, output: str) -> None:
        """What made the outputs NaN or infinite, where they are."""
        try:
            outputs = [output, *findings.pair.reference.outputs]
            found = nonfinite.causes(findings.pair, findings.by_name, self.subject.case, outputs)
        except Exception as error:
            # Without it there is still what each operator loses by itself.
            self._missed(f"where NaN or infinity comes from could not be looked at: {type(error).__name__}: {error}")
            return
        findings.causes = {each.at.name: each for each in found}

    def _look_at_suspects(self, findings: Findings, lowered: Judgement) -> None:
        """Why the operators that lose most do so, and what the likeliest causes do to the outputs by themselves."""
        try:
            self._measure_suspects(findings, lowered)
        except CheckError as error:
            self._missed(f"the likeliest causes could not be looked at: {error.headline}")

    def _measure_suspects(self, findings: Findings, lowered: Judgement) -> None:
        subject = self.subject
        suspects = [tensor for tensor in findings.ranked() if findings.is_unsound(tensor)][:_TAKEN_APART]
        findings.update(trace.take_apart(findings.pair, suspects, subject.case))
        reference = subject.reference(subject.case)
        self.progress("measuring what the likeliest causes do to the outputs")
        chosen = findings.to_measure(_MEASURED)
        known = math.isfinite(lowered.usage) and lowered.usage > 0
        with closing(Switchboard(findings.pair, [tensor.node for tensor in chosen], once=True)) as board:
            for tensor in chosen:
                outputs = board(subject.case, [tensor.node])
                usage = judging.judge(outputs, reference, subject.limits)[0].usage
                findings.effects[tensor.name] = usage / lowered.usage if known else float(usage > 1)
                if findings.stands_out(tensor):
                    break

    def _note_tiny_output(self, findings: Findings, output: str) -> None:
        tensor = findings.by_name.get(output)
        held = findings.pair.held.get(output)
        if tensor is not None and held is not None and 0 < tensor.error.peak < _TINY * held.smallest_normal:
            self.notes.append(
                f"output {output!r} is at most {tensor.error.peak:.3g} for this input, where the smallest normal value "
                f"of {held.name} is {held.smallest_normal:.3g}: is it an input that the model is meant for?"
            )

    # --- precision ---------------------------------------------------------------------------------------------------

    def _blame_precision(
        self, blame: Blame, findings: Findings, names: Names, *, lowered: Judgement, share: float
    ) -> Blame:
        whole, self.clock = self.clock, self.clock.part(share)
        blame, kept, conclusive = self._search(blame, findings, names, lowered)
        whole.trials, self.clock = self.clock.trials, whole
        largest = findings.largest_contributions(_LISTED)
        blame = replace(blame, contributions=tuple({**each, "node": names.node(each["node"])} for each in largest))
        causes: Sequence[trace.Tensor] = [each for each in findings.ranked() if findings.stands_out(each)]
        # What overflows is to blame even where so much does that it is no remedy to keep all of it in FP32.
        local = bool(causes) and (not conclusive or findings.kind(causes[0]) in {"overflow", "underflow", "nan"})
        if kept is not None:
            # What stands out may have been kept together with the operator that makes most of it.
            causes = [*(each for each in causes if each.node in kept.nodes), *kept.causes]
            local = self._is_local(kept, causes, findings)
        if not local:
            if causes:
                worst = _in_users_names(findings.culprit(causes[0]), names)
                self.notes.append(f"most is lost at node {worst.node!r} ({worst.op_type}): {worst.detail}")
            step: Step = "spread" if blame.step == "precision" else blame.step
            return replace(blame, step=step, headline=_HEADLINES["spread"])
        culprit = findings.culprit(causes[0])
        alike = [each for each in map(findings.culprit, causes[1:]) if each.kind == culprit.kind]
        others = dict.fromkeys(names.node(each.node) for each in alike if each.tensor != culprit.tensor)
        marked = culprit.tensor, causes[0].name
        culprit = _in_users_names(culprit, names)
        others.pop(culprit.node, None)
        return replace(
            blame,
            culprit=culprit,
            others=tuple(others),
            headline=_headline(culprit, len(others)),
            tensors=result.rows(findings.tensors, names, marked),
        )

    def _search(
        self, blame: Blame, findings: Findings, names: Names, lowered: Judgement
    ) -> tuple[Blame, keeping.Kept | None, bool]:
        """The nodes to keep in FP32, and whether a search that found none went as far as it should."""
        if (lowered.passed and lowered.usage <= self.goal) or self.subject.precision not in _KEEPS:
            # TF32 is a choice for a whole engine: no node can be an exception of it.
            return blame, None, False
        if self._spent():
            self._missed("no set of nodes to keep in FP32 was looked for: the budget is spent")
            return blame, None, False
        self.progress("looking for the nodes to keep in FP32")
        trials = Trials(self.subject, self.clock)
        try:
            with closing(keeping.Search(findings.pair, findings, trials, self._pace)) as search:
                kept = search.find(self.goal)
                if kept is not None:
                    blame = self._advised(blame, kept, search, names)
        except CheckError as error:
            self._missed(f"the search for nodes to keep in FP32 ended: {error.headline}")
            return blame, None, False
        if kept is None:
            why = "the budget is spent" if self._spent() else f"the {keeping.MOST_TRIED} worst are not enough"
            self.notes.append(f"no set of nodes to keep in FP32 was found: {why}")
        if self._spent():
            self.is_complete = False
        return blame, kept, kept is None and not self._spent()

    def _advised(self, blame: Blame, kept: keeping.Kept, search: keeping.Search, names: Names) -> Blame:
        """The argument to paste, confirmed by lowering the model with it and checking all inputs, on the engine too."""
        if not self._can_keep(kept, names):
            return blame
        found: keeping.Kept | None = kept
        missed = ""
        for _ in range(_MOST_REBUILT):
            if found is None:
                break
            nodes = self._worth_naming(found, names)
            if nodes is None:
                break
            self.progress(f"confirming {len(nodes)} nodes to keep in FP32")
            emulated = Trials(self.subject, self.clock).confirm(nodes)
            if emulated is None:
                missed = "every node would have to stay in FP32: the model does not suit the precision"
                break
            on_engine = self._on_engine(nodes) if emulated.passed else None
            if emulated.passed and (on_engine is None or on_engine.passed):
                return replace(
                    blame,
                    keep_fp32=(*self.subject.keep_fp32, *nodes),
                    keep_value=emulated.value if on_engine is None else on_engine.value,
                    keep_emulated=emulated.value,
                    confirmed=True,
                    confirmed_by="emulation" if on_engine is None else "engine",
                )
            missed = _missed_by(nodes, emulated, on_engine)
            # So much closer must the next one come to what the search sees.
            goal = _MARGIN * found.judgement.usage / (on_engine or emulated).usage
            if not 0 < goal < search.goal or self._spent():
                break
            self.progress("looking for more nodes to keep in FP32, since these were not enough")
            found = search.find(goal)
        if missed:
            self.notes.append(missed)
        return blame

    def _can_keep(self, kept: keeping.Kept, names: Names) -> bool:
        """Whether `keep_fp32` does anything for this model."""
        subject = self.subject
        if not subject.lowered.taken_as_it_is:
            return True
        found = names.keep(kept.nodes)
        if len(found) <= keeping.MOST_KEPT:
            shown = ", ".join(map(repr, found))
            self.notes.append(
                f"it would pass with these nodes exported in FP32 (no Q/DQ or casts around them): {shown}"
            )
        self.notes.append(f"keep_fp32 has no effect: {subject.model.label} brings its own precision with it")
        return False

    def _worth_naming(self, kept: keeping.Kept, names: Names) -> tuple[str, ...] | None:
        """What `keep_fp32` has to name; None where that is too much to be advice."""
        found = names.keep(kept.nodes)
        if max(len(found), len(kept.nodes)) <= keeping.MOST_KEPT:
            return found
        # One node here may be all that is inside it there.
        inside = f"{len(found)} nodes" if len(kept.nodes) > 1 else f"the {len(found)} nodes in {kept.nodes[0]!r}"
        self.notes.append(f"it takes {inside} in FP32 to pass: another precision may serve better")
        return None

    def _on_engine(self, nodes: Sequence[str]) -> Judgement | None:
        """The judgement on all inputs of an engine with these nodes in FP32; None where there was none to be had."""
        if self.engine is None or self.engine.rebuild is None:
            return None
        if self._clock_of_engines().is_over():
            self._missed("the list was not confirmed on the engine: the time for building engines is up")
            return None
        self.progress(f"building an engine with {len(nodes)} nodes in FP32, to confirm it")
        trials = Trials(self.subject, self.clock)
        try:
            with trials.lowered(nodes) as lowered, self.engine.rebuild(lowered) as runner:
                return trials.judge(runner)
        except CheckError as error:
            self._missed(f"the list was not confirmed on the engine: {error.headline}")
            return None

    def _clock_of_engines(self) -> Clock:
        """What is left for building engines; it counts by itself, from the first on."""
        if self._engine_clock is None:
            self._engine_clock = Clock(self.budget.engine_seconds, 0)
        return self._engine_clock

    def _spent(self) -> bool:
        return self.clock.is_over() or self.clock.trials <= 0

    def _is_local(self, kept: keeping.Kept, causes: Sequence[trace.Tensor], findings: Findings) -> bool:
        """Whether few operators are to blame, rather than the precision as such."""
        if {findings.kind(cause) for cause in kept.causes} <= {"overflow", "underflow", "nan"}:
            return True
        if len(kept.nodes) == 1 and findings.does_most(kept.causes[0]):
            return True
        if any(cause.name in findings.causes for cause in kept.causes):
            return True
        few = max(_FEW_NODES, _LOCAL_SHARE * min(findings.nodes_adding(), _MANY_NODES))
        return len(kept.causes) <= few and any(findings.stands_out(cause) for cause in causes)

    # --- engine ------------------------------------------------------------------------------------------------------

    def _blame_engine(
        self,
        blame: Blame,
        findings: Findings | None,
        names: Names,
        emulated: Mapping[str, NDArray[Any]],
        folder: Path,
    ) -> Blame:
        assert self.engine is not None
        try:
            bisected = engines.bisect(
                self.subject,
                self.engine,
                findings,
                emulated,
                emulated_path=self._emulated_path(),
                folder=folder,
                clock=self._clock_of_engines(),
                progress=self.progress,
            )
        except CheckError as error:
            self._missed(f"the engine could not be bisected: {error.headline}")
            return blame
        if bisected is None:
            return blame
        narrowed, lowered = bisected
        self.notes += narrowed.notes
        blame = replace(blame, builds=narrowed.builds)
        found = engines.culprit(narrowed, names, lowered)
        if found is None:
            self.notes.append(
                "the engine was not narrowed down: the model has no place to cut it at"
                if not narrowed.builds
                else f"the engine's error against the emulation grows over the graph, at no node in particular: "
                f"{narrowed.before:.2g} before tensor {names.tensor(narrowed.tensor, '', lowered)!r}, "
                f"{narrowed.after:.2g} there "
                f"({narrowed.builds} engines built)"
            )
            return blame
        culprit, others = found
        headline = _headline(culprit, 0)
        if others:
            headline = f"TensorRT goes wrong in one of {len(others) + 1} nodes around {culprit.node!r}"
        if blame.culprit is not None:
            self.notes.append(f"{headline}: {culprit.detail}")
            return blame
        return replace(blame, culprit=culprit, others=others, headline=headline)

    def _emulated_path(self) -> Path:
        subject = self.subject
        return emulated_path(subject.model, subject.lowered, subject.precision, self.cache)


_HEADLINES: Mapping[Step, str] = {
    "precision": "the lowered model itself is off",
    "engine": "the lowered model is right, TensorRT computes something else",
    "both": "the lowered model is off, and TensorRT computes something else again",
    "spread": "the error is spread over the graph, no single layer is to blame",
}


def _in_users_names(culprit: Culprit, names: Names) -> Culprit:
    node = names.node(culprit.node)
    tensor = names.tensor(culprit.tensor, node)
    return replace(culprit, node=node, op_type=names.op_type(node, culprit.op_type), tensor=tensor)


def _missed_by(nodes: Sequence[str], emulated: Judgement, on_engine: Judgement | None) -> str:
    """What is said of a list that was to be enough."""
    shown = f"keep_fp32={list(nodes)}" if len(nodes) <= _LISTED else f"{len(nodes)} nodes in FP32"
    last = on_engine or emulated
    limit = "" if last.limit is None else f", and the limit is {last.limit:g}"
    if on_engine is None:
        return f"{shown} was to be enough, but lowered so {last.metric} becomes {_figure(last.value)}{limit}"
    return (
        f"no keep_fp32 was found that holds on the engine: with {shown} {last.metric} becomes "
        f"{_figure(emulated.value)} by emulation, {_figure(last.value)} on the engine{limit}"
    )


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _headline(culprit: Culprit, others: int) -> str:
    what = "constant" if culprit.is_constant else "tensor"
    at = {
        "overflow": f"{what} {culprit.tensor!r} overflows",
        "underflow": f"{what} {culprit.tensor!r} underflows",
        "nan": f"node {culprit.node!r} gives NaN",
        "saturation": f"tensor {culprit.tensor!r} saturates, its calibrated range is too small",
        "range": f"the calibrated range of tensor {culprit.tensor!r} is too wide",
        "weights": f"the weights of node {culprit.node!r} lose too much",
        "cancellation": f"node {culprit.node!r} cancels what its operands were rounded by",
        "rounding": f"node {culprit.node!r} is too sensitive to rounding",
        "amplified": f"what is rounded at node {culprit.node!r} does most of the harm",
        "engine": f"TensorRT goes wrong at node {culprit.node!r}",
    }[culprit.kind]
    return f"{at}, and {others} more alike" if others else at
