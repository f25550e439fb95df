"""What the calibration has to do with a failure: values outside its ranges, poor samples, methods that do better."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.choices import CALIBRATION_METHODS
from pytest_trtcheck.diagnose import audit
from pytest_trtcheck.diagnose.trials import BudgetSpent
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.diagnose.trials import Subject, Trials


@dataclass(frozen=True)
class Examined:
    """What was found, as plain data, and what could not be looked at."""

    found: Mapping[str, Any]
    notes: tuple[str, ...]


def examine(
    pair: Pair,
    subject: Subject,
    *,
    has_tensor: Callable[[str], bool] = lambda _: True,
    progress: Callable[[str], None] = lambda _: None,
) -> Examined | None:
    """Audit the ranges and samples behind a quantized model; None where it has no quantized activations.

    Parameters
    ----------
    has_tensor
        Whether a tensor is one that the user's model has; of others nothing is said.
    """
    if not pair.spans:
        return None
    found: dict[str, Any] = {
        "limit": audit.OUTSIDE_LIMIT,
        "outside": [],
        "inputs_outside": [],
        "samples": None,
        "flags": [],
        "methods": [],
    }
    notes: list[str] = []
    progress("auditing the calibrated ranges")
    try:
        outside = audit.outside_ranges(pair.reference, pair.spans, subject.cases)
        outside = [each for each in outside if has_tensor(each.tensor)]
        found["outside"] = [asdict(each) for each in outside if each.share > 0]
        found["inputs_outside"] = sorted({each.worst for each in outside if each.share > audit.OUTSIDE_LIMIT})
    except CheckError as error:
        notes.append(f"the calibrated ranges could not be audited: {error.headline}")
    if not subject.is_quantized:
        return Examined(found, tuple(notes))
    try:
        samples = subject.samples()
        found["samples"], flags = audit.flags(samples, samples.describe, subject.cases)
        found["flags"] = [asdict(each) for each in flags]
    except CheckError as error:
        notes.append(f"the calibration data could not be looked at again: {error.headline}")
    return Examined(found, tuple(notes))


def methods(subject: Subject, trials: Trials, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """What the other calibration methods would give, as many of them as there is time for.

    Raises
    ------
    CheckError
        The calibration data can't be read a second time.
    """
    given = subject.calibration
    used = given.method if isinstance(given, Calibration) else Calibration(given).method
    found = []
    for method in CALIBRATION_METHODS:
        if method == used:
            continue
        progress(f"calibrating by {method}")
        try:
            judgement = trials.calibrated(method)
        except BudgetSpent:
            break
        found.append({"method": method, "value": judgement.value, "passes": judgement.passed})
    return found
