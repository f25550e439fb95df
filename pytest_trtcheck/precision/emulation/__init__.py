"""The lowered model's arithmetic on ONNX Runtime's CPU provider, from the cache or made once."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.model.kept_outputs import KeptOutputs
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import MODEL_FILE
from pytest_trtcheck.precision.identity import library_versions

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.spec import Precision


def computes_the_reference(lowered: Lowered, precision: Precision) -> bool:
    """Whether the emulation would be the reference itself, so that comparing them says nothing."""
    return precision == "fp32" and not lowered.details.get("narrowed", False) and "io" not in lowered.details


def emulation(model: OnnxModel, lowered: Lowered, precision: Precision, cache: Cache) -> OrtRunner:
    """The lowered model's arithmetic on ONNX Runtime's CPU provider.

    For fp32 it is the model itself: what it computes is the reference.
    """
    return opened(model, emulated_path(model, lowered, precision, cache), precision)


def opened(model: OnnxModel, path: Path, precision: Precision) -> OrtRunner:
    """What runs the file that `emulated_path` gave for `model`."""
    label = model.label if path == model.path else f"{model.label} (emulated {precision})"
    return OrtRunner(path, label, custom_ops=model.custom_ops)


class Emulated(KeptOutputs):
    """The emulated model's outputs, computed once for each inputs and kept: what is checked where no GPU runs it, and
    what an engine is held against.
    """

    def __init__(self, model: OnnxModel, lowered: Lowered, precision: Precision, cache: Cache) -> None:
        parts = {"lowered": lowered.key, "precision": precision, **library_versions()}

        def opened() -> OrtRunner:
            return emulation(model, lowered, precision, cache)

        super().__init__(cache, "emulation", model.label, parts, opened, is_large=model.is_large)


def emulated_path(model: OnnxModel, lowered: Lowered, precision: Precision, cache: Cache) -> Path:
    """The file that `emulation` runs; its inputs and outputs are the model's own, whatever the engine's are."""
    if precision == "fp32" and "io" not in lowered.details:
        return lowered.path
    tf32 = precision == "tf32"
    parts = {"lowered": lowered.key, "tf32": str(tf32), **library_versions()}

    def make(folder: Path) -> None:
        from pytest_trtcheck.model import graph
        from pytest_trtcheck.precision import half_io
        from pytest_trtcheck.precision.emulation import rewrite, weights

        emulate = rewrite.emulated_tf32 if tf32 else rewrite.emulated
        read = graph.read(lowered.path)
        io = half_io.HalfIo(*lowered.details["io"]) if "io" in lowered.details else None
        if io is not None:
            half_io.float_inputs(read, io)
        read = emulate(read)
        if io is not None:
            half_io.float_outputs(read, io)
        unfolded = folder / "unfolded"
        unfolded.mkdir()
        if graph.write(read, unfolded / MODEL_FILE):
            weights.fold(unfolded / MODEL_FILE, folder / MODEL_FILE)
        else:
            (unfolded / MODEL_FILE).rename(folder / MODEL_FILE)
        shutil.rmtree(unfolded)

    return cache.get_or_make(Key("emulated", model.label, parts), make).path / MODEL_FILE
