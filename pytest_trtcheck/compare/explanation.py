"""The text of a failed comparison, for a person who has to act on it."""

from __future__ import annotations

import math
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_trtcheck.compare.judge import sentence
from pytest_trtcheck.compare.patterns import OF_PRECISION
from pytest_trtcheck.errors import plural
from pytest_trtcheck.metrics import METRICS, distinct_digits
from pytest_trtcheck.record import is_bad
from pytest_trtcheck.spec import WHOLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.compare.measurement import Element, Measurement
    from pytest_trtcheck.compare.patterns import Examination
    from pytest_trtcheck.record import JudgedRecord, OutputRecord

WIDTH = 96
_LABEL = 15
_IN_FULL = 5
"""Failed outputs told in full; of the others the first line alone."""
_SHOWN_ELEMENTS = 3
_HANGING = "    "
"""Before what goes on: by less a line begins (`report.text.folded`)."""


def explain(
    measurements: Mapping[str, Measurement],
    outputs: Sequence[OutputRecord],
    examinations: Mapping[str, Examination] | None = None,
    *,
    is_diagnosed: bool = False,
) -> str:
    """What was judged of every output, failed ones first and in full; no line is wider than `WIDTH` columns.

    Parameters
    ----------
    measurements
        By output name, as they were judged.
    outputs
        The verdicts on them.
    examinations
        What `examine` found of the failed ones; without it the text says no next step.
    is_diagnosed
        Whether a diagnosis stands beside it: what it advises about precision counts, and none of ours contradicts it.
    """
    failed = [output for output in outputs if is_bad(output.verdict)]
    lines: list[str] = []
    for output in failed[:_IN_FULL]:
        examination = (examinations or {}).get(output.name)
        lines += [*_in_full(measurements[output.name], output, examination, is_diagnosed=is_diagnosed), ""]
    for output in failed[_IN_FULL:]:
        lines += _wrap(_headline(measurements[output.name], output), "", _HANGING)
    passed = [output for output in outputs if output.verdict == "pass"]
    if passed:
        lines.append(f"{len(passed)} of {len(outputs)} outputs passed:")
        for output in passed[:_IN_FULL]:
            lines += _wrap(_headline(measurements[output.name], output), "  ", "    ")
        if len(passed) > _IN_FULL:
            lines.append(f"  … and {len(passed) - _IN_FULL} more")
    for output in outputs:
        if output.verdict == "not_measured":
            lines += _wrap(f"not compared: {_headline(measurements[output.name], output)}", "", _HANGING)
    return "\n".join(lines).rstrip()


def _in_full(
    measurement: Measurement, output: OutputRecord, examination: Examination | None, *, is_diagnosed: bool
) -> Iterator[str]:
    yield from _wrap(_headline(measurement, output), "", _HANGING)
    bad = _bad(output)
    for entry in bad[1:]:
        # NaN makes every metric infinite; saying so of each adds nothing.
        if entry.value is None or math.isfinite(entry.value):
            yield from _row("also", sentence(entry))
    if measurement.size:
        yield from _row("other metrics", _others(measurement, {entry.metric for entry in bad}))
        yield from _parts(output)
        yield from _row("over the limit", _share(examination))
        yield from _row("typical error", _typical(measurement))
        yield from _row("non-finite", _nonfinite(measurement))
        worst = examination.worst if examination and examination.worst else measurement.worst
        for index, element in enumerate(worst[:_SHOWN_ELEMENTS]):
            yield from _row("" if index else "worst at", _element(element))
        for note in measurement.notes:
            yield from _row("note", note)
    for pattern in examination.patterns if examination else ():
        is_of_part = examination is not None and examination.part is not None
        yield from _row("looks like", f"there, {pattern.text}" if is_of_part else pattern.text)
        if not is_diagnosed or pattern.kind not in OF_PRECISION:
            yield from _row("try", pattern.advice)
    if any(entry.verdict == "error" and entry.metric in METRICS for entry in bad):
        yield from _row("try", f"judge it by a metric that it has: tol={{{output.name!r}: Tolerance(…)}}")


