"""Does calibration data cover what a check is fed? Ranges chosen from other data saturate, or waste their steps.

Of every input of numbers is asked how much of what is fed lies far outside of all that calibration saw; whether it is
of another magnitude; whether its samples have other means or widths than those of the calibration data; and whether all
of it has the same distribution, by the population stability index over the deciles of the calibration data, of which
0.25 and more is called a significant shift (Siddiqi, "Credit Risk Scorecards", 2006). Samples of one data set differ
too, the more so the fewer there are: each calibration sample is asked the same questions against the others, and what
is fed has to lie beyond their answers. Where those samples have no distribution in common, the index says nothing.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.cache import Cache, Key, hash_code
from pytest_trtcheck.model.arrays import load_arrays, save_arrays
from pytest_trtcheck.record import CoverageRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec

PSI = 0.25
"""The population stability index from which on a shift is significant."""
OUTSIDE, MARGIN = 0.1, 0.25
"""The share of the elements fed that may lie outside of the calibration data's range by so much of its width."""
MAGNITUDE = 10.0
"""How many times as large, or as small, as that of any calibration sample a magnitude is another one."""
MANY = 10
"""Samples from which on the index is taken at its word; of half of them it has to be twice as large."""
BEYOND = 5.0
"""How many times as much as any calibration sample answers against the others is beyond them."""
SPARSE = 16
"""By how many times their range samples may be exceeded: once, and so many more over their number."""
MATERIAL = 0.1
"""In the calibration data's standard deviation, how far apart two means or widths matter."""
ALIKE = 0.5
"""The index of each calibration sample against the others up to which they have a distribution in common."""
ENOUGH = 3
"""Samples from which on it is known how much they differ; of fewer, only another magnitude tells."""
FEW = 50
"""Elements below which there is no distribution to speak of."""
CASES = 1000
"""The cases that are looked at, about, where there are more."""
_SAMPLES, _ELEMENTS, _ASKED = 32, 1024, 16
"""The most samples, and elements of each, that are kept; and how many of them are held against the others."""
_DECILES = np.arange(1, 10) / 10
_LEAST = 1e-4
"""The share that an empty bin is taken to have."""


@dataclass(frozen=True)
class Seen:
    """What an input's values are like.

    Parameters
    ----------
    min, max
        Over all samples, of what is finite.
    samples
        Some of the elements of some samples: one array each. A row of a batch that the model leaves open is a sample.
    """

    min: float
    max: float
    samples: Sequence[NDArray[np.float64]] = field(compare=False)


def of_calibration(model: OnnxModel, samples: Iterable[Case], digest: str, cache: Cache) -> dict[str, Seen]:
    """What the calibration data's inputs are like; it is read once.

    Parameters
    ----------
    digest
        Identity of the samples.
    """
    key = Key(
        "coverage",
        model.label,
        {
            "samples": digest,
            "inputs": repr(model.inputs),
            "code": hash_code("precision/quantization/coverage.py"),
        },
    )

    def make(folder: Path) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        for name, seen in look(model, samples).items():
            # Rows of one length: a file of arrays of several would need pickles.
            rows = np.full((len(seen.samples), _ELEMENTS), np.nan)
            for row, values in zip(rows, seen.samples, strict=True):
                row[: values.size] = values
            arrays |= {f"range {name}": np.array([seen.min, seen.max]), f"samples {name}": rows}
        save_arrays(folder, arrays)

    entry = cache.get_or_make(key, make)
    found = {}
    with entry.understood():
        arrays = load_arrays(entry.path)
        for spec in model.inputs:
            if f"range {spec.name}" in arrays:
                least, largest = map(float, arrays[f"range {spec.name}"])
                found[spec.name] = Seen(least, largest, [*_rows_of(arrays[f"samples {spec.name}"])])
    return found


