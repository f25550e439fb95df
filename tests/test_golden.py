"""Recorded outputs as the reference: what is recorded, what is fed, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.__main__ import main
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.model import golden, memory, npz
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models
from tests.test_quantized_elsewhere import GOOD, Reader, cnn, samples

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_trtcheck.record import CheckRecord
    from tests.conftest import Run, Suite


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a model and two samples of different batches lie, and commands are run."""
    monkeypatch.chdir(tmp_path)
    onnx_models.save(cnn(), tmp_path / "model.onnx")
    for number, batch in enumerate((4, 2)):
        np.savez(tmp_path / f"sample{number}.npz", x=samples(seed=number)[0][:batch])
    return tmp_path


def record(*arguments: str) -> int:
    return main(["record", "model.onnx", "--inputs=sample*.npz", "-o", "golden.npz", *arguments])


def check(folder: Path, model: str = "model.onnx", inputs: object = None, **spec: Any) -> CheckRecord:
    asked = ParitySpec(**{"precision": ("fp16",), "reference": "golden.npz", **spec})
    source = "generated" if inputs is None else "returned"
    request = Request("t", model, (folder,), asked, inputs=inputs, inputs_source=source)
    return Checker(Cache(folder / "cache")).check(request)


def expected(folder: Path, number: int) -> Any:
    """The outputs by plain numpy: convolutions as sums over shifted images."""
    weights = {each.name: numpy_helper.to_array(each).astype(np.float64) for each in cnn().graph.initializer}

    def conv(x: Any, w: Any, b: Any) -> Any:
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        total = sum(
            np.einsum("ncij,oc->noij", padded[:, :, i : i + 16, j : j + 16], w[:, :, i, j])
            for i in range(3)
            for j in range(3)
        )
        return total + b[None, :, None, None]

    x = np.load(folder / f"sample{number}.npz")["x"].astype(np.float64)
    first = np.maximum(conv(x, weights["w1"], weights["b1"]), 0)
    second = np.maximum(conv(first, weights["w2"], weights["b2"]) + first, 0)
    return second.mean((2, 3)) @ weights["w3"] + weights["b3"]


# What is recorded


def test_outputs_are_recorded_beside_inputs_and_hashes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record() == 0
    assert "golden.npz: 2 samples of model.onnx in FP32, computed on ONNX Runtime" in capsys.readouterr().out
    with np.load("golden.npz") as file:
        for number in range(2):
            assert np.array_equal(file[f"inputs/{number}/x"], np.load(f"sample{number}.npz")["x"])
            assert np.allclose(file[f"outputs/{number}/y"], expected(folder, number), rtol=1e-4, atol=1e-5)
    with zipfile.ZipFile("golden.npz") as file:
        about = json.loads(file.read("pytest_trtcheck.json"))["about"]
    assert about["model"] == "model.onnx"
    assert about["model_sha256"] == open_model("model.onnx", (folder,), Cache(folder / "cache")).sha256
    assert about["computed_on"].endswith("(cpu)")
    assert about["command"] == "record model.onnx '--inputs=sample*.npz' -o golden.npz"
    assert not list(folder.glob(".golden*"))


