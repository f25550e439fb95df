"""Lowering breaks nothing by itself: sound models in every shape that exporters give them, against numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ArgumentError, InputError, ModelError, NothingComputedError
from pytest_trtcheck.model import graph, inputs
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision import half
from pytest_trtcheck.precision.emulation import computes_the_reference, emulation
from pytest_trtcheck.precision.lowering import Lowered, lower, prepared
from pytest_trtcheck.precision.reference import Reference
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.spec import Precision

FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
LOWEST = float(np.finfo(np.float32).min)
N = helper.make_node
RNG = np.random.default_rng(8)
X = RNG.standard_normal((2, 8)).astype(np.float32)
W = onnx_models.weights((8, 8), 1)
EPSILON = {"tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 1 / 127, "fp8": 2.0**-4}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", None)


def computed(
    proto: onnx.ModelProto, precision: Precision, cache: Cache, case: Mapping[str, NDArray[Any]], **options: Any
) -> tuple[dict[str, NDArray[Any]], Lowered]:
    """What the emulation of the lowered model computes; the file that TensorRT is given is checked on the way."""
    model = open_model(proto, (), cache)
    lowered = lower(model, precision, cache, **options)
    onnx.checker.check_model(onnx.load(lowered.path), full_check=precision == "fp16")
    return emulation(model, lowered, precision, cache)(dict(case)), lowered


def assert_near(actual: NDArray[Any], right: NDArray[Any], precision: str, roundings: int = 8) -> None:
    allowed = roundings * EPSILON[precision] * float(np.abs(right).max())
    np.testing.assert_allclose(np.asarray(actual, np.float64), right, rtol=0, atol=allowed)


BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])


# --- names -----------------------------------------------------------------------------------------------------------


def collisions() -> onnx.ModelProto:
    """Tensors, weights and nodes with the names that lowering would give to what it makes of their neighbours."""
    steps = [
        N("MatMul", ["x", "w"], ["y"], name="x_to_float16"),
        N("Add", ["y", "w_float16"], ["y_float16"], name="y_QuantizeLinear"),
        N("Add", ["y_float16", "w_bfloat16"], ["x_float16"], name="x_to_bfloat16"),
        N("MatMul", ["x_float16", "w_quantized"], ["y_fp32"], name="y_to_fp32"),
        N("Add", ["y_fp32", "int8_zero_point"], ["x_scale"], name="x_DequantizeLinear_output"),
        N("Relu", ["x_scale"], ["z"], name="z_float16"),
    ]
    ones = np.ones(8, np.float32)
    weights = {"w": W, "w_float16": ones, "w_bfloat16": ones, "w_quantized": W, "int8_zero_point": ones}
    return onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {n: (FLOAT, [2, 8]) for n in ("y", "y_fp32", "z")}, weights)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_names_that_lowering_would_invent(precision: Precision, cache: Cache) -> None:
    options = {"calibration": {"x": X[None]}} if precision in {"int8", "fp8"} else {}
    found, _ = computed(collisions(), precision, cache, {"x": X}, **options)
    y = X.astype(np.float64) @ W
    inner = (y + 2) @ W
    right = {"y": y, "y_fp32": inner, "z": np.maximum(inner + 1, 0)}
    assert list(found) == list(right)
    for name, expected in right.items():
        assert_near(found[name], expected, precision)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "int8", "fp8"])
def test_names_that_the_emulation_would_invent(precision: Precision, cache: Cache) -> None:
    steps = [
        N("MatMul", ["x", "w"], ["y"], name="y/round"),
        N("Add", ["y", "y/float"], ["y/round"], name="y/rounded"),
        N("Add", ["y/round", "w/float"], ["y/unrounded"], name="w/float"),
        N("Relu", ["y/unrounded"], ["x/float"], name="mm/0/tf32"),
        N("Add", ["x/float", "trtcheck/tf32_splitter"], ["y/rounded"], name="mm"),
        N("MatMul", ["y/rounded", "w"], ["mm/0/tf32"], name="mm/0/tf32/high"),
        N("Add", ["mm/0/tf32", "w/float"], ["z"], name="x_QuantizeLinear/div0"),
    ]
    ones = np.ones(8, np.float32)
    weights = {"w": W, "y/float": ones, "w/float": ones, "trtcheck/tf32_splitter": ones}
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {n: (FLOAT, [2, 8]) for n in "yz"}, weights)
    options = {"calibration": {"x": X[None]}} if precision in {"int8", "fp8"} else {}
    found, _ = computed(proto, precision, cache, {"x": X}, **options)
    y = X.astype(np.float64) @ W
    assert_near(found["y"], y, precision)
    assert_near(found["z"], (np.maximum(y + 2, 0) + 1) @ W + 1, precision)


def test_a_name_that_folding_would_invent(cache: Cache) -> None:
    weights = {
        "w": onnx_models.weights((4, 3, 1, 1), 2),
        **{n: np.full(4, 0.5, np.float32) for n in ("s", "b", "m", "v")},
    }
    taken = {"w_folded_bn": np.full((4, 1, 1), 3, np.float32), "bn2/mul/operand": np.full((4, 1, 1), 5, np.float32)}
    steps = [
        N("Conv", ["x", "w"], ["c"], name="conv"),
        N("BatchNormalization", ["c", "s", "b", "m", "v"], ["d"], name="bn"),
        N("Add", ["d", "w_folded_bn"], ["bn2/mul/output"], name="bn2/mul"),
        N("Relu", ["bn2/mul/output"], ["e"], name="relu"),
        N("BatchNormalization", ["e", "s", "b", "m", "v"], ["f"], name="bn2"),
        N("Add", ["f", "bn2/mul/operand"], ["y"], name="bn2/add"),
    ]
    proto = onnx_models.model(steps, {"x": (FLOAT, [1, 3, 2, 2])}, {"y": (FLOAT, [1, 4, 2, 2])}, {**weights, **taken})
    x = RNG.standard_normal((1, 3, 2, 2)).astype(np.float32)

    def normalized(a: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = 0.5 * (a - 0.5) / np.sqrt(0.5 + 1e-5) + 0.5
        return result

    e = np.maximum(normalized(np.einsum("oihw,nixy->noxy", weights["w"], x)) + 3, 0)
    assert_near(computed(proto, "fp16", cache, {"x": x})[0]["y"], normalized(e) + 5, "fp16")


def test_invented_names_leave_the_users_alone(tmp_path: Path) -> None:
    steps = [N("Relu", ["x"], ["a"]), N("Relu", ["a"], ["b"], name="Relu_0"), N("Relu", ["b"], ["y"])]
    proto = onnx_models.model(steps, {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])})
    read = graph.read(onnx_models.save(proto, tmp_path / "m.onnx"))
    assert [node.name for node in graph.all_nodes(read.graph)] == ["Relu_0_1", "Relu_0", "Relu_2"]


@BOTH
def test_keep_fp32_keeps_every_node_of_one_name(precision: Precision, cache: Cache) -> None:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        outputs = [helper.make_tensor_value_info(f"{name}_y", FLOAT, [2, 8])]
        return helper.make_graph([N(operator, ["a"], [f"{name}_y"], name="twin")], name, [], outputs)

    steps = [
        N("Mul", ["x", "huge"], ["a"], name="twin"),
        N("If", ["c"], ["b"], name="if", then_branch=branch("then", "Neg"), else_branch=branch("else", "Abs")),
        N("Mul", ["b", "tiny"], ["d"], name="twin"),
        N("Sin", ["d"], ["y"], name="sin"),
    ]
    inputs = {"x": (FLOAT, [2, 8]), "c": (TensorProto.BOOL, [])}
    weights = {"huge": np.asarray(np.float32(1e30)), "tiny": np.asarray(np.float32(1e-30))}
    proto = onnx_models.model(steps, inputs, {"y": (FLOAT, [2, 8])}, weights)
    case = {"x": X, "c": np.array(True)}
    kept, lowered = computed(proto, precision, cache, case, keep_fp32=("twin",))
    assert_near(kept["y"], np.sin(-X.astype(np.float64)), precision)
    assert [each.node for each in lowered.computed_in(precision) or ()] == ["sin"]


# --- constants -------------------------------------------------------------------------------------------------------


def masked(make: list[onnx.NodeProto], weights: Mapping[str, NDArray[Any]], opset: int = 17) -> onnx.ModelProto:
    """Softmax of s + mask, where the mask is the constant `full` times 0 or 1."""
    steps = [
        *make,
        N("Greater", ["columns", "pos"], ["beyond"], name="greater"),
        N("Cast", ["beyond"], ["beyondf"], to=FLOAT, name="beyondf"),
        N("Mul", ["full", "beyondf"], ["mask"], name="maskmul"),
        N("Add", ["s", "mask"], ["masked"], name="addmask"),
        N("Softmax", ["masked"], ["p"], axis=-1, name="softmax"),
    ]
    columns = {"columns": np.arange(8)[None], "pos": np.array([4])}
    return onnx_models.model(steps, {"s": (FLOAT, [2, 8])}, {"p": (FLOAT, [2, 8])}, {**columns, **weights}, opset)


def tensor(kind: int, value: float) -> onnx.TensorProto:
    return helper.make_tensor("v", kind, [1], [value])


MASKS: dict[str, tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]] = {
    "initializer": ([], {"full": np.full((1, 8), LOWEST, np.float32)}),
    "ConstantOfShape": (
        [N("Shape", ["s"], ["sh"]), N("ConstantOfShape", ["sh"], ["full"], value=tensor(FLOAT, LOWEST), name="fill")],
        {},
    ),
    "Constant": ([N("Constant", [], ["full"], value=tensor(FLOAT, LOWEST))], {}),
    "value_float": ([N("Constant", [], ["full"], value_float=LOWEST)], {}),
    "value_floats": ([N("Constant", [], ["full"], value_floats=[LOWEST])], {}),
    "double": (
        [N("Constant", [], ["wide"], value=tensor(DOUBLE, LOWEST)), N("Cast", ["wide"], ["full"], to=FLOAT)],
        {},
    ),
    "CastLike": ([N("CastLike", ["wide", "s"], ["full"])], {"wide": np.array([-(10**18)])}),
    "Expand": (
        [N("Expand", ["low", "size"], ["full"])],
        {"low": np.array([LOWEST], np.float32), "size": np.array([1, 8])},
    ),
    "Where": (
        [N("Where", ["all", "low", "zero"], ["full"])],
        {
            "all": np.ones((1, 8), bool),
            "low": np.asarray(np.float32(LOWEST)),
            "zero": np.asarray(np.float32(0)),
        },
    ),
    "Pad": (
        [N("Pad", ["none", "pads", "low"], ["full"])],
        {"none": np.zeros((1, 0), np.float32), "pads": np.array([0, 0, 0, 8]), "low": np.asarray(np.float32(LOWEST))},
    ),
}


@pytest.mark.parametrize("where", MASKS)
@BOTH
def test_a_mask_is_clamped_wherever_its_constant_stands(precision: Precision, where: str, cache: Cache) -> None:
    z = np.where(np.arange(8) > 4, -np.inf, X.astype(np.float64))
    exponentials = np.exp(z - z.max(1, keepdims=True))
    found, _ = computed(masked(*MASKS[where]), precision, cache, {"s": X})
    assert_near(found["p"], exponentials / exponentials.sum(1, keepdims=True), precision)


def test_the_padding_of_an_old_pad_is_clamped(cache: Cache) -> None:
    steps = [
        N("Pad", ["x"], ["p"], name="pad", pads=[0, 0, 0, 1], value=LOWEST),
        N("Mul", ["p", "k"], ["y"], name="mul"),
    ]
    zero_last = np.array([1] * 8 + [0], np.float32)
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 9])}, {"k": zero_last}, opset=10)
    found, lowered = computed(proto, "fp16", cache, {"x": X})
    assert_near(found["y"], np.pad(X, ((0, 0), (0, 1))).astype(np.float64), "fp16")
    (overflow,) = lowered.details["constants"]["overflow"]
    assert (overflow["name"], overflow["readers"]) == ("pad: value", ["pad"])


def test_constants_of_which_nothing_is_left_are_named(cache: Cache) -> None:
    steps = [
        N("Add", ["x", "eps"], ["a"], name="addeps"),
        N("Mul", ["a", "few"], ["b"], name="scale"),
        N("Shape", ["b"], ["shape"]),
        N("ConstantOfShape", ["shape"], ["fill"], name="fill", value=tensor(FLOAT, 1e-20)),
        N("Add", ["b", "fill"], ["c"], name="addfill"),
        N("Div", ["c", "zero"], ["y"], name="div"),
    ]
    weights = {
        "eps": np.asarray(np.float32(1e-12)),
        "few": np.array([1e-12, 1, 2, 3, 4, 5, 6, 7], np.float32),
        "zero": np.zeros(8, np.float32),
    }
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}, weights)
    model = open_model(proto, (), cache)
    lowered = lower(model, "fp16", cache)
    found = {each["name"]: each for each in lowered.details["constants"]["underflow"]}
    assert set(found) == {"eps", "fill"}
    assert found["eps"]["readers"] == ["addeps"]
    assert found["eps"]["value"] == pytest.approx(1e-12, rel=1e-6)
    assert "constant eps (1e-12, read by addeps) is too small for fp16: it became 0" in lowered.notes
    assert lower(model, "bf16", cache).details["constants"]["underflow"] == []


# --- files of every age ----------------------------------------------------------------------------------------------


def old_file(ir_version: int, opset: int) -> tuple[onnx.ModelProto, NDArray[np.float32]]:
    """As MXNet, Caffe2 and the first PyTorch wrote: initializers among the inputs."""
    w = onnx_models.weights((4, 3, 3, 3), 3)
    bn = {
        "s": np.full(4, 2, np.float32),
        "b": np.ones(4, np.float32),
        "m": np.zeros(4, np.float32),
        "v": np.ones(4, np.float32),
    }
    steps = [
        N("Conv", ["x", "w"], ["a"], pads=[1] * 4, name="conv"),
        N("BatchNormalization", ["a", *bn], ["c"], name="bn", epsilon=0.0),
        N("Relu", ["c"], ["y"], name="relu"),
    ]
    weights = {"w": w, **bn}
    g = helper.make_graph(
        steps,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [1, 3, 4, 4])]
        + [helper.make_tensor_value_info(name, FLOAT, list(array.shape)) for name, array in weights.items()],
        [helper.make_tensor_value_info("y", FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(g, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version), w


def convolved(x: NDArray[Any], w: NDArray[Any]) -> NDArray[np.float64]:
    """A 3 × 3 convolution with padding 1."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    result: NDArray[np.float64] = np.einsum("ncxyij,ocij->noxy", windows, w.astype(np.float64))
    return result


