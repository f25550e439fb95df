"""Several systems in one run: a check of each, and what they came to side by side.

The systems are a package of the user's, as docs/extending.md has them: one is fast, one slow, one wrong, one missing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.record import CheckRecord, ComparisonRecord, LatencyDetails, LatencyRecord, jsonable, typed
from pytest_trtcheck.report import systems, terminal
from pytest_trtcheck.report.text import columns
from tests.test_extending_backend import CODES, ENTRY, install

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite

MORE = """
import numpy as np
from pytest_trtcheck.errors import MissingDependencyError
from pytest_trtcheck.latency.samples import Samples


class Runs:
    measured, graph, graph_reason = "a request", None, None

    def __init__(self, run_ms):
        self.run_ms = run_ms

    def run(self, n):
        took = self.run_ms * np.random.default_rng(n).normal(1.0, 0.005, n)
        return Samples(took, None, None, took)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Fast(ServedOrt):
    name, title, run_ms = "fast", "the fast one", 2.0

    def timed_runs(self, runner, cases, **_):
        return Runs(self.run_ms)

    def costs(self, built, runner, instances=1):
        return {"memory_mib": 12.5}


class Slow(Fast):
    name, title, run_ms = "slow", "the slow one", 5.0


class Wrong(Fast):
    name, title = "wrong", "the wrong one"

    def load(self, built):
        session = super().load(built)
        return type("Scaled", (), {
            "__call__": lambda self, inputs: {name: array * 1.1 for name, array in session(inputs).items()},
            "close": lambda self: session.close(),
        })()


class Whole(Wrong):
    name, title, runs_parts = "whole", "one that runs no parts", False


class Missing(Fast):
    name, title = "missing", "the missing one"

    @classmethod
    def require(cls):
        raise MissingDependencyError("missing is not installed", "pip install missing")


class Loading(Fast):
    name, title, loads = "loading", "one that loads", True


class Several(Fast):
    name, title, takes_instances = "several", "one of several", True

    def timed_runs(self, runner, cases, *, instances=1, **_):
        return Runs(self.run_ms * instances)

    def costs(self, built, runner, instances=1):
        return {"memory_mib": 10.0 + instances}
"""
NAMES = ("fast", "slow", "wrong", "missing", "loading", "several", "whole")


@pytest.fixture
def kit(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """The documentation's package with more systems in it."""
    entries = ENTRY.replace("project.entry-points.", "").replace('"', "")
    entries += "".join(f"{name} = ort_served:{name.title()}\n" for name in NAMES)
    install(suite, monkeypatch, {"ort_plain": CODES[0], "ort_served": CODES[1] + MORE}, entries)
    return suite


LISTED = """
@trt_parity("conv.onnx", precision={precision}, batch={batch}, backend={backend}, tol=0.02)
@trt_latency(p50_ms=3, max_seconds=1)
def test_it(): ...
"""


def listed(backend: str, precision: str = "'fp32'", batch: str = "2") -> str:
    return LISTED.format(backend=backend, precision=precision, batch=batch)


def test_each_is_a_check_of_its_own_and_a_row(kit: Suite, run_everywhere: Callable[..., Run]) -> None:
    kit.write(test_it=listed("['slow', 'missing', 'fast', 'wrong']"))
    run = run_everywhere()
    run.result.assert_outcomes(passed=1, failed=2, skipped=1)
    found = {check["system"]: check for check in run.checks}
    assert {name: check["verdict"] for name, check in found.items()} == {
        "fast": "pass",
        "slow": "fail",
        "wrong": "fail",
        "missing": "not_measured",
    }
    assert found["missing"]["message"] == "missing is not installed\n  → pip install missing"
    (comparison,) = run.report["comparisons"]
    assert (comparison["test"], comparison["precision"]) == ("test_it.py::test_it", "fp32")
    rows = {row["system"]: row for row in comparison["systems"]}
    assert list(rows) == ["fast", "missing", "slow", "wrong"]
    assert rows["fast"]["p50_ms"] == pytest.approx(2.0, rel=0.01)
    assert rows["fast"]["qps"] == pytest.approx(500, rel=0.01)
    assert rows["fast"]["memory_mib"] == 12.5
    assert rows["fast"]["load_ms"] is None, "what is up before we ask loads nothing"
    assert rows["wrong"]["error"] == pytest.approx(0.1, rel=0.01)
    assert rows["missing"]["missing"] == ["not measured: missing is not installed"]
    assert (rows["slow"]["missing"][0]).startswith("fail: p50_ms is ")
    text = run.text[run.text.index("system ") :]
    assert re.search(r"^fast +\S+ +2\.0\d? +2\.0\d? +\d+ +12\.5 +– +– +–$", text, re.MULTILINE)
    assert "\n  missing: not measured: missing is not installed\n" in text


