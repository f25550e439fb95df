"""From the `tol` and `metric` of a marker to the limits of every output, each with where it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

from pytest_trtcheck.compare.division import Division
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.metrics import METRICS, MISMATCHES, Metric, named, top1
from pytest_trtcheck.spec import Part, Precision, Tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TolArgument: TypeAlias = "float | Tolerance | tuple[tuple[str, float | Tolerance], ...] | None"

_UNDIVIDED = Division()
EQUAL = "what is not floating-point must be equal"


Limits: TypeAlias = "Mapping[str, tuple[Limit, ...]]"
"""The limits of every output, by its name."""


@dataclass(frozen=True)
class Limit:
    """One metric's limit on one output.

    Parameters
    ----------
    metric
        What is limited: a metric, or `MISMATCHES`, the share of unequal elements.
    limit
        The most that the metric may be, or the least.
    source
        Where the limit came from, in words: "default for fp16", "tol=0.01", "tol['boxes*']".
    named
        Whether it was given for outputs by name rather than for all.
    division
        How the output is divided into parts; the same in all limits of an output.
    """

    metric: Metric
    limit: float
    source: str
    named: bool = False
    division: Division = _UNDIVIDED

    def holds(self, value: float) -> bool:
        """Whether `value` keeps the limit; NaN never does."""
        return self.metric.holds(value, self.limit)


def resolve_limits(
    tol: TolArgument,
    metric: str | Metric,
    precision: Precision,
    output_names: Sequence[str],
    *,
    known: Mapping[str, Division] | None = None,
) -> dict[str, tuple[Limit, ...]]:
    """The limits of every output, in the order of `output_names`; each output has at least one.

    A mapping's patterns are tried in their order and the first that matches the output's name wins. An output that
    none matches gets the default of the precision.

    Parameters
    ----------
    known
        How outputs are divided where the user does not say; the others are not.

    Raises
    ------
    ArgumentError
        A pattern matches no output or is never reached, a limit is out of its range, parts are given of an output that
        does not exist, or `tol` is missing for a metric that has no default.
    """
    metric = named(metric)
    owners = dict(tol) if isinstance(tol, tuple) else {"*": tol}
    given = {
        pattern: _limits(f"tol[{pattern!r}]" if isinstance(tol, tuple) else "tol", value, metric, precision, pattern)
        for pattern, value in owners.items()
    }
    owner = {name: next((p for p in owners if _matches(p, name)), None) for name in output_names}
    _refuse_idle_patterns(owners, owner)
    default = _default(METRICS["max"], precision, "tol names no such output")
    resolved = {}
    for name, pattern in owner.items():
        limits, value = (default, None) if pattern is None else (given[pattern], owners[pattern])
        division = _division(name, value, (known or {}).get(name, _UNDIVIDED))
        resolved[name] = tuple(replace(limit, division=division) for limit in limits)
    return _joined(resolved, precision)


def _joined(resolved: dict[str, tuple[Limit, ...]], precision: Precision) -> dict[str, tuple[Limit, ...]]:
    """The same where a metric is of several outputs together: it alone judges each of those, and no other.

    Raises
    ------
    ArgumentError
        It names an output that does not exist, or stands beside other limits.
    """
    joint = {limit.metric: limit for limits in resolved.values() for limit in limits if limit.metric.joins}
    if not joint:
        return resolved
    owner: dict[str, Limit] = {}
    for metric, limit in joint.items():
        if missing := [name for name in metric.joins if name not in resolved]:
            names = ", ".join(map(repr, resolved))
            raise ArgumentError(
                f"metric {metric.name}: the model has no output {', '.join(map(repr, missing))}",
                f"its outputs are {names}",
                code="output-unknown",
            )
        owner |= dict.fromkeys(metric.joins, limit)
    why = "it is none of the outputs that are judged together"
    for name, limits in resolved.items():
        given = [each for each in limits if each.metric is not MISMATCHES and not each.source.startswith("default")]
        others = [each for each in given if not each.metric.joins]
        if name in owner and others:
            raise ArgumentError(
                f"{owner[name].source}: {owner[name].metric.name} judges {name!r} alone, and {others[0].metric.name} "
                "is limited beside it",
                "its elements have no order to be compared in",
                code="argument-conflict",
            )
        if name in owner:
            resolved[name] = (owner[name],)
        elif any(each.metric.joins for each in limits):
            division = limits[0].division
            resolved[name] = tuple(
                replace(each, division=division) for each in _default(METRICS["max"], precision, why)
            )
    return resolved


def _division(name: str, owner: object, known: Division) -> Division:
    if not isinstance(owner, Tolerance) or owner.parts == "auto":
        return known
    if owner.parts is None:
        return Division()
    given = owner.parts.get(name)
    return known if given is None else Division(tuple(Part((each,)) for each in given), given=True, batch=known.batch)


def _matches(pattern: str, name: str) -> bool:
    # Exporters put brackets into names, which a glob would take for a character class.
    return pattern == name or fnmatchcase(name, pattern)


def _refuse_idle_patterns(owners: Mapping[str, float | Tolerance | None], owner: Mapping[str, str | None]) -> None:
    for pattern, value in owners.items():
        matched = [name for name in owner if _matches(pattern, name)]
        if len(owners) > 1 or pattern != "*":
            if not matched:
                names = ", ".join(map(repr, owner))
                raise ArgumentError(
                    f"tol[{pattern!r}] matches no output of the model",
                    f"its outputs are {names}",
                    code="output-unknown",
                )
            if pattern not in owner.values():
                raise ArgumentError(
                    f"tol[{pattern!r}] is never used: {matched[0]!r} is already matched by tol[{owner[matched[0]]!r}]",
                    "the first pattern that matches wins, so put the more specific ones first",
                    code="argument-conflict",
                )
        parts = value.parts if isinstance(value, Tolerance) else None
        for name in parts if parts and not isinstance(parts, str) else ():
            if name not in matched:
                raise ArgumentError(
                    f"Tolerance.parts[{name!r}]: there is no such output here",
                    f"it holds for {', '.join(map(repr, matched))}",
                    code="output-unknown",
                )


def _limits(
    label: str, value: float | Tolerance | None, metric: Metric, precision: Precision, pattern: str
) -> tuple[Limit, ...]:
    if value is None:
        return _default(metric, precision)
    is_named = pattern != "*"
    if not isinstance(value, Tolerance):
        source = f"{label}={value:g}" if label == "tol" else label
        return (_checked(Limit(metric, float(value), source, is_named)), Limit(MISMATCHES, 0.0, EQUAL, is_named))
    asked = [(named(each), limit) for each, limit in (*value.limits.items(), *value.metrics.items())]
    chosen = {each.name: (each, limit) for each, limit in asked}
    if len(chosen) < len(asked):
        raise ArgumentError(
            f"{label}: two metrics have one name", "give one of the functions another name", code="argument-conflict"
        )
    given = tuple(
        _checked(Limit(_along(each, value.top1_axis, metric), float(limit), label, is_named))
        for each, limit in (chosen[name] for name in dict.fromkeys((*METRICS, *chosen)) if name in chosen)
    )
    # A tolerance on mismatches alone says nothing about floats, and an output without a limit would always pass.
    fallback = METRICS["max"] if metric.default is None else metric
    metrics = given or _default(fallback, precision, f"{label} limits no metric")[:1]
    source = label if value.mismatches else EQUAL
    return (*metrics, _checked(Limit(MISMATCHES, float(value.mismatches), source, is_named)))


def _along(metric: Metric, axis: int | None, asked: Metric) -> Metric:
    """`top1` along the axis given beside its limit, or that of the marker's `metric`."""
    return top1(asked.axis if axis is None else axis) if metric == METRICS["top1"] else metric


def _default(metric: Metric, precision: Precision, why: str = "") -> tuple[Limit, ...]:
    if metric.default is None:
        raise ArgumentError(
            f"metric={metric.name!r} has no default tolerance", metric.no_default, code="argument-missing"
        )
    source = f"default for {precision}" + (f": {why}" if why else "")
    return (_checked(Limit(metric, float(metric.default(precision)), source)), Limit(MISMATCHES, 0.0, EQUAL))


def _checked(limit: Limit) -> Limit:
    least, most = limit.metric.range
    if math.isnan(limit.limit) or not least <= limit.limit <= most:
        raise ArgumentError(
            f"{limit.source}: {limit.limit:g} is no limit for {limit.metric.name}",
            f"give a number from {least:g} to {most:g}" if least > -math.inf else "give a number",
        )
    return limit
