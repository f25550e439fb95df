"""Control flow as one input takes it: the branch of an If, the iterations of a Loop or Scan, as plain nodes.

What happens inside a body can be neither measured nor switched from outside. Unrolled, it is a graph like any other; a
node of a body is there once an iteration, and all of these bear, in `Unrolled.nodes`, the one name that `keep_fp32` has
for it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.ort_runner import OrtRunner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

REPEATING = frozenset({"Loop", "Scan"})
CONTROL_FLOW = frozenset({"If", *REPEATING})
MOST_NODES = 4000
"""Nodes up to which bodies are unrolled: each is there in three versions with what measures it."""
_AXES_AS_INPUT = 13
"""The opset from which on Unsqueeze takes its axes as an input."""
_SCAN_WITHOUT_BATCH = 9
_MOST_LEVELS = 8


@dataclass
class Unrolled:
    """How the unrolled graphs' names correspond to those of the graphs before."""

    nodes: dict[str, str] = field(default_factory=dict)
    """From each new node to the node that it is an instance of, or that computed what it hands on."""
    tensors: dict[str, str] = field(default_factory=dict)
    """From each new tensor to the one in the body."""
    iterations: dict[str, str] = field(default_factory=dict)
    """From each tensor of a Loop's or Scan's body to the words that say which iteration it is of."""
    notes: list[str] = field(default_factory=list)
    """What was not unrolled, and why."""
    handing_on: set[str] = field(default_factory=set)
    """Nodes that compute nothing themselves."""

    def settle(self, model: onnx.ModelProto) -> None:
        """Let what only hands a value on stand for the node that computed the value."""
        producers = {output: node for node in model.graph.node for output in node.output}
        for node in model.graph.node:
            source: onnx.NodeProto | None = node
            while source is not None and source.name in self.handing_on:
                source = producers.get(source.input[0])
            if source is not None and source is not node:
                self.nodes[node.name] = self.nodes.get(source.name, source.name)


@dataclass(frozen=True)
class _Taken:
    """What one input makes of a control-flow node: which branch, or how many iterations."""

    branch: bool = False
    count: int = 0


def has_control_flow(model: onnx.ModelProto) -> bool:
    """Whether there is anything to unroll."""
    return bool(_control_flow(model))


def unroll(
    models: Sequence[onnx.ModelProto], runnable: int, case: Mapping[str, NDArray[Any]], folder: Path
) -> Unrolled:
    """Unroll, in place, what all `models` take alike for this input; the rest stays as it is, with a note.

    Parameters
    ----------
    models
        The same graph in several precisions, control-flow nodes under the same names.
    runnable
        How many of them, from the first on, ONNX Runtime computes as they are meant.
    folder
        Where they are loaded from, weights beside them.

    Raises
    ------
    ModelError
        ONNX Runtime cannot run one.
    """
    found = Unrolled()
    left: set[str] = set()
    room = MOST_NODES
    for _ in range(_MOST_LEVELS):
        first, *others = (_control_flow(model) for model in models)
        names = [name for name in first if name not in left and all(name in each for each in others)]
        if not names:
            break
        taken = [_decisions(model, names, case, folder) for model in models[:runnable]]
        for name in names:
            # Looked up anew, since what was unrolled before made other nodes of them.
            nodes = [_control_flow(model)[name] for model in models]
            ways = [each.get(name) for each in taken]
            way, op_type, shown = ways[0], nodes[0].op_type, found.nodes.get(name, name)
            if way is None or any(each != way for each in ways):
                if None not in ways:
                    found.notes.append(_differently(shown, op_type, ways))
                left.add(name)
                continue
            size = max(len(_body(each, way).node) for each in nodes) * max(way.count, 1)
            if size > room or (op_type != "If" and not way.count):
                if way.count:
                    found.notes.append(
                        f"node {shown!r} ({op_type}) was not looked into: {way.count} iterations are too many to unroll"
                    )
                left.add(name)
                continue
            room -= size
            for model in models:
                _expand(model, name, way, found)
    found.settle(models[0])
    return found


def _differently(name: str, op_type: str, ways: Sequence[_Taken | None]) -> str:
    if op_type == "If":
        return f"node {name!r} (If) takes another branch lowered than in FP32: its condition is what to look at"
    counts = " and ".join(str(way.count) for way in ways if way)
    return f"node {name!r} ({op_type}) does not run as often lowered as in FP32 ({counts} iterations)"


def _control_flow(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in model.graph.node if node.op_type in CONTROL_FLOW and not node.domain}


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), None)


def _body(node: onnx.NodeProto, way: _Taken) -> onnx.GraphProto:
    name = "body" if node.op_type != "If" else "then_branch" if way.branch else "else_branch"
    body: onnx.GraphProto = _attribute(node, name)
    return body


