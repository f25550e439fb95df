"""What the Triton backend does without a server: addresses, and how throughput under load is judged."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck import latency
from pytest_trtcheck.backends.triton import client
from pytest_trtcheck.backends.triton.address import Address
from pytest_trtcheck.backends.triton.at_once import Load, all_at_once
from pytest_trtcheck.backends.triton.client import Counts
from pytest_trtcheck.check.latency import _qps_under_load, _undecided_before_the_most
from pytest_trtcheck.errors import ArgumentError, ServerError
from pytest_trtcheck.latency import load
from pytest_trtcheck.latency.load import Window

if TYPE_CHECKING:
    from tests.conftest import Suite

# --- which server, which model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "server", "names", "version"),
    [
        ("http://host", "host:8000", ("net", "net_int8_fp16"), None),
        ("grpc://host", "host:8001", ("net", "net_int8_fp16"), None),
        ("https://host", "host:443", ("net", "net_int8_fp16"), None),
        ("http://[::1]:9000/detector", "[::1]:9000", ("detector",), None),
        ("grpcs://host:9/detector/3", "host:9", ("detector",), "3"),
        ("http://host/{model}-{precision}/2", "host:8000", ("net-int8_fp16",), "2"),
        ("http://host/v2/models/detector/versions/4", "host:8000", ("detector",), "4"),
    ],
)
def test_an_address_names_server_model_and_version(
    text: str, server: str, names: tuple[str, ...], version: str | None
) -> None:
    found = Address.parse(text)
    assert found.server == server
    assert found.names_of("models/net.onnx", "int8+fp16") == names
    assert found.version == version
    assert found.timeout_s == 60.0


def test_an_address_may_bring_a_time_limit() -> None:
    assert Address.parse("http://host:8000/net?timeout=2.5").timeout_s == 2.5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("host:8000", "it starts with http://"),
        ("ftp://host", "it starts with http://"),
        ("http://", "names a host"),
        ("http://host:many", "Port could not be cast"),
        ("http://me:secret@host", "'http://***@host' is no address of a Triton server: it holds no user, no password"),
        ("http://me:sec/ret@host", "'http://***@host' is no address of a Triton server: it holds no user, no password"),
        ("http://host?token=secret", "'http://host?***' is no address of a Triton server"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://host/a/b/c", "its path is a model"),
        ("http://host/a/latest", "the number of a version"),
        ("http://host/{name}", "{name} stands for nothing; {model} and {precision} do"),
        ("http://host?retries=2", "timeout=SECONDS, not retries"),
        ("http://host?timeout=soon", "timeout=soon is no number of seconds"),
        ("http://host?timeout=0", "timeout=0 is no number of seconds"),
    ],
)
def test_what_is_no_address_is_refused(text: str, why: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Address.parse(text)
    assert why in caught.value.message
    assert "http://localhost:8000" in caught.value.hint
    assert "secret" not in str(caught.value)


def test_without_a_server_no_test_starts(suite: Suite) -> None:
    pytest.importorskip("tritonclient", reason="tritonclient is not installed")
    suite.write(test_it='@trt_parity("conv.onnx", precision="fp16", batch=1)\ndef test_it(): ...\n')
    run = suite.run("--trt-backend=triton")
    assert run.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "no server is named" in run.text
    assert "--trt-triton-url=http://localhost:8000" in run.text
    bad = suite.run("--trt-triton-url=localhost:8000")
    assert bad.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "is no address of a Triton server" in bad.text


def test_without_the_client_library_the_extra_is_named(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tritonclient"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonclient.http", None)
    suite.write(test_it='@trt_parity("conv.onnx", precision="fp16", batch=1)\ndef test_it(): ...\n')
    run = suite.run("--trt-backend=triton", "--trt-triton-url=http://127.0.0.1:1")
    assert 'pip install "pytest-trtcheck[triton]"' in run.text
    assert run.result.ret != 0


def test_what_was_counted_in_between() -> None:
    before = Counts(10, 4, {1: 2, 4: 2})
    after = Counts(20, 6, {1: 2, 4: 3, 6: 1})
    assert after.since(before) == Counts(10, 2, {4: 1, 6: 1})
    assert (before.least, after.least, Counts(3, 3, {}).least) == (10, 20, 3)
    assert Counts(10, 1, {4: 1}).least == 4, "the batch is counted, not all of its requests"


@dataclass
class Answering:
    """NVIDIA's client of a server, or of what stands before one, and its answer."""

    answer: Any
    InferenceServerException = ServerError

    def __call__(self, *_where: object, **_how: object) -> Answering:
        return self

    InferenceServerClient = __call__
    infer = __call__

    def get_response(self) -> Any:
        return self.answer


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    ("name", "version", "other"),
    [
        ("net", "2", None),
        ("", "", None),
        ("net", "3", "model 'net', version 3 answered"),
        ("old", "2", "model 'old', version 2 answered"),
    ],
)
def test_what_another_model_answers_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, protocol: str, name: str, version: str, other: str | None
) -> None:
    told = {"model_name": name, "model_version": version}
    answering = Answering(told if protocol == "http" else SimpleNamespace(**told))
    monkeypatch.setattr(client, "library", lambda _protocol: answering)
    monkeypatch.setitem(sys.modules, "gevent", SimpleNamespace(Timeout=lambda *_: nullcontext()))
    connection = client.Connection(Address.parse(f"{protocol}://host"))
    model = client.ServedModel("net", "2", "triton", "onnxruntime", 0, False, (), ())
    for ask in (lambda: connection.infer(model, []), lambda: connection.timed(model, [[], []])):
        if other is None:
            ask()
            continue
        with pytest.raises(ServerError) as caught:
            ask()
        assert f"model 'net', version 2 was asked, and {other}" in caught.value.message


