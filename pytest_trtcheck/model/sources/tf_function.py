"""A TensorFlow function as ONNX, by tf2onnx: what Keras models and SavedModels have in common.

tf2onnx is used, not Keras' own `export(format="onnx")`, which wraps it: that one refuses models that were not called
yet, loses the names of inputs and outputs, and takes the constants that a function captured for inputs (a Normalization
layer's mean). Tensors keep the names that they have in TensorFlow's graph, by which `inside` finds them again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import CheckError, MissingDependencyError, ModelError, first_line, listed
from pytest_trtcheck.model.proto import all_nodes
from pytest_trtcheck.model.sources.exported import SCOPES, Inner

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import onnx

    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.sources.exported import Outputs

OPSET = 18
"""The newest that tf2onnx writes. TensorRT's Q/DQ per axis needs 13; `lower` raises it where a type needs more."""
_BATCH = "batch"
_SIZES = {True: (2, 3), False: (64, 96)}
"""Two sizes for a dimension that is left open: of the batch, and of another, which five strides of 2 divide."""
_TENSORRT_OPERATOR = "TRTEngineOp"
_SAME: dict[str, tuple[str, ...]] = {
    **{
        name: (name,)
        for name in [
            "Add",
            "Elu",
            "Erf",
            "Exp",
            "Gelu",
            "Log",
            "Mul",
            "Neg",
            "Relu",
            "Selu",
            "Sigmoid",
            "Softmax",
            "Softplus",
            "Sqrt",
            "Sub",
            "Tanh",
        ]
    },
    "AddV2": ("Add", "LayerNormalization"),
    "AvgPool": ("AveragePool",),
    "BatchMatMulV2": ("MatMul",),
    "BatchMatMulV3": ("MatMul",),
    "BiasAdd": ("Add", "Conv", "Gemm"),
    "ConcatV2": ("Concat",),
    "FusedBatchNormV3": ("BatchNormalization",),
    "GatherV2": ("Gather",),
    "LeakyRelu": ("LeakyRelu",),
    "MatMul": ("MatMul",),
    "MaxPool": ("MaxPool",),
    "Mean": ("ReduceMean",),
    "RealDiv": ("Div",),
    "Relu6": ("Clip",),
    "Reshape": ("Reshape",),
    "Sum": ("ReduceSum",),
}
"""TensorFlow's operators that are one of ONNX's, with the same result. Where tf2onnx makes several nodes of one, the
first keeps the name of a result that only the last one has (Rsqrt's is that of the Sqrt)."""
_DISTRIBUTIONS = ("tensorflow", "tensorflow-cpu", "tensorflow-cpu-aws", "tensorflow-macos", "tf-nightly")


@dataclass(frozen=True)
class Function:
    """What a TensorFlow model computes, from tensors to tensors.

    Parameters
    ----------
    compute
        Takes one tensor an input, in order, and gives the outputs by name.
    inputs
        Their tf.TensorSpec by name; None stands for a size that is left open.
    name
        The model's own.
    layers
        The names of its layers, where they are known.
    """

    compute: Callable[..., Mapping[str, Any]]
    inputs: Mapping[str, Any]
    name: str = ""
    layers: Collection[str] = ()

    @cached_property
    def traced(self) -> Any:
        """Its tf.ConcreteFunction, whose outputs come in the order of their sorted names."""
        return self.traced_with(self.inputs.values())

    def traced_with(self, specs: Iterable[Any]) -> Any:
        """The same for inputs of these tf.TensorSpec."""
        import tensorflow as tf

        def compute(*tensors: Any) -> dict[str, Any]:
            # Each output has a node of its own, also where two of them are one tensor, or an input.
            return {name: tf.identity(value) for name, value in self.compute(*tensors).items()}

        # A name of the user's may be none that TensorFlow takes: they are known by their place.
        numbered = [tf.TensorSpec(spec.shape, spec.dtype, f"input_{n}") for n, spec in enumerate(specs)]
        return tf.function(compute).get_concrete_function(*numbered)

    @cached_property
    def frozen(self) -> Any:
        """The traced function with its variables as constants, and everything it calls within it."""
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

        return convert_variables_to_constants_v2(self.traced, lower_control_flow=False, aggressive_inlining=True)

    @property
    def outputs(self) -> list[str]:
        """The names of its outputs, as `traced` orders them."""
        return sorted(self.traced.structured_outputs)


