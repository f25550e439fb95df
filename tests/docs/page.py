"""A page of the documentation, read: its blocks, and the comments that say how each of them is tested."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

from docs.site.tables import by_hand

ROOT = Path(__file__).resolve().parents[2]

REASONS = ("needs a GPU", "needs the network", "needs a server", "changes the system", "a fragment")
"""Why a block is not run. What is in it is held against the code all the same."""

ENVIRONMENTS = ("tests", "torch", "keras")
"""Where pages are run: the environments of tox.ini. A page of the first needs neither PyTorch nor TensorFlow."""

_KEYS = ("not run", "output of", "part of the output of", "figures within", "with", "environment", "generated")
_COMMENT = re.compile(rf"<!--\s*({'|'.join(_KEYS)})\b:?\s*(.*?)\s*-->", re.DOTALL)


class Fault(Exception):  # noqa: N818 - most of them are told, and not raised
    """What is wrong on a page, and where."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


@dataclass(frozen=True)
class Block:
    """A fenced block; `remarks` are the comments on the lines before it."""

    page: str
    line: int
    """Of its first line of text, counted from 1."""
    language: str
    title: str | None
    text: str
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.remarks.get("not run")

    @property
    def is_file(self) -> bool:
        return self.title is not None

    @property
    def generator(self) -> str | None:
        """The command whose output it is."""
        return self.remarks.get("output of", self.remarks.get("part of the output of"))

    def fault(self, what: str, line: int = 0) -> Fault:
        return Fault(f"{self.page}:{self.line + line}", what)


@dataclass(frozen=True)
class Page:
    """`needs` are the names of files and the places in the page's folder that they lie at."""

    name: str
    text: str
    environment: str
    needs: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]

    def environments(self) -> list[str]:
        """Those that it is run in."""
        asked = {block.remarks.get("environment", self.environment) for block in self.blocks if not block.reason}
        return [each for each in ENVIRONMENTS if each in asked or (each == self.environment and not asked)]


def pages(environment: str | None = None) -> list[Path]:
    """Every page that people read, or those that have blocks for an environment."""
    front = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "example_project/README.md")]
    # The reference is generated from the code: tests of its own hold that it is.
    generated = ROOT / "docs" / "reference"
    found = [*front, *(path for path in sorted((ROOT / "docs").rglob("*.md")) if generated not in path.parents)]
    return [path for path in found if environment is None or environment in read(path).environments()]


def read(path: Path) -> Page:
    """A page of the repository."""
    # What is made from the code is held against it as a whole, by tests/test_docs.py.
    return parse(path.relative_to(ROOT).as_posix(), by_hand(path.read_text(encoding="utf-8")))


def parse(name: str, text: str) -> Page:
    """A page; a comment or a block that says nothing that is known is a `Fault`."""
    environment, needs, blocks = "tests", [], []
    remarks: dict[str, str] = {}
    for token in MarkdownIt("commonmark").parse(text):
        where = f"{name}:{token.map[0] + 1}" if token.map else name
        if token.type == "html_block":
            for key, value in _comments(where, token.content):
                if key == "generated":
                    continue  # .ci or the site writes what follows, and tests of their own hold it.
                if key == "with":
                    needs += [_need(where, each) for each in value.split(",")]
                else:
                    remarks[key] = value
        elif token.type == "fence":
            assert token.map is not None
            blocks.append(_block(name, token.map[0] + 2, token.info, token.content, remarks))
            remarks = {}
        elif token.type == "code_block":
            raise Fault(where, "a block by indentation: no test looks at it, write a fence")
        elif remarks:
            environment = remarks.pop("environment", environment)
            if remarks:
                raise Fault(where, f"no block behind {next(iter(remarks))!r}")
    if remarks:
        raise Fault(name, f"no block behind {next(iter(remarks))!r}")
    return Page(name, text, environment, tuple(needs), tuple(blocks))


def _comments(where: str, html: str) -> list[tuple[str, str]]:
    found = []
    for comment in re.findall(r"<!--.*?-->", html, re.DOTALL):
        known = _COMMENT.fullmatch(comment)
        if known is None:
            if re.match(r"<!--\s*[a-z][\w ]*:", comment):
                raise Fault(where, f"{comment}: what should the tests do?")
            continue
        key, value = known.groups()
        if key == "not run" and value not in REASONS:
            raise Fault(where, f"not run: {value!r} is none of {', '.join(REASONS)}")
        if key == "environment" and value not in ENVIRONMENTS:
            raise Fault(where, f"environment: {value!r} is none of {', '.join(ENVIRONMENTS)}")
        found.append((key, value))
    return found


def _need(where: str, text: str) -> tuple[str, str]:
    name, _, place = text.strip().partition(" as ")
    if not name:
        raise Fault(where, "with: names no file")
    return name, place or name


def _block(page: str, line: int, info: str, text: str, remarks: dict[str, str]) -> Block:
    language, _, rest = info.strip().partition(" ")
    title = re.fullmatch(r'title="([^"]+)"', rest.strip())
    if not language:
        raise Fault(f"{page}:{line - 1}", "a fence that names no language: `text` is one")
    if rest.strip() and title is None:
        raise Fault(f"{page}:{line - 1}", f'{info}: only title="…" is known')
    return Block(page, line, language, title[1] if title else None, text, remarks)
