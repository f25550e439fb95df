"""Marker arguments turned into specs.

Nothing here imports pytest: what the marker was given is handed in as it was written. Apart from `settings`, since only
a suite with marked tests needs it.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from types import ModuleType
from typing import Any, Literal, TypeAlias, cast, get_args

from pytest_trtcheck import backends
from pytest_trtcheck.choices import PRECISIONS, quantized_part
from pytest_trtcheck.errors import ArgumentError, given_as, own_text, suggestion, unforeseen
from pytest_trtcheck.metrics import METRICS, Metric, named
from pytest_trtcheck.model import sources
from pytest_trtcheck.spec import (
    SOURCE,
    Budget,
    LatencySpec,
    ParitySpec,
    PartsArgument,
    Precision,
    Ranges,
    ScoreSpec,
    Search,
    Shape,
    ShapeRange,
    Tolerance,
)


def trt_parity(
    model: object = None,
    *,
    precision: object = None,
    tol: object = None,
    metric: object = "max",
    score: object = None,
    aggregate: object = None,
    max_drop: object = None,
    lower_is_better: object = False,
    reference: object = None,
    engine: object = None,
    calibration: object = None,
    batch: object = None,
    shapes: object = None,
    keep_fp32: object = (),
    exclude: object = (),
    seed: object = 0,
    search: object = None,
    backend: object = None,
    max_subgraphs: object = None,
) -> ParitySpec:
    """Compare the engine's outputs with the FP32 model's; `precision` (fp16) and `batch` lists parametrize."""
    listed_backends = _backends(backend)
    judged_by, precisions = _metric(metric), _precisions("fp16" if precision is None else precision)
    excluded, is_auto = _globs("exclude", exclude), isinstance(keep_fp32, str) and keep_fp32 == "auto"
    if engine is not None:
        _refuse_beside_engine(precision, backend, calibration=calibration, keep_fp32=keep_fp32, exclude=exclude)
    scored = _score(score, aggregate, max_drop, lower_is_better)
    if scored is not None and tol is None:
        of_outputs = {"keep_fp32='auto'": is_auto, f"metric={judged_by.name}": metric != "max"}
        if given := [name for name, is_given in of_outputs.items() if is_given]:
            raise ArgumentError(
                f"{given[0]} beside score= needs tol=: without one the score alone is judged, and no output is held to "
                "anything",
                "give tol=, or leave it out",
                code="argument-missing",
            )
    if is_auto and set(precisions) <= {"fp32", "tf32"}:
        raise _wrong("keep_fp32", keep_fp32, "a precision that nodes can be kept out of")
    if excluded and not any(map(quantized_part, precisions)):
        raise _wrong("exclude", exclude, "a precision that quantizes", "name what is not to be lowered in keep_fp32")
    limits = _tolerance(tol, judged_by)
    if metric != "max":
        _refuse_idle_metric(judged_by, limits)
    return ParitySpec(
        model=_model(model),
        precision=precisions,
        states_precision=precision is not None,
        tol=limits,
        metric=judged_by,
        score=scored,
        reference=_reference(reference),
        engine=_engine(engine),
        calibration=calibration,
        batch=_batches(batch),
        shapes=shapes_of("shapes", shapes),
        keep_fp32=() if is_auto else _globs("keep_fp32", keep_fp32),
        keep_auto=is_auto,
        exclude=excluded,
        seed=_integer("seed", seed, least=0),
        search=_search(search),
        max_subgraphs=None if max_subgraphs is None else _integer("max_subgraphs", max_subgraphs, least=1),
        backend=listed_backends[0] if len(listed_backends) == 1 else None,
        backends=listed_backends,
    )


def trt_latency(
    p50_ms: object = None,
    *,
    p90_ms: object = None,
    p95_ms: object = None,
    p99_ms: object = None,
    min_qps: object = None,
    memory_mib: object = None,
    engine_mib: object = None,
    load_ms: object = None,
    build_s: object = None,
    instances: object = LatencySpec.instances,
    min_speedup: object = None,
    transfers: object = False,
    max_seconds: object = LatencySpec.max_seconds,
    batch: object = None,
    precision: object = None,
) -> LatencySpec:
    """Hold the engine's latency to budgets, each a number or a mapping from GPU to number; of several marks the one
    that is limited to the test's `batch` and `precision` counts.
    """
    return LatencySpec(
        p50_ms=_budget("p50_ms", p50_ms),
        p90_ms=_budget("p90_ms", p90_ms),
        p95_ms=_budget("p95_ms", p95_ms),
        p99_ms=_budget("p99_ms", p99_ms),
        min_qps=_budget("min_qps", min_qps),
        memory_mib=_budget("memory_mib", memory_mib),
        engine_mib=_budget("engine_mib", engine_mib),
        load_ms=_budget("load_ms", load_ms),
        build_s=_budget("build_s", build_s),
        instances=_integer("instances", instances, least=1),
        min_speedup=_speedups(min_speedup),
        transfers=_boolean("transfers", transfers),
        max_seconds=_positive("max_seconds", max_seconds),
        batch=tuple(size for size in _batches(batch) if size is not None),
        precision=() if precision is None else _precisions(precision),
    )


_SPECS: Mapping[str, Callable[..., Any]] = {"trt_parity": trt_parity, "trt_latency": trt_latency}


def marker_help(name: str) -> str:
    """The line that `pytest --markers` prints, made from the signature."""
    parameters = inspect.signature(_SPECS[name]).parameters.values()
    shown = ", ".join(p.name if p.default is None else f"{p.name}={p.default!r}" for p in parameters)
    return f"{name}({shown}): {inspect.getdoc(_SPECS[name])}"


def from_marker(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
    """The spec that the marker `name` asks for.

    Raises
    ------
    ArgumentError
        An argument is unknown or ill-typed; the message names it and says what was expected.
    """
    return _made(name, _SPECS[name], args, kwargs, tuple(inspect.signature(_SPECS[name]).parameters))


def from_call(name: str, model: object, arguments: Mapping[str, object], *, takes: Sequence[str] = ()) -> ParitySpec:
    """The spec that the fixture `name` was called with: it takes what `trt_parity` takes, for one engine.

    Parameters
    ----------
    takes
        The arguments of `trt_parity` that it uses; by default all of them.

    Raises
    ------
    ArgumentError
        As `from_marker`; or several precisions or batches are given.
    """
    known = tuple(takes) or tuple(inspect.signature(trt_parity).parameters)
    spec: ParitySpec = _made(name, trt_parity, (model,), arguments, known)
    several = {"precision": spec.precision, "batch": spec.batch, "backend": spec.backends}
    for argument, listed in several.items():
        if len(listed) > 1:
            raise ArgumentError(
                f"{name}: {argument}={_shown(arguments[argument])}: takes one {argument}",
                "call it once for each, or parametrize the test; a list in the marker trt_parity makes a test of each",
            )
    return spec


def _made(
    name: str, make: Callable[..., Any], args: Sequence[object], kwargs: Mapping[str, object], known: Sequence[str]
) -> Any:
    for key in kwargs:
        if key not in known:
            hint = suggestion(key, known) or f"it takes {', '.join(known)}"
            raise ArgumentError(f"{name}: unknown argument {key!r}", hint, code="argument-unknown")
    if len(args) > 1:
        raise ArgumentError(
            f"{name}: takes one positional argument ({next(iter(known))}), got {len(args)}",
            "name the others",
            code="argument-unknown",
        )
    try:
        given = inspect.signature(make).bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{name}: {error}", code="argument-unknown") from None
    try:
        for key, value in given.arguments.items():
            is_read = key not in _TAKEN_AS_THEY_ARE
            given.arguments[key] = _own_texts(_ended(key, value), _LEVELS) if is_read else own_text(value)
        return make(*given.args, **given.kwargs)
    except ArgumentError as error:
        raise error.within(name) from None
    except Exception as error:  # an object of the user's that can't be compared, counted, or taken for true
        argument = given_as(error, given.arguments)
        raise unforeseen(error, f"{name}: {argument}=" if argument else name) from error


_TAKEN_AS_THEY_ARE = {"model", "reference", "calibration"}
_MOST_KEYS = 10_000
_LEVELS = 2
"""How deep names lie in an argument: min_speedup={"fp32": {"T4": 2.0}}."""


def _own_texts(value: object, levels: int) -> object:
    """The argument with the texts themselves, wherever names lie in it."""
    if levels and type(value) in {list, tuple}:
        items = [_own_texts(each, levels - 1) for each in cast("Sequence[object]", value)]
        return items if type(value) is list else tuple(items)
    if levels and type(value) is dict:
        return {own_text(key): _own_texts(each, levels - 1) for key, each in value.items()}
    return own_text(value)


def _ended(name: str, value: object) -> object:
    """A mapping of a user's own class as a dict, which has an end."""
    if not isinstance(value, Mapping) or type(value) is dict:
        return value
    keys = [*islice(value, _MOST_KEYS + 1)]
    if len(keys) > _MOST_KEYS:
        raise _wrong(name, value, f"a mapping of at most {_MOST_KEYS:,} keys")
    return {key: value[key] for key in keys}


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # an object of the user's that can't say what it is
        text = ""
    if isinstance(value, ModuleType):
        return f"<module {value.__name__}>"
    # What takes many lines to print, a torch.nn.Module or an array, is told by what it is.
    if not text or "\n" in text:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}…"


