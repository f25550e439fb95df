"""`python -m pytest_trtcheck upgrade OLD.json NEW.json`: the gate on a command line."""

from __future__ import annotations

import argparse
import json
import math

from pytest_trtcheck.errors import visible
from pytest_trtcheck.record import jsonable
from pytest_trtcheck.report.upgrade.questions import ALLOWABLE, Limits

NAME = "upgrade"
PASS, FAIL, DOES_NOT_FIT, INCONCLUSIVE = 0, 1, 2, 3

_EXIT_CODES = """\
exit status:
  0  nothing became worse beyond the limits
  1  something did, or was not compared and need not be by no --allow
  2  the two reports do not fit together (nothing in them can be compared), a
     file cannot be read as a report, or the arguments are wrong
  3  nothing is surely worse, and of something that cannot be told

what --allow takes, separated by commas:
  missing         checks that the new report lacks
  not-comparable  other models, inputs, GPUs, evidence or ways of measuring
  not-measured    what was not measured, in one report or in both
  emulated        errors that are emulated in both, though TensorRT is another
  layers          engines that do not tell of their layers, or untimed layers
"""


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    limits = Limits()
    command = commands.add_parser(
        NAME,
        help="whether an upgrade may go out, by the report of before and that of after",
        description="Judge an upgrade (TensorRT, a driver, ONNX Runtime) by two JSON reports (--trt-report) of one "
        "suite on one GPU: verdicts, errors, latency, the precision of every layer, and what layers take.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("old", metavar="OLD.json", help="the report of before")
    command.add_argument("new", metavar="NEW.json", help="the report of after")
    shown = "(default: %(default)s)"
    ratios = {
        "error-ratio": (None, 1.0, "an error may become so many times as large (default: as for baselines, 1.5)"),
        "error-share": (None, 0.0, "and may always rise by this share of its limit (default: 0.05)"),
        "slowdown": (limits.slowdown, 0.0, f"a quantile of latency may rise by this share {shown}"),
        "layer-slowdown": (limits.layer_slowdown, 0.0, f"layers may take longer by this share {shown}"),
        "layer-share": (limits.layer_share, 0.0, f"and always by this share of the engine's time {shown}"),
    }
    for name, (default, least, meaning) in ratios.items():
        command.add_argument(
            f"--{name}",
            type=lambda text, least=least: _number(text, least),  # type: ignore[misc]
            default=default,
            metavar="X",
            help=meaning,
        )
    command.add_argument(
        "--allow", type=_allowed, default=frozenset(), metavar="LIST", help="what need not be compared"
    )
    command.add_argument("--downgrade", action="store_true", help="the new report is of older versions")
    command.add_argument("--markdown", action="store_true", help="as Markdown, for a GitHub step summary")
    command.add_argument("--html", metavar="FILE", help="write it as one page, too")
    command.add_argument("--json", metavar="FILE", help="write the verdict for a program, too")


def _number(text: str, least: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from {least:g} on, got {text!r}")
    return number


def _allowed(text: str) -> frozenset[str]:
    names = frozenset(filter(None, (name.strip() for name in text.split(","))))
    if unknown := sorted(names.difference(ALLOWABLE)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(ALLOWABLE)}")
    return names


def run(given: argparse.Namespace, width: int) -> int:
    """Judge, and print in lines of at most `width` columns; the exit status.

    Raises
    ------
    ReportError, ArgumentError
        The reports do not fit together, or one of them cannot be read.
    """
    from pytest_trtcheck.record.files import require_apart, write_text
    from pytest_trtcheck.report import html, json_report
    from pytest_trtcheck.report.upgrade import gate, text

    require_apart({"--html": given.html, "--json": given.json}, (given.old, given.new))
    if given.html:
        html.require()
    names = given.old, given.new
    limits = Limits(
        error_ratio=given.error_ratio,
        error_share=given.error_share,
        slowdown=given.slowdown,
        layer_slowdown=given.layer_slowdown,
        layer_share=given.layer_share,
        allowed=given.allow,
    )
    found = gate.judge(json_report.read(given.old), json_report.read(given.new), limits, downgrade=given.downgrade)
    status = {"pass": PASS, "fail": FAIL, "inconclusive": INCONCLUSIVE}[found.verdict] if found.fits else DOES_NOT_FIT
    told = text.markdown(found, names).rstrip("\n") if given.markdown else "\n".join(text.lines(found, names, width))
    print("\n".join(map(visible, told.split("\n"))))
    if given.html:
        write_text(given.html, text.page(found, names))
    if given.json:
        told = json.dumps(jsonable(text.data(found, names, status)), indent=2, allow_nan=False, ensure_ascii=False)
        write_text(given.json, told + "\n")
    return status
