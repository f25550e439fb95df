"""The one protocol that every system that can run a model fulfils."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.record import Evidence
    from pytest_trtcheck.spec import InputMapping


class Runner(Protocol):
    """A model that can be run. Inputs and outputs are numpy arrays by tensor name."""

    @property
    def evidence(self) -> Evidence:
        """`engine` when a GPU runs TensorRT, `emulated` otherwise."""

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once. Every output of the model comes back, in the model's order."""

    def close(self) -> None:
        """Free what the runner holds (device memory, sessions); calling it twice is harmless."""
