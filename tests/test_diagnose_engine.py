"""Faults of the engine: a part of it altered after lowering, and whether bisection finds that part.

The engine is the emulation of an altered copy of whatever it is given to build, so the fault is in each sub-engine that
holds the altered node, as a fault of TensorRT would be.
"""

from __future__ import annotations

import math
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.diagnose import Blame, Budget, Engine, diagnose, explain
from pytest_trtcheck.diagnose.bisection import EXTRA_BUILDS, cuts
from pytest_trtcheck.diagnose.models import named
from pytest_trtcheck.errors import BuildError
from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.pieces import Graph
from pytest_trtcheck.precision.emulation import emulation, rewrite
from pytest_trtcheck.spec import ShapeRange
from tests import onnx_models
from tests.diagnosed import FLOAT, Bench, Case, assert_users_names, conv_chain, image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose import Subject
    from pytest_trtcheck.precision.lowering import Lowered


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
        graph.write(rewrite.emulated(model), target)
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
    assert_users_names(subject, found)
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
    with closing(emulation(subject.model, subject.lowered, "bf16", bench.cache)) as runner:
        emulated = runner(subject.case)
    noise = np.random.default_rng(0).standard_normal((1, 10)).astype(np.float32) * 1e-5
    found = diagnose(subject, bench.cache, Engine({"logits": emulated["logits"] + noise}))
    assert found is not None
    assert found.step in {"precision", "spread"}
    assert found.builds == 0


def test_an_engine_that_is_off_by_as_much_as_the_precision_is_not_to_blame(bench: Bench) -> None:
    """Where a model amplifies rounding, two sound ways of rounding lie as far apart as each from the truth."""
    subject = bench.failed(conv_chain(6), "bf16", [image()], tol=1e-4)
    with closing(emulation(subject.model, subject.lowered, "bf16", bench.cache)) as runner:
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
            find_module("tensorrt_rtx"),
            path,
            self.folder / "engine.plan",
            target=Target((8, 6), here=False),
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


# --- whose error it is, and what holds on the engine -----------------------------------------------------------------


def emulated_by(bench: Bench, subject: Subject) -> dict[str, NDArray[Any]]:
    with closing(emulation(subject.model, subject.lowered, subject.precision, bench.cache)) as runner:
        return runner(subject.case)


class Exaggerating:
    """An engine that errs `factor` times as much as the emulation, and `floor` (relative to the peak) beside it."""

    def __init__(self, bench: Bench, subject: Subject, factor: float, floor: float = 0.0) -> None:
        self.bench, self.subject, self.factor, self.floor = bench, subject, factor, floor
        self.builds = 0

    def outputs(self, emulated: dict[str, NDArray[Any]], case: Case, factor: float) -> dict[str, NDArray[Any]]:
        exact = self.subject.reference(case)
        noise = np.random.default_rng(0)
        return {
            name: np.asarray(
                exact[name]
                + factor * (emulated[name] - exact[name])
                + self.floor * np.abs(exact[name]).max() * noise.choice([-1, 1], exact[name].shape),
                np.float32,
            )
            for name in exact
        }

    @contextmanager
    def rebuild(self, lowered: Lowered) -> Iterator[Any]:
        self.builds += 1
        subject = self.subject
        runner = emulation(subject.model, lowered, subject.precision, Cache(self.bench.folder / "rebuilt"))
        with closing(runner):
            yield lambda case: self.outputs(runner(case), case, self.factor)


def with_one_bad_block(bench: Bench, precision: Any, tol: float) -> Subject:
    """What is lost comes from a cancellation in the middle; the rest adds little."""
    extra = {
        2: [
            helper.make_node("Add", ["r2", "offset"], ["shifted"], "shift"),
            helper.make_node("Sub", ["shifted", "offset"], ["x3"], "shift_back"),
        ]
    }
    proto = conv_chain(5, extra=extra, more_weights={"offset": np.array(2000, np.float32)})
    return bench.failed(proto, precision, [image(), image(1)], tol=tol)


@pytest.mark.parametrize("ratio", [0.3, 1.2, 1.9, 3.0, 30.0])
def test_who_is_to_blame_does_not_depend_on_the_tolerance(bench: Bench, ratio: float) -> None:
    """Whatever limit both errors miss together: by their sizes alone, and the engine for more than another rounding."""
    exact = bench.failed(conv_chain(6), "bf16", [image()])
    emulated, expected = emulated_by(bench, exact)["logits"], exact.reference(exact.case)["logits"]
    engine = np.asarray(emulated + ratio * (emulated - expected), np.float32)
    total = float(np.abs(engine - expected).max() / np.abs(expected).max())
    steps = {}
    for share in (1e-3, 0.1, 0.5, 0.95):
        subject = bench.failed(conv_chain(6), "bf16", [image()], tol=share * total)
        found = diagnose(subject, bench.cache, Engine({"logits": engine}), budget=Budget(trials=0))
        assert found is not None
        steps[share] = found.step
    if ratio < 2:
        assert set(steps.values()) <= {"precision", "spread"}, steps
    else:
        assert set(steps.values()) <= {"engine", "both"}, steps
        assert steps[0.95] == "engine"
        assert steps[1e-3] == "both"


