"""Pairs of precisions, 16-bit inputs and outputs, and `keep_fp32="auto"` on a real GPU.

By an encoder, of matrix products alone: TensorRT-RTX has no INT8 convolutions before 1.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests import onnx_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.conftest import Suite

pytestmark = pytest.mark.gpu

WIDTH, ROWS = 64, 16
PAIRS = ["int8+fp16", "int8+bf16", "fp8+fp16", "fp8+bf16"]


def encoder(blocks: int = 2, factor: float = 1.0) -> onnx.ModelProto:
    """Blocks of attention and a feed-forward net, and the root of a square behind them: x [2, 16, 64] → y.

    What is squared is enlarged by `factor` before.
    """
    nodes: list[onnx.NodeProto] = []
    values: dict[str, NDArray[np.float32]] = {
        "root_width": np.array(WIDTH**-0.5, np.float32),
        "factor": np.array(factor, np.float32),
    }

    def dense(name: str, source: str, inner: int, outer: int) -> str:
        values[f"{name}_w"] = onnx_models.weights((inner, outer), len(values), inner**-0.5)
        values[f"{name}_b"] = onnx_models.weights((outer,), len(values), 0.1)
        nodes.append(helper.make_node("MatMul", [source, f"{name}_w"], [f"{name}_m"], f"{name}_product"))
        nodes.append(helper.make_node("Add", [f"{name}_m", f"{name}_b"], [name], f"{name}_bias"))
        return name

    def normalized(name: str, source: str) -> str:
        values[f"{name}_s"] = np.ones(WIDTH, np.float32)
        nodes.append(helper.make_node("LayerNormalization", [source, f"{name}_s"], [name], name))
        return name

    def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    x = "x"
    for index in range(blocks):
        q, k, v = (dense(f"{letter}{index}", x, WIDTH, WIDTH) for letter in "qkv")
        scaled = add("Mul", [q, "root_width"], f"scaled{index}")
        scores = add("MatMul", [scaled, add("Transpose", [k], f"kt{index}", perm=[0, 2, 1])], f"scores{index}")
        attended = add("MatMul", [add("Softmax", [scores], f"softmax{index}", axis=-1), v], f"attended{index}")
        x = normalized(f"norm{index}", add("Add", [x, dense(f"o{index}", attended, WIDTH, WIDTH)], f"sum{index}"))
        hidden = add("Relu", [dense(f"up{index}", x, WIDTH, 2 * WIDTH)], f"relu{index}")
        x = add("Add", [x, dense(f"down{index}", hidden, 2 * WIDTH, WIDTH)], f"out{index}")
    large = add("Mul", [x, "factor"], "enlarge")
    root = add("Sqrt", [add("Mul", [large, large], "square")], "root")
    nodes.append(helper.make_node("Div", [root, "factor"], ["y"], "reduce"))
    shape = [2, ROWS, WIDTH]
    return onnx_models.model(nodes, {"x": (onnx_models.FLOAT, shape)}, {"y": (onnx_models.FLOAT, shape)}, values)


@pytest.fixture
def encoders(suite: Suite) -> Suite:
    onnx_models.save(encoder(), suite.path / "encoder.onnx")
    onnx_models.save(encoder(factor=3000.0), suite.path / "overflowing.onnx")
    (suite.path / "given.py").write_text(
        "import numpy as np\n"
        "def rows(count, seed=0):\n"
        "    rng = np.random.default_rng(seed)\n"
        f"    return [{{'x': rng.normal(size=(2, {ROWS}, {WIDTH})).astype(np.float32)}} for _ in range(count)]\n"
    )
    return suite


HEAD = "from given import rows\n"


def test_every_pair_runs_as_it_was_emulated(encoders: Suite) -> None:
    encoders.write(
        test_pairs=f"""{HEAD}
@pytest.mark.parametrize("pair", {PAIRS})
def test_pair(pair, trt_check, trt_build):
    given = dict(precision=pair, calibration=rows(8))
    tol = 0.05 if "int8" in pair else 0.15
    trt_check("encoder.onnx", rows(2, seed=9), tol=tol, **given)
    engine = trt_build("encoder.onnx", **given)
    emulated = trt_build("encoder.onnx", backend="emulated", **given)
    for case in rows(2, seed=9):
        y, e = engine(case)["y"], emulated(case)["y"]
        assert engine.evidence == "engine"
        # Steps of 8 bits: where one value in many rounds the other way, the two lie a step apart.
        assert np.abs(y - e).max() < tol * np.abs(e).max()
"""
    )
    run = encoders.run_apart()
    run.result.assert_outcomes(passed=len(PAIRS))
    for check in run.checks:
        quantized = check["precision"].partition("+")[0]
        assert check["evidence"] == "engine"
        assert check["engine"]["layers_by_precision"].get(quantized, 0) > 0, check["engine"]["layers_by_precision"]


def test_an_overflow_of_the_rest_is_there_on_the_gpu_too(encoders: Suite) -> None:
    encoders.write(
        test_overflow=f"""{HEAD}
@trt_parity("overflowing.onnx", precision=["int8", "int8+fp16"], calibration=rows(8))
def test_overflow():
    return rows(1, seed=9)

@trt_parity("overflowing.onnx", precision="int8+fp16", calibration=rows(8), keep_fp32="auto")
def test_auto():
    return rows(2, seed=9)
"""
    )
    run = encoders.run_apart()
    assert run.check("test_overflow[int8]")["verdict"] == "pass"
    failed = run.check("test_overflow[int8+fp16]")
    assert failed["verdict"] == "fail"
    assert "'square'" in failed["message"]
    kept = run.check("test_auto")
    assert (kept["verdict"], kept["evidence"]) == ("pass", "engine")
    assert set(kept["parity"]["keep_fp32"]) == {"square", "root"}


@pytest.mark.parametrize("precision", ["tf32", "fp16", "int8+fp16"])
def test_inputs_and_outputs_of_16_bits(encoders: Suite, precision: str) -> None:
    encoders.write(
        test_io=f"""{HEAD}
from pytest_trtcheck import BuildOptions

@pytest.fixture
def trt_build_options():
    return BuildOptions(io="fp16")

@trt_latency(p50_ms=1000.0)
@trt_parity("encoder.onnx", precision="{precision}", calibration=rows(8))
def test_io():
    return rows(2, seed=9)

@trt_parity("encoder.onnx", precision="{precision}", calibration=rows(8))
def test_overflow():
    return {{"x": np.full((2, {ROWS}, {WIDTH}), 1e5, np.float32) * np.linspace(0.5, 1, {WIDTH}, dtype=np.float32)}}
"""
    )
    run = encoders.run_apart()
    fine, ruined = run.check("test_io"), run.check("test_overflow")
    assert (fine["verdict"], fine["evidence"]) == ("pass", "engine")
    assert "inputs and outputs are fp16: x, y" in fine["notes"]
    assert fine["latency"]["p50_ms"] > 0
    assert ruined["verdict"] == "fail"
    assert any("in fp16 it is infinite" in note for note in ruined["notes"])
