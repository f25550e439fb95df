"""What a GPU was doing while latency was measured, and whether that makes a failing verdict unfair.

Only ever reads: no setting of the card is changed.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.gpu import jetson
from pytest_trtcheck.gpu.nvml import NvmlUnavailableError, find, nvml, read, scaled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from pytest_trtcheck.gpu.device import Gpu

CLOCK_REASONS: Mapping[int, str] = {
    0x001: "gpu_idle",
    0x002: "application_clocks",
    0x004: "power_cap",
    0x008: "hardware_slowdown",
    0x010: "sync_boost",
    0x020: "software_thermal_slowdown",
    0x040: "hardware_thermal_slowdown",
    0x080: "hardware_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}
"""The bits of nvmlDeviceGetCurrentClocksEventReasons. Source: nvml.h, nvmlClocksEventReasons."""

_POLICIES: Mapping[str, int] = {"power": 0, "thermal": 1, "sync_boost": 2, "board_limit": 3, "reliability": 5}
"""Source: nvml.h, nvmlPerfPolicyType."""

_SLOWED: Mapping[str, str] = {
    "hardware_slowdown": "the hardware slowed its clocks down",
    "software_thermal_slowdown": "the driver slowed the clocks down because of the temperature",
    "hardware_thermal_slowdown": "the hardware slowed its clocks down because of the temperature",
    "hardware_power_brake": "an external power brake slowed the clocks down",
    "sync_boost": "another GPU of a sync-boost group held the clocks down",
}
_THROTTLED: Mapping[str, str] = {"thermal": "the temperature", "sync_boost": "sync boost"}

THROTTLED_SHARE = 0.01
"""A throttle that held for less than this share of the measurement is not worth a verdict."""
BUSY_PERCENT = 5
"""NVML samples load coarsely; below this, another process (a desktop, a monitor) does not move a median."""
SAMPLING_S = 1.2
"""Longer than the period over which NVML averages the utilization (1/6 s to 1 s by nvml.h, nvmlUtilization_t)."""
LOW_SHARE = 0.9
"""A clock below this share of the highest one is named."""


@dataclass(frozen=True)
class GpuProcess:
    """A process with a compute context on the GPU. `sm_percent`: its highest load since the snapshot before."""

    pid: int
    name: str | None = None
    memory_bytes: int | None = None
    sm_percent: int | None = None


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """One look at a GPU. Every field is None where the driver does not tell it.

    Parameters
    ----------
    time_us
        Unix time in µs.
    sm_mhz, memory_mhz, max_sm_mhz, max_memory_mhz
        Clocks now, and the highest that the GPU can be set to.
    temperature_c, power_w, power_limit_w, default_power_limit_w
        The limit is the one enforced now; the default is the card's own.
    reasons
        Why the clocks are not higher, in words of `CLOCK_REASONS`.
    throttled_ns
        Since the driver was loaded, how long each policy of power, thermal, sync_boost, board_limit and reliability
        held the clocks down.
    utilization_percent
        The share of the last sampling period (up to 1 s) in which any kernel ran.
    power_mode
        What nvpmodel set on a Jetson, such as "MODE_15W".
    processes
        Processes with a compute context, and any that had load since the snapshot before.
    load_by_process
        Whether the driver tells each process's load.
    """

    time_us: int
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    max_sm_mhz: int | None = None
    max_memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    reasons: tuple[str, ...] | None = None
    throttled_ns: Mapping[str, int] = field(default_factory=dict)
    utilization_percent: int | None = None
    power_mode: str | None = None
    processes: tuple[GpuProcess, ...] | None = None
    load_by_process: bool = False

    def conditions(self) -> dict[str, Any]:
        """What of a measurement's conditions only the measurement shows; what is unknown is left out."""
        told = {"sm_mhz": self.sm_mhz, "power_limit_w": self.power_limit_w, "power_mode": self.power_mode}
        return {name: value for name, value in told.items() if value is not None}


