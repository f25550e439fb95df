"""`--trt-export`: which engines are written, what Triton's own schema reads in their config, and what is never touched.

The engines are built for real. No GPU runs here, so that the records of checks on one are written by hand; those of a
real GPU are exported in tests/gpu/test_export.py.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck import gpu
from pytest_trtcheck.backends.base import EngineSpec
from pytest_trtcheck.backends.tensorrt import backend as engines
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ArgumentError, ReportError
from pytest_trtcheck.export import export, triton
from pytest_trtcheck.gpu.device import Gpu
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.record import (
    BudgetRecord,
    CheckRecord,
    JudgedRecord,
    LatencyRecord,
    OutputRecord,
    ParityRecord,
    typed,
)
from pytest_trtcheck.spec import BuildOptions, ShapeRange
from tests import onnx_models, trt_models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.conftest import Run, Suite

FLOAT = TensorProto.FLOAT
BATCHES = {"image": ShapeRange((1, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16))}

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)


def parsed(text: str) -> Any:
    """A config as Triton reads it: by Triton's own schema, which refuses unknown fields and names."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    text_format = importlib.import_module("google.protobuf.text_format")
    return text_format.Parse(text, schema.ModelConfig())


def type_name(value: int) -> str:
    schema = importlib.import_module("tritonclient.grpc.model_config_pb2")
    name: str = schema.DataType.Name(value)
    return name


# --- config.pbtxt ----------------------------------------------------------------------------------------------------


def tensor(name: str, *shape: int, dims: tuple[str | None, ...] = (), dtype: str = "float32") -> triton.Tensor:
    symbols = (*dims, *(None,) * (len(shape) - len(dims)))
    return triton.Tensor(name, dtype, shape, symbols)


def batched(name: str, *rest: int, least: int = 1, usual: int = 4, largest: int = 8) -> triton.Tensor:
    span = ShapeRange((least, *rest), (usual, *rest), (largest, *rest))
    return replace(tensor(name, -1, *rest, dims=("batch",)), profile=span)


def test_a_shared_batch_dimension_is_batched_dynamically() -> None:
    text, found = triton.config("net", [batched("x", 3, 16)], [tensor("y", -1, 10, dims=("batch",), dtype="int64")])
    assert found == triton.Batching(8, 4)
    config = parsed(text)
    assert (config.name, config.platform, config.backend) == ("net", "tensorrt_plan", "tensorrt")
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert [(each.name, list(each.dims), type_name(each.data_type)) for each in (*config.input, *config.output)] == [
        ("x", [3, 16], "TYPE_FP32"),
        ("y", [10], "TYPE_INT64"),
    ]


def test_a_usual_batch_of_one_prefers_no_size() -> None:
    config = parsed(triton.config("net", [batched("x", 3, usual=1)], [tensor("y", -1, 2, dims=("batch",))])[0])
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.preferred_batch_size


Y = tensor("y", -1, 2, dims=("batch",))


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([], [tensor("y", 2)], "no inputs"),
        (
            [tensor("x", 2, 3)],
            [tensor("y", 2, 3)],
            "input 'x' has no batch dimension: its first dimension is fixed at 2",
        ),
        ([batched("x", 3), tensor("scale")], [Y], "input 'scale' has no batch dimension: it is a scalar"),
        ([batched("x", 3), replace(tensor("s", 2), shape_tensor=True)], [Y], "input 's' is a shape tensor"),
        ([batched("x", 3, least=8, usual=8)], [Y], "admits a first dimension of 8 alone"),
        ([batched("x", 3, least=2)], [Y], "starts at batch 2"),
        ([batched("x", 3), batched("z", 3, largest=16)], [Y], "'x' and 'z' have different ranges"),
        ([replace(batched("x", 3), symbols=(None, None))], [Y], "first dimension of input 'x' no name"),
        ([batched("x", 3), replace(batched("z", 3), symbols=("rows", None))], [Y], "input 'z' does not start"),
        ([batched("x", 3)], [Y, tensor("count", -1, 2, dims=("found",))], "output 'count' does not start"),
        ([batched("x", 3)], [tensor("y", 5, 2)], "output 'y' does not start"),
        ([batched("x", 3)], [tensor("loss")], "output 'loss' does not start"),
    ],
)
def test_no_batching_says_why_and_gives_whole_shapes(
    inputs: list[triton.Tensor], outputs: list[triton.Tensor], reason: str
) -> None:
    found = triton.batching(inputs, outputs)
    assert found.max == 0
    assert reason in (found.reason or "")
    if any(not each.shape for each in (*inputs, *outputs)):
        return  # Scalars are refused then.
    text, found = triton.config("net", inputs, outputs)
    assert reason in text
    config = parsed(text)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    for ours, theirs in zip((*inputs, *outputs), (*config.input, *config.output), strict=True):
        assert len(theirs.dims) == len(ours.shape)


