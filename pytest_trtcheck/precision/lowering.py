"""The model in the precision asked for, from the cache or made once: what TensorRT is given.

Every artifact is keyed by its true inputs: the bytes it was made from, the arguments, the versions of what computes it,
and the code of this package that decides it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_trtcheck.cache import Cache, Entry, Key, hash_bytes
from pytest_trtcheck.choices import HALVES, PRECISIONS, QUANTIZED, half_part, is_pair, quantized_part
from pytest_trtcheck.errors import ArgumentError, CalibrationError, NothingComputedError, listed, plural
from pytest_trtcheck.model import onnxruntime, ort_runner
from pytest_trtcheck.model.sources import MODEL_FILE
from pytest_trtcheck.precision import arithmetic
from pytest_trtcheck.precision.identity import library_versions
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.record import typed
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from pytest_trtcheck.choices import HalfName
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.quantization.calibration_data import Samples
    from pytest_trtcheck.precision.quantization.coverage import Seen
    from pytest_trtcheck.precision.quantization.plan import QuantizationPlan
    from pytest_trtcheck.spec import Precision

KINDS = ("lowered", "narrowed", "half_io")
"""What a lowered model of ours is in the cache; its key is the digest there."""
_DETAILS_FILE = "details.json"
_RANGES_FILE = "ranges.json"
_NOTHING_FOLDED = "nothing"
_ARITHMETIC = "arithmetic"
_INTEGERS = "integers_alone"


@dataclass(frozen=True)
class Lowered:
    """A model in the precision asked for: what TensorRT is given.

    Parameters
    ----------
    path
        The ONNX file, precision and all.
    key
        Identity, for everything made from it.
    notes
        What a person must know about it: clamped weights, precision taken as it was, …
    details
        What the lowering decided, as plain data: calibrated ranges and the identity of the samples ("seen" is what they
        are like, by input), quantized tensors; "arithmetic", a row (node,
        operator, what it is computed in) for each node that does arithmetic; "constants", those of which the type
        holds too little; "narrowed", whether FP64 became FP32; "io", a `half_io.HalfIo` where inputs and outputs are
        16-bit.
    taken_as_it_is
        Whether the user's model carried its precision already.
    """

    path: Path
    key: str
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    taken_as_it_is: bool = False

    @property
    def integers_alone(self) -> tuple[str, ...]:
        """The weights of which the user's file has no floats."""
        return tuple(self.details.get(_INTEGERS, ()))

    def computed_in(self, precision: str) -> list[arithmetic.Computation] | None:
        """The nodes that compute in `precision`; None where that was not looked at (FP32 as the model has it)."""
        rows = self.details.get(_ARITHMETIC)
        return None if rows is None else arithmetic.within([arithmetic.Computation(*row) for row in rows], precision)

    @property
    def computing_nodes(self) -> frozenset[str] | None:
        """The nodes that do more arithmetic than to round; None where that was not looked at."""
        rows = self.details.get(_ARITHMETIC)
        if rows is None:
            return None
        return frozenset(each.node for each in arithmetic.operators(arithmetic.Computation(*row) for row in rows))

    @property
    def kinds(self) -> dict[str, str]:
        """What each node that does arithmetic computes in, by its name, as far as that was looked at."""
        return {node: kind for node, _, kind in self.details.get(_ARITHMETIC, ())}

    def op_types(self, model: OnnxModel, precision: str) -> frozenset[str]:
        """The operators of `model` that are computed in the precision; all of them where that is not known."""
        nodes = self.computed_in(precision)
        return model.op_types if nodes is None else frozenset(node.op_type for node in nodes)


