"""What pages show of a GPU, of a server and of other machines: the real words, for figures that are made up here.

`<!-- output of: made NAME -->` asks for one of them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from pytest_trtcheck.backends.onnxruntime import placement
from pytest_trtcheck.baselines.latency import LatencyBaseline, judge
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.cache.remote import Tally
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.record import LatencyDetails, LatencyRecord, NodeRecord, PartitionRecord, typed
from pytest_trtcheck.report import json_report, terminal
from tests.docs.page import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable


def _latency_baseline() -> str:
    """An engine that is slower by a fifth than the one recorded."""
    then = Distribution.of(1 + 0.01 * np.random.default_rng(0).normal(size=2000))
    now = Distribution.of(1.2 + 0.01 * np.random.default_rng(1).normal(size=3000))
    known = {"measured": "GPU time", "cuda_graph": True, "input_shapes": {"images": (8, 3, 640, 640)}}
    baseline = LatencyBaseline(
        model="detector.onnx",
        model_sha256="a" * 64,
        recorded="2026-11-21",
        tensorrt="tensorrt_rtx 1.5.0.114",
        driver="580.1",
        distribution=then,
        **known,  # type: ignore[arg-type]
    )
    conditions = {"tensorrt": "tensorrt_rtx 1.7.1.116", "driver": "580.1"}
    details = {**known, "conditions": conditions, "distribution": now.to_json()}
    record = LatencyRecord("pass", gpu="H200", samples=3000, details=typed(details, LatencyDetails))
    found = judge(record, baseline, model_sha256="a" * 64)
    return str(found.budgets[-1].text)


def _fell_back() -> str:
    nodes = (NodeRecord("hardest", "Hardmax", placement.CPU), NodeRecord("determinant", "Det", placement.CPU))
    found = PartitionRecord(placement.CUDA, nodes=40, elsewhere=nodes)
    title = "ONNX Runtime 1.31.1's CUDA provider"
    return f"detector.onnx in fp16: {placement.fault(found, title, 'fp16', None)}"


def exported(folder: Path, gpu: str, failed: str | None = None) -> str:
    """Export a detector in FP16 and BF16 as a run on that GPU does; what it says at its end."""
    from tests import test_export_release as release

    with TemporaryDirectory() as store:
        cache = Cache(Path(store) / "cache")
        records = []
        for precision in ("fp16", "bf16"):
            record = release.checked(cache, precision, nodeid=f"tests/test_detector.py::test_detector[{precision}]")
            record["model"] = "models/detector.onnx"
            if precision == failed:
                record |= {"verdict": "fail", "outcome": "failed", "message": "max of 'boxes' 0.0412 > 0.03"}
            records.append(record)
        lines = release.write(folder, records, cache, gpu=gpu).lines()
        # Those that are not exported stand in the order of their keys, which hold what is installed.
        return "\n".join(sorted(lines[:-1], key=lambda line: line if line.startswith("not ") else "") + lines[-1:])


def _systems() -> str:
    """The table of a transformer's encoder in FP16, as it was measured on an H100."""
    run = json_report.read(ROOT / "docs" / "measured" / "h100" / "systems.json")
    checks = [each for each in run.checks if "encoder-fp16" in each.nodeid and each.evidence]
    lines = [line.text for line in terminal.summary_lines(checks)]
    start = next(number for number, line in enumerate(lines) if line.startswith("system "))
    return "\n".join(lines[start - 1 : lines.index("", start)])


MADE: dict[str, Callable[[], str]] = {
    "latency-baseline": _latency_baseline,
    "exported": lambda: exported(Path("build/release"), "A100", failed="bf16"),
    "systems": _systems,
    "fell-back": _fell_back,
    "shared-cache": lambda: "\n".join(Tally(14, 3, 212.0).lines("s3://bucket/trtcheck")),
}


def made(name: str) -> str:
    """What that name stands for, in lines as pages have them."""
    lines = MADE[name]().splitlines()
    return "\n".join("\n".join(textwrap.wrap(line, 124, break_long_words=False)) for line in lines)
