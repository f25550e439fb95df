"""The cache under several real processes: one maker, the dead, eviction while others read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_trtcheck
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.cache.locks import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY = Key("engine", "net", {"precision": "fp16"})
PATIENCE_S = 60.0

PREAMBLE = """
import os, pathlib, sys, time
from pytest_trtcheck.cache import Cache, Key

root, log = map(pathlib.Path, sys.argv[1:3])
KEY = Key("engine", "net", {"precision": "fp16"})

def say(text):
    with log.open("a") as file:
        file.write(f"{text}\\n")

def wait_for(path):
    while not path.exists():
        time.sleep(0.002)
"""


@contextmanager
def process(code: str, root: Path, log: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": str(Path(next(iter(pytest_trtcheck.__path__))).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(root), str(log), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def finish(popen: subprocess.Popen[str]) -> None:
    output, _ = popen.communicate(timeout=PATIENCE_S)
    assert popen.returncode == 0, output


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def wait_for_line(log: Path, line: str, count: int = 1) -> None:
    wait_until(lambda: log.exists() and log.read_text().split().count(line) >= count)


def lines(log: Path) -> list[str]:
    return log.read_text().split()


RACE = """
def make(directory):
    say("make")
    time.sleep(0.3)
    (directory / "engine.plan").write_bytes(b"plan")

say("ready")
wait_for(root.parent / "go")
entry = Cache(root).get_or_make(KEY, make)
assert (entry.path / "engine.plan").read_bytes() == b"plan"
say("cached" if entry.cached else "made")
"""


def test_processes_that_race_make_once(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with (
        process(RACE, root, log) as a,
        process(RACE, root, log) as b,
        process(RACE, root, log) as c,
        process(RACE, root, log) as d,
    ):
        wait_for_line(log, "ready", 4)
        (tmp_path / "go").touch()
        for popen in (a, b, c, d):
            finish(popen)
    said = lines(log)
    assert (said.count("make"), said.count("made"), said.count("cached")) == (1, 1, 3)
    assert not any((root / "v1" / "locks").iterdir())
    assert not any((root / "v1" / "sessions").iterdir())


HANG = """
def make(directory):
    (directory / "engine.plan").write_bytes(b"half")
    say("making")
    time.sleep(1000)

Cache(root).get_or_make(KEY, make)
"""

TAKE = """
def make(directory):
    say("made-by-waiter")
    (directory / "engine.plan").write_bytes(b"plan")

say("waiting")
entry = Cache(root).get_or_make(KEY, make)
assert (entry.path / "engine.plan").read_bytes() == b"plan"
"""


def test_when_the_maker_is_killed_a_waiter_makes(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(HANG, root, log) as maker:
        wait_for_line(log, "making")
        with process(TAKE, root, log) as waiter:
            wait_for_line(log, "waiting")
            wait_until(lambda: len(list((root / "v1" / "sessions").iterdir())) == 2)
            time.sleep(0.2)
            assert waiter.poll() is None
            assert "made-by-waiter" not in lines(log)
            maker.send_signal(signal.SIGKILL)
            finish(waiter)
    assert lines(log).count("made-by-waiter") == 1
    # What the killed one left: its work and its session. The next process tidies up.
    assert list((root / "v1" / "tmp").iterdir())
    cache = Cache(root)
    assert cache.get(KEY) is not None
    assert not any((root / "v1" / "tmp").iterdir())
    assert len(list((root / "v1" / "sessions").iterdir())) == 1


def test_the_lock_file_of_the_dead_is_removed(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(HANG, root, log) as maker:
        wait_for_line(log, "making")
        maker.send_signal(signal.SIGKILL)
        maker.wait(PATIENCE_S)
    assert list((root / "v1" / "locks").iterdir())
    Cache(root).get_or_make(Key("engine", "another", {}), lambda _: None)
    assert not any((root / "v1" / "locks").iterdir())
    assert not any((root / "v1" / "tmp").iterdir())


def test_the_work_of_the_living_is_left_alone(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(HANG, root, log):
        wait_for_line(log, "making")
        cache = Cache(root)
        cache.get_or_make(Key("engine", "another", {}), lambda _: None)
        cache.clear()
        assert [path.name for path in (root / "v1" / "tmp").glob("*/files/*")] == ["engine.plan"]
        assert len(list((root / "v1" / "locks").iterdir())) == 1


def test_who_waited_for_a_removed_lock_file_locks_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder, waiter, third = FileLock(path), FileLock(path), FileLock(path)
    holder.acquire()
    waiting = threading.Thread(target=waiter.acquire)
    waiting.start()
    time.sleep(0.1)  # until it waits on the file that is about to be removed
    assert waiting.is_alive()
    assert not third.acquire(wait=False)
    holder.release(remove=True)
    waiting.join(PATIENCE_S)
    assert not third.acquire(wait=False)
    waiter.release(remove=True)
    assert third.acquire(wait=False)
    third.release(remove=True)
    assert not path.exists()


FAIL = """
def make(directory):
    (directory / "engine.plan").write_bytes(b"half")
    say("making")
    wait_for(root.parent / "go")
    raise LookupError("no engine")

