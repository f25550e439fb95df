"""Is the engine fast and small enough? Samples are taken until every budget is decided or the time is up."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import gpu as gpus
from pytest_trtcheck import latency
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.gpu.state import GpuMonitor, clocks_record, disturbances, family, held_back, while_running
from pytest_trtcheck.latency.baselines.comparison import Distribution
from pytest_trtcheck.record import Conditions, LatencyRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.timing import TimedRun
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.gpu.state import GpuState
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.spec import LatencySpec

WARM_UP_S = 0.2
"""As trtexec warms up: by time, so that clocks have risen whatever the engine's size."""
ENQUEUE_SHARE = 0.95
"""Where the host takes longer to hand over the work than the GPU to do it, the GPU waits between the events: its time
is the host's and a little more. So trtexec's rule (the host takes longer) would miss most of it."""
_CHUNK_MS = 50.0
_SHOWN_SAMPLES = 500


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Parameters
    ----------
    engine
        The engine, loaded.
    cases
        Inputs of equal shapes, used in turn.
    slower
        For `min_speedup`: the engines of the other precisions, by precision.
    conditions
        Under what it is measured (`latency.conditions_of`), for the record.
    is_enough
        Whether samples, in ms, at a confidence, are enough for the baseline; None where there is none to serve.
    """

    engine: Engine
    cases: Sequence[Case]
    slower: Mapping[str, Engine]
    conditions: Conditions = field(default_factory=Conditions)
    is_enough: Callable[[NDArray[np.float64], float], bool] | None = None


@dataclass(frozen=True)
class Budgets:
    """The limits that hold for one GPU, by the marker's argument; `keys` says which key of a mapping applied."""

    limits: Mapping[str, float]
    keys: Mapping[str, str]

    @property
    def quantiles(self) -> dict[str, float]:
        """The limits on quantiles, in ms."""
        return {name: limit for name, limit in self.limits.items() if name in latency.QUANTILES}


def budgets_for(spec: LatencySpec, model: GpuModel, extra: Sequence[GpuModel]) -> Budgets:
    """What of `spec` applies to a GPU."""
    limits: dict[str, float] = {}
    keys: dict[str, str] = {}
    for name, budget in spec.budgets().items():
        if not isinstance(budget, Mapping):
            limits[name] = float(budget)
        elif (found := gpus.pick(budget, model, extra)) is not None:
            keys[name], limits[name] = found[0], float(found[1])
    return Budgets(limits, keys)


def not_measured(reason: str, gpu: str | None) -> LatencyRecord:
    """Latency that was not measured, and why."""
    return LatencyRecord("not_measured", reason, gpu)


def measure(subject: Subject, spec: LatencySpec, budgets: Budgets, gpu: Gpu, model: GpuModel) -> LatencyRecord:
    """Measure `subject` on the GPU in this machine and judge it.

    Nobody else of ours uses the GPU meanwhile. What slowed it down all the same makes a failure inconclusive.

    Raises
    ------
    GpuError
        The engine failed, or the GPU was not to be had in time.
    """
    with gpu_lock(gpu.lock_name), GpuMonitor(gpu) as monitor:
        before = monitor.idle()
        taken = _sample(subject, spec, budgets, monitor.snapshot)
        after = while_running(taken.states, monitor.snapshot(since=before))
        # What came while we measured shows once we are idle again. A pass needs no excuse, a baseline may.
        is_settled = taken.decision.decision == "pass" and subject.is_enough is None
        idle_after = None if is_settled else monitor.idle()
    judged = taken.samples_ms
    own = family(process.pid for process in after.processes or ())
    disturbed = disturbances(before, after, own, idle_after)
    limits = held_back(after)
    record = latency.to_record(
        latency.summarize(judged),
        taken.decision,
        gpu=model.product,
        disturbances=disturbed,
        remarks=(*limits, *_remarks(taken.details)),
        clocks=clocks_record(before, after),
        details={
            **taken.details,
            "budget_keys": dict(budgets.keys),
            # What of a measurement's conditions only the measurement shows.
            "conditions": replace(
                subject.conditions,
                sm_mhz=after.sm_mhz,
                power_limit_w=after.power_limit_w,
                power_mode=after.power_mode,
            ),
            "disturbances": tuple(disturbed),
            "held_back": tuple(limits),
        },
    )
    return replace(record, samples=len(judged))


def _remarks(details: Mapping[str, Any]) -> list[str]:
    """What of the measurement makes an engine slower than it need be."""
    found = []
    if not details["cuda_graph"]:
        found.append(f"without a CUDA graph: {details['cuda_graph_reason']}")
    if details["enqueue_bound"]:
        found.append(
            f"enqueue-bound: the host takes {details['enqueue_p50_ms']:.3g} ms to enqueue a run, and the GPU "
            f"{details['gpu_p50_ms']:.3g} ms to compute it, waiting included"
        )
    return found


@dataclass(frozen=True)
class _Taken:
    samples_ms: NDArray[np.float64]
    decision: latency.LatencyDecision
    details: Mapping[str, Any]
    states: Sequence[GpuState]


