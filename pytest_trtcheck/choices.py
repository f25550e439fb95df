"""The names that a user may write, apart from the specs that hold them: every pytest run imports these, no spec."""

from __future__ import annotations

from typing import Any, Literal, get_args

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
Metric = Literal["max", "l2", "abs", "allclose", "cosine", "snr_db", "top1"]
Backend = Literal["auto", "tensorrt", "tensorrt_rtx", "onnxruntime"]
CalibrationMethod = Literal["minmax", "entropy", "percentile"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
METRICS: tuple[Metric, ...] = get_args(Metric)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

MARKERS = ("trt_parity", "trt_latency")
PRECISION, BATCH = "_trt_precision", "_trt_batch"
"""The parameters that lists in a marker become."""

Kind = Literal["text", "path", "flag", "names", "lines", "size", "seconds"]


# No dataclass: every pytest run makes this class, and a frozen dataclass of its size takes 0.8 ms.
class Option:
    """One setting. `name` is the ini key; `--trt-x` is the flag of `trt_x` and `TRTCHECK_X` its variable."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        help: str,
        *,
        default: Any = None,
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

    @property
    def flag(self) -> str:
        """The command line's name of it."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's name of it."""
        return "TRTCHECK_" + self.name.removeprefix("trt_").upper()
