"""What went wrong is called what it is: overflow, underflow, saturation, cancellation; and where NaN comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import Blame, diagnose, explain
from tests import onnx_models
from tests.diagnosed import FLOAT, Bench, Case, assert_users_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose import Subject

HALF = TensorProto.FLOAT16
X = (np.random.default_rng(0).standard_normal((3, 8)) * 5).astype(np.float32)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def chain(nodes: Sequence[onnx.NodeProto], **constants: float) -> onnx.ModelProto:
    """A model from x [3, 8] to y, with scalar constants."""
    weights = {name: np.array(each, np.float32) for name, each in constants.items()}
    shape = (FLOAT, [3, 8])
    return onnx_models.model(nodes, {"x": shape}, {"y": shape}, weights)


def blamed(bench: Bench, subject: Subject) -> Blame:
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert_users_names(subject, found)
    assert found.culprit is not None, explain(found.to_dict())
    if found.keep_fp32:
        assert found.confirmed
        assert bench.error(subject, found.keep_fp32) <= (found.errors.limit or 0)
    return found


def failed(bench: Bench, proto: onnx.ModelProto, x: NDArray[Any] = X, precision: Any = "fp16") -> Subject:
    subject = bench.failed(proto, precision, [{"x": x}])
    assert not bench.error(subject) <= 0.03
    return subject


# --- NaN and infinity ------------------------------------------------------------------------------------------------


def layer_norm(epsilon: float) -> onnx.ModelProto:
    return chain(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[-1], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["d"], "center"),
            helper.make_node("Mul", ["d", "d"], ["dd"], "square"),
            helper.make_node("ReduceMean", ["dd"], ["v"], "variance", axes=[-1], keepdims=1),
            helper.make_node("Add", ["v", "epsilon"], ["shifted"], "add_epsilon"),
            helper.make_node("Sqrt", ["shifted"], ["deviation"], "root"),
            helper.make_node("Div", ["d", "deviation"], ["y"], "divide"),
        ],
        epsilon=epsilon,
    )


def test_an_epsilon_that_becomes_0_before_a_padded_row_is_divided(bench: Bench) -> None:
    """No operator loses much by itself: 1e-12 is nothing beside the other rows' variance."""
    x = X.copy()
    x[1] = 0.25
    assert np.float16(1e-12) == 0
    found = blamed(bench, failed(bench, layer_norm(1e-12), x))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("underflow", "add_epsilon", "epsilon")
    assert found.culprit.is_constant
    assert "the constant 1e-12 becomes 0" in found.culprit.detail
    assert "node 'divide' computes 0/0" in found.culprit.detail
    assert found.keep_fp32 == ("add_epsilon", "root")
    assert "constant 'epsilon' underflows" in explain(found.to_dict()).splitlines()[0]


def test_a_logarithm_of_what_became_0(bench: Bench) -> None:
    proto = chain(
        [
            helper.make_node("Mul", ["x", "small"], ["a"], "first"),
            helper.make_node("Mul", ["a", "small"], ["b"], "second"),
            helper.make_node("Abs", ["b"], ["c"], "abs"),
            helper.make_node("Log", ["c"], ["y"], "log"),
        ],
        small=1e-5,
    )
    found = blamed(bench, failed(bench, proto))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("underflow", "second", "b")
    assert "node 'log' computes the logarithm of 0" in found.culprit.detail
    gone = np.count_nonzero((X.astype(np.float16) * np.float16(1e-5) * np.float16(1e-5)) == 0)
    assert f"{gone} of 24 elements become 0" in found.culprit.detail


def test_a_root_of_a_variance_that_became_negative(bench: Bench) -> None:
    """E[x²] − E[x]² of numbers around 60 that hardly vary; in FP16 both are rounded to steps of 2."""
    proto = chain(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[-1], keepdims=1),
            helper.make_node("Mul", ["m", "m"], ["mm"], "squared_mean"),
            helper.make_node("Mul", ["x", "x"], ["xx"], "square"),
            helper.make_node("ReduceMean", ["xx"], ["mx"], "mean_square", axes=[-1], keepdims=1),
            helper.make_node("Sub", ["mx", "mm"], ["v"], "variance"),
            helper.make_node("Sqrt", ["v"], ["s"], "root"),
            helper.make_node("Div", ["x", "s"], ["y"], "divide"),
        ]
    )
    rng = np.random.default_rng(1)
    x = (np.array([[60.1], [60.3], [60.7]]) + 0.2 * rng.standard_normal((3, 8))).astype(np.float32)
    found = blamed(bench, failed(bench, proto, x))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("cancellation", "variance", "v")
    assert found.keep_fp32 is not None
    assert "variance" in found.keep_fp32


