"""Whether a search finds what uniform inputs do not: a region of 10⁻⁶ of the space on which a model's precision fails.

    python benchmarks/bench_search.py [--tries N] [--seeds N] [--share N] [--json FILE]

Six models whose inputs have 64 to 256 elements fail in FP16 or INT8 on about one uniform input in a million, and err
more the nearer an input comes to that (but for the last: its inner tensors grow). Each is lowered and emulated as any
check's is. How large the region is, is counted: `--share` uniform inputs (four million) are run, and those beyond the
limit counted. Then, for each seed, the first `--tries` uniform inputs are judged, and a check with `search=` of as many
tries is made. The search has to find the region every time, and none of the uniform inputs may lie in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from reports import keep  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.arguments import trt_parity
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.request import Allowance
from pytest_trtcheck.metrics import DEFAULT_TOLERANCE
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.spec import Precision

CHUNK = 8192


@dataclass(frozen=True)
class Planted:
    """A model with a bad region.

    Parameters
    ----------
    size
        Elements of an input, each uniform in [0, 1).
    about
        What goes wrong there.
    calibration
        Of a quantized model: the samples, which reach as far as ordinary inputs do.
    """

    size: int
    about: str
    proto: onnx.ModelProto
    precision: Precision = "fp16"
    calibration: NDArray[np.float32] | None = None


def unit(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Directions along which a uniform input has mean 0 once 0.5 is taken away, and variance 1."""
    weights = rng.normal(size=shape)
    return np.asarray(weights / np.linalg.norm(weights, axis=0) * np.sqrt(12), np.float32)


