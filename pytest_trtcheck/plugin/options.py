"""The option table.

Each option is declared once, in `OPTIONS`; flag, environment variable and ini key follow from its name. The plugin
registers the table.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pytest_trtcheck import backends
from pytest_trtcheck.choices import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from pytest_trtcheck.errors import ArgumentError

Kind = Literal["text", "path", "flag", "names", "lines", "size", "seconds", "backend"]


class Option(NamedTuple):
    """One setting. `name` is the ini key; `--trt-x` is the flag of `trt_x` and `TRTCHECK_X` its variable."""

    name: str
    kind: Kind
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    ini_only: bool = False

    @property
    def flag(self) -> str:
        """The command line's name of it."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's name of it."""
        return "TRTCHECK_" + self.name.removeprefix("trt_").upper()


OPTIONS: tuple[Option, ...] = (
    Option("trt_gpu", "text", "the GPU to judge for: T4, A100, 'RTX 4090', Orin, sm75, turing …", metavar="GPU"),
    Option("trt_backend", "backend", "what runs or builds the engines", default="auto", choices=backends.NAMES),
    Option(
        "trt_precision",
        "names",
        "precisions of the tests collected from .onnx files, separated by commas",
        default=("fp16",),
        choices=PRECISIONS,
        metavar="LIST",
    ),
    Option("trt_cache_dir", "path", "where engines, lowered models and references are kept", metavar="DIR"),
    Option("trt_cache_show", "flag", "list what the cache holds and exit", default=False),
    Option("trt_cache_clear", "flag", "empty the cache before the tests run", default=False),
    Option("trt_build_only", "flag", "build and cache every engine, compare nothing", default=False),
    Option("trt_require_gpu", "flag", "fail what a GPU did not measure or run", default=False),
    Option("trt_report", "path", "write the JSON report", metavar="FILE"),
    Option("trt_html", "path", "write the HTML report", metavar="FILE"),
    Option("trt_bundle", "path", "where to write a bundle of each parity check that fails", metavar="DIR"),
    Option("trt_baseline", "path", "where latency baselines are kept", metavar="DIR"),
    Option("trt_update_baseline", "flag", "record this run's latencies as the baseline", default=False),
    Option("trt_export", "path", "write every engine whose checks all passed", metavar="DIR"),
    Option(
        "trt_diagnose",
        "seconds",
        "the most seconds to spend on saying why a check failed; 0: none",
        default=60.0,
        metavar="SECONDS",
    ),
    Option("trt_collect", "lines", "globs of .onnx files to collect as tests", default=(), ini_only=True),
    Option("trt_gpus", "lines", "GPUs of your own, one a line: 'MyBoard = 8.7'", default=(), ini_only=True),
    Option("trt_cache_size", "size", "the most the cache may hold, such as '20 GiB'", default="20 GiB", ini_only=True),
    Option(
        "trt_inconclusive",
        "text",
        "what an inconclusive latency verdict does to its test",
        default="fail",
        choices=("fail", "skip"),
        ini_only=True,
    ),
    Option(
        "trt_bitwise",
        "flag",
        "fail engines whose outputs differ between runs by a single bit",
        default=False,
        ini_only=True,
    ),
    Option(
        "trt_reference",
        "text",
        "where the FP32 reference is computed",
        default="cpu",
        choices=("cpu", "cuda"),
        ini_only=True,
    ),
)


_BY_NAME = {option.name: option for option in OPTIONS}


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


def value(config: pytest.Config, name: str) -> Any:
    """The value of the option `name` in a run of pytest."""
    return resolve(_BY_NAME[name], config.getoption(name, None), config.getini(name))


def flag(name: str) -> str:
    """The command line's name of the option `name`."""
    return _BY_NAME[name].flag


def any_given(config: pytest.Config) -> bool:
    """Whether any option is given at all; the defaults need no check."""
    return any(
        config.getoption(option.name, None) is not None or os.environ.get(option.variable) or config.getini(option.name)
        for option in OPTIONS
    )


def _converted(option: Option, raw: object, where: str) -> Any:
    text = "\n".join(map(str, raw)) if isinstance(raw, (list, tuple)) else str(raw)
    parse = {"flag": _flag, "seconds": _seconds, "size": parse_size, "backend": _backend}.get(option.kind)
    if parse is not None:
        return parse(text, where)
    if option.kind == "names":
        names = tuple(dict.fromkeys(text.replace(",", " ").split()))
        return tuple(_one_of(name, option.choices, where) for name in names) or option.default
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


def _wrong(message: str, hint: str = "") -> ArgumentError:
    from pytest_trtcheck.errors import ArgumentError

    return ArgumentError(message, hint)


def _one_of(text: str, choices: Sequence[str], where: str) -> str:
    if text in choices:
        return text
    from pytest_trtcheck.errors import suggestion

    raise _wrong(f"{where}: {text!r} is none of {', '.join(choices)}", suggestion(text, choices))


def _backend(text: str, where: str) -> str:
    return backends.find_name(text.strip()) or _one_of(text, backends.names(), where)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, where: str) -> int:
    """Bytes of "500 MiB", "20GiB", "1.5 G" or "4096"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise _wrong(f"{where}: expected a size such as '20 GiB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])
