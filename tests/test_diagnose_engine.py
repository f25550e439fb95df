"""Faults of the engine: a part of it altered after lowering, and whether bisection finds that part.

The engine is the emulation of an altered copy of whatever it is given to build, so the fault is in each sub-engine that
holds the altered node, as a fault of TensorRT would be.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from pytest_trtcheck import artifacts
from pytest_trtcheck.backends import tensorrt
from pytest_trtcheck.backends.onnxruntime import OrtRunner
from pytest_trtcheck.diagnose import Blame, Budget, Engine, diagnose, explain
from pytest_trtcheck.diagnose.bisection import EXTRA_BUILDS, cuts
from pytest_trtcheck.diagnose.cutting import Graph
from pytest_trtcheck.diagnose.models import named
from pytest_trtcheck.errors import BuildError
from pytest_trtcheck.model import graph
from pytest_trtcheck.precision import emulate
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models
from tests.diagnosed import FLOAT, Bench, Case, conv_chain, image

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose import Subject


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


class Altered:
    """Builds and runs "engines" in which the weight of one node is multiplied by a factor."""

    def __init__(
        self, folder: Path, case: Case, node: str, factor: float, refuse: frozenset[int] = frozenset()
    ) -> None:
        self.folder, self.case, self.node, self.factor, self.refuse = folder, case, node, factor, refuse
        self.builds = 0

    def __call__(self, path: Path) -> dict[str, NDArray[Any]]:
        self.builds += 1
        if self.builds in self.refuse:
            raise BuildError("TensorRT could not build the engine", "this is planted")
        model = graph.read(path)
        for node in [each for each in graph.all_nodes(model.graph) if each.name == self.node]:
            weight = node.inputs[1]
            assert weight is not None
            assert weight.dtype is not None
            array = np.array(self.factor).astype(weight.dtype.numpy())
            factor = ir.Value(
                name="planted",
                type=ir.TensorType(weight.dtype),
                shape=ir.Shape([]),
                const_value=ir.Tensor(array, name="planted"),
            )
            model.graph.register_initializer(factor)
            altered = ir.node("Mul", [weight, factor], name="planted")
            altered.outputs[0].name, altered.outputs[0].dtype = "planted/output", weight.dtype
            model.graph.insert_before(node, altered)
            node.replace_input_with(1, altered.outputs[0])
        target = self.folder / "engine.onnx"
        graph.write(emulate.emulated(model), target)
        with closing(OrtRunner(target, "engine")) as runner:
            wanted = {value.name for value in model.graph.inputs}
            return runner({name: array for name, array in self.case.items() if name in wanted})


def blamed(bench: Bench, subject: Subject, altered: Altered) -> Blame:
    whole = altered(subject.lowered.path)
    altered.builds = 0
    found = diagnose(subject, bench.cache, Engine(whole, altered))
    assert found is not None
    assert altered.builds == found.builds
    staged = named(subject.lowered.path, subject.model.path, bench.folder / "lowered-again.onnx")
    number = len(cuts(Graph.stage(staged, bench.folder, "again"), [output.name for output in subject.model.outputs]))
    assert found.builds <= math.ceil(math.log2(max(number, 1))) + EXTRA_BUILDS
    assert all(len(line) <= 100 for line in explain(found.to_dict()).splitlines())
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("node", ["conv0", "conv4", "conv9"])
def test_an_altered_node_is_found(bench: Bench, precision: Any, node: str) -> None:
    calibration = [image()] if precision == "int8" else None
    subject = bench.failed(conv_chain(10), precision, [image()], calibration=calibration)
    found = blamed(bench, subject, Altered(bench.folder, subject.case, node, 0.5))
    assert found.step == "engine"
    assert found.culprit is not None
    assert found.culprit.kind == "engine"
    assert found.culprit.node == node
    assert found.keep_fp32 is None
    assert explain(found.to_dict()).splitlines()[0].startswith("  to blame     the engine: ")
    assert found.errors.lowered is not None
    assert found.errors.engine is not None
    assert found.errors.total is not None
    assert found.errors.lowered < 0.05 < found.errors.engine


def residual_net(blocks: int) -> Any:
    """Blocks of Conv → Relu → Conv, added to what they read."""
    nodes, weights, source = [helper.make_node("Conv", ["image", "w"], ["x0"], "stem", pads=[1, 1, 1, 1])], {}, "x0"
    weights["w"] = onnx_models.weights((8, 3, 3, 3), 1)
    for index in range(blocks):
        for half in ("a", "b"):
            weights[f"w{index}{half}"] = onnx_models.weights((8, 8, 3, 3), 10 + 2 * index + (half == "b"), 0.08)
        nodes += [
            helper.make_node("Conv", [source, f"w{index}a"], [f"a{index}"], f"block{index}/a", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"a{index}"], [f"r{index}"], f"block{index}/relu"),
            helper.make_node("Conv", [f"r{index}", f"w{index}b"], [f"b{index}"], f"block{index}/b", pads=[1, 1, 1, 1]),
            helper.make_node("Add", [f"b{index}", source], [f"x{index + 1}"], f"block{index}/add"),
        ]
        source = f"x{index + 1}"
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["y"], "pool"))
    return onnx_models.model(
        nodes, {"image": (FLOAT, ["batch", 3, 16, 16])}, {"y": (FLOAT, ["batch", 8, 1, 1])}, weights
    )


@pytest.mark.parametrize("block", [0, 3, 7])
def test_a_branch_of_a_residual_block(bench: Bench, block: int) -> None:
    subject = bench.failed(residual_net(8), "fp16", [image()])
    found = blamed(bench, subject, Altered(bench.folder, subject.case, f"block{block}/b", -3.0))
    assert found.step == "engine"
    assert found.culprit is not None
    assert f"block{block}/b" in (found.culprit.node, *found.others)
    assert all(name.startswith(f"block{block}/") for name in (found.culprit.node, *found.others))


def test_cuts_keep_fusions_whole(bench: Bench) -> None:
    """A Conv is never cut from its Relu, nor a block's Add from its branches."""
    subject = bench.failed(residual_net(3), "fp16", [image()])
    staged = Graph.stage(subject.lowered.path, bench.folder, "lowered")
    crossing = [cut.tensors for cut in cuts(staged, ["y"])]
    assert not any({f"a{index}", f"b{index}"} & set(tensors) for tensors in crossing for index in range(3))
    assert ("x1",) in crossing
    assert ("x0", "r0") in crossing or ("r0", "x0") in crossing
    everywhere = [cut.tensors for cut in cuts(staged, ["y"], fine=True)]
    assert any("a1" in tensors for tensors in everywhere)


