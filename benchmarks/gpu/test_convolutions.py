"""TF32 by the shape of a convolution: 210 of them on a GPU, engine and emulated error side by side.

    pytest -n 12 benchmarks/gpu/test_convolutions.py --trt-report=REPORT.json

Which convolutions TensorRT computes in FP32 all the same, and which cut their inputs to TF32 instead of rounding them,
is what `precision/emulation/products.py` says after this report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck import Tolerance

if TYPE_CHECKING:
    from collections.abc import Callable

KERNELS = ((1, 1), (3, 3), (7, 7), (1, 64), (1, 256))
FLOAT = TensorProto.FLOAT


@pytest.mark.parametrize("kernel", KERNELS, ids=[f"{height}x{width}" for height, width in KERNELS])
@pytest.mark.parametrize("made", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 16, 32])
def test_convolution(trt_check: Callable[..., Any], channels: int, made: int, kernel: tuple[int, int]) -> None:
    rng = np.random.default_rng(channels * 1000 + made * 10 + kernel[1])
    weight = rng.standard_normal((made, channels, *kernel)).astype(np.float32)
    x = rng.standard_normal((1, channels, max(16, kernel[0]), max(16, 2 * kernel[1]))).astype(np.float32)
    shape = [1, made, x.shape[2] - kernel[0] + 1, x.shape[3] - kernel[1] + 1]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        f"{channels} to {made}, {kernel[0]}x{kernel[1]}",
        [helper.make_tensor_value_info("x", FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    trt_check(model, {"x": x}, precision="tf32", tol=Tolerance(max=1, l2=1, parts=None))
