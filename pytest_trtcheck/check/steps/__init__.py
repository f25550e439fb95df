"""The steps of a check: functions from what is known to what is known, in the order in which they are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_trtcheck.check.baseline import held
from pytest_trtcheck.check.graph import drawn
from pytest_trtcheck.check.search import searched
from pytest_trtcheck.check.steps.engine import built, loaded, nothing_compared, placed
from pytest_trtcheck.check.steps.judged import (
    compared,
    concluded,
    costed,
    explained,
    inspected,
    kept,
    profiled,
    proved,
    rebuilt,
    scored,
    timed,
    unchanged,
    watched,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_trtcheck.check.request import Known, Settings


if TYPE_CHECKING:
    Step = Callable[[Settings, Known], Known]


BUILDING: Sequence[Step] = (placed, built, rebuilt, unchanged, nothing_compared)


CHECKING: Sequence[Step] = (
    *(placed, built, loaded, inspected, compared, searched, scored, costed),
    *(explained, watched, timed, kept, profiled, rebuilt, held, drawn, unchanged, concluded, proved),
)
