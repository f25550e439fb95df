"""The models that the benchmarks run: real ones from packages, and nets made here with seeded weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def packaged(package: str, *path: str) -> Path:
    """A model that an installed package ships."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --group test")
    return Path(spec.submodule_search_locations[0], *path)


def nudenet() -> Path:
    return packaged("nudenet", "320n.onnx")


def magika() -> Path:
    return packaged("magika", "models", "standard_v3_3", "model.onnx")


class Builder:
    """Nodes and weights of a net that is being made, one value after the other."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(seed)

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add an operator; returns its output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, array: NDArray[Any]) -> str:
        """Add an initializer; returns its name."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(self, source: str, channels: tuple[int, int], kernel: int = 3, stride: int = 1) -> str:
        """Add a convolution with bias from the first to the second number of channels; returns its output."""
        into, out = channels
        scale = np.sqrt(2 / (into * kernel**2))
        weights = [self.weight(self._rng.standard_normal((out, into, kernel, kernel)) * scale)]
        weights.append(self.weight(self._rng.standard_normal(out) * 0.01))
        pads = [kernel // 2] * 4
        return self.node("Conv", [source, *weights], pads=pads, strides=[stride, stride])

    def batch_norm(self, source: str, channels: int) -> str:
        """Add a batch normalization; returns its output."""
        around_one = [self._rng.uniform(0.9, 1.1, channels) for _ in range(2)]
        parts = [around_one[0], np.zeros(channels), np.zeros(channels), around_one[1]]
        return self.node("BatchNormalization", [source, *(self.weight(part) for part in parts)])


def resnet(path: Path, size: int = 224) -> None:
    """A net of ResNet-18's layers (11.7 million weights, batch normalization kept): [batch, 3, size, size] → 1,000."""
    net = Builder()

    def block(source: str, channels: tuple[int, int], stride: int) -> str:
        into, out = channels
        inner = net.batch_norm(net.conv(source, (into, out), 3, stride), out)
        inner = net.batch_norm(net.conv(net.node("Relu", [inner]), (out, out)), out)
        skip = source if stride == 1 and into == out else net.batch_norm(net.conv(source, (into, out), 1, stride), out)
        return net.node("Relu", [net.node("Add", [inner, skip])])

    value = net.node("Relu", [net.batch_norm(net.conv("image", (3, 64), 7, 2), 64)])
    value = net.node("MaxPool", [value], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        value = block(value, (channels, out), stride)
        value = block(value, (out, out), 1)
        channels = out
    value = net.node("Flatten", [net.node("GlobalAveragePool", [value])])
    head = net.weight(np.random.default_rng(1).standard_normal((1000, 512)) / np.sqrt(512))
    net.node("Gemm", [value, head], transB=1)
    save(net, path, ["batch", 3, size, size], ["batch", 1000])


def large(path: Path, layers: int = 36, width: int = 2048, *, external: bool = True) -> int:
    """A stack of fully connected layers, its weights in a file beside it or in its own; returns their bytes."""
    net = Builder()
    rng = np.random.default_rng(0)
    value = "image"
    for _ in range(layers):
        weight = net.weight(rng.standard_normal((width, width), dtype=np.float32) * np.sqrt(2 / width))
        value = net.node("Relu", [net.node("Gemm", [value, weight], transB=1)])
    save(net, path, ["batch", width], ["batch", width], external=external)
    return layers * width * width * 4


def save(
    net: Builder, path: Path, shape: Sequence[int | str], result: Sequence[int | str], *, external: bool = False
) -> None:
    """Write the net; its last value is its one output."""
    graph = helper.make_graph(
        [*net.nodes, helper.make_node("Identity", [net.nodes[-1].output[0]], ["output"], name="output")],
        path.stem,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, list(result))],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data")
