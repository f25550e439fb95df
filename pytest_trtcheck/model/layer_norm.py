"""Layer normalization that an exporter wrote in pieces, as the one operator that it is.

TensorRT computes LayerNormalization in FP32 inside, in whatever type the model is, and its pieces one by one in that
type: squares beyond 65504 overflow in FP16, and what is left is 0. With one feature of 1000 among 64 the pieces that
TensorFlow's exporter writes err by 1.0 in FP16, the operator by 4.8e-4 (emulated, both on the same values).

The pieces come in many orders, so they are not told by their pattern but by what they compute: whatever lies between a
ReduceMean and a value of the same shape is run on a few inputs and held against the operator's definition.
"""

from __future__ import annotations

from itertools import dropwhile, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

OPSET = 17
"""The first with the operator."""
_PIECES = frozenset({"Add", "Div", "Identity", "Mul", "Neg", "Pow", "ReduceMean", "Reciprocal", "Sqrt", "Sub"})
_MOST_PIECES = 20
_LARGEST_EPSILON = 0.1
_TOLERANCE = 1e-4
"""As max|a − b| / max|b|: FP32, in another order."""


class _Parameters(NamedTuple):
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    epsilon: float


def join(model: onnx.ModelProto) -> int:
    """Make one LayerNormalization of each that stands in pieces in the main graph, in place; how many there were.

    Parameters
    ----------
    model
        In opset 17 or later, the weights in it. The shape of what is normalized has to be known to ONNX's inference,
        but for the dimensions that are not normalized.
    """
    if next((each.version for each in model.opset_import if each.domain in {"", "ai.onnx"}), 0) < OPSET:
        return 0
    shapes = _shapes(model)
    constants = {each.name: each for each in model.graph.initializer}
    joined = 0
    for mean in [node for node in model.graph.node if node.op_type == "ReduceMean"]:
        axes = _normalized_axes(mean, constants, shapes)
        if not axes:
            continue
        found: tuple[list[onnx.NodeProto], _Parameters] | None = None
        for pieces in _closed(model.graph, mean, constants):
            parameters = _computes_layer_norm(model, pieces, shapes[mean.input[0]], len(axes), constants)
            found = (pieces, parameters) if parameters is not None else found
        if found is not None:
            _replace(model.graph, *found, source=mean.input[0], axes=len(axes))
            joined += 1
    return joined


def _shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape") and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }


def _normalized_axes(
    mean: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], shapes: Mapping[str, list[int | None]]
) -> list[int]:
    """The axes that a mean is taken over, where they are the last ones and of known size; else nothing."""
    shape = shapes.get(mean.input[0], [])
    keeps = next((each.i for each in mean.attribute if each.name == "keepdims"), 1)
    given = constants.get(mean.input[1]) if len(mean.input) > 1 else None
    axes = next((list(each.ints) for each in mean.attribute if each.name == "axes"), None)
    if given is not None:
        axes = numpy_helper.to_array(given).reshape(-1).tolist()
    if not axes or not shape or not keeps:
        return []
    axes = sorted(axis % len(shape) for axis in axes)
    is_last = axes == list(range(len(shape) - len(axes), len(shape))) and len(axes) < len(shape)
    return axes if is_last and all(shape[axis] for axis in axes) else []


