"""Hostile input: ``python benchmarks/fuzz [TARGET …] [--seconds N] [--seed S] [--json FILE]``.

Each target makes cases from the files of `corpus/`: bytes flipped, cut off and put elsewhere, fields of protobuf
messages and JSON documents replaced, arguments of every type. A case is used as a test run would use it, in a process
apart that has 30 seconds for it (times what else each core runs) and, beyond what it had, 1 GiB (what the package is
told the machine has) and sixteen times the bytes of the case's files. What must not come of it: an error that nobody
foresaw, a traceback of ours, a text beyond 200,000 characters, characters that command a terminal, something written
elsewhere, a pass where the untampered input fails, a hang, more memory, a process that died.

Ends with status 1 where one of these did. `--case TARGET:NUMBER` makes one case again, and prints what came of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

import registry  # type: ignore[import-not-found]  # noqa: E402 - beside this script
import reports  # type: ignore[import-not-found]  # noqa: E402
from target import FAILURES  # type: ignore[import-not-found]  # noqa: E402

LIMIT_S = 30.0
RUNAWAY_BYTES = 3 << 30
"""What ends a case before the machine has to."""
PATIENCE_S = 120.0
"""For a worker to come up."""


class Worker:
    """A process that makes the cases of one target, one after the other."""

    def __init__(self, name: str, seed: str, limit_s: float) -> None:
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        # The process is killed, and removes nothing.
        self.scratch = tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True)
        environment = {
            **os.environ,
            "TMPDIR": self.scratch.name,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), name, seed, str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )
        self.limit_s = limit_s
        self._rest = b""
        answer = self._answer(PATIENCE_S)
        if not answer.get("ready"):
            raise SystemExit(f"the worker of {name} did not come up:\n{self.said()}")

    def make(self, number: int) -> dict[str, Any]:
        """What came of a case."""
        assert self.process.stdin
        start = time.monotonic()
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()
        answer = self._answer(self.limit_s)
        return {**answer, "seconds": round(time.monotonic() - start, 3)}

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout
        # What others run here takes its share of the time.
        until = time.monotonic() + limit_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        while b"\n" not in self._rest:
            if time.monotonic() > until:
                return {"word": "hang", "said": self.said(), "gone": True}
            if (held := tree_bytes(self.process.pid)) > RUNAWAY_BYTES:
                return {"word": "memory", "said": f"{held >> 20} MiB, and it was ended", "gone": True}
            if select.select([self.process.stdout], [], [], 0.1)[0]:
                found = os.read(self.process.stdout.fileno(), 1 << 16)
                if not found:
                    code = self.process.wait()
                    return {"word": "crash", "said": f"status {code}\n{self.said()}", "gone": True}
                self._rest += found
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))

    def said(self) -> str:
        """The end of what the process wrote."""
        self.log.seek(0)
        return self.log.read()[-4000:].decode(errors="replace")

    def close(self) -> None:
        """End it, and what it started."""
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        self.scratch.cleanup()
        for each in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                assert each
                each.close()


def tree_bytes(pid: int) -> int:
    """What a process and its children hold."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    held = re.search(r"VmRSS:\s*(\d+)", status)
    return (int(held[1]) << 10 if held else 0) + sum(map(tree_bytes, map(int, children)))


def kind_of(said: str) -> str:
    """Where a failure happened, so that many of one kind are counted as one."""
    places = re.findall(r"\(([\w.]+:\d+)(?:, [\w.]+:\d+)?\)", said) or re.findall(
        r'File "[^"]*/(\w+\.py)", line (\d+)', said
    )
    error = re.search(r"(\w+(?:Error|Exception|Warning))", said)
    return f"{error[1] if error else '?'} at {places[-1] if places else said[:80]!r}"


def fuzz(name: str, seed: str, *, seconds: float, most: int, first: int, limit_s: float) -> dict[str, Any]:
    """Make cases of a target until the time is over; what came of them."""
    words: Counter[str] = Counter()
    failures: dict[str, dict[str, Any]] = {}
    slowest, largest, number = (0.0, ""), 0, first
    worker = Worker(name, seed, limit_s)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until and number - first < most:
            answer = worker.make(number)
            words[answer["word"]] += 1
            slowest = max(slowest, (answer["seconds"], f"{name}:{number}"))
            largest = max(largest, answer.get("bytes", 0))
            if answer["word"] in FAILURES:
                kind = f"{answer['word']}: {kind_of(answer['said'])}"
                entry = failures.setdefault(kind, {"case": f"{name}:{number}", "count": 0, "said": answer["said"]})
                entry["count"] += 1
                if entry["count"] == 1:
                    print(f"  {name}:{number} {kind}", flush=True)
            if answer.get("gone"):
                worker.close()
                worker = Worker(name, seed, limit_s)
            number += 1
    finally:
        worker.close()
    bad = sum(words[word] for word in FAILURES)
    return {
        "about": registry.TARGETS[name].about,
        "cases": number - first,
        "outcomes": dict(words.most_common()),
        "failures": bad,
        "kinds": failures,
        "slowest_s": slowest[0],
        "slowest": slowest[1],
        "most_memory_mib": largest >> 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/fuzz", description="Hostile input, from a seeded corpus.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(registry.TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each target (default: %(default)g)")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="the most of each target")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case (default: %(default)s)")
    parser.add_argument("--seed", default="0", help="another one makes other cases (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for a case (default: %(default)g)")
    parser.add_argument("--case", metavar="TARGET:NUMBER", help="make one case again")
    parser.add_argument("--json", type=Path, help="keep the report there")
    given = parser.parse_args()
    if given.case:
        name, _, number = given.case.rpartition(":")
        worker = Worker(name, given.seed, given.limit)
        print(json.dumps(answer := worker.make(int(number)), indent=1), answer.get("said", ""), worker.said(), sep="\n")
        worker.close()
        return
    if unknown := [name for name in given.targets if name not in registry.TARGETS]:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(registry.TARGETS)}")
    found = {}
    for name in given.targets or registry.TARGETS:
        print(f"== {name}", flush=True)
        most = {"seconds": given.seconds, "most": given.cases, "first": given.first, "limit_s": given.limit}
        found[name] = fuzz(name, given.seed, **most)
    report = {
        "benchmark": "fuzz",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": given.seed,
        "seconds_a_target": given.seconds,
        "limits": {"seconds_a_case": given.limit, "memory_mib": 1024, "bytes_a_byte": 16, "text": 200_000},
        "cases": sum(each["cases"] for each in found.values()),
        "failures": sum(each["failures"] for each in found.values()),
        "targets": found,
    }
    report["within_limits"] = not report["failures"]
    reports.keep(report, given.json)
    sys.exit(1 if report["failures"] else 0)


if __name__ == "__main__":
    main()
