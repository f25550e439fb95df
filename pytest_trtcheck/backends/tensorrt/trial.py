"""The first load and run of an engine on a GPU, in a process of its own: TensorRT has ended processes that did it.

An engine that came through is marked with where that was, and is loaded at once from then on; what TensorRT-RTX
compiled is handed over, so that nothing is compiled twice. Who only wants to know what it computes goes on where it was
tried. One that ended the process gets no mark: whoever asks for it again tries again, without building it again, so
that no verdict is older than the check. Only what had to be stopped is not waited for again at once.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.layers import Inspected
from pytest_trtcheck.backends.tensorrt.support import advice
from pytest_trtcheck.cache import hash_bytes, scratch_folder
from pytest_trtcheck.errors import CacheError, CheckError, GpuError, InputError
from pytest_trtcheck.gpu.device import Gpu, identity_parts
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.model.apart import Answer
from pytest_trtcheck.model.packing import packed, refusal, refused, unpacked
from pytest_trtcheck.record import typed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import TensorRTModule
    from pytest_trtcheck.cache import Entry
    from pytest_trtcheck.model.apart import Blob, Process
    from pytest_trtcheck.spec import InputMapping

KERNELS = "jit.cache"
LOAD_LIMIT_S, RUN_LIMIT_S = 600.0, 300.0
STOPPED_S = 3600.0
"""How long an engine that had to be stopped is not tried again, in seconds."""
_MOST_SHAPES = 8


@dataclass(frozen=True)
class Trial:
    """An engine that is to be loaded and run, and where.

    Parameters
    ----------
    sha256
        Of the plan: a mark is of these bytes alone.
    label
        What messages call it.
    arguments
        What `Engine` is given beside the plan, as JSON can hold it.
    cases
        What it is fed: the first of each shape; none: it is only loaded.
    """

    module: TensorRTModule
    gpu: Gpu
    plan: Path
    sha256: str
    label: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cases: Sequence[InputMapping] = ()

    @property
    def _mark(self) -> dict[str, Any]:
        place = {"module": self.module.title, **identity_parts(self.gpu), "driver": str(self.gpu.driver)}
        return {"sha256": self.sha256, **place, "profile": self.arguments.get("profile", 0), "ran": bool(self.cases)}

    def _name(self, what: str) -> str:
        """A file for each place, since several kinds of GPU may share an entry."""
        return f"{what}-{hash_bytes(json.dumps(self._mark, sort_keys=True).encode())[:32]}.json"

    def is_done(self, entry: Entry) -> bool:
        """Whether this engine was loaded and run on such a GPU."""
        name = self._name("tried")
        return (entry.path / name).exists() or entry.read_extra(name) is not None

    def into(self, folder: Path, process: Process) -> EngineApart:
        """Load and run it in `process`, which built it, and leave mark and kernels in the new entry's folder.

        The process is the engine's from then on; where that fails, it is ended.

        Raises
        ------
        GpuError
            It cannot be loaded or run; or it ended the process, or had to be stopped.
        """
        engine = EngineApart(self, process, None)
        if kernels := engine.kernels:
            (folder / KERNELS).write_bytes(kernels)
        (folder / self._name("tried")).write_text(json.dumps(self._mark))
        return engine

    def beside(self, entry: Entry) -> EngineApart | None:
        """The same for an engine that is in the cache; None where it was tried here before.

        Raises
        ------
        GpuError
            As `into`; of an engine that had to be stopped within the last hour, as it was then.
        """
        if self.is_done(entry):
            return None
        self._recall_stopped(entry)
        try:
            engine = EngineApart(self, tensorrt.expected_builder(), kernels_of(entry))
        except StoppedError as error:
            stopped = _Stopped(time.time(), error.message)
            with suppress(CacheError):
                entry.write_extra(self._name("stopped"), json.dumps(asdict(stopped)).encode())
            raise
        # A cache that is read-only serves; there it is tried each time.
        with suppress(CacheError):
            if kernels := engine.kernels:
                entry.write_extra(KERNELS, kernels)
            entry.write_extra(self._name("tried"), json.dumps(self._mark).encode())
        return engine

    def _recall_stopped(self, entry: Entry) -> None:
        found = entry.recall(self._name("stopped"), lambda kept: typed(json.loads(kept), _Stopped))
        ago = math.inf if found is None else time.time() - found.at
        if found is not None and 0 <= ago < STOPPED_S:
            left = math.ceil((STOPPED_S - ago) / 60)
            raise StoppedError(
                f"{found.message}\n(that was {ago / 60:.0f} min ago; nobody waited for it again)",
                f"it is tried again in {left} min, or once the cache is emptied, --trt-cache-clear",
            )

    def ended(self, task: str, answered: tensorrt.Answered) -> GpuError:
        """What is said where its process ended, or was stopped."""
        done = "loaded" if task == "load" else "run"
        said = [f"    {line}" for text in answered.messages[-5:] for line in text.splitlines()]
        last = "\n".join([f"\n  {self.module.title} said last:", *said]) if said else ""
        text = (
            f"{self.module.title}: {self.label} was not {done}: in a process of its own, where a new engine is loaded "
            f"and run for the first time, {answered.ended.replace('timeout_s=', '')}{last}"
        )
        hints = [*advice(text, is_rtx=self.module.is_rtx), "try another precision, keep_fp32=[…], or another TensorRT"]
        kind = StoppedError if answered.timed_out else GpuError
        return kind(text, "\n  → ".join(dict.fromkeys(hints)))


@dataclass(frozen=True)
class _Stopped:
    """What had to be stopped: when, in seconds since the epoch, and what was said of it."""

    at: float
    message: str


class StoppedError(GpuError):
    """An engine was not loaded or run within the time that is allowed."""

    usual_code = "engine-stopped"


def kernels_of(entry: Entry) -> bytes | None:
    """What TensorRT-RTX compiled for an engine in the cache: what was kept last, or came with it."""
    made = entry.path / KERNELS
    return entry.read_extra(KERNELS) or (made.read_bytes() if made.exists() else None)


def plan_bytes(path: Path, sha256: str, label: str) -> bytes:
    """The serialized engine in a file, the very bytes that were looked at; a GpuError where it holds others by now."""
    plan = path.read_bytes()
    if hash_bytes(plan) != sha256:
        raise GpuError(f"{label}: was changed on disk during the check", "run the test again", code="model-changed")
    return plan


_TELLS = ("device_memory_bytes", "context_bytes", "aux_streams", "streamed_bytes")
"""What a loaded engine tells of itself, beside its layers."""


class EngineApart(Inspected):
    """An engine that was just tried, in the process in which it was: for what it computes, not for how fast.

    It is run and closed like an `Engine`.
    """

    def __init__(self, trial: Trial, process: Process, kernels: bytes | None) -> None:
        """Have the engine loaded, and run with a case of each shape, in `process`, which is ended where that fails."""
        self._trial, self._process, self._held = trial, process, ExitStack()
        try:
            self._held.enter_context(process)
            self._messages = Path(self._held.enter_context(scratch_folder("trial")), "messages.jsonl")
            self._load(kernels or b"")
            if trial.cases:
                # Others may be measuring; nobody is held up while it is only loaded.
                with gpu_lock(trial.gpu.lock_name):
                    for case in _first_of_each_shape(trial.cases):
                        with suppress(InputError):  # The check says so itself.
                            self(case)
            _, (compiled,) = self._asked("kernels", {})
        except BaseException:
            self.close()
            raise
        self.kernels = bytes(compiled)
        """What TensorRT-RTX had compiled once it was tried."""

    def _load(self, kernels: bytes) -> None:
        trial = self._trial
        about = {"module": trial.module.name, "label": trial.label, "model": str(trial.plan.resolve())}
        told, _ = self._asked("load", {**about, "sha256": trial.sha256, "arguments": dict(trial.arguments)}, [kernels])
        self.title = trial.module.title
        self.device_memory_bytes: int = told["device_memory_bytes"]
        self.context_bytes: int = told["context_bytes"]
        self.aux_streams: int = told["aux_streams"]
        self.streamed_bytes: int | None = told["streamed_bytes"]
        self._information: str = told["information"]

    def _asked(
        self, task: Literal["load", "run", "kernels"], request: dict[str, Any], blobs: Sequence[Blob] = ()
    ) -> tuple[dict[str, Any], Sequence[Blob]]:
        """What the other process answers, and bytes beside it; a CheckError as the engine there raised it."""
        limit_s = LOAD_LIMIT_S if task == "load" else RUN_LIMIT_S
        about = {**request, "messages": str(self._messages)}
        answered = tensorrt.called(self._process, f"{__name__}:{task}", about, blobs, limit_s)
        if answered.response is None:
            raise self._trial.ended(task, answered)
        if (error := refused(answered.response)) is not None:
            raise error
        return answered.response, answered.blobs

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once: arrays by input name in, arrays by output name out, in the model's order.

        Raises
        ------
        InputError
            The inputs do not fit the engine.
        GpuError
            The run failed, took too long, or ended the process.
        """
        described, blobs = packed({name: np.asarray(array) for name, array in inputs.items()})
        answer, given = self._asked("run", {"arrays": described}, blobs)
        return unpacked(answer["arrays"], given)

    def layer_information(self) -> str:
        """What the engine inspector said of every layer, as JSON."""
        return self._information

    def new_kernels(self) -> None:
        """Nothing: what was compiled was kept when it was tried."""

    def close(self) -> None:
        """End the process; calling it twice is harmless."""
        self._held.close()


