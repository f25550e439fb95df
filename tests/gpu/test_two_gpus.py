"""Workers on a machine with two GPUs of one kind: each has its own, one measures at a time on each, one report."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.gpu.device import Gpu, visible_gpus

if TYPE_CHECKING:
    from tests.conftest import Run, Suite

pytestmark = pytest.mark.gpu

MEASURED = """
@trt_latency(p50_ms=1000.0, max_seconds=20)
@trt_parity("conv.onnx", batch=8)
@pytest.mark.parametrize("n", range(8))
def test_n(n): ...
"""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    found = visible_gpus()
    if len(found) < 2 or len({gpu.name for gpu in found}) > 1:
        pytest.skip(f"needs two GPUs of one kind: there are {[gpu.name for gpu in found]}")
    return list(found)


def intervals(run: Run) -> dict[str, list[tuple[int, int]]]:
    """When was measured, by GPU, in µs."""
    found: dict[str, list[tuple[int, int]]] = {}
    for record in run.checks:
        clocks: dict[str, Any] = record["latency"]["clocks"]
        span = clocks["before"]["time_us"], clocks["after"]["time_us"]
        found.setdefault(record["gpu"]["uuid"], []).append(span)
    return found


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def test_each_worker_has_a_gpu_and_one_measures_at_a_time_on_each(suite: Suite, two_gpus: list[Gpu]) -> None:
    suite.write(test_measured=MEASURED)
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", f"-n{2 * len(two_gpus)}")
    run.result.assert_outcomes(passed=8)
    uuids = {gpu.uuid for gpu in two_gpus}
    assert {record["gpu"]["uuid"] for record in run.checks} == uuids
    assert {gpu["uuid"] for gpu in run.report["environment"]["gpus"]} == uuids
    assert sorted(record["engine"]["cached"] for record in run.checks) == [False, *[True] * 7], "one build for all"
    assert f"run on {len(uuids)} × " in run.text
    spans = intervals(run)
    for uuid, own in spans.items():
        pairs = itertools.combinations(own, 2)
        assert not any(overlap(*pair) for pair in pairs), f"two measured at once on {uuid}"
    first, second, *_ = spans.values()
    assert any(overlap(one, other) for one in first for other in second), "one GPU waited for the other"


def test_cuda_itself_says_that_each_worker_is_on_its_own(suite: Suite, two_gpus: list[Gpu]) -> None:
    suite.write(
        test_hand="""
import os, pathlib

@pytest.mark.parametrize("n", range(6))
def test_n(trt_build, n):
    engine = trt_build("conv.onnx", precision="fp16")
    assert engine.evidence == "engine"
    engine({"image": np.zeros((1, 3, 16, 16), np.float32)})
    from cuda.bindings import driver
    assert driver.cuDeviceGetCount()[1] == 1
    uuid = driver.cuDeviceGetUuid(0)[1].bytes.hex()
    pathlib.Path(f"{os.environ['PYTEST_XDIST_WORKER']}.{uuid}").touch()
"""
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "-n2")
    run.result.assert_outcomes(passed=6)
    told = dict(path.name.split(".") for path in suite.path.glob("gw*.*"))
    known = [str(gpu.uuid).removeprefix("GPU-").replace("-", "") for gpu in two_gpus]
    assert told == {"gw0": known[0], "gw1": known[1]}


@pytest.mark.parametrize("by", ["index", "uuid"])
def test_what_is_hidden_is_not_used(
    suite: Suite, two_gpus: list[Gpu], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.write(test_measured=MEASURED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1" if by == "index" else str(two_gpus[1].uuid))
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "-n2", "-k", "0 or 1")
    run.result.assert_outcomes(passed=2)
    assert {record["gpu"]["uuid"] for record in run.checks} == {two_gpus[1].uuid}
    assert "gpus" not in run.report["environment"]
    assert run.report["environment"]["gpu"]["uuid"] == two_gpus[1].uuid


def test_a_gpu_that_is_named_is_used_by_all_workers_of_its_kind(suite: Suite, two_gpus: list[Gpu]) -> None:
    suite.write(test_measured=MEASURED)
    product = two_gpus[0].product
    run = suite.run_apart(
        f"--trt-cache-dir={suite.path / 'cache'}", "-n2", f"--trt-gpu={product}", "-k", "0 or 1 or 2 or 3"
    )
    run.result.assert_outcomes(passed=4)
    assert len({record["gpu"]["uuid"] for record in run.checks}) == 2


@pytest.mark.parametrize("early", [True, False])
def test_modules_that_initialize_cuda(suite: Suite, two_gpus: list[Gpu], early: bool) -> None:
    """With an option on the command line, a worker has its GPU before; without, it keeps the first, and says so."""
    suite.write(test_it="from cuda.bindings import driver\ndriver.cuInit(0)\n" + MEASURED)
    arguments = ("-n2", "-p", "no:cacheprovider", "-k", "0 or 1 or 2 or 3")
    if early:
        run = suite.run_apart(*arguments)
        run.result.assert_outcomes(passed=4)
        assert len({record["gpu"]["uuid"] for record in run.checks}) == 2
        return
    result = suite.pytester.runpytest_subprocess(*arguments)
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*this worker uses the first: CUDA was initialized in it before*"])
    assert " × " not in result.stdout.str()


def test_without_workers_cuda_s_first_is_used(suite: Suite, two_gpus: list[Gpu]) -> None:
    suite.write(test_measured=MEASURED)
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "-n0", "-k", "0 or 1")
    run.result.assert_outcomes(passed=2)
    assert {record["gpu"]["uuid"] for record in run.checks} == {two_gpus[0].uuid}
    assert "gpus" not in run.report["environment"]


def test_sixteen_workers_on_one_cold_key_build_once(suite: Suite, two_gpus: list[Gpu]) -> None:
    suite.write(
        test_many='@trt_parity("conv.onnx", batch=2)\n@pytest.mark.parametrize("n", range(32))\ndef test_n(n): ...\n'
    )
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'cache'}", "-n16")
    run.result.assert_outcomes(passed=32)
    assert sorted(record["engine"]["cached"] for record in run.checks) == [False, *[True] * 31]
    assert len({record["gpu"]["uuid"] for record in run.checks}) == len(two_gpus)
