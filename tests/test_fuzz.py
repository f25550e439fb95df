"""A quick, seeded part of the fuzz run (benchmarks/fuzz), and what the whole of it once found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.__main__ import main
from pytest_trtcheck.backends.tensorrt import plan_file
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.check import kept_inputs
from pytest_trtcheck.check.arguments import from_marker
from pytest_trtcheck.check.checker import Checker
from pytest_trtcheck.check.request import Request
from pytest_trtcheck.errors import (
    ArgumentError,
    CalibrationError,
    InputError,
    ModelError,
    ReportError,
    UnforeseenError,
    first_line,
)
from pytest_trtcheck.model import graph, npz, onnx_model
from pytest_trtcheck.plugin.options import parse_size
from pytest_trtcheck.precision.quantization import calibration_data
from pytest_trtcheck.record.files import read_bytes, resolved, write_text
from pytest_trtcheck.report import json_report, plots
from pytest_trtcheck.spec import BuildOptions, ParitySpec
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Suite

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes, and no /proc")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_a_seeded_part_of_the_fuzz_run_is_quiet(tmp_path: Path) -> None:
    report = tmp_path / "fuzz.json"
    targets = ("external", "arrays", "reports")
    limits = ("--cases=10", "--seconds=20", "--seed=tests", f"--json={report}")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "fuzz", *targets, *limits], check=False, timeout=300)
    found = json.loads(report.read_text())
    assert {name: each["kinds"] for name, each in found["targets"].items()} == {name: {} for name in targets}
    assert all(each["cases"] for each in found["targets"].values())
    assert done.returncode == 0


# --- models ----------------------------------------------------------------------------------------------------------


def external(path: Path, **fields: str) -> Path:
    """A model with its first weight in `w.bin`."""
    proto = onnx_models.gemm_net()
    tensor = proto.graph.initializer[0]
    (path.parent / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **fields}.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"length": "7"}, "weight w: is said to have 7 bytes, its shape needs 48"),
        ({"location": "a\0b"}, "leads out of the model's folder"),
        ({"location": "n" * 1_000_000}, "is no name that a file can have"),
        ({"location": "round"}, "is a link out of the model's folder"),
    ],
)
def test_where_weights_lie(fields: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    assert onnx_model.load(external(tmp_path / "sound.onnx", length="48")).external == ("w.bin",)
    with pytest.raises(ModelError) as found:
        onnx_model.load(external(tmp_path / "model.onnx", **fields))
    assert said in found.value.message
    assert len(found.value.message) < 1000


@pytest.mark.skipif(sys.platform == "win32", reason="a hole in a file takes its room on the disk there")
def test_a_file_of_weights_is_not_read_for_ever(tmp_path: Path) -> None:
    model = external(tmp_path / "model.onnx", length="48")
    os.truncate(tmp_path / "w.bin", 1 << 40)
    with pytest.raises(ModelError, match=re.escape("'w.bin' has 1.0 TiB, the weights in it 48 B")):
        onnx_model.load(model)


def test_an_attribute_of_a_function_stands_in_functions_alone(tmp_path: Path) -> None:
    proto = onnx_models.gemm_net()
    proto.graph.node[0].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="x")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="node 'gemm': 'alpha' refers to the attribute of a function"):
        onnx_model.load(tmp_path / "model.onnx")


def choosing(outside: str, first: str, second: str, value: float = 3) -> onnx.ModelProto:
    """`If` whose branches multiply by a weight of their own, behind a product by one outside of them."""

    def scaled(given: str, weight: str, made: str) -> onnx.NodeProto:
        return helper.make_node("Mul", [given, weight], [made], f"{made}_mul")

    def weights(name: str, value: float = 2) -> list[onnx.TensorProto]:
        return [onnx.numpy_helper.from_array(np.full(2, value, np.float32), name)]

    x, y, t, e = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xyte")
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    branches = {
        "then_branch": helper.make_graph([scaled("z", first, "t")], "then", [], [t], weights(first)),
        "else_branch": helper.make_graph([scaled("z", second, "e")], "else", [], [e], weights(second, value)),
    }
    nodes = [scaled("x", outside, "z"), helper.make_node("If", ["c"], ["y"], "choice", **branches)]
    net = helper.make_graph(nodes, "g", [x, c], [y], weights(outside))
    return helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_name_is_of_one_tensor(tmp_path: Path) -> None:
    """ONNX Runtime takes the last of two weights, or the outer one, and what lowers the model another."""
    path = tmp_path / "model.onnx"
    twice, listed = onnx_models.gemm_net(), onnx_models.gemm_net()
    twice.graph.initializer.append(twice.graph.initializer[0])
    listed.graph.output.append(listed.graph.output[0])
    for proto, said in (
        (twice, f"two weights are called {twice.graph.initializer[0].name!r}"),
        (listed, f"output {listed.graph.output[0].name!r} is listed twice"),
        (choosing("w", "v", "w"), "inside node 'choice' (If): a weight is called 'w', as another tensor outside"),
        (choosing("w", "z", "v"), "inside node 'choice' (If): a weight is called 'z', as another tensor outside"),
    ):
        onnx.save(proto, path)
        with pytest.raises(ModelError, match=re.escape(f"not a sound ONNX model:\n  {said}")):
            onnx_model.load(path)
    # Two branches do not see each other, and a copy of what is outside is the same to everybody.
    for sound in (choosing("w", "v", "v"), choosing("w", "v", "w", value=2)):
        onnx.save(sound, path)
        assert onnx_model.load(path).op_types == {"Mul", "If"}
        asked = Request("t", str(path), (), ParitySpec(), inputs={"x": np.ones(2, np.float32), "c": np.array(False)})
        settings = Checker(cache=Cache(tmp_path / "cache"), backend="onnxruntime")
        assert settings.check(asked).verdict == "pass"


def test_functions_that_do_not_fit_are_told(tmp_path: Path) -> None:
    """ONNX's checker takes a function of another opset than its model's; its graph library does not."""
    body = [helper.make_node("Mul", ["a", "a"], ["b"])]
    function = helper.make_function("local", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    call = [helper.make_node("Square", ["x"], ["y"], domain="local")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    made = helper.make_graph(call, "test", values[:1], values[1:])
    proto = helper.make_model(made, functions=[function], opset_imports=opsets)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="Opset mismatch") as found:
        graph.read(tmp_path / "model.onnx")
    assert not isinstance(found.value, UnforeseenError)


@pytest.mark.parametrize("named", ["a\0b", "n" * 5000, "round", "../x", ""])
def test_an_engine_beside_a_model_has_a_name(named: str, tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context=named)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    made = helper.make_graph([node], "test", values[:1], values[1:])
    onnx.save(helper.make_model(made), tmp_path / "engine.onnx")
    with pytest.raises(ModelError, match=r"which (leads out of the model's folder|is not there)"):
        plan_file.opened(tmp_path / "engine.onnx", "engine.onnx", Cache(tmp_path / "cache"))


# --- arrays ----------------------------------------------------------------------------------------------------------


def npy(path: Path, header: str) -> Path:
    text = header.encode().ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(32))
    return path


@pytest.mark.parametrize(
    "header", ["(" * 100, "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "{", "0", "''"]
)
def test_headers_that_are_none(header: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its header"):
        npz.load(npy(tmp_path / "x.npy", header))


def test_calibration_data_takes_no_more_memory_than_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1 << 18, 4), np.float32))
    os.mkfifo(tmp_path / "pipe.npz")
    specs = onnx_model.load(onnx_models.save(onnx_models.gemm_net(), tmp_path / "m.onnx")).inputs
    monkeypatch.setattr("pytest_trtcheck.model.memory.total_bytes", lambda: 4 << 20)
    with pytest.raises(CalibrationError, match=r"its arrays claim 4\.0 MiB, of which"):
        list(calibration_data.load(str(tmp_path / "x.npz"), specs))
    with pytest.raises(CalibrationError, match="not a readable numpy file"):
        list(calibration_data.Samples([("pipe", tmp_path / "pipe.npz")], specs, 1))


@pytest.mark.parametrize("told", ['"text"', '{"format": 1, "cases": 1000000000000, "inputs": []}', "[]"])
def test_kept_inputs_that_were_edited(told: str, tmp_path: Path) -> None:
    model = onnx_model.load(onnx_models.save(onnx_models.gemm_net(), tmp_path / "m.onnx"))
    with zipfile.ZipFile(tmp_path / "kept.npz", "w") as file:
        file.writestr("pytest_trtcheck.json", told)
    with pytest.raises(InputError, match="cannot be read"):
        kept_inputs.read(tmp_path / "kept.npz", model)


# --- the cache -------------------------------------------------------------------------------------------------------


def made(cache: Cache) -> Path:
    key = Key("engine", "m.onnx", {"a": "b"})
    return cache.get_or_make(key, lambda folder: (folder / "x").write_text("made")).path.parent


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("replace", [replaced_by_pipe, replaced_by_endless])
def test_what_is_no_file_in_a_cache_is_neither_waited_for_nor_read(
    replace: Callable[[Path], None], tmp_path: Path
) -> None:
    """Every file below the root, each by itself: the entry is found or made, and listed."""
    cache = Cache(tmp_path / "cache", max_bytes=1 << 20)
    made(cache)
    for path in sorted(each for each in (tmp_path / "cache").rglob("*") if each.is_file()):
        before = path.read_bytes()
        replace(path)
        fresh = Cache(tmp_path / "cache", max_bytes=1 << 20)
        if path.name != "CACHEDIR.TAG":
            assert (made(fresh) / "files" / "x").read_text() == "made"
            assert fresh.entries()
        if os.path.lexists(path):
            path.unlink()
        path.write_bytes(before)


@pytest.mark.parametrize(
    "edit",
    [
        {"key": {"kind": "engine"}},
        {"key": 3},
        {"created": "soon"},
        {"files": {"x": [4]}},
        {"files": {"../../../x": [4, "0"]}},
        {"files": []},
    ],
)
def test_a_manifest_with_the_right_checksum_and_another_content_is_damage(edit: object, tmp_path: Path) -> None:
    import zlib

    cache = Cache(tmp_path)
    path = made(cache) / "manifest"
    body = json.loads(path.read_bytes().partition(b"\n")[2]) | edit
    text = json.dumps(body).encode()
    path.write_bytes(b"%08x\n%s" % (zlib.crc32(text), text))
    assert (made(Cache(tmp_path)) / "files" / "x").read_text() == "made"


# --- documents -------------------------------------------------------------------------------------------------------

REPORT = ROOT / "tests" / "data" / "reports" / "example.json"


def test_reports_that_hold_what_no_report_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(REPORT.read_text())
    report["checks"][0]["duration_s"] = "\ud800"
    (tmp_path / "r.json").write_text(json.dumps(report))
    with pytest.raises(ReportError, match="is no sound report"):
        json_report.read(tmp_path / "r.json")
    report["checks"][0]["duration_s"] = float("nan")
    report["signature"] = "0"
    (tmp_path / "r.json").write_text(json.dumps(report))
    with pytest.raises(ReportError, match="is not what was signed"):
        json_report.read(tmp_path / "r.json", b"0123456789abcdef")
    assert main(["diff", str(tmp_path), str(REPORT)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_histogram_has_an_end() -> None:
    assert len(plots.histogram([(-(2**62), 3), (2**62, -1)], 0, 1.0)) < 1_000_000


@pytest.mark.parametrize("command", ["diff", "merge", "upgrade"])
def test_commands_show_no_names_that_command_the_terminal(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(REPORT.read_text())
    for check in report["checks"]:
        check |= {"precision": "\x1b]0;title\x07", "nodeid": f"\u202e{check['nodeid']}"}
    (tmp_path / "r.json").write_text(json.dumps(report))
    main([command, str(REPORT), str(tmp_path / "r.json")])
    said = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & {*said.out, *said.err}


# --- what users write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["9" * 5000, "1e9", "٣", "0", "-1"])
def test_numbers_that_are_none(text: str, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTCHECK_REBUILD", text)
    suite.write(test_it="def test(): pass")
    said = suite.run().text
    assert "TRTCHECK_REBUILD: expected a whole number from 1 on" in said
    assert "INTERNALERROR" not in said


def test_sizes_without_end() -> None:
    with pytest.raises(ArgumentError, match="expected a size such as"):
        parse_size("9" * 400, "ini key trt_cache_size")


def test_paths_that_the_system_refuses(suite: Suite) -> None:
    suite.write(test_it="def test(): pass")
    (suite.path / "round").symlink_to("round")
    for path in ("n" * 300, "round"):
        said = suite.run(f"--trt-report={path}").text
        assert "INTERNALERROR" not in said
        assert "ERROR: " in said


OBJECTS = """
class Bad:
    def __repr__(self): raise RuntimeError("no repr")
    def __eq__(self, other): raise RuntimeError("no eq")
    __hash__ = None
    def __bool__(self): raise RuntimeError("no bool")

