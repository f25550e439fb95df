"""Which GPU is judged, on machines that no development machine is: Jetson, MIG beside whole cards, MPS.

NVML is simulated (`fake_nvml`) and what the CUDA driver answers is given; the rest is real.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.errors import GpuError
from pytest_trtcheck.gpu import cuda_query, device, find_gpu, jetson, parse_extra_gpus
from pytest_trtcheck.gpu.device import Gpu, detect
from pytest_trtcheck.gpu.names import model_of
from pytest_trtcheck.gpu.nvml import bare_uuid, same_uuid
from pytest_trtcheck.gpu.state import GpuMonitor
from pytest_trtcheck.plugin import session
from tests import fake_nvml
from tests.fake_nvml import card

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

A100, SLICE = "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
ORIN_UUID = "54d0709b-558d-5a59-9c65-0c5fc14a21a4"


def slice_card(number: int) -> dict[str, Any]:
    return {
        "Name": SLICE,
        "UUID": f"MIG-11111111-aaaa-5bbb-8ccc-{number:012d}",
        "MemoryInfo": SimpleNamespace(total=4864 << 20),
        "Attributes_v2": SimpleNamespace(multiprocessorCount=14, memorySizeMB=4864, gpuInstanceSliceCount=1),
    }


WHOLE = card(A100, "GPU-00000000-0000-0000-0000-00000000000a", (8, 0))
IN_MIG = card(A100, "GPU-00000000-0000-0000-0000-00000000000b", (8, 0), slices=(slice_card(1), slice_card(2)))
T4 = card("Tesla T4", "GPU-7a400000-0000-0000-0000-000000000001", (7, 5))
ORIN = {"Name": "Orin (nvgpu)", "UUID": ORIN_UUID}


def cuda(name: str, uuid: str | None, capability: tuple[int, int], **more: Any) -> dict[str, Any]:
    """What the CUDA driver says of its device 0, as `cuda_query.py` prints it."""
    return {
        "name": name,
        "uuid_hex": uuid and bare_uuid(uuid),
        "memory_bytes": 8 << 30,
        "count": 1,
        "sm_count": 8,
        "sm_khz": 1_020_000,
        "memory_khz": 2_133_000,
        "memory_bus_bits": 128,
        "major": capability[0],
        "minor": capability[1],
        **more,
    }


CUDA_ORIN = cuda("Orin", ORIN_UUID, (8, 7))
CUDA_SLICE = cuda(SLICE, IN_MIG["slices"][1]["UUID"], (8, 0))
NO_CUDA = {"error": "no CUDA driver: libcuda.so.1"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine: its cards, and what CUDA would answer; detects there. `asked` counts the questions to CUDA."""
    monkeypatch.setattr(jetson, "module", lambda: None)
    monkeypatch.setattr(device, "_under_mps", lambda environ: "CUDA_MPS_PIPE_DIRECTORY" in environ)

    def found(
        cards: list[Any], probed: Mapping[str, Any] | None, environ: Mapping[str, str] | None = None, **options: Any
    ) -> device.Detection:
        asked = []

        def answer(environ: Mapping[str, str]) -> dict[str, Any]:
            assert probed is not None, "CUDA was asked, and NVML told everything"
            asked.append(environ)
            return dict(probed)

        monkeypatch.setattr(device, "_ask_cuda", answer)
        fake_nvml.install(monkeypatch, cards, **options)
        detection = detect((), environ or {})
        assert len(asked) <= 1
        return detection

    return found