def test_sizes_that_the_profile_fixes_are_written_and_open_ones_stay_open() -> None:
    x = replace(tensor("x", -1, -1, -1, dims=("n", "w", "h")), profile=ShapeRange((2, 5, 1), (2, 5, 7), (2, 5, 9)))
    config = parsed(triton.config("net", [x], [tensor("y", -1, -1)])[0])
    assert list(config.input[0].dims) == [2, 5, -1]
    assert list(config.output[0].dims) == [-1, -1]


def test_tensors_without_dims_are_reshaped() -> None:
    labels = replace(batched("x"), shape=(-1,), symbols=("batch",))
    rows = parsed(triton.config("net", [labels], [tensor("y", -1, dims=("batch",))])[0])
    for each in (*rows.input, *rows.output):
        assert list(each.dims) == [1]
        assert each.HasField("reshape")
        assert not each.reshape.shape
    assert rows.max_batch_size == 8


def test_every_type_that_tritons_backend_takes_is_in_its_schema() -> None:
    for dtype, name in triton.DATA_TYPES.items():
        config = parsed(triton.config("net", [tensor("x", 2, dtype=dtype)], [tensor("y", 2)])[0])
        assert type_name(config.input[0].data_type) == name


@pytest.mark.parametrize(
    "bad", [tensor("x", 2, dtype="float8_e4m3fn"), tensor("x", 2, 0), tensor("x", 2, dtype="str"), tensor("x")]
)
def test_what_triton_cannot_describe_is_refused(bad: triton.Tensor) -> None:
    with pytest.raises(ArgumentError, match="'x'"):
        triton.config("net", [bad], [tensor("y", 2)])


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb: 1", "größe", "a/b:0", "x\x00y", "a#b", "名前"])
def test_any_tensor_name_survives(name: str) -> None:
    text = triton.config("net", [tensor(name, 2)], [tensor("y", 2)], [f"about {name}\nmax_batch_size: 7"])[0]
    config = parsed(text)
    assert [each.name for each in config.input] == [name]
    assert config.max_batch_size == 0


# --- engines and their records ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def cache(store: Path) -> Cache:
    return Cache(store / "cache")


class Untried(engines.TensorRTRtx):
    """Builds for a GPU that is not here: nothing can try its engines."""

    def _trial(self, *_: Any) -> Any:
        return SimpleNamespace(into=lambda *_: None, beside=lambda _: None)


def system() -> engines.TensorRT:
    module = find_module("tensorrt_rtx")
    a100 = gpu.find_gpu("A100")
    card = Gpu(name="NVIDIA A100-SXM4-80GB", model=a100, compute_capability=(8, 0), driver="580.65")
    return Untried(module, Target((8, 0), here=False), "A100", card)


