"""A path that no other source takes: a folder, which is a SavedModel, or an ONNX file under another name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.model.sources import onnx_file, saved_model

if TYPE_CHECKING:
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening

title = onnx_file.title


def accepts(source: object) -> bool:
    """Any path."""
    return isinstance(source, (str, os.PathLike))


def open(source: Any, opening: Opening) -> OnnxModel:
    """The model in the first folder that has such a file or folder.

    Raises
    ------
    ModelError
        None has, or it is no sound model.
    """
    path = opening.path(source)
    if path.is_dir():
        return saved_model.open_folder(path, None, opening, opening.label or str(source))
    return onnx_file.open(source, opening)
