"""Golden samples: what a model computed once, beside the inputs that it computed it from, in one .npz file.

numpy opens it as any other: `np.load("golden.npz")["outputs/0/logits"]`. A file of the user's own, made with
`np.savez("golden.npz", images=…, logits=…)`, is one sample, whose arrays bear the names of the model's inputs and
outputs; nothing in it tells which model it is of.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import InputError, ModelError, ReportError, first_line, listed
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import npz
from pytest_trtcheck.model.names import matched
from pytest_trtcheck.record import typed
from pytest_trtcheck.record.files import expanded
from pytest_trtcheck.record.held import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel

    Arrays = Mapping[str, NDArray[Any]]

_ABOUT = "pytest_trtcheck.json"
_FORMAT = 1
_RECORD = "record it: python -m pytest_trtcheck record model.onnx --inputs='data/*.npz' -o {path}"


def is_named(source: object) -> bool:
    """Whether a source is named as recorded outputs are."""
    return isinstance(source, (str, os.PathLike)) and os.fspath(source).endswith(".npz")


@dataclass(frozen=True)
class About:
    """What is known of how the samples came about.

    Parameters
    ----------
    model, model_sha256
        The model that computed the outputs.
    used_for
        The SHA-256 of the models that they were recorded to be compared with.
    recorded
        When, in UTC, as in ISO 8601.
    computed_on
        The libraries and the provider.
    command
        The arguments of `python -m pytest_trtcheck` that record it again.
    """

    model: str = ""
    model_sha256: str | None = None
    used_for: tuple[str, ...] = ()
    recorded: str = ""
    computed_on: str = ""
    command: str = ""


@dataclass(frozen=True)
class Golden:
    """Samples read from a file; the outputs stay there until they are asked for.

    Parameters
    ----------
    inputs
        By sample, in the types of the model that is checked.
    """

    path: Path
    label: str
    about: About
    sha256: str
    inputs: tuple[Case, ...]
    _outputs: tuple[Arrays, ...] = ()
    _index: list[dict[str, Any]] = field(default_factory=list)
    _digests: tuple[str, ...] = ()

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The samples by what identifies their inputs."""
        return {_key(case): number for number, case in enumerate(self.inputs)}

    @property
    def title(self) -> str:
        """The file, when it was recorded and of what."""
        if self.about.model_sha256 is None:
            return f"{self.label} (recorded elsewhere: when and of which model it does not say)"
        return f"{self.label} (recorded {self.about.recorded[:10]}, of {self.about.model})"

    def outputs(self, sample: int) -> Arrays:
        """The recorded outputs of one sample.

        Raises
        ------
        ModelError
            They can't be read, or were changed since they were recorded.
        """
        if self._outputs:
            return self._outputs[sample]
        try:
            found = npz.read_arrays(self.path, self._index, sample)
        except npz.UNREADABLE as error:
            raise _unreadable(self.label, error) from error
        if model_inputs.digest(found) != self._digests[sample]:
            raise ModelError(
                f"reference: {self.label}: the outputs of sample {sample} are not those that were recorded",
                f"the file was changed: {self.again()}",
                code="golden-stale",
            )
        return found

    def again(self) -> str:
        """How to record it again."""
        if self.about.command:
            return f"record it again: python -m pytest_trtcheck {self.about.command}"
        return _RECORD.format(path=self.label)


