"""What a TensorFlow model computes, from tensors to tensors, and what tells it from others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence


@dataclass(frozen=True)
class Function:
    """What a TensorFlow model computes, from tensors to tensors.

    Parameters
    ----------
    compute
        Takes one tensor an input, in order, and gives the outputs by name.
    inputs
        Their tf.TensorSpec by name; None stands for a size that is left open.
    name
        The model's own.
    layers
        The names of its layers, where they are known.
    """

    compute: Callable[..., Mapping[str, Any]]
    inputs: Mapping[str, Any]
    name: str = ""
    layers: Collection[str] = ()

    def __call__(self, *tensors: Any) -> dict[str, Any]:
        """The outputs by the names that they have in ONNX, where no input has one of theirs."""
        from pytest_trtcheck.model.sources.exported import apart

        named = self.compute(*tensors)
        return dict(zip(apart(named, self.inputs), named.values(), strict=True))

    @cached_property
    def traced(self) -> Any:
        """Its tf.ConcreteFunction, whose outputs come in the order of their sorted names."""
        return self.traced_with(self.inputs.values())

    def traced_with(self, specs: Iterable[Any]) -> Any:
        """The same for inputs of these tf.TensorSpec."""
        import tensorflow as tf

        def compute(*tensors: Any) -> dict[str, Any]:
            # Each output has a node of its own, also where two of them are one tensor, or an input.
            return {name: tf.identity(value) for name, value in self(*tensors).items()}

        # A name of the user's may be none that TensorFlow takes: they are known by their place.
        numbered = [tf.TensorSpec(spec.shape, spec.dtype, f"input_{n}") for n, spec in enumerate(specs)]
        return tf.function(compute).get_concrete_function(*numbered)

    @cached_property
    def frozen(self) -> Any:
        """The traced function with its variables as constants, and everything it calls within it."""
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

        return convert_variables_to_constants_v2(self.traced, lower_control_flow=False, aggressive_inlining=True)

    @property
    def outputs(self) -> list[str]:
        """The names of its outputs, as `traced` orders them."""
        return sorted(self.traced.structured_outputs)


def identity_of(function: Function) -> str:
    """Of everything that a function computes: its graph, whatever its nodes are called, and its variables' values."""
    traced = function.traced
    graph = traced.graph.as_graph_def()
    arguments = [tensor.op.name for tensor in traced.inputs]
    results = [tensor.name for tensor in traced.outputs]
    digest = hashlib.sha256(_Meaning(graph.library).of(graph.node, arguments, results).encode())
    digest.update(repr([(name, spec.dtype.name, str(spec.shape)) for name, spec in function.inputs.items()]).encode())
    # Nodes of the export are named after these.
    digest.update(repr([function.outputs, function.name, sorted(function.layers)]).encode())
    variables = [variable.numpy() for variable in traced.variables]
    constants = [value.numpy() for value in traced.captured_inputs if value.dtype.name != "resource"]
    for array in (*variables, *constants):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class _Meaning:
    """Hashes of graphs and functions, the same in every trace: TensorFlow numbers names through the process."""

    _NO_MEANING = frozenset({"config", "config_proto", "container", "executor_type", "shared_name"})

    def __init__(self, library: Any) -> None:
        self._functions = {function.signature.name: function for function in library.function}
        self._known: dict[str, str] = {}

    def of(self, nodes: Iterable[Any], arguments: Iterable[str], results: Sequence[str]) -> str:
        """Of what `results` are, computed from `arguments`; each node's hash holds those of what it reads."""
        by_name = {node.name: node for node in nodes}
        found = {name: f"argument {place}" for place, name in enumerate(arguments)}
        waiting = [_source(each) for each in results]
        while waiting:
            node = by_name.get(waiting[-1])
            if node is None or node.name in found:
                waiting.pop()
            elif unknown := [each for each in map(_source, node.input) if each not in found and each in by_name]:
                waiting += unknown
            else:
                found[waiting.pop()] = self._node(node, found)
        return _hashed(*(self._read(each, found) for each in results))

    def _node(self, node: Any, found: Mapping[str, str]) -> str:
        attributes = [
            f"{name} {self._attribute(node.attr[name])}"
            for name in sorted(node.attr)
            if name not in self._NO_MEANING and not name.startswith("_")
        ]
        return _hashed(node.op, *attributes, *(self._read(each, found) for each in node.input))

    def _read(self, text: str, found: Mapping[str, str]) -> str:
        source = _source(text)
        return text.replace(source, found.get(source, source), 1)

    def _attribute(self, value: Any) -> str:
        called = [value.func] if value.HasField("func") else value.list.func
        if called:
            return " ".join(self._function(each.name) for each in called)
        data: bytes = value.SerializeToString(deterministic=True)
        return data.hex()

    def _function(self, name: str) -> str:
        function = self._functions.get(name)
        if function is None:
            return name
        if name not in self._known:
            arguments = [each.name for each in function.signature.input_arg]
            results = [function.ret[each.name] for each in function.signature.output_arg]
            self._known[name] = self.of(function.node_def, arguments, results)
        return self._known[name]


def _source(text: str) -> str:
    """The node that an input of a node names: "name", "name:0", "name:output:0" or "^name"."""
    return text.removeprefix("^").partition(":")[0]


def _hashed(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