@pytest.mark.parametrize("ir_version", [3, 4, 8])
@pytest.mark.parametrize("opset", [7, 8, 9, 11])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_old_files(precision: Precision, opset: int, ir_version: int, cache: Cache) -> None:
    proto, w = old_file(ir_version, opset)
    x = np.random.default_rng(3).standard_normal((1, 3, 4, 4)).astype(np.float32)
    options = {"calibration": {"x": x[None]}} if precision == "int8" else {}
    found, _ = computed(proto, precision, cache, {"x": x}, **options)
    assert_near(found["y"], np.maximum(2 * convolved(x, w) + 1, 0), precision)


def interpolated(x: NDArray[Any], axis: int, scale: float) -> NDArray[np.float64]:
    """As Upsample and the first Resize have it: what lies `scale` times as far from the first place, linearly."""
    length = x.shape[axis]
    places = np.minimum(np.arange(int(length * scale)) / scale, length - 1)
    lower, share = np.floor(places).astype(int), np.modf(places)[0]
    shape = [-1 if each == axis else 1 for each in range(x.ndim)]
    share = share.reshape(shape)
    upper = np.minimum(lower + 1, length - 1)
    return np.asarray(x.take(lower, axis) * (1 - share) + x.take(upper, axis) * share, np.float64)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("operator", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10), ("Resize", 11)])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8", "fp8+fp16"])
