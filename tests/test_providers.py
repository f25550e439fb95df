"""ONNX Runtime's GPU providers as far as a CPU tells: what is missing, what fell back, options, caches, and timing.

The machinery runs on ONNX Runtime's own CPU provider where it must run; `tests/test_providers_loaded.py` loads the real
libraries, `tests/gpu/test_providers.py` runs what a GPU can.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest

from pytest_trtcheck import backends
from pytest_trtcheck.backends.base import Built, EngineSpec, Machine
from pytest_trtcheck.backends.onnxruntime import building, placement, session, tensorrt_rtx
from pytest_trtcheck.backends.onnxruntime import tensorrt as ort_tensorrt
from pytest_trtcheck.backends.onnxruntime.backend import EmulatedProvider, OrtProvider
from pytest_trtcheck.backends.onnxruntime.building import CONTEXT
from pytest_trtcheck.backends.onnxruntime.compiled import CompilingProvider
from pytest_trtcheck.backends.onnxruntime.cuda import OrtCuda
from pytest_trtcheck.backends.onnxruntime.options import Counterparts, profile_shapes
from pytest_trtcheck.backends.onnxruntime.tensorrt import OrtTensorRT
from pytest_trtcheck.backends.onnxruntime.tensorrt_rtx import OrtTensorRTRtx
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.errors import ArgumentError, BuildError, GpuError, MissingDependencyError, UnsupportedTargetError
from pytest_trtcheck.gpu.device import Gpu
from pytest_trtcheck.gpu.names import model_of
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import Lowered
from pytest_trtcheck.record import NodeRecord, PartitionRecord
from pytest_trtcheck.spec import BuildOptions, ShapeRange
from tests.onnx_models import FLOAT, model, save, weights
from tests.providers.models import reshaped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from tests.conftest import Suite

ALL = {
    "onnxruntime-cuda": OrtCuda,
    "onnxruntime-tensorrt": OrtTensorRT,
    "onnxruntime-tensorrt-rtx": OrtTensorRTRtx,
}
GPU = Gpu(
    name="NVIDIA RTX 4090",
    model=model_of("NVIDIA RTX 4090", (8, 9), ()),
    compute_capability=(8, 9),
    uuid="GPU-1",
    memory_bytes=24 << 30,
)
HERE, NOWHERE = Machine(detected=GPU), Machine(no_gpu="there is no GPU")


@pytest.fixture
def opened(tmp_path: Path) -> OnnxModel:
    """That model."""
    path = tmp_path / "reshaped.onnx"
    save(reshaped(), path)
    return open_model(path, (), Cache(tmp_path / "cache"))


def spec_of(found: OnnxModel, **changes: Any) -> EngineSpec:
    profile = {"x": ShapeRange((1, 8), (2, 8), (4, 8))}
    return replace(EngineSpec(found, Lowered(found.path, found.sha256), "fp32", profile, BuildOptions()), **changes)


# --- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_each_is_known_by_either_spelling(name: str) -> None:
    assert backends.find_name(name.replace("-", "_")) == backends.find_name(name) == name
    assert backends.load(name) is ALL[name]
    assert str(ALL[name].name) == name
    assert backends.find_name("onnxruntime") == backends.EMULATED == "onnxruntime"


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is here")
def test_an_onnxruntime_without_the_provider_is_an_error_before_the_first_test(suite: Suite, name: str) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=2)\ndef test_it(): ...\n')
    run = suite.run_apart(f"--trt-backend={name.replace('-', '_')}")
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"onnxruntime {onnxruntime.__version__} has no {ALL[name].provider}" in run.text
    assert "pip uninstall onnxruntime" in run.text


def test_a_marker_that_names_one_fails_its_test_alone(suite: Suite) -> None:
    suite.write(
        test_it="""
@trt_parity("conv.onnx", batch=2, backend="onnxruntime-tensorrt-rtx")
def test_rtx(): ...

@trt_parity("conv.onnx", batch=2)
def test_other(): ...
"""
    )
    run = suite.run()
    run.result.assert_outcomes(passed=1, failed=1)
    assert "pip install onnxruntime-ep-nv-tensorrt-rtx" in run.check("test_rtx")["message"]


def test_of_two_onnxruntimes_the_one_that_is_imported_counts(tmp_path: Path) -> None:
    for name, version in (("onnxruntime", "0.1"), ("onnxruntime_gpu", "0.2")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        about = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (folder / "METADATA").write_text(about)
    code = "from pytest_trtcheck.model import onnxruntime as ort; print(ort.version())"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.strip() == onnxruntime.__version__


PLUGIN = """
__version__ = "0.5.0"

