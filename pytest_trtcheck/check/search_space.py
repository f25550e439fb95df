"""Some inputs of a check as points of the unit cube, and back: what a search moves in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.model import values
from pytest_trtcheck.model.inputs import dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.check.explorer import Points
    from pytest_trtcheck.check.request import Known
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import TensorSpec
    from pytest_trtcheck.model.values import Span
    from pytest_trtcheck.spec import Search


_ROUNDED = 1e-6
"""A share of the range that an input may owe to its own rounding."""


@dataclass(frozen=True)
class Space:
    """Some inputs of a case as one point of the unit cube.

    Parameters
    ----------
    template
        The check's first case: its shapes, and the values of inputs that are not searched.
    spans
        The values of those that are.
    by_row
        Whether a point is one row of the open batch dimension that all inputs and outputs have.
    """

    template: Case
    specs: Mapping[str, TensorSpec]
    spans: Mapping[str, Span]
    by_row: bool

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of a point's part of each input that is searched."""
        return {name: self.template[name].shape[self.by_row :] for name in self.spans}

    @cached_property
    def size(self) -> int:
        """How many variables a point has."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def ordered(self) -> NDArray[np.bool_]:
        """By variable, whether near values mean much the same: what indexes a table does not."""
        kinds = [self.specs[name].index_limit is None and self.specs[name].dtype != "bool" for name in self.spans]
        return np.repeat(kinds, [math.prod(shape) for shape in self.shapes.values()])

    @property
    def rows(self) -> int:
        """How many points a case of the check holds."""
        return next(iter(self.template.values())).shape[0] if self.by_row else 1

    def points(self, case: Case) -> Points:
        """The points of a case."""
        return np.clip(self._points(case), 0.0, 1.0)

    @cached_property
    def outside(self) -> NDArray[np.bool_]:
        """By variable, whether the check's own first input lies outside of what is searched."""
        first = self._points(self.template)[0]
        return np.asarray(np.abs(first - 0.5) > 0.5 + _ROUNDED)

    def _points(self, case: Case) -> Points:
        rows = next(iter(case.values())).shape[0] if self.by_row else 1
        columns = [self._encoded(name, case[name]).reshape(rows, -1) for name in self.spans]
        return np.concatenate(columns, axis=1)

    def _encoded(self, name: str, array: NDArray[Any]) -> NDArray[np.float64]:
        low, high = self.spans[name]
        numbers = np.nan_to_num(array.astype(np.float64))
        if values.is_float(self.specs[name]):
            return (numbers - low) / ((high - low) or 1.0)
        return (numbers - low + 0.5) / (high - low + 1)

    def case(self, points: Points) -> Case:
        """The points as one case, a row each; without rows, there is one point."""
        found: Case = {}
        starts = np.cumsum([0, *(math.prod(shape) for shape in self.shapes.values())])
        for (name, shape), start, stop in zip(self.shapes.items(), starts, starts[1:], strict=False):
            part = self._decoded(name, points[:, start:stop])
            found[name] = part.reshape(len(points), *shape) if self.by_row else part.reshape(shape)
        others = {
            name: np.repeat(array[:1], len(points), axis=0) if self.by_row else array
            for name, array in self.template.items()
            if name not in found
        }
        return {name: found[name] if name in found else others[name] for name in self.template}

    def _decoded(self, name: str, part: Points) -> NDArray[Any]:
        (low, high), spec = self.spans[name], self.specs[name]
        if values.is_float(spec):
            return (low + part * (high - low)).astype(dtype_of(spec.dtype))
        return np.minimum(low + np.floor(part * (high - low + 1)), high).astype(dtype_of(spec.dtype))


def space_of(known: Known, asked: Search) -> tuple[Space, tuple[str, ...]]:
    """What is searched, and what is not, with the reason."""
    declared = values.declared(known.model, asked.ranges, "search: ranges")
    given = known.request.inputs is not None
    template = known.cases[0]
    spans: dict[str, Span] = {}
    held: list[str] = []
    for spec in known.model.inputs:
        span = declared.get(spec.name)
        if span is None and (why := _why_held(spec)):
            held.append(f"{spec.name} ({why})")
            continue
        if span is None:
            span = values.seen(spec.name, known.cases) if given else values.generated(spec)
        if span is None or span.low == span.high or not template[spec.name].size:
            held.append(f"{spec.name} (it has one value)")
            continue
        spans[spec.name] = span
    rows = {array.shape[0] if array.ndim else 0 for array in template.values()}
    tensors = (*known.model.inputs, *known.model.outputs)
    by_row = len(rows) == 1 and all(spec.shape and not isinstance(spec.shape[0], int) for spec in tensors)
    return Space(template, {spec.name: spec for spec in known.model.inputs}, spans, by_row), tuple(held)


def _why_held(spec: TensorSpec) -> str:
    """Why an input is not searched without a range of its own; empty where it is."""
    if values.is_float(spec) and "mask" not in spec.name.lower():
        return ""
    if spec.dtype == "str":
        return "it holds strings"
    if spec.index_limit is not None or spec.dtype in {"uint8", "int8"}:
        return ""
    return f"{spec.dtype}: give it a range to search it"
