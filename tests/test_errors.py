"""The codes of errors: each raise has one, each has its section, and what people see leads there."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from pytest_trtcheck import __main__ as command
from pytest_trtcheck import errors
from pytest_trtcheck.check import arguments
from pytest_trtcheck.errors import CODES, CheckFailed
from pytest_trtcheck.report import explain
from tests import onnx_models
from tests.messages import CLASSES, PACKAGE, raised

if TYPE_CHECKING:
    from tests.conftest import Suite


def test_every_code_has_a_section_with_cause_and_cure_and_no_section_is_without_a_code() -> None:
    sections = explain.sections()
    assert list(sections) == list(CODES), "docs/errors.md has the codes in their order"
    assert len(set(CODES)) == len(CODES)
    for code, text in sections.items():
        assert re.fullmatch(r"[*][*]Cause\.[*][*] \S.*\n\n[*][*]Cure\.[*][*] \S.*", text, re.DOTALL), code


def test_every_raise_has_a_code() -> None:
    found = [*raised()]
    assert len(found) > 450
    for each in found:
        is_handed_on = each.code in {"{code}", "{error.code}"} or "record.code" in each.code
        assert each.code in CODES or is_handed_on, each
        assert "can't" not in each.message + each.hint, "messages, as docs/errors.md, have cannot"


def test_every_code_is_that_of_something() -> None:
    named = {getattr(kind, "usual_code", None) for kind in CLASSES.values()}
    for path in PACKAGE.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        if path.name == "errors.py":  # where all of them are listed
            nodes = [node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "code"]
        named |= {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert set(CODES) <= named


def test_a_message_ends_with_where_its_code_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    error = errors.ModelError("a.onnx: no such file", "looked for a.onnx", code="model-missing")
    assert str(error) == "a.onnx: no such file\n  → looked for a.onnx\n  → see docs/errors.md#model-missing"
    assert error.text == "a.onnx: no such file\n  → looked for a.onnx"
    assert str(error.within("reference")).startswith("reference: a.onnx: no such file\n")
    for each in (error, error.within("reference"), CheckFailed("fell", "score-dropped"), errors.GpuError("x")):
        again = pickle.loads(pickle.dumps(each))
        assert (str(again), again.code, type(again)) == (str(each), each.code, type(each))
    assert str(CheckFailed("fell")) == "fell"

    for name, address in {"Documentation": "https://docs/", "Repository": "https://host/us/it"}.items():
        page = {
            "Documentation": "https://docs/errors.html",
            "Repository": "https://host/us/it/blob/HEAD/docs/errors.md",
        }
        told = metadata.Message() if hasattr(metadata, "Message") else __import__("email.message").message.Message()
        told["Project-URL"] = f"{name}, {address}"
        with monkeypatch.context() as patched:
            patched.setattr(metadata, "metadata", lambda _, told=told: told)
            assert errors.address_of.__wrapped__("model-kind") == f"{page[name]}#model-kind"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGPIPE")
def test_a_reader_that_has_seen_enough_is_no_bug() -> None:
    """As with `| head -1`: nobody reads on, and nothing is said of it."""
    with subprocess.Popen(
        [sys.executable, "-m", "pytest_trtcheck", "explain", *errors.CODES],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_command_that_is_interrupted_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(command._RUN, "explain", interrupted)
    assert command.main(["explain"]) == 130
    assert capsys.readouterr().err == "explain: interrupted\n"


def test_explain_prints_sections_and_lists_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["explain", "model-missing", "docs/errors.md#outputs-differ"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("model-missing\n\nCause. There is no file")
    assert "outputs-differ\n\nCause." in said
    assert "See docs/diagnosis.md" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 100
    assert command.main(["explain"]) == 0
    assert capsys.readouterr().out.split() == list(CODES)
    # As it is copied with the hint around it.
    for pasted in (["→", "see", "docs/errors.md#model-missing"], ["(see https://a.b/docs/errors.md#Model-missing)."]):
        assert command.main(["explain", *pasted]) == 0
        assert capsys.readouterr().out.startswith("model-missing\n\nCause.")
    assert command.main(["explain", "model-mising"]) == 2
    assert "did you mean 'model-missing'?" in capsys.readouterr().err


HEAD = """
IMAGE = np.random.default_rng(0).uniform(0, 1, (4, 3, 16, 16)).astype(np.float32)