class GpuMonitor:
    """Takes snapshots of one GPU; a context manager that keeps NVML open. Without NVML the snapshots know nothing."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._stack = ExitStack()
        self._library: Any = None
        self._handle: Any = None
        self._whole: Any = None

    def __enter__(self) -> GpuMonitor:
        try:
            library = self._stack.enter_context(nvml())
        except NvmlUnavailableError:
            return self
        self._handle = find(library, self._gpu.uuid)
        if self._handle is not None:
            self._library = library
            # Clocks, power and throttling are the whole card's, also where a MIG slice is measured.
            whole = self._gpu.mig and read(library, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", self._handle)
            self._whole = whole or self._handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._library = None
        self._stack.close()

    def snapshot(self, since: GpuState | None = None) -> GpuState:
        """The GPU's state now. `since`: the snapshot from which on each process's load is wanted."""
        state = replace(self._by_nvml(since), power_mode=jetson.power_mode())
        if state.sm_mhz is not None:
            return state
        sm_mhz, max_sm_mhz = jetson.clock_mhz()
        return replace(state, sm_mhz=sm_mhz, max_sm_mhz=state.max_sm_mhz or max_sm_mhz)

    def idle(self) -> GpuState:
        """The GPU's state while nothing of ours runs on it: what is busy now is another's load.

        Where NVML still tells of load, its sampling period is waited for, so that our own of a moment ago is over.
        """
        until = time.monotonic() + SAMPLING_S
        state = self.snapshot()
        while (state.utilization_percent or 0) >= BUSY_PERCENT and time.monotonic() < until:
            time.sleep(0.1)
            state = self.snapshot()
        return state

    def _by_nvml(self, since: GpuState | None) -> GpuState:
        now_us = time.time_ns() // 1000
        library, whole = self._library, self._whole
        if library is None:
            return GpuState(time_us=now_us)
        bits = read(library, "nvmlDeviceGetCurrentClocksEventReasons", whole)
        if bits is None:  # its name before R535
            bits = read(library, "nvmlDeviceGetCurrentClocksThrottleReasons", whole)
        utilization = read(library, "nvmlDeviceGetUtilizationRates", self._handle)
        # What runs on another slice of the card disturbs nobody on this one.
        load = _load_by_process(library, whole, since.time_us) if since and self._handle is whole else None
        return GpuState(
            time_us=now_us,
            sm_mhz=read(library, "nvmlDeviceGetClockInfo", whole, library.NVML_CLOCK_SM),
            memory_mhz=read(library, "nvmlDeviceGetClockInfo", whole, library.NVML_CLOCK_MEM),
            max_sm_mhz=read(library, "nvmlDeviceGetMaxClockInfo", whole, library.NVML_CLOCK_SM),
            max_memory_mhz=read(library, "nvmlDeviceGetMaxClockInfo", whole, library.NVML_CLOCK_MEM),
            temperature_c=read(library, "nvmlDeviceGetTemperature", whole, library.NVML_TEMPERATURE_GPU),
            power_w=scaled(read(library, "nvmlDeviceGetPowerUsage", whole), 1e-3),
            power_limit_w=scaled(read(library, "nvmlDeviceGetEnforcedPowerLimit", whole), 1e-3),
            default_power_limit_w=scaled(read(library, "nvmlDeviceGetPowerManagementDefaultLimit", whole), 1e-3),
            reasons=None if bits is None else decode_reasons(bits),
            throttled_ns=_throttled_ns(library, whole),
            utilization_percent=None if utilization is None else utilization.gpu,
            processes=_processes(library, self._handle, load),
            load_by_process=load is not None,
        )


def decode_reasons(bits: int) -> tuple[str, ...]:
    """The bit mask of clock event reasons in words; an unknown bit keeps its number."""
    words = [CLOCK_REASONS.get(bit, f"reason_{bit:#x}") for i in range(bits.bit_length()) if (bit := 1 << i) & bits]
    return tuple(words)


def while_running(states: Sequence[GpuState], last: GpuState) -> GpuState:
    """Looks at a GPU during a measurement as one state: the last one, with every reason and the median clock seen."""
    seen = [state.reasons for state in (*states, last) if state.reasons is not None]
    clocks = sorted(state.sm_mhz for state in states if state.sm_mhz is not None)
    return replace(
        last,
        reasons=tuple(dict.fromkeys(reason for reasons in seen for reason in reasons)) if seen else None,
        sm_mhz=clocks[len(clocks) // 2] if clocks else last.sm_mhz,
    )


def disturbances(
    before: GpuState, after: GpuState, own_pids: Iterable[int] = (), idle_after: GpuState | None = None
) -> list[str]:
    """Why a latency measured between two snapshots may be too high through no fault of the engine.

    - The clocks were slowed down by temperature, hardware protection, an external power brake or another GPU, while
      the engine ran: what was so before it excuses nothing.
    - The power cap was active while the limit is set below the card's default. The cap alone is no disturbance: under
      load many cards (a T4, a laptop) always run at it, and so they will where the engine is used. The same goes for
      the board's current limit and for the reliability voltage, which caps the clocks of a healthy card at its top.
    - The GPU was busy while nothing of ours ran on it, whoever may be listed.
    - Another process kept the GPU busy meanwhile. Where neither the load by process nor that of the idle GPU is known,
      a process that is not ours counts.

    Parameters
    ----------
    before
        Taken before the warm-up, when nothing of ours runs (`GpuMonitor.idle`).
    after
        What was seen during the measurement (`while_running`), taken with `since=before`.
    own_pids
        Processes that belong to this test run, besides this one (`family`).
    idle_after
        Taken some time after the measurement, when nothing of ours runs.
    """
    reasons = set(after.reasons or ())
    found = [text for reason, text in _SLOWED.items() if reason in reasons]
    elapsed_ns = max(1, (after.time_us - before.time_us) * 1000)
    for policy, cause in _THROTTLED.items():
        held = after.throttled_ns.get(policy, 0) - before.throttled_ns.get(policy, 0)
        if policy in before.throttled_ns and held > THROTTLED_SHARE * elapsed_ns:
            found.append(f"{cause} held the clocks down for {min(1.0, held / elapsed_ns):.0%} of the measurement")
    if "power_cap" in reasons and _is_lowered(after):
        limit, default = after.power_limit_w, after.default_power_limit_w
        found.append(f"the power limit is set to {limit:.0f} W (the card's default is {default:.0f} W) and was reached")
    own = {os.getpid(), *own_pids}
    for state, when in ((before, "before the measurement began"), (idle_after, "after the measurement")):
        if state is not None and (state.utilization_percent or 0) >= BUSY_PERCENT:
            holders = ", ".join(_label(process) for process in state.processes or () if process.pid not in own)
            who = f" (it is held by {holders})" if holders else ""
            found.append(f"the GPU was {state.utilization_percent} % busy {when}, with nothing of ours running{who}")
    found += _others(before, after, own)
    return found


def family(pids: Iterable[int], environ: Mapping[str, str] = os.environ) -> set[int]:
    """Those processes that belong to this test run: this one, what it started, and pytest-xdist's other workers.

    Under xdist every worker is started by the process that started this one.
    """
    heads = {os.getpid()}
    if "PYTEST_XDIST_WORKER" in environ:
        heads.add(os.getppid())
    return {pid for pid in pids if not heads.isdisjoint(_line(pid))}


def held_back(state: GpuState, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What makes a GPU slower than it can be although nothing disturbs it, by whoever set it up: "SM clock 585 of 1590
    MHz".
    """
    found = []
    # A clock is low for a reason, where the driver tells one.
    why = ", ".join(reason for reason in state.reasons or () if reason != "gpu_idle")
    for what, now, highest in (
        ("SM clock", state.sm_mhz, state.max_sm_mhz),
        ("memory clock", state.memory_mhz, state.max_memory_mhz),
    ):
        if now is not None and highest is not None and now < LOW_SHARE * highest:
            found.append(f"{what} {now} of {highest} MHz" + (f" ({why})" if why else ""))
    if _is_lowered(state):
        found.append(f"power limit {state.power_limit_w:.0f} of {state.default_power_limit_w:.0f} W")
    if state.power_mode is not None:
        found.append(f"nvpmodel {state.power_mode}")
    share = environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "")
    if share and share != "100":
        found.append(f"MPS gives {share} % of the multiprocessors")
    if environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        found.append("CUDA_LAUNCH_BLOCKING=1 makes the host wait for each kernel")
    if tool := environ.get("CUDA_INJECTION64_PATH"):
        found.append(f"{Path(tool).name} is loaded into CUDA (CUDA_INJECTION64_PATH), as profilers are")
    return found