@dataclass
class Refusing:
    """What opens no more than three connections, as where no further file may be open."""

    opened: int = 0

    def another(self) -> Refusing:
        self.opened += 1
        if self.opened > 3:
            raise ServerError("cannot be reached: Too many open files")
        return self

    def close(self) -> None: ...


def test_requests_do_not_wait_for_one_that_is_not_sent() -> None:
    refusing: Any = Refusing()
    asked: list[ServerError] = []

    def ask() -> None:
        try:
            all_at_once(refusing, [{}] * 6)
        except ServerError as error:
            asked.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)
    assert [error.message for error in asked] == ["cannot be reached: Too many open files"]


# --- throughput under load --------------------------------------------------------------------------------------------


@dataclass
class Simulated:
    """A server that answers `rate` requests a second by so many at once, in no time of ours.

    Each of `spoiled` windows, counted over all levels, is half as fast.
    """

    rates: dict[int, float]
    spoiled: frozenset[int] = frozenset()
    client_cores: float = 0.1
    asked: list[int] = field(default_factory=list)

    def run(self, concurrency: int, seconds: float) -> Window:
        rate = self.rates.get(concurrency, max(self.rates.values()))
        if len(self.asked) in self.spoiled:
            rate /= 2
        self.asked.append(concurrency)
        count = max(1, round(rate * seconds))
        return Window(
            latency_ms=np.full(count, 1000 * concurrency / rate),
            interval_ms=np.full(count, 1000 / rate),
            seconds=count / rate,
            client_cores=self.client_cores,
        )


def test_levels_grow_until_throughput_does_not() -> None:
    runs = Simulated({1: 100.0, 2: 190.0, 4: 350.0, 8: 355.0, 16: 340.0, 32: 900.0})
    levels, ended = load.sweep(runs, 60)
    assert [level.concurrency for level in levels] == [1, 2, 4, 8, 16]
    assert ended == load.PLATEAU
    assert all(level.stable and level.windows == 3 for level in levels)
    assert load.best(levels).concurrency == 8
    assert levels[2].qps == pytest.approx(350, rel=0.01)
    assert levels[2].p50_ms == levels[2].p99_ms == pytest.approx(1000 * 4 / 350)


def test_a_level_without_gain_may_come_before_one_with_gain() -> None:
    levels, _ = load.sweep(Simulated({1: 100.0, 2: 101.0, 4: 300.0, 8: 300.0, 16: 300.0}), 60)
    assert [level.concurrency for level in levels] == [1, 2, 4, 8, 16]


def test_a_window_that_differs_is_measured_past() -> None:
    runs = Simulated({1: 100.0}, spoiled=frozenset({1}))
    levels, _ = load.sweep(runs, 60)
    assert levels[0].stable
    assert levels[0].windows == 5, "three in a row behind the spoiled one"
    assert levels[0].qps == pytest.approx(100, rel=0.01)


def test_what_does_not_come_to_rest_is_said_to() -> None:
    restless = frozenset(range(6, 16, 2))
    levels, _ = load.sweep(Simulated({1: 100.0, 2: 200.0, 4: 1000.0, 8: 210.0}, spoiled=restless), 60)
    assert [level.stable for level in levels][:3] == [True, True, False]
    assert levels[2].windows == load.MOST_WINDOWS


def test_the_time_allowed_ends_it() -> None:
    @dataclass
    class Slow(Simulated):
        def run(self, concurrency: int, seconds: float) -> Window:
            time.sleep(0.05)
            return super().run(concurrency, seconds)

    levels, ended = load.sweep(Slow({1: 1.0}), 0.1)
    assert len(levels) == 1
    assert not levels[0].stable
    assert "0.1 s allowed were over" in ended


