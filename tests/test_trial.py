"""The first load and run of an engine in a process of its own, with an engine that does what it is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from pytest_trtcheck.backends.base import EngineSpec, Machine
from pytest_trtcheck.backends.tensorrt import backend, trial
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.backend import TensorRT
from pytest_trtcheck.backends.tensorrt.module import Target, TensorRTModule, find_module
from pytest_trtcheck.backends.tensorrt.trial import Trial, kernels_of
from pytest_trtcheck.cache import Cache, Entry, Key, hash_bytes
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.steps import asked
from pytest_trtcheck.errors import CachePlaceError, CheckError, GpuError
from pytest_trtcheck.gpu.device import Gpu
from pytest_trtcheck.gpu.names import find_gpu
from pytest_trtcheck.model import apart
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import Lowered, lower
from pytest_trtcheck.spec import BuildOptions, ParitySpec
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable

# The child finds it before anything else: it has no GPU, and does with an engine what the plan says.
STAND_IN = """
import ctypes, json, os, sys, time
from pathlib import Path
if sys.argv[0] == "-c":
    from pytest_trtcheck.backends.tensorrt import builder, engine, module
    from pytest_trtcheck.errors import CheckError, GpuError

    def do(what):
        with Path(os.environ["TRIED"]).open("a") as file:
            file.write(what + "\\n")
        if what == "die":
            for listener in builder.listeners:
                listener("ERROR", "Error Code 9: last words")
            ctypes.string_at(0)
        elif what == "hang":
            time.sleep(600)
        elif what == "refuse":
            raise GpuError("not on this GPU", "take another")

    class Engine:
        device_memory_bytes, context_bytes, aux_streams, streamed_bytes = 4096, 1024, 1, None

        def __init__(self, plan, module, *, jit_cache, **arguments):
            self.kernels = jit_cache or b"compiled"
            load, self.runs = json.loads(plan) if plan.startswith(b"[") else os.environ["DO"].split()
            do(load)

        def __call__(self, case):
            do(self.runs)
            told = {name: [array.dtype.name, array.shape, float(array.sum())] for name, array in case.items()}
            do("fed " + json.dumps(told))
            return case

        def layer_information(self):
            return '{"Layers": [{"Name": "gemm", "Inputs": [{"Format/Datatype": "Half"}]}]}'

        def jit_cache(self):
            return self.kernels

    engine.Engine = Engine
    module.find_module = lambda *names: None
