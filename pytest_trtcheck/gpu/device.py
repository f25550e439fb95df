"""The GPU in this machine: which one CUDA will use, what it is, and whether it is the one that was asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pytest_trtcheck.errors import CheckError, GpuError, first_line
from pytest_trtcheck.gpu import cuda_query, jetson
from pytest_trtcheck.gpu.names import card_of, find_gpu, fits, model_of, parse_extra_gpus
from pytest_trtcheck.gpu.nvml import NvmlUnavailableError, devices, nvml, read, same_uuid, slices
from pytest_trtcheck.gpu.table import FIRST_WITH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.gpu.table import ComputeCapability, GpuModel
    from pytest_trtcheck.spec import HardwareCompatible

_GIB = 2**30
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
_CUDA_TIMEOUT_S = 60.0


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
        "GPU-…" or "MIG-…", also where the driver leaves that out (Jetson); None where it tells none.
    driver
        The driver's version, such as "580.159.04".
    mig
        The profile of a MIG slice, such as "1g.5gb".
    cores
        CUDA cores of a whole GPU, multiprocessors of a MIG slice or of a GPU without NVML: a part of its identity,
        not a figure to compare.
    source
        Who told all this: "nvml"; "cuda", the CUDA driver, where there is no NVML (then clocks and load stay unknown);
        or "nvml and cuda" where NVML tells too little.
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
    def full_name(self) -> str:
        """The name with the product, where the driver prints less: "Orin" is also what an Orin Nano calls itself."""
        return self.name if self.product.lower() in self.name.lower() else f"{self.name} {self.product}"

    @property
    def description(self) -> str:
        """For messages: the name with compute capability and architecture."""
        return f"{self.name} (compute capability {capability_text(self.compute_capability)}, {self.model.architecture})"

    def environment(self) -> dict[str, Any]:
        """What a report tells of the GPU that checks ran on."""
        return {"name": self.name, "uuid": self.uuid, "compute_capability": capability_text(self.compute_capability)}

    def conditions(self) -> dict[str, Any]:
        """What of the GPU must be alike for two latencies to be compared, clocks aside."""
        capability = capability_text(self.compute_capability)
        return {"gpu": self.full_name, "compute_capability": capability, "driver": self.driver}


@dataclass(frozen=True)
class Detection:
    """The GPU found, or why there is none. With a GPU, `reason` says what of it could not be read."""

    gpu: Gpu | None
    reason: str | None = None


@dataclass(frozen=True)
class Card:
    """A GPU as NVML lists it, before CUDA_VISIBLE_DEVICES is applied.

    `slices` are the UUIDs of its MIG slices; `handles` are NVML's, by UUID, of the card and its slices.
    """

    uuid: str
    name: str = ""
    mig_enabled: bool = False
    slices: tuple[str, ...] = ()
    handles: Mapping[str, Any] = field(default_factory=dict)


def detect(extra: Sequence[GpuModel] = (), environ: Mapping[str, str] = os.environ) -> Detection:
    """The GPU that CUDA uses first in this environment, as NVML tells it and, where NVML tells too little, CUDA.

    The CUDA driver is asked where there is no NVML, where NVML lists no GPU or does not say what the GPU is (Jetson),
    and where it cannot say which GPU CUDA counts first.

    Nothing is raised where there is no GPU: the reason is kept instead. CUDA is not initialized in this process.
    """
    try:
        with nvml() as library:
            return _detect_nvml(library, extra, environ)
    except NvmlUnavailableError as error:
        reason = str(error)
    told = _told_by_cuda(environ, extra)
    if isinstance(told, str):
        return Detection(None, f"{reason}; {told}")
    return Detection(told, f"clocks and load are unknown: {reason}")


def how_to_ask(gpu: Gpu, extra: Sequence[GpuModel] = ()) -> str:
    """How the GPU that is here is asked for by name: as it is known, else with the line of `trt_gpus` that makes it so.

    A line is looked at before it is shown: where a name can stand in none, its compute capability is the name.
    """
    if _is_known(gpu, gpu.product, extra):
        return f"ask for {gpu.product!r} or nothing"
    line = own_line(gpu)
    try:
        known = _is_known(gpu, gpu.product, (*extra, *parse_extra_gpus([line])))
    except CheckError:
        known = False
    if known:
        return f"ask for nothing, or for {gpu.product!r} with the line `{line}` in the ini key trt_gpus"
    sm = gpu.model.sm or ""
    return f"ask for {sm!r} or nothing" if _is_known(gpu, sm, extra) else "ask for nothing"


def _is_known(gpu: Gpu, name: str, extra: Sequence[GpuModel]) -> bool:
    try:
        return fits(find_gpu(name, extra), _model(gpu.name, gpu.compute_capability, extra)) is not None
    except GpuError:
        return False


def own_line(gpu: Gpu) -> str:
    """The line of `trt_gpus` that makes a GPU known which is in no table; of a slice it is its card's."""
    architecture = "" if gpu.model.architecture != "unknown" else f", {gpu.model.sm}"
    return f"{card_of(gpu.product)} = {capability_text(gpu.compute_capability)}{architecture}"


