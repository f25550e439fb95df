"""What was built, loaded or served, and from what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_trtcheck.errors import listed, plural
from pytest_trtcheck.record.common import Verdict, absent


@dataclass(frozen=True)
class LayerRecord:
    """A layer of an engine, by the engine inspector; what it takes, by TensorRT's profiler.

    What a field tells is not told everywhere: a layer may name no ONNX node, and one that was never timed has no time.
    """

    name: str
    kind: str | None = absent()
    """TensorRT's word for it, such as "CaskConvolution"."""
    precision: str | None = absent()
    """What it computes in, as `EngineRecord.layers_by_precision` counts it."""
    nodes: tuple[str, ...] = absent(())
    """The ONNX nodes in it that do arithmetic; where that is not known, those whose names say of no conversion."""
    moves: tuple[str, ...] = absent(())
    """Those that only move, convert or choose values."""
    time_ms: float | None = absent()
    """The median of what it took in a run, beside others that were timed too."""
    bounds_ms: tuple[float, float] | None = absent()
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
    layers: tuple[LayerRecord, ...] = absent(())
    """Every layer, in the order of the engine, as far as the engine inspector tells."""
    layers_untimed: str | None = absent()
    """Why the layers have no times, where they were to be timed."""
    sha256: str | None = None
    """Of the serialized engine: two builds of one key need not be the same bytes."""
    aux_streams: int | None = absent()
    """The CUDA streams that the loaded engine uses beside its own."""
    streamed_bytes: int | None = absent()
    """How many bytes of the weights are streamed from host memory, where that was asked for."""
    cache: Literal["hit", "remote", "miss"] | None = absent()
    """Where it was found: in the local cache, in the shared one, or nowhere, so that it was built."""
    build_notes: tuple[str, ...] = absent(())
    """What the builder had to say of what was asked for."""
    source: Literal["file"] | None = absent()
    """Where it came from, if it was not built: `engine=` named a file."""
    file: str | None = absent(beside="source")
    """The path, as it was named."""
    built_by: str | None = absent(beside="source")
    """The TensorRT that built it, with the version where the file tells it."""
    built_for: tuple[str, ...] = absent((), beside="source")
    """The compute capabilities that it was compiled for, as far as the file tells, such as "8.6"."""
    proved: bool | None = absent(beside="source")
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
    subgraphs: tuple[int, ...] = absent(())
    """How many nodes each subgraph has that it compiled; none of a provider that runs node by node."""
    elsewhere: tuple[NodeRecord, ...] = ()
    """The nodes that other providers compute."""
    shapes_on_cpu: int = 0
    """Further nodes, on the CPU, that compute from shapes alone."""
    kernels: Mapping[str, int] | None = absent()
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
    keep_fp32: tuple[str, ...] = absent(())
    exclude: tuple[str, ...] = absent(())
    """What was named to be left out, of all and of quantizing."""


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
    errors: Mapping[str, Mapping[str, float]] | None = absent()
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

    Each of `samples` was fed by itself; `rows` is how many rows they have together, where some are batches.

    Of `Calibration(method="auto")`, `held_out` is the number of samples that each method was judged on, and `errors`
    has the relative L2 error of each output by method, such as "percentile 99.9".
    """

    method: str
    percentile: float | None
    samples: int
    held_out: int | None = absent()
    errors: Mapping[str, Mapping[str, float]] | None = absent()
    sha256: str | None = absent()
    """Of every byte of the samples used, with the names, types and shapes of the inputs."""
    rows: int | None = absent()
    inputs: Mapping[str, CoverageRecord] | None = absent()
    """What the samples hold of each input of numbers, and what of the check's inputs they do not cover."""
