"""Work in a process of its own: how it answers, ends, is stopped, held to its memory, and goes with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pytest_trtcheck.model.apart import EndedError, Process

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends it with its parent and limits memory")


def serve(request: dict[str, Any]) -> Any:
    """What the other process does in these tests."""
    do = request["do"]
    if do == "echo":
        os.write(1, b"what a library prints\n")
        return request["value"]
    if do == "crash":
        print("the last words", flush=True)
        ctypes.string_at(0)
    if do == "hang":
        time.sleep(600)
    if do == "sleep":
        time.sleep(request["s"])
        return None
    if do == "worth":
        return Path("/proc/self/oom_score_adj").read_text().strip()
    if do == "no thread":
        raise RuntimeError("can't start new thread")
    if do == "raise":
        raise ValueError("of the function's")
    return len(bytearray(request["bytes"]))


def process(**more: Any) -> Process:
    return Process(f"{__name__}:serve", "the process", **more)


def test_it_answers_one_request_after_the_other_whatever_is_printed() -> None:
    with process() as it:
        for value in ({"a": [1.5, "é\n\x1e"]}, None, "x" * 200_000):
            assert it.ask({"do": "echo", "value": value}, 60) == value
            assert it.said() == "what a library prints"


def test_a_crash_and_an_exception_are_told_with_the_last_words() -> None:
    with process() as it, pytest.raises(EndedError, match=r"(?s)crashed \(SIGSEGV\).*the last words") as crash:
        it.ask({"do": "crash"}, 60)
    with process() as it, pytest.raises(EndedError, match=r"(?s)exit status 1; .*ValueError: of the") as ended:
        it.ask({"do": "raise"}, 60)
    with process() as it, pytest.raises(EndedError, match="not go on: RuntimeError: can't start new thread"):
        it.ask({"do": "no thread"}, 60)
    assert crash.value.crashed
    assert not ended.value.crashed


def test_what_takes_too_long_is_stopped() -> None:
    it, began = process(), time.monotonic()
    with pytest.raises(EndedError, match=r"did not finish within 0\.5 s and was stopped") as info:
        it.ask({"do": "hang"}, 0.5)
    assert info.value.timed_out
    assert time.monotonic() - began < 60


def test_a_clock_that_a_test_stopped_does_not_stop_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with process() as it:
        it.ask({"do": "sleep", "s": 0}, 60)
        with monkeypatch.context() as patched:  # as freezegun does
            patched.setattr(time, "monotonic", lambda: 1.0)
            with pytest.raises(EndedError, match=r"did not finish within 0\.5 s and was stopped"):
                it.ask({"do": "sleep", "s": 20}, 0.5)


STOPPED = f"""
from {__name__} import process
with process() as it:
    it.ask({{"do": "sleep", "s": 0}}, 60)
    print(it._child.pid, flush=True)
    it.ask({{"do": "sleep", "s": 1.5}}, 4)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows stops no process")
def test_no_time_passes_while_all_is_stopped() -> None:
    root = str(Path(__file__).parents[1])
    parent = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    both = int(parent.stdout.readline()), parent.pid  # as where a container is paused
    time.sleep(0.3)
    for each in both:
        os.kill(each, signal.SIGSTOP)
    time.sleep(5)
    for each in both:
        os.kill(each, signal.SIGCONT)
    parent.communicate()
    assert parent.returncode == 0


@LINUX
def test_it_has_no_more_memory_than_it_is_given() -> None:
    with process(memory_bytes=1 << 30) as it:
        assert it.ask({"do": "take", "bytes": 100 << 20}, 60) == 100 << 20
        with pytest.raises(EndedError, match="MemoryError"):
            it.ask({"do": "take", "bytes": 2 << 30}, 60)


@LINUX
def test_the_kernel_ends_it_before_the_session_where_no_memory_is_left() -> None:
    with process() as builder, process(memory_bytes=1 << 30) as runtime:
        assert [builder.ask({"do": "worth"}, 60), runtime.ask({"do": "worth"}, 60)] == ["1000", "1000"]


def test_one_that_a_passing_thread_started_stays() -> None:
    made: list[Process] = []
    thread = threading.Thread(target=lambda: made.append(process()))
    thread.start()
    thread.join()
    with made[0] as it:
        assert it.ask({"do": "echo", "value": 1}, 60) == 1


PARENT = f"""
import sys, threading
from {__name__} import process
made = []
start = lambda: made.append(process())
if sys.argv[1] == "thread":
    thread = threading.Thread(target=start); thread.start(); thread.join()
else:
    start()
made[0].ask({{"do": "echo", "value": 1}})
print(made[0]._child.pid, flush=True)
made[0].ask({{"do": "hang"}})
"""


@LINUX
@pytest.mark.parametrize("started_by", ["main", "thread"])
def test_it_dies_with_a_parent_that_is_killed(started_by: str) -> None:
    root = str(Path(__file__).parents[1])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, started_by], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break  # nobody reaps it here
        time.sleep(0.05)
    else:
        assert time.monotonic() < deadline
