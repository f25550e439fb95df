"""Systems side by side: what the same check came to by each of several backends, from the records alone."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import PurePath
from typing import TYPE_CHECKING

from pytest_trtcheck.record import ComparisonRecord, SystemRecord, without_parameter
from pytest_trtcheck.report.text import MISSING, format_number, one_line
from pytest_trtcheck.report.view import decisive, natural, verdict_word

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_trtcheck.record import CheckRecord

HEADERS = ("system", "error", "p50 ms", "p99 ms", "QPS", "MiB", "engine", "build s", "load ms")
"""MiB: of device memory; engine: the size of the serialized engine, in MiB."""


def compared(records: Sequence[CheckRecord]) -> tuple[ComparisonRecord, ...]:
    """A comparison of each check that several backends were to run, in the records' order; by name in each."""
    groups = defaultdict(list)
    for record in records:
        if record.system is not None:
            groups[
                without_parameter(record.nodeid, record.system), record.model, _asked(record), record.machine
            ].append(record)
    return tuple(
        ComparisonRecord(*told, systems=tuple(sorted(map(_row, found), key=lambda row: natural(row.system))))
        for told, found in groups.items()
    )


def _asked(record: CheckRecord) -> str | None:
    """The precision that was asked for, whatever a system computes in instead."""
    return re.sub(r".*\(asked (.*)\)", r"\1", record.precision or "") or None


def _row(record: CheckRecord) -> SystemRecord:
    latency, costs = record.latency, record.costs or {}
    # What was emulated in its place is the error of the precision, and none of the system's.
    stood_in = record.evidence == "emulated" and record.system != record.backend
    judged = None if stood_in else decisive(record)
    is_timed = latency is not None and latency.samples > 0
    return SystemRecord(
        system=record.system or "",
        nodeid=record.nodeid,
        verdict=record.verdict,
        metric=judged.metric if judged else None,
        error=judged.value if judged else None,
        p50_ms=latency.p50_ms if latency and is_timed else None,
        p99_ms=latency.p99_ms if latency and is_timed else None,
        qps=latency.details.qps if latency and is_timed else None,
        memory_mib=costs.get("memory_mib"),
        engine_mib=costs.get("engine_mib"),
        build_s=costs.get("build_s"),
        load_ms=costs.get("load_ms"),
        measured=latency.details.measured if latency and is_timed else None,
        missing=tuple(_missing(record, stood_in=stood_in)),
    )


def _missing(record: CheckRecord, *, stood_in: bool) -> Iterator[str]:
    """What could not be measured of a system, and why; or why its figures do not count."""
    word, latency = verdict_word(record), record.latency
    if record.verdict == "not_measured" and record.parity is None and latency is None:
        yield f"not measured: {record.headline}"
        return
    if record.verdict not in {"pass", "not_measured"}:
        yield f"{word}: {record.headline}" if record.headline else word
    if record.precision != _asked(record):
        yield f"computed in {record.precision}"
    if stood_in:
        built = f"; built for {record.compiled_for}" if record.compiled_for else ""
        yield f"the error is not its own: it was emulated on the CPU{built}"
    elif record.parity is not None and record.parity.verdict == "not_measured":
        yield f"error: {record.parity.reason}"
    if latency is None or not latency.samples:
        why = latency.reason if latency else "it was not reached"
        if latency is not None or record.verdict != "error":
            yield f"latency: {why}"


def cells(row: SystemRecord) -> tuple[str, ...]:
    """A row of the table, a cell for each of `HEADERS`."""
    figures = (row.error, row.p50_ms, row.p99_ms, row.qps, row.memory_mib, row.engine_mib, row.build_s, row.load_ms)
    return (one_line(row.system), *(MISSING if each is None else format_number(float(each)) for each in figures))


def title(comparison: ComparisonRecord) -> str:
    """What a table is headed with."""
    name = PurePath(one_line(comparison.model)).name
    where = f" on {one_line(comparison.machine)}" if comparison.machine else ""
    return f"{name} {comparison.precision or ''}".rstrip() + f", {one_line(comparison.test)}{where}"


def remarks(comparison: ComparisonRecord) -> list[str]:
    """What stands under a table: by system, or by all systems of which the same is to be said."""
    said: dict[str, list[str]] = defaultdict(list)
    clocks = {row.measured for row in comparison.systems} - {None}
    for row in comparison.systems:
        # Times by different clocks stand side by side, and are not the same.
        clock = [f"p50, p99 and QPS are of {row.measured}"] if row.measured and len(clocks) > 1 else []
        for text in (*clock, *row.missing):
            said[one_line(text)].append(one_line(row.system))
    return [f"{', '.join(systems)}: {text}" for text, systems in said.items()]
