"""Which arguments of onnxruntime's quantizer made a model that TensorRT does not take, and what they have to be.

Everything is told from the file: who quantized it, in which format, with which types and zero points. The rules are
those of TensorRT's explicit quantization (symmetric, signed, no quantized bias) and of the arguments that
`onnxruntime.quantization.quantize_static` has (1.17 to 1.32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.model.graph import operand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.precision.families.rules import Finding

ORT_PRODUCER = "onnx.quantize"
"""What onnxruntime's quantizer writes as the producer; Model Optimizer, which calls it, does too."""
_PYTORCH = "pytorch"
_RULES = frozenset({"quantized to uint8", "asymmetric quantization", "bias in INT32", "uint8 inside the model"})
_DYNAMIC = frozenset({"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "Gather", "EmbedLayerNormalization"})
_LARGER = frozenset({ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.UINT4})


def is_of_quantization(finding: Finding) -> bool:
    """Whether a finding comes of how the model was quantized."""
    of_type = finding.rule == "unsupported type" and finding.op_type in {"QuantizeLinear", "DequantizeLinear"}
    return of_type or finding.rule in _RULES or finding.op_type in _DYNAMIC or _is_qoperator(finding.op_type)


def mending(model: ir.Model) -> str:
    """What to quantize with instead, ready to paste; empty where no tool is known that quantized the model."""
    used = list(_parameters(model))
    if model.producer_name == _PYTORCH and used:
        return _PT2E
    if model.producer_name != ORT_PRODUCER:
        return ""
    weights = [each for each in used if each.of_weight]
    activations = [each for each in used if not each.of_weight]
    operators = {node.op_type for node in graphs.all_nodes(model.graph)}
    is_dynamic = bool(operators & _DYNAMIC)
    is_qoperator = any(map(_is_qoperator, operators))
    wide = is_dynamic or any(each.grid in _LARGER for each in activations)
    arguments = {
        "quant_format=QuantFormat.QDQ": is_qoperator,
        "per_channel=True": any(each.per_channel for each in weights),
        "activation_type=QuantType.QInt8": wide,
        "weight_type=QuantType.QInt8": any(each.grid in _LARGER for each in weights),
    }
    options = {
        "ActivationSymmetric": ("True", wide or any(each.offset for each in activations)),
        "WeightSymmetric": ("True", any(each.offset for each in weights)),
        "AddQDQPairToWeight": ("True", is_dynamic or any(each.integers_alone for each in used)),
        "QuantizeBias": ("False", is_dynamic or is_qoperator or _has_quantized_bias(model)),
    }
    extra = ", ".join(f'"{name}": {value}' for name, (value, wanted) in options.items() if wanted)
    chosen = [argument for argument, wanted in arguments.items() if wanted]
    chosen += [f"extra_options={{{extra}}}"] * bool(extra)
    why = "quantize_dynamic leaves the ranges to the run, which TensorRT does not" if is_dynamic else ""
    return (
        f"{why or 'onnxruntime quantized it'}: quantize again, with these arguments and the others that you gave:\n"
        f"      quantize_static(float_model, quantized_model, calibration_data_reader, {', '.join(chosen)})"
    )


_PT2E = (
    "PyTorch exported it: give its quantizer symmetric activations, "
    "QuantizationSpec(dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127, …), "
    "and export again"
)


@dataclass(frozen=True)
class _Parameters:
    """How one tensor is quantized."""

    grid: ir.DataType | None
    offset: bool
    of_weight: bool
    per_channel: bool = False
    integers_alone: bool = False


def _parameters(model: ir.Model) -> Iterator[_Parameters]:
    for node in graphs.all_nodes(model.graph):
        data, scale, zero_point = (operand(node, index) for index in range(3))
        constant = _is_constant(data)
        told = _offset(zero_point), constant and _is_weight(node), _size(scale) > 1
        if node.op_type == "QuantizeLinear":
            # Of 16 bits, onnxruntime up to 1.23 writes its own domain's operator, whose result has no known type.
            yield _Parameters(node.outputs[0].dtype if zero_point is None else zero_point.dtype, *told)
        elif node.op_type == "DequantizeLinear" and data is not None and constant and not _is_bias(data):
            yield _Parameters(data.dtype, *told, integers_alone=True)
        elif _is_qoperator(node.op_type):
            yield from _of_operator(node)


def _of_operator(node: ir.Node) -> Iterator[_Parameters]:
    """Operands of QLinear operators come as (data, scale, zero point), the result's as (scale, zero point)."""
    zero_points: set[int] = set()
    for index in range(2, len(node.inputs)):
        scale, value = node.inputs[index - 1], node.inputs[index]
        if value is None or not _is_constant(scale) or scale is None or scale.dtype != ir.DataType.FLOAT:
            continue
        data = node.inputs[index - 2]
        of_weight = index - 2 not in zero_points and _is_constant(data) and not _is_bias(data)
        zero_points.add(index)
        yield _Parameters(value.dtype, _offset(value), of_weight, _size(scale) > 1, of_weight)


def _is_qoperator(op_type: str) -> bool:
    return op_type.startswith("QLinear") or op_type in {"QGemm", "QAttention"}


def _is_weight(node: ir.Node) -> bool:
    """Whether what a Q or DQ node gives is a weight; the quantizer takes other constants for activations."""
    users = [user for user, _ in node.outputs[0].uses()]
    return any(user.op_type in _WEIGHTED or (user.op_type == "DequantizeLinear" and _is_weight(user)) for user in users)


def _has_quantized_bias(model: ir.Model) -> bool:
    nodes = graphs.all_nodes(model.graph)
    return any(node.op_type == "DequantizeLinear" and _is_bias(operand(node, 0)) for node in nodes)


def _is_bias(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.INT32


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _size(value: ir.Value | None) -> int:
    return value.const_value.size if value is not None and value.const_value is not None else 1


def _offset(zero_point: ir.Value | None) -> bool:
    """Whether a zero point is another number than 0; one that is not known counts."""
    if zero_point is None:
        return False
    tensor = zero_point.const_value
    return tensor is None or bool(np.any(tensor.numpy().astype(np.float32)))
