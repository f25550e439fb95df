"""An nn.Module as the origin of a model: it is exported, run in FP32, and looked into."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError, first_line, kind_of
from pytest_trtcheck.model.sources.exported import BATCHES, Inner, within
from pytest_trtcheck.model.sources.pytorch.example import parameters_of
from pytest_trtcheck.model.sources.pytorch.export import place, why, write
from pytest_trtcheck.model.sources.pytorch.running import Running
from pytest_trtcheck.model.sources.pytorch.tensors import array_of, named_outputs, tensor_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.sources.fingerprint import Fingerprint
    from pytest_trtcheck.model.sources.pytorch.example import Example


@dataclass
class Module:
    """An nn.Module as the origin of a model."""

    title: str
    identity: str
    module: Any
    inputs: tuple[str, ...]
    variadic: str | None = None

    def write(self, path: Path, example: Example) -> None:
        """Export it with an example of its inputs."""
        module = self._on_cpu(in_fp32=False)
        tensors = {name: tensor_of(array) for name, array in example.arrays.items()}
        dims: dict[str, Any] = {name: dict(example.open_dims.get(name, {})) for name in tensors}
        # What it gives has names by then, and a module that fails by itself is told from an export that fails.
        names = list(self._outputs(module, example.arrays))
        args, kwargs = (tuple(tensors.values()), {}) if _by_position(module) else ((), tensors)
        if example.variadic is not None:
            dims = {example.variadic: tuple(dims.values())}
        with untouched(module):
            write(
                module,
                path,
                args=args,
                kwargs=kwargs,
                input_names=list(tensors),
                output_names=names,
                dynamic_shapes=dims if example.open_dims else None,
                why=lambda error: self._why(error, module, example),
            )

    def __call__(self, case: Case) -> dict[str, NDArray[Any]]:
        """Its outputs in FP32, as `Origin` asks for them."""
        return {name: array_of(value) for name, value in self._outputs(self._on_cpu(in_fp32=True), case).items()}

    def running(self, device: str, dtype: Any) -> Running:
        """A copy of it on a device and in a float type.

        Raises
        ------
        ModelError
            It is another one than was exported, or can't be copied.
        """
        content = fingerprint().add(self.module)
        digest = content.digest()
        if not content.unknown and digest != self.identity.split()[0]:
            raise ModelError(
                f"{self.title} changed since it was exported: its weights or its code are others now",
                "check it before it is changed, or give the check a copy of it",
                code="model-changed",
            )
        copied = self._copy().to(device=device, dtype=dtype).eval().requires_grad_(requires_grad=False)

        def bind(tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = {name: tensors[name] for name in self.inputs if name in tensors}
            return (tuple(given.values()), {}) if _by_position(copied) else ((), given)

        return Running(self.title, copied, bind, device, dtype)

    def inside(self, case: Case, export: onnx.ModelProto) -> Iterator[Inner]:
        """What its modules compute, in the order in which they are done; those that run twice are left out."""
        module = self._on_cpu(in_fp32=True)
        leaving = _leaving(export)
        done: list[tuple[str, list[NDArray[Any]]]] = []

        def keep(name: str, output: Any) -> None:
            # Copied now: what is done in place next must not reach it.
            tensors = [tensor for tensor in named_outputs(output, ()).values() if not tensor.is_nested]
            done.append((name, [array_of(tensor) for tensor in tensors] if name in leaving else []))

        handles = [
            each.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            for name, each in module.named_modules()
            if name
        ]
        try:
            self._outputs(module, case)
        finally:
            for handle in handles:
                handle.remove()
        names = [name for name, _ in done]
        for name, values in done:
            shapes = [value.shape for value in values]
            for value in values:
                # Of two alike (an LSTM's h and c) it is not known which tensor is which.
                if names.count(name) == 1 and shapes.count(value.shape) == 1:
                    yield Inner(name, leaving[name], value)

    def _outputs(self, module: Any, case: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        import torch

        floats = next((each.dtype for each in module.parameters() if each.dtype.is_floating_point), None)
        tensors = {name: tensor_of(case[name]) for name in self.inputs if name in case}
        if floats == torch.float32:
            tensors = {n: t.float() if t.dtype in {torch.float16, torch.bfloat16} else t for n, t in tensors.items()}
        try:
            with torch.no_grad(), untouched(module):
                output = module(*tensors.values()) if _by_position(module) else module(**tensors)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in tensors.items())
            at, line = place(error, module)
            where = f" in {at}" if at else ""
            raise ModelError(
                f"{self.title} failed{where} on {shapes}: {type(error).__name__}: {first_line(error)}",
                line,
                code="module-failed",
            ) from error
        named = named_outputs(output, tensors)
        if not named:
            raise ModelError(
                f"{self.title} gives {kind_of(output)}, and no tensor",
                "return tensors from forward",
                code="module-failed",
            )
        return named

    def _on_cpu(self, *, in_fp32: bool) -> Any:
        """The module itself, or a copy on the CPU where it lies elsewhere or computes in 16 bits."""
        import torch

        held = [*self.module.parameters(), *self.module.buffers()]
        half = in_fp32 and any(each.dtype in {torch.float16, torch.bfloat16} for each in held)
        if not half and all(each.device.type == "cpu" for each in held):
            return self.module
        copied = self._copy(" to the CPU", "give it there, in FP32").cpu()
        return copied.float() if half else copied

    def _copy(self, where: str = "", hint: str = "copy.deepcopy has to take it") -> Any:
        import copy

        try:
            return copy.deepcopy(self.module)
        except Exception as error:
            raise ModelError(
                f"{self.title} cannot be copied{where}: {first_line(error)}", hint, code="export-failed"
            ) from error

    def _why(self, error: BaseException, module: Any, example: Example) -> ModelError:
        if (fixed := _STATIC.search(str(error))) is None:
            return why(error, self.title, module)
        size, name, axis = fixed.groups()
        reason = ""
        if example.open_dims.get(name, {}).get(int(axis)) != "batch":
            what = f"dimension {axis} of input {name!r} at {size}"
        else:
            what = f"the batch at {size}"
            import numpy as np

            longer = {
                each: np.resize(array, (BATCHES[1], *array.shape[1:])) if example.open_dims.get(each) else array
                for each, array in example.arrays.items()
            }
            try:
                self._outputs(module, longer)
            except ModelError as failed:
                reason = f": {failed.headline}"
        return ModelError(
            f"the export of {self.title} fixes {what}, as its code does{reason}",
            "take sizes from the tensors (x.shape[0]), not from numbers or Python loops; or check one shape alone: "
            f"shapes={{{name!r}: {example.arrays[name].shape}}}",
            code="export-batch",
        )


def _by_position(module: Any) -> bool:
    """Whether `forward` has inputs that no name reaches."""
    return any(p.kind in {p.VAR_POSITIONAL, p.POSITIONAL_ONLY} for p in parameters_of(module))


_STATIC = re.compile(r"static shape of (\d+) for dimension inputs\['(\w+)'\](?:\[\d+\])*\.shape\[(\d+)\]")


def unwrapped(module: Any) -> Any:
    """The module behind torch.compile and DataParallel."""
    import torch

    while True:
        if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{type(module).__name__}: a TorchScript module cannot be exported",
                "give the nn.Module it was made from",
                code="model-kind",
            )
        else:
            return module


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


_IDLE = re.compile(r"_(backward|state_dict|load_state_dict|forward).*hooks.*|training|_is_full_backward_hook|_version")
"""What a module's attributes hold beside what it computes in evaluation mode."""


