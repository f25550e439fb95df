"""The option table.

Each option is declared once, in `OPTIONS`; flag, environment variable and ini key follow from its name. The plugin
registers the table.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_trtcheck import backends
from pytest_trtcheck.choices import PRECISIONS, GraphsOf, Option
from pytest_trtcheck.report import REPORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import pytest

    from pytest_trtcheck.errors import ArgumentError
    from pytest_trtcheck.report import Report

OPTIONS: tuple[Option, ...] = (
    Option(
        "trt_gpu",
        "list",
        "the GPU to judge for: T4, A100, 'RTX 4090', Orin, sm75, turing …; several, separated by commas, to build for",
        default=(),
        metavar="GPU",
    ),
    Option(
        "trt_backend",
        "backends",
        "what runs or builds the engines; several, separated by commas, are compared",
        default="auto",
        choices=backends.NAMES,
        metavar="LIST",
    ),
    Option("trt_triton_url", "text", "the Triton server that --trt-backend=triton asks", metavar="URL"),
    Option(
        "trt_precision",
        "names",
        "precisions of the tests collected from .onnx files, separated by commas",
        default=("fp16",),
        choices=PRECISIONS,
        metavar="LIST",
    ),
    Option(
        "trt_inputs",
        "lines",
        "what those tests feed: .npz or .npy files, one sample or batch each; for one of several models: MODEL=GLOB",
        default=(),
        metavar="GLOB",
    ),
    Option(
        "trt_calibration",
        "lines",
        "their calibration data: .npz or .npy files; for one of several models: MODEL=GLOB",
        default=(),
        metavar="GLOB",
    ),
    Option("trt_batch", "counts", "their batch sizes, separated by commas", default=(), metavar="LIST"),
    Option(
        "trt_shapes",
        "lines",
        "their shapes, NAME:1x3x224x224, separated by commas; for one of several models: MODEL=NAME:…",
        default=(),
        metavar="SHAPES",
    ),
    Option("trt_cache_dir", "path", "where engines, lowered models and references are kept", metavar="DIR"),
    Option("trt_cache", "text", "a cache that machines share: s3, gs or https, or a folder", metavar="URL"),
    Option(
        "trt_cache_key",
        "text",
        "a file or variable whose secret signs what the caches hold; what it did not sign is not used",
        metavar="FILE|ENV",
    ),
    Option("trt_cache_unsigned", "flag", "use caches that others can write to, without signatures", default=False),
    Option("trt_cache_show", "flag", "list what the cache holds, by model, and exit", default=False),
    Option("trt_cache_clear", "flag", "empty the cache before the tests run", default=False),
    Option(
        "trt_cache_model",
        "text",
        "the one model that --trt-cache-show and --trt-cache-clear are about: its path, its file's name, or a glob",
        metavar="MODEL",
    ),
    Option("trt_build_only", "flag", "build and cache every engine, compare nothing", default=False),
    Option("trt_rebuild", "count", "build every engine so many times, and judge each", default=1, metavar="N"),
    Option("trt_search", "count", "search the worst input of every check, by so many tries", metavar="N"),
    Option("trt_layers", "flag", "time the layers of every engine that runs", default=False),
    Option("trt_require_gpu", "flag", "fail what a GPU did not measure or run", default=False),
    Option("trt_require_evidence", "path", "fail what did not pass on a GPU in this report", metavar="REPORT"),
    Option(
        "trt_evidence_key",
        "text",
        "a file or variable whose secret signs the JSON report, and verifies that of --trt-require-evidence",
        metavar="FILE|ENV",
    ),
    *(report.option for report in REPORTS if report.option),
    Option(
        "trt_report_graph",
        "text",
        "the checks whose model the reports hold as a graph",
        default="failed",
        choices=get_args(GraphsOf),
        metavar="WHICH",
    ),
    Option(
        "trt_summary",
        "text",
        "which checks the terminal lists; auto: of many those that did not pass",
        default="auto",
        choices=("auto", "all", "failed", "none"),
        metavar="WHICH",
    ),
    Option("trt_bundle", "path", "where to write a bundle of each parity check that fails", metavar="DIR"),
    Option("trt_baseline", "path", "where baselines of errors, scores and latency are kept", metavar="DIR"),
    Option(
        "trt_update_baseline", "flag", "record this run's errors, scores and latencies as the baseline", default=False
    ),
    Option("trt_export", "path", "write the engines and typed ONNX files that the run proved", metavar="DIR"),
    Option(
        "trt_diagnose",
        "seconds",
        "the most seconds to spend on saying why a check failed; 0: none",
        default=60.0,
        metavar="SECONDS",
    ),
    Option("trt_collect", "lines", "globs of .onnx files to collect as tests", default=(), ini_only=True),
    Option(
        "trt_triton_models",
        "lines",
        "what the Triton server calls which models, one a line: 'models/detector.onnx = detector_fp16/2'",
        default=(),
        ini_only=True,
    ),
    Option("trt_gpus", "lines", "GPUs of your own, one a line: 'MyBoard = 8.7'", default=(), ini_only=True),
    Option("trt_cache_size", "size", "the most the cache may hold, such as '20 GiB'", default="20 GiB", ini_only=True),
    Option(
        "trt_memory_limit",
        "size",
        "the most memory that a model may take on ONNX Runtime, such as '12 GiB'; default: half of the machine's",
        ini_only=True,
    ),
    Option(
        "trt_time_limit",
        "seconds",
        "how long ONNX Runtime may take to load or to run a model, beside what large models and inputs get",
        default=30.0,
        ini_only=True,
    ),
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


def declare(parser: pytest.Parser, option: Option) -> None:
    """Let pytest know an option: its flag, and its ini key."""
    shown = f"{option.help} [{', '.join(option.choices)}]" if option.choices else option.help
    if not option.ini_only:
        extra: dict[str, Any] = {"action": "store_true"} if option.kind == "flag" else {"metavar": option.metavar}
        extra |= {"action": "append"} if option.kind == "lines" else {}
        group = parser.getgroup("trtcheck", "TensorRT inference checks")
        group.addoption(option.flag, dest=option.name, default=None, help=shown, **extra)
    kind: Literal["linelist", "string"] = "linelist" if option.kind == "lines" else "string"
    parser.addini(option.name, shown, type=kind, default=None)


def value(config: pytest.Config, option: str | Option) -> Any:
    """The value of an option, or of that of our own with the name, in a run of pytest."""
    if isinstance(option, str):
        option = _BY_NAME[option]
    return resolve(option, config.getoption(option.name, None), config.getini(option.name))


def path(config: pytest.Config, given: str) -> Path:
    """What an option of the kind "path" names: relative ones are below the directory that pytest was called in."""
    from pytest_trtcheck.record.files import expanded

    return config.invocation_params.dir / expanded(given)


def flag(name: str) -> str:
    """The command line's name of the option `name`."""
    return _BY_NAME[name].flag


def reports(config: pytest.Config) -> list[Report]:
    """Our reports, and those of the user's plugins."""
    return [*REPORTS, *itertools.chain.from_iterable(config.hook.pytest_trtcheck_reports())]


def any_given(config: pytest.Config) -> bool:
    """Whether any option is given at all; the defaults need no check."""
    known = dict.fromkeys((*OPTIONS, *(report.option for report in reports(config) if report.option)))
    return any(is_given(config, option) for option in known)


def any_named(config: pytest.Config) -> bool:
    """Whether any option stands on the command line itself."""
    return any(config.getoption(option.name, None) is not None for option in OPTIONS)


def is_given(config: pytest.Config, option: str | Option) -> bool:
    """Whether the user gave an option anywhere."""
    if isinstance(option, str):
        option = _BY_NAME[option]
    named = config.getoption(option.name, None) is not None
    return named or bool(os.environ.get(option.variable) or config.getini(option.name))


def _converted(option: Option, raw: object, where: str) -> Any:
    text = "\n".join(map(str, raw)) if isinstance(raw, (list, tuple)) else str(raw)
    parse = _PARSERS.get(option.kind)
    if parse is not None:
        return parse(text, where)
    if option.kind == "list":
        return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
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
