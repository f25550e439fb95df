"""What TensorRT has no 16-bit kernel for: such nodes stay in FP32 when a model is lowered.

One table for all families, because a model is lowered once: what one of them cannot compute in a type, none is asked
to. Each entry says where it comes from. "RTX" means one-operator models on TensorRT-RTX 1.7.1.116 and 1.5.0.114 for
compute capabilities 8.0, 8.9 and 12.0 (1.5: 8.9), by the parser or else by the builder; "table" means the types that
onnx-tensorrt 10.15 lists for the operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    from pytest_trtcheck.choices import HalfName
    from pytest_trtcheck.precision.families.family import FamilyName


@dataclass(frozen=True)
class NoKernel:
    """An operator without a kernel in some of the 16-bit types.

    Parameters
    ----------
    kinds
        The types that it has no kernel for.
    source
        Where that comes from.
    where
        Which of its nodes; None: all.
    families
        Those that refuse a model which has it in the type all the same; their newest release at the least.
    seen_by
        Who refuses it there.
    """

    op_type: str
    kinds: frozenset[HalfName]
    source: str
    where: Callable[[ir.Node], bool] | None = None
    families: frozenset[FamilyName] = frozenset({"tensorrt_rtx"})
    seen_by: Literal["parser", "builder"] = "parser"


def _has_sequence_lens(node: ir.Node) -> bool:
    return graphs.operand(node, 4) is not None


_BF16: frozenset[HalfName] = frozenset({"bf16"})
_FP16: frozenset[HalfName] = frozenset({"fp16"})
_BOTH = _FP16 | _BF16
_RTX = "measured with TensorRT-RTX 1.5 and 1.7"
_RTX_1_5 = "measured with TensorRT-RTX 1.5"
_RTX_1_7 = "measured with TensorRT-RTX 1.7"
_TABLE = "onnx-tensorrt's operator table of TensorRT 10.15"
_TENSORRT: frozenset[FamilyName] = frozenset({"tensorrt_10", "tensorrt_11"})
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_WINDOWS = ("BlackmanWindow", "HammingWindow", "HannWindow")

NO_KERNEL: tuple[NoKernel, ...] = (
    *(NoKernel(op, _BOTH, _RTX, _has_sequence_lens) for op in ("GRU", "LSTM", "RNN")),
    *(NoKernel(op, _BOTH, _RTX) for op in ("Celu", "MeanVarianceNormalization", "Range")),
    *(NoKernel(op, _BF16, _RTX) for op in ("GRU", "GlobalLpPool", "HardSwish", "LpNormalization", "LpPool", "Shrink")),
    NoKernel("Mish", _BF16, f"{_RTX}; {_TABLE}", families=_TENSORRT | {"tensorrt_rtx"}),
    NoKernel("ConvTranspose", _BF16, _RTX, seen_by="builder"),
    # Its cache must be the engine's own input, without a cast between them.
    NoKernel("TensorScatter", _BOTH, _RTX, seen_by="builder"),
    *(NoKernel(op, _BF16, _RTX) for op in _RANDOM),
    *(NoKernel(op, _FP16, _RTX_1_5, families=frozenset(), seen_by="builder") for op in _RANDOM),
    NoKernel("STFT", _BOTH, f"{_RTX_1_5}; {_TABLE}", families=_TENSORRT),
    *(NoKernel(op, _BOTH, _RTX_1_7) for op in _WINDOWS),
    *(
        NoKernel(op, _BF16, _TABLE, families=_TENSORRT)
        for op in ("DeformConv", "GridSample", "NonZero", "RoiAlign", *_WINDOWS)
    ),
)


def entries_for(node: ir.Node, kind: HalfName) -> list[NoKernel]:
    """Why `node` has no kernel in a 16-bit type; empty where nothing is known against it."""
    return [
        entry
        for entry in NO_KERNEL
        if node.op_type == entry.op_type
        and node.domain == ""
        and kind in entry.kinds
        and (entry.where is None or entry.where(node))
    ]


def without_kernel(model: ir.Model, kind: HalfName) -> dict[str, str]:
    """The nodes that ONNX has in 16 bits and TensorRT has no kernel for: the operator and where it is, by name."""
    # Nodes in the body of a Scan too: TensorRT-RTX 1.5 and 1.7 build no Scan that computes in 16 bits.
    scanned = {
        inner
        for node in graphs.all_nodes(model.graph)
        if node.op_type == "Scan" and "body" in node.attributes
        for inner in graphs.all_nodes(node.attributes["body"].as_graph())
    }
    return {
        node.name or "": f"{node.op_type} in a Scan" if node in scanned else node.op_type
        for node in graphs.all_nodes(model.graph)
        if (node in scanned or entries_for(node, kind)) and _admits_half(node, model)
    }


def halves(schema: onnx.defs.OpSchema) -> set[str]:
    """The parameters of an operator's schema that stand for a type which may be FP32 and FP16."""
    wanted = {"tensor(float)", "tensor(float16)"}
    return {each.type_param_str for each in schema.type_constraints if wanted <= set(each.allowed_type_strs)}


def _admits_half(node: ir.Node, model: ir.Model) -> bool:
    """Whether ONNX has the operator in FP16 at all, and this node of it in FP32 now."""
    schema = graphs.schema_of(node, model)
    in_fp32 = any(value is not None and value.dtype == ir.DataType.FLOAT for value in (*node.inputs, *node.outputs))
    return schema is not None and in_fp32 and bool(halves(schema))
