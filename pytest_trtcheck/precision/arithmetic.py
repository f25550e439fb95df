"""Which nodes count as computed in a precision: the one rule for what a check can say anything about.

A check says something about a precision only where arithmetic on floats is done in it. A node that moves values, or
that depends on constants and shapes alone, shows nothing of it. What each node computes in, `computed.survey` tells;
nothing here needs a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_trtcheck.choices import parts_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MATRIX_OPERATORS = frozenset(
    ["Attention", "Conv", "ConvTranspose", "DeformConv", "Einsum", "Gemm", "GRU", "LSTM", "MatMul", "RNN"]
)
"""What tensor cores compute: the operators that TF32 is for."""

ROUNDING = "QuantizeLinear"
"""What rounds values to the grid of a quantized type, and computes nothing else."""


class Computation(NamedTuple):
    """A node that does arithmetic, and what it does it in: a precision's name, or another type's ("float64", …)."""

    node: str
    op_type: str
    kind: str


def operators(found: Iterable[Computation]) -> list[Computation]:
    """Those that do more than round."""
    return [each for each in found if each.op_type != ROUNDING]


def within(found: Iterable[Computation], precision: str) -> list[Computation]:
    """Those that are computed in `precision`; where none is, what rounds to its grid.

    TF32 is what matrix products in FP32 may be computed in. Of a pair it is what either part computes.
    """
    parts = parts_of(precision)
    if len(parts) > 1:
        return [each for part in parts for each in within(found, part)]
    if precision == "tf32":
        return [each for each in found if each.kind == "fp32" and each.op_type in MATRIX_OPERATORS]
    mine = [each for each in found if each.kind == precision]
    return operators(mine) or mine


def heaviest(found: Sequence[Computation]) -> Sequence[Computation]:
    """The matrix products, which decide how fast and how exact a model is; all nodes where there is none."""
    return [each for each in found if each.op_type in MATRIX_OPERATORS] or found
