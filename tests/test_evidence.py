"""A job without a GPU that asks for the evidence of a run on one: the same check, passed there, or it fails here.

The report of the GPU's run is this machine's own, with what a GPU would have written into it.
"""

from __future__ import annotations

import inspect
import json
import os
import tokenize
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from onnx import numpy_helper

from pytest_trtcheck.model.sources.stated import Statement
from pytest_trtcheck.report import json_report
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite

CHECK = (
    '@trt_parity("conv.onnx", precision="fp16", batch={batch}, seed={seed}, tol={tol}{more})\n'
    "{latency}def test_it(): ...\n"
)
SECRET = "0123456789abcdef0123456789abcdef"
OPTIONS = ("--trt-gpu=H100", "--trt-backend=onnxruntime", "--trt-require-evidence=gpu.json")
Report = dict[str, Any]


def write(suite: Suite, *, batch: int = 1, seed: int = 0, tol: float = 1e-2, more: str = "", latency: str = "") -> None:
    suite.write(test_it=CHECK.format(batch=batch, seed=seed, tol=tol, more=more, latency=latency))


def on_gpu(report: Report) -> Report:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-1", "compute_capability": "9.0"}
    report["environment"] |= {"gpu": gpu, "driver": "580", "tensorrt": {"module": "tensorrt", "version": "11.4"}}
    for check in report["checks"]:
        check |= {"evidence": "engine", "gpu_ran": True, "backend": "tensorrt", "verdict": "pass", "outcome": "passed"}
    return report


@pytest.fixture
def proved(suite: Suite) -> Suite:
    """A suite whose check passed on an H100: gpu.json."""
    write(suite)
    save(suite, on_gpu(suite.run().report))
    return suite


def save(suite: Suite, report: Report) -> None:
    report["summary"] = dict(Counter(check["verdict"] for check in report["checks"]))
    (suite.path / "gpu.json").write_text(json.dumps(report))


def edited(suite: Suite, edit: Callable[[Report, Report], object]) -> None:
    report = json.loads((suite.path / "gpu.json").read_text())
    edit(report, report["checks"][0])
    save(suite, report)


def reason(run: Run) -> str:
    (record,) = run.checks
    assert record["verdict"] == "fail"
    assert "proof" not in record
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    message: str = record["message"]
    return message


def test_what_passed_on_the_gpu_is_proved(proved: Suite) -> None:
    run = proved.run(*OPTIONS, "--trt-html=report.html")
    (record,) = run.checks
    assert (record["verdict"], record["evidence"], record["gpu_ran"]) == ("pass", "emulated", False)
    assert record["proof"] == {
        "file": "gpu.json",
        "gpu": "NVIDIA H100 80GB HBM3 (compute capability 9.0)",
        "tensorrt": "tensorrt 11.4",
        "driver": "580",
        "signed": False,
    }
    assert "driver 580, by gpu.json (not signed)" in (proved.path / "report.html").read_text()
    pytest.importorskip("jsonschema", reason="validating the report needs jsonschema")
    from tests.test_report_json import validate

    validate(run.report)
    assert proved.run(*OPTIONS, "-n2", plugins=("xdist",)).check("test_it")["proof"] == record["proof"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 2}, "other shapes; other inputs"),
        ({"seed": 1}, "other inputs"),
        ({"tol": 1e-1}, "other tolerances"),
        ({"more": ", keep_fp32=['conv1']"}, "other lowered model"),
        ({"more": ", reference='twin.onnx'"}, "other reference"),
        (
            {"latency": "@trt_latency(p50_ms={'H100': 1.0}, min_speedup={'fp32': 2})\n"},
            "other budgets: none there, p50_ms 1, min_speedup[fp32] 2 here",
        ),
    ],
    ids=["shapes", "inputs", "tolerance", "lowering", "reference", "budgets"],
)
def test_another_check_proves_nothing(proved: Suite, change: dict[str, Any], said: str) -> None:
    write(proved, **change)
    twin = onnx_models.conv_net()
    twin.doc_string = "computes the same"
    onnx_models.save(twin, proved.path / "twin.onnx")
    assert reason(proved.run(*OPTIONS)).startswith(f"--trt-require-evidence=gpu.json: {said}")


