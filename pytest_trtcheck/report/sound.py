"""Whether a file that calls itself a report can be read as one: reports come from other machines, and by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record import SEVERITY

_WORD = (str,)
_WORD_OR_NONE = (str, type(None))
_COUNT = (int, float, type(None))
_MAPPING = (dict,)

# A tuple: one of these types. A list: a list of such. A dict: those keys, where they are there. The rest is not read.
_BUDGET = {"verdict": "verdict", "name": _WORD_OR_NONE, "quantile": _WORD_OR_NONE}
_LATENCY = {
    "verdict": "verdict",
    "samples": _COUNT,
    "p50_ms": "number",
    "p90_ms": "number",
    "p95_ms": "number",
    "p99_ms": "number",
    "budgets": [_BUDGET],
    "details": {"distribution": _MAPPING, "conditions": _MAPPING, "disturbances": [_WORD], "held_back": [_WORD]},
}
_JUDGED = {"metric": _WORD, "value": "number", "limit": "number", "verdict": "verdict"}
_OUTPUT = {"name": _WORD, "shape": [(int,)], "nonfinite": _COUNT, "judged": [_JUDGED]}
_ENGINE = {"bytes": _COUNT, "device_memory_bytes": _COUNT, "layers_by_precision": {"*": (int,)}}
_CHECK: Mapping[str, Any] = {
    "nodeid": _WORD,
    "model": _WORD,
    "verdict": "verdict",
    "model_sha256": _WORD_OR_NONE,
    "precision": _WORD_OR_NONE,
    "evidence": _WORD_OR_NONE,
    "compiled_for": _WORD_OR_NONE,
    "inputs": _WORD_OR_NONE,
    "cases": _COUNT,
    "parity": {"verdict": "verdict", "outputs": [_OUTPUT]},
    "latency": _LATENCY,
    "engine": _ENGINE,
}
_NAMED = {"name": _WORD_OR_NONE, "version": _WORD_OR_NONE}
_REPORT: Mapping[str, Any] = {
    "tool": _NAMED,
    "environment": {"tensorrt": {"module": _WORD_OR_NONE, "version": _WORD_OR_NONE}, "gpu": _NAMED},
    "checks": [_CHECK],
}


def require_sound(report: Mapping[str, Any], name: str) -> None:
    """Refuse a report in which something is of another kind than the schema says.

    Parameters
    ----------
    report
        As `json_report.read` gives it.
    name
        Of the file, for the message.

    Raises
    ------
    ReportError
        The message names the first place that is wrong.
    """
    problem = _problem(report, _REPORT, "")
    if problem is not None:
        raise ReportError(f"{name} is no sound report: {problem}", "name a file that --trt-report wrote, as it was")


def _problem(value: object, wanted: Any, where: str) -> str | None:
    if isinstance(wanted, Mapping):
        return _mapping_problem(value, wanted, where)
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        found = (_problem(item, wanted[0], f"{where}[{index}]") for index, item in enumerate(value))
        return next((problem for problem in found if problem), None)
    if wanted == "verdict":
        return None if value in SEVERITY else f"{where} is {value!r}, which is no verdict"
    if wanted == "number":
        return None if _is_number(value) else f"{where} is {value!r}, which is no number"
    sound = isinstance(value, wanted) and not isinstance(value, bool)
    return None if sound else f"{where} is {value!r:.40}"


def _mapping_problem(value: object, wanted: Mapping[str, Any], where: str) -> str | None:
    # Every part of a check may be null: it was not asked for.
    if value is None and where and not where.endswith("]"):
        return None
    if not isinstance(value, dict):
        return f"{where or 'it'} is no mapping"
    needed: tuple[str, ...] = ("verdict",) if "verdict" in wanted else ()
    needed += ("nodeid", "model") if wanted is _CHECK else ("environment", "checks") if wanted is _REPORT else ()
    for key in needed:
        if value.get(key) is None:
            return f"{where or 'it'} has no {key}"
    for key, item in value.items():
        rule = wanted.get(key, wanted.get("*"))
        if rule is not None and (problem := _problem(item, rule, f"{where}.{key}".lstrip("."))):
            return problem
    return None


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return value in {"nan", "inf", "-inf"}
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
