"""Only what was computed in the precision asked for can pass: requests that compute nothing, and those that do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.backends.tensorrt.emulated import Emulated
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import message, parity
from pytest_trtcheck.check.checker import Checker
from pytest_trtcheck.check.request import Allowance, Known, Request
from pytest_trtcheck.errors import ArgumentError, ModelError, NothingComputedError
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision import lowering
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models, trt_models

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.record import Evidence
    from pytest_trtcheck.spec import Precision

FLOAT, HALF, BF16, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE
N = helper.make_node
W = onnx_models.weights((8, 8), 1)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", None)


def lower(
    proto: onnx.ModelProto, precision: Precision, cache: Cache, keep: tuple[str, ...] = (), data: object = None
) -> Lowered:
    return lowering.lower(open_model(proto, (), cache), precision, cache, keep_fp32=keep, calibration=data, folders=())


def nodes(lowered: Lowered, precision: Precision) -> list[str]:
    found = lowered.computed_in(precision)
    assert found is not None
    return [each.node for each in found]


def net(steps: list[onnx.NodeProto], weights: dict[str, Any], kind: int = FLOAT, opset: int = 17) -> onnx.ModelProto:
    """x [2, 8] → y [2, 8] of the type `kind`."""
    return onnx_models.model(steps, {"x": (kind, [2, 8])}, {"y": (kind, [2, 8])}, weights, opset)


def mlp(kind: Any = np.float32, tensor: int = FLOAT, opset: int = 17) -> onnx.ModelProto:
    steps = [N("MatMul", ["x", "w"], ["a"], name="mm"), N("Relu", ["a"], ["y"], name="relu")]
    return net(steps, {"w": W.astype(kind)}, tensor, opset)


def foreign(domain: str, operator: str, **attributes: Any) -> onnx.ModelProto:
    node = N(operator, ["x"], ["y"], name="foreign", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", FLOAT, [2, 8])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)], ir_version=9
    )


def qoperator() -> onnx.ModelProto:
    """As onnxruntime's quantizer writes it in QOperator format."""
    steps = [
        N("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        N("QLinearMatMul", ["xq", "s", "z", "w", "s", "z", "s", "z"], ["yq"], name="product"),
        N("DequantizeLinear", ["yq", "s", "z"], ["y"], name="dq"),
    ]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((8, 8), np.int8)}
    return net(steps, {name: np.asarray(value) for name, value in weights.items()})


def dynamically_quantized() -> onnx.ModelProto:
    """As onnxruntime's quantize_dynamic writes it: its products are computed in integers, the rest in FP32."""
    steps = [
        N("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], name="quantize"),
        N("MatMulInteger", ["xq", "w", "xz"], ["products"], name="product"),
        N("Cast", ["products"], ["f"], name="float", to=FLOAT),
        N("Mul", ["f", "xs"], ["scaled"], name="scale"),
        N("Softmax", ["scaled"], ["y"], name="softmax"),
    ]
    return net(steps, {"w": np.ones((8, 8), np.int8)})


def one_half_cast() -> onnx.ModelProto:
    """An FP32 model of which one branch passes through FP16."""
    steps = [
        N("MatMul", ["x", "w"], ["a"], name="mm"),
        N("Cast", ["a"], ["h"], name="down", to=HALF),
        N("Cast", ["h"], ["f"], name="up", to=FLOAT),
        N("Mul", ["f", "k"], ["y"], name="mul"),
    ]
    return net(steps, {"w": W * np.float32(1e3), "k": np.float32(1e3).reshape(())})


def stored_in_half() -> onnx.ModelProto:
    steps = [
        N("Cast", ["w"], ["wf"], name="widen", to=FLOAT),
        N("MatMul", ["x", "wf"], ["a"], name="mm"),
        N("Mul", ["a", "k"], ["y"], name="mul"),
    ]
    return net(steps, {"w": W.astype(np.float16), "k": np.asarray(np.float32(1e6))})


def half_beside_float(products: int) -> onnx.ModelProto:
    """`products` matrix products in FP32 and one in FP16."""
    steps, value = [], "x"
    for index in range(products):
        steps.append(N("MatMul", [value, "w"], [f"f{index}"], name=f"float{index}"))
        value = f"f{index}"
    steps += [
        N("Cast", [value], ["h"], name="down", to=HALF),
        N("MatMul", ["h", "wh"], ["hm"], name="half"),
        N("Cast", ["hm"], ["y"], name="up", to=FLOAT),
    ]
    weights = {"w": W, "wh": W.astype(np.float16)}
    return net(steps, weights if products else {"wh": weights["wh"]})


def fake_quantized(zero: Any, weight_too: bool = True, opset: int = 19) -> onnx.ModelProto:
    weight = {"w": W}
    operand = "w"
    steps = [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["d"])]
    if weight_too:
        steps += [N("QuantizeLinear", ["w", "s", "z"], ["wq"]), N("DequantizeLinear", ["wq", "s", "z"], ["wd"])]
        operand = "wd"
    steps.append(N("MatMul", ["d", operand], ["y"], name="mm"))
    return net(steps, {"s": np.asarray(np.float32(0.05)), "z": np.asarray(zero), **weight}, opset=opset)