def test_another_model_proves_nothing(proved: Suite) -> None:
    model = onnx_models.conv_net()
    weight = numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(1.01 * weight, model.graph.initializer[0].name))
    onnx_models.save(model, proved.path / "conv.onnx")
    assert "gpu.json: other model; other lowered model" in reason(proved.run(*OPTIONS))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda _, check: check.update(verdict="fail"), "there it is fail"),
        (lambda _, check: check.update(verdict="not_measured"), "there it is not measured"),
        (lambda _, check: check.update(evidence="emulated", gpu_ran=False), "no GPU is known to have run it there"),
        (lambda _, check: check.update(evidence="server", gpu_ran="unknown"), "no GPU is known to have run it there"),
        (lambda _, check: check.update(runs=3), "there it took 3 runs to pass"),
        (lambda _, check: check.update(outcome="failed"), "there its test failed"),
        (lambda _, check: check.update(outcome="skipped"), "there its test was skipped"),
        (lambda _, check: check.pop("outcome"), "there its test was not seen to end"),
        (
            lambda _, check: check.update(outcome="skipped", expected_failure="drifts"),
            "there its test was expected to fail, and did",
        ),
        (lambda _, check: check.update(evidence="provider", backend="torch"), "by torch, which is not TensorRT"),
        (lambda _, check: check["parity"].update(verdict="fail"), "there it contradicts itself"),
        (lambda run, check: run["checks"].append(check | {"verdict": "fail"}), "there it is fail"),
        (lambda run, check: run["checks"].insert(0, check | {"verdict": "error"}), "there it is error"),
        (lambda _, check: check.update(precision="bf16"), "it has this test in bf16, not in fp16"),
        (lambda _, check: check.update(nodeid="test_it.py::test_other"), "it holds no check of this test"),
        (lambda run, _: run["environment"]["gpu"].update(name="NVIDIA L4", compute_capability="8.9"), "on NVIDIA L4"),
        (lambda run, _: run["environment"]["gpu"].update(compute_capability="9"), "H100 80GB HBM3, not on H100"),
        (lambda run, _: run["environment"].update(gpu=None), "it ran on a GPU that it does not name, not on H100"),
    ],
)
def test_what_did_not_pass_on_the_gpu_proves_nothing(
    proved: Suite, edit: Callable[[Report, Report], object], said: str
) -> None:
    edited(proved, edit)
    assert said in reason(proved.run(*OPTIONS))


def test_a_latency_that_was_judged_there_is_left_unmeasured_here(proved: Suite) -> None:
    write(proved, latency="@trt_latency(p50_ms={'H100': 1.0})\n")
    save(proved, on_gpu(proved.run("--trt-gpu=H100", "--trt-backend=onnxruntime").report))
    judged = {"verdict": "pass", "name": "p50_ms", "quantile": "p50", "limit_ms": 1.0, "value_ms": 0.5}
    judged |= {"lower_ms": 0.4, "upper_ms": 0.6}
    edited(proved, lambda _, check: check["latency"].update(verdict="pass", reason=None, budgets=[judged]))
    (record,) = proved.run(*OPTIONS).checks
    assert (record["verdict"], record["latency"]["verdict"]) == ("pass", "not_measured")
    assert record["proof"]["gpu"]


JUDGED = """
from pytest_trtcheck import BuildOptions, Case, Tolerance, metrics

X = {{"image": np.random.default_rng(0).random((4, 3, 16, 16), np.float32)}}

def apart(actual, expected):
    return {apart} * abs(actual - expected).max()

def right(outputs, case):
    return {right} + (outputs["logits"].argmax(1) == case.labels)

def twin(inputs):
    import onnxruntime
    return {{"logits": {twin} * onnxruntime.InferenceSession("conv.onnx").run(None, inputs)[0]}}

@trt_parity("conv.onnx", tol=Tolerance(max=1e-2, parts={parts}))
def test_parts(): return X

@trt_parity("conv.onnx", tol=1e-2, metric=metrics.top1(axis={axis}))
def test_axis(): return X

@trt_parity("conv.onnx", tol=Tolerance(metrics={{apart: 0.1}}))
def test_metric(): return X

@trt_parity("conv.onnx", score=right, max_drop=0.5, aggregate={aggregate})
def test_score(): return [Case(X, np.arange(4))] * 10

@trt_parity("conv.onnx", reference=twin)
def test_reference(): return X

@trt_parity("conv.onnx", tol={tol})
def test_plain(): return X

def set_up(config):
    config.avg_timing_iterations = {iterations}

@trt_parity("conv.onnx", precision="fp32", tol={tol})
def test_fp32(): return X

class TestBuilt:
    @pytest.fixture
    def trt_build_options(self):
        return BuildOptions(configure=set_up)

    @trt_parity("conv.onnx")
    def test_options(self): return X
"""
THERE = {
    "apart": 1,
    "right": 1,
    "twin": "1.0",
    "parts": None,
    "axis": 0,
    "aggregate": None,
    "tol": None,
    "iterations": 1,
}
HERE = {
    "apart": 2,
    "right": 2,
    "twin": "1.001",
    "parts": "'auto'",
    "axis": 1,
    "aggregate": "np.median",
    "tol": 1e-2,
    "iterations": 2,
}


