"""What takes long, said while it does: in a terminal one line that is replaced, in a log a line now and then.

A worker of pytest-xdist has no terminal: it writes what it does to a file, which the process that has one reads.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pytest

from pytest_trtcheck.errors import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.record.held import HeldFolder

LOG_PACE_S = 10.0
"""How often a log that nobody watches is told what takes so long."""
QUIET_S = 1.0
"""How long nothing was printed before a terminal is told: what is quick is not worth a line."""
_POLL_S = 0.25
FILE = "trtcheck_progress"
"""Under which a worker of pytest-xdist is told where to write."""
_FOLDER: pytest.StashKey[HeldFolder] = pytest.StashKey()
_NAME = "progress"


def tell_worker(node: Any) -> None:
    """Tell a worker of this process where to write what it does, unless nobody would see it."""
    config: pytest.Config = node.config
    from pytest_trtcheck.record.held import HeldFolder

    if not _is_shown(config):
        return
    with suppress(OSError):  # without a place for it, nobody hears the workers
        if _FOLDER not in config.stash:
            # A folder, so that nobody makes the file anew who writes after the end, or on another machine.
            config.stash[_FOLDER] = HeldFolder("trtcheck-progress-")
        node.workerinput[FILE] = str(Path(config.stash[_FOLDER].name, _NAME))


def _is_shown(config: pytest.Config) -> bool:
    return config.pluginmanager.hasplugin("terminalreporter") and config.getoption("verbose") >= 0


class Progress:
    """What this process does, and where that is shown.

    Called with a line, it shows that as what the test does now; an empty one is nothing.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._doing: list[str] = []
        path = getattr(config, "workerinput", {}).get(FILE)
        self._shown: _File | _Screen | None = None
        if path is not None:
            self._shown = _File(Path(path))
        elif not hasattr(config, "workerinput") and _is_shown(config):
            self._shown = _Screen(config, config.stash.get(_FOLDER, None))

    def __call__(self, line: str) -> None:
        """Show what the test does now."""
        if self._shown is not None:
            self._shown.show(line)

    @contextmanager
    def during(self, line: str) -> Iterator[None]:
        """Show a line while something is done; what was done before goes on behind it."""
        self._doing.append(line)
        self(line)
        try:
            yield
        finally:
            self._doing.pop()
            self(self._doing[-1] if self._doing else "")

    def reported(self, report: pytest.TestReport) -> None:
        """Make room for what pytest prints of a test."""
        if isinstance(self._shown, _Screen):
            self._shown.reported(has_letter=report.when == "call" or report.outcome != "passed")

    def ended(self) -> None:
        """A test of this process has ended, and with it what it did."""
        self._doing.clear()
        self("")

    def close(self) -> None:
        """Take away the line that is there, and end what shows it."""
        if self._shown is not None:
            self._shown.close()


