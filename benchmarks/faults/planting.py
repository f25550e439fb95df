"""Twelve faults, planted in a lowered model as if the engine computed another one.

Weights are changed in the type that they are stored in: 16-bit ones are rounded again, INT8 ones keep their scales
where the fault leaves the range alone. Which layer is hit follows from the fault and the model alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import zoo  # type: ignore[import-not-found]  # beside this script
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "LeakyRelu", "HardSwish", "HardSigmoid", "Clip", "Sigmoid", "Tanh", "Erf", "Softplus", "Elu")
_PASSING = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose")


class NotHere(Exception):  # noqa: N818 - an answer, not a failure
    """The model has nothing that this fault could hit."""


@dataclass
class Lowered:
    """A lowered model that is being spoiled.

    Parameters
    ----------
    quantile
        The magnitude of a tensor of the FP32 model that a share of its elements keep.
    outputs
        What the reference computes on one of the cases.
    """

    model: onnx.ModelProto
    subject: zoo.Subject
    quantile: Callable[[str, float], float]
    outputs: Mapping[str, NDArray[Any]]
    where: str = ""
    _producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    _initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self._producers = {name: node for node in graph.node for name in node.output}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(self.model).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}

    # --- weights ---

    def stored(self, name: str) -> tuple[onnx.TensorProto, onnx.NodeProto | None] | None:
        """The initializer behind an operand, and the DequantizeLinear between, if there is one."""
        if name in self._initializers:
            return self._initializers[name], None
        node = self._producers.get(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear" and node.input[0] in self._initializers:
            return self._initializers[node.input[0]], node
        return None

    def weighted(self) -> list[tuple[onnx.NodeProto, int]]:
        """The nodes with a weight, in order, and which operand it is."""
        found = []
        for node in self.model.graph.node:
            if node.op_type in WEIGHTED:
                operands = [1] if node.op_type != "MatMul" else [1, 0]
                index = next((each for each in operands if self.stored(node.input[each]) is not None), None)
                if index is not None and self.read(node, index).ndim >= 2:
                    found.append((node, index))
        if not found:
            raise NotHere("no weights")
        return found

    def layer(self, depth: float) -> tuple[onnx.NodeProto, int]:
        """The layer at this share of the way through the model."""
        layers = self.weighted()
        return layers[min(int(depth * len(layers)), len(layers) - 1)]

    def read(self, node: onnx.NodeProto, index: int) -> Floats:
        """A weight or bias in FP64."""
        found = self.stored(node.input[index])
        assert found is not None
        tensor, dequantize = found
        array = np.asarray(numpy_helper.to_array(tensor), np.float64)
        if dequantize is not None:
            array = array * self._scales(dequantize, array.ndim)
        return array

    def write(self, node: onnx.NodeProto, index: int, array: Floats) -> None:
        """Store a weight or bias in the type that it had."""
        found = self.stored(node.input[index])
        assert found is not None
        tensor, dequantize = found
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if dequantize is not None:
            array = np.clip(np.rint(array / self._scales(dequantize, array.ndim)), -128, 127)
        changed = array.astype(np.float32).astype(kind)
        kept = numpy_helper.from_array(changed, tensor.name)
        if kept.SerializeToString() == tensor.SerializeToString():
            raise NotHere("nothing changed")
        tensor.CopyFrom(kept)
        self.where = f"{node.op_type} {node.name or node.output[0]}"

    def scale(self, node: onnx.NodeProto, index: int, factors: Floats) -> None:
        """Multiply a weight, by a factor that broadcasts; INT8 weights by their scales."""
        found = self.stored(node.input[index])
        assert found is not None
        dequantize = found[1]
        if dequantize is None:
            self.write(node, index, self.read(node, index) * factors)
            return
        scales = self._initializers[dequantize.input[1]]
        old = numpy_helper.to_array(scales)
        new = (old * np.broadcast_to(factors.reshape(-1), old.shape)).astype(old.dtype)
        scales.CopyFrom(numpy_helper.from_array(new, scales.name))
        self.where = f"{node.op_type} {node.name or node.output[0]}"

    def _scales(self, dequantize: onnx.NodeProto, rank: int) -> Floats:
        scales = np.asarray(numpy_helper.to_array(self._initializers[dequantize.input[1]]), np.float64)
        if scales.ndim == 0:
            return scales
        axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 1)
        return scales.reshape([-1 if each == axis % rank else 1 for each in range(rank)])

    def channel_axis(self, node: onnx.NodeProto, index: int) -> int:
        """The axis of output channels."""
        rank = self.read(node, index).ndim
        if node.op_type in {"Conv", "ConvTranspose"}:
            return 0 if node.op_type == "Conv" else 1
        if node.op_type == "Gemm":
            return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
        return rank - 1 if index else rank - 2

    def loudest(self, node: onnx.NodeProto, index: int) -> list[int]:
        """Output channels, that with the largest weights first."""
        array, axis = self.read(node, index), self.channel_axis(node, index)
        others = tuple(each for each in range(array.ndim) if each != axis)
        return [int(each) for each in np.argsort(-np.sqrt((array**2).mean(axis=others)))]

    # --- the graph ---

    def constant(self, name: str, array: Floats, kind: int) -> str:
        """Add an initializer of an ONNX element type; returns its name."""
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        tensor = numpy_helper.from_array(np.asarray(array).astype(dtype), name)
        self.model.graph.initializer.append(tensor)
        return name

    def rename_readers(self, old: str, new: str, *, first: int) -> None:
        """Let the nodes from `first` on read `new` for `old`."""
        for node in self.model.graph.node[first:]:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def bound(self, tensor: str, low: Floats | float, high: Floats | float) -> None:
        """Clip a tensor of the graph, an output too."""
        graph, kind = self.model.graph, self.types[tensor]
        at = next(index for index, node in enumerate(graph.node) if tensor in node.output)
        is_output = tensor in {output.name for output in graph.output}
        source, target = (f"{tensor}/unbounded", tensor) if is_output else (tensor, f"{tensor}/bounded")
        if is_output:
            names = graph.node[at].output
            names[list(names).index(tensor)] = source
            self.rename_readers(tensor, source, first=0)
        else:
            self.rename_readers(tensor, target, first=at + 1)
        lower = self.constant(f"{tensor}/low", np.asarray(low, np.float64), kind)
        upper = self.constant(f"{tensor}/high", np.asarray(high, np.float64), kind)
        nodes = [
            helper.make_node("Max", [source, lower], [f"{tensor}/raised"], name=f"{tensor}/max"),
            helper.make_node("Min", [f"{tensor}/raised", upper], [target], name=f"{tensor}/min"),
        ]
        for offset, node in enumerate(nodes):
            graph.node.insert(at + 1 + offset, node)
        self.where = f"tensor {tensor}"


# --- the faults ------------------------------------------------------------------------------------------------------


def channel_scaled(lowered: Lowered) -> None:
    """One output channel of a layer in the middle times 1.25."""
    node, index = lowered.layer(0.5)
    array, axis = lowered.read(node, index), lowered.channel_axis(node, index)
    factors = np.ones([array.shape[axis] if each == axis else 1 for each in range(array.ndim)])
    np.moveaxis(factors, axis, 0)[lowered.loudest(node, index)[0]] = 1.25
    lowered.scale(node, index, factors)


def tensor_scaled(lowered: Lowered) -> None:
    """All weights of the last layer times 1.25."""
    node, index = lowered.layer(1.0)
    lowered.scale(node, index, np.array(1.25))


def channel_negated(lowered: Lowered) -> None:
    """One output channel of a late layer with the other sign."""
    node, index = lowered.layer(0.75)
    array, axis = lowered.read(node, index), lowered.channel_axis(node, index)
    channel = np.moveaxis(array, axis, 0)
    channel[lowered.loudest(node, index)[0]] *= -1
    lowered.write(node, index, array)


def bias_dropped(lowered: Lowered) -> None:
    """The largest bias of the model, against its layer's weights, becomes 0."""
    best: tuple[float, onnx.NodeProto, int] | None = None
    for node, index in lowered.weighted():
        array = lowered.read(node, index)
        found = None
        if len(node.input) > 2 and lowered.stored(node.input[2]) is not None:
            found = node, 2
        for add in lowered.model.graph.node:
            if add.op_type == "Add" and node.output[0] in add.input:
                other = 1 - list(add.input).index(node.output[0])
                found = (add, other) if lowered.stored(add.input[other]) is not None else found
        if found is None or not lowered.read(*found).any():
            continue
        outputs = array.shape[lowered.channel_axis(node, index)]
        size = float(np.sqrt((lowered.read(*found) ** 2).mean() / ((array**2).sum() / outputs or 1.0)))
        if best is None or size > best[0]:
            best = size, *found
    if best is None:
        raise NotHere("no bias")
    _, node, index = best
    lowered.write(node, index, np.zeros_like(lowered.read(node, index)))


