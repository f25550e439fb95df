"""An engine that exists: what its file tells before anything loads it.

An engine is code, and its loader trusts it: whose it is, for which GPU, and whether it is whole is found out by reading
first. The beginning of a plan is laid out as `trtexec --getPlanVersionOnly` reads it (TensorRT's own
samples/common/sampleEngines.cpp): a tag, the serialization's version, and at byte 24 the four numbers of the release.
Size and targets were found by building plans of TensorRT-RTX 1.5 to 1.7 for each GPU that these compile for.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.backends.tensorrt.module import TITLES, release_of
from pytest_trtcheck.cache import Cache, Key, hash_bytes, hash_file
from pytest_trtcheck.errors import MISREAD, ModelError, listed, plural
from pytest_trtcheck.record.files import read_json, resolved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.backends.tensorrt.module import ModuleName, TensorRTModule

EXTRACTED = "engine.plan"
EXPORT_FORMAT = "pytest-trtcheck export"
_LARGEST_ONNX = 1 << 31
"""Bytes that no ONNX file reaches: protobuf ends there."""
_TAGS: Mapping[bytes, ModuleName] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
_HEADER = struct.Struct("<4sIQQ4B4xI")
"""Tag, the serialization's version, unknown, bytes in all, the release; behind RTX's second tag the targets."""
_TARGETS: tuple[tuple[int, int], ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""The compute capability that each bit of the targets stands for. A plan for all of them has a seventh bit, which
stands for GPUs that the release does not list."""


@dataclass(frozen=True)
class PlanFile:
    """A serialized engine, and what is known of it without loading it.

    Parameters
    ----------
    path
        The file that holds the plan itself.
    label
        What messages call it: the path as it was named.
    module, version
        The TensorRT that built it; () where the file does not tell the version.
    targets
        The compute capabilities that it was compiled for; None where the file does not tell.
    least_target
        The least that it runs on, where it was built to run on later ones too.
    manifest
        What `--trt-export` wrote beside it.
    notes
        What a person should know.
    """

    path: Path
    label: str
    sha256: str
    bytes: int
    module: ModuleName
    version: tuple[int, ...] = ()
    targets: tuple[tuple[int, int], ...] | None = None
    least_target: tuple[int, int] | None = None
    manifest: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def builder(self) -> str:
        """The TensorRT that built it, for messages."""
        return " ".join(filter(None, (TITLES[self.module], dotted(self.version))))

    @property
    def built_for(self) -> tuple[str, ...]:
        """The compute capabilities that it was compiled for, as far as the file tells: "8.0"."""
        if self.least_target is not None:
            return (f"{dotted(self.least_target)} and later",)
        return tuple(map(dotted, self.targets or ()))

    @property
    def stated_precision(self) -> str | None:
        """What the manifest says of its precision."""
        return str(self.manifest["precision"]) if self.manifest and self.manifest.get("precision") else None

    @property
    def stated_model(self) -> str | None:
        """The SHA-256 of the model that it was built from, by the manifest."""
        found = (self.manifest or {}).get("model")
        return str(found["sha256"]) if isinstance(found, dict) and found.get("sha256") else None


def dotted(numbers: Sequence[int]) -> str:
    """`(1, 5, 0)` as "1.5.0"."""
    return ".".join(map(str, numbers))


def opened(path: Path, label: str, cache: Cache) -> PlanFile:
    """The engine in a file: a plan, or the ONNX file of ONNX Runtime that holds one in an EPContext node.

    Raises
    ------
    ModelError
        It is no engine, it is cut off, or what is said of it elsewhere contradicts the file.
    """
    try:
        head, size = _head(path), path.stat().st_size
    except OSError as error:
        raise ModelError(
            f"{label}: cannot be read: {error.strerror or error}", "name the file of an engine", code="engine-file"
        ) from error
    if head[:4] in _TAGS:
        return _with_manifest(_plan(path, label, head, size))
    if (behind := _metadata_bytes(path, head)) is not None:
        file = _held(label, path.read_bytes()[behind:], cache)
        return replace(
            file, notes=(f"the plan lies behind {plural(behind, 'byte')} of metadata, as Ultralytics writes it",)
        )
    if not size:
        raise ModelError(f"{label}: the engine file is empty", "build it again, or copy it again", code="engine-file")
    model = _onnx(path) if size < _LARGEST_ONNX else None
    if model is None:
        raise ModelError(
            f"{label}: is no serialized engine: it {_what(head)}",
            "engine= takes what TensorRT serialized (.plan, .engine), or ONNX Runtime's EPContext model (.onnx)",
            code="engine-file",
        )
    return _of_context(path, label, model, cache)