def _parts(output: OutputRecord) -> Iterator[str]:
    """Every part of a divided output by the limit that failed; the worst one stands in the headline."""
    failed = {entry.metric for entry in _bad(output)}
    shown = [part for part in output.parts if part.metric in failed and not str(part.part).startswith(WHOLE)]
    for index, part in enumerate(shown[:_IN_FULL]):
        text = part.note if part.verdict == "not_measured" else sentence(replace(part, part=None))
        yield from _row("" if index else "parts", f"{part.part}: {text}")


def _bad(output: OutputRecord) -> list[JudgedRecord]:
    """The limits that aren't kept; NaN and infinity come before the metrics that they spoil."""
    bad = [entry for entry in output.judged if is_bad(entry.verdict)]
    return sorted(bad, key=lambda entry: entry.metric != "nonfinite")


def _headline(measurement: Measurement, output: OutputRecord) -> str:
    first = next((sentence(entry) for entry in (*_bad(output), *output.judged)), "")
    what = f"{measurement.dtype}[{', '.join(map(str, measurement.shape))}]"
    cases = f", {measurement.cases} inputs" if measurement.cases > 1 else ""
    why = measurement.uncompared if output.verdict == "not_measured" else ""
    return f"output {output.name!r} ({what}{cases}): {why or first or '; '.join(measurement.notes)}"


def _others(measurement: Measurement, shown: set[str]) -> str:
    if measurement.finite_max is not None:
        return f"max {measurement.finite_max:.4g} over the elements that are finite on both sides"
    parts = []
    if measurement.kind != "float":
        parts.append(f"{measurement.mismatches:,} of {plural(measurement.size, 'element')} unequal")
        shown = shown | {name for name, metric in METRICS.items() if measurement.kind not in metric.kinds}
    for metric, score in measurement.scores.items():
        if metric not in shown and score.value is not None and not score.note:
            parts.append(f"{metric} {score.value:.4g}")
    return ", ".join(parts)


def _share(examination: Examination | None) -> str:
    if examination is None or examination.beyond is None:
        return ""
    case = f" of input {examination.case}" if examination.case is not None else ""
    share = _percent(examination.beyond / examination.size)
    return f"{examination.beyond:,} of {plural(examination.size, 'element')}{case} ({share})"


def _typical(measurement: Measurement) -> str:
    half, most = (measurement.histogram.quantile(share) for share in (0.5, 0.99))
    if measurement.kind != "float" or half is None or most is None:
        return ""
    return f"half of all |errors| are at most {half:.3g}, 99 % at most {most:.3g}"


def _percent(share: float) -> str:
    return f"{share:.3g} %" if (share := 100 * share) >= 1e-4 or not share else "under 0.0001 %"


def _nonfinite(measurement: Measurement) -> str:
    counts = measurement.nonfinite
    if not counts.total:
        return ""
    return (
        f"{counts.nan_actual:,} NaN, {counts.inf_actual:,} Inf where the reference has {counts.nan_reference:,} and "
        f"{counts.inf_reference:,}; {counts.different:,} differ"
    )


def _element(element: Element) -> str:
    case = f"input {element.case} " if element.case is not None else ""
    index = f"[{', '.join(map(str, element.index))}]"
    expected, actual = _values(element)
    off = f", off by {element.error:.4g}" if not isinstance(element.actual, (bool, str)) else ""
    return f"{case}{index}: expected {expected}, got {actual}{off}"


def _values(element: Element) -> tuple[str, str]:
    if not isinstance(element.actual, float) or not isinstance(element.expected, float):
        return repr(element.expected), repr(element.actual)
    digits = distinct_digits(element.expected, element.actual, 5, exact=False)
    return f"{element.expected:.{digits}g}", f"{element.actual:.{digits}g}"


def _row(label: str, text: str) -> list[str]:
    return _wrap(text, f"  {label:<{_LABEL}}", " " * (_LABEL + 2)) if text else []


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
