"""TensorRT: which of its two modules is installed, what to build for, and building an engine with it.

`tensorrt` (10 and 11) and `tensorrt_rtx` share one strongly typed path: the precision is in the ONNX model, and
the builder adds nothing to it. What only one of them has is found out by looking, not by the version.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_trtcheck.backends.tensorrt.options import check_options, plain
from pytest_trtcheck.backends.tensorrt.support import advice, what_strong_typing_lacks
from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.errors import BuildError, GpuError, UnsupportedTargetError
from pytest_trtcheck.spec import BuildOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.spec import Precision, ShapeRange

from pytest_trtcheck.backends.tensorrt.module import ModuleName, Target, TensorRTModule

OUTPUT_TAIL = 4000
"""How much of a crashed builder's own output is quoted, in characters."""


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

    Raises
    ------
    BuildError
        With all that the parser and the builder said, and what to do about it where that is known.
    ArgumentError
        An option is out of range or unknown to `module`.
    UnsupportedTargetError
        The GPU of `target` is not in this machine, and `module` cannot compile for it.
    """
    options = options or BuildOptions()
    check_options(module, options, precision, target)
    if not target.here and target.compute_capability not in module.compile_only():
        raise UnsupportedTargetError(f"{module.title} cannot compile for {target.sm} on a machine without that GPU")
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
        outcome = _run_builder(request, folder, options.timeout_s)
        messages = _messages(folder / "messages.jsonl", target)
        response = _read_json(folder / "response.json")
    if outcome or response is None or response["stage"]:
        Path(plan_path).unlink(missing_ok=True)
        if response and response.get("errno"):
            raise OSError(response["errno"], os.strerror(response["errno"]), str(plan_path))
        errors = [_relevant(error, target) for error in response["errors"]] if response else []
        stage = (response and response["stage"]) or "build an engine from"
        raise _failure(module, f"{stage} {label or Path(model_path).name}", outcome, errors, messages)
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
_CRASHED = "the builder process crashed"


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
        outcome = _run_builder(request, folder, PARSE_TIMEOUT_S)
        response = _read_json(folder / "response.json")
    if outcome is not None and outcome.startswith(_CRASHED):
        return Parsed(names[0], "", (outcome,))
    if outcome or response is None:
        return Parsed("", "", (outcome or "it gave no answer",))
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
        outcome = _run_builder(request, folder, INSPECT_TIMEOUT_S)
        response = _read_json(folder / "response.json")
    if outcome is None and response is not None and not response["stage"]:
        return {"io": response["io"], "layers": response["layers"]}
    said = "\n".join(response["errors"]) if response else ""
    if outcome is not None:
        said = outcome.replace("the builder process", "the process that loaded it")
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
        outcome = _run_builder(asked, folder, timeout_s)
        if outcome is not None:
            return None, outcome
        said = (folder / "output.txt").read_text(errors="replace")[-OUTPUT_TAIL:].strip()
        return _read_json(folder / "response.json"), said


def _common_request(task: str, model_path: Path, folder: Path) -> dict[str, Any]:
    return {
        "task": task,
        "sys_path": sys.path,
        "parent": os.getpid(),
        "model": str(Path(model_path).resolve()),
        "messages": str(folder / "messages.jsonl"),
        "response": str(folder / "response.json"),
    }


# Without the working folder in its path (Python's -P, which 3.10 lacks), the child finds its standard library first,
# whatever lies there; the paths that only this process has, from conftest files or a source tree, come behind.
_BOOTSTRAP = (
    "import sys; sys.path[:1] = [path for path in sys.path[:1] if path]; "
    "import json; request = json.load(sys.stdin); "
    "sys.path += [path for path in request['sys_path'] if path not in sys.path]; "
    "from pytest_trtcheck.backends.tensorrt.builder import serve; serve(request)"
)


def _run_builder(request: dict[str, Any], folder: Path, timeout_s: float | None) -> str | None:
    """Run the builder process to its end; the reason if that end was not a normal one."""
    output = folder / "output.txt"
    with output.open("wb") as sink:
        child = subprocess.Popen(
            # Warnings of the TensorRT package itself must not become errors because of the caller's settings.
            [sys.executable, "-W", "ignore", "-c", _BOOTSTRAP],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            child.communicate(json.dumps(request).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"it did not finish within timeout_s={timeout_s:g} s and was stopped"
        finally:
            _kill_group(child)
    reason = _ending(child.returncode)
    if reason is None:
        return None
    said = output.read_text(errors="replace")[-OUTPUT_TAIL:].strip()
    return f"{reason}; its output ends with:\n{said}" if said else reason


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the builder's process group, when it timed out or the caller was interrupted."""
    if child.poll() is None:
        if sys.platform == "win32":  # No process groups; the builder starts nothing of its own.
            child.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.wait()


_WINDOWS_ERROR = 0xC0000000
"""From here on, an exit status on Windows is the exception that ended the process (NTSTATUS, severity "error")."""


def _ending(status: int) -> str | None:
    """How a process ended that has this exit status; None where that was well."""
    if status == 0:
        return None
    if status < 0:
        return f"{_CRASHED} ({_signal_name(-status)})"
    if status >= _WINDOWS_ERROR:
        return f"{_CRASHED} (0x{status:08X})"
    return f"the builder process ended with exit status {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


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
    module: TensorRTModule, task: str, outcome: str | None, errors: list[str], messages: list[tuple[str, str]]
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
    return BuildError(text, "\n  → ".join(pieces))
