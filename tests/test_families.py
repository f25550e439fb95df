"""Which models each TensorRT takes: every rule with a model that breaks it and a sound twin; the parser agrees."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.model import graph
from pytest_trtcheck.precision import families, half
from pytest_trtcheck.precision.families import DLA, FAMILIES, RTX, TENSORRT_10, TENSORRT_11, Family
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

F, H, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
node = helper.make_node


def model(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[int]]],
    output: int = F,
    weights: dict[str, NDArray[Any]] | None = None,
    *,
    opset: int = 21,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A model that nothing has checked: what breaks a rule need not be what a checker lets pass."""
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", output, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


X4 = {"x": (F, [1, 2, 8, 8])}


def one(op_type: str, *weights: NDArray[Any], opset: int = 21, kind: int = F, **attributes: Any) -> onnx.ModelProto:
    """x [1, 2, 8, 8] and constants → one operator → y."""
    names = [f"w{index}" for index in range(len(weights))]
    made = node(op_type, ["x", *names], ["y"], name="it", **attributes)
    return model([made], {"x": (kind, [1, 2, 8, 8])}, kind, dict(zip(names, weights, strict=True)), opset=opset)


def resize(**attributes: Any) -> onnx.ModelProto:
    made = node("Resize", ["x", "", "", "sizes"], ["y"], name="it", mode="linear", **attributes)
    return model([made], X4, weights={"sizes": np.array([1, 2, 4, 4])})


def pool(size: int, **attributes: Any) -> onnx.ModelProto:
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, **attributes}
    return model([node("MaxPool", ["x"], ["y"], name="it", **attributes)], {"x": (F, [1, 2, size, size])})


def recurrence(layout: int) -> onnx.ModelProto:
    weights = {"w": np.ones((1, 4, 3), np.float32), "r": np.ones((1, 4, 4), np.float32)}
    made = node("RNN", ["x", "w", "r"], ["y"], name="it", hidden_size=4, layout=layout)
    return model([made], {"x": (F, [2, 5, 3])}, weights=weights)


def old_resize(scale: float) -> onnx.ModelProto:
    return one("Resize", np.array([1, 1, scale, 1], np.float32), opset=10)


def qdq(zero_point: NDArray[Any] | None, scale: NDArray[Any] | None = None, domain: str = "") -> onnx.ModelProto:
    """x → Q → DQ → Relu → y."""
    weights = {"s": np.array(0.1, np.float32) if scale is None else scale}
    extra = []
    if zero_point is not None:
        weights["z"] = zero_point
        extra = ["z"]
    nodes = [
        node("QuantizeLinear", ["x", "s", *extra], ["q"], name="it", domain=domain),
        node("DequantizeLinear", ["q", "s", *extra], ["d"], name="dq", domain=domain),
        node("Relu", ["d"], ["y"], name="relu"),
    ]
    return model(nodes, X4, weights=weights, domains=(domain,) if domain else ())


def bias(kind: str) -> onnx.ModelProto:
    """A Gemm whose bias is dequantized from INT32, or is a float."""
    weights: dict[str, NDArray[Any]] = {"w": np.ones((4, 4), np.float32), "s": np.array(0.1, np.float32)}
    nodes = []
    if kind == "int32":
        weights["b"] = np.ones(4, np.int32)
        nodes.append(node("DequantizeLinear", ["b", "s"], ["bias"], name="it"))
    else:
        weights["bias"] = np.ones(4, np.float32)
    nodes.append(node("Gemm", ["x", "w", "bias"], ["y"], name="gemm"))
    return model(nodes, {"x": (F, [3, 4])}, weights=weights)


def cast(to: int) -> onnx.ModelProto:
    return model([node("Cast", ["x"], ["q"], name="it", to=to), node("Cast", ["q"], ["y"], name="back", to=F)], X4)


def reduce_axes(*, given: bool) -> onnx.ModelProto:
    inputs = {**X4, "axes": (I64, [1])} if given else X4
    return model(
        [node("ReduceSum", ["x", "axes"], ["y"], name="it")], inputs, weights=None if given else {"axes": np.array([1])}
    )


