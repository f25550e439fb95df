"""Is the calibration data fit for its purpose? What lies outside the calibrated ranges, and samples that are no help.

Samples are compared by what their inputs look like: mean, standard deviation and quantiles of each. A sample, or a test
input, is far from a set when its nearest neighbour there is much farther away than neighbours usually are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.model.onnxruntime import OrtRunner

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.cutting import Graph
    from pytest_trtcheck.diagnose.statistics import Span

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
    """A quantized tensor, of which test activations lie outside the calibrated range.

    Parameters
    ----------
    tensor, amax
        The tensor, and the largest magnitude of its range.
    share
        The share (0 to 1) of elements outside, over all test inputs.
    max_abs
        The largest magnitude seen.
    worst
        The index of the test input with the largest share.
    """

    tensor: str
    amax: float
    share: float
    max_abs: float
    worst: int


@dataclass(frozen=True)
class Flag:
    """Something wrong with a calibration sample or a test input.

    `index` counts samples or test inputs from 0; None means the data as a whole.
    """

    what: str
    index: int | None
    label: str
    detail: str


# --- ranges ----------------------------------------------------------------------------------------------------------


def outside_ranges(reference: Graph, spans: Mapping[str, Span], cases: Iterable[Case]) -> list[Outside]:
    """How much of each quantized tensor lies outside its range, over all test inputs, the worst tensor first.

    The FP32 model counts by itself; nothing but counts leaves it.
    """
    names = [name for name in spans if name in reference.producers or name in reference.inputs]
    totals = {name: np.zeros(3) for name in names}
    worst: dict[str, tuple[float, int]] = dict.fromkeys(names, (-1.0, 0))
    if not names:
        return []
    path = reference.folder / "audit.onnx"
    path.write_bytes(_counting(reference, {name: spans[name] for name in names}).SerializeToString())
    with closing(OrtRunner(path, "the model, counting what lies outside its ranges")) as runner:
        for index, case in enumerate(cases):
            results = runner(case)
            for name in names:
                count, size = float(results[f"{name}//outside"]), float(results[f"{name}//size"])
                total = totals[name]
                total += (count, size, 0.0)
                total[2] = max(total[2], float(results[f"{name}//peak"]))
                worst[name] = max(worst[name], (count / size if size else 0.0, -index))
    found = [
        Outside(name, spans[name].amax, total[0] / total[1] if total[1] else 0.0, float(total[2]), -worst[name][1])
        for name, total in totals.items()
    ]
    return sorted(found, key=lambda each: -each.share)


def _counting(graph: Graph, spans: Mapping[str, Span]) -> Any:
    """The model with, for each tensor, how many elements lie outside, how many there are, and the largest magnitude."""
    piece = graph.cut(spans, ())
    nodes = [graph.nodes[index] for index in piece.nodes]
    limits, outputs = [], []
    for name, span in spans.items():
        # Half a step beyond the last value still rounds to it.
        high, low = span.high + span.step / 2, span.low - span.step / 2
        for which, value in (("high", high), ("low", low)):
            limits.append(numpy_helper.from_array(np.array(value, np.float32), f"{name}//{which}"))
        nodes += [
            # An input may be of a 16-bit type.
            helper.make_node("Cast", [name], [f"{name}//float"], to=TensorProto.FLOAT),
            helper.make_node("Greater", [f"{name}//float", f"{name}//high"], [f"{name}//above"]),
            helper.make_node("Less", [f"{name}//float", f"{name}//low"], [f"{name}//below"]),
            helper.make_node("Or", [f"{name}//above", f"{name}//below"], [f"{name}//either"]),
            helper.make_node("Cast", [f"{name}//either"], [f"{name}//counted"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", [f"{name}//counted"], [f"{name}//outside"], keepdims=0),
            helper.make_node("Size", [name], [f"{name}//size"]),
            helper.make_node("Abs", [f"{name}//float"], [f"{name}//magnitude"]),
            helper.make_node("ReduceMax", [f"{name}//magnitude"], [f"{name}//peak"], keepdims=0),
        ]
        outputs += [f"{name}//{what}" for what in ("outside", "size", "peak")]
    from pytest_trtcheck.diagnose import cutting

    inputs = [value for value in graph.proto.graph.input if value.name in graph.inputs]
    model = cutting.assemble(graph.proto, nodes, inputs, outputs, [graph])
    model.graph.initializer.extend(limits)
    return model


# --- samples ---------------------------------------------------------------------------------------------------------


def flags(samples: Iterable[Case], describe: Callable[[int], str], cases: Sequence[Case]) -> tuple[int, list[Flag]]:
    """How many calibration samples there are, and what is wrong with them, or with test inputs that are unlike them."""
    found: list[Flag] = []
    features: list[NDArray[np.float64]] = []
    seen: dict[bytes, int] = {}
    for index, sample in enumerate(samples):
        features.append(_features(sample))
        constant = [name for name, array in sample.items() if _is_constant(array)]
        if constant and len(constant) == len(sample):
            value = next(iter(sample.values())).reshape(-1)[0]
            found.append(Flag("constant", index, "", f"every element is {value:g}" if _is_number(value) else ""))
        digest = _digest(sample)
        first = seen.setdefault(digest, index)
        if first != index:
            found.append(Flag("duplicate", index, "", f"the same as sample {first}"))
    found += _far(np.array(features), np.array([_features(case) for case in cases]))
    labelled = [_labelled(flag, describe) for flag in found]
    return len(features), labelled


def _labelled(flag: Flag, describe: Callable[[int], str]) -> Flag:
    if flag.index is None:
        return flag
    label = f"test input {flag.index}" if flag.what == "test input far" else describe(flag.index)
    return Flag(flag.what, flag.index, label, flag.detail)


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
        Flag("test input far", index, "", _distance(to_samples[index], usual, "the nearest calibration sample"))
        for index in far_cases
    ]
    typical = max(float(np.median(to_cases)), _RESOLUTION)
    if len(far_cases) == len(cases) and float(to_cases.min()) > max(_FAR * usual, _APART):
        return [Flag("all far", None, "the calibration data", _means(samples, cases))]
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


def _means(samples: NDArray[np.float64], cases: NDArray[np.float64]) -> str:
    return (
        f"every sample is far from every test input (mean {samples[:, 0].mean():.4g}, standard deviation "
        f"{samples[:, 1].mean():.4g}; test inputs {cases[:, 0].mean():.4g} and {cases[:, 1].mean():.4g})"
    )


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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number))


def _digest(sample: Case) -> bytes:
    total = hashlib.sha256()
    for name, array in sorted(sample.items()):
        total.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.digest()


__all__ = ["OUTSIDE_LIMIT", "Flag", "Outside", "flags", "outside_ranges"]
