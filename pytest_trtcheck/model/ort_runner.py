"""ONNX Runtime's CPU provider in a process of its own: a model that crashes it, takes all memory or never ends is an
error of its check, and the session goes on.

One such process serves all of a session's models. It is started when the first is to run, and again when it has died.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.cache import format_bytes
from pytest_trtcheck.errors import MORE_PROCESSES, CheckError, ModelError, lacked_threads
from pytest_trtcheck.model import memory
from pytest_trtcheck.model.apart import Answer, EndedError, Process
from pytest_trtcheck.model.packing import packed, refusal, refused, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.model.apart import Blob
    from pytest_trtcheck.model.onnxruntime import OrtSession, Provider
    from pytest_trtcheck.spec import InputMapping

_TITLE = "ONNX Runtime's process"
_BYTES_A_SECOND = 10e6
"""How much of a model's files is loaded in a second at the least."""
_PRODUCTS_A_SECOND = 10e9
"""Bytes of the model times bytes of the inputs: what every weight may have to do with every input, in a second."""
_LONGEST_S = 3600.0
_STARTING_S = 300.0
_NO_MEMORY = re.compile(r"bad.?alloc|failed to allocate|MemoryError|cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """What a model on ONNX Runtime may take.

    Parameters
    ----------
    memory_bytes
        Of memory, all that are open together; None: half of the machine's. Linux alone holds a process to it.
    seconds
        For a load or a run of a model that is worth nothing; those of large models and inputs have more.
    """

    memory_bytes: int | None = None
    seconds: float = 30.0

    @property
    def allowed_bytes(self) -> int:
        """The memory in bytes."""
        return memory.total_bytes() // 2 if self.memory_bytes is None else self.memory_bytes

    def allowed_s(self, model_bytes: int, input_bytes: int) -> float:
        """How long a load or a run may take: no more than its files and inputs can be worth."""
        worth_s = model_bytes / _BYTES_A_SECOND + model_bytes * input_bytes / _PRODUCTS_A_SECOND
        return self.seconds + min(worth_s, max(0.0, _LONGEST_S - self.seconds))


class _Host:
    """The process, once it is needed, and what is said when it dies."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.dropped: deque[tuple[Process, int]] = deque()
        self._process: Process | None = None
        self._is_up = False
        self._owner = os.getpid()
        self.lock = threading.RLock()
        """Held by whoever has more to ask than one thing."""

    def settle(self, limits: Limits) -> None:
        """Hold to other limits from now on."""
        with self.lock:
            if limits != self.limits:
                self.end()
            self.limits = limits

    def end(self) -> None:
        """End the process; the next model starts it again."""
        if self._process is not None and self._owner == os.getpid():
            self._process.close()
        self._process = None

    def process(self) -> Process:
        """The process, started now if need be."""
        with self.lock:
            if self._process is None or self._owner != os.getpid():  # A fork has no use for its parent's.
                self._owner = os.getpid()
                self._process = Process(f"{__name__}:serve", _TITLE, memory_bytes=self.limits.allowed_bytes)
                self._is_up = False
            return self._process

    def has(self, process: Process) -> bool:
        """Whether it is the one that is there."""
        return process is self._process

    def ask(
        self, process: Process, request: dict[str, Any], blobs: Sequence[Blob], allowed_s: float, doing: str
    ) -> Answer:
        """The answer of a process that is there.

        Raises
        ------
        ModelError
            It died of the request, was stopped, or ran out of memory.
        CheckError
            As in this process.
        """
        with self.lock:
            drop = [number for of, number in self.dropped if of is process]
            self.dropped.clear()
            try:
                if not self._is_up:  # what a busy machine takes for that is no model's time
                    process.ask({"do": "start", "drop": []}, _STARTING_S)
                    self._is_up = True
                answer = process.exchange({**request, "drop": drop}, blobs, allowed_s)
            except EndedError as ended:
                self._process = None
                raise self._died(ended, allowed_s, doing) from None
            except BaseException:
                self._process = None
                raise
        if (error := refused(answer.value)) is not None:
            if _NO_MEMORY.search(error.message):
                raise ModelError(f"{error.message}; {self._had()}", _LESS_MEMORY, code="out-of-memory")
            raise error
        return answer

    def _had(self) -> str:
        whose = "half of this machine's memory" if self.limits.memory_bytes is None else "trt_memory_limit"
        return f"it may take {format_bytes(self.limits.allowed_bytes)} ({whose})"

    def _died(self, ended: EndedError, allowed_s: float, doing: str) -> ModelError:
        if ended.timed_out:
            return ModelError(
                f"{doing}: ONNX Runtime did not finish within {allowed_s:.0f} s and was stopped",
                "look for a Loop that does not end; where it is only slow, give smaller inputs, or more time with the "
                "ini key trt_time_limit",
                code="runtime-stopped",
            )
        if _NO_MEMORY.search(str(ended)) or "(SIGKILL)" in str(ended):
            killed = "" if _NO_MEMORY.search(str(ended)) else ", most likely for want of memory"
            return ModelError(f"{doing}: {ended}{killed}; {self._had()}", _LESS_MEMORY, code="out-of-memory")
        if lacked_threads(str(ended)):
            return ModelError(f"{doing}: {ended}", MORE_PROCESSES, code="too-many-processes")
        return ModelError(
            f"{doing}: {ended}",
            "the session goes on without it; check the model and its custom_ops with ONNX Runtime alone, or give the "
            "reference itself: reference=…",
            code="runtime-stopped",
        )


_LESS_MEMORY = (
    "give smaller inputs, batch= or shapes=; where the machine has more to give, raise the ini key trt_memory_limit"
)
_HOST = _Host()
settle = _HOST.settle


def expect() -> None:
    """Get the process ready: a model will be run soon, and until then there is something else to do."""
    with contextlib.suppress(OSError):  # it is said when a model is to run
        _HOST.process()


@dataclass
class _Opened:
    """A session in the other process, by its number there."""

    process: Process
    number: int
    drop: Callable[[], object] = field(repr=False)


class OrtRunner:
    """A model on ONNX Runtime. On the CPU it is loaded and run in another process; CUDA's provider runs in this one.

    Parameters and errors are those of `onnxruntime.OrtSession`. A model that ends, outstays or overfills the other
    process is a ModelError, too.
    """

    def __init__(
        self,
        path: Path,
        label: str,
        provider: Provider = "cpu",
        *,
        custom_ops: Sequence[str] = (),
        in_order: bool = False,
    ) -> None:
        self._label = label
        self._here: OrtSession | None = None
        self._opened: _Opened | None = None
        if provider != "cpu":
            from pytest_trtcheck.model.onnxruntime import OrtSession

            self._here = OrtSession(path, label, provider, custom_ops=custom_ops, in_order=in_order)
            return
        path = Path(path).resolve()
        libraries = [str(Path(library).resolve()) for library in custom_ops]
        self._request = {"path": str(path), "label": label, "custom_ops": libraries, "in_order": in_order}
        self._bytes = _files_bytes(path)
        self._open()

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """The outputs by name, in the model's order.

        Raises
        ------
        ModelError
            The run failed; the message quotes ONNX Runtime.
        """
        if self._here is not None:
            return self._here(inputs)
        with _HOST.lock:
            opened = self._opened
            if opened is None or opened.process is not _HOST.process():  # It has died of another model.
                opened = self._open()
            arrays = {name: np.asarray(array) for name, array in inputs.items()}
            described, blobs = packed(arrays)
            allowed_s = _HOST.limits.allowed_s(self._bytes, sum(map(len, blobs)))
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            request = {"do": "run", "number": opened.number, "arrays": described}
            doing = f"{self._label}, on {shapes}" if shapes else self._label
            answer = _HOST.ask(opened.process, request, blobs, allowed_s, doing)
        return unpacked(answer.value, answer.blobs)

    def _open(self) -> _Opened:
        with _HOST.lock:
            process = _HOST.process()
            allowed_s = _HOST.limits.allowed_s(self._bytes, 0)
            answer = _HOST.ask(process, {"do": "open", **self._request}, (), allowed_s, f"{self._label}, being loaded")
        # What nobody closes goes with the next request.
        drop = weakref.finalize(self, _HOST.dropped.append, (process, answer.value))
        drop.atexit = False
        self._opened = _Opened(process, answer.value, drop.detach)
        return self._opened

    def close(self) -> None:
        """Free the session."""
        if self._here is not None:
            self._here.close()
        opened, self._opened = self._opened, None
        if opened is None:
            return
        opened.drop()
        with _HOST.lock, contextlib.suppress(ModelError):
            if _HOST.has(opened.process):
                _HOST.ask(opened.process, {"do": "close", "number": opened.number}, (), 60.0, self._label)


def _files_bytes(path: Path) -> int:
    """The bytes of a model's file, and of the files beside it, in which its weights may lie."""
    with contextlib.suppress(OSError):
        return sum(each.stat().st_size for each in os.scandir(path.parent) if each.is_file()) or path.stat().st_size
    return 0


# --- in the other process --------------------------------------------------------------------------------------------


@functools.cache
def _sessions() -> tuple[dict[int, OrtSession], itertools.count[int]]:
    return {}, itertools.count()


def serve(request: dict[str, Any]) -> Any:
    """Get ready, or load, run or free a model."""
    from pytest_trtcheck.model.onnxruntime import OrtSession, module

    sessions, numbers = _sessions()
    for number in request["drop"]:
        sessions.pop(number, None)
    try:
        if request["do"] == "run":
            inputs = unpacked(request["arrays"], request.get("blobs", ()))
            return Answer(*packed(sessions[request["number"]](inputs)))
        if request["do"] == "close":
            sessions.pop(request["number"], None)
            return None
        if request["do"] == "start":
            memory.give_back()
            module()
            return None
        session = OrtSession(
            Path(request["path"]), request["label"], custom_ops=request["custom_ops"], in_order=request["in_order"]
        )
    except CheckError as error:
        return refusal(error)
    except MemoryError as error:
        return refusal(ModelError(f"out of memory: MemoryError {error}".strip(), code="out-of-memory"))
    number = next(numbers)
    sessions[number] = session
    return number
