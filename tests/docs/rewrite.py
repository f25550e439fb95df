"""What a page shows, brought up to what is printed: `DOCS_WRITE=1 pytest tests/test_docs_run.py -k PAGE`.

Read what comes out (`git diff`): what stands between two lines of dots is found again by the words that it had.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import groupby
from typing import TYPE_CHECKING

from tests.docs.output import ANY, normalized

if TYPE_CHECKING:
    from collections.abc import Sequence

FEWEST = 3
"""Words that follow each other: fewer are found by chance."""


def rewritten(page: Sequence[str], printed: str) -> list[str]:
    """The lines of a page, with what is printed now in the place of what is not printed any more."""
    actual = [line.rstrip() for line in printed.strip("\n").splitlines()]
    shapes = ["".join(normalized(line)) for line in actual]
    lines: list[str] = []
    done = 0
    for is_any, group in groupby(range(len(page)), lambda index: page[index].strip() in ANY):
        chunk = list(group)
        here = [page[index] for index in chunk]
        if is_any:
            lines += here
            continue
        start, end = _window(here, shapes, done)
        start = 0 if chunk[0] == 0 else start
        done = end = len(actual) if chunk[-1] == len(page) - 1 else end
        kept = {"".join(normalized(line)): line for line in here}
        lines += [kept.get(shapes[index], actual[index]) for index in range(start, end)] or here
    return lines


def _window(chunk: list[str], actual: list[str], done: int) -> tuple[int, int]:
    """From which to behind which line the words of a chunk stand, at or behind a line; nowhere: an empty range."""
    wanted = [word for line in chunk for word in "".join(normalized(line)).split()]
    words = [(word, index) for index in range(done, len(actual)) for word in actual[index].split()]
    matcher = SequenceMatcher(None, wanted, [word for word, _ in words], autojunk=False)
    blocks = [each for each in matcher.get_matching_blocks() if each.size >= min(FEWEST, len(wanted))]
    if not blocks or not blocks[0].size:
        return done, done
    return words[blocks[0].b][1], words[blocks[-1].b + blocks[-1].size - 1][1] + 1
