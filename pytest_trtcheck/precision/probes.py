"""A model's inner tensors, or what a reduction says of them, brought out as outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.pieces import Graph, Instruments

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Probes:
    """Copies of the model whose outputs are what a pass needs, and which compute nothing beyond that.

    The weights of a large model are written once, beside the copies, which refer to them.

    Parameters
    ----------
    model_path
        The model.
    folder
        Where the copies go; each replaces the one before.
    """

    def __init__(self, model_path: Path, folder: Path) -> None:
        path = folder / "model.onnx"
        graphs.write(graphs.read(model_path), path)
        self.graph = Graph.stage(path, folder, "model")

    def with_extremes(self, tensors: Iterable[str]) -> tuple[Path, dict[str, tuple[str, str, str, str]]]:
        """For each tensor, outputs with its least value, its largest, 0 or (if not all is finite) NaN, and its size."""
        instruments = self._computing(tensors)
        names = {}
        for tensor in tensors:
            # ONNX Runtime's ReduceMax and ReduceMin overlook a NaN in most places; x·0 does not, nor an infinity.
            zeros = instruments.op("Mul", tensor, instruments.scalar(0.0))
            least, largest = (instruments.reduce(kind, tensor) for kind in ("ReduceMin", "ReduceMax"))
            names[tensor] = (
                least,
                largest,
                instruments.reduce("ReduceSum", zeros),
                instruments.op("Size", tensor),
            )
        return self._write(instruments, [name for each in names.values() for name in each]), names

    def with_tensors(self, tensors: Iterable[str]) -> tuple[Path, dict[str, str]]:
        """The tensors themselves as outputs; the names that they have there."""
        instruments = self._computing(tensors)
        # A model's input is no output of it without a node in between.
        inputs = self.graph.inputs
        names = {each: instruments.op("Identity", each) if each in inputs else each for each in tensors}
        return self._write(instruments, names.values()), names

    def _computing(self, tensors: Iterable[str]) -> Instruments:
        instruments = Instruments(self.graph.opset())
        instruments.compute(self.graph, tensors)
        return instruments

    def _write(self, instruments: Instruments, outputs: Iterable[str]) -> Path:
        return pieces.write(instruments.model(outputs, self.graph), self.graph.folder, "probe")
