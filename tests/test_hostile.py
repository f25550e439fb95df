"""Files from anybody: damaged, edited, or made to take all of the memory. An error names the file, the run goes on."""

from __future__ import annotations

import errno
import gc
import itertools
import ntpath
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck import bundle
from pytest_trtcheck.__main__ import main
from pytest_trtcheck.cache import Cache, Key, directory, format_bytes, manifest
from pytest_trtcheck.cache.manifest import describe_files, read_manifest, write_manifest
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.errors import CalibrationError, ModelError, ReportError, unforeseen, visible
from pytest_trtcheck.model import graph, inputs, memory, npz, onnx_model, onnxruntime
from pytest_trtcheck.model.apart import EndedError
from pytest_trtcheck.model.onnx_model import TensorSpec
from pytest_trtcheck.model.ort_runner import _Host
from pytest_trtcheck.precision.quantization import calibration_data
from pytest_trtcheck.record.files import read_json
from pytest_trtcheck.report import json_report
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import Precision
    from tests.conftest import Suite

FLOAT = TensorProto.FLOAT


def check(path: Path, batch: int | None = 1, precision: Precision = "fp16") -> CheckRecord:
    spec = ParitySpec(precision=(precision,), batch=(batch,))
    settings = Checker(cache=Cache(path.parent / "cache"), backend="onnxruntime")
    return settings.check(Request(nodeid="t", model=str(path), folders=(), parity=spec, judge_parity=True))


def edited(edit: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    proto = onnx_models.conv_net()
    edit(proto)
    return proto


def in_another_file(proto: onnx.ModelProto, **fields: str) -> None:
    tensor = proto.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)


EDITS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "an output twice": (lambda m: m.graph.node[1].output.append("c1"), "c1"),
    "the type of a weight": (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "element type 99"),
    "the type of an input": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99),
        "'image' has element type 99, which is none of ONNX's",
    ),
    "a shape below zero": (lambda m: m.graph.initializer[0].dims.__setitem__(0, -1), "shape [-1, 3, 3, 3]"),
    "an offset that is no number": (
        lambda m: in_another_file(m, location="w.bin", offset="a"),
        "weight w1: where its data lies cannot be understood",
    ),
    "a length below zero": (
        lambda m: in_another_file(m, location="w.bin", length="-1"),
        "weight w1: where its data lies cannot be understood",
    ),
    "a name of a million characters": (
        lambda m: setattr(m.graph.node[0], "name", "n" * 1_000_000),
        "a name has 1,000,000 characters ('nnnn",
    ),
    "no operator": (lambda m: setattr(m.graph.node[0], "op_type", ""), "model.onnx"),
    "no inputs": (lambda m: m.graph.node[0].ClearField("input"), "model.onnx"),
    "no opset": (lambda m: m.ClearField("opset_import"), "model.onnx"),
    "an input of any rank": (
        lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"),
        "input 'image' has no shape, not even a number of dimensions",
    ),
    "complex numbers": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.COMPLEX64),
        "complex64 numbers cannot be generated",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_unsound_model_is_an_error_that_says_what_is_wrong(edit: str, tmp_path: Path) -> None:
    change, said = EDITS[edit]
    path = tmp_path / "model.onnx"
    path.write_bytes(edited(change).SerializeToString())
    found = check(path)
    assert found.verdict == "error"
    assert found.message is not None
    assert said in found.message
    assert "please report it" not in found.message
    assert len(found.message) < 2000


FLOAT16 = TensorProto.FLOAT16
TYPES: dict[str, tuple[int, type, int, str]] = {
    "an operand": (FLOAT, np.float16, FLOAT, "operand B is float16, which does not go with the others"),
    "an output of FP16": (FLOAT, np.float32, FLOAT16, "it computes float, and its output is declared as float16"),
    "an output of FP32": (FLOAT16, np.float16, FLOAT, "it computes float16, and its output is declared as float"),
}


