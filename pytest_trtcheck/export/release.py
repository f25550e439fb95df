"""The release manifest: of every variant of every model that was asked for, what is there, or is missing and why.

The files are the truth: each update looks at all of them again. What runs on several machines asked for is kept in the
manifest itself, so that they may write into one folder, or into several that are put together later.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping  # noqa: TC003 - msgspec reads the types of a variant
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import __version__, record
from pytest_trtcheck.cache import hash_file
from pytest_trtcheck.errors import MISREAD, ReportError, first_line, plural
from pytest_trtcheck.export import folder as folders
from pytest_trtcheck.export import typed
from pytest_trtcheck.export.proof import NotProvedError, Objection, require_engine
from pytest_trtcheck.record import jsonable
from pytest_trtcheck.record.files import read_json, write_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_trtcheck.record import CheckRecord

RELEASE = "release.json"
FORMAT = "pytest-trtcheck release"
FORMAT_VERSION = 1
_NO_GPU = "no-gpu"
_AGAINST = frozenset({"fail", "error", "inconclusive", "rerun", "test failed"})
"""What a run found against an engine, and did not merely leave open."""
NOT_BUILT = Objection("not built for this GPU", "other GPUs have it, and no run on this one asked for it")


def folder_name(gpu: str | None) -> str:
    """A GPU as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", gpu or _NO_GPU).strip("-.") or _NO_GPU


@dataclass(frozen=True)
class Variant:
    """One model in one precision on one GPU, with one profile and one set of build options, as tests asked for it.

    Parameters
    ----------
    gpu
        The product; None: asked for where there was none.
    profile
        By input, its least, usual and largest shape; None where the check did not get so far.
    tests
        The node ids; none for what no test asked for.
    plans, typed
        Where its engine and its typed ONNX file lie in the release.
    contents
        The SHA-256 of what lay there when it was written.
    reason, why
        Why it is not whole, in a word or two and in full.
    """

    model: str
    model_sha256: str | None
    precision: str
    gpu: str | None
    profile: Mapping[str, Any] | None = None
    build_options: Mapping[str, Any] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    typed: tuple[str, ...] = ()
    contents: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    why: str | None = None

    @property
    def kind(self) -> str:
        """What it is on any GPU."""
        return json.dumps([self.model, self.precision, jsonable(self.profile), jsonable(self.build_options)])

    @property
    def batch(self) -> str | None:
        """The batches that it takes, as "8" or "1-8": the first dimension of its first input that is open."""
        spans = [shapes for shapes in (self.profile or {}).values() if shapes[0]]
        if not spans:
            return None
        least, most = spans[0][0][0], spans[0][2][0]
        return str(least) if least == most else f"{least}-{most}"

    def to_json(self) -> dict[str, Any]:
        """It as the manifest has it, its model apart."""
        found = {"batch": self.batch, **asdict(self)}
        del found["model"]
        return dict(jsonable(found))

    @classmethod
    def from_json(cls, model: str, data: Mapping[str, Any]) -> Variant:
        """What `to_json` wrote; a ReportError where it is something else."""
        return record.typed({**data, "model": model}, cls)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.build_options.items())
        parts = [self.model, self.precision, f"for {self.gpu}" if self.gpu else "", options]
        return " ".join(filter(None, [*parts[:3], f"batch {self.batch}" if self.batch else "", parts[3]]))


