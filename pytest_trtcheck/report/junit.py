"""Values for JUnit XML that a person or a CI dashboard reads, beside the whole record as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_trtcheck.choices import PROPERTY
from pytest_trtcheck.report.text import one_line
from pytest_trtcheck.report.view import decisive, scored

if TYPE_CHECKING:
    from pytest_trtcheck.record import CheckRecord


def properties(record: CheckRecord, index: int = 0) -> list[tuple[str, str]]:
    """`(name, value)` pairs such as `("trtcheck.max_error", "0.0012")`; what is not known is left out.

    Parameters
    ----------
    index
        The number of checks that the same test reported before: the second is named `trtcheck.2.…`.
    """
    prefix = PROPERTY if index == 0 else f"{PROPERTY}.{index + 1}"
    names = ("model", "precision", "backend", "evidence", "compiled_for", "verdict", "code")
    values: dict[str, object] = {name: getattr(record, name) for name in names}
    judgement = decisive(record)
    if judgement is not None and judgement.value is not None:
        values[f"{judgement.metric}_error" if judgement.metric != "snr_db" else "snr_db"] = judgement.value_text
        values["tolerance"] = None if judgement.limit is None else judgement.limit_text
    if record.score:
        values["score_verdict"] = record.score.verdict
    found = scored(record)
    if found:
        values |= {"score": f"{found.name} {found.values}", "score_drop": found.drop, "max_drop": found.limit}
    if record.latency:
        values["gpu"] = record.latency.gpu
        values["latency_verdict"] = record.latency.verdict
        for name in ("p50_ms", "p90_ms", "p95_ms", "p99_ms"):
            value: float | None = getattr(record.latency, name)
            values[name] = None if value is None else f"{value:.6g}"
    return [(f"{prefix}.{name}", one_line(str(value))) for name, value in values.items() if value is not None]
