"""Metrics made with arguments, for `metric=` of `trt_parity`.

>>> top1(axis=1)
ChosenMetric(name='top1', axis=1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_trtcheck.choices import Metric


@dataclass(frozen=True)
class ChosenMetric:
    """A metric and its arguments."""

    name: Metric
    axis: int | None = None


def top1(axis: int | None = None) -> ChosenMetric:
    """The share of rows along `axis` whose largest element is another one than the reference's.

    Parameters
    ----------
    axis
        Negative ones count from the end. None: the last, which takes an output with at most two axes longer than 1.
    """
    return ChosenMetric("top1", axis)
