"""Markdown tables: made, and asked for what was written by hand."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GENERATED = re.compile(r"<!-- generated ([\w-]+) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)
"""A part of a page that `docs.site.reference` writes: its name, and what stands there."""


def by_hand(page: str) -> str:
    """What of a page was written by hand, on the lines where it stands."""
    return GENERATED.sub(lambda found: "\n" * found[0].count("\n"), page)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *([each.replace("|", "\\|") for each in row] for row in rows)]
    return "".join(re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(row)} |\n") for row in cells)


def kept(old: str, column: str) -> Mapping[str, str]:
    """What a table had in a column, by the first name in its row."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in old.splitlines() if line[:1] == "|"
    ]
    if not rows or column not in rows[0]:
        return {}
    place = rows[0].index(column)
    return {first_name(" ".join(row)): row[place].replace("\\|", "|") for row in rows[2:]}


def together(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Rows of names that share a description as one row; it is in the column before "more", or the last of two."""
    found: list[list[str]] = []
    for row in rows:
        said = min(len(row) - 1, 2)
        if found and row[said] == found[-1][said]:
            merged = [", ".join(dict.fromkeys(filter(None, pair))) for pair in zip(found[-1], row, strict=True)]
            found[-1] = [*merged[:said], row[said], *merged[said + 1 :]]
        else:
            found.append([*row])
    return found


def first_name(text: str) -> str:
    """The first name in code that a row has."""
    found = re.search(r"`([\w-]+)", text)
    return found[1] if found else text
