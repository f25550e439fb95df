"""The HTML report in a real Chromium: opened, sorted, filtered; on desk and phone, in light and dark."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.record import (
    BudgetRecord,
    CheckRecord,
    Evidence,
    JudgedRecord,
    LatencyDetails,
    LatencyRecord,
    OutputDetails,
    OutputRecord,
    ParityRecord,
    Verdict,
)
from pytest_trtcheck.report import html
from pytest_trtcheck.report.json_report import document, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selenium.webdriver import Chrome

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytest.importorskip("jinja2", reason="the HTML report needs jinja2: the extra `report`")
webdriver = pytest.importorskip("selenium.webdriver", reason="driving a browser needs selenium")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed")

HOSTILE = "<script>document.title='owned'</script>"
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


def check(
    name: str,
    value: float | None,
    verdict: Verdict = "pass",
    *,
    precision: str = "fp16",
    evidence: Evidence | None = "emulated",
    latency_ms: float | None = None,
) -> CheckRecord:
    parity = None
    if value is not None:
        judged = JudgedRecord("max", value, 0.01, "tol", verdict)
        details = OutputDetails(cases=1, error_octaves=((-20, 400), (-10, 60), (-7, 1)), error_zeros=12, peak=3.0)
        output = OutputRecord("logits", "float32", (8, 10), max=value, judged=(judged,), details=details)
        parity = ParityRecord(verdict, "max", 0.01, value, (output,))
    latency = None
    if latency_ms is not None:
        budget = BudgetRecord("pass", "p50_ms", "p50", limit_ms=2.0, value_ms=latency_ms)
        samples = tuple(latency_ms + index % 10 / 100 for index in range(200))
        latency = LatencyRecord(
            "pass",
            gpu="T4",
            samples=200,
            p50_ms=latency_ms,
            budgets=(budget,),
            details=LatencyDetails(samples_ms=samples),
        )
    record = CheckRecord(
        nodeid=f"tests/test_{name}.py::test_{name}",
        model=f"models/{name}.onnx",
        verdict=verdict,
        precision=precision,
        evidence=evidence,
        parity=parity,
        latency=latency,
        message=f"{HOSTILE} {name}" if verdict != "pass" else None,
    )
    return CheckRecord.from_json(record.to_json())


RECORDS = [
    check("alpha", 0.002, latency_ms=1.5),
    check("beta", 0.02, "fail", precision="int8", evidence="engine", latency_ms=0.9),
    check("gamma", float("inf"), "fail"),
    check("delta10", 0.0004, latency_ms=10.5),
    check("delta9", 0.003, evidence="engine"),
    check("broken", None, "error", evidence=None),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def report(browser: Chrome, tmp_path: Path) -> Iterator[Chrome]:
    """The report, open; whatever a test does, the console stays empty."""
    path = tmp_path / "report.html"
    html.save(path, document(RECORDS, environment(requested_gpu="T4")))
    show(browser, "desk", dark=False)
    browser.get(path.as_uri())
    yield browser
    log: list[dict[str, Any]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    assert log == []


def show(browser: Chrome, size: str, *, dark: bool) -> None:
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def run(browser: Chrome, script: str, *arguments: object) -> Any:
    return browser.execute_script(script, *arguments)


def models(browser: Chrome) -> list[str]:
    """The models that are seen, from the top."""
    script = """return [...document.querySelectorAll("#checks > tbody")].filter((b) => b.checkVisibility())
        .map((b) => b.querySelector(".open").textContent.replace(".onnx", ""))"""
    found: list[str] = run(browser, script)
    return found


def click(browser: Chrome, selector: str, text: str = "") -> None:
    script = """const found = [...document.querySelectorAll(arguments[0])]
        .find((each) => each.textContent.trim().startsWith(arguments[1])); found.click()"""
    run(browser, script, selector, text)


def search(browser: Chrome, text: str) -> None:
    field = browser.find_element("id", "search")
    field.clear()
    field.send_keys(text)


def test_it_opens_with_what_needs_a_look_on_top(report: Chrome) -> None:
    assert models(report) == ["broken", "beta", "gamma", "alpha", "delta9", "delta10"]
    assert report.title == "TensorRT checks: 3 of 6 need a look"


@pytest.mark.parametrize(
    ("column", "ascending"),
    [
        ("Model", ["alpha", "beta", "broken", "delta9", "delta10", "gamma"]),
        ("Worst error", ["delta10", "alpha", "delta9", "beta", "gamma"]),
        ("Used", ["delta10", "alpha", "delta9", "beta", "gamma"]),
        ("Latency", ["beta", "alpha", "delta10"]),
    ],
)
def test_it_sorts_with_what_has_no_value_last(report: Chrome, column: str, ascending: list[str]) -> None:
    for direction, expected in (("ascending", ascending), ("descending", ascending[::-1])):
        click(report, "thead button", column)
        assert models(report)[: len(expected)] == expected
        assert len(models(report)) == 6
        assert run(report, "return document.querySelector('[aria-sort]').ariaSort") == direction


def test_it_filters_by_verdict(report: Chrome) -> None:
    click(report, ".chip", "fail")
    assert models(report) == ["beta", "gamma"]
    assert run(report, "return document.getElementById('shown').textContent") == "2 of 6 shown"

    click(report, ".chip", "error")
    assert models(report) == ["broken", "beta", "gamma"]

    click(report, ".chip", "fail")
    click(report, ".chip", "error")
    assert len(models(report)) == 6


def test_it_filters_by_precision_and_evidence(report: Chrome) -> None:
    choose = """const select = document.getElementById(arguments[0]); select.value = arguments[1];
        select.dispatchEvent(new Event("change"))"""
    run(report, choose, "evidence", "engine")
    assert models(report) == ["beta", "delta9"]

    run(report, choose, "precision", "int8")
    assert models(report) == ["beta"]


@pytest.mark.parametrize("size", SIZES)
def test_it_searches(report: Chrome, size: str) -> None:
    show(report, size, dark=False)
    search(report, "TEST_delta")
    assert models(report) == ["delta9", "delta10"]

    search(report, "delta engine")
    assert models(report) == ["delta9"]

    search(report, "nothing has this name")
    assert models(report) == []
    assert run(report, "return document.getElementById('none').checkVisibility()")


def test_a_filter_outlasts_sorting(report: Chrome) -> None:
    search(report, "delta")
    click(report, "thead button", "Worst error")

    assert models(report) == ["delta10", "delta9"]


def test_a_check_opens_and_closes(report: Chrome) -> None:
    seen = "return document.querySelector('tbody .detail').checkVisibility()"
    assert not run(report, seen)

    click(report, ".open", "broken")
    assert run(report, seen)
    assert run(report, "return document.querySelector('.open').ariaExpanded") == "true"

    click(report, ".open", "broken")
    assert not run(report, seen)


def test_a_link_opens_its_check(report: Chrome) -> None:
    run(report, "location.hash = '#check-3'")
    opened = "return [...document.querySelectorAll('tbody.opened')].map((b) => b.id)"
    # The event that follows a change of the hash comes a moment later.
    run(report, "return new Promise((resolve) => setTimeout(resolve, 100))")

    assert run(report, opened) == ["check-3"]


def test_plots_are_drawn_inside_their_frames(report: Chrome) -> None:
    run(report, "document.querySelectorAll('.open').forEach((button) => button.click())")
    outside = """return [...document.querySelectorAll("svg.plot")].flatMap((svg) => {
        const frame = svg.viewBox.baseVal;
        return [...svg.querySelectorAll("path, circle, rect, text")].map((part) => [part, part.getBBox()])
            .filter(([part, box]) => !(box.x >= -1 && box.y >= -3 && box.x + box.width <= frame.width + 6
                && box.y + box.height <= frame.height + 3)).map(([part]) => part.outerHTML) })"""

    assert run(report, "return document.querySelectorAll('svg.plot').length") == 13
    assert run(report, outside) == []


def test_names_are_not_run(report: Chrome) -> None:
    run(report, "document.querySelectorAll('.open').forEach((button) => button.click())")

    assert HOSTILE in run(report, "return document.querySelector('.message').textContent")
    assert "owned" not in report.title


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_readable(report: Chrome, tmp_path: Path, size: str, *, dark: bool) -> None:
    long = check("detector_with_a_long_name_640x640_epoch_200", 0.0100000004, "fail", latency_ms=1234.5678)
    assert long.parity is not None
    judged = replace(long.parity.outputs[0].judged[0], metric="mismatches")
    parity = replace(long.parity, outputs=(replace(long.parity.outputs[0], judged=(judged,)),))
    long = replace(long, parity=parity, message="no_space_" * 40)
    html.save(tmp_path / "long.html", document([*RECORDS, long], environment(requested_gpu="T4")))
    report.get((tmp_path / "long.html").as_uri())
    show(report, size, dark=dark)
    run(report, "document.querySelectorAll('.open').forEach((button) => button.click())")

    assert run(report, "return document.documentElement.scrollWidth") <= SIZES[size][0]
    assert run(report, CONTRASTS) == []


CONTRASTS = """
// Contrast of every text with the first background behind it, after WCAG 2.1, 1.4.3: at least 4.5.
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data;
}
function luminance(colour) {
  const [r, g, b] = [...rgba(colour)].slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let each = element; each; each = each.parentElement) {
    const colour = getComputedStyle(each).backgroundColor;
    if (rgba(colour)[3] > 250) return colour;
  }
  return "white";
}
const poor = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE", "TITLE", "OPTION", "title"].includes(element.tagName)) {
    continue;
  }
  const style = getComputedStyle(element);
  const [one, two] = [element.closest("svg") ? style.fill : style.color, behind(element)].map(luminance);
  const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  if (contrast < 4.5) poor.push(`${contrast.toFixed(2)} ${element.outerHTML.slice(0, 120)}`);
}
return poor;
"""
