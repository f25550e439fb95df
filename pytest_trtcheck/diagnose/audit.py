"""What calibration has to do with a failure: values outside its ranges, samples that are no help, better methods.

Samples are compared by what their inputs look like: mean, standard deviation and quantiles of each. A sample, or a test
input, is far from a set when its nearest neighbour there is much farther away than neighbours usually are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from pytest_trtcheck.choices import RANGE_METHODS
from pytest_trtcheck.diagnose import relowering
from pytest_trtcheck.diagnose.subject import BudgetSpent
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.inputs import digest
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.pieces import Instruments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.diagnose.naming import Names
    from pytest_trtcheck.diagnose.statistics import Span
    from pytest_trtcheck.diagnose.subject import Budget, Subject
    from pytest_trtcheck.model.pieces import Graph

OUTSIDE_LIMIT = 0.01
"""The share of a tensor's elements that may lie outside its calibrated range."""
_FAR = 5.0
"""How many times the usual distance between neighbours is far."""
_APART = 0.4
"""A share of all values' span that must lie between, too: sound data that is much alike has close neighbours."""
_RESOLUTION = 0.02
"""Differences below this share of all values' span are none."""
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_PER_INPUT = 2 + len(_QUANTILES)
_ENOUGH = 4
"""Samples from which on there is a usual distance."""
_MOST_ELEMENTS = 1 << 20

Case = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True)
class Outside:
    """A quantized tensor, of which test activations lie outside the calibrated range of ±amax."""

    tensor: str
    amax: float
    share: float
    """Of its elements (0 to 1), over all test inputs."""
    max_abs: float
    """The largest magnitude seen."""
    worst: int
    """The index of the test input with the largest share."""


@dataclass(frozen=True)
class Flag:
    """Something wrong with a calibration sample or a test input.

    `index` counts samples or test inputs from 0; None means the data as a whole.
    """

    what: str
    index: int | None
    label: str
    detail: str


def examine(pair: Pair, subject: Subject, names: Names) -> tuple[dict[str, Any], list[str]]:
    """What was found of the ranges and samples behind a quantized model, and notes of what could not be looked at.

    Of tensors that the user's model does not have nothing is said.
    """
    found: dict[str, Any] = {
        "limit": OUTSIDE_LIMIT,
        "outside": [],
        "inputs_outside": [],
        "samples": None,
        "flags": [],
        "methods": [],
    }
    notes: list[str] = []
    try:
        outside = outside_ranges(pair.reference, pair.spans, subject.cases)
        outside = [each for each in outside if names.has_tensor(each.tensor)]
        found["outside"] = [asdict(each) for each in outside if each.share > 0]
        found["inputs_outside"] = sorted({each.worst for each in outside if each.share > OUTSIDE_LIMIT})
    except CheckError as error:
        notes.append(f"the calibrated ranges could not be audited: {error.headline}")
    if not subject.is_quantized:
        return found, notes
    if subject.calibration is None:
        notes.append("the calibration data was not looked at again: a failure bundle holds its ranges alone")
        return found, notes
    try:
        samples = subject.samples()
        found["samples"], flagged = flags(samples, samples.describe, subject.cases)
        found["flags"] = [asdict(each) for each in flagged]
    except CheckError as error:
        notes.append(f"the calibration data could not be looked at again: {error.headline}")
    return found, notes


