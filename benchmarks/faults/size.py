"""How large a fault is, in numpy alone: by part of each output, and by what is decided. The plugin is not asked.

    python benchmarks/faults/size.py REFERENCE.npz ACTUAL.npz NAME

The error of a part is max|y − r| / max|r| over that part, its own scale. Decisions that flipped: of those by the
largest of a row, rows whose largest is elsewhere; of those by a threshold, elements that reach it on one side alone, as
a share of those that reach it on either (detections lost and invented). NaN where the reference has a number is an
infinite error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import zoo  # type: ignore[import-not-found]  # beside this script
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

FEWEST = 20
"""Decisions by threshold that a share needs to mean something: one of three is no 33 %."""


def taken(part: zoo.Part, arrays: Arrays) -> NDArray[np.float64]:
    """The part's elements."""
    array = np.asarray(arrays[part.output], np.float64)
    return array if part.indices is None else np.take(array, range(*part.indices), axis=part.axis)


def error(actual: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """max|y − r| / max|r|."""
    if not np.isfinite(actual[np.isfinite(reference)]).all():
        return float("inf")
    peak = float(np.abs(reference).max())
    worst = float(np.abs(actual - reference).max())
    return worst / peak if peak else worst


def flips(actual: NDArray[np.float64], reference: NDArray[np.float64], threshold: float | None) -> tuple[int, int]:
    """How many decisions flipped, of how many."""
    if threshold is None:
        before, after = reference.argmax(-1), np.nan_to_num(actual, nan=-np.inf).argmax(-1)
        return int((before != after).sum()), before.size
    above, now = reference >= threshold, actual >= threshold
    return int((above != now).sum()), int((above | now).sum())


def size(parts: Sequence[zoo.Part], decisions: Sequence[zoo.Decision], pairs: Sequence[tuple[Arrays, Arrays]]) -> Any:
    """The size of a fault over pairs of (actual, reference) outputs.

    `errors` by part are the largest of any pair; `flipped` by decision are shares of the decisions of all pairs, None
    where there are too few of them.
    """
    errors = {
        f"{part.output}/{part.name}".rstrip("/"): max(error(taken(part, y), taken(part, r)) for y, r in pairs)
        for part in parts
    }
    flipped: dict[str, float | None] = {}
    for decision in decisions:
        counts = [flips(taken(decision.part, y), taken(decision.part, r), decision.threshold) for y, r in pairs]
        of = sum(count for _, count in counts)
        share = sum(count for count, _ in counts) / of if of else 0.0
        name = f"{decision.part.output}/{decision.part.name}".rstrip("/")
        # A row always decides something, few rows too.
        flipped[name] = None if decision.threshold is not None and of < FEWEST else share
    return {"errors": errors, "flipped": flipped}


def largest(values: Mapping[str, float | None]) -> float:
    """The largest that is known."""
    return max((value for value in values.values() if value is not None), default=0.0)


def must_be_caught(found: Mapping[str, Any], limit: float) -> bool:
    """At least 5 % of decisions, or more than twice the limit in some part."""
    return largest(found["flipped"]) >= 0.05 or largest(found["errors"]) > 2 * limit


def is_sound(found: Mapping[str, Any], limit: float) -> bool:
    """Under half the limit in every part, and fewer than 1 % of decisions."""
    return largest(found["flipped"]) < 0.01 and largest(found["errors"]) < limit / 2


def main() -> None:
    import zoo as models

    reference, actual = (dict(np.load(path)) for path in sys.argv[1:3])
    subject = models.by_name([sys.argv[3]])[sys.argv[3]]
    print(json.dumps(size(subject.parts, subject.decisions, [(actual, reference)]), indent=1))


if __name__ == "__main__":
    # Beside this script.
    sys.path.insert(0, str(Path(__file__).parent))
    main()
