"""From the `tol` and `metric` of a marker to the limits of every output, each with where it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_trtcheck.compare.division import Division
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.spec import METRICS, Metric, Part, Precision, Tolerance

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

JudgedMetric: TypeAlias = Literal["max", "l2", "abs", "allclose", "cosine", "snr_db", "top1", "mismatches"]
TolArgument: TypeAlias = "float | Tolerance | tuple[tuple[str, float | Tolerance], ...] | None"

DEFAULT_TOLERANCE: Mapping[Precision, float] = {
    "fp32": 1e-4,
    "tf32": 5e-3,
    "fp16": 1e-2,
    "bf16": 3e-2,
    "int8": 5e-2,
    "fp8": 5e-2,
}
"""For `max`, and for `l2` and `allclose`, which measure the same kind of relative error."""

_UNDIVIDED = Division()
EQUAL = "what is not floating-point must be equal"
_LARGEST: Mapping[str, float] = {"top1": 1.0, "mismatches": 1.0, "cosine": 2.0}
_NO_DEFAULT: Mapping[str, str] = {
    "abs": "how large an absolute error may be depends on the model; give tol= in the output's own unit",
    "top1": "how many predictions may change is for you to say; give tol= as a share of rows, such as tol=0.005",
}


Limits: TypeAlias = "Mapping[str, tuple[Limit, ...]]"
"""The limits of every output, by its name."""


@dataclass(frozen=True)
class Limit:
    """One metric's limit on one output.

    Parameters
    ----------
    metric
        What is limited: a metric of `spec.METRICS`, or `mismatches`, the share of unequal elements.
    limit
        The most that the metric may be; for `snr_db` the least.
    source
        Where the limit came from, in words: "default for fp16", "tol=0.01", "tol['boxes*']".
    named
        Whether it was given for outputs by name rather than for all.
    axis
        Of `top1`: along which the largest element is chosen; None: the last, where that is clear.
    division
        How the output is divided into parts; the same in all limits of an output.
    """

    metric: JudgedMetric
    limit: float
    source: str
    named: bool = False
    axis: int | None = None
    division: Division = _UNDIVIDED

    @property
    def at_least(self) -> bool:
        """Whether the limit is the least that the metric may be."""
        return self.metric == "snr_db"

    def holds(self, value: float) -> bool:
        """Whether `value` keeps the limit; NaN never does."""
        return value >= self.limit if self.at_least else value <= self.limit


def resolve_limits(
    tol: TolArgument,
    metric: Metric,
    precision: Precision,
    output_names: Sequence[str],
    *,
    axis: int | None = None,
    known: Mapping[str, Division] | None = None,
) -> dict[str, tuple[Limit, ...]]:
    """The limits of every output, in the order of `output_names`; each output has at least one.

    A mapping's patterns are tried in their order and the first that matches the output's name wins. An output that
    none matches gets the default of the precision.

    Parameters
    ----------
    axis
        Along which `metric="top1"` chooses.
    known
        How outputs are divided where the user does not say; the others are not.

    Raises
    ------
    ArgumentError
        A pattern matches no output or is never reached, a limit is out of its range, parts are given of an output that
        does not exist, or `tol` is missing for a metric that has no default.
    """
    resolved = _by_output(tol, metric, precision, output_names)
    owners = dict(tol) if isinstance(tol, tuple) else {"*": tol}
    for name, limits in resolved.items():
        owner = next((each for pattern, each in owners.items() if _matches(pattern, name)), None)
        division = _division(name, owner, (known or {}).get(name, Division()))
        chosen = owner.top1_axis if isinstance(owner, Tolerance) and owner.top1_axis is not None else axis
        resolved[name] = tuple(
            replace(limit, division=division, axis=chosen if limit.metric == "top1" else None) for limit in limits
        )
    for pattern, owner in owners.items():
        _refuse_idle_parts(owner, [name for name in output_names if _matches(pattern, name)])
    return resolved


def _division(name: str, owner: object, known: Division) -> Division:
    if not isinstance(owner, Tolerance) or owner.parts == "auto":
        return known
    if owner.parts is None:
        return Division()
    given = owner.parts.get(name)
    return known if given is None else Division(tuple(Part((each,)) for each in given), given=True, batch=known.batch)


def _refuse_idle_parts(owner: object, names: Sequence[str]) -> None:
    if not isinstance(owner, Tolerance) or owner.parts is None or isinstance(owner.parts, str):
        return
    for name in owner.parts:
        if name not in names:
            raise ArgumentError(
                f"Tolerance.parts[{name!r}]: there is no such output here",
                f"it holds for {', '.join(map(repr, names))}",
            )


def _by_output(
    tol: TolArgument, metric: Metric, precision: Precision, output_names: Sequence[str]
) -> dict[str, tuple[Limit, ...]]:
    if not isinstance(tol, tuple):
        limits = _limits("tol", tol, metric, precision)
        return dict.fromkeys(output_names, limits)
    owner = {name: next((p for p, _ in tol if _matches(p, name)), None) for name in output_names}
    _refuse_idle_patterns([pattern for pattern, _ in tol], owner)
    given = {
        pattern: _limits(f"tol[{pattern!r}]", value, metric, precision, named=pattern != "*") for pattern, value in tol
    }
    default = _default("max", precision, "tol names no such output")
    return {name: default if pattern is None else given[pattern] for name, pattern in owner.items()}


def default_limit(metric: Metric, precision: Precision) -> float | None:
    """The limit of `metric` at `precision` when none was given; None where only the user can know.

    `snr_db` and `cosine` follow from the default for `l2`: SNR is −20·log₁₀(l2), and an error of relative size l2
    that is orthogonal to the reference turns it by 1−cos ≈ l2²/2.
    """
    relative = DEFAULT_TOLERANCE[precision]
    known: dict[Metric, float] = {
        "max": relative,
        "l2": relative,
        "allclose": relative,
        "snr_db": -20.0 * math.log10(relative),
        "cosine": relative**2 / 2,
    }
    return known.get(metric)


def division_of(limits: Iterable[Limit]) -> Division:
    """How the output that these limits are of is divided; not at all where there are none."""
    return next((each.division for each in limits), Division())


def top1_axis(limits: Iterable[Limit]) -> int | None:
    """The axis given for `top1`."""
    return next((each.axis for each in limits if each.metric == "top1"), None)


def top1_tie(limits: Iterable[Limit]) -> float | None:
    """How close two reference scores must be to count as a tie: the limit on `top1`; None when it isn't judged."""
    return next((each.limit for each in limits if each.metric == "top1"), None)


