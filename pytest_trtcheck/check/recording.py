"""Recording golden samples: what a model computes in FP32 today, kept for checks of other days and other models."""

from __future__ import annotations

import shlex
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.cache import Cache, require_same, scratch_folder
from pytest_trtcheck.check import parity
from pytest_trtcheck.errors import ArgumentError, ModelError, ReportError, plural
from pytest_trtcheck.model import golden, input_files
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.model.sources import Examples, open_model
from pytest_trtcheck.precision.reference import ModelReference, Reference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.onnxruntime import Provider
    from pytest_trtcheck.spec import Shape


@dataclass(frozen=True)
class Recording:
    """What is to be recorded.

    Parameters
    ----------
    model
        What computes the outputs, in FP32.
    output
        The .npz file to write.
    inputs
        Globs of .npz and .npy files, one sample each; none: inputs are generated, as a check without inputs does.
    used_for
        The models whose checks the samples are for, such as a quantized one; none: the model itself, and any that was
        made of it.
    batch, shapes, seed
        Of generated inputs.
    provider
        Where ONNX Runtime computes: `cpu` or `cuda`.
    custom_ops
        Libraries that ONNX Runtime needs for its operators.
    """

    model: str
    output: Path
    inputs: Sequence[str] = ()
    used_for: Sequence[str] = ()
    batch: int | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    seed: int = 0
    provider: Provider = "cpu"
    custom_ops: Sequence[str] = ()

    def command(self) -> str:
        """The arguments of the command line that record the same again."""
        words = ["record", self.model, *(f"--inputs={each}" for each in self.inputs)]
        words += [f"--for={each}" for each in self.used_for]
        words += [f"--batch={self.batch}"] * (self.batch is not None)
        words += [f"--shape={name}={','.join(map(str, shape))}" for name, shape in self.shapes.items()]
        words += [f"--seed={self.seed}"] * bool(self.seed) + [f"--provider={self.provider}"] * (self.provider != "cpu")
        words += [f"--custom-ops={each}" for each in self.custom_ops]
        return shlex.join([*words, "-o", str(self.output)])


def record(asked: Recording) -> list[str]:
    """Compute and write the samples; what to say about them, line by line.

    Raises
    ------
    ModelError
        There is no such model, it is random by itself, its outputs are NaN throughout, or it is none that the others
        were made of.
    InputError
        No file matches, a file can't be read, or inputs do not fit the model.
    ReportError
        The file can't be written.
    """
    if asked.output.suffix != ".npz":
        raise ArgumentError(
            f"-o {asked.output}: recorded outputs are an .npz file", "give it that suffix", code="option-value"
        )
    with scratch_folder("record") as scratch:
        cache, here = Cache(Path(scratch)), [Path.cwd()]
        files = [path for each in asked.inputs for path in input_files.matching("--inputs", each, here[0])]
        read = input_files.FromFiles(files, here[0])
        examples = Examples(read or None, asked.batch, asked.shapes)
        model = open_model(asked.model, here, cache, asked.custom_ops, examples=examples)
        parity.refuse_random(model)
        cases = model_inputs.cases_from(read, model, "--inputs") if read else _generated(asked, model)
        parity.refuse_empty(cases)
        notes: list[str] = []
        with closing(Reference(model, cache, asked.provider)) as reference:
            others = [open_model(each, here, cache, asked.custom_ops, examples=examples) for each in asked.used_for]
            for each in others:
                ModelReference(reference, each)  # refuses one that does not fit
            about = golden.About(
                model=asked.model,
                model_sha256=model.sha256,
                used_for=tuple(each.sha256 for each in others),
                recorded=golden.now(),
                computed_on=f"ONNX Runtime {ort.version()} ({asked.provider})",
                command=asked.command(),
            )
            try:
                golden.write(asked.output, about, _computed(reference, cases, notes))
            except OSError as error:
                raise ReportError(
                    f"cannot write {asked.output}: {error.strerror or error}", code="report-unwritable"
                ) from error
    count = plural(len(cases), "sample")
    told = [f"{asked.output}: {count} of {asked.model} in FP32, computed on {about.computed_on}"]
    if golden.is_lowered(model):
        told.append(f"{asked.model} carries its precision: recorded is the FP32 model behind it")
    if not asked.inputs:
        told.append(f"inputs were generated (seed {asked.seed}): --inputs='data/*.npz' records real ones")
    return told + notes


def _computed(reference: Reference, cases: Sequence[Case], notes: list[str]) -> Iterator[tuple[Case, Any]]:
    for number, case in enumerate(cases):
        outputs = reference.computed(case)
        for name, array in outputs.items():
            bad = _count_bad(array)
            where = f"sample {number}: output {name!r}"
            if bad and bad == array.size:
                raise ModelError(
                    f"{where} is NaN or infinite throughout",
                    "give inputs that the model is meant for",
                    code="reference-not-finite",
                )
            if bad:
                notes.append(f"{where}: NaN or infinity in {bad:,} of {plural(array.size, 'element')}")
        yield case, outputs
    require_same(reference.model.files)


def _count_bad(array: NDArray[Any]) -> int:
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return int((~np.isfinite(array.astype(np.float64))).sum()) if is_float else 0


def _generated(asked: Recording, model: OnnxModel) -> list[Case]:
    def answer(proposed: Sequence[Mapping[str, Shape]]) -> str:
        options = (f"--shape={name}={','.join(map(str, shape))}" for name, shape in proposed[0].items())
        return f"fix them, such as by {shlex.join(options)}; or record real inputs: --inputs='data/*.npz'"

    ranges = model_inputs.shape_ranges(model, asked.batch, asked.shapes, default_batch=1, answer=answer)
    return model_inputs.generate(model, ranges, asked.seed)
