"""What earlier runs recorded of a test: JSON in a repository (`files`), today against it, and how it is recorded."""

from pytest_trtcheck.baselines.files import Baseline, Baselines, GpuKey, read
from pytest_trtcheck.baselines.latency import (
    MIN_SLOWDOWN,
    differences,
    enough,
    judge,
    notes,
)
from pytest_trtcheck.baselines.recording import Updated, update

__all__ = [
    "MIN_SLOWDOWN",
    "Baseline",
    "Baselines",
    "GpuKey",
    "Updated",
    "differences",
    "enough",
    "judge",
    "notes",
    "read",
    "update",
]
