"""What pages find in their folder: files of example_project, models out of packages, and what is made here."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx

from tests import onnx_models
from tests.docs import reports
from tests.docs.page import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_trtcheck.record import RunRecord

EXAMPLE = ROOT / "example_project"


def _conv(path: Path) -> None:
    onnx_models.save(onnx_models.conv_net(), path)


def _magika(path: Path) -> None:
    """magika's model, its long names shortened: the part that all of them have in common left out."""
    proto = onnx.load(onnx_models.magika())
    prefix = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/"
    for node in proto.graph.node:
        node.name = node.name.replace(prefix, "")
        for names in (node.input, node.output):
            names[:] = [each.replace(prefix, "") for each in names]
    for each in (*proto.graph.initializer, *proto.graph.value_info):
        each.name = each.name.replace(prefix, "")
    onnx.save(proto, path)


def _golden(path: Path) -> None:
    with np.load(EXAMPLE / "data" / "held_out.npz") as data:
        np.save(path, data["images"][:8])


def _tests(text: str) -> Callable[[Path], object]:
    head = "from pytest_trtcheck import trt_latency, trt_parity\n\n\n"
    return lambda path: path.write_text(head + text, encoding="utf-8")


def _reports(make: Callable[[], tuple[RunRecord, RunRecord]], which: int) -> Callable[[Path], object]:
    """One of two reports."""
    from pytest_trtcheck.report.json_report import save

    return lambda path: save(path, make()[which])


MAKERS: dict[str, Callable[[Path], object]] = {
    "conv.onnx": _conv,
    "diff-new.json": _reports(reports.compared, 1),
    "diff-old.json": _reports(reports.compared, 0),
    "golden.npy": _golden,
    "magika.onnx": _magika,
    "quantized.onnx": lambda path: shutil.copy(ROOT / "tests/data/quantized/pt2e_asymmetric.onnx", path),
    "test_bf16.py": _tests('@trt_parity("models/detector.onnx", precision="bf16", batch=4)\ndef test_detector(): ...\n'),
    "test_detector.py": _tests('@trt_parity("models/detector.onnx", batch=4, tol=0.02)\ndef test_detector(): ...\n'),
    "upgrade-new.json": _reports(reports.upgraded, 1),
    "upgrade-old.json": _reports(reports.upgraded, 0),
}
"""By the name that a page asks for: what writes the file, or fills the folder."""


def put(name: str, place: Path) -> None:
    """Lay the file or folder that a page calls so at a place.

    Raises
    ------
    LookupError
        Nothing has that name.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if make := MAKERS.get(name):
        make(place)
        return
    found = EXAMPLE if name == EXAMPLE.name else next(EXAMPLE.rglob(name), None)
    if found is None:
        raise LookupError(f"with: nothing is called {name!r}: neither in example_project, nor in tests/docs/makers.py")
    if found.is_dir():
        shutil.copytree(
            found, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*", "report.json")
        )
    else:
        shutil.copy(found, place)
