"""The FP32 model and its emulated twin, side by side: which tensors are the same, and what each is held in."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from pytest_trtcheck.diagnose.cutting import Graph, weight_array
from pytest_trtcheck.diagnose.statistics import BF16, FP16, FloatType, Span
from pytest_trtcheck.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir

    from pytest_trtcheck.spec import Precision

_HALVES: Mapping[int, FloatType] = {TensorProto.FLOAT16: FP16, TensorProto.BFLOAT16: BF16}
_LEVELS: Mapping[int, tuple[float, float]] = {
    TensorProto.INT8: (-128.0, 127.0),
    TensorProto.UINT8: (0.0, 255.0),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0),
}
"""The least and the largest step of each type that activations are quantized to."""

ROUNDOFF: Mapping[Precision, float] = {
    "fp32": 2.0**-20,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "int8": 1e-2,
    "fp8": 2.0**-4,
}
"""The relative error that one sound operator adds, roughly: half a step of the type; what 8-bit steps usually cost."""


@dataclass(frozen=True)
class Pair:
    """Two graphs that compute the same, one in FP32 and one as the lowered model does.

    Parameters
    ----------
    reference, emulated, lowered
        The FP32 model, the emulated one and the lowered one that it emulates, staged in one folder.
    common
        The computed tensors of the same name in both, in the order of the reference graph.
    held
        The 16-bit type that the lowered model holds a tensor in.
    spans
        The range of each activation tensor that is quantized.
    """

    reference: Graph
    emulated: Graph
    lowered: Graph
    common: tuple[str, ...]
    held: Mapping[str, FloatType]
    spans: Mapping[str, Span]

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The common tensors, to look names up in."""
        return frozenset(self.common)

    def node_of(self, tensor: str) -> onnx.NodeProto:
        """The FP32 model's node that computes a common tensor."""
        return self.reference.nodes[self.reference.producers[tensor]]


def stage(float_path: Path, emulated_path: Path, lowered_path: Path, original: Path, folder: Path) -> Pair:
    """Put both models into `folder`, their nodes named as the lowering names them.

    Parameters
    ----------
    float_path, emulated_path, lowered_path
        As `artifacts.float_path`, `artifacts.emulated_path` and `artifacts.lower` give them.
    original
        The user's file: where one of the paths is this one, its nodes may have no names yet.

    Raises
    ------
    ModelError
        The two have no tensor in common.
    """
    emulated = Graph.stage(named(emulated_path, original, folder / "emulated.onnx"), folder, "emulated")
    path = named(float_path, original, folder / "reference.onnx")
    reference = Graph.stage(path, folder, "reference")
    if reference.opset() < emulated.opset():
        # The lowering raised the opset; nodes of both go into one model later.
        path = _raised(path, emulated.opset(), folder / "raised.onnx")
        reference = Graph.stage(path, folder, "raised")
    common = tuple(
        name
        for node in reference.nodes
        for name in node.output
        if name in emulated.producers and reference.is_tensor(name) and emulated.is_tensor(name)
        if not reference.is_constant(name)
    )
    if not common:
        raise ModelError("the lowered model has no tensor in common with the FP32 model, so no error can be traced")
    lowered = Graph.stage(named(lowered_path, original, folder / "lowered.onnx"), folder, "lowered")
    return Pair(reference, emulated, lowered, common, _held(lowered.proto), _spans(lowered))


def named(path: Path, original: Path, target: Path) -> Path:
    """`path`, or where it is the user's own file a copy at `target` with named nodes and inferred types."""
    if path != original:
        return path
    from pytest_trtcheck.model import graph

    return _write(graph.read(path), target)


def _write(model: ir.Model, target: Path) -> Path:
    """With the weights in a file beside it, so that they are never in memory as a whole a second time."""
    import onnx_ir as ir

    ir.save(model, target, external_data=f"{target.name}.data")
    return target


def _raised(path: Path, opset: int, target: Path) -> Path:
    from pytest_trtcheck.model import graph

    return _write(graph.at_least_opset(graph.read(path), opset), target)


def _held(lowered: onnx.ModelProto) -> dict[str, FloatType]:
    values = (*lowered.graph.value_info, *lowered.graph.output, *lowered.graph.input)
    found = {value.name: _HALVES.get(value.type.tensor_type.elem_type) for value in values}
    # A model's inputs and outputs stay FP32, with a cast behind or before them: what counts is the type in there.
    inputs, outputs = ({value.name for value in each} for each in (lowered.graph.input, lowered.graph.output))
    for node in lowered.graph.node:
        if node.op_type == "Cast" and node.output[0] in outputs:
            found[node.output[0]] = found.get(node.input[0])
        if node.op_type == "Cast" and node.input[0] in inputs and found.get(node.output[0]) is not None:
            found[node.input[0]] = found[node.output[0]]
    return {name: kind for name, kind in found.items() if kind is not None}


def _spans(graph: Graph) -> dict[str, Span]:
    """The ranges that QuantizeLinear nodes give to computed tensors and inputs; per tensor alone."""
    found: dict[str, Span] = {}
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or graph.is_constant(node.input[0]):
            continue
        scale = graph.weights.get(node.input[1])
        if scale is None:
            continue
        step = weight_array(scale, graph.folder)
        if step.size != 1:
            continue
        zero = graph.weights.get(node.input[2]) if len(node.input) > 2 else None
        levels = _LEVELS.get(zero.data_type if zero is not None else TensorProto.UINT8)
        if levels is None:
            continue
        offset = float(np.asarray(weight_array(zero, graph.folder)).reshape(-1)[0]) if zero is not None else 0.0
        size = float(step.reshape(-1)[0])
        found[node.input[0]] = Span((levels[0] - offset) * size, (levels[1] - offset) * size, size)
    return found
