"""Running the check behind a test item, and turning its verdict into the item's outcome."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_trtcheck.errors import ArgumentError, CheckError, CheckFailed
from pytest_trtcheck.plugin import options as settings
from pytest_trtcheck.plugin.items import RUN
from pytest_trtcheck.plugin.session import session_of
from pytest_trtcheck.record import PROPERTY, CheckRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_trtcheck.check.request import Request
    from pytest_trtcheck.plugin.marked import Marked


BODY: pytest.StashKey[Body] = pytest.StashKey()


class Body:
    """The code of a marked test, wrapped to keep what it returns.

    Parameters
    ----------
    test
        The test function, or the coroutine function that a plugin of the user's runs.
    """

    def __init__(self, test: Callable[..., Any]) -> None:
        self.checked = False
        self._returned: list[object] = []

        @functools.wraps(test)
        def called(*args: object, **kwargs: object) -> None:
            self._returned.append(test(*args, **kwargs))

        @functools.wraps(test)
        async def awaited(*args: object, **kwargs: object) -> None:
            self._returned.append(await test(*args, **kwargs))

        self.wrapped: Callable[..., Any] = awaited if inspect.iscoroutinefunction(test) else called

    def returned(self, item: pytest.Item) -> object:
        """What the test returned.

        Raises
        ------
        ArgumentError
            It was never run, or gave something that is still to be run.
        """
        if not self._returned:
            raise not_run(item)
        value = self._returned[-1]
        if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            if hasattr(value, "close"):
                value.close()
            raise ArgumentError(
                f"{item.name} returned a {type(value).__name__}, which nothing has run: its inputs are not known",
                "return the inputs themselves; mark an async def for the plugin that runs it (pytest-asyncio, anyio)",
            )
        return value


def not_run(item: pytest.Item) -> ArgumentError:
    """The error for a test that ended well while nothing of it was checked."""
    return ArgumentError(
        f"{item.name} is marked and was not checked: what ran it, a {type(item).__name__}, never called the function",
        "call the fixture trt_check in it instead",
    )


def attach(item: pytest.Item, record: CheckRecord) -> None:
    """Let the record ride on the item, so that xdist workers and JUnit carry it."""
    record = replace(record, runs=item.stash.get(RUN, 1))
    index = sum(name == PROPERTY for name, _ in item.user_properties)
    item.user_properties.append((PROPERTY, record.to_json()))
    for report in settings.reports(item.config):
        if report.of_tests:
            item.user_properties.extend(report.writer.properties(record, index))


def refuse(item: pytest.Item, error: CheckError) -> NoReturn:
    """Fail the item for a marker that cannot be understood or followed."""
    attach(item, CheckRecord(nodeid=item.nodeid, model="", verdict="error", message=str(error)))
    raise error


def folders(item: pytest.Item) -> tuple[Path, ...]:
    """Where relative paths of a test are looked up: beside the test file, then from rootdir."""
    return (item.path.parent, item.config.rootpath)


def run_marked(item: pytest.Function, found: Marked) -> None:
    """Check what the markers of `item` ask for, with what the test returned as inputs."""
    from pytest_trtcheck.check.request import Request

    fixtures: dict[str, Any] = item.funcargs
    body = item.stash.get(BODY, None)
    try:
        if body is None or "trt_model" not in fixtures:
            raise ArgumentError(
                f"{item.name}: a trt marker was added while the test was running",
                "add it while tests are collected: in pytest_collection_modifyitems or before",
            )
        body.checked = True
        given = body.returned(item)
    except CheckError as error:
        refuse(item, error)
    found = found.selected(item)
    source = "returned"
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
        # No CheckFailed: a test that expects its check to fail must not pass because its model file is gone.
        raise CheckError(message)
    if record.verdict == "not_measured":
        pytest.skip(f"not measured: {message}")
    if record.verdict == "inconclusive" and inconclusive == "skip":
        pytest.skip(f"inconclusive: {message}")
    raise CheckFailed(message)


def is_expected(item: pytest.Item, error: BaseException) -> bool:
    """Whether an xfail of the item may hide `error`: that a check failed, or the very error that its `raises` names."""
    if isinstance(error, CheckFailed):
        return True
    for mark in item.iter_markers("xfail"):
        raises = mark.kwargs.get("raises")
        named = getattr(raises, "expected_exceptions", raises)
        for each in named if isinstance(named, tuple) else (named,):
            if isinstance(each, type) and issubclass(each, CheckError) and isinstance(error, each):
                return True
    return False
