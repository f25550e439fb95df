"""Normalization in pieces on a real GPU: what TensorRT makes of it, and Keras models whose export has it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pytest_trtcheck.backends.base import Machine
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Request
from pytest_trtcheck.model import layer_norm
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models
from tests.test_layer_norm import KERAS, model

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.gpu.device import Gpu
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu


def test_one_large_feature(tmp_path: Path, real_gpu: Gpu) -> None:
    """Squares beyond 65504 leave nothing of the pieces in FP16; the operator keeps them in FP32."""
    pieces, operator = model(KERAS, "n"), model(KERAS, "n")
    assert layer_norm.join(operator) == 1
    x = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)
    x[..., 2] = 1000
    worst = {}
    for name, proto in {"pieces": pieces, "operator": operator}.items():
        onnx_models.save(proto, tmp_path / f"{name}.onnx")
        checker = check.Checker(cache=Cache(tmp_path / "cache"), machine=Machine(detected=real_gpu))
        record = checker.check(
            Request("t", f"{name}.onnx", (tmp_path,), parity=ParitySpec(precision=("fp16",)), inputs=[{"x": x}])
        )
        assert record.evidence == "engine", record.message
        assert record.parity is not None
        worst[name] = record.parity.worst
    assert worst["operator"] is not None
    assert worst["operator"] < 0.01
    assert worst["pieces"] is None or worst["pieces"] > 0.1


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("tensorflow", "keras", "tf2onnx")),
    reason="needs TensorFlow, Keras and tf2onnx",
)
def test_engines_of_keras_models(suite: Suite) -> None:
    suite.write(
        test_it="""
from pytest_trtcheck import SOURCE
from tests.keras import networks

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 4)).astype("float32")

@trt_parity(networks.cnn, precision=["tf32", "fp16"], reference=SOURCE)
def test_cnn(): return IMAGES

@trt_parity(networks.transformer, precision=["tf32", "fp16"], reference=SOURCE)
def test_transformer(): return {"ids": np.arange(14, dtype="int32").reshape(2, 7)}
"""
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "-W", "ignore")
    run.result.assert_outcomes(passed=4)
    assert all(record["evidence"] == "engine" for record in run.checks)
