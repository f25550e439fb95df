"""Tensors of PyTorch and arrays, and the names of what a module returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_trtcheck.model.sources.exported import apart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def tensor_of(array: Any) -> Any:
    """An array as a tensor of its own memory."""
    import numpy as np
    import torch

    if array.dtype.type.__module__ != "ml_dtypes":
        return torch.from_numpy(np.array(array))
    bits = torch.from_numpy(np.array(array).view(f"int{8 * array.dtype.itemsize}"))
    return bits.view(getattr(torch, array.dtype.name))


def array_of(tensor: Any) -> NDArray[Any]:
    """A tensor as an array of its own memory."""
    from pytest_trtcheck.model.arrays import as_array

    # Its memory is the module's, which may be about to change it.
    return as_array(tensor.detach().clone())


def named_outputs(output: Any, inputs: Iterable[str]) -> dict[str, Any]:
    """The tensors in what a module made of `inputs`, by name: keys and fields as they are, places by number."""
    import torch
    import torch.utils._pytree as pytree

    names, tensors = [], []
    leaves, _ = pytree.tree_flatten_with_path(output)
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
            names.append("_".join(words if words and not words[0].isdigit() else ["output", *words]))
            tensors.append(leaf)
    return dict(zip(apart(names, inputs), tensors, strict=True))
