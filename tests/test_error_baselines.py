"""Baselines of errors: a rise within the tolerance fails, and what is no rise, or cannot be compared, does not."""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import helper

from pytest_trtcheck import baselines
from pytest_trtcheck.baselines import CheckKey, ErrorBaseline, Place, errors, scores
from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record import BaselineRecord, CheckRecord, JudgedRecord, OutputRecord, ParityRecord, PartRecord
from tests import drifting_backend, onnx_models
from tests.onnx_models import FLOAT, weights
from tests.test_report_json import validate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run, Suite

DAY = datetime.date(2025, 11, 21)
NODEID = "tests/test_a.py::test_a"
KEY = CheckKey(Place("emulated"), NODEID, "fp16", "onnxruntime", "emulated")
NOW = BaselineRecord("not_measured", "", {"onnxruntime": "1.32"})


def check(
    value: float | None, limit: float = 1e-2, *, metric: str = "max", rows: int | None = None, **changes: Any
) -> CheckRecord:
    """A check of one output by one limit."""
    entry = JudgedRecord(metric, value, limit, "tol", "pass", rows=rows)
    output = OutputRecord("y", "float32", (4, 10), judged=(entry,))
    found = CheckRecord(
        NODEID,
        "models/a.onnx",
        "pass",
        model_sha256="a" * 64,
        precision="fp16",
        backend="onnxruntime",
        evidence="emulated",
        inputs_sha256="c" * 64,
        parity=ParityRecord("pass", metric, limit, value, (output,)),
        baseline=NOW,
    )
    return CheckRecord.from_json(replace(found, **changes).to_json())


def recorded(*values: float, metric: str = "max", engines: int | None = None, **changes: Any) -> ErrorBaseline:
    """A baseline of so many builds."""
    found = ErrorBaseline(
        model="a.onnx",
        model_sha256="a" * 64,
        inputs_sha256="c" * 64,
        reference_sha256=None,
        recorded="2025-11-21",
        engines=engines or len(values),
        made_with={"onnxruntime": "1.32"},
        values={"y": {metric: values}},
    )
    return replace(found, **changes)


def held(baseline: ErrorBaseline | None, record: CheckRecord, *, updating: bool = False) -> BaselineRecord:
    return errors.judge(baseline, record, NOW, updating=updating)


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (0.002, 0.002, "pass"),
        (0.002, 0.001, "pass"),
        (0.002, 0.0029, "pass"),  # ×1.45
        (0.002, 0.0031, "fail"),  # ×1.55
        (0.002, 0.006, "fail"),
        (0.0001, 0.0005, "pass"),  # ×5, and 4 % of the limit
        (0.0001, 0.0007, "fail"),  # ×7, and 6 % of the limit
        (0.0, 0.0004, "pass"),
        (0.0, 0.0006, "fail"),
    ],
)
def test_with_one_build_an_error_has_to_rise_by_half_and_a_twentieth_of_its_limit(
    before: float, now: float, verdict: str
) -> None:
    assert held(recorded(before), check(now)).verdict == verdict


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        ((0.002, 0.00201, 0.00199), 0.00202, "pass"),
        ((0.002, 0.00201, 0.00199), 0.0022, "pass"),
        ((0.002, 0.00201, 0.00199), 0.003, "fail"),
        ((0.002, 0.0022, 0.0018), 0.0024, "pass"),
        ((0.002, 0.0022, 0.0018), 0.006, "fail"),
        ((0.001, 0.002, 0.004), 0.006, "pass"),  # Builds that differ so much say nothing of less.
        ((1e-5, 1.1e-5, 0.9e-5), 9e-5, "pass"),  # Less than 1 % of the limit.
        ((0.0, 0.0, 0.0), 0.0, "pass"),
        ((0.0, 0.0, 0.0), 0.001, "fail"),
    ],
)
def test_with_three_builds_an_error_has_to_rise_beyond_their_spread(
    before: tuple[float, ...], now: float, verdict: str
) -> None:
    assert held(recorded(*before), check(now)).verdict == verdict


def test_three_builds_that_are_one_engine_tell_no_spread() -> None:
    same = recorded(0.002, 0.002, 0.002, engines=1)
    assert held(same, check(0.0029)).verdict == "pass"
    found = held(same, check(0.0032))
    assert found.verdict == "fail"
    assert "(3 builds, the same bytes each time)" in found.text


