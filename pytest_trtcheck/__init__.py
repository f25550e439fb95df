"""Inference regression testing for TensorRT engines, next to the model code.

PYTEST_DONT_REWRITE: a script that imports this and then runs pytest would be warned that it can't be rewritten.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    import pytest

    from pytest_trtcheck import metrics
    from pytest_trtcheck.errors import CheckError, CheckFailed
    from pytest_trtcheck.spec import SOURCE, Budget, BuildOptions, Calibration, Case, Search, Tolerance

    F = TypeVar("F", bound=Callable[..., object])

__version__ = "0.1.0"

__all__ = [
    "SOURCE",
    "BuildOptions",
    "Calibration",
    "Case",
    "CheckError",
    "CheckFailed",
    "Search",
    "Tolerance",
    "__version__",
    "metrics",
    "trt_latency",
    "trt_parity",
]


def _mark(function: F) -> F:
    """The marker that a signature describes. It takes any arguments: wrong ones are an error of their test alone."""

    @functools.wraps(function)
    def mark(*args: object, **kwargs: object) -> pytest.MarkDecorator:
        # Made when asked for: with --strict-markers pytest refuses a mark before the plugin has declared it.
        import pytest

        if f"{__name__}.plugin.hooks" not in sys.modules:
            from pytest_trtcheck.plugin.misplaced import refuse_unloaded

            refuse_unloaded(function.__name__)
        made: pytest.MarkDecorator = getattr(pytest.mark, function.__name__)
        return made.with_args(*args, **kwargs)

    return cast("F", mark)


@_mark
def trt_parity(
    model: object = None,
    *,
    precision: str | Sequence[object] = "fp16",
    tol: float | Tolerance | Mapping[str, float | Tolerance] | None = None,
    metric: str | metrics.Metric | Callable[..., float] = "max",
    score: Callable[..., object] | None = None,
    aggregate: Callable[..., object] | None = None,
    max_drop: float | None = None,
    lower_is_better: bool = False,
    reference: object = None,
    engine: str | os.PathLike[str] | None = None,
    calibration: object = None,
    batch: int | Sequence[int] | None = None,
    shapes: Mapping[str, Sequence[int] | Sequence[Sequence[int]]] | None = None,
    keep_fp32: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    seed: int = 0,
    search: int | Search | None = None,
    backend: str | Sequence[str] | None = None,
    max_subgraphs: int | None = None,
) -> pytest.MarkDecorator:
    """Mark a test: does the model, lowered to `precision`, still compute what the FP32 model computes?

    A list of precisions, batches or backends makes a test of each, and takes `pytest.param(…, marks=…, id=…)`. What the
    test function returns is fed to the model: a mapping from input name to array (one array for a model of one input),
    or a list of these. Unlike `pytest.mark.trt_parity(make_model)`, which would decorate `make_model`, a function is
    taken as an argument.

    Parameters
    ----------
    model
        A path (looked up beside the test file, then from pytest's rootdir), the bytes of a file, an `onnx.ModelProto`,
        a `torch.nn.Module`, an `ExportedProgram` or a `.pt2` file, a Keras model, a `.keras` file, a SavedModel folder
        (`"folder::signature"`), or a function without arguments that makes one of these. None: what the fixture
        `trt_model` gives.
    precision
        `fp32` (TensorRT-RTX computes it in TF32), `tf32`, `fp16`, `bf16`, `int8`, `fp8`, or of a model that ships with
        both `int8+fp16`, `int8+bf16`, `fp8+fp16`, `fp8+bf16`. With `engine`, what it tells.
    tol
        What the error may be: a number, a `Tolerance`, or a mapping from output name (globs; the first match wins) to
        one of these. None: the default of the precision.
    metric
        What a number given as `tol` limits: `max`, `l2`, `abs`, `allclose`, `cosine`, `snr_db`, `top1`; one made with
        arguments, `metrics.top1(axis=1)`; or a callable `(actual, expected) -> float` on FP64 arrays, which needs
        `tol`, the most that it may be.
    score
        A callable `(outputs, case) -> array`, one item a sample: does the model still do its task? Without a `tol` it
        is judged alone.
    aggregate
        From the items of all samples to a number (mAP, the word error rate of a corpus). None: the mean.
    max_drop
        The most, in the score's own unit, that it may fall below the reference's; a score needs it.
    lower_is_better
        Whether the score is an error rate, which falls by rising.
    reference
        What counts as right: another model, given as `model` is (the FP32 original of a quantized one), recorded
        outputs (.npz), `SOURCE` (what the model was exported from), or a callable from inputs to outputs. None: the
        FP32 model itself on ONNX Runtime.
    engine
        The file of an engine that exists, tested as it is: a plan, or an EPContext model.
    calibration
        Data for whatever has INT8 or FP8 in it: files, an iterable of input mappings, or a `Calibration`. None: what
        the fixture `trt_calibration` gives.
    batch
        The size of open first dimensions.
    shapes
        Input name → shape, or (min, opt, max) for an optimization profile; inputs outside are an error, and so is a
        `batch`.
    keep_fp32
        Globs of node names that stay in FP32; or `"auto"`, the fewest with which it passes.
    exclude
        Globs of node names that are not quantized: they run in what the rest of the model runs in, FP32 or of a pair
        its second part.
    seed
        Of generated inputs, and of a search.
    search
        How many inputs are tried to find the one on which the check errs most, or a `Search(tries, ranges, seconds)`.
        None: what `--trt-search` says.
    backend
        What runs it: `auto`, `tensorrt`, `tensorrt_rtx`, `onnxruntime` (also called `emulated`), `onnxruntime-cuda`,
        `onnxruntime-tensorrt`, `onnxruntime-tensorrt-rtx`, `triton`, `torch`, `torch-compile`, or what another package
        adds; `-` and `_` are the same. None: what `--trt-backend` says.
    max_subgraphs
        Of ONNX Runtime's TensorRT providers: into how many subgraphs they may divide the model. None: nothing may be
        left out.
    """
    raise NotImplementedError


@_mark
def trt_latency(
    p50_ms: Budget | None = None,
    *,
    p90_ms: Budget | None = None,
    p95_ms: Budget | None = None,
    p99_ms: Budget | None = None,
    min_qps: Budget | None = None,
    memory_mib: Budget | None = None,
    engine_mib: Budget | None = None,
    load_ms: Budget | None = None,
    build_s: Budget | None = None,
    instances: int = 1,
    min_speedup: Mapping[str, Budget] | None = None,
    transfers: bool = False,
    max_seconds: float = 30.0,
    batch: int | Sequence[int] | None = None,
    precision: str | Sequence[str] | None = None,
) -> pytest.MarkDecorator:
    """Mark a test: is the engine fast and small enough on the GPU that it ships to?

    Every budget is a number, or a mapping from GPU to number: `{"T4": 7.0, "A100": 1.5}`. The mark may be given several
    times, each limited to a batch or precision: a test is judged by the narrowest one that fits it, whole.

    Parameters
    ----------
    p50_ms, p90_ms, p95_ms, p99_ms
        The most that a quantile of latency may be, in ms.
    min_qps
        The least throughput, in inferences a second.
    memory_mib
        The most device memory of the engine and its contexts after the first run, in MiB.
    engine_mib
        The most that the serialized engine may take, in MiB.
    load_ms
        The most that loading the serialized engine may take until it is ready to run, in ms: the median of up to 60
        loads, with the kernels that TensorRT-RTX compiled the first time.
    build_s
        The most seconds that building the engine may take; of an engine from the cache, those that its build took then.
    instances
        How many of it run at once: quantiles are then of each run beside the others, `min_qps` is of all together.
    min_speedup
        Precision or backend → factor: how much faster than the engine of that precision, or than `torch`; the factor
        may be a mapping from GPU too, `{"fp32": {"T4": 2.0}}`.
    transfers
        Whether copies between host and device count.
    max_seconds
        How long to measure at most before the verdict is `inconclusive`.
    batch, precision
        What it is limited to, each a value or a list of them; None: it holds for every test that it marks. One that
        fits none of them is an error.
    """
    raise NotImplementedError


def __getattr__(name: str) -> object:
    # Every pytest run imports this package, few need the specs, and dataclasses are slow to make.
    if name in {"SOURCE", "BuildOptions", "Calibration", "Case", "Search", "Tolerance"}:
        from pytest_trtcheck import spec

        return getattr(spec, name)
    if name in {"CheckError", "CheckFailed"}:
        from pytest_trtcheck import errors

        return getattr(errors, name)
    if name == "metrics":
        import importlib

        return importlib.import_module("pytest_trtcheck.metrics")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
