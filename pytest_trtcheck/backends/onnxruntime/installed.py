"""Which of ONNX Runtime's providers is installed here, whether its library loads, and what to install where not.

ONNX Runtime itself only warns of a provider that it cannot start, and runs the model on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import MissingDependencyError, listed
from pytest_trtcheck.model import onnxruntime as ort

if TYPE_CHECKING:
    from types import ModuleType

# A library that is loaded before ONNX Runtime has introduced itself to it stays useless in that process.
_PROBE = """
import contextlib, ctypes, io, json, os, pathlib, sys
sys.path += [path for path in json.loads(sys.argv[2]) if path not in sys.path]
found = {}
with contextlib.redirect_stdout(io.StringIO()):
    from pytest_trtcheck.backends.onnxruntime.installed import preload
    import onnxruntime
    preload(onnxruntime, tensorrt="tensorrt" in sys.argv[1])
    folder = pathlib.Path(onnxruntime.__file__).parent / "capi"
    form = "{}.dll" if os.name == "nt" else "lib{}.so"
    try:
        ctypes.CDLL(str(folder / form.format("onnxruntime_providers_shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / form.format(sys.argv[1])))
    except OSError as error:
        found["error"] = str(error)
    for name in ("libnvinfer.so.10", "nvinfer_10.dll"):
        with contextlib.suppress(OSError, AttributeError):
            found["tensorrt"] = ctypes.CDLL(name).getInferLibVersion()
print(json.dumps(found))
"""
_PROBE_TIMEOUT_S = 120
DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1", "nvcuda.dll", "nvml.dll")
"""The libraries that come with a GPU's driver alone."""


@dataclass(frozen=True)
class Library:
    """What the loader said of a provider's library.

    Parameters
    ----------
    error
        Why it does not load; empty where it does.
    tensorrt
        The TensorRT that it links, as TensorRT's own number (101300); None where it is not there.
    """

    error: str = ""
    tensorrt: int | None = None

    @property
    def lacks_driver(self) -> bool:
        """Whether nothing is wrong with what is installed: there is no GPU's driver."""
        return any(name in self.error for name in DRIVER)


def require_provider(provider: str, title: str) -> ModuleType:
    """The onnxruntime module, which has a provider.

    Raises
    ------
    MissingDependencyError
        It has not, or is not installed.
    """
    module = ort.module()
    if provider not in (available := module.get_available_providers()):
        raise MissingDependencyError(
            f"{title}: onnxruntime {module.__version__} has no {provider}; it has {listed(available, 8)}",
            "pip uninstall onnxruntime, then pip install 'pytest-trtcheck[cuda]', which has onnxruntime-gpu: they are "
            "one module, and the one that was installed last overwrites the other",
            code="library-broken",
        )
    return module


@functools.cache  # A process a library: what is installed does not change during a run.
def library(name: str) -> Library:
    """Whether the library `onnxruntime_providers_…` loads, found out in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, name, json.dumps(sys.path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False)
        answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Library(f"it could not be looked at: {error}")
    if not answer and done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Library(f"the process that loaded it ended with: {said[-1]}")
    return Library(answer.get("error", ""), answer.get("tensorrt"))


def require_library(name: str, title: str, hint: str) -> Library:
    """What the loader said of a library that loads, but for the driver.

    Raises
    ------
    MissingDependencyError
        It does not load; the loader is quoted.
    """
    found = library(name)
    if found.error and not found.lacks_driver:
        raise MissingDependencyError(
            f"{title}: its library does not load: {found.error}; ONNX Runtime would run the model on the CPU",
            hint,
            code="library-broken",
        )
    return found


def preload(module: Any, *, tensorrt: bool = False) -> None:
    """Load CUDA's libraries from where PyTorch or NVIDIA's packages have them, and TensorRT's from its own package."""
    with contextlib.redirect_stdout(io.StringIO()):  # It prints what it does not find.
        if hasattr(module, "preload_dlls"):
            module.preload_dlls()
    if tensorrt:
        # Whatever is wrong with that package, the loader of the provider says what it lacks.
        with contextlib.suppress(Exception):
            importlib.import_module("tensorrt_libs")


def cuda_version() -> str:
    """The CUDA that the installed ONNX Runtime was built for."""
    try:
        from onnxruntime.capi import build_and_package_info as built
    except ImportError:
        return "unknown"
    return str(getattr(built, "cuda_version", "unknown"))
