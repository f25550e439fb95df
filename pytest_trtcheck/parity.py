"""Is the lowered model still the FP32 model? A runner's outputs against the reference, judged and explained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.errors import ModelError
from pytest_trtcheck.record import OutputRecord, ParityRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.artifacts import AnyReference
    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.job import Job
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import ParitySpec, Precision

    Outputs = Callable[[Case], Mapping[str, NDArray[Any]]]

REPEATS = 3
"""How often an engine runs on the same input, at the least."""

ROUNDING_NOISE: Mapping[Precision, float] = {
    "fp32": 1e-5,
    "tf32": 2e-3,
    "fp16": 2e-3,
    "bf16": 1.6e-2,
    "int8": 1e-2,
    "fp8": 3e-2,
}
"""How far two runs of one engine on one input may lie apart, as max|a − b| / max|a|: about two units in the last place
of the precision, which a change in the order of additions can cost."""


@dataclass(frozen=True)
class Outcome:
    """What was found: the record, and what a person should know.

    Parameters
    ----------
    head, text
        The first line of a failure, and all that follows; empty where there is nothing to say.
    worst
        The index of the case on which a failure is best looked at.
    observations
        The text without advice on precision: for what stands below a diagnosis, which gives its own.
    """

    record: ParityRecord
    head: str = ""
    text: str = ""
    observations: str = ""
    notes: tuple[str, ...] = ()
    worst: int = 0

    @property
    def message(self) -> str | None:
        """The text of a failure."""
        return "\n\n".join(filter(None, (self.head, self.text))) or None


def limits_of(job: Job) -> compare.Limits:
    """The limits of every output, by name.

    Raises
    ------
    ArgumentError
        `tol` names outputs that do not exist, or is missing for a metric that has no default.
    """
    spec = job.request.parity
    return compare.resolve_limits(spec.tol, spec.metric, job.computed_in, [output.name for output in job.model.outputs])


def judge(job: Job, runner: Runner, reference: AnyReference) -> Outcome:
    """Compare what `runner` computes on every case with the reference.

    Raises
    ------
    ModelError
        The reference itself is NaN or infinite throughout.
    ArgumentError
        As `limits_of`.
    """
    limits = limits_of(job)
    measured = _measured(job, runner, reference, limits)
    _refuse_without_finite_reference(measured, job.model)
    outputs = [compare.judge(each, limits[name]) for name, each in measured.items()]
    record = compare.summarize(outputs, job.request.parity.metric)
    if record.verdict == "pass":
        return Outcome(record, notes=compare.loose_notes(outputs))
    how = "on the GPU" if runner.evidence == "engine" else "emulated on the CPU: no GPU ran it"
    failed = next(output for output in outputs if output.verdict != "pass")
    found = _examined(job, outputs, measured, runner, reference)
    return Outcome(
        record,
        head=f"{job.title} differs from {reference.title} ({how})",
        text=compare.explain(measured, outputs, found),
        observations=compare.explain(measured, outputs, found, is_diagnosed=True),
        notes=compare.loose_notes(outputs),
        worst=compare.worst_case(failed),
    )


def _measured(job: Job, actual: Outputs, expected: Outputs, limits: compare.Limits) -> dict[str, compare.Measurement]:
    # TensorRT has no FP64: an engine gives FP32 where the model has FP64.
    is_engine = getattr(actual, "evidence", None) == "engine"
    dtypes = {output.name: np.float32 for output in job.model.outputs if is_engine and output.dtype == "float64"}
    by_case = [
        compare.measure_all(actual(case), expected(case), limits, expected_dtypes=dtypes or None) for case in job.cases
    ]
    return {output.name: compare.merge([each[output.name] for each in by_case]) for output in job.model.outputs}


def first_failure(job: Job, actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> str | None:
    """The first limit that the outputs of one case exceed, in words; None where they keep all of them."""
    limits = limits_of(job)
    for name, each in compare.measure_all(actual, expected, limits).items():
        output = compare.judge(each, limits[name])
        for entry in output.judged if output.verdict != "pass" else ():
            if entry["verdict"] != "pass":
                return f"{entry['metric']} of {name!r} is {entry['value']:.3g}, the limit is {entry['limit']:.3g}"
        if output.verdict != "pass":
            return f"{name!r} has another shape, type or pattern of NaN"
    return None


def with_emulation(job: Job, outcome: Outcome, emulated: Outputs, reference: AnyReference) -> Outcome:
    """The outcome of an engine's check with the emulated model's errors beside the engine's, by output and metric."""
    limits = limits_of(job)
    errors = {
        name: _errors(compare.judge(each, limits[name]))
        for name, each in _measured(job, emulated, reference, limits).items()
    }
    outputs = tuple(
        replace(output, details={**output.details, "emulated": errors[output.name]})
        for output in outcome.record.outputs
    )
    return replace(outcome, record=replace(outcome.record, outputs=outputs))


