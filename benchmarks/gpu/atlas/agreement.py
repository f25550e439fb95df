"""Whether the emulation says what the GPU says, probe by probe.

    python benchmarks/gpu/atlas/agreement.py emulate MODELS FILE       # verdicts of this tree's emulation
    python benchmarks/gpu/atlas/agreement.py measure MODELS OUT FILE   # verdicts of the GPU's outputs and a plain run
    python benchmarks/gpu/atlas/agreement.py report GPU EMULATED [--before EMULATED] [--json FILE]

MODELS is prepare.py's folder, OUT what device.py wrote. Every probe is judged by the plugin's own metric `max` at the
default limit of its precision, against the FP32 model on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import device  # type: ignore[import-not-found]  # beside this script
import ml_dtypes
import numpy as np
import probes  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck import compare, metrics
from pytest_trtcheck.model.ort_runner import OrtRunner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

Outputs = dict[str, "NDArray[Any]"]
NEAR = 3.0
"""A probe whose error on the GPU lies within this factor of its limit."""


def judged(actual: Outputs, reference: Outputs, precision: Any) -> dict[str, Any]:
    """Verdict, error (`max`), and how many values are NaN or infinite on one side alone."""
    limits = compare.resolve_limits(None, "max", precision, list(reference))
    records = []
    for name, expected in reference.items():
        measured = compare.measure(name, actual[name], expected)
        finite = measured.size - measured.nonfinite.nan_reference - measured.nonfinite.inf_reference
        records.append((compare.judge(measured, limits[name]), measured, finite))
    record = compare.summarize([each for each, _, _ in records], "max")
    return {
        "verdict": record.verdict,
        "error": max((each.max for each, _, _ in records if each.max is not None), default=None),
        "nonfinite": sum(measured.nonfinite.different for _, measured, _ in records),
        "compared": sum(finite for _, _, finite in records),
        "overflow": sum(
            int(np.sum(np.isinf(actual[name].astype(np.float64)) & np.isfinite(expected.astype(np.float64))))
            for name, expected in reference.items()
        ),
    }


def engines(folder: Path) -> Iterator[tuple[probes.Case, str, Path]]:
    """Every case in every precision that was lowered."""
    for case in probes.cases():
        for precision in case.precisions:
            path = folder / f"{case.name}.{precision}.onnx"
            if path.exists():
                yield case, precision, path


def reference(case: probes.Case, folder: Path) -> OrtRunner:
    path = folder / "reference.onnx"
    path.write_bytes(case.model.SerializeToString())
    return OrtRunner(path, case.name)


def emulate(models: Path, target: Path) -> None:
    """Judge what this tree's emulation computes for every probe."""
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision.emulation import rewrite as emulation

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for case, precision, path in engines(models):
            key = f"{case.name}.{precision}"
            try:
                rewrite = emulation.emulated_tf32 if precision == "tf32" else emulation.emulated
                graph.write(rewrite(graph.read(path)), folder / "emulated.onnx")
                runner = OrtRunner(folder / "emulated.onnx", key)
                exact = reference(case, folder)
                found[key] = {
                    name: judged(runner(inputs), exact(inputs), precision)
                    for name in case.values
                    for inputs in [case.inputs(name, precision)]
                }
            except Exception as error:
                found[key] = {"error": f"{type(error).__name__}: {error}"[:500]}
                print(key, found[key]["error"], file=sys.stderr)
    target.write_text(json.dumps(found))


def expanded(array: NDArray[Any]) -> NDArray[Any]:
    """What `device.compact` made smaller."""
    if array.dtype == np.uint16:
        return np.asarray(array.view(ml_dtypes.bfloat16).astype(np.float32))
    return array.astype(np.float32) if array.dtype == np.float16 else array


def results(folder: Path) -> Iterator[tuple[str, dict[str, Any], Mapping[str, NDArray[Any]]]]:
    """Every engine that ran: its name, its record, and its outputs by "class/output"."""
    for archive in sorted(folder.glob("results*.tar.xz")):
        with tarfile.open(archive) as tar:
            members = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
            for name, stream in members.items():
                if name.endswith(".json") and f"{name[:-5]}.npz" in members and stream is not None:
                    arrays = members[f"{name[:-5]}.npz"]
                    assert arrays is not None
                    yield name[:-5], json.load(stream), dict(np.load(io.BytesIO(arrays.read())))


