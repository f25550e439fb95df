"""A check against what earlier runs recorded of it (`--trt-baseline`): what tells it, and what decides beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pytest_trtcheck import __version__
from pytest_trtcheck.baselines import errors
from pytest_trtcheck.baselines.files import CheckKey, Place
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
            found["calibration data"] = f"{calibration.samples} samples, sha256 {calibration.sha256[:_SHOWN_SHA]}"
    options = dict(record.build_options or {})
    options |= {"keep_fp32": [*spec.keep_fp32, *(known.fewest or ())], "exclude": list(spec.exclude)}
    options |= {"metric": spec.metric.name, "parts": str(getattr(spec.tol, "parts", "auto"))}
    given = {name: value for name, value in options.items() if value not in (None, [])}
    found["options"] = json.dumps(given, sort_keys=True, default=str)
    return found


def held(settings: Settings, known: Known) -> Known:
    """The errors against those that were recorded: a rise fails though the limits hold.

    Raises
    ------
    ReportError
        The file with them cannot be read.
    """
    parity = known.record.parity
    if settings.baselines is None or parity is None or not parity.outputs:
        return known
    entry = settings.baselines.find(key_of(known))
    now = BaselineRecord("not_measured", "", made_with(known), gpu=gpu_of(known))
    found = errors.judge(entry.errors, known.record, now, updating=settings.update_baselines)
    is_first = settings.update_baselines and entry.errors is None
    told = [] if is_first or found.verdict == "fail" or (found.verdict == "pass" and not found.rises) else [found.text]
    if found.verdict == "fail" and is_bad(parity.verdict):
        told.append(found.text)
    # Its ranges are other ones now, whatever came of it.
    others = [each for each in found.changed if each.startswith("calibration")]
    told += [f"not as in the baseline of {found.recorded}: {each}" for each in others]
    return known.recorded(*told, parity=errors.applied(parity, found), baseline=found)
