"""A model's inner tensors, or what a reduction says of them, brought out as outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs

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
        self.folder = folder
        self.base = folder / "model.onnx"
        graphs.write(graphs.read(model_path), self.base)

    def with_extremes(self, tensors: Iterable[str]) -> tuple[Path, dict[str, tuple[str, str, str, str]]]:
        """For each tensor, outputs with its least value, its largest, 0 or (if not all is finite) NaN, and its size."""
        model = ir.load(self.base)
        values, unused = _values(model), graphs.Names(model).unused
        zero = ir.Value(
            name=unused("trtcheck_zero"),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([]),
            const_value=ir.Tensor(np.float32(0)),
        )
        model.graph.register_initializer(zero)
        model.graph.outputs.clear()
        names: dict[str, tuple[str, str, str, str]] = {}
        for number, tensor in enumerate(tensors):
            value = values[tensor]
            # ONNX Runtime's ReduceMax and ReduceMin overlook a NaN in most places; x·0 does not, nor an infinity.
            product = ir.node("Mul", [value, zero])
            nodes = [
                ir.node("ReduceMin", [value], attributes={"keepdims": 0}),
                ir.node("ReduceMax", [value], attributes={"keepdims": 0}),
                ir.node("ReduceSum", [product.outputs[0]], attributes={"keepdims": 0}),
                ir.node("Size", [value]),
            ]
            product.outputs[0].name = unused(f"trtcheck_{number}_zeros")
            model.graph.extend([product, *nodes])
            for node, what in zip(nodes, ("min", "max", "zero", "size"), strict=True):
                output = node.outputs[0]
                output.name, output.shape = unused(f"trtcheck_{number}_{what}"), ir.Shape([])
                output.dtype = ir.DataType.INT64 if what == "size" else ir.DataType.FLOAT
                model.graph.outputs.append(output)
            least, largest, zeros, size = (node.outputs[0].name or "" for node in nodes)
            names[tensor] = (least, largest, zeros, size)
        return self._write(model), names

    def with_tensors(self, tensors: Iterable[str]) -> tuple[Path, dict[str, str]]:
        """The tensors themselves as outputs; the names that they have there."""
        model = ir.load(self.base)
        values, unused = _values(model), graphs.Names(model).unused
        model.graph.outputs.clear()
        names: dict[str, str] = {}
        for number, tensor in enumerate(tensors):
            value = values[tensor]
            if value.producer() is None:
                # A model's input is no output of it without a node in between.
                node = ir.node("Identity", [value])
                model.graph.append(node)
                source, value = value, node.outputs[0]
                value.name, value.shape = unused(f"trtcheck_{number}"), source.shape
            value.dtype = ir.DataType.FLOAT
            model.graph.outputs.append(value)
            names[tensor] = value.name or ""
        return self._write(model), names

    def _write(self, model: ir.Model) -> Path:
        passes.RemoveUnusedNodesPass()(model)
        path = self.folder / "probe.onnx"
        ir.save(model, path)
        return path


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """What a plan can name: the main graph's inputs and results, by name."""
    values = {value.name or "": value for value in model.graph.inputs}
    for node in model.graph:
        values.update((output.name or "", output) for output in node.outputs)
    return values
