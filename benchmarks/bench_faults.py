"""Does the judge see planted faults, and leave sound models alone? Ten real models, twelve faults, three precisions.

    python benchmarks/bench_faults.py [--zoo FOLDER] [--models NAME …] [--sound N] [--into FOLDER] [--json FILE]

Each fault is planted in the lowered model, as if an engine computed that, and judged by `Checker.check` as a test
would be. How large it is, `faults/size.py` works out in numpy alone, from the outputs on both sides: a fault that
flips 5 % of the decisions, or whose error in some part of an output is more than twice the limit, must fail. Where
the unaltered lowering fails already (magika in FP16), a fault would prove nothing: more and more of the model stays
in FP32 until the lowering passes, or a `tol` of up to 0.2 lets it, as a user would have it; where neither helps, its
cells are counted apart. Beside that, sound checks: unaltered lowerings on one input after the other, of which those
that the numpy script finds sound (under half the limit in every part, under 1 % of the decisions) must not fail.

Results are kept in `--into` as they come, with a digest of the package and of this benchmark: a run that was stopped
goes on, and begins anew once either changes. `faults/zoo.py` says where the models come from.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import platform
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pytest_trtcheck.cache import Cache, hash_file
from pytest_trtcheck.check import parity
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.request import Allowance, Known
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.metrics import DEFAULT_TOLERANCE
from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import Lowered, float_path, lower
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.spec import ParitySpec

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "faults"))
import planting  # type: ignore[import-not-found]  # noqa: E402 - in a folder beside this script
import size as sizes  # type: ignore[import-not-found]  # noqa: E402
import zoo  # type: ignore[import-not-found]  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import Precision

    Outputs = Mapping[str, NDArray[Any]]

PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "int8")
CASES, CALIBRATION_SAMPLES = 2, 4
KEPT = (
    (0, 0, False),
    (0, 0, True),
    (0, 0.1, False),
    (0, 0.25, False),
    (0, 0.5, False),
    (0.1, 0.5, True),
    (0, 0.8, True),
    (0.3, 0.5, True),
    (0.45, 0.5, True),
)
"""What stays in FP32: shares of the nodes, from the beginning and from the end, and whether all but matrix products do.

