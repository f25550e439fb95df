"""Pieces of a model that run by themselves, with what measures the values in them.

Pieces are many, and they are protobuf, not onnx_ir: one of a real model of 100 to 600 nodes is cut and serialized in
0.2 to 6 ms, where `onnx_ir.convenience.extract` and serializing what it gives takes 2 to 39 ms, 6 to 21 times as long.
The weights of a model lie in files that all its pieces share, so that a piece holds little more than its nodes.
"""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.model.ort_runner import OrtRunner

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]
Message = TypeVar("Message", onnx.ModelProto, onnx.NodeProto, onnx.TensorProto, onnx.ValueInfoProto)

LARGE_BYTES = 1 << 16
"""Weights from this size on lie in a file of their own; smaller ones travel in each piece that needs them."""
_PAGE = 1 << 16
"""Where a weight may begin so that it can be mapped, on every system."""
_AXES_AS_INPUT = 18
"""The opset from which on reductions take their axes as an input."""


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
        described = (*proto.graph.value_info, *proto.graph.output)
        self._types = {value.name: value.type for value in described if value.type.WhichOneof("value")}
        self._constant: dict[str, bool] = {}

    @classmethod
    def stage(cls, path: Path, folder: Path, name: str) -> Graph:
        """The model at `path`, whose nodes are all named, its large weights in files in `folder`."""
        proto = onnx.load(path, load_external_data=False)
        own = folder / f"{name}.weights"
        copies: dict[str, str] = {}
        with own.open("wb") as file:
            for tensor in _initializers(proto.graph):
                if tensor.data_location == TensorProto.EXTERNAL:
                    _relocate(tensor, path.parent, folder, name, copies)
                elif len(tensor.raw_data) >= LARGE_BYTES:
                    append(file, tensor.raw_data, tensor)
        # Parsed anew: protobuf gives the memory of a cleared field back with its message, not before.
        return cls(onnx.ModelProto.FromString(proto.SerializeToString()), folder)

    def with_nodes(self, nodes: Iterable[onnx.NodeProto]) -> Graph:
        """The same with other nodes."""
        proto = copied(self.proto)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        return Graph(proto, self.folder)

    def reads(self, node: int) -> tuple[str, ...]:
        """What a node reads: computed values, weights and inputs, those that its inner graphs read too."""
        return self._reads[node]

    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return opset(self.proto)

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

    def is_tensor(self, name: str) -> bool:
        """False for what the file declares to be a sequence or an optional."""
        return name not in self._types or self._types[name].HasField("tensor_type")

    def element_type(self, name: str) -> int | None:
        """The ONNX element type that the file states for a computed value."""
        return self._types[name].tensor_type.elem_type or None if name in self._types else None

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """The dimensions that the file states for a computed value, None for an open one; None where it states none."""
        if name not in self._types or not self._types[name].tensor_type.HasField("shape"):
            return None
        dims = self._types[name].tensor_type.shape.dim
        # Some exporters write -1 for what is open.
        return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims)

    def static_size(self, name: str) -> int | None:
        """The number of elements, where the file states every dimension."""
        shape = self.shape(name)
        stated = [dim for dim in shape or () if dim is not None]
        return None if shape is None or len(stated) < len(shape) else math.prod(stated)

    def array(self, weight: str) -> NDArray[Any]:
        """The values of a weight."""
        return numpy_helper.to_array(self.weights[weight], base_dir=str(self.folder))

    def elements(self, weight: str) -> int:
        """How many values a weight has."""
        return math.prod(self.weights[weight].dims)

    def cut(self, wanted: Iterable[str], given: Collection[str] = ()) -> Piece:
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
                if name in given or name in self.inputs:
                    boundary[name] = None
                elif name in self.producers:
                    stack.append(self.producers[name])
        computed = {name for index in nodes for name in self.nodes[index].output}
        return Piece(tuple(sorted(nodes)), tuple(name for name in boundary if name not in computed), wanted)

    def values(self, wanted: Iterable[str], case: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computed values by name."""
        piece = self.cut(wanted)
        return run(self, [self.nodes[index] for index in piece.nodes], {n: case[n] for n in piece.given}, piece.wanted)

    def declared_inputs(self) -> list[onnx.ValueInfoProto]:
        """The inputs as the file describes them."""
        return [value for value in self.proto.graph.input if value.name in self.inputs]


def assemble(
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[str | onnx.ValueInfoProto],
    *owners: Graph,
) -> onnx.ModelProto:
    """A model of the operator sets of the first of `owners`, with the weights of any that `nodes` name."""
    like = owners[0].proto
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


def run(
    graph: Graph,
    nodes: Sequence[onnx.NodeProto],
    feeds: Mapping[str, NDArray[Any]],
    outputs: Iterable[str],
    *more_owners: Graph,
) -> Arrays:
    """What `nodes`, whose weights are those of `graph` or of `more_owners`, compute from `feeds`.

    Raises
    ------
    ModelError
        ONNX Runtime cannot run them.
    """
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.STRING
            if array.dtype.kind in "OUST"
            else helper.np_dtype_to_tensor_dtype(array.dtype.newbyteorder("=")),
            list(array.shape),
        )
        for name, array in feeds.items()
    ]
    path = write(assemble(nodes, inputs, outputs, graph, *more_owners), graph.folder, "piece")
    with closing(OrtRunner(path, "a piece of the model")) as runner:
        return runner(feeds)


def write(model: onnx.ModelProto, folder: Path, name: str) -> Path:
    """The file of a piece whose weights lie in `folder`; it takes the place of one by the same name."""
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


class Instruments:
    """Nodes that measure values of a graph: what they give has a name of its own, and may be an output.

    Parameters
    ----------
    version
        The version of ONNX's own operators.
    """

    def __init__(self, version: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._version = version
        self._constants: dict[str, TensorProto] = {}
        self._count = 0

    def model(self, outputs: Iterable[str], *owners: Graph) -> onnx.ModelProto:
        """The nodes as a model with the inputs of the last of `owners`, of which they name values and weights."""
        model = assemble(self.nodes, owners[-1].declared_inputs(), outputs, *owners)
        model.graph.initializer.extend(self._constants.values())
        return model

    def compute(self, graph: Graph, wanted: Iterable[str]) -> None:
        """Take in the nodes of `graph` that compute these."""
        self.nodes += [graph.nodes[index] for index in graph.cut(wanted).nodes]

    def op(self, kind: str, *operands: str, **attributes: Any) -> str:
        """The result of an operator."""
        self._count += 1
        name = f"trtcheck//{self._count}"
        self.nodes.append(helper.make_node(kind, list(operands), [name], name, **attributes))
        return name

    def reduce(self, kind: str, x: str, axes: Sequence[int] | None = None) -> str:
        """A reduction over some axes, or all of them."""
        if axes is None:
            return self.op(kind, x, keepdims=0)
        if self._version >= _AXES_AS_INPUT:
            return self.op(kind, x, self.constant(np.array(axes, np.int64)), keepdims=0)
        return self.op(kind, x, keepdims=0, axes=list(axes))

    def how_many(self, condition: str) -> str:
        """How many elements are true."""
        # In FP64: FP32 counts no further than 2²⁴.
        return self.reduce("ReduceSum", self.op("Cast", condition, to=TensorProto.DOUBLE))

    def outside(self, x: str, low: float, high: float) -> str:
        """How many elements of an FP32 value lie outside a range."""
        return self.how_many(
            self.op("Or", self.op("Greater", x, self.scalar(high)), self.op("Less", x, self.scalar(low)))
        )

    def scalar(self, value: float, dtype: Any = np.float32) -> str:
        """A constant."""
        return self.constant(np.array(value, dtype))

    def constant(self, array: NDArray[Any]) -> str:
        """A constant."""
        name = f"trtcheck//{array.dtype.name}{array.shape}{array.tolist()}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return name


def opset(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=1)


def copied(message: Message, **changes: Any) -> Message:
    """A copy, with fields set."""
    copy = type(message)()
    copy.CopyFrom(message)
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node and the nodes of its inner graphs read."""
    yield from (name for name in node.input if name)
    for body in bodies(node):
        for inner in body.node:
            yield from reads(inner)
        yield from (value.name for value in body.output)


def rename_reads(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let `node` and the graphs inside it read values by their new names."""
    node.input[:] = [names.get(name, name) for name in node.input]
    rename_inside(node, names)


def rename_inside(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let the graphs inside `node` read outer values by their new names."""
    for body in bodies(node):
        for inner in body.node:
            rename_reads(inner, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)


def inner_names(node: onnx.NodeProto) -> Iterator[str]:
    """The names of the nodes inside a node's graphs."""
    for body in bodies(node):
        for inner in body.node:
            yield inner.name
            yield from inner_names(inner)


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The weights of a graph and of those inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for body in bodies(node):
            yield from _initializers(body)


def append(file: BinaryIO, data: bytes | memoryview, tensor: onnx.TensorProto) -> None:
    """Write what a weight holds to the end of a file beside its model, and let the weight refer to it alone."""
    file.write(b"\0" * (-file.tell() % _PAGE))
    offset, length = file.tell(), file.write(data)
    tensor.raw_data = b""  # onnx refers none without that field.
    onnx.external_data_helper.set_external_data(tensor, Path(file.name).name, offset, length)
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