def _first_of_each_shape(cases: Sequence[InputMapping]) -> list[InputMapping]:
    first: dict[tuple[Any, ...], InputMapping] = {}
    for case in cases:
        first.setdefault(tuple((name, np.shape(array)) for name, array in case.items()), case)
    return [*first.values()][:_MOST_SHAPES]


# --- in the other process ---------------------------------------------------------------------------------------------

_loaded: list[Engine] = []


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Load an engine and keep it; what it tells of itself."""
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import find_module

    module, (kernels,) = find_module(request["module"]), request["blobs"]
    try:
        plan = plan_bytes(Path(request["model"]), request["sha256"], request["label"])
        engine = Engine(plan, module, jit_cache=bytes(kernels) or None, **request["arguments"])
        _loaded[:] = [engine]
        return {"information": engine.layer_information(), **{name: getattr(engine, name) for name in _TELLS}}
    except CheckError as error:
        return _refused(error)


def run(request: dict[str, Any]) -> Answer | dict[str, Any]:
    """What the engine that was loaded last computes."""
    (engine,) = _loaded
    try:
        described, blobs = packed(engine(unpacked(request["arrays"], request.get("blobs", ()))))
    except CheckError as error:
        return _refused(error)
    return Answer({"arrays": described}, blobs)


def kernels(request: dict[str, Any]) -> Answer:
    """What TensorRT-RTX has compiled for it."""
    del request
    (engine,) = _loaded
    return Answer({}, [engine.jit_cache() or b""])


def _refused(error: CheckError) -> dict[str, Any]:
    is_broken = isinstance(error, GpuError) and error.poisoned
    # What it says of "this process" is of this one.
    return refusal(error, "the session can go on: that was in another process" if is_broken else None)
