"""The specs of a marked test."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.check import arguments as markers
from pytest_trtcheck.choices import BATCH, MARKERS, PRECISION
from pytest_trtcheck.errors import ArgumentError, CheckError
from pytest_trtcheck.plugin import items
from pytest_trtcheck.spec import LatencySpec, ParitySpec

if TYPE_CHECKING:
    from collections.abc import Mapping

_MARKED: pytest.StashKey[tuple[list[pytest.Mark], Marked | None]] = pytest.StashKey()

_INSTEAD = (
    "mark a function, or a method of a class that is not derived from unittest.TestCase; or call the fixture trt_check "
    "in one"
)


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
    error: CheckError | None = None

    def problem(self, item: pytest.Item) -> CheckError | None:
        """Why `item` can't be checked; None when it can."""
        return self.error or _unfit(item) or self._not_parametrized(item)

    def _not_parametrized(self, item: pytest.Item) -> CheckError | None:
        parameters = _parameters(item)
        for name, listed in {PRECISION: self.parity.precision, BATCH: self.parity.batch}.items():
            if len(listed) > 1 and name not in parameters:
                return ArgumentError(
                    f"trt_parity: lists {', '.join(map(str, listed))}, and came too late to make a test of each",
                    "a marker that a hook or pytest.param adds takes one precision and one batch",
                )
        return None

    def selected(self, item: pytest.Item) -> Marked:
        """The one precision and batch of this test among those that the markers list."""
        parameters = _parameters(item)
        parity = replace(
            self.parity,
            precision=(parameters.get(PRECISION, self.parity.precision[0]),),
            batch=(parameters.get(BATCH, self.parity.batch[0]),),
        )
        return replace(self, parity=parity)


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def marked(item: pytest.Item) -> Marked | None:
    """What `item` is marked with; None for a test that has neither marker. Worked out once for the same marks."""
    found = {name: items.closest(item, name) for name in MARKERS}
    marks = [mark for each in found.values() for mark in each]
    known = item.stash.get(_MARKED, None)
    if known is None or known[0] != marks:
        known = item.stash[_MARKED] = (marks, _from_marks(found, item.config) if marks else None)
    return known[1]


def _from_marks(found: Mapping[str, list[pytest.Mark]], config: pytest.Config) -> Marked:
    try:
        for name, marks in found.items():
            if len(marks) > 1:
                raise ArgumentError(f"{name}: given twice for one test", "write two tests, or list the precisions")
        specs = {
            name: markers.from_marker(name, each.args, each.kwargs) for name, marks in found.items() for each in marks
        }
        _check_gpu_keys(config, specs.get("trt_latency"))
    except CheckError as error:
        return Marked(ParitySpec(), error=error)
    return Marked(specs.get("trt_parity", ParitySpec()), specs.get("trt_latency"), judge_parity="trt_parity" in specs)


def _unfit(item: pytest.Item) -> CheckError | None:
    """Why nothing that a marker asks for can be done with `item`: it is no function that pytest calls for us."""
    if not isinstance(item, pytest.Function):
        kind = type(item).__name__
        return ArgumentError(f"trt markers don't work on {item.name!r} ({kind}): only test functions are run", _INSTEAD)
    if items.is_test_case(item.cls):
        return ArgumentError(
            f"trt markers don't work on {item.name!r}: unittest runs the methods of {item.cls.__name__} by itself",
            _INSTEAD,
        )
    if inspect.isgeneratorfunction(item.obj) or inspect.isasyncgenfunction(item.obj):
        return ArgumentError(f"{item.name}: a test that yields can't be checked", "return the inputs")
    return None


def _check_gpu_keys(config: pytest.Config, latency: LatencySpec | None) -> None:
    from pytest_trtcheck import gpu
    from pytest_trtcheck.plugin.session import extra_gpus

    for name, budget in (latency.budgets() if latency else {}).items():
        if isinstance(budget, dict):
            try:
                gpu.check_budget_keys(budget, extra_gpus(config))
            except CheckError as error:
                raise ArgumentError(f"trt_latency: {name}: {error.message}", error.hint) from None
