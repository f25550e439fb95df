"""Where the graph says that an output has parts with scales of their own, and how large its values are by nature.

A Concat near an output joins what are outputs in their own right (a detector's boxes and scores). Values behind a
Sigmoid or Softmax lie between 0 and 1 whatever the inputs are. Both are followed through what moves elements and leaves
them as they are. Only the graph is read, with `onnx` alone.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_trtcheck.model.proto import SMALL_WEIGHT, bodies, constant, elements
from pytest_trtcheck.spec import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import onnx

MOST_PARTS = 16
"""An output of more pieces is a list that was put together (a recurrence that was unrolled), not different things."""
_DEEPEST = 200

_Dim: TypeAlias = "int | str | None"
_Ranges: TypeAlias = "tuple[tuple[int, int, int | None], ...]"


@dataclass(frozen=True)
class _Leaf:
    """A box of a tensor, by its ranges, and its natural scale."""

    ranges: _Ranges = ()
    natural: float | None = None


_Layout: TypeAlias = tuple[_Leaf, ...]
_PLAIN: _Layout = (_Leaf(),)


def output_parts(proto: onnx.ModelProto) -> dict[str, tuple[Part, ...]]:
    """The parts of every floating-point output that the graph divides, or whose natural scale it tells."""
    graph = _Graph(_inlined(proto))
    found = {}
    for value in graph.proto.graph.output:
        if not _is_float(value):
            continue
        layout = graph.layout(value.name)
        if layout != _PLAIN:
            found[value.name] = tuple(Part(leaf.ranges, leaf.natural) for leaf in layout)
    return found


def _is_float(value: onnx.ValueInfoProto) -> bool:
    import onnx

    name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return name in {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"}


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its large weights, whose shapes are all that counts here; functions inlined."""
    import onnx

    light = onnx.ModelProto()
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.output.extend(proto.graph.output)
    graph.input.extend(proto.graph.input)
    known = {value.name for value in graph.input}
    for tensor in proto.graph.initializer:
        small = math.prod(tensor.dims) <= SMALL_WEIGHT and tensor.data_location != onnx.TensorProto.EXTERNAL
        if small:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    if not light.functions:
        return light
    import onnx.inliner

    try:
        return onnx.inliner.inline_local_functions(light)
    except Exception:
        # What cannot be inlined is not looked into.
        return light


