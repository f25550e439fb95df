"""A Keras 3 model: in memory, or a `.keras` file."""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError, first_line, listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening
    from pytest_trtcheck.model.sources.tensorflow.function import Function

title = "a Keras model, a .keras file"
_GENERATED_INPUT = re.compile(r"(keras_tensor|input_layer|input)(_\d+)?")


def accepts(source: object) -> bool:
    """A model of Keras 3, or of Keras 2 to say what to do about it, and a path that ends in `.keras`."""
    if isinstance(source, (str, os.PathLike)):
        return str(source).endswith(".keras")
    return _is_model(source, "keras") or _is_model(source, "tf_keras")


def _is_model(source: object, library: str) -> bool:
    """Whether it is a model of a library; what was not imported has made none."""
    kind = getattr(sys.modules.get(library), "Model", None)
    return isinstance(kind, type) and isinstance(source, kind)


def open(source: Any, opening: Opening) -> OnnxModel:
    """The model as tf2onnx exports it.

    Raises
    ------
    ModelError
        The file is missing or cut off, holds a layer that can't be loaded, or the model can't be exported.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_file(opening.path(source), opening, opening.label or str(source))
    if _is_model(source, "tf_keras"):
        raise ModelError(
            f"<Keras 2 model {source.name}>: models of tf_keras are not exported",
            'save it, model.export("folder"), and give the folder as a SavedModel',
            code="model-kind",
        )
    return _open_model(source, opening, opening.label or f"<Keras model {source.name}>")


def _open_model(model: Any, opening: Opening, label: str) -> OnnxModel:
    from pytest_trtcheck.model.sources import exported
    from pytest_trtcheck.model.sources.tensorflow.export import write
    from pytest_trtcheck.model.sources.tensorflow.function import identity_of
    from pytest_trtcheck.model.sources.tensorflow.library import failing, versions
    from pytest_trtcheck.model.sources.tensorflow.origin import TensorFlowOrigin

    _load_keras(label)
    function = _function(model, opening.examples.inputs, label)
    with failing(f"{label}: cannot be exported to ONNX"):
        identity = identity_of(function)
    made_from = {"model": identity, **versions()}
    origin = TensorFlowOrigin(f"the Keras model {model.name}", identity, lambda: function)
    return exported.exported(opening, label, made_from, lambda path: write(path, function, label), origin)


def _open_file(path: Path, opening: Opening, label: str) -> OnnxModel:
    from pytest_trtcheck.model.sources import exported
    from pytest_trtcheck.model.sources.tensorflow.export import write
    from pytest_trtcheck.model.sources.tensorflow.library import versions
    from pytest_trtcheck.model.sources.tensorflow.origin import TensorFlowOrigin

    foreign = list(dict.fromkeys(_of_other_modules(_config(path, label))))
    if foreign:
        # What such a layer computes stands in code that the file does not hold.
        return _open_model(_loaded(path, label), opening, label)
    identity = opening.cache.hash(path)

    def load() -> Function:
        return _function(_loaded(path, label), opening.examples.inputs, label)

    made_from = {"file": identity, **versions()}
    origin = TensorFlowOrigin(f"the Keras model in {label}", identity, load)
    return exported.exported(opening, label, made_from, lambda path: write(path, origin.function, label), origin)


def _config(path: Path, label: str) -> Any:
    """What the file says of the model's layers."""
    from pytest_trtcheck.model.npz import UNREADABLE

    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            return json.loads(archive.read("config.json"))
    except UNREADABLE as error:
        size = f"{plural(path.stat().st_size, 'byte')}" if path.is_file() else "no file"
        raise ModelError(
            f"{label}: not a .keras file, or cut off ({size}): {first_line(error)}",
            "save it again by model.save, or fetch it whole (a Git LFS pointer is a text file of about 130 bytes)",
            code="model-damaged",
        ) from error


def _of_other_modules(config: Any) -> Iterator[str]:
    """The classes and functions in a saved configuration that do not come with Keras."""
    if isinstance(config, dict):
        module, name = config.get("module"), config.get("class_name")
        is_named = isinstance(name, str) and "module" in config
        if is_named and (
            name in {"Lambda", "function", "__lambda__"} or str(module).split(".")[0] not in {"keras", "builtins"}
        ):
            yield str(name)
        for value in config.values():
            yield from _of_other_modules(value)
    elif isinstance(config, list):
        for value in config:
            yield from _of_other_modules(value)


def _loaded(path: Path, label: str) -> Any:
    """The model that the file holds."""
    from pytest_trtcheck.model.sources.tensorflow.library import said

    _load_keras(label)
    import keras

    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise ModelError(
            f"{label}: Keras cannot load it: {type(error).__name__}: {said(error)}",
            "decorate the model's own classes and functions by @keras.saving.register_keras_serializable() and import "
            "their module in the test, or give a callable: model=lambda: keras.saving.load_model(…, custom_objects={…}"
            + (", safe_mode=False)" if "safe" in str(error) or "lambda" in str(error).lower() else ")"),
            code="model-unloadable",
        ) from error


