"""Reading a bundle, wherever it was copied to, and comparing a replay with what was recorded."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import compare
from pytest_trtcheck.bundle.spec_json import options_from_json, spec_from_json
from pytest_trtcheck.cache import hash_file
from pytest_trtcheck.errors import MISREAD, ModelError, ReportError, first_line, plural
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.inputs import digest
from pytest_trtcheck.model.npz import UNREADABLE, read_arrays, read_cases
from pytest_trtcheck.precision.lowering import Lowered, details_of
from pytest_trtcheck.record import TOOL, CheckRecord, Environment, typed
from pytest_trtcheck.record.files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.check.request import Known
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.record import ParityRecord
    from pytest_trtcheck.spec import BuildOptions, ParitySpec

BUNDLE_FILE = "bundle.json"
SCHEMA_VERSION = 1
INPUTS, OUTPUTS, REFERENCE = "inputs.npz", "outputs.npz", "reference.npz"
ARRAY_FILES = (INPUTS, OUTPUTS, REFERENCE)

_OWN = "sha256"
_HINT = "copy the whole folder again, or take the bundle of another run"


@dataclass(frozen=True)
class Bundle:
    """A bundle that is whole.

    Parameters
    ----------
    about
        What `bundle.json` holds.
    spec
        What to replay: the spec of the check, with the shapes that its engine was built for.
    cases
        The inputs, the worst case first.
    """

    folder: Path
    about: Mapping[str, Any]
    spec: ParitySpec
    options: BuildOptions
    model: OnnxModel
    lowered: Lowered
    cases: tuple[Case, ...]

    def recorded_reference(self) -> Callable[[Case], dict[str, NDArray[Any]]] | None:
        """What gives the recorded outputs of a reference that the test named; None where that was the model itself."""
        name = self.record.reference
        if name is None:
            return None
        known = {digest(case): index for index, case in enumerate(self.cases)}

        def recorded(inputs: Case) -> dict[str, NDArray[Any]]:
            arrays = self.arrays(REFERENCE, known[digest(inputs)])
            if not arrays:
                raise ReportError(
                    f"the bundle holds no outputs of the reference {name}: they were too large for it",
                    code="bundle-outputs",
                )
            return arrays

        recorded.__name__ = f"{name} (as recorded)"
        return recorded

    @functools.cached_property
    def record(self) -> CheckRecord:
        """The record of the check that failed."""
        return typed(self.about["record"], CheckRecord)

    @property
    def nodeid(self) -> str:
        """The test that failed."""
        return str(self.about["nodeid"])

    def arrays(self, file: str, case: int) -> dict[str, NDArray[Any]]:
        """What was recorded of one case: its inputs, outputs or reference; nothing where that was left out."""
        try:
            return read_arrays(self.folder / file, self.about["arrays"][file], case)
        except UNREADABLE as error:
            raise ReportError(
                f"{self.folder / file}: not understood: {first_line(error)}", _HINT, code="bundle-damaged"
            ) from error


def is_bundle(path: Path) -> bool:
    """Whether a `bundle.json` is ours; a damaged one may be, so that somebody says what is wrong with it."""
    try:
        about = read_json(path)
    except (OSError, ValueError):
        return True
    return isinstance(about, dict) and about.get("tool") == TOOL


def read(path: Path) -> Bundle:
    """The bundle whose `bundle.json` is at `path`, every file checked against its SHA-256.

    Raises
    ------
    ReportError
        A file is missing, cut off or changed, or `bundle.json` was written by another version.
    ModelError
        A model that was too large for the bundle is not where it lay.
    """
    try:
        about = read_json(path)
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror or error}", code="bundle-damaged") from error
    except ValueError as error:
        raise ReportError(
            f"{path}: the bundle is damaged: not whole JSON: {error}", _HINT, code="bundle-damaged"
        ) from error
    if not isinstance(about, dict) or about.get("tool") != TOOL:
        raise ReportError(
            f"{path}: not a failure bundle of {TOOL}",
            "name the bundle.json that --trt-bundle wrote",
            code="bundle-damaged",
        )
    if about.get("schema_version") != SCHEMA_VERSION:
        raise ReportError(
            f"{path}: has schema_version {about.get('schema_version')!r}, this version reads {SCHEMA_VERSION}",
            f"use the {TOOL} that wrote it",
            code="report-version",
        )
    try:
        if about != signed(about):
            raise ReportError(
                f"{path}: the bundle is damaged: bundle.json itself was changed", _HINT, code="bundle-damaged"
            )
        found = list(problems(path.parent, about))
        if found:
            shown = "\n  ".join(found)
            raise ReportError(f"{path}: the bundle is damaged:\n  {shown}", _HINT, code="bundle-damaged")
    except _WRONG as error:
        raise _not_understood(path, repr(error)) from error
    try:
        return _bundle(path.parent, about)
    except (*_WRONG, ReportError) as error:
        raise _not_understood(path, first_line(error) if isinstance(error, ReportError) else repr(error)) from error


_WRONG = *MISREAD, *UNREADABLE


def _not_understood(path: Path, why: str) -> ReportError:
    return ReportError(f"{path}: not understood: {why}", f"use the {TOOL} that wrote it", code="bundle-damaged")


def _bundle(folder: Path, about: Mapping[str, Any]) -> Bundle:
    of_model, of_lowered = about["model"], about["lowered"]
    model = _model(folder, of_model, of_model["label"])
    same = located(folder, of_model) == located(folder, of_lowered)
    lowered = model if same else _model(folder, of_lowered, f"{of_model['label']} (lowered)")
    recorded = spec_from_json(about["spec"])
    shapes = spec_from_json({"shapes": about["profile"]}).shapes
    return Bundle(
        folder=folder,
        about=about,
        # The inputs are there as they were fed, so there is no batch to cut them into again.
        spec=replace(recorded, batch=(None,), shapes=shapes, engine=_engine(folder, about.get("engine"))),
        options=options_from_json(about["options"]),
        model=model,
        # The key is the content's own: what a bundle says of itself must not name anything in the cache.
        lowered=Lowered(
            lowered.path,
            lowered.sha256,
            tuple(typed(of_lowered["notes"], list[str])),
            details_of(of_lowered["details"]),
            bool(of_lowered["taken_as_it_is"]),
        ),
        cases=tuple(read_cases(folder / INPUTS, about["arrays"][INPUTS], range(len(about["cases"]["kept"])))),
    )


def _engine(folder: Path, stored: Mapping[str, Any] | None) -> str | None:
    """The engine that exists, which the check was of; None where one was built."""
    if stored is None:
        return None
    path = located(folder, stored)
    if not path.is_file() or hash_file(path) != stored["sha256"]:
        raise ModelError(
            f"{stored['label']}: {path} is not the engine that was recorded (SHA-256 {stored['sha256'][:12]}…)",
            "put it there, or run the test itself again",
            code="bundle-model",
        )
    return str(path.resolve())


def _model(folder: Path, stored: Mapping[str, Any], label: str) -> OnnxModel:
    path = located(folder, stored)
    hint = f"it was too large for the bundle ({stored['bytes']:,} bytes): put it there, or run the test itself again"
    if "path" in stored and not path.exists():
        raise ModelError(f"{label}: the bundle needs {path}, which is missing", hint, code="bundle-model")
    model = onnx_model.load(path, label)
    if model.sha256 != stored["sha256"]:
        raise ModelError(
            f"{label}: {path} is not the model that was recorded (SHA-256 {stored['sha256'][:12]}…)",
            hint,
            code="bundle-model",
        )
    return model


def check_plugins(bundle: Bundle) -> None:
    """See that the plugin libraries which the engine was built with are there: they are code, so no bundle holds them.

    Raises
    ------
    ModelError
        One is missing or another one.
    """
    for plugin, expected in zip(bundle.options.plugins, bundle.about["plugins_sha256"], strict=True):
        if not Path(plugin).is_file() or hash_file(plugin) != expected:
            raise ModelError(
                f"{bundle.model.label}: was built with the plugin library {plugin} (SHA-256 {expected[:12]}…), "
                "which is not there",
                "put the library there, or replay without a GPU: --trt-backend=onnxruntime",
                code="bundle-model",
            )


# --- what a bundle's folder holds, and whether it still holds it ------------------------------------------------------


def signed(about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `bundle.json` with its own SHA-256."""
    return {**about, _OWN: sha256_of({key: value for key, value in about.items() if key != _OWN})}


