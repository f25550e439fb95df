"""The model under test and the data it is tested with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from digits.data import Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def held_out() -> Split:
    """600 images, with labels, of writers that neither training nor calibration saw."""
    with np.load(ROOT / "data" / "held_out.npz") as data:
        return Split(data["images"], data["labels"])


@pytest.fixture
def golden(held_out: Split) -> dict[str, NDArray[np.float32]]:
    """The 64 held-out images that parity is judged on, by the name of the model's input."""
    return {"image": held_out.images[:64]}


@pytest.fixture
def trt_model() -> str:
    """The model of every test here that names none of its own; the path starts at pytest's rootdir."""
    return "models/digits.onnx"
