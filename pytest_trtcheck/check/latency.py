"""Is the engine fast and small enough? Samples are taken until every budget is decided or the time is up."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pytest_trtcheck import baselines, latency
from pytest_trtcheck import gpu as gpus
from pytest_trtcheck.check.baseline import key_of
from pytest_trtcheck.errors import UnsupportedTargetError
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.gpu.state import GpuMonitor, clocks_record, disturbances, family, held_back, while_running
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.latency.load import PLATEAU, WINDOW_S, best, sweep
from pytest_trtcheck.record import BudgetRecord, Conditions, LatencyDetails, LatencyRecord
from pytest_trtcheck.spec import LatencySpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Backend, Built, Runner, TimedRuns
    from pytest_trtcheck.baselines import LatencyBaseline
    from pytest_trtcheck.check.request import Known, Settings
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.gpu.state import GpuState
    from pytest_trtcheck.latency.load import LoadRuns
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.record import LoadRecord

T = TypeVar("T")
WARM_UP_S = 0.2
"""As trtexec warms up: by time, so that clocks have risen whatever the engine's size."""
ENQUEUE_SHARE = 0.95
"""Where the host takes longer to hand over the work than the GPU to do it, the GPU waits between the events: its time
is the host's and a little more. So trtexec's rule (the host takes longer) would miss most of it."""
MOST_INPUTS = 64
"""Cases that are used in turn, each with device memory of its own: a data set of thousands would not fit."""
CLIENT_BOUND = 0.8
"""Of a core: from here on it may be the client, one process of Python, that answers are slow to come by."""
_CHUNK_MS = 50.0
_SHOWN_SAMPLES = 500


COSTS = ("memory_mib", "engine_mib", "load_ms", "build_s")
"""The budgets on what a system takes beside time."""
COMPARED = LatencySpec(max_seconds=3.0)
"""How systems are measured that are compared, where no `trt_latency` says how."""
_LOADS, _LOAD_S = (15, 30, 60), 20.0
"""How often an engine is loaded again before its median is looked at, and for how many seconds at the most."""


@dataclass(frozen=True)
class Rival:
    """What `min_speedup` compares with: a system, what it runs, what that is in words, and what it was loaded from."""

    system: Backend
    runner: Runner
    title: str
    built: Built


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Parameters
    ----------
    system
        What measures engines.
    engine
        The engine, loaded.
    cases
        Inputs of equal shapes, used in turn.
    costs
        What is known without measuring, by the marker's argument.
    slower
        What `min_speedup` compares with, by its name there.
    conditions
        Under what it is measured (`conditions_of`), for the record.
    is_enough
        Whether samples, in ms, at a confidence, are enough for the baseline; None where there is none to serve.
    load_again
        Loads the engine once more, where loading has a budget.
    is_compared
        Whether its median and p99 are wanted whatever the budgets.
    """

    system: Backend
    engine: Runner
    cases: Sequence[Case]
    costs: Mapping[str, float] = field(default_factory=dict)
    slower: Mapping[str, Rival] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=Conditions)
    is_enough: Callable[[latency.Series, float], bool] | None = None
    load_again: Callable[[], Runner] | None = None
    is_compared: bool = False


@dataclass(frozen=True)
class Budgets:
    """The limits that hold for one GPU, by the marker's argument; `keys` says which key of a mapping applied."""

    limits: Mapping[str, float]
    keys: Mapping[str, str]

    @property
    def speedups(self) -> dict[str, float]:
        """The factors of `min_speedup`, by what is to be slower."""
        pattern = re.compile(r"min_speedup\[(.*)\]")
        return {found[1]: limit for name, limit in self.limits.items() if (found := pattern.fullmatch(name))}

    def without(self, names: Collection[str]) -> Budgets:
        """The others."""
        return replace(self, limits={name: limit for name, limit in self.limits.items() if name not in names})

    @property
    def quantiles(self) -> dict[str, float]:
        """The limits on quantiles, in ms."""
        return {name: limit for name, limit in self.limits.items() if name in latency.QUANTILES}


