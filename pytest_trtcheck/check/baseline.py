"""A check against what earlier runs recorded of it (`--trt-baseline`): what tells it, and what decides beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pytest_trtcheck import __version__
from pytest_trtcheck.baselines import errors, scores
from pytest_trtcheck.baselines.files import CheckKey, Place
from pytest_trtcheck.errors import plural
from pytest_trtcheck.latency.distribution import RECORD_AGAIN
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.record import BaselineRecord, Conditions, is_bad

if TYPE_CHECKING:
    from pytest_trtcheck.check.request import Known, Settings
    from pytest_trtcheck.record import GpuRecord

_SHOWN_SHA = 16


def gpu_of(known: Known) -> GpuRecord | None:
    """The GPU of this machine that runs it."""
    gpu = known.running.gpu
    return None if gpu is None else Conditions(**gpu.conditions()).gpu_record


def key_of(known: Known) -> CheckKey:
    """What tells its baselines from those of others."""
    system = known.running
    place = Place.of(gpu_of(known), system.evidence)
    return CheckKey(place, known.request.nodeid, known.shown_precision, system.name, system.evidence)


def made_with(known: Known) -> dict[str, str]:
    """What decides beside the model, its inputs and the reference, by what it is called."""
    record, spec, system = known.record, known.request.parity, known.running
    found = {**system.versions(), "onnxruntime": ort.version(), "pytest-trtcheck": __version__}
    if record.reference:
        found["reference"] = record.reference
    if system.gpu is not None and system.gpu.driver:
        found["driver"] = system.gpu.driver
    if known.existing is not None:
        found["engine"] = f"sha256 {known.existing.file.sha256[:_SHOWN_SHA]}"
    if calibration := record.calibration:
        percentile = f" {calibration.percentile:g}" if calibration.percentile is not None else ""
        found["calibration method"] = f"{calibration.method}{percentile}"
        if calibration.sha256:
            found["calibration data"] = (
                f"{plural(calibration.samples, 'sample')}, sha256 {calibration.sha256[:_SHOWN_SHA]}"
            )
    options = dict(record.build_options or {})
    options |= {"keep_fp32": [*spec.keep_fp32, *(known.fewest or ())], "exclude": list(spec.exclude)}
    options |= {"metric": spec.metric.name, "parts": str(getattr(spec.tol, "parts", "auto"))}
    given = {name: value for name, value in options.items() if value not in (None, [])}
    found["options"] = json.dumps(given, sort_keys=True, default=str)
    return found


def held(settings: Settings, known: Known) -> Known:
    """Errors and score against those that were recorded: a rise fails though the limits hold.

    Raises
    ------
    ReportError
        The file with them cannot be read.
    """
    record = known.record
    compares, scored = bool(record.parity and record.parity.outputs), record.score is not None and record.score.samples
    if settings.baselines is None or not (compares or scored):
        return known
    entry = settings.baselines.find(key_of(known))
    now = BaselineRecord("not_measured", "", made_with(known), gpu=gpu_of(known))
    updating, notes = settings.update_baselines, []
    if record.parity is not None and compares:
        found = errors.judge(entry.errors, record, now, updating=updating)
        notes += _notes(found, is_first=updating and entry.errors is None, was_bad=is_bad(record.parity.verdict))
        known = known.recorded(parity=errors.applied(record.parity, found), baseline=found)
    spec = known.request.parity.score
    if record.score is not None and scored and spec is not None:
        found = scores.judge(entry.score, record, now, spec, updating=updating)
        notes += _notes(found, is_first=updating and entry.score is None, was_bad=is_bad(record.score.verdict))
        known = known.recorded(score=scores.applied(record.score, found))
    return known.recorded(*dict.fromkeys(notes))


def _notes(found: BaselineRecord, *, is_first: bool, was_bad: bool) -> list[str]:
    """What of it no verdict says."""
    is_said = found.verdict == "fail" and not was_bad
    is_quiet = found.verdict == "pass" and not found.text.count("accepted") and RECORD_AGAIN not in found.text
    notes = [] if is_first or is_said or is_quiet else [found.text]
    # Its ranges are other ones now, whatever came of it.
    others = [each for each in found.changed if each.startswith("calibration")]
    return notes + [f"not as in the baseline of {found.recorded}: {each}" for each in others]
