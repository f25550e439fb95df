"""TensorFlow is imported once, and what it warns of at import is not ours."""

from __future__ import annotations

import os
import warnings

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for needed in ("tensorflow", "keras", "tf2onnx"):
        pytest.importorskip(needed, reason=f"needs {needed}: tox -e keras")
