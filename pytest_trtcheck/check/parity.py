"""Is the lowered model still the FP32 model? A runner's outputs against the reference, judged and explained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.check import exercised
from pytest_trtcheck.check.request import Known, Outcome
from pytest_trtcheck.choices import with_pairs
from pytest_trtcheck.errors import InputError, ModelError, listed
from pytest_trtcheck.metrics import METRICS, MISMATCHES
from pytest_trtcheck.model.values import is_float
from pytest_trtcheck.record import OutputRecord, ParityRecord, is_bad

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import AtOnce
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import ParitySpec, Precision

    Outputs = Callable[[Case], Mapping[str, NDArray[Any]]]

SAME = 1e-4
"""How far two runs of the FP32 reference on one input may lie apart, as max|a − b| / max|a|."""
REPEATS = 3
"""How often an engine runs on the same input, at the least."""

ROUNDING_NOISE: Mapping[Precision, float] = with_pairs(
    {
        "fp32": 1e-5,
        "tf32": 2e-3,
        "fp16": 2e-3,
        "bf16": 1.6e-2,
        "int8": 1e-2,
        "fp8": 3e-2,
    }
)
"""How far two runs of one engine on one input may lie apart, as max|a − b| / max|a|: about two units in the last place
of the precision, which a change in the order of additions can cost."""


def limits_of(known: Known) -> compare.Limits:
    """The limits of every output, by name.

    Raises
    ------
    ArgumentError
        `tol` names outputs that do not exist, or is missing for a metric that has no default.
    """
    spec = known.request.parity
    batch = _batch_sizes(known)
    parts = dict(known.model.parts)
    outputs = {
        output.name: compare.Division(
            parts.get(output.name, ()), search=True, batch=batch if _is_free(output.shape) else ()
        )
        for output in known.model.outputs
    }
    return compare.resolve_limits(spec.tol, spec.metric, known.computed_in, list(outputs), known=outputs)


def _batch_sizes(known: Known) -> tuple[int, ...]:
    """The sizes of the inputs' first axes, where those are left open and alike: each entry is a sample of its own."""
    batched = [spec.name for spec in known.model.inputs if _is_free(spec.shape)]
    sizes = {tuple({case[name].shape[0] for name in batched}) for case in known.cases} if batched else set()
    return tuple(sorted(size[0] for size in sizes)) if all(len(size) == 1 for size in sizes) else ()


def _is_free(shape: Sequence[int | str | None]) -> bool:
    return bool(shape) and not isinstance(shape[0], int)


def judge(known: Known) -> Outcome:
    """Compare what the runner computes on every case with the reference.

    Raises
    ------
    ModelError
        The reference itself is NaN or infinite throughout, or not the same in two runs.
    ArgumentError
        As `limits_of`.
    """
    limits = limits_of(known)
    same = exercised.Sameness({name: each[0].division.batch for name, each in limits.items()})
    by_case = _measured_by_case(known, known.run, limits, same.look)
    _refuse_without_finite_reference(by_case, known.model)
    measured = _merged(known, by_case)
    outputs = [compare.judge(each, limits[name]) for name, each in measured.items()]
    record = compare.summarize(outputs, known.request.parity.metric.name)
    unread = getattr(known.reference, "unread", ())
    constant = {
        name: f"output {name!r}: every element of its reference is {_shown(each.constant, each.kind)} on these inputs: "
        "what leads there was hardly exercised"
        for name, each in measured.items()
        # Of floats, zeros are not exercised at all.
        if each.constant is not None and (each.constant or each.kind != "float") and not each.uncompared
    }
    more_is_said = [*constant, *(name for name, each in measured.items() if each.uncompared or not each.peak)]
    varied = (*constant.values(), *same.notes(more_is_said))
    notes = (*unread, *varied, *compare.unexercised_notes(outputs), *compare.loose_notes(outputs))
    if record.verdict == "pass":
        return _seen(known, limits, Outcome(record, notes=notes))
    if record.verdict == "not_measured":
        return _nothing_compared(known, record, outputs)
    worst = compare.worst_case(next(output for output in outputs if is_bad(output.verdict)))
    if record.verdict == "fail":
        _refuse_random_reference(known, worst)
    found = _examined(known, outputs, measured)
    return Outcome(record, measured, found, _misplaced(found), notes, worst)


