"""The error along the graph, against outputs of plain sessions and numpy."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import diagnose, models, statistics, trace
from pytest_trtcheck.diagnose.partly_lowered import PartlyLowered
from pytest_trtcheck.model import graph
from pytest_trtcheck.precision.emulation import emulated_path, emulation
from pytest_trtcheck.precision.lowering import float_path, lower
from tests import onnx_models
from tests.diagnosed import FLOAT, Bench, all_tensors, conv_chain, image, overflowing_block, weight

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose import Subject
    from pytest_trtcheck.diagnose.models import Pair


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def paths(bench: Bench, subject: Subject) -> tuple[Path, Path]:
    return (
        float_path(subject.model, subject.lowered, subject.keep_fp32, bench.cache),
        emulated_path(subject.model, subject.lowered, subject.precision, bench.cache),
    )


def staged(bench: Bench, subject: Subject, name: str = "staged") -> Pair:
    folder = bench.folder / name
    folder.mkdir()
    return models.stage(*paths(bench, subject), subject.lowered.path, subject.model.path, folder)


def traced(bench: Bench, subject: Subject) -> dict[str, trace.Tensor]:
    pair = staged(bench, subject, f"staged{len(list(bench.folder.iterdir()))}")
    return {each.name: each for each in trace.trace(pair, subject.case)}


def l2(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16", "int8"])
def test_errors_are_those_of_whole_runs(bench: Bench, precision: Any) -> None:
    calibration = [image()] if precision == "int8" else None
    subject = bench.failed(conv_chain(4), precision, [image(batch=2)], calibration=calibration)
    found = traced(bench, subject)
    expected, actual = (all_tensors(path, subject.case) for path in paths(bench, subject))
    names = [name for name in expected if name in actual]
    assert {"c0", "x1", "c3", "x4", "pooled", "flat", "logits"} <= set(names)
    for name in names:
        assert found[name].error.l2 == pytest.approx(l2(actual[name], expected[name]), rel=1e-2, abs=2e-6), name
        peak = np.abs(expected[name]).max()
        largest = np.abs(actual[name] - expected[name]).max() / peak
        assert found[name].error.max == pytest.approx(largest, rel=2e-2, abs=2e-6), name
        assert found[name].error.peak == pytest.approx(peak, rel=1e-5)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_an_operators_own_error(bench: Bench, precision: Any, dtype: Any) -> None:
    """The Gemm alone, in numpy: rounded operands, products and sums in FP32, and the last product is not rounded."""
    proto = conv_chain(3)
    subject = bench.failed(proto, precision, [image(batch=40)])
    found = traced(bench, subject)
    flat = all_tensors(subject.model.path, subject.case)["flat"]
    exact = flat.astype(np.float64) @ weight(proto, "wg").astype(np.float64).T
    rounded = flat.astype(dtype).astype(np.float32) @ weight(proto, "wg").astype(dtype).astype(np.float32).T
    by_channel = [l2(rounded[:, index], exact[:, index]) for index in range(10)]
    own = max(l2(rounded, exact), float(np.sqrt(np.mean(np.square(by_channel)))))
    assert found["logits"].own == pytest.approx(own, rel=0.05)
    # What was handed down to it counts for its error, not for its own.
    before = all_tensors(subject.model.path, subject.case)["c0"]
    assert found["x1"].own == pytest.approx(l2(before.clip(0).astype(dtype), before.clip(0)), rel=0.02)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from pytest_trtcheck.precision.emulation import emulated_path, emulation
from pytest_trtcheck.precision.lowering import float_path, lower
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.diagnose import models, trace

folder = Path(sys.argv[1])
cache = Cache(folder / "cache")
model = open_model(str(folder / "model.onnx"), [], cache)
lowered = lower(model, "fp16", cache)
case = {"x": np.linspace(0, 1, 1 << 20, dtype=np.float32)}
emulation(model, lowered, "fp16", cache)(case)
(folder / "staged").mkdir()
pair = models.stage(
    float_path(model, lowered, (), cache),
    emulated_path(model, lowered, "fp16", cache),
    lowered.path, model.path, folder / "staged",
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(trace.trace(pair, case)) == 121
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_tensors_are_not_there_all_at_once(tmp_path: Path) -> None:
    """120 tensors of 4 MiB in three versions are 1.4 GiB."""
    nodes = [
        helper.make_node(
            "Sigmoid" if index % 2 else "Sin", ["x" if not index else f"t{index}"], [f"t{index + 1}"], f"n{index}"
        )
        for index in range(119)
    ]
    nodes.append(helper.make_node("Add", ["t119", "x"], ["y"], "last"))
    onnx_models.save(onnx_models.elementwise(nodes, 1 << 20), tmp_path / "model.onnx")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150


def test_weights_in_external_files(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_DATA_THRESHOLD", 0)
    proto = conv_chain(4, channels=64, extra=overflowing_block(1))
    path = bench.folder / "external.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    subject = bench.failed(path, "fp16", [image()])
    assert list(subject.lowered.path.parent.glob("*.data"))
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert found.culprit is not None
    assert found.culprit.tensor == "scaled_up"
    assert found.confirmed


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_model_whose_opset_is_raised(bench: Bench, precision: Any) -> None:
    """ReduceMean takes its axes as an attribute in one opset, as an input in a later one."""
    proto = onnx_models.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
            helper.make_node("ReduceSum", ["m"], ["s"], "sum", axes=[1], keepdims=1),
            helper.make_node("Div", ["m", "s"], ["y"], "divide"),
        ],
        {"x": (FLOAT, [4, 8])},
        {"y": (FLOAT, [4, 8])},
        {"w": np.abs(onnx_models.weights((8, 8), 1))},
        opset=12,
    )
    case = {"x": np.random.default_rng(0).random((4, 8)).astype(np.float32)}
    calibration = [case] if precision == "int8" else None
    subject = bench.failed(proto, precision, [case], tol=1e-5, calibration=calibration)
    found = traced(bench, subject)
    assert {"m", "s", "y"} <= found.keys()
    blame = diagnose(subject, bench.cache)
    assert blame is not None
    assert not any("could not be traced" in note for note in blame.notes)


def test_a_decision_that_flips_is_counted(bench: Bench) -> None:
    """Integers and booleans have no relative error; the share that differs stands for it."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"], "scale_it"),
        helper.make_node("Greater", ["scaled", "limit"], ["above"], "compare"),
        helper.make_node("Cast", ["above"], ["chosen"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["chosen", "x"], ["y"], "choose"),
    ]
    proto = onnx_models.elementwise(
        nodes, 64, {"scale": np.full(1, 1.0003, np.float32), "limit": np.ones(1, np.float32)}
    )
    x = np.linspace(0.9985, 1.0015, 64, dtype=np.float32)
    subject = bench.failed(proto, "fp16", [{"x": x}])
    found = traced(bench, subject)
    half = (x.astype(np.float16) * np.float16(1.0003)).astype(np.float32) > 1
    exact = x * np.float32(1.0003) > 1
    assert found["above"].error.unequal == np.count_nonzero(half != exact) > 0
    assert found["above"].error.max == np.mean(half != exact)


