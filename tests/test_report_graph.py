"""The model as a graph: what a record holds of it, and what the HTML report draws, also in a real Chromium."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from onnx import helper

from pytest_trtcheck import report
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Request
from pytest_trtcheck.errors import ReportError, visible
from pytest_trtcheck.record import (
    CheckRecord,
    EngineRecord,
    GraphNode,
    GraphRecord,
    GraphTensor,
    LayerRecord,
    jsonable,
    typed,
)
from pytest_trtcheck.report import graph, html
from pytest_trtcheck.report.json_report import document, environment
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models
from tests.test_report_browser import CHROMIUM, CONTRASTS, DRIVER, browser, run, show
from tests.test_report_json import validate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx
    from selenium.webdriver import Chrome

    from tests.conftest import Run, Suite

__all__ = ["browser"]

pytest.importorskip("jinja2", reason="the HTML report needs jinja2: the extra `report`")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed")

VENDOR = Path(report.__file__).parent / "templates" / "vendor"
LENGTH, SPOILED = 24, 22
NODES = 2 * LENGTH + 4
FLOATS = (int(onnx_models.FLOAT), ("batch", 8))
BIAS = np.linspace(0.1, 0.4, 8).astype(np.float32)
HOSTILE = "</script><script>document.title='owned'</script>\"'\u202e<img src=x onerror=\"document.title='owned'\">"


def planted(spoiled: int | None = SPOILED, odd: str = "add7") -> onnx.ModelProto:
    """A chain of Add → Tanh; in block `spoiled` a weight is more than FP16 can hold, and no tensor is.

    `odd` is the name of one of the nodes; the tensor behind it is called after it.
    """
    nodes, last = [], "x"
    for block in range(LENGTH):
        if block == spoiled:
            nodes += [
                helper.make_node("Mul", [last, "small"], ["less"], "lowered"),
                helper.make_node("Mul", ["less", "large"], ["product"], "spoiled"),
                helper.make_node("Mul", ["product", "medium"], ["normal"], "unspoiled"),
            ]
            last = "normal"
        name = odd if block == 7 else f"add{block}"
        nodes += [
            helper.make_node("Mul", ["one", "bias"], [f"scaled{block}"], f"constant{block}"),
            helper.make_node("Add", [last, f"scaled{block}"], [f"{name}_sum"], name),
            helper.make_node("Tanh", [f"{name}_sum"], [f"t{block}"], f"tanh{block}"),
        ]
        last = f"t{block}"
    nodes.append(helper.make_node("Mul", [last, "bias"], ["y"], "last"))
    weights = {
        "small": np.asarray(1e-3, np.float32),
        "large": np.asarray(1e6, np.float32),
        "medium": np.asarray(1e-3, np.float32),
        "one": np.asarray(1.0, np.float32),
        "bias": BIAS,
    }
    return onnx_models.model(nodes, {"x": FLOATS}, {"y": FLOATS}, weights)


X = np.linspace(1.2, 2.9, 16).reshape(2, 8).astype(np.float32)


def checked(folder: Path, model: onnx.ModelProto, **settings: Any) -> CheckRecord:
    onnx_models.save(model, folder / "model.onnx")
    request = Request(
        "test_x.py::test_x", "model.onnx", (folder,), parity=ParitySpec(precision=("fp16",)), inputs=[{"x": X}]
    )
    record = check.Checker(cache=Cache(folder / "cache"), **settings).check(request)
    return CheckRecord.from_json(record.to_json())


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> CheckRecord:
    """A check that fails by one spoiled node, one of whose neighbours has a hostile name."""
    record = checked(tmp_path_factory.mktemp("planted"), planted(odd=HOSTILE))
    assert record.verdict == "fail", record.message
    assert record.graph is not None
    return record


def page(*records: CheckRecord) -> str:
    return html.render(document(records, environment()))


def drawn(record: CheckRecord) -> tuple[graph.Drawing, dict[str, Any]]:
    """What is drawn of one check, and the script's data of it."""
    found = graph.drawings([record], 10**6)
    (drawing,) = found.by_check.values()
    return drawing, {**json.loads(found.structures[drawing.structure]), **json.loads(drawing.data)}


