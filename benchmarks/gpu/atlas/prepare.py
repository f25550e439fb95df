"""Lower every case by the plugin's own lowering, try to build its engine on this machine, and pack what TensorRT takes.

    python benchmarks/gpu/atlas/prepare.py FOLDER [--sm 90] [--processes 2] [--only GLOB] [--pack PACK]

FOLDER keeps <case>.<precision>.onnx, .plan and .json; what is there is not made again. What can't be lowered or built
says why in its .json. TensorRT-RTX alone builds without a GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import device  # type: ignore[import-not-found]  # beside this script
import numpy as np
import probes  # type: ignore[import-not-found]  # beside this script
import workers  # type: ignore[import-not-found]  # beside this script

CALIBRATION_SAMPLES = 4


def lowered(case: probes.Case, precision: str, target: Path, scratch: Path) -> dict[str, Any]:
    """Write the lowered model to `target`; its notes, or why there is none."""
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.model.sources import open_model
    from pytest_trtcheck.precision.lowering import lower

    cache = Cache(scratch)
    model = open_model(case.model, (), cache)
    calibration = None
    if precision in {"int8", "fp8"}:
        rng = np.random.default_rng(7)
        calibration = [case.values["ordinary"](rng, precision) for _ in range(CALIBRATION_SAMPLES)]
    made = lower(model, precision, cache, calibration=calibration)  # type: ignore[arg-type]
    shutil.copyfile(made.path, target)
    return {"notes": list(made.notes)}


def worker() -> None:
    import tensorrt_rtx

    from pytest_trtcheck.backends.tensorrt import builder as tensorrt_builder

    def build(task: workers.Task) -> workers.Task:
        heard: list[str] = []
        request = workers.request(task["model"], task["plan"], task["precision"], task["capability"])
        try:
            answer = tensorrt_builder.build_here(tensorrt_rtx, request, lambda s, t: heard.append(f"{s}: {t}"))
        except tensorrt_builder.RequestError as error:
            said = [text for text in heard if "ERROR" in text][:3]
            return {"stage": error.stage, "error": "; ".join([*error.errors, *said])[:1500]}
        return {"build_s": answer["build_s"], "version": tensorrt_rtx.__version__}

    workers.serve(build)


def prepare(folder: Path, capability: tuple[int, int], processes: int, only: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in probes.cases():
            for precision in case.precisions:
                name = f"{case.name}.{precision}"
                if not fnmatch.fnmatch(name, only) or (folder / f"{name}.json").exists():
                    continue
                path = folder / f"{name}.onnx"
                if not path.exists():
                    try:
                        lowered(case, precision, path, Path(scratch))
                    except Exception as error:
                        said = {"id": name, "stage": "lower", "error": f"{type(error).__name__}: {error}"[:1500]}
                        (folder / f"{name}.json").write_text(json.dumps(said))
                        continue
                plan = folder / f"{name}.plan"
                tasks.append(
                    {
                        "id": name,
                        "model": str(path),
                        "plan": str(plan),
                        "precision": precision,
                        "capability": capability,
                    }
                )
    print(f"{len(tasks)} engines to build", flush=True)
    for count, answer in enumerate(workers.run(Path(__file__), tasks, processes=processes, task_s=90), 1):
        (folder / f"{answer['id']}.json").write_text(json.dumps(answer))
        if "error" in answer:
            (folder / f"{answer['id']}.plan").unlink(missing_ok=True)
        if count % 50 == 0:
            print(count, answer["id"], answer["took_s"], flush=True)


def pack(folder: Path, target: Path) -> None:
    """The lowered models that build, in one archive, in the order of their names: alike stands beside alike."""
    digests: dict[str, dict[str, str]] = {}
    for case in probes.cases():
        for precision in case.precisions:
            name = f"{case.name}.{precision}"
            record = folder / f"{name}.json"
            refused = record.exists() and json.loads(record.read_text()).get("stage") in {"lower", "parse"}
            if (folder / f"{name}.onnx").exists() and not refused:
                digests[name] = {value: device.digest(case.inputs(value, precision)) for value in case.values}
    with (
        lzma.open(target, "wb", preset=6 | lzma.PRESET_EXTREME) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        files = {f"{name}.onnx": (folder / f"{name}.onnx").read_bytes() for name in sorted(digests)}
        for name, data in {**files, "digests.json": json.dumps(digests).encode()}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    print(target, target.stat().st_size / 2**20, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--pack", type=Path, metavar="FILE")
    args = parser.parse_args()
    prepare(args.folder, divmod(args.sm, 10), args.processes, args.only)
    if args.pack:
        pack(args.folder, args.pack)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        main()
