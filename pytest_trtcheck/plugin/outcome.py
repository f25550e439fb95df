"""A verdict becomes the outcome of its test, and the record travels with the test's reports."""

from __future__ import annotations

import functools
import os
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest

from pytest_trtcheck.choices import BACKEND, GPU, PROPERTY, quantized_part
from pytest_trtcheck.errors import ArgumentError, CheckError, CheckFailed, alike, first_line, kind_of, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from _pytest._io import TerminalWriter

    from pytest_trtcheck.check.request import Request
    from pytest_trtcheck.errors import Code
    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import ParitySpec

RUN: pytest.StashKey[int] = pytest.StashKey()
"""Which run of its test this is, from 1 on: pytest-rerunfailures and flaky run a test again."""
_THREADS: pytest.StashKey[_Threads] = pytest.StashKey()
LATE: pytest.StashKey[list[str]] = pytest.StashKey()
"""What failed in threads of a test when that had ended, and nothing could fail it any more: for the end of the run."""
_NO_GPU: pytest.StashKey[bool] = pytest.StashKey()
"""Whether no GPU is known to have run a check that has to be run by one."""
_EARLY: pytest.StashKey[int | None] = pytest.StashKey()
"""Where among the properties of a test stands the record that says it never came to its check."""
SEARCH_FOLDER = "trtcheck_inputs"
"""Where, beside the test, inputs are kept that a search found."""
RUNS = f"{PROPERTY}.runs"
"""The property that says of a test which was run again how often it ran."""
_MISSPELLED = 0.88
"""How alike (`difflib`) a fixture is called to one of ours that was meant: `trt_input`, `trt_build_opts`."""


@dataclass
class _Threads:
    """What our fixtures do in threads of a test's own, which pytest does not hear of.

    Parameters
    ----------
    own
        The thread that the test runs in.
    """

    own: int
    unheard: list[BaseException] = field(default_factory=list)
    at_work: list[int] = field(default_factory=list)
    is_over: bool = False


def begin_run(item: pytest.Item) -> None:
    """Count the runs of a test; what an earlier run reported is not what this one will."""
    run = item.stash[RUN] = item.stash.get(RUN, 0) + 1
    item.stash[_THREADS], item.stash[_NO_GPU] = _Threads(threading.get_ident()), False
    item.stash[_EARLY] = None
    if run > 1 and any(is_our_property(name) for name, _ in item.user_properties):
        item.user_properties[:] = [each for each in item.user_properties if not is_our_property(each[0])]
        item.user_properties.append((RUNS, str(run)))


def is_our_property(name: object) -> bool:
    """Whether a user property of a test was put there by a check."""
    return name == PROPERTY or str(name).startswith(f"{PROPERTY}.")


def attach(item: pytest.Item, record: CheckRecord) -> None:
    """Let the record ride on the item, so that xdist workers and JUnit carry it."""
    from pytest_trtcheck.plugin import options, summary

    # Mostly done long ago; a test that nothing told of when it was collected may still come to a check.
    summary.collect_from(item)
    if (early := item.stash.get(_EARLY, None)) is not None:
        # It was a subtest that failed, and the test went on to its check.
        later = [each for each in item.user_properties[early:] if not is_our_property(each[0])]
        item.user_properties[early:], item.stash[_EARLY] = later, None
    record = replace(record, runs=item.stash[RUN])
    index = sum(name == PROPERTY for name, _ in item.user_properties)
    item.user_properties.append((PROPERTY, record.to_json()))
    for report in options.reports(item.config):
        if report.of_tests:
            item.user_properties.extend(report.writer.properties(record, index))


def refuse(item: pytest.Item, error: CheckError) -> NoReturn:
    """Fail the item for a marker that cannot be understood or followed."""
    from pytest_trtcheck.record import CheckRecord

    record = CheckRecord(item.nodeid, "", "error", gpu_ran=False, message=error.text, code=error.code)
    attach(item, record)
    raise error


def ended_early(item: pytest.Item, report: pytest.TestReport) -> None:
    """Attach the record of a check that never came to one: a fixture or the test's own code failed before it."""
    from pytest_trtcheck.plugin import marks
    from pytest_trtcheck.plugin.items import marked
    from pytest_trtcheck.record import CheckRecord

    found = marked(item) if marks.is_marked(item) else None
    spec = found.selected(item) if found else None
    named = spec.model if spec else str(item.path) if getattr(item, "is_check", False) else None
    early = len(item.user_properties)
    attach(
        item,
        CheckRecord(
            nodeid=item.nodeid,
            model=str(named) if isinstance(named, (str, os.PathLike)) else "",
            verdict="error",
            precision=spec.precision[0] if spec and spec.engine is None else None,
            gpu_ran=False,
            message=f"failed in its {report.when} before it was checked: {reason(report.longrepr)}",
            code="user-code-failed",
        ),
    )
    item.stash[_EARLY] = early