class _Graph:
    """The layouts of a graph's tensors, worked out from the outputs backwards; a body sees the graph `around` it."""

    def __init__(
        self, proto: onnx.ModelProto, graph: onnx.GraphProto | None = None, around: _Graph | None = None
    ) -> None:
        self.proto = proto
        self._around = around
        self._graph = graph or proto.graph
        self._producers = {name: node for node in self._graph.node for name in node.output if name}
        self._weights = {tensor.name: tensor for tensor in self._graph.initializer}
        self._known: dict[str, _Layout] = {}
        self._depth = 0

    def layout(self, name: str) -> _Layout:
        """How the tensor is laid out; a plain one is one box of which nothing is known."""
        if name not in self._known:
            node = self._producers.get(name)
            self._depth += 1
            found = _PLAIN
            if self._depth <= _DEEPEST and node is not None:
                found = self._of(node, name)
            elif self._around is not None:
                found = self._around.layout(name)
            self._depth -= 1
            self._known[name] = _bounded(found)
        return self._known[name]

    def _of(self, node: onnx.NodeProto, name: str) -> _Layout:
        rule = _RULES.get(node.op_type)
        if rule is None or node.domain not in {"", "ai.onnx"}:
            return _PLAIN
        return rule(self, node, name)

    def _probability(self, node: onnx.NodeProto, _: str) -> _Layout:
        return tuple(replace(leaf, natural=1.0) for leaf in self.layout(node.input[0]))

    def _distribution(self, _: onnx.NodeProto, __: str) -> _Layout:
        return (_Leaf(natural=1.0),)

    def _unchanged(self, node: onnx.NodeProto, name: str) -> _Layout:
        return self.layout(node.input[0]) if name == node.output[0] else _PLAIN

    def _elementwise(self, node: onnx.NodeProto, _: str) -> _Layout:
        return _unscaled(self.layout(node.input[0]))

    def _one_of_several(self, node: onnx.NodeProto, name: str) -> _Layout:
        return _whole(self.layout(node.input[0])) if name == node.output[0] else _PLAIN

    # --- what is known of tensors ------------------------------------------------------------------------------------

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[_Dim, ...]]:
        import onnx

        try:
            inferred = onnx.shape_inference.infer_shapes(self.proto, data_prop=True).graph
        except Exception:
            # Real models are at odds with the inference now and then; what has no shape is not divided.
            inferred = self.proto.graph
        shapes: dict[str, tuple[_Dim, ...]] = {}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            if value.type.tensor_type.HasField("shape"):
                shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                    for dim in value.type.tensor_type.shape.dim
                )
        shapes |= {name: tuple(tensor.dims) for name, tensor in self._weights.items()}
        return shapes

    def shape(self, name: str) -> tuple[_Dim, ...] | None:
        """A tensor's shape as far as it is known; None where not even its rank is."""
        return self._shapes.get(name)

    def rank(self, name: str) -> int | None:
        """A tensor's rank; None where it is not known."""
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def constant(self, name: str) -> list[Any] | None:
        """A small constant's elements; None for what is computed."""
        if name in self._weights:
            return elements(self._weights[name])
        node = self._producers.get(name)
        return None if node is None else constant(node)

    def argument(self, node: onnx.NodeProto, name: str, index: int | None = None) -> list[int] | None:
        """What an operator is told by an attribute, or since a later opset by an input; None where it is not known."""
        for attribute in node.attribute:
            if attribute.name == name:
                return list(attribute.ints) if attribute.ints else [attribute.i]
        if index is None or index >= len(node.input) or not node.input[index]:
            return None
        found = self.constant(node.input[index])
        return None if found is None else [int(each) for each in found]

    # --- operators of several operands -------------------------------------------------------------------------------

    def _of_several(self, node: onnx.NodeProto, _: str) -> _Layout:
        """Elements stay where they are, if the operand that is divided is as large as the result."""
        if self._is_probability(node):
            return (_Leaf(natural=1.0),)
        layouts = {name: self.layout(name) for name in node.input}
        natural = [_whole(layout)[0].natural for layout in layouts.values()]
        bounded = node.op_type in {"Mul", "Max", "Min"} and all(each == 1.0 for each in natural)
        divided = [name for name, layout in layouts.items() if any(leaf.ranges for leaf in layout)]
        if divided and (self._fills(divided[0], node.output[0]) or len(layouts) == 1):
            layout = _unscaled(layouts[divided[0]])
            return tuple(replace(leaf, natural=1.0) for leaf in layout) if bounded else layout
        return (_Leaf(natural=1.0),) if bounded else _PLAIN

    def _fills(self, name: str, output: str) -> bool:
        """Whether an operand has the rank of the result, and no axis along which it was repeated."""
        small, large = self.shape(name), self.shape(output)
        if small is None or large is None or len(small) != len(large):
            return False
        return all(one == other or one != 1 for one, other in zip(small, large, strict=True))

    def _is_probability(self, node: onnx.NodeProto) -> bool:
        """A Softmax or Sigmoid spelled out: exp(x) / Σ exp(x), 1 / (1 + exp(−x)), 1 − p."""
        if node.op_type == "Sub":
            return self.constant(node.input[0]) == [1.0] and _whole(self.layout(node.input[1]))[0].natural == 1.0
        if node.op_type != "Div":
            return False
        above, below = (self._producers.get(name) for name in node.input)
        if below is None:
            return False
        if above is not None and above.op_type == "Exp":
            while below is not None and below.op_type in {"Expand", "Reshape", "Identity", "Unsqueeze"}:
                below = self._producers.get(below.input[0])
            return below is not None and below.op_type == "ReduceSum" and below.input[0] == node.input[0]
        if below.op_type != "Add" or self.constant(node.input[0]) != [1.0]:
            return False
        makers = [self._producers.get(name) for name in below.input]
        return any(each is not None and each.op_type == "Exp" for each in makers) and any(
            self.constant(name) == [1.0] for name in below.input
        )

    # --- operators that move elements --------------------------------------------------------------------------------

    def _concat(self, node: onnx.NodeProto, _: str) -> _Layout:
        layouts = [self.layout(name) for name in node.input]
        rank = self.rank(node.output[0])
        given = self.argument(node, "axis")
        if given is None or (rank is None and given[0] < 0):
            return _common(layouts)
        axis = given[0]
        axis = axis if axis >= 0 or rank is None else axis + rank
        if len(layouts) == 1:
            return layouts[0]
        if _divided_alike(layouts, axis):
            # The levels of a pyramid, each of the same things.
            return layouts[0]
        starts = self._starts(node, axis)
        if starts is None:
            return _common(layouts)
        leaves: list[_Leaf] = []
        for layout, (start, stop) in zip(layouts, starts, strict=True):
            for leaf in layout:
                inner = next((span for span in leaf.ranges if span[0] == axis), None)
                low, high = (start, stop) if inner is None else (start + inner[1], _end(start, stop, inner[2]))
                if high is not None and high <= low:
                    continue
                rest = [span for span in leaf.ranges if span[0] != axis]
                leaves.append(_Leaf(tuple(sorted([*rest, (axis, low, high)], key=lambda span: span[0])), leaf.natural))
        return tuple(leaves)

    def _starts(self, node: onnx.NodeProto, axis: int) -> list[tuple[int, int | None]] | None:
        """Where each operand of a Concat begins and ends; None where the graph does not tell."""
        shapes = [self.shape(name) for name in node.input]
        sizes = [shape[axis] if shape is not None and len(shape) > axis else None for shape in shapes]
        known = [size if isinstance(size, int) else None for size in sizes]
        whole = self.shape(node.output[0])
        total = whole[axis] if whole is not None and len(whole) > axis else None
        if known.count(None) == 1 and isinstance(total, int):
            known[known.index(None)] = total - sum(size for size in known if size is not None)
        if None in known[:-1]:
            return None
        found: list[tuple[int, int | None]] = []
        start = 0
        for size in known:
            stop = None if size is None else start + size
            found.append((start, stop))
            start = stop or 0
        return found

    def _transpose(self, node: onnx.NodeProto, _: str) -> _Layout:
        layout = self.layout(node.input[0])
        order = self.argument(node, "perm")
        if order is None:
            rank = self.rank(node.input[0])
            if rank is None:
                return _whole(layout)
            order = list(reversed(range(rank)))
        return _renamed(layout, order.index)

    def _unsqueeze(self, node: onnx.NodeProto, _: str) -> _Layout:
        layout = self.layout(node.input[0])
        axes, rank = self.argument(node, "axes", 1), self.rank(node.input[0])
        if axes is None or rank is None:
            return _whole(layout)
        new = {axis % (rank + len(axes)) for axis in axes}
        kept = [axis for axis in range(rank + len(axes)) if axis not in new]
        return _renamed(layout, lambda axis: kept[axis])

    def _squeeze(self, node: onnx.NodeProto, _: str) -> _Layout:
        layout = self.layout(node.input[0])
        shape, axes = self.shape(node.input[0]), self.argument(node, "axes", 1)
        if shape is None:
            return _whole(layout)
        if axes is None:
            if len(node.input) > 1 or any(not isinstance(size, int) for size in shape):
                return _whole(layout)
            axes = [axis for axis, size in enumerate(shape) if size == 1]
        gone = {axis % len(shape) for axis in axes}
        kept = [axis for axis in range(len(shape)) if axis not in gone]
        if any(axis in gone for leaf in layout for axis, *_ in leaf.ranges):
            return _whole(layout)
        return _renamed(layout, kept.index)

    def _reshape(self, node: onnx.NodeProto, _: str) -> _Layout:
        layout = self.layout(node.input[0])
        before, after = self.shape(node.input[0]), self.shape(node.output[0])
        axes = {axis for leaf in layout for axis, *_ in leaf.ranges}
        if not axes or before is None or after is None:
            return _whole(layout)
        places = {axis: _place_after_reshape(before, after, axis) for axis in axes}
        if None in places.values():
            return _whole(layout)
        return _renamed(layout, lambda axis: places[axis] or 0)

    def _slice(self, node: onnx.NodeProto, _: str) -> _Layout:
        layout = self.layout(node.input[0])
        shape = self.shape(node.input[0])
        starts, ends = self.argument(node, "starts", 1), self.argument(node, "ends", 2)
        axes, steps = self.argument(node, "axes", 3), self.argument(node, "steps", 4)
        if starts is None or ends is None or shape is None or any(step != 1 for step in steps or ()):
            return _common([layout])
        for axis, start, end in zip(axes or range(len(starts)), starts, ends, strict=True):
            layout = _cut(layout, axis % len(shape), start, end, shape[axis % len(shape)])
        return layout

    def _split(self, node: onnx.NodeProto, name: str) -> _Layout:
        layout = self.layout(node.input[0])
        shape = self.shape(node.input[0])
        (axis,) = self.argument(node, "axis") or [0]
        if shape is None:
            return _common([layout])
        axis %= len(shape)
        sizes = self.argument(node, "split", 1)
        if sizes is None:
            known = [(self.shape(each) or ())[axis : axis + 1] for each in node.output]
            sizes = [each[0] for each in known if each and isinstance(each[0], int)]
        index = list(node.output).index(name)
        if len(sizes) <= index:
            return _common([layout])
        start = sum(sizes[:index])
        return _cut(layout, axis, start, start + sizes[index], shape[axis])

    def _gather(self, node: onnx.NodeProto, _: str) -> _Layout:
        layout = self.layout(node.input[0])
        (axis,) = self.argument(node, "axis") or [0]
        rank, indices = self.rank(node.input[0]), self.rank(node.input[1])
        if rank is None or indices is None:
            return _common([layout])
        axis %= rank
        if any(axis == each for leaf in layout for each, *_ in leaf.ranges):
            chosen = self.argument(node, "indices", 1)
            if indices == 0 and chosen is not None:
                cut = _cut(layout, axis, chosen[0], chosen[0] + 1, (self.shape(node.input[0]) or ())[axis])
                return _renamed(cut, lambda each: each - (each > axis))
            return _common([layout])
        return _renamed(layout, lambda each: each + (indices - 1) * (each > axis))

    def _if(self, node: onnx.NodeProto, name: str) -> _Layout:
        index = list(node.output).index(name)
        found = []
        for body in bodies(node):
            inner = _Graph(self.proto, body, self)
            inner._weights = {**self._weights, **inner._weights}
            found.append(inner.layout(body.output[index].name))
        return found[0] if found and all(layout == found[0] for layout in found) else _common(found)


