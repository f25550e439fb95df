"""The FP32 model with a switch at every operator that the lowering changes: off it computes in FP32, on as lowered.

All switches on give the lowered model, all off the FP32 one, and anything between is what `keep_fp32` would make of it,
without lowering or loading a model again. Each operator is there twice, and a Where behind the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import cutting, local
from pytest_trtcheck.model.onnxruntime import OrtRunner

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.cutting import Arrays
    from pytest_trtcheck.diagnose.models import Pair

_CHOOSABLE = frozenset({TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, None})
"""What ONNX Runtime's Where takes, of what can differ; None: the file doesn't say."""


class Switchboard:
    """Runs the model with some of its operators lowered.

    Parameters
    ----------
    pair
        The two models.
    nodes
        The FP32 model's nodes that get a switch; of the others none is lowered.
    once
        Whether it is to be run a few times only, so that loading it fast is worth more than running it fast.

    Raises
    ------
    ModelError
        ONNX Runtime cannot load it.
    """

    def __init__(self, pair: Pair, nodes: Collection[str], *, once: bool = False) -> None:
        self.nodes = frozenset(nodes)
        self._inputs = pair.reference.inputs
        model, self._outputs = _switchable(pair, self.nodes)
        path = pair.reference.folder / "switchboard.onnx"
        path.write_bytes(model.SerializeToString())
        self._runner = OrtRunner(path, "the model with switches between FP32 and lowered operators", in_order=once)

    def __call__(self, case: Mapping[str, NDArray[Any]], lowered: Collection[str]) -> Arrays:
        """The model's outputs with these nodes lowered.

        Raises
        ------
        ModelError
            ONNX Runtime cannot run it.
        """
        feeds = {name: case[name] for name in self._inputs}
        switches = {_switch(node): np.array(node in lowered) for node in self.nodes}
        results = self._runner({**feeds, **switches})
        return {name: results[output] for name, output in self._outputs.items()}

    def close(self) -> None:
        """Free the session."""
        self._runner.close()


def _switch(node: str) -> str:
    return f"{node}//switch"


def _switchable(pair: Pair, nodes: Collection[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model, and by which name each output leaves it."""
    reference = pair.reference
    builder = local.Builder(pair)
    switched = {
        name: f"{name}//switched"
        for node in reference.nodes
        if pair.owner(node.name) in nodes
        for name in node.output
        if name in pair.known and reference.element_type(name) in _CHOOSABLE
    }
    made: list[onnx.NodeProto] = []
    own_weights: set[str] = set()
    for node in reference.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        cutting.rename_reads(copy, switched)
        made.append(copy)
        for tensor in (name for name in node.output if name in switched):
            before = len(builder.nodes)
            lowered = builder.result(tensor, local.WHOLE)
            for each in builder.nodes[before:]:
                # The lowered model's weights may have namesakes in the FP32 model.
                own = {name: f"{name}//lowered" for name in cutting.reads(each) if name in pair.emulated.weights}
                cutting.rename_reads(each, {**switched, **own})
                own_weights.update(own)
                made.append(each)
            switch = _switch(pair.owner(node.name))
            made.append(helper.make_node("Where", [switch, lowered, tensor], [switched[tensor]]))
    inputs = [value for value in reference.proto.graph.input if value.name in reference.inputs]
    inputs += [helper.make_tensor_value_info(_switch(name), TensorProto.BOOL, []) for name in nodes]
    outputs = {name: switched.get(name, name) for name in reference.outputs}
    model = cutting.assemble(pair.emulated.proto, made, inputs, outputs.values(), [reference])
    for name in sorted(own_weights):
        weight = TensorProto()
        weight.CopyFrom(pair.emulated.weights[name])
        weight.name = f"{name}//lowered"
        model.graph.initializer.append(weight)
    return model, outputs


def shares(
    nodes: Sequence[str], weights: Mapping[str, float], usage: Mapping[frozenset[str], float]
) -> dict[str, float]:
    """What each node is likely to contribute, from what groups of nodes were seen to.

    Parameters
    ----------
    nodes
        All nodes.
    weights
        What each loses by itself.
    usage
        What each group uses of the limit when it alone is lowered; the smallest group that a node is in counts. Within
        a group, errors are taken to add up as squares.
    """
    found: dict[str, tuple[int, float]] = {}
    for group, used in usage.items():
        total = np.sqrt(sum(min(weights[node], 1.0) ** 2 for node in group))
        for node in group:
            size, _ = found.get(node, (len(nodes) + 1, 0.0))
            if len(group) < size:
                found[node] = (len(group), float(used * min(weights[node], 1.0) / total) if total else 0.0)
    return {node: share for node, (_, share) in found.items()}
