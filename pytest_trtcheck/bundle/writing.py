"""Writing a bundle: out of sight while the check is made, then whole and at once."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shlex
import shutil
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import compare
from pytest_trtcheck.backends.tensorrt.options import plain
from pytest_trtcheck.bundle.reading import (
    ARRAY_FILES,
    BUNDLE_FILE,
    SCHEMA_VERSION,
    hashes,
    located,
    problems,
    sha256_of,
    signed,
)
from pytest_trtcheck.bundle.spec_json import shape_to_json, spec_to_json
from pytest_trtcheck.cache import format_bytes, hash_file
from pytest_trtcheck.check import parity
from pytest_trtcheck.errors import MISREAD, CheckError, GpuError, ModelError, ReportError
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.npz import ArrayWriter, size_bytes
from pytest_trtcheck.model.sources import MODEL_FILE
from pytest_trtcheck.record import TOOL, is_bad, jsonable
from pytest_trtcheck.record.files import file_name, read_json
from pytest_trtcheck.record.held import HeldFolder, remove_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.check.request import Known
    from pytest_trtcheck.record import CheckRecord, JudgedRecord, ParityRecord


_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Bounds:
    """How much a bundle may hold.

    Parameters
    ----------
    model_bytes
        The most that a model may have with its external data; a larger one is named by path and SHA-256.
    array_bytes
        The most that the three array files may have together; the worst case's inputs are in it whatever they take.
    cases, seconds
        The most cases to keep, and the longest time to look for those that fail.
    """

    model_bytes: int = 2 << 30
    array_bytes: int = 256 << 20
    cases: int = 64
    seconds: float = 60.0


class Writer:
    """Writes the bundle of one check, if its parity fails: `keep` while its runner is open, `finish` with its record.

    Parameters
    ----------
    folder
        Where bundles are kept; made when the first one is.
    shown
        What the command to replay calls that folder.
    """

    def __init__(self, folder: Path, shown: str, nodeid: str, bounds: Bounds | None = None) -> None:
        self._folder = folder
        self._shown = shown
        self._nodeid = nodeid
        self._bounds = bounds or Bounds()
        self._work: HeldFolder | None = None
        self._about: dict[str, Any] = {}

    def keep(self, known: Known) -> tuple[str, ...]:
        """Write models and arrays of a check whose parity failed, out of sight for now; what to say about it.

        Each case is run again: keeping every output of every case would cost the memory of all of them.

        Raises
        ------
        ReportError
            They can't be written.
        GpuError
            CUDA broke while the engine ran again.
        """
        with suppress(OSError):
            remove_leftovers(self._folder.glob(f"{_UNFINISHED}*"))
        if known.parity.verdict != "fail":
            return ()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Inside the temporary directory, which nobody else may read, one with the permissions that users expect.
            self._work = HeldFolder(_UNFINISHED, self._folder)
            work = Path(self._work.name, "bundle")
            work.mkdir()
            self._about = _contents(known, work, self._bounds)
        except Exception as error:
            self.close()
            if isinstance(error, GpuError) and error.poisoned:
                raise
            raise ReportError(self._problem(error), code="report-unwritable") from error
        return tuple(self._about["notes"])

    def finish(self, record: CheckRecord, environment: Mapping[str, Any]) -> CheckRecord:
        """Make the bundle whole and visible; the record with the command that replays it, or a note why there is none.

        Parameters
        ----------
        environment
            Versions and the GPU, as the JSON report has them.
        """
        if self._work is None:
            return record
        try:
            target = self._publish(Path(self._work.name, "bundle"), record, environment)
        except Exception as error:
            return replace(record, notes=(*record.notes, self._problem(error)))
        finally:
            self.close()
        command = f"pytest {shlex.quote(f'{self._shown}/{target.name}/{BUNDLE_FILE}')}"
        told = f"replay it on any machine: {command}"
        return replace(record, replay=command, message=f"{record.message}\n\n{told}" if record.message else told)

    def close(self) -> None:
        """Remove what is unfinished."""
        if self._work is not None:
            self._work.cleanup()
            self._work = None

    def _problem(self, error: Exception) -> str:
        said = error.message if isinstance(error, CheckError) else getattr(error, "strerror", None)
        reason = said or str(error) or type(error).__name__
        return f"no failure bundle was written to {self._shown}: {reason}"

    def _publish(self, work: Path, record: CheckRecord, environment: Mapping[str, Any]) -> Path:
        content = {"nodeid": self._nodeid, "environment": environment, **self._about, "files": hashes(work)}
        about = signed(
            jsonable(
                {
                    "tool": TOOL,
                    "schema_version": SCHEMA_VERSION,
                    **content,
                    "content_sha256": sha256_of(jsonable(content)),
                    "engine_key": record.engine.key if record.engine else None,
                    "record": record,
                }
            )
        )
        (work / BUNDLE_FILE).write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        name = file_name(self._nodeid)
        for number in itertools.count(1):
            target = self._folder / (name if number == 1 else f"{name}-{number}")
            if _is_same(target, about):
                return target
            try:
                work.rename(target)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    raise
                continue
            return target
        raise AssertionError


def _is_same(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the bundle of the same failure: a test that is run again does not fill the disk."""
    try:
        found = read_json(folder / BUNDLE_FILE)
        same: bool = found["content_sha256"] == about["content_sha256"]
        return same and next(problems(folder, found), None) is None
    except (OSError, *MISREAD):
        return False


