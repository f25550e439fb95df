"""A path that no other source takes: an ONNX file under another name."""

from __future__ import annotations

import os

from pytest_trtcheck.model.sources import onnx_file

title, open = onnx_file.title, onnx_file.open


def accepts(source: object) -> bool:
    """Any path."""
    return isinstance(source, (str, os.PathLike))
