"""PyTorch modules on a real GPU: engines against the module itself, and modules that lie there."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Suite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (find_spec("torch") and find_spec("onnxscript")), reason="needs PyTorch and onnxscript"),
]


def test_engines_of_modules(suite: Suite) -> None:
    suite.write(
        test_it="""
import torch
from pytest_trtcheck import SOURCE
from tests.torch.networks import Blocks, Net

IDS = torch.arange(7)[None] % 5
on_gpu = Net().to("cuda" if torch.cuda.is_available() else "cpu")

@trt_parity(Blocks(), precision=["tf32", "fp16"], reference=SOURCE)
def test_good(): return {"ids": IDS}

@trt_parity(Blocks(wrong=3), reference=SOURCE)
def test_wrong(): return {"ids": IDS}

@trt_parity(on_gpu, batch=[1, 8], shapes={"x": ((1, 4), (8, 4), (8, 4))}, reference=SOURCE)
def test_of_the_gpu(): ...

def test_tensors(trt_build):
    x = torch.ones(3, 4, device=next(on_gpu.parameters()).device)
    engine = trt_build(on_gpu, shapes={"x": ((1, 4), (3, 4), (4, 4))})
    found = torch.from_numpy(engine({"x": x})["output"]).to(x.device)
    assert torch.allclose(found, on_gpu(x), atol=1e-2)
"""
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}")
    run.result.assert_outcomes(passed=5, failed=1)
    assert all(record["evidence"] == "engine" for record in run.checks)
    blame = run.check("test_wrong")["parity"]["blame"]
    assert (blame["step"], blame["culprit"]["module"]) == ("export", "blocks.3.mlp.fc1")
