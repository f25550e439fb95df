"""An ONNX model on disk: its identity, its inputs and outputs, and what is wrong with the file.

Only the graph is read here; weights stay on disk. `onnx` alone is imported, which costs 0.1 s.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_trtcheck.cache import HashedFile, format_bytes, hashed, require_same
from pytest_trtcheck.errors import (
    ArgumentError,
    CheckError,
    ModelError,
    closed,
    first_line,
    lacked_files,
    listed,
    plural,
    unforeseen,
)
from pytest_trtcheck.model import memory
from pytest_trtcheck.model import proto as protos
from pytest_trtcheck.model.output_parts import output_parts
from pytest_trtcheck.model.proto import all_graphs, all_nodes, bodies, constant, elements
from pytest_trtcheck.model.randomness import random_nodes
from pytest_trtcheck.record.files import resolved

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import onnx

    from pytest_trtcheck.model.sources.exported import Origin
    from pytest_trtcheck.spec import Part

Dim = int | str | None

_AN_ENGINE = 'name the model that it was built from, and the engine beside it: @trt_parity("model.onnx", engine=…)'


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as the model declares it.

    Parameters
    ----------
    name
        The tensor's name.
    dtype
        numpy's name of the element type ("float32", "int64", "bool", "bfloat16", "str", …).
    shape
        One entry a dimension: a size, the name of a symbolic dimension, or None for a nameless one.
    index_limit
        For an integer input that indexes a table (an embedding): the number of rows; None otherwise.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    index_limit: int | None = None

    def free_dims(self) -> list[str]:
        """The dimensions that the model leaves open, as "name[axis]=symbol"."""
        return [
            f"{self.name}[{axis}]" + (f"={dim}" if dim else "")
            for axis, dim in enumerate(self.shape)
            if not isinstance(dim, int)
        ]


@dataclass(frozen=True)
class OnnxModel:
    """A model file that was read and found sound.

    Parameters
    ----------
    path
        The file; external data lies beside it.
    label
        What the user called it, for messages and reports.
    sha256
        Identity of the content: the file and every byte of external data that it refers to.
    inputs, outputs
        In the model's order; initializers are not among the inputs.
    op_types
        Every operator that occurs, in functions and inner graphs too.
    has_qdq
        Whether it carries QuantizeLinear/DequantizeLinear nodes.
    half_types
        The 16-bit float types that its tensors use ("float16", "bfloat16").
    has_double
        Whether its tensors use float64.
    has_shadowed
        Whether it has functions of its own that ONNX Runtime may compute operators of that name instead of.
    external
        Where its external data lies, relative to the file's folder.
    custom_ops
        Libraries that ONNX Runtime needs for its operators; they are part of `sha256`.
    parts
        Where its graph says that outputs have parts with scales of their own, by output.
    random
        The nodes that make its outputs random.
    origin
        What it was exported from, which computes by itself; None for a model that is ONNX.
    notes
        What to say about how it was made.
    files
        What `sha256` is of, as it was then.
    """

    path: Path
    label: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_types: frozenset[str]
    has_qdq: bool
    half_types: frozenset[str]
    has_double: bool = False
    has_shadowed: bool = False
    external: tuple[str, ...] = ()
    custom_ops: tuple[str, ...] = ()
    parts: tuple[tuple[str, tuple[Part, ...]], ...] = ()
    random: tuple[str, ...] = ()
    origin: Origin | None = field(default=None, compare=False)
    notes: tuple[str, ...] = ()
    files: tuple[HashedFile, ...] = field(default=(), compare=False, repr=False)

    @property
    def size_bytes(self) -> int:
        """Of the file and its external data."""
        return sum((self.path.parent / name).stat().st_size for name in (self.path.name, *self.external))

    @property
    def is_large(self) -> bool:
        """Whether one session of it at a time is all that the memory should hold."""
        return self.size_bytes > protos.LARGE_MODEL


def load(path: Path, label: str | None = None) -> OnnxModel:
    """Read the model at `path`.

    Raises
    ------
    ModelError
        The file is missing, no ONNX model or cut off; it has no outputs; its external data is missing, too short, or
        outside the model's folder; it was changed meanwhile; or it is unsound in another way.
    """
    label = label or str(path)
    read: list[HashedFile] = []
    try:
        return _load(path, label, read)
    except Exception as error:
        require_same(read)  # what came of it is no wonder
        raise explained(error, path, label) from error


def explained(error: Exception, path: Path, label: str) -> CheckError:
    """What went wrong with a model, in words: where nobody foresaw it, ONNX's own checker is asked about the file."""
    import onnx

    if isinstance(error, UnicodeDecodeError):
        return ModelError(f"{label}: holds a text that is no UTF-8: {error.object[:40]!r}", "export it again")
    found = unforeseen(error, label)
    if found is error or found.code != "unforeseen":
        return found
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as refused:
        said: str | None = first_line(refused)
        if _NO_SHAPE in str(said):
            said = _refused_otherwise(path)
        if said is not None:
            more = re.sub(r" \([^()]*\.py:\d+\)$", "", found.message.removeprefix(f"{label}: "))
            return ModelError(f"{label}: not a sound ONNX model: {said}", f"export it again ({more})")
    return found