def around(data: dict[str, Any], node: int) -> tuple[list[int], list[int]]:
    """The nodes whose results it reads, and those that read its results."""
    writers = {tensor: index for index, tensors in enumerate(data["writes"]) for tensor in tensors}
    above = [writers[tensor] for tensor in data["reads"][node] if tensor in writers]
    below = [index for index, tensors in enumerate(data["reads"]) if set(tensors) & set(data["writes"][node])]
    return above, below


# --- the record ------------------------------------------------------------------------------------------------------


def test_the_record_holds_the_graph_with_the_errors_that_were_traced(failed: CheckRecord) -> None:
    assert failed.graph is not None
    names = [node.name for node in failed.graph.nodes]
    assert not [name for name in names if name.startswith("constant")], "what computes from constants is left out"
    assert len(names) == NODES

    tensors = failed.graph.tensors
    (spoiled,) = (node for node in failed.graph.nodes if node.name == "spoiled")
    assert spoiled.op_type == "Mul"
    assert spoiled.precision == "fp16"
    assert [tensors[place].name for place in spoiled.reads] == ["less"]
    assert [tensors[place].name for place in spoiled.writes] == ["product"]
    assert tensors[spoiled.writes[0]].type == "float32[batch, 8]"
    assert [tensors[place].name for place in failed.graph.inputs] == ["x"]
    assert [tensors[place].name for place in failed.graph.outputs] == ["y"]

    # The first sum rounded to FP16, by numpy.
    exact = X + BIAS
    half = X.astype(np.float16) + BIAS.astype(np.float16)
    expected = np.linalg.norm(half.astype(np.float64) - exact) / np.linalg.norm(exact.astype(np.float64))
    (first,) = (tensor for tensor in tensors if tensor.name == "add0_sum")
    assert first.error == pytest.approx(expected, rel=0.01)
    assert tensors[spoiled.writes[0]].own == pytest.approx(1 - 65504 / 1e6, rel=0.01), "FP16's largest, for a million"


def test_the_report_with_a_graph_fits_its_schema_and_is_read_again(failed: CheckRecord) -> None:
    data = jsonable(document([failed], environment()))
    validate(data)
    assert typed(json.loads(json.dumps(data["checks"][0])), CheckRecord) == failed


def test_a_passing_check_has_a_graph_where_all_are_asked_for_and_no_red(tmp_path: Path) -> None:
    assert checked(tmp_path, planted(None)).graph is None
    record = checked(tmp_path, planted(None), graphs="all")
    assert record.verdict == "pass"
    assert record.graph is not None
    drawing, data = drawn(record)
    assert {*data["colours"]["error"], *data["colours"]["own"]} == {graph.UNKNOWN}
    assert data["culprit"] is None
    assert "culprit" not in drawing.picture + drawing.heading
    assert drawing.shown.key == "precision"
    assert "no error was traced" in page(record)
    assert {tensor.error for tensor in record.graph.tensors} == {None}


def test_no_check_has_one_where_none_is_asked_for(tmp_path: Path) -> None:
    assert checked(tmp_path, planted(), graphs="none").graph is None


GRAPHS = """
@trt_parity("planted.onnx", seed=1)
def test_fails():
    return {"x": np.full((2, 8), 2, np.float32)}

@trt_parity("gemm.onnx")
def test_passes(): ...
"""


def test_the_option_decides(suite: Suite) -> None:
    onnx_models.save(planted(), suite.path / "planted.onnx")
    suite.write(test_graphs=GRAPHS)
    made = suite.run("--trt-report-graph=all")
    assert ["graph" in each for each in made.checks] == [True, True]
    assert "--trt-report-graph: 'some' is none of failed, all, none" in suite.run("--trt-report-graph=some").text


def test_a_failed_check_has_one_however_it_is_run(suite: Suite, run_everywhere: Callable[..., Run]) -> None:
    onnx_models.save(planted(), suite.path / "planted.onnx")
    suite.write(test_graphs=GRAPHS)
    made = run_everywhere(f"--junitxml={suite.path / 'out.xml'}")
    assert "graph" in made.check("test_fails")
    assert "graph" not in made.check("test_passes")
    junit = ElementTree.parse(suite.path / "out.xml")
    carried = [json.loads(each.get("value", "")) for each in junit.iter("property") if each.get("name") == "trtcheck"]
    assert sorted(each["verdict"] for each in carried) == ["fail", "pass"]
    assert not any("graph" in each for each in carried), "JUnit has no use for it"