def tell(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Show our errors as their own text in the report of what did not pass, and let no xfail hide a check not made.

    A check that the test never came to gets its record.
    """
    assert call.excinfo is not None
    error = call.excinfo.value
    if _THREADS in item.stash:
        item.stash[_THREADS].unheard.clear()  # the test has failed, most likely by the same: once is enough
    if not isinstance(error, (CheckError, CheckFailed)):
        if hasattr(report, "wasxfail") and hides_a_gap(item, call):
            report.outcome, report.longrepr = "failed", item.repr_failure(call.excinfo)
            del report.wasxfail
        if report.failed and report.when != "teardown" and checks(item) and not has_record(item):
            ended_early(item, report)
            report.user_properties = list(item.user_properties)
        return
    if report.outcome == "skipped" and hasattr(report, "wasxfail") and not is_expected(item, error):
        report.outcome = "failed"
        del report.wasxfail
    if report.outcome == "failed":
        # A traceback of our internals helps nobody; what Hypothesis notes is the example that failed.
        report.longrepr = visible("\n\n".join([str(error), *getattr(error, "__notes__", ())]))
        setattr(report, LOCATION, location(item, call.excinfo))


def hides_a_gap(item: pytest.Item, call: pytest.CallInfo[None]) -> bool:
    """Whether an xfail hides that a test's own code failed before anything was checked.

    An assertion beside `trt_check` may be what was expected to fail, and so is what `raises=` names.
    """
    from pytest_trtcheck.plugin import marks

    error = call.excinfo.value if call.excinfo else None
    if error is None or isinstance(error, pytest.xfail.Exception) or not checks(item) or has_record(item):
        return False
    by_hand = not marks.is_marked(item) and not getattr(item, "is_check", False)
    if by_hand and isinstance(error, AssertionError):
        return False
    return not any(mark.kwargs.get("raises") for mark in item.iter_markers("xfail"))


def has_record(item: pytest.Item) -> bool:
    """Whether a check of this run of the test came to a record."""
    return any(name == PROPERTY for name, _ in item.user_properties)


def checks(item: pytest.Item) -> bool:
    """Whether a test is to check something: a marked one, a model, a bundle, or one with `trt_check`."""
    from pytest_trtcheck.plugin import marks

    uses = "trt_check" in getattr(item, "fixturenames", ())
    return uses or marks.is_marked(item) or bool(getattr(item, "is_check", False))


def reason(said: object) -> str:
    """The first line of why a test failed or was skipped."""
    if isinstance(said, tuple):
        return first_line(str(said[2]).removeprefix("Skipped: "))
    crash = getattr(said, "reprcrash", None)
    return first_line(str(crash.message if crash else said))


_FIXTURES = "pytest_trtcheck.plugin.fixtures"
LOCATION = "trtcheck_location"
"""The attribute of a report that says where in the user's files our error is to be looked for: path and line."""


class Told:
    """Our error in a report, as its own text in place of a traceback: in lines that fit the terminal.

    Of what pytest's own representations have, the one that `--tb=line`, JUnit's file and other plugins ask for.
    """

    @dataclass(frozen=True)
    class Crash:
        """Where it was."""

        path: str
        lineno: int
        message: str

        def __str__(self) -> str:
            return f"{self.path}:{self.lineno}: {self.message}"

    def __init__(self, text: str, path: str, line: int, *, is_line: bool) -> None:
        self.text = text
        self.reprcrash = Told.Crash(path, line, first_line(text))
        self._is_line = is_line

    def __str__(self) -> str:
        return self.text

    def toterminal(self, tw: TerminalWriter) -> None:
        """Write it; under `--tb=line` pytest writes where it was, and what, by itself."""
        if self._is_line:
            return
        from pytest_trtcheck.report.text import folded

        tw.line(folded(self.text, tw.fullwidth))


def location(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> tuple[str, int]:
    """The user's own line that an error of ours comes from: the last one in the test's file, else where it begins."""
    path, line, _ = item.reportinfo()
    own = [entry.lineno + 1 for entry in excinfo.traceback if str(entry.path) == str(item.path)]
    return str(path), own[-1] if own else (line or 0) + 1


def folders(item: pytest.Item) -> tuple[Path, ...]:
    """Where relative paths of a test are looked up: beside the test file, then from rootdir."""
    return (item.path.parent, item.config.rootpath)


def parameters(item: pytest.Item) -> dict[str, Any]:
    """What a test is parametrized with."""
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def request_for(
    item: pytest.Item,
    model: object,
    parity: ParitySpec,
    fixture: Callable[[str], Any],
    *,
    inputs: object = None,
    inputs_source: str = "given",
    **more: Any,
) -> Request:
    """What a test asks to be checked, with what the fixtures that users override say."""
    from pytest_trtcheck.plugin import options
    from pytest_trtcheck.plugin.session import session_of

    with suppress(CheckError):  # It is said where the GPU is asked for.
        session_of(item.config).start_gpu(parity.backend)
    from pytest_trtcheck.check.request import Request
    from pytest_trtcheck.spec import BuildOptions

    built = more.get("options") or fixture("trt_build_options")
    if built is not None and not isinstance(built, BuildOptions):
        raise ArgumentError(
            f"trt_build_options: expected a BuildOptions, got {kind_of(built)}",
            "return BuildOptions(…), or None for the defaults",
        )
    not_given = {
        "trt_model": model is None,
        "trt_inputs": inputs is None and inputs_source == "trt_inputs",
        "trt_calibration": parity.calibration is None and any(map(quantized_part, parity.precision)),
        "trt_build_options": built is None,
    }
    _refuse_unused(item, [name for name, is_not in not_given.items() if is_not])
    if not_given["trt_inputs"] and _is_overridden(item, "trt_inputs"):
        more["why_generated"] = "the fixture trt_inputs gives None"
    compared = parity.backends or options.value(item.config, "trt_backend")
    if parity.backend is None and parity.engine is None and len(compared) > 1:
        if BACKEND not in parameters(item):
            raise ArgumentError(
                f"{item.name}: {', '.join(compared)} are to be compared, and the test came to its check too late",
                "mark it while tests are collected, and name trt_check or trt_build among its arguments; or name one "
                "backend=",
                code="marker-misplaced",
            )
        parity = replace(parity, backend=parameters(item)[BACKEND], backends=compared)
    gpus = options.value(item.config, "trt_gpu")
    if len(gpus) > 1 and parity.engine is None and GPU not in parameters(item):
        raise ArgumentError(
            f"{item.name}: is to be built for {', '.join(gpus)}, and the test came to its check too late",
            "mark it while tests are collected, and name trt_check or trt_build among its arguments; or name one GPU",
            code="marker-misplaced",
        )
    return Request(
        nodeid=item.nodeid,
        for_gpu=parameters(item).get(GPU),
        model=model,
        folders=folders(item),
        parity=parity,
        inputs=inputs,
        inputs_source=inputs_source if inputs is not None else "generated",
        search_folder=item.path.parent / SEARCH_FOLDER,
        calibration=parity.calibration if parity.calibration is not None else fixture("trt_calibration"),
        **{**more, "options": built},
    )


def _refuse_unused(item: pytest.Item, names: Iterable[str]) -> None:
    """See that nothing which is called like a fixture of ours, or nearly, was meant to override it and does not.

    Raises
    ------
    ArgumentError
        Something was, where the fixture's own value would be taken.
    """
    from pytest_trtcheck.plugin import marks

    module = item.getparent(pytest.Module)
    if module is None:
        return
    manager = item.session._fixturemanager
    for name in names:
        if _is_overridden(item, name):
            continue
        for place in (getattr(item, "cls", None), module.obj, *marks.conftests(module)):
            if name in dir(place) and not marks.is_fixture(plain := getattr(place, name)) and plain is not None:
                raise ArgumentError(
                    f"{name} of {place.__name__} is {kind_of(plain)} and no fixture: the check would not use it",
                    "write @pytest.fixture above it; or give it another name, if it is for something else",
                    code="argument-conflict",
                )
            for other in dir(place):
                if _is_nearly(other, name) and manager.getfixturedefs(other, item) and not _is_used(item, other):
                    raise ArgumentError(
                        f"the fixture {other} of {place.__name__} is used by no test, and nothing else gives {name}",
                        f"call it {name}; or give it another name, if it is for something else",
                        code="argument-conflict",
                    )


def _is_overridden(item: pytest.Item, name: str) -> bool:
    """Whether a fixture of the user's stands in the place of ours."""
    found = item.session._fixturemanager.getfixturedefs(name, item)
    return found is not None and len(found) > 0 and found[-1].func.__module__ != _FIXTURES


def _is_nearly(name: str, ours: str) -> bool:
    """Whether a fixture is called as one of ours but for a letter or two; `trt_inputs_b` is another one."""
    if not name.lower().startswith("trt") or name.startswith(ours):
        return False
    return bool(alike(name.replace("_", ""), {ours.replace("_", ""): ours}, 1, _MISSPELLED))


def _is_used(item: pytest.Item, fixture: str) -> bool:
    """Whether any test asks for a fixture: then it is one of its own."""
    from pytest_trtcheck.plugin import marks

    tests = (item, *item.session.stash.get(marks.COLLECTED, ()))
    return any(fixture in getattr(each, "fixturenames", ()) for each in tests)


def run(item: pytest.Item, request: Request, *, ends: str = "") -> CheckRecord:
    """Make the check, attach its record, and fail or skip the item as the verdict says.

    `ends` is what is to be said where that ends a test which might have gone on.
    """
    from pytest_trtcheck.plugin.session import session_of

    record = made(item, request)
    attach(item, record)
    if session_of(item.config).get("trt_require_gpu") and record.gpu_ran is not True:
        item.stash[_NO_GPU] = True
    conclude(record, inconclusive=session_of(item.config).get("trt_inconclusive"), ends=ends)
    return record


@contextmanager
def overheard(item: pytest.Item) -> Iterator[None]:
    """Keep what ends a check, or skips it, in a thread of the test's own: `raise_unheard` raises it again."""
    threads, here = item.stash[_THREADS], threading.get_ident()
    if here == threads.own:
        yield
        return
    threads.at_work.append(here)
    try:
        yield
    except (Exception, pytest.skip.Exception) as error:
        if not threads.is_over:
            threads.unheard.append(error)
        elif isinstance(error, Exception):
            told = f"{item.nodeid}: failed in a thread of its own, after it had ended: {first_line(error)}"
            item.config.stash.setdefault(LATE, []).append(told)
        raise
    finally:
        threads.at_work.remove(here)


def raise_unheard(item: pytest.Item) -> None:
    """Fail or skip a test that passed, and in a thread of which a check did so: nobody hears what is raised there."""
    threads = item.stash.get(_THREADS, None)
    found = [threads.unheard.pop(0) for _ in list(threads.unheard)] if threads else []
    for error in sorted(found, key=lambda each: isinstance(each, pytest.skip.Exception))[:1]:
        raise error


def end_run(item: pytest.Item) -> None:
    """Once its fixtures have ended as well, see that no check of a test goes on: nobody would hear how it ends."""
    threads = item.stash[_THREADS]
    threads.is_over = True
    why: str | None = "how it ends, nobody hears" if threads.at_work else None
    try:
        raise_unheard(item)
    except (CheckError, CheckFailed):
        raise
    except Exception as error:  # of a fixture that had ended, most likely
        why = first_line(error)
    if why is not None:
        raise ArgumentError(
            f"{item.name}: ended while a thread of its own was still at a check: {why}",
            "wait for it in the test: thread.join(), future.result()",
            code="marker-misplaced",
        )


def made(item: pytest.Item, request: Request) -> CheckRecord:
    """The record of the check, with the bundle that it writes where it fails."""
    from pytest_trtcheck.plugin import running_clocks
    from pytest_trtcheck.plugin.session import session_of

    session = session_of(item.config)
    request = replace(request, cut_off=functools.partial(attach, item))
    # A replay watches for itself, and needs no bundle of its own.
    writer = session.bundle_writer(request.nodeid) if request.watch is None else None
    with running_clocks():
        if writer is None:
            return session.checker_for(request.for_gpu).check(request)
        try:
            record = session.checker_for(request.for_gpu).check(replace(request, watch=writer.keep))
            return writer.finish(record, session.circumstances(record.backend))
        finally:
            writer.close()


def conclude(record: CheckRecord, *, inconclusive: str, ends: str = "") -> None:
    """Turn a verdict into pytest's outcome: only `pass` passes."""
    message = visible(record.message or record.verdict)
    if record.verdict == "pass":
        return
    if record.verdict == "error":
        # No CheckFailed: a test that expects its check to fail must not pass because its model file is gone.
        raise CheckError(message, code=cast("Code | None", record.code))
    if record.verdict == "not_measured":
        pytest.skip(f"not measured: {message}{ends}")
    if record.verdict == "inconclusive" and inconclusive == "skip":
        pytest.skip(f"inconclusive: {message}{ends}")
    raise CheckFailed(message, code=cast("Code | None", record.code))


def is_expected(item: pytest.Item, error: BaseException) -> bool:
    """Whether an xfail of the item may hide `error`: that a check failed, or the very error that its `raises` names.

    That no GPU ran what has to be run by one is no failure that anybody expects.
    """
    if isinstance(error, CheckFailed):
        return error.code != "gpu-required" and not item.stash.get(_NO_GPU, False)
    for mark in item.iter_markers("xfail"):
        raises = mark.kwargs.get("raises")
        named = getattr(raises, "expected_exceptions", raises)
        for each in named if isinstance(named, tuple) else (named,):
            if isinstance(each, type) and issubclass(each, CheckError) and isinstance(error, each):
                return True
    return False