_CONTRADICTION = re.compile(
    r"\(op_type: ?([^,)]*)(?:, node name: (.*?))?\): (?:\[\w+\] )?"
    r"(?:(\w+) has inconsistent type tensor\((\w+)\)|Inferred elem type differs from existing elem type: "
    r"\((\d+)\) vs \((\d+)\))"
)


def refuse_contradicting_types(path: Path, label: str) -> None:
    """See that each node's operands have types that go together, and its results those that are declared.

    Of a model in FP32 ONNX Runtime sees to it. What the float twin of another one computes says nothing of its types.

    Raises
    ------
    ModelError
        They do not.
    """
    import onnx

    try:
        onnx.shape_inference.infer_shapes(read_graph(path), check_type=True, strict_mode=True)
    except Exception as error:  # whatever else it cannot follow, others can
        if (found := _CONTRADICTION.search(str(error))) is None:
            return
        operator, name, operand, kind, computed, declared = found.groups()
        types = [onnx.TensorProto.DataType.Name(int(code)).lower() for code in (computed, declared) if code]
        what = (
            f"operand {operand} is {kind}, which does not go with the others"
            if operand
            else f"it computes {types[0]}, and its output is declared as {types[1]}"
        )
        raise ModelError(
            f"{label}: not a sound ONNX model: node {name or '(nameless)'!r} ({operator}): {what}",
            "ONNX Runtime does not load it, nor does an engine compute what it says: put a Cast there, or export it "
            "again",
        ) from error


_NO_SHAPE = "Field 'shape' of 'type' is required but missing"
"""What ONNX's checker says first of an input or output of any rank, which many models have that are sound."""


