"""How many layers of a model have weights of which sparse kernels can make use: at most two of four are not zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_trtcheck.errors import plural

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

_PASSED_THROUGH = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear"})


def note(model: Path) -> str | None:
    """What to say where sparse weights were asked for of weights that are not all sparse; None where they are."""
    total, sparse = counted(model)
    if total and sparse == total:
        return None
    what = f"{sparse} of {plural(total, 'layer')} have weights" if total else "no layer has weights"
    return f"sparsity: {what} of which at most two in four are not zero; the others take dense kernels"


def counted(model: Path) -> tuple[int, int]:
    """How many convolutions and matrix products have constant weights, and how many of these are 2:4 sparse."""
    from pytest_trtcheck.model import graph

    found = []
    for node in graph.all_nodes(graph.read(model).graph):
        weights = _weights(node)
        if weights is not None:
            found.append(is_sparse(np.moveaxis(*weights)))
    return len(found), sum(found)


def is_sparse(weights: NDArray[np.generic]) -> bool:
    """Whether of every four neighbours along the last axis, from its start, at most two are not zero (2:4)."""
    length = weights.shape[-1]
    nonzero = np.pad(weights != 0, [(0, 0)] * (weights.ndim - 1) + [(0, -length % 4)])
    return bool((nonzero.reshape(*weights.shape[:-1], -1, 4).sum(axis=-1) <= 2).all())


def _weights(node: ir.Node) -> tuple[NDArray[np.generic], int, int] | None:
    """A layer's constant weights, and the axis along which it adds up, to be moved to the end."""
    if node.op_type not in {"Conv", "MatMul", "Gemm"} or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in _PASSED_THROUGH:
            return None
        value = producer.inputs[0]
    if value is None or value.const_value is None:
        return None
    array = value.const_value.numpy()
    if array.ndim < 2:
        return None
    is_transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", default=0))
    axis = 1 if node.op_type == "Conv" or is_transposed else array.ndim - 2
    return array, axis, -1