# --- what an input takes ---------------------------------------------------------------------------------------------


def _decisions(
    model: onnx.ModelProto, names: Sequence[str], case: Mapping[str, NDArray[Any]], folder: Path
) -> dict[str, _Taken]:
    """Which branch is taken, and how often each body runs, by name; a node that can't be asked is left out."""
    copy = pieces.copied(model)
    nodes = _control_flow(copy)
    asked = {name: answer for name in names if (answer := _ask(copy, nodes[name])) is not None}
    if not asked:
        return {}
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=answer) for answer in dict.fromkeys(asked.values()))
    path = pieces.write(copy, folder, "decisions")
    with closing(OrtRunner(path, "the model, saying which way its control flow goes")) as runner:
        results = runner({name: case[name] for name in pieces.Graph(copy, folder).inputs})
    return {name: _taken(nodes[name], results[answer]) for name, answer in asked.items()}


def _ask(model: onnx.ModelProto, node: onnx.NodeProto) -> str | None:
    """The name of a tensor that tells; what computes it is added to the model."""
    if node.op_type == "If":
        return str(node.input[0])
    if node.op_type == "Scan":
        if pieces.opset(model) < _SCAN_WITHOUT_BATCH:
            return None
        name = f"{node.name}//shape"
        model.graph.node.append(helper.make_node("Shape", [node.input[-1]], [name], name))
        return name
    body: onnx.GraphProto = _attribute(node, "body")
    name, counted = f"{node.name}//iterations", f"{node.name}//iteration"
    body.node.append(helper.make_node("Identity", [body.input[0].name], [counted], counted))
    body.output.append(helper.make_tensor_value_info(counted, TensorProto.INT64, []))
    states_and_scans = len(body.output) - 2
    node.output.extend(f"{node.name}//unused{index}" for index in range(len(node.output), states_and_scans))
    node.output.append(name)
    return name


def _taken(node: onnx.NodeProto, answer: NDArray[Any]) -> _Taken:
    if node.op_type == "If":
        return _Taken(branch=bool(np.asarray(answer).reshape(-1)[0]))
    if node.op_type == "Loop":
        return _Taken(count=int(answer.shape[0]))
    number = int(_attribute(node, "num_scan_inputs"))
    axis = (list(_attribute(node, "scan_input_axes") or ()) or [0] * number)[-1]
    return _Taken(count=int(answer[axis]))


# --- unrolling -------------------------------------------------------------------------------------------------------


def _expand(model: onnx.ModelProto, name: str, way: _Taken, found: Unrolled) -> None:
    """Put the nodes that one control-flow node runs in its place."""
    nodes = list(model.graph.node)
    at = next(index for index, node in enumerate(nodes) if node.name == name)
    made = list(_Expansion(model, nodes[at], way, found).nodes())
    copies = [pieces.copied(node) for node in (*nodes[:at], *made, *nodes[at + 1 :])]
    del model.graph.node[:]
    model.graph.node.extend(copies)


