from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_trtcheck import Tolerance
from pytest_trtcheck.check import arguments as markers
from pytest_trtcheck.check.arguments import from_marker
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.plugin.options import OPTIONS, parse_size, resolve
from pytest_trtcheck.spec import PRECISIONS, LatencySpec, ParitySpec, ShapeRange

BY_NAME = {option.name: option for option in OPTIONS}


class OfTorch:
    """A number as torch has it: its dtype says no more than its name."""

    def __init__(self, dtype: str) -> None:
        self.dtype = type("dtype", (), {"__repr__": lambda _: dtype})()

    def __float__(self) -> float:
        return 1.0


def parity(**arguments: Any) -> ParitySpec:
    spec = from_marker("trt_parity", (), arguments)
    assert isinstance(spec, ParitySpec)
    return spec


def test_marker_signatures_are_the_contract() -> None:
    assert list(inspect.signature(markers.trt_parity).parameters) == [
        "model",
        "precision",
        "tol",
        "metric",
        "score",
        "aggregate",
        "max_drop",
        "lower_is_better",
        "reference",
        "engine",
        "calibration",
        "batch",
        "shapes",
        "keep_fp32",
        "exclude",
        "seed",
        "search",
        "backend",
        "max_subgraphs",
    ]
    assert list(inspect.signature(markers.trt_latency).parameters) == (
        [
            "p50_ms",
            "p90_ms",
            "p95_ms",
            "p99_ms",
            "min_qps",
            "memory_mib",
            "engine_mib",
            "load_ms",
            "build_s",
            "instances",
            "min_speedup",
            "transfers",
            "max_seconds",
            "batch",
            "precision",
        ]
    )


def test_defaults() -> None:
    assert parity() == ParitySpec()
    assert parity().precision == ("fp16",)


def test_lists_parametrize() -> None:
    spec = parity(precision=["fp32", "int8"], batch=(1, 8))
    assert spec.precision == ("fp32", "int8")
    assert spec.batch == (1, 8)


def test_model_may_be_a_path_bytes_or_a_proto() -> None:
    for model in ("m.onnx", b"\x08", onnx.ModelProto()):
        spec = from_marker("trt_parity", (model,), {})
        assert spec.model is model


def test_tolerances() -> None:
    assert parity(tol=1).tol == 1.0
    assert parity(tol=0).tol == 0.0
    assert parity(tol=np.float32(0.5)).tol == parity(tol=np.array(0.5)).tol == 0.5
    assert parity(tol=OfTorch("torch.float32")).tol == 1.0
    assert parity(tol={"boxes*": 1e-2, "scores": Tolerance(cosine=1e-3)}).tol == (
        ("boxes*", 1e-2),
        ("scores", Tolerance(cosine=1e-3)),
    )


