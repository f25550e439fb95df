"""Keras models, .keras files and SavedModels as ONNX: names, types, the open batch, identity, and what can't be."""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import MissingDependencyError, ModelError
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import Examples, open_model
from pytest_trtcheck.model.sources.tensorflow import export
from tests.keras import networks

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.model.onnx_model import OnnxModel

# Keras and TensorFlow warn of what they do themselves; test_checks.py runs them with warnings as errors.
pytestmark = pytest.mark.filterwarnings("ignore")

FIRST = np.random.default_rng(3)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", None)


def case_for(model: OnnxModel, batch: int = 5) -> dict[str, Any]:
    case = {}
    for spec in model.inputs:
        shape = [size if isinstance(size, int) else batch if axis == 0 else 7 for axis, size in enumerate(spec.shape)]
        array = FIRST.integers(0, 9, shape) if "int" in spec.dtype else FIRST.normal(size=shape)
        case[spec.name] = array.astype(spec.dtype)
    return case


def described(model: OnnxModel) -> tuple[list[Any], list[Any]]:
    inputs, outputs = (
        [(spec.name, spec.dtype, list(spec.shape)) for spec in specs] for specs in (model.inputs, model.outputs)
    )
    return inputs, outputs


@pytest.mark.parametrize("name", networks.MODELS)
def test_the_export_computes_what_keras_computes(name: str, cache: Cache) -> None:
    model = networks.MODELS[name]()
    opened = open_model(
        model, (), cache, examples=Examples(batch=2, shapes={"ids": (2, 7)} if name == "transformer" else {})
    )
    assert not opened.notes
    case = case_for(opened)
    runner = OrtRunner(opened.path, name)
    found = runner(case)
    runner.close()
    by_keras = model(next(iter(case.values())) if len(case) == 1 else case, training=False)
    by_keras = by_keras if isinstance(by_keras, dict) else {opened.outputs[0].name: by_keras}
    assert opened.origin is not None
    itself = opened.origin(case)
    assert set(found) == set(by_keras) == set(itself)
    for output, array in found.items():
        np.testing.assert_allclose(array, np.asarray(by_keras[output]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(itself[output], np.asarray(by_keras[output]), rtol=1e-5, atol=1e-6)


def test_names_types_and_the_batch_are_kept(cache: Cache) -> None:
    assert described(open_model(networks.cnn(), (), cache)) == (
        [("image", "float32", ["batch", 8, 8, 4])],
        [("probs", "float32", ["batch", 5])],
    )
    assert described(open_model(networks.several(), (), cache)) == (
        [("numbers", "float32", ["batch", 6]), ("words", "int32", ["batch", 4])],
        [("label", "float32", ["batch", 3]), ("score", "float32", ["batch", 3])],
    )
    assert described(open_model(networks.transformer(1), (), cache)) == (
        [("ids", "int32", ["batch", "ids_1"])],
        [("head", "float32", ["batch", 4])],
    )
    # Keras counts names that nobody gave through the process; they would be others in the next run.
    for _ in range(2):
        assert described(open_model(networks.unnamed(), (), cache)) == (
            [("input_0", "float32", ["batch", 6])],
            [("output_0", "float32", ["batch", 3])],
        )


def test_an_output_that_has_an_inputs_name_is_given_another(cache: Cache) -> None:
    import keras

    x = keras.Input((4,), name="x")
    for model in (keras.Model(x, [x, keras.layers.Dense(3, name="y")(x)]), keras.Model({"x": x}, {"x": x * 2, "y": x})):
        opened = open_model(model, (), cache)
        assert described(opened)[0] == [("x", "float32", ["batch", 4])]
        assert sorted(spec.name for spec in opened.outputs) == ["x_out", "y"]


def test_it_is_exported_anew_when_weights_or_code_change_and_only_then(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    write = export.write

    def counted(path: Path, *rest: Any) -> None:
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(export, "write", counted)
    model = networks.MODELS["lstm"]()
    first = open_model(model, (), cache)
    assert open_model(model, (), cache) == first
    assert len(written) == 1
    variable = model.variables[0]
    variable.assign(np.asarray(variable) * 1.5)
    assert open_model(model, (), cache).sha256 != first.sha256
    assert len(written) == 2

    case = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 3), np.float32)}
    asked = Examples(inputs=case)
    one = networks.filled(_built(networks.Subclassed(), case))
    opened = open_model(one, (), cache, examples=asked)
    assert described(opened) == (
        [("a", "float32", ["batch", 4]), ("b", "float32", ["batch", 3])],
        [("y", "float32", ["batch", 3])],
    )
    assert open_model(one, (), cache, examples=asked) == opened
    one.factor = 3.0
    assert open_model(one, (), cache, examples=asked).sha256 != opened.sha256
    assert len(written) == 4


