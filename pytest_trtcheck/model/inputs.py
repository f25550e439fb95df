"""What a model is fed: the user's inputs, checked against the model, or inputs generated from its specs.

A case is one mapping from input name to array: what one inference takes, the inputs of a `spec.Case`, checked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from operator import length_hint
from typing import TYPE_CHECKING, Any, TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pytest_trtcheck.errors import InputError, kind_of, listed, plural
from pytest_trtcheck.model import free_dims, memory
from pytest_trtcheck.model.arrays import as_array, files_behind, is_array, items_of, owned
from pytest_trtcheck.model.input_files import FromFiles
from pytest_trtcheck.spec import Case as Labelled
from pytest_trtcheck.spec import Shape, ShapeRange

if TYPE_CHECKING:
    from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec

Case = dict[str, NDArray[Any]]


def cases_from(value: object, model: OnnxModel, source: str) -> list[Case]:
    """The cases in what a test returned: one mapping or array, or a list of them.

    Raises
    ------
    InputError
        `value` is none of these, or a case does not fit the model: name, dtype, rank, size, or NaN.
    """
    if isinstance(value, (Mapping, Labelled)) or is_array(value):
        return [case_from(value, model, source)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if not value:
            raise InputError(
                f"{source}: an empty list of inputs", "give at least one mapping or array", code="input-empty"
            )
        # One of a user's own class may know no index that is too large.
        items = enumerate(islice(value, len(value)))
        called = value.paths if isinstance(value, FromFiles) else None
        cases = (case_from(item, model, called[i] if called else f"{source}[{i}]") for i, item in items)
        # One that makes its items when they are asked for may fill one array again and again.
        return list(cases) if isinstance(value, (list, tuple)) else list(map(owned, cases))
    if is_loader(value):
        names = [spec.name for spec in model.inputs]
        each = (owned(case_from(from_loader(item, names), model, f"{source}[{i}]")) for i, item in enumerate(value))
        batches = list(each) if length_hint(value, -1) >= 0 else _ended(each, source)
        if not batches:
            raise InputError(
                f"{source}: the {getattr(value, 'kind', type(value).__name__)} is empty",
                "give at least one batch; a generator that was read already gives no more: give a list",
                code="input-empty",
            )
        return batches
    raise InputError(
        f"{source}: expected a mapping from input name to array, an array, or a list of them, got {kind_of(value)}",
        f"the model's inputs are {_described(model.inputs)}",
        code="input-type",
    )


_MOST_CASES = 100_000
"""Of what does not tell how many it gives: more than a parity check is waited for."""


def _ended(cases: Iterable[Case], source: str) -> list[Case]:
    """The cases of a loader or generator that may have no end.

    Raises
    ------
    InputError
        It gave more than a check can hold.
    """
    found: list[Case] = []
    size_bytes = 0
    for case in cases:
        found.append(case)
        size_bytes += sum(array.nbytes for array in case.values())
        said = memory.too_large(size_bytes)
        if said or len(found) == _MOST_CASES:
            raise InputError(
                f"{source}: no end after {plural(len(found), 'case')}" + (f" and {said}" if said else ""),
                "give as many as are to be compared: itertools.islice(…, 100)",
                code="input-endless",
            )
    return found


def is_loader(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether it gives batches each time that it is asked, as a DataLoader or a tf.data.Dataset does."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, (Iterator, Mapping, Sequence, str, bytes, Set))
        and not is_array(value)
    )


def shuffles(loader: object) -> bool:
    """Whether a DataLoader gives its samples in another order each time."""
    return "Random" in type(getattr(loader, "sampler", None)).__name__


def from_loader(item: object, names: Sequence[str]) -> object:
    """What a loader gave, as a case: labels and whatever else goes along with the inputs are left out."""
    if isinstance(item, Mapping):
        return {name: item[name] for name in names if name in item}
    if isinstance(item, (tuple, list)) and item:
        return dict(zip(names, item, strict=False))
    return item


def unlabelled(value: Any) -> Any:
    """What a test gave without the labels, as far as it can be told without asking for all of it."""
    if isinstance(value, Labelled):
        return value.inputs
    if isinstance(value, (list, tuple)) and any(isinstance(each, Labelled) for each in value):
        return [unlabelled(each) for each in value]
    return value


def first_items(value: Any) -> list[object]:
    """The items that inputs are made of, as they were given; of a loader the first one alone.

    Raises
    ------
    InputError
        There is none.
    """
    if isinstance(value, (Mapping, Labelled, str, bytes)) or is_array(value):
        return [value]
    found = list(value) if isinstance(value, Sequence) else list(islice(value, 1)) if is_loader(value) else [value]
    if not found:
        raise InputError("an empty list of inputs", "give at least one mapping or array", code="input-empty")
    return found


def by_name(item: object, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays of one item by input name; a lone array is the first input, a tuple's are the first ones in order.

    Raises
    ------
    InputError
        It holds no arrays.
    """
    if isinstance(item, Labelled):
        item = item.inputs
    if is_array(item):
        item = (item,)
    if not isinstance(item, (Mapping, tuple, list)):
        raise InputError(
            f"expected a mapping from input name to array, or an array, got {kind_of(item)}", code="input-type"
        )
    pairs = items_of(item) if isinstance(item, Mapping) else zip(names, item, strict=False)
    return {str(name): as_array(array, f"input {str(name)!r}") for name, array in pairs if is_array(array)}