def get_library_path():
    return {path!r}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A package by the name of the RTX plugin's, whose library is this file."""

    def install(path: str) -> None:
        folder = tmp_path / "site" / "onnxruntime_ep_nv_tensorrt_rtx"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(PLUGIN.format(path=path))
        monkeypatch.syspath_prepend(folder.parent)
        monkeypatch.delitem(sys.modules, folder.name, raising=False)
        importlib.invalidate_caches()
        tensorrt_rtx.register.cache_clear()

    return install


@pytest.mark.skipif(not hasattr(onnxruntime, "register_execution_provider_library"), reason="it takes no plugins yet")
def test_a_plugin_that_is_no_library_is_an_error_that_quotes_the_loader(
    plugin: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "no_library.so").write_text("this is text")
    plugin(str(tmp_path / "no_library.so"))
    try:
        with pytest.raises(MissingDependencyError, match=r"cannot be registered: .*no_library\.so"):
            OrtTensorRTRtx.find(NOWHERE)
    finally:
        tensorrt_rtx.register.cache_clear()


def test_a_plugin_without_a_driver_or_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = "libcuda.so.1: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(tensorrt_rtx, "version", lambda: "0.5.0")
    monkeypatch.setattr(tensorrt_rtx, "register", lambda: lacks)
    found = OrtTensorRTRtx.find(NOWHERE)
    assert found.is_emulation
    assert f"its plugin 0.5.0 cannot be registered: {lacks} (there is no GPU)" in found.no_engine
    with pytest.raises(MissingDependencyError, match="libcuda"):
        OrtTensorRTRtx.find(HERE)
    monkeypatch.setattr(tensorrt_rtx, "register", lambda: "")
    monkeypatch.setattr(tensorrt_rtx, "devices", list)
    assert "registers and shows no device (there is no GPU)" in OrtTensorRTRtx.find(NOWHERE).no_engine
    with pytest.raises(UnsupportedTargetError, match="shows no device, and NVIDIA RTX 4090"):
        OrtTensorRTRtx.find(HERE)


def test_what_stands_in_without_a_gpu_refuses_what_the_provider_refuses(tmp_path: Path) -> None:
    stand_in = EmulatedProvider("why", provider=OrtCuda)
    assert "no INT8 kernels" in (stand_in.why_not("int8+fp16", ()) or "")
    assert stand_in.why_not("fp16", ()) is None
    lowered = Lowered(tmp_path / "none.onnx", "0" * 64)
    with pytest.raises(ArgumentError, match=r"CUDA provider has no counterpart of the build option workspace_mib=64"):
        stand_in.accepts(lowered, "model", BuildOptions(workspace_mib=64), Cache(tmp_path), will_build=False)


# --- options ---------------------------------------------------------------------------------------------------------


def test_every_build_option_is_mapped_or_refused_by_its_name() -> None:
    values: dict[str, Any] = {
        "tf32": True,
        "workspace_mib": 64,
        "optimization_level": 2,
        "sparsity": True,
        "version_compatible": True,
        "hardware_compatible": "ampere_plus",
        "max_aux_streams": 0,
        "tiling": "fast",
        "l2_limit_mib": 1,
        "refit": True,
        "strip_weights": True,
        "weight_streaming_mib": 512,
        "min_subgraph_size": 5,
        "dla_core": 1,
        "preview": ("ALIASED_PLUGIN_IO_10_03",),
        "configure": compile_here,
        "plugins": (__file__,),
    }
    expected = {
        OrtCuda: {"tf32": {"use_tf32": "1"}},
        OrtTensorRT: {
            "tf32": {},
            "workspace_mib": {"trt_max_workspace_size": str(64 << 20)},
            "optimization_level": {"trt_builder_optimization_level": "2"},
            "sparsity": {"trt_sparsity_enable": "True"},
            "hardware_compatible": {"trt_engine_hw_compatible": "True"},
            "max_aux_streams": {"trt_auxiliary_streams": "0"},
            "min_subgraph_size": {"trt_min_subgraph_size": "5"},
            "dla_core": {"trt_dla_enable": "True", "trt_dla_core": "1"},
            "preview": {"trt_preview_features": "ALIASED_PLUGIN_IO_10_03"},
            "plugins": {"trt_extra_plugin_lib_paths": str(Path(__file__).resolve())},
        },
        OrtTensorRTRtx: {
            "tf32": {},
            "workspace_mib": {"nv_max_workspace_size": str(64 << 20)},
            "weight_streaming_mib": {"nv_weight_streaming_budget": "512M"},
        },
    }
    ours = {"io", "custom_ops", "timeout_s", "timing_cache"}
    assert {*values, *ours} == set(BuildOptions.__dataclass_fields__)
    for provider, mapped in expected.items():
        for name, value in values.items():
            options = BuildOptions(**{name: value})
            if name in mapped:
                assert provider.counterparts.of(options, "it") == mapped[name], (provider, name)
            else:
                with pytest.raises(ArgumentError, match=f"it has no counterpart of the build option {name}="):
                    provider.counterparts.of(options, "it")
        assert provider.counterparts.of(BuildOptions(timeout_s=5, timing_cache=False, io="fp16"), "it") == {}


