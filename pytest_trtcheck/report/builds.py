"""Builds of one model side by side: what the same test came to with other build options."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from pytest_trtcheck.cache import format_bytes
from pytest_trtcheck.report.text import MISSING, format_number, one_line, shorten_middle
from pytest_trtcheck.report.view import decisive, verdict_word

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_trtcheck.record import CheckRecord

HEADERS = ("build options", "worst error", "p50", "memory", "engine", "built in", "verdict")
_LONGEST_OPTIONS = 48


@dataclass(frozen=True)
class Comparison:
    """The builds of one test, model and precision; each row has a cell for each of `HEADERS`."""

    title: str
    rows: tuple[tuple[str, ...], ...]


def side_by_side(records: Sequence[CheckRecord]) -> Iterator[Comparison]:
    """A comparison of each test that was made with more than one set of build options, in the records' order."""
    groups = defaultdict(list)
    for record in records:
        groups[record.nodeid.partition("[")[0], record.model, record.precision].append(record)
    for (nodeid, model, precision), found in groups.items():
        told = Counter(map(options, found))
        if len(told) > 1:
            title = f"{PurePath(one_line(model)).name} {precision or ''}".rstrip() + f", {nodeid}"
            yield Comparison(title, tuple(_row(record, is_alone=told[options(record)] == 1) for record in found))


def options(record: CheckRecord) -> str:
    """The build options of a check that are not the default, in words."""
    given = record.build_options or {}
    words = [name if value is True else f"{name}={_value(value)}" for name, value in given.items()]
    return shorten_middle(one_line(", ".join(words)) or "default", _LONGEST_OPTIONS)


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _row(record: CheckRecord, *, is_alone: bool) -> tuple[str, ...]:
    engine, latency, judged = record.engine, record.latency, decisive(record)
    # Checks that differ in something else as well (a batch, a size) are told apart by the parameters of their test.
    name = options(record) if is_alone else f"{options(record)} [{record.nodeid.partition('[')[2]}"
    # What was emulated is the error of the precision, the same whatever was built.
    ran = record.evidence == "engine"
    return (
        name,
        judged.value_text if judged and ran else MISSING,
        f"{format_number(latency.p50_ms)} ms" if latency and latency.p50_ms else MISSING,
        format_bytes(engine.device_memory_bytes) if engine and engine.device_memory_bytes else MISSING,
        format_bytes(engine.bytes) if engine else MISSING,
        f"{format_number(engine.build_s)} s" if engine else MISSING,
        verdict_word(record),
    )
