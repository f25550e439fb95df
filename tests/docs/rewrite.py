"""What a page shows, brought up to what is printed: `DOCS_WRITE=1 pytest tests/test_docs_run.py -k PAGE`.

Read what comes out (`git diff`): between two lines of dots it is as many lines as there were, about where they were.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import groupby
from typing import TYPE_CHECKING

from tests.docs.output import ANY, normalized

if TYPE_CHECKING:
    from collections.abc import Sequence


def rewritten(page: Sequence[str], printed: str) -> list[str]:
    """The lines of a page, with what is printed now in the place of what is not printed any more."""
    actual = [line.rstrip() for line in printed.strip("\n").splitlines()]
    wanted = [line if line.strip() in ANY else "".join(normalized(line)) for line in page]
    matcher = SequenceMatcher(None, wanted, ["".join(normalized(line)) for line in actual], autojunk=False)
    place = {a + n: b + n for a, b, size in matcher.get_matching_blocks() for n in range(size)}
    kept = {there: page[here] for here, there in place.items()}
    lines: list[str] = []
    done = 0
    for is_any, group in groupby(range(len(page)), lambda index: page[index].strip() in ANY):
        chunk = list(group)
        found = [index for index in chunk if index in place]
        if is_any or not (found or chunk[0] == 0 or chunk[-1] == len(page) - 1):
            lines += [page[index] for index in chunk]
            continue
        start = place[found[0]] - (found[0] - chunk[0]) if found else len(actual) - len(chunk)
        start = 0 if chunk[0] == 0 else max(start, done)
        end = place[found[-1]] + 1 + chunk[-1] - found[-1] if found else len(chunk)
        done = end = len(actual) if chunk[-1] == len(page) - 1 else min(end, len(actual))
        lines += [kept.get(index, actual[index]) for index in range(start, end)]
    return lines
