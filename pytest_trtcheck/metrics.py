"""The metrics, in one registry: what a tolerance may limit, and how a value stands against its limit.

A metric is one object in `METRICS`; whoever measures, judges or reports reads what it needs there. It stands on the
ground and knows no numpy, since the collection of tests and the reports read it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from pytest_trtcheck.choices import with_pairs
from pytest_trtcheck.errors import ArgumentError, name_of, suggestion
from pytest_trtcheck.record import SEVERITY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import Precision
    from pytest_trtcheck.record import JudgedRecord

__all__ = ["METRICS", "Metric", "Score", "detections", "of_arrays", "top1"]

Kind: TypeAlias = Literal["float", "integer", "bool", "string"]
Function: TypeAlias = "Callable[[NDArray[Any], NDArray[Any]], float]"
"""From the actual output and its reference, both FP64, to a number."""

DEFAULT_TOLERANCE: Mapping[Precision, float] = with_pairs(
    {
        "fp32": 1e-4,
        "tf32": 5e-3,
        "fp16": 1e-2,
        "bf16": 3e-2,
        "int8": 5e-2,
        "fp8": 5e-2,
    }
)
"""The relative error that each precision may cost, from which every metric's default follows."""


_LARGEST = 1e308


@dataclass(frozen=True)
class Sums:
    """What an output, or a part of it, adds up to over the elements that are finite on both sides.

    Parameters
    ----------
    count
        Number of elements.
    peak, error
        max|r| and max|d|: r is the reference, d the actual output less the reference. Elements that are finite in the
        reference alone count for the peak.
    dd, dr, rr, d
        Σd², Σd·r, Σr² and Σd, in FP64.
    unit
        What both sides were multiplied by beforehand, so that no square leaves FP64.
    """

    count: int
    peak: float
    error: float
    dd: float
    dr: float
    rr: float
    d: float = 0.0
    unit: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Compared(Sums):
    """A whole output and its reference, as a metric's `of` gets them.

    Parameters
    ----------
    allclose
        max(|d| / (1 + |r|)), in the output's own unit.
    shape
        Of both.
    limit
        What the value will be judged by; NaN for metrics that are measured without a limit.
    """

    allclose: float
    shape: tuple[int, ...]
    limit: float = math.nan

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The actual output and its reference, copied whole, in FP64."""
        raise NotImplementedError

    def squares(self) -> tuple[float, float]:
        """Σy² and Σy·r over the elements that are finite on both sides, times `unit`²; y is the actual output."""
        raise NotImplementedError

    def disagreeing_rows(self, tie: float, axis: int) -> tuple[int, int]:
        """How many rows along an axis have their largest element elsewhere, and of how many rows.

        A row agrees as well when the reference's scores at the two places tie: `math.isclose(…, rel_tol=tie)`, that is
        |difference| ≤ tie · max(|score|, |score|). The axis has at least two elements.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Score:
    """One metric's value.

    Parameters
    ----------
    value
        None where it can't be computed; never a pass.
    note
        Why it can't be, or what else is to be said of it.
    case
        The input that gave this value, where several were compared.
    rows
        Of a share of rows, (how many, of how many): those of several inputs are added up.
    at_least
        That of the metric.
    compared
        How many things there were to compare, where there may be none: then it says nothing.
    """

    value: float | None
    note: str = ""
    case: int | None = None
    rows: tuple[int, int] | None = None
    at_least: bool = field(default=False, compare=False, repr=False)
    compared: int | None = field(default=None, compare=False, repr=False)

    @property
    def badness(self) -> float:
        """Larger is worse; what can't be computed, or is NaN, is worst of all."""
        return badness(self.value, at_least=self.at_least)


@dataclass(frozen=True)
class Relative:
    """How a metric follows from a relative error. Such a metric is judged in every part of an output by its own scale.

    Parameters
    ----------
    error
        The relative error that is meant, of the output or of a part.
    metric, inverse
        The metric at a relative error, and the relative error at a value of the metric.
    """

    error: Callable[[Sums], float]
    metric: Callable[[float], float]
    inverse: Callable[[float], float]


