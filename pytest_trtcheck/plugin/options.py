"""What the options of `option_table` are set to, on the command line, in the environment or in an ini file."""

from __future__ import annotations

import math
import os
import re
from fnmatch import fnmatch
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import backends
from pytest_trtcheck.choices import PREFIX, Option
from pytest_trtcheck.plugin.option_table import BY_NAME, OPTIONS, SEVERAL, added_reports, declare, ini, is_given
from pytest_trtcheck.report import REPORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import pytest

    from pytest_trtcheck.errors import ArgumentError
    from pytest_trtcheck.report import Report

__all__ = ["OF_MODELS", "OPTIONS", "declare", "flag", "is_given", "parse_size", "path", "reports", "resolve", "value"]

OF_MODELS = ("trt_precision", "trt_inputs", "trt_calibration", "trt_batch", "trt_shapes")
"""The options that say of models without test code what a marker and its test say of theirs."""
_MISSPELLED = 0.8
"""How alike (`difflib`) what is misspelled is to what was meant: CACHE_SECRET and CACHE_SIZE, two names, are less."""


def resolve(option: Option, command_line: object, ini: object, environ: Mapping[str, str] = os.environ) -> Any:
    """The value of `option`: command line beats environment beats ini beats default.

    Raises
    ------
    ArgumentError
        The value that wins is not of the option's kind or not among its choices.
    """
    if command_line is not None:
        return _converted(option, command_line, option.flag)
    if variable := environ.get(option.variable):
        return _converted(option, variable, f"environment variable {option.variable}")
    if ini not in (None, "", [], ()):
        return _converted(option, ini, f"ini key {option.name}")
    return _converted(option, option.default, "default") if isinstance(option.default, str) else option.default


def value(config: pytest.Config, option: str | Option) -> Any:
    """The value of an option, or of that of our own with the name, in a run of pytest."""
    if isinstance(option, str):
        option = BY_NAME[option]
    return resolve(option, config.getoption(option.name, None), ini(config, option))


def path(config: pytest.Config, given: str) -> Path:
    """What an option of the kind "path" names: relative ones are below the directory that pytest was called in."""
    from pytest_trtcheck.record.files import expanded

    return config.invocation_params.dir / expanded(given)


def is_collected(file: str, glob: str) -> bool:
    """Whether a glob of `trt_collect` is of a file, which is given from pytest's root with slashes."""
    return fnmatch(file, glob.removeprefix("./"))


def flag(option: str | Option) -> str:
    """The command line's name of an option, or of that of our own with the name."""
    return (BY_NAME[option] if isinstance(option, str) else option).flag


def reports(config: pytest.Config) -> list[Report]:
    """Our reports, and those of the user's plugins."""
    return [*REPORTS, *added_reports(config)]