def budgets_for(spec: LatencySpec, model: GpuModel | None, extra: Sequence[GpuModel]) -> Budgets:
    """What of `spec` applies to a GPU; where nobody knows which one it is, what holds for any."""
    limits: dict[str, float] = {}
    keys: dict[str, str] = {}
    for name, budget in {**spec.budgets(), **spec.speedups()}.items():
        if not isinstance(budget, Mapping):
            limits[name] = float(budget)
        elif (found := gpus.pick(budget, model, extra)) is not None:
            keys[name], limits[name] = found[0], float(found[1])
    return Budgets(limits, keys)


def judge(
    settings: Settings,
    known: Known,
    spec: LatencySpec,
    load: Callable[[str], Rival],
    load_again: Callable[[], Runner],
) -> LatencyRecord:
    """Measure a check's engine and judge it by the budgets of the GPU and by the baseline.

    Parameters
    ----------
    load
        Loads what `min_speedup` names.
    load_again
        Loads the engine itself once more, for `load_ms`.

    Raises
    ------
    GpuError
        An engine failed, or the GPU was not to be had in time.
    """
    system = known.running
    # Of a machine that is not this one, only what was said of it is known.
    model = settings.judged_gpu() if system.gpu else settings.requested
    budgets = budgets_for(spec, model, settings.extra_gpus)
    no_budget = _no_budget(known, spec, model)
    needs_none = settings.baselines is not None or known.request.parity.is_compared
    refusal = _why_not(settings, known, spec) or (None if budgets.limits or needs_none else no_budget)
    product = model.product if model else None
    if known.runner is None or refusal is not None:
        limits = latency.unmeasured(budgets.limits, refusal)
        return LatencyRecord("not_measured", refusal, product, budgets=limits)
    shapes = {name: array.shape for name, array in known.cases[0].items()}
    same = (case for case in known.cases if {name: array.shape for name, array in case.items()} == shapes)
    alike = list(islice(same, MOST_INPUTS))
    conditions = conditions_of(system.gpu, next(iter(system.versions().items())), shapes)
    baseline = _baseline(settings, known)
    costs = known.record.costs or {}
    unmeasured = dict.fromkeys(set(COSTS) & set(budgets.limits) - set(costs), f"{system.title} does not tell it")
    with ExitStack() as opened:
        rivals: dict[str, Rival] = {}
        for name in budgets.speedups:
            try:
                rivals[name] = load(name)
                opened.enter_context(closing(rivals[name].runner))
            except UnsupportedTargetError as error:
                unmeasured[f"min_speedup[{name}]"] = error.message
        budgets = budgets.without(unmeasured)
        if not budgets.limits and not needs_none:
            return _with_unmeasured(LatencyRecord("not_measured", None, product), unmeasured)
        subject = Subject(
            system,
            known.runner,
            alike,
            costs,
            rivals,
            conditions,
            is_enough=_is_enough(settings, known, baseline, conditions),
            load_again=load_again if "load_ms" in budgets.limits else None,
            is_compared=known.request.parity.is_compared,
        )
        record = measure(subject, spec, budgets, system.gpu, model)
    if not record.budgets and settings.baselines is None:
        record = replace(record, verdict="not_measured", reason=no_budget)
    if settings.baselines is not None and system.gpu is not None:
        record = baselines.judge(record, baseline, model_sha256=known.model.sha256, updating=settings.update_baselines)
    return _with_unmeasured(record, unmeasured)


def _why_not(settings: Settings, known: Known, spec: LatencySpec) -> str | None:
    """Why nothing is measured here, whatever the budgets."""
    system = known.running
    if known.runner is None or system.gpu_ran is False:
        named = settings.requested.product if settings.requested else None
        return f"no {named or 'GPU'} in this machine" if settings.detected is None else "no engine ran"
    if not system.is_timed:
        return f"{system.title} is not timed"
    if spec.instances > 1 and not system.takes_instances:
        return f"{system.title} is not measured with {spec.instances} instances at once"
    return None


def _no_budget(known: Known, spec: LatencySpec, model: GpuModel | None) -> str:
    """What is said where no budget holds."""
    if known.request.latency is None:
        return "no budget was asked for: measured to compare systems alone"
    if not spec.budgets() and not spec.speedups():
        return "trt_latency names no budget, and there is no baseline to compare with (--trt-baseline=DIR)"
    return f"no budget for {model.product if model else 'a GPU that is not known; name it with --trt-gpu'}"


