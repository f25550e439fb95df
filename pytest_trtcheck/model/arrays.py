"""Arrays: made of other libraries' tensors, and by name in a folder of the cache, mapped without being read."""

from __future__ import annotations

import copy
import json
import sys
from collections import UserDict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pytest_trtcheck.errors import InputError, kind_of, own_text, plural
from pytest_trtcheck.model.npz import mapped
from pytest_trtcheck.record import typed
from pytest_trtcheck.spec import Case

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray


_TYPES_FILE = "types.json"


MOST_NAMES = 10_000
"""Of one mapping: far more than any model has inputs or outputs, and fewer than one that never ends."""


def items_of(values: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The items of a user's mapping, names as plain texts.

    Raises
    ------
    InputError
        There is no end to them.
    """
    found = [*islice(values.items(), MOST_NAMES + 1)]
    if len(found) > MOST_NAMES:
        raise InputError(f"{kind_of(values)} of more than {MOST_NAMES:,} names", "give what belongs to the model alone")
    return [(own_text(name), value) for name, value in found]


def is_array(value: object) -> bool:
    """Whether it is an array, or a tensor of a library that numpy can read: PyTorch's, TensorFlow's, JAX's."""
    return isinstance(value, (np.ndarray, np.generic)) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def as_array(value: Any, where: str = "") -> NDArray[Any]:
    """An array, or a tensor as an array, of bfloat16 and FP8 too; a tensor on a GPU is copied from there.

    Parameters
    ----------
    where
        What messages call it, where a mask is refused: nothing here looks at one.

    Raises
    ------
    InputError
        It is, there, an array that hides elements.
    """
    if where and isinstance(value, np.ma.MaskedArray) and (hidden := int(np.ma.getmaskarray(value).sum())):
        raise InputError(
            f"{where}: its mask hides {plural(hidden, 'element')}, and would not be looked at",
            "fill them, array.filled(0), or leave them out, array.compressed()",
            code="input-values",
        )
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return np.asarray(value)
    tensor = value.detach().cpu().resolve_conj().resolve_neg()
    name = str(tensor.dtype).removeprefix("torch.")
    if not name.startswith(("bfloat", "float8")):
        return np.asarray(tensor.numpy())
    import ml_dtypes

    bits = tensor.contiguous().view(torch.int16 if name.startswith("bfloat") else torch.uint8)
    return np.asarray(bits.numpy().view(getattr(ml_dtypes, name)))


def owned(value: Any) -> Any:
    """What a loader or a generator gave, with arrays of its own, in mappings, lists and tuples too: the next item may
    be written where this one was. What is mapped from a file stays there, and what holds no array is handed on.
    """
    torch: Any = sys.modules.get("torch")
    if isinstance(value, np.ndarray):
        return value if any(files_behind({"": value})) else value.copy()
    if torch is not None and isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (dict, UserDict)):
        found = copy.copy(value)
        found.update({name: owned(each) for name, each in value.items()})
        return found
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(owned, value))
    if type(value) in (list, tuple):
        return type(value)(map(owned, value))
    return replace(value, inputs=owned(value.inputs), labels=owned(value.labels)) if isinstance(value, Case) else value


def copied(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays by name, for what may change them in place, or be written where they are."""
    return {name: np.array(array) for name, array in arrays.items()}


def arrays_of(values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Arrays or tensors by name as arrays.

    Raises
    ------
    InputError
        It is no mapping.
    """
    if not hasattr(values, "items"):
        raise InputError(
            f"expected a mapping from input name to array, got {kind_of(values)}",
            'give each input by its name: {"input": array}',
            code="input-names",
        )
    return {name: as_array(value, f"input {name!r}") for name, value in items_of(values)}


def files_behind(arrays: Mapping[str, NDArray[Any]]) -> Iterator[Path]:
    """The files that arrays are mapped from: whoever writes there changes them."""
    for given in arrays.values():
        array: NDArray[Any] | None = given
        while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
            array = array.base
        if isinstance(array, np.memmap) and array.filename is not None:
            yield Path(array.filename)


def save_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that `load_arrays` can map them without reading."""
    (folder / "names.json").write_text(json.dumps(list(arrays)))
    # numpy's files hold the bytes of bfloat16 and FP8, and forget the type.
    lost = {name: array.dtype.name for name, array in arrays.items() if array.dtype.type.__module__ == "ml_dtypes"}
    if lost:
        (folder / _TYPES_FILE).write_text(json.dumps(lost))
    for index, array in enumerate(arrays.values()):
        with (folder / f"{index}.npy").open("wb") as file:
            np.save(_Written(file), array.astype(str) if array.dtype.kind == "O" else array, allow_pickle=False)


class _Written:
    """A file of which numpy does not see that it is one: into those it writes by itself, and an error (a quota, a limit
    of a file's size) then does not say what went wrong.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def load_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays that `save_arrays` wrote, memory-mapped and read-only."""
    names = typed(json.loads((folder / "names.json").read_text()), list[str])
    arrays = {name: mapped(folder / f"{index}.npy") for index, name in enumerate(names)}
    if (folder / _TYPES_FILE).exists():
        import ml_dtypes

        for name, dtype in typed(json.loads((folder / _TYPES_FILE).read_text()), dict[str, str]).items():
            arrays[name] = arrays[name].view(getattr(ml_dtypes, dtype))
    return arrays