def fingerprint() -> Fingerprint:
    """One that knows what of a module's state decides nothing."""
    import torch

    from pytest_trtcheck.model.sources.fingerprint import Fingerprint

    def fields(module: Any) -> dict[str, object]:
        own = vars(module)
        deciding = {name: value for name, value in own.items() if not _IDLE.fullmatch(name)}
        if isinstance(module, torch.fx.GraphModule):
            # Its graph is a list of nodes that point at each other; the code says the same.
            deciding["_graph"] = module.code
        # Hooks are kept by numbers that count up through the process.
        return deciding | {name: list(own.get(name, {}).values()) for name in _HOOKS}

    return Fingerprint({torch.nn.Module: fields})


@contextmanager
def untouched(module: Any) -> Iterator[None]:
    """The module in evaluation mode; whatever running it does to its attributes and buffers is undone."""
    import torch

    each_before = [
        (each, dict(vars(each)), dict(each._buffers), [(b, b.clone()) for b in each._buffers.values() if b is not None])
        for each in module.modules()
    ]
    module.eval()
    # PyTorch's short cut through attention leaves padding at 0, and runs none of the modules inside.
    short_cut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(short_cut)
        for each, attributes, buffers, contents in each_before:
            vars(each).clear()
            vars(each).update(attributes)
            each._buffers.clear()
            each._buffers.update(buffers)
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    with torch.no_grad():
                        buffer.copy_(content)


def _leaving(export: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """The tensors that leave each module, by its path: made inside, and read outside or an output of the model."""
    scopes = {name: set(within(node)) for node in export.graph.node for name in node.output}
    readers: dict[str, list[set[str]]] = {}
    for node in export.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(set(within(node)))
    outputs = {value.name for value in export.graph.output}
    found: dict[str, tuple[str, ...]] = {}
    for name, paths in scopes.items():
        for path in paths:
            if name in outputs or any(path not in each for each in readers.get(name, ())):
                found[path] = (*found.get(path, ()), name)
    return found
