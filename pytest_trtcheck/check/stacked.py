"""Which of the `trt_latency` marks that stand in one place judges a check: the narrowest that fits it, whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_trtcheck.errors import ArgumentError, listed, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.spec import LatencySpec


def judging(stack: Sequence[LatencySpec], precision: str, batch: int | None) -> LatencySpec | None:
    """The mark that fits nothing but what all others that fit the check fit too; None where none fits it.

    Raises
    ------
    ArgumentError
        Several fit, and none of them is narrower than all others.
    """
    fitting = [spec for spec in stack if spec.fits(precision, batch)]
    narrowest = [spec for spec in fitting if all(map(spec.is_within, fitting))]
    if fitting and len(narrowest) != 1:
        names = listed([shown(spec) for spec in fitting], 5, " and ")
        raise ArgumentError(
            f"{names} fit {checked(precision, batch)}, and none of them is narrower than the others",
            "give it budgets of its own: limit one mark to its batch and its precision",
            code="argument-conflict",
        )
    return narrowest[0] if narrowest else None


def judging_inputs(
    batch: int | None, *, stack: Sequence[LatencySpec], due: Sequence[LatencySpec], precision: str, source: str
) -> LatencySpec | None:
    """`judging`, where the inputs alone tell the batch.

    Parameters
    ----------
    batch
        What they hold; None: their numbers of rows differ.
    due
        The marks that only this check can fit.

    Raises
    ------
    ArgumentError
        As `judging`; or a mark that is due does not fit, or none does.
    """
    fitting = [spec for spec in stack if batch is not None and spec.fits(precision, batch)]
    wrong = [spec for spec in due if spec not in fitting] or ([] if fitting else list(stack))
    if not wrong:
        return judging(stack, precision, batch)
    names, fit = listed([shown(spec) for spec in wrong], 5, " and "), "fits" if len(wrong) == 1 else "fit"
    if batch is None:
        raise ArgumentError(
            f"{names}: the {source} hold different numbers of rows, so that no batch is known",
            "name it, trt_parity(batch=…), or leave batch= out",
            code="marker-unmatched",
        )
    raise ArgumentError(
        f"{names} {fit} no test: the {source} hold {plural(batch, 'row')}",
        f"batch={batch} is what they are; or name the batch, trt_parity(batch=…), which takes the inputs in batches",
        code="marker-unmatched",
    )


def shown(spec: LatencySpec) -> str:
    """A mark by what it is limited to."""
    return f"trt_latency({', '.join(filter(None, (spec.limited_to, '…')))})"


def checked(precision: str, batch: int | None) -> str:
    """A check by what marks are limited to."""
    return precision if batch is None else f"{precision} with batch {batch}"