def read(source: object, model: OnnxModel, folders: Sequence[Path], cache: Cache) -> Golden:
    """The samples that a marker names as its reference, for `model`; `cache` is told what they rest on.

    Parameters
    ----------
    folders
        Where a relative path is looked up, in this order.

    Raises
    ------
    ModelError
        There is no such file, it can't be read, it was recorded of a model that is another now, or it lacks inputs or
        outputs of `model`.
    InputError
        Its inputs do not fit `model`.
    """
    label, path = str(source), _found(source, folders)
    try:
        sha256 = cache.hash(path)
        text = npz.load_text(path, _ABOUT)
        if text is None:
            return _plain(path, label, model, sha256)
        told = json.loads(text)
        if told["format"] != _FORMAT:
            raise ModelError(
                f"reference: {label} is of format {told['format']}, and this version reads {_FORMAT}",
                "record it with this version of pytest-trtcheck, or install the newer one",
                code="golden-unreadable",
            )
        about = typed(told["about"], About)
        index, digests = typed(told["outputs"], list[dict[str, Any]]), tuple(told["output_digests"])
        if len(told["input_digests"]) != len(digests):
            raise ValueError("it describes other inputs than outputs")
        samples = npz.read_cases(path, told["inputs"], range(len(digests)))
    except (*npz.UNREADABLE, ReportError) as error:
        raise _unreadable(label, error) from error
    if [model_inputs.digest(each) for each in samples] != told["input_digests"] or not samples:
        raise ModelError(
            f"reference: {label}: the inputs are not those that were recorded", "record it again", code="golden-stale"
        )
    _refuse_stale(label, about, model)
    cases = _fed(samples, model, label)
    return Golden(path, label, about, sha256, cases, _index=index, _digests=digests)


def write(path: Path, about: About, samples: Iterable[tuple[Arrays, Arrays]]) -> None:
    """Write (inputs, outputs) of samples as they come; an OSError where that fails."""
    digests: tuple[list[str], list[str]] = ([], [])
    with replacing(path) as temporary, npz.ArrayWriter(temporary) as writer:
        indices: tuple[list[Any], list[Any]] = ([], [])
        for number, sample in enumerate(samples):
            for side, folder in enumerate(("inputs/", "outputs/")):
                arrays, before = sample[side], len(writer.index)
                writer.add(number, arrays, folder)
                indices[side].extend(writer.index[before:])
                digests[side].append(model_inputs.digest(arrays))
        parts = {"inputs": indices[0], "outputs": indices[1], "input_digests": digests[0], "output_digests": digests[1]}
        writer.add_text(_ABOUT, json.dumps({"format": _FORMAT, "about": vars(about), **parts}))


