"""What the fixtures give. `fixtures` declares them in every run, and turns to this module where a test asks for one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_trtcheck.choices import GPU
from pytest_trtcheck.errors import ArgumentError, CheckFailed, MissingDependencyError
from pytest_trtcheck.plugin import outcome, summary
from pytest_trtcheck.plugin.session import session_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Runner, RunnerByShape
    from pytest_trtcheck.check.checker import Checker
    from pytest_trtcheck.plugin.benchmark import GpuBenchmark
    from pytest_trtcheck.precision.reference import Reference
    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import BuildOptions, ParitySpec

_BUILD = ("model", "precision", "calibration", "shapes", "keep_fp32", "exclude", "backend")
"""What of the arguments of `trt_parity` decides what engine is built."""


def checker(request: pytest.FixtureRequest) -> Checker:
    """What makes the checks of a test."""
    summary.collect_from(request.node)  # of a test that asks for the fixture while it runs, nobody knew before
    return session_of(request.config).checker_for(outcome.parameters(request.node).get(GPU))


def _runner(request: pytest.FixtureRequest, model: object, spec: ParitySpec, **options: Any) -> RunnerByShape:
    """The engine of the one precision that `spec` names, or its emulation."""
    asked = outcome.request_for(request.node, model, spec, request.getfixturevalue, **options)
    return checker(request).runner(asked)


def _require_proof(checker: Checker, runner: RunnerByShape) -> None:
    """Fail a test that judges by its own code what no GPU ran, where that is asked for: no check of it says so."""
    if checker.build_only or runner.gpu_ran is True:
        return
    how = "is run by a server, on a GPU or not" if runner.gpu_ran == "unknown" else "runs on no GPU"
    if checker.require_gpu:
        raise CheckFailed(f"--trt-require-gpu: what trt_build gives {how}", code="gpu-required")
    if checker.evidence is not None:
        raise CheckFailed(
            f"--trt-require-evidence={checker.evidence.file}: what trt_build gives {how}, and no report tells what the "
            "test's own code makes of it\n  → make it a check: trt_check, with score= for what it asserts",
            code="evidence-required",
        )


def builder(request: pytest.FixtureRequest) -> Iterator[Callable[..., Runner]]:
    """`trt_build`."""
    from pytest_trtcheck.check.arguments import from_call
    from pytest_trtcheck.plugin import examples

    summary.collect_from(request.node)
    made: dict[object, RunnerByShape] = {}
    alive: list[object] = []  # whose `id` no other object may have

    @outcome.overheard(request.node)
    def build(
        model: object, precision: str = "fp16", *, options: BuildOptions | None = None, **arguments: object
    ) -> Runner:
        spec = from_call("trt_build", model, {"precision": precision, **arguments}, takes=_BUILD)
        # The examples of a test ask for the same engine over and over. Of much data a `repr` shows a part.
        data = arguments.get("calibration")
        rest = repr(replace(spec, model=None, calibration=None)), repr(options)
        key = (id(model), id(data), *rest) if examples.of(request.node) else len(made)
        if key not in made:
            alive.append((model, data))
            made[key] = _runner(request, spec.model, spec, **({"options": options} if options else {}))
            _require_proof(checker(request), made[key])
        return made[key]

    yield build
    for runner in made.values():
        runner.close()


def referrer(
    request: pytest.FixtureRequest, build_options: BuildOptions | None
) -> Iterator[Callable[[object], Reference]]:
    """`trt_reference`."""
    by = checker(request)
    custom_ops = getattr(build_options, "custom_ops", ())
    made: list[Reference] = []

    def reference(model: object) -> Reference:
        made.append(by.reference(model, outcome.folders(request.node), custom_ops))
        return made[-1]

    yield reference
    for each in made:
        each.close()


def check(request: pytest.FixtureRequest) -> Callable[..., CheckRecord]:
    """`trt_check`."""
    from pytest_trtcheck.check.arguments import from_call
    from pytest_trtcheck.plugin import examples

    summary.collect_from(request.node)
    fixture = request.getfixturevalue

    @outcome.overheard(request.node)
    def check(model: object, inputs: Mapping[str, NDArray[Any]] | object = None, **arguments: object) -> CheckRecord:
        spec, source = from_call("trt_check", model, arguments), "given"
        if inputs is None:
            inputs, source = fixture("trt_inputs"), "trt_inputs"
        profile = getattr(inputs, "profile", None)
        if profile and not spec.shapes:
            # Drawn by `strategies.inputs`: one engine for all that it may draw.
            spec = replace(spec, shapes=dict(profile))
        made = outcome.request_for(request.node, model, spec, fixture, inputs=inputs, inputs_source=source)
        together = examples.of(request.node)
        # Skipping ends the test: what a loop would have checked next is not.
        ends = "; the test ends here: what it would have checked after this was not checked"
        return outcome.run(request.node, made, ends=ends) if together is None else together.check(made)

    return check


def engine(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """`trt_engine`."""
    from pytest_trtcheck.plugin.items import marked

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
    if spec.engine is not None and checker(request).detected is None:
        _not_measured(request, f"the engine {spec.engine} runs on a GPU alone")
    runner = _runner(request, spec.model if spec.model is not None else request.getfixturevalue("trt_model"), spec)
    yield runner
    runner.close()


def benchmark(request: pytest.FixtureRequest) -> GpuBenchmark:
    """`trt_benchmark`."""
    from pytest_trtcheck.plugin.benchmark import GpuBenchmark

    if not request.config.pluginmanager.hasplugin("benchmark"):
        raise MissingDependencyError(
            "trt_benchmark: the plugin pytest-benchmark is not loaded",
            'pip install "pytest-trtcheck[benchmark]", and leave `-p no:benchmark` out',
        )
    gpu = checker(request).detected
    if gpu is None:
        _not_measured(request, "trt_benchmark needs a GPU")
    return GpuBenchmark(request, gpu)


def _not_measured(request: pytest.FixtureRequest, why: str) -> NoReturn:
    by = checker(request)
    (pytest.fail if by.require_gpu else pytest.skip)(f"not measured: {why} ({by.machine.no_gpu})")
