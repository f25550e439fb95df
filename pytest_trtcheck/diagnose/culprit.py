"""Which operator is to blame, and what went wrong in it.

Candidates are ranked by what their operator loses by itself (`trace.Tensor.own`), not by the error that is found there:
errors are handed down, causes are not. Of the first ones it is measured what they do to the outputs.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pytest_trtcheck.diagnose import trace
from pytest_trtcheck.diagnose.cutting import weight_array
from pytest_trtcheck.diagnose.statistics import difference
from pytest_trtcheck.precision.emulate import EXACT_OPERATORS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.diagnose.trace import Tensor

Kind = Literal["overflow", "underflow", "saturation", "range", "weights", "cancellation", "rounding", "engine"]

STANDS_OUT = 5.0
"""An operator whose own error is so many times the usual one is an outlier."""
_HARMLESS = 0.05
_WIDE = 8.0
"""A range so many times larger than what is in it leaves three of eight bits unused."""
_NOTABLE = 0.001
"""A share of saturated elements that can make a difference."""
_DOMINANT = 0.5
_ALMOST_ALL = 0.9
_UNSOUND = 3.0
_MINOR = 0.05
_ALIKE = 1.25
_LEAST_EFFECT = 1e-9
_LEVELS = 127
_SUMS = frozenset(["Add", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "ReduceMean", "ReduceSum", "Sub", "Sum"])
"""Operators whose result can be small because large operands cancel."""


@dataclass(frozen=True)
class Culprit:
    """The operator to blame, and why.

    Parameters
    ----------
    node, op_type
        The operator: what to keep in FP32.
    tensor
        What to look at: its result, or the operand that is at fault.
    kind
        What went wrong.
    detail
        The same in words, with figures.
    own, before, after
        What the operator loses by itself; the largest relative L2 error of its operands in the whole lowered model;
        that of its result there.
    max_abs
        The largest magnitude in `tensor`, in FP32.
    """

    node: str
    op_type: str
    tensor: str
    kind: Kind
    detail: str
    own: float | None = None
    before: float | None = None
    after: float | None = None
    max_abs: float | None = None


class Findings:
    """What a trace says about causes.

    Parameters
    ----------
    pair
        The models that were traced.
    tensors
        From `trace.trace`.
    roundoff
        The relative error that one sound operator adds.
    """

    def __init__(self, pair: Pair, tensors: Sequence[Tensor], roundoff: float) -> None:
        self.pair = pair
        self.roundoff = roundoff
        self.tensors = list(tensors)
        self.by_name = {each.name: each for each in tensors}
        self.effects: dict[str, float] = {}
        """How much of the failure an operator causes when it alone is lowered: 1 is all of it. By tensor."""
        self.contributions: dict[str, float] = {}
        """The same of nodes, in part estimated from the groups that they were measured in."""
        self._position = {each.name: index for index, each in enumerate(tensors)}
        self._readers: dict[str, list[Tensor]] = {}
        for each in tensors:
            for name in each.inputs:
                self._readers.setdefault(name, []).append(each)
        lossy = [each.own for each in trace.floats(tensors) if 0 < each.own < math.inf]
        self.usual = statistics.median(lossy) if lossy else 0.0

    def update(self, tensors: Sequence[Tensor]) -> None:
        """Take in what was learned of tensors since."""
        self.by_name |= {each.name: each for each in tensors}
        self.tensors = [self.by_name[each.name] for each in self.tensors]

    def ranked(self) -> list[Tensor]:
        """Tensors whose operators lose something, the worst first; those that do no harm come last."""
        return sorted((each for each in self.tensors if each.own > 0), key=self._rank)

    def _rank(self, tensor: Tensor) -> tuple[float, ...]:
        position = self._position[tensor.name]
        effect = self._effect(tensor)
        if effect is None:
            return (2 if self._is_harmless(tensor) else 1), -tensor.own, position
        if effect < _MINOR and not self.contributions:
            return 2, -tensor.own, position
        # Of effects that are about the same the first in the graph is the cause, the others follow from it.
        steps = round(math.log(max(effect, _LEAST_EFFECT), _ALIKE)) if math.isfinite(effect) else math.inf
        return 0, -steps, position

    def largest_contributions(self, most: int) -> tuple[Mapping[str, Any], ...]:
        """The nodes that do most harm by themselves, {node, share} each."""
        shares = dict(self.contributions)
        shares |= {self.by_name[name].node: effect for name, effect in self.effects.items()}
        ordered = sorted(shares.items(), key=lambda item: -item[1])[:most]
        return tuple({"node": node, "share": share} for node, share in ordered if share >= _MINOR)

    def _effect(self, tensor: Tensor) -> float | None:
        return self.effects.get(tensor.name, self.contributions.get(tensor.node))

    def to_measure(self, most: int) -> list[Tensor]:
        """The tensors of which the effect on the outputs is worth a run, the likeliest first."""
        chosen: list[Tensor] = []
        for tensor in self.ranked():
            # Behind the first overflows others follow; finite errors shall have their turn as well.
            enough = math.isinf(tensor.own) and sum(math.isinf(each.own) for each in chosen) > most // 2
            if len(chosen) < most and not enough and tensor.node not in {each.node for each in chosen}:
                chosen.append(tensor)
        return chosen

    def stands_out(self, tensor: Tensor) -> bool:
        """Whether the operator loses more than a sound one, and, where that is known, does most of the harm."""
        effect = self._effect(tensor)
        if not self.is_unsound(tensor):
            return False
        outlier = tensor.own >= STANDS_OUT * self.usual
        if effect is not None:
            return effect >= _ALMOST_ALL or (effect >= _DOMINANT and outlier)
        return outlier and not self._is_harmless(tensor)

    def is_unsound(self, tensor: Tensor) -> bool:
        """Whether the operator loses more than sound ones do."""
        return tensor.own >= _UNSOUND * self.roundoff

    def nodes_adding(self) -> int:
        """How many operators lose something at all."""
        return len({each.node for each in self.tensors if each.own > 0})

    def unit(self, tensor: Tensor) -> tuple[str, ...]:
        """The nodes that must stay in FP32 together for the operator to be exact.

        A 16-bit operand is rounded by the operator that made it, so where the operands are at fault those belong to it.
        """
        nodes = {tensor.node: None}
        parts = tensor.parts
        if parts is not None and self.pair.held and parts["activations"] > _DOMINANT * tensor.own:
            nodes |= dict.fromkeys(self._sources(tensor))
        return tuple(nodes)

    def _sources(self, tensor: Tensor) -> list[str]:
        """The operators that round the operands of `tensor`, and those between that only move values."""
        found: list[str] = []
        stack = list(tensor.inputs)
        while stack:
            source = self.by_name.get(stack.pop())
            if source is None or not source.node or source.node in found:
                continue
            found.append(source.node)
            if source.op_type in EXACT_OPERATORS:
                stack += source.inputs
        return found

    def _is_harmless(self, tensor: Tensor) -> bool:
        """Whether what reads it comes out right all the same, as a mask does that becomes -inf before a Softmax."""
        readers = self._readers.get(tensor.name, [])
        return bool(readers) and all(reader.error.l2 < _HARMLESS for reader in readers) and tensor.own > _HARMLESS

    # --- what went wrong ---------------------------------------------------------------------------------------------

    def culprit(self, tensor: Tensor) -> Culprit:
        """What went wrong in the operator behind `tensor`."""
        kind, at, detail = self._what(tensor)
        looked_at = self.by_name.get(at, tensor)
        if kind in {"overflow", "underflow"} and looked_at.node:
            # What overflows is wrong where it is made, whoever reads it.
            tensor = looked_at
        before = [self.by_name[name].error.l2 for name in tensor.inputs if name in self.by_name]
        return Culprit(
            node=tensor.node,
            op_type=tensor.op_type,
            tensor=at,
            kind=kind,
            detail=detail,
            own=tensor.own,
            before=max(before, default=0.0),
            after=tensor.error.l2,
            max_abs=looked_at.error.peak,
        )

    def kind(self, tensor: Tensor) -> Kind:
        """What went wrong, in a word."""
        return self._what(tensor)[0]

    def _what(self, tensor: Tensor) -> tuple[Kind, str, str]:
        operands = [self.by_name[name] for name in tensor.inputs if name in self.by_name]
        overflown = next((each for each in (*operands, tensor) if each.fit.overflow), None)
        if overflown is not None and not math.isfinite(tensor.own):
            return "overflow", overflown.name, self._overflow(overflown)
        parts, own = tensor.parts, tensor.own
        if parts is None:
            return "rounding", tensor.name, _rounding(tensor)
        if parts["weights"] > max(_DOMINANT * own, 1.5 * parts["result"]) and parts["weights"] >= parts["activations"]:
            name, detail = self._weights(tensor)
            if name:
                return "weights", name, detail
        if parts["activations"] > max(_DOMINANT * own, 1.5 * parts["result"]):
            return self._operands(tensor)
        if tensor.fit.underflow > _DOMINANT or tensor.fit.flushed > _NOTABLE:
            return "underflow", tensor.name, self._underflow(tensor)
        return "rounding", tensor.name, _rounding(tensor)

    def _overflow(self, tensor: Tensor) -> str:
        held = self.pair.held[tensor.name]
        count = f"{tensor.fit.overflow:,} of {tensor.error.size:,} elements"
        return f"max|x| {tensor.error.peak:,.6g} is beyond {held.name}'s largest value, {held.largest:,.6g} ({count})"

    def _underflow(self, tensor: Tensor) -> str:
        held = self.pair.held.get(tensor.name)
        if held is None:
            return f"{tensor.fit.flushed:.1%} of the elements are rounded to 0"
        return (
            f"{tensor.fit.underflow:.1%} of the elements lie below {held.name}'s smallest normal value, "
            f"{held.smallest_normal:.3g}, and {tensor.fit.flushed:.1%} become 0 (max|x| {tensor.error.peak:.3g})"
        )

    def _operands(self, tensor: Tensor) -> tuple[Kind, str, str]:
        """Its operands are at fault."""
        operands = [self.by_name[name] for name in tensor.inputs if name in self.by_name]
        for name in self._quantized_operands(tensor):
            found = self._range(name)
            if found is not None:
                return found
        under = max(operands, key=lambda each: each.fit.flushed, default=None)
        if under is not None and under.fit.flushed > _DOMINANT:
            return "underflow", under.name, self._underflow(under)
        largest = max((each.error.peak for each in operands), default=0.0)
        if largest > STANDS_OUT * tensor.error.peak and self.pair.held and tensor.op_type in _SUMS:
            return (
                "cancellation",
                tensor.name,
                (
                    f"operands of up to {largest:.4g} nearly cancel: the result is at most {tensor.error.peak:.4g}, "
                    f"so their rounding weighs {largest / max(tensor.error.peak, 1e-300):,.0f} times as much"
                ),
            )
        return "rounding", tensor.name, _rounding(tensor, "the rounding of its operands")

    def _quantized_operands(self, tensor: Tensor) -> list[str]:
        node = self.pair.node_of(tensor.name)
        return sorted((name for name in node.input if name in self.pair.spans), key=self._badness, reverse=True)

    def _badness(self, name: str) -> float:
        found = self.by_name.get(name)
        if found is None:
            return 0.0
        return (found.fit.saturated or 0.0) * 1e3 + self.pair.spans[name].amax / max(found.error.peak, 1e-300)

    def _range(self, name: str) -> tuple[Kind, str, str] | None:
        """What is wrong with the range of a quantized tensor."""
        tensor = self.by_name.get(name)
        if tensor is None:
            return None
        span, peak, saturated = self.pair.spans[name], tensor.error.peak, tensor.fit.saturated or 0.0
        if saturated > _NOTABLE or (saturated and peak > 2 * span.amax):
            return (
                "saturation",
                name,
                f"{_share(saturated)} of its elements lie outside its range of ±{span.amax:.4g} (max|x| {peak:.4g})",
            )
        if span.amax > _WIDE * peak:
            bits = math.log2(span.amax / peak) if peak else math.inf
            return (
                "range",
                name,
                f"its range of ±{span.amax:.4g} is {span.amax / max(peak, 1e-300):,.0f} times as wide as needed "
                f"(max|x| {peak:.4g}): {min(bits, 8):.0f} of 8 bits are lost",
            )
        return None

    def _weights(self, tensor: Tensor) -> tuple[str, str]:
        """The weight that loses most, and what would be better."""
        reference = self.pair.node_of(tensor.name)
        lowered = next((node for node in self.pair.emulated.nodes if node.name == reference.name), None)
        if lowered is None:
            return "", ""
        worst = ("", 0.0, "")
        for index, (exact, rounded) in enumerate(zip(reference.input, lowered.input, strict=False)):
            if not exact or not self.pair.reference.is_constant(exact) or not self.pair.emulated.is_constant(rounded):
                continue
            before = _constant(self.pair, exact, lowered=False)
            after = _constant(self.pair, rounded, lowered=True)
            if before.shape != after.shape or before.dtype.kind != "f":
                continue
            axis = _output_channels(lowered, index, before.ndim)
            loss = max(difference(after, before).l2, trace.channel_loss(after, before, axis))
            if loss > worst[1]:
                worst = (exact, loss, self._weight_detail(reference.name, index, before, after, loss))
        return _root(self.pair, worst[0]), worst[2]

    def _weight_detail(self, name: str, index: int, before: NDArray[Any], after: NDArray[Any], loss: float) -> str:
        text = f"its weights lose {_share(loss)}"
        flushed = int(np.count_nonzero((after == 0) & (before != 0)))
        node = next((each for each in self.pair.lowered.nodes if each.name == name), None)
        if node is not None and self._scales(node, index) == 1:
            axis = _output_channels(node, index, before.ndim)
            amax = np.abs(before).max(axis=tuple(each for each in range(before.ndim) if each != axis))
            by_channel = _share(_loss_by_channel(before, axis))
            text += (
                f" in one scale for the whole tensor; one per channel would lose {by_channel}, since the channels' "
                f"magnitudes reach from {amax.min():.3g} to {amax.max():.3g}"
            )
        elif np.abs(before).max(initial=0.0) > 1.001 * np.abs(after).max(initial=0.0):
            text += f": values up to {np.abs(before).max():.4g} do not fit the type"
        elif flushed:
            text += f": {_share(flushed / before.size)} of them become 0"
        return text

    def _scales(self, node: onnx.NodeProto, index: int) -> int:
        """How many scales the quantized operand `index` has; 0 where it is not quantized."""
        producer = self.pair.lowered.producer(node.input[index])
        if producer is None or producer.op_type != "DequantizeLinear":
            return 0
        scale = self.pair.lowered.weights.get(producer.input[1])
        return 0 if scale is None else int(weight_array(scale, self.pair.lowered.folder).size)


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.01 else f"{value:.2%}"


def _rounding(tensor: Tensor, what: str = "rounding") -> str:
    return f"{what} costs {tensor.own:.2g} in this operator alone"


def _root(pair: Pair, name: str) -> str:
    """The weight that a constant operand is made of."""
    while (producer := pair.reference.producer(name)) is not None:
        name = producer.input[0]
    return name


def _constant(pair: Pair, name: str, *, lowered: bool) -> NDArray[Any]:
    graph = pair.emulated if lowered else pair.reference
    if name in graph.weights:
        return weight_array(graph.weights[name], graph.folder)
    return graph.run(graph.cut([name], ()), {})[name]


def _output_channels(node: onnx.NodeProto, index: int, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if any(each.name == "transB" and each.i for each in node.attribute) else 1
    return rank - 1 if index == 1 else max(rank - 2, 0)


def _loss_by_channel(weight: NDArray[Any], axis: int) -> float:
    amax = np.abs(weight).max(axis=tuple(each for each in range(weight.ndim) if each != axis), keepdims=True)
    step = np.where(amax > 0, amax / _LEVELS, 1.0)
    return trace.channel_loss((np.rint(weight / step) * step).astype(np.float32), weight, axis)


def worst_ranges(findings: Findings) -> Mapping[str, float]:
    """The tensors of which elements saturate, by share, the worst first."""
    shares = {each.name: each.fit.saturated for each in findings.tensors if each.fit.saturated}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
