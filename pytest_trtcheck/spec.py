"""What a check is asked to do: frozen dataclasses passed from the markers down to whoever does the work."""

from __future__ import annotations

import enum
import os
import reprlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pytest_trtcheck.choices import (
    CALIBRATION_METHODS,
    PRECISIONS,
    CalibrationMethod,
    HalfName,
    Precision,
)
from pytest_trtcheck.errors import ArgumentError, name_of
from pytest_trtcheck.metrics import METRICS, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "CALIBRATION_METHODS",
    "PRECISIONS",
    "SOURCE",
    "Budget",
    "BuildOptions",
    "Calibration",
    "CalibrationData",
    "CalibrationMethod",
    "Case",
    "InputMapping",
    "LatencySpec",
    "ParitySpec",
    "Part",
    "Precision",
    "ScoreSpec",
    "Shape",
    "ShapeRange",
    "Tolerance",
]


class Named(enum.Enum):
    """What a marker argument may name beside values of its own."""

    SOURCE = "SOURCE"

    def __repr__(self) -> str:
        return self.name


SOURCE = Named.SOURCE
"""As `reference=`: what the model was exported from, computing by itself (PyTorch, Keras)."""

InputMapping: TypeAlias = "Mapping[str, NDArray[Any]]"
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ShapeRange:
    """The shapes an engine accepts for one input: an optimization profile's (min, opt, max)."""

    min: Shape
    opt: Shape
    max: Shape


WHOLE = "the whole output"
"""What the part is called that leaves nothing out."""


@dataclass(frozen=True)
class Part:
    """A stretch of an output that has a scale of its own.

    Parameters
    ----------
    ranges
        (axis, start, stop) each, axes and bounds as in Python's slices; none: the whole output. A stop of None is the
        end of the axis.
    natural
        How large its values are by their nature: 1 behind a Sigmoid or Softmax; None: not known.
    """

    ranges: tuple[tuple[int, int, int | None], ...] = ()
    natural: float | None = None

    def __str__(self) -> str:
        spans = [f"[{start}:{'' if stop is None else stop}] along axis {axis}" for axis, start, stop in self.ranges]
        where = f"part {', '.join(spans)}" if spans else WHOLE
        return f"{where} (scores)" if self.natural is not None else where


PartsArgument: TypeAlias = "Literal['auto'] | Mapping[str, Sequence[tuple[int, int, int | None]]] | None"


@dataclass(frozen=True, init=False, repr=False)
class Tolerance:
    """Several metrics combined: every limit that is given must hold.

    Parameters
    ----------
    limits
        By the metric's name (`max`, `l2`, `abs`, `allclose`, `cosine`, `snr_db`, `top1`), the most that it may be; of
        `snr_db` the least. None: no limit.
    metrics
        The same for callables and metrics that are not built in.
    mismatches
        The share (0 to 1) of the elements of an integer or bool output that may differ from the reference.
    top1_axis
        The axis along which `top1` chooses; needed for outputs with more than two dimensions above 1.
    parts
        How outputs are divided into parts that have scales of their own. `auto`: as the graph and the reference say;
        None: not at all; or, by output name, a list of (axis, start, stop).

    >>> Tolerance(max=1e-2, cosine=1e-4)
    Tolerance(max=0.01, cosine=0.0001)
    """

    limits: Mapping[str, float] = field(hash=False)
    metrics: Mapping[object, float] = field(hash=False)
    mismatches: float
    top1_axis: int | None
    parts: PartsArgument = field(hash=False)

    def __init__(
        self,
        *,
        metrics: Mapping[Any, float] | None = None,
        mismatches: float = 0.0,
        top1_axis: int | None = None,
        parts: PartsArgument = "auto",
        **limits: float | None,
    ) -> None:
        given = {name: limit for name, limit in limits.items() if limit is not None}
        vars(self).update(
            limits=given, metrics=dict(metrics or {}), mismatches=mismatches, top1_axis=top1_axis, parts=parts
        )

    def arguments(self) -> dict[str, Any]:
        """What it was made with, defaults left out."""
        usual = vars(Tolerance())
        return {**self.limits, **{n: each for n, each in vars(self).items() if n != "limits" and each != usual[n]}}

    def __repr__(self) -> str:
        return f"Tolerance({', '.join(f'{name}={value!r}' for name, value in self.arguments().items())})"


