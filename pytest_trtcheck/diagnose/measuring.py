"""The FP32 model, its emulated twin and each lowered operator by itself in one model that measures their tensors.

What leaves it are sums, extremes and small samples. Its nodes are in such an order that every tensor is measured as
soon as it is there, so that, run in this order, it needs little more memory than the two models do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from pytest_trtcheck.diagnose.per_operator import WHOLE, Builder
from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.pieces import Instruments

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

    from pytest_trtcheck.diagnose.models import Pair

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_COUNTABLE = frozenset({TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL})
"""What of the rest ONNX Runtime's Equal takes."""
SAMPLE = 1 << 12
"""Elements that leave the model of each tensor, evenly spaced."""
_LARGEST_DOUBLE = float(np.finfo(np.float64).max)


class Measuring(Instruments):
    """Builds the model that measures `tensors`; what they don't need is not computed."""

    def __init__(self, pair: Pair, tensors: Iterable[str]) -> None:
        super().__init__(pair.emulated.opset())
        self.pair = pair
        self.tensors = frozenset(tensors)
        self._emulated: set[str] = set()
        self._operators = Builder(pair)

    def build(self, *, exact: bool) -> tuple[onnx.ModelProto, dict[str, dict[str, str]]]:
        """The model, and under which name each figure of each tensor leaves it.

        With `exact` it measures in FP64, and minds what is not finite.
        """
        reference = self.pair.reference
        measure = self._exactly if exact else self._quickly
        results: dict[str, dict[str, str]] = {}
        for index in reference.cut(self.tensors).nodes:
            self.nodes.append(reference.nodes[index])
            for name in reference.nodes[index].output:
                if name in self.tensors:
                    results[name] = measure(name, self._emulated_value(name), self._by_itself(name))
        for name in (each for each in reference.inputs if each in self.tensors):
            results[name] = self._of_tensor(name, self.op("Cast", name, to=TensorProto.FLOAT))
        outputs = [name for figures in results.values() for name in figures.values()]
        return self.model(outputs, self.pair.emulated, reference), results

    # --- the three versions of a tensor ------------------------------------------------------------------------------

    def _by_itself(self, name: str) -> str:
        """The tensor as its own lowered operator computes it from the FP32 model's values."""
        before = len(self._operators.nodes)
        made = self._operators.result(name, WHOLE)
        self.nodes += self._operators.nodes[before:]
        return made

    def _emulated_value(self, name: str) -> str:
        """The tensor as the emulated model computes it."""
        graph = self.pair.emulated
        for index in () if name in self._emulated else graph.cut([name], self._emulated).nodes:
            node = graph.nodes[index]
            self._emulated.update(node.output)
            copy = pieces.copied(node, name=_emulated(node.name))
            pieces.rename_reads(copy, {each: _emulated(each) for each in pieces.reads(node) if each in graph.producers})
            copy.output[:] = [_emulated(each) if each else "" for each in node.output]
            self.nodes.append(copy)
        return _emulated(name)

    # --- figures -----------------------------------------------------------------------------------------------------

    def _quickly(self, name: str, emulated: str, own: str) -> dict[str, str]:
        kind = self.pair.reference.element_type(name)
        if kind not in FLOATS:
            return self._counted(kind, name, emulated, own)
        x, y, z = (self._as(TensorProto.FLOAT, each, kind) for each in (name, emulated, own))
        d, e = self.op("Sub", y, x), self.op("Sub", z, x)
        return {
            **self._of_tensor(name, x),
            "rr": self.reduce("ReduceSumSquare", x),
            "error_high": self.reduce("ReduceMax", d),
            "error_low": self.reduce("ReduceMin", d),
            "dd": self.reduce("ReduceSumSquare", d),
            **self._by_channel(name, x, e),
        }

    def _of_tensor(self, name: str, x: str) -> dict[str, str]:
        return {
            **self._size(name, x),
            "high": self.reduce("ReduceMax", x),
            "low": self.reduce("ReduceMin", x),
            **self._sample(name, x),
            **self._outside(name, x),
        }

    def _counted(self, kind: int | None, name: str, emulated: str, own: str) -> dict[str, str]:
        if kind not in _COUNTABLE:
            return {}
        equal = (self.op("Cast", self.op("Equal", name, each), to=TensorProto.FLOAT) for each in (emulated, own))
        whole, single = (self.reduce("ReduceSum", each) for each in equal)
        return {**self._size(name, name), "equal": whole, "own_equal": single}

    def _size(self, name: str, x: str) -> dict[str, str]:
        """The number of elements, where the file doesn't state it."""
        return {} if self.pair.reference.static_size(name) is not None else {"size": self.op("Size", x)}

    def _by_channel(self, name: str, x: str, own_error: str) -> dict[str, str]:
        """The squares of what the operator loses by itself, channel by channel where there are channels."""
        axis, shape = self.pair.channel_axis(name), self.pair.reference.shape(name)
        if axis is None or shape is None:
            return {"own_dd": self.reduce("ReduceSumSquare", own_error)}
        others = [each for each in range(len(shape)) if each != axis]
        return {
            "own_dd": self.reduce("ReduceSumSquare", own_error, others),
            "own_rr": self.reduce("ReduceSumSquare", x, others),
        }

    def _sample(self, name: str, x: str) -> dict[str, str]:
        """Evenly spaced elements, to estimate shares of small values from."""
        if name not in self.pair.held and name not in self.pair.spans:
            return {}
        flat = self.op("Reshape", x, self._integers(-1))
        zero, one, end = (self._integers(each) for each in (0, 1, np.iinfo(np.int64).max))
        size = self.pair.reference.static_size(name)
        if size is not None:
            step = self._integers(size // SAMPLE + 1)
        else:
            step = self.op("Add", self.op("Div", self.op("Size", x), self._integers(SAMPLE)), one)
        return {"sample": self.op("Slice", flat, zero, end, zero, step)}

    def _outside(self, name: str, x: str) -> dict[str, str]:
        """How many elements a quantizer clips."""
        span = self.pair.spans.get(name)
        if span is None:
            return {}
        within = self.op("Min", self.op("Max", x, self.scalar(span.low)), self.scalar(span.high))
        return {
            "outside": self.outside(x, *span.rounded_within),
            "clipped_dd": self.reduce("ReduceSumSquare", self.op("Sub", x, within)),
            "squares": self.reduce("ReduceSumSquare", x),
        }

    def _exactly(self, name: str, emulated: str, own: str) -> dict[str, str]:
        kind = self.pair.reference.element_type(name)
        x, y, z = (self._as(TensorProto.DOUBLE, each, kind) for each in (name, emulated, own))
        magnitude = self.op("Abs", x)
        figures = {"peak": self.reduce("ReduceMax", self._finite(magnitude, magnitude))}
        for prefix, other in (("", y), ("own_", z)):
            d = self.op("Sub", other, x)
            distance = self.op("Abs", d)
            both_nan = self.op("And", self.op("IsNaN", x), self.op("IsNaN", other))
            same = self.op("Or", self.op("Equal", x, other), both_nan)
            comparable = self.op("LessOrEqual", distance, self.scalar(_LARGEST_DOUBLE, np.float64))
            zeros = self.op("Where", comparable, x, self.scalar(0.0, np.float64))
            figures |= {
                f"{prefix}dd": self.reduce("ReduceSumSquare", self._finite(d, distance)),
                f"{prefix}rr": self.reduce("ReduceSumSquare", zeros),
                f"{prefix}error": self.reduce("ReduceMax", self._finite(distance, distance)),
                f"{prefix}nonfinite": self.how_many(self.op("Not", self.op("Or", same, comparable))),
            }
        return figures

    def _finite(self, value: str, magnitude: str) -> str:
        """`value` with 0 wherever the magnitude is NaN or infinite."""
        finite = self.op("LessOrEqual", magnitude, self.scalar(_LARGEST_DOUBLE, np.float64))
        return self.op("Where", finite, value, self.scalar(0.0, np.float64))

    def _as(self, wanted: int, name: str, kind: int | None) -> str:
        return name if kind == wanted else self.op("Cast", name, to=wanted)

    def _integers(self, value: int) -> str:
        return self.constant(np.array([value], np.int64))


def _emulated(name: str) -> str:
    return f"{name}//emulated"
