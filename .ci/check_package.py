"""Build the sdist and the wheel, install the wheel into a clean environment, and use the plugin from there.

What this catches and the test suite cannot: a module, `py.typed` or the entry point missing from the wheel, and a
dependency that only the development environment has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Written by hand to need nothing but what the wheel itself depends on. `y = (x * scale) / scale` is harmless in FP32;
# with scale = 60000 and x = 2 the product is beyond FP16's 65504, and a plugin that really emulates FP16 must fail it.
TEST = """
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck import trt_parity


def model(scale: float) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [1], [scale])
    multiply = helper.make_node("Mul", ["x", "factor"], ["product"])
    divide = helper.make_node("Div", ["product", "factor"], ["y"])
    graph = helper.make_graph([multiply, divide], "scale", [x], [y], [factor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@trt_parity(model(2.0), precision="fp16")
def test_harmless():
    return {"x": np.linspace(0.5, 1.0, 8, dtype=np.float32).reshape(2, 4)}


@trt_parity(model(60000.0), precision="fp16")
def test_overflow():
    return {"x": np.linspace(1.0, 2.0, 8, dtype=np.float32).reshape(2, 4)}
"""

INI = """
[pytest]
addopts = --strict-markers --strict-config
filterwarnings = error
"""


def run(*command: str | Path, cwd: Path = ROOT, expect: int = 0) -> str:
    """Run a command and give its output; end everything when it does not exit as expected."""
    print("$", *(str(part) for part in command), flush=True)
    # Neither this project's pytest options nor a developer's cache may decide what is seen here.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRTCHECK_", "PYTHONPATH"))}
    environment["TRTCHECK_CACHE_DIR"] = str(cwd / "trtcheck-cache")
    done = subprocess.run(
        command, check=False, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != expect:
        print(done.stdout)
        sys.exit(f"exit status {done.returncode}, expected {expect}")
    return done.stdout


def must(condition: bool, message: str) -> None:
    """End everything unless `condition` holds."""
    if not condition:
        sys.exit(message)


def main(work: Path) -> None:
    """Build, inspect, install and use, all below `work`."""
    dist, home = work / "dist", work / "project"
    for old in dist.glob("*"):
        old.unlink()
    home.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "build", "--outdir", dist)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "pytest_trtcheck").rglob("*.py")}
    must(not (missing := sources - set(names)), f"not in the wheel: {missing}")
    must("pytest_trtcheck/py.typed" in names, "py.typed is not in the wheel")
    strangers = [name for name in names if not re.match(r"pytest_trtcheck(-[^/]+\.dist-info)?/", name)]
    must(not strangers, f"the wheel holds what it should not: {strangers}")

    venv.create(work / "venv", with_pip=True, clear=True)
    python = work / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    run(python, "-m", "pip", "check")

    (home / "test_it.py").write_text(TEST)
    (home / "pytest.ini").write_text(INI)
    helped = [line for line in run(python, "-m", "pytest", "--help", cwd=home).splitlines() if "trt" in line]
    print(*helped, sep="\n")
    must(any("--trt-gpu" in line for line in helped), "pytest --help does not know the plugin")
    print(run(python, "-m", "pytest", "-k", "harmless", cwd=home))
    failed = run(python, "-m", "pytest", "-k", "overflow", cwd=home, expect=1)
    must("1 failed" in failed, f"the planted overflow did not fail its test:\n{failed}")
    explained = run(python, "-m", "pytest_trtcheck", "explain", "model-missing", cwd=home)
    must("Cause." in explained, "the wheel explains no error")
    print("the wheel works; the planted overflow failed its test, as it must")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
