"""Models of other libraries: exported to ONNX once, kept by content, and still at hand to compute by themselves.

A source of this kind opens its model with `exported`: it says what the export is made from and how the file is written,
and gives the `Origin`, which is what `reference=SOURCE` compares with. Whether a batch that the file leaves open really
is open is proved here, by running two of them.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Protocol

from pytest_trtcheck.errors import CheckError, InputError, ModelError, first_line, plural
from pytest_trtcheck.spec import ShapeRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening

    Outputs = Mapping[str, NDArray[Any]]

BATCHES = 2, 3
"""Neither is 1, which exporters take for a constant."""
SAME = 1e-3
"""How far export and source may lie apart, as max|a − b| / max|b|, to count as the same in FP32."""
OTHER = 0.05
"""From here on what agreed with one batch does not agree with the other."""


@dataclass(frozen=True)
class Inner:
    """A value inside the source, which a tensor of the export ought to hold too.

    Parameters
    ----------
    path
        Where the source has it, in the source's own words: "blocks.3.mlp.fc1".
    tensors
        The tensors of the export that may be it: the one whose shape fits is.
    value
        As the source computes it.
    """

    path: str
    tensors: tuple[str, ...]
    value: NDArray[Any]


class Origin(Protocol):
    """What an ONNX model was exported from."""

    @property
    def title(self) -> str:
        """What messages call it, as in "the module ResNet"."""

    @property
    def identity(self) -> str:
        """Of everything that decides what it computes: weights, code, versions of libraries."""

    def __call__(self, case: Case) -> Outputs:
        """What it computes by itself in FP32, by the names that the export has for its outputs.

        Raises
        ------
        ModelError
            It fails.
        """

    def inside(self, case: Case, export: onnx.ModelProto) -> Iterator[Inner]:
        """What it computes on the way, in the order of computation; nothing where that can't be seen."""


def exported(
    opening: Opening, label: str, made_from: Mapping[str, str], write: Callable[[Path], None], origin: Origin
) -> OnnxModel:
    """The ONNX file that `write` writes, from the cache once it was written.

    Parameters
    ----------
    label
        What messages call the model.
    made_from
        Everything that decides the file, by name: weights, code, versions, shapes. The rest is the exporter's own.
    write
        Writes the file; external data goes beside it.
    origin
        What it is exported from.

    Raises
    ------
    ModelError
        The export fails, is no sound model, or computes for one batch alone.
    """
    from pytest_trtcheck.cache import Key
    from pytest_trtcheck.model import remembered
    from pytest_trtcheck.model.sources import MODEL_FILE

    entry = opening.cache.get_or_make(Key("exported", label, made_from), lambda folder: write(folder / MODEL_FILE))
    model = remembered.model(entry.path / MODEL_FILE, label, opening.cache)
    model = replace(model, origin=origin)
    return replace(model, notes=_proved(model, opening))


def apart(names: Iterable[str], inputs: Iterable[str]) -> list[str]:
    """The names of a source's outputs, each made one that no input and no other output has, as ONNX asks for."""
    taken, found = set(inputs), []
    for name in names:
        free = chain((name, f"{name}_out"), (f"{name}_{number}" for number in count(2)))
        found.append(next(each for each in free if each not in taken))
        taken.add(found[-1])
    return found


_TORCH_SCOPES = "pkg.torch.onnx.name_scopes"
SCOPES = "pytest_trtcheck.scopes"
"""Metadata of a node that a source of ours writes: JSON, every part of the source that it lies in, outermost first."""


def module_path(node: onnx.NodeProto) -> str:
    """Where the source has what a node computes ("blocks.3.mlp.fc1"); empty where the exporter did not say."""
    return (within(node) or ("",))[-1]


def within(node: onnx.NodeProto) -> tuple[str, ...]:
    """Every part of the source that a node lies in, the outermost first; none where the exporter did not say."""
    import ast
    import json

    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return tuple(json.loads(entry.value))
        if entry.key == _TORCH_SCOPES:
            # The last one is the operator itself; shapes are computed outside of all modules.
            scopes = ast.literal_eval(entry.value)[:-1]
            return tuple(scope for scope in scopes if scope and not scope.startswith("_empty_nn_module"))
    return ()


# --- is the batch open? ----------------------------------------------------------------------------------------------


def _proved(model: OnnxModel, opening: Opening) -> tuple[str, ...]:
    """What to say of an export that was run beside its source, with two batches where it leaves the batch open.

    Raises
    ------
    ModelError
        It computes for one batch alone, or other outputs than its source.
    """
    from pytest_trtcheck.cache import Key, hash_code
    from pytest_trtcheck.model import onnxruntime as ort
    from pytest_trtcheck.model import remembered

    assert model.origin is not None
    parts = {
        "model": model.sha256,
        "source": model.origin.identity,
        "onnxruntime": ort.version(),
        "code": hash_code("model/sources/exported.py"),
    }
    try:
        cases = _cases(model, opening)
    except InputError:
        # What is missing is said when the check asks for its inputs; nothing is run before.
        return ()
    key = Key("export_proof", model.label, parts)
    return tuple(remembered.once(key, lambda: _prove(model, cases), remembered.names, opening.cache))


