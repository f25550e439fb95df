"""What may be named as the model: one list of sources, and how what is named is opened.

A source is a module, or an object, with what `Source` asks for. One of ours is a file here and an entry in `SOURCES`;
one of another package is an entry point of the group `pytest_trtcheck.sources` (docs/extending.md). What a marker names
is looked up while tests are collected, so importing a source imports no heavy library.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from pytest_trtcheck.errors import ArgumentError, CheckError, ModelError, closed, kind_of, own_text
from pytest_trtcheck.model.sources import in_memory, keras_model, made, onnx_file, other_file, pytorch, saved_model
from pytest_trtcheck.record.files import expanded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from importlib.metadata import EntryPoint
    from pathlib import Path

    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import Shape, ShapeRange

GROUP = "pytest_trtcheck.sources"
MODEL_FILE = "model.onnx"


class Source(Protocol):
    """One kind of thing that may be named as the model."""

    @property
    def title(self) -> str:
        """What messages call it, as in "a path"."""

    def accepts(self, source: object) -> bool:
        """Whether `source` is of this kind. Asked of whatever was named, during collection: import nothing heavy."""

    def open(self, source: object, opening: Opening) -> OnnxModel:
        """The model as ONNX: whatever else it is turned into, `opening.open` opens that.

        Raises
        ------
        ModelError
            It can't be.
        """


@dataclass(frozen=True)
class Examples:
    """What a check is to feed, for sources that have no shapes of their own.

    Parameters
    ----------
    inputs
        What the user gave, unchecked: as a test may return it.
    batch, shapes
        As the marker has them.
    """

    inputs: object = None
    batch: int | None = None
    shapes: Mapping[str, Shape | ShapeRange] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """What a source is opened with.

    Parameters
    ----------
    folders
        Where relative paths are looked up, in this order.
    cache
        Keeps what was made of a source.
    label
        What messages call the model, where whoever made it has said so.
    examples
        What it will be fed.
    """

    folders: Sequence[Path]
    cache: Cache
    label: str | None = None
    examples: Examples = field(default_factory=Examples)

    def path(self, source: object, what: str = "model file") -> Path:
        """Where the file or folder lies that `source` names; `what` says what it should be.

        Raises
        ------
        ModelError
            None of the folders has it.
        """
        path = expanded(str(source))
        tried = [path] if path.is_absolute() else [folder / path for folder in dict.fromkeys(self.folders)]
        for candidate in tried:
            try:
                if candidate.is_file() or candidate.is_dir():
                    return candidate
                if candidate.exists():
                    raise ModelError(f"{source}: is a pipe or a device, no {what}", code="model-kind")
            except PermissionError as error:
                raise closed(source, error) from error
            except OSError as error:  # a name that is too long, for one
                raise ModelError(f"{source}: no {what}: {error.strerror}", code="model-missing") from error
        raise ModelError(
            f"{source}: no such {what}", f"looked for {' and '.join(map(str, tried))}", code="model-missing"
        )

    def open(self, source: object, label: str | None = None) -> OnnxModel:
        """What a source was turned into: the bytes of an ONNX file, an onnx.ModelProto, a path, or another source.

        Raises
        ------
        ModelError
            It is no model, or no sound one.
        """
        source = own_text(source)
        found = find(source)
        if found is None:
            raise ModelError(f"{kind_of(source)} is no model", f"give {titles()}", code="model-kind")
        return found.open(source, replace(self, label=label or self.label))


SOURCES: tuple[Source, ...] = (onnx_file, in_memory, pytorch, keras_model, saved_model)
LAST: tuple[Source, ...] = (other_file, made)
"""What takes anything of a type, and is therefore asked behind all others."""


def open_model(
    source: object,
    folders: Sequence[Path],
    cache: Cache,
    custom_ops: Sequence[str] = (),
    examples: Examples | None = None,
) -> OnnxModel:
    """The model that the user named, whichever source takes it, with the libraries in `custom_ops`.

    Parameters
    ----------
    source
        What a source accepts, or a model that was opened before. A callable is called each time.
    folders
        Where relative paths are looked up, in this order.
    custom_ops
        Libraries that ONNX Runtime needs to run it.
    examples
        What it will be fed.

    Raises
    ------
    ModelError
        It is no model, there is no such file, or it is no sound ONNX model.
    """
    from pytest_trtcheck.model.onnx_model import OnnxModel, with_custom_ops

    opening = Opening(folders, cache, examples=examples or Examples())
    opened = source if isinstance(source, OnnxModel) else opening.open(source)
    model = with_custom_ops(opened, custom_ops)
    cache.rest_on(*model.files)
    return model


def find(source: object) -> Source | None:
    """The first source that accepts it.

    Raises
    ------
    ArgumentError
        A source that another package installed can't be loaded or asked.
    """
    return next((each for each in _all() if each.accepts(source)), None)


def computes_outputs(source: object) -> bool:
    """Whether it is no model but a callable from inputs to outputs."""
    return find(source) is made and made.takes_inputs(source)


def is_model(source: object) -> bool:
    """Whether it names a model; arrays that were recorded are none."""
    recorded = isinstance(source, (str, os.PathLike)) and os.fspath(source).endswith((".npz", ".npy"))
    return find(source) is not None and not computes_outputs(source) and not recorded


def titles() -> str:
    """What may be named, in words."""
    *most, last = dict.fromkeys(each.title for each in _all())
    return f"{', '.join(most)} or {last}"


def _all() -> Iterator[Source]:
    """Every source in the order of asking: who names an ONNX file need not wait for a search of what is installed."""
    yield from SOURCES
    yield from _installed(tuple(sys.path))
    yield from LAST


@functools.cache
def _installed(_: tuple[str, ...]) -> tuple[Source, ...]:
    from importlib.metadata import entry_points

    return tuple(_Installed(each) for each in sorted(entry_points(group=GROUP), key=lambda each: each.name))


class _Installed:
    """A source of another package, whose own failures are told as the user's to mend."""

    def __init__(self, point: EntryPoint) -> None:
        self._name = f"the model source {point.name!r} of {point.dist.name if point.dist else point.value}"
        try:
            self._source: Source = point.load()
            self.title = self._source.title
        except Exception as error:
            raise ArgumentError(
                f"{self._name} cannot be loaded: {type(error).__name__}: {error}", code="extension-failed"
            ) from error

    def accepts(self, source: object) -> bool:
        try:
            return bool(self._source.accepts(source))
        except Exception as error:
            raise ArgumentError(
                f"{self._name} failed: {type(error).__name__}: {error}", code="extension-failed"
            ) from error

    def open(self, source: object, opening: Opening) -> OnnxModel:
        from pytest_trtcheck.model.onnx_model import OnnxModel

        try:
            model = self._source.open(source, opening)
        except CheckError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self._name} failed to open it: {type(error).__name__}: {error}", code="extension-failed"
            ) from error
        if not isinstance(model, OnnxModel):
            raise ModelError(
                f"{self._name} gave {kind_of(model)}",
                "it has to return opening.open(…) of a path, the bytes of an ONNX file or an onnx.ModelProto",
                code="extension-failed",
            )
        return model
