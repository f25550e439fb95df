"""Which input or output of one model is which of another: tools that quantize or convert rename them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SUFFIXES = (
    "_QuantizeLinear_Input",
    "_QuantizeLinear_Output",
    "_QuantizeLinear",
    "_DequantizeLinear_Output",
    "_DequantizeLinear",
    "_quantized",
    "_dequantized",
    "_fp16",
    "_fp32",
    ":0",
)
"""What onnxruntime's quantizer and float converter, Model Optimizer and TensorFlow put behind a name."""


def matched(wanted: Sequence[str], available: Sequence[str]) -> dict[str, str]:
    """Which of the available names each wanted one is: the same, or the same but for a tool's suffix.

    What that does not tell is left out.
    """
    found = {name: name for name in wanted if name in available}
    for name in wanted:
        same = [each for each in available if each not in found.values() and _base(each) == _base(name)]
        if name not in found and len(same) == 1:
            found[name] = same[0]
    return found


def renamed(names: dict[str, str]) -> list[str]:
    """The pairs whose names differ: "y_quantized is y"."""
    return [f"{one!r} is {other!r}" for one, other in names.items() if one != other]


def _base(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return _base(name.removesuffix(suffix))
    return name
