"""A backend from another package: one file and an entry point, as the documentation has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck import backends

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conftest import Suite

DOCS = Path(__file__).parent.parent / "docs" / "extending.md"
SECTION = DOCS.read_text(encoding="utf-8").partition("## Backend")[2].partition("\n## ")[0]
CODES, (ENTRY,) = (re.findall(rf"```{kind}[^\n]*\n(.*?)```", SECTION, re.DOTALL) for kind in ("python", "toml"))
CODE, SERVED = CODES

# Faults to plant, each a system of its own.
MORE = """
class Wrong(PlainOrt):
    name = "wrong"

    def load(self, built):
        session = super().load(built)
        return type("Scaled", (), {
            "__call__": lambda self, inputs: {name: array * 1.1 for name, array in session(inputs).items()},
            "close": lambda self: session.close(),
        })()


class Unsteady(PlainOrt):
    name = "unsteady"

    def load(self, built):
        session, runs = super().load(built), iter(range(99))
        return type("Scaled", (), {
            "__call__": lambda self, inputs: {
                name: array * (1 + 1e-4 * (next(runs) % 2)) for name, array in session(inputs).items()
            },
            "close": lambda self: session.close(),
        })()


class Changed(PlainOrt):
    # With a change to what the session is fed, or gives.

    def before(self, inputs):
        pass

    def after(self, outputs):
        return outputs

    def load(self, built):
        session = super().load(built)

        def run(_, inputs):
            self.before(inputs)
            return self.after(session(inputs))

        return type("Run", (), {"__call__": run, "close": lambda _: session.close()})()


class Refilling(Changed):
    name = "refilling"
    arrays, count = {}, 0

    def after(self, outputs):
        type(self).count += 1
        for name, array in outputs.items():
            self.arrays.setdefault(name, array)[...] = array * (1 + 0.05 * (self.count % 2))
        return self.arrays


class Clipping(Changed):
    name = "clipping"

    def before(self, inputs):
        for array in inputs.values():
            array.clip(0.4, 0.6, out=array)


class Listing(Changed):
    name = "listing"

    def after(self, outputs):
        return {name: array.tolist() for name, array in outputs.items()}


class Boasting(PlainOrt):
    name = "boasting"
    evidence = "engine"


class Claiming(PlainOrt):
    name = "claiming"
    evidence = "provider"
    gpu_ran = True


class Runs:
    measured, graph, graph_reason = "a request", None, None

    def run(self, n):
        import numpy as np
        from pytest_trtcheck.latency.samples import Samples

        took = np.random.default_rng(n).normal(2.0, 0.01, n)
        return Samples(took, None, None, took)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Remote(PlainOrt):
    name = "remote"
    evidence = "server"
    gpu_ran = "unknown"
    is_timed = True

    def timed_runs(self, runner, cases, **_):
        return Runs()
