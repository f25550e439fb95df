"""Modules and programs as models: exported once, with their names, their batch open, and left as they were."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import CheckError, ModelError
from pytest_trtcheck.model.sources import Examples, open_model
from pytest_trtcheck.spec import ShapeRange
from tests.torch.networks import Act, Blocks, Counting, Net

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_trtcheck.model.onnx_model import OnnxModel
    from tests.conftest import Suite

IDS = np.arange(7)[None] % 5
OneInput = Examples({"x": np.ones((1, 4), np.float32)})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("torch-cache"))


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every model that is exported during the test."""
    made: list[object] = []
    export = torch.onnx.export

    def counted(model: object, *args: object, **kwargs: object) -> object:
        made.append(model)
        return export(model, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", counted)
    return made


def ran(model: OnnxModel, **inputs: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_names_types_and_open_dimensions_are_kept(cache: Cache, exports: list[object]) -> None:
    module = Blocks().train()
    cases = [{"ids": torch.from_numpy(IDS)}, {"ids": torch.from_numpy(IDS[:, :5])}]
    model, again = (open_model(module, (), cache, examples=Examples(cases)) for _ in range(2))
    assert exports == [module]
    assert model == again
    assert module.training
    assert module.head.training
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [("ids", "int64", ("batch", "ids_1"))]
    assert [spec.name for spec in model.outputs] == ["logits", "hidden_0", "hidden_1"]
    assert [path.name for path in model.path.parent.iterdir()] == ["model.onnx"]
    assert "training mode" in model.notes[0]
    ids = np.arange(15).reshape(3, 5)
    expected = copy.deepcopy(module).eval()(torch.from_numpy(ids))
    found = ran(model, ids=ids)
    np.testing.assert_allclose(found["logits"], expected["logits"].detach(), atol=1e-5)
    np.testing.assert_allclose(found["hidden_1"], expected["hidden"][1].detach(), atol=1e-5)
    assert model.origin is not None
    np.testing.assert_array_equal(model.origin({"ids": ids})["logits"], expected["logits"].detach())


def test_a_module_that_changes_is_exported_again(cache: Cache, exports: list[object]) -> None:
    module = Net().eval()
    models = [open_model(module, (), cache, examples=OneInput)]
    module.last.bias.data += 1
    models.append(open_model(module, (), cache, examples=OneInput))
    models.append(open_model(module, (), cache, examples=OneInput))
    assert len(exports) == 2
    first, second, _ = (ran(model, x=np.ones((1, 4), np.float32))["output"] for model in models)
    np.testing.assert_allclose(second - first, 1, atol=1e-5)


def test_it_is_left_as_it_was(cache: Cache) -> None:
    module = Counting().train()
    state = copy.deepcopy(module.state_dict())
    model = open_model(module, (), cache, examples=OneInput)
    assert model.origin is not None
    model.origin({"x": np.ones((2, 4), np.float32)})
    assert module.calls == 0
    assert module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "shapes"),
    [
        (Examples(shapes={"x": (5, 4)}), (5, 4)),
        (Examples(shapes={"x": ShapeRange((1, 4), (2, 4), (8, 4))}), ("batch", 4)),
        (Examples(batch=8, shapes={"x": (8, 4)}), ("batch", 4)),
        (Examples(batch=8), ("batch", 4)),
        (Examples(np.ones((1, 4))), ("batch", 4)),
        (Examples([torch.ones(1, 4)]), ("batch", 4)),
        (Examples(torch.utils.data.DataLoader([(torch.ones(4), 3)] * 2, batch_size=2)), ("batch", 4)),
    ],
    ids=["a shape", "a range", "a shape and a batch", "an attribute", "float64", "a list", "a loader"],
)
def test_what_it_takes_is_found(cache: Cache, asked: Examples, shapes: Any) -> None:
    module = Net().eval()
    module.example_inputs = (torch.ones(1, 4),)
    model = open_model(module, (), cache, examples=asked)
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [("x", "float32", shapes)]


