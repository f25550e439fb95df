"""What a check found: frozen dataclasses that become, field by field, the JSON report (schema_version 1).

A record crosses processes (xdist) and time (reports, baselines) as JSON: `jsonable` writes it, `typed` reads it. JSON
has no NaN or infinity; these are written as the strings "nan", "inf" and "-inf", and are numbers again once read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from pytest_trtcheck.errors import ReportError, first_line, listed, plural

T = TypeVar("T")
Verdict = Literal["pass", "fail", "error", "inconclusive", "not_measured"]
Evidence = Literal["engine", "provider", "server", "emulated"]
"""Where the compared outputs came from: a GPU ran TensorRT; a library ran the lowered model (ONNX Runtime's providers,
PyTorch); a server did; or the precision's arithmetic was computed on a CPU."""
GpuRan = bool | Literal["unknown"]

SCHEMA_VERSION = 1
TOOL = "pytest-trtcheck"
PROPERTY = "trtcheck"
"""The name under which a record rides on `item.user_properties`."""

SEVERITY: tuple[Verdict, ...] = ("not_measured", "pass", "inconclusive", "fail", "error")
"""From what says least to what must be looked at first: the order in which verdicts combine."""

BASELINE = "baseline"
"""What the sources of limits begin with that a baseline sets, and the name of its entry among the budgets."""

_ABSENT = "absent"


def _absent(default: Any = None, *, beside: str = "") -> Any:
    """A field whose key is left out while nothing is known of it; `beside`: unless that field is known."""
    return field(default=default, metadata={_ABSENT: beside})


# --- parity ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgedRecord:
    """One limit that was applied to an output; `value` is None where the metric could not be computed.

    `limit` is None where the output is not even of the reference's shape or dtype; then `metric` says which. `part`
    is the worst of a divided output, `case` and `sample` are where it was found. `at_least` is said of a metric that
    is not built in, where its limit is the least that it may be.
    """

    metric: str
    value: float | None
    limit: float | None
    source: str | None
    verdict: Verdict
    note: str | None = _absent()
    part: str | None = _absent()
    at_least: bool | None = _absent()
    case: int | None = _absent()
    sample: int | None = _absent()
    rows: int | None = _absent()
    """Of a share: of how many rows, or elements."""

    @property
    def is_of_baseline(self) -> bool:
        """Whether the limit is what a baseline recorded, and not the tolerance."""
        return (self.source or "").startswith(BASELINE)


@dataclass(frozen=True, kw_only=True)
class PartRecord(JudgedRecord):
    """The same of one part of a divided output, with where the part lies: ranges are (axis, start, stop)."""

    ranges: tuple[tuple[int, int, int | None], ...] = ()
    band: tuple[float, float] | None = None
    natural: float | None = None
    size: int = 0
    peak: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class ElementRecord:
    """One of the worst elements, and |difference|."""

    index: tuple[int, ...]
    expected: bool | int | float | str | None
    actual: bool | int | float | str | None
    error: float | None = None
    case: int | None = None

    def __post_init__(self) -> None:
        for name in ("expected", "actual"):
            if getattr(self, name) in ("nan", "inf", "-inf"):
                object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True)
class OutputDetails:
    """What a report draws from: the worst elements, quantiles and octaves of the error, the metrics of no field.

    `error_octaves` are (e, n): n elements with 2^e ≤ |error| < 2^(e+1). `emulated` holds the emulated model's errors by
    metric, where an engine's are judged.
    """

    allclose: float | None = _absent(beside="cases")
    top1: float | None = _absent(beside="cases")
    cases: int | None = _absent()
    peak: float | None = _absent(beside="cases")
    error_quantiles: Mapping[str, float | None] | None = _absent(beside="cases")
    error_octaves: tuple[tuple[int, int], ...] = _absent((), beside="cases")
    error_zeros: int | None = _absent(beside="cases")
    error_sampled: int | None = _absent(beside="cases")
    worst: tuple[ElementRecord, ...] = _absent((), beside="cases")
    notes: tuple[str, ...] = _absent((), beside="cases")
    uncompared: str | None = _absent(beside="cases")
    emulated: Mapping[str, float | None] | None = _absent()


