"""A model's outputs, computed on ONNX Runtime once for each inputs and kept in the cache."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.model.arrays import arrays_of, load_arrays, save_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.cache import HashedFile


class Computing(Protocol):
    """What computes a model's outputs."""

    def __call__(self, case: dict[str, NDArray[Any]], /) -> dict[str, NDArray[Any]]:
        """The outputs by name."""

    def close(self) -> None:
        """Free what it holds."""


class KeptOutputs:
    """Outputs by inputs; the session is opened for the first inputs whose outputs are not kept.

    Of large models whose outputs are kept, one session is open at a time: it closes the one before, which is hardly
    needed again.

    Parameters
    ----------
    kind, label
        Of the cache's entries.
    parts
        What the outputs depend on, beside the inputs and ONNX Runtime.
    open_runner
        Opens the session.
    is_large
        Whether a second session would take too much memory beside it.
    files
        What it is read from, whose hash is among `parts`.
    """

    keeps = True
    """Whether outputs are kept at all: not where the same inputs hardly come again."""
    is_shared: ClassVar[bool] = True
    """Whether they are the same on every machine."""

    def __init__(
        self,
        cache: Cache,
        kind: str,
        label: str,
        parts: Mapping[str, str],
        open_runner: Callable[[], Computing],
        *,
        is_large: bool = False,
        files: Sequence[HashedFile] = (),
    ) -> None:
        self._cache, self._files = cache, files
        self._entry = kind, label
        self._parts = parts
        self._open_runner = open_runner
        self._runner: Computing | None = None
        self._is_large = is_large

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name, memory-mapped from the cache."""
        if not self.keeps:
            return self.computed(inputs)
        case = arrays_of(inputs)
        parts = {**self._parts, "inputs": model_inputs.digest(case), "onnxruntime": ort.version()}

        def make(folder: Path) -> None:
            save_arrays(folder, self.computed(case))
            model_inputs.require_digest([case], model_inputs.digest(case), parts["inputs"])

        with self._cache.resting_on(*self._files):
            entry = self._cache.get_or_make(Key(*self._entry, parts), make, shared=self.is_shared)
        with entry.understood():
            return load_arrays(entry.path)

    def computed(self, case: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name, computed now whatever is cached."""
        runner = self._runner
        if runner is None:
            if self._is_large and self.keeps:
                for other in [each for each in _OPEN if each is not self]:
                    other.close()
                _OPEN.add(self)
            runner = self._runner = self._open_runner()
        return runner(arrays_of(case))

    def keep(self, cases: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Of a large model, compute all that is to be kept before another one's session is open."""
        if self._is_large and self.keeps:
            for case in cases:
                self(case)
            self.close()

    def close(self) -> None:
        """Free the session; the next inputs open it again."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        _OPEN.discard(self)


_OPEN: weakref.WeakSet[KeptOutputs] = weakref.WeakSet()
"""Those of large models whose session is open."""
