"""ONNX Runtime's GPU providers on a real GPU, with onnxruntime-gpu in onnxruntime's place; faults planted."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from pytest_trtcheck.backends.onnxruntime import installed
from tests import onnx_models
from tests.providers import models

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Suite

pytestmark = pytest.mark.gpu


def _missing(provider: str, library: str) -> str:
    """Why a provider does not run here; empty where it does."""
    if provider not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} has no {provider}"
    return installed.library(library).error


@pytest.fixture
def cuda(suite: Suite) -> Suite:
    if why := _missing("CUDAExecutionProvider", "onnxruntime_providers_cuda"):
        pytest.skip(f"needs onnxruntime-gpu and its CUDA: {why}")
    for name in ("reshaped", "divided", "products"):
        onnx_models.save(getattr(models, name)(), suite.path / f"{name}.onnx")
    return suite


@pytest.fixture
def tensorrt(cuda: Suite) -> Suite:
    if why := _missing("TensorrtExecutionProvider", "onnxruntime_providers_tensorrt"):
        pytest.skip(f"needs TensorRT 10: {why}")
    return cuda


@pytest.fixture
def fresh(suite: Suite) -> str:
    return f"--trt-cache-dir={suite.path / 'cache'}"


# --- CUDA ------------------------------------------------------------------------------------------------------------


def test_tf32_is_off_unless_it_is_asked_for(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
@trt_parity("products.onnx", precision=["fp32", "tf32"], batch=64, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh, "--trt-require-gpu")
    run.result.assert_outcomes(passed=2)
    exact, rounded = (run.check(f"[{name}]")["parity"]["worst"] for name in ("fp32", "tf32"))
    assert exact < 5e-6
    assert 5e-5 < rounded < 5e-3
    for record in run.checks:
        assert (record["evidence"], record["gpu_ran"]) == ("provider", True)
        assert record["partition"]["elsewhere"] == []
        assert record["precision"] in {"fp32", "tf32"}


def test_fp32_with_tf32_allowed_is_as_far_off_as_tf32(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
from pytest_trtcheck.spec import BuildOptions

@pytest.fixture
def trt_build_options():
    return BuildOptions(tf32=True)

@trt_parity("products.onnx", precision="fp32", batch=64, backend="onnxruntime-cuda", tol=1e-5)
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh)
    run.result.assert_outcomes(failed=1)
    assert run.checks[0]["parity"]["worst"] > 5e-5


@pytest.mark.parametrize(("precision", "least"), [("fp16", 1e-5), ("bf16", 1e-4)])
def test_sixteen_bits_are_computed_by_kernels_of_that_type(
    cuda: Suite, fresh: str, precision: str, least: float
) -> None:
    cuda.write(
        test_it=f"""
@trt_parity("products.onnx", precision="{precision}", batch=64, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh, "--trt-require-gpu")
    run.result.assert_outcomes(passed=1)
    (record,) = run.checks
    assert record["partition"]["kernels"][precision] >= 3
    # Far from FP32, and near to what the emulation expects of that precision.
    assert record["parity"]["worst"] > least


