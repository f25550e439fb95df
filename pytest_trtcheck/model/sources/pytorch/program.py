"""An ExportedProgram as the origin of a model."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError, first_line
from pytest_trtcheck.model.sources.pytorch.export import why, write
from pytest_trtcheck.model.sources.pytorch.running import Running
from pytest_trtcheck.model.sources.pytorch.tensors import array_of, named_outputs, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.sources.exported import Inner


@dataclass
class Program:
    """An ExportedProgram as the origin of a model."""

    title: str
    identity: str
    load: Callable[[], Any]

    @cached_property
    def program(self) -> Any:
        """The program, loaded when it is needed."""
        return self.load()

    def write(self, path: Path) -> None:
        """Export it."""
        names = list(self._outputs(self._leaves()))
        write(self.program, path, output_names=names, why=lambda error: why(error, self.title))

    def __call__(self, case: Case) -> dict[str, NDArray[Any]]:
        """Its outputs in FP32, as `Origin` asks for them."""
        leaves = self._with([tensor_of(array) for array in case.values()])
        return {name: array_of(value) for name, value in self._outputs(leaves).items()}

    def running(self, device: str, dtype: Any) -> Running:
        """A copy of it on a device and in a float type; what its code fixes stays as it is."""
        import copy

        import torch.utils._pytree as pytree
        from torch.export.passes import move_to_device_pass

        program = copy.deepcopy(self.program)
        module = move_to_device_pass(program, device).module().to(dtype=dtype)

        def bind(tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            leaves = self._with(list(tensors.values()))
            args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
            return tuple(args), dict(kwargs)

        return Running(self.title, module, bind, device, dtype)

    def inside(self, case: Case, export: onnx.ModelProto) -> Iterator[Inner]:
        """Nothing: a program has no modules left that could be watched."""
        del case, export
        return iter(())

    def _with(self, tensors: Sequence[Any]) -> list[Any]:
        """What it is called with, in one list: tensors in the places of those that it was exported with."""
        given = iter(tensors)
        return [
            next(given) if type(leaf).__name__ != "int" and hasattr(leaf, "shape") else leaf for leaf in self._leaves()
        ]

    def _leaves(self) -> list[Any]:
        import torch.utils._pytree as pytree

        return list(pytree.tree_leaves(self.program.example_inputs))

    def _outputs(self, leaves: Sequence[Any]) -> dict[str, Any]:
        import torch
        import torch.utils._pytree as pytree

        program = self.program
        try:
            args, kwargs = pytree.tree_unflatten(list(leaves), program.call_spec.in_spec)
            with torch.no_grad(), _untouched(program):
                return named_outputs(program.module()(*args, **kwargs), program.graph_signature.user_inputs)
        except Exception as error:
            raise ModelError(
                f"{self.title} failed: {type(error).__name__}: {first_line(error)}", code="module-failed"
            ) from error


@contextmanager
def _untouched(program: Any) -> Iterator[None]:
    """The program; what running it does to its buffers is undone."""
    before = [(buffer, buffer.clone()) for _, buffer in program.named_buffers()]
    try:
        yield
    finally:
        for buffer, content in before:
            buffer.copy_(content)
