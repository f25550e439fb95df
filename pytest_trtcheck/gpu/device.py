"""The GPU in this machine: which one CUDA will use, what it is, and whether it is the one that was asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.gpu import probe
from pytest_trtcheck.gpu.names import fits, model_of
from pytest_trtcheck.gpu.nvml import NvmlUnavailableError, first, nvml, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.gpu.table import ComputeCapability, GpuModel

_GIB = 2**30
_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A real GPU, or a MIG slice of one.

    Parameters
    ----------
    name
        As the driver prints it.
    model
        What it is in budgets and tables.
    compute_capability
        (major, minor), as the driver reports it.
    uuid
        "GPU-…" or "MIG-…"; None where the driver tells none (Jetson).
    driver
        The driver's version, such as "580.159.04".
    mig
        The profile of a MIG slice, such as "1g.5gb".
    cores
        CUDA cores of a whole GPU, multiprocessors of a MIG slice or of a GPU without NVML: a part of its identity,
        not a figure to compare.
    source
        Who told all this: NVML, or the CUDA driver where there is no NVML (then clocks and load stay unknown).
    """

    name: str
    model: GpuModel
    compute_capability: ComputeCapability
    uuid: str | None = None
    memory_bytes: int | None = None
    driver: str | None = None
    mig: str | None = None
    cores: int | None = None
    max_sm_mhz: int | None = None
    max_memory_mhz: int | None = None
    memory_bus_bits: int | None = None
    source: str = "nvml"

    @property
    def product(self) -> str:
        """The product, as in budgets."""
        return self.model.product

    @property
    def lock_name(self) -> str:
        """What to lock while measuring: the UUID, or the name of the one GPU of a Jetson."""
        return self.uuid or self.name

    @property
    def description(self) -> str:
        """For messages: the name with compute capability and architecture."""
        return f"{self.name} (compute capability {capability_text(self.compute_capability)}, {self.model.architecture})"


@dataclass(frozen=True)
class Detection:
    """The GPU found, or why there is none. With a GPU, `reason` says what of it could not be read."""

    gpu: Gpu | None
    reason: str | None = None


@dataclass(frozen=True)
class Card:
    """A GPU as NVML lists it, before CUDA_VISIBLE_DEVICES is applied."""

    uuid: str
    name: str = ""
    mig_enabled: bool = False
    slices: tuple[str, ...] = ()
    """UUIDs of its MIG slices."""


def detect(extra: Sequence[GpuModel] = (), environ: Mapping[str, str] = os.environ) -> Detection:
    """The GPU that CUDA uses first in this environment, through NVML, or through the CUDA driver without NVML.

    Nothing is raised where there is no GPU: the reason is kept instead. CUDA is not initialized in this process.
    """
    try:
        with nvml() as library:
            return _detect_nvml(library, extra, environ)
    except NvmlUnavailableError as error:
        reason = str(error)
    found = _probe(environ)
    if "error" in found:
        return Detection(None, f"{reason}; {found['error']}")
    return Detection(_from_probe(found, extra), f"clocks and load are unknown: {reason}")


def require_match(declared: GpuModel, detected: Gpu) -> GpuModel:
    """Check that the real GPU is the declared one, and return the model to judge it by.

    That is the real GPU's, being the more specific; but a Jetson whose module the driver does not tell ("Orin") is
    taken to be the module that was declared.

    Raises
    ------
    GpuError
        Naming both.
    """
    if fits(declared, detected.model) is not None:
        return detected.model
    if detected.model.product in JETSON_FAMILIES and declared.family == detected.model.product:
        return declared
    raise GpuError(
        f"the GPU asked for is {declared.product}, but the one in this machine is {detected.description}",
        f"ask for {detected.product!r} or nothing, or choose among several GPUs with CUDA_VISIBLE_DEVICES",
    )


def identity_parts(gpu: Gpu) -> dict[str, str]:
    """What of a GPU an engine is bound to, for cache keys: the kind of unit and the driver, never the single unit.

    The name alone is not enough: one name is sold with different memory sizes, core counts and clocks, and TensorRT
    chooses kernels by them. Memory is rounded to GiB, since drivers reserve slightly different amounts of it.
    """
    memory = None if gpu.memory_bytes is None else f"{round(gpu.memory_bytes / _GIB)} GiB"
    parts = {
        "gpu": gpu.name,
        "compute_capability": capability_text(gpu.compute_capability),
        "gpu_memory": memory,
        "gpu_cores": gpu.cores,
        "gpu_memory_bus_bits": gpu.memory_bus_bits,
        "gpu_max_sm_mhz": gpu.max_sm_mhz,
        "gpu_max_memory_mhz": gpu.max_memory_mhz,
        "gpu_mig": gpu.mig,
        "driver_major": gpu.driver and gpu.driver.partition(".")[0],
    }
    return {key: str(value) for key, value in parts.items() if value is not None}