@dataclass(frozen=True)
class OutputRecord:
    """One output, compared. Metrics are None where they are not defined for the output's dtype."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    max: float | None = None
    l2: float | None = None
    abs: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    nonfinite: int = 0
    mismatches: int = 0
    worst_index: tuple[int, ...] | None = None
    verdict: Verdict = "pass"
    judged: tuple[JudgedRecord, ...] = ()
    """Every limit that was applied."""
    details: OutputDetails = OutputDetails()
    parts: tuple[PartRecord, ...] = ()
    """Every part of a divided output by every limit that is relative to a scale."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor along the graph: how far it is from the reference's, and what did not fit into its precision."""

    name: str
    node: str | None = None
    op_type: str | None = None
    error: float | None = None
    own: float | None = None
    max: float | None = None
    l2: float | None = None
    snr_db: float | None = None
    max_abs: float | None = None
    nonfinite: int | None = None
    overflow: float | None = None
    underflow: float | None = None
    saturated: float | None = None


class _Keyed:
    """A record that can be asked by key as well: the text of a diagnosis reads it as it reads the dictionary."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where it is not known."""
        found = getattr(self, name, None)
        return default if found is None else found


@dataclass(frozen=True)
class BlameRecord(_Keyed):
    """`diagnose.result.Blame` as reports have it; `tensor` is the one to look at first, `summary` the headline."""

    step: str | None = None
    headline: str | None = None
    errors: Mapping[str, Any] | None = None
    culprit: Mapping[str, Any] | None = None
    others: tuple[str, ...] = ()
    contributions: tuple[Mapping[str, Any], ...] = ()
    tensors: tuple[TensorRecord, ...] = ()
    keep_fp32: tuple[str, ...] | None = None
    keep_value: float | None = None
    confirmed: bool = False
    confirmed_by: str | None = None
    keep_emulated: float | None = None
    parts: Mapping[str, float | None] | None = _absent()
    calibration: Mapping[str, Any] | None = None
    builds: int = 0
    trials: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    is_complete: bool = True
    summary: str | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class ParityRecord:
    """The parity part of a check; `worst` is the value of `metric` on the worst output."""

    verdict: Verdict
    metric: str = ""
    tol: float | None = None
    worst: float | None = None
    outputs: tuple[OutputRecord, ...] = ()
    blame: BlameRecord | None = None
    reason: str | None = None
    tol_source: str | None = None
    keep_fp32: tuple[str, ...] | None = _absent()
    """The nodes that `keep_fp32="auto"` found; empty where none are needed."""


# --- the task's score -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleRecord:
    """A sample that the reference and the engine score differently: its case, and its place in there, both from 0."""

    case: int
    sample: int
    reference: float | str | None = None
    value: float | str | None = None


@dataclass(frozen=True)
class ItemsRecord:
    """Numbers, one a sample or one array a sample: FP32, little-endian, deflated, in base64."""

    shape: tuple[int, ...]
    data: str


@dataclass(frozen=True)
class ScoreRecord:
    """The score of a check: of the reference, of what ran, and by how much it fell.

    `lower` and `upper` bound `drop` with `confidence` (both sides together); a negative drop is a gain. The limit,
    `max_drop`, and all of these are in the score's own unit.
    """

    verdict: Verdict
    name: str = ""
    reference: float | None = None
    value: float | None = None
    drop: float | None = None
    lower: float | None = None
    upper: float | None = None
    confidence: float | None = None
    max_drop: float | None = None
    lower_is_better: bool = False
    samples: int = 0
    disagreeing: int = 0
    """Of how many samples the items differ."""
    samples_to_decide: int | None = _absent()
    """About how many samples would decide, where these did not."""
    method: str | None = None
    reason: str | None = None
    worst: tuple[SampleRecord, ...] = ()
    """The samples that lost most; where items are no numbers, the first that changed."""
    errors: Mapping[str, float | None] | None = _absent()
    """max|y−r| / max|r| by output, of the first `errors_of_cases` cases: told, not judged."""
    errors_of_cases: int | None = _absent()
    items: ItemsRecord | None = _absent()  # noqa: RUF009 - it is a field
    """What ran scored on each sample, where there are baselines to record or to hold it against."""
    baseline: BaselineRecord | None = _absent()  # noqa: RUF009 - it is a field
    """What came of holding it against what was recorded."""
    labels_sha256: str | None = _absent()
    """Of the labels of all samples."""

    @property
    def asked(self) -> tuple[object, ...]:
        """What was asked: the score, the most that it may fall, and of which samples."""
        return self.name, self.max_drop, self.lower_is_better, self.samples, self.labels_sha256

    def fell_further_than(self, other: ScoreRecord) -> bool:
        """Whether it surely fell further: by more at the least than the other at the most."""
        return self.lower is not None and other.upper is not None and self.lower > other.upper


