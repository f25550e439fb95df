"""An engine's layers, read from the engine inspector's JSON: the precision of each, and the ONNX nodes in it."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.choices import half_part, is_pair, quantized_part
from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.latency.stats import CONFIDENCE, quantile_bounds
from pytest_trtcheck.record import LayerRecord

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

# TensorRT 10 has "Format/Datatype", as "Half" or "Row major linear FP16 format"; 11 has "Datatype" apart from "Format".
_TYPES: tuple[tuple[str, str], ...] = (
    ("fp4", r"\bFP4\b|E2M1"),
    ("fp8", r"\bFP8\b|\bFLOAT8|E4M3|E5M2"),
    ("int4", r"\bINT4\b"),
    ("bf16", r"\bBF16\b|\bBFLOAT16\b"),
    ("fp16", r"\bFP16\b|\bHALF\b|\bFLOAT16\b"),
    ("int8", r"\bINT8\b"),
    ("fp32", r"\bFP32\b|\bFLOAT(?:32)?\b"),
    ("other", r"\bU?INT(?:8|16|32|64)\b|\bBOOL\b"),
)
_NODE = re.compile(r"\[ONNX Layer: (.+?)\](?=\s*(?:$|[\x1e\x1f]|\[ONNX Layer: ))", re.DOTALL)
"""A node in a layer's metadata; what stands between two of them is a control character, or nothing."""
_CONVERSION = re.compile(r"(?:^|[/_.])(?:Cast|QuantizeLinear|DequantizeLinear)(?:_\d+)?$")
"""What exporters and quantizers call a node that converts, where nothing else tells what a node is."""
_NARROWEST_FIRST = ("fp4", "int4", "fp8", "int8", "fp16", "bf16", "fp32", "other")


class Inspected(ABC):
    """What is read from the engine inspector's answer, wherever the engine is loaded."""

    title: str
    """The TensorRT that gave it."""

    @abstractmethod
    def layer_information(self) -> str:
        """`EngineInspector.get_engine_information(JSON)`."""

    def layers_by_precision(self) -> dict[str, int]:
        """How many of the engine's layers compute in which precision.

        Raises
        ------
        GpuError
            What the inspector says cannot be understood.
        """
        try:
            return layers_by_precision(self.layer_information())
        except ValueError as error:
            raise GpuError(f"{self.title}: the engine inspector's answer cannot be read: {error}") from error

    def layer_records(self, computing: Collection[str] | None = None) -> tuple[LayerRecord, ...]:
        """Its layers; `computing` are the ONNX nodes that do arithmetic, None: not known."""
        return described(self.layer_information(), computing)

    def tensor_types(self) -> frozenset[str]:
        """The types of the tensors between its layers."""
        return tensor_types(self.layer_information())


def layers_by_precision(information: str) -> dict[str, int]:
    """How many layers compute in which precision.

    A layer counts by the narrowest type among its inputs (a fused kernel that casts its input itself has its weights
    to tell), and by its outputs where it has no inputs. An FP32 layer whose tactic names TF32 counts as `tf32`.
    Layers of indices, shapes and masks alone count as `other`, those of which nothing is said as `unknown`.

    Parameters
    ----------
    information
        `EngineInspector.get_engine_information(JSON)` of an engine built with detailed profiling verbosity.

    Raises
    ------
    ValueError
        It is neither such JSON nor empty.
    """
    counts = Counter(_precision(layer) for layer in _layers(information))
    return dict(counts.most_common())


def described(information: str, computing: Collection[str] | None = None) -> tuple[LayerRecord, ...]:
    """Every layer that the inspector tells of, in its order.

    Which ONNX nodes a layer holds stands in its metadata; TensorRT 8 had them in its name alone ("conv1 + relu1").

    Parameters
    ----------
    information
        As above.
    computing
        The ONNX nodes that do arithmetic, by name; None where that is not known. Then all count as such whose names do
        not say that they convert.

    Raises
    ------
    ValueError
        As above.
    """
    return tuple(_described(layer, computing) for layer in _layers(information))


def _described(layer: Any, computing: Collection[str] | None) -> LayerRecord:
    if not isinstance(layer, dict):
        return LayerRecord(str(layer), precision=_precision(layer))
    name, metadata = str(layer.get("Name", "")), str(layer.get("Metadata") or "")
    nodes = list(dict.fromkeys(_NODE.findall(metadata)))
    if not nodes and computing:
        words = (word.removeprefix("PWN(").removesuffix(")") for word in name.split(" + "))
        nodes = [word for word in words if word in computing]
    moves = [node for node in nodes if (node not in computing if computing is not None else _CONVERSION.search(node))]
    return LayerRecord(
        name,
        kind=str(layer["LayerType"]) if layer.get("LayerType") else None,
        precision=_precision(layer),
        nodes=tuple(node for node in nodes if node not in moves),
        moves=tuple(moves),
    )


