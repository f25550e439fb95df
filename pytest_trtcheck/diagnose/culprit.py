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
from pytest_trtcheck.diagnose.unrolling import REPEATING
from pytest_trtcheck.errors import plural
from pytest_trtcheck.precision.emulation.rewrite import EXACT_OPERATORS
from pytest_trtcheck.precision.quantization.plan import output_channels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.diagnose.nonfinite import Cause
    from pytest_trtcheck.diagnose.trace import Tensor
    from pytest_trtcheck.model.pieces import Graph

Kind = Literal[
    "overflow",
    "underflow",
    "saturation",
    "range",
    "weights",
    "cancellation",
    "rounding",
    "amplified",
    "nan",
    "engine",
    "export",
]
_Found = tuple[Kind, str, str]
"""A kind, the tensor to look at, and words."""

_MISFITS: Mapping[Kind, str] = {"saturation": "too small", "range": "too wide"}
STANDS_OUT = 5.0
"""An operator whose own error is so many times the usual one is an outlier."""
_HARMLESS = 0.05
_WIDE = 8.0
"""A range so many times larger than what is in it leaves three of eight bits unused."""
_NOTABLE = 0.001
"""A share of elements rounded to 0 that can make a difference."""
_DOMINANT = 0.5
_ALMOST_ALL = 0.9
_UNSOUND = 3.0
_MINOR = 0.05
_MANY = 0.1
_ALIKE = 1.25
_LEAST_EFFECT = 1e-9
_LEVELS = 127
_COUNTED = frozenset({6, 7, 9})
"""ONNX's INT32, INT64 and BOOL."""
TAKEN_APART = 24
"""Operators that are looked at more closely, if they lose more than sound ones."""


