"""Do the tests notice? ``python benchmarks/mutation [GROUP …]`` changes the source, a sample of 300 changes a group.

Which tests run which lines is found first; each mutant is then tested by those that run its lines, the quickest first,
until one fails. Everything is kept in `--into` as it comes: a run that was stopped goes on where it was, a mutant that
was killed stays killed while its file is the same, and those that survived are tried again once the tests change (with
`--unjudged` only those without a verdict: a survivor that some new test would kill then still counts as one).
`report.json` there has, by group, how many were sampled, killed, survived and timed out, and each survivor with its
change and a verdict: that of the first rule of `verdicts.json` (beside this script) that fits it, "message text" where
it lies in one, else "not judged". No survivor may be left that stands for a wrong pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mutants as made  # type: ignore[import-not-found]  # beside this script

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CARRIED = ("pytest_trtcheck", "tests", "pyproject.toml", "docs", "README.md", "CHANGELOG.md")
PARITY_TESTS = ("test_parity*.py", "test_guards.py", "test_artifacts.py")


@dataclasses.dataclass(frozen=True)
class Group:
    """What is mutated together, and the tests that are to notice; both as globs, below the package and the tests."""

    files: tuple[str, ...]
    tests: tuple[str, ...]

    def sources(self) -> list[Path]:
        """The files to change."""
        return _found(ROOT / "pytest_trtcheck", self.files)

    def test_files(self) -> list[Path]:
        """The files with the tests."""
        return _found(ROOT / "tests", self.tests)


GROUPS = {
    "cache": Group(("cache/*.py",), ("test_cache*.py", "test_artifacts.py", "test_facts.py", "test_guards.py")),
    "quantize": Group(
        ("precision/quantization/quantize.py", "precision/quantization/plan.py"),
        ("test_quantize*.py", "test_guards.py"),
    ),
    "compare": Group(
        ("compare/*.py", "metrics.py"), ("test_compare*.py", "test_parts.py", "test_extending_metric.py", *PARITY_TESTS)
    ),
    "parity": Group(("check/parity.py",), PARITY_TESTS),
    "half": Group(
        ("precision/half.py",),
        ("test_half*.py", "test_lowering.py", "test_computed.py", "test_artifacts.py", "test_guards.py"),
    ),
    "latency": Group(("latency/**/*.py", "baselines/latency.py"), ("test_latency*.py", "test_guards.py")),
}
MORE_GROUPS = {
    "lowering": Group(
        ("precision/**/*.py",), ("test_ca*.py", "test_q*.py", "test_half.py", "test_emulate.py", "test_guards.py")
    ),
    "check": Group(
        ("backends/tensorrt/backend.py", "check/*.py"),
        ("test_artifacts.py", "test_guards.py", "test_latency_measure.py", "test_bundle.py", "test_baselines.py"),
    ),
    "model": Group(("model/*.py",), ("test_model.py", "test_facts.py", "test_artifacts.py", "test_guards.py")),
}
"""Beyond what must hold: tested when they are named."""
NO_TEST = "no test runs it"
NOT_JUDGED = "not judged"
TIMEOUT_FACTOR, TIMEOUT_EXTRA_S = 4.0, 20.0


def _found(folder: Path, globs: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in globs for path in folder.glob(pattern) if path.name != "__init__.py"})


def _digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def copy_to(folder: Path, source: Path = ROOT) -> Path:
    """A fresh copy of what the tests need; of another copy, with its bytecode."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left_out = shutil.ignore_patterns("__pycache__") if source == ROOT else None
    for name in CARRIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, ignore=left_out)
        else:
            shutil.copy2(source / name, folder / name)
    return folder


def environment() -> dict[str, str]:
    # Threads of a library do not survive a fork.
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def coverage_of(name: str, group: Group, into: Path) -> dict[str, Any]:
    """Which tests run which lines; kept while neither the package nor the tests change."""
    digest = _digest([*sorted((ROOT / "pytest_trtcheck").rglob("*.py")), *group.test_files()])
    kept = into / f"{name}.coverage.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["digest"] == digest:
        return dict(found)
    copy = copy_to(into / "copies" / "coverage")
    tests = [f"tests/{path.name}" for path in group.test_files()]
    target = into / "coverage.tmp.json"
    command = [sys.executable, str(HERE / "coverage_map.py"), str(copy), str(target), *tests]
    env = environment() | {"PYTHONPATH": str(copy)}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, cwd=copy)
    found = {"digest": digest, **json.loads(target.read_text())}
    target.unlink()
    kept.write_text(json.dumps(found))
    return dict(found)


def tests_for(mutant: made.Mutant, coverage: Mapping[str, Any]) -> list[str]:
    """The tests that run a mutant's lines, the quickest first; of what runs at import all that run the file."""
    lines = coverage["lines"].get(mutant.file, {})
    first, last = (1, 10**9) if not mutant.function else mutant.lines
    tests = {test for line, names in lines.items() if first <= int(line) <= last for test in names}
    seconds = coverage["seconds"]
    return sorted((test for test in tests if test in seconds), key=lambda test: (seconds[test], test))


