"""Every message that the package can raise, read from its source; `python -m tests.messages` prints them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(errors.__file__).parent
CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


@dataclass(frozen=True)
class Raised:
    """An error as it is made in the source: its class, and what message, hint and code are made from."""

    place: str
    name: str
    message: str
    hint: str
    code: str


def raised() -> Iterator[Raised]:
    """Every place where an error of `errors.py` is made, by file and line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in CLASSES:
                continue
            given = dict(zip(("message", "hint"), map(template, node.args), strict=False))
            code = next((each.value for each in node.keywords if each.arg == "code"), None)
            usual = getattr(CLASSES[node.func.id], "usual_code", None)
            yield Raised(
                f"{path.relative_to(PACKAGE.parent)}:{node.lineno}",
                node.func.id,
                given.get("message", ""),
                given.get("hint", ""),
                template(code) if code is not None else usual or "",
            )


def template(node: ast.expr) -> str:
    """A text as it is in the source: what is filled in stands in braces, alternatives behind |."""
    match node:
        case ast.Constant():
            found = str(node.value)
        case ast.JoinedStr(values):
            found = "".join(map(template, values))
        case ast.BinOp(left, ast.Add(), right):
            found = template(left) + template(right)
        case ast.IfExp(_, yes, no):
            found = f"{template(yes)} | {template(no)}"
        case ast.BoolOp(_, values):
            found = " | ".join(map(template, values))
        case ast.FormattedValue(value):
            found = f"{{{ast.unparse(value)}}}"
        case _:
            found = f"{{{ast.unparse(node)}}}"
    return found


if __name__ == "__main__":
    for each in sorted(raised(), key=lambda each: (each.code, each.place)):
        print(f"{each.code}  {each.place}\n    {each.message}" + (f"\n      → {each.hint}" if each.hint else ""))