@pytest.mark.parametrize("what", TYPES)
def test_types_that_contradict_each_other_are_no_16_bit_model(what: str, tmp_path: Path) -> None:
    given, weight, computed, said = TYPES[what]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", given, [2, 4])],
        [helper.make_tensor_value_info("y", computed, [2, 3])],
        [numpy_helper.from_array(np.ones((4, 3), weight), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    record = check(tmp_path / "m.onnx", None)
    assert record.verdict == "error"
    assert record.message is not None
    assert f"not a sound ONNX model: node 'product' (MatMul): {said}" in record.message


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_models.conv_net().SerializeToString().replace(b"conv1", b"con\xff1"))
    with pytest.raises(ModelError, match="no UTF-8"):
        onnx_model.load(path)


def test_damaged_models_are_errors_in_the_users_words(tmp_path: Path) -> None:
    """Bytes of a sound model, changed at random."""
    sound = onnx_models.conv_net().SerializeToString()
    path = tmp_path / "model.onnx"
    verdicts = set()
    for seed in range(40):
        draw, data = random.Random(seed), bytearray(sound)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(len(data) // 4)] = draw.randrange(256)
        path.write_bytes(data)
        found = check(path)
        verdicts.add(found.verdict)
        assert "please report it" not in (found.message or ""), (seed, found.message)
    assert "error" in verdicts


# --- memory ----------------------------------------------------------------------------------------------------------


def copies(shape: list[int], out: list[int | str]) -> onnx.ModelProto:
    return onnx_models.model([helper.make_node("Abs", ["x"], ["y"])], {"x": (FLOAT, shape)}, {"y": (FLOAT, out)})


@pytest.mark.parametrize(("shape", "out"), [([2**40], ["n"]), ([2**30, 2**30, 8], ["a", "b", "c"]), ([1], [2**40])])
def test_a_shape_beyond_the_memory_is_refused_with_the_limit(
    shape: list[int], out: list[int | str], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(copies(shape, out).SerializeToString())
    found = check(path, batch=None)
    assert found.verdict == "error"
    limit = format_bytes(memory.limit_bytes())
    assert f"of which this machine's memory admits {limit} (a quarter of it)" in str(found.message)


@pytest.mark.parametrize("held_by", ["initializer", "constant"])
@pytest.mark.parametrize("op_type", ["ConstantOfShape", "Expand", "Tile", "RandomNormal"])
def test_a_constant_that_asks_for_more_than_the_memory(op_type: str, held_by: str, tmp_path: Path) -> None:
    """ONNX Runtime fills it, and the machine goes with it: 140 bytes are enough."""
    size = numpy_helper.from_array(np.array([2**42]), "s")
    inputs = {"ConstantOfShape": ["s"], "Expand": ["x", "s"], "Tile": ["x", "s"], "RandomNormal": []}[op_type]
    shape: dict[str, Any] = {"shape": [2**42]} if op_type == "RandomNormal" else {}
    nodes = [
        helper.make_node(op_type, inputs, ["c"], name="bomb", **shape),
        helper.make_node("Add", ["c", "x"], ["a"]),
        helper.make_node("ReduceSum", ["a"], ["y"], keepdims=0),
    ]
    if held_by == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["s"], value=size))
    path = tmp_path / "model.onnx"
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, [1])],
        [helper.make_tensor_value_info("y", FLOAT, [])],
        [size] * (held_by == "initializer"),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    found = check(path)
    assert found.verdict == "error"
    assert f"node 'bomb' ({op_type}) makes [{2**42}], in FP32 16.0 TiB, of which" in str(found.message)


def test_what_fits_into_the_memory_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(copies([1024], [1024]).SerializeToString())
    check(path, batch=None)  # ONNX Runtime's process may take half of the memory, as it was when it began
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 * 2 * 4096)
    assert check(path, batch=None).verdict == "pass"
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 * 2 * 4096 - 4)
    assert "take 8.0 KiB, of which this machine's memory admits 8.0 KiB" in str(check(path, batch=None).message)


def test_the_memory_is_that_of_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) << 10
    memory.total_bytes.cache_clear()
    assert memory.total_bytes() <= total
    assert memory.total_bytes() > 1 << 28


