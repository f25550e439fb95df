"""TensorFlow, Keras and tf2onnx: that they are there, quiet, on the CPU, and what their errors say."""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import CheckError, MissingDependencyError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator


_DISTRIBUTIONS = ("tensorflow", "tensorflow-cpu", "tensorflow-cpu-aws", "tensorflow-macos", "tf-nightly")


def require() -> None:
    """Refuse to go on without TensorFlow, Keras and tf2onnx.

    Raises
    ------
    MissingDependencyError
        One of them is not installed.
    """
    import importlib.util

    missing = [name for name in ("tensorflow", "keras", "tf2onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, which Keras models and "
            "SavedModels are exported with",
            "pip install 'pytest-trtcheck[tensorflow]' (or tensorflow-cpu, keras and tf2onnx)",
        )


def versions() -> dict[str, str]:
    """What the export depends on beside the model, by name; nothing is imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    from pytest_trtcheck.cache import hash_code

    def found(*names: str) -> str:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return "unknown"

    return {
        "tensorflow": found(*_DISTRIBUTIONS),
        "keras": found("keras"),
        "tf2onnx": found("tf2onnx"),
        "onnx": found("onnx"),
        "code": hash_code(
            "model/layer_norm.py",
            "model/sources/tensorflow/*.py",
            "model/sources/keras_model.py",
            "model/sources/saved_model.py",
        ),
    }


def load_tensorflow() -> None:
    """Import TensorFlow; where that is done for us alone, it leaves the GPU to TensorRT.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    import sys

    require()
    ours = "tensorflow" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf
    if ours:
        tf.config.set_visible_devices([], "GPU")


@contextmanager
def on_cpu() -> Iterator[None]:
    """TensorFlow on the CPU: a GPU would compute in TF32, and TensorFlow take all of its memory."""
    import tensorflow as tf

    with tf.device("/CPU:0"), warnings.catch_warnings():
        # What TensorFlow deprecates is no error of the user's test.
        warnings.simplefilter("ignore")
        yield


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Anything that TensorFlow or tf2onnx raises is an error of the model."""
    try:
        yield
    except CheckError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {type(error).__name__}: {said(error)}", code="module-failed") from error


def said(error: Exception) -> str:
    """The line of an error of Keras or TensorFlow that tells most: their first one often says that there is another."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    telling = (line for line in lines if re.search(r"Could not locate|is not in \[|unsafe|Cannot |not supported", line))
    usual = (line for line in lines if not re.match(r"Graph execution error|Exception encountered|Detected at", line))
    found = next(telling, None) or next(usual, None) or type(error).__name__
    return re.sub(r"^Exception encountered: |\{\{[^}]*\}\} ", "", found).partition(" Full object config")[0]


@contextmanager
def quiet() -> Iterator[list[str]]:
    """tf2onnx's errors as a list, and nothing on the terminal of what it and TensorFlow say."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("tf2onnx"), Listening(logging.ERROR)
    with ExitStack() as stack:
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        stack.callback(setattr, logger, "propagate", logger.propagate)
        logger.propagate = False
        tensorflow = logging.getLogger("tensorflow")
        stack.callback(tensorflow.setLevel, tensorflow.level)
        tensorflow.setLevel(logging.ERROR)
        yield said
