"""An engine's layers: what the inspector tells of them, what the profiler says they take, and that it is recorded."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.backends.tensorrt.layers import described, timed
from pytest_trtcheck.check import latency
from pytest_trtcheck.check.steps import judged
from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.record import CheckRecord, EngineRecord, LatencyRecord, LayerRecord, jsonable
from tests import onnx_models
from tests.test_guards import OnCpu, OnGpu, StandIn, X, check
from tests.test_guards import on_gpu as on_gpu  # noqa: PLC0414 - a fixture
from tests.test_report_json import validate
from tests.test_tensorrt_io import layer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from pytest_trtcheck.backends.base import Backend, Built, Runner
    from pytest_trtcheck.check.request import Request

Runs = list[list[tuple[str, float]]]


def information(*layers: Any) -> str:
    return json.dumps({"Layers": layers})


# --- the inspector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["\x1e", "\x1f", ""])
def test_the_onnx_nodes_of_a_layer_stand_in_its_metadata(between: str) -> None:
    metadata = between.join(f"[ONNX Layer: {name}]" for name in ("/a/Conv", "scale[0]", "/a/Conv", "Cast_1"))
    one = layer(None, inputs=("Half",), Metadata=metadata, LayerType="kgen")
    (found,) = described(information(one))
    assert found == LayerRecord("layer", "kgen", "fp16", ("/a/Conv", "scale[0]"), ("Cast_1",))
    (found,) = described(information(one), {"/a/Conv", "scale[0]"})
    assert (found.nodes, found.moves) == (("/a/Conv", "scale[0]"), ("Cast_1",))


def test_what_a_node_does_is_read_from_its_name_where_nothing_else_tells() -> None:
    converting = ("/q/QuantizeLinear_1", "w_DequantizeLinear", "Cast", "/a/Cast_12")
    computing = ("/quantized/Conv", "Broadcast", "CastLess/MatMul", "Cast_me")
    metadata = "\x1e".join(f"[ONNX Layer: {name}]" for name in (*converting, *computing))
    (found,) = described(information(layer(None, inputs=("Half",), Metadata=metadata)))
    assert (found.nodes, found.moves) == (computing, converting)


def test_an_older_release_has_the_nodes_in_the_name_alone() -> None:
    one = {**layer(None, inputs=("Int8",)), "Name": "w + QuantizeLinear_7 + Conv_9 + PWN(Clip_13)"}
    (found,) = described(information(one), {"Conv_9", "Clip_13", "Conv_1"})
    assert found.nodes == ("Conv_9", "Clip_13")
    (unknown,) = described(information(one))
    assert unknown.nodes == (), "which words are nodes is not known without the model"


def test_an_engine_of_little_verbosity_tells_names_alone() -> None:
    assert described(information("conv1", {"Name": "conv2"})) == (
        LayerRecord("conv1", precision="unknown"),
        LayerRecord("conv2", precision="unknown"),
    )
    assert described("") == ()


# --- the profiler ----------------------------------------------------------------------------------------------------


def test_a_layer_takes_the_median_of_its_runs_with_bounds() -> None:
    runs: Runs = [[("a", 0.1 + 0.001 * n), ("b", 0.2), ("b", 0.3), ("c", 0.01)] for n in range(51)]
    found = timed([LayerRecord("a"), LayerRecord("b"), LayerRecord("b"), LayerRecord("never timed")], runs)
    assert [each.name for each in found] == ["a", "b", "b", "never timed", "c"]
    assert found[0].time_ms == pytest.approx(0.125)
    assert found[0].bounds_ms is not None
    assert found[0].bounds_ms[0] < 0.125 < found[0].bounds_ms[1]
    assert found[1].time_ms == pytest.approx(0.5), "layers of one name are one to the profiler"
    assert (found[2].time_ms, found[3].time_ms) == (None, None)
    assert found[4] == LayerRecord("c", time_ms=0.01, bounds_ms=(0.01, 0.01)), "one that the profiler alone names"


# --- the record ------------------------------------------------------------------------------------------------------


@dataclass
class Layered(OnCpu):
    """An engine of two layers, whose profiler answers what it is told to."""

    told: Callable[[], Runs] = list

    def layer_records(self, computing: Collection[str] | None) -> tuple[LayerRecord, ...]:
        assert computing is not None
        nodes = [f"[ONNX Layer: {name}]" for name in sorted(computing)]
        half = layer(None, inputs=("Half",), Metadata="\x1e".join(nodes))
        cast = {**layer(None, inputs=("Float",), Metadata="[ONNX Layer: x_cast]"), "Name": "cast"}
        return described(information(half, cast), computing)

    def layer_times(self, inputs: Any) -> Runs:
        del inputs
        return self.told()


@dataclass(frozen=True)
class LayeredSystem(StandIn):
    told: Callable[[], Runs] = list

    def load(self, built: Built) -> Runner:
        found = super().load(built)
        assert isinstance(found, OnCpu)
        return Layered(found.runner, found.layers, found.spoiled, told=self.told)


@dataclass(frozen=True)
class Timing(OnGpu):
    told: Callable[[], Runs] = list

    def system(self, request: Request) -> Backend:
        found = super().system(request)
        assert isinstance(found, StandIn)
        parts = {each.name: getattr(found, each.name) for each in fields(found)}
        return LayeredSystem(**parts, told=self.told)


def timing(on_gpu: OnGpu, told: Callable[[], Runs], **changes: Any) -> Timing:
    parts = {each.name: getattr(on_gpu, each.name) for each in fields(on_gpu)}
    return Timing(**{**parts, "time_layers": True, **changes}, told=told)


def layers_of(record: CheckRecord) -> Sequence[LayerRecord]:
    assert record.engine is not None
    return CheckRecord.from_json(record.to_json()).engine.layers  # type: ignore[union-attr]


def test_layers_and_their_times_are_in_the_record(on_gpu: OnGpu) -> None:
    runs: Runs = [[("layer", 0.5), ("cast", 0.1)]] * 20
    record = check(timing(on_gpu, lambda: runs), onnx_models.gemm_net(), X)
    assert record.verdict == "pass"
    computing, cast = layers_of(record)
    assert computing.nodes == ("gemm",), "the node of the lowered file that computes"
    assert (computing.time_ms, cast.time_ms) == (0.5, 0.1)
    assert (cast.nodes, cast.moves) == ((), ("x_cast",))


def test_layers_are_not_timed_where_nobody_measures(on_gpu: OnGpu) -> None:
    def never() -> Runs:
        raise AssertionError("the profiler was asked")

    record = check(timing(on_gpu, never, time_layers=False), onnx_models.gemm_net(), X)
    assert record.verdict == "pass"
    assert all(each.time_ms is None for each in layers_of(record))


def test_what_somebody_else_slowed_down_is_the_time_of_no_layer(on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "another process used the GPU: pid 7 (python) kept up to 60 % of it busy"
    monkeypatch.setattr(latency, "disturbances", lambda *_: [busy])
    record = check(timing(on_gpu, lambda: [[("layer", 0.5), ("cast", 0.1)]] * 20), onnx_models.gemm_net(), X)
    assert record.verdict == "pass"
    assert record.engine is not None
    assert record.engine.layers_untimed == busy
    assert all(each.time_ms is None for each in layers_of(record))


def test_layers_are_timed_behind_a_latency_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "while_watched", lambda _, run: (run(), []))
    timed_layers = EngineRecord("k", cached=True, miss_reason=None, build_s=1.0, bytes=1, build_notes=("timed",))

    def known(samples: int, **changes: Any) -> Any:
        found = SimpleNamespace(gpu="a card", profiled=lambda *_: timed_layers)
        record = SimpleNamespace(
            engine=replace(timed_layers, build_notes=()), latency=LatencyRecord("pass", samples=samples)
        )
        parts = {"record": record, "running": found, "runner": object(), "cases": [{}], "alone": nullcontext}
        return SimpleNamespace(**{**parts, "recorded": lambda **given: given, **changes})

    settings: Any = SimpleNamespace(time_layers=False, kept_open=None)
    measured: Any = judged.profiled(settings, known(10))
    assert measured == {"engine": timed_layers}
    settings.kept_open = object()  # What is measured again must not be profiled.
    kept: Any = judged.profiled(settings, known(10))
    assert kept["engine"].layers_untimed == "the engine serves further examples"
    for unmeasured in (known(0), known(10, runner=None), known(10, running=SimpleNamespace(gpu=None))):
        assert judged.profiled(settings, unmeasured) is unmeasured


def test_a_profiler_that_tells_nothing_changes_no_verdict_and_is_said(on_gpu: OnGpu) -> None:
    def refuse() -> Runs:
        raise GpuError("timing the layers: TensorRT-RTX tells its profiler of no layer")

    record = check(timing(on_gpu, refuse), onnx_models.gemm_net(), X)
    assert record.verdict == "pass"
    assert record.engine is not None
    assert record.engine.layers_untimed == "timing the layers: TensorRT-RTX tells its profiler of no layer"
    assert all(each.time_ms is None for each in layers_of(record))


def test_a_profiler_that_breaks_cuda_is_an_error_of_its_test_and_of_those_behind_it(on_gpu: OnGpu) -> None:
    def poison() -> Runs:
        error = GpuError("timing the layers: an illegal memory access")
        error.poisoned = True
        raise error

    checker = timing(on_gpu, poison)
    assert check(checker, onnx_models.gemm_net(), X).verdict == "error"
    assert "no engine can run" in str(check(replace(checker, time_layers=False), onnx_models.gemm_net(), X).message)


def test_the_page_shows_the_layers_that_take_longest(on_gpu: OnGpu) -> None:
    from pytest_trtcheck.report import html
    from pytest_trtcheck.report.json_report import document, environment

    pytest.importorskip("jinja2")
    record = check(timing(on_gpu, lambda: [[("layer", 0.5), ("cast", 0.1)]] * 20), onnx_models.gemm_net(), X)
    assert record.engine is not None
    many = [LayerRecord(f"<kernel {n}>", "kgen", "fp16", (f"node{n}",), time_ms=1.0 + n) for n in range(14)]
    record = replace(record, engine=replace(record.engine, layers=(*record.engine.layers, *many)))
    run = document([record], environment())
    validate(jsonable(run))
    page = html.render(run)
    assert "&lt;kernel 13&gt;" in page
    shown, _, folded = page.partition("<summary>6 more layers</summary>")
    assert "&lt;kernel 3&gt;" not in shown
    assert "&lt;kernel 3&gt;" in folded
    assert "<kernel" not in page