def _errors(output: OutputRecord) -> dict[str, float | None]:
    """An output's errors by metric: those that every record has, and those that were judged."""
    usual = {"max": output.max, "l2": output.l2, "abs": output.abs}
    return {**usual, **{entry["metric"]: entry["value"] for entry in output.judged}}


def not_measured(spec: ParitySpec, reason: str) -> Outcome:
    """Parity that could not be checked, and why."""
    return Outcome(ParityRecord("not_measured", spec.metric, None, None, reason=reason), text=reason)


def unstable(runner: Runner, case: Case, precision: Precision, *, bitwise: bool) -> str | None:
    """Why an engine cannot be trusted to compute the same twice; None when it does.

    Parameters
    ----------
    bitwise
        Whether any difference at all counts; otherwise differences up to `ROUNDING_NOISE` are let pass.
    """
    first, *others = [runner(case) for _ in range(REPEATS)]
    allowed = 0.0 if bitwise else ROUNDING_NOISE[precision]
    for name, expected in first.items():
        spread = max(_spread(expected, other[name]) for other in others)
        if spread > allowed:
            return (
                f"output {name!r} is not deterministic: {REPEATS} runs on the same input lie {spread:.3g} apart "
                f"(relative to the largest value; {allowed:g} is allowed for {precision})"
            )
    return None


def _spread(first: NDArray[Any], second: NDArray[Any]) -> float:
    if first.shape != second.shape:
        return float("inf")
    if first.dtype.kind not in "fV":
        return 0.0 if np.array_equal(first, second) else float("inf")
    a, b = first.astype(np.float64), second.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    if not np.isfinite(a[~same]).all() or not np.isfinite(b[~same]).all():
        return float("inf")
    peak = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return float(np.abs(a[~same] - b[~same]).max()) / (peak or 1.0)


def failed(record: ParityRecord, reason: str) -> ParityRecord:
    """The record with a verdict that no metric can save."""
    return replace(record, verdict="fail", reason=reason)


def _refuse_without_finite_reference(measured: Mapping[str, compare.Measurement], model: OnnxModel) -> None:
    """A reference that is NaN or infinite throughout agrees with anything that is ruined the same way."""
    for name, each in measured.items():
        bad = each.nonfinite.nan_reference + each.nonfinite.inf_reference
        if each.size and bad >= each.size:
            raise ModelError(
                f"{model.label}: the FP32 reference itself is NaN or infinite in every element of output {name!r}",
                "there is nothing to compare with: give inputs that the model is meant for",
            )


def _examined(
    job: Job,
    outputs: Sequence[OutputRecord],
    measured: Mapping[str, compare.Measurement],
    runner: Runner,
    reference: AnyReference,
) -> dict[str, compare.Examination]:
    """What failed, where, and the next step; each failed output is looked at once more on its worst case.

    It is computed again: keeping every output of every case would cost the memory of all of them.
    """
    found: dict[str, compare.Examination] = {}
    for output in outputs:
        if output.verdict == "pass":
            continue
        index = compare.worst_case(output)
        found |= compare.examine(
            runner(job.cases[index]),
            reference(job.cases[index]),
            measured,
            [output],
            job.computed_in,
            case=index if len(job.cases) > 1 else None,
            can_keep=not job.lowered.taken_as_it_is,
        )
    return found
