"""What TensorRT computes inside an operator, spelled out: one node for each of the layers that it makes of it.

A strongly typed network gives every layer's output the type of the tensors that go in, so a 16-bit LogSoftmax is a
16-bit Softmax and the Log of that: its probabilities underflow, whatever the sum of logarithms would have been. Behind
the nodes made here the emulation rounds as it does behind any other. The layers are those of NVIDIA's own ONNX parser
(onnx-tensorrt, `onnxOpImporters.cpp`); docs/how-emulation-works.md says which of them a GPU confirmed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import constants
from pytest_trtcheck.precision.emulation.recurrences import recurrence
from pytest_trtcheck.precision.rewriting import AXES_AS_INPUT, Steps, replace, values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    Expansion = Callable[[Steps, ir.Node], Sequence[ir.Value] | None]

OLDEST_OPSET = 11
"""The opset whose operators suffice for what is written here (Clip and Pad with inputs): a model is raised to it."""


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
    for node in list(graphs.all_nodes(model.graph)):
        expansion = EXPANSIONS.get(node.op_type) if node.domain in graphs.ONNX_DOMAINS else None
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
        if node.op_type not in operators or node.domain not in graphs.ONNX_DOMAINS or None in types:
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


# --- operators of a few layers ---------------------------------------------------------------------------------------


def _log_softmax(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    return [steps.add("Log", steps.add("Softmax", node.inputs[0], **values_of(node)))]


def _gemm(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """The product first, then the scaling, then the addition; one layer where there is neither."""
    alpha, beta, addend = (
        node.attributes.get_float("alpha", 1.0),
        node.attributes.get_float("beta", 1.0),
        graphs.operand(node, 2),
    )
    if alpha == 1.0 and addend is None:
        return None
    transposed: dict[str, Any] = {name: node.attributes.get_int(name, 0) for name in ("transA", "transB")}
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
        steps.add("Less", quotient, steps.scalar(0, "zero")),
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
    backwards, exclusive = (bool(node.attributes.get_int(name, 0)) for name in ("reverse", "exclusive"))

    def shifted(value: ir.Value, by: int) -> ir.Value:
        """The values `by` places on, zeros in front of them."""
        kept = steps.slice(value, (by, length) if backwards else (0, length - by), axis)
        margins = np.zeros((2, len(shape)), np.int64)
        margins[int(backwards), axis] = by
        return steps.add("Pad", kept, steps.constant(margins.reshape(-1), f"margins{by}"))

    total = shifted(data, 1) if exclusive and length > 1 else data
    distance = 1
    while distance < length:
        total = steps.add("Add", total, shifted(total, distance))
        distance *= 2
    return [total] if total is not data else None


def _reduced(steps: Steps, node: ir.Node, op_type: str, value: ir.Value) -> ir.Value:
    """`value` reduced over the axes that a reducing node names."""
    attributes = values_of(node)
    axes = graphs.operand(node, 1)
    if op_type == "ReduceSum" and "axes" in attributes and steps.opset >= AXES_AS_INPUT:
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
    along = [node.attributes.get_int("axis", -1)]
    if node.attributes.get_int("p", 2) == 1:
        norm = _summed(steps, steps.add("Abs", data), along)
    else:
        norm = steps.add("Sqrt", _summed(steps, steps.add("Mul", data, data), along))
    is_zero = steps.add("Equal", norm, steps.scalar(0, "zero"))
    return [steps.add("Div", data, steps.add("Where", is_zero, steps.scalar(1, "one"), norm))]


def _summed(steps: Steps, value: ir.Value, axes: list[int]) -> ir.Value:
    if steps.opset < AXES_AS_INPUT:
        return steps.add("ReduceSum", value, axes=axes)
    return steps.add("ReduceSum", value, steps.constant(np.array(axes, np.int64), "axes"))


def _lp_pool(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """The mean of the powers, times their number, and the root of that."""
    order = node.attributes.get_int("p", 2)
    if order not in {1, 2} or node.attributes.get_int("ceil_mode", 0) != 0 or "dilations" in node.attributes:
        return None
    data = node.inputs[0]
    powers = steps.add("Abs", data) if order == 1 else steps.add("Mul", data, data)
    attributes = values_of(node)
    attributes.pop("p", None)
    mean = steps.add("AveragePool", powers, count_include_pad=1, **attributes)
    count = float(np.prod(node.attributes["kernel_shape"].as_ints()))
    total = steps.add("Mul", mean, steps.scalar(count, "count"))
    return [total if order == 1 else steps.add("Sqrt", total)]


def _global_lp_pool(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    order, data = float(node.attributes.get_int("p", 2)), node.inputs[0]
    shape = data.shape if data is not None else None
    if shape is None:
        return None
    powers = steps.add("Pow", data, steps.scalar(order, "order"))
    total = _summed(steps, powers, list(range(2, len(shape))))
    return [steps.add("Pow", total, steps.scalar(1 / order, "root"))]


def _elu(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    """The exponential is rounded before 1 is taken from it: of a small x nothing is left."""
    return [_exponential_unit(steps, node.inputs[0], node.attributes.get_float("alpha", 1.0), 1.0)]


def _selu(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    alpha, gamma = (
        node.attributes.get_float("alpha", 1.67326319217681884765625),
        node.attributes.get_float("gamma", 1.05070102214813232421875),
    )
    return [_exponential_unit(steps, node.inputs[0], alpha, gamma)]


def _exponential_unit(steps: Steps, data: ir.Value | None, alpha: float, gamma: float) -> ir.Value:
    grown = steps.add("Sub", steps.add("Exp", data), steps.scalar(1, "one"))
    if alpha != 1.0:
        grown = steps.add("Mul", grown, steps.scalar(alpha, "alpha"))
    is_positive = steps.add("Greater", data, steps.scalar(0, "zero"))
    result = steps.add("Where", is_positive, data, grown)
    return result if gamma == 1.0 else steps.add("Mul", result, steps.scalar(gamma, "gamma"))


def _softsign(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    size = steps.add("Add", steps.add("Abs", node.inputs[0]), steps.scalar(1, "one"))
    return [steps.add("Div", node.inputs[0], size)]


def _gelu(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """X · (1 + erf(x / √2)) · ½ from left to right: beyond half the type's largest number it is infinite."""
    if node.attributes.get_string("approximate", "none") != "none":
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
        is_nan = [steps.add("IsNaN", each) for each in (result, other)]
        usual = steps.add(node.op_type, result, other)
        result = steps.add("Where", is_nan[0], other, steps.add("Where", is_nan[1], result, usual))
    return [result] if result is not None and others else None