def _refused_otherwise(path: Path) -> str | None:
    """What ONNX's checker says of a model beside that; None where it is nothing."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except Exception as refused:
        return first_line(refused)
    return None


def _load(path: Path, label: str, read: list[HashedFile]) -> OnnxModel:
    try:
        read += [hashed(path)] if path.is_file() else []  # what is none, is told by what parses it
    except PermissionError as error:
        raise closed(label, error) from error
    proto = _parse(path, label)
    if not proto.graph.output:
        raise ModelError(f"{label}: the model has no outputs", "export it again with the outputs to compare")
    _refuse_untyped(proto.graph, label)
    files = _external_files(proto, path, label)
    if problems := list(_too_large(proto)):
        raise ModelError(
            f"{label}: {listed(problems, 10, '; ')}", "export it with smaller constants, or open dimensions"
        )
    read += [hashed(file) for _, file in sorted(files.items())]
    digest = hashlib.sha256(read[0].digest.encode())
    for location, file in zip(sorted(files), read[1:], strict=True):
        digest.update(f"\0{location}\0{file.digest}".encode())
    weights = {tensor.name for tensor in proto.graph.initializer}
    limits = _index_limits(proto.graph)
    float_types = _float_types(proto)
    return OnnxModel(
        path=path,
        label=label,
        sha256=digest.hexdigest(),
        inputs=tuple(
            _spec(value, label, limits.get(value.name)) for value in proto.graph.input if value.name not in weights
        ),
        outputs=tuple(_spec(value, label) for value in proto.graph.output),
        op_types=frozenset(node.op_type for node in nodes(proto)),
        has_qdq=any(node.op_type in {"QuantizeLinear", "DequantizeLinear"} for node in nodes(proto)),
        half_types=float_types - {"float64"},
        has_double="float64" in float_types,
        has_shadowed=any(each.domain in _RUNTIME_DOMAINS for each in proto.functions),
        external=tuple(sorted(files)),
        parts=tuple(output_parts(proto).items()),
        random=random_nodes(proto),
        files=tuple(read),
    )


def with_custom_ops(model: OnnxModel, libraries: Sequence[str]) -> OnnxModel:
    """The model with the ONNX Runtime libraries that it needs.

    Raises
    ------
    ArgumentError
        A library cannot be read.
    """
    if tuple(libraries) == model.custom_ops:
        return model
    digest = hashlib.sha256(model.sha256.encode())
    read = list(model.files)
    for library in libraries:
        try:
            read.append(hashed(Path(library)))
            digest.update(f"\0{read[-1].digest}".encode())
        except OSError as error:
            raise ArgumentError(
                f"custom_ops: {library}: {error.strerror}", "give the path of the library", code="operator-library"
            ) from error
    return replace(model, sha256=digest.hexdigest(), custom_ops=tuple(libraries), files=tuple(read))


def external_files(path: Path, label: str | None = None) -> dict[str, Path]:
    """The files of external data that the model at `path` refers to, by the location that it gives.

    Raises
    ------
    ModelError
        As `load` does.
    """
    label = label or str(path)
    return _external_files(_parse(path, label), path, label)


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph of the model at `path`, what `proto.load` leaves on disk by absolute paths.

    They were looked at here, so that no library has to: some refuse a file that has hard links, which package managers
    and copies that save space make of every file.

    Raises
    ------
    ModelError
        As `load` does.
    """
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    proto = _parse(path, str(path))
    external = [tensor for tensor in _get_all_tensors(proto) if uses_external_data(tensor)]
    files = _external_files(proto, path, str(path)) if external else {}
    for tensor in external:
        for entry in () if protos.is_held(tensor, path) else tensor.external_data:
            if entry.key == "location":
                entry.value = str(files[entry.value].absolute())
    return proto


def _parse(path: Path, label: str) -> onnx.ModelProto:

    if not path.exists():
        raise ModelError(f"{label}: no such file", f"looked for {path}", code="model-missing")
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            f"{label}: its path is no UTF-8, and ONNX Runtime cannot open it", "rename it", code="model-missing"
        ) from error
    if not path.is_file():
        raise ModelError(
            f"{label}: is {'a directory' if path.is_dir() else 'a pipe or a device'}, not an ONNX file",
            code="model-kind",
        )
    try:
        proto = protos.load(path)
    except PermissionError as error:
        raise closed(label, error) from error
    except Exception as error:
        if lacked_files(error):
            raise
        if path.suffix in {".plan", ".engine", ".trt"}:
            raise ModelError(
                f"{label}: is an engine by its name, not a model", _AN_ENGINE, code="model-kind"
            ) from error
        raise ModelError(
            f"{label}: not an ONNX model, or cut off ({plural(path.stat().st_size, 'byte')}): {error}",
            "export it again, or fetch it whole (a Git LFS pointer is a text file of about 130 bytes)",
            code="model-damaged",
        ) from error
    if not proto.ir_version or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{label}: not an ONNX model: it holds no graph", "export it again", code="model-kind")
    if any(node.op_type == "EPContext" and node.domain == "com.microsoft" for node in proto.graph.node):
        raise ModelError(f"{label}: holds an engine (EPContext), not a model", _AN_ENGINE, code="model-kind")
    if proto.graph.sparse_initializer:
        names = listed(repr(each.values.name) for each in proto.graph.sparse_initializer)
        raise ModelError(
            f"{label}: has sparse weights ({names}), which TensorRT does not read",
            "export them dense",
            code="model-refused",
        )
    checks = _unknown_types, _bad_names, _shared_names, _shadowing, _stray_references, _unfolded
    if problems := next(filter(None, (list(check(proto)) for check in checks)), None):
        raise ModelError(
            f"{label}: not a sound ONNX model:\n  {listed(problems, 10, chr(10) + '  ')}", "export it again"
        )
    return proto


