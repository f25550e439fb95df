"""The JSON report: schema_version 1, described in docs/report.md and by docs/report.schema.json."""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import importlib.util
import json
import math
import platform
import sys
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ReportError, plural
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
from pytest_trtcheck.record.files import read_json, write_text
from pytest_trtcheck.report import systems
from pytest_trtcheck.report.view import counts, ordered, told_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from pytest_trtcheck.report.view import Run

_SIGNATURE = "signature"
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
    return RunRecord(
        tool=Library(TOOL, version=version("pytest_trtcheck")),
        environment=environment,
        checks=tuple(checks),
        comparisons=systems.compared(checks),
        summary=counts(checks),
        planned=told_of(checks, absent),
        missing=tuple(absent),
        stopped=stopped,
    )


def write(run: Run) -> Iterable[str]:
    """Write the file that the option names."""
    assert run.path is not None
    save(run.path, run.record, run.key)
    return ()


def save(path: str | os.PathLike[str], record: RunRecord, key: bytes | None = None) -> None:
    """Write a report, whole or not at all; parent directories are made.

    Parameters
    ----------
    key
        What it is signed with; None: it is not.

    Raises
    ------
    ReportError
        `path` cannot be written.
    """
    data = jsonable(record)
    if key is not None:
        data[_SIGNATURE] = _signature(data, key)
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def _signature(data: Mapping[str, Any], key: bytes) -> str:
    """HMAC-SHA256 in hex over the report as JSON without spaces, keys sorted, the signature itself left out."""
    body = {name: value for name, value in data.items() if name != _SIGNATURE}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def read(path: str | os.PathLike[str], key: bytes | None = None) -> RunRecord:
    """A report that `save` wrote, in this version of the plugin or another.

    Parameters
    ----------
    key
        What it must be signed with; None: no signature is looked at.

    Raises
    ------
    ReportError
        There is no such file, it is no report of a schema version that is known here, or something in it is missing or
        of another kind than the schema says; the message names the place.
    """
    try:
        report = read_json(path)
    except OSError as error:
        raise ReportError(f"cannot read the report {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is no JSON report: {error}", "name a file that --trt-report wrote") from error
    if key is not None and isinstance(report, dict):
        _verify(path, report, key)
    found = report.get("schema_version") if isinstance(report, dict) else None
    if found != SCHEMA_VERSION:
        raise ReportError(
            f"{path} has schema_version {found!r}; this version of {TOOL} reads {SCHEMA_VERSION}",
            "name a file that --trt-report wrote, and use the version of the plugin that wrote it",
            code="report-version",
        )
    try:
        run = typed(report, RunRecord)
        _require_whole(run)
    except ReportError as error:
        raise ReportError(
            f"{path} is no sound report: {error.message}", "name a file that --trt-report wrote, as it was"
        ) from None
    return run


def _require_whole(run: RunRecord) -> None:
    """See that a report counts what it holds: one that was edited by hand, or from which checks were cut, does not.

    Raises
    ------
    ReportError
        It counts something else, or a time in it is none.
    """
    times = {"$": run.duration_s, **{f"$.checks[{place}]": each.duration_s for place, each in enumerate(run.checks)}}
    for where, seconds in times.items():
        if seconds is not None and not 0 <= seconds < math.inf:
            raise ReportError(f"a time of {seconds} s - at `{where}.duration_s`")
    if dict(run.summary) != {word: count for word, count in counts(run.checks).items() if word in run.summary}:
        raise ReportError("its summary counts other verdicts than its checks have")
    if run.planned not in {None, told := told_of(run.checks, run.missing)}:
        raise ReportError(f"{plural(run.planned, 'test')} were to check something, and it tells of {told}")


def _verify(path: str | os.PathLike[str], report: Mapping[str, Any], key: bytes) -> None:
    given = report.get(_SIGNATURE)
    if given is None:
        raise ReportError(f"{path} is not signed", "write it with the same --trt-evidence-key", code="report-unsigned")
    try:
        expected = _signature(report, key)
    except (ValueError, RecursionError):  # what `save` never writes: NaN, texts that are no UTF-8
        expected = ""
    if not expected or not hmac.compare_digest(str(given).encode(errors="replace"), expected.encode()):
        raise ReportError(
            f"{path} is not what was signed: it was changed since, or signed with another key",
            "take the file as --trt-report wrote it, and the same --trt-evidence-key",
            code="report-unsigned",
        )