def header(path: Path, shape: tuple[int, ...]) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def test_a_header_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    header(tmp_path / "x.npy", (2**40,))
    with pytest.raises(ValueError, match="its header claims 4,398,046,511,104 bytes, and it holds 128"):
        npz.load(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.write(tmp_path / "x.npy", "x.npy")
    with pytest.raises(ValueError, match="its header claims"):
        npz.load(tmp_path / "x.npz")


def test_a_file_that_unpacks_to_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(1 << 20, np.float32))
    assert (tmp_path / "x.npz").stat().st_size < 10_000
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 << 20)
    with pytest.raises(ValueError, match=r"its arrays claim 4.0 MiB, of which"):
        npz.load(tmp_path / "x.npz")


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6.0).reshape(2, 3).T, "n": np.array(3), "s": np.array(["a", "bc"]), "e": np.zeros((0, 2))}
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    found = npz.load(tmp_path / "x.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    np.save(tmp_path / "x.npy", arrays["x"])
    np.testing.assert_array_equal(npz.load(tmp_path / "x.npy")["arr_0"], arrays["x"])


# --- what is no file -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "model.onnx"
    os.mkfifo(pipe)
    assert "is a pipe or a device, no model file" in str(check(pipe).message)
    with pytest.raises(OSError, match="not a regular file"):
        npz.load(pipe)


@pytest.fixture
def nothing_collected() -> Iterator[None]:
    """What earlier tests left is not taken away at the limit of recursion, where nothing can be called any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_json_from_elsewhere(tmp_path: Path, nothing_collected: None) -> None:
    for text, said in (("[" * 100_000 + "]" * 100_000, "nested too deeply"), ("\xff", "utf-8"), ("{", "Expecting")):
        (tmp_path / "x.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=said):
            read_json(tmp_path / "x.json")
        with pytest.raises(ReportError, match="x"):
            bundle.read(tmp_path / "x.json")
        assert bundle.is_bundle(tmp_path / "x.json")
        with pytest.raises(ReportError, match="x"):
            json_report.read(tmp_path / "x.json")


# --- text from names and from other libraries ------------------------------------------------------------------------

EVIL = "y\x1b]0;title\x07\u202e\x9b31m"
SHOWN = r"y\x1b]0;title\x07\u202e\x9b31m"


@pytest.mark.parametrize("workers", ["plain", "n2"])
def test_names_command_neither_terminal_nor_page(suite: Suite, workers: str) -> None:
    """An output, a path that is no UTF-8, a note and a skip reason; every report is written."""
    proto = onnx_models.conv_net()
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = EVIL
    onnx_models.save(proto, suite.path / "evil.onnx")
    unreadable = os.fsdecode(b"m\xff\x1b[31m.onnx")
    (suite.path / unreadable).write_bytes(proto.SerializeToString())
    suite.write(
        test_evil=f"NAME = {unreadable!r}\n"
        + "@trt_parity('evil.onnx', batch=1, tol=1e-9)\ndef test_differs(): ...\n\n"
        + "@trt_parity(NAME, batch=1)\ndef test_path(): ...\n\n"
        + f"@trt_parity('conv.onnx', keep_fp32=[{EVIL!r}])\ndef test_argument(): ...\n"
    )
    old = suite.path / "bundles" / ".unfinished-old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    arguments = ("--trt-html=report.html", "--junitxml=junit.xml", "--trt-bundle=bundles", "-rA")
    run = suite.run(*arguments) if workers == "plain" else suite.run_apart("-n2", *arguments)
    assert len(run.checks) == 3
    assert not old.exists(), "what a killed run left of a bundle"
    for text in (run.text, (suite.path / "report.html").read_text(), (suite.path / "junit.xml").read_text()):
        assert not set("\x1b\x07\x9b\u202e\x00") & set(text)
        assert SHOWN in text
    assert r"m\udcff\x1b[31m.onnx: its path is no UTF-8" in run.text
    # The report keeps the names as they are.
    assert run.check("test_differs")["parity"]["outputs"][0]["name"] == EVIL


def test_a_message_that_nobody_can_read_is_cut() -> None:
    shown = visible("a" * 10_000_000 + "\x1b")
    assert len(shown) < 300_000
    assert "9,800,001 characters" in shown
    assert shown.endswith(r"\x1b")


def test_text_of_every_language_stays() -> None:
    for text in ("naïve 模型 ✓ 👩‍🔬 می‌خواهم a\tb\n", ""):
        assert visible(text) == text


# --- files with hard links -------------------------------------------------------------------------------------------


def test_data_files_may_have_hard_links(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own, of which a package manager keeps a second name; and a bundle leaves those of the cache alone."""
    monkeypatch.setattr(graph, "EXTERNAL_DATA_THRESHOLD", 0)
    onnx.save(
        onnx_models.conv_net(),
        suite.path / "linked.onnx",
        save_as_external_data=True,
        location="linked.data",
        size_threshold=0,
    )
    (suite.path / "again").hardlink_to(suite.path / "linked.data")
    suite.write(
        test_linked="@trt_parity('linked.onnx', batch=1, precision=['fp16', 'int8'], tol=1e-9)\ndef test_a(): ...\n"
    )
    suite.write(
        conftest="@pytest.fixture\ndef trt_calibration(): return [{'image': np.ones((1, 3, 16, 16), np.float32)}]\n"
    )
    for _ in range(2):
        run = suite.run("--trt-bundle=bundles", "--trt-cache-dir=cache")
        assert [each["verdict"] for each in run.checks] == ["fail", "fail"], run.text
    assert list(suite.path.rglob("cache/**/*.data"))
    assert all(path.stat().st_nlink == 1 for path in suite.path.rglob("cache/**/*") if path.is_file())
    assert len(list((suite.path / "bundles").rglob("*.data"))) == 4


def test_too_little_memory_is_told_whatever_it_is_called() -> None:
    said = "Non-zero status code: CUDNN failure 5000: CUDNN_STATUS_INTERNAL_ERROR ; GPU=0"
    assert "too little memory is free" in onnxruntime.memory_hint(RuntimeError(said))
    assert "too little memory is free" in onnxruntime.memory_hint(RuntimeError("std::bad_alloc"))
    assert onnxruntime.memory_hint(RuntimeError("Got invalid dimensions for input: x")) == ""


SEALED = """
@trt_parity("conv.onnx", precision="int8", calibration="data/*.npz", batch=2, tol=1e-6)
def test_fails(): ...
"""


def test_an_entry_that_says_something_else_under_a_right_checksum_is_an_error_that_names_the_file(suite: Suite) -> None:
    """Made right again by whoever writes to the cache; every JSON file of every entry but those that nobody reads."""
    (suite.path / "data").mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        np.savez(suite.path / f"data/{index}.npz", image=rng.standard_normal((1, 3, 16, 16), np.float32))
    suite.write(test_sealed=SEALED)
    said = suite.run("--trt-cache-dir=cache").checks[0]["message"]
    tried = set()
    for path in sorted((suite.path / "cache").rglob("files/*.json")):
        entry = path.parents[1]
        original = path.read_bytes()
        for content in (b"{}" if original.startswith(b"[") else b"[1]", original):
            path.write_bytes(content)
            write_manifest(entry, replace(read_manifest(entry), files=describe_files(entry / "files")))
            if content is not original:
                (check,) = suite.run("--trt-cache-dir=cache").checks
                assert check["verdict"] == "error" or check["message"] == said, path
                if check["verdict"] == "error":
                    assert str(entry.relative_to(suite.path)) in check["message"], path
                    tried.add(entry.parent.name)
    assert {"lowered", "acceptance", "blame", "emulation", "reference"} <= tried


def functions(*bodies: tuple[str, list[str]]) -> onnx.ModelProto:
    """A model of a function that calls those named behind it, one after the other."""
    made, opsets = [], [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    for name, called in bodies:
        values = ["a", *(f"v{number}" for number in range(1, len(called))), "b"]
        nodes = [
            helper.make_node(each, [values[place]], [values[place + 1]], domain="" if each == "Relu" else "my")
            for place, each in enumerate(called)
        ]
        made.append(helper.make_function("my", name, ["a"], ["b"], nodes, opsets))
    ends = [helper.make_tensor_value_info(name, FLOAT, [2, 8]) for name in "xy"]
    net = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="my")], "g", ends[:1], ends[1:])
    return helper.make_model(net, functions=made, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize(
    ("bodies", "said"),
    [
        ([("F", ["F"])], "function my::F calls my::F, without end"),
        ([("F", ["Relu", "G"]), ("G", ["F"])], "calls my::"),
        (
            [("F", ["F39"]), *((f"F{n}", [f"F{n - 1}"] * 2) for n in range(1, 40)), ("F0", ["Relu"])],
            "its functions stand for 549,755,813,888 nodes, of which 1,000,000 are taken at the most",
        ),
    ],
)
def test_functions_that_never_end(tmp_path: Path, bodies: list[tuple[str, list[str]]], said: str) -> None:
    """A few hundred bytes that ONNX's own checker, and whatever inlines them, is at for ever."""
    onnx.save(functions(*bodies), tmp_path / "model.onnx")
    record = check(tmp_path / "model.onnx")
    assert record.verdict == "error"
    assert said in str(record.message)
    assert "please report" not in str(record.message)


def test_a_function_that_is_called_as_an_operator(tmp_path: Path) -> None:
    proto = onnx_models.conv_net()
    body = [helper.make_node("Tanh", ["x"], ["y"])]
    proto.functions.append(helper.make_function("", "Relu", ["x"], ["y"], body, proto.opset_import))
    onnx.save(proto, tmp_path / "model.onnx")
    record = check(tmp_path / "model.onnx")
    assert record.verdict == "error"
    assert "a function is called 'Relu', as an operator of ONNX's own" in str(record.message)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_function_that_is_called_as_an_operator_of_onnx_runtimes(tmp_path: Path, precision: Precision) -> None:
    """ONNX Runtime computes its own Gelu instead of the function, and TensorRT ONNX's."""
    proto = onnx_models.conv_net()
    gelu = helper.make_node("Gelu", [proto.graph.output[0].name], ["activated"], "gelu", domain="com.microsoft")
    proto.graph.node.append(gelu)
    proto.graph.output[0].name = "activated"
    body = [helper.make_node("Tanh", ["x"], ["y"])]
    proto.functions.append(helper.make_function("com.microsoft", "Gelu", ["x"], ["y"], body, proto.opset_import))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(proto, tmp_path / "model.onnx")
    record = check(tmp_path / "model.onnx", precision=precision)
    if precision == "fp16":
        assert record.verdict == "pass", record.message
    else:
        assert record.verdict == "error"
        assert "it calls the model's own function 'com.microsoft::Gelu'" in str(record.message)


def test_functions_that_nothing_calls_cost_nothing(tmp_path: Path) -> None:
    """The second of them stands for 2^39 nodes, and the model for one."""
    bomb = [(f"F{n}", [f"F{n - 1}"] * 2) for n in range(1, 40)]
    onnx.save(functions(("F", ["Relu"]), *reversed(bomb), ("F0", ["Relu"])), tmp_path / "model.onnx")
    record = check(tmp_path / "model.onnx", batch=None)
    assert record.verdict == "pass", record.message


def test_functions_that_end(tmp_path: Path) -> None:
    onnx.save(functions(("F", ["G", "G"]), ("G", ["Relu", "Relu"])), tmp_path / "model.onnx")
    assert onnx_model.load(tmp_path / "model.onnx").op_types == {"F", "G", "Relu"}


def test_a_shape_that_is_open_does_not_hide_what_is_wrong(tmp_path: Path) -> None:
    """ONNX's checker stops at an output without a shape, which many sound models have."""

    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        proto.graph.initializer[0].ClearField("raw_data")

    onnx.save(edited(edit), tmp_path / "model.onnx")
    said = str(check(tmp_path / "model.onnx").message)
    assert "shape' of" not in said
    assert "please report" not in said


def test_sparse_weights(tmp_path: Path) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        sparse = proto.graph.sparse_initializer.add(dims=[4])
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "spare"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "places"))

    onnx.save(edited(edit), tmp_path / "model.onnx")
    assert "sparse weights ('spare'), which TensorRT does not read" in str(check(tmp_path / "model.onnx").message)


