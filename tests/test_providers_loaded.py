"""ONNX Runtime's GPU providers as they are released, without a GPU, CUDA or TensorRT: `tox -e providers`.

The wheels are downloaded, and their libraries loaded against empty ones that are compiled here. So they look at every
option, an unknown one is an error, and the CUDA provider divides models as it does on a GPU. Nothing is computed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.backends.onnxruntime.tensorrt import OrtTensorRT
from pytest_trtcheck.backends.onnxruntime.tensorrt_rtx import OrtTensorRTRtx
from pytest_trtcheck.spec import BuildOptions
from tests.onnx_models import save
from tests.providers import empty
from tests.providers.models import divided, reshaped

if TYPE_CHECKING:
    from tests.conftest import Run, Suite

pytestmark = [
    pytest.mark.skipif("PROVIDERS_CACHE" not in os.environ, reason="the environment providers has the wheels"),
    pytest.mark.skipif(not all(map(shutil.which, ("cc", "nm", "readelf"))), reason="there is no C compiler"),
]
ORT_GPU = os.environ.get("PROVIDERS_ORT_GPU", "onnxruntime-gpu==1.31.1")
RTX = os.environ.get("PROVIDERS_RTX", "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0")
CONFTEST = """
import pytest_trtcheck.gpu.device as device
from pytest_trtcheck.gpu.names import model_of

NAME = "NVIDIA H100 80GB HBM3"
gpu = device.Gpu(name=NAME, model=model_of(NAME, (9, 0), ()), compute_capability=(9, 0), uuid="GPU-0")
device.detect = lambda *_, **__: device.Detection(gpu)
"""


class Released:
    """A suite that is run with a released wheel, and with empty libraries below."""

    def __init__(self, suite: Suite, monkeypatch: pytest.MonkeyPatch, wheel: Path, libraries: Path) -> None:
        self.suite = suite
        suite.write(conftest=CONFTEST)
        save(reshaped(), suite.path / "reshaped.onnx")
        monkeypatch.setenv("PYTHONPATH", str(wheel), prepend=":")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))

    def run(self, marker: str, *arguments: str, options: str = "") -> Run:
        fixture = f"@pytest.fixture\ndef trt_build_options():\n    return BuildOptions({options})\n"
        self.suite.write(
            test_it=f"from pytest_trtcheck.spec import BuildOptions\n{fixture if options else ''}\n"
            f"@trt_parity({marker})\ndef test_it(): ...\n"
        )
        return self.suite.run_apart(f"--trt-cache-dir={self.suite.path / 'cache'}", *arguments)


def cached(requirement: str) -> Path:
    try:
        return empty.unpacked(requirement, Path(os.environ["PROVIDERS_CACHE"]))
    except LookupError as error:
        pytest.skip(f"{requirement} could not be downloaded: {error}")


@pytest.fixture(scope="session")
def ort_gpu() -> Path:
    return cached(ORT_GPU)


@pytest.fixture(scope="session")
def cuda_and_tensorrt(ort_gpu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    providers = [
        ort_gpu / "onnxruntime" / "capi" / f"libonnxruntime_providers_{name}.so" for name in ("cuda", "tensorrt")
    ]
    empty.link(providers, folder)
    return folder


@pytest.fixture
def released(suite: Suite, monkeypatch: pytest.MonkeyPatch, ort_gpu: Path, cuda_and_tensorrt: Path) -> Released:
    return Released(suite, monkeypatch, ort_gpu, cuda_and_tensorrt)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_cuda_takes_a_model_and_computes_its_shapes_on_the_cpu(released: Released, precision: str) -> None:
    run = released.run(f'"reshaped.onnx", precision="{precision}", batch=2, backend="onnxruntime_cuda"')
    (record,) = run.checks
    # The empty libraries compute nothing, which is caught.
    assert record["verdict"] == "fail"
    assert (record["backend"], record["evidence"], record["gpu_ran"]) == ("onnxruntime-cuda", "provider", True)
    found = record["partition"]
    assert found["provider"] == "CUDAExecutionProvider"
    assert found["elsewhere"] == []
    assert found["shapes_on_cpu"] > 0
    # In a typed model all but the casts at its ends.
    expected = precision if precision in {"fp16", "bf16"} else "fp32"
    assert found["kernels"][expected] >= 3
    assert any(note.startswith("run by ONNX Runtime 1.") for note in record["notes"])


def test_what_cuda_has_no_kernel_for_is_named(released: Released) -> None:
    save(divided(), released.suite.path / "divided.onnx")
    run = released.run('"divided.onnx", precision="fp32", batch=2, backend="onnxruntime-cuda"')
    (record,) = run.checks
    assert record["verdict"] == "fail"
    assert re.search(r"2 nodes fell back from ONNX Runtime \S+'s CUDA provider", record["message"])
    assert "hardest (Hardmax, CPUExecutionProvider), determinant (Det, CPUExecutionProvider)" in record["message"]
    assert [node["name"] for node in record["partition"]["elsewhere"]] == ["hardest", "determinant"]


def test_cuda_refuses_int8_and_options_that_it_has_not(released: Released) -> None:
    calibration = "calibration=[{'x': np.ones((2, 8), np.float32)}]"
    run = released.run(f'"reshaped.onnx", precision="int8", {calibration}, batch=2, backend="onnxruntime-cuda"')
    assert "it has no INT8 kernels for models with Q/DQ nodes" in run.checks[0]["message"]
    run = released.run('"reshaped.onnx", batch=2, backend="onnxruntime-cuda"', options="workspace_mib=64")
    assert "has no counterpart of the build option workspace_mib=64" in run.checks[0]["message"]


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_library_that_does_not_load_is_an_error_that_quotes_the_loader(
    released: Released, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    run = released.run('"reshaped.onnx", batch=2', f"--trt-backend=onnxruntime-{name}")
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search(r"its library does not load: libcublas\w*\.so\.\d+: cannot open shared object file", run.text)
    assert "ONNX Runtime would run the model on the CPU" in run.text


def test_without_tensorrt_its_provider_says_which_one_it_links(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, ort_gpu: Path, tmp_path: Path
) -> None:
    provider = ort_gpu / "onnxruntime" / "capi" / "libonnxruntime_providers_tensorrt.so"
    empty.link([provider], tmp_path / "cuda", leave_out="libnv")
    run = Released(suite, monkeypatch, ort_gpu, tmp_path / "cuda").run(
        '"reshaped.onnx", batch=2, backend="onnxruntime-tensorrt"'
    )
    message = run.checks[0]["message"]
    assert "its library does not load: libnvinfer.so.10: cannot open shared object file" in message
    assert "pip install 'tensorrt<11'" in message


# --- TensorRT --------------------------------------------------------------------------------------------------------

ALL_OPTIONS = (
    "tf32=True, workspace_mib=64, optimization_level=2, sparsity=True, hardware_compatible='ampere_plus', "
    "max_aux_streams=1, dla_core=0, min_subgraph_size=2, preview=('ALIASED_PLUGIN_IO_10_03',)"
)


@pytest.mark.parametrize("options", ["", ALL_OPTIONS, "timing_cache=False"])
def test_tensorrt_knows_every_option_that_it_is_given(released: Released, options: str) -> None:
    run = released.run('"reshaped.onnx", precision="fp16", batch=2, backend="onnxruntime-tensorrt"', options=options)
    message = run.checks[0]["message"]
    # Past its options it asks TensorRT for a network, and gets none.
    assert "nvinfer1::INetworkDefinition" in message
    assert "the builder process crashed" in message
    assert "EP option" not in message
    assert "The value for the key" not in message


def test_tensorrt_refuses_an_option_that_it_does_not_know(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    released.suite.write(
        conftest=CONFTEST
        + "from pytest_trtcheck.backends.onnxruntime.tensorrt import OrtTensorRT\n"
        + "OrtTensorRT.counterparts.written['refit'] = lambda _: {'trt_refit_enable': 'True'}\n"
    )
    run = released.run('"reshaped.onnx", batch=2, backend="onnxruntime-tensorrt"', options="refit=True")
    assert "Invalid TensorRT EP option: trt_refit_enable" in run.checks[0]["message"]


def test_the_names_are_in_the_library_and_none_that_would_be_mapped_is_left_out(ort_gpu: Path) -> None:
    held = (ort_gpu / "onnxruntime" / "capi" / "libonnxruntime_providers_tensorrt.so").read_bytes()
    named = set(re.findall(rb"\btrt_[a-z0-9_]+\b", held))
    given = dict(_written(OrtTensorRT))
    assert {name.encode() for name in given} <= named
    assert not {b"trt_tf32_enable", b"trt_refit_enable", b"trt_version_compatible"} & named


def _written(provider: Any) -> list[tuple[str, str]]:
    values = {"hardware_compatible": "ampere_plus", "preview": ("A",), "plugins": ("a",), "tf32": True}
    options = provider.counterparts.written
    return [item for name, write in options.items() for item in write(values.get(name, 1)).items()]


# --- TensorRT-RTX ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rtx() -> Path:
    return cached(RTX)


@pytest.fixture(scope="session")
def driver(rtx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver's libraries that know of no GPU; CUDA's runtime the plugin brings with it."""
    folder = tmp_path_factory.mktemp("driver")
    empty.link(sorted((rtx / "onnxruntime_ep_nv_tensorrt_rtx").glob("*.so*")), folder, leave_out="libcudart")
    return folder


