"""An ONNX file, by its path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening

title = "a path"


def accepts(source: object) -> bool:
    """A path that ends in `.onnx`."""
    return isinstance(source, (str, os.PathLike)) and str(source).endswith(".onnx")


def open(source: Any, opening: Opening) -> OnnxModel:
    """The model in the first folder that has such a file.

    Raises
    ------
    ModelError
        None has, or it is no sound model.
    """
    from pytest_trtcheck.model import remembered

    return remembered.model(opening.path(source), str(source), opening.cache)
