"""ONNX's own operator tests through the plugin: what passes, what TensorRT does not take, and what is ours to mend.

    python benchmarks/onnx_backend.py [--cases GLOB] [--workers N] [--work DIR] [--json FILE]

Every case of `onnx.backend.test` with tensor inputs, and its nine `light_*` models, is checked in fp16 and bf16 by
pytest itself, on the case's own inputs: once as TensorRT-RTX judges it (its parser where it is installed, without a
GPU), once with no TensorRT to be found, by the tables alone. Beside that, and apart from the plugin's own step, the
parser of TensorRT-RTX is asked about the lowered model of every check that passed.

Limits: with TensorRT-RTX judging, no pass that its parser refuses; by its table alone, at most 2 % of the passes; no
pass with nothing computed in the precision; no error with a traceback or a library's internal text. A second run with
the same `--work` takes up what the first one cached.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.model import graph
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision import families
from pytest_trtcheck.precision.lowering import lower

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PRECISIONS = ("fp16", "bf16")
MOST_BY_TABLE = 0.02
HALF_TYPES = {"FLOAT16", "BFLOAT16"}
OURS = re.compile(
    r"Traceback|\b(?:Key|Value|Type|Attribute|Index|Runtime|Assertion|NotImplemented|Inference|Validation)Error\b"
    r"|Numpy_type|/project/|version_converter"
)
"""What stands in no error that is fit for a user. TensorRT's own words, which are quoted as such, name .cpp files."""

TESTS = """
import json
from pathlib import Path

import onnx
import pytest

HERE = Path(__file__).parent
CASES = json.loads((HERE / "cases.json").read_text())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_case(case, precision, trt_check):
    folder = HERE / "inputs" / case
    inputs = {}
    for file in sorted(folder.glob("*.pb")) if folder.is_dir() else ():
        tensor = onnx.load_tensor(file)
        inputs[tensor.name] = onnx.numpy_helper.to_array(tensor)
    trt_check(HERE / "models" / f"{case}.onnx", inputs or None, precision=precision)
"""
HIDE = 'import sys\n\nsys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None\n'


def main() -> None:
    parser = argparse.ArgumentParser(description="ONNX's own operator tests through the plugin.")
    parser.add_argument("--cases", default="*", metavar="GLOB", help="which cases, by name")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="pytest-xdist's workers")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a folder that keeps the models and the cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        names = write_cases(work, arguments.cases)
        runs = {"no_tensorrt": checked(work, "no_tensorrt", arguments.workers, hide=True)}
        if find_spec("tensorrt_rtx") is not None:
            runs["tensorrt_rtx"] = checked(work, "tensorrt_rtx", arguments.workers, hide=False)
        report = {
            "benchmark": "onnx_backend",
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in ("onnx", "onnxruntime", "tensorrt_rtx")},
            "machine": platform.machine(),
            "cases": len(names),
            "limits": {"by_table": MOST_BY_TABLE},
            **summary(work, runs),
        }
    text = json.dumps(report, indent=1)
    print(json.dumps({name: value for name, value in report.items() if name != "verdicts"}, indent=1))
    if arguments.json:
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    sys.exit(not report["within_limits"])


def _version(name: str) -> str | None:
    return version(name) if find_spec(name) is not None else None


# --- the cases -------------------------------------------------------------------------------------------------------


def write_cases(work: Path, wanted: str) -> list[str]:
    """Models and inputs as files, with the test module beside them; the names of the cases."""
    (work / "models").mkdir(parents=True, exist_ok=True)
    names = []
    for name, proto, inputs in cases():
        if not fnmatch(name, wanted):
            continue
        names.append(name)
        path = work / "models" / f"{name}.onnx"
        if path.exists():
            continue
        folder = work / "inputs" / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, tensor in enumerate(inputs):
            onnx.save_tensor(tensor, folder / f"{index:02}.pb")
        onnx.save(proto, path)
    (work / "cases.json").write_text(json.dumps(names))
    (work / "test_cases.py").write_text(TESTS)
    (work / "pytest.ini").write_text("[pytest]\n")
    return names


def cases() -> Iterable[tuple[str, onnx.ModelProto, list[onnx.TensorProto]]]:
    """Every case whose inputs and outputs are tensors: name, model, inputs."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cases' own arithmetic
        found = [*load_model_tests(kind="node"), *load_model_tests(kind="light")]
    for case in found:
        proto = case.model or onnx.load(Path(case.model_dir or "", "model.onnx"))
        ends = [*proto.graph.input, *proto.graph.output]
        if all(value.type.HasField("tensor_type") for value in ends):
            yield case.name, proto, _inputs(proto, case.data_sets)


def _inputs(proto: onnx.ModelProto, data_sets: Any) -> list[onnx.TensorProto]:
    """The first data set; none where the plugin is to generate inputs, as for the large models."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in weights]
    if not data_sets:
        return []
    tensors = []
    for name, value in zip(names, data_sets[0][0], strict=False):
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value))
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = name
        tensors.append(copy)
    return tensors


# --- the runs --------------------------------------------------------------------------------------------------------


