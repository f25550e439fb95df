"""What pages find in their folder: files of example_project, models out of packages, and what is made here."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from tests import onnx_models
from tests.docs.page import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXAMPLE = ROOT / "example_project"


def _conv(path: Path) -> None:
    onnx_models.save(onnx_models.conv_net(), path)


MAKERS: dict[str, Callable[[Path], object]] = {
    "conv.onnx": _conv,
}
"""By the name that a page asks for: what writes the file, or fills the folder."""


def put(name: str, place: Path) -> None:
    """Lay the file or folder that a page calls so at a place.

    Raises
    ------
    LookupError
        Nothing has that name.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if make := MAKERS.get(name):
        make(place)
        return
    found = EXAMPLE if name == EXAMPLE.name else next(EXAMPLE.rglob(name), None)
    if found is None:
        raise LookupError(f"with: nothing is called {name!r}: neither in example_project, nor in tests/docs/makers.py")
    if found.is_dir():
        shutil.copytree(
            found, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*", "report.json")
        )
    else:
        shutil.copy(found, place)
