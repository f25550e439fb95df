"""docs/score.md: every example runs as it stands there, and fails where the model has lost what it asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import helper

from tests import onnx_models
from tests.onnx_models import FLOAT

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tests.conftest import Suite

TEXT = (Path(__file__).parent.parent / "docs" / "score.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r'```python title="(test_\w+)\.py"\n(.*?)```', TEXT, re.DOTALL))
N = helper.make_node
RNG = np.random.default_rng(0)


def linear(path: Path, before: list[int], after: dict[str, list[int]], nodes: list[Any], shift: float) -> None:
    """A model that multiplies with the unit matrix, and adds `shift` to the first column; then `nodes` from "y" on."""
    size = before[-1]
    bias = np.zeros(size, np.float32)
    bias[0] = shift
    name = "image" if path.stem != "speech" else "sound"
    proto = onnx_models.model(
        [N("MatMul", [name, "w"], ["m"]), N("Add", ["m", "b"], ["y"]), *nodes],
        {name: (FLOAT, ["N", *before])},
        {output: (FLOAT, ["N", *shape]) for output, shape in after.items()},
        {"w": np.eye(size, dtype=np.float32), "b": bias, "low": np.array([0]), "four": np.array([4])}
        | {"high": np.array([5]), "last": np.array([2])},
    )
    onnx_models.save(proto, path)


def noisy_one_hot(shape: tuple[int, ...], classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    chosen = RNG.integers(0, classes, shape)
    noise = RNG.random((*shape, classes)) * 0.8
    return (np.eye(classes)[chosen] + noise).astype(np.float32), chosen


def top1(folder: Path, shift: float) -> None:
    linear(folder / "classifier.onnx", [10], {"logits": [10]}, [N("Identity", ["y"], ["logits"])], shift)
    images, labels = noisy_one_hot((2000,), 10)
    np.savez(folder / "validation.npz", image=images, label=labels)
    np.savez(folder / "calibration.npz", image=images[:500])


def iou(folder: Path, shift: float) -> None:
    linear(folder / "segmenter.onnx", [1, 8, 8], {"mask": [1, 8, 8]}, [N("Identity", ["y"], ["mask"])], 8 * shift)
    masks = RNG.random((1000, 8, 8)) > 0.5
    images = np.where(masks, 1, -1)[:, None].astype(np.float32)
    np.savez(folder / "masks.npz", image=images, mask=masks)


def wer(folder: Path, shift: float) -> None:
    linear(folder / "speech.onnx", [6, 11], {"logits": [6, 11]}, [N("Identity", ["y"], ["logits"])], shift)
    sound, chosen = noisy_one_hot((800, 6), 11)
    words = np.array(["", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    chosen[:, 0] = np.maximum(chosen[:, 0], 1)
    text = np.array([" ".join(word for word in words[each] if word) for each in chosen])
    np.savez(folder / "speech.npz", sound=sound, text=text)


def map_(folder: Path, shift: float) -> None:
    nodes = [
        N("Slice", ["y", "low", "four", "last"], ["boxes"]),
        N("Slice", ["y", "four", "high", "last"], ["column"]),
        N("Squeeze", ["column", "last"], ["scores"]),
    ]
    linear(folder / "detector.onnx", [6, 5], {"boxes": [6, 4], "scores": [6]}, nodes, 40 * shift)
    corners = RNG.random((400, 6, 2)) * 100
    boxes = np.concatenate([corners, corners + 20 + RNG.random((400, 6, 2)) * 20], axis=2)
    found = boxes + RNG.normal(0, 2, boxes.shape)
    found[:, 5] += 200  # what is not there
    scores = np.concatenate([0.5 + RNG.random((400, 5)) / 2, RNG.random((400, 1)) * 0.7], axis=1)
    images = np.concatenate([found, scores[..., None]], axis=2).astype(np.float32)
    np.savez(folder / "objects.npz", image=images, boxes=boxes[:, :5])


TASKS: dict[str, Callable[[Path, float], None]] = {
    "test_top1": top1,
    "test_iou": iou,
    "test_wer": wer,
    "test_map": map_,
}


def test_every_example_has_a_model_here() -> None:
    assert set(EXAMPLES) == set(TASKS)
    scores = [len(code[: code.index("@trt_parity")].strip().splitlines()) for code in EXAMPLES.values()]
    assert max(scores) < 36


@pytest.mark.parametrize("name", TASKS)
def test_an_example_passes_and_sees_what_is_lost(name: str, suite: Suite) -> None:
    TASKS[name](suite.path, 0.0)
    (suite.path / f"{name}.py").write_text(EXAMPLES[name])
    run = suite.run()
    run.result.assert_outcomes(passed=1)
    (check,) = run.checks
    assert abs(check["score"]["drop"]) < 0.005
    assert 0 < check["score"]["reference"] <= 1
    # The reference stays what it was; the model has got a shift that the task does not bear.
    model = next(each for each in suite.path.glob("*.onnx") if each.name in EXAMPLES[name])
    TASKS[name](suite.path, 0.0)
    sound = suite.path / "sound.onnx"
    sound.write_bytes(model.read_bytes())
    TASKS[name](suite.path, 0.4)
    (suite.path / f"{name}.py").write_text(EXAMPLES[name].replace("precision=", 'reference="sound.onnx", precision='))
    run = suite.run()
    run.result.assert_outcomes(failed=1)
    (check,) = run.checks
    assert check["verdict"] == "fail"
    assert check["score"]["lower"] > check["score"]["max_drop"]