@dataclass(frozen=True)
class Metric:
    """What a tolerance may limit.

    Parameters
    ----------
    name
        What messages and records call it.
    of
        Its value: a number, or a `Score` that says more. What is not one is an error, and never a pass.
    at_least
        Whether a limit is the least that it may be, rather than the most.
    range
        What a limit may lie between.
    default
        The limit at a precision where none is given; None: one has to be given.
    no_default
        Why there is no default.
    kinds
        The dtypes that it says something of; others are judged by it only where the tolerance was given for them.
    on_demand
        Whether it is measured only where it has a limit, since it costs a pass of its own.
    takes_nonfinite
        Whether it says something where elements are NaN or infinite on one side alone, which fails by itself.
    relative
        How it follows from a relative error; None: it is judged on the whole output.
    axis
        Along which it works, where that was chosen.
    joins
        The names of the outputs that it is of together. What it finds is the verdict on each of them: they are not
        compared element by element, and may be of another shape. Its `of` gets both sides (`Joint`).
    detections
        What `detections` made it of, from which it can be made again.
    """

    name: str
    of: Callable[[Any], Score | float] = field(compare=False, repr=False)
    at_least: bool = False
    range: tuple[float, float] = (0.0, math.inf)
    default: Callable[[Precision], float] | None = field(default=None, compare=False, repr=False)
    no_default: str = field(default="", compare=False, repr=False)
    kinds: frozenset[Kind] = frozenset({"float"})
    on_demand: bool = True
    takes_nonfinite: bool = False
    relative: Relative | None = field(default=None, compare=False, repr=False)
    axis: int | None = None
    joins: tuple[str, ...] = ()
    detections: Detections | None = None

    @property
    def worst(self) -> float:
        """What it is where an element is NaN or infinite on one side alone; NaN keeps no limit."""
        return -math.inf if self.at_least else math.inf if self.range[1] == math.inf else math.nan

    def holds(self, value: float, limit: float) -> bool:
        """Whether `value` keeps the limit; NaN never does."""
        return value >= limit if self.at_least else value <= limit

    def cost(self, value: float | None) -> float:
        """A figure that is larger where the metric is worse: what could not be computed, and NaN, are the worst."""
        if value is None or math.isnan(value):
            return math.inf
        if not self.at_least:
            # Infinity is bad, and still a number: below what could not be computed.
            return max(0.0, min(value, _LARGEST))
        if self.relative:
            return self.relative.inverse(value)
        return min(1 / value, _LARGEST) if value > 0 else _LARGEST

    def at_cost(self, cost: float) -> float:
        """The value that costs so much."""
        if not self.at_least:
            return cost
        if self.relative:
            return self.relative.metric(cost)
        return 1 / cost if cost else math.inf

    def score(self, compared: Compared | Joint) -> Score:
        """What `of` finds; an exception, NaN and what is no number leave it without a value, and are named."""
        try:
            found = self.of(compared)
            found = found if isinstance(found, Score) else Score(found)
            if isinstance(found.value, (str, bytes)) or type(found.value).__name__ in {"bool", "bool_"}:
                # Whether all is well would be 0, and so pass, where it is not.
                found = Score(None, f"{self.name} gave {found.value!r}, which is no number")
            elif found.value is not None or not found.note:
                found = replace(found, value=float(found.value))  # type: ignore[arg-type]
        except Exception as error:
            found = Score(None, f"{self.name} failed: {type(error).__name__}: {error}")
        if found.value is not None and math.isnan(found.value):
            found = Score(None, f"{self.name} gave NaN")
        return replace(found, at_least=self.at_least)

    def used(self, value: float | None, limit: float | None) -> float:
        """How much of a limit a value uses: 1 is all of it, more is too much; infinite where there is no number."""
        if value is None or limit is None or math.isnan(value):
            return math.inf
        if self.at_least and self.relative:
            value, limit = self.relative.inverse(value), self.relative.inverse(limit)
        elif self.at_least:
            value, limit = limit, value
        return value / limit if limit > 0 else math.inf if value > limit else 0.0


def badness(value: float | None, *, at_least: bool) -> float:
    """Larger is worse; what can't be computed, or is NaN, is worst of all."""
    if value is None or math.isnan(value):
        return math.inf
    return -value if at_least else value


