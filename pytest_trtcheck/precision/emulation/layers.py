"""What TensorRT computes inside an operator, spelled out: one node for each of the layers that it makes of it.

A strongly typed network gives every layer's output the type of the tensors that go in, so a 16-bit LogSoftmax is a
16-bit Softmax and the Log of that: its probabilities underflow, whatever the sum of logarithms would have been. Behind
the nodes made here the emulation rounds as it does behind any other. The layers are those of NVIDIA's own ONNX parser
(onnx-tensorrt, `onnxOpImporters.cpp`); docs/how-emulation-works.md says which of them a GPU confirmed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import constants
from pytest_trtcheck.precision.rewriting import Steps, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    Expansion = Callable[[Steps, ir.Node], Sequence[ir.Value] | None]

INT64 = ir.DataType.INT64
_AXES_AS_INPUT = 13
"""The opset from which on Unsqueeze and ReduceSum take their axes as an input."""
OLDEST_OPSET = 11
"""The opset whose operators suffice for what is written here (Clip and Pad with inputs)."""


def spell_out(model: ir.Model, dtypes: Collection[ir.DataType], operators: Collection[str] | None = None) -> ir.Model:
    """Replace, in place, the operators of these types that TensorRT makes several layers of.

    Parameters
    ----------
    dtypes
        The types of the operators' first input that count.
    operators
        Which operators; None: all in `EXPANSIONS`.
    """
    opset = graphs.opset(model)
    for node in list(graphs.all_nodes(model.graph)) if opset >= OLDEST_OPSET else ():
        expansion = EXPANSIONS.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
        data = node.inputs[0] if node.inputs else None
        if expansion is None or data is None or data.dtype not in dtypes or node.graph is None:
            continue
        if operators is not None and node.op_type not in operators:
            continue
        assert data.dtype is not None
        steps = Steps(node, data.dtype, opset)
        results = expansion(steps, node)
        if results is not None:
            replace(node, steps, results)
    return model


def by_definition(model: ir.Model, operators: Collection[str], dtypes: Collection[ir.DataType]) -> set[ir.Node]:
    """Replace, in place, operators of these types by what the ONNX standard defines them to be made of: these nodes."""
    before = set(graphs.all_nodes(model.graph))
    for number, node in enumerate(list(graphs.all_nodes(model.graph))):
        types = [_type_of(value) for value in node.inputs]
        if node.op_type not in operators or node.domain not in {"", "ai.onnx"} or None in types:
            continue
        if node.outputs[0].dtype not in dtypes:
            continue
        # The type hints of onnx do not know all of a schema.
        schema: Any = onnx.defs.get_schema(node.op_type, graphs.opset(model))
        if not schema.has_context_dependent_function:
            continue
        body = onnx.FunctionProto()
        body.ParseFromString(schema.get_context_dependent_function(ir.to_proto(node).SerializeToString(), types))
        # The definition depends on this node's attributes and types: a function for it alone.
        del body.output[len(node.outputs) :]
        if not set(body.output) <= {name for step in body.node for name in step.output}:
            continue
        body.domain, body.name = _DEFINITIONS, f"{node.op_type}_{number}"
        function = ir.serde.deserialize_function(body)
        model.functions[function.identifier()] = function
        node.domain, node.op_type = body.domain, body.name
    if model.functions:
        model.opset_imports.setdefault(_DEFINITIONS, 1)
        passes.InlinePass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        del model.opset_imports[_DEFINITIONS]
        graphs.name_nodes(model)
        graphs.infer_types(model)
    return set(graphs.all_nodes(model.graph)) - before


_DEFINITIONS = "trtcheck.definitions"


def _type_of(value: ir.Value | None) -> bytes | None:
    """The type as a serialized TypeProto; an input that is left out has an empty one, None is an unknown one."""
    if value is None:
        return b""
    if value.dtype is None:
        return None
    shape = None if value.shape is None else [dim if isinstance(dim, int) else None for dim in value.shape]
    return bytes(onnx.helper.make_tensor_type_proto(int(value.dtype), shape).SerializeToString())


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


def _string(node: ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


# --- operators of a few layers ---------------------------------------------------------------------------------------


def _log_softmax(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    attributes: dict[str, Any] = {"axis": node.attributes["axis"].as_int()} if "axis" in node.attributes else {}
    return [steps.add("Log", steps.add("Softmax", node.inputs[0], **attributes))]


def _gemm(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """The product first, then the scaling, then the addition; one layer where there is neither."""
    alpha, beta, addend = _float(node, "alpha", 1.0), _float(node, "beta", 1.0), _input(node, 2)
    if alpha == 1.0 and addend is None:
        return None
    transposed: dict[str, Any] = {name: _int(node, name, 0) for name in ("transA", "transB")}
    result = steps.add("Gemm", node.inputs[0], node.inputs[1], **transposed)
    if alpha != 1.0:
        result = steps.add("Mul", result, steps.scalar(alpha, "alpha"))
    if addend is None:
        return [result]
    if beta != 1.0:
        addend = steps.add("Mul", addend, steps.scalar(beta, "beta"))
    return [steps.add("Add", result, addend)]


def _running_sum(steps: Steps, node: ir.Node) -> ir.Value:
    first, *others = node.inputs
    assert first is not None
    result: ir.Value = first
    for other in others:
        result = steps.add("Add", result, other)
    return result


def _sum(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    return [_running_sum(steps, node)] if len(node.inputs) > 2 else None


def _mean(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """The sum, times a share that TensorRT's parser gets wrong in 16 bits.

    It writes 1/n as an FP32 number into a weight of 16 bits, so that its lower half is what counts: 0 for two inputs,
    −0.0521 for three in FP16 (`onnxOpImporters.cpp`, the importer of Mean; measured on a GPU).
    """
    if len(node.inputs) < 2:
        return None
    share = np.array([1 / len(node.inputs)], "<f4")
    if steps.dtype.itemsize == 2:
        share = share.view("<u2")[:1].view(steps.dtype.numpy())
    return [steps.add("Mul", _running_sum(steps, node), steps.scalar(float(share[0]), "share"))]


def _mod(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """A − b · trunc(a / b), the quotient cut off towards zero."""
    dividend, divisor = node.inputs
    quotient = steps.add("Div", dividend, divisor)
    whole = steps.add(
        "Where",
        steps.add("Less", quotient, steps.scalar(0, "zero"), dtype=ir.DataType.BOOL),
        steps.add("Ceil", quotient),
        steps.add("Floor", quotient),
    )
    return [steps.add("Sub", dividend, steps.add("Mul", divisor, whole))]


def _cum_sum(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """A parallel prefix sum, rounded at each of its log₂(n) steps (Hillis and Steele, 1986).

    A GPU's sums are not these to the bit, but err as much: about 2 units in the last place of the largest.
    """
    axis_tensor, data = constants.constant(node.inputs[1]), node.inputs[0]
    shape = data.shape if data is not None else None
    if axis_tensor is None or data is None or shape is None:
        return None
    axis = int(axis_tensor.numpy().reshape(())) % len(shape)
    length = shape[axis]
    if not isinstance(length, int):
        return None
    backwards, exclusive = (bool(_int(node, name, 0)) for name in ("reverse", "exclusive"))

    def shifted(value: ir.Value, by: int) -> ir.Value:
        """The values `by` places on, zeros in front of them."""
        kept = _sliced(steps, value, (by, length) if backwards else (0, length - by), axis)
        margins = np.zeros((2, len(shape)), np.int64)
        margins[int(backwards), axis] = by
        return steps.add("Pad", kept, steps.constant(margins.reshape(-1), f"margins{by}"))

    total = shifted(data, 1) if exclusive and length > 1 else data
    distance = 1
    while distance < length:
        total = steps.add("Add", total, shifted(total, distance))
        distance *= 2
    return [total] if total is not data else None


def _sliced(steps: Steps, value: ir.Value | None, bounds: tuple[int, int], axis: int) -> ir.Value:
    low, high, along = (steps.constant(np.array([each], np.int64), f"int{each}") for each in (*bounds, axis))
    return steps.add("Slice", value, low, high, along)


def _unsqueezed(steps: Steps, value: ir.Value, axis: int, dtype: ir.DataType | None = None) -> ir.Value:
    if steps.opset < _AXES_AS_INPUT:
        return steps.add("Unsqueeze", value, dtype=dtype, axes=[axis])
    return steps.add("Unsqueeze", value, steps.constant(np.array([axis], np.int64), f"int{axis}"), dtype=dtype)


def _reduced(steps: Steps, node: ir.Node, op_type: str, value: ir.Value) -> ir.Value:
    """`value` reduced over the axes that a reducing node names."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    axes = _input(node, 1)
    if op_type == "ReduceSum" and "axes" in attributes and steps.opset >= _AXES_AS_INPUT:
        # The other reductions take them as an input from opset 18 on.
        axes = steps.constant(np.array(attributes.pop("axes"), np.int64), "axes")
    return steps.add(op_type, value, *([] if axes is None else [axes]), **attributes)


