"""The FP32 model, its emulated twin and each lowered operator by itself in one model that measures their tensors.

What leaves it are sums, extremes and small samples. Its nodes are in such an order that every tensor is measured as
soon as it is there, so that, run in this order, it needs little more memory than the two models do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.diagnose import cutting, local

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_trtcheck.diagnose.models import Pair

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_COUNTABLE = frozenset({TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL})
"""What of the rest ONNX Runtime's Equal takes."""
SAMPLE = 1 << 12
"""Elements that leave the model of each tensor, evenly spaced."""
_CHANNEL_AXES = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}
"""Where the operators that have weights by channel put their channels."""
_AXES_AS_INPUT = 18
"""The opset from which on reductions take their axes as an input."""
_LARGEST_DOUBLE = float(np.finfo(np.float64).max)


class Measuring:
    """Builds the model. `results` says under which name each figure of each tensor leaves it.

    Parameters
    ----------
    pair
        The two models.
    tensors
        Common tensors to measure; what they don't need is not computed.
    """

    def __init__(self, pair: Pair, tensors: Iterable[str]) -> None:
        self.pair = pair
        self.tensors = frozenset(tensors)
        self.results: dict[str, dict[str, str]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._lowered_weights: dict[str, None] = {}
        self._emulated: set[str] = set()
        self._operators = local.Builder(pair)
        self._count = 0

    def model(self, *, exact: bool = False) -> onnx.ModelProto:
        """The model; with `exact` it measures in FP64, and minds what is not finite."""
        reference = self.pair.reference
        for index in reference.cut(self.tensors, ()).nodes:
            node = reference.nodes[index]
            self._nodes.append(node)
            for name in node.output:
                if name in self.tensors:
                    measure = self._exactly if exact else self._quickly
                    self.results[name] = measure(name, self._emulated_value(name), self._by_itself(name))
        for name in (each for each in reference.inputs if each in self.tensors):
            self.results[name] = self._input(name)
        inputs = [value for value in reference.proto.graph.input if value.name in reference.inputs]
        outputs = [name for figures in self.results.values() for name in figures.values()]
        model = cutting.assemble(self.pair.emulated.proto, self._nodes, inputs, outputs, [reference])
        model.graph.initializer.extend(self._constants.values())
        for name in self._lowered_weights:
            weight = TensorProto()
            weight.CopyFrom(self.pair.emulated.weights[name])
            weight.name = _lowered(name)
            model.graph.initializer.append(weight)
        return model

    # --- the three versions of a tensor ------------------------------------------------------------------------------

    def _by_itself(self, name: str) -> str:
        """The tensor as its own lowered operator computes it from the FP32 model's values."""
        before = len(self._operators.nodes)
        made = self._operators.result(name, local.WHOLE)
        for node in self._operators.nodes[before:]:
            cutting.rename_reads(node, self._own_weights(node))
            self._nodes.append(node)
        return made

    def _emulated_value(self, name: str) -> str:
        """The tensor as the emulated model computes it."""
        graph = self.pair.emulated
        if name in self._emulated:
            return _emulated(name)
        for index in graph.cut([name], self._emulated).nodes:
            self._emulated.update(graph.nodes[index].output)
            copy = onnx.NodeProto()
            copy.CopyFrom(graph.nodes[index])
            computed = {each: _emulated(each) for each in cutting.reads(copy) if each in graph.producers}
            cutting.rename_reads(copy, {**computed, **self._own_weights(copy)})
            copy.output[:] = [_emulated(each) if each else "" for each in copy.output]
            copy.name = _emulated(copy.name)
            self._nodes.append(copy)
        return _emulated(name)

    def _own_weights(self, node: onnx.NodeProto) -> dict[str, str]:
        """New names for the lowered model's weights, which may have namesakes in the FP32 model."""
        names = {each: _lowered(each) for each in cutting.reads(node) if each in self.pair.emulated.weights}
        self._lowered_weights.update(dict.fromkeys(names))
        return names

    # --- figures -----------------------------------------------------------------------------------------------------

    def _quickly(self, name: str, emulated: str, own: str) -> dict[str, str]:
        kind = self.pair.reference.element_type(name)
        if kind not in FLOATS:
            return self._counted(kind, name, emulated, own)
        x, y, z = (self._as(TensorProto.FLOAT, each, kind) for each in (name, emulated, own))
        d, e = self._op("Sub", y, x), self._op("Sub", z, x)
        return {
            **self._size(name, x),
            "high": self._reduce("ReduceMax", x),
            "low": self._reduce("ReduceMin", x),
            "rr": self._reduce("ReduceSumSquare", x),
            "error_high": self._reduce("ReduceMax", d),
            "error_low": self._reduce("ReduceMin", d),
            "dd": self._reduce("ReduceSumSquare", d),
            **self._by_channel(name, x, e),
            **self._sample(name, x),
            **self._outside(name, x),
        }

    def _input(self, name: str) -> dict[str, str]:
        x = self._op("Cast", name, to=TensorProto.FLOAT)
        return {
            **self._size(name, x),
            "high": self._reduce("ReduceMax", x),
            "low": self._reduce("ReduceMin", x),
            **self._sample(name, x),
            **self._outside(name, x),
        }

    def _counted(self, kind: int | None, name: str, emulated: str, own: str) -> dict[str, str]:
        if kind not in _COUNTABLE:
            return {}
        equal = (self._op("Cast", self._op("Equal", name, each), to=TensorProto.FLOAT) for each in (emulated, own))
        whole, single = (self._reduce("ReduceSum", each) for each in equal)
        return {**self._size(name, name), "equal": whole, "own_equal": single}

    def _size(self, name: str, x: str) -> dict[str, str]:
        """The number of elements, where the file doesn't state it."""
        return {} if self.pair.reference.static_size(name) is not None else {"size": self._op("Size", x)}

    def _by_channel(self, name: str, x: str, own_error: str) -> dict[str, str]:
        """The squares of what the operator loses by itself, channel by channel where there are channels."""
        axis, rank = self.channel_axis(self.pair, name), self.pair.reference.rank(name)
        if axis is None or rank is None:
            return {"own_dd": self._reduce("ReduceSumSquare", own_error)}
        others = [each for each in range(rank) if each != axis]
        return {
            "own_dd": self._reduce("ReduceSumSquare", own_error, others),
            "own_rr": self._reduce("ReduceSumSquare", x, others),
        }

    @staticmethod
    def channel_axis(pair: Pair, name: str) -> int | None:
        """The axis of channels of a tensor whose operator has weights by channel, where its rank is known."""
        axis, rank = _CHANNEL_AXES.get(pair.node_of(name).op_type), pair.reference.rank(name)
        return None if axis is None or rank is None or rank < 2 else axis % rank

    def _sample(self, name: str, x: str) -> dict[str, str]:
        """Evenly spaced elements, to estimate shares of small values from."""
        if name not in self.pair.held and name not in self.pair.spans:
            return {}
        flat = self._op("Reshape", x, self._constant(np.array([-1], np.int64)))
        zero, one, end = (self._constant(np.array([each], np.int64)) for each in (0, 1, np.iinfo(np.int64).max))
        size = self.pair.reference.static_size(name)
        if size is not None:
            step = self._constant(np.array([size // SAMPLE + 1], np.int64))
        else:
            parts = self._op("Div", self._op("Size", x), self._constant(np.array([SAMPLE], np.int64)))
            step = self._op("Add", parts, one)
        return {"sample": self._op("Slice", flat, zero, end, zero, step)}

    def _outside(self, name: str, x: str) -> dict[str, str]:
        """How many elements a quantizer clips."""
        span = self.pair.spans.get(name)
        if span is None:
            return {}
        # Half a step beyond the last value still rounds to it.
        above = self._op("Greater", x, self._scalar(span.high + span.step / 2))
        below = self._op("Less", x, self._scalar(span.low - span.step / 2))
        within = self._op("Min", self._op("Max", x, self._scalar(span.low)), self._scalar(span.high))
        return {
            "outside": self._how_many(self._op("Or", above, below)),
            "clipped_dd": self._reduce("ReduceSumSquare", self._op("Sub", x, within)),
            "squares": self._reduce("ReduceSumSquare", x),
        }

    def _exactly(self, name: str, emulated: str, own: str) -> dict[str, str]:
        kind = self.pair.reference.element_type(name)
        x, y, z = (self._as(TensorProto.DOUBLE, each, kind) for each in (name, emulated, own))
        magnitude = self._op("Abs", x)
        figures = {"peak": self._reduce("ReduceMax", self._finite(magnitude, magnitude))}
        for prefix, other in (("", y), ("own_", z)):
            d = self._op("Sub", other, x)
            distance = self._op("Abs", d)
            both_nan = self._op("And", self._op("IsNaN", x), self._op("IsNaN", other))
            same = self._op("Or", self._op("Equal", x, other), both_nan)
            comparable = self._op("LessOrEqual", distance, self._scalar(_LARGEST_DOUBLE, np.float64))
            fine = self._op("Or", same, comparable)
            zeros = self._op("Where", comparable, x, self._scalar(0.0, np.float64))
            figures |= {
                f"{prefix}dd": self._reduce("ReduceSumSquare", self._finite(d, distance)),
                f"{prefix}rr": self._reduce("ReduceSumSquare", zeros),
                f"{prefix}error": self._reduce("ReduceMax", self._finite(distance, distance)),
                f"{prefix}nonfinite": self._how_many(self._op("Not", fine)),
            }
        return figures

    def _finite(self, value: str, magnitude: str) -> str:
        """`value` with 0 wherever the magnitude is NaN or infinite."""
        finite = self._op("LessOrEqual", magnitude, self._scalar(_LARGEST_DOUBLE, np.float64))
        return self._op("Where", finite, value, self._scalar(0.0, np.float64))

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _op(self, kind: str, *operands: str, **attributes: Any) -> str:
        self._count += 1
        name = f"trtcheck//{self._count}"
        self._nodes.append(helper.make_node(kind, list(operands), [name], name, **attributes))
        return name

    def _reduce(self, kind: str, x: str, axes: Sequence[int] | None = None) -> str:
        if axes is None:
            return self._op(kind, x, keepdims=0)
        if self.pair.emulated.opset() >= _AXES_AS_INPUT:
            return self._op(kind, x, self._constant(np.array(axes, np.int64)), keepdims=0)
        return self._op(kind, x, keepdims=0, axes=list(axes))

    def _how_many(self, condition: str) -> str:
        # In FP64: FP32 counts no further than 2²⁴.
        return self._reduce("ReduceSum", self._op("Cast", condition, to=TensorProto.DOUBLE))

    def _as(self, wanted: int, name: str, kind: int | None) -> str:
        return name if kind == wanted else self._op("Cast", name, to=wanted)

    def _scalar(self, value: float, dtype: Any = np.float32) -> str:
        return self._constant(np.array(value, dtype))

    def _constant(self, array: Any) -> str:
        name = f"trtcheck//{array.dtype.name}{array.shape}{array.tolist()}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return name


def _emulated(name: str) -> str:
    return f"{name}//emulated"


def _lowered(name: str) -> str:
    return f"{name}//lowered"
