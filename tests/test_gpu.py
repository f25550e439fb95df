"""GPU names, budgets by GPU, and what CUDA_VISIBLE_DEVICES selects."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_trtcheck.errors import ArgumentError, GpuError
from pytest_trtcheck.gpu import (
    GpuModel,
    builtin_models,
    check_budget_keys,
    cuda_query,
    find_gpu,
    fits,
    jetson,
    model_of,
    parse_extra_gpus,
    pick,
)
from pytest_trtcheck.gpu.device import (
    Card,
    Gpu,
    capability_text,
    detect,
    identity_parts,
    require_match,
    select_visible,
    why_no_tf32,
)


@pytest.mark.parametrize(
    ("name", "product", "capability", "architecture"),
    [
        ("T4", "T4", "7.5", "turing"),
        ("tesla t4", "T4", "7.5", "turing"),
        ("Tesla V100-SXM2-16GB", "V100", "7.0", "volta"),
        ("NVIDIA A10", "A10", "8.6", "ampere"),
        ("NVIDIA A10G", "A10G", "8.6", "ampere"),
        ("A30", "A30", "8.0", "ampere"),
        ("A40", "A40", "8.6", "ampere"),
        ("a100", "A100", "8.0", "ampere"),
        ("NVIDIA A100-SXM4-80GB", "A100", "8.0", "ampere"),
        ("NVIDIA A100 80GB PCIe", "A100", "8.0", "ampere"),
        ("NVIDIA L4", "L4", "8.9", "ada"),
        ("NVIDIA L40", "L40", "8.9", "ada"),
        ("NVIDIA L40S", "L40S", "8.9", "ada"),
        ("NVIDIA H100 80GB HBM3", "H100", "9.0", "hopper"),
        ("NVIDIA H100 PCIe", "H100", "9.0", "hopper"),
        ("NVIDIA H100 NVL", "H100", "9.0", "hopper"),
        ("NVIDIA H200", "H200", "9.0", "hopper"),
        ("NVIDIA GH200 480GB", "GH200", "9.0", "hopper"),
        ("NVIDIA GH200 144G HBM3e", "GH200", "9.0", "hopper"),
        ("NVIDIA B200", "B200", "10.0", "blackwell"),
        ("NVIDIA GB200", "GB200", "10.0", "blackwell"),
        ("NVIDIA B300 SXM6 AC", "B300", "10.3", "blackwell"),
        ("NVIDIA GB10", "GB10", "12.1", "blackwell"),
        ("DGX Spark", "GB10", "12.1", "blackwell"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti", "7.5", "turing"),
        ("NVIDIA GeForce RTX 3080 12GB", "RTX 3080", "8.6", "ampere"),
        ("rtx-4090", "RTX 4090", "8.9", "ada"),
        ("RTX4090", "RTX 4090", "8.9", "ada"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D", "8.9", "ada"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop", "8.9", "ada"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER", "8.9", "ada"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", "12.0", "blackwell"),
        ("Quadro RTX 6000", "Quadro RTX 6000", "7.5", "turing"),
        ("NVIDIA RTX A6000", "RTX A6000", "8.6", "ampere"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", "8.9", "ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", "12.0", "blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Max-Q", "12.0", "blackwell"),
        ("Xavier", "Xavier", "7.2", "volta"),
        ("Orin", "Orin", "8.7", "ampere"),
        ("Orin (nvgpu)", "Orin", "8.7", "ampere"),
        ("Jetson AGX Orin", "AGX Orin", "8.7", "ampere"),
        ("Jetson Orin Nano", "Orin Nano", "8.7", "ampere"),
        ("Thor", "Thor", "11.0", "blackwell"),
        ("sm75", "sm75", "7.5", "turing"),
        ("SM_75", "sm75", "7.5", "turing"),
        ("7.5", "sm75", "7.5", "turing"),
        ("sm_120", "sm120", "12.0", "blackwell"),
        ("sm_90a", "sm90", "9.0", "hopper"),
        ("SM 7.5", "sm75", "7.5", "turing"),
        ("cc12.0", "sm120", "12.0", "blackwell"),
        ("10.1", "sm110", "11.0", "blackwell"),
        ("Turing", "turing", "7.5", "turing"),
        ("Ada Lovelace", "ada", "8.9", "ada"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "A100 MIG 1g.5gb", "8.0", "ampere"),
        ("H100 MIG 1g.10gb+me", "H100 MIG 1g.10gb+me", "9.0", "hopper"),
        ("A100 MIG 1c.3g.20gb", "A100 MIG 1c.3g.20gb", "8.0", "ampere"),
        ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", "H100 MIG 1g.10gb", "9.0", "hopper"),  # a label of Kubernetes
    ],
)
def test_find_gpu(name: str, product: str, capability: str, architecture: str) -> None:
    found = find_gpu(name)
    assert found.product == product
    assert found.compute_capability is not None
    assert capability_text(found.compute_capability) == capability
    assert found.architecture == architecture


def test_architecture_with_several_compute_capabilities_has_none() -> None:
    assert find_gpu("ampere").compute_capability is None
    assert find_gpu("ampere").sm is None
    assert find_gpu("T4").sm == "sm75"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RTX 6000", ["Quadro RTX 6000", "RTX 6000 Ada", "RTX A6000"]),
        ("4090", ["RTX 4090"]),
        ("H10", ["H100"]),
        ("sm76", ["sm75"]),
        ("amper", ["ampere"]),
        ("L40 S Pro", ["L40"]),
    ],
)
def test_unknown_gpu_suggests(name: str, near: list[str]) -> None:
    with pytest.raises(GpuError, match="unknown GPU") as caught:
        find_gpu(name)
    assert name in caught.value.message
    assert all(suggestion in caught.value.hint for suggestion in near), caught.value.hint
    assert "trt_gpus" in caught.value.hint


@pytest.mark.parametrize("name", ["H100 MIG", "mig 1g.5gb", "A100-MIG-7"])
def test_a_slice_without_its_card_or_profile_is_told_what_is_missing(name: str) -> None:
    with pytest.raises(GpuError, match=r"named by its card and its profile, as in 'A100 MIG 1g\.5gb'"):
        find_gpu(name)


def test_a_slice_of_an_unknown_card_is_told_of_a_line_for_the_card() -> None:
    with pytest.raises(GpuError) as caught:
        find_gpu("H123 MIG 1g.5gb")
    assert "`H123 = X.Y`" in caught.value.hint
    assert find_gpu("H123 MIG 1g.5gb", _extra("H123 = 9.0")).product == "H123 MIG 1g.5gb"


@pytest.mark.parametrize(
    "name", ["", "   ", "NVIDIA", "GRID T4-16Q", "NVIDIA A10-24Q", "A100 MIG", "MIG 1g.5gb", "sm", "7.7", "GeForce"]
)
def test_not_a_gpu_we_know(name: str) -> None:
    # A vGPU ("T4-16Q") has a share of the card: it must not be judged by the card's budgets.
    with pytest.raises(GpuError):
        find_gpu(name)


def test_every_product_of_the_table_is_found_by_its_names() -> None:
    for model in builtin_models():
        for text in (model.product, *model.aliases, f"NVIDIA {model.product}", model.product.lower().replace(" ", "-")):
            assert find_gpu(text) == model, text


@given(st.text(max_size=30))
def test_any_text_is_found_or_refused(text: str) -> None:
    try:
        found = find_gpu(text)
    except GpuError:
        return
    assert fits(found, found) is not None


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("V100", ["fp32", "fp16", "int8"], ["tf32", "bf16", "fp8"]),
        ("T4", ["fp32", "fp16", "int8"], ["tf32", "bf16", "fp8"]),
        ("A100", ["tf32", "bf16", "int8"], ["fp8"]),
        ("Orin", ["tf32", "bf16", "int8"], ["fp8"]),
        ("ampere", ["bf16"], ["fp8"]),
        ("L4", ["bf16", "fp8"], []),
        ("hopper", ["fp8"], []),
    ],
)
def test_supported_precisions(name: str, yes: list[str], no: list[str]) -> None:
    model = find_gpu(name)
    assert all(model.supports(precision) for precision in yes)  # type: ignore[arg-type]
    assert not any(model.supports(precision) for precision in no)  # type: ignore[arg-type]


def test_support_of_an_unknown_architecture_is_unknown() -> None:
    (model,) = parse_extra_gpus(["R1 = 13.0, rubin"])
    assert model.supports("fp8") is True
    assert GpuModel("x", None, "rubin").supports("fp8") is None


# Budgets.


def test_pick_takes_the_most_specific_key() -> None:
    gpu = find_gpu("NVIDIA A100-SXM4-80GB")
    budgets = {"default": 5.0, "ampere": 4.0, "sm80": 3.0, "a100": 2.0, "T4": 1.0}
    for key in ("a100", "sm80", "ampere", "default"):
        assert pick(budgets, gpu) == (key, budgets[key])
        del budgets[key]
    assert pick(budgets, gpu) is None


def test_pick_prefers_the_module_over_the_family() -> None:
    nano = find_gpu("Orin Nano")
    assert pick({"Orin": 1, "Orin Nano": 2, "AGX Orin": 3}, nano) == ("Orin Nano", 2)
    assert pick({"Orin": 1, "sm87": 2}, nano) == ("Orin", 1)
    # Which module it is cannot be told here, so a module's budget does not fit.
    assert pick({"AGX Orin": 1}, find_gpu("Orin")) is None


def test_a_mig_slice_never_takes_the_card_s_budget() -> None:
    slice_ = find_gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert pick({"A100": 1.0}, slice_) is None
    assert pick({"A100": 1.0, "A100 MIG 2g.10gb": 2.0}, slice_) is None
    assert pick({"A100": 1.0, "sm80": 3.0, "A100 MIG 1g.5gb": 7.0}, slice_) == ("A100 MIG 1g.5gb", 7.0)
    assert pick({"A100": 1.0, "ampere": 3.0}, slice_) == ("ampere", 3.0)
    assert pick({"A100 MIG 1g.5gb": 7.0}, find_gpu("A100")) is None


def test_an_l40s_or_a_laptop_does_not_take_its_sibling_s_budget() -> None:
    assert pick({"L40": 1.0}, model_of("NVIDIA L40S", (8, 9))) is None
    laptop = model_of("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9))
    assert pick({"RTX 4090": 1.0}, laptop) is None
    assert pick({"RTX 4090": 1.0, "ada": 2.0}, laptop) == ("ada", 2.0)


def test_a_declared_architecture_takes_no_product_budget() -> None:
    assert pick({"T4": 1.0, "sm75": 2.0}, find_gpu("turing")) is not None  # Turing is compute capability 7.5 alone
    assert pick({"T4": 1.0}, find_gpu("turing")) is None
    assert pick({"sm80": 2.0}, find_gpu("ampere")) is None


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["T4", "H1000"], "'H1000'"),
        (["T4", "Tesla T4"], "same GPU"),
        (["sm75", "7.5"], "same GPU"),
        (["default", "Default"], "same GPU"),
    ],
)
def test_check_budget_keys_refuses(keys: list[str], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        check_budget_keys(dict.fromkeys(keys, 1.0))


def test_check_budget_keys_refuses_what_is_no_text() -> None:
    with pytest.raises(ArgumentError, match="7"):
        check_budget_keys({7: 1.0})  # type: ignore[dict-item]


def test_check_budget_keys_accepts() -> None:
    check_budget_keys(
        {"T4": 1, "sm75": 2, "turing": 3, "default": 4, "A100 MIG 1g.5gb": 5, "Board": 6}, _extra("Board = 8.7")
    )


# GPUs of the user's own.


def _extra(*lines: str) -> tuple[GpuModel, ...]:
    return parse_extra_gpus(lines)


def test_parse_extra_gpus() -> None:
    board, rubin = _extra("", "# ours", "My Board = 8.7, ampere, alias1|Alias 2", "R1 = sm130, rubin")
    assert board == GpuModel("My Board", (8, 7), "ampere", aliases=("alias1", "Alias 2"))
    assert (rubin.compute_capability, rubin.architecture) == ((13, 0), "rubin")
    for text in ("my-board", "ALIAS1", "NVIDIA Alias 2", "My Board 16GB"):
        assert find_gpu(text, [board, rubin]) == board
    assert find_gpu("rubin", [board, rubin]).compute_capability == (13, 0)
    assert find_gpu("sm130", [rubin]).architecture == "rubin"
    assert pick({"rubin": 1}, rubin, [rubin]) == ("rubin", 1)


def test_a_form_factor_can_be_singled_out() -> None:
    extra = _extra("H100-PCIe = 9.0")
    assert extra[0].family == "H100"
    pcie = model_of("NVIDIA H100 PCIe", (9, 0), extra)
    sxm = model_of("NVIDIA H100 80GB HBM3", (9, 0), extra)
    assert (pcie.product, sxm.product) == ("H100-PCIe", "H100")
    budgets = {"H100": 1.0, "H100-PCIe": 2.0}
    assert pick(budgets, pcie, extra) == ("H100-PCIe", 2.0)
    assert pick(budgets, sxm, extra) == ("H100", 1.0)
    assert pick({"H100": 1.0}, pcie, extra) == ("H100", 1.0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("Board", "cannot read 'Board'"),
        ("= 8.7", "cannot read"),
        ("Board =", "cannot read"),
        ("Board = fast", "'fast'"),
        ("Board = 8", "'8'"),
        ("Board = 8.9, ampere", "says ampere, but compute capability 8.9 is ada"),
        ("Board = 13.0", "names no architecture"),
        ("T4 = 7.5", "already means the T4"),
        ("Board = 7.5, turing, Tesla T4", "'Tesla T4'"),
        ("sm75 = 7.5", "a compute capability"),
        ("turing = 7.5", "an architecture"),
        ("Default = 7.5", "without a budget"),
        ("A100 MIG 1g.5gb = 8.0", "MIG slice"),
        ("GPU = 8.7", "names no GPU"),
    ],
)
def test_parse_extra_gpus_refuses(line: str, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        _extra(line)


def test_parse_extra_gpus_refuses_a_name_twice() -> None:
    with pytest.raises(ArgumentError, match="already means the Board"):
        _extra("Board = 8.7", "board = 8.6")


# The real GPU.


def test_model_of_an_unknown_gpu_keeps_its_name_and_kind() -> None:
    model = model_of("NVIDIA GeForce RTX 6090", (13, 0))
    assert (model.product, model.architecture) == ("RTX 6090", "unknown")
    model = model_of("GRID T4-16Q", (7, 5))
    assert model.product == "GRID T4-16Q"
    assert pick({"T4": 1, "sm75": 2}, model) == ("sm75", 2)


def test_model_of_a_known_name_with_another_compute_capability_is_not_that_product() -> None:
    model = model_of("NVIDIA T4", (8, 9))
    assert pick({"T4": 1}, find_gpu("T4")) == ("T4", 1)
    assert model.architecture == "ada"
    assert model.compute_capability == (8, 9)
    assert pick({"turing": 1, "ada": 2}, model) == ("ada", 2)


def _gpu(name: str, capability: tuple[int, int], **more: object) -> Gpu:
    return Gpu(name=name, model=model_of(name, capability), compute_capability=capability, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("declared", ["H200", "NVIDIA H200", "sm90", "9.0", "hopper"])
def test_require_match_accepts(declared: str) -> None:
    assert require_match(find_gpu(declared), _gpu("NVIDIA H200", (9, 0))).product == "H200"


@pytest.mark.parametrize("declared", ["T4", "H100", "GH200", "sm75", "turing", "H200 MIG 1g.18gb"])
def test_require_match_names_both(declared: str) -> None:
    with pytest.raises(GpuError) as caught:
        require_match(find_gpu(declared), _gpu("NVIDIA H200", (9, 0)))
    assert find_gpu(declared).product in caught.value.message
    assert "NVIDIA H200 (compute capability 9.0, hopper)" in caught.value.message


def test_require_match_refuses_the_card_for_its_slice() -> None:
    with pytest.raises(GpuError, match=r"MIG 1g\.5gb"):
        require_match(find_gpu("A100"), _gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (8, 0)))


def test_require_match_on_a_jetson_whose_module_is_not_told() -> None:
    hidden = _gpu("Orin (nvgpu)", (8, 7))
    assert require_match(find_gpu("Orin Nano"), hidden).product == "Orin Nano"
    assert require_match(find_gpu("Orin"), _gpu("Orin Nano", (8, 7))).product == "Orin Nano"
    with pytest.raises(GpuError):
        require_match(find_gpu("AGX Orin"), _gpu("Orin Nano", (8, 7)))


def test_what_reports_and_baselines_tell_of_a_gpu() -> None:
    orin = replace(_gpu("Orin", (8, 7), uuid="GPU-1", driver="540.4.0"), model=find_gpu("Orin Nano"))
    assert orin.environment() == {"name": "Orin", "uuid": "GPU-1", "compute_capability": "8.7"}
    assert orin.conditions() == {"gpu": "Orin Orin Nano", "compute_capability": "8.7", "driver": "540.4.0"}
    assert _gpu("Tesla T4", (7, 5)).full_name == "Tesla T4"


def test_a_hardware_compatible_engine_is_found_by_the_class_that_it_serves() -> None:
    a10, a40, l4 = (
        _gpu(name, capability, memory_bytes=memory << 30, driver=driver)
        for name, capability, memory, driver in (
            ("NVIDIA A10", (8, 6), 24, "550.54"),
            ("NVIDIA A40", (8, 6), 48, "580.10"),
            ("NVIDIA L4", (8, 9), 24, "550.54"),
        )
    )
    same = [identity_parts(each, "same_compute_capability") for each in (a10, a40, l4)]
    assert same[0] == same[1] == {"compute_capability": "8.6"} != same[2]
    assert len({str(identity_parts(each, "ampere_plus")) for each in (a10, a40, l4)}) == 1
    assert len({str(identity_parts(each)) for each in (a10, a40, l4)}) == 3
    # TensorRT refuses that for a T4: nothing is shared by it.
    t4 = _gpu("Tesla T4", (7, 5), driver="550.54")
    assert identity_parts(t4, "ampere_plus") == identity_parts(t4)


def test_tf32_is_there_from_ampere_on_unless_the_environment_turns_it_off() -> None:
    a10, t4 = _gpu("NVIDIA A10", (8, 6)), _gpu("Tesla T4", (7, 5))
    assert why_no_tf32(a10, {}) is None
    assert why_no_tf32(a10, {"NVIDIA_TF32_OVERRIDE": "1"}) is None
    assert "NVIDIA_TF32_OVERRIDE=0" in str(why_no_tf32(a10, off := {"NVIDIA_TF32_OVERRIDE": "0"}))
    assert why_no_tf32(t4, off) == "T4 has no TF32"
    for compatible in ("none", "ampere_plus", "same_compute_capability"):
        assert identity_parts(a10, compatible, off) == identity_parts(a10, compatible, {}) | {"tf32": "off"}


def test_identity_parts_tell_apart_what_one_name_covers() -> None:
    def parts(**more: object) -> dict[str, str]:
        known: dict[str, object] = {"memory_bytes": 40 * 2**30, "driver": "580.159.04", "uuid": "GPU-1", "cores": 6912}
        return identity_parts(_gpu("NVIDIA A100-SXM4-40GB", (8, 0), **(known | more)))

    base = parts()
    assert base["compute_capability"] == "8.0"
    assert base["driver_major"] == "580"
    assert parts(uuid="GPU-2") == base, "an engine fits every unit of a kind"
    assert parts(driver="580.95.05") == base
    assert parts(memory_bytes=40 * 2**30 - 2**27) == base
    for change in (
        {"memory_bytes": 80 * 2**30},
        {"cores": 3456},
        {"driver": "570.1"},
        {"mig": "1g.5gb"},
        {"max_sm_mhz": 1410},
        {"max_memory_mhz": 1215},
        {"memory_bus_bits": 5120},
    ):
        assert parts(**change) != base, change


GPUS = (Card("GPU-aaaa-1", "A"), Card("GPU-aabb-2", "A"), Card("GPU-cc-3", "A", True, ("MIG-11", "MIG-12")))


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [
        (None, "GPU-aaaa-1"),
        ("0", "GPU-aaaa-1"),
        ("1,0", "GPU-aabb-2"),
        (" 1 ", "GPU-aabb-2"),
        ("2", "MIG-11"),
        ("GPU-aabb-2", "GPU-aabb-2"),
        ("GPU-aab", "GPU-aabb-2"),
        ("GPU-cc-3", "MIG-11"),
        ("MIG-12", "MIG-12"),
        ("", None),
        ("-1", None),
        ("3", None),
        ("7,0", None),
        ("GPU-aa", None),
        ("GPU-", None),
        ("MIG-1", None),
        ("NoDevFiles", None),
    ],
)
def test_select_visible(visible: str | None, uuid: str | None) -> None:
    found, reason = select_visible(visible, GPUS)
    assert found == uuid
    assert (found is None) == bool(reason)


def test_select_visible_without_cards_or_slices() -> None:
    assert select_visible(None, ()) == (None, "the driver shows no GPU")
    assert select_visible("0", (Card("GPU-1", "NVIDIA A30", True),)) == (
        None,
        "NVIDIA A30 is in MIG mode and has no slice",
    )


@pytest.mark.parametrize(
    ("text", "product"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit\0", "AGX Orin"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "Orin Nano"),
        ("NVIDIA Orin NX Developer Kit", "Orin NX"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "Xavier NX"),
        ("Jetson-AGX", "AGX Xavier"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "Thor"),
        ("Raspberry Pi 5", None),
        ("", None),
    ],
)
def test_jetson_product(text: str, product: str | None) -> None:
    assert jetson.product_of(text) == product


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_detect_without_a_gpu_keeps_the_reason() -> None:
    found = detect()
    assert found.gpu is None
    assert found.reason


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA GPU")
def test_the_probe_says_why_there_is_no_device() -> None:
    answer = subprocess.run([sys.executable, cuda_query.__file__], capture_output=True, text=True, check=True)
    assert '"error"' in answer.stdout


def test_imports_stay_light() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from pytest_trtcheck.gpu import device, lock, state\n"
        "from pytest_trtcheck import gpu\n"
        "gpu.find_gpu('T4'); print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "onnx", "pynvml", "filelock", "cuda"} & {name.partition(".")[0] for name in loaded}
