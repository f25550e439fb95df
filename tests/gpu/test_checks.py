"""The plugin on a real GPU: engine evidence, latency verdicts, and the faults that must be caught."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests import onnx_models

if TYPE_CHECKING:
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu


@pytest.fixture
def fresh(suite: Suite) -> str:
    return f"--trt-cache-dir={suite.path / 'cache'}"


def test_parity_by_engine(suite: Suite, fresh: str) -> None:
    suite.write(
        test_conv="""
@trt_parity("conv.onnx", precision=["tf32", "fp16", "bf16"], batch=[1, 4])
def test_conv(): ...

@trt_parity("conv.onnx", precision="fp16", batch=1, tol=1e-9)
def test_too_strict(): ...
"""
    )
    run = suite.run_apart(fresh)
    run.result.assert_outcomes(passed=6, failed=1)
    for record in run.checks:
        assert record["evidence"] == "engine"
        assert record["engine"]["cached"] is False or "strict" in record["nodeid"]
        assert record["engine"]["device_memory_bytes"] > 0
    assert run.check("fp16-batch1]")["engine"]["layers_by_precision"]["fp16"] > 0
    assert run.check("bf16-batch4]")["engine"]["layers_by_precision"]["bf16"] > 0
    assert "on the GPU" in run.check("test_too_strict")["message"]
    again = suite.run_apart(fresh)
    assert all(record["engine"]["cached"] for record in again.checks)


def test_tf32_is_not_checked_where_the_environment_turns_it_off(
    suite: Suite, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", precision=["tf32", "fp32"], batch=1, tol=0.1)\ndef test_it(): ...\n')
    rounded = suite.run_apart(fresh).check("tf32]")["parity"]["worst"]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    run = suite.run_apart(fresh)
    assert "NVIDIA_TF32_OVERRIDE=0 turns TF32 off" in run.check("tf32]")["message"]
    exact = run.check("fp32]")
    assert (exact["verdict"], exact["precision"]) == ("pass", "fp32")
    assert exact["parity"]["worst"] < rounded / 5
    assert exact["engine"]["cached"] is False, "the kernels of the other environment are not its own"


def test_by_hand_with_any_shape(suite: Suite, fresh: str) -> None:
    suite.write(
        test_hand="""
def test_by_hand(trt_build, trt_reference, trt_gpu):
    engine = trt_build("conv.onnx", precision="fp16")
    assert engine.evidence == "engine"
    assert trt_gpu is not None
    for batch in (1, 3):
        image = np.random.default_rng(0).random((batch, 3, 16, 16), dtype=np.float32)
        y = engine({"image": image})["logits"]
        r = trt_reference("conv.onnx")({"image": image})["logits"]
        assert 0 < np.abs(y - r).max() < 0.01
"""
    )
    suite.run_apart(fresh).result.assert_outcomes(passed=1)


def test_a_declared_gpu_that_is_not_there_is_a_session_error(suite: Suite) -> None:
    suite.write(test_plain="def test_plain(): ...\n")
    run = suite.run_apart("--trt-gpu=T4")
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "T4" in run.text
    assert "in this machine is" in run.text


def test_latency_budgets(suite: Suite, fresh: str) -> None:
    suite.write(
        test_latency="""
@trt_latency(p50_ms={"default": 1000.0}, min_qps=1.0, memory_mib=100000)
@trt_parity("conv.onnx", batch=8)
def test_generous(): ...

@trt_latency(p99_ms=1000.0)
@trt_parity("conv.onnx", batch=8)
def test_tail(): ...

@trt_latency(p50_ms=1e-5)
@trt_parity("conv.onnx", batch=8)
def test_impossible(): ...

@trt_latency(p50_ms={"T4": 1.0})
@trt_parity("conv.onnx", batch=8)
def test_no_budget_here(): ...

@trt_latency(p50_ms=1000.0, transfers=True)
@trt_parity("conv.onnx", batch=8)
def test_transfers(): ...

@trt_latency(memory_mib=1e-6)
@trt_parity("conv.onnx", batch=8)
def test_memory(): ...