class Many(nn.Module):
    def forward(self, *args: Any) -> Any:
        return args[0] + args[1], (args[0] * 2,)


def test_inputs_without_names_have_those_that_they_are_given(cache: Cache) -> None:
    ones = np.ones((1, 4), np.float32)
    model = open_model(Many(), (), cache, examples=Examples({"left": ones, "right": ones}))
    assert [spec.name for spec in model.inputs] == ["left", "right"]
    assert [spec.name for spec in model.outputs] == ["output_0", "output_1_0"]


def test_half_modules_compute_their_reference_in_fp32(cache: Cache) -> None:
    module = Net().eval()
    exact = copy.deepcopy(module)(torch.full((1, 4), 0.5))
    model = open_model(module.half(), (), cache, examples=Examples({"x": torch.full((1, 4), 0.5).half()}))
    assert {spec.dtype for spec in (*model.inputs, *model.outputs)} == {"float16"}
    assert model.origin is not None
    found = model.origin({"x": np.full((1, 4), 0.5, np.float16)})["output"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact.detach(), atol=2e-3)
    assert module.first.weight.dtype == torch.float16


# --- what can't be exported ------------------------------------------------------------------------------------------


def looped(x: Any) -> Any:
    return torch.stack([row * 2 for row in x])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (torch.special.bessel_j0, r"the export of the module Net fails in inner \(Act\): the operator prims.bessel_j0"),
        (lambda x: x if x.sum() > 0 else -x, r"fails in inner \(Act\): what runs depends on the values of a tensor"),
        (lambda x: x @ torch.ones(5, 5), r"the module Net failed in inner \(Act\) on x \[2, 4\]: RuntimeError: mat1"),
        (lambda x: x.view(2, 4), r"fixes the batch at 2, as its code does: .* failed in inner \(Act\) on x \[3, 4\]"),
        (looped, r"fixes the batch at 2, as its code does"),
        (lambda x: torch.nn.functional.dropout(x, training=True), "random by itself|fixes the batch|is not what"),
        (lambda x: x.shape, r"the module Net failed"),
    ],
    ids=["operator", "values", "bug", "batch", "loop", "random", "no tensor"],
)
def test_why_it_cannot_be_exported(cache: Cache, act: Callable[[Any], Any], message: str) -> None:
    from pytest_trtcheck.check.parity import refuse_random

    with pytest.raises(CheckError, match=message) as raised:
        refuse_random(open_model(Net(act), (), cache, examples=OneInput))
    assert len(str(raised.value)) < 400


def test_what_is_no_module_to_export(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "cut.pt2").write_bytes(b"PK")
    unsized = Examples()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(Net(), torch.ones(1, 4))
    for source, asked, message in (
        (
            Net(),
            unsized,
            r"nothing says what 'x' of forward\(x\) is like\n  → give inputs .* shapes=\{'x': \(1, …\)\}",
        ),
        (Net(), Examples({"y": IDS}), "forward has no parameter 'y'"),
        (Net().to("meta"), OneInput, "no weights"),
        (script, OneInput, "TorchScript"),
        ("weights.pth", OneInput, "holds weights, or a pickled module"),
        ("cut.pt2", OneInput, "cut.pt2: not a program that torch.export.save wrote"),
    ):
        with pytest.raises(ModelError, match=message):
            open_model(source, (tmp_path,), cache, examples=asked)


def test_what_cannot_be_identified_is_exported_each_time(cache: Cache, exports: list[object]) -> None:
    module = Act(torch.relu)
    module.lock = __import__("threading").Lock()
    for count in (1, 2):
        model = open_model(module, (), cache, examples=OneInput)
        assert len(exports) == count
        assert "exported anew each time: it holds a lock" in " ".join(model.notes)


# --- programs --------------------------------------------------------------------------------------------------------


