"""What a command printed, held against what a page says that it prints."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ANY = ("…", "...")
"""A line that stands for any number of lines."""

_CHANGING = (
    # Durations as pytest and we write them; a latency in ms is a figure, and stays.
    (re.compile(r"\b(in|after|took) \d+(\.\d+)? ?s\b( \(\d+:\d\d:\d\d\))?"), r"\1 <duration>"),
    (
        re.compile(r"={3,}|-{3,}|_{3,}"),
        lambda found: found[0][:3],
    ),  # pytest fills the line up, by the length of the text
    (re.compile(r"\b\d+\.\d+\.\d+(\.\d+)*(\.?(dev|post|rc)\d+)?(\+[a-z0-9.]+)?\b"), "<version>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?Z?)?\b"), "<date>"),
    (re.compile(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,}\b"), "<hash>"),
    (re.compile(r"\b(engine|ONNX|sha256|key) [0-9a-f]{8}\b"), r"\1 <hash>"),
    (re.compile(r" at 0x[0-9a-f]+"), " at <address>"),
)
_PROGRESS = re.compile(r"\n(?:trtcheck: [^\n]* …\n)+(?:\S+\.py )?")
"""What a log is told while something takes long, which depends on the machine: it breaks the line of a test's file."""
_FIGURE = re.compile(r"\d[\d,]*\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+", re.IGNORECASE)


def normalized(text: str) -> list[str]:
    """Lines without what changes from run to run; no figure is touched."""
    text = _PROGRESS.sub("", text)
    for pattern, instead in _CHANGING:
        text = pattern.sub(instead, text)
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and not lines[0]:
        del lines[0]
    while lines and not lines[-1]:
        del lines[-1]
    return lines


def difference(page: Sequence[str], printed: str, within: float = 0.0) -> str | None:
    """How what was printed differs from a page's lines; None where it does not.

    Parameters
    ----------
    within
        The share by which figures with a decimal point may differ.
    """
    expected, actual = normalized("\n".join(page)), normalized(printed)
    if _fits(expected, actual, within):
        return None
    shown = difflib.unified_diff(expected, actual, "the page", "printed", lineterm="", n=max(len(expected), 3))
    return "\n".join(list(shown)[:160])


def _fits(expected: list[str], actual: list[str], within: float) -> bool:
    """Whether the lines between wildcards follow each other in what was printed."""
    chunks: list[list[str]] = [[]]
    for line in expected:
        if line.strip() in ANY:
            chunks.append([])
        else:
            chunks[-1].append(line)
    first, *others = chunks
    if not others:
        return _same(first, actual, within)
    if not _same(first, actual[: len(first)], within):
        return False
    *middle, last = others
    start = len(first)
    for chunk in middle:
        places = range(start, len(actual) - len(chunk) + 1)
        place = next((each for each in places if _same(chunk, actual[each : each + len(chunk)], within)), None)
        if place is None:
            return False
        start = place + len(chunk)
    return len(actual) - start >= len(last) and _same(last, actual[len(actual) - len(last) :], within)


def _same(expected: Sequence[str], actual: Sequence[str], within: float) -> bool:
    return len(expected) == len(actual) and all(
        _same_line(*pair, within) for pair in zip(expected, actual, strict=True)
    )


def _same_line(expected: str, actual: str, within: float) -> bool:
    if expected.endswith(" …"):
        expected, actual = expected[:-2], actual[: len(expected) - 2]
    if expected == actual:
        return True
    if not within or _FIGURE.sub("#", expected) != _FIGURE.sub("#", actual):
        return False
    pairs = zip(_FIGURE.findall(expected), _FIGURE.findall(actual), strict=True)
    return all(abs(_number(a) - _number(b)) <= within * max(abs(_number(a)), abs(_number(b))) for a, b in pairs)


def _number(text: str) -> float:
    return float(text.replace(",", ""))
