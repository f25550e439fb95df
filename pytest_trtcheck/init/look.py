"""What a project holds: models, their inputs, calibration data, and how its tests are laid out."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import CheckError, first_line
from pytest_trtcheck.model import free_dims, input_files
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import carried
from pytest_trtcheck.precision.quantization import calibration_data
from pytest_trtcheck.precision.reference import Reference, first_that_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import Shape

OURS = "Written by `python -m pytest_trtcheck init`"
MOST_MODELS = 20
TOO_LARGE = 50 << 20
"""Bytes: what code hosts warn of; from twice as many on they refuse a file."""
_LFS = b"version https://git-lfs"
_FILES = {".onnx": None, ".pt2": "torch", ".keras": "tensorflow"}
_PASSED_OVER = {"node_modules", "site-packages", "__pycache__", "build", "dist", "venv", "env", "trtcheck_inputs"}


@dataclass(frozen=True)
class Project:
    """How a project is laid out; paths are relative to its folder."""

    ci: str
    tests: Path
    has_pytest_ini: bool
    requirements: tuple[str, ...]
    is_package: bool
    others: frozenset[str]
    """The CI files that exist and are not of ours."""


@dataclass(frozen=True)
class Found:
    """One model; `shapes` answers its free dimensions, `batch` where the first ones alone are free.

    Parameters
    ----------
    precision
        What it carries, and is checked in; None: it is FP32.
    were_tried
        Whether the model runs with the shapes.
    calibration
        A glob of data that fits its inputs, with its files; None: none was found.
    feeds
        Whether one of those files can be fed as it is.
    absent
        Why the machine that runs CI will not find it in the repository; empty where it will.
    unknown
        Why nothing is known of its inputs; empty where they are known.
    """

    path: Path
    needs: str | None = None
    inputs: str = ""
    names: tuple[str, ...] = ()
    precision: str | None = None
    batch: int | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    were_tried: bool = True
    calibration: str | None = None
    feeds: bool = False
    absent: str = ""
    unknown: str = ""


# --- the project -----------------------------------------------------------------------------------------------------


def project(folder: Path, ci: str | None) -> Project:
    """The layout of the project in `folder`."""
    ini, testpaths = _pytest_config(folder)
    tests = next((Path(each) for each in (*testpaths, "tests", "test") if (folder / each).is_dir()), Path("tests"))
    has = {each for each in (".gitlab-ci.yml", "Jenkinsfile") if (folder / each).exists()}
    others = {each for each in has if OURS not in (folder / each).read_text(encoding="utf-8", errors="replace")}
    found = "gitlab" if ".gitlab-ci.yml" in has else "jenkins" if "Jenkinsfile" in has else "github"
    return Project(
        ci=ci or (found if not (folder / ".github").is_dir() else "github"),
        tests=tests,
        has_pytest_ini=ini,
        requirements=tuple(each for each in ("requirements.txt",) if (folder / each).is_file()),
        is_package=(folder / "setup.py").is_file() or "project" in _toml(folder / "pyproject.toml"),
        others=frozenset(others),
    )


def _pytest_config(folder: Path) -> tuple[bool, list[str]]:
    """Whether a file settles where pytest's root is, and where that says that tests are."""
    found = _toml(folder / "pyproject.toml").get("tool", {}).get("pytest", {}).get("ini_options", {})
    given = found.get("testpaths", [])
    testpaths = given.split() if isinstance(given, str) else list(given)
    is_settled = (folder / "pyproject.toml").is_file()
    for name, section in (("pytest.ini", "pytest"), ("tox.ini", "pytest"), ("setup.cfg", "tool:pytest")):
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(configparser.Error, UnicodeDecodeError):
            parser.read(folder / name, encoding="utf-8")
        if parser.has_section(section):
            is_settled = True
            testpaths += parser.get(section, "testpaths", fallback="").split()
    return is_settled or (folder / "pytest.ini").exists(), testpaths


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pytest needs it there
        import tomli as tomllib
    with suppress(OSError, ValueError):
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


# --- its models ------------------------------------------------------------------------------------------------------


def models(folder: Path, cache: Cache) -> tuple[list[Found], list[str]]:
    """The models in a project, and what to say of those that are passed over."""
    paths, said = list(_paths(folder)), []
    pointers = [path for path in paths if path.is_file() and _begins(path) == _LFS]
    said += [f"passed over {path.relative_to(folder)}: a pointer of Git LFS (git lfs pull)" for path in pointers]
    paths = [path for path in paths if path not in pointers]
    if len(paths) > MOST_MODELS:
        said.append(f"passed over {len(paths) - MOST_MODELS} more models than {MOST_MODELS}")
    data = list(_data(folder))
    found = []
    for path in paths[:MOST_MODELS]:
        try:
            found.append(_looked_at(path, folder, data, cache))
        except CheckError as error:
            said.append(f"passed over {first_line(error.message)}")
    return found, said


