"""What a check could not see is no pass, or is said: zeros, and what only the reference has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.conftest import Suite

WEIGHTS = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


def heads(path: Path, batch: int | str = 2, **biases: NDArray[np.float32]) -> None:
    """Linear layers of one input `x`, clipped to [0, 5], named by their outputs."""
    bounds = {"w": WEIGHTS, "low": np.float32(0), "high": np.float32(5)}
    nodes, initializers = [], [numpy_helper.from_array(np.asarray(value), name) for name, value in bounds.items()]
    for name, bias in biases.items():
        initializers.append(numpy_helper.from_array(bias, f"{name}_bias"))
        nodes += [
            helper.make_node("MatMul", ["x", "w"], [f"{name}_product"]),
            helper.make_node("Add", [f"{name}_product", f"{name}_bias"], [f"{name}_sum"]),
            helper.make_node("Clip", [f"{name}_sum", "low", "high"], [name]),
        ]
    x, *outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 8]) for name in ("x", *biases))
    graph = helper.make_graph(nodes, "heads", [x], outputs, initializers)
    opset = helper.make_opsetid("", 17)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString())


def test_zeros_that_are_fed_are_noted(suite: Suite) -> None:
    suite.write(
        test_it='@trt_parity("conv.onnx")\n@pytest.mark.parametrize("last", [0, 1])\ndef test_it(last):\n'
        "    image = np.zeros((1, 3, 16, 16), np.float32)\n    return [image, image + last]\n"
    )
    said = "returned inputs: every floating-point input is zero throughout: what multiplies them was not exercised"
    assert [said in record["notes"] for record in suite.run().checks] == [True, False]


def test_outputs_that_are_the_same_for_all_samples_are_noted(suite: Suite) -> None:
    heads(suite.path / "fixed.onnx", 1, y=np.arange(8, dtype=np.float32) - 100, z=np.zeros(8, np.float32))
    # Of which nothing is left but the bounds.
    saturated = np.array([1000, -1000] * 4, np.float32)
    heads(suite.path / "free.onnx", "batch", saturated=saturated, y=np.zeros(8, np.float32))
    suite.write(
        test_it="""
X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)

@trt_parity("free.onnx")
def test_rows_that_differ():
    return {"x": X}

@trt_parity("free.onnx")
def test_equal_rows():
    return {"x": np.repeat(X[:1], 4, axis=0)}

@trt_parity("fixed.onnx")
def test_equal_inputs():
    return [{"x": X[:1]}] * 3

@trt_parity("fixed.onnx")
def test_one_input():
    return {"x": X[:1]}
"""
    )
    run = suite.run()
    said = (
        "output {!r}: its reference is the same for all {} samples: how it follows from the inputs was hardly exercised"
    )

    def noted(test: str) -> list[str]:
        return [note for note in run.check(test)["notes"] if "same for all" in note]

    assert noted("rows_that_differ") == [said.format("saturated", 4)]
    assert noted("equal_rows") == [said.format("saturated", 4), said.format("y", 4)]
    assert noted("equal_inputs") == [said.format("z", 3)]  # of `y`, which is zero throughout, more is said
    assert noted("one_input") == []


def test_what_nothing_could_be_seen_of_is_no_pass(suite: Suite) -> None:
    alive, dead = np.zeros(8, np.float32), np.full(8, -1000, np.float32)
    np.save(suite.path / "w.npy", WEIGHTS)
    heads(suite.path / "dead.onnx", y=dead)
    heads(suite.path / "alive.onnx", y=alive)
    heads(suite.path / "free.onnx", "batch", y=alive)
    heads(suite.path / "saturated.onnx", y=alive, clipped=np.full(8, 100, np.float32))
    heads(suite.path / "both.onnx", y=alive, z=dead)
    suite.write(
        test_it="""
from pytest_trtcheck import Search

W = np.load("w.npy")

@trt_parity("dead.onnx")
def test_dead(): ...

@trt_parity("alive.onnx")
def test_fed_with_zeros():
    return {"x": np.zeros((2, 8), np.float32)}

@trt_parity("alive.onnx", metric="abs", tol=1000)
def test_below_the_limit(): ...

@trt_parity("both.onnx")
def test_one_of_two(): ...

@trt_parity("saturated.onnx", precision="bf16")
def test_saturated(): ...

@trt_parity("alive.onnx", tol=1)
def test_anything(): ...

@trt_parity("free.onnx", shapes={"x": ((1, 8), (2, 8), (4, 8))})
def test_one_size():
    return np.ones((2, 8), np.float32)

@trt_parity("free.onnx", shapes={"x": ((1, 8), (2, 8), (4, 8))}, search=Search(50, ranges=(0, 1)))
def test_searched():
    return np.ones((2, 8), np.float32)

