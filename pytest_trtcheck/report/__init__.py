"""Check records turned into what people and other programs read: `REPORTS` lists how, one line and one file each.

What writes a report is loaded when the report is wanted.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_trtcheck.choices import Option


class Report:
    """One report.

    Parameters
    ----------
    writer
        The name of a module, or any object, with `write(run: view.Run)`: it writes the report and gives lines to show
        at the end of the run. With `require()`, if it has one, it says before the first test what keeps it from that,
        and with `properties(record, index)` what a check adds to its test's JUnit properties.
    option
        What names its file, an option of your own or the name of one of ours; `run.path` is that. None: the report is
        made in every run with checks.
    of_tests
        Whether it has `properties`.
    """

    def __init__(self, writer: object, option: Option | str | None = None, *, of_tests: bool = False) -> None:
        self._writer = writer
        self.option = option
        self.of_tests = of_tests

    @property
    def writer(self) -> Any:
        """What has `write`."""
        return importlib.import_module(self._writer) if isinstance(self._writer, str) else self._writer


REPORTS = (
    Report(f"{__name__}.json_report", "trt_report"),
    Report(f"{__name__}.html", "trt_html"),
    Report(f"{__name__}.junit", of_tests=True),
    Report(f"{__name__}.terminal"),
    Report(f"{__name__}.github"),
)
