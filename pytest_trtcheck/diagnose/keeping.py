"""What to keep in FP32 so that the check passes: the search over nodes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.diagnose import judging, search
from pytest_trtcheck.diagnose.switchboard import Switchboard, shares
from pytest_trtcheck.diagnose.trials import BudgetSpent

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

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
_LOCATING_SHARE = 0.25
"""The share of the time for all of a diagnosis after which that is left, for a search that may find something."""
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


class Search:
    """The search for the nodes that must stay in FP32; it is closed when nothing more is to be found.

    Parameters
    ----------
    findings
        Learns what the likeliest nodes contribute.
    progress
        Is told how many variations were tried.

    Raises
    ------
    ModelError
        ONNX Runtime cannot run the model with switches.
    """

    def __init__(
        self, pair: Pair, findings: Findings, trials: Trials, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.findings, self.trials, self.progress = findings, trials, progress
        lossy = (tensor.node for tensor in findings.tensors if tensor.own > 0)
        caused = (node for cause in findings.causes.values() for node in cause.chain)
        self.nodes = list(dict.fromkeys((*lossy, *caused)))
        # Control flow was unrolled for the one input; whether others take the same way is seen when it is confirmed.
        self.cases = [trials.subject.worst] if pair.unrolled.nodes else _cases(trials.subject)
        self.judged: dict[frozenset[str], Judgement] = {}
        self.goal = 1.0
        self.board = Switchboard(pair, self.nodes)

    def close(self) -> None:
        """Free the model."""
        self.board.close()

    def find(self, goal: float = 1.0) -> Kept | None:
        """A smallest set of nodes without whose lowering the check passes; None where none was found.

        Parameters
        ----------
        goal
            The share of the limit that may be used up: less than 1 where the engine errs more than the emulation.
        """
        self.goal = goal
        try:
            everything = self._lowered(self.nodes)
            if self._holds(everything):
                return None
            if not self.findings.contributions:
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

    def _holds(self, judgement: Judgement) -> bool:
        return judgement.passed and judgement.usage <= self.goal

    def _suffice(self, units: Sequence[_Unit]) -> bool:
        return self._suffices([node for unit in units for node in unit.nodes])

    def _suffices(self, kept: Collection[str]) -> bool:
        key = frozenset(kept)
        if key not in self.judged:
            self.judged[key] = self._judge(self.board.nodes - key)
        return self._holds(self.judged[key])

    def _judge(self, lowered: Collection[str]) -> Judgement:
        """The input to look at first; the others only if that passes."""
        found = self._lowered(lowered)
        for case in self.cases[1:]:
            if not self._holds(found):
                break
            found = max(found, self._lowered(lowered, case), key=lambda each: each.usage)
        return found

    def _lowered(self, nodes: Collection[str], case: int | None = None) -> Judgement:
        self.trials.clock.spend()
        subject = self.trials.subject
        self.progress(f"looking for the nodes to keep in FP32: {len(self.judged)} sets tried")
        inputs = subject.cases[self.cases[0] if case is None else case]
        return judging.judge(self.board(inputs, nodes), subject.reference(inputs), subject.limits)[0]

    def _locate(self, whole: float) -> None:
        """Find out which nodes contribute most: groups in graph order, the worst halved again and again."""
        size = max(1, math.ceil(len(self.nodes) / _GROUPS))
        start_s = time.monotonic()
        waiting = [tuple(self.nodes[start : start + size]) for start in range(0, len(self.nodes), size)]
        usage: dict[frozenset[str], float] = {}
        measured: list[tuple[float, tuple[str, ...]]] = []
        whole = min(whole, _INFINITE)
        runs = 0
        while runs < _LOCATING_RUNS and (waiting or measured):
            if runs and time.monotonic() - start_s > _LOCATING_SHARE * self.trials.clock.seconds:
                break
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
