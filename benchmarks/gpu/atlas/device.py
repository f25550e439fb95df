"""Build and run every probe's engine on the GPU in this machine, and keep what comes out.

    python benchmarks/gpu/atlas/device.py MODELS.tar.xz OUT [--seconds 480] [--processes 14] [--skip GLOB.json]

MODELS holds the lowered models that prepare.py packed. OUT gets `results*.tar.xz`: for each engine the outputs of its
probes (16-bit where they are values of that type), the layers as the engine inspector lists them, and what went wrong.
Inputs come from the seeds of probes.py; those that come out otherwise here than where the models were packed (another
numpy, another processor) are kept with the outputs. An engine that crashes or hangs costs
its own probes alone; what was not begun in time is listed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import workers  # type: ignore[import-not-found]  # beside this script

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST = (
    # Where what was measured before and the emulation differ.
    "softmax.LogSoftmax", "product.Gemm.alpha", "op2.Mean", "op3.", "op2.Sum", "reduce.ReduceSumSquare", "scan.CumSum",
    "op2.Mod", "product.Conv.", "attention.", "recurrent.", "conv.", "spelled.", "product.", "linear.", "norm.",
)  # fmt: skip


PARTS = 4
"""Archives that the outputs are spread over, so that each stays small."""


def priority(name: str) -> tuple[int, int, str]:
    """Doubtful operators first; of those FP16, TF32, BF16, then the rest."""
    doubtful = next((index for index, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))
    precision = ("fp16", "tf32", "bf16", "fp8", "int8").index(name.rpartition(".")[2])
    return (0 if doubtful < 10 else 1, precision, name)


def digest(arrays: dict[str, NDArray[Any]]) -> str:
    """Identity of a probe's inputs."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return state.hexdigest()[:16]


def compact(array: NDArray[Any]) -> NDArray[Any]:
    """The same values in the smallest of float16, the upper half of float32, and what it is."""
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        half = array.astype(np.float16)
    if np.array_equal(half.astype(np.float32), array, equal_nan=True):
        return half
    bits = array.view(np.uint32)
    return (bits >> 16).astype(np.uint16) if not (bits & 0xFFFF).any() else array


def worker() -> None:
    import probes  # type: ignore[import-not-found]  # beside this script
    import tensorrt_rtx

    from pytest_trtcheck.backends.tensorrt import builder as tensorrt_builder
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import TensorRTModule

    cases = {case.name: case for case in probes.cases()}
    module = TensorRTModule("tensorrt_rtx", tensorrt_rtx.__version__, tensorrt_rtx)

    def measure(task: workers.Task) -> workers.Task:
        name, folder = task["id"], Path(task["folder"])
        case_name, _, precision = name.rpartition(".")
        case = cases[case_name]
        heard: list[str] = []
        plan = folder / f"{name}.plan"
        request = workers.request(task["model"], str(plan), precision, task["capability"])
        try:
            answer = tensorrt_builder.build_here(tensorrt_rtx, request, lambda s, t: heard.append(f"{s}: {t}"))
        except tensorrt_builder.RequestError as error:
            said = [text for text in heard if "ERROR" in text][:3]
            return {"stage": error.stage, "error": "; ".join([*error.errors, *said])[:1500]}
        began = time.perf_counter()
        engine = Engine(plan, module, timeout_s=20)
        load_s = time.perf_counter() - began
        plan.unlink()
        kept: dict[str, Any] = {}
        record: dict[str, Any] = {"build_s": answer["build_s"], "load_s": load_s, "probes": {}}
        try:
            with contextlib.suppress(Exception):
                record["layers"] = engine.layer_information()
            for value_class in case.values:
                inputs = case.inputs(value_class, precision)
                entry = {"inputs": digest(inputs)}
                if entry["inputs"] != task["digests"].get(value_class):
                    kept |= {f"{value_class}/inputs/{key}": array for key, array in inputs.items()}
                try:
                    outputs = engine({k: inputs[k] for k in (spec.name for spec in engine.inputs)})
                    for output, array in outputs.items():
                        kept[f"{value_class}/{output}"] = compact(array)
                except Exception as error:
                    entry["error"] = f"{type(error).__name__}: {error}"[:800]
                record["probes"][value_class] = entry
                if engine.poisoned:
                    break
            poisoned = engine.poisoned
        finally:
            engine.close()
        stream = io.BytesIO()
        np.savez(stream, **kept)
        (folder / f"{name}.npz").write_bytes(stream.getvalue())
        (folder / f"{name}.json").write_text(json.dumps(record))
        if poisoned:  # This process has no CUDA left.
            os._exit(3)
        return {"load_s": load_s, "build_s": answer["build_s"], "probes": len(record["probes"])}

    workers.serve(measure)


def gpu() -> dict[str, Any]:
    """What the figures belong to."""
    import subprocess

    import tensorrt_rtx

    query = "--query-gpu=name,driver_version,compute_cap"
    said = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True)
    name, driver, capability = (part.strip() for part in said.stdout.splitlines()[0].split(","))
    return {"gpu": name, "driver": driver, "capability": capability, "tensorrt_rtx": tensorrt_rtx.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--skip", type=Path, help="the summary.json of a run whose engines need not be run again")
    parser.add_argument("--only", type=Path, help="a file with the names of the engines to run, one a line")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    machine = gpu()
    capability = [int(part) for part in machine["capability"].split(".")]
    done = set(json.loads(args.skip.read_text())["engines"]) if args.skip else set()
    only = set(args.only.read_text().split()) if args.only else None
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(args.models) as tar:
            tar.extractall(scratch, filter="data")
        folder = Path(scratch, "out")
        folder.mkdir()
        paths = {path.stem: path for path in Path(scratch).glob("*.onnx")}
        digests = json.loads(Path(scratch, "digests.json").read_text())
        names = sorted((name for name in paths if name not in done and (only is None or name in only)), key=priority)
        common = {"folder": str(folder), "capability": capability}
        tasks = [{"id": name, "model": str(paths[name]), "digests": digests[name], **common} for name in names]
        engines: dict[str, Any] = {}
        for answer in workers.run(
            Path(__file__), tasks, processes=args.processes, task_s=90, deadline=deadline, log=args.out / "worker.log"
        ):
            engines[answer.pop("id")] = answer
            if len(engines) % 40 == 0:
                left = deadline - time.monotonic()
                print(f"{len(engines)} of {len(names)} engines, {left:.0f} s left", flush=True)
        missing = [name for name in names if name not in engines]
        summary = {**machine, "engines": engines, "not_reached": missing}
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
        ran = sorted(path.stem for path in folder.glob("*.json"))
        for part in range(PARTS):
            with tarfile.open(args.out / f"results{part}.tar.xz", "w:xz", preset=3) as tar:
                for name in ran[part::PARTS]:
                    for path in (folder / f"{name}.json", folder / f"{name}.npz"):
                        tar.add(path, path.name)
    failed = [name for name, answer in engines.items() if "error" in answer]
    print(f"{len(engines) - len(failed)} ran, {len(failed)} failed, {len(missing)} not reached", flush=True)
    for name in failed[:60]:
        print(name, engines[name]["error"][:160].replace("\n", " "))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        main()
