"""The worst input, and Hypothesis's examples, on a real engine: it fails where its emulation says that FP16 does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from pytest_trtcheck import Search
from pytest_trtcheck.backends.base import Machine
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.arguments import from_marker
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.request import Allowance
from tests import onnx_models
from tests.test_search import cancelling

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.record import CheckRecord
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu


def checked(proto: onnx.ModelProto, folder: Path, gpu: Gpu, search: object, shapes: object) -> CheckRecord:
    spec = from_marker("trt_parity", (), {"search": search, "shapes": shapes})
    request = Request("tests/test_a.py::test_a", proto, (folder,), spec, search_folder=folder / "trtcheck_inputs")
    return Checker(Cache(folder / "cache"), machine=Machine(detected=gpu), allowance=Allowance(0)).check(request)


@pytest.mark.parametrize("rows", [1, 32], ids=["one at a time", "32 at a time"])
def test_an_engine_that_fails_on_what_ordinary_inputs_miss(tmp_path: Path, real_gpu: Gpu, rows: int) -> None:
    shapes = {"x": ((1, 64), (1, 64), (rows, 64))}
    assert checked(cancelling(), tmp_path, real_gpu, None, shapes).verdict == "pass"
    record = checked(cancelling(), tmp_path, real_gpu, Search(2000), shapes)
    assert record.evidence == "engine"
    assert record.search is not None
    assert record.search.own_usage < 1
    # TensorRT may fuse what cancels and keep it in FP32: then nothing is found, and all was tried.
    if record.verdict == "pass":
        assert record.search.tries == 2000
        return
    assert record.verdict == "fail"
    assert checked(cancelling(), tmp_path, real_gpu, None, shapes).verdict == "fail"


def overflowing() -> onnx.ModelProto:
    """A product, squared: beyond FP16 on no engine less than on the emulation."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    weights = {"w": onnx_models.weights((64, 64), 1, 3.0), "v": np.full((64, 8), 40.0, np.float32)}
    floats = TensorProto.FLOAT
    return onnx_models.model(nodes, {"x": (floats, ["N", 64])}, {"y": (floats, ["N", 8])}, weights)


def test_an_overflow_is_found_on_the_engine(tmp_path: Path, real_gpu: Gpu) -> None:
    shapes = {"x": ((1, 64), (1, 64), (16, 64))}
    record = checked(overflowing(), tmp_path, real_gpu, Search(1000, (0, 1)), shapes)
    assert record.evidence == "engine"
    assert record.verdict == "fail", record.message


def test_examples_share_one_engine_on_the_gpu(suite: Suite) -> None:
    onnx_models.save(cancelling(gain=0.01), suite.path / "ranker.onnx")
    suite.write(
        test_a="""
from hypothesis import given, settings
from pytest_trtcheck import strategies

@settings(max_examples=30, database=None)
@given(inputs=strategies.inputs("ranker.onnx", batch=(1, 8)))
def test_ranker(trt_check, inputs):
    trt_check("ranker.onnx", inputs, tol=0.2)
"""
    )
    run = suite.run("-q", "--trt-require-gpu", "--trt-cache-dir=cache")
    assert run.checks[0]["verdict"] in {"pass", "fail"}, run.text
    assert run.checks[0]["evidence"] == "engine"
    assert run.checks[0]["examples"] >= 1
    listed = suite.run("-q", "--trt-cache-show", "--trt-cache-dir=cache").text
    assert listed.count("\n  engine: ") == 1, listed
