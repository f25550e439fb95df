"""Is the model in its precision still the FP32 model? Outputs of a runner against the reference, judged and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.errors import ModelError
from pytest_trtcheck.record import OutputRecord, ParityRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.artifacts import Reference
    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import ParitySpec, Precision

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
    """What was found: the record, the text of a failure, and what else a person should know."""

    record: ParityRecord
    message: str | None
    notes: tuple[str, ...]


def judge(model: OnnxModel, spec: ParitySpec, runner: Runner, reference: Reference, cases: Sequence[Case]) -> Outcome:
    """Compare what `runner` computes on every case with the reference.

    Raises
    ------
    ModelError
        The reference itself is NaN or infinite throughout.
    ArgumentError
        `tol` names outputs that do not exist, or is missing for a metric that has no default.
    """
    precision = spec.precision[0]
    limits = compare.resolve_limits(spec.tol, spec.metric, precision, [output.name for output in model.outputs])
    by_case = [compare.measure_all(runner(case), reference(case), limits) for case in cases]
    measured = {output.name: compare.merge([each[output.name] for each in by_case]) for output in model.outputs}
    _refuse_without_finite_reference(measured, model)
    outputs = [compare.judge(each, limits[name]) for name, each in measured.items()]
    record = compare.summarize(outputs, spec.metric)
    message = None
    if record.verdict != "pass":
        message = _explanation(model, precision, outputs, measured, cases, runner, reference)
    return Outcome(record, message, compare.loose_notes(outputs))


def not_measured(spec: ParitySpec, reason: str) -> Outcome:
    """Parity that could not be checked, and why."""
    return Outcome(ParityRecord("not_measured", spec.metric, None, None, reason=reason), reason, ())


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


def _explanation(
    model: OnnxModel,
    precision: Precision,
    outputs: Sequence[OutputRecord],
    measured: Mapping[str, compare.Measurement],
    cases: Sequence[Case],
    runner: Runner,
    reference: Reference,
) -> str:
    """What failed, where, and the next step; each failed output is looked at once more on its worst case.

    It is computed again: keeping every output of every case would cost the memory of all of them.
    """
    found: dict[str, compare.Examination] = {}
    for output in outputs:
        if output.verdict == "pass":
            continue
        index = compare.worst_case(output)
        found |= compare.examine(
            runner(cases[index]),
            reference(cases[index]),
            measured,
            [output],
            precision,
            case=index if len(cases) > 1 else None,
        )
    how = "on the GPU" if runner.evidence == "engine" else "emulated on the CPU: no GPU ran it"
    head = f"{model.label} in {precision} differs from its FP32 reference ({how})"
    return f"{head}\n\n{compare.explain(measured, outputs, found)}"