@dataclass(frozen=True)
class Calibration:
    """Data to choose the INT8 or FP8 ranges from, and how.

    Parameters
    ----------
    data
        A path or glob of .npz/.npy files, a list of those, or an iterable of input mappings.
    method
        `minmax` takes the largest magnitude seen, `percentile` the magnitude below which `percentile` % of the
        elements lie, `mse` the clipping threshold with the least squared error of rounding and clipping together,
        `entropy` that with the least KL divergence. `auto` chooses among minmax, mse and percentiles (99.9, 99.99 and
        99.999) by the error of the quantized model's outputs on samples that were held out.
    percentile
        In percent; used by `percentile` alone.
    max_samples
        At most so many samples are used, the first ones.
    """

    data: object
    method: CalibrationMethod = "auto"
    percentile: float = 99.99
    max_samples: int = 512


Ranges: TypeAlias = "tuple[float, float] | Mapping[str, tuple[float, float]] | None"
"""The least and largest value: of every floating-point input, or by input name."""


@dataclass(frozen=True)
class Search:
    """How long the worst input of a check is searched, and among which.

    Parameters
    ----------
    tries
        At most so many inputs are tried; of a model with an open batch dimension, single rows.
    ranges
        The least and largest value, as (low, high): of every floating-point input, or by input name. What is not named
        has the span of the check's own inputs; where those are generated, what they are drawn from.
    seconds
        The most that the tries may take.
    """

    tries: int = 1000
    ranges: Ranges = field(default=None, hash=False)
    seconds: float = 60.0


