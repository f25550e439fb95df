"""The backends against the bindings of TensorRT releases whose libraries cannot be had: `tox -e tensorrt-api`.

Each release's bindings are downloaded and imported against empty libraries that are compiled here; mypy then checks
every name, signature and enum that the backends use against what the bindings say of themselves.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("pybind11_stubgen", reason="the environment tensorrt-api has it")
pytest.importorskip("mypy", reason="the environment tensorrt-api has it")

from tests.tensorrt_api import source
from tests.tensorrt_api.release import Release, obtain

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent

TAKEN = (
    *("10.1.0", "10.2.0", "10.3.0", "10.4.0", "10.5.0", "10.6.0", "10.7.0", "10.8.0.43", "10.9.0.34", "10.10.0.31"),
    *("10.11.0.33", "10.12.0.36", "10.13.3.9", "10.14.1.48.post1", "10.15.1.29", "10.16.1.11"),
    *("11.0.0.114", "11.1.0.106", "11.2.1.2", "11.3.0.99", "11.4.0.106"),
    *("rtx 1.5.0.114", "rtx 1.6.1.120", "rtx 1.7.1.116"),
    # Any other: TENSORRT_API="11.5.0.1, rtx 1.8.0.1" tox -e tensorrt-api
    *(each.strip() for each in os.environ.get("TENSORRT_API", "").split(",") if each.strip()),
)
TOO_OLD = ("8.6.1", "10.0.1", "rtx 1.4.0.76")
OLDEST, NEWEST, NEWEST_RTX = "10.1.0", "11.4.0.106", "rtx 1.7.1.116"

NOT_TENSORRTS = {"__members__", "__version__", "getCreators", "getPluginCreators"}
"""What `hasattr` and `getattr` look for in other things: enums, any module, plugin libraries."""
COMPUTED = {
    "BuilderFlag",
    "ComputeCapability",
    "HardwareCompatibilityLevel",
    "PreviewFeature",
    "TilingOptimizationLevel",
}
"""The enums of which members are taken by a computed name; `test_names_that_are_computed` checks those. Names of
`PreviewFeature` are the user's, and looked up there."""
COMPUTED_OF_OTHERS = {"options", "module.handle", "_module_of(found)", "importlib.import_module(module)"}
UNTYPED = (
    "creator.name",  # The bindings say nothing of what a registry's list holds.
    *("model.graph.node", "node.attribute"),  # ONNX's
    *("spec.name", "spec.dtype", "spec.shape"),  # a model's input, or output
)
"""What has no type and needs none."""

OPTIONS = {
    "workspace_mib": 64,
    "optimization_level": 3,
    "sparsity": True,
    "version_compatible": True,
    "max_aux_streams": 1,
    "tiling": "full",
    "l2_limit_mib": 1,
    "refit": True,
    "strip_weights": True,
    "weight_streaming_mib": 0,
}
"""Build options that need something of the release."""


@pytest.fixture(scope="session")
def compiler() -> str:
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if found is None:
        pytest.skip("no C compiler (cc, gcc, clang) for the empty libraries")
    return found


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept between runs where the environment names a folder; one a worker, so that none sees another's half."""
    kept = os.environ.get("TENSORRT_API_CACHE")
    return Path(kept, os.environ.get("PYTEST_XDIST_WORKER", "")) if kept else tmp_path_factory.mktemp("bindings")


@pytest.fixture(scope="session")
def release(compiler: str, cache: Path) -> Callable[[str], Release]:
    def get(title: str) -> Release:
        name, version = ("tensorrt_rtx", title[4:]) if title.startswith("rtx ") else ("tensorrt", title)
        try:
            return obtain(name, version, cache, compiler)
        except LookupError as error:
            if "No matching distribution" in str(error):
                pytest.skip(f"the index has no bindings of {title} for this Python: {error}")
            raise

    return get


