"""ONNX Runtime's TensorRT provider, which links TensorRT 10.

Written after ONNX Runtime's documentation and loaded, with all of its options, against empty libraries in the place of
TensorRT and CUDA: an option that it does not know is an error there. It was never run with TensorRT itself.
"""

from __future__ import annotations

import shutil
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_trtcheck.backends.onnxruntime import building, installed, placement
from pytest_trtcheck.backends.onnxruntime.compiled import CompilingProvider, is_whole, restore
from pytest_trtcheck.backends.onnxruntime.options import Counterparts, as_is, mib, profile_shapes
from pytest_trtcheck.backends.onnxruntime.session import open_session, session_options
from pytest_trtcheck.backends.tensorrt.module import available
from pytest_trtcheck.cache import Key, scratch_folder
from pytest_trtcheck.gpu.device import identity_parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.backends.base import Built, EngineSpec
    from pytest_trtcheck.backends.tensorrt.module import ModuleName
    from pytest_trtcheck.cache import Cache, Entry

_PROVIDER = "TensorrtExecutionProvider"
_LIBRARY = "onnxruntime_providers_tensorrt"
_TIMINGS, _TIMINGS_NAME = "timings", "timings.name"


_ON = "True"
"""This provider takes no 1."""
_ENGINES = "engines"


def _hardware(value: str) -> dict[str, str]:
    if value != "ampere_plus":
        raise ValueError("it has Ampere and later alone, 'ampere_plus'")
    return {"trt_engine_hw_compatible": _ON}


def _preview(names: Sequence[str]) -> dict[str, str]:
    if any(name.startswith("-") for name in names):
        raise ValueError("it switches preview features on, none off")
    return {"trt_preview_features": ",".join(names)}


def _tf32(value: bool) -> dict[str, str]:
    if not value:
        raise ValueError(
            "it leaves TF32 on; the environment variable NVIDIA_TF32_OVERRIDE=0 takes it from every library"
        )
    return {}


