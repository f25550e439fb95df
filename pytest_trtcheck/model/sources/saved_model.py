"""A TensorFlow SavedModel: a folder with `saved_model.pb`, and one of its signatures."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError, first_line, listed, suggestion

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening
    from pytest_trtcheck.model.sources.tensorflow.function import Function

title = "a SavedModel folder"
_SEPARATOR = "::"
_GRAPH_FILE = "saved_model.pb"
_KERAS_ALIASES = ["serve", "serving_default"]
"""What `model.export` of Keras writes: one function under two names."""


def accepts(source: object) -> bool:
    """A path with a signature behind it, "folder::serving_default"; one without is another path until it is found."""
    return isinstance(source, (str, os.PathLike)) and _SEPARATOR in str(source)


def open(source: Any, opening: Opening) -> OnnxModel:
    """The function of one signature, as tf2onnx exports it.

    Raises
    ------
    ModelError
        There is no such folder, no such signature or several of them, or it can't be loaded or exported.
    """
    folder, _, signature = str(source).partition(_SEPARATOR)
    return open_folder(opening.path(folder), signature or None, opening, opening.label or str(source))


def open_folder(folder: Path, signature: str | None, opening: Opening, label: str) -> OnnxModel:
    """The SavedModel in `folder`.

    Raises
    ------
    ModelError
        As `open`.
    """
    from pytest_trtcheck.cache import hash_bytes
    from pytest_trtcheck.model.sources import exported
    from pytest_trtcheck.model.sources.tensorflow.export import write
    from pytest_trtcheck.model.sources.tensorflow.library import require, versions
    from pytest_trtcheck.model.sources.tensorflow.origin import TensorFlowOrigin

    if not (folder / _GRAPH_FILE).is_file():
        raise ModelError(
            f"{label}: a folder without {_GRAPH_FILE} is no SavedModel",
            "give the folder that model.export or tf.saved_model.save wrote, or a file",
            code="model-kind",
        )
    require()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "fingerprint.pb")
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {opening.cache.hash(path)}" for path in files)
    identity = hash_bytes(f"{listing}\n{signature}".encode())
    origin = TensorFlowOrigin(f"the SavedModel {label}", identity, lambda: _function(folder, signature, label))
    made_from = {"files": hash_bytes(listing.encode()), "signature": signature or "", **versions()}
    return exported.exported(opening, label, made_from, lambda path: write(path, origin.function, label), origin)


def _function(folder: Path, name: str | None, label: str) -> Function:
    from pytest_trtcheck.model.sources.tensorflow.library import load_tensorflow, said

    load_tensorflow()
    _refuse_unusable(folder, label)
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(folder))
    except Exception as error:
        raise ModelError(
            f"{label}: TensorFlow cannot load it: {type(error).__name__}: {said(error)}",
            "save it again, or fetch the folder whole: saved_model.pb, and variables/ with all its files",
            code="model-unloadable",
        ) from error
    return _chosen({key: _of_signature(loaded, key) for key in loaded.signatures}, name, label)


def _refuse_unusable(folder: Path, label: str) -> None:
    """Say what stands against a SavedModel before TensorFlow loads it, where its message would not.

    Raises
    ------
    ModelError
        It is cut off, holds several graphs, or an engine of TensorRT.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    from pytest_trtcheck.model.sources.tensorflow.export import refuse_engines

    path = folder / _GRAPH_FILE
    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString(path.read_bytes())
        if not saved.meta_graphs:
            raise DecodeError("it holds no graph")
    except DecodeError as error:
        raise ModelError(
            f"{label}: {_GRAPH_FILE} is no SavedModel, or cut off ({path.stat().st_size:,} bytes): {first_line(error)}",
            "save it again, or fetch it whole (a Git LFS pointer is a text file of about 130 bytes)",
            code="model-damaged",
        ) from error
    if len(saved.meta_graphs) > 1:
        tags = [" ".join(each.meta_info_def.tags) or "no tag" for each in saved.meta_graphs]
        raise ModelError(
            f"{label}: holds {len(tags)} graphs ({listed(tags, 10)})",
            "save the one to check by tf.saved_model.save",
            code="model-signature",
        )
    refuse_engines(saved.meta_graphs[0].graph_def, label)


def _of_signature(loaded: Any, name: str) -> Function:
    """A signature as a function of its inputs in the order of their names."""
    from pytest_trtcheck.model.sources.tensorflow.function import Function

    _, specs = loaded.signatures[name].structured_input_signature
    names = sorted(specs)

    def compute(*tensors: Any) -> Mapping[str, Any]:
        # By way of what was loaded: it owns the variables, which the function alone does not keep alive.
        outputs: Mapping[str, Any] = loaded.signatures[name](**dict(zip(names, tensors, strict=True)))
        return outputs

    return Function(compute, {name: specs[name] for name in names})


def _chosen(functions: Mapping[str, Function], name: str | None, label: str) -> Function:
    """The function that was asked for, or the only one.

    Raises
    ------
    ModelError
        There is none of that name, or none was asked for and there are several.
    """
    from pytest_trtcheck.model.sources.tensorflow.function import identity_of

    folder = label.partition(_SEPARATOR)[0]
    shown = "".join(f"\n    {key}: {_described(function)}" for key, function in functions.items())
    if not functions:
        raise ModelError(
            f"{label}: has no signature, so nothing says which of its functions is meant",
            'save it with one, tf.saved_model.save(module, folder, signatures={"serving_default": module.function})',
            code="model-signature",
        )
    if name is not None:
        if name not in functions:
            raise ModelError(
                f"{label}: no such signature; it has{shown}", suggestion(name, functions), code="model-signature"
            )
        return functions[name]
    if len(functions) == 1:
        return next(iter(functions.values()))
    if sorted(functions) == _KERAS_ALIASES and len({identity_of(each) for each in functions.values()}) == 1:
        return functions["serving_default"]
    raise ModelError(
        f"{label}: has {len(functions)} signatures:{shown}",
        f'name one behind the folder, as in "{folder}{_SEPARATOR}{next(iter(functions))}"',
        code="model-signature",
    )


def _described(function: Function) -> str:
    inputs = [
        f"{name} ({spec.dtype.name}, {list(spec.shape) if spec.shape.rank is not None else 'any shape'})"
        for name, spec in function.inputs.items()
    ]
    return f"{listed(inputs, 10) or 'no inputs'} → {listed(function.outputs, 10)}"