def _unknown_types(proto: onnx.ModelProto) -> Iterator[str]:
    """Tensors of types that the installed ONNX has no name for, and of none at all."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors

    known = {*onnx.TensorProto.DataType.values()} - {onnx.TensorProto.UNDEFINED}
    for tensor in _get_all_tensors(proto):
        if tensor.data_type not in known:
            yield f"weight {tensor.name or '(nameless)'} has element type {tensor.data_type}, which is none of ONNX's"
        if any(size < 0 for size in tensor.dims):
            yield f"weight {tensor.name or '(nameless)'} has the shape {list(tensor.dims)}"
    for value in (*proto.graph.input, *proto.graph.output):
        code = value.type.tensor_type.elem_type
        if code not in known | {onnx.TensorProto.UNDEFINED}:
            yield f"{value.name!r} has element type {code}, which is none of ONNX's"


_SIZES = {
    "ConstantOfShape": 0,
    "Expand": 1,
    "Tile": 1,
    "OneHot": 1,
    "Resize": 3,
    "RandomNormal": -1,
    "RandomUniform": -1,
}
"""Which operand of an operator says how many elements it makes; -1: its attribute does."""


def _too_large(proto: onnx.ModelProto) -> Iterator[str]:
    """Nodes that a few bytes of constants tell to make more than the memory holds."""
    known = {tensor.name: tensor for graph in all_graphs(proto.graph) for tensor in graph.initializer}
    held = {name: elements(tensor) for name, tensor in known.items() if tensor.data_type in _INTEGERS}
    for node in nodes(proto):
        if node.op_type == "Constant" and node.output:
            held[node.output[0]] = constant(node)
        operand = _SIZES.get(node.op_type)
        if operand is None:
            continue
        given = next((list(each.ints) for each in node.attribute if each.name == "shape"), None)
        if operand >= 0:
            given = held.get(node.input[operand]) if operand < len(node.input) else None
        whole = given is not None and all(isinstance(size, (int, float)) and size > 0 for size in given)
        if whole and (said := memory.too_large(_USUAL_BYTES * math.prod(map(int, given or ())))):
            yield f"node {node.name or '(nameless)'!r} ({node.op_type}) makes {given}, in FP32 {said}"


_USUAL_BYTES = 4
_INTEGERS = frozenset({6, 7})
"""INT32 and INT64, as onnx.TensorProto has them: what sizes are of."""
_LONGEST_NAME = 4095
"""TensorRT takes names of up to 4096 bytes with the zero behind them; no message could show a longer one."""


_LONGEST_PART = 255
"""Bytes of a file's or folder's name, on every usual file system."""
_SHOWN = 80


def _bad_names(proto: onnx.ModelProto) -> Iterator[str]:
    """Names that are no text, and names that TensorRT does not take."""
    for name in _names(proto):
        if isinstance(name, bytes):
            yield f"the name {name[:40]!r} is no UTF-8"
        elif len(name) > _LONGEST_NAME:
            yield f"a name has {len(name):,} characters ({name[:40]!r}…), TensorRT takes {_LONGEST_NAME:,} at the most"


def _shared_names(proto: onnx.ModelProto) -> Iterator[str]:
    """Names of two weights, or of one output twice, where ONNX (docs/IR.md) wants one tensor for each name.

    ONNX Runtime takes one of the two, what lowers the model may take the other, and TensorRT's parser takes neither.
    Doubled names of what nodes compute ONNX Runtime refuses itself.
    """

    def repeated(values: Iterable[onnx.TensorProto | onnx.ValueInfoProto]) -> list[str]:
        return [name for name, count in Counter(value.name for value in values).items() if count > 1]

    def within(graph: onnx.GraphProto, outside: Mapping[str, onnx.TensorProto | None], where: str) -> Iterator[str]:
        yield from (f"{where}two weights are called {name!r}" for name in repeated(graph.initializer))
        yield from (f"{where}output {name!r} is listed twice" for name in repeated(graph.output))
        for tensor in graph.initializer:
            if outside.get(tensor.name, tensor) != tensor:  # a copy of the one outside is the same to everybody
                yield f"{where}a weight is called {tensor.name!r}, as another tensor outside"
        inner = [(node, body) for node in graph.node for body in bodies(node)]
        if inner:
            computed = (*(value.name for value in graph.input), *(name for node in graph.node for name in node.output))
            seen = {**outside, **dict.fromkeys(computed), **{tensor.name: tensor for tensor in graph.initializer}}
            for node, body in inner:
                yield from within(body, seen, f"inside node {node.name or '(nameless)'!r} ({node.op_type}): ")

    yield from within(proto.graph, {}, "")


_RUNTIME_DOMAINS = frozenset({"ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""Beside ONNX's own, those that ONNX Runtime has operators of: they come before a function of the same name."""


