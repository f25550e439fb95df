"""A lowered model's arithmetic, reproduced in FP32 on ONNX Runtime's CPU provider.

An FP16-typed model is *not* an emulation there: its kernels run in FP32 and the casts between them are removed. What
does hold is an FP32 model with an explicit pair of casts, FP32 → FP16 → FP32, behind every value that FP16 would have
rounded; the pair rounds to nearest even, overflows to infinity and keeps subnormals as FP16 does. Q/DQ nodes become
their own arithmetic (`precision.quantization.qdq`).

What TensorRT makes several layers of is spelled out first (`layers`); how it accumulates products
(`products`) and what it makes one kernel of (`attention`) was measured on a GPU, and
docs/how-emulation-works.md says operator by operator how sure that is. Not reproduced is the order of additions, and
what a GPU's own functions (exp, tanh, …) lose.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import rewriting
from pytest_trtcheck.precision.emulation import attention, layers, products
from pytest_trtcheck.precision.emulation.recurrences import RECURRENCES
from pytest_trtcheck.precision.quantization import qdq
from pytest_trtcheck.precision.quantization.plan import QUANTIZED_OPERATORS
from pytest_trtcheck.precision.rewriting import FLOAT, Steps

HALF_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

EXACT_OPERATORS = graphs.op_types(
    """
    Abs Ceil Compress Concat DepthToSpace Expand Flatten Floor Gather GatherElements GatherND GlobalMaxPool Identity
    Max MaxPool Min Neg Relu ReduceMax ReduceMin Reshape ReverseSequence Round Sign Slice SpaceToDepth Split Squeeze
    Tile TopK Transpose Trilu Unsqueeze Where
    """
)
"""Operators whose outputs are values that their inputs hold (or their magnitudes, negatives, integers): rounding them
again changes nothing, so the pair is left out."""

_PRODUCT_INPUTS = {
    "Attention": 3,
    "Conv": 2,
    "ConvTranspose": 2,
    "DeformConv": 2,
    "Einsum": None,
    "GRU": 3,
    "Gemm": 2,
    "LSTM": 3,
    "MatMul": 2,
    "RNN": 3,
}
"""Operators that hold matrix products, and how many of their first inputs are factors of one; None: all."""
_WHERE_OPSET = 9
"""The opset that has IsNaN, Sign and Where."""
_TF32_SPLITTER = np.float32(2**13 + 1)


def emulated(model: ir.Model, *, rounding: bool = True) -> ir.Model:
    """Rewrite a lowered model (as `graph.read` gives it) in place so that ONNX Runtime computes what it means.

    Inputs and outputs keep their names and types. Without `rounding`, the result is the FP32 model behind a 16-bit one:
    the same weights, no rounding of anything computed. Of an old opset, it is another model that is returned.

    Raises
    ------
    ModelError
        The model's opset is too old to spell out what TensorRT computes, and can't be raised.
    """
    if rounding and any(map(_is_spelled_out, graphs.all_nodes(model.graph))):
        model = graphs.at_least_opset(model, layers.OLDEST_OPSET)
    wanted = [value.dtype for value in model.graph.outputs]
    if rounding:
        # Apart from its bias and its factors, the product of a quantized one is one of integers.
        layers.spell_out(model, HALF_TYPES, {"Gemm"})
    quantized = {node for node in graphs.all_nodes(model.graph) if _is_quantized(node)}
    _keep_grids(model)
    qdq.as_arithmetic(model)
    unrounded: set[ir.Value] = set()
    if rounding:
        defined = layers.by_definition(model, {"Attention"}, HALF_TYPES)
        layers.spell_out(model, HALF_TYPES)
        kernels = attention.in_one_kernel(model, defined)
        unrounded = (products.unrounded(model) - kernels.results) | kernels.unrounded
        products.accumulate_in_half(model, unrounded, quantized)
    for node in list(graphs.all_nodes(model.graph)):
        rounded = [value for value in node.outputs if value.dtype in HALF_TYPES]
        if node.op_type == "Dropout":
            # Of one inside an If, ONNX Runtime 1.32 hands on a ratio that is cast in the place of the data.
            node.resize_inputs(1)
        rewriting.retype(node, HALF_TYPES, FLOAT, lambda array: array.astype(np.float32))
        for value in rounded:
            kind = value.dtype
            assert kind is not None
            value.dtype = FLOAT
            exact = (node.op_type in EXACT_OPERATORS and node.domain == "") or value in unrounded
            if rounding and not exact:
                assert node.graph is not None
                _round_behind(value, node.graph, kind)
    _float_sources(model)
    _restore_output_types(model, wanted, rounding=rounding)
    return model


def _is_spelled_out(node: ir.Node) -> bool:
    """Whether other nodes may have to take the place of this one."""
    is_half = any(value.dtype in HALF_TYPES for value in node.outputs)
    return node.op_type == "QuantizeLinear" or (is_half and node.op_type in {*layers.EXPANSIONS, *_PRODUCT_INPUTS})


def _is_quantized(node: ir.Node) -> bool:
    """Whether an operand comes from a DequantizeLinear: such products are sums of integers or of FP8 numbers."""
    return any(graphs.made_by(value, "DequantizeLinear") for value in node.inputs[:2])


def _keep_grids(model: ir.Model) -> None:
    """Let what a product of quantized operands alone reads be the exact steps of its grid.

    TensorRT multiplies the 8-bit numbers and applies the scales to the sum: a 16-bit type between DequantizeLinear and
    product is a type that nothing is ever stored in.
    """
    for node in graphs.all_nodes(model.graph):
        output = node.outputs[0]
        uses = output.uses() if node.op_type == "DequantizeLinear" and output.dtype in HALF_TYPES else ()
        if uses and all(_multiplies_grids(user) and index < 2 for user, index in uses):
            output.dtype = FLOAT


def _multiplies_grids(node: ir.Node) -> bool:
    return node.op_type in QUANTIZED_OPERATORS and all(graphs.made_by(v, "DequantizeLinear") for v in node.inputs[:2])


def _round_behind(value: ir.Value, graph: ir.Graph | ir.Function, kind: ir.DataType) -> None:
    """Put the pair between `value` and all that use it; the rounded value takes over the name."""
    name = value.name or ""
    down = rewriting.cast(value, kind, f"{name}/round")
    up = rewriting.cast(down.outputs[0], FLOAT, f"{name}/rounded")
    rounded = rewriting.interpose(value, [down, up], graph)
    rewriting.replace_in_outputs(graph, value, rounded)
    value.name, rounded.name = f"{name}/unrounded", name


def _float_sources(model: ir.Model) -> None:
    """16-bit inputs and weights become FP32 by one Cast each; ONNX Runtime folds the weights' casts."""
    for graph in graphs.all_graphs(model.graph):
        is_main = graph is model.graph
        for value in dict.fromkeys([*graph.initializers.values(), *(graph.inputs if is_main else ())]):
            if value.dtype in HALF_TYPES:
                cast = rewriting.cast(value, FLOAT, f"{value.name}/float")
                rewriting.replace_in_outputs(graph, value, rewriting.interpose(value, [cast], graph))
        for value in () if is_main else graph.inputs:
            if value.dtype in HALF_TYPES:
                value.dtype = FLOAT


