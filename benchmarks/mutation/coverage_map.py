"""Which tests run which lines, and how long each takes: ``python coverage_map.py COPY FILE TEST …`` writes FILE."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import coverage
import pytest


class Contexts:
    """Tells coverage which test runs, and keeps the durations of those that passed."""

    def __init__(self, watched: coverage.Coverage) -> None:
        self._watched = watched
        self.seconds: dict[str, float] = defaultdict(float)
        self.not_passed: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self._watched.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.not_passed.add(report.nodeid)


def main() -> None:
    copy, target, *tests = sys.argv[1:]
    os.chdir(copy)
    sys.path.insert(0, copy)
    watched = coverage.Coverage(data_file=None, source=[str(Path(copy, "pytest_trtcheck"))], branch=False)
    contexts = Contexts(watched)
    watched.start()
    quiet = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:asyncio", "--hypothesis-profile=ci"]
    status = pytest.main(["-q", "--tb=short", *quiet, *tests], plugins=[contexts])
    watched.stop()
    data = watched.get_data()
    lines = {
        Path(file).relative_to(copy).as_posix(): {
            str(line): sorted(test for test in names if test) for line, names in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    passed = {test: seconds for test, seconds in contexts.seconds.items() if test not in contexts.not_passed}
    Path(target).write_text(json.dumps({"status": int(status), "seconds": passed, "lines": lines}))


if __name__ == "__main__":
    main()
