"""The emulation against what a GPU computed: a sample of the operator atlas, judged again without a GPU."""

from __future__ import annotations

import json
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_trtcheck.errors import NothingComputedError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks" / "gpu" / "atlas"))

import agreement  # type: ignore[import-not-found]  # noqa: E402 - beside the atlas's scripts
import prepare  # type: ignore[import-not-found]  # noqa: E402
import probes  # type: ignore[import-not-found]  # noqa: E402

ENGINES = 90
"""Enough of the 830 that a rule that is lost shows, few enough for a test."""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "measured" / "atlas" / "gpu.json").read_text())
    return found


def test_the_emulation_says_what_the_gpu_said(measured: dict[str, Any], tmp_path: Path) -> None:
    chosen = set(random.Random(0).sample(sorted(measured), ENGINES))
    for case in probes.cases():
        for precision in case.precisions:
            name = f"{case.name}.{precision}"
            if name not in chosen:
                continue
            # A check of what computes nothing is refused: casts, and other things that move values.
            with suppress(NothingComputedError):
                prepare.lowered(case, precision, tmp_path / f"{name}.onnx", tmp_path / "cache")
    with np.errstate(all="ignore"):
        agreement.emulate(tmp_path, tmp_path / "emulated.json")
    emulated = json.loads((tmp_path / "emulated.json").read_text())
    table = agreement.rows({name: measured[name] for name in chosen}, emulated, None)
    score = agreement.score(table)
    assert score["probes"] > 800
    assert score["emulated"]["agree_share"] >= 0.985, [row["engine"] for row in table if _differs(row)]
    assert score["emulated"]["caught_share"] >= 0.95
    assert not [row["engine"] for row in table if row["hidden"]]
    assert score["plain"]["caught_share"] < 0.6  # What an FP32 run of the lowered model would have seen.


def _differs(row: dict[str, Any]) -> bool:
    return bool(row["gpu"]["verdict"] != row["emulated"]["verdict"])
