"""Hypothesis strategies: `strategies.inputs(model, …)` draws what a model may be fed.

Needs the extra `hypothesis`: `pip install "pytest-trtcheck[hypothesis]"`.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pytest_trtcheck.cache import Cache, user_folder
from pytest_trtcheck.errors import ArgumentError, InputError, MissingDependencyError
from pytest_trtcheck.model import free_dims, values
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.sources import Examples, open_model
from pytest_trtcheck.spec import ShapeRange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy
    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
    from pytest_trtcheck.model.values import Span
    from pytest_trtcheck.spec import Ranges, Shape

__all__ = ["Inputs", "inputs"]

_WHOLE = 1024
"""Elements up to which Hypothesis draws an array element by element: its buffer holds some thousand."""
_WIDTHS: dict[int, Literal[16, 32, 64]] = {2: 16, 4: 32, 8: 64}
_SPECIAL = 8
"""Elements of a larger array that are drawn one by one."""


class Inputs(dict[str, "NDArray[Any]"]):
    """An input mapping, with the shapes that its strategy draws from: an engine for all of them is built once.

    Parameters
    ----------
    profile
        By input with open dimensions, the least, usual and largest shape.
    """

    profile: Mapping[str, ShapeRange]


class Place(NamedTuple):
    """Where models are looked up and kept: pytest's own, once it runs."""

    cache: Cache
    root: Path


_PLACE: ContextVar[Place | None] = ContextVar("trtcheck_place", default=None)


def settle(place: Place) -> None:
    """Tell strategies where a pytest session keeps and looks up what it needs."""
    _PLACE.set(place)


