"""Latency baselines: JSON in a repository (`files`), today against it (`comparison`), recording it (`recording`)."""

from pytest_trtcheck.latency.baselines.comparison import (
    MIN_SLOWDOWN,
    NAME,
    differences,
    enough,
    judge,
    notes,
    other_clocks,
)
from pytest_trtcheck.latency.baselines.files import Baseline, Baselines, GpuKey, read
from pytest_trtcheck.latency.baselines.recording import Updated, update

__all__ = [
    "MIN_SLOWDOWN",
    "NAME",
    "Baseline",
    "Baselines",
    "GpuKey",
    "Updated",
    "differences",
    "enough",
    "judge",
    "notes",
    "other_clocks",
    "read",
    "update",
]