def _hard_sigmoid(steps: Steps, node: ir.Node) -> Sequence[ir.Value]:
    """The line is rounded, then cut off at 0 and 1; NaN becomes 0."""
    line = steps.add("Mul", node.inputs[0], steps.scalar(node.attributes.get_float("alpha", 0.2), "alpha"))
    line = steps.add("Add", line, steps.scalar(node.attributes.get_float("beta", 0.5), "beta"))
    zero, one = steps.scalar(0, "zero"), steps.scalar(1, "one")
    is_nan = steps.add("IsNaN", line)
    return [steps.add("Where", is_nan, zero, steps.add("Clip", line, zero, one))]


def _trilu(steps: Steps, node: ir.Node) -> Sequence[ir.Value] | None:
    """Without the attribute, ONNX means the upper triangle and TensorRT's parser the lower one."""
    if "upper" in node.attributes:
        return None
    return [steps.add("Trilu", *node.inputs, upper=0)]


EXPANSIONS: dict[str, Expansion] = {
    "CumSum": _cum_sum,
    "Elu": _elu,
    "GRU": recurrence,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalLpPool": _global_lp_pool,
    "HardSigmoid": _hard_sigmoid,
    "LSTM": recurrence,
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization,
    "LpPool": _lp_pool,
    "Max": _extreme,
    "Mean": _mean,
    "Min": _extreme,
    "Mod": _mod,
    "RNN": recurrence,
    "ReduceLogSum": _reduce_log_sum,
    "ReduceLogSumExp": _reduce_log_sum_exp,
    "ReduceSumSquare": _reduce_sum_square,
    "Selu": _selu,
    "Softsign": _softsign,
    "Sum": _sum,
    "Trilu": _trilu,
}
"""By operator, the layers that TensorRT makes of it; None where it is one layer after all."""
