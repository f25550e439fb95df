"""An exported repository, read by the real server: all but the TensorRT backend, which no CPU has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models
from tests.test_export import built, write
from tests.triton.server import Server, why_not

if TYPE_CHECKING:
    import onnx

    from tests.conftest import Suite

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of TensorRT-RTX, exported: batched, not batched, and with an output of no dims beside the batch."""
    work = tmp_path_factory.mktemp("exported")
    cache = Cache(work / "cache")
    records = [
        built(cache, onnx_models.conv_net()),
        built(cache, onnx_models.gemm_net(), "gemm.onnx"),
        built(cache, row_means(), "means.onnx", profile={"x": ShapeRange((1, 4), (4, 4), (8, 4))}),
    ]
    write(work / "out", records, cache)
    (found,) = (work / "out").rglob("model_repository")
    assert sorted(path.name for path in found.iterdir()) == ["conv_fp16", "gemm_fp16", "means_fp16"]
    return found


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    """A copy of what was exported."""
    return Path(shutil.copytree(exported, tmp_path / "model_repository"))


def row_means() -> onnx.ModelProto:
    """x [N, 4] → y [N]: Triton has to be told of such an output by a reshape."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], "mean", axes=[1], keepdims=0)
    return onnx_models.model([node], {"x": (TensorProto.FLOAT, ["N", 4])}, {"y": (TensorProto.FLOAT, ["N"])})


PROTOS = {"conv_fp16": onnx_models.conv_net, "gemm_fp16": onnx_models.gemm_net, "means_fp16": row_means}
MISSING = "unable to find backend library for backend 'tensorrt'"


def failures(log: str) -> dict[str, str]:
    """By model, why the server does not serve it."""
    return dict(re.findall(r"^\| (\w+) +\| 1 +\| UNAVAILABLE: (.*?) *\|$", log, re.MULTILINE))


def test_the_server_reads_every_config_and_misses_its_tensorrt_backend_alone(repository: Path, tmp_path: Path) -> None:
    planted = repository / "planted"
    shutil.copytree(repository / "conv_fp16", planted)
    config = planted / "config.pbtxt"
    config.write_text(config.read_text().replace("conv_fp16", "planted").replace("TYPE_FP32", "TYPE_FP33"))
    with Server(repository, tmp_path) as server:
        log = server.log
    assert re.findall(r"Poll failed for model directory '(\w+)'", log) == ["planted"], log
    found = failures(log)
    assert set(found) == {"conv_fp16", "gemm_fp16", "means_fp16"}, log
    assert all(MISSING in why for why in found.values()), found


def test_the_same_layout_with_a_python_model_is_served_and_checked(
    repository: Path, tmp_path: Path, suite: Suite
) -> None:
    for folder in repository.iterdir():
        (folder / "1" / "model.plan").unlink()
        config = folder / "config.pbtxt"
        text = config.read_text().replace('platform: "tensorrt_plan"\n', "").replace('"tensorrt"', '"python"')
        config.write_text(f"{text}instance_group [ {{ kind: KIND_CPU count: 1 }} ]\n")
        shutil.copy(Path(__file__).with_name("model.py"), folder / "1" / "model.py")
        onnx_models.save(PROTOS[folder.name](), folder / "1" / "model.onnx")
    planted = repository / "planted"
    shutil.copytree(repository / "conv_fp16", planted)
    config = planted / "config.pbtxt"
    config.write_text(config.read_text().replace("conv_fp16", "planted").replace("[ 3, 16, 16 ]", "[ 3, 16, 17 ]"))

    impossible = repository / "impossible"
    shutil.copytree(repository / "conv_fp16", impossible)
    config = impossible / "config.pbtxt"
    config.write_text(config.read_text().replace("conv_fp16", "impossible").replace("[ 3, 16, 16 ]", "[ 3, 0, 16 ]"))

    onnx_models.save(row_means(), suite.path / "means.onnx")
    suite.write(
        test_served="""
@trt_parity("conv.onnx", precision="fp16", batch=3)
def test_conv(): ...

@trt_parity("gemm.onnx", precision="fp16")
def test_gemm(): ...

@trt_parity("means.onnx", precision="fp16", batch=3)
def test_means(): ...
"""
    )
    with Server(repository, tmp_path) as server:
        # By the names that the export gives them.
        run = suite.run("--trt-backend=triton", f"--trt-triton-url={server.grpc}")
        wrong = suite.run("--trt-backend=triton", f"--trt-triton-url={server.grpc}/planted", "-k", "conv")
        refused = suite.run("--trt-backend=triton", f"--trt-triton-url={server.grpc}/impossible", "-k", "conv")
    assert {record["verdict"] for record in run.checks} == {"pass"}, run.text
    conv, gemm = run.check("test_conv"), run.check("test_gemm")
    assert (conv["server"]["model"], conv["server"]["max_batch_size"]) == ("conv_fp16", 8)
    assert max(map(int, conv["server"]["batches"])) > 1, conv["server"]
    assert (gemm["server"]["model"], gemm["server"]["max_batch_size"]) == ("gemm_fp16", 0)
    assert "takes no batches" in "\n".join(gemm["notes"])
    assert wrong.check("test_conv")["verdict"] == "error"
    assert "[?, 3, 16, 17] on the server" in wrong.check("test_conv")["message"]
    assert refused.check("test_conv")["verdict"] == "error"
    assert "model 'impossible' is not ready" in refused.check("test_conv")["message"]
    assert "dimension" in refused.check("test_conv")["message"]