"""
RTX = TensorRTModule("tensorrt_rtx", "1.5.0.114", None)
GPU = Gpu(
    name="NVIDIA A100", model=find_gpu("A100"), compute_capability=(8, 0), uuid="GPU-of-a-trial", driver="580.1.2"
)


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    (tmp_path / "first").mkdir()
    (tmp_path / "first/sitecustomize.py").write_text(STAND_IN)
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'first'}:{root}")
    log = tmp_path / "log"
    monkeypatch.setenv("TRIED", str(log))

    def since() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return since


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., tuple[Trial, Entry]]:
    """An engine in a cache that loads and runs as it is said, and its trial."""

    def make(load: str = "load", run: str = "run", **changes: Any) -> tuple[Trial, Entry]:
        plan = json.dumps([load, run])
        entry = Cache(tmp_path / "cache").get_or_make(
            Key("engine", "m.onnx", {"plan": plan}), lambda folder: (folder / "engine.plan").write_text(plan)
        )
        case = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
        made = Trial(
            RTX, GPU, entry.path / "engine.plan", hash_bytes(plan.encode()), "the engine of m.onnx in fp8", cases=[case]
        )
        return replace(made, **changes), entry

    return make


def test_what_came_through_is_marked_and_not_tried_again(tried: Any, kept: Any) -> None:
    made, entry = kept()
    assert not made.is_done(entry)
    made.beside(entry)
    assert tried() == ["load", "run", 'fed {"x": ["float32", [2, 3], 15.0]}']
    assert kernels_of(entry) == b"compiled"
    made.beside(entry)
    assert tried() == []
    for other in (
        replace(made, sha256="1" * 64),
        replace(made, gpu=replace(GPU, driver="580.1.3")),
        replace(made, gpu=replace(GPU, name="NVIDIA H100")),
        replace(made, module=replace(RTX, version="1.5.0.115")),
        replace(made, arguments={"profile": 1}),
    ):
        assert not other.is_done(entry), other


def test_an_engine_that_was_only_loaded_is_run_once_there_are_inputs(tried: Any, kept: Any) -> None:
    made, entry = kept()
    replace(made, cases=()).beside(entry)
    assert tried() == ["load"]
    assert not made.is_done(entry)
    made.beside(entry)
    assert [line.split()[0] for line in tried()] == ["load", "run", "fed"]


def test_each_shape_is_fed_once_in_its_own_type(tried: Any, kept: Any) -> None:
    shapes = [(2, 3), (2, 3), (1, 3), (0, 3)]
    cases = [{"x": np.ones(shape, ml_dtypes.bfloat16), "length": np.int64(4)} for shape in shapes]
    made, entry = kept(cases=cases)
    made.beside(entry)
    fed = [json.loads(line[4:]) for line in tried() if line.startswith("fed")]
    assert [each["x"] for each in fed] == [
        ["bfloat16", [2, 3], 6.0],
        ["bfloat16", [1, 3], 3.0],
        ["bfloat16", [0, 3], 0.0],
    ]
    assert all(each["length"] == ["int64", [], 4.0] for each in fed)


@pytest.mark.parametrize(("load", "run", "when"), [("die", "run", "loaded"), ("load", "die", "run")])
def test_one_that_ends_its_process_is_an_error_and_tried_again(
    tried: Any, kept: Any, load: str, run: str, when: str
) -> None:
    made, entry = kept(load, run)
    for _ in range(2):  # What happened once is no verdict on what would happen now.
        with pytest.raises(GpuError, match=rf"m\.onnx in fp8 was not {when}: .* crashed \(SIGSEGV\)") as info:
            made.beside(entry)
        assert "last words" in info.value.message
        assert "try another precision" in info.value.hint
        assert not info.value.poisoned
        assert "die" in tried()
    assert not made.is_done(entry)


def test_one_that_hangs_is_stopped_and_not_waited_for_again(
    tried: Any, kept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, entry = kept("load", "hang")
    monkeypatch.setattr(trial, "RUN_LIMIT_S", 0.5)
    with pytest.raises(GpuError, match=r"was not run: .* did not finish within"):
        made.beside(entry)
    assert "hang" in tried()
    with pytest.raises(GpuError, match="nobody waited for it again") as info:
        made.beside(entry)
    assert "tried again in 60 min" in info.value.hint
    assert tried() == []
    for text in (b"{}", b'{"at": "now", "message": "m"}', b'{"at": 1e999, "message": "m"}', b"[1]", b"\xff"):
        entry.write_extra(made._name("stopped"), text)
        with pytest.raises(GpuError, match="did not finish within"):
            made.beside(entry)
        assert "hang" in tried()
    monkeypatch.setattr(trial, "STOPPED_S", 0.0)
    with pytest.raises(GpuError, match="did not finish within"):
        made.beside(entry)
    assert "hang" in tried()
    assert not made.is_done(entry)


def test_who_only_computes_goes_on_where_it_was_tried(tried: Any, kept: Any) -> None:
    made, entry = kept()
    engine = made.beside(entry)
    tried()
    case = {"x": np.full((2, 3), 2, np.float32), "half": np.ones(2, ml_dtypes.bfloat16)}
    outputs = engine(case)
    assert [line.split()[0] for line in tried()] == ["run", "fed"]
    assert list(outputs) == ["x", "half"]
    for name, array in case.items():
        np.testing.assert_array_equal(outputs[name], array)
    assert (engine.device_memory_bytes, engine.context_bytes, engine.aux_streams) == (4096, 1024, 1)
    assert (engine.streamed_bytes, engine.new_kernels()) == (None, None)
    assert engine.layers_by_precision() == {"fp16": 1}
    engine.close()
    engine.close()
    assert not engine._process.close.alive
    assert not engine._messages.parent.exists()


def test_what_was_changed_since_it_was_looked_at_is_not_run(tried: Any, kept: Any) -> None:
    made, entry = kept()
    made.plan.write_text(json.dumps(["load", "run "]))
    with pytest.raises(GpuError, match=r"m\.onnx in fp8: was changed on disk during the check"):
        made.beside(entry)
    assert tried() == []
    assert not made.is_done(entry)


def test_its_death_after_the_trial_is_an_error_too(tried: Any, kept: Any) -> None:
    made, entry = kept()
    engine = made.beside(entry)
    engine._process._child.kill()
    for _ in range(2):
        with pytest.raises(GpuError, match=r"was not run: .* crashed \(SIGKILL\)"):
            engine({"x": np.ones((2, 3), np.float32)})
    tried()
    engine.close()


def test_what_was_ended_and_is_asked_all_the_same_says_so(tried: Any, kept: Any) -> None:
    made, _ = kept()
    engine = made.beside(kept()[1])
    engine.close()
    with pytest.raises(GpuError, match=r"was not run: .* the builder process was ended before it was asked"):
        engine({"x": np.ones((2, 3), np.float32)})
    tried()


def test_every_type_and_size_comes_through(tried: Any, kept: Any) -> None:
    made, entry = kept()
    case = {
        "empty": np.zeros((0, 3), np.float32),
        "bool": np.array([True, False]),
        "fp8": np.ones(3, ml_dtypes.float8_e4m3fn),
        "int4": np.ones(3, ml_dtypes.int4),
        "big_endian": np.arange(3, dtype=">f4"),
        "scalar": np.array(3.0),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "large": np.ones(5_000_000, np.float32),
    }
    engine = made.beside(entry)
    found = engine(case)
    engine.close()
    for name, array in case.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype.newbyteorder("="), array.shape)
        np.testing.assert_array_equal(found[name], array)
    tried()


@pytest.mark.parametrize(("load", "run"), [("refuse", "run"), ("load", "refuse")])
def test_what_the_engine_says_is_passed_on(tried: Any, kept: Any, load: str, run: str) -> None:
    made, entry = kept(load, run)
    with pytest.raises(GpuError, match="not on this GPU") as info:
        made.beside(entry)
    assert info.value.hint == "take another"
    assert not made.is_done(entry)
    assert "refuse" in tried()


# --- behind a real build ----------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Any, list[str]]]:
    """Ask for an engine as a check does, on a machine that seems to have the GPU; what was built meanwhile."""
    pytest.importorskip("tensorrt_rtx")
    cache = Cache(tmp_path / "cache")
    proto = onnx_models.gemm_net()
    model = open_model(proto, (), cache)
    case = {
        spec.name: np.ones([dim if isinstance(dim, int) else 2 for dim in spec.shape], np.float32)
        for spec in model.inputs
    }
    system = TensorRT(find_module("tensorrt_rtx"), Target((8, 0), here=False), "A100", GPU)
    profile: Any = {}
    spec = EngineSpec(model, Lowered(model.path, model.sha256), "fp32", profile, BuildOptions(), cases=[case])
    builds: list[str] = []
    build = tensorrt.build

    def counted(*args: Any, **kwargs: Any) -> Any:
        builds.append("build")
        return build(*args, **kwargs)

    monkeypatch.setattr(tensorrt, "build", counted)

    def ask() -> tuple[Any, list[str]]:
        builds.clear()
        try:
            return system.build(spec, cache), [*builds]
        except CheckError as error:
            return error, [*builds]

    return ask


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[apart.Process]:
    """Those in which what they built is tried."""
    found: list[apart.Process] = []
    into = Trial.into

    def noted(self: Trial, folder: Path, process: apart.Process) -> trial.EngineApart:
        found.append(process)
        return into(self, folder, process)

    monkeypatch.setattr(Trial, "into", noted)
    return found


def test_the_process_that_built_it_loads_and_runs_it(tried: Any, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO", "load run")
    made, builds = built()
    assert builds == ["build"]
    assert [line.split()[0] for line in tried()] == ["load", "run", "fed"]
    assert kernels_of(made.entry) == b"compiled"
    made, builds = built()
    assert (builds, tried(), made.record.cached) == ([], [], True)


def test_of_two_builds_that_of_the_entry_is_the_one_that_is_judged(
    tried: Any, built: Any, processes: list[apart.Process], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What cannot be kept where the cache is, is made again in a temporary directory."""
    monkeypatch.setenv("DO", "load run")
    full, get = tmp_path / "full", Cache._get_or_make
    full.mkdir()

    def filled(self: Cache, key: Key, make: Any, *, shared: bool) -> Entry:
        if key.kind == "engine" and not self._is_spare:
            make(full)
            raise CachePlaceError("the cache directory is full", "free some space")
        return get(self, key, make, shared=shared)

    monkeypatch.setattr(Cache, "_get_or_make", filled)
    made, builds = built()
    assert builds == ["build", "build"]
    assert [process.close.alive for process in processes] == [False, True]
    assert made.loaded._process is processes[-1]
    assert made.loaded._trial.sha256 == made.record.sha256
    made.close()
    tried()


