"""What pages find in their folder: files of example_project, models out of packages, and what is made here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import helper

from tests import onnx_models
from tests.docs import reports
from tests.docs.page import ROOT
from tests.onnx_models import FLOAT

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_trtcheck.record import RunRecord

EXAMPLE = ROOT / "example_project"
Shaped: TypeAlias = "tuple[int, list[int | str]]"


def _conv(path: Path) -> None:
    onnx_models.save(onnx_models.conv_net(), path)


def _images(path: Path) -> None:
    """Images of 640 × 640 pixels, by one convolution."""
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], "conv", strides=[32, 32]),
        helper.make_node("Relu", ["c"], ["scores"], "relu"),
    ]
    inputs: dict[str, Shaped] = {"images": (FLOAT, ["batch", 3, 640, 640])}
    outputs: dict[str, Shaped] = {"scores": (FLOAT, ["batch", 4, 20, 20])}
    onnx_models.save(onnx_models.model(nodes, inputs, outputs, {"w": onnx_models.weights((4, 3, 32, 32))}), path)


def _image_samples(count: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir(parents=True)
        np.savez(path / "0.npz", images=np.random.default_rng(0).random((count, 3, 640, 640), np.float32))

    return make


def _magika(path: Path) -> None:
    """magika's model, its long names shortened: the part that all of them have in common left out."""
    proto = onnx.load(onnx_models.magika())
    prefix = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/"
    for node in proto.graph.node:
        node.name = node.name.replace(prefix, "")
        for names in (node.input, node.output):
            names[:] = [each.replace(prefix, "") for each in names]
    for each in (*proto.graph.initializer, *proto.graph.value_info):
        each.name = each.name.replace(prefix, "")
    onnx.save(proto, path)


def _golden(path: Path) -> None:
    with np.load(EXAMPLE / "data" / "held_out.npz") as data:
        np.save(path, data["images"][:8])


def _upscaler(path: Path) -> None:
    onnx_models.save(onnx_models.conv_net(1), path)


def _ranker(path: Path) -> None:
    weights = {"w": onnx_models.weights((32, 64), 1).T.copy()}
    node = helper.make_node("MatMul", ["features", "w"], ["scores"])
    inputs: dict[str, Shaped] = {"features": (FLOAT, ["N", 64])}
    outputs: dict[str, Shaped] = {"scores": (FLOAT, ["N", 32])}
    onnx_models.save(onnx_models.model([node], inputs, outputs, weights), path)


def _weights(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, w0=onnx_models.weights((16, 8)), w1=onnx_models.weights((8, 4), 1))


def _detector(path: Path) -> None:
    """Boxes, scores and classes, out of images that hold them."""
    columns = {"zero": 0, "four": 4, "five": 5, "six": 6, "axis": 2}
    nodes = [
        helper.make_node("MatMul", ["images", "w"], ["y"]),
        *(
            helper.make_node("Slice", ["y", first, last, "axis"], [name])
            for name, first, last in (("boxes", "zero", "four"), ("s", "four", "five"), ("c", "five", "six"))
        ),
        helper.make_node("Squeeze", ["s", "axis"], ["scores"]),
        helper.make_node("Squeeze", ["c", "axis"], ["classes"]),
    ]
    weights = {"w": np.eye(6, dtype=np.float32)} | {name: np.array([each]) for name, each in columns.items()}
    outputs: dict[str, Shaped] = {
        "boxes": (FLOAT, ["N", 8, 4]),
        "scores": (FLOAT, ["N", 8]),
        "classes": (FLOAT, ["N", 8]),
    }
    onnx_models.save(onnx_models.model(nodes, {"images": (FLOAT, ["N", 8, 6])}, outputs, weights), path)


def _detections(path: Path) -> None:
    rng = np.random.default_rng(0)
    corners = np.arange(8)[None, :, None] * 60 + rng.random((2, 8, 2)) * 9
    scores, classes = 0.4 + rng.random((2, 8, 1)) / 2, np.broadcast_to(np.arange(8)[None, :, None] % 3, (2, 8, 1))
    np.save(path, np.concatenate([corners, corners + 30, scores, classes], axis=2).astype(np.float32))


