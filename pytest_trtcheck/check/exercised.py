"""Whether a score could tell a model that is lost: where the reference itself knows nothing, nothing can be lost.

Labels in another order than the inputs, or a score that reads the wrong output: the reference is then at chance level,
every engine is as good, and each would pass. So a part of the samples is scored once more, against the labels of other
samples; what a model without any knowledge would lose is the difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.compare.paired import drop_of_means, same
from pytest_trtcheck.errors import InputError
from pytest_trtcheck.model.arrays import as_array, is_array
from pytest_trtcheck.spec import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.spec import ScoreSpec

    Scored = Callable[[dict[str, NDArray[Any]], Case], Any]

ENOUGH = 1000
"""Samples that are scored once more."""
LEAST = 50
"""Fewer than so many samples whose labels differ from the others' tell nothing."""


class Mismatch:
    """The items of the reference's outputs beside its own labels, and beside those of others."""

    def __init__(self, spec: ScoreSpec) -> None:
        self._spec = spec
        self._last: tuple[Any, int] | None = None
        self._own: list[Any] = []
        self._others: list[Any] = []
        self._is_over = False

    def add(self, outputs: Mapping[str, NDArray[Any]], case: Case, items: Any, score: Scored) -> None:
        """Score one case against other labels, where there are any of the same kind."""
        if self._is_over or case.labels is None:
            return
        found = self._other_labels(case.labels, len(items))
        self._last = case.labels, len(items)
        if found is None:
            return
        labels, differ = found
        try:
            others = score(dict(outputs), Case(case.inputs, labels))
        except Exception:
            # Labels of another sample need not fit; that says nothing of these.
            self._is_over = True
            return
        if len(others) == len(items):
            self._own += [items[index] for index in differ]
            self._others += [others[index] for index in differ]
        self._is_over = len(self._own) >= ENOUGH

    def require_knowledge(self, reference: float, least: float) -> None:
        """Refuse a score of which the reference has too little to lose.

        Parameters
        ----------
        reference, least
            The reference's score, and the least item seen on either side.

        Raises
        ------
        InputError
            No engine could fail.
        """
        spec = self._spec
        look = "look whether labels and inputs are in one order, and whether the score reads the right output"
        if not spec.lower_is_better and least >= 0 and reference <= spec.max_drop:
            raise InputError(
                f"score {spec.name}: the reference itself scores {reference:.4g}: no engine could lose more than "
                f"max_drop={spec.max_drop:g}",
                look,
                code="not-exercised",
            )
        if len(self._own) < LEAST:
            return
        own, others = self._scores(self._own), self._scores(self._others)
        if own is None or others is None or own == others:
            return
        known = others - own if spec.lower_is_better else own - others
        if known <= spec.max_drop:
            raise InputError(
                f"score {spec.name}: the reference scores {own:.4g} beside the samples' own labels and {others:.4g} "
                f"beside those of others ({len(self._own):,} of them): an engine that knows nothing would lose no more "
                f"than max_drop={spec.max_drop:g}",
                look,
                code="not-exercised",
            )

    def _scores(self, items: list[Any]) -> float | None:
        if self._spec.aggregate is None:
            values = np.asarray(items, np.float64)
            return drop_of_means(values, values).reference
        try:
            joined = np.stack(items) if all(isinstance(each, (np.ndarray, np.generic)) for each in items) else items
            return float(self._spec.aggregate(joined))
        except Exception:
            return None

    def _other_labels(self, labels: Any, count: int) -> tuple[Any, list[int]] | None:
        """Labels of other samples in place of these, and which of them are others indeed."""
        if is_array(labels):
            labels = as_array(labels)
        is_array_of_them = isinstance(labels, np.ndarray) and labels.ndim and len(labels) == count
        if count > 1 and (is_array_of_them or (isinstance(labels, (list, tuple)) and len(labels) == count)):
            order = [*range(1, count), 0]
            moved = labels[order] if isinstance(labels, np.ndarray) else type(labels)(labels[index] for index in order)
            return moved, [index for index in range(count) if not same(moved[index], labels[index])]
        if self._last is None or self._last[1] != count or same(self._last[0], labels):
            return None
        return self._last[0], list(range(count))
