"""References, lowered models and emulations, from the cache or made, on real ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import CalibrationError, ModelError
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision import lowering
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.spec import Calibration
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.spec import Precision


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", None)


def kinds(cache: Cache) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in cache.entries():
        found[entry.kind] = found.get(entry.kind, 0) + 1
    return found


def lower(
    source: object,
    precision: Precision,
    cache: Cache,
    folder: Path,
    *,
    keep: tuple[str, ...] = (),
    calibration: object = None,
) -> Lowered:
    model = open_model(source, (folder,), cache)
    return lowering.lower(model, precision, cache, keep_fp32=keep, calibration=calibration, folders=(folder,))


def test_models_from_paths_bytes_and_protos_are_the_same(tmp_path: Path, cache: Cache) -> None:
    proto = onnx_models.conv_net()
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    models = [open_model(source, (tmp_path,), cache) for source in ("m.onnx", path, path.read_bytes(), proto)]
    assert len({model.sha256 for model in models}) == 1
    assert [model.label for model in models] == ["m.onnx", str(path), "<bytes>", "<ModelProto test>"]


def test_lookup_beside_the_test_then_in_rootdir(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "tests").mkdir()
    onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx")
    folders = (tmp_path / "tests", tmp_path)
    assert open_model("m.onnx", folders, cache).path == tmp_path / "m.onnx"
    onnx_models.save(onnx_models.gemm_net(), tmp_path / "tests" / "m.onnx")
    assert open_model("m.onnx", folders, cache).path == tmp_path / "tests" / "m.onnx"
    with pytest.raises(ModelError, match=r"none.onnx: no such model file(.|\n)*tests/none.onnx and"):
        open_model("none.onnx", folders, cache)


def test_a_reference_is_computed_once(tmp_path: Path, cache: Cache) -> None:
    model = open_model(onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx"), (), cache)
    case = {"image": np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)}
    first = Reference(model, cache)(case)
    again = Reference(model, cache)(case)
    np.testing.assert_array_equal(first["logits"], again["logits"])
    assert kinds(cache) == {"reference": 1}
    Reference(model, cache)({"image": case["image"] + 1})
    assert kinds(cache) == {"reference": 2}


def test_every_input_of_a_lowering_is_in_its_key(tmp_path: Path, cache: Cache) -> None:
    onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx")
    data = [{"image": np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)}]
    other = [{"image": np.random.default_rng(1).random((1, 3, 16, 16), dtype=np.float32)}]
    wanted: list[tuple[Precision, tuple[str, ...], object]] = [
        ("fp16", (), None),
        ("bf16", (), None),
        ("fp16", ("conv1",), None),
        ("int8", (), data),
        ("int8", (), other),
        ("int8", (), Calibration(data, method="entropy")),
        ("int8", (), Calibration(data, method="percentile", percentile=99.0)),
        ("int8", (), Calibration(data, method="percentile", percentile=99.9)),
        ("int8", ("gemm",), data),
        ("fp8", (), data),
    ]
    keys = [
        lower("m.onnx", precision, cache, tmp_path, keep=keep, calibration=calibration).key
        for precision, keep, calibration in wanted
    ]
    assert len(set(keys)) == len(keys)
    assert lower("m.onnx", "int8", cache, tmp_path, calibration=[dict(data[0])]).key == keys[3]


def test_int8_without_calibration_is_an_error(tmp_path: Path, cache: Cache) -> None:
    onnx_models.save(onnx_models.conv_net(), tmp_path / "m.onnx")
    with pytest.raises(CalibrationError, match="no calibration data is given"):
        lower("m.onnx", "int8", cache, tmp_path)
    assert "lowered" not in kinds(cache)


def qdq_net() -> onnx.ModelProto:
    """x → Q/DQ → Gemm with a quantized weight."""
    weight = np.array([[10, -20], [30, 40]], np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="matmul"),
    ]
    scalars: dict[str, np.ndarray[Any, Any]] = {
        "xs": np.array(0.25, np.float32),
        "ws": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
    }
    return onnx_models.model(
        nodes, {"x": (TensorProto.FLOAT, [1, 2])}, {"y": (TensorProto.FLOAT, [1, 2])}, {**scalars, "w": weight}
    )


def test_a_model_with_qdq_is_taken_as_it_is_and_not_compared_with_itself(tmp_path: Path, cache: Cache) -> None:
    path = onnx_models.save(qdq_net(), tmp_path / "qdq.onnx")
    model = open_model(path, (), cache)
    lowered = lowering.lower(model, "int8", cache)
    assert lowered.path == path
    assert "taken as it is" in lowered.notes[0]
    x = {"x": np.array([[0.3, 100.0]], np.float32)}
    weight = np.array([[1, -2], [3, 4]], np.float32)
    np.testing.assert_allclose(Reference(model, cache)(x)["y"], x["x"] @ weight, rtol=1e-6)
    quantized = np.clip(np.round(x["x"] / 0.25), -128, 127) * np.float32(0.25)
    actual = emulation(model, lowered, "int8", cache)(x)["y"]
    np.testing.assert_allclose(actual, quantized @ weight, rtol=1e-6)


@pytest.mark.parametrize(("kind", "zero", "holds"), [(np.int8, -128, True), (np.uint8, 0, True), (np.int8, 0, False)])
def test_the_relu_that_a_zero_point_stands_for_is_in_the_reference(
    kind: type, zero: int, cache: Cache, *, holds: bool
) -> None:
    """onnxruntime's quantizer removes a Relu where the range that it measured starts at 0."""
    weight = onnx_models.weights((4, 4), 3)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="second"),
    ]
    weights = {"w": weight, "s": np.asarray(np.float32(0.01)), "z": np.asarray(kind(zero))}
    proto = onnx_models.model(
        nodes, {"x": (TensorProto.FLOAT, [3, 4])}, {"y": (TensorProto.FLOAT, [3, 4])}, weights, opset=13
    )
    x = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    a = x.astype(np.float64) @ weight
    assert (a < 0).any()
    right = (np.maximum(a, 0) if holds else a) @ weight
    found = Reference(open_model(proto, (), cache), cache)({"x": x})["y"]
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def test_a_model_in_fp16_is_compared_with_its_fp32_twin(tmp_path: Path, cache: Cache) -> None:
    half = TensorProto.FLOAT16
    proto = onnx_models.model(
        [helper.make_node("Mul", ["x", "w"], ["m"]), helper.make_node("Sub", ["m", "x"], ["y"])],
        {"x": (half, [2])},
        {"y": (half, [2])},
        {"w": np.array([1.001, 1.002], np.float16)},
    )
    model = open_model(proto, (), cache)
    assert model.half_types == {"float16"}
    lowered = lowering.lower(model, "fp16", cache)
    x = {"x": np.array([1000.3, 333.3], np.float16)}
    exact = (x["x"].astype(np.float32) * np.array([1.001, 1.002], np.float16).astype(np.float32)) - x["x"]
    reference = Reference(model, cache)(x)["y"]
    np.testing.assert_array_equal(reference, exact.astype(np.float16))
    emulated = emulation(model, lowered, "fp16", cache)(x)["y"]
    np.testing.assert_array_equal(emulated, x["x"] * np.array([1.001, 1.002], np.float16) - x["x"])
    assert (emulated != reference).any()
    with pytest.raises(ModelError, match=r"2 nodes in fp16(.|\n)*cannot be checked in int8"):
        lowering.lower(model, "int8", cache, calibration=[x])


