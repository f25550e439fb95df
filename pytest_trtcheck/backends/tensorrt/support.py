"""What a GPU and a TensorRT release can serve, and what to do about what TensorRT commonly says.

The rules for TensorRT-RTX come from real builds of one-operator models with releases 1.4 to 1.7 for every compute
capability they compile for (tests/test_tensorrt_build.py repeats them); those for TensorRT from its support matrix and
release notes. docs/install.md shows them to users.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_trtcheck.backends.tensorrt.module import TITLES
from pytest_trtcheck.choices import quantized_part
from pytest_trtcheck.errors import MORE_PROCESSES, lacked_memory, lacked_threads
from pytest_trtcheck.gpu.table import FIRST_WITH

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_trtcheck.backends.tensorrt.module import ModuleName, Target, TensorRTModule
    from pytest_trtcheck.gpu.table import ComputeCapability
    from pytest_trtcheck.spec import Precision

GEMM_OPERATORS = frozenset({"MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN"})
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})

VOLTA, TURING, BLACKWELL = (7, 0), (7, 5), (10, 0)
NO_VOLTA_FROM = (10, 5)
"""Release notes of 10.0 to 10.5: Volta is deprecated, and gone from 10.5 on."""
BLACKWELL_FROM = (10, 8)
"""Release notes of 10.8."""
STRONG_TYPING_COMPLETE = (10, 12)
"""With 10.12 weak typing was deprecated; what strong typing lacks before is found out by the build alone."""

SINCE: tuple[tuple[ModuleName, Precision, frozenset[str], tuple[int, int]], ...] = (
    # The first release of a module that has these operators in a precision, in strongly typed networks.
    ("tensorrt", "fp8", CONVOLUTIONS, (10, 2)),  # by issue 3987 of TensorRT's
    ("tensorrt_rtx", "int8", CONVOLUTIONS, (1, 7)),  # real builds
)


def unsupported(
    module: TensorRTModule, target: Target, precision: Precision, op_types: Collection[str] = ()
) -> str | None:
    """Why `module` cannot serve `precision` on `target`; None when nothing is known to stand against it.

    Parameters
    ----------
    op_types
        The ONNX operator types that the lowered model computes in `precision`; of a pair, those that are quantized.
    """
    capability = target.compute_capability
    name = "compute capability {}.{}".format(*capability)
    if reason := _gpu(module, capability):
        return f"{reason}; the target has {name}"
    first = FIRST_WITH[precision]
    if capability < first:
        generation = "Ampere (compute capability 8.0)" if first == (8, 0) else "Ada (compute capability 8.9)"
        return f"{precision} needs a GPU from {generation} on; the target has {name}"
    if reason := _rtx(module, target) if module.is_rtx else _tensorrt(module, target):
        return reason
    for name_of, kind, operators, release in SINCE:
        asked = kind in {precision, quantized_part(precision)}
        if module.name == name_of and asked and module.release < release and operators & set(op_types):
            kinds = " and ".join(sorted(operators & set(op_types)))
            return f"{module.title} has no {kind.upper()} {kinds}; {TITLES[name_of]} {release[0]}.{release[1]} has"
    return _on_turing(module, target, precision, op_types) if module.is_rtx else None


def builds_on(capability: ComputeCapability, precision: Precision) -> bool:
    """Whether some release of TensorRT builds on such a GPU in a precision."""
    return capability >= max(VOLTA, FIRST_WITH[precision])


def of_the_gpu(said: str) -> bool:
    """Whether TensorRT-RTX refused a model for the GPU's sake, and not for the model's own."""
    return re.search(r"FP32 GEMM is not supported|FP32 3D convolution is not supported", said) is not None


def _gpu(module: TensorRTModule, capability: ComputeCapability) -> str | None:
    """Why this release is not for a GPU of this compute capability."""
    if not module.is_rtx and capability >= BLACKWELL and module.release < BLACKWELL_FROM:
        return f"{module.title} knows no Blackwell GPUs: TensorRT {BLACKWELL_FROM[0]}.{BLACKWELL_FROM[1]} and later do"
    has_volta = not module.is_rtx and module.release < NO_VOLTA_FROM
    if capability >= (VOLTA if has_volta else TURING):
        return None
    oldest = "Volta (compute capability 7.0)" if has_volta else "Turing (compute capability 7.5)"
    volta = "; TensorRT 10.1 to 10.4 have Volta" if capability == VOLTA else ""
    return f"{module.title} supports GPUs from {oldest} on{volta}"


def _tensorrt(module: TensorRTModule, target: Target) -> str | None:
    if not target.here:
        return (
            f"{module.title} builds engines only on the GPU that they run on, and this machine has no {target.sm}; "
            "TensorRT-RTX compiles for other GPUs (the extra pytest-trtcheck[rtx], backend='tensorrt_rtx')"
        )
    return None


def _rtx(module: TensorRTModule, target: Target) -> str | None:
    listed = module.compile_only()
    # Up to 1.6 a GPU that is not listed was tried; 1.5 is known to run on 9.0. Later releases refuse it.
    if target.compute_capability not in listed and (not target.here or module.release >= (1, 7)):
        known = ", ".join("{}.{}".format(*capability) for capability in listed)
        return (
            f"{module.title} does not support compute capability {'{}.{}'.format(*target.compute_capability)}; "
            f"it does {known}"
        )
    return None


def _on_turing(module: TensorRTModule, target: Target, precision: Precision, op_types: Collection[str]) -> str | None:
    turing = target.compute_capability == (7, 5) and module.release >= (1, 7)
    if turing and precision in ("fp32", "int8") and GEMM_OPERATORS & set(op_types):
        kinds = ", ".join(sorted(GEMM_OPERATORS & set(op_types)))
        return (
            f"{module.title} has no FP32 matrix products on Turing (SM75), INT8 ones included; the model has {kinds}. "
            "fp16 and int8+fp16 work, and so does backend='tensorrt' on the GPU itself"
        )
    return None


_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"no optimization profile has been defined|missing dimensions in profile|has a dynamic shape .* and no profile",
        "fix the dynamic dimensions with batch=… or shapes={'input': (…)}, or give a range: (min, opt, max)",
    ),
    (
        r"Dimensions with name .* must be equal",
        "dimensions that share a name in the model must get the same sizes in every input's shapes",
    ),
    (
        r"cannot infer the shape of scan output|checkCalculationStatusSanity",
        "fix the model's dynamic dimensions, or unroll the loop when exporting: TensorRT must know how often it runs",
    ),
    (
        r"missing values for shape input tensor|is a shape tensor",
        "make that input a constant of the model, or give the range of its values in shapes",
    ),
    (
        r"(?i)NonZero|NonMaxSuppression|has no runners",
        "TensorRT-RTX has no operators whose output size depends on the data (such as NonZero): cut them off",
    ),
    (
        r"this TensorRT does not import|(?i:no importer registered)|Plugin not found|not found in plugin registry",
        "rewrite those operators when exporting, cut them off the model, or name a plugin library: plugins=[…]",
    ),
    (
        r"(?i)Turing.*FP32 GEMM|FP32 GEMM is not supported",
        "TensorRT-RTX 1.7 has no FP32 matrix products on Turing: use fp16, or TensorRT-RTX 1.5 or 1.6",
    ),
    (r"FP32 3D convolution is not supported", "TensorRT-RTX 1.7 has no FP32 3-D convolution on Turing: use fp16"),
    (
        r"cudnn_impl\.cpp.*CHECK\(dtype",
        "TensorRT-RTX before 1.7 has no INT8 convolutions: install 1.7, or leave those nodes out with keep_fp32=[…]",
    ),
    (
        # The operator is in TensorRT's own words there: ConvTranspose is deconv.
        r"Could not infer output types for operation:\s*\d+: (?P<kind>\w+): \S*bf16",
        "TensorRT-RTX has no BF16 kernel for what it calls {kind}: name those nodes in keep_fp32=[…], or use fp16",
    ),
    (
        r"graphScope\.cpp",
        "TensorRT-RTX fails on an If or Loop of the model: export it with the condition fixed, or the branch alone",
    ),
    (
        r"ROIAlign plugin was not found",
        "TensorRT-RTX makes RoiAlign on a machine with a GPU and its driver alone: build it there",
    ),
    (
        r"Attention operation was not supported by a dedicated kernel",
        "TensorRT-RTX has Attention in fp16 and bf16, for heads of 16 and more: check those, or export it in pieces",
    ),
    (r"HW-specific datatypes: (?:b16|bf16)", "bf16 needs a GPU from Ampere on: use fp16"),
    (r"HW-specific datatypes: fp8", "fp8 needs a GPU from Ada on: use fp16 or int8"),
    (
        r"workspace limit|requires workspace memory|insufficient workspace",
        "raise workspace_mib, or leave it out: TensorRT then takes what it needs",
    ),
    (
        r"external weights|WeightsContext\.cpp.*Failed to open|Failed to open file",
        "the model's external data file is missing, cut off, or not beside the model",
    ),
    (
        r"MODEL_DESERIALIZE_FAILED|has no outputs",
        "the file is no complete ONNX model: export or download it again",
    ),
    (
        r"Pre-opset 7|getOpsetVersion\(\) >= 7|Attribute scales is missing",
        "the model is in an old opset: export it in opset 13 or newer (onnx.version_converter converts many)",
    ),
    (
        r"SIGKILL",
        "the system ends processes this way when memory runs out: see the kernel log; give the machine or its "
        "container more, run fewer workers (-n), or lower workspace_mib",
    ),
    (
        r"did not finish within timeout_s",
        "raise timeout_s, or lower optimization_level (TensorRT) if the model takes that long to build",
    ),
    (r"Unable to load library|cannot be loaded as a plugin", "check that the plugin was built for this TensorRT"),
    (
        r"Non-zero zero point is not supported",
        "TensorRT takes symmetric Q/DQ only: quantize with signed int8 and zero points of 0",
    ),
    (r"takes UINT8 quantization for INT8", "quantize with signed int8 and zero points of 0"),
)


def what_strong_typing_lacks(module: TensorRTModule) -> list[str]:
    """What to do where a build failed with a release whose strong typing was not complete."""
    if module.is_rtx or module.release >= STRONG_TYPING_COMPLETE:
        return []
    complete = "{}.{}".format(*STRONG_TYPING_COMPLETE)
    return [
        f"{module.title} lacks some layers in strongly typed networks, which are complete from TensorRT {complete} on: "
        f"build with that, or leave the nodes named above in FP32 with keep_fp32=[…]"
    ]


def advice(text: str, *, is_rtx: bool) -> list[str]:
    """What to do about the messages in `text`, for those that are known; each piece once.

    Parameters
    ----------
    text
        All that TensorRT said.
    is_rtx
        Whether it was TensorRT-RTX.
    """
    pieces: dict[str, None] = {}
    if lacked := lacked_memory(text):
        too = "cuDNN and cuBLAS fail like this where GPU memory runs out, too: " if lacked == "perhaps" else ""
        pieces[f"{too}free GPU memory, lower workspace_mib, or use a smaller batch"] = None
    if lacked_threads(text):
        pieces[MORE_PROCESSES] = None
    for pattern, what_to_do in _ADVICE:
        if "TensorRT-RTX" in what_to_do and not is_rtx:
            continue
        match = re.search(pattern, text)
        if match is not None:
            pieces[what_to_do.format(**match.groupdict()) if match.groupdict() else what_to_do] = None
    return list(pieces)
