"""Asks the CUDA driver about its first device, as a script of its own: `python cuda_query.py` prints JSON.

It runs in a process of its own, because initializing CUDA in the test process would break every fork that comes
later. It is needed where NVML cannot tell: on a Jetson without NVML, and to learn which of several different GPUs
CUDA counts as its first.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""CUDA's driver, as a library."""
_ATTRIBUTES = {
    "sm_count": 16,  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    "sm_khz": 13,  # CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    "memory_khz": 36,  # CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE
    "memory_bus_bits": 37,  # CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH
    "major": 75,  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    "minor": 76,  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
}


def first_device() -> dict[str, Any]:
    """What the CUDA driver says about device 0; `{"error": …}` when there is none.

    Source of the constants and signatures: cuda.h, CUDA Driver API.
    """
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError as error:
        return {"error": f"no CUDA driver: {error}"}
    count, device = ctypes.c_int(), ctypes.c_int()
    if (status := cuda.cuInit(0)) or (status := cuda.cuDeviceGetCount(ctypes.byref(count))):
        return {"error": f"the CUDA driver answers with error {status}"}
    if not count.value or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return {"error": "the CUDA driver shows no device"}
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    found: dict[str, Any] = {
        "name": name.value.decode(errors="replace"),
        "uuid_hex": _uuid(cuda, device),
        "uuids_hex": _uuids(cuda, count.value),
        "memory_bytes": memory.value,
        "count": count.value,
    }
    for key, attribute in _ATTRIBUTES.items():
        value = ctypes.c_int()
        found[key] = None if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) else value.value
    return found


def _uuid(cuda: ctypes.CDLL, device: ctypes.c_int) -> str | None:
    # Only the second version tells a MIG slice's own UUID; drivers before CUDA 11.4 have only the first.
    read = getattr(cuda, "cuDeviceGetUuid_v2", None) or getattr(cuda, "cuDeviceGetUuid", None)
    raw = (ctypes.c_ubyte * 16)()
    return None if read is None or read(ctypes.byref(raw), device) else bytes(raw).hex()


def _uuids(cuda: ctypes.CDLL, count: int) -> list[str]:
    """Those of all devices, in CUDA's order."""
    device = ctypes.c_int()
    found = (None if cuda.cuDeviceGet(ctypes.byref(device), i) else _uuid(cuda, device) for i in range(count))
    return [uuid for uuid in found if uuid]


if __name__ == "__main__":
    json.dump(first_device(), sys.stdout)