def test_an_engine_that_cannot_be_built_up_to_a_cut(bench: Bench) -> None:
    subject = bench.failed(conv_chain(10), "fp16", [image()])
    altered = Altered(bench.folder, subject.case, "conv4", 1.5)
    whole = altered(subject.lowered.path)
    altered.builds, altered.refuse = 0, frozenset({1, 2})
    found = diagnose(subject, bench.cache, Engine(whole, altered))
    assert found is not None
    assert found.culprit is not None
    assert "conv4" in (found.culprit.node, *found.others)
    assert sum("no engine up to" in note and "could not build" in note for note in found.notes) == 2


def test_both_are_to_blame(bench: Bench) -> None:
    subject = bench.failed(conv_chain(6), "fp16", [image()], tol=1e-4)
    found = blamed(bench, subject, Altered(bench.folder, subject.case, "conv3", 1.2))
    assert found.step == "both"
    assert explain(found.to_dict()).splitlines()[0].startswith("  to blame     the precision as well as the engine: ")
    assert found.culprit is not None
    assert found.culprit.node == "conv3"


def test_an_engine_that_rounds_otherwise_is_not_to_blame(bench: Bench) -> None:
    """The emulation and the engine differ by noise, and both fail for the precision."""
    subject = bench.failed(conv_chain(6), "bf16", [image()], tol=1e-4)
    with closing(artifacts.emulation(subject.model, subject.lowered, "bf16", bench.cache)) as runner:
        emulated = runner(subject.case)
    noise = np.random.default_rng(0).standard_normal((1, 10)).astype(np.float32) * 1e-5
    found = diagnose(subject, bench.cache, Engine({"logits": emulated["logits"] + noise}))
    assert found is not None
    assert found.step in {"precision", "spread"}
    assert found.builds == 0


