"""A page's blocks, run from top to bottom in a folder of their own."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import secrets
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck import __main__
from pytest_trtcheck.plugin import progress
from tests.conftest import LEFT_OUT
from tests.docs import commands, makers, output
from tests.docs.made import made
from tests.docs.page import ROOT
from tests.docs.rewrite import rewritten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.docs.page import Block, Fault, Page

SHELL = "cat cd cp diff echo export head ls mkdir mv rm sed tail touch"
PROGRAMS = {*SHELL.split(), "pytest", "python", "python -m pytest", "python -m pytest_trtcheck"}
"""What a page may run here; other commands say why they are not run."""

HOME = "/home/you"
"""What pages call the home directory; the page's own folder is /home/you/project."""

LONGEST_S = 240

THE_BLOCK_ABOVE = "the block above"
"""In the place of a command: the Python block."""


@dataclass
class Printed:
    """What a command printed, and its exit status."""

    text: str
    status: int


@dataclass
class Folder:
    """Where a page's blocks run."""

    pytester: pytest.Pytester
    home: Path
    namespace: dict[str, object] = field(default_factory=dict)
    done: dict[str, Printed] = field(default_factory=dict)
    """By command."""
    untried: list[Block] = field(default_factory=list)
    """Files of tests that no command of the page has run: they are run at its end."""
    is_apart: bool = False
    """Whether each run of pytest is a process: PyTorch and TensorFlow cannot be imported twice in one."""
    rewrites: list[tuple[str, str]] | None = None
    """What stands on the page and what should stand there; None where nobody wants to know."""

    @property
    def project(self) -> Path:
        return self.home / "project"


def run(
    page: Page, environment: str, pytester: pytest.Pytester, rewrites: list[tuple[str, str]] | None = None
) -> list[Fault]:
    """Run what is to be run in this environment; what did not hold."""
    with _home() as home:
        folder = Folder(pytester, home, is_apart=environment != "tests", rewrites=rewrites)
        folder.project.mkdir()
        for name, place in page.needs:
            makers.put(name, folder.project / place)
        return _run_in(folder, page, environment)


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    """A folder whose path is as long as `HOME`: text that is wrapped or cut off is so at the same place."""
    while True:
        home = Path("/tmp") / secrets.token_hex(2)
        with contextlib.suppress(FileExistsError):
            home.mkdir()
            break
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _run_in(folder: Folder, page: Page, environment: str) -> list[Fault]:
    with _as_a_user(folder):
        found = [fault for block in page.blocks for fault in _run(block, page, environment, folder)]
        for block in folder.untried:
            printed = _printed(f"pytest -q {block.title}", folder)
            if printed.status:
                found.append(block.fault(f"its tests do not pass:\n{_end_of(printed.text)}"))
        return found


def check(page: Page, environment: str, pytester: pytest.Pytester) -> None:
    """Run a page, and fail where it does not hold; with the variable DOCS_WRITE, write what it shows anew."""
    rewrites: list[tuple[str, str]] | None = [] if os.environ.get("DOCS_WRITE") else None
    found = "\n".join(map(str, run(page, environment, pytester, rewrites)))
    for old, new in rewrites or ():
        path = ROOT / page.name
        path.write_text(path.read_text(encoding="utf-8").replace(f"\n{old}\n", f"\n{new}\n", 1), encoding="utf-8")
    if found:
        pytest.fail(found, pytrace=False)


@contextlib.contextmanager
def _as_a_user(folder: Folder) -> Iterator[None]:
    """A terminal of 80 columns in an account of its own, without the variables that this test is run with."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [each for each in os.environ if each.startswith(("PYTEST_", "TRTCHECK_", "XDG_", "GITHUB_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder.home))
        patch.setenv("COLUMNS", "80")
        # Which lines a log is told while something takes long depends on the machine.
        patch.setattr(progress, "LOG_PACE_S", float("inf"))
        patch.setenv("PATH", f"{_programs(folder)}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(folder.project)
        before = set(sys.modules)
        try:
            yield
        finally:
            _forget(folder, set(sys.modules) - before)


def _programs(folder: Folder) -> Path:
    """A folder with what a shell calls `python` and `pytest`: those that run this test."""
    place = folder.pytester.path / "bin"
    place.mkdir()
    without = " ".join([*(f"-pno:{name}" for name in LEFT_OUT), "-ptests.docs.patient"])
    for name, arguments in (("python", ""), ("pytest", f"-P -m pytest {without}")):
        script = place / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        script.chmod(0o755)
    return place


@contextlib.contextmanager
def _here_on_the_path() -> Iterator[None]:
    """As for a script that lies in this folder, and with `python -m`; `pytest` alone does not look here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path.cwd()))
        yield


def _forget(folder: Folder, names: set[str]) -> None:
    """Modules of the page's folder are other ones in the next block, or on the next page."""
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).is_relative_to(folder.home):
            del sys.modules[name]