class TensorFlowOrigin:
    """A TensorFlow model that computes by itself, in FP32 on the CPU; it is loaded when that is first asked for."""

    def __init__(self, title: str, identity: str, load: Callable[[], Function]) -> None:
        self.title = title
        self.identity = identity
        self._load = load

    @cached_property
    def function(self) -> Function:
        """What it computes."""
        return self._load()

    def __call__(self, case: Case) -> Outputs:
        """Its outputs by name."""
        function = self.function
        with _on_cpu(), failing(f"{self.title} failed to compute"):
            return {name: _array(value) for name, value in function.compute(*_tensors(function, case)).items()}

    def inside(self, case: Case, export: onnx.ModelProto) -> Iterator[Inner]:
        """The tensors of TensorFlow's graph that the export has under the same name."""
        function = self.function
        with _on_cpu(), failing(f"{self.title} failed to compute its inner values"):
            frozen = function.frozen
            wanted = _shared(export, frozen.graph)
            elements = [frozen.graph.as_graph_element(name) for name in wanted]
            values = frozen.prune(frozen.inputs, elements)(*_tensors(function, case)) if elements else []
            arrays = [_array(value) for value in values]
        for (name, node), array in zip(wanted.items(), arrays, strict=True):
            for value in _layouts(array):
                yield Inner(_path(node, function.layers) or node, (name,), value)