def test_an_archive_whose_index_names_an_array_many_times(tmp_path: Path) -> None:
    writer = npz.ArrayWriter(tmp_path / "a.npz")
    writer.add(0, {"x": np.zeros(1000)})
    writer.add_text("about.json", "{}")
    writer.close()
    assert npz.read_arrays(tmp_path / "a.npz", writer.index, 0)["x"].shape == (1000,)
    with pytest.raises(ValueError, match="names an array twice"):
        npz.read_arrays(tmp_path / "a.npz", writer.index * 1000, 0)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # encrypted, both headers say
        data[data.rindex(signature) + flags] |= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(npz.UNREADABLE):
        npz.load_text(tmp_path / "a.npz", "about.json")


def test_sizes_of_any_length() -> None:
    assert format_bytes(2**1100) == "9.1e+287 TiB"
    assert format_bytes(5 << 40) == "5.0 TiB"


ENDLESS = """
import itertools
from collections.abc import Mapping
import numpy as np
from pytest_trtcheck import trt_parity

class Endless(Mapping):
    __getitem__ = lambda self, key: 1.0
    __iter__ = lambda self: map(str, itertools.count())
    __len__ = lambda self: 1

@trt_parity("conv.onnx", tol=Endless())
def test_marked(): ...

@trt_parity("conv.onnx", batch=1)
def test_returned():
    return Endless()

@trt_parity("conv.onnx", precision="int8", calibration=[Endless()], batch=1)
def test_calibrated(): ...

@trt_parity("conv.onnx", seed=np.array([1, 2]))
def test_seed(): ...

def test_after(): ...
"""


