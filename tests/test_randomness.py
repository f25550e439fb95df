"""Models that are random by themselves: which nodes make them so, and that a check says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.backends.base import Acceptance
from pytest_trtcheck.backends.tensorrt import emulated
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Allowance, Request
from pytest_trtcheck.model.randomness import random_nodes
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.record import CheckRecord

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
N = helper.make_node


def value(name: str, kind: int = FLOAT, shape: list[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def net(
    nodes: list[onnx.NodeProto],
    weights: dict[str, NDArray[Any]] | None = None,
    out: tuple[int, list[int | str]] = (FLOAT, ["a", "b"]),
    opset: int = 17,
) -> onnx.ModelProto:
    nodes = [N("MatMul", ["x", "w"], ["g"], name="matmul"), *nodes]
    matrix = {"w": onnx_models.weights((8, 8))}
    return onnx_models.model(nodes, {"x": (FLOAT, [2, 8])}, {"y": out}, {**matrix, **(weights or {})}, opset)


def runs_differ(proto: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime says so: the truth."""
    session = ort.InferenceSession(proto.SerializeToString())
    feeds = {"x": np.random.default_rng(0).random((2, 8), dtype=np.float32)}
    first, *others = [session.run(None, feeds)[0] for _ in range(8)]
    return any(not np.array_equal(first, other) for other in others)


def subgraph(nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
    return helper.make_graph(nodes, "inner", [], [value(output)])


YES, NO, HALF = np.array(True), np.array(False), np.array(0.5, np.float32)
ADD = N("Add", ["g", "r"], ["y"])
RANDOM: dict[str, tuple[onnx.ModelProto, str]] = {
    "normal": (net([N("RandomNormal", [], ["r"], name="noise", shape=[2, 8]), ADD]), "noise (RandomNormal)"),
    "normal-like": (net([N("RandomNormalLike", ["g"], ["r"], name="noise"), ADD]), "noise (RandomNormalLike)"),
    "uniform": (net([N("RandomUniform", [], ["r"], name="noise", shape=[2, 8]), ADD]), "noise (RandomUniform)"),
    "uniform-like": (net([N("RandomUniformLike", ["g"], ["r"]), ADD]), "r (RandomUniformLike)"),
    "bernoulli": (
        net([N("Sigmoid", ["g"], ["p"]), N("Bernoulli", ["p"], ["r"], name="coin"), ADD]),
        "coin (Bernoulli)",
    ),
    "multinomial": (
        net([N("Multinomial", ["g"], ["y"], name="draw", sample_size=16, dtype=INT64)], out=(INT64, [2, 16])),
        "draw (Multinomial)",
    ),
    "dropout": (
        net([N("Dropout", ["g", "half", "yes"], ["y"], name="drop")], {"half": HALF, "yes": YES}),
        "drop (Dropout)",
    ),
    "if": (
        net(
            [
                N("Cast", ["x"], ["b"], to=TensorProto.BOOL),
                N("ReduceMax", ["x"], ["m"], keepdims=0),
                N("Greater", ["m", "half"], ["c"]),
                N(
                    "If",
                    ["c"],
                    ["y"],
                    name="if",
                    then_branch=subgraph([N("RandomNormalLike", ["g"], ["t"], name="noise")], "t"),
                    else_branch=subgraph([N("Identity", ["g"], ["e"])], "e"),
                ),
            ],
            {"half": HALF},
        ),
        "if/noise (RandomNormalLike)",
    ),
    "if-whose-branch-uses-it": (
        net(
            [
                N("RandomNormalLike", ["g"], ["r"], name="noise"),
                N("ReduceMax", ["x"], ["m"], keepdims=0),
                N("Greater", ["m", "half"], ["c"]),
                N(
                    "If",
                    ["c"],
                    ["y"],
                    name="if",
                    then_branch=subgraph([N("Identity", ["r"], ["t"])], "t"),
                    else_branch=subgraph([N("Identity", ["g"], ["e"])], "e"),
                ),
            ],
            {"half": HALF},
        ),
        "noise (RandomNormalLike)",
    ),
}
SOUND = {
    "dead": net([N("RandomNormalLike", ["g"], ["r"], name="noise"), N("Relu", ["g"], ["y"])]),
    "dropout-off": net([N("Dropout", ["g", "half", "no"], ["y"])], {"half": HALF, "no": NO}),
    "dropout-of-nothing": net(
        [N("Dropout", ["g", "none", "yes"], ["y"])], {"none": np.array(0, np.float32), "yes": YES}
    ),
    "dropout-by-default": net([N("Dropout", ["g"], ["y"])]),
    "dropout-opset-9": net([N("Dropout", ["g"], ["y"])], opset=9),
    "branch-not-taken": net(
        [
            N(
                "If",
                ["no"],
                ["y"],
                then_branch=subgraph([N("RandomNormalLike", ["g"], ["t"])], "t"),
                else_branch=subgraph([N("Identity", ["g"], ["e"])], "e"),
            )
        ],
        {"no": NO},
    ),
}


def checked(proto: onnx.ModelProto, folder: Path) -> CheckRecord:
    request = Request(nodeid="test", model=proto, folders=(folder,), parity=ParitySpec())
    return check.Checker(cache=Cache(folder / "cache"), allowance=Allowance(0)).check(request)


@pytest.mark.parametrize("name", list(RANDOM))
def test_a_random_model_is_an_error_that_names_the_node(name: str, tmp_path: Path) -> None:
    proto, node = RANDOM[name]
    assert runs_differ(proto)
    assert random_nodes(proto) == (node,)
    record = checked(proto, tmp_path)
    assert record.verdict == "error"
    assert "random by itself" in str(record.message)
    assert node in str(record.message)


@pytest.mark.parametrize("name", list(SOUND))
def test_what_reaches_no_output_is_no_error(name: str, tmp_path: Path) -> None:
    proto = SOUND[name]
    assert not runs_differ(proto)
    assert random_nodes(proto) == ()
    record = checked(proto, tmp_path)
    assert "random" not in str(record.message)
    # That TensorRT has no Dropout that trains is another thing, even where it drops nothing.
    assert record.verdict == "pass" or "does not take the model" in str(record.message)


def test_functions_are_looked_into() -> None:
    proto = net([N("Relu", ["g"], ["y"], name="call")])
    opset = helper.make_opsetid("", 17)
    inner = [N("RandomNormalLike", ["a"], ["n"], name="noise"), N("Add", ["a", "n"], ["b"])]
    proto.functions.append(helper.make_function("own", "Noisy", ["a"], ["b"], inner, [opset]))
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Noisy", "own"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert runs_differ(proto)
    assert random_nodes(proto) == ("call/noise (RandomNormalLike)",)


def test_a_dropout_that_an_input_turns_on_is_found_when_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorRT refuses it before that.
    monkeypatch.setattr(emulated, "acceptance", lambda *_, **__: Acceptance())
    nodes = [
        N("MatMul", ["x", "w"], ["g"], name="matmul"),
        N("ReduceMax", ["x"], ["m"], keepdims=0),
        N("Greater", ["m", "half"], ["c"]),
        N("Dropout", ["g", "half", "c"], ["y"], name="drop"),
    ]
    proto = onnx_models.model(
        nodes, {"x": (FLOAT, [2, 8])}, {"y": (FLOAT, [2, 8])}, {"w": onnx_models.weights((8, 8)), "half": HALF}
    )
    assert runs_differ(proto)
    assert random_nodes(proto) == ()
    record = checked(proto, tmp_path)
    assert record.verdict == "error"
    assert "two runs of the FP32 reference" in str(record.message)
