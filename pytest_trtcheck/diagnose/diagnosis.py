"""From a failed check to the step, the operator and the remedy."""

from __future__ import annotations

import math
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.choices import half_part, is_pair, quantized_part
from pytest_trtcheck.diagnose import audit, judging, keeping, models, nonfinite, relowering, result, trace
from pytest_trtcheck.diagnose.bisection import Bisection
from pytest_trtcheck.diagnose.culprit import TAKEN_APART, Findings
from pytest_trtcheck.diagnose.naming import Names
from pytest_trtcheck.diagnose.partly_lowered import PartlyLowered
from pytest_trtcheck.diagnose.result import Blame, Errors, Step
from pytest_trtcheck.diagnose.statistics import difference
from pytest_trtcheck.diagnose.subject import Budget
from pytest_trtcheck.diagnose.text import figure
from pytest_trtcheck.diagnose.unrolling import REPEATING
from pytest_trtcheck.errors import CheckError, plural, unforeseen
from pytest_trtcheck.precision.emulation import emulated_path, emulation
from pytest_trtcheck.precision.lowering import float_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.compare import LimitResult
    from pytest_trtcheck.diagnose.bisection import Engine
    from pytest_trtcheck.diagnose.culprit import Culprit
    from pytest_trtcheck.diagnose.subject import Subject
    from pytest_trtcheck.record import OutputRecord

_RUINED = frozenset({"overflow", "underflow", "nan"})
"""What is to blame even where so much of it happens that it is no remedy to keep all of that in FP32."""
_LOCAL_SHARE = 0.25
_FEW_NODES = 4
_MANY_NODES = 160
_EXPLAINED_BY_ROUNDING = 2.0
"""Two sound ways of rounding differ by √2 of what each of them loses, and by more where the model amplifies it."""
_EXPLAINED_BY_QUANTIZING = 1.0
"""In 8 bits both round to the same steps; they differ where a value lies close to the middle of two."""
_TINY = 4.0
_LISTED = 10
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


