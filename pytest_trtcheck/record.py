"""What a check found: plain frozen dataclasses that become, field by field, the JSON report (schema_version 1).

A record crosses processes (xdist) and time (reports, baselines) as JSON. JSON has no NaN or infinity; these are
written as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "error", "inconclusive", "not_measured"]
Evidence = Literal["engine", "emulated"]

SCHEMA_VERSION = 1
PROPERTY = "trtcheck"
"""The name under which a record rides on `item.user_properties`."""

SEVERITY: tuple[Verdict, ...] = ("not_measured", "pass", "inconclusive", "fail", "error")
"""From what says least to what must be looked at first: the order in which verdicts combine."""


@dataclass(frozen=True)
class OutputRecord:
    """One output, compared. Metrics are None where they are not defined for the output's dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    max: float | None = None
    l2: float | None = None
    abs: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    nonfinite: int = 0
    mismatches: int = 0
    worst_index: tuple[int, ...] | None = None
    verdict: Verdict = "pass"
    judged: tuple[Mapping[str, Any], ...] = ()
    """Every limit that was applied: {metric, value, limit, source, verdict}."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a report draws from: the worst elements, quantiles and octaves of the error, the metrics not above."""
    parts: tuple[Mapping[str, Any], ...] = ()
    """Every part of a divided output by every limit that is relative to a scale: the same, with where it lies."""


@dataclass(frozen=True)
class ParityRecord:
    """The parity part of a check; `worst` is the value of `metric` on the worst output."""

    verdict: Verdict
    metric: str
    tol: float | None
    worst: float | None
    outputs: tuple[OutputRecord, ...] = ()
    blame: Mapping[str, Any] | None = None
    reason: str | None = None
    tol_source: str | None = None


@dataclass(frozen=True)
class LatencyRecord:
    """The latency part of a check; `gpu` is the GPU whose budgets were asked for."""

    verdict: Verdict
    reason: str | None = None
    gpu: str | None = None
    samples: int = 0
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    bounds_ms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    budgets: tuple[Mapping[str, Any], ...] = ()
    clocks: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRecord:
    """The engine that was built or taken from the cache."""

    key: str
    cached: bool
    miss_reason: str | None
    build_s: float
    bytes: int
    device_memory_bytes: int | None = None
    layers_by_precision: Mapping[str, int] | None = None
    sha256: str | None = None
    """Of the serialized engine: two builds of one key need not be the same bytes."""


@dataclass(frozen=True)
class CheckRecord:
    """One check: one verdict, and all that it rests on."""

    nodeid: str
    model: str
    verdict: Verdict
    model_sha256: str | None = None
    precision: str | None = None
    backend: str | None = None
    evidence: Evidence | None = None
    compiled_for: str | None = None
    cases: int = 0
    seed: int | None = None
    inputs: str | None = None
    """Where the inputs came from: "returned", "trt_inputs", "given" (to `trt_check`) or "generated"."""
    reference: str | None = None
    """What `reference=` named; None: the FP32 model itself."""
    parity: ParityRecord | None = None
    latency: LatencyRecord | None = None
    engine: EngineRecord | None = None
    duration_s: float = 0.0
    runs: int = 1
    """How often its test ran until this record was made: 2 and more where it was run again (rerunfailures, flaky)."""
    message: str | None = None
    """The first thing to read when the verdict is not `pass`."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(jsonable(asdict(self)), allow_nan=False)


def is_bad(verdict: Verdict) -> bool:
    """Whether somebody has to look: it is neither a pass nor left unmeasured."""
    return verdict not in {"pass", "not_measured"}


def combine(verdicts: list[Verdict]) -> Verdict:
    """The verdict of several: the most severe of them; `not_measured` where there is none."""
    return max(verdicts, key=SEVERITY.index, default="not_measured")


def jsonable(value: Any) -> Any:
    """`value` with every non-finite float as a string, tuples as lists and mapping keys as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def number(value: float | str | None) -> float | None:
    """A number as it stands in a report ("inf" and "nan" are strings there) as a float again."""
    return None if value is None else float(value)
