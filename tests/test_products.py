"""How products accumulate, against numpy doing the same to the bit; attention in one kernel; TF32 by kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.errors import ModelError
from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision import half
from pytest_trtcheck.precision.emulation import products, rewrite
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import HalfName

Array: TypeAlias = "NDArray[Any]"
FLOAT = TensorProto.FLOAT


def model(
    nodes: Sequence[onnx.NodeProto],
    shapes: Mapping[str, Sequence[int | str | None]],
    weights: Mapping[str, Array],
    opset: int = 17,
) -> onnx.ModelProto:
    graph_proto = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, FLOAT, list(shape)) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(proto)


def emulated(proto: onnx.ModelProto, folder: Path, kind: HalfName = "fp16") -> OrtRunner:
    path = onnx_models.save(proto, folder / "model.onnx")
    graph.write(half.to_half(graph.read(path), kind).model, folder / "lowered.onnx")
    graph.write(rewrite.emulated(graph.read(folder / "lowered.onnx")), folder / "emulated.onnx")
    return OrtRunner(folder / "emulated.onnx", "emulated")


def tf32(proto: onnx.ModelProto, folder: Path) -> OrtRunner:
    path = onnx_models.save(proto, folder / "model.onnx")
    graph.write(rewrite.emulated_tf32(graph.read(path)), folder / "tf32.onnx")
    return OrtRunner(folder / "tf32.onnx", "tf32")


def to_half(array: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(np.float16).astype(np.float64)


def accumulated(left: Array, right: Array) -> Array:
    """The product with a running sum in FP16, 16 products between two roundings: a tensor core's own."""
    total = np.zeros((left.shape[0], right.shape[1]))
    for start in range(0, left.shape[1], 16):
        with np.errstate(invalid="ignore"):
            total = to_half(total + left[:, start : start + 16] @ right[start : start + 16])
    return total


@pytest.mark.parametrize(("length", "mean"), [(128, 0), (128, 20), (1024, 0), (1024, 20), (512, 3)])
def test_a_half_precision_sum_errs_as_a_tensor_cores(length: int, mean: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(length)
    x = rng.standard_normal((32, length)) + mean
    w = rng.standard_normal((length, 32)) / length**0.5
    w -= w.mean(0)
    linear = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Neg", ["h"], ["y"])]
    runner = emulated(model(linear, {"x": x.shape}, {"w": w, "b": np.zeros(32)}), tmp_path)
    actual = -runner({"x": x.astype(np.float32)})["y"].astype(np.float64)
    exact = to_half(x) @ to_half(w)
    ours, tensor_cores = (
        np.sqrt(np.mean((each - exact) ** 2)) for each in (actual, accumulated(to_half(x), to_half(w)))
    )
    assert 0.4 < ours / tensor_cores < 2.5
    assert ours > 1.2 * np.sqrt(np.mean((to_half(exact) - exact) ** 2))


def test_a_sum_that_overflows_on_the_way_is_infinite(tmp_path: Path) -> None:
    """The second half takes back what the first adds: in FP32 nothing happens, an FP16 sum is lost in the middle."""
    x, w = np.ones((1, 256)), np.full((256, 2), 1000.0)
    w[128:] *= -1
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "h"], ["y"])],
        {"x": (1, 256)},
        {"w": w},
    )
    assert not np.isfinite(accumulated(x, w)).any()
    assert not np.isfinite(emulated(proto, tmp_path)({"x": x.astype(np.float32)})["y"]).any()
    np.testing.assert_array_equal(emulated(proto, tmp_path, "bf16")({"x": x.astype(np.float32)})["y"], 0)


