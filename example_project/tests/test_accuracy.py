"""What quantization costs in the end: correct labels, on writers the model never saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from digits.data import Split


def top1(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The share of rows whose largest logit is the label's."""
    return float((logits.argmax(axis=1) == labels).mean())


def test_int8_loses_at_most_half_a_percent(
    trt_build: Callable[..., Any], trt_reference: Callable[..., Any], trt_model: str, held_out: Split
) -> None:
    inputs = {"image": held_out.images}
    engine = trt_build(trt_model, precision="int8", calibration="data/calibration/*.npz")
    before = top1(trt_reference(trt_model)(inputs)["logits"], held_out.labels)
    after = top1(engine(inputs)["logits"], held_out.labels)
    assert before > 0.97, "the FP32 model itself got worse"
    assert before - after <= 0.005, f"INT8 labels {after:.2%} correctly, FP32 {before:.2%}"
