"""The plots of the HTML report, each from the keys of a check record that docs/report.md describes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import plural
from pytest_trtcheck.report import svg
from pytest_trtcheck.report.text import format_number, shorten_middle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.record import TensorRecord
    from pytest_trtcheck.report.history import Line, Turn
    from pytest_trtcheck.report.view import BudgetView, Judgement

WIDTH, HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, WIDTH - 10, 22, HEIGHT - 34
_MOST_BINS = 40


def outputs(judgements: Sequence[tuple[Judgement, float | None, bool]]) -> str:
    """One row per output: its error, the limit, and the emulated model's error beside an engine's.

    Parameters
    ----------
    judgements
        What decided each output; the emulated model's value of the same metric, or None; whether an engine ran.
    """
    # What grows where errors shrink has no place on this axis.
    shown = [row for row in judgements if row[0].limit is not None and not row[0].at_least]
    if not shown:
        return ""
    values = [v for j, emulated, _ in shown for v in (j.value, j.limit, emulated) if v is not None]
    roomy = len(shown) <= 4
    row_height, top = 40 if roomy else 24, 20
    bottom = top + row_height * len(shown) + 2
    axis = svg.log_axis(values, 110, _RIGHT)
    parts = svg.x_axis(axis, bottom, "error (log scale)")
    for index, (judgement, emulated, engine) in enumerate(shown):
        y = top + row_height * (index + 0.5)
        assert judgement.limit is not None
        limit = axis(judgement.limit)
        error = axis(math.nan if judgement.value is None else judgement.value)
        parts += [
            svg.text(
                104,
                y + (-2 if roomy else 3.5),
                shorten_middle(judgement.output or judgement.metric, 16),
                "label",
                "end",
            ),
            *([svg.text(104, y + 11, judgement.value_text, "name", "end")] if roomy else []),
            svg.line(110, y, _RIGHT, y, "grid"),
            svg.line(limit, y - 9, limit, y + 9, "limit"),
        ]
        if emulated is not None and engine:
            parts += [
                svg.line(axis(emulated), y, error, y, "link"),
                svg.dot(axis(emulated), y, "emulated", f"emulated: {format_number(emulated)}"),
            ]
        kind = ("engine" if engine else "emulated") + (" over" if judgement.verdict in {"fail", "error"} else "")
        said = f"{judgement.metric} {judgement.value_text}, {judgement.limit_text}"
        parts.append(svg.dot(error, y, kind, said))
    kinds = {
        "engine": any(engine for _, _, engine in shown),
        "emulated": any(seen is not None or not engine for _, seen, engine in shown),
    }
    parts.append(_legend([*((kind, kind) for kind, drawn in kinds.items() if drawn), ("limit", "tolerance")]))
    return svg.svg(WIDTH, round(bottom + 34), f"error against tolerance of {plural(len(shown), 'output')}", parts)


_LEAST_OCTAVE, _LAST_OCTAVE = -1074, 1022


def histogram(octaves: Sequence[tuple[int, int]], zeros: int, limit: float | None) -> str:
    """How the errors of an output's elements are spread.

    Parameters
    ----------
    octaves
        [e, n] each: n elements have a |output − reference| between 2^e and 2^(e+1).
    zeros
        How many elements are exactly equal.
    limit
        The tolerance in the same units.
    """
    # A report may have been edited: what no FP64 number has would make a page without end.
    counts = {min(max(exponent, _LEAST_OCTAVE), _LAST_OCTAVE): max(count, 0) for exponent, count in octaves}
    first, last = min(counts), max(counts)
    edges = [2.0**exponent for exponent in range(first, last + 2)]
    heights = [counts.get(exponent, 0) for exponent in range(first, last + 1)]
    axis = svg.log_axis([*edges, limit] if limit is not None else edges, _LEFT, _RIGHT)
    # Outliers are what one looks for: a single element must be seen beside millions.
    height = svg.Axis(0, math.log10(1 + max(heights)), _BOTTOM, _TOP)
    parts = [
        *_count_axis(height, max(heights)),
        *svg.x_axis(axis, _BOTTOM, "|output − reference|, log scale"),
        svg.bars([axis(edge) for edge in edges], [height(math.log10(1 + count)) for count in heights], _BOTTOM, "bars"),
    ]
    if limit is not None:
        parts += _mark(axis(limit), "tolerance", "limit")
    said = f"{_compact(sum(heights))} differ" + (f", {_compact(zeros)} equal" if zeros else "")
    return svg.svg(WIDTH, HEIGHT, f"error histogram: {said}", [*parts, svg.text(0, _BOTTOM + 27, said, "name")])


def along_graph(tensors: Sequence[TensorRecord], marked: str | None, points: int = 160) -> str:
    """The error of each tensor in graph order, with the tensor to blame marked.

    Parameters
    ----------
    tensors
        In the order of the graph, the error relative to the reference tensor.
    marked
        The name of the tensor to mark.
    points
        At most so many are drawn, the worst of their neighbours.
    """
    errors = [math.nan if tensor.error is None else tensor.error for tensor in tensors]
    positive = [e for e in errors if math.isfinite(e) and e > 0]
    y = svg.log_axis(positive, _BOTTOM, _TOP)
    x = svg.Axis(0, max(len(errors) - 1, 1), _LEFT, _RIGHT)
    parts = svg.y_axis([(y(value), name) for value, name in y.ticks()], _LEFT, _RIGHT)
    parts += [
        svg.line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"),
        svg.text(_LEFT, _BOTTOM + 13, "inputs", "tick"),
        svg.text(_RIGHT, _BOTTOM + 13, "outputs", "tick", "end"),
        svg.text(
            (_LEFT + _RIGHT) / 2, _BOTTOM + 27, f"{plural(len(errors), 'tensor')} in graph order", "name", "middle"
        ),
        svg.text(_LEFT, 12, "relative error (log scale)", "name"),
    ]
    kept = _worst_of_each_bin(errors, points)
    parts.append(svg.polyline([(x(index), y(errors[index])) for index in kept], "curve"))
    parts += [
        svg.dot(x(i), y(errors[i]), "engine over", f"{tensors[i].name}: {errors[i]}", 3)
        for i in kept
        if not math.isfinite(errors[i])
    ][:20]
    found = next((index for index, tensor in enumerate(tensors) if tensor.name == marked), None)
    if found is not None:
        name = shorten_middle(tensors[found].name, 34)
        near_end = x(found) > (_LEFT + _RIGHT) / 2
        parts += [
            svg.line(x(found), _TOP, x(found), _BOTTOM, "blame"),
            svg.dot(x(found), y(errors[found]), "blame", f"{name}: {format_number(errors[found])}"),
            svg.text(x(found) + (-6 if near_end else 6), _BOTTOM - 6, name, "label", "end" if near_end else "start"),
        ]
    return svg.svg(WIDTH, HEIGHT, f"error of {plural(len(errors), 'tensor')} along the graph", parts)


def latency(samples_ms: Sequence[float], budgets: Sequence[BudgetView]) -> str:
    """How the latency samples are spread, with each quantile's confidence bounds and budget."""
    quantiles = [budget for budget in budgets if budget.unit == "ms"]
    samples = sorted(filter(math.isfinite, samples_ms))
    if not samples:
        return ""
    marks = [v for b in quantiles for v in (b.limit, b.low, b.high) if v is not None]
    # A few stragglers would flatten all the rest: they are counted at the edge instead.
    cut = max(samples[math.ceil(0.995 * len(samples)) - 1], *marks, samples[0])
    axis = svg.linear_axis([samples[0], *marks, cut], _LEFT, _RIGHT)
    width = (axis.high - axis.low) / _MOST_BINS
    counts = [0] * _MOST_BINS
    for sample in samples:
        counts[min(int((sample - axis.low) / width), _MOST_BINS - 1)] += 1
    height = svg.Axis(0, max(counts), _BOTTOM, _TOP + 26)
    edges = [axis(axis.low + width * index) for index in range(_MOST_BINS + 1)]
    parts = [*svg.x_axis(axis, _BOTTOM, "latency in ms")]
    if any(budget.low is not None and budget.high is not None for budget in quantiles):
        parts.append(svg.text(_LEFT, _BOTTOM + 27, "shaded: confidence bounds", "name"))
    for row, budget in enumerate(quantiles):
        if budget.low is not None and budget.high is not None:
            left, right = axis(budget.low), axis(budget.high)
            parts.append(svg.rectangle(left, _TOP + 8, max(right - left, 2), _BOTTOM - _TOP - 8, "bounds"))
            parts.append(svg.text((left + right) / 2, _TOP + 20 + 11 * (row % 2), budget.name, "name", "middle"))
    parts.append(svg.bars(edges, [height(count) for count in counts], _BOTTOM, "bars"))
    for row, budget in enumerate(quantiles):
        if budget.limit is not None:
            kind = "limit over" if budget.verdict == "fail" else "limit"
            parts += _mark(axis(budget.limit), f"{budget.name} {budget.limit_text}", kind, 10 + 11 * (row % 2))
    said = f"latency distribution, {samples[0]:.4g} to {samples[-1]:.4g} ms"
    return svg.svg(WIDTH, HEIGHT, said, parts)