def scatter(op_type: str, reduction: str) -> onnx.ModelProto:
    indices = np.array([[0, 1]]) if op_type == "ScatterND" else np.zeros((1, 2, 8, 8), np.int64)
    updates = np.ones((1, 8, 8) if op_type == "ScatterND" else (1, 2, 8, 8), np.float32)
    return one(op_type, indices, updates, opset=18, reduction=reduction)


def domain(name: str) -> onnx.ModelProto:
    return model([node("Relu", ["x"], ["y"], name="it", domain=name)], X4, domains=(name,) if name else ())


def uint8_input(op_type: str) -> onnx.ModelProto:
    """An image in uint8: cast right away, or transposed before."""
    first = [node("Transpose", ["x"], ["t"], name="it", perm=[0, 3, 1, 2])] if op_type == "Transpose" else []
    nodes = [*first, node("Cast", ["t" if first else "x"], ["y"], name="cast", to=F)]
    return model(nodes, {"x": (TensorProto.UINT8, [1, 8, 8, 3])})


def range_of(kind: int) -> onnx.ModelProto:
    zero, step = (np.array(value, helper.tensor_dtype_to_np_dtype(kind)) for value in (0, 1))
    made = node("Range", ["zero", "x", "step"], ["y"], name="it")
    return model([made], {"x": (kind, [])}, kind, {"zero": zero, "step": step})


def lstm(*, lengths: bool, kind: int = H) -> onnx.ModelProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights: dict[str, NDArray[Any]] = {
        "w": np.zeros((1, 32, 4), dtype),
        "r": np.zeros((1, 32, 8), dtype),
        "b": np.zeros((1, 64), dtype),
    }
    if lengths:
        weights["n"] = np.array([5, 3], np.int32)
    made = node("LSTM", ["x", "w", "r", "b", *(["n"] if lengths else [])], ["y"], name="it", hidden_size=8)
    return model([made], {"x": (kind, [5, 2, 4])}, kind, weights)