def methods(subject: Subject, budget: Budget, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """What the other calibration methods would give, as many of them as there is time for.

    Raises
    ------
    CheckError
        The calibration data can't be read a second time.
    """
    used = subject.ranges().method
    found = []
    for method in RANGE_METHODS:
        if method == used:
            continue
        progress(f"calibrating by {method}")
        try:
            budget.spend()
        except BudgetSpent:
            break
        judgement = relowering.calibrated(subject, method)
        found.append({"method": method, "value": judgement.value, "passes": judgement.passed})
    return found


# --- ranges ----------------------------------------------------------------------------------------------------------


def outside_ranges(reference: Graph, spans: Mapping[str, Span], cases: Iterable[Case]) -> list[Outside]:
    """How much of each quantized tensor lies outside its range, over all test inputs, the worst tensor first.

    The FP32 model counts by itself; nothing but counts leaves it.
    """
    spans = {name: spans[name] for name in spans if name in reference.producers or name in reference.inputs}
    if not spans:
        return []
    counting = Instruments(reference.opset())
    counting.compute(reference, spans)
    figures: dict[str, tuple[str, str, str]] = {}
    for name, span in spans.items():
        # An input may be of a 16-bit type.
        x = counting.op("Cast", name, to=TensorProto.FLOAT)
        peak = counting.reduce("ReduceMax", counting.op("Abs", x))
        figures[name] = counting.outside(x, *span.rounded_within), counting.op("Size", name), peak
    model = counting.model([output for each in figures.values() for output in each], reference)
    path = pieces.write(model, reference.folder, "audit")
    with closing(OrtRunner(path, "the model, counting what lies outside its ranges")) as runner:
        results = [runner(case) for case in cases]
    found = []
    for name, outputs in figures.items():
        # One row a test input: elements outside, elements, the largest magnitude.
        rows = np.array([[float(each[output]) for output in outputs] for each in results])
        shares = rows[:, 0] / np.maximum(rows[:, 1], 1)
        share, peak = rows[:, 0].sum() / max(rows[:, 1].sum(), 1), np.fmax.reduce(rows[:, 2], initial=0.0)
        found.append(
            Outside(name, spans[name].amax, float(share), float(peak), int(shares.argmax())),
        )
    return sorted(found, key=lambda each: -each.share)


# --- samples ---------------------------------------------------------------------------------------------------------


def flags(samples: Iterable[Case], describe: Callable[[int], str], cases: Sequence[Case]) -> tuple[int, list[Flag]]:
    """How many calibration samples there are, and what is wrong with them, or with test inputs that are unlike them."""
    found: list[Flag] = []
    features: list[NDArray[np.float64]] = []
    seen: dict[str, int] = {}
    for index, sample in enumerate(samples):
        features.append(_features(sample))
        constant = [name for name, array in sample.items() if _is_constant(array)]
        if constant and len(constant) == len(sample):
            value = next(iter(sample.values())).reshape(-1)[0]
            detail = f"every element is {value:g}" if isinstance(value, (int, float, np.number)) else ""
            found.append(Flag("constant", index, "", detail))
        first = seen.setdefault(digest(sample), index)
        if first != index:
            found.append(Flag("duplicate", index, "", f"the same as sample {first}"))
    found += _far(np.array(features), np.array([_features(case) for case in cases]))
    return len(features), [
        replace(flag, label=describe(flag.index)) if flag.index is not None and not flag.label else flag
        for flag in found
    ]


def _far(samples: NDArray[np.float64], cases: NDArray[np.float64]) -> list[Flag]:
    """Samples far from all test inputs, and test inputs far from all samples."""
    if not samples.size or not cases.size or samples.shape[0] < 2:
        return []
    scale = _scale(np.concatenate([samples, cases]))
    among = _nearest(samples / scale, samples / scale, skip_self=True)
    usual = max(float(np.median(among)), _RESOLUTION)
    to_cases, to_samples = _nearest(samples / scale, cases / scale), _nearest(cases / scale, samples / scale)
    far_cases = [index for index, distance in enumerate(to_samples) if distance > max(_FAR * usual, _APART)]
    found = [
        Flag(
            "test input far",
            index,
            f"test input {index}",
            _distance(to_samples[index], usual, "the nearest calibration sample"),
        )
        for index in far_cases
    ]
    typical = max(float(np.median(to_cases)), _RESOLUTION)
    if len(far_cases) == len(cases) and float(to_cases.min()) > max(_FAR * usual, _APART):
        detail = (
            f"every sample is far from every test input (mean {samples[:, 0].mean():.4g}, standard deviation "
            f"{samples[:, 1].mean():.4g}; test inputs {cases[:, 0].mean():.4g} and {cases[:, 1].mean():.4g})"
        )
        return [Flag("all far", None, "the calibration data", detail)]
    if len(samples) >= _ENOUGH:
        found += [
            Flag("sample far", index, "", _distance(distance, typical, "the nearest test input"))
            for index, distance in enumerate(to_cases)
            if distance > max(_FAR * typical, _APART)
        ]
    return found


def _scale(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each feature is measured in: its span, or where it hardly varies a part of its input's magnitude."""
    span = features.max(axis=0) - features.min(axis=0)
    by_input = np.abs(features).max(axis=0).reshape(-1, _PER_INPUT).max(axis=1)
    scale: NDArray[np.float64] = np.maximum(span, _RESOLUTION * np.repeat(by_input, _PER_INPUT))
    return np.maximum(scale, 1e-30)


def _distance(distance: float, usual: float, to: str) -> str:
    return f"{distance / usual:.0f} times as far from {to} as is usual"


def _nearest(
    points: NDArray[np.float64], others: NDArray[np.float64], *, skip_self: bool = False
) -> NDArray[np.float64]:
    distances = np.abs(points[:, None, :] - others[None, :, :]).max(axis=2)
    if skip_self:
        np.fill_diagonal(distances, np.inf)
    nearest: NDArray[np.float64] = distances.min(axis=1)
    return nearest


def _features(sample: Case) -> NDArray[np.float64]:
    """Mean, standard deviation and quantiles of every numeric input; of large ones over evenly spaced elements."""
    found: list[float] = []
    for _, array in sorted(sample.items()):
        # Token ids and other integers are names, not magnitudes; pixels are bytes.
        if array.dtype.kind != "f" and array.dtype != np.uint8:
            continue
        flat = array.reshape(-1)
        values = flat[:: max(1, flat.size // _MOST_ELEMENTS)].astype(np.float64)
        values = values[np.isfinite(values)]
        if not values.size:
            values = np.zeros(1)
        found += [float(values.mean()), float(values.std()), *np.quantile(values, _QUANTILES).tolist()]
    return np.array(found)


def _is_constant(array: NDArray[Any]) -> bool:
    return array.size > 1 and bool((array == array.reshape(-1)[0]).all())
