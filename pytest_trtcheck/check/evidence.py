"""What a run on a GPU proved, held against a check that is made elsewhere: the same check, and did it pass there?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import gpu as gpus
from pytest_trtcheck.cache import hash_file
from pytest_trtcheck.errors import listed, plural
from pytest_trtcheck.metrics import METRICS, named
from pytest_trtcheck.model.sources import computes_outputs
from pytest_trtcheck.model.sources.stated import Statement
from pytest_trtcheck.record import (
    ASKED_LIMITS,
    ASKED_SEARCH,
    CheckRecord,
    Environment,
    GpuRecord,
    ProofRecord,
    RunRecord,
    is_bad,
)
from pytest_trtcheck.spec import Tolerance

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.check.request import Request
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.spec import ParitySpec

_BITWISE = "bitwise comparison of runs"
_MORE = frozenset({ASKED_SEARCH, _BITWISE})
"""What may be asked there and not here: it refuses more, and passed."""
_UNTOLD = "holds what nobody can tell on another machine: "


@dataclass(frozen=True)
class EvidenceReport:
    """The report of a run on a GPU, or of several.

    Parameters
    ----------
    file
        The report, as it was named.
    signed
        Whether its signature was verified.
    """

    file: str
    run: RunRecord
    signed: bool

    def environment(self, check: CheckRecord) -> Environment:
        """Where one of its checks ran."""
        machines = {machine.name: machine.environment for machine in self.run.machines}
        return machines.get(check.machine or "", self.run.environment)


@dataclass(frozen=True)
class Wanted:
    """The check that is to be proved.

    Parameters
    ----------
    record
        What it came to here.
    gpu
        The GPU that it is for.
    budgets
        The limits on latency and size that hold for that GPU, by the marker's argument.
    tensorrt
        Module and version of the TensorRT that built an engine here; None where none did.
    """

    record: CheckRecord
    gpu: GpuModel
    budgets: Mapping[str, float]
    tensorrt: str | None = None
    extra_gpus: Sequence[GpuModel] = ()


def proof(wanted: Wanted, evidence: EvidenceReport) -> ProofRecord | str:
    """What proves a check, or why nothing does."""
    record = wanted.record
    same_test = [each for each in evidence.run.checks if each.test == record.test]
    if not same_test:
        return "it holds no check of this test"
    found = [each for each in same_test if each.asked_precision == record.asked_precision]
    if not found:
        there = listed(sorted({each.asked_precision for each in same_test}))
        return f"it has this test in {there}, not in {record.asked_precision}"
    others = [list(_differences(wanted, each, evidence.environment(each))) for each in found]
    same = [each for each, other in zip(found, others, strict=True) if not other]
    if same:
        # What failed there once did not pass there, whatever else the same check came to.
        found = [each for each in same if is_bad(each.verdict)] or same
        others = [[] for _ in found]
    reasons = [[*_unproved(record, each), *other] for each, other in zip(found, others, strict=True)]
    for each, why_not in zip(found, reasons, strict=True):
        if not why_not:
            return _proof(each, evidence)
    # Of several checks of one test, the one that is nearest says most.
    nearest = min(reasons, key=len)
    return "; ".join(nearest)


def _proof(check: CheckRecord, evidence: EvidenceReport) -> ProofRecord:
    described = evidence.environment(check).described()
    return ProofRecord(
        evidence.file, described.get("GPU"), described.get("TensorRT"), described.get("driver"), evidence.signed
    )


def _differences(wanted: Wanted, proved: CheckRecord, environment: Environment) -> Iterator[str]:
    """What of a check differs from the one to be proved."""
    card = proved.gpu or environment.gpu
    if (ran_on := _model(card, wanted.extra_gpus)) is None or gpus.fits(wanted.gpu, ran_on) is None:
        name = card.name if card else "a GPU that it does not name"
        yield f"it ran on {name}, not on {wanted.gpu.product}"
    record = wanted.record
    compared: tuple[tuple[str, object, object], ...] = (
        ("model", record.model_sha256, proved.model_sha256),
        ("lowered model", record.lowered and record.lowered.key, proved.lowered and proved.lowered.key),
        ("engine file", _file(record), _file(proved)),
        ("shapes", record.profile, proved.profile),
        ("build options", record.build_options, proved.build_options),
        ("inputs", record.inputs_sha256, proved.inputs_sha256),
        ("reference", (record.reference, record.reference_sha256), (proved.reference, proved.reference_sha256)),
        ("score", record.score and record.score.asked, record.score and proved.score and proved.score.asked),
        ("tolerances", _tolerances(record), _tolerances(proved) if _tolerances(record) else None),
    )
    here, there = record.asked or {}, proved.asked or {}
    differing = [what for what, ours, theirs in compared if ours != theirs]
    # What was compared tells its limits, those that nobody wrote down as well.
    told = {ASKED_LIMITS} if _tolerances(record) else set()
    asked_for = [*(what for what in here if what not in told), *(what for what in there if what not in told | _MORE)]
    differing += [what for what in asked_for if here.get(what) != there.get(what)]
    if record.search and (proved.search is None or proved.search.asked < record.search.asked):
        differing.append(ASKED_SEARCH)
    elif record.search and proved.search and proved.search.is_cut_short and not record.search.is_cut_short:
        yield f"the {ASKED_SEARCH} was cut short there: {proved.search.shown_tries}"
    if _builds(record) > _builds(proved):
        differing.append("number of builds")
    yield from (f"other {what}" for what in dict.fromkeys(differing))
    untold = {what: here[what].rpartition(_UNTOLD)[2] for what in asked_for if _UNTOLD in here.get(what, "")}
    yield from (f"nobody can tell whether the {what} is the same: it holds {held}" for what, held in untold.items())
    if (limits := _budgets(proved)) != wanted.budgets:
        yield f"other budgets: {_shown(limits)} there, {_shown(wanted.budgets)} here"
    tensorrt = environment.described().get("TensorRT")
    if wanted.tensorrt not in {None, tensorrt}:
        yield f"it ran on {tensorrt}, and the engine here is of {wanted.tensorrt}"


def _unproved(record: CheckRecord, proved: CheckRecord) -> Iterator[str]:
    """What keeps the same check from proving anything."""
    if proved.verdict != "pass":
        yield f"there it is {proved.verdict.replace('_', ' ')}"
    elif any(is_bad(part.verdict) for part in proved.parts.values()):
        yield "there it contradicts itself: it passed, and a part of it did not"
    if proved.outcome != "passed":
        # One that is expected to fail ends as skipped, by its own code or for another check.
        skipped = "was expected to fail, and did" if proved.expected_failure else "was skipped"
        ended = {"failed": "failed", "skipped": skipped}
        yield f"there its test {ended.get(proved.outcome or '', 'was not seen to end')}"
    if proved.gpu_ran is not True:
        yield "no GPU is known to have run it there"
    elif proved.evidence != "engine" and proved.backend != record.backend and "tensorrt" not in (proved.backend or ""):
        yield f"it was run there by {proved.backend}, which is not TensorRT"
    if proved.runs > 1:
        yield f"there it took {plural(proved.runs, 'run')} to pass"


def asked(request: Request, *, bitwise: bool) -> dict[str, str] | None:
    """How a check is judged, as the test and the ini file ask for it, in words that are the same on every machine.

    Functions count by their sources and what they hold (`Statement`). What can't be told says so, and proves nothing.
    """
    parity, latency, found = request.parity, request.latency, {}
    if request.judge_parity and parity.judges_outputs and (ways := _ways(parity)):
        found["tolerances"] = _stated(ways)
    if request.judge_parity and parity.tol is not None:
        found[ASKED_LIMITS] = _stated((parity.tol, parity.metric))
    if request.judge_parity and parity.search:
        found[ASKED_SEARCH] = _stated(vars(parity.search))
    if request.judge_parity and bitwise:
        found[_BITWISE] = "yes"
    if parity.max_subgraphs is not None:
        found["max_subgraphs"] = str(parity.max_subgraphs)
    if request.judge_parity and parity.score is not None:
        found["score"] = _stated(vars(parity.score))
    if parity.reference is not None and computes_outputs(parity.reference):
        found["reference"] = _stated(parity.reference)
    if latency is not None and (latency.transfers or latency.instances > 1):
        found["latency settings"] = _stated({"instances": latency.instances, "transfers": latency.transfers})
    options = request.build_options
    libraries = [path for path in map(Path, (*options.plugins, *options.custom_ops)) if path.is_file()]
    if options.configure is not None or libraries:
        found["build options"] = _stated((options.configure, *((path.name, hash_file(path)) for path in libraries)))
    return found or None


def _ways(parity: ParitySpec) -> list[object]:
    """What of the tolerances no limit tells: parts, axes, arguments and code of metrics; nothing of the usual."""
    given = parity.tol if isinstance(parity.tol, tuple) else (("*", parity.tol),)
    combined = [(output, each) for output, each in given if isinstance(each, Tolerance)]
    metrics = [parity.metric, *(named(metric) for _, each in combined for metric in each.metrics)]
    arguments = [(output, each.arguments()) for output, each in combined]
    ways = [
        (output, {name: each[name] for name in ("parts", "top1_axis") if name in each}) for output, each in arguments
    ]
    return [
        *(each for each in ways if each[1]),
        *(each for each in metrics if METRICS.get(each.name) != each),
    ]


def _stated(value: object) -> str:
    statement = Statement()
    text = statement.of(value)
    return f"{text}; {_UNTOLD}{listed(sorted(set(statement.untold)))}" if statement.untold else text


def _model(card: GpuRecord | None, extra: Sequence[GpuModel]) -> GpuModel | None:
    if card is None or card.name is None:
        return None
    found = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", card.compute_capability or "", re.ASCII)
    return gpus.model_of(card.name, (int(found[1]), int(found[2])), extra) if found else None


def _file(record: CheckRecord) -> str | None:
    """The identity of an engine that exists."""
    return record.engine.sha256 if record.engine and record.engine.source == "file" else None


def _builds(record: CheckRecord) -> int:
    return len(record.rebuild.builds) if record.rebuild else 1


def _tolerances(record: CheckRecord) -> Any:
    """Every limit that was applied, by output; None where nothing was compared, so that nobody knows them."""
    outputs = record.parity.outputs if record.parity else ()
    return {output.name: [(each.metric, each.limit) for each in output.judged] for output in outputs} or None


def _budgets(record: CheckRecord) -> dict[str, float]:
    """The budgets that were judged, by the marker's argument."""
    found = {}
    for each in record.budgets:
        limit = each.limit if each.limit_ms is None else each.limit_ms
        is_judged = each.verdict != "not_measured" and each.name != "baseline"
        if limit is not None and each.name is not None and is_judged:
            found[each.name] = limit
    return found


def _shown(budgets: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {limit:g}" for name, limit in budgets.items()) or "none"