@dataclass(frozen=True)
class Culprit:
    """The operator to blame, and why.

    Parameters
    ----------
    node, op_type
        The operator: what to keep in FP32.
    tensor
        What to look at: its result, or the operand that is at fault; a weight if `is_constant`.
    kind, detail
        What went wrong; the same in words, with figures.
    own, before, after
        What the operator loses by itself; the largest relative L2 error of its operands in the whole lowered model;
        that of its result there.
    max_abs
        The largest magnitude in `tensor`, in FP32.
    part
        Of a pair, the part that the operator belongs to ("int8", "fp16").
    module
        Where the model's source has it, for a model that was exported ("blocks.3.mlp.fc1").
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
    is_constant: bool = False
    part: str | None = None
    module: str | None = None


class Findings:
    """What a trace says about causes; `roundoff` is the relative error that one sound operator adds."""

    def __init__(self, pair: Pair, tensors: Sequence[Tensor], roundoff: float) -> None:
        self.pair = pair
        self.roundoff = roundoff
        self.by_name = {each.name: each for each in tensors}
        self.effects: dict[str, float] = {}
        """How much of the failure an operator causes when it alone is lowered: 1 is all of it. By tensor."""
        self.contributions: dict[str, float] = {}
        """The same of nodes, in part estimated from the groups that they were measured in."""
        self.causes: dict[str, Cause] = {}
        """Of what is not finite in the outputs, by the tensor whose operator is to blame."""
        self._found: dict[str, _Found] = {}
        self._position = {each.name: index for index, each in enumerate(tensors)}
        self._readers: dict[str, list[str]] = {}
        for each in tensors:
            for name in each.inputs:
                self._readers.setdefault(name, []).append(each.name)
        lossy = [each.own for each in tensors if each.error.unequal is None and 0 < each.own < math.inf]
        self.usual = statistics.median(lossy) if lossy else 0.0

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the graph."""
        return list(self.by_name.values())

    def update(self, tensors: Sequence[Tensor]) -> None:
        """Take in what was learned of tensors since."""
        self._found.clear()
        self.by_name |= {each.name: each for each in tensors}

    def ranked(self) -> list[Tensor]:
        """Tensors whose operators lose something, the worst first; those that do no harm come last."""
        return sorted((each for each in self.tensors if each.own > 0 or each.name in self.causes), key=self._rank)

    def _rank(self, tensor: Tensor) -> tuple[float, ...]:
        position = self._position[tensor.name]
        if tensor.name in self.causes:
            return -1, 0, position
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
        if tensor.name in self.causes:
            return True
        effect = self._effect(tensor)
        if not self.is_unsound(tensor):
            return False
        outlier = tensor.own >= STANDS_OUT * self.usual
        if effect is not None:
            return effect >= _ALMOST_ALL or (effect >= _DOMINANT and outlier)
        return outlier and not self._is_harmless(tensor)

    def does_most(self, tensor: Tensor) -> bool:
        """Whether the operator, lowered alone, causes half of the failure or more, however little it loses."""
        return (self._effect(tensor) or 0.0) >= _DOMINANT

    def is_unsound(self, tensor: Tensor) -> bool:
        """Whether the operator loses more than sound ones do."""
        return tensor.own >= _UNSOUND * self.roundoff

    def misfit(self) -> str | None:
        """How the calibrated ranges do not fit, where that is so all over the graph."""
        kinds = [self.kind(each) for each in self.tensors if each.parts is not None and self.is_unsound(each)]
        quantized = min(sum(name in self.by_name for name in self.pair.spans), TAKEN_APART)
        return next((how for kind, how in _MISFITS.items() if 2 * kinds.count(kind) > quantized), None)

    def nodes_adding(self) -> int:
        """How many operators lose something at all."""
        return len({each.node for each in self.tensors if each.own > 0})

    def unit(self, tensor: Tensor) -> tuple[str, ...]:
        """The nodes that must stay in FP32 together for the operator to be exact.

        A 16-bit operand is rounded by the operator that made it, so where the operands are at fault those belong to it.
        """
        if tensor.name in self.causes:
            return self.causes[tensor.name].chain
        nodes = {tensor.node: None}
        parts = tensor.parts
        if parts is not None and self.pair.held and parts["activations"] > _DOMINANT * tensor.own:
            nodes |= dict.fromkeys(self._sources(tensor))
        return tuple(nodes)

    def _sources(self, tensor: Tensor) -> list[str]:
        """The operators that round the operands of `tensor`, and those between that only move values."""
        found: list[str] = []
        stack = self._operands(tensor)
        while stack:
            source = stack.pop()
            if source.node and source.node not in found:
                found.append(source.node)
                if source.op_type in EXACT_OPERATORS:
                    stack += self._operands(source)
        return found

    def _is_harmless(self, tensor: Tensor) -> bool:
        """Whether what reads it comes out right all the same, as a mask does that becomes -inf before a Softmax."""
        readers = [self.by_name[name] for name in self._readers.get(tensor.name, ())]
        return bool(readers) and all(reader.error.l2 < _HARMLESS for reader in readers) and tensor.own > _HARMLESS

    def _operands(self, tensor: Tensor) -> list[Tensor]:
        return [self.by_name[name] for name in tensor.inputs if name in self.by_name]

    # --- what went wrong ---------------------------------------------------------------------------------------------

    def culprit(self, tensor: Tensor) -> Culprit:
        """What went wrong in the operator behind `tensor`."""
        kind, at, detail = self._what(tensor)
        looked_at = self.by_name.get(at, tensor)
        if kind in {"overflow", "underflow"} and looked_at.node and not self._is_on_a_grid(at):
            # What overflows is wrong where it is made, whoever reads it.
            tensor = looked_at
        cause = self.causes.get(tensor.name)
        before = (each.error.l2 for each in self._operands(tensor))
        return Culprit(
            node=tensor.node,
            op_type=tensor.op_type,
            tensor=at,
            kind=kind,
            detail=detail,
            own=tensor.own,
            before=max(before, default=0.0),
            after=tensor.error.l2,
            max_abs=looked_at.error.peak if cause is None else cause.max_abs,
            is_constant=at not in self.by_name,
        )

    def kind(self, tensor: Tensor) -> Kind:
        """What went wrong, in a word."""
        return self._what(tensor)[0]

    def _what(self, tensor: Tensor) -> _Found:
        """As `_looked_up`, which may run a part of the model, looked up once."""
        if tensor.name not in self._found:
            self._found[tensor.name] = self._looked_up(tensor)
        return self._found[tensor.name]

    def _looked_up(self, tensor: Tensor) -> _Found:
        cause = self.causes.get(tensor.name)
        if cause is not None:
            return cause.kind, cause.tensor, cause.detail
        looks = (self._overflown, self._requantized, self._by_parts)
        found = next(filter(None, (look(tensor) for look in looks)), None)
        kind, at, detail = found or ("rounding", tensor.name, _rounding(tensor))
        if kind == "rounding" and not self.is_unsound(tensor):
            kind, detail = "amplified", f"{detail}, no more than is usual"
        iterations = self.pair.unrolled.iterations
        return kind, at, detail + iterations.get(at, iterations.get(tensor.name, ""))

    def _overflown(self, tensor: Tensor) -> _Found | None:
        overflown = next((each for each in (*self._operands(tensor), tensor) if each.fit.overflow), None)
        if overflown is None or math.isfinite(tensor.own):
            return None
        count = f"{overflown.fit.overflow:,} of {plural(overflown.error.size, 'element')}"
        detail = self.pair.held[overflown.name].overflow(overflown.error.peak, count)
        return "overflow", overflown.name, detail

    def _requantized(self, tensor: Tensor) -> _Found | None:
        """What a pair of Q and DQ does to a tensor that no operator reads: an output of the model."""
        dequantize = self.pair.lowered.producer(tensor.name)
        quantize = self.pair.lowered.producer(dequantize.input[0]) if dequantize is not None else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            return None
        source = quantize.input[0]
        if source not in self.pair.spans or source not in self.by_name:
            return None
        found, flushed = self._range(source), self.by_name[source].fit.flushed
        if found is None and flushed > _MANY:
            span = self.pair.spans[source]
            detail = (
                f"{_share(flushed)} of its elements other than 0 become 0: one scale for a range of ±{span.amax:.4g} "
                f"has steps of {span.step:.4g}"
            )
            return "underflow", source, detail
        return found

    def _by_parts(self, tensor: Tensor) -> _Found | None:
        """By which part of the operator loses most: its weights, its operands or its result."""
        parts, own = tensor.parts, tensor.own
        if parts is None:
            return None
        if parts["weights"] > max(_DOMINANT * own, 1.5 * parts["result"]) and parts["weights"] >= parts["activations"]:
            return self._weights(tensor) or ("rounding", tensor.name, _rounding(tensor, "the rounding of its weights"))
        if parts["activations"] > max(_DOMINANT * own, 1.5 * parts["result"]):
            return self._by_operands(tensor)
        if self._vanishes(tensor, flushed=_NOTABLE):
            return "underflow", tensor.name, self._underflow(tensor)
        return None

    def _underflow(self, tensor: Tensor) -> str:
        held = self.pair.held.get(tensor.name)
        if held is None:
            return f"{tensor.fit.flushed:.1%} of the elements are rounded to 0"
        return (
            f"{tensor.fit.underflow:.1%} of the elements lie below {held.name}'s smallest normal value, "
            f"{held.smallest_normal:.3g}, and {tensor.fit.flushed:.1%} become 0 (max|x| {tensor.error.peak:.3g})"
        )

    def _is_on_a_grid(self, name: str) -> bool:
        """Whether a tensor is quantized in even steps, for those that read it."""
        span = self.pair.spans.get(name)
        return span is not None and not span.roundoff

    def _vanishes(self, tensor: Tensor, *, flushed: float) -> bool:
        """Whether so much of a tensor becomes 0 that this is what is wrong with it.

        On a grid of even steps what is rounded to 0 errs no more than the rest; half of what is behind a SiLU is.
        """
        if self._is_on_a_grid(tensor.name):
            return tensor.fit.flushed > _ALMOST_ALL
        return tensor.fit.underflow > _DOMINANT or tensor.fit.flushed > flushed

    def _by_operands(self, tensor: Tensor) -> _Found:
        for name in self._quantized_operands(tensor):
            found = self._range(name)
            if found is not None:
                return found
        operands = self._operands(tensor)
        vanishing = [each for each in operands if self._vanishes(each, flushed=_DOMINANT)]
        under = max(vanishing, key=lambda each: (each.fit.flushed, each.fit.underflow), default=None)
        if under is not None:
            return "underflow", under.name, self._underflow(under)
        largest, peak = max((each.error.peak for each in operands), default=0.0), tensor.error.peak
        if largest > STANDS_OUT * peak and self.pair.held and tensor.op_type in trace.SUMS:
            detail = (
                f"operands of up to {largest:.4g} nearly cancel: the result is at most {peak:.4g}, "
                f"so their rounding weighs {largest / max(peak, 1e-300):,.0f} times as much"
            )
            return "cancellation", tensor.name, detail
        return "rounding", tensor.name, _rounding(tensor, "the rounding of its operands") + self._coarsest(tensor)

    def _coarsest(self, tensor: Tensor) -> str:
        """How coarse the steps of the quantized operand are that they are the coarsest for."""
        found = []
        for name in self._quantized_operands(tensor):
            operand, span = self.by_name.get(name), self.pair.spans[name]
            usual = math.sqrt(operand.error.rr / operand.error.size) if operand and operand.error.size else 0.0
            if usual and not span.roundoff:
                found.append((span.step / usual, name, span, usual))
        if not found:
            return ""
        _, name, span, usual = max(found, key=lambda each: each[0])
        # Behind the cast of a 16-bit input it is still the input.
        shown = self.pair.unrolled.tensors.get(name, name)
        shown = shown.removesuffix("/float") if shown.removesuffix("/float") in self.pair.reference.inputs else shown
        return f": {shown!r} is held in steps of {span.step:.3g} (±{span.amax:.4g}), its usual value is {usual:.3g}"

    def _quantized_operands(self, tensor: Tensor) -> list[str]:
        node = self.pair.node_of(tensor.name)
        return sorted((name for name in node.input if name in self.pair.spans), key=self._badness, reverse=True)

    def _badness(self, name: str) -> float:
        found = self.by_name.get(name)
        if found is None:
            return 0.0
        return (found.fit.saturated or 0.0) * 1e3 + self.pair.spans[name].amax / max(found.error.peak, 1e-300)

    def _range(self, name: str) -> _Found | None:
        """What is wrong with the range of a quantized tensor."""
        tensor = self.by_name.get(name)
        if tensor is None:
            return None
        span, peak, saturated = self.pair.spans[name], tensor.error.peak, tensor.fit.saturated or 0.0
        if saturated and tensor.fit.clipped >= 1:
            detail = (
                f"{_share(saturated)} of its elements lie outside its range of ±{span.amax:.4g} (max|x| {peak:.4g})"
            )
            return "saturation", name, detail
        if span.amax > _WIDE * peak:
            bits = math.log2(span.amax / peak) if peak else math.inf
            detail = (
                f"its range of ±{span.amax:.4g} is {span.amax / max(peak, 1e-300):,.0f} times as wide as needed "
                f"(max|x| {peak:.4g}): {min(bits, 8):.0f} of 8 bits are lost"
            )
            return "range", name, detail
        return None

    def _weights(self, tensor: Tensor) -> _Found | None:
        """The weight that loses most, and what would be better."""
        reference = self.pair.node_of(tensor.name)
        lowered = self.pair.emulated_nodes.get(reference.name)
        if lowered is None:
            return None
        worst: tuple[float, _Found | None] = (0.0, None)
        for index, (exact, rounded) in enumerate(zip(reference.input, lowered.input, strict=False)):
            if not exact or not self.pair.reference.is_constant(exact) or not self.pair.emulated.is_constant(rounded):
                continue
            before, after = _constant(self.pair.reference, exact), _constant(self.pair.emulated, rounded)
            if before.shape != after.shape or before.dtype.kind != "f":
                continue
            axis = _output_channels(lowered, index, before.ndim)
            loss = trace.loss(after, before, axis)
            # Weights that lose no more than any do are no fault; that the operator makes much of it is.
            if loss > max(worst[0], _UNSOUND * self.roundoff):
                scales = self._scales(reference.name, index)
                kind, detail = _weight_detail(before, after, loss, scales=scales, axis=axis)
                worst = loss, self._counted(exact) or (kind, _root(self.pair, exact), detail)
        return worst[1]

    def _counted(self, name: str) -> _Found | None:
        """The integers that a constant operand is looked up by, where they come out otherwise: no weight loses then."""
        reference, emulated = self.pair.reference, self.pair.emulated
        made = [each for node in reference.cut([name]).nodes for each in reference.nodes[node].output]
        shared = [
            each
            for each in made
            if reference.element_type(each) in _COUNTED and each in emulated.producers and emulated.is_constant(each)
        ]
        # Nothing at all is no piece that could be run.
        exact, rounded = (graph.values(shared, {}) if shared else {} for graph in (reference, emulated))
        for each in shared:
            before, after = exact[each], rounded[each]
            if before.shape == after.shape and (count := np.count_nonzero(before != after)):
                where = f"{count:,} of the {plural(before.size, 'number')} of {each!r}"
                return "rounding", each, f"{where}, computed as floats from constants alone, come out otherwise"
        return None

    def _scales(self, node: str, index: int) -> int:
        """How many scales the operand `index` of a node has; 0 where it is not quantized."""
        graph = self.pair.lowered
        operand = next((each.input[index] for each in graph.nodes if each.name == node), "")
        producer = graph.producer(operand)
        if producer is None or producer.op_type != "DequantizeLinear" or producer.input[1] not in graph.weights:
            return 0
        return graph.array(producer.input[1]).size


