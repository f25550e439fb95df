"""ONNX Runtime apart: models that crash it, take all memory or never end are errors of their checks alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.checker import Checker
from pytest_trtcheck.check.request import Allowance, Request
from pytest_trtcheck.errors import ModelError
from pytest_trtcheck.model import ort_runner, proto
from pytest_trtcheck.model.kept_outputs import KeptOutputs
from pytest_trtcheck.model.ort_runner import Limits, OrtRunner
from pytest_trtcheck.model.packing import packed, unpacked
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.spec import ParitySpec
from tests import custom_ops, onnx_models

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_trtcheck.model.apart import Process
    from tests.conftest import Suite

X = {"x": np.arange(4, dtype=np.float32)}
N = 60_000
LINUX = pytest.mark.skipif(os.name == "nt", reason="only Linux holds a process to its memory")


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """Little memory, so that the tests are quick."""
    ort_runner.settle(Limits(memory_bytes=1 << 30))
    yield
    ort_runner.settle(Limits())


def process_id() -> int:
    """The process that models run in, started if need be."""
    return ort_runner._HOST.process()._child.pid


def save(path: Path, nodes: Sequence[onnx.NodeProto], **constants: Any) -> Path:
    """A model from x [4] to y [4], in which the largest element of what `nodes` call "big" has a part."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "nothing"], ["zero"]),
        helper.make_node("Cast", ["zero"], ["whole"], to=TensorProto.INT64),
        *nodes,
        helper.make_node("ReduceMax", ["big"], ["m"], keepdims=0),
        helper.make_node("Add", ["x", "m"], ["sum"]),
        helper.make_node("Mul", ["sum", "x"], ["y"]),
    ]
    arrays = {"nothing": np.float32(0), **constants}
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(proto, path)
    return path