def inputs(
    model: object,
    *,
    shapes: Mapping[str, Shape | tuple[Shape, Shape, Shape]] | None = None,
    batch: int | tuple[int, int] | None = None,
    ranges: Ranges = None,
    smallest: float | None = None,
    allow_infinity: bool = False,
    allow_nan: bool = False,
) -> SearchStrategy[Inputs]:
    """A strategy of input mappings of a model: what `trt_check` and an engine of `trt_build` take.

    It shrinks towards the smallest shapes, and arrays that are one simple number throughout. Dimensions that bear one
    name in the model have one size.

    Parameters
    ----------
    model
        Anything that a marker takes as its model; a path is looked up beside the file that calls this, then from
        pytest's rootdir. It is opened when the first example is drawn.
    shapes
        Input name → shape, or (min, opt, max): every shape from min to max is drawn.
    batch
        The size of open first dimensions, or (least, most).
    ranges
        (low, high) of every floating-point input, or of each input by name. By default floats are drawn from 0 to 1,
        integers that index a table stay inside it, masks are 0 or 1, and other integers are drawn from 0 to 127.
    smallest
        Numbers that lie nearer to 0 are 0; None: a thousandth of the largest of the range. A model that is fed nothing
        but 1e-16 computes what no type of 16 bits holds.
    allow_infinity, allow_nan
        Whether infinities and NaN are drawn beside finite numbers. A check refuses inputs that are NaN.

    Raises
    ------
    ArgumentError
        An argument is of the wrong kind.
    MissingDependencyError
        Hypothesis is not installed.
    InputError
        When examples are drawn: a dimension is free and nothing says how large it may be (it is named), or `shapes` or
        `ranges` do not fit the model.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        hint = 'pip install "pytest-trtcheck[hypothesis]"'
        raise MissingDependencyError("strategies.inputs needs Hypothesis", hint) from error
    from pytest_trtcheck.check import arguments

    declared = arguments.shapes_of("strategies.inputs: shapes", shapes)
    least, most = _batch(batch)
    if smallest is not None and not (isinstance(smallest, (int, float)) and 0 <= smallest < float("inf")):
        raise ArgumentError(f"strategies.inputs: smallest={smallest!r}: expected a number of at least 0")
    chosen = arguments.ranges_of("strategies.inputs: ranges", ranges)
    beside = Path(sys._getframe(1).f_globals.get("__file__") or ".").resolve().parent

    def made() -> SearchStrategy[Inputs]:
        place = _PLACE.get() or Place(Cache(user_folder()), Path.cwd())
        examples = Examples(None, least, declared)
        opened = open_model(model, (beside, place.root), place.cache, examples=examples)
        spans = _spans(opened, (least, most), declared)
        rows = None if least is None or most is None else (least, most)
        special = [float("nan")] * allow_nan + [float("inf"), float("-inf")] * allow_infinity
        return _Drawing(opened, spans, chosen, rows, smallest=smallest, special=special).strategy()

    return st.deferred(made)


def _batch(value: object) -> tuple[int | None, int | None]:
    if value is None:
        return None, None
    ends = value if isinstance(value, (tuple, list)) else (value, value)
    numbers = [each for each in ends if isinstance(each, int) and not isinstance(each, bool) and each >= 1]
    if len(ends) != len(("least", "most")) or len(numbers) < len(ends) or numbers[0] > numbers[1]:
        raise ArgumentError(
            f"strategies.inputs: batch={value!r}: expected a number of at least 1, or (least, most) of them"
        )
    return numbers[0], numbers[1]


def _spans(
    model: OnnxModel, batch: tuple[int | None, int | None], declared: Mapping[str, Shape | ShapeRange]
) -> dict[str, ShapeRange]:
    """The least, usual and largest shape of each input."""

    def answer(proposed: Sequence[Mapping[str, Shape]]) -> str:
        return f"fix them, such as by {free_dims.in_python(proposed[0])}; (min, opt, max) of shapes for all in between"

    try:
        low, high = (model_inputs.shape_ranges(model, size, declared, answer=answer) for size in batch)
    except InputError as error:
        raise error.within("strategies.inputs") from error
    return {name: ShapeRange(low[name].min, high[name].opt, high[name].max) for name in low}


class _Drawing:
    """What is drawn for one model.

    Parameters
    ----------
    shapes
        The least, usual and largest shape, by input.
    ranges
        As they were given.
    batch
        The least and most rows of open first dimensions; None: as `shapes` says.
    smallest
        What lies nearer to 0 is 0; None: by the range.
    special
        Numbers that are drawn beside the finite ones.
    """

    def __init__(
        self,
        model: OnnxModel,
        shapes: Mapping[str, ShapeRange],
        ranges: Ranges,
        batch: tuple[int, int] | None,
        *,
        smallest: float | None,
        special: list[float],
    ) -> None:
        declared = values.declared(model, ranges, "strategies.inputs: ranges")
        self._model, self._shapes, self._batch = model, shapes, batch
        self._values = {spec.name: declared.get(spec.name) or values.generated(spec) for spec in model.inputs}
        self._smallest, self._special = smallest, special
        self._profile = {spec.name: shapes[spec.name] for spec in model.inputs if spec.free_dims()}
        self._sizes = self._named_sizes()

    def _named_sizes(self) -> dict[str, tuple[int, int]]:
        """The least and largest size of each dimension that the model names, in whatever inputs it stands."""
        found: dict[str, tuple[int, int]] = {}
        for spec in self._model.inputs:
            span = self._shapes[spec.name]
            for axis, dim in enumerate(spec.shape):
                if not isinstance(dim, str) or (self._batch and not axis):
                    continue
                least, most = found.get(dim, (0, sys.maxsize))
                found[dim] = max(least, span.min[axis]), min(most, span.max[axis])
                if found[dim][0] > found[dim][1]:
                    raise InputError(
                        f"strategies.inputs: {spec.name}[{axis}] is {dim}, which shapes= gives no size in common with "
                        "another input",
                        "one name is one size: give ranges that overlap",
                        code="argument-conflict",
                    )
        return found

    def strategy(self) -> SearchStrategy[Inputs]:
        """All of the inputs."""
        from hypothesis import strategies as st

        def drawn(draw: DrawFn) -> Inputs:
            rows = draw(st.integers(*self._batch)) if self._batch else None
            sizes = {name: draw(st.integers(*ends)) for name, ends in self._sizes.items()}
            nameless: dict[tuple[int, int], int] = {}
            found = Inputs()
            for spec in self._model.inputs:
                span = self._shapes[spec.name]
                shape = []
                for axis, dim in enumerate(spec.shape):
                    ends = span.min[axis], span.max[axis]
                    if rows is not None and not axis and not isinstance(dim, int):
                        shape.append(rows)
                    elif isinstance(dim, str):
                        shape.append(sizes[dim])
                    elif axis or dim is not None:
                        shape.append(draw(st.integers(*ends)))
                    else:
                        # First dimensions without a name are the batch: one size where one range was given for them.
                        if ends not in nameless:
                            nameless[ends] = draw(st.integers(*ends))
                        shape.append(nameless[ends])
                found[spec.name] = draw(self._array(spec, tuple(shape)))
            found.profile = self._profile
            return found

        strategy: SearchStrategy[Inputs] = st.composite(drawn)()
        return strategy

    def _array(self, spec: TensorSpec, shape: Shape) -> SearchStrategy[NDArray[Any]]:
        """One input: element by element where it is small; else one number or noise, and some elements apart."""
        from hypothesis import strategies as st
        from hypothesis.extra import numpy as hnp

        dtype = model_inputs.dtype_of(spec.dtype)
        # Hypothesis knows numpy's own types alone.
        plain = dtype if dtype.type.__module__ == "numpy" else np.dtype(np.float32)
        finite = _numbers(dtype, plain, self._values[spec.name], self._smallest)
        every = st.one_of(finite, st.sampled_from(self._special)) if self._special and plain.kind == "f" else finite
        size = int(np.prod(shape, dtype=np.int64))

        def noisy(draw: DrawFn) -> NDArray[Any]:
            array = np.full(shape, draw(finite), dtype=plain)
            if draw(st.booleans()):
                low, high = float(array.flat[0]) if size else 0.0, float(draw(finite))
                rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
                mixed = low + rng.random(shape) * (high - low)
                array = np.asarray(np.rint(mixed) if plain.kind != "f" else mixed, dtype=plain)
            for _ in range(draw(st.integers(0, _SPECIAL)) if size else 0):
                array.reshape(-1)[draw(st.integers(0, size - 1))] = draw(every)
            return array

        noise = st.composite(noisy)()
        drawn = st.one_of(hnp.arrays(plain, shape, elements=every), noise) if size <= _WHOLE else noise
        return drawn if plain == dtype else drawn.map(lambda array: array.astype(dtype))


def _numbers(dtype: np.dtype[Any], plain: np.dtype[Any], span: Span, smallest: float | None) -> SearchStrategy[Any]:
    """Finite numbers of a range, the ends rounded to the type."""
    from hypothesis import strategies as st

    if plain.kind == "b":
        return st.sampled_from([value for value in (False, True) if span.low <= value <= span.high])
    if plain.kind != "f":
        return st.integers(int(span.low), int(span.high))
    low, high = (float(np.asarray(end).astype(dtype)) for end in span)
    drawn = st.floats(low, high, width=_WIDTHS[plain.itemsize])
    least = max(abs(low), abs(high)) / 1000 if smallest is None else smallest
    return drawn.map(lambda value: 0.0 if abs(value) < least else value) if low <= 0 <= high and least else drawn
