"""Tests with a real TensorFlow (`tox -e keras`); elsewhere each module is skipped, with the reason."""

from __future__ import annotations

import os
import warnings

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for needed in ("tensorflow", "keras", "tf2onnx"):
        pytest.importorskip(needed, reason=f"needs {needed}: tox -e keras")
