"""A callable without arguments that makes a model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import CheckError, ModelError, kind_of, name_of

if TYPE_CHECKING:
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources import Opening

title = "a callable that makes one"


def accepts(source: object) -> bool:
    """Any callable; `open` says what is wrong with one that takes arguments."""
    return callable(source)


def takes_inputs(function: Any) -> bool:
    """Whether a callable has to be given something: one that has not makes a model."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    optional = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return any(each.default is each.empty and each.kind not in optional for each in parameters)


def open(source: Any, opening: Opening) -> OnnxModel:
    """The model that it makes, which is made anew each time.

    Raises
    ------
    ModelError
        It takes arguments, fails, or gives no model.
    """
    from pytest_trtcheck.model import sources

    name = name_of(source)
    if takes_inputs(source):
        raise ModelError(
            f"model={name}: takes arguments, so it cannot be called to make the model",
            "give a function without arguments; functools.partial fills them in",
            code="user-code-result",
        )
    try:
        model = source()
    except CheckError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name}() failed to make the model: {type(error).__name__}: {error}", code="user-code-failed"
        ) from error
    if sources.find(model) in (None, sources.made):
        raise ModelError(
            f"{name}() gave {kind_of(model)}, which is no model",
            "return a path, the bytes of an ONNX file, or an onnx.ModelProto",
            code="user-code-result",
        )
    return opening.open(model, f"{name}()")
