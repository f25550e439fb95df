"""Whole checks of Keras models and SavedModels, by pytest: Keras as the reference, wrong exports, precisions.

Each in a process of its own, where warnings are errors: TensorFlow cannot be imported twice in one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import RUNS
from tests.keras import networks

if TYPE_CHECKING:
    from tests.conftest import Suite


@pytest.fixture(autouse=True)
def networks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


# What Keras and TensorFlow warn of at import is no matter of the plugin; what comes while it works is.
HEAD = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tests.keras import networks
from pytest_trtcheck import SOURCE

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 4)).astype("float32")
"""

WRONG = """
import onnx
import pytest
from pytest_trtcheck.model.sources.tensorflow import export

converted = export._converted

def wrong(graph, function):
    proto = converted(graph, function)
    for node in proto.graph.node:
        # The weight of a layer in the middle, or what the outputs are called.
        if function.name == "weight" and node.op_type in {"MatMul", "Gemm"} and "/hidden" in node.name:
            for weight in proto.graph.initializer:
                if weight.name == node.input[1]:
                    array = onnx.numpy_helper.to_array(weight) * np.float32(1.25)
                    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        if function.name == "swapped":
            for index, name in enumerate(node.output):
                node.output[index] = {"label": "score", "score": "label"}.get(name, name)
    return proto

export._converted = wrong
"""


@pytest.mark.parametrize("how", ["plain", "n2"])
def test_precisions_of_a_cnn_with_keras_as_the_reference(how: str, suite: Suite) -> None:
    suite.write(
        test_it=HEAD
        + """
@pytest.fixture
def trt_model(): return networks.cnn()

@pytest.fixture
def trt_calibration(): return [{"image": IMAGES}]

@trt_parity(precision=["fp16", "int8"], reference=SOURCE, backend="tensorrt-rtx")
def test_with_inputs(): return IMAGES

@trt_parity(precision="bf16", batch=[1, 3], reference=SOURCE)
def test_generated(): ...

@trt_parity(networks.cnn, reference=SOURCE, tol=1e-7)
def test_too_tight(): return IMAGES
"""
    )
    run = suite.run_apart(*RUNS[how])
    verdicts = {check["nodeid"].partition("::")[2]: check["verdict"] for check in run.checks}
    assert verdicts.pop("test_too_tight") == "fail", run.text
    assert set(verdicts.values()) == {"pass"}, run.text
    assert len(verdicts) == 4
    assert run.check("test_too_tight")["parity"]["blame"]["step"] != "export"


def test_a_wrong_export_is_blamed_and_its_layer_named(suite: Suite) -> None:
    suite.write(
        conftest=WRONG,
        test_it=HEAD
        + """
CASE = {"numbers": np.ones((2, 6), "float32"), "words": np.arange(8, dtype="int32").reshape(2, 4)}

@trt_parity(lambda: networks.several("weight"), reference=SOURCE)
def test_weight(): return CASE

@trt_parity(lambda: networks.several("swapped"), reference=SOURCE)
def test_swapped(): return CASE

@trt_parity(lambda: networks.several("weight"))
def test_unseen(): return CASE
""",
    )
    run = suite.run_apart()
    verdicts = {name: run.check(name)["verdict"] for name in ("test_weight", "test_swapped", "test_unseen")}
    assert verdicts == {"test_weight": "fail", "test_swapped": "fail", "test_unseen": "pass"}, run.text
    assert any("the export is not what" in note for note in run.check("test_unseen")["notes"])
    blame = run.check("test_weight")["parity"]["blame"]
    assert blame["step"] == "export"
    assert "'hidden'" in blame["headline"], blame
    assert "it holds what the reference has in output 'score'" in run.text


@pytest.mark.filterwarnings("ignore")
def test_saved_models_by_their_folders(suite: Suite) -> None:
    networks.several().export(suite.path / "exported", verbose=False)
    networks.saved_module(suite.path / "module", "score", "embed")
    networks.transformer().save(suite.path / "transformer.keras")
    suite.write(
        test_it="""
import warnings
from pytest_trtcheck import SOURCE

WORDS = {"numbers": np.ones((2, 6), "float32"), "words": np.arange(8, dtype="int32").reshape(2, 4)}
IDS = {"ids": np.arange(14, dtype="int32").reshape(2, 7)}

@pytest.fixture
def trt_calibration(request): return [IDS if "transformer" in request.node.name else WORDS]

@trt_parity("exported", precision=["fp16", "int8"], reference=SOURCE, tol=0.1)
def test_exported(): return WORDS

@trt_parity("module::score", reference=SOURCE, batch=2)
def test_module(): ...

@trt_parity("module")
def test_ambiguous(): ...

@trt_parity("module::score")
def test_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    return {"rows": tf.ones((2, 4))}

@trt_parity("transformer.keras", precision=["fp16", "int8"], reference=SOURCE, tol=0.2, backend="tensorrt-rtx")
def test_transformer(): return IDS
"""
    )
    run = suite.run_apart()
    assert run.check("test_ambiguous")["verdict"] == "error"
    assert "module: has 2 signatures" in run.text
    others = [check for check in run.checks if not check["nodeid"].endswith("test_ambiguous")]
    assert {check["verdict"] for check in others} == {"pass"}, run.text
    # Kept: nothing is loaded, and TensorFlow not even imported.
    suite.write(
        conftest="""
import sys

def pytest_sessionfinish():
    assert "tensorflow" not in sys.modules
    print("TensorFlow was not imported")
"""
    )
    again = suite.run_apart("-s", "-k", "not ambiguous and not tensors")
    assert "TensorFlow was not imported" in again.text
    assert [check["verdict"] for check in again.checks] == ["pass"] * (len(others) - 1), again.text
