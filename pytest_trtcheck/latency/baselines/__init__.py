"""Latency baselines: JSON in a repository (`files`), today held against it (`judging`), recording it (`recording`)."""

from pytest_trtcheck.latency.baselines.files import Baseline, Baselines, GpuKey, read
from pytest_trtcheck.latency.baselines.judging import (
    MIN_SLOWDOWN,
    differences,
    enough,
    judge,
    notes,
    other_clocks,
)
from pytest_trtcheck.latency.baselines.recording import Updated, update

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
    "other_clocks",
    "read",
    "update",
]
