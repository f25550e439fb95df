"""Commands of the documentation: split into what a shell would run, and held against what there is to run."""

from __future__ import annotations

import argparse
import configparser
import contextlib
import io
import itertools
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest import mock

import tomllib

from pytest_trtcheck import __main__
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.gpu.names import find_gpu
from pytest_trtcheck.plugin.options import OPTIONS, resolve
from tests.docs.page import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

_OPERATORS = {"&&", "||", "|", ";", "&", "2>&1", "(", ")"}
_REDIRECTIONS = {">", ">>", "<"}
"""What follows is a file."""


@dataclass(frozen=True)
class Step:
    """A command of a `console` block, and what the page says that it prints: none where it says nothing."""

    command: str
    line: int
    """In the block, from 0."""
    output: list[str]


def steps(text: str) -> list[Step]:
    """The commands of a block.

    Raises
    ------
    ValueError
        Output stands before the first command.
    """
    found: list[Step] = []
    for number, line in enumerate(text.splitlines()):
        if line.startswith("$ "):
            found.append(Step(line[2:], number, []))
        elif not found:
            raise ValueError("a console block begins with a command: `$ …`")
        elif found[-1].command.endswith("\\") and not found[-1].output:
            last = found.pop()
            found.append(Step(f"{last.command[:-1]}{line.removeprefix('> ').strip()}", last.line, []))
        else:
            found[-1].output.append(line)
    return [Step(each.command, each.line, _without_blank_ends(each.output)) for each in found]


def simple(command: str) -> list[str] | None:
    """The words of a command that needs no shell."""
    words = shlex.split(command, comments=True)
    is_plain = not set("|&;<>$`*") & set(command.partition(" #")[0]) and "=" not in words[0]
    return words if is_plain else None


def programs(command: str) -> set[str]:
    """What a command calls; of Python's own modules, by `python -m NAME`."""
    return {" ".join(words[: 3 if words[1:2] == ["-m"] else 1]) for words in _parts(command) if words}


def problems(command: str, config: pytest.Config) -> Iterator[str]:
    """What in a command does not exist: a flag, its value, a sub-command, an extra, an environment of tox."""
    try:
        for words in _parts(command):
            yield from _of_one(words, config)
    except ValueError as error:
        yield f"{command}: {error}"


def _parts(command: str) -> list[list[str]]:
    """The words of each program that a command line calls."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    before = ""
    for word in lexer:
        before, last = word, before
        if word in _REDIRECTIONS or last in _REDIRECTIONS:
            continue
        if word in _OPERATORS:
            parts.append([])
        elif parts[-1] or not re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*|sudo", word):
            parts[-1].append(word)
    return parts


def _of_one(words: list[str], config: pytest.Config) -> Iterator[str]:
    for word in words:
        yield from (f"there is no extra {extra!r}" for extra in _extras_of(word) - extras())
    if not words:
        return
    program, *arguments = words
    if re.fullmatch(r"(.*/)?python[\d.]*(\.exe)?|py", program) and arguments[:1] == ["-m"] and len(arguments) > 1:
        program, *arguments = arguments[1:]
    name = program.rpartition("/")[2]
    if name == "pytest":
        yield from _of_pytest(arguments, config)
    elif name == "pytest_trtcheck":
        yield from _of_ours(arguments)
    elif name == "tox":
        yield from _of_tox(arguments)


def _of_pytest(arguments: list[str], config: pytest.Config) -> Iterator[str]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given, unknown = config._parser.parse_known_and_unknown_args(arguments)
    except (SystemExit, Exception) as error:
        yield f"pytest {shlex.join(arguments)}: {said.getvalue().strip() or error}"
        return
    yield from (f"pytest has no option {each}" for each in unknown if each.startswith("-"))
    for option in OPTIONS:
        if (value := getattr(given, option.name, None)) is not None:
            try:
                resolved = resolve(option, value, None, {})
                if option.name == "trt_gpu":
                    for gpu in resolved:
                        find_gpu(gpu)
            except CheckError as error:
                yield f"{option.flag}={value}: {error}"


class _ParsedError(Exception):
    """The arguments are right, and no more is asked."""


def _of_ours(arguments: list[str]) -> Iterator[str]:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, *given: object) -> None:
        parse(parser, *given)  # type: ignore[call-overload]
        raise _ParsedError

    said = io.StringIO()
    try:
        checked = mock.patch.object(argparse.ArgumentParser, "parse_args", only_parse)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), checked:
            __main__.main(arguments)
    except _ParsedError:
        return
    except SystemExit as error:
        if error.code:
            yield f"python -m pytest_trtcheck {shlex.join(arguments)}: {said.getvalue().strip().splitlines()[-1]}"


def _of_tox(arguments: list[str]) -> Iterator[str]:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "tox.ini", encoding="utf-8")
    known = {section.removeprefix("testenv:") for section in settings.sections()} | {"tests"}
    for flag, names in itertools.pairwise(arguments):
        if flag == "-e":
            wrong = [each for each in names.split(",") if each not in known and not re.fullmatch(r"py31[0-4]", each)]
            yield from (f"tox has no environment {each}" for each in wrong)


def _extras_of(word: str) -> set[str]:
    named = re.search(r"pytest-trtcheck\[([\w,-]+)\]", word)
    return set(named[1].split(",")) if named else set()


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["project"]["optional-dependencies"])


def _without_blank_ends(lines: list[str]) -> list[str]:
    text = "\n".join(line.rstrip() for line in lines).strip("\n")
    return text.split("\n") if text else []
