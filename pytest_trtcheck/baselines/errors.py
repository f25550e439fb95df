"""Did an error rise beyond what was recorded, though it keeps its limit?

TensorRT chooses kernels by timing them, and two builds of one model need not have the same error. How far apart they
lie is what `--trt-rebuild=3` shows; with one build the rise has to be large. Held against what was recorded is every
limit's metric, on each output and each part of one that has a scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any, Protocol

from pytest_trtcheck import compare
from pytest_trtcheck.baselines.digits import rounded
from pytest_trtcheck.errors import listed, plural
from pytest_trtcheck.latency.distribution import RECORD_AGAIN
from pytest_trtcheck.latency.probability import binomial_cdf, student_t_quantile
from pytest_trtcheck.metrics import distinct_digits, recorded
from pytest_trtcheck.record import BASELINE, BaselineRecord, JudgedRecord, RiseRecord, is_bad, jsonable, typed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_trtcheck.record import CheckRecord, OutputRecord, ParityRecord, Verdict

Figures = Mapping[str, Mapping[str, float]]
"""Errors by output, and by metric and part."""

ENOUGH_BUILDS = 3
"""Builds from which on their spread is known."""
RISE, RISE_SHARE = 1.5, 0.05
"""With fewer, an error has to rise by this factor, and by more than this share of its limit."""
LEAST_SHARE = 0.01
"""With enough of them, by more than this share: far below the limit, a few rounded bits double an error."""
ALPHA = 0.01
"""How often a check may fail by chance, all of its errors and builds together."""
USUAL_SPREAD, USUAL_BUILDS = 0.1, 4
"""What is known of the spread before a build is seen: builds differ by so much, and that counts as so many of them.
Three builds alone tell too little: by Student's t, a bound at 99.9 % would lie 26 standard deviations above them."""