def _run(block: Block, page: Page, environment: str, folder: Folder) -> Iterator[Fault]:
    if block.reason:
        return
    own = block.remarks.get("environment")
    if block.title is not None and own in {None, environment}:
        place = folder.project / block.title
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(block.text, encoding="utf-8")
        folder.untried = [each for each in folder.untried if each.title != block.title]
        if place.name.startswith("test_") and place.suffix == ".py" and (own or page.environment) == environment:
            folder.untried.append(block)
        return
    if (own or page.environment) != environment:
        return
    if block.language == "console":
        for step in commands.steps(block.text):
            yield from _compared(block, step.command, step.output, step.line, folder)
    elif block.generator:
        yield from _compared(block, block.generator, block.text.splitlines(), 0, folder)
    elif block.language == "python":
        yield from _python(block, folder)


def _compared(block: Block, command: str, expected: list[str], line: int, folder: Folder) -> Iterator[Fault]:
    """Run a command and hold what it printed against the page; an output further down is that of the same run."""
    is_of_block = block.language != "console"
    folder.untried = [each for each in folder.untried if not _tries(command, str(each.title))]
    try:
        if is_of_block and (command in folder.done or command == THE_BLOCK_ABOVE):
            printed = folder.done[command]
        else:
            printed = folder.done[command] = _printed(command, folder)
    except (ValueError, LookupError, OSError, subprocess.TimeoutExpired) as error:
        yield block.fault(f"$ {command}: {error}", line)
        return
    if not [each for each in expected if each.strip() not in output.ANY]:
        if printed.status:
            yield block.fault(f"$ {command}\nended with {printed.status}:\n{_end_of(printed.text)}", line)
        return
    if "part of the output of" in block.remarks:
        expected = ["…", *expected, "…"]
    within = float(block.remarks.get("figures within", "0 %").partition(" %")[0]) / 100
    text = printed.text.replace(str(folder.home.resolve()), HOME).replace(str(folder.home), HOME)
    if found := output.difference([each.replace("~/", f"{HOME}/") for each in expected], text, within):
        if folder.rewrites is not None:
            new = rewritten(expected, text)
            given = slice(1, -1) if "part of the output of" in block.remarks else slice(None)
            folder.rewrites.append(("\n".join(expected[given]), "\n".join(new[given])))
        yield block.fault(f"$ {command}\nprints something else:\n{found}", line)


def _tries(command: str, file: str) -> bool:
    """Whether pytest runs the tests of a file: where it names it, or no file at all."""
    named = [word.partition("::")[0] for word in command.partition(" #")[0].split() if not word.startswith("-")]
    return "pytest" in named and (file in named or not any(each.endswith((".py", ".onnx", ".json")) for each in named))


def _printed(command: str, folder: Folder) -> Printed:  # noqa: PLR0911 - one of each kind
    words = commands.simple(command)
    match None if folder.is_apart and "pytest" in (words or ()) else words:
        case ["pytest", *arguments]:
            return _pytest(arguments, folder)
        case ["python", "-m", "pytest", *arguments]:
            with _here_on_the_path():
                return _pytest(arguments, folder)
        case ["python", "-m", "pytest_trtcheck", *arguments]:
            return _captured(lambda: __main__.main(arguments))
        case ["made", name]:
            return Printed(made(name), 0)
        case ["cd", place]:
            return _captured(lambda: os.chdir(place))
        case ["export", assignment]:
            return _captured(lambda: os.environ.__setitem__(*assignment.split("=", 1)))
    return _of_shell(command)


def _of_shell(command: str) -> Printed:
    if unknown := commands.programs(command) - PROGRAMS:
        raise ValueError(f"the tests run no {', '.join(sorted(unknown))}: say why the block is not run")
    done = subprocess.run(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    return Printed(done.stdout, done.returncode)


def _pytest(arguments: list[str], folder: Folder) -> Printed:
    _forget(folder, set(sys.modules))
    result = folder.pytester.runpytest_inprocess(*(f"-pno:{name}" for name in LEFT_OUT), *arguments)
    return Printed("\n".join([*result.outlines, *result.errlines]), int(result.ret))


def _captured(function: Callable[[], int | None]) -> Printed:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = function() or 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
    return Printed(said.getvalue(), status)


def _python(block: Block, folder: Folder) -> Iterator[Fault]:
    if _has_tests(block.text):
        path = folder.project / f"test_line_{block.line}.py"
        path.write_text(block.text, encoding="utf-8")
        printed = _printed(f"pytest -q {path.name}", folder)
        path.unlink()
        if printed.status:
            yield block.fault(f"its tests do not pass:\n{_end_of(printed.text)}")
        return
    _forget(folder, set(sys.modules))
    # Lines are counted as on the page.
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")

    def execute() -> None:
        exec(code, folder.namespace)

    try:
        with _here_on_the_path():
            folder.done[THE_BLOCK_ABOVE] = _captured(execute)
    except Exception as error:
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == block.page]
        yield block.fault(f"{type(error).__name__}: {error}", (own[-1] or block.line) - block.line if own else 0)


def _has_tests(text: str) -> bool:
    return any(
        getattr(node, "name", "").startswith(prefix)
        for node in ast.parse(text).body
        for kind, prefix in ((ast.FunctionDef, "test_"), (ast.AsyncFunctionDef, "test_"), (ast.ClassDef, "Test"))
        if isinstance(node, kind)
    )


def _end_of(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-60:])
