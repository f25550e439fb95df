"""Run the benchmarks in turn: ``python benchmarks [--into DIR] [NAME …]``.

Ends with status 1 when one is over its limits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = {path.stem.removeprefix("bench_"): path for path in sorted(Path(__file__).parent.glob("bench_*.py"))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks", description="Run the benchmarks in turn.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(SCRIPTS)} (default: all)")
    parser.add_argument("--into", type=Path, help="a folder that keeps each benchmark's JSON")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in SCRIPTS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    verdicts = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.into or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.names or SCRIPTS:
            print(f"== {name}", flush=True)
            report = folder / f"{name}.json"
            done = subprocess.run([sys.executable, SCRIPTS[name], "--json", report], check=False)
            # None: the benchmark has no limits, or was too small for them to mean anything.
            verdicts[name] = json.loads(report.read_text()).get("within_limits") if done.returncode == 0 else False
    words = {True: "within its limits", False: "over its limits, or failed", None: "no limits apply"}
    for name, verdict in verdicts.items():
        print(f"{name}: {words[verdict]}")
    sys.exit(1 if False in verdicts.values() else 0)


if __name__ == "__main__":
    main()
