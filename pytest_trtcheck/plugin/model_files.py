"""Tests without code: an .onnx file that is named on the command line, or that `trt_collect` matches."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.check import arguments
from pytest_trtcheck.choices import BATCH
from pytest_trtcheck.errors import ArgumentError, unforeseen
from pytest_trtcheck.model import free_dims
from pytest_trtcheck.plugin import options as settings
from pytest_trtcheck.plugin import outcome
from pytest_trtcheck.plugin.items import FileItem, named_files
from pytest_trtcheck.spec import ParitySpec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from pytest_trtcheck.model.input_files import FromFiles
    from pytest_trtcheck.spec import Shape, ShapeRange

_FILES = ("trt_inputs", "trt_calibration")
_UNASKED = "parity"
_FOR_MODEL = re.compile(r"(?P<model>[^=]*\.onnx)=(?P<value>.*)", re.DOTALL)


class OnnxFile(pytest.Module):
    """One model file: a test a precision and batch; several, where a fixture that it takes is parametrized."""

    def _getobj(self) -> ModuleType:
        module = ModuleType(self.path.stem)
        vars(module)["pytest_generate_tests"] = _parametrize
        return module

    def collect(self) -> Iterable[pytest.Item]:
        """The tests, called by the precision that is asked for; by none, a model is judged in what it carries."""
        is_asked = settings.is_given(self.config, "trt_precision")
        for name in settings.value(self.config, "trt_precision") if is_asked else (_UNASKED,):
            setattr(self.obj, name, _takes)
            # pytest's own way from a function to its tests, the only one that parametrizes by fixtures.
            for each in self._genfunctions(name, _takes):
                item: OnnxItem = OnnxItem.from_parent(
                    self,
                    name=each.name,
                    originalname=name,
                    callspec=getattr(each, "callspec", None),
                    callobj=_takes,
                    fixtureinfo=each._fixtureinfo,
                )
                yield item


def _parametrize(metafunc: pytest.Metafunc) -> None:
    from pytest_trtcheck.plugin.parametrization import by_batch, by_system

    by_batch(metafunc, settings.value(metafunc.config, "trt_batch"))
    by_system(metafunc)


def _takes(trt_inputs: object, trt_calibration: object, trt_build_options: object) -> None:
    """What a test without code asks pytest for."""


class OnnxItem(FileItem, pytest.Function):
    """The parity of one model in one precision, on the inputs of `--trt-inputs`, of `trt_inputs`, or generated ones."""

    def runtest(self) -> None:
        """Check the model as a marked test that returns nothing would."""
        is_asked = settings.is_given(self.config, "trt_precision")
        batches = settings.value(self.config, "trt_batch")
        fixture = self.funcargs.get
        try:
            given = Given.of(self.config, self.path)
            inputs = given.inputs() if given.inputs_globs else fixture("trt_inputs")
            parity = ParitySpec(
                # The option takes no other names.
                precision=(self.originalname,) if is_asked else settings.value(self.config, "trt_precision"),  # type: ignore[arg-type]
                states_precision=is_asked,
                batch=(outcome.parameters(self).get(BATCH, batches[0] if batches else None),),
                shapes=given.shapes,
                calibration=[str(path) for path in given.calibration()] or None,
            )
        except Exception as error:
            outcome.refuse(self, unforeseen(error, self.name))
        # From pytest's root, as on every machine: that is where it is looked up first.
        root = self.config.rootpath
        named = str(self.path.relative_to(root)) if self.path.is_relative_to(root) else str(self.path)
        several = len(named_models(self.config)) > 1
        request = outcome.request_for(
            self,
            named,
            parity,
            fixture,
            inputs=inputs,
            inputs_source="trt_inputs",
            batches=batches,
            spell_shapes=functools.partial(free_dims.on_command_line, model=self.path.name if several else ""),
            default_batch=1,
        )
        folders = (root, self.path.parent)
        outcome.run(self, replace(request, folders=folders, precision_is_default=not is_asked))


# --- what the options say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What the options say of one model."""

    folder: Path
    inputs_globs: tuple[str, ...]
    calibration_globs: tuple[str, ...]
    shapes: Mapping[str, Shape | ShapeRange]

    @classmethod
    def of(cls, config: pytest.Config, model: Path) -> Given:
        """What stands in the options for every model, and for this one.

        Raises
        ------
        ArgumentError
            Shapes are not written as shapes are.
        """
        inputs, calibration, shapes = (tuple(_for(config, model, name)) for name in (*_FILES, "trt_shapes"))
        named: dict[str, Any] = {}
        for each in shapes:
            named |= _shapes(each)
        return cls(config.invocation_params.dir, inputs, calibration, arguments.shapes_of("--trt-shapes", named))

    def inputs(self) -> FromFiles:
        """What the files of `--trt-inputs` hold."""
        from pytest_trtcheck.model.input_files import FromFiles

        return FromFiles(_files("trt_inputs", self.inputs_globs, self.folder), self.folder)

    def calibration(self) -> list[Path]:
        """The files of `--trt-calibration`."""
        return _files("trt_calibration", self.calibration_globs, self.folder)