class _Expansion:
    def __init__(self, model: onnx.ModelProto, node: onnx.NodeProto, way: _Taken, found: Unrolled) -> None:
        self.model, self.node, self.way, self.found = model, node, way, found
        self.body = _body(node, way)
        self.shared: dict[str, str] = {}
        """The body's weights, under the names that the main graph has for them."""
        within = (found.iterations.get(output, "") for output in node.output if output)
        self.within = next(within, "")

    def nodes(self) -> Iterator[onnx.NodeProto]:
        for tensor in self.body.initializer:
            name = self.shared[tensor.name] = f"{self.node.name}/{tensor.name}"
            self.found.tensors[name] = tensor.name
            self.model.graph.initializer.append(pieces.copied(tensor, name=name))
        yield from self._branch() if self.node.op_type == "If" else self._repeated()

    def _branch(self) -> Iterator[onnx.NodeProto]:
        names = yield from self._instance(f"{self.node.name}/", {}, "")
        for output, inner in zip(self.node.output, self.body.output, strict=False):
            if output:
                yield self._hand_on("Identity", [names.get(inner.name, inner.name)], output)

    def _repeated(self) -> Iterator[onnx.NodeProto]:
        is_loop = self.node.op_type == "Loop"
        given = list(self.node.input)
        number = 0 if is_loop else int(_attribute(self.node, "num_scan_inputs"))
        states, inputs = given[: len(given) - number], given[len(given) - number :]
        if is_loop:
            # Its condition is handed on as its states are; the most iterations are none of the body's business.
            states = [(*given[1:2], "")[0] or self._constant(True, np.bool_), *given[2:]]
        axes, backwards = self._list("scan_input_axes", number), self._list("scan_input_directions", number)
        owner = self.found.nodes.get(self.node.name, self.node.name)
        scanned: list[list[str]] = []
        for iteration in range(self.way.count):
            prefix = f"{self.node.name}#{iteration}/"
            when = f", in iteration {iteration + 1} of {self.way.count} of node {owner!r}"
            passed = [self._constant(iteration, np.int64)] if is_loop else []
            passed += states
            for index, source in enumerate(inputs):
                at = self.way.count - 1 - iteration if backwards[index] else iteration
                inner = self.body.input[len(states) + index].name
                passed.append(f"{prefix}{inner}")
                self._note_tensor(passed[-1], inner, when)
                yield self._hand_on("Gather", [source, self._constant(at, np.int64)], passed[-1], axis=axes[index])
            bound = dict(zip((value.name for value in self.body.input), passed, strict=False))
            names = yield from self._instance(prefix, bound, when)
            made = [names.get(value.name, value.name) for value in self.body.output]
            states, last = made[: len(states)], made[len(states) :]
            scanned.append(last)
        yield from self._results(states[is_loop:], scanned)

    def _list(self, name: str, size: int) -> list[int]:
        return list(_attribute(self.node, name) or ()) or [0] * size

    def _instance(self, prefix: str, given: Mapping[str, str], when: str) -> Any:
        """The body's nodes under new names; the map from the body's names to the new ones."""
        names = {**self.shared, **given}
        for node in self.body.node:
            names |= {output: f"{prefix}{output}" for output in node.output if output}
        for value in (*self.body.value_info, *self.body.output):
            if value.name in names and names[value.name].startswith(prefix):
                self.model.graph.value_info.append(pieces.copied(value, name=names[value.name]))
        for node in self.body.node:
            copy = pieces.copied(node, name=f"{prefix}{node.name}")
            pieces.rename_reads(copy, names)
            copy.output[:] = [names.get(output, "") for output in node.output]
            self.found.nodes[copy.name] = node.name
            for output, new in zip(node.output, copy.output, strict=True):
                if new:
                    self._note_tensor(new, output, when)
            yield copy
        return names

    def _note_tensor(self, new: str, inner: str, when: str) -> None:
        self.found.tensors[new] = inner
        if self.within or when:
            self.found.iterations[new] = f"{when}{self.within}"

    def _results(self, states: Sequence[str], scanned: Sequence[Sequence[str]]) -> Iterator[onnx.NodeProto]:
        """Let the last states, and the scanned values of all iterations together, be the node's outputs."""
        stacks = self.node.output[len(states) :]
        axes = self._list("scan_output_axes", len(stacks))
        backwards = self._list("scan_output_directions", len(stacks))
        for output, state in zip(self.node.output, states, strict=False):
            if output:
                yield self._hand_on("Identity", [state], output)
        for index, output in enumerate(stacks):
            if not output:
                continue
            stacked = [f"{output}//{number}" for number in range(len(scanned))]
            for part, name in zip((each[index] for each in scanned), stacked, strict=True):
                if pieces.opset(self.model) >= _AXES_AS_INPUT:
                    yield self._hand_on("Unsqueeze", [part, self._constant([axes[index]], np.int64)], name)
                else:
                    yield self._hand_on("Unsqueeze", [part], name, axes=[axes[index]])
            ordered = stacked[::-1] if backwards[index] else stacked
            yield self._hand_on("Concat", ordered, output, axis=axes[index])

    def _hand_on(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        """A node that hands a value on; what is lost there, was lost by the node that made the value."""
        name = f"{self.node.name}//{output}"
        self.found.handing_on.add(name)
        self.found.nodes[name] = self.found.nodes.get(self.node.name, self.node.name)
        kind = self._element_type(inputs[0])
        if kind:
            self.model.graph.value_info.append(helper.make_tensor_value_info(output, kind, None))
        return helper.make_node(op_type, list(inputs), [output], name, **attributes)

    def _element_type(self, name: str) -> int:
        """The element type that the file states for a value; 0 where it does not."""
        graph = self.model.graph
        described = (each for each in (*graph.value_info, *graph.input, *graph.output) if each.name == name)
        stated = next((each.type.tensor_type.elem_type for each in described), 0)
        return stated or next((each.data_type for each in graph.initializer if each.name == name), 0)

    def _constant(self, value: Any, dtype: Any) -> str:
        array = np.array(value, dtype)
        name = f"trtcheck//{array.dtype.name}{array.tolist()}"
        if all(tensor.name != name for tensor in self.model.graph.initializer):
            self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name
