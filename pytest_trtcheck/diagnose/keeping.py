"""What to keep in FP32 so that the check passes: the search over nodes, in the names that `keep_fp32` takes."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.diagnose import judging, search
from pytest_trtcheck.diagnose.cutting import inner_names
from pytest_trtcheck.diagnose.switchboard import Switchboard, shares
from pytest_trtcheck.diagnose.trials import BudgetSpent

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from pytest_trtcheck.diagnose.culprit import Findings
    from pytest_trtcheck.diagnose.judging import Judgement
    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.diagnose.trace import Tensor
    from pytest_trtcheck.diagnose.trials import Subject, Trials

MOST_KEPT = 40
"""More nodes than this are no advice: another precision is."""
MOST_TRIED = 2 * MOST_KEPT
"""So many candidates are tried together at most, since some of them turn out not to matter."""
_GROUPS = 8
_LOCATING_RUNS = 40
"""Runs that find out where in the graph the error is made, before the search begins."""
_NEGLIGIBLE = 0.1
_INFINITE = 1e9
_MOST_CASES = 8


@dataclass(frozen=True)
class Kept:
    """Nodes that, kept in FP32, let the check pass.

    Parameters
    ----------
    nodes
        The FP32 graph's nodes, the worst first.
    causes
        The tensors whose operators they are, the worst first.
    judgement
        What the check becomes, for the input that was looked at.
    """

    nodes: tuple[str, ...]
    causes: tuple[Tensor, ...]
    judgement: Judgement


@dataclass(frozen=True)
class _Unit:
    cause: Tensor
    nodes: tuple[str, ...]


def find(pair: Pair, findings: Findings, trials: Trials) -> Kept | None:
    """A smallest set of nodes without whose lowering the check passes; None where none was found.

    `findings` learns what the likeliest nodes contribute.

    Raises
    ------
    ModelError
        ONNX Runtime cannot run the model with switches.
    """
    lossy = dict.fromkeys(tensor.node for tensor in findings.tensors if tensor.own > 0)
    with closing(Switchboard(pair, lossy)) as board:
        searcher = _Searcher(board, findings, trials)
        return searcher.find()


class _Searcher:
    def __init__(self, board: Switchboard, findings: Findings, trials: Trials) -> None:
        self.board, self.findings, self.trials = board, findings, trials
        self.nodes = list(dict.fromkeys(tensor.node for tensor in findings.tensors if tensor.own > 0))
        self.cases = _cases(trials.subject)
        self.judged: dict[frozenset[str], Judgement] = {}

    def find(self) -> Kept | None:
        try:
            everything = self._lowered(self.nodes)
            if everything.passed:
                return None
            self._locate(everything.usage)
        except BudgetSpent:
            return None
        units = [_Unit(tensor, self.findings.unit(tensor)) for tensor in self.findings.ranked()]
        chosen = search.fewest(_distinct(units)[:MOST_TRIED], self._suffice)
        if chosen is None:
            return None
        nodes = list(dict.fromkeys(node for unit in chosen for node in unit.nodes))
        if len(nodes) > len(chosen):
            nodes = search.without_needless(nodes, self._suffices)
        causes = tuple(unit.cause for unit in chosen if set(unit.nodes) & set(nodes))
        return Kept(tuple(nodes), causes, self.judged[frozenset(nodes)])

    def _suffice(self, units: Sequence[_Unit]) -> bool:
        return self._suffices([node for unit in units for node in unit.nodes])

    def _suffices(self, kept: Collection[str]) -> bool:
        key = frozenset(kept)
        if key not in self.judged:
            self.judged[key] = self._judge(self.board.nodes - key)
        return self.judged[key].passed

    def _judge(self, lowered: Collection[str]) -> Judgement:
        """The input to look at first; the others only if that passes."""
        found = self._lowered(lowered)
        for case in self.cases[1:]:
            if not found.passed:
                break
            found = max(found, self._lowered(lowered, case), key=lambda each: each.usage)
        return found

    def _lowered(self, nodes: Collection[str], case: int | None = None) -> Judgement:
        self.trials.clock.spend()
        subject = self.trials.subject
        inputs = subject.cases[self.cases[0] if case is None else case]
        return judging.judge(self.board(inputs, nodes), subject.reference(inputs), subject.limits)[0]

    def _locate(self, whole: float) -> None:
        """Find out which nodes contribute most: groups in graph order, the worst halved again and again."""
        size = max(1, math.ceil(len(self.nodes) / _GROUPS))
        waiting = [tuple(self.nodes[start : start + size]) for start in range(0, len(self.nodes), size)]
        usage: dict[frozenset[str], float] = {}
        measured: list[tuple[float, tuple[str, ...]]] = []
        whole = min(whole, _INFINITE)
        runs = 0
        while runs < _LOCATING_RUNS and (waiting or measured):
            if not waiting:
                used, group = max(measured)
                if len(group) == 1 or used < _NEGLIGIBLE * whole:
                    break
                measured.remove((used, group))
                waiting = [group[: len(group) // 2], group[len(group) // 2 :]]
            group = waiting.pop(0)
            used = min(self._lowered(group).usage, _INFINITE)
            runs += 1
            usage[frozenset(group)] = used / whole
            if len(group) > 1:
                measured.append((used, group))
        own: dict[str, float] = {}
        for tensor in self.findings.tensors:
            own[tensor.node] = max(own.get(tensor.node, 0.0), tensor.own)
        self.findings.contributions = shares(self.nodes, own, usage)


def _cases(subject: Subject) -> list[int]:
    """The inputs that a set of nodes is tried on: the one to look at, and others evenly spaced."""
    step = max(1, len(subject.cases) // _MOST_CASES)
    others = [index for index in range(0, len(subject.cases), step) if index != subject.worst]
    return [subject.worst, *others[: _MOST_CASES - 1]]


def _distinct(units: Sequence[_Unit]) -> list[_Unit]:
    """Each set of nodes once: an operator with several results is one candidate."""
    found: dict[frozenset[str], _Unit] = {}
    for unit in units:
        found.setdefault(frozenset(unit.nodes), unit)
    return list(found.values())


class Names:
    """From the nodes of the graph that is lowered, batch normalization folded, to those of the user's model.

    Parameters
    ----------
    original
        The user's model file, whose node names `keep_fp32` takes.
    """

    def __init__(self, pair: Pair, original: Path) -> None:
        from pytest_trtcheck.model import graph

        nodes = list(graph.all_nodes(graph.read(original).graph))
        self._order = {node.name or "": index for index, node in enumerate(nodes)}
        makers = {value.name or "": node.name or "" for node in nodes for value in node.outputs}
        self._names = {node.name: self._original(node.name, node.output, makers) for node in pair.reference.nodes}
        for node in pair.reference.nodes:
            # Control flow is lowered inside.
            self._names[node.name] += tuple(name for name in inner_names(node) if name in self._order)

    def _original(self, name: str, outputs: Sequence[str], makers: dict[str, str]) -> tuple[str, ...]:
        # A normalization that was folded away gave its output's name to what it was folded into.
        behind = {makers[output] for output in outputs if output in makers}
        before = name.rpartition("/")[0]
        if name in self._order:
            return (name, *sorted(behind - {name}))
        return tuple(sorted(behind)) or ((before,) if before in self._order else ())

    def of(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """The names in the user's model, in its order."""
        found = {name for node in nodes for name in self._names.get(node, ())}
        return tuple(sorted(found, key=self._order.__getitem__))
