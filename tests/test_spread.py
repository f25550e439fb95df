"""Which GPU each worker uses, on machines that no development machine is: several cards, of several kinds, in slices.

NVML is simulated (`fake_nvml`) and what the CUDA driver answers is given; the rest, pytest-xdist included, is real.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.gpu import device, find_gpu, spread
from pytest_trtcheck.gpu.spread import Place, place
from tests import fake_nvml
from tests.fake_nvml import card
from tests.test_gpu_detect import A100, IN_MIG, T4, WHOLE, cuda, slice_card

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conftest import Suite

SECOND = card(A100, "GPU-00000000-0000-0000-0000-00000000000c", (8, 0))
LARGE = {**slice_card(3), "Name": "NVIDIA A100-SXM4-40GB MIG 3g.20gb"}
MIXED_SLICES = {**IN_MIG, "slices": (slice_card(1), LARGE, slice_card(2))}
FIRST_IS_A100 = cuda(A100, WHOLE["UUID"], (8, 0), uuids_hex=[each["UUID"][4:] for each in (WHOLE, SECOND, T4)])


def uuids(*cards: Mapping[str, Any]) -> list[str]:
    return [each["UUID"] for each in cards]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine: its cards, and what CUDA would answer. Gives where each of four workers goes there."""
    monkeypatch.setattr(device, "_under_mps", lambda environ: "CUDA_MPS_PIPE_DIRECTORY" in environ)
    monkeypatch.setattr(spread, "is_initialized", lambda: False)

    def placed(
        cards: list[Any], told: Mapping[str, Any] | None = None, gpu: str | None = None, **environ: str
    ) -> list[str | None]:
        monkeypatch.setattr(device, "_ask_cuda", lambda _: dict(told or {"error": "CUDA was asked"}))
        fake_nvml.install(monkeypatch, cards)
        requested = find_gpu(gpu) if gpu else None
        return [place(worker, requested, (), environ).visible for worker in (None, 0, 1, 2, 3)]

    return placed


def test_workers_take_turns_over_what_is_visible(machine: Any) -> None:
    one, other = uuids(WHOLE, SECOND)
    assert machine([WHOLE, SECOND]) == [None, one, other, one, other]
    assert machine([WHOLE, SECOND], gpu="A100") == [None, one, other, one, other]
    assert machine([WHOLE, SECOND], CUDA_VISIBLE_DEVICES="1,0") == [None, other, one, other, one]
    assert machine([WHOLE, SECOND], CUDA_VISIBLE_DEVICES=f"{other},{one}") == [None, other, one, other, one]


@pytest.mark.parametrize("visible", ["1", "", "-1", "0,-1", "0,0", "7"])
def test_where_nothing_is_to_be_chosen_nothing_is_set(machine: Any, visible: str) -> None:
    assert machine([WHOLE, SECOND], CUDA_VISIBLE_DEVICES=visible) == [None] * 5
    assert machine([WHOLE]) == [None] * 5
    assert machine([]) == [None] * 5
    assert machine([WHOLE, SECOND], CUDA_MPS_PIPE_DIRECTORY="/run/mps") == [None] * 5


def test_kinds_are_not_mixed(machine: Any) -> None:
    """Or the verdict would hang on the worker that a test came to; a display's card is no A100."""
    one, other, t4 = uuids(WHOLE, SECOND, T4)
    cards = [T4, WHOLE, SECOND]
    assert machine(cards, FIRST_IS_A100) == [None, one, other, one, other]
    assert machine(cards, CUDA_DEVICE_ORDER="PCI_BUS_ID") == [None, t4, t4, t4, t4]
    # The one that is named is used, without workers too, where CUDA counts another first.
    assert machine(cards, FIRST_IS_A100, gpu="T4") == [t4] * 5
    assert machine(cards, FIRST_IS_A100, gpu="A100") == [None, one, other, one, other]
    assert machine(cards, FIRST_IS_A100, gpu="L4") == [None] * 5
    smaller = {**SECOND, "MemoryInfo": type("Memory", (), {"total": 80 << 30})}
    assert machine([WHOLE, smaller], FIRST_IS_A100, gpu="sm80") == [None, one, one, one, one]


def test_an_index_is_cuda_s_where_it_counts_otherwise(machine: Any) -> None:
    one, other = uuids(WHOLE, SECOND)
    visible = {"CUDA_VISIBLE_DEVICES": "0,1"}
    told = {**FIRST_IS_A100, "uuids_hex": FIRST_IS_A100["uuids_hex"][:2]}
    assert machine([T4, WHOLE, SECOND], told, **visible) == [None, one, other, one, other]
    assert machine([T4, WHOLE, SECOND], told, "T4", **visible) == [None] * 5


