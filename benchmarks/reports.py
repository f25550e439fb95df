"""What a benchmark ends with: its report, printed and kept."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def keep(report: Mapping[str, Any], path: Path | None) -> None:
    """Print the report as JSON, and write it to `path` where one is given."""
    text = json.dumps(report, indent=2)
    print(text)
    if path:
        path.write_text(f"{text}\n", encoding="utf-8")