def test_another_way_to_judge_proves_nothing(suite: Suite) -> None:
    suite.write(test_it=JUDGED.format(**THERE))
    save(suite, on_gpu(suite.run().report))
    assert {record["verdict"] for record in suite.run(*OPTIONS).checks} == {"pass", "not_measured"}
    suite.write(test_it=JUDGED.format(**HERE))
    messages = {check["nodeid"].rpartition("::test_")[2]: check["message"] for check in suite.run(*OPTIONS).checks}
    found = {test: message and message.partition("\n")[0] for test, message in messages.items()}
    begin = "--trt-require-evidence=gpu.json: other "
    assert found == {
        "parts": f"{begin}tolerances",
        "axis": f"{begin}tolerances",
        "metric": f"{begin}tolerances",
        "score": f"{begin}score",
        "reference": f"{begin}reference",
        "fp32": f"{begin}limits",
        "options": f"{begin}build options",
        # The same limit, written down.
        "plain": None,
    }


HOLDING = """
import functools, operator, threading
from dataclasses import dataclass
from pytest_trtcheck import Case

X = {{"image": np.random.default_rng(0).random((4, 3, 16, 16), np.float32)}}
LIMIT = {limit}

def right(outputs, case):
    return 1 + (outputs["logits"].argmax(1) == case.labels)

def within(limit):
    def close(outputs, case):
        return right(outputs, case) + limit
    return close

@dataclass
class Accuracy:
    threshold: float

    def __call__(self, outputs, case):
        return right(outputs, case) + self.threshold

    def score(self, outputs, case):
        return self(outputs, case)

class Shifted(Accuracy):
    SHIFT = LIMIT

def default(outputs, case, limit=LIMIT):
    return right(outputs, case) + limit

def keyword(outputs, case, *, limit=LIMIT):
    return right(outputs, case) + limit

def reads(outputs, case):
    return right(outputs, case) + LIMIT

def calls(outputs, case):
    return reads(outputs, case)

@functools.wraps(right)
def wrapped(outputs, case):
    return right(outputs, case) + LIMIT

def bound(held, outputs, case):
    return right(outputs, case)

class Tokenizer:
    def __init__(self, held):
        self.held, self.me = held, self

ARRAY = np.zeros(5000)
ARRAY[2500] = LIMIT
LAMBDAS = [lambda outputs, case: right(outputs, case), lambda outputs, case: right(outputs, case) + 1]

SCORES = {{
    "closure": within(LIMIT),
    "object": Accuracy(LIMIT),
    "method": Accuracy(LIMIT).score,
    "class": Shifted(1),
    "default": default,
    "keyword": keyword,
    "global": reads,
    "called": calls,
    "wrapped": wrapped,
    "cached": functools.partial(bound, functools.lru_cache(within(LIMIT))),
    "lambda": LAMBDAS[LIMIT],
    "array": functools.partial(bound, ARRAY),
    "set": functools.partial(bound, {{"a", "b", str(LIMIT)}}),
    "plain": functools.partial(bound, Tokenizer(LIMIT)),
    "same": functools.partial(bound, (Tokenizer({{"a", "b", "c", Accuracy, np.add, threading.Lock}}), np.arange(5000))),
    "untold": functools.partial(bound, (each for each in "ab")),
}}

@pytest.mark.parametrize("name", SCORES)
def test_it(name, trt_check):
    trt_check("conv.onnx", [Case(X, np.arange(4))] * 10, score=SCORES[name], max_drop=0.5, tol=1e-2)
"""


