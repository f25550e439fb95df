"""What build options make of an engine that runs, and what several builds of one engine come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Run, Suite

pytestmark = pytest.mark.gpu

MARKED = """
@trt_latency(p50_ms=1000, max_seconds=5)
@trt_parity("conv.onnx", precision="fp16", batch=4)
def test_it(): ...
"""
OPTIONS = """
import pytest
from pytest_trtcheck import BuildOptions

def no_streams(config):
    config.max_aux_streams = 0

@pytest.fixture(params={params}, ids=lambda options: "-".join(options.given()) or "default")
def trt_build_options(request):
    return request.param
"""


def run_with(suite: Suite, *options: str) -> Run:
    (suite.path / "conftest.py").write_text(OPTIONS.format(params=f"[{', '.join(options)}]"))
    suite.write(test_it=MARKED)
    return suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", f"--trt-html={suite.path / 'report.html'}")


def check(run: Run, name: str) -> dict[str, Any]:
    return run.check(f"test_it[{name}]")


def test_options_are_compared_side_by_side(suite: Suite) -> None:
    run = run_with(suite, "BuildOptions()", "BuildOptions(max_aux_streams=2)", "BuildOptions(configure=no_streams)")
    run.result.assert_outcomes(passed=3)
    for record in run.checks:
        assert record["evidence"] == "engine"
        assert record["engine"]["aux_streams"] <= 2
    assert check(run, "configure")["engine"]["aux_streams"] == 0
    lines = run.text.splitlines()
    start = lines.index("conv.onnx fp16, test_it.py::test_it")
    rows = [line.split() for line in lines[start + 2 : start + 5]]
    # Long names are cut where the table would be wider than the terminal.
    assert sorted(row[0] for row in rows) == ["configur…_streams", "default", "max_aux_streams=2"]
    for row in rows:
        assert float(row[1]) > 0, row
        assert "ms" in row
        assert "–" not in row


@pytest.mark.parametrize(
    "option", ["refit=True", "strip_weights=True", "strip_weights=True, refit=True", "weight_streaming_mib=0"]
)
def test_the_weights_are_where_the_option_says(suite: Suite, option: str) -> None:
    """Either TensorRT takes the option and the engine is right, or it says why not: never a wrong engine."""
    run = run_with(suite, "BuildOptions()", f"BuildOptions({option})")
    usual = check(run, "default")
    (record,) = [each for each in run.checks if each is not usual]
    assert usual["verdict"] == "pass"
    if record["verdict"] == "error":
        pytest.skip(f"this TensorRT does not take it: {record['message'].splitlines()[0]}")
    assert record["verdict"] == "pass", record["message"]
    assert record["parity"]["worst"] < 0.01
    if "strip" in option:
        assert record["engine"]["bytes"] < usual["engine"]["bytes"]
        assert any("the plan holds no weights" in note for note in record["notes"])
    if "streaming" in option:
        streamed = record["engine"].get("streamed_bytes", 0)
        assert streamed or any("no weight is streamed" in note for note in record["notes"])


def test_a_preview_feature_switched_off_still_computes_the_same(suite: Suite) -> None:
    run = run_with(suite, "BuildOptions()", 'BuildOptions(preview=("-RUNTIME_ACTIVATION_RESIZE_10_10",))')
    run.result.assert_outcomes(passed=2)


def test_three_builds_are_judged_and_timed(suite: Suite) -> None:
    suite.write(test_it=MARKED)
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "--trt-rebuild=3", "--trt-export=out")
    run.result.assert_outcomes(passed=1)
    (record,) = run.checks
    found = record["rebuild"]
    assert len(found["builds"]) == 3
    assert {each["verdict"] for each in found["builds"]} == {"pass"}
    assert found["builds"][0]["sha256"] == record["engine"]["sha256"]
    assert found["error"][0] == min(each["error"] for each in found["builds"]) > 0
    assert found["p50_ms"][1] == max(each["p50_ms"] for each in found["builds"]) > 0
    assert found["engines"] == len({each["sha256"] for each in found["builds"]})
    assert "3 builds, " in run.text
    # The one that is exported is the first: it passed like the others.
    assert "exported 1 engine" in run.text


def test_the_builds_of_one_that_fails_are_told_apart_from_it(suite: Suite) -> None:
    suite.write(test_it=MARKED.replace("batch=4", "batch=4, tol=1e-9"))
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "--trt-rebuild=2")
    run.result.assert_outcomes(failed=1)
    assert [each["verdict"] for each in run.checks[0]["rebuild"]["builds"]] == ["fail", "fail"]
