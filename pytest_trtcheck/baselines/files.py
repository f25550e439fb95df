"""The files that baselines are kept in: one a GPU and test file, made to be reviewed.

    DIR/H200-sm90/tests/test_detector.py.json

Keys are sorted and numbers rounded, so that recording a test again changes the lines of that test and no others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.latency.distribution import Distribution
from pytest_trtcheck.record import Conditions
from pytest_trtcheck.record.files import write_text

if TYPE_CHECKING:
    import os

FORMAT = 1
_DIGITS = 4
_EXPANDED = 4
"""Levels of a file that get a line for each key: below, in a test's figures, a line holds a whole mapping."""

_RECORD_AGAIN = "restore the file, or delete it and record it again: --trt-update-baseline"


@dataclass(frozen=True, order=True)
class GpuKey:
    """A GPU as baselines tell it apart: `name` as the driver prints it, `compute_capability` as in "9.0"."""

    name: str
    compute_capability: str

    @classmethod
    def of(cls, conditions: Conditions) -> GpuKey:
        """The GPU that was measured."""
        return cls(conditions.gpu or "", conditions.compute_capability or "")

    @property
    def folder(self) -> str:
        """The folder of its baselines, such as "A100-SXM4-80GB-sm80"."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.name.removeprefix("NVIDIA ")).strip("-.")
        return f"{name or 'GPU'}-sm{self.compute_capability.replace('.', '')}"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What was recorded of one test on one GPU.

    Parameters
    ----------
    model, model_sha256
        The model's name, and the hash of what was measured.
    input_shapes
        By input name.
    measured
        "GPU time" or "latency with transfers".
    cuda_graph
        Whether the runs were launched as a CUDA graph.
    recorded
        The day, as in "2025-11-21".
    tensorrt, driver
        What it was recorded with, such as "tensorrt_rtx 1.7.1.116".
    sm_mhz, power_limit_w, power_mode
        The GPU's clock while it was measured, its power limit, and what nvpmodel set; None where that was not told.
    """

    model: str
    model_sha256: str | None
    input_shapes: Mapping[str, tuple[int, ...]]
    measured: str
    cuda_graph: bool
    recorded: str
    tensorrt: str
    driver: str | None
    distribution: Distribution
    sm_mhz: int | None = None
    power_limit_w: float | None = None
    power_mode: str | None = None

    @property
    def conditions(self) -> Conditions:
        """How the GPU was set up."""
        return Conditions(sm_mhz=self.sm_mhz, power_limit_w=self.power_limit_w, power_mode=self.power_mode)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file: rounded, bounds outwards."""
        distribution = self.distribution.to_json()
        return {
            "cuda_graph": self.cuda_graph,
            "distribution": {
                "bounds_ms": {
                    name: [rounded(low, ROUND_FLOOR), rounded(high, ROUND_CEILING)]
                    for name, (low, high) in distribution["bounds_ms"].items()
                },
                # Never more sure than it was.
                "confidence": rounded(distribution["confidence"], ROUND_FLOOR),
                "quantiles_ms": {q: rounded(value) for q, value in distribution["quantiles_ms"].items()},
                "samples": distribution["samples"],
            },
            "driver": self.driver,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "measured": self.measured,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "power_limit_w": None if self.power_limit_w is None else rounded(self.power_limit_w),
            "power_mode": self.power_mode,
            "recorded": self.recorded,
            "sm_mhz": self.sm_mhz,
            "tensorrt": self.tensorrt,
        }

    @classmethod
    def from_json(cls, data: Any) -> Baseline:
        """From what `to_json` gave.

        Raises
        ------
        ReportError, KeyError, TypeError, ValueError, AttributeError
            It is something else.
        """
        distribution = dict(data["distribution"])
        # A file's keys are in the order of their text.
        distribution["quantiles_ms"] = dict(
            sorted(distribution["quantiles_ms"].items(), key=lambda item: float(item[0]))
        )
        texts = {name: data[name] for name in ("model", "measured", "recorded", "tensorrt")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("model, measured, recorded and tensorrt are texts")
        if not isinstance(data["cuda_graph"], bool):
            raise TypeError("cuda_graph is true or false")
        # Files of earlier versions lack these.
        sm_mhz, power_limit_w, power_mode = (data.get(name) for name in ("sm_mhz", "power_limit_w", "power_mode"))
        if power_mode is not None and not isinstance(power_mode, str):
            raise TypeError("power_mode is a text or null")
        return cls(
            **texts,
            model_sha256=data["model_sha256"],
            input_shapes={str(name): tuple(map(int, shape)) for name, shape in data["input_shapes"].items()},
            cuda_graph=data["cuda_graph"],
            driver=data["driver"],
            distribution=Distribution.from_json(distribution),
            sm_mhz=None if sm_mhz is None else int(sm_mhz),
            power_limit_w=None if power_limit_w is None else float(power_limit_w),
            power_mode=power_mode,
        )


@dataclass(frozen=True)
class Baselines:
    """Every baseline of a directory, by GPU, node id and precision."""

    by_test: Mapping[tuple[GpuKey, str, str], Baseline]

    def find(self, gpu: GpuKey, nodeid: str, precision: str) -> Baseline | None:
        """The baseline of a test on a GPU. The node id holds the batch, where a test has several."""
        return self.by_test.get((gpu, nodeid, precision))


def read(directory: str | os.PathLike[str], *, must_exist: bool = True) -> Baselines:
    """Read every baseline below a directory.

    Parameters
    ----------
    must_exist
        Whether a directory that is not there is an error: a mistyped name, unless baselines are yet to be recorded.

    Raises
    ------
    ReportError
        A file cannot be read, or is no file of baselines; it is named.
    """
    root = Path(directory)
    if not root.is_dir() and (must_exist or root.exists()):
        raise ReportError(
            f"--trt-baseline={directory}: there is no such directory",
            "name the directory with the baselines, or record them: --trt-update-baseline",
        )
    found: dict[tuple[GpuKey, str, str], Baseline] = {}
    origins: dict[tuple[GpuKey, str, str], Path] = {}
    for path in sorted(root.rglob("*.json")):
        gpu, tests = load(path)
        for nodeid, by_precision in tests.items():
            for precision, data in by_precision.items():
                key = gpu, nodeid, precision
                if key in found:
                    raise ReportError(
                        f"{nodeid} in {precision} has a baseline in {origins[key]} and in {path}", "delete one of them"
                    )
                found[key], origins[key] = Baseline.from_json(data), path
    return Baselines(found)


Tests = dict[str, dict[str, Any]]
"""By node id and precision: what `Baseline.to_json` gives."""


def load(path: Path) -> tuple[GpuKey, Tests]:
    """One file, checked in whole.

    Raises
    ------
    ReportError
        It cannot be read, or is no file of baselines.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read the baselines in {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is no file of baselines: {error}", _RECORD_AGAIN) from error
    if isinstance(document, dict) and document.get("format") not in {None, FORMAT}:
        raise ReportError(
            f"{path} has format {document['format']!r}; this version reads {FORMAT}",
            "use the version of pytest-trtcheck that wrote it, or record it again: --trt-update-baseline",
        )
    where = ""
    try:
        if document["format"] != FORMAT:
            raise ValueError("format is null")
        gpu = GpuKey(str(document["gpu"]["name"]), str(document["gpu"]["compute_capability"]))
        tests: Tests = {str(nodeid): dict(entries) for nodeid, entries in document["tests"].items()}
        for nodeid, entries in tests.items():
            for precision, data in entries.items():
                where = f", {nodeid} in {precision}"
                Baseline.from_json(data)
    except ReportError as error:
        raise ReportError(f"{path}{where}: {error.message}", _RECORD_AGAIN) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ReportError(f"{path}{where} is no file of baselines: {problem}", _RECORD_AGAIN) from error
    return gpu, tests


def write(path: Path, gpu: GpuKey, tests: Tests) -> None:
    """Write one file, whole or not at all.

    Raises
    ------
    ReportError
        It cannot be written.
    """
    document = {
        "format": FORMAT,
        "gpu": {"compute_capability": gpu.compute_capability, "name": gpu.name},
        "tests": tests,
    }
    write_text(path, _dump(document) + "\n", "the baselines in")


def path_of(nodeid: str) -> Path:
    """Where the baselines of a test stand, below the folder of the GPU: a path that cannot leave it."""
    parts = [part for part in nodeid.partition("::")[0].replace("\\", "/").split("/") if part not in {"", "."}]
    safe = [re.sub(r"[^\w.+@ -]", "_", "_up" if part == ".." else part) for part in parts]
    return Path(*safe[:-1], f"{safe[-1] if safe else 'tests'}.json")


def rounded(value: float, rounding: str = ROUND_HALF_EVEN) -> float:
    """`value` with four significant digits. What was rounded once stays as it is."""
    context = Context(prec=_DIGITS, rounding=rounding)
    return float(context.create_decimal(repr(float(value))))


def _dump(value: object, level: int = 0) -> str:
    if not isinstance(value, Mapping) or not value or level >= _EXPANDED + 1:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    pad = "  " * (level + 1)
    lines = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {_dump(value[key], level + 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + "\n" + "  " * level + "}"