def moves_only() -> onnx.ModelProto:
    steps = [
        N("Transpose", ["x"], ["t"], name="t"),
        N("Reshape", ["t", "shape"], ["r"], name="r"),
        N("Identity", ["r"], ["y"], name="i"),
    ]
    return net(steps, {"shape": np.array([2, 8])})


def shapes_only() -> onnx.ModelProto:
    """Arithmetic on the input's shape and on constants, none on what it holds."""
    steps = [
        N("Shape", ["x"], ["s"], name="s"),
        N("Cast", ["s"], ["sf"], name="sf", to=FLOAT),
        N("Mul", ["sf", "half"], ["sh"], name="halve"),
        N("Mul", ["half", "half"], ["quarter"], name="constants"),
        N("Add", ["sh", "quarter"], ["sum"], name="sum"),
        N("Cast", ["sum"], ["rows"], name="rows", to=TensorProto.INT64),
        N("Gather", ["rows", "first"], ["count"], name="count"),
        N("Slice", ["x", "zero", "count"], ["top"], name="slice"),
        N("Concat", ["top", "top"], ["y"], name="concat", axis=0),
    ]
    return net(steps, {"half": np.asarray(np.float32(0.5)), "first": np.array([0]), "zero": np.array([0])})


NOTHING: list[tuple[str, Any, str]] = [
    ("fp16", lambda: foreign("com.microsoft", "Gelu"), r"foreign: com.microsoft.Gelu is none of ONNX's operators"),
    ("bf16", lambda: foreign("com.microsoft", "FastGelu"), r"com.microsoft.FastGelu is none of ONNX's"),
    ("fp16", lambda: foreign("ai.onnx.ml", "Normalizer", norm="L2"), r"foreign: ONNX has no 16-bit Normalizer"),
    ("fp16", qoperator, r"1 node in integers \(product\)"),
    ("int8", qoperator, r"1 of its nodes compute in integers \(product\)"),
    ("fp16", dynamically_quantized, r"1 of its nodes compute in integers \(product\)"),
    ("bf16", dynamically_quantized, r"1 of its nodes compute in integers \(product\)"),
    ("tf32", lambda: net([N("Relu", ["x"], ["y"], name="r")], {}), r"nothing is computed in TF32.*no matrix product"),
    ("fp16", moves_only, r"does no arithmetic on floats.*Identity, Reshape, Transpose"),
    ("fp16", shapes_only, r"does no arithmetic on floats"),
    ("tf32", moves_only, r"does no arithmetic on floats"),
    ("bf16", lambda: mlp(np.float16, HALF), r"2 nodes in fp16 \(mm, relu\)(.|\n)*ask for precision='fp16'"),
    ("fp16", lambda: mlp(ml_dtypes.bfloat16, BF16, 22), r"2 nodes in bf16 \(mm, relu\)(.|\n)*precision='bf16'"),
    ("fp32", lambda: mlp(np.float16, HALF), r"2 nodes in fp16"),
    ("tf32", lambda: mlp(np.float16, HALF), r"2 nodes in fp16"),
    ("int8", lambda: mlp(np.float16, HALF), r"2 nodes in fp16"),
    ("int8", lambda: trt_models.operator("Conv", "fp8"), r"1 node in fp8 \(conv\)(.|\n)*precision='fp8'"),
    ("fp8", lambda: trt_models.operator("Conv", "int8"), r"1 node in int8 \(conv\)(.|\n)*precision='int8'"),
    ("fp16", lambda: trt_models.operator("Gemm", "int8"), r"1 node in int8 \(gemm\)"),
    ("fp32", lambda: trt_models.operator("Gemm", "int8"), r"1 node in int8 \(gemm\)"),
    ("int8", lambda: fake_quantized(np.uint8(0)), r"1 node in uint8 \(mm\)"),
]


@pytest.mark.parametrize(("precision", "make", "says"), NOTHING)
def test_what_computes_nothing_is_an_error(precision: Precision, make: Any, says: str, cache: Cache) -> None:
    with pytest.raises(NothingComputedError, match=says):
        lower(make(), precision, cache)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_keeping_every_node_is_an_error(precision: Precision, cache: Cache) -> None:
    with pytest.raises(NothingComputedError, match=r"mm, relu: named in keep_fp32(.|\n)*narrow keep_fp32"):
        lower(mlp(), precision, cache, keep=("*",))
    assert nodes(lower(mlp(), precision, cache, keep=("mm",)), precision) == ["relu"]


