"""What comparing outputs found: limits, errors, and who is to blame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_trtcheck.record.baseline import BaselineRecord, ItemsRecord
from pytest_trtcheck.record.common import BASELINE, Verdict, absent


@dataclass(frozen=True)
class JudgedRecord:
    """One limit that was applied to an output; `value` is None where the metric could not be computed.

    `limit` is None where the output is not even of the reference's shape or dtype; then `metric` says which. `part`
    is the worst of a divided output, `case` and `sample` are where it was found. `at_least` is said of a metric that
    is not built in, where its limit is the least that it may be.
    """

    metric: str
    value: float | None
    limit: float | None
    source: str | None
    verdict: Verdict
    note: str | None = absent()
    part: str | None = absent()
    at_least: bool | None = absent()
    case: int | None = absent()
    sample: int | None = absent()
    rows: int | None = absent()
    """Of a share: of how many rows, or elements."""

    @property
    def is_of_baseline(self) -> bool:
        """Whether the limit is what a baseline recorded, and not the tolerance."""
        return (self.source or "").startswith(BASELINE)


@dataclass(frozen=True, kw_only=True)
class PartRecord(JudgedRecord):
    """The same of one part of a divided output, with where the part lies: ranges are (axis, start, stop)."""

    ranges: tuple[tuple[int, int, int | None], ...] = ()
    band: tuple[float, float] | None = None
    natural: float | None = None
    size: int = 0
    peak: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class ElementRecord:
    """One of the worst elements, and |difference|."""

    index: tuple[int, ...]
    expected: bool | int | float | str | None
    actual: bool | int | float | str | None
    error: float | None = None
    case: int | None = None

    def __post_init__(self) -> None:
        for name in ("expected", "actual"):
            if getattr(self, name) in ("nan", "inf", "-inf"):
                object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True)
class OutputDetails:
    """What a report draws from: the worst elements, quantiles and octaves of the error, the metrics of no field.

    `error_octaves` are (e, n): n elements with 2^e ≤ |error| < 2^(e+1). `emulated` holds the emulated model's errors by
    metric, where an engine's are judged.
    """

    allclose: float | None = absent(beside="cases")
    top1: float | None = absent(beside="cases")
    cases: int | None = absent()
    peak: float | None = absent(beside="cases")
    error_quantiles: Mapping[str, float | None] | None = absent(beside="cases")
    error_octaves: tuple[tuple[int, int], ...] = absent((), beside="cases")
    error_zeros: int | None = absent(beside="cases")
    error_sampled: int | None = absent(beside="cases")
    worst: tuple[ElementRecord, ...] = absent((), beside="cases")
    notes: tuple[str, ...] = absent((), beside="cases")
    uncompared: str | None = absent(beside="cases")
    emulated: Mapping[str, float | None] | None = absent()


@dataclass(frozen=True)
class OutputRecord:
    """One output, compared. Metrics are None where they are not defined for the output's dtype."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    max: float | None = None
    l2: float | None = None
    abs: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    nonfinite: int = 0
    mismatches: int = 0
    worst_index: tuple[int, ...] | None = None
    verdict: Verdict = "pass"
    judged: tuple[JudgedRecord, ...] = ()
    """Every limit that was applied."""
    details: OutputDetails = OutputDetails()
    parts: tuple[PartRecord, ...] = ()
    """Every part of a divided output by every limit that is relative to a scale."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor along the graph: how far it is from the reference's, and what did not fit into its precision."""

    name: str
    node: str | None = None
    op_type: str | None = None
    error: float | None = None
    own: float | None = None
    max: float | None = None
    l2: float | None = None
    snr_db: float | None = None
    max_abs: float | None = None
    nonfinite: int | None = None
    overflow: float | None = None
    underflow: float | None = None
    saturated: float | None = None


BLAMED = {
    "export": "the export",
    "precision": "the precision",
    "engine": "the engine",
    "both": "the precision as well as the engine",
    "spread": "the precision",
}
"""Who is to blame, as one says it, by the step that reports have."""


