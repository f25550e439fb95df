"""Names and values that say how a check was made and where: what stands in small print under a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_trtcheck.report.text import format_bytes, format_number, one_line, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_trtcheck.report.view import Record


def of_check(record: Record) -> list[tuple[str, str]]:
    """What a check ran on and with."""
    engine = record.get("engine") or {}
    layers = engine.get("layers_by_precision") or {}
    latency = record.get("latency") or {}
    evidence = {
        "engine": "engine: a GPU ran TensorRT",
        "emulated": "emulated on CPU, not run on a GPU",
    }.get(record.get("evidence") or "")
    if engine:
        built = "taken from the cache" if engine["cached"] else f"built in {format_number(engine['build_s'])} s"
        reason = f" ({engine['miss_reason']})" if engine.get("miss_reason") else ""
        built = f"{built}{reason}, {format_bytes(engine['bytes'])}"
    facts = {
        "Model": record["model"],
        "SHA-256": f"{record['model_sha256'][:16]}…" if record.get("model_sha256") else None,
        "Evidence": evidence,
        "Backend": record.get("backend"),
        "Compiled for": record.get("compiled_for"),
        "Inputs": _inputs(record),
        "Engine": built if engine else None,
        "Device memory": format_bytes(engine["device_memory_bytes"]) if engine.get("device_memory_bytes") else None,
        "Layers": ", ".join(f"{count} {precision}" for precision, count in layers.items()),
        "Latency judged on": latency.get("gpu"),
        "Latency": latency.get("reason"),
        "Held back": ", ".join((latency.get("details") or {}).get("held_back") or ()),
        "Clocks": ", ".join(f"{key} {value}" for key, value in (latency.get("clocks") or {}).items()),
        "Took": f"{format_number(record['duration_s'])} s" if record.get("duration_s") else None,
    }
    return [(name, one_line(str(value))) for name, value in facts.items() if value]


def _inputs(record: Record) -> str | None:
    if not record.get("cases"):
        return None
    origin = record.get("inputs")
    words = f", generated with seed {record.get('seed')}" if origin == "generated" else f", {origin}" if origin else ""
    return plural(int(record["cases"]), "case") + words


def of_environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where a run ran."""
    tensorrt, gpu = environment.get("tensorrt") or {}, environment.get("gpu") or {}
    known = {
        "GPU": gpu.get("name") or "none",
        "Compute capability": gpu.get("compute_capability"),
        "Requested GPU": environment.get("requested_gpu"),
        "Driver": environment.get("driver"),
        {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}.get(
            str(tensorrt.get("module")), "TensorRT"
        ): tensorrt.get("version", "not installed"),
        "ONNX Runtime": environment.get("onnxruntime") or "not installed",
        "ONNX": environment.get("onnx"),
        "NumPy": environment.get("numpy"),
        "Python": environment.get("python"),
        "Platform": environment.get("platform"),
    }
    return [(name, str(value)) for name, value in known.items() if value]
