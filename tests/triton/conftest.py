"""One server for each process of a run: models of the Python backend, right ones and one for each planted fault."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import onnx_models
from tests.triton.server import Server, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FLOAT = TensorProto.FLOAT
QUEUE = (
    "max_batch_size: 8\ndynamic_batching { preferred_batch_size: [ 1 ] default_queue_policy { max_queue_size: 3 } }\n"
)
BATCHED = "max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 20000 }\n"


@dataclass(frozen=True)
class Model:
    """A model of the repository.

    Parameters
    ----------
    inputs, outputs
        Type and dims by name, as config.pbtxt has them.
    """

    proto: onnx.ModelProto
    inputs: Mapping[str, tuple[str, Sequence[int]]]
    outputs: Mapping[str, tuple[str, Sequence[int]]]
    batching: str = BATCHED
    fault: str = ""
    versions: Sequence[int] = field(default=(1,))

    def write(self, folder: Path) -> None:
        """Put it where Triton looks."""
        lines = [f'name: "{folder.name}"', 'backend: "python"', self.batching]
        for side, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines += [
                f'{side} {{ name: "{name}" data_type: TYPE_{kind} dims: {list(dims)} }}'
                for name, (kind, dims) in tensors.items()
            ]
        lines += ["instance_group [ { kind: KIND_CPU count: 1 } ]", "version_policy { all { } }"]
        lines.append(f'parameters {{ key: "fault" value: {{ string_value: "{self.fault}" }} }}')
        for version in self.versions:
            place = folder / str(version)
            place.mkdir(parents=True)
            onnx.save(self.proto, place / "model.onnx")
            shutil.copy(Path(__file__).with_name("model.py"), place / "model.py")
        (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Ensemble:
    """A model that hands `x` on to another one, and its answer back."""

    of: str

    def write(self, folder: Path) -> None:
        """Put it where Triton looks."""
        (folder / "1").mkdir(parents=True)
        tensors = [
            f'{side} {{ name: "{name}" data_type: TYPE_{kind} dims: {list(dims)} }}'
            for side, each in (("input", X), ("output", HEADS))
            for name, (kind, dims) in each.items()
        ]
        maps = ['input_map { key: "x" value: "x" }']
        maps += [f'output_map {{ key: "{name}" value: "{name}" }}' for name in HEADS]
        step = f'step [ {{ model_name: "{self.of}" model_version: -1 {" ".join(maps)} }} ]'
        lines = ['platform: "ensemble"', "max_batch_size: 8", *tensors, f"ensemble_scheduling {{ {step} }}"]
        (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")


def two_heads(swap_scale: float = 1.0) -> onnx.ModelProto:
    """x [N, 4] → first and second [N, 3], of two weights."""
    return onnx_models.model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["first"], "one"),
            helper.make_node("MatMul", ["x", "w2"], ["second"], "two"),
        ],
        {"x": (FLOAT, ["N", 4])},
        {"first": (FLOAT, ["N", 3]), "second": (FLOAT, ["N", 3])},
        {"w1": onnx_models.weights((4, 3), 1), "w2": onnx_models.weights((4, 3), 2) * swap_scale},
    )


X = {"x": ("FP32", [4])}
HEADS = {"first": ("FP32", [3]), "second": ("FP32", [3])}


def words() -> onnx.ModelProto:
    """ids [N, 4] → out [N, 4, 3], rows of a table."""
    return onnx_models.model(
        [helper.make_node("Gather", ["table", "ids"], ["out"])],
        {"ids": (TensorProto.INT32, ["N", 4])},
        {"out": (FLOAT, ["N", 4, 3])},
        {"table": onnx_models.weights((16, 3), 1)},
    )


def counts(first: int = 0, kind: int = TensorProto.INT32) -> onnx.ModelProto:
    """x [N, 4] → whole [N, 4], x and `first` as integers."""
    return onnx_models.model(
        [helper.make_node("Cast", ["x"], ["cut"], to=kind), helper.make_node("Add", ["cut", "from"], ["whole"])],
        {"x": (FLOAT, ["N", 4])},
        {"whole": (kind, ["N", 4])},
        {"from": np.array([first], helper.tensor_dtype_to_np_dtype(kind))},
    )


def models() -> dict[str, Model | Ensemble]:
    """By name. `heads` is right, and so is `magika`; each of the others has one thing wrong."""
    right = two_heads()
    return {
        "heads": Model(right, X, HEADS, versions=(1, 3)),
        "magika": Model(
            onnx.load(onnx_models.magika()), {"bytes": ("INT32", [2048])}, {"target_label": ("FP32", [-1])}
        ),
        "in_halves": Model(right, {"x": ("FP16", [4])}, {name: ("FP16", [3]) for name in HEADS}),
        "scaled": Model(two_heads(1.1), X, HEADS),
        "swapped": Model(right, X, HEADS, fault="swapped"),
        "mixed": Model(right, X, HEADS, fault="mixes the batch"),
        "one_by_one": Model(right, X, HEADS, batching="max_batch_size: 8\n"),
        "slow": Model(right, X, HEADS, fault="sleeps 0.01", batching="max_batch_size: 8\n"),
        "hangs": Model(right, X, HEADS, fault="sleeps 4", batching="max_batch_size: 8\n"),
        "full": Model(right, X, HEADS, batching=QUEUE, fault="sleeps 0.02"),
        "only_one": Model(right, X, HEADS, fault="refuses batches"),
        "cached": Model(right, X, HEADS, batching=f"{BATCHED}response_cache {{ enable: true }}\n"),
        "cached_inside": Ensemble("cached"),
        "mixed_inside": Ensemble("mixed"),
        "words_mixed": Model(words(), {"ids": ("INT32", [4])}, {"out": ("FP32", [4, 3])}, fault="mixes the batch"),
        "beyond": Model(counts(1 << 32, TensorProto.INT64), X, {"whole": ("INT64", [4])}),
        "spoilt": Model(right, X, HEADS, batching="max_batch_size: 8\n", fault="spoils after 60"),
        "broken": Model(right, X, HEADS, fault="broken"),
        "wider": Model(right, {"x": ("FP32", [5])}, {"first": ("FP32", [3]), "third": ("INT32", [3])}),
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, with all of the models."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    # Before any run of pytester, which forgets what it imports: a second copy of gevent breaks the loop of the first.
    importlib.import_module("tritonclient.http")
    importlib.import_module("tritonclient.grpc")
    work = tmp_path_factory.mktemp("triton")
    for name, model in models().items():
        model.write(work / "repository" / name)
    with Server(work / "repository", work) as started:
        yield started
