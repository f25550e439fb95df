"""Model sources that another package brings, and the example in the documentation as it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.test_extending_metric import example
from tests.test_markers import outcomes

if TYPE_CHECKING:
    from tests.conftest import Suite


def install(suite: Suite, **points: str) -> None:
    """What an installer leaves of a package with these entry points."""
    folder = suite.path / "own-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (folder / "entry_points.txt").write_text("\n".join(["[pytest_trtcheck.sources]", *lines, ""]))


def test_the_documented_source(suite: Suite) -> None:
    for name, text in example("Model source").items():
        (suite.path / name).write_text(text)
    install(suite, mlp="mlp_source")
    rng = np.random.default_rng(0)
    weights = {f"w{index}": rng.standard_normal((8, 8)).astype(np.float32) for index in range(2)}
    with (suite.path / "weights.mlp").open("wb") as file:
        np.savez(file, **weights)  # type: ignore[arg-type]
    suite.write(
        test_mlp="""
X = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)

@trt_parity("weights.mlp")
def test_path():
    return {"x": X}

@trt_parity(lambda: "weights.mlp", reference="weights.mlp")
def test_made():
    return {"x": X}

@trt_parity("missing.mlp")
def test_missing(): ...

@trt_parity("conv.onnx", batch=1)
def test_usual(): ...

@trt_parity(model=3)
def test_none(): ...

def test_by_hand(trt_reference):
    w = np.load("weights.mlp")
    expected = np.maximum(np.maximum(X @ w["w0"], 0) @ w["w1"], 0)
    (found,) = trt_reference("weights.mlp")({"x": X}).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
"""
    )
    run = suite.run()
    assert outcomes(run) == {
        "test_path": "pass",
        "test_made": "pass",
        "test_missing": "error",
        "test_usual": "pass",
        "test_none": "error",
    }
    run.result.assert_outcomes(passed=4, failed=1, errors=1)
    assert run.check("test_path")["model"] == "weights.mlp"
    assert "missing.mlp: no such model file" in run.text
    assert "an .mlp file of weights" in run.text


def test_a_source_that_fails_is_named(suite: Suite) -> None:
    (suite.path / "half.py").write_text(
        """
title = "an object with a `kind`"

def accepts(source):
    return getattr(source, "kind", None) is not None

def open(source, opening):
    if source.kind == "raise":
        raise ValueError("no weights")
    return "conv.onnx"
"""
    )
    install(suite, half="half")
    suite.write(
        test_half="""
class Half:
    def __init__(self, kind):
        self.kind = kind

@trt_parity(Half("raise"))
def test_raises(): ...

@trt_parity(Half("path"))
def test_gives_a_path(): ...
"""
    )
    run = suite.run()
    assert outcomes(run) == {"test_raises": "error", "test_gives_a_path": "error"}
    assert "the model source 'half' of own failed to open it: ValueError: no weights" in run.text
    assert "the model source 'half' of own gave a str" in run.text


def test_a_source_that_can_not_be_loaded_is_named(suite: Suite) -> None:
    install(suite, gone="gone")
    suite.write(
        test_gone="""
@trt_parity(lambda: "conv.onnx", batch=1)
def test_asked(): ...

@trt_parity("conv.onnx", batch=1)
def test_not_asked(): ...
"""
    )
    run = suite.run()
    assert outcomes(run)["test_not_asked"] == "pass"
    assert "the model source 'gone' of own cannot be loaded: ModuleNotFoundError" in run.said
    run.result.assert_outcomes(passed=1, errors=1)