def _rows_of(samples: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """The values of each sample: rows that NaN made one length."""
    if samples.dtype != np.float64 or not samples.size:
        raise ValueError(f"samples of {samples.dtype} {samples.shape}")
    for row in samples:
        values = row[~np.isnan(row)]
        if not values.size:
            raise ValueError("a sample without a value")
        yield values


def look(model: OnnxModel, samples: Iterable[Case]) -> dict[str, Seen]:
    """What the inputs of samples are like; ids, flags and strings are names, and left out."""
    chosen, elements = random.Random(0), np.random.default_rng(0)  # noqa: S311 - a sample, no secret
    specs = [spec for spec in model.inputs if _is_number(spec)]
    kept: dict[str, list[NDArray[np.float64]]] = {spec.name: [] for spec in specs}
    count = dict.fromkeys(kept, 0)
    least, largest = dict.fromkeys(kept, math.inf), dict.fromkeys(kept, -math.inf)
    for case in samples:
        for spec in specs:
            for row in _rows(case[spec.name], spec):
                values = _finite(row)
                if not values.size:
                    continue
                least[spec.name] = min(least[spec.name], float(values.min()))
                largest[spec.name] = max(largest[spec.name], float(values.max()))
                count[spec.name] += 1
                # Each row is as likely to be kept as any other (Vitter's algorithm R).
                place = chosen.randrange(count[spec.name])
                if place < _SAMPLES:
                    if values.size > _ELEMENTS:
                        values = elements.choice(values, _ELEMENTS, replace=False)
                    into = kept[spec.name]
                    if len(into) < _SAMPLES:
                        into.append(values)
                    else:
                        into[place] = values
    return {name: Seen(least[name], largest[name], rows) for name, rows in kept.items() if rows}


def covered(model: OnnxModel, calibration: Mapping[str, Seen], cases: Sequence[Case]) -> dict[str, CoverageRecord]:
    """What the calibration data holds of each input, and what of the cases it does not cover."""
    fed = look(model, cases)
    specs = {spec.name: spec for spec in model.inputs}
    return {
        name: _compared(seen, fed[name], _outside(seen, specs[name], cases))
        if name in fed
        else CoverageRecord(seen.min, seen.max)
        for name, seen in calibration.items()
    }


def notes(coverage: Mapping[str, CoverageRecord], fed: str) -> Iterator[str]:
    """What to say of inputs that drifted; `fed` is where they came from."""
    for name, found in coverage.items():
        if not found.drifted or found.fed_min is None or found.fed_max is None:
            continue
        reach = (
            f"reaches {found.fed_min:.4g} to {found.fed_max:.4g}, calibration saw {found.min:.4g} to {found.max:.4g}"
        )
        yield (
            f"the calibration data is not like the {fed} inputs: input {name!r} {reach}; "
            f"{100 * (found.outside or 0.0):.3g} % of its elements lie outside (population stability index "
            f"{found.psi or 0.0:.2g}, {PSI:g} is a significant shift): calibrate with data like that which is fed"
        )


def _is_number(spec: TensorSpec) -> bool:
    return spec.dtype == "uint8" or spec.dtype.startswith(("float", "bfloat"))


def _rows(array: NDArray[Any], spec: TensorSpec) -> Iterable[NDArray[Any]]:
    is_batch = len(spec.shape) > 1 and not isinstance(spec.shape[0], int)
    return array if is_batch else (array,)


def _finite(array: NDArray[Any]) -> NDArray[np.float64]:
    values = array.reshape(-1).astype(np.float64)
    return values[np.isfinite(values)]


def _outside(seen: Seen, spec: TensorSpec, cases: Iterable[Case]) -> float:
    """The share of all elements, whole."""
    counts = [0, 0]
    for case in cases:
        values = _finite(case[spec.name])
        counts[0] += int(((values < seen.min) | (values > seen.max)).sum())
        counts[1] += values.size
    return counts[0] / max(counts[1], 1)


def _compared(seen: Seen, fed: Seen, outside: float) -> CoverageRecord:
    whole, given = np.concatenate(seen.samples), np.concatenate(fed.samples)
    index = stability_index(whole, given)
    magnitudes = [each for each in map(_magnitude, seen.samples) if each]
    now = _magnitude(given)
    drifted = bool(magnitudes and now) and not min(magnitudes) / MAGNITUDE <= now <= max(magnitudes) * MAGNITUDE
    if len(seen.samples) >= ENOUGH:
        shares, indices = _among(seen.samples)
        drifted |= _far_outside(given, whole) > max(OUTSIDE, BEYOND * max(shares))
        is_known = max(indices) <= ALIKE and min(whole.size, given.size) >= FEW
        least = PSI * max(1.0, MANY / len(seen.samples))
        drifted |= is_known and index > max(least, BEYOND * max(indices))
        drifted |= any(_apart(of, seen.samples, fed.samples, float(whole.std())) for of in (np.mean, _width))
    return CoverageRecord(seen.min, seen.max, fed.min, fed.max, outside, index, drifted)


def _among(samples: Sequence[NDArray[np.float64]]) -> tuple[list[float], list[float]]:
    """What some of the samples answer against the others: the share far outside of their range, and the index."""
    shares, indices = [], []
    for number in range(min(len(samples), _ASKED)):
        one = samples[number]
        others = np.concatenate([each for place, each in enumerate(samples) if place != number])
        shares.append(_far_outside(one, others))
        indices.append(stability_index(others, one))
    return shares, indices


def _far_outside(values: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    least, largest = float(others.min()), float(others.max())
    margin = MARGIN * (largest - least)
    return float(((values < least - margin) | (values > largest + margin)).mean())


def _apart(of: Any, samples: Sequence[NDArray[np.float64]], fed: Sequence[NDArray[np.float64]], unit: float) -> bool:
    """Whether what is fed has another mean, or width, than any sample.

    Noise is alike from one sample to the next; images that have the same distribution on the whole are not.
    """
    usual, now = (np.array([of(each) for each in side]) for side in (samples, fed))
    apart = float(np.abs(now - usual.mean()).mean())
    # The range of few samples says little of where another may lie.
    return apart > max(MATERIAL * unit, (1 + SPARSE / len(usual)) * float(np.ptp(usual)))


def _width(values: NDArray[np.float64]) -> float:
    """Between what one and nine of ten values do not exceed."""
    return float(np.ptp(np.quantile(values, (0.1, 0.9))))


def _magnitude(values: NDArray[np.float64]) -> float:
    """What nine of ten values do not exceed: the largest one is that of an outlier."""
    return float(np.quantile(np.abs(values), 0.9))


def stability_index(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """The population stability index Σ (a − e) ln(a / e) over the deciles of `expected`; equal deciles are one."""
    edges = np.unique(np.quantile(expected, _DECILES))
    e, a = (
        np.maximum(np.bincount(np.searchsorted(edges, values), minlength=edges.size + 1) / values.size, _LEAST)
        for values in (expected, actual)
    )
    return float(((a - e) * np.log(a / e)).sum())
