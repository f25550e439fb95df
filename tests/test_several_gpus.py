"""`--trt-gpu` with several GPUs: a test and a record for each, engines where TensorRT-RTX compiles them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.gpu.device import Detection, Gpu
from pytest_trtcheck.gpu.names import find_gpu
from pytest_trtcheck.plugin.session import Session
from pytest_trtcheck.record import without_parameter
from tests import fake_nvml
from tests.test_gpu_detect import T4

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite

RTX = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)

TESTS = """
@trt_latency(p50_ms={"T4": 7.0, "A100": 1.5})
@trt_parity("conv.onnx", precision="fp16", batch=2)
def test_conv(): ...

def test_hand(trt_gpu, trt_build):
    assert trt_gpu.product in {"T4", "A100"}
    trt_build("conv.onnx")

def test_other(): ...
"""


@pytest.fixture
def fresh(suite: Suite) -> str:
    return f"--trt-cache-dir={suite.path / 'cache'}"


def test_each_gpu_has_its_test_its_record_and_its_engine(
    suite: Suite, fresh: str, run_everywhere: Callable[..., Run]
) -> None:
    suite.write(test_it=TESTS)
    run = run_everywhere(fresh, "--trt-gpu=T4,A100")
    run.result.assert_outcomes(passed=5)
    told = {record["nodeid"].rpartition("::")[2]: record for record in run.checks}
    assert list(told) == ["test_conv[A100]", "test_conv[T4]"]
    for gpu in ("A100", "T4"):
        record = told[f"test_conv[{gpu}]"]
        assert (record["for_gpu"], record["compiled_for"], record["verdict"]) == (gpu, gpu, "pass")
        assert record["latency"]["reason"] == f"no {gpu} in this machine"
    assert len({record["engine"]["key"] for record in run.checks}) == 2
    assert len({record["parity"]["outputs"][0]["judged"][0]["value"] for record in run.checks}) == 1
    assert run.report["environment"]["requested_gpu"] == "T4, A100"
    kept = suite.path / "cache/v1/entries/emulation"
    assert len(list(kept.iterdir())) == 1, "the emulation is one for all, and computed once"


def test_what_this_tensorrt_refuses_and_another_serves_is_not_built(suite: Suite, fresh: str) -> None:
    suite.write(
        test_it="""
@trt_parity("gemm.onnx", precision=["int8", "bf16"], batch=2, tol=0.2, calibration=np.ones((4, 2, 16), np.float32))
def test_gemm(): ...
""".replace("(4, 2, 16)", str((4, *_gemm_shape())))
    )
    run = suite.run(fresh, "--trt-gpu=T4,L4")
    run.result.assert_outcomes(passed=3, failed=1)
    for_t4 = run.check("[int8-T4]")
    assert for_t4["compiled_for"] is None
    assert for_t4["engine"] is None
    assert "no FP32 matrix products on Turing" in for_t4["not_built"]
    assert f"not built for T4: {for_t4['not_built']}" in for_t4["notes"]
    assert run.check("[int8-L4]")["compiled_for"] == "L4"
    # What no TensorRT has on that GPU is an error.
    refused = run.check("[bf16-T4]")
    assert (refused["verdict"], "not_built" in refused) == ("error", False)
    assert "bf16 needs a GPU from Ampere" in refused["message"]
    # Only built: neither a failure nor a pass.
    run = suite.run(fresh, "--trt-gpu=T4,L4", "--trt-build-only", "-k", "int8")
    run.result.assert_outcomes(skipped=2)
    assert run.check("[int8-T4]")["message"].startswith("--trt-build-only: not built for T4: ")
    assert run.check("[int8-L4]")["message"] == "--trt-build-only: built, nothing compared"
    # Whoever names the TensorRT that ships means it.
    run = suite.run(fresh, "--trt-gpu=T4,L4", "--trt-build-only", "-k", "int8", "--trt-backend=tensorrt_rtx")
    run.result.assert_outcomes(skipped=1, failed=1)


def test_what_is_emulated_by_name_and_only_to_be_built_is_not_told_to_name_the_gpu(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1, backend="onnxruntime")\ndef test_conv(): ...\n')
    (record,) = suite.run("--trt-gpu=A100", "--trt-build-only").checks
    assert record["message"].startswith("--trt-build-only: backend onnxruntime: no engine was asked for")
    assert "name the GPU" not in record["message"]


def _gemm_shape() -> tuple[int, ...]:
    from tests import onnx_models

    dims = onnx_models.gemm_net().graph.input[0].type.tensor_type.shape.dim
    return tuple(dim.dim_value or 2 for dim in dims)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trt-gpu=T4,Tesla T4",), "'T4' and 'Tesla T4' name the same GPU"),
        (("--trt-gpu=T4,ampere",), "ampere has several compute capabilities"),
        (("--trt-gpu=T4,T5",), "unknown GPU 'T5'"),
        (("--trt-gpu=T4,L4", "--trt-export=out"), "--trt-export: --trt-gpu names several GPUs"),
    ],
)
def test_what_cannot_be_is_said_first(suite: Suite, options: tuple[str, ...], said: str) -> None:
    suite.write(test_it=TESTS)
    run = suite.run(*options)
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert said in run.text


def test_where_a_gpu_is_several_are_for_building(suite: Suite, fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.write(test_it=TESTS)
    fake_nvml.install(monkeypatch, [T4])
    run = suite.run("--trt-gpu=A100,L4")
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--trt-gpu names A100, L4, and in this machine is Tesla T4" in run.text
    assert "--trt-build-only builds for several" in run.text
    run = suite.run(fresh, "--trt-gpu=A100,L4", "--trt-build-only", "-k", "conv")
    run.result.assert_outcomes(skipped=2)
    assert {record["compiled_for"] for record in run.checks} == {"A100", "L4"}
    one = suite.run(fresh, "--trt-gpu=A100", "--trt-build-only", "-k", "conv")
    assert one.checks[0]["compiled_for"] == "A100"


def test_the_gpu_that_is_here_is_built_for_as_such(suite: Suite) -> None:
    config = suite.pytester.parseconfigure("--trt-gpu=A100,Tesla T4", "--trt-build-only")
    session = Session.make(config)
    here = Gpu(name="Tesla T4", model=find_gpu("T4"), compute_capability=(7, 5))
    vars(session)["detection"] = Detection(here)
    vars(session)["place"] = type("Place", (), {"note": None})
    assert session.machine_for("A100").detected is None
    assert session.machine_for("Tesla T4").detected is here
    assert session.machine.requested is None


@pytest.mark.parametrize(
    ("nodeid", "name", "test"),
    [
        ("t.py::t[T4]", "T4", "t.py::t"),
        ("t.py::t[fp16-T4]", "T4", "t.py::t[fp16]"),
        ("t.py::t[T4-x]", "T4", "t.py::t[x]"),
        ("t.py::t[T40-T4]", "T4", "t.py::t[T40]"),
        ("t.py::t[RTX 4090-batch1]", "RTX 4090", "t.py::t[batch1]"),
    ],
)
def test_a_test_without_its_gpu(nodeid: str, name: str, test: str) -> None:
    assert without_parameter(nodeid, name) == test
