"""The rules: what of a graph a TensorRT family does not take, node by node.

Each rule looks at one node and says what is wrong with it in the user's words, for which families, and who would
notice: the parser, the builder alone, or nobody, where TensorRT takes the node without a word and computes something
else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.model.graph import ONNX_DOMAINS, operand
from pytest_trtcheck.precision.families.family import RTX, TENSORRT_10, TENSORRT_11, Family
from pytest_trtcheck.precision.families.kernels import entries_for

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from pytest_trtcheck.choices import HalfName

SeenBy = Literal["parser", "builder", "nobody"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})
_SAME_MEANING = frozenset({("com.microsoft", "QuantizeLinear"), ("com.microsoft", "DequantizeLinear")})
"""Operators of other domains that compute what ONNX's operator of the same name computes."""
_TENSORRT = frozenset({TENSORRT_10.name, TENSORRT_11.name})
_RTX = frozenset({RTX.name})
_ALL = _TENSORRT | _RTX


@dataclass(frozen=True)
class Finding:
    """What stands against one node in one family."""

    node: str
    op_type: str
    problem: str
    advice: str
    seen_by: SeenBy = "parser"
    rule: str = ""

    def __str__(self) -> str:
        where = f"node {self.node!r} ({self.op_type})" if self.op_type else f"tensor {self.node!r}"
        return f"{where}: {self.problem}"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Parameters
    ----------
    title
        What it is about, in two or three words.
    finds
        What is wrong with a node; None where nothing is.
    families
        The names of the families that it holds for.
    """

    title: str
    finds: Callable[[ir.Node], str | None]
    advice: str
    families: frozenset[str] = _ALL
    seen_by: SeenBy = "parser"


# --- reading nodes ---------------------------------------------------------------------------------------------------


def _constant(value: ir.Value | None) -> Any:
    """The array that a value is known to hold; None where it is computed or given."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _used_outputs(node: ir.Node) -> int:
    return sum(bool(value.name) for value in node.outputs)


def _type_name(value: ir.Value) -> str:
    return "unknown" if value.dtype is None else value.dtype.name.lower()


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _origins(value: ir.Value | None) -> Iterator[ir.Value]:
    """All that a value is computed from, itself included; shapes count as known, whatever has them."""
    waiting: list[ir.Value | None] = [value]
    seen: set[ir.Value] = set()
    while waiting:
        each = waiting.pop()
        if each is None or each in seen or each.const_value is not None:
            continue
        seen.add(each)
        yield each
        producer = each.producer()
        if producer is not None and producer.op_type not in {"Shape", "Size"}:
            waiting += producer.inputs


def _depends_on_data(value: ir.Value | None) -> bool:
    """Whether a value is computed from the elements of an input, not from shapes and constants alone."""
    return any(each.is_graph_input() for each in _origins(value))


def _depends_on_floats(value: ir.Value | None) -> bool:
    return any(each.is_graph_input() and each.dtype in _FLOATS for each in _origins(value))


def _first_opsets() -> dict[str, int]:
    """The opset in which each of ONNX's own operators came."""
    first: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            first[schema.name] = min(schema.since_version, first.get(schema.name, schema.since_version))
    return first


_FIRST_OPSET = _first_opsets()


def is_foreign(node: ir.Node) -> bool:
    """Whether ONNX itself does not define the node's operator."""
    return node.domain not in ONNX_DOMAINS or node.op_type not in _FIRST_OPSET


# --- Q/DQ ------------------------------------------------------------------------------------------------------------


def _is_qdq(node: ir.Node) -> bool:
    return node.op_type in {"QuantizeLinear", "DequantizeLinear"}


def _quantized_dtype(node: ir.Node) -> ir.DataType | None:
    """The integer (or FP8) type on the quantized side; None where the graph does not tell."""
    zero_point = operand(node, 2)
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    if node.op_type == "DequantizeLinear":
        value = operand(node, 0)
        return None if value is None else value.dtype
    asked = _attribute(node, "output_dtype", 0)
    return ir.DataType(asked) if asked else ir.DataType.UINT8


