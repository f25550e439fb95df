"""Where an engine goes wrong: engines of ever longer beginnings of the lowered model, against the emulated one.

A model is cut behind a node when all that crosses the cut are few tensors at which a fusion is likely to end anyway, so
that the shorter engine consists of the same kernels as the whole one. Once the cut is found behind which the error
appears, a few more builds narrow it down at finer cuts, which may break fusions up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import models
from pytest_trtcheck.diagnose.culprit import Culprit
from pytest_trtcheck.diagnose.statistics import difference, is_float
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.model import pieces
from pytest_trtcheck.precision.quantization_plan import QUANTIZED_OPERATORS

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.culprit import Findings
    from pytest_trtcheck.diagnose.naming import Names
    from pytest_trtcheck.diagnose.subject import Budget, Subject
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.pieces import Graph
    from pytest_trtcheck.precision.lowering import Lowered

RunEngine = Callable[[Path], "Mapping[str, NDArray[Any]]"]
"""Builds an engine from an ONNX file, runs it on the input that failed, and gives its outputs by name."""
Outputs = Callable[["Case"], "Mapping[str, NDArray[Any]]"]
Rebuild = Callable[["Lowered"], "AbstractContextManager[Outputs]"]

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
_OTHERWISE_ROUNDED = 1.5
"""Two ways of rounding to 16 bits differ by √2 of what each loses."""
_JUMP = 3.0
"""An error that grows by less among the nodes that are left grew everywhere before them too."""
_OTHERWISE_QUANTIZED = 0.5
"""8-bit steps are the same in both; few values lie so close to the middle of two that they are rounded otherwise."""
_MOST_CROSSING = 4
_MOST_CROSSING_FINE = 16
_HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_FLOATS = _HALVES | {TensorProto.FLOAT}


@dataclass(frozen=True)
class Engine:
    """The engine that failed.

    Parameters
    ----------
    outputs
        What it computed from the input to look at.
    run
        Builds an engine from another ONNX file, a beginning of the lowered model, and runs it on the same input (with
        those of the inputs that it has); None: it can't be bisected.
    rebuild
        Builds the engine of another lowering of the model, ready to run on any of the inputs until it is left; None:
        what is advised can't be confirmed on an engine.
    """

    outputs: Mapping[str, NDArray[Any]]
    run: RunEngine | None = None
    rebuild: Rebuild | None = None


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
    nodes = graph.cut(outputs).nodes
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
        if 0 < len(crossing) <= most and all(_may_cut(graph, name, nodes, fine) for name in crossing):
            found.append(Cut(index + 1, crossing))
    # Several cuts at which the same tensors cross differ by nothing that was computed.
    return [cut for cut, following in pairwise([*found, Cut(0, ())]) if cut.tensors != following.tensors]


def _may_cut(graph: Graph, name: str, nodes: Sequence[int], fine: bool) -> bool:
    producer = graph.producer(name)
    if producer is None or producer.op_type in (MOVERS if fine else _FUSED_BEFORE):
        return False
    if fine:
        return True
    readers = [graph.nodes[index].op_type for index in nodes if name in graph.reads(index)]
    return not readers or any(reader not in FUSED_BEHIND for reader in readers)


def bisect(
    subject: Subject,
    run_engine: RunEngine,
    graphs: tuple[Graph, Graph],
    findings: Findings | None,
    errors: Mapping[str, float],
    *,
    budget: Budget,
    progress: Callable[[str], None],
) -> Narrowed:
    """Narrow the engine's fault down to nodes of the lowered model.

    Parameters
    ----------
    run_engine
        Builds and runs a beginning of the lowered model.
    graphs
        The lowered model that the engine was built from, and its emulation.
    findings
        What the trace found, where there was one: an engine may differ wherever the lowered model rounds.
    errors
        Of each output, the whole engine's error against the emulation (relative L2).

    Raises
    ------
    CheckError
        The emulated model can't be run up to a cut.
    """
    whole = max(errors.values())
    floor = models.ROUNDOFF[subject.precision]
    traced = {} if findings is None else {name: each.error.l2 for name, each in findings.by_name.items()}
    share = _OTHERWISE_QUANTIZED if findings is not None and findings.pair.spans else _OTHERWISE_ROUNDED

    def tolerance(tensor: str) -> float:
        # Halfway, on a logarithmic scale, between what rounding explains and the error that is looked for; and wherever
        # the lowered model loses something, an engine may lose as much in another way.
        own = traced.get(tensor, 0.0)
        allowed = max(math.sqrt(floor * min(whole, 1.0)), share * own if math.isfinite(own) else 0.0)
        return min(allowed, whole / 2)

    outputs = tuple(name for name, error in errors.items() if error == whole)
    return _Bisection(*graphs, subject.case, run_engine, tolerance, budget, progress).narrow(outputs, whole)


@dataclass
class _Bisection:
    lowered: Graph
    emulated: Graph
    case: Case
    run_engine: RunEngine
    tolerance: Callable[[str], float]
    budget: Budget
    progress: Callable[[str], None]
    builds: int = 0
    most_builds: int = EXTRA_BUILDS
    notes: list[str] = field(default_factory=list)

    def narrow(self, outputs: tuple[str, ...], whole: float) -> Narrowed:
        """Find the nodes behind `outputs`, which are known to be wrong by `whole`."""
        coarse = cuts(self.lowered, outputs)
        self.most_builds = math.ceil(math.log2(max(len(coarse), 1))) + EXTRA_BUILDS
        found = self._between(coarse, _Bounds(None, None, 0.0, whole, outputs))
        # From here on only what the wrong tensors are computed from matters: other branches were seen to be right.
        fine = [
            cut
            for cut in cuts(self.lowered, found.wrong, fine=True)
            if (found.good is None or cut.position > found.good.position)
            and (found.bad is None or cut.position < found.bad.position)
        ]
        found = self._between(fine, found)
        if self.budget.is_over_for_engines():
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
        while high - low > 1 and self.builds < self.most_builds and not self.budget.is_over_for_engines():
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
            self.notes.append(f"no engine up to {cut.tensors[0]!r}: {error.headline}")
            return {}
        wanted = [name for name in cut.tensors if name in self.emulated.producers]
        expected = self.emulated.values(wanted, self.case)
        return {
            name: difference(results[names[name]], expected[name]).l2 for name in wanted if is_float(expected[name])
        }

    def _beginning(self, cut: Cut) -> tuple[Path, dict[str, str]]:
        """The lowered model up to a cut, as a file of its own, and the outputs' names; 16-bit ones come out in FP32."""
        graph = self.lowered
        piece = graph.cut(cut.tensors)
        nodes = [graph.nodes[index] for index in piece.nodes]
        names = {name: f"{name}/as_float" if graph.element_type(name) in _HALVES else name for name in cut.tensors}
        for name, output in names.items():
            if output != name:
                nodes.append(helper.make_node("Cast", [name], [output], output, to=TensorProto.FLOAT))
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in names.values()]
        inputs = [value for value in graph.declared_inputs() if value.name in piece.given]
        model = pieces.assemble(nodes, inputs, outputs, graph)
        return pieces.write(model, graph.folder, f"beginning-{self.builds}"), names