def test_what_is_inside_a_branch_stands_before_its_node(tmp_path: Path) -> None:
    def branch(name: str, op_type: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(f"{name}_out", onnx_models.FLOAT, ["batch", 8])
        return helper.make_graph([helper.make_node(op_type, ["x"], [f"{name}_out"], name)], name, [], [value])

    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], "top", keepdims=0),
        helper.make_node("Less", ["top", "limit"], ["is_low"], "less"),
        helper.make_node(
            "If", ["is_low"], ["z"], "if", then_branch=branch("then", "Tanh"), else_branch=branch("else", "Exp")
        ),
        helper.make_node("Mul", ["z", "limit"], ["y"], "last"),
    ]
    model = onnx_models.model(nodes, {"x": FLOATS}, {"y": FLOATS}, {"limit": np.asarray(1.0, np.float32)})
    record = checked(tmp_path, model, graphs="all")
    assert record.graph is not None, record.message
    names = [node.name for node in record.graph.nodes]
    assert names.index("then") < names.index("if") < names.index("last")
    read = [record.graph.tensors[place].name for place in record.graph.nodes[names.index("if")].reads]
    assert sorted(read) == ["else_out", "is_low", "then_out"]


def chain(length: int) -> GraphRecord:
    """A chain of nodes n0, n1, …, each of which reads the tensor before."""
    nodes = tuple(GraphNode(f"/layer.{i}/n{i}", "Add", (i,), (i + 1,), "fp16") for i in range(length))
    tensors = tuple(
        GraphTensor(f"/layer.{i}/n{i}_output_0", "float32[batch, 16]", 1e-3, 1e-4) for i in range(length + 1)
    )
    return GraphRecord(nodes, tensors, (0,), (length,))


def test_of_a_large_graph_what_is_near_is_kept_and_the_rest_counted() -> None:
    found = chain(2000).around([500, 1500], 100)
    names = [node.name for node in found.nodes]
    assert len(names) == 100
    assert found.left_out == 1900
    assert {f"/layer.{i}/n{i}" for i in (*range(480, 521), *range(1480, 1521))} <= {*names}
    assert found.inputs == found.outputs == ()
    # Every place still names the tensor that it named.
    for node in found.nodes:
        number = int(node.name.rpartition("n")[2])
        assert [found.tensors[place].name for place in (*node.reads, *node.writes)] == [
            f"/layer.{i}/n{i}_output_0" for i in (number, number + 1)
        ]
    assert found.around([0], 10).left_out == 1990
    assert chain(20).around([3], 100) == chain(20)


def test_a_graph_of_two_thousand_operators_is_bounded_in_both_reports(failed: CheckRecord) -> None:
    record = replace(failed, graph=chain(2000).around([700], 1000))
    assert len(json.dumps(jsonable(record.graph), indent=2)) < 400_000
    assert len(page(record)) < 600_000


@pytest.mark.parametrize(
    "wrong",
    [{"nodes": [{"name": "n", "op_type": "Add", "reads": [7], "writes": []}]}, {"inputs": [-1]}, {"outputs": [2]}],
)
def test_an_edited_graph_is_refused(failed: CheckRecord, wrong: dict[str, Any]) -> None:
    data = jsonable(failed)
    data["graph"] = {"nodes": [], "tensors": [{"name": "t"}], "inputs": [], "outputs": []} | wrong
    with pytest.raises(ReportError, match="a tensor by a place where there is none"):
        typed(data, CheckRecord)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_spoiled_node_is_the_culprit_and_redder_than_its_neighbours(failed: CheckRecord) -> None:
    _, data = drawn(failed)
    spoiled = data["names"].index("spoiled")
    assert data["culprit"] == data["focus"] == spoiled
    above, below = around(data, spoiled)
    own, error = data["colours"]["own"], data["colours"]["error"]
    assert [data["names"][node] for node in (*above, *below)] == ["lowered", "unspoiled"]
    assert all(own[node] < "4" <= own[spoiled] for node in (*above, *below))
    assert all(error[node] < "4" <= error[spoiled] for node in above)
    assert all(error[node] >= "4" for node in below), "what is behind it inherits the error"


