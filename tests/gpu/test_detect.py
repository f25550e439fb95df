"""Detection, snapshots and the load of other processes, on a real GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.gpu import builtin_models, device, find_gpu
from pytest_trtcheck.gpu.device import Gpu, detect, identity_parts, require_match
from pytest_trtcheck.gpu.state import GpuMonitor, GpuState, clocks_record, disturbances

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
    probed = device._from_probe(device._probe(os.environ), ())
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


def _watch(gpu: Gpu, seconds: float = 2.0) -> tuple[GpuState, GpuState]:
    with GpuMonitor(gpu) as monitor:
        before = monitor.snapshot()
        time.sleep(seconds)
        after = monitor.snapshot(since=before)
    print(clocks_record(before, after))
    return before, after


def test_only_another_process_s_load_is_a_disturbance(real_gpu: Gpu) -> None:
    if real_gpu.source != "nvml":
        pytest.skip("no NVML here")
    with burning() as ours:
        before, after = _watch(real_gpu)
        assert after.utilization_percent is None or after.utilization_percent > 50
        assert not [text for text in disturbances(before, after, own_pids=[ours]) if "process" in text]
        with burning() as other:
            before, after = _watch(real_gpu)
            found = [text for text in disturbances(before, after, own_pids=[ours]) if "process" in text]
    assert found
    if any(process.pid == ours for process in after.processes or ()):
        assert f"pid {other}" in " ".join(found)