def test_shapes_and_ranges() -> None:
    spec = parity(shapes={"x": (1, 3), "y": [(1, 3), (4, 3), (8, 3)]})
    assert spec.shapes == {"x": (1, 3), "y": ShapeRange((1, 3), (4, 3), (8, 3))}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"precison": "fp16"}, r"unknown argument 'precison'.*\n.*'precision'"),
        ({"precision": "fp61"}, r"precision='fp61': expected one of fp32, .*\n.*'fp16'"),
        ({"precision": []}, "precision="),
        ({"precision": ["fp16", "fp16"]}, "each named once"),
        ({"precision": 16}, "precision=16"),
        ({"metric": "cosinus"}, "metric='cosinus'"),
        ({"tol": "1e-2"}, "tol='1e-2': expected a number"),
        ({"tol": -1}, "tol=-1"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"tol": True}, "tol=True"),
        ({"tol": np.bool_(True)}, "tol="),
        ({"tol": np.array(True)}, "tol="),
        ({"tol": np.complex64(1)}, "tol="),
        ({"tol": OfTorch("torch.bool")}, "tol="),
        ({"tol": OfTorch("torch.complex64")}, "tol="),
        ({"tol": {}}, "tol="),
        ({"tol": {"y": None}}, r"tol\['y'\]"),
        ({"tol": Tolerance()}, "at least one limit"),
        ({"tol": Tolerance(max=-1)}, "Tolerance.max"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"batch": [1, 1]}, "each named once"),
        ({"seed": -1}, "seed=-1"),
        ({"keep_fp32": 3}, "keep_fp32=3"),
        ({"shapes": [1, 2]}, "shapes="),
        ({"shapes": {"x": "1x3"}}, r"shapes\['x'\]"),
        ({"shapes": {"x": [(1,), (2,)]}}, "three shapes"),
        ({"shapes": {"x": [(4,), (2,), (8,)]}}, "min <= opt <= max"),
        ({"backend": "trt"}, "backend='trt'"),
        ({"model": 5}, "model=5"),
    ],
)
def test_bad_parity_arguments_are_named(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected) as caught:
        parity(**arguments)
    assert str(caught.value).startswith("trt_parity: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"p50_ms": 0}, "p50_ms=0"),
        ({"p50_ms": {}}, "at least one GPU"),
        ({"p50_ms": {"T4": "7"}}, r"p50_ms\['T4'\]"),
        ({"p99_ms": {7: 1.0}}, "p99_ms=7"),
        ({"p51_ms": 1.0}, "unknown argument 'p51_ms'"),
        ({"min_speedup": 2.0}, "min_speedup"),
        ({"min_speedup": {"fp23": 2.0}}, "fp32"),
        ({"min_speedup": {"torch-compile": 3.0, "torch_compile": 1.0}}, "each precision or backend named once"),
        ({"p50_ms": 1.0, "transfers": 1}, "transfers"),
        ({"p50_ms": 1.0, "max_seconds": 0}, "max_seconds"),
    ],
)
def test_bad_latency_arguments_are_named(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        from_marker("trt_latency", (), arguments)


def test_latency_budgets() -> None:
    spec = from_marker("trt_latency", (7,), {"p99_ms": {"T4": 9.0}, "min_speedup": {"fp32": 2}})
    assert isinstance(spec, LatencySpec)
    assert spec.budgets() == {"p50_ms": 7.0, "p99_ms": {"T4": 9.0}}
    assert spec.min_speedup == {"fp32": 2.0}


@given(
    st.dictionaries(
        st.sampled_from(["precision", "tol", "batch", "seed", "shapes", "keep_fp32", "metric"]),
        st.none()
        | st.text()
        | st.integers()
        | st.floats()
        | st.lists(st.integers())
        | st.dictionaries(st.text(), st.floats()),
    )
)
def test_any_arguments_give_a_spec_or_an_argument_error(arguments: dict[str, Any]) -> None:
    try:
        spec = parity(**arguments)
    except ArgumentError:
        return
    assert set(spec.precision) <= set(PRECISIONS)


def test_marker_help_comes_from_the_signature() -> None:
    text = markers.marker_help("trt_parity")
    assert text.startswith("trt_parity(model, precision, tol, metric='max', score, aggregate, max_drop,")
    assert "\n" not in text


def test_precedence() -> None:
    option = BY_NAME["trt_gpu"]
    environ = {"TRTCHECK_GPU": "L4"}
    assert resolve(option, "T4, RTX 4090,T4", "A100", environ) == ("T4", "RTX 4090")
    assert resolve(option, None, "A100", environ) == ("L4",)
    assert resolve(option, None, "A100", {}) == ("A100",)
    assert resolve(option, None, None, {}) == ()


def test_kinds() -> None:
    assert resolve(BY_NAME["trt_precision"], "fp16,int8", None, {}) == ("fp16", "int8")
    assert resolve(BY_NAME["trt_require_gpu"], None, "true", {}) is True
    assert resolve(BY_NAME["trt_require_gpu"], None, None, {"TRTCHECK_REQUIRE_GPU": "0"}) is False
    assert resolve(BY_NAME["trt_cache_size"], None, None, {}) == 20 << 30
    assert resolve(BY_NAME["trt_collect"], None, ["a/*.onnx", "b/*.onnx"], {}) == ("a/*.onnx", "b/*.onnx")


@pytest.mark.parametrize(
    ("name", "command_line", "ini", "environ", "expected"),
    [
        ("trt_precision", "fp16,fp17", None, {}, "--trt-precision: 'fp17'"),
        ("trt_backend", None, "trt", {}, "ini key trt_backend"),
        ("trt_require_gpu", None, None, {"TRTCHECK_REQUIRE_GPU": "maybe"}, "TRTCHECK_REQUIRE_GPU"),
        ("trt_cache_size", None, "plenty", {}, "ini key trt_cache_size: expected a size"),
        ("trt_require_evidence", "", "gpu.json", {}, "--trt-require-evidence: names nothing"),
        ("trt_evidence_key", "", None, {}, "--trt-evidence-key: names nothing"),
        ("trt_gpu", ",", "A100", {}, r"--trt-gpu: names nothing\n.*undo what an ini file says: -o trt_gpu="),
        ("trt_precision", " ", None, {}, "--trt-precision: names nothing"),
        ("trt_inputs", [""], None, {}, "--trt-inputs: names nothing"),
        ("trt_baseline", None, None, {"TRTCHECK_BASELINE": " "}, "TRTCHECK_BASELINE: names nothing"),
    ],
)
def test_bad_values_name_their_source(
    name: str, command_line: object, ini: object, environ: dict[str, str], expected: str
) -> None:
    with pytest.raises(ArgumentError, match=expected):
        resolve(BY_NAME[name], command_line, ini, environ)


@given(st.integers(0, 10**6), st.sampled_from(["", "K", "M", "G", "T"]), st.sampled_from(["", "B", "iB"]))
def test_sizes(number: int, unit: str, suffix: str) -> None:
    factor = 1024 ** " KMGT".index(unit or " ")
    assert parse_size(f"{number} {unit}{suffix}" if unit else f"{number}", "here") == number * factor


@given(st.text())
def test_any_text_is_a_size_or_an_argument_error(text: str) -> None:
    try:
        size = parse_size(text, "here")
    except ArgumentError as error:
        said = str(error)
        assert "here" in said
    else:
        assert size >= 0