def lower(
    model: OnnxModel,
    precision: Precision,
    cache: Cache,
    *,
    keep_fp32: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    calibration: object = None,
    folders: Sequence[Path] = (),
    io: HalfName | None = None,
) -> Lowered:
    """The model in `precision`, from the cache when nothing that decides it has changed.

    Parameters
    ----------
    keep_fp32
        Globs of the nodes that are not lowered.
    exclude
        Globs of the nodes that are not quantized: they run in what the rest of the model runs in. Of precisions that
        quantize nothing it says nothing.
    calibration
        What the marker or `trt_calibration` gave; needed for int8, fp8 and pairs with them alone.
    folders
        Where relative calibration files are looked up.
    io
        The 16-bit type of its inputs and outputs; None: as the model has them.

    Raises
    ------
    CalibrationError
        INT8 or FP8 without calibration data, or data that does not fit.
    ModelError, ArgumentError
        The model can't be lowered to this precision; `keep_fp32` or `exclude` names no node.
    """
    exclude = exclude if quantized_part(precision) else ()
    lowered = _as_it_is(model, precision, (*keep_fp32, *exclude), cache) or _lowered(
        model, precision, cache, keep_fp32=keep_fp32, exclude=exclude, calibration=calibration, folders=folders
    )
    _refuse_without_computation(model, precision, lowered, (*keep_fp32, *exclude))
    if model.has_qdq:
        integers = _surveyed(model, cache)[_INTEGERS]
        lowered = replace(lowered, details={**lowered.details, _INTEGERS: integers})
    return lowered if io is None else with_half_io(model, lowered, io, cache)


def with_half_io(model: OnnxModel, lowered: Lowered, kind: HalfName, cache: Cache) -> Lowered:
    """A lowered model whose FP32 inputs and outputs are 16-bit.

    Raises
    ------
    ArgumentError
        It has none, or there is no such type.
    """
    if kind not in HALVES:
        raise ArgumentError(f"BuildOptions: io={kind!r}: expected one of {', '.join(HALVES)}", "or leave it out")

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import half_io

        read = graph.read(lowered.path)
        found = half_io.to_half(read, kind)
        graph.write(read, folder / MODEL_FILE)
        _write_details(folder, (), {"io": found})

    entry = cache.get_or_make(
        Key("half_io", model.label, {"lowered": lowered.key, "io": kind, **library_versions()}), make
    )
    io = entry.read_json(_DETAILS_FILE, lambda found: typed(found["io"], tuple[str, list[str], list[str]]))
    if not any(io[1:]):
        raise ArgumentError(
            f"BuildOptions: io={kind!r}: {model.label} has neither inputs nor outputs in FP32",
            "leave it out",
            code="build-option",
        )
    note = f"inputs and outputs are {kind}: {listed([*io[1], *io[2]])}"
    details = {**lowered.details, "io": io}
    return replace(
        lowered, path=entry.path / MODEL_FILE, key=entry.key.digest, details=details, notes=(*lowered.notes, note)
    )


def _lowered(
    model: OnnxModel,
    precision: Precision,
    cache: Cache,
    *,
    keep_fp32: tuple[str, ...],
    exclude: tuple[str, ...],
    calibration: object,
    folders: Sequence[Path],
) -> Lowered:
    rows = _surveyed(model, cache)[_ARITHMETIC] if model.has_double or precision == "tf32" else []
    has_double = any(kind == "float64" for _, _, kind in rows)
    narrowed = ("FP64 was taken as FP32, as TensorRT does",) if has_double else ()
    if precision in {"fp32", "tf32"}:
        as_fp32 = [(name, operator, kind.replace("float64", "fp32")) for name, operator, kind in rows]
        details = {_ARITHMETIC: as_fp32} if rows or precision == "tf32" else {}
        if not has_double:
            return Lowered(model.path, model.sha256, details=details)
        entry = _narrowed(model, model.path, cache)
        return Lowered(entry.path / MODEL_FILE, entry.key.digest, narrowed, {**details, "narrowed": True})
    parts = {
        "model": model.sha256,
        "precision": precision,
        "keep_fp32": json.dumps(sorted(keep_fp32)),
        "exclude": json.dumps(sorted(exclude)),
        **library_versions(),
    }
    # A model that has Q/DQ nodes and is FP32 around them: of a pair, the rest alone is left to be lowered.
    own_qdq = model.has_qdq and is_pair(precision) and _is_quantized(model, precision, cache)
    ranges = None
    if quantized_part(precision) is not None and not own_qdq:
        ranges = _calibration(model, calibration, folders, cache, precision)
        parts |= ranges.key_parts
    if own_qdq and exclude:
        raise ArgumentError(
            f"exclude: {model.label} brings its Q/DQ nodes with it",
            "export it without those that are not wanted",
            code="precision-carried",
        )

    def make(folder: Path) -> None:
        ort_runner.expect()  # what is lowered now will be run
        from pytest_trtcheck.model import graph

        if keep_fp32 or exclude:
            given = graph.read(model.path)
            graph.matching_nodes(given, keep_fp32)
            graph.matching_nodes(given, exclude, "exclude")
        if ranges is not None:
            made, notes, details = _quantized(model, precision, ranges, cache, keep_fp32=keep_fp32, exclude=exclude)
        else:
            path = _as_given(model, cache) if own_qdq else prepared(model, keep_fp32, cache)
            made, notes, details = _half(graph.read(path), precision, keep_fp32)
            notes[:0] = [f"{model.label} already carries Q/DQ nodes: they are kept as they are"] * own_qdq
            notes += _as_floats(model, made, precision, cache)
        graph.write(made, folder / MODEL_FILE)
        _write_details(folder, notes, details)

    entry = cache.get_or_make(Key("lowered", model.label, parts), make, shared=True)
    notes, kept = entry.read_json(_DETAILS_FILE, _notes_and_details)
    seen = {"seen": ranges.seen} if ranges is not None else {}
    return Lowered(entry.path / MODEL_FILE, entry.key.digest, (*narrowed, *notes), {**kept, **seen})