def _shadowing(proto: onnx.ModelProto) -> Iterator[str]:
    """Functions that go by the name of an operator of ONNX's: ONNX Runtime computes the operator, we the function."""
    import onnx

    for each in proto.functions:
        if each.domain in {"", "ai.onnx"} and onnx.defs.has(each.name):
            yield f"a function is called {each.name!r}, as an operator of ONNX's own"


def _stray_references(proto: onnx.ModelProto) -> Iterator[str]:
    """Attributes that stand for one of a function's, outside of any function."""
    for node in all_nodes(proto.graph.node):
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                yield f"node {node.name or '(nameless)'!r}: {attribute.name!r} refers to the attribute of a function"


_MOST_NODES = 1_000_000
"""Nodes that a model's functions may stand for: fifty times those of the largest models."""


def _unfolded(proto: onnx.ModelProto) -> Iterator[str]:
    """Functions that call themselves, or others so often that a few of them stand for more than any memory holds."""

    def called(nodes: Iterable[onnx.NodeProto]) -> list[tuple[str, ...]]:
        return [(node.domain, node.op_type, getattr(node, "overload", "")) for node in all_nodes(nodes)]

    calls = {(each.domain, each.name, getattr(each, "overload", "")): called(each.node) for each in proto.functions}
    made: dict[tuple[str, ...], int] = {}
    try:
        for each in TopologicalSorter({name: calls.keys() & within for name, within in calls.items()}).static_order():
            made[each] = sum(made.get(inner, 1) for inner in calls[each])
    except CycleError as error:
        yield f"function {listed(('::'.join(name[:2]) for name in reversed(error.args[1])), 5, ' calls ')}, without end"
        return
    count = sum(made.get(each, 1) for each in called(proto.graph.node))
    if made and count > _MOST_NODES:
        yield f"its functions stand for {plural(count, 'node')}, of which {_MOST_NODES:,} are taken at the most"