def test_keeping_every_node_of_int8_is_an_error(cache: Cache) -> None:
    with pytest.raises(ModelError, match="nothing to quantize"):
        lower(mlp(), "int8", cache, keep=("*",), data={"x": np.ones((1, 2, 8), np.float32)})


def test_activations_alone_quantized_are_rounded_to_int8_alone(cache: Cache) -> None:
    lowered = lower(fake_quantized(np.int8(0), weight_too=False), "int8", cache)
    assert lowered.taken_as_it_is
    assert "none of its operators computes in int8, values are rounded to its grid alone" in lowered.notes[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32", "fp8"])
def test_qdq_nodes_are_never_left_out(precision: Precision, cache: Cache) -> None:
    with pytest.raises(NothingComputedError, match="ask for precision='int8'"):
        lower(fake_quantized(np.int8(0), weight_too=False), precision, cache)


def test_a_node_counts_where_all_its_operands_are_quantized(cache: Cache) -> None:
    lowered = lower(fake_quantized(np.int8(0)), "int8", cache)
    assert lowered.taken_as_it_is
    assert nodes(lowered, "int8") == ["mm"]


def test_one_cast_to_fp16_leaves_an_fp32_model_to_be_lowered(cache: Cache) -> None:
    model = open_model(one_half_cast(), (), cache)
    lowered = lowering.lower(model, "fp16", cache)
    assert not lowered.taken_as_it_is
    assert nodes(lowered, "fp16") == ["mm", "mul"]
    x = {"x": np.full((2, 8), 30, np.float32)}
    # Products near 30 · 1000 · Σw, times 1000 after that, lie beyond FP16's 65504.
    assert np.isinf(emulation(model, lowered, "fp16", cache)(x)["y"]).any()
    right = (x["x"].astype(np.float64) @ (W * np.float32(1e3)).astype(np.float64)) * 1e3
    np.testing.assert_allclose(Reference(model, cache)(x)["y"], right, rtol=1e-3)
    assert nodes(lowering.lower(model, "bf16", cache), "bf16") == ["mm", "mul"]


def test_weights_stored_in_16_bits_leave_an_fp32_model(cache: Cache) -> None:
    model = open_model(stored_in_half(), (), cache)
    lowered = lowering.lower(model, "fp16", cache)
    assert nodes(lowered, "fp16") == ["mm", "mul"]
    assert lowered.details["constants"]["overflow"][0]["name"] == "k"
    assert nodes(lowering.lower(model, "tf32", cache), "tf32") == ["mm"]
    data = {"x": np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)}
    assert nodes(lowering.lower(model, "int8", cache, calibration=data), "int8") == ["mm"]


def test_what_most_products_compute_in_decides(cache: Cache) -> None:
    mostly_half = lower(half_beside_float(1), "fp16", cache)
    assert mostly_half.taken_as_it_is
    assert "of its 2 nodes with arithmetic, 1 in fp16" in mostly_half.notes[0]
    mostly_float = lower(half_beside_float(2), "fp16", cache)
    assert not mostly_float.taken_as_it_is
    assert nodes(mostly_float, "fp16") == ["float0", "float1", "half"]
    with pytest.raises(NothingComputedError, match=r"2 nodes in fp32 \(float0, float1\), 1 node in fp16 \(half\)"):
        lower(half_beside_float(2), "bf16", cache)


def test_keep_fp32_on_a_model_taken_as_it_is_is_refused(cache: Cache) -> None:
    with pytest.raises(ArgumentError, match="carries float16 and is taken as it is, so nothing can be kept"):
        lower(mlp(np.float16, HALF), "fp16", cache, keep=("mm",))


def test_a_small_share_is_said(cache: Cache) -> None:
    steps = [
        N("MatMul", ["x", "w"], ["a"], name="mm"),
        N("Relu", ["a"], ["b"], name="relu"),
        N("Sin", ["b"], ["y"], name="sin"),
    ]
    lowered = lower(net(steps, {"w": W}), "fp16", cache, keep=("mm", "relu"))
    assert "of 3 nodes with arithmetic, 1 in fp16; the others are not: named in keep_fp32" in lowered.notes


def request(proto: onnx.ModelProto, precision: Precision, **parity: Any) -> Request:
    return Request("test", proto, (), ParitySpec(precision=(precision,), **parity))


def test_a_check_that_computes_nothing_is_an_error(cache: Cache) -> None:
    checker = Checker(cache, backend="onnxruntime")
    record = checker.check(request(mlp(), "fp16", keep_fp32=("*",)))
    assert record.verdict == "error"
    assert "mm, relu: named in keep_fp32" in (record.message or "")
    assert checker.check(request(mlp(), "fp16")).verdict == "pass"


