"""Scales and shapes for small plots, written as SVG by hand: a report must open without any library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.report.text import markup

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MOST_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on the pixels from `start` to `end`; what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; infinity is at the end, NaN too: both are worse than any number."""
        if math.isnan(value):
            return self.end
        clamped = min(max(value, self.low), self.high)
        low, high, at = (math.log10(x) if self.log else x for x in (self.low, self.high, clamped))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values with their labels: at most six of them."""
        return _decades(self.low, self.high) if self.log else _round_steps(self.low, self.high)


def log_axis(values: Iterable[float], start: float, end: float, least: float = 1e-12) -> Axis:
    """A logarithmic axis of whole decades around the positive finite values."""
    known = [max(value, least) for value in values if math.isfinite(value) and value > 0] or [1e-3, 1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), start, end, log=True)


def linear_axis(values: Iterable[float], start: float, end: float) -> Axis:
    """A linear axis with a little room on both sides of the finite values."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end)


def svg(width: int, height: int, label: str, parts: Iterable[str], *, kind: str = "plot") -> str:
    """A whole picture; `label` is what a screen reader says."""
    # Where a server forbids styles, lines are lines and no surfaces, and letters are of their size.
    bare = f'width="{width}" height="{height}" font-size="11" fill="none" stroke="currentColor" stroke-width=".6"'
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" {bare} role="img" aria-label="{markup(label)}">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """Text whose `anchor` (start, middle, end) is at x."""
    attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text x="{px(x)}" y="{px(y)}"{attributes}>{markup(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<path class="{kind}" d="M{px(x1)} {px(y1)}L{px(x2)} {px(y2)}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle."""
    return f'<rect class="{kind}" x="{px(x)}" y="{px(y)}" width="{px(max(width, 0))}" height="{px(max(height, 0))}"/>'


def dot(x: float, y: float, kind: str, title: str = "", radius: float = 4) -> str:
    """A dot; `title` shows when it is pointed at."""
    where = f'cx="{px(x)}" cy="{px(y)}" r="{px(radius)}"'
    return (
        f'<circle class="{kind}" {where}/>' if not title else f'<circle class="{kind}" {where}>{_title(title)}</circle>'
    )


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through all points, as one path: hundreds of elements would make the report large."""
    return f'<path class="{kind}" d="M{" ".join(f"{x:.0f} {px(y)}" for x, y in points)}"/>' if points else ""


def bars(edges: Sequence[float], tops: Sequence[float], base: float, kind: str) -> str:
    """Bars between `edges` (pixels, evenly spaced) from `base` up to `tops` (pixels): one path of thick strokes.

    A bar of any height is seen, however small it is beside the others.
    """
    width = edges[1] - edges[0]
    strokes = "".join(
        f"M{px(left + width / 2)} {px(base)}V{min(top, base - 2):.0f}"
        for left, top in zip(edges, tops, strict=False)
        if top < base
    )
    return f'<path class="{kind}" stroke-width="{px(max(width - 1, 1))}" d="{strokes}"/>'


def x_axis(axis: Axis, y: float, label: str) -> list[str]:
    """The ticks of a horizontal axis below `y`, and what it measures."""
    marks = [text(axis(value), y + 13, name) for value, name in axis.ticks()]
    return [
        line(axis.start, y, axis.end, y, "axis"),
        _group(marks, "middle"),
        text(axis.end, y + 27, label, "name", "end"),
    ]


def y_axis(ticks: Iterable[tuple[float, str]], x: float, right: float) -> list[str]:
    """Labels left of `x` at the heights given (in pixels), with grid lines to `right`."""
    marks = list(ticks)
    lines = "".join(f"M{px(x)} {px(y)}H{px(right)}" for y, _ in marks)
    return [f'<path class="grid" d="{lines}"/>', _group([text(x - 5, y + 3.5, name) for y, name in marks], "end")]


def px(value: float) -> str:
    """A coordinate with as many digits as the eye can use."""
    return f"{value:.1f}".removesuffix(".0")


def _group(marks: Iterable[str], anchor: str) -> str:
    return f'<g class="tick" text-anchor="{anchor}">{"".join(marks)}</g>'


def _title(content: str) -> str:
    return f"<title>{markup(content)}</title>"


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    first, last = round(math.log10(low)), round(math.log10(high))
    step = math.ceil((last - first + 1) / _MOST_TICKS)
    return [
        (10.0**power, f"1e{power}" if abs(power) > 2 else f"{10.0**power:g}") for power in range(first, last + 1, step)
    ]


def _round_steps(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / (_MOST_TICKS - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    decimals = max(0, -math.floor(math.log10(step)))
    return [(n * step, f"{n * step:.{decimals}f}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
