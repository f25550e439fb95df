"""The specs of a marked test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from pytest_trtcheck import markers
from pytest_trtcheck.choices import BATCH, MARKERS, PRECISION
from pytest_trtcheck.errors import ArgumentError, TrtCheckError
from pytest_trtcheck.spec import LatencySpec, ParitySpec

_MARKED: pytest.StashKey[Marked | None] = pytest.StashKey()


@dataclass(frozen=True)
class Marked:
    """What the markers of a test ask for. `error` is set when they can't be understood; then the rest is empty.

    Parameters
    ----------
    parity
        The spec of `trt_parity`; where that marker is missing, one that names what to run for `trt_latency`.
    judge_parity
        Whether `trt_parity` is there at all.
    """

    parity: ParitySpec
    latency: LatencySpec | None = None
    judge_parity: bool = True
    error: TrtCheckError | None = None

    def selected(self, item: pytest.Function) -> Marked:
        """The one precision and batch of this test among those that the markers list."""
        parameters: dict[str, Any] = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        parity = replace(
            self.parity,
            precision=(parameters.get(PRECISION, self.parity.precision[0]),),
            batch=(parameters.get(BATCH, self.parity.batch[0]),),
        )
        return replace(self, parity=parity)


def marked(item: pytest.Item) -> Marked | None:
    """What `item` is marked with; None for a test that has neither marker. Worked out once an item."""
    if _MARKED not in item.stash:
        item.stash[_MARKED] = _from_markers(item)
    return item.stash[_MARKED]


def _from_markers(item: pytest.Item) -> Marked | None:
    marks = {name: item.get_closest_marker(name) for name in MARKERS}
    if not any(marks.values()):
        return None
    try:
        for name in MARKERS:
            if sum(mark.name == name for mark in item.own_markers) > 1:
                raise ArgumentError(f"{name}: given twice for one test", "write two tests, or list the precisions")
        specs = {name: markers.from_marker(name, mark.args, mark.kwargs) for name, mark in marks.items() if mark}
        _check_gpu_keys(item.config, specs.get("trt_latency"))
    except TrtCheckError as error:
        return Marked(ParitySpec(), error=error)
    return Marked(specs.get("trt_parity", ParitySpec()), specs.get("trt_latency"), judge_parity="trt_parity" in specs)


def _check_gpu_keys(config: pytest.Config, latency: LatencySpec | None) -> None:
    from pytest_trtcheck import gpu
    from pytest_trtcheck.session import extra_gpus

    for name, budget in (latency.budgets() if latency else {}).items():
        if isinstance(budget, dict):
            try:
                gpu.check_budget_keys(budget, extra_gpus(config))
            except TrtCheckError as error:
                raise ArgumentError(f"trt_latency: {name}: {error.message}", error.hint) from None