@pytest.fixture(scope="session")
def stubs(release: Callable[[str], Release], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("stubs")

    def get(title: str) -> Path:
        if title not in made:
            made[title] = root / title.replace(" ", "-")
            release(title).write_stubs(made[title])
        return made[title]

    return get


@pytest.fixture
def planted(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A copy of the package in which one file has one text for another."""

    def plant(file: str, text: str, other: str) -> Path:
        root = tmp_path / "planted"
        shutil.copytree(
            ROOT / "pytest_trtcheck", root / "pytest_trtcheck", ignore=shutil.ignore_patterns("__pycache__")
        )
        path = root / source.BACKEND / file
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, other, 1))
        return root

    return plant


# What the backends use


REFUSED = """
import json, sys
from pytest_trtcheck.backends.tensorrt.module import find_module
from pytest_trtcheck.backends.tensorrt.options import check_options
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.spec import BuildOptions
module, refused = find_module(sys.argv[1]), []
for name, value in json.loads(sys.argv[2]).items():
    try:
        check_options(module, BuildOptions(**{name: value}))
    except ArgumentError:
        refused.append(name)
print(json.dumps(refused))
"""


def refused(found: Release) -> set[str]:
    """The build options that the plugin refuses with a release."""
    return set(json.loads(found.run(REFUSED, found.name, json.dumps(OPTIONS))))


@pytest.mark.parametrize("title", TAKEN)
def test_a_release_has_all_that_the_backends_use(
    title: str, release: Callable[[str], Release], stubs: Callable[[str], Path], tmp_path: Path
) -> None:
    is_rtx = title.startswith("rtx ")
    assert source.check(ROOT, stubs(title), tmp_path, is_rtx=is_rtx, refused=refused(release(title))) == []


def test_build_options_are_refused_where_the_release_has_them_not(release: Callable[[str], Release]) -> None:
    for title in (OLDEST, "10.7.0"):
        assert refused(release(title)) == {"tiling", "l2_limit_mib"}
    for title in ("10.8.0.43", NEWEST):
        assert refused(release(title)) == set()
    of_rtx = {"optimization_level", "sparsity", "version_compatible", "tiling", "l2_limit_mib"}
    assert refused(release(NEWEST_RTX)) == of_rtx


def test_no_use_is_left_out(stubs: Callable[[str], Path], tmp_path: Path) -> None:
    assert left_out(ROOT, stubs, tmp_path) == set()


def left_out(root: Path, stubs: Callable[[str], Path], scratch: Path) -> set[str]:
    """The uses of what has no type, neither in TensorRT nor in TensorRT-RTX."""
    without = [
        {problem.said for problem in source.untyped(root, stubs(title), scratch / title)}
        for title in (NEWEST, NEWEST_RTX)
    ]
    return {said for said in without[0] & without[1] if not any(text in said for text in UNTYPED)}


def test_names_in_quotes_are_of_some_release(stubs: Callable[[str], Path]) -> None:
    known = source.members(stubs(OLDEST)) | source.members(stubs(NEWEST)) | source.members(stubs(NEWEST_RTX))
    assert source.spelled(ROOT) - known == NOT_TENSORRTS


def test_names_that_are_computed(release: Callable[[str], Release]) -> None:
    assert source.computed(ROOT) == COMPUTED | COMPUTED_OF_OTHERS
    flags = json.dumps(sorted(source.flags(ROOT)))
    assert "SPARSE_WEIGHTS" in flags
    lacking = (
        "import {0} as trt, sys, json; print([f for f in json.loads(sys.argv[1]) if not hasattr(trt.BuilderFlag, f)])"
    )
    for title in (OLDEST, NEWEST, NEWEST_RTX):
        found = release(title)
        assert found.run(lacking.format(found.name), flags).strip() == "[]"
    tiling = (
        "import tensorrt as trt; from typing import get_args; from pytest_trtcheck.spec import Tiling;"
        "print([each for each in get_args(Tiling) if not hasattr(trt.TilingOptimizationLevel, each.upper())])"
    )
    for title in ("10.8.0.43", NEWEST):
        assert release(title).run(tiling).strip() == "[]"
    ask = (
        "import tensorrt as trt, json; from pytest_trtcheck.backends.tensorrt.io import DTYPES;"
        "print(json.dumps([[name for name in DTYPES if not hasattr(trt.DataType, name)],"
        " list(trt.HardwareCompatibilityLevel.__members__), list(trt.ILogger.Severity.__members__)]))"
    )
    for title in (OLDEST, "10.8.0.43", "10.9.0.34", NEWEST):
        lacking, levels, severities = json.loads(release(title).run(ask))
        assert lacking == []
        since_10_9 = {"SAME_COMPUTE_CAPABILITY"} if title not in {OLDEST, "10.8.0.43"} else set()
        assert set(levels) == {"AMPERE_PLUS", "NONE"} | since_10_9
        assert set(severities) == {"ERROR", "INFO", "INTERNAL_ERROR", "VERBOSE", "WARNING"}
    modules = (
        "from pytest_trtcheck.backends.tensorrt.module import find_module; found = find_module('tensorrt_rtx');"
        "assert all(hasattr(found.handle.ComputeCapability, 'SM%d%d' % each) for each in found.compile_only());"
        "assert hasattr(found.handle.ComputeCapability, 'CURRENT'); print(len(found.compile_only()))"
    )
    assert int(release(NEWEST_RTX).run(modules)) >= 5


# What is done by release

FIND = """
import sys
from pytest_trtcheck.backends.tensorrt.module import find_module
from pytest_trtcheck.errors import MissingDependencyError
try:
    print(find_module(sys.argv[1]).title)
except MissingDependencyError as error:
    print(error.message)
"""


@pytest.mark.parametrize("title", TAKEN)
def test_a_release_is_taken(title: str, release: Callable[[str], Release]) -> None:
    found = release(title)
    said = found.run(FIND, found.name).strip()
    assert said.startswith(
        ("TensorRT-RTX " if found.name == "tensorrt_rtx" else "TensorRT ") + ".".join(map(str, found.numbers))
    )


@pytest.mark.parametrize("title", TOO_OLD)
def test_a_release_that_is_too_old_is_refused_by_its_number(title: str, release: Callable[[str], Release]) -> None:
    found = release(title)
    needed = "TensorRT-RTX 1.5" if found.name == "tensorrt_rtx" else "TensorRT 10.1"
    said = found.run(FIND, found.name).strip()
    assert said == f"{found.name} {title.removeprefix('rtx ')} is too old: {needed} or newer is needed"


def test_what_a_module_has_does_not_tell_its_release(stubs: Callable[[str], Path]) -> None:
    assert {"OnnxParser", "num_io_tensors"} <= source.members(stubs("8.6.1"))


CALLED_BACK = """
import sys, importlib
from pytest_trtcheck.backends.tensorrt.builder import logger
from pytest_trtcheck.backends.tensorrt.callbacks import layer_profiler, output_allocator
trt = importlib.import_module(sys.argv[1])
heard = []
log = logger(trt, lambda severity, text: heard.append((severity, text)))
assert isinstance(log, trt.ILogger)
for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
    log.log(getattr(trt.ILogger.Severity, name), name.lower())
assert heard == [("INTERNAL_ERROR", "internal_error"), ("ERROR", "error"), ("WARNING", "warning")], heard
allocator = output_allocator(trt, None)
assert isinstance(allocator, trt.IOutputAllocator)
allocator.notify_shape("y", trt.Dims([2, 3]))
assert allocator.shapes == {"y": (2, 3)}
profiler = layer_profiler(trt)
assert isinstance(profiler, trt.IProfiler)
profiler.report_layer_time("conv1 + relu1", 0.25)
assert profiler.taken == [("conv1 + relu1", 0.25)]
flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
print(1 << int(flag))
"""


@pytest.mark.parametrize(("title", "flags"), [(OLDEST, 2), ("10.12.0.36", 2), ("11.0.0.114", 1), (NEWEST, 1)])
def test_what_tensorrt_calls_back_can_be_made(title: str, flags: int, release: Callable[[str], Release]) -> None:
    found = release(title)
    # Strong typing is flag 1 of 10, and flag 0 of 11, where it is without effect.
    assert int(found.run(CALLED_BACK, found.name)) == flags


# Planted

CONFIG = "config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED"
PLANTS = {
    "of RTX alone": (NEWEST, CONFIG, "config.num_compute_capabilities = 1", '"IBuilderConfig" has no attribute'),
    "of 11": ("10.5.0", CONFIG, "trt.IStreamReaderV2()", '"TensorRT" has no attribute "IStreamReaderV2"'),
    "of 10": (NEWEST, CONFIG, "config.set_flag(trt.BuilderFlag.FP16)", 'has no attribute "FP16"'),
    "an enum's typo": (OLDEST, "BuilderFlag.TF32", "BuilderFlag.TF_32", 'has no attribute "TF_32"'),
    "an argument": (OLDEST, "builder.create_network(", "builder.create_network(0, ", "Too many arguments"),
    "a keyword": (NEWEST, "ignore_mismatch=False", "ignore_errors=False", "Unexpected keyword argument"),
    "a type": (NEWEST, "parser.parse_from_file(model)", "parser.parse_from_file(0)", "incompatible type"),
    "a result": (NEWEST, "builder.create_optimization_profile()", "builder.create_builder_config()", "set_shape"),
    "an option that is not refused": ("10.7.0", CONFIG, "config.tiling_optimization_level = None", "tiling_optim"),
    "a profiler's": (OLDEST, CONFIG, "trt.IProfiler().report_time('conv', 1.0)", 'has no attribute "report_time"'),
    "not behind is_rtx": (NEWEST, "if is_rtx:", "if not is_rtx:", '"IBuilderConfig" has no attribute'),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wrong_use_is_seen(
    plant: str, stubs: Callable[[str], Path], planted: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    title, text, other, said = PLANTS[plant]
    problems = source.check(planted("builder.py", text, other), stubs(title), tmp_path, is_rtx=False)
    assert problems
    assert any(said in problem.said for problem in problems), problems


def test_a_use_of_an_object_without_a_type_is_seen(
    stubs: Callable[[str], Path], planted: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    root = planted(
        "builder.py",
        "def _dims(tensor: Any)",
        "def _other(thing: Any) -> Any:\n    return thing.num_layers\n\n\ndef _dims(tensor: Any)",
    )
    assert left_out(root, stubs, tmp_path) == {"return thing.num_layers"}


def test_a_misspelled_name_in_quotes_is_seen(
    stubs: Callable[[str], Path], planted: Callable[[str, str, str], Path]
) -> None:
    root = planted("engine.py", '"get_engine_stat"', '"get_engine_stats"')
    assert "get_engine_stats" in source.spelled(root) - source.members(stubs(NEWEST))
