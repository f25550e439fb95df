"""The plugin as its users meet it: real pytest, real models, real ONNX Runtime."""

from __future__ import annotations

import ntpath
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pytest_trtcheck.plugin import options
from pytest_trtcheck.report import json_report
from tests import onnx_models
from tests.conftest import LEFT_OUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite

MIXED = """
@trt_parity("conv.onnx", batch=2)
def test_pass(): ...

@trt_parity("conv.onnx", batch=2, tol=1e-7)
def test_fail(): ...

@trt_parity("missing.onnx")
def test_error(): ...

@trt_parity("conv.onnx", precision="fp32", batch=1)
def test_not_measured(): ...

@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=[1, 4])
def test_grid(): ...

@trt_latency(p50_ms=5.0)
@trt_parity("conv.onnx", batch=1)
def test_both(): ...

@trt_latency(p50_ms={"T4": 5.0})
def test_latency_only(trt_model): ...

@pytest.fixture
def trt_model():
    return "gemm.onnx"

@pytest.mark.xfail(strict=True, reason="known to be bad")
@pytest.mark.trt_parity("conv.onnx", batch=1, tol=0)
def test_expected(): ...

def test_plain(): ...
"""


def test_every_outcome_is_the_same_everywhere(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(test_mixed=MIXED)
    run = run_everywhere()
    run.result.assert_outcomes(passed=7, failed=2, skipped=2, xfailed=1)
    verdicts = {record["nodeid"].partition("::")[2]: record["verdict"] for record in run.checks}
    assert verdicts == {
        "test_pass": "pass",
        "test_fail": "fail",
        "test_error": "error",
        "test_not_measured": "not_measured",
        "test_grid[fp16-batch1]": "pass",
        "test_grid[fp16-batch4]": "pass",
        "test_grid[bf16-batch1]": "pass",
        "test_grid[bf16-batch4]": "pass",
        "test_both": "pass",
        "test_latency_only": "not_measured",
        "test_expected": "fail",
    }
    assert run.check("test_pass")["evidence"] == "emulated"
    assert run.check("test_pass")["parity"]["worst"] > 1e-7
    assert run.check("test_both")["latency"]["verdict"] == "not_measured"
    assert "emulated" in run.text
    assert "no GPU" in run.text
    assert "Traceback" not in run.text
    assert "pytest_trtcheck/" not in run.text


def test_summary_is_the_same_everywhere(suite: Suite) -> None:
    suite.write(test_mixed=MIXED)
    suite.run()
    tables = []
    for run, *extra in ((suite.run,), (suite.run, "-n0"), (suite.run_apart, "-n2")):
        text = run(*extra).text
        tables.append(text[text.index("inference checks") : text.index("short test summary")])
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('@trt_parity("conv.onnx", precision="fp61")', "trt_parity: precision='fp61'"),
        ('@trt_parity("conv.onnx", tolerance=1)', "trt_parity: unknown argument 'tolerance'"),
        ('@trt_parity("conv.onnx", metric="mse")', "trt_parity: metric='mse'"),
        ('@trt_parity("conv.onnx", "int8")', "trt_parity: takes one positional argument"),
        ('@trt_latency(p50_ms={"T5": 1.0})\n@trt_parity("conv.onnx")', "trt_latency: p50_ms"),
        ('@trt_parity("conv.onnx")\n@trt_parity("gemm.onnx")', "given twice"),
        ('@trt_parity("conv.onnx", precision="int8", batch=1)', "no calibration data is given"),
        ('@trt_parity("conv.onnx", precision="int8", batch=1, calibration="none/*.npz")', "no file matches"),
        ('@trt_parity("conv.onnx")', "these dimensions are free: image[0] (batch)"),
        ('@trt_parity("conv.onnx", batch=1, keep_fp32="convv1")', "no node is called 'convv1'"),
        ('@trt_parity("conv.onnx", batch=1, tol={"logitz": 1})', "matches no output"),
        ('@trt_parity("text.onnx")', "not an ONNX model"),
        ("@trt_parity()", "no model is named"),
    ],
)
def test_bad_input_fails_its_test_alone(suite: Suite, marker: str, message: str) -> None:
    (suite.path / "text.onnx").write_text("no model")
    suite.write(test_bad=f"{marker}\ndef test_bad(): ...\n\ndef test_next(): ...\n")
    run = suite.run()
    outcomes = run.result.parseoutcomes()
    assert outcomes["passed"] == 1
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == 1
    assert message in run.text
    assert "Traceback" not in run.text
    assert run.check("test_bad")["verdict"] == "error"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ('{"img": np.zeros((1, 3, 16, 16), np.float32)}', "has no input 'img'"),
        ("np.zeros((1, 3, 16, 16))", "expected float32, got float64"),
        ("np.zeros((3, 16, 16), np.float32)", "expected rank 4"),
        ("np.full((1, 3, 16, 16), np.nan, np.float32)", "NaN in 768 of"),
        ('"image.png"', "expected a mapping"),
        ("[]", "empty list"),
    ],
)
def test_bad_returned_inputs(suite: Suite, returned: str, message: str) -> None:
    suite.write(test_bad=f'@trt_parity("conv.onnx")\ndef test_bad():\n    return {returned}\n\ndef test_next(): ...\n')
    run = suite.run()
    run.result.assert_outcomes(passed=1, failed=1)
    assert message in run.text


