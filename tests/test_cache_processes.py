"""The cache under several real processes: one maker, the dead, eviction while others read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_trtcheck
from pytest_trtcheck.cache import Cache, Key

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


def unfinished(root: Path) -> list[Path]:
    return list((root / "v1" / "work").iterdir())


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
    assert not unfinished(root)


NESTED = """
def make(directory):
    say("make-lowered")
    calibration = Cache(root).get_or_make(Key("calibration", "net", {}), make_calibration)
    (directory / "model.onnx").write_bytes((calibration.path / "ranges").read_bytes())

def make_calibration(directory):
    say("make-calibration")
    time.sleep(0.2)
    (directory / "ranges").write_bytes(b"ranges")

say("ready")
wait_for(root.parent / "go")
kind = sys.argv[3]
entry = Cache(root).get_or_make(Key(kind, "net", {}), make_calibration if kind == "calibration" else make)
"""


def test_makes_that_need_each_others_entries_do_not_lock_each_other_out(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with (
        process(NESTED, root, log, "lowered") as a,
        process(NESTED, root, log, "lowered") as b,
        process(NESTED, root, log, "calibration") as c,
    ):
        wait_for_line(log, "ready", 3)
        (tmp_path / "go").touch()
        for popen in (a, b, c):
            finish(popen)
    said = lines(log)
    assert (said.count("make-lowered"), said.count("make-calibration")) == (1, 1)


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
            time.sleep(0.3)
            assert waiter.poll() is None
            assert "made-by-waiter" not in lines(log)
            maker.send_signal(signal.SIGKILL)
            finish(waiter)
    assert lines(log).count("made-by-waiter") == 1
    assert Cache(root).get(KEY) is not None
    # Its half-written work is gone with it: it held a lock on that.
    assert not unfinished(root)


def test_the_work_of_the_living_is_left_alone(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(HANG, root, log):
        wait_for_line(log, "making")
        cache = Cache(root)
        cache.get_or_make(Key("engine", "another", {}), lambda _: None)
        cache.clear()
        assert len(unfinished(root)) == 2
        assert [path.name for path in (root / "v1" / "work").glob("*/entry/files/*")] == ["engine.plan"]


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


USE = """
assert Cache(root).get_or_make(KEY, lambda _: 1 / 0).cached
"""


def test_what_another_process_used_is_not_evicted_for_an_hour(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    path = Cache(root).get_or_make(KEY, lambda directory: (directory / "engine.plan").write_bytes(b"plan")).path
    os.utime(path.parent, (1, 1))
    with process(USE, root, tmp_path / "log") as user:
        finish(user)
    cache = Cache(root, max_bytes=0)
    cache.get_or_make(Key("engine", "another", {}), lambda _: None)
    assert {entry.subject for entry in cache.entries()} == {"net", "another"}
    os.utime(path.parent, (time.time() - 3700, time.time() - 3700))
    cache.get_or_make(Key("engine", "third", {"n": "3"}), lambda _: None)
    assert {entry.subject for entry in cache.entries()} == {"another", "third"}


CHURN = """
import random
from pytest_trtcheck.cache import store

store.GRACE_S = 2.0
random.seed(int(sys.argv[3]))
made = 0
end = time.monotonic() + 8
while time.monotonic() < end:
    cache = Cache(root, max_bytes=20_000)   # room for a few of twenty
    group = int(time.time()) % 5   # four that are used for a second, then rest for four
    for _ in range(3):
        number = 4 * group + random.randrange(4)
        content = str(number).encode() * 4_000
        entry = cache.get_or_make(
            Key("engine", "net", {"number": str(number)}),
            lambda directory: (directory / "engine.plan").write_bytes(content),
        )
        made += not entry.cached
        if random.random() < 0.2:
            entry.write_extra("jit", content[:100])
        if random.random() < 0.1:
            cache.entries()
        time.sleep(random.random() * 0.01)
        assert (entry.path / "engine.plan").read_bytes() == content
        assert entry.read_extra("jit") in (None, content[:100])
say(made)
"""


def test_entries_stay_whole_while_others_evict(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    with process(CHURN, root, log, "1") as a, process(CHURN, root, log, "2") as b, process(CHURN, root, log, "3") as c:
        for popen in (a, b, c):
            finish(popen)
    made = [int(line) for line in lines(log)]
    assert len(made) == 3
    # Eviction really happened: there are twenty keys, and some were made again.
    assert 20 < sum(made) < 60
    assert not unfinished(root)