def test_an_engine_that_is_off_by_as_much_as_the_precision_is_not_to_blame(bench: Bench) -> None:
    """Where a model amplifies rounding, two sound ways of rounding lie as far apart as each from the truth."""
    subject = bench.failed(conv_chain(6), "bf16", [image()], tol=1e-4)
    with closing(artifacts.emulation(subject.model, subject.lowered, "bf16", bench.cache)) as runner:
        emulated = runner(subject.case)
    reference = subject.reference(subject.case)["logits"]
    other_way = np.asarray(2 * reference - emulated["logits"], np.float32)
    found = diagnose(subject, bench.cache, Engine({"logits": other_way}))
    assert found is not None
    assert found.step in {"precision", "spread"}
    assert "another way of rounding" in " ".join(found.notes)


def test_an_output_of_another_shape_is_not_traced(bench: Bench) -> None:
    subject = bench.failed(conv_chain(2), "fp16", [image()])
    assert diagnose(subject, bench.cache, Engine({"logits": np.zeros((10, 1), np.float32)})) is None


def test_no_engine_is_built_when_the_time_is_up(bench: Bench) -> None:
    subject = bench.failed(conv_chain(6), "fp16", [image()])
    altered = Altered(bench.folder, subject.case, "conv3", 1.5)
    whole = altered(subject.lowered.path)
    altered.builds = 0
    found = diagnose(subject, bench.cache, Engine(whole, altered), budget=Budget(engine_seconds=0))
    assert found is not None
    assert found.step == "engine"
    assert altered.builds == 0
    assert any("time for bisection was up" in note for note in found.notes)


@pytest.mark.parametrize(
    ("precision", "tol", "node", "most"),
    [("fp16", 5e-3, "/model.15/cv2/conv/Conv", 3), ("int8", 0.1, "/model.6/cv1/conv/Conv", 0)],
)
def test_nudenet(bench: Bench, precision: Any, tol: float, node: str, most: int) -> None:
    """A detector with three heads: one convolution of 63 is altered."""
    case = {"images": np.random.default_rng(0).random((1, 3, 96, 96), dtype=np.float32)}
    calibration = [case] if precision == "int8" else None
    subject = bench.failed(onnx_models.nudenet(), precision, [case], tol=tol, calibration=calibration)
    found = blamed(bench, subject, Altered(bench.folder, case, node, 0.5))
    assert found.step == "engine"
    assert found.culprit is not None
    assert node in (found.culprit.node, *found.others)
    assert len(found.others) <= most


class Built(Altered):
    """Really builds what it is given, with TensorRT-RTX for another GPU, before it computes what an engine would."""

    def __init__(self, *arguments: Any, precision: Any) -> None:
        super().__init__(*arguments)
        self.precision = precision

    def __call__(self, path: Path) -> dict[str, NDArray[Any]]:
        plan = tensorrt.build(
            tensorrt.find_module("tensorrt_rtx"),
            path,
            self.folder / "engine.plan",
            target=tensorrt.Target((8, 6), here=False),
            precision=self.precision,
            profile={name: ShapeRange(array.shape, array.shape, array.shape) for name, array in self.case.items()},
        )
        assert plan.bytes > 0
        return super().__call__(path)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_tensorrt_builds_every_beginning(bench: Bench, precision: Any) -> None:
    calibration = [image()] if precision == "int8" else None
    subject = bench.failed(residual_net(5), precision, [image()], tol=0.1, calibration=calibration)
    found = blamed(bench, subject, Built(bench.folder, subject.case, "block2/b", -3.0, precision=precision))
    assert found.builds >= 3
    assert not any("no engine up to" in note for note in found.notes)
    assert found.culprit is not None
    assert "block2/b" in (found.culprit.node, *found.others)


def test_the_worst_input_is_the_one_that_is_bisected(bench: Bench) -> None:
    quiet = {"image": np.zeros((1, 3, 16, 16), np.float32)}
    subject = replace(bench.failed(conv_chain(5), "fp16", [quiet, image()]), worst=1)
    found = blamed(bench, subject, Altered(bench.folder, subject.cases[1], "conv2", 1.5))
    assert found.culprit is not None
    assert found.culprit.node == "conv2"