def _uint8_quantization(node: ir.Node) -> str | None:
    if not _is_qdq(node) or _quantized_dtype(node) != ir.DataType.UINT8:
        return None
    unsaid = node.op_type == "QuantizeLinear" and operand(node, 2) is None
    why = " (it has no zero point, which by ONNX means uint8)" if unsaid else ""
    return f"it quantizes to uint8{why}; TensorRT would compute with INT8 in its place, and lose half of the range"


def _asymmetric(node: ir.Node) -> str | None:
    zero_point = _constant(operand(node, 2)) if _is_qdq(node) else None
    if zero_point is None or not np.any(zero_point.astype(np.float32)):
        return None
    shown = np.unique(zero_point[zero_point.astype(np.float32) != 0]).ravel()[:3]
    values = ", ".join(str(int(each)) for each in shown)
    return f"its zero point is not 0 ({values}): TensorRT takes no asymmetric quantization"


def _scale(node: ir.Node) -> str | None:
    scale = _constant(operand(node, 1)) if _is_qdq(node) else None
    if scale is None or scale.dtype.kind not in "fV" or bool(np.all(scale.astype(np.float32) > 0)):
        return None
    wrong = scale.astype(np.float32).ravel()
    wrong = wrong[~(wrong > 0)]
    return f"{wrong.size} of its {scale.size} scales {'is' if wrong.size == 1 else 'are'} not above 0 ({wrong[0]:g})"


def _computed_zero_point(node: ir.Node) -> str | None:
    if _is_qdq(node) and _quantized_dtype(node) in _INTEGERS and _depends_on_data(operand(node, 2)):
        return "its zero point is computed: TensorRT must know it when it builds"
    return None


def _int32_dequantized(node: ir.Node) -> str | None:
    value = operand(node, 0) if node.op_type == "DequantizeLinear" else None
    if value is None or value.dtype != ir.DataType.INT32:
        return None
    return "it dequantizes an INT32 tensor, as quantizers write a bias; TensorRT dequantizes 8 bits and less"


# --- types -----------------------------------------------------------------------------------------------------------

_D = ir.DataType
_NO_TYPES = frozenset(
    {
        *(_D.INT16, _D.UINT16, _D.UINT32, _D.UINT64, _D.UINT4, _D.COMPLEX64, _D.COMPLEX128, _D.STRING),
        *(_D.FLOAT8E4M3FNUZ, _D.FLOAT8E5M2, _D.FLOAT8E5M2FNUZ),
        # Not in every release of onnx-ir.
        *(getattr(_D, name) for name in ("FLOAT8E8M0", "INT2", "UINT2") if hasattr(_D, name)),
    }
)
_QUANTIZED_TYPES = frozenset(
    {_D.FLOAT8E4M3FN, _D.INT4, *(getattr(_D, name) for name in ("FLOAT4E2M1",) if hasattr(_D, name))}
)
_TAKES_UINT8 = frozenset(
    {"Cast", "CastLike", "Identity", "Equal", "QuantizeLinear", "DequantizeLinear", "Shape", "Size"}
)


def _unsupported_type(node: ir.Node) -> str | None:
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            kind = "a sequence" if isinstance(value.type, ir.SequenceType) else "an optional"
            return f"{value.name!r} is {kind}: TensorRT has tensors alone"
        if value.dtype in _NO_TYPES:
            return f"{value.name!r} is {_type_name(value)}, a type that TensorRT does not have"
    return None


def _uint8_inside(node: ir.Node) -> str | None:
    """UINT8 is for inputs and outputs, and a Cast beside them; an initializer becomes INT32."""
    for value in node.inputs:
        if value is None or value.dtype != _D.UINT8 or value.const_value is not None:
            continue
        if node.op_type not in _TAKES_UINT8:
            return f"it reads {value.name!r}, a uint8 tensor, which TensorRT casts and does not compute with"
    for value in node.outputs:
        if value.dtype == _D.UINT8 and not value.is_graph_output() and not _is_qdq(node):
            return f"{value.name!r} is uint8 inside the model: TensorRT has uint8 for inputs and outputs alone"
    return None