def _names(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    for graph in all_graphs(proto.graph):
        yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))
    for node in nodes(proto):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the model, those of functions and inner graphs too."""
    for each in (proto.graph, *proto.functions):
        yield from all_nodes(each.node)


def _where(tensor: onnx.TensorProto) -> tuple[str, int, int | None]:
    """The location, offset and length that a tensor gives of its data; a ValueError where they make no sense."""
    from onnx.external_data_helper import ExternalDataInfo

    info = ExternalDataInfo(tensor)
    offset, length = int(info.offset or 0), None if info.length is None else int(info.length)
    if min(offset, length or 0) < 0:  # as ONNX says itself from some release on
        raise ValueError(f"{offset=}, {length=}")
    return info.location, offset, length


def _external_files(proto: onnx.ModelProto, path: Path, label: str) -> dict[str, Path]:
    """The external data files, checked, by the location that the model gives."""
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    folder = path.parent
    files: dict[str, Path] = {}
    read: Counter[str] = Counter()
    problems: list[str] = []
    for tensor in _get_all_tensors(proto):
        if not uses_external_data(tensor):
            if tensor.HasField("raw_data"):
                problems += _misfit(tensor, len(tensor.raw_data))
            continue
        name, needed = tensor.name or "(nameless)", _tensor_bytes(tensor)
        try:
            said, offset, length = _where(tensor)
        except ValueError as error:
            problems.append(f"weight {name}: where its data lies cannot be understood: {error}")
            continue
        held = needed if length is None else length
        if protos.is_held(tensor, path) and offset + held <= path.stat().st_size:
            problems += _misfit(tensor, held)
            continue
        location = PurePosixPath(said)
        if location.is_absolute() or ".." in location.parts or "\0" in said:
            problems.append(f"weight {name}: {said[:_SHOWN]!r} leads out of the model's folder")
            continue
        if len(said) > _LONGEST_NAME or any(len(part) > _LONGEST_PART for part in location.parts):
            problems.append(f"weight {name}: {said[:_SHOWN]!r}… is no name that a file can have")
            continue
        file = folder / location
        # A link inside the folder that points outside it escapes just as well as "..", and so does one to itself.
        if not _resolved(file, folder).is_relative_to(folder.resolve()):
            problems.append(f"weight {name}: {said!r} is a link out of the model's folder, or to itself")
            continue
        if not file.is_file():
            problems.append(f"weight {name}: {said!r} is missing")
            continue
        size = file.stat().st_size
        if length is not None and length != needed:
            problems.append(f"weight {name}: is said to have {plural(length, 'byte')}, its shape needs {needed:,}")
        elif offset + needed > size:
            problems.append(
                f"weight {name}: {said!r} is cut off: needs {plural(offset + needed, 'byte')}, has {size:,}"
            )
        files[said] = file
        read[said] += needed
    problems += _hardly_used(files, read)
    if problems:
        shown = listed(problems, 10, "\n  ")
        raise ModelError(
            f"{label}: bad weights:\n  {shown}", f"put the model's data files whole into {folder}", code="model-weights"
        )
    return files


def _hardly_used(files: Mapping[str, Path], read: Mapping[str, int]) -> Iterator[str]:
    """Files of weights that hold more beside what is read of them than any model: all of a file is hashed."""
    for said, file in files.items():
        if (size := file.stat().st_size) - read[said] > memory.total_bytes():
            yield f"{said!r} has {format_bytes(size)}, the weights in it {format_bytes(read[said])}"


def _resolved(file: Path, folder: Path) -> Path:
    try:
        return resolved(file)
    except OSError:  # a link that leads to itself
        return folder.resolve().parent


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    elements: int = math.prod(tensor.dims)
    return (elements * _bits(tensor.data_type) + 7) // 8


def _bits(data_type: int) -> int:
    import onnx

    name: str = onnx.TensorProto.DataType.Name(data_type)
    if "INT4" in name or name.startswith("FLOAT4"):
        return 4
    if name == "STRING":
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def _misfit(tensor: onnx.TensorProto, held: int) -> Iterator[str]:
    """What is wrong with a weight of which the model's file has so many bytes."""
    if held != (needed := _tensor_bytes(tensor)):
        yield (
            f"weight {tensor.name or '(nameless)'}: holds {plural(held, 'byte')}, its shape {tuple(tensor.dims)} needs "
            f"{needed:,}"
        )


