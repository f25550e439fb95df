"""Two networks by every system that runs here, side by side, for a report.

    pytest benchmarks/gpu/test_systems.py --trt-layers --trt-report=REPORT.json

The verdicts are not the point: the table is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck import trt_latency, trt_parity

if TYPE_CHECKING:
    from torch import nn

torch = pytest.importorskip("torch", reason="needs PyTorch")
SYSTEMS = ["tensorrt", "tensorrt_rtx", "onnxruntime-cuda", "onnxruntime-tensorrt", "torch", "torch-compile"]
BATCH = 8


def resnet() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    network: nn.Module = torchvision.models.resnet50().eval()
    return network


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 6).eval()


NETWORKS = {"resnet50": (resnet, (BATCH, 3, 224, 224)), "encoder": (encoder, (BATCH, 128, 256))}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def trt_model(network: str) -> nn.Module:
    return NETWORKS[network][0]()


@trt_parity(precision=["tf32", "fp16"], backend=SYSTEMS, tol=0.5)
@trt_latency(p50_ms=1000, min_speedup={"torch": 0.01}, max_seconds=3)
def test_systems(network: str) -> Any:
    return torch.rand(NETWORKS[network][1], generator=torch.Generator().manual_seed(1))
