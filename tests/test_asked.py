"""What is asked for and can't be done is an error, before the first test where that can be known."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record.files import check_writable

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Suite

RAN = 'def test_plain():\n    open("ran", "w").close()\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trt-report=file/report.json",), "--trt-report: cannot write"),
        (("--trt-report=folder",), "is a directory"),
        (("--trt-html=file/deep/er/report.html",), "--trt-html: cannot write"),
        (("--trt-export=file",), "--trt-export: "),
        (("--trt-bundle=file/bundles",), "--trt-bundle: cannot write"),
        (("--trt-cache-dir=file",), "--trt-cache-dir: "),
        (("--trt-baseline=file", "--trt-update-baseline"), "no directory"),
        (("--trt-report=same.json", "--trt-html=./same.json"), "give each a file of its own"),
        (("--trt-backend=tensorrt",), "tensorrt is not installed"),
        (("--trt-build-only", "--trt-backend=onnxruntime"), "take another --trt-backend: onnxruntime builds no engine"),
        (("--trt-build-only", "--trt-gpu=A100", "--trt-backend=onnxruntime"), "onnxruntime builds no engine"),
        (("--trt-gpu=ampere",), "name a product"),
        (("--trt-require-evidence=",), "--trt-require-evidence: names nothing"),
    ],
)
def test_what_can_not_be_done_is_an_error_before_the_first_test(
    suite: Suite, arguments: tuple[str, ...], message: str
) -> None:
    (suite.path / "file").touch()
    (suite.path / "folder").mkdir()
    suite.write(test_plain=RAN)
    run = suite.run(*arguments)
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in run.text
    assert "Traceback" not in run.text
    assert not (suite.path / "ran").exists()


FOLDERS = ["--trt-bundle", "--trt-export", "--trt-baseline", "--trt-cache-dir"]


@pytest.mark.skipif(os.name != "posix", reason="links are privileged on Windows")
@pytest.mark.parametrize("option", ["--trt-report", *FOLDERS])
def test_a_path_that_the_system_refuses_is_told_with_its_option(suite: Suite, option: str) -> None:
    suite.write(test_plain=RAN)
    (suite.path / "circle").symlink_to("circle")
    (suite.path / "nowhere").symlink_to("missing")
    paths = ["circle/x", "n" * 300, *["nowhere", "/dev/null"] * (option in FOLDERS)]
    for path in paths:
        run = suite.run(f"{option}={path}", *["--trt-update-baseline"] * (option == "--trt-baseline"))
        assert run.result.ret == pytest.ExitCode.USAGE_ERROR, path
        assert f"ERROR: {option}" in run.text
    assert not (suite.path / "ran").exists()


WITHOUT = """
import importlib.abc, importlib.util, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {missing!r} else found(name, package)
"""


@pytest.mark.parametrize(
    ("missing", "argument", "message"),
    [
        (("tensorrt", "tensorrt_rtx"), "--trt-gpu=A100", 'pip install "pytest-trtcheck[rtx]"'),
        (("tensorrt", "tensorrt_rtx"), "--trt-backend=tensorrt_rtx", "tensorrt_rtx is not installed"),
        (("jinja2",), "--trt-html=report.html", 'pip install "pytest-trtcheck[report]"'),
    ],
)
def test_a_library_that_is_missing(suite: Suite, missing: tuple[str, ...], argument: str, message: str) -> None:
    suite.write(conftest=WITHOUT.format(missing=missing), test_plain=RAN)
    run = suite.run_apart(argument)
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in run.text
    assert "Traceback" not in run.text
    assert not (suite.path / "ran").exists()


def test_emulation_alone_may_be_asked_for_where_nothing_builds(suite: Suite) -> None:
    suite.write(
        conftest=WITHOUT.format(missing=("tensorrt", "tensorrt_rtx")),
        test_conv='@trt_parity("conv.onnx", batch=1)\ndef test_conv(): ...\n',
    )
    suite.run_apart("--trt-gpu=A100", "--trt-backend=onnxruntime").result.assert_outcomes(passed=1)


@pytest.mark.parametrize("option", ["--trt-report", "--trt-html"])
def test_a_report_that_can_no_longer_be_written_fails_the_run(suite: Suite, option: str) -> None:
    suite.write(
        test_spoil="""
from pathlib import Path

