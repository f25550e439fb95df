"""The weights of a large emulated model as the FP32 numbers that they stand for, in a file that ONNX Runtime maps.

Stored in fewer bits they are smaller, but ONNX Runtime computes their FP32 values each time it loads the model, and
then holds them two or three times. What a file holds in FP32 it maps, and lets go once it has laid it out for a kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pytest_trtcheck.model.graph import ONNX_DOMAINS
from pytest_trtcheck.model.pieces import LARGE_BYTES, Graph, append

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray


def fold(source: Path, path: Path) -> None:
    """Write the model at `source` to `path`, with what it makes of its weights alone, as ONNX Runtime computes that.

    Raises
    ------
    ModelError
        ONNX Runtime cannot compute it.
    """
    graph = Graph(onnx.load(source, load_external_data=False), source.parent)
    data = path.with_name(f"{path.name}.data")
    folded = {}
    with data.open("wb") as file:

        def moved(name: str, array: NDArray[Any]) -> onnx.TensorProto:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=dtype)
            append(file, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, tensor)
            return tensor

        for name in _made_of_weights(graph):
            (array,) = graph.values([name], {}).values()
            # An Expand of one number is no weight, and may be of any size.
            if array.nbytes >= LARGE_BYTES and array.size <= _most_elements(graph, name):
                folded[name] = moved(name, array)
            del array  # before there is another one
        needed = graph.cut(graph.outputs, given=folded)
        read = {name for node in needed.nodes for name in graph.reads(node)}
        kept = []
        for name, tensor in graph.weights.items():
            if name in read or name in graph.outputs:
                is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
                kept.append(moved(name, graph.array(name)) if is_external else tensor)
    model = graph.with_nodes(graph.nodes[node] for node in needed.nodes).proto
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *folded.values()])
    onnx.save(model, path)


def _made_of_weights(graph: Graph) -> Iterator[str]:
    """What ONNX's nodes compute from weights alone, where another node, or the model's user, reads more than that."""
    users = (graph.reads(node) for node, each in enumerate(graph.nodes) if not graph.is_constant(each.output[0]))
    for name in dict.fromkeys(name for names in users for name in names):
        if name in graph.producers and graph.is_constant(name) and graph.is_tensor(name):
            makers = [graph.nodes[index] for index in graph.cut([name]).nodes]
            # Operators of a user's library are left to the session that has it.
            if all(node.domain in ONNX_DOMAINS for node in makers):
                yield name


def _most_elements(graph: Graph, name: str) -> int:
    """The elements of the largest of the weights that a value is made of."""
    read = {weight for node in graph.cut([name]).nodes for weight in graph.reads(node) if weight in graph.weights}
    return max(graph.elements(weight) for weight in read)