def test_what_old_opsets_resize_by(precision: Precision, operator: str, opset: int, inside: bool, cache: Cache) -> None:
    scales = [1.0, 1.0, 2.0, 2.5]
    attributes: dict[str, Any] = {"mode": "linear"}
    operands = {7: ["c"], 9: ["c", "s"], 10: ["c", "s"], 11: ["c", "roi", "s"]}[opset]
    if opset == 7:
        attributes["scales"] = scales
    if opset == 11:
        attributes["coordinate_transformation_mode"] = "asymmetric"
    resize = N(operator, operands, ["r"], name="resize", **attributes)
    weights = {"w": onnx_models.weights((4, 3, 3, 3), 3), "s": np.array(scales, np.float32), "roi": np.ones(0, "f")}
    bodies = [helper.make_graph([resize], "b", [], [helper.make_tensor_value_info("r", FLOAT, [1, 4, 8, 10])])] * 2
    steps = [
        N("Conv", ["x", "w"], ["c"], pads=[1] * 4, name="conv"),
        N("If", ["yes"], ["y"], then_branch=bodies[0], else_branch=bodies[1]) if inside else resize,
    ]
    if not inside:
        steps[-1].output[:] = ["y"]
    weights |= {"yes": np.array(True)}
    proto = onnx_models.model(steps, {"x": (FLOAT, [1, 3, 4, 4])}, {"y": (FLOAT, [1, 4, 8, 10])}, weights, opset)
    x = np.random.default_rng(3).standard_normal((1, 3, 4, 4)).astype(np.float32)
    options = {} if precision in {"fp16", "bf16"} else {"calibration": {"x": x[None]}}
    found, _ = computed(proto, precision, cache, {"x": x}, **options)
    right = interpolated(interpolated(convolved(x, weights["w"]), 2, scales[2]), 3, scales[3])
    assert_near(found["y"], right, precision.partition("+")[0])


@pytest.mark.parametrize("opset", [11, 13, 19])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8+fp16", "int8+bf16", "fp8+fp16"])
def test_nodes_of_one_name_are_kept_together_whatever_the_opset(precision: Precision, opset: int, cache: Cache) -> None:
    steps = [
        N("MatMul", ["x", "w"], ["a"], name="mm"),
        N("Sin", ["a"], ["b"], name="twice"),
        N("Cos", ["b"], ["c"], name="twice"),
        N("Exp", ["c"], ["y"], name="exp"),
    ]
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}, {"w": W}, opset)
    options = {"calibration": {"x": X[None]}} if "8" in precision else {}
    _, lowered = computed(proto, precision, cache, {"x": X}, keep_fp32=("twice",), **options)
    sines = {name: kind for name, kind in lowered.kinds.items() if name.startswith("twice")}
    assert (len(sines), set(sines.values())) == (2, {"fp32"})


@pytest.mark.parametrize("name", ["turn", "cast", "conv", "mul", "bn"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int8+fp16"])
def test_what_is_worked_away_may_be_named(precision: Precision, name: str, cache: Cache) -> None:
    """The Transpose of a weight, the cast of a constant and a batch normalization, before they are looked for."""
    w = onnx_models.weights((4, 3, 3, 3), 3)
    steps = [
        N("Cast", ["k"], ["factor"], name="cast", to=FLOAT),
        N("Conv", ["x", "w"], ["a"], pads=[1] * 4, name="conv"),
        N("Mul", ["a", "factor"], ["b"], name="mul"),
        N("BatchNormalization", ["b", "one", "zero", "zero", "one"], ["c"], name="bn", epsilon=0.0),
        N("Transpose", ["m"], ["turned"], name="turn"),
        N("MatMul", ["c", "turned"], ["y"], name="mm"),
    ]
    matrix = onnx_models.weights((4, 4), 1)
    weights = {"w": w, "m": matrix, "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32)}
    weights |= {"k": np.full((4, 1, 1), 2.0)}
    proto = onnx_models.model(steps, {"x": (FLOAT, [1, 3, 4, 4])}, {"y": (FLOAT, [1, 4, 4, 4])}, weights)
    x = np.random.default_rng(3).standard_normal((1, 3, 4, 4)).astype(np.float32)
    calibrated: dict[str, Any] = {"calibration": {"x": x[None]}} if "8" in precision else {}
    for argument in ("keep_fp32", "exclude"):
        options = {argument: (name,), **calibrated}
        found, _ = computed(proto, precision, cache, {"x": x}, **options)
        assert_near(found["y"], 2 * convolved(x, w) @ matrix.T, precision.partition("+")[0])
    with pytest.raises(ArgumentError, match="keep_fp32: no node is called 'casts'"):
        computed(proto, precision, cache, {"x": x}, keep_fp32=("casts",), **calibrated)


@pytest.mark.parametrize("opset", [7, 9, 10, 13])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_an_operator_does_inside_is_no_other_in_an_old_opset(
    precision: Precision, opset: int, cache: Cache
) -> None:
    """A probability that the type does not hold has no logarithm."""
    steps = [N("MatMul", ["x", "w"], ["l"], name="mm"), N("LogSoftmax", ["l"], ["y"], name="ls", axis=1)]
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}, {"w": 100 * W}, opset)
    found, _ = computed(proto, precision, cache, {"x": X})
    logits = 100 * X.astype(np.float64) @ W
    logits -= logits.max(1, keepdims=True)
    right = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    least = {"fp16": -24 * np.log(2), "bf16": -133 * np.log(2)}[precision]
    assert (right < least - 2).any()
    np.testing.assert_array_equal(found["y"][right < least - 2], -np.inf)


def test_a_quantized_model_of_the_first_opset_that_has_such(cache: Cache) -> None:
    w = np.random.default_rng(3).integers(-127, 128, (8, 8)).astype(np.int8)
    steps = [
        N("QuantizeLinear", ["x", "xs", "zero"], ["q"], name="q"),
        N("DequantizeLinear", ["q", "xs", "zero"], ["d"], name="d"),
        N("DequantizeLinear", ["w", "ws", "zero"], ["wd"], name="wd"),
        N("MatMul", ["d", "wd"], ["y"], name="mm"),
    ]
    weights = {"w": w, "xs": np.float32(0.02), "ws": np.float32(0.01), "zero": np.int8(0)}
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}, arrays, opset=10)
    found, _ = computed(proto, "int8", cache, {"x": X})
    steps_of_x = np.clip(np.rint(X / np.float32(0.02)), -128, 127)
    np.testing.assert_allclose(found["y"], steps_of_x @ w * 0.02 * 0.01, rtol=1e-5, atol=1e-6)


