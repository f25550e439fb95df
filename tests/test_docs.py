"""The documentation says what the code says: each option, argument, fixture, default and name, and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import pytest_trtcheck
from docs.site import compatibility, docstrings, links, reference
from pytest_trtcheck import metrics, strategies
from pytest_trtcheck.backends.tensorrt.module import OLDEST, Target, TensorRTModule
from pytest_trtcheck.backends.tensorrt.support import BLACKWELL_FROM, SINCE, STRONG_TYPING_COMPLETE, unsupported
from pytest_trtcheck.check import arguments as markers
from pytest_trtcheck.choices import PRECISIONS, Option, is_pair, parts_of
from pytest_trtcheck.metrics import DEFAULT_TOLERANCE
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


@pytest.mark.parametrize("page", [page for page in links.pages() if reference.names(page)])
def test_what_pages_show_of_the_code_is_what_it_says(page: str) -> None:
    hint = f"{page} is behind the code: python -m docs.site.reference"
    assert reference.current(page) == (ROOT / page).read_text(encoding="utf-8"), hint


def test_every_part_stands_in_one_page() -> None:
    assert sorted(name for page in links.pages() for name in reference.names(page)) == sorted(reference.PARTS)


def test_what_is_written_by_hand_in_a_generated_table_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = reference.option_table("| flag | more |\n| --- | --- |\n| `--trt-gpu=GPU` | see\\|there |\n")
    assert "| see\\|there |\n" in kept
    monkeypatch.setattr(settings, "OPTIONS", (*settings.OPTIONS, Option("trt_new", "flag", "what is new")))
    assert "| `--trt-new`<br>`TRTCHECK_NEW`<br>`trt_new` | flag | – | what is new | |" in reference.option_table(kept)


@pytest.mark.parametrize("marker", ["trt_parity", "trt_latency"])
def test_a_marker_has_the_signature_that_it_is_read_by(marker: str) -> None:
    public, read = (inspect.signature(getattr(module, marker)).parameters for module in (pytest_trtcheck, markers))
    assert [(each.name, each.kind) for each in public.values()] == [(each.name, each.kind) for each in read.values()]
    defaults = {name: each.default for name, each in read.items()}
    # What the code tells apart from a default that was written out; to the user they are the same.
    assert {name: each.default for name, each in public.items()} == defaults | (
        {"precision": "fp16"} if marker == "trt_parity" else {}
    )


PUBLIC = {name: thing for _, things in reference.PUBLIC.values() for name, thing in things.items()} | {
    name: getattr(pytest_trtcheck, name) for name in ("trt_parity", "trt_latency")
}


def test_every_public_name_is_documented() -> None:
    without_pages = {"SOURCE", "__version__", "metrics"}
    assert set(pytest_trtcheck.__all__) - without_pages <= set(PUBLIC)
    assert set(metrics.__all__) - {"METRICS"} <= set(PUBLIC)
    assert set(strategies.__all__) <= set(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_docstring_says_what_each_parameter_is(name: str) -> None:
    thing = PUBLIC[name]
    assert docstrings.of(thing).text
    if isinstance(thing, type):
        documented = docstrings.attributes(thing)
        wanted = set(getattr(thing, "__dataclass_fields__", ()))
        undocumented = [each for each, _ in inspect.getmembers(thing, inspect.isfunction) if each[0] != "_"]
        assert not [each for each in undocumented if not docstrings.of(getattr(thing, each)).text]
    else:
        documented = dict(docstrings.of(thing).parameters)
        wanted = set(inspect.signature(thing).parameters)  # type: ignore[arg-type]
    assert wanted <= {each for each, text in documented.items() if text}


def test_every_field_of_the_report_has_a_meaning() -> None:
    text = (ROOT / "docs/reference/report.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if re.search(r"^\| `.*(?<!\\)\| \|$", line)] == []


def test_the_oldest_libraries_that_are_tried_are_those_that_are_admitted() -> None:
    bounds, pins = compatibility.lower_bounds(), compatibility.pinned()
    always = {name: bound for name, (extra, bound) in bounds.items() if not extra}
    assert set(always) <= set(pins)
    assert [name for name, pin in pins.items() if f"{pin}.".startswith(f"{bounds[name][1]}.") is False] == []


def test_the_releases_are_those_that_are_looked_at() -> None:
    # Read from the text there: importing it needs what its environment alone has.
    assert {"10.1.0", "11.4.0.106", "rtx 1.5.0.114"} <= set(compatibility.releases())
    assert len(compatibility.releases()) == 24


IN_RUN = "`tensorrt-api`, in `.ci/run`"


@pytest.mark.parametrize(
    ("file", "change", "part", "row"),
    [
        (".ci/run", ("10.16.1.11", "10.15.1.29"), "tensorrts", f"TensorRT 10.15.1.29 | {IN_RUN}"),
        (".ci/run", ("torch,keras", "torch"), "libraries", "keras | `[tensorflow]` | 3.8 | untried | `installs`"),
        (".github/workflows/ci.yml", (', "3.14"', ""), "pythons", "3.14 | untried"),
        (
            "pyproject.toml",
            ("rtx==1.7.1.116", "rtx==1.6.1.120"),
            "tensorrts",
            f"TensorRT-RTX 1.7.1.116 | {IN_RUN} | untried",
        ),
        ("tox.ini", ("    msgspec==0.19.0\n", ""), "libraries", "msgspec | | 0.19 | untried"),
    ],
)
def test_the_compatibility_table_says_what_is_run(
    file: str, change: tuple[str, str], part: str, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, (old, new) = compatibility.read, change
    assert f"| {row}" not in reference.PARTS[part]("")
    monkeypatch.setattr(
        compatibility, "read", lambda path: read(path).replace(old, new) if path == file else read(path)
    )
    assert f"| {row}" in reference.PARTS[part]("")


def test_every_verdict_is_documented() -> None:
    assert {code(row[0])[0] for row in table("docs/markers.md", "| verdict |")} == set(SEVERITY)


def test_default_tolerances_are_the_documented_ones() -> None:
    (row,) = [row for row in table("docs/markers.md", "| metric | value |") if row[0] == "`max`"]
    single = [each for each in PRECISIONS if not is_pair(each)]
    documented = dict(zip(single, map(float, row[3:]), strict=True))
    pairs = {each: max(documented[part] for part in parts_of(each)) for each in PRECISIONS if is_pair(each)}
    assert documented | pairs == DEFAULT_TOLERANCE


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
