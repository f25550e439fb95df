"""Inference regression testing for TensorRT engines, next to the model code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

    from pytest_trtcheck import metrics
    from pytest_trtcheck.errors import CheckError, CheckFailed
    from pytest_trtcheck.spec import SOURCE, BuildOptions, Calibration, Case, Search, Tolerance

__version__ = "0.1.0"

__all__ = [
    "SOURCE",
    "BuildOptions",
    "Calibration",
    "Case",
    "CheckError",
    "CheckFailed",
    "Search",
    "Tolerance",
    "__version__",
    "metrics",
    "trt_latency",
    "trt_parity",
]


def trt_parity(*args: object, **kwargs: object) -> pytest.MarkDecorator:
    """Mark a test: the engine's outputs are compared with the FP32 model's. `pytest --markers` lists the arguments.

    Unlike `pytest.mark.trt_parity(make_model)`, which would decorate `make_model`, a function is taken as an argument.
    """
    return _mark("trt_parity", args, kwargs)


def trt_latency(*args: object, **kwargs: object) -> pytest.MarkDecorator:
    """Mark a test: the engine's latency is held to budgets. `pytest --markers` lists the arguments."""
    return _mark("trt_latency", args, kwargs)


def _mark(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> pytest.MarkDecorator:
    # Marks are made when asked for: with --strict-markers pytest refuses one before the plugin has declared it.
    import pytest

    mark: pytest.MarkDecorator = getattr(pytest.mark, name)
    return mark.with_args(*args, **kwargs)


def __getattr__(name: str) -> object:
    # Every pytest run imports this package, few need the specs, and dataclasses are slow to make.
    if name in {"SOURCE", "BuildOptions", "Calibration", "Case", "Search", "Tolerance"}:
        from pytest_trtcheck import spec

        return getattr(spec, name)
    if name in {"CheckError", "CheckFailed"}:
        from pytest_trtcheck import errors

        return getattr(errors, name)
    if name == "metrics":
        import importlib

        return importlib.import_module("pytest_trtcheck.metrics")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
