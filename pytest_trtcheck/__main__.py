"""What can be done apart from a test run: `python -m pytest_trtcheck diff|upgrade OLD NEW`, `record MODEL`, …"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import ArgumentError, unforeseen, visible
from pytest_trtcheck.report.upgrade import command as upgrade

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_trtcheck.report.diff import ReportDiff

NOTHING_WORSE, WORSE, BAD_INPUT = 0, 1, 2

_FAIL_ON = ("never", "regression", "loss")
_EXIT_CODES = """\
exit status:
  0  nothing is worse that --fail-on names
  1  something is
  2  a file cannot be read as a report, or the arguments are wrong

--fail-on=regression: a verdict, an error, a latency, or the engine's size or
memory is worse, or a check fails that the old report does not have, or that
passed there and cannot be compared.
--fail-on=loss: that, or a check, or something that was asked of it, was removed,
is not measured any more, or cannot be compared; or a test left no record.
"""


def parser() -> argparse.ArgumentParser:
    """Every command and its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_trtcheck", description="What pytest-trtcheck does apart from a test run."
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
    upgrade.declare(commands)
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
    command = commands.add_parser(
        "merge",
        help="the reports of many machines as one: model × GPU, one verdict",
        description="Join JSON reports (--trt-report) of many machines: a table of models and machines, one verdict, "
        "one exit status.",
        epilog="exit status: 0 where no check of any report failed; 1 where one did, was an error or inconclusive, or, "
        "with --require-all, is not in every report, was not measured or was emulated, or where the reports are of "
        "different commits; 2 where a file cannot be read "
        "as a report",
    )
    command.add_argument("reports", metavar="REPORT.json", nargs="+", help="a machine's report, or a merged one")
    command.add_argument("-o", "--output", metavar="FILE.json", help="write the merged report")
    command.add_argument("--html", metavar="FILE.html", help="write it as one page")
    command.add_argument("--markdown", action="store_true", help="as Markdown, for a GitHub step summary")
    command.add_argument("--require-all", action="store_true", help="every check run and measured on the GPU of each")
    command = commands.add_parser(
        "history",
        help="how checks went from report to report, and where one became worse",
        description="Follow each check through JSON reports (--trt-report), in the order in which the runs began: "
        "error, latency, score and verdict, held against what each was when it last changed.",
        epilog="exit status: 0; with --fail-on=regression 1 where something became worse in the newest report, or does "
        "not pass that is new there; 2 where a file cannot be read as a report",
    )
    command.add_argument("reports", metavar="REPORT.json", nargs="+", help="a run's report, or a merged one")
    command.add_argument("--html", metavar="FILE.html", help="write it as one page")
    command.add_argument(
        "--fail-on", choices=_FAIL_ON[:2], default="never", help="what exits with 1 (default: %(default)s)"
    )
    _add_record(commands)
    command = commands.add_parser(
        "explain",
        help="what the code of an error means, and what to do",
        description="Print the sections of docs/errors.md on these codes; without one, list all codes.",
    )
    command.add_argument("codes", metavar="CODE", nargs="*", help="such as model-missing")
    _add_init(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    given = parser().parse_args(arguments)
    # A terminal that knows no arrow shows a question mark rather than nothing at all.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _RUN[given.command](given)
        if sys.stdout is not None:  # a service may have none
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read it has seen enough, `| head`; what Python still holds of it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell says it of a tool that SIGPIPE ended
    except KeyboardInterrupt:
        print(f"{given.command}: interrupted", file=sys.stderr)
        return 128 + 2
    except Exception as error:
        print(visible(f"ERROR: {unforeseen(error, given.command)}"), file=sys.stderr)
        return BAD_INPUT


def _diff(given: argparse.Namespace) -> int:
    found = _changes(given.old, given.new)
    from pytest_trtcheck.report import diff_text

    names = given.old, given.new
    if given.markdown:
        _say(diff_text.markdown(found, names), end="")
    else:
        _say("\n".join(diff_text.lines(found, names, _width())))
    bad = given.fail_on != "never" and (found.is_worse or found.fails_anew)
    return WORSE if bad or (given.fail_on == "loss" and found.lost_sight) else NOTHING_WORSE


def _merge(given: argparse.Namespace) -> int:
    from pytest_trtcheck.record.files import require_apart
    from pytest_trtcheck.report import html, json_report, merge

    # What was merged may be merged again into the same file: all of it is in there.
    is_again = given.output in given.reports
    require_apart({"--output": None if is_again else given.output, "--html": given.html}, given.reports)
    if given.output and not is_again:
        merge.require_no_run(given.output)
    if given.html:
        html.require()
    found = merge.merge([(each, json_report.read(each)) for each in given.reports])
    if given.output:
        json_report.save(given.output, found)
    if given.html:
        html.save(given.html, found)
    if given.markdown:
        _say(merge.markdown(found, requires_all=given.require_all))
    else:
        _say("\n".join(merge.lines(found, _width(), requires_all=given.require_all)))
    return WORSE if merge.is_bad(found) or (given.require_all and merge.gaps(found)) else NOTHING_WORSE


def _history(given: argparse.Namespace) -> int:
    from pytest_trtcheck.record.files import require_apart
    from pytest_trtcheck.report import history, html, json_report

    require_apart({"--html": given.html}, given.reports)
    if given.html:
        html.require()
    found = history.history([(each, json_report.read(each)) for each in given.reports])
    if given.html:
        html.save_history(given.html, found)
    _say("\n".join(history.lines(found, _width())))
    return WORSE if given.fail_on == "regression" and found.is_worse else NOTHING_WORSE


def _say(text: str, end: str = "\n") -> None:
    """Print it, whoever wrote the names in it."""
    print("\n".join(map(visible, text.split("\n"))), end=end)


def _width() -> int:
    from pytest_trtcheck.report.diff_text import DEFAULT_WIDTH

    return max(60, shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns)


def _explain(given: argparse.Namespace) -> int:
    from pytest_trtcheck.report import explain

    _say(explain.explained(given.codes, min(_width(), 100)))
    return NOTHING_WORSE


def _upgrade(given: argparse.Namespace) -> int:
    return upgrade.run(given, _width())


def _release(given: argparse.Namespace) -> int:
    from pytest_trtcheck.export import release

    folder, others = Path(given.folder), [Path(each) for each in given.others]
    found, remarks = release.merge(folder, others) if others else (release.check(folder), [])
    print(visible("\n".join([*found.lines(details=True), *remarks])))
    return NOTHING_WORSE if found.is_complete and not remarks else WORSE


def _changes(old: str, new: str) -> ReportDiff:
    from pytest_trtcheck.report import diff, json_report

    return diff.diff(json_report.read(old), json_report.read(new))


def _add_record(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "record",
        help="what a model computes, as the reference of later checks",
        description="Write what a model computes in FP32 on ONNX Runtime, beside the inputs and the hashes of both, "
        "into an .npz file: @trt_parity(…, reference='golden.npz') feeds the inputs and compares with the outputs.",
    )
    command.add_argument("model", metavar="MODEL", help="the model: a path to what a marker takes too")
    command.add_argument("-o", "--output", metavar="GOLDEN.npz", required=True, help="the file to write")
    command.add_argument(
        "--inputs",
        metavar="GLOB",
        help=".npz or .npy files, one sample each (default: generated inputs)",
        action="append",
        default=[],
    )
    command.add_argument(
        "--for",
        dest="used_for",
        metavar="MODEL",
        help="the model whose checks they are for, such as one quantized from this; its hash is kept, too",
        action="append",
        default=[],
    )
    command.add_argument("--batch", type=int, metavar="N", help="the batch of generated inputs (default: 1)")
    command.add_argument(
        "--shape", metavar="NAME=1,3,224,224", help="the shape of a generated input", action="append", default=[]
    )
    command.add_argument("--seed", type=int, default=0, help="of generated inputs (default: %(default)s)")
    command.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="where ONNX Runtime computes")
    command.add_argument(
        "--custom-ops", metavar="LIBRARY", help="of operators that ONNX Runtime lacks", action="append", default=[]
    )