The first that passes is taken; where none does, the one with the smallest error, judged by a `tol` that lets it pass.
"""
LOOSEST = 0.2
"""The largest `tol` that is set for that: beyond it, a model is not usable in a precision."""
CALIBRATION_SEED, SOUND_SEED = 1000, 10_000


@dataclass(frozen=True)
class Bench:
    """A model in one precision, its inputs, and who judges it."""

    subject: zoo.Subject
    precision: Precision
    model: OnnxModel
    checker: Checker
    folder: Path
    keep: tuple[str, ...] = ()
    tol: float | None = None

    def cases(self) -> list[zoo.Case]:
        """What the faults are judged on."""
        return [self.subject.make(np.random.default_rng(seed)) for seed in range(CASES)]

    def calibration(self, factor: float = 1.0) -> list[zoo.Case]:
        """Samples that no check is judged on; `factor` spoils them."""
        made = [self.subject.make(np.random.default_rng(CALIBRATION_SEED + i)) for i in range(CALIBRATION_SAMPLES)]
        first = next(iter(made[0]))
        return [{**case, first: (case[first] * factor).astype(case[first].dtype)} for case in made]

    def lower(self, factor: float = 1.0) -> Lowered:
        """The model in the precision; with calibration data times `factor`."""
        calibration = self.calibration(factor) if self.precision == "int8" else None
        return lower(self.model, self.precision, self.checker.cache, keep_fp32=self.keep, calibration=calibration)

    @property
    def limit(self) -> float:
        """The limit of `max`: that of the precision where none is set."""
        return DEFAULT_TOLERANCE[self.precision] if self.tol is None else self.tol

    def spec(self) -> ParitySpec:
        """What the check asks for."""
        return ParitySpec(precision=(self.precision,), keep_fp32=self.keep, tol=self.tol)

    def judge(self, lowered: Lowered) -> dict[str, Any]:
        """What the check says of a lowered model, and what numpy says."""
        pairs: list[tuple[Outputs, Outputs]] = []

        def watch(known: Known) -> tuple[str, ...]:
            pairs.extend((known.run(case), known.reference(case)) for case in known.cases)
            return ()

        spec = self.spec()
        request = Request(
            f"bench::{self.subject.name}",
            self.model,
            (),
            spec,
            inputs=self.cases(),
            inputs_source="returned",
            lowered=lowered,
            watch=watch,
        )
        record = self.checker.check(request)
        found: dict[str, Any] = {"verdict": record.verdict}
        if record.verdict != "pass":
            found["message"] = (record.message or "").splitlines()[0][:300]
        if record.parity is not None:
            found["worst"], found["reason"] = record.parity.worst, record.parity.reason
        if pairs:
            found |= sizes.size(self.subject.parts, self.subject.decisions, pairs)
            # What flips under a `tol` that was set here as loose as that is no fault of the judge's.
            loose = self.tol is not None and sizes.largest(found["errors"]) <= 2 * self.limit
            due = sizes.must_be_caught(found, self.limit)
            found |= {"must_be_caught": due and not loose, "flips_under_tol": due and loose}
        return found

    @functools.cached_property
    def _float_path(self) -> Path:
        return float_path(self.model, self.lower(), self.keep, self.checker.cache)

    def quantile(self, tensor: str, share: float) -> float:
        """The magnitude that a share of a tensor's elements keep in the FP32 model; a KeyError without the tensor."""
        model = onnx.load(self._float_path)
        if tensor not in {name for node in model.graph.node for name in node.output}:
            raise KeyError(tensor)
        model.graph.output.append(onnx.ValueInfoProto(name=tensor))
        with tempfile.NamedTemporaryFile(suffix=".onnx", dir=self.folder) as file:
            onnx.save(model, file.name)
            with closing(OrtRunner(Path(file.name), tensor)) as runner:
                values = runner(self.cases()[0])[tensor]
        return float(np.quantile(np.abs(values), share))

    def planted(self, fault: str) -> tuple[Lowered, str]:
        """The lowered model with a fault in it, and where that is."""
        if fault == planting.CALIBRATION:
            return self.lower(0.1), "calibration data times 0.1"
        lowered = self.lower()
        reference = Reference(self.model, self.checker.cache)
        spoiled = planting.Lowered(
            onnx.load(lowered.path), self.subject, self.quantile, dict(reference(self.cases()[0]))
        )
        planting.FAULTS[fault](spoiled)
        path = self.folder / f"{self.subject.name}-{self.precision}-{fault}.onnx"
        onnx.save(spoiled.model, path)
        return Lowered(path, hash_file(path), (), lowered.details), spoiled.where


def benches(subjects: Mapping[str, zoo.Subject], where: Path | None, folder: Path) -> Iterator[Bench]:
    for subject in subjects.values():
        # A cache for each model, so that no disk fills up.
        for precision in PRECISIONS:
            cache = Cache(folder / "cache" / subject.name, None)
            checker = Checker(cache, allowance=Allowance(0))
            model = open_model(str(subject.path(where)), (Path("/"),), cache)
            yield Bench(subject, precision, model, checker, folder)


def keeping(bench: Bench, kept: tuple[float, float, bool]) -> Bench:
    """The bench with nodes in FP32, as `KEPT` describes them."""
    nodes = list(graph.read(bench.model.path).graph)
    first, last = (round(share * len(nodes)) for share in kept[:2])
    names = {node.name or "" for node in (*nodes[:first], *nodes[len(nodes) - last :])}
    if kept[2]:
        names |= {node.name or "" for node in nodes if node.op_type not in planting.WEIGHTED}
    return replace(bench, keep=tuple(name.replace("[", "[[]") for name in sorted(names)))


def faults_of(precision: Precision) -> list[str]:
    names = list(planting.FAULTS)
    return [*names[:-1], planting.CALIBRATION] if precision == "int8" else names


def cell(bench: Bench, fault: str | None) -> dict[str, Any]:
    """One cell of the table; without a fault: what the unaltered lowering is judged as."""
    try:
        lowered, where = (bench.lower(), "") if fault is None else bench.planted(fault)
    except planting.NotHere as error:
        return {"verdict": "not planted", "message": str(error)}
    except CheckError as error:
        return {"verdict": "not lowered", "message": str(error).splitlines()[0][:300]}
    found = bench.judge(lowered)
    if lowered.path.parent == bench.folder:
        lowered.path.unlink()
    return {"where": where, **found}