def timed(layers: Sequence[LayerRecord], runs: Sequence[Sequence[tuple[str, float]]]) -> tuple[LayerRecord, ...]:
    """The layers with their times. One that the profiler alone names stands behind the others.

    Parameters
    ----------
    runs
        Of each run what the profiler said: layer and milliseconds. Layers of one name are one to it: the first gets
        the time of all.
    """
    names = dict.fromkeys(name for run in runs for name, _ in run)
    taken = {name: np.zeros(len(runs)) for name in names}
    for index, run in enumerate(runs):
        for name, ms in run:
            taken[name][index] += ms
    found = [_timed(layer, taken.pop(layer.name, None)) for layer in layers]
    return (*found, *(_timed(LayerRecord(name), times) for name, times in taken.items()))


def _timed(layer: LayerRecord, times_ms: Any) -> LayerRecord:
    if times_ms is None:
        return layer
    # Two of them are compared: both bounds hold at the confidence that one of them has.
    found = quantile_bounds(times_ms, 0.5, 1 - (1 - CONFIDENCE) / 2)
    bounds = None if found.lower is None or found.upper is None else (_rounded(found.lower), _rounded(found.upper))
    return replace(layer, time_ms=_rounded(found.value), bounds_ms=bounds)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def tensor_types(information: str) -> frozenset[str]:
    """The types of all tensors between the engine's layers, and at its ends; what it was given is as above."""
    layers = (layer for layer in _layers(information) if isinstance(layer, dict))
    return frozenset(name for layer in layers for key in ("Inputs", "Outputs") for name in _types(layer.get(key)))


def unproved(layers: Mapping[str, int], types: Collection[str], precision: str) -> str | None:
    """The part of a precision that did not take effect; None where nothing says so.

    The 16-bit rest of a pair may be all inside kernels that read and write 8 bits, so that no tensor tells of it. It
    did not take effect where more layers than those compute in FP32 instead.

    Parameters
    ----------
    layers, types
        As `layers_by_precision` and `tensor_types` give them.
    """
    quantized, rest = quantized_part(precision), half_part(precision)
    if not is_pair(precision) or quantized is None:
        return None if layers.get(precision) else precision
    if not layers.get(quantized):
        return quantized
    in_fp32 = layers.get("fp32", 0) + layers.get("tf32", 0)
    return rest if rest not in types and in_fp32 > layers[quantized] else None


def _layers(information: str) -> list[Any]:
    if not information.strip():  # What is said of an engine that was built with no profiling verbosity at all.
        return []
    document = json.loads(information, strict=False)  # Metadata holds bare control characters.
    if not isinstance(document, dict) or not isinstance(document.get("Layers"), list):
        raise ValueError("the engine inspector's JSON has no list of layers")
    found: list[Any] = document["Layers"]
    return found


def _precision(layer: Any) -> str:
    if not isinstance(layer, dict):  # With less than detailed verbosity a layer is its name alone.
        return "unknown"
    types = _types(layer.get("Inputs")) | _types(layer.get("Constants")) | _types(layer.get("Weights"))
    types = types or _types(layer.get("Outputs"))
    narrowest = next((name for name in _NARROWEST_FIRST if name in types), "unknown")
    if narrowest == "fp32" and re.search(r"(?i)tf32", str(layer.get("TacticName", ""))):
        return "tf32"
    return narrowest


def _types(tensors: Any) -> set[str]:
    found = set()
    for tensor in tensors if isinstance(tensors, list) else [tensors]:
        if not isinstance(tensor, dict):
            continue
        for text in _type_texts(tensor):
            name = next((name for name, pattern in _TYPES if re.search(pattern, text, re.IGNORECASE)), None)
            if name:
                found.add(name)
                break
    return found


def _type_texts(tensor: dict[str, Any]) -> Iterable[str]:
    """What the inspector says of a tensor's type, the plainest first."""
    keys = {key.lower().replace(" ", ""): value for key, value in tensor.items()}
    for key in ("datatype", "type", "format/datatype", "format"):
        if isinstance(keys.get(key), str):
            yield keys[key]
