"""The files that a project begins with, as texts: those in `templates/`, and the tests, which name its models."""

from __future__ import annotations

import difflib
import json
import keyword
import re
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import plural, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_trtcheck.init.look import Found, Project

_WIDTH = 88
"""Columns that ruff and black take by default."""
_TEST = Path("test_inference.py")


@dataclass(frozen=True)
class File:
    """One file to write."""

    path: Path
    text: str
    what: str


def files(project: Project, models: Sequence[Found]) -> Iterator[File]:
    """All of them; paths are relative to the project's folder."""
    yield File(project.tests / _TEST, _tests(project, models), plural(len(models), "model"))
    yield File(project.tests / "conftest.py", _template("conftest.py.txt"), "how engines are built, for all checks")
    if not project.has_pytest_ini:
        ini = _template("pytest.ini.txt", tests=project.tests.as_posix())
        yield File(Path("pytest.ini"), ini, "where the tests are, and that paths begin here")
    if project.ci != "none":
        yield _workflow(project, models)


def diff(path: Path, file: File) -> list[str]:
    """What writing the file would change."""
    there = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = str(file.path) if there else "/dev/null", str(file.path)
    return list(difflib.unified_diff(there, file.text.splitlines(), *names, lineterm=""))


def next_steps(project: Project, models: Sequence[Found]) -> list[str]:
    """What to do with what was written."""
    test = (project.tests / _TEST).as_posix()
    steps = [f"run it: python -m pytest {test} (no GPU is needed: without one it is emulated)"]
    extras = sorted(
        {"torch" if each.needs == "torch" else "tensorflow" for each in models if each.needs and each.unknown}
    )
    steps += [f'install what reads them: pip install "pytest-trtcheck[{",".join(extras)}]"'] if extras else []
    if not all(each.feeds for each in models):
        steps.append("feed real inputs: return them from the tests; generated ones say little of accuracy")
    if any(not each.precision and not each.calibration for each in models):
        steps.append("INT8: put some hundred samples into data/calibration, and uncomment its test, or run init again")
    steps += [
        f"{each.path.as_posix()}: {each.absent}; fetch it where CI's file says so" for each in models if each.absent
    ]
    steps.append('latency: @trt_latency(p50_ms={"T4": 7.0}) above a test, measured where a T4 is')
    return ["", "next:", *(f"  {number}. {step}" for number, step in enumerate(steps, 1))]


# --- the tests -------------------------------------------------------------------------------------------------------


def _tests(project: Project, models: Sequence[Found]) -> str:
    depth = len(project.tests.parts)
    feeds = any(each.calibration for each in models)
    text = _template("head.py.txt", imports="from pathlib import Path\n\nimport numpy as np\n" if feeds else "")
    if feeds:
        text += f"\nROOT = Path(__file__).resolve().parents[{depth}]\n"
    names: set[str] = set()
    for each in models:
        name = _name(each.path, names)
        text += f"\n\n{''.join(_comments(each))}{_fp(each, name)}{_int8(each, name)}"
    return text


def _comments(model: Found) -> Iterator[str]:
    lines = [f"{model.path.name}: {model.inputs or model.unknown}"]
    if model.shapes and not model.feeds:
        tried = "that the model runs with" if model.were_tried else "to be set right: the model did not run with them"
        lines.append(f"Open dimensions have sizes {tried}.")
    if not model.feeds:
        lines.append("Inputs are generated until the test returns real ones, as a mapping by name.")
    # A file's names may hold line breaks: what stands behind one would be code.
    yield from (f"# {' '.join(visible(line).splitlines())}\n" for line in lines)


def _fp(model: Found, name: str) -> str:
    return _call(model, {"precision": json.dumps(model.precision or "fp16")}) + f"def test_{name}():{_body(model)}\n"


def _int8(model: Found, name: str) -> str:
    if model.precision or model.unknown:
        return ""
    head = {"precision": '"int8"', "calibration": _quoted(model.calibration or "data/calibration/*.npz")}
    if model.calibration:
        name = f"{name}_int8"
        note = "\n\n# Better still: feed samples that the calibration did not see.\n" if model.feeds else "\n\n"
        return f"{note}{_call(model, head)}def test_{name}():{_body(model)}\n"
    arrays = ", ".join(f"**{{{_quoted(each)}: array}}" for each in model.names)
    todo = _call(model, head) + f"def test_{name}_int8(): ...\n"
    lines = [
        "INT8 chooses its ranges by data: some hundred samples like those of production.",
        f'Save each, np.savez("data/calibration/0001.npz", {arrays}), and uncomment:',
        "",
        *todo.splitlines(),
    ]
    return "\n\n" + "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _body(model: Found) -> str:
    if not model.feeds or model.calibration is None:
        return " ..."
    folder, glob = model.calibration.rsplit("/", 1)
    first = f"min((ROOT / {_quoted(folder)}).glob({json.dumps(glob)}))"
    loaded = f"dict(np.load({first}))" if glob.endswith("npz") else f"np.load({first})"
    if len(f"    return {loaded}") <= _WIDTH:
        return f"\n    return {loaded}"
    return f"\n    first = {first}\n    return {loaded.replace(first, 'first')}"