@dataclass(frozen=True)
class Release:
    """A folder of exports, looked at.

    Parameters
    ----------
    variants
        Those that are whole.
    missing
        Those that are not.
    artifacts
        By its folder, each export: kind, model, precision, hashes.
    stale
        The folders that hold another content of a model than the one of today.
    altered
        (folder, file, what is wrong with it).
    """

    root: Path
    models: Mapping[str, str | None]
    variants: tuple[Variant, ...]
    missing: tuple[Variant, ...]
    artifacts: Mapping[str, Mapping[str, Any]]
    stale: tuple[str, ...] = ()
    altered: tuple[tuple[str, str, str], ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing, stale or altered."""
        return not (self.missing or self.stale or self.altered)

    def lines(self, *, details: bool = False) -> list[str]:
        """What is there and what is not, in words; with `details` a line each."""
        reasons = Counter(variant.reason for variant in self.missing)
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        total = len(self.variants) + len(self.missing)
        first = f"release: {len(self.variants)} of {plural(total, 'variant')} of {plural(len(self.models), 'model')}"
        found = [first + (f"; missing: {said}" if said else "")]
        if details:
            found += [f"  {variant}: {', '.join((*variant.plans, *variant.typed))}" for variant in self.variants]
            found += [f"  missing: {variant}: {variant.reason}: {variant.why}" for variant in self.missing]
        found += [f"  stale: {each}: made from an older {self.artifacts[each]['model']}" for each in self.stale]
        return found + [f"  altered: {place}/{file} {what}" for place, file, what in self.altered]

    def to_json(self) -> dict[str, Any]:
        """The manifest."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool": {"name": "pytest-trtcheck", "version": __version__},
            "complete": self.is_complete,
            "models": [
                {
                    "label": label,
                    "sha256": sha256,
                    "variants": [each.to_json() for each in self.variants if each.model == label],
                    "missing": [each.to_json() for each in self.missing if each.model == label],
                }
                for label, sha256 in sorted(self.models.items())
            ],
            "artifacts": self.artifacts,
            "stale": list(self.stale),
            "altered": [dict(zip(("folder", "file", "what"), each, strict=True)) for each in self.altered],
        }


# --- what a run asked for --------------------------------------------------------------------------------------------


def asked(
    checks: Iterable[CheckRecord],
    gpu: str | None,
    *,
    plans: Mapping[str, str],
    models: Mapping[str, str],
    objections: Mapping[str, Objection],
    contents: Mapping[str, str],
) -> list[Variant]:
    """The variants that the checks of a run are of.

    Parameters
    ----------
    plans, models
        Where engines and typed files were written, by their keys.
    objections
        Why others were not, by theirs.
    contents
        What lies in the folder now.
    """
    variants: dict[str, Variant] = {}
    groups = defaultdict(list)
    for check in checks:
        if check.engine and check.engine.source == "file":
            continue  # What `engine=` names was built elsewhere: there is nothing to export.
        precision = check.lowered.precision if check.lowered else (check.precision or "")
        options = dict(check.build_options or {})
        variant = Variant(check.model, check.model_sha256, precision, gpu, jsonable(check.profile), jsonable(options))
        variants.setdefault(variant.kind, variant)
        groups[variant.kind].append(check)
    told = [_asked(variants[kind], found, plans, models, objections) for kind, found in groups.items()]
    return [replace(each, contents={name: contents[name] for name in (*each.plans, *each.typed)}) for each in told]


def contents(root: Path) -> dict[str, str]:
    """The SHA-256 of each export's plan or model, by the path of its folder."""
    return {place: _content(manifest) for place, manifest in folders.exports(root).items()}


def _content(manifest: Mapping[str, Any]) -> str:
    file = manifest["file"] if manifest["format"] == typed.FORMAT else manifest["engine"]["file"]
    return str(manifest["files"][file]["sha256"])


def _asked(
    variant: Variant,
    checks: Sequence[CheckRecord],
    plans: Mapping[str, str],
    models: Mapping[str, str],
    objections: Mapping[str, Objection],
) -> Variant:
    engines = {check.engine.key for check in checks if check.engine}
    lowered = {typed.key_of(check.lowered) for check in checks if check.lowered}
    found = next((objections[key] for key in sorted(engines) if key in objections), None)
    if not engines:
        try:
            require_engine(checks)
        except NotProvedError as error:
            found = error.objection
    unwritten = next((objections[key] for key in sorted(lowered) if key in objections), None)
    if found is None and unwritten is not None:
        found = Objection("no typed ONNX", unwritten.text)
    return replace(
        variant,
        tests=tuple(sorted({check.nodeid for check in checks})),
        plans=tuple(sorted(plans[key] for key in engines if key in plans)),
        typed=tuple(sorted(models[key] for key in lowered if key in models)),
        reason=found.word if found else None,
        why=found.text if found else None,
    )


# --- the folder ------------------------------------------------------------------------------------------------------


