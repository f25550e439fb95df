"""NVML without a GPU: cards as mappings from a getter's name to what it answers; what a card lacks is not supported.

It stands for hardware that no development machine has: a Jetson, cards in MIG mode, a neighbour's load.
"""

# The names and signatures are NVML's.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

NOT_SUPPORTED, NOT_FOUND = 3, 6
Card = dict[str, Any]


class NVMLError(Exception):
    """As nvidia-ml-py raises it."""

    def __init__(self, value: int) -> None:
        super().__init__({NOT_SUPPORTED: "Not Supported", NOT_FOUND: "Not Found"}.get(value, str(value)))
        self.value = value


class FakeNvml(ModuleType):
    """The module `pynvml`.

    Parameters
    ----------
    cards
        In the order of the PCI bus. A value that is callable is called with the getter's further arguments, an
        exception is raised. "slices": the MIG slices of a card in MIG mode, which are such mappings too.
    finds_uuids
        Whether NVML finds by UUID what it lists.
    """

    NVMLError = NVMLError
    NVML_ERROR_NOT_FOUND = NOT_FOUND
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, cards: Sequence[Card], *, driver: str = "580.65.06", finds_uuids: bool = True) -> None:
        super().__init__("pynvml")
        self.cards, self.driver, self.finds_uuids = list(cards), driver, finds_uuids

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def getter(handle: Card, *arguments: Any) -> Any:
            value = handle.get(name.removeprefix("nvmlDeviceGet"), NVMLError(NOT_SUPPORTED))
            if isinstance(value, Exception):
                raise value
            return value(*arguments) if callable(value) else value

        return getter

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        raise NVMLError(NOT_FOUND)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        for card in self.cards if self.finds_uuids else ():
            found: Card
            for found in (card, *card.get("slices", ())):
                if found.get("UUID") == uuid:
                    return found
        raise NVMLError(NOT_FOUND)

    def nvmlDeviceGetMigMode(self, handle: Card) -> tuple[int, int]:
        if handle.get("MigMode") is NOT_SUPPORTED:
            raise NVMLError(NOT_SUPPORTED)
        return (1, 1) if "slices" in handle else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Card, index: int) -> Card:
        try:
            slice_: Card = handle["slices"][index]
        except IndexError:
            raise NVMLError(NOT_FOUND) from None
        return slice_

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Card) -> Card:
        for card in self.cards:
            if any(handle is slice_ for slice_ in card.get("slices", ())):
                return card
        raise NVMLError(NOT_SUPPORTED)


def install(monkeypatch: pytest.MonkeyPatch, cards: Sequence[Card], **options: Any) -> FakeNvml:
    """Let `import pynvml` give the fake."""
    fake = FakeNvml(cards, **options)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def card(name: str, uuid: str, capability: tuple[int, int], **more: Any) -> Card:
    """A discrete GPU whose driver tells the usual."""
    return {
        "Name": name,
        "UUID": uuid,
        "CudaComputeCapability": capability,
        "MemoryInfo": SimpleNamespace(total=40 << 30),
        "MaxClockInfo": lambda _: 1410,
        **more,
    }
