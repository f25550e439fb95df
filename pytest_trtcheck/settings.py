"""The option table, and marker arguments turned into specs.

Each option is declared once, in `OPTIONS`; flag, environment variable and ini key follow from its name. Nothing here
imports pytest: the plugin registers the table and hands marker arguments in as they were written.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from pytest_trtcheck.choices import BACKENDS, MAX_SECONDS, METRICS, PRECISIONS
from pytest_trtcheck.errors import ArgumentError

if TYPE_CHECKING:
    from pytest_trtcheck.choices import Precision
    from pytest_trtcheck.spec import Budget, LatencySpec, ParitySpec, Shape, ShapeRange, Tolerance

Kind = Literal["text", "path", "flag", "names", "lines", "size"]


# Tuples here, where the house has dataclasses: every pytest run makes these classes, a dataclass takes 0.8 ms.
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
    Option("trt_backend", "text", "what runs or builds the engines", default="auto", choices=BACKENDS),
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
    Option("trt_baseline", "path", "where latency baselines are kept", metavar="DIR"),
    Option("trt_update_baseline", "flag", "record this run's latencies as the baseline", default=False),
    Option("trt_export", "path", "write every engine whose checks all passed", metavar="DIR"),
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


class Source(IntEnum):
    """Where a setting's value came from; the higher wins."""

    DEFAULT = 0
    INI = 1
    ENVIRONMENT = 2
    COMMAND_LINE = 3


class Setting(NamedTuple):
    """The value of one option and where it came from."""

    value: Any
    source: Source


def resolve(option: Option, command_line: object, ini: object, environ: Mapping[str, str] = os.environ) -> Setting:
    """The value of `option`: command line beats environment beats ini beats default.

    Raises
    ------
    ArgumentError
        The value that wins is not of the option's kind or not among its choices.
    """
    candidates: list[tuple[Source, object, str]] = [
        (Source.COMMAND_LINE, command_line, option.flag),
        (Source.ENVIRONMENT, environ.get(option.variable) or None, f"environment variable {option.variable}"),
        (Source.INI, ini if ini not in ("", [], ()) else None, f"ini key {option.name}"),
    ]
    for source, raw, where in candidates:
        if raw is not None:
            return Setting(_converted(option, raw, where), source)
    return Setting(_converted(option, option.default, "default"), Source.DEFAULT)


def _converted(option: Option, raw: object, where: str) -> Any:
    if raw is None or option.kind == "path":
        return raw if raw is None else str(raw)
    if option.kind == "flag":
        return raw if isinstance(raw, bool) else _flag(str(raw), where)
    if option.kind == "size":
        return parse_size(str(raw), where)
    if option.kind == "lines":
        return tuple(raw.splitlines()) if isinstance(raw, str) else tuple(_as_iterable(raw))
    if option.kind == "names":
        given = raw.split(",") if isinstance(raw, str) else list(_as_iterable(raw))
        names = tuple(dict.fromkeys(part for text in given for part in str(text).replace(",", " ").split()))
        for name in names:
            _one_of(name, option.choices, where)
        return names or option.default
    text = str(raw).strip()
    return _one_of(text, option.choices, where) if option.choices else text


def _as_iterable(value: object) -> Iterable[object]:
    return value if isinstance(value, Iterable) else (value,)


def _flag(text: str, where: str) -> bool:
    if text.strip().lower() in {"1", "true", "yes", "on"}:
        return True
    if text.strip().lower() in {"0", "false", "no", "off", ""}:
        return False
    raise ArgumentError(f"{where}: expected true or false, got {text!r}")


def _one_of(text: str, choices: Sequence[str], where: str) -> str:
    if text in choices:
        return text
    raise ArgumentError(f"{where}: {text!r} is none of {', '.join(choices)}", suggestion(text, choices))


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, where: str) -> int:
    """Bytes of "500 MiB", "20GiB", "1.5 G" or "4096"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ArgumentError(f"{where}: expected a size such as '20 GiB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def suggestion(word: str, known: Iterable[str]) -> str:
    """A question naming the known word that is nearest, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


# --- markers ---------------------------------------------------------------------------------------------------------