def test_inputs_returned_from_a_fixture_or_generated(suite: Suite) -> None:
    suite.write(
        test_inputs="""
@pytest.fixture
def given():
    return np.ones((2, 3, 16, 16), np.float32)

@trt_parity("conv.onnx")
def test_returned(given):
    return [given, {"image": given * 0.5}]

@trt_parity("conv.onnx", batch=1)
def test_generated(): ...

class TestFixture:
    @pytest.fixture
    def trt_inputs(self, given):
        return given

    @trt_parity("conv.onnx")
    def test_fixture(self): ...
"""
    )
    run = suite.run()
    run.result.assert_outcomes(passed=3)
    assert [(r["inputs"], r["cases"]) for r in run.checks] == [
        ("trt_inputs", 1),
        ("generated", 1),
        ("returned", 2),
    ] or {(r["inputs"], r["cases"]) for r in run.checks} == {("trt_inputs", 1), ("generated", 1), ("returned", 2)}
    assert any("generated (seed 0)" in note for note in run.check("test_generated")["notes"])


def test_by_hand(suite: Suite) -> None:
    suite.write(
        test_hand="""
def test_by_hand(trt_build, trt_reference, trt_check, trt_gpu):
    image = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    engine = trt_build("conv.onnx", precision="fp16")
    assert engine.evidence == "emulated"
    assert trt_gpu is None
    outputs = engine({"image": image})
    expected = trt_reference("conv.onnx")({"image": image})
    assert list(outputs) == list(expected) == ["logits"]
    assert 0 < np.abs(outputs["logits"] - expected["logits"]).max() < 0.01
    record = trt_check("conv.onnx", image, precision="bf16", tol=0.05)
    assert record.verdict == "pass"
    trt_check("conv.onnx", image, precision="fp16", tol=1e-9)

@trt_parity("conv.onnx", precision=["fp16", "bf16"], batch=2)
def test_engine(trt_engine):
    assert trt_engine({"image": np.zeros((2, 3, 16, 16), np.float32)})["logits"].shape == (2, 10)
    with pytest.raises(CheckError, match="batch=2 is declared, input 'image' holds 1 row"):
        trt_engine({"image": np.zeros((1, 3, 16, 16), np.float32)})

def test_unmarked(trt_engine): ...
"""
    )
    run = suite.run()
    run.result.assert_outcomes(passed=2, failed=1, errors=1)
    assert [record["verdict"] for record in run.checks if "by_hand" in record["nodeid"]] == ["pass", "fail"]
    assert "has no trt_parity marker" in run.text


