"""Inference regression testing for TensorRT engines, next to the model code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.spec import BuildOptions, Calibration, Tolerance

if TYPE_CHECKING:
    trt_parity: pytest.MarkDecorator
    trt_latency: pytest.MarkDecorator

__version__ = "0.1.0"

__all__ = ["BuildOptions", "Calibration", "Tolerance", "__version__", "trt_latency", "trt_parity"]


def __getattr__(name: str) -> pytest.MarkDecorator:
    # Made when asked for: with --strict-markers pytest refuses a mark before the plugin has declared it.
    if name in {"trt_parity", "trt_latency"}:
        mark: pytest.MarkDecorator = getattr(pytest.mark, name)
        return mark
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