def first_case(value: object, model: OnnxModel, source: str) -> Case:
    """The first of the cases in what a test returned; only that one is looked at.

    Raises
    ------
    InputError
        As `cases_from`.
    """
    first = first_items(value)[0]
    if is_loader(value):
        first = from_loader(first, [spec.name for spec in model.inputs])
    return cases_from(first, model, source)[0]


def of_batch(case: Case, model: OnnxModel, batch: int) -> Case:
    """The case with `batch` rows in every input that leaves its first dimension open: its own, over and over."""
    open_first = {spec.name for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int)}
    return {
        name: np.resize(array, (batch, *array.shape[1:])) if name in open_first else array
        for name, array in case.items()
    }


def _described(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} ({s.dtype}, {list(s.shape)})" for s in specs) or "none"


def case_from(value: object, model: OnnxModel, source: str) -> Case:
    """One case; of one with labels, the inputs.

    Raises
    ------
    InputError
        It does not fit the model: name, dtype, rank, size, or NaN.
    """
    specs = model.inputs
    if isinstance(value, Labelled):
        value = value.inputs
    if is_array(value):
        if len(specs) != 1:
            raise InputError(
                f"{source}: one array for a model of {len(specs)} inputs",
                f"give a mapping with {_described(specs)}",
                code="input-names",
            )
        value = {specs[0].name: value}
    if not isinstance(value, Mapping):
        raise InputError(
            f"{source}: expected a mapping from input name to array, or an array, got {kind_of(value)}",
            code="input-type",
        )
    known = {spec.name for spec in specs}
    if unknown := [str(name) for name, _ in items_of(value) if name not in known]:
        raise InputError(
            f"{source}: {model.label} has no input {listed(map(repr, unknown), 10)}",
            f"its inputs are {_described(specs)}",
            code="input-names",
        )
    if missing := [spec.name for spec in specs if spec.name not in value]:
        raise InputError(
            f"{source}: missing input {', '.join(map(repr, missing))}",
            "give every input of the model",
            code="input-names",
        )
    symbols: dict[str, tuple[int, str]] = {}
    return {spec.name: _checked(value[spec.name], spec, source, symbols) for spec in specs}


def zeros(cases: Sequence[Case], source: str) -> list[str]:
    """What is to be said where nothing but zeros is fed: a state that begins as zeros stands beside something else."""
    names = [name for name, array in (cases[0].items() if cases else ()) if _is_floating(array)]
    if not names or any((case[name] != 0).any() for case in cases for name in names):
        return []
    return [f"{source}: every floating-point input is zero throughout: what multiplies them was not exercised"]