def test_generated_inputs_are_recorded_and_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "model.onnx", "--batch=3", "--seed=5", "-o", "golden.npz"]) == 0
    assert "inputs were generated (seed 5)" in capsys.readouterr().out
    with np.load("golden.npz") as file:
        assert file["inputs/0/x"].shape == (3, 3, 16, 16)
    assert check(folder).verdict == "pass"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["record", "no.onnx", "-o", "golden.npz"], "no.onnx: no such model file"),
        (["record", "model.onnx", "-o", "golden.json"], "are an .npz file"),
        (["record", "model.onnx", "-o", "no/such/golden.npz"], "cannot write"),
        (["record", "model.onnx", "--inputs=no*.npz", "-o", "golden.npz"], "no file matches"),
        (["record", "model.onnx", "--inputs=model.onnx", "-o", "golden.npz"], "is neither .npz nor .npy"),
        (["record", "model.onnx", "--inputs=sample0.npz", "--batch=2", "-o", "golden.npz"], "are for generated inputs"),
        (["record", "model.onnx", "--batch=0", "-o", "golden.npz"], "--batch=0"),
        (["record", "model.onnx", "--shape=x=1,a", "-o", "golden.npz"], "expected NAME=1,3,224,224"),
        (["record", "model.onnx", "--for=gemm.onnx", "-o", "golden.npz"], "does not fit"),
        (["record", "nan.onnx", "-o", "golden.npz"], "is NaN or infinite throughout"),
        (["record", "random.onnx", "-o", "golden.npz"], "random by itself"),
        (["record", "model.onnx", "--inputs=other.npz", "-o", "golden.npz"], "has no input 'z'"),
    ],
)
def test_what_cannot_be_recorded(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_models.save(onnx_models.gemm_net(), folder / "gemm.onnx")
    np.savez("other.npz", z=np.zeros(3))
    put = {"x": (TensorProto.FLOAT, [2])}, {"y": (TensorProto.FLOAT, [2])}
    log = [helper.make_node("Neg", ["x"], ["n"], "neg"), helper.make_node("Log", ["n"], ["y"], "log")]
    noise = [
        helper.make_node("RandomNormalLike", ["x"], ["n"], "noise"),
        helper.make_node("Add", ["x", "n"], ["y"], "a"),
    ]
    onnx.save(onnx_models.model(log, *put), "nan.onnx")
    onnx.save(onnx_models.model(noise, *put), "random.onnx")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (folder / "golden.npz").exists()
    assert not list(folder.glob(".*.tmp"))


# What is fed and compared


def test_the_recorded_inputs_are_fed_where_the_test_gives_none(folder: Path) -> None:
    record()
    found = check(folder)
    assert found.verdict == "pass", found.message
    assert (found.inputs, found.cases) == ("recorded", 2)
    assert (found.reference or "").startswith("golden.npz (recorded 20")
    assert (found.reference or "").endswith("of model.onnx)")


def test_inputs_that_were_recorded_may_be_given_in_any_order(folder: Path) -> None:
    record()
    given = [{"x": np.load(f"sample{number}.npz")["x"]} for number in (1, 0, 1)]
    found = check(folder, inputs=given)
    assert (found.verdict, found.cases, found.inputs) == ("pass", 3, "returned")


@pytest.mark.parametrize("change", [1e-6, 0.5])
def test_inputs_that_were_not_recorded_are_an_error(change: float, folder: Path) -> None:
    record()
    given = np.load("sample0.npz")["x"]
    given[1, 2, 3, 4] += np.float32(change)
    found = check(folder, inputs=[{"x": np.load("sample1.npz")["x"]}, {"x": given}])
    assert found.verdict == "error"
    assert "returned inputs[1]: not among the inputs of golden.npz (2 recorded): input 'x' has other values" in str(
        found.message
    )
    assert "return nothing from the test" in str(found.message)


def test_another_batch_than_was_recorded_is_an_error(folder: Path) -> None:
    record()
    found = check(folder, batch=(1,))
    assert found.verdict == "error"
    assert "input 'x' is [1, 3, 16, 16], recorded [4, 3, 16, 16]" in str(found.message)


def test_each_precision_and_the_fixtures(run_everywhere: Callable[..., Run], suite: Suite) -> None:
    arguments = ["record", str(suite.path / "gemm.onnx"), "--batch=2", "-o", str(suite.path / "golden.npz")]
    assert main(arguments) == 0
    suite.write(
        test_golden="""
@trt_parity("gemm.onnx", precision=["fp16", "bf16"], reference="golden.npz")
def test_marked(): ...

def test_by_hand(trt_check):
    trt_check("gemm.onnx", reference="golden.npz")

@trt_parity("gemm.onnx", precision="fp32", reference="golden.npz")
def test_itself(): ...
"""
    )
    run = run_everywhere()
    run.result.assert_outcomes(passed=3, failed=1)
    assert {each["inputs"] for each in run.checks if each["verdict"] == "pass"} == {"recorded"}
    assert "is gemm.onnx itself" in run.check("test_itself")["message"].replace(str(suite.path) + "/", "")


def test_a_failure_against_recorded_outputs_is_replayed_and_reported(suite: Suite) -> None:
    path = suite.path / "gemm.onnx"
    assert main(["record", str(path), "-o", str(suite.path / "golden.npz")]) == 0
    suite.write(
        test_golden='@trt_parity("gemm.onnx", precision="bf16", tol=1e-6, reference="golden.npz")\ndef test_it(): ...\n'
    )
    run = suite.run("--trt-bundle=bundles", "--trt-html=report.html")
    run.result.assert_outcomes(failed=1)
    (record,) = run.checks
    assert record["reference"].startswith("golden.npz (recorded 20")
    assert record["reference"] in (suite.path / "report.html").read_text().replace("&#x27;", "'")
    (bundle,) = (suite.path / "bundles").glob("*/bundle.json")
    (suite.path / "golden.npz").unlink()
    replay = suite.run(str(bundle))
    assert replay.checks[0]["verdict"] == "fail"
    assert replay.checks[0]["parity"]["worst"] == record["parity"]["worst"]


# What must not pass


def rewritten(change: Callable[[int, dict[str, Any], dict[str, Any]], None], **about: Any) -> None:
    """Record anew what the file holds, changed; hashes and all."""
    with np.load("golden.npz") as file:
        count = len({name.split("/")[1] for name in file.files if name.startswith("inputs/")})
        found = [
            (
                {"x": file[f"inputs/{number}/x"]},
                {name.split("/")[2]: file[name] for name in file.files if name.startswith(f"outputs/{number}/")},
            )
            for number in range(count)
        ]
        told = json.loads(file["pytest_trtcheck.json"])["about"]
    told["used_for"] = tuple(told["used_for"])
    for number, (inputs, outputs) in enumerate(found):
        change(number, inputs, outputs)
    from pathlib import Path

    golden.write(Path("golden.npz"), golden.About(**{**told, **about}), found)


def test_outputs_that_are_others_fail(folder: Path) -> None:
    record()
    assert check(folder).verdict == "pass"

    def spoil(number: int, _: Any, outputs: dict[str, Any]) -> None:
        outputs["y"] = outputs["y"] * (1.1 if number == 1 else 1)

    rewritten(spoil)
    found = check(folder)
    assert found.verdict == "fail"
    assert "differs from the reference golden.npz" in str(found.message)
    assert any(
        "computed in FP32, model.onnx itself differs from the reference golden.npz" in note for note in found.notes
    )


def test_nan_in_recorded_outputs_fails(folder: Path) -> None:
    record()

    def spoil(_: int, __: Any, outputs: dict[str, Any]) -> None:
        outputs["y"] = outputs["y"].copy()
        outputs["y"][0, 3] = np.nan

    rewritten(spoil)
    assert check(folder).verdict == "fail"


def test_outputs_that_were_edited_in_the_file_are_an_error(folder: Path) -> None:
    record()
    with zipfile.ZipFile("golden.npz") as file:
        members = {name: file.read(name) for name in file.namelist()}
    for name, said in {"outputs/0/y.npy": "the outputs of sample 0", "inputs/1/x.npy": "the inputs"}.items():
        edited = {**members, name: members[name][:-4] + b"\0\0\x80\x3f"}
        with zipfile.ZipFile("golden.npz", "w") as file:
            for member, data in edited.items():
                file.writestr(member, data)
        found = check(folder)
        assert found.verdict == "error"
        assert f"{said} are not those that were recorded" in str(found.message)


def test_a_model_that_changed_is_stale(folder: Path) -> None:
    record()
    proto = cnn()
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight.flat[0] += 1e-3
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, proto.graph.initializer[0].name))
    onnx.save(proto, "model.onnx")
    found = check(folder)
    assert found.verdict == "error"
    message = str(found.message)
    assert "golden.npz is stale: it was recorded 20" in message
    assert (
        "record it again: python -m pytest_trtcheck record model.onnx '--inputs=sample*.npz' -o golden.npz" in message
    )
    record()
    assert check(folder).verdict == "pass"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.pop("y"), "it has no output 'y'"),
        (lambda o: o.update(y=o["y"][:, :-1]), "its output 'y' is float32 [4, 9], the model's float32 ['batch', 10]"),
        (lambda o: o.update(y=o["y"][0]), "its output 'y' is float32 [10]"),
        (lambda o: o.update(y=o["y"].astype(np.int64)), "its output 'y' is int64"),
    ],
)
def test_outputs_that_do_not_fit_are_named(change: Any, said: str, folder: Path) -> None:
    record()
    rewritten(lambda _, __, outputs: change(outputs))
    found = check(folder)
    assert found.verdict == "error"
    assert "does not fit model.onnx" in str(found.message)
    assert said in str(found.message)
    assert "record it again" in str(found.message)


