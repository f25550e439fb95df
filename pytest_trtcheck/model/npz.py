"""Arrays of every dtype that a model can have, in .npz files without pickle.

Not in safetensors' format (0.8): read back by numpy it has no bfloat16 and no FP8 (a KeyError), and it takes neither
4-bit types nor strings.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zipfile
import zlib
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np

from pytest_trtcheck.errors import MISREAD, first_line, plural
from pytest_trtcheck.model.memory import too_large
from pytest_trtcheck.record.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

T = TypeVar("T")


class ArrayWriter:
    """An .npz file, written one array at a time. `index` says what is in it, for `read_arrays`.

    numpy opens it as any other: `np.load("inputs.npz")["0/images"]`. What numpy's format has no name for is there as
    bytes: bfloat16 and its kin as unsigned integers of their size, Python strings as JSON.
    """

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self.index: list[dict[str, Any]] = []

    def add(self, case: int, arrays: Mapping[str, NDArray[Any]], folder: str = "") -> None:
        """Write the arrays of one case; `folder` keeps apart what bears the same names."""
        for number, (name, array) in enumerate(arrays.items()):
            usable = name.isprintable() and 0 < len(name) < 1000 and not name.startswith("#")
            entry = f"{folder}{case}/{name if usable else f'#{number}'}"
            stored, dtype = _storable(np.asarray(array))
            # A fixed date: the same arrays give the same file.
            info = zipfile.ZipInfo(f"{entry}.npy", (1980, 1, 1, 0, 0, 0))
            with self._file.open(info, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, stored, allow_pickle=False)
            self.index.append({"case": case, "name": name, "entry": entry, "dtype": dtype, "shape": list(array.shape)})

    def add_text(self, name: str, text: str) -> None:
        """Write a member that is no array."""
        self._file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            self.close()
            return
        # Else Python finishes it later, and on a full disk says that it could not, wherever that is.
        with suppress(OSError, ValueError):
            self.close()


def _storable(array: NDArray[Any]) -> tuple[NDArray[Any], str]:
    """An array that numpy's format can hold, and the name of the dtype that it stands for."""
    if array.dtype.kind == "O":
        items = [{"bytes": item.decode("latin-1")} if isinstance(item, bytes) else str(item) for item in array.flat]
        return np.frombuffer(json.dumps(items).encode(), np.uint8), "object"
    if array.dtype.type.__module__ == ml_dtypes.__name__:
        return array.view(f"u{array.dtype.itemsize}"), array.dtype.name
    return array, array.dtype.str


def _restored(stored: NDArray[Any], dtype: str, shape: list[int]) -> NDArray[Any]:
    if dtype == "object":
        items = json.loads(stored.tobytes())
        if math.prod(shape) != len(items):
            raise ValueError(f"shape {shape} of {len(items)} strings")
        restored = np.empty(shape, dtype=object)
        for place, item in enumerate(items):
            restored.flat[place] = item["bytes"].encode("latin-1") if isinstance(item, dict) else item
        return restored
    return stored.view(getattr(ml_dtypes, dtype)) if hasattr(ml_dtypes, dtype) else stored


def read_arrays(path: Path, index: list[dict[str, Any]], case: int) -> dict[str, NDArray[Any]]:
    """The arrays of one case that an `ArrayWriter` wrote; none where the case was left out."""
    return read_cases(path, [each for each in index if each["case"] == case], [case])[0]


def read_cases(path: Path, index: list[dict[str, Any]], cases: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
    """The arrays of several cases, each of which an index names once: few bytes could name one array many times."""
    if len({each["entry"] for each in index}) < len(index):
        raise ValueError("its index names an array twice")
    found: dict[int, dict[str, NDArray[Any]]] = {case: {} for case in cases}
    with _zip(path) as file:
        for each in index:
            if each["case"] in found:
                stored = _unpacked(file, f"{each['entry']}.npy", _read)
                found[each["case"]][each["name"]] = _restored(stored, each["dtype"], each["shape"])
    return list(found.values())


UNREADABLE = *MISREAD, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError
"""What reading a file that is cut off, damaged, or of another kind can raise."""


def load_text(path: Path, name: str) -> str | None:
    """A member that is no array; None where the file has none of this name. One of `UNREADABLE` where it is no .npz."""
    with _zip(path) as file:
        return _unpacked(file, name, lambda stream, _: stream.read().decode()) if name in file.namelist() else None


def load(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file by name, or that of a .npy file as `arr_0`; one of `UNREADABLE` where it is neither.

    Nothing is ever unpickled: a pickle can run code.
    """
    with open_regular(path) as stream:
        if not zipfile.is_zipfile(stream):
            stream.seek(0)
            return {"arr_0": _read(stream, stream.seek(0, os.SEEK_END))}
    with _zip(path) as file:
        members = [each for each in file.infolist() if each.filename.endswith(".npy")]
        return {each.filename.removesuffix(".npy"): _unpacked(file, each.filename, _read) for each in members}


def mapped(path: Path) -> NDArray[Any]:
    """The array of a .npy file, mapped without being read; one of `UNREADABLE` where it is none.

    Where the file system maps nothing (FUSE with direct_io, virtiofs and 9p without a cache), it is read.
    """
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False, mmap_mode="r")
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno == errno.ENODEV:
            return load(path)["arr_0"]
        raise
    except Exception as error:
        raise _no_header(error) from error
    return array


def _no_header(error: Exception) -> ValueError:
    """Of numpy, which reads a header as a piece of Python, and fails in as many ways."""
    return ValueError(f"its header is none of numpy's: {first_line(error)}")


@contextmanager
def _zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The file, open, once it is known to be one that fits into memory: few bytes can be unpacked to any number."""
    with open_regular(path) as stream, zipfile.ZipFile(stream) as file:
        if said := too_large(sum(each.file_size for each in file.infolist())):
            raise ValueError(f"its arrays claim {said}")
        yield file


def _unpacked(file: zipfile.ZipFile, name: str, read: Callable[[IO[bytes], int], T]) -> T:
    """What `read` makes of a member and its size."""
    try:
        with file.open(name) as stream:
            return read(stream, file.getinfo(name).file_size)
    except UNREADABLE:
        raise
    except Exception as error:  # each way of packing has errors of its own
        raise ValueError(f"{name[:200]!r} cannot be unpacked: {first_line(error)}") from error


def _read(stream: IO[bytes], size: int) -> NDArray[Any]:
    """The array of a .npy file of `size` bytes: memory is taken for what the header claims, whatever follows it."""
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read_header(stream)
    except Exception as error:
        raise _no_header(error) from error
    if any(axis < 0 for axis in shape):
        raise ValueError(f"its header claims the shape {shape}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > size and not dtype.hasobject:
        raise ValueError(f"its header claims {plural(claimed, 'byte')}, and it holds {size:,}")
    if said := too_large(claimed):
        raise ValueError(f"it takes {said}")
    stream.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def size_bytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    """What the arrays take."""
    return sum(np.asarray(array).nbytes for array in arrays.values())