def sha256_of(data: Mapping[str, Any]) -> str:
    """The SHA-256 of JSON values, however they are laid out in a file."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size in bytes of every file in `folder`, by its path in there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size} for path in files
    }


def problems(folder: Path, about: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the files in `folder`, by the list in `bundle.json`."""
    stored = (about[what] for what in ("model", "lowered", "engine") if about.get(what))
    for name in (*ARRAY_FILES, *(each["file"] for each in stored if "file" in each)):
        if name not in about["files"]:
            yield f"{name}: is not in the list of files"
    for name, expected in about["files"].items():
        file = folder / name
        if PurePosixPath(name).is_absolute() or not file.resolve().is_relative_to(folder.resolve()):
            yield f"{name}: leads out of the bundle"
        elif not file.is_file():
            yield f"{name}: is missing"
        elif file.stat().st_size != expected["bytes"]:
            yield f"{name}: has {plural(file.stat().st_size, 'byte')}, {expected['bytes']:,} were written"
        elif hash_file(file) != expected["sha256"]:
            yield f"{name}: its content was changed"


def located(folder: Path, stored: Mapping[str, Any]) -> Path:
    """Where a model of the bundle is: in its folder, or, too large for that, where it lay."""
    return folder / stored["file"] if "file" in stored else Path(stored["path"])


