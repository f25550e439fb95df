"""Engines really built by TensorRT-RTX, and every fault that a build can meet, planted."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.backends.base import Machine
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt import builder as tensorrt_builder
from pytest_trtcheck.backends.tensorrt import module as tensorrt_module
from pytest_trtcheck.backends.tensorrt.backend import Auto
from pytest_trtcheck.backends.tensorrt.emulated import Emulated
from pytest_trtcheck.backends.tensorrt.module import Target, TensorRTModule, available, find_module, too_old
from pytest_trtcheck.backends.tensorrt.options import check_options
from pytest_trtcheck.backends.tensorrt.support import advice, unsupported, what_strong_typing_lacks
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ArgumentError, BuildError, MissingDependencyError, UnsupportedTargetError
from pytest_trtcheck.gpu import find_gpu
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.spec import BuildOptions, Precision, ShapeRange
from tests import onnx_models, trt_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.build import Plan

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)

AMPERE = Target((8, 6), here=False)
TURING = Target((7, 5), here=False)


@pytest.fixture(scope="module")
def rtx() -> TensorRTModule:
    return find_module("tensorrt_rtx")


@pytest.fixture
def build(rtx: TensorRTModule, tmp_path: Path) -> Any:
    def run(
        model: onnx.ModelProto | Path, *, target: Target = AMPERE, precision: Precision = "fp32", **given: Any
    ) -> Plan:
        path = model if isinstance(model, Path) else onnx_models.save(model, tmp_path / "model.onnx")
        return tensorrt.build(rtx, path, tmp_path / "engine.plan", target=target, precision=precision, **given)

    return run


def conv() -> onnx.ModelProto:
    return trt_models.operator("Conv", "fp32")


def uses(operator: str, count: int = 1) -> onnx.ModelProto:
    """A model with `count` nodes of an operator that TensorRT does not import."""
    nodes = [helper.make_node(operator, ["x"], [f"y{n}"], name=f"{operator.lower()}_{n}") for n in range(count)]
    outputs = {f"y{n}": (onnx_models.FLOAT, [3]) for n in range(count)}
    return onnx_models.model(nodes, {"x": (onnx_models.FLOAT, [3, 4, 4])}, outputs)


# Which TensorRT


def test_auto_finds_what_is_installed(rtx: TensorRTModule) -> None:
    found = find_module()
    assert found.name in {"tensorrt", "tensorrt_rtx"}
    assert rtx.is_rtx
    assert rtx.release[:2] >= (1, 4)
    assert available("tensorrt_rtx") == rtx
    assert {(7, 5), (8, 0), (8, 6), (8, 9), (12, 0)} <= set(rtx.compile_only())


def test_a_module_that_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rtx: TensorRTModule
) -> None:
    # As if `tensorrt` were installed without its libraries, which is how its stub package ends up.
    broken = tmp_path / "tensorrt"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependencyError, match="installed but cannot be loaded: libnvinfer") as info:
        find_module("tensorrt")
    assert "pytest-trtcheck[tensorrt]" in info.value.hint
    assert available("tensorrt") is None
    assert find_module() == rtx


# 8.6 has the parser, and tensors by name, as 10 has them; its bindings are in tests/test_tensorrt_api.py.
@pytest.mark.parametrize("version", ["7.2", "8.6.1.post1", "9.3.0", "10.0.1"])
def test_a_tensorrt_that_is_too_old_is_refused_by_its_release(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rtx: TensorRTModule
) -> None:
    text = f"__version__ = '{version}'\nclass OnnxParser: ...\nclass ICudaEngine:\n    num_io_tensors = 1\n"
    (tmp_path / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    needed = f"tensorrt {version} is too old: TensorRT 10.1 or newer is needed"
    try:
        with pytest.raises(MissingDependencyError, match=f"^{re.escape(needed)}"):
            find_module("tensorrt")
        assert find_module() == rtx
        # The parser's process takes the other, or says why there is none.
        model = onnx_models.save(conv(), tmp_path / "model.onnx")
        assert tensorrt.parse(("tensorrt", "tensorrt_rtx"), model).module == "tensorrt_rtx"
        assert tensorrt.parse(("tensorrt",), model).errors == (needed,)
    finally:
        sys.modules.pop("tensorrt", None)


def test_the_first_releases_that_are_taken() -> None:
    taken = ["10.1.0", "10.14.1.48.post1", "11.4.0.106", "12.0"]
    assert [too_old("tensorrt", version) for version in taken] == [None] * 4
    assert too_old("tensorrt_rtx", "1.5.0.114") is None
    assert too_old("tensorrt_rtx", "1.4.0.76") == (
        "tensorrt_rtx 1.4.0.76 is too old: TensorRT-RTX 1.5 or newer is needed"
    )
    assert too_old("tensorrt", "unknown") is not None


def test_without_a_taken_release_auto_emulates_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> TensorRTModule:
        raise MissingDependencyError(f"{name} 1 is too old: a newer one is needed")

    monkeypatch.setattr(tensorrt_module, "_load", load)
    found = Auto.find(Machine(find_gpu("T4")))
    assert isinstance(found, Emulated)
    assert found.no_engine == (
        "no engine was built: tensorrt 1 is too old: a newer one is needed; "
        "tensorrt_rtx 1 is too old: a newer one is needed"
    )


# What a target can be served


def builds(rtx: TensorRTModule, model: onnx.ModelProto, target: Target, folder: Path) -> bool:
    """Whether the builder takes the model, asked in this process: a child for each of many models is slow."""
    try:
        tensorrt_builder.build_here(rtx.handle, build_request(rtx, model, target, folder), lambda *_: None)
    except tensorrt_builder.RequestError:
        return False
    return True


def build_request(rtx: TensorRTModule, model: onnx.ModelProto, target: Target, folder: Path) -> dict[str, Any]:
    """What the builder process would be asked for."""
    return {
        "module": rtx.name,
        "model": str(onnx_models.save(model, folder / "grid.onnx")),
        "plan": str(folder / "grid.plan"),
        "target": dataclasses.asdict(target),
        "precision": "fp32",
        "options": dataclasses.asdict(BuildOptions()),
        "profile": {},
        "timing_cache": None,
    }


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9)], ids=["SM75", "SM80", "SM89"])
def test_what_is_said_to_be_unsupported_is_what_does_not_build(
    rtx: TensorRTModule, op: str, capability: tuple[int, int], tmp_path: Path
) -> None:
    target = Target(capability, here=False)
    said: dict[str, bool] = {}
    found: dict[str, bool] = {}
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
    for precision in precisions:
        said[precision] = unsupported(rtx, target, precision, {op}) is None
        found[precision] = builds(rtx, trt_models.operator(op, precision), target, tmp_path)
    assert said == found


@pytest.mark.parametrize("op", ["Einsum", "LSTM"])
def test_turing_has_no_fp32_matrix_products_in_any_disguise(rtx: TensorRTModule, op: str, tmp_path: Path) -> None:
    if rtx.release < (1, 7):
        pytest.skip("they are refused from TensorRT-RTX 1.7 on")
    if op == "Einsum":
        node = helper.make_node("Einsum", ["x", "w"], ["y"], name="einsum", equation="ij,jk->ik")
        x: tuple[int, ...] = (4, 32)
        y: tuple[int, ...] = (4, 16)
        values = {"w": onnx_models.weights((32, 16))}
    else:
        node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], name="lstm", hidden_size=8)
        x, y = (5, 2, 4), (5, 1, 2, 8)
        values = {"w": onnx_models.weights((1, 32, 4)), "r": onnx_models.weights((1, 32, 8))}
    model = onnx_models.model([node], {"x": (onnx_models.FLOAT, x)}, {"y": (onnx_models.FLOAT, y)}, values)
    assert unsupported(rtx, TURING, "fp32", {op}) is not None
    assert not builds(rtx, model, TURING, tmp_path)
    assert unsupported(rtx, AMPERE, "fp32", {op}) is None
    assert builds(rtx, model, AMPERE, tmp_path)


@pytest.mark.parametrize(
    ("version", "target", "precision", "operators", "expected"),
    [
        # Each was a real build or run with that release; only the installed one is repeated above.
        ("1.5.0.114", Target((8, 6), here=False), "int8", {"Conv"}, "has no INT8 Conv"),
        ("1.6.1.120", Target((8, 9), here=False), "int8", {"ConvTranspose", "MatMul"}, "has no INT8 ConvTranspose"),
        ("1.6.1.120", Target((8, 9), here=False), "int8", {"MatMul"}, None),
        ("1.7.1.116", Target((8, 6), here=False), "int8", {"Conv"}, None),
        ("1.5.0.114", Target((7, 5), here=False), "fp32", {"Gemm"}, None),
        ("1.7.1.116", Target((7, 5), here=False), "fp32", {"Gemm"}, "no FP32 matrix products on Turing"),
        ("1.7.1.116", Target((7, 5), here=False), "int8", {"Gemm"}, "no FP32 matrix products on Turing"),
        ("1.7.1.116", Target((7, 5), here=False), "fp16", {"Gemm"}, None),
        ("1.5.0.114", Target((9, 0), here=True), "fp16", {"Conv"}, None),
        (
            "1.7.1.116",
            Target((9, 0), here=True),
            "fp16",
            {"Conv"},
            "does not support compute capability 9.0; it does 7.5, 8.0",
        ),
        ("1.5.0.114", Target((9, 0), here=False), "fp16", {"Conv"}, "does not support compute capability 9.0"),
        ("1.7.1.116", Target((8, 7), here=False), "fp16", {"Conv"}, "does not support compute capability 8.7"),
        ("1.7.1.116", Target((7, 0), here=False), "fp16", {"Conv"}, "from Turing"),
        ("1.7.1.116", Target((7, 5), here=False), "tf32", {"Conv"}, "tf32 needs a GPU from Ampere"),
    ],
)
def test_rules_by_release(
    version: str, target: Target, precision: Precision, operators: set[str], expected: str | None
) -> None:
    module = TensorRTModule("tensorrt_rtx", version, find_module("tensorrt_rtx").handle)
    reason = unsupported(module, target, precision, operators)
    assert reason is None if expected is None else (reason is not None and expected in reason)


@pytest.mark.parametrize(
    ("version", "capability", "here", "precision", "expected"),
    [
        ("10.13.0", (8, 6), False, "fp16", "builds engines only on the GPU that they run on"),
        ("10.13.0", (7, 5), True, "fp16", None),
        ("10.13.0", (7, 5), True, "int8", None),
        ("10.13.0", (7, 5), True, "bf16", "bf16 needs a GPU from Ampere"),
        ("10.13.0", (8, 6), True, "fp8", "fp8 needs a GPU from Ada"),
        ("10.13.0", (8, 9), True, "fp8", None),
        ("10.13.0", (9, 0), True, "fp8", None),
        ("10.13.0", (7, 0), True, "fp32", "TensorRT 10.13.0 supports GPUs from Turing (compute capability 7.5) on"),
        ("10.5.0", (7, 0), True, "fp32", "TensorRT 10.1 to 10.4 have Volta; the target has compute capability 7.0"),
        ("10.4.0", (7, 0), True, "fp16", None),
        ("10.3.0", (6, 1), True, "fp32", "TensorRT 10.3.0 supports GPUs from Volta (compute capability 7.0) on"),
        ("11.4.0.106", (7, 5), True, "fp16", None),
        ("10.7.0", (12, 0), True, "fp16", "TensorRT 10.7.0 knows no Blackwell GPUs: TensorRT 10.8 and later do"),
        ("10.8.0.43", (12, 0), True, "fp8", None),
        ("10.3.0", (8, 7), True, "int8", None),
        ("10.1.0", (9, 0), True, "fp8", "TensorRT 10.1.0 has no FP8 Conv; TensorRT 10.2 has"),
        ("10.2.0", (9, 0), True, "fp8", None),
    ],
)
def test_rules_for_tensorrt_itself(
    version: str, capability: tuple[int, int], here: bool, precision: Precision, expected: str | None
) -> None:
    module = TensorRTModule("tensorrt", version, handle=None)
    reason = unsupported(module, Target(capability, here), precision, {"Conv", "Gemm"})
    assert reason is None if expected is None else (reason is not None and expected in reason)


def test_a_failed_build_of_a_release_before_strong_typing_was_complete_says_so() -> None:
    (said,) = what_strong_typing_lacks(TensorRTModule("tensorrt", "10.3.0", handle=None))
    assert said.startswith("TensorRT 10.3.0 lacks some layers in strongly typed networks")
    assert "complete from TensorRT 10.12 on" in said
    assert what_strong_typing_lacks(TensorRTModule("tensorrt", "10.12.0.36", handle=None)) == []
    assert what_strong_typing_lacks(TensorRTModule("tensorrt_rtx", "1.5.0.114", handle=None)) == []


def test_compiling_for_a_gpu_that_is_not_listed_is_refused_before_the_build(build: Any) -> None:
    with pytest.raises(UnsupportedTargetError, match="SM87"):
        build(conv(), target=Target((8, 7), here=False))


# Building


def test_a_plan_says_what_it_is(build: Any, rtx: TensorRTModule, tmp_path: Path) -> None:
    plan = build(trt_models.operator("Conv", "fp16"), precision="fp16")
    assert plan.path == tmp_path / "engine.plan"
    assert plan.bytes == plan.path.stat().st_size > 1000
    assert (plan.module, plan.version, plan.target) == ("tensorrt_rtx", rtx.version, AMPERE)
    assert 0 < plan.build_s < 60
    assert plan.warnings == ()


def test_the_same_model_gives_the_same_bytes_and_another_gpu_others(build: Any) -> None:
    first = build(conv()).path.read_bytes()
    assert build(conv()).path.read_bytes() == first
    assert build(conv(), target=Target((8, 9), here=False)).path.read_bytes() != first


@pytest.mark.parametrize("name", ["magika", "nudenet"])
def test_real_models_build(build: Any, name: str) -> None:
    if name == "magika":
        plan = build(onnx_models.magika(), profile={"bytes": ShapeRange((1, 2048), (8, 2048), (16, 2048))})
    else:
        plan = build(onnx_models.nudenet(), profile={"images": ShapeRange(*[(1, 3, 320, 320)] * 3)})
    assert plan.bytes > 100_000


def test_dynamic_shapes_within_a_range(build: Any) -> None:
    shapes = ShapeRange((1, 4, 16, 16), (2, 4, 16, 24), (8, 4, 16, 64))
    assert build(trt_models.dynamic_conv(), profile={"x": shapes}).bytes > 1000


def test_a_shape_tensor_takes_a_range_of_values(build: Any) -> None:
    plan = build(trt_models.rows_of_values(), profile={"s": ShapeRange((1, 4), (4, 8), (8, 32))})
    assert any("Int64" in warning for warning in plan.warnings)
    assert len(set(plan.warnings)) == len(plan.warnings)


def test_external_data_beside_the_model(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    path.parent.mkdir()
    onnx.save(conv(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert build(path).bytes > 1000


def test_the_builder_sees_the_paths_that_this_process_has(
    build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A folder of the user's that happens to hold a module of a standard name must not reach the builder by itself.
    (tmp_path / "json.py").write_text("raise ImportError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    assert build(conv()).bytes > 1000


def test_tf32_is_told_to_the_builder(build: Any) -> None:
    without = build(conv(), precision="fp32").path.read_bytes()
    with_it = build(conv(), precision="tf32").path.read_bytes()
    assert with_it != without
    assert build(conv(), precision="fp32", options=BuildOptions(tf32=True)).path.read_bytes() == with_it
    assert build(conv(), precision="tf32", options=BuildOptions(tf32=False)).path.read_bytes() == without


# What goes wrong


def test_every_operator_that_is_not_imported_is_named(build: Any, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as info:
        build(uses("Det", 3))
    message = str(info.value)
    assert "could not parse model.onnx" in message
    for node in ("det_0", "det_1", "det_2"):
        assert f"node '{node}' (Det): UNSUPPORTED_NODE" in message
    assert "plugins=" in info.value.hint
    assert not (tmp_path / "engine.plan").exists()


def test_a_failed_build_leaves_no_engine_of_an_earlier_one(build: Any, tmp_path: Path) -> None:
    build(conv())
    with pytest.raises(BuildError):
        build(uses("Det"))
    assert not (tmp_path / "engine.plan").exists()


def test_a_dynamic_input_without_a_range(build: Any) -> None:
    with pytest.raises(BuildError, match=r"'x' has a dynamic shape \(-1, 4, 16, -1\) and no profile") as info:
        build(trt_models.dynamic_conv())
    assert "batch=" in info.value.hint


def test_all_that_is_wrong_with_the_shapes_is_said_at_once(build: Any) -> None:
    shapes = {
        "x": ShapeRange((4, 4, 16), (2, 4, 16, 16), (1, 5, 16, 16)),
        "other": ShapeRange((1,), (1,), (1,)),
    }
    with pytest.raises(BuildError) as info:
        build(trt_models.dynamic_conv(), profile=shapes)
    message = str(info.value)
    assert "'other', which is no input of the model" in message
    assert "its min shape (4, 4, 16) 3" in message
    assert "its max shape (1, 5, 16, 16) does not fit" in message
    assert "x (-1, 4, 16, -1)" in message


def test_a_range_that_is_no_range(build: Any) -> None:
    shapes = ShapeRange((4, 4, 16, 16), (2, 4, 16, 16), (1, 4, 16, 16))
    with pytest.raises(BuildError, match="does not hold in every dimension"):
        build(trt_models.dynamic_conv(), profile={"x": shapes})


def test_a_shape_tensor_without_values(build: Any) -> None:
    with pytest.raises(BuildError, match="'s' is a shape tensor") as info:
        build(trt_models.rows_of_values())
    assert "constant" in info.value.hint


def test_dimensions_of_one_name_with_two_sizes(build: Any) -> None:
    node = helper.make_node("Add", ["x", "z"], ["y"], name="add")
    model = onnx_models.model(
        [node],
        {"x": (onnx_models.FLOAT, ["n", 4]), "z": (onnx_models.FLOAT, ["n", 4])},
        {"y": (onnx_models.FLOAT, ["n", 4])},
    )
    shapes = {"x": ShapeRange((1, 4), (2, 4), (4, 4)), "z": ShapeRange((2, 4), (4, 4), (8, 4))}
    with pytest.raises(BuildError, match="Dimensions with name n must be equal") as info:
        build(model, profile=shapes)
    assert "share a name" in info.value.hint


@pytest.mark.parametrize("kind", ["cut off", "junk", "empty", "missing"])
def test_files_that_are_no_model(build: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.onnx"
    if kind != "missing":
        whole = conv().SerializeToString()
        path.write_bytes({"cut off": whole[: len(whole) // 2], "junk": b"hello world" * 30, "empty": b""}[kind])
    with pytest.raises(BuildError, match=r"could not parse bad\.onnx"):
        build(path)


@pytest.mark.parametrize("kind", ["missing", "cut off"])
def test_external_data_that_is_not_whole(build: Any, rtx: TensorRTModule, tmp_path: Path, kind: str) -> None:
    if kind == "cut off" and rtx.release < (1, 7):
        pytest.skip("TensorRT-RTX before 1.7 builds with whatever it reads; models are checked before they come here")
    path = tmp_path / "model.onnx"
    onnx.save(conv(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    data = tmp_path / "w.bin"
    whole = data.read_bytes()
    data.unlink()
    if kind == "cut off":
        data.write_bytes(whole[:100])
    with pytest.raises(BuildError, match=r"w\.bin") as info:
        build(path)
    assert "external data" in info.value.hint


@pytest.mark.parametrize("zero_point", [0, 128])
def test_uint8_quantization_is_never_taken_for_int8(build: Any, zero_point: int) -> None:
    # With a zero point of 0 TensorRT builds an INT8 engine after no more than a warning: half of the range is lost.
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        helper.make_node("Relu", ["d"], ["y"], name="relu"),
    ]
    values: dict[str, NDArray[Any]] = {"s": np.array(0.1, np.float32), "z": np.array(zero_point, np.uint8)}
    with pytest.raises(BuildError) as info:
        build(onnx_models.elementwise(nodes, 8, values), precision="int8")
    assert "signed int8" in info.value.hint


def test_an_operator_without_a_bf16_kernel(build: Any) -> None:
    with pytest.raises(BuildError, match="Could not infer output types") as info:
        build(trt_models.operator("ConvTranspose", "bf16"), precision="bf16")
    assert "keep_fp32=" in info.value.hint
    assert "deconv" in info.value.hint


def test_the_builders_own_words_come_with_what_to_do(build: Any, rtx: TensorRTModule) -> None:
    if rtx.release >= (1, 7):
        with pytest.raises(BuildError, match="FP32 GEMM is not supported") as info:
            build(trt_models.operator("MatMul", "fp32"), target=TURING)
        assert "fp16" in info.value.hint
    with pytest.raises(BuildError, match="fp8_e4m3") as info:
        build(trt_models.operator("Conv", "fp8"), target=AMPERE, precision="fp8")
    assert "Ada" in info.value.hint
    # What the missing driver adds to a failure is no cause of it.
    assert "cudaError" not in str(info.value)


def test_an_output_whose_size_depends_on_the_data(build: Any) -> None:
    with pytest.raises(BuildError, match=r"nonzero|nz") as info:
        build(trt_models.nonzero())
    assert "depends on the data" in info.value.hint


def test_too_little_workspace(build: Any) -> None:
    with pytest.raises(BuildError, match="workspace") as info:
        build(conv(), options=BuildOptions(workspace_mib=1))
    assert "workspace_mib" in info.value.hint
    assert build(conv(), options=BuildOptions(workspace_mib=512)).bytes > 1000


def test_a_place_that_cannot_be_written(rtx: TensorRTModule, tmp_path: Path) -> None:
    path = onnx_models.save(conv(), tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tensorrt.build(rtx, path, tmp_path / "nowhere" / "engine.plan", target=AMPERE, precision="fp32")


# Options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"workspace_mib": 0}, "workspace_mib=0"),
        ({"workspace_mib": 1.5}, r"workspace_mib=1\.5"),
        ({"workspace_mib": True}, "workspace_mib=True"),
        ({"optimization_level": 6}, "optimization_level=6"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"timeout_s": "5"}, "timeout_s='5'"),
        ({"hardware_compatible": "all"}, "hardware_compatible='all'"),
        ({"optimization_level": 3}, "has no build option optimization_level"),
        ({"sparsity": True}, "has no build option sparsity"),
        ({"version_compatible": True}, "has no build option version_compatible"),
        ({"hardware_compatible": "ampere_plus"}, "has no build option hardware_compatible"),
        ({"plugins": ("nowhere.so",)}, r"nowhere\.so: no such file"),
    ],
)
def test_options_that_are_refused(build: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        build(conv(), options=BuildOptions(**options))


def test_tensorrt_itself_has_the_options_that_rtx_lacks(rtx: TensorRTModule) -> None:
    module = TensorRTModule("tensorrt", "10.13.0", rtx.handle)
    options = BuildOptions(
        optimization_level=5, sparsity=True, version_compatible=True, hardware_compatible="ampere_plus"
    )
    check_options(module, options)


def test_a_plugin_that_is_no_library(build: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.so"
    plugin.write_text("no library")
    with pytest.raises(BuildError, match=r"plugin\.so cannot be loaded as a plugin library"):
        build(conv(), options=BuildOptions(plugins=(str(plugin),)))


# Builders that hang, crash or outlive their parent


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model whose builder waits for ever: it opens its external data, a pipe that nobody writes to."""
    path = tmp_path / "endless.onnx"
    onnx.save(conv(), path, save_as_external_data=True, location="pipe.bin", size_threshold=0)
    pipe = tmp_path / "pipe.bin"
    pipe.unlink()
    os.mkfifo(pipe)
    return path


