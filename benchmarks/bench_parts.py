"""Whether judging outputs by parts raises false alarms, and what it sees that judging them whole does not.

    python benchmarks/bench_parts.py [--models FOLDER] [--inputs N] [--json FILE]

Every ONNX model under FOLDER (by default those of the packages nudenet and magika) is lowered to FP16, BF16 and INT8,
emulated on N inputs of six kinds (noise, noise around zero, waves, blocks, normal, and values 255 times as large or 100
times as small), and judged with `parts="auto"` and with `parts=None`. A check that passes as a whole and fails by parts
is listed with the part, to be looked at: is it a false alarm, or was the whole blind?

Then faults are planted into the parts of every output that has several, where inputs exercised them: all of it zero,
and every value off by twice the limit. As a whole many of those pass; by parts none may.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.compare.division import view
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.spec import Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
    from pytest_trtcheck.record import OutputRecord
    from pytest_trtcheck.spec import Precision

Arrays = dict[str, "NDArray[Any]"]
PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "int8")
KINDS = 6
CALIBRATION = 12
SPOILT = 12
"""Inputs a model into whose outputs faults are planted."""


HEIGHTS = (160, 48)
"""Tried in turn for images of open height: lines of text are 48 high."""


def shape_of(spec: TensorSpec, height: int) -> tuple[int, ...]:
    """Sizes for the dimensions that a model leaves open: batch 1, images 160 wide."""
    open_sizes = {0: 1, 2: height}
    return tuple(size if isinstance(size, int) else open_sizes.get(axis, 160) for axis, size in enumerate(spec.shape))


def values(shape: Sequence[int], rng: np.random.Generator, kind: int) -> NDArray[Any]:
    if kind == 0:
        return rng.random(shape)
    if kind == 1:
        return rng.random(shape) * 2 - 1
    if kind == 2:
        axes = np.meshgrid(*[np.linspace(0, rng.uniform(1, 6), size) for size in shape], indexing="ij")
        return np.asarray(0.5 + 0.5 * np.sin(sum(axes) * rng.uniform(0.5, 3)))
    if kind == 3:
        blocks = np.ones(shape)
        for _ in range(25):
            place = [slice(None)] * len(shape)
            for axis in (axis for axis, size in enumerate(shape) if size > 8):
                length = int(rng.integers(2, max(3, shape[axis] // 4)))
                start = int(rng.integers(0, shape[axis] - length))
                place[axis] = slice(start, start + length)
            blocks[tuple(place)] = rng.random()
        return blocks * 2 - 1
    if kind == 4:
        return rng.standard_normal(shape)
    return rng.random(shape) * (255 if rng.random() < 0.5 else 1e-2)


def case_of(model: OnnxModel, seed: int, height: int) -> Arrays:
    rng = np.random.default_rng(seed)
    made: Arrays = {}
    for spec in model.inputs:
        shape = shape_of(spec, height)
        if spec.dtype.startswith("int"):
            made[spec.name] = rng.integers(0, spec.index_limit or 256, shape).astype(spec.dtype)
        else:
            made[spec.name] = values(shape, rng, seed % KINDS).astype(np.float32)
    return made


def limits_by_way(model: OnnxModel, precision: Precision) -> dict[str, compare.Limits]:
    names = [output.name for output in model.outputs]
    parts = dict(model.parts)
    known = {name: compare.Division(parts.get(name, ()), search=True) for name in names}
    return {
        "whole": compare.resolve_limits(None, "max", precision, names),
        "parts": compare.resolve_limits(None, "max", precision, names, known=known),
    }


def judged(actual: Arrays, reference: Arrays, limits: compare.Limits) -> tuple[str, str, list[OutputRecord]]:
    measured = compare.measure_all(actual, reference, limits)
    outputs = [compare.judge(each, limits[name]) for name, each in measured.items()]
    record = compare.summarize(outputs, "max")
    return record.verdict, record.reason or "", outputs


def planted(actual: Arrays, reference: Arrays, outputs: Sequence[OutputRecord]) -> Iterator[tuple[str, Arrays, bool]]:
    """(fault, outputs with it, whether it exceeds twice the limit by max|r|) for every part that was exercised."""
    for output in outputs:
        parts = [part for part in output.parts if part.verdict == "pass" and part.ranges and not part.band]
        for part in parts:
            scale, limit = part.scale or 0.0, part.limit or 0.0
            where = Part(tuple((axis, start, stop) for axis, start, stop in part.ranges))
            for fault in ("zero", "twice the limit"):
                spoilt = np.array(actual[output.name])
                mine, right = view(spoilt, where), view(reference[output.name], where)
                mine[...] = 0 if fault == "zero" else right + 2 * limit * scale
                peak = float(np.abs(right).max())
                beyond = float(np.abs(mine.astype(np.float64) - right).max()) >= 1.99 * limit * peak
                yield fault, {**actual, output.name: spoilt}, beyond


def run(path: Path, inputs: int, cache: Cache, results: Mapping[str, Any], height: int) -> None:
    model = open_model(str(path), (), cache)
    reference = Reference(model, cache)
    cases = [case_of(model, seed, height) for seed in range(inputs)]
    expected = [reference(case) for case in cases]
    calibration = [case_of(model, 10_000 + seed, height) for seed in range(CALIBRATION)]
    for precision in PRECISIONS:
        lowered = lower(model, precision, cache, calibration=calibration)
        runner = emulation(model, lowered, precision, cache)
        ways = limits_by_way(model, precision)
        for index, (case, right) in enumerate(zip(cases, expected, strict=True)):
            actual = runner(case)
            whole, parts = (judged(actual, right, ways[way]) for way in ("whole", "parts"))
            results["checks"][f"{whole[0]} → {parts[0]}"] += 1
            if whole[0] == "pass" and parts[0] == "fail":
                results["flipped"].append({"model": path.stem, "precision": precision, "input": index, "why": parts[1]})
            if parts[0] != "pass" or index >= SPOILT:
                continue
            for fault, spoilt, beyond in planted(actual, right, parts[2]):
                seen = {way: judged(spoilt, right, ways[way])[0] == "fail" for way in ways}
                for way, caught in seen.items():
                    results["faults"][fault][f"caught, judged by {way}"] += caught
                results["faults"][fault]["planted"] += 1
                results["faults"][fault]["missed beyond twice the limit"] += beyond and not seen["parts"]
        runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="False alarms and faults seen, judged by parts and as a whole.")
    parser.add_argument("--models", type=Path, help="a folder of models")
    parser.add_argument("--inputs", type=int, default=60, help="inputs a model")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "checks": Counter(),
        "flipped": [],
        "faults": {fault: Counter() for fault in ("zero", "twice the limit")},
        "models": [],
        "left_out": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        packaged = [networks.nudenet(), networks.magika()]
        models = arguments.models.rglob("*.onnx") if arguments.models else packaged
        for path in sorted(models, key=lambda each: (each.stat().st_size, each)):
            name = f"{path.parent.name}/{path.stem}"
            for height in HEIGHTS:
                try:
                    run(path, arguments.inputs, Cache(Path(scratch)), results, height)
                except (CheckError, ValueError) as error:
                    results["left_out"][name] = str(error).splitlines()[0][:160]
                    continue
                results["models"].append(name)
                results["left_out"].pop(name, None)
                break
            text = json.dumps({"benchmark": "parts", "inputs": arguments.inputs, **results}, indent=2)
            print(name, dict(results["checks"]), flush=True)
            # After every model: it takes a while.
            if arguments.json:
                arguments.json.write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
