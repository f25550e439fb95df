"""A TensorFlow model that computes by itself, so that its export can be held against it, inside too."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.model.sources.exported import Inner
from pytest_trtcheck.model.sources.tensorflow.library import failing, on_cpu
from pytest_trtcheck.model.sources.tensorflow.naming import layer_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import onnx

    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.sources.exported import Outputs
    from pytest_trtcheck.model.sources.tensorflow.function import Function


_SAME: dict[str, tuple[str, ...]] = {
    **{
        name: (name,)
        for name in [
            "Add",
            "Elu",
            "Erf",
            "Exp",
            "Gelu",
            "Log",
            "Mul",
            "Neg",
            "Relu",
            "Selu",
            "Sigmoid",
            "Softmax",
            "Softplus",
            "Sqrt",
            "Sub",
            "Tanh",
        ]
    },
    "AddV2": ("Add", "LayerNormalization"),
    "AvgPool": ("AveragePool",),
    "BatchMatMulV2": ("MatMul",),
    "BatchMatMulV3": ("MatMul",),
    "BiasAdd": ("Add", "Conv", "Gemm"),
    "ConcatV2": ("Concat",),
    "FusedBatchNormV3": ("BatchNormalization",),
    "GatherV2": ("Gather",),
    "LeakyRelu": ("LeakyRelu",),
    "MatMul": ("MatMul",),
    "MaxPool": ("MaxPool",),
    "Mean": ("ReduceMean",),
    "RealDiv": ("Div",),
    "Relu6": ("Clip",),
    "Reshape": ("Reshape",),
    "Sum": ("ReduceSum",),
}


class TensorFlowOrigin:
    """A TensorFlow model that computes by itself, in FP32 on the CPU; it is loaded when that is first asked for."""

    def __init__(self, title: str, identity: str, load: Callable[[], Function]) -> None:
        self.title = title
        self.identity = identity
        self._load = load

    @cached_property
    def function(self) -> Function:
        """What it computes."""
        return self._load()

    def __call__(self, case: Case) -> Outputs:
        """Its outputs by name."""
        function = self.function
        with on_cpu(), failing(f"{self.title} failed to compute"):
            return {name: _array(value) for name, value in function(*_tensors(function, case)).items()}

    def inside(self, case: Case, export: onnx.ModelProto) -> Iterator[Inner]:
        """The tensors of TensorFlow's graph that the export has under the same name."""
        function = self.function
        with on_cpu(), failing(f"{self.title} failed to compute its inner values"):
            frozen = function.frozen
            wanted = _shared(export, frozen.graph)
            elements = [frozen.graph.as_graph_element(name) for name in wanted]
            values = frozen.prune(frozen.inputs, elements)(*_tensors(function, case)) if elements else []
            arrays = [_array(value) for value in values]
        for (name, node), array in zip(wanted.items(), arrays, strict=True):
            for value in _layouts(array):
                yield Inner(layer_path(node, function.layers) or node, (name,), value)


def _shared(export: onnx.ModelProto, graph: Any) -> dict[str, str]:
    """The tensors that the export and TensorFlow's graph have both, and the nodes of the export that make them.

    tf2onnx's optimizer reorders products, and what bears a name then is another value: what a node reads must be what
    TensorFlow's operator reads, or the one before that where both became one node.
    """
    makers = {tensor.name: each for each in graph.get_operations() for tensor in each.outputs}
    found = {}
    for node in export.graph.node:
        for name in node.output:
            maker = makers.get(name)
            if maker is None or node.op_type not in _SAME.get(maker.type, ()):
                continue
            before = [tensor for source in maker.inputs for tensor in source.op.inputs]
            read = {tensor.name for tensor in (*maker.inputs, *before)}
            if all(each in read for each in node.input if each in makers):
                found[name] = node.name
    return found


def _tensors(function: Function, case: Case) -> list[Any]:
    import tensorflow as tf

    return [tf.constant(case[name], spec.dtype) for name, spec in function.inputs.items()]


def _array(value: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.asarray(value)


def _layouts(array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """A value as the export may hold it: channels are its second axis around convolutions, and TensorFlow's last.

    None where both have one shape: it could not be told which of them is there.
    """
    import numpy as np

    if array.ndim < 3:
        return [array]
    moved = np.moveaxis(array, -1, 1)
    return [array, moved] if array.shape != moved.shape else []