def test_what_was_tried_is_ended_where_something_else_goes_wrong(
    tried: Any, built: Any, processes: list[apart.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DO", "load run")

    def refuse(*args: Any) -> None:
        raise CheckError("no room")

    for owner, name in ((backend, "_io"), (TensorRT, "_found")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            error, _ = built()
        assert error.message == "no room"
        assert [process.close.alive for process in processes] == [False] * len(processes)
    tried()


@pytest.mark.parametrize("changed", [False, True])
def test_a_builder_that_was_expected_is_the_one_that_builds(
    tried: Any, built: Any, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    monkeypatch.setenv("DO", "load run")
    started: list[apart.Process] = []
    init = apart.Process.__init__

    def counted(self: apart.Process, *args: Any, **kwargs: Any) -> None:
        started.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(apart.Process, "__init__", counted)
    TensorRT.expect_build()
    TensorRT.expect_build()
    assert len(started) == 1
    if changed:  # It would build with the libraries and variables of a moment ago.
        monkeypatch.setenv("TRTCHECK_OF_A_TEST", "1")
    made, builds = built()
    assert builds == ["build"]
    assert len(started) == 1 + changed
    assert [line.split()[0] for line in tried()] == ["load", "run", "fed"]
    assert [process.close.alive for process in started] == [*[False] * changed, True], "the engine's own"
    made.close()
    assert not started[-1].close.alive
    TensorRT.expect_build()
    TensorRT.dismiss_builder()
    assert not started[-1].close.alive


def test_one_that_dies_is_not_built_again(tried: Any, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO", "die run")
    error, builds = built()
    assert (builds, tried()) == (["build"], ["die"])
    assert "was not loaded" in error.message
    assert "SIGSEGV" in error.message
    error, builds = built()
    assert (builds, tried()) == ([], ["die"])
    assert "SIGSEGV" in error.message
    monkeypatch.setenv("DO", "load run")  # a driver that was mended, memory that was free again
    made, builds = built()
    assert (builds, made.record.cached) == ([], True)
    assert [line.split()[0] for line in tried()] == ["load", "run", "fed"]


def test_the_real_loader_is_quoted_where_there_is_no_gpu(built: Any) -> None:
    error, builds = built()
    assert builds == ["build"]
    assert "CUDA device 0 cannot be used" in error.message or "cuda-bindings" in error.message
    assert built()[1] == []


def test_the_builder_gets_ready_where_something_will_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    expected: list[bool] = []
    monkeypatch.setattr(tensorrt, "expect_build", lambda: expected.append(True))
    model = open_model(onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx"), (), cache)

    def is_expected(gpu: Gpu | None = GPU, **changes: Any) -> bool:
        expected.clear()
        settings = Checker(cache=cache, machine=Machine(detected=gpu))
        asked._expect_build(settings, replace(Request("a", str(model.path), ()), **changes), model)
        return bool(expected)

    half: dict[str, Any] = {"parity": ParitySpec(precision=("fp16",))}
    whole: dict[str, Any] = {"parity": ParitySpec(precision=("fp32",))}
    assert is_expected(**half)
    assert is_expected(**whole)
    assert not is_expected(None, **half)
    assert not is_expected(parity=ParitySpec(precision=("fp16",), backend="onnxruntime"))
    lower(model, "fp16", cache)
    assert not is_expected(**half)
    assert is_expected(**whole)
    cache.get_or_make(Key("engine", model.label, {"lowered": model.sha256}), lambda folder: (folder / "a").touch())
    assert not is_expected(**whole)
