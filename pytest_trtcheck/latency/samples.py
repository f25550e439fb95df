"""What a system was measured to take, run by run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Samples:
    """What `n` runs took. Every array has shape (n,) and dtype float64; times are in milliseconds.

    Parameters
    ----------
    run_ms
        What budgets speak of: GPU time between CUDA events around the work, or the host's time where no events are.
    enqueue_ms
        Host time of putting that work on the stream. Where it exceeds `run_ms`, the GPU waits for the host and
        `run_ms` holds that waiting. None where work and waiting for it are one call.
    latency_ms
        The inputs' copy to the device, the work and the outputs' copy back; None without transfers.
    interval_ms
        From the end of the run before to the end of each: the run, and what lay between the two.
    """

    run_ms: NDArray[np.float64]
    enqueue_ms: NDArray[np.float64] | None
    latency_ms: NDArray[np.float64] | None
    interval_ms: NDArray[np.float64]
