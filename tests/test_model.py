"""Reading models and making or checking their inputs."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import InputError, ModelError, first_line, listed
from pytest_trtcheck.model import graph, inputs, onnx_model
from pytest_trtcheck.model import proto as protos
from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models


@pytest.fixture
def conv_net(tmp_path: Path) -> OnnxModel:
    return onnx_model.load(onnx_models.save(onnx_models.conv_net(), tmp_path / "conv.onnx"), "conv.onnx")


def external(tmp_path: Path, location: str = "weights.bin") -> Path:
    """A model with its weights in a file beside it."""
    proto = onnx_models.gemm_net()
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        offset = 0 if tensor.name == "w" else 64
        data = tmp_path / "weights.bin"
        content = bytearray(data.read_bytes() if data.exists() else bytes(128))
        content[offset : offset + array.nbytes] = array.tobytes()
        data.write_bytes(bytes(content))
        external_data_helper.set_external_data(tensor, location, offset=offset, length=array.nbytes)
        tensor.ClearField("raw_data")
    path = tmp_path / "external.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_specs(conv_net: OnnxModel) -> None:
    assert conv_net.inputs == (TensorSpec("image", "float32", ("batch", 3, 16, 16)),)
    assert conv_net.outputs == (TensorSpec("logits", "float32", ("batch", 10)),)
    assert "Conv" in conv_net.op_types
    assert not conv_net.has_qdq
    assert not conv_net.half_types


def test_identity_is_the_content(tmp_path: Path) -> None:
    first = onnx_model.load(onnx_models.save(onnx_models.gemm_net(), tmp_path / "a.onnx"))
    second = onnx_model.load(onnx_models.save(onnx_models.gemm_net(), tmp_path / "b.onnx"))
    other = onnx_model.load(onnx_models.save(onnx_models.conv_net(), tmp_path / "c.onnx"))
    assert first.sha256 == second.sha256 != other.sha256


def test_identity_includes_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = onnx_model.load(path).sha256
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[3] ^= 1
    (tmp_path / "weights.bin").write_bytes(bytes(data))
    assert onnx_model.load(path).sha256 != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "not an ONNX model"),
    ],
)
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        onnx_model.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_that_is_cut_off(tmp_path: Path, share: float) -> None:
    data = onnx_models.conv_net().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match="cut"):
        onnx_model.load(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        onnx_model.load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="directory"):
        onnx_model.load(tmp_path)


def test_no_outputs(tmp_path: Path) -> None:
    proto = onnx_models.gemm_net()
    del proto.graph.output[:]
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="no outputs"):
        onnx_model.load(path)


def test_missing_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weight w: 'weights.bin' is missing(.|\n)*weight b"):
        onnx_model.load(path)


def test_a_model_in_memory_has_no_data_files(tmp_path: Path) -> None:
    without_data = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match=r"weights\.bin' is missing\n  → a model in memory has no folder"):
        open_model(without_data, (), Cache(tmp_path / "cache"))


def test_truncated_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(70))
    with pytest.raises(ModelError, match=r"weight b: 'weights\.bin' is cut off: needs 76 bytes, has 70"):
        onnx_model.load(path)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "sub/../../weights.bin"])
def test_external_data_that_escapes(tmp_path: Path, location: str) -> None:
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        onnx_model.load(external(tmp_path, location))


def test_external_data_that_escapes_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    (tmp_path / "model" / "weights.bin").rename(tmp_path / "weights.bin")
    (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="link out of"):
        onnx_model.load(path)


def test_index_limit_through_casts(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["y"]),
    ]
    proto = onnx_models.model(
        nodes,
        {"ids": (TensorProto.INT32, ["n"])},
        {"y": (TensorProto.FLOAT, ["n", 4])},
        {"table": np.zeros((11, 4), np.float32)},
    )
    model = onnx_model.load(onnx_models.save(proto, tmp_path / "m.onnx"))
    assert model.inputs[0].index_limit == 11
    ranges = inputs.shape_ranges(model, 1000, {})
    (case,) = inputs.generate(model, ranges, seed=0)
    assert case["ids"].dtype == np.int32
    assert case["ids"].min() == 0
    assert case["ids"].max() == 10


# --- given inputs ----------------------------------------------------------------------------------------------------


def image(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(shape, np.float32)


def test_a_mapping_an_array_or_a_list(conv_net: OnnxModel) -> None:
    good = image(2, 3, 16, 16)
    for value, count in ((good, 1), ({"image": good}, 1), ([good, {"image": good}], 2), ((good,), 1)):
        cases = inputs.cases_from(value, conv_net, "returned inputs")
        assert len(cases) == count
        assert cases[0]["image"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"img": image(1, 3, 16, 16)}, r"has no input 'img'(.|\n)*image \(float32"),
        ({}, "missing input 'image'"),
        ([], "empty list"),
        ("image.png", "expected a mapping"),
        (3.0, "expected a mapping"),
        ({"image": [[1.0]]}, "expected a numpy array, got a list"),
        ({"image": image(1, 3, 16, 16).astype(np.float64)}, "expected float32, got float64"),
        ({"image": image(3, 16, 16)}, r"expected rank 4(.|\n)*array\[None\]"),
        ({"image": image(1, 4, 16, 16)}, "dimension 1 is 4, the model fixes it at 3"),
        ({"image": image(1, 3, 16, 16) * np.nan}, "NaN in 768 of 768 elements"),
        ([image(1, 3, 16, 16), None], r"inputs\[1\]"),
    ],
)
def test_inputs_that_do_not_fit(conv_net: OnnxModel, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs.cases_from(value, conv_net, "returned inputs")


def test_a_symbol_has_one_size(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        {"a": (TensorProto.FLOAT, ["n", 2]), "b": (TensorProto.FLOAT, ["n", 2])},
        {"y": (TensorProto.FLOAT, ["n", 2])},
    )
    model = onnx_model.load(onnx_models.save(proto, tmp_path / "m.onnx"))
    with pytest.raises(InputError, match=r"dimension 0 \(n\) is 3, but 2 in input 'a'"):
        inputs.cases_from({"a": image(2, 2), "b": image(3, 2)}, model, "inputs")
    assert inputs.shape_ranges(model, None, {"a": (5, 2)})["b"] == ShapeRange((5, 2), (5, 2), (5, 2))


# --- shapes and generated inputs -------------------------------------------------------------------------------------


def test_free_dimensions_are_listed(tmp_path: Path) -> None:
    model = onnx_model.load(onnx_models.nudenet(), "320n.onnx")
    with pytest.raises(InputError, match=r"images\[0\] \(batch\), images\[2\] \(height\), images\[3\] \(width\)"):
        inputs.shape_ranges(model, None, {})
    with pytest.raises(InputError, match=r"free: images\[2\] \(height\), images\[3\] \(width\)"):
        inputs.shape_ranges(model, 1, {})
    assert inputs.shape_ranges(model, None, {"images": (1, 3, 320, 320)})["images"].opt == (1, 3, 320, 320)


@pytest.mark.parametrize(
    ("batch", "shapes", "message"),
    [
        (None, {"img": (1, 3, 16, 16)}, "no input 'img'"),
        (None, {"image": (1, 3, 16)}, r"the model's input is \['batch', 3, 16, 16\]"),
        (None, {"image": (1, 4, 16, 16)}, "the model's input is"),
    ],
)
def test_shapes_that_contradict(conv_net: OnnxModel, batch: int | None, shapes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs.shape_ranges(conv_net, batch, shapes)


def test_batch_of_a_fixed_model(tmp_path: Path) -> None:
    model = onnx_model.load(onnx_models.save(onnx_models.gemm_net(), tmp_path / "gemm.onnx"), "gemm.onnx")
    with pytest.raises(InputError, match=r"batch=8: gemm.onnx fixes its batch \(x\[0\]=2\)"):
        inputs.shape_ranges(model, 8, {})


def test_generated_inputs_are_reproducible_and_cover_the_range(conv_net: OnnxModel) -> None:
    span = ShapeRange((1, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16))
    cases = inputs.generate(conv_net, {"image": span}, seed=7)
    again = inputs.generate(conv_net, {"image": span}, seed=7)
    other = inputs.generate(conv_net, {"image": span}, seed=8)
    assert [case["image"].shape[0] for case in cases] == [4, 1, 8]
    assert [inputs.digest(case) for case in cases] == [inputs.digest(case) for case in again]
    assert inputs.digest(cases[0]) != inputs.digest(other[0])
    assert 0 <= cases[0]["image"].min() < 0.1
    assert 0.9 < cases[0]["image"].max() < 1


def test_transformer_inputs_are_sane() -> None:
    specs = tuple(
        TensorSpec(name, "int64", (1, 16), limit)
        for name, limit in (
            ("input_ids", 30522),
            ("attention_mask", None),
            ("token_type_ids", 2),
            ("position_ids", 512),
        )
    )
    model = OnnxModel(Path("m"), "m", "", specs, (), frozenset(), has_qdq=False, half_types=frozenset())
    (case,) = inputs.generate(model, inputs.shape_ranges(model, None, {}), 0)
    assert case["input_ids"].max() > 1000
    np.testing.assert_array_equal(case["attention_mask"][0], [1] * 12 + [0] * 4)
    assert set(np.unique(case["token_type_ids"])) <= {0, 1}
    np.testing.assert_array_equal(case["position_ids"][0], np.arange(16))


def test_digest_tells_dtype_shape_and_name() -> None:
    base = {"x": np.zeros((2, 2), np.float32)}
    variants: list[dict[str, Any]] = [
        {"y": np.zeros((2, 2), np.float32)},
        {"x": np.zeros((4,), np.float32)},
        {"x": np.zeros((2, 2), np.int32)},
        {"x": np.ones((2, 2), np.float32)},
    ]
    digests = [inputs.digest(case) for case in [base, *variants]]
    assert len(set(digests)) == len(digests)


def test_profile_admits_all_cases(conv_net: OnnxModel) -> None:
    cases = [{"image": image(size, 3, 16, 16)} for size in (4, 1, 9)]
    span = inputs.profile(conv_net, {}, cases)["image"]
    assert (span.min[0], span.opt[0], span.max[0]) == (1, 4, 9)


def test_given_rows_are_split_into_batches(conv_net: OnnxModel) -> None:
    rows = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1) * np.ones((7, 3, 16, 16), np.float32)
    cases = inputs.rebatched([{"image": rows}], conv_net, 3)
    assert [case["image"][:, 0, 0, 0].tolist() for case in cases] == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]
    with pytest.raises(InputError, match="batch=8: the inputs hold 7"):
        inputs.rebatched([{"image": rows}], conv_net, 8)


def test_dimensions_called_question_mark_are_two_dimensions(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="relu")
    dims: list[int | str] = [1, "?", "?"]
    proto = onnx_models.model([node], {"x": (TensorProto.FLOAT, dims)}, {"y": (TensorProto.FLOAT, dims)})
    model = onnx_model.load(onnx_models.save(proto, tmp_path / "m.onnx"))
    assert model.inputs[0].shape == (1, None, None)
    (case,) = inputs.cases_from(np.zeros((1, 3, 5), np.float32), model, "inputs")
    assert case["x"].shape == (1, 3, 5)


def test_names_are_listed_with_how_many_more_there_are() -> None:
    assert listed([]) == ""
    assert listed("abc") == "a, b, c"
    assert listed("abcde") == "a, b, c and 2 more"
    assert listed(["a: why", "b: why"], 1, "\n  ") == "a: why\n  and 1 more"


def test_the_first_line_of_what_was_said() -> None:
    assert first_line(ValueError("\nbad\nworse")) == "bad"
    assert first_line(ValueError()) == "ValueError"
    assert first_line("") == ""


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is treated as a large one, and weights of 16 bytes are large."""
    monkeypatch.setattr(protos, "LARGE_MODEL", 0)
    monkeypatch.setattr(protos, "_LARGE_WEIGHT", 16)
    monkeypatch.setattr(graph, "_READ_ANEW_BYTES", 16)