def _call(model: Found, arguments: dict[str, str]) -> str:
    """The marker, as ruff's formatter writes it."""
    path = _quoted(model.path.as_posix())
    given = [path, *(f"{name}={value}" for name, value in arguments.items())]
    given += [f"batch={model.batch}"] if model.batch and not model.feeds else []
    if model.shapes and not model.feeds:
        shapes = (f"{_quoted(name)}: {shape!r}" for name, shape in model.shapes.items())
        given.append(f"shapes={{{', '.join(shapes)}}}")
    one = f"@trt_parity({', '.join(given)})\n"
    if len(one) <= _WIDTH + 1:
        return one
    second = f"@trt_parity(\n    {', '.join(given)}\n)\n"
    if max(map(len, second.splitlines())) <= _WIDTH:
        return second
    return f"@trt_parity(\n{''.join(f'    {each},{chr(10)}' for each in map(_spread, given))})\n"


def _quoted(text: str) -> str:
    """A text as Python's source has it, in double quotes as ruff writes them."""
    return json.dumps(text, ensure_ascii=False)


def _spread(argument: str) -> str:
    """A mapping over several lines, where it does not fit one."""
    if len(argument) + len("    ,") <= _WIDTH or not argument.startswith("shapes={"):
        return argument
    items = re.findall(r'("(?:[^"\\]|\\.)*": \([^)]*\))', argument)
    return "shapes={\n" + "".join(f"        {each},\n" for each in items) + "    }"


def _name(path: Path, taken: set[str]) -> str:
    """A function's name for a model: its file's, with the folder's where that says nothing, and never twice."""
    parts = path.with_suffix("").parts if path.suffix else path.parts
    name = re.sub(r"\W+", "_", "_".join(parts[-2:] if parts[-1] in {"model", "best", "saved_model"} else parts[-1:]))
    name = name.strip("_").lower() or "model"
    found = next(each for each in (name, *(f"{name}_{number}" for number in range(2, 999))) if each not in taken)
    taken.add(found)
    assert not keyword.iskeyword(f"test_{found}")
    return found


# --- the workflow ----------------------------------------------------------------------------------------------------


def _workflow(project: Project, models: Sequence[Found]) -> File:
    test = (project.tests / _TEST).as_posix()
    extras = ["cpu", "report", *sorted({each.needs for each in models if each.needs})]
    install = [f"'pytest-trtcheck[{','.join(extras)}]'", *(f"-r {each}" for each in project.requirements)]
    install += ["."] * project.is_package
    path, template, indent = {
        "github": (Path(".github/workflows/inference.yml"), "github.yml.txt", 10),
        "gitlab": (Path(".gitlab-ci.yml"), "gitlab.yml.txt", 6),
        "jenkins": (Path("Jenkinsfile"), "Jenkinsfile.txt", 16),
    }[project.ci]
    what = "a workflow" if project.ci == "github" else "a pipeline"
    if path.as_posix() in project.others:
        path = Path("inference.gitlab-ci.yml" if project.ci == "gitlab" else "Jenkinsfile.inference")
        what += (
            f"; include: {{local: {path}}}" if project.ci == "gitlab" else f", for a job with the script path {path}"
        )
    missing = [each for each in models if each.absent]
    text = _template(template, test=test, install=" ".join(install), fetch=_fetch(missing, indent))
    return File(path, text, what)


def _fetch(missing: Iterable[Found], indent: int) -> str:
    """Shell lines that end a job whose models are not there, in words."""
    lines = []
    for each in missing:
        path = each.path.as_posix().replace("'", "'\\''")
        lines.append(f"# {each.path.as_posix()}: {each.absent}. Fetch it here.")
        lines.append(f"test -e '{path}' || {{ echo 'fetch the model first: {path}'; exit 1; }}")
    return "".join(f"{' ' * indent}{line}\n" for line in lines)


def _template(name: str, **values: str) -> str:
    text = (package_files("pytest_trtcheck.init") / "templates" / name).read_text(encoding="utf-8")
    return Template(text).substitute(values)
