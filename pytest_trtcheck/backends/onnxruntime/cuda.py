"""ONNX Runtime's CUDA provider: no engine, a kernel for each node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pytest_trtcheck.backends.onnxruntime import installed
from pytest_trtcheck.backends.onnxruntime.backend import OrtProvider
from pytest_trtcheck.backends.onnxruntime.options import Counterparts, as_is
from pytest_trtcheck.choices import quantized_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.backends.base import Built, Runner
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.spec import Precision

_LIBRARY = "onnxruntime_providers_cuda"


@dataclass(frozen=True)
class OrtCuda(OrtProvider):
    """ONNX Runtime's CUDA provider. TF32 is off, unless it is asked for: its own default is on."""

    name: ClassVar[str] = "onnxruntime-cuda"
    provider: ClassVar[str] = "CUDAExecutionProvider"
    says: ClassVar[str] = "CUDA provider"
    how: ClassVar[str] = "on the GPU by ONNX Runtime's CUDA provider"
    counterparts: ClassVar[Counterparts] = Counterparts(
        {"tf32": as_is("use_tf32")},
        dict.fromkeys(
            ("workspace_mib", "optimization_level", "sparsity", "refit", "strip_weights", "tiling"),
            "it builds no engine",
        ),
    )

    @classmethod
    def require(cls) -> None:
        """See that onnxruntime-gpu is installed, and finds the CUDA that it was built for."""
        installed.require_provider(cls.provider, cls.full_name())
        cuda = installed.cuda_version()
        installed.require_library(
            _LIBRARY,
            cls.full_name(),
            f"this onnxruntime-gpu is built for CUDA {cuda}: pip install 'onnxruntime-gpu[cuda,cudnn]', or a PyTorch "
            f"for that CUDA, which brings the same libraries",
        )

    @classmethod
    def refusal(cls, precision: Precision) -> str | None:
        """INT8 and FP8 are computed in float there: the Q/DQ nodes round, and what lies between them does not."""
        if (kind := quantized_part(precision)) is None:
            return None
        return (
            f"it has no {kind.upper()} kernels for models with Q/DQ nodes: it rounds to {kind.upper()} and computes in "
            "float, which is no check of the precision; take onnxruntime-tensorrt"
        )

    def _providers(self, built: Built) -> Sequence[tuple[str, Mapping[str, str]]]:
        default = {"use_tf32": "1" if built.spec.precision == "tf32" else "0"}
        return [(self.provider, default | self.options(built.spec.options))]

    def doubt(self, built: Built, runner: Runner, case: Case) -> str | None:
        """As any provider's; and that no kernel computes in the precision."""
        if (reason := super().doubt(built, runner, case)) is not None:
            return reason
        precision = built.spec.precision
        if built.spec.lowered.taken_as_it_is or precision not in {"fp16", "bf16"}:
            return None
        found = self.partition(built, runner)
        kernels = (found and found.kernels) or {}
        if kernels.get(precision):
            return None
        others = ", ".join(f"{count} in {kind}" for kind, count in kernels.items()) or "none that computes in floats"
        return f"{precision} did not take effect: of the kernels, ONNX Runtime's profile lists {others}"
