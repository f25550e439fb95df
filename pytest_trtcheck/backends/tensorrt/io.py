"""What goes into an engine and comes out of it: tensor specs, checks of inputs, and outputs that nobody wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pytest_trtcheck.errors import GpuError, InputError, plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import DTypeLike, NDArray

    from pytest_trtcheck.spec import InputMapping, Shape, ShapeRange

DTYPES: dict[str, DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
"""By TensorRT's name for it; 4-bit types, which TensorRT packs, are none that an engine here may have as I/O."""

# Two patterns for each type, so that a value which happens to equal one is told from memory nobody wrote by a second
# run with the other. Floats get NaNs that no arithmetic makes (the GPU's own NaN is 0x7FFFFFFF, negated 0xFFFFFFFF).
_FLOAT_POISONS: dict[str, tuple[int, int]] = {
    "float32": (0xFFA5A5A5, 0x7F9A9A9A),
    "float16": (0xFEA5, 0x7D9A),
    "bfloat16": (0xFFA5, 0x7F9A),
    "float8_e4m3fn": (0xFF, 0x7F),
}
_BYTES = (0xA5, 0x5A)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an engine.

    Parameters
    ----------
    shape
        -1 where the dimension is not fixed.
    on_host
        Whether TensorRT reads or writes it in host memory, as with shape tensors.
    range
        For an input with a dynamic shape: the shapes that the engine was built for.
    outer
        The type that callers give and get instead, where that is another one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    on_host: bool = False
    range: ShapeRange | None = None
    outer: np.dtype[Any] | None = None

    @property
    def is_dynamic(self) -> bool:
        """Whether the engine leaves a dimension open."""
        return -1 in self.shape


def numpy_dtype(name: str, tensor: str) -> np.dtype[Any]:
    """The numpy dtype for TensorRT's data type `name`.

    Raises
    ------
    GpuError
        The engine's tensor `tensor` has a type that numpy arrays cannot hold.
    """
    if name not in DTYPES:
        raise GpuError(
            f"the engine's tensor {tensor!r} has the type {name}, which cannot be an input or output here",
            "end the graph in a Cast to a type of at least 8 bits",
        )
    return np.dtype(DTYPES[name])


def check_inputs(specs: Sequence[TensorSpec], inputs: InputMapping) -> dict[str, NDArray[Any]]:
    """The arrays of `inputs` as the engine takes them: contiguous, in the order of `specs`.

    FP64 becomes FP32, as TensorRT does with a model's FP64 inputs, and the outer type of a spec becomes the engine's;
    any other dtype must be the engine's.

    Raises
    ------
    InputError
        A name, dtype or shape does not fit; all that is wrong is named at once.
    """
    problems = [f"input {name!r} is none of the engine's" for name in inputs if name not in {s.name for s in specs}]
    arrays = {}
    for spec in specs:
        if spec.name not in inputs:
            problems.append(f"input {spec.name!r} is missing")
            continue
        array = np.asarray(inputs[spec.name])
        if array.dtype == np.float64 and spec.dtype == np.float32:
            array = array.astype(np.float32)
        if spec.outer is not None and array.dtype == spec.outer:
            array = _narrowed(array, spec)
        problems += _misfits(spec, array)
        # ascontiguousarray would turn a scalar into a vector.
        arrays[spec.name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    if problems:
        known = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)
        raise InputError("; ".join(problems), f"the engine's inputs are {known}", code="input-shape")
    return arrays


def _narrowed(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """In the engine's type; an integer that this cannot hold is an error, as no conversion would say so."""
    if spec.dtype.kind == "i" and array.size:
        bounds = np.iinfo(spec.dtype)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise InputError(f"input {spec.name!r} holds integers beyond {spec.dtype}, which the engine takes")
    with np.errstate(over="ignore"):  # What is too large becomes infinite, as it does in the engine.
        return array.astype(spec.dtype)


def _misfits(spec: TensorSpec, array: NDArray[Any]) -> list[str]:
    problems = []
    if array.dtype != spec.dtype:
        problems.append(f"input {spec.name!r} has dtype {array.dtype}, the engine takes {spec.dtype}")
    fixed = len(array.shape) == len(spec.shape) and all(
        want in (-1, size) for want, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fixed:
        problems.append(f"input {spec.name!r} has shape {array.shape}, the engine takes {spec.shape}")
    elif spec.range is not None and not all(
        low <= size <= high for low, size, high in zip(spec.range.min, array.shape, spec.range.max, strict=True)
    ):
        problems.append(
            f"input {spec.name!r} has shape {array.shape}; the engine takes {spec.range.min} to {spec.range.max}"
        )
    return problems


def poison(dtype: np.dtype[Any], turn: int) -> tuple[int, int]:
    """The pattern that output memory of `dtype` is filled with before run number `turn` (0 or 1), and its bytes."""
    if dtype.name in _FLOAT_POISONS:
        return _FLOAT_POISONS[dtype.name][turn], dtype.itemsize
    width = min(dtype.itemsize, 4)
    return int.from_bytes(bytes([_BYTES[turn]]) * width, "little"), width


def poisoned_elements(raw: NDArray[np.uint8], dtype: np.dtype[Any], turn: int) -> NDArray[np.bool_] | None:
    """Which elements of the output whose bytes are `raw` still hold the pattern of `turn`; None if none does."""
    pattern, width = poison(dtype, turn)
    words = raw.view(f"u{dtype.itemsize}")
    whole = int.from_bytes(pattern.to_bytes(width, "little") * (dtype.itemsize // width), "little")
    held = words == words.dtype.type(whole)
    return held if held.any() else None


def unwritten(
    first: Mapping[str, NDArray[np.bool_]], second: Mapping[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.bool_]]:
    """The elements that held the pattern of their run in two runs with different patterns: nobody wrote them."""
    found = {}
    for name, held in first.items():
        again = second.get(name)
        if again is not None and again.shape == held.shape and (held & again).any():
            found[name] = held & again
    return found


def never_written(found: Mapping[str, NDArray[np.bool_]], shapes: Mapping[str, Shape]) -> GpuError:
    """The error for elements that `unwritten` found in outputs of these shapes."""
    parts = []
    for name, elements in found.items():
        index = tuple(int(at) for at in np.unravel_index(int(elements.argmax()), shapes[name]))
        parts.append(
            f"output {name!r}: never written in {int(elements.sum()):,} of {plural(elements.size, 'element')}, "
            f"first at {index}"
        )
    return GpuError("; ".join(parts), "the engine is wrong: rebuild it, try another TensorRT release, and report it")
