"""Whether TensorRT takes a model: who judges, what is said, and what a plugin's operators get."""

from __future__ import annotations

import json
import sys
import warnings
from importlib import util
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck import backends
from pytest_trtcheck.backends.base import Acceptance
from pytest_trtcheck.backends.tensorrt import acceptance as accepting
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt import builder as tensorrt_builder
from pytest_trtcheck.backends.tensorrt.build import Parsed
from pytest_trtcheck.backends.tensorrt.module import find_module
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.errors import ArgumentError, ModelError
from pytest_trtcheck.model import apart
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import Lowered
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.spec import BuildOptions, ParitySpec
from tests import custom_ops, onnx_models
from tests.test_families import bias, one, qdq, scatter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run, Suite

needs_rtx = pytest.mark.skipif(
    util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra rtx)"
)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def judged(tmp_path: Path, cache: Cache) -> Callable[..., Acceptance]:
    def judge(proto: onnx.ModelProto, backend: Any = "auto", plugins: tuple[str, ...] = (), **given: Any) -> Acceptance:
        model = open_model(proto, (), cache)
        lowered = Lowered(model.path, model.sha256)
        ships = backends.load(backend).ships  # type: ignore[attr-defined]
        return accepting.acceptance(lowered, "the model", ships, BuildOptions(plugins=plugins), cache, **given)

    return judge


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)


# Who judges


@needs_rtx
def test_the_installed_parser_judges_and_is_quoted(judged: Any) -> None:
    found = judged(bias("int32"), "tensorrt_rtx")
    with pytest.raises(ModelError) as info:
        found.require()
    text = str(info.value)
    assert "TensorRT-RTX 1." in text
    assert "node 'it' (DequantizeLinear): it dequantizes an INT32 tensor" in text
    assert "said:" in text
    assert "has type Int32 but must have type" in text  # the parser's own words
    assert "QuantizeBias=False" in text
    assert "catchCudaError" not in text  # no driver here, which is no cause
    assert judged(bias("float"), "tensorrt_rtx") == Acceptance()


@needs_rtx
def test_what_the_parser_takes_without_a_word_is_refused_all_the_same(judged: Any, tmp_path: Path) -> None:
    onnx.save(qdq(None), tmp_path / "silent.onnx")
    assert tensorrt.parse(("tensorrt_rtx",), tmp_path / "silent.onnx") == Parsed("tensorrt_rtx", rtx_version())
    refusal = judged(qdq(None), "tensorrt_rtx").refusal
    assert "no zero point, which by ONNX means uint8" in refusal
    assert "said:" not in refusal


def rtx_version() -> str:
    return find_module("tensorrt_rtx").version


