"""PyTorch is imported once, and its own warnings at import are not ours."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for needed in ("torch", "onnxscript"):
        pytest.importorskip(needed, reason=f"needs {needed}: tox -e torch")