def _cast_of_quantized(node: ir.Node) -> str | None:
    if node.op_type not in {"Cast", "CastLike"}:
        return None
    ends = [value for value in (operand(node, 0), node.outputs[0]) if value is not None]
    low = next((value.dtype for value in ends if value.dtype in _QUANTIZED_TYPES), None)
    return None if low is None else f"it casts {low.name}: TensorRT goes to that type and back by Q/DQ nodes alone"


_HALF: dict[ir.DataType, HalfName] = {_D.FLOAT16: "fp16", _D.BFLOAT16: "bf16"}


def _no_half_kernel(family: str, seen_by: SeenBy) -> Callable[[ir.Node], str | None]:
    def find(node: ir.Node) -> str | None:
        for value in node.outputs:
            kind = _HALF.get(value.dtype) if value.dtype is not None else None
            for entry in entries_for(node, kind) if kind else ():
                if family in entry.families and entry.seen_by == seen_by:
                    return f"TensorRT has no {kind} kernel for it ({entry.source})"
        return None

    return find


def _float_attention(node: ir.Node) -> str | None:
    query = operand(node, 0) if node.op_type == "Attention" else None
    if query is None or query.dtype != _D.FLOAT or _rank(query) != 4:
        return None
    return "it attends in FP32, which TensorRT-RTX has no kernel for"


# --- what must be known when the engine is built ---------------------------------------------------------------------

