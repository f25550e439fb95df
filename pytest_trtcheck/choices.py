"""The names that a user may write, apart from the specs that hold them: every pytest run imports these, no spec."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
RangeMethod = Literal["minmax", "entropy", "percentile", "mse"]
CalibrationMethod = Literal["auto", "minmax", "entropy", "percentile", "mse"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

MARKERS = ("trt_parity", "trt_latency")
PRECISION, BATCH = "_trt_precision", "_trt_batch"
"""The parameters that lists in a marker become."""

Kind = Literal["text", "path", "flag", "names", "lines", "size", "seconds", "backend"]


class Option(NamedTuple):
    """One setting. `name` is the ini key; `--trt-x` is the flag of `trt_x` and `TRTCHECK_X` its variable."""

    name: str
    kind: Kind
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    ini_only: bool = False

    @property
    def flag(self) -> str:
        """The command line's name of it."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's name of it."""
        return "TRTCHECK_" + self.name.removeprefix("trt_").upper()