def test_a_program_and_its_file(cache: Cache, tmp_path: Path, exports: list[object]) -> None:
    module = Net().eval()
    dynamic = {"x": {0: torch.export.Dim("rows")}}
    program = torch.export.export(module, (torch.ones(2, 4),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "net.pt2")
    case = {"x": np.ones((3, 4), np.float32)}
    expected = module(torch.ones(3, 4)).detach()
    for source in (program, "net.pt2"):
        model = open_model(source, (tmp_path,), cache)
        open_model(source, (tmp_path,), cache)
        assert [dim.partition("=")[0] for dim in model.inputs[0].free_dims()] == ["x[0]"]
        assert model.origin is not None
        np.testing.assert_allclose(model.origin(case)["output"], expected, atol=1e-6)
        np.testing.assert_allclose(ran(model, **case)["output"], expected, atol=1e-5)
    assert len(exports) == 2
    code = (
        "import sys\nfrom pathlib import Path\nfrom pytest_trtcheck.cache import Cache\n"
        "from pytest_trtcheck.model.sources import open_model\n"
        f"open_model('net.pt2', (Path({str(tmp_path)!r}),), Cache({str(cache.root)!r}))\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_program_of_other_weights_is_another(cache: Cache, exports: list[object]) -> None:
    module = Net().eval()
    for _ in range(2):
        open_model(torch.export.export(module, (torch.ones(2, 4),)), (), cache)
        module.last.bias.data += 1
    assert len(exports) == 2


# --- names, state and types that stand in the way --------------------------------------------------------------------


class Named(nn.Module):
    """Outputs with the name of an input, and with one name."""

    def forward(self, x: Any) -> dict[str, Any]:
        return {"x": x * 2, "a": (x * 3, x * 4), "a_0": x * 5}


class Positional(nn.Module):
    def forward(self, x: Any, y: Any, /) -> Any:
        return x - 2 * y


class Tallied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        return x * self.calls


def test_outputs_have_names_of_their_own(cache: Cache) -> None:
    case = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    factors = {"x_out": 2, "a_0": 3, "a_1": 4, "a_0_out": 5}
    for source in (Named(), torch.export.export(Named(), (torch.ones(3, 4),))):
        model = open_model(source, (), cache, examples=OneInput)
        assert [spec.name for spec in model.outputs] == list(factors)
        assert model.origin is not None
        for outputs in (ran(model, **case), model.origin(case)):
            for name, factor in factors.items():
                np.testing.assert_array_equal(outputs[name], factor * case["x"])


def test_inputs_that_have_no_name_are_given_by_their_place(cache: Cache) -> None:
    examples = Examples({"x": np.ones((1, 4), np.float32), "y": np.ones((1, 4), np.float32)})
    case = {"x": np.full((3, 4), 5, np.float32), "y": np.full((3, 4), 7, np.float32)}
    assert (ran(open_model(Positional(), (), cache, examples=examples), **case)["output"] == -9).all()


def test_a_program_is_left_as_it_was(cache: Cache) -> None:
    program = torch.export.export(Tallied(), (torch.ones(2, 4),), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    model = open_model(program, (), cache)
    assert model.origin is not None
    assert [float(model.origin({"x": np.ones((2, 4), np.float32)})["output"][0, 0]) for _ in range(2)] == [1, 1]
    assert program.state_dict["calls"] == 0


def test_layers_that_were_never_run_are_said(cache: Cache) -> None:
    with pytest.raises(ModelError, match="'weight', 'bias' have no shape yet"):
        open_model(nn.LazyLinear(3), (), cache, examples=Examples({"input": np.ones((1, 4), np.float32)}))


def test_a_bf16_module_is_checked_where_onnx_runtime_cannot_run_its_export(suite: Suite) -> None:
    suite.write(
        test_it="""
import torch
from pytest_trtcheck import trt_parity

@trt_parity(torch.nn.Linear(4, 3).bfloat16().eval(), precision="bf16")
def test_it(): return torch.rand(2, 4).bfloat16()
"""
    )
    run = suite.run_apart()
    check = run.check("test_it")
    assert check["verdict"] == "pass"
    assert any("the export was not run beside the module Linear, nor with two batches" in n for n in check["notes"])