def sized(operator: str, **attributes: Any) -> list[onnx.NodeProto]:
    """An operator whose output is as large as the run says: by "n", to which zero times the input is added."""
    operands = {"ConstantOfShape": ["size"], "Resize": ["one", "", "floats"], "Range": ["nothing", "floats", "step"]}
    return [
        helper.make_node("Add", ["n", "whole"], ["size"]),
        helper.make_node("Cast", ["size"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node(operator, operands.get(operator, ["one", "size"]), ["big"], name="it", **attributes),
    ]


def spread(operator: str) -> list[onnx.NodeProto]:
    """A column and a row, of which an operator makes a matrix."""
    return [
        helper.make_node("Expand", ["x", "many"], ["long"]),
        helper.make_node("Reshape", ["long", "column"], ["a"]),
        helper.make_node("Reshape", ["long", "row"], ["b"]),
        helper.make_node(operator, ["a", "b"], ["big"], name="it"),
    ]


REFUSED = r"it may take 1\.0 GiB \(trt_memory_limit\)\n.*raise the ini key|supported maximum|not a finite"
"""What ends it: our limit, or one of ONNX Runtime's own."""
ONE = np.ones((1, 1), np.float32)
SPREAD = {"many": np.array([N // 4, 4]), "column": np.array([N, 1]), "row": np.array([1, N])}
BOMBS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "ConstantOfShape": (sized("ConstantOfShape"), {"n": np.array([N, N])}),
    "Expand": (sized("Expand"), {"n": np.array([N, N]), "one": ONE}),
    "Tile": (sized("Tile"), {"n": np.array([N, N]), "one": ONE}),
    "Pad": (sized("Pad"), {"n": np.array([0, 0, N, N]), "one": ONE}),
    "Resize": (sized("Resize", mode="nearest"), {"n": np.array([N, N]), "one": ONE}),
    "Range": (sized("Range"), {"n": np.array(N * N), "step": np.float32(1)}),
    "MatMul": (spread("MatMul"), SPREAD),
    "Add": (spread("Add"), SPREAD),
}


def loop(path: Path, *body: onnx.NodeProto, size: int | None) -> Path:
    """A model with a Loop that ends after 2^62 times; its body makes "w" of "v"."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["go"]), *body],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [size]),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [size]),
        ],
    )
    node = helper.make_node("Loop", ["times", "yes", "x"], ["big"], body=inner, name="it")
    return save(path, [node], times=np.array(2**62), yes=np.array(True))


def endless(path: Path) -> Path:
    return loop(path, helper.make_node("Add", ["v", "v"], ["w"]), size=4)


@LINUX
@pytest.mark.parametrize("operator", BOMBS)
def test_what_a_run_would_generate_is_bounded(tmp_path: Path, operator: str) -> None:
    nodes, constants = BOMBS[operator]
    path = save(tmp_path / "bomb.onnx", nodes, **constants)
    assert path.stat().st_size < 1024
    cache = Cache(tmp_path / "cache", 1 << 30)
    model, began = open_model(path, (), cache), time.monotonic()
    emulated = emulation(model, lower(model, "fp16", cache), "fp16", cache)
    # FP16 cannot count so far: to infinity, older releases of ONNX Runtime have a Range of no elements.
    empty = r"|^\[(-inf|nan|\s)+\]$" * (operator == "Range")
    for runs in (Reference(model, cache), emulated):
        try:
            said = str(runs(X)["y"])
        except ModelError as error:
            said = str(error)
        assert re.search(rf"bomb\.onnx.*{operator} node. Name:'it'.*(?:{REFUSED}){empty}", said)
    assert time.monotonic() - began < 30


@LINUX
def test_a_loop_that_doubles_is_bounded_too(tmp_path: Path) -> None:
    path = loop(tmp_path / "double.onnx", helper.make_node("Concat", ["v", "v"], ["w"], axis=0), size=None)
    with pytest.raises(ModelError, match=r"it may take 1\.0 GiB"):
        OrtRunner(path, "double.onnx")(X)


@LINUX
def test_what_loading_folds_is_bounded(tmp_path: Path) -> None:
    # ONNX Runtime computes what depends on no input when it loads a model, and would keep it.
    nodes = [helper.make_node("Expand", ["one", "n"], ["big"], name="it")]
    path = save(tmp_path / "folds.onnx", nodes, one=ONE, n=np.array([N, N]))
    with pytest.raises(ModelError, match=r"it may take 1\.0 GiB"):
        OrtRunner(path, "folds.onnx")(X)


def test_what_never_ends_is_stopped(tmp_path: Path) -> None:
    ort_runner.settle(Limits(seconds=1.0))
    runner = OrtRunner(endless(tmp_path / "endless.onnx"), "endless.onnx")
    with pytest.raises(ModelError, match=r"endless\.onnx, on x \[4\]: ONNX Runtime did not finish within 1 s") as info:
        runner(X)
    assert "trt_time_limit" in info.value.hint
    runner.close()


def test_large_models_and_inputs_have_more_time() -> None:
    limits = Limits()
    assert limits.allowed_s(300, 16) == pytest.approx(30, abs=0.01)
    assert limits.allowed_s(12_000_000, 0) == pytest.approx(31.2)
    assert limits.allowed_s(12_000_000, 1_200_000) == pytest.approx(30 + 1.2 + 1440)
    assert limits.allowed_s(10**12, 10**12) == 3600
    assert Limits(seconds=7200).allowed_s(10**12, 10**12) == 7200


def test_a_runner_outlives_the_death_of_the_process(tmp_path: Path) -> None:
    runner = OrtRunner(onnx_models.save(onnx_models.gemm_net(), tmp_path / "gemm.onnx"), "gemm")
    session = onnx.load(tmp_path / "gemm.onnx").graph.input[0]
    shape = [each.dim_value or 2 for each in session.type.tensor_type.shape.dim]
    feed = {session.name: np.ones(shape, np.float32)}
    first, dead = runner(feed), process_id()
    ort_runner.settle(Limits(seconds=1.0))
    with pytest.raises(ModelError):
        OrtRunner(endless(tmp_path / "endless.onnx"), "endless")(X)
    for name, found in runner(feed).items():
        np.testing.assert_array_equal(found, first[name])
    assert process_id() != dead
    os.kill(process_id(), signal.SIGKILL)
    with pytest.raises(ModelError, match=r"crashed \(SIGKILL\), most likely for want of memory"):
        runner(feed)
    runner(feed)
    runner.close()


def test_every_type_arrives_as_it_was_sent() -> None:
    arrays: dict[str, Any] = {
        "scalar": np.array(1.5),
        "empty": np.zeros((0, 3), np.int64),
        "bool": np.array([[True, False]]),
        "big_endian": np.arange(3, dtype=">f4"),
        "strided": np.arange(12, dtype=np.float16).reshape(3, 4).T,
        "bfloat16": np.array([1, 2], ml_dtypes.bfloat16),
        "fp8": np.array([1, 2], ml_dtypes.float8_e4m3fn),
        "texts": np.array([["a", "é\n"]]),
    }
    described, blobs = packed(arrays)
    found = unpacked(described, [bytes(blob) for blob in blobs])
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == (object if name == "texts" else array.dtype.newbyteorder("="))
    with pytest.raises(ModelError, match="'maps' is no tensor"):
        packed({"maps": np.array([{"a": 1}], object)})


def crashing_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A custom-op library whose kernel writes where it must not."""
    planted = custom_ops._SOURCE.replace("y[i] = x[i] * x[i] * x[i];", "*(volatile int *)8 = 1;")
    assert planted != custom_ops._SOURCE
    monkeypatch.setattr(custom_ops, "_SOURCE", planted)
    return custom_ops.library(folder)


def test_a_library_that_crashes_is_named_with_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = crashing_library(tmp_path, monkeypatch)
    path = onnx_models.save(custom_ops.model(), tmp_path / "cube.onnx")
    runner = OrtRunner(path, "cube.onnx", custom_ops=[str(library)])
    with pytest.raises(ModelError, match=r"cube\.onnx, on x \[2, 4\]: ONNX Runtime's process crashed \(SIGSEGV\)") as e:
        runner({"x": np.ones((2, 4), np.float32)})
    assert "custom_ops" in e.value.hint
    runner.close()


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "n2"])
def test_the_session_goes_on(suite: Suite, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]) -> None:
    crashing_library(suite.path, monkeypatch)
    onnx_models.save(custom_ops.model(), suite.path / "cube.onnx")
    endless(suite.path / "endless.onnx")
    save(suite.path / "bomb.onnx", BOMBS["Add"][0], **BOMBS["Add"][1])
    suite.pytester.makeini("[pytest]\ntrt_time_limit = 3\ntrt_memory_limit = 1 GiB\n")
    suite.write(
        test_it=r"""
from pytest_trtcheck.spec import BuildOptions

@pytest.fixture
def trt_build_options(request):
    return BuildOptions(custom_ops=["libcube.so"]) if request.node.name == "test_cube" else None

def test_cube(trt_reference):
    with pytest.raises(CheckError, match=r"cube\.onnx, on x \[2, 4\]: ONNX Runtime's process crashed \(SIGSEGV\)"):
        trt_reference("cube.onnx")({"x": np.ones((2, 4), np.float32)})

@pytest.mark.parametrize("name", ["endless", "bomb", "conv"])
def test_model(name, trt_check):
    trt_check(f"{name}.onnx", precision="fp16", batch=1 if name == "conv" else None)
"""
    )
    run = (suite.run_apart if workers else suite.run)(*workers, "--trt-backend=onnxruntime")
    run.result.assert_outcomes(passed=2, failed=2)
    found = {Path(check["model"]).stem: check for check in run.checks}
    assert {name: check["verdict"] for name, check in found.items()} == {
        **dict.fromkeys(("endless", "bomb"), "error"),
        "conv": "pass",
    }
    assert "did not finish within 3 s" in found["endless"]["message"]
    assert "it may take 1.0 GiB" in found["bomb"]["message"]


def test_a_warm_check_starts_no_process(suite: Suite) -> None:
    suite.write(
        test_it="""
from pytest_trtcheck import trt_parity
from pytest_trtcheck.model import ort_runner

@trt_parity("conv.onnx", batch=1)
def test_conv():
    ort_runner._HOST.end()

def test_process():
    assert (ort_runner._HOST._process is None) == WARM
"""
    )
    text = (suite.path / "test_it.py").read_text()
    for warm in (False, True):
        (suite.path / "test_it.py").write_text(text.replace("WARM", str(warm)))
        suite.run("--trt-backend=onnxruntime", "--trt-cache-dir=fresh").result.assert_outcomes(passed=2)


class Counting:
    """A session that counts those of its kind that are open."""

    open = most = opened = 0

    def __init__(self) -> None:
        Counting.open += 1
        Counting.opened += 1
        Counting.most = max(Counting.most, Counting.open)

    def __call__(self, case: dict[str, Any], /) -> dict[str, Any]:
        return {"y": case["x"] + 1}

    def close(self) -> None:
        Counting.open -= 1


@pytest.mark.parametrize(("is_large", "keeps", "most"), [(True, True, 1), (False, True, 2), (True, False, 2)])
def test_of_large_models_one_session_is_open(is_large: bool, keeps: bool, most: int, tmp_path: Path) -> None:
    """Where outputs are not kept, each case would open both again."""
    Counting.open = Counting.most = Counting.opened = 0
    cases = [{"x": np.full(3, number, np.float32)} for number in range(4)]
    both = [
        KeptOutputs(Cache(tmp_path), kind, "m.onnx", {"model": "1"}, Counting, is_large=is_large)
        for kind in ("reference", "emulation")
    ]
    for each in both:
        each.keeps = keeps
    both[0].keep(cases)
    assert Counting.open == 0 or not is_large
    for case in cases:
        for each in both:
            assert np.array_equal(each(case)["y"], case["x"] + 1)
    both[0].computed(cases[0])
    assert Counting.most == most
    assert Counting.opened == (3 if most == 1 else 2)
    for each in both:
        each.close()
    assert Counting.open == 0


@pytest.mark.parametrize("another", [False, True], ids=["alone", "against another model"])
def test_a_check_of_a_large_model_opens_one_session_at_a_time(
    another: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several cases that fail, so that the reference is looked at again; a quantized model's original, too."""
    path = onnx_models.save(onnx_models.gemm_net(), tmp_path / "m.onnx")
    original = onnx_models.save(onnx_models.gemm_net(), tmp_path / "original.onnx")
    open_now: set[int] = set()
    most: list[int] = []
    ask = ort_runner._HOST.ask

    def watched(process: Process, request: dict[str, Any], *rest: Any) -> Any:
        answer = ask(process, request, *rest)
        if request["do"] == "open":
            open_now.add(answer.value)
            most[-1] = max(most[-1], len(open_now))
        elif request["do"] == "close":
            open_now.discard(request["number"])
        return answer

    monkeypatch.setattr(ort_runner._HOST, "ask", watched)
    cases = [{"x": np.random.default_rng(seed).standard_normal((2, 4), dtype=np.float32)} for seed in range(3)]
    spec = ParitySpec(precision=("fp16",), tol=1e-9, reference=str(original) if another else None)
    parities = []
    for large_from in (1 << 30, 0):
        monkeypatch.setattr(proto, "LARGE_MODEL", large_from)
        most.append(0)
        checker = Checker(cache=Cache(tmp_path / str(large_from)), allowance=Allowance(0))
        record = checker.check(Request(nodeid="t", model=str(path), folders=(tmp_path,), parity=spec, inputs=cases))
        assert record.verdict == "fail", record.message
        parities.append(record.parity)
    assert parities[0] == parities[1]
    assert most == [2, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux' C library")
def test_what_is_freed_goes_back_to_the_system() -> None:
    """Once large memory was freed, the C library keeps what is freed later, unless it is told not to."""
    program = """
import ctypes, sys
from pytest_trtcheck.model import memory
if sys.argv[1] == "told":
    memory.give_back()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def held():
    return int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0])
library.free(library.malloc(30 << 20))
before = held()
large = library.malloc(29 << 20)
library.memset(large, 1, 29 << 20)
small = [library.malloc(100_000) for _ in range(50)]
library.free(large)
print((held() - before) >> 10)
"""
    kept = {
        word: int(subprocess.run([sys.executable, "-c", program, word], capture_output=True, check=True).stdout)
        for word in ("told", "untold")
    }
    assert kept["told"] < 8
    assert kept["untold"] >= kept["told"]
