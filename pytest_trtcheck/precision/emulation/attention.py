"""Attention spelled out, which TensorRT makes one kernel of: what that kernel does with the scores between.

Measured on an H100 with TensorRT-RTX 1.5 (docs/how-emulation-works.md). In BF16 the scores stay FP32 numbers from the
scaled operands of the first product to the Softmax. In FP16 they are rounded at every step; where no mask is added they
saturate instead of becoming infinite, and a NaN among them is the least score. A single head, or one of another size,
is no such kernel's: each node is a layer then, and an overflow is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision.rewriting import Steps

if TYPE_CHECKING:
    from collections.abc import Collection

_BETWEEN = frozenset({"Add", "Cast", "Div", "Mul", "Where"})
_HEAD_SIZES = frozenset({16, 32, 64, 128})
_LARGEST = 65504.0


@dataclass(frozen=True)
class Kernels:
    """What one-kernel attentions round otherwise than other nodes do.

    Parameters
    ----------
    unrounded
        Scores that stay FP32 numbers.
    results
        What comes out of the kernels, always in 16 bits.
    """

    unrounded: frozenset[ir.Value]
    results: frozenset[ir.Value]


@dataclass(frozen=True)
class _Scores:
    """The values from the first product to the Softmax, last first, the second product, and whether there is a mask."""

    softmax: ir.Node
    product: ir.Node
    values: tuple[ir.Value, ...]
    masked: bool

    def scaled_operands(self) -> list[ir.Value]:
        """Operands of the first product that are scaled for it alone."""
        first = self.values[-1].producer()
        operands = first.inputs if first is not None else ()
        return [value for value in operands if value is not None and _is_scaled(value)]


def in_one_kernel(model: ir.Model, defined: Collection[ir.Node] = ()) -> Kernels:
    """Find the attentions; let the scores that saturate do so, in place.

    Parameters
    ----------
    defined
        Nodes that an Attention operator was spelled out as: there, masked scores saturate too, but a NaN stays.
    """
    unrounded: set[ir.Value] = set()
    results: set[ir.Value] = set()
    opset = graphs.opset(model)
    dims = [dim for value in model.graph.inputs for dim in value.shape or ()]
    named = {str(dim) for dim in dims if isinstance(dim, ir.SymbolicDim) and dim.value is not None}
    for node in list(graphs.all_nodes(model.graph)):
        scores = _scores(node, named) if node.op_type == "Softmax" and graphs.is_along_last(node, opset) else None
        if scores is None:
            continue
        results.update(scores.product.outputs)
        if node.outputs[0].dtype == ir.DataType.BFLOAT16:
            unrounded.update(scores.values, scores.scaled_operands())
        elif not scores.masked or node in defined:
            _saturate(scores.values[-1], swallows_nan=not scores.masked)
    return Kernels(frozenset(unrounded), frozenset(results))


def _scores(softmax: ir.Node, named: Collection[str]) -> _Scores | None:
    value, product = softmax.inputs[0], _product_behind(softmax.outputs[0])
    if product is None or value is None or value.shape is None or len(value.shape) < 3:
        return None
    values: list[ir.Value] = []
    masked = False
    while value is not None:
        values.append(value)
        producer = value.producer()
        if producer is None or len(value.uses()) != 1:
            return None
        if producer.op_type == "MatMul":
            return _Scores(softmax, product, tuple(values), masked) if _fits(producer, named) else None
        if producer.op_type not in _BETWEEN:
            return None
        masked |= producer.op_type in {"Add", "Where"} and not any(map(_is_nought, producer.inputs))
        value = next((each for each in producer.inputs if each is not None and _is_score(each)), None)
    return None


def _fits(product: ir.Node, named: Collection[str]) -> bool:
    """Whether the scores' product is of several heads of a size that there is a kernel for.

    An open batch does not count, since it may be 1: what the model's inputs are named for, or what stands before the
    heads. What else a graph computes is mostly both in one.
    """
    query, keys = product.inputs
    if query is None or keys is None or query.is_initializer() or keys.is_initializer() or query.shape is None:
        return False
    *heads, _, size = query.shape
    if len(heads) > 1 and not isinstance(heads[0], int):
        del heads[0]
    return size in _HEAD_SIZES and any(each != 1 and str(each) not in named for each in heads)


def _is_scaled(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Mul" and len(value.uses()) == 1


def _product_behind(value: ir.Value) -> ir.Node | None:
    """The one product that probabilities go into, cast and mended as the Attention operator's definition does it."""
    users = [(user, index) for user, index in value.uses() if (user.op_type, index) != ("CastLike", 1)]
    if len(users) != 1:
        return None
    user, index = users[0]
    if user.op_type == "MatMul":
        return user if index == 0 else None
    return _product_behind(user.outputs[0]) if user.op_type in {"Cast", "CastLike", "Where"} else None


def _is_nought(value: ir.Value | None) -> bool:
    """Whether it is the empty mask of the Attention operator's definition."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type in {"Cast", "CastLike", "Identity"}:
        return _is_nought(producer.inputs[0])
    return producer is not None and producer.op_type == "ConstantOfShape" and "value" not in producer.attributes


def _is_score(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in _BETWEEN | {"MatMul"}


def _saturate(score: ir.Value, *, swallows_nan: bool) -> None:
    """Hold the first product to FP16's largest numbers, for all that use it."""
    product = score.producer()
    assert product is not None
    assert product.graph is not None
    uses = list(score.uses())
    steps = Steps(product, ir.DataType.FLOAT16)
    least, most = (steps.scalar(sign * _LARGEST, label) for sign, label in ((-1, "least"), (1, "most")))
    is_nan = steps.add("IsNaN", score)
    held = steps.add("Where", is_nan, least if swallows_nan else score, steps.add("Clip", score, least, most))
    held.shape = score.shape
    product.graph.insert_after(product, steps.nodes)
    for user, index in uses:
        user.replace_input_with(index, held)