def test_onnx_file_on_the_command_line(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    run = run_everywhere("conv.onnx", "--trt-precision=fp16,bf16")
    run.result.assert_outcomes(passed=2)
    assert {record["nodeid"] for record in run.checks} == {"conv.onnx::fp16", "conv.onnx::bf16"}
    assert "taken as 1" in run.checks[0]["notes"][1]


def test_onnx_files_are_never_collected_by_walking(suite: Suite) -> None:
    suite.write(test_plain="def test_plain(): ...\n")
    run = suite.run()
    run.result.assert_outcomes(passed=1)
    (suite.path / "pytest.ini").write_text("[pytest]\ntrt_collect =\n    conv.*\n")
    run = suite.run()
    run.result.assert_outcomes(passed=2)
    assert [record["nodeid"] for record in run.checks] == ["conv.onnx::parity"]


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_models_that_trt_collect_asks_for_and_pytest_does_not_come_by_are_named(
    suite: Suite, workers: tuple[str, ...]
) -> None:
    (suite.path / "tests").mkdir()
    (suite.path / "tests/test_plain.py").write_text("def test_plain(): ...\n")
    ini = "[pytest]\ntestpaths = {}\ntrt_collect =\n    ./conv.*\n    gone/*.onnx\n"
    says = "trt_collect: no file of {!r} was collected: not checked"
    for paths, passed, missing in ((". ", 2, ["gone/*.onnx"]), ("tests", 1, ["./conv.*", "gone/*.onnx"])):
        suite.pytester.makeini(ini.format(paths))
        run = suite.run(*workers)
        run.result.assert_outcomes(passed=passed)
        assert [glob for glob in ("./conv.*", "gone/*.onnx") if says.format(glob) in run.text] == missing
        for part in (("tests",), ("-kplain",)):
            assert "trt_collect:" not in suite.run(*part, *workers).text


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_settings_for_a_model_that_was_not_collected_are_named(suite: Suite, workers: tuple[str, ...]) -> None:
    suite.pytester.makeini(
        "[pytest]\ntrt_collect = conv.*\ntrt_shapes =\n    conv.onnx=image:2x3x16x16\n    cnov.onnx=image:2x3x16x16\n"
    )
    says = "trt_shapes: no model 'cnov.onnx' was collected: not used"
    run = suite.run(*workers)
    run.result.assert_outcomes(passed=1)
    assert says in run.text
    assert "'conv.onnx' was" not in run.text
    for part in (("conv.onnx",), ("-kconv",)):
        assert "not used" not in suite.run(*part, *workers).text


def test_require_gpu_fails_what_no_gpu_ran(suite: Suite) -> None:
    suite.write(test_mixed=MIXED)
    run = suite.run("--trt-require-gpu")
    # What was expected to fail is no failure of an engine: no GPU ran one.
    run.result.assert_outcomes(passed=1, failed=11)
    assert "emulated on the CPU" in run.check("test_pass")["message"]
    suite.write(
        test_mixed="""
def test_by_hand(trt_build, trt_reference):
    trt_build("conv.onnx", precision="fp16")

@pytest.mark.xfail
def test_by_hand_and_expected(trt_build):
    trt_build("conv.onnx", precision="fp16")

def test_reference(trt_reference):
    trt_reference("conv.onnx")
"""
    )
    run = suite.run("--trt-require-gpu")
    run.result.assert_outcomes(passed=1, failed=2)
    assert run.text.count("--trt-require-gpu: what trt_build gives runs on no GPU") >= 2
    suite.run().result.assert_outcomes(passed=2, xpassed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trt-gpu=T5",), "T5"),
        (("--trt-backend=trt",), "--trt-backend: 'trt' is none of"),
        (("--trt-precision=fp12",), "--trt-precision: 'fp12'"),
        (("--trt-baseline=out",), "there is no such directory"),
        (("--trt-gpu=T4", "--trt-gpu", "A100"), "name them in one: --trt-gpu=T4,A100"),
        (("conv.onnx", "--trt-precision=fp16", "--trt-precision=int8"), "--trt-precision: given 2 times"),
        (("--trt-update-baseline",), "--trt-update-baseline: no directory to write to is named"),
        (("-o", "trt_cache_size=lots"), "ini key trt_cache_size"),
        (("-o", "trt_gpus=Board"), "trt_gpus"),
    ],
)
def test_bad_options_are_usage_errors(suite: Suite, arguments: tuple[str, ...], message: str) -> None:
    suite.write(test_plain="def test_plain(): ...\n")
    run = suite.run(*arguments)
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in run.text
    assert "Traceback" not in run.text