_Rule: TypeAlias = "Callable[[_Graph, onnx.NodeProto, str], _Layout]"
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("Sigmoid", "HardSigmoid"), _Graph._probability),
    **dict.fromkeys(("Softmax", "Hardmax"), _Graph._distribution),
    **dict.fromkeys(
        ("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Dropout", "Clip", "Sqrt"),
        _Graph._unchanged,
    ),
    **dict.fromkeys(("Abs", "Elu", "Erf", "Exp", "Floor", "HardSwish", "LeakyRelu", "Log", "Neg"), _Graph._elementwise),
    **dict.fromkeys(("Reciprocal", "Relu", "Round", "Selu", "Softplus", "Tanh"), _Graph._elementwise),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "PRelu"), _Graph._of_several),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceMean", "TopK"), _Graph._one_of_several),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _Graph._one_of_several),
    **dict.fromkeys(("Resize", "Upsample", "Expand", "Tile", "DepthToSpace"), _Graph._one_of_several),
    **dict.fromkeys(("GatherND", "GatherElements", "Compress", "SpaceToDepth"), _Graph._one_of_several),
    "Concat": _Graph._concat,
    "Transpose": _Graph._transpose,
    "Unsqueeze": _Graph._unsqueeze,
    "Squeeze": _Graph._squeeze,
    "Reshape": _Graph._reshape,
    "Flatten": _Graph._reshape,
    "Slice": _Graph._slice,
    "Split": _Graph._split,
    "Gather": _Graph._gather,
    "If": _Graph._if,
}