def children(pid: int) -> Iterator[int]:
    """The processes that `pid` has started."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has ended meanwhile.
        if int(fields[1]) == pid and fields[0] != "Z":
            yield int(status.parent.name)


def builder_of(pid: int) -> int:
    """The builder process of `pid`, once it has started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in children(pid):
            if b"tensorrt.builder" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        time.sleep(0.01)
    raise AssertionError("no builder process was started")


def test_a_build_that_takes_too_long_is_ended(build: Any, endless: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(BuildError, match=r"did not finish within timeout_s=1\.5 s") as info:
        build(endless, options=BuildOptions(timeout_s=1.5))
    assert time.perf_counter() - started < 30
    assert "raise timeout_s" in info.value.hint
    # ONNX Runtime's process stays for the next one that asks.
    assert not [
        pid for pid in children(os.getpid()) if b"tensorrt.builder" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    # Nobody waits to read the pipe any more.
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        os.open(endless.with_name("pipe.bin"), os.O_WRONLY | os.O_NONBLOCK)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL], ids=lambda number: number.name)
def test_a_builder_that_crashes(build: Any, endless: Path, number: signal.Signals) -> None:
    killer = threading.Thread(target=lambda: os.kill(builder_of(os.getpid()), number))
    killer.start()
    with pytest.raises(BuildError, match=rf"the builder process crashed \({number.name}\)") as info:
        build(endless)
    killer.join()
    if number is signal.SIGKILL:
        assert "memory" in info.value.hint