def _baseline(settings: Settings, known: Known) -> LatencyBaseline | None:
    if settings.baselines is None or known.running.gpu is None:
        return None
    return settings.baselines.find(key_of(known)).latency


def _is_enough(
    settings: Settings, known: Known, baseline: LatencyBaseline | None, conditions: Conditions
) -> Callable[[latency.Series, float], bool] | None:
    """Whether samples are enough for a baseline, where there is one to serve."""
    if settings.update_baselines:
        return functools.partial(baselines.enough, baseline=None)
    if baseline and not baselines.differences(baseline, LatencyDetails(conditions=conditions), known.model.sha256):
        return functools.partial(baselines.enough, baseline=baseline)
    return None


def _with_unmeasured(record: LatencyRecord, reasons: Mapping[str, str]) -> LatencyRecord:
    """The record with the budgets that nothing here can tell of: they take no part in the verdict of the others."""
    if not reasons:
        return record
    entries = tuple(BudgetRecord("not_measured", name, text=why) for name, why in sorted(reasons.items()))
    budgets = (*record.budgets, *entries)
    if all(entry.verdict == "not_measured" for entry in budgets):
        why = "; ".join(f"{entry.name}: {entry.text}" for entry in budgets)
        record = replace(record, verdict="not_measured", reason=why)
    return replace(record, budgets=budgets)


def conditions_of(gpu: Gpu | None, tensorrt: tuple[str, str], shapes: Mapping[str, Sequence[int]]) -> Conditions:
    """Under what a latency is measured.

    Parameters
    ----------
    tensorrt
        Module and version.
    shapes
        Of the inputs, by name.
    """
    return Conditions(
        **(gpu.conditions() if gpu else {}),
        tensorrt=" ".join(tensorrt),
        input_shapes={name: tuple(shape) for name, shape in sorted(shapes.items())},
    )


def measure(
    subject: Subject, spec: LatencySpec, budgets: Budgets, gpu: Gpu | None, model: GpuModel | None
) -> LatencyRecord:
    """Measure `subject` and judge it.

    Nobody else of ours uses the GPU or server meanwhile. What slowed the GPU in this machine down all the same makes a
    failure inconclusive; nobody watches a GPU elsewhere.

    Raises
    ------
    GpuError
        The engine failed, or the GPU was not to be had in time.
    """
    name = subject.system.lock_name
    with nullcontext() if name is None else gpu_lock(name):
        taken, seen = _watched(subject, spec, budgets, gpu)
    record = latency.to_record(
        taken.samples_ms,
        taken.decision,
        gpu=model.product if model else None,
        disturbances=seen.disturbances,
        remarks=(*seen.held_back, *_remarks(taken.details)),
        clocks=seen.clocks,
        details={
            **taken.details,
            "budget_keys": dict(budgets.keys),
            "conditions": replace(subject.conditions, **seen.conditions),
            "disturbances": seen.disturbances,
            "held_back": seen.held_back,
        },
    )
    return _with_unmeasured(record, taken.incomparable)


@dataclass(frozen=True)
class _Seen:
    """What was seen of a GPU while it was measured on: nothing of one that is not in this machine."""

    disturbances: tuple[str, ...] = ()
    held_back: tuple[str, ...] = ()
    clocks: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)


def _watched(subject: Subject, spec: LatencySpec, budgets: Budgets, gpu: Gpu | None) -> tuple[_Taken, _Seen]:
    if gpu is None:
        subject.system.disturbed(subject.engine)
        taken = _sample(subject, spec, budgets, None)
        return taken, _Seen(subject.system.disturbed(subject.engine))
    with GpuMonitor(gpu) as monitor:
        before = monitor.idle()
        taken = _sample(subject, spec, budgets, monitor.snapshot)
        after = while_running(taken.states, monitor.snapshot(since=before))
        # What came while we measured shows once we are idle again. A pass needs no excuse, a baseline may.
        is_settled = taken.decision.decision == "pass" and subject.is_enough is None
        idle_after = None if is_settled else monitor.idle()
    own = family(process.pid for process in after.processes or ())
    disturbed = disturbances(before, after, own, idle_after)
    return taken, _Seen(tuple(disturbed), tuple(held_back(after)), clocks_record(before, after), after.conditions())