def _is_lowered(state: GpuState) -> bool:
    limit, default = state.power_limit_w, state.default_power_limit_w
    return limit is not None and default is not None and limit < 0.99 * default


def _line(pid: int) -> Iterator[int]:
    """A process and those that it descends from, as far as the system tells."""
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        yield pid
        seen.add(pid)
        # The fields behind the name, which may hold spaces and parentheses: state, parent, … (man 5 proc).
        fields = jetson.read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
        if len(fields) < 2:
            return
        pid = int(fields[1])


def clocks_record(before: GpuState, after: GpuState) -> dict[str, Any]:
    """Both snapshots for a latency record: plain numbers, words and lists, unknown fields left out."""

    def known(state: GpuState) -> dict[str, Any]:
        values = asdict(state)
        if state.processes is not None:
            values["processes"] = [
                {key: value for key, value in asdict(process).items() if value is not None}
                for process in state.processes
            ]
        return {key: value for key, value in values.items() if value not in (None, {}) and key != "load_by_process"}

    return {"before": known(before), "after": known(after)}


def _others(before: GpuState, after: GpuState, own: set[int]) -> Iterator[str]:
    if after.processes is None:
        return
    others = [process for process in after.processes if process.pid not in own]
    if len(others) == len(after.processes) and others:
        # We hold a context and yet are not listed: inside a container the driver may list process ids of the host, so
        # one of these is us. The busiest, since it is we who measured.
        others.remove(max(others, key=lambda process: (process.sm_percent or 0, process.memory_bytes or 0)))
    if not others:
        return
    if after.load_by_process:
        for process in others:
            if (process.sm_percent or 0) >= BUSY_PERCENT:
                yield f"another process used the GPU: {_label(process)} kept up to {process.sm_percent} % of it busy"
    elif before.utilization_percent is None:
        yield f"other processes hold the GPU and may have been busy: {', '.join(map(_label, others))}"


