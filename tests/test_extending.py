"""docs/extending.md: what each section adds from outside the package works as it stands there."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Suite

DOCS = Path(__file__).parent.parent / "docs" / "extending.md"
TESTS = '@trt_parity("gemm.onnx", precision=["fp16", "bf16"], batch=2)\ndef test_gemm(): ...\n'


def section(title: str) -> str:
    """The code of a section."""
    text = DOCS.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2]
    return re.split(r"```python.*\n", text, maxsplit=1)[1].partition("```\n")[0]


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "n2"])
def test_a_report_from_outside(suite: Suite, workers: tuple[str, ...]) -> None:
    (suite.path / "conftest.py").write_text(section("Report"))
    suite.write(test_gemm=TESTS)
    run = suite.run("-q", "--trt-csv=checks.csv", *workers)
    with (suite.path / "checks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["test"]: row["verdict"] for row in rows} == {each["nodeid"]: each["verdict"] for each in run.checks}
    assert {row["precision"] for row in rows} == {"fp16", "bf16"}
    assert float(rows[0]["worst"]) == run.checks[0]["parity"]["worst"]
    assert "2 checks written to checks.csv" in run.text


def test_a_report_from_outside_is_refused_before_the_first_test_where_it_cannot_be_written(suite: Suite) -> None:
    (suite.path / "conftest.py").write_text(section("Report"))
    suite.write(test_gemm=TESTS)
    run = suite.run("-q", "--trt-csv=.")
    assert "--trt-csv: " in run.text
    assert "is a directory" in run.text
    assert not run.report
