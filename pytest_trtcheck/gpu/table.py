"""The GPUs we know by name, and what follows from a compute capability.

Compute capabilities: NVIDIA, "CUDA GPU Compute Capability" (developer.nvidia.com/cuda-gpus), and for Jetson Thor the
naming of CUDA 13 (11.0, which CUDA 12.8 and 12.9 called 10.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_trtcheck.choices import with_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_trtcheck.spec import Precision

ComputeCapability: TypeAlias = tuple[int, int]
Level = Literal["product", "compute_capability", "architecture"]


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU: a product, or all of a compute capability or architecture.

    Parameters
    ----------
    product
        What it is called in budgets and reports: "T4", "RTX 4090", or "sm75" or "turing" for a whole kind.
    compute_capability
        (major, minor); None for an architecture with more than one.
    architecture
        "turing", "ampere", …; "unknown" where the compute capability is newer than this table.
    level
        Which of the three `product` is.
    aliases
        Other names of the product.
    family
        The product whose budgets fit too where there is none for this one: "Orin" for the "Orin Nano".
    """

    product: str
    compute_capability: ComputeCapability | None
    architecture: str
    level: Level = "product"
    aliases: tuple[str, ...] = ()
    family: str | None = None

    @property
    def sm(self) -> str | None:
        """The compute capability as a budget key, such as "sm75"."""
        return None if self.compute_capability is None else "sm{}{}".format(*self.compute_capability)

    def supports(self, precision: Precision) -> bool | None:
        """Whether the hardware computes in this precision; None when its compute capability is not known.

        A hint for messages that come before a build; the library decides, and may serve less. Source: TensorRT's
        support matrix, "Hardware and Precision".
        """
        lowest = self.compute_capability or LOWEST.get(self.architecture)
        return None if lowest is None else lowest >= FIRST_WITH[precision]


FIRST_WITH: Mapping[Precision, ComputeCapability] = with_pairs(
    {
        "fp32": (0, 0),
        "fp16": (5, 3),
        "int8": (6, 1),
        "tf32": (8, 0),
        "bf16": (8, 0),
        "fp8": (8, 9),
    }
)
"""The lowest compute capability whose hardware computes in a precision."""

ARCHITECTURES: Mapping[ComputeCapability, str] = {
    (5, 0): "maxwell",
    (5, 2): "maxwell",
    (5, 3): "maxwell",
    (6, 0): "pascal",
    (6, 1): "pascal",
    (6, 2): "pascal",
    (7, 0): "volta",
    (7, 2): "volta",
    (7, 5): "turing",
    (8, 0): "ampere",
    (8, 6): "ampere",
    (8, 7): "ampere",
    (8, 8): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (10, 3): "blackwell",
    (11, 0): "blackwell",
    (12, 0): "blackwell",
    (12, 1): "blackwell",
}
ARCHITECTURE_ALIASES: Mapping[str, str] = {"adalovelace": "ada", "lovelace": "ada"}
RENAMED: Mapping[ComputeCapability, ComputeCapability] = {(10, 1): (11, 0)}

LOWEST: Mapping[str, ComputeCapability] = {name: min(cc for cc, arch in ARCHITECTURES.items() if arch == name)
                                           for name in ARCHITECTURES.values()}  # fmt: skip

