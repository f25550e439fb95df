"""Several requests to a server at once: do they give what each gives alone, and how many can it answer?"""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.backends.base import AtOnce
from pytest_trtcheck.errors import ServerError, plural
from pytest_trtcheck.latency.load import Window

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.triton.client import Counts, ServedModel
    from pytest_trtcheck.backends.triton.served import Served
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.spec import InputMapping

REQUESTS = 16
"""The requests that are sent at once, to see whether a batch changes what comes out."""
ROUNDS = 5
"""How often they are sent, if the server does not put them together before."""
_KEPT_BYTES = 256 << 20
"""Of outputs; where they are larger, fewer requests are sent, and less often."""
_QUEUE_IS_FULL = "maximum queue size"
"""What the server says of a request that `max_queue_size` keeps out."""
_SETTLE_S = 0.1
"""Between the start of more requests and the window in which they are measured."""


def compared(runner: Served, cases: Sequence[Case]) -> AtOnce:
    """The outputs of single rows, sent at once and each alone, and the batches that the server made of them.

    Raises
    ------
    ServerError
        A request failed.
    """
    served = runner.served
    requests = _requests(served, cases)
    size = sum(array.nbytes for array in runner(requests[0]).values())
    requests = requests[: max(2, _KEPT_BYTES // max(size, 1))]
    alone = [runner(request) for request in requests]
    may_batch = served.batches_dynamically and served.max_batch_size > 1
    rounds = min(ROUNDS, max(1, _KEPT_BYTES // max(size * len(requests), 1))) if may_batch else 1
    together: list[dict[str, NDArray[Any]] | None] = []
    before = runner.counts()
    seen: Counts | None = None
    for _ in range(rounds if before else 1):
        together += all_at_once(runner, requests)
        now = runner.counts()
        seen = now.since(before) if now and before else None
        if seen is None or max(seen.batches, default=0) > 1:
            break
    repeated = alone * (len(together) // len(requests))
    answered = [(one, other) for one, other in zip(repeated, together, strict=True) if other is not None]
    note = _said(served, len(requests), seen)
    if _are_alike(requests) or _are_alike(alone):
        note += "; all of them have the same answer, so whether each got its own was not seen"
    if refused := len(together) - len(answered):
        note += f"; {refused} of {len(together)} were refused, since the server's queue was full"
    batches = seen.batches if seen and not served.is_ensemble else None
    return AtOnce([one for one, _ in answered], [other for _, other in answered], batches, note)


def all_at_once(runner: Served, requests: Sequence[Case]) -> list[dict[str, NDArray[Any]] | None]:
    """The outputs of requests that are sent together, in their order; None for one that a full queue refused.

    Raises
    ------
    ServerError
        One of them failed.
    """
    outputs: list[dict[str, NDArray[Any]] | None] = [None for _ in requests]
    errors: list[BaseException] = []
    start = threading.Barrier(len(requests))

    def send(index: int) -> None:
        try:
            own = runner.another()
        except BaseException as error:
            errors.append(error)
            start.abort()  # Nobody waits for this one.
            return
        try:
            with closing(own):
                start.wait()
                outputs[index] = own(requests[index])
        except threading.BrokenBarrierError:
            pass  # Another one failed, which is what is said.
        except ServerError as error:
            if _QUEUE_IS_FULL not in error.message:
                message = f"{error.message} ({len(requests)} requests were sent at once)"
                errors.append(ServerError(message, error.hint, code=error.code))
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    runner.sent += sum(runner.rows(request) for request, found in zip(requests, outputs, strict=True) if found)
    return outputs


def _requests(served: ServedModel, cases: Sequence[Case]) -> list[Case]:
    """As many requests as are sent at once: the rows of the cases.

    Where those are too few, there are rows with their elements moved along: no two requests should be alike.
    """
    rows = [row for case in cases[:REQUESTS] for row in _split(served, case)][:REQUESTS]
    found = list(rows)
    for step in range(1, REQUESTS):
        found += [{name: _moved(array, step) for name, array in row.items()} for row in rows]
        if len(found) >= REQUESTS:
            break
    return found[:REQUESTS]


def _split(served: ServedModel, case: Case) -> Iterator[Case]:
    sizes = {array.shape[:1] for array in case.values()}
    if not served.max_batch_size or len(sizes) != 1 or not next(iter(sizes)):
        yield case
        return
    for row in range(min(next(iter(sizes))[0], REQUESTS)):
        yield {name: array[row : row + 1] for name, array in case.items()}


def _moved(array: NDArray[Any], step: int) -> NDArray[Any]:
    """The same values in other places; integers may be lengths or indices, and stay."""
    return np.roll(array, step) if array.dtype.kind in "fV" else array


def _are_alike(cases: Sequence[Case]) -> bool:
    contents = ({name: array.tobytes() for name, array in case.items()} for case in cases)
    first = next(contents)
    return all(each == first for each in contents)


def _said(served: ServedModel, requests: int, seen: Counts | None) -> str:
    """What to say of how the server put requests together."""
    if seen is None:
        return f"{requests} requests at once: the server gives no statistics, so whether it batched them is not known"
    if served.is_ensemble:
        return f"{requests} requests at once; in which batches the models of an ensemble ran, the server does not tell"
    batches = ", ".join(f"{count} of {size}" for size, count in seen.batches.items())
    counted = f"{requests} requests at once: by the server's statistics {plural(seen.executions, 'execution')}"
    counted += f" (batches: {batches})" if batches else ""
    if max(seen.batches, default=0) > 1:
        return counted
    if served.max_batch_size < 2:
        return f"{counted}; the served model takes no batches (max_batch_size {served.max_batch_size})"
    if not served.batches_dynamically:
        return f"{counted}; its configuration has no dynamic_batching, so requests are not put together"
    return f"{counted}; dynamic batching is configured, and was not seen"


# --- under load ------------------------------------------------------------------------------------------------------


class Load:
    """Requests that are kept under way, each by a thread with a connection of its own.

    Parameters
    ----------
    cases
        Inputs of equal shapes, used in turn.
    """

    def __init__(self, runner: Served, cases: Sequence[InputMapping]) -> None:
        self._runner = runner
        self._cases = cases
        self._threads: list[threading.Thread] = []
        self._times: list[list[NDArray[np.float64]]] = []
        self._wanted = 0
        self._failed = threading.Event()
        self._errors: list[BaseException] = []

    def run(self, concurrency: int, seconds: float) -> Window:
        """Keep so many requests under way for so long, or until one was answered.

        Raises
        ------
        ServerError
            One failed, or was not answered in time.
        """
        self._keep(concurrency)
        taken = [len(times) for times in self._times]
        began, used = time.perf_counter(), time.process_time()
        while not (is_over := self._failed.wait(seconds)) and taken == [len(times) for times in self._times]:
            seconds = 0.05
        fresh = [times for kept, before in zip(self._times, taken, strict=True) for times in kept[before:]]
        # Behind the last answer that is taken, so that each was answered before the end.
        ended, used = time.perf_counter(), time.process_time() - used
        if is_over:
            error = self._errors[0]
            self._stop()
            raise error
        times = np.array(fresh)
        times = times[np.argsort(times[:, 1])]
        return Window(
            latency_ms=1000 * (times[:, 1] - times[:, 0]),
            # A thread that had its answer as the window began may hand it over in it.
            interval_ms=1000 * np.diff(np.maximum(times[:, 1], began), prepend=began),
            seconds=ended - began,
            client_cores=used / (ended - began),
        )

    def _keep(self, concurrency: int) -> None:
        before = self._wanted
        self._wanted = concurrency
        while len(self._threads) < concurrency:
            self._times.append([])
            self._threads.append(threading.Thread(target=self._send, args=(len(self._threads),)))
            self._threads[-1].start()
        if before != concurrency:
            self._failed.wait(_SETTLE_S)

    def _send(self, index: int) -> None:
        try:
            with closing(self._runner.another()) as own:
                prepared = [own.connection.prepared(own.served, case) for case in self._cases]
                turn = index
                while self._wanted:
                    if index >= self._wanted:  # Fewer are wanted now.
                        time.sleep(0.01)
                        continue
                    times = own.connection.timed(own.served, [prepared[turn % len(prepared)]])
                    self._times[index].append(times[0])
                    turn += 1
        except BaseException as error:
            self._errors.append(error)
            self._failed.set()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        """Wait for what is under way; another `run` starts anew."""
        self._wanted = 0
        for thread in self._threads:
            thread.join()
        self._runner.sent += sum(map(len, self._times)) * self._runner.rows(self._cases[0])
        self._threads, self._times, self._errors = [], [], []
        self._failed.clear()