def require_ours(root: Path) -> None:
    """Refuse a folder whose `release.json` is not ours: a ReportError."""
    _read(root)


def update(root: Path, told: Sequence[Variant]) -> Release:
    """Look at the folder again after a run that asked for `told`, and write the manifest."""
    models, known = _read(root)
    models = {**models, **{each.model: each.model_sha256 for each in told if each.model_sha256}}
    models |= {each.model: None for each in told if each.model not in models}
    fresh = {(each.kind, each.gpu) for each in told}
    return _written(root, models, [*(each for each in known if (each.kind, each.gpu) not in fresh), *told])


def check(root: Path) -> Release:
    """Look at a folder that was exported into; nothing is written.

    Raises
    ------
    ReportError
        It is none.
    """
    if not (root / RELEASE).exists():
        raise ReportError(f"{root} holds no {RELEASE}", "name a folder that --trt-export wrote", code="release-damaged")
    return _looked_at(root, *_read(root))


def merge(root: Path, others: Sequence[Path]) -> tuple[Release, list[str]]:
    """Put what lies in other folders into `root`; the release, and what had to stay where it was.

    Where folders disagree on a model's content, the first of them says which it is; the others' are stale.

    Raises
    ------
    ReportError
        A folder is no export, or an export in it was altered.
    """
    remarks = []
    for other in others:
        for place, file, what in check(other).altered:
            raise ReportError(f"{other / place / file} {what}", "export it again", code="release-damaged")
    with folders.alone(root):
        models, known = _read(root)
        variants = {(each.kind, each.gpu): each for each in known}
        brought: dict[tuple[str, str | None], Variant] = {}
        for other in others:
            there, told = _read(other)
            models = {**there, **models}
            for each in told:
                before = brought.get((each.kind, each.gpu))
                if before is None or (before.reason not in _AGAINST and _counts_before(each, before)):
                    brought[each.kind, each.gpu] = each
            remarks += list(_copy(root, other))
        for key, found in brought.items():
            if key not in variants or _counts_before(found, variants[key]):
                variants[key] = found
        return _written(root, models, list(variants.values())), remarks


def _counts_before(each: Variant, other: Variant) -> bool:
    """Whether what is brought of a variant says more than what is known of it: that it is whole, or that it is not."""
    is_same = each.model_sha256 == other.model_sha256
    return is_same and (each.reason in _AGAINST or (other.reason is not None and each.reason is None))


def _written(root: Path, models: Mapping[str, str | None], known: Sequence[Variant]) -> Release:
    """Look at the folder, and write what is known of it."""
    found = _looked_at(root, models, known)
    write_text(root / RELEASE, json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n", "the release manifest")
    return found


def _copy(root: Path, other: Path) -> Iterator[str]:
    """Put the exports of another folder into this one, where none of that name is yet."""
    mine = folders.exports(root)
    stages = {}
    for place, manifest in folders.exports(other).items():
        if place not in mine:
            stages[place] = functools.partial(_copy_folder, other / place, manifest)
        elif mine[place]["files"] != manifest["files"]:
            yield f"{other / place} stays where it is: {root / place} is another build or model of that name"
        elif manifest["format"] == typed.FORMAT:
            united = typed.united(mine[place], manifest)
            stages[place] = functools.partial(_copy_folder, root / place, united)
    folders.put_all(root, stages)


def _copy_folder(source: Path, manifest: Mapping[str, Any], target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(folders.MANIFEST))
    folders.write_manifest(target, manifest)


def _read(root: Path) -> tuple[dict[str, str | None], list[Variant]]:
    """The models and the variants that tests asked for, by the manifest of the folder; none where there is none."""
    path = root / RELEASE
    if not path.exists():
        return {}, []
    try:
        data = read_json(path)
        if data["format"] != FORMAT or data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is {data['format']!r} {data['format_version']!r}")
        told = [(model, each) for model in data["models"] for each in (*model["variants"], *model["missing"])]
        variants = [Variant.from_json(model["label"], each) for model, each in told if each["tests"]]
        models = {str(model["label"]): model["sha256"] for model in data["models"]}
        if not all(sha256 is None or isinstance(sha256, str) for sha256 in models.values()):
            raise ValueError("the SHA-256 of a model is none")
        return models, variants
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}", code="release-damaged") from error
    except (ReportError, *MISREAD) as error:
        raise ReportError(
            f"{path} is no release manifest of ours: {first_line(error)}",
            "move it away, or export to another folder",
            code="release-damaged",
        ) from error