def test_a_hardmax_over_several_axes_is_not_converted_to_something_else(cache: Cache) -> None:
    def net(axis: int) -> onnx.ModelProto:
        steps = [N("Mul", ["x", "k"], ["a"], name="mul"), N("Hardmax", ["a"], ["y"], name="hard", axis=axis)]
        shapes = (FLOAT, [2, 2, 4])
        return onnx_models.model(steps, {"x": shapes}, {"y": shapes}, {"k": np.full(1, 2, np.float32)}, opset=12)

    x = X.reshape(2, 2, 4)
    found, _ = computed(net(2), "bf16", cache, {"x": x})
    np.testing.assert_array_equal(found["y"], x == x.max(2, keepdims=True))
    with pytest.raises(ModelError, match="a Hardmax of opset 12 cannot be converted"):
        computed(net(1), "bf16", cache, {"x": x})


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("scales", [(0.63, 0.47), (0.72, 1.0), (1 / 3, 0.5), (1.5, 2.33)])
def test_an_old_resize_takes_the_elements_that_onnx_runtime_takes(
    precision: Precision, scales: tuple[float, float], cache: Cache
) -> None:
    sides = np.array(scales, np.float32)
    places = [np.arange(int(20 * side), dtype=np.float32) / side for side in sides]
    steps = [N("MatMul", ["x", "w"], ["a"], name="mul"), N("Resize", ["a", "s"], ["y"], name="resize")]
    shapes = {"x": (FLOAT, [1, 2, 20, 20])}, {"y": (FLOAT, [1, 2, *map(len, places)])}
    weights = {"w": np.eye(20, dtype=np.float32), "s": np.array([1, 1, *sides], np.float32)}
    x = np.random.default_rng(0).integers(-99, 99, (1, 2, 20, 20)).astype(np.float32)
    found, _ = computed(onnx_models.model(steps, *shapes, weights, opset=10), precision, cache, {"x": x})
    taken = [np.ceil(each) if side < 1 else np.floor(each) for each, side in zip(places, sides, strict=True)]
    np.testing.assert_array_equal(found["y"], x[:, :, taken[0].astype(int)][..., taken[1].astype(int)])


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("opset", [7, 10])
def test_the_mask_of_an_old_dropout(opset: int, precision: Precision, cache: Cache) -> None:
    steps = [N("MatMul", ["x", "w"], ["a"], name="mul"), N("Dropout", ["a"], ["y", "mask"], name="drop")]
    kinds = {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}
    proto = onnx_models.model(steps, *kinds, {"w": np.eye(8, dtype=np.float32)}, opset=opset)
    assert_near(computed(proto, precision, cache, {"x": X})[0]["y"], X, "bf16")
    mask = helper.make_tensor_value_info("mask", FLOAT if opset == 7 else TensorProto.BOOL, [2, 8])
    proto.graph.output.append(mask)
    if precision == "bf16" or opset == 7:
        with pytest.raises(ModelError, match=f"a Dropout of opset {opset} cannot be converted"):
            computed(proto, precision, cache, {"x": X})
    else:
        assert not computed(proto, precision, cache, {"x": X})[0]["mask"].any()


# --- sequences and inner graphs --------------------------------------------------------------------------------------


@BOTH
def test_sequences_inside_a_model(precision: Precision, cache: Cache) -> None:
    steps = [
        N("Mul", ["x", "k"], ["a"], name="mul"),
        N("SplitToSequence", ["a"], ["parts"], name="split", axis=1),
        N("Identity", ["parts"], ["same"], name="same"),
        N("SequenceAt", ["same", "one"], ["second"], name="at"),
        N("SequenceInsert", ["same", "second"], ["longer"], name="insert"),
        N("ConcatFromSequence", ["longer"], ["joined"], name="join", axis=1),
        N("ReverseSequence", ["joined", "lengths"], ["r"], name="reverse", batch_axis=0, time_axis=1),
        N("Sin", ["r"], ["y"], name="sin"),
    ]
    weights = {"k": np.asarray(np.float32(1.5)), "one": np.asarray(1), "lengths": np.array([9, 9])}
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 9])}, weights)
    found, lowered = computed(proto, precision, cache, {"x": X})
    a = 1.5 * X.astype(np.float64)
    assert_near(found["y"], np.sin(np.concatenate([a, a[:, 1:2]], 1)[:, ::-1]), precision)
    assert [each.node for each in lowered.computed_in(precision) or ()] == ["mul", "sin"]


@pytest.mark.parametrize("opset", [9, 12, 17])
@BOTH
def test_a_dropout_in_a_branch_is_none(precision: Precision, opset: int, cache: Cache) -> None:
    def branch(name: str) -> onnx.GraphProto:
        ratio = numpy_helper.from_array(np.asarray(np.float32(0.25)), f"{name}_ratio")
        steps = [N("Dropout", ["a", ratio.name] if opset > 11 else ["a"], [f"{name}_d"], name=f"{name}_drop")]
        steps.append(N("Add", [f"{name}_d", "k"], [name], name=f"{name}_add"))
        return helper.make_graph(steps, name, [], [helper.make_tensor_value_info(name, FLOAT, [2, 8])], [ratio])

    steps = [
        N("Mul", ["x", "k"], ["a"], name="mul"),
        N("If", ["flag"], ["y"], then_branch=branch("then"), else_branch=branch("else")),
    ]
    shapes = {"x": (FLOAT, [2, 8]), "flag": (TensorProto.BOOL, [])}
    proto = onnx_models.model(steps, shapes, {"y": (FLOAT, [2, 8])}, {"k": np.full(1, 2, np.float32)}, opset)
    found, _ = computed(proto, precision, cache, {"x": X, "flag": np.array(True)})
    assert_near(found["y"], 2 * X.astype(np.float64) + 2, precision)


