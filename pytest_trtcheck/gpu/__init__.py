"""GPUs: what they are called, which one is here, what it was doing, and whose turn it is.

Names and budgets are imported here; the rest where it is needed: `device` (detection), `state` (snapshots of clocks
and load), `lock` (one process at a time measures).
"""

from pytest_trtcheck.gpu.names import (
    DEFAULT_KEY,
    check_budget_keys,
    find_gpu,
    fits,
    model_of,
    parse_extra_gpus,
    pick,
)
from pytest_trtcheck.gpu.table import ComputeCapability, GpuModel, builtin_models

__all__ = [
    "DEFAULT_KEY",
    "ComputeCapability",
    "GpuModel",
    "builtin_models",
    "check_budget_keys",
    "find_gpu",
    "fits",
    "model_of",
    "parse_extra_gpus",
    "pick",
]
