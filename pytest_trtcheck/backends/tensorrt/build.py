"""TensorRT: which of its two modules is installed, what to build for, and building an engine with it.

`tensorrt` (10 and 11) and `tensorrt_rtx` share one strongly typed path: the precision is in the ONNX model, and
the builder adds nothing to it. What only one of them has is found out by looking, not by the version.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_trtcheck.backends.tensorrt.options import check_options, plain
from pytest_trtcheck.backends.tensorrt.support import advice, what_strong_typing_lacks
from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.errors import BuildError, GpuError, UnsupportedTargetError, lacked_threads
from pytest_trtcheck.model.apart import EndedError, Process
from pytest_trtcheck.spec import BuildOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.model.apart import Blob
    from pytest_trtcheck.spec import Precision, ShapeRange

from pytest_trtcheck.backends.tensorrt.module import ModuleName, Target, TensorRTModule


@dataclass(frozen=True)
class Plan:
    """A built engine, serialized.

    Parameters
    ----------
    path
        The file that holds it.
    bytes
        Its size.
    build_s
        Seconds for parsing and building; the builder process's start is not in it.
    warnings
        What TensorRT warned of.
    notes
        What the builder's process has to say of it beside that.
    io
        Its "inputs" and "outputs", each a list of {name, dtype (TensorRT's name), shape (-1: open), shape_tensor}.
    """

    path: Path
    module: ModuleName
    version: str
    target: Target
    bytes: int
    build_s: float
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    io: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


def build(
    module: TensorRTModule,
    model_path: Path,
    plan_path: Path,
    *,
    target: Target,
    precision: Precision,
    options: BuildOptions | None = None,
    profile: Mapping[str, ShapeRange] | None = None,
    timing_cache: Path | None = None,
    label: str | None = None,
    process: Process | None = None,
) -> Plan:
    """Build an engine from the ONNX file `model_path` into the file `plan_path`.

    The builder runs in a process of its own, so that its crash is an error like any other, and so that it can be
    stopped after `options.timeout_s`.

    Parameters
    ----------
    precision
        What the model was lowered to; only `tf32` changes what the builder is told.
    profile
        By input name, the shapes that the engine must accept; needed for every input with a dynamic dimension. For
        a shape tensor (an input whose values decide shapes), the range holds those values.
    timing_cache
        The file that keeps TensorRT's timings between builds; TensorRT-RTX has none.
    label
        What messages call the model; None: its file's name.
    process
        A builder process that is there already, and stays.

    Raises
    ------
    BuildError
        With all that the parser and the builder said, and what to do about it where that is known.
    ArgumentError
        An option is out of range or unknown to `module`.
    UnsupportedTargetError
        The GPU of `target` is not in this machine, and `module` cannot compile for it.
    OSError
        The engine was built and cannot be written to `plan_path`.
    """
    options = options or BuildOptions()
    check_options(module, options, precision, target)
    if not target.here and target.compute_capability not in module.compile_only():
        raise UnsupportedTargetError(
            f"{module.title} cannot compile for {target.sm} on a machine without that GPU", code="gpu-needed"
        )
    with scratch_folder("build") as scratch:
        folder = Path(scratch)
        request = {
            **_common_request("build", model_path, folder),
            "module": module.name,
            "plan": str(Path(plan_path).resolve()),
            "target": asdict(target),
            "precision": precision,
            "options": plain(options),
            "profile": {name: [shapes.min, shapes.opt, shapes.max] for name, shapes in (profile or {}).items()},
            "timing_cache": str(timing_cache) if timing_cache and options.timing_cache and not module.is_rtx else None,
        }
        with builder_process(process) as asked:
            answered = _ask(asked, request, options.timeout_s)
        messages = _messages(folder / "messages.jsonl", target)
    response = answered.response
    if response is None or response["stage"]:
        Path(plan_path).unlink(missing_ok=True)
        if response and response.get("errno"):
            raise OSError(response["errno"], os.strerror(response["errno"]), str(plan_path))
        errors = [_relevant(error, target) for error in response["errors"]] if response else []
        stage = (response and response["stage"]) or "build an engine from"
        raise _failure(module, f"{stage} {label or Path(model_path).name}", answered.ended, errors, messages)
    return Plan(
        path=Path(plan_path),
        module=module.name,
        version=module.version,
        target=target,
        bytes=Path(plan_path).stat().st_size,
        build_s=response["build_s"],
        warnings=tuple(text for severity, text in messages if severity == "WARNING"),
        notes=tuple(response["notes"]),
        io=response["io"],
    )


@dataclass(frozen=True)
class Parsed:
    """What an installed TensorRT's own parser said of a model.

    Parameters
    ----------
    module, version
        The TensorRT that parsed; empty where none of those asked for could be asked.
    errors
        All that stands against the model, each with the node that it is about; empty: the model was parsed. Where
        none could be asked: why.
    provided
        The operators that the plugin libraries brought.
    needs_gpu
        The operators that it can tell nothing of without a driver: it makes a plugin for them, which fails here.
    """

    module: ModuleName | Literal[""]
    version: str
    errors: tuple[str, ...] = ()
    provided: tuple[str, ...] = ()
    needs_gpu: tuple[str, ...] = ()


# TensorRT-RTX 1.5 and later have RoiAlign (their release notes), as a plugin that is not made without libcuda.so.
_NEEDS_GPU = re.compile(r"\((RoiAlign)\): .*plugin != nullptr")
PARSE_TIMEOUT_S = 600.0


def parse(names: Sequence[ModuleName], model_path: Path, plugins: Sequence[str] = ()) -> Parsed:
    """Let the first of the installed modules parse a model, in a process of its own.

    Neither a GPU nor a driver is needed. A parser that crashes has not taken the model, and is quoted like any other.

    Parameters
    ----------
    names
        The modules that are asked, the preferred one first.
    plugins
        Paths of plugin libraries that are loaded before.
    """
    with scratch_folder("parse") as scratch:
        folder = Path(scratch)
        request = {**_common_request("parse", model_path, folder), "modules": list(names), "plugins": list(plugins)}
        answered = _ask_builder(request, PARSE_TIMEOUT_S)
    response = answered.response
    if response is None:
        return Parsed(names[0] if answered.crashed else "", "", (answered.ended,))
    if response["stage"] == "load":
        return Parsed("", "", tuple(response["errors"]))
    nowhere = Target((0, 0), here=False)
    errors = [_relevant(error, nowhere) for error in response["errors"]]
    if response["stage"] and not errors:
        errors = [f"it could not {response['stage']} the model, and gave no reason"]
    return Parsed(
        module=response["module"],
        version=response["version"],
        errors=tuple(error for error in errors if not _NEEDS_GPU.search(error)),
        provided=tuple(response["provided"]),
        needs_gpu=tuple({match[1]: None for error in errors if (match := _NEEDS_GPU.search(error))}),
    )


INSPECT_TIMEOUT_S = 600.0


def inspect(
    module: TensorRTModule, plan: Path, kernels: Path, *, label: str, plugins: Sequence[str] = ()
) -> dict[str, Any]:
    """Load an engine in a process of its own, so that a loader which crashes is an error like any other.

    Parameters
    ----------
    kernels
        The file that gets what TensorRT-RTX compiled; empty where there is nothing.
    label
        What messages call the engine.

    Returns
    -------
    `io`, as `Engine.io` gives it, and `layers`, by the engine inspector: how many compute in which precision.

    Raises
    ------
    GpuError
        It cannot be loaded here; the loader is quoted.
    """
    with scratch_folder("inspect") as scratch:
        folder = Path(scratch)
        request = {
            **_common_request("inspect", plan, folder),
            "module": module.name,
            "plugins": list(plugins),
            "kernels": str(kernels),
        }
        answered = _ask_builder(request, INSPECT_TIMEOUT_S, "the process that loaded it")
    response = answered.response
    if response is not None and not response["stage"]:
        return {"io": response["io"], "layers": response["layers"]}
    said = "\n".join(response["errors"]) if response else answered.ended
    raise GpuError(
        f"{module.title} cannot load {label}: {said or 'it gave no reason'}",
        "load it with the TensorRT and on the GPU that it was built for, or build it again",
    )


def run_apart(function: str, request: dict[str, Any], timeout_s: float | None) -> tuple[dict[str, Any] | None, str]:
    """Call a function in the builder's process, so that its crash is an error like any other.

    Parameters
    ----------
    function
        As "module:name"; it is given `request`, in which "model" is a file, and answers with what JSON can hold.

    Returns
    -------
    Its answer, None where it gave none; and why not, or the end of what it wrote to its output.
    """
    with scratch_folder("build") as scratch:
        folder = Path(scratch)
        asked = {**request, **_common_request("call", Path(request["model"]), folder), "function": function}
        answered = _ask_builder(asked, timeout_s)
        return answered.response, answered.said or answered.ended


def _common_request(task: str, model_path: Path, folder: Path) -> dict[str, Any]:
    return {
        "task": task,
        "model": str(Path(model_path).resolve()),
        "messages": str(folder / "messages.jsonl"),
    }


@dataclass(frozen=True)
class Answered:
    """What the builder process answered, and the end of its output; or how it ended, where it gave no answer.

    Parameters
    ----------
    blobs
        The bytes beside the answer.
    messages
        What TensorRT said meanwhile, where that was asked for and no answer came.
    """

    response: Any = None
    blobs: Sequence[Blob] = ()
    said: str = ""
    ended: str = ""
    crashed: bool = False
    timed_out: bool = False
    messages: tuple[str, ...] = ()


_SERVE = "pytest_trtcheck.backends.tensorrt.builder:serve"
_TITLE = "the builder process"


@contextmanager
def builder_process(process: Process | None = None, title: str = _TITLE) -> Iterator[Process]:
    """A builder process: the one that is given, which then stays, or one of its own, which ends with the block."""
    if process is not None:
        yield process
        return
    with Process(_SERVE, title) as own:
        yield own


class _Early:
    """A builder process that gets ready before there is anything to build, in the surroundings of that moment."""

    def __init__(self) -> None:
        self.process = Process(_SERVE, _TITLE)
        self._found = _surroundings()
        self._is_ready = False
        self._asking = threading.Thread(target=self._ask, name="trtcheck-builder", daemon=True)
        self._asking.start()

    def _ask(self) -> None:
        # It ended, or was dismissed meanwhile, pipes and all.
        with suppress(EndedError, OSError, ValueError):
            self.process.ask({"task": "ready", "messages": os.devnull})
            self._is_ready = True

    def is_fit(self) -> bool:
        """Whether it got ready, which is waited for, and what it was started with is so still."""
        self._asking.join()
        return self._is_ready and self._found == _surroundings()

    def taken(self) -> Process | None:
        """The process; None, and it is ended, where it did not get ready or would build in other surroundings."""
        if self.is_fit():
            return self.process
        self.close()
        return None

    def close(self) -> None:
        """End it."""
        self.process.close()
        self._asking.join()


_early: list[_Early] = []
"""At most one, of this process."""


def _surroundings() -> tuple[list[str], dict[str, str]]:
    return [*sys.path], dict(os.environ)


def expect_build() -> None:
    """Start the builder process beside other work: it imports TensorRT and makes its CUDA context meanwhile."""
    if not _early:
        _early.append(_Early())


def dismiss_builder() -> None:
    """End what `expect_build` started, where nothing was built after all."""
    while _early:
        _early.pop().close()


def expected_builder() -> Process:
    """The builder process that was expected to be needed, or another one; it is the caller's from now on."""
    early = _early.pop() if _early else None
    return (early and early.taken()) or Process(_SERVE, _TITLE)


def called(
    process: Process, function: str, request: dict[str, Any], blobs: Sequence[Blob], timeout_s: float
) -> Answered:
    """As `run_apart`, in a builder process that is there: what it loads stays for the next call.

    Parameters
    ----------
    request
        Its "messages" is a file, for what TensorRT says meanwhile.
    blobs
        Bytes beside the request; where there are any, the function finds them in it as "blobs".
    """
    answered = _ask(process, {**request, "task": "call", "function": function}, timeout_s, blobs)
    if answered.response is not None:
        return answered
    messages = _messages(Path(request["messages"]), Target((0, 0), here=True))
    return replace(answered, messages=tuple(text for _, text in messages))


def _ask_builder(request: dict[str, Any], timeout_s: float | None, title: str = _TITLE) -> Answered:
    with builder_process(title=title) as process:
        return _ask(process, request, timeout_s)


def _ask(process: Process, request: dict[str, Any], timeout_s: float | None, blobs: Sequence[Blob] = ()) -> Answered:
    try:
        response, given = process.exchange(request, blobs, timeout_s)
        return Answered(response, given, process.said())
    except EndedError as error:
        reason = str(error)
        if error.timed_out:
            reason = f"it did not finish within timeout_s={timeout_s:g} s and was stopped"
        return Answered(ended=reason, crashed=error.crashed, timed_out=error.timed_out)


def _messages(path: Path, target: Target) -> list[tuple[str, str]]:
    """What TensorRT logged, as (severity, text), each text once, in its order."""
    seen: dict[tuple[str, str], None] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            severity, text = json.loads(line)
        except ValueError:
            continue  # The process died while it wrote this line.
        if relevant := _relevant(text, target):
            seen[severity, relevant] = None
    return list(seen)


def _relevant(text: str, target: Target) -> str:
    """`text` without what a missing driver adds to every failure: no cause when compiling for another GPU."""
    lines = text.strip().splitlines()
    return "\n".join(line for line in lines if target.here or "catchCudaError" not in line)


def _failure(
    module: TensorRTModule, task: str, outcome: str, errors: list[str], messages: list[tuple[str, str]]
) -> BuildError:
    lines = [f"  {index}. {error}".replace("\n", "\n     ") for index, error in enumerate(errors, 1)]
    said = [text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")]
    if said:
        lines.append(f"  {module.title} said:")
        lines += [f"    {line}" for text in said for line in text.splitlines()]
    if not outcome and not lines:
        outcome = "no reason was given"
    reason = f": {outcome}" if outcome else ""
    text = "\n".join([f"{module.title} could not {task}{reason}", *lines])
    pieces = advice(text, is_rtx=module.is_rtx) or what_strong_typing_lacks(module)
    if lacked_threads(text):
        return BuildError(text, "\n  → ".join(pieces), code="too-many-processes")
    return BuildError(text, "\n  → ".join(pieces))
