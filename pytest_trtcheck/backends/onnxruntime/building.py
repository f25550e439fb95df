"""Building the engines of a provider that compiles, in a process of its own.

Such a provider builds while a session is made: a build that crashes or hangs would take the test run with it. And what
another process built, and is only loaded here, was certainly not built here.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.backends.onnxruntime import placement
from pytest_trtcheck.backends.tensorrt import build as processes
from pytest_trtcheck.errors import BuildError, CheckError
from pytest_trtcheck.model import onnxruntime as ort

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.backends.base import EngineSpec

CONTEXT = "context.onnx"
"""The EPContext model: what ONNX Runtime loads instead of the model, with the engines in it or beside it."""


def build(title: str, spec: EngineSpec, folder: Path, compile_by: str, request: dict[str, Any]) -> dict[str, Any]:
    """Build into `folder`: `build_s`, and `groups`, which provider took which nodes.

    Parameters
    ----------
    compile_by
        The function that makes the session in the other process, as "module:name". It is given `request`, in which
        "model" is the file and "folder" where to.

    Raises
    ------
    BuildError
        It failed, crashed or took too long; what ONNX Runtime and TensorRT wrote is quoted.
    """
    asked = {**request, "compile_by": compile_by, "model": str(spec.lowered.path), "folder": str(folder)}
    answer, said = processes.run_apart(f"{__name__}:serve", asked, spec.options.timeout_s)
    if answer is not None and "error" not in answer:
        return answer
    lines = [line for line in (answer["error"] if answer else "", said) if line]
    raise BuildError(
        f"{title} could not build {spec.model.label} in {spec.precision}: " + ("\n".join(lines) or "it gave no reason"),
        "check the model with backend='tensorrt', which says more of what TensorRT does not take",
    )


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """In the other process: build, and say what came of it."""
    module, _, name = request["compile_by"].partition(":")
    began = time.perf_counter()
    try:
        session = getattr(importlib.import_module(module), name)(request)
    except CheckError as error:
        return {"error": error.message}
    except Exception as error:  # Whatever it is, it is quoted.
        return {"error": ort.quoted(error)}
    build_s = time.perf_counter() - began
    groups = placement.to_json(placement.assigned(session)) if placement.can_tell(session) else None
    return {"build_s": build_s, "groups": groups}
