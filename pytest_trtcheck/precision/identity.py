"""What an artifact depends on beside what it is made from: the libraries, and the code of this package."""

from __future__ import annotations

import functools
from contextlib import suppress

from pytest_trtcheck import __version__
from pytest_trtcheck.cache import hash_code


def code() -> str:
    """Identity of the code that decides what a lowered or emulated model is."""
    return hash_code("model/graph.py", "model/pieces.py", "precision/**/*.py")


@functools.cache
def library_versions() -> dict[str, str]:
    """What lowers and emulates, and its versions."""
    from importlib.metadata import version

    return {"pytest-trtcheck": __version__, "onnx": version("onnx"), "onnx-ir": version("onnx-ir"), "code": code()}


@functools.cache
def frameworks() -> str:
    """The frameworks that a model may come from, and their versions, as far as they are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "tensorflow", "tensorflow-cpu", "keras", "tf-keras"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)
