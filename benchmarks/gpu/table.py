"""Emulated against engine error, as a table in Markdown.

    python benchmarks/gpu/table.py REPORT.json

takes a report of `test_evidence.py` or `test_models.py`. Errors are relative L2 over an output, the largest of the
check's outputs; layers are the engine inspector's, by the precision that they compute in. With `--spread`, how far the
two errors lie apart instead, over every output of every check.
"""

from __future__ import annotations

import json
import math
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


def spread(report: dict[str, Any]) -> list[str]:
    """How many outputs' errors, emulated and on the engine, lie within which factor of each other; the widest named."""
    factors: list[tuple[float, str]] = []
    for check in report["checks"]:
        for output in (check["parity"] or {}).get("outputs", ()):
            emulated, engine = number(output["details"].get("emulated", {}).get("l2")), number(output["l2"])
            if emulated is None or engine is None:
                continue
            where = f"{PurePath(check['model']).stem} {check['precision']} {output['name']}"
            factors.append((apart(emulated, engine), f"{where}: emulated {emulated:.2e}, engine {engine:.2e}"))
    factors.sort(reverse=True)
    within = [f"{sum(factor <= limit for factor, _ in factors)} within {limit}" for limit in (1.1, 1.5, 2.2, 3, 10)]
    return [
        f"{len(factors)} outputs: {', '.join(within)}",
        *(f"  {factor:.3g}: {what}" for factor, what in factors[:12]),
    ]


def apart(one: float, other: float) -> float:
    """The factor between two errors; 1 where both are zero or neither is finite."""
    finite = math.isfinite(one), math.isfinite(other)
    if one == other or not any(finite):
        return 1.0
    if not all(finite) or not one or not other:
        return math.inf
    return max(one / other, other / one)


def number(value: Any) -> float | None:
    """A number as it stands in a report, where "inf" and "nan" are strings."""
    return None if value is None else float(value)


def figure(values: list[float | None]) -> str:
    """The largest of those that are known."""
    known = [value for value in values if value is not None]
    return f"{max(known):.2e}" if known else "–"


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "--spread" in sys.argv[2:]:
        print("\n".join(spread(report)))
        return
    header = ("model", "precision", "emulated", "engine", "p50", "layers by precision")
    for row in (header, ("---",) * len(header), *rows(report)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