def test_what_overflows_in_the_output_of_a_model_in_fp16_does_not_in_its_twin(cache: Cache) -> None:
    half = TensorProto.FLOAT16
    proto = onnx_models.model(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        {"x": (half, [4])},
        {"y": (half, [4])},
        {"w": np.array([100, -100, 1, 1], np.float16)},
    )
    model = open_model(proto, (), cache)
    x = {"x": np.array([1000, 1000, -np.inf, 7], np.float16)}
    np.testing.assert_array_equal(Reference(model, cache)(x)["y"], np.array([65504, -65504, -np.inf, 7], np.float16))
    found = emulation(model, lowering.lower(model, "fp16", cache), "fp16", cache)(x)["y"]
    np.testing.assert_array_equal(found, np.array([np.inf, -np.inf, -np.inf, 7], np.float16))


def test_a_weight_that_overflows_is_noted(tmp_path: Path, cache: Cache) -> None:
    proto = onnx_models.elementwise(
        [helper.make_node("Mul", ["x", "huge"], ["y"], name="mul")], 2, {"huge": np.array([7e4, 1], np.float32)}
    )
    onnx_models.save(proto, tmp_path / "m.onnx")
    lowered = lower("m.onnx", "fp16", cache, tmp_path)
    assert lowered.notes == ("weight huge: 1 value up to 7e+04 beyond the range of fp16 became ±65504",)
    assert lower("m.onnx", "fp16", cache, tmp_path).notes == lowered.notes
    assert lower("m.onnx", "bf16", cache, tmp_path).notes == ()


def test_external_data_travels_through_every_step(tmp_path: Path, cache: Cache) -> None:
    proto = onnx_models.conv_net()
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    model = open_model("m.onnx", (tmp_path,), cache)
    inline = open_model(onnx_models.conv_net(), (), cache)
    case = {"image": np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)}
    for each in (model, inline):
        lowered = lowering.lower(each, "fp16", cache)
        outputs = emulation(each, lowered, "fp16", cache)(case)["logits"]
        expected = Reference(each, cache)(case)["logits"]
        assert 0 < np.abs(outputs - expected).max() < 1e-2


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8", "fp8"])
def test_every_precision_has_the_error_of_its_mantissa(tmp_path: Path, cache: Cache, precision: Precision) -> None:
    """The planted fault here is the wrong precision: each must land in its own band."""
    bands = {
        "fp32": (0, 0),
        "tf32": (1e-5, 1e-3),
        "fp16": (1e-5, 2e-3),
        "bf16": (2e-4, 2e-2),
        "int8": (1e-3, 5e-2),
        "fp8": (1e-3, 1e-1),
    }
    model = open_model(onnx_models.conv_net(), (), cache)
    rng = np.random.default_rng(0)
    data = [{"image": rng.random((4, 3, 16, 16), dtype=np.float32)} for _ in range(4)]
    lowered = lowering.lower(model, precision, cache, calibration=data)
    actual = emulation(model, lowered, precision, cache)(data[0])["logits"]
    reference = Reference(model, cache)(data[0])["logits"]
    error = np.abs(actual - reference).max() / np.abs(reference).max()
    low, high = bands[precision]
    assert low <= error <= high
