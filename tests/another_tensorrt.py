"""An older TensorRT-RTX beside the one that is installed: engines of another release are made by another release."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Mapping

OLDER = "1.5.0.114"
VARIABLE = "TENSORRT_RTX_1_5"
"""Names a folder that has it already, as `pip install --target` makes one; otherwise it is fetched once."""

_BUILD = """
import sys
from pathlib import Path
from pytest_trtcheck.backends.tensorrt import build
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
module = find_module("tensorrt_rtx")
assert module.version == sys.argv[4], module.version
sm = int(sys.argv[3])
build.build(module, Path(sys.argv[1]), Path(sys.argv[2]), target=Target(divmod(sm, 10), here=False), precision="fp16")
"""


def folder(config: pytest.Config) -> Path:
    """Where TensorRT-RTX 1.5 lies, apart from everything else; the test is skipped where it can't be had."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    cache = getattr(config, "cache", None)
    if cache is None:
        pytest.skip(f"TensorRT-RTX {OLDER} is kept in pytest's cache, which is off; {VARIABLE} names a folder")
    place = Path(cache.mkdir(f"tensorrt-rtx-{OLDER}"))
    with FileLock(place / "lock"):
        if not (place / "done").exists():
            parts = [f"tensorrt-rtx-cu13{part}=={OLDER}" for part in ("", "-bindings", "-libs")]
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            done = subprocess.run([*pip, "--target", place, *parts], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"TensorRT-RTX {OLDER} can't be fetched: {done.stderr.strip().splitlines()[-1:]}")
            (place / "done").touch()
    return place


def environment(place: Path) -> Mapping[str, str]:
    """The environment of a process that finds that release before the installed one."""
    root = Path(__file__).resolve().parent.parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(root), os.environ.get("PYTHONPATH", "")])}


def build(place: Path, model: Path, plan: Path, sm: int) -> Path:
    """A plan that the older release builds."""
    command = [sys.executable, "-c", _BUILD, str(model), str(plan), str(sm), OLDER]
    subprocess.run(command, env=environment(place), check=True, timeout=300)
    return plan
