"""How a check was made: what stands in small print under a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.cache import format_bytes
from pytest_trtcheck.errors import plural
from pytest_trtcheck.record import LatencyRecord
from pytest_trtcheck.report.builds import options
from pytest_trtcheck.report.text import format_duration, format_number, one_line

if TYPE_CHECKING:
    from pytest_trtcheck.record import CheckRecord, EngineRecord, ProofRecord

_EVIDENCE = {
    "engine": "engine: a GPU ran TensorRT",
    "provider": "provider: a library ran the model in its precision",
    "server": "server: a server computed the outputs",
    "emulated": "emulated on CPU, not run on a GPU",
}
_GPU_RAN = {False: ", not on a GPU", "unknown": ", on a GPU or not"}


def check(record: CheckRecord) -> list[tuple[str, str]]:
    """What a check ran on and with, by name."""
    engine, latency = record.engine, record.latency or LatencyRecord("not_measured")
    layers = (engine and engine.layers_by_precision) or {}
    facts = {
        "Model": record.model,
        "SHA-256": f"{record.model_sha256[:16]}…" if record.model_sha256 else None,
        "Evidence": _evidence(record),
        "Proved": record.proof and _proved(record.proof),
        "Backend": record.backend,
        "Server": str(record.server) if record.server else None,
        "Compiled for": record.compiled_for,
        "Inputs": _inputs(record),
        "Reference": record.reference,
        "Build options": options(record) if record.build_options else None,
        "Engine": engine and _engine(engine),
        "Device memory": format_bytes(engine.device_memory_bytes) if engine and engine.device_memory_bytes else None,
        "Auxiliary streams": str(engine.aux_streams) if engine and engine.aux_streams else None,
        "Weights streamed": format_bytes(engine.streamed_bytes) if engine and engine.streamed_bytes else None,
        "Layers": ", ".join(f"{count} {precision}" for precision, count in layers.items()),
        "Layers not timed": engine and engine.layers_untimed,
        "Partition": record.partition.text if record.partition else None,
        "Latency judged on": latency.gpu,
        "Latency": latency.reason,
        "Held back": ", ".join(latency.details.held_back),
        "Before → after": _clocks(latency.clocks),
        "Took": format_duration(record.duration_s) if record.duration_s else None,
    }
    return [(name, one_line(value)) for name, value in facts.items() if value]


def _evidence(record: CheckRecord) -> str | None:
    words = _EVIDENCE.get(record.evidence or "")
    told = record.evidence not in {"provider", "server"} or record.gpu_ran in {None, True}
    return words if told else f"{words}{_GPU_RAN[record.gpu_ran]}"


def _engine(engine: EngineRecord) -> str:
    if engine.source == "file":
        built_for = f" for compute capability {', '.join(engine.built_for)}" if engine.built_for else ""
        stated = {False: ", precision stated, not proved", True: ", precision read from its layers", None: ""}
        return (
            f"from the file {engine.file}, built by {engine.built_by}{built_for}, {format_bytes(engine.bytes)}, "
            f"SHA-256 {(engine.sha256 or '')[:16]}…{stated[engine.proved]}"
        )
    cache = "the shared cache" if engine.cache == "remote" else "the cache"
    built = f"taken from {cache}" if engine.cached else f"built in {format_number(engine.build_s)} s"
    reason = f" ({engine.miss_reason})" if engine.miss_reason else ""
    return f"{built}{reason}, {format_bytes(engine.bytes)}"


_CLOCKS = (("SM", "sm_mhz", "MHz"), ("memory", "memory_mhz", "MHz"), ("", "temperature_c", "°C"), ("", "power_w", "W"))


def _clocks(clocks: Mapping[str, Any]) -> str:
    """The clocks, temperature and power before and after measuring, as far as the driver told them."""
    sides = [side if isinstance(side, Mapping) else {} for side in (clocks.get("before"), clocks.get("after"))]
    told = []
    for name, key, unit in _CLOCKS:
        values = [format_number(side[key]) for side in sides if isinstance(side.get(key), (int, float))]
        if values:
            told.append(f"{name} {' → '.join(dict.fromkeys(values))} {unit}".strip())
    return ", ".join(told)


def _proved(proof: ProofRecord) -> str:
    """Where the same check passed on a GPU."""
    where = ", ".join(filter(None, (proof.gpu, proof.tensorrt, proof.driver and f"driver {proof.driver}")))
    return f"on {where}, by {proof.file} ({'signature verified' if proof.signed else 'not signed'})"


def _inputs(record: CheckRecord) -> str | None:
    if not record.cases:
        return None
    origin = record.inputs
    words = f", generated with seed {record.seed}" if origin == "generated" else f", {origin}" if origin else ""
    return plural(record.cases, "case") + words
