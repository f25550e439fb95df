"""The error of every tensor along the graph, and what each operator adds to it, in little memory.

One run measures all of it (`measuring`): no tensor leaves the model, and none is kept longer than until it is measured.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.diagnose import per_operator
from pytest_trtcheck.diagnose.measuring import FLOATS, Measuring
from pytest_trtcheck.diagnose.statistics import Difference, Fit, difference, is_float
from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.ort_runner import OrtRunner

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair

SUMS = frozenset(["Add", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "ReduceMean", "ReduceSum", "Sub", "Sum"])
"""Operators whose result can be small because large operands cancel."""
MAX_BYTES = 64 << 20
INPUT = "Input"
"""Stands for the operator of a model's input."""
_LEAST_OF_CHANNEL = 16
"""Elements of a channel, of which one is always close to 0: fewer tell nothing."""
_MOST_EXACT = 64
"""Tensors that are measured a second time, in FP64."""

_Figures = dict[str, dict[str, "NDArray[Any]"]]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the FP32 model, and what became of it in the lowered one.

    Parameters
    ----------
    name, node, op_type
        The tensor, and the node that computes it; of a node in a body that was unrolled, the name before that.
    error
        The emulated tensor against the FP32 model's.
    own
        What its operator loses by itself, run, lowered, on the FP32 model's values: the relative L2 error, or that by
        channel where it is larger. Infinite where an element is not finite.
    parts
        Once it was taken apart: the same with only its activations, only its weights or only its result lowered.
    fit
        How the FP32 model's tensor fits the type or range that the lowered model holds it in.
    inputs
        The tensors that the operator reads, those that are compared too.
    """

    name: str
    node: str
    op_type: str
    error: Difference
    own: float
    parts: Mapping[str, float] | None
    fit: Fit
    inputs: tuple[str, ...]


def trace(pair: Pair, case: Mapping[str, NDArray[Any]]) -> list[Tensor]:
    """Compare every tensor that both models have, for one input.

    Returns
    -------
    list of Tensor
        The inputs that hold floats, then the computed tensors in the order of the FP32 graph. Of integers and booleans
        those alone that differ.

    Raises
    ------
    ModelError
        ONNX Runtime cannot run the model with what measures it.
    """
    inputs = [name for name in pair.reference.inputs if is_float(np.asarray(case[name]))]
    figures = _measured(pair, [*inputs, *pair.common], case, exact=False)
    found = [_input(pair, name, figures[name]) for name in inputs]
    found += [_tensor(pair, name, figures[name]) for name in pair.common if figures.get(name)]
    # The FP32 tensor is itself not finite, or too large for sums of squares in FP32.
    again = [each.name for each in found if each.error.unequal is None and not math.isfinite(each.error.rr)]
    if again:
        exact = _measured(pair, again[:_MOST_EXACT], case, exact=True)
        found = [_exact(each, exact[each.name]) if each.name in exact else each for each in found]
    return [each for each in found if each.error.unequal is None or each.error.unequal]


def _measured(pair: Pair, tensors: Iterable[str], case: Mapping[str, NDArray[Any]], *, exact: bool) -> _Figures:
    model, results = Measuring(pair, tensors).build(exact=exact)
    path = pieces.write(model, pair.reference.folder, "measuring")
    with closing(OrtRunner(path, "the model with what measures it", in_order=True)) as runner:
        values = runner({name: case[name] for name in pair.reference.inputs})
    return {
        tensor: {"size": np.asarray(pair.reference.static_size(tensor))}
        | {each: values[n] for each, n in names.items()}
        for tensor, names in results.items()
        if names
    }


def _input(pair: Pair, name: str, figures: Mapping[str, NDArray[Any]]) -> Tensor:
    error = Difference(int(figures["size"]), peak=_peak(figures))
    return Tensor(name, "", INPUT, error, 0.0, None, _fit(pair, name, figures), ())


def _tensor(pair: Pair, name: str, figures: Mapping[str, NDArray[Any]]) -> Tensor:
    node = pair.node_of(name)
    size = int(figures["size"])
    known = dict.fromkeys(each for each in pieces.reads(node) if each in pair.known or each in pair.reference.inputs)
    if pair.reference.element_type(name) in FLOATS:
        dd, rr = float(figures["dd"]), float(figures["rr"])
        largest = max(float(figures["error_high"]), -float(figures["error_low"])) if size else 0.0
        spoiled = size > 0 and math.isfinite(rr) and not math.isfinite(dd)
        error = Difference(size, _peak(figures), largest, dd, rr, nonfinite=size if spoiled else 0)
        own = _own(figures, error)
    else:
        error = Difference(size, unequal=size - int(figures["equal"]))
        own = 1 - float(figures["own_equal"]) / size if size else 0.0
    fit = _fit(pair, name, figures)
    return Tensor(name, pair.owner(node.name), node.op_type, error, own, None, fit, tuple(known))


def _peak(figures: Mapping[str, NDArray[Any]]) -> float:
    return max(float(figures["high"]), -float(figures["low"])) if int(figures["size"]) else 0.0


def _own(figures: Mapping[str, NDArray[Any]], error: Difference) -> float:
    dd = np.asarray(figures["own_dd"], np.float64)
    if not np.isfinite(dd).all():
        return math.inf
    found = math.sqrt(dd.sum() / error.rr) if error.rr else (math.inf if dd.sum() else 0.0)
    return max(found, _by_channel(dd, figures.get("own_rr"), error.size))


def _by_channel(dd: NDArray[np.float64], squares: NDArray[Any] | None, size: int) -> float:
    """The relative L2 error of each channel, 1 at the most, as a root mean square over the channels.

    A channel that is small beside others counts as much as they do: what reads it may well scale it up again. Channels
    that are zero throughout are left out.
    """
    if squares is None or size < _LEAST_OF_CHANNEL * dd.size:
        return 0.0
    rr = np.asarray(squares, np.float64)
    used = (rr > 0) & np.isfinite(rr)
    lost = np.minimum(dd[used] / rr[used], 1.0)
    return float(np.sqrt(lost.mean())) if lost.size else 0.0


def _fit(pair: Pair, name: str, figures: Mapping[str, NDArray[Any]]) -> Fit:
    """From the sample, which of a small tensor is all of it; that something overflows is known of large ones too."""
    held, span = pair.held.get(name), pair.spans.get(name)
    size = int(figures["size"])
    outside = float(figures["outside"]) / size if span is not None and size else None
    noise = span.noise(size, float(figures["squares"])) if span is not None else 0.0
    clipped = math.sqrt(float(figures["clipped_dd"]) / noise) if noise else 0.0
    sample = np.abs(np.asarray(figures.get("sample", ()), np.float64))
    if not sample.size:
        return Fit(saturated=outside, clipped=clipped)
    overflow = 0
    if held is not None and _peak(figures) >= held.beyond:
        overflow = max(1, round(size * float(np.mean((sample >= held.beyond) & np.isfinite(sample)))))
    nonzero = sample[sample > 0]
    # Round to nearest even: exactly half of the smallest becomes 0.
    half = held.smallest / 2 if held else span.step / 2 if span else 0.0
    flushed = float(np.mean(nonzero <= half)) if nonzero.size else 0.0
    tiny = float(np.mean(nonzero < held.smallest_normal)) if held and nonzero.size else flushed
    return Fit(overflow, tiny, flushed, outside, clipped)


def _exact(tensor: Tensor, figures: Mapping[str, NDArray[Any]]) -> Tensor:
    def against(prefix: str) -> Difference:
        dd, rr, largest, nonfinite = (float(figures[prefix + what]) for what in ("dd", "rr", "error", "nonfinite"))
        return Difference(tensor.error.size, float(figures["peak"]), largest, dd, rr, int(nonfinite))

    # By channel nothing was summed up a second time.
    own = max(against("own_").l2, tensor.own if math.isfinite(tensor.own) else 0.0)
    return replace(tensor, error=against(""), own=own)


def take_apart(pair: Pair, tensors: Sequence[Tensor], case: Mapping[str, NDArray[Any]]) -> list[Tensor]:
    """As many of them, in order, as fit into MAX_BYTES, with `parts` and exact counts of what overflows."""
    room = MAX_BYTES
    chosen: list[Tensor] = []
    for tensor in tensors:
        if not tensor.node or not per_operator.can_be_taken_apart(pair, tensor.name):
            continue
        room -= 4 * (len(per_operator.PARTS) + 1 + len(tensor.inputs)) * tensor.error.size
        if chosen and room < 0:
            break
        chosen.append(tensor)
    if not chosen:
        return []
    names = [tensor.name for tensor in chosen]
    needed = dict.fromkeys(name for tensor in names for name in (tensor, *per_operator.boundary(pair, tensor)))
    values = {**case, **pair.reference.values([name for name in needed if name in pair.known], case)}
    results = per_operator.in_parts(pair, names, values)
    found = []
    for tensor in chosen:
        exact, axis = values[tensor.name], pair.channel_axis(tensor.name)
        parts = {part: loss(by_tensor[tensor.name], exact, axis) for part, by_tensor in results.items()}
        held, fit = pair.held.get(tensor.name), tensor.fit
        if held is not None and fit.overflow:
            fit = replace(fit, overflow=int(np.count_nonzero((np.abs(exact) >= held.beyond) & np.isfinite(exact))))
        found.append(replace(tensor, parts=parts, fit=fit))
    return found


def loss(actual: NDArray[Any], reference: NDArray[Any], axis: int | None) -> float:
    """As `Tensor.own` counts it, by channel too where they lie along `axis`."""
    whole = difference(actual, reference).l2
    return whole if axis is None or not math.isfinite(whole) else max(whole, channel_loss(actual, reference, axis))


def channel_loss(actual: NDArray[Any], reference: NDArray[Any], axis: int) -> float:
    """As `Tensor.own` counts it by channel."""
    others = tuple(each for each in range(reference.ndim) if each != axis % reference.ndim)
    exact = reference.astype(np.float64)
    dd, rr = (np.square(each).sum(axis=others) for each in (actual.astype(np.float64) - exact, exact))
    return _by_channel(dd, rr, reference.size)
