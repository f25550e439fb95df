"""Collecting the records of a run, in the process that reports, and writing the reports at its end."""

from __future__ import annotations

import functools
import json
import os
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import settings
from pytest_trtcheck.errors import TrtCheckError

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class Collector:
    """Takes the records off the test reports, which reach this process from every xdist worker."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._outcomes: dict[str, pytest.TestReport] = {}
        self.records: list[dict[str, Any]] = []
        self._problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what the last report of a test carries: by then every check of it is there."""
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid] = report
        if report.when != "teardown":
            return
        outcome = self._outcomes.pop(report.nodeid, None)
        if not report.user_properties:
            return
        from pytest_trtcheck.record import PROPERTY

        expected = getattr(outcome, "wasxfail", None)
        for name, value in report.user_properties:
            if name == PROPERTY:
                record = json.loads(str(value))
                if expected is not None and outcome is not None and outcome.outcome == "skipped":
                    record["expected_failure"] = expected or "xfail"
                record["location"] = {"file": report.location[0], "line": (report.location[1] or 0) + 1}
                self.records.append(record)

    def pytest_sessionfinish(self) -> None:
        """Write the reports that were asked for."""
        if hasattr(self._config, "workerinput"):
            return
        # Settings that are wrong were refused at the start; then there is nothing to report either.
        try:
            files = {name: settings.value(self._config, name) for name in ("trt_report", "trt_html")}
        except TrtCheckError:
            return
        if self.records and os.environ.get("GITHUB_ACTIONS") == "true":
            self._tell_github()
        for name, path in files.items():
            if path:
                try:
                    self._write(name, self._config.invocation_params.dir / path)
                except TrtCheckError as error:
                    self._problems.append(str(error))

    def _write(self, name: str, path: Path) -> None:
        from pytest_trtcheck.report import json_report

        document = json_report.document(self.records, self._environment)
        if name == "trt_report":
            json_report.write(path, document)
            return
        from pytest_trtcheck.report import html

        html.write(path, document)

    @functools.cached_property
    def _environment(self) -> dict[str, Any]:
        from pytest_trtcheck.report import json_report
        from pytest_trtcheck.session import session_of

        detected = session_of(self._config).detection.gpu
        facts = () if detected is None else ("name", "uuid", "compute_capability")
        backends = {record["backend"] for record in self.records} & {"tensorrt", "tensorrt_rtx"}
        return json_report.environment(
            requested_gpu=settings.value(self._config, "trt_gpu") or None,
            gpu={fact: getattr(detected, fact) for fact in facts} or None,
            driver=None if detected is None else detected.driver,
            tensorrt_module=backends.pop() if len(backends) == 1 else None,
        )

    def _tell_github(self) -> None:
        from pytest_trtcheck.report import github

        try:
            github.write_step_summary(github.step_summary(self.records, self._environment))
        except TrtCheckError as error:
            self._problems.append(str(error))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table of checks, behind pytest's own sections."""
        if self.records:
            from pytest_trtcheck.report import terminal

            terminalreporter.section("inference checks")
            width = terminalreporter._tw.fullwidth
            terminal.write(terminal.summary_lines(self.records, width), terminalreporter)
        if self.records and os.environ.get("GITHUB_ACTIONS") == "true":
            from pytest_trtcheck.report import github

            terminalreporter.ensure_newline()
            for command in github.annotation_commands(self.records, self._config.rootpath):
                terminalreporter.write_line(command)
        for problem in self._problems:
            terminalreporter.write_line(f"ERROR: {problem}", red=True, bold=True)
