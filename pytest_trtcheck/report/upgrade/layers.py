"""The layers of two engines of one model, side by side: which compute in wider types now, and which are slower.

No layer's name says the same in two releases of TensorRT, and each fuses in its own way. What both speak of are the
nodes of the ONNX file: layers that share a node, in one engine or the other, belong together, and are compared as one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_trtcheck.record import LayerRecord

_BITS: Mapping[str, int] = {
    "fp4": 4,
    "int4": 4,
    "fp8": 8,
    "int8": 8,
    "fp16": 16,
    "bf16": 16,
    # Which of the two it is, a kernel's name tells alone.
    "tf32": 32,
    "fp32": 32,
}
NARROW = frozenset(kind for kind, bits in _BITS.items() if bits < 32)
"""What may be lost to FP32."""
_ANY = 99
"""More than any: what does not tell its type may have every one."""


@dataclass(frozen=True)
class Widened:
    """The nodes that computed in one precision and compute in a wider one now."""

    old: str
    new: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{plural(len(self.nodes), 'node')} went from {self.old} to {self.new}: {listed(self.nodes)}"


@dataclass(frozen=True)
class Group:
    """Layers of both engines that hold the same nodes."""

    nodes: tuple[str, ...]
    old: tuple[LayerRecord, ...]
    new: tuple[LayerRecord, ...]

    @property
    def name(self) -> str:
        """By its nodes."""
        return listed(self.nodes, 2, " + ")

    @property
    def is_fused_otherwise(self) -> bool:
        """Whether the nodes are divided among layers in another way."""
        kernels = [Counter(frozenset((*layer.nodes, *layer.moves)) for layer in side) for side in (self.old, self.new)]
        return kernels[0] != kernels[1]


def groups(old: Sequence[LayerRecord], new: Sequence[LayerRecord]) -> list[Group]:
    """The groups that both engines have, in the old one's order; what names no node, or none of the other's, is in
    none of them.
    """
    root: dict[str, str] = {}

    def find(node: str) -> str:
        while root.setdefault(node, node) != node:
            root[node] = node = root[root[node]]
        return node

    for layer in (*old, *new):
        first, *rest = map(find, _nodes(layer)) if _nodes(layer) else [""]
        for other in rest:
            root[find(other)] = find(first)
    sides: list[dict[str, list[LayerRecord]]] = [{}, {}]
    for side, layers in zip(sides, (old, new), strict=True):
        for layer in layers:
            if nodes := _nodes(layer):
                side.setdefault(find(nodes[0]), []).append(layer)
    found = []
    for key in sides[0]:
        if key in sides[1]:
            both = sides[0][key], sides[1][key]
            # What computes names a group better than what moves.
            computing = [node for layer in both[0] for node in layer.nodes]
            named = computing or [node for layer in both[0] for node in layer.moves]
            found.append(Group(tuple(dict.fromkeys(named)), tuple(both[0]), tuple(both[1])))
    return found


def widened(old: Sequence[LayerRecord], new: Sequence[LayerRecord]) -> list[Widened]:
    """The nodes that no layer computes any more in types as narrow as before, the widest types first."""
    before, after = _narrowest(old), _narrowest(new)
    found: dict[tuple[str, str], list[str]] = {}
    for node, kind in before.items():
        now = after.get(node, kind)
        if _BITS[now] > _BITS[kind]:
            found.setdefault((kind, now), []).append(node)
    ordered = sorted(found.items(), key=lambda each: (-_BITS[each[0][1]], -len(each[1])))
    return [Widened(*kinds, tuple(nodes)) for kinds, nodes in ordered]


def untold(old: Sequence[LayerRecord], new: Sequence[LayerRecord]) -> tuple[str, ...]:
    """The nodes of which the old engine says what they compute in, and the new one may compute them in wider types.

    A node that no layer names was fused into one that names none, or is gone. Where all of those that name none are as
    narrow as it was, it makes no difference which.
    """
    before, after = _narrowest(old), _narrowest(new)
    silent = [layer for layer in new if layer.precision != "other"]
    silent = [layer for layer in silent if not _nodes(layer) or layer.precision not in _BITS]
    widest = max((_BITS.get(layer.precision or "", _ANY) for layer in silent), default=0)
    return tuple(node for node, kind in before.items() if node not in after and _BITS[kind] < widest)


def _nodes(layer: LayerRecord) -> tuple[str, ...]:
    return (*layer.nodes, *layer.moves)


def _narrowest(layers: Iterable[LayerRecord]) -> dict[str, str]:
    """By node that computes, the narrowest type of a layer that holds it. A reformatting copy computes nothing."""
    found: dict[str, str] = {}
    for layer in layers:
        kind = "" if (layer.kind or "").lower().startswith("reformat") else layer.precision or ""
        for node in layer.nodes if kind in _BITS else ():
            if node not in found or _BITS[kind] < _BITS[found[node]]:
                found[node] = kind
    return found


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """Milliseconds, with bounds; those of several layers are the sums, which is no less sure."""

    ms: float
    lower: float | None
    upper: float | None

    @classmethod
    def of(cls, layers: Iterable[LayerRecord]) -> Took | None:
        """What layers take together; None where none of them was timed."""
        timed = [layer for layer in layers if layer.time_ms is not None]
        if not timed:
            return None
        bounds = [layer.bounds_ms for layer in timed]
        sums = [sum(each) for each in zip(*(pair for pair in bounds if pair), strict=True)]
        lower, upper = (None, None) if None in bounds else sums
        return cls(sum(layer.time_ms or 0.0 for layer in timed), lower, upper)


@dataclass(frozen=True)
class Slower:
    """A group that takes longer by what matters; `surely` where the bounds of both say so."""

    group: Group
    old: Took
    new: Took
    surely: bool

    def __str__(self) -> str:
        kinds = dict.fromkeys(filter(None, map(_kinds, (self.group.old, self.group.new))))
        ratio = f", {self.new.ms / self.old.ms - 1:+.0%}" if self.old.ms else ""
        computes = f" in {' → '.join(kinds)}" if kinds else ""
        return f"{self.group.name}{computes}: {self.old.ms:.3g} → {self.new.ms:.3g} ms{ratio}"


def adds_up(total_ms: float, gpu_ms: float | None) -> bool:
    """Whether an engine's layers take what a run of it does: else the profiler's events are part of their times.

    Of layers of 50 µs it takes 0.9 to 1.1 times as long as the GPU, of such of 5 µs three times (docs/measured).
    """
    return gpu_ms is not None and total_ms <= _ADDS_UP * gpu_ms


_ADDS_UP = 1.25
_EVENTS_MS = 0.01
"""What the profiler adds to a layer, in one run this and in the next that: up to 7 µs was seen on an H100."""


def slower(found: Iterable[Group], total_ms: float, ratio: float, share: float, *, exact: bool) -> list[Slower]:
    """The groups that take more than `ratio` as long, and longer by more than `share` of the whole, the worst first.

    Where the times are not `exact` (`adds_up`), what the profiler itself may have added makes nothing sure.
    """
    result = []
    for group in found:
        old, new = Took.of(group.old), Took.of(group.new)
        if old is None or new is None or not _exceeds(old.ms, new.ms, total_ms, ratio, share):
            continue
        bounded = old.upper is not None and new.lower is not None
        added = 0.0 if exact else _EVENTS_MS * max(len(group.old), len(group.new))
        surely = bounded and _exceeds((old.upper or 0.0) + added, new.lower or 0.0, total_ms, ratio, share)
        result.append(Slower(group, old, new, surely))
    return sorted(result, key=lambda each: (not each.surely, each.old.ms - each.new.ms))


def _exceeds(old: float, new: float, total_ms: float, ratio: float, share: float) -> bool:
    return new > ratio * old and new - old > share * total_ms


def _kinds(layers: Iterable[LayerRecord]) -> str:
    return ", ".join(sorted({layer.precision for layer in layers if layer.precision and layer.precision in _BITS}))