def test_what_a_function_holds_is_part_of_it(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Report]] = []
    for limit, seed in ((0, "1"), (0, "2"), (1, "2")):
        suite.write(test_it=HOLDING.format(limit=limit))
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        options = OPTIONS if asked else OPTIONS[:2]
        asked.append({record["nodeid"].partition("[")[2][:-1]: record for record in suite.run_apart(*options).checks})
        if len(asked) == 1:
            save(suite, on_gpu(json.loads((suite.path / "report.json").read_text())))
    first, again, other = asked
    assert {record["verdict"] for record in first.values()} == {"pass"}
    assert [name for name in first if first[name]["asked"] != again[name]["asked"]] == []
    assert [name for name, record in again.items() if record["verdict"] != "pass"] == ["untold"]
    assert "whether the score is the same: it holds a generator" in again["untold"]["message"]
    assert [name for name, record in other.items() if record["verdict"] == "pass"] == ["same"]
    assert {record["message"].partition("=gpu.json: ")[2].partition("\n")[0] for name, record in other.items()
            if name not in {"same", "untold"}} == {"other score"}  # fmt: skip


@pytest.mark.parametrize("error", [SyntaxError("changed"), tokenize.TokenError("changed"), IndexError("changed")])
def test_a_source_that_cannot_be_read_is_no_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(_: object) -> str:
        raise error

    monkeypatch.setattr(inspect, "getsource", refuse)
    stated = [Statement().of(lambda: 1), Statement().of(lambda: 2)]
    assert all("source unknown" in each for each in stated)
    assert len(set(stated)) == 2


def test_an_object_that_raises_is_no_error() -> None:
    class Hostile:
        def __reduce_ex__(self, _: object) -> str:
            raise RuntimeError

    statement = Statement()
    statement.of([Hostile(), list(range(200_000))])
    assert [each.rpartition(".")[2] for each in statement.untold] == ["Hostile", "a list"]


def test_another_way_to_measure_proves_nothing(proved: Suite) -> None:
    judged = {"verdict": "pass", "name": "p50_ms", "quantile": "p50", "limit_ms": 1.0, "value_ms": 0.5}
    write(proved, latency="@trt_latency(p50_ms=1.0)\n")
    save(proved, on_gpu(proved.run("--trt-gpu=H100", "--trt-backend=onnxruntime").report))
    edited(proved, lambda _, check: check["latency"].update(verdict="pass", reason=None, budgets=[judged]))
    assert proved.run(*OPTIONS).checks[0]["verdict"] == "pass"
    for more in ("transfers=True", "instances=2"):
        write(proved, latency=f"@trt_latency(p50_ms=1.0, {more})\n")
        assert reason(proved.run(*OPTIONS)) == "--trt-require-evidence=gpu.json: other latency settings"


def test_a_check_that_refuses_more_is_not_proved_by_one_that_refused_less(proved: Suite) -> None:
    write(proved, more=", search=3")
    other = "--trt-require-evidence=gpu.json: other search for the worst input"
    assert reason(proved.run(*OPTIONS)) == other
    write(proved)
    assert reason(proved.run(*OPTIONS, "--trt-search=3")) == other
    assert reason(proved.run(*OPTIONS, "-o", "trt_bitwise=true")).endswith("other bitwise comparison of runs")
    save(proved, on_gpu(proved.run("--trt-search=4", "-o", "trt_bitwise=true").report))
    for less in ((), ("--trt-search=3",)):
        assert proved.run(*OPTIONS, *less).checks[0]["verdict"] == "pass"
    assert reason(proved.run(*OPTIONS, "--trt-search=5")) == other
    edited(proved, lambda _, check: check["search"].update(tries=2))
    cut = "--trt-require-evidence=gpu.json: the search for the worst input was cut short there: 2 of 4 tries"
    assert reason(proved.run(*OPTIONS, "--trt-search=3")) == cut
    write(proved, more=", max_subgraphs=2")
    assert reason(proved.run(*OPTIONS)).endswith("other max_subgraphs")


