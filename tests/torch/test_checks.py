"""Whole checks of modules, by pytest: the module as the reference, its loaders as inputs and calibration.

Each in a process of its own: PyTorch cannot be imported twice in one, which is what pytester comes to.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import RUNS

if TYPE_CHECKING:
    from tests.conftest import Suite


@pytest.fixture(autouse=True)
def networks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


HEAD = """
import torch
from pytest_trtcheck import SOURCE
from tests.torch.networks import Blocks, Net

IDS = torch.arange(7)[None] % 5
"""


def test_a_wrong_export_is_named_by_its_module(suite: Suite) -> None:
    suite.write(
        test_it=HEAD
        + """
good, bad = Blocks(), Blocks(wrong=3)

@trt_parity(bad, reference=SOURCE)
def test_bad(): return {"ids": IDS}

@trt_parity(bad, precision="fp32", reference=SOURCE)
def test_bad_in_fp32(): return {"ids": IDS}

@trt_parity(bad)
def test_unseen(): return {"ids": IDS}

@trt_parity(good, precision=["fp32", "fp16"], reference=SOURCE)
def test_good(): return {"ids": IDS}

@trt_parity(good, reference=SOURCE, tol=1e-6)
def test_precision(): return {"ids": IDS}
"""
    )
    run = suite.run_apart()
    checks = {check["nodeid"].partition("::")[2]: check for check in run.report["checks"]}
    assert {name: check["verdict"] for name, check in checks.items()} == {
        "test_bad": "fail",
        "test_bad_in_fp32": "fail",
        "test_unseen": "pass",
        "test_good[fp32]": "pass",
        "test_good[fp16]": "pass",
        "test_precision": "fail",
    }
    for name in ("test_bad", "test_bad_in_fp32"):
        blame = checks[name]["parity"]["blame"]
        assert blame["step"] == "export"
        assert blame["culprit"]["module"] == "blocks.3.mlp.fc1"
        assert blame["errors"]["export"] > 0.01
    assert "the export is to blame, first at module 'blocks.3.mlp.fc1'" in run.said
    assert any("reference=SOURCE checks the export too" in note for note in checks["test_unseen"]["notes"])
    assert checks["test_good[fp16]"]["reference"] == "SOURCE"
    blame = checks["test_precision"]["parity"]["blame"]
    assert blame["step"] in {"precision", "spread"}


@pytest.mark.parametrize("how", ["plain", "n2"])
def test_tensors_and_loaders_feed_it(suite: Suite, how: str) -> None:
    suite.write(
        test_it=HEAD
        + """
from torch.utils.data import DataLoader

net = Net().eval()
DATA = [(torch.rand(4), index % 2) for index in range(10)]

@pytest.fixture
def trt_model(): return net

@trt_parity(reference=SOURCE, batch=4)
def test_batches(): return DataLoader(DATA, batch_size=4)

@trt_parity(precision="int8", calibration=DataLoader(DATA, batch_size=2, shuffle=True), tol=0.5)
def test_calibrated(): return torch.rand(3, 4)

@trt_parity(precision="int8", calibration=DataLoader([{"x": x, "y": y} for x, y in DATA], batch_size=5), tol=0.5)
def test_dicts(): return [{"x": torch.rand(3, 4)}]

@trt_parity(reference=lambda case: {"output": net(torch.from_numpy(case["x"])).detach()}, shapes={"x": (2, 4)})
def test_a_callable_of_tensors(): pass

def test_by_hand(trt_build, trt_check):
    engine = trt_build(net, shapes={"x": ((1, 4), (2, 4), (4, 4))})
    assert engine({"x": torch.ones(2, 4)})["output"].shape == (2, 4)
    trt_check(net, torch.ones(1, 4), reference=SOURCE)
"""
    )
    run = suite.run_apart(*RUNS[how])
    run.result.assert_outcomes(passed=5)
    checks = {check["nodeid"].partition("::")[2]: check for check in run.report["checks"]}
    assert checks["test_batches"]["cases"] == 3
    assert any("loader that shuffles" in note for note in checks["test_calibrated"]["notes"])


def test_only_what_was_exported_has_a_source(suite: Suite) -> None:
    suite.write(
        test_it=HEAD
        + """
@trt_parity("conv.onnx", batch=1, reference=SOURCE)
def test_onnx(): pass

@trt_parity(Net())
def test_unknown_inputs(): pass

@trt_parity(Net(), precision="fp32")
def test_itself(): return torch.ones(1, 4)
"""
    )
    run = suite.run_apart()
    run.result.assert_outcomes(failed=2, skipped=1)
    assert "reference=SOURCE: conv.onnx is ONNX" in run.text
    assert "nothing says what 'x' of forward(x) is like" in run.said
