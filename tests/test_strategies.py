"""strategies.inputs draws what a model may be fed, and all examples of a test are one check."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from onnx import TensorProto, helper

from pytest_trtcheck import strategies
from pytest_trtcheck.check.kept_open import KeptOpen
from pytest_trtcheck.errors import ArgumentError, InputError
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    from tests.conftest import Suite

DOCS = Path(__file__).parent.parent / "docs" / "inputs.md"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Declared = dict[str, tuple[int, "tuple[int | str | None, ...]"]]


def identity(inputs: Declared) -> onnx.ModelProto:
    """A model that gives each input back."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(f"{name}_out", kind, shape) for name, (kind, shape) in inputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def drawn(strategy: Any, count: int = 60) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    @settings(max_examples=count, database=None)
    @given(strategy)
    def collect(inputs: dict[str, Any]) -> None:
        found.append(inputs)

    collect()
    return found


def smallest(strategy: Any, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The example that others shrink to. Hypothesis's phase of explaining tries others behind it."""
    enough = settings(phases=(Phase.generate, Phase.shrink), max_examples=5000)
    found: dict[str, Any] = find(strategy, lambda inputs: bool(condition(inputs)), settings=enough)
    return found


def test_dimensions_of_one_name_have_one_size_within_the_profile() -> None:
    proto = identity({"ids": (INT64, ("N", "T")), "mask": (INT64, ("N", "T")), "scores": (FLOAT, ("N", 3))})
    strategy = strategies.inputs(
        proto, shapes={"ids": ((1, 2), (2, 4), (3, 6))}, ranges={"ids": (5, 9), "scores": (-1, 1)}
    )
    seen = drawn(strategy)
    for inputs in seen:
        rows, length = inputs["ids"].shape
        assert inputs["mask"].shape == (rows, length)
        assert inputs["scores"].shape == (rows, 3)
        assert 1 <= rows <= 3
        assert 2 <= length <= 6
        assert {name: array.dtype.name for name, array in inputs.items()} == {
            "ids": "int64",
            "mask": "int64",
            "scores": "float32",
        }
        assert ((inputs["ids"] >= 5) & (inputs["ids"] <= 9)).all()
        assert np.isin(inputs["mask"], (0, 1)).all()
        assert (np.abs(inputs["scores"]) <= 1).all()
    assert len({inputs["ids"].shape for inputs in seen}) > 5
    assert seen[0].profile == {  # type: ignore[attr-defined]
        "ids": ShapeRange((1, 2), (2, 4), (3, 6)),
        "mask": ShapeRange((1, 2), (2, 4), (3, 6)),
        "scores": ShapeRange((1, 3), (2, 3), (3, 3)),
    }


def test_a_batch_is_that_of_every_open_first_dimension_whatever_its_name() -> None:
    proto = identity({"a": (FLOAT, ("unk__1", 2)), "b": (FLOAT, ("unk__2", 3)), "c": (FLOAT, (None, 1))})
    seen = drawn(strategies.inputs(proto, batch=(2, 5)))
    assert all(len({array.shape[0] for array in inputs.values()}) == 1 for inputs in seen)
    sizes = {inputs["a"].shape[0] for inputs in seen}
    assert sizes <= {2, 3, 4, 5}
    assert len(sizes) > 1


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "BOOL"])
def test_every_type(kind: str) -> None:
    proto = identity({"x": (getattr(TensorProto, kind), ("N", 4))})
    for inputs in drawn(strategies.inputs(proto, batch=2), 20):
        array = inputs["x"]
        assert array.dtype.name == {"FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64"}.get(
            kind, kind.lower()
        )
        assert np.isfinite(array.astype(np.float64)).all()


def test_examples_shrink_to_small_shapes_and_simple_numbers() -> None:
    small = strategies.inputs(identity({"x": (FLOAT, ("N", 4))}), batch=(1, 8), ranges=(-10, 10))
    assert smallest(small, bool)["x"].tolist() == [[0, 0, 0, 0]]
    assert smallest(small, lambda inputs: (inputs["x"] >= 3).any())["x"].max() == 3
    large = strategies.inputs(identity({"x": (FLOAT, ("N", 3, 224, 224))}), batch=(1, 4), ranges=(-10, 10))
    found = smallest(large, lambda inputs: (inputs["x"] >= 3).any())["x"]
    assert found.shape == (1, 3, 224, 224)
    assert np.unique(found).tolist() in ([3], [0, 3])


def test_numbers_near_zero_infinities_and_nan_only_where_they_are_asked_for() -> None:
    proto = identity({"x": (FLOAT, ("N", 8))})
    values = np.concatenate([inputs["x"].ravel() for inputs in drawn(strategies.inputs(proto, batch=1))])
    assert np.isfinite(values).all()
    asked = strategies.inputs(proto, batch=1, smallest=0, allow_nan=True, allow_infinity=True)
    assert np.isnan(smallest(asked, lambda inputs: np.isnan(inputs["x"]).any())["x"]).any()
    assert np.isinf(smallest(asked, lambda inputs: np.isinf(inputs["x"]).any())["x"]).any()
    assert smallest(asked, lambda inputs: ((inputs["x"] > 0) & (inputs["x"] < 1e-5)).any())["x"].max() > 0