def test_rows_that_are_missing_fail(folder: Path) -> None:
    record()
    rewritten(lambda _, __, outputs: outputs.update(y=outputs["y"][:-1]))
    assert check(folder).verdict == "fail"


# Files that can't be read


def claims_too_much(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", b"\0")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.unlink(), "no such file, looked for"),
        (lambda path: path.write_bytes(b""), "not a readable .npz file"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "not a readable .npz file"),
        (lambda path: path.write_bytes(pickle.dumps({"y": 1})), "not a readable .npz file"),
        (lambda path: np.savez(path, y=np.array([{}], dtype=object), x=np.zeros(1)), "holds pickled objects"),
        (claims_too_much, "arrays claim"),
        (lambda path: rewritten_json(path, "{"), "not a readable .npz file"),
        (lambda path: rewritten_json(path, '{"format": 9}'), "is of format 9"),
        (lambda path: rewritten_json(path, '{"format": 1, "about": {"model": 3}}'), "not a readable .npz file"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(
    make: Any, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record()
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 << 30)
    make(folder / "golden.npz")
    found = check(folder)
    assert found.verdict == "error"
    assert said in str(found.message)


def rewritten_json(path: Path, text: str) -> None:
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {**members, "pytest_trtcheck.json": text.encode()}.items():
            file.writestr(name, data)


# Files of the user's own


def test_a_file_of_the_users_own_is_one_sample_with_its_inputs(folder: Path) -> None:
    x = np.load("sample0.npz")["x"]
    np.savez("golden.npz", x=x, y=expected(folder, 0))
    found = check(folder)
    assert found.verdict == "pass", found.message
    assert found.reference == "golden.npz (recorded elsewhere: when and of which model it does not say)"
    assert any("whether it is stale was not checked" in note for note in found.notes)
    np.savez("golden.npz", x=x, y=expected(folder, 0)[::-1])
    assert check(folder).verdict == "fail"
    assert check(folder, precision=("fp32",)).verdict == "fail"  # not compared with itself


def test_outputs_without_inputs_are_an_error(folder: Path) -> None:
    np.savez("golden.npz", y=expected(folder, 0))
    found = check(folder, inputs={"x": np.load("sample0.npz")["x"]})
    assert found.verdict == "error"
    assert "it has 'y', no input 'x': nothing ties its outputs to what they were computed from" in str(found.message)
    np.savez("golden.npz")
    assert "it has nothing, no input 'x'" in str(check(folder).message)
    np.savez("golden.npz", x=np.load("sample0.npz")["x"])
    assert "it has no output 'y'; it has nothing else" in str(check(folder).message)


# A quantized model, and other types


@pytest.fixture
def quantized(folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_static

    quantize_static(folder / "model.onnx", folder / "quantized.onnx", Reader(), activation_type=QuantType.QInt8, **GOOD)
    return folder


def test_a_quantized_model_against_its_originals_recorded_outputs(quantized: Path) -> None:
    record()
    found = check(quantized, "quantized.onnx", precision=("int8",))
    assert found.verdict == "pass", found.message
    assert any("whether quantized.onnx was made of that was not checked" in note for note in found.notes)
    record("--for=quantized.onnx")
    assert check(quantized).verdict == "pass"
    named = check(quantized, "quantized.onnx", precision=("int8",))
    assert named.verdict == "pass"
    assert not any("was not checked" in note for note in named.notes)
    proto = onnx.load("quantized.onnx")
    (scale,) = [each for each in proto.graph.initializer if each.name == "x_scale"]
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.05) * numpy_helper.to_array(scale), "x_scale"))
    onnx.save(proto, "quantized.onnx")
    stale = check(quantized, "quantized.onnx", precision=("int8",))
    assert stale.verdict == "error"
    assert "is not the model that it was recorded for any more" in str(stale.message)
    record()
    assert check(quantized, "quantized.onnx", precision=("int8",)).verdict == "fail"


