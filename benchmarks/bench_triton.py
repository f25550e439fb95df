"""The latency that is measured of a served model, against a bare loop of Triton's own client.

    python tests/triton/server.py FOLDER python benchmarks/bench_triton.py [--pairs N] [--json FILE]

A real server on the CPU (its Python backend with ONNX Runtime, no dynamic batching), over HTTP and gRPC, with a model
of two products and with magika's. One request by the plugin and one by the bare loop take turns, each with a connection
of its own; which comes first changes from pair to pair. What counts is the median of the ratios within a pair, and the
interval that holds it with 95 % confidence. Without a server there are no results, and no limit applies.
"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reports  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.backends.triton.address import Address
from pytest_trtcheck.backends.triton.client import Connection
from pytest_trtcheck.backends.triton.served import Served, ServedRuns
from pytest_trtcheck.model import onnx_model
from tests.triton.conftest import Model, models
from tests.triton.server import Server, why_not

LIMIT = 0.03
WARM_UP = 200
BATCHING = "max_batch_size: 8\n"
INPUTS: dict[str, dict[str, np.ndarray[Any, Any]]] = {
    "heads": {"x": np.linspace(-1, 1, 4, dtype=np.float32).reshape(1, 4)},
    "magika": {"bytes": np.arange(2048, dtype=np.int32).reshape(1, 2048) % 256},
}


def median_interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Order statistics that enclose the median of the distribution with 95 % confidence (normal approximation)."""
    count = len(values)
    rank = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    ordered = np.sort(values)
    return float(ordered[rank]), float(ordered[count - 1 - rank])


def bare(protocol: str, server: str, name: str, inputs: dict[str, np.ndarray[Any, Any]]) -> Any:
    """One request by the client alone; what it took, in milliseconds."""
    module = importlib.import_module(f"tritonclient.{protocol}")
    client = module.InferenceServerClient(server)
    types = {"float32": "FP32", "int32": "INT32"}
    prepared = [
        module.InferInput(name, array.shape, types[array.dtype.name]).set_data_from_numpy(array)
        for name, array in inputs.items()
    ]

    def request() -> float:
        began = time.perf_counter()
        client.infer(name, prepared)
        return 1000 * (time.perf_counter() - began)

    return request


def measured(url: str, name: str, path: Path, pairs: int) -> dict[str, object]:
    """Our median over the bare loop's, pair by pair."""
    address = Address.parse(url)
    inputs = INPUTS[name]
    theirs = bare(address.protocol, address.server, name, inputs)
    with closing(Connection(address)) as connection:
        runs = ServedRuns(Served(connection, connection.find([name], None), onnx_model.load(path)), [inputs])
        ours_ms, bare_ms = np.empty(pairs), np.empty(pairs)

        def ours() -> float:
            return float(runs.run(1).run_ms[0])

        for _ in range(WARM_UP):
            ours()
            theirs()
        for index in range(pairs):
            if index % 2:
                ours_ms[index], bare_ms[index] = ours(), theirs()
            else:
                bare_ms[index], ours_ms[index] = theirs(), ours()
    ratios = ours_ms / bare_ms
    low, high = median_interval(ratios)
    return {
        "pairs": pairs,
        "ours_p50_ms": round(float(np.median(ours_ms)), 4),
        "bare_p50_ms": round(float(np.median(bare_ms)), 4),
        "ratio": round(float(np.median(ratios)), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Triton's latency against a bare client loop.")
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "triton", "python": platform.python_version(), "limits": {"ratio": LIMIT}}
    if (reason := why_not()) is not None:
        reports.keep({**report, "reason": reason, "results": {}, "within_limits": None}, arguments.json)
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch, "repository")
        for name in INPUTS:
            model = models()[name]
            assert isinstance(model, Model)
            replace(model, batching=BATCHING, versions=(1,)).write(repository / name)
        with Server(repository, Path(scratch)) as server:
            for protocol in ("http", "grpc"):
                for name in INPUTS:
                    path = repository / name / "1" / "model.onnx"
                    results[f"{name}, {protocol}"] = measured(getattr(server, protocol), name, path, arguments.pairs)
    report |= {
        "tritonclient": version("tritonclient"),
        "results": results,
        "within_limits": all(abs(float(str(each["ratio"])) - 1) <= LIMIT for each in results.values()),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