@trt_parity("free.onnx", shapes={"x": ((1, 8), (2, 8), (4, 8))})
def test_both_ends():
    return [np.ones((1, 8), np.float32), np.ones((4, 8), np.float32)]

def test_a_loop(trt_check):
    for precision in ("fp32", "fp16"):
        trt_check("alive.onnx", precision=precision)

@trt_parity("alive.onnx", reference="both.onnx")
def test_dropped(): ...

@trt_parity("alive.onnx", reference=lambda case: {"y": np.clip(case["x"] @ W, 0, 5), "more": case["x"]})
def test_dropped_by_a_function(): ...
""",
    )
    run = suite.run("--trt-diagnose=0", "-rs")
    assert {check["nodeid"].partition("::test_")[2]: check["verdict"] for check in run.checks} == {
        "dead": "error",
        "fed_with_zeros": "error",
        "below_the_limit": "error",
        "one_of_two": "pass",
        "saturated": "pass",
        "anything": "pass",
        "one_size": "pass",
        "searched": "pass",
        "both_ends": "pass",
        "a_loop": "not_measured",
        "dropped": "pass",
        "dropped_by_a_function": "pass",
    }
    for name in ("test_dead", "test_fed_with_zeros"):
        said = "not exercised: its reference is zero throughout on these inputs"
        assert said in run.check(name)["message"]
        assert "give real inputs" in run.check(name)["message"]
    assert "and zeros would keep 1000" in run.check("test_below_the_limit")["message"]
    notes = " ".join(run.check("test_one_of_two")["notes"])
    assert "output 'z', by max: not exercised: its reference is zero throughout on these inputs" in notes
    for name in ("test_one_size", "test_searched"):
        assert "shapes: these sizes alone were checked: x[0] 2, of 1 to 4" in run.check(name)["notes"]
    assert not any(note.startswith("shapes:") for note in run.check("test_both_ends").get("notes", ()))
    assert "the test ends here: what it would have checked after this was not checked" in run.text
    constant = "output 'clipped': every element of its reference is 5 on these inputs: what leads there was hardly"
    assert any(note.startswith(constant) for note in run.check("test_saturated")["notes"])
    assert "tol=1: an output of zeros would keep the limit of 1 for max" in run.check("test_anything")["notes"]
    said = "gives 'z' too, which alive.onnx has not: not compared"
    assert any(said in note for note in run.check("test_dropped")["notes"])
    assert any("gives 'more' too" in note for note in run.check("test_dropped_by_a_function")["notes"])


def test_labels_and_masks_that_are_one_value_are_noted(suite: Suite) -> None:
    bounds = {"w": WEIGHTS, "far": np.float32(1000), "near": np.float32(0)}
    model = onnx_models.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Greater", ["product", "far"], ["never"]),
            helper.make_node("Greater", ["product", "near"], ["some"]),
            helper.make_node("Cast", ["never"], ["count"], to=TensorProto.INT64),
        ],
        {"x": (TensorProto.FLOAT, [2, 8])},
        {"never": (TensorProto.BOOL, [2, 8]), "some": (TensorProto.BOOL, [2, 8]), "count": (TensorProto.INT64, [2, 8])},
        {name: np.asarray(value) for name, value in bounds.items()},
    )
    onnx_models.save(model, suite.path / "masks.onnx")
    suite.write(test_it='@trt_parity("masks.onnx")\ndef test_it(): ...\n')
    run = suite.run("--trt-diagnose=0")
    said = " ".join(run.check("test_it")["notes"])
    assert run.check("test_it")["verdict"] == "pass"
    assert "output 'never': every element of its reference is False on these inputs" in said
    assert "output 'count': every element of its reference is 0 on these inputs" in said
    assert "output 'some'" not in said


def test_of_the_examples_of_hypothesis_one_that_says_something_is_enough(suite: Suite) -> None:
    heads(suite.path / "alive.onnx", y=np.zeros(8, np.float32))
    suite.write(
        test_it="""
from hypothesis import given, settings, strategies as st

@settings(max_examples=4, database=None, derandomize=True)
@given(st.sampled_from([0, 1, 2]))
def test_begins_with_zeros(trt_check, value):
    trt_check("alive.onnx", np.full((2, 8), value, np.float32))

@settings(max_examples=4, database=None, derandomize=True)
@given(st.sampled_from([1, 2]))
def test_zeros_alone(trt_check, value):
    trt_check("alive.onnx", np.zeros((2, 8), np.float32))
"""
    )
    run = suite.run("--trt-diagnose=0", plugins=["hypothesispytest"])
    assert [check["verdict"] for check in run.checks] == ["pass", "error"]
    assert "1 example of these exercised nothing" in run.check("begins_with_zeros")["notes"]
    assert "on these inputs" in run.check("zeros_alone")["message"]
