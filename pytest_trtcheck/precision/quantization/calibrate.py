"""Choosing the ranges of activations from calibration data, in memory that does not grow with the data or the model.

First pass: the model computes the least and the largest value of every tensor itself, and nothing else leaves it.
`minmax` is done then. For the other methods, further passes fill histograms over [0, largest magnitude]; each pass lets
out only so many tensors as fit a byte limit. Samples are run one at a time.
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.choices import CALIBRATION_METHODS, RANGE_METHODS
from pytest_trtcheck.errors import ArgumentError, CalibrationError, listed, plural, suggestion
from pytest_trtcheck.precision.probes import Probes
from pytest_trtcheck.precision.quantization import histogram as histograms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import QuantizedName, RangeMethod
    from pytest_trtcheck.precision.quantization.plan import QuantizationPlan
    from pytest_trtcheck.spec import InputMapping

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
class Method:
    """A way to choose ranges; `percentile` is None unless it is that."""

    name: RangeMethod
    percentile: float | None = None

    def __str__(self) -> str:
        return self.name if self.percentile is None else f"{self.name} {self.percentile:g}"


@dataclass(frozen=True)
class Choice:
    """How well each method did on samples that its ranges were not chosen from: `choosing` says how it is judged.

    Parameters
    ----------
    held_out
        On how many samples each method was judged; 0 where none could be held out.
    errors
        The relative error of each output, by method ("percentile 99.9") and name; None is an error that is not finite.
    """

    held_out: int
    errors: Mapping[str, Mapping[str, float | None]]

    def why(self) -> str:
        """Why it is this method, in a few words; the record has the errors."""
        if not self.errors:
            return "of which none could be held out to choose a method by: give more"
        if not self.held_out:
            return "the outputs of which tell nothing to choose a method by"
        return f"chosen of {len(self.errors)} methods by the error on held-out samples"

    def worst(self, method: str) -> float:
        """The error of the output that has the largest by this method; infinite where it is not finite."""
        return max(math.inf if error is None else error for error in self.errors[method].values())


@dataclass(frozen=True)
class Ranges:
    """The range of every activation tensor of a plan, by tensor name, and what it was chosen from.

    `percentile` is None unless it is the method; `choice` is, unless the method was chosen among several.
    """

    method: RangeMethod
    percentile: float | None
    samples: int
    tensors: Mapping[str, TensorRange]
    choice: Choice | None = None
    rows: int | None = None
    """Of all samples, where some are batches."""

    def amax(self) -> dict[str, float]:
        """The ranges alone, as `quantize` takes them."""
        return {name: found.amax for name, found in self.tensors.items()}

    def __str__(self) -> str:
        method = Method(self.method, self.percentile)
        said = f"ranges by {method} from {plural(self.samples, 'sample')}"
        said += f" ({plural(self.rows, 'row')})" if self.rows else ""
        if not self.choice:
            return said
        apart = ", or its rows apart, with one dimension more in front" * bool(self.rows and self.samples == 1)
        return f"{said}, {self.choice.why()}{apart}"

    def to_json(self) -> str:
        """The ranges as JSON; floats survive the round trip exactly."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Ranges:
        """The inverse of `to_json`, of what was parsed."""
        choice = fields["choice"] and Choice(**fields["choice"])
        tensors = {name: TensorRange(**found) for name, found in fields["tensors"].items()}
        return cls(**{**fields, "tensors": tensors, "choice": choice})


@dataclass(frozen=True)
class Task:
    """What is calibrated, and with what: the fields are `collect`'s arguments."""

    make_runner: Callable[[Path], Runner]
    model_path: Path
    plan: QuantizationPlan
    samples: Iterable[InputMapping]
    dtype: QuantizedName = "int8"
    max_bytes: int = MAX_BYTES
    describe: Callable[[int], str] = "sample {}".format
    rows: Callable[[InputMapping], int] = lambda _: 1