def _shown(value: float, kind: str) -> str:
    return str(bool(value)) if kind == "bool" else f"{value:.9g}"


def _seen(known: Known, limits: compare.Limits, outcome: Outcome) -> Outcome:
    """A pass with what passed by a metric of the user's that passes anything: an error where nothing else did."""
    blind = {
        (
            output.name,
            limit.metric.name,
        ): f"metric {limit.metric.name}: an output {output.name!r} of zeros, and one with "
        f"all signs changed, would keep {limit.limit:g} as well: it tells nothing from anything"
        for output in known.model.outputs
        for limit in (limits[output.name] if is_float(output) else ())
        if limit.metric.name not in METRICS and limit.metric is not MISMATCHES and not limit.metric.joins
        if exercised.is_blind(limit, output.name, (known.reference(case)[output.name] for case in known.cases))
    }
    record = outcome.record
    passed = {(each.name, entry.metric) for each in record.outputs for entry in each.judged if entry.verdict == "pass"}
    if blind and passed <= blind.keys():
        reason = "; ".join(blind.values())
        error = InputError(
            reason,
            "look whether the function uses both of its arguments, and give inputs that the model finds something in",
            code="not-exercised",
        )
        return Outcome(replace(record, verdict="error", reason=reason), error=error)
    return replace(outcome, notes=(*outcome.notes, *blind.values()))


def is_joint(limits: Sequence[compare.Limit]) -> bool:
    """Whether an output is judged together with others, and not element by element."""
    return any(limit.metric.joins for limit in limits)


def refuse_random(model: OnnxModel) -> None:
    """Refuse a model that computes something else in every run.

    Raises
    ------
    ModelError
        It holds random nodes that its outputs depend on; they are named.
    """
    if not model.random:
        return
    raise ModelError(
        f"{model.label}: the model is random by itself: {listed(model.random)}",
        "two runs of it differ, so there is nothing to compare: export it in evaluation mode, or with the random "
        "values as inputs",
        code="model-random",
    )


def _refuse_random_reference(known: Known, case: int) -> None:
    """Only where a check failed: a model that is random and yet agrees with its reference is not known."""
    first, second = (known.reference.computed(known.cases[case]) for _ in range(2))
    for name, expected in first.items():
        spread = _spread(expected, second[name])
        if spread > SAME:
            raise ModelError(
                f"{known.model.label}: the model is random by itself: two runs of the FP32 reference on the same input "
                f"lie {spread:.3g} apart in output {name!r} (relative to its largest value)",
                "look for sampling, or for a Dropout that trains; export the model in evaluation mode",
                code="model-random",
            )


def _nothing_compared(known: Known, record: ParityRecord, outputs: Sequence[OutputRecord]) -> Outcome:
    """The error of a check whose every output is empty, or was not exercised by any input."""
    empty = all(output.details.uncompared for output in outputs)
    listed = "\n  ".join(compare.unexercised_notes(outputs))
    reason = f"{known.title}: nothing was compared"
    error = InputError(
        f"{reason}:\n  {listed}",
        "give inputs that the model finds something in, with at least one row"
        if empty
        else "give real inputs: return them from the test, or by the fixture trt_inputs; on these, a model that had "
        "lost everything would look the same",
        code="not-exercised",
    )
    return Outcome(replace(record, verdict="error", reason=reason), error=error)