def test_a_list_is_confirmed_on_the_engine(bench: Bench) -> None:
    subject = with_one_bad_block(bench, "fp16", 1e-2)
    assert bench.error(subject) > 1e-2
    engine = Exaggerating(bench, subject, 1.8)
    outputs = engine.outputs(emulated_by(bench, subject), subject.case, 1.8)
    found = diagnose(subject, bench.cache, Engine(outputs, None, engine.rebuild))
    assert found is not None
    assert found.keep_fp32 is not None
    assert {"shift", "shift_back"} <= set(found.keep_fp32)
    assert found.confirmed_by == "engine"
    assert engine.builds == 1
    emulated = max(bench.error(subject, found.keep_fp32, case) for case in range(2))
    assert found.keep_emulated == pytest.approx(emulated, rel=1e-3)
    assert found.keep_value == pytest.approx(1.8 * emulated, rel=1e-3)
    assert found.keep_value is not None
    assert found.keep_value <= 1e-2
    assert "confirmed on all inputs on the engine" in " ".join(explain(found.to_dict()).split())


def test_a_list_that_fails_on_the_engine_is_widened(bench: Bench) -> None:
    """The engine that failed errs as the emulation does; those that are built to confirm err three times as much."""
    whole = bench.error(bench.failed(conv_chain(8), "bf16", [image()]))
    subject = bench.failed(conv_chain(8), "bf16", [image()], tol=0.6 * whole)
    engine = Exaggerating(bench, subject, 3.0)
    emulated = emulated_by(bench, subject)
    found = diagnose(subject, bench.cache, Engine(engine.outputs(emulated, subject.case, 1.0), None, engine.rebuild))
    alone = diagnose(subject, bench.cache)
    assert found is not None
    assert alone is not None
    assert alone.keep_fp32 is not None
    assert alone.confirmed_by == "emulation"
    assert engine.builds > 1
    assert found.keep_fp32 is not None, found.notes
    assert len(found.keep_fp32) > len(alone.keep_fp32)
    assert found.confirmed_by == "engine"
    assert 3 * bench.error(subject, found.keep_fp32) <= 0.6 * whole


def test_a_list_that_never_holds_on_the_engine_is_no_advice(bench: Bench) -> None:
    subject = with_one_bad_block(bench, "fp16", 1e-2)
    engine = Exaggerating(bench, subject, 1.0, floor=0.03)
    outputs = engine.outputs(emulated_by(bench, subject), subject.case, 1.0)
    found = diagnose(subject, bench.cache, Engine(outputs, None, engine.rebuild))
    assert found is not None
    assert found.keep_fp32 is None
    assert 1 <= engine.builds <= 3
    note = next(note for note in found.notes if "no keep_fp32 was found that holds on the engine" in note)
    assert "by emulation" in note
    assert "on the engine, and the limit is 0.01" in note


def test_an_engine_that_cannot_be_built_again_leaves_the_list_as_emulated(bench: Bench) -> None:
    subject = with_one_bad_block(bench, "fp16", 1e-2)

    def refuse(_: Lowered) -> Any:
        raise BuildError("TensorRT could not build the engine", "this is planted")

    outputs = emulated_by(bench, subject)
    found = diagnose(subject, bench.cache, Engine(outputs, None, refuse))
    assert found is not None
    assert found.keep_fp32 is not None
    assert found.confirmed_by == "emulation"
    assert not found.is_complete
    assert any("not confirmed on the engine: TensorRT could not build" in note for note in found.notes)


def test_only_together_do_they_fail(bench: Bench) -> None:
    """Neither error is over the limit by itself; what keeps the precision's smaller is the remedy, on the engine."""
    whole = bench.error(bench.failed(conv_chain(8), "bf16", [image()]))
    subject = bench.failed(conv_chain(8), "bf16", [image()], tol=1.2 * whole)
    engine = Exaggerating(bench, subject, 1.7)
    outputs = engine.outputs(emulated_by(bench, subject), subject.case, 1.7)
    found = diagnose(subject, bench.cache, Engine(outputs, None, engine.rebuild))
    assert found is not None
    assert found.step in {"precision", "spread"}
    assert found.keep_fp32 is not None
    assert found.confirmed_by == "engine"


def test_nodes_of_the_lowering_are_not_named_where_an_engine_goes_wrong(bench: Bench) -> None:
    """Batch normalization is folded, inputs are cast: an altered product of the folding is the user's own node."""
    proto = conv_chain(4)
    ones = {name: np.ones(8, np.float32) for name in ("scale", "variance")}
    for name, array in {**ones, "shift": np.zeros(8, np.float32), "mean": np.zeros(8, np.float32)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto.graph.node[3].output[0] = "before_norm"
    norm = ["before_norm", "scale", "shift", "mean", "variance"]
    proto.graph.node.insert(4, helper.make_node("BatchNormalization", norm, ["x2"], "norm"))
    subject = bench.failed(proto, "fp16", [image()])
    found = blamed(bench, subject, Altered(bench.folder, subject.case, "norm/mul", 0.5))
    assert found.step == "engine"
    assert found.culprit is not None
    assert "norm" in {found.culprit.node, *found.others}