def built(
    cache: Cache,
    proto: onnx.ModelProto,
    label: str = "conv.onnx",
    *,
    precision: Any = "fp16",
    profile: Mapping[str, ShapeRange] = BATCHES,
    keep_fp32: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Build an engine, and the record of a check of it that passed on the A100."""
    path = cache.root.parent / f"{hashlib.sha256(proto.SerializeToString()).hexdigest()}.onnx"
    onnx_models.save(proto, path)
    model = onnx_model.load(path, label)
    lowered = lower(model, precision, cache, keep_fp32=keep_fp32)
    spans = {name: span for name, span in profile.items() if name in {each.name for each in model.inputs}}
    ranges = model_inputs.profile(model, spans, ())
    made = system().build(EngineSpec(model, lowered, precision, ranges, BuildOptions()), cache)
    judged = JudgedRecord("max", 1e-4, 1e-2, "the default of fp16", "pass")
    outputs = tuple(
        OutputRecord(each.name, each.dtype, (4, 10), max=1e-4, l2=2e-4, judged=(judged,)) for each in model.outputs
    )
    record = CheckRecord(
        nodeid=f"tests/test_it.py::test_it[{precision}]",
        model=label,
        verdict="pass",
        model_sha256=model.sha256,
        precision=precision,
        backend="tensorrt_rtx",
        evidence="engine",
        cases=3,
        seed=0,
        inputs="generated",
        parity=ParityRecord("pass", "max", 1e-2, 1e-4, outputs, tol_source="the default of fp16"),
        latency=LatencyRecord(
            "pass",
            gpu="A100",
            samples=500,
            p50_ms=1.0,
            p99_ms=1.2,
            bounds_ms={"p50_ms": (0.99, 1.01), "p99_ms": (1.1, float("inf"))},
            budgets=(BudgetRecord("pass", "p50_ms", "p50", limit_ms=2.0),),
        ),
        engine=made.record,
    )
    return {**json.loads(record.to_json()), "outcome": "passed"}


def write(folder: str | Path, records: Sequence[Mapping[str, Any]], cache: Cache) -> export.Exported:
    """Export, by records as a report has them."""
    return export.write(folder, [typed(each, CheckRecord) for each in records], cache, gpu="A100")


@pytest.fixture
def record(cache: Cache) -> dict[str, Any]:
    return built(cache, onnx_models.conv_net())


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reasons(folder: Path, records: list[dict[str, Any]], cache: Cache) -> str:
    """Why nothing was exported, which nothing must have been."""
    found = write(folder, records, cache)
    assert found.written == ()
    assert not list(folder.rglob("model_repository"))
    assert "exported 0 engines" in found.lines()[0]
    line, released = [line for line in found.lines()[1:] if not line.startswith("to be proved on the ")]
    assert "release: 0 of " in released
    return line


def test_an_engine_is_written_as_triton_and_a_reader_expect_it(
    tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    done = write(tmp_path / "out", [record], cache)
    assert [each.name for each in done.written] == ["conv_fp16"]
    assert done.left_out == ()
    assert set(files(tmp_path / "out")) == {"release.json"} | {
        f"A100/model_repository/conv_fp16/{name}" for name in ("config.pbtxt", "manifest.json", "1/model.plan")
    }
    folder = tmp_path / "out/A100/model_repository/conv_fp16"
    plan = (folder / "1/model.plan").read_bytes()
    entry = cache.find("engine", record["engine"]["key"])
    assert entry is not None
    assert plan == (entry.path / engines.PLAN_FILE).read_bytes()

    config = parsed((folder / "config.pbtxt").read_text())
    assert config.name == "conv_fp16"
    assert config.max_batch_size == 8
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert [(each.name, list(each.dims)) for each in config.input] == [("image", [3, 16, 16])]
    assert [(each.name, list(each.dims)) for each in config.output] == [("logits", [10])]

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == {"label": "conv.onnx", "sha256": record["model_sha256"]}
    assert manifest["precision"] == "fp16"
    assert manifest["gpu"] == {"name": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0"}
    assert manifest["tensorrt"]["module"] == "tensorrt_rtx"
    assert manifest["tensorrt"]["version"] == find_module("tensorrt_rtx").version
    assert manifest["engine"]["key"] == record["engine"]["key"]
    assert manifest["engine"]["sha256"] == hashlib.sha256(plan).hexdigest()
    assert manifest["engine"]["bytes"] == len(plan)
    assert manifest["proved_by"] == [record["nodeid"]]
    (parity,) = manifest["parity"]
    assert (parity["metric"], parity["worst"], parity["tol"]) == ("max", 1e-4, 1e-2)
    assert parity["outputs"][0]["name"] == "logits"
    assert parity["outputs"][0]["l2"] == 2e-4
    (latency,) = manifest["latency"]
    assert latency["p50_ms"] == 1.0
    assert latency["bounds_ms"]["p99_ms"] == [1.1, "inf"]
    assert latency["budgets"][0]["limit_ms"] == 2.0


def test_a_plan_of_rtx_says_that_tritons_own_backend_does_not_load_it(
    tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    done = write(tmp_path, [record], cache)
    folder = tmp_path / "A100/model_repository/conv_fp16"
    for text in (
        (folder / "config.pbtxt").read_text(),
        json.loads((folder / "manifest.json").read_text())["note"],
        "\n".join(done.lines()),
    ):
        assert "TensorRT-RTX" in text
        assert "does not load it" in text


def test_the_same_records_in_any_order_give_the_same_bytes(
    tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    other = {**copy.deepcopy(record), "nodeid": "tests/test_a.py::test_other"}
    third = built(cache, onnx_models.conv_net(), precision="bf16")
    for name, records in {"a": [record, other, third], "b": [third, other, record]}.items():
        write(tmp_path / name, records, cache)
        write(tmp_path / name, records, cache)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 7
    manifest = json.loads(files(tmp_path / "a")["A100/model_repository/conv_fp16/manifest.json"])
    assert manifest["proved_by"] == sorted([record["nodeid"], other["nodeid"]])


# --- what keeps an engine out ----------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "failed": ({"verdict": "fail", "message": "logits is off\nmore"}, "fail: logits is off"),
    "error": ({"verdict": "error", "parity": None, "evidence": None, "message": "GPU gone"}, "error: GPU gone"),
    "inconclusive": ({"verdict": "inconclusive", "outcome": "skipped"}, "inconclusive"),
    "expected": ({"verdict": "fail", "outcome": "skipped", "expected_failure": "known"}, "fail"),
    "build only": (
        {
            "verdict": "not_measured",
            "parity": None,
            "evidence": None,
            "outcome": "skipped",
            "message": "--trt-build-only",
        },
        "not measured: --trt-build-only",
    ),
    "emulated": ({"evidence": "emulated", "compiled_for": "A100"}, "compiled for A100 and never ran"),
    "emulated, passed by hand": ({"evidence": "emulated"}, "emulated on the CPU"),
    "no evidence": ({"evidence": None}, "emulated on the CPU"),
    "test failed": ({"outcome": "failed"}, "the check passed, but the test was failed"),
    "test xfailed": ({"outcome": "skipped", "expected_failure": "why"}, "the check passed, but the test was xfailed"),
    "test unknown": ({"outcome": None}, "the check passed, but the test was"),
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("company", ["alone", "first", "last"])
def test_one_bad_check_keeps_the_engine_out(
    name: str, company: str, tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    change, reason = BAD[name]
    bad = {
        **copy.deepcopy(record),
        "nodeid": "tests/test_z.py::test_bad" if company == "last" else "a::test_bad",
        **change,
    }
    line = reasons(tmp_path / "out", [bad] if company == "alone" else [record, bad], cache)
    assert reason in line
    assert "test_bad" in line
    assert "conv.onnx fp16" in line


def test_latency_that_was_asked_for_and_not_measured_is_no_pass(
    tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    record["latency"] = {**record["latency"], "verdict": "not_measured", "reason": "no budget for A100"}
    assert "latency not measured: no budget for A100" in reasons(tmp_path / "out", [record], cache)


def test_an_engine_that_was_timed_and_never_compared_is_left_out(
    tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    record["parity"] = None
    assert "never compared" in reasons(tmp_path / "out", [record], cache)


def test_a_bad_engine_does_not_keep_a_good_one_out(tmp_path: Path, record: dict[str, Any], cache: Cache) -> None:
    bad = {**built(cache, onnx_models.conv_net(), precision="bf16"), "verdict": "fail", "outcome": "failed"}
    done = write(tmp_path, [record, bad], cache)
    assert [each.name for each in done.written] == ["conv_fp16"]
    assert [each.label for each in done.left_out] == ["conv.onnx bf16"]


def test_another_build_than_the_one_checked_is_left_out(tmp_path: Path, record: dict[str, Any], cache: Cache) -> None:
    wrong = copy.deepcopy(record)
    wrong["engine"]["sha256"] = "0" * 64
    assert "another build" in reasons(tmp_path / "out", [wrong], cache)
    assert "builds differ" in reasons(tmp_path / "out", [record, wrong], cache)
    wrong["engine"]["sha256"] = None
    assert "builds differ" in reasons(tmp_path / "out", [wrong], cache)


def test_an_engine_that_left_the_cache_or_was_damaged_is_left_out(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    record = built(cache, onnx_models.conv_net())
    entry = cache.find("engine", record["engine"]["key"])
    assert entry is not None
    plan = entry.path / engines.PLAN_FILE
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    assert "no longer in the cache" in reasons(tmp_path / "out", [record], cache)
    cache.clear()
    assert "no longer in the cache" in reasons(tmp_path / "out", [record], cache)


def test_without_a_single_check_nothing_is_made(tmp_path: Path, cache: Cache) -> None:
    done = write(tmp_path / "out", [], cache)
    assert done.lines() == [f"exported 0 engines to {tmp_path / 'out'}"]
    assert not (tmp_path / "out").exists()


# --- real engines: what TensorRT makes of the shapes -----------------------------------------------------------------


def config_of(tmp_path: Path, cache: Cache, proto: onnx.ModelProto, **how: Any) -> Any:
    done = write(tmp_path, [built(cache, proto, precision="fp32", **how)], cache)
    (each,) = done.written
    return parsed((tmp_path / "A100/model_repository" / each.name / "config.pbtxt").read_text())


def test_a_fixed_batch_is_not_batched(tmp_path: Path, cache: Cache) -> None:
    config = config_of(tmp_path, cache, onnx_models.conv_net(2), profile={})
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [2, 3, 16, 16]
    assert list(config.output[0].dims) == [2, 10]


def test_a_profile_of_one_batch_is_not_batched(tmp_path: Path, cache: Cache) -> None:
    only = ShapeRange((8, 3, 16, 16), (8, 3, 16, 16), (8, 3, 16, 16))
    config = config_of(tmp_path, cache, onnx_models.conv_net(), profile={"image": only})
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [8, 3, 16, 16]
    assert not config.HasField("dynamic_batching")


def test_an_output_that_only_looks_like_a_batch_stops_batching(tmp_path: Path, cache: Cache) -> None:
    flat = onnx_models.model(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        {"x": (FLOAT, ["batch", 4])},
        {"y": (FLOAT, ["elements"])},
        {"s": np.array([-1])},
    )
    config = config_of(tmp_path, cache, flat, profile={"x": ShapeRange((1, 4), (2, 4), (4, 4))})
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 4]
    assert list(config.output[0].dims) == [-1]


def test_every_dtype_of_a_real_engine_comes_through(tmp_path: Path, cache: Cache) -> None:
    config = config_of(tmp_path, cache, trt_models.many_types(), profile={})
    assert {each.name: type_name(each.data_type) for each in config.input} == {
        "i64": "TYPE_INT64",
        "i32": "TYPE_INT32",
        "flag": "TYPE_BOOL",
        "u8": "TYPE_UINT8",
        "half": "TYPE_FP16",
        "x": "TYPE_FP32",
    }
    assert config.output[0].name == "x_neg"


def test_shapes_are_those_that_tensorrt_found_out(tmp_path: Path, cache: Cache) -> None:
    # The model calls the width of its output "out_width"; that it follows from a fixed height, TensorRT alone knows.
    span = ShapeRange((1, 4, 16, 8), (2, 4, 16, 16), (4, 4, 16, 32))
    config = config_of(tmp_path, cache, trt_models.dynamic_conv(), profile={"x": span})
    assert config.max_batch_size == 4
    assert list(config.input[0].dims) == [4, 16, -1]
    assert list(config.output[0].dims) == [8, 14, -1]


# --- names -----------------------------------------------------------------------------------------------------------


def names(tmp_path: Path, cache: Cache, records: list[dict[str, Any]]) -> list[str]:
    return [each.name for each in write(tmp_path, records, cache).written]


def test_names_tell_precisions_batches_folders_and_all_else_apart(tmp_path: Path, cache: Cache) -> None:
    net = onnx_models.conv_net()
    fp16, bf16 = built(cache, net), built(cache, net, precision="bf16")
    assert names(tmp_path / "a", cache, [fp16, bf16]) == ["conv_bf16", "conv_fp16"]
    eight = ShapeRange((8, 3, 16, 16), (8, 3, 16, 16), (8, 3, 16, 16))
    b8 = built(cache, net, profile={"image": eight})
    assert names(tmp_path / "b", cache, [fp16, b8, bf16]) == ["conv_bf16", "conv_fp16_batch1-8", "conv_fp16_batch8"]
    folders = [{**fp16, "model": "small/model.onnx"}, {**b8, "model": "large/model.onnx"}]
    assert names(tmp_path / "c", cache, folders) == ["large_model_fp16", "small_model_fp16"]
    kept = built(cache, net, keep_fp32=("conv1",))
    same = names(tmp_path / "d", cache, [fp16, kept])
    assert same == sorted(f"conv_fp16_{each['engine']['key'][:12]}" for each in (fp16, kept))


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("<ModelProto>", "ModelProto_fp16"),
        ("a/../../x y\n.onnx", "x_y_fp16"),
        ("modèle.onnx", "mod_le_fp16"),
        ("..", "model_fp16"),
        ("/abs/path/net.v2.onnx", "net.v2_fp16"),
        ("x" * 300 + ".onnx", "x" * 80 + "_fp16"),
    ],
)
def test_a_name_is_a_plain_folder_name(
    label: str, name: str, tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    record["model"] = label
    assert names(tmp_path / "out", cache, [record]) == [name]
    config = parsed((tmp_path / "out/A100/model_repository" / name / "config.pbtxt").read_text())
    assert config.name == name


# --- the folder ------------------------------------------------------------------------------------------------------


def test_foreign_files_stay_and_an_update_replaces_ours(tmp_path: Path, record: dict[str, Any], cache: Cache) -> None:
    theirs = tmp_path / "A100/model_repository/theirs"
    theirs.mkdir(parents=True)
    (theirs / "config.pbtxt").write_text("theirs")
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, [record], cache)
    record["latency"]["p50_ms"] = 0.5
    done = write(tmp_path, [record], cache)
    manifest = json.loads((tmp_path / "A100/model_repository/conv_fp16/manifest.json").read_text())
    assert manifest["latency"][0]["p50_ms"] == 0.5
    assert done.older == ()
    assert files(tmp_path)["notes.txt"] == b"mine"
    assert files(theirs) == {"config.pbtxt": b"theirs"}
    assert not list(tmp_path.glob(".trtcheck*"))


def test_what_an_earlier_run_left_is_named_and_kept(tmp_path: Path, record: dict[str, Any], cache: Cache) -> None:
    write(tmp_path, [record], cache)
    done = write(tmp_path, [built(cache, onnx_models.conv_net(), precision="bf16")], cache)
    assert done.older == ("conv_fp16",)
    assert "from an earlier run, and not proved by this one: conv_fp16" in done.lines()
    failed = write(tmp_path, [{**record, "verdict": "fail"}], cache)
    assert failed.older == ("conv_bf16", "conv_fp16")


def spoil_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def spoil_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def spoil_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


SPOILS: dict[str, Any] = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "another manifest": lambda folder: (folder / "manifest.json").write_text('{"format": "OCI"}'),
    "no JSON": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a config edited by hand": lambda folder: (folder / "config.pbtxt").write_text('name: "mine"'),
    "another plan": lambda folder: (folder / "1/model.plan").write_bytes(b"mine"),
    "a second version": lambda folder: ((folder / "2").mkdir(), (folder / "2/model.plan").write_bytes(b"mine")),
    "labels": lambda folder: (folder / "labels.txt").write_text("cat"),
    "an empty folder": spoil_empty,
    "a file": spoil_file,
    "a link": spoil_link,
}


@pytest.mark.parametrize("what", list(SPOILS))
def test_a_model_that_is_not_as_we_left_it_is_refused_and_nothing_is_written(
    what: str, tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    write(tmp_path, [record], cache)
    SPOILS[what](tmp_path / "A100/model_repository/conv_fp16")
    before = files(tmp_path)
    other = built(cache, onnx_models.conv_net(), precision="bf16")
    with pytest.raises(ReportError, match="conv_fp16") as caught:
        write(tmp_path, [record, other], cache)
    assert "move it away" in caught.value.hint
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path, record: dict[str, Any], cache: Cache) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"cannot export to .*file"):
        write(tmp_path / "file", [record], cache)


def test_what_a_killed_export_left_is_put_back_and_cleaned_up(
    tmp_path: Path, record: dict[str, Any], cache: Cache
) -> None:
    write(tmp_path, [record], cache)
    killed = tmp_path / ".trtcheck-export-model_repository-abc"
    (killed / "old").mkdir(parents=True)
    (killed / "new/half").mkdir(parents=True)
    (killed / "old/A100/model_repository").mkdir(parents=True)
    (tmp_path / "A100/model_repository/conv_fp16").rename(killed / "old/A100/model_repository/conv_fp16")
    done = write(tmp_path, [built(cache, onnx_models.conv_net(), precision="bf16")], cache)
    assert done.older == ("conv_fp16",)
    assert {path.name for path in (tmp_path / "A100/model_repository").iterdir()} == {"conv_fp16", "conv_bf16"}
    assert not list(tmp_path.glob(".trtcheck*"))


def test_a_full_disk_leaves_no_half_engine(
    tmp_path: Path, record: dict[str, Any], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise OSError(28, "No space left on device", str(target))

    write(tmp_path, [record], cache)
    before = files(tmp_path)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ReportError, match="No space left"):
        write(tmp_path, [record, built(cache, onnx_models.conv_net(), precision="bf16")], cache)
    assert files(tmp_path) == before
    assert not list(tmp_path.glob(".trtcheck*"))


@pytest.mark.parametrize("is_full", [False, True])
def test_an_export_in_a_lower_layer_of_overlayfs_is_replaced(
    tmp_path: Path, record: dict[str, Any], cache: Cache, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """A folder in a container's image: the kernel renames its files, and refuses to rename its folders."""
    write(tmp_path, [record], cache)
    target = tmp_path / "A100/model_repository/conv_fp16"
    lower, before, rename = target.stat().st_ino, files(tmp_path), Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self == target and self.stat().st_ino == lower:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))
        if is_full and to == target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    record["latency"]["p50_ms"] = 0.5
    if is_full:
        with pytest.raises(ReportError, match="No space left"):
            write(tmp_path, [record], cache)
        assert files(tmp_path) == before
    else:
        write(tmp_path, [record], cache)
        assert json.loads((target / "manifest.json").read_text())["latency"][0]["p50_ms"] == 0.5
    assert not list(tmp_path.glob(".trtcheck*"))


