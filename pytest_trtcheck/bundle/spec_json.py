"""The spec of a check as plain JSON, and back."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.check.arguments import from_marker
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.metrics import METRICS, Metric, detections, named, top1
from pytest_trtcheck.spec import BuildOptions, ParitySpec, Shape, ShapeRange, Tolerance

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def spec_to_json(spec: ParitySpec) -> dict[str, Any]:
    """What the marker asked for as plain JSON values, `model`, `reference` and `calibration` left out.

    A `Tolerance` is an object of the limits that it gives, a mapping of tolerances a list of [glob, tolerance]: the
    order decides which glob wins.
    """
    return {
        "precision": list(spec.precision) if spec.engine is None or spec.states_precision else None,
        "tol": _tol_to_json(spec.tol),
        "metric": _metric_to_json(spec.metric),
        "batch": None if spec.batch == (None,) else list(spec.batch),
        "shapes": {name: shape_to_json(shape) for name, shape in spec.shapes.items()},
        "keep_fp32": "auto" if spec.keep_auto else list(spec.keep_fp32),
        "exclude": list(spec.exclude),
        "seed": spec.seed,
        "backend": spec.backend,
        "max_subgraphs": spec.max_subgraphs,
    }


def spec_from_json(data: Mapping[str, Any]) -> ParitySpec:
    """The spec that `spec_to_json` wrote, checked as a marker is.

    Raises
    ------
    ArgumentError
        An argument is unknown or ill-typed, or it was judged by a callable.
    """
    arguments = {
        **data,
        "tol": _tol_from_json(data.get("tol")),
        "metric": _metric_from_json(data.get("metric", ParitySpec.metric.name)),
    }
    spec: ParitySpec = from_marker("trt_parity", (), arguments)
    return spec


def _metric_to_json(metric: Metric) -> Any:
    if metric.detections is not None:
        return {"detections": asdict(metric.detections)}
    if metric.name not in METRICS:
        return {"callable": metric.name}
    return metric.name if metric.axis is None else [metric.name, metric.axis]


def _metric_from_json(data: Any) -> Any:
    if isinstance(data, dict) and "detections" in data:
        return detections(**data["detections"])
    if isinstance(data, dict):
        _refuse_callables([data.get("callable")])
    return top1(data[1]) if isinstance(data, list) and data[0] == "top1" else data


def _refuse_callables(names: Iterable[object]) -> None:
    listed = ", ".join(map(str, names))
    raise ArgumentError(
        f"the check was judged by {listed}, which is code: no bundle holds it",
        "its arrays can be read, and compared by that code; to judge it again, run the test itself",
        code="bundle-code",
    )


def _tol_to_json(tol: object) -> Any:
    if isinstance(tol, tuple):
        return [[glob, _tol_to_json(each)] for glob, each in tol]
    if isinstance(tol, Tolerance):
        plain = tol.arguments() | {name: float(limit) for name, limit in tol.limits.items()}
        own = {"metrics": [named(each).name for each in tol.metrics]} if tol.metrics else {}
        # It was always said, so it still is.
        return {"mismatches": float(tol.mismatches), **plain, **own}
    return tol


def _tol_from_json(data: Any) -> Any:
    if isinstance(data, list):
        return {glob: _tol_from_json(each) for glob, each in data}
    if isinstance(data, dict) and (own := data.get("metrics")):
        _refuse_callables(own)
    return Tolerance(**data) if isinstance(data, dict) else data


def shape_to_json(shape: Shape | ShapeRange) -> list[Any]:
    """A shape as a list of sizes, a range as [min, opt, max]."""
    return [list(each) for each in (shape.min, shape.opt, shape.max)] if isinstance(shape, ShapeRange) else list(shape)


def options_from_json(data: Mapping[str, Any]) -> BuildOptions:
    """The build options that `dataclasses.asdict` made plain.

    Raises
    ------
    ArgumentError
        An option is unknown here.
    """
    unknown = [name for name in data if name not in {each.name for each in fields(BuildOptions)}]
    if unknown:
        raise ArgumentError(
            f"unknown build options: {', '.join(unknown)}",
            "use the pytest-trtcheck that wrote them",
            code="report-version",
        )
    if data.get("configure"):
        raise ArgumentError(
            f"the engine was built with configure={data['configure']['name']}, which is code: no bundle holds it",
            "its models and arrays can be read; to check it again, run the test itself",
            code="bundle-code",
        )
    return BuildOptions(
        **{**data, **{name: tuple(data.get(name, ())) for name in ("plugins", "custom_ops", "preview")}}
    )
