"""What a GPU proved lets a job without one pass, and what changed since does not (docs/how-to/ci-github.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_trtcheck.gpu.device import Gpu
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu

CHECKS = """
@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=1024, tol={tol})
@trt_latency(p50_ms=1000, max_seconds=5)
def test_conv(): ...
"""


def test_evidence_of_this_gpu_passes_a_gate_that_runs_on_none(
    suite: Suite, real_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIDENCE_SECRET", "a secret of many bytes")
    suite.write(test_all=CHECKS.format(tol=0.03))
    signed = "--trt-evidence-key=EVIDENCE_SECRET"
    there = suite.run_apart("-q", "--trt-require-gpu", signed)
    assert {each["verdict"] for each in there.checks} == {"pass"}
    (suite.path / "report.json").rename(suite.path / "evidence.json")
    gate = (
        "-q",
        f"--trt-gpu={real_gpu.product}",
        "--trt-backend=onnxruntime",
        "--trt-require-evidence=evidence.json",
        signed,
    )
    here = suite.run_apart(*gate)
    assert [(each["verdict"], each["gpu_ran"]) for each in here.checks] == [("pass", False)] * 2, here.text
    assert all(each["proof"]["signed"] for each in here.checks)
    suite.write(test_all=CHECKS.format(tol=0.05))
    changed = suite.run_apart(*gate)
    assert changed.text.count("other tolerances") >= 2, changed.text
