"""Recording baselines at the end of a run: those of the tests that were measured, and only what can be trusted."""

from __future__ import annotations

import datetime
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.latency.baselines import files
from pytest_trtcheck.latency.baselines.comparison import MIN_SLOWDOWN, NAME
from pytest_trtcheck.latency.baselines.distribution import Distribution
from pytest_trtcheck.latency.baselines.files import Baseline, GpuKey
from pytest_trtcheck.record import Conditions, is_bad

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from pytest_trtcheck.record import CheckRecord, LatencyDetails, LatencyRecord


@dataclass(frozen=True)
class Updated:
    """What was recorded: the files that changed, how many baselines, and (node id, reason) of what was left out."""

    files: tuple[Path, ...]
    recorded: int
    left_out: tuple[tuple[str, str], ...]


def update(
    directory: str | os.PathLike[str], records: Iterable[CheckRecord], today: datetime.date | None = None
) -> Updated:
    """Record the latencies of a run as the baselines of its tests; those of other tests stay as they are.

    Parameters
    ----------
    today
        The day to note; None: this one (UTC).

    Raises
    ------
    ReportError
        A file that is there is no file of baselines, or cannot be written.
    """
    day = (today or datetime.datetime.now(datetime.timezone.utc).date()).isoformat()
    root = Path(directory)
    new: dict[tuple[GpuKey, Path], files.Tests] = defaultdict(lambda: defaultdict(dict))
    left_out: list[tuple[str, str]] = []
    asked: dict[str, set[str]] = defaultdict(set)
    for record in records:
        latency = record.latency
        if latency is None:
            continue
        nodeid, precision = record.nodeid, str(record.precision)
        asked[nodeid].add(precision)
        reason = _why_not(record, latency)
        if reason is not None:
            left_out.append((nodeid, reason))
            continue
        assert latency.details.conditions is not None
        gpu = GpuKey.of(latency.details.conditions)
        # Of a test that was run again, the last run counts.
        new[gpu, files.path_of(nodeid)][nodeid][precision] = _baseline(record, latency.details, day).to_json()
    # Every file is read before one is written: a damaged one leaves all of them as they were.
    merged = {key: _merged(root / key[0].folder / key[1], key[0], tests, asked) for key, tests in new.items()}
    written = []
    for (gpu, place), tests in sorted(merged.items()):
        path = root / gpu.folder / place
        files.write(path, gpu, tests)
        written.append(path)
    return Updated(tuple(written), sum(len(each) for tests in new.values() for each in tests.values()), tuple(left_out))


def _why_not(record: CheckRecord, latency: LatencyRecord) -> str | None:
    """Why a latency is no baseline; None where it is one."""
    details = latency.details
    if not latency.samples or details.distribution is None or details.conditions is None:
        return f"latency was not measured: {latency.reason or record.message or 'no reason was recorded'}"
    return _not_passed(record, latency) or _not_exact(details)


def _not_passed(record: CheckRecord, latency: LatencyRecord) -> str | None:
    """What failed besides the baseline itself: the latency of an engine that computes wrongly is no baseline."""
    for name, part in (("parity", record.parity), ("score", record.score)):
        if part and is_bad(part.verdict):
            return f"{name}: {part.verdict}"
    if record.verdict == "error":
        return "the check ended in an error"
    bad = [
        entry.name or entry.quantile or ""
        for entry in latency.budgets
        if entry.name != NAME and entry.verdict != "pass"
    ]
    return f"not within its budget: {', '.join(bad)}" if bad else None


def _not_exact(details: LatencyDetails) -> str | None:
    if details.disturbances:
        return f"the measurement was disturbed: {'; '.join(details.disturbances)}"
    apart = Distribution.from_json(details.distribution).width
    if apart > MIN_SLOWDOWN:
        known = "not known" if apart == float("inf") else f"known to within {apart:.1%}"
        return f"the median is {known}, and {MIN_SLOWDOWN:.0%} is needed: give it more max_seconds"
    return None


def _baseline(record: CheckRecord, details: LatencyDetails, day: str) -> Baseline:
    told = details.conditions or Conditions()
    return Baseline(
        model=Path(record.model).name,
        model_sha256=record.model_sha256,
        input_shapes=told.input_shapes or {},
        measured=details.measured or "",
        cuda_graph=bool(details.cuda_graph),
        recorded=day,
        tensorrt=told.tensorrt or "",
        driver=told.driver,
        distribution=Distribution.from_json(details.distribution),
        sm_mhz=told.sm_mhz,
        power_limit_w=told.power_limit_w,
        power_mode=told.power_mode,
    )


def _merged(path: Path, gpu: GpuKey, new: files.Tests, asked: Mapping[str, set[str]]) -> files.Tests:
    if not path.exists():
        return {nodeid: dict(entries) for nodeid, entries in new.items()}
    owner, kept = files.load(path)
    if owner != gpu:
        raise ReportError(
            f"{path} holds the baselines of {owner.name} (compute capability {owner.compute_capability}), not of "
            f"{gpu.name}",
            "move it into a directory of its own",
        )
    for nodeid, entries in new.items():
        # A precision that the test does not have any more goes; one that was measured and left out stays.
        old = {name: entry for name, entry in kept.get(nodeid, {}).items() if name in asked[nodeid]}
        kept[nodeid] = {**old, **entries}
    return kept
