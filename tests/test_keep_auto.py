"""`keep_fp32="auto"`: the smallest set of nodes that lets a check pass is searched, used, said and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper

from pytest_trtcheck import diagnose
from tests import onnx_models
from tests.test_precision_pairs import squared
from tests.trt_models import operator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Suite

ROW = """
@trt_parity("row.onnx", precision="fp16", keep_fp32="auto", tol=0.05)
def test_row():
    rng = np.random.default_rng(0)
    return [{"values": rng.uniform(-1, 1, (1, 64)).astype(np.float32)} for _ in range(2)]
"""
SOUND = (("Mul", 1.25), ("Mul", 0.8))
OFFSET = (("Add", 1000.0), *45 * (("Mul", -1.1), ("Mul", -1 / 1.1)), ("Sub", 1000.0))
"""FP16 has steps of 0.5 there; none of them loses more than `SOUND` does but the last, by what it is handed."""
UP, DOWN = 2 * (("Mul", 1000.0),), 2 * (("Div", 1000.0),)
"""Between the inner two is what FP16 does not hold."""

PROJECT = """
def images(count=2):
    rng = np.random.default_rng(0)
    return [{"image": rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]

PRECISIONS = ["fp16", "int8+fp16", "int8", "fp32"]

@trt_parity("squared.onnx", precision=PRECISIONS, calibration=images(), keep_fp32="auto", tol=0.05)
def test_auto():
    return images()
"""


@pytest.fixture
def squared_suite(suite: Suite) -> Suite:
    onnx_models.save(squared(), suite.path / "squared.onnx")
    return suite


def test_what_must_stay_in_fp32_is_found_used_and_said(squared_suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    squared_suite.write(test_auto=PROJECT)
    run = squared_suite.run()
    for name in ("[fp16]", "[int8+fp16]"):
        check = run.check(f"test_auto{name}")
        assert check["verdict"] == "pass"
        assert check["parity"]["keep_fp32"] == ["square", "root"]
        (said,) = [note for note in check["notes"] if "auto" in note]
        assert "searched by emulation with the 2 inputs (returned)" in said
        assert said.endswith('keep_fp32=["square", "root"]')
    alone = run.check("test_auto[int8]")
    assert alone["parity"]["keep_fp32"] == []
    assert "keep_fp32='auto': it passes on its 2 inputs (returned) with nothing kept" in alone["notes"]
    assert run.check("test_auto[fp32]")["verdict"] == "not_measured"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was searched before")

    monkeypatch.setattr(diagnose, "diagnose", refuse)
    again = squared_suite.run()
    assert [check["verdict"] for check in again.checks] == [check["verdict"] for check in run.checks]


def test_what_was_cut_short_is_searched_again_with_more_time(
    squared_suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    squared_suite.write(test_auto=PROJECT.replace("PRECISIONS,", '"fp16",'))
    real, searched, cut_below = diagnose.diagnose, [], 30.0

    def diagnosed(*arguments: Any, budget: diagnose.Budget, **more: Any) -> Any:
        searched.append(budget.seconds)
        found = real(*arguments, budget=budget, **more)
        assert found is not None
        return replace(found, is_complete=budget.seconds > cut_below)

    monkeypatch.setattr(diagnose, "diagnose", diagnosed)
    for seconds, times, cut in ((5, 1, "5"), (5, 1, "5"), (0, 1, "5"), (10, 2, "10"), (60, 3, ""), (60, 3, "")):
        check = squared_suite.run(f"--trt-diagnose={seconds}", "--trt-cache-dir=own").check("test_auto")
        assert check["parity"]["keep_fp32"] == ["square", "root"]
        (said,) = [note for note in check["notes"] if "auto" in note]
        assert len(searched) == times
        end = f"cut short: with a --trt-diagnose of more than {cut} they may be fewer)" if cut else "]"
        assert said.endswith(end)


def test_no_set_is_a_failure_that_says_so(squared_suite: Suite) -> None:
    squared_suite.write(test_auto=PROJECT.replace("tol=0.05", "tol=1e-9").replace("PRECISIONS,", '"fp16",'))
    check = squared_suite.run().check("test_auto")
    assert check["verdict"] == "fail"
    assert "keep_fp32" not in check["parity"]
    assert "keep_fp32='auto': no set of nodes was found with which it passes on its 2 inputs" in check["message"]


def row(steps: Sequence[tuple[str, float]]) -> onnx.ModelProto:
    """`values` [1, 64] through one operator after the other, each with a constant."""
    nodes = [
        helper.make_node(op, [f"x{index}" if index else "values", f"c{index}"], [f"x{index + 1}"], f"{op}{index}")
        for index, (op, _) in enumerate(steps)
    ]
    shape = (onnx.TensorProto.FLOAT, [1, 64])
    constants = {f"c{index}": np.array(value, np.float32) for index, (_, value) in enumerate(steps)}
    return onnx_models.model(nodes, {"values": shape}, {f"x{len(steps)}": shape}, constants)


@pytest.mark.parametrize(
    ("steps", "needed"),
    [
        pytest.param((*30 * SOUND, *OFFSET, *30 * SOUND), range(60, 60 + len(OFFSET)), id="chain"),
        # More than the worst that are tried together.
        pytest.param(42 * (*SOUND, *UP, *DOWN), [i for n in range(42) for i in (6 * n + 3, 6 * n + 4)], id="scattered"),
    ],
)
def test_many_nodes_are_found_wherever_they_are(
    suite: Suite, steps: Sequence[tuple[str, float]], needed: Sequence[int]
) -> None:
    onnx_models.save(row(steps), suite.path / "row.onnx")
    suite.write(test_row=ROW)
    check = suite.run("--trt-diagnose=300").check("test_row")
    assert check["verdict"] == "pass"
    assert check["parity"]["keep_fp32"] == [f"{steps[index][0]}{index}" for index in needed]


def test_a_set_of_most_of_the_model_is_none(suite: Suite) -> None:
    onnx_models.save(row(10 * (*UP, *SOUND, *SOUND, *DOWN)), suite.path / "row.onnx")
    suite.write(test_row=ROW)
    check = suite.run("--trt-diagnose=300").check("test_row")
    assert check["verdict"] == "fail"
    assert "60 nodes in FP32 are the fewest that were found to be enough, of 80" in " ".join(check["message"].split())


def test_without_time_nothing_is_searched(squared_suite: Suite) -> None:
    squared_suite.write(test_auto=PROJECT)
    run = squared_suite.run("--trt-diagnose=0", "--trt-cache-dir=elsewhere")
    assert "it cannot be searched: trt_diagnose is 0" in run.check("test_auto[fp16]")["message"]
    # What passes with nothing kept needs no search.
    assert run.check("test_auto[int8]")["verdict"] == "pass"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('"squared.onnx", precision="tf32", keep_fp32="auto"', "expected a precision that nodes can be kept out of"),
        ('"squared.onnx", keep_fp32=["auto"], batch=1', "no node is called 'auto'"),
        ('"half.onnx", keep_fp32="auto"', "is taken as it is"),
    ],
)
def test_where_nothing_can_be_kept_it_is_an_error(squared_suite: Suite, arguments: str, said: str) -> None:
    onnx_models.save(operator("Conv", "fp16"), squared_suite.path / "half.onnx")
    squared_suite.write(test_auto=f"@trt_parity({arguments})\ndef test_auto(): ...\n")
    run = squared_suite.run()
    assert {check["verdict"] for check in run.checks} == {"error"}
    assert said in run.text


def test_an_engine_that_is_only_built_has_the_set_in_it(squared_suite: Suite) -> None:
    squared_suite.write(test_auto=PROJECT.replace("PRECISIONS,", '"int8+fp16",'))
    built, judged = squared_suite.run("--trt-build-only", "--trt-gpu=A10"), squared_suite.run("--trt-gpu=A10")
    (first,), (second,) = built.checks, judged.checks
    assert any("searched by emulation" in note for note in first["notes"])
    made = {"cached": False, "cache": "miss", "miss_reason": first["engine"]["miss_reason"]}
    assert first["engine"] == second["engine"] | made
    assert "keep_fp32='auto' was not searched" in squared_suite.run("--trt-build-only").text


def test_an_engine_without_inputs_cannot_be_judged(squared_suite: Suite) -> None:
    squared_suite.write(
        test_build="def test_build(trt_build):\n    trt_build('squared.onnx', precision='fp16', keep_fp32='auto')\n"
    )
    run = squared_suite.run()
    run.result.assert_outcomes(failed=1)
    assert "there are no inputs yet to judge by" in run.text