def while_watched(gpu: Gpu, run: Callable[[], T]) -> tuple[T, list[str]]:
    """What `run` gives, and what others did to the GPU meanwhile."""
    with GpuMonitor(gpu) as monitor:
        # What kept it busy a moment ago was our own work.
        before = replace(monitor.snapshot(), utilization_percent=None)
        result = run()
        after = monitor.snapshot(since=before)
    return result, disturbances(before, after, family(process.pid for process in after.processes or ()))


def _remarks(details: Mapping[str, Any]) -> list[str]:
    """What of the measurement makes an engine slower than it need be."""
    found = []
    if details["cuda_graph"] is False:
        found.append(f"without a CUDA graph: {details['cuda_graph_reason']}")
    if details["enqueue_bound"]:
        found.append(
            f"enqueue-bound: the host takes {details['enqueue_p50_ms']:.3g} ms to enqueue a run, and the GPU "
            f"{details['gpu_p50_ms']:.3g} ms to compute it, waiting included"
        )
    return found


@dataclass(frozen=True)
class _Taken:
    samples_ms: latency.Series
    decision: latency.LatencyDecision
    details: Mapping[str, Any]
    states: Sequence[GpuState]
    incomparable: Mapping[str, str] = field(default_factory=dict)
    """Why what was to be slower was not compared, by the budget's name."""


def _sample(
    subject: Subject, spec: LatencySpec, budgets: Budgets, look_at_gpu: Callable[[], GpuState] | None
) -> _Taken:
    quantiles = {latency.QUANTILES[name] for name in budgets.quantiles} | (
        {0.5, 0.99} if subject.is_compared else set()
    )
    others = len(subject.slower) + len({"min_qps", "load_ms"} & set(budgets.limits)) + (subject.is_enough is not None)
    plan = latency.LookPlan(tuple(sorted(quantiles)), others)
    load = subject.system.load_runs(subject.engine, subject.cases)
    one_by_one = budgets if load is None else budgets.without({"min_qps"})
    series = _Runs(transfers=spec.transfers)
    pairs = {name: _Runs(transfers=False) for name in subject.slower}
    several: dict[str, Any] = {"instances": spec.instances} if spec.instances > 1 else {}
    with subject.system.timed_runs(subject.engine, subject.cases, transfers=spec.transfers, **several) as timed:
        _warm_up(timed)
        deadline = time.monotonic() + spec.max_seconds
        look = 1
        states: list[GpuState] = []
        while True:
            series.extend(timed, _chunk(series))
            is_over = time.monotonic() > deadline
            if is_over or plan.is_due(look, len(series), series.total_ms):
                states += [look_at_gpu()] if look_at_gpu else []
                confidence, judged = plan.confidence_at(look), series.judged()
                decision = _decide(series, judged, one_by_one, subject.costs, confidence)
                is_decided = decision.decision != "undecided"
                if is_over or (is_decided and (subject.is_enough is None or subject.is_enough(judged, confidence))):
                    break
                look += 1
        measured, graph, graph_reason = timed.measured, timed.graph, timed.graph_reason
    results, loads_ms = [*decision.results], list[float]()
    if subject.load_again:
        result, loads_ms = _loads(subject.load_again, budgets.limits["load_ms"], confidence)
        results.append(result)
    incomparable: dict[str, str] = {}
    if subject.slower:
        incomparable = _interleave(subject, spec, pairs, series)
        results += _decide_speedups(pairs, budgets.speedups, confidence)
    under_load: dict[str, Any] = {}
    if load is not None:
        with load as runs:
            levels, ended = sweep(runs, spec.max_seconds)
            if "min_qps" in budgets.limits:
                result = _qps_under_load(runs, best(levels), budgets.limits["min_qps"], plan, spec.max_seconds)
                results.append(_undecided_before_the_most(result, ended))
        under_load = {"load": levels, "load_ended": ended}
    decision = latency.combine_decisions(results)
    details = {
        **_details(series, judged.values, measured),
        **under_load,
        "cuda_graph": graph,
        "cuda_graph_reason": graph_reason,
        "distribution": Distribution.of(judged, confidence).to_json(),
        "load_samples_ms": tuple(round(each, 3) for each in loads_ms),
        "instances": spec.instances if spec.instances > 1 else None,
    }
    return _Taken(judged, decision, details, states, incomparable)