@dataclass(frozen=True)
class Collected:
    """Ranges by several methods, by tensor name.

    Parameters
    ----------
    whole
        From all samples.
    without
        From those outside each fold: sample i lies in fold i % folds.
    rows
        Of all samples; None where each has one.
    """

    samples: int
    whole: Mapping[Method, Mapping[str, TensorRange]]
    without: Sequence[Mapping[Method, Mapping[str, TensorRange]]]
    rows: int | None = None


def collect(
    make_runner: Callable[[Path], Runner],
    model_path: Path,
    plan: QuantizationPlan,
    samples: Iterable[InputMapping],
    *,
    method: RangeMethod = "minmax",
    percentile: float = 99.99,
    dtype: QuantizedName = "int8",
    max_bytes: int = MAX_BYTES,
    describe: Callable[[int], str] = "sample {}".format,
    rows: Callable[[InputMapping], int] = lambda _: 1,
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
    dtype
        What the ranges are for; `mse` alone asks.
    max_bytes
        The most bytes of activations and histograms that a pass may hold; one tensor may be larger than that.
    describe
        What messages call the sample of an index, counted from 0.
    rows
        How many rows of a batch a sample has.

    Raises
    ------
    CalibrationError
        There are no samples, or not the same number in every pass; or an activation is NaN or infinite.
    ArgumentError
        The method is unknown, or the percentile is not in (0, 100].
    """
    if method not in RANGE_METHODS:
        raise ArgumentError(
            f"Calibration: method={method!r}: expected one of {', '.join(CALIBRATION_METHODS)}",
            suggestion(method, CALIBRATION_METHODS),
        )
    if not 0 < percentile <= 100:
        raise ArgumentError(f"Calibration: percentile={percentile}: expected a number above 0, of at most 100")
    wanted = Method(method, percentile if method == "percentile" else None)
    task = Task(make_runner, model_path, plan, samples, dtype, max_bytes, describe, rows)
    found = collect_each(task, [wanted])
    return Ranges(wanted.name, wanted.percentile, found.samples, found.whole[wanted], rows=found.rows)


def collect_each(task: Task, methods: Sequence[Method], folds: int = 1) -> Collected:
    """The ranges by each of `methods`, in the passes that one takes, and those without each of several folds.

    Errors are those of `collect`.
    """
    every = tuple(range(folds))
    parts = [every, *((*every[:fold], *every[fold + 1 :]) for fold in every if folds > 1)]
    found: list[dict[Method, dict[str, TensorRange]]] = [{each: {} for each in methods} for _ in parts]
    with scratch_folder("trial") as folder:
        probes = Probes(task.model_path, Path(folder))
        count, rows, extremes = _extremes(probes, task, folds)
        needs_histograms = any(each.name != "minmax" for each in methods)
        groups = _groups(extremes, task.max_bytes, histograms.BINS * 8 * folds) if needs_histograms else [extremes]
        for group in groups:
            filled: Mapping[str, Sequence[histograms.MagnitudeHistogram]] = {}
            if needs_histograms:
                again, filled = _histograms(probes, task, group)
                if again != count:
                    raise CalibrationError(
                        f"calibration data gave {plural(count, 'sample')} in the first pass and {again} in a later one",
                        "give something that can be iterated again and again, such as a list or files",
                        code="calibration-iterable",
                    )
            for name, by_fold in group.items():
                for part, ranges in zip(parts, found, strict=True):
                    seen = reduce(add, (by_fold[fold] for fold in part))
                    histogram = reduce(add, (filled[name][fold] for fold in part)) if name in filled else None
                    for method in methods:
                        ranges[method][name] = _range(seen, histogram, method, task.dtype)
    return Collected(count, found[0], found[1:], rows if rows > count else None)


def _range(
    seen: _Extremes, histogram: histograms.MagnitudeHistogram | None, method: Method, dtype: QuantizedName
) -> TensorRange:
    if method.name == "minmax" or histogram is None or not seen.amax:
        return TensorRange(seen.amax, seen.min, seen.max, 0.0)
    if method.percentile is not None:
        kept = histograms.percentile_bins(histogram, method.percentile)
    elif method.name == "mse":
        kept = histograms.mse_bins(histogram, histograms.levels(dtype))
    else:
        kept = histograms.entropy_bins(histogram)
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
        return max(abs(self.min), abs(self.max)) if self.size else 0.0

    def __add__(self, other: _Extremes) -> _Extremes:
        return _Extremes(min(self.min, other.min), max(self.max, other.max), max(self.size, other.size))


def _extremes(probes: Probes, task: Task, folds: int) -> tuple[int, int, dict[str, list[_Extremes]]]:
    """How many samples there are, how many rows they have, and of each tensor what each fold has."""
    path, outputs = probes.with_extremes(task.plan.tensors)
    found = {name: [_Extremes() for _ in range(folds)] for name in task.plan.tensors}
    count = rows = 0
    with closing(task.make_runner(path)) as runner:
        for index, sample in enumerate(task.samples):
            results = runner(sample)
            rows += task.rows(sample)
            for name, (least, largest, zero, size) in outputs.items():
                elements = int(results[size])
                if not elements:
                    continue
                if not math.isfinite(float(results[zero])):
                    raise _not_finite(name, task.plan, task.describe(index))
                found[name][index % folds] += _Extremes(float(results[least]), float(results[largest]), elements)
            count += 1
    if not count:
        raise CalibrationError("the calibration data holds no samples", "give at least one", code="calibration-values")
    for name, seen in found.items():
        if not any(each.size for each in seen):
            raise CalibrationError(
                f"tensor {name!r} (read by {task.plan.readers(name)[0]}) was empty for all {count} calibration samples",
                "add samples that exercise this part of the model, or name the node in keep_fp32",
                code="calibration-values",
            )
    return count, rows, found


def _not_finite(tensor: str, plan: QuantizationPlan, sample: str) -> CalibrationError:
    readers = plan.readers(tensor)
    return CalibrationError(
        f"{sample}: tensor {tensor!r} (read by {listed(readers)}) holds NaN or infinity in the FP32 model",
        f"no range covers that: look at the sample; or, if a mask of -inf is meant, keep_fp32={list(readers)!r}",
        code="calibration-values",
    )


# --- further passes: histograms --------------------------------------------------------------------------------------


def _histograms(
    probes: Probes, task: Task, group: Mapping[str, Sequence[_Extremes]]
) -> tuple[int, dict[str, list[histograms.MagnitudeHistogram]]]:
    """How many samples there were, and the histograms of each fold, all over the same bins."""
    filled = {}
    for name, seen in group.items():
        # A tensor that is always 0 has no histogram: it has no bin width either.
        if amax := max(each.amax for each in seen):
            filled[name] = [histograms.MagnitudeHistogram(amax) for _ in seen]
    path, outputs = probes.with_tensors(group)
    count = 0
    with closing(task.make_runner(path)) as runner:
        for index, sample in enumerate(task.samples):
            results = runner(sample)
            for name, by_fold in filled.items():
                by_fold[index % len(by_fold)].add(results.pop(outputs[name]))
            count += 1
    return count, filled


def _groups(
    extremes: Mapping[str, list[_Extremes]], max_bytes: int, histogram_bytes: int
) -> Iterator[dict[str, list[_Extremes]]]:
    """Tensors, in graph order, that fit into `max_bytes` together; a larger one goes alone."""
    group: dict[str, list[_Extremes]] = {}
    used = 0
    for name, seen in extremes.items():
        # The array that leaves the model is FP32.
        needed = max(each.size for each in seen) * 4 + histogram_bytes
        if group and used + needed > max_bytes:
            yield group
            group, used = {}, 0
        group[name] = seen
        used += needed
    if group:
        yield group
