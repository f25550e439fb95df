"""example_project, run as its user runs it: what it proves, and the faults that it must notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import LEFT_OUT

ROOT = Path(__file__).resolve().parent.parent
DIGITS = "tests/test_digits.py::"
no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")


@dataclass(frozen=True)
class Run:
    """What one run of the example's tests did."""

    code: int
    text: str
    checks: dict[str, dict[str, Any]]
    """The records by node id."""

    def verdicts(self) -> dict[str, str]:
        return {nodeid: str(check["verdict"]) for nodeid, check in self.checks.items()}


@dataclass(frozen=True)
class Project:
    path: Path

    def run(self, *arguments: str) -> Run:
        """Run pytest there, free of the variables that say how this very test is run."""
        report = self.path / "report.json"
        report.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                *(f"-pno:{name}" for name in LEFT_OUT),
                f"--trt-report={report}",
                *arguments,
            ],
            cwd=self.path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        checks = json.loads(report.read_text())["checks"] if report.exists() else []
        return Run(done.returncode, done.stdout, {check["nodeid"]: check for check in checks})


@pytest.fixture
def example(tmp_path: Path) -> Project:
    path = tmp_path / "example"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "report.json")
    shutil.copytree(ROOT / "example_project", path, ignore=ignored)
    return Project(path)


@no_gpu
def test_a_new_user_sees_passes_one_expected_failure_and_what_was_not_measured(example: Project) -> None:
    run = example.run()
    assert run.code == 0, run.text
    assert "9 passed, 1 xfailed" in run.text
    assert "latency not measured (1 check): no GPU" in run.text
    assert run.verdicts() == {
        f"{DIGITS}test_sixteen_bits[fp16]": "pass",
        f"{DIGITS}test_sixteen_bits[bf16]": "pass",
        f"{DIGITS}test_int8": "pass",
        f"{DIGITS}test_generated_inputs[batch1]": "pass",
        f"{DIGITS}test_generated_inputs[batch32]": "pass",
        f"{DIGITS}test_int8_latency": "pass",
        "tests/test_magika.py::test_fp16": "fail",
        "tests/test_magika.py::test_norm_in_fp32": "pass",
    }
    assert {check["evidence"] for check in run.checks.values()} == {"emulated"}
    assert run.checks[f"{DIGITS}test_int8_latency"]["latency"]["verdict"] == "not_measured"
    # 1.03 on uniform random bytes, on a GPU and emulated; real files are no better off.
    assert run.checks["tests/test_magika.py::test_fp16"]["parity"]["worst"] > 0.9


@no_gpu
@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_engines_are_built_for_a_gpu_that_is_elsewhere_and_only_once(example: Project, tmp_path: Path) -> None:
    arguments = "--trt-gpu=A100", f"--trt-cache-dir={tmp_path / 'cache'}"
    cold, warm = example.run(*arguments), example.run(*arguments)
    assert (cold.code, warm.code) == (0, 0), cold.text + warm.text
    for run in (cold, warm):
        assert {check["compiled_for"] for check in run.checks.values()} == {"A100"}
        assert {check["evidence"] for check in run.checks.values()} == {"emulated"}
    assert all(check["engine"]["bytes"] > 10_000 for check in cold.checks.values())
    assert not all(check["engine"]["cached"] for check in cold.checks.values())
    assert all(check["engine"]["cached"] for check in warm.checks.values())


def scale_calibration(project: Project) -> None:
    for path in (project.path / "data" / "calibration").glob("*.npz"):
        with np.load(path) as data:
            images = data["image"]
        np.savez(path, image=images * np.float32(0.02))


def shuffle_labels(project: Project) -> None:
    path = project.path / "data" / "held_out.npz"
    with np.load(path) as data:
        images, labels = data["images"], data["labels"]
    np.savez(path, images=images, labels=np.roll(labels, 1))


def cut_model_off(project: Project) -> None:
    path = project.path / "models" / "digits.onnx"
    path.write_bytes(path.read_bytes()[:100_000])


def test_bad_calibration_data_is_noticed(example: Project) -> None:
    scale_calibration(example)
    run = example.run("tests/test_digits.py", "tests/test_accuracy.py")
    assert run.code == 1
    failed = {nodeid for nodeid, verdict in run.verdicts().items() if verdict == "fail"}
    assert failed == {f"{DIGITS}test_int8", f"{DIGITS}test_int8_latency"}
    assert "INT8 labels" in run.text


def test_a_model_that_labels_wrongly_is_noticed(example: Project) -> None:
    shuffle_labels(example)
    run = example.run("tests/test_accuracy.py")
    assert run.code == 1
    assert "the FP32 model itself got worse" in run.text


def test_a_damaged_model_fails_its_own_tests_alone(example: Project) -> None:
    cut_model_off(example)
    run = example.run()
    assert run.code == 1
    assert {verdict for nodeid, verdict in run.verdicts().items() if nodeid.startswith(DIGITS)} == {"error"}
    assert run.verdicts()["tests/test_magika.py::test_norm_in_fp32"] == "pass"
    assert "digits.onnx" in run.checks[f"{DIGITS}test_int8"]["message"]