def _paths(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        if "saved_model.pb" in names:
            folders.clear()
            yield Path(here)
            continue
        folders[:] = sorted(each for each in folders if not _is_passed_over(Path(here, each)))
        yield from (Path(here, name) for name in sorted(names) if Path(name).suffix in _FILES)


def _is_passed_over(folder: Path) -> bool:
    is_environment = (folder / "pyvenv.cfg").exists()
    return folder.name.startswith(".") or folder.name in _PASSED_OVER or is_environment


def _begins(path: Path) -> bytes:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_LFS))
    return b""


def _looked_at(path: Path, folder: Path, data: Sequence[Path], cache: Cache) -> Found:
    needs = "tensorflow" if path.is_dir() else _FILES[path.suffix]
    found = Found(path.relative_to(folder), needs, absent=_absent(path, folder))
    if needs and find_spec(needs) is None:
        return replace(found, unknown=f"{needs} is not installed here")
    model = open_model(str(found.path), (folder,), cache)
    precision = carried(model, cache)
    proposed = list(free_dims.proposals(model.inputs, {}, {}, 1))
    is_open = any(spec.free_dims() for spec in model.inputs)
    only_first = is_open and all(isinstance(dim, int) for spec in model.inputs for dim in spec.shape[1:])
    shapes = first_that_runs(model, proposed, cache) if is_open and not only_first else None
    found = replace(
        found,
        inputs=", ".join(f"{spec.name} ({spec.dtype}, {_shown(spec.shape)})" for spec in model.inputs),
        names=tuple(spec.name for spec in model.inputs),
        precision=precision,
        batch=1 if only_first else None,
        shapes=(shapes or proposed[0]) if is_open and not only_first else {},
        were_tried=shapes is not None or not is_open or only_first,
    )
    return found if precision else _calibrated(found, model, folder, data, cache)


def _shown(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _absent(path: Path, folder: Path) -> str:
    """Why a model will not be in a clone of the repository."""
    files = [path, path.with_name(f"{path.name}.data")] if not path.is_dir() else [*path.rglob("*")]
    size = max((each.stat().st_size for each in files if each.is_file()), default=0)
    with suppress(OSError, subprocess.SubprocessError):
        ignored = subprocess.run(
            ["git", "-C", str(folder), "check-ignore", "-q", str(path.resolve())],
            check=False,
            timeout=20,
            capture_output=True,
        )
        if ignored.returncode == 0:
            return "git ignores it"
        tracked = subprocess.run(
            ["git", "-C", str(folder), "check-attr", "filter", "--", str(path.resolve())],
            check=False,
            timeout=20,
            capture_output=True,
            text=True,
        )
        if tracked.returncode == 0 and tracked.stdout.rstrip().endswith(": lfs"):
            return ""
    return f"{size / (1 << 20):,.0f} MiB is too large to be committed" if size > TOO_LARGE else ""


# --- calibration data ------------------------------------------------------------------------------------------------


def _data(folder: Path) -> Iterator[Path]:
    """Folders whose name says that they hold calibration data, with files that numpy wrote in them."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not _is_passed_over(Path(here, each)))
        is_meant = any("calib" in part.lower() for part in Path(here).relative_to(folder).parts)
        if is_meant and any(Path(name).suffix in {".npz", ".npy"} for name in names):
            yield Path(here)


def _calibrated(found: Found, model: OnnxModel, folder: Path, data: Sequence[Path], cache: Cache) -> Found:
    """The model with the calibration data whose first file fits its inputs."""
    # An array without a name fits whatever is open.
    is_named = any(not isinstance(dim, int) for spec in model.inputs for dim in spec.shape[1:])
    for where in data:
        for suffix in ("*.npz", "*.npy")[: 1 if is_named else 2]:
            files = sorted(where.glob(suffix))
            with suppress(CheckError, StopIteration):
                next(iter(calibration_data.load(str(files[0]), model.inputs)) if files else iter(()))
                glob = (where.relative_to(folder) / suffix).as_posix()
                return replace(found, calibration=glob, feeds=_feeds(model, files[0], cache))
    return found


def _feeds(model: OnnxModel, path: Path, cache: Cache) -> bool:
    """Whether what the file holds can be fed as it is."""
    with suppress(CheckError), closing(Reference(model, cache)) as reference:
        reference(model_inputs.cases_from(input_files.FromFiles([path], path.parent), model, "")[0])
        return True
    return False