def test_a_worker_a_slice(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = uuids(*IN_MIG["slices"])
    assert machine([IN_MIG]) == [None, one, two, one, two]
    assert machine([IN_MIG], CUDA_VISIBLE_DEVICES="0") == [None, one, two, one, two]
    assert machine([IN_MIG], CUDA_VISIBLE_DEVICES=f"{two},{one}") == [None, two, one, two, one]
    # Beside a whole card CUDA shows one slice and hides the card; slices of another size are another kind.
    told = cuda(slice_card(1)["Name"], one, (8, 0))
    assert machine([WHOLE, MIXED_SLICES], told) == [None, one, two, one, two]
    assert machine([WHOLE, MIXED_SLICES], told, "A100 MIG 3g.20gb") == [LARGE["UUID"]] * 5
    assert machine([WHOLE, MIXED_SLICES], told, "A100") == [WHOLE["UUID"]] * 5
    fake_nvml.install(monkeypatch, [MIXED_SLICES])
    found = {device.detect((), {"CUDA_VISIBLE_DEVICES": uuid}).gpu for uuid in uuids(*MIXED_SLICES["slices"])}
    assert sorted(gpu.product for gpu in found if gpu) == ["A100 MIG 1g.5gb"] * 2 + ["A100 MIG 3g.20gb"]
    assert len({gpu.lock_name for gpu in found if gpu}) == 3, "each slice is held for itself"


def test_cuda_that_is_initialized_keeps_its_gpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "is_initialized", lambda: True)
    assert machine([WHOLE, SECOND]) == [None] * 5
    assert "of 2 GPUs this worker uses the first" in str(place(1, None, (), {}).note)
    assert place(None, None, (), {}) == Place()


@pytest.mark.parametrize(("status", "initialized"), [(0, True), (3, False), (100, True)])
def test_whether_cuda_is_initialized(monkeypatch: pytest.MonkeyPatch, status: int, initialized: bool) -> None:
    library = type("Cuda", (), {"cuDeviceGetCount": staticmethod(lambda _: status)})
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    assert spread.is_initialized() is initialized


CONFTEST = """
import json, os, pathlib, sys
from tests import fake_nvml
from tests.test_spread import SECOND, WHOLE

sys.modules["pynvml"] = fake_nvml.FakeNvml([WHOLE, SECOND])

def pytest_runtest_logfinish(nodeid):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        pathlib.Path(f"{worker}.seen").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
"""


@pytest.mark.parametrize(("written", "used"), [(True, True), (False, False)], ids=["checks", "other tests"])
def test_real_workers(suite: Suite, monkeypatch: pytest.MonkeyPatch, written: bool, used: bool) -> None:
    """Each worker that will check is bound before its first test; one that won't keeps all GPUs."""
    for name in ("CUDA_VISIBLE_DEVICES", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    marker = '@trt_parity("conv.onnx", batch=2, backend="onnxruntime")\n' if written else ""
    text = f"import pytest\nfrom pytest_trtcheck import trt_parity\n\n{marker}@pytest.mark.parametrize('n', range(4))\n"
    suite.path.joinpath("conftest.py").write_text(CONFTEST)
    suite.path.joinpath("test_it.py").write_text(text + "def test_n(n): ...\n")
    result = suite.pytester.runpytest_subprocess("-n2", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    result.assert_outcomes(passed=4)
    seen = {path.stem: path.read_text() for path in suite.path.glob("*.seen")}
    assert seen == ({"gw0": WHOLE["UUID"], "gw1": SECOND["UUID"]} if used else {"gw0": "none", "gw1": "none"})


def test_the_report_names_what_ran_each_check(suite: Suite) -> None:
    """Two GPUs in one report, as their workers told of them."""
    suite.write(
        test_it='@trt_parity("conv.onnx", batch=2)\n@pytest.mark.parametrize("n", range(3))\ndef test_n(n): ...\n',
        conftest="""
from dataclasses import replace
from pytest_trtcheck.choices import PROPERTY
from pytest_trtcheck.record import CheckRecord, GpuRecord

@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for index, (name, value) in enumerate(report.user_properties):
        if name == PROPERTY:
            gpu = GpuRecord("NVIDIA H100", f"GPU-{item.callspec.params['n'] % 2}", "9.0")
            report.user_properties[index] = name, replace(CheckRecord.from_json(value), gpu=gpu).to_json()
    return report
""",
    )
    run = suite.run("test_it.py", f"--trt-html={suite.path / 'page.html'}")
    environment = run.report["environment"]
    assert [gpu["uuid"] for gpu in environment["gpus"]] == ["GPU-0", "GPU-1"]
    assert environment["gpu"] == environment["gpus"][0]
    said = "run on 2 × NVIDIA H100 (compute capability 9.0): GPU-0 2 checks, GPU-1 1 check"
    assert said in " ".join(run.text.split())
    assert "2 × NVIDIA H100" in (suite.path / "page.html").read_text()
    assert json.loads(json.dumps(run.report)) == run.report