def test_the_plugin_registers_and_shows_no_device(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, rtx: Path, driver: Path
) -> None:
    released = Released(suite, monkeypatch, rtx, driver)
    marker = '"reshaped.onnx", precision="fp16", batch=2, backend="onnxruntime-tensorrt-rtx"'
    run = released.run(marker)
    assert "registers and shows no device, and NVIDIA H100" in run.checks[0]["message"]
    suite.write(conftest="")
    run = released.run(marker)
    run.result.assert_outcomes(passed=1)
    assert run.checks[0]["evidence"] == "emulated"
    assert any("its plugin 0.5.0 registers and shows no device (" in note for note in run.checks[0]["notes"])


def test_the_plugin_without_a_driver_says_so(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, rtx: Path, tmp_path: Path
) -> None:
    released = Released(suite, monkeypatch, rtx, tmp_path)
    suite.write(conftest="")
    run = released.run('"reshaped.onnx", precision="fp16", batch=2, backend="onnxruntime-tensorrt-rtx"')
    run.result.assert_outcomes(passed=1)
    assert any("cannot be registered" in note and "libcuda.so.1" in note for note in run.checks[0]["notes"])


def test_every_option_of_the_plugin_is_in_its_header(rtx: Path) -> None:
    header = (rtx / "onnxruntime_ep_nv_tensorrt_rtx" / "tensorrt_rtx_provider_options.h").read_text()
    named = set(re.findall(r'constexpr const char\* k\w+ = "(\w+)"', header))
    given = {name for name, _ in _written(OrtTensorRTRtx)}
    shapes = {f"nv_profile_{end}_shapes" for end in ("min", "opt", "max")}
    assert {*given, *shapes, "nv_runtime_cache_path"} <= named
    assert BuildOptions().workspace_mib is None
