"""Faults inside If, Loop, Scan and functions: the node in there is named, and it alone is to stay in FP32."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.diagnose import diagnose, explain, unrolling
from pytest_trtcheck.diagnose.models import named
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision import families
from tests import onnx_models
from tests.diagnosed import FLOAT, Bench, Case, assert_users_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose import Blame

INT, BOOL = TensorProto.INT64, TensorProto.BOOL
X = (np.random.default_rng(0).standard_normal((3, 8)) * 5).astype(np.float32)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def value(name: str, shape: Sequence[int | str], kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def body(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, Any] | None = None,
) -> onnx.GraphProto:
    constants = [numpy_helper.from_array(np.asarray(array), each) for each, array in (weights or {}).items()]
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), constants)


def up_and_down(before: str, after: str, prefix: str) -> list[onnx.NodeProto]:
    """Times 60,000 and back again."""
    return [
        helper.make_node("Mul", [before, "big"], [f"{prefix}_big"], f"{prefix}_up"),
        helper.make_node("Div", [f"{prefix}_big", "big"], [after], f"{prefix}_down"),
    ]


BIG = {"big": np.float32(6e4)}


def choice(*, sound: str = "else") -> onnx.ModelProto:
    """An If whose one branch overflows, the other not; x's sum decides."""
    faulty = "then" if sound == "else" else "else"
    branches = {
        faulty: body(faulty, up_and_down("h", "chosen", "inner"), [], [value("chosen", [3, 8])], BIG),
        sound: body(sound, [helper.make_node("Neg", ["h"], ["other"], "negate")], [], [value("other", [3, 8])]),
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], "relu"),
        helper.make_node("ReduceSum", ["x"], ["total"], "total", keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["flag"], "compare"),
        helper.make_node("If", ["flag"], ["r"], "choose", then_branch=branches["then"], else_branch=branches["else"]),
        helper.make_node("Add", ["r", "x"], ["y"], "add"),
    ]
    shape = {"x": (FLOAT, [3, 8])}
    return onnx_models.model(nodes, shape, {"y": (FLOAT, [3, 8])}, {"zero": np.zeros((), np.float32)})


