"""`--trt-export`: the engines that a run proved, as a model repository of the Triton Inference Server.

An engine is written when every check of it passed on a GPU, and every test with such a check passed as well. What is
written are the very bytes that were checked: a build of the same key that differs from them is left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import __version__
from pytest_trtcheck.backends.tensorrt.backend import IO_FILE, PLAN_FILE
from pytest_trtcheck.backends.tensorrt.module import TITLES
from pytest_trtcheck.cache import hash_bytes, hash_file
from pytest_trtcheck.errors import ArgumentError, ReportError
from pytest_trtcheck.export import triton
from pytest_trtcheck.record import is_bad, jsonable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pytest_trtcheck.cache import Cache, Entry
    from pytest_trtcheck.record import CheckRecord, LatencyRecord, ParityRecord

REPOSITORY = "model_repository"
TO_PROVE = "to_prove"
"""Where engines lie that were compiled for a GPU which is not here: nobody is to serve them before a test there did."""
CONFIG = "config.pbtxt"
MANIFEST = "manifest.json"
PLAN = "1/model.plan"
"""Where Triton looks for the plan of the version 1 of a model."""
FORMAT = "pytest-trtcheck export"
FORMAT_VERSION = 1

_WORK = ".trtcheck-export"
_LONGEST_STEM = 80
_RTX_NOTE = (
    "This plan is one of TensorRT-RTX. The TensorRT backend that Triton is released with is linked against TensorRT\n"
    "(libnvinfer) and does not load it; it takes a backend that is built against the TensorRT-RTX named above."
)


@dataclass(frozen=True)
class Written:
    """An engine that was written: its name in the repository, its size, and why Triton may not batch, if so."""

    name: str
    key: str
    bytes: int
    max_batch_size: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """An engine that was not written, and why."""

    label: str
    key: str
    reason: str


@dataclass(frozen=True)
class Exported:
    """What was written below `folder`, what was not, and the engines of earlier runs that still lie there.

    Parameters
    ----------
    to_prove
        The engines that were compiled for another GPU, and for which.
    """

    folder: Path
    written: tuple[Written, ...]
    left_out: tuple[LeftOut, ...]
    older: tuple[str, ...] = ()
    to_prove: tuple[tuple[Written, str], ...] = ()

    def lines(self) -> list[str]:
        """All of it in words, for the terminal."""
        count = len(self.written)
        lines = [f"exported {count} engine{'s' * (count != 1)} to {self.folder / REPOSITORY}"]
        for each in self.written:
            batches = f"batches up to {each.max_batch_size}" if each.max_batch_size else "no dynamic batching"
            lines.append(f"  {each.name}: {each.bytes:,} bytes, {batches}")
            lines += [f"    {note}" for note in each.notes]
        lines += [f"not exported: {each.label} (engine {each.key[:8]}): {each.reason}" for each in self.left_out]
        for each, gpu in self.to_prove:
            plan = self.folder / TO_PROVE / each.name / PLAN
            lines.append(f"to be proved on the {gpu}, by a test with engine={str(plan)!r}")
        if self.older:
            lines.append(f"from an earlier run, and not proved by this one: {', '.join(self.older)}")
        return lines


def write(folder: str | os.PathLike[str], records: Iterable[CheckRecord], cache: Cache) -> Exported:
    """Write every engine that `records` prove into `folder`, each whole or not at all.

    Parameters
    ----------
    folder
        Made when it is not there. The repository is the folder `model_repository` in it.
    records
        All check records of the run, each with its test's outcome.
    cache
        Where the engines are.

    Raises
    ------
    ReportError
        `folder` cannot be written, or holds a model of the same name that is not an export of ours as we left it; then
        nothing was written.
    CacheError
        The cache cannot be read.
    """
    by_key = defaultdict(list)
    for record in sorted(records, key=lambda record: record.nodeid):
        if record.engine:
            by_key[record.engine.key].append(record)
    proved: list[_Engine] = []
    compiled: list[_Engine] = []
    left_out: list[LeftOut] = []
    for key, checks in sorted(by_key.items()):
        try:
            proved.append(_engine(key, checks, cache))
        except _NotProvedError as reason:
            left_out.append(LeftOut(_label(checks), key, str(reason)))
            if (engine := _compiled(key, checks, cache)) is not None:
                compiled.append(engine)
    names, names_to_prove = _names(proved), _names(compiled)
    target = Path(folder)
    with _errors(target):
        written = _write_all(target, REPOSITORY, {names[engine.key]: engine for engine in proved}) if proved else ()
        named = {names_to_prove[engine.key]: engine for engine in compiled}
        waiting = _write_all(target, TO_PROVE, named) if compiled else ()
        older = tuple(name for name in _ours(target / REPOSITORY) if name not in names.values())
    left_out.sort(key=lambda each: (each.label, each.key))
    to_prove = tuple((each, named[each.name].compiled_for) for each in waiting)
    return Exported(target, written, tuple(left_out), older, to_prove)


# --- what is proved --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Engine:
    """An engine that all its checks passed; or, compiled for a GPU that is not here, one that none speaks against."""

    key: str
    entry: Entry
    checks: Sequence[CheckRecord]
    sha256: str
    inputs: tuple[triton.Tensor, ...]
    outputs: tuple[triton.Tensor, ...]
    compiled_for: str = ""

    @property
    def proved_by(self) -> Sequence[CheckRecord]:
        return () if self.compiled_for else self.checks

    @property
    def made_from(self) -> Mapping[str, str]:
        return self.entry.key.parts

    @property
    def models(self) -> list[str]:
        """What the tests called the model, shortest first."""
        return sorted({check.model for check in self.checks}, key=lambda label: (len(label), label))


def _label(checks: Sequence[CheckRecord]) -> str:
    return f"{checks[0].model} {checks[0].precision or ''}".rstrip()


class _NotProvedError(Exception):
    """An engine is left out; the text says why."""


def _engine(key: str, checks: Sequence[CheckRecord], cache: Cache) -> _Engine:
    """The engine of these checks; a _NotProvedError where they do not prove it, or it is not there to be written."""
    if checks[0].engine is not None and checks[0].engine.source == "file":
        raise _NotProvedError("engine= named a file that exists, which nothing was built for")
    objections = [objection for check in checks if (objection := _objection(check) or _chance(check))]
    if objections:
        more = f"; and {len(objections) - 1} more" if len(objections) > 1 else ""
        raise _NotProvedError(objections[0] + more)
    if not any(check.parity for check in checks):
        raise _NotProvedError("its outputs were never compared: no check of it asked for parity")
    return _stored(key, checks, cache)


def _compiled(key: str, checks: Sequence[CheckRecord], cache: Cache) -> _Engine | None:
    """The engine of these checks where it was compiled for another GPU, and all that stands against it is that."""
    gpu = checks[0].compiled_for
    if not gpu or {check.compiled_for for check in checks} != {gpu}:
        return None
    if any(is_bad(check.verdict) or _chance(check) or check.outcome == "failed" for check in checks):
        return None
    try:
        return _stored(key, checks, cache, gpu)
    except _NotProvedError:
        return None


def _stored(key: str, checks: Sequence[CheckRecord], cache: Cache, compiled_for: str = "") -> _Engine:
    """The engine as the cache has it, if that is the one that was checked."""
    checked = {check.engine and check.engine.sha256 for check in checks}
    if len(checked) != 1 or None in checked:
        raise _NotProvedError("it was built more than once during the run, and the builds differ")
    entry = cache.find("engine", key)
    if entry is None:
        raise _NotProvedError("it is no longer in the cache: it was cleared or damaged after the checks")
    try:
        io = json.loads((entry.path / IO_FILE).read_text())
        sha256 = hash_file(entry.path / PLAN_FILE)
    except OSError as error:
        raise _NotProvedError(f"it cannot be read from the cache: {error.strerror}") from error
    if {sha256} != checked:
        raise _NotProvedError("the cache holds another build of it than the one that was checked")
    inputs, outputs = (tuple(triton.Tensor.of(each) for each in io[side]) for side in ("inputs", "outputs"))
    try:
        triton.config("name", inputs, outputs)
    except ArgumentError as error:
        raise _NotProvedError(error.message) from error
    return _Engine(key, entry, checks, sha256, inputs, outputs, compiled_for)


def _chance(check: CheckRecord) -> str | None:
    """Why a check that passed proves nothing: it was made until it did."""
    if check.runs <= 1:
        return None
    return f"{check.nodeid}: passed in run {check.runs} of the test alone, so it may not pass the next time"


def _objection(check: CheckRecord) -> str | None:
    """Why one check proves nothing, or proves the engine wrong."""
    nodeid = check.nodeid
    why = f": {check.headline}" if check.headline else ""
    if is_bad(check.verdict):
        return f"{nodeid}: {check.verdict}{why}"
    if check.outcome != "passed":
        if check.verdict == "not_measured":
            return f"{nodeid}: not measured{why}"
        ended = "xfailed" if check.expected_failure else check.outcome or "not seen to end"
        return f"{nodeid}: the check passed, but the test was {ended}"
    if check.evidence != "engine":
        how = f"it was compiled for {check.compiled_for} and never ran: " if check.compiled_for else ""
        return f"{nodeid}: {how}its outputs were emulated on the CPU"
    for name, part in (("parity", check.parity), ("latency", check.latency)):
        if part and part.verdict != "pass":
            reason = f": {part.reason}" if part.reason else ""
            return f"{nodeid}: {name} {part.verdict.replace('_', ' ')}{reason}"
    return None if check.verdict == "pass" else f"{nodeid}: not measured"


# --- names -----------------------------------------------------------------------------------------------------------


def _names(engines: Sequence[_Engine]) -> dict[str, str]:
    """A name for each engine's key: the model's file and the precision, and more where that names several."""
    names = {engine.key: f"{_stem(engine, 1)}_{engine.made_from['precision']}" for engine in engines}
    details: tuple[Callable[[_Engine], str], ...] = (_with_folder, _with_batch, _with_key)
    for detail in details:
        counts = Counter(name.casefold() for name in names.values())
        groups = defaultdict(list)
        for engine in engines:
            if counts[names[engine.key].casefold()] > 1:
                groups[names[engine.key].casefold()].append(engine)
        for group in groups.values():
            found = {engine.key: detail(engine) for engine in group}
            # A detail that all of them share would make every name longer and none clearer.
            if len(set(found.values())) > 1:
                names |= {key: f"{more}_{names[key]}" for key, more in found.items() if detail is _with_folder}
                names |= {key: f"{names[key]}_{more}" for key, more in found.items() if detail is not _with_folder}
    return names


def _stem(engine: _Engine, parts: int) -> str:
    path = PurePath(engine.models[0])
    text = "_".join([*path.parts[:-1], path.stem][-parts:])
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("._-")[-_LONGEST_STEM:].lstrip("._-") or "model"


def _with_folder(engine: _Engine) -> str:
    parent = PurePath(engine.models[0]).parent.name
    return re.sub(r"[^A-Za-z0-9.-]+", "_", parent).strip("._-")[-_LONGEST_STEM:].lstrip("._-") or "here"


def _with_batch(engine: _Engine) -> str:
    least, _, largest = next((found for tensor in engine.inputs if (found := tensor.batches())), (0, 0, 0))
    return "batch" + (str(least) if least == largest else f"{least}-{largest}")


def _with_key(engine: _Engine) -> str:
    return engine.key[:12]


# --- what is written -------------------------------------------------------------------------------------------------


def _manifest(name: str, engine: _Engine, config: str, batching: triton.Batching, size: int) -> dict[str, Any]:
    parts = engine.made_from
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": {"name": "pytest-trtcheck", "version": __version__},
        "name": name,
        "model": {"label": engine.models[0], "sha256": engine.checks[0].model_sha256},
        "precision": parts["precision"],
        "gpu": {"name": parts.get("gpu"), "compute_capability": parts["compute_capability"]},
        "tensorrt": {"module": parts["module"], "version": parts["tensorrt"], "cuda": parts["cuda"]},
        "engine": {"file": PLAN, "key": engine.key, "sha256": engine.sha256, "bytes": size, "made_from": dict(parts)},
        "config": {
            "file": CONFIG,
            "sha256": hash_bytes(config.encode()),
            "max_batch_size": batching.max,
            "no_dynamic_batching": batching.reason,
        },
        "note": _RTX_NOTE.replace("\n", " ") if parts["module"] == "tensorrt_rtx" else None,
        "inputs": [asdict(tensor) for tensor in engine.inputs],
        "outputs": [asdict(tensor) for tensor in engine.outputs],
        "compiled_for": engine.compiled_for or None,
        "proved_by": sorted({check.nodeid for check in engine.proved_by}),
        "parity": [_parity(check, check.parity) for check in engine.proved_by if check.parity],
        "latency": [_latency(check, check.latency) for check in engine.proved_by if check.latency],
    }


def _parity(check: CheckRecord, parity: ParityRecord) -> dict[str, Any]:
    return {
        "nodeid": check.nodeid,
        "cases": check.cases,
        "inputs": check.inputs,
        "seed": check.seed,
        **_of(parity, "metric", "worst", "tol", "tol_source"),
        "outputs": [_without(output, "worst_index", "verdict", "details") for output in parity.outputs],
    }


def _latency(check: CheckRecord, latency: LatencyRecord) -> dict[str, Any]:
    measured = ("gpu", "samples", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "bounds_ms", "budgets")
    return {"nodeid": check.nodeid, **_of(latency, *measured), "measured": latency.details.measured}


def _of(record: object, *names: str) -> dict[str, Any]:
    return {name: value for name, value in jsonable(record).items() if name in names}


def _without(record: object, *names: str) -> dict[str, Any]:
    return {name: value for name, value in jsonable(record).items() if name not in names}


def _comments(engine: _Engine) -> list[str]:
    parts = engine.made_from
    title = TITLES.get(parts["module"], parts["module"])
    if engine.compiled_for:
        return [f"Built by {title} {parts['tensorrt']} for the {engine.compiled_for}, and proved by nothing yet."]
    comments = [
        f"Written by pytest-trtcheck {__version__}. {MANIFEST} beside this file says which tests proved what.",
        f"Built by {title} {parts['tensorrt']} and proved on {parts.get('gpu')}, compute capability "
        f"{parts['compute_capability']}; with another version or on another kind of GPU, nothing is proved.",
    ]
    return [*comments, _RTX_NOTE] if parts["module"] == "tensorrt_rtx" else comments


def _write_all(folder: Path, place: str, engines: Mapping[str, _Engine]) -> tuple[Written, ...]:
    repository = folder / place
    repository.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _finish_what_was_killed(folder, repository)
        for name in engines:
            _refuse_foreign(repository / name)
        with TemporaryDirectory(dir=folder, prefix=f"{_WORK}-{place}-") as work:
            staged = Path(work, "new")
            written = tuple(_stage(staged / name, name, engine) for name, engine in sorted(engines.items()))
            for each in written:
                _put(staged / each.name, repository / each.name, Path(work, "old"))
    return written


def _stage(target: Path, name: str, engine: _Engine) -> Written:
    """Write one model's folder where Triton does not look."""
    plan = target / PLAN
    plan.parent.mkdir(parents=True)
    shutil.copyfile(engine.entry.path / PLAN_FILE, plan)
    if hash_file(plan) != engine.sha256:
        raise ReportError(f"{name}: the copy of the engine differs from the one in the cache", "export again")
    config, batching = triton.config(name, engine.inputs, engine.outputs, _comments(engine))
    size = plan.stat().st_size
    manifest = _manifest(name, engine, config, batching, size)
    (target / CONFIG).write_text(config, encoding="ascii", errors="backslashreplace")
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="ascii")
    for file in (plan, target / CONFIG, target / MANIFEST):
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    notes = [f"no dynamic batching: {batching.reason}"] if batching.reason else []
    if engine.made_from["module"] == "tensorrt_rtx":
        notes.append("a TensorRT-RTX plan: Triton's released TensorRT backend does not load it")
    return Written(name, engine.key, size, batching.max, tuple(notes))


