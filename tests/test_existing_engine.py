"""An engine that exists: what its file tells, what is refused before it is loaded, what comes of what it tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.backends.base import Built, Machine
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt import existing, plan_file, trial
from pytest_trtcheck.backends.tensorrt.io import TensorSpec, check_inputs
from pytest_trtcheck.backends.tensorrt.module import Target, TensorRTModule, find_module
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import GpuError, InputError, ModelError
from pytest_trtcheck.gpu import device, find_gpu
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.spec import ShapeRange
from tests import another_tensorrt, onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.record import LayerRecord
    from tests.conftest import Run, Suite

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)

A100 = (8, 0)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """Real plans of conv_net at batch 2, by compute capability (80, 89, …); for Turing of a Relu."""
    folder = tmp_path_factory.mktemp("plans")
    whole = onnx_models.save(onnx_models.conv_net(batch=2), folder / "conv.onnx")
    relu = onnx_models.save(onnx_models.elementwise([helper.make_node("Relu", ["x"], ["y"])], 8), folder / "relu.onnx")
    rtx = find_module("tensorrt_rtx")

    def plan(sm: int) -> bytes:
        path = folder / f"sm{sm}.plan"
        if not path.exists():
            model = relu if sm == 75 else whole
            tensorrt.build(rtx, model, path, target=Target(divmod(sm, 10), here=False), precision="fp16")
        return path.read_bytes()

    return plan


@pytest.fixture
def project(suite: Suite, built: Callable[[int], bytes]) -> Suite:
    """A suite with a plan for the A100 beside the model that it was built from."""
    (suite.path / "a100.plan").write_bytes(built(80))
    return suite


CHECKED = '@trt_parity("conv.onnx", batch=2, engine={!r})\ndef test_it(): ...\n'


def message(suite: Suite, engine: str, *arguments: str) -> str:
    """What the one check of an engine says."""
    suite.write(test_it=CHECKED.format(engine))
    (record,) = suite.run("--trt-gpu=A100", *arguments).checks
    return f"{record['verdict']}: {record['message']}"


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 120, 121])
def test_a_plan_tells_who_built_it_for_which_gpu(built: Callable[[int], bytes], tmp_path: Path, sm: int) -> None:
    path = tmp_path / "it.plan"
    path.write_bytes(built(sm))
    file = plan_file.opened(path, "it.plan", Cache(tmp_path / "cache"))
    assert file.builder == find_module("tensorrt_rtx").title
    assert file.targets == (divmod(sm, 10),)
    assert file.bytes == path.stat().st_size


def test_a_plan_for_gpus_that_are_not_listed_leaves_the_loader_to_say(built: Callable[[int], bytes]) -> None:
    assert plan_file._targets(0x7E) is None  # As `num_compute_capabilities = 0` builds them.
    assert plan_file._targets(0) is None
    assert plan_file._targets(0b1010) == ((8, 0), (8, 9))


def trt_plan(version: tuple[int, int, int, int] = (10, 3, 0, 26)) -> bytes:
    """The beginning of a plan of TensorRT, as `trtexec --getPlanVersionOnly` reads it."""
    return b"ftrt\0\0\0\0" + bytes(16) + bytes(version) + bytes(400)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.plan", b"", "the engine file is empty"),
        ("cut.plan", 5000, "is cut off: it has 5,000 of"),
        ("head.plan", 20, "is cut off: it has 20 bytes"),
        ("text.plan", b"I am no engine, whatever they call me\n", "it is text that begins with 'I am no engine"),
        ("zip.plan", b"PK\x03\x04" + bytes(60), "it is an archive"),
        ("lfs.plan", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        ("other.plan", bytes(range(1, 90)), "it begins with the bytes 01 02 03 04"),
        ("trt.plan", trt_plan(), "is an engine of TensorRT 10.3.0.26, which is not installed: TensorRT-RTX"),
        ("conv.onnx", None, "is an ONNX model (Conv, Relu, Add and 3 more), no engine"),
        ("missing.plan", None, "missing.plan: no such engine file"),
    ],
)
def test_what_is_no_engine_for_here_is_an_error_that_says_what_it_is(
    project: Suite, built: Callable[[int], bytes], name: str, content: bytes | int | None, said: str
) -> None:
    if content is not None:
        (project.path / name).write_bytes(built(80)[:content] if isinstance(content, int) else content)
    found = message(project, name)
    assert found.startswith(f"error: {name}: ")
    assert said in found
    assert "→" in found


def test_the_plan_behind_the_metadata_of_ultralytics_is_found(project: Suite, built: Callable[[int], bytes]) -> None:
    metadata = json.dumps({"description": "Ultralytics YOLO", "stride": 32, "names": {"0": "cat"}}).encode()
    for name, plan in {"yolo.engine": built(80), "cut.engine": built(80)[:4000]}.items():
        (project.path / name).write_bytes(len(metadata).to_bytes(4, "little") + metadata + plan)
    assert message(project, "yolo.engine").startswith("not_measured: yolo.engine: not run")
    assert "is cut off: it has 4,000 of" in message(project, "cut.engine")
    file = plan_file.opened(project.path / "yolo.engine", "yolo.engine", Cache(project.path / "cache"))
    assert file.path.read_bytes() == built(80)
    assert file.notes == (f"the plan lies behind {4 + len(metadata)} bytes of metadata, as Ultralytics writes it",)


def test_a_plan_for_another_gpu_names_both(project: Suite, built: Callable[[int], bytes]) -> None:
    (project.path / "l4.plan").write_bytes(built(89))
    found = message(project, "l4.plan")
    assert found.startswith("error: l4.plan: was compiled for compute capability 8.9, and A100 has 8.0")


def test_another_release_is_refused_and_a_later_build_of_the_same_is_not() -> None:
    file = plan_file.PlanFile(Path("p"), "p", "0", 1, "tensorrt_rtx", (1, 5, 0, 114))
    plan_file.refuse_unfit(file, TensorRTModule("tensorrt_rtx", "1.5.0.120", None), None, "A100", A100)
    for other in ("1.5.1.1", "1.7.1.116"):
        with pytest.raises(ModelError, match=r"built by TensorRT-RTX 1\.5\.0\.114, and TensorRT-RTX 1\.\d\.1"):
            plan_file.refuse_unfit(file, TensorRTModule("tensorrt_rtx", other, None), None, "A100", A100)


def test_of_tensorrt_another_line_is_refused_and_the_rest_is_the_loaders_to_say() -> None:
    file = plan_file.PlanFile(Path("p"), "p", "0", 1, "tensorrt", (10, 3, 0, 26))
    plan_file.refuse_unfit(file, TensorRTModule("tensorrt", "10.9.0.34", None), None, "T4", (7, 5))
    with pytest.raises(ModelError, match=r"TensorRT 10\.3\.0\.26, and TensorRT 11\.4"):
        plan_file.refuse_unfit(file, TensorRTModule("tensorrt", "11.4.0.1", None), None, "T4", (7, 5))


# --- engines of another release, made by it --------------------------------------------------------------------------


def test_a_plan_of_rtx_1_5_is_not_loaded_by_the_installed_release(
    project: Suite, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    model = onnx_models.save(onnx_models.conv_net(batch=2), tmp_path / "conv.onnx")
    another_tensorrt.build(another_tensorrt.folder(pytestconfig), model, project.path / "older.plan", 80)
    installed = find_module("tensorrt_rtx").title
    assert f"was built by TensorRT-RTX 1.5.0.114, and {installed} is installed" in message(project, "older.plan")


def test_a_plan_of_the_installed_release_is_not_loaded_by_rtx_1_5(
    project: Suite, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = another_tensorrt.environment(another_tensorrt.folder(pytestconfig))
    monkeypatch.setenv("PYTHONPATH", older["PYTHONPATH"])
    project.write(test_it=CHECKED.format("a100.plan"))
    (record,) = project.run_apart("--trt-gpu=A100").checks
    installed = find_module("tensorrt_rtx").title
    assert f"was built by {installed}, and TensorRT-RTX 1.5.0.114 is installed" in record["message"]


# --- without its GPU -------------------------------------------------------------------------------------------------

MARKED = """
@trt_latency(p50_ms=1.0)
@trt_parity("conv.onnx", batch=2, engine="a100.plan")
def test_marked(): ...

