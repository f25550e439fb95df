"""How many digits of a number stand in a file."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context

DIGITS = 4


def rounded(value: float, rounding: str = ROUND_HALF_EVEN) -> float:
    """`value` with four significant digits. What was rounded once stays as it is."""
    context = Context(prec=DIGITS, rounding=rounding)
    return float(context.create_decimal(repr(float(value))))
