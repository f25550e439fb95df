"""`engine=` on a real GPU: a file that passes, files that must not, and what is read from them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt import plan_file
from pytest_trtcheck.backends.tensorrt.module import Target, TensorRTModule, available
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models
from tests.test_existing_engine import altered, context

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.spec import Precision
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu

SPAN = {"image": ShapeRange((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))}


@pytest.fixture
def fresh(suite: Suite) -> str:
    return f"--trt-cache-dir={suite.path / 'cache'}"


@pytest.fixture
def trt() -> TensorRTModule:
    found = available()
    if found is None:
        pytest.skip("neither tensorrt nor tensorrt_rtx is installed")
    return found


def half(model: onnx.ModelProto, io: bool = False) -> onnx.ModelProto:
    """The model in FP16 throughout, as someone else would have exported it; its inputs and outputs as well, or not."""
    graph = model.graph
    for each in graph.initializer:
        if each.data_type == TensorProto.FLOAT:
            each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each).astype(np.float16), each.name))
    if io:
        for put in (*graph.input, *graph.output):
            put.type.tensor_type.elem_type = TensorProto.FLOAT16
        return model
    for node in graph.node:
        node.input[:] = ["image_half" if name == "image" else name for name in node.input]
        node.output[:] = ["logits_half" if name == "logits" else name for name in node.output]
    graph.node.insert(0, helper.make_node("Cast", ["image"], ["image_half"], to=TensorProto.FLOAT16))
    graph.node.append(helper.make_node("Cast", ["logits_half"], ["logits"], to=TensorProto.FLOAT))
    return model


def built(
    trt: TensorRTModule,
    gpu: Gpu,
    model: onnx.ModelProto,
    plan: Path,
    *,
    precision: Precision = "fp16",
    profile: Mapping[str, ShapeRange] = SPAN,
) -> Path:
    """A plan for the GPU in this machine, built apart from any check."""
    path = onnx_models.save(model, plan.with_suffix(".built_from.bin"))
    target = Target(gpu.compute_capability, here=True)
    tensorrt.build(trt, path, plan, target=target, precision=precision, profile=profile)
    print(f"{plan.name}: header {plan.read_bytes()[:40].hex(' ')}")
    return plan


def checked(suite: Suite, fresh: str, engine: str, arguments: str = "", *options: str) -> dict[str, Any]:
    suite.write(test_it=f'@trt_parity("conv.onnx", batch=2, engine="{engine}"{arguments})\ndef test_it(): ...\n')
    (record,) = suite.run_apart(fresh, *options).checks
    return dict(record)


def test_a_plan_of_this_machine_passes_and_is_read(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    plan = built(trt, real_gpu, half(onnx_models.conv_net()), suite.path / "it.plan")
    file = plan_file.opened(plan, "it.plan", Cache(suite.path / "cache"))
    assert file.builder == trt.title
    assert file.targets is None or real_gpu.compute_capability in file.targets
    record = checked(suite, fresh, "it.plan")
    assert (record["verdict"], record["precision"], record["evidence"]) == ("pass", "fp16", "engine")
    assert 0 < record["parity"]["worst"] < 0.01
    engine = record["engine"]
    assert (engine["source"], engine["file"], engine["proved"], engine["sha256"]) == (
        "file",
        "it.plan",
        True,
        file.sha256,
    )
    assert engine["layers_by_precision"]["fp16"] > 0
    assert engine["device_memory_bytes"] > 0
    again = checked(suite, fresh, "it.plan", ', precision="fp16"')
    assert again["verdict"] == "pass"
    assert again["parity"]["worst"] == record["parity"]["worst"]


def test_latency_memory_and_speedup_of_a_plan(suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu) -> None:
    built(trt, real_gpu, half(onnx_models.conv_net()), suite.path / "it.plan")
    suite.write(
        test_it="""
@trt_latency(p50_ms=1000.0, min_qps=1.0, memory_mib=100000, engine_mib=100, min_speedup={"fp32": 0.01})
@trt_parity("conv.onnx", batch=2, engine="it.plan")
def test_generous(): ...

@trt_latency(p50_ms=1e-6)
@trt_parity("conv.onnx", batch=2, engine="it.plan")
def test_impossible(): ...

@trt_parity("conv.onnx", batch=2, engine="it.plan")
def test_the_engine_itself(trt_engine):
    image = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    assert trt_engine({"image": image})["logits"].shape == (2, 10)
    assert trt_engine.evidence == "engine"
