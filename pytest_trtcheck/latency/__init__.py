"""Latency: from samples to bounds (`stats`), to a verdict (`verdict`), and against an earlier run (`baseline`)."""

from pytest_trtcheck.latency.stats import CONFIDENCE, Bounds, min_samples
from pytest_trtcheck.latency.verdict import (
    QUANTILES,
    Decision,
    Judgement,
    LatencyDecision,
    LatencySummary,
    LookPlan,
    bounds,
    combine_decisions,
    conclude,
    decide,
    decide_exact,
    decide_qps,
    decide_speedup,
    summarize,
    to_record,
)

__all__ = [
    "CONFIDENCE",
    "QUANTILES",
    "Bounds",
    "Decision",
    "Judgement",
    "LatencyDecision",
    "LatencySummary",
    "LookPlan",
    "bounds",
    "combine_decisions",
    "conclude",
    "decide",
    "decide_exact",
    "decide_qps",
    "decide_speedup",
    "min_samples",
    "summarize",
    "to_record",
]