_PRODUCTS: Mapping[ComputeCapability, tuple[str, ...]] = {
    (7, 0): ("V100", "V100S", "TITAN V", "Quadro GV100"),
    (7, 2): ("Xavier", "AGX Xavier", "Xavier NX"),
    (7, 5): (
        *("T4", "T4G", "T400", "T600", "T1000", "TITAN RTX"),
        *("RTX 2060", "RTX 2060 SUPER", "RTX 2070", "RTX 2070 SUPER", "RTX 2080", "RTX 2080 SUPER", "RTX 2080 Ti"),
        *("RTX 2060 Laptop", "RTX 2070 Laptop", "RTX 2070 SUPER Laptop", "RTX 2080 Laptop", "RTX 2080 SUPER Laptop"),
        *("GTX 1650", "GTX 1650 SUPER", "GTX 1660", "GTX 1660 SUPER", "GTX 1660 Ti"),
        *("Quadro RTX 3000", "Quadro RTX 4000", "Quadro RTX 5000", "Quadro RTX 6000", "Quadro RTX 8000"),
    ),
    (8, 0): ("A100", "A100X", "A800", "A30", "A30X"),
    (8, 6): (
        *("A2", "A10", "A10G", "A10M", "A16", "A40"),
        *("RTX 3050", "RTX 3060", "RTX 3060 Ti", "RTX 3070", "RTX 3070 Ti", "RTX 3080", "RTX 3080 Ti"),
        *("RTX 3090", "RTX 3090 Ti"),
        *("RTX 3050 Laptop", "RTX 3050 Ti Laptop", "RTX 3060 Laptop", "RTX 3070 Laptop", "RTX 3070 Ti Laptop"),
        *("RTX 3080 Laptop", "RTX 3080 Ti Laptop", "RTX 2050 Laptop"),
        *("RTX A400", "RTX A1000", "RTX A2000", "RTX A4000", "RTX A4500", "RTX A5000", "RTX A5500", "RTX A6000"),
        *("RTX A1000 Laptop", "RTX A2000 Laptop", "RTX A3000 Laptop", "RTX A4000 Laptop", "RTX A5000 Laptop"),
        "RTX A5500 Laptop",
    ),
    (8, 7): ("Orin", "AGX Orin", "Orin NX", "Orin Nano"),
    (8, 9): (
        *("L2", "L4", "L20", "L40", "L40G", "L40S"),
        *("RTX 4060", "RTX 4060 Ti", "RTX 4070", "RTX 4070 SUPER", "RTX 4070 Ti", "RTX 4070 Ti SUPER"),
        *("RTX 4080", "RTX 4080 SUPER", "RTX 4090", "RTX 4090 D"),
        *("RTX 4050 Laptop", "RTX 4060 Laptop", "RTX 4070 Laptop", "RTX 4080 Laptop", "RTX 4090 Laptop"),
        *("RTX 2000 Ada", "RTX 4000 Ada", "RTX 4000 SFF Ada", "RTX 4500 Ada", "RTX 5000 Ada", "RTX 5880 Ada"),
        *("RTX 6000 Ada", "RTX 500 Ada Laptop", "RTX 1000 Ada Laptop", "RTX 2000 Ada Laptop", "RTX 3000 Ada Laptop"),
        *("RTX 3500 Ada Laptop", "RTX 4000 Ada Laptop", "RTX 5000 Ada Laptop"),
    ),
    (9, 0): ("H100", "H200", "H800", "H20", "GH200"),
    (10, 0): ("B100", "B200", "GB200"),
    (10, 3): ("B300", "GB300"),
    (11, 0): ("Thor",),
    (12, 0): (
        *("RTX 5050", "RTX 5060", "RTX 5060 Ti", "RTX 5070", "RTX 5070 Ti", "RTX 5080", "RTX 5090", "RTX 5090 D"),
        *("RTX 5050 Laptop", "RTX 5060 Laptop", "RTX 5070 Laptop", "RTX 5070 Ti Laptop", "RTX 5080 Laptop"),
        "RTX 5090 Laptop",
        *("RTX PRO 2000", "RTX PRO 4000", "RTX PRO 4000 SFF", "RTX PRO 4500", "RTX PRO 5000", "RTX PRO 6000"),
        *("RTX PRO 6000 Max-Q", "RTX PRO 500 Laptop", "RTX PRO 1000 Laptop", "RTX PRO 2000 Laptop"),
        *("RTX PRO 3000 Laptop", "RTX PRO 4000 Laptop", "RTX PRO 5000 Laptop"),
    ),
    (12, 1): ("GB10",),
}  # fmt: skip

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "GB10": ("DGX Spark",),
    "Thor": ("AGX Thor", "DRIVE Thor"),
    "AGX Orin": ("DRIVE Orin",),
    "TITAN RTX": ("RTX TITAN",),
    "RTX 6000 Ada": ("RTX 6000 Ada Lovelace",),
}

_FAMILIES: Mapping[str, str] = {
    # The modules of one Jetson generation share a chip that CUDA names alike ("Orin"): the family is all that can be
    # told where the device tree is hidden, as in a container.
    "AGX Xavier": "Xavier",
    "Xavier NX": "Xavier",
    "AGX Orin": "Orin",
    "Orin NX": "Orin",
    "Orin Nano": "Orin",
}


@cache
def builtin_models() -> tuple[GpuModel, ...]:
    """Every product of the table."""
    return tuple(
        GpuModel(name, cc, ARCHITECTURES[cc], aliases=_ALIASES.get(name, ()), family=_FAMILIES.get(name))
        for cc, names in _PRODUCTS.items()
        for name in names
    )


def architecture_of(compute_capability: ComputeCapability) -> str:
    """The architecture's name, or "unknown" where this table is older than the GPU."""
    return ARCHITECTURES.get(canonical(compute_capability), "unknown")


def canonical(compute_capability: ComputeCapability) -> ComputeCapability:
    """The compute capability under its present name: Thor was 10.1 before CUDA 13 called it 11.0."""
    return RENAMED.get(compute_capability, compute_capability)
