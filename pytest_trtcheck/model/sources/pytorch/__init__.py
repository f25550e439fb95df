"""PyTorch: an nn.Module, an ExportedProgram, or a .pt2 file of one; exported by torch.onnx (dynamo).

A module is exported and run in evaluation mode, on the CPU, and left as it was. Its inputs bear the names of the
parameters of `forward`; what they are like is taken from what the check is fed, from `shapes=`, or from an attribute of
the module.
"""

from __future__ import annotations

import os
import sys
import uuid
import warnings
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import MissingDependencyError, ModelError, first_line, listed
from pytest_trtcheck.model.sources.exported import exported

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening


title = "a torch.nn.Module, an ExportedProgram, a .pt2 file"


def accepts(source: object) -> bool:
    """Modules and programs of a PyTorch that is loaded already, and the files that it writes."""
    if isinstance(source, (str, os.PathLike)):
        return str(source).endswith((".pt2", ".pt", ".pth"))
    return _is_program(source) or _is_module(source)


def _is_module(source: object) -> bool:
    torch: Any = sys.modules.get("torch")
    # A Keras model with PyTorch behind it is a module too; it is Keras that knows how to export it.
    is_keras = any(each.__module__.partition(".")[0] == "keras" for each in type(source).__mro__)
    return torch is not None and not is_keras and isinstance(source, getattr(getattr(torch, "nn", None), "Module", ()))


def _is_program(source: object) -> bool:
    return any(
        (each.__module__, each.__name__) == ("torch.export.exported_program", "ExportedProgram")
        for each in type(source).__mro__
    )


def open(source: Any, opening: Opening) -> OnnxModel:
    """The model as ONNX, from the cache once it was exported.

    Raises
    ------
    ModelError
        It can't be exported, nothing says what its inputs are, or its batch is not open.
    MissingDependencyError
        PyTorch or onnxscript is not installed.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_file(source, opening)
    if _is_program(source):
        return _open_program(source, opening)
    return _open_module(source, opening)


def _versions() -> dict[str, str]:
    """What exports, looked up without importing it: a .pt2 file that is cached needs no PyTorch."""
    versions = {}
    for name in ("torch", "onnxscript"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise MissingDependencyError(
                f"{name} is not installed, and a PyTorch model is exported by it",
                "pip install 'pytest-trtcheck[torch]'",
            ) from error
    return versions


def _made_from(identity: str, versions: Mapping[str, str], **more: str) -> dict[str, str]:
    from pytest_trtcheck.cache import hash_code

    return {
        "source": identity,
        "exporter": hash_code("model/sources/pytorch/*.py"),
        **versions,
        **more,
    }


def _open_file(source: Any, opening: Opening) -> OnnxModel:
    from pytest_trtcheck.model.sources.pytorch.program import Program

    path, label = opening.path(source), opening.label or str(source)
    if path.suffix != ".pt2":
        raise ModelError(
            f"{label}: a {path.suffix} file holds weights, or a pickled module, and not what computes with them",
            "load it in trt_model and return the module, or save torch.export.save(program, 'model.pt2')",
            code="model-kind",
        )
    versions = _versions()
    identity = opening.cache.hash(path)
    origin = Program(f"the program {label}", f"{identity} {versions['torch']}", lambda: _loaded(path, label))
    return exported(opening, label, _made_from(identity, versions), origin.write, origin)


def _loaded(path: Path, label: str) -> Any:
    import torch.export

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"{label}: not a program that torch.export.save wrote, or cut off: {first_line(error)}",
            "save it again",
            code="model-damaged",
        ) from error


def _open_program(source: Any, opening: Opening) -> OnnxModel:
    from pytest_trtcheck.model.sources.pytorch.module import fingerprint
    from pytest_trtcheck.model.sources.pytorch.program import Program

    versions = _versions()
    label = opening.label or "<ExportedProgram>"
    content = fingerprint()
    content.add(source.graph_module.print_readable(print_output=False))
    shapes = [str(node.meta.get("val")) for node in source.graph.nodes if node.op == "placeholder"]
    content.add([str(source.graph_signature), str(source.range_constraints), shapes])
    content.add([source.state_dict, source.constants])
    identity = content.digest()
    origin = Program("the program", f"{identity} {versions['torch']}", lambda: source)
    return exported(opening, label, _made_from(identity, versions), origin.write, origin)


def _open_module(source: Any, opening: Opening) -> OnnxModel:
    import torch

    from pytest_trtcheck.model.sources.pytorch.example import Example
    from pytest_trtcheck.model.sources.pytorch.module import Module, fingerprint, unwrapped

    module = unwrapped(source)
    name = type(module).__name__
    label = opening.label or f"{name} (nn.Module)"
    devices = {each.device.type for each in (*module.parameters(), *module.buffers())}
    if "meta" in devices:
        raise ModelError(
            f"{label}: it has no weights (device meta)", "load them before it is checked", code="model-kind"
        )
    if lazy := [name for name, each in module.named_parameters() if torch.nn.parameter.is_lazy(each)]:
        raise ModelError(
            f"{label}: {listed(map(repr, lazy))} have no shape yet, as its lazy layers were never run",
            "call the module once with its inputs before it is checked",
            code="export-inputs",
        )
    example = Example.of(module, opening.examples, label)
    content = fingerprint().add(module)
    identity = content.digest()
    notes = []
    if content.unknown:
        # What can't be identified can't be looked up: an entry of its own each time.
        identity = uuid.uuid4().hex
        notes.append(f"{label} is exported anew each time: it holds {listed(dict.fromkeys(content.unknown))}")
    if any(each.training for each in module.modules()):
        notes.append(f"{label} was in training mode; it was exported and run in evaluation mode")
    if others := sorted(devices - {"cpu"}):
        notes.append(f"{label} lies on {', '.join(others)}; a copy of it was exported and run on the CPU")
    versions = _versions()
    origin = Module(
        f"the module {name}", f"{identity} {versions['torch']}", module, tuple(example.names), example.variadic
    )
    made_from = _made_from(identity, versions, inputs=example.described())
    model = exported(opening, label, made_from, lambda path: origin.write(path, example), origin)
    return replace(model, notes=(*notes, *model.notes))