try:
    Cache(root).get_or_make(KEY, make)
except LookupError:
    say("failed")
"""


def test_when_the_maker_fails_a_waiter_makes(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(FAIL, root, log) as maker:
        wait_for_line(log, "making")
        with process(TAKE, root, log) as waiter:
            wait_for_line(log, "waiting")
            time.sleep(0.2)
            (tmp_path / "go").touch()
            finish(maker)
            finish(waiter)
    assert lines(log).count("failed") == lines(log).count("made-by-waiter") == 1


HOLD = """
entry = Cache(root).get_or_make(KEY, lambda directory: (directory / "engine.plan").write_bytes(b"plan"))
say("holding")
wait_for(root.parent / "go")
assert (entry.path / "engine.plan").read_bytes() == b"plan"
"""


def test_what_another_living_process_uses_is_neither_evicted_nor_cleared(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(HOLD, root, log) as holder:
        wait_for_line(log, "holding")
        cache = Cache(root, max_bytes=0)
        cache.get_or_make(Key("engine", "another", {}), lambda _: None)
        cleared = cache.clear()
        assert (cleared.entries, cleared.in_use) == (1, 1)
        (tmp_path / "go").touch()
        finish(holder)
    cache.get_or_make(Key("engine", "another", {}), lambda _: None)
    assert [entry.subject for entry in cache.entries()] == ["another"]


def test_what_a_killed_process_used_is_evicted(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(HOLD, root, log) as holder:
        wait_for_line(log, "holding")
        holder.send_signal(signal.SIGKILL)
        holder.wait(PATIENCE_S)
    cache = Cache(root, max_bytes=0)
    cache.get_or_make(Key("engine", "another", {}), lambda _: None)
    assert [entry.subject for entry in cache.entries()] == ["another"]


CHURN = """
import random
random.seed(int(sys.argv[3]))
count = made = 0
for _ in range(80):
    cache = Cache(root, max_bytes=20_000)   # room for four of twelve
    for _ in range(3):
        number = random.randrange(12)
        key = Key("engine", "net", {"number": str(number)})
        content = str(number).encode() * 4_000
        entry = cache.get_or_make(key, lambda directory: (directory / "engine.plan").write_bytes(content))
        count += 1
        made += not entry.cached
        if random.random() < 0.2:
            entry.write_extra("jit", content[:100])
        if random.random() < 0.1:
            cache.entries()
        time.sleep(random.random() * 0.002)
        assert (entry.path / "engine.plan").read_bytes() == content
        assert entry.read_extra("jit") in (None, content[:100])
    cache.close()
say(f"{count}:{made}")
"""


def test_entries_stay_whole_while_others_evict(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(CHURN, root, log, "1") as a, process(CHURN, root, log, "2") as b, process(CHURN, root, log, "3") as c:
        for popen in (a, b, c):
            finish(popen)
    counts = [tuple(map(int, line.split(":"))) for line in lines(log)]
    assert len(counts) == 3
    # Eviction really happened: every entry was made several times over, on average.
    assert sum(made for _, made in counts) > 36
    assert not any((root / "v1" / "tmp").iterdir())
    assert not any((root / "v1" / "locks").iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_protects_its_own_and_leaves_its_parents(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = """
cache = Cache(root)
cache.get_or_make(KEY, lambda directory: (directory / "engine.plan").write_bytes(b"plan"))
child = os.fork()
if child == 0:
    cache.get_or_make(Key("engine", "child", {"of": "a fork"}), lambda directory: None)
    cache.close()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
other = Cache(root, max_bytes=0)
other.get_or_make(Key("engine", "another", {}), lambda directory: None)
assert {entry.subject for entry in other.entries()} == {"net", "another"}, other.entries()
"""
    with process(code, tmp_path / "cache", log) as popen:
        finish(popen)