def test_a_mapping_that_never_ends(suite: Suite) -> None:
    """In a marker, where all tests would wait for it, and returned by a test."""
    suite.write(test_a=ENDLESS)
    run = suite.run()
    said = {check["nodeid"].rpartition("_")[2]: check["message"] for check in run.checks}
    assert "a mapping of at most 10,000 keys" in said["marked"]
    assert "more than 10,000 names" in said["returned"]
    assert "more than 10,000 names" in said["calibrated"]
    assert "expected an integer of at least 0" in said["seed"]
    run.result.assert_outcomes(passed=1, failed=2, errors=2)


def test_a_chain_longer_than_pythons_stack(tmp_path: Path) -> None:
    names = ["x", *(f"v{number}" for number in range(1050)), "y"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["v0"])]
    nodes += [helper.make_node("Transpose", [a], [b], perm=[1, 0]) for a, b in itertools.pairwise(names[1:])]
    ends = [helper.make_tensor_value_info(name, FLOAT, [4, 4]) for name in "xy"]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    net = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    record = check(path, batch=None)
    assert record.verdict == "pass", record.message


RAISING = """
class Raises:
    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")

class Counted(Raises):
    def __iter__(self):
        raise RuntimeError("not today")

class Path_(Raises):
    def __fspath__(self):
        raise RuntimeError("no path")

class Named(Raises):
    def __str__(self):
        raise RuntimeError("no name")
    __repr__ = __str__

@trt_parity("conv.onnx", seed=Raises())
def test_seed(): ...

@trt_parity("conv.onnx", engine=Path_())
def test_engine(): ...

@trt_parity(Path_())
def test_model(): ...

@trt_parity("conv.onnx", precision="int8", calibration=Counted(), batch=1)
def test_calibration(): ...

@trt_parity("conv.onnx", batch=1)
def test_inputs():
    return Counted()

@trt_parity("conv.onnx", batch=1)
def test_key():
    return {Named(): 1}

@trt_parity("conv.onnx", batch=1)
def test_after(): ...
"""


