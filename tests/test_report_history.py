"""Reports over time: where a check rose is said, also in small steps; what cannot be compared is no rise."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck import __main__, latency
from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.plugin.revision import commit
from pytest_trtcheck.record import (
    CheckRecord,
    EngineRecord,
    Environment,
    GpuRecord,
    JudgedRecord,
    Library,
    MissingRecord,
    OutputRecord,
    ParityRecord,
    RunRecord,
    ScoreRecord,
    Verdict,
)
from pytest_trtcheck.report import history, json_report, merge
from pytest_trtcheck.report.text import columns

if TYPE_CHECKING:
    from tests.conftest import Suite

T4 = Environment(
    python="3.12", driver="580", tensorrt=Library(module="tensorrt", version="10.1"), gpu=GpuRecord("Tesla T4")
)
HOSTILE = "<script>alert(1)</script>"


def check(
    error: float, *, name: str = "a", limit: float = 0.01, p50_ms: float | None = None, seed: int = 0
) -> CheckRecord:
    verdict: Verdict = "pass" if error <= limit else "fail"
    output = OutputRecord("boxes", max=error, judged=(JudgedRecord("max", error, limit, "tol", verdict),))
    timed = None
    if p50_ms is not None:
        samples = p50_ms * (1 + 0.01 * np.random.default_rng(seed).standard_normal(3000))
        timed = latency.to_record(samples, latency.decide(samples, {"p50_ms": 9.0}), gpu="T4")
        timed = replace(timed, details=replace(timed.details, distribution=Distribution.of(samples).to_json()))
    return CheckRecord(
        f"t.py::test_{name}",
        f"{name}.onnx",
        verdict,
        model_sha256="0" * 64,
        precision="int8",
        evidence="engine",
        cases=1,
        inputs="returned",
        parity=ParityRecord(verdict, "max", limit, error, (output,)),
        latency=timed,
    )


def report(day: int, *checks: CheckRecord, environment: Environment = T4, **more: Any) -> tuple[str, RunRecord]:
    run = json_report.document(checks, environment)
    return f"{day}.json", replace(run, started=f"2026-11-{day:02}T03:00:00Z", commit=f"{day:07x}{'0' * 33}", **more)


def turns(*reports: tuple[str, RunRecord]) -> list[tuple[int, str]]:
    (track,) = history.history(reports).tracks
    return [(turn.moment.number, turn.word) for turn in track.turns]


def test_a_rise_is_found_where_it_was_whatever_the_order_of_the_files() -> None:
    errors = [0.002, 0.0021, 0.0019, 0.008, 0.0081, 0.02, 0.003]
    reports = [report(day, check(error)) for day, error in enumerate(errors, 1)]
    assert turns(*reversed(reports)) == [(4, "worse"), (6, "worse"), (7, "better")]
    found = history.history(reports)
    (track,) = found.tracks
    assert "boxes max 0.00190 → " not in track.turns[0].text, "held against what it was when it last changed"
    assert "boxes max 0.00200 → 0.00800 (×4.00, limit ≤ 0.01)" in track.turns[0].text
    assert track.verdicts == "pass → fail → pass"
    assert not found.is_worse


def test_a_rise_in_small_steps_is_one() -> None:
    reports = [report(day, check(0.002 * 1.05**day)) for day in range(1, 10)]
    assert [place for place, word in turns(*reports)] == [3, 5, 7, 9]
    steady = [report(day, check(0.002 * (1.05 if day % 2 else 1.0))) for day in range(1, 10)]
    assert turns(*steady) == []


def test_a_change_of_one_quantity_does_not_hide_the_creeping_of_another() -> None:
    reports = [
        report(day, replace(check(0.002 * 1.06 ** (day - 1)), score=_score(0.9 - 0.1 * (day > 1)))) for day in (1, 2, 3)
    ]
    assert turns(*reports) == [(2, "worse"), (3, "worse")]


def _score(value: float) -> ScoreRecord:
    drop = 0.9 - value
    return ScoreRecord("pass", "top1", 0.9, value, drop, drop - 0.01, drop + 0.01, 0.99, 0.5, samples=100)


@pytest.mark.parametrize("part", ["score", "latency", "engine"])
def test_what_is_measured_otherwise_is_held_against_the_first_that_was_measured_so(part: str) -> None:
    def night(day: int, way: str, figure: float) -> tuple[str, RunRecord]:
        if part == "score":
            return report(day, replace(check(0.002), score=replace(_score(1 - 0.1 * figure), labels_sha256=way)))
        if part == "engine":
            engine = EngineRecord(way, True, None, 1.0, int(figure * (50 << 20)), None, None)
            return report(day, replace(check(0.002), engine=engine, compiled_for=way))
        found = check(0.002, p50_ms=figure, seed=day)
        assert found.latency is not None
        details = replace(found.latency.details, measured=way)
        return report(day, replace(found, latency=replace(found.latency, details=details)))

    nights = [night(1, "a", 1.0), night(2, "b", 1.0), night(3, "b", 3.0)]
    assert (3, "worse") in turns(*nights)
    assert history.history(nights).is_worse
    # One night of another way hides nothing.
    nights = [night(1, "a", 1.0), night(2, "b", 1.0), night(3, "a", 3.0)]
    assert (3, "worse") in turns(*nights)


def test_a_check_that_broke_for_a_night_hides_no_rise() -> None:
    broken = replace(check(0.001), verdict="error", parity=None)
    refused = CheckRecord("t.py::test_a", "", "error", gpu_ran=False)
    for error in (broken, refused):
        nights = [report(1, check(0.001)), report(2, error), report(3, error), report(4, check(0.009))]
        (track,) = history.history(nights).tracks
        assert [(turn.moment.number, turn.word) for turn in track.turns] == [(2, "worse"), (4, "worse")]
        assert "boxes max 0.00100 → 0.00900" in track.turns[-1].text
        assert history.history(nights).is_worse
        assert history.history(nights[:2]).is_worse, "that it broke is worse"
        same = history.history([*nights[:3], report(4, check(0.001))])
        assert [turn.text for turn in same.tracks[0].turns][1:] == ["verdict error → pass"]
    # A model that came while the check was broken is another one.
    other = replace(check(0.009), model_sha256="b" * 64)
    (track,) = history.history([report(1, check(0.001)), report(2, refused), report(3, other)]).tracks
    assert [turn.word for turn in track.turns] == ["worse", "not compared"]


def test_latency_is_tested_and_not_compared_by_eye() -> None:
    slower = [report(day, check(0.002, p50_ms=1.0 if day < 3 else 1.3, seed=day)) for day in range(1, 5)]
    assert turns(*slower) == [(3, "worse")]
    (track,) = history.history(slower).tracks
    assert [line.what for line in track.lines] == ["boxes max", "p50", "p99"]
    blind = [(name, _without_distribution(run)) for name, run in slower]
    assert turns(*blind) == [(3, "perhaps worse or better")], "a fall that nobody can test is said, and is no verdict"


def _without_distribution(run: RunRecord) -> RunRecord:
    checks = []
    for each in run.checks:
        assert each.latency is not None
        details = replace(each.latency.details, distribution=None)
        checks.append(replace(each, latency=replace(each.latency, details=details)))
    return replace(run, checks=tuple(checks))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_sha256": "1" * 64}, "another model"),
        ({"evidence": "emulated"}, "other evidence"),
        ({"inputs": "generated"}, "other inputs"),
    ],
)
def test_what_is_another_check_is_no_rise(change: dict[str, Any], said: str) -> None:
    other = replace(check(0.009), **change)
    reports = [report(1, check(0.001)), report(2, other), report(3, replace(other, notes=("the same",)))]
    (track,) = history.history(reports).tracks
    assert [(turn.moment.number, turn.word) for turn in track.turns] == [(2, "not compared")]
    assert said in track.turns[0].text


def test_machines_are_followed_apart_and_what_is_gone_is_said() -> None:
    a100 = replace(T4, gpu=GpuRecord("NVIDIA A100"))
    dead = (MissingRecord("t.py::test_a", "its process died"),)
    found = history.history(
        [
            report(1, check(0.001)),
            report(2, check(0.009), environment=a100),
            report(3, check(0.001)),
            report(4, environment=a100, missing=dead),
            report(5, check(0.005)),
            report(6, check(0.005, name="b"), environment=a100),
        ]
    )
    told = {track.machine + track.nodeid[-2:]: track for track in found.tracks}
    assert {name: track.gone for name, track in told.items()} == {
        "Tesla T4_a": "",
        "A100_a": "not in the newest report",
        "A100_b": "",
    }
    assert [turn.moment.number for turn in told["Tesla T4_a"].turns] == [5]
    # A night of another machine is no gap in a line.
    assert told["Tesla T4_a"].lines[0].values == (0.001, 0.001, 0.005)
    assert told["A100_a"].lines[0].values == (0.009, None, None)
    assert found.is_worse, "it rose in the newest report of its machine"
    assert [moment.environment for moment in found.moments] == [()] * 6, "another machine is no change of the first"
    (lost,) = history.history([report(2, check(0.009)), report(4, missing=dead)]).tracks
    assert lost.gone == "not in the newest report; its process died"


def test_a_run_that_a_merged_report_holds_as_well_counts_once() -> None:
    a100 = replace(T4, gpu=GpuRecord("NVIDIA A100"))
    old, new, other = report(1, check(0.001)), report(3, check(0.009)), report(2, check(0.001), environment=a100)
    both = merge.merge([new, other])
    for reports in ([old, new, ("both.json", both)], [old, ("both.json", both), new]):
        found = history.history(reports)
        assert found.is_worse, "the newest run of it is the one that rose"
        (track,) = (each for each in found.tracks if each.machine == "Tesla T4")
        assert track.lines[0].values == (0.001, 0.009)
        assert "Tesla T4: the run of report 2, counted once" in "\n".join(history.lines(found, 200))
    # One that found the same is a run of its own.
    assert not history.history([old, new, report(4, check(0.009))]).is_worse


def test_a_new_driver_is_said_where_it_came() -> None:
    new = replace(T4, driver="590", tensorrt=Library(module="tensorrt", version="10.2"))
    found = history.history([report(1, check(0.001)), report(2, check(0.001), environment=new)])
    assert found.moments[1].environment == ("TensorRT tensorrt 10.1 → tensorrt 10.2", "driver 580 → 590")


def test_reports_without_a_time_stand_as_given_and_one_given_twice_is_an_error() -> None:
    old = [("z.json", json_report.document([check(0.001)], T4)), report(1, check(0.009))]
    found = history.history(old)
    assert [moment.name for moment in found.moments] == ["z.json", "1.json"]
    assert found.untimed == ("z.json",)
    # Nor does one that says something else than a time; times of another zone are times.
    odd = [report(3, check(0.009)), ("odd.json", replace(report(2, check(0.001))[1], started="yesterday"))]
    assert history.history(odd).untimed == ("odd.json",)
    east = [
        report(3, check(0.009)),
        ("east.json", replace(report(3, check(0.001))[1], started="2026-11-03T04:00:00+02:00")),
    ]
    assert [moment.name for moment in history.history(east).moments] == ["east.json", "3.json"]
    with pytest.raises(ReportError, match=r"again\.json is the same report as z\.json"):
        history.history([*old, ("again.json", old[0][1])])


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, 0.5], [0.0, 0.0], [None, 2.0]])
def test_bars_of_odd_values(values: list[float | None]) -> None:
    line = history.Line("x", "", tuple(values))
    assert len(line.bars) == 2
    assert line.bars[0] in "█·▁"


def test_text_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_rather_long_name_of_a_detector_" * 3
    reports = [report(day, check(0.001 * (1 + day // 40), name=name, p50_ms=1.0)) for day in range(1, 100)]
    text = history.lines(history.history(reports), 80)
    assert [line for line in text if columns(line) > 80 and "long_name" not in line] == []
    assert text[-1] == "1 check in 99 reports: 1 became worse, 0 stayed as they were"


Running = Callable[..., tuple[int, str]]


@pytest.fixture
def running(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        status = __main__.main(["history", *arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_the_command_says_it_and_fails_where_asked(running: Running) -> None:
    for name, run in (report(1, check(0.001)), report(2, check(0.008)), report(3, check(0.0081))):
        json_report.save(name, run)
    status, text = running("2.json", "1.json", "--fail-on=regression")
    assert status == 1
    assert re.search(r"\n1  1\.json  2026-11-01 03:00  0000001 +1 pass\n2  2\.json", text)
    assert "worse in report 2, 2026-11-02 03:00, 0000002: boxes max 0.00100 → 0.00800" in text
    assert running("2.json", "1.json")[0] == 0
    assert running("1.json", "2.json", "3.json", "--fail-on=regression")[0] == 0, "it rose before the newest report"


def test_a_test_that_fails_again_is_worse_again() -> None:
    outcomes = ("passed", "failed", "passed", "failed")
    nights = [report(day, replace(check(0.001), outcome=outcome)) for day, outcome in enumerate(outcomes, 1)]
    assert turns(*nights) == [(2, "worse"), (3, "better"), (4, "worse")]
    assert history.history(nights).is_worse


def test_another_model_that_fails_is_worse() -> None:
    other = replace(check(0.02), model_sha256="b" * 64)
    found = history.history([report(1, check(0.001)), report(2, other)])
    (track,) = found.tracks
    assert found.is_worse
    assert track.turns[0].word == "not compared"
    assert track.turns[0].text.startswith("verdict pass → fail; another model: sha256 00000000…")
    both = [report(day, replace(check(0.02), model_sha256=str(day) * 64)) for day in (1, 2)]
    assert not history.history(both).is_worse


def test_a_new_check_that_fails_is_told(running: Running) -> None:
    failing = check(0.02, name="new")
    expected = replace(check(0.02, name="expected"), expected_failure="known")
    runs = report(1, check(0.001)), report(2, check(0.001), failing, expected), report(3, check(0.001), failing)
    for name, run in runs:
        json_report.save(name, run)
    status, text = running("1.json", "2.json", "--fail-on=regression", "--html=h.html")
    assert status == 1
    assert (
        "t.py::test_new int8 on Tesla T4: fail\n  boxes max  ·█  0.0200, limit 0.01\n  new, and it does not pass\n"
        in text
    )
    assert "test_expected" not in text
    assert text.endswith("3 checks in 2 reports: 0 became worse, 1 is new and not passing, 2 stayed as they were\n")
    assert "0 became worse, 1 is new and not passing</h1>" in Path("h.html").read_text(encoding="utf-8")
    assert running("2.json", "--fail-on=regression")[0] == 0, "of one report nothing is new"
    assert running("1.json", "2.json", "3.json", "--fail-on=regression")[0] == 0, "it is new in an older one"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "b.json is no JSON report"),
        ('{"schema_version": 2}', "b.json has schema_version 2; this version of pytest-trtcheck reads 1"),
        ('{"schema_version": 1, "checks": 3}', "b.json is no sound report"),
        (None, "cannot read the report b.json"),
    ],
)
def test_a_file_that_is_no_report_is_named(running: Running, content: str | None, said: str) -> None:
    json_report.save("a.json", report(1, check(0.001))[1])
    if content is not None:
        Path("b.json").write_text(content)
    status, text = running("a.json", "b.json", "--html=out.html")
    assert status == 2
    assert said in text
    assert not Path("out.html").exists()


def test_the_page_has_the_lines_the_points_and_the_reports(running: Running) -> None:
    pytest.importorskip("jinja2", reason="the HTML report needs jinja2: the extra `report`")
    for day, error in enumerate([0.001, 0.008, 0.0081], 1):
        json_report.save(f"{day}.json", report(day, check(error), check(0.001, name=HOSTILE))[1])
    assert running("1.json", "2.json", "3.json", "--html=out.html")[0] == 0
    text = Path("out.html").read_text(encoding="utf-8")
    assert "<h1>1 check of 2 became worse</h1>" in text
    assert text.count('<circle class="engine over"') == 1
    assert "<title>report 2: boxes max 0.00100 → 0.00800" in text
    assert "<summary>1 check stayed as it was</summary>" in text
    assert "<script" not in text
    assert "http:" not in text
    assert "https:" not in text


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_real_runs_say_when_how_long_and_of_which_commit(suite: Suite) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", precision="bf16", batch=1)\ndef test_conv(): ...\n')
    git(suite.path, "init")
    git(suite.path, "add", ".")
    git(suite.path, "commit", "-m", "first")
    runs = []
    for change in ("", "# another line\n"):
        with (suite.path / "test_it.py").open("a") as file:
            file.write(change)
        suite.run("--trt-backend=onnxruntime")
        runs.append(json_report.read(suite.path / "report.json"))
    head = git(suite.path, "rev-parse", "HEAD")
    assert [run.commit for run in runs] == [head, f"{head}-dirty"]
    for run in runs:
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", run.started or "")
        assert (run.duration_s or 0.0) >= sum(check.duration_s for check in run.checks) > 0
    found = history.history([("one", runs[0]), ("two", runs[1])])
    assert history.lines(found, 80)[-1] == "1 check in 2 reports: 0 became worse, 1 stayed as it was"


def test_a_commit_is_what_git_says_or_the_ci_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT", "BUILD_SOURCEVERSION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) is None
    monkeypatch.setenv("CI_COMMIT_SHA", "abc")
    assert commit(tmp_path) == "abc"
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) == "abc", "where git is not installed"
