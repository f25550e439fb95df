"""The fixtures: those that users override, and those that they use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.check.checker import Checker
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.plugin.benchmark import GpuBenchmark
    from pytest_trtcheck.precision.reference import Reference
    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import BuildOptions, ParitySpec


def _checker(request: pytest.FixtureRequest) -> Checker:
    from pytest_trtcheck.choices import GPU
    from pytest_trtcheck.plugin.outcome import parameters
    from pytest_trtcheck.plugin.session import session_of
    from pytest_trtcheck.plugin.summary import collect

    collect(request.config)  # of a test that asks for the fixture while it runs, nobody knew before
    return session_of(request.config).checker_for(parameters(request.node).get(GPU))


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
    return _checker(request).judged_gpu()


_BUILD = ("model", "precision", "calibration", "shapes", "keep_fp32", "exclude", "backend")
"""What of the arguments of `trt_parity` decides what engine is built."""


def _runner(request: pytest.FixtureRequest, model: object, spec: ParitySpec, **options: Any) -> Runner:
    """The engine of the one precision that `spec` names, or its emulation."""
    from pytest_trtcheck.plugin.outcome import request_for

    return _checker(request).runner(request_for(request.node, model, spec, request.getfixturevalue, **options))


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
    from pytest_trtcheck.check.arguments import from_call
    from pytest_trtcheck.plugin import examples

    del trt_build_options
    made: dict[object, Runner] = {}

    def build(
        model: object, precision: str = "fp16", *, options: BuildOptions | None = None, **arguments: object
    ) -> Runner:
        spec = from_call("trt_build", model, {"precision": precision, **arguments}, takes=_BUILD)
        # The examples of a test ask for the same engine over and over.
        key = (id(model), repr(spec), repr(options)) if examples.of(request.node) else len(made)
        if key not in made:
            made[key] = _runner(request, spec.model, spec, **({"options": options} if options else {}))
        return made[key]

    yield build
    for runner in made.values():
        runner.close()


@pytest.fixture
def trt_reference(
    request: pytest.FixtureRequest, trt_build_options: BuildOptions | None
) -> Iterator[Callable[[object], Reference]]:
    """`trt_reference(model)`: the FP32 model on ONNX Runtime, as a callable from inputs to outputs."""
    from pytest_trtcheck.plugin.outcome import folders

    checker = _checker(request)
    custom_ops = getattr(trt_build_options, "custom_ops", ())
    made: list[Reference] = []

    def reference(model: object) -> Reference:
        made.append(checker.reference(model, folders(request.node), custom_ops))
        return made[-1]

    yield reference
    for each in made:
        each.close()


@pytest.fixture
def trt_check(request: pytest.FixtureRequest, trt_build_options: BuildOptions | None) -> Callable[..., CheckRecord]:
    """`trt_check(model, inputs=None, *, precision=…, tol=…, …)`: the check of `trt_parity`, by hand.

    Takes the arguments of the marker `trt_parity` (one precision, one batch), fails the test as a marked one fails, and
    returns the record.
    """
    from pytest_trtcheck.check.arguments import from_call
    from pytest_trtcheck.plugin import examples
    from pytest_trtcheck.plugin.outcome import request_for, run

    del trt_build_options
    fixture = request.getfixturevalue

    def check(model: object, inputs: Mapping[str, NDArray[Any]] | object = None, **arguments: object) -> CheckRecord:
        spec, source = from_call("trt_check", model, arguments), "given"
        if inputs is None:
            inputs, source = fixture("trt_inputs"), "trt_inputs"
        profile = getattr(inputs, "profile", None)
        if profile and not spec.shapes:
            # Drawn by `strategies.inputs`: one engine for all that it may draw.
            spec = replace(spec, shapes=dict(profile))
        made = request_for(request.node, model, spec, fixture, inputs=inputs, inputs_source=source)
        together = examples.of(request.node)
        return run(request.node, made) if together is None else together.check(made)

    return check


@pytest.fixture
def trt_engine(request: pytest.FixtureRequest, trt_build_options: BuildOptions | None) -> Iterator[Runner]:
    """The engine of the marked test: its model, precision and arguments. Where these name a batch, that one; where they
    name an engine that exists, that, which needs a GPU.
    """
    from pytest_trtcheck.errors import ArgumentError
    from pytest_trtcheck.plugin.items import marked

    del trt_build_options
    found = marked(request.node)
    if found is None:
        raise ArgumentError(
            "trt_engine: the test has no trt_parity marker",
            "mark it, or build by hand with trt_build",
            code="marker-misplaced",
        )
    problem = found.problem(request.node)
    if problem is not None:
        raise problem
    spec = found.selected(request.node)
    checker = _checker(request)
    if spec.engine is not None and checker.detected is None:
        reason = f"not measured: the engine {spec.engine} runs on a GPU alone ({checker.machine.no_gpu})"
        (pytest.fail if checker.require_gpu else pytest.skip)(reason)
    runner = _runner(request, spec.model if spec.model is not None else request.getfixturevalue("trt_model"), spec)
    yield runner
    runner.close()


@pytest.fixture
def trt_benchmark(request: pytest.FixtureRequest) -> GpuBenchmark:
    """`trt_benchmark(engine, inputs)`: pytest-benchmark's `benchmark`, timed in GPU time. It needs both.

    The statistics, their JSON, comparison and histogram are pytest-benchmark's own.
    """
    from pytest_trtcheck.errors import MissingDependencyError
    from pytest_trtcheck.plugin.benchmark import GpuBenchmark

    if not request.config.pluginmanager.hasplugin("benchmark"):
        raise MissingDependencyError(
            "trt_benchmark: the plugin pytest-benchmark is not loaded",
            'pip install "pytest-trtcheck[benchmark]", and leave `-p no:benchmark` out',
        )
    checker = _checker(request)
    if checker.detected is None:
        reason = f"not measured: trt_benchmark needs a GPU ({checker.machine.no_gpu})"
        (pytest.fail if checker.require_gpu else pytest.skip)(reason)
    return GpuBenchmark(request, checker.detected)
