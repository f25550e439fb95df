"""What a diagnosis says, as plain data: the `blame` of a parity record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.diagnose.culprit import Culprit
    from pytest_trtcheck.diagnose.naming import Names
    from pytest_trtcheck.diagnose.trace import Tensor

Step = Literal["export", "precision", "engine", "both", "spread"]

MOST_TENSORS = 400


@dataclass(frozen=True)
class Errors:
    """The error of each step, as the metric of the limit that failed.

    Parameters
    ----------
    metric, limit, output
        What was judged.
    export
        The export, in FP32, against its source; None where that is not what failed.
    lowered
        The emulated lowered model against the FP32 reference.
    engine
        The engine against the emulated lowered model; None without one.
    total
        What failed: the engine against the reference, or without one the same as `lowered`.
    """

    metric: str
    limit: float | None
    output: str
    lowered: float | None
    engine: float | None
    total: float | None
    export: float | None = None


@dataclass(frozen=True)
class Blame:
    """Which step lost the accuracy, where, and what to change.

    Parameters
    ----------
    step
        "export": the ONNX model is not its source;
        "precision": the lowering; "engine": TensorRT; "both"; "spread": the precision, but no operator in particular.
    headline
        One line for a person.
    culprit
        The operator to blame; None where the error is spread or could not be traced.
    others
        Further operators with the same fault.
    contributions
        What the nodes that contribute most cause by themselves, lowered alone: {node, share}, 1 being all of the error.
        Errors add up as squares, roughly, so the shares add up to more than 1.
    tensors
        The error along the graph, for reports.
    traced
        The relative L2 error of every tensor of the user's, and what its operator loses by itself: to draw the model.
    keep_fp32
        The whole argument under which the check passes; None where none was found.
    keep_value
        What the failed metric becomes with it: on the engine, where it was confirmed there.
    confirmed
        Whether all inputs were checked with it.
    confirmed_by
        By what: "engine" or "emulation".
    keep_emulated
        What the failed metric becomes with it by emulation.
    is_complete
        Whether all was looked at that was to be: nothing failed, and neither time nor trials ran out.
    parts
        Of a pair ("int8+fp16"), what the failed metric becomes with each part alone: the nodes that are quantized, and
        those that compute in 16 bits. None for other precisions.
    calibration
        What the audit of the calibration data found; None without one.
    builds
        Engines built for bisection.
    """

    step: Step
    headline: str
    errors: Errors
    culprit: Culprit | None = None
    others: tuple[str, ...] = ()
    contributions: tuple[Mapping[str, Any], ...] = ()
    tensors: tuple[Mapping[str, Any], ...] = ()
    traced: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    keep_fp32: tuple[str, ...] | None = None
    keep_value: float | None = None
    confirmed: bool = False
    confirmed_by: Literal["engine", "emulation"] | None = None
    keep_emulated: float | None = None
    parts: Mapping[str, float | None] | None = None
    calibration: Mapping[str, Any] | None = None
    builds: int = 0
    trials: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    is_complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain data. `summary` and `tensor` say again what the report's overview shows."""
        return asdict(self) | {"summary": self.headline, "tensor": self.culprit.tensor if self.culprit else None}


def rows(tensors: Sequence[Tensor], names: Names, marked: Sequence[str] = ()) -> tuple[Mapping[str, Any], ...]:
    """The user's tensors as plain data, at most MOST_TENSORS: `marked` and the worst of their neighbours."""
    tensors = [each for each in tensors if names.has_tensor(each.name)]
    if len(tensors) > MOST_TENSORS:
        stretch = -(-len(tensors) // (MOST_TENSORS - len(marked)))
        stretches = (tensors[start : start + stretch] for start in range(0, len(tensors), stretch))
        kept = {max(each, key=lambda tensor: tensor.error.l2).name for each in stretches}
        tensors = [each for each in tensors if each.name in kept or each.name in marked]
    return tuple(_row(tensor, names) for tensor in tensors)


def traced(tensors: Sequence[Tensor], names: Names) -> dict[str, tuple[float, float]]:
    """`Blame.traced` of what was traced; of what a loop computes again and again, the worst."""
    found: dict[str, tuple[float, float]] = {}
    for each in tensors:
        if names.has_tensor(each.name):
            name = names.tensor(each.name, "")
            before = found.get(name, (0.0, 0.0))
            found[name] = (max(before[0], each.error.l2), max(before[1], each.own))
    return found


def _row(tensor: Tensor, names: Names) -> dict[str, Any]:
    node = names.node(tensor.node)
    return {
        "name": names.tensor(tensor.name, node),
        "node": node or None,
        "op_type": tensor.op_type,
        "error": tensor.error.l2,
        "own": tensor.own,
        "max": tensor.error.max,
        "l2": tensor.error.l2,
        "snr_db": tensor.error.snr_db,
        "max_abs": tensor.error.peak,
        "nonfinite": tensor.error.nonfinite,
        "overflow": tensor.fit.overflow,
        "underflow": tensor.fit.underflow,
        "saturated": tensor.fit.saturated,
    }