# Jetson.


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"CudaComputeCapability": (8, 7)},
        {"UUID": None},
        {"UUID": ORIN_UUID.replace("54d0", "ffff")},
        {"Name": None},
    ],
    ids=["name alone", "capability too", "no UUID", "another UUID", "no name"],
)
@pytest.mark.parametrize("finds_uuids", [True, False])
def test_a_jetson_whose_nvml_answers_little_is_a_gpu(machine: Any, told: dict[str, Any], finds_uuids: bool) -> None:
    orin = {name: value for name, value in {**ORIN, **told}.items() if value is not None}
    found = machine([orin], CUDA_ORIN, driver="540.4.0", finds_uuids=finds_uuids).gpu
    assert found is not None
    assert (found.compute_capability, found.product, found.driver) == ((8, 7), "Orin", "540.4.0")
    if "CudaComputeCapability" not in told:
        assert (found.source, found.memory_bytes, found.cores, found.max_sm_mhz) == ("nvml and cuda", 8 << 30, 8, 1020)


def test_a_jetson_s_uuid_is_the_same_however_it_was_found(machine: Any) -> None:
    whole = {**ORIN, "CudaComputeCapability": (8, 7)}
    gpus = [machine(cards, CUDA_ORIN).gpu for cards in ([whole], [ORIN], [])]
    assert {gpu.uuid for gpu in gpus} == {f"GPU-{ORIN_UUID}"}
    assert len({gpu.lock_name for gpu in gpus}) == 1, "or two workers would measure at a time"
    assert {gpu.environment()["name"] for gpu in gpus} == {"Orin"}, "or its baselines would lie in two folders"


@pytest.mark.parametrize("visible", ["0", f"GPU-{ORIN_UUID}", "GPU-54d0"])
def test_a_jetson_named_as_cuda_names_it(machine: Any, visible: str) -> None:
    assert machine([ORIN], CUDA_ORIN, {"CUDA_VISIBLE_DEVICES": visible}).gpu.product == "Orin"
    whole = {**ORIN, "CudaComputeCapability": (8, 7)}
    assert machine([whole], None, {"CUDA_VISIBLE_DEVICES": visible}).gpu.product == "Orin"


def test_nvml_that_lists_nothing_does_not_mean_that_there_is_nothing(machine: Any) -> None:
    found = machine([], CUDA_ORIN)
    assert found.gpu.product == "Orin"
    assert "clocks and load are unknown" in found.reason
    found = machine([], NO_CUDA)
    assert (found.gpu, found.reason) == (None, "NVML lists no GPU; no CUDA driver: libcuda.so.1")


def test_a_thor_of_which_nvml_tells_the_name_alone(machine: Any) -> None:
    found = machine([{"Name": "NVIDIA Thor"}], cuda("NVIDIA Thor", None, (11, 0))).gpu
    assert (found.product, found.compute_capability, found.uuid) == ("Thor", (11, 0), None)


def test_what_nobody_describes_is_no_gpu_and_says_so(machine: Any) -> None:
    found = machine([ORIN], NO_CUDA)
    assert found.gpu is None
    assert found.reason == "NVML does not tell what Orin is; no CUDA driver: libcuda.so.1"