def _is_quantized(model: OnnxModel, precision: Precision, cache: Cache) -> bool:
    """Whether the user's model computes in the type that `precision` quantizes to."""
    found = [arithmetic.Computation(*row) for row in _surveyed(model, cache)[_ARITHMETIC]]
    return bool(arithmetic.within(found, quantized_part(precision) or ""))


def _as_floats(model: OnnxModel, made: ir.Model, precision: Precision, cache: Cache) -> list[str]:
    """What is said of weights that the user's model holds as integers, and `made` computes floats of."""
    from pytest_trtcheck.precision.quantization import qdq

    if not model.has_qdq:
        return []
    left = set(qdq.integers_alone(made))
    if not (found := [each for each in _surveyed(model, cache)[_INTEGERS] if each not in left]):
        return []
    return [
        f"{listed(found)}: dequantized by arithmetic in {half_part(precision)}: an engine holds these weights as "
        f"floats, and whether TensorRT takes them as {model.label} has them was not looked at"
    ]


def _as_given(model: OnnxModel, cache: Cache) -> Path:
    """The user's file, with FP64 as FP32."""
    return _narrowed(model, model.path, cache).path / MODEL_FILE if model.has_double else model.path


def _surveyed(model: OnnxModel, cache: Cache) -> dict[str, Any]:
    """What each node of the user's model that does arithmetic computes in: rows of `arithmetic.Computation`.

    Beside them the weights that it has as integers alone.
    """

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.model.onnx_model import refuse_contradicting_types
        from pytest_trtcheck.precision import survey
        from pytest_trtcheck.precision.quantization import qdq

        if model.has_qdq or model.half_types:
            refuse_contradicting_types(model.path, model.label)
        read = graph.read(model.path)
        _write_details(folder, (), {_ARITHMETIC: survey.survey(read), _INTEGERS: qdq.integers_alone(read)})

    entry = cache.get_or_make(Key("arithmetic", model.label, {"model": model.sha256, **library_versions()}), make)
    return entry.read_json(_DETAILS_FILE, details_of)