def unknown_variables(config: pytest.Config, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The environment variables with our prefix that are no option's, and hold no secret that an option names.

    A job may have secrets that another step names, options of a newer version, or of a plugin that is not loaded here.

    Raises
    ------
    ArgumentError
        One is spelled nearly as an option's: who misspells `TRTCHECK_REQUIRE_GPU` believes that a GPU is required.
    """
    from pytest_trtcheck.errors import alike

    known = {option.variable.removeprefix(PREFIX).lower(): option.variable for option in _options(config)}
    secrets = (value(config, "trt_cache_key"), value(config, "trt_evidence_key"))
    # Windows has every name in capitals.
    named = {os.path.normcase(each) for each in (*known.values(), *secrets) if each}
    given = [each for each in environ if each.startswith(PREFIX) and environ[each]]
    unknown = [each for each in given if os.path.normcase(each) not in named]
    for each in unknown:
        if near := alike(each.removeprefix(PREFIX), known, most=1, cutoff=_MISSPELLED):
            raise _wrong(f"environment variable {each}: there is no such option", f"did you mean {near[0]!r}?")
    return unknown


def refuse_misspelled_keys(config: pytest.Config) -> None:
    """See that no ini key is spelled nearly as an option's: pytest warns of it, and what it asks for is not done.

    Raises
    ------
    ArgumentError
        One is.
    """
    from pytest_trtcheck.errors import alike

    # `_inicfg` from pytest 9.1 on. Older ones keep what `-o` gives apart.
    given = [*vars(config).get("_inicfg", vars(config).get("inicfg", ()))]
    given += [each.partition("=")[0].strip() for each in config.getoption("override_ini", None) or ()]
    known = {option.name.removeprefix("trt_"): option.name for option in _options(config)}
    for key in given:
        prefix, _, name = key.lower().replace("-", "_").partition("_")
        is_ours = prefix in {"trt", "trtcheck"} and not _is_declared(config, key)
        if is_ours and (near := alike(name, known, most=1, cutoff=_MISSPELLED)):
            raise _wrong(f"ini key {key}: there is no such option", f"did you mean {near[0]!r}?")


def refuse_repeated_flags(config: pytest.Config) -> None:
    """See that no option that takes several values stands twice on the command line: the last one alone would count.

    One in `addopts` is for the command line to replace.

    Raises
    ------
    ArgumentError
        One does, with other values.
    """
    given = list(map(str, config.invocation_params.args))
    for option in OPTIONS:
        if option.kind not in SEVERAL or option.kind == "lines":
            continue
        values = [each.partition("=")[2] for each in given if each.startswith(f"{option.flag}=")]
        values += [after for each, after in pairwise(given) if each == option.flag]
        if len(set(values)) > 1:
            raise _wrong(
                f"{option.flag}: given {len(values)} times, and one alone would count",
                f"name them in one: {option.flag}={','.join(dict.fromkeys(values))}",
            )


def _is_declared(config: pytest.Config, key: str) -> bool:
    try:
        config.getini(key)
    except ValueError:
        return False
    except TypeError:  # it is, of another type
        pass
    return True


def _options(config: pytest.Config) -> list[Option]:
    """Our options, and those of the user's reports."""
    return [*OPTIONS, *(report.option for report in added_reports(config) if isinstance(report.option, Option))]


def any_named(config: pytest.Config) -> bool:
    """Whether any option stands on the command line itself."""
    return any(config.getoption(option.name, None) is not None for option in OPTIONS)


def _converted(option: Option, raw: object, where: str) -> Any:
    separator = "\n" if option.kind == "lines" else ","
    text = separator.join(map(str, raw)) if isinstance(raw, (list, tuple)) else str(raw)
    parse = _PARSERS.get(option.kind)
    if parse is not None:
        return parse(text, where)
    if not text.replace(",", " ").strip():
        # A job that names its evidence or baselines by a variable which is not set would ask for none, and pass.
        raise _wrong(
            f"{where}: names nothing",
            f"is a variable in it not set? To undo what an ini file says: -o {option.name}=",
        )
    if option.kind == "list":
        return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if option.kind == "names":
        names = tuple(dict.fromkeys(text.replace(",", " ").split()))
        return tuple(_one_of(name, option.choices, where) for name in names)
    if option.kind == "text":
        return _one_of(text.strip(), option.choices, where) if option.choices else text.strip()
    return tuple(text.splitlines()) if option.kind == "lines" else text


def _flag(text: str, where: str) -> bool:
    if text.strip().lower() in {"1", "true", "yes", "on"}:
        return True
    if text.strip().lower() in {"0", "false", "no", "off", ""}:
        return False
    raise _wrong(f"{where}: expected true or false, got {text!r}")


def _seconds(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise _wrong(f"{where}: expected a number of seconds from 0 on, got {text!r}")
    return number


def _count(text: str, where: str) -> int:
    # More digits than nine would be no number of anything, and Python refuses to read thousands of them.
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text.strip(), re.ASCII):
        raise _wrong(f"{where}: expected a whole number from 1 on, got {text[:40]!r}")
    return int(text)


def _counts(text: str, where: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_count(each, where) for each in text.split(",")))


def _wrong(message: str, hint: str = "") -> ArgumentError:
    from pytest_trtcheck.errors import ArgumentError

    return ArgumentError(message, hint, code="option-value")


def _one_of(text: str, choices: Sequence[str], where: str) -> str:
    if text in choices:
        return text
    from pytest_trtcheck.errors import suggestion

    raise _wrong(f"{where}: {text!r} is none of {', '.join(choices)}", suggestion(text, choices))


def _backends(text: str, where: str) -> tuple[str, ...]:
    given = text.replace(",", " ").split()
    if not given:
        raise _wrong(f"{where}: names no backend")
    return tuple(dict.fromkeys(backends.find_name(each) or _one_of(each, backends.names(), where) for each in given))


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, where: str) -> int:
    """Bytes of "500 MiB", "20GiB", "1.5 G" or "4096"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = float(match[1]) * _UNITS[match[2].upper()] if match else math.inf
    if not math.isfinite(size):
        raise _wrong(f"{where}: expected a size such as '20 GiB', got {text[:40]!r}")
    return int(size)


_PARSERS: Mapping[str, Callable[[str, str], object]] = {
    "flag": _flag,
    "seconds": _seconds,
    "count": _count,
    "counts": _counts,
    "size": parse_size,
    "backends": _backends,
}