# --- latency ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BudgetRecord:
    """One budget: its limit, what was measured, and the confidence bounds; in ms where it is on a quantile."""

    verdict: Verdict
    name: str | None = _absent()
    quantile: str | None = _absent()
    limit: float | None = _absent()
    value: float | None = _absent(beside="limit")
    lower: float | None = _absent(beside="limit")
    upper: float | None = _absent(beside="limit")
    limit_ms: float | None = _absent()
    value_ms: float | None = _absent(beside="limit_ms")
    lower_ms: float | None = _absent(beside="limit_ms")
    upper_ms: float | None = _absent(beside="limit_ms")
    baseline_p50_ms: float | None = _absent()
    ratio: float | None = _absent()
    text: str | None = _absent()


@dataclass(frozen=True)
class Conditions:
    """Under what a latency was measured; `tensorrt` is module and version, the clocks are None where not told."""

    gpu: str | None = _absent()
    compute_capability: str | None = _absent()
    driver: str | None = _absent(beside="gpu")
    tensorrt: str | None = _absent()
    input_shapes: Mapping[str, tuple[int, ...]] | None = _absent()
    sm_mhz: int | None = _absent()
    power_limit_w: float | None = _absent()
    power_mode: str | None = _absent()

    @property
    def gpu_record(self) -> GpuRecord | None:
        """The GPU alone; None where it is not known."""
        return GpuRecord(self.gpu, None, self.compute_capability) if self.gpu else None


@dataclass(frozen=True)
class LoadRecord:
    """Throughput and latency with so many requests under way at once, over the last windows that were measured.

    Parameters
    ----------
    requests, qps
        The requests that were answered, and how many a second.
    stable
        Whether throughput and latency stood still over these windows.
    windows
        How many it took.
    client_cores
        The processor time that sending and receiving took on this side, in cores: near 1 it is the client that is slow.
    """

    concurrency: int
    requests: int
    qps: float
    p50_ms: float | None
    p99_ms: float | None
    stable: bool
    windows: int
    client_cores: float


@dataclass(frozen=True)
class LatencyDetails:
    """How a latency was measured, and what a report draws from."""

    mean_ms: float | None = _absent()
    min_ms: float | None = _absent()
    max_ms: float | None = _absent()
    measured: str | None = _absent()
    instances: int | None = _absent()
    """How many ran at once, where it was more than one."""
    load_samples_ms: tuple[float, ...] = _absent(())
    """What loading it took, again and again, where `load_ms` has a budget."""
    cuda_graph: bool | None = _absent()
    cuda_graph_reason: str | None = _absent(beside="cuda_graph")
    gpu_p50_ms: float | None = _absent()
    enqueue_p50_ms: float | None = _absent()
    enqueue_bound: bool | None = _absent()
    qps: float | None = _absent()
    samples_ms: tuple[float, ...] = _absent(())
    distribution: Mapping[str, Any] | None = _absent()
    """`latency.distribution.Distribution` reads it."""
    load: tuple[LoadRecord, ...] = _absent(())
    """Of a server: by the number of requests at once, 1, 2, 4, …"""
    load_ended: str | None = _absent()
    """Why no more of them were tried."""
    budget_keys: Mapping[str, str] | None = _absent()
    conditions: Conditions | None = _absent()  # noqa: RUF009 - it is a field
    disturbances: tuple[str, ...] = _absent((), beside="conditions")
    held_back: tuple[str, ...] = _absent((), beside="conditions")