"""
    )
    run = suite.run_apart(fresh)
    run.result.assert_outcomes(passed=2, failed=1)
    assert run.check("test_generous")["latency"]["verdict"] == "pass"
    assert run.check("test_impossible")["latency"]["verdict"] == "fail"


def test_a_plan_of_other_weights_fails_and_is_to_blame(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    built(trt, real_gpu, half(altered()), suite.path / "it.plan")
    record = checked(suite, fresh, "it.plan", "", "--trt-bundle=bundles")
    assert record["verdict"] == "fail"
    blame = record["parity"]["blame"]
    assert blame["step"] == "engine"
    assert "an engine built here from conv.onnx in fp16 keeps the limits" in " ".join(blame["notes"])
    (bundle,) = (suite.path / "bundles").glob("*/bundle.json")
    (replayed,) = suite.run_apart(fresh, str(bundle)).checks
    assert replayed["verdict"] == "fail"


def test_a_precision_that_the_plan_contradicts_is_an_error(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    built(trt, real_gpu, half(onnx_models.conv_net()), suite.path / "it.plan")
    record = checked(suite, fresh, "it.plan", ', precision="fp32"')
    assert record["verdict"] == "error"
    assert "precision=fp32, and the engine computes in fp16" in record["message"]


def test_a_plan_in_fp32_is_judged_as_what_it_computes_in(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    built(trt, real_gpu, onnx_models.conv_net(), suite.path / "it.plan", precision="fp32")
    record = checked(suite, fresh, "it.plan")
    assert record["verdict"] == "pass"
    assert record["precision"] == ("tf32" if trt.is_rtx else "fp32")


def test_inputs_and_outputs_in_fp16_are_converted_and_said(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    built(trt, real_gpu, half(onnx_models.conv_net(), io=True), suite.path / "it.plan")
    suite.write(
        test_it='@trt_latency(p50_ms=1000.0)\n@trt_parity("conv.onnx", batch=2, engine="it.plan")\ndef test_it(): ...\n'
    )
    (record,) = suite.run_apart(fresh).checks
    assert record["verdict"] == "pass"
    assert any("image float32 ↔ float16" in note and "logits float32 ↔ float16" in note for note in record["notes"]), (
        record["notes"]
    )


def test_a_plan_of_another_model_or_for_other_shapes_is_an_error(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    gemm = ShapeRange((1, 8), (1, 8), (1, 8))
    model = onnx_models.gemm_net()
    name = model.graph.input[0].name
    dims = [dim.dim_value or 1 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    span = ShapeRange(tuple(dims), tuple(dims), tuple(dims)) if dims else gemm
    built(trt, real_gpu, model, suite.path / "gemm.plan", precision="fp32", profile={name: span})
    assert "is no engine of conv.onnx" in checked(suite, fresh, "gemm.plan")["message"]
    built(trt, real_gpu, half(onnx_models.conv_net()), suite.path / "it.plan")
    suite.write(test_it='@trt_parity("conv.onnx", batch=8, engine="it.plan")\ndef test_it(): ...\n')
    (record,) = suite.run_apart(fresh).checks
    assert record["verdict"] == "error"
    assert "profile 0: image (1, 3, 16, 16) to (4, 3, 16, 16)" in record["message"]


def write_plan(
    path: Path,
    trt: TensorRTModule,
    proto: onnx.ModelProto,
    *,
    batches: Sequence[tuple[int, int]] = (),
    verbosity: str = "DETAILED",
) -> None:
    """An engine as others may build theirs: with a profile for each range of batches, or telling nothing of itself."""
    module = trt.handle
    logger = module.Logger(module.Logger.ERROR)
    builder = module.Builder(logger)
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    assert module.OnnxParser(network, logger).parse(proto.SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = getattr(module.ProfilingVerbosity, verbosity)
    for low, high in batches:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (low, 3, 16, 16), (low, 3, 16, 16), (high, 3, 16, 16))
        config.add_optimization_profile(profile)
    path.write_bytes(memoryview(builder.build_serialized_network(network, config)))


def test_of_several_profiles_the_one_that_fits_is_taken(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    write_plan(suite.path / "it.plan", trt, half(onnx_models.conv_net()), batches=((1, 1), (2, 4)))
    suite.write(test_it='@trt_parity("conv.onnx", batch=[1, 3], engine="it.plan")\ndef test_it(): ...\n')
    run = suite.run_apart(fresh)
    run.result.assert_outcomes(passed=2)
    assert all(0 < record["parity"]["worst"] < 0.01 for record in run.checks)


def test_an_engine_that_does_not_tell_its_precision(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    write_plan(suite.path / "it.plan", trt, half(onnx_models.conv_net(batch=2)), verbosity="NONE")
    assert "neither precision= nor tol= is given" in checked(suite, fresh, "it.plan")["message"]
    record = checked(suite, fresh, "it.plan", ', precision="fp16"')
    assert (record["verdict"], record["engine"]["proved"]) == ("pass", False)
    assert any("stated, not proved" in note for note in record["notes"])


def test_an_epcontext_model_is_run_as_the_engine_in_it(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    plan = built(trt, real_gpu, half(onnx_models.conv_net(batch=2)), suite.path / "it.plan", profile={})
    context(suite.path / "inside.onnx", plan.read_bytes(), embed_mode=1, main_context=0)
    context(suite.path / "beside.onnx", "it.plan", embed_mode=0, main_context=1)
    for name in ("inside.onnx", "beside.onnx"):
        assert checked(suite, fresh, name)["verdict"] == "pass"


def test_damaged_plans_are_errors_and_the_next_test_runs(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    plan = bytearray(built(trt, real_gpu, half(onnx_models.conv_net()), suite.path / "it.plan").read_bytes())
    (suite.path / "cut.plan").write_bytes(plan[: len(plan) // 2])
    # The header is whole, and says nothing of it: what is behind is the loader's to notice, or to crash on.
    behind = bytearray(plan)
    behind[200 : len(behind) // 2] = os.urandom(len(behind) // 2 - 200)
    (suite.path / "hostile.plan").write_bytes(behind)
    suite.write(
        test_it="""
