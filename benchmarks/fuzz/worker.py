"""Runs cases of one target in a process of its own: a number a line comes in, a JSON line goes out.

    python benchmarks/fuzz/worker.py TARGET SEED SECONDS

What the package takes for the memory of the machine is 1 GiB here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import registry  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.cache.directory import tree_bytes
from pytest_trtcheck.errors import CheckError, UnforeseenError, visible
from pytest_trtcheck.model import memory

if TYPE_CHECKING:
    from target import Found  # type: ignore[import-not-found]

MACHINE_BYTES = 1 << 30
"""The memory that the package believes to be there."""
ALLOWED_BYTES = MACHINE_BYTES
"""What a case may take beyond what the process had: a check takes a quarter of the memory up to four times."""
PER_BYTE = 16
"""… and so many bytes for each byte of the files."""
LONGEST_TEXT = 200_000
_REPORT = "please report it"
_PLAIN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What no terminal may be given."""


def peak_bytes(*, reset: bool = False) -> int:
    """The most that the process held since the last reset."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) << 10  # type: ignore[index]


def judged(run: Any) -> tuple[str, str]:
    """What came of a case, in a word of `target.FAILURES` or another, and what was said of it."""
    try:
        found: Found = run()
        word, said = found.word, found.said
    except UnforeseenError as error:
        word, said = "unforeseen", str(error)
    except CheckError as error:
        word, said = "clean error", str(error)
    except Exception:
        word, said = "traceback", traceback.format_exc()
    if word == "status" and _PLAIN.search(said):
        word = "raw text"
    if _REPORT in said and word not in {"traceback", "wrong pass"}:
        word = "unforeseen"
    elif word in {"clean error", "error"} and len(said) > LONGEST_TEXT:
        word = "long text"
    return word, said


def main() -> None:
    name, seed, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    log = sys.stderr
    os.dup2(2, 1)  # what libraries print belongs into the log
    memory.total_bytes = lambda: MACHINE_BYTES  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="fuzz-home-") as home:
        target = registry.TARGETS[name](Path(home))
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            number = int(line)
            outer = Path(tempfile.mkdtemp(prefix=f"case-{number}-", dir=home))
            folder = outer / "in"
            folder.mkdir()
            around = sorted([*outer.iterdir(), *Path(home).iterdir()])
            try:
                run = target.case(random.Random(f"{seed}/{name}/{number}"), folder)
            except Exception:  # what it was to be changed into can't be written
                print(json.dumps({"word": "not made", "said": traceback.format_exc()}), file=answers, flush=True)
                continue
            worth = tree_bytes(folder)
            before = peak_bytes(reset=True)
            faulthandler.dump_traceback_later(seconds * 0.9, repeat=True, file=log)
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                word, said = judged(run)
            faulthandler.cancel_dump_traceback_later()
            taken = peak_bytes() - before
            if taken > ALLOWED_BYTES + PER_BYTE * worth:
                word, said = "memory", f"{taken >> 20} MiB for {worth} bytes; {word}: {said}"
            if sorted([*outer.iterdir(), *Path(home).iterdir()]) != around:
                word, said = "escape", f"something was written outside of the case's folder; {word}: {said}"
            answer = {"word": word, "said": visible(said)[-6000:], "bytes": taken, "worth": worth}
            print(json.dumps(answer), file=answers, flush=True)
            shutil.rmtree(outer, ignore_errors=True)


if __name__ == "__main__":
    main()
