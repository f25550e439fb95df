"""Calibration data that is no good, and whether the audit says so by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck.diagnose import audit, diagnose, explain, models
from pytest_trtcheck.model.onnx_model import TensorSpec
from pytest_trtcheck.precision.emulation import emulated_path
from pytest_trtcheck.precision.lowering import float_path
from pytest_trtcheck.precision.quantization import calibration_data
from tests.diagnosed import Bench, Case, all_tensors, conv_chain, image

if TYPE_CHECKING:
    from pathlib import Path

SPECS = (TensorSpec("image", "float32", (None, 3, 16, 16)),)


def photo(seed: int, light: float) -> Case:
    """Smooth structure and noise; `light` is how bright it is."""
    rng = np.random.default_rng(seed)
    waves = np.sin(np.linspace(0, rng.uniform(2, 9), 16))[None, None, :, None] + rng.normal(0, 0.2, (1, 3, 16, 16))
    return {"image": (light * (1 + 0.4 * waves)).astype(np.float32)}


def flags(samples: list[Case], cases: list[Case]) -> list[audit.Flag]:
    data = calibration_data.load(samples, SPECS)
    count, found = audit.flags(data, data.describe, cases)
    assert count == len(samples)
    return found


def test_sound_data_is_not_flagged() -> None:
    assert flags([photo(seed, 0.6) for seed in range(12)], [photo(seed, 0.6) for seed in range(50, 54)]) == []
    assert flags([image(seed) for seed in range(8)], [image(99)]) == []


@pytest.mark.parametrize("seed", range(5))
def test_sound_data_of_many_brightnesses_is_not_flagged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [photo(100 * seed + index, rng.uniform(0.3, 0.9)) for index in range(20)]
    assert flags(samples, [photo(7000 + seed, 0.5), photo(8000 + seed, 0.7)]) == []


def test_night_images_in_a_day_only_set() -> None:
    samples = [photo(seed, 0.6) for seed in range(12)]
    samples[3], samples[8] = photo(3, 0.02), photo(8, 0.02)
    found = flags(samples, [photo(seed, 0.6) for seed in range(50, 54)])
    assert [(flag.what, flag.index) for flag in found] == [("sample far", 3), ("sample far", 8)]
    assert found[0].label == "calibration sample 3 (calibration[3])"


def test_night_images_among_the_test_inputs() -> None:
    found = flags([photo(seed, 0.6) for seed in range(12)], [photo(60, 0.6), photo(61, 0.02), photo(62, 0.6)])
    assert [(flag.what, flag.index, flag.label) for flag in found] == [("test input far", 1, "test input 1")]


def test_data_in_another_scale_altogether() -> None:
    """0 to 255 where the model gets 0 to 1."""
    samples = [{"image": photo(seed, 0.6)["image"] * 255} for seed in range(6)]
    found = flags(samples, [photo(60, 0.6), photo(61, 0.6)])
    assert [(flag.what, flag.index) for flag in found] == [("all far", None)]
    assert "mean 1" in found[0].detail
    assert "test inputs 0." in found[0].detail


def test_constant_and_duplicated_samples() -> None:
    samples = [photo(seed, 0.6) for seed in range(6)]
    samples[2] = {"image": np.full((1, 3, 16, 16), 0.5, np.float32)}
    samples[5] = {"image": samples[1]["image"].copy()}
    found = flags(samples, [photo(60, 0.6)])
    assert ("constant", 2, "every element is 0.5") in [(flag.what, flag.index, flag.detail) for flag in found]
    assert ("duplicate", 5, "the same as sample 1") in [(flag.what, flag.index, flag.detail) for flag in found]


def test_files_are_named(tmp_path: Path) -> None:
    for index in range(6):
        light = 0.01 if index == 4 else 0.6
        name = f"{'night' if index == 4 else 'day'}{index}.npz"
        np.savez(tmp_path / name, image=photo(index, light)["image"])
    data = calibration_data.load(str(tmp_path / "*.npz"), SPECS)
    _, found = audit.flags(data, data.describe, [photo(60, 0.6), photo(61, 0.6)])
    assert [flag.what for flag in found] == ["sample far"]
    assert found[0].label.endswith("night4.npz)")


def test_token_ids_are_not_compared_by_size() -> None:
    specs = (TensorSpec("ids", "int64", (None, 16)),)
    rng = np.random.default_rng(0)
    samples = [{"ids": rng.integers(0, 50 * (index + 1), (1, 16))} for index in range(6)]
    data = calibration_data.load(samples, specs)
    assert audit.flags(data, data.describe, [{"ids": np.full((1, 16), 30_000)}])[1] == []


def test_what_lies_outside_the_ranges(tmp_path: Path) -> None:
    """Day-only calibration, bright test inputs: the shares are numpy's."""
    bench = Bench(tmp_path)
    calibration = [photo(seed, 0.3) for seed in range(4)]
    cases = [photo(50, 0.3), photo(51, 2.0)]
    subject = bench.failed(conv_chain(3), "int8", cases, calibration=calibration)
    pair = models.stage(
        float_path(subject.model, subject.lowered, (), bench.cache),
        emulated_path(subject.model, subject.lowered, "int8", bench.cache),
        subject.lowered.path,
        subject.model.path,
        tmp_path,
    )
    found = {each.tensor: each for each in audit.outside_ranges(pair.reference, pair.spans, cases)}
    assert set(found) == set(subject.ranges().tensors)
    tensors: list[dict[str, Any]] = [all_tensors(subject.model.path, case) | case for case in cases]
    for name, each in found.items():
        amax = subject.ranges().tensors[name].amax
        steps = [np.rint(values[name].astype(np.float64) / (amax / 127)) for values in tensors]
        outside = [np.count_nonzero((step > 127) | (step < -128)) for step in steps]
        assert each.share == pytest.approx(sum(outside) / sum(step.size for step in steps), abs=1e-3), name
        assert each.max_abs == pytest.approx(max(np.abs(values[name]).max() for values in tensors), rel=1e-5)
    assert found["image"].share > audit.OUTSIDE_LIMIT
    assert found["image"].worst == 1


def test_the_diagnosis_says_which_inputs_are_unlike_the_calibration_data(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    calibration = [photo(seed, 0.05) for seed in range(6)]
    subject = bench.failed(conv_chain(3), "int8", [photo(50, 2.0)], calibration=calibration)
    assert bench.error(subject) > 0.05
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert found.culprit is not None
    assert found.culprit.kind == "saturation"
    assert found.culprit.tensor == "image"
    assert found.calibration is not None
    assert found.calibration["samples"] == 6
    assert found.calibration["inputs_outside"] == [0]
    text = explain(found.to_dict())
    assert "of tensor 'image' lies outside its range" in text
    assert "the calibration data: all far" in text
