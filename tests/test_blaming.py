"""A diagnosis as a check makes it: what is kept of it, what is shown meanwhile, and what TF32 is called."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import blame as blaming
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Allowance, Request
from pytest_trtcheck.diagnose import diagnosis, trace
from pytest_trtcheck.record import jsonable
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models
from tests.diagnosed import conv_chain, image, overflowing_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_trtcheck.record import CheckRecord
    from tests.conftest import Suite

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., CheckRecord]:
    """Makes the same failing check again and again, with one cache."""
    onnx_models.save(conv_chain(5, extra=overflowing_block(2)), tmp_path / "model.onnx")

    def make(seconds: float = 60.0, progress: Callable[[str], None] = lambda _: None) -> CheckRecord:
        checker = check.Checker(cache=Cache(tmp_path / "cache"), allowance=Allowance(seconds), progress=progress)
        return checker.check(
            Request("t", "model.onnx", (tmp_path,), parity=ParitySpec(precision=("fp16",)), inputs=[image()])
        )

    return make


def blame_of(record: CheckRecord) -> dict[str, Any]:
    assert record.verdict == "fail", record.message
    assert record.parity is not None
    assert record.parity.blame is not None
    plain: dict[str, Any] = jsonable(record.parity.blame)
    return plain


def test_a_diagnosis_is_kept(made: Callable[..., CheckRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    first = blame_of(made())
    assert first["is_complete"]

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was diagnosed again")

    monkeypatch.setattr(diagnosis._Diagnosis, "run", never)
    # Time that was enough once is: how much there is now does not matter.
    for seconds in (60.0, 30.0):
        assert blame_of(made(seconds))["keep_fp32"] == list(first["keep_fp32"])


def test_one_that_ran_out_of_time_is_not_kept(made: Callable[..., CheckRecord]) -> None:
    hurried = blame_of(made(1e-6))
    assert not hurried["is_complete"]
    assert hurried["keep_fp32"] is None
    assert any("the budget is spent" in note for note in hurried["notes"])
    # The first answer is there all the same.
    assert hurried["culprit"]["node"] == "scale_up"
    found = blame_of(made())
    assert found["is_complete"]
    assert set(found["keep_fp32"]) == {"scale_up", "scale_down"}


def test_one_that_broke_off_is_not_kept(made: Callable[..., CheckRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("this is planted")

    with monkeypatch.context() as patch:
        patch.setattr(trace, "trace", broken)
        found = blame_of(made())
    assert not found["is_complete"]
    assert any("broke off" in note and "this is planted" in note for note in found["notes"])
    assert blame_of(made())["is_complete"]


def test_a_long_one_shows_how_far_it_is_and_how_to_limit_it(
    made: Callable[..., CheckRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(blaming, "_LONG_S", 0.0)
    monkeypatch.setattr(diagnosis, "_LONG_S", 0.0)
    monkeypatch.setattr(diagnosis, "_PACE_S", 0.0)
    record = made(progress=lines.append)
    assert all("--trt-diagnose" in line for line in lines)
    first = next(index for index, line in enumerate(lines) if "so far, tensor 'scaled_up' overflows" in line)
    assert any("sets tried" in line for line in lines[first:])
    assert "this diagnosis took" in str(record.message)
    assert "--trt-diagnose=SECONDS limits it" in " ".join(str(record.message).split())


def test_a_short_one_says_nothing_of_it(made: Callable[..., CheckRecord]) -> None:
    lines: list[str] = []
    record = made(progress=lines.append)
    assert blame_of(record)["seconds"] < 10
    assert lines
    assert not any("--trt-diagnose" in line for line in lines)
    assert "--trt-diagnose" not in str(record.message)


def test_nothing_is_advised_that_the_diagnosis_does_not(made: Callable[..., CheckRecord]) -> None:
    """The list that was confirmed stands alone; without a diagnosis there is general advice."""
    advice = "keep the nodes that overflow or underflow in FP32"
    record = made()
    assert "confirmed on all inputs by emulation" in str(record.message)
    assert advice not in " ".join(str(record.message).split())
    assert advice in " ".join(str(made(0).message).split())


HALF = """
from onnx import TensorProto, helper, numpy_helper

