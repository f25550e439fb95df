"""`Calibration(method="auto")`: the method whose quantized model errs least on samples that its ranges did not see.

The samples are dealt into folds. Each method's ranges are chosen from all folds but one, the quantized model is
emulated on that one's samples, and its outputs are held against those of the FP32 model. The error of an output is its
relative L2 error, that of its worst part where the graph divides it, as in a check: of a few samples, the largest
single error (`max`) says more about luck than about ranges. A method counts by its worst output, since a check fails by
that one; of those that err alike, the one that clips least is taken. What is not quantized computes in FP32 here,
whatever the precision: all methods lose the same by it.

With the method found, the final ranges are chosen from all samples: more data tell more, and the error measured with
less is, if anything, too large.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.compare import Division
from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision.emulation import rewrite
from pytest_trtcheck.precision.quantization import quantize
from pytest_trtcheck.precision.quantization.calibrate import Choice, Method, Ranges, collect_each
from pytest_trtcheck.spec import Tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import QuantizedName
    from pytest_trtcheck.compare import Limits
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.quantization.calibrate import Collected, Task
    from pytest_trtcheck.record import JudgedRecord

METHODS = (
    Method("minmax"),
    Method("mse"),
    Method("percentile", 99.999),
    Method("percentile", 99.99),
    Method("percentile", 99.9),
)
"""Of those that err the same the first is taken: what clips less comes first, since other inputs may hold larger values
than the samples. `entropy` takes longer than all of these together and was rarely the best."""
FOLDS = 4
MOST_HELD_OUT = 8
"""Samples that each method is judged on: the cost does not grow with the data beyond that."""
_DIGITS = 3
_EXERCISED = 0.05
"""Scores below this share of their scale tell nothing, as in a check of an 8-bit precision."""


def choose(task: Task, model: OnnxModel) -> Ranges:
    """Ranges by the best of `METHODS`, with what each was worth.

    Of one sample nothing can be held out, and of a model whose outputs tell nothing (there is none that is numeric and
    not zero throughout) there is no error: `minmax` it is then, as the `choice` tells.

    Parameters
    ----------
    model
        The user's model: its outputs, and how they are divided.

    Raises
    ------
    CalibrationError
        As `calibrate.collect`.
    """
    found = collect_each(task, METHODS, FOLDS)
    errors: Mapping[Method, Mapping[str, float]] = {}
    held_out = sorted({index * found.samples // MOST_HELD_OUT for index in range(MOST_HELD_OUT)})
    if found.samples > 1:
        errors = _errors(task, model, found, held_out)
    worst = {method: max(errors.get(method, {}).values(), default=0.0) for method in METHODS}
    best = min(METHODS, key=lambda method: worst[method])
    shown = {
        str(method): {name: error if math.isfinite(error) else None for name, error in each.items()}
        for method, each in errors.items()
    }
    choice = Choice(len(held_out) if any(shown.values()) else 0, shown)
    return Ranges(best.name, best.percentile, found.samples, found.whole[best], choice, found.rows)


def _limits(model: OnnxModel, dtype: QuantizedName) -> Limits:
    divisions = {name: Division(parts) for name, parts in model.parts}
    names = [output.name for output in model.outputs]
    return compare.resolve_limits(Tolerance(l2=_EXERCISED), "l2", dtype, names, known=divisions)


def _errors(task: Task, model: OnnxModel, found: Collected, held_out: Sequence[int]) -> dict[Method, dict[str, float]]:
    """Each output's error by each method: the root of its mean square over the samples held out."""
    squares: dict[Method, dict[str, list[float]]] = {method: defaultdict(list) for method in METHODS}
    limits = _limits(model, task.dtype)
    with scratch_folder("trial") as folder:
        path = Path(folder, "emulated.onnx")
        scales = _write_with_scales(task, model, found, path)
        with closing(task.make_runner(task.model_path)) as reference, closing(task.make_runner(path)) as emulated:
            for index, sample in enumerate(task.samples):
                if index not in held_out:
                    continue
                expected = reference(sample)
                for method, ranges in found.without[index % FOLDS].items():
                    fed = {
                        scales[tensor]: np.asarray(quantize.scale_of(each.amax, task.dtype))
                        for tensor, each in ranges.items()
                    }
                    for name, error in _judged(emulated({**sample, **fed}), expected, limits):
                        squares[method][name].append(error**2)
    return {
        method: {name: float(f"{math.sqrt(sum(each) / len(each)):.{_DIGITS}g}") for name, each in by_output.items()}
        for method, by_output in squares.items()
    }


def _judged(
    actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], limits: Limits
) -> list[tuple[str, float]]:
    """The error of each output that tells something; infinite where it is not finite, or of another shape."""
    found = []
    for output in compare.judge_all(actual, expected, limits):
        judged = [entry for entry in output.judged if entry.verdict != "not_measured"]
        if judged and not output.details.uncompared:
            found.append((output.name, max(map(_value, judged))))
    return found


def _value(entry: JudgedRecord) -> float:
    is_finite = entry.value is not None and (entry.metric != "nonfinite" or not entry.value)
    return entry.value if is_finite and entry.value is not None else math.inf


def _write_with_scales(task: Task, model: OnnxModel, found: Collected, path: Path) -> dict[str, str]:
    """Write the emulation of the quantized model, whose scales are inputs; their names by tensor.

    So one session serves all methods and folds.
    """
    amax = {name: each.amax for name, each in found.whole[METHODS[0]].items()}
    quantized = quantize.quantize(quantize.read(model, task.model_path), task.plan, amax, task.dtype)
    scales = {}
    for node in quantized.graph:
        tensor, scale = (*node.inputs, None, None)[:2]
        if node.op_type == "QuantizeLinear" and tensor is not None and scale is not None and tensor.name in amax:
            scales[tensor.name] = scale.name or ""
            quantized.graph.inputs.append(scale)
    graphs.write(rewrite.emulated(quantized), path)
    return scales
