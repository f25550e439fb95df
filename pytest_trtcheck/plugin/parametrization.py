"""One test of each precision, batch, backend and GPU: what markers and options list becomes parameters of pytest's."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    if len(found.parity.precision) > 1:
        metafunc.fixturenames.append(PRECISION)
        metafunc.parametrize(PRECISION, found.parity.precision)
    by_batch(metafunc, found.parity.batch)
    if found.parity.engine is None:
        by_backend(metafunc, found.parity.backends)
        by_gpu(metafunc)


def by_batch(metafunc: pytest.Metafunc, sizes: Sequence[int | None]) -> None:
    """Parametrize by batches, where they are several."""
    if len(sizes) > 1:
        metafunc.fixturenames.append(BATCH)
        metafunc.parametrize(BATCH, sizes, ids=[f"batch{size}" for size in sizes])


def by_system(metafunc: pytest.Metafunc) -> None:
    """Parametrize what has no test code: by the backends and by the GPUs of the options, where they are several."""
    by_backend(metafunc)
    by_gpu(metafunc)


def by_backend(metafunc: pytest.Metafunc, listed: tuple[str, ...] = ()) -> None:
    """Parametrize by the backends that a marker lists, else by those of `--trt-backend`, where they are several."""
    names = listed or options.value(metafunc.config, "trt_backend")
    if len(names) > 1:
        metafunc.fixturenames.append(BACKEND)
        metafunc.parametrize(BACKEND, names)


def by_gpu(metafunc: pytest.Metafunc) -> None:
    """Parametrize by the GPUs of `--trt-gpu`, where they are several."""
    names = options.value(metafunc.config, "trt_gpu")
    if len(names) > 1:
        metafunc.fixturenames.append(GPU)
        metafunc.parametrize(GPU, names)