@dataclass(frozen=True)
class OrtTensorRT(CompilingProvider):
    """ONNX Runtime's TensorRT provider. What TensorRT does not take falls back to CUDA, and fails the check."""

    name: ClassVar[str] = "onnxruntime-tensorrt"
    provider: ClassVar[str] = _PROVIDER
    says: ClassVar[str] = "TensorRT provider"
    how: ClassVar[str] = "on the GPU by ONNX Runtime's TensorRT provider"
    ships: ClassVar[tuple[ModuleName, ...]] = ("tensorrt",)
    prefix: ClassVar[str] = "trt"
    compile_by: ClassVar[str] = f"{__name__}:compile_model"
    counterparts: ClassVar[Counterparts] = Counterparts(
        {
            "tf32": _tf32,
            "workspace_mib": mib("trt_max_workspace_size"),
            "optimization_level": as_is("trt_builder_optimization_level"),
            "sparsity": lambda value: {"trt_sparsity_enable": str(value)},
            "hardware_compatible": _hardware,
            "max_aux_streams": as_is("trt_auxiliary_streams"),
            "min_subgraph_size": as_is("trt_min_subgraph_size"),
            "dla_core": lambda core: {"trt_dla_enable": _ON, "trt_dla_core": str(core)},
            "preview": _preview,
            "plugins": lambda paths: {
                "trt_extra_plugin_lib_paths": ";".join(str(Path(each).resolve()) for each in paths)
            },
        },
        {"strip_weights": "its engines get their weights from the model file as they run, which is not tried here"},
    )

    @classmethod
    def require(cls) -> None:
        """See that onnxruntime-gpu is installed, and finds CUDA and TensorRT 10."""
        installed.require_provider(cls.provider, cls.full_name())
        there = available("tensorrt")
        beside = f"; {there.title} is installed" if there and there.release[0] != 10 else ""
        installed.require_library(
            _LIBRARY,
            cls.full_name(),
            f"it links TensorRT 10 (libnvinfer.so.10){beside}: pip install 'tensorrt<11', and for CUDA "
            f"{installed.cuda_version()} 'onnxruntime-gpu[cuda,cudnn]' or a PyTorch for it",
        )

    def rests_on(self) -> dict[str, str]:
        """TensorRT, by its own number, and CUDA."""
        found = installed.library(_LIBRARY).tensorrt
        return {"tensorrt": "unknown" if found is None else _dotted(found), "cuda": installed.cuda_version()}

    def open(self, built: Built, *, profile: Path | None = None) -> Any:
        """A session of the EPContext model, or of the model with its engines, in a folder that is the session's own.

        The provider builds again what it does not take for the model's, and writes that there.
        """
        options = self.options(built.spec.options)
        asked = session_options(dict([placement.RECORD]), built.spec.options.custom_ops, profile)
        if built.path.name == building.CONTEXT:
            return open_session(built.path, asked, [(self.provider, options)], self._label(built))
        assert built.entry is not None
        shapes = profile_shapes(built.spec.profile, f"{self.prefix}_profile")
        engines = scratch_folder("engines")
        with suppress(FileNotFoundError):
            shutil.copytree(built.entry.path / _ENGINES, engines.name, dirs_exist_ok=True)
        given = providers({**options, **shapes, **_engine_cache(engines.name)})
        session = open_session(built.path, asked, given, self._label(built))
        weakref.finalize(session, lambda held: held.cleanup(), engines)
        return session

    @contextmanager
    def _timings(self, spec: EngineSpec, cache: Cache) -> Iterator[dict[str, str]]:
        """The builder's timings: one file, which is named after the GPU's compute capability."""
        if not spec.options.timing_cache:
            yield {}
            return
        with scratch_folder("timing") as folder:
            kept = self._kept(cache)
            restore(kept, _TIMINGS_NAME, _TIMINGS, folder)
            yield {_TIMINGS: folder}
            for path in list(Path(folder).iterdir())[:1]:
                kept.write_extra(_TIMINGS_NAME, path.name.encode())
                kept.write_extra(_TIMINGS, path.read_bytes())

    def _kept(self, cache: Cache) -> Entry:
        """Where the builder's timings are kept: they hold for one GPU, CUDA and TensorRT alone."""
        assert self.gpu is not None
        key = Key("timing", self.gpu.product, {"provider": self.name, **self.rests_on(), **identity_parts(self.gpu)})
        return cache.get_or_make(key, lambda folder: (folder / "about.txt").write_text(self.title))

    def _tidy(self, folder: Path, found: Mapping[str, Any]) -> None:
        if not is_whole(found, self.provider):
            # One EPContext model can't stand for several engines with nodes between them.
            (folder / building.CONTEXT).unlink(missing_ok=True)


def providers(options: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
    """The provider, and behind it who takes what it leaves."""
    return [(_PROVIDER, options), (placement.CUDA, {"use_tf32": "0"})]


def _engine_cache(folder: str) -> dict[str, str]:
    return {"trt_engine_cache_enable": _ON, "trt_engine_cache_path": folder}


def compile_model(request: dict[str, Any]) -> Any:
    """In the builder's process: the session that builds, with its engines and an EPContext model in "folder"."""
    options = {
        **request["options"],
        # Below the EPContext model's folder: a path that leads out of it is refused.
        **_engine_cache(_ENGINES),
        "trt_dump_ep_context_model": _ON,
        "trt_ep_context_file_path": str(Path(request["folder"], building.CONTEXT)),
        "trt_ep_context_embed_mode": "0",
    }
    if _TIMINGS in request:
        options |= {"trt_timing_cache_enable": _ON, "trt_timing_cache_path": request[_TIMINGS]}
    asked = session_options(dict([placement.RECORD]), request["custom_ops"])
    return open_session(Path(request["model"]), asked, providers(options), "the build")


def _dotted(number: int) -> str:
    """TensorRT's own number as a version: 101303 is 10.13.3."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
