"""`Calibration(method="auto")`: what it chooses where one method is planted to be bad, and that it says so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.model import graph
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.quantization import choosing
from pytest_trtcheck.precision.quantization.calibrate import Ranges, Task, collect
from pytest_trtcheck.precision.quantization.histogram import MagnitudeHistogram, levels, mse_bins
from pytest_trtcheck.precision.quantization.plan import points
from pytest_trtcheck.spec import Calibration
from tests.onnx_models import FLOAT, model, save, weights
from tests.test_report_json import validate

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import QuantizedName
    from tests.conftest import Suite

    Sample = dict[str, NDArray[Any]]


class OrtRunner:
    """ONNX Runtime, with a note of what was fed."""

    runs: list[Sample]

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs: Any) -> dict[str, NDArray[Any]]:
        type(self).runs.append(dict(inputs))
        return dict(zip(self.names, self.session.run(self.names, dict(inputs)), strict=True))

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def runs() -> list[Sample]:
    OrtRunner.runs = []
    return OrtRunner.runs


def net(*more: onnx.NodeProto, outputs: dict[str, tuple[int, list[int | str]]] | None = None) -> onnx.ModelProto:
    """Two Gemms, x [n, 8] → y [n, 4]; the eighth feature counts for nothing."""
    first = weights((8, 8), 1)
    first[7] = 0
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["g1"], name="gemm1"),
        helper.make_node("Relu", ["g1"], ["r1"], name="relu1"),
        helper.make_node("Gemm", ["r1", "w2"], ["y"], name="gemm2"),
        *more,
    ]
    values = {"w1": first, "w2": weights((8, 4), 2)}
    return model(nodes, {"x": (FLOAT, ["n", 8])}, outputs or {"y": (FLOAT, ["n", 4])}, values)


def draw(count: int, rows: int = 64) -> list[Sample]:
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal((rows, 8)).astype(np.float32)} for _ in range(count)]


def choose(proto: onnx.ModelProto, samples: Any, folder: Path, dtype: QuantizedName = "int8") -> Ranges:
    path = save(proto, folder / "m.onnx")
    task = Task(OrtRunner, path, points(graph.read(path)), samples, dtype)
    return choosing.choose(task, open_model(path, [], Cache(folder / "cache")))


def with_outliers_that_count_for_nothing(rows: int) -> list[Sample]:
    samples = draw(8, rows)
    for sample in samples:
        sample["x"][0, 7] = 1000
    return samples


def test_where_outliers_ruin_minmax_a_percentile_is_chosen(tmp_path: Path) -> None:
    # One in 8,192 values is an outlier: a percentile of 99.9 clips it, the least squared error does not.
    found = choose(net(), with_outliers_that_count_for_nothing(rows=1024), tmp_path)
    assert (found.method, found.percentile) == ("percentile", 99.9)
    assert found.choice is not None
    errors = {method: each["y"] for method, each in found.choice.errors.items()}
    assert set(errors) == {"minmax", "mse", "percentile 99.999", "percentile 99.99", "percentile 99.9"}
    assert min(errors, key=lambda each: errors[each] or 0) == "percentile 99.9"
    assert (errors["minmax"] or 0) > 20 * (errors["percentile 99.9"] or 1)
    assert found.amax()["x"] < 5
    # One in 512: all methods keep it.
    assert choose(net(), with_outliers_that_count_for_nothing(rows=64), tmp_path).method == "minmax"


def test_where_rare_values_carry_the_signal_minmax_is_chosen(tmp_path: Path) -> None:
    samples = draw(4, 25_600)
    for sample in samples:
        # One in 200,000: beyond every percentile, and most of the output's energy.
        sample["x"][7, 0] = 1e4
    found = choose(net(), samples, tmp_path)
    assert found.method == "minmax"
    assert found.choice is not None
    errors = {method: each["y"] or 0 for method, each in found.choice.errors.items()}
    assert errors["minmax"] < 0.1
    assert min(error for method, error in errors.items() if method.startswith("percentile")) > 0.9


@pytest.mark.parametrize(("least", "chosen"), [(0.12, "mse"), (0.119, "percentile 99.9")])
def test_the_method_with_the_least_error_is_taken_and_of_equal_ones_what_clips_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, chosen: str
) -> None:
    values = (0.13, 0.12, 0.15, 0.15, least)
    errors = {method: {"y": error} for method, error in zip(choosing.METHODS, values, strict=True)}
    monkeypatch.setattr(choosing, "_errors", lambda *_: errors)
    assert f"ranges by {chosen} from" in str(choose(net(), draw(4), tmp_path))


def test_ranges_are_those_of_the_method_from_all_samples(tmp_path: Path) -> None:
    path = save(net(), tmp_path / "m.onnx")
    samples = draw(11)
    found = choose(net(), samples, tmp_path)
    alone = collect(
        OrtRunner, path, points(graph.read(path)), samples, method=found.method, percentile=found.percentile or 99.99
    )
    assert (found.tensors, found.samples) == (alone.tensors, 11)
    assert Ranges.from_json(json.loads(found.to_json())) == found
    assert choose(net(), samples, tmp_path) == found, "the same data, the same choice"


def test_a_sample_is_judged_by_ranges_that_did_not_see_it(tmp_path: Path, runs: list[Sample]) -> None:
    samples = draw(2)
    samples[1]["x"] *= 100
    choose(net(), samples, tmp_path)
    judged = [run for run in runs if len(run) > 1]
    assert len(judged) == 2 * len(choosing.METHODS)
    peaks = [float(np.abs(sample["x"]).max()) for sample in samples]
    for run in judged:
        mine = 0 if (run["x"] == samples[0]["x"]).all() else 1
        assert run["x_scale"] * 127 <= peaks[1 - mine] * 1.001
        assert run["x_scale"] * 127 >= peaks[1 - mine] * 0.3


def test_the_cost_is_bounded(tmp_path: Path, runs: list[Sample]) -> None:
    found = choose(net(), draw(50), tmp_path)
    assert found.choice is not None
    assert found.choice.held_out == choosing.MOST_HELD_OUT
    # Two passes, as for a percentile, and what is judged.
    assert len(runs) == 2 * 50 + choosing.MOST_HELD_OUT * (1 + len(choosing.METHODS))


def test_of_a_single_sample_nothing_is_held_out(tmp_path: Path) -> None:
    found = choose(net(), draw(1), tmp_path)
    assert (found.method, found.samples) == ("minmax", 1)
    assert found.choice is not None
    assert (found.choice.held_out, found.choice.errors) == (0, {})
    assert str(found) == (
        "ranges by minmax from 1 sample, of which none could be held out to choose a method by: give more"
    )


def test_rows_are_counted_where_samples_are_batches(tmp_path: Path) -> None:
    """An .npy of 100 rows for a model whose batch is open is fed at once; stacked, it is 100 samples."""
    cache = Cache(tmp_path / "cache")
    opened = open_model(save(net(), tmp_path / "m.onnx"), [], cache)
    rows = np.concatenate([next(iter(each.values())) for each in draw(4)])
    lowered = lower(opened, "int8", cache, calibration=Calibration(rows, "auto"))
    found = lowered.details["ranges"]
    assert (found["samples"], found["rows"]) == (1, len(rows))
    assert f"from 1 sample ({len(rows)} rows), of which none could be held out" in lowered.notes[0]
    assert lowered.notes[0].endswith("give more, or its rows apart, with one dimension more in front")
    apart = lower(opened, "int8", cache, calibration=Calibration(rows[:, None], "minmax"))
    assert (apart.details["ranges"]["samples"], apart.details["ranges"]["rows"]) == (len(rows), None)
    assert apart.details["ranges"]["tensors"]["x"] == found["tensors"]["x"]


def test_outputs_that_are_integers_count_by_how_many_differ(tmp_path: Path) -> None:
    argmax = helper.make_node("ArgMax", ["y"], ["label"], name="argmax", axis=1)
    samples = with_outliers_that_count_for_nothing(rows=1024)
    found = choose(net(argmax, outputs={"label": (onnx.TensorProto.INT64, ["n", 1])}), samples, tmp_path)
    assert (found.method, found.percentile) == ("percentile", 99.9)
    assert found.choice is not None
    assert (
        0 < (found.choice.errors["percentile 99.9"]["label"] or 0) < (found.choice.errors["minmax"]["label"] or 0) < 1
    )


@pytest.mark.parametrize("output", ["nan", "zero"])
def test_outputs_that_tell_nothing_choose_nothing(tmp_path: Path, output: str) -> None:
    """Outputs that are NaN, or 0, throughout."""
    nodes = [
        helper.make_node("Constant", [], ["low"], name="low", value_float=-1.0),
        helper.make_node("Constant", [], ["none"], name="none", value_float=0.0),
        helper.make_node("Clip", ["y", "none", "none"], ["zero"], name="clip"),
        helper.make_node("Add", ["zero", "low"], ["below"], name="add"),
        helper.make_node("Log", ["below"], ["nan"], name="log"),
    ]
    found = choose(net(*nodes, outputs={output: (FLOAT, ["n", 4])}), draw(4), tmp_path)
    assert found.method == "minmax"
    assert found.choice is not None
    if output == "nan":
        assert str(found).endswith("the outputs of which tell nothing to choose a method by")


def test_an_output_that_is_not_finite_by_one_method_is_not_chosen(tmp_path: Path) -> None:
    """1 / y is infinite where minmax rounds the activations away."""
    nodes = [helper.make_node("Reciprocal", ["y"], ["out"], name="reciprocal")]
    samples = with_outliers_that_count_for_nothing(rows=1024)
    found = choose(net(*nodes, outputs={"out": (FLOAT, ["n", 4])}), samples, tmp_path)
    assert found.choice is not None
    assert found.choice.errors["minmax"]["out"] is None
    assert found.method == "percentile"
    assert Ranges.from_json(json.loads(found.to_json())) == found


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_note_and_the_record_say_what_was_chosen(tmp_path: Path, precision: QuantizedName) -> None:
    cache = Cache(tmp_path / "cache")
    opened = open_model(save(net(), tmp_path / "m.onnx"), [], cache)
    lowered = lower(opened, precision, cache, calibration=Calibration(draw(6), "auto"))
    chosen = lowered.details["ranges"]
    assert chosen["choice"]["held_out"] == 6
    assert len(chosen["choice"]["errors"]) == len(choosing.METHODS)
    rows = sum(len(each["x"]) for each in draw(6))
    said = f"from 6 samples ({rows} rows), chosen of {len(choosing.METHODS)} methods by the error on held-out"
    assert said in lowered.notes[0]
    assert f"ranges by {chosen['method']}" in lowered.notes[0]
    again = lower(opened, precision, cache, calibration=Calibration(draw(6), "auto"))
    assert again == lowered
    other = lower(opened, precision, cache, calibration=Calibration(draw(7), "auto"))
    assert other.key != lowered.key
    assert lower(opened, precision, cache, calibration=Calibration(draw(6), "minmax")).key != lowered.key


def test_each_precision_and_each_set_of_nodes_chooses_for_itself(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    opened = open_model(save(net(), tmp_path / "m.onnx"), [], cache)
    cases: tuple[tuple[QuantizedName, tuple[str, ...]], ...] = (("int8", ()), ("fp8", ()), ("int8", ("gemm1",)))
    found: list[Any] = [
        lower(opened, precision, cache, keep_fp32=kept, calibration=Calibration(draw(6), "auto")).details["ranges"]
        for precision, kept in cases
    ]
    errors = [str(each["choice"]["errors"]) for each in found]
    assert len(set(errors)) == 3


SUITE = """
import numpy as np

