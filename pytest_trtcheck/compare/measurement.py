"""What comparing one output with its reference found. No limit is known here, so a measurement can be judged again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pytest_trtcheck.errors import ComparisonError, listed
from pytest_trtcheck.metrics import Sums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.metrics import Kind, Score
    from pytest_trtcheck.spec import Part, Shape

Band: TypeAlias = tuple[float, float]
"""Of magnitudes: above the first, up to the second."""

BINS_PER_OCTAVE = 4
_BIAS = 1023
"""Of an FP64 exponent (IEEE 754)."""


@dataclass(frozen=True)
class Fault:
    """Why output and reference can't agree whatever their values; `text` names what came and what was expected."""

    what: Literal["shape", "dtype"]
    text: str
    case: int | None = None


@dataclass(frozen=True)
class Element:
    """One element: its index, what the reference has there, what came instead, and |difference| (inf for NaN)."""

    index: tuple[int, ...]
    expected: float | int | str
    actual: float | int | str
    error: float
    case: int | None = None


@dataclass(frozen=True)
class NonFinite:
    """How many elements are NaN or infinite.

    `same` are equally so on both sides (infinities of one sign), `different` are not: those fail. The others count
    each side by itself.
    """

    same: int = 0
    different: int = 0
    nan_actual: int = 0
    inf_actual: int = 0
    nan_reference: int = 0
    inf_reference: int = 0

    @property
    def total(self) -> int:
        """Elements that are non-finite on either side."""
        return self.same + self.different

    def __add__(self, other: NonFinite) -> NonFinite:
        return NonFinite(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Histogram:
    """Counts of |difference| in four bins to the octave, over the elements that are finite on both sides.

    `counts` maps a bin to its number of elements; `low(bin)` is where it begins and the next one is where it ends.
    `zeros` are exact, `largest` is the largest of all. Of large tensors only `sampled` elements, evenly spaced, were
    counted.
    """

    counts: Mapping[int, int] = field(default_factory=dict)
    zeros: int = 0
    sampled: int = 0
    largest: float = 0.0

    @staticmethod
    def low(bin: int) -> float:
        """The smallest |difference| of a bin: 2^e · (1 + m/4), the FP64 numbers that share e and two mantissa bits."""
        exponent, quarter = divmod(bin, BINS_PER_OCTAVE)
        return math.ldexp(1 + quarter / BINS_PER_OCTAVE, exponent - _BIAS)

    def quantile(self, share: float) -> float | None:
        """An upper bound, at most a quarter too large, of the |difference| that `share` of the elements keep."""
        needed = share * self.sampled
        seen = self.zeros
        if not self.sampled:
            return None
        if seen >= needed:
            return 0.0
        for each in sorted(self.counts):
            seen += self.counts[each]
            if seen >= needed:
                break
        return min(self.low(each + 1), self.largest)

    def octaves(self) -> list[list[int]]:
        """The same in bins of a factor of two: [e, n], n elements between 2^e and 2^(e+1), in the order of e."""
        found: dict[int, int] = {}
        for each, count in sorted(self.counts.items()):
            exponent = each // BINS_PER_OCTAVE - _BIAS
            found[exponent] = found.get(exponent, 0) + count
        return [[exponent, count] for exponent, count in found.items()]

    def __add__(self, other: Histogram) -> Histogram:
        keys = sorted({*self.counts, *other.counts})
        counts = {key: self.counts.get(key, 0) + other.counts.get(key, 0) for key in keys}
        largest = max(self.largest, other.largest)
        return Histogram(counts, self.zeros + other.zeros, self.sampled + other.sampled, largest)


@dataclass(frozen=True, kw_only=True)
class PartSums(Sums):
    """What a part adds up to in one input, or one sample of it.

    Parameters
    ----------
    different
        Elements that are NaN or infinite on one side alone.
    whole
        max|r| of the whole output.
    case, sample
        The input, of several, and the sample of a batch.
    """

    different: int = 0
    whole: float = 0.0
    case: int | None = None
    sample: int | None = None


@dataclass(frozen=True)
class PartMeasurement:
    """A part of an output that is judged by its own scale.

    Parameters
    ----------
    part
        Where it lies, and its natural scale.
    sums
        One for each input, or each sample.
    band
        The magnitudes of its elements in the reference, where it was divided by them: sentinel values lie far beyond
        the rest.
    """

    part: Part
    sums: tuple[PartSums, ...]
    band: Band | None = None

    def __str__(self) -> str:
        if self.band is None:
            return str(self.part)
        where = f" in {self.part}" if self.part.ranges else ""
        if self.is_sentinel:
            return f"sentinel values up to ±{self.peak:.4g}{where}"
        return f"all but the sentinel values beyond ±{self.band[1]:.4g}{where}"

    @property
    def is_sentinel(self) -> bool:
        """Whether it is the values that lie beyond the rest."""
        return self.band is not None and self.band[0] > 0

    @property
    def peak(self) -> float:
        """max|r| over all inputs."""
        return max(each.peak for each in self.sums)

    @property
    def size(self) -> int:
        """Elements compared."""
        return sum(each.count for each in self.sums)


@dataclass(frozen=True)
class Measurement:
    """One output against its reference, over one input or (after `merge`) several.

    Parameters
    ----------
    name, dtype, shape
        Of the actual output; `dtype` is the reference's where the two agree.
    size
        Elements compared.
    kind
        What the reference's dtype is; integers, booleans and strings have to be equal.
    faults
        Shape or dtype that differ.
    scores
        Every metric that the dtype has. Where elements are NaN or infinite on one side alone the errors are infinite.
    finite_max
        `max` over the elements that are finite on both sides, where that differs from `scores`.
    peak
        max|r| over the elements that are finite in the reference.
    mismatches
        Elements that are unequal; of integers, booleans and strings alone.
    worst
        The elements with the largest |difference|, largest first.
    parts
        The parts that are judged by scales of their own; none: the output is judged as a whole.
    undivided
        The scores of those inputs whose output has no parts, where others have.
    uncompared
        Why nothing could be compared: it is empty, or nothing but a mask.
    constant
        The one value that every finite element of the reference has, as a float.
    """

    name: str
    dtype: str
    shape: Shape
    size: int
    kind: Kind
    faults: tuple[Fault, ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)
    finite_max: float | None = None
    peak: float = 0.0
    mismatches: int = 0
    nonfinite: NonFinite = field(default_factory=NonFinite)
    worst: tuple[Element, ...] = ()
    histogram: Histogram = field(default_factory=Histogram)
    fit: Sums | None = None
    cases: int = 1
    notes: tuple[str, ...] = ()
    parts: tuple[PartMeasurement, ...] = ()
    undivided: Mapping[str, Score] = field(default_factory=dict)
    uncompared: str = ""
    constant: float | None = None

    @property
    def mismatch_share(self) -> float:
        """Share of unequal elements, 0 to 1."""
        return self.mismatches / self.size if self.size else 0.0

    def value(self, metric: str) -> float | None:
        """The metric's value as defined, None where it has none (not computed, or replaced by `abs`)."""
        score = self.scores.get(metric)
        return None if score is None or score.note else score.value

    def quantiles(self) -> dict[str, Any]:
        """Upper bounds of |difference| that 50, 90, 99 and 99.9 % of the elements keep."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}
        return {name: self.histogram.quantile(share) for name, share in shares.items()}


KEEP_WORST = 5


def merge(measurements: Sequence[Measurement]) -> Measurement:
    """One output over several inputs: per metric its worst case, named in the score; shares are of all cases together.

    `top1` and `mismatches` are shares, so their elements are pooled: one wrong label in a hundred inputs of batch 1
    is 1 %, not one case of 100 %.

    Raises
    ------
    ComparisonError
        There is nothing to merge, or the measurements are of different outputs.
    """
    if not measurements or len({each.name for each in measurements}) != 1:
        names = ", ".join(sorted({each.name for each in measurements})) or "none"
        raise ComparisonError(f"cannot merge measurements of {names}: exactly one output is needed")
    if len(measurements) == 1:
        return measurements[0]
    cases = list(enumerate(measurements))
    # Its shape, dtype and fit are shown: the one that is furthest off.
    lead = max(measurements, key=lambda each: (bool(each.faults), _badness(each)))
    worst = [replace(element, case=case) for case, each in cases for element in each.worst]
    finite = [(each.finite_max, each.value("max")) for each in measurements]
    return Measurement(
        name=lead.name,
        dtype=lead.dtype,
        shape=lead.shape,
        size=sum(each.size for each in measurements),
        kind=lead.kind,
        faults=tuple(replace(fault, case=case) for case, each in cases for fault in each.faults),
        scores=_worst_scores(cases),
        finite_max=max(found if found is not None else usual or 0.0 for found, usual in finite)
        if any(found is not None for found, _ in finite)
        else None,
        peak=max(each.peak for each in measurements),
        mismatches=sum(each.mismatches for each in measurements),
        nonfinite=sum((each.nonfinite for each in measurements), NonFinite()),
        worst=tuple(sorted(worst, key=lambda element: -element.error)[:KEEP_WORST]),
        histogram=sum((each.histogram for each in measurements), Histogram()),
        fit=lead.fit,
        cases=sum(each.cases for each in measurements),
        notes=_merged_notes(cases),
        constant=lead.constant if len({each.constant for each in measurements}) == 1 else None,
        uncompared=measurements[0].uncompared if all(each.uncompared for each in measurements) else "",
        parts=_merged_parts(cases),
        undivided=_worst_scores([(case, each) for case, each in cases if each.size and not each.parts]),
    )


_Cases: TypeAlias = "Sequence[tuple[int, Measurement]]"


def _badness(measurement: Measurement) -> float:
    return measurement.scores["abs"].badness if "abs" in measurement.scores else -math.inf


def _merged_notes(cases: _Cases) -> tuple[str, ...]:
    found = dict.fromkeys(note for _, each in cases for note in each.notes)
    empty = [(case, each.uncompared) for case, each in cases if each.uncompared]
    if empty and len(empty) < len(cases):
        cases_named = listed((str(case) for case, _ in empty), 1)
        found[f"input {cases_named} was not compared: {empty[0][1]}"] = None
    return tuple(found)


def _merged_parts(cases: _Cases) -> tuple[PartMeasurement, ...]:
    """The same parts of all inputs together; sentinel values may begin elsewhere in each."""
    merged: dict[tuple[Part, bool, bool], PartMeasurement] = {}
    for case, measurement in cases:
        for each in measurement.parts:
            sums = tuple(replace(one, case=case) for one in each.sums)
            key = each.part, each.band is None, each.is_sentinel
            merged[key] = replace(each, sums=(*(merged[key].sums if key in merged else ()), *sums))
    return tuple(merged.values())


def _worst_scores(cases: _Cases) -> dict[str, Score]:
    found: dict[str, list[Score]] = {}
    for case, each in cases:
        for metric, score in each.scores.items():
            found.setdefault(metric, []).append(replace(score, case=case))
    return {metric: _merged_score(scores) for metric, scores in found.items()}


def _merged_score(scores: Sequence[Score]) -> Score:
    worst = max(scores, key=lambda score: score.badness)
    if worst.rows is None or worst.value is None:
        return worst
    wrong, rows = (sum(each) for each in zip(*(score.rows for score in scores if score.rows), strict=True))
    return replace(worst, value=wrong / rows, case=None, rows=(wrong, rows))
