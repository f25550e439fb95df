"""Sessions of ONNX Runtime on one of its GPU providers, and running and measuring them."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.backends.onnxruntime import installed, placement
from pytest_trtcheck.errors import GpuError, InputError, ModelError
from pytest_trtcheck.latency.samples import Samples
from pytest_trtcheck.model import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from pytest_trtcheck.record import PartitionRecord
    from pytest_trtcheck.record.held import HeldFolder
    from pytest_trtcheck.spec import InputMapping

_DEVICE = 0
"""The GPU that CUDA counts first, which is the one that was detected."""
_NVIDIA = 0x10DE


def session_options(entries: Mapping[str, str], custom_ops: Sequence[str] = (), profile: Path | None = None) -> Any:
    """Options of a session: ONNX Runtime's own defaults, as deployments have them.

    Parameters
    ----------
    entries
        Configuration entries.
    profile
        What the files of a profile begin with; None: nothing is profiled.
    """
    module = ort.module()
    options = module.SessionOptions()
    options.log_severity_level = 3
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    for library in custom_ops:
        ort.register_custom_ops(options, library)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def open_session(path: Path, options: Any, providers: Sequence[tuple[str, Mapping[str, str]]], label: str) -> Any:
    """A session on these providers, the first of which it is refused without.

    Parameters
    ----------
    providers
        Each with its options; none where the options name devices.
    label
        What messages call the model and what is to run it.

    Raises
    ------
    ModelError
        ONNX Runtime cannot load the model there; it is quoted.
    GpuError
        It left the provider out, and would run the model on the CPU.
    """
    module = ort.module()
    installed.preload(module, tensorrt=any("Tensorrt" in name for name, _ in providers))
    chosen = {"providers": [(name, dict(given)) for name, given in providers]} if providers else {}
    try:
        # Else it retries on the CPU, having printed what went wrong.
        session = module.InferenceSession(str(path), options, enable_fallback=0, **chosen)
    except Exception as error:
        lacks = "NOT_IMPLEMENTED" in str(error)
        raise ModelError(
            f"{label}: ONNX Runtime cannot load it: {ort.quoted(error)}",
            ort.memory_hint(error)
            or "no provider has that operator in that type: keep it out of the precision with keep_fp32=" * lacks,
            code="runtime-refused",
        ) from error
    for name, _ in providers[:1]:
        if name not in session.get_providers():
            raise GpuError(
                f"{label}: ONNX Runtime did not start {name}, and would run the model on "
                f"{', '.join(session.get_providers())}",
                "look at what it wrote to standard error: CUDA's or TensorRT's libraries, or the driver, do not fit",
                code="provider-failed",
            )
    return session


class ProviderRunner:
    """An open session.

    Parameters
    ----------
    session
        Made by `open_session`.
    label
        What messages call it.
    outer
        The types that inputs and outputs have outside, by name, where the session has others.
    scratch
        A folder that the session writes to.

    `partition` is how the model was divided, once somebody has looked.
    """

    def __init__(self, session: Any, label: str, outer: Mapping[str, str], scratch: HeldFolder | None = None) -> None:
        self.session = session
        self.label = label
        self.scratch = scratch
        self.partition: PartitionRecord | None = None
        self._outer = dict(outer)
        self._runner = ort.OrtSession.of(session, label)
        self._types = {put.name: put.type for put in session.get_inputs()}

    def converted(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """The inputs in the session's own types."""
        return {
            name: array.astype(_DTYPES[self._types[name]]()) if name in self._outer else array
            for name, array in inputs.items()
        }

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once."""
        outputs = self._runner(self.converted(inputs))
        return {
            name: array.astype(self._outer[name]) if name in self._outer else array for name, array in outputs.items()
        }

    def close(self) -> None:
        """Free the session."""
        self._runner.close()
        self.session = None
        if self.scratch is not None:
            self.scratch.cleanup()


def _bfloat16() -> Any:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


_DTYPES = {"tensor(float16)": lambda: np.dtype(np.float16), "tensor(bfloat16)": _bfloat16}


class HostTimedRuns:
    """A session made ready for measuring: the host's time from the call until the GPU has finished.

    Inputs lie on the GPU before a run and outputs stay there; with `transfers` both cross in it.

    Parameters
    ----------
    runner
        The session.
    cases
        Inputs of equal shapes, used in turn.
    transfers
        Whether inputs and outputs lie in the host's memory.

    Raises
    ------
    InputError
        There is no input, or they differ in shape.
    """

    graph: bool | None = None
    graph_reason: str | None = None

    def __init__(self, runner: ProviderRunner, cases: Sequence[InputMapping], *, transfers: bool = False) -> None:
        if not cases:
            raise InputError("there are no inputs to measure with", code="input-empty")
        shapes = [{name: np.shape(array) for name, array in case.items()} for case in cases]
        if any(each != shapes[0] for each in shapes):
            raise InputError(
                "the inputs to measure with differ in shape", "measure each shape by itself", code="input-shape"
            )
        self._session = runner.session
        self._transfers = transfers
        self._on_gpu = not transfers
        self._bindings = [self._bound(runner.converted(case)) for case in cases]
        if not transfers and not self._on_gpu:
            # Not all of them could lie on the GPU: none does, so that each run is what `measured` says.
            self._bindings = [self._bound(runner.converted(case)) for case in cases]
        self._next = 0

    @property
    def measured(self) -> str:
        """What a run takes."""
        where = "on the GPU" if self._on_gpu else "in the host's memory"
        return f"host time of a run until the GPU has finished, inputs and outputs {where}"

    def _bound(self, case: Mapping[str, NDArray[Any]]) -> Any:
        binding = self._session.io_binding()
        for name, array in case.items():
            binding.bind_ortvalue_input(name, self._value(array))
        for output in self._session.get_outputs():
            if self._on_gpu:
                binding.bind_output(output.name, "cuda", _DEVICE)
            else:
                binding.bind_output(output.name)
        return binding

    def _value(self, array: NDArray[Any]) -> Any:
        values = ort.module().OrtValue
        array = np.ascontiguousarray(array)
        if (code := ort.code_beyond_numpy(array.dtype)) is not None:
            self._on_gpu = False  # ONNX Runtime makes these in the host's memory alone.
            return values.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.dtype.itemsize}"), code)
        if self._on_gpu:
            with suppress(Exception):
                return values.ortvalue_from_numpy(array, "cuda", _DEVICE)
            with suppress(Exception):  # A provider that is a plugin beside ONNX Runtime for the CPU.
                return values.ortvalue_from_numpy(array, "gpu", _DEVICE, _NVIDIA)
            self._on_gpu = False
        return values.ortvalue_from_numpy(array)

    def _run(self) -> float:
        """One run; the milliseconds that it took."""
        binding = self._bindings[self._next]
        self._next = (self._next + 1) % len(self._bindings)
        began = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            raise GpuError(
                f"ONNX Runtime failed while it was measured: {ort.quoted(error)}", ort.memory_hint(error)
            ) from error
        return 1000.0 * (time.perf_counter() - began)

    def run(self, n: int) -> Samples:
        """Measure `n` runs, behind one that is not counted."""
        if n < 1:
            raise ValueError("at least one run must be measured")
        self._run()
        run_ms, ends = np.empty(n), np.empty(n + 1)
        ends[0] = time.perf_counter()
        for index in range(n):
            run_ms[index] = self._run()
            ends[index + 1] = time.perf_counter()
        return Samples(run_ms, None, run_ms if self._transfers else None, 1000.0 * np.diff(ends))

    def launch(self) -> None:
        """Make one run."""
        self._run()

    def mark(self) -> float:
        """The time now, in milliseconds: every run is waited for."""
        return 1000.0 * time.perf_counter()

    def close(self) -> None:
        """Free the inputs and outputs."""
        self._bindings = []

    def __enter__(self) -> HostTimedRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def profile_of(runner: ProviderRunner, open_with: Any, case: InputMapping) -> placement.Profile:
    """What ran in a session of its own, by ONNX Runtime's profiler."""

    def run(session: Any, inputs: InputMapping) -> None:
        ort.OrtSession.of(session, runner.label)(runner.converted(inputs))

    return placement.profiled(open_with, case, run)
