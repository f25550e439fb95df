"""Engines built for real by TensorRT-RTX on a machine without a GPU, through the plugin."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.cache import manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)

TESTS = """
@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=2)
def test_conv(): ...
"""


@pytest.fixture
def fresh(suite: Suite) -> str:
    return f"--trt-cache-dir={suite.path / 'cache'}"


def test_engines_are_compiled_for_the_gpu_that_is_named(suite: Suite, fresh: str) -> None:
    suite.write(test_conv=TESTS)
    first = suite.run(fresh, "--trt-gpu=A100")
    first.result.assert_outcomes(passed=2)
    for record in first.checks:
        assert record["compiled_for"] == "A100"
        assert record["evidence"] == "emulated"
        assert record["engine"]["cached"] is False
        assert record["engine"]["bytes"] > 1000
        assert record["engine"]["build_s"] > 0
    again = suite.run(fresh, "--trt-gpu=A100")
    assert [record["engine"]["cached"] for record in again.checks] == [True, True]
    other = suite.run(fresh, "--trt-gpu=L4")
    assert {record["engine"]["cached"] for record in other.checks} == {False}
    assert "compute_capability: SM80 → SM89" in other.checks[0]["engine"]["miss_reason"]
    assert "built for A100, not run" in first.text


def test_one_engine_is_built_once_by_many_workers(suite: Suite, fresh: str) -> None:
    suite.write(
        test_many='@trt_parity("conv.onnx", batch=2)\n@pytest.mark.parametrize("n", range(6))\ndef test_n(n): ...\n'
    )
    run = suite.run_apart(fresh, "--trt-gpu=A100", "-n3")
    run.result.assert_outcomes(passed=6)
    assert sorted(record["engine"]["cached"] for record in run.checks) == [False, True, True, True, True, True]


def test_without_a_gpu_named_nothing_is_built(suite: Suite, fresh: str) -> None:
    suite.write(test_conv=TESTS)
    run = suite.run(fresh)
    assert [record["engine"] for record in run.checks] == [None, None]
    assert [record["compiled_for"] for record in run.checks] == [None, None]


def test_build_only_warms_the_cache_and_compares_nothing(suite: Suite, fresh: str) -> None:
    suite.write(test_conv=TESTS)
    run = suite.run(fresh, "--trt-gpu=A100", "--trt-build-only", "-rs")
    run.result.assert_outcomes(skipped=2)
    assert all(record["parity"] is None and record["engine"] for record in run.checks)
    assert "built, nothing compared" in run.text
    assert all(record["engine"]["cached"] for record in suite.run(fresh, "--trt-gpu=A100").checks)
    without = suite.run(fresh, "--trt-build-only", "-rs")
    without.result.assert_outcomes(skipped=2)
    assert all(record["verdict"] == "not_measured" and record["engine"] is None for record in without.checks)
    assert "no engine was built: --trt-gpu=A100 builds one" in without.checks[0]["message"]


def test_what_a_gpu_cannot_serve_is_said_before_building(suite: Suite, fresh: str) -> None:
    suite.write(test_conv=TESTS)
    run = suite.run(fresh, "--trt-gpu=T4")
    run.result.assert_outcomes(passed=1, failed=1)
    assert run.check("bf16]")["verdict"] == "error"
    assert "bf16 needs a GPU from Ampere" in run.check("bf16]")["message"]
    assert run.check("fp16]")["compiled_for"] == "T4"


def test_a_gpu_that_the_library_cannot_target_is_noted_or_refused(suite: Suite, fresh: str) -> None:
    suite.write(test_conv=TESTS)
    noted = suite.run(fresh, "--trt-gpu=V100", "-k", "fp16")
    noted.result.assert_outcomes(passed=1)
    assert noted.checks[0]["compiled_for"] is None
    assert "not built for V100" in " ".join(noted.checks[0]["notes"])
    refused = suite.run(fresh, "--trt-gpu=V100", "-k", "fp16", "--trt-backend=tensorrt_rtx")
    refused.result.assert_outcomes(failed=1)


def test_operators_that_tensorrt_cannot_parse(suite: Suite, fresh: str) -> None:
    suite.write(
        conftest="""
import onnx
from onnx import TensorProto, helper

@pytest.fixture
def trt_model():
    nodes = [helper.make_node("StringNormalizer", ["s"], ["t"]), helper.make_node("Relu", ["x"], ["y"], name="relu")]
    nodes[0] = helper.make_node("Unique", ["x"], ["u"], name="unique")
    nodes[1] = helper.make_node("Relu", ["u"], ["y"], name="relu")
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
""",
        test_bad="@trt_parity()\ndef test_unique(): ...\n\ndef test_next(): ...\n",
    )
    run = suite.run(fresh, "--trt-gpu=A100")
    run.result.assert_outcomes(passed=1, failed=1)
    assert run.checks[0]["verdict"] == "error"
    assert "unique" in run.checks[0]["message"]
    assert "Traceback" not in run.text


def test_a_damaged_engine_is_rebuilt(suite: Suite, fresh: str) -> None:
    suite.write(test_conv=TESTS)
    suite.run(fresh, "--trt-gpu=A100", "-k", "fp16")
    (plan,) = (suite.path / "cache").rglob("engine.plan")
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 0xFF
    plan.write_bytes(bytes(data))
    run = suite.run(fresh, "--trt-gpu=A100", "-k", "fp16")
    assert run.checks[0]["engine"]["cached"] is False
    assert "damaged" in run.checks[0]["engine"]["miss_reason"]


def test_an_engine_that_was_replaced_in_the_cache_is_refused(suite: Suite, fresh: str) -> None:
    """With the checksums written again, as whoever can write there can do; and such a directory is warned of."""
    suite.write(test_conv=TESTS)
    suite.run("--trt-gpu=A100", fresh, "-k", "fp16")
    (plan,) = (suite.path / "cache").rglob("engine.plan")
    plan.write_bytes(bytes([*plan.read_bytes()[:-1], 0x55]))
    entry = plan.parent.parent
    found = manifest.read_manifest(entry)
    manifest.write_manifest(entry, replace(found, files=manifest.describe_files(entry / "files")))
    (suite.path / "cache").chmod(0o777)
    run = suite.run("--trt-gpu=A100", fresh, "-k", "fp16")
    assert run.checks[0]["verdict"] == "error"
    assert "engine.plan was replaced: it is not the engine that was built" in run.checks[0]["message"]
    assert f"warning: {suite.path / 'cache'} can be written by others (mode 0777)" in run.text


def test_int8_is_calibrated_lowered_and_compiled(suite: Suite, fresh: str, run_everywhere: Callable[..., Run]) -> None:
    suite.write(
        make="""
rng = np.random.default_rng(0)
for index in range(4):
    np.savez(f"sample{index}.npz", image=rng.random((1, 3, 16, 16), dtype=np.float32))
""",
        test_int8="""
@trt_parity("conv.onnx", precision="int8", calibration="sample*.npz", batch=4)
def test_good(): ...

@trt_parity("conv.onnx", precision="int8", batch=4)
def test_bad_data():
    return None

@pytest.fixture
def trt_calibration():
    return [{"image": np.full((1, 3, 16, 16), 0.01, np.float32)}]
""",
    )
    suite.pytester.runpython(suite.pytester.path / "make.py")
    run = run_everywhere(fresh, "--trt-gpu=A100")
    run.result.assert_outcomes(passed=1, failed=1)
    assert run.check("test_good")["compiled_for"] == "A100"
    assert run.check("test_bad_data")["verdict"] == "fail"
    assert "4 samples" in " ".join(run.check("test_good")["notes"])
