"""The fixtures: those that users override, and those that they use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.artifacts import Reference
    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.check import Workshop
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.gpu_benchmark import GpuBenchmark
    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import BuildOptions


def _workshop(request: pytest.FixtureRequest) -> Workshop:
    from pytest_trtcheck.session import session_of

    return session_of(request.config).workshop


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
    return _workshop(request).judged_gpu()


@pytest.fixture
def trt_build(request: pytest.FixtureRequest) -> Iterator[Callable[..., Runner]]:
    """`trt_build(model, precision="fp16", ...)`: the model's engine, from the cache once it was built.

    The engine is called with a mapping from input name to array and returns one from output name to array. Without a
    GPU it is the emulation, and `engine.evidence` says so.
    """
    from pytest_trtcheck import markers
    from pytest_trtcheck.job import Request
    from pytest_trtcheck.running import folders

    item = request.node
    workshop = _workshop(request)
    made: list[Runner] = []

    def build(
        model: object, precision: str = "fp16", *, options: BuildOptions | None = None, **arguments: object
    ) -> Runner:
        spec = markers.from_marker("trt_parity", (model,), {"precision": precision, **arguments})
        calibration = spec.calibration if spec.calibration is not None else request.getfixturevalue("trt_calibration")
        runner = workshop.runner(
            Request(
                nodeid=item.nodeid,
                model=model,
                folders=folders(item),
                parity=spec,
                calibration=calibration,
                options=options or request.getfixturevalue("trt_build_options"),
            )
        )
        made.append(runner)
        return runner

    yield build
    for runner in made:
        runner.close()


@pytest.fixture
def trt_reference(request: pytest.FixtureRequest) -> Callable[[object], Reference]:
    """`trt_reference(model)`: the FP32 model on ONNX Runtime, as a callable from inputs to outputs."""
    from pytest_trtcheck.running import folders

    workshop = _workshop(request)
    return lambda model: workshop.reference(model, folders(request.node))


@pytest.fixture
def trt_check(request: pytest.FixtureRequest) -> Callable[..., CheckRecord]:
    """`trt_check(model, inputs=None, *, precision=…, tol=…, …)`: the check of `trt_parity`, by hand.

    Takes the arguments of the marker `trt_parity` (one precision, one batch), fails the test as a marked one fails, and
    returns the record.
    """
    from pytest_trtcheck import markers
    from pytest_trtcheck.job import Request
    from pytest_trtcheck.running import folders, run

    item = request.node
    options = request.getfixturevalue("trt_build_options")

    def check(model: object, inputs: Mapping[str, NDArray[Any]] | object = None, **arguments: object) -> CheckRecord:
        spec = markers.from_marker("trt_parity", (model,), arguments)
        return run(
            item,
            Request(
                nodeid=item.nodeid,
                model=model,
                folders=folders(item),
                parity=spec,
                inputs=inputs,
                inputs_source="given" if inputs is not None else "generated",
                calibration=spec.calibration,
                options=options,
            ),
        )

    return check


@pytest.fixture
def trt_engine(request: pytest.FixtureRequest, trt_build: Callable[..., Runner]) -> Runner:
    """The engine of the marked test: its model, precision and arguments."""
    from pytest_trtcheck.errors import ArgumentError
    from pytest_trtcheck.marked import marked

    found = marked(request.node)
    if found is None or found.error is not None:
        raise ArgumentError("trt_engine: the test has no trt_parity marker", "mark it, or build by hand with trt_build")
    spec = found.selected(request.node).parity
    model = spec.model if spec.model is not None else request.getfixturevalue("trt_model")
    arguments = {name: getattr(spec, name) for name in ("calibration", "shapes", "keep_fp32", "backend")}
    return trt_build(model, spec.precision[0], batch=spec.batch[0], **arguments)


@pytest.fixture
def trt_benchmark(request: pytest.FixtureRequest) -> GpuBenchmark:
    """`trt_benchmark(engine, inputs)`: pytest-benchmark's `benchmark`, timed in GPU time. It needs a GPU.

    The statistics, their JSON, comparison and histogram are pytest-benchmark's own.
    """
    from pytest_trtcheck.gpu_benchmark import GpuBenchmark

    workshop = _workshop(request)
    if workshop.detected is None:
        reason = f"not measured: trt_benchmark needs a GPU ({workshop.no_gpu_reason})"
        (pytest.fail if workshop.require_gpu else pytest.skip)(reason)
    return GpuBenchmark(request, workshop.detected)