def _metadata_bytes(path: Path, head: bytes) -> int | None:
    """The bytes before the plan where JSON stands there, its length in four bytes first; None where it does not."""
    if head[4:5] != b"{":
        return None
    start = 4 + int.from_bytes(head[:4], "little")
    with path.open("rb") as file:
        file.seek(start)
        return start if file.read(4) in _TAGS else None


def _held(label: str, plan: bytes, cache: Cache) -> PlanFile:
    """The plan that another file holds, as a file of its own."""
    key = Key("engine_file", label, {"sha256": hash_bytes(plan)})
    entry = cache.get_or_make(key, lambda folder: (folder / EXTRACTED).write_bytes(plan))
    return _plan(entry.path / EXTRACTED, label, plan[: _HEADER.size], len(plan))


def _plan(path: Path, label: str, head: bytes, size: int) -> PlanFile:
    if len(head) < _HEADER.size:
        raise ModelError(
            f"{label}: the engine file is cut off: it has {plural(size, 'byte')}",
            "copy it again, or build it again",
            code="engine-file",
        )
    tag, serialization, _, total, *release, targets = _HEADER.unpack(head)
    module = _TAGS[tag]
    version = tuple(release) if serialization == 0 else ()
    known_layout = module == "tensorrt_rtx" and serialization == 0
    if known_layout and total > size:
        raise ModelError(
            f"{label}: the engine file is cut off: it has {size:,} of {plural(total, 'byte')}",
            "copy it again, or build it again",
            code="engine-file",
        )
    return PlanFile(
        path, label, hash_file(path), size, module, version, targets=_targets(targets) if known_layout else None
    )


def _targets(bits: int) -> tuple[tuple[int, int], ...] | None:
    """The compute capabilities of the targets' bits; None where there are none, or some that stand for others."""
    if not bits or bits >> len(_TARGETS):
        return None
    return tuple(capability for index, capability in enumerate(_TARGETS) if bits >> index & 1)


def _what(head: bytes) -> str:
    """What a file is that is no plan, by its beginning."""
    if head.startswith(b"PK"):
        return "is an archive, as .npz, .keras and PyTorch's files are"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS: fetch the file itself (git lfs pull)"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"is text that begins with {head[:20].decode('ascii')!r}"
    return f"begins with the bytes {head[:4].hex(' ')}, a plan with {' or '.join(repr(tag.decode()) for tag in _TAGS)}"


# --- what fits this machine -------------------------------------------------------------------------------------------


def refuse_unfit(
    file: PlanFile, module: TensorRTModule | None, other: TensorRTModule | None, gpu: str, capability: tuple[int, int]
) -> None:
    """Refuse a plan of another TensorRT or GPU, as far as its file tells; what it does not tell, the loader does.

    Parameters
    ----------
    module, other
        The TensorRT that it is to be loaded by; None: it is not installed, `other` may be.
    gpu, capability
        The GPU that it is to run on; (0, 0): not known.

    Raises
    ------
    ModelError
        It says both, what the plan is of and what there is.
    """
    if module is None and other is not None:
        raise ModelError(
            f"{file.label}: is an engine of {file.builder}, which is not installed: {other.title} is, and does not "
            "load it",
            "install the TensorRT that built it, or build it with the one that is installed",
            code="engine-release",
        )
    # TensorRT's engines may have been built to be loaded by later releases of the same line; TensorRT-RTX's may not.
    compared = 3 if file.module == "tensorrt_rtx" else 1
    if module is not None and file.version and file.version[:compared] != module.release[:compared]:
        raise ModelError(
            f"{file.label}: was built by {file.builder}, and {module.title} is installed: an engine is loaded by the "
            "release that built it alone",
            f"build it again with {module.title}, or install {file.builder}",
            code="engine-release",
        )
    if capability == (0, 0) or not file.built_for:
        return
    fits = file.least_target <= capability if file.least_target else capability in (file.targets or ())
    if not fits:
        raise ModelError(
            f"{file.label}: was compiled for compute capability {', '.join(file.built_for)}, and {gpu} has "
            f"{dotted(capability)}: it may load there, and compute anything",
            f"build it for {gpu}, or test it on the GPU that it was built for",
            code="engine-gpu",
        )