def require_match(declared: GpuModel, detected: Gpu, extra: Sequence[GpuModel] = ()) -> GpuModel:
    """Check that the real GPU is the declared one, and return the model to judge it by.

    That is the real GPU's, being the more specific; but a Jetson whose module the driver does not tell ("Orin") is
    taken to be the module that was declared.

    Raises
    ------
    GpuError
        Naming both.
    """
    if is_named(declared, detected):
        return detected.model if fits(declared, detected.model) is not None else declared
    raise GpuError(
        f"the GPU asked for is {declared.product}, but the one in this machine is {detected.description}",
        f"{how_to_ask(detected, extra)}, or choose among several GPUs with CUDA_VISIBLE_DEVICES",
        code="gpu-mismatch",
    )


def is_named(declared: GpuModel, detected: Gpu) -> bool:
    """Whether a real GPU is, or may be, the one that was declared."""
    is_family = detected.model.product in jetson.FAMILIES and declared.family == detected.model.product
    return is_family or fits(declared, detected.model) is not None


def why_no_tf32(gpu: Gpu | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Why no product can be computed in TF32 on the GPU in this machine; None where it can, or there is no GPU.

    NVIDIA_TF32_OVERRIDE=0 stands above what any library is told. Source: cuBLAS documentation, "Tensor Core Usage";
    measured with TensorRT-RTX 1.5 (tests/gpu/test_checks.py).
    """
    if gpu is None:
        return None
    if gpu.compute_capability < FIRST_WITH["tf32"]:
        return f"{gpu.product} has no TF32"
    if _is_tf32_off(environ):
        return f"{_TF32_OVERRIDE}=0 turns TF32 off in this process: unset it, or ask for fp32"
    return None


def _is_tf32_off(environ: Mapping[str, str]) -> bool:
    return environ.get(_TF32_OVERRIDE) == "0"


def identity_parts(
    gpu: Gpu, compatible: HardwareCompatible = "none", environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What of a GPU an engine is bound to, for cache keys: the kind of unit and the driver, never the single unit.

    The name alone is not enough: one name is sold with different memory sizes, core counts and clocks, and TensorRT
    chooses kernels by them. Memory is rounded to GiB, since drivers reserve slightly different amounts of it. An engine
    that is hardware compatible is bound to the class alone that TensorRT's documentation names; on a GPU outside of
    it, to that GPU. With TF32 off in this process its kernels are others, on any GPU.
    """
    no_tf32 = {"tf32": "off"} if _is_tf32_off(environ) else {}
    if compatible == "same_compute_capability":
        return {"compute_capability": capability_text(gpu.compute_capability), **no_tf32}
    if compatible == "ampere_plus" and gpu.compute_capability >= (8, 0):
        return {"compute_capability": "8.0 and later", **no_tf32}
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
    return {key: str(value) for key, value in parts.items() if value is not None} | no_tf32


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
    found = _entry(entry, cards)
    if isinstance(found, Card):
        return _whole_or_slice(found)
    return (found, "") if found else (None, f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine")


def _entry(entry: str, cards: Sequence[Card]) -> Card | str | None:
    """What an entry of CUDA_VISIBLE_DEVICES names: a card, or the UUID of a slice."""
    if re.fullmatch(r"[+-]?\d+", entry):
        return cards[int(entry)] if 0 <= int(entry) < len(cards) else None
    matches = [card for card in cards if _abbreviates(entry, card.uuid, "GPU-")]
    if matches:
        return matches[0] if len(matches) == 1 else None
    found = [uuid for card in cards for uuid in card.slices if _abbreviates(entry, uuid, "MIG-")]
    return found[0] if len(found) == 1 else None


def visible_gpus(extra: Sequence[GpuModel] = (), environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """Every GPU that a process in this environment may use, each slice of a card in MIG mode for itself.

    CUDA shows a process one slice alone; all of them can be named by CUDA_VISIBLE_DEVICES. Empty without NVML, and
    under MPS, whose server deals the GPUs out.
    """
    if _under_mps(environ):
        return ()
    try:
        with nvml() as library:
            cards = [_card(library, handle) for handle in devices(library)]
            found = (_describe(library, uuid, cards, extra) for uuid in _visible(cards, environ) if uuid)
            return tuple(gpu for gpu in found if gpu.source == "nvml")
    except NvmlUnavailableError:
        return ()


def _visible(cards: Sequence[Card], environ: Mapping[str, str]) -> tuple[str, ...]:
    """The UUIDs of those that CUDA_VISIBLE_DEVICES shows; an entry that names none hides all behind it."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    entries = None if visible is None else [entry.strip() for entry in visible.split(",")]
    if entries is None:
        return tuple(uuid for card in cards for uuid in _units(card))
    if len(set(entries)) < len(entries):
        return ()  # Such a list is no list to CUDA.
    if any(entry.lstrip("+").isdigit() for entry in entries) and _counts_otherwise(cards, environ):
        told: Sequence[str] = _ask_cuda(environ).get("uuids_hex") or ()
        return tuple(uuid for hex_ in told for card in cards for uuid in _units(card) if same_uuid(hex_, uuid))
    found: dict[str, None] = {}
    for each in (_entry(entry, cards) for entry in entries):
        if each is None:
            break
        found |= dict.fromkeys(_units(each) if isinstance(each, Card) else (each,))
    return tuple(found)


def _units(card: Card) -> tuple[str, ...]:
    """What of a card can be used by itself: its slices, where it is in MIG mode, else the whole."""
    return card.slices if card.mig_enabled else (card.uuid,)


def _abbreviates(entry: str, uuid: str, prefix: str) -> bool:
    return (
        entry.startswith(prefix) and len(entry) > len(prefix) and bool(uuid) and _named(uuid, prefix).startswith(entry)
    )


def _named(uuid: str, prefix: str = "GPU-") -> str:
    """A UUID as CUDA writes it: a Jetson's NVML leaves the prefix out."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else prefix + uuid


def _whole_or_slice(card: Card) -> tuple[str | None, str]:
    if not card.mig_enabled:
        return card.uuid, ""
    if card.slices:
        return card.slices[0], ""
    return None, f"{card.name or card.uuid} is in MIG mode and has no slice"


def _detect_nvml(library: Any, extra: Sequence[GpuModel], environ: Mapping[str, str]) -> Detection:
    cards = [_card(library, handle) for handle in devices(library)]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and re.fullmatch(r"\s*(-\d+\s*)?(,.*)?", visible) is not None
    if hidden:
        return Detection(None, select_visible(visible, cards)[1])
    uuid, reason = (None, "") if _order_is_unknown(visible, cards, environ) else select_visible(visible, cards)
    gpu = None if uuid is None else _describe(library, uuid, cards, extra)
    if gpu is not None and gpu.source == "nvml":
        return Detection(gpu)
    told = _told_by_cuda(environ, extra)
    if isinstance(told, str):
        if not cards:
            reason = "NVML lists no GPU"
        elif gpu is not None:
            reason = f"NVML does not tell what {gpu.name or 'the GPU'} is"
        return Detection(None, f"{reason or 'NVML cannot tell which GPU CUDA uses first'}; {told}")
    uuid = next((one for card in cards for one in (card.uuid, *card.slices) if same_uuid(one, told.uuid)), None)
    if uuid is None and len(cards) == 1 and not cards[0].mig_enabled:
        uuid = cards[0].uuid  # The one GPU there is: some Jetsons tell NVML and CUDA different UUIDs, or none.
    gpu = None if uuid is None else _describe(library, uuid, cards, extra)
    if gpu is None:
        return Detection(told, "clocks and load are unknown: NVML does not list the GPU that CUDA uses")
    return Detection(_filled(gpu, told, extra))


def _filled(gpu: Gpu, told: Gpu, extra: Sequence[GpuModel]) -> Gpu:
    """What NVML tells of a GPU, and what of it only CUDA tells."""
    if gpu.source == "nvml":
        return gpu
    known = {name: value for name, value in vars(gpu).items() if value not in (None, "", (0, 0))}
    filled = replace(told, **known, source="nvml and cuda")
    return replace(filled, model=_model(filled.name, filled.compute_capability, extra))


def _order_is_unknown(visible: str | None, cards: Sequence[Card], environ: Mapping[str, str]) -> bool:
    """Whether NVML's list does not tell which GPU CUDA counts first.

    - Different GPUs: NVML lists by PCI bus; CUDA puts the fastest first, by a rule that is not documented.
    - A card in MIG mode beside another: CUDA then shows one slice and hides the whole cards. Source: MIG User Guide,
      "CUDA Device Enumeration".
    - MPS: its server may have renumbered the GPUs. Source: MPS documentation, "CUDA_VISIBLE_DEVICES".
    - An entry named twice, or a list of no GPU.
    """
    if not cards:
        return True
    entries = [] if visible is None else [entry.strip() for entry in visible.split(",")]
    if len(set(entries)) < len(entries) or _under_mps(environ):
        return True
    if len(cards) > 1 and any(card.mig_enabled for card in cards):
        return True
    by_index = not entries or entries[0].lstrip("+").isdigit()
    return by_index and _counts_otherwise(cards, environ)


def _counts_otherwise(cards: Sequence[Card], environ: Mapping[str, str]) -> bool:
    """Whether CUDA may count the cards in another order than NVML lists them in."""
    return len({card.name for card in cards}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"


def _under_mps(environ: Mapping[str, str]) -> bool:
    """Whether CUDA programs here may be clients of an MPS server: its pipes are where they look for them."""
    pipes = environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"  # noqa: S108 - MPS's default
    return "CUDA_MPS_PIPE_DIRECTORY" in environ or Path(pipes, "control").exists()


def _card(library: Any, handle: Any) -> Card:
    found = slices(library, handle)
    named = {uuid: one for one in found or () if (uuid := read(library, "nvmlDeviceGetUUID", one))}
    uuid = read(library, "nvmlDeviceGetUUID", handle) or ""
    name = read(library, "nvmlDeviceGetName", handle) or ""
    return Card(uuid, name, found is not None, tuple(named), {uuid: handle, **named})


def _describe(library: Any, uuid: str, cards: Sequence[Card], extra: Sequence[GpuModel]) -> Gpu:
    """A GPU or slice of `cards`, as far as NVML tells it: `source` is "" where it does not tell what it is."""
    card = next(card for card in cards if uuid in card.handles)
    handle, whole = card.handles[uuid], card.handles[card.uuid]
    is_slice = handle is not whole
    capability = read(library, "nvmlDeviceGetCudaComputeCapability", whole)
    name = read(library, "nvmlDeviceGetName", handle) or read(library, "nvmlDeviceGetName", whole) or ""
    memory = read(library, "nvmlDeviceGetMemoryInfo", handle)
    attributes = read(library, "nvmlDeviceGetAttributes_v2", handle) if is_slice else None
    mig: str | None = None
    if is_slice and name:
        name = _slice_name(name, attributes)
        mig = name.partition(" MIG ")[2]
    major, minor = capability or (0, 0)
    return Gpu(
        name=jetson.plain(name),
        model=_model(name or "GPU", (major, minor), extra),
        compute_capability=(major, minor),
        uuid=_named(uuid, "MIG-" if is_slice else "GPU-") if uuid else None,
        memory_bytes=None if memory is None else int(memory.total),
        driver=read(library, "nvmlSystemGetDriverVersion"),
        mig=mig,
        cores=attributes.multiprocessorCount if attributes else read(library, "nvmlDeviceGetNumGpuCores", whole),
        max_sm_mhz=read(library, "nvmlDeviceGetMaxClockInfo", whole, library.NVML_CLOCK_SM),
        max_memory_mhz=read(library, "nvmlDeviceGetMaxClockInfo", whole, library.NVML_CLOCK_MEM),
        memory_bus_bits=read(library, "nvmlDeviceGetMemoryBusWidth", whole),
        source="nvml" if capability and name else "",
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
    module = jetson.module() if model.product in jetson.FAMILIES else None
    return model_of(module, capability, extra) if module else model


def _ask_cuda(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the CUDA driver says about its device 0, asked in another process; `{"error": …}` where there is none."""
    command = [sys.executable, "-I", cuda_query.__file__]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_CUDA_TIMEOUT_S, env=dict(environ), check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"the CUDA driver could not be asked: {error}"}
    try:
        found: dict[str, Any] = json.loads(answer.stdout)
    except ValueError:
        signalled = f"signal {-answer.returncode}" if answer.returncode < 0 else f"exit code {answer.returncode}"
        last = first_line(answer.stderr.strip().rpartition("\n")[2])
        return {"error": f"the CUDA driver broke the process that asked it ({signalled}){f': {last}' if last else ''}"}
    return found


def _told_by_cuda(environ: Mapping[str, str], extra: Sequence[GpuModel]) -> Gpu | str:
    """CUDA's device 0, or why it has none."""
    found = _ask_cuda(environ)
    if "error" in found:
        return str(found["error"])
    capability = int(found["major"]), int(found["minor"])
    digits, mig = found.get("uuid_hex"), found["name"].partition(" MIG ")[2] or None
    uuid = ("MIG-" if mig else "GPU-") + str(UUID(digits)) if digits and set(digits) != {"0"} else None
    sm_khz, memory_khz = found.get("sm_khz"), found.get("memory_khz")
    return Gpu(
        name=jetson.plain(found["name"]),
        model=_model(found["name"], capability, extra),
        compute_capability=capability,
        uuid=uuid,
        memory_bytes=found.get("memory_bytes"),
        driver=_kernel_driver(),
        mig=mig,
        cores=found.get("sm_count"),
        max_sm_mhz=None if sm_khz is None else sm_khz // 1000,
        max_memory_mhz=None if memory_khz is None else memory_khz // 1000,
        memory_bus_bits=found.get("memory_bus_bits"),
        source="cuda",
    )


def _kernel_driver() -> str | None:
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", jetson.read_text(Path("/proc/driver/nvidia/version")))
    return match[0] if match else None
