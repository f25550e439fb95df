"""What is said while something takes long: in a real pseudo-terminal, in a log, and from workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.conftest import LEFT_OUT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Suite

pty = pytest.importorskip("pty")

SLOW = """
import time
from pytest_trtcheck.cache import store
from pytest_trtcheck.plugin import progress

progress.QUIET_S, progress.LOG_PACE_S, progress._POLL_S = 0.2, 0.2, 0.05
make = store.Cache._make

def slow(self, key, maker, damage):
    def made(folder):
        time.sleep(0.8 if key.kind == "lowered" else 0)
        return maker(folder)
    return make(self, key, made, damage)

store.Cache._make = slow
"""
TESTS = """
def test_quick(): ...

@trt_parity("conv.onnx", batch=1, precision=["fp16", "bf16"])
def test_slow():
    print("captured")
"""


@pytest.fixture
def slow(suite: Suite) -> Suite:
    suite.write(test_x=TESTS)
    (suite.path / "conftest.py").write_text(SLOW)
    return suite


def command(folder: Path, *arguments: str) -> list[str]:
    left_out = [f"-pno:{name}" for name in LEFT_OUT]
    return [
        sys.executable,
        "-m",
        "pytest",
        "-pno:cacheprovider",
        *left_out,
        f"--trt-cache-dir={folder / 'c'}",
        *arguments,
    ]


def in_a_terminal(folder: Path, columns: int, *arguments: str) -> str:
    """What a terminal of so many columns is sent."""
    import fcntl
    import struct
    import termios

    process, end = pty.fork()
    if process == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.chdir(folder)
        words = command(folder, *arguments)
        # Not the process's own environment: readline, which pytest imports, leaves COLUMNS there, unseen by Python.
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        os.execve(words[0], words, {**environment, "TERM": "xterm"})
    sent = b""
    while True:
        try:
            part = os.read(end, 65536)
        except OSError:
            break
        if not part:
            break
        sent += part
    _, status = os.waitpid(process, 0)
    os.close(end)
    assert status == 0, sent.decode()
    return sent.decode().replace("\r\n", "\n")


def left(sent: str) -> str:
    """What is left on the screen of lines that were written over."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", sent).split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return "\n".join(lines)


@pytest.mark.parametrize(("columns", "workers"), [(50, ()), (50, ("-n2",)), (0, ())])
def test_a_terminal_has_one_line_that_is_replaced_and_goes(slow: Suite, columns: int, workers: tuple[str, ...]) -> None:
    sent = in_a_terminal(slow.path, columns, *workers)
    said = re.findall(r"trtcheck: [^\x1b\r\n]+", sent)
    # Where two workers share a narrow line, each says as much as there is room for.
    assert any(("low" if workers else "lowering conv.onnx in fp16") in line for line in said), sent
    assert any(re.search(r", \d s", line) for line in said)
    assert ("gw" in "".join(said)) == bool(workers)
    assert max(map(len, said)) < (columns or 80)
    assert "trtcheck:" not in left(sent)
    assert "captured" not in sent
    assert "3 passed" in left(sent)
    if not workers:
        assert left(sent).count("test_x.py") == 3  # once for each time that the line was broken off


@pytest.mark.parametrize("arguments", [("-v",), ("-n2",)])
def test_a_log_has_lines(slow: Suite, arguments: tuple[str, ...]) -> None:
    run = slow.run_apart(*arguments, f"--trt-cache-dir={slow.path / 'c'}")
    run.result.assert_outcomes(passed=3)
    lines = re.findall(r"^trtcheck: .*lowering conv\.onnx in (?:fp16|bf16).* …$", run.text, re.MULTILINE)
    assert lines
    assert ("gw" in lines[0]) == ("-n2" in arguments)
    assert "\r" not in run.text


@pytest.mark.parametrize("arguments", [("-q",), ("-p", "no:terminalreporter")])
def test_who_wants_to_see_little_sees_nothing_of_it(slow: Suite, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(command(slow.path, *arguments), cwd=slow.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trtcheck:" not in done.stdout + done.stderr


def test_what_workers_of_a_killed_run_said_goes_with_the_next(slow: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = slow.path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with subprocess.Popen(
        command(slow.path, "-n2"), cwd=slow.path, stdout=subprocess.DEVNULL, start_new_session=True
    ) as run:
        end = time.monotonic() + 60
        while not any(path.is_file() for path in temporary.glob("trtcheck-*/*")) and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
    assert list(temporary.glob("trtcheck-*"))
    done = subprocess.run(command(slow.path, "-n2"), cwd=slow.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(temporary.glob("trtcheck-*"))
