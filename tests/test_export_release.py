"""The typed ONNX files of `--trt-export`, and the manifest of a whole release.

The files come out of real runs of pytest, on a machine without a GPU. What GPUs would have said is written by hand, as
in test_export.py; that of a real one is in tests/gpu/test_export.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.__main__ import main
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.export import export, release
from pytest_trtcheck.model import graph, onnx_model
from pytest_trtcheck.precision.lowering import lower, with_half_io
from pytest_trtcheck.record import CheckRecord, Environment, GpuRecord, Library, typed
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models
from tests.test_export import BATCHES, built, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Run, Suite

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)

CONV = """
@trt_parity("conv.onnx", precision=["fp16", "bf16", "int8"], batch=2, calibration="calibration.npz")
def test_conv(): ...
"""
AGAIN = """
@trt_parity("out/typed/conv_fp16/model.onnx", precision="fp16", batch=2, reference="conv.onnx")
def test_fp16(): ...

@trt_parity("out/typed/conv_bf16/model.onnx", precision="bf16", batch=2, reference="conv.onnx")
def test_bf16(): ...

@trt_parity("out/typed/conv_int8/model.onnx", precision="int8", batch=2, reference="conv.onnx")
def test_int8(): ...

@trt_parity("out/typed/conv_fp16/model.onnx", precision="fp16", batch=2, reference="conv.onnx", tol=1e-7)
def test_not_that_exact(): ...
"""


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


@pytest.fixture
def exported(suite: Suite) -> Suite:
    """A run without a GPU, exported to `out`."""
    data = np.random.default_rng(1).random((8, 3, 16, 16)).astype(np.float32)
    np.savez(suite.path / "calibration.npz", image=data)
    suite.write(test_conv=CONV)
    run = suite.run("--trt-gpu=A100", "--trt-export=out", f"--trt-cache-dir={suite.path / 'cache'}")
    run.result.assert_outcomes(passed=3)
    return suite


# --- the typed file --------------------------------------------------------------------------------------------------


def test_the_file_runs_everywhere_and_passes_again(exported: Suite, tmp_path: Path) -> None:
    folder = exported.path / "out/typed"
    assert sorted(path.name for path in folder.iterdir()) == ["conv_bf16", "conv_fp16", "conv_int8"]
    image = np.random.default_rng(0).random((2, 3, 16, 16)).astype(np.float32)
    (right,) = run_ort(exported.path / "conv.onnx", image)
    for precision, off in (("fp16", 0.01), ("int8", 0.2)):
        path = folder / f"conv_{precision}/model.onnx"
        (found,) = run_ort(path, image)
        assert 0 < np.abs(found - right).max() / np.abs(right).max() < off
        plan = tensorrt.build(
            find_module("tensorrt_rtx"),
            path,
            tmp_path / "engine.plan",
            target=Target((8, 0), here=False),
            precision=precision,  # type: ignore[arg-type]
            profile=BATCHES,
        )
        assert plan.bytes > 1000
    types = {each.data_type for each in onnx.load(folder / "conv_bf16/model.onnx").graph.initializer}
    assert TensorProto.BFLOAT16 in types
    (exported.path / "test_conv.py").unlink()
    exported.write(test_again=AGAIN)
    run = exported.run("--trt-gpu=A100")
    run.result.assert_outcomes(passed=3, failed=1)
    assert run.check("test_not_that_exact")["verdict"] == "fail"


def run_ort(path: Path, image: Any) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[session.get_inputs()[0].type]
    return session.run(None, {"image": image.astype(kind)})


def test_the_manifest_says_what_was_seen(exported: Suite) -> None:
    folder = exported.path / "out/typed/conv_fp16"
    found = manifest_of(folder)
    path = folder / found["file"]
    assert found["files"] == {
        "model.onnx": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    }
    assert found["precision"] == "fp16"
    assert found["model"]["label"] == "conv.onnx"
    assert found["model"]["sha256"] == onnx_model.load(exported.path / "conv.onnx").sha256
    assert (found["evidence"], found["proved_by"]) == ("emulated", [])
    assert "No engine built from this file was run on a GPU" in found["note"]
    (judged,) = found["judged"]
    assert judged["nodeid"] == "test_conv.py::test_conv[fp16]"
    assert (judged["evidence"], judged["gpu"], judged["tensorrt"], judged["engine_sha256"]) == (
        *["emulated"],
        *[None] * 3,
    )
    assert judged["onnxruntime"] == onnxruntime.__version__
    assert 0 < judged["worst"] < judged["tol"]
    assert found["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 16, 16]}]
    assert [each["name"] for each in found["outputs"]] == ["logits"]


def test_what_fails_is_exported_in_no_form(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(
        test_all="""
