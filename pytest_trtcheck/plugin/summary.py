"""Collecting the records of a run, in the process that reports, and writing the reports at its end."""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.choices import PROPERTY
from pytest_trtcheck.errors import CODES, CheckError, unforeseen, visible
from pytest_trtcheck.plugin import now_s
from pytest_trtcheck.plugin import options as settings
from pytest_trtcheck.plugin.marks import UNCOLLECTED
from pytest_trtcheck.plugin.option_table import any_given
from pytest_trtcheck.plugin.outcome import (
    LATE,
    LOCATION,
    RUN,
    RUNS,
    Told,
    begin_run,
    checks,
    end_run,
    is_our_property,
    reason,
)
from pytest_trtcheck.plugin.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pytest_trtcheck.record import CheckRecord, MissingRecord, RunRecord
    from pytest_trtcheck.report import Report
    from pytest_trtcheck.report.terminal import Line


_PLANNED = "trtcheck_planned"
"""The attribute of a report under which it says which tests of its process check something."""
_TALLIES = "trtcheck_shared_cache"
"""Under which an xdist worker sends what came of the shared cache."""
_LATE = "trtcheck_late"
"""Under which it sends what failed in threads of tests that had ended."""
_MOST_CODES = 6
"""How many codes one line names."""
_STOPPED: dict[int, str] = {
    pytest.ExitCode.INTERRUPTED: "the run was interrupted",
    pytest.ExitCode.INTERNAL_ERROR: "pytest had an internal error",
}


def _planned(session: pytest.Session) -> list[str]:
    """The tests of this process that are to check something: marked ones, models, bundles, those with `trt_check`."""
    return [item.nodeid for item in getattr(session, "items", ()) if checks(item)]


def _without_graph(record: str) -> str:
    """A record as JSON, as it is where no model was recorded with it."""
    import json

    data = json.loads(record)
    return json.dumps(data) if data.pop("graph", None) is not None else record


def _with_outcome(record: CheckRecord, report: pytest.TestReport, outcome: pytest.TestReport) -> CheckRecord:
    """The record that a report carries, with how its test went."""
    from pytest_trtcheck.record import Location

    reason: str | None = getattr(outcome, "wasxfail", None)
    return replace(
        record,
        expected_failure=(reason or "xfail") if reason is not None and outcome.outcome == "skipped" else None,
        outcome=outcome.outcome,
        location=Location(report.location[0], (report.location[1] or 0) + 1),
    )


def _test_of(report: pytest.TestReport) -> tuple[str, str | None]:
    """Which test a report is of: two workers may run the same one at once (`--dist each`), and each of them counts."""
    return report.nodeid, getattr(report, "worker_id", None)


COLLECTOR = "trtcheck-collector"
"""What pytest's plugin manager calls the `Collector` of a process."""


def begin(session: pytest.Session, *, checks: bool) -> None:
    """Before the first test: collect records, of a list of tests what can't be checked; a worker takes its GPU.

    Parameters
    ----------
    checks
        Whether this process has tests that check something.
    """
    config = session.config
    if config.option.collectonly:
        config.pluginmanager.register(Listing(session), "trtcheck-listing")
        return
    collect(config)
    if checks and hasattr(config, "workerinput"):
        from pytest_trtcheck.plugin.session import session_of

        _ = session_of(config).place


def collect(config: pytest.Config) -> None:
    """Have records collected from now on; where tests are run, that is, and not only listed."""
    if not config.option.collectonly and not config.pluginmanager.hasplugin(COLLECTOR):
        config.pluginmanager.register(Collector(config), COLLECTOR)


def collect_from(item: pytest.Item) -> None:
    """Have the records of a running test collected, whoever knew of them when it was set up."""
    collect(item.config)
    if RUN not in item.stash:
        begin_run(item)


