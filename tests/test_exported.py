"""Models that come from elsewhere: exported once, proved with two batches, computing their own reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.errors import ModelError
from pytest_trtcheck.model.sources import Examples, Opening, exported
from pytest_trtcheck.precision import reference

if TYPE_CHECKING:
    from pathlib import Path

Case = dict[str, np.ndarray[Any, Any]]
WEIGHT = np.eye(4, dtype=np.float32) * 2


class Doubling:
    """A source that multiplies by its weight; `add` is a fault that only the source knows of."""

    title = "the doubling source"
    identity = "1"

    def __init__(self, add: float = 0.0) -> None:
        self.add = add
        self.writes = 0

    def __call__(self, case: Case) -> Case:
        return {"y": case["x"] @ WEIGHT + np.float32(self.add)}

    def inside(self, *_: object) -> Any:
        return iter(())


def write(path: Path, nodes: list[onnx.NodeProto] | None = None, weights: Any = ()) -> None:
    nodes = nodes or [helper.make_node("MatMul", ["x", "w"], ["y"], "double")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(WEIGHT, "w"), *weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def opened(tmp_path: Path, origin: Doubling, write: Any = write, **asked: Any) -> Any:
    opening = Opening((), Cache(tmp_path / "cache"), examples=Examples(**asked))

    def counted(path: Path) -> None:
        origin.writes += 1
        write(path)

    return exported.exported(opening, "doubling", {"weights": "2"}, counted, origin)


def test_it_is_exported_once_and_keeps_its_origin(tmp_path: Path) -> None:
    origin = Doubling()
    first, second = (opened(tmp_path, origin) for _ in range(2))
    assert origin.writes == 1
    assert first == second
    assert second.origin is origin
    assert not second.notes


@pytest.mark.parametrize("asked", [{}, {"inputs": {"x": np.ones((1, 4), np.float32)}}, {"batch": 8}])
def test_a_batch_that_the_export_fixed_is_an_error(tmp_path: Path, asked: dict[str, Any]) -> None:
    def fixing(path: Path) -> None:
        shape = numpy_helper.from_array(np.array([2, 4]), "shape")
        fixed = helper.make_node("Reshape", ["m", "shape"], ["y"], "fixed")
        write(path, [helper.make_node("MatMul", ["x", "w"], ["m"], "double"), fixed], [shape])

    for _ in range(2):
        with pytest.raises(ModelError, match="doubling: the export fixes the batch at 2: with 3 rows"):
            opened(tmp_path, Doubling(), fixing, **asked)


def test_a_batch_that_is_fixed_in_the_values_is_an_error(tmp_path: Path) -> None:
    def scaling(path: Path) -> None:
        # The mean over a batch of two: right in shape for every batch, in value for one.
        nodes = [
            helper.make_node("ReduceSum", ["x"], ["s"], "sum", keepdims=0),
            helper.make_node("Mul", ["s", "half"], ["m"], "mean"),
            helper.make_node("Add", ["z", "m"], ["y"], "add"),
            helper.make_node("MatMul", ["x", "w"], ["z"], "double"),
        ]
        write(
            path,
            [nodes[0], nodes[1], nodes[3], nodes[2]],
            [numpy_helper.from_array(np.array(1 / 8, np.float32), "half")],
        )

    class Mean(Doubling):
        def __call__(self, case: Case) -> Case:
            return {"y": case["x"] @ WEIGHT + case["x"].sum() / (4 * len(case["x"]))}

    with pytest.raises(ModelError, match=r"fixes the batch at 2: with 3 rows, output 'y' lies 0\.\d+ from"):
        opened(tmp_path, Mean(), scaling)


def test_another_export_than_the_source_is_said(tmp_path: Path) -> None:
    (note,) = opened(tmp_path, Doubling(add=0.5)).notes
    assert note.startswith("the export is not what the doubling source computes: output 'y' lies 0.")


def test_outputs_that_the_source_lacks_are_an_error(tmp_path: Path) -> None:
    class Renamed(Doubling):
        def __call__(self, case: Case) -> Case:
            return {"z": case["x"]}

    with pytest.raises(ModelError, match="it has an output 'y', its source has 'z'"):
        opened(tmp_path, Renamed())


def test_another_release_of_a_framework_computes_the_reference_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, x = Doubling(), {"x": np.ones((2, 4), np.float32)}
    model = opened(tmp_path, origin)

    def computed() -> float:
        return float(reference.SourceReference(origin, model, Cache(tmp_path / "cache"))(x)["y"][0, 0])

    assert computed() == 2
    origin.add = 1
    assert computed() == 2, "from the cache"
    monkeypatch.setattr(reference, "frameworks", lambda: "torch 99")
    assert computed() == 3