def _export_in_turns(folder: str, record: dict[str, Any], root: str) -> None:
    for _ in range(10):
        write(folder, [record], Cache(root))


def test_many_processes_export_into_one_folder(tmp_path: Path, record: dict[str, Any], cache: Cache) -> None:
    work = functools.partial(_export_in_turns, str(tmp_path), record, str(cache.root))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(files(tmp_path)) == 4


# --- through pytest --------------------------------------------------------------------------------------------------


def test_without_a_gpu_no_engine_is_exported_and_it_is_said_why(
    suite: Suite, run_everywhere: Callable[..., Run]
) -> None:
    suite.write(test_conv='@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=2)\ndef test_conv(): ...\n')
    run = run_everywhere("--trt-gpu=A100", "--trt-export=out", f"--trt-cache-dir={suite.path / 'cache'}")
    run.result.assert_outcomes(passed=2)
    assert "exported 0 engines to" in run.text
    assert "not exported: 2 engines (conv.onnx " in run.text
    assert run.text.count("it was compiled for A100 and never ran: its outputs were emulated on the CPU") == 1
    assert not list((suite.path / "out").rglob("model_repository"))
    assert "conv_fp16: " in run.text
    assert run.text.count("emulated: no engine of it was run on a GPU") == 2
    assert "release: 0 of 2 variants of 1 model; missing: 2 not run on a GPU" in run.text
    # What was compiled for a GPU that is not here waits for a test there.
    assert {path.parent.parent.name for path in (suite.path / "out/A100/to_prove").glob("*/1/model.plan")} == {
        "conv_bf16",
        "conv_fp16",
    }
    assert [check["outcome"] for check in run.checks] == ["passed", "passed"]


