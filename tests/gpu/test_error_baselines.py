"""Errors against what three builds of an engine had on this GPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.test_error_baselines import SUITE, two_layers

if TYPE_CHECKING:
    from tests.conftest import Suite


def test_an_error_rises_beyond_the_spread_of_three_builds(suite: Suite) -> None:
    two_layers(suite.path / "fp32.onnx", 1.0)
    two_layers(suite.path / "checked.onnx", 1.001)
    suite.write(test_it=SUITE)
    cache, kept = f"--trt-cache-dir={suite.path / 'cache'}", "--trt-baseline=kept"
    recorded = suite.run_apart(cache, kept, "--trt-update-baseline", "--trt-rebuild=3")
    recorded.result.assert_outcomes(passed=3)
    (path,) = (suite.path / "kept").rglob("*.json")
    assert "-sm" in path.relative_to(suite.path / "kept").parts[0], "the GPU's folder, not that of emulated errors"
    document = json.loads(path.read_text())
    for entries in document["tests"].values():
        ((label, entry),) = entries.items()
        assert label.endswith(", engine")
        found = entry["errors"]
        assert all(len(values) == 3 for by_metric in found["values"].values() for values in by_metric.values())
        assert 1 <= found["engines"] <= 3
        assert {"driver", "onnxruntime"} < set(found["made_with"])
    # A build from nothing, and three of them, are what they were.
    fresh = f"--trt-cache-dir={suite.path / 'another'}"
    for asked in ((cache,), (fresh, "--trt-rebuild=3")):
        again = suite.run_apart(*asked, kept)
        again.result.assert_outcomes(passed=3)
        assert {record["baseline"]["verdict"] for record in again.checks} == {"pass"}
    two_layers(suite.path / "checked.onnx", 1.004)
    suite.run_apart(cache).result.assert_outcomes(passed=3)
    risen = suite.run_apart(cache, kept)
    risen.result.assert_outcomes(passed=2, failed=1)
    assert "rose from 0.00" in risen.text
    assert "(3 builds" in risen.text