def convolution(channels: int, *, group: int = 1, made: int = 8, size: int = 3) -> tuple[onnx.ModelProto, Array, Array]:
    rng = np.random.default_rng(channels)
    w = rng.standard_normal((made, channels // group, size, size))
    x = (rng.standard_normal((1, channels, 9, 9)) + 2).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=group)
    return model([node], {"x": x.shape}, {"w": w}), x, w


@pytest.mark.parametrize("channels", [16, 64, 128])
def test_a_convolution_errs_as_a_tensor_cores(channels: int, tmp_path: Path) -> None:
    """Channels in blocks of 32, the taps inside a block: the order in which an H100's results come out to the bit."""
    proto, x, w = convolution(channels)
    columns, rows = [], []
    x_half, w_half = to_half(x), to_half(w)
    for start in range(0, channels, 32):
        for i in range(3):
            for j in range(3):
                columns.append(x_half[0, start : start + 32, i : i + 7, j : j + 7].reshape(-1, 49))
                rows.append(w_half[:, start : start + 32, i, j])
    left, right = np.concatenate(rows, 1), np.concatenate(columns)
    exact = left @ right
    actual = emulated(proto, tmp_path)({"x": x})["y"].reshape(8, 49).astype(np.float64)
    ours, tensor_cores = (np.sqrt(np.mean((each - exact) ** 2)) for each in (actual, accumulated(left, right)))
    assert 0.4 < ours / tensor_cores < 2.5


def test_a_grouped_convolution_accumulates_in_fp32(tmp_path: Path) -> None:
    proto, x, w = convolution(64, group=64, made=64)
    x_half, w_half = to_half(x), to_half(w)
    exact = sum(x_half[0, :, i : i + 7, j : j + 7] * w_half[:, 0, i, j, None, None] for i in range(3) for j in range(3))
    np.testing.assert_allclose(emulated(proto, tmp_path)({"x": x})["y"][0], to_half(np.asarray(exact)), rtol=1e-3)


def test_a_product_that_goes_to_fp32_is_not_rounded(tmp_path: Path) -> None:
    """The model's last product is cast to FP32 by the kernel itself: beyond 65504 it is a number still."""
    x = np.full((1, 8), 300, np.float32)
    w = np.full((8, 1), 300.1)
    last = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (1, 8)}, {"w": w})
    exact = 8 * 300.0 * float(np.float16(300.1))
    np.testing.assert_allclose(emulated(last, tmp_path)({"x": x})["y"], exact, rtol=1e-6)
    inner = model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "h"], ["y"])],
        {"x": (1, 8)},
        {"w": w},
    )
    assert np.isinf(emulated(inner, tmp_path)({"x": x})["y"]).all()


def test_a_bias_is_added_to_a_rounded_product(tmp_path: Path) -> None:
    x, w = np.array([[1.0, 1.0]], np.float32), np.array([[2048.0], [1.0]])
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    y = emulated(model([node], {"x": (1, 2)}, {"w": w, "b": np.array([0.5])}), tmp_path)({"x": x})["y"]
    assert y.item() == 2048.5  # 2049 is rounded to 2048, and the sum with the bias to nothing more.


def attention(size: int, heads: int, *, masked: bool = False, batch: int | str | None = 1) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Mul", ["s", "c"], ["d"]),
        *([helper.make_node("Add", ["d", "m"], ["e"])] if masked else []),
        helper.make_node("Softmax", ["e" if masked else "d"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    weights = {"c": np.array(size**-0.5), **({"m": np.zeros((4, 4))} if masked else {})}
    return model(nodes, dict.fromkeys("qkv", (batch, heads, 4, size)), weights)


@pytest.mark.parametrize(("size", "heads", "masked", "finite"), [
    (32, 2, False, True), (32, 2, True, False), (80, 2, False, False), (32, 1, False, False),
])  # fmt: skip
def test_scores_saturate_in_one_kernel_alone(size: int, heads: int, masked: bool, finite: bool, tmp_path: Path) -> None:
    """Scores beyond 65504: in one kernel all are the same, and the values' mean comes out; else NaN, as on a GPU."""
    for batch in (1, "batch", None):
        rng = np.random.default_rng(0)
        inputs = {name: (rng.standard_normal((1, heads, 4, size)) + 300).astype(np.float32) for name in "qkv"}
        y = emulated(attention(size, heads, masked=masked, batch=batch), tmp_path)(inputs)["y"]
        assert np.isfinite(y).all() == finite
        if finite:
            mean = np.broadcast_to(to_half(inputs["v"]).mean(-2, keepdims=True), y.shape)
            np.testing.assert_allclose(y, mean, rtol=1e-3)


@pytest.mark.parametrize(("axis", "opset", "finite"), [
    (-1, 17, True), (3, 17, True), (None, 17, True), (1, 17, False), (3, 12, True), (None, 12, False),
])  # fmt: skip
def test_a_softmax_over_another_axis_is_no_attention(
    axis: int | None, opset: int, finite: bool, tmp_path: Path
) -> None:
    proto = attention(32, 2)
    (softmax,) = (each for each in proto.graph.node if each.op_type == "Softmax")
    del softmax.attribute[:]
    if axis is not None:
        softmax.attribute.append(helper.make_attribute("axis", axis))
    proto.opset_import[0].version = opset
    inputs = dict.fromkeys("qkv", np.full((1, 2, 4, 32), 300, np.float32))
    assert np.isfinite(emulated(proto, tmp_path)(inputs)["y"]).all() == finite


@pytest.mark.parametrize(("folded", "finite"), [(False, False), (True, True)])
def test_an_open_batch_is_no_head_but_where_heads_are_folded_into_it(
    folded: bool, finite: bool, tmp_path: Path
) -> None:
    nodes = [
        *(helper.make_node("Reshape", [name, "to"], [f"{name}3"]) for name in "qkv" if folded),
        helper.make_node("Transpose", ["k3" if folded else "k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q3" if folded else "q", "kt"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v3" if folded else "v"], ["y"]),
    ]
    proto = model(nodes, dict.fromkeys("qkv", ("batch", 8 if folded else 4, 32)), {})
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 4, 32]), "to"))
    x = np.full((1, 8 if folded else 4, 32), 300, np.float32)
    assert np.isfinite(emulated(proto, tmp_path)(dict.fromkeys("qkv", x))["y"]).all() == finite


