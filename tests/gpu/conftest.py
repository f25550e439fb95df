"""Tests in this folder need a real NVIDIA GPU; elsewhere they are skipped with the reason that detection gives."""

from __future__ import annotations

import pytest

from pytest_trtcheck.gpu.device import Detection, Gpu, detect

_DETECTION = pytest.StashKey[Detection]()


def _detection(config: pytest.Config) -> Detection:
    if _DETECTION not in config.stash:
        config.stash[_DETECTION] = detect()
    return config.stash[_DETECTION]


@pytest.fixture(autouse=True)
def _needs_gpu(pytestconfig: pytest.Config) -> None:
    found = _detection(pytestconfig)
    if found.gpu is None:
        pytest.skip(f"needs an NVIDIA GPU: {found.reason}")


@pytest.fixture
def real_gpu(pytestconfig: pytest.Config, _needs_gpu: None) -> Gpu:
    """The GPU that CUDA uses first here."""
    gpu = _detection(pytestconfig).gpu
    assert gpu is not None
    return gpu
