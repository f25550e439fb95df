"""The task's score of an engine that a GPU runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.test_score import BAD, HEAD, write_models

if TYPE_CHECKING:
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu


def test_an_engine_is_scored_beside_its_reference(suite: Suite) -> None:
    write_models(suite.path)
    suite.write(
        test_task=f"""{HEAD}
@trt_parity("good.onnx", score=top1, max_drop=0.01)
@trt_latency(p50_ms=1000)
def test_sound(): return (case for case in batches())

@trt_parity({BAD})
def test_flips_4_percent(): return batches(broken=80)

@trt_parity("good.onnx", precision="tf32", score=top1, max_drop=0.01, tol=5e-3)
def test_both(): return batches(1000)
"""
    )
    run = suite.run_apart("--trt-require-gpu", f"--trt-cache-dir={suite.path / 'cache'}", "--trt-export=out")
    run.result.assert_outcomes(passed=2, failed=1)
    for record in run.checks:
        assert record["evidence"] == "engine"
        assert record["gpu_ran"] is True
        assert record["score"]["reference"] == 1.0
    flips = run.check("test_flips_4_percent")["score"]
    assert (flips["verdict"], flips["value"], flips["disagreeing"]) == ("fail", 0.96, 80)
    sound = run.check("test_sound")
    assert (sound["verdict"], sound["score"]["value"], sound["parity"]) == ("pass", 1.0, None)
    assert sound["latency"]["verdict"] == "pass"
    assert run.check("test_both")["parity"]["verdict"] == "pass"
    assert list((suite.path / "out").rglob("good_fp16*"))
    assert not list((suite.path / "out").glob("bad*"))
