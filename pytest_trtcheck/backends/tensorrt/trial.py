"""The first load and run of an engine on a GPU, in a process of its own: TensorRT has ended processes that did it.

An engine that came through is marked with where that was, and is loaded at once from then on; what TensorRT-RTX
compiled is handed over, so that nothing is compiled twice. One that ended the process gets no mark: whoever asks for it
again tries again, without building it again, so that no verdict is older than the check. Only what had to be stopped is
not waited for again at once.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.support import advice
from pytest_trtcheck.cache import hash_bytes, scratch_folder
from pytest_trtcheck.errors import CacheError, CheckError, GpuError
from pytest_trtcheck.gpu.device import Gpu, identity_parts
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.record import typed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import TensorRTModule
    from pytest_trtcheck.cache import Entry
    from pytest_trtcheck.model.apart import Process
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

    def into(self, folder: Path, process: Process) -> None:
        """Load and run it in `process`, which built it, and leave mark and kernels in the new entry's folder.

        Raises
        ------
        GpuError
            It cannot be loaded or run; or it ended the process, or had to be stopped.
        """
        if kernels := self._made(None, process):
            (folder / KERNELS).write_bytes(kernels)
        (folder / self._name("tried")).write_text(json.dumps(self._mark))

    def beside(self, entry: Entry) -> None:
        """The same for an engine that is in the cache, where it was not tried here before.

        Raises
        ------
        GpuError
            As `into`; of an engine that had to be stopped within the last hour, as it was then.
        """
        if self.is_done(entry):
            return
        self._recall_stopped(entry)
        try:
            kernels = self._made(kernels_of(entry))
        except StoppedError as error:
            stopped = _Stopped(time.time(), error.message)
            with suppress(CacheError):
                entry.write_extra(self._name("stopped"), json.dumps(asdict(stopped)).encode())
            raise
        # A cache that is read-only serves; there it is tried each time.
        with suppress(CacheError):
            if kernels:
                entry.write_extra(KERNELS, kernels)
            entry.write_extra(self._name("tried"), json.dumps(self._mark).encode())

    def _recall_stopped(self, entry: Entry) -> None:
        found = entry.recall(self._name("stopped"), lambda kept: typed(json.loads(kept), _Stopped))
        ago = math.inf if found is None else time.time() - found.at
        if found is not None and 0 <= ago < STOPPED_S:
            left = math.ceil((STOPPED_S - ago) / 60)
            raise StoppedError(
                f"{found.message}\n(that was {ago / 60:.0f} min ago; nobody waited for it again)",
                f"it is tried again in {left} min, or once the cache is emptied, --trt-cache-clear",
            )

    def _made(self, kernels: bytes | None, process: Process | None = None) -> bytes:
        with scratch_folder("trial") as scratch, tensorrt.builder_process(process) as asked:
            folder = Path(scratch)
            compiled = folder / KERNELS
            compiled.write_bytes(kernels or b"")
            request = {
                "model": str(self.plan.resolve()),
                "module": self.module.name,
                "kernels": str(compiled),
                "arguments": dict(self.arguments),
            }
            self._asked(asked, "load", request, LOAD_LIMIT_S)
            if self.cases:
                cases = [*_written(self.cases, folder)]
                # Others may be measuring; nobody is held up while it is only loaded.
                with gpu_lock(self.gpu.lock_name):
                    self._asked(asked, "run", {**request, "cases": cases}, RUN_LIMIT_S)
            return compiled.read_bytes()

    def _asked(self, process: Process, task: str, request: dict[str, Any], limit_s: float) -> None:
        answered = tensorrt.called(process, f"{__name__}:{task}", request, limit_s)
        if answered.response is None:
            raise self._ended(task, answered)
        if "error" in answered.response:
            message, hint, code = answered.response["error"]
            raise GpuError(message, hint, code=code)

    def _ended(self, task: str, answered: tensorrt.Answered) -> GpuError:
        done = {"load": "loaded", "run": "run"}[task]
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


def _written(cases: Sequence[InputMapping], folder: Path) -> Iterator[dict[str, Any]]:
    """The first case of each shape as files; numpy's own format has no bfloat16."""
    first: dict[tuple[Any, ...], InputMapping] = {}
    for case in cases:
        first.setdefault(tuple((name, np.shape(array)) for name, array in case.items()), case)
    for index, case in enumerate([*first.values()][:_MOST_SHAPES]):
        written = {}
        for place, (name, value) in enumerate(case.items()):
            array, path = np.ascontiguousarray(value), folder / f"{index}-{place}.bin"
            array.tofile(path)
            written[name] = [str(path), array.dtype.name, list(np.shape(value))]
        yield written


# --- in the other process ---------------------------------------------------------------------------------------------

_loaded: list[Engine] = []


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Load an engine and keep it."""
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.backends.tensorrt.module import find_module

    module, kernels = find_module(request["module"]), Path(request["kernels"])
    arguments = {**request["arguments"], "jit_cache": kernels.read_bytes() if kernels.exists() else None}
    try:
        engine = Engine(Path(request["model"]), module, **arguments)
    except CheckError as error:
        return {"error": [error.message, error.hint, error.code]}
    _loaded[:] = [engine]
    kernels.write_bytes(engine.jit_cache() or b"")
    return {}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the engine that was loaded last; what it computes is for the process that asked to find out."""
    import ml_dtypes  # noqa: F401 - numpy knows its types by name from then on

    (engine,) = _loaded
    for files in request["cases"]:
        case = {name: np.fromfile(path, np.dtype(dtype)).reshape(shape) for name, (path, dtype, shape) in files.items()}
        try:
            engine(case)
        except GpuError as error:
            # What it says of "this process" is of this one.
            hint = "the session can go on: that was in another process" if error.poisoned else error.hint
            return {"error": [error.message, hint, error.code]}
        except CheckError:  # Inputs that do not fit: the check says so itself.
            continue
    Path(request["kernels"]).write_bytes(engine.jit_cache() or b"")
    return {}
