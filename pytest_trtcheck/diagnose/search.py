"""A smallest set of things that does: ranked candidates, more and more of them, then as few as possible.

The second half is delta debugging (A. Zeller and R. Hildebrandt, IEEE TSE 28(2), 2002), on candidates in order of rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pytest_trtcheck.diagnose.trials import BudgetSpent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")


def fewest(candidates: Sequence[T], suffices: Callable[[Sequence[T]], bool]) -> list[T] | None:
    """A set of candidates that suffices and from which no single one can be left out, as far as the budget reaches.

    Parameters
    ----------
    candidates
        The most promising first.
    suffices
        Whether a set does; raises BudgetSpent when nothing may be tried any more.

    Returns
    -------
    list or None
        In order of rank; None where not even all of them suffice, or none was found in time.
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
        for smaller in _smaller(found, suffices):
            found = smaller
    except BudgetSpent:
        pass
    return found


def without_needless(items: Sequence[T], suffices: Callable[[Sequence[T]], bool]) -> list[T]:
    """`items`, which suffice, less those that can be left out one at a time."""
    found = list(items)
    try:
        for item in reversed(items):
            rest = [each for each in found if each != item]
            if rest and suffices(rest):
                found = rest
    except BudgetSpent:
        pass
    return found


def _smaller(items: list[T], suffices: Callable[[Sequence[T]], bool]) -> Iterable[list[T]]:
    """Ever smaller sets that suffice."""
    parts = 2
    while len(items) >= 2:
        size = -(-len(items) // parts)
        # The lowest ranks are the likeliest to be of no use.
        for start in reversed(range(0, len(items), size)):
            rest = items[:start] + items[start + size :]
            if rest and suffices(rest):
                items = rest
                parts = max(parts - 1, 2)
                yield items
                break
        else:
            if size == 1:
                return
            parts = min(2 * parts, len(items))
