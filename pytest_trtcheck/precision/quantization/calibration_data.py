"""Calibration data as the user gives it, turned into samples: one mapping from input name to array for each inference.

How an array becomes samples depends on the model's input alone:

- one dimension more than the input has: the first dimension counts samples;
- as many dimensions as the input, and fitting it (an open first dimension admits any size): one sample;
- as many dimensions, but the input's first dimension is fixed at b and the array's is a multiple of b: split into
  samples of b rows.

Every input of a file or mapping must come to the same number of samples. An array of another type of the same kind
(float64 for float32, int32 for int64) is converted where no value changes; everything else is an error.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pytest_trtcheck.cache import Cache, HashedFile, Key, hash_code, hashed, require_same
from pytest_trtcheck.errors import CalibrationError, kind_of, lacked_files, plural
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import npz, remembered
from pytest_trtcheck.model.arrays import as_array, files_behind, is_array, items_of, owned
from pytest_trtcheck.record import typed
from pytest_trtcheck.record.files import expanded, open_regular
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import TensorSpec


Sample: TypeAlias = "dict[str, NDArray[Any]]"
_Items: TypeAlias = "Iterable[tuple[str, object]]"

_MMAP_BYTES = 64 << 20
"""A .npy file from this size on is read row by row, so that a stack of samples is never in memory as a whole."""
_KINDS = {"f": "float", "i": "integer", "u": "integer", "b": "bool", "c": "complex", "U": "string", "S": "string"}


class Samples:
    """Calibration samples, read and checked when iterated; each iteration starts from the first one again.

    Parameters
    ----------
    items
        (what messages call it, a mapping, array or path) for each item.
    specs
        The model's inputs.
    limit
        The most samples to give.
    """

    def __init__(self, items: _Items, specs: Sequence[TensorSpec], limit: int) -> None:
        self._items = items
        self.specs = tuple(specs)
        self.limit = limit
        self.read: dict[Path, HashedFile] = {}
        """The files that were read, as they were the first time."""

    def __iter__(self) -> Iterator[Sample]:
        """The samples.

        Raises
        ------
        CalibrationError
            A file can't be read, an array doesn't fit the model's inputs or holds NaN, or there is no sample at all.
        ModelError
            A file is another one than it was the first time.
        """
        for _, sample in self._labelled():
            yield sample
        require_same(self.read.values())

    def describe(self, index: int) -> str:
        """Where the sample of this index, counted from 0, comes from; reads the data up to it."""
        label = next((label for label, _ in islice(self._labelled(), index, None)), "")
        return f"calibration sample {index} ({label})" if label else f"calibration sample {index}"

    def rows(self, sample: Mapping[str, NDArray[Any]]) -> int:
        """How many rows a sample has in a batch that the model leaves open; 1 where its inputs do not have the same."""
        open_ = [spec.name for spec in self.specs if len(spec.shape) > 1 and not isinstance(spec.shape[0], int)]
        sizes = {sample[name].shape[0] for name in open_}
        return sizes.pop() if len(sizes) == 1 else 1

    def files(self) -> tuple[Path, ...]:
        """The files that hold all of the data; none where any of it was given otherwise."""
        items = [item for _, item in self._items] if isinstance(self._items, list) else []
        paths = tuple(item for item in items if isinstance(item, Path))
        return paths if len(paths) == len(items) else ()

    def digest(self) -> str:
        """Identity of the samples, of every byte. Reads all of them."""
        return model_inputs.digest_of(self)

    def _labelled(self) -> Iterator[tuple[str, Sample]]:
        return islice(self._unlimited(), self.limit)

    def _reads(self, *paths: Path) -> None:
        for path in paths:
            if path not in self.read:
                try:
                    self.read[path] = hashed(path)
                except OSError as error:  # said where it is loaded; of what is mapped, the name may be gone
                    if lacked_files(error):
                        raise

    def _unlimited(self) -> Iterator[tuple[str, Sample]]:
        empty = True
        for label, item in self._items:
            if isinstance(item, Path):
                self._reads(item)
            loaded = _loaded(item, label)
            arrays = _named(loaded, self.specs, label)
            if not isinstance(item, Path):
                self._reads(*files_behind(arrays))
            mapped = loaded if isinstance(item, Path) and isinstance(loaded, np.memmap) else None
            for found in _split(arrays, self.specs, label, mapped):
                empty = False
                yield found
        if empty:
            raise CalibrationError(
                "the calibration data holds no samples",
                "give at least one; a generator that was read already gives no more: give a list",
                code="calibration-files",
            )


class ReadOnce:
    """What an iterator gives, as often as it is asked for: calibration goes over its data several times.

    A generator is closed behind that: the next check would go on where this one ended, with other samples.
    """

    def __init__(self, source: Iterator[object], most: int) -> None:
        self._source = source
        self._most = most

    @cached_property
    def _items(self) -> list[object]:
        found = list(map(owned, islice(self._source, self._most)))
        if isinstance(self._source, Generator):
            self._source.close()
        return found

    def __iter__(self) -> Iterator[object]:
        return iter(self._items)


def load(source: object, input_specs: Sequence[TensorSpec], base_dirs: Sequence[Path] = ()) -> Samples:
    """The samples in what the user gave as calibration data.

    Parameters
    ----------
    source
        A path or glob of .npz/.npy files ("**" included), a mapping from input name to array, an array (for a model of
        one input), an iterable of these, or a `Calibration` around any of them. Files are taken in the order of their
        names. A one-shot iterator is read at once and kept, up to the sample limit; anything else is read lazily.
    input_specs
        The model's inputs.
    base_dirs
        Where relative paths are looked up; the first folder that has a match counts.

    Raises
    ------
    CalibrationError
        No file matches, a file is neither .npz nor .npy, or `source` is nothing of the above.
    """
    calibration = source if isinstance(source, Calibration) else Calibration(source)
    if calibration.max_samples < 1:
        raise CalibrationError(
            f"Calibration: max_samples={calibration.max_samples}: expected a whole number from 1 on",
            code="argument-value",
        )
    return Samples(_items(calibration, base_dirs), input_specs, calibration.max_samples)


# --- what the user gave, as items ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """What a DataLoader gave: inputs, mostly with labels beside them."""

    item: object


class _Lazy:
    """Items of an iterable that is iterated anew each time."""

    def __init__(self, source: Iterable[object], base_dirs: Sequence[Path]) -> None:
        self._source = source
        self._base_dirs = base_dirs

    def __iter__(self) -> Iterator[tuple[str, object]]:
        is_loader = model_inputs.is_loader(self._source)
        for index, item in enumerate(self._source):
            label = f"calibration item {index}"
            yield from _expanded(_Batch(item) if is_loader else item, label, self._base_dirs)


def _items(calibration: Calibration, base_dirs: Sequence[Path]) -> _Items:
    data = calibration.data
    if isinstance(data, (str, os.PathLike, Mapping)) or is_array(data):
        return _expanded(data, "calibration data", base_dirs)
    if isinstance(data, Iterator):
        data = ReadOnce(data, calibration.max_samples)
    if isinstance(data, ReadOnce):
        data = list(data)
    elif model_inputs.shuffles(data) and isinstance(data, Iterable):
        # Read once, or each pass would see others.
        data = [_Batch(owned(each)) for each in islice(data, calibration.max_samples)]
    # Another sequence may make its items when they are asked for: of those, no more than are used.
    if isinstance(data, (list, tuple)):
        return [item for index, each in enumerate(data) for item in _expanded(each, f"calibration[{index}]", base_dirs)]
    if isinstance(data, Iterable) and not isinstance(data, (bytes, bytearray)):
        return _Lazy(data, base_dirs)
    raise CalibrationError(
        f"calibration: expected files or input mappings, got {kind_of(data)}",
        "give a glob of .npz/.npy files, a list of those, or an iterable of mappings from input name to array",
        code="calibration-files",
    )


def _expanded(item: object, label: str, base_dirs: Sequence[Path]) -> list[tuple[str, object]]:
    if isinstance(item, _Batch) and isinstance(item.item, (str, os.PathLike)):
        item = item.item
    if isinstance(item, (str, os.PathLike)):
        return [(str(path), path) for path in _files(os.fspath(item), base_dirs)]
    return [(label, item)]


def _files(pattern: str | bytes, base_dirs: Sequence[Path]) -> list[Path]:
    wanted = expanded(os.fsdecode(pattern))
    folders = [Path()] if wanted.is_absolute() else list(base_dirs) or [Path()]
    for folder in folders:
        path = folder / wanted
        try:
            is_folder = path.is_dir()
        except OSError as error:
            hint = "let this account read it" if isinstance(error, PermissionError) else ""
            raise CalibrationError(f"calibration: {path}: {error.strerror}", hint, code="calibration-files") from error
        if is_folder:
            raise CalibrationError(
                f"calibration: {path} is a folder",
                f"name the files in it: {str(wanted / '*.npz')!r}",
                code="calibration-files",
            )
        if path.is_file():
            found = [path]
        else:
            # Path.glob takes no absolute patterns.
            names = glob.glob(str(wanted), root_dir=folder, recursive=True)  # noqa: PTH207
            found = [folder / name for name in sorted(names)]
            found = [path for path in found if path.is_file()]
        if found:
            if other := [path for path in found if path.suffix not in {".npz", ".npy"}]:
                raise CalibrationError(
                    f"calibration: {other[0]} is neither .npz nor .npy", "narrow the glob", code="calibration-files"
                )
            return found
        if os.path.lexists(path):
            what = "a pipe or a device, no file" if path.exists() else "a link that leads nowhere"
            raise CalibrationError(
                f"calibration: {path} is {what}",
                "name .npz or .npy files: they are read several times",
                code="calibration-files",
            )
    looked = ", ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    raise CalibrationError(
        f"calibration: no file matches {str(wanted)!r}",
        "check the path" if wanted.is_absolute() else f"relative paths are looked up in {looked}",
        code="calibration-files",
    )


# --- one item --------------------------------------------------------------------------------------------------------


def _loaded(item: object, label: str) -> object:
    """The item, read where it is a file."""
    if not isinstance(item, Path):
        return item
    try:
        if item.suffix == ".npy" and item.stat().st_size >= _MMAP_BYTES:
            array = npz.mapped(item)
            if array.flags.c_contiguous:
                return array
        loaded = npz.load(item)
        return loaded["arr_0"] if item.suffix == ".npy" else loaded
    except npz.UNREADABLE as error:
        if "pickle" in str(error).lower():
            raise CalibrationError(
                f"{label}: holds pickled objects, or is no numpy file; pickles are never loaded, they can run code",
                "save plain arrays: np.savez(path, **{input_name: array})",
                code="calibration-files",
            ) from error
        raise CalibrationError(
            f"{label}: not a readable numpy file: {str(error) or type(error).__name__}",
            "it is empty, cut off or damaged: write it again with np.save or np.savez",
            code="calibration-files",
        ) from error


def _named(item: object, specs: Sequence[TensorSpec], label: str) -> dict[str, NDArray[Any]]:
    """The item's arrays by input name: exactly the model's inputs."""
    if isinstance(item, _Batch):
        item = model_inputs.from_loader(item.item, [spec.name for spec in specs])
    if not isinstance(item, Mapping):
        if len(specs) != 1:
            raise CalibrationError(
                f"{label}: got {kind_of(item)} for a model of {len(specs)} inputs",
                f"give a mapping or .npz with {_expected(specs)}",
                code="calibration-fit",
            )
        return {specs[0].name: _array(item, f"{label}: input {specs[0].name!r}")}
    arrays = {str(name): value for name, value in items_of(item)}
    if len(specs) == len(arrays) == 1 and next(iter(arrays)).startswith("arr_"):
        # np.savez names what it was given without a name "arr_0".
        arrays = {specs[0].name: next(iter(arrays.values()))}
    names = {spec.name for spec in specs}
    if missing := sorted(names - set(arrays)):
        raise CalibrationError(
            f"{label}: missing {', '.join(map(repr, missing))}; it has {', '.join(map(repr, arrays)) or 'nothing'}",
            f"expected {_expected(specs)}",
            code="calibration-fit",
        )
    if unknown := sorted(set(arrays) - names):
        raise CalibrationError(
            f"{label}: the model has no input {', '.join(map(repr, unknown))}",
            f"expected {_expected(specs)} alone",
            code="calibration-fit",
        )
    return {spec.name: _array(arrays[spec.name], f"{label}: input {spec.name!r}") for spec in specs}


def _expected(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name!r} ({spec.dtype}, {_shape_text(spec)})" for spec in specs)


def _shape_text(spec: TensorSpec) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"


def _array(value: object, where: str) -> NDArray[Any]:
    if not is_array(value) and not hasattr(value, "__array__"):
        raise CalibrationError(
            f"{where}: expected an array, got {kind_of(value)}", "np.asarray(…) makes one", code="calibration-fit"
        )
    array = as_array(value, where)
    if array.dtype.kind == "O":
        raise CalibrationError(
            f"{where}: holds Python objects, not numbers", "are its rows of different lengths?", code="calibration-fit"
        )
    if array.size == 0:
        raise CalibrationError(
            f"{where}: is empty, shape {list(array.shape)}", "leave it out or fill it", code="calibration-fit"
        )
    return array


def _split(
    arrays: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec], label: str, mapped: np.memmap[Any, Any] | None
) -> Iterator[tuple[str, Sample]]:
    """The samples that the arrays hold, by the rules at the top of this module; `mapped`: the only one, in its file."""
    takes = {spec.name: _samples_of(arrays[spec.name], spec, label, mapped) for spec in specs}
    counts = {name: count for name, (count, _) in takes.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
        raise CalibrationError(
            f"{label}: the inputs don't hold the same number of samples: {listed}",
            "pair them up, one row each",
            code="calibration-fit",
        )
    # A model without inputs computes the same each time: one sample.
    number = next(iter(counts.values()), 1)
    for index in range(number):
        where = label if number == 1 else f"{label}, row {index}"
        yield where, {spec.name: _checked(takes[spec.name][1](index), spec, where) for spec in specs}


def _samples_of(
    array: NDArray[Any], spec: TensorSpec, label: str, mapped: np.memmap[Any, Any] | None
) -> tuple[int, Callable[[int], NDArray[Any]]]:
    """How many samples of `spec` are in `array`, and what gives each."""
    rank = len(spec.shape)

    def rows(first: int, behind: int) -> NDArray[Any]:
        return array[first:behind] if mapped is None else _read_rows(mapped, first, behind, label)

    if array.ndim == rank + 1 and _fits(array.shape[1:], spec.shape):
        return array.shape[0], lambda index: np.asarray(rows(index, index + 1)[0])
    if array.ndim == rank and _fits(array.shape, spec.shape):
        return 1, lambda _: rows(0, len(array)) if array.ndim else array
    batch = spec.shape[0] if rank else None
    if array.ndim == rank and isinstance(batch, int) and batch and _fits(array.shape[1:], spec.shape[1:]):
        if array.shape[0] % batch == 0:
            return array.shape[0] // batch, lambda index: rows(index * batch, (index + 1) * batch)
        hint = f"give a multiple of {batch} rows: the model's batch is fixed"
    else:
        hint = f"a sample is {_shape_text(spec)}; a stack of samples has one dimension more, in front"
    raise CalibrationError(
        f"{label}: input {spec.name!r}: expected shape {_shape_text(spec)}, got {list(array.shape)}",
        hint,
        code="calibration-fit",
    )


def _read_rows(mapped: np.memmap[Any, Any], first: int, behind: int, label: str) -> NDArray[Any]:
    """Rows of a file by reading them: what is mapped ends the process (SIGBUS) where the file was cut off meanwhile."""
    shape = (behind - first, *mapped.shape[1:])
    row_bytes = mapped.itemsize * math.prod(shape[1:])
    try:
        with open_regular(os.fspath(mapped.filename or "")) as file:
            file.seek(mapped.offset + first * row_bytes)
            found = np.fromfile(file, mapped.dtype, math.prod(shape))
    except OSError as error:
        if lacked_files(error):
            raise
        raise CalibrationError(
            f"{label}: cannot be read any more: {error.strerror or error}",
            "run the test again when nothing else writes there",
            code="calibration-files",
        ) from error
    if found.size < math.prod(shape):
        raise CalibrationError(
            f"{label}: was cut off while it was read",
            "run the test again when nothing else writes there",
            code="model-changed",
        )
    return found.reshape(shape)


def _fits(shape: tuple[int, ...], wanted: tuple[int | str | None, ...]) -> bool:
    return all(not isinstance(dim, int) or dim == size for size, dim in zip(shape, wanted, strict=True))


def _checked(array: NDArray[Any], spec: TensorSpec, label: str) -> NDArray[Any]:
    """The array in the input's dtype, contiguous, free of NaN."""
    where = f"{label}: input {spec.name!r}"
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    if is_float and (count := int(np.isnan(array).sum())):
        raise CalibrationError(
            f"{where}: NaN in {count:,} of {plural(array.size, 'element')}",
            "look where this data comes from",
            code="calibration-values",
        )
    if spec.dtype == "str" and array.dtype.kind in "US":
        return np.ascontiguousarray(array)
    if array.dtype.name == spec.dtype:
        # Another byte order has the same name.
        return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    kind = _kind(array.dtype)
    is_same_kind = spec.dtype in np.sctypeDict and kind == _kind(np.dtype(spec.dtype))
    converted = _converted(array, spec.dtype) if is_same_kind else None
    if converted is None:
        why = "some values would change" if is_same_kind else f"{kind} data is never taken for another kind"
        raise CalibrationError(
            f"{where}: expected {spec.dtype}, got {array.dtype}, and {why}",
            f"convert it as the model's preprocessing does, then .astype({spec.dtype!r})",
            code="calibration-fit",
        )
    return converted


def _converted(array: NDArray[Any], dtype: str) -> NDArray[Any] | None:
    """`array` in `dtype`, if that changes no value."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
        same = converted.astype(array.dtype) == array
    # A negative number survives the way into an unsigned type and back.
    return converted if bool((same & ((converted < 0) == (array < 0))).all()) else None


def _kind(dtype: np.dtype[Any]) -> str:
    return _KINDS.get(dtype.kind, dtype.name)


def digest_of(samples: Samples, cache: Cache) -> str:
    """`samples.digest()`; every file is read the first time alone.

    Raises
    ------
    CalibrationError
        As `samples.digest`.
    """
    files = samples.files()
    settled = remembered.settled_files(files) if files else None
    if settled is None:
        return samples.digest()
    samples.read.update({file.path: file for file in settled})
    code = hash_code("model/inputs.py", "precision/quantization/calibration_data.py")
    parts = {**remembered.identity(settled), "code": code, "inputs": repr(samples.specs), "limit": str(samples.limit)}
    key = Key("samples", files[0].parent.name, parts)
    return remembered.once(key, samples.digest, lambda found: typed(found, str), cache)