def test_one_that_runs_no_parts_is_blamed_beside_the_emulation(kit: Suite) -> None:
    kit.write(test_it=listed("'whole'"))
    (record,) = kit.run().checks
    assert record["verdict"] == "fail"
    blame = record["parity"]["blame"]
    assert (blame["step"], blame["headline"]) == (
        "engine",
        "emulated, fp32 keeps the limits, and one that runs no parts does not",
    )


def test_alone_it_stays_an_error_and_of_a_list_on_the_command_line_too_if_all_are_missing(kit: Suite) -> None:
    kit.write(test_it=listed("'missing'"), test_free="@trt_parity('conv.onnx', batch=2)\ndef test_free(): ...\n")
    (record,) = kit.run("test_it.py").checks
    assert record["verdict"] == "error"
    assert "system" not in record
    for given in ("missing", "missing,missing"):
        run = kit.run(f"--trt-backend={given}", "test_free.py")
        assert run.result.ret == pytest.ExitCode.USAGE_ERROR
        assert "missing is not installed" in run.text


def test_what_needs_a_gpu_fails_under_require_gpu(kit: Suite) -> None:
    kit.write(test_it=listed("['missing', 'fast']"))
    run = kit.run("--trt-require-gpu")
    run.result.assert_outcomes(failed=2)
    assert "missing was not measured: missing is not installed" in run.check("missing]")["message"]


def test_the_command_line_lists_them_for_all_that_name_none(kit: Suite) -> None:
    kit.write(
        test_it="""
@trt_parity("conv.onnx", precision=["fp32"], batch=[1, 2])
def test_marked(): ...

@trt_parity("conv.onnx", precision="fp32", batch=2, backend="fast")
def test_named(): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", precision="fp32", batch=1)

def test_built(trt_build):
    engine = trt_build("conv.onnx", precision="fp32")
    assert list(engine({"image": np.zeros((1, 3, 16, 16), np.float32)})) == ["logits"]

def test_free(): ...
"""
    )
    run = kit.run("--trt-backend=fast,slow", "--trt-precision=fp32", "test_it.py", "conv.onnx", "-v")
    run.result.assert_outcomes(passed=4 + 1 + 2 + 2 + 1 + 2)
    names = {check["nodeid"].partition("::")[2] for check in run.checks}
    assert names == {
        *(f"test_marked[batch{size}-{name}]" for size in (1, 2) for name in ("fast", "slow")),
        *(f"{test}[{name}]" for test in ("test_by_hand", "fp32") for name in ("fast", "slow")),
        "test_named",
    }
    tables = {each["test"].partition("::")[2]: each["systems"] for each in run.report["comparisons"]}
    assert set(tables) == {"test_marked[batch1]", "test_marked[batch2]", "test_by_hand", "fp32"}
    assert all(row["p50_ms"] for rows in tables.values() for row in rows), "without trt_latency each is measured too"
    assert run.check("test_marked[batch1-fast]")["latency"]["verdict"] == "not_measured", "and judged by nothing"


def test_a_precision_that_one_does_not_take_is_its_row(kit: Suite) -> None:
    kit.write(test_it=listed("['fast', 'onnxruntime']", precision="['fp16']"))
    run = kit.run()
    run.result.assert_outcomes(passed=1, skipped=1)
    (comparison,) = run.report["comparisons"]
    fast, emulated = comparison["systems"]
    assert "it has no arithmetic for fp16" in fast["missing"][0]
    assert emulated["error"] is not None, "it was asked for by name"
    assert any(text.startswith("latency: no GPU in this machine") for text in emulated["missing"])


def test_what_stands_in_for_a_gpu_has_no_error_of_its_own(kit: Suite) -> None:
    kit.write(test_it=listed("['tensorrt', 'tensorrt_rtx']", precision="'fp16'"))
    run = kit.run()
    run.result.assert_outcomes(passed=2)
    for row in run.report["comparisons"][0]["systems"]:
        assert row["error"] is row["p50_ms"] is None
        assert row["missing"][0] == "the error is not its own: it was emulated on the CPU"


def test_engines_for_another_gpu_have_their_size_and_build_time(kit: Suite) -> None:
    kit.write(test_it=listed("['tensorrt_rtx', 'fast']", precision="'fp16'"))
    run = kit.run("--trt-gpu=A100")
    row = run.report["comparisons"][0]["systems"][1]
    assert row["engine_mib"] > 0
    assert row["build_s"] > 0
    again = kit.run("--trt-gpu=A100")
    assert again.check("tensorrt_rtx]")["engine"]["cached"]
    assert again.report["comparisons"][0]["systems"][1]["build_s"] == row["build_s"], "that of its build"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[]", "at least one backend, each named once"),
        ("['fast', 'fast']", "each named once"),
        ("['fast', 'fasst']", "did you mean 'fast'?"),
    ],
)
def test_a_list_that_makes_no_sense(kit: Suite, given: str, said: str) -> None:
    kit.write(test_it=listed(given))
    run = kit.run()
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    assert said in run.said


