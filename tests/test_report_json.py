from __future__ import annotations

import importlib.metadata
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record import (
    BlameRecord,
    BudgetRecord,
    CheckRecord,
    EngineRecord,
    GpuRecord,
    JudgedRecord,
    LatencyRecord,
    Library,
    OutputRecord,
    ParityRecord,
    Verdict,
    jsonable,
)
from pytest_trtcheck.report.json_report import document, environment, read, save, version

if TYPE_CHECKING:
    from tests.conftest import Suite

SCHEMA = Path(__file__).parent.parent / "docs" / "report.schema.json"


def full_record(nodeid: str = "tests/test_a.py::test_a", verdict: Verdict = "fail") -> CheckRecord:
    """Every field filled, as a GPU run of a failing check fills it."""
    judged = JudgedRecord("max", math.inf, 0.05, "tol", "fail")
    boxes = OutputRecord(
        "boxes", "float32", (1, 4), math.inf, 0.1, math.inf, 1e-3, -3.0, 2, 0, (0, 3), "fail", (judged,)
    )
    classes = OutputRecord("classes", "int64", (1,), mismatches=1)
    return CheckRecord(
        nodeid=nodeid,
        model="models/detector.onnx",
        verdict=verdict,
        model_sha256="0" * 64,
        precision="int8",
        backend="tensorrt_rtx",
        evidence="engine",
        cases=3,
        seed=0,
        inputs="returned",
        parity=ParityRecord(
            "fail", "max", 0.05, math.inf, (boxes, classes), BlameRecord("precision", tensor="conv_3"), None, "tol"
        ),
        latency=LatencyRecord(
            "pass",
            None,
            "H200",
            5000,
            1.09,
            1.1,
            1.12,
            1.3,
            {"p50": (1.08, 1.1)},
            (BudgetRecord("pass", quantile="p50", limit_ms=1.5),),
            {"sm_mhz": 1980},
        ),
        engine=EngineRecord("ab12", False, "first build", 3.2, 51_000_000, 12_000_000, {"int8": 40, "fp32": 3}),
        duration_s=1.5,
        message="int8 fails",
        notes=("a note",),
    )


def bare_record(nodeid: str, verdict: Verdict) -> CheckRecord:
    return CheckRecord(nodeid, "models/a.onnx", verdict)


def validate(report: object) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="validating the report needs jsonschema")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(report)


GPU = GpuRecord("NVIDIA H200", "GPU-1", "9.0")
BARE_ENVIRONMENT = environment()


@pytest.mark.parametrize("gpu", [None, GPU])
def test_a_report_fits_its_schema(gpu: GpuRecord | None) -> None:
    records = [full_record(), bare_record("t.py::b", "error"), bare_record("t.py::c", "not_measured")]

    report = document(records, environment(gpu=gpu, requested_gpu="H200", driver="580.159.04"))

    validate(json.loads(json.dumps(jsonable(report), allow_nan=False)))


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        (("schema_version",), 2),
        (("environment", "gpu"), "H200"),
        (("checks", 0, "verdict"), "passed"),
        (("checks", 0, "evidence"), "gpu"),
        (("checks", 0, "parity", "worst"), "infinite"),
        (("checks", 0, "parity", "outputs", 0, "shape"), [1.5]),
        (("checks", 0, "latency", "bounds_ms", "p50"), [1.0]),
        (("summary", "fail"), -1),
    ],
)
def test_the_schema_rejects_what_is_wrong(where: tuple[str | int, ...], wrong: object) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="validating the report needs jsonschema")
    report = jsonable(document([full_record()], BARE_ENVIRONMENT))
    holder = report
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = wrong

    with pytest.raises(jsonschema.ValidationError):
        validate(report)


@pytest.mark.parametrize(
    "part", [(), ("environment",), ("checks", 0), ("checks", 0, "parity"), ("checks", 0, "latency")]
)
def test_the_schema_requires_every_key_of_the_contract(part: tuple[str | int, ...]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="validating the report needs jsonschema")
    contract = {
        (): {"schema_version", "tool", "environment", "checks", "summary"},
        ("environment",): {"python", "numpy", "onnxruntime", "tensorrt", "driver", "gpu", "requested_gpu"},
        ("checks", 0): {
            *("nodeid", "model", "model_sha256", "precision", "backend", "evidence", "compiled_for"),
            *("cases", "seed", "parity", "latency", "engine", "duration_s"),
        },
        ("checks", 0, "parity"): {"verdict", "metric", "tol", "worst", "outputs", "blame"},
        ("checks", 0, "latency"): {
            *("verdict", "reason", "gpu", "samples", "p50_ms", "p90_ms", "p95_ms", "p99_ms"),
            *("bounds_ms", "budgets", "clocks"),
        },
    }[part]
    for key in sorted(contract):
        report = jsonable(document([full_record()], BARE_ENVIRONMENT))
        holder = report
        for step in part:
            holder = holder[step]
        del holder[key]
        with pytest.raises(jsonschema.ValidationError, match=key):
            validate(report)


