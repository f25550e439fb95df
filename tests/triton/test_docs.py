"""The example of docs/triton.md, as it stands there, against a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests import onnx_models
from tests.triton.conftest import two_heads

if TYPE_CHECKING:
    from tests.conftest import Suite
    from tests.triton.server import Server

PAGE = (Path(__file__).parents[2] / "docs" / "triton.md").read_text(encoding="utf-8")


def test_the_example_runs(suite: Suite, server: Server) -> None:
    onnx_models.save(two_heads(), suite.path / "detector.onnx")
    (code,) = re.findall(r'```python title="test_served.py"\n(.*?)```', PAGE, re.DOTALL)
    # Half as long as it may take: nothing is close to its limit.
    (suite.path / "test_served.py").write_text(code.replace("min_qps=1", "min_qps=1, max_seconds=2"))
    run = suite.run(f"--trt-triton-url={server.grpc}/heads")
    assert run.check("test_detector")["evidence"] == "server"
    assert run.check("test_detector")["parity"]["verdict"] == "pass", run.text
    assert {budget["name"] for budget in run.check("test_detector")["latency"]["budgets"]} == {
        "p50_ms",
        "p99_ms",
        "min_qps",
    }
