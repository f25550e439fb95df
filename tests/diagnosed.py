"""What the tests of the diagnosis share: models in which a fault can be planted, and failed checks of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck import compare
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.diagnose import Subject
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import Lowered, lower
from pytest_trtcheck.precision.reference import Reference
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose import Blame
    from pytest_trtcheck.spec import Precision

FLOAT = TensorProto.FLOAT
Case = dict[str, "NDArray[Any]"]


def image(seed: int = 0, low: float = -1.0, high: float = 1.0, batch: int = 1) -> Case:
    rng = np.random.default_rng(seed)
    return {"image": rng.uniform(low, high, (batch, 3, 16, 16)).astype(np.float32)}


def conv_chain(
    length: int,
    channels: int = 8,
    *,
    extra: Mapping[int, Sequence[onnx.NodeProto]] | None = None,
    more_weights: Mapping[str, NDArray[Any]] | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """`length` blocks of Conv → Relu on "image" [batch, 3, 16, 16], then pooling and a Gemm to "logits" [batch, 10].

    Block i reads `x{i}` and gives `x{i+1}`; `extra[i]` are nodes from `r{i}`, the block's Relu, to `x{i+1}`.
    """
    nodes, weights = [], {}
    size = 3
    for index in range(length):
        result = f"r{index}" if extra and index in extra else f"x{index + 1}"
        source = f"x{index}" if index else "image"
        nodes += [
            helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], f"conv{index}", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{index}"], [result], f"relu{index}"),
            *(extra or {}).get(index, ()),
        ]
        weights[f"w{index}"] = onnx_models.weights((channels, size, 3, 3), seed + index)
        size = channels
    nodes += [
        helper.make_node("GlobalAveragePool", [f"x{length}"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "wg"], ["logits"], "gemm", transB=1),
    ]
    weights["wg"] = onnx_models.weights((10, channels), seed + 99)
    return onnx_models.model(
        nodes,
        {"image": (FLOAT, ["batch", 3, 16, 16])},
        {"logits": (FLOAT, ["batch", 10])},
        {**weights, "big": np.array(6e4, np.float32), **(more_weights or {})},
    )


def overflowing_block(index: int) -> dict[int, list[onnx.NodeProto]]:
    """Multiplies a block's result by 60,000 and divides it by as much again."""
    return {
        index: [
            helper.make_node("Mul", [f"r{index}", "big"], ["scaled_up"], "scale_up"),
            helper.make_node("Div", ["scaled_up", "big"], [f"x{index + 1}"], "scale_down"),
        ]
    }


@dataclass
class Bench:
    """Makes checks in a folder of its own."""

    folder: Path
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(self.folder / "cache")

    def failed(
        self,
        source: onnx.ModelProto | Path,
        precision: Precision,
        cases: Sequence[Case],
        *,
        tol: float | None = None,
        keep_fp32: tuple[str, ...] = (),
        calibration: object = None,
    ) -> Subject:
        """The check as the plugin would make it."""
        model = open_model(str(source) if isinstance(source, Path) else source, [Path("/")], self.cache)
        lowered = lower(model, precision, self.cache, keep_fp32=keep_fp32, calibration=calibration)
        limits = compare.resolve_limits(tol, "max", precision, [output.name for output in model.outputs])
        reference = Reference(model, self.cache)
        return Subject(model, lowered, precision, keep_fp32, calibration, [], list(cases), 0, limits, reference)

    def error(self, subject: Subject, keep_fp32: Sequence[str] = (), case: int = 0) -> float:
        """max|y − r| / max|r| over the outputs with these nodes in FP32: lowered as a check does, compared in numpy."""
        lowered = subject.lowered
        if keep_fp32:
            lowered = lower(
                subject.model,
                subject.precision,
                self.cache,
                keep_fp32=tuple(keep_fp32),
                calibration=subject.calibration,
            )
        runner = emulation(subject.model, lowered, subject.precision, self.cache)
        inputs = subject.cases[case]
        actual, expected = runner(inputs), subject.reference(inputs)
        runner.close()
        with np.errstate(invalid="ignore"):
            errors = [np.abs(actual[name] - expected[name]).max() / np.abs(expected[name]).max() for name in expected]
        return max(float(each) if np.isfinite(each) else float("inf") for each in errors)

    def requantized(self, subject: Subject, tensor: str, factor: float) -> Subject:
        """The check with the range of one tensor multiplied by `factor`, as if it had been calibrated wrongly."""
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision.lowering import quantized_by
        from pytest_trtcheck.precision.quantization import calibrate
        from pytest_trtcheck.precision.quantization.plan import points

        ranges = subject.ranges()
        found = {**ranges.tensors, tensor: replace(ranges.tensors[tensor], amax=ranges.tensors[tensor].amax * factor)}
        ranges = calibrate.Ranges(ranges.method, ranges.percentile, ranges.samples, found)
        model = graph.read(subject.model.path)
        plan = points(model, subject.keep_fp32)
        path = self.folder / f"requantized-{tensor}-{factor}.onnx"
        graph.write(quantized_by(model, plan, ranges.amax(), subject.precision, subject.keep_fp32)[0], path)
        import json

        details = {**subject.lowered.details, "ranges": json.loads(ranges.to_json())}
        return replace(subject, lowered=Lowered(path, f"{tensor} {factor}", (), details))


def all_tensors(path: Path, case: Case) -> Case:
    """Every computed float tensor of a model, by making all of them outputs of a plain ONNX Runtime session."""
    import onnxruntime

    proto = onnx.shape_inference.infer_shapes(onnx.load(path))
    known = {output.name for output in proto.graph.output}
    for value in proto.graph.value_info:
        if value.type.tensor_type.elem_type == FLOAT and value.name not in known:
            proto.graph.output.append(value)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, case), strict=True))


def weight(proto: onnx.ModelProto, name: str) -> NDArray[Any]:
    """An initializer's values."""
    tensor = next(each for each in proto.graph.initializer if each.name == name)
    return numpy_helper.to_array(tensor)


def set_weight(proto: onnx.ModelProto, name: str, values: NDArray[Any]) -> None:
    """Replace an initializer."""
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(values, name))


def assert_users_names(subject: Subject, found: Blame) -> None:
    """Every name that a diagnosis says is one that the user's own file has, or that its unnamed nodes get."""
    from pytest_trtcheck.model import graph

    model = graph.read(subject.model.path)
    nodes = list(graph.all_nodes(model.graph))
    names = {node.name for node in nodes}
    tensors = {value.name for node in nodes for value in (*node.inputs, *node.outputs) if value is not None}
    said = {*(found.keep_fp32 or ()), *found.others, *(each["node"] for each in found.contributions)}
    shown = {row["name"] for row in found.tensors}
    if found.culprit is not None:
        said.add(found.culprit.node)
        shown.add(found.culprit.tensor)
    assert said <= names, said - names
    assert {row["node"] for row in found.tensors if row["node"]} <= names
    assert shown <= tensors, shown - tensors