def test_a_builder_that_lacks_threads_says_so_and_does_not_wait_for_them(
    rtx: TensorRTModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(tensorrt_builder.RequestError) as refused:
        tensorrt_builder.build_here(rtx.handle, build_request(rtx, conv(), AMPERE, tmp_path), lambda *_: None)
    error = tensorrt._failure(rtx, "build an engine from conv.onnx", "", refused.value.errors, [])
    assert error.code == "too-many-processes"
    assert f"can't start new thread: 0 of {(os.cpu_count() or 1) + 2} were started" in error.message
    assert error.hint.startswith("raise the limit of processes")


def test_a_builder_that_python_ends(build: Any) -> None:
    sizes: Any = ("a", 4, 16, "a")
    with pytest.raises(BuildError, match=r"exit status 1; its output ends with:\nTraceback") as info:
        build(trt_models.dynamic_conv(), profile={"x": ShapeRange(sizes, sizes, sizes)})
    assert "TypeError" in str(info.value)


def test_a_builder_does_not_outlive_its_parent(endless: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pytest_trtcheck.backends.tensorrt.build import build\n"
        "from pytest_trtcheck.backends.tensorrt.module import Target, find_module\n"
        "build(find_module('tensorrt_rtx'), Path(sys.argv[1]), Path(sys.argv[2]), "
        "target=Target((8, 6), False), precision='fp32')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(endless), str(tmp_path / "engine.plan")], env=environment
    )
    try:
        builder = builder_of(parent.pid)
        time.sleep(0.5)  # Until it has asked the kernel to go with its parent.
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{builder}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{builder}").exists()


# Advice


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Node Loop_7: TensorRT cannot infer the shape of scan output 2", "unroll the loop"),
        ("Requested amount of GPU memory could not be allocated: CUDA_ERROR_OUT_OF_MEMORY", "smaller batch"),
        ("[MemUsageChange] OutOfMemory (Requested size was 123 bytes.)", "smaller batch"),
        ("cuDNN failed: CUDNN_STATUS_INTERNAL_ERROR", "where GPU memory runs out"),
        ("[cublasGemm] CUBLAS_STATUS_NOT_INITIALIZED", "where GPU memory runs out"),
        ("CUBLAS_STATUS_ALLOC_FAILED", "smaller batch"),
        ("No importer registered for op: MyOp. Attempting to import as plugin.", "name a plugin library"),
        ("Dimensions with name batch must be equal. Condition '==' violated: 1 != 2", "share a name"),
        ("nothing that is known", None),
    ],
)
@pytest.mark.parametrize("is_rtx", [True, False])
def test_advice_on_common_messages(said: str, expected: str | None, is_rtx: bool) -> None:
    pieces = advice(said, is_rtx=is_rtx)
    assert pieces == [] if expected is None else any(expected in piece for piece in pieces)


