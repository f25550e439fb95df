"""Arrays by name in a folder of the cache, so that they can be mapped without reading."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


_TYPES_FILE = "types.json"


def save_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that `load_arrays` can map them without reading."""
    (folder / "names.json").write_text(json.dumps(list(arrays)))
    # numpy's files hold the bytes of bfloat16 and FP8, and forget the type.
    lost = {name: array.dtype.name for name, array in arrays.items() if array.dtype.type.__module__ == "ml_dtypes"}
    if lost:
        (folder / _TYPES_FILE).write_text(json.dumps(lost))
    for index, array in enumerate(arrays.values()):
        np.save(folder / f"{index}.npy", array.astype(str) if array.dtype.kind == "O" else array, allow_pickle=False)


def load_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays that `save_arrays` wrote, memory-mapped and read-only."""
    names = json.loads((folder / "names.json").read_text())
    arrays = {name: np.load(folder / f"{index}.npy", mmap_mode="r") for index, name in enumerate(names)}
    if (folder / _TYPES_FILE).exists():
        import ml_dtypes

        for name, dtype in json.loads((folder / _TYPES_FILE).read_text()).items():
            arrays[name] = arrays[name].view(getattr(ml_dtypes, dtype))
    return arrays