def _matches(pattern: str, name: str) -> bool:
    # Exporters put brackets into names, which a glob would take for a character class.
    return pattern == name or fnmatchcase(name, pattern)


def _refuse_idle_patterns(patterns: list[str], owner: Mapping[str, str | None]) -> None:
    names = ", ".join(repr(name) for name in owner)
    for pattern in patterns:
        matched = [name for name in owner if _matches(pattern, name)]
        if not matched:
            raise ArgumentError(f"tol[{pattern!r}] matches no output of the model", f"its outputs are {names}")
        if pattern not in owner.values():
            raise ArgumentError(
                f"tol[{pattern!r}] is never used: {matched[0]!r} is already matched by tol[{owner[matched[0]]!r}]",
                "the first pattern that matches wins, so put the more specific ones first",
            )


def _limits(
    label: str, value: float | Tolerance | None, metric: Metric, precision: Precision, *, named: bool = False
) -> tuple[Limit, ...]:
    if value is None:
        return _default(metric, precision)
    if not isinstance(value, Tolerance):
        source = f"{label}={value:g}" if label == "tol" else label
        return (_checked(Limit(metric, float(value), source, named)), Limit("mismatches", 0.0, EQUAL, named))
    given = tuple(_checked(Limit(key, float(limit), label, named)) for key, limit in value.limits().items())
    # A tolerance on mismatches alone says nothing about floats, and an output without a limit would always pass.
    fallback: Metric = "max" if default_limit(metric, precision) is None else metric
    metrics = given or _default(fallback, precision, f"{label} limits no metric")[:1]
    source = label if value.mismatches else EQUAL
    return (*metrics, _checked(Limit("mismatches", float(value.mismatches), source, named)))


def _default(metric: Metric, precision: Precision, why: str = "") -> tuple[Limit, ...]:
    limit = default_limit(metric, precision)
    if limit is None:
        raise ArgumentError(f"metric={metric!r} has no default tolerance", _NO_DEFAULT[metric])
    source = f"default for {precision}" + (f": {why}" if why else "")
    return (Limit(metric, limit, source), Limit("mismatches", 0.0, EQUAL))


def _checked(limit: Limit) -> Limit:
    if limit.metric not in (*METRICS, "mismatches"):
        raise ArgumentError(f"unknown metric {limit.metric!r}", f"choose one of {', '.join(METRICS)}")
    least = -math.inf if limit.at_least else 0.0
    most = _LARGEST.get(limit.metric, math.inf)
    if math.isnan(limit.limit) or not least <= limit.limit <= most:
        raise ArgumentError(
            f"{limit.source}: {limit.limit:g} is no limit for {limit.metric}",
            f"give a number from {least:g} to {most:g}" if least > -math.inf else "give a number of decibels",
        )
    return limit