@pytest.mark.parametrize("name", ["cut", "hostile", "it"])
def test_it(name, trt_check):
    trt_check("conv.onnx", {"image": np.ones((2, 3, 16, 16), np.float32)}, engine=f"{name}.plan")
"""
    )
    run = suite.run_apart(fresh)
    verdicts = {record["nodeid"].partition("[")[2]: record["verdict"] for record in run.checks}
    assert verdicts["cut]"] == "error"
    assert verdicts["hostile]"] in {"error", "fail"}, run.text
    assert verdicts["it]"] == "pass"


def test_a_plan_compiled_for_another_gpu_is_refused_though_it_might_load(
    suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu
) -> None:
    here = real_gpu.compute_capability
    other = next((each for each in trt.compile_only() if each != here and each >= (8, 0)), None)
    if other is None:
        pytest.skip(f"{trt.title} compiles for no other GPU")
    model = onnx_models.save(half(onnx_models.conv_net(batch=2)), suite.path / "half.bin")
    tensorrt.build(trt, model, suite.path / "it.plan", target=Target(other, here=False), precision="fp16")
    record = checked(suite, fresh, "it.plan")
    assert record["verdict"] == "error"
    assert "was compiled for compute capability {}.{}, and".format(*other) in record["message"]


def test_a_plan_of_another_release_is_refused(suite: Suite, fresh: str, trt: TensorRTModule, real_gpu: Gpu) -> None:
    plan = bytearray(built(trt, real_gpu, half(onnx_models.conv_net()), suite.path / "it.plan").read_bytes())
    plan[24:27] = bytes([plan[24], plan[25] + 1, 0]) if trt.is_rtx else bytes([plan[24] + 1, 0, 0])
    (suite.path / "it.plan").write_bytes(plan)
    record = checked(suite, fresh, "it.plan")
    assert record["verdict"] == "error"
    assert "an engine is loaded by the release that built it alone" in record["message"]


def test_what_was_exported_is_tested_as_a_file(suite: Suite, fresh: str, trt: TensorRTModule) -> None:
    del trt
    suite.write(test_here='@trt_parity("conv.onnx", batch=2)\ndef test_here(): ...\n')
    suite.run_apart(fresh, "--trt-export=out").result.assert_outcomes(passed=1)
    (plan,) = (suite.path / "out").rglob("model_repository/*/1/model.plan")
    (suite.path / "test_here.py").unlink()
    record = checked(suite, fresh, str(plan))
    assert (record["verdict"], record["precision"]) == ("pass", "fp16")
    assert (
        json.loads((plan.parent.parent / "manifest.json").read_text())["engine"]["sha256"] == record["engine"]["sha256"]
    )
