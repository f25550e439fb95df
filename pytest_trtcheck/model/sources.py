"""What a user may name as the model, opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import Cache, Key, hash_bytes
from pytest_trtcheck.errors import ModelError
from pytest_trtcheck.model import made, onnx_model, remembered
from pytest_trtcheck.model.onnx_model import OnnxModel

if TYPE_CHECKING:
    from collections.abc import Sequence


MODEL_FILE = "model.onnx"


def open_model(source: object, folders: Sequence[Path], cache: Cache, custom_ops: Sequence[str] = ()) -> OnnxModel:
    """The model that the user named: a path looked up in `folders`, the bytes of a file, or an onnx.ModelProto.

    A callable without arguments that makes one of these is called each time. With the libraries in `custom_ops`, where
    ONNX Runtime needs them.

    Raises
    ------
    ModelError
        There is no such file, it is no sound ONNX model, or the callable does not make one.
    """
    return onnx_model.with_custom_ops(_found(source, folders, cache), custom_ops)


def _found(source: object, folders: Sequence[Path], cache: Cache) -> OnnxModel:
    if isinstance(source, OnnxModel):
        return source
    label = None
    if callable(source):
        label = f"{made.name_of(source)}()"
        source = made.model_made_by(source)
    if isinstance(source, bytes) or hasattr(source, "SerializeToString"):
        return _model_in_memory(source, cache, label)
    if not made.is_model(source):
        raise ModelError(
            f"a {type(source).__name__} is no model",
            "give a path, the bytes of an ONNX file, an onnx.ModelProto, or a function that makes one",
        )
    path = Path(str(source)).expanduser()
    tried = [path] if path.is_absolute() else [folder / path for folder in dict.fromkeys(folders)]
    for candidate in tried:
        if candidate.exists():
            return remembered.model(candidate, str(source), cache)
    raise ModelError(f"{source}: no such model file", f"looked for {' and '.join(map(str, tried))}")


def _model_in_memory(source: Any, cache: Cache, label: str | None) -> OnnxModel:
    if label is None:
        label = "<bytes>" if isinstance(source, bytes) else f"<ModelProto {source.graph.name or ''}>".replace(" >", ">")
    try:
        data = source if isinstance(source, bytes) else source.SerializeToString()
    except Exception as error:
        raise ModelError(
            f"{label}: cannot be serialized: {error}",
            "save it with external data and give its path (2 GiB is the most)",
        ) from error
    key = Key("model", label, {"sha256": hash_bytes(data)})
    entry = cache.get_or_make(key, lambda folder: _write_bytes(folder / MODEL_FILE, data))
    return remembered.model(entry.path / MODEL_FILE, label, cache)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