def _files(option: str, globs: Iterable[str], folder: Path) -> list[Path]:
    from pytest_trtcheck.model.input_files import matching

    return [path for each in globs for path in matching(settings.flag(option), each, folder)]


def _shapes(text: str) -> dict[str, Any]:
    found = free_dims.parsed(text)
    if found is None:
        raise ArgumentError(
            f"--trt-shapes={text}: expected NAME:1x3x224x224, several separated by commas",
            "a range of shapes is two of them, NAME:1x3x224x224..8x3x224x224, or three: the least, the usual, the most",
            code="option-value",
        )
    return found


def _split(text: str) -> tuple[str | None, str]:
    """The model that a value is for, where it names one, and the value itself."""
    match = _FOR_MODEL.fullmatch(text)
    return (match["model"].strip(), match["value"]) if match else (None, text)


def _is(model: Path, named: str, config: pytest.Config) -> bool:
    """Whether a model is the one that a value names: by its name, or by its path from where pytest was called."""
    folder = config.invocation_params.dir
    paths = [model.name, str(model), *[str(model.relative_to(folder))] * model.is_relative_to(folder)]
    return any(fnmatch(path, named) or path == named.removeprefix("./") for path in paths)


def _for(config: pytest.Config, model: Path, option: str) -> Iterator[str]:
    """The values of an option that are for a model; those that are for it alone come last."""
    split = list(map(_split, settings.value(config, option)))
    yield from (value for named, value in split if named is None)
    yield from (value for named, value in split if named is not None and _is(model, named, config))


def named_models(config: pytest.Config) -> list[Path]:
    """The models that the command line names."""
    return [file for file in named_files(config) if file.suffix == ".onnx"]


def _is_collectable(config: pytest.Config, named: str) -> bool:
    """Whether `trt_collect` may collect the model that a value names, wherever this run looks."""
    root, folder = config.rootpath, config.invocation_params.dir
    globs = [each.removeprefix("./") for each in settings.value(config, "trt_collect")]

    def is_it(path: Path) -> bool:
        file = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        return any(settings.is_collected(file, glob) for glob in globs) and _is(path, named, config)

    path = Path(os.path.normpath(folder / named))
    return (path.is_file() and is_it(path)) or any(is_it(each) for glob in globs for each in _below(config, glob))


def _below(config: pytest.Config, glob: str) -> Iterator[Path]:
    """The .onnx files from the folder on that a glob names as it is: there may be much beside it."""
    passed_over = config.getini("norecursedirs")
    seen: set[str] = set()
    start = re.split(r"[^/]*[*?\[]|[^/]*$", glob, maxsplit=1)[0]
    for folder, below, files in os.walk(config.rootpath / start, followlinks=True):
        # A link may lead back to where it lies.
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
        seen.add(real)
        below[:] = [each for each in below if not any(fnmatch(each, pattern) for pattern in passed_over)]
        yield from (Path(folder, each) for each in files if each.endswith(".onnx"))


def unused(config: pytest.Config, models: Collection[Path]) -> list[str]:
    """What is said of what the options say of models that are none of these."""
    given = [(option, _split(text)[0]) for option in (*_FILES, "trt_shapes") for text in settings.value(config, option)]
    return [
        f"{option}: no model {named!r} was collected: not used"
        for option, named in given
        if named is not None and not any(_is(each, named, config) for each in models)
    ]


def check_options(config: pytest.Config, values: Mapping[str, Any]) -> None:
    """What the command line says of models can be followed: an error before the first test otherwise.

    Raises
    ------
    ArgumentError
        No model is there that it could be meant for, or it is not written as it should be.
    InputError
        No file matches.
    """
    given = [name for name in settings.OF_MODELS if config.getoption(name, None) is not None]
    if not given:
        return
    models, collects = named_models(config), values["trt_collect"]
    loose = [each for each in config.args if Path(each).suffix in {".npz", ".npy"}]
    if loose:
        flag = settings.flag(next((name for name in given if name in _FILES), "trt_inputs"))
        raise ArgumentError(
            f"{loose[0]} is named as a test: the shell wrote out what {flag} was to match",
            f"quote it: {flag}='GLOB'",
            code="option-value",
        )
    if not models and not collects:
        raise ArgumentError(
            f"{settings.flag(given[0])} is for .onnx files that are named, and none is",
            "name one: pytest model.onnx; a marked test takes "
            f"{'what it returns' if given[0] == 'trt_inputs' else given[0].removeprefix('trt_') + '='}",
            code="argument-missing",
        )
    for name in {*given} - {"trt_precision", "trt_batch"}:
        for text in values[name]:
            model, value = _split(text)
            is_there = model is None or any(_is(each, model, config) for each in models)
            if model is not None and not is_there and not _is_collectable(config, model):
                named = f"named: {', '.join(map(str, models))}" if models else ""
                raise ArgumentError(
                    f"{settings.flag(name)}={text}: no model {model} is named" + ", or collected" * bool(collects),
                    named or "it is the name of its file, its path, or a glob of one",
                    code="option-value",
                )
            if name == "trt_shapes":
                _shapes(value)
            else:
                _files(name, [value], config.invocation_params.dir)