_MUST_BE_CONSTANT: dict[str, tuple[tuple[int, str], ...]] = {
    **{
        f"Reduce{kind}": ((1, "axes"),)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
    "Squeeze": ((1, "axes"),),
    "Unsqueeze": ((1, "axes"),),
    "Resize": ((2, "scales"),),
    "Upsample": ((1, "scales"),),
    "STFT": ((1, "frame_step"), (2, "window")),
    "Dropout": ((2, "training_mode"),),
}
_SIZES = {"Range": (0, 1, 2), "OneHot": (1,), "Loop": (0,)}
"""Operands that decide on sizes: TensorRT takes them from an integer input, and not from a float."""


def _not_constant(node: ir.Node) -> str | None:
    for index, name in _MUST_BE_CONSTANT.get(node.op_type, ()):
        value = operand(node, index)
        if _depends_on_data(value):
            return f"its input {name} depends on the data: TensorRT must know it when it builds"
        producers = (each.producer() for each in _origins(value))
        if any(producer is not None and producer.op_type == "Range" for producer in producers):
            return f"its input {name} is computed by a Range: TensorRT must know it when it builds"
    for index in _SIZES.get(node.op_type, ()):
        if _depends_on_floats(operand(node, index)):
            return "the size of its output is computed from a float input"
    return None


# --- attributes, inputs and outputs ----------------------------------------------------------------------------------


def _attributes(node: ir.Node) -> str | None:
    for op_types, name, default, allowed in _ALLOWED:
        if node.op_type in op_types:
            given = _attribute(node, name, default)
            if given is not None and not allowed(given):
                return f"{name}={_shown(given)} is not supported"
    return None


def _shown(value: Any) -> str:
    return repr(list(value)) if isinstance(value, (list, tuple)) else repr(value)


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda given: given in values


def _all_ones(given: Any) -> bool:
    return all(each == 1 for each in given)


_POOLINGS = frozenset({"AveragePool", "MaxPool", "LpPool"})
_ALLOWED: tuple[tuple[frozenset[str], str, Any, Callable[[Any], bool]], ...] = (
    (frozenset({"Resize"}), "antialias", 0, _is(0)),
    (frozenset({"Resize"}), "keep_aspect_ratio_policy", "stretch", _is("stretch")),
    (
        frozenset({"Resize"}),
        "coordinate_transformation_mode",
        "half_pixel",
        _is("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
    ),
    (_POOLINGS, "dilations", (), _all_ones),
    (frozenset({"LpPool"}), "p", 2, _is(1, 2)),
    (frozenset({"BatchNormalization"}), "training_mode", 0, _is(0)),
    (frozenset({"ScatterND"}), "reduction", "none", _is("none")),
    (frozenset({"LSTM"}), "input_forget", 0, _is(0)),
    (frozenset({"Attention"}), "softcap", 0.0, _is(0.0)),
    (frozenset({"Attention"}), "softmax_precision", None, lambda _: False),
    (frozenset({"TensorScatter"}), "mode", "linear", _is("linear")),
    (frozenset({"Constant"}), "sparse_value", None, lambda _: False),
    (frozenset({"Constant"}), "value_string", None, lambda _: False),
    (frozenset({"Constant"}), "value_strings", None, lambda _: False),
)
_ONE_OUTPUT = frozenset({"MaxPool", "LayerNormalization", "Attention"})


def _documented_attributes(node: ir.Node) -> str | None:
    """What the table of TensorRT rules out and the parser of TensorRT-RTX takes."""
    if node.op_type == "TopK" and _attribute(node, "sorted", 1) != 1:
        return "sorted=0 is not supported"
    if node.op_type == "Attention" and operand(node, 6) is not None:
        return "nonpad_kv_seqlen is not supported"
    if node.op_type == "GridSample" and (_rank(operand(node, 0)) or 4) != 4:
        return "its input must have 4 dimensions"
    return None


def _batchwise(node: ir.Node) -> str | None:
    """TensorRT-RTX takes the batch for the steps, TensorRT's table rules it out."""
    recurs = node.op_type in {"LSTM", "GRU", "RNN"} and _attribute(node, "layout", 0) != 0
    return "layout=1 is not supported" if recurs else None


def _last_window(node: ir.Node) -> str | None:
    """A window that starts behind the input and the padding before it: ONNX has none, TensorRT's output one more."""
    shape = node.inputs[0].shape if node.op_type in _POOLINGS and node.inputs[0] is not None else None
    if shape is None or not _attribute(node, "ceil_mode", 0) or _attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return None
    kernel = _attribute(node, "kernel_shape", ())
    strides, pads = (_attribute(node, name, [fill] * len(kernel) * 2) for name, fill in (("strides", 1), ("pads", 0)))
    for index, (size, length) in enumerate(zip(list(shape)[2:], kernel, strict=False)):
        before, after, stride = pads[index], pads[index + len(kernel)], strides[index]
        if isinstance(size, int) and -(-(size + before + after - length) // stride) * stride >= size + before:
            return (
                f"with ceil_mode its last window along axis {index + 2} would start behind the input: "
                "ONNX leaves it out, TensorRT does not"
            )
    return None


def _scatter_elements(node: ir.Node) -> str | None:
    reduction = _attribute(node, "reduction", "none") if node.op_type == "ScatterElements" else "none"
    return None if reduction == "none" else f"reduction={reduction!r} is not supported"


def _more_outputs(node: ir.Node) -> str | None:
    if node.op_type not in _ONE_OUTPUT or _used_outputs(node) == 1:
        return None
    return f"it has {_used_outputs(node)} outputs: TensorRT computes the first alone"


def _ranks(node: ir.Node) -> str | None:
    rank = _rank(operand(node, 0))
    some_axes = node.op_type == "Resize" and "axes" in node.attributes and operand(node, 2) is not None
    if some_axes and rank is not None and list(_attribute(node, "axes", ())) != list(range(rank)):
        return "axes with scales is supported for all axes in their order alone"
    if node.op_type == "LpPool" and len(_attribute(node, "kernel_shape", (1, 1))) == 1:
        return "one-dimensional LpPool is not supported"
    if node.op_type == "TensorScatter" and (rank or 4) != 4:
        return "its cache must have 4 dimensions"
    if node.op_type == "MatMul" and rank == 1 and (_rank(operand(node, 1)) or 0) > 2:
        return "a vector times a stack of matrices is not supported"
    return None


def _modulo_of_floats(node: ir.Node) -> str | None:
    value = operand(node, 0) if node.op_type == "Mod" and not _attribute(node, "fmod", 0) else None
    if value is None or value.dtype in {None, _D.INT32, _D.INT64}:
        return None
    return f"fmod=0 is supported on int32 and int64, not on {_type_name(value)}"


def _attention(node: ir.Node) -> str | None:
    if node.op_type != "Attention":
        return None
    if any(operand(node, index) is not None for index in (4, 5)):
        return "past_key and past_value are not supported"
    if _attribute(node, "is_causal", 0) and operand(node, 3) is not None:
        return "is_causal=1 together with a mask is not supported"
    key, value = operand(node, 1), operand(node, 2)
    if key is not None and value is not None and key.shape is not None and value.shape is not None:
        sizes = [each.shape[-1] for each in (key, value) if each.shape]
        if len(sizes) == 2 and all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]:
            return "key and value must have the same shape"
    return None


MOST_K = 3840


def _large_k(node: ir.Node) -> str | None:
    k = _constant(operand(node, 1)) if node.op_type == "TopK" else None
    return f"its K is above {MOST_K}" if k is not None and np.max(k, initial=0) > MOST_K else None


def _old_resize(node: ir.Node) -> str | None:
    """A Resize of opset 10, which alone has its scales second."""
    if node.op_type != "Resize" or len(node.inputs) != 2 or not graphs.skips_elements(node, 1):
        return None
    return (
        "of opset 10, it makes its input smaller by elements that ONNX Runtime takes after each place, TensorRT before"
    )


def _trilu(node: ir.Node) -> str | None:
    if node.op_type != "Trilu" or "upper" in node.attributes:
        return None
    return "without the attribute upper it is the upper triangle by ONNX, and TensorRT computes the lower one"


def _data_dependent_size(node: ir.Node) -> str | None:
    if node.op_type in {"NonZero", "NonMaxSuppression"} and node.domain in ONNX_DOMAINS:
        return "the size of its output depends on the data, which TensorRT-RTX does not serve"
    return None


# --- domains ---------------------------------------------------------------------------------------------------------


def _read_by_name(node: ir.Node) -> str | None:
    foreign = node.domain not in ONNX_DOMAINS and (node.domain, node.op_type) not in _SAME_MEANING
    if not foreign or node.op_type not in _FIRST_OPSET:
        return None
    return f"it is of the domain {node.domain!r}; TensorRT goes by the name alone, and reads ONNX's {node.op_type}"


_SYMMETRIC = "quantize symmetrically: signed int8 and zero points of 0"
_CUT = "cut it off the model, and compute it outside the engine"
_LEAVE = "leave this node in FP32"
_EXPORT = "export the model without it, in operators that TensorRT has, or cut it off"

RULES: tuple[Rule, ...] = (
    Rule("quantized to uint8", _uint8_quantization, _SYMMETRIC, seen_by="nobody"),
    Rule("asymmetric quantization", _asymmetric, _SYMMETRIC),
    Rule("scale not above 0", _scale, "calibrate with data that reaches this tensor, and look at the weights for NaN"),
    Rule("computed zero point", _computed_zero_point, _SYMMETRIC, seen_by="builder"),
    Rule("bias in INT32", _int32_dequantized, "leave it in floats (ONNX Runtime's quantizer: QuantizeBias=False)"),
    Rule("unsupported type", _unsupported_type, "cast to int32, int64 or a float type when exporting"),
    Rule("uint8 inside the model", _uint8_inside, "cast to int32 or to a float type right behind the input"),
    Rule("cast of a quantized type", _cast_of_quantized, "use QuantizeLinear and DequantizeLinear", _RTX, "builder"),
    *(
        Rule("no 16-bit kernel", _no_half_kernel(family, seen_by), _LEAVE, frozenset({family}), seen_by)
        for family in sorted(_ALL)
        for seen_by in ("parser", "builder")
    ),
    Rule("not known when the engine is built", _not_constant, "make it a constant of the model"),
    Rule("unsupported attribute", _attributes, _EXPORT),
    Rule("unsupported attribute", _documented_attributes, _EXPORT, _TENSORRT),
    Rule("unsupported attribute", _scatter_elements, _EXPORT, _RTX),
    Rule("unsupported attribute", _batchwise, _EXPORT, seen_by="nobody"),
    Rule("last window", _last_window, "export it without ceil_mode, where that gives the same sizes", seen_by="nobody"),
    Rule("Trilu without upper", _trilu, "give it the attribute: upper=1", seen_by="nobody"),
    Rule("old Resize", _old_resize, "export the model in opset 11 or later", seen_by="nobody"),
    Rule("further outputs", _more_outputs, _EXPORT),
    Rule("unsupported rank", _ranks, _EXPORT),
    Rule("fmod=0 on floats", _modulo_of_floats, "cast to int64, or take fmod=1"),
    Rule("unsupported attention", _attention, _EXPORT),
    Rule("attention in FP32", _float_attention, "check fp16 or bf16, or export attention in pieces", _RTX, "builder"),
    Rule("large K", _large_k, f"take {MOST_K} at the most", seen_by="builder"),
    Rule("size that depends on the data", _data_dependent_size, _CUT, _RTX, "builder"),
    Rule("operator of another domain", _read_by_name, _EXPORT, seen_by="nobody"),
)


# --- judging ---------------------------------------------------------------------------------------------------------


def findings(model: ir.Model, family: Family, provided: Collection[str] = ()) -> tuple[list[Finding], list[str]]:
    """What stands against the model that TensorRT is given in `family`, and the operators that its table lacks.

    `provided` are the operators that plugin libraries bring.
    """
    found: list[Finding] = []
    unknown: dict[str, None] = {}
    for node in graphs.all_nodes(model.graph):
        if node.op_type in provided:
            continue
        problem = _operator(node, family)
        if problem == _NOT_KNOWN:
            unknown[node.op_type] = None
        elif problem is not None:
            advice = f"{_EXPORT}, or name a plugin: plugins=[…]"
            found.append(Finding(node.name or "", node.op_type, problem, advice, rule="operator that it does not have"))
        found += _by_rules(node, family)
    return [*found, *_calls_by_name(model, family), *_inputs_given_back(model.graph)], list(unknown)


def _calls_by_name(model: ir.Model, family: Family) -> Iterator[Finding]:
    """Calls of the model's own functions: every parser finds them by the name alone, and its operators before them."""
    calls = graphs.function_calls(model)
    shared = Counter(name for _, name, _ in {called for _, called in calls})
    for node, (domain, name, _) in calls:
        if name in family.operators | family.contrib:
            read = f"reads its operator {name}"
        elif shared[name] > 1:
            read = f"has one function {name} for all of that name"
        else:
            continue
        problem = f"it calls the model's own function '{domain}::{name}'; TensorRT goes by the name alone, and {read}"
        advice = "give the function a name that no operator and no other function has, or inline it"
        yield Finding(node, name, problem, advice, seen_by="nobody", rule="function of another's name")


def _inputs_given_back(graph: ir.Graph) -> Iterator[Finding]:
    """The inputs that are outputs, too: an engine has each name once, and every parser calls the input "__x" then."""
    for value in graph.inputs:
        if any(value is output for output in graph.outputs):
            name = value.name or ""
            problem = f"it is an input and an output, and TensorRT calls the input {'__' + name!r}"
            advice = "give the output a name of its own: put an Identity before it, or leave it out"
            yield Finding(name, "", problem, advice, seen_by="nobody", rule="input that is an output")


_NOT_KNOWN = "?"


def _operator(node: ir.Node, family: Family) -> str | None:
    """Why the family has no such operator; None where it has."""
    if node.op_type in family.plugins:
        return None
    if node.domain not in ONNX_DOMAINS:
        by_name = node.op_type in family.operators
        contrib = node.domain == "com.microsoft" and node.op_type in family.contrib
        return None if by_name or contrib else f"{family.title} has no operator of the domain {node.domain!r} like it"
    if node.op_type in family.operators:
        return None
    if _FIRST_OPSET.get(node.op_type, 0) > family.opset:
        return _NOT_KNOWN
    served = _data_dependent_size(node) if family is RTX else None
    return None if served else f"{family.title} does not have this operator"


def _by_rules(node: ir.Node, family: Family) -> Iterator[Finding]:
    for rule in RULES:
        if family.name in rule.families and (problem := rule.finds(node)) is not None:
            yield Finding(node.name or "", node.op_type, problem, rule.advice, rule.seen_by, rule.title)


def foreign_nodes(model: ir.Model) -> list[tuple[str, str]]:
    """The nodes whose operators ONNX does not define, as (name, operator)."""
    return [(node.name or "", node.op_type) for node in graphs.all_nodes(model.graph) if is_foreign(node)]