def measure(models: Path, out: Path, target: Path) -> None:
    """Judge what the GPU computed, and what a plain run of the lowered model on a CPU would have said."""
    cases = {case.name: case for case in probes.cases()}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for key, record, outputs in results(out):
            name, _, precision = key.rpartition(".")
            case = cases[name]
            exact = reference(case, Path(scratch))
            try:
                plain = OrtRunner(models / f"{key}.onnx", key)
            except Exception:
                plain = exact  # ONNX Runtime has no such kernel: what remains is the FP32 model.
            found[key] = {}
            for value_class, said in record["probes"].items():
                inputs = case.inputs(value_class, precision)
                start = f"{value_class}/inputs/"
                inputs |= {name.removeprefix(start): array for name, array in outputs.items() if name.startswith(start)}
                if device.digest(inputs) != said["inputs"]:
                    raise SystemExit(f"{key} {value_class}: the inputs made here are not those that the GPU had")
                if "error" in said:
                    found[key][value_class] = {"verdict": "error", "text": said["error"]}
                    continue
                expected = exact(inputs)
                actual = {output: expanded(outputs[f"{value_class}/{output}"]) for output in expected}
                entry = judged(actual, expected, precision)
                entry["at_the_edge"] = at_the_edge(exact, inputs)
                try:
                    entry["plain"] = judged(plain(inputs), expected, precision)["verdict"]
                except Exception:
                    entry["plain"] = "pass"
                found[key][value_class] = entry
    target.write_text(lines_of(found))


def lines_of(found: dict[str, Any]) -> str:
    """JSON with a line for each engine, errors to four digits."""

    def shortened(said: dict[str, Any]) -> dict[str, Any]:
        return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in said.items()}

    rows = (
        f"{json.dumps(key)}: {json.dumps({name: shortened(said) for name, said in classes.items()})}"
        for key, classes in sorted(found.items())
    )
    return "{\n" + ",\n".join(rows) + "\n}\n"


def at_the_edge(exact: OrtRunner, inputs: Outputs) -> bool:
    """Whether FP32 itself is about to overflow: there the order of additions decides, whatever the precision."""
    larger = {name: array * 8 if array.dtype.kind == "f" else array for name, array in inputs.items()}
    before, after = exact(inputs), exact(larger)
    return any(
        np.isfinite(before[name].astype(np.float64)).sum() > np.isfinite(after[name].astype(np.float64)).sum()
        for name in before
    )


def rows(gpu: Any, emulated: Any, before: Any) -> list[dict[str, Any]]:
    """One row a probe that ran: its key, class, and the verdicts."""
    cases = {case.name: case for case in probes.cases()}
    table = []
    for key, classes in gpu.items():
        name, _, precision = key.rpartition(".")
        for value_class, said in classes.items():
            ours = emulated.get(key, {}).get(value_class)
            if said["verdict"] == "error" or not said["compared"] or ours is None or said["at_the_edge"]:
                continue
            if "not_measured" in {said["verdict"], ours["verdict"]}:
                continue  # zeros would have passed as well
            earlier = (before or {}).get(key, {}).get(value_class)
            limit = metrics.DEFAULT_TOLERANCE[precision]
            error = said["error"]
            near = not said["nonfinite"] and error is not None and limit / NEAR <= error <= limit * NEAR
            table.append(
                {
                    "engine": key,
                    "operator": cases[name].operator,
                    "group": name.partition(".")[0],
                    "precision": precision,
                    "class": value_class.rstrip("0123456789"),
                    "values": value_class,
                    "gpu": said,
                    "emulated": ours,
                    "plain": said["plain"],
                    "before": earlier,
                    "near": near,
                    "hidden": bool(said["overflow"]) and not ours["nonfinite"],
                }
            )
    return table


def score(table: list[dict[str, Any]]) -> dict[str, Any]:
    """How many verdicts agree, and how many of the GPU's failures the others see."""
    failing = [row for row in table if row["gpu"]["verdict"] == "fail"]
    passing = len(table) - len(failing)

    def share(sees: Any) -> dict[str, Any]:
        agree = sum(sees(row) == row["gpu"]["verdict"] for row in table)
        caught = sum(sees(row) == "fail" for row in failing)
        return {
            "agree": agree,
            "agree_share": round(agree / len(table), 4) if table else None,
            "caught": caught,
            "caught_share": round(caught / len(failing), 4) if failing else None,
            "false_alarms": len(table) - agree - (len(failing) - caught),
        }

    scores = {
        "probes": len(table),
        "fail_on_gpu": len(failing),
        "pass_on_gpu": passing,
        "emulated": share(lambda row: row["emulated"]["verdict"]),
        "plain": share(lambda row: row["plain"]),
    }
    if table and all(row["before"] for row in table):
        scores["before"] = share(lambda row: row["before"]["verdict"])
    return scores


