"""The HTML report as text: what stands in it. What a browser makes of it is in test_report_browser.py."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html import unescape
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck import compare, latency
from pytest_trtcheck.errors import MissingDependencyError, ReportError
from pytest_trtcheck.metrics import METRICS
from pytest_trtcheck.record import (
    BlameRecord,
    CheckRecord,
    EngineRecord,
    Evidence,
    GpuRecord,
    JudgedRecord,
    LatencyRecord,
    MissingRecord,
    OutputRecord,
    ParityRecord,
    TensorRecord,
    Verdict,
    combine,
    typed,
)
from pytest_trtcheck.report import html, plots
from pytest_trtcheck.report.json_report import document, environment
from pytest_trtcheck.report.view import BudgetView, Judgement

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("jinja2", reason="the HTML report needs jinja2: the extra `report`")

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def blame(tensors: int) -> dict[str, Any]:
    """An error that grows along the graph and jumps at one tensor."""
    errors = [1e-4 * (1 + index / 50) * (300 if index >= 2 * tensors // 3 else 1) for index in range(tensors)]
    return {
        "step": "precision",
        "summary": "The error jumps in one layer.",
        "tensor": f"layer{2 * tensors // 3}/output",
        "keep_fp32": ["layer/Conv"],
        "tensors": [
            {"name": f"layer{i}/output", "node": f"layer{i}/Conv", "error": e, "snr_db": 60.0, "max_abs": 3.5}
            for i, e in enumerate(errors)
        ],
    }


def timed(budgets: dict[str, float], seed: int = 0) -> LatencyRecord:
    samples = np.random.default_rng(seed).gamma(9, 0.02, 4000) + 1.0
    decision = latency.decide(samples, budgets)
    details = {"samples_ms": [round(float(sample), 4) for sample in samples[::10]]}
    return latency.to_record(samples, decision, gpu="H200", details=details)


def check(
    nodeid: str = "tests/test_a.py::test_a[fp16]",
    model: str = "models/resnet50.onnx",
    *,
    error: float = 1e-3,
    outputs: int = 1,
    evidence: Evidence = "emulated",
    tensors: int = 0,
    budgets: dict[str, float] | None = None,
    message: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A record of outputs really compared: the reference plus noise, the largest of it `error` times max|r|."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((8, 500)).astype(np.float32)
    noise = rng.standard_normal(reference.shape) * np.exp(rng.standard_normal(reference.shape))
    noise *= error * np.abs(reference).max() / np.abs(noise).max()
    compared = []
    for index in range(outputs):
        measurement = compare.measure(f"output{index}", (reference + noise).astype(np.float32), reference)
        output = compare.judge(measurement, (compare.Limit(METRICS["max"], 0.01, "tol"),))
        details = dataclasses.replace(output.details, emulated={"max": error / 2})
        compared.append(dataclasses.replace(output, details=details))
    found = typed(blame(tensors), BlameRecord) if tensors else None
    parity = dataclasses.replace(compare.summarize(compared, "max"), blame=found)
    measured = timed(budgets) if budgets else None
    verdicts: list[Verdict] = [part.verdict for part in (parity, measured) if part is not None]
    record = CheckRecord(
        nodeid,
        model,
        combine(verdicts),
        model_sha256="0" * 64,
        precision="fp16",
        backend="tensorrt_rtx",
        evidence=evidence,
        cases=1,
        seed=0,
        inputs="generated",
        parity=parity,
        latency=measured,
        engine=EngineRecord("ab", False, "first build", 3.2, 51_000_000, 12_000_000, {"fp16": 40}),
        duration_s=1.5,
        message=message,
        notes=("inputs were generated",),
    )
    return {**json.loads(record.to_json()), **more}


def bare(nodeid: str, verdict: Verdict, message: str | None = None) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(CheckRecord(nodeid, "models/b.onnx", verdict, message=message).to_json())
    return loaded


def page(*records: dict[str, Any], **environment_keys: Any) -> str:
    return html.render(document([typed(each, CheckRecord) for each in records], environment(**environment_keys)))


def rows(text: str) -> list[str]:
    """The text of each row of the table of checks."""
    found = re.findall(r'<tr class="row">(.*?)</tr>', text, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in found]


# --- what is said ----------------------------------------------------------------------------------------------------


def test_what_needs_a_look_comes_first() -> None:
    text = page(check("t.py::a"), check("t.py::b", error=0.02), bare("t.py::c", "error"))

    assert [row.split()[0] for row in rows(text)] == ["error", "fail", "pass"]
    assert "<h1>2 of 3 checks need a look</h1>" in text


@pytest.mark.parametrize(
    ("records", "title"),
    [
        ([], "No checks ran"),
        ([check()], "Nothing failed in 1 check"),
        ([check(error=0.02)], "1 of 1 check needs a look"),
        ([check(error=0.02, expected_failure="known")], "Nothing failed in 1 check"),
    ],
)
def test_the_title_is_the_verdict_of_the_run(records: list[dict[str, Any]], title: str) -> None:
    assert f"<h1>{title}</h1>" in page(*records)


def test_a_row_has_the_columns_of_the_terminal() -> None:
    (row,) = rows(page(check(error=0.012)))

    assert row == "fail resnet50.onnx tests/test_a.py::test_a[fp16] fp16 emulated 0.0120 max ≤ 0.01 120 % – 1.5 s"


def test_emulated_and_unmeasured_are_said_plainly() -> None:
    unmeasured = {"verdict": "not_measured", "reason": "no GPU on this machine", "samples": 0}
    text = page(check("t.py::a", latency=unmeasured), check("t.py::b", evidence="engine"))

    assert "<b>Emulated on CPU, not run on a GPU</b>: 1 check." in text
    assert "<b>Latency not measured</b> in 1 check: no GPU on this machine" in text


def test_the_environment_is_there() -> None:
    text = page(check(), gpu=GpuRecord("NVIDIA H200", "GPU-1", "9.0"), driver="580.1")

    assert "<dt>GPU</dt><dd>NVIDIA H200 (compute capability 9.0)</dd>" in text
    assert "<dt>driver</dt><dd>580.1</dd>" in text


def test_a_diagnosis_is_shown_where_there_is_one() -> None:
    text = page(check(error=0.02, tensors=30))

    assert "<b>To blame: the precision.</b> The error jumps in one layer." in text
    assert "<code>keep_fp32=[&#34;layer/Conv&#34;]</code>" in text
    assert '<tr class="marked"><td>layer20/output</td>' in text
    assert "<figcaption>Error along the graph</figcaption>" in text


def test_every_plot_appears_only_with_its_data() -> None:
    everything = page(check(tensors=30, budgets={"p50_ms": 1.3}))
    nothing = page(bare("t.py::a", "error", "models/b.onnx is no ONNX"))

    titles = re.findall("<figcaption>(.*?)</figcaption>", everything)
    assert titles == [
        "Error against tolerance",
        "Error along the graph",
        "Error histogram of output0",
        "Latency distribution",
    ]
    assert "<svg" not in nothing
    assert "models/b.onnx is no ONNX" in nothing


def test_emulated_is_set_against_the_engine() -> None:
    records = [check(f"t.py::{name}", f"models/{name}.onnx", evidence="engine") for name in "ab"]

    assert "<h2>Emulated against engine</h2>" in page(*records)
    assert "Emulated against engine" not in page(*records[:1])
    assert "Emulated against engine" not in page(check("t.py::a"), check("t.py::b"))


def test_errors_that_are_not_finite_are_shown() -> None:
    record = check(error=0.02, tensors=30)
    output = record["parity"]["outputs"][0]
    output["max"] = output["judged"][0]["value"] = record["parity"]["worst"] = "inf"
    record["parity"]["blame"]["tensors"][25]["error"] = "nan"

    text = page(record)

    assert " inf max ≤ 0.01" in rows(text)[0]
    assert "not finite<span" in text
    assert "nan" not in re.sub("<title>.*?</title>", "", text)


def test_names_are_text_and_nothing_else() -> None:
    record = check(HOSTILE, HOSTILE, message=HOSTILE, notes=[HOSTILE], tensors=12, budgets={"p50_ms": 1.3})
    # Plots shorten what is long, so what they show is hostile in few characters.
    record["parity"]["outputs"][0]["name"] = "<i>o</i>"
    record["parity"]["blame"].update(step=HOSTILE, summary=HOSTILE, keep_fp32=[HOSTILE], tensor="<i>t</i>")
    record["parity"]["blame"]["tensors"][3].update(name="<i>t</i>", node=HOSTILE)
    record["latency"].update(gpu=HOSTILE, reason=HOSTILE, clocks={HOSTILE: HOSTILE})

    text = page(record, requested_gpu=HOSTILE)

    assert text.count("<script>") == 2
    assert "<img" not in text
    assert "<i>" not in text


def test_the_address_of_a_check_is_that_of_its_test_in_every_report() -> None:
    names = ["tests/test_a.py::test_x[fp16-b8]", "t.py::test_y[a+b]", "t.py::test_y[a-b]", f"t.py::t[{'x' * 200}]"]
    records = [CheckRecord(name, "m.onnx", "pass", precision=each) for name in names for each in ("fp16", "int8")]
    records.append(dataclasses.replace(records[0]))
    found = html.anchors(records)
    assert len(set(found)) == len(records)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,130}", each) for each in found)
    assert html.anchors(records[::-1][:-1])[::-1][:-1] == found[1:-1], "in whatever order, beside whatever else"
    assert html.anchors(records[:1]) == ["tests-test_a-test_x-fp16-b8"]


@pytest.mark.parametrize(
    ("error", "said", "mark"),
    [
        (0.001, "10.0 %", 0.07),
        (0.01, "100 %", 0.67),
        (0.01004, "100.4 %", 0.67),
        (0.2, "20.0 ×", 1.0),
        (1e-9, "1.00e-5 %", 0.02),
    ],
)
def test_the_share_of_the_tolerance_has_digits_enough_and_its_place_on_the_bar(
    error: float, said: str, mark: float
) -> None:
    pattern = r'<td data-sort="[^"]*">([^<]*)<span class="used[^"]*" style="--used:([^"]*)"'
    ((text, place),) = re.findall(pattern, exact(error))
    assert text == said
    assert float(place) == pytest.approx(mark, abs=0.005)


def exact(error: float) -> str:
    verdict: Verdict = "pass" if error <= 0.01 else "fail"
    output = OutputRecord("y", judged=(JudgedRecord("max", error, 0.01, "tol", verdict),))
    return html.render(
        document([CheckRecord("t.py::a", "m", verdict, parity=ParityRecord(verdict, outputs=(output,)))], environment())
    )


def test_a_closed_row_says_what_is_to_blame_or_what_happened() -> None:
    text = page(
        check("t.py::a", error=0.02, tensors=30),
        bare("t.py::b", "error", "models/b.onnx is no ONNX\n  → export it"),
        bare("t.py::c", "inconclusive", "p50 between 1 and 3 ms"),
        check("t.py::d", error=0.02, message="resnet50.onnx differs from its reference"),
        check("t.py::e", message="nothing"),
    )
    said = dict(re.findall(r'id="t-(.)".*?(?:<div class="reason">([^<]*)</div></th>|</th>)', text, re.DOTALL))
    assert said == {
        "a": "To blame: the precision, The error jumps in one layer; passes with 1 node in FP32",
        "b": "models/b.onnx is no ONNX",
        "c": "p50 between 1 and 3 ms",
        # That it differs is what the error beside its tolerance says.
        "d": "",
        "e": "",
    }


def test_what_is_to_paste_is_whole_and_right() -> None:
    kept = check("t.py::test_a[x y]", error=0.02, tensors=30, replay="pytest 'a b/bundle.json'")
    kept["parity"]["blame"]["keep_fp32"] = ['/a"b', "c\\d"]
    assert [unescape(each) for each in re.findall("<code>(.*?)</code>", page(kept))] == [
        'keep_fp32=["/a\\"b", "c\\\\d"]',
        "pytest 'a b/bundle.json'",
        "pytest 't.py::test_a[x y]'",
    ]
    assert "<code>" not in page(check("t.py::test_a")), "nothing to paste where nothing is wrong"
    assert "Run it again" not in page(bare("models/b.onnx::int8", "error", "no"))


def test_a_message_hangs_by_its_labels_and_is_whole() -> None:
    message = "short\n  where        at a node\n               that is far\n  → do it\n\n    keep_fp32=[]"
    (found,) = re.findall(r"<pre[^>]*>(.*?)</pre>", page(bare("t.py::a", "error", message)), re.DOTALL)
    assert [int(hang) for hang in re.findall(r"--hang:(\d+)", found)] == [2, 15, 17, 4, 2, 6]
    assert re.sub("<[^>]*>", "", found) == message + "\n"


def test_three_hundred_failures_take_less_than_a_megabyte() -> None:
    failing = check("t.py::a", error=0.02, outputs=3, tensors=60, budgets={"p50_ms": 1.3}, message="far off\n" * 99)
    assert len(page(*({**failing, "nodeid": f"t.py::a[{index}]"} for index in range(300))).encode()) < 1_000_000


def test_what_left_no_record_is_in_the_title() -> None:
    run = document([typed(check(), CheckRecord)], environment(), [MissingRecord("t.py::b", "its process died")])
    assert "<h1>Nothing failed in 1 check; 1 test left no record</h1>" in html.render(run)


# --- one file --------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = page(check(tensors=30, budgets={"p50_ms": 1.3}))

    assert "http:" not in text
    assert "https:" not in text
    assert re.findall(r'(?:src|href)="(.*?)"', text) == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text


def test_a_hundred_checks_take_less_than_a_megabyte() -> None:
    message = "fp16 on the engine differs from FP32 by more than the tolerance allows in this output\n" * 40
    budgets = {"p50_ms": 1.3, "p90_ms": 1.4, "p95_ms": 1.5, "p99_ms": 1.6}
    failing = check(error=0.02, outputs=6, evidence="engine", tensors=400, budgets=budgets, message=message)
    test = "tests/models/test_detectors.py::TestDetectors::test_parity_of_a_detector[fp16-batch{}]"
    model = "models/detectors/some_rather_long_name_of_a_detector_{}.onnx"
    records = [{**failing, "nodeid": test.format(index), "model": model.format(index)} for index in range(100)]
    assert len(page(*records).encode()) < 1_000_000


def test_a_file_is_written_with_its_date(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"

    html.save(path, document([typed(check(), CheckRecord)], environment()))

    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert re.search(r"pytest-trtcheck.* · 20\d\d-\d\d-\d\d \d\d:\d\d UTC</footer>", text)


def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is a directory"):
        html.save(tmp_path, document([], environment()))


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)

    with pytest.raises(MissingDependencyError, match="jinja2") as caught:
        page(check())
    assert "pytest-trtcheck[report]" in caught.value.hint


# --- plots -----------------------------------------------------------------------------------------------------------


def coordinates(svg: str, kind: str) -> list[tuple[float, float]]:
    """The points of a curve."""
    found = re.search(rf'<path class="{kind}" d="M([^"]*)"', svg)
    assert found is not None
    numbers = [float(number) for number in found[1].split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def dots(svg: str, kind: str) -> list[float]:
    """The x of each dot."""
    return [float(x) for x in re.findall(rf'<circle class="{kind}" cx="([0-9.]+)"', svg)]


def test_the_curve_keeps_its_peak_when_points_are_left_out() -> None:
    errors = [1e-4] * 1000
    errors[777] = 1e-1
    svg = plots.along_graph([TensorRecord(f"t{i}", error=error) for i, error in enumerate(errors)], "t777", points=80)

    points = coordinates(svg, "curve")
    assert len(points) <= 80
    x, y = min(points, key=lambda point: point[1])
    assert x == pytest.approx(46 + 324 * 777 / 999, abs=1)
    assert y == pytest.approx(22, abs=0.1)
    assert ">t777</text>" in svg


def test_a_failing_output_lies_beyond_its_limit() -> None:
    over = Judgement("max", 0.02, 0.01, "fail", "a")
    within = Judgement("max", 0.005, 0.01, "pass", "b")

    svg = plots.outputs([(over, 0.001, True), (within, None, True)])

    limit = float(re.findall(r'class="limit" d="M([0-9.]+) ', svg)[0])
    assert dots(svg, "engine over")[0] > limit > dots(svg, "engine")[0]
    assert dots(svg, "emulated")[0] < limit


def test_no_sample_is_lost_from_the_latency_plot() -> None:
    samples = [1.0] * 900 + [2.0] * 99 + [1000.0]
    budget = BudgetView("p50", 1.0, 1.5, "pass", "ms", 0.9, 1.1)

    svg = plots.latency(samples, [budget])

    found = re.search(r'class="bars" stroke-width="[0-9.]+" d="([^"]*)"', svg)
    assert found is not None
    bars = [(float(x), 156 - float(top)) for x, top in re.findall(r"M([0-9.]+) 156V([0-9.]+)", found[1])]
    # The straggler is counted at the edge, where it does not flatten the rest, and is still seen.
    assert [height for _, height in bars] == pytest.approx([108, 108 * 99 / 900, 2], abs=0.5)
    limit = float(re.findall(r'class="limit" d="M([0-9.]+) ', svg)[0])
    assert bars[0][0] < limit < bars[1][0]


@pytest.mark.parametrize("samples", [[1.0], [0.0, 0.0], [1.5] * 50, [0.001, 1e6]])
def test_a_latency_plot_of_odd_samples(samples: list[float]) -> None:
    assert "NaN" not in plots.latency(samples, [])


@pytest.mark.parametrize("limit", [None, 1e-9, 1e9])
def test_a_histogram_shows_a_limit_that_is_far_away(limit: float | None) -> None:
    svg = plots.histogram([(-20, 5), (-3, 1_000_000)], 7, limit)

    assert "1 M differ, 7 equal" in svg
    marks = [float(x) for x in re.findall(r'class="limit" d="M([0-9.]+) ', svg)]
    assert len(marks) == (limit is not None)
    assert all(46 <= mark <= 370 for mark in marks)