def _cases(model: OnnxModel, opening: Opening) -> dict[int | None, Case]:
    """What to run the export on, by batch; None: the batch that it fixes."""
    from pytest_trtcheck.model import inputs as model_inputs

    asked = opening.examples
    is_open = any(spec.shape and not isinstance(spec.shape[0], int) for spec in model.inputs)
    batches: tuple[int | None, ...] = BATCHES if is_open else (None,)
    if asked.inputs is not None:
        case = model_inputs.first_case(asked.inputs, model, "inputs")
        if not is_open:
            return {None: case}
        return {batch: model_inputs.of_batch(case, model, batch) for batch in BATCHES}
    first_of = {name: shape.opt if isinstance(shape, ShapeRange) else shape for name, shape in asked.shapes.items()}
    found: dict[int | None, Case] = {}
    for batch in batches:
        shapes = first_of if batch is None else {name: (batch, *shape[1:]) for name, shape in first_of.items()}
        ranges = model_inputs.shape_ranges(model, batch, shapes)
        found[batch] = model_inputs.generate(model, ranges, seed=0)[0]
    return found


def _prove(model: OnnxModel, cases: Mapping[int | None, Case]) -> list[str]:
    from pytest_trtcheck.model.ort_runner import OrtRunner

    origin = model.origin
    assert origin is not None
    distances: dict[int | None, dict[str, float]] = {}
    try:
        opened = OrtRunner(model.path, model.label)
    except ModelError as error:
        if error.code != "runtime-refused" or not model.half_types:
            raise
        # Its float twin runs; that one is made by rooms above.
        return [f"the export was not run beside {origin.title}, nor with two batches: {error.headline}"]
    with closing(opened) as runner:
        for batch, case in cases.items():
            try:
                expected = origin(case)
            except ModelError as error:
                if batch in {None, BATCHES[0]}:
                    raise
                raise _fixed(model, batch, f"{origin.title} itself fails: {first_line(error)}") from error
            try:
                actual = runner(case)
            except CheckError as error:
                if batch is None:
                    raise
                raise _fixed(model, batch, error.headline) from error
            if problem := _misshapen(expected, actual):
                if batch in {None, BATCHES[0]}:
                    raise ModelError(
                        f"{model.label}: the export is not what {origin.title} computes: {problem}",
                        code="export-differs",
                    )
                raise _fixed(model, batch, problem)
            distances[batch] = {name: distance(actual[name], expected[name]) for name in actual}
    return list(_compared(model, distances))


def _fixed(model: OnnxModel, batch: int | None, why: str) -> ModelError:
    return ModelError(
        f"{model.label}: the export fixes the batch at {BATCHES[0]}: with {plural(batch or 1, 'row')}, {why}",
        "look for sizes that are numbers in the model (x.view(2, …), a loop over rows), or check one shape alone: "
        "shapes={input: shape}",
        code="export-batch",
    )


def _misshapen(expected: Outputs, actual: Outputs) -> str:
    for name, array in actual.items():
        if name not in expected:
            return f"it has an output {name!r}, its source has {', '.join(map(repr, expected)) or 'none'}"
        if array.shape != expected[name].shape:
            return f"output {name!r} is {list(array.shape)}, its source computes {list(expected[name].shape)}"
    return ""


def distance(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """max|a − e| / max|e| of floats, their infinities aside; 0 for anything else, which a near tie may turn over."""
    import numpy as np

    if expected.dtype.kind not in "fV" or not expected.size:
        return 0.0
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(e) & np.isfinite(a)
    if not np.array_equal(np.isfinite(e), np.isfinite(a)):
        return float("inf")
    peak = float(np.abs(e[finite]).max(initial=0.0))
    return float(np.abs(a - e)[finite].max(initial=0.0)) / (peak or 1.0)


def _compared(model: OnnxModel, distances: Mapping[int | None, Mapping[str, float]]) -> Iterator[str]:
    assert model.origin is not None
    first, *others = distances.values()
    for name, apart in first.items():
        for other in others:
            if apart <= SAME and other[name] > OTHER:
                raise _fixed(model, BATCHES[1], f"output {name!r} lies {other[name]:.3g} from what it should be")
    name, worst = max(first.items(), key=lambda item: item[1], default=("", 0.0))
    if worst > SAME:
        yield (
            f"the export is not what {model.origin.title} computes: output {name!r} lies {worst:.3g} apart in FP32 "
            "(max|a − b| / max|b|); reference=SOURCE checks the export too"
        )
