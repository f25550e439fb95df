"""`python -m pytest_trtcheck init`: what it writes runs, passes ruff, and nothing that exists is lost."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from pytest_trtcheck.__main__ import main
from tests import onnx_models
from tests.test_without_code import open_net

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Suite

TEST = "tests/test_inference.py"


def init(*arguments: str) -> int:
    return main(["init", *arguments])


def passes_ruff(folder: Path) -> None:
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *command, "--isolated", "--no-cache", str(folder)], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def project(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Models that are fixed, open, named with spaces, quantized to nothing, and cut off; data of one of them."""
    monkeypatch.chdir(suite.path)
    (suite.path / "gemm.onnx").unlink()
    for name in ("models", "my models", "data/calibration", ".venv/lib"):
        (suite.path / name).mkdir(parents=True)
    (suite.path / "conv.onnx").rename(suite.path / "models/conv.onnx")
    open_net(suite.path / "my models/größe 1.onnx", "images:0", ["N", 3, "H", "W"])
    open_net(suite.path / "models/model.onnx", "a rather long name of an input", ["N", "seq", 7])
    open_net(suite.path / ".venv/lib/other.onnx", "x", [1])
    (suite.path / "models/broken.onnx").write_bytes(b"junk")
    (suite.path / "models/pointer.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for index in range(3):
        image = np.random.default_rng(index).normal(size=(2, 3, 16, 16)).astype(np.float32)
        np.savez(suite.path / f"data/calibration/{index}.npz", image=image)
    return suite


def test_what_it_writes_is_green_and_formatted(project: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    assert init() == 0
    said = capsys.readouterr().out
    assert "3 models: models/conv.onnx, models/model.onnx, my models/größe 1.onnx" in said
    assert "passed over models/pointer.onnx: a pointer of Git LFS" in said
    assert "passed over models/broken.onnx: not an ONNX model" in said
    assert f"python -m pytest {TEST}" in said
    passes_ruff(project.path / "tests")
    run = project.run(TEST)
    assert {check["nodeid"].partition("::")[2]: check["precision"] for check in run.checks} == {
        "test_conv": "fp16",
        "test_conv_int8": "int8",
        "test_models_model": "fp16",
        "test_größe_1": "fp16",
    }
    assert run.check("test_conv")["verdict"] == run.check("test_conv_int8")["verdict"] == "pass"
    assert run.check("test_conv")["inputs"] == "returned"
    assert run.check("test_größe_1")["profile"]["images:0"][0] == [1, 3, 224, 224]
    assert run.check("test_models_model")["profile"] == {"a rather long name of an input": [[1, 128, 7]] * 3}


def test_what_is_commented_is_python_too(project: Suite) -> None:
    init()
    text = (project.path / TEST).read_text()
    (todo,) = [part for part in text.split("# Save each") if "images:0" in part.partition("\n")[0]]
    code = [line[2:] for line in todo.splitlines() if line.startswith("# ") and "np.savez" not in line]
    assert "test_größe_1_int8" in ast.dump(ast.parse("\n".join(code)))


def test_nothing_that_exists_is_written_over(project: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    (project.path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["checks"]\n')
    (project.path / "checks").mkdir()
    (project.path / "checks/conftest.py").write_text("mine = 1\n")
    init("--dry-run")
    assert "would write checks/test_inference.py" in capsys.readouterr().out
    assert not (project.path / "checks/test_inference.py").exists()
    init("--ci=none")
    assert "left alone  checks/conftest.py" in capsys.readouterr().out
    assert (project.path / "checks/conftest.py").read_text() == "mine = 1\n"
    assert not (project.path / "pytest.ini").exists()
    assert not (project.path / ".github").exists()
    init("--ci=none")
    assert "as it is    checks/test_inference.py" in capsys.readouterr().out
    (project.path / "checks/test_inference.py").write_text("mine = 2\n")
    init("--diff")
    shown = capsys.readouterr().out
    assert "-mine = 2" in shown
    assert "+name: inference" in shown
    assert (project.path / "checks/test_inference.py").read_text() == "mine = 2\n"
    init("--force")
    assert "trt_parity" in (project.path / "checks/test_inference.py").read_text()
    assert "BuildOptions" in (project.path / "checks/conftest.py").read_text()


@pytest.mark.parametrize(
    ("there", "ci", "path"),
    [
        ({}, [], ".github/workflows/inference.yml"),
        ({".gitlab-ci.yml": "stages: []"}, [], "inference.gitlab-ci.yml"),
        ({}, ["--ci=gitlab"], ".gitlab-ci.yml"),
        ({"Jenkinsfile": "pipeline {}"}, [], "Jenkinsfile.inference"),
        ({}, ["--ci=jenkins"], "Jenkinsfile"),
    ],
)
def test_the_workflow_is_the_projects_own(project: Suite, there: dict[str, str], ci: list[str], path: str) -> None:
    for name, text in there.items():
        (project.path / name).write_text(text)
    (project.path / "requirements.txt").write_text("")
    subprocess.run(["git", "init", "-q", "."], check=True)
    (project.path / ".gitignore").write_text("models/model.onnx\n")
    for _ in range(2):  # what it wrote itself is not somebody else's
        assert init(*ci) == 0
    text = (project.path / path).read_text()
    assert f"python -m pytest {TEST}" in text
    assert "pip install 'pytest-trtcheck[cpu,report]' -r requirements.txt" in text
    assert "# models/model.onnx: git ignores it. Fetch it here." in text
    if path.endswith(".yml"):
        job = yaml_of(text)
        shell = job["jobs"]["emulated"]["steps"][3]["run"] if "jobs" in job else job["inference"]["script"][1]
        done = subprocess.run(["sh", "-n"], input=shell, text=True, check=False)
        assert done.returncode == 0
        assert "test -e 'models/model.onnx' || {" in shell


def yaml_of(text: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_a_model_that_is_too_large_is_fetched_by_ci(project: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_trtcheck.init import look

    monkeypatch.setattr(look, "TOO_LARGE", 100)
    init()
    text = (project.path / ".github/workflows/inference.yml").read_text()
    assert "test -e 'models/conv.onnx' || {" in text
    assert "is too large to be committed" in text


def test_without_a_model_it_says_how_to_export_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert init() == 1
    said = capsys.readouterr().out
    assert "torch.onnx.export(" in said
    assert "options={'zipmap': False}" in said.replace('"', "'")
    assert list(tmp_path.iterdir()) == []
    assert init("no such folder") == 2


def test_a_quantized_model_is_checked_in_what_it_carries(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(suite.path)
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.left = iter([{"image": np.ones((1, 3, 16, 16), np.float32)}] * 2)

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(
        "conv.onnx",
        "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "QuantizeBias": False},
    )
    for name in ("conv.onnx", "gemm.onnx"):
        (suite.path / name).unlink()
    init("--ci=none")
    text = (suite.path / TEST).read_text()
    assert '@trt_parity("int8.onnx", precision="int8", batch=1)' in text
    assert "calibration" not in text


def test_what_the_templates_say_of_ruff_holds_of_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for index, name in enumerate(("x", "input_" * 4, "a" * 60, "q'\"uote", "ä" * 30)):
        proto = onnx_models.conv_net()
        proto.graph.input[0].name = proto.graph.node[0].input[0] = name
        proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
        onnx.save(proto, tmp_path / "models" / f"{name[:9].replace('/', '')} {index}{'-long' * index * 3}.onnx")
    assert init("--ci=none") == 0
    assert (tmp_path / TEST).read_text().count("\n@trt_parity(") == 5
    compile((tmp_path / TEST).read_text(), TEST, "exec")
    passes_ruff(tmp_path / "tests")


def test_no_name_in_a_model_becomes_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    proto = onnx_models.conv_net("N\nraise SystemExit\n#")
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "x\r\nraise SystemExit\n#\0"
    onnx.save(proto, tmp_path / "a.onnx")
    assert init("--ci=none") == 0
    text = (tmp_path / TEST).read_text()
    assert "raise SystemExit" in text  # in comments alone
    assert not any(isinstance(each, ast.Raise) for each in ast.walk(ast.parse(text)))


def test_calibration_data_is_found_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx_models.conv_net(), tmp_path / "a.onnx")
    (tmp_path / "calib \N{SLICE OF PIZZA}").mkdir()
    np.savez(tmp_path / "calib \N{SLICE OF PIZZA}" / "0.npz", image=np.ones((1, 3, 16, 16), np.float32))
    assert init("--ci=none") == 0
    assert 'calibration="calib \N{SLICE OF PIZZA}/*.npz"' in (tmp_path / TEST).read_text(encoding="utf-8")


def test_it_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_trtcheck", "init", str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")
