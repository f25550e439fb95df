"""ONNX files, their external data, and engines."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any

import mutations  # type: ignore[import-not-found]
from target import Found, Target, checked, copied, seed, special  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

PRECISIONS = ("fp16", "fp16", "bf16", "int8+fp16", "fp8+fp16", "int8", "tf32")


@functools.cache
def operators() -> tuple[str, ...]:
    """The names of ONNX's operators."""
    import onnx

    return tuple(sorted({schema.name for schema in onnx.defs.get_all_schemas()}))


def mutated_model(path: Path, draw: Random) -> bytes:
    """An ONNX file, changed field by field, or now and then byte by byte."""
    import onnx

    data = path.read_bytes()
    if draw.random() < 0.2:
        return mutations.of_bytes(data, draw)  # type: ignore[no-any-return]
    proto = onnx.load_model_from_string(data)
    nodes = list(proto.graph.node)
    if nodes and draw.random() < 0.2:
        draw.choice(nodes).op_type = draw.choice(operators())
    if draw.random() < 0.1:
        proto.opset_import[0].version = draw.choice((0, 1, 6, 9, 11, 13, 16, 18, 21, 23, 25, 99, -1))
    if nodes and draw.random() < 0.03:
        _call_functions(proto, draw)
    if draw.random() < 0.1:  # ONNX's checker stops there
        draw.choice(list(proto.graph.output)).type.tensor_type.ClearField("shape")
    mutations.of_message(proto, draw, ("x", "y", "batch"))
    return bytes(proto.SerializeToString())


def _call_functions(proto: Any, draw: Random) -> None:
    """Put a function in a node's place that calls itself, or others that double with each level."""
    from onnx import helper

    called = {"F0": draw.choice((["F0"], ["F9"], ["Relu"])), **{f"F{n}": [f"F{n - 1}"] * 2 for n in range(1, 40)}}
    opsets = [*proto.opset_import, helper.make_opsetid("my", 1)]
    proto.opset_import.append(opsets[-1])
    for name, inner in called.items():
        values = ["a", *["c"] * (len(inner) - 1), "b"]
        body = [
            helper.make_node(each, values[n : n + 1], values[n + 1 : n + 2], domain="" if each == "Relu" else "my")
            for n, each in enumerate(inner)
        ]
        proto.functions.append(helper.make_function("my", name, ["a"], ["b"], body, opsets))
    node = draw.choice(list(proto.graph.node))
    node.op_type, node.domain = draw.choice(("F0", "F3", "F39")), "my"


@functools.cache
def inputs_of(path: Path) -> dict[str, Any]:
    """What a sound model of the corpus takes; open dimensions are 2."""
    import numpy as np

    from pytest_trtcheck.errors import ModelError
    from pytest_trtcheck.model import onnx_model

    rng, found = np.random.default_rng(0), {}
    try:
        specs = onnx_model.load(path).inputs
    except ModelError:  # of one that is refused as it is
        return {}
    for spec in specs:
        shape = [dim if isinstance(dim, int) else 2 for dim in spec.shape]
        drawn = rng.standard_normal(shape) if spec.dtype.startswith("float") else rng.integers(0, 2, shape)
        found[spec.name] = drawn.astype(spec.dtype)
    return found


class Onnx(Target):  # type: ignore[misc]
    """Models, checked in every precision."""

    name, about = "onnx", "ONNX files, fields and bytes of them changed, checked emulated in every precision"

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        path, sound = folder / "model.onnx", seed(draw, "onnx", "*.onnx")
        if draw.random() < 0.02:
            special(path, draw)
        else:
            path.write_bytes(mutated_model(sound, draw))
        precision = draw.choice(PRECISIONS)
        if sound.stem in {"quantized", "half"} and draw.random() < 0.7:
            precision = {"quantized": "int8", "half": "fp16"}[sound.stem]
        more: dict[str, Any] = {"precision": (precision,), "batch": (draw.choice((None, None, None, 1)),)}
        if draw.random() < 0.8:
            more["inputs"] = inputs_of(sound)
        if precision.startswith(("int8", "fp8")) and sound.stem != "quantized":
            more["calibration"] = [inputs_of(sound)] * 2
        if draw.random() < 0.05:
            more["keep_fp32"] = draw.choice((("*",), ("conv*",), "auto"))
        parsed = draw.random() < 0.2
        return lambda: checked(str(path), folder, parsed=parsed, **more)


