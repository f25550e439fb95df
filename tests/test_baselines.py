"""Latency baselines: what fails, what cannot be compared, what is recorded, and how often chance decides."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_trtcheck import baselines, gpu, latency
from pytest_trtcheck.baselines import MIN_SLOWDOWN, CheckKey, Entry, LatencyBaseline, Place
from pytest_trtcheck.baselines.digits import rounded
from pytest_trtcheck.baselines.files import path_of
from pytest_trtcheck.check.latency import conditions_of
from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.gpu.device import Gpu
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.record import (
    BudgetRecord,
    CheckRecord,
    Conditions,
    LatencyRecord,
    ParityRecord,
    jsonable,
    typed,
)
from tests import latency_streams

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

H200 = Gpu(name="NVIDIA H200", model=gpu.find_gpu("H200"), compute_capability=(9, 0), driver="580.1")
PLACE = Place("NVIDIA H200", "9.0")
CONDITIONS = conditions_of(H200, ("tensorrt_rtx", "1.5.0.114"), {"image": (1, 3, 16, 16)})
CLOCKED = replace(CONDITIONS, sm_mhz=1590, power_limit_w=70.0, power_mode="MODE_15W")
DAY = datetime.date(2025, 11, 21)
NODEID = "tests/test_a.py::test_a[fp16]"


def samples(p50_ms: float = 1.0, seed: int = 0, count: int = 2000) -> NDArray[np.float64]:
    return p50_ms * (1 + 0.01 * np.random.default_rng(seed).normal(size=count))


def measured(p50_ms: float = 1.0, seed: int = 0, count: int = 2000, **details: Any) -> LatencyRecord:
    """As `measure` makes it, without a budget."""
    taken = samples(p50_ms, seed, count)
    told = {
        "measured": "GPU time",
        "cuda_graph": True,
        "conditions": CLOCKED,
        "disturbances": (),
        "distribution": Distribution.of(taken).to_json(),
        **details,
    }
    return latency.to_record(taken, latency.combine_decisions([]), gpu="H200", details=told)


def budgeted(limit_ms: float, p50_ms: float = 1.0, seed: int = 0, **details: Any) -> LatencyRecord:
    plain = measured(p50_ms, seed, **details)
    decision = latency.decide(samples(p50_ms, seed), {"p50_ms": limit_ms})
    return replace(latency.to_record(samples(p50_ms, seed), decision, gpu="H200"), details=plain.details)


def check(record: LatencyRecord, nodeid: str = NODEID, **changes: Any) -> CheckRecord:
    found = CheckRecord(
        nodeid,
        "models/a.onnx",
        record.verdict,
        model_sha256="a" * 64,
        precision="fp16",
        backend="tensorrt_rtx",
        evidence="engine",
        latency=record,
    )
    return CheckRecord.from_json(replace(found, **changes).to_json())


def recorded(
    folder: Path, precision: str = "fp16", nodeid: str = NODEID, place: Place = PLACE
) -> LatencyBaseline | None:
    """The latency that a file holds."""
    key = CheckKey(place, NODEID, precision, "tensorrt_rtx", "engine")
    return baselines.opened(folder).find(key).latency


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "baselines"


@pytest.fixture
def baseline(folder: Path) -> LatencyBaseline:
    baselines.update(folder, [check(measured())], DAY)
    found = recorded(folder, "fp16")
    assert found is not None
    return found


def entry(record: LatencyRecord) -> BudgetRecord:
    (found,) = [each for each in record.budgets if each.name == "baseline"]
    return found


# --- judging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.5, "pass"), (1.0, "pass"), (1.01, "pass"), (1.05, "fail"), (1.1, "fail"), (3.0, "fail")]
)
def test_a_significant_slowdown_fails(baseline: LatencyBaseline, factor: float, verdict: str) -> None:
    found = baselines.judge(measured(factor, 1), baseline, model_sha256="a" * 64)
    assert found.verdict == verdict
    assert entry(found).verdict == verdict
    assert (found.reason is None) == (verdict == "pass")


def test_the_reason_names_both_distributions_and_what_was_recorded_when(baseline: LatencyBaseline) -> None:
    newer = replace(CONDITIONS, tensorrt="tensorrt_rtx 1.7.1.116")
    reason = baselines.judge(measured(1.2, 1, 3000, conditions=newer), baseline).reason
    assert reason is not None
    assert reason.startswith("p50 is +20.")
    assert "(allowed: +3%)" in reason
    assert "now p50 1.2" in reason
    assert "(3,000 samples)" in reason
    assert "baseline p50 1, p90 1.01" in reason or "baseline p50 0.99" in reason
    assert "(2,000 samples), recorded 2025-11-21 with tensorrt_rtx 1.5.0.114 (now tensorrt_rtx 1.7.1.116)" in reason
    for word in ("p90", "p99"):
        assert reason.count(word) == 2


def test_a_slowdown_within_the_budget_fails_and_keeps_the_budget(baseline: LatencyBaseline) -> None:
    found = baselines.judge(budgeted(5.0, 1.2, 1), baseline)
    assert found.verdict == "fail"
    assert [each.verdict for each in found.budgets] == ["pass", "fail"]


def test_a_budget_that_failed_still_fails_and_both_are_said(baseline: LatencyBaseline) -> None:
    over = baselines.judge(budgeted(0.9), baseline)
    assert over.verdict == "fail"
    assert over.reason is not None
    assert "p50_ms is" in over.reason
    assert entry(over).verdict == "pass"
    both = baselines.judge(budgeted(0.9, 1.5, 1), baseline)
    assert both.reason is not None
    assert "p50_ms is" in both.reason
    assert "against the baseline" in both.reason


def test_a_disturbed_gpu_makes_a_slowdown_inconclusive_and_leaves_a_pass(baseline: LatencyBaseline) -> None:
    busy = ["another process used the GPU: pid 1 kept up to 90 % of it busy"]
    found = baselines.judge(measured(2.0, 1, disturbances=busy), baseline)
    assert found.verdict == "inconclusive"
    assert found.reason is not None
    assert "disturbed: another process" in found.reason
    assert baselines.judge(measured(1.0, 1, disturbances=busy), baseline).verdict == "pass"


@pytest.mark.parametrize(
    ("changes", "sha256", "said"),
    [
        (
            {"measured": "latency with transfers"},
            "a" * 64,
            "it is of GPU time, and latency with transfers was measured",
        ),
        ({"cuda_graph": False}, "a" * 64, "recorded as a CUDA graph, and the engine was launched without a CUDA graph"),
        ({}, "b" * 64, "another model (sha256 aaaaaaaa…)"),
        (
            {"conditions": replace(CONDITIONS, input_shapes={"image": (8, 3, 16, 16)})},
            "a" * 64,
            "other shapes (image [1, 3, 16, 16]; now image [8, 3, 16, 16])",
        ),
        ({"conditions": replace(CLOCKED, sm_mhz=585)}, "a" * 64, "its SM clock was 1590 MHz, and is 585 MHz now"),
        ({"conditions": replace(CLOCKED, power_limit_w=60.0)}, "a" * 64, "its power limit was 70 W, and is 60 W now"),
        ({"conditions": replace(CLOCKED, power_mode="MAXN")}, "a" * 64, "mode was MODE_15W, and is MAXN now"),
    ],
)
def test_what_is_not_comparable_is_said_and_not_judged(
    baseline: LatencyBaseline, changes: dict[str, Any], sha256: str, said: str
) -> None:
    alone = baselines.judge(measured(9.0, 1, **changes), baseline, model_sha256=sha256)
    assert alone.verdict == "not_measured"
    assert alone.reason is not None
    assert said in alone.reason
    with_budget = baselines.judge(budgeted(10.0, 9.0, 1, **changes), baseline, model_sha256=sha256)
    assert with_budget.verdict == "pass"
    assert said in baselines.notes(with_budget)[0]


@pytest.mark.parametrize(
    "now",
    [
        CLOCKED,
        replace(CLOCKED, sm_mhz=1500, power_limit_w=70.4),
        CONDITIONS,
    ],
    ids=["the same", "boost", "unknown"],
)
def test_clocks_that_are_alike_or_unknown_are_comparable(baseline: LatencyBaseline, now: dict[str, Any]) -> None:
    assert baselines.judge(measured(1.0, 1, conditions=now), baseline).verdict == "pass"


def test_clocks_stand_in_the_file_and_a_file_without_them_is_read(folder: Path, baseline: LatencyBaseline) -> None:
    assert (baseline.sm_mhz, baseline.power_limit_w, baseline.power_mode) == (1590, 70.0, "MODE_15W")
    (path,) = folder.rglob("*.json")
    document = json.loads(path.read_text())
    data = document["tests"][NODEID]["fp16, tensorrt_rtx, engine"]["latency"]
    for name in ("sm_mhz", "power_limit_w", "power_mode"):
        del data[name]
    path.write_text(json.dumps(document))
    older = recorded(folder, "fp16")
    assert older is not None
    assert older.sm_mhz is None
    assert baselines.judge(measured(1.0, 1), older).verdict == "pass"


def test_no_baseline_is_recorded_while_clocks_settle(baseline: LatencyBaseline) -> None:
    random = np.random.default_rng(0)
    cold = latency_streams.settling_clocks(random, 1.0, shape="exponential", settle_s=5, start=0.95, end=1.0)
    assert not baselines.enough(cold[:2_000], 0.99, None)
    assert not baselines.enough(cold[:2_000], 0.99, baseline)
    assert baselines.enough(cold[10_000:30_000], 0.99, None)
    assert baselines.enough(cold[10_000:30_000], 0.99, baseline)


def test_without_a_baseline_nothing_passes(baseline: LatencyBaseline) -> None:
    alone = baselines.judge(measured(), None)
    assert (alone.verdict, baselines.notes(alone)) == ("not_measured", ())
    assert alone.reason == "no baseline of this test on NVIDIA H200: record one, --trt-update-baseline"
    with_budget = baselines.judge(budgeted(5.0), None)
    assert with_budget.verdict == "pass"
    assert baselines.notes(with_budget) == (alone.reason,)


def test_too_few_samples_are_inconclusive(baseline: LatencyBaseline) -> None:
    found = baselines.judge(measured(1.0, 1, count=5), baseline)
    assert found.verdict == "inconclusive"


def test_what_was_not_measured_stays_so(baseline: LatencyBaseline) -> None:
    nothing = LatencyRecord("not_measured", "no GPU in this machine")
    assert baselines.judge(nothing, baseline) is nothing


def test_a_slowdown_is_accepted_and_said_when_baselines_are_recorded(baseline: LatencyBaseline) -> None:
    found = baselines.judge(measured(1.5, 1), baseline, updating=True)
    assert found.verdict == "pass"
    assert (entry(found).text or "").endswith("accepted as the new baseline")


def test_the_entry_fits_the_report_and_its_views(baseline: LatencyBaseline) -> None:
    from pytest_trtcheck.report import terminal
    from pytest_trtcheck.report.json_report import document, environment
    from tests.test_report_json import validate

    records = [check(baselines.judge(measured(factor, 1), each)) for factor, each in ((1.2, baseline), (1.0, None))]
    validate(jsonable(document(records, environment())))
    text = "\n".join(line.text for line in terminal.summary_lines(records))
    assert "baseline 1.20" in text
    assert "no baseline of this test" in text


# --- how often chance decides ----------------------------------------------------------------------------------------


def run_of(rng: np.random.Generator, median_ms: float, count: int, *, between: float, drift: float) -> Any:
    """One run: correlated noise of 1 %, a drift, a tail, and what differs from run to run."""
    steps, correlated = rng.normal(size=count) * 0.01 * np.sqrt(1 - 0.9**2), np.empty(count)
    level = rng.normal() * 0.01
    for i, step in enumerate(steps):
        level = 0.9 * level + step
        correlated[i] = level
    noise = correlated + rng.uniform(-drift, drift) * np.linspace(0, 1, count)
    noise += (rng.random(count) < 0.01) * rng.uniform(0.1, 1, count)
    return median_ms * (1 + noise) * (1 + between * rng.normal())


def taken(
    rng: np.random.Generator, median_ms: float, held_against: LatencyBaseline | None, **noise: float
) -> LatencyRecord:
    """Samples as `measure` takes them: in growing numbers, until they are enough."""
    plan = latency.LookPlan((), 1)
    everything = run_of(rng, median_ms, 6000, **noise)
    for look in range(1, 10):
        count = min(len(everything), max(500, plan.samples_at(look)))
        now, confidence = everything[:count], plan.confidence_at(look)
        if count == len(everything) or baselines.enough(now, confidence, held_against):
            break
    return replace(measured(distribution=Distribution.of(now, confidence).to_json()), samples=count)


def verdicts(folder: Path, slowdown: float, runs: int, **noise: float) -> Counter[str]:
    rng = np.random.default_rng(7)
    found: Counter[str] = Counter()
    for _ in range(runs):
        baselines.update(folder, [check(taken(rng, 1.0, None, **noise))], DAY)
        before = recorded(folder, "fp16")
        assert before is not None
        found[baselines.judge(taken(rng, 1 + slowdown, before, **noise), before).verdict] += 1
    return found


def test_the_same_engine_hardly_ever_fails(folder: Path) -> None:
    found = verdicts(folder, 0.0, 100, between=0.005, drift=0.005)
    assert found["fail"] == 0
    assert found["pass"] >= 98


def test_a_slowdown_of_five_percent_hardly_ever_passes(folder: Path) -> None:
    found = verdicts(folder, 0.05, 60, between=0.005, drift=0.005)
    assert found["fail"] >= 52
    assert found["pass"] <= 2


def test_a_slowdown_of_five_percent_on_a_quiet_gpu_always_fails(folder: Path) -> None:
    assert verdicts(folder, 0.05, 30, between=0.001, drift=0.0) == {"fail": 30}


# --- recording -------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_read_again(baseline: LatencyBaseline) -> None:
    assert baseline.model == "a.onnx"
    assert baseline.input_shapes == {"image": (1, 3, 16, 16)}
    assert (baseline.recorded, baseline.tensorrt, baseline.driver) == ("2025-11-21", "tensorrt_rtx 1.5.0.114", "580.1")
    exact = Distribution.of(samples())
    assert baseline.distribution.quantile_ms("p50_ms") == pytest.approx(exact.quantile_ms("p50_ms"), rel=1e-3)
    for name, (low, high) in baseline.distribution.bounds_ms.items():
        assert low <= exact.bounds_ms[name][0] <= exact.bounds_ms[name][1] <= high, "rounded outwards"
    assert baseline.distribution.confidence <= exact.confidence


def test_files_are_made_to_be_reviewed(folder: Path) -> None:
    records = [check(measured(seed=i), f"tests/test_{i % 2}.py::test_{i}") for i in range(4)]
    done = baselines.update(folder, records[::-1], DAY)
    assert [path.relative_to(folder).as_posix() for path in done.files] == [
        "H200-sm90/tests/test_0.py.json",
        "H200-sm90/tests/test_1.py.json",
    ]
    assert done.recorded == 4
    text = done.files[0].read_text()
    assert text.endswith("}\n")
    assert max(map(len, text.splitlines())) <= 200
    assert text.index("test_0.py::test_0") < text.index("test_0.py::test_2")
    baselines.update(folder, records, DAY)
    assert done.files[0].read_text() == text, "the order of the run does not matter"
    for number in _numbers(json.loads(text)["tests"]):
        assert float(f"{number:.4g}") == number


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


def test_only_tests_of_this_run_are_replaced(folder: Path) -> None:
    baselines.update(folder, [check(measured(), f"t.py::test_{name}") for name in "ab"], DAY)
    before = (folder / "H200-sm90/t.py.json").read_text().splitlines()
    baselines.update(folder, [check(measured(2.0, 1), "t.py::test_b")], datetime.date(2026, 1, 1))
    after = (folder / "H200-sm90/t.py.json").read_text().splitlines()
    start = next(i for i, line in enumerate(before) if "test_b" in line)
    assert after[:start] == before[:start]
    assert len(after) == len(before)
    assert after != before


def test_gpus_do_not_overwrite_each_other(folder: Path) -> None:
    other = replace(CONDITIONS, gpu="NVIDIA A100-SXM4-80GB", compute_capability="8.0")
    baselines.update(folder, [check(measured())], DAY)
    baselines.update(folder, [check(measured(3.0, conditions=other))], DAY)
    assert sorted(path.name for path in folder.iterdir()) == ["A100-SXM4-80GB-sm80", "H200-sm90"]
    there = recorded(folder, place=Place("NVIDIA A100-SXM4-80GB", "8.0"))
    assert there is not None
    assert there.distribution.quantile_ms("p50_ms") == pytest.approx(3.0, rel=0.01)
    assert recorded(folder, place=Place("NVIDIA L4", "8.9")) is None


def test_a_precision_that_the_test_lost_goes(folder: Path) -> None:
    baselines.update(folder, [check(measured())], DAY)
    baselines.update(folder, [check(measured(), precision="int8")], DAY)
    assert recorded(folder, "fp16") is None
    assert recorded(folder, "int8") is not None


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (check(measured(), parity=ParityRecord("fail", "max", 0.01, 0.5), verdict="fail"), "parity: fail"),
        (check(budgeted(0.5)), "not within its budget: p50_ms"),
        (check(measured(disturbances=["the hardware slowed its clocks down"])), "disturbed: the hardware"),
        (check(measured(count=6)), "the median is not known"),
        (check(LatencyRecord("not_measured", "no H200 in this machine")), "no H200 in this machine"),
        (check(measured(), verdict="error"), "an error"),
    ],
)
def test_what_cannot_be_trusted_is_left_out_and_the_old_baseline_stays(
    folder: Path, record: CheckRecord, said: str
) -> None:
    baselines.update(folder, [check(measured())], DAY)
    before = (folder / "H200-sm90/tests/test_a.py.json").read_text()
    done = baselines.update(folder, [record], datetime.date(2026, 1, 1))
    assert (done.files, done.recorded) == ((), 0)
    assert done.left_out[0][0] == NODEID
    assert said in done.left_out[0][1]
    assert (folder / "H200-sm90/tests/test_a.py.json").read_text() == before


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_check_that_failed_by_its_baseline_alone_is_recorded(
    folder: Path, baseline: LatencyBaseline, verdict: str
) -> None:
    disturbed = ["busy"] if verdict == "inconclusive" else []
    slower = baselines.judge(measured(2.0, 1, disturbances=disturbed), baseline)
    assert slower.verdict == verdict
    slower = replace(slower, details=replace(slower.details, disturbances=()))
    assert baselines.update(folder, [check(slower)], DAY).recorded == 1


def test_checks_without_latency_are_nobodys_business(folder: Path) -> None:
    bare = CheckRecord("t.py::a", "a.onnx", "pass", precision="fp16")
    assert baselines.update(folder, [bare], DAY) == baselines.Updated((), 0, ())
    assert not folder.exists()


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_rounding_keeps_order_and_is_done_once(value: float, seed: int) -> None:
    assert rounded(rounded(value)) == rounded(value)
    assert rounded(value) == pytest.approx(value, rel=5.1e-4)
    whole = Distribution.of(samples(value, seed, 300))
    first = LatencyBaseline(
        model="a.onnx",
        model_sha256="a" * 64,
        input_shapes={"x": (1, 2)},
        measured="GPU time",
        cuda_graph=False,
        recorded="2025-11-21",
        tensorrt="tensorrt 10.1",
        driver=None,
        distribution=whole,
    ).to_json()
    again = LatencyBaseline.from_json(json.loads(json.dumps(first, sort_keys=True)))
    assert again.to_json() == first


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_no_node_id_leaves_the_directory(name: str) -> None:
    path = path_of(f"../{name}/../../test_a.py::test")
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert path_of(name).name.endswith(".json")


# --- files that are wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[:200], "no file of baselines"),
        (lambda text: "<<<<<<< ours\n" + text, "no file of baselines"),
        (lambda text: f"[{text}]", "no file of baselines"),
        (lambda text: text.replace('"format": 2', '"format": 1'), "format 1"),
        (lambda text: text.replace('"tensorrt"', '"tensort"'), "'tensorrt' is missing"),
        (lambda text: text.replace('"cuda_graph": true', '"cuda_graph": 1'), "cuda_graph"),
        (lambda text: text.replace('"samples": 2000', '"samples": "many"'), NODEID),
        (lambda text: text.replace('"0.5": ', '"0.5": 1'), "quantiles must ascend"),
    ],
)
def test_a_damaged_file_is_one_clear_error_that_names_it(
    folder: Path, baseline: LatencyBaseline, spoil: Any, said: str
) -> None:
    path = folder / "H200-sm90/tests/test_a.py.json"
    spoilt = spoil(path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt)
    with pytest.raises(ReportError) as raised:
        recorded(folder)
    assert "test_a.py.json" in str(raised.value)
    assert said in str(raised.value)
    with pytest.raises(ReportError):
        baselines.update(folder, [check(measured())], DAY)
    assert path.read_text() == spoilt, "what cannot be read is not overwritten"


def test_the_baselines_of_another_gpu_are_none(folder: Path, baseline: LatencyBaseline) -> None:
    other = folder / "L4-sm89/tests/test_a.py.json"
    other.parent.mkdir(parents=True)
    other.write_text((folder / "H200-sm90/tests/test_a.py.json").read_text())
    with pytest.raises(ReportError, match=r"holds the baselines of NVIDIA H200 .* not of NVIDIA L4"):
        recorded(folder, place=Place("NVIDIA L4", "8.9"))


def test_a_directory_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ReportError, match="no such directory"):
        baselines.opened(folder)
    assert baselines.opened(folder, must_exist=False).find(CheckKey(PLACE, NODEID, "fp16", "a", "engine")) == Entry()
    folder.write_text("a file")
    with pytest.raises(ReportError, match="no such directory"):
        baselines.opened(folder, must_exist=False)
    with pytest.raises(ReportError, match="cannot write the baselines"):
        baselines.update(folder, [check(measured())], DAY)


def test_a_name_that_says_less_than_the_product_is_completed() -> None:
    nano = replace(H200, name="Orin", model=gpu.find_gpu("Orin Nano"), compute_capability=(8, 7))
    told = conditions_of(nano, ("tensorrt", "10.3"), {})
    assert Place.of(told.gpu_record, "engine").folder == "Orin-Orin-Nano-sm87"
    assert Place.of(None, "emulated").folder == "emulated"
    assert typed(jsonable(told), Conditions) == told
    assert asdict(PLACE) == {"name": "NVIDIA H200", "compute_capability": "9.0"}
    assert MIN_SLOWDOWN == 0.03
