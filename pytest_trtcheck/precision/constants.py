"""Weights that reach their operator through Transpose, Reshape or a widening Cast: one constant in another layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_WIDENED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT})


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What `value` holds whatever the model's inputs are; None where it is computed by more than a change of layout.

    Where an operator lies between `value` and the weight, the tensor is lazy: made when it is used, and not kept.
    """
    if value is None:
        return None
    if value.is_initializer() and value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.domain not in {"", "ai.onnx"} or not node.inputs:
        return None
    relayout = _RELAYOUTS.get(node.op_type)
    source = constant(node.inputs[0]) if relayout is not None else None
    return relayout(node, source) if relayout is not None and source is not None else None


def _identity(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:  # noqa: ARG001 - one signature
    return source


def _transpose(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:
    shape = _shape(source)
    given = node.attributes.get("perm")
    order = list(given.as_ints()) if given is not None else list(range(len(shape)))[::-1]
    return _lazy(source, lambda array: array.transpose(order), [shape[axis] for axis in order], source.dtype)


def _reshape(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:
    wanted = constant(node.inputs[1])
    if wanted is None:
        return None
    old, new = _shape(source), [int(size) for size in wanted.numpy()]
    allow_zero = node.attributes.get("allowzero")
    if allow_zero is None or not allow_zero.as_int():
        new = [old[axis] if size == 0 else size for axis, size in enumerate(new)]
    if -1 in new:
        known = math.prod(size for size in new if size != -1)
        new[new.index(-1)] = math.prod(old) // known if known else 0
    return _lazy(source, lambda array: array.reshape(new), new, source.dtype)


def _cast(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:
    """Weights stored in 16 bits and computed with in FP32."""
    if node.attributes["to"].as_int() != ir.DataType.FLOAT or source.dtype not in _WIDENED:
        return None
    return _lazy(source, lambda array: array.astype(np.float32), _shape(source), ir.DataType.FLOAT)


_RELAYOUTS: dict[str, Callable[[ir.Node, ir.TensorProtocol], ir.TensorProtocol | None]] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Cast": _cast,
}


def _shape(tensor: ir.TensorProtocol) -> list[int]:
    return list(tensor.shape.numpy())


def _lazy(
    source: ir.TensorProtocol,
    change: Callable[[NDArray[Any]], NDArray[Any]],
    shape: list[int],
    dtype: ir.DataType,
) -> ir.TensorProtocol:
    def make() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(change(source.numpy())), dtype=dtype)

    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=source.name)
