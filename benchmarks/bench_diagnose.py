"""What a diagnosis costs, against the check that failed: time against one emulated run, peak memory against the check.

    python benchmarks/bench_diagnose.py [--nodes N] [--size S] [--repeat K] [--json FILE]

The model has N nodes: residual blocks with an activation, and one block that overflows in FP16. Each figure is taken in
a process of its own. An emulated run is what a check does: load the emulated model, run it once. "Blame" is the trace
along the graph and what the likeliest causes do to the outputs; the search for `keep_fp32` comes on top of it, with a
budget.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script

TIME_LIMIT_RATIO = 10.0
MEMORY_LIMIT_RATIO = 2.0
CHANNELS = 32


def make_model(nodes: int, size: int, path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    made: list[Any] = []
    weights: dict[str, Any] = {"big": np.array(6e4, np.float32)}
    source, overflows_at = "image", (nodes // 8) * 4
    while len(made) < nodes - 2:
        index = len(made)
        weights[f"w{index}"] = (rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) * 0.008).astype(np.float32)
        made += [
            helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], f"conv{index}", pads=[1, 1, 1, 1]),
            helper.make_node("Sigmoid", [f"c{index}"], [f"s{index}"], f"sigmoid{index}"),
            helper.make_node("Mul", [f"c{index}", f"s{index}"], [f"m{index}"], f"mul{index}"),
            helper.make_node("Add", [f"m{index}", source], [f"x{index}"], f"add{index}"),
        ]
        source = f"x{index}"
        if index == overflows_at:
            made += [
                helper.make_node("Mul", [source, "big"], ["up"], "up"),
                helper.make_node("Div", ["up", "big"], ["down"], "down"),
            ]
            source = "down"
    made.append(helper.make_node("GlobalAveragePool", [source], ["y"], "pool"))
    shape = [1, CHANNELS, size, size]
    graph = helper.make_graph(
        made,
        "bench",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CHANNELS, 1, 1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def work(what: str, folder: Path, size: int) -> dict[str, float]:
    """One figure: "check", "blame" (the check and its blame) or "search" (and the search as well)."""
    from pytest_trtcheck import compare
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.diagnose import Budget, Subject, diagnose
    from pytest_trtcheck.model.sources import open_model
    from pytest_trtcheck.precision.emulation import emulation
    from pytest_trtcheck.precision.lowering import lower
    from pytest_trtcheck.precision.reference import Reference

    cache = Cache(folder / "cache")
    model = open_model(str(folder / "model.onnx"), [folder], cache)
    lowered = lower(model, "fp16", cache)
    case = {"image": np.random.default_rng(1).standard_normal((1, CHANNELS, size, size)).astype(np.float32)}
    # A check for the first time computes its reference, so that process holds both models as well.
    reference = Reference(model, Cache(folder / f"reference-{os.getpid()}"))
    limits = compare.resolve_limits(None, "max", "fp16", [output.name for output in model.outputs])
    start = time.perf_counter()
    with closing(emulation(model, lowered, "fp16", cache)) as runner:
        actual = runner(case)
    found = {"emulated_run_s": time.perf_counter() - start}
    measured = compare.measure_all(actual, reference(case), limits)
    outputs = [compare.judge(each, limits[name]) for name, each in measured.items()]
    assert outputs[0].verdict == "fail"
    if what != "check":
        subject = Subject(model, lowered, "fp16", (), None, [], [case], 0, limits, reference)
        start = time.perf_counter()
        blame = diagnose(subject, cache, emulated=actual, budget=Budget(trials=0 if what == "blame" else 250))
        found["diagnosis_s"] = time.perf_counter() - start
        assert blame is not None
        assert blame.culprit is not None
        assert blame.culprit.tensor == "up"
        assert (blame.keep_fp32 is not None) == (what == "search")
        found["trials"] = blame.trials
    found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def median(what: str, folder: Path, size: int, repeat: int) -> dict[str, float]:
    runs = []
    for _ in range(repeat):
        command = [sys.executable, __file__, "--work", what, "--folder", str(folder), "--size", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a diagnosis, against the check that failed.")
    parser.add_argument("--nodes", type=int, default=500, help="nodes of the model (default: 500)")
    parser.add_argument("--size", type=int, default=56, help="height and width of its activations (default: 56)")
    parser.add_argument("--repeat", type=int, default=3, help="processes of which the median counts")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.folder, arguments.size)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(arguments.nodes, arguments.size, folder / "model.onnx")
        # Once for the cache: lowering and reference are no part of what is compared.
        work("check", folder, arguments.size)
        results = {
            what: median(what, folder, arguments.size, arguments.repeat) for what in ("check", "blame", "search")
        }
    run_s = results["check"]["emulated_run_s"]
    ratios = {
        "blame_time": results["blame"]["diagnosis_s"] / run_s,
        "search_time": results["search"]["diagnosis_s"] / run_s,
        "blame_memory": results["blame"]["peak_rss_mib"] / results["check"]["peak_rss_mib"],
        "search_memory": results["search"]["peak_rss_mib"] / results["check"]["peak_rss_mib"],
    }
    report = {
        "benchmark": "diagnose",
        "nodes": arguments.nodes,
        "size": arguments.size,
        "repeat": arguments.repeat,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "limits": {
            "blame_time": TIME_LIMIT_RATIO,
            "blame_memory": MEMORY_LIMIT_RATIO,
            "search_memory": MEMORY_LIMIT_RATIO,
        },
        "results": results,
        "ratios": ratios,
        "within_limits": ratios["blame_time"] <= TIME_LIMIT_RATIO
        and max(ratios["blame_memory"], ratios["search_memory"]) <= MEMORY_LIMIT_RATIO,
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
