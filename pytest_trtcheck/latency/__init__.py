"""Latency: from samples to bounds (`stats`), to a verdict (`verdict`), against an earlier one (`comparison`), and under
load (`load`).
"""

from pytest_trtcheck.latency.stats import CONFIDENCE, Bounds, Series, min_samples
from pytest_trtcheck.latency.verdict import (
    QUANTILES,
    BudgetResult,
    Decision,
    LatencyDecision,
    LookPlan,
    combine_decisions,
    conclude,
    decide,
    decide_exact,
    decide_median,
    decide_qps,
    decide_speedup,
    to_record,
    unmeasured,
)

__all__ = [
    "CONFIDENCE",
    "QUANTILES",
    "Bounds",
    "BudgetResult",
    "Decision",
    "LatencyDecision",
    "LookPlan",
    "Series",
    "combine_decisions",
    "conclude",
    "decide",
    "decide_exact",
    "decide_median",
    "decide_qps",
    "decide_speedup",
    "min_samples",
    "to_record",
    "unmeasured",
]