def test_an_object_that_raises_while_it_is_read_is_named(suite: Suite) -> None:
    suite.write(test_a=RAISING)
    run = suite.run()
    bad = [check for check in run.checks if check["verdict"] != "pass"]
    said = {check["nodeid"].rpartition("_")[2]: check["message"] for check in bad}
    assert {check["code"] for check in bad} == {"user-code-failed"}
    for test, words in {
        "seed": "trt_parity: seed=: RuntimeError: no __index__",
        "engine": "trt_parity: engine=: RuntimeError: no path",
        "model": "trt_parity: model=: RuntimeError: no ",
        "calibration": "conv.onnx: calibration=: RuntimeError: ",
        "inputs": "conv.onnx: returned inputs: RuntimeError: ",
        "key": "conv.onnx: returned inputs: RuntimeError: no name",
    }.items():
        assert said[test].startswith(words), said[test]
        assert "(test_a.py:" in said[test]
    assert "please report" not in run.text
    assert run.check("test_after")["verdict"] == "pass"


MASKED = """
from pytest_trtcheck import Case

X = np.linspace(-1, 1, 1536, dtype=np.float32).reshape(2, 3, 16, 16)
HALF = np.ma.masked_array(X, mask=X > 0)
MASK = [True, False]

def masked(outputs, case):
    return np.ma.masked_array(outputs["logits"][:, 0], mask=MASK)

def told(inputs):
    return {"logits": np.ma.masked_array(np.ones((2, 10), np.float32), mask=np.eye(2, 10) > 0)}

def by_label(outputs, case):
    return -abs(outputs["logits"][:, 0] - case.labels).filled(0)

@trt_parity("conv.onnx")
def test_inputs():
    return {"image": HALF}

@trt_parity("conv.onnx", precision="int8", calibration=[{"image": HALF}])
def test_calibration():
    return {"image": X}

@trt_parity("conv.onnx", score=masked, max_drop=1)
def test_score():
    return {"image": X}

@trt_parity("conv.onnx", reference=told)
def test_reference():
    return {"image": X}

@trt_parity("conv.onnx")
def test_nothing_is_hidden():
    return {"image": np.ma.masked_array(X)}

@trt_parity("conv.onnx", score=by_label, max_drop=10)
def test_labels():  # which only the user's function reads
    return [Case({"image": X}, np.ma.masked_array([1, 2], mask=MASK))]
"""


def test_a_mask_that_nobody_looks_at_is_refused(suite: Suite) -> None:
    suite.write(test_a=MASKED)
    run = suite.run()
    for name, said in {
        "inputs": "returned inputs: input 'image': its mask hides 768 elements, and would not be looked at",
        "calibration": "calibration[0]: input 'image': its mask hides 768 elements, and would not be looked at",
        "score": "score masked on the reference's outputs of returned inputs[0]: its mask hides 1 element",
        "reference": "the reference told: output 'logits': its mask hides 2 elements, and would not be looked at",
    }.items():
        check = run.check(f"test_{name}")
        assert check["verdict"] == "error"
        assert said in check["message"]
    assert run.check("hidden")["verdict"] == "pass"
    assert run.check("labels")["verdict"] == "pass"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_an_npz_that_a_full_disk_ended_is_not_finished_later(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(OSError, match="No space left"), npz.ArrayWriter(Path("/dev/full")) as writer:
        writer.add(0, {"x": np.zeros(100_000, np.float32)})
    del writer
    gc.collect()
    assert not said


def test_a_command_needs_no_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["explain", "no-room"]) == 0