class _File:
    """A worker's side."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ""

    def show(self, line: str) -> None:
        if line == self._last:
            return
        self._last = line
        said = json.dumps([os.environ.get("PYTEST_XDIST_WORKER", ""), line]) + "\n"
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(said)

    def close(self) -> None:
        self.show("")


class _Screen:
    """A terminal's or a log's side.

    It writes past pytest's capturing, to the stream as it was before the first test. A thread writes, so that the
    seconds go on while a builder keeps the process busy.
    """

    def __init__(self, config: pytest.Config, folder: HeldFolder | None) -> None:
        self._reporter: Any = config.pluginmanager.getplugin("terminalreporter")
        self._stream = _stream_of(self._reporter)
        self._is_terminal = bool(self._reporter.isatty)
        self._folder = folder
        self._workers, self._read = None if folder is None else Path(folder.name, _NAME), 0
        self._doing: dict[str, tuple[str, float]] = {}
        self._printed = time.monotonic()
        self._broken: Path | None = None
        self._drawn = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if folder is not None:
            self._start()

    def show(self, line: str) -> None:
        if self._stream is None:
            return
        with self._lock:
            self._set("", line)
            if not self._is_terminal:
                self._log()
        if line:
            self._start()

    def reported(self, *, has_letter: bool) -> None:
        with self._lock:
            self._erase()
            self._printed = time.monotonic()
            file, self._broken = (self._broken, None) if has_letter else (None, self._broken)
        if file is not None and self._reporter.currentfspath is None:
            # The line of the test's file, which was broken off, begins anew.
            self._reporter.currentfspath = file
            self._reporter._tw.write(f"{os.path.relpath(file, self._reporter.startpath)} ")

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        with self._lock:
            self._doing.clear()
            self._erase()
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        if self._thread is None and self._stream is not None:
            self._thread = threading.Thread(target=self._run, name="trtcheck-progress", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            with self._lock:
                self._read_workers()
                if self._is_terminal:
                    self._draw()
                else:
                    self._log()

    def _set(self, who: str, line: str) -> None:
        if not line:
            self._doing.pop(who, None)
        elif self._doing.get(who, ("",))[0] != line:
            self._doing[who] = line, time.monotonic()

    def _read_workers(self) -> None:
        if self._workers is None:
            return
        with suppress(OSError, ValueError), self._workers.open(encoding="utf-8") as file:
            file.seek(self._read)
            while (text := file.readline()).endswith("\n"):
                self._read = file.tell()
                self._set(*json.loads(text))

    def _texts(self) -> list[str]:
        now = time.monotonic()
        return [
            visible(" ".join(f"{who} {line}".split())) + (f", {now - since:.0f} s" if now - since >= QUIET_S else "")
            for who, (line, since) in self._doing.items()
        ]

    def _draw(self) -> None:
        from pytest_trtcheck.report.text import columns, shorten_middle

        texts = self._texts()
        if not texts or time.monotonic() - self._printed < QUIET_S:
            return self._erase()
        if not self._drawn:
            self._begin_line()
        width = self._width() - 1
        room = width - len("trtcheck: ")
        share = max(room // len(texts) - len(" | "), 8) if len(texts) > 1 else room
        line = f"trtcheck: {' | '.join(shorten_middle(each, share) for each in texts)}"
        text = shorten_middle(line, width)
        self._write("\r" + self._reporter._tw.markup(text, light=True) + " " * max(0, self._drawn - columns(text)))
        self._drawn = columns(text)
        return None

    def _width(self) -> int:
        """The terminal's columns: not by pytest's own stream, which is no terminal while it is captured."""
        with suppress(OSError, ValueError, AttributeError):
            given = os.environ.get("COLUMNS", "")
            if found := int(given) if given.isdigit() else 0:
                return found
            # One that nobody told its size, as in a container or under `expect`, has no columns.
            if found := os.get_terminal_size(self._stream.fileno()).columns:  # type: ignore[union-attr]
                return found
        return int(self._reporter._tw.fullwidth)

    def _erase(self) -> None:
        if self._drawn:
            self._write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _log(self) -> None:
        """Tell a log, where nothing was printed for so long."""
        now = time.monotonic()
        texts = self._texts()
        if texts and now - self._printed >= LOG_PACE_S:
            self._printed = now
            self._begin_line()
            self._write("".join(f"trtcheck: {text} …\n" for text in texts))

    def _begin_line(self) -> None:
        writer = self._reporter._tw
        if self._reporter.currentfspath or getattr(writer, "width_of_current_line", 0):
            self._write("\n")
            file = self._reporter.currentfspath
            self._broken = file if isinstance(file, Path) else None
            # As its own `ensure_newline`, which would write into what is captured.
            self._reporter.currentfspath = None
            if hasattr(writer, "_current_line"):
                writer._current_line = ""

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.write(text)
                self._stream.flush()


def _stream_of(reporter: Any) -> TextIO | None:
    """What the reporter writes to, as it is now, whatever is captured later; None where it is no file."""
    file = reporter._tw._file
    try:
        file.flush()
        number = os.dup(file.fileno())
    except (AttributeError, OSError, ValueError):
        return None
    return open(number, "w", encoding=getattr(file, "encoding", None) or "utf-8", errors="replace")  # noqa: PTH123 - a descriptor, which `close` closes
