"""Work that is done in a process of its own: a crash there is an error like any other, and can be stopped.

The other process answers one request at a time, and may be kept for many. It ends with the one that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pytest_trtcheck.errors import lacked_threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

OUTPUT_TAIL = 4000
"""How much of what a process wrote to its output is quoted, in bytes."""
_ANSWER = b"\x1e"
"""Begins the line of an answer; what else stands on the way was printed while Python itself started."""
_WINDOWS_ERROR = 0xC0000000
"""From here on, an exit status on Windows is the exception that ended the process (NTSTATUS, severity "error")."""
_LETTING_GO_S = 5.0
_TICK_S = 1.0
"""A wait that takes longer, in seconds, counts as this: all was stopped meanwhile (Ctrl-Z, a paused container)."""

# Without the working folder in its path (Python's -P, which 3.10 lacks), the child finds its standard library first,
# whatever lies there; the paths that only this process has, from conftest files or a source tree, come behind.
_BOOTSTRAP = (
    "import sys; sys.path[:1] = [path for path in sys.path[:1] if path]; "
    "import json; start = json.loads(sys.stdin.buffer.readline())['value']; "
    "sys.path += [path for path in start.pop('sys_path') if path not in sys.path]; "
    "from pytest_trtcheck.model.apart import work; work(**start)"
)


Blob: TypeAlias = "bytes | bytearray | memoryview"


class Answer(NamedTuple):
    """What JSON can hold, and bytes beside it."""

    value: Any
    blobs: Sequence[Blob] = ()


def _write(pipe: IO[bytes], mark: bytes, value: Any, blobs: Sequence[Blob]) -> None:
    head = {"value": value, "sizes": [len(blob) for blob in blobs]}
    pipe.write(mark + json.dumps(head).encode() + b"\n")
    for blob in blobs:
        pipe.write(blob)
    pipe.flush()


def _read(pipe: IO[bytes], line: bytes) -> Answer | None:
    """What begins with this line; None where the pipe ends before it does."""
    head = json.loads(line)
    blobs = [bytearray(size) for size in head["sizes"]]
    for blob in blobs:
        room = memoryview(blob)
        while room:
            count = pipe.readinto(room)  # type: ignore[attr-defined]  # pipes of Popen are buffered, or raw, and have it
            if not count:
                return None
            room = room[count:]
    return Answer(head["value"], blobs)


class EndedError(Exception):
    """The process ended, or was stopped, before it answered; the text says how, and quotes the end of its output.

    Parameters
    ----------
    crashed
        Whether a signal (on Windows an exception) ended it, and not its own code.
    timed_out
        Whether it was stopped because the time was over.
    """

    def __init__(self, reason: str, *, crashed: bool = False, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.crashed = crashed
        self.timed_out = timed_out


class Process:
    """A process of its own that answers requests.

    It is there at once, and gets ready while the caller goes on.

    Parameters
    ----------
    serve
        What it does, as "module:function": each request is given to the function, whose result is the answer. Both
        are what JSON can hold, or an `Answer` with bytes beside it. An exception of the function's ends the process.
    title
        What messages call it, such as "the builder process".
    memory_bytes
        The most that it may allocate, where the system can hold it to that (Linux); None: no limit.
    """

    def __init__(self, serve: str, title: str, *, memory_bytes: int | None = None) -> None:
        self._title = title
        self._found_ended: EndedError | None = None
        self._output: IO[bytes] = TemporaryFile("a+b")  # noqa: SIM115 - it is closed with the process
        start = {"sys_path": sys.path, "parent": os.getpid(), "serve": serve, "memory_bytes": memory_bytes}
        # The kernel ends it with the thread that started it, which in a pool is not the end of the session.
        start["dies_with_parent"] = threading.current_thread() is threading.main_thread()
        self._child = subprocess.Popen(
            # Warnings of the libraries must not become errors because of the caller's settings.
            [sys.executable, "-W", "ignore", "-c", _BOOTSTRAP, serve],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _close, self._child, self._output)
        """End it and whatever it started; calling it twice is harmless."""
        with contextlib.suppress(OSError):  # that it has died is said when it is asked
            self._send(start)

    def ask(self, request: dict[str, Any], timeout_s: float | None = None) -> Any:
        """Its answer to a request."""
        return self.exchange(request, (), timeout_s).value

    def exchange(self, request: dict[str, Any], blobs: Sequence[Blob], timeout_s: float | None = None) -> Answer:
        """Its answer to a request with bytes beside it: the function is given a list of them as "blobs".

        Raises
        ------
        EndedError
            It crashed, ended or was still at it after `timeout_s` seconds; it is gone then, and says so each time.
        """
        if not self.close.alive:
            raise self._found_ended or EndedError(f"{self._title} was ended before it was asked")
        over, done = threading.Event(), threading.Event()

        def watch(left: float) -> None:
            while left > 0:
                step = min(left, _TICK_S)
                if done.wait(step):
                    return
                left -= step
            over.set()
            _kill(self._child)

        try:
            with contextlib.suppress(ValueError, OSError):
                self._output.seek(0)
                self._output.truncate()
            if timeout_s is not None:
                threading.Thread(target=watch, args=(timeout_s,), daemon=True).start()
            answer = self._answer(request, blobs)
        except BaseException:  # whoever interrupts this leaves an answer behind that fits no later request
            self.close()
            raise
        finally:
            done.set()
        if answer is not None and not over.is_set():
            return answer
        self._found_ended = self._ended(timeout_s if over.is_set() else None)
        self.close()
        raise self._found_ended

    def said(self) -> str:
        """The end of what it wrote to its output since it was asked."""
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - OUTPUT_TAIL))
        return self._output.read().decode(errors="replace").strip()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: dict[str, Any], blobs: Sequence[Blob] = ()) -> None:
        assert self._child.stdin is not None
        _write(self._child.stdin, b"", message, blobs)

    def _answer(self, request: dict[str, Any], blobs: Sequence[Blob]) -> Answer | None:
        """The next answer; None where the process has ended."""
        assert self._child.stdout is not None
        with contextlib.suppress(OSError):
            self._send(request, blobs)
        for line in self._child.stdout:
            if line.startswith(_ANSWER):
                return _read(self._child.stdout, line.removeprefix(_ANSWER))
        return None

    def _ended(self, timeout_s: float | None) -> EndedError:
        """How it ended; `timeout_s` where that was because the time was over."""
        if timeout_s is not None:
            return EndedError(f"it did not finish within {timeout_s:g} s and was stopped", timed_out=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_LETTING_GO_S)
        _kill(self._child)
        reason, crashed = ending(self._child.wait(), self._title)
        said = self.said()
        if lacked_threads(said):
            return EndedError(f"{self._title} could not go on: {said.splitlines()[-1]}")
        return EndedError(f"{reason}; its output ends with:\n{said}" if said else reason, crashed=crashed)


def ending(status: int, title: str) -> tuple[str, bool]:
    """How a process ended that has this exit status, in words, and whether it crashed."""
    if status < 0:
        return f"{title} crashed ({_signal_name(-status)})", True
    if status >= _WINDOWS_ERROR:
        return f"{title} crashed (0x{status:08X})", True
    return f"{title} ended with exit status {status}", False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a process and what it started."""
    if child.poll() is None:
        if sys.platform == "win32":  # No process groups; ours start nothing of their own.
            child.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _close(child: subprocess.Popen[bytes], output: IO[bytes]) -> None:
    _kill(child)
    child.wait()
    for pipe in (child.stdin, child.stdout, output):
        with contextlib.suppress(OSError):  # what was still to be written has no reader
            if pipe is not None:
                pipe.close()