def nested() -> onnx.ModelProto:
    """A model with weights in its graph, in two branches and in a Constant node."""
    rng = np.random.default_rng(0)

    def weight(name: str) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal((4, 5), dtype=np.float32), name)

    none = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4, 5])]
    branches = {
        name: helper.make_graph(
            [helper.make_node("Add", ["x", f"in_{name}"], ["z"])], name, [], none, [weight(f"in_{name}")]
        )
        for name in ("then_branch", "else_branch")
    }
    nodes = [
        helper.make_node("Constant", [], ["c"], value=weight("")),
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "small"], ["is"]),
        helper.make_node("If", ["is"], ["b"], **branches),
        helper.make_node("Mul", ["b", "c"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 5]) for name in "xy")
    small = onnx.numpy_helper.from_array(np.array(0, np.float32), "small")
    made = helper.make_graph(nodes, "nested", [x], [y], [weight("w"), small])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def put_back(proto: onnx.ModelProto, path: Path) -> int:
    """Give the weights that were left in the file back to a model; how many there were."""
    count = 0
    for tensor in external_data_helper._get_all_tensors(proto):
        if protos.is_held(tensor, path):
            where = {entry.key: entry.value for entry in tensor.external_data}
            start = int(where["offset"])
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = path.read_bytes()[start : start + int(where["length"])]
            count += 1
    return count