class _NoFiles:
    def find_spec(self, *_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")


NO_ROOM = """
import tempfile

def test_gone(trt_check, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    trt_check("conv.onnx", {"image": np.ones((1, 3, 16, 16), np.float32)})
"""


def test_no_room_and_no_process_are_said_to_be_that(suite: Suite) -> None:
    suite.write(test_a=NO_ROOM)
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}")  # Of what another test left there nothing is made.
    (check,) = run.checks
    assert check["code"] == "no-room", run.text
    assert check["message"].startswith("conv.onnx: no temporary file can be made: No such file or directory (")
    with pytest.raises(BlockingIOError) as forked:
        exec(compile("raise BlockingIOError(11, 'Resource temporarily unavailable')", "/lib/subprocess.py", "exec"))
    for error in (forked.value, RuntimeError("can't start new thread")):
        assert unforeseen(error, "conv.onnx").code == "too-many-processes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(Path("/gone/python")))
        with pytest.raises(FileNotFoundError) as removed:
            subprocess.run([sys.executable], check=False)
        gone = unforeseen(removed.value, "conv.onnx")
    assert (gone.code, "could not be started in another process: No such" in gone.message) == ("library-broken", True)
    with pytest.MonkeyPatch.context() as patch:  # as where so many files are open that no module can be imported
        patch.delitem(sys.modules, "sysconfig", raising=False)
        patch.setattr(sys, "meta_path", [_NoFiles()])
        assert unforeseen(RuntimeError("it broke"), "conv.onnx").message.startswith("conv.onnx: RuntimeError: it broke")
    said = RuntimeError("pthread_create failed, error code: 11 error msg: Resource temporarily unavailable")
    refused = onnxruntime._refused("conv.onnx", Path("conv.onnx"), said)
    assert (refused.code, "raise the limit of processes" in refused.hint) == ("too-many-processes", True)
    ended = _Host()._died(EndedError("ONNX Runtime's process could not go on: can't start new thread"), 30, "conv.onnx")
    assert ended.code == "too-many-processes"
    full = unforeseen(OSError(errno.ENOSPC, "No space left on device", "/x"), "conv.onnx")
    assert (full.code, "could not be written: No space left on device (/x)" in full.message) == ("no-room", True)


def test_too_many_open_files_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, key = Cache(tmp_path), Key("engine", "net", {})
    cache.get_or_make(key, lambda folder: (folder / "plan").write_bytes(b"plan"))

    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    def again(_: object) -> None:
        raise AssertionError("a sound entry was made again")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "read_bytes", full)
        with pytest.raises(OSError, match="Too many") as raised:
            Cache(tmp_path).get_or_make(key, again)
    with monkeypatch.context() as patched:
        patched.setattr(directory, "read_bytes", full)
        other = Cache(tmp_path)
        with pytest.raises(OSError, match="Too many"):
            other.get_or_make(Key("engine", "net", {"precision": "fp16"}), again)
        assert other.problem is None  # nor is the directory to blame, and left for a temporary one
    said = unforeseen(raised.value, "net.onnx")
    assert said.code == "too-many-files"
    assert "net.onnx: Too many open files: this process may have " in said.message
    assert unforeseen(OSError(errno.ENFILE, "Too many"), "net.onnx").message == "net.onnx: Too many"
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert unforeseen(raised.value, "net.onnx").message == "net.onnx: Too many open files"
    with Cache(tmp_path).get_or_make(key, again).understood("plan"):
        pass


@pytest.mark.parametrize(
    ("file", "is_theirs"),
    [
        ("/home/me/backend.py", True),
        ("/usr/lib/python3/dist-packages/numpy/core.py", False),
        ("/venv/lib/python3.12/site-packages/numpy/core.py", False),
        ("c:\\python\\lib\\json\\decoder.py", False),
        ("C:\\me\\backend.py", True),
    ],
)
def test_code_of_the_users_is_none_of_a_library(monkeypatch: pytest.MonkeyPatch, file: str, is_theirs: bool) -> None:
    if ":" in file:
        monkeypatch.setattr("sysconfig.get_path", lambda _: "C:\\Python\\Lib")
        monkeypatch.setattr("os.path.normcase", ntpath.normcase)
    else:
        monkeypatch.setattr("sysconfig.get_path", lambda _: "/usr/lib/python3.12")
    with pytest.raises(KeyError) as raised:
        exec(compile("def build(): raise KeyError('gone')\nbuild()", file, "exec"), {})
    # Without the frame of this test.
    said = unforeseen(raised.value.with_traceback(raised.tb.tb_next), "net.onnx")
    assert (said.code == "user-code-failed") is is_theirs
    assert ("build (backend.py:1) raised it: correct it there" in said.hint) is is_theirs


