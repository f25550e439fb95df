"""Batch normalization, worked into the weights before they are lowered.

TensorRT turns an inference-time BatchNormalization into a scale and a shift. Done on lowered weights, a running
variance of 10⁸ (which real models have) overflows in FP16 and ruins a model that deploys well; so it is done first, on
the FP32 weights, and into the convolution before it. That is not free: with a variance of 10⁸ and weights of 0.05 the
folded weights are subnormal FP16 numbers, and the convolution errs 16 times as much as with its weights rounded by
themselves (3.4e-3 and 2.1e-4; with 10⁶ it is 1.7 times, up to 10⁴ nothing). A TF32 model is not folded: there the
engine multiplies and adds behind the convolution (layers and results of an H100, TensorRT-RTX 1.5).

TensorFlow's exporter writes it in pieces, as does a PyTorch module that computes its own: a Mul and an Add by
constants, one value a channel, behind the convolution. Those are folded alike: in FP16 the convolution's result would
overflow before it is scaled. Layer normalization, whose scale depends on the data, is not: in pieces TensorRT computes
it piece by piece as well, and nothing of it is ever quantized (`plan`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import rewriting
from pytest_trtcheck.precision.constants import constant, stored

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray


def fold_batch_norm(model: ir.Model, keep: Collection[str] = ()) -> ir.Model:
    """Fold every FP32 BatchNormalization with constant parameters, in place; nodes named in `keep` stay as they are.

    Behind a Conv with constant weights it disappears into them; elsewhere it becomes a Mul and an Add. Where the number
    of dimensions is not known, it stays, with mean 0 and variance 1. The arithmetic is FP64: s = scale / √(var + ε),
    shift = bias − mean · s (Ioffe and Szegedy, 2015, algorithm 2).
    """
    names = graphs.Names(model)
    for node in list(graphs.all_nodes(model.graph)):
        parameters = _parameters(node) if node.op_type == "BatchNormalization" and node.name not in keep else None
        if parameters is None:
            continue
        scale, bias, mean, variance = parameters
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        shift = bias - mean * factor
        source = node.inputs[0]
        if _into_convolution(node, factor, shift, keep, names):
            continue
        if source is not None and source.shape is not None and len(source.shape) >= 2:
            _into_mul_add(node, factor, shift, names)
        else:
            _normalize(node, factor, shift, names)
    for node in list(graphs.all_nodes(model.graph)):
        if node.op_type == "Conv" and node.name not in keep and (pieces := _pieces(node, keep)) is not None:
            last, factor, shift = pieces
            _scale(node, last, factor, shift, names)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _parameters(node: ir.Node) -> list[NDArray[np.float64]] | None:
    """Scale, bias, mean and variance, one a channel, where they are FP32 constants; None for what can't be folded."""
    tensors = [stored(value) for value in node.inputs[1:5]]
    # Up to opset 8 there may be a scale for each place ("spatial" 0).
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    if len(arrays) < len(tensors) or any(array.dtype != np.float32 or array.ndim != 1 for array in arrays):
        return None
    source = node.inputs[0]
    is_float = source is not None and (source.type is None or graphs.is_tensor(source, ir.DataType.FLOAT))
    trains = any(output.name for output in node.outputs[1:]) or bool(node.attributes.get_int("training_mode", 0))
    return None if trains or not is_float else [np.asarray(array, np.float64) for array in arrays]


def _into_convolution(
    node: ir.Node, factor: NDArray[Any], shift: NDArray[Any], keep: Collection[str], names: graphs.Names
) -> bool:
    source = node.inputs[0]
    convolution = source.producer() if source is not None else None
    if source is None or convolution is None or convolution.op_type != "Conv" or convolution.name in keep:
        return False
    if len(source.uses()) != 1 or source.is_graph_output() or convolution.graph is not node.graph:
        return False
    return _scale(convolution, node, factor, shift, names)


