"""What a Jetson tells in files and NVML does not: which module it is, its power mode and its GPU's clock.

Source: Jetson Linux Developer Guide, "Platform Power and Performance" (nvpmodel, devfreq).
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path("/")
FAMILIES = frozenset({"Xavier", "Orin"})
"""What CUDA calls every module of a generation."""

_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
_GPU = re.compile(r"gpu|ga10b|gv11b|gp10b")


def plain(name: str) -> str:
    """A GPU's name as CUDA tells it: NVML puts the driver of a Jetson behind it."""
    return name.removesuffix(" (nvgpu)")


def module(root: Path | None = None) -> str | None:
    """The product of this Jetson, such as "Orin NX"; None where the device tree is hidden, as in a container."""
    return product_of(read_text((root or ROOT) / "proc/device-tree/model"))


def product_of(device_tree_model: str) -> str | None:
    """The product from a device tree's model text, such as "NVIDIA Jetson AGX Orin Developer Kit".

    Source: /proc/device-tree/model of Jetson Linux; the first AGX Xavier called itself "Jetson-AGX".
    """
    text = re.sub(r"[^a-z0-9]+", " ", device_tree_model.lower().replace("\0", " ")).strip()
    for product in ("AGX Orin", "Orin NX", "Orin Nano", "AGX Xavier", "Xavier NX"):
        if product.lower() in text:
            return product
    if text == "jetson agx":
        return "AGX Xavier"
    return next((product for product in ("Thor", "Orin", "Xavier") if product.lower() in text.split()), None)


def power_mode(root: Path | None = None) -> str | None:
    """The mode that nvpmodel set, such as "MODE_15W"; None where there is no nvpmodel."""
    root = root or ROOT
    number = re.search(r"pmode:\s*(\d+)", read_text(root / "var/lib/nvpmodel/status"))
    if number is None:
        return None
    names: dict[int, str] = {int(mode): name for mode, name in _MODE.findall(read_text(root / "etc/nvpmodel.conf"))}
    return names.get(int(number[1]), f"mode {int(number[1])}")


def clock_mhz(root: Path | None = None) -> tuple[int | None, int | None]:
    """The GPU's clock now, and the highest that it has, in MHz."""
    for folder in sorted(((root or ROOT) / "sys/class/devfreq").glob("*")):
        if _GPU.search(folder.name) is None:
            continue
        now = _mhz(read_text(folder / "cur_freq"))
        if now:
            highest = _mhz(read_text(folder / "available_frequencies")) or _mhz(read_text(folder / "max_freq"))
            return max(now), max(highest) if highest else None
    return None, None


def _mhz(text: str) -> list[int]:
    return [round(int(word) / 1e6) for word in text.split() if word.isdigit()]


def read_text(path: Path) -> str:
    """What a file of the system says; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