class _Runs:
    """Samples of one engine, in the order in which they were taken."""

    def __init__(self, *, transfers: bool) -> None:
        self._transfers = transfers
        self.run_ms: list[float] = []
        self.latency_ms: list[float] = []
        self.enqueue_ms: list[float] = []
        self.intervals_ms: list[float] = []
        self.partner_ms: list[float] = []
        self.total_ms = 0.0

    def __len__(self) -> int:
        return len(self.run_ms)

    def judged(self) -> latency.Series:
        """What budgets speak of: the runs' time, or host latency where transfers were asked for."""
        return latency.Series(self.latency_ms if self._transfers else self.run_ms)

    def extend(self, timed: TimedRuns, count: int) -> None:
        taken = timed.run(count)
        self.run_ms += taken.run_ms.tolist()
        if taken.enqueue_ms is not None:
            self.enqueue_ms += taken.enqueue_ms.tolist()
        if taken.latency_ms is not None:
            self.latency_ms += taken.latency_ms.tolist()
        self.intervals_ms += taken.interval_ms.tolist()
        self.total_ms += float(taken.interval_ms.sum())


def _chunk(series: _Runs) -> int:
    """How many runs fit into one call, so that the deadline is kept."""
    if not len(series):
        return 5
    typical = max(float(np.median(series.run_ms[-50:])), 1e-3)
    return int(min(max(_CHUNK_MS / typical, 5), 2000))


def _warm_up(timed: TimedRuns) -> None:
    until = time.monotonic() + WARM_UP_S
    while time.monotonic() < until:
        timed.run(5)


def _loads(load: Callable[[], Runner], limit_ms: float, confidence: float) -> tuple[latency.BudgetResult, list[float]]:
    """What loading takes, as often as it takes to decide, or as there is time for."""
    deadline = time.monotonic() + _LOAD_S
    each_look = 1 - (1 - confidence) / len(_LOADS)
    found: list[float] = []
    for most in _LOADS:
        while len(found) < most and (not found or time.monotonic() < deadline):
            started = time.perf_counter()
            with closing(load()):
                found.append(1000 * (time.perf_counter() - started))
        result = latency.decide_median("load_ms", found, limit_ms, confidence=each_look)
        if result.decision != "undecided":
            break
    return result, found


def _interleave(subject: Subject, spec: LatencySpec, pairs: Mapping[str, _Runs], series: _Runs) -> dict[str, str]:
    """Measure each slower engine in turns with the subject: what drifts, drifts for both.

    What is measured by another clock is no measure of the subject: the reason why not comes back, by the budget's name.
    """
    incomparable = {}
    for name, rival in subject.slower.items():
        with (
            subject.system.timed_runs(subject.engine, subject.cases) as ours,
            rival.system.timed_runs(rival.runner, subject.cases) as theirs,
        ):
            if theirs.measured != ours.measured:
                why = f"of {rival.title} {theirs.measured} is measured, of the engine {ours.measured}"
                incomparable[f"min_speedup[{name}]"] = why
                continue
            _warm_up(theirs)
            _warm_up(ours)
            own = _Runs(transfers=False)
            deadline = time.monotonic() + spec.max_seconds
            count = min(_chunk(series), 20)
            while len(own) < 400 and time.monotonic() < deadline:
                pairs[name].extend(theirs, count)
                own.extend(ours, count)
            pairs[name].partner_ms = own.run_ms
    return incomparable


def _decide(
    series: _Runs, judged: latency.Series, budgets: Budgets, costs: Mapping[str, float], confidence: float
) -> latency.LatencyDecision:
    elapsed_s = series.total_ms / 1000
    results = [*latency.decide(judged, budgets.quantiles, confidence=confidence, elapsed_s=elapsed_s).results]
    if "min_qps" in budgets.limits:
        results.append(latency.decide_qps(series.intervals_ms, budgets.limits["min_qps"], confidence=confidence))
    for name, cost in costs.items():
        if name in budgets.limits and name != "load_ms":
            results.append(latency.decide_exact(name, cost, budgets.limits[name]))
    return latency.combine_decisions(results)