def trt_parity(
    model: object = None,
    *,
    precision: object = "fp16",
    tol: object = None,
    metric: object = "max",
    calibration: object = None,
    batch: object = None,
    shapes: object = None,
    keep_fp32: object = (),
    seed: object = 0,
    backend: object = None,
) -> ParitySpec:
    """Compare the engine's outputs with the FP32 model's; `precision` and `batch` lists parametrize."""
    from pytest_trtcheck.spec import ParitySpec

    return ParitySpec(
        model=_model(model),
        precision=_precisions(precision),
        tol=_tolerance(tol),
        metric=_choice("metric", metric, METRICS),
        calibration=calibration,
        batch=_batches(batch),
        shapes=_shapes(shapes),
        keep_fp32=_globs("keep_fp32", keep_fp32),
        seed=_integer("seed", seed, least=0),
        backend=None if backend is None else _choice("backend", backend, BACKENDS),
    )


def trt_latency(
    p50_ms: object = None,
    *,
    p90_ms: object = None,
    p95_ms: object = None,
    p99_ms: object = None,
    min_qps: object = None,
    memory_mib: object = None,
    min_speedup: object = None,
    transfers: object = False,
    max_seconds: object = MAX_SECONDS,
) -> LatencySpec:
    """Hold the engine's latency to budgets, each a number or a mapping from GPU to number."""
    from pytest_trtcheck.spec import LatencySpec

    spec = LatencySpec(
        p50_ms=_budget("p50_ms", p50_ms),
        p90_ms=_budget("p90_ms", p90_ms),
        p95_ms=_budget("p95_ms", p95_ms),
        p99_ms=_budget("p99_ms", p99_ms),
        min_qps=_budget("min_qps", min_qps),
        memory_mib=_budget("memory_mib", memory_mib),
        min_speedup=_speedups(min_speedup),
        transfers=_boolean("transfers", transfers),
        max_seconds=_positive("max_seconds", max_seconds),
    )
    if not spec.budgets() and not spec.min_speedup:
        raise ArgumentError("no budget is given", "name one, such as p50_ms=2.0 or p99_ms={'T4': 9.0}")
    return spec


MARKERS: Mapping[str, Callable[..., Any]] = {"trt_parity": trt_parity, "trt_latency": trt_latency}


def marker_help(name: str) -> str:
    """The line that `pytest --markers` prints, made from the signature."""
    parameters = inspect.signature(MARKERS[name]).parameters.values()
    shown = ", ".join(p.name if p.default is None else f"{p.name}={p.default!r}" for p in parameters)
    return f"{name}({shown}): {inspect.getdoc(MARKERS[name])}"


def from_marker(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
    """The spec that the marker `name` asks for.

    Raises
    ------
    ArgumentError
        An argument is unknown or ill-typed; the message names it and says what was expected.
    """
    make = MARKERS[name]
    known = inspect.signature(make).parameters
    for key in kwargs:
        if key not in known:
            hint = suggestion(key, known) or f"it takes {', '.join(known)}"
            raise ArgumentError(f"{name}: unknown argument {key!r}", hint)
    if len(args) > 1:
        raise ArgumentError(
            f"{name}: takes one positional argument ({next(iter(known))}), got {len(args)}", "name the others"
        )
    try:
        return make(*args, **kwargs)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error.message}", error.hint) from None
    except TypeError as error:
        raise ArgumentError(f"{name}: {error}") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _wrong(name: str, value: object, expected: str, hint: str = "") -> ArgumentError:
    return ArgumentError(f"{name}={_shown(value)}: expected {expected}", hint)


def _choice(name: str, value: object, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, str) and value in choices:
        return value
    hint = suggestion(value, choices) if isinstance(value, str) else ""
    raise _wrong(name, value, f"one of {', '.join(choices)}", hint)


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _model(value: object) -> object:
    if value is None or isinstance(value, (str, bytes, os.PathLike)) or hasattr(value, "SerializeToString"):
        return value
    raise _wrong("model", value, "a path, bytes or an onnx.ModelProto", "or give the model by the fixture trt_model")


def _precisions(value: object) -> tuple[Precision, ...]:
    chosen = tuple(_choice("precision", item, PRECISIONS) for item in _listed(value))
    if not chosen or len(set(chosen)) < len(chosen):
        raise _wrong("precision", value, "at least one precision, each named once")
    return chosen