def test_the_bound_is_that_of_student_with_the_pooled_variance() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the bound is held against scipy's")
    costs = [0.002, 0.0022, 0.0025]
    logs = np.log(costs)
    pooled = (4 * 0.1**2 + 2 * logs.var(ddof=1)) / 6
    bound = math.exp(logs.mean() + stats.t.ppf(1 - 0.01 / 7, 6) * math.sqrt(pooled * (1 + 1 / 3)))
    assert errors.allowed(costs, 1e-2, engines=3, compared=7) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(("spread", "most"), [(0.0, 0.0), (0.05, 0.002), (0.1, 0.01)])
def test_sound_builds_hardly_ever_fail(spread: float, most: float) -> None:
    random = np.random.default_rng(0)
    failed = 0
    for _ in range(1000):
        *before, now = 0.003 * np.exp(spread * random.normal(size=4))
        failed += now > errors.allowed(before, 0.01, engines=3, compared=1)
    assert failed <= most * 1000


def test_a_metric_that_is_the_better_the_larger_falls() -> None:
    before = recorded(60.0, metric="snr_db")
    assert held(before, check(58.0, 40.0, metric="snr_db")).verdict == "pass"
    found = held(before, check(50.0, 40.0, metric="snr_db"))
    assert found.verdict == "fail"
    assert "snr_db of output 'y' fell from 60 to 50" in found.text


def test_a_share_does_not_rise_by_chance() -> None:
    one_of_100 = recorded(0.01, metric="top1")
    assert held(one_of_100, check(0.03, 0.05, metric="top1", rows=100)).verdict == "pass"
    assert held(one_of_100, check(0.03, 0.05, metric="top1", rows=10_000)).verdict == "fail"


def test_every_part_of_an_output_is_held_against_its_own() -> None:
    def divided(boxes: float, scores: float) -> CheckRecord:
        parts = tuple(
            PartRecord("max", value, 1e-2, "tol", "pass", part=name, ranges=((1, start, start + 4),))
            for name, value, start in (("boxes", boxes, 0), ("scores", scores, 4))
        )
        record = check(max(boxes, scores))
        assert record.parity is not None
        (output,) = record.parity.outputs
        return replace(record, parity=replace(record.parity, outputs=(replace(output, parts=parts),)))

    before = errors.figures(divided(0.008, 0.001).parity or ParityRecord("pass"))
    baseline = recorded(1.0, values={"y": {name: (value,) for name, value in before["y"].items()}})
    assert held(baseline, divided(0.008, 0.001)).verdict == "pass"
    found = held(baseline, divided(0.008, 0.003))
    assert found.verdict == "fail", "the worst part alone would hide it"
    assert "max, scores of output 'y'" in found.text


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_an_error_that_is_no_number_any_more_rose(value: float | None) -> None:
    found = held(recorded(0.002), check(value))
    assert found.verdict == "fail"
    assert found.rises[0].value is None or math.isinf(found.rises[0].value)


# --- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_sha256": "b" * 64}, "another model (sha256 aaaaaaaa… then, bbbbbbbb… now)"),
        ({"inputs_sha256": "b" * 64}, "other inputs (sha256 cccccccc… then, bbbbbbbb… now)"),
        ({"reference_sha256": "b" * 64}, "another reference (sha256 none then, bbbbbbbb… now)"),
    ],
)
def test_what_is_not_comparable_is_said_and_not_judged(changes: dict[str, Any], said: str) -> None:
    found = held(recorded(0.001), check(0.009, **changes))
    assert found.verdict == "not_measured"
    assert said in found.text


def test_beside_a_reference_of_its_own_another_model_is_compared_and_said() -> None:
    before = recorded(0.001, reference_sha256="d" * 64)
    found = held(before, check(0.009, model_sha256="b" * 64, reference_sha256="d" * 64))
    assert found.verdict == "fail"
    assert "what else changed: the model (sha256 aaaaaaaa… then, bbbbbbbb… now)" in found.text


def test_a_rise_says_by_how_much_since_when_and_what_else_changed() -> None:
    now = replace(NOW, made_with={"onnxruntime": "1.33", "driver": "590"})
    found = errors.judge(recorded(0.001), check(0.009), now, updating=False)
    assert found.text.splitlines() == [
        "max of output 'y' rose from 0.001 to 0.009 (×9), though it keeps the limit of 0.01 (up to 0.0015 counts as "
        "unchanged)",
        "  since the baseline of 2025-11-21 (one build); what else changed: onnxruntime (1.32 then, 1.33 now); driver "
        "(none then, 590 now)",
    ]
    assert "nothing else that is recorded changed" in held(recorded(0.001), check(0.009)).text


