"""What counts as right: the FP32 model's outputs, another model's, or what a callable of the user's computes."""

from __future__ import annotations

from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.errors import CheckError, ModelError, listed, name_of
from pytest_trtcheck.model import golden as golden_samples
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.arrays import as_array, copied
from pytest_trtcheck.model.golden import Golden
from pytest_trtcheck.model.kept_outputs import KeptOutputs
from pytest_trtcheck.model.names import matched, renamed
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import MODEL_FILE, computes_outputs, open_model
from pytest_trtcheck.precision.identity import code, frameworks, library_versions
from pytest_trtcheck.spec import SOURCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
    from pytest_trtcheck.model.onnxruntime import Provider
    from pytest_trtcheck.model.sources import Examples
    from pytest_trtcheck.model.sources.exported import Origin
    from pytest_trtcheck.spec import Shape


class Reference(KeptOutputs):
    """The FP32 model's outputs, computed on ONNX Runtime once for each inputs and kept.

    Where the model carries Q/DQ nodes or 16-bit types, the reference is the FP32 model behind it: activations are not
    quantized or rounded, and the weights are the best that the file holds. Functions that ONNX Runtime would compute
    its own operators for are written out.
    """

    title = "its FP32 reference"

    def __init__(self, model: OnnxModel, cache: Cache, provider: Provider = "cpu") -> None:
        self.model = model
        self._has_twin = model.has_qdq or bool(model.half_types) or model.has_shadowed
        parts = {"model": model.sha256, "provider": provider, **({"code": code()} if self._has_twin else {})}

        def opened() -> OrtRunner:
            return OrtRunner(self.path(), model.label, provider, custom_ops=model.custom_ops)

        super().__init__(cache, "reference", model.label, parts, opened, is_large=model.is_large, files=model.files)

    def path(self) -> Path:
        """The FP32 model's file: the one given, or the FP32 model behind it."""
        if not self._has_twin:
            return self.model.path
        key = Key("float_twin", self.model.label, {"model": self.model.sha256, **library_versions()})
        return self._cache.get_or_make(key, self._make_twin).path / MODEL_FILE

    def _make_twin(self, folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.model.onnx_model import refuse_contradicting_types
        from pytest_trtcheck.precision.emulation import rewrite
        from pytest_trtcheck.precision.quantization import qdq

        refuse_contradicting_types(self.model.path, self.model.label)
        twin = rewrite.emulated(qdq.without(graph.read(self.model.path)), rounding=False)
        graph.write(twin, folder / MODEL_FILE)


def first_that_runs(
    model: OnnxModel, proposed: Iterable[Mapping[str, Shape]], cache: Cache, provider: Provider = "cpu"
) -> Mapping[str, Shape] | None:
    """The first of the shapes of open inputs that the FP32 model computes something of; None where it takes none."""
    for shapes in proposed:
        with suppress(CheckError), closing(Reference(model, cache, provider)) as reference:
            ranges = model_inputs.shape_ranges(model, None, shapes, default_batch=1)
            outputs = reference(model_inputs.generate(model, ranges, seed=0)[0])
            if all(array.size for array in outputs.values()):
                return shapes
    return None


class ModelReference:
    """Another model's outputs as the reference: mostly the FP32 original of a quantized one.

    Parameters
    ----------
    of
        The other model's outputs.
    checked
        The model that is checked. 16-bit inputs are widened for the other model where it takes FP32, and its outputs
        come in the types of the checked model's.

    Raises
    ------
    ModelError
        The inputs and outputs of the two do not bear the same names.
    """

    def __init__(self, of: Reference, checked: OnnxModel) -> None:
        self.model = of.model
        self.title = f"the reference {of.model.label}"
        self.identity: str | None = of.model.sha256
        self.computed_by = self.identity
        self._of = of
        self._checked = checked
        self._inputs, self._outputs = _pairs(of.model, checked)
        pairs = renamed(self._inputs) + renamed(self._outputs)
        taken = (f"{self.title}: taken by their names, {', '.join(pairs)}",) if pairs else ()
        names = [spec.name for spec in of.model.outputs]
        self.notes = (*taken, *_unmatched(self.title, names, self._outputs.values(), checked))

    def __call__(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The checked model's outputs by name, as the other model computes them."""
        return self._fitting(self._of(self._taken(case)))

    def computed(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The same, computed now whatever is cached."""
        return self._fitting(self._of.computed(self._taken(case)))

    def keep(self, cases: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Of a large model, compute all that is to be kept before another one's session is open."""
        self._of.keep(map(self._taken, cases))

    @property
    def keeps(self) -> bool:
        """Whether the other model's outputs are kept."""
        return self._of.keeps

    @keeps.setter
    def keeps(self, keeps: bool) -> None:
        self._of.keeps = keeps

    def close(self) -> None:
        """Free the other model's session."""
        self._of.close()

    def _taken(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {
            spec.name: model_inputs.as_float(case[self._inputs[spec.name]], spec.dtype) for spec in self.model.inputs
        }

    def _fitting(self, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {
            spec.name: model_inputs.as_float(outputs[self._outputs[spec.name]], spec.dtype)
            for spec in self._checked.outputs
        }


class GoldenReference:
    """What a model computed once, from the file that it was recorded in. It has no inner tensors.

    Parameters
    ----------
    golden
        The samples; only their inputs have recorded outputs.
    checked
        The model that is checked. Float outputs come in its types.

    Raises
    ------
    ModelError
        A sample lacks an output of the checked model, or has one of another shape.
    """

    keeps = False

    def __init__(self, golden: Golden, checked: OnnxModel) -> None:
        self.golden = golden
        self.title = f"the reference {golden.title}"
        self.identity: str | None = golden.sha256
        self.computed_by = golden.about.model_sha256
        self._checked = checked
        pairs = dict.fromkeys(pair for number in range(len(golden.inputs)) for pair in renamed(self._names(number)))
        taken = (f"{self.title}: taken by their names, {', '.join(pairs)}",) if pairs else ()
        more = _unmatched(self.title, golden.outputs(0), self._names(0).values(), checked) if golden.inputs else ()
        self.notes: tuple[str, ...] = (*taken, *more, *self._unknown_origin())

    def __call__(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The recorded outputs by name.

        Raises
        ------
        InputError
            The inputs are none of the recorded ones.
        """
        number = golden_samples.which(self.golden, case)
        if number is None:
            golden_samples.require(self.golden, [case], "inputs")
        assert number is not None
        names, outputs = self._names(number), self.golden.outputs(number)
        return {
            spec.name: model_inputs.as_float(outputs[names[spec.name]], spec.dtype) for spec in self._checked.outputs
        }

    computed = __call__

    def close(self) -> None:
        """Nothing is held."""

    def _names(self, number: int) -> dict[str, str]:
        outputs = self.golden.outputs(number)
        names = matched([spec.name for spec in self._checked.outputs], list(outputs))
        problems = [f"it has no output {spec.name!r}" for spec in self._checked.outputs if spec.name not in names]
        problems += [
            f"its output {name!r} is {outputs[name].dtype} {list(outputs[name].shape)}, the model's {spec.dtype} "
            f"{list(spec.shape)}"
            for spec in self._checked.outputs
            if (name := names.get(spec.name)) and not _holds(spec, outputs[name])
        ]
        if problems:
            raise ModelError(
                f"{self.title} does not fit {self._checked.label}: {', '.join(problems)}; it has "
                f"{listed(map(repr, outputs), 10) or 'nothing else'}",
                self.golden.again(),
                code="reference-fit",
            )
        return names

    def _unknown_origin(self) -> tuple[str, ...]:
        about, label = self.golden.about, self.golden.label
        if about.model_sha256 is None:
            return (f"{label} does not say of which model it was recorded: whether it is stale was not checked",)
        if self._checked.sha256 in {about.model_sha256, *about.used_for}:
            return ()
        return (
            f"{label} was recorded of {about.model}: whether {self._checked.label} was made of that was not checked "
            "(record --for checks it)",
        )


def _unmatched(title: str, its: Iterable[str], taken: Iterable[str], checked: OnnxModel) -> tuple[str, ...]:
    """What is said of outputs of a reference that the checked model lacks: nobody compares them."""
    left = [name for name in its if name not in set(taken)]
    if not left:
        return ()
    return (f"{title} gives {listed(map(repr, left))} too, which {checked.label} has not: not compared",)


def _holds(spec: TensorSpec, array: NDArray[Any]) -> bool:
    """Whether an array may be a tensor that a model declares so."""
    # A file may say nothing of its outputs' shapes.
    return _fits_type(array.dtype.name, spec.dtype) and (not spec.shape or _fits_shape(array.shape, spec.shape))


def _fits_type(one: str, other: str) -> bool:
    floats = ("float", "bfloat")
    same = one == other or (one.startswith(floats) and other.startswith(floats))
    return same or (other == "str" and one.startswith(("str", "object")))


def _fits_shape(one: Sequence[int | str | None], other: Sequence[int | str | None]) -> bool:
    return len(one) == len(other) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int) for a, b in zip(one, other, strict=True)
    )


class CallableReference:
    """What a callable of the user's computes as the reference; nothing of it is kept.

    Parameters
    ----------
    function
        Takes a dict from input name to array, and returns a mapping from output name to array.
    checked
        The model that is checked: every output of it has to be there. Float outputs come in its types.
    title
        What messages call it, where that is not its name.
    """

    identity: str | None = None
    keeps = False

    def __init__(self, function: Callable[..., Any], checked: OnnxModel, title: str = "") -> None:
        self.name = name_of(function)
        self.title = title or f"the reference {self.name}"
        self.unread: tuple[str, ...] = ()  # what is to be said once it was called
        self._function = function
        self._checked = checked

    def __call__(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name.

        Raises
        ------
        ModelError
            The callable failed, or gave no array for an output.
        """
        try:
            # Copies: what the callable does to its inputs must not reach the engine.
            outputs = dict(self._function(copied(case)))
            # … and what it gives may be filled anew in the next call.
            arrays = {n: np.array(as_array(value, f"{self.title}: output {n!r}")) for n, value in outputs.items()}
        except CheckError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self.title} failed: {type(error).__name__}: {error}",
                "it takes a dict from input name to array, and returns one from output name to array",
                code="user-code-failed",
            ) from error
        if missing := [spec.name for spec in self._checked.outputs if spec.name not in arrays]:
            raise ModelError(
                f"{self.title} gave no output {', '.join(map(repr, missing))}",
                f"it gave {', '.join(map(repr, arrays)) or 'nothing'}; return an array for each output of the model",
                code="user-code-result",
            )
        names = [spec.name for spec in self._checked.outputs]
        self.unread = _unmatched(self.title, arrays, names, self._checked)
        return {spec.name: model_inputs.as_float(arrays[spec.name], spec.dtype) for spec in self._checked.outputs}

    computed = __call__

    def close(self) -> None:
        """Nothing is held."""


class SourceReference(KeptOutputs):
    """What the model was exported from, computing by itself: the export is checked too."""

    is_shared: ClassVar[bool] = False  # what its code calls besides is no part of the key

    def __init__(self, origin: Origin, checked: OnnxModel, cache: Cache) -> None:
        self.title = f"the reference, {origin.title} itself"
        self.identity: str | None = origin.identity
        parts = {"source": origin.identity, "export": checked.sha256, "frameworks": frameworks()}
        super().__init__(
            cache, "source_outputs", checked.label, parts, lambda: CallableReference(origin, checked, self.title)
        )


AnyReference: TypeAlias = Reference | ModelReference | GoldenReference | CallableReference | SourceReference


def reference_given(
    source: object,
    checked: OnnxModel,
    folders: Sequence[Path],
    cache: Cache,
    provider: Provider = "cpu",
    *,
    examples: Examples | None = None,
) -> ModelReference | GoldenReference | CallableReference | SourceReference:
    """The reference that a marker names: another model, what the model was exported from, or a callable.

    A callable that needs no argument makes a model.

    Raises
    ------
    ModelError
        There is no such model, it does not fit the one that is checked, or that was exported from nothing.
    """
    if source is SOURCE:
        if checked.origin is None:
            raise ModelError(
                f"reference=SOURCE: {checked.label} is ONNX, and nothing else is known to compute it",
                "give the PyTorch or Keras model itself as model=, or name another reference",
                code="reference-fit",
            )
        return SourceReference(checked.origin, checked, cache)
    if isinstance(source, Golden):
        return GoldenReference(source, checked)
    if callable(source) and computes_outputs(source):
        return CallableReference(source, checked)
    try:
        other = open_model(source, folders, cache, examples=examples)
    except ModelError as error:
        raise error.within("reference") from error
    return ModelReference(Reference(other, cache, provider), checked)


def _pairs(other: OnnxModel, checked: OnnxModel) -> tuple[dict[str, str], dict[str, str]]:
    """The checked model's name of each input of the other, and the other's of each output of the checked one.

    Raises
    ------
    ModelError
        They do not fit; all that does not is listed.
    """
    inputs = matched([spec.name for spec in other.inputs], [spec.name for spec in checked.inputs])
    outputs = matched([spec.name for spec in checked.outputs], [spec.name for spec in other.outputs])
    problems = [f"it needs the input {spec.name!r}" for spec in other.inputs if spec.name not in inputs]
    problems += [f"it has no input {spec.name!r}" for spec in checked.inputs if spec.name not in inputs.values()]
    problems += [f"it has no output {spec.name!r}" for spec in checked.outputs if spec.name not in outputs]
    problems += _differing("input", other.inputs, checked.inputs, {ours: its for its, ours in inputs.items()})
    problems += _differing("output", other.outputs, checked.outputs, outputs)
    if problems:
        raise ModelError(
            f"the reference {other.label} does not fit {checked.label}: {', '.join(problems)}",
            f"name the model that {checked.label} was made of; inputs and outputs must bear the same names, or those "
            "with a quantizer's suffix, and have the same shapes and, but for floats, types; a callable as reference= "
            "can rename and convert them",
            code="reference-fit",
        )
    return inputs, outputs


def _differing(
    kind: str, its: Sequence[TensorSpec], ours: Sequence[TensorSpec], names: Mapping[str, str]
) -> Iterator[str]:
    """Tensors of the checked model that are of another shape or type in the other."""
    by_name = {spec.name: spec for spec in its}
    for spec in ours:
        other = by_name.get(names.get(spec.name, ""))
        # A file may say nothing of its outputs' shapes.
        if other is None or (not (spec.shape and other.shape) and _fits_type(other.dtype, spec.dtype)):
            continue
        if not (_fits_type(other.dtype, spec.dtype) and _fits_shape(other.shape, spec.shape)):
            yield (
                f"its {kind} {other.name!r} is {other.dtype} {list(other.shape)}, not {spec.dtype} {list(spec.shape)}"
            )