def model(size: int, nodes: list[tuple[str, str, str]], outputs: int, **weights: Any) -> onnx.ModelProto:
    """A graph of nodes written as ("MatMul", "x w", "z"), from `x` [N, size] to `y` [N, outputs]."""
    made = [
        helper.make_node(op, names.split(), [result], f"{op}_{index}")
        for index, (op, names, result) in enumerate(nodes)
    ]
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        made,
        "planted",
        [helper.make_tensor_value_info("x", floats, ["N", size])],
        [helper.make_tensor_value_info("y", floats, ["N", outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def overflow() -> Planted:
    """A variance spelled out, E[x²] − E[x]²: it cancels the more the larger the mean is, and then overflows."""
    rng = np.random.default_rng(1)
    features, size = 32, 64
    common = np.repeat(unit(rng, size, 1), features, axis=1)
    nodes = [
        ("Sub", "x half", "centred"),
        ("MatMul", "centred mix", "own"),
        ("MatMul", "centred common", "shift"),
        ("Mul", "shift gain", "grown"),
        ("Exp", "grown", "offset"),
        ("Add", "own offset", "h"),
        ("Mul", "h h", "square"),
        ("ReduceMean", "square last", "mean_of_square"),
        ("ReduceMean", "h last", "mean"),
        ("Mul", "mean mean", "square_of_mean"),
        ("Sub", "mean_of_square square_of_mean", "y"),
    ]
    weights = {
        "half": np.float32(0.5),
        "mix": np.float32(40) * unit(rng, size, features),
        "common": common,
        "gain": np.float32(OVERFLOW_GAIN),
        "last": np.array([1]),
    }
    return Planted(size, overflow.__doc__ or "", model(size, nodes, 1, **weights))


def saturation() -> Planted:
    """INT8 cuts off what lies beyond the largest activation of the calibration: one feature of 16 is an outlier."""
    rng = np.random.default_rng(2)
    size, hidden = 128, 16
    first = unit(rng, size, hidden)
    outlier = first[:, 0].copy()
    first[:, 1:] *= 0.3
    nodes = [
        ("Sub", "x half", "centred"),
        ("MatMul", "centred first", "h"),
        ("Relu", "h", "positive"),
        ("MatMul", "positive second", "weighed"),
        ("Add", "weighed bias", "y"),
    ]
    second = (np.abs(rng.normal(size=(hidden, 4))) * 0.02).astype(np.float32)
    second[0] = SATURATION_WEIGHT
    weights = {"half": np.float32(0.5), "first": first, "second": second, "bias": np.full(4, 2, np.float32)}
    # Ordinary samples, and one that goes as far along the outlier as one in 160 does.
    along = 0.5 + outlier / np.linalg.norm(outlier) * SATURATION_REACH / np.sqrt(12)
    samples = np.concatenate([rng.random((48, size)), along[None]]).astype(np.float32)
    return Planted(size, saturation.__doc__ or "", model(size, nodes, 4, **weights), "int8", samples)


def underflow() -> Planted:
    """An exponential whose result leaves the normal numbers of FP16, and loses a bit with each halving."""
    rng = np.random.default_rng(3)
    size = 96
    nodes = [
        ("Sub", "x half", "centred"),
        ("MatMul", "centred w", "z"),
        ("Mul", "z gain", "scaled"),
        ("Exp", "scaled", "y"),
    ]
    w = np.repeat(unit(rng, size, 1), 4, axis=1) + 0.02 * unit(rng, size, 4)
    return Planted(
        size, underflow.__doc__ or "", model(size, nodes, 4, half=np.float32(0.5), w=w, gain=np.float32(UNDERFLOW_GAIN))
    )


def cancellation() -> Planted:
    """The largest of eight units, each a small number beside a large one that is taken away again."""
    rng = np.random.default_rng(4)
    size, units = 256, 8
    nodes = [
        ("Sub", "x half", "centred"),
        ("MatMul", "centred gates", "g"),
        ("Mul", "g gain", "scaled"),
        ("Exp", "scaled", "large"),
        ("MatMul", "centred values", "v"),
        ("Add", "v large", "sum"),
        ("Sub", "sum large", "y"),
    ]
    weights = {
        "half": np.float32(0.5),
        "gates": unit(rng, size, units),
        "gain": np.float32(CANCELLATION_GAIN),
        "values": unit(rng, size, units),
    }
    return Planted(size, cancellation.__doc__ or "", model(size, nodes, units, **weights))


def norm() -> Planted:
    """A vector divided by the norm of a projection, whose entries are lost in rounding where that norm is small."""
    rng = np.random.default_rng(5)
    size, directions = 64, 5
    nodes = [
        ("MatMul", "x p", "projected"),
        ("Sub", "projected centre", "d"),
        ("Mul", "d d", "squares"),
        ("ReduceSum", "squares last", "total"),
        ("Add", "total tiny", "bounded"),
        ("Sqrt", "bounded", "length"),
        ("MatMul", "x v", "h"),
        ("Div", "h length", "y"),
    ]
    p = unit(rng, size, directions)
    weights = {
        "p": p,
        "centre": p.sum(axis=0) * np.float32(0.5) + np.float32(NORM_OFFSET),
        "last": np.array([1]),
        "tiny": np.float32(1e-4),
        "v": np.abs(unit(rng, size, 4)),
    }
    return Planted(size, norm.__doc__ or "", model(size, nodes, 4, **weights))


def silent() -> Planted:
    """Products that leave FP16 far out, and until then err no more than anywhere: their size alone leads there."""
    rng = np.random.default_rng(6)
    size, units = 64, 16
    nodes = [
        ("Sub", "x half", "centred"),
        ("MatMul", "centred w", "z"),
        ("Mul", "z gain", "large"),
        ("Mul", "large small", "scaled"),
        ("Add", "scaled bias", "y"),
    ]
    weights = {
        "half": np.float32(0.5),
        "w": unit(rng, size, units),
        "gain": np.float32(65504 / SILENT_REACH),
        "small": np.float32(1e-4),
        "bias": np.full(units, 9, np.float32),
    }
    return Planted(size, silent.__doc__ or "", model(size, nodes, units, **weights))


OVERFLOW_GAIN = 1.16
SATURATION_REACH = 2.5
SATURATION_WEIGHT = 0.042
UNDERFLOW_GAIN = 1.2
CANCELLATION_GAIN = 0.73
NORM_OFFSET = 0.4
SILENT_REACH = 5.5
PLANTED: tuple[Callable[[], Planted], ...] = (overflow, saturation, underflow, cancellation, norm, silent)


def errors(planted: Planted, cache: Cache, count: int, seed: int) -> NDArray[np.float64]:
    """max|y − r| / max|r| of so many uniform inputs, each by itself."""
    opened = open_model(planted.proto, (), cache)
    calibration = None if planted.calibration is None else {"x": planted.calibration}
    lowered = lower(opened, planted.precision, cache, calibration=calibration, folders=())
    rng, found = np.random.default_rng([seed, 1]), []
    with (
        closing(emulation(opened, lowered, planted.precision, cache)) as emulated,
        closing(Reference(opened, cache)) as reference,
    ):
        for start in range(0, count, CHUNK):
            case = {"x": rng.random((min(CHUNK, count - start), planted.size), dtype=np.float32)}
            actual, expected = (each["y"].astype(np.float64) for each in (emulated(case), reference.computed(case)))
            with np.errstate(invalid="ignore"):
                error = np.abs(actual - expected).max(axis=1) / np.abs(expected).max(axis=1)
            found.append(np.where(np.isfinite(error), error, np.inf))
    return np.concatenate(found)


def searched(planted: Planted, cache: Cache, tries: int, seed: int) -> dict[str, Any]:
    """A check of the model with a search."""
    calibration = None if planted.calibration is None else {"x": planted.calibration}
    spec = trt_parity(precision=planted.precision, batch=1, search=tries, seed=seed, calibration=calibration)
    request = Request("planted", planted.proto, (), replace(spec, tol=None), calibration=calibration)
    start = time.perf_counter()
    record = Checker(cache, backend="onnxruntime", allowance=Allowance(0)).check(request)
    found = record.search
    if found is None:
        return {"verdict": record.verdict, "message": record.message}
    return {
        "verdict": record.verdict,
        "tries": found.tries,
        "usage": found.usage,
        "own_usage": found.own_usage,
        "changed": found.changed,
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=int, default=4_000_000)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    report: dict[str, Any] = {"tries": asked.tries, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        for make in PLANTED:
            planted = make()
            limit = DEFAULT_TOLERANCE[planted.precision]
            far = int((errors(planted, cache, asked.share, -1 % 2**32) > limit).sum()) if asked.share else None
            uniform = [errors(planted, cache, asked.tries, seed) / limit for seed in range(asked.seeds)]
            report["models"][make.__name__] = {
                "about": planted.about,
                "elements": planted.size,
                "precision": planted.precision,
                "uniform_inputs": asked.share,
                "beyond_the_limit": far,
                "uniform": [{"usage": float(each.max()), "found": int((each > 1).sum())} for each in uniform],
                "search": [searched(planted, cache, asked.tries, seed) for seed in range(asked.seeds)],
            }
            print(make.__name__, report["models"][make.__name__], flush=True)
    every = list(report["models"].values())
    report["found"] = sum(each["verdict"] == "fail" for found in every for each in found["search"])
    report["of"] = len(every) * asked.seeds
    report["limits"] = {"search": "finds it every time", "uniform": "never", "share": "at most 2 inputs in a million"}
    report["within_limits"] = (
        report["found"] == report["of"]
        and not any(each["found"] for found in every for each in found["uniform"])
        and all(found["beyond_the_limit"] <= 2e-6 * asked.share for found in every if asked.share)
    )
    keep(report, asked.json)


if __name__ == "__main__":
    main()
