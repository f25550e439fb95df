"""Whether `max_drop` is judged rightly, and what a score costs beside its inference.

    python benchmarks/bench_score.py [--runs N] [--samples N] [--json FILE]

**Verdicts.** Two models that classify, right or wrong, and disagree on 2, 5 or 10 % of samples; n = 200, 1,000,
10,000. For the mean the probability of each verdict is a sum over everything that can happen (how many samples are
lost, how many gained), without chance, and simulated as well; for an aggregate, whose resamples are drawn, it is
simulated. Scores that are no 0 or 1 (an IoU of which a part is lost here and there) are simulated, and so are the mean
of ten classes' accuracies one of which is rare, and a loss without a limit. `best` is what the
normal test with a known variance would reach at the same error rate: where that is below 95 %, so few samples cannot
do better.

**Time.** A check of a ResNet of 11.7 million weights on 32×32 images in FP16, of a list and of a generator whose
arrays do not stay in memory: the whole check over the seconds within ONNX Runtime's sessions, in one run.
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script
from bench_warm import Inference  # type: ignore[import-not-found]  # beside this script
from scipy.stats import binom  # type: ignore[import-untyped]

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Allowance
from pytest_trtcheck.compare import paired
from pytest_trtcheck.compare.paired import CONFIDENCE, Drop, drop_of_aggregate, drop_of_means
from pytest_trtcheck.model import labelled
from pytest_trtcheck.spec import Case, ParitySpec, ScoreSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
    Lost = Callable[[np.random.Generator, int], Drop]

WRONG_LIMIT, CAUGHT_LIMIT, RATIO_LIMIT = 0.01, 0.95, 1.2
SAMPLES = (200, 1000, 10_000)
DISAGREE = (0.02, 0.05, 0.1)
MAX_DROPS = (0.005, 0.01, 0.02)
RARE = ((5, 0.15), (5, 0.5), (20, 0.1), (60, 0.05))
LOSSES = ((200, 0.01), (2000, 0.001))


# --- verdicts --------------------------------------------------------------------------------------------------------


def chances(samples: int, disagree: float, drop: float, max_drop: float) -> dict[str, float]:
    """The probability of each verdict, up to 1e-12."""
    lost, gained = (disagree + drop) / 2, max(0.0, (disagree - drop) / 2)
    more, less = (np.arange(*_range(samples, each)) for each in (lost, gained))
    weights = binom.pmf(more, samples, lost)[:, None] * binom.pmf(
        less[None], samples - more[:, None], gained / (1 - lost)
    )
    found = {"pass": 0.0, "fail": 0.0, "inconclusive": 0.0}
    for row, one in zip(weights, more.tolist(), strict=True):
        for weight, other in zip(row.tolist(), less.tolist(), strict=True):
            if weight > 1e-14:
                found[_of_counts(samples, one, other).verdict(max_drop)] += weight
    return found


def _range(samples: int, share: float) -> tuple[int, int]:
    reach = 8 * math.sqrt(samples * share) + 12 if share else 0
    return max(0, int(samples * share - reach)), min(samples, int(samples * share + reach)) + 1


def _of_counts(samples: int, lost: int, gained: int) -> Drop:
    total, changed = lost - gained, lost + gained
    mean = total / samples
    cube = total - 3 * mean * changed + 2 * samples * mean**3
    return Drop(0.9, 0.9 - mean, samples, changed, total, changed - samples * mean**2, cube, 1.0)


def best(samples: int, disagree: float, drop: float, max_drop: float) -> float:
    """How often the normal test of a known variance says that it fell further, at the same rate of errors."""
    spread = math.sqrt((disagree - drop**2) / samples)
    normal = statistics.NormalDist()
    return normal.cdf((drop - max_drop) / spread - normal.inv_cdf((1 + CONFIDENCE) / 2))


def right_or_wrong(disagree: float, drop: float) -> Callable[[np.random.Generator, int], Pair]:
    def draw(rng: np.random.Generator, samples: int) -> Pair:
        chance = rng.random(samples)
        reference = (rng.random(samples) < 0.9).astype(np.float64)
        actual = reference.copy()
        reference[chance < disagree] = chance[chance < disagree] < (disagree + drop) / 2
        actual[chance < disagree] = 1 - reference[chance < disagree]
        return reference, actual

    return draw


def parts_lost(disagree: float, drop: float) -> Callable[[np.random.Generator, int], Pair]:
    """An IoU of about 0.8, of which some samples lose a part: mostly little, now and then all."""

    def draw(rng: np.random.Generator, samples: int) -> Pair:
        reference = rng.beta(8, 2, samples)
        share = drop / disagree / 0.8
        loses = rng.random(samples) < disagree
        return reference, reference * (1 - loses * rng.beta(0.5, 0.5 / share - 0.5, samples))

    return draw


def rare_class(rare: int, share: float) -> tuple[Lost, float]:
    """The mean of ten classes' accuracies, one of which has few samples and loses a share; and its true drop."""
    labels = np.repeat(np.arange(10), [rare, *[55] * 9])

    def draw(rng: np.random.Generator, run: int) -> Drop:
        right = rng.random(labels.size) < 0.95
        kept = (labels > 0) | (rng.random(labels.size) >= share)
        sides = [np.stack([labels, each], axis=1) for each in (right, right & kept, labels == 0, ~right)]
        return drop_of_aggregate(sides[0], sides[1], _mean_of_classes, lost=sides[2:], seed=run)

    return draw, 0.95 * share / 10