def test_infinity_minus_infinity_is_an_overflow(bench: Bench) -> None:
    """The NaN comes out of the Sub; what is to blame are the two that it subtracts."""
    proto = chain(
        [
            helper.make_node("Mul", ["x", "much"], ["a"], "first"),
            helper.make_node("Mul", ["x", "more"], ["b"], "second"),
            helper.make_node("Sub", ["b", "a"], ["y"], "difference"),
        ],
        much=5e4,
        more=6e4,
    )
    found = blamed(bench, failed(bench, proto))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node) == ("overflow", "first")
    assert found.others == ("second",)


def test_an_overflow_that_no_operator_has_by_itself(bench: Bench) -> None:
    """4.002 · 16,368 is 65,504.7, which FP16 holds; rounded to FP16 it is 4.0039, and then infinite."""
    x, factor = np.full((3, 8), 0.5, np.float32), 16368.0
    x[0, 0] = 4.002
    assert float(x[0, 0]) * factor < 65520 < float(np.float16(x[0, 0])) * factor
    proto = chain(
        [
            helper.make_node("Mul", ["x", "one"], ["a"], "copy"),
            helper.make_node("Mul", ["a", "factor"], ["b"], "up"),
            helper.make_node("Div", ["b", "factor"], ["y"], "back"),
        ],
        factor=factor,
        one=1.0,
    )
    found = blamed(bench, failed(bench, proto, x))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("overflow", "up", "b")
    assert found.keep_fp32


def test_bfloat16_divides_by_what_became_0_too(bench: Bench) -> None:
    """Subtracting what rounds to the same leaves 0 where FP32 has a difference."""
    proto = chain(
        [
            helper.make_node("Add", ["x", "one"], ["a"], "shift"),
            helper.make_node("Sub", ["a", "one"], ["b"], "shift_back"),
            helper.make_node("Div", ["one", "b"], ["y"], "invert"),
        ],
        one=1.0,
    )
    x = np.random.default_rng(2).uniform(1e-3, 1e-2, (3, 8)).astype(np.float32)
    rounded = (x + 1).astype(ml_dtypes.bfloat16).astype(np.float32) - 1
    assert (rounded == 0).any()
    found = blamed(bench, failed(bench, proto, x, "bf16"))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("underflow", "shift_back", "b") or (
        found.culprit.kind,
        found.culprit.node,
    ) == ("cancellation", "shift_back")
    assert "'invert' computes 1/0" in found.culprit.detail


# --- finite, and wrong -----------------------------------------------------------------------------------------------


def test_a_constant_that_becomes_0(bench: Bench) -> None:
    proto = chain(
        [
            helper.make_node("Mul", ["x", "tiny"], ["a"], "down"),
            helper.make_node("Mul", ["a", "huge"], ["y"], "up"),
        ],
        tiny=1e-8,
        huge=6e4,
    )
    found = blamed(bench, failed(bench, proto))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("underflow", "down", "tiny")
    assert found.culprit.detail == "the constant 1e-08 becomes 0"


def test_a_constant_beyond_the_type(bench: Bench) -> None:
    proto = chain(
        [helper.make_node("Div", ["x", "million"], ["a"], "down"), helper.make_node("Mul", ["a", "huge"], ["y"], "up")],
        million=1e6,
        huge=6e4,
    )
    found = blamed(bench, failed(bench, proto))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("overflow", "down", "million")
    assert found.culprit.detail == "the constant 1e+06 becomes 65504"


def test_a_tensor_that_underflows(bench: Bench) -> None:
    """What reads it is not to blame."""
    proto = chain(
        [
            helper.make_node("Mul", ["x", "small"], ["a"], "first"),
            helper.make_node("Mul", ["a", "small"], ["b"], "second"),
            helper.make_node("Mul", ["b", "huge"], ["y"], "up"),
        ],
        small=1e-4,
        huge=6e4,
    )
    found = blamed(bench, failed(bench, proto))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("underflow", "second", "b")
    assert "'b' underflows" in found.headline


# --- quantization ----------------------------------------------------------------------------------------------------