@pytest.mark.parametrize(
    ("provider", "options", "why"),
    [
        (OrtTensorRT, BuildOptions(tf32=False), "it leaves TF32 on"),
        (OrtTensorRT, BuildOptions(hardware_compatible="same_compute_capability"), "Ampere and later alone"),
        (OrtTensorRT, BuildOptions(preview=("-ONE",)), "none off"),
        (OrtTensorRTRtx, BuildOptions(tf32=False), "TF32 for FP32, whatever"),
    ],
)
def test_a_value_without_a_counterpart_is_refused_with_the_reason(
    provider: type[OrtProvider], options: BuildOptions, why: str
) -> None:
    with pytest.raises(ArgumentError, match=why):
        provider.counterparts.of(options, "it")


def test_budgets_of_streamed_weights() -> None:
    written = OrtTensorRTRtx.counterparts.written["weight_streaming_mib"]
    assert [written(value)["nv_weight_streaming_budget"] for value in ("auto", 0, 3)] == ["-1", "1", "3M"]


def test_the_profile_is_written_for_each_end() -> None:
    profile = {
        "x": ShapeRange((1, 3), (2, 3), (8, 3)),
        "scalar": ShapeRange((), (), ()),
        "y": ShapeRange((1,), (1,), (1,)),
    }
    assert profile_shapes(profile, "nv_profile") == {
        "nv_profile_min_shapes": "x:1x3,y:1",
        "nv_profile_opt_shapes": "x:2x3,y:1",
        "nv_profile_max_shapes": "x:8x3,y:1",
    }
    assert profile_shapes({}, "trt_profile") == {}


# --- who computed what -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnCpu(OrtProvider):
    """The shared machinery on the CPU provider, which every ONNX Runtime has."""

    name: ClassVar[str] = "on-cpu"
    provider: ClassVar[str] = placement.CPU
    says: ClassVar[str] = "CPU provider"
    counterparts: ClassVar[Counterparts] = Counterparts({})


@dataclass(frozen=True)
class OnAzure(OnCpu):
    """On a provider that is there, starts, and takes no node."""

    name: ClassVar[str] = "on-azure"
    provider: ClassVar[str] = "AzureExecutionProvider"
    says: ClassVar[str] = "Azure provider"


def test_nodes_are_counted_by_provider_and_type(opened: OnnxModel) -> None:
    system, case = OnCpu(GPU), {"x": np.ones((2, 8), np.float32)}
    built = system.build(spec_of(opened), Cache(opened.path.parent))
    with system.opened(built) as runner:
        assert system.partition(built, runner) is None
        assert system.doubt(built, runner, case) is None
        found = system.partition(built, runner)
        expected = np.maximum(case["x"] @ weights((8, 8), 1), 0)
        np.testing.assert_allclose(runner(case)["y"], expected, rtol=1e-5)
    assert found is not None
    assert (found.provider, found.elsewhere, found.subgraphs) == (placement.CPU, (), ())
    assert found.kernels
    assert found.kernels["fp32"] >= 3


