"""Choosing the ranges of activations from calibration data, in memory that does not grow with the data or the model.

First pass: the model computes the least and the largest value of every tensor itself, and nothing else leaves it.
`minmax` is done then. For `percentile` and `entropy`, further passes fill histograms over [0, largest magnitude]; each
pass lets out only so many tensors as fit a byte limit. Samples are run one at a time.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_trtcheck.errors import ArgumentError, CalibrationError, listed
from pytest_trtcheck.precision.probes import Probes
from pytest_trtcheck.precision.quantization import histogram as histograms
from pytest_trtcheck.spec import CALIBRATION_METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.precision.quantization.plan import QuantizationPlan
    from pytest_trtcheck.spec import CalibrationMethod, InputMapping

MAX_BYTES = 256 << 20


class Runner(Protocol):
    """What runs an ONNX file: the part of `backends.base.Runner` that calibration uses."""

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once; every output comes back by its name."""

    def close(self) -> None:
        """Free what the runner holds."""


@dataclass(frozen=True)
class TensorRange:
    """What calibration found of one tensor.

    Parameters
    ----------
    amax
        The range chosen: magnitudes above it saturate.
    min, max
        The least and the largest value seen.
    beyond
        The share (0 to 1) of the values seen whose magnitude is above `amax`.
    """

    amax: float
    min: float
    max: float
    beyond: float