@BOTH
def test_a_branch_reads_and_hands_on_values_from_outside(precision: Precision, cache: Cache) -> None:
    """Values that became 16-bit outside are read inside, and are FP32 at the branch's edge."""

    def branch(name: str, steps: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
        return helper.make_graph(steps, name, [], [helper.make_tensor_value_info(output, FLOAT, [2, 8])])

    then = branch("then", [N("Mul", ["a", "a"], ["t"], name="square"), N("Add", ["t", "w0"], ["t2"], name="add")], "t2")
    other = branch("else", [N("Identity", ["a"], ["e"], name="hand_on")], "e")
    steps = [
        N("Mul", ["x", "k"], ["a"], name="mul"),
        N("If", ["c"], ["b"], name="if", then_branch=then, else_branch=other),
        N("Sin", ["b"], ["y"], name="sin"),
    ]
    weights = {"k": np.asarray(np.float32(1.5)), "w0": np.full(8, 0.25, np.float32)}
    inputs = {"x": (FLOAT, [2, 8]), "c": (TensorProto.BOOL, [])}
    proto = onnx_models.model(steps, inputs, {"a": (FLOAT, [2, 8]), "y": (FLOAT, [2, 8])}, weights)
    a = 1.5 * X.astype(np.float64)
    for condition, right in ((True, a * a + 0.25), (False, a)):
        found, _ = computed(proto, precision, cache, {"x": X, "c": np.array(condition)})
        assert_near(found["a"], a, precision)
        assert_near(found["y"], np.sin(right), precision, roundings=40)


@BOTH
def test_a_loop_keeps_its_edges_in_fp32(precision: Precision, cache: Cache) -> None:
    body = helper.make_graph(
        [
            N("Mul", ["state", "k"], ["next"], name="step"),
            N("Identity", ["keep_on"], ["on"], name="on"),
            N("Constant", [], ["fixed"], value=tensor(FLOAT, 2.5)),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("keep_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [2, 8]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [2, 8]),
            helper.make_tensor_value_info("fixed", FLOAT, [1]),
        ],
    )
    steps = [
        N("Add", ["x", "k"], ["a"], name="add"),
        N("Loop", ["count", "", "a"], ["b", "rows"], name="loop", body=body),
        N("Add", ["b", "rows"], ["y"], name="last"),
    ]
    weights = {"k": np.asarray(np.float32(0.5)), "count": np.asarray(2)}
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}, weights)
    found, _ = computed(proto, precision, cache, {"x": X})
    assert_near(found["y"], (X.astype(np.float64) + 0.5) * 0.25 + 2.5, precision)


@BOTH
def test_a_constant_and_a_weight_that_are_outputs_too(precision: Precision, cache: Cache) -> None:
    steps = [
        N("Constant", [], ["c"], value=helper.make_tensor("v", FLOAT, [8], [0.5] * 8)),
        N("MatMul", ["x", "w"], ["a"], name="mm"),
        N("Add", ["a", "c"], ["y"], name="add"),
    ]
    outputs = {"y": (FLOAT, [2, 8]), "c": (FLOAT, [8]), "w": (FLOAT, [8, 8])}
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, outputs, {"w": W})
    found, _ = computed(proto, precision, cache, {"x": X})
    assert_near(found["y"], X.astype(np.float64) @ W + 0.5, precision)
    np.testing.assert_array_equal(found["c"], np.full(8, 0.5, np.float32))
    np.testing.assert_array_equal(found["w"], W)


@BOTH
def test_types_that_operators_take_by_default(precision: Precision, cache: Cache) -> None:
    steps = [
        N("HannWindow", ["size"], ["window"], name="hann", periodic=0),
        N("Mul", ["x", "window"], ["y"], name="mul"),
    ]
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}, {"size": np.asarray(8)})
    assert_near(computed(proto, precision, cache, {"x": X})[0]["y"], X * np.hanning(8), precision)


@BOTH
@pytest.mark.parametrize("size", [301, 4099])
def test_sizes_are_not_rounded(precision: Precision, size: int, cache: Cache) -> None:
    """As exporters write an upsampling by a factor: the sizes are computed as floats."""
    steps = [
        N("Shape", ["x"], ["shape"]),
        N("Gather", ["shape", "last"], ["n"], name="gather"),
        N("Cast", ["n"], ["nf"], name="as_float", to=FLOAT),
        N("Mul", ["nf", "factor"], ["doubled"], name="double"),
        N("Floor", ["doubled"], ["floored"], name="floor"),
        N("Cast", ["floored"], ["count"], name="as_int", to=INT64),
        N("Concat", ["one", "count"], ["sizes"], name="sizes", axis=0),
        N("Expand", ["k", "sizes"], ["wide"], name="expand"),
        N("Mul", ["wide", "half"], ["y"], name="mul"),
        N("Mul", ["x", "half"], ["z"], name="data"),
    ]
    weights = {
        "last": np.array([1]),
        "factor": np.asarray(np.float32(1)),
        "one": np.array([2]),
        "k": np.ones((1, 1), np.float32),
        "half": np.asarray(np.float32(0.5)),
    }
    inputs: dict[str, tuple[int, list[int | str]]] = {"x": (FLOAT, [2, "n"])}
    proto = onnx_models.model(steps, inputs, {"y": (FLOAT, [2, "m"]), "z": (FLOAT, [2, "n"])}, weights)
    x = np.random.default_rng(1).random((2, size)).astype(np.float32)
    found, lowered = computed(proto, precision, cache, {"x": x})
    assert found["y"].shape == (2, size)
    assert [each.node for each in lowered.computed_in(precision) or ()] == ["data"]


@BOTH
@pytest.mark.parametrize("size", [301, 5001])
def test_a_size_that_is_counted_up_to_and_computed_with(precision: Precision, size: int, cache: Cache) -> None:
    """As PyTorch writes `arange(n, dtype=float)` and positions relative to the length."""
    steps = [
        N("Shape", ["x"], ["shape"]),
        N("Gather", ["shape", "last"], ["n"], name="gather"),
        N("Cast", ["n"], ["length"], name="as_float", to=FLOAT),
        N("Range", ["zero", "length", "one"], ["places"], name="range"),
        N("Div", ["places", "length"], ["relative"], name="div"),
        N("Add", ["x", "relative"], ["y"], name="add"),
        N("Mul", ["length", "third"], ["share"], name="share"),
        N("Cast", ["share"], ["count"], name="as_int", to=INT64),
        N("Unsqueeze", ["count", "axis"], ["end"], name="unsqueeze"),
        N("Slice", ["y", "start", "end", "ends"], ["z"], name="slice"),
    ]
    weights = {
        "last": np.array(1),
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
        "third": np.array(1 / 3, np.float32),
        "axis": np.array([0]),
        "start": np.array([0]),
        "ends": np.array([1]),
    }
    inputs: dict[str, tuple[int, list[int | str]]] = {"x": (FLOAT, [2, "n"])}
    proto = onnx_models.model(steps, inputs, {"y": (FLOAT, [2, "n"]), "z": (FLOAT, [2, "m"])}, weights)
    x = np.random.default_rng(1).random((2, size)).astype(np.float32)
    found, lowered = computed(proto, precision, cache, {"x": x})
    right = x + np.arange(size) / size
    assert_near(found["y"], right, precision)
    assert_near(found["z"], right[:, : size // 3], precision)
    assert {each.node for each in lowered.computed_in(precision) or ()} == {"add"}


@BOTH
@pytest.mark.parametrize("length", [301, 5001])
def test_a_length_that_is_an_input_is_counted_up_to(precision: Precision, length: int, cache: Cache) -> None:
    steps = [
        N("Cast", ["n"], ["length"], name="as_float", to=FLOAT),
        N("Range", ["zero", "length", "one"], ["places"], name="range"),
        N("Mul", ["x", "places"], ["y"], name="mul"),
    ]
    weights = {"zero": np.array(0, np.float32), "one": np.array(1, np.float32)}
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 1]), "n": (INT64, [])}, {"y": (FLOAT, [2, "n"])}, weights)
    found, _ = computed(proto, precision, cache, {"x": X[:, :1], "n": np.array(length)})
    assert_near(found["y"], X[:, :1] * np.arange(length, dtype=np.float64), precision)