def test_bfloat16_ends_are_those_of_the_type() -> None:
    proto = identity({"x": (TensorProto.BFLOAT16, ("N", 4))})
    top = float(np.asarray(0.1).astype(ml_dtypes.bfloat16))
    for inputs in drawn(strategies.inputs(proto, batch=1, ranges=(0, 0.1)), 30):
        assert inputs["x"].astype(np.float64).max() <= top


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({}, InputError, "these dimensions are free: x[0] (N)"),
        ({"batch": 0}, ArgumentError, "batch=0: expected a number of at least 1, or (least, most)"),
        ({"batch": (3, 2)}, ArgumentError, "batch=(3, 2): expected"),
        ({"batch": 1, "ranges": (2, 1)}, ArgumentError, "strategies.inputs: ranges=(2, 1): expected (low, high)"),
        ({"batch": 1, "ranges": {"y": (0, 1)}}, InputError, "ranges: <ModelProto test> has no input 'y'"),
        ({"shapes": {"x": 3}}, ArgumentError, "strategies.inputs: shapes['x']=3: expected a shape"),
        ({"shapes": {"x": (1, 5)}}, InputError, "shapes['x']=(1, 5): the model's input is ['N', 4]"),
        ({"batch": 1, "smallest": -1}, ArgumentError, "smallest=-1: expected a number of at least 0"),
    ],
)
def test_what_cannot_be_drawn_says_what_to_pass(arguments: Any, error: Any, expected: str) -> None:
    with pytest.raises(error) as raised:
        drawn(strategies.inputs(identity({"x": (FLOAT, ("N", 4))}), **arguments), 1)
    assert expected in str(raised.value)
    if not arguments:
        assert "fix them: batch=1" in str(raised.value)


def test_sizes_that_two_inputs_do_not_share() -> None:
    proto = identity({"a": (FLOAT, (1, "T")), "b": (FLOAT, (1, "T"))})
    with pytest.raises(InputError, match=r"b\[1\] is T, which shapes= gives no size in common"):
        drawn(strategies.inputs(proto, shapes={"a": (1, 2), "b": (1, 3)}), 1)


# --- @given with trt_check -------------------------------------------------------------------------------------------


def squares(scale: float) -> onnx.ModelProto:
    """scale · h², of a product h: beyond FP16 where |h| is large."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "scale"], ["g"]),
        helper.make_node("Mul", ["g", "h"], ["y"]),
    ]
    weights = {"w": onnx_models.weights((8, 4), 1, 1.0), "scale": np.asarray(scale, np.float32)}
    return onnx_models.model(nodes, {"x": (FLOAT, ["N", 8])}, {"y": (FLOAT, ["N", 4])}, weights)


TESTS = """
from hypothesis import given, settings
from pytest_trtcheck import strategies

sound = strategies.inputs("sound.onnx", batch=(1, 4), ranges=(0.5, 1))

@settings(max_examples=10, database=None)
@given(inputs=sound)
def test_sound(trt_check, inputs):
    trt_check("sound.onnx", inputs, tol=0.2)

@settings(max_examples=10, database=None)
@given(inputs=strategies.inputs("loud.onnx", batch=(1, 4), ranges=(0, 50)))
def test_loud(trt_check, inputs):
    trt_check("loud.onnx", inputs, tol=0.2)
"""


@pytest.fixture
def models(suite: Suite) -> Suite:
    onnx_models.save(squares(1.0), suite.path / "sound.onnx")
    onnx_models.save(squares(30.0), suite.path / "loud.onnx")
    return suite


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "n2"])
def test_examples_are_one_check_of_the_minimal_failing_one(models: Suite, workers: tuple[str, ...]) -> None:
    models.write(test_a=TESTS)
    run = models.run("-q", "--trt-bundle=failed", *workers)
    assert len(run.checks) == 2
    sound, loud = run.check("test_sound"), run.check("test_loud")
    assert (sound["verdict"], sound["examples"]) == ("pass", 10)
    assert loud["verdict"] == "fail"
    assert loud["examples"] > 1
    assert loud["profile"] == {"x": [[1, 8], [4, 8], [4, 8]]}
    # Diagnosed and bundled once, of the smallest input; what Hypothesis calls it is shown.
    assert loud["parity"]["outputs"][0]["shape"] == [1, 4]
    assert loud["parity"]["blame"]["step"] == "precision"
    assert len(list(models.path.glob("failed/*"))) == 1
    assert "test_loud(" in run.text
    assert "Explanation" not in run.text
    assert "this is the minimal failing one of them" in run.text


def test_examples_of_all_shapes_share_one_engine(models: Suite) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds the engine")
    models.write(test_a=TESTS.partition("@settings(max_examples=10, database=None)\n@given(inputs=strategies")[0])
    run = models.run("-q", "--trt-gpu=A100", "--trt-cache-dir=cache")
    assert run.checks[0]["verdict"] == "pass"
    assert run.checks[0]["compiled_for"]
    listed = models.run("-q", "--trt-cache-show", "--trt-cache-dir=cache").text
    assert listed.count("  engine: fp16, SM80, TensorRT-RTX") == 1, listed
    # What was computed for examples is not kept: the same ones hardly come again.
    assert "  reference" not in listed


@pytest.mark.parametrize("read", ["", ".read_bytes()"])
def test_each_example_is_compared_with_its_own_reference(models: Suite, read: str) -> None:
    models.write(
        test_a=f"""
