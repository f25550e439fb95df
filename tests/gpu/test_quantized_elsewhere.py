"""A model that onnxruntime's quantizer made, against its original's recorded outputs, on a real GPU.

Matrix products alone: TensorRT-RTX 1.5, the last that runs on Hopper, builds no INT8 convolutions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from pytest_trtcheck.__main__ import main
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Suite

pytestmark = pytest.mark.gpu


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.samples = iter([rng.random((8, 64), dtype=np.float32) for _ in range(4)])

    def get_next(self) -> dict[str, Any] | None:
        sample = next(self.samples, None)
        return None if sample is None else {"x": sample}


def prepare(folder: Path) -> None:
    """An MLP, quantized as TensorRT takes it, and what the original computes."""
    proto = onnx_models.model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"], "one"),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("MatMul", ["b", "w2"], ["y"], "two"),
        ],
        {"x": (TensorProto.FLOAT, ["batch", 64])},
        {"y": (TensorProto.FLOAT, ["batch", 32])},
        {"w1": onnx_models.weights((64, 128), 1, 0.1), "w2": onnx_models.weights((128, 32), 2, 0.1)},
    )
    onnx.save(proto, folder / "original.onnx")
    quantize_static(
        folder / "original.onnx",
        folder / "quantized.onnx",
        Reader(),
        activation_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False},
    )
    arguments = ["--batch=8", f"--for={folder / 'quantized.onnx'}", "-o", str(folder / "golden.npz")]
    assert main(["record", str(folder / "original.onnx"), *arguments]) == 0
    wrong = onnx.load(folder / "quantized.onnx")
    (scale,) = [each for each in wrong.graph.initializer if each.name == "w1_scale"]
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.1) * numpy_helper.to_array(scale), "w1_scale"))
    onnx.save(wrong, folder / "wrong.onnx")


def test_against_the_original_and_its_recorded_outputs(suite: Suite) -> None:
    prepare(suite.path)
    suite.write(
        test_quantized="""
@trt_parity("quantized.onnx", precision="int8", reference="golden.npz")
def test_recorded(): ...

@trt_parity("quantized.onnx", precision="int8", reference="original.onnx", batch=8)
def test_original(): ...

@trt_parity("wrong.onnx", precision="int8", reference="original.onnx", batch=8)
def test_wrong_scale(): ...

@trt_parity("original.onnx", precision="fp16", reference="golden.npz")
def test_fp16(): ...
"""
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}")
    run.result.assert_outcomes(passed=3, failed=1)
    assert all(record["evidence"] == "engine" for record in run.checks)
    assert run.check("test_wrong_scale")["verdict"] == "fail"
    assert run.check("test_recorded")["inputs"] == "recorded"
