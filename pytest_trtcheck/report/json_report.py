"""The JSON report: schema_version 1, described in docs/report.md and by docs/report.schema.json."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record import (
    SCHEMA_VERSION,
    TOOL,
    CheckRecord,
    Environment,
    GpuRecord,
    Library,
    MissingRecord,
    RunRecord,
    jsonable,
    typed,
)
from pytest_trtcheck.record.files import write_text
from pytest_trtcheck.report.view import counts, ordered

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from pytest_trtcheck.report.view import Run

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
    gpu: GpuRecord | None = None,
    driver: str | None = None,
    tensorrt_module: str | None = None,
) -> Environment:
    """Where the checks ran. Imports nothing: versions are read from what is installed.

    Parameters
    ----------
    requested_gpu
        The GPU that `--trt-gpu` named.
    driver
        The version of the NVIDIA driver.
    tensorrt_module
        `tensorrt` or `tensorrt_rtx`, the one that was used; None: the one that is installed, `tensorrt` first.
    """
    modules = (tensorrt_module,) if tensorrt_module else ("tensorrt", "tensorrt_rtx")
    installed = ((module, version(module)) for module in modules)
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        numpy=version("numpy"),
        onnx=version("onnx"),
        onnxruntime=version("onnxruntime"),
        tensorrt=next((Library(module=module, version=found) for module, found in installed if found), None),
        driver=driver,
        gpu=gpu,
        requested_gpu=requested_gpu,
    )


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


def document(
    records: Iterable[CheckRecord],
    environment: Environment,
    missing: Iterable[MissingRecord] = (),
    stopped: str | None = None,
) -> RunRecord:
    """The report of a run: its checks ordered by node id, how many came to each verdict, and what is not in it."""
    checks, absent = ordered(records), ordered(missing)
    planned = {each.nodeid for each in checks} | {each.nodeid for each in absent}
    return RunRecord(
        tool=Library(TOOL, version=version("pytest_trtcheck")),
        environment=environment,
        checks=tuple(checks),
        summary=counts(checks),
        planned=len(planned),
        missing=tuple(absent),
        stopped=stopped,
    )


def write(run: Run) -> Iterable[str]:
    """Write the file that the option names."""
    assert run.path is not None
    save(run.path, run.record)
    return ()


def save(path: str | os.PathLike[str], record: RunRecord) -> None:
    """Write a report, whole or not at all; parent directories are made.

    Raises
    ------
    ReportError
        `path` cannot be written.
    """
    text = json.dumps(jsonable(record), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def read(path: str | os.PathLike[str]) -> RunRecord:
    """A report that `save` wrote, in this version of the plugin or another.

    Raises
    ------
    ReportError
        There is no such file, it is no report of a schema version that is known here, or something in it is missing or
        of another kind than the schema says; the message names the place.
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
    try:
        return typed(report, RunRecord)
    except ReportError as error:
        raise ReportError(
            f"{path} is no sound report: {error.message}", "name a file that --trt-report wrote, as it was"
        ) from None