@BOTH
def test_scales_are_not_rounded(precision: Precision, cache: Cache) -> None:
    """A resize to the size of another tensor, by their ratio: 607 / 301, which no 16-bit type holds well enough."""
    steps = [
        N("Shape", ["x"], ["xs"]),
        N("Shape", ["like"], ["ls"]),
        N("Cast", ["xs"], ["xf"], name="xf", to=FLOAT),
        N("Cast", ["ls"], ["lf"], name="lf", to=FLOAT),
        N("Div", ["lf", "xf"], ["scales"], name="ratio"),
        N("Resize", ["x", "", "scales"], ["r"], name="resize", mode="nearest"),
        N("Mul", ["r", "half"], ["y"], name="mul"),
    ]
    inputs: dict[str, tuple[int, list[int | str]]] = {n: (FLOAT, [1, 1, 1, n]) for n in ("x", "like")}
    weights = {"half": np.asarray(np.float32(0.5))}
    proto = onnx_models.model(steps, inputs, {"y": (FLOAT, [1, 1, 1, "k"])}, weights)
    case = {"x": np.ones((1, 1, 1, 301), np.float32), "like": np.ones((1, 1, 1, 607), np.float32)}
    assert computed(proto, precision, cache, case)[0]["y"].shape == (1, 1, 1, 607)


# --- batch normalization ---------------------------------------------------------------------------------------------

BN = {
    "s": np.array([1e4, 1, 2, 3], np.float32),
    "b": np.arange(4, dtype=np.float32),
    "m": np.array([0, 0.1, 0.2, 0.3], np.float32),
    "v": np.array([1e8, 1, 0.5, 2], np.float32),
}
"""With a variance that FP16 can't hold."""


def normalized(a: NDArray[Any], axis: int = 1) -> NDArray[np.float64]:
    s, b, m, v = (BN[name].astype(np.float64).reshape(-1, *[1] * (a.ndim - axis - 1)) for name in "sbmv")
    result: NDArray[np.float64] = s * (a.astype(np.float64) - m) / np.sqrt(v + 1e-5) + b
    return result


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 3), (2, 4, 3, 2, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_batch_norm_of_any_rank(shape: tuple[int, ...], cache: Cache, *, known: bool) -> None:
    """Where the number of dimensions is not known: behind a Reshape to a computed shape."""
    steps = [
        N("Relu" if known else "Reshape", ["x"] if known else ["x", "shape"], ["a"], name="before"),
        N("BatchNormalization", ["a", "s", "b", "m", "v"], ["n"], name="bn"),
        N("Reshape", ["n", "flat"], ["y"], name="behind"),
    ]
    size = int(np.prod(shape))
    inputs = {"x": (FLOAT, list(shape) if known else [size])} | ({} if known else {"shape": (INT64, ["rank"])})
    proto = onnx_models.model(steps, inputs, {"y": (FLOAT, [size])}, {**BN, "flat": np.array([-1])})
    x = np.random.default_rng(5).random(shape).astype(np.float32)
    case = {"x": x} if known else {"x": x.reshape(-1), "shape": np.array(shape)}
    assert_near(computed(proto, "fp16", cache, case)[0]["y"], normalized(x).reshape(-1), "fp16")


@pytest.mark.parametrize("what", ["plain", "grouped", "transposed", "an output", "used twice", "shared weight", "2-D"])
def test_batch_norm_behind_a_convolution(what: str, cache: Cache) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 4, 5)).astype(np.float32)
    w = onnx_models.weights((4, 2, 1) if what == "grouped" else (4, 4, 1), 7)
    operator = "ConvTranspose" if what == "transposed" else "Conv"
    grouped: dict[str, Any] = {"group": 2} if what == "grouped" else {}
    steps = [
        N(operator, ["x", "w"], ["c"], name="conv", **grouped),
        N("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], name="bn"),
    ]
    if what == "grouped":
        c = np.concatenate(
            [np.einsum("oi,nix->nox", w[g * 2 : g * 2 + 2, :, 0], x[:, g * 2 : g * 2 + 2]) for g in (0, 1)], 1
        )
    else:
        c = np.einsum("io,nix->nox" if what == "transposed" else "oi,nix->nox", w[:, :, 0].astype(np.float64), x)
    outputs, right = {"y": (FLOAT, [2, 4, 5])}, {"y": normalized(c)}
    if what == "used twice":
        steps.append(N("Add", ["n", "c"], ["y"], name="add"))
        right["y"] = right["y"] + c
    elif what == "shared weight":
        steps += [N("Conv", ["x", "w"], ["other"], name="conv2"), N("Add", ["n", "other"], ["y"], name="add")]
        right["y"] = right["y"] + c
    else:
        steps.append(N("Identity", ["n"], ["y"], name="last"))
    if what == "an output":
        outputs["c"], right["c"] = (FLOAT, [2, 4, 5]), c
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 4, 5])}, outputs, {"w": w, **BN})
    found, _ = computed(proto, "fp16", cache, {"x": x})
    for name, expected in right.items():
        assert_near(found[name], expected, "fp16")


PIECES = {
    # As tf2onnx writes it, as PyTorch computes it, and with the mean taken off first.
    "mul add": [("Mul", "f"), ("Add", "h")],
    "div mul add": [("Div", "r"), ("Mul", "s1"), ("Add", "h")],
    "sub mul add": [("Sub", "m1"), ("Mul", "f"), ("Add", "b1")],
    "sub turned": [("Mul", "f"), ("Sub", "-h")],
}


def in_pieces(steps: list[tuple[str, str]], last: str = "n") -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
    """Batch normalization of `c`, which has three dimensions, and its constants."""
    s, b, m, v = (BN[name].astype(np.float64).reshape(-1, 1) for name in "sbmv")
    root = np.sqrt(v + 1e-5)
    constants = {"f": s / root, "h": b - m * s / root, "-h": m * s / root - b, "r": root, "s1": s, "m1": m, "b1": b}
    nodes, value = [], "c"
    for place, (operator, name) in enumerate(steps):
        result = last if place == len(steps) - 1 else f"p{place}"
        nodes.append(N(operator, [value, name], [result], name=f"{operator.lower()}{place}"))
        value = result
    return nodes, {name: constants[name].astype(np.float32) for _, name in steps}