def quantized(kind: int = FLOAT, *, x_range: float = 4.0, b_range: float = 6.0, cast: bool = False) -> onnx.ModelProto:
    """Conv → Relu → Conv with Q/DQ around, as an exporter of FP32 or FP16 models writes them."""
    dtype: Any = np.float16 if kind == HALF else np.float32
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, NDArray[Any]] = {"zero": np.zeros((), np.int8)}

    def pair(name: str, amax: float) -> str:
        weights[f"{name}_scale"] = np.array(amax / 127, dtype)
        operands = [f"{name}_scale", "zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *operands], [f"{name}_q"], f"{name}_Q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *operands], [f"{name}_dq"], f"{name}_DQ"))
        return f"{name}_dq"

    def stored(name: str, shape: Sequence[int], seed: int) -> str:
        array = onnx_models.weights(shape, seed)
        scale = (np.abs(array).max(axis=(1, 2, 3)) / 127).astype(dtype)
        steps = np.rint(array / scale.astype(np.float32).reshape(-1, 1, 1, 1))
        weights[f"{name}_q"] = steps.clip(-127, 127).astype(np.int8)
        weights[f"{name}_scale"], weights[f"{name}_zero"] = scale, np.zeros(len(scale), np.int8)
        operands = [f"{name}_q", f"{name}_scale", f"{name}_zero"]
        nodes.append(helper.make_node("DequantizeLinear", operands, [f"{name}_dq"], f"{name}_DQ", axis=0))
        return f"{name}_dq"

    source = "x"
    if cast:
        nodes.append(helper.make_node("Cast", ["x"], ["half"], "to_half", to=HALF))
        source = "half"
    conv: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    nodes.append(
        helper.make_node("Conv", [pair(source, x_range), stored("w1", (8, 3, 3, 3), 1)], ["a"], "conv1", **conv)
    )
    nodes.append(helper.make_node("Relu", ["a"], ["b"], "relu"))
    nodes.append(helper.make_node("Conv", [pair("b", b_range), stored("w2", (4, 8, 3, 3), 2)], ["y"], "conv2", **conv))
    inner = HALF if kind == HALF and not cast else FLOAT
    return onnx_models.model(nodes, {"x": (inner, [1, 3, 16, 16])}, {"y": (kind, [1, 4, 16, 16])}, weights, opset=21)


PIXELS = np.random.default_rng(3).standard_normal((1, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize(("kind", "cast"), [(FLOAT, False), (HALF, False), (HALF, True)])
@pytest.mark.parametrize("which", ["x", "b"])
def test_a_model_with_qdq_saturates(bench: Bench, kind: int, cast: bool, which: str) -> None:
    """In FP32 or in FP16: the user's own tensor and node are named, and the ranges are audited."""
    x = PIXELS.astype(np.float16) if kind == HALF and not cast else PIXELS
    sound = bench.failed(quantized(kind, cast=cast), "int8", [{"x": x}])
    assert bench.error(sound) < 0.05
    ranges = {"x": {"x_range": 0.5}, "b": {"b_range": 0.5}}[which]
    subject = bench.failed(quantized(kind, cast=cast, **ranges), "int8", [{"x": x}])
    assert bench.error(subject) > 0.05
    found = blamed(bench, subject)
    assert found.culprit is not None
    tensor, node = {"x": ("half" if cast else "x", "conv1"), "b": ("b", "conv2")}[which]
    assert (found.culprit.kind, found.culprit.tensor, found.culprit.node) == ("saturation", tensor, node)
    assert found.calibration is not None
    assert found.calibration["outside"][0]["tensor"] == tensor
    if which == "x":
        outside = float(np.mean(np.abs(PIXELS) > 0.5 * (1 + 0.5 / 127)))
        assert found.calibration["outside"][0]["share"] == pytest.approx(outside, abs=3e-3)
    assert not any("audited" in note for note in found.notes)


def test_advice_on_a_model_with_qdq_can_be_followed(bench: Bench) -> None:
    subject = bench.failed(quantized(b_range=0.5), "int8", [{"x": PIXELS}])
    found = blamed(bench, subject)
    assert found.keep_fp32 is None
    text = explain(found.to_dict())
    assert "keep_fp32 has no effect" in " ".join(text.split())
    assert "keep_fp32=[" not in text
    assert any("exported in FP32" in note and "'conv2'" in note for note in found.notes)


def test_boxes_and_scores_behind_one_scale(bench: Bench) -> None:
    """The output itself is quantized: in steps of 5 pixels every score is 0."""
    weights: dict[str, NDArray[Any]] = {
        "scale": np.array(640 / 127, np.float32),
        "zero": np.zeros((), np.int8),
        "size": np.array(640, np.float32),
    }
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["scores"], "sigmoid"),
        helper.make_node("Mul", ["scores", "size"], ["pixels"], "scale_up"),
        helper.make_node("Slice", ["pixels", "from_0", "to_4", "along"], ["boxes"], "boxes"),
        helper.make_node("Concat", ["boxes", "scores"], ["joined"], "join", axis=1),
        helper.make_node("QuantizeLinear", ["joined", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "dequantize"),
    ]
    weights |= {name: np.array([each], np.int64) for name, each in {"from_0": 0, "to_4": 1, "along": 1}.items()}
    proto = onnx_models.model(nodes, {"x": (FLOAT, [3, 8])}, {"y": (FLOAT, [3, 9])}, weights)
    subject = bench.failed(proto, "int8", [{"x": X}], tol=1e-3)
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor) == ("underflow", "joined")
    assert "become 0" in found.culprit.detail


