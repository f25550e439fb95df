"""Running the check behind a test item, and turning its verdict into the item's outcome."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.errors import TrtCheckError
from pytest_trtcheck.record import PROPERTY, CheckRecord
from pytest_trtcheck.session import session_of

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.job import Request
    from pytest_trtcheck.marked import Marked


def attach(item: pytest.Item, record: CheckRecord) -> None:
    """Let the record ride on the item, so that xdist workers and JUnit carry it."""
    import json

    from pytest_trtcheck.report import junit

    index = sum(name == PROPERTY for name, _ in item.user_properties)
    item.user_properties.append((PROPERTY, record.to_json()))
    item.user_properties.extend(junit.properties(json.loads(record.to_json()), index))


def refuse(item: pytest.Item, error: TrtCheckError) -> None:
    """Fail the item for a marker that cannot be understood."""
    attach(item, CheckRecord(nodeid=item.nodeid, model="", verdict="error", message=str(error)))
    raise error


def folders(item: pytest.Item) -> tuple[Path, ...]:
    """Where relative paths of a test are looked up: beside the test file, then from rootdir."""
    return (item.path.parent, item.config.rootpath)


def run_marked(item: pytest.Function, found: Marked, returned: object) -> None:
    """Check what the markers of `item` ask for, with what the test returned as inputs."""
    from pytest_trtcheck.job import Request

    fixtures: dict[str, Any] = item.funcargs
    given, source = returned, "returned"
    if given is None and fixtures.get("trt_inputs") is not None:
        given, source = fixtures["trt_inputs"], "trt_inputs"
    model = found.parity.model if found.parity.model is not None else fixtures.get("trt_model")
    calibration = found.parity.calibration
    run(
        item,
        Request(
            nodeid=item.nodeid,
            model=model,
            folders=folders(item),
            parity=found.parity,
            judge_parity=found.judge_parity,
            latency=found.latency,
            inputs=given,
            inputs_source=source if given is not None else "generated",
            calibration=calibration if calibration is not None else fixtures.get("trt_calibration"),
            options=fixtures.get("trt_build_options"),
        ),
    )


def run(item: pytest.Item, request: Request) -> CheckRecord:
    """Make the check, attach its record, and fail or skip the item as the verdict says."""
    session = session_of(item.config)
    # A replay watches for itself, and needs no bundle of its own.
    writer = session.bundle_writer(request.nodeid) if request.watch is None else None
    if writer is not None:
        request = replace(request, watch=writer.keep)
    try:
        record = session.workshop.check(request)
        if writer is not None:
            record = writer.finish(record, session.circumstances(record.backend))
    finally:
        if writer is not None:
            writer.close()
    attach(item, record)
    conclude(record, inconclusive=session.get("trt_inconclusive"))
    return record


def conclude(record: CheckRecord, *, inconclusive: str) -> None:
    """Turn a verdict into pytest's outcome: only `pass` passes."""
    message = record.message or record.verdict
    if record.verdict == "pass":
        return
    if record.verdict == "error":
        # Not pytest.fail: a test that expects its check to fail must not pass because its model file is gone.
        raise TrtCheckError(message)
    if record.verdict == "not_measured":
        pytest.skip(f"not measured: {message}")
    if record.verdict == "inconclusive" and inconclusive == "skip":
        pytest.skip(f"inconclusive: {message}")
    pytest.fail(message, pytrace=False)
