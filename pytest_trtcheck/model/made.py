"""Callables that a user gives: those that make a model, and those that compute outputs from inputs."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import CheckError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable


def name_of(function: Callable[..., Any]) -> str:
    """What messages call a function, or an object that can be called."""
    return getattr(function, "__name__", None) or type(function).__name__


def takes_inputs(function: Callable[..., Any]) -> bool:
    """Whether a callable has to be given something: one that has not makes a model."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    optional = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return any(each.default is each.empty and each.kind not in optional for each in parameters)


def is_model(value: object) -> bool:
    """Whether a value names or holds a model: a path, the bytes of a file, or an onnx.ModelProto."""
    return isinstance(value, (str, bytes, os.PathLike)) or hasattr(value, "SerializeToString")


def model_made_by(function: Callable[[], object]) -> object:
    """The model that a callable without arguments makes.

    Raises
    ------
    ModelError
        It takes arguments, fails, or gives no model.
    """
    name = name_of(function)
    if takes_inputs(function):
        raise ModelError(
            f"model={name}: takes arguments, so it can't be called to make the model",
            "give a function without arguments; functools.partial fills them in",
        )
    try:
        made = function()
    except CheckError:
        raise
    except Exception as error:
        raise ModelError(f"{name}() failed to make the model: {type(error).__name__}: {error}") from error
    if not is_model(made):
        raise ModelError(
            f"{name}() gave a {type(made).__name__}, which is no model",
            "return a path, the bytes of an ONNX file, or an onnx.ModelProto",
        )
    return made
