"""From a failed check to the step, the operator and the remedy."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import artifacts
from pytest_trtcheck.diagnose import calibration, judging, keeping, models, result, trace
from pytest_trtcheck.diagnose import engine as engines
from pytest_trtcheck.diagnose.culprit import Culprit, Findings
from pytest_trtcheck.diagnose.result import Blame, Errors, Step
from pytest_trtcheck.diagnose.switchboard import Switchboard
from pytest_trtcheck.diagnose.trials import Clock, Subject, Trials
from pytest_trtcheck.errors import TrtCheckError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.diagnose.engine import Engine
    from pytest_trtcheck.diagnose.judging import Judgement
    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.record import OutputRecord

_KEEPS = frozenset({"fp16", "bf16", "int8", "fp8"})
"""The precisions of which `keep_fp32` makes an exception."""
_LOCAL_SHARE = 0.25
_FEW_NODES = 4
_MANY_NODES = 160
_EXPLAINED_BY_ROUNDING = 2.0
"""Two sound ways of rounding differ by √2 of what each of them loses, and by more where the model amplifies it."""
_TINY = 4.0
_LISTED = 10
_TAKEN_APART = 24
"""Operators that are looked at more closely, if they lose more than sound ones."""
_MEASURED = 6
"""Operators of which the effect on the outputs is measured, at a run each."""


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
    TrtCheckError
        The model can't be run any more.
    """
    if emulated is None:
        with closing(artifacts.emulation(subject.model, subject.lowered, subject.precision, cache)) as runner:
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
            step = self._step(lowered, departed, total)
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
        try:
            with tempfile.TemporaryDirectory(prefix="trtcheck-diagnosis-") as folder:
                blame = self._look_closer(step, errors, lowered, emulated, Path(folder))
        except Exception as error:
            # A fault of ours must not hide the failure that it was to explain.
            self.notes.append(f"the diagnosis broke off, which is a fault of its own: {type(error).__name__}: {error}")
            blame = Blame(step, _HEADLINES[step], errors)
        return replace(
            blame,
            trials=self.budget.trials - self.clock.trials,
            seconds=time.monotonic() - self.start,
            notes=tuple(self.notes),
        )

    def _step(self, lowered: Judgement, departed: Judgement, total: Judgement) -> Step:
        if not math.isfinite(lowered.usage):
            if math.isfinite(total.usage):
                self.notes.append("the emulation overflows where the engine does not: the engine rounds less often")
            return "precision"
        if lowered.passed:
            # Neither may fail by itself and both together do: then the larger part is to blame.
            return "engine" if departed.usage >= lowered.usage / 2 else "precision"
        if departed.passed:
            return "precision"
        if departed.usage > _EXPLAINED_BY_ROUNDING * lowered.usage:
            return "both"
        self.notes.append(
            "the engine differs from the emulation by no more than another way of rounding explains: what it adds of "
            "its own, if anything, shows once the precision is right"
        )
        return "precision"

    def _look_closer(
        self, step: Step, errors: Errors, lowered: Judgement, emulated: Mapping[str, NDArray[Any]], folder: Path
    ) -> Blame:
        blame = Blame(step, _HEADLINES[step], errors)
        findings = self._trace(folder)
        if findings is not None:
            blame = replace(blame, tensors=result.rows(findings.tensors))
            self._note_tiny_output(findings, errors.output)
        if step in {"precision", "both"} and findings is not None:
            # First, since it costs little and the search for nodes may use up the budget.
            examined = calibration.examine(
                findings.pair, Trials(self.subject, self.clock), methods=not lowered.passed, progress=self.progress
            )
            if examined is not None:
                blame = replace(blame, calibration=examined.found)
                self.notes += examined.notes
            blame = self._blame_precision(blame, findings, lowered)
        if step in {"engine", "both"}:
            blame = self._blame_engine(blame, findings, emulated, folder)
        return blame

    def _trace(self, folder: Path) -> Findings | None:
        """The error along the graph; None where there is none, or it can't be told."""
        subject = self.subject
        try:
            emulated_path = self._emulated_path()
            if emulated_path == subject.model.path:
                return None
            self.progress("measuring the error along the graph")
            pair = models.stage(
                artifacts.float_path(subject.model, subject.lowered, subject.keep_fp32, self.cache),
                emulated_path,
                subject.lowered.path,
                subject.model.path,
                folder,
            )
            return Findings(pair, trace.trace(pair, subject.case), models.ROUNDOFF[subject.precision])
        except TrtCheckError as error:
            self.notes.append(f"the error could not be traced along the graph: {_first_line(error)}")
            return None

    def _look_at_suspects(self, findings: Findings, lowered: Judgement) -> None:
        """Why the operators that lose most do so, and what the likeliest causes do to the outputs by themselves."""
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

    def _blame_precision(self, blame: Blame, findings: Findings, lowered: Judgement) -> Blame:
        try:
            self._look_at_suspects(findings, lowered)
        except TrtCheckError as error:
            self.notes.append(f"the likeliest causes could not be looked at: {_first_line(error)}")
        kept, conclusive = self._search(findings, lowered)
        blame = replace(blame, contributions=findings.largest_contributions(_LISTED))
        causes: Sequence[trace.Tensor] = [each for each in findings.ranked() if findings.stands_out(each)]
        # What overflows is to blame even where so much does that it is no remedy to keep all of it in FP32.
        local = bool(causes) and (not conclusive or findings.kind(causes[0]) == "overflow")
        if kept is not None:
            local = self._is_local(kept, findings)
            if local:
                causes = sorted(kept.causes, key=lambda cause: not findings.stands_out(cause))
            blame = self._advised(blame, kept, findings.pair)
        if not local:
            if causes:
                worst = findings.culprit(causes[0])
                self.notes.append(f"most is lost at node {worst.node!r} ({worst.op_type}): {worst.detail}")
            step: Step = "spread" if blame.step == "precision" else blame.step
            return replace(blame, step=step, headline=_HEADLINES["spread"])
        culprit = findings.culprit(causes[0])
        alike = [each for each in map(findings.culprit, causes[1:]) if each.kind == culprit.kind]
        others = tuple(dict.fromkeys(each.node for each in alike if each.tensor != culprit.tensor))
        return replace(
            blame,
            culprit=culprit,
            others=others,
            headline=_headline(culprit, len(others)),
            tensors=result.rows(findings.tensors, (culprit.tensor, causes[0].name)),
        )

    def _search(self, findings: Findings, lowered: Judgement) -> tuple[keeping.Kept | None, bool]:
        """The nodes to keep in FP32, and whether a search that found none went as far as it should."""
        if lowered.passed:
            return None, False
        if self._spent():
            self.notes.append("no set of nodes to keep in FP32 was looked for: the budget is spent")
            return None, False
        self.progress("looking for the nodes to keep in FP32")
        try:
            kept = keeping.find(findings.pair, findings, Trials(self.subject, self.clock))
        except TrtCheckError as error:
            self.notes.append(f"the search for nodes to keep in FP32 ended: {_first_line(error)}")
            return None, False
        if kept is None:
            why = "the budget is spent" if self._spent() else f"the {keeping.MOST_TRIED} worst are not enough"
            self.notes.append(f"no set of nodes to keep in FP32 was found: {why}")
        return kept, kept is None and not self._spent()

    def _advised(self, blame: Blame, kept: keeping.Kept, pair: Pair) -> Blame:
        """The argument to paste, confirmed by lowering the model with it and checking all inputs."""
        subject = self.subject
        if len(kept.nodes) > keeping.MOST_KEPT:
            self.notes.append(f"it takes {len(kept.nodes)} nodes in FP32 to pass: another precision may serve better")
            return blame
        if subject.lowered.taken_as_it_is or subject.precision not in _KEEPS:
            shown = ", ".join(repr(node) for node in kept.nodes)
            self.notes.append(f"it would pass with these nodes in FP32: {shown}")
            self.notes.append("keep_fp32 has no effect on this model and precision: export the model that way")
            return blame
        names = keeping.Names(pair, subject.model.path).of(kept.nodes)
        if len(names) > keeping.MOST_KEPT:
            # One node here, all that is inside it there.
            inside = f"the {len(names)} nodes in and around {kept.nodes[0]!r}"
            self.notes.append(f"it takes {inside} in FP32 to pass: another precision may serve better")
            return blame
        self.progress(f"confirming {len(names)} nodes to keep in FP32")
        judgement = Trials(subject, self.clock).confirm(names)
        if not judgement.passed:
            self.notes.append(f"{len(names)} nodes in FP32 were to be enough, but lowered so the check still fails")
            return blame
        keep = (*subject.keep_fp32, *names)
        return replace(blame, keep_fp32=keep, keep_value=judgement.value, confirmed=True)

    def _spent(self) -> bool:
        return self.clock.is_over() or self.clock.trials <= 0

    def _is_local(self, kept: keeping.Kept, findings: Findings) -> bool:
        """Whether few operators are to blame, rather than the precision as such."""
        if {findings.kind(cause) for cause in kept.causes} == {"overflow"}:
            return True
        few = max(_FEW_NODES, _LOCAL_SHARE * min(findings.nodes_adding(), _MANY_NODES))
        return len(kept.causes) <= few and any(findings.stands_out(cause) for cause in kept.causes)

    # --- engine ------------------------------------------------------------------------------------------------------

    def _blame_engine(
        self, blame: Blame, findings: Findings | None, emulated: Mapping[str, NDArray[Any]], folder: Path
    ) -> Blame:
        assert self.engine is not None
        try:
            narrowed = engines.bisect(
                self.subject,
                self.engine,
                findings,
                emulated,
                emulated_path=self._emulated_path(),
                folder=folder,
                clock=Clock(self.budget.engine_seconds, 0),
                progress=self.progress,
            )
        except TrtCheckError as error:
            self.notes.append(f"the engine could not be bisected: {_first_line(error)}")
            return blame
        if narrowed is None:
            return blame
        self.notes += narrowed.notes
        blame = replace(blame, builds=narrowed.builds)
        found = engines.culprit(narrowed)
        if found is None:
            self.notes.append(
                "the engine was not narrowed down: the model has no place to cut it at"
                if not narrowed.builds
                else f"the engine's error against the emulation grows over the graph, at no node in particular: "
                f"{narrowed.before:.2g} before tensor {narrowed.tensor!r}, {narrowed.after:.2g} there "
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
        return artifacts.emulated_path(subject.model, subject.lowered, subject.precision, self.cache)


_HEADLINES: Mapping[Step, str] = {
    "precision": "the lowered model itself is off",
    "engine": "the lowered model is right, TensorRT computes something else",
    "both": "the lowered model is off, and TensorRT computes something else again",
    "spread": "the error is spread over the graph, no single layer is to blame",
}


def _headline(culprit: Culprit, others: int) -> str:
    at = {
        "overflow": f"tensor {culprit.tensor!r} overflows",
        "underflow": f"tensor {culprit.tensor!r} underflows",
        "saturation": f"tensor {culprit.tensor!r} saturates, its calibrated range is too small",
        "range": f"the calibrated range of tensor {culprit.tensor!r} is too wide",
        "weights": f"the weights of node {culprit.node!r} lose too much",
        "cancellation": f"node {culprit.node!r} cancels what its operands were rounded by",
        "rounding": f"node {culprit.node!r} is too sensitive to rounding",
        "engine": f"TensorRT goes wrong at node {culprit.node!r}",
    }[culprit.kind]
    return f"{at}, and {others} more alike" if others else at


def _first_line(error: TrtCheckError) -> str:
    return (error.message.splitlines() or [""])[0]
