"""What the backends use of TensorRT, checked by mypy against the stubs of a release.

The backends take TensorRT's objects as `Any`: the module that is installed is known at run time only. Here those get
their types by their names (`TYPES`), in a copy, and mypy does the rest: names, signatures, enums, and what is guarded
by a `hasattr`. That no object is left out is checked too (`untyped`).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

ROOT = Path(__file__).parents[2]
BACKEND = Path("pytest_trtcheck/backends/tensorrt")

TYPES: dict[str, str] = {
    # Parameters and attributes that are annotated `Any`, by name.
    "trt": "TensorRT",
    "handle": "TensorRT",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "log": "ILogger",
    "registry": "IPluginRegistry",
    "tensor": "ITensor",
    "error": "ParserError",
    "severity": "ILogger.Severity",
    "self._runtime": "Runtime",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "self._jit": "IRuntimeCache",
    # What functions that are annotated so return.
    "logger()": "ILogger",
    "_parse()": "INetworkDefinition",
    "_attach_timing_cache()": "ITimingCache",
    "_create_context()": "IExecutionContext",
}
_IMPORTS = ("name", 'request["module"]')
"""How the backends name the module of TensorRT that they import."""
SKIPPED = ("cuda.py", "timing.py", "io.py")
"""Files with no object of TensorRT in them; the first is CUDA's."""


@dataclass(frozen=True)
class Problem:
    """What mypy says at a line of the backends, which reads so."""

    file: str
    line: int
    said: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.said}"


def check(source: Path, stubs: Path, scratch: Path, *, is_rtx: bool, refused: Collection[str] = ()) -> list[Problem]:
    """What the backends in the tree `source` use that the release described by `stubs` has not, or has otherwise.

    What is behind an `if` for one of the build options that are `refused` with this release is never reached.
    """
    tree = _typed_copy(source, stubs, scratch)
    errors = [problem for problem in _mypy(tree, stubs) if problem.said.startswith("error: ")]
    apart = {path.name: _lines_behind(path, refused) for path in _files(tree)}
    if not is_rtx:
        apart = {path.name: apart[path.name] | _lines_of_rtx(path) for path in _files(tree)}
    return [error for error in errors if error.line not in apart[error.file]]


def untyped(source: Path, stubs: Path, scratch: Path) -> list[Problem]:
    """Where something that TensorRT's classes have is used of an object whose type is not known here."""
    tree = _typed_copy(source, stubs, scratch)
    known = members(stubs)
    texts: dict[str, list[str]] = {}
    for path in _files(tree):
        code = ast.unparse(_Revealing(known).visit(ast.parse(path.read_text())))
        path.write_text(code)
        texts[path.name] = code.splitlines()
    found = []
    for problem in _mypy(tree, stubs):
        if problem.said == 'note: Revealed type is "Any"':
            line = re.sub(r"reveal_type\(([^()]*)\)", r"\1", texts[problem.file][problem.line - 1].strip())
            found.append(Problem(problem.file, problem.line, line))
    return found


def spelled(source: Path) -> set[str]:
    """The names in quotes that `hasattr` and `getattr` look for: mypy takes any such name."""
    return {
        call.args[1].value
        for path in _files(source)
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in {"hasattr", "getattr"}
        and isinstance(call.args[1], ast.Constant)
        and isinstance(call.args[1].value, str)
    }


def computed(source: Path) -> set[str]:
    """Where `getattr` looks for a name that is computed: "BuilderFlag" of `getattr(trt.BuilderFlag, name)`."""
    return {
        ast.unparse(call.args[0]).removeprefix("trt.")
        for path in _files(source)
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "getattr"
        and not isinstance(call.args[1], ast.Constant)
    }