def samples(count):
    rng = np.random.default_rng(3)
    return [{"image": rng.random((1, 3, 16, 16), np.float32)} for _ in range(count)]

@trt_parity("conv.onnx", precision="int8", calibration=samples(5), tol=1.0, batch=1)
def test_chosen(): ...

@trt_parity("conv.onnx", precision="int8", calibration=samples(1), tol=1.0, batch=1)
def test_single(): ...

@trt_parity("conv.onnx", precision="int8", calibration=Calibration(samples(5), "minmax"), tol=1.0, batch=1)
def test_named(): ...

@trt_parity("conv.onnx", precision="int8", calibration=np.ones((5, 3, 16, 16), np.float32), tol=1.0, batch=1)
def test_batch(): ...

@trt_parity("conv.onnx", precision="fp16", batch=1)
def test_nothing_calibrated(): ...
"""


def test_the_report_says_what_each_method_was_worth(suite: Suite) -> None:
    suite.write(test_choice="from pytest_trtcheck import Calibration\n" + SUITE)
    run = suite.run()
    found: dict[str, Any] = {check["nodeid"].split("::")[-1]: check.get("calibration") for check in run.checks}
    assert found["test_nothing_calibrated"] is None
    method = {"method": "minmax", "percentile": None}
    assert found["test_named"].items() >= {**method, "samples": 5}.items()
    assert "held_out" not in found["test_named"]
    assert found["test_single"].items() >= {**method, "samples": 1, "held_out": 0, "errors": {}}.items()
    assert (found["test_batch"]["samples"], found["test_batch"]["rows"]) == (1, 5)
    chosen = found["test_chosen"]
    assert "rows" not in chosen
    assert (chosen["samples"], chosen["held_out"]) == (5, 5)
    worst = {method: max(each.values()) for method, each in chosen["errors"].items()}
    name = chosen["method"] + (f" {chosen['percentile']:g}" if chosen["percentile"] else "")
    assert worst[name] == min(worst.values())
    validate(run.report)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["relu", "student", "outlier"])
def test_mse_is_the_least_squared_error(dtype: QuantizedName, name: str) -> None:
    rng = np.random.default_rng(3)
    data = rng.standard_t(3, size=4_000) if name == "student" else np.maximum(rng.normal(size=4_000), 0)
    if name == "outlier":
        data[0] = 30
    histogram = MagnitudeHistogram(float(np.abs(data).max()), 1 << 14)
    histogram.add(data)
    held = levels(dtype)

    def error(threshold: float) -> float:
        grid = held * threshold
        nearest = np.abs(np.abs(data)[:, None] - grid).min(1)
        return float((nearest**2).sum())

    tried = [error(histogram.edge(kept)) for kept in np.geomspace(256, 1 << 14, 50).astype(int)]
    assert error(histogram.edge(mse_bins(histogram, held))) <= 1.02 * min(tried)
    assert (held[0], held.max()) == (0, 1)
    assert len(held) == {"int8": 128, "fp8": 127}[dtype]