# --- some operators lowered ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_switches_are_what_keep_fp32_does(bench: Bench, precision: Any) -> None:
    calibration = [image()] if precision == "int8" else None
    subject = bench.failed(conv_chain(5), precision, [image()], calibration=calibration)
    pair = staged(bench, subject)
    nodes = [node.name for node in pair.reference.nodes]
    partly_lowered = PartlyLowered(pair, nodes)
    expected = subject.reference(subject.case)["logits"]
    assert l2(partly_lowered(subject.case, [])["logits"], expected) < 1e-6
    for kept in ([], ["conv1"], ["conv0", "conv3", "gemm"], ["conv2", "relu2", "conv3"]):
        lowered = lower(subject.model, precision, bench.cache, keep_fp32=tuple(kept), calibration=calibration)
        runner = emulation(subject.model, lowered, precision, bench.cache)
        actual = partly_lowered(subject.case, [name for name in nodes if name not in kept])["logits"]
        error = l2(runner(subject.case)["logits"], expected)
        assert l2(actual, expected) == pytest.approx(error, rel=0.05), kept
        runner.close()
    partly_lowered.close()


# --- statistics ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), size=st.sampled_from([0, 1, 7, 65_536, 65_537, 200_000]), bad=st.booleans())
def test_differences_are_numpys(seed: int, size: int, bad: bool) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(size).astype(np.float32)
    actual = reference + (1e-3 * rng.standard_normal(size)).astype(np.float32)
    if bad and size > 1:
        actual[0], actual[1], reference[1] = np.inf, np.nan, np.nan
    found = statistics.difference(actual, reference)
    finite = np.isfinite(actual) & np.isfinite(reference)
    d, r = (actual.astype(np.float64) - reference)[finite], reference[finite].astype(np.float64)
    assert found.size == size
    assert found.nonfinite == int(bad and size > 1)
    assert found.dd == pytest.approx(float(d @ d), rel=1e-9)
    assert found.rr == pytest.approx(float(r @ r), rel=1e-9)
    assert found.largest == np.abs(d).max(initial=0.0)
    assert found.peak == np.abs(reference[np.isfinite(reference)]).max(initial=0.0)
    if bad and size > 1:
        assert found.max == found.l2 == math.inf
        assert found.snr_db == -math.inf


