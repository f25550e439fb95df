"""The JSON report: schema_version 1, described in docs/report.md and by docs/report.schema.json."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record import SCHEMA_VERSION, jsonable
from pytest_trtcheck.report.files import write_text
from pytest_trtcheck.report.view import Record, counts, ordered

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

TOOL = "pytest-trtcheck"

_DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "pytest_trtcheck": (TOOL,),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
"""What each module is distributed as; the first that is installed names the version."""


def environment(
    *,
    requested_gpu: str | None = None,
    gpu: Mapping[str, Any] | None = None,
    driver: str | None = None,
    tensorrt_module: str | None = None,
) -> dict[str, Any]:
    """Where the checks ran. Imports nothing: versions are read from what is installed.

    Parameters
    ----------
    requested_gpu
        The GPU that `--trt-gpu` named.
    gpu
        The GPU present: name, uuid, compute_capability ("9.0", or major and minor).
    driver
        The version of the NVIDIA driver.
    tensorrt_module
        `tensorrt` or `tensorrt_rtx`, the one that was used; None: the one that is installed, `tensorrt` first.
    """
    modules = (tensorrt_module,) if tensorrt_module else ("tensorrt", "tensorrt_rtx")
    installed = ((module, version(module)) for module in modules)
    tensorrt = next(({"module": module, "version": found} for module, found in installed if found), None)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": version("numpy"),
        "onnx": version("onnx"),
        "onnxruntime": version("onnxruntime"),
        "tensorrt": tensorrt,
        "driver": driver,
        "gpu": None if gpu is None else {**gpu, "compute_capability": _dotted(gpu.get("compute_capability"))},
        "requested_gpu": requested_gpu,
    }


def _dotted(compute_capability: object) -> str | None:
    if isinstance(compute_capability, (tuple, list)):
        return ".".join(map(str, compute_capability))
    return None if compute_capability is None else str(compute_capability)


def version(module: str) -> str | None:
    """The version of a module, without importing it; None where it is not installed."""
    loaded = getattr(sys.modules.get(module), "__version__", None)
    if loaded is not None:
        return str(loaded)
    for distribution in _DISTRIBUTIONS.get(module, (module,)):
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        # A distribution's metadata alone (`tensorrt` without its libraries) is no module.
        if importlib.util.find_spec(module) is not None:
            return found
    return None


def document(records: Iterable[Record], environment: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a run: its checks ordered by node id, and how many came to each verdict."""
    checks = ordered(records)
    report = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": TOOL, "version": version("pytest_trtcheck")},
        "environment": environment,
        "checks": checks,
        "summary": counts(checks),
    }
    plain: dict[str, Any] = jsonable(report)
    return plain


def write(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write a report, whole or not at all; parent directories are made.

    Raises
    ------
    ReportError
        `path` cannot be written.
    """
    write_text(path, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A report that `write` wrote.

    Raises
    ------
    ReportError
        There is no such file, or it is no report of a schema version that is known here.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read the report {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is no JSON report: {error}", "name a file that --trt-report wrote") from error
    found = report.get("schema_version") if isinstance(report, dict) else None
    if found != SCHEMA_VERSION:
        raise ReportError(
            f"{path} has schema_version {found!r}; this version of {TOOL} reads {SCHEMA_VERSION}",
            "name a file that --trt-report wrote, and use the version of the plugin that wrote it",
        )
    result: dict[str, Any] = report
    return result
