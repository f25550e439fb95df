"""The names that a user may write, apart from the specs that hold them: every pytest run imports these, no spec."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
CalibrationMethod = Literal["minmax", "entropy", "percentile"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

MARKERS = ("trt_parity", "trt_latency")
PRECISION, BATCH = "_trt_precision", "_trt_batch"
"""The parameters that lists in a marker become."""
