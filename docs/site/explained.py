"""Tables of docs/explanation.

How an operator is emulated is read from the tables and rules of `precision.emulation`, `precision.half` and
`precision.families`; figures are read from the reports in docs/measured.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import onnx.defs

from docs.site.links import ROOT
from docs.site.tables import table
from pytest_trtcheck.precision.arithmetic import MATRIX_OPERATORS
from pytest_trtcheck.precision.emulation.layers import EXPANSIONS
from pytest_trtcheck.precision.emulation.rewrite import EXACT_OPERATORS
from pytest_trtcheck.precision.families.family import FAMILIES
from pytest_trtcheck.precision.families.kernels import NO_KERNEL, halves
from pytest_trtcheck.precision.quantization.plan import QUANTIZED_OPERATORS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.choices import HalfName

MEASURED = ROOT / "docs" / "measured"
FACTORS = (1.1, 1.5, 2.2, 3, 10)

EXACT, ONCE, LAYERS = "exact", "rounded once", "layers, each rounded"
SUM_IN_FP16, SUM_IN_FP32 = "sum in FP16", "sum in FP32, rounded"
FLOAT, SOME_FLOAT, READ, NONE = "stays FP32", "stays FP32 with sequence lengths, else", "read in 16 bits", "–"

_HALF_SUMS = frozenset({"Conv", "Gemm", "MatMul"})
"""What accumulates in FP16 (`precision.emulation.products`)."""
_DEFINED = frozenset({"Attention"})
"""What is computed by its definition in ONNX (`precision.emulation.rewrite`)."""
_CONTROL = frozenset({"If", "Loop", "Scan"})


def operators() -> list[str]:
    """Those of ONNX that some TensorRT takes and that compute on floats, or hand them on."""
    named = {name for family in FAMILIES for name in family.operators}
    return sorted(name for name in named if (schema := _schema(name)) is not None and _has_floats(schema))


def computed(op_type: str, kind: HalfName) -> str:
    """How an operator is emulated in a 16-bit type."""
    schema = _schema(op_type)
    assert schema is not None
    if op_type in _CONTROL:
        return "FP32 outside, its body as here" if op_type != "Scan" else FLOAT
    entries = [entry for entry in NO_KERNEL if entry.op_type == op_type and kind in entry.kinds and entry.families]
    if any(entry.where is None for entry in entries):
        return FLOAT
    lowered = halves(schema)
    if not lowered:
        return NONE
    if not any(each.type_str in lowered for each in schema.outputs):
        return READ
    return f"{SOME_FLOAT} {_inside(op_type, kind)}" if entries else _inside(op_type, kind)


def _inside(op_type: str, kind: HalfName) -> str:
    if op_type in _HALF_SUMS:
        return SUM_IN_FP16 if kind == "fp16" else SUM_IN_FP32
    if op_type in EXPANSIONS and op_type not in EXACT_OPERATORS:
        return LAYERS
    if op_type in _DEFINED:
        return LAYERS
    return EXACT if op_type in EXACT_OPERATORS else ONCE


def operator_table(_: str) -> str:
    """Every operator: 16 bits, TF32, 8 bits, and what the atlas found of it."""
    atlas = _json("atlas/agreement.json")["by_operator"]
    rows = []
    for name in operators():
        half, brain = computed(name, "fp16"), computed(name, "bf16")
        besides = [
            *(["TF32: its factors"] if name in MATRIX_OPERATORS else []),
            *(["8 bits: quantized"] if name in QUANTIZED_OPERATORS else []),
            *(["8 bits: the residual"] if name == "Add" else []),
        ]
        said = half if brain == half else f"{half}; BF16: {brain}"
        rows.append([f"`{name}`", said, "; ".join(besides), *_agreement(atlas.get(name))])
    return table(["operator", "in 16 bits", "besides", "probes", "same verdict", "failures seen"], rows)


def _agreement(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    emulated, failing = found["emulated"], found["fail_on_gpu"]
    seen = f"{emulated['caught']} of {failing}" if failing else "none failed"
    return [str(found["probes"]), _percent(emulated["agree_share"]), seen]


def precision_table(_: str) -> str:
    """What the atlas found in each precision."""
    found = _json("atlas/agreement.json")
    rows = []
    for name, each in found["by_precision"].items():
        within = found["emulated_to_gpu_error"][name]
        rows.append(
            [
                name,
                f"{each['probes']:,}",
                _percent(each["emulated"]["agree_share"]),
                f"{each['emulated']['caught']:,} of {each['fail_on_gpu']:,}",
                str(each["emulated"]["false_alarms"]),
                _percent(within["within_2"]),
                _percent(within["within_3"]),
            ]
        )
    header = ["precision", "probes", "same verdict", "failures seen", "false alarms", "error within 2", "within 3"]
    return table(header, rows)


def model_table(_: str) -> str:
    """How far emulated and engine's error lie apart, over the outputs of packaged models, by precision."""
    apart: dict[str, list[float]] = {}
    for report in ("h100/models.json", "h100/pairs.json"):
        for precision, factor in _apart(_json(report)):
            apart.setdefault(precision, []).append(factor)
    rows = [
        [
            precision,
            str(len(factors)),
            *(str(sum(each <= limit for each in factors)) for limit in FACTORS),
            f"{max(factors):.3g}",
        ]
        for precision, factors in sorted(apart.items())
    ]
    return table(["precision", "outputs", *(f"within {limit:g}" for limit in FACTORS), "widest"], rows)


def _apart(report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for check in report["checks"]:
        for output in (check["parity"] or {}).get("outputs", ()):
            emulated = output["details"].get("emulated", {}).get("l2")
            if emulated is not None and output["l2"] is not None:
                yield check["precision"], _factor(float(emulated), float(output["l2"]))


def _factor(one: float, other: float) -> float:
    """The factor between two errors; 1 where they are equal or neither is finite."""
    if one == other or not (math.isfinite(one) or math.isfinite(other)):
        return 1.0
    if not (math.isfinite(one) and math.isfinite(other)) or not one or not other:
        return math.inf
    return max(one / other, other / one)


def latency_table(_: str) -> str:
    """How often chance decided a median's budget, by the stream of simulated samples."""
    found = _json("latency.json")["results"]
    rows = []
    for name in found:
        stream = name.removeprefix("p50_ms is the budget, ")
        if stream == name:
            continue
        above, below = (found[f"p50_ms {share} of the median, {stream}"] for share in ("1.03", "0.97"))
        rows.append(
            [
                stream,
                _decided(above, "pass"),
                _decided(below, "fail"),
                str(found[name]["pass"] + found[name]["fail"]) + f" of {found[name]['measured']}",
                f"{above['median_s']:g} s",
            ]
        )
    return table(["samples", "3 % above: pass", "3 % below: fail", "at the budget: decided", "half after"], rows)


def _decided(found: dict[str, Any], right: str) -> str:
    wrong = found["measured"] - found[right] - found["undecided"]
    return f"{found[right]}, {found['undecided']} undecided, {wrong} wrong"


def _schema(op_type: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type)
    except onnx.defs.SchemaError:
        return None


def _has_floats(schema: onnx.defs.OpSchema) -> bool:
    kinds = {each.type_param_str for each in schema.type_constraints if "tensor(float)" in each.allowed_type_strs}
    return any(each.type_str in kinds | {"tensor(float)"} for each in schema.inputs)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}".removesuffix(".0") + " %"


def _json(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MEASURED / name).read_text(encoding="utf-8"))
    return found