def _restore_output_types(model: ir.Model, wanted: list[ir.DataType | None], *, rounding: bool) -> None:
    """An output that was 16-bit comes out 16-bit; with `rounding`, its value is already one that the type holds."""
    for index, (value, dtype) in enumerate(zip(list(model.graph.outputs), wanted, strict=True)):
        if dtype is None or dtype not in HALF_TYPES or value.dtype == dtype:
            continue
        name = value.name or ""
        value.name = f"{name}/float"
        cast = rewriting.cast(value, dtype, f"{name}/output")
        steps = Steps(cast, opset=graphs.opset(model))
        model.graph.append(cast)
        if not rounding and steps.opset >= _WHERE_OPSET:
            cast.replace_input_with(0, _within(steps, value, dtype))
            model.graph.insert_before(cast, steps.nodes)
        cast.outputs[0].name = name
        model.graph.outputs[index] = cast.outputs[0]


def _within(steps: Steps, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The value; where it is finite and beyond the type's range, the largest number of the type.

    An infinity that the 16-bit model computes there is none of the FP32 model's, which the Cast would make one of.
    """
    largest = ml_dtypes.finfo(dtype.numpy()).max  # type: ignore[no-untyped-call]
    size = steps.add("Abs", value)
    bound = steps.constant(np.array(largest, np.float32), "largest")
    is_beyond = steps.add("Greater", size, bound)
    is_finite = steps.add("Less", size, steps.constant(np.array(np.inf, np.float32), "infinity"))
    bounded = steps.add("Mul", steps.add("Sign", value), bound)
    return steps.add("Where", steps.add("And", is_beyond, is_finite, dtype=ir.DataType.BOOL), bounded, value)


def emulated_tf32(model: ir.Model) -> ir.Model:
    """Rewrite an FP32 model in place so that matrix products see inputs rounded to TF32's 10 stored mantissa bits.

    Those inside a recurrence and inside Attention as well: these are spelled out first. Which convolutions cut the bits
    off, or stay in FP32, says `products`. TF32 has no ONNX type. The rounding is Veltkamp's splitting in FP32
    arithmetic (T. J. Dekker, Numer. Math. 18, 1971): with c = 2¹³ + 1, x·c − (x·c − x) is x rounded to 24 − 13 = 11
    significant bits. Products accumulate in FP32, as tensor cores do. A batch normalization stays a node of its own:
    the engine multiplies and adds behind the convolution, and its weights are rounded as they are.

    Raises
    ------
    ModelError
        As for `emulated`.
    """
    model = graphs.at_least_opset(model, layers.OLDEST_OPSET)
    splitter_name = graphs.Names(model).unused("trtcheck/tf32_splitter")
    splitter = rewriting.initializer(model.graph, ir.Tensor(np.array(_TF32_SPLITTER, np.float32), name=splitter_name))
    layers.spell_out(model, {FLOAT}, RECURRENCES)
    layers.by_definition(model, {"Attention"}, {FLOAT})
    for node in list(graphs.all_nodes(model.graph)):
        if node.op_type not in _PRODUCT_INPUTS or node.graph is None or products.stays_float(node):
            continue
        for index, value in enumerate(node.inputs[: _PRODUCT_INPUTS[node.op_type]]):
            if value is None or value.dtype != FLOAT:
                continue
            steps = Steps(node, opset=graphs.opset(model), prefix=f"{node.name}/{index}/tf32")
            result = _to_tf32(steps, value, splitter)
            if products.truncates(node):
                result = _cut_off(steps, value, result, splitter)
            result.shape = value.shape
            node.graph.insert_before(node, steps.nodes)
            node.replace_input_with(index, result)
    return model


def _to_tf32(steps: Steps, value: ir.Value, splitter: ir.Value) -> ir.Value:
    """The nearest TF32 number; what is infinite, NaN or beyond 2¹¹⁴ stays what it is."""
    scaled = steps.add("Mul", value, splitter)
    low = steps.add("Sub", scaled, value)
    is_lost = steps.add("IsNaN", low)
    return steps.add("Where", is_lost, value, steps.add("Sub", scaled, low))


def _cut_off(steps: Steps, value: ir.Value, nearest: ir.Value, splitter: ir.Value) -> ir.Value:
    """The TF32 number towards zero: where the nearest is larger, the one nearest to a little less.

    For x in [2ᵉ, 2ᵉ⁺¹), x · 2⁻¹¹ is half to one unit in TF32's last place.
    """
    less = steps.add("Mul", value, steps.constant(np.array(1 - 2.0**-11, np.float32), "less"))
    sizes = [steps.add("Abs", each) for each in (nearest, value)]
    is_larger = steps.add("Greater", *sizes)
    return steps.add("Where", is_larger, _to_tf32(steps, less, splitter), nearest)
