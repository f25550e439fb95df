"""What a module is exported with: arrays for its inputs, and which of their dimensions stay open."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError, suggestion
from pytest_trtcheck.model.sources.exported import BATCHES
from pytest_trtcheck.spec import ShapeRange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.model.sources import Examples


EXAMPLES = ("example_inputs", "example_input_array", "example_input", "dummy_inputs")
"""Attributes of a module that may hold what it takes: the third is Lightning's word, the last Transformers'."""


@dataclass(frozen=True)
class Example:
    """What a module is exported with: arrays by `forward`'s names, and the names of the dimensions that are open."""

    arrays: Mapping[str, NDArray[Any]]
    open_dims: Mapping[str, Mapping[int, str]]
    variadic: str | None = None

    @property
    def names(self) -> list[str]:
        """The inputs in the order of `forward`."""
        return list(self.arrays)

    def described(self) -> str:
        """Of everything about it that decides the export."""
        open_dims = {name: {str(axis): dim for axis, dim in dims.items()} for name, dims in self.open_dims.items()}
        return json.dumps([{n: [a.dtype.name, list(a.shape)] for n, a in self.arrays.items()}, open_dims])

    @classmethod
    def of(cls, module: Any, examples: Examples, label: str) -> Example:
        """What the user gave, sized so that open dimensions are seen to be open."""
        import numpy as np

        parameters = parameters_of(module)
        found, sizes = _given(module, examples, parameters, label)
        variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        order = [p.name for p in parameters]
        found = dict(sorted(found.items(), key=lambda each: order.index(each[0]) if each[0] in order else len(order)))
        open_dims = _open_dims(found, sizes, examples)
        arrays = {}
        for name, array in found.items():
            dims = open_dims.get(name, {})
            shape = [
                BATCHES[0] if dims.get(axis) == "batch" else max(size, 2) if axis in dims else size
                for axis, size in enumerate(array.shape)
            ]
            arrays[name] = np.resize(array, shape)
        return cls(arrays, open_dims, variadic)


def parameters_of(module: Any) -> list[inspect.Parameter]:
    """What its `forward` takes."""
    return list(inspect.signature(module.forward).parameters.values())


def _given(
    module: Any, examples: Examples, parameters: Sequence[inspect.Parameter], label: str
) -> tuple[dict[str, NDArray[Any]], dict[str, set[tuple[int, ...]]]]:
    """An array for each input, from the first source that has any, and the shapes that were seen of it."""
    import numpy as np

    from pytest_trtcheck.model import inputs as model_inputs

    required = [p.name for p in parameters if p.default is p.empty and p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}]
    names = required or [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][:1]
    attribute = next((value for name in EXAMPLES if (value := getattr(module, name, None)) is not None), None)
    several: list[dict[str, NDArray[Any]]] = []
    if examples.inputs is not None:
        several = [model_inputs.by_name(each, names) for each in model_inputs.first_items(examples.inputs)]
    elif attribute is not None and not callable(attribute):
        several = [model_inputs.by_name(attribute, [p.name for p in parameters])]
    found = dict(several[0]) if several else {}
    for name, shape in examples.shapes.items():
        opt = shape.opt if isinstance(shape, ShapeRange) else shape
        found[name] = np.resize(found[name], opt) if name in found else np.zeros(opt, _dtype(module))
    takes_all = any(p.kind in {p.VAR_KEYWORD, p.VAR_POSITIONAL} for p in parameters)
    known = [p.name for p in parameters]
    if unknown := [name for name in found if name not in known and not takes_all]:
        raise ModelError(
            f"{label}: forward has no parameter {', '.join(map(repr, unknown))}",
            suggestion(unknown[0], known) or f"it takes {', '.join(known)}",
            code="input-names",
        )
    if missing := [name for name in required if name not in found]:
        raise ModelError(
            f"{label}: to export it, its inputs must be known: nothing says what "
            f"{', '.join(map(repr, missing))} of forward({', '.join(known)}) is like",
            f"give inputs (a marked test returns them), shapes={{{missing[0]!r}: (1, …)}}, "
            f"or set the module's attribute {EXAMPLES[0]}",
            code="export-inputs",
        )
    if not found:
        raise ModelError(
            f"{label}: forward takes nothing",
            "give a module that computes something of its inputs",
            code="export-inputs",
        )
    # NumPy's default, and nobody's weights.
    found = {n: a.astype(_dtype(module)) if a.dtype == np.float64 else a for n, a in found.items()}
    return found, {name: {each[name].shape for each in several if name in each} for name in found}


def _dtype(module: Any) -> Any:
    """The float type of its weights, as numpy has it."""
    import torch

    from pytest_trtcheck.model.arrays import as_array

    kind = next((each.dtype for each in module.parameters() if each.dtype.is_floating_point), torch.float32)
    return as_array(torch.zeros(1, dtype=kind)).dtype


def _open_dims(
    found: Mapping[str, NDArray[Any]], sizes: Mapping[str, set[tuple[int, ...]]], examples: Examples
) -> dict[str, dict[int, str]]:
    """The dimensions to leave open: the batch, and what `shapes=` gives a range or the inputs several sizes."""
    rows = next((array.shape[0] for array in found.values() if array.ndim), None)
    fixed = any(not isinstance(shape, ShapeRange) for shape in examples.shapes.values())
    open_dims: dict[str, dict[int, str]] = {}
    for name, array in found.items():
        shape = examples.shapes.get(name)
        ranges = [(shape.min, shape.max)] if isinstance(shape, ShapeRange) else []
        shapes = [each for each in sizes[name] if len(each) == array.ndim]
        dims = {}
        for axis in range(array.ndim):
            differs = any(low[axis] != high[axis] for low, high in ranges) or len({each[axis] for each in shapes}) > 1
            is_batch = axis == 0 and array.shape[0] == rows
            if is_batch and (differs or examples.batch is not None or not (fixed or ranges)):
                dims[axis] = "batch"
            elif differs:
                dims[axis] = f"{name}_{axis}"
        if dims:
            open_dims[name] = dims
    return open_dims
