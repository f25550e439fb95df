"""How far a score fell: two models on the same samples, with bounds that are honest for few samples and rare changes.

The bounds are the second-order limits of the paired bootstrap (BCa: Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, section 22.6; Hall, "The Bootstrap and Edgeworth Expansion", 1992, section 3.10),

    drop + (z·s + (2z² + 1)/6 · k/s²) / n,

where s² and k are the sums of squares and cubes of what each sample adds. The plain bootstrap knows no change that it
has not seen: of 200 samples of which 2 % change, one run in fifty shows none of them, and its interval is a point. So
one more sample is reckoned with on each side, which changed by the whole range of the score against the verdict, or
by all that a sample's outputs are worth where that is more, and the skewness may only widen. Over a grid of models that
disagree on 0.5 to 30 % of samples, at 20 to 10,000 samples, either side is then wrong in at most 0.5 % of runs
(`benchmarks/bench_score.py` counts them all, without chance).
"""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.errors import ComparisonError, plural
from pytest_trtcheck.metrics import distinct_digits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.record import Verdict

    Items = Sequence[Any] | NDArray[Any]
    Aggregate = Callable[[Any], Any]

CONFIDENCE = 0.99
"""Of both bounds together: each of them is wrong in at most one run of 200."""
RESAMPLES = 1000
"""How often an aggregate is computed on resampled items, for each of the two models."""
PROBES = 100
"""How many samples are left out, one at a time, to see what a single one is worth to an aggregate."""

_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_MOST_SAMPLES = 10**8