def _looked_at(root: Path, models: Mapping[str, str | None], known: Sequence[Variant]) -> Release:
    """What is there of the variants that are known, and what of the GPUs × kinds is not."""
    try:
        return _seen(root, models, known)
    except MISREAD as error:
        raise ReportError(
            f"{root / RELEASE} was edited, and is not understood: {error!r}",
            "move it away, or export to another folder",
            code="release-damaged",
        ) from error


def _seen(root: Path, models: Mapping[str, str | None], known: Sequence[Variant]) -> Release:
    artifacts = folders.exports(root)
    altered = [
        (place, *each) for place, manifest in artifacts.items() for each in folders.altered(root / place, manifest)
    ]
    spoiled = {place: f"{file} {what}" for place, file, what in altered}
    variants = [_still(each, models[each.model], artifacts, spoiled) for each in known]
    on_gpus = {each.kind for each in variants if each.gpu}
    # One that was asked for without a GPU is the same as one on a GPU, once that is known.
    variants = [each for each in variants if each.gpu or each.kind not in on_gpus]
    current = {place: models.get(each["model"]["label"]) for place, each in artifacts.items()}
    return Release(
        root=root,
        models=models,
        variants=tuple(sorted((each for each in variants if not each.reason), key=str)),
        missing=tuple(sorted([*(each for each in variants if each.reason), *_holes(variants)], key=str)),
        artifacts={place: _artifact(root / place, each) for place, each in artifacts.items()},
        stale=tuple(p for p, each in artifacts.items() if current[p] and current[p] != each["model"]["sha256"]),
        altered=tuple(altered),
    )


def _still(
    variant: Variant, sha256: str | None, artifacts: Mapping[str, Mapping[str, Any]], spoiled: Mapping[str, str]
) -> Variant:
    """A variant as it is now: its files may be gone or altered, and its model another."""
    if variant.model_sha256 != sha256:
        text = f"it was made from an older content of the model: {variant.model_sha256 or 'one that could not be read'}"
        return replace(variant, reason="stale", why=text, plans=(), typed=())
    for place in (*variant.plans, *variant.typed):
        if place in spoiled:
            return replace(variant, reason="altered", why=f"{place}: {spoiled[place]}")
        if place not in artifacts:
            return replace(variant, reason="gone", why=f"{place} is not there any more")
        if _content(artifacts[place]) != variant.contents[place]:
            return replace(variant, reason="replaced", why=f"{place} holds what a later run wrote there")
    return variant


def _holes(variants: Sequence[Variant]) -> Iterator[Variant]:
    """What some GPUs have and others were never asked for, by model."""
    for model in sorted({each.model for each in variants}):
        of_model = [each for each in variants if each.model == model and each.reason != "stale"]
        gpus = sorted({each.gpu for each in of_model if each.gpu})
        there = {(each.kind, each.gpu) for each in of_model}
        for kind in {each.kind: each for each in of_model if each.gpu}.values():
            for gpu in gpus:
                if (kind.kind, gpu) not in there:
                    empty = replace(kind, gpu=gpu, tests=(), plans=(), typed=())
                    yield replace(empty, reason=NOT_BUILT.word, why=NOT_BUILT.text)


def _artifact(place: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """An export as the release has it."""
    is_typed = manifest["format"] == typed.FORMAT
    return {
        "kind": "typed ONNX" if is_typed else "engine",
        "model": manifest["model"]["label"],
        "model_sha256": manifest["model"]["sha256"],
        "precision": manifest["precision"],
        "evidence": manifest["evidence"] if is_typed else "engine" if manifest["proved_by"] else None,
        "gpu": None if is_typed else manifest["gpu"],
        "tensorrt": None if is_typed else manifest["tensorrt"],
        "manifest_sha256": hash_file(place / folders.MANIFEST),
        "files": manifest["files"],
    }