_MOST_DIMENSIONS = 32
"""Of arrays in numpy 1."""


def _refuse_untyped(graph: onnx.GraphProto, label: str) -> None:
    import onnx

    for kind in ("input", "output"):
        for index, value in enumerate(getattr(graph, kind)):
            kinds = {"tensor_type": value.type.tensor_type.elem_type, None: onnx.TensorProto.UNDEFINED}
            if kinds.get(value.type.WhichOneof("value")) == onnx.TensorProto.UNDEFINED:
                raise ModelError(
                    f"{label}: {kind} {value.name!r} has no type",
                    "what selects a part of a model, as skl2onnx's select_model_inputs_outputs, leaves it out: set the "
                    f"one that the tensor has, model.graph.{kind}[{index}].type.tensor_type.elem_type = "
                    "onnx.TensorProto.FLOAT, and save the model again",
                )
    weights = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        tensor = value.type.tensor_type
        if value.type.HasField("tensor_type") and not tensor.HasField("shape") and value.name not in weights:
            raise ModelError(
                f"{label}: input {value.name!r} has no shape, not even a number of dimensions: TensorRT takes it for a "
                "single number",
                "export the model with one, whose sizes may be open",
                code="model-refused",
            )


def _spec(value: onnx.ValueInfoProto, label: str, index_limit: int | None = None) -> TensorSpec:
    import onnx

    if not value.type.HasField("tensor_type"):
        is_zipmap = value.type.HasField("sequence_type") and value.type.sequence_type.elem_type.HasField("map_type")
        raise ModelError(
            f"{label}: {value.name!r} is no tensor" + ", but a list of maps from class to probability" * is_zipmap,
            "export it with tensors: skl2onnx.to_onnx(…, options={'zipmap': False})"
            if is_zipmap
            else "only models with tensor inputs and outputs are checked",
        )
    tensor = value.type.tensor_type
    if tensor.elem_type == onnx.TensorProto.STRING:
        dtype = "str"
    else:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)
    if len(tensor.shape.dim) > _MOST_DIMENSIONS:
        raise ModelError(
            f"{label}: {value.name!r} has {len(tensor.shape.dim):,} dimensions: TensorRT takes 8 at the most",
            "export it with fewer",
        )
    dims: list[Dim] = [
        # "?" is how PaddlePaddle's exporter says that it knows no name: two of them are two dimensions.
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else (dim.dim_param.strip("?") or None)
        for dim in tensor.shape.dim
    ]
    return TensorSpec(value.name, dtype, tuple(dims), index_limit)


def _index_limits(graph: onnx.GraphProto) -> dict[str, int]:
    """For each input that indexes a constant table, possibly through a Cast: the table's number of rows."""
    tables = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    origin = {value.name: value.name for value in graph.input}
    limits: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze"} and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in origin:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            name, rows = origin[node.input[1]], tables[node.input[0]][axis]
            limits[name] = min(rows, limits.get(name, rows))
    return limits


def _float_types(proto: onnx.ModelProto) -> frozenset[str]:
    """Which of float16, bfloat16 and float64 the model's tensors are seen to have."""
    import onnx

    names = {
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.BFLOAT16: "bfloat16",
        onnx.TensorProto.DOUBLE: "float64",
    }
    found: set[int] = set()
    for graph in all_graphs(proto.graph):
        found |= {tensor.data_type for tensor in graph.initializer}
        found |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    for node in nodes(proto):
        typed = {"to", "dtype", "output_dtype", "output_datatype"}
        found |= {attribute.i for attribute in node.attribute if attribute.name in typed}
        found |= {attribute.t.data_type for attribute in node.attribute if attribute.HasField("t")}
    return frozenset(name for code, name in names.items() if code in found)