def _as_it_is(model: OnnxModel, precision: Precision, left_out: tuple[str, ...], cache: Cache) -> Lowered | None:
    """The user's own model where it computes in `precision` already; None where it is FP32, to be lowered.

    What its matrix products compute in decides: weights that are stored in fewer bits, or a cast somewhere, make no
    model of another precision. Q/DQ nodes round whatever the operators compute in, so a model with them is taken as it
    is, or not at all: without them it would be another model.

    Raises
    ------
    NothingComputedError
        It computes in another precision.
    ArgumentError
        Nodes are to be `left_out`, and nothing is lowered.
    """
    if not (model.has_qdq or model.half_types):
        return None
    rows = _surveyed(model, cache)[_ARITHMETIC]
    found = [arithmetic.Computation(*row) for row in rows]
    operators = arithmetic.operators(found)
    reduced = {each.kind for each in found} - {"fp32", "float64"}
    mine = arithmetic.within(operators, precision)
    heavy = arithmetic.heaviest(operators)
    mostly = bool(mine) and 2 * len(arithmetic.within(heavy, precision)) >= len(heavy)
    quantized, rest = quantized_part(precision), half_part(precision)
    is_quantized = quantized is not None and bool(arithmetic.within(found, quantized))
    if not reduced or (precision in HALVES and reduced == {precision} and not mostly):
        return None
    if quantized and rest:
        if is_quantized and reduced == {quantized} and len(mine) < len(operators):
            return None
        mostly = mostly and is_quantized and reduced == {quantized, rest}
        is_quantized = mostly
    if precision == "fp32" and mostly and len(operators) == len(found):
        return None
    if precision in {"fp32", "tf32"} or not (mostly or is_quantized):
        raise _computes_in_another(model, precision, found, reduced)
    carried = sorted(model.half_types) + (["Q/DQ nodes"] if model.has_qdq else [])
    if left_out:
        raise ArgumentError(
            f"keep_fp32, exclude: {model.label} carries {' and '.join(carried)} and is taken as it is, so nothing can "
            "be kept",
            "leave them out; export the model with those nodes in FP32, or give the FP32 model",
            code="precision-carried",
        )
    note = f"{model.label} already carries {' and '.join(carried)}: taken as it is, {precision=} changed nothing; " + (
        f"of its {plural(len(operators), 'node')} with arithmetic, {len(mine)} in {precision}"
        if mine
        else f"none of its operators computes in {precision}, values are rounded to its grid alone"
    )
    return Lowered(model.path, model.sha256, (note,), {_ARITHMETIC: rows}, taken_as_it_is=True)


def carried(model: OnnxModel, cache: Cache) -> Precision | None:
    """The precision in which a model is taken as it is; None where it has to be lowered."""
    for precision in (*filter(is_pair, PRECISIONS), *QUANTIZED, *HALVES):
        with suppress(NothingComputedError):
            if _as_it_is(model, precision, (), cache) is not None:
                return precision
    return None


def _computes_in_another(
    model: OnnxModel, precision: Precision, found: Sequence[arithmetic.Computation], reduced: set[str]
) -> NothingComputedError:
    # What computes in integers is refused in every precision.
    own = [kind for kind in ("int8", "fp8", "fp16", "bf16") if kind in reduced and "integers" not in reduced]
    operators = arithmetic.operators(found)
    shown = operators if reduced & {each.kind for each in operators} else found
    hint = "export the model in FP32: it is lowered to what is asked for"
    if own:
        hint = f"ask for precision={own[0]!r}, which takes the model as it is; or {hint}"
    return NothingComputedError(
        f"{precision=}: {model.label} carries its precision already: {_by_kind(shown)}, so that it cannot be "
        f"checked in {precision}",
        hint,
        code="precision-carried",
    )


def _by_kind(found: Sequence[arithmetic.Computation]) -> str:
    """How many nodes compute in what, with the first of their names: "5 nodes in fp16 (a, b, c and 2 more)"."""
    nodes = _grouped((each.kind, each.node) for each in found)
    return ", ".join(f"{plural(len(names), 'node')} in {kind} ({listed(names)})" for kind, names in nodes.items())


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for group, name in pairs:
        groups.setdefault(group, []).append(name)
    return groups