@trt_parity("conv.onnx", batch=1)
def test_spoil():
    Path("reports").write_text("where the folder should be")
"""
    )
    run = suite.run(f"{option}=reports/there")
    run.result.assert_outcomes(passed=1)
    assert run.result.ret == pytest.ExitCode.TESTS_FAILED
    assert "ERROR: cannot write the report" in run.text
    assert "Traceback" not in run.text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ReportError, match="no permission to write to"):
            check_writable(tmp_path / "deep" / "report.json", "--trt-report")
    finally:
        tmp_path.chmod(0o700)


def test_what_can_be_written_is_not_made_yet(tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "report.json", "--trt-report")
    check_writable(tmp_path / "deep", "--trt-export", is_folder=True)
    assert list(tmp_path.iterdir()) == []
    check_writable(tmp_path.joinpath("/dev/stdout"), "--trt-report")


# --- arguments that would be swallowed -------------------------------------------------------------------------------

CALLS = """
X = np.ones((2, 3, 16, 16), np.float32)

@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("trt_check", {"precision": ["fp16", "bf16"]}, "precision=.*: takes one precision"),
    ("trt_check", {"batch": [1, 2]}, "batch=.*: takes one batch"),
    ("trt_check", {"fantasy": 1}, "trt_check: unknown argument 'fantasy'"),
    ("trt_build", {"precision": ("fp16", "bf16")}, "takes one precision"),
    ("trt_build", {"tol": 1e-2}, "trt_build: unknown argument 'tol'"),
    ("trt_build", {"metric": "l2"}, "trt_build: unknown argument 'metric'"),
    ("trt_build", {"batch": 1}, "trt_build: unknown argument 'batch'"),
    ("trt_build", {"seed": 1}, "trt_build: unknown argument 'seed'"),
    ("trt_build", {"reference": "conv.onnx"}, "trt_build: unknown argument 'reference'"),
])
def test_refused(name, arguments, message, request):
    with pytest.raises(CheckError, match=message):
        request.getfixturevalue(name)("conv.onnx", **arguments)

def test_lists_of_one(trt_check, trt_build):
    assert trt_check("conv.onnx", precision=["bf16"], batch=[2]).precision == "bf16"
    assert trt_build("conv.onnx", precision=["bf16"])({"image": X})["logits"].shape == (2, 10)

def test_built_for_declared_shapes(trt_build):
    engine = trt_build("conv.onnx", shapes={"image": ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))})
    engine({"image": X})
    with pytest.raises(CheckError, match=r"outside the declared shapes: image\\[0\\] is 5, declared 1 to 4"):
        engine({"image": np.ones((5, 3, 16, 16), np.float32)})

class TestFromFixtures:
    @pytest.fixture
    def trt_inputs(self):
        return X

    def test_inputs(self, trt_check):
        record = trt_check("conv.onnx")
        assert (record.inputs, record.cases) == ("trt_inputs", 1)
        assert trt_check("conv.onnx", X[:1]).inputs == "given"

    @pytest.fixture
    def trt_calibration(self):
        return X

    def test_calibration(self, trt_check):
        trt_check("conv.onnx", X, precision="int8", tol=0.9)
"""


def test_fixtures_take_what_they_use_and_refuse_the_rest(suite: Suite) -> None:
    suite.write(test_calls=CALLS)
    run = suite.run("--trt-diagnose=0")
    run.result.assert_outcomes(passed=13)


DECLARED = """
RANGE = {"image": ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))}
ONE = {"image": (1, 3, 16, 16)}

def rows(count):
    return np.ones((count, 3, 16, 16), np.float32)

@trt_parity("conv.onnx", shapes=RANGE)
def test_inside():
    return [rows(1), rows(4)]

@trt_parity("conv.onnx", shapes=RANGE)
def test_outside():
    return [rows(2), rows(5)]

@trt_parity("conv.onnx", shapes=ONE)
def test_other_than_fixed():
    return rows(2)

@trt_parity("conv.onnx", shapes=ONE, batch=2)
def test_contradiction(): ...

@trt_parity("conv.onnx", shapes=RANGE, batch=5)
def test_contradiction_of_a_range():
    return rows(5)

@trt_parity("conv.onnx", shapes=RANGE, batch=3)
def test_batch_in_the_range(): ...

@trt_parity("conv.onnx", shapes=RANGE, batch=2)
def test_rows_in_batches():
    return rows(6)

