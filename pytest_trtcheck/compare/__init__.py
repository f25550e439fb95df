"""Metrics, tolerances and verdicts: numpy in, verdict and text out.

The way through: `resolve_limits` once per check; per input `measure_all`; `merge` each output's measurements; `judge`
every output; `summarize` them; and where that fails, `examine` an input that failed and `explain`.
"""

from pytest_trtcheck.compare.division import Division
from pytest_trtcheck.compare.explanation import explain
from pytest_trtcheck.compare.limits import DEFAULT_TOLERANCE, Limit, Limits, default_limit, resolve_limits, top1_tie
from pytest_trtcheck.compare.measurement import (
    Element,
    Fault,
    Fit,
    Histogram,
    Measurement,
    NonFinite,
    Score,
    merge,
)
from pytest_trtcheck.compare.metrics import measure, measure_all
from pytest_trtcheck.compare.patterns import Examination, Pattern, examine, worst_case
from pytest_trtcheck.compare.verdict import judge, loose_notes, sentence, summarize, unexercised_notes

__all__ = [
    "DEFAULT_TOLERANCE",
    "Division",
    "Element",
    "Examination",
    "Fault",
    "Fit",
    "Histogram",
    "Limit",
    "Limits",
    "Measurement",
    "NonFinite",
    "Pattern",
    "Score",
    "default_limit",
    "examine",
    "explain",
    "judge",
    "loose_notes",
    "measure",
    "measure_all",
    "merge",
    "resolve_limits",
    "sentence",
    "summarize",
    "top1_tie",
    "unexercised_notes",
    "worst_case",
]