def test_checks_are_ordered_and_counted() -> None:
    records = [
        bare_record("t.py::x[b16]", "pass"),
        bare_record("t.py::x[b8]", "pass"),
        bare_record("t.py::a", "not_measured"),
        bare_record("t.py::b", "inconclusive"),
        bare_record("t.py::c", "fail"),
    ]

    report = document(records, BARE_ENVIRONMENT)

    assert [check.nodeid for check in report.checks] == ["t.py::a", "t.py::b", "t.py::c", "t.py::x[b8]", "t.py::x[b16]"]
    assert report.summary == {"pass": 2, "fail": 1, "error": 0, "inconclusive": 1, "not_measured": 1}
    assert document(records[::-1], BARE_ENVIRONMENT) == report


def test_no_number_is_lost_or_changed_on_the_way_to_the_file(tmp_path: Path) -> None:
    record = full_record()
    path = tmp_path / "made" / "on the way" / "report.json"

    save(path, document([record], BARE_ENVIRONMENT))

    assert read(path).checks == (record,)
    assert json.loads(path.read_text())["checks"][0]["parity"]["worst"] == "inf"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_report_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    old = path.stat().st_ino

    save(path, document([], BARE_ENVIRONMENT))

    assert read(path).checks == ()
    assert path.stat().st_ino != old, "whoever reads the old report now finds it half overwritten"
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_report_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    write_text = Path.write_text

    def half(self: Path, data: str, **how: str) -> int:
        write_text(self, data[: len(data) // 2], **how)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ReportError, match=r"report\.json: No space left on device"):
        save(path, document([], BARE_ENVIRONMENT))

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    link = tmp_path / "report.json"
    link.symlink_to(tmp_path / "data" / "report.json")

    save(link, document([], BARE_ENVIRONMENT))

    assert link.is_symlink()
    assert read(tmp_path / "data" / "report.json").checks == ()


def test_a_pipe_is_written_to() -> None:
    script = "from pytest_trtcheck.report.json_report import *; save('/dev/stdout', document([], Environment('3.12')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert json.loads(done.stdout)["environment"]["python"] == "3.12"


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/stdout is what POSIX systems have")
def test_what_stdout_is_redirected_to_is_neither_removed_nor_replaced(suite: Suite) -> None:
    suite.write(test_plain="def test_plain(): ...\n")
    log = suite.path / "log.txt"
    command = [sys.executable, "-m", "pytest", "-p", "no:asyncio", "--trt-report=/dev/stdout"]
    with log.open("ab") as stream:
        subprocess.run(command, stdout=stream, cwd=suite.path, check=True)

    assert '"schema_version": 1' in log.read_text()
    assert "1 passed" in log.read_text()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="memory that looks like a folder")
def test_a_report_in_shared_memory_replaces_the_old_one() -> None:
    with TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "report.json"
        for _ in range(2):
            save(path, document([], BARE_ENVIRONMENT))
        assert read(path).checks == ()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with a place in the file system")
def test_a_pipe_that_nobody_reads_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_trtcheck.record.files.ANSWER_S", 0.2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ReportError, match=r"cannot write the report .*pipe: nobody read from it within 0\.2 s"):
        save(pipe, document([], BARE_ENVIRONMENT))


@pytest.mark.parametrize("name", ["file/report.json", ".", "a" * 300])
def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("no directory")

    with pytest.raises(ReportError, match="cannot write the report"):
        save(tmp_path / name, document([], BARE_ENVIRONMENT))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("no json", "no JSON report"),
        ("[1]", "schema_version None"),
        ('{"schema_version": 9}', "9"),
    ],
)
def test_what_is_no_report_is_not_read_as_one(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)

    with pytest.raises(ReportError, match=said):
        read(path)


# --- environment -----------------------------------------------------------------------------------------------------


def test_the_environment_is_read_without_importing_libraries() -> None:
    script = (
        "import dataclasses, json, sys\n"
        "from pytest_trtcheck.report.json_report import environment\n"
        "found = environment()\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'jinja2'} & set(sys.modules)\n"
        "print(json.dumps([dataclasses.asdict(found), sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, heavy = json.loads(done.stdout)

    assert heavy == []
    import numpy as np

    assert found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_versions_are_those_of_the_modules() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    assert environment().onnxruntime == onnxruntime.__version__
    assert version("no_such_module") is None


def test_the_report_names_the_tool_that_wrote_it() -> None:
    try:
        installed = importlib.metadata.version("pytest-trtcheck")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the plugin is run from its source tree, which has no version")

    assert document([], BARE_ENVIRONMENT).tool == Library("pytest-trtcheck", version=installed)


def test_the_tensorrt_that_was_used_is_named() -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    found = environment(tensorrt_module="tensorrt_rtx").tensorrt

    assert found == Library(module="tensorrt_rtx", version=tensorrt_rtx.__version__)


def test_a_tensorrt_that_is_not_there_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_trtcheck.report.json_report.version", lambda _: None)

    assert environment().tensorrt is None


def test_the_gpu_is_named_in_full() -> None:
    found = jsonable(environment(gpu=GPU, driver="580", requested_gpu="H200"))

    assert found["gpu"] == {"name": "NVIDIA H200", "uuid": "GPU-1", "compute_capability": "9.0"}
    assert (found["driver"], found["requested_gpu"]) == ("580", "H200")
