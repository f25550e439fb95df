"""The latency part of a check: which engines to measure, for which budgets, against which baseline."""

from __future__ import annotations

import functools
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pytest_trtcheck.check import measuring as measure
from pytest_trtcheck.latency import baselines
from pytest_trtcheck.record import Conditions, LatencyDetails

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.check.request import Job
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.latency.baselines import Baseline, Baselines
    from pytest_trtcheck.record import LatencyRecord
    from pytest_trtcheck.spec import Precision


def conditions_of(gpu: Gpu, tensorrt: tuple[str, str], shapes: Mapping[str, Sequence[int]]) -> Conditions:
    """Under what a latency is measured.

    Parameters
    ----------
    tensorrt
        Module and version.
    shapes
        Of the inputs, by name.
    """
    # A driver may print less than the product: "Orin" is also what an Orin Nano calls itself.
    name = gpu.name if gpu.product.lower() in gpu.name.lower() else f"{gpu.name} {gpu.product}"
    return Conditions(
        gpu=name,
        compute_capability=".".join(map(str, gpu.compute_capability)),
        driver=gpu.driver,
        tensorrt=" ".join(tensorrt),
        input_shapes={name: tuple(shape) for name, shape in sorted(shapes.items())},
    )


@dataclass(frozen=True)
class Ledger:
    """The baselines of a session.

    Parameters
    ----------
    kept
        What latency is held against; None: nothing.
    updating
        Whether this run's latencies are to be recorded.
    """

    kept: Baselines | None = None
    updating: bool = False


@dataclass(frozen=True)
class Judge:
    """Measures engines and judges what was measured.

    Parameters
    ----------
    model
        The GPU whose budgets apply.
    extra_gpus
        The GPUs of the ini key `trt_gpus`.
    load_other
        Makes the job's engine in another precision, for `min_speedup`.
    """

    model: GpuModel
    extra_gpus: Sequence[GpuModel]
    ledger: Ledger
    load_other: Callable[[Job, Precision], Engine]

    def judge(self, job: Job, engine: Engine) -> LatencyRecord:
        """Measure the job's engine.

        Raises
        ------
        GpuError
            An engine failed, or the GPU was not to be had in time.
        """
        spec = job.request.latency
        assert spec is not None
        assert job.place is not None
        assert job.place.gpu is not None
        budgets = measure.budgets_for(spec, self.model, self.extra_gpus)
        if not budgets.limits and not spec.min_speedup and self.ledger.kept is None:
            what = f"no budget for {self.model.product}"
            if not spec.budgets():
                what = "trt_latency names no budget, and there is no baseline to compare with (--trt-baseline=DIR)"
            return measure.not_measured(what, self.model.product)
        shapes = {name: array.shape for name, array in job.cases[0].items()}
        alike = [case for case in job.cases if {name: array.shape for name, array in case.items()} == shapes]
        module = job.place.module
        conditions = conditions_of(job.place.gpu, (module.name, module.version), shapes)
        baseline = self._baseline(job, conditions)
        with ExitStack() as opened:
            slower = {
                name: opened.enter_context(closing(self.load_other(job, cast("Precision", name))))
                for name in spec.min_speedup or {}
            }
            subject = measure.Subject(engine, alike, slower, conditions, self._is_enough(job, conditions, baseline))
            record = measure.measure(subject, spec, budgets, job.place.gpu, self.model)
        if self.ledger.kept is None:
            return record
        return baselines.judge(record, baseline, model_sha256=job.model.sha256, updating=self.ledger.updating)

    def _baseline(self, job: Job, conditions: Conditions) -> Baseline | None:
        if self.ledger.kept is None:
            return None
        key = baselines.GpuKey.of(conditions)
        return self.ledger.kept.find(key, job.request.nodeid, job.precision)

    def _is_enough(
        self, job: Job, conditions: Conditions, baseline: Baseline | None
    ) -> Callable[[NDArray[np.float64], float], bool] | None:
        """When to stop sampling for the baseline's sake; None where there is none to record or to compare with."""
        if self.ledger.updating:
            return functools.partial(baselines.enough, baseline=None)
        if baseline is None or baselines.differences(baseline, LatencyDetails(conditions=conditions), job.model.sha256):
            return None
        return functools.partial(baselines.enough, baseline=baseline)
