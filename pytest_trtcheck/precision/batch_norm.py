"""Batch normalization, worked into the weights before they are lowered.

TensorRT turns an inference-time BatchNormalization into a scale and a shift. Done on lowered weights, a running
variance of 10⁸ (which real models have) overflows in FP16 and ruins a model that deploys well; so it is done first, on
the FP32 weights, and into the convolution before it. That is not free: with a variance of 10⁸ and weights of 0.05 the
folded weights are subnormal FP16 numbers, and the convolution errs 16 times as much as with its weights rounded by
themselves (3.4e-3 and 2.1e-4; with 10⁶ it is 1.7 times, up to 10⁴ nothing). A TF32 model is not folded: there the
engine multiplies and adds behind the convolution (layers and results of an H100, TensorRT-RTX 1.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs

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
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        factor = scale / np.sqrt(variance + epsilon)
        shift = bias - mean * factor
        source = node.inputs[0]
        if _into_convolution(node, factor, shift, keep, names):
            continue
        if source is not None and source.shape is not None and len(source.shape) >= 2:
            _into_mul_add(node, factor, shift, names)
        else:
            _normalize(node, factor, shift, names)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _parameters(node: ir.Node) -> list[NDArray[np.float64]] | None:
    """Scale, bias, mean and variance, one a channel, where they are FP32 constants; None for what can't be folded."""
    arrays = [constant(value) for value in node.inputs[1:5]]
    # Up to opset 8 there may be a scale for each place ("spatial" 0).
    if any(array is None or array.dtype != np.float32 or array.ndim != 1 for array in arrays):
        return None
    source = node.inputs[0]
    is_float = source is not None and (source.type is None or graphs.is_tensor(source, ir.DataType.FLOAT))
    trains = any(output.name for output in node.outputs[1:]) or _trains(node)
    return None if trains or not is_float else [np.asarray(array, np.float64) for array in arrays]


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer; None for anything that is computed."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def _trains(node: ir.Node) -> bool:
    return "training_mode" in node.attributes and bool(node.attributes["training_mode"].as_int())


def _into_convolution(
    node: ir.Node, factor: NDArray[Any], shift: NDArray[Any], keep: Collection[str], names: graphs.Names
) -> bool:
    source = node.inputs[0]
    convolution = source.producer() if source is not None else None
    if source is None or convolution is None or convolution.op_type != "Conv" or convolution.name in keep:
        return False
    if len(source.uses()) != 1 or source.is_graph_output() or convolution.graph is not node.graph:
        return False
    weight = convolution.inputs[1]
    bias = convolution.inputs[2] if len(convolution.inputs) > 2 else None
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return False
    if bias is not None and constant(bias) is None:
        return False
    offset = 0.0 if bias is None else np.asarray(constant(bias), np.float64)
    tensor, by_channel = weight.const_value, factor.reshape(-1, *[1] * (len(weight.const_value.shape) - 1))
    name = names.unused(f"{weight.name}_folded_{node.name}")

    # Computed when it is needed, so that the weights of a large model are never all in memory.
    def scaled() -> ir.TensorProtocol:
        return ir.Tensor((tensor.numpy() * by_channel).astype(np.float32), name=name)

    shape = ir.Shape(list(tensor.shape.numpy()))
    lazy = ir.LazyTensor(scaled, dtype=ir.DataType.FLOAT, shape=shape, name=name)
    convolution.replace_input_with(1, _initializer(node, name, lazy))
    folded = ir.Tensor((offset * factor + shift).astype(np.float32))
    new_bias = _initializer(node, names.unused(f"{name}_bias"), folded)
    if len(convolution.inputs) > 2:
        convolution.replace_input_with(2, new_bias)
    else:
        convolution.resize_inputs(3)
        convolution.replace_input_with(2, new_bias)
    _take_over(node, source, names)
    return True


def _normalize(node: ir.Node, factor: NDArray[Any], shift: NDArray[Any], names: graphs.Names) -> None:
    """Give `node` parameters of the same meaning that no 16-bit type overflows with: mean 0, variance 1, ε 0."""
    for index, array in enumerate((factor, shift, np.zeros_like(factor), np.ones_like(factor)), 1):
        name = names.unused(f"{node.name}/{('scale', 'shift', 'mean', 'variance')[index - 1]}")
        node.replace_input_with(index, _initializer(node, name, ir.Tensor(array.astype(np.float32))))
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)


def _into_mul_add(node: ir.Node, factor: NDArray[Any], shift: NDArray[Any], names: graphs.Names) -> None:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    assert source.shape is not None
    assert node.graph is not None
    shape = (-1, *[1] * (len(source.shape) - 2))
    steps: list[ir.Node] = []
    value = source
    for kind, array in (("Mul", factor), ("Add", shift)):
        name = names.unused(f"{node.name}/{kind.lower()}")
        tensor = ir.Tensor(array.reshape(shape).astype(np.float32))
        operand = _initializer(node, names.unused(f"{name}/operand"), tensor)
        step = ir.node(kind, [value, operand], name=name)
        step.outputs[0].name = names.unused(f"{name}/output")
        step.outputs[0].shape, step.outputs[0].dtype = output.shape, ir.DataType.FLOAT
        steps.append(step)
        value = step.outputs[0]
    node.graph.insert_after(node, steps)
    _take_over(node, value, names)


def _initializer(near: ir.Node, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    graph = near.graph
    assert isinstance(graph, ir.Graph)
    value = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _take_over(node: ir.Node, replacement: ir.Value, names: graphs.Names) -> None:
    """Let `replacement` stand for the output of `node`, name and all, and remove the node."""
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    name = output.name
    for user, index in list(output.uses()):
        user.replace_input_with(index, replacement)
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = replacement
    graph.remove(node, safe=True)
    output.name, replacement.name = names.unused(f"{name}/before_folding"), name
