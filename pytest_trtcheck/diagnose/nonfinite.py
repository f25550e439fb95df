"""Where NaN and infinity come from: the first tensor that holds one, and what its operands were.

An operator may lose nothing by itself and still be where it ends: an epsilon that the type rounds to 0 costs nothing
until two operators later a 0 is divided by it. So the lowered model's own values are looked at here, from the output
that is not finite back to the first tensor that isn't, and from there back to what became 0, or changed its sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pytest_trtcheck.diagnose.trace import SUMS
from pytest_trtcheck.errors import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.diagnose.trace import Tensor
    from pytest_trtcheck.model.pieces import Graph

    Array = NDArray[Any]

_Fault = Literal["0", "negative"]

_MOST_ORIGINS = 4
_DEPTH = 10
_MOST_BYTES = 64 << 20
_CANCELS = 100.0
"""Operands so many times larger than their sum cancel."""


@dataclass(frozen=True)
class Cause:
    """Why a tensor is not finite: what became 0 (an underflow), a difference that changed its sign (a cancellation)."""

    kind: Literal["overflow", "underflow", "cancellation", "nan"]
    at: Tensor
    """The tensor whose operator is to blame."""
    tensor: str
    """What to look at: that tensor, or a constant that the operator reads."""
    detail: str
    chain: tuple[str, ...]
    """The operators from there to the first that gives NaN or infinity, as `Tensor.node` names them."""
    max_abs: float
    """The largest magnitude in `tensor`, in FP32."""


def causes(
    pair: Pair, tensors: Mapping[str, Tensor], case: Mapping[str, Array], outputs: Iterable[str]
) -> tuple[Cause, ...]:
    """The causes of what is not finite in `outputs`, in graph order; none where all of them are finite."""
    origins = _origins(tensors, outputs)
    if not origins:
        return ()
    search = _Search(pair, tensors, case, origins)
    found: dict[str, Cause] = {}
    for origin in origins:
        cause = search.cause(origin)
        if cause is not None:
            found.setdefault(cause.tensor, cause)
    return tuple(found.values())


def _origins(tensors: Mapping[str, Tensor], outputs: Iterable[str]) -> list[Tensor]:
    """The tensors behind `outputs` that are not finite though all that they are computed from is."""
    waiting = [name for name in outputs if name in tensors]
    seen: set[str] = set(waiting)
    found = []
    while waiting:
        tensor = tensors[waiting.pop()]
        if not tensor.error.nonfinite:
            continue
        before = [name for name in tensor.inputs if name in tensors and tensors[name].error.nonfinite]
        if not before:
            found.append(tensor)
        waiting += [name for name in before if name not in seen]
        seen.update(before)
    order = {name: index for index, name in enumerate(tensors)}
    return sorted(found, key=lambda tensor: order[tensor.name])[:_MOST_ORIGINS]


@dataclass(frozen=True)
class _Operand:
    """One operand: its name in the FP32 graph, and both versions of its value."""

    name: str
    exact: Array
    actual: Array

    def became(self, what: _Fault) -> NDArray[np.bool_]:
        """Where it became 0, or negative."""
        found: NDArray[np.bool_] = (
            (self.actual == 0) & (self.exact != 0) if what == "0" else (self.actual < 0) & (self.exact >= 0)
        )
        return found


class _Search:
    """The search for the cause behind each of `origins`."""

    def __init__(
        self, pair: Pair, tensors: Mapping[str, Tensor], case: Mapping[str, Array], origins: Sequence[Tensor]
    ) -> None:
        self.pair, self.tensors = pair, tensors
        wanted = list(dict.fromkeys(name for origin in origins for name in self._window(origin)))
        nodes = [pair.node_of(name) for name in wanted]
        self.exact = _values(pair.reference, [*wanted, *(name for node in nodes for name in node.input)], case)
        twins = (name for node in nodes for name in pair.twin_inputs(node))
        self.actual = _values(pair.emulated, [*wanted, *twins], case)

    def _window(self, origin: Tensor) -> list[str]:
        """The origin and the tensors before it, as many as fit into memory."""
        found: dict[str, None] = {}
        level, room = [origin.name], _MOST_BYTES
        for _ in range(_DEPTH):
            following: list[str] = []
            for name in level:
                tensor = self.tensors.get(name)
                if name in found or tensor is None or not tensor.node or name not in self.pair.known:
                    continue
                room -= 8 * tensor.error.size
                if found and room < 0:
                    return list(found)
                found[name] = None
                following += tensor.inputs
            level = following
        return list(found)

    def _operands(self, tensor: str) -> list[_Operand]:
        node = self.pair.node_of(tensor)
        pairs = zip(node.input, self.pair.twin_inputs(node), strict=True)
        return [
            _Operand(name, self.exact[name], self.actual[other])
            for name, other in pairs
            if name in self.exact and other in self.actual and _is_float(self.exact[name])
        ]

    def cause(self, origin: Tensor) -> Cause | None:
        """What is behind the origin."""
        name = origin.name
        if name not in self.exact or name not in self.actual or not _is_float(self.exact[name]):
            return None
        exact, actual = self.exact[name], self.actual[name]
        if exact.shape != actual.shape:
            return None
        ruined = np.isfinite(exact) & ~np.isfinite(actual)
        if not ruined.any():
            return None
        at = np.unravel_index(int(np.argmax(ruined)), ruined.shape)
        node = self.pair.node_of(name)
        operands = self._operands(name)
        values = [_at(each.actual, exact.shape, at) for each in operands]
        bad, words = _forbidden(node, values)
        if bad is not None:
            found = self._trace_back(name, operands[bad], "negative" if values[bad] else "0", words)
            if found is not None:
                return found
        peak = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0))
        if np.isnan(actual[at]) and not any(math.isinf(value) for value in values) and node.op_type not in SUMS:
            shown = ", ".join(f"{value:.4g}" for value in values[:3])
            detail = f"{words or 'NaN'} of finite operands ({shown}), where FP32 gives {exact[at]:.4g}"
            return self._made("nan", name, detail, [name], peak=peak)
        return self._overflow(name, f"{int(np.count_nonzero(ruined)):,} of {plural(exact.size, 'element')}", peak)

    def _overflow(self, name: str, count: str, peak: float) -> Cause:
        held = self.pair.held.get(name)
        if held is not None and peak >= held.beyond:
            detail = held.overflow(peak, count)
        else:
            kind = f"{held.name}, which ends at {held.largest:,.6g}" if held is not None else "the lowered model"
            detail = f"{count} overflow in {kind}; in FP32 max|x| is {peak:,.6g}"
        return self._made("overflow", name, detail, [name], peak=peak)

    def _trace_back(self, origin: str, operand: _Operand, become: _Fault, words: str) -> Cause | None:
        """Where an operand first became what it must not be."""
        path = [origin]
        if not operand.became(become).any():
            return None
        while operand.name in self.tensors and operand.name in self.exact and operand.name in self.pair.known:
            path.append(operand.name)
            before = [each for each in self._operands(operand.name) if each.became(become).any()]
            if not before:
                break
            # A constant that vanished is at fault by itself, whatever else did.
            operand = min(before, key=lambda each: not self.pair.reference.is_constant(each.name))
        reader = path[-1]
        end = f"so that node {self.pair.owner(self.pair.node_of(origin).name)!r} computes {words}"
        if self.pair.reference.is_constant(operand.name):
            value = _largest(operand.exact[operand.became("0")])
            held = self.pair.held.get(reader)
            smallest = f", {held.name}'s smallest value is {held.smallest:.3g}" if held is not None else ""
            detail = f"the constant {value:.6g} becomes 0{smallest}, {end}"
            return self._made("underflow", operand.name, detail, path, peak=value, at=reader)
        if operand.name != reader:
            return None
        where = operand.became(become)
        size = f"{int(np.count_nonzero(where)):,} of {plural(where.size, 'element')}"
        peak, lost = _largest(operand.exact), _largest(operand.exact[where])
        largest = max((_largest(each.exact) for each in self._operands(reader)), default=0.0)
        sums = self.pair.node_of(reader).op_type in SUMS
        if become == "negative" or (sums and largest > _CANCELS * lost):
            detail = (
                f"operands of up to {largest:.4g} nearly cancel, and {size} come out {become} where FP32 has up to "
                f"{lost:.3g}, {end}"
            )
            return self._made("cancellation", reader, detail, path, peak=peak)
        return self._made("underflow", reader, f"{size} become 0, in FP32 up to {lost:.3g}, {end}", path, peak=peak)

    def _made(self, kind: Any, tensor: str, detail: str, path: Sequence[str], *, peak: float, at: str = "") -> Cause:
        chain = dict.fromkeys(self.tensors[name].node for name in reversed(path))
        when = self.pair.unrolled.iterations.get(at or tensor, "")
        return Cause(kind, self.tensors[at or tensor], tensor, f"{detail}{when}", tuple(chain), peak)


def _forbidden(node: onnx.NodeProto, values: Sequence[float]) -> tuple[int | None, str]:
    """Which operand an operator can't take, and what it computes then."""
    if node.op_type == "Div" and len(values) == 2 and values[1] == 0:
        return 1, "0/0" if values[0] == 0 else f"{values[0]:.4g}/0"
    if node.op_type == "Reciprocal" and values and values[0] == 0:
        return 0, "1/0"
    if node.op_type == "Log" and values and values[0] <= 0:
        return 0, f"the logarithm of {values[0]:.4g}"
    if node.op_type == "Sqrt" and values and values[0] < 0:
        return 0, f"the square root of {values[0]:.4g}"
    if node.op_type == "Pow" and len(values) == 2 and (values[0] < 0 or (values[0] == 0 and values[1] < 0)):
        return 0, f"{values[0]:.4g} to the power of {values[1]:.4g}"
    return None, ""


def _at(array: Array, shape: tuple[int, ...], index: Any) -> float:
    """The value of an operand that goes into an element of the result; where that can't be told, its largest."""
    try:
        return float(np.broadcast_to(array, shape)[index])
    except ValueError:
        return _largest(array)


def _largest(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0))


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f"


def _values(graph: Graph, names: Iterable[str], case: Mapping[str, Array]) -> dict[str, Array]:
    """Weights, inputs and computed tensors by name, in FP32."""
    wanted = list(dict.fromkeys(names))
    found = {name: graph.array(name) for name in wanted if name in graph.weights}
    found |= {name: np.asarray(case[name]) for name in wanted if name in graph.inputs}
    found |= graph.values([name for name in wanted if name in graph.producers], case)
    return {name: array.astype(np.float32) if _is_float(array) else array for name, array in found.items()}