def _reduce_sum_square(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    return [_reduced(steps, node, "ReduceSum", steps.add("Mul", node.inputs[0], node.inputs[0]))]


def _reduce_log_sum(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    data = node.inputs[0]
    assert data is not None
    return [steps.add("Log", _reduced(steps, node, "ReduceSum", data))]


def _reduce_log_sum_exp(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    """Without the shift by the maximum that would keep the powers small."""
    return [steps.add("Log", _reduced(steps, node, "ReduceSum", steps.add("Exp", node.inputs[0])))]


def _lp_normalization(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    data = node.inputs[0]
    along = [_int(node, "axis", -1)]
    if _int(node, "p", 2) == 1:
        norm = _summed(steps, steps.add("Abs", data), along)
    else:
        norm = steps.add("Sqrt", _summed(steps, steps.add("Mul", data, data), along))
    is_zero = steps.add("Equal", norm, steps.scalar(0, "zero"), dtype=ir.DataType.BOOL)
    return [steps.add("Div", data, steps.add("Where", is_zero, steps.scalar(1, "one"), norm))]


def _summed(steps: Steps, value: ir.Value, axes: list[int]) -> ir.Value:
    if steps.opset < _AXES_AS_INPUT:
        return steps.add("ReduceSum", value, axes=axes)
    return steps.add("ReduceSum", value, steps.constant(np.array(axes, np.int64), "axes"))


def _lp_pool(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """The mean of the powers, times their number, and the root of that."""
    order = _int(node, "p", 2)
    if order not in {1, 2} or _int(node, "ceil_mode", 0) or "dilations" in node.attributes:
        return None
    data = node.inputs[0]
    powers = steps.add("Abs", data) if order == 1 else steps.add("Mul", data, data)
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name != "p"}
    mean = steps.add("AveragePool", powers, count_include_pad=1, **attributes)
    count = float(np.prod(node.attributes["kernel_shape"].as_ints()))
    total = steps.add("Mul", mean, steps.scalar(count, "count"))
    return [total if order == 1 else steps.add("Sqrt", total)]


def _global_lp_pool(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    order, data = float(_int(node, "p", 2)), node.inputs[0]
    shape = data.shape if data is not None else None
    if shape is None:
        return None
    powers = steps.add("Pow", data, steps.scalar(order, "order"))
    total = _summed(steps, powers, list(range(2, len(shape))))
    return [steps.add("Pow", total, steps.scalar(1 / order, "root"))]


def _elu(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    """The exponential is rounded before 1 is taken from it: of a small x nothing is left."""
    return [_exponential_unit(steps, node.inputs[0], _float(node, "alpha", 1.0), 1.0)]


def _selu(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    alpha, gamma = _float(node, "alpha", 1.67326319217681884765625), _float(node, "gamma", 1.05070102214813232421875)
    return [_exponential_unit(steps, node.inputs[0], alpha, gamma)]


def _exponential_unit(steps: Steps, data: ir.Value | None, alpha: float, gamma: float) -> ir.Value:
    grown = steps.add("Sub", steps.add("Exp", data), steps.scalar(1, "one"))
    if alpha != 1.0:
        grown = steps.add("Mul", grown, steps.scalar(alpha, "alpha"))
    is_positive = steps.add("Greater", data, steps.scalar(0, "zero"), dtype=ir.DataType.BOOL)
    result = steps.add("Where", is_positive, data, grown)
    return result if gamma == 1.0 else steps.add("Mul", result, steps.scalar(gamma, "gamma"))


def _softsign(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    size = steps.add("Add", steps.add("Abs", node.inputs[0]), steps.scalar(1, "one"))
    return [steps.add("Div", node.inputs[0], size)]


def _gelu(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """X · (1 + erf(x / √2)) · ½ from left to right: beyond half the type's largest number it is infinite."""
    if _string(node, "approximate", "none") != "none":
        return None
    data = node.inputs[0]
    share = steps.add("Erf", steps.add("Mul", data, steps.scalar(0.5**0.5, "root")))
    doubled = steps.add("Mul", data, steps.add("Add", share, steps.scalar(1, "one")))
    return [steps.add("Mul", doubled, steps.scalar(0.5, "half"))]


def _extreme(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """A GPU's maximum of NaN and a number is the number."""
    first, *others = node.inputs
    result = first
    for other in others:
        is_nan = [steps.add("IsNaN", each, dtype=ir.DataType.BOOL) for each in (result, other)]
        usual = steps.add(node.op_type, result, other)
        result = steps.add("Where", is_nan[0], other, steps.add("Where", is_nan[1], result, usual))
    return [result] if result is not None and others else None


def _hard_sigmoid(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    """The line is rounded, then cut off at 0 and 1; NaN becomes 0."""
    line = steps.add("Mul", node.inputs[0], steps.scalar(_float(node, "alpha", 0.2), "alpha"))
    line = steps.add("Add", line, steps.scalar(_float(node, "beta", 0.5), "beta"))
    zero, one = steps.scalar(0, "zero"), steps.scalar(1, "one")
    is_nan = steps.add("IsNaN", line, dtype=ir.DataType.BOOL)
    return [steps.add("Where", is_nan, zero, steps.add("Clip", line, zero, one))]


def _trilu(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """Without the attribute, ONNX means the upper triangle and TensorRT's parser the lower one."""
    if "upper" in node.attributes:
        return None
    return [steps.add("Trilu", *node.inputs, upper=0)]


def _zeros(steps: Steps, shape: ir.Value) -> ir.Value:
    zero = ir.Tensor(np.zeros(1, steps.dtype.numpy()), dtype=steps.dtype)
    return steps.add("ConstantOfShape", shape, value=zero)


def _scan(
    steps: Steps,
    body: Steps,
    *,
    states: Sequence[tuple[ir.Value, ir.Value, ir.Value]],
    scanned: Sequence[tuple[ir.Value, ir.Value | None]],
    outputs: Sequence[ir.Value],
    backwards: bool = False,
) -> Sequence[ir.Value]:
    """A Scan over the first axis; its results are the last states, then what was collected.

    Parameters
    ----------
    states
        Before a step, after it, and at the start.
    scanned
        The element inside the body and the tensor that it is taken from.
    outputs
        What the body makes for each element.
    """
    graph = ir.Graph(
        inputs=[*(before for before, _, _ in states), *(element for element, _ in scanned)],
        outputs=[*(after for _, after, _ in states), *outputs],
        nodes=body.nodes,
        name=f"{steps.node.name}/body",
    )
    count, direction = len(scanned), int(backwards)
    attributes = {
        "body": graph,
        "num_scan_inputs": count,
        "scan_input_directions": [direction] * count,
        "scan_output_directions": [direction] * len(outputs),
    }
    operands = [*(start for _, _, start in states), *(tensor for _, tensor in scanned)]
    return steps.add_many("Scan", operands, [None] * (len(states) + len(outputs)), attributes)


# --- recurrences -----------------------------------------------------------------------------------------------------

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS: dict[str, dict[str, float]] = {
    "Relu": {},
    "Tanh": {},
    "Sigmoid": {},
    "Softsign": {},
    "Softplus": {},
    "LeakyRelu": {"alpha": 0.01},
    "ThresholdedRelu": {"alpha": 1.0},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Elu": {"alpha": 1.0},
}
"""The activations of a recurrence that are operators of their own, with the parameters that ONNX gives them."""
_DEFAULT_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def _recurrence(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """LSTM, GRU and RNN as the loop that TensorRT makes: gates, cell and hidden state are rounded at every step.

    None for what that loop does not know (`layout`, `input_forget`, an activation that is no operator).
    """
    activations = _activations(node)
    if activations is None or _int(node, "layout", 0) or _int(node, "input_forget", 0):
        return None
    way = _string(node, "direction", "forward")
    directions = [False, True] if way == "bidirectional" else [way == "reverse"]
    each = len(activations) // len(directions)
    parts = [
        _one_direction(steps, node, index, backwards, activations[index * each : (index + 1) * each])
        for index, backwards in enumerate(directions)
    ]
    # Y is [steps, directions, batch, hidden], the last states [directions, batch, hidden].
    joined = []
    for kind, axis in zip(range(len(parts[0])), (1, 0, 0), strict=False):
        tensors = [_unsqueezed(steps, part[kind], axis) for part in parts]
        joined.append(tensors[0] if len(tensors) == 1 else steps.add("Concat", *tensors, axis=axis))
    return joined


Activation = tuple[str, dict[str, Any]]


def _activations(node: ir.Node) -> list[Activation] | None:
    names = list(_DEFAULT_ACTIVATIONS[node.op_type])
    if _string(node, "direction", "forward") == "bidirectional":
        names *= 2
    if "activations" in node.attributes:
        names = list(node.attributes["activations"].as_strings())
    known = {name.lower(): name for name in _ACTIVATIONS}
    given = {
        name: list(node.attributes[f"activation_{name}"].as_floats()) if f"activation_{name}" in node.attributes else []
        for name in ("alpha", "beta")
    }
    found: list[Activation] = []
    for name in names:
        if name.lower() not in known:
            return None
        defaults = _ACTIVATIONS[known[name.lower()]]
        # ONNX hands the parameters out in order, to those activations that take them.
        found.append((known[name.lower()], {k: given[k].pop(0) if given[k] else v for k, v in defaults.items()}))
    return found


def _one_direction(
    steps: Steps, node: ir.Node, index: int, backwards: bool, activations: Sequence[Activation]
) -> Sequence[ir.Value]:
    """Y [steps, batch, hidden], then the last hidden state and an LSTM's last cell state, [batch, hidden]."""
    data, weights, recurrent, bias, lengths = (_input(node, place) for place in range(5))
    number = steps.constant(np.array(index, np.int64), f"direction{index}")
    hidden = _int(node, "hidden_size", 0)
    gates = _GATES[node.op_type]

    def of_direction(value: ir.Value | None) -> ir.Value | None:
        return None if value is None else steps.add("Gather", value, number, axis=0)

    def transposed(value: ir.Value | None) -> ir.Value:
        return steps.add("Transpose", of_direction(value), perm=[1, 0])

    own, carried = transposed(weights), transposed(recurrent)
    both = of_direction(bias)
    biases = _cut(steps, both, [gates * hidden] * 2, 0) if both is not None else None
    # A sequence with lengths of its own is turned within its length; one without, by the loop.
    if lengths is not None:
        lengths = steps.add("Cast", lengths, dtype=INT64, to=int(INT64))
        if backwards:
            data = steps.add("ReverseSequence", data, lengths, batch_axis=1, time_axis=0)
    products = steps.add("MatMul", data, own)
    one_row = steps.add("Gather", products, steps.constant(np.array(0, np.int64), "first"), axis=0)
    row = _cut(steps, one_row, [hidden] * gates, 1)[0] if gates > 1 else one_row
    shape = steps.add("Shape", row, dtype=INT64)
    start = of_direction(_input(node, 5)) or _zeros(steps, shape)
    body = steps.inside(f"body{index}")
    product, before = body.input("product"), body.input("hidden")
    states = [(before, start)]
    if node.op_type == "LSTM":
        states.append((body.input("cell"), of_direction(_input(node, 6)) or _zeros(steps, shape)))
    cell = _Cell(body, node, hidden, carried, biases, activations, of_direction(_input(node, 7)))
    after = list(_CELLS[node.op_type](cell, product, *(state for state, _ in states)))
    scanned: list[tuple[ir.Value, ir.Value | None]] = [(product, products)]
    output = body.add("Identity", after[0])
    if lengths is not None:
        position, running = _running(steps, body, products, lengths)
        scanned.append(position)
        output = body.add("Where", running, after[0], body.scalar(0, "none"))
        after = [body.add("Where", running, new, old) for new, (old, _) in zip(after, states, strict=True)]
    for value in (*after, output):
        # ONNX Runtime asks for the rank at least.
        value.shape = ir.Shape([None, hidden])
    results = _scan(
        steps,
        body,
        states=[(old, new, begin) for (old, begin), new in zip(states, after, strict=True)],
        scanned=scanned,
        outputs=[output],
        backwards=backwards and lengths is None,
    )
    *last, collected = results
    if lengths is not None and backwards:
        collected = steps.add("ReverseSequence", collected, lengths, batch_axis=1, time_axis=0)
    return [collected, *last]


def _running(
    steps: Steps, body: Steps, products: ir.Value, lengths: ir.Value
) -> tuple[tuple[ir.Value, ir.Value], ir.Value]:
    """The number of the step, to be scanned, and whether each row's sequence still runs there: [batch, 1]."""
    zero, one = (steps.constant(np.array(number, np.int64), f"number{number}") for number in (0, 1))
    length = steps.add("Gather", steps.add("Shape", products, dtype=INT64), zero, dtype=INT64, axis=0)
    numbers = steps.add("Range", zero, length, one, dtype=INT64)
    column = _unsqueezed(steps, lengths, 1, dtype=INT64)
    position = body.input("position", INT64)
    return (position, numbers), body.add("Less", position, column, dtype=ir.DataType.BOOL)


def _cut(steps: Steps, value: ir.Value | None, sizes: Sequence[int], axis: int) -> list[ir.Value]:
    ends = list(itertools.accumulate(sizes))
    return [_sliced(steps, value, (end - size, end), axis) for size, end in zip(sizes, ends, strict=True)]


@dataclass(frozen=True)
class _Cell:
    """One step of a recurrence: what its formulas share.

    Parameters
    ----------
    body, node
        The steps of the loop's body, and the node that is spelled out.
    hidden
        The size of the hidden state.
    carried
        The weights that the hidden state is multiplied by, [hidden, gates · hidden].
    biases
        Those of the input and of the hidden state; None: none.
    activations
        f, g and h of ONNX's formulas.
    peephole
        The weights of an LSTM's peepholes, [3 · hidden].
    """

    body: Steps
    node: ir.Node
    hidden: int
    carried: ir.Value
    biases: Sequence[ir.Value] | None
    activations: Sequence[Activation]
    peephole: ir.Value | None

    def activate(self, which: int, value: ir.Value, *, clipped: bool = True) -> ir.Value:
        """f, g or h of the formulas, the clip before it."""
        clip = _float(self.node, "clip", 0.0)
        if clipped and clip > 0:
            limits = [self.body.scalar(sign * clip, f"clip{sign}") for sign in (-1, 1)]
            value = self.body.add("Clip", value, *limits)
        name, parameters = self.activations[which]
        return self.body.add(name, value, **parameters)

    def gates(self, value: ir.Value) -> list[ir.Value]:
        """The gates that lie side by side in `value`."""
        return _cut(self.body, value, [self.hidden] * _GATES[self.node.op_type], 1)

    def peeped(self, gate: ir.Value, cell: ir.Value, place: int) -> ir.Value:
        """The gate that sees the cell state as well, where the node has peepholes."""
        if self.peephole is None:
            return gate
        weights = _cut(self.body, self.peephole, [self.hidden] * 3, 0)[place]
        return self.body.add("Add", gate, self.body.add("Mul", weights, cell))


def _lstm(cell: _Cell, product: ir.Value, before: ir.Value, memory: ir.Value) -> Sequence[ir.Value]:
    """TensorRT adds up both biases first, as one layer."""
    body = cell.body
    total = body.add("Add", product, body.add("MatMul", before, cell.carried))
    if cell.biases is not None:
        total = body.add("Add", total, body.add("Add", *cell.biases))
    enter, leave, forget, new = cell.gates(total)
    enter = cell.activate(0, cell.peeped(enter, memory, 0))
    forget = cell.activate(0, cell.peeped(forget, memory, 2))
    new = cell.activate(1, new)
    memory = body.add("Add", body.add("Mul", forget, memory), body.add("Mul", enter, new))
    leave = cell.activate(0, cell.peeped(leave, memory, 1))
    # TensorRT clips the cell state here as well, ONNX Runtime, whose outputs are the reference, does not.
    return body.add("Mul", leave, cell.activate(2, memory, clipped=False)), memory


def _gru(cell: _Cell, product: ir.Value, before: ir.Value) -> Sequence[ir.Value]:
    """The update and the reset gate take their two biases one after the other; the new state its sum, or each apart."""
    body, hidden = cell.body, cell.hidden
    update, reset, own = cell.gates(product)
    both = body.add("Concat", update, reset, axis=1)
    carried_gates, carried_new = _cut(body, cell.carried, [2 * hidden, hidden], 1)
    both = body.add("Add", both, body.add("MatMul", before, carried_gates))
    parts = [_cut(body, bias, [2 * hidden, hidden], 0) for bias in cell.biases or ()]
    for gates_bias, _ in parts:
        both = body.add("Add", both, gates_bias)
    update, reset = _cut(body, cell.activate(0, both), [hidden] * 2, 1)
    if _int(cell.node, "linear_before_reset", 0):
        carried = body.add("MatMul", before, carried_new)
        if parts:
            carried = body.add("Add", carried, parts[1][1])
        carried = body.add("Mul", reset, carried)
        if parts:
            carried = body.add("Add", carried, parts[0][1])
        new = body.add("Add", own, carried)
    else:
        new = body.add("Add", own, body.add("MatMul", body.add("Mul", reset, before), carried_new))
        if parts:
            new = body.add("Add", new, body.add("Add", parts[1][1], parts[0][1]))
    new = cell.activate(1, new)
    rest = body.add("Mul", body.add("Sub", body.scalar(1, "one"), update), new)
    return [body.add("Add", rest, body.add("Mul", update, before))]


def _rnn(cell: _Cell, product: ir.Value, before: ir.Value) -> Sequence[ir.Value]:
    body = cell.body
    total = body.add("Add", product, body.add("MatMul", before, cell.carried))
    if cell.biases is not None:
        total = body.add("Add", total, body.add("Add", *cell.biases))
    return [cell.activate(0, total)]


_CELLS: dict[str, Callable[..., Sequence[ir.Value]]] = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}

RECURRENCES = frozenset(_CELLS)
EXPANSIONS: dict[str, Expansion] = {
    "CumSum": _cum_sum,
    "Elu": _elu,
    "GRU": _recurrence,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalLpPool": _global_lp_pool,
    "HardSigmoid": _hard_sigmoid,
    "LSTM": _recurrence,
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization,
    "LpPool": _lp_pool,
    "Max": _extreme,
    "Mean": _mean,
    "Min": _extreme,
    "Mod": _mod,
    "RNN": _recurrence,
    "ReduceLogSum": _reduce_log_sum,
    "ReduceLogSumExp": _reduce_log_sum_exp,
    "ReduceSumSquare": _reduce_sum_square,
    "Selu": _selu,
    "Softsign": _softsign,
    "Sum": _sum,
    "Trilu": _trilu,
}
"""By operator, the layers that TensorRT makes of it; None where it is one layer after all."""
