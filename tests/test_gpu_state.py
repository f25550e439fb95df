"""What a snapshot of the GPU says about the fairness of a measurement, and the lock that keeps it fair."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.gpu import find_gpu, jetson
from pytest_trtcheck.gpu.device import Gpu
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.gpu.state import (
    CLOCK_REASONS,
    GpuMonitor,
    GpuProcess,
    GpuState,
    clocks_record,
    decode_reasons,
    disturbances,
    family,
    held_back,
    while_running,
)
from pytest_trtcheck.record import CheckRecord, LatencyRecord
from tests import fake_nvml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ME = os.getpid()
OURS = GpuProcess(ME, "pytest", sm_percent=99)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0, ()),
        (0x4, ("power_cap",)),
        (0x61, ("gpu_idle", "software_thermal_slowdown", "hardware_thermal_slowdown")),
        (0x1000, ("reason_0x1000",)),
    ],
)
def test_decode_reasons(bits: int, words: tuple[str, ...]) -> None:
    assert decode_reasons(bits) == words


def test_decode_reasons_knows_every_bit_once() -> None:
    assert decode_reasons(sum(CLOCK_REASONS)) == tuple(CLOCK_REASONS.values())


def _states(**after: Any) -> tuple[GpuState, GpuState]:
    """Two snapshots, 2 s apart, of a GPU that is alone with us and not slowed down; `after` changes the second."""
    before = GpuState(time_us=1_000_000, reasons=("gpu_idle",), throttled_ns={"thermal": 10**9}, utilization_percent=0)
    calm = GpuState(
        time_us=3_000_000,
        reasons=(),
        throttled_ns={"thermal": 10**9},
        processes=(OURS,),
        load_by_process=True,
        power_limit_w=300.0,
        default_power_limit_w=300.0,
    )
    return before, replace(calm, **after)


def test_a_calm_gpu_disturbs_nothing() -> None:
    assert disturbances(*_states()) == []
    assert disturbances(GpuState(time_us=0), GpuState(time_us=1)) == [], "a GPU that tells nothing"


@pytest.mark.parametrize("reason", ["power_cap", "application_clocks", "gpu_idle", "display_clocks"])
def test_what_is_normal_under_load_is_no_disturbance(reason: str) -> None:
    assert disturbances(*_states(reasons=(reason,))) == []


@pytest.mark.parametrize(
    ("after", "match"),
    [
        ({"reasons": ("hardware_slowdown",)}, "hardware slowed"),
        ({"reasons": ("software_thermal_slowdown",)}, "temperature"),
        ({"reasons": ("hardware_thermal_slowdown",)}, "temperature"),
        ({"reasons": ("hardware_power_brake",)}, "power brake"),
        ({"reasons": ("sync_boost",)}, "sync-boost"),
        ({"throttled_ns": {"thermal": 10**9 + 5 * 10**8}}, "25% of the measurement"),
        ({"reasons": ("power_cap",), "power_limit_w": 200.0}, "200 W"),
        ({"processes": (OURS, GpuProcess(4, "train", sm_percent=40))}, r"pid 4 \(train\) kept up to 40 %"),
    ],
)
def test_disturbances(after: dict[str, Any], match: str) -> None:
    (found,) = disturbances(*_states(**after))
    assert re.search(match, found), found


def test_throttling_that_ended_before_the_measurement_does_not_count() -> None:
    assert disturbances(*_states(throttled_ns={"thermal": 10**9 + 10**6})) == [], "1 ms of 2 s"


def test_a_throttle_seen_only_before_the_warm_up_excuses_nothing() -> None:
    before, after = _states()
    assert disturbances(replace(before, reasons=("hardware_thermal_slowdown",)), after) == []


def test_a_throttle_seen_once_while_the_engine_ran_counts() -> None:
    before, after = _states(sm_mhz=210)
    looks = [replace(after, sm_mhz=mhz, reasons=reasons) for mhz, reasons in ((1590, ()), (1200, ()), (1200, ("x",)))]
    looks.append(replace(after, reasons=("hardware_thermal_slowdown",), sm_mhz=None))
    seen = while_running(looks, after)
    assert (seen.reasons, seen.sm_mhz) == (("x", "hardware_thermal_slowdown"), 1200)
    (found,) = disturbances(before, seen)
    assert "temperature" in found
    assert while_running([], after) == after


def test_idle_processes_do_not_disturb() -> None:
    idle = GpuProcess(4, "notebook", memory_bytes=10**9, sm_percent=0)
    assert disturbances(*_states(processes=(OURS, idle))) == []


def test_our_own_other_processes_do_not_disturb() -> None:
    worker = GpuProcess(4, "python", sm_percent=70)
    assert disturbances(*_states(processes=(OURS, worker)), own_pids=[4]) == []
    assert disturbances(*_states(processes=(OURS, worker)))


def test_process_ids_of_the_host_inside_a_container() -> None:
    # We measured and are not listed: one of the processes is us, under another number.
    us = GpuProcess(70001, None, sm_percent=95)
    assert disturbances(*_states(processes=(us,))) == []
    assert disturbances(*_states(processes=(us, GpuProcess(70002, None, sm_percent=1)))) == []
    assert disturbances(*_states(processes=(us, GpuProcess(70002, None, sm_percent=50))))


def test_without_load_by_process_the_idle_gpu_decides() -> None:
    before, after = _states(processes=(OURS, GpuProcess(4, "train")), load_by_process=False)
    assert disturbances(before, after) == []
    (found,) = disturbances(replace(before, utilization_percent=None), after)
    assert "pid 4 (train)" in found
    (found,) = disturbances(replace(before, utilization_percent=30, processes=after.processes), after)
    assert "30 % busy" in found
    assert found.endswith("(it is held by pid 4 (train))")


@pytest.mark.parametrize("processes", [None, (), (OURS,)], ids=["unknown", "none", "ours"])
@pytest.mark.parametrize("load_by_process", [True, False])
def test_a_busy_gpu_is_disturbed_whoever_is_listed(processes: Any, load_by_process: bool) -> None:
    before, after = _states(processes=processes, load_by_process=load_by_process)
    assert disturbances(before, after) == []
    before = replace(before, utilization_percent=98)
    assert disturbances(before, after) == [
        "the GPU was 98 % busy before the measurement began, with nothing of ours running"
    ]
    later = GpuState(time_us=9_000_000, utilization_percent=98)
    (found,) = disturbances(replace(before, utilization_percent=0), after, idle_after=later)
    assert found == "the GPU was 98 % busy after the measurement, with nothing of ours running"


# Whose processes.


def _spawn(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)


def test_what_we_started_is_ours_and_a_neighbour_is_not() -> None:
    code = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    with _spawn(code) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        try:
            assert family({ME, child.pid, grandchild, 1, os.getppid(), 2**30}, {}) == {ME, child.pid, grandchild}
            worker = family({ME, child.pid, os.getppid()}, {"PYTEST_XDIST_WORKER": "gw0"})
            assert worker == {ME, child.pid, os.getppid()}
        finally:
            os.kill(grandchild, signal.SIGKILL)
            child.kill()


def test_workers_of_one_run_are_a_family() -> None:
    # Two workers of one controller, and a program that is none of its.
    controller = """
        import os, subprocess, sys, time
        code = "import sys; from pytest_trtcheck.gpu.state import family; print(family({int(sys.argv[1])}))"
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        worker = [sys.executable, "-c", code, str(sleeper.pid)]
        for environ in ({"PYTEST_XDIST_WORKER": "gw1"}, {}):
            environ = {**{k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}, **environ}
            print(bool(eval(subprocess.run(worker, capture_output=True, text=True, env=environ).stdout)), flush=True)
        sleeper.kill()
    """
    with _spawn(controller) as process:
        assert process.communicate(timeout=60)[0].split() == ["True", "False"]


# What holds a GPU back.


def test_low_clocks_a_lowered_power_cap_and_a_power_mode_are_named() -> None:
    state = GpuState(
        time_us=0,
        sm_mhz=585,
        max_sm_mhz=1590,
        memory_mhz=5001,
        max_memory_mhz=5001,
        power_limit_w=60.0,
        default_power_limit_w=70.0,
        reasons=("gpu_idle", "application_clocks"),
        power_mode="MODE_15W",
    )
    environ = {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50",
        "CUDA_LAUNCH_BLOCKING": "1",
        "CUDA_INJECTION64_PATH": "/opt/nsys/libToolsInjection64.so",
    }
    assert held_back(state, environ) == [
        "SM clock 585 of 1590 MHz (application_clocks)",
        "power limit 60 of 70 W",
        "nvpmodel MODE_15W",
        "MPS gives 50 % of the multiprocessors",
        "CUDA_LAUNCH_BLOCKING=1 makes the host wait for each kernel",
        "libToolsInjection64.so is loaded into CUDA (CUDA_INJECTION64_PATH), as profilers are",
    ]
    assert held_back(replace(state, memory_mhz=405), {})[1] == "memory clock 405 of 5001 MHz (application_clocks)"


def test_a_gpu_at_its_ordinary_clocks_is_not_held_back() -> None:
    state = GpuState(time_us=0, sm_mhz=1500, max_sm_mhz=1590, power_limit_w=70.0, default_power_limit_w=70.0)
    assert held_back(state, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100", "CUDA_LAUNCH_BLOCKING": "0"}) == []
    assert held_back(GpuState(time_us=0), {}) == []


def _jetson(root: Path) -> None:
    """The files of an Orin NX in its 15 W mode, as Jetson Linux has them."""
    for path, text in {
        "var/lib/nvpmodel/status": "pmode:0002\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\nA B 1\n< POWER_MODEL ID=2 NAME=MODE_15W >\n",
        "sys/class/devfreq/13e10000.host1x/cur_freq": "1\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "612000000\n",
        "sys/class/devfreq/17000000.gpu/available_frequencies": "306000000 612000000 918000000\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_a_jetson_s_mode_and_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (jetson.power_mode(tmp_path), jetson.clock_mhz(tmp_path)) == (None, (None, None))
    _jetson(tmp_path)
    assert jetson.power_mode(tmp_path) == "MODE_15W"
    assert jetson.clock_mhz(tmp_path) == (306, 918)
    monkeypatch.setattr(jetson, "ROOT", tmp_path)
    fake_nvml.install(monkeypatch, [{"Name": "Orin", "UUID": "1"}])
    with GpuMonitor(Gpu(name="Orin", model=find_gpu("Orin"), compute_capability=(8, 7), uuid="GPU-1")) as monitor:
        state = monitor.snapshot()
    assert held_back(state, {}) == ["SM clock 306 of 918 MHz", "nvpmodel MODE_15W"]
    told = {"Name": "Orin", "UUID": "1", "ClockInfo": lambda _: 900, "MaxClockInfo": lambda _: 918}
    fake_nvml.install(monkeypatch, [told])
    with GpuMonitor(Gpu(name="Orin", model=find_gpu("Orin"), compute_capability=(8, 7), uuid="GPU-1")) as monitor:
        assert held_back(monitor.snapshot(), {}) == ["nvpmodel MODE_15W"], "also where NVML tells clocks"
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert jetson.power_mode(tmp_path) == "mode 2"


# Idle for one sampling period.


def _watched(monkeypatch: pytest.MonkeyPatch, readings: Callable[[], int]) -> GpuMonitor:
    one = fake_nvml.card("Tesla T4", "GPU-1", (7, 5), UtilizationRates=lambda: SimpleNamespace(gpu=readings()))
    fake_nvml.install(monkeypatch, [one])
    return GpuMonitor(Gpu(name="Tesla T4", model=find_gpu("T4"), compute_capability=(7, 5), uuid="GPU-1"))


def test_our_own_load_of_a_moment_ago_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # NVML still averages over what we ran; half a second later it does not.
    until = time.monotonic() + 0.5
    with _watched(monkeypatch, lambda: 97 if time.monotonic() < until else 0) as monitor:
        assert monitor.idle().utilization_percent == 0


def test_a_neighbour_s_load_does_not_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with _watched(monkeypatch, lambda: 98) as monitor:
        assert monitor.idle().utilization_percent == 98
    assert time.monotonic() - began >= 1.0, "a whole sampling period of NVML"


def test_an_idle_gpu_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with _watched(monkeypatch, lambda: 0) as monitor:
        monitor.idle()
    assert time.monotonic() - began < 0.5


def test_clocks_record_goes_into_the_json_report() -> None:
    before, after = _states(sm_mhz=1980, power_w=412.5)
    record = clocks_record(before, after)
    assert record["after"]["sm_mhz"] == 1980
    assert record["after"]["processes"] == [{"pid": ME, "name": "pytest", "sm_percent": 99}]
    assert "memory_mhz" not in record["after"]
    CheckRecord("n", "m", "pass", latency=LatencyRecord("pass", clocks=record)).to_json()


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_a_monitor_without_nvml_knows_nothing() -> None:
    gpu = Gpu(name="NVIDIA T4", model=find_gpu("T4"), compute_capability=(7, 5), uuid="GPU-0")
    with GpuMonitor(gpu) as monitor:
        state = monitor.snapshot()
        assert replace(monitor.snapshot(since=state), time_us=0) == GpuState(time_us=0)


# The lock. Other processes, since threads of one process would not show what the kernel does.

HOLDER = """
    import sys, time
    from pathlib import Path
    from pytest_trtcheck.gpu.lock import gpu_lock
    with gpu_lock("GPU-1", 20, directory=Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of GPU-1."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_process_at_a_time_has_a_gpu(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(GpuError, match=r"another process held the GPU or server GPU-1 for 0\.05 s"),
        gpu_lock("GPU-1", 0.05, directory=tmp_path),
    ):
        pytest.fail("held twice")
    with gpu_lock("GPU-2", 0.05, directory=tmp_path):
        pass


