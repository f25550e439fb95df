"""Blame on a real GPU: an engine that was altered after lowering is to blame, at the node that was altered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from pytest_trtcheck.backends.base import Machine
from pytest_trtcheck.backends.tensorrt.backend import TensorRT
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Request
from pytest_trtcheck.model import graph
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models
from tests.diagnosed import conv_chain, image

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from pytest_trtcheck.backends.base import Built, EngineSpec
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.record import CheckRecord

pytestmark = pytest.mark.gpu
NODE = "conv7"


def altered(spec: EngineSpec, folder: Path) -> EngineSpec:
    """The engine's spec with the weight of one node, where it is there, 20 % larger."""
    model = graph.read(spec.lowered.path)
    for node in graph.all_nodes(model.graph):
        if node.name == NODE:
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            array = (weight.const_value.numpy().astype(np.float32) * 1.2).astype(weight.const_value.numpy().dtype)
            weight.const_value = ir.Tensor(array, dtype=weight.const_value.dtype, name=weight.name)
    path = folder / f"{spec.lowered.key.replace(':', '_')[-40:]}.onnx"
    graph.write(model, path)
    return replace(spec, lowered=replace(spec.lowered, path=path))


def test_an_engine_that_was_altered_after_lowering(
    tmp_path: Path, real_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_models.save(conv_chain(12), tmp_path / "chain.onnx")
    builds: list[str] = []
    build = TensorRT.build

    def planted(system: TensorRT, spec: EngineSpec, cache: Cache) -> Built:
        builds.append(spec.lowered.key)
        return build(system, altered(spec, tmp_path), cache)

    monkeypatch.setattr(TensorRT, "build", planted)
    checker = check.Checker(cache=Cache(tmp_path / "cache"), machine=Machine(detected=real_gpu))
    record = checker.check(
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
    checker = check.Checker(cache=Cache(tmp_path / "cache"), machine=Machine(detected=real_gpu))
    spec = ParitySpec(precision=("bf16",), tol=1e-4)
    record = checker.check(Request("t", "chain.onnx", (tmp_path,), parity=spec, inputs=[image()]))
    assert record.parity is not None
    assert record.parity.blame is not None
    assert record.parity.blame["step"] in {"precision", "spread", "both"}, record.message


def cancelling_chain() -> onnx.ModelProto:
    """Blocks of convolutions; in the third, adding 2,000 and taking it off again costs three digits."""
    extra = {
        2: [
            helper.make_node("Add", ["r2", "offset"], ["shifted"], "shift"),
            helper.make_node("Sub", ["shifted", "offset"], ["x3"], "shift_back"),
        ]
    }
    return conv_chain(6, extra=extra, more_weights={"offset": np.array(2000, np.float32)})


def test_what_is_advised_holds_on_the_engine(tmp_path: Path, real_gpu: Gpu) -> None:
    """The list is pasted into a check of its own, and that passes on the GPU with the error that was promised."""
    onnx_models.save(cancelling_chain(), tmp_path / "chain.onnx")
    checker = check.Checker(cache=Cache(tmp_path / "cache"), machine=Machine(detected=real_gpu))
    cases = [image(), image(1)]

    def made(keep_fp32: tuple[str, ...]) -> CheckRecord:
        spec = ParitySpec(precision=("fp16",), tol=5e-3, keep_fp32=keep_fp32)
        return checker.check(Request("t", "chain.onnx", (tmp_path,), parity=spec, inputs=cases))

    failed = made(())
    assert failed.verdict == "fail", failed.message
    assert failed.parity is not None
    blame = failed.parity.blame
    assert blame is not None
    assert blame["keep_fp32"], failed.message
    assert blame["confirmed_by"] == "engine", failed.message
    assert "confirmed on all inputs on the engine" in " ".join(str(failed.message).split())
    passed = made(tuple(blame["keep_fp32"]))
    assert passed.verdict == "pass", passed.message
    assert passed.parity is not None
    assert passed.parity.worst == pytest.approx(blame["keep_value"], rel=1e-3)
    # The engine was built to confirm, and is the one that the check asks for.
    assert passed.engine is not None
    assert passed.engine.cached


@pytest.mark.parametrize("share", [1e-3, 0.1, 0.5, 0.9])
def test_the_blame_does_not_depend_on_the_tolerance(tmp_path: Path, real_gpu: Gpu, share: float) -> None:
    """A sound engine, whatever tolerance it misses: the precision is to blame for it."""
    onnx_models.save(conv_chain(12), tmp_path / "chain.onnx")
    checker = check.Checker(cache=Cache(tmp_path / "cache"), machine=Machine(detected=real_gpu))

    def made(tol: float) -> CheckRecord:
        spec = ParitySpec(precision=("bf16",), tol=tol)
        return checker.check(Request("t", "chain.onnx", (tmp_path,), parity=spec, inputs=[image()]))

    loose = made(1.0)
    assert loose.parity is not None
    assert loose.parity.worst is not None
    record = made(share * loose.parity.worst)
    assert record.verdict == "fail"
    assert record.parity is not None
    assert record.parity.blame is not None
    assert record.parity.blame["step"] in {"precision", "spread"}, record.message


def test_fp32_on_tensorrt_rtx_is_judged_as_tf32(tmp_path: Path, real_gpu: Gpu) -> None:
    onnx_models.save(conv_chain(6), tmp_path / "chain.onnx")
    checker = check.Checker(cache=Cache(tmp_path / "cache"), machine=Machine(detected=real_gpu))
    spec = ParitySpec(precision=("fp32",))
    record = checker.check(Request("t", "chain.onnx", (tmp_path,), parity=spec, inputs=[image()]))
    assert record.verdict == "pass", record.message
    assert record.parity is not None
    if record.backend != "tensorrt_rtx":
        pytest.skip("TensorRT-RTX alone has no FP32 matrix products")
    assert record.precision == "tf32 (asked fp32)"
    assert record.parity.tol == 5e-3


def test_an_overflow_inside_a_branch_on_the_gpu(tmp_path: Path, real_gpu: Gpu) -> None:
    from tests.test_diagnose_inner import X, choice

    onnx_models.save(choice(), tmp_path / "choice.onnx")
    checker = check.Checker(cache=Cache(tmp_path / "cache"), machine=Machine(detected=real_gpu))
    spec = ParitySpec(precision=("fp16",))
    record = checker.check(Request("t", "choice.onnx", (tmp_path,), parity=spec, inputs=[{"x": X + 1}]))
    assert record.verdict == "fail", record.message
    assert record.parity is not None
    blame = record.parity.blame
    assert blame is not None
    assert (blame["culprit"]["kind"], blame["culprit"]["node"]) == ("overflow", "inner_up"), record.message
    assert set(blame["keep_fp32"]) == {"inner_up", "inner_down"}
    assert blame["confirmed_by"] == "engine"