# --- in the other process --------------------------------------------------------------------------------------------


def work(serve: str, parent: int, *, dies_with_parent: bool, memory_bytes: int | None) -> None:
    """Answer requests until there is nobody left to ask."""
    if dies_with_parent:
        _die_with(parent)
    _hold_to(memory_bytes)
    _end_before_others()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    requests: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, requests), daemon=True).start()
    try:
        module, _, name = serve.partition(":")
        function = getattr(importlib.import_module(module), name)
        while True:
            request, blobs = requests.get()
            answer = function({**request, "blobs": blobs} if blobs else request)
            if not isinstance(answer, Answer):
                answer = Answer(answer)
            sys.stdout.flush()
            _write(answers, _ANSWER, *answer)
            del request, blobs, answer  # what they hold is not to wait for the next request
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # Libraries' own teardown has crashed; all that counts was written.
        os._exit(1)


def _receive(pipe: IO[bytes], requests: queue.SimpleQueue[Answer]) -> None:
    """Pass requests on; where the other end is gone, so is this process, whatever it is at."""
    try:
        while (line := pipe.readline()) and (request := _read(pipe, line)) is not None:
            requests.put(request)
            del request
    except MemoryError:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when the one that waits for it is killed (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # It was killed before that.
            os._exit(1)


def _end_before_others() -> None:
    """Where no memory is left, in the machine or the container, let the kernel end this process, not the session."""
    with contextlib.suppress(OSError), pathlib.Path("/proc/self/oom_score_adj").open("w", encoding="ascii") as file:
        file.write("1000")


def _hold_to(memory_bytes: int | None) -> None:
    """Let allocations beyond a limit fail, as if there were no more; elsewhere than on Linux nothing holds to it."""
    if memory_bytes is not None and sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, most))
