"""How the reports write numbers and names: shared by all of them, so that they never contradict each other."""

from __future__ import annotations

import html
import math
import re
import textwrap
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import visible
from pytest_trtcheck.metrics import distinct_digits
from pytest_trtcheck.record import number

if TYPE_CHECKING:
    from collections.abc import Sequence

MISSING = "–"
ELLIPSIS = "…"


def format_number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits: plain between 0.001 and a million, else as in "4.52e-4".

    >>> [format_number(x) for x in (0.000452, 0.0123, 1.0349, 1234.5, float("inf"))]
    ['4.52e-4', '0.0123', '1.03', '1234', 'inf']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    scientific = f"{value:.{digits - 1}e}"
    exponent = int(scientific.partition("e")[2])
    if not -3 <= exponent < 6:
        return _exponent(scientific)
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def format_limit(limit: float) -> str:
    """A limit as a person wrote it, without the digits that binary floating point adds.

    >>> [format_limit(x) for x in (1e-2, 5e-5, 7.0)]
    ['0.01', '5e-5', '7']
    """
    return _exponent(f"{limit:.12g}")


def format_against(value: float, limit: float) -> tuple[str, str]:
    """A value and its limit, with enough digits that the value read is on the same side of the limit read.

    >>> format_against(0.0100004, 0.01)
    ('0.0100004', '0.01')
    """
    limit_text = format_limit(limit)
    if (value > float(limit_text)) != (value > limit) or (value < float(limit_text)) != (value < limit):
        limit_text = _exponent(repr(limit))
    return format_number(value, distinct_digits(value, float(limit_text))), limit_text


def format_optional(value: float | str | None, digits: int = 3) -> str:
    """A number as it stands in a report ("inf" is a string there, and None is not known)."""
    known = number(value)
    return MISSING if known is None else format_number(known, digits)


def format_duration(seconds: float) -> str:
    """A duration as people say it.

    >>> [format_duration(x) for x in (0.001, 0.0123, 1.5, 75, 7384)]
    ['< 0.01 s', '0.01 s', '1.5 s', '1 min 15 s', '2 h 3 min']
    """
    if seconds < 0.01:
        return "< 0.01 s"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def short_time(started: str) -> str:
    """When a run began, to the minute, in UTC.

    >>> short_time("2026-11-27T00:19:40Z")
    '2026-11-27 00:19'
    """
    return one_line(started).replace("T", " ")[:16]


def short_commit(commit: str) -> str:
    """A commit as git shows it.

    >>> short_commit("a937601d7e4c2e758833b3e6dc2cff1ae996ab00-dirty")
    'a937601-dirty'
    """
    name, dash, rest = commit.partition("-")
    return f"{name[:7]}{dash}{rest}"


def one_line(text: str) -> str:
    """`text` without what would break a line or speak to a terminal."""
    return " ".join(visible(" ".join(text.split())).split())


def markup(text: str) -> str:
    """Text in HTML or SVG."""
    return html.escape(visible(text))


def markdown_text(text: str | None) -> str:
    """Text in a table cell that neither Markdown nor HTML takes for more than text."""
    if text is None:
        return MISSING
    escaped = html.escape(one_line(text), quote=False)
    return "".join(f"&#{ord(character)};" if character in "\\`*_{}[]#|~" else character for character in escaped)


def markdown_code(text: str) -> str:
    """Code in a table cell; a backtick or a pipe in a Markdown code span would end it, so it is HTML's."""
    return f"<code>{markdown_text(text)}</code>"


def columns(text: str) -> int:
    """The terminal columns that `text` takes: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in {"W", "F"} else 1 for c in text
    )


MESSAGE_WIDTH = 96
"""Columns in which messages are written, before the terminal is known."""
_HANGING = re.compile(r"\s*(?:→ |- )?")
_COLUMN = re.compile(r" +\S+(?: \S+)* {2,}(?=\S)")
_WIDEST_COLUMN = 24
_CODE = ("keep_fp32=[", "quantize_static(", "$ ", "'--trt-")


def folded(text: str, width: int) -> str:
    """A message whose lines take at most `width` columns, as far as its words let them; what is to be pasted stays.

    What goes on hangs below the text: behind the arrow of a hint, behind the name of a fact.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if lines and _goes_on(lines[-1].rpartition("\n")[2], line):
            lines[-1] += "\n" + line
        else:
            lines.append(line)
    whole = (" ".join([first, *map(str.strip, rest)]) for first, *rest in (each.split("\n") for each in lines))
    return "\n".join(part for line in whole for part in _folded(line, width))


def _goes_on(line: str, following: str) -> bool:
    """Whether a line was only begun because the one before it was full; what stands further left is a new one."""
    word = following.split(maxsplit=1)
    hangs = following.startswith("    ") and not any(each in line + following for each in _CODE)
    return bool(word) and hangs and len(line) <= MESSAGE_WIDTH < len(line) + 1 + len(word[0])


def _folded(line: str, width: int) -> list[str]:
    if columns(line) <= width or any(each in line for each in _CODE):
        return [line]
    column, hanging = _COLUMN.match(line), _HANGING.match(line)
    indent = len(hanging[0]) if hanging else 0
    if column and len(column[0]) <= _WIDEST_COLUMN:
        indent = len(column[0])
    return textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def shorten_middle(text: str, width: int) -> str:
    """`text` in at most `width` columns, the middle left out: the start and the end tell names apart.

    >>> shorten_middle("detector_640x640_epoch_200.onnx", 20)
    'detector_…h_200.onnx'
    """
    if columns(text) <= width:
        return text
    head, tail = "", ""
    while True:
        grow_tail = columns(tail) <= columns(head)
        grown_head = head if grow_tail else text[: len(head) + 1]
        grown_tail = text[len(text) - len(tail) - 1 :] if grow_tail else tail
        if columns(grown_head) + 1 + columns(grown_tail) > width:
            return head + ELLIPSIS + tail
        head, tail = grown_head, grown_tail


def shorten_apart(texts: Sequence[str], width: int) -> list[str]:
    """Each of `texts` in at most `width` columns: by `shorten_middle`, but where that makes two of them the same.

    >>> shorten_apart(["PP-OCRv4_det_infer.onnx", "PP-OCRv4_rec_infer.onnx"], 16)
    ['…_det_infer.onnx', '…_rec_infer.onnx']
    """
    short = {text: shorten_middle(text, width) for text in texts}
    alike = Counter(short.values())
    for text, found in short.items():
        if alike[found] > 1:
            kept = text
            while columns(kept) + 1 > width:
                kept = kept[1:]
            short[text] = ELLIPSIS + kept
    return [short[text] for text in texts]


def _exponent(text: str) -> str:
    """Scientific notation without the zeros and the plus sign of C's printf: "4.52e-04" is "4.52e-4"."""
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa
