"""Ranges from calibration data: against numpy on the same tensors, in bounded memory, and no NaN slips through."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.errors import ArgumentError, CalibrationError
from pytest_trtcheck.model import graph
from pytest_trtcheck.precision.quantization.calibrate import Ranges, collect
from pytest_trtcheck.precision.quantization.histogram import MagnitudeHistogram, entropy_bins, percentile_bins
from pytest_trtcheck.precision.quantization.plan import QuantizationPlan, points

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import RangeMethod
    from pytest_trtcheck.spec import InputMapping


class OrtRunner:
    """ONNX Runtime, with a note of what left it."""

    made: list[OrtRunner]

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.path = path
        self.closed = False
        self.output_bytes: list[int] = []
        type(self).made.append(self)

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        results = dict(zip(self.names, self.session.run(self.names, dict(inputs)), strict=True))
        self.output_bytes.append(sum(result.nbytes for result in results.values()))
        return results

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def runners() -> list[OrtRunner]:
    OrtRunner.made = []
    return OrtRunner.made


def chain(path: Path, layers: int = 3, size: int = 8, opset: int = 17) -> Path:
    """x → (Gemm → Relu) × layers, of which the last tensor, y, is not read by a quantized node."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer in range(layers):
        weights.append(numpy_helper.from_array(rng.normal(size=(size, size)).astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("Gemm", [value, f"w{layer}"], [f"g{layer}"], name=f"gemm{layer}"))
        value = "y" if layer == layers - 1 else f"r{layer}"
        nodes.append(helper.make_node("Relu", [f"g{layer}"], [value], name=f"relu{layer}"))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size])]
    model = helper.make_model(
        helper.make_graph(nodes, "chain", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


def activations(path: Path, samples: list[dict[str, NDArray[np.float32]]]) -> dict[str, NDArray[np.float32]]:
    """Every tensor of the chain over all samples, flat, computed by numpy."""
    weights = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    found: dict[str, list[NDArray[np.float32]]] = {}
    for sample in samples:
        value = sample["x"]
        found.setdefault("x", []).append(value.ravel())
        for layer in range(len(weights)):
            value = np.maximum(value @ weights[f"w{layer}"], 0)
            found.setdefault(f"r{layer}", []).append(value.ravel())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def draw(*rows: int, size: int = 8) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(count, size)).astype(np.float32)} for count in rows]


def plan_of(path: Path) -> QuantizationPlan:
    return points(graph.read(path))


def test_minmax_is_what_numpy_finds(tmp_path: Path, runners: list[OrtRunner]) -> None:
    path, samples = chain(tmp_path / "m.onnx"), draw(4, 1, 9)
    ranges = collect(OrtRunner, path, plan_of(path), samples)
    expected = activations(path, samples)
    assert list(ranges.tensors) == ["x", "r0", "r1"]
    for name, found in ranges.tensors.items():
        assert found.min == pytest.approx(expected[name].min(), rel=1e-5)
        assert found.max == pytest.approx(expected[name].max(), rel=1e-5)
        assert found.amax == max(abs(found.min), abs(found.max))
        assert found.beyond == 0
    assert (ranges.method, ranges.percentile, ranges.samples) == ("minmax", None, 3)
    assert [runner.closed for runner in runners] == [True], "one pass, closed"
    assert not runners[0].path.exists(), "nothing is left behind"


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_minmax_in_every_opset(tmp_path: Path, opset: int) -> None:
    path = chain(tmp_path / "m.onnx", opset=opset)
    ranges = collect(OrtRunner, path, plan_of(path), draw(4))
    assert ranges.tensors["x"].max == pytest.approx(float(draw(4)[0]["x"].max()))


@pytest.mark.parametrize("percentile", [50.0, 99.0, 100.0])
def test_percentile_holds_that_share_of_the_elements(tmp_path: Path, percentile: float) -> None:
    path, samples = chain(tmp_path / "m.onnx"), draw(400, 300, 300)
    ranges = collect(OrtRunner, path, plan_of(path), samples, method="percentile", percentile=percentile)
    expected = activations(path, samples)
    for name, found in ranges.tensors.items():
        magnitudes = np.abs(expected[name])
        wanted = np.percentile(magnitudes, percentile, method="inverted_cdf")
        bin_width = magnitudes.max() / (1 << 16)
        assert wanted * (1 - 1e-5) <= found.amax <= wanted + 1.01 * bin_width
        assert found.beyond == pytest.approx((magnitudes > found.amax * (1 + 1e-6)).mean(), abs=2e-4)
        assert found.beyond <= 1 - percentile / 100 + 1e-9