"""
ENTRIES = ENTRY.replace("project.entry-points.", "").replace('"', "") + (
    "wrong = ort_plain:Wrong\nunsteady = ort_plain:Unsteady\nboasting = ort_plain:Boasting\n"
    "refilling = ort_plain:Refilling\nclipping = ort_plain:Clipping\nlisting = ort_plain:Listing\n"
    "served = ort_served:ServedOrt\nclaiming = ort_plain:Claiming\nremote = ort_plain:Remote\n"
    "gone = no_such_module:Gone\ntensorrt = ort_plain:PlainOrt\n"
)
CHECK = """
@trt_parity("conv.onnx", precision="fp32", batch=2, backend="{backend}")
def test_it(): ...
"""


@pytest.fixture
def installed(suite: Suite, monkeypatch: pytest.MonkeyPatch, all_loaded: None) -> Suite:
    """The package of the documentation."""
    install(suite, monkeypatch, {"ort_plain": CODE + MORE, "ort_served": SERVED}, ENTRIES)
    return suite


def install(suite: Suite, monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, str], entries: str) -> None:
    """What pip would leave of a package with these modules and entry points."""
    site = suite.path / "site"
    about = site / "ort_plain-1.0.dist-info"
    about.mkdir(parents=True)
    for name, code in modules.items():
        (site / f"{name}.py").write_text(code)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ort-plain\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")


def test_the_example_is_short() -> None:
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("given", ["ort-plain", "ort_plain"])
def test_a_check_runs_through_it(installed: Suite, given: str) -> None:
    installed.write(test_it=CHECK.format(backend=given))
    run = installed.run()
    run.result.assert_outcomes(passed=1)
    (record,) = run.checks
    assert (record["backend"], record["evidence"]) == ("ort-plain", "emulated")
    assert record["parity"]["worst"] < 1e-4
    assert any(note.startswith("run by ONNX Runtime without optimizations (onnxruntime ") for note in record["notes"])
    run = installed.run("--trt-require-gpu")
    run.result.assert_outcomes(failed=1)
    assert "--trt-require-gpu: parity was run by ONNX Runtime without optimizations" in run.text


def test_the_command_line_names_it_too(installed: Suite) -> None:
    installed.write(test_it='@trt_parity("conv.onnx", precision=["fp32", "fp16"], batch=2)\ndef test_it(): ...\n')
    run = installed.run("--trt-backend=ort_plain")
    run.result.assert_outcomes(passed=1, failed=1)
    assert "it has no arithmetic for fp16" in run.check("fp16]")["message"]


def test_one_that_computes_something_else_fails_and_is_to_blame(installed: Suite) -> None:
    installed.write(test_it=CHECK.format(backend="wrong"))
    run = installed.run()
    run.result.assert_outcomes(failed=1)
    (record,) = run.checks
    assert "(by ONNX Runtime without optimizations)" in record["message"]
    assert record["parity"]["worst"] == pytest.approx(0.1, rel=0.01)
    assert record["parity"]["blame"]["step"] == "engine"


def test_one_that_computes_something_else_each_time_fails(installed: Suite) -> None:
    installed.write(test_it=CHECK.format(backend="unsteady"))
    run = installed.run()
    run.result.assert_outcomes(failed=1)
    assert "is not deterministic" in run.checks[0]["message"]


def test_one_that_uses_its_arrays_again_or_changes_its_inputs_hides_nothing(installed: Suite) -> None:
    checks = "".join(
        CHECK.format(backend=name).replace("test_it", f"test_{name}") for name in ("refilling", "clipping", "listing")
    )
    installed.write(test_it=checks.replace('backend="refilling"', 'backend="refilling", tol=0.1'))
    run = installed.run()
    run.result.assert_outcomes(failed=3)
    assert "is not deterministic" in run.check("test_refilling")["message"]
    assert run.check("test_clipping")["parity"]["blame"]["step"] == "engine"
    assert "the backend 'listing' gave a list for the outputs" in run.check("test_listing")["message"]


@pytest.mark.parametrize(("backend", "claim"), [("boasting", "evidence = 'engine'"), ("claiming", "gpu_ran = True")])
def test_no_gpu_is_claimed_where_none_ran(installed: Suite, backend: str, claim: str) -> None:
    installed.write(test_it=CHECK.format(backend=backend))
    (record,) = installed.run().checks
    assert (record["verdict"], record["gpu_ran"]) == ("error", False)
    assert claim in record["message"]
    assert "names no GPU that it ran on" in record["message"]


@pytest.mark.parametrize(
    ("budget", "named", "verdict"),
    [
        ("3", None, "pass"),
        ("1", None, "fail"),
        ('{"T4": 3}', None, "not_measured"),
        ('{"T4": 3, "default": 1}', None, "fail"),
        ('{"T4": 3, "default": 1}', "T4", "pass"),
    ],
)
def test_what_runs_elsewhere_is_timed_and_judged_by_what_is_said_of_it(
    installed: Suite, budget: str, named: str | None, verdict: str
) -> None:
    installed.write(test_it=f"@trt_latency(p50_ms={budget}, max_seconds=1)" + CHECK.format(backend="remote"))
    options = [f"--trt-gpu={named}"] if named else []
    (record,) = installed.run(*options).checks
    assert (record["evidence"], record["gpu_ran"], record["parity"]["verdict"]) == ("server", "unknown", "pass")
    assert (record["latency"]["verdict"], record["latency"]["gpu"]) == (verdict, named)
    (refused,) = installed.run("--trt-require-gpu", *options).checks
    assert refused["verdict"] == "fail"
    assert verdict == "fail" or "on a GPU or not" in refused["message"]


def test_the_service_of_the_documentation_is_timed_by_the_host(installed: Suite) -> None:
    assert len([line for line in SERVED.splitlines() if line.strip()]) <= 15
    installed.write(test_it="@trt_latency(p50_ms=10_000, max_seconds=1)" + CHECK.format(backend="served"))
    (record,) = installed.run().checks
    assert (record["evidence"], record["gpu_ran"], record["latency"]["verdict"]) == ("server", "unknown", "pass")
    assert record["latency"]["details"]["measured"] == "a request"
    assert 0 < record["latency"]["p50_ms"] < 1000
    assert "costs" not in record, "it loads nothing"


def test_nothing_of_it_is_imported_before_a_test_asks(installed: Suite) -> None:
    (installed.path / "site" / "ort_plain.py").write_text("raise RuntimeError('a test has asked')")
    installed.write(test_it=CHECK.format(backend="ort-plain"))
    assert "a test has asked" not in installed.run("--help").text
    assert "a test has asked" not in installed.run("--collect-only").text
    assert "RuntimeError: a test has asked" in installed.run().text


def test_one_that_cannot_be_imported_is_an_error_with_its_name(installed: Suite) -> None:
    installed.write(test_it=CHECK.format(backend="gone"))
    run = installed.run("--trt-backend=gone")
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "backend 'gone' (no_such_module:Gone) cannot be imported: No module named 'no_such_module'" in run.text


def test_names(installed: Suite) -> None:
    assert backends.find_name("tensorrt-rtx") == backends.find_name("tensorrt_rtx") == "tensorrt_rtx"
    assert backends.find_name("emulated") == "onnxruntime"
    assert backends.find_name("ort_plain") == "ort-plain"
    assert backends.load("tensorrt").__module__ == "pytest_trtcheck.backends.tensorrt.backend", "ours stay ours"
    assert backends.find_name("ort-plane") is None
    run = installed.run("--trt-backend=ort-plane")
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "did you mean 'ort-plain'?" in run.text
