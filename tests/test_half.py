from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision import batch_norm, half
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.choices import HalfName


def lower(proto: onnx.ModelProto, tmp_path: Path, kind: HalfName, keep: tuple[str, ...] = ()) -> onnx.ModelProto:
    path = onnx_models.save(proto, tmp_path / "model.onnx")
    result = half.to_half(graph.read(path), kind, keep)
    graph.write(result.model, tmp_path / "lowered.onnx")
    lowered = onnx.load(tmp_path / "lowered.onnx")
    onnx.checker.check_model(lowered, full_check=kind == "fp16")
    return lowered


def types(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto)
    values = [*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def test_every_float_tensor_becomes_half_and_the_edges_stay(tmp_path: Path) -> None:
    lowered = lower(onnx_models.conv_net(), tmp_path, "fp16")
    found = types(lowered)
    assert found["image"] == found["logits"] == TensorProto.FLOAT
    for name in ("c1", "r1", "c2", "a1", "r2", "p1", "f1"):
        assert found[name] == TensorProto.FLOAT16, name
    assert {tensor.data_type for tensor in lowered.graph.initializer} == {TensorProto.FLOAT16}
    assert [node.op_type for node in lowered.graph.node].count("Cast") == 2


def test_keep_fp32_keeps_the_node_and_its_weights(tmp_path: Path) -> None:
    lowered = lower(onnx_models.conv_net(), tmp_path, "fp16", ("conv2",))
    by_name = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    node = next(node for node in lowered.graph.node if node.name == "conv2")
    assert {by_name[name] for name in node.input[1:]} == {TensorProto.FLOAT}
    found = types(lowered)
    assert found[node.input[0]] == found[node.output[0]] == TensorProto.FLOAT


def test_keep_fp32_must_match(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"keep_fp32: no node is called 'convv1'(.|\n)*conv1"):
        lower(onnx_models.conv_net(), tmp_path, "fp16", ("convv1",))


def test_what_the_schema_fixes_at_fp32_stays(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], name="resize", mode="nearest")],
        {"x": (TensorProto.FLOAT, [1, 1, 4, 4])},
        {"y": (TensorProto.FLOAT, [1, 1, 8, 8])},
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    )
    lowered = lower(proto, tmp_path, "fp16")
    assert {tensor.name: tensor.data_type for tensor in lowered.graph.initializer} == {"scales": TensorProto.FLOAT}


def test_overflowing_weights_are_clamped_and_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "huge"], ["y"], name="mul")]
    proto = onnx_models.elementwise(nodes, 3, {"huge": np.array([1e5, -np.inf, 2.0], np.float32)})
    path = onnx_models.save(proto, tmp_path / "model.onnx")
    result = half.to_half(graph.read(path), "fp16")
    assert result.overflow == (half.ChangedConstant("huge", 1e5, 1, 3, ("mul",)),)
    graph.write(result.model, tmp_path / "lowered.onnx")
    (weight,) = onnx.load(tmp_path / "lowered.onnx").graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weight), np.array([65504, -np.inf, 2], np.float16))
    assert half.to_half(graph.read(path), "bf16").overflow == ()


def test_attributes_that_name_a_type_follow(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["ids"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [2.5])),
        helper.make_node("Add", ["f", "c"], ["y"]),
    ]
    proto = onnx_models.model(nodes, {"ids": (TensorProto.INT64, [4])}, {"y": (TensorProto.FLOAT, [4])})
    lowered = lower(proto, tmp_path, "fp16")
    assert types(lowered)["f"] == types(lowered)["c"] == TensorProto.FLOAT16
    outputs = OrtRunner(tmp_path / "lowered.onnx", "lowered")({"ids": np.arange(4)})
    np.testing.assert_array_equal(outputs["y"], np.arange(4) + 2.5)