class External(Target):  # type: ignore[misc]
    """Models whose weights lie elsewhere."""

    name, about = "external", "models with external data: where it lies, how much of it there is, and what lies there"

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        import onnx

        copied("external", folder)
        path, data = folder / "model.onnx", folder / "weights.bin"
        proto = onnx.load_model(path, load_external_data=False)
        words = (
            "weights.bin",
            "./weights.bin",
            "model.onnx",
            "",
            ".",
            "a/../weights.bin",
            "/dev/zero",
            "w\0",
            "sub/w.bin",
        )
        kind = draw.randrange(4)
        if kind == 0:
            special(data, draw)
        elif kind == 1:
            data.write_bytes(mutations.of_bytes(data.read_bytes(), draw))
        else:
            tensor = draw.choice(list(proto.graph.initializer))
            mutations.of_message(tensor, draw, (*words, "location", "offset", "length", "checksum", "-1", "9" * 30))
            path.write_bytes(proto.SerializeToString())
        return lambda: checked(str(path), folder, precision=(draw.choice(("fp16", "bf16")),))


class Engine(Target):  # type: ignore[misc]
    """Engines that ship."""

    name, about = (
        "engine",
        "serialized engines of TensorRT-RTX (read by its own loader where it is installed), EPContext",
    )

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.plan = _plan(home)

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        path = folder / "engine.plan"
        kind = draw.randrange(5)
        if kind == 0:
            path = folder / "engine.onnx"
            path.write_bytes(mutated_model(seed(draw, "engine", "*.onnx"), draw))
        elif kind == 1 and draw.random() < 0.2:
            special(path, draw)
        elif kind == 2:
            head = b'{"names": {"0": "x"}}'
            path.write_bytes(mutations.of_bytes(struct.pack("<I", len(head)) + head, draw) + self.plan)
        elif kind == 3:
            path.write_bytes(mutations.of_bytes(self.plan[:200], draw) + self.plan[200:])
        else:
            path.write_bytes(mutations.of_bytes(self.plan, draw))
        model = seed(draw, "onnx", "half.onnx")
        return lambda: _loaded(str(path), str(model), folder)


def _plan(home: Path) -> bytes:
    """A plan that TensorRT-RTX built here, or the beginning of one."""
    header = struct.pack("<4sIQQ4B4xI", b"vtrt", 0, 0, 256, 1, 7, 1, 116, 2) + bytes(200)
    try:
        from pytest_trtcheck import gpu
        from pytest_trtcheck.backends.base import Machine
        from pytest_trtcheck.cache import Cache
        from pytest_trtcheck.check.checker import Checker, Request
        from pytest_trtcheck.spec import ParitySpec

        cache = Cache(home / "cache")
        settings = Checker(cache=cache, machine=Machine(requested=gpu.find_gpu("A100")), build_only=True)
        parity = ParitySpec(precision=("fp16",), batch=(1,))
        settings.check(Request("t", str(seed(_First(), "onnx", "half.onnx")), (), parity=parity))
        plans = [path for path in (home / "cache").rglob("*") if path.is_file() and path.read_bytes()[:4] == b"vtrt"]
        return plans[0].read_bytes()
    except Exception as error:
        print(f"no plan: {error!r}")
        return header


class _First:
    def choice(self, items: list[Any]) -> Any:
        return items[0]


def _loaded(path: str, model: str, folder: Path) -> Found:
    """Test an engine as it is; then let TensorRT's own loader, in the builder's process, say what it is."""
    return checked(model, folder, engine=path)
