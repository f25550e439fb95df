"""Small ONNX models for the tests, made with onnx.helper and seeded weights; real models come from packages."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

FLOAT = TensorProto.FLOAT


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Mapping[str, tuple[int, Sequence[int | str]]],
    weights: Mapping[str, NDArray[Any]] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A checked model; inputs and outputs are (element type, shape) by name."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(proto)
    return proto


def weights(shape: Sequence[int], seed: int = 0, scale: float | None = None) -> NDArray[np.float32]:
    """Normal weights, scaled like Kaiming's initialization unless told otherwise."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    factor = scale if scale is not None else (2.0 / max(fan_in, 1)) ** 0.5
    return (np.random.default_rng(seed).standard_normal(tuple(shape)) * factor).astype(np.float32)


def conv_net(batch: int | str = "batch") -> onnx.ModelProto:
    """Conv → Relu → Conv, a residual Add, global pooling, Gemm: [batch, 3, 16, 16] → [batch, 10]."""
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["a1"], name="add"),
        helper.make_node("Relu", ["a1"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p1"], name="pool"),
        helper.make_node("Flatten", ["p1"], ["f1"], name="flatten"),
        helper.make_node("Gemm", ["f1", "w3", "b3"], ["logits"], name="gemm", transB=1),
    ]
    return model(
        nodes,
        {"image": (FLOAT, [batch, 3, 16, 16])},
        {"logits": (FLOAT, [batch, 10])},
        {
            "w1": weights((8, 3, 3, 3), 1),
            "b1": weights((8,), 2, 0.1),
            "w2": weights((8, 8, 3, 3), 3),
            "b2": weights((8,), 4, 0.1),
            "w3": weights((10, 8), 5),
            "b3": weights((10,), 6, 0.1),
        },
    )


def gemm_net() -> onnx.ModelProto:
    """One Gemm: [2, 4] → [2, 3]."""
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="gemm")
    return model(
        [node],
        {"x": (FLOAT, [2, 4])},
        {"y": (FLOAT, [2, 3])},
        {"w": weights((4, 3), 1), "b": weights((3,), 2)},
    )


def elementwise(
    nodes: Sequence[onnx.NodeProto], size: int, weights: Mapping[str, NDArray[Any]] | None = None, opset: int = 17
) -> onnx.ModelProto:
    """A model from x [size] to y [size]."""
    return model(nodes, {"x": (FLOAT, [size])}, {"y": (FLOAT, [size])}, weights, opset)


def save(proto: onnx.ModelProto, path: Path) -> Path:
    """Write the model and return its path."""
    onnx.save(proto, path)
    return path


@functools.cache
def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def magika() -> Path:
    """magika's model: int32 "bytes" [?, 2048] → float "target_label"."""
    return _package_folder("magika") / "models" / "standard_v3_3" / "model.onnx"


def nudenet() -> Path:
    """nudenet's detector: float "images" [batch, 3, height, width] → float "output0"."""
    return _package_folder("nudenet") / "320n.onnx"