@dataclass(frozen=True)
class Drop:
    """A score of two models on the same samples.

    Parameters
    ----------
    reference, value
        The score of the reference, and of what is judged.
    samples, changed
        How many there are, and of how many the items differ.
    total, square, cube
        Σd, Σ(d−d̄)² and Σ(d−d̄)³, where d is what each sample adds to n times the drop.
    reach
        The most that a single sample may come to add or to take away, by the scores that were seen.
    at_stake
        The most that it adds where its outputs are lost, as far as that is known.
    """

    reference: float
    value: float
    samples: int
    changed: int
    total: float
    square: float
    cube: float
    reach: float
    at_stake: float = 0.0

    @property
    def drop(self) -> float:
        """How far the score fell; negative where it rose."""
        return self.total / self.samples

    @property
    def lower(self) -> float:
        """What it fell by at the least."""
        return -self._bound(-1)

    @property
    def upper(self) -> float:
        """What it fell by at the most."""
        return self._bound(1)

    def verdict(self, max_drop: float) -> Verdict:
        """`pass` where it fell by no more, `fail` where by more, `inconclusive` where the samples tell neither."""
        return "pass" if self.upper <= max_drop else "fail" if self.lower > max_drop else "inconclusive"

    def samples_to_decide(self, max_drop: float) -> int | None:
        """How many samples of this kind would decide, about; None where no number of them can be expected to."""
        few, many = self.samples, 2 * self.samples
        while self._of(many).verdict(max_drop) == "inconclusive":
            few, many = many, 2 * many
            if many > _MOST_SAMPLES:
                return None
        while many - few > max(1, many // 100):
            middle = (few + many) // 2
            few, many = (middle, many) if self._of(middle).verdict(max_drop) == "inconclusive" else (few, middle)
        unit = int(10 ** max(0, len(str(many)) - 2))
        return math.ceil(many / unit) * unit

    def _bound(self, sign: int) -> float:
        reach = max(self.reach, self.at_stake) if sign > 0 else self.reach
        square = self.square + reach**2
        cube = max(sign * self.cube + reach**3, 0.0)
        skew = (2 * _Z**2 + 1) / 6 * cube / square if square else 0.0
        return (sign * self.total + reach + _Z * math.sqrt(square) + skew) / self.samples

    def _of(self, samples: int) -> Drop:
        """The same of another number of samples."""
        times = samples / self.samples
        total, square, cube = self.total * times, self.square * times, self.cube * times
        return replace(self, samples=samples, total=total, square=square, cube=cube)


def drop_of_means(
    reference: NDArray[Any],
    actual: NDArray[Any],
    *,
    lower_is_better: bool = False,
    lost: Sequence[NDArray[Any]] = (),
) -> Drop:
    """The drop of the mean of two arrays of scores, one a sample.

    Its limits need no resampling: those of the bootstrap follow from the moments.

    Parameters
    ----------
    lost
        What the first samples score whose outputs are lost, in each of several ways.
    """
    before, after = np.asarray(reference, np.float64), np.asarray(actual, np.float64)
    fell = after - before if lower_is_better else before - after
    total = math.fsum(fell)
    centred = fell - total / fell.size
    return Drop(
        math.fsum(before) / fell.size,
        math.fsum(after) / fell.size,
        fell.size,
        int(np.count_nonzero(fell)),
        total,
        math.fsum(centred**2),
        math.fsum(centred**3),
        _reach(
            min(before.min(), after.min()), max(before.max(), after.max()), _is_binary(before) and _is_binary(after)
        ),
        _at_stake([(each - before[: len(each)]) * (1 if lower_is_better else -1) for each in lost]),
    )


def drop_of_aggregate(
    reference: Items,
    actual: Items,
    aggregate: Aggregate,
    *,
    lower_is_better: bool = False,
    lost: Sequence[Items] = (),
    seed: int = 0,
) -> Drop:
    """The drop of what `aggregate` makes of the items of two models, one a sample: mAP, a corpus' error rate.

    The moments are those of `RESAMPLES` paired resamples. `aggregate` is called 2 · (1 + `RESAMPLES` + `PROBES`) times
    at the most, and `PROBES` times for each way of losing outputs, whatever the number of samples; it gets lists, or
    arrays where the items are arrays.

    Parameters
    ----------
    lost
        The items of samples whose outputs are lost, in each of several ways.

    Raises
    ------
    ComparisonError
        It raised, or gave what is no finite number; the message says on what.
    """
    count = len(reference)
    sides = (reference, actual)
    sign = -1.0 if lower_is_better else 1.0

    def scores(indices: NDArray[np.intp] | None, what: str) -> tuple[float, float]:
        first, second = (_number(aggregate, _taken(each, indices), what) for each in sides)
        return first, second

    before, after = scores(None, f"the items of all {plural(count, 'sample')}")
    rng = np.random.default_rng(seed)
    drawn = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        one, other = scores(
            rng.integers(0, count, count), f"resample {number} of {RESAMPLES} ({plural(count, 'sample')} drawn)"
        )
        drawn[number] = sign * (one - other)
    centred = drawn - drawn.mean()
    changed = [index for index in range(count) if not same(reference[index], actual[index])]
    worth: list[float] = []
    if count > 1:
        for index in _probed(count, changed, rng):
            left = np.delete(np.arange(count), index)
            without = scores(left, f"the items of all samples but number {index}")
            worth += [count * whole - (count - 1) * rest for whole, rest in zip((before, after), without, strict=True)]
    known = np.round(worth or [before, after], 9)
    kinds = _of_each_kind(reference, lost, rng) if lost else []
    stakes = [
        [count * sign * _cost(reference, index, items[index], aggregate, before) for index in kinds] for items in lost
    ]
    return Drop(
        before,
        after,
        count,
        len(changed),
        count * sign * (before - after) + 0.0,  # no change is 0, not -0
        # Of a mean, its resamples vary by Σ(d−d̄)²/n², and the third moment is Σ(d−d̄)³/n³.
        count**2 * float(np.mean(centred**2)),
        count**3 * float(np.mean(centred**3)),
        _reach(float(known.min()), float(known.max()), _is_binary(known)),
        _at_stake(np.asarray(stakes)),
    )


def _at_stake(losses: Sequence[NDArray[Any]] | NDArray[Any]) -> float:
    """The most that any sample loses, where each loses its outputs in the way that costs it least.

    Parameters
    ----------
    losses
        What it costs each sample, for each of the ways; what costs nothing is no loss.
    """
    some = [np.where(each > 0, each, np.inf) for each in losses]
    least = np.min(some, axis=0, initial=np.inf) if some else np.array([])
    return float(np.max(least, where=np.isfinite(least), initial=0.0))


def _reach(least: float, most: float, is_binary: bool) -> float:
    """The most that one sample may change by: 1 for what is right or wrong, else between the values seen, and 0."""
    return 1.0 if is_binary else max(most, 0.0) - min(least, 0.0)


def _is_binary(values: NDArray[np.float64]) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _probed(count: int, changed: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Which samples are left out: half of them among those that changed, the others at random."""
    some = [changed[int(each)] for each in rng.permutation(len(changed))[: PROBES // 2]]
    return list(dict.fromkeys((*some, *map(int, rng.permutation(count)[:PROBES]))))[:PROBES]


def _of_each_kind(items: Items, lost: Sequence[Items], rng: np.random.Generator) -> list[int]:
    """One sample of each kind, of the rarest first: where few make up much of an aggregate, each of them counts most.

    Of one kind are samples whose items are equal, and those of lost outputs too.
    """
    kinds: dict[Any, list[int]] = defaultdict(list)
    for index in map(int, rng.permutation(len(items))):
        try:
            kind = hash(pickle.dumps((items[index], *(each[index] for each in lost))))
        except Exception:
            kind = index
        kinds[kind].append(index)
    return [members[0] for members in sorted(kinds.values(), key=len)[:PROBES]]


def _cost(items: Items, index: int, lost: Any, aggregate: Aggregate, before: float) -> float:
    """What an aggregate falls by with another item in the place of one; 0 where it cannot cope with that."""
    changed: Any = _taken(items, None)
    try:
        changed[index] = lost
        fell = before - float(aggregate(changed))
    except Exception:
        return 0.0
    return fell if math.isfinite(fell) else 0.0


def _taken(items: Items, indices: NDArray[np.intp] | None) -> Items:
    # A copy each time: an aggregate that sorts in place would tear the pairs apart.
    if isinstance(items, np.ndarray):
        return items.copy() if indices is None else items[indices]
    return list(items) if indices is None else [items[index] for index in indices.tolist()]


def same(first: Any, second: Any) -> bool:
    """Whether two items are equal, whatever they are made of; what cannot be compared is not."""
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    try:
        is_float = np.asarray(first).dtype.kind == "f"
        return bool(np.array_equal(first, second, equal_nan=is_float and np.asarray(second).dtype.kind == "f"))
    except Exception:
        return first is second


def _number(aggregate: Aggregate, items: Items, what: str) -> float:
    try:
        value = float(aggregate(items))
    except Exception as error:
        raise ComparisonError(f"failed on {what}: {type(error).__name__}: {error}", code="user-code-failed") from error
    if not math.isfinite(value):
        raise ComparisonError(
            f"gave {value} on {what}", "return a number whatever samples are drawn, some twice", code="user-code-result"
        )
    return value


def describe(name: str, drop: Drop, max_drop: float) -> str:
    """The score of both, how far it fell, and the limit, in enough digits that the bounds read as they were judged."""
    bounds = [f"{each:.{distinct_digits(each, max_drop)}g}" for each in (drop.lower, drop.upper)]
    moved = "rose" if drop.value > drop.reference else "fell"
    digits = distinct_digits(drop.reference, drop.value, 4, exact=False)
    scores = [f"{each:.{digits}g}" for each in (drop.reference, drop.value)]
    became = f"{moved} from {scores[0]} to {scores[1]}" if drop.drop else f"stayed {drop.value:.4g}"
    return (
        f"{name} {became}: a loss of {drop.drop:.3g} ({bounds[0]} to {bounds[1]} with {CONFIDENCE:.0%} confidence, "
        f"{plural(drop.samples, 'sample')}, {drop.changed:,} of which changed), max_drop is {max_drop:g}"
    )
