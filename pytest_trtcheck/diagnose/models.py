"""The FP32 model and its emulated twin, side by side: which tensors are the same, and what each is held in."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnx import TensorProto

from pytest_trtcheck.choices import with_pairs
from pytest_trtcheck.diagnose import unrolling
from pytest_trtcheck.diagnose.statistics import BF16, FP16, FloatType, Span
from pytest_trtcheck.diagnose.unrolling import Unrolled
from pytest_trtcheck.errors import CheckError, ModelError
from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.pieces import Graph, copied

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

    from pytest_trtcheck.spec import Precision

_HALVES: Mapping[int, FloatType] = {TensorProto.FLOAT16: FP16, TensorProto.BFLOAT16: BF16}
_LEVELS: Mapping[int, tuple[float, float]] = {
    TensorProto.INT8: (-128.0, 127.0),
    TensorProto.UINT8: (0.0, 255.0),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0),
}
"""The least and the largest step of each type that activations are quantized to."""
_CHANNEL_AXES = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}
"""Where the operators that have weights by channel put their channels."""

ROUNDOFF: Mapping[Precision, float] = with_pairs(
    {
        "fp32": 2.0**-20,
        "tf32": 2.0**-11,
        "fp16": 2.0**-11,
        "bf16": 2.0**-8,
        "int8": 1e-2,
        "fp8": 2.0**-4,
    }
)
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
    unrolled
        What became of the control flow of the models that these are made from.
    """

    reference: Graph
    emulated: Graph
    lowered: Graph
    common: tuple[str, ...]
    held: Mapping[str, FloatType]
    spans: Mapping[str, Span]
    unrolled: Unrolled = field(default_factory=Unrolled)

    @functools.cached_property
    def quantized(self) -> frozenset[str]:
        """The lowered model's nodes that read what is quantized."""
        grids = {node.output[0] for node in self.lowered.nodes if node.op_type == "DequantizeLinear"}
        return frozenset(self.owner(node.name) for node in self.lowered.nodes if grids & set(node.input))

    def owner(self, node: str) -> str:
        """The node, in the models before anything was unrolled, that one of the FP32 graph's is an instance of."""
        return self.unrolled.nodes.get(node, node)

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The common tensors, to look names up in."""
        return frozenset(self.common)

    def node_of(self, tensor: str) -> onnx.NodeProto:
        """The FP32 model's node that computes a common tensor."""
        return self.reference.nodes[self.reference.producers[tensor]]

    @functools.cached_property
    def reference_nodes(self) -> Mapping[str, onnx.NodeProto]:
        """The FP32 model's nodes by name."""
        return {node.name: node for node in self.reference.nodes}

    @functools.cached_property
    def emulated_nodes(self) -> Mapping[str, onnx.NodeProto]:
        """The emulated model's nodes by name."""
        return {node.name: node for node in self.emulated.nodes}

    def twin(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The FP32 model's node behind an emulated one, if their operands correspond."""
        found = self.reference_nodes.get(node.name)
        return found if found is not None and _alike(found, node) else None

    def twin_inputs(self, node: onnx.NodeProto) -> list[str]:
        """The emulated model's names of what an FP32 node reads."""
        twin = self.emulated_nodes.get(node.name)
        if twin is not None and _alike(twin, node):
            return list(twin.input)
        own = {name: _own(name) for name in node.input}
        return [own[name] if own[name] in self.emulated.weights else name for name in node.input]

    def channel_axis(self, tensor: str) -> int | None:
        """The axis of channels of a tensor whose operator has weights by channel, where its rank is known."""
        axis, rank = _CHANNEL_AXES.get(self.node_of(tensor).op_type), len(self.reference.shape(tensor) or ())
        return None if axis is None or rank < 2 else axis % rank


def _alike(one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    return one.op_type == other.op_type and len(one.input) == len(other.input)


def stage(
    float_path: Path,
    emulated_path: Path,
    lowered_path: Path,
    original: Path,
    folder: Path,
    *,
    case: Mapping[str, NDArray[Any]] | None = None,
) -> Pair:
    """Put both models into `folder`, their nodes named as the lowering names them.

    Parameters
    ----------
    original
        The user's file: where one of the paths is this one, its nodes may have no names yet.
    case
        The input for which control flow is unrolled; None: it stays.

    Raises
    ------
    ModelError
        The two have no tensor in common.
    """
    emulated = staged(emulated_path, original, folder, "emulated")
    reference = staged(float_path, original, folder, "reference")
    if reference.opset() < emulated.opset():
        # The lowering raised the opset; nodes of both go into one model later.
        from pytest_trtcheck.model import graph

        model = graph.at_least_opset(graph.read(float_path), emulated.opset())
        reference = Graph.stage(_write(model, folder / "raised.onnx"), folder, "raised")
    lowered = staged(lowered_path, original, folder, "lowered")
    unrolled = Unrolled()
    if case is not None and unrolling.has_control_flow(reference.proto):
        protos = [copied(each.proto) for each in (reference, emulated, lowered)]
        try:
            unrolled = unrolling.unroll(protos, 2, case, folder)
            reference, emulated, lowered = (Graph(proto, folder) for proto in protos)
        except CheckError as error:
            unrolled = Unrolled(notes=[f"what happens inside control flow could not be looked at: {error.message}"])
    reference = _without_identities(reference, lowered)
    widened = _widened(reference, lowered)
    emulated = _with_own_weights(_read_as(emulated, widened))
    common = tuple(
        name
        for node in reference.nodes
        for name in node.output
        if name in emulated.producers and reference.is_tensor(name) and emulated.is_tensor(name)
        if not reference.is_constant(name)
    )
    if not common:
        raise ModelError("the lowered model has no tensor in common with the FP32 model, so no error can be traced")
    return Pair(
        reference, emulated, lowered, common, _held(lowered.proto, widened), _spans(lowered, reference), unrolled
    )


def _widened(reference: Graph, lowered: Graph) -> dict[str, str]:
    """From 16-bit values that the lowering gave another name to the FP32 outputs that took their names over."""
    return {
        node.input[0]: node.output[0]
        for node in lowered.nodes
        if node.op_type == "Cast" and node.output[0] in reference.producers
        if node.input[0] not in reference.producers and node.input[0] not in reference.inputs
    }


def _read_as(emulated: Graph, names: Mapping[str, str]) -> Graph:
    """The emulated graph, where a value under its other name is the same, with all reading it under the one name."""
    casts = {node.input[0]: node for node in emulated.nodes if node.op_type == "Cast" and node.input[0] in names}
    casts = {name: node for name, node in casts.items() if node.output[0] == names[name] and name in emulated.producers}
    if not casts:
        return emulated
    renamed = {name: names[name] for name in casts}
    nodes: list[onnx.NodeProto] = []
    for node in emulated.nodes:
        if casts.get(node.input[0] if node.input else "") is not node:
            nodes.append(copied(node))
            pieces.rename_reads(nodes[-1], renamed)
            nodes += [casts[name] for name in node.output if name in casts]
    return emulated.with_nodes(nodes)


def _own(weight: str) -> str:
    return f"{weight}//lowered"


def _with_own_weights(emulated: Graph) -> Graph:
    """The emulated graph, its weights under names that the FP32 graph's don't bear: both go into one model."""
    names = {name: _own(name) for name in emulated.weights}
    for tensor in emulated.weights.values():
        tensor.name = names[tensor.name]
    for node in emulated.nodes:
        pieces.rename_reads(node, names)
    return Graph(emulated.proto, emulated.folder)


def _without_identities(reference: Graph, lowered: Graph) -> Graph:
    """The FP32 graph without what stands there for a pair of Q and DQ: an operator reads the tensor that is quantized.

    What the pair loses is then lost by the operator, as it is where the lowering put the pair.
    """
    quantizes = {node.output[0] for node in lowered.nodes if node.op_type == "QuantizeLinear"}
    dequantizes = (node for node in lowered.nodes if node.op_type == "DequantizeLinear" and node.input[0] in quantizes)
    paired = {node.output[0] for node in dequantizes} - set(reference.outputs)
    sources: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in reference.nodes:
        pieces.rename_reads(node, sources)
        if node.op_type == "Identity" and node.output[0] in paired:
            sources[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    return reference.with_nodes(kept) if sources else reference


def staged(path: Path, original: Path, folder: Path, name: str) -> Graph:
    """The model at `path`, its nodes named as the lowering names them, in `folder`."""
    return Graph.stage(named(path, original, folder / f"{name}.onnx"), folder, name)


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


def _held(lowered: onnx.ModelProto, widened: Mapping[str, str]) -> dict[str, FloatType]:
    values = (*lowered.graph.value_info, *lowered.graph.output, *lowered.graph.input)
    found = {value.name: _HALVES.get(value.type.tensor_type.elem_type) for value in values}
    # The inputs and outputs of graphs stay FP32, with a cast behind or before them: what counts is the type in there.
    for name, output in widened.items():
        found[output] = found.get(name) or found.get(output)
    inputs = {value.name for value in lowered.graph.input}
    for node in lowered.graph.node:
        if node.op_type == "Cast" and node.input[0] in inputs and found.get(node.output[0]) is not None:
            found[node.input[0]] = found[node.output[0]]
    return {name: kind for name, kind in found.items() if kind is not None}


def _spans(graph: Graph, reference: Graph) -> dict[str, Span]:
    """The ranges that QuantizeLinear nodes give to computed tensors and inputs; per tensor alone."""
    found: dict[str, Span] = {}
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or graph.is_constant(node.input[0]):
            continue
        zero = node.input[2] if len(node.input) > 2 else ""
        if node.input[1] not in graph.weights or (zero and zero not in graph.weights):
            continue
        step = graph.array(node.input[1])
        kind = graph.weights[zero].data_type if zero else TensorProto.UINT8
        if step.size != 1 or kind not in _LEVELS:
            continue
        low, high = _LEVELS[kind]
        offset = float(graph.array(zero).reshape(-1)[0]) if zero else 0.0
        size = float(step.reshape(-1)[0])
        roundoff = 2.0**-4 if kind == TensorProto.FLOAT8E4M3FN else 0.0
        found[node.input[0]] = Span((low - offset) * size, (high - offset) * size, size, roundoff)
        # A 16-bit input goes by another name behind the cast that makes it FP32.
        if (widened := f"{node.input[0]}/float") in reference.producers:
            found[widened] = found[node.input[0]]
    return found