def test_bf16_scores_stay_fp32_in_one_kernel(tmp_path: Path) -> None:
    """Scores of 256 and 256.9 are one BF16 number, and two of FP32."""
    q = np.zeros((1, 2, 4, 32), np.float32)
    k, v = q.copy(), q.copy()
    q[..., 0], q[..., 1] = 16, 1
    k[..., 0], k[..., 0, 1], v[..., 0, :] = 16, 0.8984375, 1
    k *= 32**0.5
    y = emulated(attention(32, 2), tmp_path, "bf16")({"q": q, "k": k, "v": v})["y"]
    scores = (q.astype(np.float64) @ k.astype(ml_dtypes.bfloat16).astype(np.float64).swapaxes(-1, -2)) * float(
        ml_dtypes.bfloat16(32**-0.5)
    )
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(y, (powers / powers.sum(-1, keepdims=True)) @ v, rtol=1e-2)
    assert abs(y[0, 0, 0, 0] - 0.25) > 0.1


def truncated(array: Array) -> Array:
    return (np.asarray(array, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def rounded(array: Array) -> Array:
    mantissa, exponent = np.frexp(np.asarray(array, np.float32).astype(np.float64))
    return np.asarray(np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent))


def as_it_is(array: Array) -> Array:
    return np.asarray(array, np.float32).astype(np.float64)


@pytest.mark.parametrize(
    ("shape", "to_tf32"),
    [
        ((4, 1, 8, 3), truncated),
        ((16, 1, 16, 3), truncated),
        ((16, 1, 8, 1), rounded),
        ((16, 1, 64, 3), rounded),
        ((64, 1, 8, 3), rounded),
        ((16, 16, 16, 3), as_it_is),
        ((16, 4, 16, 3), as_it_is),
        ((1, 1, 8, 3), as_it_is),
        ((1, 1, 8, 7), truncated),
        ((2, 1, 8, 3), truncated),
        ((2, 1, 8, 1), as_it_is),
        ((3, 1, 8, 1), rounded),
    ],
)
def test_a_convolution_in_tf32(shape: tuple[int, int, int, int], to_tf32: Any, tmp_path: Path) -> None:
    """Channels, groups, output channels and the kernel's size decide what becomes of the low bits."""
    channels, group, made, size = shape
    proto, x, w = convolution(channels, group=group, made=made, size=size)
    x_tf32, w_tf32, each = to_tf32(x), to_tf32(w), channels // group
    side = 10 - size
    expected = np.zeros((made, side, side))
    for output in range(made):
        first = output // (made // group) * each
        for i in range(size):
            for j in range(size):
                part = x_tf32[0, first : first + each, i : i + side, j : j + side]
                expected[output] += (part * w_tf32[output, :, i, j, None, None]).sum(0)
    actual = tf32(proto, tmp_path)({"x": x})["y"][0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("width", "to_tf32"), [(7, truncated), (64, rounded), (256, as_it_is)])
def test_a_long_kernel_in_tf32(width: int, to_tf32: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(width)
    x, w = rng.standard_normal((1, 4, 1, width + 9)), rng.standard_normal((8, 4, 1, width))
    x, w = x.astype(np.float32), w.astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    proto = onnx_models.model([node], {"x": (FLOAT, list(x.shape))}, {"y": (FLOAT, [1, 8, 1, 10])}, {"w": w})
    windows = np.lib.stride_tricks.sliding_window_view(to_tf32(x)[0, :, 0], width, axis=1)
    expected = np.einsum("ciw,ocw->oi", windows, to_tf32(w)[:, :, 0])
    actual = tf32(proto, tmp_path)({"x": x})["y"][0, :, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_tf32_lets_infinities_through(tmp_path: Path) -> None:
    """The splitting that rounds makes NaN of an infinity; a GPU does not."""
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (3, 2)}, {"w": np.array([[1.0], [0.5]])})
    x = np.array([[np.inf, 1], [1e37, 1], [np.nan, 1]], np.float32)
    np.testing.assert_array_equal(tf32(proto, tmp_path)({"x": x})["y"][[0, 2], 0], [np.inf, np.nan])


@pytest.mark.parametrize("op_type", ["Einsum", "Attention", "LSTM"])
def test_tf32_reaches_products_inside_other_operators(op_type: str, tmp_path: Path) -> None:
    """1 + 2⁻¹² is no TF32 number: what is left of it is lost in every one of them."""
    value = np.float32(1 + 2.0**-12)
    if op_type == "Einsum":
        proto = model(
            [helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")], {"x": (2, 2)}, {"w": np.eye(2)}
        )
        inputs = {"x": np.full((2, 2), value)}
    elif op_type == "Attention":
        shapes = dict.fromkeys("qkv", (1, 1, 2, 4))
        proto = model([helper.make_node("Attention", ["q", "k", "v"], ["y"])], shapes, {}, opset=23)
        inputs = {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
    else:
        weights = {"w": np.ones((1, 4, 1)), "r": np.ones((1, 4, 1))}
        proto = model([helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=1)], {"x": (20, 1, 1)}, weights)
        inputs = {"x": np.full((20, 1, 1), value / 10)}
    path = onnx_models.save(proto, tmp_path / "fp32.onnx")
    try:
        exact = OrtRunner(path, "fp32")(inputs)["y"]
    except ModelError as error:
        if "is in opset 23, and ONNX Runtime" not in str(error):
            raise
        pytest.skip("this ONNX Runtime is older than Attention")
    actual = tf32(proto, tmp_path)(inputs)["y"]
    assert 1e-5 < np.abs(actual - exact).max() / np.abs(exact).max() < 2e-3


def test_coarseness_of_many_roundings_is_their_error() -> None:
    """n roundings of a sum that grows from nothing err by about √(n/2) units: so much coarser is the one for them."""
    rng = np.random.default_rng(0)
    for roundings in (4, 16, 64):
        terms = rng.standard_normal((20000, roundings))
        total = np.zeros(20000)
        for index in range(roundings):
            total = to_half(total + terms[:, index])
        exact = terms.sum(1)
        bits = products.coarseness(roundings)
        mantissa, exponent = np.frexp(exact)
        coarse = np.ldexp(np.round(mantissa * 2 ** (11 - bits)) / 2 ** (11 - bits), exponent)
        many, one = (np.sqrt(np.mean((each - exact) ** 2)) for each in (total, coarse))
        assert 0.5 < one / many < 2


def test_quantized_products_do_not_accumulate_in_half(tmp_path: Path) -> None:
    """Behind Q/DQ the products are of integers: their sum is exact, whatever type the rest of the model has."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    half_type = TensorProto.FLOAT16
    weights = {"s": np.float16(0.25), "z": np.int8(0), "w": np.ones((256, 1), np.float16)}
    proto = onnx_models.model(
        nodes, {"x": (half_type, [1, 256])}, {"y": (half_type, [1, 1])}, {k: np.asarray(v) for k, v in weights.items()},
        opset=19,
    )  # fmt: skip
    path = onnx_models.save(proto, tmp_path / "quantized.onnx")
    graph.write(rewrite.emulated(graph.read(path)), tmp_path / "emulated.onnx")
    x = np.full((1, 256), 5.25, np.float16)
    assert OrtRunner(tmp_path / "emulated.onnx", "emulated")({"x": x})["y"].item() == 256 * 5.25


def test_int8_makes_nought_of_nan(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    proto = onnx_models.elementwise(nodes, 3, {"s": np.array(0.5, np.float32), "z": np.array(0, np.int8)})
    path = onnx_models.save(proto, tmp_path / "qdq.onnx")
    graph.write(rewrite.emulated(graph.read(path)), tmp_path / "emulated.onnx")
    y = OrtRunner(tmp_path / "emulated.onnx", "emulated")({"x": np.array([np.nan, 1, np.inf], np.float32)})["y"]
    np.testing.assert_array_equal(y, [0, 1, 63.5])


def test_a_scatter_that_adds_is_rounded(tmp_path: Path) -> None:
    """2468 + 0.75 is no FP16 number: a reduction computes, other than a scatter that only puts values in place."""
    node = helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], axis=0, reduction="add")
    proto = onnx_models.elementwise(
        [node], 1, {"i": np.zeros(1, np.int64), "u": np.array([0.75], np.float32)}, opset=18
    )
    assert emulated(proto, tmp_path)({"x": np.array([2468], np.float32)})["y"].item() == 2468