class Listing:
    """Where tests are only listed, says which of them could not be checked: a list with one is no success."""

    def __init__(self, session: pytest.Session) -> None:
        from pytest_trtcheck.plugin.items import marked

        checks = [(item, found) for item in session.items if (found := marked(item)) is not None]
        self._refused = [f"{item.nodeid}: {problem}" for item, found in checks if (problem := found.problem(item))]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a list that is fine otherwise."""
        if self._refused and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the tests, with the reasons."""
        if self._refused:
            terminalreporter.section("tests that cannot be checked", red=True, bold=True)
            for text in self._refused:
                terminalreporter.write_line(visible(f"ERROR {text}"))


class Collector:
    """Takes the records off the test reports, which reach this process from every xdist worker."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._began, self._began_s = time.time(), now_s()
        self._outcomes: dict[tuple[str, str | None], pytest.TestReport] = {}
        self.records: list[CheckRecord] = []
        self._last: dict[tuple[str, str | None], list[CheckRecord]] = {}
        self._shown: list[Line | str] = []
        self._problems: list[str] = []
        self._told: list[str] = []
        self._crashed: list[str] = []
        self._uncollected: dict[str, str] = {}
        self._planned: dict[str, None] = {}
        self._ended: dict[str, pytest.TestReport] = {}
        self._stopped: str | None = None
        self._told_planned = False
        # What pytest collects is known here, and with pytest-xdist once a worker has said it.
        self._knows_planned = not config.pluginmanager.hasplugin("dsession")
        self._lost_workers = False
        self._interrupted = self._left_out = False
        self.progress = Progress(config)
        # No properties: older releases of pytest read every attribute of what is registered, and these would be worked
        # out before the first test ran.
        self._missing = functools.cache(self._find_missing)
        self._record = functools.cache(self._make_record)
        self._tallies: list[dict[str, Any]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Count the runs of a test."""
        begin_run(item)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """See that what a test began in threads has ended with it."""
        result = yield
        end_run(item)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Send with a process's first report which tests will check something: a worker that dies says no more."""
        report = yield
        self.progress.ended()
        if not self._told_planned:
            self._told_planned = True
            planned = _planned(item.session)
            setattr(report, _PLANNED, planned)
            if planned:
                import msgspec  # noqa: F401 - what reads records has to be there when memory is not
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what the last report of a test carries: by then every check of it is there."""
        self.progress.reported(report)
        self._knows_planned = self._knows_planned or hasattr(report, _PLANNED)
        self._planned.update(dict.fromkeys(getattr(report, _PLANNED, ())))
        if hasattr(report, LOCATION) and isinstance(report.longrepr, str):
            # Here, since what travels from an xdist worker is text.
            is_line = self._config.getoption("tbstyle") == "line"
            report.longrepr = Told(report.longrepr, *getattr(report, LOCATION), is_line=is_line)  # type: ignore[assignment]
        if report.when == "setup":
            self._ended.pop(report.nodeid, None)
        if report.when != "teardown" or report.nodeid not in self._ended:
            self._ended[report.nodeid] = report
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[_test_of(report)] = report
        if report.when not in {"setup", "call", "teardown"}:
            # What pytest-xdist reports in the name of a worker that died: no record came with it.
            self._crashed.append(report.nodeid)
        if report.when != "teardown":
            return
        outcome = self._outcomes.pop(_test_of(report), None)
        # pytest-rerunfailures reports a run that it will repeat as "rerun", flaky does not report how it went.
        if outcome is None or "rerun" in {outcome.outcome, report.outcome}:
            report.user_properties = [each for each in report.user_properties if not is_our_property(each[0])]
        else:
            self._keep(report, outcome)

    def _keep(self, report: pytest.TestReport, outcome: pytest.TestReport) -> None:
        """Take the records of one run of a test; they replace those of its earlier runs."""
        records = []
        for index, (name, value) in enumerate(report.user_properties):
            if name != PROPERTY or (record := self._read(report.nodeid, value)) is None:
                continue
            records.append(_with_outcome(record, report, outcome))
            if not hasattr(self._config, "workerinput"):
                # What is drawn has no place in JUnit XML, which is written from the report: hundreds of KB a test.
                report.user_properties[index] = (name, _without_graph(str(value)))
        test = _test_of(report)
        is_again = any(name == RUNS for name, _ in report.user_properties) or any(each.runs > 1 for each in records)
        if is_again:
            earlier = self._last.get(test, [])
            self.records = [each for each in self.records if not any(each is old for old in earlier)]
        if records or is_again:
            self._last[test] = records
            self.records += records

    def _read(self, nodeid: str, value: object) -> CheckRecord | None:
        """The record that a test's property holds as JSON; None where it is none, which is told at the end."""
        # Here, since most tests of most suites carry none: the types of records are most of what this plugin loads.
        from pytest_trtcheck.record import CheckRecord

        try:
            return CheckRecord.from_json(str(value))
        except (CheckError, ValueError):
            self._problems.append(
                f"{nodeid}: its property {PROPERTY!r} is no record of a check: the test's own code wrote it"
            )
            return None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what workers of pytest-xdist could not collect: which tests are in it, nobody knows."""
        if report.failed:
            self._uncollected[report.nodeid] = reason(report.longrepr)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Keep that the run was cut short: after a second Ctrl-C, and pytest.exit(returncode=0), the status is 0."""
        self._interrupted = True

    def _keep_cut_off(self, session: pytest.Session) -> None:
        """Take the records of a test that Ctrl-C ended: pytest makes no report of it that could bring them here."""
        for item in getattr(session, "items", ()):
            if self._end(item.nodeid) is None:
                found = [self._read(item.nodeid, value) for name, value in item.user_properties if name == PROPERTY]
                self.records += [replace(each, outcome="failed") for each in found if each is not None]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the reports and the engines that were asked for."""
        self.progress.close()
        if settings.value(self._config, "trt_cache"):
            from pytest_trtcheck.plugin.session import shared_cache

            tally = shared_cache(self._config, waits=not self._interrupted)
            self._tallies += [asdict(tally)] if tally is not None else []
        late = self._config.stash.setdefault(LATE, [])
        if hasattr(self._config, "workerinput"):
            sent = vars(self._config)["workeroutput"]  # xdist's
            sent[_TALLIES], sent[_LATE] = self._tallies, late
            return
        self._problems += late
        self._planned.update(dict.fromkeys(_planned(session)))
        for each in session.stash.get(UNCOLLECTED, ()):  # before this was registered
            self.pytest_collectreport(each)
        self._keep_cut_off(session)
        status = pytest.ExitCode.INTERRUPTED if self._interrupted else exitstatus
        self._stopped = str(session.shouldfail or session.shouldstop or "") or _STOPPED.get(status)
        try:
            folder = settings.value(self._config, "trt_export")
        except CheckError:
            # Settings that are wrong were refused at the start; then there is nothing to report either.
            return
        if self._planned or self.records:
            with self._problem("the environment"):
                unknown = settings.unknown_variables(self._config)
                self._told += [f"environment variable {each} is no option's: not used" for each in unknown]
        self._tell_of_globs()
        with self._problem("--trt-export"):
            self._export(folder, status)
        for report in settings.reports(self._config):
            with self._problem("writing the reports"):
                self._write(report)
        if self.records and settings.value(self._config, "trt_update_baseline"):
            with self._problem("--trt-update-baseline"):
                self._update_baselines()
        if self._tallies:
            with self._problem("the shared cache"):
                self._tell_of_shared_cache()
        if self._problems and session.exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
            # What was asked for is not there: whoever runs this must not believe that it is.
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._left_out:
            session.exitstatus = pytest.ExitCode.INTERRUPTED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take what came of the shared cache in an xdist worker, and what failed there too late."""
        self._lost_workers = self._lost_workers or bool(error)
        sent = getattr(node, "workeroutput", {})
        self._tallies += sent.get(_TALLIES, [])
        self._problems += sent.get(_LATE, [])

    def _tell_of_globs(self) -> None:
        """Say which models of `trt_collect` are not in a run of the whole suite: `testpaths` may lead past them; and
        which options are for a model that is not.
        """
        of_a_part = self._config.args_source is pytest.Config.ArgsSource.ARGS
        if of_a_part or any(map(self._config.getoption, ("keyword", "markexpr"))):
            return
        files = {nodeid.partition("::")[0] for nodeid in (*self._planned, *self._uncollected)}
        globs = settings.value(self._config, "trt_collect")
        for glob in globs:
            if not any(settings.is_collected(file, glob) for file in files):
                self._told.append(f"trt_collect: no file of {glob!r} was collected: not checked")
        if globs:
            from pytest_trtcheck.plugin import model_files

            self._told += model_files.unused(self._config, [self._config.rootpath / file for file in files])

    def _tell_of_shared_cache(self) -> None:
        from pytest_trtcheck.cache.remote import Tally
        from pytest_trtcheck.plugin.session import session_of

        remote = session_of(self._config).cache.remote
        if remote is not None:
            self._told += Tally.of(self._tallies).lines(remote.address.shown)

    @contextmanager
    def _problem(self, doing: str) -> Iterator[None]:
        """What fails is told at the end of the run; the rest is still written."""
        try:
            yield
        except CheckError as error:
            self._problems.append(str(error))
        except KeyboardInterrupt:
            self._left_out = True
            self._problems.append(f"{doing}: interrupted: what it had begun is not there")
        except OSError as error:
            self._problems.append(f"{doing}: {error}")
        except Exception as error:
            self._problems.append(str(unforeseen(error, doing)))

    def _export(self, folder: str | None, status: int) -> None:
        if not folder:
            return
        why_not = None
        if self._uncollected:
            why_not = f"{next(iter(self._uncollected))} could not be collected, and what it would check is not known"
        elif self._stopped or status not in {0, 1, 5} or any(each.outcome is None for each in self._missing()):
            # A test that did not run may be the one that fails.
            why_not = "the run was stopped before every test had run"
        elif self._crashed:
            why_not = f"{self._crashed[0]} crashed its process, and which engine it used is not known"
        if why_not is not None:
            self._problems.append(f"--trt-export: nothing was written: {why_not}")
            return
        from pytest_trtcheck.export import export
        from pytest_trtcheck.plugin.session import session_of

        try:
            session = session_of(self._config)
            judged = session.checker.judged_gpu()
            done = export.write(
                settings.path(self._config, folder),
                self.records,
                session.cache,
                gpu=judged.product if judged else None,
                environment=self._record().environment,
            )
            self._told += done.lines()
        except CheckError as error:
            self._problems.append(f"--trt-export: {error}")

    def _update_baselines(self) -> None:
        from pytest_trtcheck import baselines
        from pytest_trtcheck.errors import plural
        from pytest_trtcheck.plugin.session import session_of

        directory = session_of(self._config).baseline_dir
        if directory is None:
            return
        try:
            done = baselines.update(directory, self.records)
        except CheckError as error:
            self._problems.append(str(error))
            return
        self._told.append(f"{plural(done.recorded, 'baseline')} recorded in {plural(len(done.files), 'file')}")
        self._told += [f"  {path}" for path in done.files]
        self._told += [f"no baseline recorded: {nodeid}: {reason}" for nodeid, reason in done.left_out]

    def _write(self, report: Report) -> None:
        path = settings.value(self._config, report.option) if report.option else None
        if report.of_tests or (not path if report.option else not (self.records or self._missing())):
            return
        from pytest_trtcheck.plugin.session import session_of
        from pytest_trtcheck.report.view import Run

        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        run = Run(
            self._record(),
            settings.path(self._config, path) if path else None,
            self._config.rootpath,
            reporter._tw.fullwidth if reporter else 80,
            session_of(self._config).evidence_key,
            settings.value(self._config, "trt_summary"),
        )
        if report.option and run.path and session_of(self._config).written_meanwhile(run.path):
            self._problems.append(
                f"{settings.flag(report.option)}={path}: another run wrote a report there since this one began, and it "
                "is replaced: name a file of its own for each"
            )
        for line in report.writer.write(run):
            self._shown.append(line)

    def _make_record(self) -> RunRecord:
        from pytest_trtcheck.backends import tensorrt_module
        from pytest_trtcheck.plugin.revision import commit
        from pytest_trtcheck.plugin.session import session_of
        from pytest_trtcheck.report import REPORTS, json_report

        modules = {tensorrt_module(record.backend) for record in self.records} - {None}
        environment = session_of(self._config).environment(modules.pop() if len(modules) == 1 else None)
        used = {record.gpu.uuid or "": record.gpu for record in self.records if record.gpu is not None}
        gpus = tuple(used[uuid] for uuid in sorted(used))
        environment = replace(environment, gpu=gpus[0] if gpus else environment.gpu, gpus=gpus if gpus[1:] else ())
        run = json_report.document(self.records, environment, self._missing(), self._stopped)
        # What is only shown and forgotten needs no revision.
        is_kept = any(settings.value(self._config, each.option) for each in REPORTS if each.option)
        return replace(
            run,
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._began)),
            duration_s=round(now_s() - self._began_s, 3),
            commit=commit(self._config.rootpath) if is_kept else None,
        )

    def _find_missing(self) -> list[MissingRecord]:
        """What was to check something and left no record: tests, and files of which nobody knows what they check."""
        from pytest_trtcheck.record import MissingRecord

        recorded = {record.nodeid for record in self.records}
        # Where nothing of ours is used, it is no loss: the controller of pytest-xdist collects records in any run.
        is_used = bool(recorded or self._planned or any_given(self._config))
        lost = dict(self._uncollected) if is_used else {}
        ended = self._stopped or (self._lost_workers and "the processes that collected it died") or None
        if is_used and not lost and not self._knows_planned and ended:
            given = [PurePath(each) for each in self._config.args]
            lost = dict.fromkeys((each.name if each.is_absolute() else str(each) for each in given), ended)
        return [
            *(MissingRecord(nodeid, f"could not be collected: {why}") for nodeid, why in lost.items()),
            *(self._absent(nodeid) for nodeid in self._planned if nodeid not in recorded),
        ]

    def _absent(self, nodeid: str) -> MissingRecord:
        from pytest_trtcheck.record import MissingRecord

        report = self._end(nodeid)
        if nodeid in self._crashed:
            return MissingRecord(nodeid, "its process died: it crashed, or was ended for want of memory", "failed")
        if report is None:
            return MissingRecord(
                nodeid, f"did not {'end' if nodeid in self._ended else 'run'}: {self._stopped or 'nobody knows why'}"
            )
        if report.passed:
            return MissingRecord(nodeid, "passed, and made no check", "passed")
        why = getattr(report, "wasxfail", None) or reason(report.longrepr)
        words = "skipped" if report.skipped else f"failed in its {report.when} before it was checked"
        return MissingRecord(nodeid, f"{words}: {why}", report.outcome)

    def _end(self, nodeid: str) -> pytest.TestReport | None:
        """The report of how a test ended; None where it did not."""
        report = self._ended.get(nodeid)
        return None if report is not None and report.when == "setup" and report.passed else report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What the reports show, behind pytest's own sections."""
        if self._shown:
            from pytest_trtcheck.report import terminal

            terminalreporter.section("inference checks")
            terminal.show(self._shown, terminalreporter)
            # Whoever expects a failure knows what it means.
            seen = {record.code for record in self.records if not record.expected_failure}
            if codes := [code for code in CODES if code in seen and code != "not-measured"][:_MOST_CODES]:
                terminalreporter.write_line(f"explained by: python -m pytest_trtcheck explain {' '.join(codes)}")
        for line in self._told:
            terminalreporter.write_line(visible(line))
        for problem in self._problems:
            terminalreporter.write_line(visible(f"ERROR: {problem}"), red=True, bold=True)