@pytest.mark.trt_parity("m.onnx", tol=Bad())
def test_tol(): pass

@pytest.mark.trt_parity("m.onnx", keep_fp32=Bad())
def test_keep(): pass

def test_build(trt_build): trt_build(Bad())

def test_reference(trt_reference): trt_reference(Bad())

def test_sound(): pass
"""


def test_objects_that_can_say_nothing(suite: Suite) -> None:
    """Whatever an argument is and does, its test alone fails, in words."""
    suite.write(test_it=OBJECTS)
    said = suite.run().text
    assert "pytest_trtcheck/" not in said
    assert "1 passed" in said


def test_fixtures_say_what_nobody_foresaw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise LookupError("no such thing")

    monkeypatch.setattr("pytest_trtcheck.check.steps.asked.named_model", broken)
    monkeypatch.setattr("pytest_trtcheck.check.steps.asked.model_of", broken)
    checker = Checker(cache=Cache(tmp_path), backend="onnxruntime")
    with pytest.raises(UnforeseenError, match="LookupError: no such thing"):
        checker.reference("m.onnx", ())
    with pytest.raises(UnforeseenError, match="LookupError: no such thing"):
        checker.runner(Request("t", "m.onnx", (), parity=ParitySpec()))


def test_an_array_stands_beside_an_engine() -> None:
    with pytest.raises(ArgumentError, match="calibration= stands beside engine="):
        from_marker("trt_parity", (), {"engine": "m.plan", "calibration": np.zeros(3)})


@pytest.mark.parametrize("given", [{"plugins": 3}, {"custom_ops": "lib.so"}, {"io": object()}, {"configure": 1}])
def test_build_options_are_of_their_kind(given: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=f"BuildOptions: {next(iter(given))}=.* expected an? "):
        BuildOptions(**given)  # type: ignore[arg-type]


def test_what_is_read_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="holds more than 4 bytes"):
        read_bytes(tmp_path / "x", 4)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="Too many levels"):
        resolved(tmp_path / "round")
    with pytest.raises(ReportError, match="cannot write"):
        write_text(tmp_path / "round", "text")
    assert len(first_line("n" * 1_000_000)) < 3000