def _built(model: Any, case: Any) -> Any:
    model({name: tf.constant(array) for name, array in case.items()})
    return model


def test_a_subclassed_model_needs_inputs(cache: Cache) -> None:
    with pytest.raises(ModelError, match="a subclassed Keras model does not say what its inputs are"):
        open_model(networks.Subclassed(), (), cache)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_keras_file_is_its_model(cache: Cache, tmp_path: Path) -> None:
    networks.cnn().save(tmp_path / "cnn.keras")
    opened = open_model("cnn.keras", (tmp_path,), cache)
    assert opened.label == "cnn.keras"
    assert described(opened) == described(open_model(networks.cnn(), (), cache))
    assert opened.origin is not None
    assert opened.origin.title == "the Keras model in cnn.keras"
    case = case_for(opened)
    (right,) = opened.origin(case).values()
    np.testing.assert_allclose(right, networks.cnn()(case["image"], training=False), rtol=1e-5, atol=1e-6)


def test_a_layer_of_the_users_own_is_found_where_it_is_registered(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks.of_one(networks.Doubled(), (3,)).save(tmp_path / "own.keras")
    opened = open_model("own.keras", (tmp_path,), cache)
    assert opened.origin is not None
    np.testing.assert_array_equal(opened.origin({"x": np.ones((2, 3), np.float32)})["output_0"], np.full((2, 3), 2.0))
    # What it computes stands in code, which may change while the file does not.
    monkeypatch.setattr(networks.Doubled, "call", lambda _, x: x * 3.0)
    assert open_model("own.keras", (tmp_path,), cache).sha256 != opened.sha256


def test_what_keras_cannot_load_is_said(cache: Cache, tmp_path: Path) -> None:
    class Unregistered(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x

    networks.of_one(Unregistered(), (3,)).save(tmp_path / "unregistered.keras")
    with pytest.raises(
        ModelError, match=r"unregistered\.keras: Keras cannot load it: TypeError: Could not locate class"
    ) as found:
        open_model("unregistered.keras", (tmp_path,), cache)
    assert "register_keras_serializable" in found.value.hint
    assert "custom_objects" in found.value.hint
    networks.of_one(layers.Lambda(lambda x: x), (3,)).save(tmp_path / "lambda.keras")
    with pytest.raises(ModelError, match=r"lambda\.keras: Keras cannot load it") as found:
        open_model("lambda.keras", (tmp_path,), cache)
    assert "safe_mode=False" in found.value.hint


@pytest.mark.parametrize("damage", ["cut off", "a pointer", "empty"])
def test_a_damaged_keras_file_is_said_to_be(damage: str, cache: Cache, tmp_path: Path) -> None:
    networks.cnn().save(tmp_path / "whole.keras")
    whole = (tmp_path / "whole.keras").read_bytes()
    content = {"cut off": whole[: len(whole) // 2], "a pointer": b"version https://git-lfs\n", "empty": b""}[damage]
    (tmp_path / "bad.keras").write_bytes(content)
    with pytest.raises(ModelError, match=rf"bad.keras: not a .keras file, or cut off \({len(content):,} bytes\)"):
        open_model("bad.keras", (tmp_path,), cache)


def test_an_operator_without_an_onnx_form_is_named_with_its_layer(cache: Cache) -> None:
    model = networks.of_one(layers.Discretization([0.0, 1.0], name="buckets"), (3,))
    with pytest.raises(ModelError, match="tf2onnx has no ONNX form of TensorFlow's Bucketize in buckets"):
        open_model(model, (), cache)


def test_a_batch_that_the_model_fixes_is_said(cache: Cache) -> None:
    class Fixing(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return keras.ops.reshape(keras.ops.reshape(x, (2, 4)), (-1, 4))

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

    with pytest.raises(ModelError, match="<Keras model one>: the export fixes the batch at 2: with 3 rows"):
        open_model(networks.of_one(Fixing(), (4,)), (), cache)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_another_backend_is_said(backend: str, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    with pytest.raises(ModelError, match=f"<Keras model cnn>: Keras computes with {backend} in this process") as found:
        open_model(networks.cnn(), (), cache)
    assert "KERAS_BACKEND=tensorflow" in found.value.hint


def test_what_is_not_installed_is_said(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks.saved_module(tmp_path / "module", "score")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="tensorflow and keras and tf2onnx are not installed") as found:
        open_model("module", (tmp_path,), cache)
    assert "pytest-trtcheck[tensorflow]" in found.value.hint


# --- SavedModels -----------------------------------------------------------------------------------------------------


def test_a_folder_that_keras_exported(cache: Cache, tmp_path: Path) -> None:
    model = networks.several()
    model.export(tmp_path / "folder", verbose=False)
    # Its two signatures are one function, and no choice.
    opened = open_model("folder", (tmp_path,), cache)
    assert described(opened) == described(open_model(model, (), cache))
    assert open_model("folder::serve", (tmp_path,), cache).label == "folder::serve"


def test_a_signature_has_its_own_names(cache: Cache, tmp_path: Path) -> None:
    networks.saved_module(tmp_path / "module", "score")
    opened = open_model(tmp_path / "module", (), cache)
    assert described(opened) == (
        [("rows", "float32", ["batch", 4])],
        [("best", "int64", ["batch"]), ("scores", "float32", ["batch", 3])],
    )
    rows = np.eye(4, dtype=np.float32)
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    runner = OrtRunner(opened.path, "module")
    np.testing.assert_allclose(runner({"rows": rows})["scores"], weight, rtol=1e-6)
    np.testing.assert_array_equal(runner({"rows": rows})["best"], weight.argmax(1))
    runner.close()


def test_an_input_of_any_rank_is_no_single_number(cache: Cache, tmp_path: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.function = tf.function(lambda x: {"y": x * 2.0}, input_signature=[tf.TensorSpec(None, name="x")])
    tf.saved_model.save(module, str(tmp_path / "any"), signatures={"serving_default": module.function})
    with pytest.raises(ModelError, match="input 'x' has no number of dimensions"):
        open_model(tmp_path / "any", (), cache)


def test_of_several_signatures_one_has_to_be_named(cache: Cache, tmp_path: Path) -> None:
    networks.saved_module(tmp_path / "two", "score", "embed")
    with pytest.raises(ModelError, match="two: has 2 signatures") as found:
        open_model("two", (tmp_path,), cache)
    assert "score: rows (float32, [None, 4]) → best, scores" in found.value.message
    assert "embed: rows (float32, [None, 4]) → embedding" in found.value.message
    assert found.value.hint == 'name one behind the folder, as in "two::score"'
    assert described(open_model("two::embed", (tmp_path,), cache))[1] == [("embedding", "float32", ["batch", 4])]
    with pytest.raises(ModelError, match="two::scroe: no such signature") as found:
        open_model("two::scroe", (tmp_path,), cache)
    assert found.value.hint == "did you mean 'score'?"


def test_keras_names_for_two_functions_are_a_choice(cache: Cache, tmp_path: Path) -> None:
    module = networks.Module()
    tf.saved_model.save(
        module, str(tmp_path / "two"), signatures={"serve": module.score, "serving_default": module.embed}
    )
    with pytest.raises(ModelError, match="two: has 2 signatures"):
        open_model("two", (tmp_path,), cache)


def test_a_saved_model_changes_with_its_files(cache: Cache, tmp_path: Path) -> None:
    folder = networks.saved_module(tmp_path / "module", "score")
    before = open_model(folder, (), cache)
    shutil.copytree(folder, tmp_path / "copy")
    assert open_model(tmp_path / "copy", (), cache).sha256 == before.sha256
    module = networks.Module()
    module.weight.assign(module.weight * 2)
    tf.saved_model.save(module, str(folder), signatures={"score": module.score})
    assert open_model(folder, (), cache).sha256 != before.sha256


def test_an_engine_inside_a_saved_model_is_said(cache: Cache, tmp_path: Path) -> None:
    folder = networks.saved_module(tmp_path / "converted", "score")
    _edited(folder, lambda node: node.op == "MatMul", "TRTEngineOp")
    with pytest.raises(ModelError, match="converted by TF-TRT: it holds TRTEngineOp matmul") as found:
        open_model(folder, (), cache)
    assert "that it was converted from" in found.value.hint


def _edited(folder: Path, chosen: Any, operator: str) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    for function in saved.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            if chosen(node):
                node.op = operator
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut off", "saved_model.pb is no SavedModel, or cut off"),
        ("variables", "TensorFlow cannot load it"),
        ("empty", "a folder without saved_model.pb is no SavedModel"),
        ("unsigned", "has no signature"),
    ],
)
def test_a_damaged_saved_model_is_said_to_be(damage: str, said: str, cache: Cache, tmp_path: Path) -> None:
    folder = networks.saved_module(tmp_path / "module", *([] if damage == "unsigned" else ["score"]))
    file = folder / "saved_model.pb"
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "variables":
        for each in (folder / "variables").glob("*data*"):
            each.unlink()
    elif damage == "empty":
        file.unlink()
    with pytest.raises(ModelError, match=said) as found:
        open_model("module", (tmp_path,), cache)
    assert found.value.message.startswith("module: ")
