"""The Triton Inference Server's `config.pbtxt` for a TensorRT engine, from its inputs, outputs and profile alone.

Triton puts requests together only along a first dimension that every tensor shares. Whether an engine has one is
decided here, and where it has none, the reason is kept: a batch that the engine refuses fails while serving.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.spec import ShapeRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.spec import Shape

DATA_TYPES: dict[str, str] = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}
"""What Triton's TensorRT backend takes, by numpy's name; it has no FP8 and no 4-bit tensors."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Parameters
    ----------
    dtype
        numpy's name.
    shape
        -1 where the dimension is open.
    symbols
        What the model calls each dimension; None where it gives a size or no name.
    profile
        For an input with open dimensions: the shapes that the engine accepts.
    shape_tensor
        Whether its values are shapes.
    """

    name: str
    dtype: str
    shape: Shape
    symbols: tuple[str | None, ...]
    profile: ShapeRange | None = None
    shape_tensor: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Tensor:
        """From the plain data that the engine's entry in the cache holds."""
        span = data.get("profile")
        return cls(
            name=data["name"],
            dtype=data["dtype"],
            shape=tuple(data["shape"]),
            symbols=tuple(data["symbols"]),
            profile=ShapeRange(*(tuple(span[side]) for side in ("min", "opt", "max"))) if span else None,
            shape_tensor=bool(data["shape_tensor"]),
        )

    def batches(self) -> tuple[int, int, int] | None:
        """The least, the usual and the largest first dimension that the profile admits; None where it is fixed."""
        if not self.shape or self.shape[0] != -1 or self.profile is None or self.shape_tensor:
            return None
        return self.profile.min[0], self.profile.opt[0], self.profile.max[0]


@dataclass(frozen=True)
class Batching:
    """How Triton may batch: `max` is 0 where it may not, and then `reason` says why."""

    max: int
    preferred: int | None = None
    reason: str | None = None


def batching(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Batching:
    """Whether the first dimension of every input and output is one batch dimension that starts at 1.

    Source: Triton's model configuration, "Maximum Batch Size": with `max_batch_size` N, Triton sends any batch from 1
    to N, and its TensorRT backend takes the first dimension of every tensor for it.
    """
    if not inputs:
        return Batching(0, reason="the engine has no inputs")
    why = next(_inputs_against(inputs), None)
    ranges = inputs[0].batches()
    if why is not None or ranges is None:
        return Batching(0, reason=why)
    why = next(_batch_against(ranges, inputs, outputs), None)
    if why is not None:
        return Batching(0, reason=why)
    _, usual, largest = ranges
    # Batches of 1 need no waiting for others, which is what preferring a size means.
    return Batching(largest, usual if usual > 1 else None)


def _inputs_against(inputs: Sequence[Tensor]) -> Iterator[str]:
    """Which inputs have no batch dimension, or not the same."""
    for tensor in inputs:
        if tensor.shape_tensor:
            yield f"input {tensor.name!r} is a shape tensor"
        elif tensor.batches() is None:
            fixed = f"its first dimension is fixed at {tensor.shape[0]}" if tensor.shape else "it is a scalar"
            yield f"input {tensor.name!r} has no batch dimension: {fixed}"
    for tensor in inputs:
        if tensor.batches() != inputs[0].batches():
            yield f"inputs {inputs[0].name!r} and {tensor.name!r} have different ranges in their first dimension"


def _batch_against(batches: tuple[int, int, int], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Iterator[str]:
    """Why the first dimension that all inputs share is not one that Triton may fill."""
    least, _, largest = batches
    if least == largest:
        yield f"the engine's profile admits a first dimension of {least} alone"
    if least > 1:
        yield f"the engine's profile starts at batch {least}, and Triton may send 1"
    symbol = inputs[0].symbols[0]
    if symbol is None:
        yield f"the model gives the first dimension of input {inputs[0].name!r} no name, so it may not be the batch"
    for side, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            if not tensor.shape or tensor.shape[0] != -1 or tensor.symbols[0] != symbol:
                yield f"{side} {tensor.name!r} does not start with the batch dimension {symbol!r}"


def config(
    name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], comments: Sequence[str] = ()
) -> tuple[str, Batching]:
    """The text of `config.pbtxt`, and how Triton may batch.

    Raises
    ------
    ArgumentError
        Triton cannot describe a tensor: it has no name for its dtype, a dimension of size 0, or a scalar.
    """
    found = batching(inputs, outputs)
    lines = [f"# {line}".rstrip() for text in comments for line in text.splitlines()]
    lines += [
        f"name: {_quoted(name)}",
        'platform: "tensorrt_plan"',
        'backend: "tensorrt"',
        f"max_batch_size: {found.max}",
    ]
    if found.max:
        preferred = "" if found.preferred is None else f" preferred_batch_size: [ {found.preferred} ] "
        lines.append(f"dynamic_batching {{{preferred}}}")
    else:
        lines.append(f"# No dynamic batching: {_one_line(found.reason or '')}.")
    for side, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            lines += [f"{side} {{", *(f"  {line}" for line in _tensor(tensor, batched=bool(found.max))), "}"]
    return "\n".join(lines) + "\n", found


def _tensor(tensor: Tensor, *, batched: bool) -> list[str]:
    if tensor.dtype not in DATA_TYPES:
        raise ArgumentError(
            f"Triton has no tensors of type {tensor.dtype}, which {tensor.name!r} is", code="triton-tensors"
        )
    dims = _dims(tensor)[1 if batched else 0 :]
    if 0 in dims:
        raise ArgumentError(
            f"Triton has no tensors with a dimension of size 0, which {tensor.name!r} has", code="triton-tensors"
        )
    if not dims and not batched:
        raise ArgumentError(
            f"Triton has no scalars where it does not batch, and {tensor.name!r} is one", code="triton-tensors"
        )
    lines = [f"name: {_quoted(tensor.name)}", f"data_type: {DATA_TYPES[tensor.dtype]}"]
    # Triton refuses empty dims; a reshape is how it spells a tensor that has none beside the batch.
    lines.append(f"dims: [ {', '.join(map(str, dims or (1,)))} ]")
    if not dims:
        lines.append("reshape { shape: [ ] }")
    if tensor.shape_tensor:
        lines.append("is_shape_tensor: true")
    return lines


def _dims(tensor: Tensor) -> Shape:
    """The shape, with the size where the profile leaves an open dimension no choice."""
    if tensor.profile is None or tensor.shape_tensor:
        return tensor.shape
    spans = zip(tensor.shape, tensor.profile.min, tensor.profile.max, strict=True)
    return tuple(low if dim == -1 and low == high else dim for dim, low, high in spans)


def _quoted(text: str) -> str:
    """A string of protobuf's text format: what is not plain ASCII is written byte by byte, in octal."""
    plain = set(range(0x20, 0x7F)) - {ord('"'), ord("\\")}
    data = text.encode("utf-8", "surrogateescape")
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in data) + '"'


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text)
