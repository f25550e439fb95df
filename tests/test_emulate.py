"""The emulation against numpy's own FP16, and against the figures measured on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision import half
from pytest_trtcheck.precision.emulation import rewrite, weights
from pytest_trtcheck.precision.quantization import qdq
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import HalfName


def lowered(path: Path, kind: HalfName, keep_fp32: tuple[str, ...] = ()) -> Path:
    result = half.to_half(graph.read(path), kind, keep_fp32)
    target = path.with_name(f"{path.stem}_{kind}.onnx")
    graph.write(result.model, target)
    return target


def emulation(path: Path) -> OrtRunner:
    target = path.with_name(f"{path.stem}_emulated.onnx")
    graph.write(rewrite.emulated(graph.read(path)), target)
    return OrtRunner(target, path.name)


def l2(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    return float(np.linalg.norm(actual.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> OrtRunner:
    """((x + x) · x / x) − x in FP16: at 60000 an FP16 machine overflows, FP32 kernels do not."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"]),
        helper.make_node("Mul", ["a", "x"], ["b"]),
        helper.make_node("Div", ["b", "x"], ["c"]),
        helper.make_node("Sub", ["c", "x"], ["y"]),
    ]
    path = onnx_models.save(onnx_models.elementwise(nodes, 32), tmp_path_factory.mktemp("chain") / "chain.onnx")
    return emulation(lowered(path, "fp16"))


@settings(max_examples=200, deadline=None)
@given(x=hnp.arrays(np.float32, 32, elements=st.floats(-7e4, 7e4, width=32, allow_subnormal=True)))
def test_fp16_chain_is_numpys_fp16(chain: OrtRunner, x: NDArray[np.float32]) -> None:
    with np.errstate(all="ignore"):
        h = x.astype(np.float16)
        expected = (((h + h) * h / h) - h).astype(np.float32)
    actual = chain({"x": x})["y"]
    np.testing.assert_array_equal(actual, expected)


def test_overflow_subnormals_and_ties(tmp_path: Path) -> None:
    """What FP16 does at its edges: 65520 rounds to infinity, 65519 to 65504, 2⁻²⁵ ties to zero, 2⁻²⁴ stays."""
    nodes = [helper.make_node("Mul", ["x", "one"], ["y"])]
    proto = onnx_models.elementwise(nodes, 6, {"one": np.ones(1, np.float32)})
    runner = emulation(lowered(onnx_models.save(proto, tmp_path / "m.onnx"), "fp16"))
    x = np.array([65519.0, 65520.0, -65520.0, 2.0**-24, 2.0**-25, 2049.0], np.float32)
    y = runner({"x": x})["y"]
    np.testing.assert_array_equal(y, [65504.0, np.inf, -np.inf, 2.0**-24, 0.0, 2048.0])


def test_bf16_rounds_as_ml_dtypes(tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Add", ["e", "x"], ["y"])]
    runner = emulation(lowered(onnx_models.save(onnx_models.elementwise(nodes, 64), tmp_path / "m.onnx"), "bf16"))
    x = np.random.default_rng(0).uniform(-8, 8, 64).astype(np.float32)
    h = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    e = np.exp(h).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = (e + h).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(runner({"x": x})["y"], expected)


def test_tf32_rounds_matrix_inputs_to_ten_bits(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.gemm_net(), tmp_path / "gemm.onnx")
    target = tmp_path / "tf32.onnx"
    graph.write(rewrite.emulated_tf32(graph.read(path)), target)
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)

    def tf32(array: NDArray[np.float32]) -> NDArray[np.float64]:
        mantissa, exponent = np.frexp(array.astype(np.float64))
        return np.asarray(np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent))

    proto = onnx.load(path)
    w, b = (onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer)
    expected = tf32(x) @ tf32(w) + b
    np.testing.assert_allclose(OrtRunner(target, "tf32")({"x": x})["y"], expected, rtol=1e-6)
    assert l2(OrtRunner(path, "fp32")({"x": x})["y"], expected) > 1e-5


def test_magika_fails_in_fp16_and_the_typed_model_hides_it(tmp_path: Path) -> None:
    """The figures of a real GPU: relative L2 error 1.03 in FP16; the FP16-typed model on a CPU shows 6e-5 to 3e-4."""
    path = onnx_models.magika()
    inputs = {"bytes": np.random.default_rng(0).integers(0, 257, (1, 2048)).astype(np.int32)}
    reference = OrtRunner(path, "magika")(inputs)["target_label"]
    (tmp_path / "magika.onnx").write_bytes(path.read_bytes())
    typed = lowered(tmp_path / "magika.onnx", "fp16")
    assert l2(emulation(typed)(inputs)["target_label"], reference) == pytest.approx(1.03, abs=0.01)
    assert l2(OrtRunner(typed, "typed")(inputs)["target_label"], reference) < 1e-3