@dataclass(frozen=True)
class LatencyRecord:
    """The latency part of a check; `gpu` is the GPU whose budgets were asked for."""

    verdict: Verdict
    reason: str | None = None
    gpu: str | None = None
    samples: int = 0
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    bounds_ms: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    budgets: tuple[BudgetRecord, ...] = ()
    clocks: Mapping[str, Any] = field(default_factory=dict)
    details: LatencyDetails = LatencyDetails()


# --- the check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRecord:
    """A layer of an engine, by the engine inspector; what it takes, by TensorRT's profiler.

    What a field tells is not told everywhere: a layer may name no ONNX node, and one that was never timed has no time.
    """

    name: str
    kind: str | None = _absent()
    """TensorRT's word for it, such as "CaskConvolution"."""
    precision: str | None = _absent()
    """What it computes in, as `EngineRecord.layers_by_precision` counts it."""
    nodes: tuple[str, ...] = _absent(())
    """The ONNX nodes in it that do arithmetic; where that is not known, those whose names say of no conversion."""
    moves: tuple[str, ...] = _absent(())
    """Those that only move, convert or choose values."""
    time_ms: float | None = _absent()
    """The median of what it took in a run, beside others that were timed too."""
    bounds_ms: tuple[float, float] | None = _absent()
    """Confidence bounds of that."""


@dataclass(frozen=True)
class EngineRecord:
    """The engine that was built or taken from the cache; or that exists, whose key is its SHA-256."""

    key: str
    cached: bool
    miss_reason: str | None
    build_s: float
    bytes: int
    device_memory_bytes: int | None = None
    layers_by_precision: Mapping[str, int] | None = None
    layers: tuple[LayerRecord, ...] = _absent(())
    """Every layer, in the order of the engine, as far as the engine inspector tells."""
    layers_untimed: str | None = _absent()
    """Why the layers have no times, where they were to be timed."""
    sha256: str | None = None
    """Of the serialized engine: two builds of one key need not be the same bytes."""
    aux_streams: int | None = _absent()
    """The CUDA streams that the loaded engine uses beside its own."""
    streamed_bytes: int | None = _absent()
    """How many bytes of the weights are streamed from host memory, where that was asked for."""
    build_notes: tuple[str, ...] = _absent(())
    """What the builder had to say of what was asked for."""
    source: Literal["file"] | None = _absent()
    """Where it came from, if it was not built: `engine=` named a file."""
    file: str | None = _absent(beside="source")
    """The path, as it was named."""
    built_by: str | None = _absent(beside="source")
    """The TensorRT that built it, with the version where the file tells it."""
    built_for: tuple[str, ...] = _absent((), beside="source")
    """The compute capabilities that it was compiled for, as far as the file tells, such as "8.6"."""
    proved: bool | None = _absent(beside="source")
    """Whether the precision was read from its layers; false: it is stated, or not known. None: it did not run."""


@dataclass(frozen=True)
class ServerRecord:
    """The served model that was checked, as the server describes it.

    Parameters
    ----------
    server
        Name and version, such as "triton 2.51.0".
    platform
        What runs the model there, such as `tensorrt_plan`.
    at_once, difference
        How many answers there were to requests that were sent together with others, and how far one lay from that to
        the same request alone, as max|a - b| / max|a|.
    batches
        What the server counted meanwhile: how many executions there were, by batch size.
    proved
        Whether the precision was proved: a server does not tell.
    """

    url: str
    server: str
    model: str
    version: str
    platform: str
    max_batch_size: int
    at_once: int | None = None
    difference: float | None = None
    batches: Mapping[str, int] | None = None
    proved: bool = False

    def __str__(self) -> str:
        return f"{self.server} at {self.url}: model {self.model!r}, version {self.version} ({self.platform})"


@dataclass(frozen=True)
class NodeRecord:
    """A node, and the provider of ONNX Runtime that computes it."""

    name: str
    op_type: str
    provider: str


