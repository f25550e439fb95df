"""Facts about files are remembered while the files are unchanged, and not a moment longer."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ModelError
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model import remembered as facts
from pytest_trtcheck.precision.quantization import calibration_data
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

_AGE_S = 3.0


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    seen: list[Path] = []
    load = onnx_model.load

    def counted(path: Path, label: str | None = None) -> onnx_model.OnnxModel:
        seen.append(path)
        return load(path, label)

    monkeypatch.setattr(onnx_model, "load", counted)
    return seen


def settle(*files: Path) -> None:
    """Wait until the files' times are old enough to be trusted: ctime cannot be set."""
    newest = max(max(file.stat().st_mtime, file.stat().st_ctime) for file in files)
    time.sleep(max(0.0, newest + _AGE_S - time.time()))


def scaled(path: Path, factor: float) -> None:
    """Scale a weight in place: the file keeps its size."""
    proto = onnx.load(path)
    weight = proto.graph.initializer[0]
    weight.raw_data = (onnx.numpy_helper.to_array(weight) * np.float32(factor)).tobytes()
    path.write_bytes(proto.SerializeToString())


def test_a_model_is_read_once_and_again_when_it_changes(tmp_path: Path, cache: Cache, loads: list[Path]) -> None:
    path = onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx")
    fresh = facts.model(path, "m", cache)
    facts.model(path, "m", cache)
    assert len(loads) == 2, "a file that was written a moment ago can change without its times changing"
    settle(path)
    assert facts.model(path, "m", cache) == fresh
    assert facts.model(path, "other", Cache(tmp_path / "cache")).label == "other"
    assert len(loads) == 3
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    scaled(path, 2.0)
    os.utime(path, ns=times)  # as a copy that keeps times does
    assert facts.model(path, "m", cache).sha256 != fresh.sha256


def test_external_data_that_changes_or_goes_is_noticed(tmp_path: Path, cache: Cache, loads: list[Path]) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.data"
    onnx.save(onnx_models.conv_net(), path, save_as_external_data=True, location=data.name, size_threshold=0)
    settle(path, data)
    before = facts.model(path, "m", cache)
    assert facts.model(path, "m", cache) == before
    assert len(loads) == 1
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    assert facts.model(path, "m", cache).sha256 != before.sha256
    settle(data)
    assert facts.model(path, "m", cache).sha256 != before.sha256
    data.unlink()
    with pytest.raises(ModelError, match=r"m\.data' is missing"):
        facts.model(path, "m", cache)


def test_calibration_files_are_read_once(tmp_path: Path, cache: Cache) -> None:
    specs = onnx_model.load(onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx")).inputs
    files = [tmp_path / f"{index}.npz" for index in range(2)]
    for index, file in enumerate(files):
        np.savez(file, image=np.full((1, 3, 16, 16), index, np.float32))
    settle(*files)
    samples = calibration_data.load(str(tmp_path / "*.npz"), specs)
    digest = calibration_data.digest_of(samples, cache)
    assert digest == samples.digest() == calibration_data.digest_of(samples, cache)
    assert [entry.kind for entry in cache.entries()] == ["samples"]
    np.savez(files[1], image=np.full((1, 3, 16, 16), 7, np.float32))
    assert calibration_data.digest_of(calibration_data.load(str(tmp_path / "*.npz"), specs), cache) != digest


def test_data_that_is_in_memory_is_hashed_each_time(tmp_path: Path, cache: Cache) -> None:
    specs = onnx_model.load(onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx")).inputs
    data = [{"image": np.zeros((1, 3, 16, 16), np.float32)}]
    first = calibration_data.digest_of(calibration_data.load(data, specs), cache)
    data[0]["image"][:] = 1
    assert calibration_data.digest_of(calibration_data.load(data, specs), cache) != first
    assert cache.entries() == []
