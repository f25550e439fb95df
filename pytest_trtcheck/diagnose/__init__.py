"""Why a check failed: which step, which operator, and what to change.

`diagnose` says it as a `Blame`, whose `to_dict()` is the `blame` of a parity record; `explain` turns that into lines.
"""

from pytest_trtcheck.diagnose.bisection import Engine
from pytest_trtcheck.diagnose.diagnosis import diagnose
from pytest_trtcheck.diagnose.exporting import diagnose_export
from pytest_trtcheck.diagnose.result import Blame, Errors
from pytest_trtcheck.diagnose.subject import Budget, Subject
from pytest_trtcheck.diagnose.text import explain, verdict

__all__ = ["Blame", "Budget", "Engine", "Errors", "Subject", "diagnose", "diagnose_export", "explain", "verdict"]
