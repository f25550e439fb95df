"""A whole measurement and what its verdict says, on a GPU that is not there.

Simulated are the engine's clock (`Engine`) and NVML (`fake_nvml`): neighbours, throttles, locked clocks and a slow host
cannot be had on a development machine. `tests/gpu/test_fairness.py` does what a real GPU allows.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from pytest_trtcheck.backends.tensorrt.cuda import Cuda
from pytest_trtcheck.backends.tensorrt.timing import Run, overlapped
from pytest_trtcheck.check import latency as measure
from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.gpu import find_gpu
from pytest_trtcheck.gpu.device import Gpu
from pytest_trtcheck.latency.samples import Samples
from pytest_trtcheck.record import CheckRecord, Conditions, LatencyRecord
from pytest_trtcheck.spec import LatencySpec
from tests import fake_nvml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.backends.base import Backend, Built, Runner

T4 = find_gpu("T4")


@dataclass
class Runs:
    """Runs of 1 ms, evenly noisy; `ran` counts them."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    run_ms: float = 1.0
    enqueue_ms: float = 0.1
    gap_ms: float = 0.0
    graph_reason: str | None = None
    ran: int = 0

    measured = "GPU time"

    @property
    def graph(self) -> bool:
        return self.graph_reason is None

    def run(self, n: int) -> Samples:
        self.ran += n
        gpu_ms = self.run_ms * (1 + 0.003 * self.random.normal(size=n))
        return Samples(gpu_ms, np.full(n, self.enqueue_ms), None, gpu_ms + self.gap_ms)


class Simulated:
    """A system as far as measuring needs one: its engines are their runs."""

    def load_runs(self, *_: Any) -> None:
        """One run comes after the other."""

    lock_name = f"GPU-simulated-{os.getpid()}"

    @contextmanager
    def timed_runs(self, engine: Runs, *_: Any, **__: Any) -> Iterator[Runs]:
        yield engine