def _put(staged: Path, target: Path, old: Path) -> None:
    """Put a finished folder in its place, in one step; what lay there is kept until then."""
    if target.exists():
        old.mkdir(exist_ok=True)
        target.rename(old / target.name)
    try:
        staged.rename(target)
    except OSError:
        with suppress(OSError):
            (old / target.name).rename(target)
        raise


def _finish_what_was_killed(folder: Path, repository: Path) -> None:
    """Put back what a killed export had taken out of its place, and remove its unfinished work."""
    for work in folder.glob(f"{_WORK}-{repository.name}-*"):
        for taken in (work / "old").glob("*"):
            if not (repository / taken.name).exists():
                taken.rename(repository / taken.name)
        shutil.rmtree(work)


def _refuse_foreign(target: Path) -> None:
    """A ReportError unless `target` is free, or an export of ours that nobody has touched."""
    if not os.path.lexists(target):
        return
    manifest = None if target.is_symlink() else _read_manifest(target)
    hint = "move it away, or export to another folder"
    if manifest is None:
        raise ReportError(f"{target} exists, and --trt-export did not write it", hint)
    expected = {CONFIG: manifest["config"]["sha256"], PLAN: manifest["engine"]["sha256"], MANIFEST: None}
    found = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if not path.is_dir()}
    for name, path in sorted(found.items()):
        if name not in expected:
            raise ReportError(f"{target} holds {name}, which --trt-export did not write", hint)
        if path.is_symlink() or (expected[name] is not None and hash_file(path) != expected[name]):
            raise ReportError(f"{path} was changed after --trt-export wrote it", hint)


def _read_manifest(target: Path) -> dict[str, Any] | None:
    """The manifest of an export of ours; None where there is none."""
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
        ours = manifest["format"] == FORMAT and {"config", "engine"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if ours else None


def _ours(repository: Path) -> list[str]:
    return sorted(path.parent.name for path in repository.glob(f"*/{MANIFEST}") if _read_manifest(path.parent))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One export into a folder at a time."""
    from filelock import FileLock

    path = folder / f"{_WORK}.lock"
    with FileLock(path, mode=0o666):
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ReportError(
            f"cannot export to {folder}: {error.strerror or error}{where}",
            "name a folder that can be written to, with room for the engines",
        ) from error