def channels_swapped(lowered: Lowered) -> None:
    """Two output channels of the last layer in each other's place, biases too; of one channel: two of its inputs."""
    node, index = lowered.layer(1.0)
    array, axis = lowered.read(node, index), lowered.channel_axis(node, index)
    if array.shape[axis] < 2:
        axis = 1 - axis
    swapped = np.moveaxis(array, axis, 0)
    swapped[[0, -1]] = swapped[[-1, 0]]
    found = lowered.stored(node.input[index])
    assert found is not None
    if found[1] is not None and axis == lowered.channel_axis(node, index):
        scales = lowered._initializers[found[1].input[1]]
        values = numpy_helper.to_array(scales).copy()
        values[[0, -1]] = values[[-1, 0]]
        scales.CopyFrom(numpy_helper.from_array(values, scales.name))
    lowered.write(node, index, array)


def activation_lost(lowered: Lowered) -> None:
    """An activation function in the middle hands its input through."""
    nodes = [node for node in lowered.model.graph.node if node.op_type in ACTIVATIONS]
    if not nodes:
        raise NotHere("no activation function")
    node = nodes[len(nodes) // 2]
    lowered.where = f"{node.op_type} {node.name or node.output[0]}"
    node.op_type = "Identity"
    del node.attribute[:]
    del node.input[1:]


def inputs_reversed(lowered: Lowered) -> None:
    """The first layer reads its input's channels in reversed order (BGR for RGB); of one channel: its kernel is."""
    node, index = lowered.layer(0.0)
    array = lowered.read(node, index)
    axis = 1 - lowered.channel_axis(node, index) if array.ndim > 1 else 0
    while array.shape[axis] < 2:
        axis += 1
    lowered.write(node, index, np.flip(array, axis))


def input_shifted(lowered: Lowered) -> None:
    """The input's mean is off: by a tenth of its span; of integers by 1."""
    graph = lowered.model.graph
    name = lowered.subject.make(np.random.default_rng(0))
    source = next(iter(name))
    array = name[source]
    kind = lowered.types[source]
    shift = np.array(1) if array.dtype.kind in "iu" else np.array(np.ptp(array) / 10)
    target = f"{source}/shifted"
    lowered.rename_readers(source, target, first=0)
    offset = lowered.constant(f"{source}/offset", shift, kind)
    # Opset 13 and older have no Add of every integer; INT32 they have.
    graph.node.insert(0, helper.make_node("Add", [source, offset], [target], name=f"{source}/shift"))
    lowered.where = f"input {source}"


def output_clipped(lowered: Lowered) -> None:
    """What is decided by ends at 0.6 of its largest value."""
    part = lowered.subject.decisions[0].part
    reference = np.asarray(lowered.outputs[part.output], np.float64)
    size = reference.shape[part.axis]
    first, last = part.indices or (0, size)
    high = np.full([size if each == part.axis % reference.ndim else 1 for each in range(reference.ndim)], 3e38)
    peak = np.take(reference, range(first, last), axis=part.axis).max()
    np.moveaxis(high, part.axis, 0)[first:last] = 0.6 * peak
    lowered.bound(part.output, -3e38, high)


def weight_transposed(lowered: Lowered) -> None:
    """A square weight the other way round, the one nearest to the middle; without one: input channels moved by one."""
    layers = lowered.weighted()
    order = sorted(range(len(layers)), key=lambda each: abs(each - len(layers) / 2))
    for each in order:
        node, index = layers[each]
        array = lowered.read(node, index)
        if array.shape[0] == array.shape[1] > 1 and array.ndim <= 4:
            lowered.write(node, index, np.swapaxes(array, 0, 1))
            return
    for each in order:
        node, index = layers[each]
        array = lowered.read(node, index)
        axis = 1 - lowered.channel_axis(node, index)
        if array.shape[axis] > 1:
            lowered.write(node, index, np.roll(array, 1, axis))
            return
    raise NotHere("no layer with two channels")


def activation_saturated(lowered: Lowered) -> None:
    """The output of a layer in the middle ends where 98 % of its values end."""
    layers = lowered.weighted()
    for shift in range(len(layers) // 2):
        node, _ = layers[len(layers) // 2 + shift]
        tensor = node.output[0]
        if tensor not in lowered.types:
            continue
        try:
            most = lowered.quantile(tensor, 0.98)
        except KeyError:
            continue
        if most > 0:
            lowered.bound(tensor, -most, most)
            return
    raise NotHere("no layer whose output is known")


def padding_shifted(lowered: Lowered) -> None:
    """A convolution pads one side more and the other less; where none pads: its kernel is moved by one."""
    nodes = [node for node, _ in lowered.weighted() if node.op_type == "Conv"]
    middle = len(nodes) // 2
    for node in [*nodes[middle:], *nodes[:middle]]:
        pads = next((attribute for attribute in node.attribute if attribute.name == "pads"), None)
        if pads is not None and min(pads.ints) > 0:
            half = len(pads.ints) // 2
            pads.ints[0] += 1
            pads.ints[half] -= 1
            lowered.where = f"Conv {node.name or node.output[0]}"
            return
    for node, index in lowered.weighted():
        array = lowered.read(node, index)
        if array.shape[-1] > 1:
            lowered.write(node, index, np.roll(array, 1, -1))
            return
    raise NotHere("no convolution")


FAULTS: Mapping[str, Callable[[Lowered], None]] = {
    each.__name__: each
    for each in (
        channel_scaled,
        tensor_scaled,
        channel_negated,
        bias_dropped,
        channels_swapped,
        activation_lost,
        inputs_reversed,
        input_shifted,
        output_clipped,
        weight_transposed,
        activation_saturated,
        padding_shifted,
    )
}
"""By name. In INT8 `calibration_spoiled` stands in the place of `padding_shifted`."""
CALIBRATION = "calibration_spoiled"
