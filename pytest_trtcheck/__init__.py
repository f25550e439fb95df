"""Inference regression testing for TensorRT engines, next to the model code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

    from pytest_trtcheck.spec import BuildOptions, Calibration, Tolerance

    trt_parity: pytest.MarkDecorator
    trt_latency: pytest.MarkDecorator

__version__ = "0.1.0"

__all__ = ["BuildOptions", "Calibration", "Tolerance", "__version__", "trt_latency", "trt_parity"]


def __getattr__(name: str) -> object:
    # Marks are made when asked for: with --strict-markers pytest refuses one before the plugin has declared it.
    if name in {"trt_parity", "trt_latency"}:
        import pytest

        return getattr(pytest.mark, name)
    # Every pytest run imports this package, few need the specs, and dataclasses are slow to make.
    if name in {"BuildOptions", "Calibration", "Tolerance"}:
        from pytest_trtcheck import spec

        return getattr(spec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
