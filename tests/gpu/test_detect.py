"""Detection, snapshots and the load of other processes, on a real GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.gpu import builtin_models, device, find_gpu
from pytest_trtcheck.gpu.device import Gpu, detect, identity_parts, require_match
from pytest_trtcheck.gpu.state import (
    BUSY_PERCENT,
    LOW_SHARE,
    SAMPLING_S,
    GpuMonitor,
    clocks_record,
    disturbances,
    family,
    held_back,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.gpu


def test_detection_agrees_with_nvidia_smi(real_gpu: Gpu) -> None:
    if real_gpu.mig or real_gpu.uuid is None:
        pytest.skip("nvidia-smi lists whole GPUs")
    query = ["nvidia-smi", f"--id={real_gpu.uuid}", "--format=csv,noheader,nounits"]
    fields = "--query-gpu=name,compute_cap,memory.total,driver_version,clocks.max.sm"
    name, capability, memory_mib, driver, max_sm = (
        text.strip()
        for text in subprocess.run([*query, fields], capture_output=True, text=True, check=True).stdout.split(",")
    )
    assert real_gpu.name == name
    assert device.capability_text(real_gpu.compute_capability) == capability
    assert real_gpu.driver == driver
    assert real_gpu.max_sm_mhz == int(max_sm)
    assert real_gpu.memory_bytes is not None
    assert real_gpu.memory_bytes == pytest.approx(int(memory_mib) * 2**20, rel=0.01)


def test_detection_agrees_with_the_cuda_driver(real_gpu: Gpu) -> None:
    probed = device._told_by_cuda(os.environ, ())
    assert not isinstance(probed, str), probed
    assert (probed.name, probed.uuid) == (real_gpu.name, real_gpu.uuid)
    assert probed.compute_capability == real_gpu.compute_capability
    assert probed.model == real_gpu.model
    assert probed.driver == real_gpu.driver


def test_the_real_gpu_matches_itself_alone(real_gpu: Gpu) -> None:
    assert require_match(find_gpu(real_gpu.model.sm or ""), real_gpu) == real_gpu.model
    others = [model for model in builtin_models() if model.compute_capability != real_gpu.model.compute_capability]
    for model in others:
        with pytest.raises(GpuError):
            require_match(model, real_gpu)


def test_hidden_gpus_are_not_detected(real_gpu: Gpu) -> None:
    for visible in ("", "-1", "GPU-none"):
        found = detect(environ={**os.environ, "CUDA_VISIBLE_DEVICES": visible})
        assert found.gpu is None
        assert found.reason is not None
        assert "CUDA_VISIBLE_DEVICES" in found.reason
    if real_gpu.uuid:
        assert detect(environ={**os.environ, "CUDA_VISIBLE_DEVICES": real_gpu.uuid}).gpu == real_gpu


def test_identity_is_complete_and_stable(real_gpu: Gpu) -> None:
    parts = identity_parts(real_gpu)
    assert {"gpu", "compute_capability", "gpu_memory", "driver_major"} <= set(parts)
    again = detect().gpu
    assert again is not None
    assert identity_parts(again) == parts


def test_a_snapshot_of_an_idle_gpu(real_gpu: Gpu) -> None:
    with GpuMonitor(real_gpu) as monitor:
        before = monitor.snapshot()
        time.sleep(0.5)
        after = monitor.snapshot(since=before)
    print(clocks_record(before, after))
    if real_gpu.source != "nvml":
        pytest.skip("no NVML here")
    assert after.sm_mhz is not None
    assert after.max_sm_mhz is not None
    assert after.sm_mhz <= after.max_sm_mhz
    assert after.temperature_c is None or 0 < after.temperature_c < 110
    assert after.reasons is not None


BURN = """
import ctypes, sys, time
cuda = ctypes.CDLL("libcuda.so.1")
device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
assert not cuda.cuInit(0)
assert not cuda.cuDeviceGet(ctypes.byref(device), 0)
assert not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
assert not cuda.cuCtxSetCurrent(context)
size = 1 << 30
assert not cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
print("running", flush=True)
end = time.time() + float(sys.argv[1])
while time.time() < end:
    for _ in range(50):
        assert not cuda.cuMemsetD32_v2(pointer, 0, ctypes.c_size_t(size // 4))
    assert not cuda.cuCtxSynchronize()
"""


@contextmanager
def burning() -> Iterator[int]:
    """Another process that keeps the GPU busy; its pid."""
    with subprocess.Popen([sys.executable, "-c", BURN, "60"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "running\n"
            yield process.pid
        finally:
            process.kill()


def _needs_a_quiet_gpu(monitor: GpuMonitor) -> None:
    state = monitor.idle()
    if state.utilization_percent is None:
        pytest.skip("NVML tells no load here")
    if state.utilization_percent >= BUSY_PERCENT:
        pytest.skip(f"somebody keeps this GPU {state.utilization_percent} % busy")


def test_a_neighbour_s_load_shows_while_we_are_idle_and_ends_with_it(real_gpu: Gpu) -> None:
    with GpuMonitor(real_gpu) as monitor:
        _needs_a_quiet_gpu(monitor)
        with burning():
            time.sleep(SAMPLING_S)
            busy = monitor.idle()
            after = monitor.snapshot(since=busy)
        assert busy.utilization_percent is not None
        assert busy.utilization_percent > 50
        # Whoever is listed, and whosever they are.
        pids = [process.pid for process in after.processes or ()]
        found = disturbances(busy, after, own_pids=pids)
        assert [text for text in found if "busy before the measurement began" in text], found
        # The load of a moment ago is over once a sampling period was waited for.
        calm = monitor.idle()
        assert (calm.utilization_percent or 0) < BUSY_PERCENT
        assert not [text for text in disturbances(calm, calm) if "busy" in text]


def test_only_another_process_s_load_is_a_disturbance(real_gpu: Gpu) -> None:
    with GpuMonitor(real_gpu) as monitor:
        _needs_a_quiet_gpu(monitor)
        with burning() as ours:
            before = replace(monitor.snapshot(), utilization_percent=0)
            time.sleep(2.0)
            after = monitor.snapshot(since=before)
            assert after.utilization_percent is None or after.utilization_percent > 50
            assert ours in family([ours]), "it was started here"
            assert not [text for text in disturbances(before, after, own_pids=[ours]) if "process" in text]
            with burning() as other:
                before = replace(monitor.snapshot(), utilization_percent=0)
                time.sleep(2.0)
                after = monitor.snapshot(since=before)
                found = [text for text in disturbances(before, after, own_pids=[ours]) if "process" in text]
    if not after.load_by_process:
        pytest.skip("this driver does not tell the load by process")
    assert found
    if any(process.pid == ours for process in after.processes or ()):
        assert f"pid {other}" in " ".join(found)


def test_what_holds_the_gpu_back_agrees_with_its_clocks(real_gpu: Gpu) -> None:
    with GpuMonitor(real_gpu) as monitor, burning():
        time.sleep(1.0)
        state = monitor.snapshot()
    if state.sm_mhz is None or state.max_sm_mhz is None:
        pytest.skip("no clocks are told here")
    named = [text for text in held_back(state, {}) if text.startswith(f"SM clock {state.sm_mhz} of")]
    assert bool(named) == (state.sm_mhz < LOW_SHARE * state.max_sm_mhz), (state, named)


def test_a_uuid_finds_the_gpu_with_its_prefix_and_without(real_gpu: Gpu) -> None:
    if real_gpu.uuid is None:
        pytest.skip("this GPU has no UUID")
    with GpuMonitor(real_gpu) as monitor, GpuMonitor(replace(real_gpu, uuid=real_gpu.uuid[4:].upper())) as bare:
        assert monitor.snapshot().max_sm_mhz == bare.snapshot().max_sm_mhz == real_gpu.max_sm_mhz