def _wrong(name: str, value: object, expected: str, hint: str = "") -> ArgumentError:
    if isinstance(value, ModuleType):
        hint = "that is a Python module: give what it holds"
    return ArgumentError(f"{name}={_shown(value)}: expected {expected}", hint)


_OTHER_NAMES = {
    "half": "fp16",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
    "e4m3": "fp8",
}
"""What others call a precision."""


def _choice(name: str, value: object, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, str) and value in choices:
        return value
    hint = suggestion(_OTHER_NAMES.get(value.lower(), value), choices) if isinstance(value, str) else ""
    raise _wrong(name, value, f"one of {', '.join(choices)}", hint)


def _backend(value: object) -> str:
    found = backends.find_name(value) if isinstance(value, str) else None
    return _choice("backend", value, backends.names()) if found is None else found


def _backends(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    chosen = tuple(_backend(item) for item in _listed(value))
    if not chosen or len(set(chosen)) < len(chosen):
        raise _wrong("backend", value, "at least one backend, each named once")
    return chosen


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _model(value: object) -> object:
    if value is None or sources.find(value):
        return value
    hint = "or give the model by the fixture trt_model"
    if isinstance(value, Mapping):
        hint = "weights alone compute nothing: load them into the module, and give that"
    raise _wrong("model", value, sources.titles(), hint)


def _engine(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return os.fsdecode(value)
    expected = "the path of a serialized engine (.plan, .engine) or of an EPContext model (.onnx)"
    hint = "a model is given as model=, and its engine is built" if sources.find(value) else ""
    raise _wrong("engine", value, expected, hint)


def _refuse_beside_engine(precision: object, backend: object, **of_lowering: object) -> None:
    """What decides how an engine is built says nothing of one that exists."""
    if isinstance(precision, (list, tuple)):
        raise _wrong("precision", precision, "one precision beside engine=", "leave it out: it is read from the engine")
    for name, value in of_lowering.items():
        # Not by `!=`: an array gives an array.
        if value is not None and not (isinstance(value, tuple) and not value):
            raise ArgumentError(
                f"{name}= stands beside engine=, of which nothing is built",
                f"leave {name}= out",
                code="argument-conflict",
            )
    found = _backends(backend) or (backends.AUTO,)
    if len(found) > 1 or (found[0] != backends.AUTO and backends.tensorrt_module(found[0]) is None):
        raise _wrong(
            "backend", backend, "tensorrt or tensorrt_rtx beside engine=", "leave it out: the engine's is taken"
        )


def _reference(value: object) -> object:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value).endswith(".npy"):
        raise _wrong("reference", value, "recorded outputs as an .npz", "a single array has neither inputs nor names")
    if value is None or value is SOURCE or sources.find(value):
        return value
    raise _wrong("reference", value, "a model, recorded outputs (.npz), SOURCE, or a callable from inputs to outputs")


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
    try:
        number = int(value.__index__())
    except Exception:  # an array of several, for one
        number = least - 1
    if number < least:
        raise _wrong(name, value, f"an integer of at least {least}")
    return number


def _search(value: object) -> Search | None:
    if value is None:
        return None
    if isinstance(value, Search):
        return Search(
            _integer("search: tries", value.tries, least=1),
            ranges_of("search: ranges", value.ranges),
            _positive("search: seconds", value.seconds),
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _wrong("search", value, "how many inputs to try, or a Search", "Search(tries=2000, ranges=(0, 1))")
    return Search(_integer("search", value, least=1))


def ranges_of(name: str, value: object) -> Ranges:
    """The (low, high) of every floating-point input, or by input name.

    Raises
    ------
    ArgumentError
        It is neither.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): _range(f"{name}[{key!r}]", each) for key, each in value.items()}
    return _range(name, value)


def _range(name: str, value: object) -> tuple[float, float]:
    ends = [_real(each) for each in value] if isinstance(value, (list, tuple)) else []
    if len(ends) != len(("low", "high")) or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
        raise _wrong(name, value, "(low, high), two numbers of which the first is not the larger one")
    return ends[0], ends[1]


def _real(value: object) -> float | None:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        # Truth values and complex numbers of numpy's and torch's become floats, too.
        if str(getattr(value, "dtype", "")).removeprefix("torch.").startswith(("bool", "complex")):
            return None
        number = float(value)
    except Exception:  # too large, several numbers, or a class of the user's
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


def _metric(value: object) -> Metric:
    if isinstance(value, str) or not (isinstance(value, Metric) or callable(value)):
        return METRICS[_choice("metric", value, tuple(METRICS))]
    metric = named(value)
    _axis("metric", metric.axis)
    return metric


def _score(function: object, aggregate: object, max_drop: object, lower_is_better: object) -> ScoreSpec | None:
    """The score that is judged; what belongs to one and stands alone is refused, since nothing would come of it."""
    is_lower = _boolean("lower_is_better", lower_is_better)
    if function is None:
        beside = {"aggregate": aggregate, "max_drop": max_drop, "lower_is_better": is_lower or None}
        for name, value in beside.items():
            if value is not None:
                raise ArgumentError(
                    f"{name}={_shown(value)}: there is no score=",
                    "give it too: (outputs, case) -> array",
                    code="argument-missing",
                )
        return None
    if not callable(function):
        raise _wrong("score", function, "a callable (outputs, case) -> array, one item a sample")
    if aggregate is not None and not callable(aggregate):
        raise _wrong("aggregate", aggregate, "a callable from the items of all samples to a number")
    if max_drop is None:
        raise ArgumentError(
            "score= needs max_drop=: without it nothing is judged",
            "the most, in the score's own unit, that it may fall below the reference's, such as max_drop=0.005",
            code="argument-missing",
        )
    number = _real(max_drop)
    if number is None or number < 0:
        raise _wrong("max_drop", max_drop, "a number of at least 0", "how far it may fall, whichever way is better")
    return ScoreSpec(function, number, aggregate, is_lower)


def _axis(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _wrong(f"{name}: axis", value, "an integer, such as 1 or -1")
    return int(value.__index__())


_Limits: TypeAlias = "float | Tolerance | tuple[tuple[str, float | Tolerance], ...] | None"


def _tolerance(value: object, metric: Metric) -> _Limits:
    if value is None:
        if metric.default is None and metric.name not in METRICS:
            raise ArgumentError(f"metric={metric.name}: needs tol=", metric.no_default, code="argument-missing")
        return None
    if isinstance(value, Mapping):
        if not value:
            raise _wrong("tol", value, "at least one output name")
        for key in value:
            if not isinstance(key, str):
                raise _wrong("tol", value, "output names (globs) as keys")
        return tuple((key, _one_tolerance(f"tol[{key!r}]", item, metric)) for key, item in value.items())
    return _one_tolerance("tol", value, metric)


def _refuse_idle_metric(metric: Metric, tol: _Limits) -> None:
    """A metric is for a number as `tol`, and for the defaults: a `Tolerance` with limits names its own."""
    given = [each for _, each in tol] if isinstance(tol, tuple) else [tol]
    if all(isinstance(each, Tolerance) and _leaves_out(metric, each) for each in given):
        instead = f"{metric.name}=…" if metric.name in METRICS else "metrics={metric: …}"
        raise ArgumentError(
            f"metric={metric.name} limits nothing beside tol={_shown(given[0])}, which names the metrics that count",
            f"limit it there, Tolerance({instead}), or leave metric= out",
            code="argument-conflict",
        )


def _leaves_out(metric: Metric, tolerance: Tolerance) -> bool:
    # Of `metrics.top1(axis=1)` beside a limit on top1 the axis counts.
    is_limited = metric.name in tolerance.limits or any(named(each).name == metric.name for each in tolerance.metrics)
    return bool(tolerance.limits or tolerance.metrics) and not is_limited


def _one_tolerance(name: str, value: object, metric: Metric) -> float | Tolerance:
    if isinstance(value, Tolerance):
        return _combined(name, value)
    number, least = _real(value), max(metric.range[0], 0.0) if metric.name in METRICS else metric.range[0]
    if number is None or number < least:
        expected = f"a number of at least {least:g}" if least > -math.inf else "a number"
        raise _wrong(name, value, f"{expected}, a Tolerance, or a mapping from output name to one of these")
    return number


def _combined(name: str, value: Tolerance) -> Tolerance:
    limits = {f"Tolerance.{key}": (_known(name, key), limit) for key, limit in value.limits.items()}
    if not isinstance(value.metrics, Mapping):
        raise _wrong(f"{name}: Tolerance.metrics", value.metrics, "a mapping from metric to limit")
    for each, limit in value.metrics.items():
        metric = _metric(each)
        limits[f"Tolerance.metrics[{metric.name}]"] = metric, limit
    limits["Tolerance.mismatches"] = METRICS["max"], value.mismatches
    for key, (metric, limit) in limits.items():
        least = metric.range[0]
        if (real := _real(limit)) is None or real < least:
            raise _wrong(f"{name}: {key}", limit, "a number" + f" of at least {least:g}" * (least > -math.inf))
    axis = _axis(f"{name}: Tolerance.top1_axis", value.top1_axis)
    parts = _parts(f"{name}: Tolerance.parts", value.parts)
    if axis is not None and "top1" not in value.limits:
        raise _wrong(f"{name}: Tolerance.top1_axis", axis, "a limit on top1 beside it")
    # What only says how outputs are divided leaves every limit its default.
    if not value.limits and not value.metrics and not value.mismatches and parts == "auto":
        raise _wrong(name, value, "at least one limit")
    return Tolerance(**{**value.arguments(), "top1_axis": axis, "parts": parts})


def _known(name: str, key: str) -> Metric:
    if key in METRICS:
        return METRICS[key]
    raise ArgumentError(
        f"{name}: Tolerance has no limit {key!r}",
        suggestion(key, METRICS) or f"it takes {', '.join(METRICS)}, and others as metrics={{metric: limit}}",
        code="argument-unknown",
    )


def _parts(name: str, value: object) -> PartsArgument:
    if value is None or value == "auto":
        return "auto" if value is not None else None
    expected = "'auto', None, or a mapping from output name to a list of (axis, start, stop)"
    if not isinstance(value, Mapping) or not value:
        raise _wrong(name, value, expected)
    return {_output_name(name, key): _ranges(f"{name}[{key!r}]", item) for key, item in value.items()}


def _output_name(name: str, key: object) -> str:
    if not isinstance(key, str):
        raise _wrong(name, key, "output names as keys")
    return key


def _ranges(name: str, value: object) -> tuple[tuple[int, int, int | None], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _wrong(name, value, "a list of (axis, start, stop), such as [(1, 0, 4), (1, 4, 84)]")
    found = []
    for item in value:
        if not isinstance(item, (list, tuple)) or len(item) != 3:
            raise _wrong(name, item, "(axis, start, stop), such as (1, 0, 4)")
        axis, start, stop = (None if each is None else _axis(name, each) for each in item)
        if axis is None or start is None or start < 0 or (stop is not None and stop <= start):
            raise _wrong(name, item, "an axis, a start of at least 0, and a stop behind it or None")
        found.append((axis, start, stop))
    return tuple(found)


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


def shapes_of(argument: str, value: object) -> dict[str, Shape | ShapeRange]:
    """A shape, or (min, opt, max), by input name.

    Raises
    ------
    ArgumentError
        It is neither.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(argument, value, "a mapping from input name to shape, or to (min, opt, max)")
    result: dict[str, Shape | ShapeRange] = {}
    for key, given in value.items():
        name = f"{argument}[{key!r}]"
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


def _speedups(value: object) -> dict[str, Budget] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise _wrong(
            "min_speedup",
            value,
            "a mapping from precision or backend to factor, such as {'fp32': 2.0}, {'torch': 2.0}, {'fp32': {'T4': 2}}",
        )
    # None is no factor, and `_positive` says so.
    names = {key: f"min_speedup[{key!r}]" for key in value}
    found = {_rival(key): _budget(names[key], item) or _positive(names[key], item) for key, item in value.items()}
    if len(found) < len(value):
        raise _wrong("min_speedup", value, "each precision or backend named once")
    return found


def _rival(key: object) -> str:
    """What is to be slower: the engine of a precision, or another system."""
    found = None if key in PRECISIONS or not isinstance(key, str) else backends.find_name(key)
    if found in {backends.AUTO, backends.EMULATED}:
        raise _wrong("min_speedup", key, "a precision, or a system of its own such as 'torch'")
    return found or str(_choice("min_speedup", key, (*PRECISIONS, *backends.names())))
