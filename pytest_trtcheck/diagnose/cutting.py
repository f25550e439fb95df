"""Cutting models into pieces that run by themselves.

Pieces are many, and they are protobuf, not onnx_ir: making one costs a millisecond. The weights of a model lie in files
that all its pieces share, so that a piece holds little more than its nodes.
"""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto

from pytest_trtcheck.model.onnxruntime import OrtRunner

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]

_SHARED_BYTES = 1 << 16
"""Weights from this size on lie in a file of their own; smaller ones travel in each piece that needs them."""
_PAGE = 1 << 16
"""Where a weight may begin so that it can be mapped, on every system."""


@dataclass(frozen=True)
class Piece:
    """Nodes that compute `wanted` from `given`, in an order in which they can run; `given` are the names they read."""

    nodes: tuple[int, ...]
    given: tuple[str, ...]
    wanted: tuple[str, ...]


class Graph:
    """A model's main graph, its nodes in an order in which they can run.

    Parameters
    ----------
    proto
        The model, its large weights in files in `folder`.
    folder
        Where pieces are written.
    """

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self.proto = proto
        self.folder = folder
        self.nodes: list[onnx.NodeProto] = list(proto.graph.node)
        self.weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.inputs = tuple(value.name for value in proto.graph.input if value.name not in self.weights)
        self.outputs = tuple(value.name for value in proto.graph.output)
        self.producers = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        known = {*self.producers, *self.weights, *self.inputs}
        self._reads = [tuple(name for name in reads(node) if name in known) for node in self.nodes]
        self._described = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
        self._constant: dict[str, bool] = {}

    @classmethod
    def stage(cls, path: Path, folder: Path, name: str) -> Graph:
        """The model at `path`, whose nodes are all named, its large weights in files in `folder`."""
        proto = onnx.load(path, load_external_data=False)
        own = folder / f"{name}.weights"
        copies: dict[str, str] = {}
        with own.open("wb") as file:
            for tensor in initializers(proto.graph):
                if tensor.data_location == TensorProto.EXTERNAL:
                    _relocate(tensor, path.parent, folder, name, copies)
                elif len(tensor.raw_data) >= _SHARED_BYTES:
                    _move_out(tensor, file, own.name)
        # Parsed anew: protobuf gives the memory of a cleared field back with its message, not before.
        return cls(onnx.ModelProto.FromString(proto.SerializeToString()), folder)

    def reads(self, node: int) -> tuple[str, ...]:
        """What a node reads: computed values, weights and inputs, those that its inner graphs read too."""
        return self._reads[node]

    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return max((entry.version for entry in self.proto.opset_import if entry.domain in {"", "ai.onnx"}), default=1)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that computes `name`."""
        index = self.producers.get(name)
        return None if index is None else self.nodes[index]

    def is_constant(self, name: str) -> bool:
        """Whether `name` is a weight or computed from weights alone."""
        found = self._constant.get(name)
        if found is None:
            index = self.producers.get(name)
            if index is None:
                found = name in self.weights
            else:
                found = bool(self._reads[index]) and all(self.is_constant(each) for each in self._reads[index])
            self._constant[name] = found
        return found

    def element_type(self, name: str) -> int | None:
        """The ONNX element type that the file states for a computed value."""
        value = self._described.get(name)
        return value.type.tensor_type.elem_type or None if value is not None else None

    def is_tensor(self, name: str) -> bool:
        """False for what the file declares to be a sequence or an optional."""
        value = self._described.get(name)
        return value is None or value.type.WhichOneof("value") in {None, "tensor_type"}

    def rank(self, name: str) -> int | None:
        """The number of dimensions, where the file states it."""
        value = self._described.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return len(value.type.tensor_type.shape.dim)

    def static_size(self, name: str) -> int | None:
        """The number of elements, where the file states every dimension."""
        value = self._described.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        dims = value.type.tensor_type.shape.dim
        # Some exporters write -1 for what is open.
        stated = all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in dims)
        return math.prod(dim.dim_value for dim in dims) if stated else None

    def cut(self, wanted: Iterable[str], given: Collection[str]) -> Piece:
        """The piece that computes `wanted`, going back no further than `given` and the model's inputs."""
        wanted = tuple(wanted)
        nodes: set[int] = set()
        boundary: dict[str, None] = {}
        stack = [self.producers[name] for name in wanted if name in self.producers]
        while stack:
            index = stack.pop()
            if index in nodes:
                continue
            nodes.add(index)
            for name in self._reads[index]:
                if name in given or (name in self.inputs):
                    boundary[name] = None
                elif name in self.producers:
                    stack.append(self.producers[name])
        computed = {name for index in nodes for name in self.nodes[index].output}
        return Piece(tuple(sorted(nodes)), tuple(name for name in boundary if name not in computed), wanted)

    def model(
        self, nodes: Sequence[onnx.NodeProto], feeds: Mapping[str, NDArray[Any]], outputs: Iterable[str]
    ) -> onnx.ModelProto:
        """A model of these nodes; weights that they name are this graph's."""
        return assemble(self.proto, nodes, [_described(name, array) for name, array in feeds.items()], outputs, [self])

    def run(self, piece: Piece, values: Mapping[str, NDArray[Any]]) -> Arrays:
        """What `piece` computes from `values`."""
        feeds = {name: values[name] for name in piece.given}
        model = self.model([self.nodes[index] for index in piece.nodes], feeds, piece.wanted)
        return run(model, self.folder, feeds)