def named(metric: object) -> Metric:
    """The metric that a user named: by its name, as an object, or as a callable.

    Raises
    ------
    ArgumentError
        There is none of that name, or another one has its name.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            hint = suggestion(metric, METRICS)
            raise ArgumentError(f"metric={metric!r}: expected one of {', '.join(METRICS)}, or a callable", hint)
        return METRICS[metric]
    if not isinstance(metric, Metric):
        if not callable(metric):
            raise ArgumentError(f"metric={metric!r}: expected one of {', '.join(METRICS)}, or a callable")
        metric = of_arrays(metric)
    known = METRICS.get(metric.name)
    if metric.name in _RESERVED or (known and metric.of is not known.of and metric.axis is None):
        raise ArgumentError(
            f"metric={metric.name}: a metric of that name is built in",
            "give the function, or the metric, another name",
            code="argument-conflict",
        )
    return metric


def of_arrays(
    function: Function,
    *,
    name: str | None = None,
    at_least: bool = False,
    range: tuple[float, float] = (-math.inf, math.inf),
    default: Callable[[Precision], float] | None = None,
) -> Metric:
    """A metric that is computed from the arrays: what a callable given as `metric=` becomes.

    It is called with the actual output and its reference, copied whole and in FP64 (16 bytes an element): what is
    NaN or infinite on both sides alike is still there. Where an element is so on one side alone the check fails anyway,
    and it is not called. It is judged on the whole output, and of several inputs the worst value counts.

    Parameters
    ----------
    function
        From (actual, expected) to a number. An exception, NaN or what is no number is an error that names it.
    name
        What messages and records call it; None: the function's `__name__`.
    at_least, range, default
        As in `Metric`. By default the limit is the most that it may be, and has to be given.

    >>> of_arrays(lambda actual, expected: float((actual != expected).mean()), name="share").name
    'share'
    """
    no_default = "how large it may be is for you to say; give tol= as a number"
    return Metric(
        name or name_of(function),
        partial(_of_arrays, function),
        at_least,
        range,
        default,
        no_default,
        frozenset({"float", "integer", "bool"}),
    )


def _of_arrays(function: Function, compared: Compared) -> float:
    return function(*compared.arrays())


def top1(axis: int | None = None) -> Metric:
    """The share of rows along `axis` whose largest element is another one than the reference's.

    Parameters
    ----------
    axis
        Negative ones count from the end. None: the last, which takes an output with at most two axes longer than 1.
    """
    known = METRICS["top1"]
    return known if axis is None else replace(known, of=lambda compared: _top1(compared, axis), axis=axis)


def detections(
    boxes: str,
    scores: str | None = None,
    classes: str | None = None,
    *,
    count: str | None = None,
    columns: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    format: BoxFormat = "xyxy",
    iou: float = 0.5,
    score_threshold: float = 0.25,
    score_tol: float = 0.1,
) -> Metric:
    """The share of detections without a partner on the other side, whatever their order: 0 where all are found again.

    With n detections of the engine and m of the reference that reach `score_threshold`, of which a and b have no
    partner, it is (a + b) / (n + m), that is 1 − F₁ of the engine's detections with the reference's as the truth. Each
    image is matched as COCO's evaluation does (pycocotools, `COCOeval.evaluateImg`; Lin et al., "Microsoft COCO",
    2014): by descending score, each detection takes the free one of the reference, of the same class, with the largest
    intersection over union. A partner may lie up to `score_tol` below the threshold, so that a score of 0.2501 which
    becomes 0.2499 is no loss. Of several inputs the worst counts. It needs a `tol`, as a share.

    Parameters
    ----------
    boxes, scores, classes
        Names of outputs, behind non-maximum suppression: boxes [images, detections, 4], scores [images, detections],
        classes of the same shape (None: all are of one class); or scores [images, detections, classes], of which the
        largest is meant. The axis of images may be left out. Without `scores`, `boxes` holds everything in `columns`.
    count
        Name of the output that says how many detections of each image count, where the others are padded.
    columns
        Where one output holds everything: the columns of the four box coordinates, the score and the class; five of
        them without a class.
    format
        Of boxes: `xyxy` corners, `xywh` a corner and the size, `cxcywh` the centre and the size.
    iou
        The least intersection over union of partners, above 0.
    score_threshold, score_tol
        The least score that counts, and how far the scores of partners may lie apart.

    Raises
    ------
    ArgumentError
        An argument is out of its range.
    """
    asked = Detections(boxes, scores, classes, count, tuple(columns), format, iou, score_threshold, score_tol)
    asked.check()
    return Metric(
        "detections",
        lambda joint: joint.unmatched(asked),
        range=(0.0, 1.0),
        no_default="how many detections may be lost is for you to say; give tol= as a share, such as tol=0.02",
        kinds=frozenset({"float", "integer", "bool"}),
        takes_nonfinite=True,
        joins=asked.outputs,
        detections=asked,
    )


BoxFormat: TypeAlias = Literal["xyxy", "xywh", "cxcywh"]


@dataclass(frozen=True)
class Detections:
    """What `detections` was asked for."""

    boxes: str
    scores: str | None
    classes: str | None
    count: str | None
    columns: tuple[int, ...]
    format: BoxFormat
    iou: float
    score_threshold: float
    score_tol: float

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that it is of."""
        return tuple(name for name in (self.boxes, self.scores, self.classes, self.count) if name is not None)

    def check(self) -> None:
        """See that the arguments are what they should be; an ArgumentError names the one that is not."""
        wrong = {
            "boxes, scores, classes, count": any(not isinstance(name, str) for name in self.outputs),
            "classes= needs scores=: classes": self.classes is not None and self.scores is None,
            "columns (five or six of them, from 0 on)": len(self.columns) not in {5, 6}
            or any(not isinstance(each, int) or each < 0 for each in self.columns),
            "format (xyxy, xywh or cxcywh)": self.format not in get_args(BoxFormat),
            "iou (above 0, at most 1)": not 0 < self.iou <= 1,
            "score_tol (at least 0)": not self.score_tol >= 0,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ArgumentError(f"metrics.detections: {name}: not as expected: {self}", "see its docstring")


class Joint(Protocol):
    """The outputs of both sides by name: what the `of` of a metric gets that joins several."""

    @property
    def actual(self) -> Mapping[str, NDArray[Any]]:
        """The outputs that are judged."""

    @property
    def reference(self) -> Mapping[str, NDArray[Any]]:
        """The reference's."""

    def unmatched(self, asked: Detections) -> Score:
        """The share of detections without a partner."""


def distinct_digits(value: float, other: float, least: int = 3, *, exact: bool = True) -> int:
    """The fewest significant digits, `least` or more, in which a value reads as less or more than another, as it is.

    The other one is shown exactly, as a limit is, or else in as many digits.
    """
    for digits in range(least, 17):
        shown = float(f"{value:.{digits}g}")
        beside = other if exact else float(f"{other:.{digits}g}")
        if (shown < beside, shown > beside) == (value < other, value > other):
            return digits
    return 17


# --- the built-in ones -----------------------------------------------------------------------------------------------

_CLEAR_AXES = 2
_GIVE_AXIS = "give it, metric=metrics.top1(axis=1) or Tolerance(top1=…, top1_axis=1)"
_ALIKE = 64.0
"""Where Σy² is more than so many times Σr², or the other way round, formulas with d = y − r lose digits."""


def _zero_reference(compared: Compared) -> str:
    return "the reference is all zero" if compared.count else "no element is finite on both sides"


def _or_absolute(error: Callable[[Sums], float]) -> Callable[[Compared], Score]:
    """A relative error, and the absolute one where there is nothing to be relative to."""

    def of(compared: Compared) -> Score:
        if compared.rr:
            return Score(error(compared))
        note = "the reference is all zero, so this is max|actual|, as for abs"
        return Score(_abs(compared), note if compared.count else _zero_reference(compared))

    return of


def _abs(compared: Compared) -> float:
    return compared.error / compared.unit


def _largest(sums: Sums) -> float:
    return sums.error / sums.peak


def _l2(sums: Sums) -> float:
    return math.sqrt(sums.dd / sums.rr)


def _snr(compared: Compared) -> Score:
    return Score(_decibels(_l2(compared))) if compared.rr else Score(None, _zero_reference(compared))


def _decibels(relative: float) -> float:
    return -20 * math.log10(relative) if relative else math.inf


def _cosine(compared: Compared) -> Score:
    if not compared.rr:
        return Score(None, _zero_reference(compared))
    dd, dr, rr = compared.dd, compared.dr, compared.rr
    yy = rr + 2 * dr + dd
    if rr / _ALIKE < yy < rr * _ALIKE:
        return Score(_turned(dd, dr, rr))
    yy, yr = compared.squares()
    if not yy:
        return Score(None, "the actual output is all zero")
    return Score(max(0.0, 1 - yr / (math.sqrt(yy) * math.sqrt(rr))))


def _turned(dd: float, dr: float, rr: float) -> float:
    """1 − cos as (‖d‖² − (‖y‖−‖r‖)²) / (2‖y‖‖r‖), which doesn't cancel as 1 − cos does where y and r are alike."""
    short, long = math.sqrt(rr), math.sqrt(rr + 2 * dr + dd)
    longer = (2 * dr + dd) / (long + short)
    return max(0.0, (dd - longer**2) / (2 * long * short))


def _angle(sums: Sums) -> float:
    """The relative error, orthogonal to the reference, that turns it as far."""
    yy = sums.rr + 2 * sums.dr + sums.dd
    if yy <= 0:
        return math.sqrt(2.0)
    if sums.rr / 4 < yy < 4 * sums.rr:
        return math.sqrt(2 * _turned(sums.dd, sums.dr, sums.rr))
    # Where they are not alike the differences in that formula cancel, and this one does not.
    return math.sqrt(2 * max(0.0, 1 - (sums.rr + sums.dr) / (math.sqrt(sums.rr) * math.sqrt(yy))))


def _top1(compared: Compared, axis: int | None = None) -> Score:
    shape = compared.shape
    shown = f"shape [{', '.join(map(str, shape))}]"
    if axis is None:
        if sum(size > 1 for size in shape) > _CLEAR_AXES:
            return Score(None, f"which axis of {shown} holds the choices is not clear: {_GIVE_AXIS}")
        if not shape or shape[-1] < 2:
            return Score(None, f"{shown} has no last axis of two or more to choose from: {_GIVE_AXIS}")
    elif not -len(shape) <= axis < len(shape) or shape[axis] < 2:
        return Score(None, f"{shown} has no axis {axis} of two or more to choose from")
    if not compared.rr:
        return Score(None, "the reference holds nothing but zeros: every choice ties")
    taken = len(shape) - 1 if axis is None else axis % len(shape)
    disagreeing, rows = compared.disagreeing_rows(compared.limit, taken)
    return Score(disagreeing / rows, f"along axis {taken}", rows=(disagreeing, rows))


def _same(relative: float) -> float:
    return relative


def _default(metric: Callable[[float], float]) -> Callable[[Precision], float]:
    return lambda precision: metric(DEFAULT_TOLERANCE[precision])


def _by_scale(
    name: str,
    of: Callable[[Compared], Score],
    error: Callable[[Sums], float],
    metric: Callable[[float], float] = _same,
    inverse: Callable[[float], float] = _same,
    **others: Any,
) -> Metric:
    relative = Relative(error, metric, inverse)
    return Metric(name, of, default=_default(metric), on_demand=False, relative=relative, **others)


_BUILT_IN = (
    _by_scale("max", _or_absolute(_largest), _largest),
    _by_scale("l2", _or_absolute(_l2), _l2),
    Metric(
        "abs",
        _abs,
        no_default="how large an absolute error may be depends on the model; give tol= in the output's own unit",
        kinds=frozenset({"float", "integer"}),
        on_demand=False,
    ),
    Metric("allclose", lambda compared: compared.allclose, default=_default(_same), on_demand=False),
    # An error of relative size e that is orthogonal to the reference turns it by 1−cos ≈ e²/2. The opposite of the
    # reference, 2, is the most that 1 − cos can be.
    _by_scale(
        "cosine",
        _cosine,
        _angle,
        lambda relative: min(relative, 2.0) ** 2 / 2,
        lambda turned: math.sqrt(2 * turned),
        range=(0.0, 2.0),
    ),
    _by_scale(
        "snr_db",
        _snr,
        _l2,
        _decibels,
        lambda decibels: 10 ** (-max(-6000.0, min(6000.0, decibels)) / 20),
        at_least=True,
        range=(-math.inf, math.inf),
    ),
    Metric(
        "top1",
        _top1,
        range=(0.0, 1.0),
        no_default="how many predictions may change is for you to say; give tol= as a share of rows, such as tol=0.005",
        kinds=frozenset({"float", "integer"}),
        takes_nonfinite=True,
    ),
)
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _BUILT_IN})
"""Every built-in metric by its name, in the order in which limits are judged."""

MISMATCHES = Metric("mismatches", lambda _: math.nan, range=(0.0, 1.0), kinds=frozenset({"integer", "bool", "string"}))
"""The share of unequal elements, by which what is not floating-point is judged first; counted, not computed here."""
_RESERVED = ("mismatches", "nonfinite", "shape", "dtype")


def recorded(name: str, *, at_least: bool = False) -> Metric:
    """The metric that a record names; what is not built in is known by its direction alone."""
    return METRICS.get(name) or replace(MISMATCHES, name=name, at_least=at_least)


def rank(entry: JudgedRecord) -> tuple[int, float]:
    """What orders judged limits, so that the largest decides: the verdict, then how much of the limit is used up."""
    severity = SEVERITY.index(entry.verdict)
    if entry.verdict == "not_measured":
        return severity, 0.0
    metric = recorded(entry.metric, at_least=bool(entry.at_least))
    return severity, metric.used(entry.value, entry.limit)