class Machine:
    """One T4 by NVML, idle and alone with us unless told otherwise, and an engine on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = Runs()
        self.told: dict[str, Any] = {
            "ClockInfo": lambda kind: {1: 1590, 2: 5001}[kind],
            "MaxClockInfo": lambda kind: {1: 1590, 2: 5001}[kind],
            "EnforcedPowerLimit": 70_000,
            "PowerManagementDefaultLimit": 70_000,
            "CurrentClocksEventReasons": 0,
            "UtilizationRates": SimpleNamespace(gpu=0),
            "ComputeRunningProcesses": (),
        }
        self._monkeypatch = monkeypatch

    def measure(self, is_enough: Any = None, slower: Any = None, **budgets: Any) -> LatencyRecord:
        uuid = f"GPU-simulated-{os.getpid()}"
        fake_nvml.install(self._monkeypatch, [fake_nvml.card("Tesla T4", uuid, (7, 5), **self.told)])
        gpu = Gpu(name="Tesla T4", model=T4, compute_capability=(7, 5), uuid=uuid)
        spec = LatencySpec(**{"max_seconds": 1.0, **budgets})
        sizes = {"memory_mib": 1.0, "engine_mib": 1.0}
        system, runs = cast("Backend", Simulated()), cast("Runner", self.runs)
        subject = measure.Subject(system, runs, [{}], sizes, slower or {}, Conditions(gpu="Tesla T4"), is_enough)
        record = measure.measure(subject, spec, measure.budgets_for(spec, T4, ()), gpu, T4)
        CheckRecord("n", "m", record.verdict, latency=record).to_json()
        return record

    def while_running(self, then: Any, otherwise: Any) -> Any:
        """What NVML tells of a run that is going on, and before."""
        return lambda *_: then if self.runs.ran else otherwise


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


TOO_SLOW = {"p50_ms": 0.5}


def test_a_calm_measurement_passes_and_fails_as_it_should(machine: Machine) -> None:
    assert (machine.measure(p50_ms=1.2).verdict, machine.measure(p50_ms=1.2).reason) == ("pass", None)
    failed = machine.measure(**TOO_SLOW)
    assert failed.verdict == "fail"
    assert failed.reason is not None
    assert failed.reason.endswith("over the limit of 0.5"), "and nothing else: nothing held it back"
    assert failed.details.disturbances == failed.details.held_back == ()


@pytest.mark.parametrize("listed", ["nobody", "us", "unsupported"])
def test_a_neighbour_that_nobody_lists_is_no_fail_of_ours(machine: Machine, listed: str) -> None:
    us = (SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**30),)
    processes = {"nobody": (), "us": us, "unsupported": fake_nvml.NVMLError(fake_nvml.NOT_SUPPORTED)}
    machine.told |= {
        "UtilizationRates": SimpleNamespace(gpu=98),
        "ComputeRunningProcesses": processes[listed],
        "ProcessUtilization": fake_nvml.NVMLError(fake_nvml.NOT_FOUND),
    }
    found = machine.measure(**TOO_SLOW)
    assert found.verdict == "inconclusive"
    assert "the GPU was 98 % busy before the measurement began, with nothing of ours running" in str(found.reason)
    assert machine.measure(p50_ms=1.2).verdict == "pass", "a neighbour makes nothing faster"


def test_a_neighbour_that_comes_while_we_measure(machine: Machine) -> None:
    machine.told["UtilizationRates"] = machine.while_running(SimpleNamespace(gpu=98), SimpleNamespace(gpu=0))
    found = machine.measure(**TOO_SLOW)
    assert found.verdict == "inconclusive"
    assert "98 % busy after the measurement" in str(found.reason)


def test_a_neighbour_that_comes_while_a_baseline_is_served(machine: Machine) -> None:
    machine.told["UtilizationRates"] = machine.while_running(SimpleNamespace(gpu=98), SimpleNamespace(gpu=0))
    assert machine.measure(p50_ms=1.2).details.disturbances == (), "a pass needs no excuse, and no time for it"
    machine.runs = Runs()
    (found,) = machine.measure(p50_ms=1.2, is_enough=lambda *_: True).details.disturbances
    assert "98 % busy after the measurement" in found


def test_our_own_load_of_a_moment_ago_excuses_nothing(machine: Machine) -> None:
    until = time.monotonic() + 0.4
    machine.told["UtilizationRates"] = lambda: SimpleNamespace(gpu=97 if time.monotonic() < until else 0)
    assert machine.measure(**TOO_SLOW).verdict == "fail"


def test_a_sibling_worker_excuses_nothing_and_a_neighbour_does(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = SimpleNamespace(pid=os.getppid(), smUtil=60, timeStamp=2**62)
    ours = SimpleNamespace(pid=os.getpid(), usedGpuMemory=2**30)
    machine.told |= {"ProcessUtilization": lambda _: [sample], "ComputeRunningProcesses": (ours,)}
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    found = machine.measure(**TOO_SLOW)
    assert found.verdict == "inconclusive"
    assert f"pid {os.getppid()}" in str(found.reason)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert machine.measure(**TOO_SLOW).verdict == "fail"


def test_a_throttle_counts_while_the_engine_runs_and_not_before(machine: Machine) -> None:
    hot = 0x40
    machine.told["CurrentClocksEventReasons"] = machine.while_running(0, hot)
    assert machine.measure(**TOO_SLOW).verdict == "fail"
    machine.runs = Runs()
    machine.told["CurrentClocksEventReasons"] = machine.while_running(hot, 0)
    found = machine.measure(**TOO_SLOW)
    assert found.verdict == "inconclusive"
    assert "because of the temperature" in str(found.reason)


def test_locked_clocks_and_a_lowered_cap_are_named_and_excuse_nothing(machine: Machine) -> None:
    machine.told |= {
        "ClockInfo": lambda kind: {1: 585, 2: 5001}[kind],
        "CurrentClocksEventReasons": 0x2,
        "EnforcedPowerLimit": 60_000,
    }
    found = machine.measure(**TOO_SLOW)
    assert found.verdict == "fail"
    assert str(found.reason).endswith("; SM clock 585 of 1590 MHz (application_clocks); power limit 60 of 70 W")
    assert found.details.held_back == ("SM clock 585 of 1590 MHz (application_clocks)", "power limit 60 of 70 W")
    assert found.details.conditions == Conditions("Tesla T4", sm_mhz=585, power_limit_w=60.0)
    assert found.clocks["after"]["sm_mhz"] == 585


def test_the_clock_of_the_running_engine_is_recorded(machine: Machine) -> None:
    clocks = iter([300] + [1500] * 1000)
    machine.told["ClockInfo"] = lambda kind: next(clocks) if kind == 1 else 5001
    found = machine.measure(p50_ms=1.2)
    assert found.details.conditions is not None
    assert found.details.conditions.sm_mhz == 1500


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_why_there_was_no_cuda_graph(machine: Machine, verdict: str) -> None:
    machine.runs.graph_reason = "the capture failed: operation not permitted"
    found = machine.measure(p50_ms=0.5 if verdict == "fail" else 1.0)
    assert found.verdict == verdict
    assert "; without a CUDA graph: the capture failed: operation not permitted" in str(found.reason)
    machine.runs.graph_reason = None
    assert "CUDA graph" not in str(machine.measure(**TOO_SLOW).reason)


@pytest.mark.parametrize(("enqueue_ms", "bound"), [(0.3, False), (0.8, False), (0.99, True), (1.4, True)])
def test_an_engine_that_the_host_holds_up_is_said_to_be_enqueue_bound(
    machine: Machine, enqueue_ms: float, bound: bool
) -> None:
    machine.runs.enqueue_ms = enqueue_ms
    found = machine.measure(**TOO_SLOW)
    text = f"enqueue-bound: the host takes {enqueue_ms:.3g} ms to enqueue a run, and the GPU 1 ms to compute it"
    assert (text in str(found.reason)) == bound
    assert found.details.enqueue_bound is bound


def test_throughput_counts_what_lies_between_the_runs(machine: Machine) -> None:
    machine.runs.gap_ms = 1.0
    found = machine.measure(min_qps=800.0)
    assert found.verdict == "fail"
    assert found.details.qps == pytest.approx(500, rel=0.01)


def test_time_over_is_inconclusive_and_says_what_is_missing(machine: Machine) -> None:
    found = machine.measure(p50_ms=1.0)
    assert found.verdict == "inconclusive"
    assert "too close to the limit of 1 to tell" in str(found.reason)
    assert found.verdict == found.budgets[0].verdict


# --- several at once, faster than another system, loading ----------------------------------------------------------


class Stream:
    """An instance on a simulated GPU, whose runs take `run_ms` each, one behind the other."""

    def __init__(self, clock: list[float], run_ms: float) -> None:
        self.clock, self.run_ms = clock, run_ms
        self.queue: list[float] = []
        self.busy_until = 0.0

    @property
    def has_room(self) -> bool:
        return len(self.queue) < 2

    def put(self) -> None:
        self.busy_until = max(self.busy_until, self.clock[0]) + self.run_ms
        self.queue.append(self.busy_until)

    def take(self) -> Run | None:
        # Every look costs host time.
        self.clock[0] += 0.001
        if not self.queue or self.queue[0] > self.clock[0]:
            return None
        end_ms = self.queue.pop(0)
        return Run(end_ms, self.run_ms, self.run_ms, 0.01)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_several_instances_are_kept_at_work_all_the_time(count: int) -> None:
    clock = [0.0]
    lanes = [Stream(clock, run_ms=1.0 + 0.1 * index) for index in range(count)]
    since_ms, runs = overlapped(lanes, 200, timeout_s=10.0)
    assert len(runs) == 200
    assert runs == sorted(runs)
    assert since_ms == pytest.approx(lanes[-1].run_ms, abs=0.1), "once the slowest has ended its first run"
    intervals = np.diff([run.end_ms for run in runs], prepend=since_ms)
    qps = 1000 * len(intervals) / intervals.sum()
    assert qps == pytest.approx(sum(1000 / lane.run_ms for lane in lanes), rel=0.03), "each counts in full"
    shares = [sum(run.run_ms == lane.run_ms for run in runs) for lane in lanes]
    assert shares == sorted(shares, reverse=True), "a slow one holds no other up"


@pytest.mark.parametrize(("count", "run_ms", "n"), [(8, 10.0, 5), (4, 20.0, 5), (8, 1.0, 50)])
def test_instances_that_end_their_runs_together_count_in_full(count: int, run_ms: float, n: int) -> None:
    # What is asked for is no multiple of them: of their last runs some would count, with the time of all.
    random, seconds, counted = np.random.default_rng(0), 0.0, 0
    for _ in range(20):
        clock = [0.0]
        lanes = [Stream(clock, run_ms * (1 + 0.005 * random.random())) for _ in range(count)]
        since_ms, runs = overlapped(lanes, n, timeout_s=10.0)
        seconds, counted = seconds + (runs[-1].end_ms - since_ms) / 1000, counted + len(runs)
    assert counted / seconds == pytest.approx(1000 * count / run_ms, rel=0.03)


def test_an_instance_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "hangs", False)
    clock = [0.0]
    hung = Stream(clock, run_ms=1e9)
    with pytest.raises(GpuError, match=r"has not finished within 0\.05 s") as failed:
        overlapped([hung], 10, timeout_s=0.05)
    assert failed.value.poisoned


def rival_of(runs: Runs, title: str) -> measure.Rival:
    return measure.Rival(cast("Backend", Simulated()), cast("Runner", runs), title, cast("Built", None))


@pytest.mark.parametrize(("factor", "verdict"), [(1.8, "pass"), (2.2, "fail")])
def test_a_slower_double_of_another_system(machine: Machine, factor: float, verdict: str) -> None:
    rival = rival_of(Runs(run_ms=2.0), "a double")
    found = machine.measure(slower={"torch": rival}, min_speedup={"torch": factor})
    assert found.verdict == verdict
    (budget,) = found.budgets
    assert budget.name == "min_speedup[torch]"
    assert budget.value == pytest.approx(2.0, rel=0.01)


def test_another_clock_is_no_measure(machine: Machine) -> None:
    slow = Runs(run_ms=2.0)
    slow.measured = "host time"
    rival = rival_of(slow, "a service")
    found = machine.measure(slower={"torch": rival}, min_speedup={"torch": 1.1})
    assert found.verdict == "not_measured"
    assert found.reason == "min_speedup[torch]: of a service host time is measured, of the engine GPU time"
    found = machine.measure(slower={"torch": rival}, min_speedup={"torch": 1.1}, p50_ms=1.2)
    assert (found.verdict, [each.verdict for each in found.budgets]) == ("pass", ["pass", "not_measured"])


def test_factors_by_gpu(machine: Machine) -> None:
    rival = rival_of(Runs(run_ms=2.0), "a double")
    found = machine.measure(slower={"fp32": rival}, min_speedup={"fp32": {"T4": 2.5, "default": 1.1}})
    assert (found.verdict, found.details.budget_keys) == ("fail", {"min_speedup[fp32]": "T4"})
    spec = LatencySpec(min_speedup={"fp32": {"A100": 2.5}})
    assert measure.budgets_for(spec, T4, ()).speedups == {}


@pytest.mark.parametrize(
    ("limit", "decision", "loads"), [(50.0, "pass", 15), (0.5, "fail", 15), (2.0, "undecided", 60), (2.02, "pass", 30)]
)
def test_loads_until_their_median_is_decided(
    monkeypatch: pytest.MonkeyPatch, limit: float, decision: str, loads: int
) -> None:
    clock, random = [0.0], np.random.default_rng(0)
    told = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0])
    monkeypatch.setattr(measure, "time", told)

    def load() -> Any:
        clock[0] += 0.002 * random.normal(1.0, 0.02)
        return SimpleNamespace(close=lambda: None)

    found, taken = measure._loads(load, limit, 0.99)
    assert (found.decision, len(taken)) == (decision, loads)
    assert found.value == pytest.approx(2.0, rel=0.02)
    slow, few = measure._loads(lambda: (clock.__setitem__(0, clock[0] + 15.0), load())[1], limit, 0.99)
    assert len(few) == 2, "no more than there is time for"
    assert slow.decision == "undecided"