# --- the replay against the recording --------------------------------------------------------------------------------


def compare_with_recorded(bundle: Bundle, known: Known) -> tuple[str, ...]:
    """Whether a replay computed what was recorded: outputs, reference and verdict."""
    return tuple(_differences(bundle, known))


def _differences(bundle: Bundle, known: Known) -> Iterator[str]:
    before = bundle.record.evidence
    now = known.running.evidence
    if before != now:
        yield f"recorded evidence: {before}, of this replay: {now}; the outputs of one are not those of the other"
    outputs: dict[str, float] = {}
    reference: dict[str, float] = {}
    compared = 0
    for index, case in enumerate(known.cases):
        recorded = bundle.arrays(OUTPUTS, index)
        if recorded:
            compared += 1
            _note_differing(outputs, known.run(case), recorded)
            _note_differing(reference, known.reference(case), bundle.arrays(REFERENCE, index))
    if compared:
        yield _sentence("the outputs", outputs)
    else:
        yield "the bundle holds no outputs to compare this replay with"
    if reference:
        yield _sentence("the FP32 reference's outputs", reference)
    told = [_told(parity) for parity in (bundle.record.parity, known.parity) if parity]
    if len(set(told)) > 1:
        yield f"recorded: {told[0]}; this replay: {told[1]}"


def _told(parity: ParityRecord) -> str:
    worst = "unknown" if parity.worst is None else f"{parity.worst:.6g}"
    return f"{parity.verdict}, {parity.metric} {worst}"


def _note_differing(
    found: dict[str, float], arrays: Mapping[str, NDArray[Any]], recorded: Mapping[str, NDArray[Any]]
) -> None:
    for name, expected in recorded.items():
        array = np.asarray(arrays[name])
        if not _same_bits(array, expected):
            measured = compare.measure(name, array, expected)
            value = measured.value("max")
            fallback = float("inf") if measured.faults or measured.mismatches else measured.value("abs")
            found[name] = max(found.get(name, 0.0), value if value is not None else fallback or 0.0)


def _same_bits(first: NDArray[Any], second: NDArray[Any]) -> bool:
    if first.dtype.kind in "OUS" or second.dtype.kind in "OUS":
        return first.shape == second.shape and first.tolist() == second.tolist()
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    a, b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (first, second))
    return np.array_equal(a, b)


def _sentence(what: str, differing: Mapping[str, float]) -> str:
    if not differing:
        return f"{what} are the recorded ones, bit for bit"
    listed = ", ".join(f"{name!r} by up to {value:.3g}" for name, value in differing.items())
    return f"{what} differ from the recorded ones: {listed} (of the largest value)"


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs in versions, GPU and settings between recording and replay, as one note; none where nothing does."""
    before, after = _described(recorded), _described(now)
    differing = [
        f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    return (f"recorded → this replay: {', '.join(differing)}",) if differing else ()


def _described(circumstances: Mapping[str, Any]) -> dict[str, str]:
    own = {"pytest-trtcheck": "pytest_trtcheck", "trt_reference": "trt_reference", "trt_bitwise": "trt_bitwise"}
    settings = {name: str(circumstances[key]) for name, key in own.items() if key in circumstances}
    return settings | typed(circumstances, Environment).described()