def ratios(table: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the emulated error lies from the GPU's, by precision, where both say something: above 1e-5."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for row in table:
        errors = [row[side]["error"] for side in ("emulated", "gpu")]
        if (
            not row["gpu"]["nonfinite"]
            and not row["emulated"]["nonfinite"]
            and None not in errors
            and min(errors) > 1e-5
        ):
            found[row["precision"]].append(errors[0] / errors[1])
    return {
        precision: {
            "probes": len(values),
            **{f"within_{factor:g}": round(_within(values, factor), 4) for factor in (1.2, 1.5, 2, 3)},
            "median": round(float(np.median(values)), 3),
        }
        for precision, values in sorted(found.items())
    }


def _within(values: list[float], factor: float) -> float:
    return sum(1 / factor <= value <= factor for value in values) / len(values)


def grouped(table: list[dict[str, Any]], *keys: str) -> dict[str, Any]:
    parts: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in table:
        parts[" ".join(str(row[key]) for key in keys)].append(row)
    return {name: score(part) for name, part in sorted(parts.items())}


def report(gpu: Any, emulated: Any, before: Any, summary: Any) -> dict[str, Any]:
    """The agreement as plain data."""
    table = rows(gpu, emulated, before)
    differing = [
        {
            "engine": row["engine"],
            "values": row["values"],
            "gpu": [row["gpu"]["verdict"], row["gpu"]["error"], row["gpu"]["nonfinite"]],
            "emulated": [row["emulated"]["verdict"], row["emulated"]["error"], row["emulated"]["nonfinite"]],
        }
        for row in table
        if row["gpu"]["verdict"] != row["emulated"]["verdict"]
    ]
    return {
        **{key: summary.get(key) for key in ("gpu", "driver", "capability", "tensorrt_rtx")},
        "all": score(table),
        "near_the_limit": score([row for row in table if row["near"]]),
        "away_from_the_limit": score([row for row in table if not row["near"]]),
        "by_precision": grouped(table, "precision"),
        "by_class": grouped(table, "class"),
        "by_operator": grouped(table, "operator"),
        "emulated_to_gpu_error": ratios(table),
        "hidden_overflows": [f"{row['engine']} {row['values']}" for row in table if row["hidden"]],
        "differing": differing,
        "at_the_edge_of_fp32": sum(
            bool(said.get("at_the_edge")) for classes in gpu.values() for said in classes.values()
        ),
        "not_built": {
            name: said["error"][:200] for name, said in summary.get("engines", {}).items() if "error" in said
        },
        "not_reached": summary.get("not_reached", []),
    }


def markdown(made: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        f"{made['gpu']}, driver {made['driver']}, TensorRT-RTX {made['tensorrt_rtx']}.",
        "",
        "| probes | | fail on the GPU | emulated: same verdict | of the failures | false alarms | before: same, of the "
        "failures | plain FP32 run: same, of the failures |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    sections = {
        "all": made["all"],
        "within a factor 3 of the limit": made["near_the_limit"],
        "the others": made["away_from_the_limit"],
        **{f"in {name}": part for name, part in made["by_precision"].items()},
        **{f"values: {name}": part for name, part in made["by_class"].items()},
        **{f"operator: {name}": part for name, part in made["by_operator"].items()},
    }
    for name, part in sections.items():
        emulated, plain, before = part["emulated"], part["plain"], part.get("before")
        cells = [
            name,
            part["probes"],
            part["fail_on_gpu"],
            _percent(emulated["agree_share"]),
            _percent(emulated["caught_share"]),
            emulated["false_alarms"],
            f"{_percent(before['agree_share'])}, {_percent(before['caught_share'])}" if before else "",
            f"{_percent(plain['agree_share'])}, {_percent(plain['caught_share'])}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Emulated error, divided by the GPU's, where both exceed 1e-5:",
        "",
        "| precision | probes | within 1.2 | within 1.5 | within 2 | within 3 | median |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for precision, found in made["emulated_to_gpu_error"].items():
        shares = [_percent(found[f"within_{factor}"]) for factor in ("1.2", "1.5", "2", "3")]
        lines.append(f"| {precision} | {found['probes']} | {' | '.join(shares)} | {found['median']} |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("emulate")
    step.add_argument("models", type=Path)
    step.add_argument("file", type=Path)
    step = steps.add_parser("measure")
    step.add_argument("models", type=Path)
    step.add_argument("out", type=Path)
    step.add_argument("file", type=Path)
    step = steps.add_parser("report")
    step.add_argument("gpu", type=Path)
    step.add_argument("emulated", type=Path)
    step.add_argument("--before", type=Path)
    step.add_argument("--summary", type=Path)
    step.add_argument("--json", type=Path)
    step.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    np.seterr(all="ignore")
    if args.step == "emulate":
        emulate(args.models, args.file)
    elif args.step == "measure":
        measure(args.models, args.out, args.file)
    else:
        read = [json.loads(path.read_text()) if path else {} for path in (args.gpu, args.emulated, args.before)]
        summary = json.loads(args.summary.read_text()) if args.summary else {}
        made = report(read[0], read[1], read[2], summary)
        if args.json:
            args.json.write_text(json.dumps(made, indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text(markdown(made))
        print(json.dumps({key: made[key] for key in ("all", "near_the_limit", "away_from_the_limit")}, indent=1))


if __name__ == "__main__":
    main()
