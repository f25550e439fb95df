"""The fixtures: those that users override, and those that they use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.plugin.benchmark import GpuBenchmark
    from pytest_trtcheck.precision.reference import Reference
    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import BuildOptions


@pytest.fixture
def trt_model() -> object:
    """Override: the model that marked tests check (a path, bytes or an onnx.ModelProto)."""
    return None


@pytest.fixture
def trt_inputs() -> object:
    """Override: what marked tests feed when they return nothing (a mapping, an array, or a list of them)."""
    return None


@pytest.fixture
def trt_calibration() -> object:
    """Override: the calibration data of marked int8 and fp8 tests (files, an iterable of mappings, a Calibration)."""
    return None


@pytest.fixture
def trt_build_options() -> BuildOptions | None:
    """Override: how TensorRT builds the engines of marked tests (a BuildOptions)."""
    return None


@pytest.fixture
def trt_gpu(request: pytest.FixtureRequest) -> GpuModel | None:
    """The GPU that is judged: the one of `--trt-gpu`, else the one in this machine, else None."""
    from pytest_trtcheck.plugin import given

    return given.checker(request).judged_gpu()


# What builds engines asks for `trt_build_options` by name: only then does pytest parametrize a test by it.


@pytest.fixture
def trt_build(
    request: pytest.FixtureRequest, trt_build_options: BuildOptions | None
) -> Iterator[Callable[..., Runner]]:
    """`trt_build(model, precision="fp16", ...)`: the model's engine, from the cache once it was built.

    Takes `calibration`, `shapes`, `keep_fp32`, `exclude`, `backend` and `options` too, and refuses what only a check
    uses.

    The engine is called with a mapping from input name to array and returns one from output name to array. Without a
    GPU it is the emulation, and `engine.evidence` says so.
    """
    from pytest_trtcheck.plugin import given

    del trt_build_options
    yield from given.builder(request)


@pytest.fixture
def trt_reference(
    request: pytest.FixtureRequest, trt_build_options: BuildOptions | None
) -> Iterator[Callable[[object], Reference]]:
    """`trt_reference(model)`: the FP32 model on ONNX Runtime, as a callable from inputs to outputs."""
    from pytest_trtcheck.plugin import given

    yield from given.referrer(request, trt_build_options)


@pytest.fixture
def trt_check(request: pytest.FixtureRequest, trt_build_options: BuildOptions | None) -> Callable[..., CheckRecord]:
    """`trt_check(model, inputs=None, *, precision=…, tol=…, …)`: the check of `trt_parity`, by hand.

    Takes the arguments of the marker `trt_parity` (one precision, one batch), fails the test as a marked one fails, and
    returns the record.
    """
    from pytest_trtcheck.plugin import given

    del trt_build_options
    return given.check(request)


@pytest.fixture
def trt_engine(request: pytest.FixtureRequest, trt_build_options: BuildOptions | None) -> Iterator[Runner]:
    """The engine of the marked test: its model, precision and arguments. Where these name a batch, that one; where they
    name an engine that exists, that, which needs a GPU.
    """
    from pytest_trtcheck.plugin import given

    del trt_build_options
    yield from given.engine(request)


@pytest.fixture
def trt_benchmark(request: pytest.FixtureRequest) -> GpuBenchmark:
    """`trt_benchmark(engine, inputs)`: pytest-benchmark's `benchmark`, timed in GPU time. It needs both.

    The statistics, their JSON, comparison and histogram are pytest-benchmark's own.
    """
    from pytest_trtcheck.plugin import given

    return given.benchmark(request)