def _sample(subject: Subject, spec: LatencySpec, budgets: Budgets, look_at_gpu: Callable[[], GpuState]) -> _Taken:
    quantiles = tuple(latency.QUANTILES[name] for name in budgets.quantiles)
    others = len(subject.slower) + ("min_qps" in budgets.limits) + (subject.is_enough is not None)
    plan = latency.LookPlan(quantiles, others)
    series = _Series(transfers=spec.transfers)
    pairs = {name: _Series(transfers=False) for name in subject.slower}
    decide = functools.partial(_decide, series, pairs, spec, budgets, sizes=_sizes_mib(subject.engine))
    with subject.engine.timed_runs(subject.cases, transfers=spec.transfers) as timed:
        _warm_up(timed)
        deadline = time.monotonic() + spec.max_seconds
        look = 1
        states = []
        while True:
            series.extend(timed, _chunk(series))
            if plan.is_due(look, len(series), series.total_ms):
                states.append(look_at_gpu())
                confidence = plan.confidence_at(look)
                decided = decide(confidence=confidence).decision != "undecided"
                if decided and (subject.is_enough is None or subject.is_enough(series.judged_ms, confidence)):
                    break
                look += 1
            if time.monotonic() > deadline:
                states.append(look_at_gpu())
                break
        graph, graph_reason = timed.graph, timed.graph_reason
    if subject.slower:
        _interleave(subject, spec, pairs, series)
    confidence = plan.confidence_at(look)
    details = {
        **_details(series, graph=graph, graph_reason=graph_reason),
        "distribution": Distribution.of(series.judged_ms, confidence).to_json(),
    }
    return _Taken(series.judged_ms, decide(confidence=confidence), details, states)


def _sizes_mib(engine: Engine) -> dict[str, float]:
    """What is known without measuring, by the marker's argument."""
    return {"memory_mib": engine.device_memory_bytes / 2**20, "engine_mib": engine.plan_bytes / 2**20}


class _Series:
    """Samples of one engine, in the order in which they were taken."""

    def __init__(self, *, transfers: bool) -> None:
        self._transfers = transfers
        self.gpu_ms: list[float] = []
        self.latency_ms: list[float] = []
        self.enqueue_ms: list[float] = []
        self.intervals_ms: list[float] = []
        self.partner_ms: list[float] = []
        self.total_ms = 0.0

    def __len__(self) -> int:
        return len(self.gpu_ms)

    @property
    def judged_ms(self) -> NDArray[np.float64]:
        """What budgets speak of: GPU time, or host latency where transfers were asked for."""
        return np.array(self.latency_ms if self._transfers else self.gpu_ms)

    def extend(self, timed: TimedRun, count: int) -> None:
        taken = timed.run(count)
        self.gpu_ms += taken.gpu_ms.tolist()
        self.enqueue_ms += taken.enqueue_ms.tolist()
        if taken.latency_ms is not None:
            self.latency_ms += taken.latency_ms.tolist()
        self.intervals_ms += taken.interval_ms.tolist()
        self.total_ms += float(taken.interval_ms.sum())


def _chunk(series: _Series) -> int:
    """How many runs fit into one call, so that the deadline is kept."""
    if not len(series):
        return 5
    typical = max(float(np.median(series.gpu_ms[-50:])), 1e-3)
    return int(min(max(_CHUNK_MS / typical, 5), 2000))


def _warm_up(timed: TimedRun) -> None:
    until = time.monotonic() + WARM_UP_S
    while time.monotonic() < until:
        timed.run(5)


def _interleave(subject: Subject, spec: LatencySpec, pairs: Mapping[str, _Series], series: _Series) -> None:
    """Measure each slower engine in turns with the subject: what drifts, drifts for both."""
    for name, engine in subject.slower.items():
        with (
            subject.engine.timed_runs(subject.cases) as ours,
            engine.timed_runs(subject.cases) as theirs,
        ):
            _warm_up(theirs)
            _warm_up(ours)
            own = _Series(transfers=False)
            deadline = time.monotonic() + spec.max_seconds
            count = min(_chunk(series), 20)
            while len(own) < 400 and time.monotonic() < deadline:
                pairs[name].extend(theirs, count)
                own.extend(ours, count)
            pairs[name].partner_ms = own.gpu_ms


def _decide(
    series: _Series,
    pairs: Mapping[str, _Series],
    spec: LatencySpec,
    budgets: Budgets,
    *,
    sizes: Mapping[str, float],
    confidence: float,
) -> latency.LatencyDecision:
    elapsed_s = series.total_ms / 1000
    decided = latency.decide(series.judged_ms, budgets.quantiles, confidence=confidence, elapsed_s=elapsed_s)
    judgements = list(decided.judgements)
    if "min_qps" in budgets.limits:
        judgements.append(latency.decide_qps(series.intervals_ms, budgets.limits["min_qps"], confidence=confidence))
    for name, size in sizes.items():
        if name in budgets.limits:
            judgements.append(latency.decide_exact(name, size, budgets.limits[name]))
    for precision, factor in (spec.min_speedup or {}).items():
        pair = pairs.get(precision)
        if pair is not None and pair.partner_ms:
            judgement = latency.decide_speedup(
                np.array(pair.gpu_ms), np.array(pair.partner_ms), factor, confidence=confidence
            )
            judgements.append(replace(judgement, name=f"min_speedup[{precision}]"))
    return latency.combine_decisions(judgements)


def _details(series: _Series, *, graph: bool, graph_reason: str | None) -> dict[str, Any]:
    gpu_ms, enqueue_ms = float(np.median(series.gpu_ms)), float(np.median(series.enqueue_ms))
    judged = series.judged_ms
    shown = judged[:: max(1, len(judged) // _SHOWN_SAMPLES)][:_SHOWN_SAMPLES]
    return {
        "measured": "latency with transfers" if series.latency_ms else "GPU time",
        "cuda_graph": graph,
        "cuda_graph_reason": graph_reason,
        "gpu_p50_ms": gpu_ms,
        "enqueue_p50_ms": enqueue_ms,
        "enqueue_bound": enqueue_ms >= ENQUEUE_SHARE * gpu_ms,
        "qps": 1000.0 * len(series) / series.total_ms,
        "samples_ms": tuple(round(float(value), 6) for value in shown),
    }
