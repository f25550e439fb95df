"""What the graph says of an output's parts, against where ONNX Runtime moves elements that are tagged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.output_parts import MOST_PARTS, output_parts
from pytest_trtcheck.model.remembered import model as facts_of
from pytest_trtcheck.spec import Part
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FLOAT = TensorProto.FLOAT
N = helper.make_node
BOXES, SCORES, ANGLES = 4, 7, 1
ANCHORS = 6


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def detector(
    tail: list[onnx.NodeProto],
    weights: dict[str, NDArray[Any]] | None = None,
    outputs: dict[str, list[int | str]] | None = None,
    batch: int | str = 2,
) -> onnx.ModelProto:
    """Boxes, scores and angles, [batch, n, anchors] each, that `tail` makes outputs of; Relu keeps tags as they are."""
    shapes = {"boxes": BOXES, "scores": SCORES, "angles": ANGLES}
    nodes = [N("Relu", [name], [f"{name}_"]) for name in shapes]
    return onnx_models.model(
        [*nodes, *tail],
        {name: (FLOAT, [batch, size, ANCHORS]) for name, size in shapes.items()},
        {name: (FLOAT, shape) for name, shape in (outputs or {"y": ["a", "b", "c"]}).items()},
        weights,
        opset=18,
    )


CONCAT = N("Concat", ["boxes_", "scores_", "angles_"], ["cat"], axis=1)
SPANS = [(0, 4), (4, 11), (11, 12)]
TAILS: dict[str, tuple[list[onnx.NodeProto], dict[str, NDArray[Any]], int, list[int | str], int]] = {
    # tail, weights, rank of the output, its declared shape, the axis along which the parts lie
    "concat": ([N("Identity", ["cat"], ["y"])], {}, 3, [2, 12, 6], 1),
    "transpose": ([N("Transpose", ["cat"], ["y"], perm=[0, 2, 1])], {}, 3, [2, 6, 12], 2),
    "transpose-all": ([N("Transpose", ["cat"], ["y"])], {}, 3, [6, 12, 2], 1),
    "unsqueeze": ([N("Unsqueeze", ["cat", "w"], ["y"])], {"w": ints(1, -1)}, 5, [2, 1, 12, 6, 1], 2),
    "squeeze": (
        [N("Unsqueeze", ["cat", "w"], ["u"]), N("Squeeze", ["u", "w"], ["y"])],
        {"w": ints(0)},
        3,
        [2, 12, 6],
        1,
    ),
    "reshape-behind": ([N("Reshape", ["cat", "w"], ["y"])], {"w": ints(2, 12, 2, 3)}, 4, [2, 12, 2, 3], 1),
    "reshape-before": (
        [N("Transpose", ["cat"], ["t"], perm=[0, 2, 1]), N("Reshape", ["t", "w"], ["y"])],
        {"w": ints(12, 12)},
        2,
        [12, 12],
        1,
    ),
    "flatten": (
        [N("Unsqueeze", ["cat", "w"], ["u"]), N("Flatten", ["u"], ["y"], axis=2)],
        {"w": ints(0)},
        2,
        [2, 72],
        1,
    ),
    "cast": (
        [N("Cast", ["cat"], ["c"], to=TensorProto.FLOAT16), N("Cast", ["c"], ["y"], to=FLOAT)],
        {},
        3,
        [2, 12, 6],
        1,
    ),
    "scaled": ([N("Mul", ["cat", "w"], ["y"])], {"w": np.ones((1, 12, 1), np.float32)}, 3, [2, 12, 6], 1),
    "gather-batch": ([N("Gather", ["cat", "w"], ["y"], axis=2)], {"w": ints(3, 1)}, 3, [2, 12, 2], 1),
    "gather-one": ([N("Gather", ["cat", "w"], ["y"], axis=0)], {"w": np.array(1)}, 2, [12, 6], 0),
}


@pytest.mark.parametrize("name", list(TAILS))
def test_parts_are_where_the_elements_go(name: str) -> None:
    tail, weights, rank, shape, axis = TAILS[name]
    proto = detector([CONCAT, *tail], weights, {"y": shape})
    tags = {"boxes": 1.0, "scores": 2.0, "angles": 3.0}
    feeds = {
        each.name: np.full([d.dim_value for d in each.type.tensor_type.shape.dim], tags[each.name], np.float32)
        for each in proto.graph.input
    }
    (y,) = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)
    parts = output_parts(proto).get("y", ())
    assert y.ndim == rank
    if name == "flatten":
        # Two axes became one: no stretch of it is a part, and none is claimed.
        assert parts == ()
        return
    assert parts == tuple(Part(((axis, *span),)) for span in SPANS)
    for part, tag in zip(parts, tags.values(), strict=True):
        ((where, start, stop),) = part.ranges
        found = np.take(y, np.arange(start, stop), where)
        assert set(found.ravel().tolist()) == {tag}


def test_a_sigmoid_tells_the_natural_scale() -> None:
    for op in ("Sigmoid", "HardSigmoid"):
        tail = [N(op, ["scores_"], ["p"]), N("Concat", ["boxes_", "p"], ["y"], axis=1)]
        assert output_parts(detector(tail))["y"] == (Part(((1, 0, 4),)), Part(((1, 4, 11),), 1.0))
    tail = [N("Softmax", ["scores_"], ["p"], axis=1), N("Concat", ["p", "boxes_"], ["y"], axis=1)]
    assert output_parts(detector(tail))["y"] == (Part(((1, 0, 7),), 1.0), Part(((1, 7, 11),)))


@pytest.mark.parametrize(
    "tail",
    [
        [N("Sigmoid", ["scores_"], ["y"])],
        [N("Softmax", ["scores_"], ["s"]), N("ReduceMax", ["s"], ["y"], keepdims=0)],
        [N("Sigmoid", ["scores_"], ["s"]), N("Sigmoid", ["scores_"], ["t"]), N("Mul", ["s", "t"], ["y"])],
        [N("Sigmoid", ["scores_"], ["s"]), N("Sub", ["one", "s"], ["y"])],
        [N("Sigmoid", ["scores_"], ["s"]), N("Sqrt", ["s"], ["r"]), N("Resize", ["r", "", "sizes"], ["y"])],
        [N("Exp", ["scores_"], ["e"]), N("ReduceSum", ["e", "axes"], ["s"]), N("Div", ["e", "s"], ["y"])],
        [
            N("Neg", ["scores_"], ["n"]),
            N("Exp", ["n"], ["e"]),
            N("Add", ["e", "one"], ["a"]),
            N("Div", ["one", "a"], ["y"]),
        ],
    ],
    ids=[
        "sigmoid",
        "max of softmax",
        "product",
        "complement",
        "root, resized",
        "softmax spelled out",
        "sigmoid spelled out",
    ],
)
def test_a_whole_output_of_probabilities(tail: list[onnx.NodeProto]) -> None:
    weights: dict[str, NDArray[Any]] = {
        "one": np.array(1, np.float32),
        "axes": ints(1),
        "sizes": np.array([1, 1, 2], np.float32),
    }
    proto = detector(tail, weights)
    assert output_parts(proto)["y"] == (Part((), 1.0),)
    feeds = {
        n: np.random.default_rng(0).normal(0, 3, (2, s, 6)).astype(np.float32)
        for n, s in (("boxes", 4), ("scores", 7), ("angles", 1))
    }
    (y,) = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)
    assert 0 <= y.min() <= y.max() <= 1


@pytest.mark.parametrize(
    "tail",
    [
        [N("Tanh", ["scores_"], ["y"])],
        [N("Sigmoid", ["scores_"], ["s"]), N("Mul", ["s", "stride"], ["y"])],
        [N("Sigmoid", ["scores_"], ["s"]), N("Sub", ["stride", "s"], ["y"])],
        [N("LogSoftmax", ["scores_"], ["y"])],
        [N("Exp", ["scores_"], ["e"]), N("ReduceSum", ["e", "axes"], ["s"]), N("Div", ["s", "e"], ["y"])],
    ],
    ids=["tanh", "scaled", "subtracted", "log", "the other way"],
)
def test_what_is_no_probability(tail: list[onnx.NodeProto]) -> None:
    assert "y" not in output_parts(detector(tail, {"stride": np.array(8, np.float32), "axes": ints(1)}))


def test_the_levels_of_a_pyramid_are_one() -> None:
    tail = [N("Sigmoid", ["scores_"], ["p"])]
    for level in ("1", "2"):
        tail += [N("Concat", ["boxes_", "p"], [f"l{level}"], axis=1)]
    tail += [N("Concat", ["l1", "l2"], ["all"], axis=2), N("Transpose", ["all"], ["y"], perm=[0, 2, 1])]
    expected = (Part(((2, 0, 4),)), Part(((2, 4, 11),), 1.0))
    assert output_parts(detector(tail))["y"] == expected
    assert output_parts(detector(tail, batch="batch"))["y"] == expected


def test_concats_within_concats() -> None:
    tail = [
        N("Sigmoid", ["scores_"], ["p"]),
        N("Concat", ["p", "angles_"], ["inner"], axis=1),
        N("Concat", ["boxes_", "inner"], ["y"], axis=1),
    ]
    assert output_parts(detector(tail))["y"] == (
        Part(((1, 0, 4),)),
        Part(((1, 4, 11),), 1.0),
        Part(((1, 11, 12),)),
    )
    # Twice the same parts, one behind the other in the batch.
    tail[-1:] = [
        N("Concat", ["boxes_", "scores_", "angles_"], ["plain"], axis=1),
        N("Concat", ["plain", "plain"], ["twice"], axis=0),
        N("Identity", ["twice"], ["y"]),
    ]
    assert len(output_parts(detector(tail))["y"]) == 3


def test_slices_and_splits_take_their_parts() -> None:
    weights = {"s": ints(2), "e": ints(9), "a": ints(1), "sizes": ints(4, 8)}
    tail = [CONCAT, N("Slice", ["cat", "s", "e", "a"], ["y"])]
    assert output_parts(detector(tail, weights))["y"] == (Part(((1, 0, 2),)), Part(((1, 2, 7),)))
    tail = [CONCAT, N("Split", ["cat", "sizes"], ["y", "z"], axis=1)]
    found = output_parts(detector(tail, weights, {"y": [2, 4, 6], "z": [2, 8, 6]}))
    assert found == {"z": (Part(((1, 0, 7),)), Part(((1, 7, 8),)))}


def test_quantized_and_unquantized_concat() -> None:
    tail = [
        N("Sigmoid", ["scores_"], ["p"]),
        N("Concat", ["boxes_", "p"], ["cat"], axis=1),
        N("QuantizeLinear", ["cat", "scale", "zero"], ["q"]),
        N("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    weights: dict[str, NDArray[Any]] = {"scale": np.array(5, np.float32), "zero": np.array(0, np.int8)}
    assert output_parts(detector(tail, weights))["y"] == (Part(((1, 0, 4),)), Part(((1, 4, 11),), 1.0))


def test_a_part_whose_length_is_open_ends_the_axis() -> None:
    proto = onnx_models.model(
        [N("Concat", ["a", "b"], ["y"], axis=1)],
        {"a": (FLOAT, [1, 4]), "b": (FLOAT, [1, "n"])},
        {"y": (FLOAT, [1, "m"])},
    )
    assert output_parts(proto)["y"] == (Part(((1, 0, 4),)), Part(((1, 4, None),)))
    proto.graph.node[0].input[:] = ["b", "a"]
    assert "y" not in output_parts(proto)


def test_a_long_list_of_steps_is_no_division() -> None:
    tail = [N("Concat", ["boxes_"] * (MOST_PARTS + 1), ["y"], axis=1)]
    assert "y" not in output_parts(detector(tail))


def test_branches_and_functions_are_looked_into() -> None:
    branches = {}
    for which in ("then", "else"):
        nodes = [N("Sigmoid", ["scores_"], [f"p_{which}"])]
        value = helper.make_tensor_value_info(f"p_{which}", FLOAT, None)
        branches[f"{which}_branch"] = helper.make_graph(nodes, which, [], [value])
    tail = [N("If", ["flag"], ["y"], **branches)]
    assert output_parts(detector(tail, {"flag": np.array(True)}))["y"] == (Part((), 1.0),)
    # What PyTorch makes of squeeze(): either branch only hands on what was computed outside of it.
    handed = {}
    for which, node in (("then", N("Squeeze", ["p", "w"], ["p_then"])), ("else", N("Identity", ["p"], ["p_else"]))):
        value = helper.make_tensor_value_info(f"p_{which}", FLOAT, None)
        handed[f"{which}_branch"] = helper.make_graph([node], which, [], [value])
    tail = [N("Sigmoid", ["angles_"], ["p"]), N("If", ["flag"], ["y"], **handed)]
    assert output_parts(detector(tail, {"flag": np.array(True), "w": ints(1)}))["y"] == (Part((), 1.0),)
    proto = detector([N("Relu", ["scores_"], ["p"]), N("Concat", ["boxes_", "p"], ["y"], axis=1)])
    proto.graph.node[3].op_type, proto.graph.node[3].domain = "Score", "own"
    opset = helper.make_opsetid("", 18)
    proto.functions.append(helper.make_function("own", "Score", ["x"], ["z"], [N("Sigmoid", ["x"], ["z"])], [opset]))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert output_parts(proto)["y"] == (Part(((1, 0, 4),)), Part(((1, 4, 11),), 1.0))


def test_weights_are_not_needed(tmp_path: Path) -> None:
    """Neither large weights nor external data are read; the finding is kept with what is known of the file."""
    tail = [N("MatMul", ["boxes_", "w"], ["m"]), N("Concat", ["m", "scores_"], ["y"], axis=1)]
    proto = detector(tail, {"w": np.ones((6, 6), np.float32)})
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    expected = (("y", (Part(((1, 0, 4),)), Part(((1, 4, 11),)))),)
    assert onnx_model.load(path).parts == expected
    cache = Cache(tmp_path / "cache")
    for _ in range(2):
        assert facts_of(path, "m", cache).parts == expected
