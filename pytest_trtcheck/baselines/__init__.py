"""What earlier runs recorded of a test: JSON in a repository (`files`), today against it, and how it is recorded."""

from pytest_trtcheck.baselines.errors import ErrorBaseline
from pytest_trtcheck.baselines.files import Baselines, CheckKey, Entry, Place, opened
from pytest_trtcheck.baselines.latency import MIN_SLOWDOWN, LatencyBaseline, differences, enough, judge, notes
from pytest_trtcheck.baselines.recording import Updated, update

__all__ = [
    "MIN_SLOWDOWN",
    "Baselines",
    "CheckKey",
    "Entry",
    "ErrorBaseline",
    "LatencyBaseline",
    "Place",
    "Updated",
    "differences",
    "enough",
    "judge",
    "notes",
    "opened",
    "update",
]
