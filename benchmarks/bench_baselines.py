"""How often chance decides about a baseline of errors, and whether calibration data is like what a check is fed.

    python benchmarks/bench_baselines.py [--runs N] [--json FILE]

**Rises.** The logarithms of a check's errors vary by a spread from build to build, five errors correlated by 0.8; or a
build takes another kernel now and then, whose error is larger by a factor. One or three builds are recorded, one is
made today, its errors as they were, ×2 or ×3: the share of checks that fail.

**Drift.** Calibration data and inputs drawn from one source, or from two: the share that is warned of.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.baselines.errors import allowed
from pytest_trtcheck.model.onnx_model import TensorSpec
from pytest_trtcheck.precision.quantization import coverage

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Draw = Callable[[np.random.Generator], NDArray[np.float64]]

SPREADS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3)
ERRORS, CORRELATION, ERROR, LIMIT = 5, 0.8, 3e-3, 1e-2
SIZE = 3072
FALSE_LIMIT, FOUND_LIMIT = 0.02, 0.95
"""Of three builds that differ by up to 10 %; of ×3 among them."""


def spread(by: float) -> Callable[[np.random.Generator, int], NDArray[np.float64]]:
    def draw(random: np.random.Generator, builds: int) -> NDArray[np.float64]:
        common, own = random.normal(size=(builds, 1)), random.normal(size=(builds, ERRORS))
        found: NDArray[np.float64] = ERROR * np.exp(
            by * (math.sqrt(CORRELATION) * common + math.sqrt(1 - CORRELATION) * own)
        )
        return found

    return draw


def kernels(share: float, factor: float) -> Callable[[np.random.Generator, int], NDArray[np.float64]]:
    def draw(random: np.random.Generator, builds: int) -> NDArray[np.float64]:
        other = np.where(random.random((builds, 1)) < share, factor, 1.0)
        found: NDArray[np.float64] = ERROR * other * np.exp(0.01 * random.normal(size=(builds, ERRORS)))
        return found

    return draw


def rises(runs: int) -> dict[str, dict[str, float]]:
    """The share of checks that fail, by what varies, how many builds were recorded and what the errors became."""
    random = np.random.default_rng(0)
    kinds = {f"spread {by:.0%}": spread(by) for by in SPREADS}
    kinds |= {f"kernel ×{factor:g} in 30 %": kernels(0.3, factor) for factor in (1.1, 1.2, 1.3, 1.5)}
    found: dict[str, dict[str, float]] = {}
    for name, draw in kinds.items():
        found[name] = {}
        for builds in (1, 3):
            for factor in (1.0, 2.0, 3.0):
                failed = 0
                for _ in range(runs):
                    before, now = draw(random, builds), draw(random, 1)[0] * factor
                    failed += any(
                        now[each] > allowed(list(before[:, each]), LIMIT, engines=builds, compared=ERRORS)
                        for each in range(ERRORS)
                    )
                found[name][f"{builds} recorded, ×{factor:g}"] = failed / runs
    return found


def noise(random: np.random.Generator) -> NDArray[np.float64]:
    return random.normal(size=SIZE)


def image(random: np.random.Generator) -> NDArray[np.float64]:
    """From 0 to 1, each of its own brightness and contrast, and smooth."""
    smooth = np.convolve(random.normal(size=SIZE + 63), np.ones(64) / 8, mode="valid")
    found: NDArray[np.float64] = np.clip(random.uniform(0.2, 0.6) + random.uniform(0.1, 0.3) * smooth, 0, 1)
    return found


SOURCES: dict[str, Draw] = {
    "noise": noise,
    "images": image,
    "images, normalized": lambda random: (image(random) - 0.45) / 0.25,
    "images to 255": lambda random: 255 * image(random),
    "noise ×4": lambda random: 4 * noise(random),
    "noise + 1": lambda random: 1 + noise(random),
    "sound": lambda random: noise(random) * float(np.exp(0.4 * random.normal())),
    "sound, loud and low": lambda random: noise(random) * float(np.exp(random.normal())),
    "16 features": lambda random: random.normal(size=16),
    "sparse": lambda random: noise(random) * (random.random(SIZE) < 0.05),
    "heavy tails": lambda random: random.standard_t(2, size=SIZE),
}
SAME = tuple(SOURCES)
OTHERS = (
    ("noise", "images"),
    ("images", "noise"),
    ("noise", "images, normalized"),
    ("images", "images, normalized"),
    ("images", "images to 255"),
    ("images to 255", "images"),
    ("noise", "noise ×4"),
    ("noise ×4", "noise"),
    ("noise", "noise + 1"),
)


def drifted(calibration: Draw, fed: Draw, count: int, cases: int, random: np.random.Generator) -> bool:
    made = [[{"x": draw(random)} for _ in range(number)] for draw, number in ((calibration, count), (fed, cases))]
    model: Any = SimpleNamespace(inputs=(TensorSpec("x", "float32", (None,)),))
    return coverage.covered(model, coverage.look(model, made[0]), made[1])["x"].drifted


def drift(runs: int) -> dict[str, dict[str, float]]:
    """The share that is warned of, by source and number of calibration samples; two inputs are fed."""
    random = np.random.default_rng(0)
    pairs = [*((name, name) for name in SAME), *OTHERS]
    return {
        one if one == other else f"{one} → {other}": {
            f"{count} samples": sum(drifted(SOURCES[one], SOURCES[other], count, 2, random) for _ in range(runs)) / runs
            for count in (1, 4, 8, 32)
        }
        for one, other in pairs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How often chance decides about errors and calibration data.")
    parser.add_argument("--runs", type=int, default=2000, help="of each figure of rises; a tenth of it for drift")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    found = rises(arguments.runs)
    usual = [found[f"spread {by:.0%}"] for by in SPREADS if by <= 0.1]
    report = {
        "benchmark": "baselines",
        "runs": arguments.runs,
        "limits": {"false": FALSE_LIMIT, "found": FOUND_LIMIT},
        "rises": found,
        "drift": drift(max(1, arguments.runs // 10)),
        "within_limits": all(
            each["3 recorded, ×1"] <= FALSE_LIMIT and each["3 recorded, ×3"] >= FOUND_LIMIT for each in usual
        ),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