def test_no_advice_to_keep_nodes_of_a_model_that_is_taken_as_it_is(cache: Cache) -> None:
    steps = [
        N("MatMul", ["x", "w"], ["a"], name="mm"),
        N("Mul", ["a", "a"], ["b"], name="square"),
        N("Sqrt", ["b"], ["y"], name="root"),
    ]
    proto = net(steps, {"w": (W * 1e3).astype(np.float16)}, HALF)
    record = Checker(cache, backend="onnxruntime", allowance=Allowance(seconds=0)).check(request(proto, "fp16"))
    assert record.verdict == "fail"
    assert "keep_fp32" not in (record.message or "")
    assert "export it with the nodes that lose most in FP32" in " ".join((record.message or "").split())


class Fp32Engine:
    """What TensorRT makes of an FP64 model: the right values, in FP32."""

    def __init__(self, reference: Reference, factor: float) -> None:
        self.reference, self.factor = reference, factor

    def __call__(self, inputs: Any) -> dict[str, Any]:
        return {name: (array * self.factor).astype(np.float32) for name, array in self.reference(inputs).items()}

    def close(self) -> None:
        """Nothing is held."""


class OnGpu(Emulated):
    """What says that a GPU ran it."""

    evidence: ClassVar[Evidence] = "engine"


@pytest.mark.parametrize(("factor", "verdict"), [(1.001, "pass"), (1.1, "fail")])
def test_an_engine_gives_fp32_where_the_model_has_fp64(factor: float, verdict: str, cache: Cache) -> None:
    model = open_model(mlp(np.float64, DOUBLE), (), cache)
    cases = [{"x": np.random.default_rng(0).random((2, 8))}]
    reference = Reference(model, cache)
    job = Known(request(mlp(), "fp16"), model, lowering.lower(model, "fp16", cache), cases, reference)
    job = replace(job, system=OnGpu(), runner=Fp32Engine(reference, factor))
    outcome = parity.judge(job)
    assert outcome.record.verdict == verdict
    assert "dtype" not in (message.comparison(replace(job, outcome=outcome)) or "")


def test_inner_nodes_count(cache: Cache) -> None:
    branches = {
        name: helper.make_graph(
            [N(operator, ["x"], [f"{name}_y"], name=f"inner_{operator}")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", FLOAT, [2, 8])],
        )
        for name, operator in (("then", "Sin"), ("otherwise", "Identity"))
    }
    choose = N("If", ["c"], ["y"], name="if", then_branch=branches["then"], else_branch=branches["otherwise"])
    proto = onnx_models.model([choose], {"x": (FLOAT, [2, 8]), "c": (TensorProto.BOOL, [])}, {"y": (FLOAT, [2, 8])})
    assert nodes(lower(proto, "fp16", cache), "fp16") == ["inner_Sin"]


def test_values_behind_a_foreign_operator_have_the_types_that_schemas_tell(cache: Cache, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            N("MatMul", ["x", "w"], ["a"], name="before"),
            N("Gelu", ["a"], ["b"], name="foreign", domain="com.microsoft"),
            N("MatMul", ["b", "w"], ["c"], name="behind"),
            N("Foo", ["c"], ["d"], name="other", domain="com.microsoft"),
            N("Relu", ["d"], ["e"], name="unknown"),
            N("Bar", ["e"], ["y"], name="last", domain="com.microsoft"),
        ],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", FLOAT, [2, 8])],
        [numpy_helper.from_array(W, "w")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    lowered = lower(helper.make_model(graph, opset_imports=imports, ir_version=9), "fp16", cache)
    assert nodes(lowered, "fp16") == ["before", "behind"]
    assert lowered.details["left_float"]["foreign"] == "com.microsoft.Gelu is none of ONNX's operators"
    written = onnx.load(lowered.path)
    by_name = {node.name: node for node in written.graph.node}
    casts = {node.output[0]: node for node in written.graph.node if node.op_type == "Cast"}
    assert casts[by_name["foreign"].input[0]].attribute[0].i == FLOAT
    assert casts[by_name["behind"].input[0]].attribute[0].i == HALF
    assert by_name["unknown"].input[0] == "d"


def test_fp64_is_computed_as_fp32_and_lowered_on(cache: Cache) -> None:
    proto = mlp(np.float64, DOUBLE)
    lowered = lower(proto, "fp16", cache)
    assert nodes(lowered, "fp16") == ["mm", "relu"]
    assert lowered.notes[0] == "FP64 was taken as FP32, as TensorRT does"
    assert nodes(lower(proto, "tf32", cache), "tf32") == ["mm"]
    assert nodes(lower(proto, "fp32", cache), "fp32") == ["mm", "relu"]
