"""One test of each precision, batch, backend and GPU: what markers and options list becomes parameters of pytest's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_trtcheck.choices import BACKEND, BATCH, GPU, PRECISION
from pytest_trtcheck.plugin import marks, options
from pytest_trtcheck.plugin.items import marked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest


def by_all(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test by what its markers list; one without markers by what the options do."""
    found = marked(metafunc.definition)
    if found is None:
        if marks.uses(metafunc, marks.RUN):
            by_backend(metafunc)
        by_gpu(metafunc)
        return
    if not hasattr(metafunc.function, "__name__"):
        # A functools.partial has none, and pytest up to 9.0 asks what it parametrizes for it.
        metafunc.function.__name__ = metafunc.definition.name
    _by(metafunc, PRECISION, found.parity.precision, found.params.get(PRECISION))
    by_batch(metafunc, found.parity.batch, found.params.get(BATCH))
    if found.parity.engine is None:
        by_backend(metafunc, found.parity.backends, found.params.get(BACKEND))
        by_gpu(metafunc)


def _by(
    metafunc: pytest.Metafunc,
    name: str,
    values: Sequence[object],
    given: Sequence[Any] | None = None,
    ids: Sequence[str] | None = None,
) -> None:
    """Parametrize by values, where they are several, or were given with marks or names of their own."""
    if len(values) > 1 or given:
        metafunc.fixturenames.append(name)
        metafunc.parametrize(name, given or values, ids=ids)


def by_batch(
    metafunc: pytest.Metafunc,
    sizes: Sequence[int | None],
    given: Sequence[Any] | None = None,
) -> None:
    """Parametrize by batches, where they are several."""
    _by(metafunc, BATCH, sizes, given, [f"batch{size}" for size in sizes])


def by_system(metafunc: pytest.Metafunc) -> None:
    """Parametrize what has no test code: by the backends and by the GPUs of the options, where they are several."""
    by_backend(metafunc)
    by_gpu(metafunc)


def by_backend(
    metafunc: pytest.Metafunc,
    listed: tuple[str, ...] = (),
    given: Sequence[Any] | None = None,
) -> None:
    """Parametrize by the backends that a marker lists, else by those of `--trt-backend`, where they are several."""
    _by(metafunc, BACKEND, listed or options.value(metafunc.config, "trt_backend"), given)


def by_gpu(metafunc: pytest.Metafunc) -> None:
    """Parametrize by the GPUs of `--trt-gpu`, where they are several."""
    _by(metafunc, GPU, options.value(metafunc.config, "trt_gpu"))
