"""Real models in every precision on the GPU here, for a report: what emulation predicts and what an engine computes.

    python benchmarks/gpu/models.py MODELS
    MODELS=MODELS pytest benchmarks/gpu/test_evidence.py --trt-report=REPORT.json

Tolerances are loose: the report is the point. A precision that TensorRT can't build is an error in it, which says why.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_trtcheck import Tolerance, trt_latency, trt_parity

FOLDER = Path(os.environ.get("MODELS", "models"))
PRECISIONS = ["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
LOOSE = Tolerance(max=0.5, l2=0.5)
RNG = np.random.default_rng(0)


def packaged(package: str, *path: str) -> str:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return f"{package} is not installed"
    return str(Path(spec.submodule_search_locations[0], *path))


INPUTS: dict[str, Any] = {
    "resnet50": lambda: {"image": RNG.standard_normal((8, 3, 224, 224)).astype(np.float32)},
    "encoder": lambda: {"tokens": RNG.integers(0, 30522, (4, 128))},
    "magika": lambda: {"bytes": RNG.integers(0, 257, (4, 2048)).astype(np.int32)},
    "nudenet": lambda: {"images": RNG.random((1, 3, 320, 320), dtype=np.float32)},
}


@pytest.fixture
def trt_calibration(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    name = request.node.originalname.removeprefix("test_")
    return [INPUTS[name]() for _ in range(4)]


@trt_parity(str(FOLDER / "resnet50.onnx"), precision=PRECISIONS, tol=LOOSE)
@trt_latency(p50_ms=100.0, max_seconds=3)
def test_resnet50() -> Any:
    return INPUTS["resnet50"]()


@trt_parity(str(FOLDER / "encoder.onnx"), precision=PRECISIONS, tol=LOOSE)
@trt_latency(p50_ms=100.0, max_seconds=3)
def test_encoder() -> Any:
    return INPUTS["encoder"]()


@trt_parity(packaged("magika", "models", "standard_v3_3", "model.onnx"), precision=PRECISIONS, tol=LOOSE)
@trt_latency(p50_ms=100.0, max_seconds=3)
def test_magika() -> Any:
    return INPUTS["magika"]()


@trt_parity(packaged("nudenet", "320n.onnx"), precision=PRECISIONS, tol=LOOSE)
@trt_latency(p50_ms=100.0, max_seconds=3)
def test_nudenet() -> Any:
    return INPUTS["nudenet"]()
