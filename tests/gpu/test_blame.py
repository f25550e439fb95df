"""Blame on a real GPU: an engine that was altered after lowering is to blame, at the node that was altered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from pytest_trtcheck import check, engines
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.job import Request
from pytest_trtcheck.model import graph
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models
from tests.diagnosed import conv_chain, image

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_trtcheck.cache import Cache as CacheType
    from pytest_trtcheck.engines import Built, Order, Place
    from pytest_trtcheck.gpu.device import Gpu

pytestmark = pytest.mark.gpu
NODE = "conv7"


def altered(order: Order, folder: Path) -> Order:
    """The order with the weight of one node, where it is there, 20 % larger."""
    model = graph.read(order.lowered.path)
    for node in graph.all_nodes(model.graph):
        if node.name == NODE:
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            array = (weight.const_value.numpy().astype(np.float32) * 1.2).astype(weight.const_value.numpy().dtype)
            weight.const_value = ir.Tensor(array, dtype=weight.const_value.dtype, name=weight.name)
    path = folder / f"{order.lowered.key.replace(':', '_')[-40:]}.onnx"
    graph.write(model, path)
    return replace(order, lowered=replace(order.lowered, path=path))


def test_an_engine_that_was_altered_after_lowering(
    tmp_path: Path, real_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_models.save(conv_chain(12), tmp_path / "chain.onnx")
    builds: list[str] = []
    build = engines.build

    def planted(order: Order, place: Place, cache: CacheType) -> Built:
        builds.append(order.lowered.key)
        return build(altered(order, tmp_path), place, cache)

    monkeypatch.setattr(engines, "build", planted)
    workshop = check.Workshop(cache=Cache(tmp_path / "cache"), detected=real_gpu)
    record = workshop.check(
        Request("t", "chain.onnx", (tmp_path,), parity=ParitySpec(precision=("fp16",)), inputs=[image()])
    )
    assert record.verdict == "fail", record.message
    assert record.parity is not None
    blame = record.parity.blame
    assert blame is not None
    assert blame["step"] == "engine"
    named = {blame["culprit"]["node"], *blame["others"]}
    assert NODE in named, blame
    assert len(named) <= 4, blame
    assert "the engine is to blame" in str(record.message).splitlines()[0]
    assert len(builds) - 1 == blame["builds"] <= 8


def test_a_sound_engine_has_nothing_to_bisect(tmp_path: Path, real_gpu: Gpu) -> None:
    """A tolerance that nothing can keep: the precision is to blame, not TensorRT's other way of rounding."""
    onnx_models.save(conv_chain(12), tmp_path / "chain.onnx")
    workshop = check.Workshop(cache=Cache(tmp_path / "cache"), detected=real_gpu)
    spec = ParitySpec(precision=("bf16",), tol=1e-4)
    record = workshop.check(Request("t", "chain.onnx", (tmp_path,), parity=spec, inputs=[image()]))
    assert record.parity is not None
    assert record.parity.blame is not None
    assert record.parity.blame["step"] in {"precision", "spread", "both"}, record.message