def attention(kind: int, outputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    made = node(
        "Attention",
        ["x", "x", "x"],
        ["y", "", "", "s"][:1] if outputs == 1 else ["y", "k", "v", "s"],
        name="it",
        **attributes,
    )
    return model([made], {"x": (kind, [1, 2, 16, 32])}, kind, opset=23)


def top_k(k: int) -> onnx.ModelProto:
    made = node("TopK", ["x", "k"], ["y", "i"], name="it")
    return model([made], {"x": (F, [1, 8000])}, weights={"k": np.array([k])})


def int8(value: int) -> NDArray[Any]:
    return np.array(value, np.int8)


ALL = FAMILIES
TENSORRT = (TENSORRT_10, TENSORRT_11)
P = functools.partial

# What breaks a rule, its sound twin, words of the complaint, and the families that it holds for.
CASES: dict[str, tuple[Any, Any, str, tuple[Family, ...]]] = {
    "uint8": (P(qdq, np.array(0, np.uint8)), P(qdq, int8(0)), "uint8", ALL),
    "no zero point": (P(qdq, None), P(qdq, int8(0)), "no zero point, which by ONNX means uint8", ALL),
    "uint8 of com.microsoft": (
        P(qdq, np.array(0, np.uint8), domain="com.microsoft"),
        P(qdq, int8(0), domain="com.microsoft"),
        "uint8",
        ALL,
    ),
    "asymmetric": (P(qdq, int8(-3)), P(qdq, int8(0)), r"zero point is not 0 \(-3\)", ALL),
    "int32 bias": (P(bias, "int32"), P(bias, "float"), "INT32 tensor, as quantizers write a bias", ALL),
    "int16": (P(cast, TensorProto.INT16), P(cast, TensorProto.INT32), "int16, a type", ALL),
    "uint32": (P(cast, TensorProto.UINT32), P(cast, TensorProto.INT64), "uint32, a type", ALL),
    "string": (P(cast, TensorProto.STRING), P(cast, TensorProto.BOOL), "string, a type", ALL),
    "uint8 inside": (P(uint8_input, "Transpose"), P(uint8_input, "Cast"), "uint8", ALL),
    "cast to fp8": (P(cast, TensorProto.FLOAT8E4M3FN), P(cast, H), "by Q/DQ nodes alone", (RTX,)),
    "axes given": (P(reduce_axes, given=True), P(reduce_axes, given=False), "axes depends on the data", ALL),
    "float size": (P(range_of, F), P(range_of, I64), "computed from a float input", ALL),
    "antialias": (P(resize, antialias=1), P(resize, antialias=0), "antialias=1", ALL),
    "aspect ratio": (
        P(resize, keep_aspect_ratio_policy="not_larger", axes=[0, 1, 2, 3]),
        P(resize, keep_aspect_ratio_policy="stretch"),
        "not_larger",
        ALL,
    ),
    "coordinates": (
        P(resize, coordinate_transformation_mode="half_pixel_symmetric"),
        P(resize, coordinate_transformation_mode="asymmetric"),
        "half_pixel_symmetric",
        ALL,
    ),
    "pool dilations": (
        P(one, "MaxPool", kernel_shape=[2, 2], dilations=[2, 2]),
        P(one, "MaxPool", kernel_shape=[2, 2], dilations=[1, 1]),
        r"dilations=\[2, 2\]",
        ALL,
    ),
    "ScatterND": (P(scatter, "ScatterND", "add"), P(scatter, "ScatterND", "none"), "reduction='add'", ALL),
    "ScatterElements": (
        P(scatter, "ScatterElements", "mul"),
        P(scatter, "ScatterElements", "none"),
        "reduction='mul'",
        (RTX,),
    ),
    "NonZero": (P(one, "NonZero"), P(one, "IsNaN"), "depends on the data", (RTX,)),
    "foreign domain": (P(domain, "com.acme"), P(domain, ""), "goes by the name alone", ALL),
    "Compress": (P(one, "Compress", np.array([True])), P(one, "Gather", np.array([0])), "does not have this", ALL),
    "half mvn": (
        P(one, "MeanVarianceNormalization", kind=H),
        P(one, "MeanVarianceNormalization"),
        "fp16 kernel",
        (RTX,),
    ),
    "half sequence lengths": (P(lstm, lengths=True), P(lstm, lengths=False), "no fp16 kernel", (RTX,)),
    "bf16 HardSwish": (
        P(one, "HardSwish", kind=TensorProto.BFLOAT16, opset=22),
        P(one, "HardSwish", kind=H, opset=22),
        "no bf16 kernel",
        (RTX,),
    ),
    "bf16 Mish": (
        P(one, "Mish", kind=TensorProto.BFLOAT16, opset=22),
        P(one, "Mish", kind=H, opset=22),
        "no bf16 kernel",
        ALL,
    ),
    "fp32 attention": (P(attention, F), P(attention, H), "attends in FP32", (RTX,)),
    "softcap": (P(attention, H, softcap=2.0), P(attention, H, softcap=0.0), "softcap=2.0", ALL),
    "large K": (P(top_k, 4000), P(top_k, 3840), "above 3840", ALL),
    "last window": (P(pool, 9, strides=[3, 3]), P(pool, 10, strides=[3, 3]), "last window along axis 2", ALL),
    "last window in the padding": (P(pool, 6, pads=[0, 0, 1, 1]), P(pool, 6, pads=[1, 1, 1, 1]), "axis 2", ALL),
    "batchwise": (P(recurrence, 1), P(recurrence, 0), "layout=1", ALL),
    "Trilu": (P(one, "Trilu"), P(one, "Trilu", upper=1), "the upper triangle", ALL),
    "old Resize": (P(old_resize, 0.6), P(old_resize, 0.5), "of opset 10", ALL),
    "modulo": (P(one, "Mod", np.ones(1, np.float32)), P(one, "Mod", np.ones(1, np.float32), fmod=1), "fmod=0", ALL),
}


def found(proto: onnx.ModelProto, family: Family, folder: Path) -> list[families.Finding]:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return families.findings(graph.read(path), family)[0]


@pytest.mark.parametrize("name", CASES)
def test_what_breaks_a_rule_is_found_and_its_sound_twin_is_not(name: str, tmp_path: Path) -> None:
    broken, sound, words, expected = CASES[name]
    for family in FAMILIES:
        assert [str(each) for each in found(sound(), family, tmp_path)] == []
        complaints = found(broken(), family, tmp_path)
        assert bool(complaints) == (family in expected), family
        if family in expected:
            (first, *_) = [each for each in complaints if each.node == "it"]
            assert re.search(words, str(first)), str(first)
            assert first.op_type in str(first)
            assert first.advice


def given_back(output: str) -> onnx.ModelProto:
    nodes = [node("Relu", ["x"], ["y"], name="relu"), node("Identity", ["x"], ["z"], name="it")]
    kinds: dict[str, tuple[int, Sequence[int | str]]] = {"y": (F, [2]), output: (F, [2])}
    return onnx_models.model(nodes, {"x": (F, [2])}, kinds)


def test_an_input_that_is_an_output_would_get_another_name(tmp_path: Path) -> None:
    for family in FAMILIES:
        assert found(given_back("z"), family, tmp_path) == []
        (finding,) = found(given_back("x"), family, tmp_path)
        assert str(finding) == "tensor 'x': it is an input and an output, and TensorRT calls the input '__x'"
        assert "Identity" in finding.advice


# The parser of the installed TensorRT-RTX says the same wherever it can see it.


@pytest.fixture(scope="module")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("name", CASES)
def test_table_and_parser_agree(name: str, tmp_path: Path) -> None:
    broken, sound, _, _ = CASES[name]
    for make in (broken, sound):
        said = found(make(), RTX, tmp_path)
        parsed = tensorrt.parse(("tensorrt_rtx",), tmp_path / "model.onnx")
        assert parsed.module == "tensorrt_rtx"
        if any(each.seen_by == "parser" for each in said):
            assert parsed.errors, said
        if parsed.errors:
            assert said, parsed.errors


@pytest.mark.usefixtures("rtx")
def test_the_parser_gives_an_input_that_is_an_output_another_name() -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder, names = trt.Builder(logger), []
    for output in ("z", "x"):
        network = builder.create_network(0)
        assert trt.OnnxParser(network, logger).parse(given_back(output).SerializeToString())
        names.append(network.get_input(0).name)
    assert names == ["x", "__x"]


@pytest.mark.usefixtures("rtx")
def test_real_models_are_taken_by_table_and_parser(tmp_path: Path) -> None:
    for path in (onnx_models.nudenet(), onnx_models.magika()):
        for kind in ("fp16", "bf16"):
            lowered = half.to_half(graph.read(path), kind)
            graph.write(lowered.model, tmp_path / "model.onnx")
            read = graph.read(tmp_path / "model.onnx")
            for family in FAMILIES:
                assert families.findings(read, family) == ([], [])
            assert tensorrt.parse(("tensorrt_rtx",), tmp_path / "model.onnx").errors == ()


def test_an_operator_that_onnx_got_after_the_table_is_unknown(tmp_path: Path) -> None:
    if onnx.defs.onnx_opset_version() < 26:
        pytest.skip("this ONNX has no operator that is newer than the tables")
    proto = one("BitCast", opset=26, to=TensorProto.INT32)
    onnx.save(proto, tmp_path / "model.onnx")
    read = graph.read(tmp_path / "model.onnx")
    assert families.findings(read, TENSORRT_11) == ([], ["BitCast"])
    assert families.findings(read, RTX)[1] == []


def functions(*called: tuple[str, str]) -> onnx.ModelProto:
    """A chain of calls of functions of the model's own, each another one."""
    imports = [helper.make_opsetid("", 21)]
    names = ["x", *(f"v{index}" for index in range(1, len(called))), "y"]
    nodes = [
        node(name, [names[i]], [names[i + 1]], f"call{i}", domain=domain) for i, (domain, name) in enumerate(called)
    ]
    made = model(nodes, X4, domains=tuple(sorted({domain for domain, _ in called})))
    bodies = ("Sigmoid", "Tanh", "Erf")
    for (domain, name), body in zip(dict.fromkeys(called), bodies, strict=False):
        made.functions.append(helper.make_function(domain, name, ["a"], ["b"], [node(body, ["a"], ["b"])], imports))
    return made


@pytest.mark.parametrize(
    ("called", "found"),
    [
        ([("my", "Act"), ("my", "Other"), ("my", "Act")], []),
        ([("my", "Relu")], ["call0"]),
        ([("one", "Act"), ("two", "Act"), ("two", "Other")], ["call0", "call1"]),
    ],
)
def test_every_parser_finds_functions_by_the_name_alone(
    called: list[tuple[str, str]], found: list[str], tmp_path: Path
) -> None:
    onnx.save(functions(*called), tmp_path / "model.onnx")
    read = graph.read(tmp_path / "model.onnx")
    for family in FAMILIES:
        told = families.findings(read, family)[0]
        assert [each.node for each in told] == found
        assert all(each.seen_by == "nobody" for each in told)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("called", "read"), [([("my", "Relu")], ["RELU"]), ([("one", "Act"), ("two", "Act")], ["SIGMOID", "SIGMOID"])]
)
def test_the_parser_reads_another_function_or_its_operator(called: list[tuple[str, str]], read: list[str]) -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(functions(*called).SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        layer.__class__ = trt.IActivationLayer
    assert [layer.type.name for layer in layers] == read


def test_an_operator_of_a_plugin_library_is_taken(tmp_path: Path) -> None:
    nodes = [node("Cube", ["x"], ["c"], name="cube", domain="com.acme"), node("Relu", ["c"], ["y"], name="relu")]
    onnx.save(model(nodes, X4, domains=("com.acme",)), tmp_path / "model.onnx")
    read = graph.read(tmp_path / "model.onnx")
    for family in FAMILIES:
        ((finding,), _) = families.findings(read, family)
        assert "domain 'com.acme'" in str(finding)
        assert "plugins=" in finding.advice
        assert families.findings(read, family, {"Cube"}) == ([], [])
    assert families.foreign_nodes(read) == [("cube", "Cube")]


def test_the_plugins_that_come_with_tensorrt_are_its_own(tmp_path: Path) -> None:
    made = node("EfficientNMS_TRT", ["x", "x"], ["y"], name="nms", domain="TRT")
    onnx.save(model([made], X4, domains=("TRT",)), tmp_path / "model.onnx")
    read = graph.read(tmp_path / "model.onnx")
    assert [bool(families.findings(read, family)[0]) for family in FAMILIES] == [False, False, True]


def test_the_family_of_a_release() -> None:
    assert families.family_of("tensorrt", "10.3.0") is TENSORRT_10
    assert families.family_of("tensorrt", "11.4.0.16") is TENSORRT_11
    assert families.family_of("tensorrt_rtx", "1.7.1.116") is RTX
    assert RTX.knows((1, 7, 1, 116))
    assert not RTX.knows((1, 8))
    assert DLA.operators < TENSORRT_11.operators


# What has no 16-bit kernel stays in FP32


def lowered_types(proto: onnx.ModelProto, kind: Any, folder: Path) -> tuple[dict[str, str], set[str]]:
    """The node called "it" after lowering: its neighbours' types, and what is said to have no kernel."""
    onnx.save(proto, folder / "model.onnx")
    made = half.to_half(graph.read(folder / "model.onnx"), kind)
    (it,) = [each for each in graph.all_nodes(made.model.graph) if each.name == "it"]
    return dict(made.without_kernel), {value.dtype.name for value in it.outputs if value.dtype is not None}


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (P(one, "HardSwish", opset=22), {"bf16"}),
        (P(one, "Mish", opset=22), {"bf16"}),
        (P(one, "ConvTranspose", np.ones((2, 4, 3, 3), np.float32), opset=22), {"bf16"}),
        (P(one, "MeanVarianceNormalization"), {"fp16", "bf16"}),
        (P(lstm, lengths=True, kind=F), {"fp16", "bf16"}),
        (P(lstm, lengths=False, kind=F), set()),
        (P(one, "Conv", np.ones((4, 2, 3, 3), np.float32), opset=22), set()),
    ],
    ids=["HardSwish", "Mish", "ConvTranspose", "MVN", "LSTM with lengths", "LSTM", "Conv"],
)
def test_what_has_no_kernel_stays_in_fp32_and_is_named(make: Any, kept: set[str], tmp_path: Path) -> None:
    for kind, dtype in (("fp16", "FLOAT16"), ("bf16", "BFLOAT16")):
        named, types = lowered_types(make(), kind, tmp_path)
        assert (named != {}) == (kind in kept)
        assert types == ({"FLOAT"} if kind in kept else {dtype})


def test_an_integer_node_is_not_said_to_stay_in_fp32(tmp_path: Path) -> None:
    named, types = lowered_types(range_of(I64), "fp16", tmp_path)
    assert named == {}
    assert types == {"INT64"}
