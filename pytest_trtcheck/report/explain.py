"""What the codes of errors mean: the sections of docs/errors.md, which a wheel brings with it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import CODES, ArgumentError, suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = "errors.md"


def sections() -> dict[str, str]:
    """Each code with its section's text."""
    here = Path(__file__)
    # A wheel has the page in this folder; a checkout, where it belongs.
    packed = here.with_name(PAGE)
    page = packed if packed.exists() else here.parents[2] / "docs" / PAGE
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^### (\S+)\n\n(.*?)\s*(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return dict(found)


def explained(codes: Sequence[str], width: int) -> str:
    """The sections of `codes`, wrapped for a terminal; of none, the list of all codes.

    A code may stand in the hint that named it, `→ see docs/errors.md#model-missing`, or be its address.

    Raises
    ------
    ArgumentError
        There is no such code.
    """
    named = [word.rpartition("#")[2].strip("()[],.→").lower() for word in " ".join(codes).split()]
    wanted = [code for code in named if code not in {"", "see"}]
    if not wanted:
        return "\n".join(CODES)
    known, texts = sections(), []
    for code in wanted:
        if code not in known:
            hint = suggestion(code, known) or "python -m pytest_trtcheck explain lists all codes"
            raise ArgumentError(f"explain: there is no code {code!r}", hint, code="argument-unknown")
        plain = re.sub(r"[*][*]|\[([^]]*)\]\(([^)]*)\)", _plain, known[code])
        wrapped = [textwrap.fill(" ".join(each.split()), width) for each in plain.split("\n\n")]
        texts.append("\n\n".join([code, *wrapped]))
    return "\n\n\n".join(texts)


def _plain(found: re.Match[str]) -> str:
    """A link as a terminal can show it: the page that it leads to, or what it is on."""
    name, target = found[1] or "", found[2] or ""
    return f"docs/{target}" if target.endswith(".md") else name
