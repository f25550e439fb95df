"""The export by torch.onnx, and why it failed: the first cause, the module and the operator, in a line or two."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


OPSET = 20


_INLINE_BYTES = 2_000_000_000
"""What protobuf can hold of weights in one file."""


def write(source: Any, path: Path, *, why: Callable[[Exception], ModelError], **arguments: Any) -> None:
    """Export to one file; weights of more than it can hold go beside it."""
    import torch
    import torch.onnx

    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                source, dynamo=True, opset_version=OPSET, external_data=False, verbose=False, **arguments
            )
            graph = program.model.graph
            held = sum(each.const_value.nbytes for each in graph.initializers.values() if each.const_value)
            for node in graph.all_nodes():
                # Where the code lies on this machine is no part of the model.
                node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
            program.save(path, external_data=held > _INLINE_BYTES)
    except ModelError:
        raise
    except Exception as error:
        raise why(error) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings, logs and print-outs of graphs, which fill screens: what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.__trace", "onnxscript", "onnx_ir")]
    before = [(each, each.handlers, each.propagate) for each in loggers]
    for each in loggers:
        each.handlers, each.propagate = [logging.NullHandler()], False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, handlers, propagate in before:
            each.handlers, each.propagate = handlers, propagate


_PACKAGE = str(Path(__file__).parents[3])
_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'(?:, overload='(\w+)')?\)")


def why(error: BaseException, title: str, module: Any = None) -> ModelError:
    """Why an export failed: the first cause in a line, the module and the operator or line of code where it did."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    at, line = place(error, module)
    where = f" in {at}" if at else ""
    if operator := _OPERATOR.search(str(first)):
        name = ".".join(each for each in operator.groups() if each and each != "default")
        return ModelError(
            f"the export of {title} fails{where}: the operator {name} has no translation to ONNX",
            f"write it with other operators{f' ({line})' if line else ''}",
            code="export-failed",
        )
    if type(first).__name__.startswith("GuardOnDataDependent"):
        return ModelError(
            f"the export of {title} fails{where}: what runs depends on the values of a tensor",
            f"{line or 'look for `if` on a tensor'}: write it with torch.where, or torch.cond",
            code="export-failed",
        )
    return ModelError(
        f"the export of {title} fails{where}: {type(first).__name__}: {first_line(first)}", line, code="export-failed"
    )


def place(error: BaseException, module: Any) -> tuple[str, str]:
    """The innermost module that the error came from, and the user's line of code that was running."""
    paths = {id(each): name for name, each in module.named_modules()} if module is not None else {}
    at = line = ""
    for frame, _ in _lines(error):
        own = frame.f_locals.get("self")
        if own is not None and id(own) in paths:
            at = f"{paths[id(own)]} ({type(own).__name__})" if paths[id(own)] else f"{type(own).__name__}"
        for value in frame.f_locals.values():
            if type(value).__module__ == "torch.fx.node" and "nn_module_stack" in value.meta:
                stack = list(value.meta["nn_module_stack"].values())
                path, kind = stack[-1] if stack else ("", "")
                at = f"{path.removeprefix('L__self__').lstrip('.')} ({str(kind).rpartition('.')[2]})" if path else at
    for frame, number in _lines(error):
        file = frame.f_code.co_filename
        if not file.startswith(("<", _PACKAGE)) and "site-packages" not in file:
            line = f"{Path(file).name}:{number}"
    return at, line


def _lines(error: BaseException) -> Iterator[tuple[Any, int]]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for each in chain:
        trace = each.__traceback__
        while trace is not None:
            yield trace.tb_frame, trace.tb_lineno
            trace = trace.tb_next
