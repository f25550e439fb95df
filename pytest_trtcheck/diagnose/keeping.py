"""What to keep in FP32 so that the check passes: the search over nodes.

Ranked candidates, more and more of them, then as few as possible. The second half is delta debugging (A. Zeller and
R. Hildebrandt, IEEE TSE 28(2), 2002), on candidates in order of rank.

Rank finds few operators that lose much. Where many lose a little each, one that is kept by itself gains nothing: the
operators around it round what it reads and what it hands on. Then it takes whole stretches of the graph, and the search
goes the other way: all is kept, and neighbours are lowered together as long as that holds.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_trtcheck.diagnose import judging
from pytest_trtcheck.diagnose.partly_lowered import PartlyLowered
from pytest_trtcheck.diagnose.subject import BudgetSpent
from pytest_trtcheck.errors import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare import LimitResult
    from pytest_trtcheck.diagnose.culprit import Findings
    from pytest_trtcheck.diagnose.subject import Budget, Subject
    from pytest_trtcheck.diagnose.trace import Tensor

T = TypeVar("T")

MOST_KEPT = 40
"""More nodes than this are no advice: another precision is."""
MOST_TRIED = 2 * MOST_KEPT
"""So many candidates are tried together at most, since some of them turn out not to matter."""
_GROUPS = 8
_LARGER = 1.1
"""So many times as many nodes has the set that is tried where one was not enough after all."""
_LOCATING_RUNS = 40
"""Runs that find out where in the graph the error is made, before the search begins."""
_LOCATING_SHARE = 0.25
"""The share of the time for all of a diagnosis after which that is left, for a search that may find something."""
_NEGLIGIBLE = 0.1
_INFINITE = 1e9
_MOST_CASES = 8


@dataclass(frozen=True)
class Kept:
    """Nodes that, kept in FP32, let the check pass, the worst first; `causes` are tensors that these compute."""

    nodes: tuple[str, ...]
    causes: tuple[Tensor, ...]
    judgement: LimitResult
    """What the check becomes, for the inputs that were tried."""


class Search:
    """The search for the nodes that must stay in FP32; it is closed when nothing more is to be found.

    `findings` learn what the likeliest nodes contribute. With `in_stretches`, stretches of the graph are looked for
    where the worst operators are not enough, of up to half of the model.
    """

    def __init__(
        self,
        subject: Subject,
        findings: Findings,
        budget: Budget,
        progress: Callable[[str], None],
        *,
        in_stretches: bool = False,
    ) -> None:
        self.in_stretches = in_stretches
        self.most_kept = max(MOST_KEPT, len(findings.pair.reference.nodes) // 2) if in_stretches else MOST_KEPT
        self.subject, self.findings, self.budget, self.progress = subject, findings, budget, progress
        lossy = (tensor.node for tensor in findings.tensors if tensor.own > 0)
        caused = (node for cause in findings.causes.values() for node in cause.chain)
        self.nodes = list(dict.fromkeys((*lossy, *caused)))
        # Control flow was unrolled for the one input; whether others take the same way is seen when it is confirmed.
        self.cases = [subject.worst] if findings.pair.unrolled.nodes else _cases(subject)
        self.expected: dict[int, Mapping[str, NDArray[Any]]] = {}
        self.judged: dict[frozenset[str], LimitResult] = {}
        self.goal = 1.0
        self.partly_lowered = PartlyLowered(findings.pair, self.nodes)

    def close(self) -> None:
        """Free the model."""
        self.partly_lowered.close()

    def find(self, goal: float = 1.0) -> Kept | None:
        """A smallest set of nodes without whose lowering the check passes; None where none was found.

        `goal` is the share of the limit that may be used up: less than 1 where the engine errs more than the emulation.
        """
        self.goal = goal
        try:
            if self._suffices(()):
                return None
            if not self.findings.contributions:
                self._locate(self.judged[frozenset()].usage)
        except BudgetSpent:
            return None
        # Each set of nodes once: an operator with several results is one candidate.
        units: dict[frozenset[str], tuple[Tensor, tuple[str, ...]]] = {}
        for tensor in self.findings.ranked():
            unit = self.findings.unit(tensor)
            units.setdefault(frozenset(unit), (tensor, unit))
        chosen = fewest(list(units.values())[:MOST_TRIED], lambda some: self._suffices([n for _, u in some for n in u]))
        if chosen is None:
            return self._stretches() if self.in_stretches else None
        nodes = list(dict.fromkeys(node for _, unit in chosen for node in unit))
        if len(nodes) > len(chosen):
            nodes = without_needless(nodes, self._suffices)
        causes = tuple(cause for cause, unit in chosen if set(unit) & set(nodes))
        return Kept(tuple(nodes), causes, self.judged[frozenset(nodes)])

    def _stretches(self) -> Kept | None:
        """What must stay in FP32 of all there is."""
        nodes = without_needless(self.nodes, self._suffices, math.ceil(len(self.nodes) / _GROUPS))
        return self._kept(nodes) if len(nodes) < len(self.nodes) else None

    def larger(self, kept: Kept) -> Kept | None:
        """The next larger set that was enough: where errors are chaotic, the one found may not be when lowered."""
        least = _LARGER * len(kept.nodes)
        enough = [each for each, judgement in self.judged.items() if len(each) >= least and judgement.passed]
        return self._kept(min(enough, key=len)) if enough else None

    def _kept(self, nodes: Collection[str]) -> Kept:
        causes = tuple(each for each in self.findings.ranked() if each.node in nodes)
        return Kept(tuple(sorted(nodes)), causes, self.judged[frozenset(nodes)])

    def _holds(self, judgement: LimitResult) -> bool:
        return judgement.passed and judgement.usage <= self.goal

    def _suffices(self, kept: Collection[str]) -> bool:
        key = frozenset(kept)
        if key not in self.judged:
            self.judged[key] = self._judge(self.partly_lowered.nodes - key)
        return self._holds(self.judged[key])

    def _judge(self, lowered: Collection[str]) -> LimitResult:
        """The input to look at first; the others only if that passes."""
        found = self._lowered(lowered)
        for case in self.cases[1:]:
            if not self._holds(found):
                break
            found = max(found, self._lowered(lowered, case), key=lambda each: each.usage)
        return found

    def _lowered(self, nodes: Collection[str], case: int | None = None) -> LimitResult:
        self.budget.spend()
        subject = self.subject
        self.progress(f"looking for the nodes to keep in FP32: {plural(len(self.judged), 'set')} tried")
        case = subject.worst if case is None else case
        if case not in self.expected:
            self.expected[case] = subject.reference(subject.cases[case])
        return judging.judge(self.partly_lowered(subject.cases[case], nodes), self.expected[case], subject.limits)[0]

    def _locate(self, whole: float) -> None:
        """Find out which nodes contribute most: groups in graph order, the worst halved again and again."""
        size = max(1, math.ceil(len(self.nodes) / _GROUPS))
        until = time.monotonic() + _LOCATING_SHARE * self.budget.left_s()
        waiting = [tuple(self.nodes[start : start + size]) for start in range(0, len(self.nodes), size)]
        usage: dict[tuple[str, ...], float] = {}
        measured: list[tuple[float, tuple[str, ...]]] = []
        whole = min(whole, _INFINITE)
        while len(usage) < _LOCATING_RUNS and (waiting or measured):
            if usage and time.monotonic() > until:
                break
            if not waiting:
                used, group = max(measured)
                if len(group) == 1 or used < _NEGLIGIBLE * whole:
                    break
                measured.remove((used, group))
                waiting = [group[: len(group) // 2], group[len(group) // 2 :]]
            group = waiting.pop(0)
            used = min(self._lowered(group).usage, _INFINITE)
            usage[group] = used / whole
            if len(group) > 1:
                measured.append((used, group))
        own: dict[str, float] = {}
        for tensor in self.findings.tensors:
            own[tensor.node] = max(own.get(tensor.node, 0.0), tensor.own)
        self.findings.contributions = _shares(self.nodes, own, usage)


def _shares(
    nodes: Sequence[str], weights: Mapping[str, float], usage: Mapping[tuple[str, ...], float]
) -> dict[str, float]:
    """What each node is likely to contribute, from what each group uses of the limit when it alone is lowered.

    The smallest group that a node is in counts. Within a group, errors are taken to add up as squares; `weights` are
    what each node loses by itself.
    """
    found: dict[str, tuple[int, float]] = {}
    for group, used in usage.items():
        total = math.sqrt(sum(min(weights[node], 1.0) ** 2 for node in group))
        for node in group:
            size, _ = found.get(node, (len(nodes) + 1, 0.0))
            if len(group) < size:
                found[node] = (len(group), used * min(weights[node], 1.0) / total if total else 0.0)
    return {node: found[node][1] for node in nodes if node in found}


def _cases(subject: Subject) -> list[int]:
    """The inputs that a set of nodes is tried on: the one to look at, and others evenly spaced."""
    step = max(1, len(subject.cases) // _MOST_CASES)
    others = [index for index in range(0, len(subject.cases), step) if index != subject.worst]
    return [subject.worst, *others[: _MOST_CASES - 1]]


def fewest(candidates: Sequence[T], suffices: Callable[[Sequence[T]], bool]) -> list[T] | None:
    """A set of candidates that suffices and from which no single one can be left out, as far as the budget reaches.

    Candidates and what is found are in order of rank. `suffices` raises BudgetSpent when nothing may be tried any more.
    None where not even all of them suffice, or nothing that does was found in time.
    """
    found: list[T] | None = None
    failed, count = 0, 1
    try:
        while found is None:
            count = min(count, len(candidates))
            if candidates and suffices(candidates[:count]):
                found = list(candidates[:count])
            elif count >= len(candidates):
                return None
            else:
                failed, count = count, 2 * count
        while len(found) - failed > 1:
            middle = (failed + len(found)) // 2
            if suffices(candidates[:middle]):
                found = list(candidates[:middle])
            else:
                failed = middle
    except BudgetSpent:
        return found
    return without_needless(found, suffices, math.ceil(len(found) / 2))


def without_needless(items: Sequence[T], suffices: Callable[[Sequence[T]], bool], most: int = 1) -> list[T]:
    """`items`, which suffice, less those that can be left out: `most` neighbours at a time, then ever fewer.

    The last ones go first: the lowest ranks, or what comes late in the graph, are the likeliest to be of no use. Single
    ones are tried until none can go: one may be of no use only without those that went after it was tried.
    """
    found = list(items)
    try:
        while most:
            before = len(found)
            for start in reversed(range(0, len(found), most)):
                rest = found[:start] + found[start + most :]
                if rest and suffices(rest):
                    found = rest
            most = 1 if most == 1 and len(found) < before else most // 2
    except BudgetSpent:
        pass
    return found