def test_entropy_clips_an_outlier_that_minmax_keeps(tmp_path: Path) -> None:
    path, samples = chain(tmp_path / "m.onnx"), draw(4000, 4000)
    samples[1]["x"][0, 0] = 1000
    plan = plan_of(path)
    entropy = collect(OrtRunner, path, plan, samples, method="entropy").tensors["x"]
    minmax = collect(OrtRunner, path, plan, samples).tensors["x"]
    assert minmax.amax == 1000
    # 128 bins of the 2048 are the least that entropy may keep: that is 62.5 here.
    assert entropy.amax < 100
    assert entropy.beyond == pytest.approx(1 / 64000)
    assert (entropy.min, entropy.max) == (minmax.min, minmax.max)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_memory_is_bounded_by_more_passes(tmp_path: Path, runners: list[OrtRunner], method: RangeMethod) -> None:
    path, samples = chain(tmp_path / "m.onnx", layers=6, size=256), draw(64, 128, size=256)
    plan = plan_of(path)
    at_once = collect(OrtRunner, path, plan, samples, method=method)
    assert len(runners) == 2
    tensor = 128 * 256 * 4
    histogram = 8 << 16
    runners.clear()
    limit = 2 * (tensor + histogram)
    split = collect(OrtRunner, path, plan, samples, method=method, max_bytes=limit)
    assert split == at_once
    assert len(runners) == 1 + 3
    assert max(max(runner.output_bytes) for runner in runners) <= 2 * tensor
    assert all(runner.closed for runner in runners)
    runners.clear()
    assert collect(OrtRunner, path, plan, samples, method=method, max_bytes=1) == at_once
    assert len(runners) == 1 + 6, "a tensor above the limit goes alone"


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_is_named(tmp_path: Path, method: RangeMethod, bad: float) -> None:
    path, samples = chain(tmp_path / "m.onnx"), draw(400, 400)
    # In the middle, where ONNX Runtime's ReduceMax overlooks a NaN.
    samples[1]["x"][200, 3] = bad
    with pytest.raises(CalibrationError, match=r"night\.npz 1: tensor 'x' \(read by gemm0\) holds NaN or infinity"):
        collect(OrtRunner, path, plan_of(path), samples, method=method, describe="night.npz {}".format)


def test_an_inner_overflow_is_named_where_it_begins(tmp_path: Path) -> None:
    path, samples = chain(tmp_path / "m.onnx"), draw(4)
    samples[0]["x"][:] = 3e38
    with pytest.raises(CalibrationError, match=r"sample 0: tensor 'r0' \(read by gemm1\)"):
        collect(OrtRunner, path, plan_of(path), samples)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_a_tensor_that_is_always_zero_has_the_range_zero(tmp_path: Path, method: RangeMethod) -> None:
    path = chain(tmp_path / "m.onnx")
    ranges = collect(OrtRunner, path, plan_of(path), [{"x": np.zeros((2, 8), np.float32)}], method=method)
    assert set(ranges.amax().values()) == {0.0}


def test_samples_must_be_there_and_come_again(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx")
    plan = plan_of(path)
    with pytest.raises(CalibrationError, match="no samples"):
        collect(OrtRunner, path, plan, [])
    with pytest.raises(CalibrationError, match="2 samples in the first pass and 0 in a later one"):
        collect(OrtRunner, path, plan, iter(draw(1, 1)), method="entropy")
    with pytest.raises(CalibrationError, match=r"'x' .*was empty for all 1"):
        collect(OrtRunner, path, plan, draw(0))
    with pytest.raises(ArgumentError, match="percentile=0"):
        collect(OrtRunner, path, plan, draw(1), method="percentile", percentile=0)
    with pytest.raises(ArgumentError, match="method='kl': expected one of"):
        collect(OrtRunner, path, plan, draw(1), method="kl")  # type: ignore[arg-type]


def test_ranges_survive_json(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx")
    ranges = collect(OrtRunner, path, plan_of(path), draw(50), method="percentile", percentile=97.5)
    assert Ranges.from_json(json.loads(ranges.to_json())) == ranges


def test_weights_outside_the_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chain(tmp_path / "m.onnx", size=64)
    inside = collect(OrtRunner, path, plan_of(path), draw(9, size=64), method="entropy")
    onnx.save(onnx.load(path), tmp_path / "e.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    path.unlink()
    # A model of 1 GiB is handled like this one when the limit is low.
    monkeypatch.setattr(graph, "EXTERNAL_DATA_THRESHOLD", 0)
    outside = tmp_path / "e.onnx"
    assert collect(OrtRunner, outside, plan_of(outside), draw(9, size=64), method="entropy") == inside


# --- histograms ------------------------------------------------------------------------------------------------------


def slow_entropy_bins(counts: NDArray[np.int64]) -> int:
    """The textbook procedure, one level at a time."""
    bins = counts.astype(float)
    bins[0] = bins[1]
    best, least = len(bins), np.inf
    for size in range(128, len(bins) + 1):
        p = bins[:size].copy()
        p[-1] += bins[size:].sum()
        q = np.zeros(size)
        level = np.arange(size) * 128 // size
        for each in range(128):
            members = (level == each) & (bins[:size] > 0)
            if members.any():
                q[members] = bins[:size][members].sum() / members.sum()
        q[(p > 0) & (q == 0)] = 1e-4
        p, q = p / p.sum(), q / q.sum()
        divergence = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
        if divergence <= least + 1e-14:
            best, least = size, divergence
    return best


@pytest.mark.parametrize("name", ["relu", "student"])
def test_entropy_is_the_textbook_procedure(name: str) -> None:
    rng = np.random.default_rng(3)
    data = np.maximum(rng.normal(size=20000), 0) if name == "relu" else rng.standard_t(3, size=20000)
    histogram = MagnitudeHistogram(float(np.abs(data).max()), 512)
    histogram.add(data)
    assert 128 < entropy_bins(histogram) == slow_entropy_bins(histogram.counts)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40).filter(any),
    st.floats(0.1, 100),
    st.sampled_from([128, 2048]),
)
def test_a_percentile_keeps_enough_and_no_bin_too_many(values: list[float], percentile: float, bins: int) -> None:
    data = np.array(values, np.float32)
    histogram = MagnitudeHistogram(float(np.abs(data).max()), bins)
    for part in np.array_split(data, 3):
        histogram.add(part)
    assert histogram.counts.sum() == data.size
    kept = percentile_bins(histogram, percentile)
    assert histogram.counts[:kept].sum() >= data.size * percentile / 100 * (1 - 1e-12)
    assert kept == 1 or histogram.counts[: kept - 1].sum() < data.size * percentile / 100
    assert histogram.edge(bins) == histogram.amax
    assert histogram.share_beyond(bins) == 0
