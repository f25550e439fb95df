"""What the builder process does: one request in, one engine file or a parser's word out. `tensorrt.build` and
`tensorrt.parse` ask it, and name all the files.

Messages are written as they come, so that the last of them survive a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import json
import os
import re
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.backends.tensorrt.module import too_old
from pytest_trtcheck.errors import plural
from pytest_trtcheck.model.apart import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_trtcheck.model.apart import Blob

MIB = 1 << 20
listeners: list[Callable[[str, str], None]] = []
"""Who is told what TensorRT says in this process: severity and text."""
# The parser logs its own errors again, node dumps included; it is asked for them directly instead.
_PARSER_ECHO = re.compile(r"ModelImporter\.cpp:\d+: (?:While parsing node|--- (?:Begin|End) node|ERROR: )")


class RequestError(Exception):
    """What stands against the build, all of it, and at which stage it was found."""

    def __init__(self, stage: str, errors: list[str]) -> None:
        super().__init__(stage, errors)
        self.stage = stage
        self.errors = errors


def serve(request: dict[str, Any]) -> Answer:
    """Do what `request` asks for; the answer is `{stage, errors, …}`; no stage: all is well.

    The task `build` adds `build_s`, `io` and `notes`, the task `parse` adds `module`, `version` and `provided`, the
    task `inspect` adds `io` and `layers`, and the task `call` what the function gives, which may be an `Answer` with
    bytes. The task `ready` adds nothing.
    """
    answer: dict[str, Any] = {"stage": "", "errors": [], "build_s": 0.0, "io": {}, "notes": []}
    blobs: Sequence[Blob] = ()
    heard: list[str] = []
    with Path(request["messages"]).open("w", encoding="utf-8") as sink:

        def say(severity: str, text: str) -> None:
            sink.write(json.dumps([severity, text]) + "\n")
            sink.flush()
            heard.append(text)

        listeners.append(say)
        try:
            if request["task"] == "parse":
                _parse_alone(request, answer)
            elif request["task"] == "inspect":
                _inspect(request, answer)
            elif request["task"] == "ready":
                _get_ready()
            elif request["task"] == "call":
                module, _, name = request["function"].partition(":")
                given = getattr(importlib.import_module(module), name)(request)
                value, blobs = given if isinstance(given, Answer) else (given, ())
                answer |= value
            else:
                answer |= build_here(importlib.import_module(request["module"]), request, say)
            _refuse_changed_meaning(heard)
        except RequestError as error:
            answer["stage"], answer["errors"] = error.stage, error.errors
            answer["errno"] = getattr(error.__cause__, "errno", None)
        finally:
            listeners.remove(say)
    return Answer(answer, blobs)


def _get_ready() -> None:
    """What any build for the GPU here begins with; what goes wrong is said by the build."""
    from pytest_trtcheck.backends.tensorrt import cuda
    from pytest_trtcheck.backends.tensorrt.module import available
    from pytest_trtcheck.errors import CheckError

    starting = threading.Thread(target=cuda.make_context)
    starting.start()
    available()
    with contextlib.suppress(CheckError):
        cuda.load()
    starting.join()


def _refuse_changed_meaning(heard: list[str]) -> None:
    """Refuse an engine that TensorRT built from something else than the model, with no more than a warning."""
    if any("Defaulting to INT8 instead" in text for text in heard):
        # Values that need the upper half of the UINT8 range saturate, and no emulation of the model would show it.
        raise RequestError(
            "keep the meaning of", ["TensorRT takes UINT8 quantization for INT8: half the range is lost"]
        )


def build_here(trt: Any, request: dict[str, Any], say: Callable[[str, str], None]) -> dict[str, Any]:
    """Parse and build in this process; the seconds that took, the engine's inputs and outputs, and what to note."""
    _require_threads()
    started = time.perf_counter()
    log = process_logger(trt)
    is_rtx = request["module"] == "tensorrt_rtx"
    if not is_rtx:
        trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    libraries = _load_plugins(builder, request["options"]["plugins"])
    network = _parse(trt, builder, log, request["model"])
    _tell_unnamed_apart(network, request["profile"])
    config = builder.create_builder_config()
    _configure(trt, config, request)
    _add_profile(builder, network, config, request["profile"])
    notes = _use_dla(trt, builder, network, config, request["options"]["dla_core"])
    _call_back(config, network, request["options"]["configure"])
    # Whatever the user's function said: by these the engine is what the check takes it for.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if is_rtx:
        _aim(trt, config, request["target"])
    timing_cache = _attach_timing_cache(config, request["timing_cache"])
    plan = builder.build_serialized_network(network, config)
    if plan is None and is_rtx and _is_unlisted_gpu(trt, request["target"]):
        # Releases run on GPUs that they do not list (H200 with 1.5), but may build for them only portably.
        say("WARNING", "the build for this GPU, which is not listed, failed; a portable engine is built instead")
        config.num_compute_capabilities = 0
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RequestError("build an engine from", [])  # The logger has heard why.
    try:
        with Path(request["plan"]).open("wb") as file:
            file.write(memoryview(plan))
    except OSError as error:
        raise RequestError("store the engine of", [str(error)]) from error
    if timing_cache is not None:
        _save_timing_cache(config, Path(request["timing_cache"]))
    answer = {"build_s": time.perf_counter() - started, "io": _io(network), "notes": notes}
    del libraries  # They must stay loaded until here.
    return answer