@pytest.mark.skipif("AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="there is no Azure")
def test_a_provider_that_takes_no_node_is_caught_and_every_node_named(opened: OnnxModel) -> None:
    system, case = OnAzure(GPU), {"x": np.ones((2, 8), np.float32)}
    built = system.build(spec_of(opened), Cache(opened.path.parent))
    with system.opened(built) as runner:
        doubt = system.doubt(built, runner, case)
        found = system.partition(built, runner)
    assert doubt is not None
    assert "no node of the model is computed by ONNX Runtime" in doubt
    assert "product (MatMul, CPUExecutionProvider)" in doubt
    assert found is not None
    assert {node.name for node in found.elsewhere} == {"product", "relu", "reshape"}
    assert found.shapes_on_cpu == 3


def test_a_provider_that_did_not_start_is_an_error(opened: OnnxModel) -> None:
    absent = next(name for name in ("CUDAExecutionProvider", "CoreMLExecutionProvider") if not _is_available(name))
    with pytest.warns(UserWarning, match="not in available provider names"), pytest.raises(Exception, match=absent):
        session.open_session(opened.path, session.session_options({}), [(absent, {})], "model")


def _is_available(name: str) -> bool:
    return name in onnxruntime.get_available_providers()


def test_a_session_that_left_the_provider_out_is_refused(opened: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession

    def without_provider(path: str, options: Any, **given: Any) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_provider)
    with pytest.raises(GpuError, match="did not start CUDAExecutionProvider, and would run the model on CPU"):
        session.open_session(opened.path, session.session_options({}), [("CUDAExecutionProvider", {})], "model")


def test_nodes_that_compute_from_shapes_are_told_apart(opened: OnnxModel, tmp_path: Path) -> None:
    assert placement.of_shapes(opened.path) == {"shape", "first", "together"}
    from onnx import helper

    # A value of the input among the operands: it is data, whatever its type. And a weight is no shape.
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "which"], ["y"], name="picked"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], name="weight"),
        helper.make_node("Mul", ["x", "w"], ["z"], name="scaled"),
    ]
    values: dict[str, NDArray[Any]] = {"q": np.ones(8, np.int8), "scale": np.array(0.5, np.float32)}
    path = tmp_path / "picked.onnx"
    outputs: dict[str, tuple[int, list[int | str]]] = {"y": (7, [1]), "z": (FLOAT, ["n", 8])}
    save(model(nodes, {"x": (FLOAT, ["n", 8]), "which": (7, [1])}, outputs, values), path)
    assert placement.of_shapes(path) == {"shape"}


def nodes(*names: str, provider: str = placement.CPU) -> tuple[NodeRecord, ...]:
    return tuple(NodeRecord(name, "Add", provider) for name in names)


def test_what_fell_back_fails_unless_it_is_allowed() -> None:
    trt, cuda = "TensorrtExecutionProvider", placement.CUDA
    whole = PartitionRecord(trt, 5, (5,))
    assert placement.fault(whole, "it", "int8", None) is None
    on_cuda = PartitionRecord(trt, 5, (2, 3), nodes("between", provider=cuda))
    assert placement.fault(on_cuda, "it", "fp16", None) == (
        f"1 node fell back from it to another provider: between (Add, {cuda})"
    )
    assert placement.fault(on_cuda, "it", "fp16", 2) is None
    assert placement.fault(on_cuda, "it", "fp16", 1) == (
        f"it divides the model into 2 subgraphs (2 nodes, 3 nodes), with between (Add, {cuda}) between them: "
        "max_subgraphs=1 was asked for"
    )
    # CUDA computes INT8 in float, and the CPU everything in FP32.
    assert "fell back" in (placement.fault(on_cuda, "it", "int8", 2) or "")
    assert "fell back" in (placement.fault(on_cuda, "it", "fp8+fp16", 2) or "")
    on_cpu = PartitionRecord(trt, 5, (2, 3), nodes("a", "b"))
    assert "2 nodes fell back" in (placement.fault(on_cpu, "it", "fp16", 2) or "")
    assert "no node of the model" in (placement.fault(PartitionRecord(trt, 0), "it", "fp32", None) or "")
    assert on_cuda.text == f"{trt}: 2 subgraphs (2 nodes, 3 nodes); 1 elsewhere: between (Add, {cuda})"