# --- the manifest beside an exported plan -----------------------------------------------------------------------------


def _with_manifest(file: PlanFile) -> PlanFile:
    """With what `--trt-export` wrote beside it, once that was found to be of this file.

    Raises
    ------
    ModelError
        The manifest speaks of another file, another TensorRT or another GPU.
    """
    place = _manifest_of(file.path)
    if place is None:
        return file
    try:
        manifest = read_json(place)
        engine, tensorrt, gpu = manifest["engine"], manifest["tensorrt"], manifest["gpu"]
        claims = {
            "SHA-256": (engine["sha256"], file.sha256),
            "size": (f"{plural(engine['bytes'], 'byte')}", f"{plural(file.bytes, 'byte')}"),
            "builder": (TITLES.get(tensorrt["module"], tensorrt["module"]), TITLES[file.module]),
            "version": (_as_in_a_plan(tensorrt["version"]), dotted(file.version) or _as_in_a_plan(tensorrt["version"])),
        }
        stated = _capability(str(gpu["compute_capability"]))
        is_stripped = (engine.get("made_from") or {}).get("strip_weights") == "true"
    except (OSError, *MISREAD) as error:
        raise ModelError(
            f"{file.label}: the manifest beside it, {place}, is not understood: {error!r}",
            "export it again, or move the plan away from that manifest",
            code="engine-manifest",
        ) from error
    if file.targets is not None and stated is not None and stated not in file.targets:
        claims["compute capability"] = dotted(stated), ", ".join(file.built_for)
    wrong = [f"{name}: {said} there, {found} in the file" for name, (said, found) in claims.items() if said != found]
    if wrong:
        raise ModelError(
            f"{file.label}: is not the engine that the manifest beside it describes ({place}): {'; '.join(wrong)}",
            "export it again: plan and manifest belong together",
            code="engine-manifest",
        )
    if is_stripped:
        raise ModelError(
            f"{file.label}: holds no weights, as its manifest says (strip_weights): by itself it computes nothing",
            "test it as it was built: BuildOptions(strip_weights=True), without engine=",
            code="engine-weights",
        )
    targets = file.targets if file.targets is not None or stated is None else (stated,)
    return replace(file, manifest=manifest, targets=targets, notes=(*file.notes, f"described by {place.name}"))


def _manifest_of(path: Path) -> Path | None:
    """The manifest of an export that names this very file."""
    for folder in (path.parent.parent, path.parent):
        place = folder / "manifest.json"
        try:
            manifest = read_json(place)
            named = manifest["format"] == EXPORT_FORMAT and folder / manifest["engine"]["file"]
            if named and resolved(named) == resolved(path):
                return place
        except (OSError, *MISREAD):
            continue
    return None


def _as_in_a_plan(version: str) -> str:
    """A version as a plan has it: four numbers, the last of which is kept in one byte."""
    numbers = release_of(version)[:4]
    return dotted([*numbers[:3], *(number & 0xFF for number in numbers[3:])])


def _capability(text: str) -> tuple[int, int] | None:
    """`SM86`, `8.6` or `86` as (8, 6)."""
    digits = text.upper().removeprefix("SM").replace(".", "")
    return divmod(int(digits), 10) if digits.isdigit() else None


# --- EPContext --------------------------------------------------------------------------------------------------------

_DOMAIN, _OPERATOR = "com.microsoft", "EPContext"
_OTHER_PROVIDER = (
    "engine= tests one engine that is the whole model; what ONNX Runtime divides is checked from the model itself: "
    "backend='onnxruntime-tensorrt'"
)