def test_a_killed_process_frees_its_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with gpu_lock("GPU-1", 5, directory=tmp_path):
        pass


def test_lock_files_serve_every_user(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        with gpu_lock("MIG-GPU-1/7/0", 1, directory=tmp_path):
            pass
    finally:
        os.umask(umask)
    (file,) = tmp_path.iterdir()
    assert (file.name, stat.S_IMODE(file.stat().st_mode)) == ("pytest-trtcheck-MIG-GPU-1_7_0.lock", 0o644)
    with pytest.raises(GpuError, match="cannot be used"), gpu_lock("GPU-1", 1, directory=file / "under"):
        pytest.fail("no directory")


AS_ACCOUNT = """
    import fcntl, os, sys
    from pathlib import Path
    from pytest_trtcheck.errors import GpuError
    from pytest_trtcheck.gpu.lock import gpu_lock
    os.setuid(int(sys.argv[2]))
    os.umask(0o077)
    try:
        with gpu_lock("GPU-1", float(sys.argv[3]), directory=Path(sys.argv[1])):
            print("held", flush=True)
            sys.stdin.read()
    except GpuError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can act as two accounts")
@pytest.mark.parametrize("accounts", [(65534, 0), (0, 65534), (65533, 65534)])
def test_two_accounts_take_turns(accounts: tuple[int, int]) -> None:
    """In a directory as /tmp is, where the kernel and filelock refuse what another account owns."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o1777)

        def started(account: int, timeout_s: float) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", textwrap.dedent(AS_ACCOUNT), name, str(account), str(timeout_s)]
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        first, second = accounts
        with started(first, 5) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert "another process held the GPU or server GPU-1" in started(second, 0.1).communicate()[0]
            holder.communicate()
        for account in (second, first):
            assert started(account, 5).communicate()[0] == "held\n"


def test_a_lock_file_that_was_replaced_is_noticed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (file,) = tmp_path.iterdir()
    file.unlink()
    with gpu_lock("GPU-1", 1, directory=tmp_path):
        assert file.exists()
