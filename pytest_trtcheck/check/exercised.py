"""Whether a score, or a metric of the user's, could tell a model that is lost.

One that does not look at what the model gives finds nothing wrong with anything: so it is shown outputs of zeros, and
outputs with every sign changed. And where the reference itself knows nothing, nothing can be lost: with labels in
another order than the inputs, or a score that reads the wrong output, the reference is at chance level, every engine is
as good, and each would pass. So a part of the samples is scored once more, against the labels of other samples; what a
model without any knowledge would lose is the difference.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.cache import hash_bytes
from pytest_trtcheck.compare.paired import drop_of_means, same
from pytest_trtcheck.errors import InputError
from pytest_trtcheck.model.arrays import as_array, copied, is_array, owned
from pytest_trtcheck.spec import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.spec import ScoreSpec

    Scored = Callable[[dict[str, NDArray[Any]], Case], Any]

ENOUGH = 1000
"""Samples that are scored once more."""
LEAST = 50
"""Fewer than so many samples whose labels differ from the others' tell nothing."""


def ruined(outputs: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """What a model gives that has lost everything, in two ways: zeros, and all signs changed."""
    yield {name: np.zeros_like(array) for name, array in outputs.items()}
    numbers = {name: array for name, array in outputs.items() if array.dtype.kind not in "OUST"}
    changed = {name: ~array if array.dtype.kind == "b" else np.negative(array) for name, array in numbers.items()}
    yield {name: changed.get(name, np.zeros_like(array)) for name, array in outputs.items()}


def is_blind(limit: compare.Limit, name: str, references: Iterable[NDArray[Any]]) -> bool:
    """Whether a metric of the user's lets what is lost of an output pass, on every input."""
    for reference in references:
        for lost in ruined({name: reference}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a division by the zeros, say
                found = compare.measure(name, lost[name], reference, limits=(limit,)).scores.get(limit.metric.name)
            if found is None or found.value is None or not limit.holds(found.value):
                return False
    return True


class Sameness:
    """Outputs of which the reference is the same for every sample: the inputs are equal, or do not reach them.

    Parameters
    ----------
    batches
        By output, the sizes of its first axis that count samples.
    """

    def __init__(self, batches: Mapping[str, Sequence[int]]) -> None:
        self._batches = batches
        self._first: dict[str, str] = {}
        self._count: Counter[str] = Counter()
        self._differ: set[str] = set()

    def look(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Look at what the reference gives for one case."""
        for name, array in outputs.items():
            if name in self._differ or array.dtype.kind in "OUST" or not array.size:
                continue
            is_batch = array.ndim > 0 and array.shape[0] in self._batches[name]
            for sample in array if is_batch else array[None]:
                raw = np.ascontiguousarray(sample).reshape(-1).view(np.uint8)
                digest = hash_bytes(raw.data)
                if self._first.setdefault(name, digest) != digest:
                    self._differ.add(name)
                    break
                self._count[name] += 1

    def notes(self, said: Iterable[str]) -> list[str]:
        """A note for each output that differs in no sample of several, but for those of which more is said already."""
        return [
            f"output {name!r}: its reference is the same for all {count:,} samples: how it follows from the inputs was "
            "hardly exercised"
            for name, count in self._count.items()
            if count > 1 and name not in {*self._differ, *said}
        ]


def scored(score: Scored, outputs: Mapping[str, NDArray[Any]], case: Case) -> Any:
    """What a score gives. It may change what it is given: outputs, inputs and labels are looked at again."""
    return score(copied(outputs), Case(copied(case.inputs), owned(case.labels)))


class Mismatch:
    """The items of the reference's outputs beside its own labels, and beside those of others."""

    def __init__(self, spec: ScoreSpec) -> None:
        self._spec = spec
        self._last: tuple[Any, int] | None = None
        self._own: list[Any] = []
        self._others: list[Any] = []
        self._is_over = False
        self.sees = False
        """Whether the score was seen to depend on the outputs."""

    def look(self, items: tuple[Any, Any], lost: Iterable[Any]) -> None:
        """See whether the score depends on the outputs.

        Parameters
        ----------
        items
            What the score gave for the reference's outputs of a case, and for those of what runs.
        lost
            What it gave for outputs that are lost, each way; None where it failed on them.
        """
        self.sees = self.sees or not same(*map(list, items))
        self.sees = self.sees or any(each is None or not same(list(each), list(items[0])) for each in lost)

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
            others = scored(score, outputs, Case(case.inputs, labels))
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

    def require_sight(self) -> None:
        """Refuse a score that does not depend on the outputs.

        Raises
        ------
        InputError
            In no case it did.
        """
        if not self.sees:
            raise InputError(
                f"score {self._spec.name}: outputs of zeros, and outputs with all signs changed, score as the "
                "reference's do, sample by sample: it tells nothing from anything",
                "look whether it uses the outputs that it is given, and give samples that the model finds something in",
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