@dataclass(frozen=True)
class PartitionRecord:
    """How ONNX Runtime divided a model among its providers."""

    provider: str
    nodes: int
    """That the provider computes."""
    subgraphs: tuple[int, ...] = _absent(())
    """How many nodes each subgraph has that it compiled; none of a provider that runs node by node."""
    elsewhere: tuple[NodeRecord, ...] = ()
    """The nodes that other providers compute."""
    shapes_on_cpu: int = 0
    """Further nodes, on the CPU, that compute from shapes alone."""
    kernels: Mapping[str, int] | None = _absent()
    """How many of its nodes compute in which type, by ONNX Runtime's profile of a run."""

    @property
    def text(self) -> str:
        """All of it in a line."""
        sizes = ", ".join(plural(count, "node") for count in self.subgraphs)
        parts = [f"{plural(len(self.subgraphs), 'subgraph')} ({sizes})" if sizes else plural(self.nodes, "node")]
        if self.kernels:
            parts.append(", ".join(f"{count} in {kind}" for kind, count in self.kernels.items()))
        parts.append(f"{len(self.elsewhere)} elsewhere: {nodes_shown(self.elsewhere)}" if self.elsewhere else "")
        parts.append(f"{plural(self.shapes_on_cpu, 'node')} of shapes on the CPU" if self.shapes_on_cpu else "")
        return f"{self.provider}: {'; '.join(filter(None, parts))}"


def nodes_shown(nodes: Sequence[NodeRecord]) -> str:
    """Nodes for messages: name, operator and provider of the first of them."""
    named = (f"{node.name or 'unnamed'} ({node.op_type}, {node.provider})" for node in nodes)
    return listed(named, 5)


@dataclass(frozen=True)
class LoweredRecord:
    """The ONNX file in the precision asked for, by its identity; `path` is that of the user's own, taken as it is."""

    key: str
    precision: str
    path: str | None = None


@dataclass(frozen=True)
class BuildRecord:
    """One of the builds of `--trt-rebuild`, judged alone; `error` is the parity metric on the worst output."""

    sha256: str | None
    bytes: int
    build_s: float
    verdict: Verdict
    error: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    device_memory_bytes: int | None = None
    errors: Mapping[str, Mapping[str, float]] | None = _absent()
    """By output, and by metric and part: what baselines hold."""


@dataclass(frozen=True)
class RebuildRecord:
    """Several builds of one engine: how many of them differ, and the least and largest of what was measured."""

    builds: tuple[BuildRecord, ...]
    """The first is the one in the cache."""
    engines: int
    error: tuple[float, float] | None = None
    p50_ms: tuple[float, float] | None = None
    p99_ms: tuple[float, float] | None = None

    def text(self, metric: str) -> str:
        """All of it in a line."""
        same = "the same bytes each time" if self.engines == 1 else f"{self.engines} different engines"
        spans = ((metric, self.error, ""), ("p50", self.p50_ms, " ms"), ("p99", self.p99_ms, " ms"))
        found = [f"{name} {span[0]:.4g} to {span[1]:.4g}{unit}" for name, span, unit in spans if span]
        return f"{len(self.builds)} builds, {same}: {', '.join(found) or 'none of them ran'}"


@dataclass(frozen=True)
class CoverageRecord:
    """One input in the calibration data, and in what the check was fed.

    Parameters
    ----------
    min, max
        The least and the largest value in the calibration data.
    fed_min, fed_max
        The same of the check's inputs; None where nothing was fed.
    outside
        The share (0 to 1) of the elements fed that lie outside of min and max.
    psi
        The population stability index of what was fed against the calibration data.
    drifted
        Whether the check's inputs are other than the calibration data by more than its samples differ among themselves.
    """

    min: float
    max: float
    fed_min: float | None = None
    fed_max: float | None = None
    outside: float | None = None
    psi: float | None = None
    drifted: bool = False


@dataclass(frozen=True)
class CalibrationRecord:
    """How the ranges of an INT8 or FP8 model were chosen.

    Of `Calibration(method="auto")`, `held_out` is the number of samples that each method was judged on, and `errors`
    has the relative L2 error of each output by method, such as "percentile 99.9".
    """

    method: str
    percentile: float | None
    samples: int
    held_out: int | None = _absent()
    errors: Mapping[str, Mapping[str, float]] | None = _absent()
    sha256: str | None = _absent()
    """Of every byte of the samples used, with the names, types and shapes of the inputs."""
    inputs: Mapping[str, CoverageRecord] | None = _absent()
    """What the samples hold of each input of numbers, and what of the check's inputs they do not cover."""


