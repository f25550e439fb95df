"""Arrays and errors on their way between processes: what JSON can hold, and bytes beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import errors
from pytest_trtcheck.errors import CheckError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.model.apart import Blob


def packed(arrays: Mapping[str, NDArray[Any]]) -> tuple[list[list[Any]], list[memoryview]]:
    """Arrays as what JSON can hold and bytes: name, type and shape; of strings, the strings themselves."""
    described: list[list[Any]] = []
    blobs = []
    for name, array in arrays.items():
        if array.dtype.kind in "OUST":
            texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in array.flat]
            if not all(isinstance(text, str) for text in texts):
                raise ModelError(f"{name!r} is no tensor", "only tensors can be compared: leave it out of the outputs")
            described.append([name, "str", list(array.shape), list(map(str, texts))])
            continue
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        described.append([name, plain.dtype.name, list(array.shape), None])
        blobs.append(plain.reshape(-1).view(np.uint8).data)
    return described, blobs


def unpacked(described: Sequence[Sequence[Any]], blobs: Sequence[Blob]) -> dict[str, NDArray[Any]]:
    """Arrays that were packed."""
    arrays: dict[str, NDArray[Any]] = {}
    rest = iter(blobs)
    for name, dtype, shape, texts in described:
        if texts is not None:
            arrays[name] = np.array(texts, object).reshape(shape)
        else:
            arrays[name] = np.frombuffer(next(rest), _dtype(dtype)).reshape(shape)
    return arrays


def _dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found


def refusal(error: CheckError, hint: str | None = None) -> dict[str, Any]:
    """An error as an answer; `hint` takes the place of its own."""
    return {"error": [type(error).__name__, error.message, error.hint if hint is None else hint, error.code]}


def refused(answer: Any) -> CheckError | None:
    """The error that an answer is; None where it is none."""
    if not isinstance(answer, dict) or "error" not in answer:
        return None
    name, message, hint, code = answer["error"]
    found: CheckError = getattr(errors, name)(message, hint, code=code)
    return found