def test_the_colours_follow_the_tolerance(failed: CheckRecord) -> None:
    errors = (None, 5e-6, 9e-5, 9e-4, 0.01, 0.0101, 0.2, float("nan"))
    tensors = [GraphTensor("x"), *(GraphTensor(f"t{i}", error=error) for i, error in enumerate(errors))]
    nodes = tuple(GraphNode(f"n{i}", "Add", (i,), (i + 1,)) for i in range(len(errors)))
    record = replace(failed, graph=GraphRecord(nodes, tuple(tensors), (0,), (len(errors),)))
    drawing, data = drawn(record)
    assert data["colours"]["error"] == "-0123456"
    assert ("3", "≤ 0.01, the tolerance") in drawing.modes[0].legend
    assert data["texts"]["error"] == ["", "5.00e-6", "9.00e-5", "9.00e-4", "0.0100", "0.0101", "0.200", "inf"]


def layered(record: CheckRecord) -> CheckRecord:
    """The same with an engine: two layers that were timed, one that was not, and one that names no node."""
    layers = (
        LayerRecord("fused", "kgen", "int8", ("spoiled", "unspoiled"), (), 0.9, (0.85, 0.95)),
        LayerRecord("single", "gemm", "fp16", ("tanh3",), ("last",), 0.05),
        LayerRecord("untimed", None, "fp32", ("tanh4",)),
        LayerRecord("mover", "reformat", "fp32", (), ("tanh3",)),
        LayerRecord("nameless", None, "fp16", time_ms=0.05),
    )
    engine = EngineRecord("key", False, None, 1.0, 1000, layers=layers)
    return replace(record, evidence="engine", engine=engine)


def test_time_and_precision_are_the_engine_s_where_it_tells_them(failed: CheckRecord) -> None:
    drawing, data = drawn(layered(failed))
    known = {
        name: (data["texts"]["precision"][index], data["texts"]["time"][index], data["colours"]["time"][index])
        for index, name in enumerate(data["names"])
    }
    assert known["spoiled"] == known["unspoiled"] == ("int8", "0.900 ms", "5")
    assert known["tanh3"] == ("fp16", "0.0500 ms", "4"), "what moves its values beside does not count"
    assert known["last"] == ("fp16", "0.0500 ms", "4"), "a layer that moves its values"
    assert known["tanh4"] == ("fp32", "", graph.UNKNOWN)
    assert known["add5"] == ("", "", graph.UNKNOWN), "no layer names it, whatever it was lowered to"
    assert (
        data["layers"][data["layersOf"][data["names"].index("spoiled")][0]]
        == "fused: int8, 0.900 ms, 2 operators in it"
    )
    text = page(layered(failed))
    assert "what TensorRT adds of its own is not in it" in text
    assert "as TensorRT's engine inspector tells it" in text.replace("&#39;", "'")
    assert "0.850–0.950" in text
    assert drawing.modes[3].missing == ""


def test_what_was_not_timed_says_so(failed: CheckRecord) -> None:
    drawing, data = drawn(failed)
    assert {*data["colours"]["time"]} == {graph.UNKNOWN}
    assert "a GPU does that" in drawing.modes[3].missing
    assert "as the model was lowered" in page(failed)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_libraries_are_in_a_page_with_a_graph_alone(failed: CheckRecord) -> None:
    with_graph, without = page(failed), page(replace(failed, graph=None))
    assert "dagre" in with_graph
    assert "dagre" not in without
    assert "graph-view" not in without
    assert with_graph.count("Permission is hereby granted") == 2, "both licenses ask for that"
    assert "sourceMappingURL" not in with_graph
    assert len(with_graph) - len(without) < 130_000
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", with_graph)


