"""Emulated against engine error, as a table in Markdown.

    python benchmarks/gpu/table.py REPORT.json

takes a report of `test_evidence.py`. Errors are relative L2 over an output, the largest of the check's outputs; layers
are the engine inspector's, by the precision that they compute in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path, PurePath
from typing import Any


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Model, precision, emulated and engine error, latency and layers of each check."""
    found: list[tuple[str, ...]] = []
    for check in report["checks"]:
        model = "/".join(PurePath(check["model"]).parts[-2:]).removeprefix("models/")
        if check["verdict"] == "error":
            reason = check["message"].splitlines()[0].partition(": ")[2]
            found.append((model, check["precision"], "–", "–", "–", reason))
            continue
        outputs = check["parity"]["outputs"]
        emulated = [number(output["details"].get("emulated", {}).get("l2")) for output in outputs]
        engine = [number(output["l2"]) for output in outputs]
        layers = ", ".join(f"{count} {name}" for name, count in check["engine"]["layers_by_precision"].items())
        p50 = (check.get("latency") or {}).get("p50_ms")
        latency = "–" if p50 is None else f"{p50:.3g} ms"
        found.append((model, check["precision"], figure(emulated), figure(engine), latency, layers))
    return found


def number(value: Any) -> float | None:
    """A number as it stands in a report, where "inf" and "nan" are strings."""
    return None if value is None else float(value)


def figure(values: list[float | None]) -> str:
    """The largest of those that are known."""
    known = [value for value in values if value is not None]
    return f"{max(known):.2e}" if known else "–"


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    header = ("model", "precision", "emulated", "engine", "p50", "layers by precision")
    for row in (header, ("---",) * len(header), *rows(report)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