def _refuse_without_computation(
    model: OnnxModel, precision: Precision, lowered: Lowered, left_out: tuple[str, ...]
) -> None:
    """Only what was computed in the precision asked for can pass.

    Raises
    ------
    NothingComputedError
        No node is computed in `precision`; the message says why not.
    """
    # Of a pair, what is quantized counts: without it, it would be another precision. That the rest is none is a note.
    nodes = lowered.computed_in(quantized_part(precision) or precision)
    if nodes is None or precision == "fp32":
        return
    integers = [name for name, _, kind in lowered.details[_ARITHMETIC] if kind == "integers"]
    if integers:
        raise NothingComputedError(
            f"{precision=}: {model.label} carries its precision already: {len(integers)} of its nodes compute in "
            f"integers ({listed(integers)}), whatever is asked for",
            "export the model in FP32, or with Q/DQ nodes",
            code="precision-carried",
        )
    if nodes:
        return
    if not lowered.details[_ARITHMETIC]:
        operators = listed(sorted(model.op_types), 10) or "none"
        raise NothingComputedError(
            f"{precision=}: nothing is computed in {precision}: {model.label} does no arithmetic on floats that depend "
            f"on its inputs (its operators: {operators})",
            "such a model has nothing that a precision could change: check the model that it belongs to",
        )
    if precision == "tf32":
        raise NothingComputedError(
            f"{precision=}: nothing is computed in TF32: {model.label} has no matrix product in FP32 (Conv, Gemm, "
            "MatMul, …), and TF32 serves those alone",
            "check it in another precision",
        )
    left: dict[str, str] = lowered.details.get("left_float", {})
    rows = lowered.details[_ARITHMETIC]
    reasons = _grouped((left.get(name, f"computed in {kind}"), name) for name, _, kind in rows)
    lines = "".join(f"\n    {listed(names)}: {reason}" for reason, names in reasons.items())
    hint = (
        "narrow keep_fp32 or exclude"
        if left_out
        else "export these nodes as ONNX operators, or check another precision"
    )
    raise NothingComputedError(f"{precision=}: nothing of {model.label} is computed in {precision}{lines}", hint)


@dataclass(frozen=True)
class _Calibration:
    """The user's calibration data, how ranges are made of it, and what identifies both."""

    given: Calibration
    samples: Samples
    key_parts: Mapping[str, str]
    seen: Mapping[str, Seen]


def _calibration(
    model: OnnxModel, source: object, folders: Sequence[Path], cache: Cache, precision: Precision
) -> _Calibration:
    if source is None:
        raise CalibrationError(
            f"{precision=}: {model.label} has no Q/DQ nodes{' of activations' * model.has_qdq}, and no calibration "
            "data is given",
            'give it, calibration="data/calibration/*.npz", or by the fixture trt_calibration; '
            "random data would give an engine that fails silently",
        )
    from pytest_trtcheck.precision.quantization import calibration_data, coverage

    samples = calibration_data.load(source, model.inputs, folders)
    given = source if isinstance(source, Calibration) else Calibration(source)
    key_parts = {
        "calibration": calibration_data.digest_of(samples, cache),
        "calibration_method": given.method + f" {given.percentile}" * (given.method == "percentile"),
        "onnxruntime": onnxruntime.version(),
    }
    # Now: of a generator there is no other time.
    seen = coverage.of_calibration(model, samples, key_parts["calibration"], cache)
    return _Calibration(given, samples, key_parts, seen)


def _narrowed(model: OnnxModel, path: Path, cache: Cache) -> Entry:
    """The file at `path`, which is `model` or was made from it alone, with FP64 as FP32."""

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import double

        graph.write(double.to_float(graph.read(path)), folder / MODEL_FILE)

    parts = {"model": model.sha256, "given": str(path == model.path), **library_versions()}
    return cache.get_or_make(Key("narrowed", model.label, parts), make)


def prepared(model: OnnxModel, keep_fp32: tuple[str, ...], cache: Cache) -> Path:
    """The FP32 model that is lowered: that behind 16-bit types and Q/DQ, FP64 as FP32, batch normalization folded."""
    source = Reference(model, cache).path()
    if model.has_double:
        source = _narrowed(model, source, cache).path / MODEL_FILE
    # In pieces it is a Mul and an Add behind a convolution.
    may_fold = "BatchNormalization" in model.op_types or ("Conv" in model.op_types and {"Div", "Mul"} & model.op_types)
    if not may_fold:
        return source
    parts = {"model": model.sha256, "keep_fp32": json.dumps(sorted(keep_fp32)), **library_versions()}

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import batch_norm, constants

        read = graph.read(source)
        kept = graph.matching_nodes(read, graph.still_there(read, keep_fp32))
        constants.fold_casts(read)
        before = read.graph.num_nodes()
        folded = batch_norm.fold_batch_norm(read, kept)
        if folded.graph.num_nodes() != before or "BatchNormalization" in model.op_types:
            graph.write(folded, folder / MODEL_FILE)
        else:
            (folder / _NOTHING_FOLDED).touch()

    path = cache.get_or_make(Key("folded", model.label, parts), make).path
    return source if (path / _NOTHING_FOLDED).exists() else path / MODEL_FILE