def test_a_flag_may_stand_twice_where_nothing_is_lost(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\naddopts = --trt-precision=bf16\n")
    run = suite.run("conv.onnx", "--trt-precision=fp16", "--trt-precision=fp16", "--trt-diagnose=1", "--trt-diagnose=2")
    run.result.assert_outcomes(passed=1)
    assert run.checks[0]["precision"] == "fp16"


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_a_misspelled_variable_fails_what_checks(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]
) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n', test_plain="def test_plain(): ...\n")
    monkeypatch.setenv("TRTCHECK_REQUIRES_GPU", "1")
    run = suite.run(*workers)
    run.result.assert_outcomes(passed=1, failed=1)
    assert "environment variable TRTCHECK_REQUIRES_GPU: there is no such option" in run.text
    assert "did you mean 'TRTCHECK_REQUIRE_GPU'?" in run.text
    plain = suite.run("test_plain.py", *workers)
    assert plain.result.ret == 0
    assert "TRTCHECK_REQUIRES_GPU" not in plain.text


@pytest.mark.parametrize("key", ["trt_requires_gpu", "trt-require-gpu", "trtcheck_require_gpu"])
@pytest.mark.parametrize("where", ["file", "-o"])
def test_a_misspelled_ini_key_fails_what_checks(suite: Suite, key: str, where: str) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n', test_plain="def test_plain(): ...\n")
    if where == "file":
        suite.pytester.makeini(f"[pytest]\n{key} = true\n")
    given = ("-W", "ignore", *(("-o", f"{key}=true") if where == "-o" else ()))
    run = suite.run(*given)
    run.result.assert_outcomes(passed=1, failed=1)
    assert f"ini key {key}: there is no such option" in run.text
    assert "did you mean 'trt_require_gpu'?" in run.text
    assert suite.run("test_plain.py", *given).result.ret == 0


def test_an_ini_key_of_something_else_is_no_error(suite: Suite) -> None:
    suite.write(
        conftest="def pytest_addoption(parser):\n    parser.addini('trt_gpu_', '')\n",
        test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n',
    )
    suite.pytester.makeini("[pytest]\ntrt_gpu_ = 1\ntrt_new = 1\ntrtexec_gpu = 1\nrequire_gpu = 1\n")
    suite.run("-W", "ignore").result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "toml",
    ['trt_precision = ["fp16", "bf16"]\ntrt_batch = ["1", "2"]', 'trt_precision = "fp16, bf16"\ntrt_batch = "1,2"'],
)
def test_several_values_may_be_a_list_in_toml(suite: Suite, toml: str) -> None:
    suite.pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\n{toml}\n")
    run = suite.run("conv.onnx")
    assert len(run.checks) == 4
    assert run.result.ret == 0


def test_a_list_where_one_value_is_expected_is_a_usage_error(suite: Suite) -> None:
    suite.write(test_plain="def test_plain(): ...\n")
    suite.pytester.makepyprojecttoml('[tool.pytest.ini_options]\ntrt_baseline = ["a", "b"]\n')
    run = suite.run()
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "INTERNALERROR" not in run.text