HardwareCompatible: TypeAlias = Literal["none", "ampere_plus", "same_compute_capability"]
Tiling: TypeAlias = Literal["none", "fast", "moderate", "full"]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How TensorRT builds the engine. Every field is part of the engine's cache key.

    Parameters
    ----------
    tf32
        Whether FP32 convolutions and matrix products may round their inputs to TF32. None: only with
        `precision="tf32"`.
    workspace_mib
        The most scratch memory a layer may use, in MiB. None: TensorRT's default.
    optimization_level
        The builder optimization level, 0 to 5. None: TensorRT's default.
    sparsity
        Whether 2:4 structured-sparse weights may use sparse kernels.
    version_compatible, hardware_compatible
        Whether the engine must run with other TensorRT versions of the same major release; and on which other GPUs:
        `ampere_plus` or `same_compute_capability`.
    max_aux_streams
        The most CUDA streams that the engine may use beside its own. None: TensorRT's choice.
    tiling, l2_limit_mib
        How long tilings that keep data in the L2 cache are searched (`none`, `fast`, `moderate`, `full`), and how much
        of that cache, in MiB, they may count on.
    refit
        Whether the engine's weights can be replaced.
    strip_weights
        Whether the plan holds no weights. To be checked, the engine gets them from the lowered model as it is loaded;
        whoever ships the plan does the same, with the typed ONNX file that `--trt-export` writes beside it.
    weight_streaming_mib
        Weights are streamed from host memory, all but so many MiB of them; `auto`: TensorRT's own budget.
    dla_core
        The DLA core that runs what it can; what it cannot runs on the GPU.
    preview
        Names of `PreviewFeature` to switch on; with a "-" before it, off.
    configure
        A function of a module, called in the builder's process with TensorRT's builder config as the last thing before
        the build; with the network as well if it takes two arguments. Its file is part of the cache key.
    plugins
        Paths of plugin libraries to load; their bytes are part of the cache key.
    custom_ops
        Paths of ONNX Runtime custom-op libraries: where the model has operators of a plugin library that ONNX Runtime
        lacks, the FP32 reference is computed with them. Their bytes are part of the model's identity.
    io
        What FP32 inputs and outputs of the model become in the engine: "fp16" or "bf16", for engines that are fed and
        read in 16 bits. Inputs given as FP32 are rounded to it, and the outputs are compared with the reference of the
        inputs as they were given. None: they stay FP32.
    min_subgraph_size
        Of ONNX Runtime's TensorRT provider: the fewest nodes that TensorRT is given a subgraph of. None: its default.
    timing_cache
        Whether to keep TensorRT's timing cache between builds (TensorRT only: RTX has none).
    timeout_s
        The most seconds a build may take; None: no limit. A build that hangs must not hang the run.
    """

    tf32: bool | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    sparsity: bool = False
    version_compatible: bool = False
    hardware_compatible: HardwareCompatible = "none"
    max_aux_streams: int | None = None
    tiling: Tiling | None = None
    l2_limit_mib: int | None = None
    refit: bool = False
    strip_weights: bool = False
    weight_streaming_mib: int | Literal["auto"] | None = None
    dla_core: int | None = None
    preview: tuple[str, ...] = ()
    configure: Callable[..., None] | None = None
    plugins: tuple[str, ...] = ()
    custom_ops: tuple[str, ...] = ()
    io: HalfName | None = None
    min_subgraph_size: int | None = None
    timing_cache: bool = True
    timeout_s: float | None = 3600.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(each.default, tuple):
                fits = isinstance(value, (tuple, list)) and all(isinstance(item, (str, os.PathLike)) for item in value)
                expected = "a tuple of names"
            elif each.name == "configure":
                fits, expected = value is None or callable(value), "a function"
            else:
                fits = value is None or isinstance(value, (bool, int, float, str))
                expected = "a number, a name or None"
            if not fits:
                raise ArgumentError(f"BuildOptions: {each.name}={reprlib.repr(value)}: expected {expected}")

    def given(self) -> dict[str, Any]:
        """The options that are not the default, as plain data: a function by its module and name."""
        differ = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}
        if callable(self.configure):
            differ["configure"] = name_of(self.configure)
        return differ


@dataclass(frozen=True, eq=False)
class Case:
    """What one inference takes, with what is known to be right about it.

    Parameters
    ----------
    inputs
        A mapping from input name to array, or one array for a model of one input; of one sample or a batch of them.
    labels
        Whatever the score needs: an array, a list, a string, a mapping. The model never sees it.
    """

    inputs: Any
    labels: Any = None


@dataclass(frozen=True)
class ScoreSpec:
    """How well the model does its task, and how far the engine's score may fall below the reference's.

    Parameters
    ----------
    function
        `(outputs, case) -> items`: one item a sample. `outputs` is a dict of numpy arrays by name, `case` a `Case`.
    max_drop
        The most that the score may fall, in its own unit.
    aggregate
        From the items of all samples to a number; None: the mean.
    lower_is_better
        Whether the score is an error rate: then it falls by rising.
    """

    function: Callable[[dict[str, Any], Case], Any]
    max_drop: float
    aggregate: Callable[[Any], Any] | None = None
    lower_is_better: bool = False

    @property
    def name(self) -> str:
        """What messages and records call it."""
        return name_of(self.function) + (f", {name_of(self.aggregate)}" if self.aggregate else "")


@dataclass(frozen=True)
class ParitySpec:
    """One `trt_parity` marker, checked. `precision` and `batch` hold every value that was listed.

    Parameters
    ----------
    backend, backends
        The one system that runs the check, None: what `--trt-backend` says; and all that were listed beside it.
    engine
        The file of an engine that exists, which is tested as it is.
    states_precision
        Whether the precision was given: of an engine that exists it is read otherwise.
    score
        What is judged beside the outputs; without a `tol`, instead of them.
    """

    model: object | None = None
    precision: tuple[Precision, ...] = ("fp16",)
    states_precision: bool = field(default=False, compare=False)
    tol: float | Tolerance | tuple[tuple[str, float | Tolerance], ...] | None = None
    metric: Metric = METRICS["max"]
    score: ScoreSpec | None = None
    reference: object | None = None
    engine: str | None = None
    calibration: object | None = None
    batch: tuple[int | None, ...] = (None,)
    shapes: Mapping[str, Shape | ShapeRange] = field(default_factory=dict)
    keep_fp32: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep_auto: bool = False
    """Whether the smallest set of nodes to keep in FP32 is searched."""
    seed: int = 0
    search: Search | None = None
    backend: str | None = None
    max_subgraphs: int | None = None
    """Into how many subgraphs a provider of ONNX Runtime may divide the model; None: nothing may be left out."""
    backends: tuple[str, ...] = ()

    @property
    def is_compared(self) -> bool:
        """Whether several systems are compared, of which this check is of one."""
        return len(self.backends) > 1

    @property
    def judges_outputs(self) -> bool:
        """Whether the outputs are held to a tolerance: a score alone stands in for the one that nobody gave."""
        return self.score is None or self.tol is not None


Budget: TypeAlias = "float | Mapping[str, float]"


@dataclass(frozen=True)
class LatencySpec:
    """One `trt_latency` marker, checked. A budget is a number, or a mapping from a GPU key to one.

    Parameters
    ----------
    batch, precision
        The batches and precisions that it is limited to; empty: any.
    """

    p50_ms: Budget | None = None
    p90_ms: Budget | None = None
    p95_ms: Budget | None = None
    p99_ms: Budget | None = None
    min_qps: Budget | None = None
    memory_mib: Budget | None = None
    engine_mib: Budget | None = None
    load_ms: Budget | None = None
    build_s: Budget | None = None
    min_speedup: Mapping[str, Budget] | None = None
    instances: int = 1
    transfers: bool = False
    max_seconds: float = 30.0
    batch: tuple[int, ...] = ()
    precision: tuple[Precision, ...] = ()

    @property
    def limited_to(self) -> str:
        """What it is limited to, as it is written; empty where it holds for every test."""
        given: dict[str, tuple[object, ...]] = {"batch": self.batch, "precision": self.precision}
        return ", ".join(f"{n}={(each[0] if len(each) == 1 else list(each))!r}" for n, each in given.items() if each)

    def fits(self, precision: str, batch: int | None) -> bool:
        """Whether it may judge a check; of a batch that is None nobody knows yet."""
        return (not self.precision or precision in self.precision) and (
            not self.batch or batch is None or batch in self.batch
        )

    def is_within(self, other: LatencySpec) -> bool:
        """Whether `other` fits everything that this one fits."""
        pairs: tuple[tuple[tuple[object, ...], tuple[object, ...]], ...] = (
            (self.batch, other.batch),
            (self.precision, other.precision),
        )
        return all(not theirs or (own and set(own) <= set(theirs)) for own, theirs in pairs)

    def budgets(self) -> dict[str, Budget]:
        """Every budget that was given, by argument name, `min_speedup` excepted."""
        quantiles = ("p50_ms", "p90_ms", "p95_ms", "p99_ms")
        names = (*quantiles, "min_qps", "memory_mib", "engine_mib", "load_ms", "build_s")
        return {name: budget for name in names if (budget := getattr(self, name)) is not None}

    def speedups(self) -> dict[str, Budget]:
        """The budgets of `min_speedup`, by the name that records have for each."""
        return {f"min_speedup[{name}]": budget for name, budget in (self.min_speedup or {}).items()}


CalibrationData: TypeAlias = "str | Iterable[InputMapping] | Calibration"
