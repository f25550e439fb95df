"""Folders of files with a manifest: written whole or not at all, and known again with every byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import hash_file
from pytest_trtcheck.errors import MISREAD, ReportError
from pytest_trtcheck.record import held
from pytest_trtcheck.record.files import read_json, room_or

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MANIFEST = "manifest.json"
FORMATS = ("pytest-trtcheck export", "pytest-trtcheck typed model")
"""What a manifest of ours says that it is: of an engine, and of a typed ONNX file."""
_NEEDED = {FORMATS[0]: ("engine", "gpu", "tensorrt", "proved_by"), FORMATS[1]: ("file", "evidence", "judged")}
_WORK = ".trtcheck-export"


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose other files are there, and see that all of it is on the disk."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**manifest, "files": described(folder)}, indent=2, allow_nan=False) + "\n", "ascii")
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an export of ours; None where there is none, or one that was edited beyond understanding."""
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        needed = _NEEDED[manifest["format"]]
        file = manifest["engine"]["file"] if "engine" in needed else manifest["file"]
        files, model = manifest["files"], manifest["model"]
        judged = [each[name] for each in manifest.get("judged", ()) for name in ("nodeid", "evidence")]
        if any(not {"gpu", "tensorrt"} <= each.keys() for each in manifest.get("judged", ())):
            return None
        json.dumps(manifest, allow_nan=False)  # as it is written again
        texts = [*judged, file, model["label"], files[file]["sha256"], *(each["sha256"] for each in files.values())]
        ours = "sha256" in model and all(name in manifest for name in (*needed, "precision"))
    except (OSError, *MISREAD):
        return None
    return manifest if ours and all(isinstance(text, str) for text in texts) else None


def altered(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The files that are not as the manifest says, and what is wrong with each."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted({*found, *manifest["files"]} - {MANIFEST}):
        if name not in found:
            yield name, "is missing"
        elif name not in manifest["files"]:
            yield name, "was not written by --trt-export"
        elif found[name].is_symlink() or hash_file(found[name]) != manifest["files"][name]["sha256"]:
            yield name, "was changed after --trt-export wrote it"


def exports(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifests of all exports below `folder`, by the path of their folders in it."""
    found = {}
    for path in sorted(folder.rglob(MANIFEST)):
        name = path.parent.relative_to(folder).as_posix()
        if not name.startswith(_WORK) and (manifest := read_manifest(path.parent)) is not None:
            found[name] = manifest
    return found


def put_all(folder: Path, stages: Mapping[str, Callable[[Path], None]]) -> None:
    """Fill folders below `folder` out of sight, then put each in its place in one step; in the lock of `alone`.

    Raises
    ------
    ReportError
        One of them is there already, and is not an export of ours as we left it: nothing was written.
    """
    for name in stages:
        _refuse_foreign(folder / name)
    with TemporaryDirectory(dir=folder, prefix=f"{_WORK}-") as work:
        new, old = Path(work, "new"), Path(work, "old")
        for name, stage in sorted(stages.items()):
            (new / name).mkdir(parents=True)
            stage(new / name)
        for name in sorted(stages):
            _put(new / name, folder / name, old / name)


def _put(staged: Path, target: Path, old: Path) -> None:
    """Put a finished folder in its place, in one step; what lay there is kept until then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    is_copied = False
    if target.exists():
        old.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.rename(old)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # In a lower layer (a container's image) overlayfs renames no folder.
            shutil.copytree(target, old)
            is_copied = True
    try:
        if is_copied:
            shutil.rmtree(target)
        staged.rename(target)
    except OSError:
        with suppress(OSError):
            if is_copied:
                shutil.copytree(old, target, dirs_exist_ok=True)
            else:
                old.rename(target)
        raise


def _refuse_foreign(target: Path) -> None:
    """A ReportError unless `target` is free, or an export of ours that nobody has touched."""
    if not os.path.lexists(target):
        return
    manifest = None if target.is_symlink() else read_manifest(target)
    hint = "move it away, or export to another folder"
    if manifest is None:
        raise ReportError(f"{target} exists, and --trt-export did not write it", hint, code="export-folder")
    for name, what in altered(target, manifest):
        if what != "is missing":
            raise ReportError(f"{target / name} {what}", hint, code="export-folder")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One export into a folder at a time; what a killed one had taken out of its place is put back.

    Raises
    ------
    ReportError
        It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held.locked(folder / f"{_WORK}.lock"):
            _finish_what_was_killed(folder)
            yield
    except OSError as error:
        # A copy that failed names what it was to copy first.
        named = error.filename2 or error.filename
        raise ReportError(
            f"cannot export to {folder}: {error.strerror or error}{f' ({named})' if named else ''}",
            room_or(error, "name a folder that can be written to, with room for the engines"),
            code="report-unwritable",
        ) from error


def _finish_what_was_killed(folder: Path) -> None:
    for work in folder.glob(f"{_WORK}-*"):
        for name in exports(work / "old"):
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (work / "old" / name).rename(folder / name)
        shutil.rmtree(work)
