"""The TensorRT that is installed, and what it builds for."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pytest_trtcheck.cache import hash_file
from pytest_trtcheck.errors import ArgumentError, MissingDependencyError

ModuleName = Literal["tensorrt", "tensorrt_rtx"]
EITHER: tuple[ModuleName, ...] = ("tensorrt", "tensorrt_rtx")
"""What `auto` takes, the first of them that is installed."""

EXTRAS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}

TITLES: dict[str, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

OLDEST: dict[str, tuple[int, int]] = {"tensorrt": (10, 1), "tensorrt_rtx": (1, 5)}
"""The first release of each that is taken. What a module has does not tell: 8.5 and 8.6 have tensors by name as 10 has,
and `create_network(0)` makes something else there; 10.0 lacks the size of an engine's memory."""


@dataclass(frozen=True)
class TensorRTModule:
    """An installed TensorRT. `handle` is the imported module; None where another process has it."""

    name: ModuleName
    version: str
    handle: Any = field(repr=False, compare=False)

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, which builds without a GPU and compiles kernels at load time."""
        return self.name == "tensorrt_rtx"

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{TITLES[self.name]} {self.version}".rstrip()

    @property
    def release(self) -> tuple[int, ...]:
        """The leading numbers of the version: (1, 7, 1, 116)."""
        return release_of(self.version)

    def compile_only(self) -> tuple[tuple[int, int], ...]:
        """The compute capabilities that it compiles for with no GPU of that kind in the machine."""
        members = getattr(getattr(self.handle, "ComputeCapability", None), "__members__", {}) if self.is_rtx else {}
        codes = sorted(int(name[2:]) for name in members if name.startswith("SM") and name[2:].isdigit())
        return tuple(divmod(code, 10) for code in codes)


def release_of(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, (10, 14, 1, 48) for "10.14.1.48.post1"."""
    leading = itertools.takewhile(str.isdigit, version.split("."))
    return tuple(int(part) for part in leading)


def too_old(name: str, version: str) -> str | None:
    """Why this release of a module is not taken; None where it is."""
    first = OLDEST[name]
    if release_of(version) >= first:
        return None
    return f"{name} {version} is too old: {TITLES[name]} {first[0]}.{first[1]} or newer is needed"


@dataclass(frozen=True)
class Target:
    """The GPU that an engine is built for.

    Parameters
    ----------
    compute_capability
        (8, 6) for SM86.
    here
        Whether that GPU is in this machine; otherwise the engine is compiled for it and never run here.
    """

    compute_capability: tuple[int, int]
    here: bool

    @property
    def sm(self) -> str:
        """`SM86`, as TensorRT spells it."""
        return "SM{}{}".format(*self.compute_capability)


def available(*names: ModuleName) -> TensorRTModule | None:
    """As `find_module`; None when none of them is installed."""
    try:
        return find_module(*names)
    except MissingDependencyError:
        return None


def find_module(*names: ModuleName) -> TensorRTModule:
    """The first of the named modules that is installed; of either, where none is named.

    Raises
    ------
    MissingDependencyError
        None is installed, can be loaded, and is new enough; the hint names the extra to install.
    """
    names = names or EITHER
    reasons = []
    for name in names:
        try:
            return _load(name)
        except MissingDependencyError as error:
            reasons.append(error.message)
    extras = " or ".join(f'pip install "pytest-trtcheck[{EXTRAS[name]}]"' for name in names)
    raise MissingDependencyError("; ".join(reasons), extras)


def _load(name: ModuleName) -> TensorRTModule:
    try:
        handle = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise MissingDependencyError(f"{name} is not installed") from error
        raise MissingDependencyError(
            f"{name} is installed but cannot be loaded: {error}", code="library-broken"
        ) from error
    # Beside ImportError, loading shared libraries raises OSError, and the package's own checks raise RuntimeError.
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"{name} is installed but cannot be loaded: {error}", code="library-broken"
        ) from error
    if not hasattr(handle, "__version__"):  # An empty folder of that name is a module too.
        raise MissingDependencyError(
            f"{name} is installed but cannot be loaded: it has no version", code="library-broken"
        )
    if reason := too_old(name, handle.__version__):
        raise MissingDependencyError(reason, code="library-broken")
    return TensorRTModule(name, handle.__version__, handle)


def hash_plugin(library: str) -> str:
    """Identity of a plugin library, for the keys of what depends on it.

    Raises
    ------
    ArgumentError
        It cannot be read.
    """
    try:
        return hash_file(Path(library))
    except OSError as error:
        raise ArgumentError(
            f"plugins: {library}: {error.strerror}", "give the path of the plugin library", code="operator-library"
        ) from error