@pytest.mark.parametrize("steps", PIECES)
def test_batch_norm_in_pieces_is_folded_as_the_operator_is(steps: str, cache: Cache) -> None:
    x = np.random.default_rng(6).standard_normal((2, 4, 5)).astype(np.float32)
    w = onnx_models.weights((4, 4, 1), 7)
    nodes, constants = in_pieces(PIECES[steps])
    # What stands behind is no part of it.
    nodes = [N("Conv", ["x", "w"], ["c"], name="conv"), *nodes, N("Add", ["n", "three"], ["y"], name="behind")]
    constants |= {"w": w, "three": np.array(3, np.float32)}
    proto = onnx_models.model(nodes, {"x": (FLOAT, [2, 4, 5])}, {"y": (FLOAT, [2, 4, 5])}, constants)
    folded = onnx.load(prepared(open_model(proto, (), cache), (), cache))
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Add"]
    found, _ = computed(proto, "fp16", cache, {"x": x})
    right = normalized(np.einsum("oi,nix->nox", w[:, :, 0].astype(np.float64), x)) + 3
    assert_near(found["y"], right, "fp16")


def test_a_result_that_batch_norm_in_pieces_scales_down_does_not_overflow(cache: Cache) -> None:
    x = np.random.default_rng(6).standard_normal((2, 4, 5)).astype(np.float32)
    w = onnx_models.weights((4, 4, 1), 7) * np.float32(1e5)
    small = {"f": np.full((4, 1), 1e-5, np.float32), "h": np.arange(4, dtype=np.float32).reshape(4, 1)}
    nodes, _ = in_pieces(PIECES["mul add"])
    nodes = [N("Conv", ["x", "w"], ["c"], name="conv"), *nodes, N("Identity", ["n"], ["y"], name="last")]
    proto = onnx_models.model(nodes, {"x": (FLOAT, [2, 4, 5])}, {"y": (FLOAT, [2, 4, 5])}, {"w": w, **small})
    found, _ = computed(proto, "fp16", cache, {"x": x})
    right = np.einsum("oi,nix->nox", w[:, :, 0].astype(np.float64), x) * small["f"] + small["h"]
    assert np.abs(right / 1e-5).max() > 65504
    assert_near(found["y"], right, "fp16")


@pytest.mark.parametrize(
    "what", ["kept", "scalar", "shift alone", "by place", "computed", "used twice", "zero divisor"]
)
def test_what_is_no_batch_norm_in_pieces_stays(what: str, cache: Cache) -> None:
    nodes, constants = in_pieces(PIECES["mul add"])
    constants["w"] = onnx_models.weights((4, 4, 1), 7)
    last = [N("Mul", ["n", "x"], ["y"], name="last")]
    if what == "scalar":
        constants["f"] = np.array(0.125, np.float32)
    elif what == "shift alone":
        nodes = [N("Add", ["c", "h"], ["n"], name="add")]
    elif what == "by place":
        constants["f"] = np.full((1, 4, 5), 2, np.float32)
    elif what == "computed":
        nodes[0].input[1] = "x"
    elif what == "zero divisor":
        nodes[0] = N("Div", ["c", "f"], ["p0"], name="mul0")
        constants["f"] = np.zeros((4, 1), np.float32)
    elif what == "used twice":
        last = [N("Add", ["n", "c"], ["y"], name="last")]
    nodes = [N("Conv", ["x", "w"], ["c"], name="conv"), *nodes, *last]
    proto = onnx_models.model(nodes, {"x": (FLOAT, [2, 4, 5])}, {"y": (FLOAT, [2, 4, 5])}, constants)
    model = open_model(proto, (), cache)
    assert prepared(model, ("mul0",) if what == "kept" else (), cache) == model.path


def test_a_scale_for_each_place_is_not_folded(cache: Cache) -> None:
    """Opset 8's "spatial" 0."""
    places = {name: np.repeat(array[:, None], 3, 1) for name, array in BN.items()}
    steps = [N("BatchNormalization", ["x", "s", "b", "m", "v"], ["n"], name="bn", spatial=0), N("Relu", ["n"], ["y"])]
    proto = onnx_models.model(steps, {"x": (FLOAT, [2, 4, 3])}, {"y": (FLOAT, [2, 4, 3])}, places, opset=8)
    model = open_model(proto, (), cache)
    folded = onnx.load(prepared(model, (), cache))
    assert [node.op_type for node in folded.graph.node] == ["BatchNormalization", "Relu"]
    assert {tuple(weight.dims) for weight in folded.graph.initializer} == {(4, 3)}


# --- FP64 ------------------------------------------------------------------------------------------------------------


def in_double(scale: float) -> onnx.ModelProto:
    steps = [
        N("MatMul", ["x", "w"], ["a"], name="mm"),
        N("Cast", ["a"], ["f"], name="to_float", to=FLOAT),
        N("Cast", ["f"], ["d"], name="to_double", to=DOUBLE),
        N("Mul", ["d", "s"], ["m"], name="mul"),
        N("Shape", ["m"], ["shape"]),
        N("ConstantOfShape", ["shape"], ["ones"], name="ones", value=tensor(DOUBLE, 1.0)),
        N("Add", ["m", "ones"], ["y"], name="add"),
    ]
    weights = {"w": W.astype(np.float64), "s": np.asarray(scale)}
    return onnx_models.model(steps, {"x": (DOUBLE, [2, 8])}, {"y": (DOUBLE, [2, 8])}, weights)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_fp64_is_lowered_as_tensorrt_takes_it(precision: Precision, cache: Cache) -> None:
    x = X.astype(np.float64)
    options = {"calibration": {"x": x[None]}} if precision == "int8" else {}
    found, lowered = computed(in_double(0.5), precision, cache, {"x": x}, **options)
    assert found["y"].dtype == np.float64
    right = x @ W * 0.5 + 1
    assert_near(found["y"], right, precision)
    assert np.abs(found["y"] - right).max() > 0
    kinds = {t.data_type for t in onnx.load(lowered.path).graph.initializer}
    assert DOUBLE not in kinds
    assert "FP64 was taken as FP32, as TensorRT does" in lowered.notes


def test_the_reference_of_fp64_is_fp64(cache: Cache) -> None:
    model = open_model(in_double(0.5), (), cache)
    x = X.astype(np.float64)
    reference = Reference(model, cache)({"x": x})["y"]
    np.testing.assert_array_equal(reference, (x @ W.astype(np.float64)).astype(np.float32).astype(np.float64) * 0.5 + 1)


def test_an_overflow_of_fp64_in_fp16_is_seen(cache: Cache) -> None:
    x = X.astype(np.float64) * 3e4
    assert np.isinf(computed(in_double(1e-3), "fp16", cache, {"x": x})[0]["y"]).any()
    assert_near(computed(in_double(1e-3), "bf16", cache, {"x": x})[0]["y"], x @ W * 1e-3 + 1, "bf16")