@trt_parity(batch=2, engine="a100.plan", reference="conv.onnx")
def test_by_its_reference(): ...

@trt_parity("conv.onnx", batch=2, engine="a100.plan")
def test_with_the_engine(trt_engine): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", {"image": np.zeros((2, 3, 16, 16), np.float32)}, engine="a100.plan", precision="fp16")
"""


def test_without_a_gpu_nothing_stands_in_for_an_engine(project: Suite, run_everywhere: Callable[..., Run]) -> None:
    project.write(test_it=MARKED)
    run = run_everywhere("--trt-gpu=A100", f"--trt-html={project.path / 'page.html'}")
    run.result.assert_outcomes(skipped=4)
    for record in run.checks:
        assert record["verdict"] == "not_measured"
        assert record["evidence"] is None
        assert "nothing stands in for it" in record["message"]
        engine = record["engine"]
        assert (engine["source"], engine["file"], engine["built_for"]) == ("file", "a100.plan", ["8.0"])
        assert engine["built_by"] == find_module("tensorrt_rtx").title
        assert engine["key"] == engine["sha256"]
    assert run.check("test_by_hand")["precision"] == "fp16"
    assert run.check("test_marked")["precision"] is None
    assert "from the file a100.plan, built by TensorRT-RTX" in (project.path / "page.html").read_text()
    refused = run_everywhere("--trt-gpu=A100", "--trt-require-gpu")
    refused.result.assert_outcomes(failed=3, errors=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('"conv.onnx", engine=3', "engine=3: expected the path"),
        ('"conv.onnx", engine="a100.plan", precision=["fp16", "fp32"]', "expected one precision beside engine="),
        ('"conv.onnx", engine="a100.plan", keep_fp32="conv*"', "keep_fp32= stands beside engine="),
        ('"conv.onnx", engine="a100.plan", calibration="*.npz"', "calibration= stands beside engine="),
        ('"conv.onnx", engine="a100.plan", backend="onnxruntime"', "expected tensorrt or tensorrt_rtx beside engine="),
        ('"conv.onnx", engine="a100.plan", backend="tensorrt", batch=2', "and backend='tensorrt' was asked for"),
        ('engine="a100.plan"', "no model is named, whose outputs the engine's are compared with"),
        ('engine="a100.plan", reference=lambda inputs: inputs', "no model is named"),
        ('engine="a100.plan", reference=SOURCE', "no model is named"),
    ],
)
def test_what_cannot_be_asked_of_an_engine_is_an_error(project: Suite, arguments: str, said: str) -> None:
    project.write(test_it=f"from pytest_trtcheck import SOURCE\n\n@trt_parity({arguments})\ndef test_it(): ...\n")
    (record,) = project.run().checks
    assert record["verdict"] == "error"
    assert said in record["message"]


# --- EPContext -------------------------------------------------------------------------------------------------------


def context(path: Path, held: bytes | str, *others: onnx.NodeProto, **attributes: Any) -> Path:
    """What ONNX Runtime writes around an engine. ONNX has no such operator, so its checker is not asked."""
    node = helper.make_node(
        "EPContext", ["image"], ["logits"], "part0", domain="com.microsoft", ep_cache_context=held, **attributes
    )
    graph = helper.make_graph(
        [node, *others],
        "context",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [2, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2, 10])],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), path)
    return path


def test_the_engine_in_an_epcontext_node_is_tested_as_an_engine(project: Suite, built: Callable[[int], bytes]) -> None:
    # As the TensorRT-RTX provider writes it: no source, main_context 0, the version as one number.
    major, minor, patch = find_module("tensorrt_rtx").release[:3]
    said = {"main_context": 0, "ep_sdk_version": str(major * 10000 + minor * 100 + patch)}
    context(project.path / "inside.onnx", built(80), embed_mode=1, **said, hardware_architecture="80")
    context(project.path / "beside.onnx", "a100.plan", embed_mode=0, source="NvTensorRTRTXExecutionProvider", **said)
    for name in ("inside.onnx", "beside.onnx"):
        assert message(project, name).startswith(f"not_measured: {name}: not run: an engine runs on a GPU alone")
        context_file = plan_file.opened(project.path / name, name, Cache(project.path / "cache"))
        assert context_file.path.read_bytes() == built(80)
        assert context_file.targets == (A100,)


def test_an_epcontext_model_that_cannot_be_tested_so_says_why(project: Suite, built: Callable[[int], bytes]) -> None:
    folder, plan = project.path / "models", built(80)
    folder.mkdir()
    relu = helper.make_node("Relu", ["logits"], ["more"])
    (folder / "link.plan").symlink_to(project.path / "a100.plan")
    made: Mapping[str, tuple[Path, str]] = {
        "split": (context(folder / "1.onnx", plan, relu), "is split: 1 EPContext nodes beside Relu"),
        "qnn": (context(folder / "2.onnx", b"abc", source="QNNExecutionProvider"), "is one of QNNExecutionProvider"),
        "up": (context(folder / "3.onnx", "../a100.plan", embed_mode=0), "leads out of the model's folder"),
        "link": (context(folder / "4.onnx", "link.plan", embed_mode=0), "leads out of the model's folder"),
        "root": (context(folder / "5.onnx", "/etc/passwd", embed_mode=0), "leads out of the model's folder"),
        "gone": (context(folder / "6.onnx", "gone.plan", embed_mode=0), "which is not there"),
        "lie": (context(folder / "7.onnx", plan, ep_sdk_version="10500"), "says that TensorRT 10500 built the engine"),
        "none": (context(folder / "8.onnx", b""), "holds no engine of TensorRT: it is empty"),
        "text": (context(folder / "9.onnx", b"some words"), "it is text that begins with 'some words'"),
        "cut": (context(folder / "10.onnx", plan[:3000]), "is cut off"),
    }
    for path, said in made.values():
        found = message(project, str(path))
        assert found.startswith("error: ")
        assert said in found


def test_an_engine_that_is_named_as_the_model_says_how_to_name_it(
    project: Suite, built: Callable[[int], bytes]
) -> None:
    context(project.path / "inside.onnx", built(80))
    project.write(
        test_it="""