@trt_parity("gemm.onnx", batch=4)
def test_batch_of_a_fixed_model():
    return np.ones((2, 4), np.float32)

@trt_parity("gemm.onnx", batch=4, shapes={"x": (2, 4)})
def test_batch_of_a_fixed_model_with_shapes(): ...

def test_by_hand(trt_check):
    trt_check("conv.onnx", rows(8), shapes=RANGE)
"""


@pytest.mark.parametrize("target", [(), ("--trt-gpu=A100",)])
def test_inputs_outside_a_declared_profile_are_an_error(suite: Suite, target: tuple[str, ...]) -> None:
    suite.write(test_declared=DECLARED)
    run = suite.run(*target)
    verdicts = {record["nodeid"].partition("::")[2]: record["verdict"] for record in run.checks}
    assert {name for name, verdict in verdicts.items() if verdict == "pass"} == {
        "test_inside",
        "test_batch_in_the_range",
        "test_rows_in_batches",
    }
    assert {verdict for verdict in verdicts.values() if verdict != "pass"} == {"error"}
    assert "image[0] is 5, declared 1 to 4" in run.check("test_outside")["message"]
    assert "image[0] is 2, declared 1" in run.check("test_other_than_fixed")["message"]
    assert "batch=2 contradicts shapes['image']" in run.check("test_contradiction")["message"]
    assert "fixes its batch (x[0]=2)" in run.check("test_batch_of_a_fixed_model")["message"]
    assert run.check("test_batch_in_the_range")["cases"] == 1
    assert run.check("test_rows_in_batches")["cases"] == 3


# --- another reference -----------------------------------------------------------------------------------------------

REFERENCES = """
import onnx
from onnx import numpy_helper
from pathlib import Path