def checked(work: Path, name: str, workers: int, *, hide: bool) -> dict[tuple[str, str], dict[str, Any]]:
    """The check records of one run of pytest, by case and precision."""
    (work / "conftest.py").write_text(HIDE if hide else "")
    report = work / f"{name}.json"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "--no-header", "--no-summary"),
        *("-n", str(workers), "--dist", "worksteal", "--trt-diagnose=0"),
        *(f"--trt-cache-dir={work / 'cache'}", f"--trt-report={report}", "-c", "pytest.ini", "test_cases.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=work, env=environment, check=False, stdout=subprocess.DEVNULL)
    records = json.loads(report.read_text())["checks"]
    found = {}
    for record in records:
        match = re.search(r"\[(.+)-(fp16|bf16)\]$", record["nodeid"])
        assert match is not None, record["nodeid"]
        found[match[1], match[2]] = record
    return found


# --- what it comes to ------------------------------------------------------------------------------------------------


class Lowered:
    """The lowered model of a check, from the cache that the runs filled, and what the parser alone says of it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.cache = Cache(work / "cache")
        self._parsed: dict[Path, list[str]] = {}

    def path(self, case: str, precision: str) -> Path | None:
        """The file; None where the model is not lowered."""
        try:
            model = open_model(str(self.work / "models" / f"{case}.onnx"), (self.work,), self.cache)
            return lower(model, precision, self.cache).path  # type: ignore[arg-type]
        except CheckError:
            return None

    def computes(self, path: Path) -> bool:
        """Whether any node but a Cast takes or gives values of 16 bits."""
        nodes = [node for node in graph.all_nodes(graph.read(path).graph) if node.op_type != "Cast"]
        values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
        return any(value.dtype.name in HALF_TYPES for value in values if value.dtype)

    def refused_by_table(self, path: Path, family: families.Family) -> bool:
        """Whether the table of a family has anything against it."""
        return bool(families.findings(graph.read(path), family)[0])

    def parse(self, paths: Iterable[Path]) -> Mapping[Path, list[str]]:
        """What the parser of TensorRT-RTX says of each model, in one process, apart from the plugin's own step."""
        wanted = sorted(set(paths) - set(self._parsed))
        if wanted:
            lines = "".join(f"{path}\n" for path in wanted)
            command = [sys.executable, "-c", PARSE]
            done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
            answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
            self._parsed |= dict(zip(wanted, answers, strict=True))
        return self._parsed


PARSE = """
import json, os, sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
builder = trt.Builder(logger)
for line in sys.stdin.read().splitlines():
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parser.parse_from_file(line)
    said = [f"{e.node_operator()}: {e.desc()}" for e in map(parser.get_error, range(parser.num_errors))]
    print(json.dumps(said), flush=True)
    del parser, network
os._exit(0)
"""


def summary(work: Path, runs: Mapping[str, Mapping[tuple[str, str], dict[str, Any]]]) -> dict[str, Any]:
    lowered = Lowered(work)
    results: dict[str, Any] = {}
    ok = True
    for name, records in runs.items():
        passes = [key for key, record in records.items() if record["verdict"] == "pass"]
        paths = {key: path for key in passes if (path := lowered.path(*key)) is not None}
        idle = [key for key, path in paths.items() if not lowered.computes(path)]
        ours = {key: record["message"] for key, record in records.items() if OURS.search(record["message"] or "")}
        result: dict[str, Any] = {
            "verdicts": dict(collections.Counter(record["verdict"] for record in records.values())),
            "errors_by_kind": _kinds(records),
            "passes_with_nothing_computed": _shown(idle),
            "errors_that_are_ours": {"count": len(ours), "first": [_first(text) for text in list(ours.values())[:10]]},
        }
        ok = ok and not idle and not ours
        if "tensorrt_rtx" in runs:
            said = lowered.parse(paths.values())
            judges = [families.RTX] if name == "tensorrt_rtx" else list(families.FAMILIES)
            for family in judges:
                taken = [
                    key for key in paths if name == family.name or not lowered.refused_by_table(paths[key], family)
                ]
                refused = [key for key in taken if said[paths[key]]]
                entry = {"passes": len(taken), "refused_by_the_parser_of_rtx": _shown(refused)}
                result[f"judged_by_{family.name}" + ("" if name == family.name else "_table_alone")] = entry
                if family is families.RTX:
                    ok = ok and len(refused) <= (0 if name == family.name else MOST_BY_TABLE * len(taken))
        results[name] = result
    verdicts = {
        name: {f"{case} {precision}": record["verdict"] for (case, precision), record in sorted(records.items())}
        for name, records in runs.items()
    }
    return {"results": results, "within_limits": ok, "verdicts": verdicts}


def _kinds(records: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, int]:
    """What errors come to, by the part of their first lines that is no name of a case."""
    kinds: collections.Counter[str] = collections.Counter()
    for (case, _), record in records.items():
        if record["verdict"] == "error":
            kinds[_first(record["message"].replace(f"{case}.onnx", "…"))] += 1
    shown = dict(kinds.most_common(20))
    return shown | {"others": kinds.total() - sum(shown.values())}


def _first(message: str) -> str:
    line = re.sub(r"\S*/models/", "", message.splitlines()[0])
    return re.sub(r"'[^']*'|\b\d[\d,.]*\b", "…", line)[:120]


def _shown(keys: list[tuple[str, str]]) -> dict[str, Any]:
    return {"count": len(keys), "first": [" ".join(key) for key in sorted(keys)[:20]]}


if __name__ == "__main__":
    main()
