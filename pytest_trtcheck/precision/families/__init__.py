"""Which models each TensorRT takes: an operator and rule table per family, judged on the ONNX graph.

Where a family's own parser is installed, it has the last word on all that it sees; the table knows what it reads
without a word and computes as something else.
"""

from pytest_trtcheck.precision.families.family import DLA, FAMILIES, RTX, TENSORRT_10, TENSORRT_11, Family, family_of
from pytest_trtcheck.precision.families.kernels import NO_KERNEL, without_kernel
from pytest_trtcheck.precision.families.quantizer import is_of_quantization, mending
from pytest_trtcheck.precision.families.rules import RULES, Finding, Rule, findings, foreign_nodes

__all__ = [
    "DLA",
    "FAMILIES",
    "NO_KERNEL",
    "RTX",
    "RULES",
    "TENSORRT_10",
    "TENSORRT_11",
    "Family",
    "Finding",
    "Rule",
    "family_of",
    "findings",
    "foreign_nodes",
    "is_of_quantization",
    "mending",
    "without_kernel",
]