def test_a_convolution_in_fp16_with_16_bit_inputs(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
from pytest_trtcheck.spec import BuildOptions

@pytest.fixture
def trt_build_options():
    return BuildOptions(io="fp16")

@trt_parity("conv.onnx", precision="fp16", batch=4, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh)
    run.result.assert_outcomes(passed=1)


def test_nodes_of_shapes_on_the_cpu_are_counted_and_not_blamed(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
@trt_parity("reshaped.onnx", precision=["fp32", "fp16"], batch=4, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh)
    run.result.assert_outcomes(passed=2)
    for record in run.checks:
        assert record["partition"]["shapes_on_cpu"] > 0
        assert record["partition"]["elsewhere"] == []


def test_a_node_that_falls_back_fails_though_every_number_is_right(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
@trt_parity("divided.onnx", precision="fp32", batch=4, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh)
    run.result.assert_outcomes(failed=1)
    (record,) = run.checks
    assert "2 nodes fell back" in record["message"]
    assert "hardest (Hardmax, CPUExecutionProvider)" in record["message"]
    assert record["parity"]["worst"] < 1e-4


def test_a_wrong_weight_is_caught(cuda: Suite, fresh: str) -> None:
    onnx_models.save(models.products(scale=1.05), cuda.path / "wrong.onnx")
    cuda.write(
        test_it="""
@trt_parity("wrong.onnx", precision=["fp32", "fp16"], reference="products.onnx", batch=4, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh)
    run.result.assert_outcomes(failed=2)
    for record in run.checks:
        assert record["parity"]["worst"] == pytest.approx(0.05, rel=0.2)


def test_int8_is_refused_there(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
samples = [{"x": np.ones((4, 512), np.float32)}]

@trt_parity("products.onnx", precision="int8", calibration=samples, batch=4, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh)
    run.result.assert_outcomes(failed=1)
    assert "it has no INT8 kernels" in run.checks[0]["message"]


def test_by_hand_with_any_shape(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_hand="""
def test_by_hand(trt_build, trt_reference):
    engine = trt_build("products.onnx", precision="fp16", backend="onnxruntime-cuda")
    assert engine.evidence == "provider"
    for batch in (1, 3):
        x = np.random.default_rng(0).random((batch, 512), dtype=np.float32)
        y, r = engine({"x": x})["y"], trt_reference("products.onnx")({"x": x})["y"]
        assert 0 < np.abs(y - r).max() < 0.01 * np.abs(r).max()
"""
    )
    cuda.run_apart(fresh).result.assert_outcomes(passed=1)


def test_latency_budgets(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
@trt_latency(p50_ms=1000.0, min_qps=1.0, min_speedup={"fp32": 0.01})
@trt_parity("products.onnx", batch=64, backend="onnxruntime-cuda")
def test_generous(): ...

@trt_latency(p50_ms=1e-5)
@trt_parity("products.onnx", batch=64, backend="onnxruntime-cuda")
def test_impossible(): ...

@trt_latency(p50_ms=1000.0, transfers=True)
@trt_parity("products.onnx", batch=64, backend="onnxruntime-cuda")
def test_transfers(): ...

@trt_latency(memory_mib=1e6)
@trt_parity("products.onnx", batch=64, backend="onnxruntime-cuda")
def test_memory(): ...
"""
    )
    run = cuda.run_apart(fresh)
    verdicts = {record["nodeid"].partition("::")[2]: record["latency"]["verdict"] for record in run.checks}
    assert verdicts == {
        "test_generous": "pass",
        "test_impossible": "fail",
        "test_transfers": "pass",
        "test_memory": "not_measured",
    }
    measured = run.check("test_generous")["latency"]["details"]["measured"]
    assert measured == "host time of a run until the GPU has finished, inputs and outputs on the GPU"


def test_what_is_measured_is_a_bare_loop(cuda: Suite, fresh: str) -> None:
    cuda.write(
        test_it="""
@trt_latency(p50_ms=1000.0)
@trt_parity("products.onnx", precision="fp32", batch=64, backend="onnxruntime-cuda")
def test_it(): ...
"""
    )
    run = cuda.run_apart(fresh)
    run.result.assert_outcomes(passed=1)
    installed.preload(onnxruntime)
    session = onnxruntime.InferenceSession(
        str(cuda.path / "products.onnx"), providers=[("CUDAExecutionProvider", {"use_tf32": "0"})]
    )
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((64, 512), np.float32), "cuda", 0)
    binding.bind_ortvalue_input("x", value)
    binding.bind_output("y", "cuda", 0)
    took = []
    for _ in range(2000):
        began = time.perf_counter()
        session.run_with_iobinding(binding)
        took.append(1000 * (time.perf_counter() - began))
    ratio = run.checks[0]["latency"]["p50_ms"] / statistics.median(took[200:])
    # Two processes, one after the other, on a host that others use.
    assert 0.5 < ratio < 2


# --- TensorRT --------------------------------------------------------------------------------------------------------


def _files(suite: Suite) -> dict[Path, int]:
    folder = suite.path / "cache"
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.engine")}


def test_tensorrt_builds_once_and_proves_the_precision(tensorrt: Suite, fresh: str) -> None:
    tensorrt.write(
        test_it="""
@trt_parity("conv.onnx", precision="fp16", batch=4, backend="onnxruntime-tensorrt")
def test_it(): ...
"""
    )
    first = tensorrt.run_apart(fresh, "--trt-require-gpu")
    first.result.assert_outcomes(passed=1)
    (record,) = first.checks
    assert not record["engine"]["cached"]
    assert len(record["partition"]["subgraphs"]) == 1
    proved = record["engine"]["proved"]
    assert proved or any("stated, not proved" in note for note in record["notes"])
    built = _files(tensorrt)
    assert built
    again = tensorrt.run_apart(fresh, "--trt-require-gpu")
    again.result.assert_outcomes(passed=1)
    assert again.checks[0]["engine"]["cached"]
    assert _files(tensorrt) == built
    assert again.checks[0]["duration_s"] < record["duration_s"]
    tensorrt.write(
        test_it="""
@trt_parity("conv.onnx", precision="fp16", batch=8, backend="onnxruntime-tensorrt")
def test_it(): ...
"""
    )
    assert not tensorrt.run_apart(fresh).checks[0]["engine"]["cached"]


def test_tensorrt_in_pieces_fails_and_names_what_lies_between(tensorrt: Suite, fresh: str) -> None:
    tensorrt.write(
        test_it="""
@trt_parity("divided.onnx", precision="tf32", batch=4, backend="onnxruntime-tensorrt", max_subgraphs=1)
def test_it(): ...
"""
    )
    run = tensorrt.run_apart(fresh)
    run.result.assert_outcomes(failed=1)
    assert "determinant" in run.checks[0]["message"]


# --- TensorRT-RTX ----------------------------------------------------------------------------------------------------


def test_the_rtx_plugin_runs_or_says_why_not(suite: Suite, fresh: str, real_gpu: Any) -> None:
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="needs the plugin of TensorRT-RTX")
    suite.write(
        test_it="""
@trt_parity("conv.onnx", precision="fp16", batch=4, backend="onnxruntime-tensorrt-rtx")
def test_it(): ...
"""
    )
    run = suite.run_apart(fresh)
    (record,) = run.checks
    if real_gpu.compute_capability in {(8, 6), (8, 9)} or real_gpu.compute_capability >= (12, 0):
        run.result.assert_outcomes(passed=1)
        assert record["evidence"] == "provider"
        assert suite.run_apart(fresh).checks[0]["engine"]["cached"]
    else:
        assert "registers and shows no device" in record["message"]