def diagnose(
    subject: Subject,
    cache: Cache,
    engine: Engine | None = None,
    *,
    emulated: Mapping[str, NDArray[Any]] | None = None,
    budget: Budget | None = None,
    progress: Callable[[str], None] = lambda _: None,
    first: Callable[[Blame], None] = lambda _: None,
    search_only: bool = False,
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
    first
        Is given what is known of the step and the tensor as soon as the error was traced, and again where that changes:
        what there is to say should the rest be cut off.
    search_only
        Whether only the nodes to keep in FP32 are of interest.

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
    budget = budget or Budget()
    budget.start()
    return _Diagnosis(subject, cache, engine, budget, progress, first=first, search_only=search_only).run(emulated)


class _Diagnosis:
    def __init__(
        self,
        subject: Subject,
        cache: Cache,
        engine: Engine | None,
        budget: Budget,
        progress: Callable[[str], None],
        *,
        first: Callable[[Blame], None],
        search_only: bool,
    ) -> None:
        self.search_only, self.first = search_only, first
        self.subject, self.cache, self.engine, self.budget, self.progress = subject, cache, engine, budget, progress
        self.notes: list[str] = []
        self.quantized: frozenset[str] | None = None
        self.start = self._paced = time.monotonic()
        self.is_complete = True
        self._told = ""

    def run(self, emulated: Mapping[str, NDArray[Any]]) -> Blame | None:
        subject = self.subject
        self.reference = subject.reference(subject.case)
        lowered, lowered_outputs = judging.judge(emulated, self.reference, subject.limits)
        total, total_outputs = lowered, lowered_outputs
        step: Step = "precision"
        from_emulated: list[OutputRecord] = []
        if self.engine is not None:
            total, total_outputs = judging.judge(self.engine.outputs, self.reference, subject.limits)
            departed, from_emulated = judging.judge(self.engine.outputs, emulated, subject.limits)
            sizes = (
                judging.magnitude(outputs, total.output, total.metric) for outputs in (lowered_outputs, from_emulated)
            )
            step = self._step(*sizes, lowered=lowered, departed=departed)
        if any(entry.metric in {"shape", "dtype"} for output in total_outputs for entry in output.judged):
            return None
        errors = Errors(
            total.metric,
            total.limit,
            total.output,
            judging.value_of(lowered_outputs, total.output, total.metric),
            judging.value_of(from_emulated, total.output, total.metric),
            total.value,
        )
        self.blame = Blame(step, _HEADLINES[step].format(system=self.subject.system), errors)
        # The share of the limit that the emulation may use up so that the engine, which errs more, passes too.
        self.goal = 1.0
        if self.engine is not None and 0 < lowered.usage < total.usage < math.inf:
            self.goal = lowered.usage / total.usage
        try:
            with scratch_folder("diagnosis") as folder:
                self._look_closer(lowered, emulated, Path(folder))
        except Exception as error:
            # A fault of ours must not hide the failure that it was to explain.
            told = unforeseen(error, "the diagnosis broke off")
            fault = f"the diagnosis broke off, which is a fault of its own: {type(error).__name__}: {error}"
            self._missed(fault if told.code == "unforeseen" else told.message)
            self.blame = Blame(step, _HEADLINES[step].format(system=self.subject.system), errors)
        seconds = time.monotonic() - self.start
        if seconds >= _LONG_S:
            self.notes.append(f"this diagnosis took {seconds:.0f} s; --trt-diagnose=SECONDS limits it, 0 leaves it out")
        return replace(
            self.blame,
            trials=self.budget.tried,
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

    @contextmanager
    def _or_missed(self, what: str) -> Iterator[None]:
        """Without what is inside, the rest of a diagnosis stands."""
        try:
            yield
        except CheckError as error:
            self._missed(f"{what}: {error.headline}")

    def _step(self, by_precision: float, by_engine: float, *, lowered: LimitResult, departed: LimitResult) -> Step:
        """Who is to blame, by the size of the two errors: what limit was set has no part in it.

        Whether the precision fails by itself decides no more than whether something is left to mend once the engine is.
        """
        if not math.isfinite(by_precision):
            if math.isfinite(by_engine):
                self.notes.append("the emulation overflows where the engine does not: the engine rounds less often")
            return "precision"
        quantized = quantized_part(self.subject.precision) is not None or self.subject.model.has_qdq
        explained = _EXPLAINED_BY_QUANTIZING if quantized else _EXPLAINED_BY_ROUNDING
        if by_engine > explained * by_precision:
            return "engine" if lowered.passed else "both"
        if not departed.passed or lowered.passed:
            self.notes.append(
                "the engine differs from the emulation by no more than another way of rounding explains: what it adds "
                "of its own, if anything, shows once the precision is right"
            )
        return "precision"

    def _look_closer(self, lowered: LimitResult, emulated: Mapping[str, NDArray[Any]], folder: Path) -> None:
        step = self.blame.step
        findings = self._trace(folder)
        self.names = Names(self.subject.model.path, findings.pair if findings is not None else None)
        if findings is not None:
            self.quantized = findings.pair.quantized
            self.blame = replace(
                self.blame,
                tensors=result.rows(findings.tensors, self.names),
                traced=result.traced(findings.tensors, self.names),
            )
            self._note_tiny_output(findings)
        if step in {"precision", "both"} and findings is not None:
            self._find_causes(findings)
            self._answer(findings)
            with self._or_missed("the likeliest causes could not be looked at"):
                self._measure_suspects(findings, lowered)
            if self.search_only:
                self._search(findings, lowered)
                return
            self._answer(findings)
            if is_pair(self.subject.precision):
                with self._or_missed("the parts of the precision could not be told apart"):
                    self._measure_parts(findings)
            if findings.pair.spans:
                self.progress("auditing the calibrated ranges")
                examined, missed = audit.examine(findings.pair, self.subject, self.names)
                self.blame = replace(self.blame, calibration=examined)
                for note in missed:
                    self._missed(note)
            may_calibrate = self.subject.is_quantized and not lowered.passed
            with self.budget.part(_SEARCH_SHARE if may_calibrate else 1.0):
                kept, conclusive = self._search(findings, lowered)
            self.blame, notes = self._precision_to_blame(findings, kept, conclusive=conclusive)
            self.notes += notes
            if may_calibrate and self.blame.calibration is not None and self.blame.calibration["samples"] is not None:
                self._calibrate(self.blame.calibration)
        if step in {"engine", "both"}:
            self._tell(self.blame)
            with self._or_missed("the engine could not be bisected"):
                self._blame_engine(findings, emulated, folder)

    # --- the first answer --------------------------------------------------------------------------------------------

    def _answer(self, findings: Findings) -> None:
        """What can be said of the precision by now."""
        if self.search_only:
            return
        blame, notes = self._precision_to_blame(findings, None, conclusive=False)
        lost = next((each for each in findings.ranked() if each.node), None)
        if blame.culprit is None and lost is not None and not notes:
            worst = self._in_users_names(findings.culprit(lost))
            notes = [
                f"most is lost at tensor {worst.tensor!r} of node {worst.node!r} ({worst.op_type}): {worst.detail}"
            ]
        self._tell(blame, *notes)

    def _tell(self, blame: Blame, *notes: str) -> None:
        """Hand on what is known, and show it where it is new."""
        said = "; ".join((blame.headline, *(note.partition(": ")[0] for note in notes)))
        if said != self._told:
            self._told = said
            self.progress(f"so far, {said}")
        seconds, notes = time.monotonic() - self.start, (*self.notes, *notes)
        self.first(replace(blame, notes=notes, trials=self.budget.tried, seconds=seconds, is_complete=False))

    # --- precision ---------------------------------------------------------------------------------------------------

    def _trace(self, folder: Path) -> Findings | None:
        """The error along the graph; None where there is none, or it can't be told."""
        subject = self.subject
        with self._or_missed("the error could not be traced along the graph"):
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
        return None

    def _find_causes(self, findings: Findings) -> None:
        """What made the outputs NaN or infinite, where they are."""
        try:
            outputs = [self.blame.errors.output, *findings.pair.reference.outputs]
            found = nonfinite.causes(findings.pair, findings.by_name, self.subject.case, outputs)
            findings.causes = {each.at.name: each for each in found}
        except Exception as error:
            # Without it there is still what each operator loses by itself.
            self._missed(f"where NaN or infinity comes from could not be looked at: {type(error).__name__}: {error}")

    def _measure_suspects(self, findings: Findings, lowered: LimitResult) -> None:
        """Why the operators that lose most do so, and what the likeliest causes do to the outputs by themselves."""
        subject = self.subject
        suspects = [tensor for tensor in findings.ranked() if findings.is_unsound(tensor)][:TAKEN_APART]
        findings.update(trace.take_apart(findings.pair, suspects, subject.case))
        self.progress("measuring what the likeliest causes do to the outputs")
        chosen = findings.to_measure(_MEASURED)
        known = math.isfinite(lowered.usage) and lowered.usage > 0
        with closing(PartlyLowered(findings.pair, [tensor.node for tensor in chosen], once=True)) as partly_lowered:
            for tensor in chosen:
                outputs = partly_lowered(subject.case, [tensor.node])
                usage = judging.judge(outputs, self.reference, subject.limits)[0].usage
                findings.effects[tensor.name] = usage / lowered.usage if known else float(usage > 1)
                if findings.stands_out(tensor):
                    break

    def _measure_parts(self, findings: Findings) -> None:
        """Of a pair, what each part does to the outputs by itself."""
        pair, errors = findings.pair, self.blame.errors
        nodes = {tensor.node for tensor in findings.tensors}
        parts = {True: quantized_part(self.subject.precision), False: half_part(self.subject.precision)}
        found = {}
        with closing(PartlyLowered(pair, nodes, once=True)) as partly_lowered:
            for is_quantized, part in parts.items():
                lowered = {node for node in nodes if (pair.owner(node) in pair.quantized) == is_quantized}
                outputs = judging.judge(
                    partly_lowered(self.subject.case, lowered), self.reference, self.subject.limits
                )[1]
                found[str(part)] = judging.value_of(outputs, errors.output, errors.metric)
        self.blame = replace(self.blame, parts=found)

    def _note_tiny_output(self, findings: Findings) -> None:
        output = self.blame.errors.output
        tensor = findings.by_name.get(output)
        held = findings.pair.held.get(output)
        if tensor is not None and held is not None and 0 < tensor.error.peak < _TINY * held.smallest_normal:
            self.notes.append(
                f"output {output!r} is at most {tensor.error.peak:.3g} for this input, where the smallest normal value "
                f"of {held.name} is {held.smallest_normal:.3g}: is it an input that the model is meant for?"
            )

    def _calibrate(self, examined: Mapping[str, Any]) -> None:
        """What the other calibration methods would give: last, since one may take as long as all the rest."""
        if self.budget.is_over():
            self._missed("no other calibration method was tried: the budget is spent")
            return
        with self._or_missed("no other calibration method could be tried"):
            found = audit.methods(self.subject, self.budget, self.progress)
            self.blame = replace(self.blame, calibration={**examined, "methods": found})

    def _precision_to_blame(
        self, findings: Findings, kept: keeping.Kept | None, *, conclusive: bool
    ) -> tuple[Blame, list[str]]:
        """The operator to blame, and notes; `conclusive`: the search found no remedy, and went as far as it should."""
        names, blame = self.names, self.blame
        largest = findings.largest_contributions(_LISTED)
        blame = replace(blame, contributions=tuple({**each, "node": names.node(each["node"])} for each in largest))
        causes = [each for each in findings.ranked() if findings.stands_out(each)]
        local = bool(causes) and (not conclusive or findings.kind(causes[0]) in _RUINED)
        if kept is not None:
            # What stands out may have been kept together with the operator that makes most of it.
            causes = [*(each for each in causes if each.node in kept.nodes), *kept.causes]
            local = _is_local(kept, causes, findings)
        if not local:
            notes = []
            if causes:
                worst = self._in_users_names(findings.culprit(causes[0]))
                notes.append(f"most is lost at node {worst.node!r} ({worst.op_type}): {worst.detail}")
            step: Step = "spread" if blame.step == "precision" else blame.step
            misfit = findings.misfit()
            headline = f"calibrated ranges are {misfit} in much of the graph" if misfit else _SPREAD
            return replace(blame, step=step, headline=f"{headline}, no single layer is to blame"), notes
        first = findings.culprit(causes[0])
        alike = [each for each in map(findings.culprit, causes[1:]) if each.kind == first.kind]
        culprit = self._in_users_names(first)
        others = dict.fromkeys(names.node(each.node) for each in alike if each.tensor != first.tensor)
        others.pop(culprit.node, None)
        found = replace(
            blame,
            culprit=culprit,
            others=tuple(others),
            headline=_headline(culprit, len(others)),
            tensors=result.rows(findings.tensors, names, (first.tensor, causes[0].name)),
        )
        return found, []

    def _search(self, findings: Findings, lowered: LimitResult) -> tuple[keeping.Kept | None, bool]:
        """The nodes to keep in FP32, and whether a search that found none went as far as it should."""
        if (lowered.passed and lowered.usage <= self.goal) or self.subject.precision in {"fp32", "tf32"}:
            # TF32 is a choice for a whole engine: no node can be an exception of it.
            return None, False
        if self.budget.is_over():
            self._missed("no set of nodes to keep in FP32 was looked for: the budget is spent")
            return None, False
        self.progress("looking for the nodes to keep in FP32")
        with self._or_missed("the search for nodes to keep in FP32 ended"):
            with closing(
                keeping.Search(self.subject, findings, self.budget, self._pace, in_stretches=self.search_only)
            ) as search:
                kept = search.find(self.goal)
                if kept is not None and self._can_keep(kept):
                    self._advise(kept, search)
            is_over = self.budget.is_over()
            if kept is None:
                failed = f"the {keeping.MOST_TRIED} worst are not enough" if not self.search_only else "all are needed"
                why = "the budget is spent" if is_over else failed
                self.notes.append(f"no set of nodes to keep in FP32 was found: {why}")
            if is_over:
                self.is_complete = False
            return kept, kept is None and not is_over
        return None, False

    def _advise(self, kept: keeping.Kept, search: keeping.Search) -> None:
        """The argument to paste, confirmed by lowering the model with it and checking all inputs, on the engine too."""
        found: keeping.Kept | None = kept
        missed = ""
        for _ in range(_MOST_REBUILT):
            nodes = self._worth_naming(found, search) if found is not None else None
            if found is None or nodes is None:
                break
            self.progress(f"confirming {plural(len(nodes), 'node')} to keep in FP32")
            emulated = relowering.keeping(self.subject, nodes)
            if emulated is None:
                # With ranges that fit all inputs, fewer may do: that was not tried.
                ranges = self.subject.is_quantized
                why = " with these calibrated ranges" if ranges else ": the model does not suit the precision"
                missed = f"every node would have to stay in FP32{why}"
                break
            on_engine = self._on_engine(nodes) if emulated.passed else None
            last = on_engine or emulated
            if last.passed:
                self.blame = replace(
                    self.blame,
                    keep_fp32=(*self.subject.keep_fp32, *nodes),
                    keep_value=last.value,
                    keep_emulated=emulated.value,
                    confirmed=True,
                    confirmed_by="emulation" if on_engine is None else "engine",
                )
                return
            missed = _missed_by(nodes, emulated, on_engine)
            # So much closer must the next one come to what the search sees.
            goal = _MARGIN * found.judgement.usage / last.usage
            self.progress("looking for more nodes to keep in FP32, since these were not enough")
            again = search.find(goal) if 0 < goal < search.goal and not self.budget.is_over() else None
            found = again or (search.larger(found) if search.in_stretches else None)
        if missed:
            self.notes.append(missed)

    def _can_keep(self, kept: keeping.Kept) -> bool:
        """Whether `keep_fp32` does anything for this model."""
        subject = self.subject
        if not subject.lowered.taken_as_it_is:
            return True
        found = self.names.keep(kept.nodes)
        if len(found) <= keeping.MOST_KEPT:
            shown = ", ".join(map(repr, found))
            self.notes.append(
                f"it would pass with these nodes exported in FP32 (no Q/DQ or casts around them): {shown}"
            )
        self.notes.append(f"keep_fp32 has no effect: {subject.model.label} brings its own precision with it")
        return False

    def _worth_naming(self, kept: keeping.Kept, search: keeping.Search) -> tuple[str, ...] | None:
        """What `keep_fp32` has to name; None where that is too much to be advice."""
        found = self.names.keep(kept.nodes)
        if max(len(found), len(kept.nodes)) <= search.most_kept:
            return found
        # One node here may be all that is inside it there.
        inside = f"{len(found)} nodes" if len(kept.nodes) > 1 else f"the {len(found)} nodes in {kept.nodes[0]!r}"
        self.notes.append(
            f"{inside} in FP32 are the fewest that were found to be enough, of {len(search.nodes)} that lose anything: "
            "the error is spread over the graph, another precision or limit may serve better"
            if self.search_only
            else f"it takes {inside} in FP32 to pass: another precision may serve better"
        )
        return None

    def _on_engine(self, nodes: Sequence[str]) -> LimitResult | None:
        """The judgement on all inputs of an engine with these nodes in FP32; None where there was none to be had."""
        if self.engine is None or self.engine.rebuild is None:
            return None
        if self.budget.is_over_for_engines():
            self._missed("the list was not confirmed on the engine: the time for building engines is up")
            return None
        self.progress(f"building an engine with {plural(len(nodes), 'node')} in FP32, to confirm it")
        with (
            self._or_missed("the list was not confirmed on the engine"),
            relowering.lowered_keeping(self.subject, nodes) as lowered,
            self.engine.rebuild(lowered) as runner,
        ):
            return relowering.judge(self.subject, runner)
        return None

    # --- engine ------------------------------------------------------------------------------------------------------

    def _blame_engine(self, findings: Findings | None, emulated: Mapping[str, NDArray[Any]], folder: Path) -> None:
        assert self.engine is not None
        if self.engine.run is None:
            return
        if findings is not None and not findings.pair.unrolled.nodes:
            graphs = findings.pair.lowered, findings.pair.emulated
        else:
            # FP32, a model that could not be traced, or one of which TensorRT is given the loops, not what they run.
            original = self.subject.model.path
            graphs = (
                models.staged(self.subject.lowered.path, original, folder, "lowered"),
                models.staged(self._emulated_path(), original, folder, "emulated"),
            )
        errors = {name: difference(self.engine.outputs[name], emulated[name]).l2 for name in emulated}
        bisection = Bisection(self.subject, self.engine.run, graphs, findings, errors)
        bisection.narrow(self.budget, self.progress)
        self.notes += bisection.notes
        self.blame = replace(self.blame, builds=bisection.builds)
        found = bisection.culprit(self.names)
        if found is None:
            tensor = self.names.tensor(bisection.wrong[0], "", bisection.lowered)
            self.notes.append(
                f"the engine's error against the emulation grows over the graph, at no node in particular: "
                f"{bisection.before:.2g} before tensor {tensor!r}, {bisection.after:.2g} there "
                f"({plural(bisection.builds, 'engine')} built)"
                if bisection.builds
                else "the engine was not narrowed down: the model has no place to cut it at"
            )
            return
        culprit, others = found
        headline = f"{self.subject.system} goes wrong at node {culprit.node!r}"
        if others:
            headline = f"{self.subject.system} goes wrong in one of {len(others) + 1} nodes around {culprit.node!r}"
        if self.blame.culprit is not None:
            self.notes.append(f"{headline}: {culprit.detail}")
        else:
            self.blame = replace(self.blame, culprit=culprit, others=others, headline=headline)

    def _emulated_path(self) -> Path:
        subject = self.subject
        return emulated_path(subject.model, subject.lowered, subject.precision, self.cache)

    def _in_users_names(self, culprit: Culprit) -> Culprit:
        node = self.names.node(culprit.node)
        tensor = self.names.tensor(culprit.tensor, node)
        part = None
        if is_pair(self.subject.precision) and self.quantized is not None:
            part = (quantized_part if culprit.node in self.quantized else half_part)(self.subject.precision)
        op_type = self.names.op_type(node, culprit.op_type)
        return replace(culprit, node=node, op_type=op_type, tensor=tensor, part=part)


_HEADLINES: Mapping[Step, str] = {
    "precision": "the lowered model itself is off",
    "engine": "the lowered model is right, {system} computes something else",
    "both": "the lowered model is off, and {system} computes something else again",
}
_SPREAD = "the error is spread over the graph"


def _is_local(kept: keeping.Kept, causes: Sequence[trace.Tensor], findings: Findings) -> bool:
    """Whether few operators are to blame, rather than the precision as such."""
    if {findings.kind(cause) for cause in kept.causes} <= _RUINED:
        return True
    if causes and findings.stands_out(causes[0]) and findings.kind(causes[0]) in _RUINED:
        return True
    if len(kept.nodes) == 1 and findings.does_most(kept.causes[0]):
        return True
    if any(cause.name in findings.causes for cause in kept.causes):
        return True
    few = max(_FEW_NODES, _LOCAL_SHARE * min(findings.nodes_adding(), _MANY_NODES))
    return len(kept.causes) <= few and any(findings.stands_out(cause) for cause in causes)


def _missed_by(nodes: Sequence[str], emulated: LimitResult, on_engine: LimitResult | None) -> str:
    """What is said of a list that was to be enough."""
    shown = f"keep_fp32={list(nodes)}" if len(nodes) <= _LISTED else f"{len(nodes)} nodes in FP32"
    last = on_engine or emulated
    limit = "" if last.limit is None else f", and the limit is {last.limit:g}"
    if on_engine is None:
        return f"{shown} was to be enough, but lowered so {last.metric} becomes {figure(last.value)}{limit}"
    return (
        f"no keep_fp32 was found that holds on the engine: with {shown} {last.metric} becomes "
        f"{figure(emulated.value)} by emulation, {figure(last.value)} on the engine{limit}"
    )


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
    }[culprit.kind]
    if culprit.is_constant and culprit.kind == "rounding":
        at = f"constant {culprit.tensor!r} comes out otherwise"
    elif culprit.op_type in REPEATING and culprit.kind in {"rounding", "amplified"}:
        at = f"what is lost lies inside node {culprit.node!r}"
    return f"{at}, and {others} more alike" if others else at
