"""The upgrade gate: what became worse between two reports fails, what was not compared is no pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_trtcheck import __main__
from pytest_trtcheck.errors import ArgumentError, ReportError
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.record import (
    BudgetRecord,
    BuildRecord,
    CalibrationRecord,
    CheckRecord,
    EngineRecord,
    GpuRecord,
    LatencyRecord,
    LayerRecord,
    Library,
    MissingRecord,
    NodeRecord,
    OutputRecord,
    PartitionRecord,
    RebuildRecord,
    RunRecord,
    ScoreRecord,
    SearchRecord,
    jsonable,
    typed,
)
from pytest_trtcheck.report import diff_changes
from pytest_trtcheck.report.json_report import read, save
from pytest_trtcheck.report.merge import merge
from pytest_trtcheck.report.text import columns
from pytest_trtcheck.report.upgrade import layers, text
from pytest_trtcheck.report.upgrade.gate import Gate, judge
from pytest_trtcheck.report.upgrade.questions import ALLOWABLE, Limits
from tests.test_report_diff import LEAVES, _walk, check, latency, output, parity, report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RECORDED = Path(__file__).parent / "data" / "reports"


def layer(name: str, precision: str, *nodes: str, ms: float | None = None, width: float = 0.02) -> LayerRecord:
    bounds = None if ms is None else (ms * (1 - width), ms * (1 + width))
    return LayerRecord(name, "Conv", precision, nodes, time_ms=ms, bounds_ms=bounds)


OLD_LAYERS = (
    layer("conv1 + relu1", "int8", "conv1", "relu1", ms=0.4),
    layer("conv2", "int8", "conv2", ms=0.5),
    layer("softmax", "fp32", "softmax", ms=0.1),
)
NEW_LAYERS = (
    layer("__myl_1", "int8", "conv1", ms=0.3),
    layer("__myl_2", "int8", "relu1", ms=0.1),
    layer("__myl_3", "int8", "conv2", ms=0.5),
    layer("__myl_4", "fp32", "softmax", ms=0.1),
)


def engine(layers: Sequence[LayerRecord], **more: Any) -> EngineRecord:
    kinds = [each.precision for each in layers]
    counts = {kind: kinds.count(kind) for kind in kinds if kind}
    return EngineRecord("k", True, None, 1.0, 50 << 20, 20 << 20, counts, tuple(layers), **more)


def before(**changes: Any) -> CheckRecord:
    return check(**{"engine": engine(OLD_LAYERS), **changes})


def after(**changes: Any) -> CheckRecord:
    return check(**{"engine": engine(NEW_LAYERS), **changes})


def upgrade(old: CheckRecord | Sequence[CheckRecord], new: CheckRecord | Sequence[CheckRecord], **limits: Any) -> Gate:
    olds, news = ([each] if isinstance(each, CheckRecord) else each for each in (old, new))
    limits["allowed"] = frozenset(limits.get("allowed", ()))
    return judge(report(*olds), report(*news, tensorrt="1.7.1.116"), Limits(**limits))


def told(gate: Gate) -> dict[str, list[tuple[str, str]]]:
    (one,) = gate.checks
    found: dict[str, list[tuple[str, str]]] = {}
    for each in one.findings:
        found.setdefault(each.question, []).append((each.outcome, each.text))
    return found


# --- what is worse ---------------------------------------------------------------------------------------------------


def test_an_upgrade_that_changes_nothing_passes_with_every_question_asked() -> None:
    gate = upgrade(before(), after())
    assert gate.verdict == "pass"
    assert {question: {outcome for outcome, _ in found} for question, found in told(gate).items()} == {
        name: {"pass"} for name in ("verdict", "error", "latency", "precision", "layers")
    }
    assert gate.checks[0].information == ("3 → 4 layers, 1 group of them fused otherwise",)


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (0.004, 0.008, "fail"),  # doubled
        (0.004, 0.0058, "pass"),  # within ×1.5
        (1e-5, 4e-5, "pass"),  # within 5 % of the limit
        (0.004, float("nan"), "fail"),
        (0.004, float("inf"), "fail"),
        (0.004, None, "fail"),
        (0.008, 0.001, "pass"),
    ],
)
def test_an_error_that_rose(old: float, new: float | None, verdict: str) -> None:
    bad = new is None or not np.isfinite(new)
    word: Any = "fail" if bad else "pass"
    found = parity(output(value=new, verdict=word), verdict=word)
    gate = upgrade(before(parity=parity(output(value=old))), after(parity=found, verdict=word, message="NaN"))
    assert gate.verdict == verdict
    assert {outcome for outcome, _ in told(gate)["error"]} == {verdict}
    if verdict == "fail":
        ((_, text),) = told(gate)["error"]
        assert text.startswith("boxes max 0.00400 → ")
        assert "allowed 0.00600" in text


def test_the_error_s_limits_are_options() -> None:
    pair = before(parity=parity(output(value=0.004))), after(parity=parity(output(value=0.005)))
    assert upgrade(*pair).verdict == "pass"
    assert upgrade(*pair, error_ratio=1.1).verdict == "fail"
    assert upgrade(*pair, error_ratio=1.1, error_share=0.5).verdict == "pass"


def test_several_builds_tell_how_far_an_error_may_rise() -> None:
    def rebuilt(*errors: float) -> RebuildRecord:
        builds = [
            BuildRecord(str(n), 1, 1.0, "pass", error, errors={"boxes": {"max": error}})
            for n, error in enumerate(errors)
        ]
        return RebuildRecord(tuple(builds), engines=len(builds))

    calm = before(parity=parity(output(value=0.0041)), rebuild=rebuilt(0.004, 0.00405, 0.0041))
    wild = before(parity=parity(output(value=0.0041)), rebuild=rebuilt(0.001, 0.002, 0.0041))
    new = after(parity=parity(output(value=0.0056)))
    assert upgrade(calm, new).verdict == "fail"
    assert upgrade(wild, new).verdict == "pass"


@pytest.mark.parametrize(("noise", "verdict"), [(0.001, "fail"), (0.6, "inconclusive")], ids=["tight", "wide"])
def test_a_median_that_is_ten_percent_slower(noise: float, verdict: str) -> None:
    gate = noisy(noise, 1.1)
    assert gate.verdict == verdict
    assert verdict in {outcome for outcome, _ in told(gate)["latency"]}


def test_a_median_that_looks_fine_passes_only_where_it_surely_is_not_much_slower() -> None:
    assert noisy(0.001, 1.03).verdict == "pass"
    assert noisy(0.6, 1.0).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("was", "now", "verdict"),
    [((15, 15.2), (15.1, 18.4), "pass"), ((15, 15.2), (30, 30.2), "fail"), ((15, 15.2), (15.1, 30.2), "fail")],
)
def test_the_tail_of_an_engine_of_microseconds(
    was: tuple[float, float], now: tuple[float, float], verdict: str
) -> None:
    def taken(p50_us: float, p99_us: float) -> LatencyRecord:
        samples = np.random.default_rng(0).permutation(np.repeat([p50_us, p99_us], [9_700, 300])) / 1000
        record = latency(p50_us / 1000)
        return replace(record, details=replace(record.details, distribution=Distribution.of(samples).to_json()))

    old, new = before(latency=taken(*was), engine=None), after(latency=taken(*now), engine=None)
    assert upgrade(old, new).verdict == verdict
    told = {change.what: change.direction for change in diff_changes.changes(old, new)}
    assert (told.get("p50") == "worse") == (now[0] > was[0] + 1), "diff tells of tails with a budget alone"


def noisy(noise: float, slower: float) -> Gate:
    def taken(p50_ms: float, seed: int) -> Any:
        samples = p50_ms * np.exp(noise * np.random.default_rng(seed).normal(size=300))
        found = Distribution.of(samples)
        return replace(latency(p50_ms), p50_ms=found.quantile_ms("p50_ms")), found

    pair = []
    for p50_ms, seed in ((1.0, 1), (slower, 1)):
        record, found = taken(p50_ms, seed)
        pair.append(replace(record, details=replace(record.details, distribution=found.to_json())))
    return upgrade(before(latency=pair[0]), after(latency=pair[1]))


def test_what_disturbed_a_measurement_makes_it_inconclusive_on_either_side() -> None:
    disturbed: dict[str, Any]
    slow, disturbed = latency(1.1, 1), {"disturbances": ("another process",)}
    assert upgrade(before(), after(latency=slow)).verdict == "fail"
    assert upgrade(before(), after(latency=latency(1.1, 1, **disturbed))).verdict == "inconclusive"
    # The old one looked slower than it was, and hides as much.
    assert upgrade(before(latency=latency(1.0, 1, **disturbed)), after()).verdict == "inconclusive"
    assert upgrade(before(), after(latency=slow), slowdown=0.2).verdict == "pass"


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("pass", "fail", "fail"),
        ("pass", "error", "fail"),
        ("pass", "inconclusive", "inconclusive"),
        ("pass", "not_measured", "fail"),
        ("error", "fail", "fail"),
        ("not_measured", "fail", "fail"),
        ("fail", "pass", "pass"),
        ("inconclusive", "pass", "pass"),
    ],
)
def test_verdicts(old: Any, new: Any, verdict: str) -> None:
    def part(word: Any) -> Any:
        return parity(output(verdict="pass"), verdict="pass" if word == "error" else word)

    one = before(verdict=old, parity=part(old), latency=None, message="why")
    two = after(verdict=new, parity=part(new), latency=None, message="why")
    assert upgrade(one, two, allowed={"layers"}).verdict == verdict


def test_what_failed_in_both_is_not_the_upgrade_s_doing_and_its_error_is_still_held() -> None:
    def failing(value: float) -> dict[str, Any]:
        return {"verdict": "fail", "parity": parity(output(value=value, verdict="fail"), verdict="fail")}

    gate = upgrade(before(**failing(0.02)), after(**failing(0.021)))
    assert gate.verdict == "pass"
    assert told(gate)["verdict"] == [("pass", "fail in both: nothing that the upgrade did")]
    assert upgrade(before(**failing(0.02)), after(**failing(0.05))).verdict == "fail"


def test_what_fails_newly_is_the_upgrade_s_doing_though_something_else_failed_before() -> None:
    def failing(*outputs: OutputRecord, budget: Any = "pass") -> dict[str, Any]:
        budgets = BudgetRecord(budget, "memory_mib", limit=9), BudgetRecord("fail", "build_s", limit=9)
        timed = replace(latency(), verdict="fail", budgets=budgets)
        return {"verdict": "fail", "parity": parity(*outputs, verdict="fail"), "latency": timed}

    bad, near, over = output("a", 0.02, verdict="fail"), output("b", 0.0099), output("b", 0.0101, verdict="fail")
    assert upgrade(before(**failing(bad, near)), after(**failing(bad, near))).verdict == "pass"
    gate = upgrade(before(**failing(bad, near)), after(**failing(bad, over)))
    assert gate.verdict == "fail"
    assert told(gate)["verdict"] == [("fail", "fail, and what passed before does not any more: b max")]
    gate = upgrade(before(**failing(bad, near)), after(**failing(bad, near, budget="fail")))
    assert told(gate)["verdict"] == [("fail", "fail, and what passed before does not any more: budget memory_mib")]
    gate = upgrade(before(**failing(bad, near)), after(**failing(bad, near, budget="inconclusive")))
    assert gate.verdict == "inconclusive"


def test_what_passes_only_when_it_is_run_again_is_no_pass() -> None:
    gate = upgrade(before(), after(runs=3))
    assert gate.verdict == "inconclusive"
    assert told(gate)["verdict"] == [("inconclusive", "pass: it passed in run 3 of its test, and before in run 1")]
    assert upgrade(before(runs=3), after(runs=3)).verdict == "pass"
    failing = before(verdict="fail", parity=parity(output(value=0.02, verdict="fail"), verdict="fail"))
    assert upgrade(failing, after(runs=2)).verdict == "pass", "it did not pass before"


SEARCH = "search for the worst input"


@pytest.mark.parametrize(
    ("old", "new", "said", "kind"),
    [
        ({"search": 20}, {}, "other search for the worst input than before, or none", "not-comparable"),
        ({"search": 20}, {"search": 10}, "other search for the worst input than before, or none", "not-comparable"),
        ({"search": 20}, {"search": 30}, None, None),
        ({"search": 20}, {"search": 20, "tried": 9}, f"the {SEARCH} was cut short: 9 of 20 tries", "not-comparable"),
        ({"search": 20, "tried": 9}, {"search": 20, "tried": 7}, None, None),
        ({"asked": {"score": "a"}}, {"asked": {"score": "b"}}, "other score than before, or none", "not-comparable"),
        ({"asked": {"limits": "a"}}, {"asked": {"limits": "b", "score": "a"}}, None, None),
        ({"budget": 9.0}, {"budget": None}, "memory_mib was measured in the old report alone", "not-measured"),
        ({"budget": 9.0}, {"budget": 99.0}, "another budget on memory_mib than before, or none", "not-comparable"),
        ({"budget": 9.0}, {}, "another budget on memory_mib than before, or none", "not-comparable"),
        ({"budget": None}, {"budget": 9.0}, None, None),
    ],
)
def test_what_is_asked_no_more_is_not_compared(
    old: dict[str, Any], new: dict[str, Any], said: str | None, kind: Any
) -> None:
    def made(changes: dict[str, Any]) -> dict[str, Any]:
        timed = latency()
        if "budget" in changes:
            limit = changes["budget"]
            budget = BudgetRecord("not_measured" if limit is None else "pass", "memory_mib", limit=limit)
            timed = replace(timed, budgets=(*timed.budgets, budget))
        tries = changes.get("search")
        found = SearchRecord(changes.get("tried", tries), tries, 1.0, 0.5, 0.4) if tries else None
        return {"latency": timed, "search": found, "asked": changes.get("asked")}

    gate = upgrade(before(**made(old)), after(**made(new)))
    (check,) = gate.checks
    lost = [(finding.text, finding.kind) for finding in check.findings if finding.outcome == "not compared"]
    assert lost == ([] if said is None else [(said, kind)])
    assert gate.verdict == ("pass" if said is None else "fail")


def test_an_engine_that_is_built_no_more_without_a_gpu_is_no_pass() -> None:
    built = before(evidence="emulated", compiled_for="L4")
    gate = upgrade(built, after(evidence="emulated", engine=None), allowed=("emulated",))
    said = "there was an engine, built for L4, and there is none now"
    assert told(gate)["precision"] == [("not compared", said)]
    assert gate.verdict == "fail"
    other = after(evidence="emulated", compiled_for="T4")
    said = "there was an engine, built for L4, and now one for T4"
    assert told(upgrade(built, other))["precision"] == [("not compared", said)]
    same = upgrade(built, after(evidence="emulated", compiled_for="L4"), allowed=("emulated", "not-measured"))
    assert same.verdict == "pass"


def test_a_test_that_fails_behind_its_check_fails() -> None:
    assert upgrade(before(outcome="passed"), after(outcome="failed")).verdict == "fail"
    assert upgrade(before(outcome="failed"), after(outcome="failed")).verdict == "pass"


def test_a_check_that_broke_fails_whatever_is_allowed() -> None:
    broken = CheckRecord(before().nodeid, "", "error", gpu_ran=False)
    assert upgrade(before(), broken, allowed=ALLOWABLE).verdict == "fail"


def test_a_score_that_surely_fell_further_fails() -> None:
    def score(drop: float, **changes: Any) -> ScoreRecord:
        found = ScoreRecord("pass", "top1", 0.9, 0.9 - drop, drop, drop - 0.004, drop + 0.004, 0.98, 0.05, samples=1000)
        return replace(found, **changes)

    old = before(score=score(0.01))
    assert upgrade(old, after(score=score(0.015))).verdict == "pass", "the bounds of the two overlap"
    gate = upgrade(old, after(score=score(0.03)))
    assert gate.verdict == "fail"
    assert told(gate)["score"] == [("fail", "top1 drop 0.010 (0.0060 to 0.014) → 0.030 (0.026 to 0.034)")]
    for other in (score(0.01, max_drop=0.5), score(0.01, samples=10), replace(score(0.01), drop=None), None):
        assert told(upgrade(old, after(score=other)))["score"][0][0] == "not compared"


# --- layers ----------------------------------------------------------------------------------------------------------


def test_a_layer_that_went_to_fp32_fails_and_is_named() -> None:
    wider = (*NEW_LAYERS[:2], layer("__myl_3", "fp32", "conv2", ms=0.5), NEW_LAYERS[3])
    gate = upgrade(before(), after(engine=engine(wider)))
    assert gate.verdict == "fail"
    assert told(gate)["precision"] == [("fail", "1 node went from int8 to fp32: conv2")]


def test_what_is_fused_into_a_layer_that_names_nothing_may_be_wider() -> None:
    gone = (*NEW_LAYERS[:2], NEW_LAYERS[3])
    for silent, outcome in (
        (layer("ForeignNode", "fp32", ms=0.5), "not compared"),
        (layer("ForeignNode", "unknown", ms=0.5), "not compared"),
        (layer("ForeignNode", "int8", ms=0.5), "pass"),
    ):
        gate = upgrade(before(), after(engine=engine((*gone, silent))), allowed={"not-measured"})
        assert told(gate)["precision"][0][0] == outcome, silent
        assert gate.verdict == "fail", "half of the time lies in a layer that cannot be matched"
    # tf32 and fp32 differ by a kernel's name alone.
    assert not layers.widened([layer("a", "tf32", "n")], [layer("b", "fp32", "n")])


def test_a_layer_that_is_slower_fails_where_it_matters_and_where_it_is_sure() -> None:
    def slower(ms: float, width: float = 0.02) -> Gate:
        layers = (*NEW_LAYERS[:2], layer("__myl_3", "int8", "conv2", ms=ms, width=width), NEW_LAYERS[3])
        return upgrade(before(), after(engine=engine(layers)))

    gate = slower(0.8)
    assert gate.verdict == "fail"
    assert told(gate)["layers"] == [("fail", "conv2 in int8: 0.5 → 0.8 ms, +60%")]
    assert slower(0.55).verdict == "pass"
    assert slower(0.8, width=0.3).verdict == "inconclusive"
    tiny = layer("t", "int8", "conv3", ms=0.001), layer("t", "int8", "conv3", ms=0.004)
    gate = upgrade(before(engine=engine((*OLD_LAYERS, tiny[0]))), after(engine=engine((*NEW_LAYERS, tiny[1]))))
    assert gate.verdict == "pass", "three microseconds of a millisecond matter to nobody"


def test_what_the_profiler_adds_to_layers_of_microseconds_makes_none_surely_slower() -> None:
    # An H100's, of one engine measured twice; a run of it took 0.0164 and 0.0165 ms.
    took = {"conv1": (0.0211, 0.0265), "conv2": (0.0134, 0.0184), "gemm": (0.0069, 0.0141)}

    def run(side: int, p50_ms: float | None) -> CheckRecord:
        made = engine([layer(name, "fp16", name, ms=ms[side], width=0.002) for name, ms in took.items()])
        return replace(before(engine=made), latency=None if p50_ms is None else latency(p50_ms))

    def outcomes(*p50_ms: float | None) -> set[str]:
        return {outcome for outcome, _ in told(upgrade(run(0, p50_ms[0]), run(1, p50_ms[1])))["layers"]}

    assert outcomes(0.0164, 0.0165) == {"inconclusive"}
    assert outcomes(None, None) == {"inconclusive"}, "nothing tells what a run takes"
    assert "fail" in outcomes(0.0414, 0.059), "they add up to what a run takes"


def test_layers_are_matched_by_the_nodes_that_they_share_however_they_are_fused() -> None:
    old = [layer("a", "fp16", "n1", "n2", ms=1.0), layer("b", "fp16", "n3", ms=1.0), layer("c", "fp16", ms=1.0)]
    new = [layer("x", "fp16", "n1", ms=1.0), layer("y", "fp16", "n2", "n3", ms=1.0), layer("z", "fp16", "n4", ms=1.0)]
    (group,) = layers.groups(old, new)
    assert group.nodes == ("n1", "n2", "n3")
    assert [each.name for each in (*group.old, *group.new)] == ["a", "b", "x", "y"]
    assert group.is_fused_otherwise
    took = layers.Took.of(group.old)
    assert took is not None
    assert (took.ms, took.lower, took.upper) == pytest.approx((2.0, 1.96, 2.04))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ((), NEW_LAYERS, "the old report does not tell which layer computes which ONNX node"),
        (OLD_LAYERS, (), "the new report does not tell which layer computes which ONNX node"),
        ((), (), "neither report tells which layer computes which ONNX node"),
    ],
)
def test_engines_that_do_not_tell_are_not_compared(old: Any, new: Any, said: str) -> None:
    pair = [engine(each) if each else replace(engine(()), layers_by_precision={"int8": 3}) for each in (old, new)]
    one, two = before(engine=pair[0]), after(engine=pair[1])
    gate = upgrade(one, two)
    assert gate.verdict == "fail"
    assert told(gate)["precision"] == [("not compared", said)]
    assert [outcome for outcome, _ in told(gate)["layers"]] == ["not compared"]
    allowed = upgrade(one, two, allowed={"layers"})
    assert allowed.verdict == "pass"
    assert "1 not compared in full, which layers allows" in text.headline(allowed)


def test_that_no_layer_runs_in_the_precision_any_more_fails_though_no_layer_is_named() -> None:
    one, two = (replace(engine(()), layers_by_precision=counts) for counts in ({"int8": 3}, {"fp32": 3}))
    gate = upgrade(before(engine=one), after(engine=two), allowed=ALLOWABLE)
    assert gate.verdict == "fail"
    assert told(gate)["precision"][0] == ("fail", "no layer computes in int8 any more")


def test_a_provider_that_leaves_more_nodes_to_others_fails() -> None:
    def by_provider(kernels: dict[str, int], *elsewhere: str) -> CheckRecord:
        nodes = tuple(NodeRecord(name, "Resize", "CPUExecutionProvider") for name in elsewhere)
        divided = PartitionRecord("CUDAExecutionProvider", 5, elsewhere=nodes, kernels=kernels)
        return check(evidence="provider", engine=None, partition=divided)

    old = by_provider({"fp16": 5}, "a")
    assert told(upgrade(old, by_provider({"fp16": 4}, "a")))["precision"][0][0] == "pass"
    gate = upgrade(old, by_provider({"fp16": 4}, "a", "b"))
    assert gate.verdict == "fail"
    said = "CUDAExecutionProvider leaves 1 more to others: b (Resize, CPUExecutionProvider)"
    assert told(gate)["precision"] == [("fail", said)]
    assert told(upgrade(old, by_provider({"fp32": 5}, "a")))["precision"] == [
        ("fail", "no node computes in fp16 any more")
    ]
    assert told(upgrade(old, check(evidence="provider", engine=None)))["precision"][0][0] == "not compared"


def test_why_layers_were_not_timed_is_said() -> None:
    untimed = replace(engine([replace(each, time_ms=None) for each in NEW_LAYERS]), layers_untimed="no profiler")
    gate = upgrade(before(), after(engine=untimed))
    assert told(gate)["layers"] == [("not compared", "layers were timed not in the new report: no profiler")]


def test_a_node_in_several_layers_computes_in_the_narrowest_and_a_copy_computes_nothing() -> None:
    split = [layer("product", "int8", "gemm"), layer("bias", "fp32", "gemm")]
    assert not layers.widened([layer("gemm", "int8", "gemm")], split)
    assert not layers.widened([layer("gemm", "int8", "gemm")], split[::-1])
    assert layers.widened(split, [layer("gemm", "fp32", "gemm")])
    copy = replace(layer("copy to gemm", "int8", "gemm"), kind="Reformat")
    (found,) = layers.widened(split, [layer("gemm", "fp32", "gemm"), copy])
    assert str(found) == "1 node went from int8 to fp32: gemm"
    assert layers.untold(split, [copy, layer("?", "fp32")]) == ("gemm",)


# --- what was not compared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"model_sha256": "b" * 64}, "not-comparable", "another model"),
        ({"evidence": "emulated"}, "not-comparable", "other evidence: engine before, emulated now"),
        ({"cases": 3}, "not-comparable", "other inputs"),
        ({"calibration": CalibrationRecord("minmax", None, 4, sha256="b" * 64)}, "not-comparable", "other calibration"),
        ({"inputs_sha256": "b" * 64}, "not-comparable", "other inputs: sha256 aaaaaaaa"),
        ({"reference": "golden.npz"}, "not-comparable", "another reference"),
        ({"reference_sha256": "b" * 64}, "not-comparable", "another reference: sha256 cccccccc"),
        ({"latency": None}, "not-measured", "measured in the old report alone"),
        ({"parity": None}, "not-measured", "outputs were compared in the old report alone"),
        ({"parity": parity(output("scores"))}, "not-comparable", "boxes max is not judged any more"),
        (
            {"parity": parity(output(limit=1.0), output("scores"))},
            "not-comparable",
            "was judged by ≤ 0.01, and is by ≤ 1",
        ),
        ({"latency": latency(1.0, 1, cuda_graph=False)}, "not-comparable", "launched as a CUDA graph before"),
        ({"latency": latency(1.0, 1, distribution=None)}, "not-comparable", "no distribution"),
        ({"engine": None}, "layers", "there is none now"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_compared_fails_unless_it_is_allowed(changes: dict[str, Any], kind: Any, said: str) -> None:
    # Another check is sound: were there none at all, the reports would not fit together.
    both = {"inputs_sha256": "a" * 64, "reference_sha256": "c" * 64, "parity": parity(output(), output("scores"))}
    calibrated = {"calibration": CalibrationRecord("minmax", None, 4, sha256="a" * 64)}
    old = before(**both, **calibrated), before(nodeid="t.py::sound")
    new = after(**{**both, **changes}), after(nodeid="t.py::sound")
    gate = upgrade(old, new)
    assert gate.verdict == "fail"
    texts = [(each.kind, each.text) for each in gate.checks[0].findings if each.outcome == "not compared"]
    assert any(each == kind and said in text for each, text in texts), texts
    assert upgrade(old, new, allowed={kind, "layers"}).verdict == "pass"
    assert upgrade(old, new, allowed={*ALLOWABLE} - {kind}).verdict == "fail"


def test_a_check_that_the_new_report_lacks_fails_and_one_that_it_adds_is_said() -> None:
    gate = upgrade([before(), before(nodeid="t.py::gone")], [after(), after(nodeid="t.py::more")])
    assert gate.verdict == "fail"
    assert gate.checks[0].findings[0].text == "the new report has no such check"
    assert "1 only in the new report, not judged" in text.headline(gate)
    assert upgrade([before(), before(nodeid="t.py::gone")], after(), allowed={"missing"}).verdict == "pass"


def test_emulated_errors_say_nothing_of_another_tensorrt_and_all_of_another_onnx_runtime() -> None:
    one, two = (check(evidence="emulated", latency=None, engine=None) for _ in range(2))
    gate = upgrade(one, two)
    assert gate.verdict == "fail"
    assert told(gate)["error"][0] == (
        "not compared",
        "emulated in both: TensorRT did not run, and these errors say nothing of it",
    )
    assert upgrade(one, two, allowed={"emulated"}).verdict == "pass"
    newer = judge(report(one), report(two, onnxruntime="99.0"), Limits())
    assert newer.verdict == "pass"


def test_nothing_compared_is_no_pass_whatever_is_allowed() -> None:
    gate = upgrade(before(), after(model_sha256="b" * 64), allowed=ALLOWABLE)
    assert gate.verdict == "fail"
    assert not gate.fits
    assert "nothing was compared" in text.headline(gate)


def test_checks_of_one_test_on_several_backends_are_paired_by_backend() -> None:
    old = [before(backend=name, parity=parity(output(value=value))) for name, value in (("a", 0.001), ("b", 0.005))]
    new = [after(backend=name, parity=parity(output(value=value))) for name, value in (("b", 0.005), ("a", 0.001))]
    assert upgrade(old, new).verdict == "pass"
    assert upgrade(old[:1], [replace(after(), backend="c", parity=parity(output(value=0.001)))]).verdict == "pass"


def test_a_test_that_left_no_record_in_the_new_report_is_a_loss_with_its_reason() -> None:
    def without(nodeid: str) -> RunRecord:
        missing = (MissingRecord(nodeid, "the worker died", "failed"),)
        return replace(report(after(), tensorrt="1.7.1.116"), missing=missing, planned=2)

    old = report(before(), before(nodeid="t.py::gone"))
    gate = judge(old, without("t.py::gone"), Limits())
    assert gate.verdict == "fail"
    assert gate.checks[0].findings[0].text == "the new report has no such check: the worker died"
    unknown = judge(report(before()), without("t.py::new"), Limits())
    assert unknown.verdict == "fail", "the old report does not know it either, and it was to check something"
    assert any("t.py::new (the worker died)" in line for line in text.lines(unknown, ("a", "b"), 200))
    assert judge(report(before()), without("t.py::new"), Limits(allowed=frozenset({"missing"}))).verdict == "pass"


def test_merged_reports_are_held_against_each_other_machine_by_machine() -> None:
    def fleet(tensorrt: str, *checks: CheckRecord) -> RunRecord:
        gpus = GpuRecord("NVIDIA A100", None, "8.0"), GpuRecord("NVIDIA L4", None, "8.9")
        parts = [
            (f"{gpu.name}.json", replace(run, environment=replace(run.environment, gpu=gpu)))
            for gpu, run in zip(gpus, [report(each, tensorrt=tensorrt) for each in checks], strict=True)
        ]
        return merge(parts)

    def slow(p50_ms: float) -> CheckRecord:
        return after(latency=latency(p50_ms, 1), engine=None)

    old = fleet("1.5", *(before(latency=latency(p50_ms), engine=None) for p50_ms in (1.0, 3.0)))
    assert judge(old, fleet("1.7", slow(1.0), slow(3.0)), Limits()).verdict == "pass"
    gate = judge(old, fleet("1.7", slow(1.0), slow(3.6)), Limits())
    assert [(check.subject.where, check.outcome(frozenset())) for check in gate.checks] == [
        ("L4", "fail"),
        ("A100", "pass"),
    ]
    assert {change.name for change in gate.environment} == {"TensorRT (A100)", "TensorRT (L4)"}
    with pytest.raises(ArgumentError, match="older TensorRT"):
        judge(fleet("1.7", slow(1.0), slow(3.0)), old, Limits())


# --- reports that do not fit -----------------------------------------------------------------------------------------


def test_the_same_report_twice_and_reports_without_a_check_in_common() -> None:
    with pytest.raises(ReportError, match="both are the same report"):
        judge(report(before()), report(before()), Limits())
    # NaN is not NaN once it was read twice.
    old, new = (report(before(parity=parity(output(value=float("nan"))))) for _ in range(2))
    with pytest.raises(ReportError, match="both are the same report"):
        judge(old, new, Limits())
    with pytest.raises(ReportError, match="no check in common"):
        judge(report(before()), report(after(nodeid="t.py::other")), Limits())
    with pytest.raises(ReportError, match="the new report has no checks"):
        judge(report(before()), report(), Limits())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"tensorrt": Library(module="tensorrt", version="10.9")},
            {"tensorrt": Library(module="tensorrt", version="10.3")},
        ),
        ({"driver": "580.95"}, {"driver": "570.1"}),
    ],
)
def test_swapped_reports_are_refused_unless_it_is_meant(old: dict[str, Any], new: dict[str, Any]) -> None:
    def run(check: CheckRecord, changes: dict[str, Any]) -> RunRecord:
        found = report(check)
        return replace(found, environment=replace(found.environment, **changes))

    one, two = run(before(), old), run(after(), new)
    with pytest.raises(ArgumentError, match="the new report is of an older"):
        judge(one, two, Limits())
    assert judge(one, two, Limits(), downgrade=True).verdict == "pass"
    assert judge(two, one, Limits()).verdict == "pass"


def test_a_report_that_a_hand_altered_is_not_compared() -> None:
    over = parity(output(value=0.02))  # A pass beyond its limit.
    failed = parity(output(value=0.02, verdict="fail"), verdict="fail")  # And a part that fails in a check that passes.
    slow = replace(latency(2.0), p50_ms=1.0)
    narrower = replace(engine(NEW_LAYERS), layers=tuple(replace(each, precision="int8") for each in NEW_LAYERS))
    spoilt = ({"parity": over}, {"parity": failed}, {"latency": slow}, {"engine": narrower}, {"gpu_ran": False})
    for changes in spoilt:
        gate = upgrade([before(), before(nodeid="t.py::sound")], [after(**changes), after(nodeid="t.py::sound")])
        assert gate.verdict == "fail"
        assert "the new report was altered" in gate.checks[0].findings[0].text


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_report_that_was_spoilt_is_an_error_or_judged_and_never_a_crash(data: st.DataObject) -> None:
    spoilt = jsonable(report(after(), tensorrt="1.7.1.116"))
    leaves = {*LEAVES, "layers", "time_ms", "bounds_ms", "nodes", "precision", "summary"}
    places = [(holder, key) for holder, key in _walk(spoilt) if key in leaves or data.draw(st.integers(0, 30)) == 0]
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(st.sampled_from([None, 1, -1.5, "x", "nan", [], {}, [1], {"a": 1}, True]))
    try:
        gate = judge(report(before()), typed(spoilt, RunRecord), Limits())
    except (ReportError, ArgumentError):
        return
    text.lines(gate, ("a", "b"))
    json.dumps(jsonable(text.data(gate, ("a", "b"), 0)), allow_nan=False)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    def make(old: CheckRecord, new: CheckRecord) -> list[str]:
        save(tmp_path / "old.json", report(old))
        save(tmp_path / "new.json", report(new, tensorrt="1.7.1.116"))
        return [str(tmp_path / "old.json"), str(tmp_path / "new.json")]

    return make


@pytest.mark.parametrize(
    ("new", "status"),
    [
        (after(), 0),
        (after(verdict="fail", message="boxes differ"), 1),
        (after(latency=None), 1),
        (after(evidence="emulated"), 2),
        (after(latency=latency(1.1, 1, disturbances=["heat"])), 3),
    ],
    ids=["pass", "fail", "not compared", "does not fit", "inconclusive"],
)
def test_exit_status(
    files: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], new: CheckRecord, status: int
) -> None:
    paths, out = files(before(), new), tmp_path / "verdict.json"
    assert __main__.main(["upgrade", *paths, f"--json={out}"]) == status
    text = capsys.readouterr().out
    assert all(columns(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)
    found = json.loads(out.read_text())
    assert found["exit_status"] == status
    assert (found["limits"]["error_ratio"], found["limits"]["error_share"]) == (1.5, 0.05)
    assert found["verdict"] == {0: "pass", 3: "inconclusive"}.get(status, "fail")
    assert f"upgrade: {found['verdict']} (" in text.splitlines()[-1] or f"upgrade: {found['verdict']} (" in text
    pytest.importorskip("jinja2")
    assert __main__.main(["upgrade", *paths, "--markdown", f"--html={tmp_path / 'verdict.html'}"]) == status
    assert f">{found['verdict']}</span></h1>" in (tmp_path / "verdict.html").read_text()
    assert capsys.readouterr().out.startswith(f"## Upgrade: {found['verdict']} ")


def test_bad_arguments_and_files_exit_with_2(
    files: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = files(before(), after())
    for wrong in (["--allow=everything"], ["--slowdown=-1"], ["--error-ratio=nan"]):
        with pytest.raises(SystemExit) as caught:
            __main__.main(["upgrade", *paths, *wrong])
        assert caught.value.code == 2
    assert "everything: expected some of missing, not-comparable" in capsys.readouterr().err
    cut = tmp_path / "cut.json"
    cut.write_text(Path(paths[1]).read_text()[:500])
    assert __main__.main(["upgrade", paths[0], str(cut)]) == 2
    assert "cut.json is no JSON report" in capsys.readouterr().err
    assert __main__.main(["upgrade", paths[0], paths[0]]) == 2
    assert "both are the same report" in capsys.readouterr().err
    assert __main__.main(["upgrade", *reversed(paths)]) == 2
    assert "the new report is of an older TensorRT" in capsys.readouterr().err


def test_markdown_is_a_table_that_names_cannot_break_and_fits_a_summary() -> None:
    old = [before(nodeid=f"t.py::test_a[x|y{n}]") for n in range(300)]
    new = [after(nodeid=f"t.py::test_a[x|y{n}]", verdict="fail", message="a|b<script>") for n in range(300)]
    table = text.markdown(upgrade(old, new), ("old.json", "new.json"), limit=20_000)
    assert len(table.encode()) <= 20_000
    rows = [line for line in table.splitlines() if line.startswith("| ❌")]
    assert rows
    assert all(line.count("|") == 6 for line in rows)
    assert "<script>" not in table
    pytest.importorskip("jinja2")
    assert "<script>" not in text.page(upgrade(old[:1], new[:1]), ("<script>", "new.json"))


# --- reports of real runs --------------------------------------------------------------------------------------------


def recorded(name: str, **environment: Any) -> RunRecord:
    found = read(RECORDED / name)
    return replace(found, environment=replace(found.environment, **environment))


def test_two_releases_that_built_engines_for_a_gpu_that_is_not_there_are_no_evidence() -> None:
    old, new = read(RECORDED / "upgrade_rtx_1.5.json"), read(RECORDED / "upgrade_rtx_1.7.json")
    gate = judge(old, new, Limits())
    assert gate.verdict == "fail"
    assert {change.name for change in gate.environment} >= {"TensorRT"}
    said = {each.text for one in gate.checks for each in one.findings if each.outcome == "not compared"}
    assert "emulated in both: TensorRT did not run, and these errors say nothing of it" in said
    assert judge(old, new, Limits(allowed=frozenset(ALLOWABLE))).verdict == "pass"
    with pytest.raises(ArgumentError, match="older TensorRT"):
        judge(new, old, Limits())


def test_reports_of_a_real_gpu_with_faults_planted() -> None:
    measured = Path(__file__).parent.parent / "docs" / "measured" / "h100" / "pairs.json"
    old = read(measured)
    newer = replace(old.environment, driver="590.1")

    def with_errors(factor: float) -> RunRecord:
        data = jsonable(replace(old, environment=newer))
        for one in data["checks"]:
            for each in (one["parity"] or {"outputs": []})["outputs"]:
                for judged in each["judged"]:
                    if isinstance(judged["value"], float) and judged["verdict"] == "pass":
                        judged["value"] = min(judged["value"] * factor, judged["limit"] or 1e9)
        return typed(data, RunRecord)

    allowed = Limits(allowed=frozenset({"layers", "not-measured"}))
    assert judge(old, with_errors(1.0), Limits()).verdict == "fail", "layers were not told of yet"
    assert judge(old, with_errors(1.0), allowed).verdict == "pass"
    found = judge(old, with_errors(3.0), allowed)
    assert found.verdict == "fail"
    assert any(each.question == "error" and each.outcome == "fail" for one in found.checks for each in one.findings)
    elsewhere = replace(old, environment=replace(newer, gpu=GpuRecord("NVIDIA L4", "GPU-2", "8.9")))
    assert not judge(old, elsewhere, allowed).fits