def _qps_under_load(
    runs: LoadRuns, level: LoadRecord, limit: float, plan: latency.LookPlan, max_seconds: float
) -> latency.BudgetResult:
    """Judge the throughput with as many requests under way as gave most; measured anew, as the best of all flatters."""
    intervals_ms: list[float] = []
    deadline, look, cores, waited_ms = time.monotonic() + max_seconds, 1, 0.0, 0.0
    while True:
        window = runs.run(level.concurrency, WINDOW_S)
        # The wait behind a window's last answer counts: it is one for the first answer of the next.
        fresh_ms = window.interval_ms.copy()
        fresh_ms[:1] += waited_ms
        intervals_ms += fresh_ms.tolist()
        waited_ms = max(0.0, waited_ms + 1000 * window.seconds - float(fresh_ms.sum()))
        cores = max(cores, window.client_cores)
        is_over = time.monotonic() > deadline
        if not is_over and not plan.is_due(look, len(intervals_ms), sum(intervals_ms)):
            continue
        judged_ms = np.array(intervals_ms)
        judged_ms[-1:] += waited_ms
        result = latency.decide_qps(judged_ms, limit, confidence=plan.confidence_at(look))
        if result.decision == "fail" and cores > CLIENT_BOUND:
            slow = f"min_qps is {result.value:.4g} from here, where the client itself takes {cores:.2g} of a core"
            return replace(result, decision="undecided", reason=f"{slow}: the server may answer more")
        if is_over or result.decision != "undecided":
            return result
        look += 1


def _undecided_before_the_most(result: latency.BudgetResult, ended: str) -> latency.BudgetResult:
    """A throughput that is too low decides nothing while more requests at once might bring more."""
    if result.decision != "fail" or ended == PLATEAU:
        return result
    reason = f"min_qps is {result.value:.4g} so far, and may be more with more requests at once: {ended}"
    return replace(result, decision="undecided", reason=reason)


def notes(record: LatencyRecord) -> tuple[str, ...]:
    """What a check says of how its latency was measured."""
    levels = record.details.load
    if not levels:
        return baselines.notes(record)
    shown = "; ".join(
        f"{each.concurrency}: {each.qps:.4g}/s"
        + (f", p50 {each.p50_ms:.4g} ms, p99 {each.p99_ms:.4g} ms" if each.p50_ms and each.p99_ms else "")
        + ("" if each.stable else ", not stable")
        for each in levels
    )
    top = best(levels)
    said = f"under load, by requests at once: {shown}. Most with {top.concurrency}; {record.details.load_ended}"
    if top.client_cores > CLIENT_BOUND:
        said += f"; the client itself took {top.client_cores:.2g} of a core, so the server may answer more"
    return (*baselines.notes(record), said)


def _decide_speedups(
    pairs: Mapping[str, _Runs], limits: Mapping[str, float], confidence: float
) -> Iterator[latency.BudgetResult]:
    for precision, factor in limits.items():
        pair = pairs[precision]
        if pair.partner_ms:
            result = latency.decide_speedup(pair.run_ms, pair.partner_ms, factor, confidence=confidence)
            yield replace(result, name=f"min_speedup[{precision}]")


def _details(series: _Runs, judged: NDArray[np.float64], measured: str) -> dict[str, Any]:
    run_ms = float(np.median(series.run_ms))
    enqueue_ms = float(np.median(series.enqueue_ms)) if series.enqueue_ms else None
    shown = judged[:: max(1, len(judged) // _SHOWN_SAMPLES)][:_SHOWN_SAMPLES]
    return {
        "measured": "latency with transfers" if series.latency_ms else measured,
        "gpu_p50_ms": run_ms,
        "enqueue_p50_ms": enqueue_ms,
        "enqueue_bound": enqueue_ms is not None and enqueue_ms >= ENQUEUE_SHARE * run_ms,
        "qps": 1000.0 * len(series) / series.total_ms,
        "samples_ms": tuple(round(float(value), 6) for value in shown),
    }