def refuse_empty(cases: Sequence[Case]) -> None:
    """Refuse inputs without rows.

    Raises
    ------
    InputError
        Every input of a case has an axis of length 0.
    """
    for index, case in enumerate(cases):
        if case and all(not array.size for array in case.values()):
            listed = ", ".join(f"{name} {list(array.shape)}" for name, array in case.items())
            which = f"inputs[{index}] holds" if len(cases) > 1 else "the inputs hold"
            raise InputError(
                f"{which} no elements: {listed}",
                "give at least one row: nothing would be compared",
                code="input-empty",
            )


def _misplaced(found: Mapping[str, compare.Examination]) -> str:
    """What the headline says where the right values came out in the wrong place; empty where they did not."""
    holds = {name: pattern.other for name, each in found.items() for pattern in each.patterns if pattern.other}
    swapped = [(one, other) for one, other in holds.items() if holds.get(other) == one and one < other]
    if swapped:
        return " and ".join(f"outputs {one!r} and {other!r} are swapped" for one, other in swapped)
    if holds:
        return ", ".join(f"output {one!r} is swapped: it holds {other!r}" for one, other in holds.items())
    for name, each in found.items():
        for pattern in each.patterns:
            if pattern.kind in _REORDERED and each.size >= _TELLING and each.part is None:
                return f"output {name!r} is the reference with its elements swapped: {pattern.text}"
    return ""


_REORDERED = frozenset({"permuted", "transposed", "reversed"})
_TELLING = 64
"""Elements from which an order that explains the error is no accident."""


def judged(
    known: Known, actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], limits: compare.Limits
) -> list[OutputRecord]:
    """What one case of the open runner comes to, output by output."""
    found = compare.measure_all(actual, expected, limits, expected_dtypes=_dtypes(known, known.run))
    return [compare.judge(each, limits[name]) for name, each in found.items()]


def _measured_by_case(
    known: Known,
    actual: Outputs,
    limits: compare.Limits,
    look: Callable[[Mapping[str, NDArray[Any]]], None] = lambda _: None,
) -> list[dict[str, compare.Measurement]]:
    """What is measured of each case; `look` sees its reference."""
    dtypes, found = _dtypes(known, actual), []
    for case in known.cases:
        given, expected = actual(case), known.reference(case)
        look(expected)
        found.append(compare.measure_all(given, expected, limits, expected_dtypes=dtypes))
    return found


def _dtypes(known: Known, actual: Outputs) -> Mapping[str, Any] | None:
    """TensorRT has no FP64: an engine gives FP32 where the model has FP64."""
    is_engine = actual == known.run and known.running.evidence == "engine"
    found = {output.name: np.float32 for output in known.model.outputs if is_engine and output.dtype == "float64"}
    return found or None


def _merged(known: Known, by_case: Sequence[Mapping[str, compare.Measurement]]) -> dict[str, compare.Measurement]:
    return {output.name: compare.merge([each[output.name] for each in by_case]) for output in known.model.outputs}


class Failure(NamedTuple):
    """A limit that is exceeded; without a metric: an output of another shape, type or pattern of NaN."""

    output: str
    metric: str = ""
    value: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        if not self.metric:
            return f"{self.output!r} has another shape, type or pattern of NaN"
        return f"{self.metric} of {self.output!r} is {self.value:.3g}, the limit is {self.limit:.3g}"


def first_failure(
    known: Known, actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]
) -> Failure | None:
    """The first limit that the outputs of one case exceed; None where they keep all of them."""
    for output in compare.judge_all(actual, expected, limits_of(known)):
        name = output.name
        for entry in output.judged if is_bad(output.verdict) else ():
            if is_bad(entry.verdict) and entry.value is not None and entry.limit is not None:
                return Failure(name, entry.metric, entry.value, entry.limit)
        if is_bad(output.verdict):
            return Failure(name)
    return None


def with_emulation(known: Known, emulated: Outputs) -> ParityRecord:
    """The record of an engine's check with the emulated model's errors beside the engine's, by output and metric."""
    limits = limits_of(known)
    errors = {
        name: _errors(compare.judge(each, limits[name]))
        for name, each in _merged(known, _measured_by_case(known, emulated, limits)).items()
    }
    outputs = tuple(
        replace(output, details=replace(output.details, emulated=errors[output.name]))
        for output in known.parity.outputs
    )
    return replace(known.parity, outputs=outputs)


