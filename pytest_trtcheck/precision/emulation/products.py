"""How TensorRT accumulates a matrix product or a convolution, and what becomes of the sum.

All of it was measured, to the bit, on an H100 with TensorRT-RTX 1.5 (docs/how-emulation-works.md):

- With an FP16 output, the running sum is an FP16 number too, rounded after every 16 products; a convolution takes its
  input channels in blocks of 32, and the kernel's taps inside each. With a BF16 output it is an FP32 number. A grouped
  convolution and a transposed one accumulate in FP32.
- A product that is cast to FP32 at once accumulates in FP32 and is never rounded; where an addition comes between,
  its result is not rounded.
- TF32 rounds both inputs to the nearest, but convolutions of few channels cut the low bits off, and grouped
  convolutions stay in FP32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision.rewriting import FLOAT, Steps, replace, values_of

if TYPE_CHECKING:
    from collections.abc import Collection

_CHUNK = 16
"""Products that are summed between two roundings of an FP16 running sum (the k of a tensor core's FP16 instruction)."""
_MOVING = frozenset({"Flatten", "Identity", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What may lie between a product and its cast to FP32 so that it still accumulates in FP32 (but is rounded)."""
_BLOCK = 32
"""Input channels of a convolution that are worked off before the next ones."""


def unrounded(model: ir.Model) -> set[ir.Value]:
    """The outputs of products, and of additions behind them, that go to FP32 without being rounded to 16 bits."""
    found: set[ir.Value] = set()
    for node in graphs.all_nodes(model.graph):
        if _multiplies(node) or (node.op_type == "Add" and any(map(_is_product, node.inputs))):
            found.update(value for value in node.outputs if _goes_to_float(value))
    return found


def _is_product(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and _multiplies(producer)


def _multiplies(node: ir.Node) -> bool:
    """Whether TensorRT makes one matrix product of the node."""
    if node.op_type != "Einsum":
        return node.op_type in {"Gemm", "MatMul"}
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    batch = [index for index in first if index in second and index in result]
    return (
        bool(result)
        and "," not in second
        and all(term[: len(batch)] == "".join(batch) for term in (first, second, result))
        and set(result) >= set(first) ^ set(second)
        and len((set(first) & set(second)) - set(result)) == 1
    )


def _goes_to_float(value: ir.Value, through: Collection[str] = ()) -> bool:
    """Whether all that uses the value is a cast to FP32, or an operator of `through` whose output goes there."""
    waiting, seen = [value], {value}
    for each in waiting:  # A list, which grows: chains are longer than Python's stack is deep.
        users = [user for user, _ in each.uses()]
        if not users or each.is_graph_output():
            return False
        for user in users:
            if user.op_type == "Cast":
                if user.attributes["to"].as_int() != FLOAT:
                    return False
            elif user.op_type not in through:
                return False
            elif user.outputs[0] not in seen:
                seen.add(user.outputs[0])
                waiting.append(user.outputs[0])
    return True


def accumulate_in_half(model: ir.Model, exact: set[ir.Value], skipped: Collection[ir.Node] = ()) -> None:
    """Let FP16 products and convolutions, in place, lose what an FP16 running sum loses.

    Rounding after every 16 products would take a node each. Two things of it are kept: the sum is rounded in the middle
    as well, where it may overflow or be much larger than what it ends as; and each of these roundings is as coarse as
    the many that it stands for: n independent ones err by √n times as much as one.

    Parameters
    ----------
    exact
        Values that are not rounded; those that are made here, and are rounded already, are added.
    skipped
        Nodes that are none of it: the products of quantized operands.
    """
    for node in list(graphs.all_nodes(model.graph)):
        output = node.outputs[0]
        if output.dtype != ir.DataType.FLOAT16 or output in exact or node in skipped or node.graph is None:
            continue
        if node.op_type != "Conv" and _goes_to_float(output, _MOVING):
            continue
        cut = _cut(node)
        if cut is not None:
            steps = Steps(node, ir.DataType.FLOAT16)
            replace(node, steps, [cut.spelled_out(steps, exact)])


def coarseness(roundings: float) -> int:
    """Bits that one rounding must drop beyond its own to err as much as so many, along a sum that grows."""
    return max(round(math.log2(roundings) / 2 - 0.25), 0) if roundings > 1 else 0


class _Cut:
    """A product whose contracted axis is divided in two: the operands' parts, and how often each sum is rounded."""

    def __init__(self, node: ir.Node, length: int, taps: int, axes: tuple[int, int], align: int) -> None:
        self.node, self.axes, self.length = node, axes, length
        middle = -(-length // (2 * align)) * align
        self.bounds = [(0, middle), (middle, length)] if middle < length else [(0, length)]
        self.roundings = [(high - low) * taps / _CHUNK for low, high in self.bounds]

    def spelled_out(self, steps: Steps, exact: set[ir.Value]) -> ir.Value:
        total: ir.Value | None = None
        for (low, high), roundings in zip(self.bounds, self.roundings, strict=True):
            is_last = high == self.length
            operands = [
                self._part(steps, operand, axis, low, high)
                for operand, axis in zip(self.node.inputs[:2], self.axes, strict=True)
            ]
            extra = list(self.node.inputs[2:]) if is_last else []
            part = steps.add(self.node.op_type, *operands, *extra, **values_of(self.node))
            if total is not None:
                exact.add(part)
                part = steps.add("Add", total, part)
            total = _coarse(steps, part, coarseness(roundings), exact)
        assert total is not None
        return total

    def _part(self, steps: Steps, operand: ir.Value | None, axis: int, low: int, high: int) -> ir.Value:
        assert operand is not None
        if len(self.bounds) == 1:
            return operand
        return steps.slice(operand, (low, high), axis)


def _cut(node: ir.Node) -> _Cut | None:
    """Where to cut the node; None where it accumulates in FP32, or where that can't be told."""
    data, weight = (graphs.operand(node, index) for index in range(2))
    shape = weight.shape if weight is not None else None
    if data is None or shape is None:
        return None
    if node.op_type == "Conv":
        group = node.attributes.get_int("group", 1)
        sizes = [size for size in shape if isinstance(size, int)]
        if group != 1 or len(sizes) != len(shape):
            return None
        return _worthwhile(_Cut(node, sizes[1], math.prod(sizes[2:]), (1, 1), _BLOCK))
    if node.op_type not in {"Gemm", "MatMul"} or len(shape) < 2:
        return None
    axes = (0 if node.attributes.get_int("transA", 0) else -1, 1 if node.attributes.get_int("transB", 0) else -2)
    length = shape[axes[1]]
    if not isinstance(length, int) and data.shape is not None:
        length = data.shape[axes[0]]
    return _worthwhile(_Cut(node, length, 1, axes, _CHUNK)) if isinstance(length, int) else None


def _worthwhile(cut: _Cut) -> _Cut | None:
    return cut if sum(cut.roundings) > 2 else None


def _coarse(steps: Steps, value: ir.Value, bits: int, exact: set[ir.Value]) -> ir.Value:
    """The rounded value with so many bits fewer, by Veltkamp's splitting; infinities stay what they are."""
    if not bits:
        return value
    factor = steps.constant(np.array(2.0 ** (13 + bits) + 1, np.float32), f"splitter{bits}")
    scaled = steps.add("Mul", value, factor)
    low = steps.add("Sub", scaled, value)
    kept = steps.add("Sub", scaled, low)
    result = steps.add("Where", steps.add("IsNaN", low), value, kept)
    exact.update((scaled, low, kept, result))
    return result


# --- TF32 ------------------------------------------------------------------------------------------------------------


_LONG_TAPS = 256
_FEW_IN, _FEW_OUT = 16, 63
_CUT_TAPS = 49


def stays_float(node: ir.Node) -> bool:
    """Whether a convolution of an FP32 model is computed in FP32 where TF32 is asked for.

    Grouped ones are, those with a kernel of 256 along an axis (of 64 some are, taken as not), pointwise ones of one or
    two input channels, and 3 × 3 ones of one (H100, TensorRT-RTX 1.5: 210 shapes, docs/measured/atlas).
    """
    if node.op_type != "Conv":
        return False
    if node.attributes.get_int("group", 1) > 1:
        return True
    shape = _weight_shape(node)
    if shape is None:
        return False
    _, channels, *taps = shape
    area = math.prod(taps)
    is_thin = (channels <= 2 and area == 1) or (channels == 1 and area <= 9 and len(taps) > 1)
    return is_thin or (math.isfinite(area) and max(taps) >= _LONG_TAPS)


def truncates(node: ir.Node) -> bool:
    """Whether a convolution cuts its inputs to TF32 instead of rounding them: one of few channels, not pointwise.

    With up to 16 input channels, up to 32 output channels do, 64 do not; between them nothing was measured. Kernels of
    3 × 3 and 7 × 7 do, 1 × 64 does not; between them nothing was measured either.
    """
    shape = _weight_shape(node) if node.op_type == "Conv" else None
    if shape is None:
        return False
    made, channels, *taps = shape
    return made <= _FEW_OUT and channels <= _FEW_IN and math.prod(taps) > 1 and max(taps) < _CUT_TAPS


def _weight_shape(node: ir.Node) -> list[float] | None:
    """The sizes of a 2-D or 3-D convolution's weights, infinite where they are not known; None for others."""
    weight = graphs.operand(node, 1)
    if weight is None or weight.shape is None or len(weight.shape) < 4:
        return None
    return [size if isinstance(size, int) else math.inf for size in weight.shape]
