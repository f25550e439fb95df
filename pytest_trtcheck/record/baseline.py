"""What was held against what was recorded before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_trtcheck.record.common import Verdict


@dataclass(frozen=True)
class ItemsRecord:
    """Numbers, one a sample or one array a sample: FP32, little-endian, deflated, in base64."""

    shape: tuple[int, ...]
    data: str


@dataclass(frozen=True)
class GpuRecord:
    """The GPU that was present."""

    name: str | None = None
    uuid: str | None = None
    compute_capability: str | None = None
    """As in "9.0"."""


@dataclass(frozen=True)
class RiseRecord:
    """An error that rose beyond what a baseline recorded.

    Parameters
    ----------
    metric
        With the part of the output behind it, where that is one of several.
    before
        The worst of the builds that were recorded.
    allowed
        The worst that is no rise.
    limit
        Of the tolerance.
    """

    output: str
    metric: str
    value: float | None
    before: float
    allowed: float
    limit: float | None


@dataclass(frozen=True)
class BaselineRecord:
    """What the errors of a check were held against (`--trt-baseline`).

    Parameters
    ----------
    verdict
        `not_measured` where there is no baseline of it, or none that can be compared.
    made_with
        What decides beside model, inputs and reference: versions, driver, options, calibration.
    recorded, builds
        Of the baseline: the day, and how many builds it has.
    changed
        What of `made_with` was another when it was recorded, in words.
    rises
        The errors that rose.
    gpu
        The GPU that ran it; None of what no GPU of this machine ran.
    """

    verdict: Verdict
    text: str
    made_with: Mapping[str, str] = field(default_factory=dict)
    recorded: str | None = None
    builds: int | None = None
    changed: tuple[str, ...] = ()
    rises: tuple[RiseRecord, ...] = ()
    gpu: GpuRecord | None = None
