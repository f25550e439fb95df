"""The FP32 model with a switch at every operator that the lowering changes: off it computes in FP32, on as lowered.

All switches on give the lowered model, all off the FP32 one, and anything between is what `keep_fp32` would make of it,
without lowering or loading a model again. Each operator is the two branches of an If, of which one is computed.
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
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.model.pieces import Arrays


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
        path = pieces.write(_switchable(pair, self.nodes), pair.reference.folder, "switches")
        self._runner = OrtRunner(path, "the model with switches between FP32 and lowered operators", in_order=once)

    def __call__(self, case: Mapping[str, NDArray[Any]], lowered: Collection[str]) -> Arrays:
        """The model's outputs with these nodes lowered."""
        feeds = {name: case[name] for name in self._inputs}
        switches = {_switch(node): np.array(node in lowered) for node in self.nodes}
        return self._runner({**feeds, **switches})

    def close(self) -> None:
        """Free the session."""
        self._runner.close()


def _switch(node: str) -> str:
    return f"{node}//switch"


def _switchable(pair: Pair, nodes: Collection[str]) -> onnx.ModelProto:
    """The model; what is computed of weights alone is outside of its branches, and so computed when it is loaded."""
    reference = pair.reference
    made: dict[str, onnx.NodeProto] = {}
    read = {*reference.outputs, *(name for node in reference.nodes for name in pieces.reads(node))}
    for node in reference.nodes:
        owner = pair.owner(node.name)
        switched = [name for name in node.output if name in pair.known and owner in nodes]
        if not switched:
            made[node.name] = node
            continue
        exact = pieces.copied(node)
        exact.output[:] = [_exact(name) if name in switched else name for name in node.output]
        # An output that has no lowered version is there whatever is chosen.
        is_outside = any(name in read and name not in switched for name in node.output)
        if is_outside:
            made[node.name] = exact
        builder = Builder(pair)
        lowered = [builder.result(name, WHOLE) for name in switched]
        made |= {each.name: each for each in builder.nodes if builder.is_constant(each)}
        made[f"{node.name}//if"] = helper.make_node(
            "If",
            [_switch(owner)],
            switched,
            f"{node.name}//if",
            then_branch=_branch((each for each in builder.nodes if not builder.is_constant(each)), lowered),
            else_branch=_branch(() if is_outside else (exact,), [_exact(name) for name in switched]),
        )
    inputs = reference.declared_inputs()
    inputs += [helper.make_tensor_value_info(_switch(name), TensorProto.BOOL, []) for name in nodes]
    return pieces.assemble(list(made.values()), inputs, reference.outputs, pair.emulated, reference)


def _exact(name: str) -> str:
    return f"{name}//exact"


def _branch(nodes: Iterable[onnx.NodeProto], results: Sequence[str]) -> onnx.GraphProto:
    """One side of an If; a result that none of its nodes computes is one from outside."""
    graph = onnx.GraphProto(name="branch")
    graph.node.extend(nodes)
    computed = {name for node in graph.node for name in node.output}
    for name in results:
        inside = name
        if name not in computed:
            inside = f"{name}//chosen"
            graph.node.append(helper.make_node("Identity", [name], [inside]))
        graph.output.append(onnx.ValueInfoProto(name=inside))
    return graph
