"""What is held against the code in every block, run or not: syntax, names, arguments, flags."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import json
import re
from typing import TYPE_CHECKING, Any

import tomllib
import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from pytest_trtcheck import metrics, spec
from pytest_trtcheck.check import arguments as markers
from pytest_trtcheck.check.arguments import from_marker
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.plugin import fixtures
from pytest_trtcheck.plugin.options import OPTIONS
from tests.docs import commands
from tests.docs.page import ROOT, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from tests.docs.page import Block, Page

RUN_LANGUAGES = ("python", "console", "text", "toml", "ini", "yaml", "json")
"""Those of which a block without a remark is executed, or checked whole."""

_MARKERS = ("trt_parity", "trt_latency")
_POLYGRAPHY = {"--trt-config-script", "--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes", "--trt-outputs"}
_BY_HAND = ("trt_check", "trt_build")


def faults(page: Page, config: pytest.Config) -> Iterator[Fault]:
    """All that a page names and that does not exist."""
    own = ["--" + name.replace("_", "-") for name in _declared(page)]
    for block in page.blocks:
        for line, what in _of_block(block, config):
            if not any(f"has no option {flag}" in what for flag in own):
                yield block.fault(what, line)
    yield from _vocabulary(page, config)


def _of_block(block: Block, config: pytest.Config) -> Iterator[tuple[int, str]]:
    if block.reason is None and not block.is_file and block.language not in RUN_LANGUAGES:
        yield 0, f"nothing runs a block of {block.language}: give it a title, or say why it is not run"
    if block.language == "text" and not (block.reason or block.generator or block.is_file):
        yield 0, "a text block says whose output it is (output of: …), or why none is run"
    if block.language == "console":
        try:
            found = commands.steps(block.text)
        except ValueError as error:
            yield 0, str(error)
        else:
            yield from ((step.line, what) for step in found for what in commands.problems(step.command, config))
    elif check := _BY_LANGUAGE.get(block.language):
        try:
            yield from check(block, config)
        except SyntaxError as error:
            yield (error.lineno or 1) - 1, f"{error.msg}"
        except (ValueError, configparser.Error, yaml.YAMLError) as error:
            yield 0, f"is no {block.language}: {error}"


def _python(block: Block, _: pytest.Config) -> Iterator[tuple[int, str]]:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1) - 1
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pytest_trtcheck":
            assert node.module is not None
            yield from ((line, f"there is no {each} in {node.module}") for each in _lacking(node))
        elif isinstance(node, ast.Call):
            yield from ((line, what) for what in _wrong_call(node))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                if argument.arg.startswith("trt_") and argument.arg not in {*vars(fixtures), *own}:
                    yield line, f"there is no fixture {argument.arg}"


def _lacking(node: ast.ImportFrom) -> list[str]:
    assert node.module is not None
    try:
        module = importlib.import_module(node.module)
    except ModuleNotFoundError as error:
        # A library of an extra that this environment does not have is another matter.
        return [] if not str(error.name).startswith("pytest_trtcheck") else [str(error.name)]
    return [each.name for each in node.names if each.name != "*" and not hasattr(module, each.name)]


def _wrong_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func).removeprefix("pytest.mark.").removeprefix("pytest_trtcheck.")
    if name in _MARKERS:
        values = {each.arg: _value(each.value) for each in call.keywords if each.arg}
        known = inspect.signature(getattr(markers, name)).parameters
        yield from (f"{name} has no argument {each}" for each in values if each not in known)
        if all(each is not _UNKNOWN for each in values.values()) and set(values) <= set(known):
            try:
                from_marker(name, [], values)
            except CheckError as error:
                yield str(error)
        return
    if name in _BY_HAND:
        known = inspect.signature(markers.trt_parity).parameters
        wrong = {str(each.arg) for each in call.keywords if each.arg} - set(known) - {"inputs", "options"}
        yield from (f"{name} has no argument {each}" for each in sorted(wrong))
    function = _CALLED.get(name)
    if function is None or any(isinstance(each, ast.Starred) for each in call.args):
        return
    given = [_value(each) for each in call.args]
    named = {each.arg: _value(each.value) for each in call.keywords if each.arg}
    try:
        inspect.signature(function).bind(*given, **named)
        if inspect.isclass(function) and _UNKNOWN not in [*given, *named.values()]:
            made = function(*given, **named)
            if isinstance(made, spec.Tolerance):
                from_marker("trt_parity", [], {"tol": made})
    except (TypeError, CheckError) as error:
        yield f"{name}: {error}"


_UNKNOWN = object()


def _value(node: ast.expr) -> Any:
    """What a literal stands for; other expressions are not known."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _UNKNOWN