@trt_latency(min_speedup={"tf32": 0.01})
@trt_parity("conv.onnx", batch=8)
def test_speedup(): ...

@trt_latency(min_speedup={"tf32": {"default": 1000.0}})
@trt_parity("conv.onnx", batch=8)
def test_no_speedup(): ...

@trt_latency(min_speedup={"torch": 0.01})
@trt_parity("conv.onnx", batch=8)
def test_no_pytorch_model(): ...

@trt_latency(load_ms=60_000, build_s=3600)
@trt_parity("conv.onnx", batch=8)
def test_loading(): ...

@trt_latency(load_ms=1e-3)
@trt_parity("conv.onnx", batch=8)
def test_slow_loading(): ...

@trt_latency(build_s=1e-3)
@trt_parity("conv.onnx", batch=8)
def test_slow_build(): ...

@trt_latency(p50_ms=1000.0, min_qps=1.0, memory_mib=100000, instances=3)
@trt_parity("conv.onnx", batch=8)
def test_three(): ...
"""
    )
    run = suite.run_apart(fresh)
    verdicts = {record["nodeid"].partition("::")[2]: record["latency"]["verdict"] for record in run.checks}
    # On a shared host the runs of a 15 µs engine may depend on each other for so long that nothing tells of its tail.
    tail = verdicts.pop("test_tail")
    assert tail in {"pass", "inconclusive"}
    run.result.assert_outcomes(passed=7 + (tail == "pass"), failed=5 + (tail != "pass"))
    assert verdicts == {
        "test_generous": "pass",
        "test_impossible": "fail",
        "test_no_budget_here": "not_measured",
        "test_transfers": "pass",
        "test_memory": "fail",
        "test_speedup": "pass",
        "test_no_speedup": "fail",
        "test_no_pytorch_model": "not_measured",
        "test_loading": "pass",
        "test_slow_loading": "fail",
        "test_slow_build": "fail",
        "test_three": "pass",
    }
    three = run.check("test_three")
    assert three["latency"]["details"]["instances"] == 3
    assert three["latency"]["details"]["measured"] == "GPU time, 3 instances at once"
    assert three["costs"]["memory_mib"] >= run.check("test_generous")["costs"]["memory_mib"]
    loading = run.check("test_loading")
    assert loading["costs"]["build_s"] == loading["engine"]["build_s"] > 0
    assert len(loading["latency"]["details"]["load_samples_ms"]) >= 15
    generous = run.check("test_generous")["latency"]
    assert generous["samples"] >= 50
    assert generous["p50_ms"] <= generous["p99_ms"]
    assert {budget["verdict"] for budget in generous["budgets"]} == {"pass"}


def test_magika_is_ruined_by_fp16_on_the_gpu_too(suite: Suite, fresh: str) -> None:
    suite.write(
        test_real=f"""
@trt_parity({str(onnx_models.magika())!r}, precision=["fp16", "bf16"], batch=1)
def test_magika():
    return np.random.default_rng(0).integers(0, 257, (1, 2048)).astype(np.int32)
"""
    )
    run = suite.run_apart(fresh)
    run.result.assert_outcomes(passed=1, failed=1)
    assert np.isclose(run.check("[fp16]")["parity"]["outputs"][0]["l2"], 1.03, atol=0.02)


def test_baselines(suite: Suite, fresh: str) -> None:
    # Long enough that the times do not tell of a shared host.
    suite.write(
        test_latency="""
@trt_latency()
@trt_parity("conv.onnx", batch=1024)
def test_plain(): ...

