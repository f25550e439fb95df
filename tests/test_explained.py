"""docs/explanation: what the pages say of the code is what the code does."""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from docs.site import explained as tables
from pytest_trtcheck.gpu import find_gpu
from pytest_trtcheck.gpu.device import Gpu, identity_parts
from pytest_trtcheck.model import graph
from pytest_trtcheck.precision import half
from pytest_trtcheck.precision.emulation import rewrite
from pytest_trtcheck.spec import BuildOptions

if TYPE_CHECKING:
    from pytest_trtcheck.choices import HalfName
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


# --- the emulation, operator by operator ------------------------------------------------------------------------------

sys.path.append(str(ROOT / "benchmarks" / "gpu" / "atlas"))

import probes  # type: ignore[import-not-found]  # noqa: E402 - beside the atlas's scripts

APART = {
    # How a product sums hangs on its size: tests/test_products.py has that.
    *("Conv", "Einsum", "Gemm", "MatMul"),
    # Spelled out for what they make of NaN; no value is rounded.
    *("Max", "Min"),
    # Of two, as in the atlas, it is one layer.
    "Sum",
}


def alone() -> dict[str, Any]:
    """By operator, a model of the atlas that has no other node."""
    found: dict[str, Any] = {}
    for case in probes.cases():
        names = [each.op_type for each in case.model.graph.node if each.op_type != "Constant"]
        if names == [case.operator] and case.operator in tables.operators():
            found.setdefault(case.operator, case.model)
    return found


def became(proto: onnx.ModelProto, kind: HalfName, folder: Path) -> str:
    """How an operator alone is emulated, by what the emulation writes; an output that is no float counts as read."""
    path = folder / "model.onnx"
    onnx.save(proto, path)
    lowered = half.to_half(graph.read(path), kind).model
    operator = proto.graph.node[-1].op_type
    node = next(each for each in lowered.graph if each.op_type == operator)
    if not any(value is not None and value.dtype == half.DTYPES[kind] for value in (*node.inputs, *node.outputs)):
        return str(tables.FLOAT)
    if not any(value.dtype == half.DTYPES[kind] for value in node.outputs):
        return str(tables.READ)
    made = rewrite.emulated(lowered)
    kept = [each for each in made.graph if each.op_type == operator]
    if len(kept) != 1 or len([each for each in made.graph if each.op_type not in {"Cast", "Constant"}]) != 1:
        return str(tables.LAYERS)
    readers = [user for value in kept[0].outputs for user, _ in value.uses()]
    return str(tables.ONCE if any((each.name or "").endswith("/round") for each in readers) else tables.EXACT)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_each_operator_is_emulated_as_its_row_says(kind: HalfName, tmp_path: Path) -> None:
    found = {name: became(proto, kind, tmp_path) for name, proto in alone().items() if name not in APART}
    # Those of the atlas have no sequence lengths.
    said = {name: tables.computed(name, kind).removeprefix(f"{tables.SOME_FLOAT} ") for name in found}
    assert len(found) > 90
    assert {name: (found[name], said[name]) for name in found if found[name] != said[name]} == {}
