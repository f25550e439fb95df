"""The names that a user may write, apart from the specs that hold them: every pytest run imports these, no spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeVar

    T = TypeVar("T", float, tuple[int, int])

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int8+fp16", "int8+bf16", "fp8+fp16", "fp8+bf16"]
HalfName = Literal["fp16", "bf16"]
QuantizedName = Literal["int8", "fp8"]
RangeMethod = Literal["minmax", "entropy", "percentile", "mse"]
GraphsOf = Literal["failed", "all", "none"]
CalibrationMethod = Literal["auto", "minmax", "entropy", "percentile", "mse"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

BACKENDS = {
    "auto": "tensorrt.backend:Auto",
    "tensorrt": "tensorrt.backend:TensorRT",
    "tensorrt_rtx": "tensorrt.backend:TensorRTRtx",
    "onnxruntime": "tensorrt.emulated:Emulated",
    "triton": "triton.backend:Triton",
    "onnxruntime-cuda": "onnxruntime.cuda:OrtCuda",
    "onnxruntime-tensorrt": "onnxruntime.tensorrt:OrtTensorRT",
    "onnxruntime-tensorrt-rtx": "onnxruntime.tensorrt_rtx:OrtTensorRTRtx",
    "torch": "torch:Torch",
    "torch-compile": "torch:TorchCompile",
}
"""Ours, and what each is in `pytest_trtcheck.backends`."""

HALVES: tuple[HalfName, ...] = get_args(HalfName)
QUANTIZED: tuple[QuantizedName, ...] = get_args(QuantizedName)


def parts_of(precision: str) -> tuple[Any, ...]:
    """What a precision is made of: of a pair ("int8+fp16") the quantized type and the rest's, otherwise itself."""
    return tuple(precision.split("+"))


def is_pair(precision: str) -> bool:
    """Whether part of the model is quantized, and the rest computes in 16 bits."""
    return len(parts_of(precision)) > 1


def with_pairs(table: Mapping[str, T]) -> Mapping[Precision, T]:
    """A table by precision with the pairs in it: each has the larger of its parts' values."""
    return {precision: max(table[part] for part in parts_of(precision)) for precision in PRECISIONS}


def quantized_part(precision: str) -> QuantizedName | None:
    """The type that a precision quantizes to; None where it does not."""
    return next((part for part in parts_of(precision) if part in QUANTIZED), None)


def half_part(precision: str) -> HalfName | None:
    """The 16-bit type of what a precision does not quantize; None where that stays in FP32."""
    return next((part for part in parts_of(precision) if part in HALVES), None)


PROPERTY = "trtcheck"
"""The name under which a record rides on `item.user_properties`."""
MARKERS = ("trt_parity", "trt_latency")
PRECISION, BATCH, BACKEND, GPU = "_trt_precision", "_trt_batch", "_trt_backend", "_trt_gpu"
"""The parameters that lists in a marker or an option become."""

Kind = Literal["text", "path", "flag", "names", "lines", "size", "seconds", "count", "counts", "backends", "list"]

PREFIX = "TRTCHECK_"
"""What the environment variables of options begin with."""


class Option:
    """One setting. `name` is the ini key; `--trt-x` is the flag of `trt_x` and `TRTCHECK_X` its variable."""

    # Made by hand: the decorator of a dataclass takes longer than all that a run does with them.
    def __init__(
        self,
        name: str,
        kind: Kind,
        help: str,
        default: Any = None,
        *,
        choices: tuple[str, ...] = (),
        metavar: str | None = None,
        ini_only: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.help = help
        self.default = default
        self.choices = choices
        self.metavar = metavar
        self.ini_only = ini_only
        self.flag = "--" + name.replace("_", "-")
        self.variable = PREFIX + name.removeprefix("trt_").upper()