def loop(trips: int = 4, *, inner: Sequence[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """A state that grows threefold in each iteration; by the third, 30,000 times it is beyond FP16."""
    grow = [
        helper.make_node("Mul", ["s", "much"], ["grown"], "grow"),
        helper.make_node("Div", ["grown", "less"], ["s2"], "shrink"),
    ]
    nodes = [*(inner or grow), helper.make_node("Identity", ["c"], ["c2"], "go_on")]
    inside = body(
        "body",
        [*nodes, helper.make_node("Neg", ["s2"], ["seen"], "emit")],
        [value("i", [], INT), value("c", [], BOOL), value("s", [3, 8])],
        [value("c2", [], BOOL), value("s2", [3, 8]), value("seen", [3, 8])],
        {
            "much": np.float32(3e4),
            "less": np.float32(1e4),
            "two": np.array(2, np.int64),
            "almost": np.float32(0.9999),
            **BIG,
        },
    )
    return onnx_models.model(
        [
            helper.make_node("Relu", ["x"], ["h"], "relu"),
            helper.make_node("Loop", ["trips", "", "h"], ["last", "all"], "repeat", body=inside),
        ],
        {"x": (FLOAT, [3, 8])},
        {"last": (FLOAT, [3, 8]), "all": (FLOAT, ["t", 3, 8])},
        {"trips": np.array(trips, np.int64)},
    )


def scan(*, backwards: bool = False, axis: int = 0) -> onnx.ModelProto:
    """Sums up the rows; their squares times 1,000 overflow."""
    inside = body(
        "body",
        [
            helper.make_node("Add", ["s", "row"], ["s2"], "accumulate"),
            helper.make_node("Mul", ["s2", "s2"], ["squared"], "square"),
            helper.make_node("Mul", ["squared", "thousand"], ["scaled"], "scale"),
            helper.make_node("Div", ["scaled", "thousand"], ["result"], "unscale"),
        ],
        [value("s", [8]), value("row", [8])],
        [value("s2", [8]), value("result", [8])],
        {"thousand": np.float32(1000)},
    )
    shape = [5, 8] if axis == 0 else [8, 5]
    node = helper.make_node(
        "Scan",
        ["start", "x"],
        ["last", "results"],
        "accumulation",
        body=inside,
        num_scan_inputs=1,
        scan_input_axes=[axis],
        scan_output_axes=[axis],
        scan_input_directions=[int(backwards)],
        scan_output_directions=[int(backwards)],
    )
    outputs = {"last": (FLOAT, [8]), "results": (FLOAT, shape)}
    return onnx_models.model([node], {"x": (FLOAT, shape)}, outputs, {"start": np.zeros(8, np.float32)})


def nested() -> onnx.ModelProto:
    """A Loop that in its third iteration takes a branch that overflows."""
    pick = helper.make_node(
        "If",
        ["third"],
        ["s2"],
        "pick",
        then_branch=body("then", up_and_down("s", "odd", "inner"), [], [value("odd", [3, 8])]),
        else_branch=body("else", [helper.make_node("Neg", ["s"], ["even"], "negate")], [], [value("even", [3, 8])]),
    )
    return loop(inner=[helper.make_node("Equal", ["i", "two"], ["third"], "is_third"), pick])


def function() -> onnx.ModelProto:
    """A function that is called twice; what the second call is given overflows in it."""
    block = helper.make_function(
        "here",
        "Block",
        ["a"],
        ["b"],
        [
            helper.make_node(
                "Constant", [], ["k"], "constant", value=numpy_helper.from_array(np.array(3e4, np.float32))
            ),
            helper.make_node("Mul", ["a", "k"], ["up"], "block_up"),
            helper.make_node("Div", ["up", "k"], ["b"], "block_down"),
        ],
        [helper.make_opsetid("", 17)],
    )
    proto = onnx_models.elementwise(
        [
            helper.make_node("Sigmoid", ["x"], ["g"], "sigmoid"),
            helper.make_node("Identity", ["g"], ["first"], "first_call"),
            helper.make_node("Mul", ["first", "ten"], ["h"], "ten_times"),
            helper.make_node("Identity", ["h"], ["y"], "second_call"),
        ],
        8,
        {"ten": np.full(1, 10, np.float32)},
    )
    for node in proto.graph.node:
        if node.op_type == "Identity":
            node.op_type, node.domain = "Block", "here"
    proto.functions.append(block)
    proto.opset_import.append(helper.make_opsetid("here", 1))
    onnx.checker.check_model(proto)
    return proto


def blamed(bench: Bench, proto: onnx.ModelProto, case: Case) -> Blame:
    """The diagnosis of an overflow in FP16: its advice is minimal, confirmed, and holds as a check lowers it."""
    subject = bench.failed(proto, "fp16", [case])
    assert bench.error(subject) > 0.01
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert_users_names(subject, found)
    assert found.culprit is not None
    assert found.culprit.kind == "overflow"
    assert "overflows" in explain(found.to_dict()).splitlines()[0]
    assert found.keep_fp32
    assert found.confirmed
    assert bench.error(subject, found.keep_fp32) <= 0.01
    for name in found.keep_fp32:
        assert not bench.error(subject, [each for each in found.keep_fp32 if each != name]) <= 0.01
    return found


@pytest.mark.parametrize("sound", ["else", "then"])
def test_an_overflow_inside_a_branch(bench: Bench, sound: str) -> None:
    x = X + (1 if sound == "else" else -1)
    assert (x.sum() > 0) == (sound == "else")
    found = blamed(bench, choice(sound=sound), {"x": x})
    assert found.culprit is not None
    assert (found.culprit.node, found.culprit.tensor) == ("inner_up", "inner_big")
    assert found.culprit.max_abs == pytest.approx(x.max() * 6e4, rel=1e-5)
    assert set(found.keep_fp32 or ()) == {"inner_up", "inner_down"}


def test_an_overflow_inside_a_loop(bench: Bench) -> None:
    """3ⁿ·30,000·h is beyond 65,504 for the first time where n is the third iteration."""
    found = blamed(bench, loop(), {"x": X / 20})
    assert found.culprit is not None
    assert (found.culprit.node, found.culprit.tensor) == ("grow", "grown")
    states = [3.0**n * 3e4 * np.maximum(X / 20, 0).max() for n in range(4)]
    first = next(n for n, each in enumerate(states) if each > 65504)
    assert f"in iteration {first + 1} of 4 of node 'repeat'" in found.culprit.detail
    assert found.culprit.max_abs == pytest.approx(states[first], rel=1e-3)
    assert {"grow", "shrink"} <= set(found.keep_fp32 or ())


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_overflow_inside_a_scan(bench: Bench, backwards: bool, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorRT-RTX 1.5 and 1.7 have no Scan in 16 bits, so that lowering leaves it in FP32.
    monkeypatch.setattr(families, "without_kernel", lambda *_: {})
    rows = (np.random.default_rng(1).standard_normal((5, 8)) * 8).astype(np.float32)
    found = blamed(bench, scan(backwards=backwards, axis=axis), {"x": rows if axis == 0 else rows.T.copy()})
    assert found.culprit is not None
    assert (found.culprit.node, found.culprit.tensor) == ("scale", "scaled")
    assert set(found.keep_fp32 or ()) == {"scale", "unscale"}


def test_an_overflow_inside_a_branch_inside_a_loop(bench: Bench) -> None:
    found = blamed(bench, nested(), {"x": X})
    assert found.culprit is not None
    assert (found.culprit.node, found.culprit.tensor) == ("inner_up", "inner_big")
    assert "in iteration 3 of 4 of node 'repeat'" in found.culprit.detail
    assert set(found.keep_fp32 or ()) == {"inner_up", "inner_down"}


def test_an_overflow_inside_the_second_call_of_a_function(bench: Bench) -> None:
    found = blamed(bench, function(), {"x": np.linspace(1, 3, 8, dtype=np.float32)})
    assert found.culprit is not None
    assert found.culprit.node == "block_up_2"
    assert set(found.keep_fp32 or ()) == {"block_up_2", "block_down_2"}


def test_a_branch_that_rounding_flips(bench: Bench) -> None:
    """The condition is to blame, not what either branch computes."""
    proto, x = choice(), np.abs(X)
    total = x.sum(dtype=np.float64)
    limit = np.array(total * (1 - 1e-5), np.float32)
    half = np.float16(x.astype(np.float16).astype(np.float32).sum())
    assert total > limit
    assert not half > limit.astype(np.float16)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(limit, "zero"))
    subject = bench.failed(proto, "fp16", [{"x": x}])
    assert bench.error(subject) > 0.5
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert_users_names(subject, found)
    assert any("'choose' (If) takes another branch lowered than in FP32" in note for note in found.notes)


def test_a_loop_that_is_too_long_to_unroll_is_said_to_be(bench: Bench) -> None:
    inner = [helper.make_node("Mul", ["s", "almost"], ["s2"], "decay")]
    subject = bench.failed(loop(3000, inner=inner), "fp16", [{"x": X}], tol=1e-6)
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert_users_names(subject, found)
    assert any("'repeat' (Loop) was not looked into: 3000 iterations" in note for note in found.notes)


def test_what_is_lost_in_a_loop_that_is_not_looked_into_is_not_called_rounding(bench: Bench) -> None:
    """The first of many iterations overflows, which nobody saw: no more is said than where it is."""
    inner = [*up_and_down("s", "s1", "inner"), helper.make_node("Tanh", ["s1"], ["s2"], "bound")]
    subject = bench.failed(loop(3000, inner=inner), "fp16", [{"x": X}])
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert found.culprit is not None
    assert found.culprit.node == "repeat"
    assert found.headline == "what is lost lies inside node 'repeat'"
    assert "its body computes, which was not looked into" in found.culprit.detail
    assert {"inner_up", "inner_down"} <= set(found.keep_fp32 or ())
    assert bench.error(subject, found.keep_fp32 or ()) <= 0.01


# --- unrolling -------------------------------------------------------------------------------------------------------


def countdown() -> onnx.ModelProto:
    """A Loop that ends by its own condition, after as many iterations as it takes to halve the sum below 1."""
    inside = body(
        "body",
        [
            helper.make_node("Mul", ["s", "half"], ["s2"], "halve"),
            helper.make_node("ReduceSum", ["s2"], ["sum"], "sum", keepdims=0),
            helper.make_node("Greater", ["sum", "one"], ["c2"], "go_on"),
        ],
        [value("i", [], INT), value("c", [], BOOL), value("s", [3, 8])],
        [value("c2", [], BOOL), value("s2", [3, 8])],
        {"half": np.float32(0.5), "one": np.float32(1)},
    )
    return onnx_models.model(
        [
            helper.make_node("Abs", ["x"], ["h"], "abs"),
            helper.make_node("Loop", ["", "yes", "h"], ["y"], "repeat", body=inside),
        ],
        {"x": (FLOAT, [3, 8])},
        {"y": (FLOAT, [3, 8])},
        {"yes": np.array(True)},
    )


MODELS = {
    "if": (choice(), X),
    "loop": (loop(), X),
    "while": (countdown(), X),
    "scan": (scan(), X[:, :8].repeat(2, axis=0)[:5]),
    "scan backwards": (scan(backwards=True, axis=1), np.ascontiguousarray(X.repeat(2, axis=0)[:5].T)),
    "nested": (nested(), X),
}


@pytest.mark.parametrize("name", MODELS)
def test_unrolled_it_computes_the_same(tmp_path: Path, name: str) -> None:
    proto, x = MODELS[name]
    path = onnx_models.save(proto, tmp_path / "model.onnx")
    unrolled = onnx.load(named(path, path, tmp_path / "named.onnx"))
    found = unrolling.unroll([unrolled], 1, {"x": x}, tmp_path)
    assert not found.notes
    assert not unrolling.has_control_flow(unrolled)
    onnx.checker.check_model(unrolled)
    results: list[dict[str, NDArray[Any]]] = []
    for each in (path, onnx_models.save(unrolled, tmp_path / "unrolled.onnx")):
        with closing(OrtRunner(each, name)) as runner:
            results.append(runner({"x": x}))
    assert results[0].keys() == results[1].keys()
    for output, expected in results[0].items():
        np.testing.assert_array_equal(results[1][output], expected)