def _pieces(convolution: ir.Node, keep: Collection[str]) -> tuple[ir.Node, NDArray[Any], NDArray[Any]] | None:
    """The last node of a normalization in pieces behind a convolution, its scale and its shift by channel.

    It is, by constants: a Sub or Add of the mean, or none; a Mul or Div a channel, or several; an Add or Sub, or none.
    """
    weight = stored(convolution.inputs[1])
    if weight is None:
        return None
    channels, rank = weight.shape.numpy()[0], len(weight.shape)
    factor, shift = np.ones(channels), np.zeros(channels)
    value, last, scaled, is_by_channel = convolution.outputs[0], None, False, False
    while len(value.uses()) == 1 and not value.is_graph_output():
        ((node, index),) = value.uses()
        operator = node.op_type if node.domain in graphs.ONNX_DOMAINS and len(node.inputs) == 2 else ""
        operand = _by_channel(node.inputs[1 - index], channels, rank) if operator in _AFFINE else None
        if operand is None or node.name in keep or node.graph is not convolution.graph:
            break
        if (operator, index) == ("Div", 1) or (operator in {"Add", "Sub"} and not scaled and last is not None):
            break
        if operator in {"Mul", "Div"}:
            with np.errstate(divide="ignore", invalid="ignore"):
                by = operand if operator == "Mul" else 1 / operand
                factor, shift, scaled = factor * by, shift * by, True
            is_by_channel |= operand.size == channels
        elif operator == "Add":
            shift = shift + operand
        else:
            sign = 1 if index == 0 else -1
            factor, shift = sign * factor, sign * (shift - operand)
        value, last = node.outputs[0], node
        if scaled and operator in {"Add", "Sub"}:
            break
    is_normalization = scaled and is_by_channel and bool(np.isfinite(factor).all() and np.isfinite(shift).all())
    return (last, factor, shift) if last is not None and is_normalization else None


_AFFINE = frozenset({"Add", "Div", "Mul", "Sub"})


def _by_channel(value: ir.Value | None, channels: int, rank: int) -> NDArray[np.float64] | None:
    """An FP32 constant that has one value, or one a channel, of a tensor of this rank; None for another."""
    tensor = constant(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) > rank:
        return None
    shape = tensor.shape.numpy()
    by_axis = (*[1] * (rank - len(shape)), *shape)
    if by_axis[1] not in {1, channels} or any(size != 1 for axis, size in enumerate(by_axis) if axis != 1):
        return None
    return np.asarray(tensor.numpy(), np.float64).reshape(-1)


def _scale(convolution: ir.Node, last: ir.Node, factor: NDArray[Any], shift: NDArray[Any], names: graphs.Names) -> bool:
    """Work a scale and a shift by channel into a convolution, which then computes what `last` does; if it can be."""
    weight, bias = convolution.inputs[1], graphs.operand(convolution, 2)
    tensor, added = stored(weight), stored(bias)
    if weight is None or tensor is None or (bias is not None and added is None):
        return False
    offset = 0.0 if added is None else np.asarray(added.numpy(), np.float64)
    by_channel = factor.reshape(-1, *[1] * (len(tensor.shape) - 1))
    name = names.unused(f"{weight.name}_folded_{last.name}")
    scaled = rewriting.lazy(
        name, ir.DataType.FLOAT, tensor.shape.numpy(), lambda: (tensor.numpy() * by_channel).astype(np.float32)
    )
    convolution.resize_inputs(3)
    convolution.replace_input_with(1, rewriting.initializer(convolution.graph, scaled))
    bias = _weight(convolution, names.unused(f"{name}_bias"), offset * factor + shift)
    convolution.replace_input_with(2, bias)
    _take_over(last, convolution.outputs[0], names)
    return True


def _normalize(node: ir.Node, factor: NDArray[Any], shift: NDArray[Any], names: graphs.Names) -> None:
    """Give `node` parameters of the same meaning that no 16-bit type overflows with: mean 0, variance 1, ε 0."""
    parameters = {"scale": factor, "shift": shift, "mean": np.zeros_like(factor), "variance": np.ones_like(factor)}
    for index, (label, array) in enumerate(parameters.items(), 1):
        node.replace_input_with(index, _weight(node, names.unused(f"{node.name}/{label}"), array))
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)


def _into_mul_add(node: ir.Node, factor: NDArray[Any], shift: NDArray[Any], names: graphs.Names) -> None:
    value, output = node.inputs[0], node.outputs[0]
    assert value is not None
    assert value.shape is not None
    assert node.graph is not None
    shape = (-1, *[1] * (len(value.shape) - 2))
    for kind, array in (("Mul", factor), ("Add", shift)):
        name = names.unused(f"{node.name}/{kind.lower()}")
        step = ir.node(kind, [value, _weight(node, names.unused(f"{name}/operand"), array.reshape(shape))], name=name)
        value = step.outputs[0]
        value.name, value.shape, value.dtype = names.unused(f"{name}/output"), output.shape, ir.DataType.FLOAT
        node.graph.insert_before(node, step)
    _take_over(node, value, names)


def _weight(node: ir.Node, name: str, array: NDArray[Any]) -> ir.Value:
    return rewriting.initializer(node.graph, ir.Tensor(array.astype(np.float32), name=name))


def _take_over(node: ir.Node, replacement: ir.Value, names: graphs.Names) -> None:
    """Let `replacement` stand for the output of `node`, name and all, and remove the node."""
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    name = output.name
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name, replacement.name = names.unused(f"{name}/before_folding"), name
