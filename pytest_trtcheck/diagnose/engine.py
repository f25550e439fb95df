"""Blame for the engine: what is bisected, what counts as wrong, and what is made of the nodes that are left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.diagnose import models
from pytest_trtcheck.diagnose.bisection import FUSED_BEHIND, MOVERS, Bisection, Narrowed, RunEngine
from pytest_trtcheck.diagnose.culprit import Culprit
from pytest_trtcheck.diagnose.cutting import Graph
from pytest_trtcheck.diagnose.statistics import difference
from pytest_trtcheck.precision.quantization.plan import QUANTIZED_OPERATORS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.culprit import Findings
    from pytest_trtcheck.diagnose.naming import Names
    from pytest_trtcheck.diagnose.trials import Clock, Subject
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.precision.lowering import Lowered

_OTHERWISE_ROUNDED = 1.5
"""Two ways of rounding to 16 bits differ by √2 of what each loses."""
_JUMP = 3.0
"""An error that grows by less among the nodes that are left grew everywhere before them too."""
_OTHERWISE_QUANTIZED = 0.5
"""8-bit steps are the same in both; few values lie so close to the middle of two that they are rounded otherwise."""

Outputs = Callable[["Case"], "Mapping[str, NDArray[Any]]"]
Rebuild = Callable[["Lowered"], "AbstractContextManager[Outputs]"]


@dataclass(frozen=True)
class Engine:
    """The engine that failed.

    Parameters
    ----------
    outputs
        What it computed from the input to look at.
    run
        Builds an engine from another ONNX file, a beginning of the lowered model, and runs it on the same input (with
        those of the inputs that it has); None: it can't be bisected.
    rebuild
        Builds the engine of another lowering of the model, ready to run on any of the inputs until it is left; None:
        what is advised can't be confirmed on an engine.
    """

    outputs: Mapping[str, NDArray[Any]]
    run: RunEngine | None = None
    rebuild: Rebuild | None = None


def bisect(
    subject: Subject,
    engine: Engine,
    findings: Findings | None,
    emulated: Mapping[str, NDArray[Any]],
    *,
    emulated_path: Path,
    folder: Path,
    clock: Clock,
    progress: Callable[[str], None],
) -> tuple[Narrowed, Graph] | None:
    """Narrow the engine's fault down, in the lowered graph that comes with it; None where it can't be built again.

    Parameters
    ----------
    findings
        What the trace found, where there was one: an engine may differ wherever the lowered model rounds.
    emulated
        The emulated model's outputs, `emulated_path` its file.

    Raises
    ------
    CheckError
        The emulated model can't be run up to a cut.
    """
    if engine.run is None:
        return None
    if findings is not None and not findings.pair.unrolled.nodes:
        lowered, graph = findings.pair.lowered, findings.pair.emulated
    else:
        # FP32, a model that could not be traced, or one of which TensorRT is given the loops, not what they run.
        lowered, graph = (
            Graph.stage(models.named(path, subject.model.path, folder / f"{name}.onnx"), folder, name)
            for name, path in (("lowered", subject.lowered.path), ("emulated", emulated_path))
        )
    errors = {name: difference(engine.outputs[name], emulated[name]).l2 for name in emulated}
    whole = max(errors.values())
    floor = models.ROUNDOFF[subject.precision]
    traced = {} if findings is None else {name: each.error.l2 for name, each in findings.by_name.items()}

    share = _OTHERWISE_QUANTIZED if findings is not None and findings.pair.spans else _OTHERWISE_ROUNDED

    def tolerance(tensor: str) -> float:
        # Halfway, on a logarithmic scale, between what rounding explains and the error that is looked for; and wherever
        # the lowered model loses something, an engine may lose as much in another way.
        own = traced.get(tensor, 0.0)
        allowed = max(math.sqrt(floor * min(whole, 1.0)), share * own if math.isfinite(own) else 0.0)
        return min(allowed, whole / 2)

    bisection = Bisection(
        lowered,
        graph,
        subject.case,
        outputs=[name for name, error in errors.items() if error == whole],
        run_engine=engine.run,
        tolerance=tolerance,
        clock=clock,
        progress=progress,
    )
    return bisection.narrow(whole), lowered


def culprit(narrowed: Narrowed, names: Names, lowered: Graph) -> tuple[Culprit, tuple[str, ...]] | None:
    """The likeliest of the nodes among which the engine goes wrong, and the others; None where no node stands out.

    Parameters
    ----------
    names, lowered
        The user's names, and the graph whose nodes these are.
    """
    if not narrowed.builds or narrowed.after < _JUMP * narrowed.before:
        return None
    nodes = [node for node in narrowed.nodes if node[1] not in MOVERS] or list(narrowed.nodes)
    if not nodes:
        return None
    # One that computes much is the best guess, one that is merely fused with something else the worst.
    name, operator = min(nodes, key=lambda node: (node[1] not in QUANTIZED_OPERATORS, node[1] in FUSED_BEHIND))
    shown = list(dict.fromkeys(names.node(each, lowered) for each, _ in nodes))
    name = names.node(name, lowered)
    among = f"{len(shown)} nodes from {shown[0]!r} to {shown[-1]!r}" if len(shown) > 1 else f"node {name!r}"
    found = Culprit(
        node=name,
        op_type=names.op_type(name, operator),
        tensor=names.tensor(narrowed.tensor, name, lowered),
        kind="engine",
        detail=f"the engine's error against the emulation grows from {narrowed.before:.2g} to {narrowed.after:.2g} "
        f"in {among} ({narrowed.builds} engines built, {narrowed.cuts} places to cut at)",
        before=narrowed.before,
        after=narrowed.after,
    )
    return found, tuple(each for each in shown if each != name)