def emulated_against_engine(points: Sequence[tuple[str, float, float, bool]]) -> str:
    """Every check's emulated error against its engine's error: off the diagonal, the engine adds its own.

    Parameters
    ----------
    points
        Name, emulated error, engine error, whether the check failed.
    """
    values = [value for _, emulated, engine, _ in points for value in (emulated, engine)]
    x = svg.log_axis(values, _LEFT, _RIGHT)
    y = svg.Axis(x.low, x.high, _BOTTOM + 40, _TOP, log=True)
    low, high = x.low, x.high
    parts = [
        *svg.y_axis([(y(value), name) for value, name in y.ticks()], _LEFT, _RIGHT),
        *svg.x_axis(x, _BOTTOM + 40, "emulated error (log scale)"),
        svg.text(_LEFT, 12, "engine error (log scale)", "name"),
        svg.line(x(low), y(low), x(high), y(high), "diagonal"),
    ]
    parts += [
        svg.dot(
            x(emulated),
            y(engine),
            "engine over" if bad else "engine",
            f"{name}: emulated {format_number(emulated)}, engine {format_number(engine)}",
        )
        for name, emulated, engine, bad in points
    ]
    apart = max(points, key=lambda point: abs(math.log10(max(point[2], 1e-12) / max(point[1], 1e-12))))
    near_end = x(apart[1]) > (_LEFT + _RIGHT) / 2
    place = x(apart[1]) + (-7 if near_end else 7), y(apart[2]) + 3.5
    parts.append(svg.text(*place, shorten_middle(apart[0], 30), "label", "end" if near_end else "start"))
    return svg.svg(WIDTH, HEIGHT + 40, f"emulated against engine error of {plural(len(points), 'check')}", parts)