def _require_threads() -> None:
    """See that threads can be started, for each processor, as TensorRT does: it waits without end for one it lacks."""
    is_over = threading.Event()
    wanted, started = (os.cpu_count() or 1) + 2, list[threading.Thread]()
    try:
        for _ in range(wanted):
            thread = threading.Thread(target=is_over.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise RequestError("build an engine from", [f"{error}: {len(started)} of {wanted} were started"]) from error
    finally:
        is_over.set()
        for thread in started:
            thread.join()


def _parse_alone(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """Parse with the first of the modules that can be loaded, which needs neither a GPU nor a driver."""
    reasons = []
    for name in request["modules"]:
        try:
            trt = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
            continue
        reason = too_old(name, trt.__version__)
        if reason is None:
            break
        reasons.append(reason)
    else:
        raise RequestError("load", reasons)
    answer |= {"module": name, "version": trt.__version__, "provided": []}
    log = process_logger(trt)
    if name != "tensorrt_rtx":
        trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    before = _creators(builder)
    libraries = _load_plugins(builder, request["plugins"])
    answer["provided"] = sorted(_creators(builder) - before)
    _parse(trt, builder, log, request["model"])
    del libraries


def _inspect(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """Load an engine on the GPU, where its loader may crash, and write down what it is."""
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import find_module
    from pytest_trtcheck.errors import CheckError

    try:
        engine = Engine(Path(request["model"]), find_module(request["module"]), plugins=request["plugins"])
        answer |= {"io": engine.io(), "layers": engine.layers_by_precision()}
    except CheckError as error:
        raise RequestError("load", [str(error)]) from error
    Path(request["kernels"]).write_bytes(engine.jit_cache() or b"")


def _creators(builder: Any) -> set[str]:
    """The operators of all plugins that the builder finds: its own registry's, and those of the registries above it."""
    registry = builder.get_plugin_registry()
    creators = registry.all_creators
    if hasattr(registry, "all_creators_recursive"):  # Not in the first releases of TensorRT 10.
        creators = registry.all_creators_recursive
    return {str(creator.name) for creator in creators}


def _io(network: Any) -> dict[str, Any]:
    """Inputs and outputs as TensorRT understood the model, which may know more of the shapes than the model says."""
    tensors = {
        "inputs": map(network.get_input, range(network.num_inputs)),
        "outputs": map(network.get_output, range(network.num_outputs)),
    }
    return {
        side: [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.name,
                "shape": list(_dims(tensor)),
                "shape_tensor": bool(tensor.is_shape_tensor),
            }
            for tensor in each
        ]
        for side, each in tensors.items()
    }


@functools.cache
def process_logger(trt: Any) -> Any:
    """The logger of this process: TensorRT takes the first that it is given for all that it ever makes here."""

    def tell(severity: str, text: str) -> None:
        for listener in tuple(listeners):
            listener(severity, text)

    return logger(trt, tell)


def logger(trt: Any, say: Callable[[str, str], None]) -> Any:
    """A logger of TensorRT that passes on severity and text from warnings up, without the parser's echo."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("VERBOSE", "INFO") or _PARSER_ECHO.search(msg):
                return
            say(severity.name, msg)

    return Collector()


def _load_plugins(builder: Any, paths: list[str]) -> list[Any]:
    loaded = []
    errors = []
    for path in paths:
        try:
            loaded.append(load_plugin(builder.get_plugin_registry(), path))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise RequestError("load the plugins for", errors)
    return loaded


def load_plugin(registry: Any, path: str) -> tuple[Any, Any]:
    """Load a plugin library of either kind: with creator functions, or registering itself when it is loaded.

    Returns
    -------
    The library and TensorRT's handle for it, which must be kept as long as the plugins are used.

    Raises
    ------
    ValueError
        It cannot be loaded.
    """
    resolved = str(Path(path).resolve())
    try:
        library = ctypes.CDLL(resolved, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ValueError(f"{path} cannot be loaded as a plugin library: {error}") from error
    handle = None
    if hasattr(library, "getCreators") or hasattr(library, "getPluginCreators"):
        handle = registry.load_library(resolved)
        if handle is None:
            raise ValueError(f"{path} cannot be loaded as a plugin library")
    return library, handle


def _parse(trt: Any, builder: Any, log: Any, model: str) -> Any:
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # A release that has no such flag knows nothing but strongly typed networks.
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    # Parsing from the file lets the parser find the external data beside it.
    if not parser.parse_from_file(model):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise RequestError("parse", errors)
    if network.num_outputs == 0:
        # The parser takes a file of anything for an empty model.
        raise RequestError("parse", ["the model has no outputs, or the file is no ONNX model"])
    return network


def _tell_unnamed_apart(network: Any, profile: dict[str, list[list[int]]]) -> None:
    """Fix dimensions that a model calls "?", for PaddlePaddle means no name by that, and TensorRT equal sizes.

    Another name for them does not do: TensorRT-RTX then fails on its own symbols. So where one shape alone is asked
    for, the input gets that shape.
    """
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    unnamed = {
        tensor.name: sum(tensor.get_dimension_name(axis) == "?" for axis in range(len(tensor.shape)))
        for tensor in tensors
    }
    if sum(unnamed.values()) < 2:
        return
    for tensor in tensors:
        shapes = profile.get(tensor.name)
        if unnamed[tensor.name] and shapes and shapes[0] == shapes[2]:
            tensor.shape = tuple(shapes[0])


def _parser_error(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    said = str(error.desc())
    if said == "false":  # What the parser's bare "not supported" assertions say.
        said = f"this TensorRT does not import {error.node_operator()}"
    stack = [str(name) for name in (error.local_function_stack() or ())]
    inside = f" [inside the function {' / '.join(stack)}]" if stack else ""
    return f"{where}{error.code().name}: {said}{inside} ({error.file()}:{error.line()} {error.func()})"


def _configure(trt: Any, config: Any, request: dict[str, Any]) -> None:
    options = request["options"]
    tf32 = request["precision"] == "tf32" if options["tf32"] is None else options["tf32"]
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if options["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_mib"] * MIB)
    if options["optimization_level"] is not None:
        config.builder_optimization_level = options["optimization_level"]
    if options["max_aux_streams"] is not None:
        config.max_aux_streams = options["max_aux_streams"]
    if options["tiling"] is not None:
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options["tiling"].upper())
    if options["l2_limit_mib"] is not None:
        config.l2_limit_for_tiling = options["l2_limit_mib"] * MIB
    # A stripped plan gets back the weights that it was built with, unless any others are wanted too.
    identical = options["strip_weights"] and not options["refit"]
    flags = {
        "SPARSE_WEIGHTS": options["sparsity"],
        "VERSION_COMPATIBLE": options["version_compatible"],
        "REFIT": options["refit"],
        "STRIP_PLAN": options["strip_weights"],
        "REFIT_IDENTICAL": identical,
        "WEIGHT_STREAMING": options["weight_streaming_mib"] is not None,
    }
    for name in (name for name, is_wanted in flags.items() if is_wanted):
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in options["preview"]:
        feature = getattr(trt.PreviewFeature, name.removeprefix("-"))
        config.set_preview_feature(feature, not name.startswith("-"))
    if options["hardware_compatible"] != "none":
        level = options["hardware_compatible"].upper()
        if not hasattr(trt.HardwareCompatibilityLevel, level):
            raise RequestError("configure the build of", [f"this TensorRT has no hardware_compatible={level.lower()}"])
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options["version_compatible"] and options["plugins"]:
        # Such an engine carries its plugins, since the runtime that loads it may not have them.
        config.plugins_to_serialize = [str(Path(path).resolve()) for path in options["plugins"]]


def _aim(trt: Any, config: Any, target: dict[str, Any]) -> None:
    """Build for the target's GPU alone (TensorRT-RTX)."""
    major, minor = target["compute_capability"]
    capability = "CURRENT" if target["here"] else f"SM{major}{minor}"
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0):
        raise RequestError("configure the build of", [f"the builder refused the target {capability}"])


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, core: int | None) -> list[str]:
    """Let a DLA run what it can; how much that is. An engine of which it runs nothing is not what was asked for."""
    if core is None:
        return []
    if core >= builder.num_DLA_cores:
        there = f"this machine has {builder.num_DLA_cores}" if builder.num_DLA_cores else "this machine has no DLA"
        raise RequestError(f"use dla_core={core} for", [there])
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    fit = sum(config.can_run_on_DLA(layer) for layer in layers)
    if not fit:
        raise RequestError(f"use dla_core={core} for", [f"it can run none of the {plural(len(layers), 'layer')}"])
    return [f"DLA core {core} can run {fit} of {plural(len(layers), 'layer')}, the GPU runs the others"]