@dataclass(frozen=True)
class Ranges:
    """The range of every activation tensor of a plan, by tensor name, and what it was chosen from.

    `percentile` is None unless it is the method.
    """

    method: CalibrationMethod
    percentile: float | None
    samples: int
    tensors: Mapping[str, TensorRange]

    def amax(self) -> dict[str, float]:
        """The ranges alone, as `quantize` takes them."""
        return {name: found.amax for name, found in self.tensors.items()}

    def to_json(self) -> str:
        """The ranges as JSON; floats survive the round trip exactly."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Ranges:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "tensors": {name: TensorRange(**found) for name, found in fields["tensors"].items()}})


def collect(
    make_runner: Callable[[Path], Runner],
    model_path: Path,
    plan: QuantizationPlan,
    samples: Iterable[InputMapping],
    *,
    method: CalibrationMethod = "minmax",
    percentile: float = 99.99,
    max_bytes: int = MAX_BYTES,
    describe: Callable[[int], str] = "sample {}".format,
) -> Ranges:
    """Run the FP32 model on `samples` and choose the range of each of `plan.tensors`.

    Parameters
    ----------
    make_runner
        Makes what runs an ONNX file; the files are gone after this call.
    model_path
        The FP32 model that `plan` was made from.
    samples
        Input mappings that fit the model. Iterated once for each pass, so a one-shot iterator won't do.
    method, percentile
        As in `spec.Calibration`.
    max_bytes
        The most bytes of activations and histograms that a pass may hold; one tensor may be larger than that.
    describe
        What messages call the sample of an index, counted from 0.

    Raises
    ------
    CalibrationError
        There are no samples, or not the same number in every pass; or an activation is NaN or infinite.
    ArgumentError
        The method is unknown, or the percentile is not in (0, 100].
    """
    if method not in CALIBRATION_METHODS:
        raise ArgumentError(f"calibration method {method!r} is unknown", f"one of {', '.join(CALIBRATION_METHODS)}")
    if not 0 < percentile <= 100:
        raise ArgumentError(f"calibration percentile {percentile}: expected more than 0 and at most 100 (percent)")
    with tempfile.TemporaryDirectory(prefix="trtcheck-") as folder:
        probes = Probes(model_path, Path(folder))
        count, extremes = _extremes(probes, make_runner, plan, samples, describe)
        if method == "minmax":
            found = {name: TensorRange(seen.amax, seen.min, seen.max, 0.0) for name, seen in extremes.items()}
        else:
            found = {}
            bins = histograms.ENTROPY_BINS if method == "entropy" else histograms.PERCENTILE_BINS
            for group in _groups(extremes, max_bytes, bins * 8):
                again, filled = _histograms(probes, make_runner, group, bins, samples)
                if again != count:
                    raise CalibrationError(
                        f"calibration data gave {count} samples in the first pass and {again} in a later one",
                        "give something that can be iterated again and again, such as a list or files",
                    )
                for name, seen in group.items():
                    found[name] = _clipped(seen, filled.get(name), method, percentile)
    return Ranges(method, percentile if method == "percentile" else None, count, found)


def _clipped(
    seen: _Extremes,
    histogram: histograms.MagnitudeHistogram | None,
    method: CalibrationMethod,
    percentile: float,
) -> TensorRange:
    if histogram is None:
        return TensorRange(seen.amax, seen.min, seen.max, 0.0)
    if method == "entropy":
        kept = histograms.entropy_bins(histogram)
    else:
        kept = histograms.percentile_bins(histogram, percentile)
    return TensorRange(histogram.edge(kept), seen.min, seen.max, histogram.share_beyond(kept))


# --- first pass: extremes --------------------------------------------------------------------------------------------


@dataclass
class _Extremes:
    min: float = math.inf
    max: float = -math.inf
    size: int = 0
    """The most elements seen in one sample."""

    @property
    def amax(self) -> float:
        return max(abs(self.min), abs(self.max))


def _extremes(
    probes: Probes,
    make_runner: Callable[[Path], Runner],
    plan: QuantizationPlan,
    samples: Iterable[InputMapping],
    describe: Callable[[int], str],
) -> tuple[int, dict[str, _Extremes]]:
    path, outputs = probes.with_extremes(plan.tensors)
    found = {name: _Extremes() for name in plan.tensors}
    count = 0
    with closing(make_runner(path)) as runner:
        for index, sample in enumerate(samples):
            results = runner(sample)
            for name, (least, largest, zero, size) in outputs.items():
                elements = int(results[size])
                if not elements:
                    continue
                if not math.isfinite(float(results[zero])):
                    raise _not_finite(name, plan, describe(index))
                seen = found[name]
                seen.min = min(seen.min, float(results[least]))
                seen.max = max(seen.max, float(results[largest]))
                seen.size = max(seen.size, elements)
            count += 1
    if not count:
        raise CalibrationError("the calibration data holds no samples", "give at least one")
    for name, seen in found.items():
        if not seen.size:
            raise CalibrationError(
                f"tensor {name!r} (read by {plan.readers(name)[0]}) was empty for all {count} calibration samples",
                "add samples that exercise this part of the model, or name the node in keep_fp32",
            )
    return count, found


def _not_finite(tensor: str, plan: QuantizationPlan, sample: str) -> CalibrationError:
    readers = plan.readers(tensor)
    return CalibrationError(
        f"{sample}: tensor {tensor!r} (read by {listed(readers)}) holds NaN or infinity in the FP32 model",
        f"no range covers that: look at the sample; or, if a mask of -inf is meant, keep_fp32={list(readers)!r}",
    )


# --- further passes: histograms --------------------------------------------------------------------------------------


def _histograms(
    probes: Probes,
    make_runner: Callable[[Path], Runner],
    group: Mapping[str, _Extremes],
    bins: int,
    samples: Iterable[InputMapping],
) -> tuple[int, dict[str, histograms.MagnitudeHistogram]]:
    """How many samples there were, and the histograms of all of them."""
    # A tensor that is always 0 has no histogram: it has no bin width either.
    filled = {name: histograms.MagnitudeHistogram(seen.amax, bins) for name, seen in group.items() if seen.amax}
    path, outputs = probes.with_tensors(group)
    count = 0
    with closing(make_runner(path)) as runner:
        for sample in samples:
            results = runner(sample)
            for name, histogram in filled.items():
                histogram.add(results.pop(outputs[name]))
            count += 1
    return count, filled


def _groups(extremes: Mapping[str, _Extremes], max_bytes: int, histogram_bytes: int) -> Iterator[dict[str, _Extremes]]:
    """Tensors, in graph order, that fit into `max_bytes` together; a larger one goes alone."""
    group: dict[str, _Extremes] = {}
    used = 0
    for name, seen in extremes.items():
        # The array that leaves the model is FP32.
        needed = seen.size * 4 + histogram_bytes
        if group and used + needed > max_bytes:
            yield group
            group, used = {}, 0
        group[name] = seen
        used += needed
    if group:
        yield group