def test_advice_on_rtx_is_for_rtx_alone() -> None:
    said = "Cannot compile operation 'gemm' for Turing (SM75): FP32 GEMM is not supported"
    assert advice(said, is_rtx=True)
    assert advice(said, is_rtx=False) == []


def test_the_integer_types_of_onnx_keep_their_element_type(build: Any) -> None:
    assert TensorProto.INT64 in {value.type.tensor_type.elem_type for value in trt_models.many_types().graph.input}
    assert build(trt_models.many_types()).bytes > 1000


def test_dimensions_called_question_mark_may_differ(build: Any) -> None:
    dims: list[int | str] = [1, 3, "?", "?"]
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    proto = onnx_models.model([node], {"x": (onnx_models.FLOAT, dims)}, {"y": (onnx_models.FLOAT, dims)})
    shape = (1, 3, 8, 24)
    plan = build(proto, profile={"x": ShapeRange(shape, shape, shape)})
    assert plan.io["inputs"][0]["shape"] == list(shape)


# What lowering leans on


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_tensorrt_has_no_fp64(build: Any, precision: Precision, tmp_path: Path) -> None:
    """Its parser makes FP32 of it, inputs and outputs too; so does `precision.double`, behind casts."""
    double = TensorProto.DOUBLE
    steps = [helper.make_node("MatMul", ["x", "w"], ["a"], name="mm"), helper.make_node("Relu", ["a"], ["y"], name="r")]
    weights = {"w": onnx_models.weights((8, 8), 1).astype(np.float64)}
    proto = onnx_models.model(steps, {"x": (double, [2, 8])}, {"y": (double, [2, 8])}, weights)
    model = open_model(proto, (), Cache(tmp_path / "cache"))
    lowered = lower(model, precision, Cache(tmp_path / "cache"))
    for path in (model.path, lowered.path):
        plan = build(path, precision=precision)
        assert [(tensor["name"], tensor["dtype"]) for tensor in (*plan.io["inputs"], *plan.io["outputs"])] == [
            ("x", "FLOAT"),
            ("y", "FLOAT"),
        ]