def top(outputs, case):
    return outputs["logits"].argmax(axis=1) == 0

def none():
    raise RuntimeError("no such weights")
"""
PROVOKED: dict[str, tuple[str, str]] = {
    "outputs-differ": ('"gemm.onnx", tol=1e-9', ""),
    "outputs-not-finite": ('"conv.onnx"', '{"image": IMAGE * 1e6}'),
    "argument-unknown": ('"conv.onnx", precison="fp16"', ""),
    "argument-value": ('"conv.onnx", tol="small"', ""),
    "argument-missing": ('"conv.onnx", score=top', ""),
    "argument-conflict": ('"conv.onnx", engine="a.plan", calibration="x.npz"', ""),
    "output-unknown": ('"gemm.onnx", tol={"nothing": 0.1}', ""),
    "node-unknown": ('"gemm.onnx", keep_fp32=["gem"]', ""),
    "user-code-failed": ("none", ""),
    "user-code-result": ("lambda: 3", ""),
    "model-unnamed": ("", ""),
    "model-missing": ('"con.onnx"', ""),
    "model-kind": ('"weights.pt"', ""),
    "model-damaged": ('"damaged.onnx"', ""),
    "model-unsound": ('"unsound.onnx", batch=1', ""),
    "model-weights": ('"weightless.onnx"', ""),
    "model-random": ('"random.onnx"', ""),
    "runtime-failed": ('"reshaped.onnx"', '{"x": np.ones(5, np.float32)}'),
    "input-names": ('"conv.onnx"', '{"imag": IMAGE}'),
    "input-type": ('"conv.onnx"', '{"image": IMAGE.astype(np.float64)}'),
    "input-shape": ('"conv.onnx"', '{"image": IMAGE[0]}'),
    "input-values": ('"conv.onnx"', '{"image": IMAGE * np.nan}'),
    "input-empty": ('"conv.onnx"', "[]"),
    "input-dimensions": ('"conv.onnx"', ""),
    "input-batch": ('"gemm.onnx", batch=8', ""),
    "input-profile": ('"conv.onnx", shapes={"image": [(1, 3, 16, 16), (1, 3, 16, 16), (2, 3, 16, 16)]}', "IMAGE"),
    "labels-missing": ('"gemm.onnx", score=top, max_drop=0.01', ""),
    "not-exercised": ('"conv.onnx", score=top, max_drop=1.0', '{"image": IMAGE}'),
    "nothing-computed": ('"gemm.onnx", keep_fp32=["*"]', ""),
    "calibration-missing": ('"gemm.onnx", precision="int8"', ""),
    "calibration-files": ('"gemm.onnx", precision="int8", calibration="none/*.npz"', ""),
    "calibration-fit": ('"gemm.onnx", precision="int8", calibration=[{"y": np.ones((2, 4), np.float32)}]', ""),
    "calibration-values": ('"gemm.onnx", precision="int8", calibration=[np.full((2, 4), np.nan, np.float32)]', ""),
    "reference-fit": ('"gemm.onnx", reference="conv.onnx"', ""),
    "reference-not-finite": ('"infinite.onnx"', ""),
    "golden-unreadable": ('"gemm.onnx", reference="golden.npz"', ""),
    "engine-file": ('"gemm.onnx", engine="gemm.onnx"', ""),
}


def project(folder: Path) -> None:
    """The models that the tests above name."""
    conv, gemm = onnx_models.conv_net(), onnx_models.gemm_net()
    (folder / "weights.pt").write_bytes(b"PK")
    (folder / "damaged.onnx").write_bytes(conv.SerializeToString()[:-100])
    conv.graph.node[1].output.append("c1")
    onnx_models.save(conv, folder / "unsound.onnx")
    lost = onnx_models.gemm_net()
    onnx.save(lost, folder / "weightless.onnx", save_as_external_data=True, location="lost.bin", size_threshold=0)
    (folder / "lost.bin").unlink()
    gemm.graph.initializer[0].raw_data = np.full((4, 3), np.inf, np.float32).tobytes()
    onnx_models.save(gemm, folder / "infinite.onnx")
    shape = np.array([2, 2], np.int64)
    nodes = [onnx.helper.make_node("Reshape", ["x", "s"], ["r"]), onnx.helper.make_node("Gemm", ["r", "w"], ["y"])]
    sides = {"x": (onnx_models.FLOAT, ["n"])}, {"y": (onnx_models.FLOAT, [2, 2])}
    reshaped = onnx_models.model(nodes, *sides, {"s": shape, "w": np.ones((2, 2), np.float32)})
    onnx_models.save(reshaped, folder / "reshaped.onnx")
    noise = onnx.helper.make_node("RandomNormalLike", ["x"], ["n"], name="noise")
    add = onnx.helper.make_node("Add", ["x", "n"], ["y"], name="add")
    onnx_models.save(onnx_models.elementwise([noise, add], 4), folder / "random.onnx")


SAID: dict[str, tuple[str, str, str]] = {
    "gpu": ('"gemm.onnx")\n@trt_latency(p50_ms={"T5": 1.0}', "", "unknown GPU 'T5'\n  → did you mean T4? Otherwise "),
    "capitals": ('"gemm.onnx", precision="INT8"', "", "→ did you mean 'int8'?"),
    "half": ('"gemm.onnx", precision="half"', "", "→ did you mean 'fp16'?"),
    "glob": ('"gemm.onnx", precision="int8", calibration="none/*.npz"', "", "→ relative paths are looked up in "),
    "zipmap": ('"zipmap.onnx", batch=1', "", "is no tensor, but a list of maps from class to probability\n"),
    "zipmap_hint": ('"zipmap.onnx", batch=1', "", "skl2onnx.to_onnx(…, options={'zipmap': False})"),
    "doubles": (
        '"doubles.onnx"',
        "",
        ": computes in FP64, in which ONNX Runtime has no Conv (node 'conv')",
    ),
    "doubles_hint": (
        '"doubles.onnx"',
        "",
        "→ export it in FP32 (in PyTorch model.float())",
    ),
    "opset": ('"old.onnx"', "", "the model is in an old opset: export it in opset 13 or newer"),
    "future": ('"future.onnx"', "", "is in opset 99, and ONNX Runtime "),
    "infinite": (
        '"gemm.onnx"',
        '{"x": np.array([[1, 2, 3, 4], [1, 2, -np.inf, 4]], np.float32)}',
        "returned inputs: input 'x' is infinite in 1 of 8 elements",
    ),
    "untyped": ('"untyped.onnx"', "", "output 'scores' has no type\n  → what selects a part of a model, as skl2onnx's"),
    "untyped_hint": (
        '"untyped.onnx"',
        "",
        "model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT, and save the model again",
    ),
    "maker": ("lambda: 3", "", "<lambda>() gave an int, which is no model"),
}
"""What else people do, and a text that they are to see."""


def more_models(folder: Path) -> None:
    """The models that `SAID` names."""
    helper, proto = onnx.helper, onnx.TensorProto
    for name, kind, opset in (("doubles", proto.DOUBLE, 17), ("future", proto.FLOAT, 99)):
        weight = np.ones((4, 3, 3, 3), helper.tensor_dtype_to_np_dtype(kind))
        conv = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
        sides = {"x": (kind, [1, 3, 8, 8])}, {"y": (kind, [1, 4, 6, 6])}
        onnx_models.save(onnx_models.model([conv], *sides, {"w": weight}, opset), folder / f"{name}.onnx")
    add = helper.make_node("Add", ["x", "k"], ["y"], name="add", broadcast=1, axis=1)
    sides = {"x": (proto.FLOAT, [1, 3, 8, 8])}, {"y": (proto.FLOAT, [1, 3, 8, 8])}
    old = onnx_models.model([add], *sides, {"k": np.ones(3, np.float32)}, 6)
    old.ir_version = 3
    old.graph.input.append(helper.make_tensor_value_info("k", proto.FLOAT, [3]))
    onnx.save(old, folder / "old.onnx")
    zipmap = onnx_models.gemm_net()
    floats = helper.make_map_type_proto(proto.INT64, helper.make_tensor_type_proto(proto.FLOAT, None))
    zipmap.graph.output.append(helper.make_value_info("maps", helper.make_sequence_type_proto(floats)))
    node = helper.make_node("ZipMap", ["y"], ["maps"], name="zip", domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    zipmap.graph.node.append(node)
    zipmap.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    onnx.save(zipmap, folder / "zipmap.onnx")
    untyped = onnx_models.gemm_net()
    untyped.graph.node.append(helper.make_node("Identity", ["y"], ["scores"], name="same"))
    untyped.graph.output.append(onnx.ValueInfoProto(name="scores"))
    onnx.save(untyped, folder / "untyped.onnx")


def test_what_people_do_is_answered_in_their_words(suite: Suite) -> None:
    more_models(suite.path)
    tests = [
        f"@trt_parity({marker})\ndef test_{name}():\n    return {inputs or None}\n"
        for name, (marker, inputs, _) in SAID.items()
    ]
    suite.write(test_it=HEAD + "\n".join(tests))
    text = " ".join(suite.run().text.split())  # However it is wrapped.
    for name, (_, _, said) in SAID.items():
        assert " ".join(said.split()) in text, name
    assert text.count(f"{suite.path}, {suite.path}") == 0, "one folder is named once"
    assert not re.search(r"\b1 (samples|nodes|rows|elements|values|bytes|runs)\b", text)


def test_the_nearest_word_and_whole_words() -> None:
    assert errors.suggestion("T5", ("A100", "T4", "V100")) == "did you mean 'T4'?"
    assert errors.suggestion("Fp16", ("fp16", "bf16")) == "did you mean 'fp16'?"
    assert errors.suggestion("x", ("a", "b")) == errors.suggestion("nothing", ("fp16",)) == ""
    assert errors.first_line("word " * 1000) == f"{'word ' * 399}word …"
    assert errors.cut("a" * 30, 20) == "a" * 20
    assert [errors.plural(n, "sample") for n in (0, 1, 2, 1000)] == [
        "0 samples",
        "1 sample",
        "2 samples",
        "1,000 samples",
    ]


def test_what_people_see_leads_to_its_section(suite: Suite) -> None:
    project(suite.path)
    tests = [
        f"@trt_parity({marker})\ndef test_{code.replace('-', '_')}():\n    return {inputs or None}\n"
        for code, (marker, inputs) in PROVOKED.items()
    ]
    tests.append('@trt_latency(p50_ms=1.0)\n@trt_parity("gemm.onnx")\ndef test_not_measured(): pass\n')
    suite.write(test_it=HEAD + "\n".join(tests))
    run = suite.run("--junitxml=junit.xml", "--trt-html=page.html")
    found = {each["nodeid"].rpartition("::test_")[2].partition("[")[0].replace("_", "-"): each for each in run.checks}
    assert {code: found[code].get("code") for code in PROVOKED} == {code: code for code in PROVOKED}
    assert "code" not in found["not-measured"], "what passed is explained by nothing"

    for code, (marker, _) in PROVOKED.items():
        assert f"see docs/errors.md#{code}" in run.text, marker
    assert "explained by: python -m pytest_trtcheck explain " in run.text
    properties = {each.get("value") for each in ET.parse(suite.path / "junit.xml").iter("property")}
    assert set(PROVOKED) <= properties
    page = (suite.path / "page.html").read_text(encoding="utf-8")
    assert all(f"docs/errors.md#{code}" in page for code in PROVOKED)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("model", re, "model=<module re>: expected a path"),
        ("reference", re, "that is a Python module: give what it holds"),
        ("model", {"layer.weight": 1}, "weights alone compute nothing: load them into the module"),
        ("model", onnx.GraphProto(), "model=GraphProto(''): expected a path"),
        ("engine", onnx.ModelProto(), "a model is given as model=, and its engine is built"),
        ("tol", np.ones((3, 3)), "tol=<ndarray>: expected a number"),
    ],
)
def test_an_object_that_fits_nowhere_is_told_by_what_it_is(argument: str, value: object, said: str) -> None:
    with pytest.raises(errors.ArgumentError) as info:
        arguments.from_marker("trt_parity", (), {argument: value})
    assert said in str(info.value)
    assert "\n" not in info.value.message
