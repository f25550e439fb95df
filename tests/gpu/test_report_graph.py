"""What the graph of a failed check says where a GPU ran the engine and timed its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.record import CheckRecord, typed
from pytest_trtcheck.report import graph
from tests import onnx_models
from tests.diagnosed import conv_chain

if TYPE_CHECKING:
    from tests.conftest import Suite

pytestmark = pytest.mark.gpu


def test_the_engine_s_layers_color_the_operators_of_a_failed_check(suite: Suite) -> None:
    onnx_models.save(conv_chain(5), suite.path / "chain.onnx")
    suite.write(
        test_graph="""
@trt_parity("chain.onnx", precision="fp16", batch=4, tol=1e-7)
def test_graph(): ...
"""
    )
    html = suite.path / "report.html"
    run = suite.run_apart("--trt-layers", "--trt-diagnose=60", f"--trt-html={html}")
    check = run.check("test_graph")
    assert check["verdict"] == "fail", check["message"]
    assert check["evidence"] == "engine"
    record = typed(check, CheckRecord)
    assert record.graph is not None
    (drawing,) = graph.drawings([record], 10**6).by_check.values()
    known = {mode.key: mode for mode in drawing.modes}
    convolutions = [place for place, node in enumerate(record.graph.nodes) if node.op_type == "Conv"]
    for key in ("precision", "time"):
        print(key, known[key].colours, known[key].said)
        told = [known[key].texts[place] for place in convolutions if known[key].colours[place] != graph.UNKNOWN]
        assert len(told) >= len(convolutions) - 1, "TensorRT names the ONNX nodes of its layers"
    assert known["error"].missing == "", "the emulation was traced beside it"
    assert 'class="graph-data"' in html.read_text(encoding="utf-8")
