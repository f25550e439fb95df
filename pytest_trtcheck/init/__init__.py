"""`python -m pytest_trtcheck init`: a first test of a project's models, its fixtures, and a CI workflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_trtcheck.cache import Cache, user_folder
from pytest_trtcheck.errors import ArgumentError, listed, plural
from pytest_trtcheck.init import look, write
from pytest_trtcheck.record import files

if TYPE_CHECKING:
    from pathlib import Path

NO_MODEL = """\
no model was found in {folder} (.onnx, .pt2, .keras, or a SavedModel folder), and nothing was written. To export one:
  PyTorch        torch.onnx.export(model.eval(), (example,), "models/model.onnx", dynamo=True)
  Keras          model.save("models/model.keras"), or model.export("models/model")
  scikit-learn   skl2onnx.to_onnx(model, X[:1].astype("float32"), options={{"zipmap": False}})
Then run this again. A test can also make the model itself: @trt_parity(make_model), with a function that returns it."""


@dataclass(frozen=True)
class Asked:
    """What `init` is to do.

    Parameters
    ----------
    folder
        The project's.
    ci
        `github`, `gitlab`, `jenkins` or `none`; None: what the project has, else GitHub's.
    force
        Whether files that exist are written over.
    dry_run, diff
        Whether nothing is written; and whether what would be is shown.
    """

    folder: Path
    ci: str | None = None
    force: bool = False
    dry_run: bool = False
    diff: bool = False


def run(asked: Asked) -> tuple[list[str], bool]:
    """Write the files; what to say about it, and whether there was anything to do.

    Raises
    ------
    ArgumentError
        The folder is none.
    ReportError
        A file can't be written.
    """
    if not asked.folder.is_dir():
        raise ArgumentError(f"init: {asked.folder} is no folder", "name the project's", code="option-value")
    project = look.project(asked.folder, asked.ci)
    models, passed_over = look.models(asked.folder, Cache(user_folder()))
    if not models:
        return [NO_MODEL.format(folder=asked.folder.resolve()), *passed_over], False
    writes = not (asked.dry_run or asked.diff)
    said: list[str] = []
    for each in write.files(project, models):
        path = asked.folder / each.path
        there = path.exists() or path.is_symlink()
        if there and path.is_file() and path.read_text(encoding="utf-8", errors="replace") == each.text:
            said.append(f"as it is    {each.path}")
            continue
        if asked.diff:
            said += write.diff(path, each)
            continue
        if there and not asked.force:
            said.append(f"left alone  {each.path}: it exists (--diff shows what --force would change)")
            continue
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, each.text, str(each.path))
        said.append(f"{'wrote     ' if writes else 'would write'} {each.path}: {each.what}")
    if asked.diff:
        return said, True
    found = listed((each.path.as_posix() for each in models), most=5)
    return [f"{plural(len(models), 'model')}: {found}", *passed_over, *said, *write.next_steps(project, models)], True
