"""New engines on a real GPU: what loads and runs them first, what that hands over, and what a crash there costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import onnx_models

if TYPE_CHECKING:
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu

# In the builder's process alone: a context that cannot be made, a run that ends it, one that reads where nothing is.
FAULT = """
import os, sys
if sys.argv[0] == "-c" and os.environ.get("FAULT"):
    import ctypes, time
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    FAULTS = {
        "context": ("_create_context", lambda *_: ctypes.string_at(0)),
        "run": ("enqueue", lambda *_: os.abort()),
        "address": ("upload", lambda self, arrays, into: astray(self, arrays, into)),
    }
    upload = Engine.upload

    def astray(self, arrays, into):
        upload(self, arrays, into)
        for spec in self.inputs:
            self._context.set_tensor_address(spec.name, 4096)

    name, what = FAULTS[os.environ["FAULT"]]
    setattr(Engine, name, what)
"""
TWO = """
@trt_parity("conv.onnx", precision="fp16", batch=2)
def test_it(): ...

@trt_parity("other.onnx", precision="fp16", batch=2)
def test_other(): ...
"""
LOADS = """
import pytest
from pytest_trtcheck.backends.tensorrt import engine, trial

@pytest.fixture(autouse=True)
def told(monkeypatch):
    made, init = [], engine.Engine.__init__

    def spied(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self.jit_cache_used)
        print("loaded with kernels:", self.jit_cache_used, "in", round(self.load_s, 3), "s")

    monkeypatch.setattr(engine.Engine, "__init__", spied)
    monkeypatch.setattr(trial.EngineApart, "__init__", tried(trial.EngineApart.__init__))

def tried(inner):
    def made(self, *args):
        print("a trial")
        inner(self, *args)
    return made
"""


@pytest.fixture
def faulty(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    folder = suite.path / "first"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    onnx_models.save(onnx_models.conv_net(), suite.path / "other.onnx")
    suite.write(test_it=TWO)
    return suite


@pytest.mark.parametrize("measured", [False, True])
def test_kernels_are_compiled_once_and_a_trial_is_made_once(suite: Suite, *, measured: bool) -> None:
    """What only computes is judged where it was tried; what is measured is loaded here, with those kernels."""
    (suite.path / "conftest.py").write_text(LOADS)
    latency = "@trt_latency(p50_ms=1000)\n" * measured
    suite.write(test_it=f'@trt_parity("conv.onnx", precision="fp16", batch=2)\n{latency}def test_it(): ...\n')
    cache = f"--trt-cache-dir={suite.path / 'cache'}"
    cold = suite.run_apart(cache, "-rP")
    cold.result.assert_outcomes(passed=1)
    assert cold.text.count("a trial") == 1
    assert ("loaded with kernels: True" in cold.text) == measured
    assert "loaded with kernels: False" not in cold.text
    (record,) = cold.checks
    assert ("load_ms" in record["costs"]) == measured
    assert record["engine"]["layers_by_precision"]
    assert record["engine"]["device_memory_bytes"] > 0
    assert [*Path(suite.path, "cache").rglob("tried-*.json")]
    warm = suite.run_apart(cache, "-rP")
    warm.result.assert_outcomes(passed=1)
    assert "a trial" not in warm.text
    assert "loaded with kernels: True" in warm.text


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "xdist"])
@pytest.mark.parametrize("fault", ["context", "run", "address"])
def test_an_engine_that_ends_its_process_ends_no_worker(
    faulty: Suite, monkeypatch: pytest.MonkeyPatch, fault: str, workers: tuple[str, ...]
) -> None:
    cache = f"--trt-cache-dir={faulty.path / 'cache'}"
    monkeypatch.setenv("FAULT", fault)
    for cached in (False, True):
        run = faulty.run_apart(cache, *workers)
        run.result.assert_outcomes(failed=2)
        for record in run.checks:
            assert record["verdict"] == "error"
            expected = {"context": "SIGSEGV", "run": "SIGABRT", "address": "ILLEGAL_ADDRESS|illegal memory|err 700"}[
                fault
            ]
            assert any(each in record["message"] for each in expected.split("|")), record["message"]
            assert "Traceback" not in record["message"]
            assert (record["engine"] or {}).get("cached") in {None, cached}
        # The two models are one by content.
        assert len([*Path(faulty.path, "cache").rglob("engine.plan")]) == 1
        assert not [*Path(faulty.path, "cache").rglob("tried-*.json")]
    plans = {path: path.stat().st_mtime_ns for path in Path(faulty.path, "cache").rglob("engine.plan")}
    monkeypatch.setenv("FAULT", "")
    run = faulty.run_apart(cache, *workers)
    run.result.assert_outcomes(passed=2)
    assert all(record["engine"]["cached"] for record in run.checks)
    assert plans == {path: path.stat().st_mtime_ns for path in plans}


def test_an_engine_from_a_file_is_tried_too(faulty: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = f"--trt-cache-dir={faulty.path / 'cache'}"
    faulty.run_apart(cache, "--trt-export=out").result.assert_outcomes(passed=2)
    plan = next((faulty.path / "out").rglob("model.plan"))
    faulty.write(test_it=f'@trt_parity("conv.onnx", batch=2, engine={str(plan)!r})\ndef test_it(): ...\n')
    monkeypatch.setenv("FAULT", "run")
    (record,) = faulty.run_apart(cache).checks
    assert record["verdict"] == "error"
    assert "SIGABRT" in record["message"]
    monkeypatch.setenv("FAULT", "")
    (record,) = faulty.run_apart(cache).checks
    assert record["verdict"] == "pass"


@pytest.mark.parametrize("precision", ["fp8", "fp8+fp16", "fp8+bf16"])
def test_real_models_in_fp8_end_in_a_record(suite: Suite, precision: str) -> None:
    """TensorRT-RTX 1.5 has ended processes that made contexts of such engines: whatever it does, there is a record."""
    suite.write(
        test_it=f"""
def text(seed):
    return np.random.default_rng(seed).integers(0, 257, (1, 2048)).astype(np.int32)

def image(seed):
    return np.random.default_rng(seed).random((1, 3, 320, 320), dtype=np.float32)

@trt_parity({str(onnx_models.magika())!r}, precision={precision!r}, calibration=[text(1), text(2)])
def test_magika():
    return text(0)

@trt_parity({str(onnx_models.nudenet())!r}, precision={precision!r}, calibration=[image(1), image(2)])
def test_nudenet():
    return image(0)
"""
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "--trt-diagnose=0", "-n2")
    assert len(run.checks) == 2, run.text
    for record in run.checks:
        print(record["model"], record["verdict"], (record["message"] or "").splitlines()[:1])
    assert "crashed while running" not in run.text