def _contents(known: Known, work: Path, bounds: Bounds) -> dict[str, Any]:
    """Write the models and arrays into `work`, and return what `bundle.json` says of them."""
    model, lowered, spec, options = known.model, known.lowered, known.request.parity, known.request.build_options
    notes: list[str] = []
    stored = _store(model.path, work / "model", bounds)
    same = lowered.path == model.path
    stored_lowered = stored if same else _store(lowered.path, work / "lowered", bounds)
    for what, each in {"model": stored, "lowered model": stored_lowered}.items():
        if "path" in each and not (same and what == "lowered model"):
            notes.append(
                f"failure bundle: the {what} is larger than {format_bytes(bounds.model_bytes)}, so it is not in it: "
                f"the replay needs {each['path']}"
            )
    loaded = onnx_model.load(located(work, stored), model.label)
    if loaded.sha256 != model.sha256:
        raise ModelError(f"{model.label} was changed on disk while it was checked", code="model-changed")
    identity = model.sha256 if same else onnx_model.load(located(work, stored_lowered)).sha256
    arrays = _store_cases(known, work, bounds, notes)
    if spec.score is not None:
        notes.append(f"failure bundle: the score {spec.score.name} is code, so a replay judges the outputs alone")
    return {
        "model": {"label": model.label, "sha256": model.sha256, **stored},
        "lowered": {
            "key": lowered.key,
            "sha256": identity,
            **stored_lowered,
            "notes": lowered.notes,
            # What of the calibration samples is kept beside is arrays, and no replay needs it.
            "details": {name: each for name, each in lowered.details.items() if name != "seen"},
            "taken_as_it_is": lowered.taken_as_it_is,
        },
        **_store_engine(known, work, bounds, notes),
        "spec": {**spec_to_json(spec), **({"precision": None} if known.has_unknown_precision else {})},
        "options": {
            **plain(options),
            "plugins": [str(Path(plugin).absolute()) for plugin in options.plugins],
            "custom_ops": [str(Path(library).absolute()) for library in options.custom_ops],
        },
        "plugins_sha256": [hash_file(plugin) for plugin in options.plugins],
        "profile": {name: shape_to_json(span) for name, span in known.profile().items()},
        **arrays,
        "notes": notes,
    }