def assemble(
    like: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[str | onnx.ValueInfoProto],
    owners: Sequence[Graph],
) -> onnx.ModelProto:
    """A model of the operator sets of `like`, with the weights of `owners` that `nodes` name."""
    model = onnx.ModelProto(ir_version=like.ir_version)
    model.opset_import.extend(like.opset_import)
    graph = model.graph
    graph.name = "piece"
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    for output in outputs:
        graph.output.append(onnx.ValueInfoProto(name=output) if isinstance(output, str) else output)
    taken = {value.name for value in graph.input}
    for name in dict.fromkeys(name for node in nodes for name in reads(node)):
        owner = next((each for each in owners if name in each.weights), None)
        if owner is not None and name not in taken:
            graph.initializer.append(owner.weights[name])
    return model


def run(model: onnx.ModelProto, folder: Path, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    """Run a model whose weights lie in `folder`, once.

    Raises
    ------
    ModelError
        ONNX Runtime cannot run it.
    """
    path = folder / "piece.onnx"
    path.write_bytes(model.SerializeToString())
    with closing(OrtRunner(path, "a piece of the model")) as runner:
        return runner(feeds)


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node and the nodes of its inner graphs read."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
            for inner in graph.node:
                yield from reads(inner)
            yield from (value.name for value in graph.output)


def initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The weights of a graph and of those inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from initializers(inner)


def rename_reads(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let `node` and the graphs inside it read values by their new names."""
    node.input[:] = [names.get(name, name) for name in node.input]
    rename_inside(node, names)


def rename_inside(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let the graphs inside `node` read outer values by their new names."""
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
            for inner in graph.node:
                rename_reads(inner, names)
            for value in graph.output:
                value.name = names.get(value.name, value.name)


def inner_names(node: onnx.NodeProto) -> Iterator[str]:
    """The names of the nodes inside a node's graphs."""
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
            for inner in graph.node:
                yield inner.name
                yield from inner_names(inner)


def weight_array(tensor: onnx.TensorProto, folder: Path) -> NDArray[Any]:
    """The values of a weight of a staged graph."""
    return onnx.numpy_helper.to_array(tensor, base_dir=str(folder))


def _described(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    kind = (
        TensorProto.STRING
        if array.dtype.kind in "OUST"
        else onnx.helper.np_dtype_to_tensor_dtype(array.dtype.newbyteorder("="))
    )
    return onnx.helper.make_tensor_value_info(name, kind, list(array.shape))


def _move_out(tensor: onnx.TensorProto, file: Any, location: str) -> None:
    file.write(b"\0" * (-file.tell() % _PAGE))
    offset, length = file.tell(), file.write(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, location, offset, length)
    tensor.ClearField("raw_data")


def _relocate(tensor: onnx.TensorProto, source: Path, folder: Path, name: str, copies: dict[str, str]) -> None:
    """Let an external weight be found from `folder`: runtimes look beside the model alone, and follow no links."""
    if source == folder:
        return
    for entry in tensor.external_data:
        if entry.key != "location":
            continue
        if entry.value not in copies:
            copies[entry.value] = f"{name}-{len(copies)}.weights"
            shutil.copyfile(source / entry.value, folder / copies[entry.value])
        entry.value = copies[entry.value]
