"""One check: one verdict, and all that it rests on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from json import dumps, loads  # by name: a test's own mock of them may be there while its record is attached
from typing import Any

from pytest_trtcheck.errors import first_line, plural
from pytest_trtcheck.record.baseline import BaselineRecord, GpuRecord
from pytest_trtcheck.record.common import GpuRan, Verdict, absent, jsonable, typed
from pytest_trtcheck.record.graph import GraphRecord
from pytest_trtcheck.record.latency import BudgetRecord, LatencyRecord
from pytest_trtcheck.record.parity import ParityRecord, ScoreRecord
from pytest_trtcheck.record.system import (
    CalibrationRecord,
    EngineRecord,
    LoweredRecord,
    PartitionRecord,
    RebuildRecord,
    ServerRecord,
)

ASKED_LIMITS, ASKED_SEARCH = "limits", "search for the worst input"
"""Of the keys of `CheckRecord.asked`, those that other fields tell of as well."""


def without_parameter(nodeid: str, name: str) -> str:
    """A node id without one of the parameters in its brackets."""
    test, bracket, given = nodeid.partition("[")
    others = re.sub(rf"(^|-){re.escape(name)}(?=[-\]]|$)", "", given, count=1).removeprefix("-")
    return test if others in {"", "]"} else f"{test}{bracket}{others}"


@dataclass(frozen=True)
class ProofRecord:
    """Where the same check passed on a GPU: the report, and what it ran on there; `signed`: its signature holds."""

    file: str
    gpu: str | None
    tensorrt: str | None
    driver: str | None
    signed: bool


@dataclass(frozen=True)
class SearchRecord:
    """What the search for a check's worst input came to. A try is one input; with an open batch dimension, one row.

    `usage` is how much of its limit the worst input found uses (above 1 the check fails); `output`, `metric`, `value`
    and `limit` are those of the limit that is used most. `found_at` is the try that it was, from 1 on. `own_usage` is
    that of the check's own inputs.
    """

    tries: int
    asked: int
    seconds: float
    usage: float
    own_usage: float
    found_at: int | None = None
    output: str | None = None
    metric: str | None = None
    value: float | None = None
    limit: float | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By input, the values among which was searched."""
    held: tuple[str, ...] = ()
    """The inputs that were left as the check's own have them."""
    unusable: int = 0
    """Tries whose reference is NaN or infinite where that of the check's own inputs is not."""
    changed: int | None = absent()
    """Of an input that fails: how many elements differ from the check's own first input, once it was shrunk."""
    elements: int | None = absent(beside="changed")
    kept: str | None = absent(beside="changed")
    """The file that keeps it."""
    scale: float | None = absent(beside="changed")
    """How large max|reference| of the output is there, to what it is on the check's own inputs."""

    @property
    def is_cut_short(self) -> bool:
        """Whether its time ended it: neither was all tried that was asked for, nor did an input exceed the limit."""
        return self.tries < self.asked and self.usage <= 1

    @property
    def shown_tries(self) -> str:
        """How many were tried, and of how many where that are fewer."""
        return f"{self.tries:,} of {self.asked:,} tries" if self.is_cut_short else plural(self.asked, "try", "tries")


@dataclass(frozen=True)
class Location:
    """Where a test stands: `file` relative to pytest's rootdir, `line` from 1."""

    file: str
    line: int | None = None