def test_fp64_beyond_fp32_is_clamped_as_tensorrt_clamps_it(cache: Cache) -> None:
    steps = [N("Mul", ["x", "huge"], ["a"], name="mul"), N("Mul", ["a", "zero"], ["y"], name="nothing")]
    weights = {"huge": np.asarray(1e300), "zero": np.asarray(0.0)}
    proto = onnx_models.model(steps, {"x": (DOUBLE, [2, 8])}, {"y": (DOUBLE, [2, 8])}, weights)
    x = np.full((2, 8), 0.5)
    np.testing.assert_array_equal(computed(proto, "fp32", cache, {"x": x})[0]["y"], np.zeros((2, 8)))


def test_fp32_of_fp64_is_compared_and_of_fp32_is_not(cache: Cache) -> None:
    double = open_model(in_double(0.5), (), cache)
    single = open_model(onnx_models.gemm_net(), (), cache)
    assert not computes_the_reference(lower(double, "fp32", cache), "fp32")
    assert computes_the_reference(lower(single, "fp32", cache), "fp32")


# --- types that numpy lacks ------------------------------------------------------------------------------------------


def test_bfloat16_goes_in_and_comes_out(cache: Cache) -> None:
    kind = TensorProto.BFLOAT16
    steps = [N("MatMul", ["x", "w"], ["a"], name="mm"), N("Add", ["a", "x"], ["y"], name="add")]
    weights = {"w": W.astype(ml_dtypes.bfloat16)}
    proto = onnx_models.model(steps, {"x": (kind, [2, 8])}, {"y": (kind, [2, 8])}, weights, opset=22)
    x = X.astype(ml_dtypes.bfloat16)
    found, _ = computed(proto, "bf16", cache, {"x": x})
    assert found["y"].dtype == ml_dtypes.bfloat16
    wide = x.astype(np.float64)
    right = wide @ W.astype(ml_dtypes.bfloat16).astype(np.float64) + wide
    assert_near(found["y"].astype(np.float64), right, "bf16")
    reference = Reference(open_model(proto, (), cache), cache)({"x": x})["y"]
    np.testing.assert_array_equal(reference, right.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_bfloat16_inputs_are_generated_checked_and_read_from_files(tmp_path: Path, cache: Cache) -> None:
    kind = TensorProto.BFLOAT16
    steps = [N("MatMul", ["x", "w"], ["y"], name="mm")]
    weights = {"w": W.astype(ml_dtypes.bfloat16)}
    proto = onnx_models.model(steps, {"x": (kind, [2, 8])}, {"y": (kind, [2, 8])}, weights, opset=22)
    model = open_model(proto, (), cache)
    (case,) = inputs.generate(model, inputs.shape_ranges(model, None, {}), 0)
    assert Reference(model, cache)(case)["y"].dtype == ml_dtypes.bfloat16
    np.save(tmp_path / "x.npy", case["x"])
    (read,) = inputs.cases_from({"x": np.load(tmp_path / "x.npy")}, model, "returned")
    assert read["x"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read["x"], case["x"])
    with pytest.raises(InputError, match=r"expected bfloat16, got float32(.|\n)*array.astype\(ml_dtypes.bfloat16\)"):
        inputs.cases_from({"x": np.zeros((2, 8), np.float32)}, model, "returned")


def test_weights_are_converted_to_the_nearest(tmp_path: Path) -> None:
    values = np.array([65504, 65519, 65520, 1e9, -1e9, np.inf, 6e-8, 2e-8, 0], np.float32)
    proto = onnx_models.elementwise([N("Mul", ["x", "w"], ["y"], name="mul")], 9, {"w": values})
    lowered = half.to_half(graph.read(onnx_models.save(proto, tmp_path / "m.onnx")), "fp16")
    graph.write(lowered.model, tmp_path / "h.onnx")
    (weight,) = onnx.load(tmp_path / "h.onnx").graph.initializer
    right = np.array([65504, 65504, 65504, 65504, -65504, np.inf, 2**-24, 0, 0], np.float16)
    np.testing.assert_array_equal(numpy_helper.to_array(weight), right)


# --- what the rewriting leans on -------------------------------------------------------------------------------------


def test_values_and_nodes_of_one_name_are_told_apart_when_written(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [N("Relu", ["x"], ["a"], name="a"), N("Neg", ["a"], ["b"], name="b"), N("Abs", ["b"], ["y"], name="c")],
        {"x": (FLOAT, [2])},
        {"y": (FLOAT, [2])},
    )
    model = graph.read(onnx_models.save(proto, tmp_path / "m.onnx"))
    relu, neg, _ = model.graph
    neg.outputs[0].name, neg.name = relu.outputs[0].name, relu.name
    graph.write(model, tmp_path / "w.onnx")
    written = onnx.load(tmp_path / "w.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [(node.name, *node.input, *node.output) for node in written.graph.node] == [
        ("a", "x", "a"),
        ("a_2", "a", "a_1"),
        ("c", "a_1", "y"),
    ]


def test_a_scan_of_opset_8_is_not_converted_to_something_else(cache: Cache) -> None:
    body = helper.make_graph(
        [N("Add", ["sum_in", "next"], ["sum_out"], name="add"), N("Identity", ["sum_out"], ["out"], name="id")],
        "body",
        [helper.make_tensor_value_info(name, FLOAT, [2]) for name in ("sum_in", "next")],
        [helper.make_tensor_value_info(name, FLOAT, [2]) for name in ("sum_out", "out")],
    )
    proto = onnx_models.model(
        [
            N("Neg", ["v"], ["u"], name="before"),  # Inside a Scan nothing is computed in FP16.
            N("Neg", ["u"], ["x"], name="again"),
            N("Scan", ["", "initial", "x"], ["y", "z"], name="scan", num_scan_inputs=1, body=body),
        ],
        {"initial": (FLOAT, [1, 2]), "v": (FLOAT, [1, 3, 2])},
        {"y": (FLOAT, [1, 2]), "z": (FLOAT, [1, 3, 2])},
        opset=8,
    )
    case = {"initial": np.zeros((1, 2), np.float32), "v": X[:1, :6].reshape(1, 3, 2)}
    assert_near(computed(proto, "fp16", cache, case)[0]["z"], np.cumsum(case["v"], 1), "fp16")
    with pytest.raises(ModelError, match="a Scan of opset 8 cannot be converted"):
        computed(proto, "bf16", cache, case)


@pytest.mark.parametrize("kind", [FLOAT, DOUBLE])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_model_without_operators_of_onnx(precision: Precision, kind: int, cache: Cache) -> None:
    """It imports no opset of ONNX's, which the casts around it need."""
    node = N("Normalizer", ["x"], ["n"], name="n", domain="ai.onnx.ml", norm="L2")
    x = helper.make_tensor_value_info("x", kind, [2, 8])
    y = helper.make_tensor_value_info("n", FLOAT, [2, 8])
    imports = [helper.make_opsetid("ai.onnx.ml", 1)]
    proto = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=imports, ir_version=9)
    with pytest.raises(NothingComputedError, match="ONNX has no 16-bit Normalizer"):
        lower(open_model(proto, (), cache), precision, cache)
