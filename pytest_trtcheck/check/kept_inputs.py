"""Inputs that a search found, kept beside the test: each later check is judged by them too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import InputError, first_line, plural
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import npz
from pytest_trtcheck.record.files import file_name
from pytest_trtcheck.record.held import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.check.request import Request
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import ShapeRange

_ABOUT = "pytest_trtcheck.json"
_FORMAT = 1
_MOST = 16
"""Inputs that a file holds: of more, the oldest are dropped."""


def file_of(request: Request, model: OnnxModel) -> Path | None:
    """Where a check's inputs are kept: by its test, model and precision."""
    if request.search_folder is None:
        return None
    test = re.split(r"[\\/](?=[^\\/]*::)", request.nodeid)[-1]
    return request.search_folder / f"{file_name(f'{test}-{Path(model.label).name}-{request.precision}')}.npz"


def shown(path: Path) -> str:
    """The file as messages have it: folder and name."""
    return f"{path.parent.name}/{path.name}"


def read(path: Path | None, model: OnnxModel) -> list[Case]:
    """What is kept for a check; nothing where the file is not there.

    Raises
    ------
    InputError
        The file can't be read, or what it holds does not fit the model any more.
    """
    if path is None or not path.exists():
        return []
    try:
        text = npz.load_text(path, _ABOUT)
        told = json.loads(text or "{}")
        if not isinstance(told, dict) or told.get("format") != _FORMAT:
            raise ValueError("it is no file of inputs that a search found")
        if not 0 <= told["cases"] <= _MOST:
            raise ValueError(f"it says that it holds {plural(told['cases'], 'input')}")
        found = npz.read_cases(path, told["inputs"], range(told["cases"]))
    except npz.UNREADABLE as error:
        raise InputError(
            f"{shown(path)}: the inputs that a search found cannot be read: "
            f"{first_line(error) or type(error).__name__}",
            "fetch the file again, or delete it: the next search looks for them anew",
            code="kept-inputs",
        ) from error
    try:
        return model_inputs.cases_from(found, model, shown(path))
    except InputError as error:
        raise stale(path, error.message) from error


def stale(path: Path, problem: str) -> InputError:
    """The error for kept inputs that no longer fit."""
    return InputError(
        f"{problem}\n  an earlier search found these inputs and kept them; the model, or what the check declares, was "
        "changed since, or another check of this test found them",
        f"delete {shown(path)}: the next search looks for such inputs anew; where the test makes several checks of "
        "it, parametrize the test: each has a file of its own then",
        code="kept-inputs",
    )


def check_shapes(path: Path, profile: Mapping[str, ShapeRange], cases: Sequence[Case]) -> None:
    """See that kept inputs lie in the shapes of the check's own: they must not make another engine of it.

    Raises
    ------
    InputError
        One does not.
    """
    for number, case in enumerate(cases):
        try:
            model_inputs.check_declared(profile, case, f"{shown(path)}[{number}]")
        except InputError as error:
            raise stale(path, error.message) from error


def write(path: Path, cases: Sequence[Case], model: OnnxModel) -> None:
    """Keep the inputs, each once; an OSError where that fails."""
    different = list({model_inputs.digest(case): case for case in cases}.values())[-_MOST:]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, npz.ArrayWriter(temporary) as writer:
        for number, case in enumerate(different):
            writer.add(number, case)
        about = {"format": _FORMAT, "model": model.label, "cases": len(different), "inputs": writer.index}
        writer.add_text(_ABOUT, json.dumps(about))