@pytest.mark.parametrize("name", ["a100.plan", "inside.onnx"])
def test_it(name, trt_check):
    trt_check(name, batch=2)
"""
    )
    run = project.run()
    assert "a100.plan: is an engine by its name, not a model" in run.checks[0]["message"]
    assert "inside.onnx: holds an engine (EPContext), not a model" in run.checks[1]["message"]
    assert all("engine=…" in record["message"] for record in run.checks)


def test_what_a_node_says_of_the_gpu_counts_where_the_engine_does_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    exact = context(tmp_path / "exact.onnx", trt_plan(), hardware_architecture="86", ep_sdk_version="100300")
    later = context(tmp_path / "later.onnx", trt_plan(), hardware_architecture="80+", ep_sdk_version="10.3.0.26")
    module = TensorRTModule("tensorrt", "10.3.0.26", None)
    with pytest.raises(ModelError, match=r"compiled for compute capability 8\.6, and A100 has 8\.0"):
        plan_file.refuse_unfit(plan_file.opened(exact, "exact", cache), module, None, "A100", A100)
    file = plan_file.opened(later, "later", cache)
    plan_file.refuse_unfit(file, module, None, "L4", (8, 9))
    with pytest.raises(ModelError, match=r"capability 8\.0 and later, and T4 has 7\.5"):
        plan_file.refuse_unfit(file, module, None, "T4", (7, 5))


# --- compiled here for another GPU, tested there ---------------------------------------------------------------------


@pytest.fixture
def exported(suite: Suite) -> Path:
    """The plan that a run on a laptop wrote for the A100."""
    suite.write(test_here='@trt_parity("conv.onnx", batch=2)\ndef test_here(): ...\n')
    run = suite.run("--trt-gpu=A100", "--trt-export=out")
    run.result.assert_outcomes(passed=1)
    plan = suite.path / "out/A100/to_prove/conv_fp16/1/model.plan"
    assert f"to be proved on the A100, by a test with engine={str(plan)!r}" in run.text
    assert not (suite.path / "out/A100/model_repository").exists()
    return plan


def test_an_exported_plan_is_known_by_its_manifest(suite: Suite, exported: Path) -> None:
    manifest = json.loads((exported.parent.parent / "manifest.json").read_text())
    assert (manifest["compiled_for"], manifest["proved_by"], manifest["parity"]) == ("A100", [], [])
    suite.write(test_it=CHECKED.format(str(exported)))
    (suite.path / "test_here.py").unlink()
    (record,) = suite.run("--trt-gpu=A100").checks
    assert record["verdict"] == "not_measured"
    assert record["precision"] == "fp16"
    assert not [note for note in record["notes"] if "another model" in note]
    onnx_models.save(onnx_models.gemm_net(), suite.path / "other.onnx")
    suite.write(test_it=CHECKED.format(str(exported)).replace("conv.onnx", "other.onnx"))
    (record,) = suite.run("--trt-gpu=A100").checks
    assert [note for note in record["notes"] if "was built from another model than other.onnx is now" in note]
    suite.write(test_it=CHECKED.format(str(exported)).replace("batch=2", 'batch=2, precision="bf16"'))
    (record,) = suite.run("--trt-gpu=A100").checks
    assert "precision=bf16, and the manifest beside it says fp16" in record["message"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"engine": {"sha256": "0" * 64}}, "SHA-256: 0000"),
        ({"tensorrt": {"version": "1.5.0.114"}}, "version: 1.5.0.114 there"),
        ({"tensorrt": {"module": "tensorrt"}}, "builder: TensorRT there, TensorRT-RTX in the file"),
        ({"gpu": {"compute_capability": "SM89"}}, "compute capability: 8.9 there, 8.0 in the file"),
        ({"engine": {"made_from": {"strip_weights": "true"}}}, "holds no weights"),
        ({"gpu": None}, "is not understood"),
    ],
)
def test_a_manifest_that_contradicts_its_plan_is_an_error(
    suite: Suite, exported: Path, changed: dict[str, Any], said: str
) -> None:
    place = exported.parent.parent / "manifest.json"
    manifest = json.loads(place.read_text())
    for name, part in changed.items():
        manifest[name] = {**manifest[name], **part} if part else part
    place.write_text(json.dumps(manifest))
    (suite.path / "test_here.py").unlink()
    found = message(suite, str(exported))
    assert found.startswith("error: ")
    assert said in found


def test_a_failed_check_leaves_nothing_to_be_proved(suite: Suite) -> None:
    suite.write(test_here='@trt_parity("conv.onnx", batch=2, tol=1e-9)\ndef test_here(): ...\n')
    run = suite.run("--trt-gpu=A100", "--trt-export=out", "--trt-diagnose=0")
    run.result.assert_outcomes(failed=1)
    assert not (suite.path / "out/A100/to_prove").exists()


# --- loaded in a process of its own ----------------------------------------------------------------------------------


def test_a_loader_that_crashes_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_rtx_that_dies.py").write_text("import os\nprint('last words', flush=True)\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    dying: Any = SimpleNamespace(name="tensorrt_rtx_that_dies", title="TensorRT-RTX 9", is_rtx=True)
    with pytest.raises(GpuError, match=r"(?s)cannot load x\.plan: the process .* crashed \(SIGABRT\).*last words"):
        tensorrt.inspect(dying, tmp_path / "x.plan", tmp_path / "kernels", label="x.plan")


def test_what_the_loader_says_is_quoted(built: Callable[[int], bytes], tmp_path: Path) -> None:
    if device.detect().gpu is not None:
        pytest.skip("there is a GPU here")
    (tmp_path / "x.plan").write_bytes(built(80))
    with pytest.raises(GpuError, match=r"TensorRT-RTX \S+ cannot load x\.plan: ."):
        tensorrt.inspect(find_module("tensorrt_rtx"), tmp_path / "x.plan", tmp_path / "kernels", label="x.plan")


# --- does it fit the model? ------------------------------------------------------------------------------------------


def tensor(name: str, dtype: str, shape: list[int], *profiles: list[list[int]]) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "profiles": list(profiles)}


IO = {
    "inputs": [tensor("image", "FLOAT", [-1, 3, 16, 16], [[1, 3, 16, 16], [2, 3, 16, 16], [4, 3, 16, 16]])],
    "outputs": [tensor("logits", "FLOAT", [-1, 10])],
}


@pytest.mark.parametrize(
    ("io", "said"),
    [
        ({"inputs": [tensor("x", "FLOAT", [2, 3, 16, 16])]}, "inputs that the engine lacks: image"),
        ({"inputs": [*IO["inputs"], tensor("mask", "BOOL", [2])]}, "inputs that the model lacks: mask"),
        ({"inputs": [tensor("image", "UINT8", [2, 3, 16, 16])]}, "'image' is uint8 in the engine and float32"),
        (
            {"inputs": [tensor("image", "FLOAT", [2, 16, 16, 3])]},
            "shape (2, 16, 16, 3) in the engine and (batch",
        ),
        ({"outputs": [tensor("logits", "FLOAT", [-1, 1000])]}, "'logits' has shape (?, 1000) in the engine"),
        ({"outputs": [*IO["outputs"], tensor("boxes", "FLOAT", [2, 4])]}, "outputs that the model lacks: boxes"),
    ],
)
def test_an_engine_of_another_model_says_what_does_not_fit(tmp_path: Path, io: dict[str, Any], said: str) -> None:
    from pytest_trtcheck.model import onnx_model

    model = onnx_model.load(onnx_models.save(onnx_models.conv_net(), tmp_path / "conv.onnx"), "conv.onnx")
    existing.refuse_other_model("it.plan", IO, model)
    with pytest.raises(ModelError) as caught:
        existing.refuse_other_model("it.plan", {**IO, **io}, model)
    assert said in caught.value.message


def test_the_profile_that_takes_the_inputs_is_chosen() -> None:
    small, large = ([[1, 8], [1, 8], [2, 8]], [[4, 8], [4, 8], [16, 8]])
    io = {"inputs": [tensor("x", "FLOAT", [-1, 8], small, large)], "outputs": []}
    assert existing.chosen_profile("p", io, {"x": ShapeRange((1, 8), (2, 8), (2, 8))}) == 0
    assert existing.chosen_profile("p", io, {"x": ShapeRange((8, 8), (8, 8), (8, 8))}) == 1
    with pytest.raises(InputError) as caught:
        existing.chosen_profile("p", io, {"x": ShapeRange((2, 8), (4, 8), (4, 8))})
    assert "x (2, 8) to (4, 8)" in caught.value.message
    assert "profile 0: x (1, 8) to (2, 8)" in caught.value.message
    assert "profile 1: x (4, 8) to (16, 8)" in caught.value.message
    fixed = {"inputs": [tensor("x", "FLOAT", [4, 8])], "outputs": []}
    assert existing.chosen_profile("p", fixed, {"x": ShapeRange((4, 8), (4, 8), (4, 8))}) == 0
    with pytest.raises(InputError):
        existing.chosen_profile("p", fixed, {"x": ShapeRange((1, 8), (4, 8), (4, 8))})


def test_inputs_become_the_engines_type_where_that_is_asked_for() -> None:
    half = TensorSpec("x", np.dtype(np.float16), (2,), outer=np.dtype(np.float32))
    assert check_inputs([half], {"x": np.array([1, 2], np.float32)})["x"].dtype == np.float16
    with pytest.raises(InputError, match="has dtype int32"):
        check_inputs([half], {"x": np.array([1, 2], np.int32)})
    narrow = TensorSpec("x", np.dtype(np.int32), (2,), outer=np.dtype(np.int64))
    assert check_inputs([narrow], {"x": np.array([1, -2])})["x"].tolist() == [1, -2]
    with pytest.raises(InputError, match="integers beyond int32"):
        check_inputs([narrow], {"x": np.array([1, 2**40])})


@pytest.mark.parametrize(
    ("layers", "read"),
    [
        ({"fp16": 3, "fp32": 1, "other": 2}, "fp16"),
        ({"bf16": 3, "fp16": 1}, "bf16"),
        ({"int8": 3, "fp32": 4}, "int8"),
        ({"int8": 3, "fp16": 4}, "int8+fp16"),
        ({"fp32": 3}, "fp32"),
        ({"tf32": 3, "fp32": 1}, "tf32"),
        ({"fp8": 1}, "fp8"),
        ({"unknown": 3}, None),
        ({"unknown": 3, "other": 1}, None),
    ],
)
def test_the_precision_is_read_from_the_layers(layers: dict[str, int], read: str | None) -> None:
    assert next(iter(existing.precisions_read("it.plan", layers)), None) == read


def test_layers_in_a_type_without_limits_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"computes in fp4 \(2 in fp4, 1 in fp16\)"):
        existing.precisions_read("it.plan", {"fp4": 2, "fp16": 1})


# --- what is made of what it tells -----------------------------------------------------------------------------------


class StandIn:
    """Where there is no GPU: an ONNX model that answers in the engine's place, with the layers that it is given."""

    device_memory_bytes, aux_streams, streamed_bytes = 1 << 20, 0, 0

    def __init__(self, model: Path, layers: Mapping[str, int]) -> None:
        self._runner = OrtRunner(model, "stand-in")
        self._layers = layers

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._runner(inputs)

    def layers_by_precision(self) -> Mapping[str, int]:
        return self._layers

    def layer_records(self, computing: Collection[str] | None) -> tuple[LayerRecord, ...]:
        del computing
        return ()

    def tensor_types(self) -> frozenset[str]:
        return frozenset(self._layers)

    def new_kernels(self) -> None: ...

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def answering(project: Suite, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an A100 into this machine, on which every engine computes what a model computes."""
    gpu = device.Gpu(name="NVIDIA A100", model=find_gpu("A100"), compute_capability=A100, uuid="GPU-0", driver="580.1")
    monkeypatch.setattr(device, "detect", lambda *_: device.Detection(gpu))

    def answer(model: onnx.ModelProto, layers: Mapping[str, int]) -> None:
        path = onnx_models.save(model, project.path / "answers.bin")
        monkeypatch.setattr(tensorrt, "inspect", lambda *_, **__: {"io": IO, "layers": layers})
        monkeypatch.setattr(trial.Trial, "beside", lambda *_: None)
        monkeypatch.setattr(existing.ExistingEngine, "load", lambda *_: StandIn(path, layers))

    return answer


def checked(suite: Suite, arguments: str = "", *options: str) -> dict[str, Any]:
    fresh = f"--trt-cache-dir={suite.path / 'cache'}"
    suite.write(test_it=f'@trt_parity("conv.onnx", batch=2, engine="a100.plan"{arguments})\ndef test_it(): ...\n')
    (record,) = suite.run(fresh, *options).checks
    return dict(record)


def test_the_precision_is_that_of_the_engine(project: Suite, answering: Callable[..., None]) -> None:
    answering(onnx_models.conv_net(), {"bf16": 4, "other": 1})
    record = checked(project)
    assert (record["verdict"], record["precision"], record["evidence"]) == ("pass", "bf16", "engine")
    assert record["parity"]["tol"] == 0.03
    assert record["engine"]["proved"] is True
    assert "bf16 was read from the engine: 4 in bf16, 1 in other" in record["notes"]


def test_fp32_of_tensorrt_rtx_is_judged_as_tf32(project: Suite, answering: Callable[..., None]) -> None:
    answering(onnx_models.conv_net(), {"fp32": 4})
    assert checked(project)["precision"] == "tf32"
    assert checked(project, ', precision="fp32"')["precision"] == "tf32 (asked fp32)"


def test_tf32_that_the_environment_turns_off_is_no_tf32(
    project: Suite, answering: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(onnx_models.conv_net(), {"fp32": 4})
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    record = checked(project, ', precision="tf32"')
    assert record["verdict"] == "error"
    assert "NVIDIA_TF32_OVERRIDE=0 turns TF32 off in this process" in record["message"]
    assert checked(project)["precision"] == "fp32"


def test_a_stated_precision_that_the_engine_contradicts_is_an_error(
    project: Suite, answering: Callable[..., None]
) -> None:
    answering(onnx_models.conv_net(), {"fp16": 4, "fp32": 1})
    assert checked(project, ', precision="fp16"')["verdict"] == "pass"
    record = checked(project, ', precision="fp32"')
    assert record["verdict"] == "error"
    assert "precision=fp32, and the engine computes in fp16: the engine inspector lists 4 in fp16" in record["message"]


def test_of_a_stated_pair_both_parts_count(project: Suite, answering: Callable[..., None]) -> None:
    answering(onnx_models.conv_net(), {"int8": 4, "fp16": 2})
    assert checked(project, ', precision="int8+fp16"')["verdict"] == "pass"
    assert "int8+fp16" in checked(project, ', precision="int8+bf16"')["message"]
    answering(onnx_models.conv_net(), {"int8": 4, "fp32": 9})
    record = checked(project, ', precision="int8+fp16"')
    assert record["verdict"] == "fail"
    assert "fp16 did not take effect: the engine inspector lists 4 in int8, 9 in fp32" in record["message"]


def test_an_engine_that_does_not_tell_needs_a_precision_or_a_tolerance(
    project: Suite, answering: Callable[..., None]
) -> None:
    answering(onnx_models.conv_net(), {"unknown": 4})
    record = checked(project)
    assert record["verdict"] == "error"
    assert "does not tell what it computes in" in record["message"]
    assert "neither precision= nor tol=" in checked(project, ', tol={"logits": 0.1}')["message"]
    record = checked(project, ', precision="fp16"')
    assert (record["verdict"], record["precision"], record["engine"]["proved"]) == ("pass", "fp16", False)
    assert any(note.startswith("fp16 is stated, not proved") for note in record["notes"])
    record = checked(project, ", tol=0.01")
    assert (record["verdict"], record["precision"], record["engine"]["proved"]) == ("pass", None, False)


def altered() -> onnx.ModelProto:
    """The model with other weights in its second convolution: what the engine was built from by mistake."""
    model = onnx_models.conv_net()
    kernel = next(each for each in model.graph.initializer if each.name == "w2")
    array = onnx.numpy_helper.to_array(kernel)
    kernel.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(1.5), "w2"))
    return model


def test_an_engine_of_other_weights_fails_and_is_to_blame(project: Suite, answering: Callable[..., None]) -> None:
    answering(altered(), {"fp16": 4})
    record = checked(project, "", "--trt-bundle=bundles", "--trt-export=out")
    assert record["verdict"] == "fail"
    blame = record["parity"]["blame"]
    assert blame["step"] == "engine"
    assert blame["headline"] == "emulated, fp16 keeps the limits, and the file does not"
    assert blame["errors"]["lowered"] < 0.01 < blame["errors"]["engine"]
    assert "conv.onnx: the engine a100.plan in fp16 differs from" in record["message"]
    # The bundle holds the file that was tested, and its replay tests that.
    (bundle,) = (project.path / "bundles").glob("*/bundle.json")
    assert (bundle.parent / "engine/engine.plan").read_bytes() == (project.path / "a100.plan").read_bytes()
    (project.path / "a100.plan").unlink()
    (replayed,) = project.run(str(bundle)).checks
    assert replayed["verdict"] == "fail"
    assert replayed["engine"]["source"] == "file"
    assert any("the outputs are the recorded ones" in note for note in replayed["notes"])


def test_a_file_that_exists_is_not_exported_again(project: Suite, answering: Callable[..., None]) -> None:
    answering(onnx_models.conv_net(), {"fp16": 4})
    project.write(test_it=CHECKED.format("a100.plan"))
    run = project.run(f"--trt-cache-dir={project.path / 'cache'}", "--trt-export=out")
    run.result.assert_outcomes(passed=1)
    assert "): engine= named a file that exists" in run.text
    assert not list((project.path / "out").rglob("model.plan"))


def test_of_an_int8_engine_nothing_is_known_to_blame(project: Suite, answering: Callable[..., None]) -> None:
    answering(altered(), {"int8": 4})
    record = checked(project)
    assert record["verdict"] == "fail"
    assert record["parity"]["blame"] is None
    assert any("not diagnosed: how the engine was lowered to int8 is not known" in note for note in record["notes"])


def test_an_engine_that_was_changed_meanwhile_is_not_loaded(project: Suite, tmp_path: Path) -> None:
    file = plan_file.opened(project.path / "a100.plan", "a100.plan", Cache(tmp_path / "cache"))
    machine = Machine(find_gpu("A100"), no_gpu="none")
    system = existing.find(file, "auto", machine)
    shutil.copyfile(project.path / "conv.onnx", project.path / "a100.plan")
    made: Any = Built(SimpleNamespace(), file.path, entry=SimpleNamespace(path=tmp_path))  # type: ignore[arg-type]
    with pytest.raises(GpuError, match="was changed on disk during the check"):
        system.load(made)
