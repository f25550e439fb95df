"""An ONNX model in memory: the bytes of a file, or an onnx.ModelProto."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening

title = "the bytes of an ONNX file, an onnx.ModelProto"


def accepts(source: object) -> bool:
    """Bytes, and what can be serialized as protobuf messages are, and holds a graph as those of models do."""
    return isinstance(source, bytes) or (hasattr(source, "SerializeToString") and hasattr(source, "graph"))


def open(source: Any, opening: Opening) -> OnnxModel:
    """The model as a file in the cache.

    Raises
    ------
    ModelError
        It cannot be serialized, or is no sound model.
    """
    from pytest_trtcheck.cache import Key, hash_bytes
    from pytest_trtcheck.model import remembered
    from pytest_trtcheck.model.sources import MODEL_FILE

    label = opening.label
    if label is None:
        label = "<bytes>" if isinstance(source, bytes) else f"<ModelProto {source.graph.name or ''}>".replace(" >", ">")
    try:
        data = source if isinstance(source, bytes) else source.SerializeToString()
    except Exception as error:
        raise ModelError(
            f"{label}: cannot be serialized: {error}",
            "save it with external data and give its path (2 GiB is the most)",
            code="model-size",
        ) from error

    def write(folder: Path) -> None:
        (folder / MODEL_FILE).write_bytes(data)

    entry = opening.cache.get_or_make(Key("model", label, {"sha256": hash_bytes(data)}), write)
    try:
        return remembered.model(entry.path / MODEL_FILE, label, opening.cache)
    except ModelError as error:
        if error.code != "model-weights":
            raise
        raise ModelError(
            error.message,
            "a model in memory has no folder with data files: load it whole, onnx.load(path), or give its path",
            code=error.code,
        ) from error
