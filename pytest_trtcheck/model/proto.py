"""A model as `onnx` alone reads it: large weights left in the file, graphs inside graphs, and what constants hold."""

from __future__ import annotations

import math
from contextlib import suppress
from os import SEEK_END
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_trtcheck.record.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import onnx

LARGE_MODEL = 64 << 20
"""Bytes from which on a model's weights are not to be in memory more often than they must."""
_LARGE_WEIGHT = 1 << 16
_DEEPEST = 100
"""Messages in messages, as far as protobuf itself follows them."""
_MOST_FIELDS = 1 << 22
"""That are looked at one by one, which takes seconds."""


def load(path: Path) -> onnx.ModelProto:
    """The model at `path`; external data stays where it is.

    So do the weights of a large file, which protobuf would have in memory twice, as bytes and as what becomes of them:
    each refers to its place in the file, by the file's absolute path. `is_held` tells such a reference.

    Raises
    ------
    OSError
        The file cannot be read.
    google.protobuf.message.DecodeError
        It is no protobuf message.
    """
    import onnx

    if path.stat().st_size > LARGE_MODEL:
        # What is wrong with the file, protobuf says itself.
        with suppress(ValueError, IndexError, OSError), open_regular(path) as file:
            light = _WithoutWeights(file, path).message(0, file.seek(0, SEEK_END), onnx.ModelProto.DESCRIPTOR)
            found: onnx.ModelProto = onnx.ModelProto.FromString(light)
            return found
    return onnx.load(path, load_external_data=False)


def is_held(tensor: onnx.TensorProto, path: Path) -> bool:
    """Whether the model's file at `path` holds a weight itself, from which `load` left it out."""
    return any(entry.key == "location" and entry.value == str(path.absolute()) for entry in tensor.external_data)


class _WithoutWeights:
    """Messages of protobuf's wire format, with references where a file holds large weights.

    The file is not mapped: who cuts it off meanwhile would end this process.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = str(path.absolute())
        self._fields = 0

    def message(self, start: int, stop: int, kind: Any, depth: int = 0) -> bytes:
        """The message of a kind between two places.

        Raises
        ------
        ValueError, IndexError
            There is none that protobuf would take, or one whose parts are too many.
        """
        parts: list[bytes] = []
        kept_from = at = start
        while at < stop:
            self._fields += 1
            key, begin = self._number(at)
            wire_type = key & 7
            if wire_type == 2:  # a length, and so many bytes
                size, begin = self._number(begin)
                end = begin + size
            elif wire_type == 0:
                size, (_, end) = 0, self._number(begin)
            else:
                size, end = 0, begin + {1: 8, 5: 4}.get(wire_type, stop)
            if end > stop or depth > _DEEPEST or self._fields > _MOST_FIELDS:
                raise ValueError
            field = kind.fields_by_number.get(key >> 3) if size >= _LARGE_WEIGHT else None
            if field is not None and field.full_name == "onnx.TensorProto.raw_data":
                parts += self._between(kept_from, at), self._reference(begin, size)
                kept_from = end
            elif field is not None and field.message_type is not None:
                inner = self.message(begin, end, field.message_type, depth + 1)
                parts += self._between(kept_from, at), _varint(key), _varint(len(inner)), inner
                kept_from = end
            at = end
        return b"".join((*parts, self._between(kept_from, stop)))

    def _between(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        found = self._file.read(stop - start)
        if len(found) < stop - start:
            raise ValueError
        return found

    def _reference(self, offset: int, length: int) -> bytes:
        import onnx

        tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", self._path), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        return bytes(tensor.SerializeToString())

    def _number(self, at: int) -> tuple[int, int]:
        """A number, seven bits a byte from the lowest on, and where it ends."""
        number = 0
        self._file.seek(at)  # within what is buffered, mostly
        for shift in range(0, 70, 7):
            byte = self._file.read(1)[0]
            number |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                return number, at
        raise ValueError


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside an If, Loop or Scan node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """`nodes` and those of the graphs inside them."""
    for node in nodes:
        yield node
        for inner in bodies(node):
            yield from all_nodes(inner.node)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and the graphs inside its nodes."""
    yield graph
    for node in all_nodes(graph.node):
        yield from bodies(node)


SMALL_WEIGHT = 1 << 10
"""Elements up to which a weight can be the shape, the axes or the sizes that an operator is told."""


def elements(tensor: onnx.TensorProto) -> list[Any] | None:
    """A small weight's elements; None for a large one, and where they lie in another file."""
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > SMALL_WEIGHT:
        return None
    found: list[Any] = onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
    return found


def constant(node: onnx.NodeProto) -> list[Any] | None:
    """The elements of what a Constant node holds; None for large ones, strings, sparse tensors, and other nodes."""
    for attribute in node.attribute if node.op_type == "Constant" else ():
        if attribute.name == "value":
            return elements(attribute.t)
        if attribute.name in {"value_int", "value_float"}:
            return [attribute.i if attribute.name == "value_int" else attribute.f]
        if attribute.name in {"value_ints", "value_floats"}:
            return list(attribute.ints or attribute.floats)
    return None