def now() -> str:
    """The time as files have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def which(golden: Golden, case: Arrays) -> int | None:
    """The sample whose inputs these are, to the last bit; None where they are none of the recorded ones."""
    return golden.numbers.get(_key(case))


def _key(case: Arrays) -> str:
    """Identity of inputs, whichever way their strings are held."""
    return model_inputs.digest({name: a.astype(object) if a.dtype.kind in "US" else a for name, a in case.items()})


def require(golden: Golden, cases: Sequence[Arrays], source: str) -> None:
    """See that inputs which a test gave are recorded ones.

    Raises
    ------
    InputError
        One is not; what is told is how it differs from the recorded one that is nearest.
    """
    for number, case in enumerate(cases):
        if which(golden, case) is not None:
            continue
        where = f"{source}[{number}]" if len(cases) > 1 else source
        nearest = min(golden.inputs, key=lambda each: len(_differing(case, each)))
        raise InputError(
            f"{where}: not among the inputs of {golden.label} ({len(golden.inputs)} recorded): "
            f"{', '.join(_differing(case, nearest))}",
            "return nothing from the test, and the recorded inputs are fed; or record these: "
            f"python -m pytest_trtcheck record MODEL --inputs=FILES -o {golden.label}",
            code="golden-stale",
        )


def _differing(case: Arrays, recorded: Arrays) -> list[str]:
    found = []
    for name, array in case.items():
        other = recorded[name]
        if array.shape != other.shape:
            found.append(f"input {name!r} is {list(array.shape)}, recorded {list(other.shape)}")
        elif _key({name: array}) != _key({name: other}):
            found.append(f"input {name!r} has other values")
    return found


def _found(source: object, folders: Sequence[Path]) -> Path:
    path = expanded(os.fspath(source))  # type: ignore[call-overload]
    tried = [path] if path.is_absolute() else [folder / path for folder in dict.fromkeys(folders)]
    for each in tried:
        try:
            if each.is_file():
                return each
        except OSError as error:  # a name that is too long, or a folder that may not be looked into
            raise _unreadable(str(source), error) from error
    raise ModelError(
        f"reference: {source}: no such file, looked for {' and '.join(map(str, tried))}",
        _RECORD.format(path=source),
        code="golden-unreadable",
    )


def _unreadable(label: str, error: Exception) -> ModelError:
    said = first_line(error) or type(error).__name__
    if "pickle" in said.lower():
        return ModelError(
            f"reference: {label}: holds pickled objects, or is no numpy file; pickles can run code and are not loaded",
            "save plain arrays: np.savez(path, **{name: array})",
            code="golden-unreadable",
        )
    return ModelError(
        f"reference: {label}: not a readable .npz file: {said}",
        "it is empty, cut off or damaged: record it again",
        code="golden-unreadable",
    )


def _plain(path: Path, label: str, model: OnnxModel, sha256: str) -> Golden:
    """A file of the user's own: what ties its outputs to inputs is that these lie beside them."""
    arrays = npz.load(path)
    names = [spec.name for spec in model.inputs]
    if missing := [name for name in names if name not in arrays]:
        raise ModelError(
            f"reference: {label}: it has {listed(map(repr, arrays), 10) or 'nothing'}, no input "
            f"{', '.join(map(repr, missing))}: nothing ties its outputs to what they were computed from",
            "put the inputs beside the outputs, np.savez(path, **inputs, **outputs), by the model's names; or "
            + _RECORD.format(path=label),
            code="golden-unreadable",
        )
    outputs = {name: array for name, array in arrays.items() if name not in names}
    cases = _fed([{name: arrays[name] for name in names}], model, label)
    return Golden(path, label, About(), sha256, cases, _outputs=(outputs,))


def _fed(samples: Sequence[Arrays], model: OnnxModel, label: str) -> tuple[Case, ...]:
    """The recorded inputs by the model's names and in its types."""
    specs = {spec.name: spec for spec in model.inputs}
    found = []
    for sample in samples:
        names = matched(list(specs), list(sample))
        if len(names) < len(specs) or len(sample) > len(specs):
            raise ModelError(
                f"reference: {label} does not fit {model.label}: its inputs are {listed(map(repr, sample), 10)}, the "
                f"model's {listed(map(repr, specs), 10)}",
                "record it of the model's FP32 original, with inputs of the same names",
                code="reference-fit",
            )
        found.append({name: model_inputs.as_float(sample[names[name]], spec.dtype) for name, spec in specs.items()})
    source = f"{label}: recorded inputs"
    cases: list[Case] = model_inputs.cases_from(found, model, source)
    return tuple(cases)


def _refuse_stale(label: str, about: About, model: OnnxModel) -> None:
    """A model of FP32 is the one that was recorded, or another one by now. One that is lowered is of course another."""
    known = {about.model_sha256, *about.used_for}
    if model.sha256 in known or (not about.used_for and is_lowered(model)):
        return
    meant = "the model that it was recorded for" if about.used_for else f"that model ({about.model})"
    hint = f"record it again: python -m pytest_trtcheck {about.command}"
    if not about.used_for:
        hint += f"; or, where {model.label} is meant to compute what another model does: record OTHER --for MODEL"
    raise ModelError(
        f"reference: {label} is stale: it was recorded {about.recorded[:10]} of {about.model} (sha256 "
        f"{str(about.model_sha256)[:12]}…), and {model.label} (sha256 {model.sha256[:12]}…) is not {meant} any more",
        hint,
        code="golden-stale",
    )


def is_lowered(model: OnnxModel) -> bool:
    """Whether a model carries its precision, so that it was made of another one."""
    return model.has_qdq or bool(model.half_types)