def test_a_variable_of_something_else_is_no_error(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.write(test_it='@trt_parity("conv.onnx", batch=1)\ndef test_it(): ...\n', test_plain="def test_plain(): ...\n")
    others = ("SECRET", "EVIDENCE_SECRET", "CACHE_SECRET", "CSV", "ANYTHING_NEW")
    for each in others:
        monkeypatch.setenv(f"TRTCHECK_{each}", "0123456789abcdef")
    run = suite.run("--trt-evidence-key=TRTCHECK_SECRET", "--trt-require-gpu")
    run.result.assert_outcomes(passed=1, failed=1)  # no GPU
    assert "TRTCHECK_SECRET is" not in run.text
    for each in others[1:]:
        assert f"environment variable TRTCHECK_{each} is no option's: not used" in run.text
    plain = suite.run("test_plain.py")
    assert plain.result.ret == 0
    assert "environment variable" not in plain.text


def test_windows_has_the_names_of_variables_in_capitals(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"TRTCHECK_SECRET": "0123456789abcdef", "TRTCHECK_GPU": "T4"}
    given = {"trt_evidence_key": "TRTCHECK_secret"}
    monkeypatch.setattr(options, "value", lambda _, name: given.get(name))
    assert options.unknown_variables(pytestconfig, environ) == ["TRTCHECK_SECRET"]
    monkeypatch.setattr(os.path, "normcase", ntpath.normcase)
    assert options.unknown_variables(pytestconfig, environ) == []


def test_cache_show_and_clear(suite: Suite) -> None:
    cache = f"--trt-cache-dir={suite.path / 'cache'}"
    suite.write(test_pass='@trt_parity("conv.onnx", batch=1)\ndef test_pass(): ...\n')
    assert suite.run(cache).result.ret == 0
    shown = suite.run(cache, "--trt-cache-show")
    for kind in ("reference outputs", "lowered model: fp16", "emulated outputs: fp16"):
        assert f"\n  {kind} " in shown.text
    assert "\nconv.onnx " in shown.text
    cleared = suite.run(cache, "--trt-cache-clear", "--collect-only", "-q")
    assert cleared.result.ret == 0
    assert "conv.onnx" not in suite.run(cache, "--trt-cache-show").text


def test_the_cache_is_shown_and_cleared_of_one_model(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cache = f"--trt-cache-dir={suite.path / 'cache'}"
    assert suite.run(cache, "conv.onnx", "gemm.onnx").result.ret == 0
    shown = suite.run(cache, "--trt-cache-show", "--trt-cache-model=conv.onnx").text
    assert ("\nconv.onnx " in shown, "gemm.onnx" in shown) == (True, False)
    assert re.search(r"^\d+ entries, [\d.]+ KiB of [\d.]+ KiB \(limit 20.0 GiB\)$", shown, re.MULTILINE)
    both = suite.run(cache, "--trt-cache-show", "--trt-cache-clear", "--trt-cache-model=*gemm*").text
    assert re.match(r"removed \d+ entries\n", both)
    assert ("\nconv.onnx " in both, "gemm.onnx" in both) == (True, False)
    for arguments, said in (
        (["--trt-cache-show", "--trt-cache-model=covn.onnx"], "did you mean 'conv.onnx'?"),
        (["--trt-cache-clear", "--trt-cache-model=gemm.onnx"], "nothing of it is in the cache"),
        (["--trt-cache-model=conv.onnx"], "add --trt-cache-show or --trt-cache-clear"),
    ):
        run = suite.run(cache, *arguments)
        assert run.result.ret == pytest.ExitCode.USAGE_ERROR
        assert said in run.text


def test_junit_carries_the_record(suite: Suite) -> None:
    suite.write(test_pass='@trt_parity("conv.onnx", batch=1)\ndef test_pass(): ...\n')
    suite.run("--junitxml=junit.xml")
    text = (suite.path / "junit.xml").read_text()
    assert 'name="trtcheck"' in text
    assert 'name="trtcheck.verdict" value="pass"' in text


def test_markers_are_documented(suite: Suite) -> None:
    text = suite.run("--markers").text
    assert "@pytest.mark.trt_parity(model, precision, tol, metric='max'" in text
    assert "@pytest.mark.trt_latency(p50_ms" in text


def test_a_model_that_swaps_its_outputs_is_caught(suite: Suite) -> None:
    """Planted faults on the side of the user: what the test compares is not the model it ships."""
    suite.write(
        test_faults="""
import onnx

def altered(change):
    proto = onnx.load("conv.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name == "w2":
            array = onnx.numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w2"))
    return proto

@pytest.mark.parametrize("fault", ["none", "scaled", "flipped"])
def test_fault(fault, trt_build, trt_reference):
    def change(array):
        if fault == "scaled":
            array *= 1.05
        if fault == "flipped":
            array[3] *= -1
    image = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    y = trt_build(altered(change))({"image": image})["logits"]
    r = trt_reference("conv.onnx")({"image": image})["logits"]
    assert np.abs(y - r).max() / np.abs(r).max() < 1e-2
"""
    )
    suite.run().result.assert_outcomes(passed=1, failed=2)


@pytest.mark.parametrize("arguments", [["--help"], ["--collect-only", "-q"]])
def test_a_suite_without_trt_tests_loads_no_heavy_library(suite: Suite, arguments: list[str]) -> None:
    suite.write()
    (suite.path / "test_plain.py").write_text("def test_plain(): ...\n")
    code = (
        "import sys, pytest\n"
        f"status = pytest.main({arguments!r})\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'cuda', 'hypothesis'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)), int(status))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=suite.path,
        capture_output=True,
        text=True,
        check=True,
        env={
            **__import__("os").environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "pytest_trtcheck.plugin.hooks",
        },
    )
    assert result.stdout.strip().endswith("loaded: [] 0"), result.stdout + result.stderr


def test_a_script_that_imports_the_package_runs_pytest_without_a_warning(suite: Suite) -> None:
    (suite.path / "test_plain.py").write_text("def test_plain(): ...\n")
    arguments = ["-W", "error", *(f"-pno:{name}" for name in LEFT_OUT)]
    code = f"import pytest_trtcheck, pytest\nraise SystemExit(pytest.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=suite.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_real_models_from_packages(suite: Suite) -> None:
    suite.write(
        test_real=f"""
@trt_parity({str(onnx_models.nudenet())!r}, shapes={{"images": (1, 3, 320, 320)}})
def test_nudenet(): ...

@trt_parity({str(onnx_models.magika())!r}, precision=["fp16", "bf16"], batch=1)
def test_magika():
    return np.random.default_rng(0).integers(0, 257, (1, 2048)).astype(np.int32)
"""
    )
    run = suite.run()
    run.result.assert_outcomes(passed=2, failed=1)
    assert run.check("test_magika[fp16]")["parity"]["outputs"][0]["l2"] == pytest.approx(1.03, abs=0.01)
    assert np.isclose(run.check("test_nudenet")["parity"]["outputs"][0]["l2"], 4.6e-4, rtol=0.5)


FROM_FIXTURES = """
@pytest.fixture
def trt_model():
    return "conv.onnx"

@trt_parity(precision=["fp16", "bf16"], batch=[1, 2])
def test_lists(): ...

@pytest.mark.trt_parity(batch=1)
class TestMarkedClass:
    def test_method(self): ...

    @staticmethod
    def test_static(): ...

class TestOther:
    @pytest.fixture(params=["conv.onnx", "./conv.onnx"])
    def trt_model(self, request):
        return request.param

    @trt_parity(precision=["fp16", "bf16"], batch=1)
    def test_models_times_precisions(self): ...
"""


def test_the_model_comes_from_its_fixture_wherever_the_marker_stands(
    suite: Suite, run_everywhere: Callable[..., Run]
) -> None:
    suite.write(test_fixtures=FROM_FIXTURES)
    run = run_everywhere()
    run.result.assert_outcomes(passed=10)
    models = {record["nodeid"].partition("::")[2]: record["model"] for record in run.checks}
    assert models["test_lists[fp16-batch1]"] == "conv.onnx" or models["test_lists[batch1-fp16]"] == "conv.onnx"
    assert sorted(model for name, model in models.items() if "times" in name) == ["./conv.onnx"] * 2 + ["conv.onnx"] * 2


PARAMETERS_IN_VAIN = """
FED = [{"image": np.full((1, 3, 16, 16), each, np.float32)} for each in (0.5, 1)]

@pytest.mark.parametrize("trt_model", ["conv.onnx", "other.onnx"])
@trt_parity("conv.onnx", batch=1)
def test_model(trt_model): ...

@pytest.mark.parametrize("trt_calibration", [FED, FED[:1]])
@trt_parity("conv.onnx", precision="int8", calibration=FED)
def test_calibration(): ...

@pytest.mark.parametrize("trt_inputs", FED)
@trt_parity("conv.onnx")
def test_inputs():
    return FED[0]

@pytest.fixture
def doubled(trt_inputs):
    return {name: 2 * array for name, array in trt_inputs.items()}

@pytest.mark.parametrize("trt_inputs", FED)
@trt_parity("conv.onnx")
class TestSound:
    def test_plain(self): ...

    def test_argument(self, trt_inputs):
        return trt_inputs

    def test_request(self, request):
        return request.getfixturevalue("trt_inputs")

    def test_fixture(self, doubled):
        return doubled
"""


def test_a_test_for_each_of_what_none_of_them_checks_is_refused(
    suite: Suite, run_everywhere: Callable[..., Run]
) -> None:
    suite.write(test_vain=PARAMETERS_IN_VAIN)
    run = run_everywhere()
    run.result.assert_outcomes(passed=8, errors=4, failed=2)
    assert [each["code"] for each in run.checks if each["verdict"] == "error"] == ["argument-conflict"] * 6
    for name in ("trt_model", "trt_calibration", "trt_inputs"):
        assert f"there is a test for each {name}, and all would" in " ".join(run.text.split())


def test_a_benchmark_without_a_gpu_is_skipped_and_says_why(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(
        test_speed="""
def test_speed(trt_build, trt_benchmark):
    trt_benchmark(trt_build("conv.onnx"), {"image": np.zeros((1, 3, 16, 16), np.float32)})
"""
    )
    run = run_everywhere("-rs")
    run.result.assert_outcomes(skipped=1)
    assert "not measured: trt_benchmark needs a GPU" in run.text
    run_everywhere("--trt-require-gpu").result.assert_outcomes(errors=1)
    run = run_everywhere("-pno:benchmark")
    run.result.assert_outcomes(errors=1)
    assert "trt_benchmark: the plugin pytest-benchmark is not loaded" in run.text
    assert 'pip install "pytest-trtcheck[benchmark]"' in run.text


def test_no_dependency_brings_a_plugin_of_its_own() -> None:
    """It would be loaded in every run, for those as well who check nothing; extras that do (hypothesis) say so."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["cpu"], *extras["report"]]
    seen: set[str] = set()
    while needed:
        requirement = Requirement(needed.pop())
        marker = requirement.marker
        if requirement.name in {*seen, "pytest"} or (marker and not marker.evaluate({"extra": ""})):
            continue
        try:
            needed += distribution(requirement.name).requires or ()
        except PackageNotFoundError:
            continue
        seen.add(requirement.name)
    assert {"numpy", "onnx", "filelock", "msgspec"} <= seen
    assert not [name for name in seen if any(each.group == "pytest11" for each in distribution(name).entry_points)]


def test_a_warm_check_loads_no_library_for_graphs(suite: Suite) -> None:
    suite.write(test_conv='@trt_parity("conv.onnx", batch=1)\ndef test_conv(): ...\n')
    suite.pytester.makeconftest(
        "import sys\n"
        "def pytest_unconfigure(): print('loaded', [m for m in ('onnx', 'onnx_ir', 'sympy') if m in sys.modules])"
    )
    time.sleep(2.1)  # What is younger than two seconds is not remembered: file times are coarse.
    assert "loaded ['onnx', 'onnx_ir'" in suite.run_apart("--trt-cache-dir=fresh").text
    assert "loaded []" in suite.run_apart("--trt-cache-dir=fresh").text


STOPPED_CLOCK = """
import time

REAL = {name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")}

@pytest.fixture
def stopped():
    yield lambda: [setattr(time, name, lambda: 1.0) for name in REAL]

def pytest_unconfigure():
    for name, clock in REAL.items():
        setattr(time, name, clock)
"""


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_clock_that_a_test_stops_leaves_a_report_that_can_be_read(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, getattr(time, name))  # put back, whatever happens
    suite.write(
        conftest=STOPPED_CLOCK,
        test_it=f"""
def test_it(trt_check, stopped):
    def reference(inputs):
        stopped()
        return {{"logits": np.zeros((1, 10), np.float32)}}

    {"stopped()" if when == "before" else ""}
    with pytest.raises(AssertionError):
        trt_check("conv.onnx", {{"image": np.ones((1, 3, 16, 16), np.float32)}}, reference=reference)
""",
    )
    run = suite.run("--trt-diagnose=0")
    run.result.assert_outcomes(passed=1)
    found = json_report.read(suite.path / "report.json")
    assert found.checks[0].duration_s == 0.0
    assert found.duration_s is not None
    assert 0 < found.duration_s < 600


def test_what_may_take_so_long_ends_though_a_test_stops_the_clock(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, getattr(time, name))
    suite.write(
        conftest=STOPPED_CLOCK,
        test_it="""
from pytest_trtcheck import Search
SEARCH = Search(tries=3000, seconds=0.05)

@pytest.fixture(autouse=True)
def frozen(stopped): stopped()

@trt_parity("conv.onnx", batch=1, search=SEARCH)
def test_marked(): ...

def test_by_hand(trt_check):
    import time
    clock = time.monotonic
    trt_check("conv.onnx", batch=1, search=SEARCH)
    assert time.monotonic is clock
""",
    )
    run = suite.run()
    run.result.assert_outcomes(passed=2)
    assert all(check["search"]["tries"] < 3000 for check in run.checks)