def _package(path: Path) -> None:
    """What an installer leaves of the packages of docs/extending.md."""
    path.mkdir()
    (path / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    entries = re.findall(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(.*?)```", page, re.DOTALL)
    (path / "entry_points.txt").write_text("".join(f"[{group}]\n{lines}" for group, lines in entries))


def _score_data(path: Path) -> None:
    """The models and data of docs/score.md; `lost.onnx` is the classifier after it lost some of its accuracy."""
    from tests import test_score_docs

    for make in test_score_docs.TASKS.values():
        make(path, 0.0)
    with TemporaryDirectory() as folder:
        test_score_docs.top1(Path(folder), 0.4)
        shutil.copy(Path(folder) / "classifier.onnx", path / "lost.onnx")


LOST = """
import numpy as np
from pytest_trtcheck import Case, trt_parity
from test_top1 import top1


@trt_parity(
    "lost.onnx", precision="int8", calibration="calibration.npz", reference="classifier.onnx", score=top1, max_drop=0.01
)
def test_accuracy():
    data = np.load("validation.npz")
    return [Case({"image": data["image"][i : i + 50]}, data["label"][i : i + 50]) for i in range(0, 2000, 50)]
"""


def _cnn(path: Path) -> None:
    from tests.test_quantized_elsewhere import cnn

    onnx.save(cnn(), path)


def _cnn_quantized(path: Path, **arguments: Any) -> None:
    """As onnxruntime quantizes it, in the way that TensorRT takes; or with other arguments."""
    from onnxruntime.quantization import QuantType, quantize_static

    from tests.test_quantized_elsewhere import GOOD, Reader

    with TemporaryDirectory() as folder:
        _cnn(Path(folder) / "cnn.onnx")
        arguments = arguments or {"activation_type": QuantType.QInt8, **GOOD}
        quantize_static(Path(folder) / "cnn.onnx", path, Reader(), **arguments)


def _samples(path: Path) -> None:
    path.mkdir()
    for n in range(3):
        np.savez(path / f"{n}.npz", x=np.random.default_rng(n).random((1, 3, 16, 16), np.float32))


BESSEL = """
import torch
from pytest_trtcheck import trt_parity
from torch import nn


class Pool(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = Pool()

    def forward(self, x):
        return self.pool(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Head()

    def forward(self, x):
        return self.head(x)


@trt_parity(Net().eval())
def test_net():
    return torch.rand(2, 8)
"""

EXPORT = """
import torch
from pytest_trtcheck import SOURCE, trt_parity
from tests.torch.networks import Blocks


@trt_parity(Blocks(wrong=3), reference=SOURCE)
def test_blocks():
    return {"ids": torch.arange(7)[None] % 5}
"""


def _releases(path: Path) -> None:
    """Folders that runs on an A100, a T4 and an Orin exported into."""
    from tests.docs.made import exported

    exported(path / "release", "A100")
    exported(path / "from-t4", "T4", failed="bf16")
    exported(path / "from-orin", "Orin")


def _tests(text: str) -> Callable[[Path], object]:
    head = "from pytest_trtcheck import trt_latency, trt_parity\n\n\n"
    return lambda path: path.write_text(head + text, encoding="utf-8")


def _reports(make: Callable[[], tuple[RunRecord, ...]], which: int) -> Callable[[Path], object]:
    """One of several reports."""
    from pytest_trtcheck.report.json_report import save

    return lambda path: save(path, make()[which])


def _fleet(name: str, capability: str) -> Callable[[Path], object]:
    from pytest_trtcheck.report.json_report import save

    return lambda path: save(path, reports.fleet(name, capability))


MAKERS: dict[str, Callable[[Path], object]] = {
    "conv.onnx": _conv,
    "detections.npy": _detections,
    "detections.onnx": _detector,
    "diff-new.json": _reports(reports.compared, 1),
    "diff-old.json": _reports(reports.compared, 0),
    "golden.npy": _golden,
    "images.onnx": _images,
    "two-images": _image_samples(2),
    "eight-images": _image_samples(8),
    "installed-package": _package,
    "merge-a100.json": _fleet("NVIDIA A100-SXM4-80GB", "8.0"),
    "merge-orin.json": _fleet("Orin", "8.7"),
    "merge-t4.json": _fleet("Tesla T4", "7.5"),
    "magika.onnx": _magika,
    "320n.onnx": lambda path: shutil.copy(onnx_models.nudenet(), path),
    "cnn.onnx": _cnn,
    "cnn_asymmetric.onnx": lambda path: _cnn_quantized(path, per_channel=False),
    "cnn_int8.onnx": _cnn_quantized,
    "test_bf16.py": _tests(
        '@trt_parity("models/detector.onnx", precision="bf16", batch=4)\ndef test_detector(): ...\n'
    ),
    "ranker.onnx": _ranker,
    "releases": _releases,
    "score-data": _score_data,
    "samples": _samples,
    "test_bessel.py": lambda path: path.write_text(BESSEL, encoding="utf-8"),
    "test_export.py": lambda path: path.write_text(EXPORT, encoding="utf-8"),
    "test_lost.py": lambda path: path.write_text(LOST, encoding="utf-8"),
    "upscaler.onnx": _upscaler,
    "weights.mlp": _weights,
    "test_conv.py": _tests('@trt_parity("models/conv.onnx", batch=4)\ndef test_conv(): ...\n'),
    "test_detector.py": _tests('@trt_parity("models/detector.onnx", batch=4, tol=0.02)\ndef test_detector(): ...\n'),
    "night-1.json": _reports(reports.nights, 0),
    "night-2.json": _reports(reports.nights, 1),
    "night-3.json": _reports(reports.nights, 2),
    "night-4.json": _reports(reports.nights, 3),
    "upgrade-new.json": _reports(reports.upgraded, 1),
    "upgrade-old.json": _reports(reports.upgraded, 0),
}
"""By the name that a page asks for: what writes the file, or fills the folder."""


def put(name: str, place: Path) -> None:
    """Lay the file or folder that a page calls so at a place.

    Raises
    ------
    LookupError
        Nothing has that name.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if make := MAKERS.get(name):
        make(place)
        return
    places = (EXAMPLE, ROOT / "tests" / "data")
    found = EXAMPLE if name == EXAMPLE.name else next((each for place in places for each in place.rglob(name)), None)
    if found is None:
        raise LookupError(
            f"with: nothing is called {name!r}: neither in example_project or tests/data, nor in makers.py"
        )
    if found.is_dir():
        shutil.copytree(
            found, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".*", "report.json")
        )
    else:
        shutil.copy(found, place)
