"""The use case: a request becomes a record.

A check flows one way: spec → model and inputs → reference and lowered model → engine or emulation → outputs and samples
→ verdicts → record.
"""

from __future__ import annotations

import functools
import inspect
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.backends.base import RunnerByShape
from pytest_trtcheck.cache import require_same
from pytest_trtcheck.check import message
from pytest_trtcheck.check.request import Known, Request, Settings
from pytest_trtcheck.check.steps import BUILDING, CHECKING, asked, engine
from pytest_trtcheck.errors import (
    ArgumentError,
    ModelError,
    UnsupportedTargetError,
    given_as,
    lacked_files,
    name_of,
    unforeseen,
)
from pytest_trtcheck.model.golden import Golden, is_named
from pytest_trtcheck.model.onnx_model import explained
from pytest_trtcheck.model.sources import computes_outputs, open_model
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.record import CheckRecord
from pytest_trtcheck.spec import SOURCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel

__all__ = ["Checker", "Request"]


@dataclass(frozen=True)
class Checker(Settings):
    """Makes checks, and what fixtures hand out."""

    def check(self, request: Request) -> CheckRecord:
        """Make one check. Whatever went wrong becomes a record with the verdict `error`, never a traceback."""
        self.cache.watch()
        with self.cache.resting_on():
            record = self._checked(request)
        if _is_proof(record):
            engine_key = record.engine.key if record.engine else None
            self.cache.share(lambda key: not key.kind.endswith("engine") or key.digest == engine_key)
        return record

    def _checked(self, request: Request) -> CheckRecord:
        start = time.perf_counter()
        record = CheckRecord(
            nodeid=request.nodeid,
            model=_label(request.model),
            verdict="error",
            precision=request.precision if request.parity.engine is None else None,
            gpu_ran=False,
            seed=request.parity.seed,
            inputs=request.inputs_source,
            reference=_reference_label(request.parity.reference),
            build_options=request.build_options.given() or None,
            for_gpu=request.for_gpu,
            system=request.parity.backend if request.parity.is_compared else None,
        )
        known: Known | None = None
        model: OnnxModel | None = None
        try:
            request = asked.read_once(request)
            model = asked.model_of(self, request)
            record = replace(record, model=model.label, model_sha256=model.sha256)
            request, notes = asked.in_its_own_precision(self, request, model)
            request = asked.fed_as_recorded(self, request, model)
            record = replace(
                record,
                precision=request.precision if request.parity.engine is None else None,
                notes=notes,
                inputs=request.inputs_source,
                reference=_reference_label(request.parity.reference),
            )
            known = asked.prepared(self, request, model, record)
            for step in BUILDING if self.build_only else CHECKING:
                known = step(self, known)
            record = known.record
        except Exception as raised:
            asked_for = {
                "reference=": request.parity.reference,
                "calibration=": request.calibration,
                f"{request.inputs_source} inputs": request.inputs,
            }
            label = ": ".join(filter(None, (record.model, given_as(raised, asked_for))))
            error = explained(raised, model.path, label) if model else unforeseen(raised, label)
            engine.note_broken(self, request, error)
            if error.code == "unforeseen":
                error = self.cache.removed(raised) or error
            error = self._changed() or error  # what came of it is no wonder
            record = message.refused(known.record if known else record, error, require_gpu=self.require_gpu)
        finally:
            asked.dismiss_builder(self, request)
            if known is not None and self.kept_open is None:
                known.close()
        if self.cache.problem is not None:
            record = replace(record, notes=(*record.notes, f"cache: {self.cache.problem}"))
        return replace(record, duration_s=max(0.0, time.perf_counter() - start))

    def _changed(self) -> ModelError | None:
        try:
            self.cache.require_same()
        except ModelError as changed:
            return changed
        except OSError as error:
            if not lacked_files(error):
                raise
        return None

    def reference(self, model: object, folders: Sequence[Path], custom_ops: Sequence[str] = ()) -> Reference:
        """The FP32 model as a callable; whatever goes wrong is a CheckError."""
        try:
            with self.cache.resting_on():
                opened = open_model(asked.named_model(self, model, folders), (), self.cache, custom_ops)
            return Reference(opened, self.cache, self.reference_provider)
        except ModelError as error:
            if error.code != "export-inputs":
                raise
            hint = "set the module's attribute example_inputs: trt_reference takes neither inputs nor shapes"
            raise ModelError(error.message, hint, code=error.code) from error
        except Exception as error:
            raise unforeseen(error, f"trt_reference: {_label(model)}") from error

    def runner(self, request: Request) -> RunnerByShape:
        """The model in its precision, ready to run: the engine, or without a GPU its emulation.

        Whatever goes wrong is a CheckError.
        """
        try:
            with self.cache.resting_on():
                return self._runner(request)
        except Exception as error:
            raise unforeseen(error, _label(request.model)) from error

    def _runner(self, request: Request) -> RunnerByShape:
        if request.parity.keep_auto:
            raise ArgumentError(
                "keep_fp32='auto': there are no inputs yet to judge by",
                "use it in a check, and name what it found here",
                code="search-impossible",
            )
        model, existing = asked.model_of(self, request), asked.existing_engine(self, request)
        if existing is None:
            self.system(request).admit(model, request.parity, request.build_options)
        known = asked.lowered(self, request, model, (), existing)
        known = engine.placed(self, known)
        system = known.running
        if known.existing is not None and not known.system.runs:
            raise UnsupportedTargetError(
                known.system.no_engine, "run it on a machine with that GPU and TensorRT", code="gpu-needed"
            )
        if known.problem is not None and not system.is_emulation:
            raise known.unsupported()
        if system.is_emulation and known.plugin_operators:
            raise UnsupportedTargetError(
                known.plugins_need_gpu(), "run it on a machine with the GPU", code="gpu-needed"
            )

        def open_for(case: Case) -> Runner:
            asked = replace(known, cases=[case])
            with self.cache.resting_on(*known.model.files):
                built = system.build(asked.spec(system), self.cache)
            runner = engine.loaded_by(self, system, built)
            try:
                require_same(known.model.files)
            except Exception:
                runner.close()
                raise
            return runner

        declared = request.declared_for(model)
        by_shape = system.builds and any(spec.free_dims() and spec.name not in declared for spec in model.inputs)
        return RunnerByShape(
            system, open_for, lambda case: request.admit(known.model, case, "inputs"), by_shape=by_shape
        )


def _is_proof(record: CheckRecord) -> bool:
    """Whether a check shows that what it used is right: its outputs were compared, and nothing failed."""
    compared = [part.verdict for part in (record.parity, record.score) if part is not None]
    return record.verdict not in {"fail", "error"} and bool(compared) and set(compared) == {"pass"}


def _label(source: object) -> str:
    if inspect.isroutine(source) or isinstance(source, (type, functools.partial)):
        return f"{name_of(source)}()"
    if source is None:
        return "no model"
    return str(source) if isinstance(source, (str, Path)) else f"<{type(source).__name__}>"


def _reference_label(source: object) -> str | None:
    if source is None:
        return None
    if source is SOURCE:
        return SOURCE.name
    if isinstance(source, Golden):
        return source.title
    return name_of(source) if computes_outputs(source) and not is_named(source) else _label(source)
