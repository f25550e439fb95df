"""PyTorch as a system under test: the module itself by whole checks, and the copy that runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_trtcheck.backends.base import Built, EngineSpec, Machine
from pytest_trtcheck.backends.torch import Torch, TorchCompile
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ModelError, UnsupportedTargetError
from pytest_trtcheck.model.sources import Examples, open_model
from pytest_trtcheck.precision.lowering import Lowered
from pytest_trtcheck.spec import BuildOptions, ParitySpec
from tests.torch.networks import Net

if TYPE_CHECKING:
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.spec import Precision
    from tests.conftest import Suite

X = torch.arange(8.0).reshape(2, 4) / 8


def opened(module: Any, tmp_path: Path) -> OnnxModel:
    return open_model(module, (), Cache(tmp_path), examples=Examples({"x": X}))


def built(model: OnnxModel, precision: Precision = "fp32") -> Built:
    spec = EngineSpec(model, Lowered(model.path, model.sha256), precision, {}, BuildOptions())
    return Built(spec, model.path)


CASE = {"x": X.numpy()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_it_is_the_module_in_that_type_and_leaves_the_users_alone(tmp_path: Path, precision: Precision) -> None:
    net = Net().train()
    before = {name: (each.dtype, each.clone()) for name, each in net.state_dict().items()}
    highest = torch.get_float32_matmul_precision()
    made = built(opened(net, tmp_path), precision)
    system = Torch.find(Machine())
    runner = system.load(made)
    (found,) = runner(CASE).values()
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    own = Net().eval().to(kind)
    with torch.inference_mode():
        expected = own(X.to(kind)).float().numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert system.doubt(made, runner, CASE) is None
    assert net.training
    assert all(each.dtype is before[name][0] for name, each in net.state_dict().items())
    assert all(torch.equal(each, before[name][1]) for name, each in net.state_dict().items())
    assert torch.get_float32_matmul_precision() == highest
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner(CASE)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has one way alone")
def test_pytorchs_newer_settings_are_kept_too(tmp_path: Path) -> None:
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [each.fp32_precision for each in places]
    made = built(opened(Net(), tmp_path))
    try:
        places[0].fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        runner = Torch().load(made)
        with runner.settings():  # type: ignore[attr-defined]
            assert [each.fp32_precision for each in places] == ["ieee", "ieee"]
        assert len(runner(CASE)) == 1
        assert [each.fp32_precision for each in places] == ["tf32", before[1]]
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
    assert torch.get_float32_matmul_precision() == "highest"


class InFp32(nn.Module):
    """Computes in FP32 whatever it is converted to."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Any) -> Any:
        return x.to(torch.float32) * self.scale.to(torch.float32)


def test_what_computes_in_fp32_all_the_same_is_doubted(tmp_path: Path) -> None:
    made = built(opened(InFp32(), tmp_path), "bf16")
    system = Torch()
    runner = system.load(made)
    doubt = system.doubt(made, runner, {"x": X.numpy()})
    # Its inputs and weights are converted on the way in, which computes nothing.
    assert doubt == "bf16 did not take effect: the operators of the module gave 3 float32"


def test_a_module_that_changed_since_the_export(tmp_path: Path) -> None:
    net = Net()
    made = built(opened(net, tmp_path))
    Torch().load(made).close()
    with torch.no_grad():
        net.last.weight[0, 0] += 1e-3
    with pytest.raises(ModelError, match="the module Net changed since it was exported"):
        Torch().load(made)


def test_a_module_that_fails_is_named_with_the_line(tmp_path: Path) -> None:
    def act(x: Any) -> Any:
        return x @ torch.ones(4, 4)  # FP32, which FP16 does not multiply with

    made = built(opened(Net(act), tmp_path), "fp16")
    runner = Torch().load(made)
    with pytest.raises(ModelError, match=r"the module Net on cpu in float16 failed in inner \(Act\)") as failed:
        runner(CASE)
    assert "on x [2, 4]" in failed.value.message
    assert "test_backend.py:" in failed.value.hint


def test_an_exported_program_and_a_file_of_one(tmp_path: Path) -> None:
    net = Net().eval()
    program = torch.export.export(net, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.export.save(program, tmp_path / "net.pt2")
    with torch.no_grad():
        expected = net(X).numpy()
    for source in (program, tmp_path / "net.pt2"):
        model = opened(source, tmp_path / "cache")
        for precision, limit in (("fp32", 1e-6), ("fp16", 1e-2)):
            runner = Torch().load(built(model, precision))  # type: ignore[arg-type]
            (found,) = runner({model.inputs[0].name: X.numpy()}).values()
            assert np.abs(found - expected).max() < limit


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ParitySpec(precision=("int8",)), "knows no int8"),
        (ParitySpec(precision=("int8+fp16",)), r"knows no int8\+fp16"),
        (ParitySpec(precision=("tf32",)), "a CPU has no TF32"),
        (ParitySpec(keep_fp32=("a*",)), "keep_fp32= names nodes of the ONNX graph"),
        (ParitySpec(keep_auto=True), "keep_fp32= names nodes of the ONNX graph"),
        (ParitySpec(precision=("int8",), exclude=("a",)), "exclude= names nodes"),
    ],
)
def test_what_it_refuses(tmp_path: Path, spec: ParitySpec, said: str) -> None:
    model = opened(Net(), tmp_path)
    with pytest.raises(UnsupportedTargetError, match=said):
        Torch().admit(model, spec, BuildOptions())
    with pytest.raises(UnsupportedTargetError, match="comes from no PyTorch model"):
        Torch().admit(replace(model, origin=None), ParitySpec(), BuildOptions())