def test_an_input_that_is_an_output_too(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    proto = onnx_models.model(
        nodes,
        {"x": (TensorProto.FLOAT, [2])},
        {"a": (TensorProto.FLOAT, [2]), "b": (TensorProto.FLOAT, [2])},
    )
    lowered = lower(proto, tmp_path, "fp16")
    assert [value.name for value in lowered.graph.output] == ["a", "b"]
    outputs = OrtRunner(tmp_path / "lowered.onnx", "lowered")({"x": np.array([-1, 2], np.float32)})
    np.testing.assert_array_equal(outputs["a"], [-2, 4])
    np.testing.assert_array_equal(outputs["b"], [0, 4])


def test_bf16_raises_an_old_opset(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    lowered = lower(onnx_models.elementwise(nodes, 3, opset=11), tmp_path, "bf16")
    assert lowered.opset_import[0].version == 13


@pytest.mark.parametrize(
    ("operator", "operands", "shape", "kind"),
    [
        ("HannWindow", [8], [8], TensorProto.FLOAT),
        ("HammingWindow", [8], [8], TensorProto.FLOAT),
        ("BlackmanWindow", [8], [8], TensorProto.FLOAT),
        ("MelWeightMatrix", [4, 16, 8000, np.float32(0), np.float32(4000)], [9, 4], TensorProto.FLOAT16),
    ],
)
def test_what_is_fp32_by_default_is_told_otherwise_where_there_is_a_kernel(
    tmp_path: Path, operator: str, operands: list[float], shape: list[int], kind: int
) -> None:
    weights = {f"v{index}": np.asarray(value) for index, value in enumerate(operands)}
    nodes = [
        helper.make_node(operator, list(weights), ["w"], name="window"),
        helper.make_node("Mul", ["x", "w"], ["y"], name="mul"),
    ]
    io = {"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, shape)}
    assert types(lower(onnx_models.model(nodes, *io, weights), tmp_path, "fp16"))["w"] == kind


def test_a_fill_that_nobody_gave_is_one_zero(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["c"], name="fill"),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    lowered = lower(onnx_models.elementwise(nodes, 3), tmp_path, "fp16")
    (fill,) = [node for node in lowered.graph.node if node.op_type == "ConstantOfShape"]
    value = onnx.numpy_helper.to_array(fill.attribute[0].t)
    assert value.dtype == np.float16
    assert value.tolist() == [0.0]


def test_constants_at_the_end_of_the_range_do_not_overflow(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "large"], ["a"], name="first"),
        helper.make_node("Mul", ["a", "huge"], ["y"], name="second"),
    ]
    weights = {"large": np.array([65504, -65504, 1], np.float32), "huge": np.array([7e4, -1e5, 8e4], np.float32)}
    path = onnx_models.save(onnx_models.elementwise(nodes, 3, weights), tmp_path / "model.onnx")
    assert half.to_half(graph.read(path), "fp16").overflow == (half.ChangedConstant("huge", 1e5, 3, 3, ("second",)),)


def test_a_constant_that_vanishes_is_none_that_overflows(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "tiny"], ["y"], name="mul")]
    proto = onnx_models.elementwise(nodes, 3, {"tiny": np.array([1e-12, 0, -2e-12], np.float32)})
    result = half.to_half(graph.read(onnx_models.save(proto, tmp_path / "model.onnx")), "fp16")
    (found,) = result.underflow
    assert (found.name, found.count, found.size) == ("tiny", 2, 3)
    assert found.value == pytest.approx(2e-12, rel=1e-6, abs=0)
    assert result.overflow == ()


def test_a_node_with_one_fp32_operand_that_stays_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Resize", ["ids", "", "scales"], ["wide"], name="resize", mode="nearest"),
        helper.make_node("Cast", ["wide"], ["y"], name="cast", to=TensorProto.FLOAT),
    ]
    inputs, outputs = {"ids": (TensorProto.INT32, [1, 1, 4, 4])}, {"y": (TensorProto.FLOAT, [1, 1, 8, 8])}
    proto = onnx_models.model(nodes, inputs, outputs, {"scales": np.array([1, 1, 2, 2], np.float32)})
    result = half.to_half(graph.read(onnx_models.save(proto, tmp_path / "model.onnx")), "fp16")
    assert result.left == {"resize": "ONNX has no 16-bit Resize"}


