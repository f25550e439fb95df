"""magika, the file type model that this project also ships: its files and its preprocessing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

BLOCK, PART, PADDING = 4096, 1024, 256


def model_path() -> Path:
    """The ONNX file inside the installed package."""
    spec = find_spec("magika")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("models/*/model.onnx")
    return path


def prepare(paths: Iterable[Path]) -> NDArray[np.int32]:
    """Files as the model reads them, (N, 2048): 1,024 bytes from each end, stripped, padded in between with 256."""
    rows = []
    for path in paths:
        content = path.read_bytes()
        head = np.frombuffer(content[:BLOCK].lstrip()[:PART], np.uint8)
        tail = np.frombuffer(content[-BLOCK:].rstrip()[-PART:], np.uint8)
        row = np.full(2 * PART, PADDING, np.int32)
        row[: len(head)] = head
        row[2 * PART - len(tail) :] = tail
        rows.append(row)
    return np.stack(rows)