def _batches(value: object) -> tuple[int | None, ...]:
    if value is None:
        return (None,)
    chosen = tuple(_integer("batch", item, least=1) for item in _listed(value))
    if not chosen or len(set(chosen)) < len(chosen):
        raise _wrong("batch", value, "at least one batch size, each named once")
    return chosen


def _integer(name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _wrong(name, value, f"an integer of at least {least}")
    number = int(value.__index__())
    if number < least:
        raise _wrong(name, value, f"an integer of at least {least}")
    return number


def _real(value: object) -> float | None:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _positive(name: str, value: object) -> float:
    number = _real(value)
    if number is None or number <= 0:
        raise _wrong(name, value, "a number above 0")
    return number


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _wrong(name, value, "True or False")


def _tolerance(value: object) -> float | Tolerance | tuple[tuple[str, float | Tolerance], ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not value:
            raise _wrong("tol", value, "at least one output name")
        for key in value:
            if not isinstance(key, str):
                raise _wrong("tol", value, "output names (globs) as keys")
        return tuple((key, _one_tolerance(f"tol[{key!r}]", item)) for key, item in value.items())
    return _one_tolerance("tol", value)


def _one_tolerance(name: str, value: object) -> float | Tolerance:
    from dataclasses import fields

    from pytest_trtcheck.spec import Tolerance

    if isinstance(value, Tolerance):
        for each in fields(value):
            limit = getattr(value, each.name)
            if limit is not None and ((real := _real(limit)) is None or (real < 0 and each.name != "snr_db")):
                raise _wrong(f"{name}: Tolerance.{each.name}", limit, "a number of at least 0")
        if not value.limits() and not value.mismatches:
            raise _wrong(name, value, "at least one limit")
        return value
    number = _real(value)
    if number is None or number < 0:
        raise _wrong(name, value, "a number of at least 0, a Tolerance, or a mapping from output name to one of these")
    return number


def _globs(name: str, value: object) -> tuple[str, ...]:
    items = _listed(value)
    for item in items:
        if not isinstance(item, str) or not item:
            raise _wrong(name, value, "a name or glob, or a list of them")
    return tuple(str(item) for item in items)


def _shape(name: str, value: object) -> Shape:
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, value, "a shape such as (1, 3, 224, 224)")
    return tuple(_integer(name, size, least=0) for size in value)


def _shapes(value: object) -> dict[str, Shape | ShapeRange]:
    from pytest_trtcheck.spec import ShapeRange

    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong("shapes", value, "a mapping from input name to shape, or to (min, opt, max)")
    result: dict[str, Shape | ShapeRange] = {}
    for key, given in value.items():
        name = f"shapes[{key!r}]"
        if isinstance(given, (list, tuple)) and given and all(isinstance(item, (list, tuple)) for item in given):
            if len(given) != len(get_args(Literal["min", "opt", "max"])):
                raise _wrong(name, given, "three shapes (min, opt, max)")
            low, best, high = (_shape(name, item) for item in given)
            ordered = len(low) == len(best) == len(high) and all(
                a <= b <= c for a, b, c in zip(low, best, high, strict=True)
            )
            if not ordered:
                raise _wrong(name, given, "min <= opt <= max in every dimension")
            result[str(key)] = ShapeRange(low, best, high)
        else:
            result[str(key)] = _shape(name, given)
    return result


def _budget(name: str, value: object) -> Budget | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not value:
            raise _wrong(name, value, "at least one GPU")
        return {_gpu_key(name, key): _positive(f"{name}[{key!r}]", item) for key, item in value.items()}
    number = _real(value)
    if number is None or number <= 0:
        raise _wrong(name, value, "a number above 0, or a mapping from GPU to one")
    return number


def _gpu_key(name: str, key: object) -> str:
    if isinstance(key, str) and key.strip():
        return key
    raise _wrong(name, key, "GPU names such as 'T4', 'sm75' or 'default' as keys")


def _speedups(value: object) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise _wrong("min_speedup", value, "a mapping from precision to factor, such as {'fp32': 2.0}")
    return {
        _choice("min_speedup", key, PRECISIONS): _positive(f"min_speedup[{key!r}]", item) for key, item in value.items()
    }