def test_a_few_outliers_that_are_clipped_are_saturation(bench: Bench) -> None:
    """One element in 4,000 beyond the range, and most of the error is its."""
    proto = onnx_models.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
            helper.make_node("MatMul", ["h", "w2"], ["k"], "another"),
            helper.make_node("MatMul", ["k", "w3"], ["y"], "third"),
        ],
        {"x": (FLOAT, [64, 64])},
        {"y": (FLOAT, [64, 4])},
        {
            "w": onnx_models.weights((64, 16), 1),
            "w2": onnx_models.weights((16, 16), 2),
            "w3": onnx_models.weights((16, 4), 3),
        },
    )
    rng = np.random.default_rng(4)
    usual: Case = {"x": rng.uniform(-1, 1, (64, 64)).astype(np.float32)}
    spoiled = usual["x"].copy()
    spoiled[7, 9] = 60.0
    subject = bench.failed(proto, "int8", [{"x": spoiled}], calibration=[usual])
    assert bench.error(subject) > 0.05
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor) == ("saturation", "x")


def test_what_becomes_zero_on_a_grid_of_even_steps_is_no_underflow(bench: Bench) -> None:
    """Behind a power, as behind a SiLU, most values are small, and err no more than the rest: what reads them loses."""
    proto = onnx_models.model(
        [
            helper.make_node("Mul", ["x", "x"], ["square"], "squared"),
            helper.make_node("Mul", ["square", "square"], ["power"], "squared_again"),
            helper.make_node("MatMul", ["power", "w"], ["y"], "product"),
        ],
        {"x": (FLOAT, [64, 32])},
        {"y": (FLOAT, [64, 4])},
        {"w": onnx_models.weights((32, 4), 1)},
    )
    usual: Case = {"x": np.random.default_rng(4).standard_normal((64, 32)).astype(np.float32)}
    subject = bench.failed(proto, "int8", [usual], calibration=[usual], tol=1e-3)
    power = usual["x"] ** 4
    assert 0.5 < np.mean(power < power.max() / 127 / 2) < 0.9
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node) == ("rounding", "product")