def test_an_fp32_model_that_is_not_the_one_recorded_needs_to_be_named(folder: Path) -> None:
    proto = cnn()
    proto.graph.doc_string = "another file"
    onnx.save(proto, "other.onnx")
    record()
    assert "is stale" in str(check(folder, "other.onnx").message)
    record("--for=other.onnx")
    assert check(folder, "other.onnx").verdict == "pass"


def half_io() -> onnx.ModelProto:
    """x of FP16 → its double, by an FP16 Add."""
    kind = TensorProto.FLOAT16
    return onnx_models.model(
        [helper.make_node("Add", ["x", "x"], ["y_fp16"], "add")], {"x": (kind, [4])}, {"y_fp16": (kind, [4])}
    )


def test_16_bit_inputs_and_outputs_and_a_quantizers_suffix(tmp_path: Path) -> None:
    onnx_models.save(half_io(), tmp_path / "half.onnx")
    x = np.array([0.1, 1.0, 2.5, 1000.1], np.float32)
    np.savez(tmp_path / "golden.npz", x=x, y=x + x)
    found = check(tmp_path, "half.onnx")
    assert found.verdict == "pass", found.message
    assert any("taken by their names, 'y_fp16' is 'y'" in note for note in found.notes)
    np.savez(tmp_path / "golden.npz", x=x, y=x + x + 100)
    assert check(tmp_path, "half.onnx").verdict == "fail"


