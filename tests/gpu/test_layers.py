"""What a real engine's inspector and profiler tell of its layers, and the upgrade gate over real reports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import helper

from pytest_trtcheck import __main__
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.layers import timed
from pytest_trtcheck.backends.tensorrt.module import Target, available
from pytest_trtcheck.backends.tensorrt.timing import TimedRun
from pytest_trtcheck.spec import BuildOptions
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx

    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.gpu.device import Gpu
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu

WIDTH, DEPTH = 4096, 6


def chain() -> onnx.ModelProto:
    """Matrix products and a Tanh behind each: long enough that events between them cost little."""
    nodes, last = [], "x"
    for n in range(DEPTH):
        nodes.append(helper.make_node("MatMul", [last, "w"], [f"p{n}"], name=f"matmul{n}"))
        last = "y" if n == DEPTH - 1 else f"t{n}"
        nodes.append(helper.make_node("Tanh", [f"p{n}"], [last], name=f"tanh{n}"))
    shape = [WIDTH, WIDTH]
    weights = {"w": onnx_models.weights((WIDTH, WIDTH)) / np.float32(WIDTH**0.5)}
    return onnx_models.model(nodes, {"x": (onnx_models.FLOAT, shape)}, {"y": (onnx_models.FLOAT, shape)}, weights)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.gpu.device import detect

    module, found = available(), detect().gpu
    if module is None or found is None:
        pytest.skip("needs a GPU and TensorRT")
    folder = tmp_path_factory.mktemp("chain")
    model = onnx_models.save(chain(), folder / "chain.onnx")
    target = Target(found.compute_capability, here=True)
    built = tensorrt.build(
        module, model, folder / "engine.plan", target=target, precision="fp32", options=BuildOptions(timeout_s=300)
    )
    made = Engine(built.path, module)
    yield made
    made.close()


def test_the_profiler_s_times_add_up_to_the_gpu_s(engine: Engine, real_gpu: Gpu) -> None:
    del real_gpu
    x = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    before = engine({"x": x})["y"]
    with TimedRun(engine, [{"x": x}], graph=False) as run:
        run.run(20)
        gpu_ms = float(np.median(run.run(50).run_ms))
    layers = timed(engine.layer_records(), engine.layer_times({"x": x}))
    times = {layer.name: layer.time_ms for layer in layers if layer.time_ms is not None}
    total = sum(times.values())
    print("\n".join(f"{layer.name[:60]:60} {layer.precision} {layer.time_ms} {layer.nodes[:4]}" for layer in layers))
    assert 0.85 < total / gpu_ms < 1.25, (total, gpu_ms)
    told = sum(layer.time_ms or 0.0 for layer in layers if layer.precision not in {None, "unknown"})
    assert told > 0.9 * total, "the profiler calls the layers as the inspector does"
    named = {node for layer in layers for node in layer.nodes}
    assert {f"matmul{n}" for n in range(DEPTH)} <= named
    assert all(layer.bounds_ms for layer in layers if layer.time_ms is not None)
    # It computes the same, and is for nothing that is measured any more.
    np.testing.assert_array_equal(engine({"x": x})["y"], before)
    with pytest.raises(RuntimeError, match="layers were timed"):
        TimedRun(engine, [{"x": x}])


LAYERED = """
@trt_parity("conv.onnx", precision="fp16", batch=64, shapes={"image": (64, 3, 16, 16)}, tol=0.1 PARITY)
@trt_latency(p50_ms=1000)
def test_conv(): ...
"""


def report(suite: Suite, name: str, parity: str = "", *options: str) -> Path:
    suite.write(test_layered=LAYERED.replace(" PARITY", parity))
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", *options)
    run.result.assert_outcomes(passed=1)
    path = suite.path / name
    path.write_text(json.dumps(run.report))
    return path


def test_a_check_that_measures_latency_tells_what_each_layer_takes(suite: Suite) -> None:
    (check,) = json.loads(report(suite, "old.json").read_text())["checks"]
    layers: list[dict[str, Any]] = check["engine"]["layers"]
    assert "layers_untimed" not in check["engine"], check["engine"]["layers_untimed"]
    assert len(layers) == sum(check["engine"]["layers_by_precision"].values())
    assert any(layer.get("time_ms", 0) > 0 for layer in layers)
    assert {"conv1", "conv2"} <= {node for layer in layers for node in layer.get("nodes", ())}


def test_layers_are_timed_without_a_budget_where_that_is_asked_for(suite: Suite) -> None:
    suite.write(test_conv='@trt_parity("conv.onnx", precision="fp16", batch=4)\ndef test_conv(): ...\n')
    without, timed = (suite.run_apart(*options).checks[0]["engine"]["layers"] for options in ((), ("--trt-layers",)))
    assert without
    assert not any("time_ms" in layer for layer in without)
    assert any("time_ms" in layer for layer in timed)


def test_two_runs_of_one_engine_pass_the_gate_and_a_node_in_fp32_fails_it(
    suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = report(suite, "old.json"), report(suite, "new.json")
    # The latency of a net of microseconds is another from process to process; here it is about the layers.
    status = __main__.main(["upgrade", "--slowdown=1", str(old), str(new)])
    assert status in {0, 3}, capsys.readouterr().out  # Nothing is worse; a short run may be too uncertain to tell.
    wide = report(suite, "wide.json", ', keep_fp32="conv2"')
    assert __main__.main(["upgrade", str(old), str(wide)]) == 1
    said = capsys.readouterr().out
    assert "from fp16 to fp32" in said
    assert "conv2" in said
