"""What the code says of itself: numpy-style docstrings, and the strings below attributes, as Markdown."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SECTION = re.compile(r"^(Parameters|Attributes|Returns|Raises)\n-{3,}\n", re.MULTILINE)

_STARS: Mapping[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True)
class Docstring:
    """A docstring: its text, by section what it says of each name, and what it shows at a prompt."""

    text: str
    sections: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    example: str = ""

    @property
    def parameters(self) -> Mapping[str, str]:
        """Of each parameter; several that are described together have the same text."""
        return self.sections.get("Parameters", {})


def of(thing: object) -> Docstring:
    """The docstring of a class, function or module."""
    whole, prompt, example = (inspect.getdoc(thing) or "").partition("\n>>> ")
    text, *rest = _SECTION.split(whole)
    sections = {title: dict(_entries(body)) for title, body in zip(rest[::2], rest[1::2], strict=True)}
    return Docstring(text.strip(), sections, f"{prompt.strip()} {example}".strip())


def attributes(cls: type) -> dict[str, str]:
    """The strings below the attributes of a class, its bases' first, and what its docstring says of others."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if each.__module__.startswith("pytest_trtcheck"):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            assert isinstance(body, ast.ClassDef)
            for statement, behind in zip(body.body, body.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    match behind:
                        case ast.Expr(value=ast.Constant(value=str(text))):
                            found[statement.target.id] = joined(inspect.cleandoc(text))
            found |= of(each).parameters
    return found


def joined(text: str) -> str:
    """Paragraphs without line breaks in them, as one line."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


def signature(thing: object, name: str | None = None, width: int = 100) -> str:
    """How a class or function is called, a parameter a line where one line is too short."""
    assert callable(thing)
    found = inspect.signature(thing)
    name = name or getattr(thing, "__name__", str(thing))
    returns = found.return_annotation
    end = "" if isinstance(thing, type) or returns is found.empty else f" -> {_shown(returns)}"
    parts, kinds = [], [p for p in found.parameters.values() if p.name not in {"self", "cls"}]
    for position, each in enumerate(kinds):
        first = position == 0 or kinds[position - 1].kind is not each.kind
        if each.kind is each.KEYWORD_ONLY and first and not any(p.kind is p.VAR_POSITIONAL for p in kinds):
            parts.append("*")
        stars = _STARS.get(each.kind, "")
        hint = "" if each.annotation is each.empty else f": {_shown(each.annotation)}"
        default = "" if each.default is each.empty else f"{' = ' if hint else '='}{_default(each.default)}"
        parts.append(f"{stars}{each.name}{hint}{default}")
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= width else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def _shown(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text).strip("'\"").replace("'", '"')


def _default(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return "…" if " at 0x" in repr(value) or "<factory>" in repr(value) else repr(value)


def _entries(section: str) -> Iterator[tuple[str, str]]:
    for entry in re.split(r"\n(?=\S)", section.strip()):
        names, _, text = entry.partition("\n")
        for name in names.split(", "):
            yield name.strip(), joined(text)
