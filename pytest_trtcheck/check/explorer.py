"""Where a function of many variables is largest: proposals, and what was made of them.

Three ways take turns, and the one that gains more is asked more often. An evolution strategy, CMA-ES with a diagonal
covariance (Ros and Hansen, 2008, https://doi.org/10.1007/978-3-540-87700-4_30), follows what grows along many variables
at once. Changes of a few variables, or of a stretch of them, find what hangs on those alone; they fall mostly on the
variables whose changes were felt before. And a plane through the logarithms of many scores tells which way they rise,
where rounding makes each single one jump.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Points = NDArray[np.float64]

_STARTS = 11
"""Points drawn at random before anything else."""
_MUTANTS = 16
"""Changed points a proposal."""
_LARGEST_STRATEGY = 1024
"""Variables that the evolution strategy has at the most: of more, neighbours move together."""
_SPREAD = 0.3
"""The first step of the evolution strategy, as a share of the range."""
_HOT = 0.4
"""The share of changes that fall on the variables whose changes were felt."""
_SHAKEN = 0.25
"""The share of changes that move every variable a little: rounding then falls otherwise, and the best may be near."""
_LEAST_SHARE = 0.2
"""How often a way that gains nothing is asked, as a share of the one that gains most."""
_REMEMBERED = 1 << 23
"""Elements of scored points that are kept."""
AT_ONCE = 1 << 25
"""Elements of the points that are held together, at the most: of large inputs fewer points are proposed at a time."""
_MOST_FITTED = 1024
"""Points that a plane is laid through."""
_TOP = 8
"""The best points seen, from which changes start: the very best may owe its score to rounding."""


class Explorer:
    """Proposes points of the unit cube, and learns from what they scored.

    Parameters
    ----------
    starts
        Points to begin with; the first one is where most is expected to be ordinary.
    ordered
        By variable, whether near values mean much the same (a pixel), or nothing (a token).
    rng
        Decides everything: the same seed and scores give the same proposals.
    """

    def __init__(self, starts: Sequence[Points], ordered: NDArray[np.bool_], rng: np.random.Generator) -> None:
        self.best, self.best_score = np.asarray(starts[0], np.float64), -math.inf
        self._rng, self._ordered, self._size = rng, ordered, len(ordered)
        self._at_once = max(1, AT_ONCE // self._size)
        self._mutants = min(_MUTANTS, self._at_once)
        self._starts = self._openings(starts)
        ways = ("strategy", "slope", "mutants") if ordered.any() else ("mutants",)
        # A generation of the strategy is one proposal, and a plane takes as many points as a beginning has.
        ways = ways if self._at_once >= 2 * _STARTS else ("mutants",)
        self._gains = dict.fromkeys(ways, 1.0)
        self._asked, self._before = "", -math.inf
        self._strategy: _Strategy | None = None
        self._width = self._size / 4
        self._moved: list[NDArray[np.intp]] = []
        self._from: list[float] = []
        self._seen: Points = np.empty((0, self._size), np.float32)
        self._logs: NDArray[np.float64] = np.empty(0)
        self._felt, self._tried = np.zeros(self._size), np.zeros(self._size)

    def propose(self) -> Points:
        """Points to score, one a row."""
        self._before = self.best_score
        if opening := list(islice(self._starts, self._at_once)):
            self._asked = ""
            return np.array(opening)
        most = max(self._gains.values())
        shares = np.array([max(gain, _LEAST_SHARE * most) for gain in self._gains.values()])
        self._asked = str(self._rng.choice(list(self._gains), p=shares / shares.sum()))
        return {"strategy": self._evolved, "slope": self._along, "mutants": self._mutated}[self._asked]()

    def observe(self, points: Points, scores: NDArray[np.float64]) -> None:
        """Learn from what was proposed, in its order; not more than 0 says that a point is of no use."""
        best = int(np.argmax(scores))
        if scores[best] > self.best_score:
            self.best, self.best_score = points[best].copy(), float(scores[best])
        self._remember(points, scores)
        if not self._asked:
            return
        if self._asked == "mutants":
            self._feel(scores)
        elif self._asked == "strategy" and self._strategy is not None:
            goes_on = self._strategy.learn(scores, self.best, self.best_score)
            self._strategy = self._strategy if goes_on else None
        gain = math.log(self.best_score / self._before) if self.best_score > self._before > 0 else 0.0
        self._gains[self._asked] = 0.8 * self._gains[self._asked] + 0.2 * min(10 * gain, 1.0) + 1e-3

    def _openings(self, starts: Sequence[Points]) -> Iterator[Points]:
        """The points before anything is known."""
        yield from starts
        yield from (np.full(self._size, value) for value in (0.0, 1.0, 0.5))
        yield from ((self._rng.random(self._size) < 0.5).astype(np.float64) for _ in range(2))
        yield from (self._rng.random(self._size) for _ in range(_STARTS))

    def _evolved(self) -> Points:
        if self._strategy is None:
            self._strategy = _Strategy(self.best, self._rng)
        points = self._strategy.sample()
        # A token between two others is none of both: the strategy leaves them alone.
        return points if self._ordered.all() else np.where(self._ordered, points, self.best)

    def _remember(self, points: Points, scores: NDArray[np.float64]) -> None:
        usable = (scores > 0) & np.isfinite(scores)
        most = max(min(2 * _STARTS, self._at_once), _TOP, _REMEMBERED // self._size)
        self._seen = np.vstack([self._seen, points[usable].astype(np.float32)])[-most:]
        self._logs = np.concatenate([self._logs, np.log(scores[usable])])[-most:]

    def _along(self) -> Points:
        """Steps from the best points in the direction in which scores rise, through all that was seen or the latest."""
        count = min(len(self._logs), _MOST_FITTED if self._rng.random() < 0.25 else 64 + self._size // 2)
        seen, logs = self._seen[-count:], self._logs[-count:].astype(np.float32)
        if count < _STARTS or not logs.std():
            return self._mutated()
        seen, logs = seen - seen.mean(axis=0), logs - logs.mean()
        # Ridge regression, in whichever space is smaller; as much of it as there is noise.
        if self._size <= count:
            gram = seen.T @ seen
            slope = np.linalg.solve(gram + np.trace(gram) / self._size * np.eye(self._size), seen.T @ logs)
        else:
            gram = seen @ seen.T
            slope = seen.T @ np.linalg.solve(gram + np.trace(gram) / count * np.eye(count), logs)
        slope = np.where(self._ordered, slope, 0.0).astype(np.float64)
        top = np.abs(slope).max()
        if not top:
            return self._mutated()
        points = []
        for _ in range(_MUTANTS):
            start = self._parent()[0] if self._rng.random() < 0.75 else np.full(self._size, 0.5)
            direction = slope / top
            if self._rng.random() < 0.5:
                # Some of the variables alone, those more likely that count more.
                chances = np.abs(direction) ** self._rng.random()
                direction = np.where(self._rng.random(self._size) < chances, direction, 0.0)
            points.append(np.clip(start + direction * 10 ** self._rng.uniform(-2.5, 0.3), 0.0, 1.0))
        return np.array(points)

    def _parent(self) -> tuple[Points, float]:
        """One of the best points, and its score."""
        if self._rng.random() < 0.25 or len(self._logs) < _TOP:
            return self.best, self.best_score
        index = int(self._rng.choice(np.argsort(-self._logs)[:_TOP]))
        return self._seen[index].astype(np.float64), math.exp(self._logs[index])

    def _mutated(self) -> Points:
        self._asked = "mutants"
        parents = [self._parent() for _ in range(self._mutants)]
        points, self._from = np.array([point for point, _ in parents]), [score for _, score in parents]
        self._moved = [self._mutate(point) for point in points]
        return points

    def _mutate(self, point: Points) -> NDArray[np.intp]:
        """Change some variables of a point in place; which ones, none where all were."""
        rng = self._rng
        if rng.random() < _SHAKEN:
            shaken = point + rng.normal(size=self._size) * 10 ** rng.uniform(-3, -0.7)
            point[:] = np.where(self._ordered, np.clip(shaken, 0, 1), point)
            return np.empty(0, np.intp)
        if rng.random() < _HOT:
            heat = (self._felt / np.maximum(self._tried, 1) + 1e-12) ** 2
            count = min(int(rng.integers(1, 4)), self._size)
            chances = 0.9 * heat / heat.sum() + 0.1 / self._size
            chosen = rng.choice(self._size, count, replace=False, p=chances / chances.sum())
            finest, steps = -6.0, (0.25, 0.4, 0.4)
        else:
            wide = self._width * math.exp(0.7 * rng.normal()) if rng.random() < 0.8 else 1
            count = max(1, min(self._size, round(wide)))
            chosen = (
                rng.choice(self._size, count, replace=False)
                if rng.random() < 0.7
                else (np.arange(count) + rng.integers(self._size)) % self._size
            )
            finest, steps = -4.0, (0.25, 0.6, 0.7)
        how, count = rng.random(), len(chosen)
        if how < steps[0]:
            new = rng.random(count)
        elif how < steps[1]:
            new = rng.integers(0, 2, count).astype(np.float64)
        elif how < steps[2]:
            new = np.full(count, rng.random())
        else:
            step = rng.normal(size=count) * 10 ** rng.uniform(finest, -0.3)
            new = np.where(self._ordered[chosen], point[chosen] + step, rng.random(count))
        point[chosen] = np.clip(new, 0, 1)
        return chosen

    def _feel(self, scores: NDArray[np.float64]) -> None:
        """Remember which variables the score hangs on, and change fewer at a time where nothing was gained."""
        for chosen, score, before in zip(self._moved, scores, self._from, strict=False):
            if not len(chosen):
                continue
            felt = abs(math.log(max(score, 1e-12) / max(before, 1e-12))) if math.isfinite(score) else 0.0
            self._felt[chosen] += felt / len(chosen)
            self._tried[chosen] += 1 / len(chosen)
        gained = self.best_score > self._before
        self._width = min(self._size / 2, self._width * 1.2) if gained else max(1.0, self._width * 0.93)
        if self._width <= 1 and self._rng.random() < 0.1:
            self._width = self._size / 4


class _Strategy:
    """A run of the evolution strategy from a point on; constants as in Hansen's tutorial, arXiv 1604.00772."""

    def __init__(self, start: Points, rng: np.random.Generator) -> None:
        self._rng, self._start = rng, start.copy()
        size = min(len(start), _LARGEST_STRATEGY)
        self._block = None if size == len(start) else np.arange(len(start)) * size // len(start)
        # Of blocks it moves the offset, of single variables themselves.
        self._low = 0.0 if self._block is None else -1.0
        self._mean: NDArray[Any] = start.copy() if self._block is None else np.zeros(size)
        self._sigma = _SPREAD
        self._count = 4 + int(3 * math.log(size))
        parents = self._count // 2
        weights = math.log(parents + 0.5) - np.log(np.arange(1, parents + 1))
        self._weights: NDArray[Any] = weights / weights.sum()
        mass = 1 / float((self._weights**2).sum())
        self._mass, self._c_sigma = mass, (mass + 2) / (size + mass + 5)
        self._damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + self._c_sigma
        self._c_path = (4 + mass / size) / (size + 4 + 2 * mass / size)
        c_one = 2 / ((size + 1.3) ** 2 + mass)
        c_many = min(1 - c_one, 2 * (mass - 2 + 1 / mass) / ((size + 2) ** 2 + mass))
        # A diagonal has fewer numbers to learn, and learns them so much faster.
        self._c_one = min(0.5, c_one * (size + 2) / 3)
        self._c_many = min(1 - self._c_one, c_many * (size + 2) / 3)
        self._usual = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
        self._variances, self._path, self._sigma_path = np.ones(size), np.zeros(size), np.zeros(size)
        self._generation, self._best, self._stale = 0, -math.inf, 0
        self._sampled = np.empty((0, size))

    def sample(self) -> Points:
        """One generation."""
        size = len(self._mean)
        steps = self._sigma * np.sqrt(self._variances) * self._rng.standard_normal((self._count, size))
        self._sampled = np.clip(self._mean + steps, self._low, 1.0)
        return self._sampled if self._block is None else np.clip(self._start + self._sampled[:, self._block], 0.0, 1.0)

    def learn(self, scores: NDArray[np.float64], best: Points, best_score: float) -> bool:
        """Move towards the better half; whether it makes sense to go on."""
        if len(scores) < self._count:
            return True
        sampled, scores, size = self._sampled.copy(), scores.copy(), len(self._mean)
        if self._block is None and best_score > scores.max():
            # What was found by other ways is one of its own.
            worst = int(np.argmin(scores))
            sampled[worst], scores[worst] = best, best_score
        order = np.argsort(-scores, kind="stable")[: len(self._weights)]
        steps = (sampled[order] - self._mean) / self._sigma
        step = self._weights @ steps
        self._mean = self._mean + self._sigma * step
        self._generation += 1
        c = self._c_sigma
        self._sigma_path = (1 - c) * self._sigma_path + math.sqrt(c * (2 - c) * self._mass) * step / np.sqrt(
            self._variances
        )
        length = float(np.linalg.norm(self._sigma_path))
        settled = math.sqrt(1 - (1 - c) ** (2 * self._generation))
        keeps = length / settled < (1.4 + 2 / (size + 1)) * self._usual
        c_path = self._c_path
        self._path = (1 - c_path) * self._path + keeps * math.sqrt(c_path * (2 - c_path) * self._mass) * step
        lost = (1 - keeps) * c_path * (2 - c_path)
        self._variances = (
            (1 - self._c_one - self._c_many) * self._variances
            + self._c_one * (self._path**2 + lost * self._variances)
            + self._c_many * (self._weights @ steps**2)
        )
        self._sigma = min(0.5, self._sigma * math.exp(c / self._damping * (length / self._usual - 1)))
        top = float(scores.max())
        self._stale = 0 if top > self._best else self._stale + 1
        self._best = max(top, self._best)
        return self._sigma > 1e-7 and self._stale < 20 + 3 * size / self._count