@needs_rtx
def test_the_verdict_is_cached_and_needs_no_process(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judged(scatter("ScatterND", "add"), "tensorrt_rtx")
    assert first.refusal
    monkeypatch.setattr(tensorrt, "parse", lambda *_: pytest.fail("the parser was asked again"))
    assert judged(scatter("ScatterND", "add"), "tensorrt_rtx") == first


@needs_rtx
def test_another_familys_refusal_is_a_note(judged: Any) -> None:
    layout = helper.make_node("TopK", ["x", "k"], ["y", "i"], name="it", sorted=0)
    proto = onnx_models.model(
        [layout],
        {"x": (TensorProto.FLOAT, [1, 80])},
        {"y": (TensorProto.FLOAT, [1, 8]), "i": (TensorProto.INT64, [1, 8])},
        {"k": np.array([8])},
    )
    found = judged(proto, "tensorrt_rtx")
    assert not found.refusal
    (note,) = found.notes
    assert note.startswith("TensorRT 10 and TensorRT 11 would not take this model (by onnx-tensorrt's operator table")
    assert "node 'it' (TopK): sorted=0 is not supported" in note


@pytest.mark.usefixtures("nothing_installed")
def test_with_nothing_installed_only_what_no_family_takes_is_refused(judged: Any) -> None:
    for proto in (qdq(None), scatter("ScatterND", "add"), one("Compress", np.array([True]))):
        refusal = judged(proto).refusal
        assert refusal.startswith("the model: none of TensorRT 10, TensorRT 11 and TensorRT-RTX takes the model (by ")
        assert "node 'it'" in refusal
    rtx_alone = scatter("ScatterElements", "mul")
    found = judged(rtx_alone)
    assert not found.refusal
    assert [note for note in found.notes if note.startswith("TensorRT-RTX would not take this model")]
    assert "reduction='mul'" in judged(rtx_alone, "tensorrt_rtx").refusal
    assert not judged(rtx_alone, "tensorrt").refusal


@pytest.mark.usefixtures("nothing_installed")
def test_what_cannot_be_found_out_is_said(judged: Any) -> None:
    if onnx.defs.onnx_opset_version() < 26:
        pytest.skip("this ONNX has no operator that is newer than the tables")
    found = judged(one("BitCast", opset=26, to=TensorProto.INT32))
    assert not found.refusal
    assert any("whether TensorRT 11 takes BitCast was not found out" in note for note in found.notes)


@needs_rtx
@pytest.mark.parametrize("name", ["tensorrt_rtx", "auto"])
def test_a_parser_that_crashes_does_not_take_the_session_along(
    judged: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(apart, "_BOOTSTRAP", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = judged(onnx_models.conv_net(1), name)
    assert "the builder process crashed (SIGSEGV)" in found.refusal


@needs_rtx
def test_a_parser_that_cannot_be_asked_is_a_note(judged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_BOOTSTRAP", "raise SystemExit(3)")
    found = judged(onnx_models.conv_net(1), "tensorrt_rtx")
    assert not found.refusal
    assert any("could not be asked" in note and "exit status 3" in note for note in found.notes)


@needs_rtx
def test_before_a_build_only_what_the_builder_would_not_notice_counts(judged: Any) -> None:
    module = find_module("tensorrt_rtx")
    assert "uint8" in judged(qdq(None), "tensorrt_rtx", builds=module).refusal
    assert not judged(scatter("ScatterND", "add"), "tensorrt_rtx", builds=module).refusal


# Plugins


def test_a_plugin_library_that_is_not_there(judged: Any) -> None:
    with pytest.raises(ArgumentError, match=r"plugins: none\.so"):
        judged(custom_ops.model(), plugins=("none.so",))


@needs_rtx
def test_a_library_without_the_operator_does_not_provide_it(judged: Any, tmp_path: Path) -> None:
    # A real shared library that brings ONNX Runtime's operator, and none of TensorRT's.
    library = custom_ops.library(tmp_path)
    refusal = judged(custom_ops.model(), "tensorrt_rtx", (str(library),)).refusal
    assert "node 'cube' (Cube)" in refusal
    assert "Plugin not found" in refusal


def test_an_operator_that_the_library_provides_is_taken(judged: Any, tmp_path: Path, monkeypatch: Any) -> None:
    library = custom_ops.library(tmp_path)
    monkeypatch.setattr(accepting, "_installed", lambda name: "11.4.0" if name == "tensorrt" else None)
    monkeypatch.setattr(tensorrt, "parse", lambda *_: Parsed("tensorrt", "11.4.0", (), ("Cube",)))
    assert judged(custom_ops.model(), plugins=(str(library),)) == Acceptance(plugin_operators=("Cube",))


@pytest.mark.usefixtures("nothing_installed")
def test_a_library_that_nobody_can_ask_is_taken_at_its_users_word(judged: Any, tmp_path: Path) -> None:
    library = custom_ops.library(tmp_path)
    found = judged(custom_ops.model(), plugins=(str(library),))
    assert not found.refusal
    assert found.plugin_operators == ("Cube",)
    assert any("whether the plugin libraries provide Cube was not found out" in note for note in found.notes)
    assert "Cube" in judged(custom_ops.model()).refusal


@needs_rtx
def test_the_operators_of_registered_plugins_are_listed() -> None:
    trt = find_module("tensorrt_rtx").handle

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "Cube", "1", ""
            self.field_names = trt.PluginFieldCollection([])

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    before = tensorrt_builder._creators(builder)
    creator = Creator()
    trt.get_plugin_registry().register_creator(creator, "")
    try:
        assert tensorrt_builder._creators(builder) - before == {"Cube"}
    finally:
        trt.get_plugin_registry().deregister_creator(creator)


@needs_rtx
def test_what_the_parser_cannot_tell_without_a_gpu_is_not_refused(judged: Any) -> None:
    rois, images = np.array([[0, 0, 4, 4]], np.float32), np.array([0])
    found = judged(one("RoiAlign", rois, images, opset=16), "tensorrt_rtx")
    assert not found.refusal
    assert found.plugin_operators == ("RoiAlign",)


def test_a_refusal_says_more_than_that_a_model_cannot_be_lowered(tmp_path: Path, cache: Cache) -> None:
    """A model in opset 1 cannot be raised for bf16; that no TensorRT has its operator is the reason to give."""
    made = helper.make_node("Adam", ["r", "t", "x", "g", "v", "h"], ["y", "v2", "h2"], name="adam", domain=_TRAINING)
    floats = {name: (TensorProto.FLOAT, [2]) for name in ("x", "g", "v", "h")}
    inputs = {"r": (TensorProto.FLOAT, []), "t": (TensorProto.INT64, []), **floats}
    graph = helper.make_graph(
        [made],
        "training",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("y", "v2", "h2")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid(_TRAINING, 1)], ir_version=9)
    request = Request("test", proto, (), ParitySpec(precision=("bf16",)))
    record = Checker(cache).check(request)
    assert record.verdict == "error"
    assert "node 'adam' (Adam)" in (record.message or "")


_TRAINING = "ai.onnx.preview.training"


# Custom operators of ONNX Runtime


def test_the_reference_computes_with_custom_ops(tmp_path: Path, cache: Cache) -> None:
    library = custom_ops.library(tmp_path)
    path = onnx_models.save(custom_ops.model(), tmp_path / "cube.onnx")
    model = open_model(path, (), cache, (str(library),))
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(Reference(model, cache)({"x": x})["y"], 2 * x**3, rtol=1e-6)
    bare = open_model(path, (), cache)
    with pytest.raises(ModelError, match="Cube") as info:
        Reference(bare, cache)({"x": x})
    assert "custom_ops=" in info.value.hint
    assert "reference=" in info.value.hint


def test_the_bytes_of_the_library_are_part_of_the_models_identity(tmp_path: Path, cache: Cache) -> None:
    library = custom_ops.library(tmp_path)
    path = onnx_models.save(custom_ops.model(), tmp_path / "cube.onnx")
    identities = {open_model(path, (), cache).sha256}
    for content in (library.read_bytes(), library.read_bytes() + b"\0"):
        library.unlink()
        library.write_bytes(content)
        model = open_model(path, (), cache, (str(library),))
        assert open_model(model, (), cache, (str(library),)) == model
        identities.add(model.sha256)
    assert len(identities) == 3


def test_a_file_that_is_no_library(tmp_path: Path, cache: Cache) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no library")
    path = onnx_models.save(custom_ops.model(), tmp_path / "cube.onnx")
    model = open_model(path, (), cache, (str(text),))
    with pytest.raises(ArgumentError, match=r"custom_ops: .*notes\.txt cannot be loaded"):
        Reference(model, cache)({"x": np.zeros((2, 4), np.float32)})
    with pytest.raises(ArgumentError, match=r"custom_ops: none\.so"):
        open_model(path, (), cache, ("none.so",))


# In a test run

TESTS = """
import onnx
from pytest_trtcheck.spec import BuildOptions

@trt_parity("asymmetric.onnx", precision="int8")
def test_marked(): ...

@trt_parity("symmetric.onnx", precision="int8")
def test_sound(): ...

def test_by_hand(trt_check):
    trt_check("asymmetric.onnx", precision="int8")

def test_built(trt_build):
    trt_build("asymmetric.onnx", precision="int8")
"""


def test_a_model_that_no_tensorrt_takes_is_an_error_everywhere(
    suite: Suite, run_everywhere: Callable[..., Run]
) -> None:
    for name, zero_point in (("asymmetric", -3), ("symmetric", 0)):
        onnx_models.save(qdq(np.array(zero_point, np.int8), np.array(0.02, np.float32)), suite.path / f"{name}.onnx")
    suite.write(test_it=TESTS)
    run = run_everywhere("test_it.py", "asymmetric.onnx", "--trt-precision=int8")
    run.result.assert_outcomes(passed=1, failed=4)
    for name in ("test_marked", "test_by_hand", "asymmetric.onnx::int8"):
        record = run.check(name)
        assert record["verdict"] == "error"
        assert "node 'it' (QuantizeLinear): its zero point is not 0 (-3)" in record["message"]
        assert "Traceback" not in record["message"]
    assert run.check("test_sound")["verdict"] == "pass"


PLUGIN_TESTS = """
from pytest_trtcheck.spec import BuildOptions

@pytest.fixture
def trt_build_options():
    return BuildOptions(plugins=("libcube.so",), custom_ops=("libcube.so",))

@trt_parity("cube.onnx")
def test_cube():
    return np.ones((2, 4), np.float32)

def test_built(trt_build):
    trt_build("cube.onnx")

def test_reference(trt_reference):
    x = np.full((2, 4), 3, np.float32)
    assert (trt_reference("cube.onnx")({"x": x})["y"] == 54).all()
"""


def test_a_plugins_operators_are_not_measured_without_a_gpu(suite: Suite) -> None:
    """No TensorRT is installed there: the library's word is taken, and nothing is emulated in its place."""
    custom_ops.library(suite.path)
    onnx_models.save(custom_ops.model(), suite.path / "cube.onnx")
    suite.write(
        conftest="import sys\nsys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None\n",
        test_it=PLUGIN_TESTS,
    )
    run = suite.run_apart("test_it.py")
    run.result.assert_outcomes(skipped=1, failed=1, passed=1)
    record = run.check("test_cube")
    assert record["verdict"] == "not_measured"
    assert record["evidence"] is None
    assert "Cube is computed by a plugin, which runs on a GPU alone" in record["message"]
    assert "run it on a machine with the GPU" in run.text


@needs_rtx
def test_no_pass_is_left_where_the_parser_refuses(suite: Suite) -> None:
    """A sample of ONNX's own operator tests, each through the plugin; `tox -e onnx-backend` runs all of them."""
    from onnx.backend.test.loader import load_model_tests

    wanted = {
        *("test_relu", "test_gemm_all_attributes", "test_scatternd_add", "test_qlinearconv"),
        *("test_resize_downsample_scales_linear_antialias", "test_reduce_sum_keepdims_random"),
        "test_nonmaxsuppression_two_batches",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cases' own arithmetic
        cases = [case for case in load_model_tests(kind="node") if case.name in wanted]
    for case in cases:
        # onnx 1.19 has them as files, later releases as objects.
        proto = onnx.load(f"{case.model_dir}/model.onnx") if case.model is None else case.model
        onnx.save(proto, suite.path / f"{case.name}.onnx")
    run = suite.run(*sorted(path.name for path in suite.path.glob("test_*.onnx")))
    verdicts = {record["nodeid"].split(".")[0]: record["verdict"] for record in run.checks}
    passed = {name for name, verdict in verdicts.items() if verdict == "pass"}
    assert passed == {"test_relu", "test_gemm_all_attributes"}, json.dumps(verdicts)
    assert len(verdicts) == 7
    for record in run.checks:
        assert "Traceback" not in (record["message"] or "")


@needs_rtx
def test_emulation_by_name_asks_no_tensorrt_that_happens_to_be_installed(suite: Suite) -> None:
    """Where TensorRT itself ships, what TensorRT-RTX alone refuses is a note, and what nobody takes stays an error."""
    floats = {name: (TensorProto.FLOAT, [4]) for name in ("x", "r")}
    sized_by_data = onnx_models.model(
        [helper.make_node("Relu", ["x"], ["r"], "relu"), helper.make_node("NonZero", ["r"], ["y"], "nonzero")],
        {"x": floats["x"]},
        {"r": floats["r"], "y": (TensorProto.INT64, [1, "n"])},
        {},
    )
    onnx_models.save(sized_by_data, suite.path / "nonzero.onnx")
    onnx_models.save(scatter("ScatterND", "add"), suite.path / "scatter.onnx")
    suite.write(test_it='@trt_parity("nonzero.onnx")\ndef test_it(): ...\n')
    auto = suite.run()
    auto.result.assert_outcomes(failed=1)
    message = auto.checks[0]["message"]
    assert "does not take the model" in message
    assert "TensorRT 10 and TensorRT 11 would take it, by the tables: where one of them ships" in message
    named = suite.run("--trt-backend=onnxruntime")
    named.result.assert_outcomes(passed=1)
    (record,) = named.checks
    assert record["gpu_ran"] is False
    assert any(note.startswith("TensorRT-RTX would not take this model") for note in record["notes"])
    suite.write(test_it='@trt_parity("scatter.onnx")\ndef test_it(): ...\n')
    refused = suite.run("--trt-backend=onnxruntime")
    refused.result.assert_outcomes(failed=1)
    assert "none of TensorRT 10, TensorRT 11 and TensorRT-RTX takes the model" in refused.checks[0]["message"]
