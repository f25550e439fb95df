"""What the plugin does works where POSIX is not: a stand-in for Windows refuses what Windows refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_trtcheck.backends.tensorrt.module import available
from pytest_trtcheck.model import apart
from tests import onnx_models

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the stand-in looks into /proc"),
    pytest.mark.skipif(
        sys.version_info < (3, 11), reason="pathlib of Python 3.10 takes os's functions before the stand-in"
    ),
]

ROOT = Path(__file__).resolve().parent.parent

SUITE = """
import numpy as np
import pytest
from pytest_trtcheck import trt_parity

DATA = [{"image": np.random.default_rng(n).standard_normal((1, 3, 16, 16)).astype(np.float32)} for n in range(3)]

@trt_parity("conv.onnx", precision=["fp16", "int8"], calibration=DATA[1:])
def test_passes():
    return DATA[0]

@trt_parity("conv.onnx", precision="fp16", tol=1e-9, batch=1)
def test_fails_and_leaves_a_bundle(): ...
"""


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.windows_stand_in", "-p", "no:cacheprovider", "-rA"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRTCHECK_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_checks_engines_bundles_and_the_cache_do_without_posix(tmp_path: Path) -> None:
    onnx_models.save(onnx_models.conv_net(), tmp_path / "conv.onnx")
    (tmp_path / "test_suite.py").write_text(SUITE)
    first = run(tmp_path, "--trt-gpu=A100", "--trt-report=report.json", "--trt-bundle=bundles")
    assert "1 failed, 2 passed" in first, first
    assert "Windows would not" not in first
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["checks"]
    if available("tensorrt_rtx") is not None:
        assert "built for A100, not run: 2 engines" in first  # fp16 is one for both of its checks
    assert list((tmp_path / "bundles").iterdir())
    # From the cache, over the files that are there.
    again = run(tmp_path, "--trt-gpu=A100", "--trt-report=report.json", "--trt-bundle=bundles")
    assert "1 failed, 2 passed" in again, again
    assert "Windows would not" not in again
    cleared = run(tmp_path, "--trt-gpu=A100", "--trt-cache-clear")
    assert "1 failed, 2 passed" in cleared, cleared
    assert "Windows would not" not in cleared


# What the stand-in refuses, planted

OF_THE_PACKAGE = {"__name__": "pytest_trtcheck.cache.hashing"}
PLANTED = {
    f"exec('import os; os.killpg', {OF_THE_PACKAGE})": "module 'os' has no attribute 'killpg' on Windows",
    f"exec('import signal; signal.SIGKILL', {OF_THE_PACKAGE})": "module 'signal' has no attribute 'SIGKILL'",
    "f = (p / 'a').open('w'); (p / 'a').rename(p / 'b')": "Windows would not rename: it is in use",
    "f = (p / 'a').open('w'); (p / 'a').unlink()": "Windows would not delete: it is in use",
    "f = open(p / 'a', 'w'); (p / 'b').touch(); (p / 'b').replace(p / 'a')": "Windows would not replace: it is in use",
    "(p / 'd').mkdir(); f = (p / 'd' / 'a').open('w'); (p / 'd').rename(p / 'e')": "rename: it is in use",
    "f = np.save(p / 'a.npy', [1]); f = np.load(p / 'a.npy', 'r'); (p / 'a.npy').unlink()": "delete: it is in use",
    "(p / 'a').touch(); (p / 'b').touch(); (p / 'a').rename(p / 'b')": "Windows would not rename to what exists",
    "(p / 'a:b').touch()": "Windows would not take this name: 'a:b'",
    "(p / 'aux.txt').write_text('x')": "Windows would not take this name: 'aux.txt'",
}


def test_what_windows_refuses_is_seen(tmp_path: Path) -> None:
    tests = (f"def test_{n}(tmp_path):\n    p = tmp_path; {body}\n" for n, body in enumerate(PLANTED))
    (tmp_path / "test_it.py").write_text("import numpy as np\n" + "\n".join(tests))
    said = run(tmp_path)
    assert f"{len(PLANTED)} failed" in said
    assert [text for text in PLANTED.values() if text not in said] == []


def test_a_crash_is_one_by_its_status_on_windows_too() -> None:
    assert apart.ending(-9, "the process") == ("the process crashed (SIGKILL)", True)
    assert apart.ending(0xC0000005, "the process") == ("the process crashed (0xC0000005)", True)
    assert apart.ending(1, "the process") == ("the process ended with exit status 1", False)
