"""Did a test become slower than its baseline? An entry of its own among the budgets of its latency."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.baselines.digits import rounded
from pytest_trtcheck.latency.comparison import compare, decided, other_clocks
from pytest_trtcheck.latency.distribution import RECORD_AGAIN, Distribution
from pytest_trtcheck.latency.stats import SETTLING_S, Series, settling
from pytest_trtcheck.record import (
    BASELINE,
    SEVERITY,
    BudgetRecord,
    Conditions,
    LatencyDetails,
    LatencyRecord,
    Verdict,
    combine,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.latency.stats import Samples

MIN_SLOWDOWN = 0.03
"""A slowdown of the median that is surely above this fails: a loss of 5 % is to be seen in spite of the uncertainty of
both runs, and runs of one engine on a card that is left alone differ by less (docs/baselines.md)."""
TIGHT = 0.01
"""While a baseline is recorded, samples are taken until the median's bounds are so close to each other."""


@dataclass(frozen=True, kw_only=True)
class LatencyBaseline:
    """The latency that was recorded of a check.

    Parameters
    ----------
    model, model_sha256
        The model's name, and the hash of what was measured.
    input_shapes
        By input name.
    measured
        "GPU time" or "latency with transfers".
    cuda_graph
        Whether the runs were launched as a CUDA graph.
    recorded
        The day, as in "2025-11-21".
    tensorrt, driver
        What it was recorded with, such as "tensorrt_rtx 1.7.1.116".
    sm_mhz, power_limit_w, power_mode
        The GPU's clock while it was measured, its power limit, and what nvpmodel set; None where that was not told.
    """

    model: str
    model_sha256: str | None
    input_shapes: Mapping[str, tuple[int, ...]]
    measured: str
    cuda_graph: bool
    recorded: str
    tensorrt: str
    driver: str | None
    distribution: Distribution
    sm_mhz: int | None = None
    power_limit_w: float | None = None
    power_mode: str | None = None

    @property
    def conditions(self) -> Conditions:
        """How the GPU was set up."""
        return Conditions(sm_mhz=self.sm_mhz, power_limit_w=self.power_limit_w, power_mode=self.power_mode)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file: rounded, bounds outwards."""
        distribution = self.distribution.to_json()
        return {
            "cuda_graph": self.cuda_graph,
            "distribution": {
                "bounds_ms": {
                    name: [rounded(low, ROUND_FLOOR), rounded(high, ROUND_CEILING)]
                    for name, (low, high) in distribution["bounds_ms"].items()
                },
                # Never more sure than it was.
                "confidence": rounded(distribution["confidence"], ROUND_FLOOR),
                "quantiles_ms": {q: rounded(value) for q, value in distribution["quantiles_ms"].items()},
                "samples": distribution["samples"],
            },
            "driver": self.driver,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "measured": self.measured,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "power_limit_w": None if self.power_limit_w is None else rounded(self.power_limit_w),
            "power_mode": self.power_mode,
            "recorded": self.recorded,
            "sm_mhz": self.sm_mhz,
            "tensorrt": self.tensorrt,
        }

    @classmethod
    def from_json(cls, data: Any) -> LatencyBaseline:
        """From what `to_json` gave.

        Raises
        ------
        ReportError, KeyError, TypeError, ValueError, AttributeError, OverflowError
            It is something else.
        """
        distribution = dict(data["distribution"])
        # A file's keys are in the order of their text.
        distribution["quantiles_ms"] = dict(
            sorted(distribution["quantiles_ms"].items(), key=lambda item: float(item[0]))
        )
        texts = {name: data[name] for name in ("model", "measured", "recorded", "tensorrt")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("model, measured, recorded and tensorrt are texts")
        if not isinstance(data["cuda_graph"], bool):
            raise TypeError("cuda_graph is true or false")
        # Files of earlier versions lack these.
        sm_mhz, power_limit_w, power_mode = (data.get(name) for name in ("sm_mhz", "power_limit_w", "power_mode"))
        if power_mode is not None and not isinstance(power_mode, str):
            raise TypeError("power_mode is a text or null")
        return cls(
            **texts,
            model_sha256=data["model_sha256"],
            input_shapes={str(name): tuple(map(int, shape)) for name, shape in data["input_shapes"].items()},
            cuda_graph=data["cuda_graph"],
            driver=data["driver"],
            distribution=Distribution.from_json(distribution),
            sm_mhz=None if sm_mhz is None else int(sm_mhz),
            power_limit_w=None if power_limit_w is None else float(power_limit_w),
            power_mode=power_mode,
        )


def enough(samples_ms: Samples, confidence: float, baseline: LatencyBaseline | None) -> bool:
    """Whether the samples decide about a baseline, or without one are good enough to be one.

    They are neither while clocks settle: the baseline of a cold GPU would fail every warm one.

    Parameters
    ----------
    samples_ms
        In the order in which they were taken.
    confidence
        To decide with: of this look, when looking repeatedly.
    """
    series = Series.of(samples_ms)
    moves = settling(series, confidence=confidence).percent_per_s
    if moves is not None and abs(moves) / 100 * SETTLING_S > TIGHT:
        return False
    now = Distribution.of(series, confidence)
    if baseline is None:
        return now.width <= TIGHT
    return compare(now, baseline.distribution, min_slowdown=MIN_SLOWDOWN).decision != "undecided"


def differences(baseline: LatencyBaseline, details: LatencyDetails, model_sha256: str | None) -> list[str]:
    """Why what is measured now cannot be compared with the baseline.

    Parameters
    ----------
    details
        Of the latency record. What is not known yet (`cuda_graph` and clocks, before the measurement) is not looked at.
    """
    now = details.conditions or Conditions()
    found = []
    if model_sha256 is not None and baseline.model_sha256 != model_sha256:
        found.append(f"it was recorded for another model (sha256 {str(baseline.model_sha256)[:8]}…)")
    recorded = baseline.input_shapes
    if now.input_shapes is not None and now.input_shapes != recorded:
        found.append(
            f"it was recorded for inputs of other shapes ({_shapes(recorded)}; now {_shapes(now.input_shapes)})"
        )
    if details.measured not in {None, baseline.measured}:
        found.append(f"it is of {baseline.measured}, and {details.measured} was measured now")
    if details.cuda_graph not in {None, baseline.cuda_graph}:
        words = ("as a CUDA graph", "without a CUDA graph")
        then, today = words if baseline.cuda_graph else words[::-1]
        found.append(f"it was recorded {then}, and the engine was launched {today} now")
    return [*found, *other_clocks(baseline.conditions, now)]


def judge(
    record: LatencyRecord, baseline: LatencyBaseline | None, *, model_sha256: str | None = None, updating: bool = False
) -> LatencyRecord:
    """The record with an entry "baseline" among its budgets, and the verdict and reason that follow from it.

    A slowdown fails the record, unless the measurement was disturbed: then it is inconclusive, like a budget. Where
    there is no baseline, or none that can be compared, the entry is `not_measured` and takes no part in the verdict.

    Parameters
    ----------
    record
        Measured, with `distribution`, `conditions` and `disturbances` in its details.
    baseline
        Of this test on this GPU.
    updating
        Whether what was measured becomes the baseline: then a slowdown is accepted, and said.
    """
    if not record.samples:
        return record
    gpu = (record.details.conditions and record.details.conditions.gpu) or record.gpu
    if baseline is None:
        what = f"no baseline of this test on {gpu}"
        return _not_judged(record, what if updating else f"{what}: record one, --trt-update-baseline")
    different = differences(baseline, record.details, model_sha256)
    if different:
        what = f"the baseline of {baseline.recorded} is not comparable: {'; '.join(different)}"
        return _not_judged(record, what if updating else f"{what}; {RECORD_AGAIN}")
    now = Distribution.from_json(record.details.distribution)
    waited = record.details.enqueue_bound
    found = compare(now, baseline.distribution, min_slowdown=MIN_SLOWDOWN, enqueue_bound=waited)
    verdict = decided(found)
    text = f"{found.message}, recorded {_recorded(baseline, record)}"
    disturbances = record.details.disturbances
    if verdict != "pass" and updating:
        verdict, text = "pass", f"{text}; accepted as the new baseline"
    elif verdict == "fail" and disturbances:
        verdict, text = "inconclusive", f"{text}; but the measurement was disturbed: {'; '.join(disturbances)}"
    elif verdict == "inconclusive":
        text = f"{text}; that is too uncertain to tell"
    bounds = now.bounds_ms.get("p50_ms", (None, None))
    before = baseline.distribution.quantile_ms("p50_ms")
    entry = BudgetRecord(
        verdict,
        BASELINE,
        limit_ms=before * (1 + found.min_slowdown),
        value_ms=now.quantile_ms("p50_ms"),
        lower_ms=bounds[0],
        upper_ms=bounds[1],
        baseline_p50_ms=before,
        ratio=found.ratio,
        text=text,
    )
    return _with_entry(record, entry)


def notes(record: LatencyRecord) -> tuple[str, ...]:
    """What a person should know of the baseline although the verdict does not say it."""
    return tuple(
        entry.text or ""
        for entry in record.budgets
        if entry.name == BASELINE and entry.verdict == "not_measured" and record.verdict != "not_measured"
    )


def _not_judged(record: LatencyRecord, text: str) -> LatencyRecord:
    return _with_entry(record, BudgetRecord("not_measured", BASELINE, text=text))


def _with_entry(record: LatencyRecord, entry: BudgetRecord) -> LatencyRecord:
    verdict, text = entry.verdict, entry.text or ""
    # Without budgets there was nothing else that could pass.
    others: list[Verdict] = [record.verdict] if record.budgets else []
    total = combine([*others, verdict])
    told = [record.reason] if record.reason and record.budgets else []
    if verdict != "pass" and SEVERITY.index(verdict) >= SEVERITY.index(total):
        # The worst comes first; what is as bad stands beside it.
        told = [text, *told] if record.verdict != total else [*told, text]
    return replace(record, verdict=total, reason="; ".join(told) or None, budgets=(*record.budgets, entry))


def _recorded(baseline: LatencyBaseline, record: LatencyRecord) -> str:
    now = record.details.conditions or Conditions()
    pairs = [("", baseline.tensorrt, now.tensorrt), ("driver ", baseline.driver, now.driver)]
    words = [
        f"{what}{then}" + (f" (now {today})" if today is not None and today != then else "")
        for what, then, today in pairs
        if then
    ]
    return f"{baseline.recorded} with {', '.join(words)}"


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