def test_nudenet_matches_the_error_measured_on_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "nudenet.onnx").write_bytes(onnx_models.nudenet().read_bytes())
    inputs = {"images": np.random.default_rng(0).random((1, 3, 320, 320), dtype=np.float32)}
    reference = OrtRunner(tmp_path / "nudenet.onnx", "nudenet")(inputs)["output0"]
    actual = emulation(lowered(tmp_path / "nudenet.onnx", "fp16"))(inputs)["output0"]
    assert 4e-4 < l2(actual, reference) < 6e-4


def test_fp16_typed_model_keeps_its_types_at_the_edges(tmp_path: Path) -> None:
    half_type = TensorProto.FLOAT16
    proto = onnx_models.model(
        [helper.make_node("Mul", ["x", "w"], ["m"]), helper.make_node("Mul", ["m", "w"], ["y"])],
        {"x": (half_type, [3])},
        {"y": (half_type, [3])},
        {"w": np.full(3, 300, np.float16)},
    )
    path = onnx_models.save(proto, tmp_path / "half.onnx")
    x = np.array([0.1, 1.0, -2.0], np.float16)
    actual = emulation(path)({"x": x})["y"]
    with np.errstate(over="ignore"):
        expected = x * np.float16(300) * np.float16(300)
    assert actual.dtype == np.float16
    np.testing.assert_array_equal(actual, expected)
    twin = tmp_path / "twin.onnx"
    graph.write(rewrite.emulated(graph.read(path), rounding=False), twin)
    assert OrtRunner(twin, "twin")({"x": np.array([0.1, 0.01, 0.02], np.float16)})["y"].dtype == np.float16


def test_inner_graphs_are_rounded_too(tmp_path: Path) -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node("Mul", ["x", "big"], [f"{name}_m"]), helper.make_node("Div", [f"{name}_m", by], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])],
        )
        for name, by in (("then", "big"), ("else", "x"))
    }
    proto = onnx_models.model(
        [helper.make_node("If", ["flag"], ["y"], then_branch=branches["then"], else_branch=branches["else"])],
        {"flag": (TensorProto.BOOL, []), "x": (TensorProto.FLOAT, [2])},
        {"y": (TensorProto.FLOAT, [2])},
        {"big": np.full(2, 1000, np.float32)},
    )
    runner = emulation(lowered(onnx_models.save(proto, tmp_path / "if.onnx"), "fp16"))
    y = runner({"flag": np.array(True), "x": np.array([1.0, 100.0], np.float32)})["y"]
    np.testing.assert_array_equal(y, [1.0, np.inf])


def test_without_qdq_is_the_float_model(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Mul", ["d", "two"], ["y"]),
    ]
    proto = onnx_models.elementwise(
        nodes,
        4,
        {"s": np.array(0.5, np.float32), "z": np.array(0, np.int8), "two": np.full(1, 2, np.float32)},
    )
    path = onnx_models.save(proto, tmp_path / "qdq.onnx")
    x = np.array([0.1, 0.3, 100.0, -200.0], np.float32)
    target = tmp_path / "float.onnx"
    graph.write(qdq.without(graph.read(path)), target)
    np.testing.assert_array_equal(OrtRunner(target, "float")({"x": x})["y"], x * 2)
    expected = np.clip(np.round(x / 0.5), -128, 127) * 0.5 * 2
    np.testing.assert_array_equal(emulation(path)({"x": x})["y"], expected)


# --- weights of a large model, folded --------------------------------------------------------------------------------


def large_layers(path: Path) -> Path:
    """Two products with weights of 256 KiB, one of them also read as it is, and a mask of one number."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((256, 256), dtype=np.float32) / 16 for _ in range(2)]
    initializers = [onnx.numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(arrays)]
    initializers.append(onnx.numpy_helper.from_array(np.array([512, 256], np.int64), "size"))
    initializers.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Gemm", ["a", "w1"], ["b"], name="second", transB=1),
        helper.make_node("Expand", ["half", "size"], ["mask"], name="mask"),
        helper.make_node("ReduceMean", ["mask"], ["least"], name="least", keepdims=0),
        helper.make_node("Add", ["b", "least"], ["c"], name="add"),
        helper.make_node("MatMul", ["c", "w0"], ["y"], name="third"),
    ]
    put = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 256]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "large", put[:1], put[1:], initializers)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_folded_weights_compute_the_same(kind: HalfName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_DATA_THRESHOLD", 0)
    source = tmp_path / "emulated.onnx"
    graph.write(rewrite.emulated(graph.read(lowered(large_layers(tmp_path / "m.onnx"), kind))), source)
    (tmp_path / "folded").mkdir()
    path = tmp_path / "folded" / "model.onnx"
    weights.fold(source, path)
    case = {"x": np.random.default_rng(1).standard_normal((3, 256), dtype=np.float32)}
    before, after = OrtRunner(source, "unfolded")(case), OrtRunner(path, "folded")(case)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    held = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    outside = [tensor for tensor in held.values() if tensor.data_location == TensorProto.EXTERNAL]
    assert {tensor.data_type for tensor in outside if len(tensor.dims) > 1} == {TensorProto.FLOAT}
    # What one number is expanded to is no weight: a few bytes could ask for any size of file.
    assert (512, 256) not in {tuple(tensor.dims) for tensor in held.values()}