class _Keyed:
    """A record that can be asked by key as well: the text of a diagnosis reads it as it reads the dictionary."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where it is not known."""
        found = getattr(self, name, None)
        return default if found is None else found


@dataclass(frozen=True)
class BlameRecord(_Keyed):
    """`diagnose.result.Blame` as reports have it; `tensor` is the one to look at first, `summary` the headline."""

    step: str | None = None
    headline: str | None = None
    errors: Mapping[str, Any] | None = None
    culprit: Mapping[str, Any] | None = None
    others: tuple[str, ...] = ()
    contributions: tuple[Mapping[str, Any], ...] = ()
    tensors: tuple[TensorRecord, ...] = ()
    keep_fp32: tuple[str, ...] | None = None
    keep_value: float | None = None
    confirmed: bool = False
    confirmed_by: str | None = None
    keep_emulated: float | None = None
    parts: Mapping[str, float | None] | None = absent()
    calibration: Mapping[str, Any] | None = None
    builds: int = 0
    trials: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    is_complete: bool = True
    summary: str | None = None
    tensor: str | None = None

    @property
    def who(self) -> str:
        """Who is to blame, as one says it."""
        return BLAMED.get(self.step or "", self.step or "")


@dataclass(frozen=True)
class ParityRecord:
    """The parity part of a check; `worst` is the value of `metric` on the worst output."""

    verdict: Verdict
    metric: str = ""
    tol: float | None = None
    worst: float | None = None
    outputs: tuple[OutputRecord, ...] = ()
    blame: BlameRecord | None = None
    reason: str | None = None
    tol_source: str | None = None
    keep_fp32: tuple[str, ...] | None = absent()
    """The nodes that `keep_fp32="auto"` found; empty where none are needed."""


@dataclass(frozen=True)
class SampleRecord:
    """A sample that the reference and the engine score differently: its case, and its place in there, both from 0."""

    case: int
    sample: int
    reference: float | str | None = None
    value: float | str | None = None


@dataclass(frozen=True)
class ScoreRecord:
    """The score of a check: of the reference, of what ran, and by how much it fell.

    `lower` and `upper` bound `drop` with `confidence` (both sides together); a negative drop is a gain. The limit,
    `max_drop`, and all of these are in the score's own unit.
    """

    verdict: Verdict
    name: str = ""
    reference: float | None = None
    value: float | None = None
    drop: float | None = None
    lower: float | None = None
    upper: float | None = None
    confidence: float | None = None
    max_drop: float | None = None
    lower_is_better: bool = False
    samples: int = 0
    disagreeing: int = 0
    """Of how many samples the items differ."""
    samples_to_decide: int | None = absent()
    """About how many samples would decide, where these did not."""
    method: str | None = None
    reason: str | None = None
    worst: tuple[SampleRecord, ...] = ()
    """The samples that lost most; where items are no numbers, the first that changed."""
    errors: Mapping[str, float | None] | None = absent()
    """max|y−r| / max|r| by output, of the first `errors_of_cases` cases: told, not judged."""
    errors_of_cases: int | None = absent()
    items: ItemsRecord | None = absent()  # noqa: RUF009 - it is a field
    """What ran scored on each sample, where there are baselines to record or to hold it against."""
    baseline: BaselineRecord | None = absent()  # noqa: RUF009 - it is a field
    """What came of holding it against what was recorded."""
    labels_sha256: str | None = absent()
    """Of the labels of all samples."""

    @property
    def asked(self) -> tuple[object, ...]:
        """What was asked: the score, the most that it may fall, and of which samples."""
        return self.name, self.max_drop, self.lower_is_better, self.samples, self.labels_sha256

    def fell_further_than(self, other: ScoreRecord) -> bool:
        """Whether it surely fell further: by more at the least than the other at the most."""
        return self.lower is not None and other.upper is not None and self.lower > other.upper
