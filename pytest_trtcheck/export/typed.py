"""The ONNX file in its precision, as an artifact: ONNX Runtime, DeepStream, a Jetson and TensorRT 11 start from it.

What was judged were engines that were built from the file, or its emulation: the manifest says which.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import __version__
from pytest_trtcheck.errors import CheckError, ReportError
from pytest_trtcheck.export import folder as folders
from pytest_trtcheck.export.proof import NotProvedError, of_inputs, parity, ran_on_gpu, require_sound, score
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.sources import MODEL_FILE, open_model
from pytest_trtcheck.precision.lowering import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.record import CheckRecord, Environment, LoweredRecord

FORMAT = folders.FORMATS[1]
FORMAT_VERSION = 1
FOLDER = "typed"
EMULATED = "No engine built from this file was run on a GPU: what was judged is its arithmetic, emulated on a CPU."


@dataclass(frozen=True)
class TypedModel:
    """A typed ONNX file that all checks of it passed."""

    lowered: LoweredRecord
    model: OnnxModel
    checks: Sequence[CheckRecord]

    @property
    def key(self) -> str:
        """Its identity."""
        return key_of(self.lowered)

    @property
    def precision(self) -> str:
        """The one that was asked for."""
        return self.lowered.precision

    @property
    def models(self) -> list[str]:
        """What the tests called the model that it was lowered from, shortest first."""
        return sorted({check.model for check in self.checks}, key=lambda label: (len(label), label))

    @property
    def is_proved(self) -> bool:
        """Whether a GPU ran an engine that was built from it."""
        return any(map(ran_on_gpu, self.checks))


def key_of(lowered: LoweredRecord) -> str:
    """The identity of a typed file: FP32 and TF32 are two of one content."""
    return f"{lowered.key}-{lowered.precision}"


def by_file(records: Iterable[CheckRecord]) -> dict[str, list[CheckRecord]]:
    """The checks of each typed file, by its key."""
    found = defaultdict(list)
    for record in records:
        if record.lowered is not None:
            found[key_of(record.lowered)].append(record)
    return dict(found)


def proved(checks: Sequence[CheckRecord], cache: Cache) -> TypedModel:
    """The typed file of these checks.

    Raises
    ------
    NotProvedError
        They do not prove it, or it is not there any more as it was.
    """
    require_sound(checks)
    lowered = checks[0].lowered
    assert lowered is not None
    gone = "the ONNX file that was checked is not there any more as it was"
    given = checks[0].build_options or {}
    # One of our own lies in the cache, which knows whether it is whole; the user's is known by its content.
    entries = (cache.find(kind, lowered.key) for kind in KINDS)
    path = lowered.path or next((entry.path / MODEL_FILE for entry in entries if entry), None)
    if path is None:
        raise NotProvedError("gone", f"{gone}: it was cleared or damaged in the cache")
    try:
        model = open_model(path, (), cache, given.get("custom_ops", ()))
    except CheckError as error:
        raise NotProvedError("gone", f"{gone}: {error.message}") from None
    if lowered.path and model.sha256 != checks[0].model_sha256:
        raise NotProvedError("changed", f"{gone}: {lowered.path} was changed")
    return TypedModel(lowered, model, checks)


def stage(place: Path, typed: TypedModel, environment: Environment | None, target: Path) -> None:
    """Write the folder of one typed file into `target`; what other runs said of these bytes in `place` stays."""
    external = onnx_model.external_files(typed.model.path)
    file = MODEL_FILE if MODEL_FILE not in external else typed.model.path.name
    for location, source in {file: typed.model.path, **external}.items():
        (target / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.resolve(), target / location)
    copied = onnx_model.with_custom_ops(onnx_model.load(target / file), typed.model.custom_ops)
    if copied.sha256 != typed.model.sha256:
        raise ReportError(
            f"{place.name}: the copy of the ONNX file differs from the one that was checked",
            "export again",
            code="release-damaged",
        )
    manifest = _manifest(place.name, file, typed, environment)
    earlier = folders.read_manifest(place)
    if earlier is not None and earlier["files"] == folders.described(target):
        manifest = united(manifest, earlier)
    folders.write_manifest(target, manifest)


def united(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What two manifests of the same bytes say together; of a test on one GPU or none, the first's word counts."""
    told = {_whose(each): each for each in [*other["judged"], *manifest["judged"]]}
    judged = [told[whose] for whose in sorted(told)]
    return {**manifest, "judged": judged, **_evidence(judged)}


def _whose(judged: Mapping[str, Any]) -> tuple[str, ...]:
    return (judged["nodeid"], judged["evidence"], str(judged["gpu"]), str(judged["tensorrt"]))


def _evidence(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    proved_by = sorted({each["nodeid"] for each in judged if each["evidence"] == "engine"})
    return {
        "evidence": "engine" if proved_by else "emulated",
        "proved_by": proved_by,
        "note": None if proved_by else EMULATED,
    }


def _manifest(name: str, file: str, typed: TypedModel, environment: Environment | None) -> dict[str, Any]:
    judged = [_judged(check, environment) for check in typed.checks if check.parity or check.score]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": {"name": "pytest-trtcheck", "version": __version__},
        "name": name,
        "model": {"label": typed.models[0], "sha256": typed.checks[0].model_sha256},
        "precision": typed.precision,
        "file": file,
        "lowered": typed.lowered.key,
        "inputs": [_tensor(each) for each in typed.model.inputs],
        "outputs": [_tensor(each) for each in typed.model.outputs],
        **_evidence(judged),
        "judged": judged,
    }


def _tensor(spec: onnx_model.TensorSpec) -> dict[str, Any]:
    return {name: value for name, value in asdict(spec).items() if name in {"name", "dtype", "shape"}}


def _judged(check: CheckRecord, environment: Environment | None) -> dict[str, Any]:
    """One check of the file: by what, on what, how far off."""
    gpu = environment.gpu.name if environment and environment.gpu and check.evidence == "engine" else None
    found = environment.tensorrt if environment and check.evidence == "engine" else None
    return {
        **(parity(check, check.parity) if check.parity else of_inputs(check)),
        **({"score": score(check.score)} if check.score else {}),
        "evidence": check.evidence,
        "backend": check.backend,
        "gpu": gpu,
        "tensorrt": found and f"{found.module} {found.version}",
        "onnxruntime": environment and environment.onnxruntime,
        "engine_sha256": check.engine.sha256 if check.engine and check.evidence == "engine" else None,
        "build_options": dict(check.build_options or {}),
    }