def sound_checks(bench: Bench, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The unaltered lowering on one input after the other, by `parity.judge`: its session is opened once."""
    lowered = bench.lower()
    reference = Reference(bench.model, bench.checker.cache)
    spec = bench.spec()
    with closing(emulation(bench.model, lowered, bench.precision, bench.checker.cache)) as runner:
        for seed in seeds:
            case = bench.subject.make(np.random.default_rng(SOUND_SEED + seed))
            found = sizes.size(bench.subject.parts, bench.subject.decisions, [(runner(case), reference(case))])
            entry = {"seed": seed, **found, "sound": sizes.is_sound(found, bench.limit)}
            if entry["sound"]:
                request = Request("bench", bench.model, (), spec)
                outcome = parity.judge(Known(request, bench.model, lowered, [case], reference, runner=runner))
                entry |= {"verdict": outcome.record.verdict, "reason": outcome.record.reason}
            yield entry


class Kept:
    """Results in a file, one JSON object a line, as they come."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest
        self.found: dict[str, Any] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            if entry["digest"] == digest:
                self.found[entry["key"]] = entry["value"]

    def add(self, key: str, value: Any) -> None:
        """Keep one more."""
        self.found[key] = value
        with self._path.open("a") as file:
            file.write(f"{json.dumps({'digest': self._digest, 'key': key, 'value': value})}\n")


def digest() -> str:
    """Identity of what decides the results."""
    code = sorted((HERE.parent / "pytest_trtcheck").rglob("*.py")) + sorted((HERE / "faults").glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in [*code, Path(__file__)])).hexdigest()[:16]


def settled(plain: Bench, kept: Kept) -> Bench:
    """The bench with what it takes to pass (see `KEPT`), and its unaltered cell."""
    key = _unaltered(plain)
    if key in kept.found:
        return replace(keeping(plain, tuple(kept.found[key]["kept"])), tol=kept.found[key]["tol"])
    tried: list[tuple[float, Bench, dict[str, Any]]] = []
    for what in KEPT:
        bench = keeping(plain, what)
        value = {"kept": what, "tol": None, **cell(bench, None)}
        print(key, what, value["verdict"], value.get("errors"), flush=True)
        error = sizes.largest(value.get("errors", {}))
        # Without an error nothing was lowered, or nothing is computed in the precision any more.
        tried.append((error or math.inf, bench, value))
        if error and _is_usable(value):
            break
    else:
        error, bench, value = min(tried, key=lambda each: each[0])
        tol = float(f"{2.2 * error:.1g}")
        if tol <= LOOSEST and sizes.largest(value["flipped"]) < 0.01:
            bench = replace(bench, tol=tol)
            value = {"kept": value["kept"], "tol": tol, **cell(bench, None)}
            print(key, value["kept"], f"{tol=}", value["verdict"], flush=True)
    kept.add(key, value)
    return bench


def fill(arguments: argparse.Namespace, kept: Kept) -> None:
    subjects = zoo.by_name(arguments.models)
    every = []
    for plain in benches(subjects, arguments.zoo, arguments.into):
        bench = settled(plain, kept)
        every.append(bench)
        for fault in faults_of(bench.precision):
            key = f"{bench.subject.name} {bench.precision} {fault}"
            if key not in kept.found:
                start = time.monotonic()
                kept.add(key, value := {**cell(bench, fault), "seconds": round(time.monotonic() - start, 2)})
                print(key, value["verdict"], value.get("must_be_caught"), value.get("worst"), flush=True)
    # In turns, so that a run that is stopped has something of each.
    ready = [bench for bench in every if kept.found[_unaltered(bench)]["verdict"] in {"pass", "fail"}]
    chunk = 12
    for first in range(0, 100 * chunk, chunk):
        for bench in ready:
            key = f"{bench.subject.name} {bench.precision} sound {first}"
            if sum(entry["sound"] for entry in _sound(kept)) >= arguments.sound:
                return
            earlier = [
                entry
                for before in range(0, first, chunk)
                for entry in kept.found.get(f"{bench.subject.name} {bench.precision} sound {before}", ())
            ]
            # What is beyond half its limit on the first inputs is so on the others.
            if earlier and not any(entry["sound"] for entry in earlier):
                continue
            if key not in kept.found:
                kept.add(key, list(sound_checks(bench, range(first, first + chunk))))
        print(f"{sum(entry['sound'] for entry in _sound(kept))} sound checks", flush=True)


def _unaltered(bench: Bench) -> str:
    return f"{bench.subject.name} {bench.precision} unaltered"