_CALLED: dict[str, Callable[..., object]] = {
    **{name: getattr(spec, name) for name in ("BuildOptions", "Calibration", "Case", "Search", "Tolerance")},
    **{f"metrics.{name}": each for name, each in vars(metrics).items() if inspect.isfunction(each)},
}


def _toml(block: Block, _: pytest.Config) -> Iterator[tuple[int, str]]:
    found = tomllib.loads(block.text)
    ini = found.get("tool", {}).get("pytest", {})
    yield from _ini_keys(block, {**ini.get("ini_options", {}), **ini})


def _ini(block: Block, _: pytest.Config) -> Iterator[tuple[int, str]]:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read_string(block.text)
    for section in ("pytest", "tool:pytest"):
        if settings.has_section(section):
            yield from _ini_keys(block, dict(settings.items(section)))


def _ini_keys(block: Block, given: dict[str, Any]) -> Iterator[tuple[int, str]]:
    known = {option.name for option in OPTIONS}
    for key in given:
        if key.startswith("trt_") and key not in known:
            yield next(n for n, line in enumerate(block.text.splitlines()) if key in line), f"there is no ini key {key}"


def _yaml(block: Block, config: pytest.Config) -> Iterator[tuple[int, str]]:
    for document in yaml.safe_load_all(block.text):
        for script in _scripts(document):
            for command in script.replace("\\\n", " ").splitlines():
                for what in commands.problems(re.sub(r"\$\{\{.*?\}\}", "X", command), config):
                    first = command.split(" -")[0].strip()
                    yield next((n for n, line in enumerate(block.text.splitlines()) if first in line), 0), what


def _groovy(block: Block, config: pytest.Config) -> Iterator[tuple[int, str]]:
    """A Jenkinsfile: the commands of its `sh` steps."""
    for found in re.finditer(r"\bsh ('{3}|')(.*?)\1", block.text, re.DOTALL):
        # In Groovy's strings a backslash is two.
        for command in found[2].replace("\\\\\n", " ").strip().splitlines():
            yield from ((block.text.count("\n", 0, found.start()), what) for what in commands.problems(command, config))


def _scripts(value: Any, key: str = "") -> Iterator[str]:
    """The commands of a workflow: GitHub's `run`, GitLab's `script`."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _scripts(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _scripts(each, key)
    elif key in {"run", "script", "before_script", "after_script"}:
        yield str(value)


def _json(block: Block, _: pytest.Config) -> Iterator[tuple[int, str]]:
    found = json.loads(block.text)
    if isinstance(found, dict) and "schema_version" in found:
        schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
        yield from (
            (0, f"{each.json_path}: {each.message}") for each in Draft202012Validator(schema).iter_errors(found)
        )


_BY_LANGUAGE = {"groovy": _groovy, "python": _python, "toml": _toml, "ini": _ini, "yaml": _yaml, "json": _json}


def _declared(page: Page) -> set[str]:
    """The options that code on the page itself adds."""
    return set(re.findall(r'Option\("(trt_\w+)"', page.text))


def _vocabulary(page: Page, config: pytest.Config) -> Iterator[Fault]:
    """Flags, variables and sub-commands, wherever on the page they stand."""
    declared = _declared(page)
    flags = {option.flag for option in OPTIONS if not option.ini_only} | {
        "--" + each.replace("_", "-") for each in declared
    }
    variables = {option.variable for option in OPTIONS} | {
        each.upper().replace("TRT_", "TRTCHECK_") for each in declared
    }
    for number, line in enumerate(page.text.splitlines(), 1):
        for flag in re.findall(r"(?<![\w-])--trt-[a-z][a-z-]*[a-z]", line):
            if flag not in flags and not (flag in _POLYGRAPHY and "olygraphy" in page.text):
                yield Fault(f"{page.name}:{number}", f"there is no option {flag}")
        for variable in re.findall(r"\bTRTCHECK_[A-Z_]*[A-Z]\b", line):
            if variable not in variables:
                yield Fault(f"{page.name}:{number}", f"there is no variable {variable}")
        for command in re.findall(r"-m pytest_trtcheck ([a-z]+)", line):
            if any(commands.problems(f"python -m pytest_trtcheck {command} --help", config)):
                yield Fault(f"{page.name}:{number}", f"python -m pytest_trtcheck has no command {command}")
