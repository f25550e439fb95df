"""What a snapshot of the GPU says about the fairness of a measurement, and the lock that keeps it fair."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.gpu import find_gpu
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
)
from pytest_trtcheck.record import CheckRecord, LatencyRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def test_a_throttle_seen_only_in_the_first_snapshot_counts() -> None:
    before, after = _states()
    assert disturbances(replace(before, reasons=("hardware_thermal_slowdown",)), after)


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
    for percent in (None, 30):
        (found,) = disturbances(replace(before, utilization_percent=percent), after)
        assert "pid 4 (train)" in found


def test_without_any_processes_the_idle_gpu_decides() -> None:
    before, after = _states(processes=None, load_by_process=False)
    assert disturbances(before, after) == []
    assert disturbances(replace(before, utilization_percent=80), after) == [
        "the GPU was 80 % busy before the measurement began"
    ]


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
        pytest.raises(GpuError, match=r"another process held the GPU GPU-1 for 0\.05 s"),
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
    assert (file.name, stat.S_IMODE(file.stat().st_mode)) == ("pytest-trtcheck-MIG-GPU-1_7_0.lock", 0o666)
    with pytest.raises(GpuError, match="cannot be used"), gpu_lock("GPU-1", 1, directory=file / "under"):
        pytest.fail("no directory")
