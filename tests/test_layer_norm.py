"""Layer normalization in pieces, in the orders that exporters write it: found by what it computes, or left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pytest_trtcheck.model import layer_norm
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

N = helper.make_node
FLOAT = TensorProto.FLOAT
WIDTH = 6
RNG = np.random.default_rng(4)
X = RNG.normal(size=(3, 5, WIDTH)).astype(np.float32)
CONSTANTS = {
    "axes": np.array([-1]),
    "epsilon": np.array(1e-3, np.float32),
    "two": np.array(2, np.float32),
    "scale": RNG.normal(size=WIDTH).astype(np.float32) + 1,
    "bias": RNG.normal(size=WIDTH).astype(np.float32),
}
DEVIATION = [N("ReduceMean", ["x", "axes"], ["mean"], "mean"), N("Sub", ["x", "mean"], ["d"], "deviation")]
ROOT = [N("Add", ["var", "epsilon"], ["safe"], "safe"), N("Sqrt", ["safe"], ["root"], "root")]
TORCH = [
    *DEVIATION,
    N("Pow", ["d", "two"], ["square"], "square"),
    N("ReduceMean", ["square", "axes"], ["var"], "var"),
    *ROOT,
    N("Div", ["d", "root"], ["n"], "divided"),
]
KERAS = [
    *DEVIATION,
    N("Mul", ["d", "d"], ["square"], "square"),
    N("ReduceMean", ["square", "axes"], ["var"], "var"),
    *ROOT,
    N("Reciprocal", ["root"], ["inverse"], "inverse"),
    N("Mul", ["inverse", "scale"], ["factor"], "factor"),
    N("Mul", ["x", "factor"], ["scaled"], "scaled"),
    N("Neg", ["mean"], ["minus"], "minus"),
    N("Mul", ["minus", "factor"], ["moved"], "moved"),
    N("Add", ["moved", "bias"], ["shift"], "shift"),
    N("Add", ["scaled", "shift"], ["n"], "last"),
]
AFFINE = [N("Mul", ["n", "scale"], ["s"], "scaling"), N("Add", ["s", "bias"], ["b"], "adding")]


def model(nodes: Sequence[onnx.NodeProto], last: str, **others: Any) -> onnx.ModelProto:
    """The pieces, an activation behind them."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    copies.append(N("Relu", [last], ["y"], "behind"))
    read = {name for node in copies for name in node.input}
    constants = {name: array for name, array in {**CONSTANTS, **others}.items() if name in read}
    shape: list[int | str] = ["batch", "length", WIDTH]
    return onnx_models.model(copies, {"x": (FLOAT, shape)}, {"y": (FLOAT, shape)}, constants, opset=18)


def computed(proto: onnx.ModelProto) -> NDArray[Any]:
    results: Any = ReferenceEvaluator(proto).run(None, {"x": X})
    return np.asarray(results[0])


@pytest.mark.parametrize(
    ("nodes", "last", "affine"),
    [(TORCH, "n", False), ([*TORCH, *AFFINE], "b", True), (KERAS, "n", True)],
    ids=["bare", "PyTorch", "Keras"],
)
def test_the_pieces_become_the_operator(nodes: Sequence[onnx.NodeProto], last: str, *, affine: bool) -> None:
    proto = model(nodes, last)
    before = computed(proto)
    assert layer_norm.join(proto) == 1
    assert [node.op_type for node in proto.graph.node] == ["LayerNormalization", "Relu"]
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(computed(proto), before, rtol=1e-4, atol=1e-5)
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    (scale, bias) = (weights[name] for name in proto.graph.node[0].input[1:])
    # The model's own weights, to the bit.
    np.testing.assert_array_equal(scale, CONSTANTS["scale"] if affine else np.ones(WIDTH))
    np.testing.assert_array_equal(bias, CONSTANTS["bias"] if affine else np.zeros(WIDTH))


def changed(nodes: Sequence[onnx.NodeProto], name: str, **changes: Any) -> list[onnx.NodeProto]:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for node in copies:
        if node.name == name:
            node.op_type = changes.get("op_type", node.op_type)
            node.input[:] = changes.get("inputs", list(node.input))
    return copies


@pytest.mark.parametrize(
    ("nodes", "last"),
    [
        # No mean is taken off; the squares are not those of the deviation; divided by the variance.
        (changed(TORCH, "divided", inputs=["x", "root"]), "n"),
        (changed(TORCH, "square", inputs=["d", "three"]), "n"),
        (changed(TORCH, "divided", inputs=["d", "safe"]), "n"),
        (changed(KERAS, "minus", op_type="Identity"), "n"),
        # Others read what is on the way.
        ([*TORCH, N("Add", ["n", "root"], ["sum"], "reading")], "sum"),
        ([*TORCH, N("Mul", ["n", "places"], ["s"], "by place")], "s"),
    ],
    ids=["no mean", "cubes", "variance", "sign", "read", "by place"],
)
def test_what_computes_something_else_stays(nodes: Sequence[onnx.NodeProto], last: str) -> None:
    others = {"three": np.array(3, np.float32), "places": RNG.normal(size=(5, 1)).astype(np.float32)}
    proto = model(nodes, last, **others)
    before = proto.SerializeToString()
    joined = layer_norm.join(proto)
    if last == "s":
        # What is in front of a scale for each place is one all the same.
        assert joined == 1
        assert [node.op_type for node in proto.graph.node] == ["LayerNormalization", "Mul", "Relu"]
    else:
        assert joined == 0
        assert proto.SerializeToString() == before


def test_an_opset_without_the_operator_is_left_alone() -> None:
    proto = model(TORCH, "n")
    proto.opset_import[0].version = 16
    assert layer_norm.join(proto) == 0
