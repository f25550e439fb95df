"""Where in a tensor the error is: the indices of each axis that hold nearly all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.streaming import Pair

_EXACT = 1 << 22
"""Elements up to which all are looked at; of larger tensors blocks that add up to so many."""
_BLOCK = 1 << 10
_LISTED = 4
_NARROW = 8
"""A place is worth naming when it holds at most one in so many indices of its axis."""


def concentration(pair: Pair, share: float, unit: float) -> str | None:
    """Say in which slice of the tensor `share` of the squared error lies; None when it lies everywhere.

    Where elements are NaN or infinite on one side alone, those are counted instead. A slice that holds most of the
    reference's own squares as well is nothing to name: there the error only follows the values. Values are divided by
    `unit`, which keeps their squares within FP64.
    """
    shape = pair.reference.shape
    if not shape:
        return None
    error, values, broken, visits = _by_axis(pair, unit)
    what, lies = "the squared error", "lies"
    if any(each.any() for each in broken):
        error, values = broken, [np.zeros(length) for length in shape]
        what, lies = "the NaN and infinite elements", "lie"
    visited = [int(np.count_nonzero(each)) for each in visits]
    chosen = [_narrow(*each, share) for each in zip(error, values, visited, strict=True)]
    if all(each is None for each in chosen):
        return None
    place = f"[{', '.join(':' if each is None else _indices(each) for each in chosen)}]"
    about = "" if pair.size <= _EXACT else " (of a sample)"
    return f"{share:.0%} of {what}{about} {lies} in {place}"


def _narrow(error: NDArray[np.float64], values: NDArray[np.float64], visited: int, share: float) -> list[int] | None:
    """The fewest indices of an axis that hold `share` of the error, where they are few and not the large values."""
    total = float(error.sum())
    if error.size < 2 or not total > 0:
        return None
    order = np.argsort(-error, kind="stable")
    needed = int(np.searchsorted(np.cumsum(error[order]), share * total)) + 1
    indices = order[:needed]
    if needed > max(1, visited // _NARROW):
        return None
    if values[indices].sum() > 0.5 * values.sum() > 0:
        return None
    return sorted(int(each) for each in indices)


def _indices(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return str(indices[0])
    if indices[-1] - indices[0] == len(indices) - 1:
        return f"{indices[0]}:{indices[-1] + 1}"
    listed = ", ".join(map(str, indices[:_LISTED]))
    return f"{{{listed}{', …' if len(indices) > _LISTED else ''}}}"


def _by_axis(pair: Pair, unit: float) -> list[list[NDArray[np.float64]]]:
    """Per axis and index: the sums of d² and r², and the numbers of elements that are non-finite on one side
    alone, and of all that were looked at.
    """
    shape: Sequence[int] = pair.reference.shape
    error, values, broken, visits = ([np.zeros(length) for length in shape] for _ in range(4))
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    for start, stop in _blocks(pair):
        off = pair.errors(start, stop)
        infinite = np.isinf(off)
        off[infinite] = 0.0
        off /= unit
        size = _magnitude(pair.read_reference(start, stop)) / unit
        flat = np.arange(start, stop)
        for axis, length in enumerate(shape):
            index = flat // strides[axis] % length
            visits[axis] += np.bincount(index, minlength=length)
            error[axis] += np.bincount(index, off * off, length)
            values[axis] += np.bincount(index, size * size, length)
            if infinite.any():
                broken[axis] += np.bincount(index[infinite], minlength=length)
    return [error, values, broken, visits]


def _magnitude(values: NDArray[Any]) -> NDArray[np.float64]:
    if values.dtype.kind in "OUST":
        return np.zeros(values.shape)
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _blocks(pair: Pair) -> Iterator[tuple[int, int]]:
    if pair.size <= _EXACT:
        yield from pair.chunks()
        return
    # Blocks at regular distances could fall on the same channels again and again.
    starts = np.random.default_rng(0).integers(0, pair.size - _BLOCK, _EXACT // _BLOCK)
    for start in np.sort(starts):
        yield int(start), int(start) + _BLOCK