def test_how_each_test_ended_is_in_its_record(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(
        test_ends="""
@pytest.fixture
def breaks_at_the_end():
    yield
    raise ValueError("at the end")

@trt_parity("conv.onnx", batch=1)
def test_good(): ...

@trt_parity("conv.onnx", batch=1)
def test_teardown(breaks_at_the_end): ...

def test_after(trt_check):
    trt_check("conv.onnx", batch=1)
    assert False

@pytest.mark.xfail(reason="known")
def test_expected(trt_check):
    trt_check("conv.onnx", batch=1)
    assert False

@pytest.mark.xfail(strict=True)
@trt_parity("conv.onnx", batch=1)
def test_strict(): ...

def test_skipped(trt_check):
    trt_check("conv.onnx", batch=1)
    pytest.skip("changed my mind")
"""
    )
    run = run_everywhere()
    assert {check["verdict"] for check in run.checks} == {"pass"}
    assert {check["nodeid"].split("::")[1]: check["outcome"] for check in run.checks} == {
        "test_good": "passed",
        "test_teardown": "failed",
        "test_after": "failed",
        "test_expected": "skipped",
        "test_strict": "failed",
        "test_skipped": "skipped",
    }


def test_a_run_that_was_stopped_exports_nothing(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(test_stop="def test_a(): assert False\n\ndef test_b(): assert False\n\ndef test_c(): ...\n")
    run = run_everywhere("-x", "--trt-export=out")
    assert "--trt-export: nothing was written: the run was stopped before every test had run" in run.text
    assert not (suite.path / "out").exists()


def test_a_crashed_worker_exports_nothing(suite: Suite) -> None:
    suite.write(test_crash="import os\n\ndef test_dies(): os._exit(1)\n\ndef test_b(): ...\n")
    run = suite.run_apart("-n2", "--trt-export=out")
    assert "test_crash.py::test_dies crashed its process, and which engine it used is not known" in run.text
    assert not (suite.path / "out").exists()


def test_a_run_without_tests_exports_nothing_and_is_no_error(suite: Suite) -> None:
    run = suite.run("--trt-export=out")
    assert run.result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "ERROR" not in run.text
    assert "exported 0 engines" in run.text
