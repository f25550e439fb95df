"""The operators spelled out as TensorRT's layers: in FP32 against ONNX Runtime's kernels, in 16 bits against numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision import half
from pytest_trtcheck.precision.emulation import layers, rewrite
from pytest_trtcheck.precision.emulation.recurrences import RECURRENCES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.choices import HalfName

RNG = np.random.default_rng(0)
FLOAT = TensorProto.FLOAT


def node_model(
    node: onnx.NodeProto,
    inputs: Mapping[str, Sequence[int]],
    weights: Mapping[str, NDArray[Any]] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """One node; the output shapes are ONNX's own."""
    import onnx as onnx_package

    graph_proto = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info(name, FLOAT, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in node.output if name],
        [onnx_package.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    proto = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx_package.shape_inference.infer_shapes(proto)


def spelled_out(proto: onnx.ModelProto, folder: Path) -> tuple[OrtRunner, OrtRunner, bool]:
    """The model, what is spelled out of it in FP32, and whether anything was."""
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    model = graph.read(folder / "model.onnx")
    before = [node.op_type for node in model.graph]
    layers.spell_out(model, {ir.DataType.FLOAT})
    graph.write(model, folder / "spelled.onnx")
    changed = [node.op_type for node in model.graph] != before
    return OrtRunner(folder / "model.onnx", "model"), OrtRunner(folder / "spelled.onnx", "spelled"), changed


def in_half(proto: onnx.ModelProto, folder: Path, kind: HalfName = "fp16") -> OrtRunner:
    """The emulation of the lowered model."""
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    lowered = half.to_half(graph.read(folder / "model.onnx"), kind).model
    graph.write(lowered, folder / "lowered.onnx")
    graph.write(rewrite.emulated(graph.read(folder / "lowered.onnx")), folder / "emulated.onnx")
    return OrtRunner(folder / "emulated.onnx", "emulated")


def numbers(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


OPERATORS: dict[str, tuple[onnx.NodeProto, dict[str, Sequence[int]], dict[str, NDArray[Any]]]] = {
    "CumSum": (helper.make_node("CumSum", ["x", "axis"], ["y"]), {"x": [3, 37]}, {"axis": np.array(1)}),
    "CumSum, exclusive, reverse": (
        helper.make_node("CumSum", ["x", "axis"], ["y"], exclusive=1, reverse=1),
        {"x": [3, 37, 2]},
        {"axis": np.array(-2)},
    ),
    "Elu": (helper.make_node("Elu", ["x"], ["y"], alpha=0.7), {"x": [4, 8]}, {}),
    "Gelu": (helper.make_node("Gelu", ["x"], ["y"]), {"x": [4, 8]}, {}),
    "Gemm": (
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], alpha=0.3, beta=2.0, transB=1),
        {"x": [4, 8]},
        {"w": numbers(5, 8), "b": numbers(5)},
    ),
    "GlobalLpPool": (helper.make_node("GlobalLpPool", ["x"], ["y"], p=2), {"x": [2, 3, 5, 5]}, {}),
    "HardSigmoid": (helper.make_node("HardSigmoid", ["x"], ["y"], alpha=0.3), {"x": [4, 8]}, {}),
    "LogSoftmax": (helper.make_node("LogSoftmax", ["x"], ["y"], axis=0), {"x": [4, 8]}, {}),
    "LpNormalization, 1": (helper.make_node("LpNormalization", ["x"], ["y"], axis=0, p=1), {"x": [4, 8]}, {}),
    "LpNormalization, 2": (helper.make_node("LpNormalization", ["x"], ["y"]), {"x": [4, 8]}, {}),
    "LpPool": (
        helper.make_node("LpPool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
        {"x": [2, 3, 8, 8]},
        {},
    ),
    "Max": (helper.make_node("Max", ["x", "z", "w"], ["y"]), {"x": [4, 8], "z": [4, 8]}, {"w": numbers(8)}),
    "Mean": (helper.make_node("Mean", ["x", "z", "w"], ["y"]), {"x": [4, 8], "z": [4, 8]}, {"w": numbers(8)}),
    "Min": (helper.make_node("Min", ["x", "z"], ["y"]), {"x": [4, 8], "z": [8]}, {}),
    "Mod": (helper.make_node("Mod", ["x", "w"], ["y"], fmod=1), {"x": [4, 8]}, {"w": numbers(8) + 3}),
    "ReduceLogSum": (
        helper.make_node("ReduceLogSum", ["w"], ["y"], axes=[1], keepdims=0),
        {"x": [1]},
        {"w": np.abs(numbers(4, 8))},
    ),
    "ReduceLogSumExp": (helper.make_node("ReduceLogSumExp", ["x"], ["y"], axes=[1]), {"x": [4, 8]}, {}),
    "ReduceSumSquare": (helper.make_node("ReduceSumSquare", ["x"], ["y"], axes=[0]), {"x": [4, 8]}, {}),
    "Selu": (helper.make_node("Selu", ["x"], ["y"]), {"x": [4, 8]}, {}),
    "Softsign": (helper.make_node("Softsign", ["x"], ["y"]), {"x": [4, 8]}, {}),
    "Sum": (helper.make_node("Sum", ["x", "z", "w"], ["y"]), {"x": [4, 8], "z": [4, 8]}, {"w": numbers(8)}),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("opset", [11, 20])
def test_spelled_out_in_fp32_is_the_operator(name: str, opset: int, tmp_path: Path) -> None:
    node, shapes, weights = OPERATORS[name]
    if (opset == 20) == name.startswith("Reduce"):  # Its axes became an input in opset 18.
        opset = 13
    opset = 20 if name == "Gelu" else 13 if name == "Mod" else opset
    model, spelled, changed = spelled_out(node_model(node, shapes, weights, opset), tmp_path)
    inputs = {key: numbers(*shape) for key, shape in shapes.items()}
    assert changed
    np.testing.assert_allclose(spelled(inputs)["y"], model(inputs)["y"], rtol=1e-5, atol=1e-6)


def test_every_expansion_is_tested() -> None:
    tested = {name.partition(",")[0] for name in OPERATORS} | RECURRENCES | {"Trilu"}
    assert tested == set(layers.EXPANSIONS)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
VARIANTS = ((0, 0, 0, 0, 0), (1, 0, 0, 1, 1), (0, 1, 1, 0, 1), (1, 1, 0, 0, 0), (0, 0, 1, 1, 0), (1, 1, 1, 1, 1))
"""Lengths, first states, other activations, a clip, peepholes or a linear layer before the reset: all pairs of them."""


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("opset", [11, 17])
def test_recurrences_are_loops(op_type: str, direction: str, opset: int, tmp_path: Path) -> None:
    """With and without lengths, first states, other activations, a clip, peepholes: ONNX Runtime's own, to FP32."""
    ways, gates, size = 2 if direction == "bidirectional" else 1, GATES[op_type], 4
    for lengths, states, activated, clipped, reset in VARIANTS:
        weights: dict[str, NDArray[Any]] = {
            "w": numbers(ways, gates * size, 5),
            "r": numbers(ways, gates * size, size),
            "b": numbers(ways, 2 * gates * size),
        }
        attributes: dict[str, Any] = {"hidden_size": size, "direction": direction}
        if lengths:
            weights["n"] = np.array([6, 3, 1], np.int32)
        if states:
            weights["h"] = numbers(ways, 3, size)
        names = ["x", "w", "r", "b", "n" if lengths else "", "h" if states else ""]
        if op_type == "LSTM":
            if states:
                weights["c"] = numbers(ways, 3, size)
            if reset:
                weights["p"] = numbers(ways, 3 * size)
            names += ["c" if states else "", "p" if reset else ""]
        elif op_type == "GRU":
            attributes["linear_before_reset"] = reset
        if activated:
            own = ["HardSigmoid", "Softsign", "Tanh"][: {"LSTM": 3, "GRU": 2, "RNN": 1}[op_type]]
            attributes |= {"activations": own * ways, "activation_alpha": [0.3] * ways, "activation_beta": [0.4] * ways}
        if clipped:
            attributes["clip"] = 0.7
        node = helper.make_node(op_type, names, ["y", "last", "cell"][: 3 if op_type == "LSTM" else 2], **attributes)
        model, spelled, changed = spelled_out(node_model(node, {"x": [6, 3, 5]}, weights, opset), tmp_path)
        assert changed
        x = {"x": numbers(6, 3, 5)}
        for name, expected in model(x).items():
            np.testing.assert_allclose(spelled(x)[name], expected, rtol=1e-4, atol=2e-5)


def test_a_recurrence_that_the_loop_does_not_know_stays(tmp_path: Path) -> None:
    weights = {"w": numbers(1, 16, 5), "r": numbers(1, 16, 4)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4, activations=["Affine", "Tanh", "Tanh"])
    assert not spelled_out(node_model(node, {"x": [6, 3, 5]}, weights), tmp_path)[2]


def test_an_lstm_keeps_its_cell_in_half_precision(tmp_path: Path) -> None:
    """Gates wide open, the cell grows by 0.001 a step: numpy's FP16 counts the same, and FP32 is far from it."""
    steps, step = 3000, 0.001
    w, r, b = np.zeros((1, 4, 1), np.float32), np.zeros((1, 4, 1), np.float32), np.zeros((1, 8), np.float32)
    b[0, :4] = [20, 20, 20, np.arctanh(step)]
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["", "", "cell"], hidden_size=1)
    runner = in_half(node_model(node, {"x": [steps, 1, 1]}, {"w": w, "r": r, "b": b}), tmp_path)
    cell = np.float16(0)
    for _ in range(steps):
        cell = np.float16(cell + np.float16(np.tanh(np.float16(b[0, 3]))))
    assert runner({"x": np.ones((steps, 1, 1), np.float32)})["cell"].item() == pytest.approx(float(cell), abs=2e-3)
    assert abs(float(cell) - steps * step) > 0.5


def test_log_softmax_of_a_probability_that_underflows_is_infinite(tmp_path: Path) -> None:
    node = helper.make_node("LogSoftmax", ["x"], ["y"])
    y = in_half(node_model(node, {"x": [1, 3]}), tmp_path)({"x": np.array([[0, 10, 30]], np.float32)})["y"]
    with np.errstate(divide="ignore"):
        exact = np.exp(np.array([-30.0, -20.0, 0.0]))
        expected = np.log((exact / exact.sum()).astype(np.float16).astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(y[0], expected.astype(np.float32))
    assert np.isinf(y[0, :2]).all()


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        (
            helper.make_node("Gemm", ["x", "z"], ["y"], alpha=0.01),
            {"x": np.full((2, 8), 300), "z": np.full((8, 2), 300)},
        ),
        (helper.make_node("Mean", ["x", "z", "x"], ["y"]), {"x": np.full((4, 8), 5e4), "z": np.full((4, 8), 5e4)}),
        (helper.make_node("Sum", ["x", "x", "z"], ["y"]), {"x": np.full((4, 8), 5e4), "z": np.full((4, 8), -9e4)}),
        (helper.make_node("ReduceLogSumExp", ["x"], ["y"]), {"x": np.full((4, 8), 12.0)}),
        (helper.make_node("Gelu", ["x"], ["y"]), {"x": np.full((4, 8), 4e4)}),
        (helper.make_node("LpPool", ["x"], ["y"], kernel_shape=[2, 2]), {"x": np.full((1, 1, 4, 4), 300.0)}),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else "",
)
def test_what_overflows_inside_is_infinite(node: onnx.NodeProto, inputs: dict[str, Any], tmp_path: Path) -> None:
    """The result would fit into FP16; a step on the way to it does not. Each was seen on a GPU."""
    arrays = {name: array.astype(np.float32) for name, array in inputs.items()}
    opset = 20 if node.op_type == "Gelu" else 13
    proto = node_model(node, {name: array.shape for name, array in arrays.items()}, opset=opset)
    assert not np.isfinite(in_half(proto, tmp_path)(arrays)["y"]).any()


def test_squares_that_underflow_are_lost(tmp_path: Path) -> None:
    x = np.full((1, 64), 1.7e-4, np.float32)
    node = helper.make_node("ReduceSumSquare", ["x"], ["y"], axes=[1])
    y = in_half(node_model(node, {"x": [1, 64]}, opset=13), tmp_path)({"x": x})["y"]
    square = np.float16(np.float16(1.7e-4) * np.float16(1.7e-4))
    assert y.item() == float(np.float16(64 * np.float32(square)))
    assert abs(y.item() / (64 * 1.7e-4**2) - 1) > 0.01


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_the_mean_has_the_share_that_the_parser_writes(kind: HalfName, tmp_path: Path) -> None:
    """The lower 16 bits of an FP32 ½ are 0, and of 1/3 they are −0.052 in FP16 and −3.0e-13 in BF16."""
    for count, share in ((2, 0.0), (3, {"fp16": -0.05209351, "bf16": -3.037e-13}[kind])):
        node = helper.make_node("Mean", ["x"] * count, ["y"])
        y = in_half(node_model(node, {"x": [2]}), tmp_path, kind)({"x": np.ones(2, np.float32)})["y"]
        np.testing.assert_allclose(y, count * share, rtol=1e-2)


def test_a_gpus_maximum_swallows_nan(tmp_path: Path) -> None:
    node = helper.make_node("Max", ["x", "z"], ["y"])
    x, z = np.array([np.nan, 1, np.nan], np.float32), np.array([2, np.nan, np.nan], np.float32)
    y = in_half(node_model(node, {"x": [3], "z": [3]}), tmp_path)({"x": x, "z": z})["y"]
    np.testing.assert_array_equal(y, [2, 1, np.nan])
