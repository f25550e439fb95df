"""Which provider computes which node, and what that means for a check."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.choices import quantized_part
from pytest_trtcheck.errors import plural
from pytest_trtcheck.model import proto as protos
from pytest_trtcheck.record import NodeRecord, PartitionRecord, nodes_shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pytest_trtcheck.spec import InputMapping, Precision

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
RECORD = ("session.record_ep_graph_assignment_info", "1")
"""The session's option by which ONNX Runtime tells it (from 1.24 on)."""
_SHAPE = frozenset({"Shape", "Size"})
_COPIES = frozenset({"MemcpyFromHost", "MemcpyToHost"})
_NARROW = {"float16": "fp16", "bfloat16": "bf16", "float": "fp32", "double": "fp64", "float8e4m3fn": "fp8"}
"""The types of a profile's tensors that a kernel computes in, the one that counts first."""


class Group(NamedTuple):
    """Nodes that a provider took together: a subgraph that it compiles, or a node."""

    provider: str
    nodes: tuple[NodeRecord, ...]


def can_tell(session: Any) -> bool:
    """Whether this ONNX Runtime tells which node it gave to whom."""
    return hasattr(session, "get_provider_graph_assignment_info")


def assigned(session: Any) -> tuple[Group, ...]:
    """What a session that was made with `RECORD` gave to whom."""
    return tuple(
        Group(group.ep_name, tuple(NodeRecord(node.name, node.op_type, group.ep_name) for node in group.get_nodes()))
        for group in session.get_provider_graph_assignment_info()
    )


def to_json(groups: Iterable[Group]) -> list[Any]:
    """For another process, or another day."""
    return [[group.provider, [[node.name, node.op_type] for node in group.nodes]] for group in groups]


def from_json(found: Iterable[Any]) -> tuple[Group, ...]:
    """What `to_json` wrote."""
    return tuple(
        Group(provider, tuple(NodeRecord(name, op_type, provider) for name, op_type in nodes))
        for provider, nodes in found
    )


class Profile(NamedTuple):
    """What ran, by ONNX Runtime's own profile of a run: its groups, and how many nodes of a provider in which type."""

    groups: tuple[Group, ...]
    kernels: Mapping[str, Counter[str]]


def profiled(
    open_session: Callable[[Path], Any], case: InputMapping, run: Callable[[Any, InputMapping], object]
) -> Profile:
    """Run once under ONNX Runtime's profiler, in a session of its own.

    Parameters
    ----------
    open_session
        Makes the session, whose profile begins with this path.
    run
        Runs it.
    """
    with scratch_folder("profile") as scratch:
        session = open_session(Path(scratch, "profile"))
        run(session, case)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return read_profile(events)


def read_profile(events: Sequence[Mapping[str, Any]]) -> Profile:
    """What the events of a profile (Chrome's trace format) tell of the nodes that ran."""
    nodes: dict[tuple[str, str, str], None] = {}
    kernels: dict[str, Counter[str]] = {}
    for event in events:
        arguments = event.get("args") or {}
        if event.get("cat") != "Node" or not arguments.get("provider"):
            continue
        name, operator = str(event.get("name", "")).removesuffix("_kernel_time"), str(arguments.get("op_name", ""))
        key = name, operator, str(arguments["provider"])
        if key in nodes or operator in _COPIES:
            continue
        nodes[key] = None
        kind = _computed_in(arguments)
        if kind is not None:
            kernels.setdefault(key[2], Counter())[kind] += 1
    return Profile(tuple(Group(node[2], (NodeRecord(*node),)) for node in nodes), kernels)


def _computed_in(arguments: Mapping[str, Any]) -> str | None:
    """The type that a kernel computes in, by its inputs, or where it has none by its outputs; None: not a float."""
    for side in ("input_type_shape", "output_type_shape"):
        types = {name for tensor in arguments.get(side) or () for name in tensor}
        found = next((shown for name, shown in _NARROW.items() if name in types), None)
        if found is not None:
            return found
    return None


def of_shapes(model_path: Path) -> frozenset[str]:
    """The names of the nodes that compute from shapes, and of nothing else that is fed to the model.

    ONNX Runtime leaves those to the CPU on purpose: they are small, and none of them sees data. A node of constants
    alone, such as the DequantizeLinear of a weight, is none of them.
    """
    graph = protos.load(model_path).graph
    constants, shapes = {each.name for each in graph.initializer} | {""}, set[str]()
    found = set[str]()
    for node in graph.node:
        if any(each.type in {each.GRAPH, each.GRAPHS} for each in node.attribute):
            continue
        read = set(node.input)
        if node.op_type in _SHAPE or (read & shapes and read <= shapes | constants):
            shapes |= set(node.output) - {""}
            found |= {node.name} - {""}
        elif read <= constants:
            constants |= set(node.output)
    return frozenset(found)


def partition(
    provider: str, groups: Sequence[Group], shapes: frozenset[str], *, compiles: bool, kernels: Mapping[str, int] | None
) -> PartitionRecord:
    """How a model was divided.

    Parameters
    ----------
    provider
        Who was asked for.
    shapes
        The nodes that may run on the CPU (`of_shapes`).
    compiles
        Whether the provider compiles subgraphs; otherwise it runs node by node.
    kernels
        How many of its nodes compute in which type, where that is known.
    """
    own = [group for group in groups if group.provider == provider]
    others = [node for group in groups if group.provider != provider for node in group.nodes]
    excused = [node for node in others if node.provider == CPU and (node.name in shapes or node.op_type in _SHAPE)]
    return PartitionRecord(
        provider,
        nodes=sum(len(group.nodes) for group in own),
        subgraphs=tuple(len(group.nodes) for group in own) if compiles else (),
        elsewhere=tuple(node for node in others if node not in excused and node.op_type not in _COPIES),
        shapes_on_cpu=len(excused),
        kernels=None if kernels is None else dict(kernels),
    )


def fault(found: PartitionRecord, title: str, precision: Precision, most: int | None) -> str | None:
    """Why what was computed does not count: a node ran elsewhere, or there are more subgraphs than are allowed.

    Parameters
    ----------
    most
        `max_subgraphs`. Where it is given, what lies between the subgraphs may be computed by the CUDA provider, in
        the types of the model; never in INT8 or FP8, which that provider computes in float.
    """
    if not found.nodes:
        return f"no node of the model is computed by {title}: {nodes_shown(found.elsewhere) or 'all of it was folded'}"
    if most is not None and len(found.subgraphs) > most:
        between = f", with {nodes_shown(found.elsewhere)} between them" if found.elsewhere else ""
        sizes = ", ".join(plural(count, "node") for count in found.subgraphs)
        return (
            f"{title} divides the model into {len(found.subgraphs)} subgraphs ({sizes}){between}: "
            f"max_subgraphs={most} was asked for"
        )
    allowed = most is not None and quantized_part(precision) is None
    fell = [node for node in found.elsewhere if not (allowed and node.provider == CUDA)]
    if not fell:
        return None
    return f"{plural(len(fell), 'node')} fell back from {title} to another provider: {nodes_shown(fell)}"