def _closed(
    graph: onnx.GraphProto, mean: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> Iterator[list[onnx.NodeProto]]:
    """What is computed from a mean and what it is the mean of, as far as nobody else reads what is on the way."""
    source = mean.input[0]
    outputs = {value.name for value in graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    pieces, names = [mean], {mean.output[0]}
    behind = dropwhile(lambda node: node.output[0] != mean.output[0], list(graph.node))
    for node in islice(behind, 1, None):
        if len(pieces) == _MOST_PIECES:
            return
        known = all(name in names or name == source or name in constants for name in node.input)
        if node.op_type not in _PIECES or not known or not names & set(node.input):
            continue
        pieces.append(node)
        names.add(node.output[0])
        inner = names - {node.output[0]}
        if not inner & outputs and all(each.output[0] in names for name in inner for each in readers.get(name, ())):
            yield list(pieces)


def _computes_layer_norm(
    model: onnx.ModelProto,
    pieces: Sequence[onnx.NodeProto],
    shape: Sequence[int | None],
    axes: int,
    constants: Mapping[str, onnx.TensorProto],
) -> _Parameters | None:
    """The parameters with which the operator computes what the pieces compute; None where there are none."""
    from onnx.reference import ReferenceEvaluator

    read = [
        constants[name] for name in dict.fromkeys(name for node in pieces for name in node.input) if name in constants
    ]
    source = pieces[0].input[0]
    inputs = [helper.make_tensor_value_info(source, onnx.TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info(pieces[-1].output[0], onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph(list(pieces), "pieces", inputs, outputs, read)
    run = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(model.opset_import)))
    inner = [size or 1 for size in shape[-axes:]]
    sizes = (*(2 if axis == 0 else 3 for axis in range(len(shape) - axes)), *inner)

    def computed(x: NDArray[Any]) -> NDArray[np.float64]:
        try:
            with np.errstate(all="ignore"):
                results: Any = run.run(None, {source: x.astype(np.float32)})
        except Exception:
            # A constant that fits other sizes than these: not what is looked for.
            return np.full((), np.nan)
        return np.asarray(results[0], np.float64)

    random = np.random.default_rng(0)
    signs = np.where(np.arange(int(np.prod(inner))) % 2, 1.0, -1.0).reshape(inner) * np.ones(sizes)
    bias, swung = computed(np.zeros(sizes)), computed(signs)
    if bias.shape != sizes or swung.shape != sizes or not np.isfinite(np.stack([bias, swung])).all():
        return None
    arrays = [numpy_helper.to_array(each) for each in read if each.data_type == onnx.TensorProto.FLOAT]
    epsilons = {float(each.reshape(-1)[0]) for each in arrays if each.size == 1}
    for epsilon in sorted(each for each in epsilons if 0 < each < _LARGEST_EPSILON):
        scale = (swung - bias) / _normalized(signs, axes, epsilon)
        tried = [random.standard_normal(sizes) * size for size in (1.0, 30.0, epsilon**0.5, 3 * epsilon**0.5)]
        tried.append(random.standard_normal(sizes) + 2)
        if all(_agree(computed(x), _normalized(x, axes, epsilon) * scale + bias) for x in tried):
            row = (0,) * (len(shape) - axes)
            return _Parameters(_snapped(scale[row], arrays), _snapped(bias[row], arrays), epsilon)
    return None


def _normalized(x: NDArray[Any], axes: int, epsilon: float) -> NDArray[np.float64]:
    """(x − mean) / √(var + ε) over the last axes (Ba, Kiros and Hinton, 2016)."""
    over = tuple(range(-axes, 0))
    x = x.astype(np.float32).astype(np.float64)
    deviation = x - x.mean(over, keepdims=True)
    result: NDArray[np.float64] = deviation / np.sqrt((deviation**2).mean(over, keepdims=True) + epsilon)
    return result


def _agree(actual: NDArray[Any], expected: NDArray[Any]) -> bool:
    largest = float(np.abs(expected).max())
    return bool(np.abs(actual - expected).max() <= _TOLERANCE * max(largest, 1e-30))


def _snapped(found: NDArray[Any], constants: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """What was measured, or the model's own weight that it is but for roundoff."""
    for each in constants:
        if each.size == found.size and np.allclose(each.reshape(found.shape), found, rtol=1e-4, atol=1e-6):
            return np.asarray(each.reshape(found.shape), np.float32)
    rounded = np.round(found)
    return np.asarray(rounded if np.allclose(found, rounded, atol=1e-5) else found, np.float32)


def _replace(
    graph: onnx.GraphProto, pieces: Sequence[onnx.NodeProto], parameters: _Parameters, *, source: str, axes: int
) -> None:
    last = pieces[-1]
    weights = {f"{last.name}/scale": parameters.scale, f"{last.name}/bias": parameters.bias}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    operator = helper.make_node(
        "LayerNormalization", [source, *weights], list(last.output), last.name, axis=-axes, epsilon=parameters.epsilon
    )
    last.CopyFrom(operator)
    for node in pieces[:-1]:
        graph.node.remove(node)