def model():
    w = numpy_helper.from_array(np.full(3, 300, np.float16), "w")
    nodes = [helper.make_node("Mul", ["x", "w"], ["m"]), helper.make_node("Mul", ["m", "w"], ["n"]),
             helper.make_node("Div", ["n", "w"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [3]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

@trt_parity(model(), precision="fp16")
def test_half():
    return np.array([1, 2, -3], np.float16)
"""


@pytest.mark.parametrize("seconds", ["0", "60"])
def test_advice_on_a_model_that_is_taken_as_it_is_can_be_followed(suite: Suite, seconds: str) -> None:
    suite.write(test_half=HALF)
    run = suite.run(f"--trt-diagnose={seconds}", "--tb=short")
    run.result.assert_outcomes(failed=1)
    text = " ".join(run.text.split())
    assert "keep_fp32=[" not in text
    assert "with keep_fp32=" not in text
    assert "export" in text


# --- FP32 on TensorRT-RTX --------------------------------------------------------------------------------------------

FP32 = """
@trt_parity("conv.onnx", precision="fp32", batch=2)
def test_default(): ...

@trt_parity("conv.onnx", precision="fp32", batch=2, tol=1e-7)
def test_tight(): ...
"""


@needs_rtx
def test_fp32_on_tensorrt_rtx_is_tf32_and_is_called_so(suite: Suite) -> None:
    suite.write(test_fp32=FP32)
    run = suite.run("--trt-gpu=L4", "--trt-backend=tensorrt_rtx", "--tb=short")
    run.result.assert_outcomes(passed=1, failed=1)
    assert [record["precision"] for record in run.checks] == ["tf32 (asked fp32)"] * 2
    default, tight = (record["parity"] for record in run.checks)
    assert default["tol"] == 5e-3
    assert tight["tol"] == 1e-7
    assert 1e-5 < default["worst"] < 5e-3
    assert "tf32 (asked fp32)" in run.text
    assert tight["blame"]["keep_fp32"] is None
    assert tight["blame"]["step"] in {"precision", "spread"}
    assert "precision='fp32'" not in run.text
    assert "keep_fp32=" not in run.text
    assert any("has no FP32 matrix products" in note for note in run.checks[0]["notes"])


def test_fp32_without_tensorrt_rtx_is_fp32(suite: Suite) -> None:
    suite.write(test_fp32=FP32)
    run = suite.run()
    assert {record["precision"] for record in run.checks} == {"fp32"}
    assert {record["verdict"] for record in run.checks} == {"not_measured"}


# --- an engine of nothing --------------------------------------------------------------------------------------------


def test_an_engine_of_empty_tensors_is_not_said_to_have_missed_its_precision() -> None:
    from pytest_trtcheck.backends.base import Built, EngineSpec
    from pytest_trtcheck.backends.tensorrt.backend import TensorRT
    from pytest_trtcheck.backends.tensorrt.module import Target
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.spec import BuildOptions

    class Empty:
        def layers_by_precision(self) -> dict[str, int]:
            return {"other": 2}

    lowered: Any = Lowered(Path("nowhere"), "key")
    empty, full = ({"x": np.zeros((rows, 3), np.float32)} for rows in (0, 2))
    engine: Any = Empty()
    anything: Any = None
    system = TensorRT(anything, Target((8, 0), here=True), "A100")
    made = Built(EngineSpec(anything, lowered, "fp16", {}, BuildOptions()), Path("nowhere"))
    assert "the inputs are empty" in str(system.doubt(made, engine, empty))
    assert "did not take effect" in str(system.doubt(made, engine, full))


CUT_OFF = """
import onnx, os, signal
from pytest_trtcheck.diagnose import diagnosis, keeping
from tests.diagnosed import conv_chain, image, overflowing_block

onnx.save(conv_chain(5, extra=overflowing_block(2)), "overflows.onnx")

def ended(*_):
    {end}

keeping.Search.find = ended
{early}

@trt_parity("overflows.onnx", precision="fp16")
def test_overflows():
    return image()
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", "KeyboardInterrupt"),
        ("pytest.fail('Timeout (>5.0s) from pytest-timeout.')", "Timeout (>5.0s) from pytest-timeout."),
    ],
    ids=["ctrl-c", "pytest-timeout"],
)
def test_what_is_known_when_it_is_cut_off_is_reported(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, end: str, said: str
) -> None:
    suite.write(test_x=CUT_OFF.format(end=end, early=""))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    run = suite.run_apart("-p", "no:timeout")
    (record,) = run.checks
    assert record["verdict"] == "fail"
    assert record["parity"]["blame"]["culprit"]["node"] == "scale_up"
    assert record["parity"]["blame"]["step"] == "precision"
    assert not record["parity"]["blame"]["is_complete"]
    answer = "its first answer, unrefined: the precision is to blame, tensor 'scaled_up' overflows"
    assert f"the diagnosis was cut off ({said}); {answer}" in record["notes"]
    assert not run.report["missing"]
    assert "to blame     the precision: tensor 'scaled_up' overflows" in record["message"]


def test_a_failure_is_reported_that_was_cut_off_before_it_was_diagnosed(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = "diagnosis._Diagnosis._trace = ended"
    suite.write(test_x=CUT_OFF.format(end="os.kill(os.getpid(), signal.SIGINT)", early=early))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    (record,) = suite.run_apart().checks
    assert record["verdict"] == "fail"
    assert record["outcome"] == "failed"
    assert record["parity"]["blame"] is None
    assert "it had no answer yet" in str(record["notes"])


SLOW = """
from pytest_trtcheck.check import checker
from pytest_trtcheck.plugin import progress

progress.LOG_PACE_S = {pace}

def slow(self, request, made=checker.Checker.check):
    for number in range(3):
        self.progress(f"looking, {{number}} sets tried")
    return made(self, request)

checker.Checker.check = slow

@trt_parity("conv.onnx", batch=1)
def test_slow(): ...
"""


@pytest.mark.parametrize(("pace", "lines"), [(0.0, 3), (10.0, 0)])
def test_a_log_is_told_now_and_then_what_takes_long(suite: Suite, pace: float, lines: int) -> None:
    suite.write(test_x=SLOW.format(pace=pace))
    assert suite.run_apart().text.count("trtcheck: looking, ") == lines
