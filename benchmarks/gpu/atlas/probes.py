"""The atlas's probes: every operator that TensorRT takes, alone and in its usual neighbourhoods, on chosen values.

A `Case` is one FP32 model; with one of its precisions it makes one engine. A probe is a case in one precision on inputs
of one value class; many probes share an engine, since kernels take longest to compile. All values come from seeds that
the names decide.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, NDArray[Any]]
Values = Callable[[np.random.Generator, str], Arrays]
Shapes = dict[str, Sequence[int]]
node = helper.make_node

HALF = ("fp16", "bf16")
FLOATS = ("fp16", "bf16", "tf32")
ALL = ("fp16", "bf16", "tf32", "int8", "fp8")
LARGEST = {"fp16": 65504.0, "bf16": 3.38e38, "tf32": 1e30, "int8": 65504.0, "fp8": 448.0}
SMALLEST = {"fp16": 6e-5, "bf16": 1.2e-38, "tf32": 1e-36, "int8": 6e-5, "fp8": 6e-5}
"""The least normal number."""
RUNGS = 9
"""Steps of a ladder: one parameter that carries the error across its limit."""


@dataclass(frozen=True)
class Case:
    """One model, the precisions that it is lowered to, and the inputs for it by value class."""

    name: str
    operator: str
    model: onnx.ModelProto
    precisions: tuple[str, ...]
    values: Mapping[str, Values]

    def inputs(self, value_class: str, precision: str) -> Arrays:
        """The arrays to feed; the same for every precision whose limits do not matter to the class."""
        seed = zlib.crc32(f"{self.name}/{value_class}".encode())
        return self.values[value_class](np.random.default_rng(seed), precision)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int]],
    weights: Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    output_types: Mapping[str, int] | None = None,
    input_types: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model whose output shapes ONNX infers."""
    kinds, sources = output_types or {}, input_types or {}
    named = [_named(each, index) for index, each in enumerate(nodes)]
    graph = helper.make_graph(
        named,
        "probe",
        [helper.make_tensor_value_info(k, sources.get(k, TensorProto.FLOAT), list(v)) for k, v in inputs.items()],
        [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in outputs],
        [numpy_helper.from_array(_weight(array), name) for name, array in (weights or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def _named(each: onnx.NodeProto, index: int) -> onnx.NodeProto:
    each.name = each.name or f"{each.op_type.lower()}{index}"
    return each


def _weight(array: Any) -> NDArray[Any]:
    array = np.asarray(array)
    return np.asarray(array, np.float32) if array.dtype == np.float64 else np.asarray(array)


def normal(shape: Sequence[int], seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Seeded normal weights."""
    return (np.random.default_rng(seed).standard_normal(tuple(shape)) * scale).astype(np.float32)


# --- values ----------------------------------------------------------------------------------------------------------

Make = Callable[[np.random.Generator, Sequence[int], str], NDArray[np.floating[Any]]]


def _special(rng: np.random.Generator, shape: Sequence[int], precision: str) -> NDArray[np.floating[Any]]:
    array = rng.standard_normal(tuple(shape)).reshape(-1)
    largest, smallest = LARGEST[precision], SMALLEST[precision]
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, largest, -largest, smallest, smallest / 8, -smallest / 100, 1.0, -1.0]
    where = rng.choice(array.size, size=min(len(odd), max(array.size // 8, 1)), replace=False)
    array[where] = odd[: len(where)]
    return array.reshape(tuple(shape))


def _infinite(rng: np.random.Generator, shape: Sequence[int], _: str) -> NDArray[np.floating[Any]]:
    array = rng.standard_normal(tuple(shape)).reshape(-1)
    array[rng.integers(array.size)] = np.inf
    return array.reshape(tuple(shape))


def _nan(rng: np.random.Generator, shape: Sequence[int], _: str) -> NDArray[np.floating[Any]]:
    array = rng.standard_normal(tuple(shape)).reshape(-1)
    array[rng.integers(array.size)] = np.nan
    return array.reshape(tuple(shape))


def scaled(factor: float, offset: float = 0.0) -> Make:
    """Normal values of this deviation and mean."""
    return lambda rng, shape, _: rng.standard_normal(tuple(shape)) * factor + offset


CLASSES: dict[str, Make] = {
    "ordinary": scaled(1.0),
    "wide": scaled(30.0),
    "positive": lambda rng, shape, _: rng.uniform(0.5, 1.5, tuple(shape)),
    "huge": scaled(2e4),
    "limit": lambda rng, shape, p: (
        rng.uniform(0.9, 1.0, tuple(shape)) * LARGEST[p] * rng.choice([-1.0, 1.0], tuple(shape))
    ),
    "tiny": scaled(1e-4),
    "subnormal": lambda rng, shape, p: rng.standard_normal(tuple(shape)) * SMALLEST[p] / 30,
    "offset": scaled(1.0, 300.0),
    "zero": lambda _, shape, __: np.zeros(tuple(shape)),
    "special": _special,
    "infinite": _infinite,
    "nan": _nan,
}
MOVING = ("ordinary", "huge", "subnormal", "special")


def feed(shapes: Mapping[str, Sequence[int]], make: Make, fixed: Arrays | None = None) -> Values:
    """Every float input made by `make`, in turn."""

    def values(rng: np.random.Generator, precision: str) -> Arrays:
        made = {name: make(rng, shape, precision).astype(np.float32) for name, shape in shapes.items()}
        return {**made, **(fixed or {})}

    return values


def usual(
    shapes: Mapping[str, Sequence[int]], classes: Sequence[str] = tuple(CLASSES), fixed: Arrays | None = None
) -> dict[str, Values]:
    """The value classes of an operator that takes any number."""
    return {name: feed(shapes, CLASSES[name], fixed) for name in classes}


def ladder(
    shapes: Mapping[str, Sequence[int]], make: Callable[[float], Make], low: float, high: float, rungs: int = RUNGS
) -> dict[str, Values]:
    """Inputs whose parameter climbs from `low` to `high` by equal ratios."""
    steps = np.geomspace(low, high, rungs)
    return {f"near{index}": feed(shapes, make(float(step))) for index, step in enumerate(steps)}


def offsets(low: float = 0.5, high: float = 64.0) -> tuple[Callable[[float], Make], float, float]:
    """A mean that grows against a deviation of 1: what is lost to cancellation grows with it."""
    return (lambda step: scaled(1.0, step)), low, high


def scales(low: float, high: float) -> tuple[Callable[[float], Make], float, float]:
    """A deviation that grows."""
    return scaled, low, high


# --- operators alone -------------------------------------------------------------------------------------------------


def pointwise() -> Iterator[Case]:
    """One number in, one out."""
    shape: Shapes = {"x": (4, 64)}
    plain = [
        "Abs",
        "Acos",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Acosh",
        "Ceil",
        "Celu",
        "Cos",
        "Cosh",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Neg",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
        "Shrink",
    ]
    domains: dict[str, dict[str, Make]] = {
        "Acos": {"domain": lambda rng, s, _: rng.uniform(-1, 1, tuple(s))},
        "Asin": {"domain": lambda rng, s, _: rng.uniform(-1, 1, tuple(s))},
        "Atanh": {"domain": lambda rng, s, _: rng.uniform(-0.999, 0.999, tuple(s))},
        "Acosh": {"domain": lambda rng, s, _: rng.uniform(1, 50, tuple(s))},
        "Log": {"domain": lambda rng, s, _: np.exp(rng.uniform(-9, 9, tuple(s)))},
        "Sqrt": {"domain": lambda rng, s, _: np.exp(rng.uniform(-16, 11, tuple(s)))},
        "Exp": {"domain": lambda rng, s, _: rng.uniform(-12, 11.2, tuple(s))},
    }
    climbing = {
        "Exp": scales(0.3, 10),
        "Sin": scales(1, 60),
        "Cos": scales(1, 60),
        "Tan": scales(0.3, 2),
        "Sinh": scales(0.3, 8),
        "Cosh": scales(0.3, 8),
        "Log": offsets(0.01, 0.9),
        "Round": scales(0.3, 300),
        "Floor": scales(0.3, 300),
        "Ceil": scales(0.3, 300),
    }
    for op in plain:
        values = usual(shape)
        values |= {name: feed(shape, make) for name, make in domains.get(op, {}).items()}
        if op in climbing:
            values |= ladder(shape, *climbing[op])
        yield Case(f"op.{op}", op, model([node(op, ["x"], ["y"])], shape), HALF, values)
    yield Case("op.Mish", "Mish", model([node("Mish", ["x"], ["y"])], shape, opset=18), HALF, usual(shape))
    for approximate in ("none", "tanh"):
        proto = model([node("Gelu", ["x"], ["y"], approximate=approximate)], shape, opset=20)
        yield Case(f"op.Gelu.{approximate}", "Gelu", proto, HALF, usual(shape))
    proto = model([node("Swish", ["x"], ["y"], alpha=1.7)], shape, opset=24)
    yield Case("op.Swish", "Swish", proto, HALF, usual(shape))
    clip = model([node("Clip", ["x", "lo", "hi"], ["y"])], shape, {"lo": np.array(-2.0), "hi": np.array(3.0)})
    yield Case("op.Clip", "Clip", clip, HALF, usual(shape))
    for slope in (0.25, 100.0):
        proto = model([node("PRelu", ["x", "s"], ["y"])], shape, {"s": normal((64,), 3, slope)})
        yield Case(f"op.PRelu.{slope:g}", "PRelu", proto, HALF, usual(shape))
    for op in ("IsNaN", "IsInf"):
        nodes = [node(op, ["x"], ["b"]), node("Cast", ["b"], ["y"], to=TensorProto.FLOAT)]
        yield Case(f"op.{op}", op, model(nodes, shape, opset=20), HALF, usual(shape))
    for to in (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL):
        name = TensorProto.DataType.Name(to)
        nodes = [node("Cast", ["x"], ["i"], to=to), node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)]
        classes = ("ordinary", "wide", "huge", "tiny", "offset", "zero")
        yield Case(f"op.Cast.{name}", "Cast", model(nodes, shape), HALF, usual(shape, classes))


def binary() -> Iterator[Case]:
    """Two numbers in."""
    shapes: Shapes = {"a": (4, 64), "b": (4, 64)}
    for op in ["Add", "Sub", "Mul", "Div", "Pow", "PRelu"]:
        values = usual(shapes)
        if op in {"Add", "Sub"}:
            values |= ladder(shapes, *offsets(0.5, 64))
        yield Case(f"op2.{op}", op, model([node(op, ["a", "b"], ["y"])], shapes), HALF, values)
    for op in ("Mean", "Sum", "Max", "Min"):
        for count in (2, 3, 5):
            many = {f"x{index}": (4, 64) for index in range(count)}
            proto = model([node(op, list(many), ["y"])], many)
            values = usual(many) | {"half_limit": feed(many, scaled(1e3, 4.5e4)), "cancel": _cancelling(count)}
            if op in {"Mean", "Sum"}:
                values |= {f"near{i}": _cancelling(count, float(s)) for i, s in enumerate(np.geomspace(4, 400, RUNGS))}
            yield Case(f"op{count}.{op}", op, proto, HALF, values)
    for fmod in (0, 1):
        proto = model([node("Mod", ["a", "b"], ["y"], fmod=fmod)], shapes)
        if fmod == 0:
            continue  # ONNX takes no floats without fmod.
        values = usual(shapes, ("ordinary", "wide", "positive", "huge", "tiny", "offset"))
        for index, step in enumerate(np.geomspace(1, 1000, RUNGS)):
            values[f"quotient{index}"] = _quotients(float(step))
        yield Case("op2.Mod", "Mod", proto, HALF, values)
    for exponent in (2.0, 0.5, 3.0, -1.0, 1.7):
        proto = model([node("Pow", ["x", "e"], ["y"])], {"x": (4, 64)}, {"e": np.array(exponent)})
        yield Case(f"op.Pow.{exponent:g}", "Pow", proto, HALF, usual({"x": (4, 64)}))
    for op in ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]:
        nodes = [node(op, ["a", "b"], ["c"]), node("Cast", ["c"], ["y"], to=TensorProto.FLOAT)]
        values = usual(shapes, ("ordinary", "huge", "tiny", "zero", "special"))
        yield Case(f"op2.{op}", op, model(nodes, shapes), HALF, values)


def _cancelling(count: int, size: float = 3e4) -> Values:
    """Terms of this size whose sum is near 1."""

    def values(rng: np.random.Generator, _: str) -> Arrays:
        terms = rng.uniform(0.5, 1, (count, 4, 64)) * size
        terms[-1] = rng.standard_normal((4, 64)) - terms[:-1].sum(0) if count > 1 else terms[-1]
        return {f"x{index}": term.astype(np.float32) for index, term in enumerate(terms)}

    return values


def _quotients(size: float) -> Values:
    def values(rng: np.random.Generator, _: str) -> Arrays:
        divisor = rng.uniform(1, 2, (4, 64)).astype(np.float16)
        dividend = (divisor.astype(np.float64) * rng.uniform(1, size, (4, 64))).astype(np.float16)
        return {"a": dividend.astype(np.float32), "b": divisor.astype(np.float32)}

    return values


REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]


def reductions() -> Iterator[Case]:
    """Many numbers in, one out."""
    for op in REDUCTIONS:
        for length in (8, 64, 512, 4096):
            shape: Shapes = {"x": (4, length)}
            if op == "ReduceSum":
                proto = model([node(op, ["x", "axes"], ["y"])], shape, {"axes": np.array([1])})
            else:
                proto = model([node(op, ["x"], ["y"], axes=[1])], shape)
            classes: Sequence[str] = tuple(CLASSES) if length in (64, 512) else ("ordinary", "positive", "huge", "tiny")
            values = usual(shape, classes)
            if length == 512:
                values |= {"near_limit": feed(shape, lambda rng, s, _: rng.uniform(0, 2.2, tuple(s)) * 60000 / s[1])}
                values |= {"beyond": feed(shape, lambda rng, s, _: rng.uniform(1, 2, tuple(s)) * 2000)}
            if op in {"ReduceSum", "ReduceMean"}:
                values |= {
                    f"near{index}": feed(shape, _paired(float(step)))
                    for index, step in enumerate(np.geomspace(1, 60, RUNGS))
                }
            if op == "ReduceSumSquare":
                values |= ladder(shape, *scales(1e-4, 1e-2))
            yield Case(f"reduce.{op}.{length}", op, proto, HALF, values)
    for op in ("ReduceSum", "ReduceMean", "ReduceL2", "ReduceMax", "ReduceSumSquare"):
        shape = {"x": (2, 8, 8, 8)}
        axes = {"axes": np.array([2, 3])}
        proto = (
            model([node(op, ["x", "axes"], ["y"])], shape, axes)
            if op == "ReduceSum"
            else model([node(op, ["x"], ["y"], axes=[2, 3])], shape)
        )
        yield Case(f"reduce2d.{op}", op, proto, HALF, usual(shape))
    for op in ("ArgMax", "ArgMin"):
        shape = {"x": (16, 32)}
        proto = model([node(op, ["x"], ["y"], axis=1)], shape, output_types={"y": TensorProto.INT64})
        yield Case(f"reduce.{op}", op, proto, HALF, usual(shape, ("ordinary", "huge", "offset", "tiny")))
    for length in (16, 100, 600, 3000):
        shape = {"x": (2, length)}
        proto = model([node("CumSum", ["x", "axis"], ["y"])], shape, {"axis": np.array(1)})
        values = usual(shape, ("ordinary", "positive", "huge", "tiny", "special"))
        values |= {"near0": feed(shape, scaled(1.0, 0.3)), "small_steps": feed(shape, scaled(1e-4, 1e-3))}
        values |= {"near1": feed(shape, scaled(0.05, 1.0)), "beyond": feed(shape, scaled(1.0, 2e5 / length))}
        yield Case(f"scan.CumSum.{length}", "CumSum", proto, HALF, values)
        if length == 100:
            proto = model([node("CumSum", ["x", "axis"], ["y"], exclusive=1, reverse=1)], shape, {"axis": np.array(1)})
            yield Case("scan.CumSum.reverse", "CumSum", proto, HALF, values)


def _paired(size: float) -> Make:
    """Normal values of this deviation that nearly cancel in pairs, so that the sum is of order √n."""

    def make(rng: np.random.Generator, shape: Sequence[int], _: str) -> NDArray[np.floating[Any]]:
        half = rng.standard_normal((*shape[:-1], shape[-1] // 2)) * size
        return np.concatenate([half, -half + rng.standard_normal(half.shape)], -1)

    return make


def softmaxes() -> Iterator[Case]:
    """Softmax and its kin, alone."""
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        for length in (10, 64, 1000):
            shape: Shapes = {"x": (8, length)}
            proto = model([node(op, ["x"], ["y"], axis=-1)], shape)
            values = usual(shape, tuple(CLASSES) if length == 64 else ("ordinary", "wide", "huge", "offset"))
            values |= ladder(shape, *scales(1, 40))
            if op == "LogSoftmax":
                values |= {"six": feed(shape, scaled(6)), "sixty": feed(shape, scaled(60))}
            if length == 64:
                values |= {"masked": feed(shape, _masked(-1e4)), "all_masked": feed(shape, _all_masked)}
            yield Case(f"softmax.{op}.{length}", op, proto, HALF, values)


def _masked(fill: float) -> Make:
    def make(rng: np.random.Generator, shape: Sequence[int], _: str) -> NDArray[np.floating[Any]]:
        array = rng.standard_normal(tuple(shape))
        return np.where(rng.random(tuple(shape)) < 0.4, fill, array)

    return make


def _all_masked(rng: np.random.Generator, shape: Sequence[int], _: str) -> NDArray[np.floating[Any]]:
    array = rng.standard_normal(tuple(shape))
    array[0] = -np.inf
    return array


def norms() -> Iterator[Case]:
    """Normalization operators, alone."""
    rows, image = {"x": (4, 64)}, {"x": (2, 8, 6, 6)}
    affine = {"g": normal((64,), 1, 0.3) + 1, "b": normal((64,), 2, 0.1)}
    channel = {"g": normal((8,), 1, 0.3) + 1, "b": normal((8,), 2, 0.1)}
    cases: list[tuple[str, str, onnx.ModelProto, Mapping[str, Sequence[int]]]] = []
    for epsilon in (1e-5, 1e-12):
        proto = model([node("LayerNormalization", ["x", "g", "b"], ["y"], epsilon=epsilon)], rows, affine)
        cases.append((f"LayerNormalization.{epsilon:g}", "LayerNormalization", proto, rows))
        proto = model(
            [node("RMSNormalization", ["x", "g"], ["y"], epsilon=epsilon)], rows, {"g": affine["g"]}, opset=23
        )
        cases.append((f"RMSNormalization.{epsilon:g}", "RMSNormalization", proto, rows))
    proto = model([node("InstanceNormalization", ["x", "g", "b"], ["y"])], image, channel)
    cases.append(("InstanceNormalization", "InstanceNormalization", proto, image))
    proto = model([node("GroupNormalization", ["x", "g", "b"], ["y"], num_groups=2)], image, channel, opset=21)
    cases.append(("GroupNormalization", "GroupNormalization", proto, image))
    for spread in (1.0, 1e4):
        statistics = {**channel, "m": normal((8,), 3, spread**0.5), "v": np.abs(normal((8,), 4)) * spread + 0.1}
        proto = model([node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"])], image, statistics)
        cases.append((f"BatchNormalization.{spread:g}", "BatchNormalization", proto, image))
    for order in (1, 2):
        proto = model([node("LpNormalization", ["x"], ["y"], axis=1, p=order)], rows)
        cases.append((f"LpNormalization.{order}", "LpNormalization", proto, rows))
    proto = model([node("LRN", ["x"], ["y"], size=3)], image)
    cases.append(("LRN", "LRN", proto, image))
    proto = model([node("MeanVarianceNormalization", ["x"], ["y"])], image)
    cases.append(("MeanVarianceNormalization", "MeanVarianceNormalization", proto, image))
    for name, op, proto, shapes in cases:
        values = usual(shapes) | ladder(shapes, *offsets(1, 100)) | {"thousand": feed(shapes, scaled(1, 1000))}
        yield Case(f"norm.{name}", op, proto, HALF, values)


def pools() -> Iterator[Case]:
    """Pooling and resampling."""
    shapes: Shapes = {"x": (1, 4, 12, 12)}
    protos = {
        "AveragePool": [node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2])],
        "AveragePool.pad": [node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        "AveragePool.count": [
            node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
        ],
        "MaxPool": [node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2])],
        "LpPool": [node("LpPool", ["x"], ["y"], kernel_shape=[3, 3], p=2)],
        "GlobalAveragePool": [node("GlobalAveragePool", ["x"], ["y"])],
        "GlobalMaxPool": [node("GlobalMaxPool", ["x"], ["y"])],
        "GlobalLpPool": [node("GlobalLpPool", ["x"], ["y"], p=2)],
    }
    for name, nodes in protos.items():
        op = name.split(".")[0]
        values = usual(shapes)
        if "Average" in op:
            values |= {f"near{i}": feed(shapes, _paired(float(s))) for i, s in enumerate(np.geomspace(1, 60, RUNGS))}
        yield Case(f"pool.{name}", op, model(nodes, shapes), HALF, values)
    for mode, transform in (
        ("nearest", "asymmetric"),
        ("linear", "half_pixel"),
        ("linear", "align_corners"),
        ("cubic", "half_pixel"),
    ):
        extra = {"nearest_mode": "floor"} if mode == "nearest" else {}
        nodes = [node("Resize", ["x", "", "s"], ["y"], mode=mode, coordinate_transformation_mode=transform, **extra)]
        proto = model(nodes, shapes, {"s": np.array([1, 1, 2, 1.5], np.float32)})
        values = usual(shapes)
        if mode != "nearest":
            values |= ladder(shapes, *offsets(1, 60))
        yield Case(f"pool.Resize.{mode}.{transform}", "Resize", proto, HALF, values)
    for mode in ("bilinear", "nearest"):
        both = {"x": (1, 2, 8, 8), "grid": (1, 6, 6, 2)}
        proto = model([node("GridSample", ["x", "grid"], ["y"], mode=mode, align_corners=1)], both)
        values = {name: _sampled(CLASSES[name]) for name in ("ordinary", "wide", "huge", "tiny", "offset", "special")}
        yield Case(f"pool.GridSample.{mode}", "GridSample", proto, HALF, values)
    boxes = np.array([[0, 0, 7, 7], [2, 2, 9, 10], [1, 3, 5, 4]], np.float32)
    proto = model(
        [node("RoiAlign", ["x", "r", "i"], ["y"], output_height=3, output_width=3, sampling_ratio=2)],
        {"x": (1, 4, 12, 12)},
        {"r": boxes, "i": np.zeros(3, np.int64)},
    )
    yield Case("pool.RoiAlign", "RoiAlign", proto, HALF, usual(shapes, ("ordinary", "wide", "huge", "tiny", "offset")))


def _sampled(make: Make) -> Values:
    """An image and where to look at it."""

    def values(rng: np.random.Generator, precision: str) -> Arrays:
        image = make(rng, (1, 2, 8, 8), precision).astype(np.float32)
        return {"x": image, "grid": rng.uniform(-1, 1, (1, 6, 6, 2)).astype(np.float32)}

    return values


def moving() -> Iterator[Case]:
    """Operators that move values."""
    shapes: Shapes = {"x": (2, 4, 6, 6)}
    index = np.array([2, 0, 3, 1])
    table: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
        "Concat": ([node("Concat", ["x", "x"], ["y"], axis=1)], {}),
        "DepthToSpace": ([node("DepthToSpace", ["x"], ["y"], blocksize=2)], {}),
        "SpaceToDepth": ([node("SpaceToDepth", ["x"], ["y"], blocksize=2)], {}),
        "Expand": ([node("Expand", ["x", "s"], ["y"])], {"s": np.array([2, 2, 4, 6, 6])}),
        "Flatten": ([node("Flatten", ["x"], ["y"])], {}),
        "Gather": ([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": index}),
        "GatherElements": (
            [node("GatherElements", ["x", "i"], ["y"], axis=1)],
            {"i": np.random.default_rng(0).integers(0, 4, (2, 4, 6, 6))},
        ),
        "GatherND": ([node("GatherND", ["x", "i"], ["y"])], {"i": np.array([[0, 1], [1, 3]])}),
        "OneHot": (
            [node("ArgMax", ["x"], ["i"], axis=1, keepdims=0), node("OneHot", ["i", "d", "v"], ["y"])],
            {"d": np.array(4), "v": np.array([0.1, 0.9], np.float32)},
        ),
        "Pad": ([node("Pad", ["x", "p", "c"], ["y"])], {"p": np.array([0, 0, 1, 1, 0, 0, 1, 2]), "c": np.array(0.3)}),
        "Pad.reflect": ([node("Pad", ["x", "p"], ["y"], mode="reflect")], {"p": np.array([0, 0, 1, 1, 0, 0, 1, 2])}),
        "Reshape": ([node("Reshape", ["x", "s"], ["y"])], {"s": np.array([8, -1])}),
        "ScatterElements": (
            [node("ScatterElements", ["x", "i", "u"], ["y"], axis=1)],
            {"i": np.zeros((2, 1, 6, 6), np.int64), "u": normal((2, 1, 6, 6), 1)},
        ),
        "ScatterND": (
            [node("ScatterND", ["x", "i", "u"], ["y"])],
            {"i": np.array([[0, 1], [1, 3]]), "u": normal((2, 6, 6), 1)},
        ),
        "Slice": (
            [node("Slice", ["x", "b", "e", "a"], ["y"])],
            {"b": np.array([1, 0]), "e": np.array([5, 4]), "a": np.array([2, 3])},
        ),
        "Split": ([node("Split", ["x"], ["y", "z"], axis=1)], {}),
        "Squeeze": ([node("Unsqueeze", ["x", "a"], ["u"]), node("Squeeze", ["u", "a"], ["y"])], {"a": np.array([0])}),
        "Tile": ([node("Tile", ["x", "r"], ["y"])], {"r": np.array([1, 2, 1, 1])}),
        "TopK": ([node("TopK", ["x", "k"], ["y", "z"], axis=1)], {"k": np.array([2])}),
        "Transpose": ([node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])], {}),
        "Trilu": ([node("Trilu", ["x"], ["y"])], {}),
        "Where": ([node("Where", ["m", "x", "c"], ["y"])], {"m": normal((6, 6), 2) > 0, "c": np.array(-1e4)}),
        "ReverseSequence": (
            [node("ReverseSequence", ["x", "n"], ["y"], time_axis=1, batch_axis=0)],
            {"n": np.array([3, 4])},
        ),
        "EyeLike": ([node("ReduceSum", ["x", "a"], ["s"], keepdims=0), node("EyeLike", ["s"], ["y"])], {"a": [2, 3]}),
        "Dropout": ([node("Dropout", ["x"], ["y"])], {}),
    }
    for name, (nodes, weights) in table.items():
        yield Case(f"move.{name}", name.split(".")[0], model(nodes, shapes, weights), HALF, usual(shapes, MOVING))


# --- matrix products -------------------------------------------------------------------------------------------------


def _balanced(shape: Sequence[int], seed: int, axis: int) -> NDArray[np.float32]:
    """Weights whose sum along `axis` is nought: an offset of the inputs cancels in the product."""
    array = normal(shape, seed)
    return np.asarray((array - array.mean(axis, keepdims=True)) / np.float32(np.prod(array.shape[1:]) ** 0.5))


def products() -> Iterator[Case]:
    """MatMul, Gemm, Einsum, Conv and ConvTranspose."""
    for length in (16, 128, 1024):
        shapes: Shapes = {"x": (8, length)}
        weights = {"w": _balanced((length, 16), 1, 0), "b": normal((16,), 2, 0.1)}
        values = usual(shapes) | ladder(shapes, *offsets(0.5, 100))
        values |= {f"in_range{i}": feed(shapes, scaled(float(s))) for i, s in enumerate(np.geomspace(0.02, 1.5, RUNGS))}
        proto = model([node("MatMul", ["x", "w"], ["y"])], shapes, {"w": weights["w"]})
        yield Case(f"product.MatMul.{length}", "MatMul", proto, ALL, values)
        proto = model([node("Gemm", ["x", "w", "b"], ["y"])], shapes, weights)
        yield Case(f"product.Gemm.{length}", "Gemm", proto, ALL, values)
        same_sign = {"w": np.abs(weights["w"]) + 0.5}
        proto = model([node("MatMul", ["x", "w"], ["y"])], shapes, same_sign)
        values = usual(shapes) | {"hundred": feed(shapes, lambda rng, s, _: rng.uniform(50, 150, tuple(s)))}
        yield Case(f"product.MatMul.positive.{length}", "MatMul", proto, FLOATS, values)
    for alpha, beta in ((0.044, 1.0), (8.0, 1.0), (1.0, 0.01), (0.125, 300.0), (1e-6, 1.0)):
        shapes = {"x": (8, 64)}
        proto = model(
            [node("Gemm", ["x", "w", "b"], ["y"], alpha=alpha, beta=beta)],
            shapes,
            {"w": normal((64, 16), 1), "b": normal((16,), 2, 10)},
        )
        values = usual(shapes) | {"beyond": feed(shapes, scaled(2e3, 3e3)), "thousand": feed(shapes, scaled(1e3))}
        values |= ladder(shapes, *offsets(1, 60))
        yield Case(f"product.Gemm.alpha{alpha:g}.beta{beta:g}", "Gemm", proto, FLOATS, values)
    both = {"a": (2, 8, 32), "b": (2, 32, 8)}
    yield Case("product.MatMul.both", "MatMul", model([node("MatMul", ["a", "b"], ["y"])], both), FLOATS, usual(both))
    for equation in ("bij,bjk->bik", "bij,bjk->bki", "bij,bjk->b", "bij,bjk->ijk"):
        proto = model([node("Einsum", ["a", "b"], ["y"], equation=equation)], both)
        yield Case(
            f"product.Einsum.{equation.replace(',', '_').replace('->', '_')}", "Einsum", proto, FLOATS, usual(both)
        )
    for channels, size in ((4, 3), (64, 1), (64, 3), (256, 3)):
        shapes = {"x": (1, channels, 7, 7)}
        for sign in ("mixed", "positive"):
            w = _balanced((8, channels, size, size), 1, 1)
            if sign == "positive":
                w = np.abs(w) + np.float32(1 / (channels * size * size))
            proto = model(
                [node("Conv", ["x", "w", "b"], ["y"], pads=[size // 2] * 4)],
                shapes,
                {"w": w, "b": normal((8,), 2, 0.1)},
            )
            values = usual(shapes) | ladder(shapes, *offsets(0.5, 100))
            yield Case(
                f"product.Conv.{channels}x{size}.{sign}", "Conv", proto, ALL if sign == "mixed" else FLOATS, values
            )
    for name, extra, wshape, xshape in (
        ("depthwise", {"group": 16}, (16, 1, 3, 3), (1, 16, 7, 7)),
        ("grouped", {"group": 4}, (16, 4, 3, 3), (1, 16, 7, 7)),
        ("dilated", {"dilations": [2, 2]}, (8, 16, 3, 3), (1, 16, 9, 9)),
        ("conv1d", {}, (8, 16, 5), (1, 16, 20)),
        ("conv3d", {}, (4, 4, 3, 3, 3), (1, 4, 5, 5, 5)),
    ):
        shapes = {"x": xshape}
        proto = model([node("Conv", ["x", "w"], ["y"], **extra)], shapes, {"w": normal(wshape, 1, 0.2)})
        yield Case(f"product.Conv.{name}", "Conv", proto, FLOATS, usual(shapes) | ladder(shapes, *offsets(0.5, 100)))
    for stride in (1, 2):
        shapes = {"x": (1, 16, 6, 6)}
        nodes = [node("ConvTranspose", ["x", "w"], ["y"], strides=[stride, stride])]
        proto = model(nodes, shapes, {"w": normal((16, 8, 3, 3), 1, 0.2)})
        values = usual(shapes) | ladder(shapes, *offsets(0.5, 100))
        yield Case(f"product.ConvTranspose.{stride}", "ConvTranspose", proto, FLOATS, values)
    large: tuple[tuple[str, Shapes, list[onnx.NodeProto], dict[str, Any]], ...] = (
        (
            "MatMul.large",
            {"x": (64, 512)},
            [node("MatMul", ["x", "w"], ["y"])],
            {"w": _balanced((512, 64), 1, 0)},
        ),
        (
            "Conv.large",
            {"x": (1, 64, 14, 14)},
            [node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
            {"w": _balanced((32, 64, 3, 3), 1, 1)},
        ),
        (
            "Conv.large.positive",
            {"x": (1, 64, 14, 14)},
            [node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
            {"w": np.abs(_balanced((32, 64, 3, 3), 1, 1))},
        ),
    )
    for name, shapes, nodes, weights in large:
        values = usual(shapes, ("ordinary", "positive", "huge", "offset")) | ladder(shapes, *offsets(0.5, 100), rungs=5)
        yield Case(f"product.{name}", name.partition(".")[0], model(nodes, shapes, weights), FLOATS, values)


def conv_batch_norm() -> Iterator[Case]:
    """Conv and what follows it; running variances that differ by channel tell whether folding comes before rounding."""
    shapes: Shapes = {"x": (1, 16, 8, 8)}
    for spread in (1.0, 1e4, 1e8):
        weights = {
            "w": normal((16, 16, 3, 3), 1, 0.1 * spread**0.5),
            "g": normal((16,), 2, 0.3) + 1,
            "b": normal((16,), 3, 0.1),
            "m": normal((16,), 4, 0.3 * spread**0.5),
            "v": np.exp(normal((16,), 5, 1.5)) * spread,
        }
        conv = node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1])
        norm = node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"])
        tails = {
            "bn": [conv, norm, node("Identity", ["n"], ["y"])],
            "bn_relu": [conv, norm, node("Relu", ["n"], ["y"])],
            "bn_add_relu": [conv, norm, node("Add", ["n", "x"], ["s"]), node("Relu", ["s"], ["y"])],
            "bn_silu": [conv, norm, node("Sigmoid", ["n"], ["s"]), node("Mul", ["n", "s"], ["y"])],
        }
        for name, nodes in tails.items():
            proto = model([_copy(each) for each in nodes], shapes, weights)
            values = usual(shapes) | ladder(shapes, *offsets(1, 100))
            yield Case(f"conv.{name}.{spread:g}", "Conv", proto, ALL if spread == 1 else FLOATS, values)
    mean = normal((16,), 6, 1)
    weights = {
        "w": normal((16, 16, 3, 3), 1, 0.1),
        "g": np.ones(16, np.float32),
        "b": np.zeros(16, np.float32),
        "m": mean * 100,
        "v": np.ones(16, np.float32),
        "cb": mean * 100,
    }
    nodes = [
        node("Conv", ["x", "w", "cb"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"]),
    ]
    yield Case("conv.bn.cancelling_bias", "Conv", model(nodes, shapes, weights), FLOATS, usual(shapes))
    scale = {"w": normal((16, 16, 3, 3), 1, 0.1), "s": normal((16, 1, 1), 2), "t": normal((16, 1, 1), 3)}
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Mul", ["c", "s"], ["m"]),
        node("Add", ["m", "t"], ["y"]),
    ]
    values = usual(shapes) | ladder(shapes, *offsets(1, 100))
    yield Case("conv.scale_shift", "Conv", model(nodes, shapes, scale), FLOATS, values)


def _copy(each: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(each)
    return copy


def nets() -> Iterator[Case]:
    """Small whole nets."""
    image = {"x": (1, 3, 16, 16)}
    weights: dict[str, Any] = {
        "w1": normal((16, 3, 3, 3), 1, 0.3),
        "w2": normal((16, 16, 3, 3), 2, 0.1),
        "w3": normal((16, 16, 3, 3), 3, 0.1),
        "w4": normal((16, 10), 4, 0.3),
    }
    for index in range(3):
        weights |= {
            f"g{index}": normal((16,), 10 + index, 0.3) + 1,
            f"b{index}": normal((16,), 20 + index, 0.1),
            f"m{index}": normal((16,), 30 + index, 0.3),
            f"v{index}": np.exp(normal((16,), 40 + index)),
        }
    nodes = []
    for index, (source, target) in enumerate((("x", "r0"), ("r0", "r1"), ("r1", "s"))):
        nodes.append(node("Conv", [source, f"w{index + 1}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        parameters = [f"{letter}{index}" for letter in "gbmv"]
        after = target if target == "s" else f"n{index}"
        nodes.append(node("BatchNormalization", [f"c{index}", *parameters], [after]))
        if target != "s":
            nodes.append(node("Relu", [after], [target]))
    nodes += [
        node("Add", ["s", "r0"], ["a"]),
        node("Relu", ["a"], ["r2"]),
        node("GlobalAveragePool", ["r2"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "w4"], ["l"]),
        node("Softmax", ["l"], ["y"]),
    ]
    classes = ("ordinary", "wide", "positive", "huge", "tiny", "zero", "special", "offset")
    values = usual(image, classes) | ladder(image, *offsets(1, 300))
    yield Case("net.resnet", "residual net", model(nodes, image, weights), ALL, values)
    logits = [_copy(each) for each in nodes[:-1]]
    logits[-1].output[0] = "y"
    yield Case("net.resnet.logits", "residual net", model(logits, image, weights), ALL, values)
    rows = {"x": (4, 32)}
    mlp_weights: dict[str, Any] = {"g": np.ones(32, np.float32), "b": np.zeros(32, np.float32)}
    layers, value = [], "x"
    for index in range(4):
        mlp_weights |= {f"w{index}": normal((32, 32), index, 0.25), f"c{index}": normal((32,), index, 0.1)}
        layers += [
            node("LayerNormalization", [value, "g", "b"], [f"n{index}"]),
            node("Gemm", [f"n{index}", f"w{index}", f"c{index}"], [f"h{index}"]),
            node("Gelu", [f"h{index}"], [f"a{index}"]),
            node("Add", [value, f"a{index}"], ["y" if index == 3 else f"v{index}"]),
        ]
        value = f"v{index}"
    proto = model(layers, rows, mlp_weights, opset=20)
    yield Case("net.mlp", "residual net", proto, ALL, usual(rows) | ladder(rows, *offsets(1, 300)))


def control() -> Iterator[Case]:
    """Operators inside If, Loop and Scan, and those on truth values."""
    rows = {"x": (4, 64)}
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Add", ["s", "e"], ["t"], name="step"), node("Identity", ["t"], ["o"], name="out")],
        "body",
        [info("s", TensorProto.FLOAT, [64]), info("e", TensorProto.FLOAT, [64])],
        [info("t", TensorProto.FLOAT, [64]), info("o", TensorProto.FLOAT, [64])],
    )
    for length in (4, 50):
        shapes: Shapes = {"x": (length, 64)}
        nodes = [node("Scan", ["z", "x"], ["last", "y"], body=body, num_scan_inputs=1)]
        proto = model(nodes, shapes, {"z": np.zeros(64, np.float32)})
        classes = ("ordinary", "positive", "huge", "offset", "tiny", "special")
        yield Case(f"control.Scan.{length}", "Scan", proto, HALF, usual(shapes, classes))
    branches = {
        name: helper.make_graph(
            [node("Mul", ["x", by], [f"{name}_m"], name=f"{name}_mul"), node("Div", [f"{name}_m", by], [name])],
            name,
            [],
            [info(name, TensorProto.FLOAT, [4, 64])],
        )
        for name, by in (("then", "k"), ("else", "x"))
    }
    nodes = [
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "zero"], ["c"]),
        node("If", ["c"], ["y"], then_branch=branches["then"], else_branch=branches["else"]),
    ]
    proto = model(nodes, rows, {"k": np.array(1000.0), "zero": np.array(0.0)})
    yield Case("control.If", "If", proto, HALF, usual(rows, ("ordinary", "wide", "huge", "tiny", "positive")))
    pair = {"a": (4, 64), "b": (4, 64)}
    for op in ("And", "Or", "Xor"):
        nodes = [
            node("Greater", ["a", "zero"], ["p"]),
            node("Less", ["b", "one"], ["q"]),
            node(op, ["p", "q"], ["r"]),
            node("Not", ["r"], ["n"]),
            node("Where", ["n", "a", "b"], ["y"]),
        ]
        proto = model(nodes, pair, {"zero": np.array(0.0), "one": np.array(1.0)})
        yield Case(f"control.{op}", op, proto, HALF, usual(pair, MOVING))


def linears() -> Iterator[Case]:
    """Chains of matrix products."""
    shapes: Shapes = {"x": (8, 64)}
    weights = {"w1": _balanced((64, 128), 1, 0), "b1": normal((128,), 2, 0.1), "w2": normal((128, 16), 3, 0.1)}
    for name, middle in (
        ("relu", [node("Relu", ["h"], ["a"])]),
        ("gelu", [node("Gelu", ["h"], ["a"])]),
        ("silu", [node("Sigmoid", ["h"], ["s"]), node("Mul", ["h", "s"], ["a"])]),
        ("tanh", [node("Tanh", ["h"], ["a"])]),
    ):
        nodes = [node("Gemm", ["x", "w1", "b1"], ["h"]), *middle, node("MatMul", ["a", "w2"], ["y"])]
        values = usual(shapes) | ladder(shapes, *offsets(0.5, 100))
        values |= {f"in_range{i}": feed(shapes, scaled(float(s))) for i, s in enumerate(np.geomspace(0.02, 1.5, RUNGS))}
        yield Case(f"linear.{name}", "Gemm", model(nodes, shapes, weights, opset=20), ALL, values)
    nodes = [node("MatMul", ["x", "w1"], ["h"]), node("Mul", ["h", "c"], ["s"]), node("Add", ["s", "b1"], ["y"])]
    proto = model(nodes, shapes, {**weights, "c": np.array(0.001)})
    values = usual(shapes) | {"beyond": feed(shapes, scaled(3e4, 0)), "beyond2": feed(shapes, scaled(6e4, 0))}
    yield Case("linear.scaled_after", "MatMul", proto, FLOATS, values)


# --- neighbourhoods --------------------------------------------------------------------------------------------------


def spelled_out() -> Iterator[Case]:
    """What exporters write in pieces."""
    rows = {"x": (4, 64)}
    g, b = normal((64,), 1, 0.3) + 1, normal((64,), 2, 0.1)
    f = np.array
    pieces: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
        "layer_norm": (
            [
                node("ReduceMean", ["x"], ["m"], axes=[-1]),
                node("Sub", ["x", "m"], ["d"]),
                node("Pow", ["d", "two"], ["q"]),
                node("ReduceMean", ["q"], ["v"], axes=[-1]),
                node("Add", ["v", "eps"], ["ve"]),
                node("Sqrt", ["ve"], ["sd"]),
                node("Div", ["d", "sd"], ["n"]),
                node("Mul", ["n", "g"], ["ng"]),
                node("Add", ["ng", "b"], ["y"]),
            ],
            {"two": f(2.0), "eps": f(1e-5), "g": g, "b": b},
        ),
        "layer_norm_mul": (
            [
                node("ReduceMean", ["x"], ["m"], axes=[-1]),
                node("Sub", ["x", "m"], ["d"]),
                node("Mul", ["d", "d"], ["q"]),
                node("ReduceMean", ["q"], ["v"], axes=[-1]),
                node("Add", ["v", "eps"], ["ve"]),
                node("Sqrt", ["ve"], ["sd"]),
                node("Reciprocal", ["sd"], ["r"]),
                node("Mul", ["d", "r"], ["n"]),
                node("Mul", ["n", "g"], ["y"]),
            ],
            {"eps": f(1e-12), "g": g},
        ),
        "rms_norm": (
            [
                node("Pow", ["x", "two"], ["q"]),
                node("ReduceMean", ["q"], ["v"], axes=[-1]),
                node("Add", ["v", "eps"], ["ve"]),
                node("Sqrt", ["ve"], ["sd"]),
                node("Div", ["x", "sd"], ["n"]),
                node("Mul", ["n", "g"], ["y"]),
            ],
            {"two": f(2.0), "eps": f(1e-6), "g": g},
        ),
        "softmax": (
            [
                node("ReduceMax", ["x"], ["m"], axes=[-1]),
                node("Sub", ["x", "m"], ["d"]),
                node("Exp", ["d"], ["e"]),
                node("ReduceSum", ["e", "ax"], ["s"]),
                node("Div", ["e", "s"], ["y"]),
            ],
            {"ax": f([-1])},
        ),
        "softmax_unshifted": (
            [node("Exp", ["x"], ["e"]), node("ReduceSum", ["e", "ax"], ["s"]), node("Div", ["e", "s"], ["y"])],
            {"ax": f([-1])},
        ),
        "log_softmax": ([node("Softmax", ["x"], ["s"]), node("Log", ["s"], ["y"])], {}),
        "log_softmax_shifted": (
            [
                node("ReduceMax", ["x"], ["m"], axes=[-1]),
                node("Sub", ["x", "m"], ["d"]),
                node("Exp", ["d"], ["e"]),
                node("ReduceSum", ["e", "ax"], ["s"]),
                node("Log", ["s"], ["l"]),
                node("Sub", ["d", "l"], ["y"]),
            ],
            {"ax": f([-1])},
        ),
        "gelu_erf": (
            [
                node("Div", ["x", "r2"], ["d"]),
                node("Erf", ["d"], ["e"]),
                node("Add", ["e", "one"], ["a"]),
                node("Mul", ["x", "a"], ["m"]),
                node("Mul", ["m", "half"], ["y"]),
            ],
            {"r2": f(2.0**0.5), "one": f(1.0), "half": f(0.5)},
        ),
        "gelu_tanh": (
            [
                node("Pow", ["x", "three"], ["c"]),
                node("Mul", ["c", "k"], ["kc"]),
                node("Add", ["x", "kc"], ["i"]),
                node("Mul", ["i", "r"], ["ri"]),
                node("Tanh", ["ri"], ["t"]),
                node("Add", ["t", "one"], ["a"]),
                node("Mul", ["x", "half"], ["h"]),
                node("Mul", ["h", "a"], ["y"]),
            ],
            {"three": f(3.0), "k": f(0.044715), "r": f((2 / np.pi) ** 0.5), "one": f(1.0), "half": f(0.5)},
        ),
        "silu": ([node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])], {}),
        "mish": (
            [node("Softplus", ["x"], ["p"]), node("Tanh", ["p"], ["t"]), node("Mul", ["x", "t"], ["y"])],
            {},
        ),
        "softplus": (
            [node("Exp", ["x"], ["e"]), node("Add", ["e", "one"], ["a"]), node("Log", ["a"], ["y"])],
            {"one": f(1.0)},
        ),
        "hard_swish": (
            [
                node("Add", ["x", "three"], ["a"]),
                node("Clip", ["a", "zero", "six"], ["c"]),
                node("Mul", ["x", "c"], ["m"]),
                node("Div", ["m", "six"], ["y"]),
            ],
            {"three": f(3.0), "zero": f(0.0), "six": f(6.0)},
        ),
        "hard_swish_op": ([node("HardSigmoid", ["x"], ["s"], alpha=1 / 6), node("Mul", ["x", "s"], ["y"])], {}),
        "square_scaled": ([node("Mul", ["x", "x"], ["q"]), node("Mul", ["q", "k"], ["y"])], {"k": f(0.001)}),
        "scaled_square": (
            [node("Mul", ["x", "k"], ["s"]), node("Mul", ["s", "s"], ["q"]), node("Div", ["q", "k"], ["y"])],
            {"k": f(0.001)},
        ),
        "exp_log": ([node("Exp", ["x"], ["e"]), node("Log", ["e"], ["y"])], {}),
        "variance": (
            [
                node("ReduceMean", ["x"], ["m"], axes=[-1]),
                node("Mul", ["m", "m"], ["mm"]),
                node("Mul", ["x", "x"], ["xx"]),
                node("ReduceMean", ["xx"], ["q"], axes=[-1]),
                node("Sub", ["q", "mm"], ["y"]),
            ],
            {},
        ),
        "l2_normalize": (
            [
                node("ReduceL2", ["x"], ["n"], axes=[-1]),
                node("Clip", ["n", "lo"], ["c"]),
                node("Div", ["x", "c"], ["y"]),
            ],
            {"lo": f(1e-12)},
        ),
        "cosine": (
            [
                node("Mul", ["x", "x"], ["q"]),
                node("ReduceSum", ["q", "ax"], ["s"]),
                node("Add", ["s", "eps"], ["e"]),
                node("Sqrt", ["e"], ["r"]),
                node("Div", ["x", "r"], ["y"]),
            ],
            {"ax": f([-1]), "eps": f(1e-12)},
        ),
        "add_sub_large": ([node("Add", ["x", "k"], ["a"]), node("Sub", ["a", "k"], ["y"])], {"k": f(16.0)}),
        "relu_scale": (
            [node("Relu", ["x"], ["r"]), node("Mul", ["r", "k"], ["s"]), node("Add", ["s", "one"], ["y"])],
            {"k": f(3.0), "one": f(1.0)},
        ),
        "glu": (
            [node("Split", ["x"], ["p", "q"], axis=1), node("Sigmoid", ["q"], ["s"]), node("Mul", ["p", "s"], ["y"])],
            {},
        ),
        "swap_scale": ([node("Div", ["x", "k"], ["d"]), node("Mul", ["d", "k"], ["y"])], {"k": f(3000.0)}),
        "squared_relu": ([node("Relu", ["x"], ["r"]), node("Mul", ["r", "r"], ["y"])], {}),
        "logsumexp": (
            [node("Exp", ["x"], ["e"]), node("ReduceSum", ["e", "ax"], ["s"]), node("Log", ["s"], ["y"])],
            {"ax": f([-1])},
        ),
        "sum_of_exp_ratio": (
            [node("Exp", ["x"], ["e"]), node("ReduceMean", ["e"], ["s"], axes=[-1]), node("Div", ["e", "s"], ["y"])],
            {},
        ),
    }
    climbing: dict[str, tuple[Callable[[float], Make], float, float]] = {
        "layer_norm": offsets(1, 100),
        "layer_norm_mul": offsets(1, 100),
        "rms_norm": scales(1e-3, 1e-1),
        "softmax": scales(1, 40),
        "softmax_unshifted": scales(0.3, 6),
        "log_softmax": scales(0.3, 6),
        "log_softmax_shifted": scales(1, 40),
        "exp_log": scales(0.01, 6),
        "variance": offsets(0.3, 20),
        "gelu_erf": scales(0.3, 10),
        "gelu_tanh": scales(0.3, 60),
        "softplus": scales(0.1, 10),
        "square_scaled": scales(10, 300),
        "scaled_square": scales(0.03, 3),
        "add_sub_large": scales(0.05, 10),
        "logsumexp": scales(0.3, 6),
        "sum_of_exp_ratio": scales(0.3, 6),
        "cosine": scales(1e-4, 1e-1),
        "l2_normalize": scales(1e-5, 1e-2),
        "swap_scale": scales(0.01, 10),
    }
    for name, (nodes, weights) in pieces.items():
        values = usual(rows) | {"thousand": feed(rows, scaled(1, 1000)), "hundred": feed(rows, scaled(100))}
        if name in climbing:
            values |= ladder(rows, *climbing[name])
        yield Case(f"spelled.{name}", name, model(nodes, rows, weights), HALF, values)
    for size in (16.0, 64.0, 256.0, 1024.0):
        proto = model([node("Add", ["x", "k"], ["a"]), node("Sub", ["a", "k"], ["y"])], rows, {"k": f(size)})
        values = ladder(rows, *scales(0.1, 10))
        yield Case(f"spelled.add_sub.{size:g}", "add_sub", proto, HALF, values)
    for length in (256, 1024):
        longer = {"x": (2, length)}
        for name in ("layer_norm", "rms_norm", "softmax", "cosine", "variance"):
            nodes, weights = pieces[name]
            weights = {k: normal((length,), 7, 0.3) + 1 if k in {"g", "b"} else v for k, v in weights.items()}
            proto = model([_copy(each) for each in nodes], longer, weights)
            values = usual(longer, ("ordinary", "huge", "offset", "wide", "tiny", "special"))
            values |= ladder(longer, *scales(0.3, 300))
            yield Case(f"spelled.{name}.{length}", name, proto, HALF, values)


def attentions() -> Iterator[Case]:
    """Attention, as an operator and in its usual spellings."""
    shapes: Shapes = {"q": (1, 2, 16, 32), "k": (1, 2, 16, 32), "v": (1, 2, 16, 32)}
    transpose = node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2])
    spellings: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
        "div": (
            [
                transpose,
                node("MatMul", ["q", "kt"], ["s"]),
                node("Div", ["s", "c"], ["d"]),
                node("Softmax", ["d"], ["p"], axis=-1),
                node("MatMul", ["p", "v"], ["y"]),
            ],
            {"c": np.array(32**0.5)},
        ),
        "mul_before": (
            [
                transpose,
                node("Mul", ["q", "c"], ["qs"]),
                node("Mul", ["kt", "c"], ["ks"]),
                node("MatMul", ["qs", "ks"], ["s"]),
                node("Softmax", ["s"], ["p"], axis=-1),
                node("MatMul", ["p", "v"], ["y"]),
            ],
            {"c": np.array(32**-0.25)},
        ),
        "masked": (
            [
                transpose,
                node("MatMul", ["q", "kt"], ["s"]),
                node("Mul", ["s", "c"], ["d"]),
                node("Add", ["d", "m"], ["e"]),
                node("Softmax", ["e"], ["p"], axis=-1),
                node("MatMul", ["p", "v"], ["y"]),
            ],
            {"c": np.array(32**-0.5), "m": np.triu(np.full((16, 16), -1e4, np.float32), 1)},
        ),
        "unscaled": (
            [
                transpose,
                node("MatMul", ["q", "kt"], ["s"]),
                node("Softmax", ["s"], ["p"], axis=-1),
                node("MatMul", ["p", "v"], ["y"]),
            ],
            {},
        ),
        "scores": (
            [transpose, node("MatMul", ["q", "kt"], ["s"]), node("Div", ["s", "c"], ["y"])],
            {"c": np.array(32**0.5)},
        ),
        "probabilities": (
            [transpose, node("MatMul", ["q", "kt"], ["s"]), node("Softmax", ["s"], ["y"], axis=-1)],
            {},
        ),
    }
    classes = tuple(CLASSES)
    values = usual(shapes, classes) | ladder(shapes, *scales(0.3, 12)) | {"hundred": feed(shapes, scaled(100))}
    values |= {"flat": feed(shapes, scaled(0.1, 1)), "beyond": feed(shapes, scaled(30, 60))}
    values |= {f"value_offset{i}": _value_offset(shapes, float(s)) for i, s in enumerate(np.geomspace(1, 60, RUNGS))}
    for name, (nodes, weights) in spellings.items():
        yield Case(f"attention.{name}", "attention spelled out", model(nodes, shapes, weights), FLOATS, values)
    proto = model([node("Attention", ["q", "k", "v"], ["y"])], shapes, opset=23)
    yield Case("attention.Attention", "Attention", proto, FLOATS, values)
    proto = model([node("Attention", ["q", "k", "v"], ["y"], is_causal=1)], shapes, opset=23)
    yield Case("attention.Attention.causal", "Attention", proto, FLOATS, values)
    hidden = {"x": (1, 16, 64)}
    weights = {f"w{index}": normal((64, 64), index, 0.125) for index in range(4)} | {
        "c": np.array(64**-0.5),
        "g": np.ones(64, np.float32),
        "b": np.zeros(64, np.float32),
    }
    block = [
        node("LayerNormalization", ["x", "g", "b"], ["n"]),
        node("MatMul", ["n", "w0"], ["q"]),
        node("MatMul", ["n", "w1"], ["k"]),
        node("MatMul", ["n", "w2"], ["v"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Mul", ["s", "c"], ["d"]),
        node("Softmax", ["d"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["o"]),
        node("MatMul", ["o", "w3"], ["r"]),
        node("Add", ["x", "r"], ["y"]),
    ]
    proto = model(block, hidden, weights)
    yield Case("attention.block", "attention spelled out", proto, ALL, usual(hidden) | ladder(hidden, *offsets(1, 100)))
    rope = {"x": (1, 2, 8, 16)}
    angles = np.outer(np.arange(8), 1 / 100 ** (np.arange(8) / 8))[None]
    proto = model(
        [node("RotaryEmbedding", ["x", "cos", "sin"], ["y"])],
        rope,
        {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)},
        opset=23,
    )
    yield Case("attention.RotaryEmbedding", "RotaryEmbedding", proto, HALF, usual(rope))


def _value_offset(shapes: Mapping[str, Sequence[int]], size: float) -> Values:
    """Values whose mean is large: what attention returns is what is left of it."""

    def values(rng: np.random.Generator, _: str) -> Arrays:
        made = {name: rng.standard_normal(tuple(shape)).astype(np.float32) for name, shape in shapes.items()}
        sign = np.where(np.arange(made["v"].shape[-2]) % 2, 1, -1)[:, None]
        return made | {"v": (made["v"] + size * sign).astype(np.float32)}

    return values


def recurrences() -> Iterator[Case]:
    """LSTM, GRU and RNN."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
    for op, count in gates.items():
        for steps, hidden in ((5, 16), (20, 8), (40, 4)):
            shapes: Shapes = {"x": (steps, 1, 8)}
            for strength in (0.3, 1.0):
                weights = {
                    "w": normal((1, count * hidden, 8), 1, strength),
                    "r": normal((1, count * hidden, hidden), 2, strength),
                    "b": normal((1, 2 * count * hidden), 3, 0.1),
                }
                extra: dict[str, Any] = {"linear_before_reset": 1} if op == "GRU" and strength == 1.0 else {}
                nodes = [node(op, ["x", "w", "r", "b"], ["y"], hidden_size=hidden, **extra)]
                values = usual(shapes, ("ordinary", "wide", "tiny", "huge", "positive", "special"))
                values |= ladder(shapes, *scales(0.03, 3), rungs=5)
                yield Case(f"recurrent.{op}.{steps}.{strength:g}", op, model(nodes, shapes, weights), FLOATS, values)
    for op, count in gates.items():
        shapes = {"x": (12, 1, 8)}
        weights = {
            "w": normal((2, count * 8, 8), 1, 0.5),
            "r": normal((2, count * 8, 8), 2, 0.5),
            "b": normal((2, 2 * count * 8), 3, 0.1),
        }
        nodes = [node(op, ["x", "w", "r", "b"], ["y"], hidden_size=8, direction="bidirectional")]
        values = usual(shapes, ("ordinary", "wide", "positive"))
        yield Case(f"recurrent.{op}.both", op, model(nodes, shapes, weights), FLOATS, values)
    for steps in (25, 50):
        shapes = {"x": (steps, 1, 1)}
        big = 20.0
        w, r, b = np.zeros((1, 4, 1)), np.zeros((1, 4, 1)), np.zeros((1, 8))
        b[0, :3] = big
        w[0, 3] = 1.0
        proto = model(
            [node("LSTM", ["x", "w", "r", "b"], ["", "h", "y"], hidden_size=1)],
            shapes,
            {"w": w, "r": r, "b": b},
            outputs=("y", "h"),
        )
        values = {
            f"near{index}": feed(shapes, scaled(0.1 * float(step), float(step)))
            for index, step in enumerate(np.geomspace(1e-3, 0.1, RUNGS))
        }
        yield Case(f"recurrent.LSTM.integrator.{steps}", "LSTM", proto, FLOATS, values)


def kernels() -> Iterator[Case]:
    """Shapes that may decide which kernel runs: channels, taps, ranks, head sizes, lengths."""
    classes = ("ordinary", "positive", "offset")
    for channels in (8, 16, 24, 32, 48):
        for taps in (1, 3, 5):
            shapes: Shapes = {"x": (1, channels, 8, 8)}
            weights = {"w": _balanced((16, channels, taps, taps), 1, 1)}
            proto = model([node("Conv", ["x", "w"], ["y"], pads=[taps // 2] * 4)], shapes, weights)
            values = usual(shapes, classes) | ladder(shapes, *offsets(0.5, 100), rungs=5)
            yield Case(f"kernel.Conv.{channels}x{taps}", "Conv", proto, ("fp16", "tf32"), values)
    for channels in (16, 32):
        shapes = {"x": (2, channels, 24, 24)}
        weights = {"w": normal((64, channels, 3, 3), 1, 0.1), **_statistics(64)}
        nodes = [
            node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
            node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
            node("Relu", ["n"], ["y"]),
        ]
        values = usual(shapes, classes)
        yield Case(f"kernel.Conv.stride.{channels}", "Conv", model(nodes, shapes, weights), FLOATS, values)
    for heads, length, size in ((2, 16, 64), (4, 48, 32), (2, 64, 128), (2, 16, 16), (1, 32, 80)):
        for mask in ("none", "added"):
            shapes = dict.fromkeys("qkv", (1, heads, length, size))
            nodes = [
                node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
                node("MatMul", ["q", "kt"], ["s"]),
                node("Mul", ["s", "c"], ["d"]),
                *([node("Add", ["d", "m"], ["e"])] if mask == "added" else []),
                node("Softmax", ["e" if mask == "added" else "d"], ["p"], axis=-1),
                node("MatMul", ["p", "v"], ["y"]),
            ]
            weights = {"c": np.array(size**-0.5), "m": np.triu(np.full((length, length), -1e4, np.float32), 1)}
            values = usual(shapes, ("ordinary", "offset", "huge", "nan")) | ladder(shapes, *scales(1, 12), rungs=4)
            values |= {"beyond": feed(shapes, scaled(30, 60))}
            used = weights if mask == "added" else {"c": weights["c"]}
            name = f"kernel.attention.{heads}x{length}x{size}.{mask}"
            yield Case(name, "attention spelled out", model(nodes, shapes, used), HALF, values)
    for rank3 in ((2, 16, 32), (8, 16, 32)):
        shapes = dict.fromkeys("qkv", rank3)
        nodes = [
            node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
            node("MatMul", ["q", "kt"], ["s"]),
            node("Mul", ["s", "c"], ["d"]),
            node("Softmax", ["d"], ["p"], axis=-1),
            node("MatMul", ["p", "v"], ["y"]),
        ]
        values = usual(shapes, ("ordinary", "offset", "huge", "nan")) | ladder(shapes, *scales(1, 12), rungs=4)
        proto = model(nodes, shapes, {"c": np.array(rank3[2] ** -0.5)})
        yield Case(f"kernel.attention.rank3.{rank3[0]}", "attention spelled out", proto, HALF, values)
    rows = {"x": (8, 256)}
    weights = {"w": _balanced((256, 64), 1, 0), "b": normal((64,), 2, 0.1)}
    for name, nodes in (
        ("add", [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"], ["y"])]),
        ("relu", [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]),
        ("add_relu", [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"], ["a"]), node("Relu", ["a"], ["y"])]),
        ("softmax", [node("MatMul", ["x", "w"], ["h"]), node("Softmax", ["h"], ["y"], axis=-1)]),
        ("reshape", [node("MatMul", ["x", "w"], ["h"]), node("Transpose", ["h"], ["y"], perm=[1, 0])]),
    ):
        values = usual(rows, ("ordinary", "positive", "offset", "huge", "limit")) | ladder(rows, *offsets(0.5, 100))
        used = weights if any("b" in each.input for each in nodes) else {"w": weights["w"]}
        yield Case(f"kernel.MatMul.{name}", "MatMul", model(nodes, rows, used), FLOATS, values)
    for op, count in (("LSTM", 4), ("GRU", 3)):
        shapes = {"x": (16, 4, 16)}
        weights = {
            "w": normal((1, count * 32, 16), 1, 0.3),
            "r": normal((1, count * 32, 32), 2, 0.3),
            "b": normal((1, 2 * count * 32), 3, 0.1),
        }
        nodes = [node(op, ["x", "w", "r", "b"], ["y"], hidden_size=32)]
        values = usual(shapes, ("ordinary", "wide", "positive")) | ladder(shapes, *scales(0.1, 3), rungs=4)
        yield Case(f"kernel.{op}.batch", op, model(nodes, shapes, weights), FLOATS, values)


def _statistics(channels: int) -> dict[str, NDArray[np.float32]]:
    """What a trained batch normalization holds."""
    return {
        "g": normal((channels,), 2, 0.3) + 1,
        "b": normal((channels,), 3, 0.1),
        "m": normal((channels,), 4, 0.3),
        "v": np.exp(normal((channels,), 5, 1.0)),
    }


CASES: tuple[Callable[[], Iterator[Case]], ...] = (
    pointwise,
    binary,
    reductions,
    softmaxes,
    norms,
    pools,
    moving,
    products,
    conv_batch_norm,
    linears,
    nets,
    control,
    spelled_out,
    attentions,
    recurrences,
    kernels,
)


def cases() -> Iterator[Case]:
    """All of them."""
    for group in CASES:
        yield from group()
