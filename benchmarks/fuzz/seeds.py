"""The models that fuzzing starts from, small and of many kinds: ``python benchmarks/fuzz/seeds.py`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

CORPUS = Path(__file__).parent / "corpus"
FLOAT, HALF, INT64, BOOL, TEXT = (
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "INT64", "BOOL", "STRING")
)
Values = "Mapping[str, tuple[int, Sequence[int | str]]]"
node = helper.make_node


def weight(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


def infos(values: Mapping[str, tuple[int, Sequence[int | str]]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in values.items()]


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Mapping[str, tuple[int, Sequence[int | str]]],
    weights: Mapping[str, NDArray[Any]] | None = None,
    opset: int = 17,
    **more: Any,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "seed", infos(inputs), infos(outputs), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9, **more)


def convolutions() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c1", "s", "b1", "m", "v"], ["n1"], name="norm"),
        node("Relu", ["n1"], ["r1"], name="relu"),
        node("MaxPool", ["r1"], ["p1"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p1"], ["g1"], name="mean"),
        node("Flatten", ["g1"], ["f1"], name="flatten"),
        node("Gemm", ["f1", "w2"], ["l1"], name="gemm", transB=1),
        node("Softmax", ["l1"], ["y"], name="softmax"),
    ]
    ones = np.ones(4, np.float32)
    weights = {
        "w1": weight(4, 3, 3, 3),
        "b1": weight(4),
        "s": ones,
        "m": weight(4, seed=2),
        "v": ones,
        "w2": weight(5, 4),
    }
    return model(nodes, {"x": (FLOAT, ["batch", 3, 8, 8])}, {"y": (FLOAT, ["batch", 5])}, weights)


def detector() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w"], ["all"], name="head"),
        node("Split", ["all", "sizes"], ["boxes", "scores"], name="split", axis=2),
        node("Sigmoid", ["scores"], ["p"], name="sigmoid"),
        node("Concat", ["boxes", "p"], ["found"], name="join", axis=2),
        node("Slice", ["found", "from", "to", "axes"], ["y"], name="slice"),
    ]
    weights = {
        "w": weight(6, 9),
        "sizes": np.array([4, 5]),
        "from": np.array([0]),
        "to": np.array([6]),
        "axes": np.array([1]),
    }
    return model(nodes, {"x": (FLOAT, ["n", 7, 6])}, {"y": (FLOAT, ["n", 6, 9]), "p": (FLOAT, ["n", 7, 5])}, weights)


def attention() -> onnx.ModelProto:
    nodes = [
        node("ReduceMean", ["x"], ["mean"], name="mean", axes=[-1]),
        node("Sub", ["x", "mean"], ["d"], name="centre"),
        node("Pow", ["d", "two"], ["sq"], name="square"),
        node("ReduceMean", ["sq"], ["var"], name="var", axes=[-1]),
        node("Add", ["var", "eps"], ["ve"], name="add_eps"),
        node("Sqrt", ["ve"], ["std"], name="sqrt"),
        node("Div", ["d", "std"], ["norm"], name="div"),
        node("MatMul", ["norm", "wq"], ["q"], name="q"),
        node("MatMul", ["norm", "wk"], ["k"], name="k"),
        node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"], name="scores"),
        node("Softmax", ["s"], ["a"], name="softmax"),
        node("MatMul", ["a", "norm"], ["o"], name="mix"),
        node("Add", ["o", "x"], ["y"], name="residual"),
    ]
    weights: dict[str, Any] = {
        "two": np.float32(2),
        "eps": np.float32(1e-5),
        "wq": weight(8, 8),
        "wk": weight(8, 8, seed=1),
    }
    arrays = {name: np.asarray(each) for name, each in weights.items()}
    return model(nodes, {"x": (FLOAT, ["b", "t", 8])}, {"y": (FLOAT, ["b", "t", 8])}, arrays)


def recurrent() -> onnx.ModelProto:
    nodes = [
        node("LSTM", ["x", "w", "r", "b"], ["h", "", "c"], name="lstm", hidden_size=4),
        node("Squeeze", ["h", "one"], ["s"], name="squeeze"),
        node("GRU", ["s", "gw", "gr"], ["", "last"], name="gru", hidden_size=3),
        node("Identity", ["last"], ["y"], name="out"),
    ]
    weights = {
        "w": weight(1, 16, 5),
        "r": weight(1, 16, 4),
        "b": weight(1, 32),
        "one": np.array([1]),
        "gw": weight(1, 9, 4),
        "gr": weight(1, 9, 3),
    }
    return model(nodes, {"x": (FLOAT, [6, "b", 5])}, {"y": (FLOAT, [1, "b", 3])}, weights)


def quantized() -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "sx", "z"], ["xq"], name="q_x"),
        node("DequantizeLinear", ["xq", "sx", "z"], ["xd"], name="dq_x"),
        node("QuantizeLinear", ["w", "sw", "zw"], ["wq"], name="q_w", axis=0),
        node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], name="dq_w", axis=0),
        node("Conv", ["xd", "wd"], ["y"], name="conv"),
    ]
    weights: dict[str, Any] = {
        "sx": np.asarray(np.float32(0.01)),
        "z": np.asarray(np.int8(0)),
        "w": weight(4, 3, 3, 3),
        "sw": np.full(4, 0.01, np.float32),
        "zw": np.zeros(4, np.int8),
    }
    return model(nodes, {"x": (FLOAT, [1, 3, 8, 8])}, {"y": (FLOAT, [1, 4, 6, 6])}, weights)


def branches() -> onnx.ModelProto:
    def body(name: str, op: str) -> onnx.GraphProto:
        return helper.make_graph(
            [node(op, ["x"], [name], name=f"inner_{name}")], name, [], infos({name: (FLOAT, ["n"])})
        )

    step = helper.make_graph(
        [node("MatMul", ["state", "w"], ["next"], name="step"), node("Identity", ["go"], ["on"], name="on")],
        "loop",
        infos({"i": (INT64, []), "go": (BOOL, []), "state": (FLOAT, [1, 4])}),
        infos({"on": (BOOL, []), "next": (FLOAT, [1, 4])}),
    )
    scanned = helper.make_graph(
        [node("Add", ["acc", "each"], ["sum"], name="sum"), node("Identity", ["sum"], ["emit"], name="emit")],
        "scan",
        infos({"acc": (FLOAT, [1, 4]), "each": (FLOAT, [1, 4])}),
        infos({"sum": (FLOAT, [1, 4]), "emit": (FLOAT, [1, 4])}),
    )
    nodes = [
        node("ReduceSum", ["x"], ["total"], name="total", keepdims=0),
        node("Greater", ["total", "zero"], ["more"], name="more"),
        node("If", ["more"], ["chosen"], name="if", then_branch=body("a", "Relu"), else_branch=body("b", "Neg")),
        node("Reshape", ["chosen", "shape"], ["row"], name="row"),
        node("Loop", ["trips", "yes", "row"], ["looped"], name="loop", body=step),
        node("Unsqueeze", ["looped", "zeros"], ["list"], name="list"),
        node("Scan", ["looped", "list"], ["y", "z"], name="scan", body=scanned, num_scan_inputs=1),
    ]
    weights = {
        "zero": np.asarray(np.float32(0)),
        "shape": np.array([1, 4]),
        "trips": np.asarray(3),
        "yes": np.asarray(True),
        "w": weight(4, 4),
        "zeros": np.array([0]),
    }
    return model(nodes, {"x": (FLOAT, [4])}, {"y": (FLOAT, [1, 4]), "z": (FLOAT, ["s", 1, 4])}, weights)


def functions() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 17)]
    body = [node("Mul", ["a", "a"], ["s"], name="sq"), node("Add", ["s", "a"], ["b"], name="plus")]
    made = helper.make_function("local", "Square", ["a"], ["b"], body, opsets)
    nodes = [
        node("Square", ["x"], ["q"], name="call", domain="local"),
        node("MatMul", ["q", "w"], ["y"], name="product"),
    ]
    found = model(nodes, {"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["n", 4])}, {"w": weight(4, 4)}, functions=[made])
    found.opset_import.add(domain="local", version=1)
    return found


def embedding() -> onnx.ModelProto:
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("Where", ["mask", "e", "none"], ["m"], name="mask"),
        node("ReduceMax", ["m"], ["y"], name="pool", axes=[1], keepdims=0),
        node("TopK", ["y", "k"], ["best", "which"], name="top"),
    ]
    weights = {"table": weight(11, 6), "none": np.asarray(np.float32(-1e9)), "k": np.array([2])}
    inputs: dict[str, Any] = {"ids": (INT64, ["b", 5]), "mask": (BOOL, ["b", 5, 1])}
    outputs: dict[str, Any] = {"y": (FLOAT, ["b", 6]), "best": (FLOAT, ["b", 2]), "which": (INT64, ["b", 2])}
    return model(nodes, inputs, outputs, weights)


def shapes() -> onnx.ModelProto:
    nodes = [
        node("Shape", ["x"], ["shape"], name="shape"),
        node("Constant", [], ["i"], name="i", value_ints=[0]),
        node("Gather", ["shape", "i"], ["n"], name="n"),
        node("Constant", [], ["rest"], name="rest", value=numpy_helper.from_array(np.array([2, 8]), "v")),
        node("Concat", ["n", "rest"], ["to"], name="to", axis=0),
        node("Reshape", ["x", "to"], ["r"], name="reshape"),
        node("ConstantOfShape", ["to"], ["c"], name="fill"),
        node("Add", ["r", "c"], ["a"], name="add"),
        node("Expand", ["a", "to"], ["e"], name="expand"),
        node("Tile", ["e", "times"], ["t"], name="tile"),
        node("Pad", ["t", "pads"], ["p"], name="pad"),
        node("Resize", ["p", "", "scales"], ["y"], name="resize"),
    ]
    weights = {
        "times": np.array([1, 2, 1]),
        "pads": np.array([0, 1, 1, 0, 1, 1]),
        "scales": np.array([1, 1, 2], np.float32),
    }
    return model(nodes, {"x": (FLOAT, ["n", 16])}, {"y": (FLOAT, ["n", 6, 20])}, weights)


def half() -> onnx.ModelProto:
    nodes = [
        node("Cast", ["x"], ["h"], name="down", to=HALF),
        node("MatMul", ["h", "w"], ["p"], name="product"),
        node("Cast", ["p"], ["y"], name="up", to=FLOAT),
    ]
    return model(nodes, {"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["n", 4])}, {"w": weight(4, 4).astype(np.float16)})


def texts() -> onnx.ModelProto:
    return model([node("Identity", ["t"], ["y"], name="same")], {"t": (TEXT, ["n"])}, {"y": (TEXT, ["n"])})


def sparse() -> onnx.ModelProto:
    found = model([node("MatMul", ["x", "w"], ["y"], name="p")], {"x": (FLOAT, [2, 3])}, {"y": (FLOAT, [2, 3])})
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "w")
    places = numpy_helper.from_array(np.array([1, 5]), "w_indices")
    found.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3, 3]))
    return found


def normalized() -> onnx.ModelProto:
    nodes = [
        node("LayerNormalization", ["x", "s", "b"], ["n"], name="norm"),
        node("Gelu", ["n"], ["g"], name="gelu"),
        node("Einsum", ["g", "w"], ["e"], name="einsum", equation="bij,jk->bik"),
        node("ReduceL2", ["e", "axes"], ["y"], name="norm2"),
    ]
    weights = {"s": np.ones(4, np.float32), "b": weight(4), "w": weight(4, 3), "axes": np.array([1])}
    return model(nodes, {"x": (FLOAT, ["b", 3, 4])}, {"y": (FLOAT, ["b", 1, 3])}, weights, opset=20)


def external() -> onnx.ModelProto:
    """Its weights lie in `weights.bin` beside it."""
    found = model(
        [node("Gemm", ["x", "w", "b"], ["y"], name="gemm")], {"x": (FLOAT, ["n", 8])}, {"y": (FLOAT, ["n", 8])}
    )
    for name, array, offset in (("w", weight(8, 8), 0), ("b", weight(8), 256)):
        tensor = found.graph.initializer.add(name=name, data_type=FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
    return found


def context() -> onnx.ModelProto:
    """An engine as ONNX Runtime keeps it; the bytes are the beginning of one."""
    each = node("EPContext", ["x"], ["y"], name="engine", domain="com.microsoft", embed_mode=1, main_context=1)
    each.attribute.append(helper.make_attribute("ep_cache_context", b"ftrt" + bytes(60)))
    each.attribute.append(helper.make_attribute("source", "NvTensorRTRTXExecutionProvider"))
    found = model([each], {"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [1, 4])})
    found.opset_import.add(domain="com.microsoft", version=1)
    return found


MODELS = (
    *(convolutions, detector, attention, recurrent, quantized, branches, functions, embedding, shapes, half, texts),
    *(sparse, normalized),
)


def main() -> None:
    folder = CORPUS / "onnx"
    folder.mkdir(parents=True, exist_ok=True)
    for make in MODELS:
        proto = make()
        onnx.checker.check_model(proto)
        (folder / f"{make.__name__}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    (CORPUS / "external").mkdir(exist_ok=True)
    (CORPUS / "external" / "model.onnx").write_bytes(external().SerializeToString(deterministic=True))
    (CORPUS / "external" / "weights.bin").write_bytes(np.concatenate([weight(8, 8).ravel(), weight(8)]).tobytes())
    (CORPUS / "engine").mkdir(exist_ok=True)
    (CORPUS / "engine" / "context.onnx").write_bytes(context().SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