def test_a_profile_tells_of_casts_that_no_plan_has() -> None:
    def event(name: str, operator: str, provider: str, kind: str) -> dict[str, Any]:
        arguments = {"op_name": operator, "provider": provider, "input_type_shape": [{kind: [1]}, {"float": [1]}]}
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": arguments}

    found = placement.read_profile(
        [
            {"cat": "Session", "name": "model_loading"},
            event("a", "MatMul", placement.CUDA, "float16"),
            event("a", "MatMul", placement.CUDA, "float16"),
            event("copy", "MemcpyToHost", placement.CUDA, "float16"),
            event("InsertedCast", "Cast", placement.CPU, "float16"),
            event("ids", "Gather", placement.CUDA, "int64"),
        ]
    )
    assert [(group.provider, group.nodes[0].name) for group in found.groups] == [
        (placement.CUDA, "a"),
        (placement.CPU, "InsertedCast"),
        (placement.CUDA, "ids"),
    ]
    assert found.kernels[placement.CUDA] == {"fp16": 1, "fp32": 1}


# --- engines that are built once -------------------------------------------------------------------------------------


def compile_here(request: dict[str, Any]) -> Any:
    """What stands for a provider that compiles: it copies the model, and tells what it was given."""
    folder = Path(request["folder"])
    options = request["options"]
    if options.get("hang"):
        time.sleep(60)
    if options.get("fail"):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : the model is too good")
    if options.get("crash"):
        print("these are its last words", flush=True)
        os.abort()
    (folder / CONTEXT).write_bytes(Path(request["model"]).read_bytes())
    (folder / "options.json").write_text(json.dumps(options))
    asked = session.session_options(dict([placement.RECORD]))
    return session.open_session(Path(request["model"]), asked, [(placement.CPU, {})], "the build")


@dataclass(frozen=True)
class Compiling(CompilingProvider):
    """A provider that compiles, on the CPU provider."""

    release: str = "1.0"

    name: ClassVar[str] = "compiling"
    provider: ClassVar[str] = placement.CPU
    says: ClassVar[str] = "compiling provider"
    prefix: ClassVar[str] = "trt"
    ships: ClassVar[tuple[Any, ...]] = ("tensorrt",)
    compile_by: ClassVar[str] = f"{__name__}:compile_here"
    counterparts: ClassVar[Counterparts] = Counterparts(
        {
            "workspace_mib": lambda value: {"workspace": str(value)},
            "refit": lambda _: {"hang": "1"},
            "sparsity": lambda _: {"fail": "1"},
            "strip_weights": lambda _: {"crash": "1"},
        }
    )

    def rests_on(self) -> dict[str, str]:
        return {"release": self.release}


def test_a_second_session_builds_nothing_and_a_change_builds_again(
    opened: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, spec = Compiling(GPU), spec_of(opened)
    first = system.build(spec, Cache(tmp_path / "cache"))
    assert first.record is not None
    assert not first.record.cached
    assert first.path.name == CONTEXT
    assert first.entry is not None
    given = json.loads((first.entry.path / "options.json").read_text())
    assert given == {
        "trt_profile_min_shapes": "x:1x8",
        "trt_profile_opt_shapes": "x:2x8",
        "trt_profile_max_shapes": "x:4x8",
    }
    files = {path: path.stat().st_mtime_ns for path in first.entry.path.rglob("*")}

    began = time.perf_counter()
    again = system.build(spec, Cache(tmp_path / "cache"))
    took_s = time.perf_counter() - began
    assert again.record is not None
    assert again.record.cached
    assert again.path == first.path
    assert {path: path.stat().st_mtime_ns for path in first.entry.path.rglob("*")} == files
    assert took_s < first.record.build_s

    # What decides is the key: a process for each of these would only take long.
    monkeypatch.setattr(building, "build", lambda *_: {"build_s": 0.0, "groups": []})

    def is_new(other: Compiling = system, **changes: Any) -> bool:
        record = other.build(replace(spec, **changes), Cache(tmp_path / "cache")).record
        assert record is not None
        return not record.cached and record.key != first.record.key  # type: ignore[union-attr]

    assert is_new(profile={"x": ShapeRange((1, 8), (2, 8), (8, 8))})
    assert is_new(options=BuildOptions(workspace_mib=1))
    assert is_new(lowered=Lowered(opened.path, "f" * 64))
    assert is_new(precision="fp16")
    assert is_new(replace(system, release="1.1"))
    assert is_new(replace(system, gpu=replace(GPU, driver="581.0")))
    # Into how many pieces a model may go decides nothing of what is built.
    assert system.build(replace(spec, max_subgraphs=3), Cache(tmp_path / "cache")).record.cached  # type: ignore[union-attr]


def test_a_compiled_model_runs_and_its_pieces_are_counted(opened: OnnxModel, tmp_path: Path) -> None:
    system, case = Compiling(GPU), {"x": np.ones((2, 8), np.float32)}
    built = system.build(spec_of(opened, precision="fp16"), Cache(tmp_path / "cache"))
    with system.opened(built) as runner:
        assert system.doubt(built, runner, case) is None
        found, notes = system.partition(built, runner), system.notes(built, runner)
        assert runner(case)["y"].shape == (2, 8)
    assert found is not None
    assert sum(found.subgraphs) == found.nodes == 6
    assert any(note.startswith("fp16 is stated, not proved: ") for note in notes)
    record = system.described(built, runner)
    assert record is not None
    assert record.proved is False


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"fp16": 3, "fp32": 1}, None),
        ({"fp32": 4}, "fp16 did not take effect: the engine inspector lists 4 in fp32"),
    ],
)
def test_the_engine_proves_the_precision_and_the_options_do_not(
    opened: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: dict[str, int], said: str | None
) -> None:
    monkeypatch.setattr(Compiling, "_layers", lambda *_: (layers, ""))
    system, case = Compiling(GPU), {"x": np.ones((2, 8), np.float32)}
    built = system.build(spec_of(opened, precision="fp16"), Cache(tmp_path / "cache"))
    with system.opened(built) as runner:
        assert system.doubt(built, runner, case) == said
        record, notes = system.described(built, runner), system.notes(built, runner)
    assert record is not None
    assert record.layers_by_precision == layers
    assert record.proved is True
    assert not any("not proved" in note for note in notes)


