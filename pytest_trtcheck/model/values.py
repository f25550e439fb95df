"""Which values an input may have: those that are declared, that others had, or that are generated.

`model.inputs.generate` draws from `generated`, a search and `strategies.inputs` from all three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pytest_trtcheck.errors import InputError, plural, suggestion
from pytest_trtcheck.model.inputs import Case, dtype_of, integer_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
    from pytest_trtcheck.spec import Ranges


class Span(NamedTuple):
    """The least and the largest value."""

    low: float
    high: float


def is_float(spec: TensorSpec) -> bool:
    """Whether the input is floating-point, of whatever size."""
    return spec.dtype.startswith(("float", "bfloat"))


def generated(spec: TensorSpec) -> Span:
    """What inputs are drawn from where nobody says: floats from [0, 1), integers below what they index or 128.

    Raises
    ------
    InputError
        Strings can't be drawn.
    """
    if spec.dtype == "str":
        raise InputError(
            f"input {spec.name!r}: strings cannot be generated",
            "return real inputs from the test",
            code="input-generated",
        )
    name = spec.name.lower()
    if is_float(spec) or "mask" in name:
        return Span(0.0, 1.0)
    return Span(0.0, float(integer_limit(spec, name) - 1))


def declared(model: OnnxModel, ranges: Ranges, argument: str) -> dict[str, Span]:
    """The ranges that were declared, by input; a pair is that of every floating-point input.

    Parameters
    ----------
    argument
        What declared them, for messages.

    Raises
    ------
    InputError
        The model has no such input, or it can't have such values.
    """
    if ranges is None:
        return {}
    if not isinstance(ranges, Mapping):
        ranges = {spec.name: ranges for spec in model.inputs if is_float(spec)}
    specs = {spec.name: spec for spec in model.inputs}
    for name, (low, high) in ranges.items():
        if name not in specs:
            raise InputError(
                f"{argument}: {model.label} has no input {name!r}",
                suggestion(name, list(specs)) or f"its inputs are {', '.join(specs)}",
                code="input-names",
            )
        problem = _problem(specs[name], low, high)
        if problem:
            raise InputError(f"{argument}[{name!r}]={low:g}, {high:g}: {problem}", code="argument-value")
    return {name: Span(float(low), float(high)) for name, (low, high) in ranges.items()}


def _problem(spec: TensorSpec, low: float, high: float) -> str:
    """Why an input can't have these values; empty where it can."""
    if spec.dtype == "str":
        return "strings have no range"
    if is_float(spec):
        import ml_dtypes

        largest = float(ml_dtypes.finfo(dtype_of(spec.dtype)).max)  # type: ignore[no-untyped-call]
        return "" if max(abs(low), abs(high)) <= largest else f"{spec.dtype} ends at {largest:g}"
    if low != int(low) or high != int(high):
        return f"the input is {spec.dtype}: give whole numbers"
    least, most = (0, 1) if spec.dtype == "bool" else _limits(dtype_of(spec.dtype))
    if spec.index_limit is not None and high >= spec.index_limit:
        return f"the input indexes a table of {plural(spec.index_limit, 'row')}"
    return "" if least <= low and high <= most else f"{spec.dtype} is from {least} to {most}"


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def seen(name: str, cases: Sequence[Case]) -> Span | None:
    """What an input's finite values span in some cases; None where it has none."""
    low, high = math.inf, -math.inf
    for case in cases:  # one at a time: they need not all fit into memory
        numbers = _as_numbers(case[name])
        finite = numbers[np.isfinite(numbers)]
        low, high = min(low, float(finite.min(initial=math.inf))), max(high, float(finite.max(initial=-math.inf)))
    return Span(low, high) if low <= high else None


def _as_numbers(array: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(array, dtype=np.float64)
