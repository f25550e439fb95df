"""Limits, measurements and verdicts: numpy in, verdict and text out. What a metric is stands in `metrics`.

The way through: `resolve_limits` once per check; per input `measure_all`; `merge` each output's measurements; `judge`
every output; `summarize` them; and where that fails, `examine` an input that failed and `explain`.
"""

from pytest_trtcheck.compare.division import Division
from pytest_trtcheck.compare.explanation import explain
from pytest_trtcheck.compare.judge import (
    LimitResult,
    judge,
    judge_all,
    loose_notes,
    sentence,
    summarize,
    unexercised_notes,
    usage,
)
from pytest_trtcheck.compare.limits import Limit, Limits, resolve_limits
from pytest_trtcheck.compare.measure import measure, measure_all
from pytest_trtcheck.compare.measurement import (
    Element,
    Fault,
    Histogram,
    Measurement,
    NonFinite,
    merge,
)
from pytest_trtcheck.compare.patterns import Examination, Pattern, examine, worst_case

__all__ = [
    "Division",
    "Element",
    "Examination",
    "Fault",
    "Histogram",
    "Limit",
    "LimitResult",
    "Limits",
    "Measurement",
    "NonFinite",
    "Pattern",
    "examine",
    "explain",
    "judge",
    "judge_all",
    "loose_notes",
    "measure",
    "measure_all",
    "merge",
    "resolve_limits",
    "sentence",
    "summarize",
    "unexercised_notes",
    "usage",
    "worst_case",
]
