"""What can be done with what a test run wrote: `python -m pytest_trtcheck diff OLD.json NEW.json`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import CheckError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.report.diff import ReportDiff

NOTHING_WORSE, WORSE, BAD_INPUT = 0, 1, 2

_FAIL_ON = ("never", "regression", "loss")
_EXIT_CODES = """\
exit status:
  0  nothing is worse that --fail-on names
  1  something is
  2  a file cannot be read as a report, or the arguments are wrong

--fail-on=regression: a verdict, an error, a latency, or the engine's size or
memory is worse. --fail-on=loss: that, or a check was removed, is not measured
any more, or cannot be compared.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_trtcheck",
        description="What can be done with the reports and exports of pytest-trtcheck.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "diff",
        help="what changed between two JSON reports",
        description="What changed between two JSON reports (--trt-report): environment, verdicts, errors, latency, "
        "engines. What was not measured in the same way is said to be not comparable.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("old", metavar="OLD.json", help="the report to compare with")
    command.add_argument("new", metavar="NEW.json", help="the report to judge")
    command.add_argument("--markdown", action="store_true", help="as Markdown, for a GitHub step summary")
    command.add_argument(
        "--fail-on", choices=_FAIL_ON, default="never", help="what exits with 1 (default: %(default)s)"
    )
    command = commands.add_parser(
        "release",
        help="what a folder of --trt-export holds, what is missing and what was altered",
        description="Look at a folder that --trt-export wrote: every file is held against its SHA-256. With further "
        "folders, those of other machines, what lies in them is copied into the first one.",
        epilog="exit status: 0 where nothing is missing, stale or altered; 1 where something is; 2 where a folder "
        "cannot be read as an export",
    )
    command.add_argument("folder", metavar="DIR", help="the release")
    command.add_argument("others", metavar="OTHER", nargs="*", help="folders to put into it")
    given = parser.parse_args(arguments)
    # A terminal that knows no arrow shows a question mark rather than nothing at all.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        if given.command == "release":
            return _release(Path(given.folder), [Path(each) for each in given.others])
        found = _diff(given.old, given.new)
    except CheckError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return BAD_INPUT
    from pytest_trtcheck.report import diff_text

    names = given.old, given.new
    if given.markdown:
        print(diff_text.markdown(found, names), end="")
    else:
        width = max(60, shutil.get_terminal_size((diff_text.DEFAULT_WIDTH, 24)).columns)
        print("\n".join(diff_text.lines(found, names, width)))
    bad = given.fail_on != "never" and found.is_worse
    return WORSE if bad or (given.fail_on == "loss" and found.lost_sight) else NOTHING_WORSE


def _release(folder: Path, others: Sequence[Path]) -> int:
    from pytest_trtcheck.export import release

    found, remarks = release.merge(folder, others) if others else (release.check(folder), [])
    print("\n".join([*found.lines(details=True), *remarks]))
    return NOTHING_WORSE if found.is_complete and not remarks else WORSE


def _diff(old: str, new: str) -> ReportDiff:
    from pytest_trtcheck.report import diff, json_report

    return diff.diff(json_report.read(old), json_report.read(new))


if __name__ == "__main__":
    sys.exit(main())
