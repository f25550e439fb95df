"""`--trt-export`: what a run proved, as artifacts: engines for the Triton Inference Server, and the typed ONNX files.

An engine is written when every check of it passed on a GPU, and every test with such a check passed as well. What is
written are the very bytes that were checked: a build of the same key that differs from them is left out. The ONNX file
that it was built from is written beside it, on machines without a GPU too, and says what was seen of it. The release
manifest says what of all that was asked for is there.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol

from pytest_trtcheck import __version__
from pytest_trtcheck.backends.tensorrt.backend import IO_FILE, PLAN_FILE
from pytest_trtcheck.backends.tensorrt.module import TITLES
from pytest_trtcheck.backends.tensorrt.options import key_parts
from pytest_trtcheck.cache import hash_bytes, hash_file
from pytest_trtcheck.errors import ArgumentError, ReportError, listed, plural
from pytest_trtcheck.export import folder as folders
from pytest_trtcheck.export import release, triton, typed
from pytest_trtcheck.export.folder import MANIFEST
from pytest_trtcheck.export.proof import NotProvedError, of_inputs, parity, require_engine, score, some
from pytest_trtcheck.record import is_bad
from pytest_trtcheck.spec import BuildOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pytest_trtcheck.cache import Cache, Entry
    from pytest_trtcheck.export.proof import Objection
    from pytest_trtcheck.export.release import Release
    from pytest_trtcheck.export.typed import TypedModel
    from pytest_trtcheck.record import CheckRecord, Environment, LatencyRecord

REPOSITORY = "model_repository"
"""One for each GPU, in a folder of its name: a server loads all of a repository, and no plan of another GPU."""
TO_PROVE = "to_prove"
"""Where engines lie that were compiled for a GPU which is not here: nobody is to serve them before a test there did."""
CONFIG = "config.pbtxt"
PLAN = "1/model.plan"
"""Where Triton looks for the plan of the version 1 of a model."""
FORMAT = folders.FORMATS[0]
FORMAT_VERSION = 1

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
class WrittenModel:
    """A typed ONNX file that was written, and whether a GPU ran an engine of it."""

    name: str
    bytes: int
    is_proved: bool


@dataclass(frozen=True)
class LeftOut:
    """What was not written, and why; `what` is "engine" or "typed ONNX"."""

    label: str
    key: str
    objection: Objection
    what: str = "engine"

    @property
    def reason(self) -> str:
        """Why, in full."""
        return self.objection.text


@dataclass(frozen=True)
class Exported:
    """What was written below `folder`, what was not, and the engines of earlier runs that still lie there.

    Parameters
    ----------
    to_prove
        The engines that were compiled for another GPU, and for which.
    """

    folder: Path
    repository: Path
    written: tuple[Written, ...]
    left_out: tuple[LeftOut, ...]
    older: tuple[str, ...] = ()
    to_prove: tuple[tuple[Path, str], ...] = ()
    models: tuple[WrittenModel, ...] = ()
    release: Release | None = None

    def lines(self) -> list[str]:
        """All of it in words, for the terminal."""
        lines = [f"exported {plural(len(self.written), 'engine')} to {self.repository}"]
        for each in self.written:
            batches = f"batches up to {each.max_batch_size}" if each.max_batch_size else "no dynamic batching"
            lines.append(f"  {each.name}: {plural(each.bytes, 'byte')}, {batches}")
            lines += [f"    {note}" for note in each.notes]
        if self.models:
            lines.append(f"exported {plural(len(self.models), 'typed ONNX file')} to {self.folder / typed.FOLDER}")
        for model in self.models:
            seen = "proved by engines on a GPU" if model.is_proved else "emulated: no engine of it was run on a GPU"
            lines.append(f"  {model.name}: {plural(model.bytes, 'byte')}, {seen}")
        lines += self._not_exported()
        lines += [f"to be proved on the {gpu}, by a test with engine={str(plan)!r}" for plan, gpu in self.to_prove]
        if self.older:
            lines.append(f"from an earlier run, and not proved by this one: {', '.join(self.older)}")
        return [*lines, *(self.release.lines() if self.release else ())]

    def _not_exported(self) -> Iterator[str]:
        """By reason: where there is no GPU, every engine has the same one."""
        reasons: dict[str, list[LeftOut]] = {}
        for each in self.left_out:
            reasons.setdefault(each.objection.said, []).append(each)
        for reason, found in reasons.items():
            if len(found) == 1:
                yield f"not exported: {found[0].label} ({found[0].what} {found[0].key[:8]}): {found[0].reason}"
                continue
            labels = listed(dict.fromkeys(each.label for each in found), 5)
            kinds = Counter(each.what for each in found)
            counts = " and ".join(
                plural(count, "engine" if what == "engine" else "file") for what, count in sorted(kinds.items())
            )
            yield f"not exported: {counts} ({labels}): {reason}"


def write(
    folder: str | os.PathLike[str],
    records: Iterable[CheckRecord],
    cache: Cache,
    *,
    gpu: str | None = None,
    environment: Environment | None = None,
) -> Exported:
    """Write what `records` prove into `folder`, each whole or not at all.

    Parameters
    ----------
    folder
        Made when it is not there. The engines are in the folder `model_repository` of their GPU's in it.
    records
        All check records of the run, each with its test's outcome.
    cache
        Where the engines are.
    gpu
        The product that was judged; None: there was none.
    environment
        Versions, and the GPU that is present.

    Raises
    ------
    ReportError
        `folder` cannot be written, or holds a model of the same name that is not an export of ours as we left it; then
        nothing was written.
    CacheError
        The cache cannot be read.
    """
    checks = sorted(records, key=lambda record: record.nodeid)
    engines, compiled, models, left_out = _proved(checks, cache)
    root = Path(folder)
    if not checks:
        return Exported(root, root, (), ())
    repository = root / release.folder_name(gpu) / REPOSITORY
    with folders.alone(root):
        release.require_ours(root)
        taken = {name: folders.read_manifest(repository / name) or {} for name in _ours(repository)}
        plan_names, model_names = _names(engines, taken), _names(models)
        plans = {key: repository / name for key, name in plan_names.items()}
        waiting = {key: repository.with_name(TO_PROVE) / name for key, name in _names(compiled).items()}
        typed_models = {key: root / typed.FOLDER / name for key, name in model_names.items()}
        written: list[Written] = []
        stages = {plans[each.key]: functools.partial(_stage, written, plan_names[each.key], each) for each in engines}
        for each in compiled:
            stages[waiting[each.key]] = functools.partial(_stage, [], waiting[each.key].name, each)
        for model in models:
            place = typed_models[model.key]
            stages[place] = functools.partial(typed.stage, place, model, environment)
        folders.put_all(root, {_below(root, place): stage for place, stage in stages.items()})
        told = release.asked(
            checks,
            gpu,
            plans={key: _below(root, place) for key, place in plans.items()},
            models={key: _below(root, place) for key, place in typed_models.items()},
            objections={each.key: each.objection for each in left_out},
            contents=release.contents(root),
        )
        found = release.update(root, told)
    sizes = {
        key: sum(each["bytes"] for each in found.artifacts[_below(root, place)]["files"].values())
        for key, place in typed_models.items()
    }
    return Exported(
        folder=root,
        repository=repository,
        written=tuple(sorted(written, key=lambda each: each.name)),
        left_out=tuple(sorted(left_out, key=lambda each: (each.label, each.key))),
        older=tuple(name for name in _ours(repository) if name not in plan_names.values()),
        to_prove=tuple((waiting[each.key] / PLAN, each.compiled_for) for each in compiled),
        models=tuple(WrittenModel(model_names[each.key], sizes[each.key], each.is_proved) for each in models),
        release=found,
    )


def _below(root: Path, place: Path) -> str:
    return place.relative_to(root).as_posix()


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
    def precision(self) -> str:
        return self.made_from["precision"]

    @property
    def models(self) -> list[str]:
        """What the tests called the model, shortest first."""
        return sorted({check.model for check in self.checks}, key=lambda label: (len(label), label))


def _proved(
    checks: Sequence[CheckRecord], cache: Cache
) -> tuple[list[_Engine], list[_Engine], list[TypedModel], list[LeftOut]]:
    """The engines that the checks of a run prove, those that wait for their GPU, the typed files, and the others."""
    engines: list[_Engine] = []
    compiled: list[_Engine] = []
    models: list[TypedModel] = []
    left_out: list[LeftOut] = []
    by_key = defaultdict(list)
    for check in checks:
        if check.engine:
            by_key[check.engine.key].append(check)
    for key, found in sorted(by_key.items()):
        try:
            engines.append(_engine(key, found, cache))
        except NotProvedError as error:
            left_out.append(LeftOut(_label(found), key, error.objection))
            if (engine := _compiled(key, found, cache)) is not None:
                compiled.append(engine)
    for key, found in sorted(typed.by_file(checks).items()):
        try:
            models.append(typed.proved(found, cache))
        except NotProvedError as error:
            left_out.append(LeftOut(_label(found), key, error.objection, "typed ONNX"))
    return engines, compiled, models, left_out


def _label(checks: Sequence[CheckRecord]) -> str:
    return f"{checks[0].model} {checks[0].precision or ''}".rstrip()


def _engine(key: str, checks: Sequence[CheckRecord], cache: Cache) -> _Engine:
    """The engine of these checks; a NotProvedError where they do not prove it, or it is not there to be written."""
    if checks[0].engine is not None and checks[0].engine.source == "file":
        raise NotProvedError("engine= file", "engine= named a file that exists, which nothing was built for")
    require_engine(checks)
    if any((check.build_options or {}).get("strip_weights") for check in checks):
        text = "its plan holds no weights, and Triton gives it none: load it with those of its typed ONNX file"
        raise NotProvedError("no weights", text)
    return _stored(key, checks, cache)


def _compiled(key: str, checks: Sequence[CheckRecord], cache: Cache) -> _Engine | None:
    """The engine of these checks where it was compiled for another GPU, and all that stands against it is that."""
    gpu = checks[0].compiled_for
    if not gpu or {check.compiled_for for check in checks} != {gpu}:
        return None
    if any(is_bad(check.verdict) or check.runs > 1 or check.outcome == "failed" for check in checks):
        return None
    try:
        return _stored(key, checks, cache, gpu)
    except NotProvedError:
        return None


def _stored(key: str, checks: Sequence[CheckRecord], cache: Cache, compiled_for: str = "") -> _Engine:
    """The engine as the cache has it, if that is the one that was checked."""
    checked = {check.engine and check.engine.sha256 for check in checks}
    differ = "builds differ"
    if len(checked) != 1 or None in checked:
        raise NotProvedError(differ, "it was built more than once during the run, and the builds differ")
    entry = cache.find("engine", key)
    if entry is None:
        raise NotProvedError("gone", "it is no longer in the cache: it was cleared or damaged after the checks")
    try:
        inputs, outputs = entry.read_json(IO_FILE, _tensors)
        sha256 = hash_file(entry.path / PLAN_FILE)
    except OSError as error:
        raise NotProvedError("gone", f"it cannot be read from the cache: {error.strerror}") from error
    if {sha256} != checked:
        raise NotProvedError(differ, "the cache holds another build of it than the one that was checked")
    try:
        triton.config("name", inputs, outputs)
    except ArgumentError as error:
        raise NotProvedError("not for Triton", error.message) from error
    return _Engine(key, entry, checks, sha256, inputs, outputs, compiled_for)


def _tensors(found: Any) -> tuple[tuple[triton.Tensor, ...], ...]:
    return tuple(tuple(map(triton.Tensor.of, found[side])) for side in ("inputs", "outputs"))


# --- names -----------------------------------------------------------------------------------------------------------


class _Named(Protocol):
    """What gets a name: an engine or a typed file."""

    @property
    def key(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def models(self) -> list[str]: ...

    @property
    def checks(self) -> Sequence[CheckRecord]: ...


def _names(things: Sequence[_Named], taken: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, str]:
    """A name for each thing's key: the model's file and the precision, and more where that names several.

    Parameters
    ----------
    taken
        The manifests of what lies there: a name is free if it is that of the same model and profile.
    """
    # In a URL, as Triton's clients make of a name, a + may be a blank.
    names = {thing.key: f"{_stem(thing, 1)}_{thing.precision.replace('+', '_')}{_io(thing)}" for thing in things}
    details: tuple[Callable[[Any], str], ...] = (_with_folder, _with_batch, _with_key)
    for detail in details:
        counts = Counter(name.casefold() for name in names.values())
        groups = defaultdict(list)
        for thing in things:
            name = names[thing.key]
            if counts[name.casefold()] > 1 or (
                detail is not _with_folder and _is_other(thing, (taken or {}).get(name))
            ):
                groups[name.casefold()].append(thing)
        for group in groups.values():
            found = {thing.key: detail(thing) for thing in group}
            # A detail that all of them share would make every name longer and none clearer.
            if len(group) == 1 or len(set(found.values())) > 1:
                names |= {key: f"{more}_{names[key]}" for key, more in found.items() if detail is _with_folder}
                names |= {key: f"{names[key]}_{more}" for key, more in found.items() if detail is not _with_folder}
    return names


def _is_other(thing: Any, manifest: Mapping[str, Any] | None) -> bool:
    """Whether what lies there is another variant of the same model: it is not replaced."""
    if manifest is None or manifest["model"]["sha256"] != thing.checks[0].model_sha256:
        return False
    mine, theirs = thing.made_from, manifest["engine"]["made_from"]
    return any(mine.get(part) != theirs.get(part) for part in ("profile", *key_parts(BuildOptions())))


def _stem(engine: _Named, parts: int) -> str:
    path = PurePath(engine.models[0])
    text = "_".join([*path.parts[:-1], path.stem][-parts:])
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("._-")[-_LONGEST_STEM:].lstrip("._-") or "model"


def _io(thing: _Named) -> str:
    """What the name says of 16-bit inputs and outputs: they make another interface."""
    io = (thing.checks[0].build_options or {}).get("io")
    return f"_io-{io}" if io else ""


def _with_folder(engine: _Named) -> str:
    parent = PurePath(engine.models[0]).parent.name
    return re.sub(r"[^A-Za-z0-9.-]+", "_", parent).strip("._-")[-_LONGEST_STEM:].lstrip("._-") or "here"


def _with_batch(engine: _Named) -> str:
    if not isinstance(engine, _Engine):
        return ""
    least, _, largest = next((found for tensor in engine.inputs if (found := tensor.batches())), (0, 0, 0))
    return "batch" + (str(least) if least == largest else f"{least}-{largest}")


def _with_key(engine: _Named) -> str:
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
        "parity": [parity(check, check.parity) for check in engine.proved_by if check.parity],
        "score": [of_inputs(check) | score(check.score) for check in engine.proved_by if check.score],
        "latency": [_latency(check, check.latency) for check in engine.proved_by if check.latency],
    }


def _latency(check: CheckRecord, latency: LatencyRecord) -> dict[str, Any]:
    measured = ("gpu", "samples", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "bounds_ms", "budgets")
    return {"nodeid": check.nodeid, **some(latency, *measured), "measured": latency.details.measured}


def _comments(engine: _Engine) -> list[str]:
    parts = engine.made_from
    title = TITLES.get(parts["module"], parts["module"])
    if engine.compiled_for:
        return [f"Built by {title} {parts['tensorrt']} for the {engine.compiled_for}, and proved by nothing yet."]
    gpu = parts.get("gpu", "a GPU of its class")  # hardware compatible
    comments = [
        f"Written by pytest-trtcheck {__version__}. {MANIFEST} beside this file says which tests proved what.",
        f"Built by {title} {parts['tensorrt']} and proved on {gpu}, compute capability "
        f"{parts['compute_capability']}; with another version or on another kind of GPU, nothing is proved.",
    ]
    return [*comments, _RTX_NOTE] if parts["module"] == "tensorrt_rtx" else comments


def _stage(written: list[Written], name: str, engine: _Engine, target: Path) -> None:
    """Write one model's folder where Triton does not look."""
    plan = target / PLAN
    plan.parent.mkdir(parents=True)
    shutil.copyfile(engine.entry.path / PLAN_FILE, plan)
    if hash_file(plan) != engine.sha256:
        raise ReportError(
            f"{name}: the copy of the engine differs from the one in the cache", "export again", code="release-damaged"
        )
    config, batching = triton.config(name, engine.inputs, engine.outputs, _comments(engine))
    size = plan.stat().st_size
    (target / CONFIG).write_text(config, encoding="ascii", errors="backslashreplace")
    folders.write_manifest(target, _manifest(name, engine, config, batching, size))
    notes = [f"no dynamic batching: {batching.reason}"] if batching.reason else []
    if engine.made_from["module"] == "tensorrt_rtx":
        notes.append("a TensorRT-RTX plan: Triton's released TensorRT backend does not load it")
    written.append(Written(name, engine.key, size, batching.max, tuple(notes)))


def _ours(repository: Path) -> list[str]:
    return sorted(path.parent.name for path in repository.glob(f"*/{MANIFEST}") if folders.read_manifest(path.parent))