from pathlib import Path
from hypothesis import Phase, given, settings
from pytest_trtcheck import strategies

@settings(max_examples=3, database=None, phases=[Phase.generate])
@given(inputs=strategies.inputs("sound.onnx", batch=1, ranges=(0.5, 1)))
def test_two(trt_check, inputs):
    # The second path may lie where the first one lay in memory.
    for name in ("sound", "loud"):
        trt_check("sound.onnx", inputs, tol=0.2, reference=Path(name + ".onnx"){read})
"""
    )
    run = models.run("-q", "--trt-diagnose=0")
    (failed,) = (record for record in run.checks if record["verdict"] == "fail")
    assert failed["reference"] == ("<bytes>" if read else "loud.onnx")


def test_checks_of_one_test_that_differ_are_recorded_apart(models: Suite) -> None:
    models.write(
        test_a="""
from hypothesis import given, settings
from pytest_trtcheck import strategies

@settings(max_examples=3, database=None)
@given(inputs=strategies.inputs("sound.onnx", batch=1, ranges=(0.5, 1)))
def test_it(trt_check, inputs):
    trt_check("sound.onnx", inputs, tol=0.2)
    trt_check("sound.onnx", inputs, tol=0.2, reference="sound.onnx")
    trt_check("sound.onnx", inputs, tol=0.2, batch=1)
"""
    )
    run = models.run("-q")
    assert [record["examples"] for record in run.checks] == [3, 3, 3]
    assert [record.get("reference") for record in run.checks] == [None, "sound.onnx", None]


def test_each_example_has_the_engine_of_its_own_calibration_data(models: Suite) -> None:
    models.write(
        test_a="""
from hypothesis import given, settings
from pytest_trtcheck import strategies

def data(scale):
    found = np.zeros((300, 1, 8), np.float32)
    found[50:-50] = scale  # numpy shows what is before and behind
    return {"x": found}

@settings(max_examples=2, database=None)
@given(inputs=strategies.inputs("sound.onnx", batch=1, ranges=(0.5, 1)))
def test_two(trt_build, inputs):
    near, far = (trt_build("sound.onnx", "int8", calibration=data(scale))(inputs)["y"] for scale in (1, 100))
    assert not np.array_equal(near, far)
"""
    )
    models.run("-q").result.assert_outcomes(passed=1)


def test_what_is_kept_open_by_identity_is_kept() -> None:
    class Thing:
        def close(self) -> None: ...

    kept, named = KeptOpen(), Thing()
    gone = weakref.ref(named)
    kept.get(id(named), Thing, of=named)
    del named
    assert gone() is not None
    kept.close()
    assert gone() is None


def test_hypothesis_settings_are_seen_to_and_the_users_own_hold(models: Suite) -> None:
    models.write(
        test_a="""
from hypothesis import given, settings
from pytest_trtcheck import strategies
inputs = given(inputs=strategies.inputs("sound.onnx", batch=1, ranges=(0.5, 1)))

@settings(max_examples=3, database=None, deadline=0.001)
@inputs
def test_deadline(trt_check, inputs):
    trt_check("sound.onnx", inputs, tol=0.2)

@settings(max_examples=3, database=None)
@inputs
def test_folder(trt_check, tmp_path, inputs):
    trt_check("sound.onnx", inputs, tol=0.2)

@settings(max_examples=3, database=None)
@inputs
def test_own(trt_build, inputs):
    assert trt_build("sound.onnx", shapes={"x": ((1, 8), (1, 8), (4, 8))})(inputs)["y"].shape == (1, 4)

@settings(max_examples=3, database=None)
@inputs
def test_search(trt_check, inputs):
    trt_check("sound.onnx", inputs, search=10)

@settings(max_examples=3, database=None)
@inputs
def test_its_own_assert(trt_check, inputs):
    record = trt_check("sound.onnx", inputs, tol=0.2)
    assert record.parity.worst < 0

@trt_parity("sound.onnx")
@inputs
def test_marked(inputs): ...

@given(inputs=strategies.inputs("sound.onnx"))
def test_free(trt_check, inputs): ...
"""
    )
    run = models.run("-q", "-rA", plugins=("hypothesispytest",))
    outcomes = run.result.parseoutcomes()
    assert outcomes == {"passed": 1, "failed": 5, "errors": 1}
    assert "DeadlineExceeded" in run.text or "Flaky" in run.text
    assert "function-scoped fixture" in run.text.lower()
    assert "search= in a test with @given: each example would be searched" in run.text
    assert "trt markers don't work on 'test_marked': @given runs it many times" in run.text
    assert "strategies.inputs: sound.onnx: these dimensions are free: x[0] (N)" in run.text
    assert run.check("test_its_own_assert")["verdict"] == "pass"
