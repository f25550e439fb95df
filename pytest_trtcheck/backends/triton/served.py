"""A served model that can be asked, and whether it is the user's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.backends.triton.client import Connection
from pytest_trtcheck.errors import ServerError, plural
from pytest_trtcheck.latency.samples import Samples
from pytest_trtcheck.record import ServerRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.triton.address import Address
    from pytest_trtcheck.backends.triton.client import Counts, ServedModel, Tensor
    from pytest_trtcheck.model.onnx_model import OnnxModel, TensorSpec
    from pytest_trtcheck.spec import InputMapping

_KINDS = (frozenset({"float64", "float32", "float16", "bfloat16"}), frozenset({"int64", "int32"}))
"""Types that are converted into each other on the way."""
_COUNTED_S = 1.0


class Served:
    """A served model that can be asked; it belongs to the thread that made it.

    Parameters
    ----------
    model
        The user's, whose types and ranks the outputs get.
    at_first
        What the server had counted of it before; None where nobody asks what it counts, or it does not count.
    """

    def __init__(
        self, connection: Connection, served: ServedModel, model: OnnxModel, at_first: Counts | None = None
    ) -> None:
        self.connection = connection
        self.served = served
        self.model = model
        self.sent = 0
        """The rows that were answered, so that the server's count of them tells what others sent."""
        self._at_first = at_first
        self._before: tuple[Counts | None, int] = None, 0

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Send one request and wait for its answer."""
        prepared = self.connection.prepared(self.served, inputs)
        answer = self.connection.infer(self.served, prepared)
        self.sent += self.rows(inputs)
        specs = {spec.name: spec for spec in self.model.outputs}
        found = self.connection.outputs(self.served, answer, list(specs))
        return {name: self._as_the_models(array, specs[name]) for name, array in found.items()}

    def _as_the_models(self, array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
        if array.ndim == len(spec.shape) + 1 and array.shape[-1] == 1:
            array = array[..., 0]  # Triton has no scalars.
        if not array.dtype.hasobject:  # Strings are not compared.
            with np.errstate(over="ignore", invalid="ignore"):
                found = array.astype(np.dtype(spec.dtype), copy=False)
            # Floats are rounded; a number that wraps around, or is cut off, is another one.
            if found.dtype.kind not in "iub" or np.array_equal(found, array):
                return found
        kind = "strings" if array.dtype.hasobject else f"{array.dtype} values that it cannot hold"
        raise ServerError(
            f"Triton at {self.connection.address}: model {self.served.name!r}: output {spec.name!r} is {spec.dtype} in "
            f"the model, and the server answered with {kind}",
            "name another model in the URL or in the ini key trt_triton_models, or see what this one computes",
            code="server-model",
        )

    def rows(self, inputs: InputMapping) -> int:
        """What the server counts for one such request: its rows."""
        batched = self.served.max_batch_size > 0
        return next((len(array) for array in map(np.asarray, inputs.values()) if array.ndim), 1) if batched else 1

    def another(self) -> Served:
        """The same for another thread."""
        return Served(Connection(self.connection.address), self.served, self.model)

    def described(self) -> ServerRecord:
        """The model as the record has it."""
        served = self.served
        return ServerRecord(
            str(self.connection.address),
            served.server,
            served.name,
            served.version,
            served.platform,
            served.max_batch_size,
        )

    def counts(self) -> Counts | None:
        """What the server has counted of it, all that was answered included: that is counted a moment later."""
        if self._at_first is None:
            return None
        found, until = self._counted(), time.monotonic() + _COUNTED_S
        while found and time.monotonic() < until:
            if found.least >= self._at_first.least + self.sent:
                break
            time.sleep(0.01)
            found = self._counted()
        return found

    def _counted(self) -> Counts | None:
        return self.connection.counts(self.served.name, self.served.version)

    def disturbed(self) -> tuple[str, ...]:
        """What others sent to the model since this was asked last."""
        counts, sent = self._before
        now = self.counts()
        self._before = now, self.sent
        if counts is None or now is None:
            return ()
        foreign = now.since(counts).inferences - (self.sent - sent)
        return (f"others used the model meanwhile: {plural(foreign, 'inference')} of theirs",) if foreign > 0 else ()

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


class ServedRuns:
    """A served model made ready for measuring: what is sent is prepared once."""

    measured = "from request to answer"
    graph = None
    graph_reason = None

    def __init__(self, runner: Served, cases: Sequence[InputMapping]) -> None:
        self._runner = runner
        self._prepared = [runner.connection.prepared(runner.served, case) for case in cases]
        self._rows = runner.rows(cases[0])
        self._next = 0

    def run(self, n: int) -> Samples:
        """Measure `n` requests."""
        turns = [self._prepared[(self._next + index) % len(self._prepared)] for index in range(n)]
        self._next += n
        times = 1000 * self._runner.connection.timed(self._runner.served, turns)
        self._runner.sent += n * self._rows
        ends = times[:, 1]
        return Samples(ends - times[:, 0], None, None, np.diff(ends, prepend=times[0, 0]))

    def launch(self) -> None:
        """One request, with its answer."""
        self.run(1)

    def mark(self) -> float:
        """Now, in milliseconds."""
        return 1000 * time.perf_counter()

    def close(self) -> None:
        """Nothing: the connection is the runner's."""

    def __enter__(self) -> ServedRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# --- does it fit the model? -------------------------------------------------------------------------------------------


def refuse_other_model(address: Address, served: ServedModel, model: OnnxModel) -> None:
    """Refuse a served model whose inputs and outputs are not the model's.

    Raises
    ------
    ServerError
        All that does not fit.
    """
    problems = [
        *_misfits("input", served.inputs, model.inputs, is_exact=True),
        *_misfits("output", served.outputs, model.outputs, is_exact=False),
    ]
    if problems:
        raise ServerError(
            f"Triton at {address}: model {served.name!r}, version {served.version}, is not {model.label}:\n  "
            + "\n  ".join(problems),
            f"it serves {'; '.join(map(str, served.inputs))} → {'; '.join(map(str, served.outputs))}; name another "
            "model in the URL or in the ini key trt_triton_models, or correct the server's config.pbtxt",
            code="server-model",
        )


def _misfits(side: str, tensors: Sequence[Tensor], specs: Sequence[TensorSpec], *, is_exact: bool) -> Iterator[str]:
    """What stands against it. It may have outputs, and inputs that can be left out, that the model lacks."""
    by_name: Mapping[str, Tensor] = {tensor.name: tensor for tensor in tensors}
    declared = {spec.name for spec in specs}
    if missing := [spec.name for spec in specs if spec.name not in by_name]:
        yield f"{side}s that the server lacks: {', '.join(missing)}"
    if is_exact and (added := [each.name for each in tensors if each.name not in declared and not each.optional]):
        yield f"{side}s that the model lacks: {', '.join(added)}"
    for spec in specs:
        tensor = by_name.get(spec.name)
        if tensor is None:
            continue
        if spec.dtype != tensor.dtype and not any({spec.dtype, tensor.dtype} <= kind for kind in _KINDS):
            yield f"{side} {spec.name!r} is {tensor.dtype} on the server and {spec.dtype} in the model"
        shape = tensor.shape
        if len(shape) == len(spec.shape) + 1 and shape[-1] == 1:
            shape = shape[:-1]  # Triton has no scalars.
        fits = len(shape) == len(spec.shape) and all(
            size == -1 or not isinstance(dim, int) or size == dim for size, dim in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            dims = ", ".join("?" if dim is None else str(dim) for dim in spec.shape)
            yield f"{side} {spec.name!r} is {tensor} on the server, and [{dims}] in the model"
