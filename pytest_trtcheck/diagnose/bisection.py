"""Where an engine goes wrong: engines of ever longer beginnings of the lowered model, against the emulated one.

A model is cut behind a node when all that crosses the cut are few tensors at which a fusion is likely to end anyway, so
that the shorter engine consists of the same kernels as the whole one. Once the cut is found behind which the error
appears, a few more builds narrow it down at finer cuts, which may break fusions up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import cutting
from pytest_trtcheck.diagnose.statistics import difference, is_float
from pytest_trtcheck.errors import CheckError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.cutting import Graph
    from pytest_trtcheck.diagnose.trials import Clock

RunEngine = Callable[[Path], "Mapping[str, NDArray[Any]]"]
"""Builds an engine from an ONNX file, runs it on the input that failed, and gives its outputs by name."""

EXTRA_BUILDS = 3
"""Builds allowed beyond ⌈log₂ n⌉ for n cuts."""
FUSED_BEHIND = frozenset(
    [
        "Add",
        "BatchNormalization",
        "Cast",
        "Clip",
        "DequantizeLinear",
        "Div",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mish",
        "Mul",
        "Neg",
        "PRelu",
        "Pow",
        "QuantizeLinear",
        "Reciprocal",
        "Relu",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Sqrt",
        "Sub",
        "Tanh",
    ]
)
"""Operators that TensorRT fuses with what is before them."""
MOVERS = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})
"""Operators that the lowering adds; no engine goes wrong in one of them alone."""
_FUSED_BEFORE = MOVERS | {"Softmax"}
"""Operators that it fuses with what is behind them (Q/DQ with the operator that reads it, Softmax with its MatMul)."""
_MOST_CROSSING = 4
_MOST_CROSSING_FINE = 16
_HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_FLOATS = _HALVES | {TensorProto.FLOAT}


@dataclass(frozen=True)
class Cut:
    """The nodes up to `position` (exclusive), and the tensors that lead on from them."""

    position: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Narrowed:
    """What the bisection found.

    Parameters
    ----------
    nodes
        The lowered model's nodes among which the error appears, in graph order: (name, operator).
    tensor
        The first tensor that was seen wrong, or the output that failed.
    before, after
        The engine's error against the emulation before those nodes and behind them (relative L2).
    cuts, builds
        How many cuts there were to choose from, and engines built.
    notes
        What a person should know: cuts at which TensorRT could not build, a budget that was spent.
    """

    nodes: tuple[tuple[str, str], ...]
    tensor: str
    before: float
    after: float
    cuts: int
    builds: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Bounds:
    """Between which cuts the fault lies, the errors there, and which tensors are wrong at the later one."""

    good: Cut | None
    bad: Cut | None
    before: float
    after: float
    wrong: tuple[str, ...]


def cuts(graph: Graph, outputs: Sequence[str], *, fine: bool = False) -> list[Cut]:
    """Where the part of the graph that computes `outputs` can be cut, in graph order.

    Parameters
    ----------
    fine
        Everywhere, rather than only where fusions end.
    """
    nodes = graph.cut(outputs, ()).nodes
    last_use = {name: index for index in nodes for name in graph.reads(index)}
    last_use |= dict.fromkeys(outputs, len(graph.nodes))
    most = _MOST_CROSSING_FINE if fine else _MOST_CROSSING
    open_tensors: dict[str, None] = {}
    quantized: set[str] = set()
    found = []
    for index in nodes[:-1]:
        # What crosses beside floats (shapes, masks) is no output of a beginning: it could not be compared anyway. But
        # a tensor that was just quantized is data, and no place to cut.
        for name in graph.nodes[index].output:
            if name not in last_use or graph.is_constant(name):
                continue
            if graph.nodes[index].op_type == "QuantizeLinear":
                quantized.add(name)
            elif graph.element_type(name) in _FLOATS:
                open_tensors[name] = None
        open_tensors = {name: None for name in open_tensors if last_use[name] > index}
        quantized = {name for name in quantized if last_use[name] > index}
        crossing = () if quantized else tuple(open_tensors)
        may_cut = _is_computed if fine else _ends_fusion
        if 0 < len(crossing) <= most and all(may_cut(graph, name, nodes) for name in crossing):
            found.append(Cut(index + 1, crossing))
    # Several cuts at which the same tensors cross differ by nothing that was computed.
    return [cut for cut, following in pairwise([*found, None]) if cut is not None and _differs(cut, following)]


def _differs(cut: Cut, following: Cut | None) -> bool:
    return following is None or cut.tensors != following.tensors


def _is_computed(graph: Graph, name: str, nodes: Sequence[int]) -> bool:  # noqa: ARG001 - as _ends_fusion
    producer = graph.producer(name)
    return producer is not None and producer.op_type not in MOVERS


def _ends_fusion(graph: Graph, name: str, nodes: Sequence[int]) -> bool:
    producer = graph.producer(name)
    if producer is None or producer.op_type in _FUSED_BEFORE:
        return False
    readers = [graph.nodes[index].op_type for index in nodes if name in graph.reads(index)]
    return not readers or any(reader not in FUSED_BEHIND for reader in readers)


class Bisection:
    """The search for the nodes at which an engine departs from its emulation.

    Parameters
    ----------
    lowered, emulated
        The lowered model that the engine was built from, and its emulation; both staged.
    case
        The input that failed.
    outputs
        The names of the outputs that failed.
    run_engine
        Builds and runs a sub-model of the lowered model.
    tolerance
        The error (relative L2) above which a tensor of the engine counts as wrong, given the tensor's name.
    clock
        Ends the search when its time is up.
    """

    def __init__(
        self,
        lowered: Graph,
        emulated: Graph,
        case: Mapping[str, NDArray[Any]],
        *,
        outputs: Sequence[str],
        run_engine: RunEngine,
        tolerance: Callable[[str], float],
        clock: Clock,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.lowered, self.emulated, self.case = lowered, emulated, case
        self.outputs, self.run_engine, self.tolerance = tuple(outputs), run_engine, tolerance
        self.clock, self.progress = clock, progress
        self.builds = 0
        self.most_builds = EXTRA_BUILDS
        self.notes: list[str] = []

    def narrow(self, whole: float) -> Narrowed:
        """Find the nodes.

        Parameters
        ----------
        whole
            The error of the whole engine against the emulation: it is known to be wrong.
        """
        coarse = cuts(self.lowered, self.outputs)
        self.most_builds = math.ceil(math.log2(max(len(coarse), 1))) + EXTRA_BUILDS
        found = self._between(coarse, _Bounds(None, None, 0.0, whole, self.outputs))
        # From here on only what the wrong tensors are computed from matters: other branches were seen to be right.
        fine = [
            cut
            for cut in cuts(self.lowered, found.wrong, fine=True)
            if (found.good is None or cut.position > found.good.position)
            and (found.bad is None or cut.position < found.bad.position)
        ]
        found = self._between(fine, found)
        if self.clock.is_over():
            self.notes.append("the time for bisection was up before the engine was narrowed down further")
        start = found.good.position if found.good else 0
        nodes = self.lowered.cut(found.wrong, found.good.tensors if found.good else ()).nodes
        between = [self.lowered.nodes[index] for index in nodes if index >= start]
        return Narrowed(
            tuple((node.name, node.op_type) for node in between),
            found.wrong[0],
            found.before,
            found.after,
            len(coarse),
            self.builds,
            tuple(self.notes),
        )

    def _between(self, candidates: Sequence[Cut], found: _Bounds) -> _Bounds:
        """The last cut before which all is well and the first at which it isn't, as far as builds and time reach."""
        low, high = -1, len(candidates)
        while high - low > 1 and self.builds < self.most_builds and not self.clock.is_over():
            middle = (low + high) // 2
            cut = candidates[middle]
            errors = self._at(cut)
            if not errors:
                # TensorRT refuses this beginning of the model: take it for part of what is not narrowed down.
                candidates = [*candidates[:middle], *candidates[middle + 1 :]]
                high -= 1
                continue
            wrong = [name for name in errors if errors[name] > self.tolerance(name)]
            if wrong:
                high = middle
                wrong.sort(key=lambda name: -errors[name])
                found = replace(found, bad=cut, after=errors[wrong[0]], wrong=tuple(wrong))
            else:
                low = middle
                found = replace(found, good=cut, before=max(errors.values()))
        return found

    def _at(self, cut: Cut) -> dict[str, float]:
        """The error of each float tensor at a cut; nothing where there is no engine."""
        self.builds += 1
        self.progress(
            f"engine {self.builds} of at most {self.most_builds}: the first {cut.position} of "
            f"{len(self.lowered.nodes)} nodes, up to {cut.tensors[0]!r}"
        )
        path, names = self._beginning(cut)
        try:
            results = self.run_engine(path)
        except CheckError as error:
            self.notes.append(f"no engine up to {cut.tensors[0]!r}: {error.message.splitlines()[0]}")
            return {}
        wanted = [name for name in cut.tensors if name in self.emulated.producers]
        expected = self.emulated.run(self.emulated.cut(wanted, ()), self.case)
        return {
            name: difference(results[names[name]], expected[name]).l2 for name in wanted if is_float(expected[name])
        }

    def _beginning(self, cut: Cut) -> tuple[Path, dict[str, str]]:
        """The lowered model up to a cut, as a file of its own, and the outputs' names; 16-bit ones come out in FP32."""
        graph = self.lowered
        piece = graph.cut(cut.tensors, ())
        nodes = [graph.nodes[index] for index in piece.nodes]
        names: dict[str, str] = {}
        outputs = []
        for name in cut.tensors:
            kind = graph.element_type(name)
            names[name] = name
            if kind in _HALVES:
                names[name] = f"{name}/as_float"
                nodes.append(helper.make_node("Cast", [name], [names[name]], f"{name}/as_float", to=TensorProto.FLOAT))
                kind = TensorProto.FLOAT
            outputs.append(helper.make_tensor_value_info(names[name], kind or TensorProto.FLOAT, None))
        inputs = [value for value in graph.proto.graph.input if value.name in piece.given]
        model = cutting.assemble(graph.proto, nodes, inputs, outputs, [graph])
        path = graph.folder / f"beginning-{self.builds}.onnx"
        onnx.save(model, path)
        return path, names
