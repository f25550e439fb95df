"""Tests with a real PyTorch (`tox -e torch`); elsewhere each module is skipped, with the reason."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch warns of at import is not ours
    for needed in ("torch", "onnxscript"):
        pytest.importorskip(needed, reason=f"needs {needed}: tox -e torch")
