"""16-bit inputs and outputs, a choice apart from the precision: `BuildOptions(io="fp16")`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.backends.tensorrt.io import TensorSpec, check_inputs
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ArgumentError, InputError
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import lower
from tests import onnx_models
from tests.diagnosed import conv_chain, image

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.choices import HalfName, Precision
    from tests.conftest import Suite

HALVES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
FLOAT, INT64 = onnx_models.FLOAT, TensorProto.INT64


def shifted() -> onnx.ModelProto:
    """y = x + 1, of which the sum s is an output too, and a copy of an integer input."""
    nodes = [
        helper.make_node("Add", ["x", "one"], ["s"], "add"),
        helper.make_node("Mul", ["s", "s"], ["y"], "square"),
        helper.make_node("Identity", ["n"], ["m"], "copy"),
    ]
    return onnx_models.model(
        nodes,
        {"x": (FLOAT, [4]), "n": (INT64, [2])},
        {"s": (FLOAT, [4]), "y": (FLOAT, [4]), "m": (INT64, [2])},
        {"one": np.array(1, np.float32)},
    )


def types(proto: onnx.ModelProto) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "tf32", "int8", "int8+fp16"])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_float_inputs_and_outputs_become_16_bit(tmp_path: Path, precision: Precision, kind: HalfName) -> None:
    cache = Cache(tmp_path)
    model = open_model(conv_chain(2), [], cache)
    found = lower(model, precision, cache, calibration=[image(n) for n in range(2)], io=kind)
    proto = onnx.load(found.path)
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[kind]
    assert types(proto) == {"image": half, "logits": half}
    assert f"inputs and outputs are {kind}: image, logits" in found.notes
    case = image(5)
    actual = emulation(model, found, precision, cache)(case)["logits"]
    assert actual.dtype == np.float32
    # What comes out is a number of the type, and what went in was rounded to it first.
    assert np.array_equal(actual, actual.astype(HALVES[kind]).astype(np.float32))
    rounded = {"image": case["image"].astype(HALVES[kind]).astype(np.float32)}
    plain = lower(model, precision, cache, calibration=[image(n) for n in range(2)])
    expected = emulation(model, plain, precision, cache)(rounded)["logits"].astype(HALVES[kind]).astype(np.float32)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_integers_and_values_that_are_read_on_stay_what_they_are(tmp_path: Path, precision: Precision) -> None:
    cache = Cache(tmp_path)
    model = open_model(shifted(), [], cache)
    found = lower(model, precision, cache, io="fp16")
    proto = onnx.load(found.path)
    onnx.checker.check_model(proto, full_check=True)
    half = TensorProto.FLOAT16
    assert types(proto) == {"x": half, "n": INT64, "s": half, "y": half, "m": INT64}
    x = np.array([1, 1e-3, 1 / 3, 1e5], np.float32)
    actual = emulation(model, found, precision, cache)({"x": x, "n": np.arange(2)})
    with np.errstate(over="ignore"):
        s = x.astype(np.float16).astype(np.float32) + np.float32(1)
        inside = s if precision == "fp32" else s.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(actual["s"], s.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(actual["y"], (inside * inside).astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(actual["m"], np.arange(2))


def test_what_has_no_16_bit_io_is_an_error(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    model = open_model(shifted(), [], cache)
    with pytest.raises(ArgumentError, match="BuildOptions: io='fp8': expected one of fp16, bf16"):
        lower(model, "fp16", cache, io="fp8")  # type: ignore[arg-type]


def test_an_engine_s_input_rounds_fp32_where_it_was_asked_to() -> None:
    given = {"x": np.array([1 / 3, 1e5], np.float32)}
    spec = TensorSpec("x", np.dtype(np.float16), (2,), outer=np.dtype(np.float32))
    array = check_inputs([spec], given)["x"]
    assert array.dtype == np.float16
    assert list(array) == [np.float16(1 / 3), np.inf]
    with pytest.raises(InputError, match="has dtype float32, the engine takes float16"):
        check_inputs([TensorSpec("x", np.dtype(np.float16), (2,))], given)


PROJECT = """
from pytest_trtcheck import BuildOptions

@pytest.fixture
def trt_build_options():
    return BuildOptions(io="fp16")

@trt_parity("conv.onnx", precision="int8", calibration=[{"image": np.ones((1, 3, 16, 16), np.float32)}])
def test_io():
    return {"image": np.ones((2, 3, 16, 16), np.float32)}

@trt_parity("gemm.onnx", precision="fp32")
def test_overflow():
    return {"x": np.full((2, 4), 1e5, np.float32)}
"""


def test_an_input_beyond_fp16_is_noted_and_fails(suite: Suite) -> None:
    """The planted fault: pixels of 0 to 255 squared, fed in FP16."""
    suite.write(test_io=PROJECT)
    run = suite.run("--trt-gpu=A10")
    fine, ruined = run.check("test_io"), run.check("test_overflow")
    assert (fine["verdict"], ruined["verdict"]) == ("pass", "fail")
    assert "input 'x' [0] reaches 1e+05: in fp16 it is infinite" in ruined["notes"]
    assert fine["engine"] is None or fine["compiled_for"] == "A10"


def test_what_to_keep_is_searched_in_a_quantized_model_too(suite: Suite) -> None:
    suite.write(test_io=PROJECT.replace('precision="int8",', 'precision="int8", tol=6.5e-3,'))
    message = suite.run("--trt-diagnose=60", "-ktest_io").check("test_io")["message"]
    assert "keep_fp32=[" in message
    assert "the search for nodes to keep in FP32 ended" not in " ".join(message.split())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8+fp16"])
def test_tensorrt_rtx_builds_it_so(tmp_path: Path, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)
    from pytest_trtcheck.backends.tensorrt import build as tensorrt
    from pytest_trtcheck.backends.tensorrt.module import Target, find_module

    module = find_module("tensorrt_rtx")
    if module.release < (1, 7) and "int8" in precision:
        pytest.skip("INT8 convolutions come with TensorRT-RTX 1.7")
    cache = Cache(tmp_path)
    model = open_model(onnx_models.conv_net(batch=1), [], cache)
    found = lower(model, precision, cache, calibration=[image(n) for n in range(2)], io="fp16")
    plan = tensorrt.build(
        module, found.path, tmp_path / "engine.plan", target=Target((8, 6), here=False), precision=precision
    )
    found_types = {each["name"]: each["dtype"] for each in (*plan.io["inputs"], *plan.io["outputs"])}
    assert found_types == {"image": "HALF", "logits": "HALF"}