def test_the_weights_of_a_large_file_stay_in_it(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = onnx_models.save(nested(), tmp_path / "m.onnx")
    known, whole, written = onnx_model.load(path), onnx.load(path), tmp_path / "w.onnx"
    graph.write(graph.read(path), written)
    expected = written.read_bytes()
    request.getfixturevalue("all_large")
    light = protos.load(path)
    assert light.ByteSize() > 0
    assert not any(len(tensor.raw_data) >= 16 for tensor in external_data_helper._get_all_tensors(light))
    assert put_back(light, path) == 4
    assert light == whole
    assert onnx_model.load(path) == known
    assert not onnx_model.external_files(path)
    graph.write(graph.read(path), written)
    assert written.read_bytes() == expected


def test_what_is_wrong_with_a_large_file_is_said_as_of_a_small_one(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A file that is cut off anywhere, one with a weight that does not fit its shape, and numbers that never end."""
    whole, path = nested().SerializeToString(), tmp_path / "m.onnx"
    misfit = nested()
    misfit.graph.initializer[0].raw_data += b"1234"
    wrong = [whole[:end] for end in range(1, len(whole), 37)]
    wrong += [misfit.SerializeToString(), b"\x80" * 100, b"\x3b" * 100, whole + b"\xff" * 20, b"\x3a" * 300]

    def said() -> list[str]:
        found = []
        for content in wrong:
            path.write_bytes(content)
            with pytest.raises(ModelError) as caught:
                onnx_model.load(path)
            found.append(str(caught.value))
        return found

    before = said()
    request.getfixturevalue("all_large")
    assert said() == before


@pytest.mark.usefixtures("all_large")
def test_a_file_that_is_cut_off_while_its_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = nested()
    proto.graph.node[0].doc_string = "long " * mmap.PAGESIZE
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    assert path.stat().st_size > 2 * mmap.PAGESIZE
    refer = protos._WithoutWeights._reference

    def cut_off(*arguments: Any) -> bytes:
        os.truncate(path, mmap.PAGESIZE)
        return refer(*arguments)

    monkeypatch.setattr(protos._WithoutWeights, "_reference", cut_off)
    with pytest.raises(ModelError, match=r"m\.onnx: was changed on disk") as caught:
        onnx_model.load(path)
    assert caught.value.code == "model-changed"


def test_small_weights_beside_a_model_are_not_mapped_either(tmp_path: Path) -> None:
    path = external(tmp_path)
    weights = graph.read(path).graph.initializers.values()
    expected = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    for file in tmp_path.rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    for weight in weights:
        assert weight.const_value is not None
        assert np.array_equal(weight.const_value.numpy(), expected.get(str(weight.name), weight.const_value.numpy()))


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("form", ["one file", "beside"])
def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_of_the_model(form: str, tmp_path: Path) -> None:
    """Of a file that was mapped, what was cut off would end the session."""
    path = onnx_models.save(nested(), tmp_path / "m.onnx") if form == "one file" else external(tmp_path)
    proto = onnx.load(path)
    name = "w"
    weight = graph.read(path).graph.initializers[name].const_value
    assert weight is not None
    array = weight.numpy()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            os.truncate(file, 1)
    expected = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    assert np.array_equal(array, onnx.numpy_helper.to_array(expected))
    with pytest.raises(ModelError, match="was changed during the check: weight w is cut off") as caught:
        weight.numpy()
    assert caught.value.code == "model-changed"
    shutil.rmtree(tmp_path)
    with pytest.raises(ModelError, match="weight w cannot be read: No such file"):
        weight.numpy()


@pytest.mark.usefixtures("all_large")
def test_a_reference_into_the_file_itself_must_lie_in_it(tmp_path: Path) -> None:
    """Whoever writes such a reference into a file gets no more than the file."""
    proto, path = onnx_models.gemm_net(), tmp_path / "m.onnx"
    tensor = proto.graph.initializer[0]
    size = len(tensor.raw_data)
    for offset, length in ((1 << 20, size), (0, size + 4)):
        tensor.raw_data = bytes(size)
        external_data_helper.set_external_data(tensor, str(path), offset=offset, length=length)
        tensor.ClearField("raw_data")
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ModelError, match="bad weights"):
            onnx_model.load(path)
