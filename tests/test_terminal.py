"""What a terminal shows of failures, in pytest's styles of tracebacks, with and without workers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Run, Suite

TESTS = """
@trt_parity("conv.onnx", batch=1, tol=1e-9)
def test_fails(): ...

def test_by_hand(trt_check):
    x = np.ones((1, 3, 16, 16), np.float32)
    trt_check("conv.onnx", x, tol=1e-9)

@trt_parity("gone.onnx")
def test_gone(): ...
"""


@pytest.mark.parametrize("style", ["auto", "long", "short", "native", "line", "no"])
def test_every_style_names_the_users_test_and_not_our_internals(suite: Suite, style: str) -> None:
    suite.write(test_x=TESTS)
    run = suite.run(f"--tb={style}", "--trt-diagnose=0")
    run.result.assert_outcomes(failed=3)
    assert not re.search(r"(plugin|check)/\w+\.py", run.text)
    assert ("over the limit" in run.text) == (style not in {"line", "no"})
    if style == "line":
        lines = (suite.path / "test_x.py").read_text().splitlines()
        for start, said in (
            ('@trt_parity("conv.onnx", batch', "conv.onnx in fp16 differs"),
            ("    trt_check(", "conv.onnx in fp16 differs"),
            ('@trt_parity("gone', "gone.onnx: no such"),
        ):
            (number,) = [number for number, line in enumerate(lines, 1) if line.startswith(start)]
            assert f"test_x.py:{number}: {said}" in run.text


def test_it_is_the_same_from_workers(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    suite.write(test_x=TESTS)
    run = run_everywhere("--trt-diagnose=0", "--junit-xml=junit.xml", "--tb=line")
    assert len(re.findall(r"test_x\.py:\d+: (?:conv|gone)\.onnx", run.text)) == 3
    assert 'message="gone.onnx: no such model file"' in (suite.path / "junit.xml").read_text()
    assert "looked for" in (suite.path / "junit.xml").read_text()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_messages_take_the_terminals_width(suite: Suite, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    suite.write(test_x=TESTS)
    lines = suite.run("--trt-diagnose=0", "-k", "fails").text.splitlines()
    start = next(index for index, line in enumerate(lines) if "test_fails _" in line)
    end = next(index for index, line in enumerate(lines) if line.startswith("explained by: "))  # to be pasted
    assert max(map(len, lines[start:end])) <= width


def test_what_is_listed_can_be_chosen(suite: Suite) -> None:
    suite.write(test_x=TESTS + "@trt_parity('conv.onnx', batch=[1, 2, 3])\ndef test_passes(): ...\n")
    arguments = "--trt-diagnose=0", "--tb=no"
    assert len(re.findall(r"  pass$", suite.run(*arguments).text, re.MULTILINE)) == 3
    failed = suite.run(*arguments, "--trt-summary=failed").text
    assert "3 checks that pass are not listed" in failed
    assert len(re.findall(r"  (fail|error)$", failed, re.MULTILINE)) == 3
    assert "model  " not in suite.run(*arguments, "--trt-summary=none").text
    assert "none of auto, all, failed, none" not in failed
    assert suite.run("--trt-summary=some").result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("options", "variables", "coloured"),
    [
        (["--color=yes"], {}, True),
        (["--color=no"], {"FORCE_COLOR": "1"}, False),
        ([], {"FORCE_COLOR": "1"}, True),
        ([], {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_are_pytests(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, options: list[str], variables: dict[str, str], coloured: bool
) -> None:
    for name in ("PY_COLORS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    suite.write(test_x="@trt_parity('conv.onnx', batch=1)\ndef test_passes(): ...\n")
    assert ("\x1b[32mpass\x1b[0m" in suite.run(*options).text) == coloured


def test_only_what_nobody_expected_is_to_be_explained(suite: Suite) -> None:
    expected = '@pytest.mark.xfail(reason="known")\n@trt_parity("gemm.onnx", tol=1e-9)\ndef test_known(): ...\n'
    suite.write(test_x=expected)
    assert "explained by" not in suite.run("--trt-diagnose=0").text
    suite.write(test_y='@trt_parity("gone.onnx")\ndef test_gone(): ...\n')
    assert "explain model-missing\n" in suite.run("--trt-diagnose=0").text
