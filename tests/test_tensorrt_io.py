"""What an engine takes and gives, poison and layers: the parts of running engines that need no GPU."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from pytest_trtcheck.backends.tensorrt.cuda import Cuda
from pytest_trtcheck.backends.tensorrt.io import (
    DTYPES,
    TensorSpec,
    check_inputs,
    never_written,
    numpy_dtype,
    poison,
    poisoned_elements,
    unwritten,
)
from pytest_trtcheck.backends.tensorrt.layers import layers_by_precision
from pytest_trtcheck.errors import GpuError, InputError, MissingDependencyError
from pytest_trtcheck.spec import ShapeRange

if TYPE_CHECKING:
    from numpy.typing import NDArray

X = TensorSpec("x", np.dtype(np.float32), (-1, 3), range=ShapeRange((1, 3), (2, 3), (8, 3)))
IDS = TensorSpec("ids", np.dtype(np.int64), (4,))


def inputs(**changed: Any) -> dict[str, NDArray[Any]]:
    return {"x": np.ones((2, 3), np.float32), "ids": np.arange(4), **changed}


def test_inputs_come_in_the_engines_order_and_contiguous() -> None:
    given: dict[str, NDArray[Any]] = {"ids": np.arange(4), "x": np.ones((3, 2), np.float32).T}
    arrays = check_inputs((X, IDS), given)
    assert list(arrays) == ["x", "ids"]
    assert all(array.flags.c_contiguous for array in arrays.values())
    np.testing.assert_array_equal(arrays["x"], given["x"])


def test_a_scalar_stays_a_scalar() -> None:
    spec = TensorSpec("s", np.dtype(np.float32), ())
    assert check_inputs((spec,), {"s": np.array(2.5, np.float32)})["s"].shape == ()


def test_fp64_becomes_fp32_as_in_tensorrt() -> None:
    arrays = check_inputs((X, IDS), inputs(x=np.full((2, 3), 0.1)))
    assert arrays["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (inputs(x=np.ones((2, 3), np.float16)), "dtype float16, the engine takes float32"),
        (inputs(ids=np.arange(4, dtype=np.int32)), "dtype int32, the engine takes int64"),
        (inputs(x=np.ones((2, 4), np.float32)), r"shape \(2, 4\), the engine takes \(-1, 3\)"),
        (inputs(x=np.ones(3, np.float32)), r"shape \(3,\)"),
        (inputs(x=np.ones((9, 3), np.float32)), r"the engine takes \(1, 3\) to \(8, 3\)"),
        (inputs(other=np.ones(1)), "'other' is none of the engine's"),
        ({"x": np.ones((2, 3), np.float32)}, "'ids' is missing"),
    ],
)
def test_inputs_that_do_not_fit(given: dict[str, NDArray[Any]], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as info:
        check_inputs((X, IDS), given)
    assert "x float32 (-1, 3), ids int64 (4,)" in info.value.hint


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError, match=r"'other' .*; .*'x' has dtype .*; .*'ids' is missing"):
        check_inputs((X, IDS), {"x": np.ones((2, 3), np.int8), "other": np.ones(1)})


def test_types_that_numpy_cannot_hold_are_refused_by_name() -> None:
    assert numpy_dtype("BF16", "y") == ml_dtypes.bfloat16
    with pytest.raises(GpuError, match="'y' has the type FP4"):
        numpy_dtype("FP4", "y")


def poisoned(dtype: np.dtype[Any], count: int, turn: int) -> NDArray[np.uint8]:
    """Memory as the engine fills it before a run."""
    pattern, width = poison(dtype, turn)
    raw = np.empty(count * dtype.itemsize, np.uint8)
    raw.view(f"u{width}")[:] = pattern
    return raw


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("turn", [0, 1])
def test_memory_that_nobody_wrote_is_seen(name: str, turn: int) -> None:
    dtype = np.dtype(DTYPES[name])
    raw = poisoned(dtype, 6, turn)
    values = raw.view(dtype)
    if dtype.kind == "f" or dtype.name in {"bfloat16", "float8_e4m3fn"}:
        assert np.isnan(values.astype(np.float32)).all()
    held = poisoned_elements(raw, dtype, turn)
    assert held is not None
    assert held.tolist() == [True] * 6
    values[:4] = 1
    held = poisoned_elements(raw, dtype, turn)
    assert held is not None
    assert held.tolist() == [False] * 4 + [True] * 2
    values[:] = 0
    assert poisoned_elements(raw, dtype, turn) is None
    assert poisoned_elements(raw[:0], dtype, turn) is None


def test_the_gpus_own_nan_and_its_negative_are_no_poison() -> None:
    for pattern in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000):
        raw = np.full(4, pattern, np.uint32).view(np.uint8)
        assert poisoned_elements(raw, np.dtype(np.float32), 0) is None
    for pattern in (0x7FFF, 0xFFFF, 0x7E00, 0xFE00):
        raw = np.full(4, pattern, np.uint16).view(np.uint8)
        assert poisoned_elements(raw, np.dtype(np.float16), 0) is None


def test_a_value_that_equals_the_poison_is_not_taken_for_it() -> None:
    image = np.array([0xA5, 7, 0xA5], np.uint8)  # The model really computes 0xA5, in both runs.
    first = poisoned_elements(image, np.dtype(np.uint8), 0)
    second = poisoned_elements(image, np.dtype(np.uint8), 1)
    assert first is not None
    assert second is None
    assert unwritten({"y": first}, {}) == {}


def test_only_what_held_both_patterns_was_never_written() -> None:
    first = np.array([True, True, False, False])
    second = np.array([False, True, True, False])
    found = unwritten({"y": first, "z": first}, {"y": second})
    assert list(found) == ["y"]
    assert found["y"].tolist() == [False, True, False, False]
    error = never_written(found, {"y": (2, 2)})
    assert "output 'y': never written in 1 of 4 elements, first at (0, 1)" in error.message


def layer(kind: str | None, *, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = (), **more: Any) -> Any:
    key = kind or "Format/Datatype"
    return {
        "Name": "layer",
        "Inputs": [{"Name": "a", key: text} for text in inputs],
        "Outputs": [{"Name": "b", key: text} for text in outputs],
        **more,
    }


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (layer(None, inputs=("Half",), outputs=("Half",)), "fp16"),
        (layer(None, inputs=("Row major linear FP16 format",), outputs=("Half",)), "fp16"),
        (layer("Datatype", inputs=("BF16",), outputs=("Float",)), "bf16"),
        (layer(None, inputs=("Float", "Half"), outputs=("Float",)), "fp16"),
        (layer(None, inputs=("Float",), outputs=("Half",)), "fp32"),
        (layer(None, inputs=("Float",), outputs=("Int8",)), "fp32"),
        (layer(None, inputs=("Int8", "Int8"), outputs=("Float",)), "int8"),
        (layer(None, inputs=("Thirty-two wide channel vectorized row major Int8 format",)), "int8"),
        (layer(None, inputs=("FP8",), outputs=("Half",)), "fp8"),
        (layer(None, inputs=("Float", "Int64")), "fp32"),
        (layer(None, inputs=("Int32", "Bool"), outputs=("Int64",)), "other"),
        (layer(None, outputs=("Half",)), "fp16"),
        (layer(None, inputs=("Float",), TacticName="sm80_xmma_gemm_f32f32_tf32f32_f32_tn"), "tf32"),
        (layer(None, inputs=("Half",), TacticName="sm80_tf32_something"), "fp16"),
        (layer(None, inputs=("Float",), Weights={"Type": "Half", "Count": 5}), "fp16"),
        ("just a name", "unknown"),
        (layer(None), "unknown"),
    ],
)
def test_the_precision_of_a_layer(description: Any, expected: str) -> None:
    assert layers_by_precision(json.dumps({"Layers": [description]})) == {expected: 1}


def test_layers_are_counted_and_control_characters_are_endured() -> None:
    half = json.dumps(layer(None, inputs=("Half",), Metadata="A-B")).replace("A-B", "A\x1eB")
    text = f'{{"Layers": [{half}, {half}, {json.dumps(layer(None, inputs=("Float",)))}]}}'
    assert layers_by_precision(text) == {"fp16": 2, "fp32": 1}


def test_an_engine_built_without_profiling_verbosity_tells_of_no_layer() -> None:
    assert layers_by_precision("") == {}


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"Layers": "none"}'])
def test_an_inspector_answer_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|Expecting"):
        layers_by_precision(text)


def has_cuda() -> bool:
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@pytest.mark.skipif(has_cuda(), reason="cuda-bindings is installed")
def test_without_cuda_bindings_the_first_use_names_the_extra() -> None:
    with pytest.raises(MissingDependencyError, match="cuda-bindings is needed to run engines") as info:
        Cuda()
    assert "pytest-trtcheck[rtx]" in info.value.hint


@pytest.mark.skipif(not has_cuda(), reason="cuda-bindings is not installed")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(GpuError, match="CUDA device 99 cannot be used"):
        Cuda(99)
