"""`--trt-export` on a real GPU: what passed is written as it was checked, and what did not is not."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck.backends.tensorrt.module import find_module
from pytest_trtcheck.export import release, triton

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_trtcheck.gpu.device import Gpu
    from tests.conftest import Run, Suite

pytestmark = pytest.mark.gpu

TESTS = """
SHAPES = {"image": ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))}

@trt_latency(p50_ms=1000)
@trt_parity("conv.onnx", precision=["tf32", "fp16"], shapes=SHAPES)
def test_good(): ...

@trt_parity("conv.onnx", precision="bf16", batch=1)
def test_bf16_is_fine(): ...

@trt_parity("conv.onnx", precision="bf16", batch=1, tol=1e-9)
def test_bf16_is_not_that_exact(): ...

@trt_parity("gemm.onnx", precision="fp16")
def test_passes(): ...

def test_fails_afterwards(trt_check):
    trt_check("gemm.onnx", precision="fp16")
    assert False

@trt_latency(p50_ms=1000)
@trt_parity("gemm.onnx", precision="tf32", backend="onnxruntime")
def test_without_an_engine(): ...
"""


def test_only_what_passed_is_exported(suite: Suite, run_everywhere: Callable[..., Run], real_gpu: Gpu) -> None:
    suite.write(test_all=TESTS)
    run = run_everywhere("--trt-export=out", f"--trt-cache-dir={suite.path / 'cache'}")
    repository = suite.path / "out" / release.folder_name(real_gpu.product) / "model_repository"
    assert sorted(path.name for path in repository.iterdir()) == ["conv_fp16", "conv_tf32"]
    assert "exported 2 engines" in run.text
    assert "(conv.onnx bf16): fail" in run.text
    assert "(gemm.onnx fp16): the check passed, but the test was failed" in run.text
    typed = {
        path.name: json.loads((path / "manifest.json").read_text()) for path in (suite.path / "out/typed").iterdir()
    }
    assert {name: each["evidence"] for name, each in typed.items()} == {
        "conv_tf32": "engine",
        "conv_fp16": "engine",
        "gemm_tf32": "emulated",
    }
    released = json.loads((suite.path / "out/release.json").read_text())
    reasons = {
        (model["label"], each["precision"]): each["reason"] for model in released["models"] for each in model["missing"]
    }
    assert reasons["conv.onnx", "bf16"] == "fail"
    assert reasons["gemm.onnx", "fp16"] == "test failed"
    assert reasons["gemm.onnx", "tf32"] == "not run on a GPU"
    for precision in ("tf32", "fp16"):
        assert typed[f"conv_{precision}"]["judged"][0]["gpu"] == real_gpu.name
        folder = repository / f"conv_{precision}"
        check = run.check(f"test_good[{precision}]")
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        plan = (folder / "1/model.plan").read_bytes()
        assert manifest["engine"]["sha256"] == hashlib.sha256(plan).hexdigest() == check["engine"]["sha256"]
        assert manifest["gpu"]["name"] == real_gpu.name
        assert manifest["parity"][0]["worst"] == check["parity"]["worst"] > 0
        assert manifest["latency"][0]["p50_ms"] == check["latency"]["p50_ms"] > 0
        assert manifest["config"]["max_batch_size"] == 4
        _agrees_with_the_engine(folder / "1/model.plan", manifest)


def _agrees_with_the_engine(plan: Any, manifest: dict[str, Any]) -> None:
    """The plan loads, has the inputs and outputs that the manifest tells of, and runs every batch up to the largest."""
    from pytest_trtcheck.backends.tensorrt.engine import Engine

    engine = Engine(plan, find_module())
    try:
        for told, found in ((manifest["inputs"], engine.inputs), (manifest["outputs"], engine.outputs)):
            assert [(each["name"], each["dtype"], tuple(each["shape"])) for each in told] == [
                (spec.name, spec.dtype.name, spec.shape) for spec in found
            ]
            assert all(each["dtype"] in triton.DATA_TYPES for each in told)
        for batch in range(1, manifest["config"]["max_batch_size"] + 1):
            outputs = engine({"image": np.ones((batch, 3, 16, 16), np.float32)})
            assert outputs["logits"].shape == (batch, 10)
    finally:
        engine.close()