def require() -> None:
    """Refuse to go on without TensorFlow, Keras and tf2onnx.

    Raises
    ------
    MissingDependencyError
        One of them is not installed.
    """
    import importlib.util

    missing = [name for name in ("tensorflow", "keras", "tf2onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, which Keras models and "
            "SavedModels are exported with",
            "pip install 'pytest-trtcheck[tensorflow]' (or tensorflow-cpu, keras and tf2onnx)",
        )


def versions() -> dict[str, str]:
    """What the export depends on beside the model, by name; nothing is imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    from pytest_trtcheck.cache import hash_code

    def found(*names: str) -> str:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return "unknown"

    return {
        "tensorflow": found(*_DISTRIBUTIONS),
        "keras": found("keras"),
        "tf2onnx": found("tf2onnx"),
        "onnx": found("onnx"),
        "opset": str(OPSET),
        "code": hash_code(
            "model/layer_norm.py",
            "model/sources/tf_function.py",
            "model/sources/keras_model.py",
            "model/sources/saved_model.py",
        ),
    }


def identity(function: Function) -> str:
    """Of everything that a function computes: its graph, whatever its nodes are called, and its variables' values."""
    traced = function.traced
    graph = traced.graph.as_graph_def()
    arguments = [tensor.op.name for tensor in traced.inputs]
    results = [tensor.name for tensor in traced.outputs]
    digest = hashlib.sha256(_Meaning(graph.library).of(graph.node, arguments, results).encode())
    digest.update(repr([(name, spec.dtype.name, str(spec.shape)) for name, spec in function.inputs.items()]).encode())
    # Nodes of the export are named after these.
    digest.update(repr([function.outputs, function.name, sorted(function.layers)]).encode())
    variables = [variable.numpy() for variable in traced.variables]
    constants = [value.numpy() for value in traced.captured_inputs if value.dtype.name != "resource"]
    for array in (*variables, *constants):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class _Meaning:
    """Hashes of graphs and functions, the same in every trace: TensorFlow numbers names through the process."""

    _NO_MEANING = frozenset({"config", "config_proto", "container", "executor_type", "shared_name"})

    def __init__(self, library: Any) -> None:
        self._functions = {function.signature.name: function for function in library.function}
        self._known: dict[str, str] = {}

    def of(self, nodes: Iterable[Any], arguments: Iterable[str], results: Sequence[str]) -> str:
        """Of what `results` are, computed from `arguments`; each node's hash holds those of what it reads."""
        by_name = {node.name: node for node in nodes}
        found = {name: f"argument {place}" for place, name in enumerate(arguments)}
        waiting = [_source(each) for each in results]
        while waiting:
            node = by_name.get(waiting[-1])
            if node is None or node.name in found:
                waiting.pop()
            elif unknown := [each for each in map(_source, node.input) if each not in found and each in by_name]:
                waiting += unknown
            else:
                found[waiting.pop()] = self._node(node, found)
        return _hashed(*(self._read(each, found) for each in results))

    def _node(self, node: Any, found: Mapping[str, str]) -> str:
        attributes = [
            f"{name} {self._attribute(node.attr[name])}"
            for name in sorted(node.attr)
            if name not in self._NO_MEANING and not name.startswith("_")
        ]
        return _hashed(node.op, *attributes, *(self._read(each, found) for each in node.input))

    def _read(self, text: str, found: Mapping[str, str]) -> str:
        source = _source(text)
        return text.replace(source, found.get(source, source), 1)

    def _attribute(self, value: Any) -> str:
        called = [value.func] if value.HasField("func") else value.list.func
        if called:
            return " ".join(self._function(each.name) for each in called)
        data: bytes = value.SerializeToString(deterministic=True)
        return data.hex()

    def _function(self, name: str) -> str:
        function = self._functions.get(name)
        if function is None:
            return name
        if name not in self._known:
            arguments = [each.name for each in function.signature.input_arg]
            results = [function.ret[each.name] for each in function.signature.output_arg]
            self._known[name] = self.of(function.node_def, arguments, results)
        return self._known[name]


def _source(text: str) -> str:
    """The node that an input of a node names: "name", "name:0", "name:output:0" or "^name"."""
    return text.removeprefix("^").partition(":")[0]


def _hashed(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def write(path: Path, function: Function, label: str) -> None:
    """Export a function to ONNX.

    Raises
    ------
    ModelError
        TensorFlow can't trace it, or ONNX has no form of one of its operators; the message names operator and layer.
    """
    import onnx

    from pytest_trtcheck.model import layer_norm

    with _on_cpu(), failing(f"{label}: can't be exported to ONNX"), _quiet() as said:
        graph = _inlinable(_without_wrapping(function.frozen.graph.as_graph_def(add_shapes=True), function.frozen))
        proto = _converted(graph, function)
        _refuse_unknown(proto, label, said, function.layers)
        layer_norm.join(proto)
        _name_dimensions(proto, function)
        for node in all_nodes(proto.graph.node):
            _add_scopes(node, function.layers)
    try:
        onnx.save(proto, path)
    except ValueError as error:
        raise ModelError(
            f"{label}: is larger than the 2 GiB that one ONNX file holds",
            "convert it by `python -m tf2onnx.convert --large_model`, unpack what that writes, and give the path",
        ) from error


def _converted(graph: Any, function: Function) -> onnx.ModelProto:
    import tf2onnx

    inputs, outputs = ([tensor.name for tensor in each] for each in (function.frozen.inputs, function.frozen.outputs))
    handlers = {"Erfc": _erfc, "Expm1": _expm1}
    proto, _ = tf2onnx.convert.from_graph_def(
        graph,
        input_names=inputs,
        output_names=outputs,
        opset=OPSET,
        custom_op_handlers={name: (handler, []) for name, handler in handlers.items()},
        tensors_to_rename=dict(zip([*inputs, *outputs], [*function.inputs, *function.outputs], strict=True)),
    )
    converted: onnx.ModelProto = proto
    return converted


def refuse_engines(graph: Any, label: str) -> None:
    """Refuse a tf.GraphDef that TF-TRT made.

    Raises
    ------
    ModelError
        It holds engines of TensorRT.
    """
    if engines := [node.name for node in _nodes(graph) if node.op == _TENSORRT_OPERATOR]:
        raise ModelError(
            f"{label}: was converted by TF-TRT: it holds {_TENSORRT_OPERATOR} {listed(engines)}, whose own operators "
            "can't be seen any more",
            "give the SavedModel or the Keras model that it was converted from",
        )


def _nodes(graph: Any) -> list[Any]:
    return [*graph.node, *(node for function in graph.library.function for node in function.node_def)]


def _inlinable(graph: Any) -> Any:
    """The tf.GraphDef, its functions free to be inlined, which tf2onnx needs of them.

    Keras compiles grouped convolutions by XLA, and what must be compiled is left as it is.
    """
    for holder in (*_nodes(graph), *graph.library.function):
        for attribute in ("_XlaMustCompile", "_noinline"):
            holder.attr.pop(attribute, None)
    return graph


def _without_wrapping(graph: Any, frozen: Any) -> Any:
    """The tf.GraphDef of `frozen`, a table of n rows read at `i` and not at `i + n if i < 0 else i`.

    Keras writes the latter, because TensorFlow takes no negative index; ONNX's Gather does, and means the same by it.
    What is left tells that an input is an index, and how many rows there are.
    """
    import tensorflow as tf

    operations = {each.name: each for each in frozen.graph.get_operations()}

    def value(tensor: Any) -> Any:
        if tensor.op.type != "StridedSlice":
            return tf.get_static_value(tensor)
        # A size, which is an element of a constant shape.
        shape, begin, end, step = map(tf.get_static_value, tensor.op.inputs)
        is_element = all(each is not None and each.size == 1 for each in (begin, end, step)) and tensor.shape.rank == 0
        return shape[begin[0] : end[0] : step[0]].item() if is_element and shape is not None else None

    for node in graph.node:
        chosen = operations[node.name].inputs[1].op if node.op == "GatherV2" else None
        if chosen is None or chosen.type not in {"Select", "SelectV2"}:
            continue
        less, added, index = chosen.inputs[0].op, chosen.inputs[1].op, chosen.inputs[2]
        if less.type != "Less" or added.type not in {"Add", "AddV2"}:
            continue
        if not less.inputs[0].name == added.inputs[0].name == index.name:
            continue
        table, axis = operations[node.name].inputs[0], value(operations[node.name].inputs[2])
        if value(less.inputs[1]) == 0 and axis == 0 and value(added.inputs[1]) == table.shape[0]:
            node.input[1] = index.name.removesuffix(":0")
    return graph


def _erfc(context: Any, node: Any, name: str, _: object) -> None:
    """1 − erf(x), which tf2onnx does not know; Keras' exact GELU is made of it."""
    _less_one(context, node, name, "Erf", one_first=True)


def _expm1(context: Any, node: Any, name: str, _: object) -> None:
    """exp(x) − 1, which tf2onnx does not know."""
    _less_one(context, node, name, "Exp", one_first=False)


def _less_one(context: Any, node: Any, name: str, operator: str, *, one_first: bool) -> None:
    import numpy as np
    from tf2onnx import utils

    (output,) = node.output
    dtype, shape = context.get_dtype(output), context.get_shape(output)
    inputs = list(node.input)
    context.remove_node(node.name)
    one = context.make_const(f"{name}/one", np.ones((), utils.map_onnx_to_numpy_type(dtype))).output[0]
    value = context.make_node(operator, inputs, name=f"{name}/{operator}", dtypes=[dtype], shapes=[shape]).output[0]
    operands = [one, value] if one_first else [value, one]
    context.make_node("Sub", operands, name=name, outputs=[output], dtypes=[dtype], shapes=[shape])


def _refuse_unknown(proto: onnx.ModelProto, label: str, said: Sequence[str], layers: Collection[str]) -> None:
    """What tf2onnx could not convert it leaves in the graph under TensorFlow's name."""
    import onnx

    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    unknown = [
        node for node in all_nodes(proto.graph.node) if node.domain in {"", "ai.onnx"} and node.op_type not in known
    ]
    if unknown:
        found = dict.fromkeys(f"{node.op_type} in {_path(node.name, layers) or node.name}" for node in unknown)
        raise ModelError(
            f"{label}: can't be exported to ONNX: tf2onnx has no ONNX form of TensorFlow's {listed(found, 5)}",
            "compute that part with other operators, or outside of the model",
        )
    if failed := [each for each in said if "Failed to convert" in each]:
        raise ModelError(f"{label}: can't be exported to ONNX: {listed(map(first_line, failed))}")


# --- names -----------------------------------------------------------------------------------------------------------


def _name_dimensions(proto: onnx.ModelProto, function: Function) -> None:
    """Give a size that is left open one name wherever it occurs: the batch, and the others by input and axis."""
    names = {
        (name, axis): _BATCH if axis == 0 else f"{name}_{axis}"
        for name, spec in function.inputs.items()
        if spec.shape.rank is not None
        for axis, size in enumerate(spec.shape)
        if size is None
    }
    follows = _following(function, names)
    for value in proto.graph.value_info:
        _name_open(value, {})
    for value in proto.graph.input:
        _name_open(value, {axis: symbol for (name, axis), symbol in names.items() if name == value.name})
    for value in proto.graph.output:
        _name_open(value, follows.get(value.name, {}))


def _name_open(value: onnx.ValueInfoProto, names: Mapping[int, str]) -> None:
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if not dim.HasField("dim_value") or dim.dim_value < 0:
            dim.Clear()
            if axis in names:
                dim.dim_param = names[axis]


def _following(function: Function, names: Mapping[tuple[str, int], str]) -> dict[str, dict[int, str]]:
    """Which axes of the outputs have the size of an open dimension of the inputs, told by TensorFlow's own inference.

    Each dimension has one size, then another; what changes from the one to the other follows it.
    """
    symbols = list(dict.fromkeys(names.values()))
    sizes = {symbol: _SIZES[symbol == _BATCH] for symbol in symbols}
    usual = {symbol: sizes[symbol][0] for symbol in symbols}
    base = _output_shapes(function, names, usual)
    found: dict[str, dict[int, str]] = {}
    for symbol in symbols:
        varied = _output_shapes(function, names, {**usual, symbol: sizes[symbol][1]})
        for name, shape in base.items():
            other = varied.get(name, ())
            for axis, pair in enumerate(zip(shape, other, strict=False)):
                if pair == sizes[symbol]:
                    found.setdefault(name, {})[axis] = symbol
    return found


def _output_shapes(
    function: Function, names: Mapping[tuple[str, int], str], sizes: Mapping[str, int]
) -> dict[str, tuple[int | None, ...]]:
    """The outputs' shapes for these sizes; nothing where the function does not take them."""
    import tensorflow as tf

    specs = [
        tf.TensorSpec(
            [sizes[names[name, axis]] if (name, axis) in names else size for axis, size in enumerate(spec.shape)]
            if spec.shape.rank is not None
            else None,
            spec.dtype,
        )
        for name, spec in function.inputs.items()
    ]
    try:
        traced = function.traced_with(specs)
    except Exception:
        return {}
    shapes = {name: spec.shape for name, spec in traced.structured_outputs.items()}
    return {name: tuple(shape) for name, shape in shapes.items() if shape.rank is not None}


def _path(node: str, layers: Collection[str]) -> str:
    """The layer that a node of TensorFlow's graph is in, "encoder/attention/query"; empty where it is in none.

    TensorFlow makes a scope's name unique by a number behind it, which is taken off where a layer has the name without.
    """
    scopes = []
    for scope in node.split("/")[:-1]:
        plain = re.sub(r"_\d+$", "", scope)
        scopes.append(scope if scope in layers else plain)
    named = [scope for scope in scopes if scope in layers]
    if layers:
        return "/".join(named)
    return "/".join(scope for scope in node.split("/")[:-1] if "PartitionedCall" not in scope)


def _add_scopes(node: onnx.NodeProto, layers: Collection[str]) -> None:
    parts = _path(node.name, layers).split("/")
    if parts != [""]:
        scopes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        node.metadata_props.add(key=SCOPES, value=json.dumps(scopes))


def _shared(export: onnx.ModelProto, graph: Any) -> dict[str, str]:
    """The tensors that the export and TensorFlow's graph have both, and the nodes of the export that make them.

    tf2onnx's optimizer reorders products, and what bears a name then is another value: what a node reads must be what
    TensorFlow's operator reads, or the one before that where both became one node.
    """
    makers = {tensor.name: each for each in graph.get_operations() for tensor in each.outputs}
    found = {}
    for node in export.graph.node:
        for name in node.output:
            maker = makers.get(name)
            if maker is None or node.op_type not in _SAME.get(maker.type, ()):
                continue
            before = [tensor for source in maker.inputs for tensor in source.op.inputs]
            read = {tensor.name for tensor in (*maker.inputs, *before)}
            if all(each in read for each in node.input if each in makers):
                found[name] = node.name
    return found


# --- computing -------------------------------------------------------------------------------------------------------


def _tensors(function: Function, case: Case) -> list[Any]:
    import tensorflow as tf

    return [tf.constant(case[name], spec.dtype) for name, spec in function.inputs.items()]


def _array(value: Any) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.asarray(value)


def _layouts(array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """A value as the export may hold it: channels are its second axis around convolutions, and TensorFlow's last.

    None where both have one shape: it could not be told which of them is there.
    """
    import numpy as np

    if array.ndim < 3:
        return [array]
    moved = np.moveaxis(array, -1, 1)
    return [array, moved] if array.shape != moved.shape else []


@contextmanager
def _on_cpu() -> Iterator[None]:
    """TensorFlow on the CPU: a GPU would compute in TF32, and TensorFlow take all of its memory."""
    import tensorflow as tf

    with tf.device("/CPU:0"), warnings.catch_warnings():
        # What TensorFlow deprecates is no error of the user's test.
        warnings.simplefilter("ignore")
        yield


def load_tensorflow() -> None:
    """Import TensorFlow; where that is done for us alone, it leaves the GPU to TensorRT.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    import sys

    require()
    ours = "tensorflow" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    if ours:
        tf.config.set_visible_devices([], "GPU")


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Anything that TensorFlow or tf2onnx raises is an error of the model."""
    try:
        yield
    except CheckError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {type(error).__name__}: {said(error)}") from error


def said(error: Exception) -> str:
    """The line of an error of Keras or TensorFlow that tells most: their first one often says that there is another."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    telling = (line for line in lines if re.search(r"Could not locate|is not in \[|unsafe|Cannot |not supported", line))
    usual = (line for line in lines if not re.match(r"Graph execution error|Exception encountered|Detected at", line))
    found = next(telling, None) or next(usual, None) or type(error).__name__
    return re.sub(r"^Exception encountered: |\{\{[^}]*\}\} ", "", found).partition(" Full object config")[0]


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """tf2onnx's errors as a list, and nothing on the terminal of what it and TensorFlow say."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("tf2onnx"), Listening(logging.ERROR)
    with ExitStack() as stack:
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        stack.callback(setattr, logger, "propagate", logger.propagate)
        logger.propagate = False
        tensorflow = logging.getLogger("tensorflow")
        stack.callback(tensorflow.setLevel, tensorflow.level)
        tensorflow.setLevel(logging.ERROR)
        yield said