def _onnx(path: Path) -> Any:
    """The ONNX model in a file, weights left where they are; None where it is none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, TypeError):
        return None
    return model if model.ir_version and model.graph.node else None


def _of_context(path: Path, label: str, model: Any, cache: Cache) -> PlanFile:
    """The engine in an EPContext node that is the whole model."""
    nodes = [node for node in model.graph.node if node.op_type == _OPERATOR and node.domain == _DOMAIN]
    # A name that is no UTF-8 comes as bytes.
    others = [str(node.op_type) for node in model.graph.node if node not in nodes]
    if not nodes:
        raise ModelError(
            f"{label}: is an ONNX model ({listed(dict.fromkeys(others))}), no engine",
            "name it as the model, and let the engine be built; or name the engine's own file as engine=",
            code="engine-file",
        )
    if len(nodes) > 1 or others:
        what = f"{len(nodes)} EPContext nodes" + (f" beside {listed(dict.fromkeys(others))}" if others else "")
        raise ModelError(f"{label}: the model is split: {what}", _OTHER_PROVIDER, code="engine-file")
    (node,) = nodes
    given = {each.name: each.i if each.type == each.INT else each.s for each in node.attribute}
    texts = {name: value.decode(errors="replace") for name, value in given.items() if isinstance(value, bytes)}
    source = texts.get("source", "")
    if source and "tensorrt" not in source.lower():
        raise ModelError(
            f"{label}: its engine is one of {source}, not of TensorRT", _OTHER_PROVIDER, code="engine-file"
        )
    held = given.get("ep_cache_context", b"")
    inside = bool(given.get("embed_mode", 1))
    plan = None if inside else _beside(path, label, texts.get("ep_cache_context", ""))
    head = held[: _HEADER.size] if plan is None else _head(plan)
    if head[:4] not in _TAGS:
        raise ModelError(
            f"{label}: its EPContext node holds no engine of TensorRT: it {_what(head) if head else 'is empty'}",
            "let ONNX Runtime write the model again",
            code="engine-file",
        )
    file = _held(label, held, cache) if plan is None else _plan(plan, label, head, plan.stat().st_size)
    return _agreeing(file, texts)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER.size)


def _beside(path: Path, label: str, named: str) -> Path:
    """The file that a node names, which has to lie beside the model or below: it is loaded as code.

    ONNX Runtime's rule, with links followed.
    """
    plan, folder = path.parent / named, path.parent.resolve()
    try:
        is_inside = "\0" not in named and not Path(named).is_absolute() and resolved(plan).is_relative_to(folder)
    except OSError:  # no name that a file can have, or a link in a circle
        is_inside = False
    if named in {"", "."} or not is_inside:
        raise ModelError(
            f"{label}: its EPContext node names the engine {named[:200]!r}, which leads out of the model's folder",
            "an engine is code: put it beside the model, or name it as engine= yourself",
            code="engine-file",
        )
    if not os.path.isfile(plan):  # noqa: PTH113 - Path's raises where no file can have the name
        raise ModelError(
            f"{label}: its EPContext node names the engine {named[:200]!r}, which is not there",
            "copy it as well",
            code="engine-file",
        )
    return plan


def _agreeing(file: PlanFile, texts: Mapping[str, str]) -> PlanFile:
    """With what the node says of the engine, once that was found to agree with the engine itself."""
    said = texts.get("ep_sdk_version", "")
    if said and file.version and said not in _written(file.version):
        raise ModelError(
            f"{file.label}: its EPContext node says that TensorRT {said} built the engine, and the engine says "
            f"{file.builder}",
            "let ONNX Runtime write the model again",
            code="engine-file",
        )
    architecture = texts.get("hardware_architecture", "")
    stated = _capability(architecture.removesuffix("+")) if architecture.removesuffix("+").isdigit() else None
    if stated is None or file.targets is not None:
        return file
    if architecture.endswith("+"):
        return replace(file, least_target=stated)
    return replace(file, targets=(stated,))


def _written(version: Sequence[int]) -> set[str]:
    """How ONNX Runtime writes a version: its numbers, or TensorRT's own number for it, in both ways of counting."""
    major, minor, patch, *_ = (*version, 0, 0, 0)
    dots = {dotted(version[:count]) for count in range(2, len(version) + 1)}
    return dots | {str(major * 10000 + minor * 100 + patch), str(major * 1000 + minor * 100 + patch)}