def _call_back(config: Any, network: Any, found: dict[str, str] | None) -> None:
    """Let the user's function change the builder config."""
    if found is None:
        return
    stage = f"call configure={found['name']} ({found['file']}) for"
    try:
        function = getattr(_module_of(found), found["name"])
        profiles = config.num_optimization_profiles
        takes_network = len(inspect.signature(function).parameters) > 1
        returned = function(config, network) if takes_network else function(config)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(line.filename).name}:{line.lineno})"
        raise RequestError(stage, [said]) from error
    if returned is not None:
        raise RequestError(
            stage, [f"it returned {returned!r}: it is to change the config it is given, and return None"]
        )
    if config.num_optimization_profiles != profiles:
        raise RequestError(stage, ["it added an optimization profile: declare shapes= in the marker instead"])


def _module_of(found: dict[str, str]) -> Any:
    """The module of a function: by its name, unless another file goes by it here (several conftest.py do)."""
    try:
        module = importlib.import_module(found["module"])
        if Path(module.__file__ or "").resolve() == Path(found["file"]):
            return module
    except ImportError:
        pass
    spec = importlib.util.spec_from_file_location(found["module"], found["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _add_profile(builder: Any, network: Any, config: Any, profile: dict[str, list[list[int]]]) -> None:
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    errors = [
        f"shapes are given for {name!r}, which is no input of the model" for name in profile if name not in inputs
    ]
    for name, tensor in inputs.items():
        errors += _profile_errors(name, tensor, profile.get(name))
    if errors:
        errors.append(
            f"the model's inputs are {', '.join(f'{name} {_dims(tensor)}' for name, tensor in inputs.items())}"
        )
        raise RequestError("fit the given shapes to", errors)
    if not profile:
        return
    optimization = builder.create_optimization_profile()
    for name, (least, usual, most) in profile.items():
        if inputs[name].is_shape_tensor:
            optimization.set_shape_input(name, least, usual, most)
        else:
            optimization.set_shape(name, least, usual, most)
    if config.add_optimization_profile(optimization) < 0:
        raise RequestError("fit the given shapes to", ["the builder refused the optimization profile"])


def _profile_errors(name: str, tensor: Any, shapes: list[list[int]] | None) -> Iterator[str]:
    dims = _dims(tensor)
    if shapes is None:
        if -1 in dims:
            yield f"input {name!r} has a dynamic shape {dims} and no profile"
        elif tensor.is_shape_tensor:
            yield f"input {name!r} is a shape tensor, and no range of its values is given"
        return
    # The "shapes" of a shape tensor are values, one for each of its elements.
    fixed = (-1,) * (dims[0] if dims else 1) if tensor.is_shape_tensor else dims
    for label, shape in zip(("min", "opt", "max"), shapes, strict=True):
        if len(shape) != len(fixed):
            sizes = f"{plural(len(fixed), 'dimension')} {fixed}, its {label} shape {tuple(shape)} {len(shape)}"
            yield f"input {name!r} has {sizes}"
        elif any(size not in (-1, given) for size, given in zip(fixed, shape, strict=True)):
            yield f"input {name!r} is {fixed} in the model, its {label} shape {tuple(shape)} does not fit that"
    least, usual, most = shapes
    if len(least) == len(usual) == len(most) and not all(
        low <= middle <= high for low, middle, high in zip(least, usual, most, strict=True)
    ):
        yield (
            f"input {name!r}: min {tuple(least)} <= opt {tuple(usual)} <= max {tuple(most)} does not hold "
            "in every dimension"
        )


def _dims(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _attach_timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    # A cache of another GPU or release is refused, which must not stop the build: start an empty one instead.
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, path: Path) -> None:
    """Write the timings. The last of several builds at a time wins: a lost timing costs time alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(memoryview(config.get_timing_cache().serialize()))
    part.replace(path)


def _is_unlisted_gpu(trt: Any, target: dict[str, Any]) -> bool:
    """Whether TensorRT-RTX builds for a GPU in this machine that it does not list."""
    major, minor = target["compute_capability"]
    return target["here"] and not hasattr(trt.ComputeCapability, f"SM{major}{minor}")