def test_no_baseline_and_another_metric_pass_nothing() -> None:
    assert held(None, check(0.009)).verdict == "not_measured"
    found = held(recorded(0.001, metric="l2"), check(0.009))
    assert found.verdict == "not_measured"
    assert "none of the errors that are judged now" in found.text


def test_errors_that_the_baseline_lacks_are_said() -> None:
    entries = tuple(JudgedRecord(metric, 0.002, 0.01, "tol", "pass") for metric in ("max", "l2"))
    parity = ParityRecord("pass", "max", 0.01, 0.002, (OutputRecord("y", "float32", (4, 10), judged=entries),))
    found = held(recorded(0.002), check(0.002, parity=parity))
    said = "no error rose since the baseline of 2025-11-21 (one build), which has none of y l2; record it again"
    assert (found.verdict, found.text.startswith(said)) == ("pass", True)
    updated = held(recorded(0.002), check(0.002, parity=parity), updating=True)
    assert updated.text == "no error rose since the baseline of 2025-11-21 (one build)"


def test_a_rise_fails_the_output_by_the_baselines_limit() -> None:
    record = check(0.009)
    assert record.parity is not None
    parity = errors.applied(record.parity, held(recorded(0.001), record))
    assert (parity.verdict, parity.worst, parity.tol_source) == ("fail", 0.009, "baseline of 2025-11-21")
    assert [entry.verdict for entry in parity.outputs[0].judged] == ["pass", "fail"]
    accepted = held(recorded(0.001), record, updating=True)
    assert accepted.verdict == "pass"
    assert "accepted as the new baseline" in accepted.text
    assert errors.applied(record.parity, accepted) == record.parity


# --- recording -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "baselines"


def kept(folder: Path) -> ErrorBaseline | None:
    return baselines.opened(folder).find(KEY).errors


def test_what_is_recorded_is_read_again(folder: Path) -> None:
    done = baselines.update(folder, [check(0.00123456)], DAY)
    assert done.recorded == 1
    assert [path.relative_to(folder).as_posix() for path in done.files] == ["emulated/tests/test_a.py.json"]
    assert kept(folder) == recorded(0.001235)
    assert not list(folder.glob(".*")), "the lock is gone"


def test_latency_and_errors_do_not_overwrite_each_other(folder: Path) -> None:
    from tests.test_baselines import check as timed
    from tests.test_baselines import measured

    parity = check(0.001).parity
    both = replace(timed(measured()), parity=parity, baseline=NOW)
    baselines.update(folder, [replace(both, baseline=replace(NOW, gpu=_gpu(both)))], DAY)
    (path,) = folder.rglob("*.json")
    before = json.loads(path.read_text())["tests"]["tests/test_a.py::test_a[fp16]"]["fp16, tensorrt_rtx, engine"]
    assert set(before) == {"errors", "latency"}
    disturbed = replace(timed(measured(disturbances=["busy"])), parity=check(0.002).parity, baseline=both.baseline)
    done = baselines.update(folder, [replace(disturbed, baseline=replace(NOW, gpu=_gpu(both)))], DAY)
    assert (done.recorded, "disturbed" in done.left_out[0][1]) == (1, True)
    after = json.loads(path.read_text())["tests"]["tests/test_a.py::test_a[fp16]"]["fp16, tensorrt_rtx, engine"]
    assert after["latency"] == before["latency"]
    assert after["errors"]["values"] == {"y": {"max": [0.002]}}


def _gpu(record: CheckRecord) -> Any:
    assert record.latency is not None
    assert record.latency.details.conditions is not None
    return record.latency.details.conditions.gpu_record


def test_what_did_not_pass_is_no_baseline(folder: Path) -> None:
    baselines.update(folder, [check(0.001)], DAY)
    parity = check(0.02).parity
    assert parity is not None
    failed = replace(check(0.02), verdict="fail", parity=replace(parity, verdict="fail", reason="output 'y': too much"))
    nan = check(math.nan)
    done = baselines.update(folder, [failed], DAY)
    assert (done.recorded, done.left_out) == (0, ((NODEID, "parity: fail: output 'y': too much"),))
    assert baselines.update(folder, [nan], DAY).left_out == ((NODEID, "no error is a number"),)
    assert kept(folder) == recorded(0.001)