def test_reversing_a_sequence_is_nothing_of_sequences(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReverseSequence", ["x", "lengths"], ["r"], name="reverse", batch_axis=0, time_axis=1),
        helper.make_node("Relu", ["r"], ["y"], name="relu"),
    ]
    io = {"x": (TensorProto.FLOAT, [2, 4])}, {"y": (TensorProto.FLOAT, [2, 4])}
    lowered = lower(onnx_models.model(nodes, *io, {"lengths": np.array([4, 2])}), tmp_path, "fp16")
    assert types(lowered)["r"] == TensorProto.FLOAT16


def test_a_branch_that_is_nothing_but_a_value_from_outside(tmp_path: Path) -> None:
    """No file may have one, but removing an Identity leaves one: what is 16-bit outside is FP32 at its edge."""
    output = [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])]
    other = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "else", [], output)
    then = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "then", [], output)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    proto = onnx_models.model(
        nodes,
        {"x": (TensorProto.FLOAT, [2]), "c": (TensorProto.BOOL, [])},
        {"y": (TensorProto.FLOAT, [2])},
    )
    model = graph.read(onnx_models.save(proto, tmp_path / "model.onnx"))
    (branch,) = [each for each in graph.all_graphs(model.graph) if any(node.op_type == "Identity" for node in each)]
    (identity,) = branch
    outer = identity.inputs[0]
    assert outer is not None
    branch.outputs[0] = outer
    branch.remove(identity, safe=True)
    graph.write(half.to_half(model, "fp16").model, tmp_path / "lowered.onnx")
    lowered = onnx.load(tmp_path / "lowered.onnx").graph
    (branching,) = [node for node in lowered.node if node.op_type == "If"]
    (inner,) = [each.g for each in branching.attribute if each.name == "then_branch"]
    (cast,) = inner.node
    relu = next(node for node in lowered.node if node.op_type == "Relu")
    assert (cast.op_type, list(cast.input), cast.attribute[0].i) == ("Cast", list(relu.output), TensorProto.FLOAT)
    assert [value.name for value in inner.output] == list(cast.output)


def batch_norm_net(*, standalone: bool) -> onnx.ModelProto:
    variance = np.array([1e8, 1.0, 0.5, 2.0], np.float32)
    nodes = [
        helper.make_node("Relu" if standalone else "Conv", ["x"] if standalone else ["x", "w"], ["c"], name="first"),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["y"], name="bn"),
    ]
    weights = {
        "scale": np.array([1e4, 1, 2, 3], np.float32),
        "bias": np.arange(4, dtype=np.float32),
        "mean": np.array([5e4, 0.1, 0.2, 0.3], np.float32) if not standalone else np.zeros(4, np.float32),
        "var": variance,
    }
    if not standalone:
        weights["w"] = onnx_models.weights((4, 4, 1, 1), 3)
    return onnx_models.model(
        nodes, {"x": (TensorProto.FLOAT, [2, 4, 3, 3])}, {"y": (TensorProto.FLOAT, [2, 4, 3, 3])}, weights
    )


@pytest.mark.parametrize("standalone", [False, True])
def test_batch_norm_folds_exactly(tmp_path: Path, *, standalone: bool) -> None:
    path = onnx_models.save(batch_norm_net(standalone=standalone), tmp_path / "bn.onnx")
    folded = batch_norm.fold_batch_norm(graph.read(path))
    assert "BatchNormalization" not in {node.op_type for node in graph.all_nodes(folded.graph)}
    graph.write(folded, tmp_path / "folded.onnx")
    x = {"x": np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)}
    expected = OrtRunner(path, "bn")(x)["y"]
    np.testing.assert_allclose(OrtRunner(tmp_path / "folded.onnx", "folded")(x)["y"], expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_that_is_kept_stays(tmp_path: Path) -> None:
    path = onnx_models.save(batch_norm_net(standalone=False), tmp_path / "bn.onnx")
    kept = batch_norm.fold_batch_norm(graph.read(path), {"bn"})
    assert "BatchNormalization" in {node.op_type for node in graph.all_nodes(kept.graph)}
