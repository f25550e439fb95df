"""What can be done with reports apart from a test run: `python -m pytest_trtcheck diff OLD.json NEW.json`."""

from __future__ import annotations

import argparse
import shutil
import sys
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
        prog="python -m pytest_trtcheck", description="What can be done with the reports of pytest-trtcheck."
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
    given = parser.parse_args(arguments)
    # A terminal that knows no arrow shows a question mark rather than nothing at all.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
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


def _diff(old: str, new: str) -> ReportDiff:
    from pytest_trtcheck.report import diff, json_report

    return diff.diff(json_report.read(old), json_report.read(new))


if __name__ == "__main__":
    sys.exit(main())