def _weight_detail(
    before: NDArray[Any], after: NDArray[Any], loss: float, *, scales: int, axis: int | None
) -> tuple[Kind, str]:
    if axis is not None and scales == 1:
        amax = np.abs(before).max(axis=tuple(each for each in range(before.ndim) if each != axis), keepdims=True)
        step = np.where(amax > 0, amax / _LEVELS, 1.0)
        by_channel = trace.channel_loss((np.rint(before / step) * step).astype(np.float32), before, axis)
        return "weights", (
            f"its weights lose {_share(loss)} in one scale for the whole tensor; one per channel would lose "
            f"{_share(by_channel)}, since the channels' magnitudes reach from {amax.min():.3g} to {amax.max():.3g}"
        )
    if before.size == 1 and not scales:
        was, is_now = float(before.reshape(-1)[0]), float(after.reshape(-1)[0])
        kind: Kind = "weights" if is_now else "underflow"
        return "overflow" if abs(was) > 1.001 * abs(is_now) > 0 else kind, (
            f"the constant {was:.6g} becomes {is_now:.6g}"
        )
    text = f"its weights lose {_share(loss)}"
    largest, smallest = (float(np.abs(each).max(initial=0.0)) for each in (before, after))
    if not scales and largest > 1.001 * smallest > 0:
        return "overflow", f"{text}: values up to {largest:.4g} do not fit the type and become {smallest:.4g}"
    gone = before[(after == 0) & (before != 0)].astype(np.float64)
    if gone.size:
        text += f": {_share(gone.size / before.size)} of them, up to {np.abs(gone).max():.3g}, become 0"
    of_all = float(np.square(after.astype(np.float64) - before).sum())
    vanished = not scales and float(np.square(gone).sum()) > _DOMINANT * of_all
    return ("underflow" if vanished else "weights"), text


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.01 else f"{value:.2%}"


def _rounding(tensor: Tensor, what: str = "rounding") -> str:
    if tensor.op_type in REPEATING:
        return f"what its body computes, which was not looked into, costs {tensor.own:.2g}"
    return f"{what} costs {tensor.own:.2g} in this operator alone"


def _root(pair: Pair, name: str) -> str:
    """The weight that a constant operand is made of."""
    while (producer := pair.reference.producer(name)) is not None:
        name = producer.input[0]
    return name


def _constant(graph: Graph, name: str) -> NDArray[Any]:
    return graph.array(name) if name in graph.weights else graph.values([name], {})[name]


def _output_channels(node: onnx.NodeProto, index: int, rank: int) -> int | None:
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return output_channels(node.op_type, index, rank, transposed=transposed)