def capability_text(compute_capability: ComputeCapability) -> str:
    """(8, 9) as "8.9"."""
    return "{}.{}".format(*compute_capability)


def select_visible(visible: str | None, cards: Sequence[Card]) -> tuple[str | None, str]:
    """The UUID of CUDA's device 0, given CUDA_VISIBLE_DEVICES and the cards in CUDA's order.

    Source: CUDA Programming Guide, "CUDA Environment Variables" (entries are indices or UUIDs that may be abbreviated;
    the first that is invalid hides itself and all behind it, so only the first entry decides about device 0), and MIG
    User Guide, "CUDA Device Enumeration" (a card in MIG mode stands for its first slice).

    Returns
    -------
    The UUID, or None and the reason.
    """
    if not cards:
        return None, "the driver shows no GPU"
    if visible is None:
        return _whole_or_slice(cards[0])
    entry = visible.split(",")[0].strip()
    if not entry:
        return None, "CUDA_VISIBLE_DEVICES is empty and hides every GPU"
    nothing = f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine"
    if re.fullmatch(r"[+-]?\d+", entry):
        index = int(entry)
        return _whole_or_slice(cards[index]) if 0 <= index < len(cards) else (None, nothing)
    matches = [card.uuid for card in cards if _abbreviates(entry, card.uuid, "GPU-")]
    if len(matches) == 1:
        return _whole_or_slice(next(card for card in cards if card.uuid == matches[0]))
    slices = [uuid for card in cards for uuid in card.slices if _abbreviates(entry, uuid, "MIG-")]
    return (slices[0], "") if len(slices) == 1 and not matches else (None, nothing)


def jetson_product(device_tree_model: str) -> str | None:
    """The product of a Jetson from its device tree's model text, such as "NVIDIA Jetson AGX Orin Developer Kit".

    Source: /proc/device-tree/model of Jetson Linux; the first AGX Xavier called itself "Jetson-AGX".
    """
    text = re.sub(r"[^a-z0-9]+", " ", device_tree_model.lower().replace("\0", " ")).strip()
    for product in ("AGX Orin", "Orin NX", "Orin Nano", "AGX Xavier", "Xavier NX"):
        if product.lower() in text:
            return product
    if text == "jetson agx":
        return "AGX Xavier"
    return next((product for product in ("Thor", "Orin", "Xavier") if product.lower() in text.split()), None)


JETSON_FAMILIES = frozenset({"Xavier", "Orin"})


def _abbreviates(entry: str, uuid: str, prefix: str) -> bool:
    return entry.startswith(prefix) and len(entry) > len(prefix) and uuid.startswith(entry)


def _whole_or_slice(card: Card) -> tuple[str | None, str]:
    if not card.mig_enabled:
        return card.uuid, ""
    if card.slices:
        return card.slices[0], ""
    return None, f"{card.name or card.uuid} is in MIG mode and has no slice"


def _detect_nvml(library: Any, extra: Sequence[GpuModel], environ: Mapping[str, str]) -> Detection:
    count = read(library, "nvmlDeviceGetCount") or 0
    handles = [handle for i in range(count) if (handle := read(library, "nvmlDeviceGetHandleByIndex", i)) is not None]
    cards = [_card(library, handle) for handle in handles]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if _order_is_unknown(visible, cards, environ):
        # NVML lists by PCI bus; CUDA puts the fastest first, by a rule that is not documented.
        probed = _probe(environ)
        uuid, reason = _by_hex(probed.get("uuid_hex"), cards), str(probed.get("error", "CUDA's device 0 is unknown"))
    else:
        uuid, reason = select_visible(visible, cards)
    if uuid is None:
        return Detection(None, reason)
    gpu = _describe(library, uuid, extra)
    return Detection(gpu) if gpu else Detection(None, f"the driver tells nothing about {uuid}")


def _order_is_unknown(visible: str | None, cards: Sequence[Card], environ: Mapping[str, str]) -> bool:
    by_index = visible is None or re.fullmatch(r"\s*\d+\s*", visible.split(",")[0]) is not None
    different = len({card.name for card in cards}) > 1
    return by_index and different and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"


def _by_hex(uuid_hex: str | None, cards: Sequence[Card]) -> str | None:
    uuids = [uuid for card in cards for uuid in (card.uuid, *card.slices)]
    return next((uuid for uuid in uuids if uuid_hex and uuid.replace("-", "").lower().endswith(uuid_hex)), None)


