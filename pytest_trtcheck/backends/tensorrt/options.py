"""Which build options an installed TensorRT has, what they may be, and the identity of a `configure` function."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, get_args

from pytest_trtcheck.cache import hash_file
from pytest_trtcheck.errors import ArgumentError, listed, name_of, suggestion
from pytest_trtcheck.model.sources.stated import Statement
from pytest_trtcheck.spec import HardwareCompatible, Tiling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.backends.tensorrt.module import Target, TensorRTModule
    from pytest_trtcheck.spec import BuildOptions, Precision

_WHOLE_NUMBERS = {
    "workspace_mib": (1, 1 << 40, "of MiB, at least 1"),
    "optimization_level": (0, 5, "from 0 to 5"),
    "max_aux_streams": (0, 128, "of streams, from 0 to 128"),
    "l2_limit_mib": (1, 1 << 20, "of MiB, at least 1"),
    "weight_streaming_mib": (0, 1 << 40, "of MiB, at least 0, or 'auto'"),
    "dla_core": (0, 15, "that counts the cores from 0"),
    "min_subgraph_size": (1, 1 << 31, "of nodes, at least 1"),
}
_WORDS = {"hardware_compatible": get_args(HardwareCompatible), "tiling": get_args(Tiling)}
_FLAGS = ("sparsity", "version_compatible", "refit", "strip_weights", "timing_cache")

_NEEDS = {
    # By the bindings of 10.1 to 11.4, looked at release by release.
    "max_aux_streams": ("IBuilderConfig", "max_aux_streams", "10.0"),
    "tiling": ("IBuilderConfig", "tiling_optimization_level", "10.8"),
    "l2_limit_mib": ("IBuilderConfig", "l2_limit_for_tiling", "10.8"),
    "refit": ("BuilderFlag", "REFIT", "10.0"),
    "strip_weights": ("BuilderFlag", "STRIP_PLAN", "10.0"),
    "weight_streaming_mib": ("BuilderFlag", "WEIGHT_STREAMING", "10.0"),
}
_NOT_IN_RTX = (
    # TensorRT-RTX 1.4 to 1.7 take all of these without a word and build the same bytes.
    *("optimization_level", "sparsity", "version_compatible", "hardware_compatible"),
    *("tiling", "l2_limit_mib", "dla_core"),
)


def check_values(options: BuildOptions) -> None:
    """Refuse build options that no TensorRT could take.

    Raises
    ------
    ArgumentError
        Naming the option and what it may be.
    """
    for name, (least, most, what) in _WHOLE_NUMBERS.items():
        value = getattr(options, name)
        if value is None or (name == "weight_streaming_mib" and value == "auto"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ArgumentError(f"BuildOptions: {name}={value!r}: expected a whole number {what}")
    timeout = options.timeout_s
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0):
        raise ArgumentError(f"BuildOptions: timeout_s={timeout!r}: expected a number of seconds above 0")
    for name, allowed in _WORDS.items():
        if (value := getattr(options, name)) not in allowed and value is not None:
            expected = f"expected one of {', '.join(allowed)}"
            raise ArgumentError(f"BuildOptions: {name}={value!r}: {expected}", suggestion(str(value), allowed))
    if options.tf32 is not None and not isinstance(options.tf32, bool):
        raise ArgumentError(f"BuildOptions: tf32={options.tf32!r}: expected True, False or None")
    for name in _FLAGS:
        if not isinstance(getattr(options, name), bool):
            raise ArgumentError(f"BuildOptions: {name}={getattr(options, name)!r}: expected True or False")
    if isinstance(options.preview, str) or not all(isinstance(each, str) for each in options.preview):
        raise ArgumentError(
            f"BuildOptions: preview={options.preview!r}: expected a tuple of names", 'preview=("NAME", "-OTHER")'
        )
    if options.configure is not None:
        Callback.of(options.configure)


def check_options(
    module: TensorRTModule, options: BuildOptions, precision: Precision | None = None, target: Target | None = None
) -> None:
    """Refuse build options that are out of range, or that `module` does not have for this precision and target.

    Raises
    ------
    ArgumentError
        Naming the option, and the release that has it.
    """
    check_values(options)
    for plugin in options.plugins:
        if not Path(plugin).exists():
            raise ArgumentError(
                f"BuildOptions: plugins: {plugin}: no such file",
                "give the path of the plugin library",
                code="operator-library",
            )
    given = options.given()
    if module.is_rtx and (lacking := [name for name in _NOT_IN_RTX if name in given]):
        raise ArgumentError(
            f"{module.title} has no build option {', '.join(lacking)}",
            "leave it out, or build with backend='tensorrt'",
            code="build-option",
        )
    if options.min_subgraph_size is not None:
        raise ArgumentError(
            f"{module.title} has no build option min_subgraph_size: it does not divide a model",
            "leave it out: it is for backend='onnxruntime-tensorrt'",
            code="build-option",
        )
    for name, (holder, attribute, since) in _NEEDS.items():
        if name in given and not hasattr(getattr(module.handle, holder, None), attribute):
            raise ArgumentError(
                f"{module.title} has no build option {name}", f"TensorRT has it from {since} on", code="build-option"
            )
    for problem in _unknown_previews(module, options):
        raise problem
    if module.is_rtx and target is not None and not target.here and (options.refit or options.strip_weights):
        name = "refit" if options.refit else "strip_weights"
        raise ArgumentError(
            f"{module.title} builds no engine for {target.sm} with {name}=True here: that takes the GPU itself",
            "build it on the machine with the GPU, or leave the option out",
            code="build-option",
        )
    if options.dla_core is not None and (reason := _why_no_dla(module, precision)):
        raise ArgumentError(
            f"dla_core={options.dla_core}: {reason}", "leave dla_core out: the GPU runs all of it", code="build-option"
        )


def _unknown_previews(module: TensorRTModule, options: BuildOptions) -> Iterator[ArgumentError]:
    known = list(getattr(getattr(module.handle, "PreviewFeature", None), "__members__", {}))
    for name in options.preview:
        if name.removeprefix("-") not in known:
            there = suggestion(name.removeprefix("-"), known) or f"it has {listed(known, 8)}"
            yield ArgumentError(
                f"{module.title} has no preview feature {name.removeprefix('-')}", there, code="build-option"
            )


_DLA_GONE, _DLA_AGAIN = (10, 8), (11, 4, 1)
"""By NVIDIA's documentation of 11.3 and 11.4.1: 10.7 was the last release with DLA, until 11.4.1."""