def _write_details(folder: Path, notes: Sequence[str], details: Mapping[str, Any]) -> None:
    (folder / _DETAILS_FILE).write_text(json.dumps({"notes": list(notes), **details}))


def _notes_and_details(found: Any) -> tuple[list[str], dict[str, Any]]:
    return typed(found.pop("notes"), list[str]), details_of(found)


def details_of(found: Any) -> dict[str, Any]:
    """`Lowered.details`, from JSON.

    Raises
    ------
    ReportError
        That is not what it is.
    """
    details = typed(found, dict[str, Any])
    if _ARITHMETIC in details:
        details[_ARITHMETIC] = typed(details[_ARITHMETIC], list[arithmetic.Computation])
    return details


_Made: TypeAlias = "tuple[ir.Model, list[str], dict[str, Any]]"
"""A lowered model, the notes on it, and its details."""


def _half(model: ir.Model, precision: Precision, keep_fp32: tuple[str, ...]) -> _Made:
    """The model, or what is not quantized of it, in the 16-bit type of `precision`."""
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision import half, survey

    kind = half_part(precision)
    assert kind is not None
    # A 16-bit model has Q/DQ nodes where weights lie in fewer bits, in blocks.
    has_qdq = is_pair(precision) or any(node.op_type == "DequantizeLinear" for node in graph.all_nodes(model.graph))
    around_qdq = has_qdq and _type_of_qdq(precision) is not None
    lowered = half.to_half(model, kind, graph.still_there(model, keep_fp32), around_qdq=around_qdq)
    rows = survey.survey(lowered.model)
    found = arithmetic.operators(rows)
    notes = [
        f"weight {each.name}: {plural(each.count, 'value')} up to {each.value:.4g} beyond the range of {kind} "
        f"became ±{half.LARGEST[kind]:g}"
        for each in lowered.overflow
    ]
    notes += [
        f"constant {each.name} ({each.value:.4g}, read by {listed(each.readers)}) is too small for {kind}: it became 0"
        for each in lowered.underflow
    ]
    notes += _without_kernel_note(kind, lowered.without_kernel)
    mine = arithmetic.within(found, precision)
    if quantized_part(precision) is not None and not arithmetic.within(found, kind):
        notes.append(f"nothing is left that computes in {kind}: of the pair, the quantized nodes are all there is")
    if 0 < 2 * len(mine) < len(found):
        others = [each for each in found if each not in mine]
        reasons = dict.fromkeys(lowered.left.get(each.node, f"computed in {each.kind}") for each in others)
        notes.append(
            f"of {plural(len(found), 'node')} with arithmetic, {len(mine)} in {precision}; the others are not: "
            f"{listed(reasons, 5)}"
        )
    constants = {kind: [asdict(each) for each in getattr(lowered, kind)] for kind in ("overflow", "underflow")}
    rows = found if quantized_part(precision) is None else rows
    return lowered.model, notes, {_ARITHMETIC: rows, "left_float": dict(lowered.left), "constants": constants}


def _type_of_qdq(precision: Precision) -> HalfName | None:
    """The 16-bit type of Q/DQ nodes, and of the operators that read them; None: they stay FP32.

    An operator's type is that of its products. FP8's codes reach 448, and the products of many of them soon 65,504:
    TensorRT-RTX 1.5 on an H100 multiplies by the scales behind that, and in FP16 all of ten models came out wrong
    (docs/measured).
    """
    return None if precision == "fp8+fp16" else half_part(precision)


