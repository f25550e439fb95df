"""Whether calibration data covers what a check is fed: planted drift is found, and sound data is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.precision.quantization import coverage
from tests import onnx_models
from tests.onnx_models import FLOAT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.record import CoverageRecord

    Draw = Callable[[np.random.Generator], NDArray[np.float64]]

SIZE = 768


def noise(random: np.random.Generator) -> NDArray[np.float64]:
    return random.normal(size=SIZE)


def image(random: np.random.Generator) -> NDArray[np.float64]:
    """From 0 to 1, each with a brightness and a contrast of its own, and dark stretches."""
    smooth = np.convolve(random.normal(size=SIZE + 63), np.ones(64) / 8, mode="valid")
    found: NDArray[np.float64] = np.clip(random.uniform(0.2, 0.6) + random.uniform(0.1, 0.3) * smooth, 0, 1)
    return found


def loud(random: np.random.Generator) -> NDArray[np.float64]:
    """Sound: some of it is three times as loud as other."""
    return random.normal(size=SIZE) * float(np.exp(0.4 * random.normal()))


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    from onnx import helper

    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    made = onnx_models.model([node], {"x": (FLOAT, ["n", SIZE])}, {"y": (FLOAT, ["n", SIZE])})
    return onnx_model.load(onnx_models.save(made, tmp_path / "model.onnx"), "model.onnx")


def compared(  # noqa: PLR0917 - a table's columns
    model: OnnxModel, draw: Draw, fed: Draw, count: int, cases: int, seed: int
) -> CoverageRecord:
    random = np.random.default_rng(seed)
    made = [
        [{"x": each(random).astype(np.float32)[None]} for _ in range(number)]
        for each, number in ((draw, count), (fed, cases))
    ]
    return coverage.covered(model, coverage.look(model, made[0]), made[1])["x"]


@pytest.mark.parametrize("draw", [noise, image, loud])
@pytest.mark.parametrize(("count", "cases"), [(4, 1), (4, 4), (32, 4)])
def test_data_of_the_same_kind_is_left_alone(model: OnnxModel, draw: Draw, count: int, cases: int) -> None:
    drifted = [compared(model, draw, draw, count, cases, seed).drifted for seed in range(30)]
    assert sum(drifted) <= 1


@pytest.mark.parametrize(
    ("calibration", "fed"),
    [
        (noise, image),
        (image, noise),
        (noise, lambda random: 4 * noise(random)),
        (lambda random: 255 * image(random), image),
        (image, lambda random: 255 * image(random)),
        (image, lambda random: -image(random)),
        (noise, lambda random: 1.5 + noise(random)),
    ],
    ids=["noise, images", "images, noise", "×4", "255, 1", "1, 255", "sign", "offset"],
)
def test_data_of_another_kind_is_found(model: OnnxModel, calibration: Draw, fed: Draw) -> None:
    drifted = [compared(model, calibration, fed, 4, 2, seed).drifted for seed in range(10)]
    assert sum(drifted) >= 9


def test_one_sample_tells_what_is_far_off_alone(model: OnnxModel) -> None:
    assert compared(model, image, lambda random: 255 * image(random), 1, 1, 0).drifted
    assert not any(compared(model, loud, loud, 1, 1, seed).drifted for seed in range(20))


def test_what_is_said_has_the_figures(model: OnnxModel) -> None:
    seen = coverage.look(model, [{"x": np.linspace(0, 3.1, SIZE, dtype=np.float32)[None]} for _ in range(4)])
    fed = np.linspace(0, 3, SIZE, dtype=np.float32)
    fed[: SIZE // 8] = 12.3
    found = coverage.covered(model, seen, [{"x": fed[None]}])
    assert found["x"].outside == pytest.approx(0.125)
    (note,) = coverage.notes(found, "returned")
    assert "input 'x' reaches 0.3755 to 12.3" in note
    assert "calibration saw 0 to 3.1" in note
    assert "12.5 % of its elements lie outside" in note


def test_the_index_is_that_of_its_formula() -> None:
    random = np.random.default_rng(0)
    expected, actual = random.normal(size=1000), random.normal(size=1000) + 0.5
    edges = np.quantile(expected, np.arange(1, 10) / 10)
    e, a = (np.histogram(each, [-np.inf, *edges, np.inf])[0] / 1000 for each in (expected, actual))
    assert coverage.stability_index(expected, actual) == pytest.approx(np.sum((a - e) * np.log(a / e)), rel=0.05)
    assert coverage.stability_index(expected, expected) == 0.0


def test_what_was_looked_at_is_kept(model: OnnxModel, tmp_path: Path) -> None:
    samples = [{"x": noise(np.random.default_rng(seed)).astype(np.float32)[None]} for seed in range(5)]
    cache = Cache(tmp_path / "cache")
    first = coverage.of_calibration(model, samples, "a" * 64, cache)["x"]
    again = coverage.of_calibration(model, [], "a" * 64, cache)["x"]
    assert (first.min, first.max) == (again.min, again.max)
    assert first.min == min(float(each["x"].min()) for each in samples)
    assert [each.tolist() for each in first.samples] == [each.tolist() for each in again.samples]