@dataclass(frozen=True)
class CheckRecord:
    """One check: one verdict, and all that it rests on."""

    nodeid: str
    model: str
    verdict: Verdict
    model_sha256: str | None = None
    precision: str | None = None
    system: str | None = absent()
    """Where several backends are compared: the one that this check is of, whatever ran in the end."""
    backend: str | None = None
    evidence: str | None = None
    gpu_ran: GpuRan | None = absent()  # noqa: RUF009 - it is a field
    """Whether a GPU computed the outputs; "unknown" where a server's word is all there is."""
    gpu: GpuRecord | None = absent()  # noqa: RUF009 - it is a field
    """The GPU that computed the outputs: one of several, where test processes are dealt out over them."""
    for_gpu: str | None = absent()
    """Where `--trt-gpu` names several GPUs: the one that this check is for."""
    compiled_for: str | None = None
    not_built: str | None = absent()
    """Why no engine was built for the GPU that was named, where it is another TensorRT that serves it."""
    cases: int = 0
    seed: int | None = None
    inputs: str | None = None
    """Where the inputs came from: "returned", "trt_inputs", "given" (to `trt_check`) or "generated"."""
    inputs_sha256: str | None = absent()
    """Of every byte of all of them, with their names, types and shapes."""
    reference: str | None = None
    """What `reference=` named; None: the FP32 model itself."""
    reference_sha256: str | None = absent()
    """Of the model or the recorded samples that `reference=` named."""
    lowered: LoweredRecord | None = absent()  # noqa: RUF009 - it is a field
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] | None = absent()
    """By input, the least, usual and largest shape that the check is of."""
    build_options: Mapping[str, Any] | None = absent()
    """The `BuildOptions` that are not the default."""
    asked: Mapping[str, str] | None = absent()
    """How it is judged, as the test asks for it: limits, parts, functions by their names and sources."""
    parity: ParityRecord | None = None
    score: ScoreRecord | None = absent()  # noqa: RUF009 - it is a field
    latency: LatencyRecord | None = None
    engine: EngineRecord | None = None
    server: ServerRecord | None = absent()  # noqa: RUF009 - it is a field
    """The served model that gave the outputs."""
    partition: PartitionRecord | None = absent()  # noqa: RUF009 - it is a field
    """How ONNX Runtime divided the model, where one of its GPU providers ran it."""
    graph: GraphRecord | None = absent()  # noqa: RUF009 - it is a field
    """The model as a graph to draw (`--trt-report-graph`)."""
    costs: Mapping[str, float] | None = absent()
    """What the system takes beside time, as far as it tells: `load_ms`, `build_s`, `memory_mib`, `engine_mib`."""
    rebuild: RebuildRecord | None = absent()  # noqa: RUF009 - it is a field
    """What further builds of the engine came to (`--trt-rebuild`)."""
    search: SearchRecord | None = absent()  # noqa: RUF009 - it is a field
    """What the search for the worst input came to (`search=`, `--trt-search`)."""
    examples: int | None = absent()
    """Of a test under Hypothesis's `@given`: how many examples were checked. The record is that of the worst, of a
    failure that of the minimal failing one."""
    replay: str | None = absent()
    """The command that makes the check again from its failure bundle."""
    duration_s: float = 0.0
    runs: int = 1
    """How often its test ran until this record was made: 2 and more where it was run again (rerunfailures, flaky)."""
    message: str | None = None
    """The first thing to read when the verdict is not `pass`."""
    code: str | None = absent()
    """What that is of, where the verdict is not `pass`: a section of docs/errors.md explains it."""
    notes: tuple[str, ...] = ()
    calibration: CalibrationRecord | None = absent()  # noqa: RUF009 - it is a field
    baseline: BaselineRecord | None = absent()  # noqa: RUF009 - it is a field
    """What the errors were held against; the latency's is among its budgets."""
    proof: ProofRecord | None = absent()  # noqa: RUF009 - it is a field
    """What `--trt-require-evidence` found."""
    # What is known once the test has ended:
    expected_failure: str | None = absent()
    """The reason of the test's `xfail` mark."""
    outcome: str | None = absent()
    """How pytest's test ended: "passed", "failed" or "skipped" (an expected failure is "skipped")."""
    location: Location | None = absent()  # noqa: RUF009 - it is a field
    machine: str | None = absent()
    """In a merged report, the name of the machine that it ran on."""

    @property
    def test(self) -> str:
        """The node id without the GPU among its parameters: the same test on a machine with that GPU has none."""
        return self.nodeid if self.for_gpu is None else without_parameter(self.nodeid, self.for_gpu)

    @property
    def budgets(self) -> tuple[BudgetRecord, ...]:
        """What its latency and costs were held to; none where they were not asked for."""
        return self.latency.budgets if self.latency else ()

    @property
    def asked_precision(self) -> str:
        """The precision that was asked for, whatever was computed in."""
        return (self.precision or "").rpartition("(asked ")[2].rstrip(")")

    @property
    def headline(self) -> str:
        """The first line of the message."""
        return first_line(self.message or "")

    @property
    def parts(self) -> dict[str, ParityRecord | ScoreRecord | LatencyRecord]:
        """The parts that the check has, by name."""
        named = {"parity": self.parity, "score": self.score, "latency": self.latency}
        return {name: part for name, part in named.items() if part is not None}

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return dumps(jsonable(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CheckRecord:
        """What `to_json` wrote."""
        return typed(loads(text), cls)