def test_strings_and_bfloat16_survive(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "text": np.array(["one", "two"], dtype=object),
        "short": np.array([1, 2.5], ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
    }
    path = tmp_path / "golden.npz"
    golden.write(path, golden.About(model="m", model_sha256="0"), [(given, {"y": given["short"]})])
    told = json.loads(npz.load_text(path, "pytest_trtcheck.json") or "")
    read = npz.read_arrays(path, told["inputs"], 0)
    assert read["text"].tolist() == ["one", "two"]
    assert read["short"].dtype == ml_dtypes.bfloat16
    assert read["short"].tolist() == [1, 2.5]
    assert npz.read_arrays(path, told["outputs"], 0)["y"].tolist() == [1, 2.5]


# Another model whose names differ


def test_an_original_is_found_by_a_quantizers_suffix(folder: Path) -> None:
    proto = cnn()
    proto.graph.node[-1].output[0] = "y_quantized"
    proto.graph.output[0].name = "y_quantized"
    onnx.save(proto, "renamed.onnx")
    found = check(folder, "renamed.onnx", inputs={"x": samples()[0]}, reference="model.onnx")
    assert found.verdict == "pass", found.message
    assert any("'y_quantized' is 'y'" in note for note in found.notes)


@pytest.mark.parametrize(
    ("shape", "kind", "said"),
    [
        (["batch", 3, 32, 32], TensorProto.FLOAT, "its input 'x' is float32 ['batch', 3, 32, 32], not float32"),
        (["batch", 3, 16, 16], TensorProto.INT64, "its input 'x' is int64 ['batch', 3, 16, 16], not float32"),
    ],
)
def test_an_original_of_other_shapes_or_types_does_not_fit(shape: Any, kind: int, said: str, folder: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["m"], "mean", axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["m", "w"], ["y"], "dense"),
    ]
    proto = onnx_models.model(
        nodes,
        {"x": (kind, shape)},
        {"y": (TensorProto.FLOAT, ["batch", 10])},
        {"w": onnx_models.weights((3, 10))},
        opset=17,
    )
    onnx.save(proto, "other.onnx")
    found = check(folder, inputs={"x": samples()[0]}, reference="other.onnx")
    assert found.verdict == "error"
    assert "the reference other.onnx does not fit model.onnx" in str(found.message)
    assert said in str(found.message)
    assert "name the model that model.onnx was made of" in str(found.message)
