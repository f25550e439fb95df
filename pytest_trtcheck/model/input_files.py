"""Inputs in .npz and .npy files that are named by globs, one item a file."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import InputError, first_line
from pytest_trtcheck.model import npz
from pytest_trtcheck.record.files import expanded

if TYPE_CHECKING:
    from collections.abc import Sequence


class FromFiles(list[Any]):
    """What files hold, an item each. `paths` is what messages call them: as from `folder` on, where they lie in it.

    Raises
    ------
    InputError
        A file can't be read.
    """

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        super().__init__(map(_arrays, paths))
        self.paths = [str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in paths]


def matching(named: str, given: str, folder: Path) -> list[Path]:
    """The files that a glob matches, in the order of their names.

    Parameters
    ----------
    named
        What the glob was given as, for messages: `--inputs`.
    folder
        Where relative globs begin.

    Raises
    ------
    InputError
        None does, or one of them is neither .npz nor .npy.
    """
    wanted = expanded(given)
    try:
        is_folder = (folder / wanted).is_dir()
    except PermissionError as error:
        raise InputError(
            f"{named}={given}: {error.strerror}", "let this account read it", code="input-files"
        ) from error
    if is_folder:
        raise InputError(
            f"{named}={given}: is a folder",
            f"name the files in it: {named}='{Path(given) / '*.npz'}'",
            code="input-files",
        )
    # Path.glob takes no absolute patterns, and a name with brackets is first of all a name.
    names = [str(wanted)] if (folder / wanted).is_file() else glob.glob(str(wanted), root_dir=folder, recursive=True)  # noqa: PTH207
    paths = [path for name in sorted(names) if (path := folder / name).is_file()]
    if not paths:
        raise InputError(f"{named}={given}: no file matches", f"looked in {folder}", code="input-files")
    if other := [path for path in paths if path.suffix not in {".npz", ".npy"}]:
        raise InputError(f"{named}={given}: {other[0]} is neither .npz nor .npy", "narrow the glob", code="input-files")
    return paths


def _arrays(path: Path) -> object:
    try:
        arrays = npz.load(path)
    except npz.UNREADABLE as error:
        raise InputError(
            f"{path}: not a readable .npz or .npy file: {first_line(error) or type(error).__name__}",
            "give files as np.savez(path, **{input name: array}) writes them",
            code="input-files",
        ) from error
    # numpy calls what bears no name so.
    return arrays["arr_0"] if list(arrays) == ["arr_0"] else arrays