def spoiled(factor=1.5):
    proto = onnx.load("gemm.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), "w"))
    return proto

def renamed():
    proto = onnx.load("gemm.onnx")
    proto.graph.node[0].output[0] = proto.graph.output[0].name = "z"
    return proto

W, B = (numpy_helper.to_array(each) for each in onnx.load(Path(__file__).with_name("gemm.onnx")).graph.initializer)
X = np.random.default_rng(0).random((2, 4), dtype=np.float32)

def computed(inputs):
    outputs = {"y": inputs["x"].astype(np.float64) @ W + B, "more": np.zeros(3)}
    inputs["x"][:] = 7  # what it does to its inputs is its own affair
    return outputs

def wrong(inputs):
    return {"y": (inputs["x"] @ W + B) * 1.1}

@trt_parity("gemm.onnx", reference=computed)
def test_computed():
    return X

@trt_parity("gemm.onnx", reference=computed, precision="fp32")
def test_fp32_against_another():
    return X

@trt_parity("gemm.onnx", reference=wrong)
def test_wrong(): ...

@trt_parity("gemm.onnx", reference=lambda inputs: {"z": 1})
def test_no_output(): ...

@trt_parity("gemm.onnx", reference=lambda inputs: inputs["nothing"])
def test_raises(): ...

@trt_parity("gemm.onnx", reference=lambda inputs: 3)
def test_no_mapping(): ...

@trt_parity("gemm.onnx", reference="gemm.onnx")
def test_itself_lowered(): ...

@trt_parity("gemm.onnx", reference="gemm.onnx", precision="fp32")
def test_itself(): ...

@trt_parity("gemm.onnx", reference=lambda: Path("gemm.onnx").read_bytes(), precision="fp32")
def test_itself_made(): ...

@trt_parity("gemm.onnx", reference=spoiled, precision="fp32")
def test_spoiled(): ...

@trt_parity(spoiled, reference="gemm.onnx")
def test_spoiled_model(): ...

@trt_parity("gemm.onnx", reference=renamed)
def test_renamed(): ...

@trt_parity("gemm.onnx", reference="conv.onnx")
def test_other_model(): ...

@trt_parity("gemm.onnx", reference="missing.onnx")
def test_missing(): ...

@trt_parity("gemm.onnx", reference="golden.npz")
def test_golden(): ...

@trt_parity("gemm.onnx", reference=3)
def test_number(): ...
"""


def test_the_reference_that_is_named_counts(suite: Suite) -> None:
    suite.write(test_reference=REFERENCES)
    run = suite.run("--trt-bundle=bundles")
    verdicts = {record["nodeid"].partition("::")[2]: record["verdict"] for record in run.checks}
    assert verdicts == {
        "test_computed": "pass",
        "test_fp32_against_another": "pass",
        "test_wrong": "fail",
        "test_no_output": "error",
        "test_raises": "error",
        "test_no_mapping": "error",
        "test_itself_lowered": "pass",
        "test_itself": "error",
        "test_itself_made": "error",
        "test_spoiled": "fail",
        "test_spoiled_model": "fail",
        "test_renamed": "error",
        "test_other_model": "error",
        "test_missing": "error",
        "test_golden": "error",
        "test_number": "error",
    }
    for name, text in {
        "test_wrong": "differs from the reference wrong",
        "test_no_output": "the reference <lambda> gave no output 'y'",
        "test_raises": "the reference <lambda> failed: KeyError: 'nothing'",
        "test_no_mapping": "the reference <lambda> failed: TypeError",
        "test_itself": "it would be compared with itself",
        "test_itself_made": "it would be compared with itself",
        "test_spoiled": "differs from the reference spoiled()",
        "test_renamed": "it has no output 'y'",
        "test_other_model": "it needs the input 'image', it has no input 'x'",
        "test_missing": "reference: missing.onnx: no such model file",
        "test_golden": "reference: golden.npz: no such file",
        "test_number": "expected a model",
    }.items():
        assert text in run.check(name)["message"], name
    assert run.check("test_wrong")["parity"]["worst"] == pytest.approx(0.1 / 1.1, rel=0.05)
    assert run.check("test_wrong")["reference"] == "wrong"
    assert run.check("test_spoiled_model")["reference"] == "gemm.onnx"
    # The diagnosis explains what the precision loses; here the model itself is another one.
    (note,) = [note for note in run.check("test_spoiled_model")["notes"] if note.startswith("not diagnosed")]
    assert "computed in FP32, spoiled() itself differs from the reference gemm.onnx: max of 'y' is" in note
    for name in ("test_wrong", "test_spoiled_model"):
        (bundle,) = (suite.path / "bundles").glob(f"*{name}/bundle.json")
        recorded = json.loads(bundle.read_text())["record"]["parity"]["worst"]
        replay = suite.run(str(bundle), "--trt-diagnose=0")
        assert replay.checks[0]["verdict"] == "fail"
        assert replay.checks[0]["parity"]["worst"] == recorded


def test_a_failure_that_the_precision_made_is_diagnosed_against_the_reference(suite: Suite) -> None:
    suite.write(
        test_tight=f"{REFERENCES.partition('@trt_parity')[0]}\n"
        '@trt_parity("gemm.onnx", reference=computed, tol=1e-5)\ndef test_tight():\n    return X\n'
        '@trt_parity("gemm.onnx", reference="copy.onnx", tol=1e-5)\ndef test_copy():\n    return X\n'
    )
    (suite.path / "copy.onnx").write_bytes((suite.path / "gemm.onnx").read_bytes())
    run = suite.run()
    run.result.assert_outcomes(failed=2)
    for name in ("test_tight", "test_copy"):
        assert run.check(name)["parity"]["blame"]["step"] in {"precision", "spread"}


def test_an_overflow_of_the_checked_type_is_seen_beside_a_wider_reference(suite: Suite) -> None:
    suite.write(
        conftest="""
import onnx
from onnx import TensorProto as T, helper as h

def product(kind):
    return h.make_model(h.make_graph([h.make_node("Mul", ["x", "x"], ["y"])], "product",
        [h.make_tensor_value_info("x", kind, [4])], [h.make_tensor_value_info("y", kind, [4])]),
        opset_imports=[h.make_opsetid("", 17)], ir_version=9)

onnx.save(product(T.FLOAT), "wide.onnx")
onnx.save(product(T.FLOAT16), "narrow.onnx")
""",
        test_wide="""
@trt_parity("narrow.onnx", reference="wide.onnx")
def test_fits():
    return np.array([1, 2, 3, 4], np.float16)

@trt_parity("narrow.onnx", reference="wide.onnx")
def test_overflows():
    return np.array([1, 2, 3, 300], np.float16)
""",
    )
    run = suite.run("--trt-diagnose=0")
    assert run.check("test_fits")["verdict"] == "pass"
    assert run.check("test_overflows")["verdict"] == "fail"
