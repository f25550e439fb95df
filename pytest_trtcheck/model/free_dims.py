"""Sizes for dimensions that a model leaves open and nobody fixed: proposals, and how an argument spells them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from pytest_trtcheck.spec import Shape, ShapeRange

if TYPE_CHECKING:
    from pytest_trtcheck.model.onnx_model import TensorSpec

Shapes: TypeAlias = "Mapping[str, Shape | ShapeRange]"
Answer: TypeAlias = Callable[[Sequence[Mapping[str, Shape]]], str]
"""From proposals, the likeliest first, to what is to be done about the dimensions that are free."""

_SIZES = ((224, 128), (640, 16), (320, 64), (64, 512), (32, 32), (512, 256), (16, 8))
"""Edges of an image and lengths of a sequence that models are made for, in the order in which they are proposed."""
_CHANNELS = 3
_IMAGE = 4
"""The rank of a batch of images."""


def proposals(
    inputs: Sequence[TensorSpec], declared: Mapping[str, Shape], symbols: Mapping[str, int], batch: int
) -> Iterator[dict[str, Shape]]:
    """Shapes of the inputs that leave a dimension open, the likeliest first.

    Parameters
    ----------
    declared
        What is fixed already, by input; it is part of each proposal.
    symbols
        The sizes that declared inputs give symbolic dimensions.
    """
    for edge, length in _SIZES:
        sizes = dict(symbols)
        yield {
            spec.name: declared.get(spec.name) or _shape(spec, edge, length, batch, sizes)
            for spec in inputs
            if spec.free_dims() or spec.name in declared
        }


def _shape(spec: TensorSpec, edge: int, length: int, batch: int, sizes: dict[str, int]) -> Shape:
    rank = len(spec.shape)
    # Images end in their channels where the last dimension is one of a few.
    last = spec.shape[-1] if rank else None
    channels = rank - 1 if isinstance(last, int) and last <= _CHANNELS + 1 else 1
    shape = []
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        size = _by_name(dim or "", edge, length, batch)
        if size is None and axis == 0:
            size = batch
        if size is None and rank == _IMAGE:
            size = _CHANNELS if axis == channels else edge
        size = length if size is None else size
        shape.append(sizes.setdefault(dim, size) if dim else size)
    return tuple(shape)


def _by_name(dim: str, edge: int, length: int, batch: int) -> int | None:
    """The size that a symbolic dimension's name tells; None where it tells none."""
    named = {
        r"batch|^(n|b|bs)$": batch,
        r"chan|^c$": _CHANNELS,
        r"height|width|^(h|w)$": edge,
        r"seq|len|tok|time|word|frame|^(s|t|l)$": length,
    }
    return next((size for name, size in named.items() if re.search(name, dim.lower())), None)


def in_python(shapes: Shapes) -> str:
    """The marker's argument: `shapes={'images': (1, 3, 224, 224)}`."""
    plain = {name: (s.min, s.opt, s.max) if isinstance(s, ShapeRange) else s for name, s in shapes.items()}
    return f"shapes={plain!r}"


def on_command_line(shapes: Shapes, model: str = "") -> str:
    """The option, quoted for a shell: `--trt-shapes=images:1x3x224x224`."""
    spelled = ",".join(f"{name}:{_sizes(shape)}" for name, shape in shapes.items())
    return shlex.quote(f"--trt-shapes={f'{model}=' if model else ''}{spelled}")


def _sizes(shape: Shape | ShapeRange) -> str:
    spans = [shape.min, shape.opt, shape.max] if isinstance(shape, ShapeRange) else [shape]
    if len(spans) > 1 and spans[1] == spans[2]:
        del spans[1]
    return "..".join("x".join(map(str, each)) for each in spans)


_SHAPES = r"\d+(?:x\d+)*"
_ONE_INPUT = re.compile(rf"\s*([^,\s].*?):({_SHAPES}(?:\.\.{_SHAPES}){{0,2}})\s*(?:,|$)")


def parsed(text: str) -> dict[str, Shape | tuple[Shape, ...]] | None:
    """What `on_command_line` spells: a shape by input name, or (min, opt, max); None where the text is no such thing.

    >>> parsed("images:1x3x64x64..8x3x64x64,input:0:1x2")
    {'images': ((1, 3, 64, 64), (8, 3, 64, 64), (8, 3, 64, 64)), 'input:0': (1, 2)}
    """
    found: dict[str, Shape | tuple[Shape, ...]] = {}
    position = 0
    while position < len(text):
        match = _ONE_INPUT.match(text, position)
        if match is None:
            return None
        low, *others = (tuple(map(int, each.split("x"))) for each in match[2].split(".."))
        found[match[1]] = (low, others[0], others[-1]) if others else low
        position = match.end()
    return found or None


def over(
    shapes: Mapping[str, Shape], batches: Sequence[int], open_first: Sequence[str]
) -> dict[str, Shape | ShapeRange]:
    """The shapes as profiles that admit each batch, in the inputs that leave their first dimension open."""
    if len(batches) < 2:
        return dict(shapes)
    low, high = min(batches), max(batches)
    return {
        name: ShapeRange((low, *shape[1:]), (high, *shape[1:]), (high, *shape[1:])) if name in open_first else shape
        for name, shape in shapes.items()
    }