def _label(process: GpuProcess) -> str:
    return f"pid {process.pid} ({process.name})" if process.name else f"pid {process.pid}"


def _throttled_ns(library: Any, whole: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for policy, number in _POLICIES.items():
        status = read(library, "nvmlDeviceGetViolationStatus", whole, number)
        if status is not None:
            found[policy] = int(status.violationTime)
    return found


def _load_by_process(library: Any, whole: Any, since_us: int) -> dict[int, int] | None:
    try:
        samples = library.nvmlDeviceGetProcessUtilization(whole, since_us)
    except library.NVMLError as error:
        # "Not found" means that no process had any load since then; anything else that the driver cannot tell.
        return {} if error.value == library.NVML_ERROR_NOT_FOUND else None
    load: dict[int, int] = {}
    for sample in samples:
        # Some drivers return samples of other times, and loads that are no percentage.
        if sample.timeStamp > since_us and sample.smUtil <= 100:
            load[sample.pid] = max(load.get(sample.pid, 0), int(sample.smUtil))
    return load


def _processes(library: Any, handle: Any, load: Mapping[int, int] | None) -> tuple[GpuProcess, ...] | None:
    listed = read(library, "nvmlDeviceGetComputeRunningProcesses", handle)
    if listed is None and load is None:
        return None
    memory = {int(process.pid): process.usedGpuMemory for process in listed or ()}
    busy = [pid for pid, percent in (load or {}).items() if percent > 0]
    return tuple(
        GpuProcess(pid, _process_name(library, pid), memory.get(pid), None if load is None else load.get(pid, 0))
        for pid in sorted({*memory, *busy})
    )


def _process_name(library: Any, pid: int) -> str | None:
    """The program's name without its path and arguments, which are nobody's business in a report."""
    path = read(library, "nvmlSystemGetProcessName", pid)
    if path:
        return str(path).split()[0].rsplit("/", 1)[-1]
    return jetson.read_text(Path(f"/proc/{pid}/comm")).strip() or None