@dataclass(frozen=True)
class GpuRecord:
    """The GPU that was present."""

    name: str | None = None
    uuid: str | None = None
    compute_capability: str | None = None
    """As in "9.0"."""


@dataclass(frozen=True)
class RiseRecord:
    """An error that rose beyond what a baseline recorded.

    Parameters
    ----------
    metric
        With the part of the output behind it, where that is one of several.
    before
        The worst of the builds that were recorded.
    allowed
        The worst that is no rise.
    limit
        Of the tolerance.
    """

    output: str
    metric: str
    value: float | None
    before: float
    allowed: float
    limit: float | None


@dataclass(frozen=True)
class BaselineRecord:
    """What the errors of a check were held against (`--trt-baseline`).

    Parameters
    ----------
    verdict
        `not_measured` where there is no baseline of it, or none that can be compared.
    made_with
        What decides beside model, inputs and reference: versions, driver, options, calibration.
    recorded, builds
        Of the baseline: the day, and how many builds it has.
    changed
        What of `made_with` was another when it was recorded, in words.
    rises
        The errors that rose.
    gpu
        The GPU that ran it; None of what no GPU of this machine ran.
    """

    verdict: Verdict
    text: str
    made_with: Mapping[str, str] = field(default_factory=dict)
    recorded: str | None = None
    builds: int | None = None
    changed: tuple[str, ...] = ()
    rises: tuple[RiseRecord, ...] = ()
    gpu: GpuRecord | None = None


@dataclass(frozen=True)
class ProofRecord:
    """Where the same check passed on a GPU: the report, and what it ran on there; `signed`: its signature holds."""

    file: str
    gpu: str | None
    tensorrt: str | None
    driver: str | None
    signed: bool


@dataclass(frozen=True)
class SearchRecord:
    """What the search for a check's worst input came to. A try is one input; with an open batch dimension, one row.

    `usage` is how much of its limit the worst input found uses (above 1 the check fails); `output`, `metric`, `value`
    and `limit` are those of the limit that is used most. `found_at` is the try that it was, from 1 on. `own_usage` is
    that of the check's own inputs.
    """

    tries: int
    asked: int
    seconds: float
    usage: float
    own_usage: float
    found_at: int | None = None
    output: str | None = None
    metric: str | None = None
    value: float | None = None
    limit: float | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By input, the values among which was searched."""
    held: tuple[str, ...] = ()
    """The inputs that were left as the check's own have them."""
    unusable: int = 0
    """Tries whose reference is NaN or infinite where that of the check's own inputs is not."""
    changed: int | None = _absent()
    """Of an input that fails: how many elements differ from the check's own first input, once it was shrunk."""
    elements: int | None = _absent(beside="changed")
    kept: str | None = _absent(beside="changed")
    """The file that keeps it."""
    scale: float | None = _absent(beside="changed")
    """How large max|reference| of the output is there, to what it is on the check's own inputs."""


@dataclass(frozen=True)
class Location:
    """Where a test stands: `file` relative to pytest's rootdir, `line` from 1."""

    file: str
    line: int | None = None