def test_a_list_where_one_is_taken(kit: Suite) -> None:
    kit.write(test_it="def test_it(trt_check): trt_check('conv.onnx', backend=['fast', 'slow'])")
    assert "trt_check: backend=['fast', 'slow']: takes one backend" in kit.run().text
    kit.write(
        test_it="""
@trt_parity("conv.onnx", engine="x.plan", backend=["tensorrt", "tensorrt_rtx"])
def test_file(): ...
"""
    )
    run = kit.run()
    run.result.assert_outcomes(errors=1)
    assert "expected tensorrt or tensorrt_rtx beside engine=" in run.said


def test_a_check_that_comes_too_late_to_be_made_by_each_is_an_error(kit: Suite) -> None:
    kit.write(
        test_it="""
def test_late(request): request.getfixturevalue("trt_check")("conv.onnx", batch=2)
def test_named(request): request.getfixturevalue("trt_check")("conv.onnx", batch=2, precision="fp32", backend="fast")
def test_marked(): ...
""",
        conftest="""
def pytest_collection_modifyitems(items):
    items[-1].add_marker(pytest.mark.trt_parity("conv.onnx", batch=2))
""",
    )
    run = kit.run("--trt-backend=fast,slow")
    run.result.assert_outcomes(passed=1, failed=2)
    assert run.said.count("fast, slow are to be compared, and the test came to its check too late") >= 2


# --- budgets on what a system takes ---------------------------------------------------------------------------------


def judged(kit: Suite, backend: str, budgets: str, *options: str) -> dict[str, Any]:
    kit.write(
        test_it=f'@trt_parity("conv.onnx", precision="fp32", batch=2, backend="{backend}")\n'
        f"@trt_latency({budgets}, max_seconds=1)\ndef test_it(): ..."
    )
    (check,) = kit.run(*options).checks
    return check


def budget(check: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in check["latency"]["budgets"] if each["name"] == name)
    return found


@pytest.mark.parametrize(("limit", "verdict"), [("10_000", "pass"), ("0.001", "fail"), ('{"T4": 1}', "not_measured")])
def test_load_ms(kit: Suite, limit: str, verdict: str) -> None:
    check = judged(kit, "loading", f"load_ms={limit}")
    assert check["verdict"] == (verdict if verdict != "not_measured" else "pass")
    assert check["latency"]["verdict"] == verdict
    if verdict != "not_measured":
        assert len(check["latency"]["details"]["load_samples_ms"]) in {15, 30, 60}
        assert budget(check, "load_ms")["lower"] <= check["costs"]["load_ms"] * 10


def test_a_load_that_says_nothing_is_not_measured_and_the_others_are(kit: Suite) -> None:
    check = judged(kit, "fast", "load_ms=1000, p50_ms=3")
    assert (check["verdict"], check["latency"]["verdict"]) == ("pass", "pass")
    assert budget(check, "load_ms") == {
        "verdict": "not_measured",
        "name": "load_ms",
        "text": "the fast one does not tell it",
    }
    assert "load_ms was not measured: the fast one does not tell it" in check["notes"]
    alone = judged(kit, "fast", "build_s=1000")
    assert alone["latency"]["verdict"] == "not_measured"
    assert alone["latency"]["reason"] == "build_s: the fast one does not tell it"


@pytest.mark.parametrize(("backend", "verdict"), [("fast", "not_measured"), ("several", "pass")])
def test_instances(kit: Suite, backend: str, verdict: str) -> None:
    check = judged(kit, backend, "p50_ms=9, memory_mib=14.5, instances=4")
    assert check["latency"]["verdict"] == verdict
    if verdict == "pass":
        assert check["latency"]["p50_ms"] == pytest.approx(8.0, rel=0.01)
        assert budget(check, "memory_mib")["value"] == 14.0
        assert check["latency"]["details"]["instances"] == 4
    else:
        assert check["latency"]["reason"] == "the fast one is not measured with 4 instances at once"


