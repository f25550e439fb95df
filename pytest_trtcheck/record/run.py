"""All checks of a run, and where they ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_trtcheck.record.baseline import GpuRecord
from pytest_trtcheck.record.check import CheckRecord
from pytest_trtcheck.record.common import SCHEMA_VERSION, Verdict, absent


@dataclass(frozen=True)
class Library:
    """A library by the name of its module, or a tool by its own."""

    name: str | None = absent()
    module: str | None = absent()
    version: str | None = None


@dataclass(frozen=True)
class Environment:
    """Where checks ran: versions, and the GPU present beside the one that `--trt-gpu` named."""

    python: str | None = None
    platform: str | None = None
    numpy: str | None = None
    onnx: str | None = None
    onnxruntime: str | None = None
    tensorrt: Library | None = None
    driver: str | None = None
    gpu: GpuRecord | None = None
    gpus: tuple[GpuRecord, ...] = absent(())
    """The GPUs that ran checks, where test processes were dealt out over several."""
    requested_gpu: str | None = None

    def described(self) -> dict[str, str]:
        """All of it in words, by what it is called; what is not known is left out."""
        tensorrt = self.tensorrt or Library()
        gpus = Counter(map(_gpu_text, self.gpus or filter(None, [self.gpu])))
        known = {
            "TensorRT": " ".join(filter(None, (tensorrt.module, tensorrt.version))),
            "GPU": ", ".join(f"{n} × {gpu}" if n > 1 else gpu for gpu, n in gpus.items()),
            "driver": self.driver,
            "requested GPU": self.requested_gpu,
            "ONNX Runtime": self.onnxruntime,
            "ONNX": self.onnx,
            "NumPy": self.numpy,
            "Python": self.python,
            "platform": self.platform,
        }
        return {name: text for name, text in known.items() if text}


def _gpu_text(gpu: GpuRecord) -> str:
    capability = f" (compute capability {gpu.compute_capability})" if gpu.compute_capability else ""
    return f"{gpu.name}{capability}" if gpu.name else ""


@dataclass(frozen=True)
class MachineRecord:
    """One of the machines whose reports were merged: what it is called there, its report's path, where it ran."""

    name: str
    file: str
    environment: Environment
    commit: str | None = absent()
    """What it tested, as in its own report."""


@dataclass(frozen=True)
class MissingRecord:
    """A test that was to check something and left no record, or a file that could not be collected, and why."""

    nodeid: str
    reason: str
    outcome: str | None = None
    """How pytest's test ended: "passed", "failed" or "skipped"; None: it did not end."""
    machine: str | None = absent()
    """In a merged report, the name of the machine that lacks it."""


@dataclass(frozen=True)
class SystemRecord:
    """One of several systems that the same check was made with; a figure is None where it was not measured."""

    system: str
    nodeid: str
    verdict: Verdict
    metric: str | None = None
    error: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    qps: float | None = None
    memory_mib: float | None = None
    engine_mib: float | None = None
    build_s: float | None = None
    load_ms: float | None = None
    measured: str | None = None
    """What a run's time is, such as "GPU time"."""
    missing: tuple[str, ...] = ()
    """What could not be measured, and why."""


@dataclass(frozen=True)
class ComparisonRecord:
    """Several systems side by side: one test, model and precision, and in a merged report one machine."""

    test: str
    model: str
    precision: str | None
    machine: str | None = absent()
    systems: tuple[SystemRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All that a JSON report says of a run: its checks by node id, and how many came to each verdict.

    Of reports that were merged, `environment` is what their machines have in common.
    """

    schema_version: int = SCHEMA_VERSION
    tool: Library = Library()
    environment: Environment
    checks: tuple[CheckRecord, ...]
    comparisons: tuple[ComparisonRecord, ...] = absent(())
    """Of checks that several backends were to run."""
    summary: Mapping[str, int] = field(default_factory=dict)
    planned: int | None = absent()
    """How many tests were to check something: those of `checks` and those of `missing`."""
    missing: tuple[MissingRecord, ...] = absent((), beside="planned")
    stopped: str | None = absent(beside="planned")
    """Why the run ended before every test had run."""
    machines: tuple[MachineRecord, ...] = absent(())
    started: str | None = absent()
    """When the run began: "2026-11-27T00:19:40Z". Of reports that were merged, when the first of them did."""
    duration_s: float | None = absent()
    """How long the run took, whatever pytest did in it; of reports that were merged it is not known."""
    commit: str | None = absent()
    """Of the repository that the tests are in; it ends in "-dirty" where a file that it tracks was another one."""