@dataclass(frozen=True)
class CheckRecord:
    """One check: one verdict, and all that it rests on."""

    nodeid: str
    model: str
    verdict: Verdict
    model_sha256: str | None = None
    precision: str | None = None
    system: str | None = _absent()
    """Where several backends are compared: the one that this check is of, whatever ran in the end."""
    backend: str | None = None
    evidence: str | None = None
    gpu_ran: GpuRan | None = _absent()  # noqa: RUF009 - it is a field
    """Whether a GPU computed the outputs; "unknown" where a server's word is all there is."""
    compiled_for: str | None = None
    cases: int = 0
    seed: int | None = None
    inputs: str | None = None
    """Where the inputs came from: "returned", "trt_inputs", "given" (to `trt_check`) or "generated"."""
    inputs_sha256: str | None = _absent()
    """Of every byte of all of them, with their names, types and shapes."""
    reference: str | None = None
    """What `reference=` named; None: the FP32 model itself."""
    reference_sha256: str | None = _absent()
    """Of the model or the recorded samples that `reference=` named."""
    lowered: LoweredRecord | None = _absent()  # noqa: RUF009 - it is a field
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] | None = _absent()
    """By input, the least, usual and largest shape that the check is of."""
    build_options: Mapping[str, Any] | None = _absent()
    """The `BuildOptions` that are not the default."""
    parity: ParityRecord | None = None
    score: ScoreRecord | None = _absent()  # noqa: RUF009 - it is a field
    latency: LatencyRecord | None = None
    engine: EngineRecord | None = None
    server: ServerRecord | None = _absent()  # noqa: RUF009 - it is a field
    """The served model that gave the outputs."""
    partition: PartitionRecord | None = _absent()  # noqa: RUF009 - it is a field
    """How ONNX Runtime divided the model, where one of its GPU providers ran it."""
    costs: Mapping[str, float] | None = _absent()
    """What the system takes beside time, as far as it tells: `load_ms`, `build_s`, `memory_mib`, `engine_mib`."""
    rebuild: RebuildRecord | None = _absent()  # noqa: RUF009 - it is a field
    """What further builds of the engine came to (`--trt-rebuild`)."""
    search: SearchRecord | None = _absent()  # noqa: RUF009 - it is a field
    """What the search for the worst input came to (`search=`, `--trt-search`)."""
    examples: int | None = _absent()
    """Of a test under Hypothesis's `@given`: how many examples were checked. The record is that of the worst, of a
    failure that of the minimal failing one."""
    duration_s: float = 0.0
    runs: int = 1
    """How often its test ran until this record was made: 2 and more where it was run again (rerunfailures, flaky)."""
    message: str | None = None
    """The first thing to read when the verdict is not `pass`."""
    notes: tuple[str, ...] = ()
    calibration: CalibrationRecord | None = _absent()  # noqa: RUF009 - it is a field
    baseline: BaselineRecord | None = _absent()  # noqa: RUF009 - it is a field
    """What the errors were held against; the latency's is among its budgets."""
    proof: ProofRecord | None = _absent()  # noqa: RUF009 - it is a field
    """What `--trt-require-evidence` found."""
    # What is known once the test has ended:
    expected_failure: str | None = _absent()
    """The reason of the test's `xfail` mark."""
    outcome: str | None = _absent()
    """How pytest's test ended: "passed", "failed" or "skipped" (an expected failure is "skipped")."""
    location: Location | None = _absent()  # noqa: RUF009 - it is a field
    machine: str | None = _absent()
    """In a merged report, the name of the machine that it ran on."""

    @property
    def headline(self) -> str:
        """The first line of the message."""
        return first_line(self.message or "")

    @property
    def parts(self) -> dict[str, ParityRecord | ScoreRecord | LatencyRecord]:
        """The parts that the check has, by name."""
        named = {"parity": self.parity, "score": self.score, "latency": self.latency}
        return {name: part for name, part in named.items() if part is not None}

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(jsonable(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CheckRecord:
        """What `to_json` wrote."""
        return typed(json.loads(text), cls)


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """A library by the name of its module, or a tool by its own."""

    name: str | None = _absent()
    module: str | None = _absent()
    version: str | None = None


@dataclass(frozen=True)
class Environment:
    """Where checks ran: versions, and the GPU present beside the one that `--trt-gpu` named."""

    python: str | None = None
    platform: str | None = None
    numpy: str | None = None
    onnx: str | None = None
    onnxruntime: str | None = None
    tensorrt: Library | None = None
    driver: str | None = None
    gpu: GpuRecord | None = None
    requested_gpu: str | None = None

    def described(self) -> dict[str, str]:
        """All of it in words, by what it is called; what is not known is left out."""
        gpu, tensorrt = self.gpu or GpuRecord(), self.tensorrt or Library()
        capability = f" (compute capability {gpu.compute_capability})" if gpu.compute_capability else ""
        known = {
            "TensorRT": " ".join(filter(None, (tensorrt.module, tensorrt.version))),
            "GPU": f"{gpu.name}{capability}" if gpu.name else None,
            "driver": self.driver,
            "requested GPU": self.requested_gpu,
            "ONNX Runtime": self.onnxruntime,
            "ONNX": self.onnx,
            "NumPy": self.numpy,
            "Python": self.python,
            "platform": self.platform,
        }
        return {name: text for name, text in known.items() if text}


@dataclass(frozen=True)
class MachineRecord:
    """One of the machines whose reports were merged: what it is called there, its report's path, where it ran."""

    name: str
    file: str
    environment: Environment


@dataclass(frozen=True)
class MissingRecord:
    """A test that was to check something and left no record, and why."""

    nodeid: str
    reason: str
    outcome: str | None = None
    """How pytest's test ended: "passed", "failed" or "skipped"; None: it did not end."""
    machine: str | None = _absent()
    """In a merged report, the name of the machine that lacks it."""


@dataclass(frozen=True)
class SystemRecord:
    """One of several systems that the same check was made with; a figure is None where it was not measured."""

    system: str
    nodeid: str
    verdict: Verdict
    metric: str | None = None
    error: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    qps: float | None = None
    memory_mib: float | None = None
    engine_mib: float | None = None
    build_s: float | None = None
    load_ms: float | None = None
    measured: str | None = None
    """What a run's time is, such as "GPU time"."""
    missing: tuple[str, ...] = ()
    """What could not be measured, and why."""


@dataclass(frozen=True)
class ComparisonRecord:
    """Several systems side by side: one test, model and precision, and in a merged report one machine."""

    test: str
    model: str
    precision: str | None
    machine: str | None = _absent()
    systems: tuple[SystemRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All that a JSON report says of a run: its checks by node id, and how many came to each verdict.

    Of reports that were merged, `environment` is what their machines have in common.
    """

    schema_version: int = SCHEMA_VERSION
    tool: Library = Library()
    environment: Environment
    checks: tuple[CheckRecord, ...]
    comparisons: tuple[ComparisonRecord, ...] = _absent(())
    """Of checks that several backends were to run."""
    summary: Mapping[str, int] = field(default_factory=dict)
    planned: int | None = _absent()
    """How many tests were to check something: those of `checks` and those of `missing`."""
    missing: tuple[MissingRecord, ...] = _absent((), beside="planned")
    stopped: str | None = _absent(beside="planned")
    """Why the run ended before every test had run."""
    machines: tuple[MachineRecord, ...] = _absent(())


# --- verdicts --------------------------------------------------------------------------------------------------------


def is_bad(verdict: Verdict) -> bool:
    """Whether somebody has to look: it is neither a pass nor left unmeasured."""
    return verdict not in {"pass", "not_measured"}


def combine(verdicts: list[Verdict]) -> Verdict:
    """The verdict of several: the most severe of them; `not_measured` where there is none."""
    return max(verdicts, key=SEVERITY.index, default="not_measured")


# --- JSON ------------------------------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """`value` as JSON values: records as mappings, every non-finite float as a string, mapping keys as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if is_dataclass(value):
        return {name: jsonable(item) for name, item in _known(value)}
    return value


def _known(record: Any) -> Iterator[tuple[str, Any]]:
    for each in fields(record):
        value = getattr(record, each.name)
        beside = each.metadata.get(_ABSENT)
        if beside is None or value != each.default or (beside and getattr(record, beside) is not None):
            yield each.name, value


def typed(data: Any, kind: type[T]) -> T:
    """JSON values as a record. Keys that are not known here are passed over, those of later versions of the plugin.

    Raises
    ------
    ReportError
        Something is missing or of another kind; the message says where.
    """
    import msgspec

    try:
        # Not strict: "inf" is a number, where a number is wanted.
        return msgspec.convert(data, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ReportError(str(error)) from None


def number(value: float | str | None) -> float | None:
    """A number as it stands in JSON ("inf" and "nan" are strings there) as a float again."""
    return None if value is None else float(value)
