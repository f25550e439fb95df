"""The data set: scikit-learn's 8×8 digits, split by writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRAIN_SIZE = 1197
"""The data set is ordered by writer; its last 600 images come from people the model never saw."""


@dataclass(frozen=True)
class Split:
    """Images, float32 in 0..1, (N, 1, 8, 8); labels, int64, (N,)."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __getitem__(self, index: slice) -> Split:
        """The samples of a slice."""
        return Split(self.images[index], self.labels[index])


def load() -> tuple[Split, Split]:
    """The training and the held-out split."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = (bunch.images[:, None] / 16.0).astype(np.float32)
    everything = Split(images, bunch.target.astype(np.int64))
    return everything[:TRAIN_SIZE], everything[TRAIN_SIZE:]