def _without_kernel_note(precision: str, nodes: Mapping[str, str]) -> list[str]:
    """What stays in FP32 for want of a kernel, by operator."""
    if not nodes:
        return []
    names = _grouped((op_type, name) for name, op_type in nodes.items())
    kinds = [f"{op_type} ({listed(found)})" for op_type, found in sorted(names.items())]
    stay = "it stays" if len(nodes) == 1 else "they stay"
    return [f"TensorRT has no {precision} kernel for {'; '.join(kinds)}: {stay} in FP32"]


def _quantized(
    model: OnnxModel,
    precision: Precision,
    calibration: _Calibration,
    cache: Cache,
    *,
    keep_fp32: tuple[str, ...],
    exclude: tuple[str, ...],
) -> _Made:
    from pytest_trtcheck.model import graph
    from pytest_trtcheck.precision.quantization import calibrate, choosing, quantize
    from pytest_trtcheck.precision.quantization.plan import points, summary

    path = prepared(model, keep_fp32, cache)
    read = quantize.read(model, path)
    plan = points(read, graph.still_there(read, keep_fp32), graph.still_there(read, exclude))
    parts = {
        "model": model.sha256,
        "tensors": hash_bytes(json.dumps(plan.tensors).encode()),
        **calibration.key_parts,
        **library_versions(),
    }
    given, samples, kind = calibration.given, calibration.samples, quantized_part(precision)
    assert kind is not None
    if given.method in {"auto", "mse"}:
        # Its levels, and the model that is judged.
        parts |= {"precision": kind, "plan": hash_bytes(json.dumps(asdict(plan)).encode())}

    def run(probe: Path) -> ort_runner.OrtRunner:
        return ort_runner.OrtRunner(probe, model.label, custom_ops=model.custom_ops)

    def calibrated(target: Path) -> None:
        if given.method == "auto":
            task = calibrate.Task(run, path, plan, samples, kind, describe=samples.describe, rows=samples.rows)
            ranges = choosing.choose(task, model)
        else:
            ranges = calibrate.collect(
                run,
                path,
                plan,
                samples,
                method=given.method,
                percentile=given.percentile,
                dtype=kind,
                describe=samples.describe,
                rows=samples.rows,
            )
        (target / _RANGES_FILE).write_text(ranges.to_json())

    entry = cache.get_or_make(Key("calibration", model.label, parts), calibrated, shared=True)
    ranges = entry.read_json(_RANGES_FILE, calibrate.Ranges.from_json)
    quantized, notes, details = quantized_by(read, plan, ranges.amax(), precision, keep_fp32)
    rest = half_part(precision)
    others = f"; {plural(len(arithmetic.within(details[_ARITHMETIC], rest)), 'other')} in {rest}" if rest else ""
    notes.insert(0, f"{precision}: {summary(plan)}{others}; {ranges}")
    return quantized, notes, {"ranges": asdict(ranges), "samples": calibration.key_parts["calibration"], **details}


def quantized_by(
    model: ir.Model,
    plan: QuantizationPlan,
    ranges: Mapping[str, float],
    precision: Precision,
    keep_fp32: tuple[str, ...],
) -> _Made:
    """The model (used up) with Q/DQ where `plan` says, and of a pair the rest in 16 bits; notes on it, and details."""
    from pytest_trtcheck.precision import survey
    from pytest_trtcheck.precision.quantization import quantize

    kind, rest = quantized_part(precision), half_part(precision)
    assert kind is not None
    quantized = quantize.quantize(model, plan, ranges, kind, _type_of_qdq(precision))
    left = dict(plan.left_float)
    if rest is None:
        return quantized, [], {"left_float": left, _ARITHMETIC: survey.survey(quantized)}
    lowered, notes, details = _half(quantized, precision, keep_fp32)
    return lowered, notes, {**details, "left_float": {**left, **details["left_float"]}}


def float_path(model: OnnxModel, lowered: Lowered, keep_fp32: tuple[str, ...], cache: Cache) -> Path:
    """The FP32 model that `lowered` was made from: tensors of both bear the same names.

    It computes what the reference computes, batch normalization folded where the lowering folds it.
    """
    if lowered.taken_as_it_is or lowered.path == model.path:
        return Reference(model, cache).path()
    if lowered.details.get("narrowed", False):
        return lowered.path
    return prepared(model, keep_fp32, cache)
