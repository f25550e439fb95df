"""Reports as they were written before records were typed to the end: read, and written again key for key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pytest_trtcheck.record import BlameRecord, CheckRecord, RunRecord, jsonable, typed
from pytest_trtcheck.report import diff, github, html, json_report, terminal

RECORDED = sorted((Path(__file__).parent / "data" / "reports").glob("*.json"))
MEASURED = sorted((Path(__file__).parent.parent / "docs" / "measured").glob("h*/*.json"))
OLDER = [path for path in MEASURED if "schema_version" in json.loads(path.read_text())]


def normal(value: Any) -> Any:
    """JSON has one kind of number: 7 and 7.0 are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: normal(item) for key, item in sorted(value.items())}
    return [normal(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_report_is_written_again_as_it_was(path: Path, tmp_path: Path) -> None:
    run = json_report.read(path)
    json_report.save(tmp_path / "again.json", run)
    before, after = (json.dumps(normal(json.loads(each.read_text()))) for each in (path, tmp_path / "again.json"))
    assert before == after
    assert json_report.read(tmp_path / "again.json") == run or "nan" in before
    for record in run.checks:
        once = CheckRecord.from_json(record.to_json())
        assert jsonable(once) == jsonable(record)


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_a_report_of_an_earlier_version_is_read_shown_and_compared(path: Path) -> None:
    run = json_report.read(path)
    before = json.loads(path.read_text())["checks"]
    assert [(each.nodeid, each.verdict) for each in run.checks] == [
        (each["nodeid"], each["verdict"]) for each in before
    ]
    assert terminal.summary_lines(run.checks)
    assert github.step_summary(run.checks, run.environment)
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2")
    assert html.render(run)
    found = diff.diff(run, run)
    assert (found.unchanged, found.checks) == (len(run.checks), ())


def test_what_a_later_version_adds_is_passed_over_and_what_an_earlier_one_lacked_is_not_known() -> None:
    check = {"nodeid": "t.py::a", "model": "a.onnx", "verdict": "pass", "later": 1, "evidence": "provider"}
    judged: dict[str, Any] = {
        "metric": "max",
        "value": "inf",
        "limit": None,
        "source": None,
        "verdict": "fail",
        "new": {},
    }
    parity = {"verdict": "fail", "metric": "max", "outputs": [{"name": "y", "judged": [judged]}]}
    run = typed({"environment": {"later": {}}, "checks": [{**check, "parity": parity}], "later": []}, RunRecord)
    (record,) = run.checks
    assert record.evidence == "provider"
    assert record.parity is not None
    assert record.parity.outputs[0].judged[0].value == math.inf
    assert "later" not in jsonable(run)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.1, 7])
def test_a_number_comes_back_as_the_number_that_it_was(value: float) -> None:
    blame = {"step": "precision", "tensors": [{"name": "inf", "error": value, "own": value}], "keep_value": value}
    plain = jsonable(
        {"nodeid": "nan", "model": "inf", "verdict": "fail", "parity": {"verdict": "fail", "worst": value}}
    )
    plain["parity"]["blame"] = jsonable(blame)
    record = CheckRecord.from_json(json.dumps(plain, allow_nan=False))
    assert (record.nodeid, record.model) == ("nan", "inf"), "a name stays a name"
    assert record.parity is not None
    assert record.parity.blame is not None
    (tensor,) = record.parity.blame.tensors
    assert tensor.name == "inf"
    for found in (record.parity.worst, tensor.error, tensor.own, record.parity.blame.keep_value):
        assert isinstance(found, float)
        assert found == value or (math.isnan(found) and math.isnan(value))


def test_the_record_of_a_blame_has_every_key_of_a_diagnosis() -> None:
    from dataclasses import fields

    from pytest_trtcheck.diagnose.result import Blame, Errors

    found = Blame("precision", "headline", Errors("max", 1.0, "y", 1.0, None, 1.0)).to_dict()
    # What was traced of every tensor stands in the record's graph.
    assert {each.name for each in fields(BlameRecord)} == found.keys() - {"traced"}