def test_checks_that_nothing_tells_apart_have_no_baseline(folder: Path) -> None:
    done = baselines.update(folder, [check(0.001), check(0.002, model_sha256="b" * 64)], DAY)
    assert done.recorded == 0
    assert "2 checks of it in fp16 would have one baseline: parametrize the test" in done.left_out[0][1]
    assert baselines.update(folder, [check(0.001), check(0.002)], DAY).recorded == 1, "a test that was run again"
    kept_nodes = replace(NOW, made_with={**NOW.made_with, "options": '{"keep_fp32": ["a"]}'})
    for other in (
        check(0.002, baseline=kept_nodes),
        check(0.002, metric="l2"),
        check(0.002, reference_sha256="d" * 64),
    ):
        done = baselines.update(folder, [check(0.001), other], DAY)
        assert done.recorded == 0
        assert "2 checks of it in fp16 would have one baseline" in done.left_out[0][1]


def test_a_test_that_did_not_come_to_all_of_its_checks_loses_no_baseline(folder: Path) -> None:
    both = [check(0.001, outcome="passed"), check(0.002, precision="bf16", outcome="passed")]
    assert baselines.update(folder, both, DAY).recorded == 2
    baselines.update(folder, [check(0.003, outcome="failed")], DAY)
    (path,) = folder.rglob("*.json")
    labels = set(json.loads(path.read_text())["tests"][NODEID])
    assert labels == {"fp16, onnxruntime, emulated", "bf16, onnxruntime, emulated"}
    baselines.update(folder, [check(0.003, outcome="passed")], DAY)
    assert set(json.loads(path.read_text())["tests"][NODEID]) == {"fp16, onnxruntime, emulated"}


UPDATING = """
import datetime, sys
from dataclasses import replace
from pytest_trtcheck import baselines
from tests.test_error_baselines import check
for number in range(20):
    record = replace(check(0.001), nodeid=f"tests/test_a.py::test_{sys.argv[2]}_{number}")
    baselines.update(sys.argv[1], [record], datetime.date(2025, 11, 21))
"""


def test_two_runs_that_update_one_directory_lose_nothing(folder: Path) -> None:
    root = str(os.path.abspath(os.path.join(os.path.dirname(__file__), "..")))  # noqa: PTH100, PTH118, PTH120
    environment = {**os.environ, "PYTHONPATH": root}
    running = [subprocess.Popen([sys.executable, "-c", UPDATING, str(folder), name], env=environment) for name in "ab"]
    assert [each.wait() for each in running] == [0, 0]
    (path,) = folder.rglob("*.json")
    assert len(json.loads(path.read_text())["tests"]) == 40


# --- files that are wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda _: "[" * 100_000, "nested too deeply"),
        (lambda _: '{"a":' * 100_000, "nested too deeply"),
        (lambda text: text[: len(text) // 2], "line"),
        (lambda text: text.replace("0.001", "1e999"), "no list of figures"),
        (lambda text: text.replace("0.001", "Infinity"), "Infinity is no figure"),
        (lambda text: text.replace("0.001", '"a lot"'), "$.values[...][...][0]"),
        (lambda text: text.replace("[0.001]", "[]"), "no list of figures"),
        (lambda text: text.replace('"engines": 1', '"engines": 0'), "engines is less than 1"),
        (lambda text: text.replace('"errors"', '"erors"'), "'erors' is no part of a baseline"),
        (lambda text: text.replace('"format": 2', '"format": [2]'), "format [2]"),
        (lambda text: text.replace('"tests": {', f'"tests": {{"{NODEID}": {{}},'), "stands in it twice"),
        (lambda _: "\x00\xff", "no file of baselines"),
        (lambda _: "null", "no file of baselines"),
        (lambda _: "", "no file of baselines"),
    ],
)
def test_a_damaged_file_names_itself_and_the_place(folder: Path, spoil: Callable[[str], str], said: str) -> None:
    baselines.update(folder, [check(0.001)], DAY)
    (path,) = folder.rglob("*.json")
    path.write_text(spoil(path.read_text()), encoding="latin-1")
    for read in (lambda: kept(folder), lambda: baselines.update(folder, [check(0.001)], DAY)):
        with pytest.raises(ReportError) as raised:
            read()
        assert str(path) in str(raised.value)
        assert said in str(raised.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_never_ends_is_not_read(folder: Path) -> None:
    path = folder / "emulated/tests/test_a.py.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(ReportError, match="not a regular file"):
        kept(folder)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ReportError, match="not a regular file"):
        kept(folder)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ReportError, match="more than 67,108,864 bytes"):
        kept(folder)


