"""The HTML report in a real Chromium: opened, sorted, filtered; on desk and phone, in light and dark."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.record import (
    BlameRecord,
    BudgetRecord,
    CheckRecord,
    Evidence,
    GpuRecord,
    JudgedRecord,
    LatencyDetails,
    LatencyRecord,
    MissingRecord,
    OutputDetails,
    OutputRecord,
    ParityRecord,
    RunRecord,
    Verdict,
)
from pytest_trtcheck.report import history, html, merge
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
SIZES = {"desk": (1280, 900), "phone": (390, 844), "small phone": (360, 640)}


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
    if name == "gamma":
        record = replace(record, message=f"{record.message}\n\n  where        {'at a node of a layer ' * 6}")
    if name == "beta":
        assert parity is not None
        blame = BlameRecord("precision", summary="tensor 'y' overflows", keep_fp32=("/a/Conv", 'b"c'))
        record = replace(record, replay="pytest 'bundles/a b/bundle.json'", parity=replace(parity, blame=blame))
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
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": "phone" in size}
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
    run(report, "location.hash = '#tests-test_gamma-test_gamma'")
    opened = "return [...document.querySelectorAll('tbody.opened')].map((b) => b.id)"
    # The event that follows a change of the hash comes a moment later.
    run(report, "return new Promise((resolve) => setTimeout(resolve, 100))")

    assert run(report, opened) == ["tests-test_gamma-test_gamma"]


OPENED = "return [...document.querySelectorAll('tbody.opened')].map((each) => each.id)"


def address(browser: Chrome) -> str:
    return str(run(browser, "return location.hash"))


def settle(browser: Chrome) -> None:
    """Wait for the events that follow a change of the address."""
    run(browser, "return new Promise((resolve) => setTimeout(resolve, 100))")


def test_the_address_follows_what_is_opened_and_back_undoes_it(report: Chrome) -> None:
    beta, gamma = (f"tests-test_{name}-test_{name}" for name in ("beta", "gamma"))
    at = run(report, "scrollTo(0, 40); return scrollY")
    for name in ("beta", "gamma"):
        click(report, ".open", name)
    assert (address(report), run(report, OPENED)) == (f"#{gamma}", [beta, gamma])
    assert run(report, "return scrollY") == at, "the page stays where it is"
    click(report, ".open", "gamma")
    assert (address(report), run(report, OPENED)) == (f"#{beta}", [beta])
    for expected, shown in (([beta, gamma], f"#{gamma}"), ([beta], f"#{beta}"), ([], "")):
        report.back()
        settle(report)
        assert (run(report, OPENED), address(report)) == (expected, shown)
    report.forward()
    settle(report)
    assert (run(report, OPENED), address(report)) == ([beta], f"#{beta}")


def test_an_address_opens_its_check_even_in_a_filtered_page_and_shows_it(report: Chrome) -> None:
    search(report, "alpha")
    run(report, "location.hash = '#tests-test_delta9-test_delta9'")
    settle(report)
    seen = """const row = document.querySelector("tbody.opened").getBoundingClientRect();
        return [row.top >= 0 && row.top < innerHeight, document.activeElement.matches("tbody.opened .open")]"""
    assert run(report, seen) == [True, True]
    url = report.current_url
    report.get("about:blank")
    report.get(url)
    assert run(report, OPENED) == ["tests-test_delta9-test_delta9"]
    report.get(url.partition("#")[0] + "#no-such-check")
    assert (
        run(report, "document.querySelector('.chip').click(); return [...document.querySelectorAll('.row')].length")
        == 6
    )


CLIPBOARD = """window.taken = []; const way = arguments[0];
    const api = { writeText: async (text) => { if (way === "refused") throw new Error("no"); taken.push(text); } };
    Object.defineProperty(navigator, "clipboard", { value: way === "missing" ? undefined : api, configurable: true });
    const select = HTMLTextAreaElement.prototype.select;
    HTMLTextAreaElement.prototype.select = function () { this.isConnected && (window.field = this.value); };
    document.execCommand = (name) => {
        if (way === "nothing works") return false;
        taken.push(field);
        return name === "copy";
    };
    if (way === "nothing works") api.writeText = () => Promise.reject(new Error("no"))"""


@pytest.mark.parametrize("way", ["there", "missing", "refused", "nothing works"])
def test_what_is_to_paste_is_copied(report: Chrome, way: str) -> None:
    run(report, CLIPBOARD, way)
    click(report, ".open", "beta")
    run(report, "document.querySelectorAll('tbody.opened .copy').forEach((button) => button.click())")
    settle(report)
    said = "return [...document.querySelectorAll('tbody.opened .copy')].map((button) => button.textContent)"
    if way == "nothing works":
        assert set(run(report, said)) == {"press Ctrl+C"}
        assert run(report, "return String(getSelection())") in COPIED
    else:
        assert run(report, "return taken") == COPIED
        assert set(run(report, said)) == {"copied"}
    assert not run(report, "return document.querySelectorAll('textarea').length")
    assert run(report, "return document.getElementById('copied').textContent")


COPIED = [
    f"{HOSTILE} beta",
    'keep_fp32=["/a/Conv", "b\\"c"]',
    "pytest 'bundles/a b/bundle.json'",
    "pytest tests/test_beta.py::test_beta",
]


GROUPED = [
    check(f"m{model}[{each}]", 0.02, "fail") if model == each == 3 else check(f"m{model}[{each}]", 0.001 + model / 1e4)
    for model in range(5)
    for each in range(10)
] + [check("alone", 0.001)]


@pytest.fixture
def grouped(report: Chrome, tmp_path: Path) -> Chrome:
    records = [replace(each, model=f"models/{each.nodeid[11:13]}.onnx") for each in GROUPED]
    html.save(tmp_path / "grouped.html", document(records, environment()))
    report.get((tmp_path / "grouped.html").as_uri())
    return report


def test_models_are_groups_under_their_worst_verdict(grouped: Chrome) -> None:
    heads = """return [...document.querySelectorAll(".group")].filter((each) => each.checkVisibility())
        .map((each) => each.innerText.replace(/\\s+/g, " ").trim())"""
    assert run(grouped, heads)[:2] == ["fail m3.onnx 10 checks: 1 fail, 9 pass", "pass m0.onnx 10 checks: 10 pass"]
    shown = "return [...document.querySelectorAll('.check')].filter((each) => each.checkVisibility()).length"
    assert run(grouped, shown) == 11, "of many checks, those where nothing failed are folded"
    click(grouped, ".fold", "m1")
    assert run(grouped, shown) == 21
    search(grouped, "m4 [7]")
    assert (run(grouped, shown), len(run(grouped, heads))) == (1, 1)
    run(grouped, "search.value = ''; search.dispatchEvent(new Event('input'))")
    for first in ("pass m0.onnx", "fail m3.onnx"):
        click(grouped, "thead button", "Worst error")
        assert run(grouped, heads)[0].startswith(first)


def test_a_link_into_a_folded_group_unfolds_it(grouped: Chrome) -> None:
    run(grouped, "location.hash = document.querySelectorAll('.check[hidden]')[4].id")
    settle(grouped)
    assert run(grouped, "return document.querySelector('tbody.opened').checkVisibility()")


PRINTED = """return [...document.querySelectorAll("#checks > .check")]
    .filter((each) => each.querySelector(".detail").checkVisibility())
    .map((each) => each.querySelector(".open").innerText)"""


def test_print_opens_what_needs_a_look_and_nothing_else(report: Chrome) -> None:
    click(report, ".open", "alpha")
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert run(report, PRINTED) == ["broken.onnx", "beta.onnx", "gamma.onnx"]
        for hidden in (".filters", ".copy"):
            assert not run(report, f"return document.querySelector('{hidden}').checkVisibility()")
        # A4 and letter without their margins, in CSS pixels.
        for width in (703, 725):
            screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
            report.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            cut = """const page = document.documentElement.clientWidth;
                return [...document.querySelectorAll("table, figure, pre, dl")]
                    .filter((each) => each.checkVisibility() && each.getBoundingClientRect().right > page + 1).length"""
            assert run(report, cut) == 0
    finally:
        report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_what_is_folded_is_printed_as_rows(grouped: Chrome) -> None:
    grouped.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        rows = "return [...document.querySelectorAll('.row')].filter((each) => each.checkVisibility()).length"
        assert run(grouped, rows) == len(GROUPED)
        assert run(grouped, PRINTED) == ["test_m3[3]"]
    finally:
        grouped.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_long_lines_of_a_message_hang_on_a_phone(report: Chrome) -> None:
    show(report, "small phone", dark=False)
    run(report, "document.querySelectorAll('.open').forEach((button) => button.click())")
    assert run(report, "return document.documentElement.scrollWidth") <= 360
    lefts = """const line = [...document.querySelectorAll(".message span")]
        .find((each) => each.textContent.startsWith("  where"));
        const range = document.createRange(); range.selectNodeContents(line);
        const found = new Map();
        for (const box of range.getClientRects()) {
            const top = Math.round(box.top);
            if (box.width) found.set(top, Math.min(found.get(top) ?? Infinity, Math.round(box.left)));
        }
        return [...found.values()]"""
    first, *others = run(report, lefts)
    assert len(others) > 2
    assert len(set(others)) == 1
    assert others[0] > first + 40


def test_the_keyboard_reaches_and_opens_everything(report: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    button = report.find_element("css selector", ".check .open")
    run(report, "arguments[0].focus()", button)
    assert run(report, "return getComputedStyle(document.activeElement).outlineStyle") != "none"
    for opened in ("true", "false"):
        report.switch_to.active_element.send_keys(Keys.ENTER)
        assert button.get_attribute("aria-expanded") == opened
    unnamed = """return [...document.querySelectorAll("button, input, select, a")]
        .filter((each) => !(each.innerText.trim() || each.ariaLabel)).map((each) => each.outerHTML)"""
    assert run(report, unnamed) == []
    show(report, "small phone", dark=False)
    settle(report)
    scrolled = """return [...document.querySelectorAll(".wide")]
        .filter((each) => each.scrollWidth > each.clientWidth && each.tabIndex !== 0).length"""
    run(report, "document.querySelectorAll('.open').forEach((each) => each.click())")
    settle(report)
    assert run(report, scrolled) == 0
    controlled = """return [...document.querySelectorAll("[aria-controls]")]
        .every((each) => document.getElementById(each.getAttribute("aria-controls")))"""
    assert run(report, controlled)


def test_without_scripts_everything_is_open_and_nothing_is_there_that_needs_them(report: Chrome) -> None:
    url = report.current_url
    report.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        report.get(url)
    finally:
        report.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    seen = "return [...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility()).length"
    assert run(report, seen, ".detail") == len(RECORDS)
    for scripted in (".filters", ".copy"):
        assert run(report, seen, scripted) == 0


def test_where_a_server_forbids_styles_and_scripts_it_can_still_be_read(report: Chrome, tmp_path: Path) -> None:
    html.save(tmp_path / "report.html", document(RECORDS, environment()))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    bare = re.sub(r"<(style|script)>.*?</\1>| style=\"[^\"]*\"", "", text, flags=re.DOTALL)
    (tmp_path / "bare.html").write_text(bare, encoding="utf-8")
    report.get((tmp_path / "bare.html").as_uri())
    assert run(report, "return [...document.querySelectorAll('.detail')].every((each) => each.checkVisibility())")
    assert run(report, "return getComputedStyle(document.querySelector('svg.plot path')).fill") == "none"
    # What stands below another text with styles does not run into it without them.
    lines = (
        """return [...document.querySelectorAll("th[scope=row]")].map((each) => each.innerText.split("\\n").length)"""
    )
    assert min(run(report, lines)) >= 2


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


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "small phone"])
def test_pages_of_many_runs_are_readable(report: Chrome, tmp_path: Path, size: str, *, dark: bool) -> None:
    gpus = ("Tesla T4", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "Orin")
    lost = [MissingRecord("tests/test_beta.py::test_beta", "its process died")]
    runs = [
        (f"{gpu}.json", document(RECORDS[place:], environment(gpu=GpuRecord(gpu)), lost if place == 2 else ()))
        for place, gpu in enumerate(gpus)
    ]
    html.save(tmp_path / "fleet.html", merge.merge(runs))
    html.save_history(tmp_path / "history.html", history.history(runs[:1] + _again(runs[0][1])))
    show(report, size, dark=dark)
    for page in ("fleet", "history"):
        report.get((tmp_path / f"{page}.html").as_uri())
        run(report, "document.querySelectorAll('details').forEach((each) => { each.open = true })")
        assert run(report, "return document.documentElement.scrollWidth") <= SIZES[size][0], page
        assert run(report, CONTRASTS) == [], page


def _again(run: RunRecord) -> list[tuple[str, RunRecord]]:
    """The same checks, one of them worse and one with another model."""
    alpha = check("alpha", 0.009, latency_ms=1.5)
    other = replace(run.checks[1], model_sha256="1" * 64)
    return [("again.json", replace(run, checks=(alpha, other, *run.checks[2:])))]


def test_a_cell_of_the_fleet_leads_to_its_check(report: Chrome, tmp_path: Path) -> None:
    runs = [(f"{gpu}.json", document(RECORDS, environment(gpu=GpuRecord(gpu)))) for gpu in ("T4", "L4")]
    html.save(tmp_path / "fleet.html", merge.merge(runs))
    report.get((tmp_path / "fleet.html").as_uri())
    click(report, "#fleet a[aria-label='fail: beta.onnx int8, L4']")
    settle(report)
    assert run(report, OPENED) == ["tests-test_beta-test_beta-L4"]
    assert run(report, "return document.querySelector('tbody.opened').getBoundingClientRect().top < innerHeight")
    report.back()
    settle(report)
    assert run(report, OPENED) == []


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