def _load_keras(label: str) -> None:
    """Import Keras with TensorFlow behind it.

    Raises
    ------
    MissingDependencyError
        One of both is not installed.
    ModelError
        Keras computes with another library.
    """
    from pytest_trtcheck.model.sources.tensorflow.library import load_tensorflow

    if "keras" not in sys.modules:
        load_tensorflow()
    import keras

    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ModelError(
            f"{label}: Keras computes with {backend} in this process, and models are exported through TensorFlow",
            "set KERAS_BACKEND=tensorflow in the environment of the tests: a .keras file is the same for every backend",
            code="export-failed",
        )
    load_tensorflow()


# --- what it computes ------------------------------------------------------------------------------------------------


def _function(model: Any, examples: object, label: str) -> Function:
    """The model in inference, from tensors to outputs by name."""
    import keras
    import tensorflow as tf

    from pytest_trtcheck.model.sources.tensorflow.function import Function

    structure = _inputs_of(model, examples, label)
    paths = keras.tree.flatten_with_path(structure)
    names = _input_names(paths, label)
    specs = [
        tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name) for name, (_, spec) in zip(names, paths, strict=True)
    ]

    def compute(*tensors: Any) -> Mapping[str, Any]:
        return _named_outputs(model, model(keras.tree.pack_sequence_as(structure, tensors), training=False))

    layers = {layer.name for layer in model._flatten_layers(include_self=False)}
    return Function(compute, dict(zip(names, specs, strict=True)), model.name, frozenset(layers))


def _inputs_of(model: Any, examples: object, label: str) -> Any:
    """What the model is called with, a keras.KerasTensor or array in place of each tensor."""
    import keras

    if isinstance(model, keras.Sequential):
        if not model.built:
            raise ModelError(
                f"{label}: its input has no shape yet",
                "begin it with keras.Input(shape), or call it once",
                code="export-inputs",
            )
        return model.inputs[0]
    if isinstance(model, keras.Model) and hasattr(model, "output_names"):
        return model.input
    return _example_of(examples, label)


def _example_of(examples: object, label: str) -> Any:
    """What a subclassed model, which has no inputs of its own, is called with in the test."""
    import numpy as np

    from pytest_trtcheck.model.arrays import as_array, is_array

    first = examples
    if isinstance(examples, (list, tuple)) and examples:
        first = examples[0]
    if isinstance(first, dict) and first and all(isinstance(key, str) for key in first):
        return {name: as_array(value) for name, value in first.items()}
    if is_array(first):
        return np.asarray(as_array(first))
    raise ModelError(
        f"{label}: a subclassed Keras model does not say what its inputs are",
        "return inputs from the test, one array or a dict as its call takes them, or build it by keras.Model(…)",
        code="export-inputs",
    )


def _input_names(paths: Any, label: str) -> list[str]:
    """The keys of a dictionary of inputs, or else the names of the Input layers.

    A name that Keras made up counts through the process, and would be another one in another run: such an input is
    called by its place, as Keras' own export calls outputs.
    """
    names = []
    for index, (path, spec) in enumerate(paths):
        given = path[-1] if path and isinstance(path[-1], str) else getattr(spec, "name", None)
        names.append(f"input_{index}" if given is None or _GENERATED_INPUT.fullmatch(given) else str(given))
    if len(set(names)) < len(names):
        raise ModelError(
            f"{label}: several inputs have one name: {listed(names, 10)}",
            "give each Input a name of its own",
            code="export-failed",
        )
    return names


def _named_outputs(model: Any, value: Any) -> dict[str, Any]:
    """The outputs by the keys of their dictionary, or else by the layers that make them, or else by their place."""
    import keras

    paths = keras.tree.flatten_with_path(value)
    if paths and all(path and isinstance(path[-1], str) for path, _ in paths):
        names = [path[-1] for path, _ in paths]
    else:
        names = _layers_of_outputs(model, len(paths))
    if len(set(names)) < len(names):
        names = [f"output_{index}" for index in range(len(paths))]
    return {name: each for name, (_, each) in zip(names, paths, strict=True)}


def _layers_of_outputs(model: Any, count: int) -> list[str]:
    """For each output the name of its layer, where the user gave it one."""
    import keras

    last = [model.layers[-1].name] if isinstance(model, keras.Sequential) else None
    names = last or list(getattr(model, "output_names", ()))
    if len(names) != count:
        names = [""] * count
    kinds = {layer.name: type(layer).__name__ for layer in model.layers}
    return [
        f"output_{index}" if not name or _is_generated(name, kinds.get(name, "")) else name
        for index, name in enumerate(names)
    ]


def _is_generated(name: str, kind: str) -> bool:
    """Whether Keras made up a layer's name: its class in snake case, and a number."""
    words = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)
    words = re.sub("([a-z])([A-Z])", r"\1_\2", words).lower()
    return re.fullmatch(rf"{re.escape(words)}(_\d+)?", name) is not None
