"""A backend of another package, each build of which computes something else: factors of the FP32 outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pytest

DRIFTING = """
import hashlib, os
import numpy as np
import onnxruntime
from pathlib import Path
from pytest_trtcheck.backends.base import Backend, Built
from pytest_trtcheck.errors import BuildError
from pytest_trtcheck.record import EngineRecord

BUILDS = Path(__file__).with_name("builds.txt")

class Session:
    def __init__(self, path, factor):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.factor = factor

    def __call__(self, inputs):
        names = [output.name for output in self.session.get_outputs()]
        return {n: (y * self.factor).astype(y.dtype) for n, y in zip(names, self.session.run(names, dict(inputs)))}

    def close(self):
        self.session = None

class Drifting(Backend):
    # Each build computes something else, as if its kernels had been chosen by another timing.
    name = title = "drifting"
    builds = True

    def build(self, spec, cache):
        number = len(BUILDS.read_text()) if BUILDS.exists() else 0
        BUILDS.write_text("x" * (number + 1))
        factors = os.environ["FACTORS"].split(",")
        factor = float(factors[min(number, len(factors) - 1)])  # A diagnosis builds more.
        if factor == 0:
            raise BuildError("no kernel was found")
        digest = hashlib.sha256(str(factor).encode()).hexdigest()
        record = EngineRecord("0" * 64, False, None, 1.0, 1000, sha256=digest)
        return Built(spec, (spec.lowered.path, factor), record)

    def load(self, built):
        return Session(*built.path)
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it known as `--trt-backend=drifting`."""
    site = folder / "site"
    about = site / "drifting-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "drifting.py").write_text(DRIFTING)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: drifting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pytest_trtcheck.backends]\ndrifting = drifting:Drifting\n")
    monkeypatch.syspath_prepend(site)


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, factors: Sequence[float]) -> None:
    """The factors of the builds to come."""
    (folder / "site/builds.txt").unlink(missing_ok=True)
    monkeypatch.setenv("FACTORS", ",".join(map(str, factors)))