class Worker(threading.Thread):
    """Hands mutants to a process, and keeps what became of them."""

    def __init__(self, copy: Path, orders: queue.SimpleQueue[Any], done: queue.SimpleQueue[Any]) -> None:
        super().__init__(daemon=True)
        command = [sys.executable, str(HERE / "worker.py"), str(copy)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=copy
        )
        self._orders, self._done = orders, done

    def run(self) -> None:
        """Until there is no order left, or the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        while (order := self._orders.get()) is not None:
            key, message = order
            self._process.stdin.write(f"{json.dumps(message)}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            if not answer:
                self._done.put((key, None))
                return
            self._done.put((key, json.loads(answer)))
        self._process.stdin.close()
        self._process.wait()


@dataclasses.dataclass
class Run:
    """What is known of a group's mutants, kept in a file as it comes.

    Parameters
    ----------
    digests
        The identity of each source file.
    """

    name: str
    group: Group
    into: Path
    coverage: Mapping[str, Any]
    digests: Mapping[str, str]
    known: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, name: str, group: Group, into: Path) -> Run:
        """With what earlier runs found."""
        digests = {path.relative_to(ROOT).as_posix(): _digest([path]) for path in group.sources()}
        run = cls(name, group, into, coverage_of(name, group, into), digests, {})
        if run.log.exists():
            run.known = {entry["key"]: entry for entry in map(json.loads, run.log.read_text().splitlines())}
        return run

    @property
    def log(self) -> Path:
        """One JSON object a line: what became of each mutant; of several lines the last counts."""
        return self.into / f"{self.name}.jsonl"

    def is_settled(self, mutant: made.Mutant) -> bool:
        """Whether it needs no test: it was killed, or survived these very tests."""
        before = self.known.get(mutant.key)
        if before is None or before["file_digest"] != self.digests[mutant.file]:
            return False
        same_tests: bool = before["tests_digest"] == self.coverage["digest"]
        return same_tests or before["outcome"] == "killed"

    def survived(self, mutant: made.Mutant) -> bool:
        """Whether it did when it was last tried, its file as it is."""
        before = self.known.get(mutant.key, {})
        return before.get("file_digest") == self.digests[mutant.file] and before["outcome"] == "survived"

    def keep(self, mutant: made.Mutant, found: Mapping[str, Any]) -> None:
        """Write down what became of it."""
        digests = {"file_digest": self.digests[mutant.file], "tests_digest": self.coverage["digest"]}
        entry = self.known[mutant.key] = {"key": mutant.key, **digests, **found}
        with self.log.open("a") as file:
            file.write(f"{json.dumps(entry)}\n")

    def order(self, mutant: made.Mutant) -> dict[str, Any] | None:
        """What a worker needs to test it; None where no test runs it."""
        tests = tests_for(mutant, self.coverage)
        if not tests:
            return None
        seconds = sum(self.coverage["seconds"][test] for test in tests)
        timeout_s = TIMEOUT_EXTRA_S + TIMEOUT_FACTOR * seconds
        return {"file": mutant.file, "source": mutant.source, "tests": tests, "timeout_s": timeout_s}

    def refuse_if_red(self) -> None:
        """The files as they are must pass, by the very same way, or nothing that is "killed" means anything."""
        untouched, seconds = self.group.sources()[0], self.coverage["seconds"]
        order = {
            "file": untouched.relative_to(ROOT).as_posix(),
            "source": untouched.read_text(encoding="utf-8"),
            "tests": sorted(seconds, key=lambda test: (seconds[test], test)),
            "timeout_s": 1200.0,
            # pytest rewrites what it imports, the package too: the forks after this one find that done.
            "writes_bytecode": True,
        }
        copy_to(self.into / "copies" / "0")
        ((_, found),) = tested([(None, order)], 1, self.into)
        if found is None or found["outcome"] != "survived":
            output = self.into / "copies" / "0" / "output.txt"
            raise SystemExit(f"{self.name}: the tests fail on the files as they are ({found}), see {output}")


def tested(orders: Iterable[tuple[Any, dict[str, Any]]], workers: int, into: Path) -> Iterator[tuple[Any, Any]]:
    """Each order's outcome, as workers find them, in copies of `copies/0`; None where a worker itself ended."""
    first = into / "copies" / "0"
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    count = 0
    for count, order in enumerate(orders, 1):  # noqa: B007 - how many there were
        waiting.put(order)
    others = [copy_to(into / "copies" / str(index), first) for index in range(1, min(workers, count))]
    threads = [Worker(copy, waiting, done) for copy in (first, *others)]
    for thread in threads:
        waiting.put(None)
        thread.start()
    for _ in range(count):
        yield done.get()
    for thread in threads:
        thread.join()