def _mean_of_classes(items: NDArray[np.int64]) -> float:
    right, all_of_them = np.bincount(items[:, 0], items[:, 1]), np.bincount(items[:, 0])
    return float((right[all_of_them > 0] / all_of_them[all_of_them > 0]).mean())


def loss(samples: int, share: float) -> tuple[Lost, float]:
    """A cross entropy over 1,000 classes of about 0.2, of which a share of the samples becomes 5 larger."""

    def draw(rng: np.random.Generator, run: int) -> Drop:
        del run
        before = rng.exponential(0.2, samples)
        lost = [np.full(samples, math.log(1000)), before + 20]
        return drop_of_means(before, before + 5 * (rng.random(samples) < share), lower_is_better=True, lost=lost)

    return draw, 5 * share


def few_weigh_much(runs: int) -> list[dict[str, Any]]:
    """How often the upper bound is below the true drop, where few samples make up much of it."""
    found = []
    cases: dict[str, tuple[Lost, float]] = {}
    cases |= {f"a class of {n}, {share:.0%} of it lost": rare_class(n, share) for n, share in RARE}
    cases |= {f"a loss of {n:,} samples, {share:.1%} by 5": loss(n, share) for n, share in LOSSES}
    for what, (draw, drop) in cases.items():
        count = runs if what.startswith("a loss") else max(100, runs // 5)
        drawn = [draw(np.random.default_rng([7, run]), run) for run in range(count)]
        row = {"what": what, "drop": drop, "runs": count}
        row["upper_wrong"] = sum(bool(each.upper < drop) for each in drawn) / count
        row["by_what_was_seen"] = sum(bool(replace(each, at_stake=0.0).upper < drop) for each in drawn) / count
        row["upper"] = _rounded(statistics.median(each.upper for each in drawn))
        found.append(row)
        print(row, flush=True)
    return found


def simulated(
    draw: Callable[[np.random.Generator, int], Pair],
    samples: int,
    max_drop: float,
    runs: int,
    *,
    aggregate: bool = False,
) -> dict[str, float]:
    rng = np.random.default_rng([samples, int(1e6 * max_drop), runs])
    counts = {"pass": 0, "fail": 0, "inconclusive": 0}
    for run in range(runs):
        pair = draw(rng, samples)
        found = drop_of_aggregate(*pair, np.mean, seed=run) if aggregate else drop_of_means(*pair)
        counts[found.verdict(max_drop)] += 1
    return {verdict: count / runs for verdict, count in counts.items()}


def verdicts(runs: int) -> list[dict[str, Any]]:
    """Every situation that the limits speak of, and others beside them."""
    found = []

    def add(what: str, samples: int, disagree: float, drop: float, max_drop: float, **more: Any) -> None:
        row = {"what": what, "samples": samples, "disagree": disagree, "drop": drop, "max_drop": max_drop}
        found.append(row | {name: _rounded(value) for name, value in more.items()})
        print(found[-1], flush=True)

    for samples in SAMPLES:
        for disagree in DISAGREE:
            for max_drop in (each for each in MAX_DROPS if each <= disagree):
                exact = chances(samples, disagree, max_drop, max_drop)
                drawn = {}
                if max_drop == 0.01:
                    draw = right_or_wrong(disagree, max_drop)
                    drawn["simulated"] = simulated(draw, samples, max_drop, runs)
                    if samples < 10_000:
                        few = max(100, runs // 5)
                        drawn["aggregate"] = simulated(draw, samples, max_drop, few, aggregate=True)
                    drawn["parts_lost"] = simulated(parts_lost(disagree, max_drop), samples, max_drop, runs)
                add("at the limit", samples, disagree, max_drop, max_drop, exact=exact, **drawn)
        for max_drop in MAX_DROPS:
            add("no drop", samples, 0.05, 0.0, max_drop, exact=chances(samples, 0.05, 0.0, max_drop))
        for disagree in DISAGREE:
            for max_drop in (each for each in MAX_DROPS if 2 * each <= disagree):
                exact = chances(samples, disagree, 2 * max_drop, max_drop)
                possible = best(samples, disagree, 2 * max_drop, max_drop)
                add("twice the limit", samples, disagree, 2 * max_drop, max_drop, exact=exact, best=possible)
    return found


def _rounded(value: Any) -> Any:
    return {name: round(each, 5) for name, each in value.items()} if isinstance(value, dict) else round(value, 5)


def are_right(found: list[dict[str, Any]], runs: int) -> bool:
    """Whether the limits hold: exactly where it is known, and in what was drawn up to three of its own deviations."""
    for row in found:
        wrong = ("pass", "fail") if row["what"] == "at the limit" else ("fail",) if row["what"] == "no drop" else ()
        drawn = {"exact": math.inf, "simulated": runs, "parts_lost": runs, "aggregate": max(100, runs // 5)}
        for kind, count in drawn.items():
            allowed = WRONG_LIMIT + 3 * math.sqrt(WRONG_LIMIT / count)
            if kind in row and any(row[kind][verdict] > allowed for verdict in wrong):
                return False
        is_possible = row["what"] == "twice the limit" and row["samples"] == max(SAMPLES)
        if is_possible and row["best"] >= CAUGHT_LIMIT + 0.005 and row["exact"]["fail"] < CAUGHT_LIMIT:
            return False
    return True


# --- time ------------------------------------------------------------------------------------------------------------


def timed(samples: int, size: int, batch: int, *, streamed: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def cases() -> Iterator[Case]:
        for start in range(0, samples, batch):
            count = min(batch, samples - start)
            yield Case(rng.random((count, 3, size, size), dtype=np.float32), rng.integers(0, 1000, count))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        networks.resnet(folder / "net.onnx", size)
        checker = check.Checker(cache=Cache(folder / "cache"), allowance=Allowance(0))
        spec = ParitySpec(precision=("fp16",), score=ScoreSpec(agrees, 0.05))
        given = list(cases())
        checker.check(check.Request("warm", str(folder / "net.onnx"), (folder,), spec, inputs=given[:1]))
        inference = Inference()
        labelled.MEMORY_BYTES = 16 << 20
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        inputs: object = (case for case in given) if streamed else given
        record = checker.check(check.Request("score", str(folder / "net.onnx"), (folder,), spec, inputs=inputs))
        total = time.perf_counter() - start
    if record.score is None or record.score.samples != samples or record.verdict == "error":
        raise SystemExit(f"{record.verdict}: {record.message}")
    return {
        "samples": samples,
        "batch": batch,
        "inputs_mib": round(samples * 3 * size * size * 4 / 2**20),
        "check_s": round(total, 2),
        "inference_s": round(inference.seconds, 2),
        "ratio": round(total / inference.seconds, 4),
        "peak_growth_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "verdict": record.verdict,
    }


def agrees(outputs: dict[str, Any], case: Case) -> Any:
    """The weights are random: how sure it is of its choice stands in for what a trained model gets right."""
    (logits,) = outputs.values()
    return logits.max(axis=1) > logits.mean(axis=1) + case.labels % 2


def aggregated(samples: int) -> dict[str, Any]:
    """What the resamples of an error rate over a corpus cost."""
    rng = np.random.default_rng(0)
    words = rng.integers(5, 30, samples)
    before, after = (list(zip(rng.binomial(words, 0.05).tolist(), words.tolist(), strict=True)) for _ in range(2))

    def rate(found: list[tuple[int, int]]) -> float:
        return sum(wrong for wrong, _ in found) / sum(count for _, count in found)

    start = time.perf_counter()
    drop_of_aggregate(before, after, rate, lower_is_better=True)
    return {
        "samples": samples,
        "calls": 2 * (1 + paired.RESAMPLES + paired.PROBES),
        "s": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The verdicts of max_drop, and the cost of a score.")
    parser.add_argument("--runs", type=int, default=2000, help="of each simulation")
    parser.add_argument("--samples", type=int, default=10_000, help="of the timed score")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    found = verdicts(arguments.runs)
    few = few_weigh_much(arguments.runs)
    times = {
        "list": timed(arguments.samples, 32, 50, streamed=False),
        "generator": timed(arguments.samples, 32, 50, streamed=True),
    }
    report = {
        "benchmark": "score",
        "runs": arguments.runs,
        "confidence": CONFIDENCE,
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "machine": platform.machine(),
        "limits": {"wrong": WRONG_LIMIT, "caught": CAUGHT_LIMIT, "ratio": RATIO_LIMIT},
        "verdicts": found,
        "few_weigh_much": few,
        "time": times,
        "aggregate": aggregated(arguments.samples),
        "within_limits": are_right(found, arguments.runs)
        and all(each["upper_wrong"] <= WRONG_LIMIT + 3 * math.sqrt(WRONG_LIMIT / each["runs"]) for each in few)
        and all(each["ratio"] <= RATIO_LIMIT for each in times.values()),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