def test_ordinary_rounding_of_weights_is_not_called_a_fault_of_theirs(bench: Bench) -> None:
    """A Gemm whose products cancel makes much of what its weights are rounded by."""
    rng = np.random.default_rng(5)
    half = rng.standard_normal((16, 4)).astype(np.float32)
    w = np.concatenate([half, -half * np.float32(1.0003)])
    proto = onnx_models.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"x": (FLOAT, [3, 32])},
        {"y": (FLOAT, [3, 4])},
        {"w": w},
    )
    x = rng.standard_normal((3, 16)).astype(np.float16).astype(np.float32)
    subject = bench.failed(proto, "fp16", [{"x": np.concatenate([x, x], axis=1)}])
    assert bench.error(subject) > 0.01
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert found.culprit.kind in {"rounding", "cancellation"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_places_that_are_computed_from_constants_are_no_fault_of_the_weights(bench: Bench, precision: Any) -> None:
    """The table is rounded as it always is; it is read in other places."""
    size = 5000
    numbers = np.arange(size, dtype=np.int64)

    def branch(name: str, by: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Cast", ["numbers"], [f"{name}_floats"], f"{name}_cast", to=FLOAT),
            helper.make_node("Mul", [f"{name}_floats", by], [f"{name}_places"], f"{name}_scale"),
        ]
        places = helper.make_tensor_value_info(f"{name}_places", FLOAT, [size])
        return helper.make_graph(nodes, name, [], [places])

    nodes = [
        helper.make_node(
            "If", ["which"], ["floats"], "if", then_branch=branch("then", "half"), else_branch=branch("else", "quarter")
        ),
        helper.make_node("Cast", ["floats"], ["places"], "count", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "places"], ["looked_up"], "look up"),
        helper.make_node("Mul", ["x", "looked_up"], ["y"], "multiply"),
    ]
    shape = {"x": (FLOAT, [size]), "which": (TensorProto.BOOL, [])}
    table = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    constants = {"half": np.float32(0.5), "quarter": np.float32(0.25), "numbers": numbers, "table": table}
    proto = onnx_models.model(nodes, shape, {"y": (FLOAT, [size])}, {k: np.asarray(v) for k, v in constants.items()})
    subject = bench.failed(proto, precision, [{"x": np.ones(size, np.float32), "which": np.array(True)}])
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert found.culprit is not None
    assert (found.culprit.tensor, found.culprit.is_constant) == ("places", True)
    held = (numbers * 0.5).astype(ml_dtypes.bfloat16 if precision == "bf16" else np.float16)
    assert f"{np.count_nonzero(held.astype(int) != numbers // 2):,} of the 5,000 numbers" in found.culprit.detail
    assert "constant 'places' comes out otherwise" in explain(found.to_dict()).splitlines()[0]


def test_a_list_of_every_node_is_no_advice(bench: Bench) -> None:
    """A check with nothing left in FP16 would be an error."""
    proto = chain([helper.make_node("Exp", ["x"], ["e"], "exp"), helper.make_node("Log", ["e"], ["y"], "log")])
    found = blamed(bench, failed(bench, proto, X - 30))
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("underflow", "exp", "e")
    assert found.keep_fp32 is None
    assert any("every node would have to stay in FP32" in note for note in found.notes)


def test_weights_that_are_computed_stay_in_fp32_with_what_reads_them(bench: Bench) -> None:
    """As PyTorch exports recurrent layers: rounded before the kept node saw them, they would spoil it all the same."""
    rng = np.random.default_rng(6)
    half = rng.standard_normal((16, 4)).astype(np.float32)
    proto = onnx_models.model(
        [
            helper.make_node("Concat", ["upper", "lower"], ["w"], "join", axis=0),
            helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
            helper.make_node("Sigmoid", ["h"], ["y"], "sigmoid"),
        ],
        {"x": (FLOAT, [3, 32])},
        {"y": (FLOAT, [3, 4])},
        {"upper": 1000 * half, "lower": -1000 * half * np.float32(1.0003)},
    )
    x = rng.standard_normal((3, 16)).astype(np.float16).astype(np.float32)
    subject = failed(bench, proto, np.concatenate([x, x], axis=1))
    found = blamed(bench, subject)
    assert found.keep_fp32 is not None
    assert {"join", "product"} <= set(found.keep_fp32)
    assert bench.error(subject, ["product"]) > 0.01


def test_a_list_with_which_nothing_is_compared_is_not_said_to_pass(bench: Bench) -> None:
    """What is zero throughout in FP32 tells nothing once it is zero in the lowered model as well."""
    nodes = [
        helper.make_node("Mul", ["x", "third"], ["scaled"], "scale"),
        helper.make_node("Equal", ["scaled", "wanted"], ["is_wanted"], "equal"),
        helper.make_node("Cast", ["is_wanted"], ["mask"], "mask", to=FLOAT),
        helper.make_node("Mul", ["x", "mask"], ["y"], "mul"),
    ]
    subject = bench.failed(chain(nodes, third=1 / 3, wanted=4096), "fp16", [{"x": np.full((3, 8), 12291, np.float32)}])
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert found.keep_fp32 is not None
    assert {"scale", "equal"} <= set(found.keep_fp32)
    text = explain(found.to_dict())
    assert "passes with" not in text
    assert "right with   no error, and nothing to compare: these inputs exercise nothing" in text