def test_a_jetson_is_watched_by_the_handle_that_was_listed(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    orin = {**ORIN, "CudaComputeCapability": (8, 7), "UtilizationRates": SimpleNamespace(gpu=37)}
    gpu = machine([orin], None, finds_uuids=False).gpu
    with GpuMonitor(gpu) as monitor:
        assert monitor.snapshot().utilization_percent == 37


# MIG, MPS, several GPUs.


@pytest.mark.parametrize("visible", [None, "0", "0,1", "1", WHOLE["UUID"]])
@pytest.mark.parametrize("cards", [[WHOLE, IN_MIG], [IN_MIG, WHOLE], [WHOLE, WHOLE, IN_MIG]])
def test_beside_a_card_in_mig_mode_cuda_says_which_is_first(machine: Any, visible: str | None, cards: Any) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = machine(cards, CUDA_SLICE, environ).gpu
    assert (found.product, found.uuid, found.cores) == ("A100 MIG 1g.5gb", IN_MIG["slices"][1]["UUID"], 14)
    # Where CUDA does show the whole card, it is the whole card.
    found = machine(cards, cuda(A100, WHOLE["UUID"], (8, 0)), environ).gpu
    assert (found.product, found.uuid) == ("A100", WHOLE["UUID"])


@pytest.mark.parametrize(
    "visible", ["MIG-11111111-aaaa-5bbb-8ccc-000000000002", "MIG-GPU-00000000-0000-0000-0000-00000000000b/7/0"]
)
def test_a_slice_by_name(machine: Any, visible: str) -> None:
    found = machine([IN_MIG], CUDA_SLICE, {"CUDA_VISIBLE_DEVICES": visible}).gpu
    assert found.uuid == IN_MIG["slices"][1]["UUID"]


def test_one_card_in_mig_mode_stands_for_its_first_slice(machine: Any) -> None:
    assert machine([IN_MIG], None).gpu.uuid == IN_MIG["slices"][0]["UUID"]


def test_under_mps_cuda_says_which_is_first(machine: Any) -> None:
    second = {**WHOLE, "UUID": "GPU-00000000-0000-0000-0000-00000000000c"}
    environ = {"CUDA_MPS_PIPE_DIRECTORY": "/run/mps", "CUDA_VISIBLE_DEVICES": "0"}
    assert machine([WHOLE, second], cuda(A100, second["UUID"], (8, 0)), environ).gpu.uuid == second["UUID"]
    assert machine([WHOLE, second], None, {"CUDA_VISIBLE_DEVICES": "0"}).gpu.uuid == WHOLE["UUID"]


def test_among_different_cards_cuda_says_which_is_first(machine: Any) -> None:
    fastest = cuda(A100, WHOLE["UUID"], (8, 0))
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": f"{T4['UUID']},{T4['UUID']}"}):
        assert machine([T4, WHOLE], fastest, environ).gpu.product == "A100"
    assert machine([T4, WHOLE], None, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).gpu.product == "T4"
    assert machine([T4, WHOLE], None, {"CUDA_VISIBLE_DEVICES": T4["UUID"][:12]}).gpu.product == "T4"
    found = machine([T4, WHOLE], NO_CUDA)
    assert found.gpu is None
    assert "which GPU CUDA uses first" in found.reason


@pytest.mark.parametrize("visible", ["", "-1", " ", ",0"])
def test_hidden_gpus_need_no_question(machine: Any, visible: str) -> None:
    found = machine([T4, WHOLE], None, {"CUDA_VISIBLE_DEVICES": visible})
    assert found.gpu is None
    assert "CUDA_VISIBLE_DEVICES" in found.reason


def test_a_name_that_nvml_does_not_know_is_cuda_s_to_judge(machine: Any) -> None:
    lower = {"CUDA_VISIBLE_DEVICES": T4["UUID"].lower()}
    assert machine([T4], cuda("Tesla T4", T4["UUID"], (7, 5)), lower).gpu.product == "T4"
    found = machine([T4], {"error": "the CUDA driver shows no device"}, lower)
    assert found.gpu is None
    assert "names no GPU of this machine" in found.reason


def test_a_card_that_is_lost_is_not_judged(machine: Any) -> None:
    assert machine([{}, T4], cuda("Tesla T4", T4["UUID"], (7, 5))).gpu.uuid == T4["UUID"]


def test_a_gpu_that_nvml_does_not_list_is_cuda_s(machine: Any) -> None:
    found = machine([T4, WHOLE], cuda("NVIDIA L4", "GPU-99990000-0000-0000-0000-000000000000", (8, 9)))
    assert (found.gpu.product, found.gpu.source) == ("L4", "cuda")
    assert "clocks and load are unknown" in found.reason


def test_the_slice_is_watched_and_its_card_s_clocks(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card_ = {**IN_MIG, "ClockInfo": lambda _: 1095}
    gpu: Gpu = machine([WHOLE, card_], CUDA_SLICE).gpu
    with GpuMonitor(gpu) as monitor:
        state = monitor.snapshot()
    assert (state.sm_mhz, state.max_sm_mhz) == (1095, 1410)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("GPU-54d0-01", "54d0-01", True),
        ("GPU-54D0-01", "gpu-54d001", True),
        ("MIG-1", "MIG-1", True),
        ("GPU-1", "GPU-2", False),
        ("", "", False),
        (None, None, False),
    ],
)
def test_same_uuid(one: str | None, other: str | None, same: bool) -> None:
    assert same_uuid(one, other) is same


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "broke the process that asked it (signal 11)"),
        ("raise SystemExit('no such symbol: cuInit')", "(exit code 1): no such symbol: cuInit"),
    ],
)
def test_a_probe_that_crashes_says_so(script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "query.py").write_text(script)
    monkeypatch.setattr(cuda_query, "__file__", str(tmp_path / "query.py"))
    told = device._told_by_cuda({}, ())
    assert isinstance(told, str)
    assert said in told
    assert "Expecting value" not in told


