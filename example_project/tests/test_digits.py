"""Does the digit classifier's engine compute what the FP32 model computes, fast enough?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_trtcheck import trt_latency, trt_parity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Images = dict[str, "NDArray[np.float32]"]


@trt_parity(precision=["fp16", "bf16"])
def test_sixteen_bits(golden: Images) -> Images:
    return golden


@trt_parity(precision="int8", calibration="data/calibration/*.npz")
def test_int8(golden: Images) -> Images:
    return golden


# No data at hand? Return nothing, and the inputs are generated from the model's own input specs.
@trt_parity(precision="fp16", batch=[1, 32])
def test_generated_inputs() -> None: ...


# What the product needs, not what was once measured: 2 ms per image on the board, less where GPUs are shared.
@trt_parity(precision="int8", calibration="data/calibration/*.npz", batch=1)
@trt_latency(p50_ms={"T4": 0.5, "A100": 0.3, "Orin": 1.0}, p99_ms={"T4": 1.0, "A100": 0.6, "Orin": 2.0})
def test_int8_latency(golden: Images) -> Images:
    return {"image": golden["image"][:1]}