@trt_latency(p50_ms=1000.0)
@trt_parity("conv.onnx", batch=1024)
def test_budget(): ...
"""
    )
    kept = suite.path / "kept"
    recorded = suite.run_apart(fresh, "--trt-baseline=kept", "--trt-update-baseline")
    recorded.result.assert_outcomes(passed=2)
    assert "4 baselines recorded in 1 file" in recorded.text
    (path,) = kept.rglob("*.json")
    again = suite.run_apart(fresh, "--trt-baseline=kept")
    again.result.assert_outcomes(passed=2)
    for record in again.checks:
        assert record["latency"]["budgets"][-1]["name"] == "baseline"
        assert record["latency"]["budgets"][-1]["verdict"] == "pass"
        assert record["latency"]["details"]["conditions"]["input_shapes"] == {"image": [1024, 3, 16, 16]}
    # A baseline that was faster than the engine can be: every figure is halved.
    document = json.loads(path.read_text())
    for entries in document["tests"].values():
        (entry,) = entries.values()
        distribution = entry["latency"]["distribution"]
        distribution["quantiles_ms"] = {q: value / 2 for q, value in distribution["quantiles_ms"].items()}
        distribution["bounds_ms"] = {q: [low / 2, high / 2] for q, (low, high) in distribution["bounds_ms"].items()}
    path.write_text(json.dumps(document))
    slower = suite.run_apart(fresh, "--trt-baseline=kept")
    slower.result.assert_outcomes(failed=2)
    assert "against the baseline" in slower.text


def test_benchmarks_tell_gpu_time(suite: Suite, fresh: str) -> None:
    suite.write(
        test_speed="""
IMAGE = {"image": np.zeros((8, 3, 16, 16), np.float32)}

@pytest.mark.benchmark(group="conv")
def test_speed(trt_build, trt_benchmark):
    outputs = trt_benchmark(trt_build("conv.onnx", precision="fp16"), IMAGE)
    assert outputs["logits"].shape == (8, 10)
    assert trt_benchmark.extra_info["cuda_graph"]

def test_without_a_graph(trt_build, trt_benchmark):
    trt_benchmark(trt_build("conv.onnx", precision="fp16"), IMAGE, graph=False)
    assert 1e-6 < trt_benchmark.stats["mean"] < 1

def test_pedantic(trt_build, trt_benchmark):
    trt_benchmark.pedantic(trt_build("conv.onnx", precision="fp16"), IMAGE, rounds=7, iterations=3)

def test_no_engine(trt_benchmark):
    trt_benchmark(lambda: None, IMAGE)
"""
    )
    run = suite.run_apart(
        fresh, "--benchmark-json=speed.json", "--benchmark-min-time=0.001", "--benchmark-max-time=0.3"
    )
    run.result.assert_outcomes(passed=3, failed=1)
    assert "expected an engine, got a function" in run.said
    found = {each["name"]: each for each in json.loads((suite.path / "speed.json").read_text())["benchmarks"]}
    assert found["test_speed"]["group"] == "conv"
    assert "gpu_time" in found["test_speed"]["options"]["timer"]
    assert found["test_pedantic"]["stats"]["rounds"] == 7
    assert 1e-6 < found["test_speed"]["stats"]["median"] < found["test_without_a_graph"]["stats"]["median"] * 2


def test_a_failed_check_is_blamed_and_bundled(suite: Suite, fresh: str) -> None:
    suite.write(
        test_real=f"""
@trt_parity({str(onnx_models.magika())!r}, precision="fp16", batch=1)
def test_magika():
    return np.random.default_rng(0).integers(0, 257, (1, 2048)).astype(np.int32)
"""
    )
    run = suite.run_apart(fresh, "--trt-bundle=bundles", "--trt-html=report.html")
    run.result.assert_outcomes(failed=1)
    blame = run.check("test_magika")["parity"]["blame"]
    assert blame["step"] == "precision"
    assert "LayerNorm_1/Sum_1" in blame["culprit"]["node"]
    assert blame["keep_fp32"]
    assert run.check("test_magika")["parity"]["outputs"][0]["details"]["emulated"]["max"] > 0.5
    (bundle,) = (suite.path / "bundles").glob("*/bundle.json")
    replayed = suite.run_apart(str(bundle))
    replayed.result.assert_outcomes(failed=1)
    assert "the outputs are the same" in replayed.text or "outputs" in " ".join(replayed.checks[0]["notes"])
