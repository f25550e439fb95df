"""LSTM, GRU and RNN as the loop that TensorRT makes of them: gates, cell and hidden state are rounded at every step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_trtcheck.precision.rewriting import Steps

INT64 = ir.DataType.INT64


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


def recurrence(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """The outputs of an LSTM, GRU or RNN, spelled out.

    None for what that loop does not know (`layout`, `input_forget`, an activation that is no operator).
    """
    activations = _activations(node)
    if activations is None or any(node.attributes.get_int(name, 0) for name in ("layout", "input_forget")):
        return None
    way = node.attributes.get_string("direction", "forward")
    directions = [False, True] if way == "bidirectional" else [way == "reverse"]
    each = len(activations) // len(directions)
    parts = [
        _one_direction(steps, node, index, backwards, activations[index * each : (index + 1) * each])
        for index, backwards in enumerate(directions)
    ]
    # Y is [steps, directions, batch, hidden], the last states [directions, batch, hidden].
    joined = []
    for kind, axis in zip(range(len(parts[0])), (1, 0, 0), strict=False):
        tensors = [steps.unsqueeze(part[kind], axis) for part in parts]
        joined.append(tensors[0] if len(tensors) == 1 else steps.add("Concat", *tensors, axis=axis))
    return joined


Activation = tuple[str, dict[str, Any]]


def _activations(node: ir.Node) -> list[Activation] | None:
    names = list(_DEFAULT_ACTIVATIONS[node.op_type])
    if node.attributes.get_string("direction", "forward") == "bidirectional":
        names *= 2
    names = list(node.attributes.get_strings("activations", names))
    known = {name.lower(): name for name in _ACTIVATIONS}
    given = {name: list(node.attributes.get_floats(f"activation_{name}", ())) for name in ("alpha", "beta")}
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
    data, weights, recurrent, bias, lengths = (graphs.operand(node, place) for place in range(5))
    number = steps.constant(np.array(index, np.int64), f"direction{index}")
    hidden = node.attributes.get_int("hidden_size", 0)
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
    start = of_direction(graphs.operand(node, 5)) or _zeros(steps, shape)
    body = steps.inside(f"body{index}")
    product, before = body.input("product"), body.input("hidden")
    states = [(before, start)]
    if node.op_type == "LSTM":
        states.append((body.input("cell"), of_direction(graphs.operand(node, 6)) or _zeros(steps, shape)))
    cell = _Cell(body, node, hidden, carried, biases, activations, of_direction(graphs.operand(node, 7)))
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
    column = steps.unsqueeze(lengths, 1, dtype=INT64)
    position = body.input("position", INT64)
    return (position, numbers), body.add("Less", position, column)


def _cut(steps: Steps, value: ir.Value | None, sizes: Sequence[int], axis: int) -> list[ir.Value]:
    ends = list(itertools.accumulate(sizes))
    return [steps.slice(value, (end - size, end), axis) for size, end in zip(sizes, ends, strict=True)]


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
        clip = self.node.attributes.get_float("clip", 0.0)
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
    if cell.node.attributes.get_int("linear_before_reset", 0):
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
