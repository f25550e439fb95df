"""Where an engine goes wrong: engines of ever longer beginnings of the lowered model, against the emulated one.

A model is cut behind a node when all that crosses the cut are few tensors at which a fusion is likely to end anyway, so
that the shorter engine consists of the same kernels as the whole one. Once the cut is found behind which the error
appears, a few more builds narrow it down at finer cuts, which may break fusions up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import models
from pytest_trtcheck.diagnose.culprit import Culprit
from pytest_trtcheck.diagnose.statistics import difference, is_float
from pytest_trtcheck.errors import CheckError, plural
from pytest_trtcheck.model import pieces
from pytest_trtcheck.precision.quantization.plan import QUANTIZED_OPERATORS

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


def cuts(graph: Graph, outputs: Sequence[str], *, fine: bool = False) -> list[Cut]:
    """Where the part of the graph that computes `outputs` can be cut, in graph order.

    If `fine` everywhere, rather than only where fusions end.
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


class Bisection:
    """The search for the nodes at which an engine departs from its emulation, and what is known of them.

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
    """

    def __init__(
        self,
        subject: Subject,
        run_engine: RunEngine,
        graphs: tuple[Graph, Graph],
        findings: Findings | None,
        errors: Mapping[str, float],
    ) -> None:
        self.case, self.run_engine = subject.case, run_engine
        self.lowered, self.emulated = graphs
        self.whole = max(errors.values())
        self.floor = models.ROUNDOFF[subject.precision]
        self.traced = {} if findings is None else {name: each.error.l2 for name, each in findings.by_name.items()}
        self.share = _OTHERWISE_QUANTIZED if findings is not None and findings.pair.spans else _OTHERWISE_ROUNDED
        outputs = tuple(name for name, error in errors.items() if error == self.whole)
        # The last cut before which all is well and the first at which it isn't, the engine's error against the
        # emulation there, and what is wrong at the latter, the worst first.
        self.good, self.before = Cut(0, ()), 0.0
        self.bad, self.after, self.wrong = Cut(len(self.lowered.nodes), outputs), self.whole, outputs
        self.builds = 0
        self.coarse = cuts(self.lowered, outputs)
        self.most_builds = math.ceil(math.log2(max(len(self.coarse), 1))) + EXTRA_BUILDS
        self.notes: list[str] = []

    def narrow(self, budget: Budget, progress: Callable[[str], None]) -> None:
        """Move the two cuts closer, as far as builds and time reach.

        Raises
        ------
        CheckError
            The emulated model can't be run up to a cut.
        """
        self._between(self.coarse, budget, progress)
        # From here on only what the wrong tensors are computed from matters: other branches were seen to be right.
        fine = cuts(self.lowered, self.wrong, fine=True)
        between = [cut for cut in fine if self.good.position < cut.position < self.bad.position]
        self._between(between, budget, progress)
        if budget.is_over_for_engines():
            self.notes.append("the time for bisection was up before the engine was narrowed down further")

    def _between(self, candidates: Sequence[Cut], budget: Budget, progress: Callable[[str], None]) -> None:
        low, high = -1, len(candidates)
        while high - low > 1 and self.builds < self.most_builds and not budget.is_over_for_engines():
            middle = (low + high) // 2
            cut = candidates[middle]
            self.builds += 1
            progress(
                f"engine {self.builds} of at most {self.most_builds}: the first {cut.position} of "
                f"{plural(len(self.lowered.nodes), 'node')}, up to {cut.tensors[0]!r}"
            )
            errors = self._errors_at(cut)
            if not errors:
                # TensorRT refuses this beginning of the model: take it for part of what is not narrowed down.
                candidates = [*candidates[:middle], *candidates[middle + 1 :]]
                high -= 1
                continue
            wrong = [name for name in errors if errors[name] > self._tolerance(name)]
            if wrong:
                high = middle
                wrong.sort(key=lambda name: -errors[name])
                self.bad, self.after, self.wrong = cut, errors[wrong[0]], tuple(wrong)
            else:
                low = middle
                self.good, self.before = cut, max(errors.values())

    def _tolerance(self, tensor: str) -> float:
        """The error above which a tensor of the engine counts as wrong."""
        # Halfway, on a logarithmic scale, between what rounding explains and the error that is looked for; and wherever
        # the lowered model loses something, an engine may lose as much in another way.
        own = self.traced.get(tensor, 0.0)
        allowed = max(math.sqrt(self.floor * min(self.whole, 1.0)), self.share * own if math.isfinite(own) else 0.0)
        return min(allowed, self.whole / 2)

    def _errors_at(self, cut: Cut) -> dict[str, float]:
        """The error of each float tensor at a cut; nothing where there is no engine."""
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

    def culprit(self, names: Names) -> tuple[Culprit, tuple[str, ...]] | None:
        """The likeliest node where the engine goes wrong, and the others that it may be; None where none stands out."""
        if not self.builds or self.after < _JUMP * self.before:
            return None
        indices = self.lowered.cut(self.wrong, self.good.tensors).nodes
        nodes = [self.lowered.nodes[index] for index in indices if index >= self.good.position]
        nodes = [node for node in nodes if node.op_type not in MOVERS] or nodes
        if not nodes:
            return None
        # One that computes much is the best guess, one that is merely fused with something else the worst.
        likely = min(nodes, key=lambda node: (node.op_type not in QUANTIZED_OPERATORS, node.op_type in FUSED_BEHIND))
        shown = list(dict.fromkeys(names.node(node.name, self.lowered) for node in nodes))
        name = names.node(likely.name, self.lowered)
        among = f"{len(shown)} nodes from {shown[0]!r} to {shown[-1]!r}" if len(shown) > 1 else f"node {name!r}"
        found = Culprit(
            node=name,
            op_type=names.op_type(name, likely.op_type),
            tensor=names.tensor(self.wrong[0], name, self.lowered),
            kind="engine",
            detail=f"the engine's error against the emulation grows from {self.before:.2g} to {self.after:.2g} "
            f"in {among} ({plural(self.builds, 'engine')} built, {plural(len(self.coarse), 'place')} to cut at)",
            before=self.before,
            after=self.after,
        )
        return found, tuple(each for each in shown if each != name)
