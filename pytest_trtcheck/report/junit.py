"""Values for JUnit XML that a person or a CI dashboard reads, beside the whole record as JSON."""

from __future__ import annotations

from pytest_trtcheck.record import PROPERTY, number
from pytest_trtcheck.report.text import one_line
from pytest_trtcheck.report.view import Record, decisive


def properties(record: Record, index: int = 0) -> list[tuple[str, str]]:
    """`(name, value)` pairs such as `("trtcheck.max_error", "0.0012")`; what is not known is left out.

    Parameters
    ----------
    record
        A check record, as `CheckRecord.to_json` writes it.
    index
        The number of checks that the same test reported before: the second is named `trtcheck.2.…`.
    """
    prefix = PROPERTY if index == 0 else f"{PROPERTY}.{index + 1}"
    values: dict[str, object] = {
        key: record.get(key) for key in ("model", "precision", "backend", "evidence", "compiled_for", "verdict")
    }
    judgement = decisive(record)
    if judgement is not None and judgement.value is not None:
        values[f"{judgement.metric}_error" if judgement.metric != "snr_db" else "snr_db"] = judgement.value_text
        values["tolerance"] = None if judgement.limit is None else judgement.limit_text
    latency = record.get("latency")
    if latency:
        values["gpu"] = latency.get("gpu")
        values["latency_verdict"] = latency["verdict"]
        for name in ("p50_ms", "p90_ms", "p95_ms", "p99_ms"):
            if latency.get(name) is not None:
                values[name] = f"{number(latency[name]):.6g}"
    return [(f"{prefix}.{name}", one_line(str(value))) for name, value in values.items() if value is not None]
