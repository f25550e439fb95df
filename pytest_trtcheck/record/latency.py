"""What measuring time found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_trtcheck.record.baseline import GpuRecord
from pytest_trtcheck.record.common import Verdict, absent


@dataclass(frozen=True)
class BudgetRecord:
    """One budget: its limit, what was measured, and the confidence bounds; in ms where it is on a quantile."""

    verdict: Verdict
    name: str | None = absent()
    quantile: str | None = absent()
    limit: float | None = absent()
    value: float | None = absent(beside="limit")
    lower: float | None = absent(beside="limit")
    upper: float | None = absent(beside="limit")
    limit_ms: float | None = absent()
    value_ms: float | None = absent(beside="limit_ms")
    lower_ms: float | None = absent(beside="limit_ms")
    upper_ms: float | None = absent(beside="limit_ms")
    baseline_p50_ms: float | None = absent()
    ratio: float | None = absent()
    text: str | None = absent()


@dataclass(frozen=True)
class Conditions:
    """Under what a latency was measured; `tensorrt` is module and version, the clocks are None where not told."""

    gpu: str | None = absent()
    compute_capability: str | None = absent()
    driver: str | None = absent(beside="gpu")
    tensorrt: str | None = absent()
    input_shapes: Mapping[str, tuple[int, ...]] | None = absent()
    sm_mhz: int | None = absent()
    power_limit_w: float | None = absent()
    power_mode: str | None = absent()

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

    mean_ms: float | None = absent()
    min_ms: float | None = absent()
    max_ms: float | None = absent()
    measured: str | None = absent()
    instances: int | None = absent()
    """How many ran at once, where it was more than one."""
    load_samples_ms: tuple[float, ...] = absent(())
    """What loading it took, again and again, where `load_ms` has a budget."""
    cuda_graph: bool | None = absent()
    cuda_graph_reason: str | None = absent(beside="cuda_graph")
    gpu_p50_ms: float | None = absent()
    enqueue_p50_ms: float | None = absent()
    enqueue_bound: bool | None = absent()
    qps: float | None = absent()
    samples_ms: tuple[float, ...] = absent(())
    distribution: Mapping[str, Any] | None = absent()
    """`latency.distribution.Distribution` reads it."""
    load: tuple[LoadRecord, ...] = absent(())
    """Of a server: by the number of requests at once, 1, 2, 4, …"""
    load_ended: str | None = absent()
    """Why no more of them were tried."""
    budget_keys: Mapping[str, str] | None = absent()
    conditions: Conditions | None = absent()  # noqa: RUF009 - it is a field
    disturbances: tuple[str, ...] = absent((), beside="conditions")
    held_back: tuple[str, ...] = absent((), beside="conditions")


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