def _whole(layout: _Layout) -> _Layout:
    """One box of all, with the natural scale that all boxes share."""
    natural = {leaf.natural for leaf in layout}
    return (_Leaf(natural=natural.pop() if len(natural) == 1 else None),)


def _common(layouts: Iterable[_Layout]) -> _Layout:
    return _whole(tuple(leaf for layout in layouts for leaf in layout))


def _unscaled(layout: _Layout) -> _Layout:
    return tuple(replace(leaf, natural=None) for leaf in layout)


def _bounded(layout: _Layout) -> _Layout:
    return layout if len(layout) <= MOST_PARTS else _whole(layout)


def _renamed(layout: _Layout, axis_of: Callable[[int], int]) -> _Layout:
    return tuple(
        replace(leaf, ranges=tuple(sorted((axis_of(axis), start, stop) for axis, start, stop in leaf.ranges)))
        for leaf in layout
    )


def _divided_alike(layouts: Sequence[_Layout], axis: int) -> bool:
    first = layouts[0]
    divided = all(leaf.ranges and all(span[0] != axis for span in leaf.ranges) for leaf in first)
    return divided and all(set(layout) == set(first) for layout in layouts)


def _end(start: int, stop: int | None, inner: int | None) -> int | None:
    return stop if inner is None else start + inner