def one_tensor(bench: Bench, x: NDArray[np.float32]) -> trace.Tensor:
    """What is found of a tensor with these values."""
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["t"], "copy"),
        helper.make_node("Mul", ["t", "one"], ["y"], "copy_again"),
    ]
    proto = onnx_models.elementwise(nodes, x.size, {"one": np.ones(1, np.float32)})
    return traced(bench, bench.failed(proto, "fp16", [{"x": x}]))["t"]


def test_fp16_limits(bench: Bench) -> None:
    x = np.array([65504, 65519, 65520, -7e4, 2.0**-24, 2.0**-25, 2.0**-14, 6e-5, 0, 1], np.float32)
    found = one_tensor(bench, x).fit
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    assert found.overflow == np.count_nonzero(np.isinf(half)) == 2
    tiny = np.count_nonzero((np.abs(x) < np.finfo(np.float16).smallest_normal) & (x != 0))
    assert found.underflow == pytest.approx(tiny / 9)
    assert found.flushed == pytest.approx(np.count_nonzero((half == 0) & (x != 0)) / 9)


def test_shares_of_a_large_tensor_are_estimated(bench: Bench) -> None:
    x = (10.0 ** np.random.default_rng(0).uniform(-9, 6, 500_000)).astype(np.float32)
    found = one_tensor(bench, x).fit
    assert found.underflow == pytest.approx(np.mean(x < 2.0**-14), abs=0.03)
    assert found.flushed == pytest.approx(np.mean(x <= 2.0**-25), abs=0.03)
    assert found.overflow == pytest.approx(np.count_nonzero(x >= 65520), rel=0.1)


def test_a_single_overflow_in_a_large_tensor_is_seen(bench: Bench) -> None:
    x = np.ones(500_000, np.float32)
    x[123_457] = 1e6
    assert one_tensor(bench, x).fit.overflow >= 1


@pytest.mark.parametrize("value", [-np.inf, -3e38, np.nan])
def test_a_mask_of_extremes_is_measured_without_it(bench: Bench, value: float) -> None:
    """Squares of −3e38 are too large for FP32; −inf is −inf in both; NaN is NaN in both."""
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    x[::10] = value
    found = one_tensor(bench, x)
    finite = np.isfinite(x.astype(np.float64)) & (np.abs(x) < 1e30)
    if np.isfinite(value):
        assert found.error.l2 == math.inf
        assert found.error.nonfinite == 100
        assert found.error.peak == pytest.approx(3e38)
    else:
        half = x[finite].astype(np.float16).astype(np.float64)
        assert found.error.l2 == pytest.approx(l2(half, x[finite]), rel=1e-3)
        assert found.error.nonfinite == 0
        assert found.error.peak == np.abs(x[finite]).max()


def test_saturation_is_what_the_quantizer_clips(bench: Bench) -> None:
    calibration = [image(low=-0.5, high=0.5)]
    subject = bench.failed(conv_chain(2), "int8", [image()], calibration=calibration)
    steps = np.rint(subject.case["image"].astype(np.float64) / (subject.ranges().tensors["image"].amax / 127))
    found = traced(bench, subject)["image"].fit
    assert found.saturated == pytest.approx(np.mean((steps > 127) | (steps < -128)), abs=2e-3)
    assert found.underflow == pytest.approx(np.mean(steps == 0), abs=2e-3)


def test_a_small_channel_counts_as_much_as_a_large_one() -> None:
    reference = np.random.default_rng(0).standard_normal((2, 4, 10, 10)).astype(np.float32)
    reference[:, 0] *= 1000
    actual = reference.copy()
    actual[:, 1:] = 0
    assert statistics.difference(actual, reference).l2 < 2e-3
    assert trace.channel_loss(actual, reference, 1) == pytest.approx(math.sqrt(3 / 4))
    assert trace.channel_loss(np.moveaxis(actual, 1, -1), np.moveaxis(reference, 1, -1), -1) == pytest.approx(
        math.sqrt(3 / 4)
    )
    # One element a channel says nothing.
    assert trace.channel_loss(actual[:1, :, 0, 0], reference[:1, :, 0, 0], 1) == 0.0