@dataclass(frozen=True, kw_only=True)
class ErrorBaseline:
    """The errors that were recorded of a check.

    Parameters
    ----------
    model, model_sha256, inputs_sha256, reference_sha256
        What was checked, with what, against what; the last is None where the model itself was the reference.
    recorded
        The day, as in "2025-11-21".
    engines
        How many of the builds differ.
    made_with
        What else decides (`BaselineRecord.made_with`).
    values
        By output, and by metric and part: that of each build.
    """

    model: str
    model_sha256: str | None
    inputs_sha256: str | None
    reference_sha256: str | None
    recorded: str
    engines: int
    made_with: Mapping[str, str]
    values: Mapping[str, Mapping[str, tuple[float, ...]]]

    @property
    def builds(self) -> int:
        """How many builds there are of each error."""
        return max((len(each) for found in self.values.values() for each in found.values()), default=0)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file: rounded."""
        values = {
            output: {name: [rounded(value) for value in each] for name, each in found.items()}
            for output, found in self.values.items()
        }
        found: dict[str, Any] = jsonable({**asdict(self), "values": values})
        return found

    @classmethod
    def from_json(cls, data: Any) -> ErrorBaseline:
        """From what `to_json` gave.

        Raises
        ------
        ReportError, ValueError
            It is something else.
        """
        found = typed(data, cls)
        for output, by_metric in found.values.items():
            for name, values in by_metric.items():
                if not values or not all(map(math.isfinite, values)):
                    raise ValueError(f"{name} of {output!r} is no list of figures")
        if found.engines < 1:
            raise ValueError("engines is less than 1")
        return found


# --- figures ---------------------------------------------------------------------------------------------------------


def judged(outputs: Iterable[OutputRecord]) -> dict[tuple[str, str], JudgedRecord]:
    """Every limit on an error, by output and by metric and part; an error that could not be computed has no number."""
    found: dict[tuple[str, str], JudgedRecord] = {}
    for output in outputs:
        limited = [each for each in output.judged if each.limit is not None and not each.is_of_baseline]
        for entry in limited:
            if entry.metric != "nonfinite":
                found[output.name, entry.metric] = entry
        if len({part.part for part in output.parts}) > 1:
            for part in output.parts:
                if part.verdict != "not_measured":
                    found[output.name, f"{part.metric}, {part.part}"] = part
    return found


def figures(parity: ParityRecord) -> dict[str, dict[str, float]]:
    """The errors of a comparison, as baselines hold them."""
    found: dict[str, dict[str, float]] = {}
    for (output, name), entry in judged(parity.outputs).items():
        if entry.value is not None and math.isfinite(entry.value):
            found.setdefault(output, {})[name] = entry.value
    return found


def judged_figures(record: CheckRecord) -> list[tuple[str, str]]:
    """The errors of a record that a baseline may have: output, and metric and part."""
    return (
        [(output, name) for output, found in figures(record.parity).items() for name in found] if record.parity else []
    )


def of_builds(record: CheckRecord) -> tuple[list[Figures], int]:
    """The errors of every build that was judged, and how many engines differ."""
    assert record.parity is not None
    rebuilt = record.rebuild
    if rebuilt is None:
        return [figures(record.parity)], 1
    return [build.errors for build in rebuilt.builds if build.errors is not None], rebuilt.engines


# --- the rule --------------------------------------------------------------------------------------------------------


def allowed(
    costs: Sequence[float],
    limit: float,
    *,
    engines: int,
    compared: int,
    ratio: float = RISE,
    share: float = RISE_SHARE,
) -> float:
    """The most that an error may cost without having risen.

    Of at least three builds that are not all the same engine, the bound below which a further build's error lies with a
    probability of 1 − `ALPHA` / `compared`: of Student's t, on logarithms, with a variance that is pooled with what is
    usual, as in the moderated t statistic (Smyth, "Linear models and empirical Bayes methods …", 2004, eq. 2).

    Parameters
    ----------
    costs
        Of each build that was recorded (`Metric.cost`).
    limit
        What the tolerance's limit costs; above 0.
    compared
        How many errors are held against theirs, over all builds of today.
    ratio, share
        Where the spread is not known: the factor by which an error has to rise, and the share of its limit.
    """
    most, count = max(costs), len(costs)
    limit = limit if math.isfinite(limit) else 0.0
    if count < ENOUGH_BUILDS or engines < 2:
        return max(ratio * most, most + share * limit)
    logs = [math.log(max(cost, LEAST_SHARE * LEAST_SHARE * limit, 1e-300)) for cost in costs]
    degrees = USUAL_BUILDS + count - 1
    pooled = (USUAL_BUILDS * USUAL_SPREAD**2 + (count - 1) * variance(logs)) / degrees
    reach = student_t_quantile(1 - ALPHA / compared, degrees) * math.sqrt(pooled * (1 + 1 / count))
    return max(math.exp(min(fmean(logs) + reach, 700.0)), most + LEAST_SHARE * limit)


def _by_chance(before: float, now: float, rows: int, compared: int) -> bool:
    """Whether a share of `rows` may be larger by chance alone: where one more of a hundred is wrong, nothing rose.

    By the conditional test of two binomial shares (Przyborowski and Wilenski, 1940).
    """
    counts = round(before * rows), round(now * rows)
    return 1 - binomial_cdf(counts[1] - 1, sum(counts), 0.5) > ALPHA / compared


def rises(
    baseline: ErrorBaseline, record: CheckRecord, *, ratio: float = RISE, share: float = RISE_SHARE
) -> tuple[list[RiseRecord], int]:
    """The errors that rose, the one that rose by most first, and how many were held against theirs.

    `ratio` and `share` are as in `allowed`.
    """
    assert record.parity is not None
    builds, _ = of_builds(record)
    limits = judged(record.parity.outputs)
    pairs = [
        (output, name, before, entry, [build.get(output, {}).get(name) for build in builds])
        for (output, name), entry in limits.items()
        if entry.limit is not None and (before := baseline.values.get(output, {}).get(name))
    ]
    found = []
    for output, name, before, entry, values in pairs:
        metric = recorded(entry.metric, at_least=bool(entry.at_least))
        costs = [metric.cost(value) for value in before]
        compared = len(pairs) * len(builds)
        limit = metric.cost(entry.limit)
        most = allowed(costs, limit, engines=baseline.engines, compared=compared, ratio=ratio, share=share)
        value = max(values, key=metric.cost)
        chance = entry.rows and value is not None and _by_chance(max(before), value, entry.rows, compared)
        if metric.cost(value) > most and not chance:
            worst = max(before, key=metric.cost)
            found.append(RiseRecord(output, name, value, worst, metric.at_cost(most), entry.limit))
    return sorted(found, key=lambda rise: -_factor(rise, limits)), len(pairs)


def _factor(rise: RiseRecord, limits: Mapping[tuple[str, str], JudgedRecord]) -> float:
    entry = limits[rise.output, rise.metric]
    metric = recorded(entry.metric, at_least=bool(entry.at_least))
    before = metric.cost(rise.before)
    return metric.cost(rise.value) / before if before else math.inf


# --- judging ---------------------------------------------------------------------------------------------------------


class Subject(Protocol):
    """What was recorded of what: a baseline of errors, or of a score."""

    @property
    def model_sha256(self) -> str | None:
        """Of the model."""

    @property
    def inputs_sha256(self) -> str | None:
        """Of all inputs."""

    @property
    def reference_sha256(self) -> str | None:
        """Of a reference of its own."""

    @property
    def made_with(self) -> Mapping[str, str]:
        """What else decides."""


def different_hashes(baseline: Subject, record: CheckRecord) -> list[str]:
    """Why what a check found cannot be compared with what was recorded."""
    found = []
    own = baseline.reference_sha256 is None and record.reference_sha256 is None
    # Beside a reference of its own, another model answers the same question: is it as near as the last one was?
    if own and baseline.model_sha256 != record.model_sha256:
        found.append(f"it was recorded for another model ({_hashes(baseline.model_sha256, record.model_sha256)})")
    if baseline.reference_sha256 != record.reference_sha256:
        hashes = _hashes(baseline.reference_sha256, record.reference_sha256)
        found.append(f"it was recorded against another reference ({hashes})")
    if baseline.inputs_sha256 != record.inputs_sha256:
        hashes = _hashes(baseline.inputs_sha256, record.inputs_sha256)
        found.append(f"it was recorded with other inputs ({hashes})")
    return found


def changed(baseline: Subject, record: CheckRecord, made_with: Mapping[str, str]) -> list[str]:
    """What is another now than when the baseline was recorded, and may be why an error is."""
    found = []
    if baseline.model_sha256 != record.model_sha256:
        found.append(f"the model ({_hashes(baseline.model_sha256, record.model_sha256)})")
    for name in dict.fromkeys((*baseline.made_with, *made_with)):
        then, now = baseline.made_with.get(name, "none"), made_with.get(name, "none")
        if then != now:
            found.append(f"{name} ({then} then, {now} now)")
    return found


def _hashes(then: str | None, now: str | None) -> str:
    words = ["none" if each is None else f"{each[:8]}…" for each in (then, now)]
    return f"sha256 {words[0]} then, {words[1]} now"


def judge(
    baseline: ErrorBaseline | None, record: CheckRecord, now: BaselineRecord, *, updating: bool
) -> BaselineRecord:
    """What comes of holding a check's errors against a baseline.

    Parameters
    ----------
    now
        With what is known before: `gpu` and `made_with`.
    updating
        Whether what was measured becomes the baseline: then a rise is accepted, and said.
    """
    if baseline is None:
        return replace(now, text="no baseline of this check's errors: record one, --trt-update-baseline")
    other = changed(baseline, record, now.made_with)
    now = replace(now, recorded=baseline.recorded, builds=baseline.builds, changed=tuple(other))
    if different := different_hashes(baseline, record):
        text = f"the baseline of {baseline.recorded} is not comparable: {'; '.join(different)}"
        return replace(now, text=text if updating else f"{text}; {RECORD_AGAIN}")
    found, count = rises(baseline, record)
    if not count:
        text = f"the baseline of {baseline.recorded} has none of the errors that are judged now"
        return replace(now, text=text if updating else f"{text}; {RECORD_AGAIN}")
    if not found:
        text = f"no error rose since {_since(baseline)}"
        new = [place for place in judged_figures(record) if place[1] not in baseline.values.get(place[0], {})]
        if new and not updating:
            text += f", which has none of {listed(map(' '.join, new))}; {RECORD_AGAIN}"
        return replace(now, verdict="pass", text=text)
    accepted = ", accepted as the new baseline" if updating else ""
    rose = listed((_risen(rise) for rise in found), separator="\n  ")
    text = f"{rose}\n  since {_since(baseline)}{accepted}; {told(other)}"
    verdict: Verdict = "pass" if updating else "fail"
    return replace(now, verdict=verdict, text=text, rises=tuple(found))


def _since(baseline: ErrorBaseline) -> str:
    if baseline.builds == 1:
        return f"the baseline of {baseline.recorded} (one build)"
    same = ", the same bytes each time" if baseline.engines == 1 else ""
    return f"the baseline of {baseline.recorded} ({plural(baseline.builds, 'build')}{same})"


def _risen(rise: RiseRecord) -> str:
    ratio = rise.value / rise.before if rise.value is not None and rise.before > 0 else math.inf
    digits = 3 if rise.value is None else max(3, distinct_digits(rise.value, rise.before))
    factor = f" (×{ratio:.3g})" if math.isfinite(ratio) else ""
    value = "what cannot be computed" if rise.value is None else f"{rise.value:.{digits}g}"
    went = "fell" if rise.value is not None and rise.value < rise.before else "rose"
    return (
        f"{rise.metric} of output {rise.output!r} {went} from {rise.before:.{digits}g} to {value}{factor}, though it "
        f"keeps the limit of {rise.limit:g} (up to {rise.allowed:.3g} counts as unchanged)"
    )


def told(other: Sequence[str]) -> str:
    """What else changed, in words."""
    return f"what else changed: {'; '.join(other)}" if other else "nothing else that is recorded changed"


def applied(parity: ParityRecord, found: BaselineRecord) -> ParityRecord:
    """A comparison that passed, with the errors that rose as limits that are exceeded."""
    if found.verdict != "fail" or is_bad(parity.verdict):
        return parity
    limits = judged(parity.outputs)
    exceeded = [(rise.output, _exceeded(rise, found, limits[rise.output, rise.metric])) for rise in found.rises]
    outputs = []
    for output in parity.outputs:
        new = tuple(entry for name, entry in exceeded if name == output.name)
        outputs.append(replace(output, judged=(*output.judged, *new), verdict="fail") if new else output)
    summary = compare.summarize(outputs, parity.metric)
    return replace(summary, blame=parity.blame, keep_fp32=parity.keep_fp32, reason=found.text)


def _exceeded(rise: RiseRecord, found: BaselineRecord, entry: JudgedRecord) -> JudgedRecord:
    return JudgedRecord(
        entry.metric,
        rise.value,
        rise.allowed,
        f"{BASELINE} of {found.recorded}",
        "fail",
        part=entry.part,
        at_least=entry.at_least,
        case=entry.case,
        sample=entry.sample,
    )