def test_what_a_hint_says_leads_somewhere() -> None:
    """A virtual GPU, which is in no table: the line that is printed makes it known."""
    name, capability = "NVIDIA A10-24Q", (8, 6)
    here = Gpu(name=name, model=model_of(name, capability), compute_capability=capability)
    with pytest.raises(GpuError) as caught:
        device.require_match(find_gpu("T4"), here)
    assert "or for 'A10-24Q' with the line `A10-24Q = 8.6` in the ini key trt_gpus" in caught.value.hint
    extra = parse_extra_gpus([device.own_line(here)])
    asked = find_gpu("A10-24Q", extra)
    assert device.require_match(asked, replace(here, model=model_of(name, capability, extra)), extra) is asked
    with pytest.raises(GpuError, match="ask for 'A10-24Q' or nothing"):
        device.require_match(find_gpu("T4"), replace(here, model=model_of(name, capability, extra)), extra)


def test_an_unknown_gpu_is_told_with_the_one_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    t4 = Gpu(name="Tesla T4", model=find_gpu("T4"), compute_capability=(7, 5))
    monkeypatch.setattr(device, "detect", lambda *_: device.Detection(t4))
    with pytest.raises(GpuError) as caught:
        session._known("Board", ())
    assert "Tesla T4" in caught.value.hint
    assert "ask for 'T4' or nothing; for a GPU elsewhere: add a line of your own" in caught.value.hint
    monkeypatch.setattr(device, "detect", lambda *_: device.Detection(None, "none"))
    with pytest.raises(GpuError) as caught:
        session._known("Board", ())
    assert "`Board = X.Y`" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "capability", "asked"),
    [
        ("NVIDIA A10-24Q", (8, 6), "A10-24Q"),
        ("GRID T4-16Q", (7, 5), "GRID T4-16Q"),
        (SLICE, (8, 0), "A100 MIG 1g.5gb"),
        ("NVIDIA B7000 MIG 1g.5gb", (10, 0), "B7000 MIG 1g.5gb"),
        ("NVIDIA H100 NVL MIG unknown", (9, 0), "H100 NVL MIG unknown"),
        ("Orin", (8, 7), "Orin"),
        ("NVIDIA Thor", (11, 0), "Thor"),
        ("Tesla T4", (8, 6), "T4"),
        ("Rubin X", (13, 0), "Rubin X"),
        ("NVIDIA X=Y", (8, 6), "sm86"),
        ("NVIDIA", (9, 0), "sm90"),
    ],
)
def test_what_is_said_of_any_gpu_leads_to_it(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], asked: str
) -> None:
    """vGPUs, slices, Jetsons, boards of tomorrow: the line that is printed is one, and the name then is the GPU's."""
    monkeypatch.setattr(jetson, "module", lambda: None)
    fake_nvml.install(monkeypatch, [card(name, "GPU-00000000-0000-0000-0000-000000000001", capability)])
    said = device.how_to_ask(detect((), {}).gpu or pytest.fail("none"))
    assert repr(asked) in said
    extra = parse_extra_gpus(re.findall("the line `(.*?)` in", said))
    here = detect(extra, {}).gpu
    assert here is not None
    assert device.is_named(find_gpu(asked, extra), here)
