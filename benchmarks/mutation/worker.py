"""A process that tests mutants: what is slow to import is imported once, and each mutant gets a fork.

    python worker.py COPY        (one JSON object a line on stdin, one outcome a line on stdout)

COPY holds the package and its tests. `pytest_trtcheck` itself is imported in the fork alone, so the mutant counts
wherever its names are bound. Subprocesses of a test see the mutant too: it is a file.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

WARM = ("numpy", "onnx", "onnx.reference", "onnx_ir.passes.common", "ml_dtypes", "onnxruntime", "hypothesis", "pytest")
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"
_PYTEST_SURVIVED, _PYTEST_USAGE, _PYTEST_NO_TESTS, _HARNESS = 0, 4, 5, 70


def run_pytest(copy: Path, order: dict[str, Any], tests: list[str], output: Path) -> int | None:
    """The exit status of pytest in a fork; None when it did not end in time."""
    child = os.fork()
    if not child:
        os.setsid()
        status = _HARNESS
        try:
            sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(sink, stream)
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            sys.dont_write_bytecode = not order.get("writes_bytecode")
            import pytest

            quiet = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:asyncio", "--hypothesis-profile=ci"]
            # hypothesis is imported before its plugin is, on purpose.
            quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            # Runs beside each other would clear each other's temporary directories.
            quiet.append(f"--basetemp={copy / 'tmp'}")
            status = int(pytest.main(["-x", "-q", "--tb=short", *quiet, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + order["timeout_s"]
    while time.monotonic() < end:
        done, wait = os.waitpid(child, os.WNOHANG)
        if done:
            # Of a process that a signal ended there is no exit status: a crash is a failure.
            return os.waitstatus_to_exitcode(wait) if os.WIFEXITED(wait) else 1
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(copy: Path, order: dict[str, Any]) -> dict[str, Any]:
    """What becomes of one mutant."""
    file, output = copy / order["file"], copy / "output.txt"
    original, times = file.read_bytes(), file.stat()
    start = time.monotonic()
    try:
        if order["source"].encode() != original:
            file.write_text(order["source"], encoding="utf-8")
        status = run_pytest(copy, order, order["tests"], output)
        if status == _PYTEST_USAGE:
            # A parameter that the mutant changes is part of a test's id: take the test with all of its parameters.
            whole = list(dict.fromkeys(test.partition("[")[0] for test in order["tests"]))
            status = run_pytest(copy, order, whole, output)
    finally:
        file.write_bytes(original)
        # The bytecode that pytest keeps of a file is known by its time.
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    lines = output.read_text(errors="replace").splitlines()
    if status == _PYTEST_NO_TESTS:
        raise SystemExit(f"no tests were run, of {order['tests'][:3]} …: {lines[-20:]}")
    outcome = TIMED_OUT if status is None else SURVIVED if status == _PYTEST_SURVIVED else KILLED
    # Where pytest itself cannot go on (the plugin does not load any more), its last words.
    by = next((line for line in lines if line.startswith(("FAILED ", "ERROR "))), lines[-1] if lines else "")
    return {"outcome": outcome, "by": by[:200], "seconds": round(time.monotonic() - start, 2)}


def main() -> None:
    copy = Path(sys.argv[1]).resolve()
    # A file that is mutated twice within a second would be taken from its first mutant's bytecode.
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(copy))
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != copy]
    for name in WARM:
        importlib.import_module(name)
    assert "pytest_trtcheck" not in sys.modules
    for line in sys.stdin:
        print(json.dumps(judge(copy, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