def test_a_server_that_refuses_more_at_once_ends_it() -> None:
    @dataclass
    class Full(Simulated):
        def run(self, concurrency: int, seconds: float) -> Window:
            if concurrency >= self.most:
                raise ServerError("Exceeds maximum queue size")
            return super().run(concurrency, seconds)

        most: int = 4

    levels, ended = load.sweep(Full({1: 100.0, 2: 200.0}), 60)
    assert [level.concurrency for level in levels] == [1, 2]
    assert ended == "with 4 at once a request failed: Exceeds maximum queue size"
    with pytest.raises(ServerError):
        load.sweep(Full({1: 100.0}, most=1), 60)


def test_no_time_at_all_is_one_window() -> None:
    levels, ended = load.sweep(Simulated({1: 100.0}), 1e-9)
    assert [(each.concurrency, each.windows) for each in levels] == [(1, 1)]
    assert ended == "the 1e-09 s allowed were over"


@pytest.mark.parametrize(("limit", "expected"), [(50.0, "pass"), (200.0, "fail")])
def test_throughput_is_judged_where_it_is_highest(limit: float, expected: str) -> None:
    runs = Simulated({1: 10.0, 4: 100.0})
    levels = (load.level(1, [runs.run(1, 1)]), load.level(4, [runs.run(4, 1)]))
    result = _qps_under_load(runs, load.best(levels), limit, latency.LookPlan(()), 60)
    assert result.decision == expected
    assert result.value == pytest.approx(100)
    assert set(runs.asked[2:]) == {4}


def test_too_little_throughput_fails_only_where_more_at_once_brings_no_more() -> None:
    runs = Simulated({1: 100.0})
    result = _qps_under_load(runs, load.level(1, [runs.run(1, 1)]), 200.0, latency.LookPlan(()), 60)
    assert _undecided_before_the_most(result, load.PLATEAU).decision == "fail"
    undecided = _undecided_before_the_most(result, "the 3 s allowed were over")
    assert undecided.decision == "undecided"
    assert "min_qps is 100 so far" in (undecided.reason or "")
    enough = _qps_under_load(runs, load.level(1, [runs.run(1, 1)]), 50.0, latency.LookPlan(()), 60)
    assert _undecided_before_the_most(enough, "the 3 s allowed were over").decision == "pass"


def test_a_client_that_is_slow_itself_fails_no_server() -> None:
    runs = Simulated({1: 100.0}, client_cores=0.95)
    level = load.level(1, [runs.run(1, 1)])
    result = _qps_under_load(runs, level, 200.0, latency.LookPlan(()), 60)
    assert result.decision == "undecided"
    assert "the client itself takes 0.95 of a core" in (result.reason or "")
    assert _qps_under_load(runs, level, 50.0, latency.LookPlan(()), 60).decision == "pass"


class Bunched:
    """A server that answers a batch of 8 every 200 ms, looked at in windows that end in between."""

    def __init__(self) -> None:
        self._until = 0.07

    def run(self, concurrency: int, seconds: float) -> Window:
        ends = np.arange(round(self._until / 0.2 + 0.5), round((self._until + seconds) / 0.2 + 0.5)) * 0.2
        answers = 1000 * (np.repeat(ends, concurrency) - self._until)
        self._until += seconds
        return Window(np.full(answers.size, 200.0), np.diff(answers, prepend=0.0), seconds, 0.1)


def test_what_a_window_waits_behind_its_last_answer_counts() -> None:
    level = load.level(8, [Bunched().run(8, 1.0)])
    result = _qps_under_load(Bunched(), level, 4.0, latency.LookPlan((), 1, min_total_ms=20_000), 60)
    assert result.value == pytest.approx(40, rel=0.05)


@dataclass
class Held:
    """Answers that another thread has had before it can hand them over."""

    before_s: float = 0.02
    sent: int = 0

    def another(self) -> Held:
        return self

    def close(self) -> None: ...

    def rows(self, _case: object) -> int:
        return 1

    @property
    def connection(self) -> Held:
        return self

    served = None

    def prepared(self, _served: object, case: object) -> object:
        return case

    def timed(self, _served: object, requests: list[object]) -> np.ndarray:
        began = time.perf_counter()
        time.sleep(self.before_s)
        return np.array([(began - self.before_s, began)] * len(requests))


def test_an_answer_that_is_handed_over_late_is_no_negative_time() -> None:
    runner: Any = Held()
    with Load(runner, [{}]) as runs:
        windows = [runs.run(4, 0.05) for _ in range(3)]
    assert all((window.interval_ms >= 0).all() for window in windows)
    assert all(window.interval_ms.sum() <= 1000 * window.seconds for window in windows)