# --- a user's suite --------------------------------------------------------------------------------------------------

SUITE = """
X = {"x": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)}

@trt_parity("checked.onnx", reference="fp32.onnx", precision="fp16", tol=2e-2)
def test_rises():
    return X

@trt_parity("fp32.onnx", precision=["fp16", "bf16"])
def test_stays():
    return X
"""


def two_layers(path: Path, scale: float) -> None:
    """MatMul → Relu → MatMul, the last weights scaled."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="last"),
    ]
    values = {"w1": weights((64, 64), 1), "w2": weights((64, 10), 2) * np.float32(scale)}
    made = onnx_models.model(nodes, {"x": (FLOAT, ["n", 64])}, {"y": (FLOAT, ["n", 10])}, values)
    onnx_models.save(made, path)


@pytest.fixture
def project(suite: Suite) -> Suite:
    two_layers(suite.path / "fp32.onnx", 1.0)
    two_layers(suite.path / "checked.onnx", 1.001)
    return suite.write(test_it=SUITE)


def test_an_error_that_triples_within_its_limit_fails(project: Suite, run_everywhere: Callable[..., Run]) -> None:
    run = run_everywhere("--trt-baseline=kept", "--trt-update-baseline")
    run.result.assert_outcomes(passed=3)
    assert "3 baselines recorded in 1 file" in run.text
    assert (project.path / "kept/emulated/test_it.py.json").exists()
    two_layers(project.path / "checked.onnx", 1.004)
    run = run_everywhere("--trt-baseline=kept")
    run.result.assert_outcomes(passed=2, failed=1)
    assert "rose from 0.00" in run.text
    assert "what else changed: the model (sha256" in run.said
    validate(run.report)
    record = run.check("test_rises")
    assert record["verdict"] == record["parity"]["verdict"] == record["baseline"]["verdict"] == "fail"
    assert record["baseline"]["rises"][0]["value"] < record["baseline"]["rises"][0]["limit"]


def test_noise_passes_and_a_rise_can_be_accepted(project: Suite) -> None:
    project.run("--trt-baseline=kept", "--trt-update-baseline").result.assert_outcomes(passed=3)
    two_layers(project.path / "checked.onnx", 1.0011)
    noise = project.run("--trt-baseline=kept")
    noise.result.assert_outcomes(passed=3)
    assert {record["baseline"]["verdict"] for record in noise.checks} == {"pass"}
    two_layers(project.path / "checked.onnx", 1.004)
    project.run().result.assert_outcomes(passed=3)
    accepted = project.run("--trt-baseline=kept", "--trt-update-baseline")
    accepted.result.assert_outcomes(passed=3)
    assert "accepted as the new baseline" in " ".join(accepted.text.split())
    project.run("--trt-baseline=kept").result.assert_outcomes(passed=3)


def test_a_damaged_file_is_an_error_of_its_tests_alone(project: Suite, run_everywhere: Callable[..., Run]) -> None:
    project.write(test_other='@trt_parity("fp32.onnx", batch=1)\ndef test_other(): ...\n')
    project.run("--trt-baseline=kept", "--trt-update-baseline").result.assert_outcomes(passed=4)
    path = project.path / "kept/emulated/test_it.py.json"
    path.write_text("[" * 100_000)
    run = run_everywhere("--trt-baseline=kept", "--trt-update-baseline")
    run.result.assert_outcomes(passed=1, failed=3)
    assert "INTERNALERROR" not in run.text
    assert "test_it.py.json is no file of baselines: it is nested too deeply" in run.said
    assert [record["verdict"] for record in run.checks].count("error") == 3
    assert path.read_text() == "[" * 100_000, "what cannot be read is not overwritten"


def test_another_model_and_another_precision_are_not_judged(project: Suite) -> None:
    project.run("--trt-baseline=kept", "--trt-update-baseline").result.assert_outcomes(passed=3)
    two_layers(project.path / "fp32.onnx", 1.5)
    two_layers(project.path / "checked.onnx", 1.5)
    project.write(test_it=SUITE.replace('["fp16", "bf16"]', '["tf32", "bf16"]'))
    run = project.run("--trt-baseline=kept")
    by_test: dict[str, Any] = {record["nodeid"].partition("::")[2]: record["baseline"] for record in run.checks}
    assert "it was recorded for another model" in by_test["test_stays[bf16]"]["text"]
    assert "it was recorded against another reference" in by_test["test_rises"]["text"]
    assert "no baseline of this check's errors" in by_test["test_stays[tf32]"]["text"]
    assert {found["verdict"] for found in by_test.values()} == {"not_measured"}


def test_the_spread_of_three_builds(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    drifting_backend.install(suite.path, monkeypatch)
    suite.write(test_it='@trt_parity("conv.onnx", precision="fp16", batch=1)\ndef test_it(): ...\n')

    def run(*factors: float, asked: tuple[str, ...] = ()) -> Run:
        drifting_backend.prepare(suite.path, monkeypatch, factors)
        return suite.run(
            "--trt-backend=drifting", f"--trt-rebuild={len(factors)}", "--trt-baseline=kept", "--trt-diagnose=0", *asked
        )

    run(1.002, 1.0021, 1.0019, asked=("--trt-update-baseline",)).result.assert_outcomes(passed=1)
    (path,) = (suite.path / "kept").rglob("*.json")
    (entry,) = json.loads(path.read_text())["tests"]["test_it.py::test_it"].values()
    assert entry["errors"]["engines"] == 3
    assert len(entry["errors"]["values"]["logits" if "logits" in entry["errors"]["values"] else "y"]["max"]) == 3
    run(1.0022).result.assert_outcomes(passed=1)
    run(1.0018, 1.0022).result.assert_outcomes(passed=1)
    once = run(1.006)
    once.result.assert_outcomes(failed=1)
    assert "(3 builds)" in once.text
    again = run(1.002, 1.006, 1.002)
    again.result.assert_outcomes(failed=1)
    assert "rose from" in again.text


CALIBRATED = """
from pathlib import Path