def test_what_a_provider_writes_beside_its_engines_is_not_in_the_cache(
    opened: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several engines have no EPContext model: the provider looks for them, and writes those that it builds again."""
    key = Key("provider_engine", "m", {})

    def engine(folder: Path) -> None:
        (folder / "engines").mkdir()
        (folder / "engines" / "one.engine").write_bytes(b"one")

    cache = Cache(tmp_path / "cache")
    folders: list[Path] = []

    def writing(path: Path, _: Any, given: Any, label: str) -> Any:
        folders.append(Path(given[0][1]["trt_engine_cache_path"]))
        assert (folders[-1] / "one.engine").read_bytes() == b"one"
        (folders[-1] / "one.engine").write_bytes(b"again")
        (folders[-1] / "two.engine").write_bytes(b"two")
        return session.open_session(path, session.session_options({}), [(placement.CPU, {})], label)

    monkeypatch.setattr(ort_tensorrt, "open_session", writing)
    system = OrtTensorRT(GPU)
    built = Built(spec_of(opened), opened.path, entry=cache.get_or_make(key, engine))
    runner = system.load(built)
    assert runner({"x": np.ones((2, 8), np.float32)})["y"].shape == (2, 8)
    assert folders[0].exists()
    runner.close()
    gc.collect()
    assert not folders[0].exists()
    kept = Cache(tmp_path / "cache").get(key)
    assert kept is not None
    assert [path.read_bytes() for path in kept.path.rglob("*.engine")] == [b"one"]


def test_the_engine_in_a_context_model_is_given_to_the_inspector(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from onnx import helper

    engines = tmp_path / "engines"
    engines.mkdir()
    save(reshaped(), tmp_path / "model.onnx")
    tensorrt.build(
        find_module("tensorrt_rtx"),
        tmp_path / "model.onnx",
        engines / "one.engine",
        target=Target((8, 9), here=False),
        precision="fp32",
        profile={"x": ShapeRange((1, 8), (2, 8), (4, 8))},
    )
    held: dict[str, Any] = {"embed_mode": 0, "ep_cache_context": "engines/one.engine"}
    node = helper.make_node("EPContext", ["x"], ["y"], "whole", domain="com.microsoft", **held)
    ends = [helper.make_tensor_value_info(name, FLOAT, ["n", 8]) for name in ("x", "y")]
    graph = helper.make_graph([node], "context", ends[:1], ends[1:])
    # ONNX has no such operator, so its checker is not asked.
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("com.microsoft", 1)]), tmp_path / CONTEXT)

    class OfRtx(Compiling):
        ships = ("tensorrt_rtx",)

    layers, why = OfRtx(GPU)._layers(tmp_path, Cache(tmp_path / "cache"))
    # Without the GPU that it was compiled for, its loader has the word.
    assert layers is None
    assert "cannot load" in why
    assert Compiling(GPU)._layers(tmp_path, Cache(tmp_path / "cache"))[0] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (BuildOptions(refit=True, timeout_s=3), "it did not finish within timeout_s=3 s"),
        (BuildOptions(sparsity=True), "could not build .*reshaped.onnx in fp32: the model is too good"),
        (BuildOptions(strip_weights=True), r"crashed \(SIGABRT\); its output ends with:\nthese are its last words"),
    ],
)
def test_a_build_that_fails_hangs_or_crashes_is_an_error_that_quotes_it(
    opened: OnnxModel, tmp_path: Path, options: BuildOptions, said: str
) -> None:
    with pytest.raises(BuildError, match=said):
        Compiling(GPU).build(spec_of(opened, options=options), Cache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob(CONTEXT))


def test_fp32_is_tf32_where_the_provider_leaves_it_on() -> None:
    turing = replace(GPU, compute_capability=(7, 5))
    assert OrtTensorRT(GPU).computes_in("fp32") == "tf32"
    assert OrtTensorRT(turing).computes_in("fp32") == "fp32"
    assert OrtTensorRTRtx(GPU).computes_in("fp32") == "tf32"
    assert OrtCuda(GPU).computes_in("fp32") == "fp32"


# --- measuring -------------------------------------------------------------------------------------------------------


def test_runs_are_timed_by_the_host_until_they_are_done(opened: OnnxModel) -> None:
    system = OnCpu(GPU)
    built = system.build(spec_of(opened), Cache(opened.path.parent))
    cases: list[Mapping[str, Any]] = [{"x": np.full((2, 8), value, np.float32)} for value in (1, 2)]
    with system.opened(built) as runner, system.timed_runs(runner, cases, transfers=True) as timed:
        began = time.perf_counter()
        samples = timed.run(50)
        took_ms = 1000 * (time.perf_counter() - began)
        first = timed.mark()
        timed.launch()
        assert timed.mark() > first
        assert "in the host's memory" in timed.measured
    assert samples.run_ms.shape == (50,)
    assert samples.latency_ms is samples.run_ms
    assert samples.enqueue_ms is None
    assert (samples.interval_ms >= samples.run_ms).all()
    assert samples.run_ms.sum() < took_ms


class Placed:
    """ONNX Runtime's values and bindings, as the places of what was bound; the GPU holds `room` values."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.OrtValue = self.module = self
        self.bound: list[list[str]] = []

    def ortvalue_from_numpy(self, _array: object, device: str = "host", *_which: object) -> str:
        self.room -= device != "host"
        if device != "host" and self.room < 0:
            raise RuntimeError("out of memory")
        return device

    def ortvalue_from_numpy_with_onnx_type(self, _array: object, _code: int) -> str:
        return "host"

    def io_binding(self) -> Any:
        places: list[str] = []
        self.bound.append(places)
        return SimpleNamespace(
            bind_ortvalue_input=lambda _name, value: places.append(value),
            bind_output=lambda _name, device="host", *_which: places.append(device),
        )

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="y")]


