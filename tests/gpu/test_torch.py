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


BIG = """
import torch
from torch import nn
from pytest_trtcheck import SOURCE

torch.manual_seed(0)
layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
for _ in range(6):
    layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).train()
X = torch.rand(8, 3, 64, 64)
"""


def test_pytorch_itself_on_the_gpu(suite: Suite) -> None:
    suite.write(
        test_it=BIG
        + """
@trt_parity(network, precision=["fp32", "tf32", "fp16", "bf16"], backend="torch")
@trt_latency(p50_ms=1000)
def test_eager(): return X

@trt_parity(network, precision="fp16", backend="torch-compile")
@trt_latency(p50_ms=1000, build_s=600)
def test_compiled(): return X

@trt_parity(network.to("cuda"), precision="fp32", reference=SOURCE, backend="torch")
def test_on_the_gpu_already(): return X

def test_timed(trt_build, trt_benchmark):
    engine = trt_build(network, precision="fp16", shapes={"input": ((8, 3, 64, 64),) * 3}, backend="torch")
    trt_benchmark(engine, {"input": X})
"""
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "--trt-require-gpu")
    run.result.assert_outcomes(passed=7)
    errors = {}
    for name in ("fp32", "tf32", "fp16", "bf16"):
        check = run.check(f"test_eager[{name}]")
        assert (check["backend"], check["evidence"], check["gpu_ran"]) == ("torch", "provider", True)
        assert check["latency"]["details"]["measured"] == "GPU time"
        assert check["costs"]["memory_mib"] > 0
        errors[name] = check["parity"]["worst"]
    # TF32 is off in FP32, and on in TF32: the error says so.
    assert errors["fp32"] < 1e-5 < errors["tf32"]
    assert errors["fp16"] < errors["bf16"]
    compiled = run.check("test_compiled")
    assert compiled["costs"]["build_s"] > 0.1
    assert any("TF32 off" in note for note in run.check("test_eager[fp32]")["notes"])


def test_systems_side_by_side_and_faster_than_pytorch(suite: Suite) -> None:
    suite.write(
        test_it=BIG
        + """
@trt_parity(network, precision="fp16", backend=["auto", "torch", "torch-compile"])
def test_listed(): return X

@trt_parity(network, precision="fp16")
@trt_latency(min_speedup={"torch": 0.01, "torch-compile": 0.01}, max_seconds=60)
def test_faster(): return X

@trt_parity(network, precision="fp16")
@trt_latency(min_speedup={"torch": 1000})
def test_not_that_fast(): return X

class Off(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network

    @torch.compiler.disable
    def forward(self, x):
        return self.inner(x)

@trt_parity(Off(), precision="fp16")
@trt_latency(min_speedup={"torch-compile": 0.01})
def test_not_compiled(): return X

@trt_parity(network, precision="fp16", backend="torch")
@trt_latency(min_speedup={"fp32": 0.01, "torch": 2})
def test_itself(): return X
"""
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}")
    run.result.assert_outcomes(passed=6, failed=1)
    not_compiled = run.check("test_not_compiled")["latency"]
    assert not_compiled["verdict"] == "not_measured"
    assert "torch.compile compiled nothing" in not_compiled["reason"]
    (comparison,) = run.report["comparisons"]
    for row in comparison["systems"]:
        assert row["error"] < 1e-2
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["qps"] > 0
        assert row["memory_mib"] > 0
        assert row["load_ms"] > 0
    engine, eager, compiled = comparison["systems"]
    assert engine["engine_mib"] > 0
    assert engine["build_s"] > 0
    assert eager["engine_mib"] is eager["build_s"] is None
    assert compiled["build_s"] > 0
    itself = {each["name"]: each["verdict"] for each in run.check("test_itself")["latency"]["budgets"]}
    assert itself == {"min_speedup[fp32]": "pass", "min_speedup[torch]": "not_measured"}