def _record(given: argparse.Namespace) -> int:
    from pytest_trtcheck.check.recording import Recording, record

    shapes = dict(map(_shape, given.shape))
    if given.inputs and (shapes or given.batch is not None or given.seed):
        raise ArgumentError(
            "record: --batch, --shape and --seed are for generated inputs", "leave them out", code="argument-conflict"
        )
    if given.batch is not None and given.batch < 1:
        raise ArgumentError(f"record: --batch={given.batch}: expected at least 1", code="option-value")
    asked = Recording(
        model=given.model,
        output=Path(given.output),
        inputs=given.inputs,
        used_for=given.used_for,
        batch=given.batch,
        shapes=shapes,
        seed=given.seed,
        provider=given.provider,
        custom_ops=given.custom_ops,
    )
    print(visible("\n".join(record(asked))))
    return NOTHING_WORSE


def _add_init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "init",
        help="a first test of the models in a project, and a CI workflow",
        description="Look for models (.onnx, .pt2, .keras, SavedModel folders) and write tests/test_inference.py, "
        "tests/conftest.py, a pytest.ini where nothing configures pytest, and a CI workflow. What exists stays.",
        epilog="exit status: 0; 1 where no model was found; 2 where a file cannot be written",
    )
    command.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="the project's (default: this one)")
    command.add_argument(
        "--ci",
        choices=("github", "gitlab", "jenkins", "none"),
        help="whose workflow (default: what the project has, else github)",
    )
    command.add_argument("--dry-run", action="store_true", help="write nothing, say what would be written")
    command.add_argument("--diff", action="store_true", help="write nothing, show what would change")
    command.add_argument("--force", action="store_true", help="write over files that exist")


def _init(given: argparse.Namespace) -> int:
    from pytest_trtcheck import init

    asked = init.Asked(Path(given.folder), given.ci, given.force, given.dry_run, given.diff)
    said, found = init.run(asked)
    _say("\n".join(said))
    return NOTHING_WORSE if found else WORSE


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    try:
        return name, tuple(int(size) for size in sizes.split(",") if size.strip())
    except ValueError:
        raise ArgumentError(f"record: --shape={text}: expected NAME=1,3,224,224", code="option-value") from None


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "diff": _diff,
    upgrade.NAME: _upgrade,
    "release": _release,
    "merge": _merge,
    "history": _history,
    "record": _record,
    "explain": _explain,
    "init": _init,
}


if __name__ == "__main__":
    sys.exit(main())
