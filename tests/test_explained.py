"""docs/explanation: what the pages say of the code is what the code does."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.gpu import find_gpu
from pytest_trtcheck.gpu.device import Gpu, identity_parts
from pytest_trtcheck.spec import BuildOptions

if TYPE_CHECKING:
    from tests.conftest import Suite

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "explanation"

# --- what the cache key covers ----------------------------------------------------------------------------------------


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def section(title: str) -> set[str]:
    """What a section of the page names."""
    text = (PAGES / "cache-key.md").read_text(encoding="utf-8")
    found = re.search(rf"^### {title}\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    return quoted(found[1])


def kinds() -> dict[str, set[str]]:
    """The parts that the page names, by the kind of entry."""
    text = (PAGES / "cache-key.md").read_text(encoding="utf-8")
    code = quoted(re.search(r"\*\*The code\*\* is (.*?)\.\n", text, re.DOTALL)[1])  # type: ignore[index]
    found: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (`.*?) \|.*? \| (.*) \|$", text, re.MULTILINE):
        named = quoted(row[1])
        named |= code if "the code" in row[1] else set()
        named |= section("Build options") if "build option" in row[1] else set()
        named |= section("The GPU") if "the GPU" in row[1] else set()
        found |= dict.fromkeys(quoted(row[0]), named)
    return found


def kinds_in_code() -> set[str]:
    """Every kind that a `Key` or a `KeptOutputs` is made with."""
    found = set()
    for path in (ROOT / "pytest_trtcheck").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            at = {"Key": 0, "super().__init__": 1}.get(name)
            if at is not None and len(node.args) > at and isinstance(node.args[at], ast.Constant):
                value = ast.literal_eval(node.args[at])
                found |= {value} if isinstance(value, str) else set()
    return found


def test_every_kind_of_cache_entry_has_a_row() -> None:
    # Those of `blame` and `keep_auto` are handed on by name.
    assert kinds_in_code() | {"blame", "keep_auto"} == set(kinds())


def test_every_build_option_and_every_trait_of_a_gpu_in_the_key_is_named() -> None:
    assert section("Build options") - {"BuildOptions"} == {each.name for each in fields(BuildOptions)}
    gpu = Gpu(
        name="NVIDIA A100-SXM4-80GB",
        uuid="GPU-1",
        compute_capability=(8, 0),
        memory_bytes=85 << 30,
        driver="580.1",
        model=find_gpu("A100"),
        cores=6912,
        memory_bus_bits=5120,
        max_sm_mhz=1410,
        max_memory_mhz=1593,
        mig="1g.5gb",
    )
    assert set(identity_parts(gpu)) <= section("The GPU")
    assert set(identity_parts(gpu, "ampere_plus").values()) <= section("The GPU")


CHECKS = """
RNG = np.random.default_rng(0)
SAMPLES = [{"image": RNG.random((1, 3, 16, 16), np.float32)} for _ in range(4)]

@trt_parity("conv.onnx", precision=["tf32", "fp16", "int8+fp16"], calibration=SAMPLES, batch=2)
def test_conv(): ...

@trt_parity("conv.onnx", precision="fp16", batch=2, tol=1e-7)
def test_fails(): ...

@trt_parity("conv.onnx", precision="fp16", batch=2, tol=1e-7, keep_fp32="auto")
def test_keep(): ...

@trt_parity("quantized.onnx", precision="int8+fp16", batch=2)
def test_quantized(): ...

@pytest.fixture
def trt_build_options(request):
    from pytest_trtcheck import BuildOptions
    return BuildOptions(io="fp16" if "io" in request.node.name else None)

@trt_parity("conv.onnx", precision="fp16", batch=2)
def test_io(): ...
"""


def test_every_part_of_the_entries_that_checks_make_is_named(suite: Suite) -> None:
    pytest.importorskip("tensorrt_rtx")
    quantized = ROOT / "tests" / "data" / "quantized" / "modelopt_int8_fp16.onnx"
    (suite.path / "quantized.onnx").write_bytes(quantized.read_bytes())
    suite.write(test_all=CHECKS)
    suite.run("-q", "--trt-gpu=A100", "--trt-cache-dir=cache")
    named, seen = kinds(), set()
    for manifest in (suite.path / "cache").rglob("manifest"):
        key = json.loads(manifest.read_bytes().partition(b"\n")[2])["key"]
        seen.add(key["kind"])
        assert set(key["parts"]) <= named[key["kind"]], key["kind"]
    assert {"lowered", "calibration", "half_io", "engine", "reference", "emulated", "emulation", "blame"} <= seen