def run_group(name: str, group: Group, arguments: argparse.Namespace) -> dict[str, Any]:
    """Test a group's sample; what was found before is not tried again."""
    start = time.monotonic()
    population = [spot for path in group.sources() for spot in made.spots(path)]
    if arguments.only:
        population = [spot for spot in population if spot.operator in arguments.only]
    chosen = made.sample(ROOT, population, arguments.sample, arguments.seed)
    run = Run.of(name, group, arguments.into)
    todo = [mutant for mutant in chosen if not run.is_settled(mutant)]
    if arguments.unjudged:
        rules = json.loads((HERE / "verdicts.json").read_text(encoding="utf-8"))
        todo = [each for each in todo if not (run.survived(each) and verdict_on(each, rules)["verdict"] != NOT_JUDGED)]
    print(f"== {name}: {len(population)} mutants, {len(chosen)} sampled, {len(todo)} to test", flush=True)
    orders = []
    for mutant in todo:
        order = run.order(mutant)
        if order is None:
            run.keep(mutant, {"outcome": "survived", "by": NO_TEST, "seconds": 0.0})
        else:
            orders.append((mutant, order))
    if orders:
        run.refuse_if_red()
    for count, (mutant, found) in enumerate(tested(orders, arguments.workers, arguments.into), 1):
        if found is None:
            raise SystemExit(f"a worker ended on {mutant.file}:{mutant.line}")
        run.keep(mutant, found)
        if found["outcome"] != "killed":
            change = f"{mutant.before!r} → {mutant.after!r}"
            print(f"{count}/{len(orders)} {found['outcome']}: {mutant.file}:{mutant.line} {change}", flush=True)
    return {**summarize(chosen, run.known, len(population)), "seconds_now": round(time.monotonic() - start)}


def verdict_on(mutant: made.Mutant, rules: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The verdict of the first rule whose conditions all hold: each names a part of what the mutant has there."""
    for rule in rules:
        conditions = {name: rule[name] for name in ("file", "function", "operator", "before", "after") if name in rule}
        if all(part in getattr(mutant, name) for name, part in conditions.items()):
            return {"verdict": rule["verdict"], "why": rule["why"]}
    return {"verdict": "message text" if mutant.text else NOT_JUDGED}


def summarize(chosen: Sequence[made.Mutant], known: Mapping[str, Any], population: int) -> dict[str, Any]:
    """A group's counts and survivors, as the report has them."""
    rules = json.loads((HERE / "verdicts.json").read_text(encoding="utf-8"))
    outcomes = Counter(known[mutant.key]["outcome"] for mutant in chosen)
    survivors = [
        {
            "where": f"{mutant.file}:{mutant.line}",
            "function": mutant.function,
            "operator": mutant.operator,
            "before": mutant.before,
            "after": mutant.after,
            "run": known[mutant.key]["by"] != NO_TEST,
            **verdict_on(mutant, rules),
        }
        for mutant in sorted(chosen, key=lambda each: (each.file, each.line))
        if known[mutant.key]["outcome"] == "survived"
    ]
    verdicts = Counter(each["verdict"] for each in survivors)
    caught = outcomes["killed"] + outcomes["timed out"]
    meant = len(chosen) - verdicts["equivalent"]
    return {
        "mutants": population,
        "sampled": len(chosen),
        **{outcome: outcomes[outcome] for outcome in ("killed", "survived", "timed out")},
        "score": round(caught / len(chosen), 4) if chosen else None,
        "score_without_equivalent": round(caught / meant, 4) if meant else None,
        "verdicts": dict(verdicts),
        "seconds": round(sum(known[mutant.key]["seconds"] for mutant in chosen)),
        "survivors": survivors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/mutation", description="Do the tests notice?")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"which: {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--sample", type=int, default=300, help="mutants a group (default: 300)")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="these operators alone, such as RemoveGuard")
    parser.add_argument("--unjudged", action="store_true", help="try survivors again only where they have no verdict")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--into", type=Path, default=ROOT / ".mutation", help="a folder that keeps everything")
    arguments = parser.parse_args()
    groups = {**GROUPS, **MORE_GROUPS}
    if unknown := [name for name in arguments.groups if name not in groups]:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(groups)}")
    arguments.into = arguments.into.resolve()
    arguments.into.mkdir(parents=True, exist_ok=True)
    report_file = arguments.into / "report.json"
    report = json.loads(report_file.read_text()) if report_file.exists() else {}
    report |= {"sample": arguments.sample, "seed": arguments.seed}
    results = report.setdefault("groups", {})
    for name in arguments.groups or GROUPS:
        results[name] = run_group(name, groups[name], arguments)
        report_file.write_text(f"{json.dumps(report, indent=1)}\n")
    for name in arguments.groups or GROUPS:
        found = results[name]
        print(
            f"{name}: {found['sampled']} of {found['mutants']} sampled, {found['killed']} killed, "
            f"{found['survived']} survived, {found['timed out']} timed out, score {found['score']}: {found['verdicts']}"
        )


if __name__ == "__main__":
    main()