def history(line: Line, turns: Sequence[Turn]) -> str:
    """One quantity from report to report: its limit, and where it became worse.

    Parameters
    ----------
    line
        The line is broken where its value is not known.
    turns
        Where the check changed; where it could not be compared, the line is broken as well.
    """
    width, height, left, right = 220, 54, 6, 214
    known = [value for value in line.known if math.isfinite(value)]
    # Far below its limit, a line would lie flat whatever it does: then the limit is said, and not drawn.
    limit = line.limit if line.limit is not None and line.limit <= 4 * max(known, default=line.limit) else None
    marks = [*known, *([limit] if limit is not None else [])]
    # A line that fills its picture whatever it does makes noise look like news: it starts at nothing.
    y = svg.Axis(min(0.0, *marks), max(*marks, 0.0) or 1.0, height - 8, 8) if marks else svg.Axis(0, 1, height - 8, 8)
    x = svg.Axis(0, max(len(line.values) - 1, 1), left, right)
    parts = [svg.line(left, y(0), right, y(0), "grid")]
    if limit is not None:
        parts.append(svg.line(left, y(limit), right, y(limit), "limit"))
    breaks = {turn.place for turn in turns if turn.obstacles}
    stretch: list[tuple[float, float]] = []
    for place, value in enumerate(line.values):
        if value is None or place in breaks:
            parts += _stretch(stretch)
            stretch = []
        if value is not None:
            stretch.append((x(place), y(math.inf if math.isnan(value) else value)))
    parts += _stretch(stretch)
    for turn in turns:
        value = line.values[turn.place]
        if value is not None and turn.marks(line):
            told = f"report {turn.moment.number}: {turn.text}"
            parts.append(svg.dot(x(turn.place), y(value), "engine over", told, 3.5))
    said = f"{line.what} over {plural(len(line.values), 'report')}: {line.text}"
    return svg.svg(width, height, said, parts, kind="plot spark")


def _stretch(points: Sequence[tuple[float, float]]) -> list[str]:
    """A stretch of a line; a point alone is a dot, for it has no length."""
    return [svg.polyline(points, "curve")] if len(points) > 1 else [svg.dot(*at, "engine", radius=2) for at in points]


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    parts, x = [], float(_RIGHT)
    for kind, name in reversed(entries):
        x -= 6.2 * len(name)
        parts.append(svg.text(x, 12, name, "tick"))
        x -= 9
        parts.append(svg.line(x, 4, x, 14, kind) if kind == "limit" else svg.dot(x, 8.5, kind, radius=3.5))
        x -= 12
    return "".join(parts)


def _mark(x: float, name: str, kind: str, y: float = 12) -> list[str]:
    anchor = "end" if x > (_LEFT + _RIGHT) / 2 else "start"
    return [svg.line(x, y + 3, x, _BOTTOM, kind), svg.text(x, y, name, "label", anchor)]


def _count_axis(height: svg.Axis, most: float) -> list[str]:
    marks = [
        (height(math.log10(1 + count)), _compact(count)) for count in (1, 100, 10**4, 10**6, 10**8) if count <= most
    ]
    return svg.y_axis(marks, _LEFT, _RIGHT)


def _compact(count: int) -> str:
    """A count in a few characters, as in "40.2 k"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            scale = 10**3 if unit == "k" else size
            return f"{count / scale:.3g} {unit}"
    return f"{count}"


def _worst_of_each_bin(errors: Sequence[float], most: int) -> list[int]:
    """Indices of at most so many points that keep every peak."""
    step = math.ceil(len(errors) / most) or 1
    bins = [range(start, min(start + step, len(errors))) for start in range(0, len(errors), step)]
    return [max(b, key=lambda index: math.inf if math.isnan(errors[index]) else errors[index]) for b in bins]