ENUM = """
import enum

class Word(str, enum.Enum):
    model = "gemm.onnx"
    fp16 = "fp16"
    node = "gemm"
    x = "x"
    y = "y"
    data = "x.npy"
    recorded = "recorded.npz"

X = np.random.default_rng(0).random((2, 4), np.float32)
np.save("x.npy", X)

"""


def test_a_member_of_an_enum_is_the_text_that_it_equals(suite: Suite) -> None:
    suite.write(
        test_it=ENUM
        + """
@trt_parity(Word.model, precision=[Word.fp16])
def test_marker(): return {Word.x: X}

@trt_parity(Word.model, precision="int8", calibration=Word.data, tol=1)
def test_calibration(): return {Word.x: X}

@trt_parity("gemm.onnx", precision="int8", calibration=[{Word.x: X}], tol={Word.y: 1})
def test_calibration_by_name(): return X

@trt_parity("gemm.onnx", shapes={Word.x: X.shape})
def test_shapes(): ...

@trt_parity("gemm.onnx", keep_fp32=[Word.node])
def test_node(): return X

@trt_parity("gemm.onnx", reference=Word.recorded)
def test_recorded(): ...

def test_call(trt_check): trt_check(Word.model, {Word.x: X}, precision=Word.fp16)

@pytest.fixture
def trt_model(): return Word.model

@trt_parity()
def test_fixture(): return X
"""
    )
    run = suite.run()
    verdicts = {each["nodeid"].partition("::")[2]: each["verdict"] for each in run.checks}
    assert len(verdicts) == 8
    failed = {name for name, verdict in verdicts.items() if verdict != "pass"}
    assert failed == {"test_node", "test_recorded"}, run.text
    for text in ("gemm: named in keep_fp32", "recorded.npz: no such file"):
        assert text in run.said, run.text
    assert "Word." not in run.said


def test_a_text_whose_methods_fail_shows_no_traceback(suite: Suite) -> None:
    suite.write(
        test_it="""
class Word(str):
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __str__

@trt_parity("conv.onnx", precision=Word("fp16"), batch=1)
@trt_latency(precision=Word("fp16"), p50_ms=1)
def test_word(): ...
"""
    )
    assert suite.run().check("test_word")["parity"]["verdict"] == "pass"


def test_inputs_without_end_are_refused(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_MOST_CASES", 50)
    suite.write(
        test_it="""
import itertools
from collections.abc import Sequence

X = np.ones((1, 3, 16, 16), np.float32)

class Loader:
    def __iter__(self): return itertools.repeat(X)

class Made(Sequence):
    def __len__(self): return 3
    def __getitem__(self, index): return X

@trt_parity("conv.onnx", batch=1)
def test_loader(): return Loader()

@trt_parity("conv.onnx", batch=1)
def test_made(): return Made()

@pytest.fixture
def trt_inputs(): return itertools.repeat(X)

@trt_parity("conv.onnx", batch=1)
def test_generator(): ...
"""
    )
    run = suite.run()
    for name in ("test_loader", "test_generator"):
        assert run.check(name)["code"] == "input-endless"
    assert "trt_inputs inputs: no end after 50 cases" in run.said
    assert run.check("test_made")["parity"]["verdict"] == "pass"


def test_a_lazy_sequence_is_read_as_far_as_calibration_uses_it() -> None:
    samples = calibration_data.load(range(10**12), [TensorSpec("x", "float32", (1, 3))])
    with pytest.raises(CalibrationError):
        next(iter(samples))


def test_a_record_of_fields_is_no_number(suite: Suite) -> None:
    suite.write(
        test_it="""
@trt_parity("conv.onnx", batch=1)
def test_fields(): return np.ones((1, 3, 16, 16), [("low", "i2"), ("high", "i2")])
"""
    )
    assert suite.run().check("test_fields")["code"] == "input-type"


@pytest.mark.parametrize(
    "argument", ["{!r}", "'conv.onnx', reference={!r}", "'conv.onnx', precision='int8', calibration={!r}"]
)
def test_a_name_that_is_too_long_is_said_to_be_so(suite: Suite, argument: str) -> None:
    for name in ("x" * 300 + ".npz", "x" * 300 + ".onnx"):
        suite.write(test_it=f"@trt_parity({argument.format(name)}, batch=1)\ndef test_it(): ...\n")
        assert suite.run().check("test_it")["code"] in {"model-missing", "golden-unreadable", "calibration-files"}
