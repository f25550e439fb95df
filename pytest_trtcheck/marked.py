"""The specs of a marked test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_trtcheck import settings
from pytest_trtcheck.errors import ArgumentError, TrtCheckError

if TYPE_CHECKING:
    from pytest_trtcheck.spec import LatencySpec, ParitySpec

PRECISION, BATCH = "_trt_precision", "_trt_batch"
"""The parameters that lists in the marker become."""
_MARKED: pytest.StashKey[Marked] = pytest.StashKey()


class Marked(NamedTuple):
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
        from dataclasses import replace

        parity = replace(
            self.parity,
            precision=(parameters.get(PRECISION, self.parity.precision[0]),),
            batch=(parameters.get(BATCH, self.parity.batch[0]),),
        )
        return self._replace(parity=parity)


def marked(item: pytest.Item) -> Marked | None:
    """What `item` is marked with; None for a test that has neither marker. Worked out once an item."""
    if _MARKED not in item.stash:
        # Asked of every item of every suite, so a suite without our markers must not pay for looking them up.
        if not _has_marker(item):
            return None
        item.stash[_MARKED] = _from_markers(item)
    return item.stash[_MARKED]


def _has_marker(item: pytest.Item) -> bool:
    node: pytest.Item | pytest.Collector | None = item
    while node is not None:
        for mark in node.own_markers:
            if mark.name in settings.MARKERS:
                return True
        node = node.parent
    return False


def _from_markers(item: pytest.Item) -> Marked:
    from pytest_trtcheck.spec import ParitySpec

    marks = {name: item.get_closest_marker(name) for name in settings.MARKERS}
    try:
        for name in settings.MARKERS:
            if sum(mark.name == name for mark in item.own_markers) > 1:
                raise ArgumentError(f"{name}: given twice for one test", "write two tests, or list the precisions")
        specs = {name: settings.from_marker(name, mark.args, mark.kwargs) for name, mark in marks.items() if mark}
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