def _card(library: Any, handle: Any) -> Card:
    mode = read(library, "nvmlDeviceGetMigMode", handle)
    enabled = bool(mode and mode[0] == 1)
    slices: list[str] = []
    if enabled:
        for index in range(read(library, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            slice_ = read(library, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if slice_ is not None and (uuid := read(library, "nvmlDeviceGetUUID", slice_)):
                slices.append(uuid)
    return Card(
        uuid=read(library, "nvmlDeviceGetUUID", handle) or "",
        name=read(library, "nvmlDeviceGetName", handle) or "",
        mig_enabled=enabled,
        slices=tuple(slices),
    )


def _describe(library: Any, uuid: str, extra: Sequence[GpuModel]) -> Gpu | None:
    # A Jetson's NVML may tell no UUID; it has one GPU.
    handle = first(
        lambda: read(library, "nvmlDeviceGetHandleByUUID", uuid) if uuid else None,
        lambda: None if uuid else read(library, "nvmlDeviceGetHandleByIndex", 0),
    )
    if handle is None:
        return None
    parent = read(library, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) if uuid.startswith("MIG-") else None
    whole = handle if parent is None else parent
    capability = read(library, "nvmlDeviceGetCudaComputeCapability", whole)
    name = read(library, "nvmlDeviceGetName", handle) or read(library, "nvmlDeviceGetName", whole)
    if capability is None or name is None:
        return None
    memory = read(library, "nvmlDeviceGetMemoryInfo", handle)
    attributes = None if parent is None else read(library, "nvmlDeviceGetAttributes_v2", handle)
    mig: str | None = None
    if parent is not None:
        name = _slice_name(name, attributes)
        mig = name.partition(" MIG ")[2]
    major, minor = capability
    return Gpu(
        name=name,
        model=_model(name, (major, minor), extra),
        compute_capability=(major, minor),
        uuid=uuid or None,
        memory_bytes=None if memory is None else int(memory.total),
        driver=read(library, "nvmlSystemGetDriverVersion"),
        mig=mig,
        cores=attributes.multiprocessorCount if attributes else read(library, "nvmlDeviceGetNumGpuCores", whole),
        max_sm_mhz=read(library, "nvmlDeviceGetMaxClockInfo", whole, library.NVML_CLOCK_SM),
        max_memory_mhz=read(library, "nvmlDeviceGetMaxClockInfo", whole, library.NVML_CLOCK_MEM),
        memory_bus_bits=read(library, "nvmlDeviceGetMemoryBusWidth", whole),
    )


def _slice_name(name: str, attributes: Any) -> str:
    """A slice's name with its profile, which drivers before R470 leave out."""
    if " MIG " in name or attributes is None:
        return name if " MIG " in name else f"{name} MIG unknown"
    # A profile's memory is that of the compute slices in binary GB, rounded up: 4,864 MiB is sold as "5gb".
    memory_gb = -(-int(attributes.memorySizeMB) // 1024)
    return f"{name} MIG {attributes.gpuInstanceSliceCount}g.{memory_gb}gb"


def _model(name: str, capability: ComputeCapability, extra: Sequence[GpuModel]) -> GpuModel:
    model = model_of(name, capability, extra)
    if model.product in JETSON_FAMILIES:
        module = jetson_product(_device_tree())
        return model_of(module, capability, extra) if module else model
    return model


def _device_tree() -> str:
    try:
        return Path("/proc/device-tree/model").read_text(errors="replace")
    except OSError:
        return ""


def _probe(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the CUDA driver says about its device 0, asked in another process."""
    command = [sys.executable, "-I", probe.__file__]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, env=dict(environ), check=False
        )
        found: dict[str, Any] = json.loads(answer.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return {"error": f"the CUDA driver could not be asked: {error}"}
    return found


def _from_probe(found: Mapping[str, Any], extra: Sequence[GpuModel]) -> Gpu:
    capability = int(found["major"]), int(found["minor"])
    hexadecimal = found.get("uuid_hex")
    is_slice = " MIG " in found["name"]
    uuid = None
    if hexadecimal and set(hexadecimal) != {"0"}:
        groups = (hexadecimal[i:j] for i, j in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        uuid = ("MIG-" if is_slice else "GPU-") + "-".join(groups)
    khz, memory_khz = found.get("sm_khz"), found.get("memory_khz")
    return Gpu(
        name=found["name"],
        model=_model(found["name"], capability, extra),
        compute_capability=capability,
        uuid=uuid,
        memory_bytes=found.get("memory_bytes"),
        driver=_kernel_driver(),
        mig=found["name"].partition(" MIG ")[2] or None,
        cores=found.get("sm_count"),
        max_sm_mhz=None if khz is None else khz // 1000,
        max_memory_mhz=None if memory_khz is None else memory_khz // 1000,
        memory_bus_bits=found.get("memory_bus_bits"),
        source="cuda",
    )


def _kernel_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return match[0] if match else None