@trt_parity("conv.onnx", batch=1)
def test_good(): ...

@trt_parity("conv.onnx", precision="bf16", batch=1, tol=1e-9)
def test_fails(): ...

@trt_parity("conv.onnx", precision="bf16", batch=1)
def test_same_file_passes(): ...

def test_fails_afterwards(trt_check):
    trt_check("gemm.onnx")
    assert False

@trt_parity("gone.onnx")
def test_error(): ...

@trt_latency(p50_ms=1)
def test_is_timed_alone(): ...

@pytest.fixture
def trt_model(): return "gemm.onnx"
"""
    )
    run = run_everywhere("--trt-export=out")
    assert [path.name for path in (suite.path / "out/typed").iterdir()] == ["conv_fp16"]
    assert "not exported: conv.onnx bf16 (typed ONNX" in run.text
    assert "test_fails: fail" in run.text
    assert "test_fails_afterwards: the check passed, but the test was failed" in run.text
    found = json.loads((suite.path / "out/release.json").read_text())
    assert found["complete"] is False
    missing = {
        (each["precision"], *each["tests"]): each["reason"] for model in found["models"] for each in model["missing"]
    }
    here = "test_all.py::"
    assert missing == {
        ("fp16", f"{here}test_good"): "not run on a GPU",
        ("bf16", f"{here}test_fails", f"{here}test_same_file_passes"): "fail",
        ("fp16", f"{here}test_fails_afterwards", f"{here}test_is_timed_alone"): "test failed",
        ("fp16", f"{here}test_error"): "error",
    }


def test_large_weights_lie_beside_it(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_DATA_THRESHOLD", 1000)
    suite.write(test_conv='@trt_parity("conv.onnx", batch=2)\ndef test_conv(): ...\n')
    suite.run("--trt-export=out", f"--trt-cache-dir={suite.path / 'cache'}").result.assert_outcomes(passed=1)
    folder = suite.path / "out/typed/conv_fp16"
    assert len(onnx_model.external_files(folder / "model.onnx")) == 1
    assert set(manifest_of(folder)["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert len(manifest_of(folder)["files"]) == 2
    shutil.rmtree(suite.path / "cache")
    run_ort(folder / "model.onnx", np.zeros((2, 3, 16, 16), np.float32))


def test_a_model_that_is_taken_as_it_is_is_its_own_artifact(exported: Suite) -> None:
    (exported.path / "test_conv.py").unlink()
    exported.write(test_again=AGAIN.partition('@trt_parity("out/typed/conv_bf16')[0])
    exported.run("--trt-export=second").result.assert_outcomes(passed=1)
    theirs = exported.path / "second/typed/model_fp16/model.onnx"
    assert theirs.read_bytes() == (exported.path / "out/typed/conv_fp16/model.onnx").read_bytes()


def test_a_file_that_was_changed_since_is_left_out(suite: Suite) -> None:
    suite.write(
        test_it="""
import pathlib
@pytest.fixture(scope="session", autouse=True)
def spoils_it():
    yield
    path = pathlib.Path("half.onnx")
    path.write_bytes(path.read_bytes() + b"\\x00")