def culprit(narrowed: Narrowed, names: Names, lowered: Graph) -> tuple[Culprit, tuple[str, ...]] | None:
    """The likeliest of the nodes among which the engine goes wrong, and the others; None where no node stands out.

    Parameters
    ----------
    names, lowered
        The user's names, and the graph whose nodes these are.
    """
    if not narrowed.builds or narrowed.after < _JUMP * narrowed.before:
        return None
    nodes = [node for node in narrowed.nodes if node[1] not in MOVERS] or list(narrowed.nodes)
    if not nodes:
        return None
    # One that computes much is the best guess, one that is merely fused with something else the worst.
    name, operator = min(nodes, key=lambda node: (node[1] not in QUANTIZED_OPERATORS, node[1] in FUSED_BEHIND))
    shown = list(dict.fromkeys(names.node(each, lowered) for each, _ in nodes))
    name = names.node(name, lowered)
    among = f"{len(shown)} nodes from {shown[0]!r} to {shown[-1]!r}" if len(shown) > 1 else f"node {name!r}"
    found = Culprit(
        node=name,
        op_type=names.op_type(name, operator),
        tensor=names.tensor(narrowed.tensor, name, lowered),
        kind="engine",
        detail=f"the engine's error against the emulation grows from {narrowed.before:.2g} to {narrowed.after:.2g} "
        f"in {among} ({narrowed.builds} engines built, {narrowed.cuts} places to cut at)",
        before=narrowed.before,
        after=narrowed.after,
    )
    return found, tuple(each for each in shown if each != name)
