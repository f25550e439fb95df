"""Reports of runs on GPUs, as pages compare and join them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pytest_trtcheck.record import GpuRecord, Library
from tests.test_report_diff import check, latency, output, parity, report
from tests.test_report_upgrade import engine, layer

if TYPE_CHECKING:
    from pytest_trtcheck.record import CheckRecord, EngineRecord, LayerRecord, RunRecord

DETECTOR = "tests/test_detector.py::test_detector[{}]"


def _others(**changes: object) -> list[CheckRecord]:
    """Twelve checks that pass."""
    return [check(f"tests/test_others.py::test_{n:02}", precision="fp16", **changes) for n in range(12)]


def compared() -> tuple[RunRecord, RunRecord]:
    """A run with an older and a newer TensorRT-RTX: a detector in INT8 got worse, and slower."""
    name = DETECTOR.format("int8")
    wrong = parity(output(value=0.011, verdict="fail"), output("scores", 0.002), verdict="fail")
    worse = check(name, verdict="fail", parity=wrong, latency=latency(1.2, seed=1))
    return report(check(name), *_others()), report(worse, *_others(), tensorrt="1.7.1.116")


def _engine(before: bool) -> EngineRecord:
    """A network of 40 convolutions; the newer engine fuses otherwise, and leaves two of them in FP32."""
    layers: list[LayerRecord] = []
    for n in range(40):
        widened = not before and n in {7, 9}
        took = 0.48 if widened and n == 7 else 0.21
        kind = "fp32" if widened else "int8"
        name = f"conv{n} + relu{n}" if before else f"__myl_{n}"
        if before or n < 28:
            layers.append(layer(name, kind, f"conv{n}", f"relu{n}", ms=took))
        else:
            layers += [layer(f"{name}_{part}", kind, f"{part}{n}", ms=took / 2) for part in ("conv", "relu")]
    layers += [layer(f"copy{n}", "fp32", ms=0.01) for n in range(44 if before else 39)]
    found = engine(layers)
    return replace(found, bytes=int((4.1 if before else 5.0) * (1 << 20)))


def upgraded() -> tuple[RunRecord, RunRecord]:
    """A run with TensorRT 10.16 and with 11.4: a detector in INT8 lost its precision in two nodes."""
    name = DETECTOR.format("int8")
    wrong = parity(output(value=0.011, limit=0.02), output("scores", 0.002))
    right = parity(output(limit=0.02), output("scores", 0.002))
    old = report(check(name, parity=right, engine=_engine(True)), *_others(engine=_engine(True)))
    new = report(check(name, parity=wrong, engine=_engine(False)), *_others(engine=_engine(True)))
    return _of("10.16.1.11", old), _of("11.4.0.106", new)


def _of(version: str, run: RunRecord) -> RunRecord:
    return replace(run, environment=replace(run.environment, tensorrt=Library(module="tensorrt", version=version)))


def fleet(name: str, capability: str) -> RunRecord:
    """A run on one machine of several: on the Orin INT8 fails, and one check was not made."""
    is_orin = name == "Orin"
    word: Literal["pass", "fail"] = "fail" if is_orin else "pass"
    int8 = parity(output(value=0.0911 if is_orin else 0.0310, limit=0.05, verdict=word), verdict=word)
    message = "models/detector.onnx in int8 differs from its FP32 reference" if is_orin else None
    checks = [
        check(DETECTOR.format("fp16"), precision="fp16", parity=parity(output(value=0.0021))),
        check(DETECTOR.format("int8"), parity=int8, verdict=word, message=message),
    ]
    checks = [replace(each, model="models/detector.onnx") for each in checks]
    if not is_orin:
        checks.append(replace(check("tests/test_ocr.py::test_ocr", precision="fp16"), model="models/ocr.onnx"))
    run = report(*checks)
    return replace(run, environment=replace(run.environment, gpu=GpuRecord(name, "GPU-1", capability)))


def nights() -> tuple[RunRecord, ...]:
    """Four nights of one machine: a detector in INT8 creeps up, and fails with another TensorRT."""
    runs = []
    for day, (error, version) in enumerate(
        [(0.0040, "1.5.0.114"), (0.0043, "1.5.0.114"), (0.0046, "1.5.0.114"), (0.0110, "1.7.1.116")], 1
    ):
        word: Literal["pass", "fail"] = "fail" if error > 0.01 else "pass"
        judged = parity(output(value=error, verdict=word), output("scores", 0.002), verdict=word)
        timed = latency(1.0, seed=day)
        run = report(
            check(DETECTOR.format("int8"), verdict=word, parity=judged, latency=timed), *_others(), tensorrt=version
        )
        commit = f"{0x9AD0146 + 0x1111111 * day % 0x7FFFFFF:07x}"
        runs.append(replace(run, started=f"2026-11-{day:02}T03:00:00Z", commit=commit, duration_s=60.0 + day))
    return tuple(runs)