def test_the_libraries_are_what_they_are_said_to_be() -> None:
    rows = re.findall(r"^\| (\S+\.js) \|.* ([0-9a-f]{64}) \|$", (VENDOR / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(path.name for path in VENDOR.glob("*.js"))
    for name, digest in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
        assert (VENDOR / f"{name.removesuffix('.min.js')}.LICENSE").is_file()


def test_many_graphs_make_no_page_that_can_t_be_mailed(failed: CheckRecord) -> None:
    large = [replace(failed, nodeid=f"t{n}", graph=chain(900 + n)) for n in range(6)]
    text = page(*large)
    assert len(text.encode()) < 950_000
    assert text.count('class="graph-data"') == 6
    assert "not in this page" in text

    many = page(*(replace(failed, nodeid=f"t{n}", graph=chain(60 + n)) for n in range(60)))
    assert 0 < many.count('class="graph-data"') < 60
    assert "this page has no room for more" in many


def test_checks_of_one_model_share_its_structure(failed: CheckRecord) -> None:
    text = page(*(replace(failed, nodeid=f"t{n}") for n in range(5)))
    assert text.count('class="graph-structure"') == 1
    assert text.count('class="graph-data"') == 5


def test_names_are_escaped_wherever_they_stand(failed: CheckRecord) -> None:
    text = page(failed)
    assert HOSTILE not in text
    assert "\u202e" not in text
    assert "<script>document.title" not in text
    assert "<img" not in text
    assert visible(HOSTILE) in drawn(failed)[1]["names"]
    assert text.count("<script") == text.count("</script>")


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Chrome, tmp_path: Path, failed: CheckRecord) -> Iterator[Chrome]:
    """The report of the failed check, its model drawn; whatever a test does, the console stays empty."""
    open_page(browser, tmp_path, layered(failed))
    yield browser
    log: list[dict[str, Any]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    assert log == []


def open_page(browser: Chrome, folder: Path, *records: CheckRecord, size: str = "desk", dark: bool = False) -> None:
    path = folder / "report.html"
    html.save(path, document(records, environment()))
    show(browser, size, dark=dark)
    browser.get(path.as_uri())
    run(browser, "document.querySelector('.open').click(); document.querySelector('.graph')?.scrollIntoView()")
    wait(browser, "document.querySelector('.graph-view svg')")


def wait(browser: Chrome, expression: str) -> None:
    script = f"""const done = arguments[0], start = performance.now();
        (function look() {{
          if ({expression} || performance.now() - start > 20000) setTimeout(() => done(Boolean({expression})), 60);
          else setTimeout(look, 20);
        }})()"""
    assert browser.execute_async_script(script), expression


NAMED = """
const named = (name) => [...document.querySelectorAll(".graph-view .node")]
    .find((each) => each.querySelector("title").textContent.endsWith(` ${name}`));
"""


def box(browser: Chrome, name: str) -> dict[str, Any]:
    """Where a node is drawn, in the view, and its classes; nothing where it is not."""
    script = """const view = document.querySelector(".graph-view").getBoundingClientRect();
        const found = named(arguments[0]);
        if (!found) return {};
        const at = found.querySelector("rect").getBoundingClientRect();
        return { x: (at.x + at.width / 2 - view.x) / view.width, y: (at.y + at.height / 2 - view.y) / view.height,
            width: at.width, kind: found.getAttribute("class"), said: found.textContent }"""
    found: dict[str, Any] = run(browser, NAMED + script, name)
    return found


def told(browser: Chrome) -> str:
    found: str = run(browser, "return document.querySelector('.graph-info').innerText")
    return found


@needs_browser
def test_the_culprit_is_marked_in_the_middle(opened: Chrome) -> None:
    wait(opened, "document.querySelector('.marked')")
    found = box(opened, "spoiled")
    assert (found["x"], found["y"]) == pytest.approx((0.5, 0.5), abs=0.03)
    assert {"marked", "chosen", "error-5"} <= {*found["kind"].split()}
    assert "the culprit" in found["said"]
    assert box(opened, "unspoiled")["y"] > found["y"] > box(opened, "lowered")["y"]
    assert "The culprit" in told(opened)
    assert "becomes 65504" in told(opened)
    assert "product · float32[batch, 8] · error 0.934" in told(opened)
    assert "fused: int8, 0.900 ms, 2 operators in it" in told(opened)
    marked = run(opened, "return document.querySelectorAll('.graph-view .marked').length")
    assert marked == 1


@needs_browser
@pytest.mark.parametrize(
    ("mode", "spoiled", "other"),
    [("own", "own-5", "own-2"), ("precision", "precision-4", "precision--"), ("time", "time-5", "time--")],
)
def test_the_colouring_switches(opened: Chrome, mode: str, spoiled: str, other: str) -> None:
    run(opened, "document.querySelector(`.graph-modes [value=${arguments[0]}]`).click()", mode)
    assert spoiled in box(opened, "spoiled")["kind"]
    assert other in box(opened, "add16")["kind"]
    shown = """return [...document.querySelectorAll(".graph-legend")].filter((each) => each.checkVisibility())
        .map((each) => each.dataset.mode)"""
    assert run(opened, shown) == [mode]


@needs_browser
def test_what_is_searched_is_jumped_to(opened: Chrome) -> None:
    field = opened.find_element("css selector", ".graph-search input")
    found = "return document.querySelector('.graph-found').textContent"
    assert box(opened, "add0") == {}, "far from the culprit"
    field.send_keys("add0")
    assert run(opened, found) == "1 of 1"
    there = box(opened, "add0")
    assert (there["x"], there["y"]) == pytest.approx((0.5, 0.5), abs=0.03)
    assert "add0_sum" in told(opened)

    field.clear()
    field.send_keys("tanh tanh1")
    first = told(opened)
    assert run(opened, found) == "1 of 11"
    field.send_keys("\ue007")
    assert run(opened, found) == "2 of 11"
    assert told(opened) != first

    field.clear()
    field.send_keys("no such node")
    assert run(opened, found) == "nothing"


@needs_browser
def test_a_click_tells_of_a_node_and_a_drag_does_not(opened: Chrome) -> None:
    press = f"""{NAMED} const box = named("tanh16").querySelector("rect");
        const at = box.getBoundingClientRect(), [x, y] = [at.x + 5, at.y + 5];
        const fire = (type, x, y) => box.dispatchEvent(new PointerEvent(
            type, {{ clientX: x, clientY: y, bubbles: true, pointerId: 1, isPrimary: true }}));
        fire("pointerdown", x, y); fire("pointermove", x + arguments[0], y); fire("pointerup", x + arguments[0], y);
        box.dispatchEvent(new MouseEvent("click", {{ clientX: x + arguments[0], clientY: y, bubbles: true }}))"""
    before = box(opened, "tanh16")["x"]
    run(opened, press, 80)
    assert "tanh16" not in told(opened)
    run(opened, "return new Promise((resolve) => setTimeout(resolve, 100))")
    assert box(opened, "tanh16")["x"] > before
    run(opened, press, 0)
    assert "Tanh tanh16" in told(opened)
    assert "chosen" in box(opened, "tanh16")["kind"]


@needs_browser
def test_the_keyboard_goes_along_the_edges(opened: Chrome) -> None:
    picture = opened.find_element("css selector", ".graph-view svg")
    picture.send_keys("\ue015")  # arrow down
    assert "Mul unspoiled" in told(opened)
    picture.send_keys("\ue013", "\ue013")  # arrow up
    assert "Mul lowered" in told(opened)
    size = box(opened, "spoiled")["width"]
    zoomed = f"""(() => {{ {NAMED} return named("spoiled").getBoundingClientRect().width }})()"""
    picture.send_keys("+")
    wait(opened, f"{zoomed} > {size + 20}")
    picture.send_keys("-", "-")
    wait(opened, f"{zoomed} < {size - 20}")
    picture.send_keys("\ue011")  # home
    assert "Mul spoiled" in told(opened)


@needs_browser
def test_all_of_it_is_drawn_when_asked_for(opened: Chrome) -> None:
    drawn_now = "document.querySelectorAll('.graph-view .node').length"
    assert run(opened, f"return {drawn_now}") == 30
    run(opened, "document.querySelector('[data-do=all]').click()")
    wait(opened, f"{drawn_now} === {NODES}")
    ends = "return [...document.querySelectorAll('.graph-view .end')].map((e) => e.querySelector('title').textContent)"
    assert run(opened, ends) == ["x float32[batch, 8]", "y float32[batch, 8]"]
    assert run(opened, "return document.querySelector('[data-do=all]').disabled")
    # The whole of it is in sight.
    assert 0 < box(opened, "add0")["y"] < box(opened, "last")["y"] < 1


@needs_browser
def test_a_hostile_name_is_text_in_the_picture(opened: Chrome) -> None:
    field = opened.find_element("css selector", ".graph-search input")
    field.send_keys("</script>")
    assert visible(HOSTILE) in told(opened)
    run(opened, "document.querySelector('[data-do=all]').click()")
    run(opened, "return new Promise((resolve) => setTimeout(resolve, 300))")
    assert opened.title == "TensorRT checks: 1 of 1 need a look"
    assert run(opened, "return document.querySelectorAll('img').length") == 0


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_it_is_readable_and_fits(
    browser: Chrome, tmp_path: Path, failed: CheckRecord, size: str, *, dark: bool
) -> None:
    assert failed.parity is not None
    assert failed.parity.blame is not None
    blame = replace(failed.parity.blame, summary=f"tensor {'no_space_' * 40!r} overflows")
    record = replace(failed, parity=replace(failed.parity, blame=blame))
    open_page(browser, tmp_path, layered(record), size=size, dark=dark)
    width = run(browser, "return document.documentElement.clientWidth")
    assert run(browser, "return document.documentElement.scrollWidth") <= width
    assert run(browser, CONTRASTS) == []
    wait(browser, "document.querySelector('.marked')")
    found = box(browser, "spoiled")
    assert (found["x"], found["y"]) == pytest.approx((0.5, 0.5), abs=0.05)
    # Text in a box against the box's own colour, of every colour there is.
    assert run(browser, BOX_CONTRASTS) == []


BOX_CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function luminance(colour) {
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const box = document.querySelector(".graph-view .node"), poor = [];
for (const [mode, last] of [["error", 6], ["own", 6], ["precision", 8], ["time", 5]]) {
  for (let colour = 0; colour <= last; colour++) {
    box.setAttribute("class", `node ${mode}-${colour}`);
    const [one, two] = ["text", "rect"].map((part) => luminance(getComputedStyle(box.querySelector(part)).fill));
    const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (!(contrast >= 4.5)) poor.push(`${mode}-${colour} ${contrast.toFixed(2)}`);
  }
}
return poor;
"""


@needs_browser
def test_paper_has_the_neighbourhood(opened: Chrome) -> None:
    seen = (
        "return ['.graph-view', '.graph-still', '.graph-tools'].map((e) => document.querySelector(e).checkVisibility())"
    )
    assert run(opened, seen) == [True, False, True]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert run(opened, seen) == [False, True, False]
        still = run(opened, "return document.querySelector('.graph-still').textContent")
        width = run(opened, "return document.querySelector('.graph-still svg').getBoundingClientRect().width")
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert "the culprit" in still
    assert "unspoiled" in still
    assert width < 1280


def test_the_picture_without_a_script_keeps_boxes_apart(failed: CheckRecord) -> None:
    drawing, data = drawn(failed)
    boxes = [tuple(map(float, found)) for found in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', drawing.picture)]
    assert len(boxes) == 13
    assert len({*boxes}) == 13
    for x, y in boxes:
        assert not [other for other in boxes if other != (x, y) and other[1] == y and abs(other[0] - x) < 176]
    assert drawing.picture.count("marked") == 1
    assert 'class="node error-5 marked"' in drawing.picture
    assert data["names"][data["culprit"]] in drawing.picture
    assert drawing.remark == ""


def test_a_culprit_of_the_engine_s_is_told_from_one_of_the_precision(failed: CheckRecord) -> None:
    assert failed.parity is not None
    assert failed.parity.blame is not None
    culprit = {"node": "add3", "kind": "engine", "tensor": "add3_sum", "detail": "grows from 0.001 to 0.5 there"}
    blame = replace(failed.parity.blame, step="engine", culprit=culprit, others=("tanh3",))
    drawing, data = drawn(replace(failed, evidence="engine", parity=replace(failed.parity, blame=blame)))
    assert data["names"][data["culprit"]] == "add3"
    assert data["why"] == "grows from 0.001 to 0.5 there"
    assert drawing.remark == "The culprit is where the engine departs from the emulation, whose errors the colors show."
    assert drawing.others == "not told apart from the culprit"
