"""ONNX Runtime's TensorRT-RTX provider: a plugin, which brings its TensorRT-RTX with it.

Written after the plugin's own header of options. It was registered, with a driver's library that is empty, and its
options were held against the names in that header; no GPU that it supports was at hand.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pytest_trtcheck.backends.onnxruntime import building, installed, placement
from pytest_trtcheck.backends.onnxruntime.backend import outer_types
from pytest_trtcheck.backends.onnxruntime.compiled import CompilingProvider, restore
from pytest_trtcheck.backends.onnxruntime.options import Counterparts, mib
from pytest_trtcheck.backends.onnxruntime.session import ProviderRunner, open_session, session_options
from pytest_trtcheck.cache import scratch_folder
from pytest_trtcheck.errors import MissingDependencyError, UnsupportedTargetError
from pytest_trtcheck.model import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_trtcheck.backends.base import Backend, Built, Machine, Runner
    from pytest_trtcheck.backends.tensorrt.module import ModuleName

_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
_PROVIDER = "NvTensorRTRTXExecutionProvider"
_SAYS = "TensorRT-RTX provider"
_KERNELS, _KERNELS_NAME = "kernels", "kernels.name"


def _streaming(value: int | str) -> dict[str, str]:
    # 0 switches streaming off there, and 1 asks for the least memory.
    return {"nv_weight_streaming_budget": "-1" if value == "auto" else f"{value}M" if value else "1"}


def _tf32(value: bool) -> dict[str, str]:
    if not value:
        raise ValueError("TensorRT-RTX takes TF32 for FP32, whatever it is told")
    return {}


@dataclass(frozen=True)
class OrtTensorRTRtx(CompilingProvider):
    """ONNX Runtime's TensorRT-RTX provider. What TensorRT-RTX does not take falls back to the CPU, and fails."""

    name: ClassVar[str] = "onnxruntime-tensorrt-rtx"
    provider: ClassVar[str] = _PROVIDER
    says: ClassVar[str] = _SAYS
    how: ClassVar[str] = "on the GPU by ONNX Runtime's TensorRT-RTX provider"
    ships: ClassVar[tuple[ModuleName, ...]] = ("tensorrt_rtx",)
    prefix: ClassVar[str] = "nv"
    compile_by: ClassVar[str] = f"{__name__}:compile_model"
    counterparts: ClassVar[Counterparts] = Counterparts(
        {
            "tf32": _tf32,
            "workspace_mib": mib("nv_max_workspace_size"),
            "weight_streaming_mib": _streaming,
        },
        {"strip_weights": "its engines without weights are experimental"},
    )

    @classmethod
    def require(cls) -> None:
        """See that the plugin is installed, and registers."""
        problem = register()
        if problem and not any(name in problem for name in installed.DRIVER):
            raise MissingDependencyError(
                f"ONNX Runtime's {_SAYS} cannot be registered: {problem}",
                "install the onnxruntime that the plugin's release notes name, and CUDA 13 or 12 as its name says",
                code="library-broken",
            )

    @classmethod
    def without_gpu(cls, why: str) -> str:
        """What the plugin says."""
        told = f"cannot be registered: {problem}" if (problem := register()) else "registers and shows no device"
        return f"its plugin {version()} {told} ({why})"

    @classmethod
    def find(cls, machine: Machine) -> Backend:
        """On the GPU that is here, if the plugin shows it as a device."""
        found, gpu = super().find(machine), machine.detected
        if gpu is not None and (problem := register()):
            raise MissingDependencyError(
                f"ONNX Runtime's {_SAYS} cannot be registered: {problem}", code="library-broken"
            )
        if gpu is not None and not devices():
            raise UnsupportedTargetError(
                f"ONNX Runtime's {_SAYS} {version()} registers and shows no device, and {gpu.description} is here",
                "it takes GPUs of compute capability 8.6, 8.9, 12.0 and later; take backend='onnxruntime-tensorrt'",
                code="provider-failed",
            )
        return found

    def rests_on(self) -> dict[str, str]:
        """The plugin, which brings TensorRT-RTX and CUDA's runtime."""
        return {"onnxruntime_ep_nv_tensorrt_rtx": version()}

    def open(self, built: Built, *, profile: Path | None = None) -> Any:
        """A session of the EPContext model."""
        return self._opened(built, {}, profile)

    def _opened(self, built: Built, more: dict[str, str], profile: Path | None = None) -> Any:
        chosen, operators = self.options(built.spec.options), built.spec.options.custom_ops
        asked = session_options(dict([placement.RECORD]), operators, profile)
        return _session(built.path, asked, {**chosen, **more}, self._label(built))

    def load(self, built: Built) -> Runner:
        """The session, with the kernels that were compiled when it was loaded before."""
        kernels = scratch_folder("kernels")
        if built.entry:
            restore(built.entry, _KERNELS_NAME, _KERNELS, kernels.name)
        session = self._opened(built, {"nv_runtime_cache_path": kernels.name})
        return ProviderRunner(session, self._label(built), outer_types(built), kernels)

    def keep(self, built: Built, runner: Runner) -> None:
        """Keep the kernels that TensorRT-RTX compiled for the engine: one file, by the plugin's own tests."""
        kernels = cast("ProviderRunner", runner).scratch
        if built.entry is None or kernels is None or built.entry.read_extra(_KERNELS):
            return
        files = [path for path in Path(kernels.name).iterdir() if path.is_file()]
        if len(files) == 1:
            built.entry.write_extra(_KERNELS_NAME, files[0].name.encode())
            built.entry.write_extra(_KERNELS, files[0].read_bytes())


def _plugin() -> Any:
    """The plugin's package.

    Raises
    ------
    MissingDependencyError
        It is not installed, or ONNX Runtime is too old for plugins.
    """
    module = ort.module()
    try:
        plugin = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime's {_SAYS} is not installed ({error})",
            "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13 beside onnxruntime; it brings its TensorRT-RTX with it",
        ) from error
    if not hasattr(module, "register_execution_provider_library"):
        raise MissingDependencyError(
            f"onnxruntime {module.__version__} takes no provider that is a plugin",
            "pip install -U onnxruntime",
            code="library-broken",
        )
    return plugin


def version() -> str:
    """The plugin's."""
    return str(_plugin().__version__)


@functools.cache  # Once a process: a second registration is an error.
def register() -> str:
    """Let ONNX Runtime have the plugin; why it does not take it, empty where it does."""
    plugin = _plugin()
    try:
        ort.module().register_execution_provider_library(_PROVIDER, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime's are of many classes.
        return ort.quoted(error)
    return ""


def devices() -> list[Any]:
    """The GPUs that the plugin shows."""
    return [device for device in ort.module().get_ep_devices() if device.ep_name == _PROVIDER]


def _session(model: Path, options: Any, chosen: Mapping[str, str], label: str) -> Any:
    if problem := register():
        raise MissingDependencyError(f"ONNX Runtime's {_SAYS} cannot be registered: {problem}", code="library-broken")
    options.add_provider_for_devices(devices()[:1], dict(chosen))
    return open_session(model, options, (), label)


def compile_model(request: dict[str, Any]) -> Any:
    """In the builder's process: the session that builds, with an EPContext model and its engines in "folder"."""
    entries = {
        **dict([placement.RECORD]),
        "ep.context_enable": "1",
        "ep.context_file_path": str(Path(request["folder"], building.CONTEXT)),
        "ep.context_embed_mode": "0",
    }
    asked = session_options(entries, request["custom_ops"])
    return _session(Path(request["model"]), asked, request["options"], "the build")