@pytest.mark.parametrize(
    ("room", "dtype", "place"), [(9, "float32", "cuda"), (2, "float32", "host"), (9, "bfloat16", "host")]
)
def test_all_that_is_measured_lies_where_it_is_said_to(
    monkeypatch: pytest.MonkeyPatch, room: int, dtype: str, place: str
) -> None:
    placed = Placed(room)
    monkeypatch.setattr("pytest_trtcheck.model.onnxruntime.module", lambda: placed)
    runner: Any = SimpleNamespace(session=placed, converted=lambda case: case)
    timed = session.HostTimedRuns(runner, [{"x": np.zeros((2, 8), np.dtype(dtype))}] * 3)
    assert ("on the GPU" if place == "cuda" else "in the host's memory") in timed.measured
    assert placed.bound[-3:] == [[place, place]] * 3


# --- what users see --------------------------------------------------------------------------------------------------


def test_max_subgraphs_is_checked_as_an_argument_and_said_not_to_be_checked(suite: Suite) -> None:
    suite.write(
        test_it="""
@trt_parity("conv.onnx", batch=2, max_subgraphs=1)
def test_whole(): ...

@trt_parity("conv.onnx", batch=2, max_subgraphs=0)
def test_none(): ...
"""
    )
    run = suite.run()
    run.result.assert_outcomes(passed=1, errors=1)
    notes = run.check("test_whole")["notes"]
    assert any(note.startswith("max_subgraphs=1 was not checked: ") for note in notes)
    assert "max_subgraphs=0: expected an integer of at least 1" in run.text