def test_what_is_to_be_slower_and_can_not_be_measured_never_passes(kit: Suite) -> None:
    check = judged(kit, "fast", "min_speedup={'slow': 1.1}, p50_ms=3")
    assert check["latency"]["verdict"] == "pass"
    assert budget(check, "min_speedup[slow]")["verdict"] == "not_measured"
    assert "min_speedup[slow] was not measured: the slow one is not measured on the GPU here" in check["notes"]
    alone = judged(kit, "fast", "min_speedup={'missing': 1.1}")
    assert alone["latency"]["verdict"] == "not_measured"
    assert alone["latency"]["reason"] == "min_speedup[missing]: missing is not installed"
    itself = judged(kit, "fast", "min_speedup={'fast': 1.1}")
    assert itself["latency"]["reason"] == "min_speedup[fast]: the fast one is what was checked itself"
    own = judged(kit, "fast", "min_speedup={'fp32': 0.9}")
    assert own["latency"]["reason"] == "min_speedup[fp32]: fp32 is what was checked itself"
    refused = judged(kit, "fast", "min_speedup={'slow': 1.1}, p50_ms=3", "--trt-require-gpu")
    assert refused["verdict"] == "fail"
    assert "min_speedup[slow] not measured (the slow one is not measured on the GPU here)" in refused["message"]
    elsewhere = judged(kit, "fast", "min_speedup={'slow': {'T4': 1.1}}, p50_ms=3")
    assert [each["name"] for each in elsewhere["latency"]["budgets"]] == ["p50_ms"], "no budget of this GPU's"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("min_speedup={'torhc': 2}", "did you mean 'torch'?"),
        ("min_speedup={'auto': 2}", "a precision, or a system of its own"),
        ("min_speedup={'fp32': {'T44': 2}}", "min_speedup[fp32]"),
        ("min_speedup={'fp32': None}", "a number above 0"),
        ("instances=0", "an integer of at least 1"),
        ("load_ms=-1", "a number above 0"),
    ],
)
def test_budgets_that_make_no_sense(kit: Suite, given: str, said: str) -> None:
    check = judged(kit, "fast", given)
    assert check["verdict"] == "error"
    assert said in check["message"]


# --- the table ------------------------------------------------------------------------------------------------------


def record(system: str, nodeid: str, **changes: Any) -> CheckRecord:
    return CheckRecord(nodeid, "m.onnx", "pass", precision="fp16", system=system, backend=system, **changes)


def test_a_table_a_test_precision_and_batch_whatever_the_parameters() -> None:
    records = [
        record(system, f"test_a.py::test[{before}{system}{after}]")
        for system in ("torch", "torch-compile")
        for before, after in (("", ""), ("x-", ""), ("", "-y"), ("", "-torch-like"), ("batch1-", "-y"))
    ]
    found = systems.compared(records)
    assert {each.test.removeprefix("test_a.py::") for each in found} == {
        "test",
        "test[x]",
        "test[y]",
        "test[torch-like]",
        "test[batch1-y]",
    }
    assert all([row.system for row in each.systems] == ["torch", "torch-compile"] for each in found)


def test_machines_of_a_merged_report_are_apart_and_clocks_are_told() -> None:
    def timed(system: str, machine: str, measured: str) -> CheckRecord:
        details = LatencyDetails(qps=1.0, measured=measured)
        latency = LatencyRecord("pass", samples=100, p50_ms=1.0, p99_ms=1.0, details=details)
        return record(system, f"t.py::test[{system}]", machine=machine, latency=latency)

    first, second = systems.compared(
        [
            timed("torch", "A100", "GPU time"),
            timed("remote", "A100", "host time"),
            timed("torch", "T4", "GPU time"),
            timed("tensorrt", "T4", "GPU time"),
        ]
    )
    assert systems.title(first) == "m.onnx fp16, t.py::test on A100"
    assert systems.remarks(first) == [
        "remote: p50, p99 and QPS are of host time",
        "torch: p50, p99 and QPS are of GPU time",
    ]
    assert [row.system for row in second.systems] == ["tensorrt", "torch"]
    assert systems.remarks(second) == []


def test_it_is_read_back_and_fits_80_columns() -> None:
    latency = LatencyRecord(
        "pass", samples=100, p50_ms=1234.56, p99_ms=2345.67, details=LatencyDetails(qps=1234.5), gpu="A100"
    )
    costs = {"memory_mib": 12345.6, "engine_mib": 1234.5, "build_s": 1234.5, "load_ms": 12345.6}
    records = [
        record(name, f"t.py::test_{'long' * 9}[{name}]", latency=latency, costs=costs)
        for name in ("onnxruntime-tensorrt-rtx", "onnxruntime-tensorrt", "torch")
    ]
    records.append(record("triton", f"t.py::test_{'long' * 9}[triton]", message=f"it is down {'very ' * 30}"))
    lines = [line.text for line in terminal.summary_lines(records, 80)]
    assert max(map(columns, lines)) <= 80
    start = next(index for index, line in enumerate(lines) if line.startswith("system"))
    assert len({line.split()[0] for line in lines[start + 1 : start + 5]}) == 4, "the names are told apart"
    (found,) = systems.compared(records)
    assert typed(jsonable(found), ComparisonRecord) == found