def _is_usable(unaltered: Mapping[str, Any]) -> bool:
    """Whether the unaltered lowering passes, and rightly: a fault in it then proves something."""
    return unaltered["verdict"] == "pass" and not unaltered["must_be_caught"]


def _sound(kept: Kept) -> list[dict[str, Any]]:
    return [entry for key, value in kept.found.items() if " sound " in key for entry in value]


def report(arguments: argparse.Namespace, kept: Kept) -> dict[str, Any]:
    table: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    misses, errors = [], []
    for name in zoo.by_name(arguments.models):
        for precision in PRECISIONS:
            before = kept.found[f"{name} {precision} unaltered"]
            row = table.setdefault(name, {})[precision] = {"unaltered": before}
            for fault in faults_of(precision):
                found = kept.found[f"{name} {precision} {fault}"]
                row[fault] = found
                counts["cells"] += 1
                if found["verdict"] in {"not planted", "not lowered"}:
                    counts[found["verdict"]] += 1
                elif found["verdict"] == "error":
                    counts["error"] += 1
                    errors.append({"cell": f"{name} {precision} {fault}", "message": found["message"]})
                elif not _is_usable(before):
                    counts["the unaltered model fails too"] += 1
                elif found["must_be_caught"]:
                    counts["to be caught"] += 1
                    counts["caught"] += found["verdict"] == "fail"
                    if found["verdict"] != "fail":
                        misses.append({"cell": f"{name} {precision} {fault}", **found})
                elif found["flips_under_tol"]:
                    counts["flips 5 % under the tol that was set"] += 1
                else:
                    counts["small"] += 1
                    counts["small, and fails all the same"] += found["verdict"] == "fail"
    sound = [entry for entry in _sound(kept) if entry["sound"]]
    alarms = [
        {"cell": key, **entry}
        for key, value in kept.found.items()
        if " sound " in key
        for entry in value
        if entry["sound"] and entry["verdict"] != "pass"
    ]
    return {
        "benchmark": "faults",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "models": {subject.name: f"{subject.package}: {subject.file}" for subject in zoo.SUBJECTS},
        "limits": {"misses": 0, "false_alarms": 0},
        "counts": dict(counts),
        "sound_checks": {"tried": len(_sound(kept)), "sound": len(sound), "false_alarms": len(alarms)},
        "misses": misses,
        "errors": errors,
        "false_alarms": alarms,
        "table": table,
        "within_limits": not misses and not alarms,
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    """A table of what was caught of what had to be, and how many faults were small."""
    lines = [f"| model | {' | '.join(PRECISIONS)} |", f"| --- {'| --- ' * len(PRECISIONS)}|"]
    for name, row in found["table"].items():
        cells = []
        for precision in PRECISIONS:
            before = row[precision]["unaltered"]
            faults = [row[precision][fault] for fault in faults_of(precision)]
            due = [each for each in faults if each.get("must_be_caught")]
            caught = sum(each["verdict"] == "fail" for each in due)
            if not _is_usable(before):
                cells.append(f"({before['verdict']} unaltered)")
                continue
            small = sum(each.get("must_be_caught") is False for each in faults)
            kept = "" if tuple(before["kept"]) == KEPT[0] else ", partly FP32"
            limit = "" if before["tol"] is None else f", tol={before['tol']:g}"
            cells.append(f"{caught} of {len(due)}, {small} small{kept}{limit}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Planted faults in real models, and sound checks of them.")
    parser.add_argument("--zoo", type=Path, help="a folder with the packages' files (default: the installed packages)")
    parser.add_argument("--models", nargs="*", default=[], help="which ones (default: all ten)")
    parser.add_argument("--sound", type=int, default=1000, help="how many sound checks (default: 1000)")
    parser.add_argument("--into", type=Path, help="a folder that keeps results between runs")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        arguments.into = arguments.into or Path(scratch)
        arguments.into.mkdir(parents=True, exist_ok=True)
        kept = Kept(arguments.into / "results.jsonl", digest())
        fill(arguments, kept)
        found = report(arguments, kept)
    if arguments.json:
        arguments.json.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")
    for miss in found["misses"]:
        print("missed:", miss["cell"], miss["where"], miss["errors"], miss["flipped"])
    for alarm in found["false_alarms"]:
        print("false alarm:", alarm["cell"], alarm["seed"], alarm["reason"])
    print(as_markdown(found))
    print(json.dumps({key: found[key] for key in ("counts", "sound_checks", "within_limits")}, indent=1))


if __name__ == "__main__":
    main()
