"""`pytest model.onnx`: what the options say of the inputs, the calibration data, the batches and the shapes."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.model import free_dims
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Run, Suite


def open_net(path: Path, name: str, shape: list[int | str | None]) -> None:
    """y = relu(x), dimensions open."""
    graph = helper.make_graph(
        [helper.make_node("Relu", [name], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


@pytest.fixture
def data(suite: Suite) -> Suite:
    rng = np.random.default_rng(0)
    (suite.path / "data").mkdir()
    for index in range(3):
        np.savez(suite.path / f"data/{index}.npz", image=rng.normal(size=(2, 3, 16, 16)).astype(np.float32))
    return suite


def test_inputs_calibration_and_batches(data: Suite, run_everywhere: Callable[..., Run]) -> None:
    run = run_everywhere(
        "conv.onnx",
        "--trt-precision=fp16,int8",
        "--trt-inputs=data/[01].npz",
        "--trt-calibration=data/*.npz",
        "--trt-batch=1,2",
    )
    run.result.assert_outcomes(passed=4)
    assert {check["nodeid"] for check in run.checks} == {
        f"conv.onnx::{precision}[batch{size}]" for precision in ("fp16", "int8") for size in (1, 2)
    }
    assert {(check["inputs"], check["cases"]) for check in run.checks} == {("trt_inputs", 4), ("trt_inputs", 2)}
    assert run.check("int8[batch1]")["calibration"]["samples"] == 3


def pasted(text: str) -> list[str]:
    """The options that an error tells to give."""
    return [
        shlex.split(each)[0]
        for each in re.findall(r"fix them: (.*?) \(which the model runs with\)", " ".join(text.split()))
    ]


@pytest.mark.parametrize("name", ["images", "images:0", "in put;x"])
def test_free_dimensions_are_answered_by_an_option_that_can_be_pasted(suite: Suite, name: str) -> None:
    open_net(suite.path / "my net.onnx", name, ["N", 3, "H", None])
    refused = suite.run("my net.onnx", "--trt-batch=1,4")
    refused.result.assert_outcomes(failed=2)
    (option,) = set(pasted(refused.text))
    assert option == f"--trt-shapes={name}:1x3x224x224..4x3x224x224"
    run = suite.run("my net.onnx", "--trt-batch=1,4", option)
    low, high = [1, 3, 224, 224], [4, 3, 224, 224]
    assert [check["profile"][name] for check in run.checks] == [[low, high, high]] * 2
    assert "taken as 1" not in run.text


def test_a_marked_test_is_answered_by_its_argument(suite: Suite) -> None:
    open_net(suite.path / "net.onnx", "ids", ["N", "seq"])
    suite.write(test_it='@trt_parity("net.onnx", batch=[1, 8])\ndef test_it(): ...\n')
    run = suite.run()
    (argument,) = set(re.findall(r"fix them: (shapes=.*?) \(which", " ".join(run.text.split())))
    assert argument == "shapes={'ids': ((1, 128), (8, 128), (8, 128))}"
    suite.write(test_it=f'@trt_parity("net.onnx", batch=[1, 8], {argument})\ndef test_it(): ...\n')
    assert [check["profile"]["ids"][0][1] for check in suite.run().checks] == [128, 128]


def test_sizes_that_the_model_does_not_take_are_not_proposed(suite: Suite) -> None:
    weights = np.ones((32, 2), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "features"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), suite.path / "net.onnx"
    )
    assert pasted(suite.run("net.onnx").text) == ["--trt-shapes=x:1x32"]


def test_a_batch_that_another_input_fixes_was_not_taken_as_1(suite: Suite) -> None:
    shapes: dict[str, tuple[int, list[int | str]]] = {name: (TensorProto.FLOAT, ["N", 8]) for name in "ab"}
    shapes["c"] = (TensorProto.FLOAT, [8])
    nodes = [helper.make_node("Mul", ["a", "b"], ["ab"]), helper.make_node("Add", ["ab", "c"], ["y"])]
    model = onnx_models.model(nodes, shapes, {"y": (TensorProto.FLOAT, ["N", 8])})
    onnx_models.save(model, suite.path / "net.onnx")
    fixed = suite.run("net.onnx", "--trt-shapes=a:2x8").checks[0]
    assert (fixed["verdict"], fixed["notes"]) == ("pass", ["inputs were generated (seed 0)"])
    assert "open batch dimensions were taken as 1" in suite.run("net.onnx").checks[0]["notes"]
    # As inputs that are given: what broadcasts in ONNX Runtime is no input of a model that says it is one size.
    two = suite.run("net.onnx", "--trt-shapes=a:2x8,b:1x8").checks[0]
    assert two["verdict"] == "error"
    assert "shapes: input 'b': dimension 0 (N) is 1, but 2 in input 'a'" in two["message"]


def test_several_models_each_with_its_own(data: Suite, run_everywhere: Callable[..., Run]) -> None:
    (data.path / "models").mkdir()
    open_net(data.path / "models/net.onnx", "x", ["N", None])
    refused = run_everywhere("conv.onnx", "models/net.onnx", "--trt-inputs=conv.onnx=data/*.npz")
    (option,) = set(pasted(refused.text))
    assert option == "--trt-shapes=net.onnx=x:1x128"
    run = run_everywhere("conv.onnx", "models/net.onnx", "--trt-inputs=conv.onnx=data/*.npz", option)
    assert [(check["inputs"], check["cases"]) for check in run.checks] == [("trt_inputs", 3), ("generated", 1)]


@pytest.mark.parametrize("where", [".", "models"])
def test_fixtures_of_a_conftest_count_until_an_option_is_given(data: Suite, where: str) -> None:
    (data.path / "models").mkdir()
    (data.path / "conv.onnx").rename(data.path / "models/conv.onnx")
    (data.path / where / "conftest.py").write_text(
        "import numpy as np, pytest\n"
        "@pytest.fixture\ndef trt_calibration():\n    return 'data/*.npz'\n"
        "@pytest.fixture\ndef trt_inputs():\n    return np.ones((5, 3, 16, 16), np.float32)\n"
    )
    run = data.run("models/conv.onnx", "--trt-precision=int8")
    assert (run.checks[0]["cases"], run.checks[0]["calibration"]["samples"]) == (1, 3)
    run = data.run("models/conv.onnx", "--trt-precision=int8", "--trt-inputs=data/*.npz")
    assert (run.checks[0]["cases"], run.checks[0]["calibration"]["samples"]) == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv.onnx", "--trt-inputs=no/*.npz"], "--trt-inputs=no/*.npz: no file matches"),
        (["conv.onnx", "--trt-calibration=data"], "--trt-calibration='data/*.npz'"),
        (["conv.onnx", "--trt-inputs", "data/0.npz", "data/1.npz"], "quote it: --trt-inputs='GLOB'"),
        (["conv.onnx", "--trt-inputs=*.onnx"], "is neither .npz nor .npy"),
        (["conv.onnx", "--trt-shapes=image=1x3"], "expected NAME:1x3x224x224"),
        (["conv.onnx", "--trt-shapes=nov.onnx=image:1x3x16x16"], "no model nov.onnx is named"),
        (["conv.onnx", "--trt-batch=1,x"], "--trt-batch: expected a whole number"),
        (["--trt-batch=4"], "a marked test takes batch="),
        (["--trt-precision=int8"], "a marked test takes precision="),
        (["--trt-inputs=data/*.npz"], "a marked test takes what it returns"),
    ],
)
def test_what_can_not_be_followed_is_an_error_before_the_first_test(
    data: Suite, arguments: list[str], message: str
) -> None:
    run = data.run(*arguments)
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in run.text


def test_an_option_for_a_model_that_no_run_would_collect_is_an_error(data: Suite) -> None:
    (data.path / "build").mkdir()
    (data.path / "conv.onnx").rename(data.path / "build/left.onnx")
    (data.path / "elsewhere").mkdir()
    open_net(data.path / "elsewhere/net.onnx", "x", ["N", 4])
    open_net(data.path / "other.onnx", "x", ["N", 4])
    back = data.path / "elsewhere/back"
    try:
        (data.path / "models").symlink_to("elsewhere", target_is_directory=True)
        back.symlink_to(data.path / "elsewhere", target_is_directory=True)
    except OSError:  # Windows, without the right to
        (data.path / "elsewhere").rename(data.path / "models")
    (data.path / "pytest.ini").write_text("[pytest]\ntrt_collect = models/*.onnx\n")
    for named in ("nett.onnx", "models/nett.onnx", "other.onnx", "left.onnx", "build/left.onnx"):
        run = data.run(f"--trt-shapes={named}=x:1x4")
        assert run.result.ret == pytest.ExitCode.USAGE_ERROR
        assert f"--trt-shapes={named}=x:1x4: no model {named} is named, or collected" in run.said
    assert data.run(".", "--trt-shapes=nett.onnx=x:1x4").result.ret == pytest.ExitCode.USAGE_ERROR
    assert data.run("other.onnx", "--trt-shapes=other.onnx=x:1x4").result.ret == pytest.ExitCode.OK
    back.unlink(missing_ok=True)  # pytest goes round and round there
    for named in ("net.onnx", "models/net.onnx", "./models/net.onnx", "n*.onnx"):
        run = data.run(f"--trt-shapes={named}=x:1x4")
        assert run.result.ret == pytest.ExitCode.OK
        assert len(run.checks) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trt-shapes=imagse:1x3x16x16"], "has no input 'imagse'"),
        (["--trt-shapes=image:3x16x16"], "the model's input is ['batch', 3, 16, 16]"),
        (["--trt-shapes=image:4x3x16x16..1x3x16x16"], "expected min <= opt <= max"),
        (["--trt-shapes=image:2x3x16x16", "--trt-batch=4"], "batch=4 contradicts shapes['image']"),
        (["--trt-inputs=wrong.npz"], "wrong.npz: conv.onnx has no input 'images'"),
        (["--trt-inputs=rank.npy"], "rank.npy: input 'image': expected rank 4"),
    ],
)
def test_what_does_not_fit_the_model_fails_its_test(data: Suite, arguments: list[str], message: str) -> None:
    np.savez(data.path / "wrong.npz", images=np.ones((1, 3, 16, 16), np.float32))
    np.save(data.path / "rank.npy", np.ones((3, 16, 16), np.float32))
    run = data.run("conv.onnx", *arguments)
    run.result.assert_outcomes(failed=1)
    assert message in " ".join(run.text.split())


NAMES = st.text("abz:0/. -[]'$", min_size=1, max_size=8).filter(lambda name: name == name.strip())
SHAPES = st.lists(st.integers(0, 4096), min_size=1, max_size=5).map(tuple)


@given(shapes=st.dictionaries(NAMES, SHAPES | SHAPES.map(lambda one: ShapeRange(one, one, one)), min_size=1))
def test_what_is_spelled_is_read_as_it_was(shapes: dict[str, Any]) -> None:
    (word,) = shlex.split(free_dims.on_command_line(shapes))
    assert free_dims.parsed(word.removeprefix("--trt-shapes=")) == {
        name: (shape.min, shape.opt, shape.max) if isinstance(shape, ShapeRange) else shape
        for name, shape in shapes.items()
    }


def test_a_range_of_three() -> None:
    assert free_dims.parsed("x:1x2..3x2..5x2, y:7") == {"x": ((1, 2), (3, 2), (5, 2)), "y": (7,)}
    for wrong in ("", "x", "x:", "x:1x", "x:1x2..", "x:1,,y:2", "x:1x2..1x2..1x2..1x2"):
        assert free_dims.parsed(wrong) is None


@pytest.mark.parametrize(
    "arguments", [(".", "models/a.onnx"), ("models/../models/a.onnx", "models"), (".", "a.onnx::fp16")]
)
@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_a_model_beside_a_folder_that_holds_it(
    suite: Suite, arguments: tuple[str, ...], workers: tuple[str, ...]
) -> None:
    (suite.path / "models").mkdir()
    for name in ("models/a.onnx", "models/b.onnx", "a.onnx"):
        onnx_models.save(onnx_models.gemm_net(), suite.path / name)
    run = suite.run(*arguments, "--trt-precision=fp16", *workers)
    run.result.assert_outcomes(passed=1)
    assert len(run.checks) == 1


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_a_model_that_pytest_passes_over_fails(suite: Suite, workers: tuple[str, ...]) -> None:
    (suite.path / "build").mkdir()
    onnx_models.save(onnx_models.gemm_net(), suite.path / "build/a.onnx")
    suite.write(test_plain="def test_plain(): ...\n")
    run = suite.run(".", "build/a.onnx", *workers)
    if suite.run("build/a.onnx", ".", "--collect-only").result.ret == 0 and run.checks[0]["verdict"] == "pass":
        return  # before 9.0
    run.result.assert_outcomes(passed=1, failed=1)
    assert "was not collected: pytest drops a file beside a folder that holds it" in run.said
    suite.run("build/a.onnx", "test_plain.py", *workers).result.assert_outcomes(passed=2)
