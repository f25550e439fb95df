"""A copy of a PyTorch model, to be run as it is where it ships: on another device, in another float type, compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import GpuError, ModelError, first_line
from pytest_trtcheck.model.sources.pytorch.export import place
from pytest_trtcheck.model.sources.pytorch.tensors import array_of, named_outputs, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.model.inputs import Case


@dataclass
class Running:
    """A copy of a module or program in evaluation mode; nothing that it does reaches the user's.

    Parameters
    ----------
    title
        What messages call it.
    module
        What is called.
    bind
        From tensors by input name to the positional and the named arguments of a call.
    device
        Where it lies, as PyTorch names it.
    dtype
        Its float type, which float inputs get.
    """

    title: str
    module: Any
    bind: Callable[[Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    device: Any
    dtype: Any

    def tensors(self, case: Case) -> dict[str, Any]:
        """Inputs on its device, floats in its type."""
        found = {name: tensor_of(array) for name, array in case.items()}
        return {
            name: each.to(self.device, self.dtype if each.is_floating_point() else None) for name, each in found.items()
        }

    def call(self, tensors: Mapping[str, Any]) -> Any:
        """Run it once; on a GPU the work is put on the current stream, and not waited for.

        Raises
        ------
        ModelError
            It fails.
        GpuError
            The GPU did.
        """
        import torch

        args, kwargs = self.bind(tensors)
        try:
            with torch.inference_mode():
                return self.module(*args, **kwargs)
        except Exception as error:
            raise self.failure(error, tensors) from error

    def outputs(self, case: Case) -> dict[str, NDArray[Any]]:
        """What it computes, by the names that the export has for its outputs; on the host."""
        tensors = self.tensors(case)
        try:
            return {name: array_of(value) for name, value in named_outputs(self.call(tensors), tensors).items()}
        except RuntimeError as error:
            raise self.failure(error, tensors) from error

    def types(self, case: Case) -> dict[str, int]:
        """How many tensors of which float type its operators gave in one run, by PyTorch's names."""
        import torch
        import torch.utils._pytree as pytree
        from torch.utils._python_dispatch import TorchDispatchMode

        found: dict[str, int] = {}

        class Seen(TorchDispatchMode):  # type: ignore[misc]  # its types are not at hand
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                given = func(*args, **(kwargs or {}))
                for leaf in pytree.tree_leaves(given):
                    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                        name = str(leaf.dtype).removeprefix("torch.")
                        found[name] = found.get(name, 0) + 1
                return given

        tensors = self.tensors(case)
        with Seen():
            self.call(tensors)
        return found

    def failure(self, error: BaseException, tensors: Mapping[str, Any]) -> ModelError | GpuError:
        """What went wrong, in the user's words."""
        import torch

        where, said = f"{self.title} on {self.device}", first_line(error)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return GpuError(
                f"{where}: out of GPU memory: {said}",
                "use a smaller batch, or end other processes on it",
                code="out-of-memory",
            )
        if "CUDA error" in str(error):
            failure = GpuError(f"{where}: {said}", "CUDA cannot be used any more in this process", code="cuda-broken")
            failure.poisoned = True
            return failure
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in tensors.items())
        on = f" on {shapes}" if shapes else ""
        kind = str(self.dtype).removeprefix("torch.")
        at, line = place(error, self.module)
        return ModelError(
            f"{where} in {kind} failed{f' in {at}' if at else ''}{on}: {type(error).__name__}: {said}",
            line,
            code="module-failed",
        )
