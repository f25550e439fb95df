"""The FP32 model with a switch at every operator that the lowering changes: off it computes in FP32, on as lowered.

All switches on give the lowered model, all off the FP32 one, and anything between is what `keep_fp32` would make of it,
without lowering or loading a model again. Each operator is there twice, and a Where behind the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from pytest_trtcheck.diagnose.per_operator import WHOLE, Builder
from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.ort_runner import OrtRunner

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.model.pieces import Arrays

_CHOOSABLE = frozenset({TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, None})
"""What ONNX Runtime's Where takes, of what can differ; None: the file doesn't say."""


class PartlyLowered:
    """Runs the model with some of its operators lowered.

    Parameters
    ----------
    nodes
        The FP32 model's nodes that get a switch; of the others none is lowered.
    once
        Whether it is to be run a few times only, so that loading it fast is worth more than running it fast.
    """

    def __init__(self, pair: Pair, nodes: Collection[str], *, once: bool = False) -> None:
        self.nodes = frozenset(nodes)
        self._inputs = pair.reference.inputs
        model, self._outputs = _switchable(pair, self.nodes)
        path = pieces.write(model, pair.reference.folder, "switches")
        self._runner = OrtRunner(path, "the model with switches between FP32 and lowered operators", in_order=once)

    def __call__(self, case: Mapping[str, NDArray[Any]], lowered: Collection[str]) -> Arrays:
        """The model's outputs with these nodes lowered."""
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
    builder = Builder(pair)
    switched = {
        name: f"{name}//switched"
        for node in reference.nodes
        if pair.owner(node.name) in nodes
        for name in node.output
        if name in pair.known and reference.element_type(name) in _CHOOSABLE
    }
    made: list[onnx.NodeProto] = []
    for node in reference.nodes:
        made.append(pieces.copied(node))
        pieces.rename_reads(made[-1], switched)
        for tensor in (name for name in node.output if name in switched):
            before = len(builder.nodes)
            lowered = builder.result(tensor, WHOLE)
            for each in builder.nodes[before:]:
                pieces.rename_reads(each, switched)
                made.append(each)
            switch = _switch(pair.owner(node.name))
            made.append(helper.make_node("Where", [switch, lowered, tensor], [switched[tensor]]))
    inputs = reference.declared_inputs()
    inputs += [helper.make_tensor_value_info(_switch(name), TensorProto.BOOL, []) for name in nodes]
    outputs = {name: switched.get(name, name) for name in reference.outputs}
    return pieces.assemble(made, inputs, outputs.values(), pair.emulated, reference), outputs