def _errors(output: OutputRecord) -> dict[str, float | None]:
    """An output's errors by metric: those that every record has, and those that were judged."""
    usual = {"max": output.max, "l2": output.l2, "abs": output.abs}
    return {**usual, **{entry.metric: entry.value for entry in output.judged}}


def not_measured(spec: ParitySpec, reason: str) -> ParityRecord:
    """Parity that could not be checked, and why."""
    return ParityRecord("not_measured", spec.metric.name, None, None, reason=reason)


def unstable(run: Outputs, case: Case, precision: Precision, *, bitwise: bool) -> str | None:
    """Why an engine cannot be trusted to compute the same twice; None when it does.

    Parameters
    ----------
    bitwise
        Whether any difference at all counts; otherwise differences up to `ROUNDING_NOISE` are let pass.
    """
    first, *others = [run(case) for _ in range(REPEATS)]
    allowed = 0.0 if bitwise else ROUNDING_NOISE[precision]
    for name, expected in first.items():
        spread = max(_spread(expected, other[name]) for other in others)
        if spread > allowed:
            return (
                f"output {name!r} is not deterministic: {REPEATS} runs on the same input lie {spread:.3g} apart "
                f"(relative to the largest value; {allowed:g} is allowed for {precision})"
            )
    return None


def apart(first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]]) -> float:
    """How far the outputs of two runs lie apart, as max|a - b| / max|a| of the output that differs most."""
    return max((_spread(array, second[name]) for name, array in first.items()), default=0.0)


def unlike_alone(known: Known, found: AtOnce) -> str | None:
    """Why requests that are made together do not give what each gives alone, by the check's own limits; None if so."""
    for index, (alone, together) in enumerate(zip(found.alone, found.together, strict=True)):
        failure = first_failure(known, together, alone)
        if failure is not None:
            return (
                f"requests that are sent at once do not give what each gives alone: of request [{index}] of "
                f"{len(found.together)}, {failure} ({found.note})"
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


def _refuse_without_finite_reference(by_case: Sequence[Mapping[str, compare.Measurement]], model: OnnxModel) -> None:
    """A reference that is NaN or infinite throughout agrees with anything that is ruined the same way.

    On one input of several is enough: what is compared there says nothing.
    """
    for index, measured in enumerate(by_case):
        for name, each in measured.items():
            bad = each.nonfinite.nan_reference + each.nonfinite.inf_reference
            if each.size and bad >= each.size:
                where = f" on input [{index}]" if len(by_case) > 1 else ""
                raise ModelError(
                    f"{model.label}: the FP32 reference itself is NaN or infinite in every element of output "
                    f"{name!r}{where}",
                    "there is nothing to compare with: give inputs that the model is meant for",
                    code="reference-not-finite",
                )


def _examined(
    known: Known, outputs: Sequence[OutputRecord], measured: Mapping[str, compare.Measurement]
) -> dict[str, compare.Examination]:
    """Each failed output looked at once more on its worst case.

    It is computed again: keeping every output of every case would cost the memory of all of them.
    """
    found: dict[str, compare.Examination] = {}
    for output in outputs:
        # What has no order of its own has no elements to look at.
        if not is_bad(output.verdict) or is_joint(limits_of(known)[output.name]):
            continue
        index = compare.worst_case(output)
        found |= compare.examine(
            known.run(known.cases[index]),
            known.reference(known.cases[index]),
            measured,
            [output],
            known.computed_in,
            case=index if len(known.cases) > 1 else None,
            can_keep=not known.lowered.taken_as_it_is,
            has_no_order=any("NMS" in each or each == "NonMaxSuppression" for each in known.model.op_types),
            limits=limits_of(known),
        )
    return found