@trt_parity("half.onnx", reference="conv.onnx", batch=1)
def test_half(): ...
"""
    )
    half = lower(onnx_model.load(suite.path / "conv.onnx"), "fp16", Cache(suite.path / "mine"))
    shutil.copyfile(half.path, suite.path / "half.onnx")
    run = suite.run("--trt-export=out")
    run.result.assert_outcomes(passed=1)
    assert "typed ONNX" in run.text
    assert "not there any more as it was" in run.text
    assert not (suite.path / "out/typed").exists()


def test_fp64_models_have_keys_of_their_own(tmp_path: Path) -> None:
    """Two of them shared one engine in the cache: whatever came from FP64 had the same key."""
    keys = []
    for scale in (1.0, 2.0):
        weight = numpy_helper.from_array(np.full((4, 4), scale), "w")
        made = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
            "wide",
            [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [2, 4])],
            [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [2, 4])],
            [weight],
        )
        proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = onnx_models.save(proto, tmp_path / f"wide{scale}.onnx")
        keys.append(lower(onnx_model.load(path), "fp32", Cache(tmp_path / "cache")).key)
    assert keys[0] != keys[1]
    assert all(len(key) == 64 for key in keys)


# --- a release -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def cache(store: Path) -> Cache:
    return Cache(store / "cache")


LARGE = {"image": ShapeRange((16, 3, 16, 16), (16, 3, 16, 16), (16, 3, 16, 16))}


def model_file(cache: Cache, seed: int = 0) -> tuple[onnx.ModelProto, Path]:
    """The model of the checks, and where `built` puts it."""
    proto = onnx_models.conv_net()
    proto.producer_name = f"exporter {seed}"
    return proto, cache.root.parent / f"{hashlib.sha256(proto.SerializeToString()).hexdigest()}.onnx"


def open_again(cache: Cache) -> onnx_model.OnnxModel:
    return onnx_model.load(model_file(cache)[1])


def checked(
    cache: Cache, precision: str = "fp16", profile: Any = BATCHES, seed: int = 0, **change: Any
) -> dict[str, Any]:
    """The record of a check that passed on a GPU, with the file that it was of."""
    proto, path = model_file(cache, seed)
    record = built(cache, proto, precision=precision, profile=profile)
    lowered = lower(onnx_model.load(path), precision, cache)  # type: ignore[arg-type]
    spans = {name: [span.min, span.opt, span.max] for name, span in profile.items()}
    return {**record, "lowered": {"key": lowered.key, "precision": precision}, "profile": spans, **change}


def emulated(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "evidence": "emulated", "engine": None, "latency": None}


def write(folder: Path, records: list[dict[str, Any]], cache: Cache, gpu: str | None = "A100") -> export.Exported:
    environment = Environment(
        gpu=GpuRecord(f"NVIDIA {gpu}") if gpu else None,
        tensorrt=Library(module="tensorrt_rtx", version="1.7.1"),
        onnxruntime=onnxruntime.__version__,
    )
    made = [typed(each, CheckRecord) for each in records]
    return export.write(folder, made, cache, gpu=gpu, environment=environment)


def listed(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "release.json").read_text())
    return found


def missing(folder: Path) -> set[tuple[str, str | None, str | None, str]]:
    """(precision, GPU, batch, reason) of what is missing."""
    return {
        (each["precision"], each["gpu"], each["batch"], each["reason"])
        for model in listed(folder)["models"]
        for each in model["missing"]
    }


def test_an_engine_on_a_gpu_proves_the_file_that_it_was_built_from(tmp_path: Path, cache: Cache) -> None:
    record = checked(cache)
    done = write(tmp_path, [record], cache)
    assert "  conv_fp16: " in "\n".join(done.lines())
    assert "proved by engines on a GPU" in "\n".join(done.lines())
    found = manifest_of(tmp_path / "typed/conv_fp16")
    assert (found["evidence"], found["proved_by"], found["note"]) == ("engine", [record["nodeid"]], None)
    (judged,) = found["judged"]
    assert (judged["gpu"], judged["tensorrt"]) == ("NVIDIA A100", "tensorrt_rtx 1.7.1")
    assert judged["engine_sha256"] == record["engine"]["sha256"]
    (model,) = listed(tmp_path)["models"]
    (variant,) = model["variants"]
    assert (variant["gpu"], variant["batch"], variant["precision"]) == ("A100", "1-8", "fp16")
    assert variant["plans"] == ["A100/model_repository/conv_fp16"]
    assert variant["typed"] == ["typed/conv_fp16"]
    assert listed(tmp_path)["complete"] is True
    assert missing(tmp_path) == set()


def test_what_a_gpu_proved_stays_proved_when_a_laptop_adds_its_word(tmp_path: Path, cache: Cache) -> None:
    record = checked(cache)
    write(tmp_path, [record], cache)
    write(tmp_path, [{**emulated(record), "nodeid": "tests/test_laptop.py::test_it"}], cache, gpu=None)
    found = manifest_of(tmp_path / "typed/conv_fp16")
    assert found["evidence"] == "engine"
    assert found["proved_by"] == [record["nodeid"]]
    assert [each["evidence"] for each in found["judged"]] == ["engine", "emulated"]
    # That it was asked for without a GPU is no variant of its own.
    assert missing(tmp_path) == set()
    assert listed(tmp_path)["complete"] is True


def test_another_content_of_that_name_has_to_prove_itself(tmp_path: Path, cache: Cache) -> None:
    write(tmp_path, [checked(cache)], cache)
    write(tmp_path, [emulated(checked(cache, seed=1))], cache, gpu=None)
    found = manifest_of(tmp_path / "typed/conv_fp16")
    assert (found["evidence"], found["proved_by"]) == ("emulated", [])


def test_several_machines_fill_one_release(tmp_path: Path, cache: Cache) -> None:
    fp16, bf16 = checked(cache), checked(cache, "bf16")
    failed = {**bf16, "verdict": "fail", "outcome": "failed", "message": "off by 3"}
    large = checked(cache, profile=LARGE)
    write(tmp_path, [fp16, failed, large], cache, gpu="T4")
    assert missing(tmp_path) == {("bf16", "T4", "1-8", "fail")}
    write(tmp_path, [fp16, bf16], cache, gpu="A100")
    assert missing(tmp_path) == {
        ("bf16", "T4", "1-8", "fail"),
        ("fp16", "A100", "16", "not built for this GPU"),
    }
    assert {path.parent.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.plan")} == {
        "T4/model_repository/conv_fp16_batch1-8",
        "T4/model_repository/conv_fp16_batch16",
        "A100/model_repository/conv_fp16",
        "A100/model_repository/conv_bf16",
    }
    (why,) = [each["why"] for each in listed(tmp_path)["models"][0]["missing"] if each["reason"] == "fail"]
    assert "off by 3" in why
    # The T4 again, and all of it is there.
    write(tmp_path, [bf16], cache, gpu="T4")
    write(tmp_path, [large], cache, gpu="A100")
    assert missing(tmp_path) == set()
    assert len(listed(tmp_path)["models"][0]["variants"]) == 6
    assert listed(tmp_path)["complete"] is True
    # The batch that came later stands beside the one that was there.
    assert (tmp_path / "A100/model_repository/conv_fp16_batch16").exists()
    assert (tmp_path / "A100/model_repository/conv_fp16").exists()


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "failed": ({"verdict": "fail", "outcome": "failed"}, "fail"),
    "error": ({"verdict": "error", "outcome": "failed", "parity": None}, "error"),
    "inconclusive": ({"verdict": "inconclusive", "outcome": "failed"}, "inconclusive"),
    "rerun": ({"runs": 2}, "rerun"),
    "test failed": ({"outcome": "failed"}, "test failed"),
    "compiled": ({"evidence": "emulated", "compiled_for": "A100"}, "not run on a GPU"),
    "without parity": ({"parity": None}, "nothing compared"),
    "build only": ({"verdict": "not_measured", "parity": None, "outcome": "skipped"}, "not measured"),
    "stripped": ({"build_options": {"strip_weights": True}}, "no weights"),
}


@pytest.mark.parametrize("name", list(REASONS))
def test_why_it_is_missing(name: str, tmp_path: Path, cache: Cache) -> None:
    change, reason = REASONS[name]
    write(tmp_path, [checked(cache, **change)], cache)
    assert missing(tmp_path) == {("fp16", "A100", "1-8", reason)}
    assert not (tmp_path / "A100/model_repository").exists()
    waiting = [path for path in listed(tmp_path)["artifacts"] if path == "A100/to_prove/conv_fp16"]
    assert len(waiting) == (name == "compiled")
    assert all(listed(tmp_path)["artifacts"][path]["evidence"] is None for path in waiting)


def test_a_stripped_plan_leaves_its_typed_file(tmp_path: Path, cache: Cache) -> None:
    done = write(tmp_path, [checked(cache, build_options={"strip_weights": True})], cache)
    assert "its plan holds no weights" in done.left_out[0].reason
    assert manifest_of(tmp_path / "typed/conv_fp16")["evidence"] == "engine"


def test_an_older_model_is_stale_and_not_mixed_in(tmp_path: Path, cache: Cache) -> None:
    write(tmp_path, [checked(cache), checked(cache, "bf16")], cache)
    done = write(tmp_path, [checked(cache, seed=1)], cache)
    assert listed(tmp_path)["stale"] == ["A100/model_repository/conv_bf16", "typed/conv_bf16"]
    assert missing(tmp_path) == {("bf16", "A100", "1-8", "stale")}
    assert "  stale: typed/conv_bf16: made from an older conv.onnx" in done.lines()
    assert listed(tmp_path)["complete"] is False


def link(path: Path) -> None:
    path.rename(path.with_suffix(".x"))
    path.symlink_to("model.x")


ALTERATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "was changed after"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:100]), "was changed after"),
    "deleted": (Path.unlink, "is missing"),
    "a link": (link, "was"),
}


@pytest.mark.parametrize("file", ["typed/conv_fp16/model.onnx", "A100/model_repository/conv_fp16/1/model.plan"])
@pytest.mark.parametrize("name", list(ALTERATIONS))
def test_an_altered_file_is_found(
    name: str, file: str, tmp_path: Path, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [checked(cache)], cache)
    assert main(["release", str(tmp_path)]) == 0
    assert "release: 1 of 1 variant of 1 model" in capsys.readouterr().out
    change, said = ALTERATIONS[name]
    change(tmp_path / file)
    before = files(tmp_path)
    assert main(["release", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert f"altered: {file}" in text
    assert said in text
    assert "missing: conv.onnx fp16 for A100 batch 1-8: altered" in text
    assert files(tmp_path) == before
    if name != "deleted":
        with pytest.raises(ReportError, match="conv_fp16"):
            write(tmp_path, [checked(cache)], cache)
    # A run that asks for something else says so too.
    write(tmp_path, [checked(cache, "bf16")], cache)
    assert ("fp16", "A100", "1-8", "altered") in missing(tmp_path)


def test_what_another_variant_replaced_is_missing(tmp_path: Path, cache: Cache) -> None:
    """A file of the same name that is lowered otherwise is not the one that the first variant was judged by."""
    fp16 = checked(cache)
    write(tmp_path, [fp16], cache, gpu="T4")
    kept = lower(open_again(cache), "fp16", cache, keep_fp32=("conv1",))
    other = {**fp16, "lowered": {"key": kept.key, "precision": "fp16"}}
    write(tmp_path, [other], cache, gpu="A100")
    assert missing(tmp_path) == {("fp16", "T4", "1-8", "replaced")}


def test_16_bit_inputs_are_in_the_name(tmp_path: Path, cache: Cache) -> None:
    fp16 = checked(cache)
    write(tmp_path, [fp16], cache)
    model = open_again(cache)
    half = with_half_io(model, lower(model, "fp16", cache), "fp16", cache)
    record = {**fp16, "lowered": {"key": half.key, "precision": "fp16"}, "build_options": {"io": "fp16"}}
    write(tmp_path, [emulated(record)], cache, gpu=None)
    assert sorted(path.name for path in (tmp_path / "typed").iterdir()) == ["conv_fp16", "conv_fp16_io-fp16"]
    found = manifest_of(tmp_path / "typed/conv_fp16_io-fp16")
    assert found["inputs"][0]["dtype"] == "float16"
    assert found["evidence"] == "emulated"
    assert missing(tmp_path) == {("fp16", None, "1-8", "not run on a GPU")}


def test_an_export_that_was_removed_is_missing(tmp_path: Path, cache: Cache) -> None:
    write(tmp_path, [checked(cache)], cache)
    shutil.rmtree(tmp_path / "A100")
    assert {each.reason for each in release.check(tmp_path).missing} == {"gone"}


def test_releases_of_several_machines_are_put_together(
    tmp_path: Path, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    fp16, bf16 = checked(cache), checked(cache, "bf16")
    write(tmp_path / "t4", [fp16, {**bf16, "verdict": "fail", "outcome": "failed"}], cache, gpu="T4")
    write(tmp_path / "a100", [fp16, bf16], cache, gpu="A100")
    write(tmp_path / "laptop", [emulated(fp16)], cache, gpu=None)
    shutil.copytree(tmp_path / "laptop", tmp_path / "all")
    assert main(["release", *(str(tmp_path / name) for name in ("all", "t4", "a100"))]) == 1
    assert "release: 3 of 4 variants of 1 model; missing: 1 fail" in capsys.readouterr().out
    assert missing(tmp_path / "all") == {("bf16", "T4", "1-8", "fail")}
    found = manifest_of(tmp_path / "all/typed/conv_fp16")
    assert found["evidence"] == "engine"
    assert {each["gpu"] for each in found["judged"]} == {None, "NVIDIA T4", "NVIDIA A100"}
    # The T4 mends it, and brings its folder again.
    write(tmp_path / "t4", [fp16, bf16], cache, gpu="T4")
    assert main(["release", str(tmp_path / "all"), str(tmp_path / "t4")]) == 0
    assert missing(tmp_path / "all") == set()


def test_what_failed_on_one_of_two_machines_is_not_whole_whichever_is_named_first(tmp_path: Path, cache: Cache) -> None:
    for name, gpu in (("a", "T4"), ("b", "T4"), ("laptop", None)):
        (tmp_path / name).mkdir()
        record = emulated(checked(cache)) if gpu is None else checked(cache)
        failed = {"verdict": "fail", "outcome": "failed"} if name == "b" else {}
        write(tmp_path / name, [{**record, **failed}], cache, gpu=gpu)
    for order in ("ab", "ba"):
        for first in ("empty", "a"):
            root = tmp_path / f"{order}-{first}"
            root.mkdir() if first == "empty" else shutil.copytree(tmp_path / first, root)
            assert main(["release", str(root), *(str(tmp_path / name) for name in order)]) == 1
            assert missing(root) == {("fp16", "T4", "1-8", "fail")}
    # What was merely not run says nothing against it.
    assert main(["release", str(tmp_path / "a"), str(tmp_path / "laptop")]) == 0


def test_two_folders_that_hold_different_models_of_one_name(
    tmp_path: Path, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "new", [checked(cache, seed=1)], cache, gpu="A100")
    write(tmp_path / "old", [checked(cache)], cache, gpu="T4")
    assert main(["release", str(tmp_path / "new"), str(tmp_path / "old")]) == 1
    text = capsys.readouterr().out
    assert "stale: T4/model_repository/conv_fp16: made from an older conv.onnx" in text
    assert f"{tmp_path / 'old/typed/conv_fp16'} stays where it is" in text
    assert listed(tmp_path / "new")["complete"] is False


def test_an_altered_folder_is_not_merged(tmp_path: Path, cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [checked(cache)], cache, gpu=name)
    (tmp_path / "b/typed/conv_fp16/model.onnx").write_bytes(b"mine")
    before = files(tmp_path / "a")
    assert main(["release", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "was changed after --trt-export wrote it" in capsys.readouterr().err
    assert files(tmp_path / "a") == before


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}', '{"format": "pytest-trtcheck release"}'])
def test_a_manifest_that_is_not_ours_is_left_alone(tmp_path: Path, cache: Cache, content: str) -> None:
    (tmp_path / "release.json").write_text(content)
    with pytest.raises(ReportError, match="no release manifest of ours"):
        write(tmp_path, [checked(cache)], cache)
    assert files(tmp_path) == {"release.json": content.encode()}


def test_a_folder_without_an_export_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["release", str(tmp_path)]) == 2
    assert "holds no release.json" in capsys.readouterr().err


def test_edited_manifests_are_understood_or_named(tmp_path: Path, cache: Cache) -> None:
    """Every value of each manifest, replaced by one of another kind or left out: an answer, or a ReportError."""
    write(tmp_path, [checked(cache)], cache)
    for path in sorted(tmp_path.rglob("*.json")):
        whole = path.read_text()
        for place in list(_places(json.loads(whole))):
            for other in (None, 3, "x", ["x"], {"x": "y"}, "leave out"):
                edited = json.loads(whole)
                inner = functools.reduce(lambda value, key: value[key], place[:-1], edited)
                inner[place[-1]] = other
                if other == "leave out":
                    del inner[place[-1]]
                path.write_text(json.dumps(edited))
                with suppress(ReportError):
                    release.check(tmp_path)
        path.write_text(whole)


@pytest.mark.parametrize("edit", [lambda found: found.pop("judged"), lambda found: found["judged"][0].pop("gpu")])
def test_an_edited_manifest_is_not_written_over(tmp_path: Path, cache: Cache, edit: Callable[[Any], object]) -> None:
    write(tmp_path, [checked(cache)], cache)
    path = tmp_path / "typed/conv_fp16/manifest.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ReportError, match="exists, and --trt-export did not write it"):
        write(tmp_path, [checked(cache)], cache)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from _places(inner, (*place, key))