def _why_no_dla(module: TensorRTModule, precision: Precision | None) -> str | None:
    """Why a release runs nothing of that precision on a DLA; whether the machine has one, the builder says.

    Read in the documentation: nothing of this was tried on a machine with a DLA.
    """
    kinds = set((precision or "fp16").split("+"))
    release = module.release
    if _DLA_GONE <= release < _DLA_AGAIN:
        return f"{module.title} has no DLA: up to 10.7 and from 11.4.1 on TensorRT has it"
    if not kinds <= {"fp16", "int8"}:
        return f"a DLA computes in FP16 and INT8, not in {precision}"
    if "int8" in kinds and release < _DLA_GONE:
        return (
            f"{module.title} needs a calibrator for INT8 on a DLA, which a model with Q/DQ nodes has not; TensorRT "
            "takes them there from 11.4.1 on"
        )
    return None


@dataclass(frozen=True)
class Callback:
    """A `configure` function as another process finds it, and the SHA-256 of its file."""

    module: str
    name: str
    file: str
    sha256: str

    @classmethod
    def of(cls, function: object) -> Callback:
        """What finds a function again.

        Raises
        ------
        ArgumentError
            It is not a function at the top of a module that is a file.
        """
        hint = "write `def name(config): …` at the top of a module (a conftest.py is one): the builder imports it"
        if not isinstance(function, FunctionType):
            raise ArgumentError(f"configure={function!r} is no function", hint, code="configure-function")
        name, known, arguments = function.__qualname__, function.__globals__, inspect.signature(function).parameters
        if known.get(name) is not function:
            what = "a lambda" if "<lambda>" in name else "made inside a function or class, or goes by another name"
            raise ArgumentError(
                f"configure={name_of(function)} is {what}: another process cannot import it",
                hint,
                code="configure-function",
            )
        file = known.get("__file__")
        if not file or not Path(file).is_file():
            raise ArgumentError(
                f"configure={name} is in no file that another process could import", hint, code="configure-function"
            )
        if not 1 <= len(arguments) <= 2:
            raise ArgumentError(
                f"configure={name} must take one argument, the builder config, or that and the network",
                code="configure-function",
            )
        return cls(function.__module__, name, str(Path(file).resolve()), hash_file(file))


def loaded_files(options: BuildOptions) -> tuple[Path, ...]:
    """The files that another process loads for a build: plugin libraries, and the module of `configure`."""
    module = getattr(options.configure, "__globals__", {}).get("__file__")
    return *map(Path, options.plugins), *([Path(module)] if module else [])


def plain(options: BuildOptions) -> dict[str, Any]:
    """All options as plain data, for the builder's process: its function by where it is found."""
    found = asdict(options)
    if options.configure is not None:
        found["configure"] = asdict(Callback.of(options.configure))
    return found


def key_parts(options: BuildOptions) -> dict[str, Any]:
    """What an engine depends on of them, plugin libraries apart: a function by its name, its file's content and what it
    reads of other files.
    """
    apart = {"plugins", "custom_ops", "timeout_s"}
    found = {name: value for name, value in plain(options).items() if name not in apart}
    if options.configure is not None:
        own = {name: found["configure"][name] for name in ("name", "sha256")}
        found["configure"] = {**own, "reads": Statement().of(options.configure)}
    return found