def _store_engine(known: Known, work: Path, bounds: Bounds, notes: list[str]) -> dict[str, Any]:
    """Put an engine that exists into the bundle, or say where it lies; nothing where one was built."""
    if known.existing is None:
        return {}
    file = known.existing.file
    about = {"label": file.label, "sha256": file.sha256, "bytes": file.bytes}
    if file.bytes > bounds.model_bytes:
        notes.append(f"failure bundle: the engine is not in it, the replay needs {file.path.resolve()}")
        return {"engine": {**about, "path": str(file.path.resolve())}}
    target = work / "engine" / "engine.plan"
    target.parent.mkdir()
    shutil.copyfile(file.path, target)
    return {"engine": {**about, "file": "engine/engine.plan"}}


def _store(path: Path, folder: Path, bounds: Bounds) -> dict[str, Any]:
    """Put a model into the bundle with its external data; where it is too large, say where it lies.

    Nothing is linked: exporting a model again writes into the file that is there, and libraries refuse linked files.
    """
    external = onnx_model.external_files(path)
    total = path.stat().st_size + sum(file.stat().st_size for file in {file.resolve() for file in external.values()})
    if total > bounds.model_bytes:
        return {"path": str(path.resolve()), "bytes": total}
    name = MODEL_FILE if MODEL_FILE not in map(os.path.normpath, external) else path.name
    for location, file in {name: path, **external}.items():
        target = folder / location
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.resolve(), target)
    return {"file": f"{folder.name}/{name}", "bytes": total}


def _store_cases(known: Known, work: Path, bounds: Bounds, notes: list[str]) -> dict[str, Any]:
    """Write the worst case, then the others that fail, until a bound is reached."""
    kept: list[int] = []
    passed, total, start = 0, 0, time.monotonic()
    with ExitStack() as open_files:
        writers = [open_files.enter_context(ArrayWriter(work / name)) for name in ARRAY_FILES]
        for index in _worst_first(known):
            if kept and (len(kept) >= bounds.cases or time.monotonic() - start > bounds.seconds):
                break
            case = known.cases[index]
            given = case, known.run(case), known.reference(case)
            if kept and not _fails(known, given[1], given[2]):
                passed += 1
                continue
            size = sum(map(size_bytes, given))
            if kept and total + size > bounds.array_bytes:
                break
            whole = total + size <= bounds.array_bytes
            for writer, arrays in zip(writers if whole else writers[:1], given, strict=False):
                writer.add(len(kept), arrays)
            if not whole:
                notes.append(
                    f"failure bundle: the arrays of one case take {format_bytes(size)}, so its outputs are not in it "
                    f"({format_bytes(bounds.array_bytes)} is the most)"
                )
            kept.append(index)
            total += size
    if left_out := len(known.cases) - len(kept) - passed:
        notes.append(f"failure bundle: {len(kept)} of {len(known.cases)} cases are in it, the worst one first")
    arrays_index = {name: writer.index for name, writer in zip(ARRAY_FILES, writers, strict=True)}
    cases = {"kept": kept, "of": len(known.cases), "passed": passed, "left_out": left_out}
    return {"cases": cases, "arrays": arrays_index}


def _worst_first(known: Known) -> Iterator[int]:
    """Every case once: that of the decisive limit, those of the other outputs that failed, then all others."""
    record = known.parity
    failed = [output for output in record.outputs if is_bad(output.verdict)]
    failed.sort(key=lambda output: not any(_decides(entry, record) for entry in output.judged))
    worst = [compare.worst_case(output) for output in failed]
    yield from dict.fromkeys([*worst, *range(len(known.cases))])


def _decides(entry: JudgedRecord, record: ParityRecord) -> bool:
    return entry.metric == record.metric and entry.value == record.worst


def _fails(known: Known, outputs: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> bool:
    limits = parity.limits_of(known)
    return any(is_bad(each.verdict) for each in compare.judge_all(outputs, expected, limits))
