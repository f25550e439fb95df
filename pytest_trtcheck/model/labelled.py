"""Inputs with their labels, as a test or a loader gives them; and more of them than memory holds.

A data set is read once, in the order in which it comes: a loader that shuffles gives another order each time, and
labels must stay beside what they are of.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, overload

import numpy as np

from pytest_trtcheck.cache import format_bytes
from pytest_trtcheck.errors import InputError, plural
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import memory
from pytest_trtcheck.model.arrays import as_array, copied, is_array, items_of, owned
from pytest_trtcheck.spec import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel

MEMORY_BYTES = 1 << 30
"""The most of a loader's arrays that is held in memory; what goes beyond lies in a file until the check is made."""

_ALIGNMENT = 64
_CASE_BYTES = 1 << 10
"""Of memory, that a case takes beside its arrays, about."""


class Stream:
    """What an iterator gives, from the first item on though that one was looked at before."""

    def __init__(self, items: Iterator[object]) -> None:
        self.kind = type(items).__name__
        self._first = list(islice(items, 1))
        self._rest = items

    def __iter__(self) -> Iterator[object]:
        yield from self._first
        yield from self._rest


def read(value: Any, model: OnnxModel, source: str) -> Iterator[tuple[model_inputs.Case, Any]]:
    """The cases in what a test returned, each with its labels: one case, or an iterable of them.

    A case is a `Case`, a mapping, an array, or what a loader gives. Of a tuple, what is left beyond the model's inputs
    are the labels, and so are the keys of a mapping that are no inputs: one by itself, several as they came.

    Raises
    ------
    InputError
        A case does not fit the model, or there is none.
    """
    names = [spec.name for spec in model.inputs]
    if isinstance(value, (Case, Mapping)) or is_array(value):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        model_inputs.cases_from(value, model, source)  # says what it should be
    number = -1
    for number, item in enumerate(value):
        given, labels = _divided(item, names)
        yield model_inputs.case_from(given, model, f"{source}[{number}]"), labels
    if number < 0:
        raise InputError(f"{source}: there is no case", "give at least one: Case(inputs, labels)", code="input-empty")


def held(value: Any, model: OnnxModel, source: str) -> tuple[Sequence[model_inputs.Case], list[Any]]:
    """The cases in what a test returned, for as often as they are asked for, and the labels of each.

    What is a list lies in memory already; what comes from a loader or an iterator is kept by `Held`.

    Raises
    ------
    InputError
        As `read`.
    """
    labels: list[Any] = []
    # Another sequence may make its items when they are asked for, as a loader does.
    is_there = isinstance(value, (Case, Mapping, list, tuple)) or is_array(value)

    def cases() -> Iterator[model_inputs.Case]:
        for case, label in read(value, model, source):
            labels.append(label if is_there else owned(label))
            yield case

    return (list(cases()) if is_there else Held(cases(), MEMORY_BYTES, source)), labels


def _divided(item: Any, names: Sequence[str]) -> tuple[Any, Any]:
    """Inputs and labels."""
    if isinstance(item, Case):
        return item.inputs, item.labels
    if isinstance(item, Mapping):
        rest = {name: each for name, each in items_of(item) if name not in names}
        labels = next(iter(rest.values())) if len(rest) == 1 else rest or None
        # What is called otherwise than every input is no label: that no input is given says so.
        return {name: item[name] for name in names if name in item} or item, labels
    if isinstance(item, (tuple, list)) and item:
        others = tuple(item[len(names) :])
        return dict(zip(names, item, strict=False)), others[0] if len(others) == 1 else others or None
    return item, None


def digest(labels: Any) -> str:
    """Identity of labels: every byte of arrays, numbers and texts as they are written, of other objects their type."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if is_array(value):
            array = as_array(value)
            total.update(f"{array.dtype.name}{array.shape}".encode())
            total.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        elif isinstance(value, (list, tuple, Mapping)):
            total.update(f"{type(value).__name__}{len(value)}".encode())
            for each in value.items() if isinstance(value, Mapping) else value:
                add(each)
        else:
            is_plain = value is None or isinstance(value, (str, bytes, int, float))
            total.update((repr(value) if is_plain else type(value).__qualname__).encode() + b"\0")

    add(labels)
    return total.hexdigest()


class Held(Sequence["model_inputs.Case"]):
    """Cases, in memory as far as `most` bytes go; the others are mapped from a file that goes away with this.

    Parameters
    ----------
    cases
        Are taken one at a time.
    source
        What messages call them.

    Raises
    ------
    InputError
        There is no end to them: they take more than half of what is free for temporary files, or of the memory more
        than inputs may.
    """

    def __init__(self, cases: Iterable[model_inputs.Case], most: int, source: str) -> None:
        self._room = most
        self._source = source
        self._end = 0
        self._cases: list[Mapping[str, Any]] = []
        self._map: mmap.mmap | None = None
        self._most_in_file = shutil.disk_usage(tempfile.gettempdir()).free // 2
        with tempfile.TemporaryFile(prefix="trtcheck-cases-") as file:
            for case in cases:
                self._cases.append(self._kept(case, file))
            if self._end:
                file.flush()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _kept(self, case: model_inputs.Case, file: Any) -> Mapping[str, Any]:
        size = sum(array.nbytes for array in case.values())
        if said := memory.too_large(_CASE_BYTES * len(self._cases)):
            self._refuse(said)
        if size <= self._room or any(array.dtype.hasobject for array in case.values()):
            self._room -= size
            # A loader may fill the same buffer again.
            return copied(case)
        if self._end + size > self._most_in_file:
            most = format_bytes(self._most_in_file)
            self._refuse(f"{most}, half of what was free in {tempfile.gettempdir()}")
        found = {}
        for name, array in case.items():
            found[name] = (self._end, array.dtype, array.shape)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            padding = -array.nbytes % _ALIGNMENT or (_ALIGNMENT if not array.nbytes else 0)
            file.write(bytes(padding))
            self._end += array.nbytes + padding
        return found

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"{self._source}: no end after {plural(len(self._cases), 'case')} and {what}",
            "give as many as are to be scored, itertools.islice(…, 1000), or set TMPDIR to where there is room",
            code="input-endless",
        )

    def _read(self, kept: Any) -> NDArray[Any]:
        if isinstance(kept, np.ndarray):
            return kept
        start, dtype, shape = kept
        return np.ndarray(shape, dtype, self._map, start)

    @overload
    def __getitem__(self, index: int) -> model_inputs.Case: ...
    @overload
    def __getitem__(self, index: slice) -> list[model_inputs.Case]: ...
    def __getitem__(self, index: int | slice) -> model_inputs.Case | list[model_inputs.Case]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return {name: self._read(kept) for name, kept in self._cases[index].items()}

    def __len__(self) -> int:
        return len(self._cases)