def test_more_builds_than_were_judged_there_are_not_proved(suite: Suite) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    write(suite)
    options = ("--trt-gpu=L4", "--trt-backend=tensorrt_rtx")
    gpu = {"name": "NVIDIA L4", "uuid": "GPU-1", "compute_capability": "8.9"}
    for builds, proved_by in ((1, 1), (3, 3), (1, 3), (3, 1)):
        report = on_gpu(suite.run(*options, f"--trt-rebuild={proved_by}").report)
        report["environment"] |= {"gpu": gpu, "tensorrt": {"module": "tensorrt_rtx", "version": rtx.__version__}}
        save(suite, report)
        run = suite.run(*options, f"--trt-rebuild={builds}", OPTIONS[-1])
        if builds <= proved_by:
            assert run.checks[0]["verdict"] == "pass", run.text
        else:
            assert reason(run) == "--trt-require-evidence=gpu.json: other number of builds"


def test_a_budget_that_was_not_measured_there_proves_none(proved: Suite) -> None:
    write(proved, latency="@trt_latency(p50_ms={'H100': 1.0})\n")
    save(proved, on_gpu(proved.run("--trt-gpu=H100", "--trt-backend=onnxruntime").report))
    assert "other budgets: none there, p50_ms 1 here" in reason(proved.run(*OPTIONS))


def test_a_failure_here_stays_one(proved: Suite) -> None:
    write(proved, tol=1e-9)
    (record,) = proved.run(*OPTIONS).checks
    assert "the precision is to blame" in record["message"]
    assert any("--trt-require-evidence=gpu.json: other tolerances" in note for note in record["notes"])


def test_a_signed_report_is_verified(proved: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    run = json_report.read(proved.path / "gpu.json")
    json_report.save(proved.path / "gpu.json", run, SECRET.encode())
    monkeypatch.setenv("EVIDENCE", SECRET)
    (proved.path / "secret").write_text(SECRET + "\n")
    for encoding in ("utf-16", "utf-8-sig"):  # as PowerShell writes it
        (proved.path / encoding).write_text(f"{SECRET}\r\n", encoding)
    for key in ("EVIDENCE", "secret", "utf-16", "utf-8-sig"):
        assert proved.run(*OPTIONS, f"--trt-evidence-key={key}").checks[0]["proof"]["signed"] is True
    edited(proved, lambda _, check: check["parity"].update(worst=0.0))
    assert "gpu.json is not what was signed" in proved.run(*OPTIONS, "--trt-evidence-key=secret").text
    edited(proved, lambda run, _: run.pop("signature"))
    assert "gpu.json is not signed" in proved.run(*OPTIONS, "--trt-evidence-key=secret").text


@pytest.mark.skipif(os.name != "posix", reason="Windows has no variables that are no text")
def test_a_secret_need_not_be_text(proved: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIDENCE", os.fsdecode(b"\xff\xfe" + b"\xd8" * 21))
    proved.run("--trt-evidence-key=EVIDENCE")
    assert json_report.read(proved.path / "report.json", b"\xff\xfe" + b"\xd8" * 21)


def test_a_run_signs_its_report(proved: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIDENCE", SECRET)
    for workers in ((), ("-n2",)):
        proved.run("--trt-evidence-key=EVIDENCE", *workers, plugins=("xdist",))
        path = proved.path / "report.json"
        assert json_report.read(path, SECRET.encode()) == json_report.read(path)
        with pytest.raises(Exception, match="signed with another key"):
            json_report.read(path, b"another secret of enough bytes")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trt-require-evidence=gpu.json",), "no GPU is named"),
        (("--trt-require-evidence=gone.json", "--trt-gpu=H100"), "cannot read the report"),
        (("--trt-evidence-key=NOT_SET",), "--trt-evidence-key=NOT_SET: is neither a file nor an environment variable"),
        (("--trt-evidence-key=keys/of_the_fleet.key",), "=keys/of_the_fleet.key: is neither a file"),
        ((f"--trt-evidence-key={SECRET}",), "--trt-evidence-key=…: is neither a file nor an environment variable"),
        ((f"--trt-evidence-key={SECRET * 99}",), "--trt-evidence-key=…: "),
        (("--trt-evidence-key=short",), "holds 6 bytes"),
    ],
)
def test_what_cannot_be_used_is_an_error_before_the_first_test(
    proved: Suite, arguments: tuple[str, ...], said: str
) -> None:
    Path(proved.path, "short").write_text("secret")
    run = proved.run(*arguments)
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert said in run.text
