"""Models that ONNX Runtime's providers divide in a known way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import helper

from tests.onnx_models import FLOAT, model, weights

if TYPE_CHECKING:
    import onnx


def reshaped() -> onnx.ModelProto:
    """x → MatMul → Relu → flattened, the shape computed from x's own: three nodes of shapes."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Shape", ["b"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="first"),
        helper.make_node("Concat", ["n", "rest"], ["t"], name="together", axis=0),
        helper.make_node("Reshape", ["b", "t"], ["y"], name="reshape"),
    ]
    values = {"w": weights((8, 8), 1), "zero": np.array([0]), "rest": np.array([-1])}
    return model(nodes, {"x": (FLOAT, ["n", 8])}, {"y": (FLOAT, ["n", 8])}, values)


def divided() -> onnx.ModelProto:
    """Two operators that the CUDA provider lacks, and TensorRT too, between others."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Hardmax", ["a"], ["h"], name="hardest"),
        helper.make_node("Det", ["d"], ["det"], name="determinant"),
        helper.make_node("Mul", ["a", "det"], ["c"], name="scaled"),
        helper.make_node("Add", ["c", "h"], ["y"], name="sum"),
    ]
    inputs: dict[str, tuple[int, list[int | str]]] = {"x": (FLOAT, ["n", 8]), "d": (FLOAT, [8, 8])}
    return model(nodes, inputs, {"y": (FLOAT, ["n", 8])}, {"w": weights((8, 8), 1)})


def products(scale: float = 1.0) -> onnx.ModelProto:
    """x [n, 512] → two products with a Relu between: long enough for TF32 to show, the first weight scaled."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "v"], ["y"], name="second"),
    ]
    values = {"w": weights((512, 512), 1, 0.05) * np.float32(scale), "v": weights((512, 64), 2, 0.05)}
    return model(nodes, {"x": (FLOAT, ["n", 512])}, {"y": (FLOAT, ["n", 64])}, values)
