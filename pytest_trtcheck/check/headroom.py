"""How near a model's tensors come to the end of FP16: until they are there, the outputs tell nothing of it."""

from __future__ import annotations

from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.choices import half_part
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision.reference import Reference

if TYPE_CHECKING:
    from pytest_trtcheck.check.request import Known
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.record.held import HeldFolder

LARGEST = 65504.0
_MOST_BYTES = 256 << 20
"""Of a model that is copied with its tensors brought out."""


class Headroom:
    """The largest magnitude of the FP32 model's tensors that are computed in FP16, as a share of what FP16 holds.

    It is 0 throughout where nothing is computed in FP16, or the tensors can't be brought out: it only guides a search.
    """

    def __init__(self, known: Known) -> None:
        self._folder: HeldFolder | None = None
        self._runner: OrtRunner | None = None
        self._names: list[str] = []
        reference = known.reference
        if half_part(known.computed_in) != "fp16" or not isinstance(reference, Reference) or known.model.custom_ops:
            return
        with suppress(CheckError):
            path = reference.path()
            if not known.model.external and path.stat().st_size <= _MOST_BYTES:
                self._open(known, path)

    def _open(self, known: Known, path: Path) -> None:
        import onnx_ir as ir

        from pytest_trtcheck.model import graph as graphs
        from pytest_trtcheck.precision.probes import Probes

        kept = known.request.parity.keep_fp32
        tensors = [
            str(output.name)
            for node in graphs.read(path).graph
            for output in node.outputs
            if output.dtype == ir.DataType.FLOAT
            and node.op_type != "Constant"
            and not any(fnmatchcase(node.name or "", glob) for glob in kept)
        ]
        if not tensors:
            return
        self._folder = scratch_folder("search")
        probe, outputs = Probes(path, Path(self._folder.name)).with_extremes(tensors)
        self._names = [name for least, largest, *_ in outputs.values() for name in (least, largest)]
        self._runner = OrtRunner(probe, known.model.label)

    def used(self, case: Case) -> float:
        """The share that is used on one case; 1 is all of it, or more."""
        if self._runner is None:
            return 0.0
        try:
            found = self._runner(case)
        except CheckError:
            # What can't be brought out for these inputs is no reason against the check.
            self._runner.close()
            self._runner = None
            return 0.0
        sizes = np.abs([float(found[name]) for name in self._names])
        return min(1.0, float(np.nan_to_num(sizes, nan=0.0, posinf=LARGEST).max(initial=0.0)) / LARGEST)

    def close(self) -> None:
        """Free the session, and remove the copy."""
        if self._runner is not None:
            self._runner.close()
        if self._folder is not None:
            self._folder.cleanup()
