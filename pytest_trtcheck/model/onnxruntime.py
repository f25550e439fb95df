"""ONNX Runtime: the FP32 reference, and the emulation of a lowered model."""

from __future__ import annotations

import ctypes
import functools
import math
import re
import sys
from contextlib import suppress
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pytest_trtcheck.errors import (
    MORE_PROCESSES,
    ArgumentError,
    GpuError,
    MissingDependencyError,
    ModelError,
    first_line,
    lacked_memory,
    lacked_threads,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from numpy.typing import NDArray

    from pytest_trtcheck.spec import InputMapping

Provider = Literal["cpu", "cuda"]


def module() -> ModuleType:
    """The onnxruntime module.

    Raises
    ------
    MissingDependencyError
        Neither onnxruntime nor onnxruntime-gpu is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime is not installed, so there is no FP32 reference ({error})",
            "pip install 'pytest-trtcheck[cpu]', or [cuda] where there is an NVIDIA GPU (never both)",
        ) from error
    found: ModuleType = onnxruntime
    return found


@functools.cache
def version() -> str:
    """The installed release, for keys; what is cached by it needs no import.

    Raises
    ------
    MissingDependencyError
        As `module`.
    """
    if "onnxruntime" not in sys.modules:
        told = set[str]()
        for distribution in ("onnxruntime", "onnxruntime-gpu"):
            with suppress(PackageNotFoundError):
                told.add(metadata.version(distribution))
        if len(told) == 1:
            return told.pop()
    # Where both are installed, one has overwritten the other, or is found before it.
    found: str = module().__version__
    return found


# "[ONNXRuntimeError] : 1 : FAIL : ", "Load model from FILE failed:"; anywhere "/onnxruntime_src/….cc:12 void f(int) ".
_ORIGIN = re.compile(
    r"^(?:\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*? failed: ?)|"
    r"(?:^|(?<=\s))/onnxruntime_src/\S+\.(?:cc|h):\d+ .*?\) (?=\S)"
)


def quoted(error: Exception) -> str:
    """What ONNX Runtime said, without its codes and the places in its own source."""
    text = first_line(error)
    while text != (shorter := _ORIGIN.sub("", text)):
        text = shorter
    return text


def _refused(label: str, path: Path, error: Exception) -> ModelError:
    """A model that ONNX Runtime does not load, and what to do: what it says itself is for its developers."""
    said = quoted(error)
    if short := _ran_short(f"{label}: ONNX Runtime cannot load it: {said}", error):
        return short
    if found := re.search(r"Opset (\d+) is under development.*?domain (\S+) is till opset (\d+)", said):
        opset, _, newest = found.groups()
        return ModelError(
            f"{label}: is in opset {opset}, and ONNX Runtime {version()} takes opsets up to {newest}",
            f"export it in opset {newest} or older, or install a newer onnxruntime",
            code="runtime-refused",
        )
    if found := re.search(r"Could not find an implementation for (\w+)\((\d+)\) node with name '([^']*)'", said):
        operator, opset, node = found.groups()
        message = f"{label}: ONNX Runtime has no {operator} (of opset {opset}) for the types of node {node!r}"
        hint = "export the model in other types or a newer opset, or give the reference itself: reference=…"
        if _has_doubles(path):
            message = f"{label}: computes in FP64, in which ONNX Runtime has no {operator} (node {node!r})"
            hint = "export it in FP32 (in PyTorch model.float()): TensorRT computes FP64 in FP32 anyway"
        return ModelError(message, hint, code="runtime-refused")
    hint = "see whether ONNX Runtime alone loads it; the reference is computed there, unless reference=… gives it"
    if "is not a registered function/op" in said or "No Op registered for" in said:
        hint = (
            "name a library that has the operator, BuildOptions(custom_ops=[…]), or give the reference itself: "
            "reference=…"
        )
    if re.search(r"(?:opset|version)[^.]{0,40}\b[1-6]\b", said):
        hint = "export it in opset 13 or newer: ONNX Runtime takes opsets before 7 in part alone"
    return ModelError(f"{label}: ONNX Runtime cannot load it: {said}", hint, code="runtime-refused")


def _has_doubles(path: Path) -> bool:
    """Whether a model's inputs or weights are FP64."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    types = [value.type.tensor_type.elem_type for value in graph.input] + [each.data_type for each in graph.initializer]
    return onnx.TensorProto.DOUBLE in types


def memory_hint(error: Exception) -> str:
    """What to do where ONNX Runtime had too little memory, which cuDNN calls an internal error; else nothing."""
    if lacked_memory(str(error)) is None:
        return ""
    return "too little memory is free, of the GPU or of the machine: use a smaller batch, or end what else runs there"


def _ran_short(message: str, error: Exception) -> ModelError | None:
    """What is said of the machine, where it is not the model that ONNX Runtime failed on."""
    if lacked_threads(str(error)):
        return ModelError(message, MORE_PROCESSES, code="too-many-processes")
    hint = memory_hint(error)
    return ModelError(message, hint, code="out-of-memory") if hint else None


class OrtSession:
    """A model on ONNX Runtime, in this process: where that may die, `ort_runner.OrtRunner` is for it.

    Parameters
    ----------
    path
        The model file; external data is looked up beside it.
    label
        What messages call it.
    provider
        "cpu", or "cuda" with TF32 off: the provider's default would make the reference itself wrong by about 6e-4.
    custom_ops
        Libraries with the operators that ONNX Runtime lacks.
    in_order
        Whether nodes run in the order of the file, unoptimized. A file whose nodes are ordered so that each value is
        used up soon then runs in little memory; by default ONNX Runtime chooses an order of its own.

    Raises
    ------
    ModelError
        ONNX Runtime cannot load the model.
    GpuError
        The CUDA provider was asked for and is not there.
    """

    def __init__(
        self,
        path: Path,
        label: str,
        provider: Provider = "cpu",
        *,
        custom_ops: Sequence[str] = (),
        in_order: bool = False,
    ) -> None:
        self._label = label
        ort = module()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # Fused integer kernels saturate differently on CPUs without VNNI; the plain Q → DQ → float is exact everywhere.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if in_order:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            # Values are freed all the same; planning their places takes time that grows as the square of the nodes.
            options.enable_mem_reuse = False
        for library in custom_ops:
            register_custom_ops(options, library)
        try:
            session = ort.InferenceSession(str(path), options, providers=_providers(ort, provider))
        except Exception as error:
            raise _refused(label, path, error) from error
        if provider == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
            raise GpuError(
                "trt_reference = cuda: ONNX Runtime could not start its CUDA provider",
                "check the CUDA libraries, or take trt_reference = cpu",
                code="provider-failed",
            )
        self._hold(session)

    @classmethod
    def of(cls, session: Any, label: str) -> OrtSession:
        """What runs a session that exists already."""
        runner = cls.__new__(cls)
        runner._label = label
        runner._hold(session)
        return runner

    def _hold(self, session: Any) -> None:
        self._session = session
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._beyond_numpy = any(
            put.type in _BEYOND_NUMPY for put in (*self._session.get_inputs(), *self._session.get_outputs())
        )

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """The outputs by name, in the model's order.

        Raises
        ------
        ModelError
            The run failed; the message quotes ONNX Runtime.
        """
        try:
            run = self._run_beyond_numpy if self._beyond_numpy else self._session.run
            values = run(self._outputs, dict(inputs))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(np.shape(array))}" for name, array in inputs.items())
            message = f"{self._label}: ONNX Runtime failed to run it on {shapes}: {quoted(error)}"
            if short := _ran_short(message, error):
                raise short from error
            raise ModelError(
                message,
                "inputs that were generated may lie outside what the model accepts, and so may an index that is "
                "computed in fewer bits: return real inputs from the test, or keep what computes the index in FP32",
                code="runtime-failed",
            ) from error
        return dict(zip(self._outputs, map(np.asarray, values), strict=True))

    def _run_beyond_numpy(self, outputs: list[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run with tensors of types that numpy lacks: ONNX Runtime takes and gives their bits, with the type beside."""
        ort = module()
        wanted = {put.name: _BEYOND_NUMPY.get(put.type) for put in self._session.get_inputs()}
        values = {}
        for name, array in inputs.items():
            code = wanted.get(name)
            if code is None:
                values[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            else:
                bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
                values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, code)
        found = self._session.run_with_ort_values(outputs, values)
        return [_as_array(value) for value in found]

    def close(self) -> None:
        """Free the session."""
        self._session = None


_BEYOND_NUMPY = {
    "tensor(bfloat16)": 16,
    "tensor(float8e4m3fn)": 17,
    "tensor(float8e4m3fnuz)": 18,
    "tensor(float8e5m2)": 19,
    "tensor(float8e5m2fnuz)": 20,
}
"""The codes of onnx.TensorProto, by ONNX Runtime's name of the type."""


def code_beyond_numpy(dtype: np.dtype[Any]) -> int | None:
    """The code of onnx.TensorProto of a type that numpy lacks; None for the others."""
    return _BEYOND_NUMPY.get(f"tensor({dtype.name.replace('_', '')})")


def _as_array(value: Any) -> NDArray[Any]:
    code = _BEYOND_NUMPY.get(value.data_type())
    if code is None:
        found: NDArray[Any] = value.numpy()
        return found
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(code)
    shape = tuple(value.shape())
    # `value` frees its memory when it goes, hence the copy.
    bits = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(bits, dtype).reshape(shape)


def register_custom_ops(options: Any, library: str) -> None:
    """Let sessions of these options have a library's operators.

    Raises
    ------
    ArgumentError
        It cannot be loaded.
    """
    try:
        # A bare file name would be looked up in the system's folders.
        options.register_custom_ops_library(str(Path(library).resolve()))
    except Exception as error:
        raise ArgumentError(
            f"custom_ops: {library} cannot be loaded: {quoted(error)}",
            "give a shared library that exports RegisterCustomOps and was built for this ONNX Runtime",
            code="operator-library",
        ) from error


def _providers(ort: ModuleType, provider: Provider) -> list[Any]:
    if provider == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise GpuError(
            "trt_reference = cuda: this ONNX Runtime has no CUDA provider",
            "pip install 'pytest-trtcheck[cuda]' (and uninstall onnxruntime), or take trt_reference = cpu",
            code="provider-failed",
        )
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
