"""The links of Markdown pages: found, followed and rewritten. The site, the long description and the tests share it.

Only the standard library: a package is built with it (docs/site/metadata.py).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]

_CODE = re.compile(
    r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[`~]*[ \t]*$|<!--.*?-->|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.*?)[ \t]*#*$", re.MULTILINE)
_ANCHOR = re.compile(r"<a (?:id|name)=\"([^\"]+)\">")


@dataclass(frozen=True)
class Link:
    """A link of a page; `start` and `end` are where it stands in the page's text."""

    text: str
    target: str
    start: int
    end: int


def links(markdown: str) -> Iterator[Link]:
    """Every inline link and image that is no code and no comment."""
    for found in _LINK.finditer(_masked(markdown)):
        yield Link(markdown[slice(*found.span("text"))], found["target"], *found.span())


def rewritten(markdown: str, address: Callable[[str], str | None]) -> str:
    """The page with every link's target replaced by what `address` says; None leaves the link's text alone."""
    parts, done = [], 0
    for link in links(markdown):
        to = address(link.target)
        parts += [markdown[done : link.start], link.text if to is None else f"[{link.text}]({to})"]
        done = link.end
    return "".join([*parts, markdown[done:]])


def anchors(markdown: str) -> set[str]:
    """What `#…` may name in a page: its headings, as code hosts call them, and anchors of its own."""
    found: dict[str, int] = {}
    for heading in _HEADING.finditer(_masked(markdown, inline=False)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        again = found[slug] = found.get(slug, -1) + 1
        if again:
            found[f"{slug}-{again}"] = 0
    return {*found, *_ANCHOR.findall(markdown)}


def is_elsewhere(target: str) -> bool:
    """Whether a link leaves the repository."""
    return re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE) is not None


def resolved(page: str, target: str) -> tuple[str, str]:
    """The file, from the repository's root, and the anchor that a link of `page` (also from there) leads to."""
    path, _, anchor = target.partition("#")
    return (os.path.normpath(Path(page).parent / path).replace(os.sep, "/") if path else page), anchor


def broken(page: str, root: Path = ROOT) -> list[str]:
    """What is wrong with the links of a page, a sentence each."""
    text, found = (root / page).read_text(encoding="utf-8"), []
    for link in links(text):
        if is_elsewhere(link.target):
            continue
        path, anchor = resolved(page, link.target)
        where = f"{page}:{text.count(chr(10), 0, link.start) + 1}: [{link.text}]({link.target})"
        if path.startswith("../") or not (root / path).exists():
            found.append(f"{where}: there is no {path}")
        elif anchor and anchor not in _anchors_of(root / path):
            found.append(f"{where}: {path} has no heading or anchor #{anchor}")
    return found


def pages(root: Path = ROOT) -> list[str]:
    """Every Markdown page of the repository."""
    folders = ("", "docs", "example_project", "benchmarks", ".github")
    found = {p for each in folders for p in (root / each).glob("*.md" if not each else "**/*.md")}
    return sorted(path.relative_to(root).as_posix() for path in found)


@cache
def _anchors_of(path: Path) -> set[str]:
    return anchors(path.read_text(encoding="utf-8"))


def _masked(markdown: str, *, inline: bool = True) -> str:
    """The page with its code and comments blotted out, each character by another one."""

    def blot(found: re.Match[str]) -> str:
        return found[0] if found["ticks"] and not inline else re.sub(r"[^\n]", "x", found[0])

    return _CODE.sub(blot, markdown)