X = {"x": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)}

@trt_parity("fp32.onnx", precision="int8", tol=0.9, calibration="calibration/*.npy")
def test_it():
    return X
"""


def calibration(folder: Path, seed: int, scale: float = 1.0) -> None:
    """Eight samples of the distribution that the test feeds, times a scale."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(8):
        np.save(folder / f"{number}.npy", (scale * random.normal(size=(1, 64))).astype(np.float32))


def test_calibration_data_that_was_swapped_is_said(project: Suite) -> None:
    (project.path / "test_it.py").unlink()
    calibration(project.path / "calibration", 1)
    project.write(test_calibrated=CALIBRATED)
    first = project.run("--trt-baseline=kept", "--trt-update-baseline")
    first.result.assert_outcomes(passed=1)
    (record,) = first.checks
    assert record["calibration"]["samples"] == 8
    assert len(record["calibration"]["sha256"]) == 64
    assert not record["calibration"]["inputs"]["x"]["drifted"]
    assert "is not like" not in first.text
    again = project.run("--trt-baseline=kept")
    again.result.assert_outcomes(passed=1)
    assert "calibration data (" not in again.text
    old = (project.path / "report.json").read_text()
    calibration(project.path / "calibration", 2)
    swapped = project.run("--trt-baseline=kept")
    assert "not as in the baseline of" in swapped.text
    assert "calibration data (8 samples, sha256" in " ".join(swapped.text.split())
    calibration(project.path / "calibration", 2, 0.2)
    bad = project.run("--trt-baseline=kept")
    bad.result.assert_outcomes(failed=1)
    text = " ".join(bad.text.split())
    assert "what else changed: calibration data (8 samples, sha256" in text
    assert "the calibration data is not like the returned inputs: input 'x'" in text
    (project.path / "old.json").write_text(old)
    told = subprocess.run(
        [sys.executable, "-m", "pytest_trtcheck", "diff", "old.json", "report.json"],
        cwd=project.path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "calibration data" in told.stdout, told.stderr
    validate(bad.report)


# --- scores ----------------------------------------------------------------------------------------------------------

SCORED = """
from pytest_trtcheck import Case

rng = np.random.default_rng(0)
LABELS = rng.integers(0, 10, 2000)
X = np.zeros((2000, 11), np.float32)
X[np.arange(2000), LABELS] = 1
X[np.flatnonzero(LABELS)[:BROKEN], 10] = 1


def top1(outputs, case):
    return outputs["logits"].argmax(axis=1) == case.labels


@trt_parity("checked.onnx", reference="good.onnx", precision="fp16", score=top1, max_drop=0.05AGGREGATE)
def test_it():
    return [Case({"x": X[i : i + 100]}, LABELS[i : i + 100]) for i in range(0, 2000, 100)]
"""


def classifier(path: Path, wrong: float) -> None:
    """Takes what its last input marks for class 0, where `wrong` is large."""
    values = np.vstack([np.eye(10), wrong * np.eye(10)[:1]]).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w"], ["logits"], name="classify")
    made = onnx_models.model([node], {"x": (FLOAT, ["N", 11])}, {"logits": (FLOAT, ["N", 10])}, {"w": values})
    onnx_models.save(made, path)


@pytest.mark.parametrize("aggregate", ["", ", aggregate=np.mean"])
def test_a_score_that_falls_within_max_drop_fails_against_its_baseline(suite: Suite, aggregate: str) -> None:
    classifier(suite.path / "good.onnx", 0.0)
    classifier(suite.path / "checked.onnx", 0.001)
    suite.write(test_it=SCORED.replace("BROKEN", "40").replace("AGGREGATE", aggregate))
    first = suite.run("--trt-baseline=kept", "--trt-update-baseline")
    first.result.assert_outcomes(passed=1)
    assert "1 baseline recorded in 1 file" in first.text
    same = suite.run("--trt-baseline=kept")
    same.result.assert_outcomes(passed=1)
    assert same.checks[0]["score"]["baseline"]["verdict"] == "pass"
    classifier(suite.path / "checked.onnx", 50.0)
    suite.run().result.assert_outcomes(passed=1)
    fell = suite.run("--trt-baseline=kept")
    fell.result.assert_outcomes(failed=1)
    text = " ".join(fell.text.split())
    assert "fell from 1 to 0.98 since the baseline of" in text
    assert "a loss of 0.02 (" in text
    assert "40 of which changed), though it keeps max_drop=0.05 against the reference" in text
    assert "what else changed: the model" in text
    validate(fell.report)
    suite.write(test_it=SCORED.replace("BROKEN", "50").replace("AGGREGATE", aggregate))
    others = suite.run("--trt-baseline=kept")
    others.result.assert_outcomes(passed=1)
    assert "it was recorded with other inputs" in others.checks[0]["score"]["baseline"]["text"]


def test_other_labels_are_no_fall(suite: Suite) -> None:
    classifier(suite.path / "good.onnx", 0.0)
    classifier(suite.path / "checked.onnx", 0.001)
    text = SCORED.replace("BROKEN", "0").replace("AGGREGATE", "")
    suite.write(test_it=text)
    suite.run("--trt-baseline=kept", "--trt-update-baseline").result.assert_outcomes(passed=1)
    suite.write(test_it=text.replace("LABELS[i : i + 100])", "(LABELS[i : i + 100] + (i < 300)) % 10)"))
    run = suite.run("--trt-baseline=kept")
    run.result.assert_outcomes(passed=1)
    assert "the reference itself scored 1 then, and 0.85 now" in run.checks[0]["score"]["baseline"]["text"]


@pytest.mark.parametrize("items", [np.ones(10), np.arange(12.0).reshape(3, 4), np.array([True, False])])
def test_items_travel(items: Any) -> None:
    record = scores.packed(items)
    assert record is not None
    assert scores.unpacked(record).tolist() == items.astype(float).tolist()
    assert scores.packed([1, "a"]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (11,)},
        {"shape": (9,)},
        {"shape": ()},
        {"shape": (0,)},
        {"shape": (1 << 40,)},
        {"data": "no base64!"},
        {"data": "AAAA"},
        {"data": base64.b64encode(zlib.compress(bytes(1 << 24))).decode()},
        {"data": base64.b64encode(zlib.compress(np.full(10, np.nan, np.float32).tobytes())).decode()},
    ],
)
def test_items_that_are_damaged_are_refused(changes: dict[str, Any]) -> None:
    record = scores.packed(np.ones(10))
    assert record is not None
    with pytest.raises(ValueError, match="items"):
        scores.unpacked(replace(record, **changes))