def members(stubs: Path) -> set[str]:
    """The names of all classes and functions of a release, and of what they have."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((stubs / "trt_release" / "_api.pyi").read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("__")}


def _files(tree: Path) -> list[Path]:
    return [path for path in sorted((tree / BACKEND).glob("*.py")) if path.name not in SKIPPED]


def _lines_of_rtx(path: Path) -> set[int]:
    """The lines for TensorRT-RTX alone, which checks them: behind `is_rtx`, and functions called there only."""
    tree = ast.parse(path.read_text())
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and re.search(r"(?<!not )\b(\w+\.)*is_rtx\b", ast.unparse(node.test)):
            guarded.update(inner for each in (node.test, *node.body) for inner in ast.walk(each))
    called: dict[str, set[bool]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called.setdefault(ast.unparse(node.func).removeprefix("self."), set()).add(node in guarded)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and called.get(node.name) == {True}:
            guarded.update(ast.walk(node))
    return {
        line
        for node in guarded
        if isinstance(node, ast.stmt)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }


def _lines_behind(path: Path, options: Collection[str]) -> set[int]:
    """The lines of `if options["NAME"] …:` for build options that are refused before."""
    asked = tuple(f"options['{name}']" for name in options)
    return {
        line
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith(asked) and asked
        for each in node.body
        for line in range(each.lineno, (each.end_lineno or 0) + 1)
    }


def flags(source: Path) -> set[str]:
    """The builder flags that the builder sets by a computed name: the keys of its table `flags`."""
    return {
        key.value
        for node in ast.walk(ast.parse((source / BACKEND / "builder.py").read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "flags" and isinstance(node.value, ast.Dict)
        for key in node.value.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


class _Revealing(ast.NodeTransformer):
    """Asks mypy for the type of each object of which one of these names is used."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        if ast.unparse(node).startswith(("_release.", "np.")):
            return node
        self.generic_visit(node)
        if node.attr in self.names:
            node.value = ast.Call(ast.Name("reveal_type"), [node.value], [])
        return node


def _typed_copy(source: Path, stubs: Path, scratch: Path) -> Path:
    """A copy of the package in which TensorRT's objects have their types; line by line as it was."""
    tree = scratch / "tree"
    for path in (source / "pytest_trtcheck").rglob("*.py"):
        target = tree / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    known = members(stubs)
    for path in _files(tree):
        path.write_text(_typed(path.read_text(), known))
    return tree


def _typed(text: str, known: set[str]) -> str:
    lines = text.splitlines()
    # From the end on, so that what was found before stays where it is.
    for where, name in sorted(
        _annotations(ast.parse(text)), key=lambda each: -each[0].lineno * 1000 - each[0].col_offset
    ):
        if TYPES[name].partition(".")[0] not in {*known, "TensorRT"}:
            continue  # It is never made with this release.
        line, start, end = where.lineno - 1, where.col_offset, where.end_col_offset
        lines[line] = f"{lines[line][:start]}_release.{TYPES[name]}{lines[line][end:]}"
    text = "\n".join(lines)
    for call in _IMPORTS:
        text = text.replace(f"importlib.import_module({call})", f"_release.import_module({call})")
    text = re.sub(r"^( +class \w+\()trt\.", r"\1_release.", text, flags=re.MULTILINE)
    # Annotations are not evaluated, so the end of the file will do.
    return f"{text}\nimport trt_release as _release\n"


def _annotations(tree: ast.Module) -> list[tuple[ast.expr, str]]:
    """The annotations `Any` to be replaced, each with its name in `TYPES`."""
    found: list[tuple[ast.expr | None, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found.append((node.annotation, node.arg))
        elif isinstance(node, ast.AnnAssign):
            found.append((node.annotation, ast.unparse(node.target)))
        elif isinstance(node, ast.FunctionDef):
            found.append((node.returns, f"{node.name}()"))
    return [
        (annotation, name)
        for annotation, name in found
        if isinstance(annotation, ast.Name) and annotation.id == "Any" and name in TYPES
    ]


def _mypy(tree: Path, stubs: Path) -> list[Problem]:
    options = [
        "--ignore-missing-imports",
        "--follow-imports=silent",
        "--no-warn-unused-ignores",
        "--hide-error-context",
    ]
    options += ["--config-file", "", "--strict", "--no-error-summary", "--explicit-package-bases", "--no-color-output"]
    # Not what this is about: an attribute that is None after `close`.
    options += ["--no-strict-optional", "--disable-error-code=no-any-return"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", str(stubs.parent / "mypy"), *map(str, _files(tree))],
        cwd=tree,
        env={"MYPYPATH": f"{tree}:{stubs}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    found = []
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"(.*?):(\d+): ((?:error|note): .*)", line)
        if match and Path(match[1]).parts[-4:-1] == BACKEND.parts[-3:]:
            found.append(Problem(Path(match[1]).name, int(match[2]), match[3]))
    return found