def _is_floating(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def infinities(cases: Sequence[Case], source: str) -> list[str]:
    """What is to be said of inputs with infinite elements: a mask has them, and so has a division by zero."""
    notes = []
    for name in cases[0] if cases else ():
        arrays = [case[name] for case in cases if _is_floating(case[name])]
        if count := sum(int(np.isinf(array.astype(np.float32, copy=False)).sum()) for array in arrays):
            of = plural(sum(array.size for array in arrays), "element")
            what = "what they make infinite or NaN in the reference is compared with nothing"
            notes.append(f"{source}: input {name!r} is infinite in {count:,} of {of}: {what}")
    return notes


def _is_untyped(dtype: np.dtype[Any]) -> bool:
    """Whether it is bytes of no type; a record's fields have types of their own."""
    return dtype.type is np.void and dtype.names is None


def _checked(value: object, spec: TensorSpec, source: str, symbols: dict[str, tuple[int, str]]) -> NDArray[Any]:
    where = f"{source}: input {spec.name!r}"
    if not is_array(value):
        raise InputError(
            f"{where}: expected a numpy array, got {kind_of(value)}", "np.asarray(…) makes one", code="input-type"
        )
    array = as_array(value, where)
    if spec.dtype == "str":
        if array.dtype.kind not in "OUS":
            raise InputError(f"{where}: expected strings, got {array.dtype}", code="input-type")
    elif _is_untyped(array.dtype) and array.dtype.itemsize == dtype_of(spec.dtype).itemsize:
        # numpy's files hold the bytes of bfloat16 and FP8, and forget the type.
        array = array.view(dtype_of(spec.dtype))
    elif array.dtype.name != spec.dtype:
        beyond_numpy = dtype_of(spec.dtype).type.__module__ == "ml_dtypes"
        convert = f"array.astype(ml_dtypes.{spec.dtype})" if beyond_numpy else f"array.astype({spec.dtype!r})"
        raise InputError(
            f"{where}: expected {spec.dtype}, got {array.dtype}", f"convert it: {convert}", code="input-type"
        )
    if array.ndim != len(spec.shape):
        raise InputError(
            f"{where}: expected rank {len(spec.shape)} {list(spec.shape)}, got rank {array.ndim} {list(array.shape)}",
            "a batch of one still has its batch dimension: array[None]" if array.ndim == len(spec.shape) - 1 else "",
            code="input-shape",
        )
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise InputError(
                f"{where}: dimension {axis} is {size}, the model fixes it at {dim}",
                f"its shape is {list(spec.shape)}: give such inputs, or export the model with that dimension open",
                code="input-shape",
            )
        if problem := _other_size(symbols, spec, axis, size):
            raise InputError(f"{where}: {problem}", "give inputs in which it is one size", code="input-shape")
    if array.dtype.kind == "f" or spec.dtype == "bfloat16":
        count = int(np.isnan(array.astype(np.float32, copy=False)).sum())
        if count:
            raise InputError(
                f"{where}: NaN in {count:,} of {plural(array.size, 'element')}", "look where these inputs come from"
            )
    return np.ascontiguousarray(array) if array.ndim else array


def _other_size(symbols: dict[str, tuple[int, str]], spec: TensorSpec, axis: int, size: int) -> str:
    """What is wrong where a symbolic dimension has another size in an input before, which `symbols` holds."""
    dim = spec.shape[axis]
    first, name = symbols.setdefault(dim, (size, spec.name)) if isinstance(dim, str) else (size, "")
    return "" if first == size else f"dimension {axis} ({dim}) is {size}, but {first} in input {name!r}"


def as_float(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The array in the float type `dtype`, where both are floats; as it is otherwise.

    A finite value stays finite: beyond the range of `dtype` it becomes the largest number of it, so that an infinity on
    the other side of a comparison is seen.
    """
    floats = ("float", "bfloat")
    if array.dtype.name == dtype or not (array.dtype.name.startswith(floats) and dtype.startswith(floats)):
        return array
    wanted = dtype_of(dtype)
    largest = float(ml_dtypes.finfo(wanted).max)  # type: ignore[no-untyped-call]
    with np.errstate(over="ignore"):
        bounded = np.where(np.isfinite(array), np.clip(array.astype(np.float64), -largest, largest), array)
        return bounded.astype(wanted)


def digest(case: Mapping[str, NDArray[Any]]) -> str:
    """Identity of a case: names, dtypes, shapes and every byte."""
    total = hashlib.sha256()
    for name, array in sorted(case.items()):
        data = repr(array.tolist()).encode() if array.dtype.kind in "OU" else np.ascontiguousarray(array).view(np.uint8)
        total.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        total.update(data if isinstance(data, bytes) else data.reshape(-1).data)
    return total.hexdigest()


def digest_of(cases: Iterable[Case]) -> str:
    """Identity of several cases, in their order."""
    total = hashlib.sha256()
    for case in cases:
        total.update(digest(case).encode())
    return total.hexdigest()


def require_digest(cases: Sequence[Case], found: str, then: str) -> None:
    """See that inputs have the digest that they had.

    Raises
    ------
    InputError
        They were changed meanwhile: in the file that they are mapped from, or by code of the user's.
    """
    if found != then:
        files = dict.fromkeys(str(path) for case in cases for path in files_behind(case))
        raise InputError(
            f"the inputs were changed during the check{f' ({listed(files)})' if files else ''}",
            "let nothing write there during the run, or return copies: np.array(…); then run the test again",
            code="model-changed",
        )


# --- shapes ----------------------------------------------------------------------------------------------------------


def shape_ranges(
    model: OnnxModel,
    batch: int | None,
    shapes: Mapping[str, Shape | ShapeRange],
    *,
    default_batch: int | None = None,
    answer: free_dims.Answer | None = None,
) -> dict[str, ShapeRange]:
    """The shapes that `batch` and `shapes` ask for, for every input of `model`.

    `batch` fixes the first dimension of every input that leaves it open, inside what `shapes` declares. Once one input
    fixes a symbolic dimension, it is fixed in the others too. `default_batch` is taken for open first dimensions that
    nothing else fixes. `answer` says what to do about free dimensions, for the error; None: what a marker takes.

    Raises
    ------
    InputError
        An unknown input, a shape that contradicts the model or `batch`, or dimensions that nothing fixes (all are
        listed).
    """
    declared = declared_ranges(model, shapes)
    if batch is not None:
        check_batch(model, batch, shapes)
        declared = {
            spec.name: _of_batch(declared[spec.name], spec, batch) for spec in model.inputs if spec.name in declared
        }
    symbols = _symbols(model, batch, declared)
    ranges: dict[str, ShapeRange] = {}
    free: list[str] = []
    axes: list[int] = []
    first = batch if batch is not None else default_batch
    for spec in model.inputs:
        if spec.name in declared:
            ranges[spec.name] = declared[spec.name]
            continue
        columns: list[tuple[int, ...]] = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                columns.append((dim,) * 3)
            elif dim in symbols:
                columns.append(symbols[dim])
            elif axis == 0 and first is not None:
                columns.append((first,) * 3)
            else:
                axes.append(axis)
                free.append(f"{spec.name}[{axis}]" + (f" ({dim})" if dim else ""))
        if len(columns) == len(spec.shape):
            ranges[spec.name] = ShapeRange(*([tuple(sizes) for sizes in zip(*columns, strict=True)] or [()] * 3))
    if free:
        sizes = {symbol: found[1] for symbol, found in symbols.items()}
        fixed = {name: span.opt for name, span in declared.items()}
        proposed = list(free_dims.proposals(model.inputs, fixed, sizes, first or 1))
        only_first = first is None and not any(axes)
        hint = "fix them: batch=1, or return real inputs from the test" if only_first else (answer or _answer)(proposed)
        raise InputError(f"{model.label}: these dimensions are free: {', '.join(free)}", hint, code="input-dimensions")
    return ranges


def _answer(proposed: Sequence[Mapping[str, Shape]]) -> str:
    return f"fix them, such as by {free_dims.in_python(proposed[0])}, or return real inputs from the test"


def declared_ranges(model: OnnxModel, shapes: Mapping[str, Shape | ShapeRange]) -> dict[str, ShapeRange]:
    """The ranges that `shapes` declares, which the engine must accept whatever the cases are.

    Raises
    ------
    InputError
        An unknown input, or a shape that contradicts the model.
    """
    specs = {spec.name: spec for spec in model.inputs}
    for name in shapes:
        if name not in specs:
            raise InputError(
                f"shapes: {model.label} has no input {name!r}",
                f"its inputs are {_described(model.inputs)}",
                code="input-names",
            )
    return {name: _fitting(given, specs[name]) for name, given in shapes.items()}


def check_batch(model: OnnxModel, batch: int, shapes: Mapping[str, Shape | ShapeRange]) -> None:
    """See that the model can be run with this batch.

    Raises
    ------
    InputError
        The model fixes another batch in every input, or `shapes` declares another one.
    """
    fixed = {spec.name: spec.shape[0] for spec in model.inputs if spec.shape and isinstance(spec.shape[0], int)}
    is_open = any(spec.shape and not isinstance(spec.shape[0], int) for spec in model.inputs)
    if not is_open and batch not in fixed.values():
        by_input = listed(f"{name}[0]={dim}" for name, dim in fixed.items())
        raise InputError(
            f"batch={batch}: {model.label} fixes its batch ({by_input or 'no input has one'})",
            "export it with a dynamic batch dimension",
            code="input-batch",
        )
    for name, span in declared_ranges(model, shapes).items():
        if name not in fixed and span.min and not span.min[0] <= batch <= span.max[0]:
            raise InputError(
                f"batch={batch} contradicts shapes[{name!r}]: its first dimension is {_span(span.min[0], span.max[0])}",
                "leave batch= out, or declare shapes that admit it",
                code="input-batch",
            )


def _of_batch(span: ShapeRange, spec: TensorSpec, batch: int) -> ShapeRange:
    if not spec.shape or isinstance(spec.shape[0], int):
        return span
    low, best, high = ((batch, *shape[1:]) for shape in (span.min, span.opt, span.max))
    return ShapeRange(low, best, high)


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def check_declared(declared: Mapping[str, ShapeRange], case: Case, source: str) -> None:
    """See that a case lies in the shapes that are declared: another engine than the one declared would be tested.

    Raises
    ------
    InputError
        A dimension lies outside; all of them are listed.
    """
    outside = [
        f"{name}[{axis}] is {size}, declared {_span(low, high)}"
        for name, span in declared.items()
        if name in case
        for axis, (size, low, high) in enumerate(zip(np.shape(case[name]), span.min, span.max, strict=False))
        if not low <= size <= high
    ]
    if outside:
        raise InputError(
            f"{source}: outside the declared shapes: {'; '.join(outside)}",
            "widen shapes=, the optimization profile, or give inputs that lie in it",
            code="input-profile",
        )


def leaves_batch_open(model: OnnxModel, shapes: Mapping[str, Shape | ShapeRange]) -> bool:
    """Whether a first dimension is open and fixed by nothing in `shapes`."""
    declared = declared_ranges(model, shapes)
    fixed = _symbols(model, None, declared)
    firsts = [dim for spec in model.inputs if spec.name not in declared for dim in spec.shape[:1]]
    return any(not isinstance(dim, int) and dim not in fixed for dim in firsts)


def _symbols(model: OnnxModel, batch: int | None, declared: Mapping[str, ShapeRange]) -> dict[str, tuple[int, ...]]:
    """The least, best and largest size of each symbolic dimension that an input fixes."""
    symbols: dict[str, tuple[int, ...]] = {}
    for spec in model.inputs:
        if spec.name in declared:
            span = declared[spec.name]
            sizes = zip(spec.shape, zip(span.min, span.opt, span.max, strict=True), strict=True)
        else:
            sizes = zip(spec.shape[:1], [(batch,) * 3] if batch is not None else [], strict=False)
        for dim, found in sizes:
            if isinstance(dim, str):
                symbols.setdefault(dim, found)
    return symbols


def _fitting(given: Shape | ShapeRange, spec: TensorSpec) -> ShapeRange:
    span = given if isinstance(given, ShapeRange) else ShapeRange(given, given, given)
    for shape in (span.min, span.opt, span.max):
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(dim, int) or dim == size for size, dim in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"shapes[{spec.name!r}]={shape}: the model's input is {list(spec.shape)}", code="input-shape"
            )
    return span


def check_is_batch(model: OnnxModel, batch: int, case: Case, source: str) -> None:
    """See that every input that leaves its first dimension open holds `batch` rows.

    Raises
    ------
    InputError
        One holds another number of them.
    """
    for spec in model.inputs:
        rows = np.shape(case[spec.name])[:1] if spec.name in case else ()
        if rows and not isinstance(spec.shape[0], int) and rows[0] != batch:
            raise InputError(
                f"{source}: batch={batch} is declared, input {spec.name!r} holds {plural(rows[0], 'row')}",
                code="input-batch",
            )


def batch_of(model: OnnxModel, case: Case) -> int | None:
    """How many rows a case holds, of the inputs that leave their first dimension open, of a model without any of all
    inputs; None where these hold different numbers.
    """
    rows = {spec.name: np.shape(case[spec.name])[:1] for spec in model.inputs if spec.name in case}
    opened = {spec.name for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int)}
    found = {held for name, held in rows.items() if held and (name in opened or opened.isdisjoint(rows))}
    return found.pop()[0] if len(found) == 1 else None


def profile(model: OnnxModel, declared: Mapping[str, ShapeRange], cases: Sequence[Case]) -> dict[str, ShapeRange]:
    """The optimization profile: for every input with open dimensions what is declared, else a range of all `cases`.

    Raises
    ------
    InputError
        A case lies outside what is declared, or no shape is known.
    """
    for case in cases:
        check_declared(declared, case, model.label)
    spans: dict[str, ShapeRange] = {}
    for spec in model.inputs:
        if not spec.free_dims():
            continue
        if spec.name in declared:
            spans[spec.name] = declared[spec.name]
            continue
        shapes = [tuple(case[spec.name].shape) for case in cases]
        if not shapes:
            raise InputError(
                f"{spec.name}: no shape is known for this input",
                "give shapes=, batch= or inputs",
                code="input-dimensions",
            )
        low = tuple(min(sizes) for sizes in zip(*shapes, strict=True))
        high = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        spans[spec.name] = ShapeRange(low, shapes[0], high)
    return spans


# --- generated inputs ------------------------------------------------------------------------------------------------


def generate(model: OnnxModel, ranges: Mapping[str, ShapeRange], seed: int) -> list[Case]:
    """Inputs made from the specs alone: one case for each distinct one of the (opt, min, max) shapes.

    Floats are uniform in [0, 1). Integers that index a table stay inside it; masks are ones with a tail of zeros;
    positions count up; other integers are uniform in [0, 128) (uint8: the whole range). The same seed gives the same
    inputs, each input by its name and place, so that another input does not change them.

    Raises
    ------
    InputError
        Inputs that share a dimension have two sizes of it, they can't be made of an input's type, or they and the
        outputs whose shape is fixed take more than a quarter of the machine's memory.
    """
    spans = [{name: getattr(span, which) for name, span in ranges.items()} for which in ("opt", "min", "max")]
    distinct = [shapes for index, shapes in enumerate(spans) if shapes not in spans[:index]]
    for shapes in distinct:
        symbols: dict[str, tuple[int, str]] = {}
        for spec in model.inputs:
            for axis, size in enumerate(shapes[spec.name]):
                if problem := _other_size(symbols, spec, axis, size):
                    hint = "declare shapes in which it is one size"
                    raise InputError(f"shapes: input {spec.name!r}: {problem}", hint, code="input-shape")
    _refuse_too_large(model, distinct)
    return [
        {
            spec.name: _generated(spec, shapes[spec.name], np.random.default_rng([seed, number, *spec.name.encode()]))
            for spec in model.inputs
        }
        for number, shapes in enumerate(distinct)
    ]


def _refuse_too_large(model: OnnxModel, cases: Sequence[Mapping[str, Shape]]) -> None:
    """The inputs of all cases, and the outputs of one as far as their size is known."""
    sizes = {
        f"{list(shape)} of input {spec.name!r}": math.prod(shape) * _itemsize(spec)
        for shapes in cases
        for spec in model.inputs
        for shape in [shapes[spec.name]]
    }
    for spec in model.outputs:
        sizes[f"{list(spec.shape)} of output {spec.name!r}"] = math.prod(
            dim if isinstance(dim, int) else 1 for dim in spec.shape
        ) * _itemsize(spec)
    largest = max(sizes, key=sizes.__getitem__, default="")
    memory.refuse(
        sum(sizes.values()),
        f"{model.label}: inputs that are generated and the outputs, such as {largest},",
        "name smaller shapes, shapes={…} or batch=, or return inputs from the test",
    )


def _itemsize(spec: TensorSpec) -> int:
    return 1 if spec.dtype == "str" else dtype_of(spec.dtype).itemsize


def _generated(spec: TensorSpec, shape: Shape, rng: np.random.Generator) -> NDArray[Any]:
    if spec.dtype == "str" or spec.dtype.startswith("complex"):
        kind = "strings" if spec.dtype == "str" else f"{spec.dtype} numbers"
        raise InputError(
            f"input {spec.name!r}: {kind} cannot be generated",
            "return real inputs from the test",
            code="input-generated",
        )
    name, dtype = spec.name.lower(), dtype_of(spec.dtype)
    if "mask" in name:
        return _mask(shape).astype(dtype)
    if spec.dtype.startswith(("float", "bfloat")):
        return rng.random(shape, dtype=np.float32).astype(dtype)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    return rng.integers(0, integer_limit(spec, name), shape).astype(dtype)


def integer_limit(spec: TensorSpec, name: str) -> int:
    """Below what generated integers of an input stay, whose name is given in lower case."""
    if spec.dtype == "bool" or (spec.index_limit is None and ("token_type" in name or "segment" in name)):
        return 2
    limit = spec.index_limit or (256 if spec.dtype == "uint8" else 128)
    return min(limit, int(ml_dtypes.iinfo(dtype_of(spec.dtype)).max) + 1)  # type: ignore[no-untyped-call]


def _mask(shape: Shape) -> NDArray[Any]:
    mask = np.ones(shape)
    if shape and shape[-1] >= 4:
        mask[..., shape[-1] - shape[-1] // 4 :] = 0
    return mask


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of numpy, or of ml_dtypes, that bears a name."""
    if name in np.sctypeDict:
        return np.dtype(name)
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def rebatched(cases: Sequence[Case], model: OnnxModel, batch: int) -> list[Case]:
    """The rows of the cases in batches of `batch`: every row is in one, the last batch reaching back if need be.

    Inputs whose first dimension the model fixes go into each batch as they are.

    Raises
    ------
    InputError
        The first case holds fewer rows than a batch needs.
    """
    batched = [spec.name for spec in model.inputs if spec.shape and not isinstance(spec.shape[0], int)]
    result: list[Case] = []
    for index, case in enumerate(cases):
        short = batch - min((case[name].shape[0] for name in batched), default=batch)
        if short > 0 and index and all(cases[index - 1][name].shape[0] >= short for name in batched):
            # The last batch of a loader; its rows go together with some of the batch before.
            before = cases[index - 1]
            full = {name: np.concatenate([before[name][-short:], case[name]]) for name in batched}
            result.append(case | full)
            continue
        rows = {case[name].shape[0] for name in batched}
        if not batched or rows == {batch}:
            result.append(case)
            continue
        total = min(rows)
        if total < batch:
            raise InputError(
                f"batch={batch}: the inputs hold {plural(total, 'row')}",
                "return at least one batch of rows",
                code="input-empty",
            )
        starts = dict.fromkeys([*range(0, total - batch + 1, batch), total - batch])
        result += [
            {name: array[start : start + batch] if name in batched else array for name, array in case.items()}
            for start in starts
        ]
    return result