def test_timed_by_the_hosts_clock_on_a_cpu(tmp_path: Path) -> None:
    system, runner = Torch(), Torch().load(built(opened(Net(), tmp_path)))
    with system.timed_runs(runner, [CASE, CASE]) as timed:
        found = timed.run(50)
        assert timed.measured == "host time on the CPU"
    assert found.run_ms.shape == found.interval_ms.shape == (50,)
    assert np.all(found.run_ms > 0)
    assert np.all(found.interval_ms >= found.run_ms)


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(opened(Net(), tmp_path))
    system = TorchCompile.find(Machine())
    runner = system.load(made)
    (found,) = runner(CASE).values()
    with torch.inference_mode():
        assert np.allclose(found, Net().eval()(X).numpy(), atol=1e-6)
    assert system.doubt(made, runner, CASE) is None
    assert system.costs(made, runner)["build_s"] > 0
    runner.close()
    off = torch.compiler.disable(Net().eval())
    monkeypatch.setattr(torch, "compile", lambda _: off)
    runner = system.load(made)
    assert "torch.compile compiled nothing" in (system.doubt(made, runner, CASE) or "")


HEAD = """
import torch
from pytest_trtcheck import SOURCE
from tests.torch.networks import Blocks, Drops, Net

IDS = torch.arange(7)[None] % 5
X = torch.arange(8.0).reshape(2, 4) / 8
"""


def test_whole_checks(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    suite.write(
        test_it=HEAD
        + """
@trt_parity(Blocks(), precision=["fp32", "fp16"], backend="torch")
def test_good(): return {"ids": IDS}

@trt_parity(Blocks(wrong=3), precision=["fp32", "fp16"], backend="torch")
def test_export(): return {"ids": IDS}

@trt_parity(Net().train(), precision="fp16", tol=1e-7, backend="torch")
def test_precision(): return {"x": X}

@trt_parity(Net(), precision="fp32", reference=SOURCE, backend="torch")
def test_itself(): return {"x": X}

@trt_parity(Blocks(wrong=3), precision="fp16", reference=SOURCE, backend="torch")
def test_source(): return {"ids": IDS}

@trt_parity(Blocks(wrong=3), precision="fp16", reference=SOURCE, backend="torch", tol=1e-9)
def test_source_too_tight(): return {"ids": IDS}

@trt_parity("conv.onnx", backend="torch", batch=1)
def test_onnx(): ...

@trt_parity(Net(), precision=["fp16", "int8"], backend=["onnxruntime", "torch"], calibration=[X])
@trt_latency(p50_ms=1000, min_speedup={"torch": 2})
def test_listed(): return {"x": X}

def test_random(trt_check):
    trt_check(Drops(), {"x": X}, precision="fp32", backend="torch")
"""
    )
    run = suite.run_apart("--trt-backend=torch")
    checks = {check["nodeid"].partition("::")[2]: check for check in run.report["checks"]}
    assert {name: check["verdict"] for name, check in checks.items()} == {
        "test_good[fp32]": "pass",
        "test_good[fp16]": "pass",
        "test_export[fp32]": "fail",
        "test_export[fp16]": "fail",
        "test_precision": "fail",
        "test_itself": "error",
        "test_source": "pass",
        "test_source_too_tight": "fail",
        "test_onnx": "error",
        "test_listed[fp16-onnxruntime]": "pass",
        "test_listed[fp16-torch]": "pass",
        "test_listed[int8-onnxruntime]": "pass",
        "test_listed[int8-torch]": "not_measured",
        "test_random": "fail",
    }
    good = checks["test_good[fp16]"]
    assert (good["backend"], good["evidence"], good["gpu_ran"]) == ("torch", "provider", False)
    assert 0 < good["parity"]["worst"] < 1e-2
    assert any(note.startswith(f"run by PyTorch {torch.__version__.partition('+')[0]}") for note in good["notes"])
    for name in ("test_export[fp32]", "test_export[fp16]"):
        blame = checks[name]["parity"]["blame"]
        assert (blame["step"], blame["culprit"]["module"]) == ("export", "blocks.3.mlp.fc1")
    assert checks["test_precision"]["parity"]["blame"]["step"] == "spread"
    tight = checks["test_source_too_tight"]
    assert tight["parity"]["blame"] is None, "the export did not run"
    assert any("not diagnosed: computed in FP32, Blocks (nn.Module) itself differs" in note for note in tight["notes"])
    assert "would be compared with itself" in checks["test_itself"]["message"]
    assert "conv.onnx comes from no PyTorch model" in checks["test_onnx"]["message"]
    assert "is not deterministic: 3 runs on the same input" in checks["test_random"]["message"]
    row = run.report["comparisons"][1]["systems"][1]
    assert row["missing"] == ["not measured: backend='torch': a module converted by .to(dtype) knows no int8"]


def test_a_test_module_with_pytorch_in_it_that_cannot_be_imported(suite: Suite) -> None:
    suite.write(test_it="import torch\nfrom torch import classes, ops\nraise ImportError('not today')\n")
    run = suite.run_apart()
    run.result.assert_outcomes(errors=1)
    assert "not today" in run.text
    assert "INTERNALERROR" not in run.text


def test_the_example_of_the_documentation(suite: Suite) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    code = re.split(r"```python.*\n", page, maxsplit=1)[1].partition("```")[0]
    (suite.path / "test_network.py").write_text(code)
    run = suite.run_apart("-k", "not compile")
    run.result.assert_outcomes(passed=3, deselected=1)
    shown, printed = (re.search(r"^system .*$", text, re.MULTILINE) for text in (page, run.text))
    assert shown is not None
    assert printed is not None
    assert shown[0].split() == printed[0].split()