def _cut(layout: _Layout, axis: int, start: int, end: int, size: _Dim) -> _Layout:
    """What is left of a layout within `start` and `end` of an axis."""
    if isinstance(size, int):
        start, end, _ = slice(start, end).indices(size)
    elif start < 0 or end < 0:
        return _common([layout])
    leaves = []
    for leaf in layout:
        inner = next((span for span in leaf.ranges if span[0] == axis), None)
        if inner is None:
            leaves.append(leaf)
            continue
        low, high = max(inner[1], start), end if inner[2] is None else min(inner[2], end)
        if high <= low:
            continue
        rest = tuple(span for span in leaf.ranges if span[0] != axis)
        leaves.append(replace(leaf, ranges=tuple(sorted((*rest, (axis, low - start, high - start))))))
    if len(leaves) == 1:
        # Nothing of the others is left, so that it fills the axis.
        (leaf,) = leaves
        return (replace(leaf, ranges=tuple(span for span in leaf.ranges if span[0] != axis)),)
    return tuple(leaves) or _PLAIN


def _place_after_reshape(before: Sequence[_Dim], after: Sequence[_Dim], axis: int) -> int | None:
    """The axis of `after` that is `axis` of `before`: as long, and with as many elements before it or behind it."""
    size = before[axis]
    if not isinstance(size, int):
        return None
    for other, length in enumerate(after):
        if (
            length == size
            and (
                _elements(before[axis + 1 :]) == _elements(after[other + 1 :]) != None  # noqa: E711
                or _elements(before[:axis]) == _elements(after[:other]) != None  # noqa: E711
            )
        ):
            return other
    return None


def _elements(dims: Sequence[_Dim]) -> tuple[int, tuple[str, ...]] | None:
    """How many elements: a number times symbols; None where a size has no name."""
    if any(dim is None for dim in dims):
        return None
    return math.prod(dim for dim in dims if isinstance(dim, int)), tuple(sorted(d for d in dims if isinstance(d, str)))
