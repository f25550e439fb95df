"""The documentation names what exists: every option, marker argument, fixture and default, and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from pytest_trtcheck.backends.tensorrt.module import OLDEST, Target, TensorRTModule
from pytest_trtcheck.backends.tensorrt.support import BLACKWELL_FROM, SINCE, STRONG_TYPING_COMPLETE, unsupported
from pytest_trtcheck.check import arguments as markers
from pytest_trtcheck.choices import PRECISIONS, is_pair, parts_of
from pytest_trtcheck.metrics import DEFAULT_TOLERANCE, METRICS
from pytest_trtcheck.plugin import fixtures
from pytest_trtcheck.plugin import options as settings
from pytest_trtcheck.record import SEVERITY

ROOT = Path(__file__).resolve().parent.parent


def table(document: str, header: str) -> list[list[str]]:
    """The cells of the one table in a document whose header begins so."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(header)]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_option_is_documented_with_its_names_choices_and_default() -> None:
    rows = {code(row[2])[0]: row for row in table("docs/options.md", "| flag |")}
    assert list(rows) == [option.name for option in settings.OPTIONS]
    for option in settings.OPTIONS:
        flag, variable, _, _, default, meaning = rows[option.name]
        assert [text.partition("=")[0] for text in code(flag)] == ([] if option.ini_only else [option.flag])
        assert code(variable) == [option.variable]
        if option.choices and len(option.choices) < len(PRECISIONS):
            assert set(option.choices) <= set(code(meaning))
        if isinstance(option.default, str):
            assert code(default) == [option.default]
        if option.default is False:
            assert default == "no"


@pytest.mark.parametrize(
    ("marker", "header"), [("trt_parity", "| argument | default |"), ("trt_latency", "| argument | meaning |")]
)
def test_every_marker_argument_is_documented(marker: str, header: str) -> None:
    documented = [name for row in table("docs/markers.md", header) for name in code(row[0])]
    assert documented == list(inspect.signature(getattr(markers, marker)).parameters)


def test_every_metric_and_verdict_is_documented() -> None:
    assert {code(row[0])[0] for row in table("docs/markers.md", "| metric |")} == set(METRICS)
    assert {code(row[0])[0] for row in table("docs/markers.md", "| verdict |")} == set(SEVERITY)


def test_default_tolerances_are_the_documented_ones() -> None:
    header = "| metric | value | default limit at "
    (line,) = [line for line in (ROOT / "docs/markers.md").read_text().splitlines() if line.startswith(header)]
    groups = line.removeprefix(header).rstrip(" |").split(" / ")
    limits = next(row for row in table("docs/markers.md", header) if row[0] == "`max`")[2].split(" / ")
    documented = {
        precision: float(limit) for names, limit in zip(groups, limits, strict=True) for precision in names.split(", ")
    }
    pairs = {each: max(documented[part] for part in parts_of(each)) for each in PRECISIONS if is_pair(each)}
    assert documented | pairs == DEFAULT_TOLERANCE


def test_every_fixture_is_documented() -> None:
    documented = {
        re.split(r"\W", code(row[0])[0])[0]
        for header in ("| fixture | gives |", "| fixture | what it is |")
        for row in table("docs/fixtures.md", header)
    }
    assert documented == {name for name in vars(fixtures) if name.startswith("trt_")}


def releases_of(cell: str) -> tuple[str, str]:
    """The first and the last release of a cell such as "10.1 to 11.4" or "10.3 (JetPack 6), 11.4.1 (…)"."""
    numbers = re.findall(r"\b1\d\.\d+(?:\.\d+)?\b", cell)
    return numbers[0], numbers[-1]


def test_the_gpus_of_each_tensorrt_are_the_documented_ones() -> None:
    for name, capabilities, cell in table("docs/install.md", "| GPU | compute capability |"):
        first, last = releases_of(cell)
        for capability in capabilities.split(", "):
            major, minor = map(int, capability.split("."))
            gpu = Target((major, minor), here=True)
            for release in (first, last):
                assert unsupported(TensorRTModule("tensorrt", release, None), gpu, "fp16") is None, name
            refused = {"10.1 to 10.4": "10.5", "10.8 to 11.4": "10.7"}.get(cell)
            if refused:
                assert unsupported(TensorRTModule("tensorrt", refused, None), gpu, "fp16") is not None, name


def test_what_there_is_from_a_release_on_is_documented() -> None:
    rows = {row[0].removeprefix("TensorRT "): row[1] for row in table("docs/install.md", "| from | there is |")}
    for module, precision, _, release in SINCE:
        title = ".".join(map(str, release))
        assert f"{precision} convolutions" in rows[f"TensorRT-RTX {title}" if module == "tensorrt_rtx" else title]
    assert "Blackwell" in rows[".".join(map(str, BLACKWELL_FROM))]
    assert "strong typing for all layers" in rows[".".join(map(str, STRONG_TYPING_COMPLETE))]
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    oldest = {name: ".".join(map(str, release)) for name, release in OLDEST.items()}
    assert f"TensorRT from {oldest['tensorrt']}, TensorRT-RTX from {oldest['tensorrt_rtx']} on" in text


def test_every_extra_is_documented() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    documented = set(re.findall(r"pytest-trtcheck\[([\w-]+)\]", (ROOT / "docs/install.md").read_text(encoding="utf-8")))
    assert documented - extras == set()
    assert {"cpu", "cuda", "cuda12", "tensorrt", "tensorrt-cu12", "rtx", "report"} <= documented
